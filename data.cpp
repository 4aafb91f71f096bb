// data: makes token shards from text, and shows what is in them.
//
//   data stories                    the built-in corpus
//   data encode --input FILE...     any text
//   data fetch NAME                 a data set from the net
//   data info PATTERN               what shards hold
//   data decode FILE                tokens back to text
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "run/command_line.h"
#include "run/print.h"
#include "run/program.h"
#include "text/shards.h"
#include "text/encode.h"
#include "text/fetch.h"
#include "text/identity.h"
#include "text/stories.h"

namespace {

// "5M", "300k", "2G" or plain digits: a count in decimal units.
uint64_t parse_count(const std::string& flag, const std::string& text) {
  char* end = nullptr;
  bool number = !text.empty() && std::isdigit(static_cast<unsigned char>(text[0]));
  double value = number ? std::strtod(text.c_str(), &end) : NAN;
  std::string unit = end ? end : "";
  double scale = unit.empty() ? 1 : unit == "k" || unit == "K" ? 1e3 : unit == "M" ? 1e6 : unit == "G" ? 1e9 : NAN;
  if (!(value * scale >= 1 && value * scale < 1e15))
    throw UserError(flag + " " + text + ": should be a count from 1 up, such as 300k, 5M or 2G");
  return uint64_t(value * scale);
}

void print_split(const char* name, const Meta::Split& split) {
  if (split.tokens == 0) return;
  std::printf("%-5s  %llu documents, ", name, (unsigned long long)split.documents);
  if (split.bytes > 0) std::printf("%llu bytes of text, ", (unsigned long long)split.bytes);
  std::printf("%llu tokens", (unsigned long long)split.tokens);
  if (!std::isnan(split.entropy)) std::printf(", lowest reachable loss %.4f nats per token", split.entropy);
  std::printf("\n");
}

void print_written(const std::string& directory, const Meta& meta) {
  print_split("train", meta.train);
  print_split("val", meta.val);
  std::printf("written to %s\n", directory.c_str());
}

// `tokenizer` is "bytes" or the path of a tokenizer.json.
std::unique_ptr<Tokenizer> open_tokenizer(const std::string& tokenizer) {
  if (tokenizer == "bytes") return std::make_unique<ByteTokenizer>();
  return std::make_unique<BpeTokenizer>(tokenizer);
}

// Nobody should lose a corpus without having been told.
void say_what_is_replaced(const std::string& directory) {
  Meta meta;
  try {
    meta = read_meta(directory + "/train_000.bin");
  } catch (const UserError&) {  // not a meta.json: it goes, too
  }
  for (const char* file : {"/meta.json", "/train_000.bin", "/val_000.bin"})
    if (std::filesystem::exists(directory + file)) {
      std::fprintf(stderr, "note: %s holds shards (%llu tokens, tokenizer \"%s\"); they are replaced when all is written\n",
                   directory.c_str(), (unsigned long long)(meta.train.tokens + meta.val.tokens), meta.tokenizer.c_str());
      return;
    }
}

// Makes shards of text files. Those of `val` are for validation as a whole.
void encode(std::vector<std::string> inputs, const std::vector<std::string>& val, const std::string& directory,
            const std::string& tokenizer, TextFormat format, uint64_t shard_tokens) {
  if (format.skip_bad && format.field.empty())
    throw UserError("--skip-bad: is for lines of JSON; name the key of their text with --field");
  if (!(format.val_fraction >= 0 && format.val_fraction < 1))
    throw UserError("--val-fraction " + std::to_string(format.val_fraction) + ": should be from 0 to below 1");
  const size_t first_val = inputs.size();
  inputs.insert(inputs.end(), val.begin(), val.end());
  std::vector<uint64_t> sizes;
  uint64_t total = 0, before = 0;
  for (const std::string& input : inputs) {
    sizes.push_back(TextInput::size(input));
    total += sizes.back();
  }
  const bool terminal = ::isatty(STDERR_FILENO);
  std::unique_ptr<Tokenizer> opened = open_tokenizer(tokenizer);
  if (const std::string note = opened->note(); !note.empty()) std::fprintf(stderr, "note: %s\n", note.c_str());
  say_what_is_replaced(directory);
  CorpusWriter corpus(directory, std::move(opened), shard_tokens);
  BadLines bad;
  const auto started = std::chrono::steady_clock::now();
  uint64_t shown = 0;
  for (size_t i = 0; i < inputs.size(); i++) {
    uint64_t size = 0;
    if (i == first_val) format.val_fraction = 1;
    const BadLines here = encode_file(corpus, inputs[i], sizes[i], format, [&](uint64_t position) {
      size = position;
      const uint64_t done = before + position;
      if (!terminal || done < shown + (1u << 20)) return;
      shown = done;
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
      const int width = 30, filled = total ? int(width * done / total) : 0;
      std::fprintf(stderr, "\r[%s%s] %.0f", std::string(size_t(filled), '=').c_str(),
                   std::string(size_t(width - filled), ' ').c_str(), double(done) * 1e-6);
      if (total) std::fprintf(stderr, " of %.0f", double(total) * 1e-6);
      std::fprintf(stderr, " MB, %.1f MB/s\033[K", double(done) / seconds * 1e-6);
    });
    before += size;
    bad.count += here.count;
    if (bad.first.empty()) bad.first = here.first;
  }
  if (shown > 0) std::fprintf(stderr, "\r\033[K");
  if (bad.count > 0)
    std::fprintf(stderr, "note: %llu %s left out, the first: %s\n", (unsigned long long)bad.count,
                 bad.count == 1 ? "line" : "lines", bad.first.c_str());
  print_written(directory, corpus.commit());
}

void decode(const std::string& path, uint64_t offset, uint64_t count, const std::string& separator) {
  Shard shard(path);
  const Meta meta = read_meta(path);
  if (meta.tokenizer.empty()) throw UserError(path + ": no meta.json beside it that names a tokenizer");
  if (offset > shard.size())
    throw UserError("--offset " + std::to_string(offset) + ": the shard has " + std::to_string(shard.size()) +
                    " tokens");
  auto tokenizer = make_tokenizer(meta.tokenizer, directory_of(path));
  check_same_tokenizer(path, identity_of(meta, path), "the file beside it", identity_of(tokenizer.get()));
  count = std::min<uint64_t>(count, shard.size() - offset);
  auto write = [](const std::string& text) {
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size())
      throw UserError(std::string("cannot write to standard output: ") + std::strerror(errno));
  };
  shard.check_tokens(tokenizer->vocabulary());
  decode_tokens(*tokenizer, shard, offset, offset + count, separator, write);
}

