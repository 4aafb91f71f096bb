#pragma once
// Tokenizers: text to ids and back. The byte-level one, in which every byte is its own id, and byte-level BPE (Sennrich et
// al. 2016, arXiv 1508.07909; over bytes: Radford et al. 2019, GPT-2) from a Hugging Face tokenizer.json.
//
// BPE in four steps, each a function below:
//   1. normalise      where the file asks for it, Unicode's composed form (NFC)
//   2. added tokens   strings that are always one id, such as Pythia's runs of spaces, are cut out first
//   3. split          a regular expression cuts the rest into words; no token reaches across two of them
//   4. merge          the bytes of a word are joined pair by pair, always the pair that stands first in the list of merges
#define PCRE2_CODE_UNIT_WIDTH 8
#include <omp.h>
#include <pcre2.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <queue>
#include <string>
#include <unordered_map>
#include <vector>

#include "run/files.h"
#include "text/fingerprint.h"

struct Tokenizer {
  virtual ~Tokenizer() = default;
  virtual std::string name() const = 0;  // as in meta.json
  virtual int vocabulary() const = 0;    // ids are 0..vocabulary-1
  virtual int end_of_text() const = 0;   // stands before every document
  virtual std::string file() const { return ""; }  // what it was read from, and what goes with shards and models
  // Of what it does: the same one, the same ids for every text (but for what is not UTF-8), and the same text for every id.
  std::string fingerprint() const {
    Fingerprint all;
    for (int id = 0; id < vocabulary(); id++) {
      std::string text;
      decode(id, text);
      all.add(text);
    }
    return all.add(uint64_t(end_of_text())).add(rules()).text();
  }
  // How text becomes ids, in words of the tokenizer's own; empty: every byte by itself.
  virtual std::string rules() const { return ""; }
  // Appends the ids of one document's text; never end_of_text, whatever the text says. Threads may call it together.
  virtual void encode(const char* text, size_t bytes, std::vector<uint16_t>& tokens) const = 0;
  // Appends the bytes of one id; nothing for end_of_text and for what is no id.
  virtual void decode(int token, std::string& text) const = 0;
};

