// Byte-level BPE against Hugging Face's library (tests/fixtures/tokenizer_cases.json, by scripts/tokenizer_fixtures.py),
// what published files have, the dialect of their patterns (text/pattern.h), fingerprints, and what is refused.
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

std::vector<int> ids(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<int> tokens;
  tokenizer.encode(text.data(), text.size(), tokens);
  return tokens;
}

std::string text_of(const Tokenizer& tokenizer, const std::vector<int>& tokens) {
  std::string text;
  for (int token : tokens) tokenizer.decode(token, text);
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
      const std::vector<int> want = one[1].get<std::vector<int>>();
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
  std::vector<std::vector<int>> results(4);
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
  std::vector<int> want;
  for (const std::string& part : parts) want.push_back(model["vocab"][part].get<int>());
  CHECK(ids(*tokenizer, text.substr(0, 500)) == want);
}

TEST_CASE("tokenizer: the end of text is never made from text") {
  const std::unique_ptr<BpeTokenizer> tokenizer = with({});
  const std::vector<int> tokens = ids(*tokenizer, "a<|endoftext|>b");
  for (int token : tokens) CHECK(token != tokenizer->end_of_text());
  CHECK(text_of(*tokenizer, tokens) == "a<|endoftext|>b");
  CHECK(text_of(*tokenizer, {int(tokenizer->end_of_text())}) == "");
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
  CHECK(contains(error({{"model", {{"vocab", {{"a", 1 << 20}}}}}}), "1048576"));
  CHECK(contains(error({{"model", {{"vocab", {{"a", -1}}}}}}), "-1"));
  CHECK(contains(error({{"normalizer", {{"type", "Lowercase"}}}}), "Lowercase"));
  CHECK(contains(error({{"pre_tokenizer", {{"type", "Whitespace"}}}}), "Whitespace"));
  const Json split = {{"type", "Split"}, {"behavior", "Isolated"}, {"invert", false}, {"pattern", {{"Regex", "(a"}}}};
  CHECK(contains(error({{"pre_tokenizer", split}}), "(a"));
  CHECK(contains(error({{"added_tokens", Json::array()}}), "endoftext"));
  const Json stripped = {{{"id", 420}, {"content", "<z>"}, {"special", false}, {"lstrip", true}}};
  CHECK(contains(error({{"added_tokens", stripped}}), "lstrip"));
  // Structures in which the parts of the file mean something else than on their own.
  const Json level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  auto sequence = [](const Json& steps) {
    return Json{{"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", steps}}}};
  };
  Json space = split;
  space["pattern"]["Regex"] = " ";
  CHECK(contains(error(sequence(Json::array())), "no ByteLevel"));
  CHECK(contains(error(sequence(Json::array({space}))), "no ByteLevel"));
  CHECK(contains(error(sequence({level, space})), "Split behind ByteLevel"));
  CHECK(contains(error(sequence({level, level})), "ByteLevel behind ByteLevel"));
  CHECK(error(sequence({space, level})) == "");
  space["behavior"] = "MergedWithNext";
  CHECK(contains(error(sequence({space, level})), "MergedWithNext"));
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