void info(const std::string& pattern, int documents_shown) {
  Dataset data(pattern);
  Meta meta = read_meta(pattern);
  std::unique_ptr<Tokenizer> tokenizer;
  if (!meta.tokenizer.empty()) tokenizer = make_tokenizer(meta.tokenizer, directory_of(pattern));
  check_content(data, meta);
  if (tokenizer)
    check_same_tokenizer(pattern, identity_of(meta, pattern), "the file beside it", identity_of(tokenizer.get()));
  for (const Shard& shard : data.shards()) {
    if (meta.vocabulary > 0) shard.check_tokens(meta.vocabulary);
    uint64_t documents = 0;
    int smallest = most_vocabulary, largest = 0;
    for (size_t i = 0; i < shard.size(); i++) {
      const int token = int(shard[i]);
      smallest = std::min(smallest, token);
      largest = std::max(largest, token);
      documents += tokenizer && token == tokenizer->end_of_text();
    }
    std::printf("%s: %zu tokens, ids %d to %d", shard.path().c_str(), shard.size(), smallest, largest);
    if (tokenizer) std::printf(", %llu documents", (unsigned long long)documents);
    std::printf("\n");
  }
  std::printf("%zu shards, %zu tokens, all checked\n", data.shards().size(), data.tokens());
  if (!tokenizer) {
    std::printf("no meta.json beside them that names a tokenizer; the first ids:");
    for (size_t i = 0; i < std::min<size_t>(16, data.shards()[0].size()); i++)
      std::printf(" %u", data.shards()[0][i]);
    std::printf("\n");
    return;
  }
  std::printf("meta.json: tokenizer \"%s\", vocabulary %d\n", meta.tokenizer.c_str(), meta.vocabulary);
  print_split("train", meta.train);
  print_split("val", meta.val);
  // The beginning of the first documents.
  const Shard& first = data.shards()[0];
  const size_t most = 600;
  size_t at = 0;
  for (int d = 0; d < documents_shown && at < first.size(); d++) {
    size_t end = at + 1;
    while (end < first.size() && int(first[end]) != tokenizer->end_of_text()) end++;
    std::string text;
    decode_tokens(*tokenizer, first, at, std::min(end, at + most), "", [&](const std::string& s) { text += s; });
    std::printf("--- from token %zu:\n%s%s\n", at, printable(text).c_str(), end - at > most ? " ..." : "");
    at = end;
  }
}

// Downloads what is not there yet, and makes shards of it where it is text.
void fetch(const std::string& name, const std::string& url, std::string directory, const std::string& sha256,
           int shards, const std::string& tokenizer) {
  std::vector<std::string> names;
  const DataSet* found = nullptr;
  for (const DataSet& set : data_sets()) {
    names.push_back(set.name);
    if (set.name == name) found = &set;
  }
  if (!found) {
    std::string all;
    for (const std::string& known : names) all += " " + known;
    const std::string guess = closest(name, names);
    throw UserError("fetch " + name + ": no such data set; " +
                    (guess.empty() ? "there are:" + all : "did you mean " + guess + "?"));
  }
  DataSet set = *found;
  if (!sha256.empty()) set.sha256 = sha256;
  if (directory.empty()) directory = "data/" + name;
  if (set.shards > 0) {
    if (shards < 1 || shards > set.shards)
      throw UserError("--shards " + std::to_string(shards) + ": " + name + " has 1 to " + std::to_string(set.shards));
    if (!tokenizer.empty()) throw UserError("--tokenizer " + tokenizer + ": " + name + " comes as GPT-2's tokens");
  }
  fetch_files(set, url, directory, shards);
  if (set.shards > 0) {
    std::string note;
    print_written(directory, describe_gpt2_shards(set, url, directory, note));
    if (!note.empty()) std::fprintf(stderr, "note: tokens cannot be shown as text: %s\n", note.c_str());
    return;
  }
  TextFormat format;
  std::vector<std::string> val;
  if (!set.val.empty()) {
    format.val_fraction = 0;
    val.push_back(directory + "/" + set.val);
  }
  encode({directory + "/" + set.train}, val, directory, tokenizer.empty() ? "bytes" : tokenizer, format,
         default_shard_tokens);
}