// Every byte is its own id; 256 is the end of text.
struct ByteTokenizer : Tokenizer {
  std::string name() const override { return "bytes"; }
  int vocabulary() const override { return 257; }
  int end_of_text() const override { return 256; }
  void encode(const char* text, size_t bytes, std::vector<uint16_t>& tokens) const override {
    for (size_t i = 0; i < bytes; i++) tokens.push_back(static_cast<unsigned char>(text[i]));
  }
  void decode(int token, std::string& text) const override {
    if (token >= 0 && token < 256) text += char(token);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// UTF-8

// Length in bytes of the valid character at text[i], or 0; then `bad` says how many bytes to skip: the longest beginning
// of a valid character, at least one (what Unicode recommends for U+FFFD, and what Python's errors="replace" does).
inline size_t utf8_length(const char* text, size_t bytes, size_t i, size_t& bad) {
  auto byte = [&](size_t k) { return i + k < bytes ? static_cast<unsigned char>(text[i + k]) : 0u; };
  const unsigned first = byte(0);
  bad = 1;
  if (first < 0x80) return 1;
  const size_t length = first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
  if (length == 0) return 0;
  // The second byte's range excludes overlong forms, surrogates and what lies beyond U+10FFFF.
  const unsigned low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  const unsigned high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  if (byte(1) < low || byte(1) > high) return 0;
  for (size_t k = 2; k < length; k++)
    if ((byte(k) & 0xC0) != 0x80) return bad = k, 0;
  return length;
}

// The text with everything that is not UTF-8 replaced by U+FFFD.
inline std::string valid_utf8(const char* text, size_t bytes) {
  std::string valid;
  valid.reserve(bytes);
  for (size_t i = 0, bad = 0; i < bytes;) {
    const size_t length = utf8_length(text, bytes, i, bad);
    if (length) valid.append(text + i, length), i += length;
    else valid += "\xEF\xBF\xBD", i += bad;
  }
  return valid;
}

// Combining characters newer than Unicode 9, from which Hugging Face's library has its tables: it leaves them alone.
inline bool newer_than_unicode_9(unsigned code) {
  static const unsigned ranges[][2] = {
      {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},
      {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},   {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},
      {0xA82C, 0xA82C},   {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50},
      {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A},
      {0x11930, 0x11930}, {0x11935, 0x11935}, {0x11938, 0x11938}, {0x1193D, 0x1193E}, {0x11943, 0x11943},
      {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42},
      {0x11D44, 0x11D45}, {0x11D97, 0x11D97}, {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F},
      {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}};
  for (const unsigned* range : ranges)
    if (code >= range[0] && code <= range[1]) return true;
  return false;
}

// Unicode's composed form of valid UTF-8. Characters below U+0300 are composed already and never join what stands before
// them, so only runs of others, with the one character before them, go through the library.
inline std::string nfc(const std::string& text) {
  auto character = [&](size_t i, unsigned& code) {  // its length
    const unsigned first = static_cast<unsigned char>(text[i]);
    const size_t length = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    code = length == 1 ? first : first & (0x7Fu >> length);
    for (size_t k = 1; k < length; k++) code = code << 6 | (static_cast<unsigned char>(text[i + k]) & 0x3Fu);
    return length;
  };
  std::string composed;
  composed.reserve(text.size());
  size_t written = 0, last = 0;  // bytes of text that are in `composed`; where the character before i begins
  for (size_t i = 0; i < text.size();) {
    unsigned code = 0;
    const size_t length = character(i, code);
    if (code < 0x300 || newer_than_unicode_9(code)) {
      last = code < 0x300 ? i : i + length;
      i += length;
      continue;
    }
    composed.append(text, written, last - written);
    for (size_t next = length; code >= 0x300 && !newer_than_unicode_9(code);) {
      i += next;
      if (i == text.size()) break;
      next = character(i, code);
    }
    utf8proc_uint8_t* run = nullptr;
    const utf8proc_ssize_t size =
        utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data() + last), utf8proc_ssize_t(i - last), &run,
                     utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    if (size < 0) throw std::runtime_error(std::string("utf8proc: ") + utf8proc_errmsg(size));
    composed.append(reinterpret_cast<char*>(run), size_t(size));
    std::free(run);
    written = last = i;
  }
  composed.append(text, written);
  return composed;
}

// ---------------------------------------------------------------------------------------------------------------------

class BpeTokenizer : public Tokenizer {
 public:
  // Reads a Hugging Face tokenizer.json with a byte-level BPE model. UserError, naming the file and the key, for anything
  // in it that this class would not do exactly as Hugging Face's library does.
  explicit BpeTokenizer(const std::string& path) : path_(path), threads_(size_t(omp_get_max_threads())) {
    try {
      load(read_json_file(path));
    } catch (const nlohmann::json::exception& e) {
      fail(std::string("is not a tokenizer: ") + e.what());
    }
  }
  std::string name() const override { return "tokenizer.json"; }
  std::string file() const override { return path_; }
  int vocabulary() const override { return int(bytes_of_.size()); }
  int end_of_text() const override { return end_of_text_; }
  // Without merges and strings to cut out, every byte is its own token however the text is split.
  std::string rules() const override {
    if (merges_.empty() && added_.empty() && raw_added_.empty() && !normalise_ && !prefix_space_) return "";
    std::vector<std::array<uint64_t, 3>> merges;
    for (const auto& [pair, merge] : merges_) merges.push_back({uint64_t(merge.rank), pair, merge.id});
    std::sort(merges.begin(), merges.end());
    Fingerprint all;
    for (const auto& [rank, pair, id] : merges) all.add(pair).add(id);
    for (const std::vector<Added>* list : {&raw_added_, &added_}) {
      for (const Added& added : *list) all.add(added.text).add(uint64_t(added.id));
      all.add(uint64_t(list->size()));
    }
    return all.text() + (normalise_ ? " NFC" : "") + (prefix_space_ ? " prefix" : "") + splits_;
  }

