// Byte-level BPE against Hugging Face's library (tests/fixtures/tokenizer_cases.json, by scripts/tokenizer_fixtures.py),
// and what is refused.
#include "text/tokenizer.h"

#include <doctest/doctest.h>

#include "tests/helpers.h"
#include "text/identity.h"

namespace {

nlohmann::json fixture(const std::string& name) {
  return nlohmann::json::parse(read_text_file("tests/fixtures/" + name));
}

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2) bytes += char(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

// The fixture's tokenizer with some of its keys replaced.
std::unique_ptr<BpeTokenizer> with(const nlohmann::json& changes) {
  TemporaryDirectory directory;
  nlohmann::json description = fixture("tokenizer.json");
  for (const auto& [key, value] : changes.items())
    if (key == "model") description["model"].update(value);
    else description[key] = value;
  std::ofstream(directory / "tokenizer.json") << description.dump();
  return std::make_unique<BpeTokenizer>(directory / "tokenizer.json");
}

std::vector<uint16_t> ids(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<uint16_t> tokens;
  tokenizer.encode(text.data(), text.size(), tokens);
  return tokens;
}

std::string text_of(const Tokenizer& tokenizer, const std::vector<uint16_t>& tokens) {
  std::string text;
  for (uint16_t token : tokens) tokenizer.decode(token, text);
  return text;
}

}  // namespace

TEST_CASE("tokenizer: ids are Hugging Face's, and decoding gives the text back") {
  const nlohmann::json variants = fixture("tokenizer_cases.json");
  for (const auto& [name, variant] : variants.items()) {
    const std::unique_ptr<BpeTokenizer> tokenizer = with(variant.at("changes"));
    CAPTURE(name);
    for (const nlohmann::json& one : variant.at("cases")) {
      const std::string text = from_hex(one[0].get<std::string>());
      CAPTURE(one[0].get<std::string>());
      const std::vector<uint16_t> want = one[1].get<std::vector<uint16_t>>();
      CHECK(ids(*tokenizer, text) == want);
      const std::string valid = valid_utf8(text.data(), text.size());
      CHECK(text_of(*tokenizer, want) == (name == "pythia" && text.find("<e") == std::string::npos ? nfc(valid) : valid));
    }
  }
  CHECK(variants.size() == 3);
}

TEST_CASE("tokenizer: a megabyte without a space, on several threads") {
  const std::unique_ptr<BpeTokenizer> tokenizer = with({});
  std::string text;
  for (size_t i = 0; i < (1u << 20); i++) text += char('a' + i * i % 23 % 7);
  std::vector<std::vector<uint16_t>> results(4);
#pragma omp parallel for
  for (size_t i = 0; i < results.size(); i++) results[i] = ids(*tokenizer, text);
  CHECK(text_of(*tokenizer, results[0]) == text);
  CHECK(results[0].size() < text.size());
  for (const auto& result : results) CHECK(result == results[0]);
  // Joined in the same order as a word of its first characters, for which the plain definition is quick enough: of all
  // neighbours, join the pair that stands first in the list, until none is in it.
  const nlohmann::json model = fixture("tokenizer.json")["model"];
  std::map<std::string, int> rank;
  for (const nlohmann::json& merge : model["merges"])
    rank.insert({merge.is_array() ? merge[0].get<std::string>() + " " + merge[1].get<std::string>()
                                  : merge.get<std::string>(), int(rank.size())});
  std::vector<std::string> parts;
  for (char c : text.substr(0, 500)) parts.push_back(std::string(1, c));
  for (;;) {
    size_t best = 0;
    int best_rank = 1 << 30;
    for (size_t i = 0; i + 1 < parts.size(); i++) {
      const auto found = rank.find(parts[i] + " " + parts[i + 1]);
      if (found != rank.end() && found->second < best_rank) best_rank = found->second, best = i;
    }
    if (best_rank == 1 << 30) break;
    parts[best] += parts[best + 1];
    parts.erase(parts.begin() + long(best) + 1);
  }
  std::vector<uint16_t> want;
  for (const std::string& part : parts) want.push_back(model["vocab"][part].get<uint16_t>());
  CHECK(ids(*tokenizer, text.substr(0, 500)) == want);
}

