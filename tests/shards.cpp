// Tests of text/shards.h (order), text/encode.h (writing) and text/stories.h (the built-in corpus).
#include "text/shards.h"

#include <doctest/doctest.h>
#include <sys/resource.h>

#include <filesystem>
#include <map>

#include "text/encode.h"
#include "text/identity.h"
#include "text/stories.h"
#include "tests/helpers.h"

namespace {

void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

// A shard as bytes, written here independently of ShardWriter.
std::string shard_bytes(const std::vector<uint16_t>& tokens, int32_t magic = 20240520, int32_t version = 1,
                        int32_t count = -1) {
  std::vector<int32_t> header(256);
  header[0] = magic;
  header[1] = version;
  header[2] = count == -1 ? int32_t(tokens.size()) : count;
  return std::string(reinterpret_cast<const char*>(header.data()), 1024) +
         std::string(reinterpret_cast<const char*>(tokens.data()), 2 * tokens.size());
}

std::vector<uint16_t> counting(size_t n, int first = 0) {
  std::vector<uint16_t> tokens(n);
  for (size_t i = 0; i < n; i++) tokens[i] = uint16_t(first + int(i));
  return tokens;
}

void encode(CorpusWriter& corpus, const std::string& path, const TextFormat& format) {
  encode_file(corpus, path, TextInput::size(path), format);
}

std::string decoded(const std::string& path, const std::string& separator = "<|endoftext|>") {
  std::string text;
  Shard shard(path);
  decode_tokens(ByteTokenizer(), shard, 0, shard.size(), separator, [&](const std::string& s) { text += s; });
  return text;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("data: a good shard opens and holds its tokens") {
  TemporaryDirectory directory;
  write_file(directory / "a.bin", shard_bytes(counting(50)));
  Shard shard(directory / "a.bin");
  CHECK(shard.size() == 50);
  for (int i = 0; i < 50; i++) CHECK(shard[i] == i);
  Shard moved = std::move(shard);
  CHECK(moved[49] == 49);
}

TEST_CASE("data: broken shards are refused, each with its reason") {
  TemporaryDirectory directory;
  const std::string path = directory / "a.bin", good = shard_bytes(counting(40));
  auto open = [&] { Shard shard(path); };
  CHECK(contains(error_of(open), "No such file"));
  CHECK(contains(error_of([&] { Shard shard(directory.path); }), "not a regular file"));
  for (size_t length = 0; length < good.size(); length++) {  // cut anywhere
    write_file(path, good.substr(0, length));
    CHECK(contains(error_of(open), length == 0 ? "empty" : "truncated"));
  }
  write_file(path, good + "x");
  CHECK(contains(error_of(open), "too long"));
  write_file(path, shard_bytes(counting(40), 20240521));
  CHECK(contains(error_of(open), "magic 20240521"));
  write_file(path, shard_bytes(counting(40), 20240520, 3));
  CHECK(contains(error_of(open), "version 3"));
  write_file(path, shard_bytes(counting(40), 20240520, 2));  // of 32 bits, so there is not enough
  CHECK(contains(error_of(open), "1104 bytes, should be 1184 for the 40 tokens of 4 bytes in its header (version 2)"));
  write_file(path, shard_bytes(counting(40), 20240801, 1));
  CHECK(contains(error_of(open), "version 1, should be 7"));
  write_file(path, shard_bytes({}, 20240520, 1, 0));
  CHECK(contains(error_of(open), "0 tokens"));
  write_file(path, shard_bytes(counting(40), 20240520, 1, INT32_MIN));
  CHECK(contains(error_of(open), "-2147483648 tokens"));
  write_file(path, shard_bytes(counting(40), 20240520, 1, INT32_MAX));  // claims 4 GB
  CHECK(contains(error_of(open), "truncated"));
  CHECK(contains(error_of([&] { Dataset data(directory / "none_*.bin"); }), "no shard matches"));
  CHECK(contains(error_of([&] { Dataset data(directory / "none.bin"); }), "none.bin: cannot open shard: No such file"));
}

TEST_CASE("data: ids beyond 65,535 stand in shards of 32 bits") {
  TemporaryDirectory directory;
  const std::vector<uint32_t> tokens = {128000, 7, 65536, 65535, 1, 128255};
  std::string bytes = shard_bytes({}, 20240801, 7, int32_t(tokens.size()));
  bytes.append(reinterpret_cast<const char*>(tokens.data()), 4 * tokens.size());
  write_file(directory / "train_000.bin", bytes);
  const Dataset data(directory / "train_*.bin");
  CHECK(data.shards()[0].size() == 6);
  CHECK(data.shards()[0][0] == 128000);
  std::vector<int> inputs(2), targets(2);
  data.window(1, 2, inputs.data(), targets.data());
  CHECK(inputs == std::vector<int>{65536, 65535});
  CHECK(targets == std::vector<int>{65535, 1});
  data.check_tokens(128256);
  CHECK(contains(error_of([&] { data.check_tokens(128255); }), "token 5 is 128255"));
  // Written where the vocabulary asks for it, and read back.
  struct Wide : ByteTokenizer {
    int vocabulary() const override { return 70000; }
    int end_of_text() const override { return 69999; }
  };
  CorpusWriter corpus(directory / "wide", std::make_unique<Wide>(), 4);
  corpus.document(false, "abcdefghij");
  CHECK(corpus.commit().train.tokens == 11);
  const Dataset wide(directory / "wide/train_*.bin");
  CHECK(wide.shards().size() == 3);
  CHECK(wide.shards()[0][0] == 69999);
  CHECK(wide.shards()[2].size() == 3);
  CHECK(wide.shards()[2][2] == 'j');
  CHECK(std::filesystem::file_size(directory / "wide/train_000.bin") == 1024 + 4 * 4);
  CHECK(read_meta(directory / "wide/train_*.bin").vocabulary == 70000);
}

TEST_CASE("data: a name means itself where there is such a file or directory, whatever signs it has") {
  TemporaryDirectory directory;
  for (const char* name : {"r[1]", "r1", "a*b?"}) std::filesystem::create_directory(directory / name);
  write_file(directory / "r[1]/train_000.bin", shard_bytes(counting(10)));
  write_file(directory / "r1/train_000.bin", shard_bytes(counting(20)));
  write_file(directory / "r1/train_[1].bin", shard_bytes(counting(30)));
  write_file(directory / "a*b?/x.bin", shard_bytes(counting(40)));
  auto tokens = [&](const std::string& pattern) { return Dataset(directory / pattern).tokens(); };
  CHECK(tokens("r[1]/train_*.bin") == 10);
  CHECK(tokens("r?/train_000.bin") == 20);
  CHECK(tokens("r[0-9]/train_0*.bin") == 20);
  CHECK(tokens("r1/train_[1].bin") == 30);
  CHECK(tokens("a*b?/*.bin") == 40);
}

TEST_CASE("data: a token outside of the vocabulary is named with its place") {
  TemporaryDirectory directory;
  std::vector<uint16_t> tokens(40000, 256);
  tokens[39998] = 300;
  tokens[39999] = 301;
  write_file(directory / "a.bin", shard_bytes(tokens));
  Dataset data(directory / "a.bin");
  CHECK(error_of([&] { data.check_tokens(302); }) == "");
  CHECK(error_of([&] { data.check_tokens(65536); }) == "");
  std::string message = error_of([&] { data.check_tokens(300); });
  CHECK(contains(message, "a.bin: token 39998 is 300"));
  CHECK(contains(message, "vocabulary of 300"));
  CHECK(contains(error_of([&] { data.check_tokens(257); }), "token 39998"));
  CHECK(contains(error_of([&] { data.check_tokens(256); }), "token 0 is 256"));
}

TEST_CASE("data: permute is a permutation, and all elements go everywhere") {
  for (uint64_t n : {1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097})
    for (uint64_t key : {0ull, 1ull, 0xfedcba9876543210ull}) {
      std::set<uint64_t> seen;
      for (uint64_t i = 0; i < n; i++) seen.insert(permute(i, n, key));
      CHECK(seen.size() == n);
      CHECK(*seen.rbegin() == n - 1);
    }
  // Where element i of 10 goes over 10,000 keys: chi-squared with 9 degrees of freedom exceeds 40 once in 10^5 times.
  for (uint64_t i = 0; i < 10; i++) {
    std::vector<int> count(10);
    for (uint64_t key = 0; key < 10000; key++) count[permute(i, 10, mix_bits(key + 12345))]++;
    double chi2 = 0;
    for (int c : count) chi2 += (c - 1000.0) * (c - 1000.0) / 1000;
    CHECK(chi2 < 40);
  }
}

TEST_CASE("data: batches go through all windows once per epoch, in an order that only (seed, index) decide") {
  TemporaryDirectory directory;
  // Two shards of 10 and 7 windows of 8 positions, with a remainder each. A token's value is its place.
  write_file(directory / "train_000.bin", shard_bytes(counting(10 * 8 + 5)));
  write_file(directory / "train_001.bin", shard_bytes(counting(7 * 8 + 1, 1000)));
  const int T = 8, B = 3, N = 17;
  Dataset data(directory / "train_*.bin");
  CHECK(data.tokens() == 142);
  CHECK(data.shards().size() == 2);
  CHECK(data.windows(T) == N);

  std::vector<int> inputs(B * T), targets(B * T);
  auto order = [&](const Dataset& from, uint64_t seed, int epochs) {
    std::vector<int> starts;
    for (int index = 0; index * B < epochs * N; index++) {
      from.batch(seed, uint64_t(index), B, T, inputs.data(), targets.data());
      for (int b = 0; b < B; b++) {
        int start = inputs[b * T];
        starts.push_back(start);
        CHECK((start % 1000) % T == 0);
        for (int t = 0; t < T; t++) {
          CHECK(inputs[b * T + t] == start + t);  // never across shards
          CHECK(targets[b * T + t] == start + t + 1);
        }
      }
    }
    starts.resize(size_t(epochs * N));
    return starts;
  };
  std::vector<int> starts = order(data, 1, 3);
  for (int epoch = 0; epoch < 3; epoch++) {
    std::set<int> seen(starts.begin() + epoch * N, starts.begin() + (epoch + 1) * N);
    CHECK(seen.size() == N);
  }
  CHECK(!std::equal(starts.begin(), starts.begin() + N, starts.begin() + N));
  CHECK(!std::equal(starts.begin() + N, starts.begin() + 2 * N, starts.begin() + 2 * N));
  CHECK(!std::is_sorted(starts.begin(), starts.begin() + N));
  CHECK(order(data, 2, 3) != starts);
  Dataset again(directory / "train_*.bin");
  CHECK(order(again, 1, 3) == starts);
  again.batch(1, 5, B, T, inputs.data(), targets.data());  // without those before it
  for (int b = 0; b < B; b++) CHECK(inputs[b * T] == starts[size_t(5 * B + b)]);
  // Two micro-batches of 3 are one batch of 6.
  std::vector<int> inputs6(6 * T), targets6(6 * T);
  data.batch(1, 2, 6, T, inputs6.data(), targets6.data());
  for (int b = 0; b < 6; b++) CHECK(inputs6[b * T] == starts[size_t(12 + b)]);
}

TEST_CASE("data: windows in order, and contexts that do not fit") {
  TemporaryDirectory directory;
  write_file(directory / "val_000.bin", shard_bytes(counting(33)));
  write_file(directory / "val_001.bin", shard_bytes(counting(20, 500)));
  Dataset data(directory / "val_*.bin");
  CHECK(data.windows(16) == 3);
  std::vector<int> inputs(16), targets(16);
  for (int i = 0; i < 3; i++) {
    data.window(size_t(i), 16, inputs.data(), targets.data());
    CHECK(inputs[0] == (i < 2 ? 16 * i : 500));
    CHECK(targets[15] == inputs[0] + 16);
  }
  CHECK_THROWS_AS(data.window(3, 16, inputs.data(), targets.data()), std::out_of_range);
  CHECK(data.windows(19) == 2);
  std::string message = error_of([&] { data.windows(20); });
  CHECK(contains(message, "val_001.bin: context longer than the shard"));
  CHECK(contains(message, "needs 21 tokens, the shard has 20"));
  CHECK(contains(error_of([&] { data.windows(0); }), "context 0"));
  CHECK(contains(error_of([&] { data.windows(-5); }), "context -5"));
}

// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("data: every byte survives encoding and decoding") {
  ByteTokenizer tokenizer;
  std::string all, back;
  for (int i = 0; i < 256; i++) all += char(i);
  std::vector<int> tokens;
  tokenizer.encode(all.data(), all.size(), tokens);
  CHECK(std::vector<uint16_t>(tokens.begin(), tokens.end()) == counting(256));
  for (int token : tokens) tokenizer.decode(token, back);
  CHECK(back == all);
  tokenizer.decode(tokenizer.end_of_text(), back);
  CHECK(back == all);
  CHECK(make_tokenizer("bytes", ".")->vocabulary() == 257);
  CHECK(contains(error_of([] { make_tokenizer("gpt9", "."); }), "gpt9"));
}

TEST_CASE("data: text becomes shards of documents and comes back") {
  TemporaryDirectory directory;
  std::string binary(4096, 'a');  // whose first bytes are text, or it would be refused
  for (int i = 0; i < 256; i++) binary += char(i);
  const std::string separator = "<|endoftext|>", line = separator + "\n";
  const std::string one = "first\n" + binary + "\nnot a " + separator + "\n", two = "\n\nsecond " + separator + "\n";
  // A separator at the start, two in a row, one with a carriage return, one as the end: no empty documents come of it.
  write_file(directory / "a.txt", line + one + line + line + two + separator + "\r\nthird\n" + separator);
  CorpusWriter corpus(directory / "out", std::make_unique<ByteTokenizer>());
  encode(corpus, directory / "a.txt", {separator, "", 0});
  Meta meta = corpus.commit();
  const std::string text = one + line + two + line + "third\n";
  CHECK(decoded(directory / "out/train_000.bin") == text);
  CHECK(meta.train.documents == 3);
  CHECK(meta.train.bytes == one.size() + two.size() + 6);
  CHECK(meta.train.tokens == meta.train.bytes + 3);
  CHECK(meta.val.tokens == 0);
  Shard shard(directory / "out/train_000.bin");
  CHECK(shard.size() == meta.train.tokens);
  CHECK(shard[0] == 256);
  CHECK(shard[one.size() + 1] == 256);
  // And from there once more.
  write_file(directory / "b.txt", text);
  CorpusWriter again(directory / "again", std::make_unique<ByteTokenizer>());
  encode(again, directory / "b.txt", {separator, "", 0});
  again.commit();
  CHECK(decoded(directory / "again/train_000.bin") == text);
}

TEST_CASE("data: validation text is the end of each file, cut at a line where there is one") {
  TemporaryDirectory directory;
  std::string text;
  for (int i = 0; i < 1000; i++) text += "line " + std::to_string(i) + "\n";
  write_file(directory / "lines.txt", text);
  write_file(directory / "one.txt", std::string(1 << 20, 'x'));  // no line at all
  for (std::string name : {"lines", "one"}) {
    CorpusWriter corpus(directory / name, std::make_unique<ByteTokenizer>());
    encode(corpus, directory / (name + ".txt"), {"", "", 0.25});
    Meta meta = corpus.commit();
    std::string train = decoded(directory / (name + "/train_000.bin"));
    std::string val = decoded(directory / (name + "/val_000.bin"));
    CHECK(train + val == (name == "lines" ? text : std::string(1 << 20, 'x')));
    CHECK(meta.val.bytes == val.size());
    double fraction = double(val.size()) / double(train.size() + val.size());
    CHECK(fraction <= 0.25);
    CHECK(fraction > 0.25 - double((1 << 16) + 10) / double(train.size() + val.size()));
    if (name == "lines") CHECK(val.substr(0, 5) == "line ");
    if (name == "lines") CHECK(fraction > 0.249);
  }
}

TEST_CASE("data: compressed text and JSON lines are read like plain text") {
  TemporaryDirectory directory;
  std::string text, lines;
  for (int i = 0; i < 3000; i++) {
    const std::string document = "document " + std::to_string(i * i) + "\n\"quoted\" \u00e9\n";
    text += (i ? "<|endoftext|>\n" : "") + document;
    lines += nlohmann::json{{"id", i}, {"text", document}}.dump() + (i % 7 ? "\n" : "\r\n\n");
  }
  write_file(directory / "plain", text);
  write_file(directory / "lines", lines);
  for (auto [name, filter] : {std::pair{"gz", ARCHIVE_FILTER_GZIP}, {"xz", ARCHIVE_FILTER_XZ}, {"zst", ARCHIVE_FILTER_ZSTD}}) {
    archive* file = archive_write_new();
    archive_write_add_filter(file, filter);
    archive_write_set_format_raw(file);
    REQUIRE(archive_write_open_filename(file, (directory / name).c_str()) == ARCHIVE_OK);
    archive_entry* entry = archive_entry_new();
    archive_entry_set_filetype(entry, AE_IFREG);
    archive_write_header(file, entry);
    archive_write_data(file, text.data(), text.size());
    archive_entry_free(entry);
    archive_write_free(file);
  }
  const int threads = omp_get_max_threads();
  for (std::string name : {"plain", "gz", "xz", "zst", "lines"}) {
    CAPTURE(name);
    omp_set_num_threads(name == "gz" ? 1 : 3);
    CHECK((name == "plain" || name == "lines" || std::filesystem::file_size(directory / name) < text.size() / 2));
    CorpusWriter corpus(directory / (name + ".out"), std::make_unique<BpeTokenizer>("tests/fixtures/tokenizer.json"));
    encode(corpus, directory / name, {"<|endoftext|>", name == "lines" ? "text" : "", 0.1});
    const Meta meta = corpus.commit();
    // Plain text is cut at a line, here in the middle of a document; JSON lines between two.
    CHECK(meta.train.documents + meta.val.documents == (name == "lines" ? 3000 : 3001));
    CHECK(std::fabs(double(meta.val.documents) - 300) < 15);  // a tenth of the bytes, not of the documents
    CHECK(meta.tokenizer == "tokenizer.json");
    CHECK(meta.vocabulary == 420);
    CHECK(read_text_file(directory / (name + ".out/tokenizer.json")) == read_text_file("tests/fixtures/tokenizer.json"));
    std::string back;
    for (const char* split : {"train_000.bin", "val_000.bin"}) {
      const Shard shard(directory / (name + ".out/" + split));
      if (!back.empty() && name == "lines") back += "<|endoftext|>\n";
      decode_tokens(BpeTokenizer(directory / (name + ".out/tokenizer.json")), shard, 0, shard.size(),
                    "<|endoftext|>", [&](const std::string& part) { back += part; });
    }
    CHECK(back == text);
    if (name != "plain" && name != "lines") {
      for (const char* split : {"train_000.bin", "val_000.bin"})
        CHECK(read_text_file(directory / (name + ".out/" + split)) ==
              read_text_file(directory / ("plain.out/" + std::string(split))));
      std::filesystem::resize_file(directory / name, std::filesystem::file_size(directory / name) / 2);
      CHECK(contains(error_of([&] { TextInput::size(directory / name); }), directory / name));
    }
  }
  omp_set_num_threads(threads);
  auto refused = [&](const std::string& line) {
    write_file(directory / "bad", "{\"text\": \"good\"}\n" + line + "\n");
    CorpusWriter corpus(directory / "bad.out", std::make_unique<ByteTokenizer>());
    return error_of([&] { encode(corpus, directory / "bad", {"", "text", 0}); });
  };
  for (const char* line : {"{", "{\"texts\": \"a\"}", "{\"text\": 5}", "[1]", "{\"text\": \"\\ud800\"}", "{\"text\": \"\xff\"}"})
    CHECK(contains(refused(line), "bad, line 2"));
  CHECK(contains(refused(std::string(1 << 20, '[')), "bad, line 2"));
}

TEST_CASE("data: a document of any length is encoded in bounded pieces, at places that change no token") {
  TemporaryDirectory directory;
  std::string text;
  while (text.size() < most_document * 5 / 2) text += "word" + std::to_string(text.size()) + (text.size() % 3 ? " " : "\n");
  write_file(directory / "long", text);
  CorpusWriter corpus(directory / "out", std::make_unique<BpeTokenizer>("tests/fixtures/tokenizer.json"));
  encode(corpus, directory / "long", {"", "", 0});
  CHECK(corpus.commit().train.documents == 1);
  const BpeTokenizer tokenizer("tests/fixtures/tokenizer.json");
  std::vector<int> want = {tokenizer.end_of_text()}, got;
  tokenizer.encode(text.data(), text.size(), want);
  const Shard shard(directory / "out/train_000.bin");
  REQUIRE(shard.size() == want.size());
  got.resize(shard.size());
  shard.read(0, shard.size(), got.data());
  CHECK(got == want);
  CHECK(place_to_cut("ab cd  e") == 5);
  CHECK(place_to_cut("abcd\xC3\xA9") == 4);
}

TEST_CASE("data: many shards, the small last one joined to its neighbour, old ones removed") {
  TemporaryDirectory directory;
  auto write = [&](size_t bytes, size_t shard_tokens) {
    CorpusWriter corpus(directory.path, std::make_unique<ByteTokenizer>(), shard_tokens);
    std::string text;
    for (size_t i = 0; i < bytes; i++) text += char('a' + i % 26);
    corpus.document(false, text);
    return corpus.commit();
  };
  using Names = std::set<std::string>;
  write(449, 100);  // 450 tokens: the last shard is half full and stays
  CHECK(directory.files() == Names{"meta.json", "train_000.bin", "train_001.bin", "train_002.bin", "train_003.bin",
                                   "train_004.bin"});
  CHECK(Shard(directory / "train_004.bin").size() == 50);
  Meta meta = write(348, 100);  // 349 tokens: 49 join
  CHECK(directory.files() == Names{"meta.json", "train_000.bin", "train_001.bin", "train_002.bin"});
  Shard last(directory / "train_002.bin");
  CHECK(last.size() == 149);
  for (size_t i = 0; i < 149; i++) CHECK(last[i] == 'a' + (199 + i) % 26);
  CHECK(meta.train.tokens == 349);
  CHECK(Dataset(directory / "train_*.bin").tokens() == 349);
  write(10, 100);
  CHECK(directory.files() == Names{"meta.json", "train_000.bin"});
}

TEST_CASE("data: a corpus is not written beside shards from elsewhere") {
  TemporaryDirectory directory;
  write_file(directory / "model.bin", "not a shard");
  write_stories(directory.path, 1000, 1);
  write_stories(directory.path, 1000, 2);  // its own may be replaced
  write_file(directory / "fineweb_train_000001.bin", shard_bytes(counting(4)));
  CHECK(contains(error_of([&] { write_stories(directory.path, 1000, 3); }), "fineweb_train_000001.bin"));
}

TEST_CASE("data: more shards than a program may have open files") {
  TemporaryDirectory directory;
  struct rlimit before, few;
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &before) == 0);
  few = before, few.rlim_cur = 64;
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &few) == 0);
  CorpusWriter corpus(directory / "out", std::make_unique<ByteTokenizer>(), 5);
  corpus.document(false, std::string(1000, 'x'));
  const std::string error = error_of([&] { corpus.commit(); });
  ::setrlimit(RLIMIT_NOFILE, &before);
  CHECK(error == "");
  const Dataset data(directory / "out/train_*.bin");  // 1,001 tokens: the last joins the shard before
  CHECK(data.shards().size() == 200);
  CHECK(data.tokens() == 1001);
  CHECK(data.shards().back().size() == 6);
}