  void encode(const char* text, size_t bytes, std::vector<uint16_t>& tokens) const override {
    const std::string valid = valid_utf8(text, bytes);
    cut_out(raw_added_, valid, tokens, [&](const std::string& part) {
      cut_out(added_, normalise_ ? nfc(part) : part, tokens, [&](const std::string& words) { split(words, 0, tokens); });
    });
  }

  void decode(int token, std::string& text) const override {
    if (token != end_of_text_ && size_t(token) < bytes_of_.size()) text += bytes_of_[size_t(token)];
  }

 private:
  struct Added {
    std::string text;
    uint16_t id;
  };
  struct Merge {
    int rank = 0;
    uint16_t id = 0;
  };
  // What a thread keeps: space for matches, and words that it has merged before.
  struct Scratch {
    std::vector<pcre2_match_data*> matches;  // one per pattern
    pcre2_match_context* context = nullptr;
    pcre2_jit_stack* stack = nullptr;
    std::unordered_map<std::string, std::vector<uint16_t>> words;
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() {
      for (pcre2_match_data* match : matches) pcre2_match_data_free(match);
      if (context) pcre2_match_context_free(context);
      if (stack) pcre2_jit_stack_free(stack);
    }
  };
  static constexpr size_t kCachedWords = 1 << 17, kCachedLength = 64;

  std::string path_;
  std::vector<std::string> bytes_of_;  // by id
  std::array<uint16_t, 256> id_of_byte_{};
  std::unordered_map<uint32_t, Merge> merges_;  // by left << 16 | right
  std::vector<Added> raw_added_, added_;        // longest first; looked for before and after normalising
  struct FreePattern {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  };
  using Pattern = std::unique_ptr<pcre2_code, FreePattern>;
  std::vector<Pattern> patterns_;               // applied one after the other, each to the pieces of the one before
  std::string splits_;                          // their text, as in the file
  bool normalise_ = false, prefix_space_ = false;
  int end_of_text_ = -1;
  mutable std::vector<Scratch> threads_;

  [[noreturn]] void fail(const std::string& what) const { throw UserError(path_ + ": " + what); }

  // ---- Reading the file

  void load(const nlohmann::json& file) {
    const nlohmann::json& model = file.at("model");
    if (model.value("type", "BPE") != "BPE") fail("model.type is " + model["type"].dump() + "; only \"BPE\" is known here");
    for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"})
      if (model.contains(key) && !model[key].is_null() && model[key] != "" && model[key] != false && model[key] != 0)
        fail(std::string("model.") + key + " is " + model[key].dump() + ", which byte-level BPE here does not do");
    load_vocabulary(model.at("vocab"), file.value("added_tokens", nlohmann::json::array()));
    load_merges(model.at("vocab"), model.at("merges"));
    load_normaliser(file.value("normalizer", nlohmann::json()));
    load_pre_tokenizer(file.value("pre_tokenizer", nlohmann::json()), true);
    if (end_of_text_ < 0) fail("has no added token <|endoftext|>");
  }

  // Byte-level vocabularies write a byte as a printable character: itself, or one from U+0100 on. This is the inverse,
  // for all bytes of a key; false if a character stands for no byte.
  static bool bytes_of_key(const std::string& key, std::string& bytes) {
    static const std::vector<int> byte_of = [] {
      std::vector<int> table(256 + 68, -1);
      int next = 256;
      for (int b = 0; b < 256; b++) {
        const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        table[size_t(printable ? b : next++)] = b;
      }
      return table;
    }();
    for (size_t i = 0, bad = 0; i < key.size();) {
      const size_t length = utf8_length(key.data(), key.size(), i, bad);
      if (length == 0 || length > 2) return false;
      const unsigned code = length == 1 ? unsigned(key[i]) : (key[i] & 0x1Fu) << 6 | (key[i + 1] & 0x3Fu);
      if (code >= byte_of.size() || byte_of[code] < 0) return false;
      bytes += char(byte_of[code]);
      i += length;
    }
    return true;
  }