int command(int argc, char** argv) {
  CLI::App app("Makes token shards from text, and shows what is in them.", "data");
  app.require_subcommand(1);
  std::string out, stories_out = "data/stories", bytes = "5M", shard_tokens = "100M", tokens, offset;
  std::string tokenizer = "bytes", fetch_tokenizer, name, url, sha256, path;
  TextFormat format;
  std::vector<std::string> inputs;
  uint64_t seed = 1;
  int documents = 2, shards = 1;

  app.option_defaults()->always_capture_default();  // --help shows them
  CLI::App* stories = app.add_subcommand("stories", "write the built-in corpus, in which order matters");
  stories->add_option("--out", stories_out, "directory to write to");
  stories->add_option("--bytes", bytes, "bytes of training text; a twentieth more for validation");
  stories->add_option("--seed", seed, "seed of the generator");

  CLI::App* encoder = app.add_subcommand("encode", "turn text files into shards of tokens");
  encoder->add_option("--input", inputs, "text: plain, compressed (gz, bz2, xz, zst) or archives (zip, tar); -: stdin")
      ->required();
  encoder->add_option("--out", out, "directory to write to")->required();
  encoder->add_option("--tokenizer", tokenizer, "bytes, or the path of a Hugging Face tokenizer.json (byte-level BPE)");
  encoder->add_option("--separator", format.separator, "a line of this alone stands between documents");
  encoder->add_option("--field", format.field, "JSON lines: the key whose value is a document's text");
  encoder->add_flag("--skip-bad", format.skip_bad, "JSON lines: leave out and count what has no such text");
  encoder->add_option("--val-fraction", format.val_fraction, "the last part of each file, for validation");
  encoder->add_option("--shard-tokens", shard_tokens, "tokens per shard");

  CLI::App* decoder = app.add_subcommand("decode", "print a shard's tokens as text");
  decoder->add_option("file", path, "shard (.bin)")->required();
  decoder->add_option("--tokens", tokens, "how many (default all)");
  decoder->add_option("--offset", offset, "first token (default 0)");
  decoder->add_option("--separator", format.separator, "line between documents");

  CLI::App* informer = app.add_subcommand("info", "check shards and show what they hold");
  informer->add_option("pattern", path, "shards, such as 'data/stories/train_*.bin'")->required();
  informer->add_option("--documents", documents, "how many documents to show the beginning of");

  std::string sets;
  for (const DataSet& set : data_sets()) sets += (sets.empty() ? "" : ", ") + set.name;
  CLI::App* fetcher = app.add_subcommand("fetch", "download a data set, check it, and make shards of it");
  fetcher->add_option("name", name, sets)->required();
  fetcher->add_option("--shards", shards, "fineweb, fineweb-edu: training shards, of 100 M tokens and 200 MB each");
  fetcher->add_option("--tokenizer", fetch_tokenizer, "of text: bytes (the default), or the path of a tokenizer.json");
  fetcher->add_option("--url", url, "another directory with the same files; file:///DIRECTORY works");
  fetcher->add_option("--sha256", sha256, "checksum, where the file at --url is another one");
  fetcher->add_option("--out", out, "directory to write to (default data/NAME)");

  if (argc < 2) throw UserError("data: which command? stories, encode, decode, info or fetch (see data --help)");
  const std::vector<std::string> commands = {"stories", "encode", "decode", "info", "fetch"};
  if (argv[1][0] != '-' && std::find(commands.begin(), commands.end(), argv[1]) == commands.end()) {
    const std::string guess = closest(argv[1], commands);
    throw UserError(std::string("data ") + argv[1] + ": no such command; " +
                    (guess.empty() ? "stories, encode, decode, info or fetch" : "did you mean " + guess + "?"));
  }
  parse_command_line(app, {argv + 1, argv + argc});
  if (*stories) {
    say_what_is_replaced(stories_out);
    print_written(stories_out, write_stories(stories_out, parse_count("--bytes", bytes), seed));
  }
  if (*encoder) encode(inputs, {}, out, tokenizer, format, parse_count("--shard-tokens", shard_tokens));
  if (*decoder)
    decode(path, offset.empty() || offset == "0" ? 0 : parse_count("--offset", offset),
           tokens.empty() ? UINT64_MAX : parse_count("--tokens", tokens), format.separator);
  if (*informer) info(path, documents);
  if (*fetcher) fetch(name, url, out, sha256, shards, fetch_tokenizer);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(argv, [&](const auto&) { return command(argc, argv); });
}