TEST_CASE("tokenizer: the end of text is never made from text") {
  const std::unique_ptr<BpeTokenizer> tokenizer = with({});
  const std::vector<uint16_t> tokens = ids(*tokenizer, "a<|endoftext|>b");
  for (uint16_t token : tokens) CHECK(token != tokenizer->end_of_text());
  CHECK(text_of(*tokenizer, tokens) == "a<|endoftext|>b");
  CHECK(text_of(*tokenizer, {uint16_t(tokenizer->end_of_text())}) == "");
  CHECK(tokenizer->vocabulary() == 420);
  CHECK(tokenizer->end_of_text() == 419);
}

TEST_CASE("tokenizer: merges that lead back to a part of themselves, or stand there twice, end all the same") {
  nlohmann::json vocab = fixture("tokenizer.json")["model"]["vocab"];
  vocab[""] = 418;  // with the empty token, a + "" is a again
  for (const char* text : {R"([["a", ""], ["", "a"], ["", ""]])", R"([["a", "a"], ["a", "a"]])"}) {
    const nlohmann::json merges = nlohmann::json::parse(text);
    vocab["aa"] = 417;
    for (const char* key : {"\u0120sh", "\u0120cor"}) vocab.erase(key);
    const std::unique_ptr<BpeTokenizer> tokenizer = with({{"model", {{"vocab", vocab}, {"merges", merges}}}});
    CHECK(text_of(*tokenizer, ids(*tokenizer, "aaaaa")) == "aaaaa");
    CHECK(ids(*tokenizer, "aaaaa").size() == (merges[0][1] == "a" ? 3 : 5));
  }
}

TEST_CASE("tokenizer: a file that is not understood in full is refused") {
  using Json = nlohmann::json;
  auto error = [](const Json& changes) { return error_of([&] { with(changes); }); };
  CHECK(contains(error_of([] { BpeTokenizer("/nowhere/tokenizer.json"); }), "/nowhere/tokenizer.json"));
  CHECK(contains(error({{"model", {{"type", "Unigram"}}}}), "Unigram"));
  CHECK(contains(error({{"model", {{"dropout", 0.1}}}}), "dropout"));
  CHECK(contains(error({{"model", {{"merges", {"a zzzz"}}}}}), "zzzz"));
  CHECK(contains(error({{"model", {{"merges", {"ab"}}}}}), "not a pair"));
  CHECK(contains(error({{"model", {{"merges", {1}}}}}), "not a tokenizer"));
  CHECK(contains(error({{"model", {{"vocab", Json::object()}}}}), "vocab"));
  CHECK(contains(error({{"model", {{"vocab", {{"a", 0}, {"b", 0}}}}}}), "two tokens"));
  CHECK(contains(error({{"model", {{"vocab", {{"a", 70000}}}}}}), "70000"));
  CHECK(contains(error({{"model", {{"vocab", {{"a", -1}}}}}}), "-1"));
  CHECK(contains(error({{"model", {{"vocab", {{"a", 0}}}}}}), "no token for byte 0"));
  CHECK(contains(error({{"normalizer", {{"type", "Lowercase"}}}}), "Lowercase"));
  CHECK(contains(error({{"pre_tokenizer", {{"type", "Whitespace"}}}}), "Whitespace"));
  const Json split = {{"type", "Split"}, {"behavior", "Isolated"}, {"invert", false}, {"pattern", {{"Regex", "(a"}}}};
  CHECK(contains(error({{"pre_tokenizer", split}}), "(a"));
  CHECK(contains(error({{"added_tokens", Json::array()}}), "endoftext"));
  const Json stripped = {{{"id", 419}, {"content", "<|endoftext|>"}, {"special", true}, {"lstrip", true}}};
  CHECK(contains(error({{"added_tokens", stripped}}), "lstrip"));
  CHECK(contains(error({{"model", {{"merges", Json::parse(R"([["zzzz", "a"]])")}}}}), "zzzz"));
  // A file that is cut short, at a good many places.
  TemporaryDirectory directory;
  const std::string whole = fixture("tokenizer.json").dump();
  for (size_t length = 0; length < whole.size(); length += 97) {
    std::ofstream(directory / "cut.json") << whole.substr(0, length);
    CHECK(contains(error_of([&] { BpeTokenizer(directory / "cut.json"); }), "cut.json"));
  }
  std::ofstream(directory / "deep.json") << std::string(100000, '[');
  CHECK(contains(error_of([&] { BpeTokenizer(directory / "deep.json"); }), "nested"));
}