  uint16_t id_of(const nlohmann::json& id, const std::string& text) const {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > 65535)
      fail("token \"" + text + "\" has the id " + id.dump() + "; shards hold ids from 0 to 65535");
    return id.get<uint16_t>();
  }

  void load_vocabulary(const nlohmann::json& vocab, const nlohmann::json& added) {
    if (!vocab.is_object() || vocab.empty()) fail("model.vocab is not a table of tokens");
    std::vector<bool> taken;
    auto place = [&](uint16_t id) {
      if (id >= taken.size()) taken.resize(size_t(id) + 1), bytes_of_.resize(size_t(id) + 1);
    };
    for (const auto& [key, value] : vocab.items()) {
      const uint16_t id = id_of(value, key);
      place(id);
      if (taken[id]) fail("two tokens have the id " + std::to_string(id));
      taken[id] = true;
      if (!bytes_of_key(key, bytes_of_[id])) bytes_of_[id] = key;  // an added token's own text
    }
    for (int b = 0; b < 256; b++) {
      if (b == 0xC0 || b == 0xC1 || b > 0xF4) continue;  // never in UTF-8, so Pythia's vocabulary lacks them
      const std::string byte(1, char(b));
      const auto found = std::find(bytes_of_.begin(), bytes_of_.end(), byte);
      if (found == bytes_of_.end()) fail("is not byte-level: no token for byte " + std::to_string(b));
      id_of_byte_[size_t(b)] = uint16_t(found - bytes_of_.begin());
    }
    for (const nlohmann::json& token : added) {
      const std::string text = token.at("content").get<std::string>();
      const uint16_t id = id_of(token.at("id"), text);
      place(id);
      bytes_of_[id] = text;
      if (text.empty()) fail("an added token has no text");
      for (const char* key : {"single_word", "lstrip", "rstrip"})
        if (token.value(key, false)) fail("added token \"" + text + "\" is marked " + key + ", which is not known here");
      if (text == "<|endoftext|>") end_of_text_ = id;
      if (token.value("special", false)) continue;  // what a text says is text, not a command
      (token.value("normalized", true) ? added_ : raw_added_).push_back({text, id});
    }
    for (std::vector<Added>* list : {&raw_added_, &added_})
      std::stable_sort(list->begin(), list->end(),
                       [](const Added& a, const Added& b) { return a.text.size() > b.text.size(); });
  }

  void load_merges(const nlohmann::json& vocab, const nlohmann::json& merges) {
    int rank = 0;
    for (const nlohmann::json& merge : merges) {
      std::string left, right;
      if (merge.is_array() && merge.size() == 2) {
        left = merge[0].get<std::string>(), right = merge[1].get<std::string>();
      } else {
        const std::string both = merge.get<std::string>();
        const size_t space = both.find(' ');
        if (space == std::string::npos) fail("merge \"" + both + "\" is not a pair");
        left = both.substr(0, space), right = both.substr(space + 1);
      }
      for (const std::string& part : {left, right, left + right})
        if (!vocab.contains(part)) fail("merge \"" + left + " " + right + "\": \"" + part + "\" is not in the vocabulary");
      const uint32_t pair = vocab[left].get<uint32_t>() << 16 | vocab[right].get<uint32_t>();
      merges_.insert({pair, {rank++, vocab[left + right].get<uint16_t>()}});
    }
  }