TEST_CASE("data: archives, UTF-16 and what is no text") {
  TemporaryDirectory directory;
  auto text_of_file = [&](const std::string& bytes) {
    write_file(directory / "in", bytes);
    CorpusWriter corpus(directory / "out", std::make_unique<ByteTokenizer>());
    encode(corpus, directory / "in", {"", "", 0});
    corpus.commit();
    return decoded(directory / "out/train_000.bin", "#");
  };
  auto utf16 = [](const std::u16string& text, bool big) {
    std::string bytes;
    for (char16_t unit : text) {
      const char high = char(unit >> 8), low = char(unit & 255);
      bytes += {big ? high : low, big ? low : high};
    }
    return bytes;
  };
  const std::u16string text = u"\uFEFFa\u00e9\u4e2d\U0001F600\n";
  for (bool big : {true, false}) {
    CHECK(text_of_file(utf16(text, big)) == "a\u00e9\u4e2d\U0001F600\n");
    std::u16string broken = u"\uFEFFa";
    broken += {char16_t(0xD800), u'b', char16_t(0xDC00), char16_t(0xD83D)};
    CHECK(text_of_file(utf16(broken, big)) == "a\uFFFDb\uFFFD\uFFFD");
    std::u16string longer = text;  // more than is read at once, with pairs across every boundary
    for (int i = 0; i < 50000; i++) longer += u"\U0001F600";
    const std::string got = text_of_file(utf16(longer, big) + "x");
    CHECK(got.size() == 11 + 4 * 50000 + 3);
    CHECK(got.substr(got.size() - 7) == "\U0001F600\uFFFD");
  }
  // Each file of an archive is a document; compressed text is text.
  struct Member {
    const char *name, *text;
  };
  for (auto format : {archive_write_set_format_zip, archive_write_set_format_ustar})
    for (auto filter : {archive_write_add_filter_none, archive_write_add_filter_bzip2}) {
      archive* out = archive_write_new();
      format(out), filter(out);
      archive_write_open_filename(out, (directory / "archive").c_str());
      for (const Member& member : {Member{"d/a.txt", "one\ntwo\n"}, Member{"d/._a.txt", "\1\2"}, Member{"b", "three"}}) {
        archive_entry* entry = archive_entry_new();
        archive_entry_set_pathname(entry, member.name);
        archive_entry_set_filetype(entry, AE_IFREG);
        archive_entry_set_perm(entry, 0644);
        archive_entry_set_size(entry, la_int64_t(std::strlen(member.text)));
        archive_write_header(out, entry);
        archive_write_data(out, member.text, std::strlen(member.text));
        archive_entry_free(entry);
      }
      archive_write_free(out);
      CHECK(TextInput::size(directory / "archive") == 13);
      CHECK(text_of_file(read_text_file(directory / "archive")) == "one\ntwo\n#\nthree");
    }
  // Another encoding, or none. Stray bytes that are no text are kept.
  std::string latin1, sparse(2000, 'a');
  for (int i = 0; i < 40; ++i) latin1 += "caf\xE9 au lait, ";
  for (int i = 0; i < 20; ++i) sparse[97 * i] = i % 2 ? '\0' : '\xE9';
  CHECK(contains(error_of([&] { text_of_file(latin1); }), "is no UTF-8 text: 40 of its first 560 bytes"));
  CHECK(contains(error_of([&] { text_of_file(utf16(u"no mark, but text", false)); }), "17 of its first 34 bytes"));
  CHECK(text_of_file(sparse) == sparse);
  // A .gz in a .tar, and other files that somebody may take for text.
  for (const std::string& begin : {std::string("PAR1\x15"), std::string("%PDF-1.7"), std::string("7z\xBC\xAF\x27\x1C"),
                                   std::string("\xFF\xFE\0\0a\0\0\0", 8), shard_bytes(counting(4))}) {
    CAPTURE(begin);
    CHECK(contains(error_of([&] { text_of_file(begin); }), directory / "in: is "));
  }
  CHECK(text_of_file("BZh, PARIS and PDF") == "BZh, PARIS and PDF");
}