namespace {

// The tokenizer of bytes as a tokenizer.json, as an export writes it.
nlohmann::json byte_level_json() {
  nlohmann::json vocab;
  for (int b = 0, next = 256; b < 256; b++) {
    const int code = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174 ? b : next++;
    vocab[code < 128 ? std::string(1, char(code)) : std::string{char(0xC0 | code >> 6), char(0x80 | (code & 63))}] = b;
  }
  vocab["<|endoftext|>"] = 256;
  return {{"added_tokens", {{{"id", 256}, {"content", "<|endoftext|>"}, {"special", true}, {"normalized", false}}}},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}},
          {"model", {{"vocab", vocab}, {"merges", nlohmann::json::array()}}}};
}

}  // namespace

TEST_CASE("tokenizer: a fingerprint is that of what it does") {
  const std::string own = with({})->fingerprint(), bytes = ByteTokenizer().fingerprint();
  CHECK(own.size() == 16);
  CHECK(own == with({{"post_processor", nullptr}})->fingerprint());  // it adds nothing to a document's text
  CHECK(own != bytes);
  CHECK(with(byte_level_json())->fingerprint() == bytes);
  // Each change of what it does is another tokenizer.
  const nlohmann::json file = fixture("tokenizer.json");
  nlohmann::json vocab = file["model"]["vocab"], merges = file["model"]["merges"], added = file["added_tokens"];
  std::swap(vocab["a"], vocab["b"]);
  merges.erase(merges.size() - 1);
  added.push_back({{"id", 420}, {"content", "<z>"}, {"special", false}});
  std::set<std::string> others = {own, bytes};
  for (const nlohmann::json& change : std::vector<nlohmann::json>{
           {{"model", {{"vocab", vocab}}}},
           {{"model", {{"merges", merges}}}},
           {{"added_tokens", added}},
           {{"normalizer", {{"type", "NFC"}}}},
           {{"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", true}}}},
           {{"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}})
    others.insert(with(change)->fingerprint());
  CHECK(others.size() == 8);
}

TEST_CASE("tokenizer: tokens of another one are refused, and what cannot be compared is taken") {
  TemporaryDirectory directory;
  auto refused = [](const TokenizerIdentity& theirs, const TokenizerIdentity& ours) {
    return error_of([&] { check_same_tokenizer("--data x", theirs, "the model", ours); });
  };
  const ByteTokenizer bytes;
  const TokenizerIdentity ours = identity_of(&bytes), imported = {"tokenizer.json", ours.fingerprint};
  CHECK(refused(imported, ours) == "");
  CHECK(contains(refused({"tokenizer.json", "0123456789abcdef"}, imported), "--data x: its tokenizer is \"tok"));
  CHECK(refused({"tokenizer.json", ""}, {"tokenizer.json", "0123456789abcdef"}) == "");
  CHECK(contains(refused({"tokenizer.json", ""}, ours), "\"bytes\""));
  CHECK(refused({}, ours) == "");
  // A meta.json without a fingerprint: that of the tokenizer beside it.
  Meta meta;
  meta.tokenizer = "bytes";
  CHECK(identity_of(meta, directory / "train_*.bin").fingerprint == ours.fingerprint);
  meta.tokenizer = "tokenizer.json";
  CHECK(identity_of(meta, directory / "train_*.bin").fingerprint == "");
  std::ofstream(directory / "tokenizer.json") << fixture("tokenizer.json").dump();
  CHECK(identity_of(meta, directory / "train_*.bin").fingerprint == with({})->fingerprint());
  meta.tokenizer_fingerprint = "5";
  CHECK(identity_of(meta, directory / "train_*.bin").fingerprint == "5");
}