  void load_normaliser(const nlohmann::json& normaliser) {
    if (normaliser.is_null()) return;
    const std::string type = normaliser.at("type").get<std::string>();
    if (type == "Sequence")
      for (const nlohmann::json& one : normaliser.at("normalizers")) load_normaliser(one);
    else if (type == "NFC")
      normalise_ = true;
    else
      fail("normalizer " + type + " is not known here; NFC is");
  }

  // `regex`: a ByteLevel brings its own pattern, unless it says otherwise.
  void load_pre_tokenizer(const nlohmann::json& pre, bool outermost) {
    const std::string type = pre.is_null() ? "none" : pre.at("type").get<std::string>();
    if (type == "Sequence" && outermost) {
      for (const nlohmann::json& one : pre.at("pretokenizers")) load_pre_tokenizer(one, false);
    } else if (type == "Split") {
      if (pre.at("behavior") != "Isolated" || pre.value("invert", false) || !pre.at("pattern").contains("Regex"))
        fail("pre_tokenizer Split: only a Regex with the behaviour Isolated is known here");
      add_pattern(pre["pattern"]["Regex"].get<std::string>());
    } else if (type == "ByteLevel") {
      prefix_space_ = prefix_space_ || pre.value("add_prefix_space", true);
      if (pre.value("use_regex", true))  // GPT-2's: contractions; letters, digits or others behind a space; white space
        add_pattern("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+");
    } else {
      fail("pre_tokenizer " + type + " is not known here; ByteLevel and Split are");
    }
  }

  // The pattern with classes that hold what they hold in Hugging Face's library. PCRE2's \s has U+180E, which Unicode's
  // White_Space has not; and letters and numbers that came with Unicode 15 and 16 are none to a PCRE2 before 10.45.
  static std::string with_unicode_16(const std::string& pattern) {
    const std::string spaces =
        "\\t-\\r \\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}";
    const std::string letters =
        "\\p{L}"
        "\\x{1C89}-\\x{1C8A}\\x{A7CB}-\\x{A7CD}\\x{A7DA}-\\x{A7DC}\\x{105C0}-\\x{105F3}\\x{10D4A}-\\x{10D65}"
        "\\x{10D6F}-\\x{10D85}\\x{10EC2}-\\x{10EC4}\\x{1123F}-\\x{11240}\\x{11380}-\\x{11389}\\x{1138B}"
        "\\x{1138E}\\x{11390}-\\x{113B5}\\x{113B7}\\x{113D1}\\x{113D3}\\x{11BC0}-\\x{11BE0}\\x{11F02}"
        "\\x{11F04}-\\x{11F10}\\x{11F12}-\\x{11F33}\\x{1342F}\\x{13441}-\\x{13446}\\x{13460}-\\x{143FA}"
        "\\x{16100}-\\x{1611D}\\x{16D40}-\\x{16D6C}\\x{18CFF}\\x{1B132}\\x{1B155}\\x{1DF25}-\\x{1DF2A}"
        "\\x{1E030}-\\x{1E06D}\\x{1E4D0}-\\x{1E4EB}\\x{1E5D0}-\\x{1E5ED}\\x{1E5F0}\\x{2B739}"
        "\\x{2EBF0}-\\x{2EE5D}\\x{31350}-\\x{323AF}";
    const std::string numbers =
        "\\p{N}"
        "\\x{10D40}-\\x{10D49}\\x{116D0}-\\x{116E3}\\x{11BF0}-\\x{11BF9}\\x{11F50}-\\x{11F59}"
        "\\x{16130}-\\x{16139}\\x{16D70}-\\x{16D79}\\x{1CCF0}-\\x{1CCF9}\\x{1D2C0}-\\x{1D2D3}"
        "\\x{1E4F0}-\\x{1E4F9}\\x{1E5F1}-\\x{1E5FA}";
    std::string out;
    bool in_class = false;
    for (size_t i = 0; i < pattern.size(); i++) {
      const char c = pattern[i], next = i + 1 < pattern.size() ? pattern[i + 1] : 0;
      auto put = [&](const std::string& members, size_t length) {
        out += in_class ? members : "[" + members + "]";
        i += length - 1;
      };
      if (c == '\\' && next == 's') put(spaces, 2);
      else if (c == '\\' && next == 'S' && !in_class) put("^" + spaces, 2);
      else if (pattern.compare(i, 5, "\\p{L}") == 0) put(letters, 5);
      else if (pattern.compare(i, 5, "\\p{N}") == 0) put(numbers, 5);
      else if (c == '\\') out += {c, next}, i++;
      else out += c, in_class = c == '[' || (in_class && c != ']');
    }
    return out;
  }

