// Hostile files: every parser ends in a UserError or reads what is there, whatever the bytes are.
//
// `make fuzz` builds this file with libFuzzer (clang); PARSER=NAME picks the parser. It starts from
// tests/fuzz_corpus/NAME/, where files good* are to be read and files bad* to be refused; the others are some that a
// fuzzer found. The tests feed all of them to the parsers as well.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "eval/questions.h"
#include "run/checkpoint.h"
#include "text/encode.h"
#include "run/flags.h"
#include "eval/huggingface.h"
#include "tests/helpers.h"

namespace {

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

// Cuts off and returns what stands before the next zero byte: several files in one input.
std::string next_file(std::string& bytes) {
  const size_t end = std::min(bytes.find('\0'), bytes.size());
  std::string file = bytes.substr(0, end);
  bytes.erase(0, end + 1);
  return file;
}

// So that a range outside of the file is noticed.
void read_all(const void* data, size_t n) {
  for (size_t i = 0; i < n; i++) (void)static_cast<const volatile char*>(data)[i];
}

void parse_safetensors(const std::string& directory, std::string bytes) {
  write_bytes(directory + "/a.safetensors", bytes);
  const SafeTensors file(directory + "/a.safetensors");
  for (const auto& [name, tensor] : file.tensors) {
    read_all(tensor.data, tensor.count);
    if (tensor.dtype == "F32") read_all(file.get(name, tensor.shape), 4 * tensor.count);
  }
}

void parse_checkpoint(const std::string& directory, std::string bytes) {  // state.json, model.safetensors
  const std::string path = directory + "/state.json";
  write_bytes(path, next_file(bytes));
  write_bytes(directory + "/model.safetensors", bytes);
  check_weights(settings_from_state(path, read_json_file(path)).model, directory);
}

void parse_huggingface(const std::string& directory, std::string bytes) {  // config.json, index, model.safetensors
  write_bytes(directory + "/config.json", next_file(bytes));
  const std::string index = next_file(bytes), index_path = directory + "/model.safetensors.index.json";
  if (index.empty()) std::filesystem::remove(index_path);
  else write_bytes(index_path, index);
  write_bytes(directory + "/model.safetensors", bytes);
  std::filesystem::remove_all(directory + "/run");
  import_model(directory, directory + "/run");
}

void parse_tokenizer(const std::string& directory, std::string bytes) {
  write_bytes(directory + "/tokenizer.json", bytes);
  const BpeTokenizer tokenizer(directory + "/tokenizer.json");
  const std::string text =
      "Don't  say\t1234 \xC3\xA9t\xC3\xA9, e\xCC\x81!\n\n\xF0\x9F\x99\x82\xFF<|endoftext|>  aaaaaaaaaaaaaaaaaaaa";
  std::vector<int> tokens;
  tokenizer.encode(text.data(), text.size(), tokens);
  std::string back;
  for (int token : tokens) tokenizer.decode(token, back);
  for (int token = 0; token < tokenizer.vocabulary(); token++) tokenizer.decode(token, back);
}

void parse_pattern(const std::string&, std::string bytes) {  // pattern, text
  const std::string file = next_file(bytes), pattern = valid_utf8(file.data(), file.size());
  const std::string text = valid_utf8(bytes.data(), bytes.size());
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(pcre2_match_data_create(1, nullptr),
                                                                                pcre2_match_data_free);
  std::string all;
  Pattern(pattern).cut(text, match.get(), nullptr, [&](size_t begin, size_t end, bool) {
    if (begin != all.size() || begin >= end) throw std::logic_error("pieces overlap, or leave text out");
    all += text.substr(begin, end - begin);
  });
  if (all != text) throw std::logic_error("pieces do not make up the text");
}

void parse_text(const std::string& directory, std::string bytes) {  // first byte: format
  const int kind = bytes.empty() ? 0 : bytes[0] & 3;
  write_bytes(directory + "/text", bytes.substr(std::min<size_t>(1, bytes.size())));
  TextFormat format;
  if (kind == 1) format.field = "text";
  if (kind == 2) format.separator.clear();
  if (kind == 3) format.val_fraction = 0.5;
  CorpusWriter corpus(directory, std::make_unique<ByteTokenizer>(), 100);
  encode_file(corpus, directory + "/text", TextInput::size(directory + "/text"), format);
  const Meta meta = corpus.commit();
  size_t tokens = 0;
  if (meta.train.tokens) tokens += Dataset(directory + "/train_*.bin").tokens();
  if (meta.val.tokens) tokens += Dataset(directory + "/val_*.bin").tokens();
  if (tokens != meta.train.tokens + meta.val.tokens) throw std::logic_error("tokens were lost");
}

void parse_shard(const std::string& directory, std::string bytes) {  // meta.json, a.bin
  write_bytes(directory + "/meta.json", next_file(bytes));
  write_bytes(directory + "/a.bin", bytes);
  const Dataset data(directory + "/*.bin");
  const Meta meta = read_meta(directory + "/*.bin");
  const auto tokenizer = make_tokenizer(meta.tokenizer, directory);
  if (meta.vocabulary > 0) data.check_tokens(meta.vocabulary);
  const Shard& shard = data.shards()[0];
  decode_tokens(*tokenizer, shard, 0, shard.size(), "<|endoftext|>", [](const std::string&) {});
  std::vector<int> inputs(8), targets(8);
  for (uint64_t i = 0; i < 3; i++) data.batch(1, i, 4, 2, inputs.data(), targets.data());
}

void parse_questions(const std::string& directory, std::string bytes) {
  write_bytes(directory + "/questions", bytes);
  read_questions(directory + "/questions", ByteTokenizer(), "\nAnswer: ", 0);
}

const std::map<std::string, void (*)(const std::string& directory, std::string bytes)> parsers = {
    {"safetensors", parse_safetensors}, {"checkpoint", parse_checkpoint}, {"huggingface", parse_huggingface},
    {"tokenizer", parse_tokenizer},     {"pattern", parse_pattern},       {"text", parse_text},
    {"shard", parse_shard},             {"questions", parse_questions}};

}  // namespace

#ifdef LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto parse = parsers.at(std::getenv("PARSER"));
  static const TemporaryDirectory directory;
  try {
    parse(directory.path, std::string(reinterpret_cast<const char*>(data), size));
  } catch (const UserError&) {
  }
  return 0;
}
#else
TEST_CASE("fuzz: what the fuzzers kept is read or refused") {
  for (const auto& [name, parse] : parsers) {
    int files = 0;
    for (const auto& file : std::filesystem::directory_iterator("tests/fuzz_corpus/" + name)) {
      CAPTURE(file.path().string());
      TemporaryDirectory directory;
      const std::string bytes = read_text_file(file.path().string()), name = file.path().filename().string();
      bool good = true;
      try {
        parse(directory.path, bytes);
      } catch (const UserError& e) {
        CHECK(std::string(e.what()).find('\n') == std::string::npos);  // one line
        good = false;
      }
      if (name.rfind("good", 0) == 0) CHECK(good);
      if (name.rfind("bad", 0) == 0) CHECK(!good);
      files++;
    }
    CHECK(files > 3);
  }
}
#endif