TEST_CASE("data: lines of JSON that hold no text, and documents longer than what is encoded at once") {
  TemporaryDirectory directory;
  TextFormat format;
  format.field = "text", format.val_fraction = 0;
  write_file(directory / "in",
             "{\"text\": \"a\"}\n\n{\"text\": \"\\ud800\"}\n{\"text\": \"b\xFF\"}\n[]\n{\"text\": 5}\n{\"t\": \"x\"}\n{\n"
             "{\"text\": \"c\"}");
  auto run = [&](BadLines& bad) {
    CorpusWriter corpus(directory / "out", std::make_unique<ByteTokenizer>());
    bad = encode_file(corpus, directory / "in", TextInput::size(directory / "in"), format);
    return corpus.commit();
  };
  BadLines bad;
  CHECK(contains(error_of([&] { run(bad); }), "in, line 3: no text in \"text\": "));
  format.skip_bad = true;
  CHECK(run(bad).train.documents == 2);
  CHECK(bad.count == 6);
  CHECK(contains(bad.first, "in, line 3: "));
  CHECK(decoded(directory / "out/train_000.bin", "#") == "a\n#\nc");
  std::string text;
  while (text.size() < most_document * 5 / 2) text += "word" + std::to_string(text.size()) + " ";
  write_file(directory / "in", "{\"text\": \"" + text + "\"}\n{\"text\": \"c\"}\n");
  const Meta meta = run(bad);
  CHECK(bad.count == 0);
  CHECK(meta.train.documents == 2);
  CHECK(meta.train.bytes == text.size() + 1);
  CHECK(decoded(directory / "out/train_000.bin", "#") == text + "\n#\nc");
}