  void add_pattern(const std::string& pattern) {
    const std::string text = with_unicode_16(pattern);
    splits_ += " split " + pattern;
    int error = 0;
    PCRE2_SIZE at = 0;
    pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), PCRE2_UTF | PCRE2_UCP, &error,
                                     &at, nullptr);
    if (!code) {
      PCRE2_UCHAR message[200];
      pcre2_get_error_message(error, message, sizeof message);
      fail("pre_tokenizer: pattern " + pattern + ": " + reinterpret_cast<char*>(message));
    }
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where there is no just-in-time compiler, pcre2_match interprets
    patterns_.emplace_back(code);
  }

  // ---- Encoding

  // Calls rest(part) for the text between the added tokens, and appends the ids of those. Of several that match at a
  // place the longest counts, as the list is sorted.
  template <class Rest>
  static void cut_out(const std::vector<Added>& list, const std::string& text, std::vector<uint16_t>& tokens, Rest rest) {
    if (list.empty()) return rest(text);
    bool starts[256] = {};
    for (const Added& added : list) starts[static_cast<unsigned char>(added.text[0])] = true;
    size_t begin = 0;
    for (size_t i = 0; i < text.size(); i++) {
      if (!starts[static_cast<unsigned char>(text[i])]) continue;
      for (const Added& added : list)
        if (text.compare(i, added.text.size(), added.text) == 0) {
          if (i > begin) rest(text.substr(begin, i - begin));
          tokens.push_back(added.id);
          begin = i + added.text.size();
          i = begin - 1;
          break;
        }
    }
    if (begin == 0) return rest(text);
    if (begin < text.size()) rest(text.substr(begin));
  }

  // Cuts the text into words by pattern number `level` and those behind it, and merges each.
  void split(const std::string& text, size_t level, std::vector<uint16_t>& tokens) const {
    if (text.empty()) return;
    if (level == 0 && prefix_space_ && text[0] != ' ') return split_at(" " + text, 0, tokens);
    split_at(text, level, tokens);
  }
  void split_at(const std::string& text, size_t level, std::vector<uint16_t>& tokens) const {
    Scratch& scratch = threads_[size_t(omp_get_thread_num()) % threads_.size()];
    if (level == patterns_.size()) return merge(scratch, text.data(), text.size(), tokens);
    if (!scratch.context) {
      scratch.context = pcre2_match_context_create(nullptr);
      scratch.stack = pcre2_jit_stack_create(32 << 10, 16 << 20, nullptr);
      pcre2_jit_stack_assign(scratch.context, nullptr, scratch.stack);
      for (const Pattern& pattern : patterns_)
        scratch.matches.push_back(pcre2_match_data_create_from_pattern(pattern.get(), nullptr));
    }
    const bool last = level + 1 == patterns_.size();
    auto piece = [&](size_t begin, size_t end) {
      if (end == begin) return;
      if (last) merge(scratch, text.data() + begin, end - begin, tokens);
      else split_at(text.substr(begin, end - begin), level + 1, tokens);
    };
    pcre2_match_data* match = scratch.matches[level];
    size_t done = 0;
    for (size_t at = 0; at < text.size();) {
      const int found = pcre2_match(patterns_[level].get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                    PCRE2_NO_UTF_CHECK, match, scratch.context);
      if (found == PCRE2_ERROR_NOMATCH) break;
      if (found < 0) {
        PCRE2_UCHAR message[200];
        pcre2_get_error_message(found, message, sizeof message);
        fail(std::string("pre_tokenizer: matching fails: ") + reinterpret_cast<char*>(message));
      }
      const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match);
      const size_t begin = range[0], end = range[1];
      piece(done, begin);
      piece(begin, end);
      done = end;
      at = end;
      if (end == begin)  // an empty match: go on behind the next character
        do at++;
        while (at < text.size() && (text[at] & 0xC0) == 0x80);
    }
    piece(done, text.size());
  }

  // Appends the ids of one word.
  void merge(Scratch& scratch, const char* word, size_t length, std::vector<uint16_t>& tokens) const {
    if (length > kCachedLength) return merge_anew(word, length, tokens);
    if (scratch.words.size() >= kCachedWords) scratch.words.clear();
    auto [entry, fresh] = scratch.words.try_emplace(std::string(word, length));
    if (fresh) merge_anew(word, length, entry->second);
    tokens.insert(tokens.end(), entry->second.begin(), entry->second.end());
  }

  // Joins neighbours until no pair is in the list of merges: always the pair of lowest rank, and of those the leftmost. A
  // queue holds the pairs that may be joined; one whose parts have changed since is passed over. O(n log n).
  void merge_anew(const char* word, size_t length, std::vector<uint16_t>& tokens) const {
    struct Symbol {
      int id, previous, next;  // id -1: joined to the one before
    };
    struct Candidate {
      int rank, left, right;
      uint16_t left_id, right_id;
      bool operator<(const Candidate& other) const {  // the queue's first is the largest
        return rank != other.rank ? rank > other.rank : left > other.left;
      }
    };
    std::vector<Symbol> symbols(length);
    std::vector<Candidate> memory;
    memory.reserve(length);  // a word may have megabytes: without this, growing takes twice of what is needed
    std::priority_queue<Candidate> queue({}, std::move(memory));
    auto consider = [&](int left, int right) {
      if (left < 0 || right < 0) return;
      const auto found = merges_.find(uint32_t(symbols[size_t(left)].id) << 16 | uint32_t(symbols[size_t(right)].id));
      if (found != merges_.end())
        queue.push({found->second.rank, left, right, uint16_t(symbols[size_t(left)].id),
                    uint16_t(symbols[size_t(right)].id)});
    };
    for (size_t i = 0; i < length; i++)
      symbols[i] = {id_of_byte_[static_cast<unsigned char>(word[i])], int(i) - 1, i + 1 < length ? int(i) + 1 : -1};
    for (size_t i = 0; i + 1 < length; i++) consider(int(i), int(i) + 1);
    while (!queue.empty()) {
      const Candidate c = queue.top();
      queue.pop();
      Symbol &left = symbols[size_t(c.left)], &right = symbols[size_t(c.right)];
      if (left.id != c.left_id || right.id != c.right_id || left.next != c.right) continue;
      left.id = merges_.at(uint32_t(c.left_id) << 16 | uint32_t(c.right_id)).id;
      left.next = right.next;
      right.id = -1;
      if (right.next >= 0) symbols[size_t(right.next)].previous = c.left;
      consider(left.previous, c.left);
      consider(c.left, left.next);
    }
    for (int i = 0; i >= 0; i = symbols[size_t(i)].next) tokens.push_back(uint16_t(symbols[size_t(i)].id));
  }
};

// The tokenizer that meta.json or a checkpoint names: "bytes", or "tokenizer.json", a file in `directory`. UserError if
// there is none.
inline std::unique_ptr<Tokenizer> make_tokenizer(const std::string& name, const std::string& directory) {
  if (name == "bytes") return std::make_unique<ByteTokenizer>();
  if (name == "tokenizer.json") return std::make_unique<BpeTokenizer>(directory + "/" + name);
  throw UserError("tokenizer \"" + name + "\" is not known here; known: bytes, tokenizer.json");
}