// Ids by Hugging Face's library, 0.23.3.
TEST_CASE("tokenizer: what published files have beside words and merges") {
  using Json = nlohmann::json;
  const Json bytes = byte_level_json();
  auto token = [](const std::string& content, int id, bool special, bool normalized = false, bool lstrip = false) {
    return Json{{"id", id}, {"content", content}, {"special", special}, {"normalized", normalized}, {"lstrip", lstrip}};
  };
  auto added = [&](std::vector<Json> tokens, Json normalizer = nullptr) {
    Json file = bytes;
    for (const Json& one : tokens) file["added_tokens"].push_back(one);
    file["normalizer"] = normalizer;
    return file;
  };
  using Ids = std::vector<int>;
  const Json nfc_form = {{"type", "NFC"}};
  // The id of an added token is the next one, whatever the file says, unless the vocabulary has one.
  CHECK(ids(*with(added({token("<z>", 266, false), token("<y>", 260, false)})), "<z><y>") == Ids{257, 258});
  CHECK(ids(*with(added({token("a", 999, false)})), "ba") == Ids{98, 97});
  CHECK(with(added({token("<z>", 266, false)}))->vocabulary() == 258);
  // Its text is normalised where it is looked for in normalised text; the first of two that are then the same counts.
  CHECK(ids(*with(added({token("e\u0301", 257, false, true)}, nfc_form)), "x\u00e9") == Ids{120, 257});
  CHECK(ids(*with(added({token("e\u0301", 257, false, true), token("\u00e9", 258, false, true)}, nfc_form)),
            "\u00e9") == Ids{257});
  // What is special stays text, white space around it as well, but no other begins within it.
  CHECK(ids(*with(added({token("<m>", 257, true, false, true)})), "a <m>") == Ids{97, 32, 60, 109, 62});
  CHECK(ids(*with(added({token("<|a|>", 257, true), token("|a|", 258, false)})), "<|a|>|a|") ==
        Ids{60, 124, 97, 124, 62, 258});
  auto merged = [&](std::vector<std::string> merges, Json changes = Json::object()) {
    Json file = bytes;
    for (const std::string& merge : merges) {
      std::string both = merge;
      both.erase(both.find(' '), 1);
      if (!file["model"]["vocab"].contains(both)) file["model"]["vocab"][both] = file["model"]["vocab"].size();
    }
    file["model"]["merges"] = merges;
    file["model"].update(changes);
    return file;
  };
  // Of a merge that is listed twice the last place counts.
  CHECK(ids(*with(merged({"a b", "b c", "a b"})), "abc") == Ids{97, 258});
  // A whole word that is a token is that token, where the file says so.
  const std::vector<std::string> merges = {"a b", "b c", "c d", "ab cd"};  // so "abc" is never made by merging
  Json file = merged(merges, {{"ignore_merges", true}});
  file["model"]["vocab"]["abc"] = 261;
  CHECK(ids(*with(file), "abc") == Ids{261});
  file["model"]["ignore_merges"] = false;
  CHECK(ids(*with(file), "abc") == Ids{257, 99});
  // Bytes without a token become nothing, so that their neighbours meet; or all the token for what is unknown.
  file = merged({"a b"});
  file["model"]["vocab"].erase("x");
  CHECK(ids(*with(file), "axb\x04x") == Ids{257, 4});
  CHECK(contains(with(file)->note(), "no token for 1 of"));
  CHECK(with(bytes)->note() == "");
  CHECK(with(file)->fingerprint() != with(merged({"a b"}))->fingerprint());
  file["model"]["unk_token"] = "a";
  CHECK(ids(*with(file), "bxxb") == Ids{98, 97, 257});
  file["model"]["unk_token"] = "<unk>";
  CHECK(contains(error_of([&] { with(file); }), "<unk>"));
  // A prefix space is ByteLevel's, on each piece of the steps before it.
  auto steps = [&](const Json& before, bool prefix) {
    Json one = bytes;
    const Json level = {{"type", "ByteLevel"}, {"add_prefix_space", prefix}, {"use_regex", false}};
    one["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {before, level}}};
    return one;
  };
  Json digit = {{"type", "Split"}, {"behavior", "Isolated"}, {"invert", false}, {"pattern", {{"Regex", "\\d"}}}};
  CHECK(ids(*with(steps(digit, true)), "a1 b") == Ids{32, 97, 32, 49, 32, 98});
  digit["behavior"] = "Removed", digit["invert"] = true;
  CHECK(ids(*with(steps(digit, false)), "a1 b23") == Ids{49, 50, 51});
  for (bool individual : {true, false}) {
    file = steps({{"type", "Digits"}, {"individual_digits", individual}}, true);
    CHECK(ids(*with(file), "12") == (individual ? Ids{32, 49, 32, 50} : Ids{32, 49, 50}));
  }
  // The end of a text is the first of some known names, and ids may need more than 16 bits.
  file = bytes;
  file["added_tokens"][0]["content"] = "<|end_of_text|>";
  file["model"]["vocab"]["zz"] = 128000;
  CHECK(with(file)->end_of_text() == 258);
  CHECK(with(file)->vocabulary() == 128001);
}

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

TEST_CASE("pattern: Oniguruma's dialect and Unicode 16, whatever PCRE2 has") {
  auto pieces = [](const std::string& pattern, const std::string& text) {  // matches in brackets
    pcre2_match_data* match = pcre2_match_data_create(1, nullptr);
    std::string all;
    Pattern(pattern).cut(text, match, nullptr, [&](size_t begin, size_t end, bool matches) {
      all += (matches ? "[" : "") + text.substr(begin, end - begin) + (matches ? "]" : "|");
    });
    pcre2_match_data_free(match);
    return all;
  };
  CHECK(pieces("\\h+", "xaF0 y") == "x|[aF0] y|");              // hexadecimal digits; to PCRE2, white space
  CHECK(pieces("^c|d$", "ac\ncd\nd") == "ac\n|[c][d]\n|[d]");    // begins and ends of lines
  CHECK(pieces("[a[bc]]+", "abcd]") == "[abc]d]|");              // a class in a class
  CHECK(pieces("[^a[^bc]]+", "abcd") == "a|[bc]d|");
  CHECK(pieces("\\v", "a\vb\nc") == "a|[\v]b\nc|");             // one character; to PCRE2, all line ends
  CHECK(pieces("\\s", "a\u180eb\u3000") == "a\u180eb|[\u3000]");
  CHECK(pieces("(a(?i)b|c)d", "aBd acd aCd Cd") == "[aBd] |[acd] |[aCd] Cd|");  // (?i) reaches over the |
  CHECK(pieces("(?i:'s)", "'\u017f'S") == "['\u017f]['S]");
  CHECK(pieces(".", "\r\n") == "[\r]\n|");
  CHECK(pieces("\\x41\\x{e9}\\u00e9", "A\u00e9\u00e9") == "[A\u00e9\u00e9]");
  CHECK(pieces("(?=a)b*a", "ca") == "c|[a]");  // which PCRE2's short cuts miss
  CHECK(pieces("a*", "baab") == "b|[aa]b|");
  CHECK(pieces("a{2}b{1,}c{0,1}?", "aabbc") == "[aabb]c|");
  // Of Unicode 15 and 16: a symbol, a letter, a digit; and U+1171E, a mark that has another kind since 15.
  CHECK(pieces("\\p{S}", "a\U0001f6dc") == "a|[\U0001f6dc]");
  CHECK(pieces("\\P{L}+", "\u1c89a1\u1c89") == "\u1c89a|[1]\u1c89|");
  CHECK(pieces("[^\\P{L}b]+", "\u1c89ab1") == "[\u1c89a]b1|");
  CHECK(pieces("\\p{^N}", "\U0001ccf0a") == "\U0001ccf0|[a]");
  CHECK(pieces("\\d\\D", "\U0001ccf0a") == "[\U0001ccf0a]");
  CHECK(pieces("\\p{Mn}", "\U0001171ea\u0301") == "\U0001171ea|[\u0301]");
  CHECK(pieces("[\\p{Mn}a]", "\U0001171ea\u0301") == "\U0001171e|[a][\u0301]");
  CHECK(pieces("\\p{Mc}", "\U0001171e") == "[\U0001171e]");
  // What has another meaning, or none, here is refused by name.
  for (const char* pattern :
       {"\\w", "\\b", "\\R", "\\G", "\\1", "\\x80", "\\x{110000}", "\\u12", "\\p{Han}", "\\p{C}", "\\pL", "\\p{L",
        "\\", "a**", "a+*", "a{0}", "(a|^b){0,0}", "a{2}?", "a{1,2}+", "a{,2}", "a{", "*a", "(a", "a)", "(?m:a)",
        "(?<n>a)", "(?#a)", "[a", "[]a]", "[a&&b]", "[[:alpha:]]", "[\\s-a]", "[a-\\s]", "[b-a]", "[a-c-e]",
        "(?i:ss)", "(?i:fi)", "(?i:\u00e9)", "(?i:[a-z])", "(?i:[a[^b]])", "[^[^\\P{L}\\P{N}]]",
        "(?i:\\p{L})", "(?i:[^a])"}) {
    CAPTURE(pattern);
    CHECK(contains(error_of([&] { Pattern one(pattern); }), pattern));
  }
  const std::string deep = std::string(1000, '(') + std::string(1000, ')');
  CHECK(contains(error_of([&] { Pattern one(deep); }), "this deep"));
}