TEST_CASE("data: nothing is left of a corpus that fails") {
  TemporaryDirectory directory;
  write_file(directory / "a.txt", std::string(100000, 'x'));
  const std::string out = directory / "out";
  std::filesystem::create_directory(out);
  write_file(out + "/train_000.bin", "before");
  {
    CorpusWriter corpus(out, std::make_unique<ByteTokenizer>(), 1000);
    encode(corpus, directory / "a.txt", {"", "", 0.05});
    CHECK(contains(error_of([&] { encode(corpus, directory / "missing.txt", {}); }), "missing.txt"));
  }
  CHECK(std::distance(std::filesystem::directory_iterator(out), {}) == 1);
  std::ifstream file(out + "/train_000.bin");
  CHECK(std::string(std::istreambuf_iterator<char>(file), {}) == "before");

  CorpusWriter empty(directory / "empty", std::make_unique<ByteTokenizer>());
  CHECK(contains(error_of([&] { empty.commit(); }), "no text"));
  auto make = [&](const std::string& path, size_t shard_tokens) {
    CorpusWriter corpus(path, std::make_unique<ByteTokenizer>(), shard_tokens);
  };
  CHECK(contains(error_of([&] { make(out, 0); }), "--shard-tokens 0"));
  CHECK(contains(error_of([&] { make(out, 4'000'000'000); }), "--shard-tokens 4000000000"));
  CHECK(contains(error_of([&] { make(directory / "a.txt/out", 100); }), "a.txt/out"));
  if (std::FILE* full = std::fopen("/dev/full", "w")) {  // a device on which every write fails for want of space
    std::fclose(full);
    std::filesystem::create_symlink("/dev/full", directory / "full.part");
    CHECK(contains(error_of([&] {
                     NewFile file(directory / "full");
                     std::string megabyte(1 << 20, 'x');
                     file.write(megabyte.data(), megabyte.size());
                     file.sync();
                   }),
                   "No space left"));
  }
}

TEST_CASE("data: a fingerprint of the content stands in meta.json, and another content is noticed") {
  TemporaryDirectory directory;
  write_stories(directory / "a", 3000, 1);
  write_stories(directory / "b", 3000, 2);
  const std::string train = directory / "a/train_*.bin";
  const Meta meta = read_meta(train);
  CHECK(meta.tokenizer_fingerprint == ByteTokenizer().fingerprint());
  CHECK(meta.shards.size() == 2);
  CHECK(meta.shards.at("train_000.bin") == Shard(directory / "a/train_000.bin").fingerprint());
  CHECK(Dataset(train).fingerprint() != Dataset(directory / "b/train_*.bin").fingerprint());
  check_content(Dataset(train), meta);
  // One bit of one token.
  std::string bytes = read_text_file(directory / "a/train_000.bin");
  const std::string before = Dataset(train).fingerprint();
  bytes[bytes.size() - 700] ^= 1;
  write_file(directory / "a/train_000.bin", bytes);
  CHECK(Dataset(train).fingerprint() != before);
  CHECK(contains(error_of([&] { check_content(Dataset(train), meta); }), "a/train_000.bin: its content"));
  // What ends elsewhere is another thing; a long run of zeros has a length; the order counts.
  std::set<std::string> all;
  for (const char* parts : {"ab,c", "a,bc", "abc", "abc,", "c,ab"}) {
    Fingerprint one;
    std::stringstream list(parts + std::string(1, ','));
    for (std::string part; std::getline(list, part, ',');) one.add(part);
    all.insert(one.text());
  }
  const std::string zeros(100, 0);
  for (size_t n = 0; n < 40; n++) all.insert(Fingerprint().add(zeros.data(), n).text());
  for (uint64_t bit = 0; bit < 64; bit++)  // two changes of one bit do not cancel
    all.insert(Fingerprint().add(1ull << bit).add(1ull << bit).text());
  CHECK(all.size() == 5 + 40 + 64);
}

TEST_CASE("data: meta.json is read from beside the shards") {
  TemporaryDirectory directory;
  Meta none = read_meta(directory / "train_*.bin");
  CHECK(none.tokenizer == "");
  CHECK(none.vocabulary == 0);
  CHECK(std::isnan(none.train.entropy));
  Meta meta;
  meta.tokenizer = "bytes";
  meta.vocabulary = 257;
  meta.train.documents = 5;
  meta.train.bytes = 100;
  meta.train.tokens = uint64_t(1) << 40;
  meta.val.entropy = 0.625;
  write_file(directory / "meta.json", meta_to_json(meta).dump());
  Meta read = read_meta(directory / "val_000.bin");
  CHECK(read.tokenizer == "bytes");
  CHECK(read.vocabulary == 257);
  CHECK(read.train.documents == 5);
  CHECK(read.train.bytes == 100);
  CHECK(read.train.tokens == uint64_t(1) << 40);
  CHECK(std::isnan(read.train.entropy));
  CHECK(read.val.entropy == 0.625);
  for (std::string broken : {"", "{", "[]", "{}", "{\"tokenizer\": 3, \"vocabulary\": 257}",
                             "{\"tokenizer\": \"bytes\", \"vocabulary\": \"many\"}",
                             "{\"tokenizer\": \"bytes\", \"vocabulary\": 257, \"train\": []}"}) {
    write_file(directory / "meta.json", broken);
    CHECK(contains(error_of([&] { read_meta(directory / "train_*.bin"); }), "meta.json: "));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The floor. Below is a second statement of the grammar, as a parser: it reads a document from left to right, works out
// which draws it must come from, and multiplies their probabilities. It shares the lists of words with the generator,
// and nothing else. If two derivations gave the same text, or if a draw did not show in it, the two sums would differ.

namespace {

struct Parser {
  const std::string& text;
  size_t at = 0;
  double log_probability = 0;

  [[noreturn]] void fail(const std::string& wanted) {
    throw std::runtime_error("expected " + wanted + " at byte " + std::to_string(at) + " of: " + text);
  }
  bool sees(const std::string& s) const { return text.compare(at, s.size(), s) == 0; }
  bool takes(const std::string& s) {
    if (!sees(s)) return false;
    at += s.size();
    return true;
  }
  void expect(const std::string& s) {
    if (!takes(s)) fail("'" + s + "'");
  }
  void one_in(double n) { log_probability -= std::log(n); }

  // A word of the list that is not among those drawn before.
  std::string draw(const std::vector<std::string>& list, std::vector<std::string>& before) {
    for (const std::string& word : list)
      if (sees(word)) {
        for (const std::string& other : before)
          if (other == word) fail("another word");
        one_in(double(list.size() - before.size()));
        before.push_back(word);
        at += word.size();
        return word;
      }
    fail("a word of the list");
  }
  int ordinal(int n) {
    for (int i = 0; i < n; i++)
      if (takes(std::vector<std::string>{"First? ", "Second? ", "Third? ", "Fourth? "}[size_t(i)])) {
        one_in(n);
        return i;
      }
    fail("an ordinal");
  }
  std::string letters(int count) {
    std::string word;
    for (int i = 0; i < count; i++) {
      char c = text[at];
      if (c < 'a' || c > 'z' || word.find(c) != std::string::npos) fail("another letter");
      one_in(26 - i);
      word += c;
      at++;
    }
    return word;
  }

  void line() {
    one_in(7);
    std::vector<std::string> who, did, what, look;
    if (takes("The ")) {
      draw(story_looks, look);
      expect(" ");
      draw(story_things, what);
      expect(" went to ");
      one_in(3);  // two, three or four people
      do draw(story_names, who);
      while (who.size() < 4 && takes(", "));
      if (who.size() < 2) fail("another name");
      expect(". " + who.back() + " has it.");
    } else if (takes("Pack ")) {
      for (int i = 0; i < 3; i++) {
        if (i > 0) expect(" ");
        draw(story_things, what);
      }
      expect(". ");
      expect(what[size_t(ordinal(3))] + ".");
    } else if (takes("Row ")) {
      std::string word = letters(4);
      expect(". ");
      expect(std::string(1, word[size_t(ordinal(4))]) + ".");
    } else if (takes("Say ")) {
      std::string word = letters(3), back = {word[2], word[1], word[0]};
      expect(" " + word + " ");
      one_in(2);
      if (!takes(word)) expect(back);
      expect(".");
    } else if (takes("Nest ")) {
      std::string stack;
      for (int n = 0; !(n > 0 && stack.empty() && sees(".")); n++) {
        size_t kind = std::string("([{<").find(text[at]);
        bool opens = kind != std::string::npos;
        if (stack.empty()) {
          if (n >= 60 || !opens) fail("the end");
          if (n > 0) log_probability += std::log(11.0 / 12);  // it did not end
        } else if (n < 60 && stack.size() < 4) {
          one_in(2);
        } else if (opens) {
          fail("a closing bracket");
        }
        if (opens) {
          one_in(4);
          stack += ")]}>"[kind];
          at++;
        } else {
          expect(std::string(1, stack.back()));
          stack.pop_back();
        }
        if (stack.empty() && sees(".") && n + 1 < 60) one_in(12);
      }
      expect(".");
    } else {
      std::string first = draw(story_names, who);
      if (takes(" has ")) {
        draw(story_things, what);
        expect(", ");
        draw(story_names, who);
        expect(" ");
        draw(story_things, what);
        expect(". Swap: " + first + " " + what[1] + ".");
      } else {
        for (int i = 0; i < 3; i++) {
          if (i > 0) {
            expect(", ");
            draw(story_names, who);
          }
          expect(" ");
          draw(story_verbs, did);
        }
        expect(". ");
        expect(who[size_t(ordinal(3))] + ".");
      }
    }
    expect("\n");
  }

  double document() {
    for (;;) {
      line();
      bool last = at == text.size();
      if (at < 100) {
        if (last) fail("more than " + std::to_string(at) + " bytes");
      } else if (at > 1900) {
        if (!last) fail("the end");
        return log_probability;
      } else {
        log_probability += last ? std::log(1.0 / 8) : std::log(7.0 / 8);
        if (last) return log_probability;
      }
    }
  }
};

}  // namespace

TEST_CASE("data: a story's probability can be recomputed from its text alone") {
  Storyteller storyteller(3);
  size_t shortest = 10000, longest = 0;
  int lines = 0;
  std::map<std::string, int> kinds;
  for (int i = 0; i < 4000; i++) {
    Story story = storyteller.next();
    double parsed = Parser{story.text}.document();
    // Some 500 terms of up to 3.3 are summed in another order: each sum rounds by less than 500 * 2^-53 of about 1000.
    CHECK(parsed == doctest::Approx(story.log_probability).epsilon(1e-12));
    shortest = std::min(shortest, story.text.size());
    longest = std::max(longest, story.text.size());
    bool printable = true;
    for (char c : story.text) printable = printable && ((c >= ' ' && c <= '~') || c == '\n');
    CHECK(printable);
    for (size_t at = 0; at < story.text.size(); at = story.text.find('\n', at) + 1) {
      std::string line = story.text.substr(at, story.text.find('\n', at) - at);
      CHECK(line.size() < Story::longest_line);
      std::string word = line.substr(0, line.find(' '));
      kinds[word == "The" || word == "Pack" || word == "Row" || word == "Say" || word == "Nest" ? word
            : contains(line, " has ")                                                         ? "has"
                                                                                                : "did"]++;
      lines++;
    }
  }
  CHECK(shortest >= 100);
  CHECK(shortest < 130);
  CHECK(longest <= 2000);
  CHECK(longest > 1500);
  // The draws happen as often as they claim to: seven kinds of lines, each within five standard deviations.
  CHECK(kinds.size() == 7);
  for (const auto& [kind, count] : kinds)
    CHECK(std::abs(count - lines / 7.0) < 5 * std::sqrt(lines * (1 / 7.0) * (6 / 7.0)));
}

TEST_CASE("data: the parser refuses what the grammar cannot say") {
  auto parse = [](const std::string& line) {
    Parser parser{line};
    parser.line();
  };
  for (std::string good : {"Say abc abc cba.\n", "Row abcd. Fourth? d.\n", "Nest ([]){}.\n", "Nest [].\n"})
    CHECK_NOTHROW(parse(good));
  for (std::string bad : {"Say abc abc bca.\n", "Say aba aba aba.\n", "Row abcd. Fourth? c.\n", "Nest ([)].\n",
                          "Nest (((((.\n", "Pack cup cup egg. First? cup.\n",
                          "Ann ran, Ann dug, Bob hid. First? Ann.\n"})
    CHECK_THROWS(parse(bad));
}

TEST_CASE("data: the built-in corpus is the same everywhere, and says its floor") {
  TemporaryDirectory directory;
  auto hash = [](const Shard& shard) {  // FNV-1a
    uint64_t h = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < shard.size(); i++) h = (h ^ shard[i]) * 0x100000001b3ull;
    return h;
  };
  Meta meta = write_stories(directory / "a", 200000, 1);
  Shard train(directory / "a/train_000.bin"), val(directory / "a/val_000.bin");
  CHECK(hash(train) == 7454714777521002474ull);  // a change of the grammar or of the generator changes this
  CHECK(hash(val) == 5963781691297853468ull);
  CHECK(train.size() == meta.train.tokens);
  CHECK(meta.train.tokens == meta.train.bytes + meta.train.documents);
  CHECK(meta.train.bytes >= 200000);
  CHECK(meta.train.bytes < 202000);
  CHECK(meta.val.bytes >= 10000);
  CHECK(read_meta(directory / "a/train_*.bin").train.entropy == doctest::Approx(meta.train.entropy));

  // The floor in meta.json is the mean over the documents in the file, each with the end of text behind it.
  for (const Shard* shard : {&train, &val}) {
    double nats = 0;
    uint64_t documents = 0;
    for (size_t i = 0; i < shard->size();) {
      REQUIRE((*shard)[i] == 256);
      std::string text;
      for (i++; i < shard->size() && (*shard)[i] != 256; i++) text += char((*shard)[i]);
      nats -= Parser{text}.document();
      documents++;
    }
    const Meta::Split& split = shard == &train ? meta.train : meta.val;
    CHECK(documents == split.documents);
    CHECK(nats / double(shard->size()) == doctest::Approx(split.entropy).epsilon(1e-12));
    CHECK(split.entropy > 0.55);
    CHECK(split.entropy < 0.7);
  }

  write_stories(directory / "b", 200000, 1);
  CHECK(hash(Shard(directory / "b/train_000.bin")) == hash(train));
  write_stories(directory / "c", 200000, 2);
  CHECK(hash(Shard(directory / "c/train_000.bin")) != hash(train));
  // Training and validation text have no document in common.
  std::set<std::string> documents;
  size_t count = 0;
  for (std::string name : {"a/train_000.bin", "a/val_000.bin"}) {
    std::string text = decoded(directory / name, "#"), document;
    for (size_t at = 0; at < text.size(); count++) {
      size_t end = std::min(text.find("#\n", at), text.size());
      documents.insert(text.substr(at, end - at));
      at = end + 2;
    }
  }
  CHECK(count == meta.train.documents + meta.val.documents);
  CHECK(documents.size() == count);
}
