#pragma once
// Tokenizers: text to ids and back. The byte-level one, in which every byte is its own id, and byte-level BPE (Sennrich et
// al. 2016, arXiv 1508.07909; over bytes: Radford et al. 2019, GPT-2) from a Hugging Face tokenizer.json.
//
// BPE in four steps, each a function below:
//   1. normalise      where the file asks for it, Unicode's composed form (NFC)
//   2. added tokens   strings that are always one id, such as Pythia's runs of spaces, are cut out first
//   3. split          regular expressions cut the rest into words; no token reaches across two of them
//   4. merge          the bytes of a word are joined pair by pair, always the pair that stands first in the list of merges
#include <omp.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <queue>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "run/files.h"
#include "text/fingerprint.h"
#include "text/pattern.h"
#include "text/unicode.h"

struct Tokenizer {
  virtual ~Tokenizer() = default;
  virtual std::string name() const = 0;  // as in meta.json
  virtual int vocabulary() const = 0;    // ids are 0..vocabulary-1
  virtual int end_of_text() const = 0;   // stands before every document
  virtual std::string file() const { return ""; }  // what it was read from, and what goes with shards and models
  // Of what it does: the same one, the same ids for every text in UTF-8, and the same text for every id.
  std::string fingerprint() const {
    Fingerprint all;
    for (int id = 0; id < vocabulary(); id++) {
      std::string text;
      decode(id, text);
      all.add(text);
    }
    return all.add(uint64_t(end_of_text())).add(rules()).text();
  }
  virtual std::string note() const { return ""; }  // what its user should know
  // How text becomes ids, in words of the tokenizer's own; empty: every byte by itself.
  virtual std::string rules() const { return ""; }
  // Appends the ids of one document's text; never end_of_text, whatever the text says. Threads may call it together.
  virtual void encode(const char* text, size_t bytes, std::vector<int>& tokens) const = 0;
  // Appends the bytes of one id; nothing for end_of_text and for what is no id.
  virtual void decode(int token, std::string& text) const = 0;
};

// Every byte is its own id; 256 is the end of text.
struct ByteTokenizer : Tokenizer {
  std::string name() const override { return "bytes"; }
  int vocabulary() const override { return 257; }
  int end_of_text() const override { return 256; }
  void encode(const char* text, size_t bytes, std::vector<int>& tokens) const override {
    for (size_t i = 0; i < bytes; i++) tokens.push_back(static_cast<unsigned char>(text[i]));
  }
  void decode(int token, std::string& text) const override {
    if (token >= 0 && token < 256) text += char(token);
  }
};

// ---------------------------------------------------------------------------------------------------------------------

// Strings that stand between documents, the first that a file has as an added token. Models call it eos.
inline constexpr const char* known_ends_of_text[] = {"<|endoftext|>", "<|end_of_text|>", "</s>",
                                                     "<\uFF5Cend\u2581of\u2581sentence\uFF5C>", "[EOS]"};

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
    bool bytes = merges_.empty() && whole_words_.empty() && raw_added_.empty() && added_.empty() && !normalise_;
    for (const Step& step : steps_) bytes = bytes && !step.prefix_space && !step.matches_only;
    for (int b = 0; b < 256; b++) bytes = bytes && id_of_byte_[size_t(b)] >= 0 && id_of_byte_[size_t(b)] != unknown_;
    if (bytes) return "";
    std::vector<std::array<uint64_t, 3>> merges;
    for (const auto& [pair, merge] : merges_) merges.push_back({uint64_t(merge.rank), pair, uint64_t(merge.id)});
    std::sort(merges.begin(), merges.end());
    Fingerprint all;
    for (const auto& [rank, pair, id] : merges) all.add(pair).add(id);
    for (const std::vector<Added>* list : {&raw_added_, &added_}) {
      for (const Added& added : *list) all.add(added.text).add(uint64_t(added.id));
      all.add(uint64_t(list->size()));
    }
    for (int id : id_of_byte_) all.add(uint64_t(id));
    return all.text() + (whole_words_.empty() ? "" : " whole") + (normalise_ ? " NFC" : "") + splits_;
  }

  std::string note() const override {
    int missing = 0;
    for (int b = 0; b < 256; b++)  // 0xC0, 0xC1 and those from 0xF5 on are in no UTF-8
      missing += b != 0xC0 && b != 0xC1 && b < 0xF5 && (id_of_byte_[size_t(b)] < 0 || id_of_byte_[size_t(b)] == unknown_);
    if (missing == 0) return "";
    return path_ + " has no token for " + std::to_string(missing) + " of the 243 bytes of UTF-8; they " +
           (unknown_ < 0 ? "are left out" : "all become one token") + ", as Hugging Face's library does it";
  }

  void encode(const char* text, size_t bytes, std::vector<int>& tokens) const override {
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
    int id;  // -1: special; what a text says is text, not a command
  };
  struct Merge {
    int rank = 0, id = 0;
  };
  struct Step {  // of splitting, each on the pieces of the one before
    std::unique_ptr<Pattern> pattern;  // none: no cut
    bool prefix_space = false;         // a piece that begins without a space gets one
    bool matches_only = false;         // what lies between matches is left out
  };
  // What a thread keeps: space for matches, and words that it has merged before.
  struct Scratch {
    pcre2_match_data* match = nullptr;
    pcre2_match_context* context = nullptr;
    pcre2_jit_stack* stack = nullptr;
    std::unordered_map<std::string, std::vector<int>> words;
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() {
      if (match) pcre2_match_data_free(match);
      if (context) pcre2_match_context_free(context);
      if (stack) pcre2_jit_stack_free(stack);
    }
  };
  static constexpr size_t kCachedWords = 1 << 17, kCachedLength = 64;
  static constexpr int kMostIds = 1 << 20;  // of published vocabularies the largest have some 260,000

  std::string path_;
  std::vector<std::string> bytes_of_;  // by id
  std::array<int, 256> id_of_byte_{};  // -1: such a byte becomes nothing
  std::unordered_map<uint64_t, Merge> merges_;        // by left << 32 | right
  std::unordered_map<std::string, int> whole_words_;  // those that are a token as they are, without merging
  std::vector<Added> raw_added_, added_;              // longest first; looked for before and after normalising
  std::vector<Step> steps_;
  std::string splits_;                                // their text, as in the file
  bool normalise_ = false;
  int end_of_text_ = -1, unknown_ = -1;
  mutable std::vector<Scratch> threads_;

  static uint64_t pair_of(int left, int right) { return uint64_t(uint32_t(left)) << 32 | uint32_t(right); }

  [[noreturn]] void fail(const std::string& what) const { throw UserError(path_ + ": " + what); }

  // ---- Reading the file

  void load(const nlohmann::json& file) {
    const nlohmann::json& model = file.at("model");
    if (model.value("type", "BPE") != "BPE") fail("model.type is " + model["type"].dump() + "; only \"BPE\" is known here");
    for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"})
      if (model.contains(key) && !model[key].is_null() && model[key] != "" && model[key] != false && model[key] != 0)
        fail(std::string("model.") + key + " is " + model[key].dump() + ", which byte-level BPE here does not do");
    load_vocabulary(model);
    load_merges(model.at("vocab"), model.at("merges"));
    load_normaliser(file.value("normalizer", nlohmann::json()));
    bool byte_level = false;
    load_pre_tokenizer(file.value("pre_tokenizer", nlohmann::json()), byte_level);
    if (!byte_level) fail("is not byte-level: its pre_tokenizer has no ByteLevel");
    load_added(model.at("vocab"), file.value("added_tokens", nlohmann::json::array()));
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

  int id_of(const nlohmann::json& id, const std::string& text) const {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= uint64_t(kMostIds))
      fail("token \"" + text + "\" has the id " + id.dump() + "; known here are ids from 0 to " +
           std::to_string(kMostIds - 1));
    return id.get<int>();
  }

  void place(int id, const std::string& bytes) {
    if (size_t(id) >= bytes_of_.size()) bytes_of_.resize(size_t(id) + 1);
    bytes_of_[size_t(id)] = bytes;
  }

  void load_vocabulary(const nlohmann::json& model) {
    const nlohmann::json& vocab = model.at("vocab");
    if (!vocab.is_object() || vocab.empty()) fail("model.vocab is not a table of tokens");
    const bool whole = model.value("ignore_merges", false);
    std::set<int> taken;
    id_of_byte_.fill(-1);
    for (const auto& [key, value] : vocab.items()) {
      const int id = id_of(value, key);
      if (!taken.insert(id).second) fail("two tokens have the id " + std::to_string(id));
      std::string bytes;
      if (!bytes_of_key(key, bytes)) bytes = key;  // an added token's own text
      else if (bytes.size() == 1) id_of_byte_[static_cast<unsigned char>(bytes[0])] = id;
      else if (whole) whole_words_[bytes] = id;
      place(id, bytes);
    }
    if (const nlohmann::json unknown = model.value("unk_token", nlohmann::json()); !unknown.is_null() && !note().empty()) {
      const std::string text = unknown.get<std::string>();
      if (!vocab.contains(text)) fail("neither model.unk_token \"" + text + "\" nor all bytes are in the vocabulary");
      if (model.value("fuse_unk", false)) fail("model.fuse_unk is true, which byte-level BPE here does not do");
      unknown_ = vocab[text].get<int>();
      std::replace(id_of_byte_.begin(), id_of_byte_.end(), -1, unknown_);
    }
  }

  // An added token has the id of the vocabulary's entry of its text, otherwise the next one, whatever the file says.
  void load_added(const nlohmann::json& vocab, const nlohmann::json& list) {
    int next = int(vocab.size());
    std::unordered_map<std::string, int> id_of_text;
    for (const nlohmann::json& token : list) {
      const std::string text = token.at("content").get<std::string>();
      if (text.empty() || id_of_text.count(text)) continue;
      const int id = vocab.contains(text) ? vocab[text].get<int>() : next;
      if (id >= next) next = id + 1;
      if (!vocab.contains(text) && size_t(id) < bytes_of_.size() && !bytes_of_[size_t(id)].empty())
        fail("added token \"" + text + "\" gets the id " + std::to_string(id) + ", which another token has");
      place(id, text);
      id_of_text[text] = id;
      const bool special = token.value("special", false), normalized = token.value("normalized", !special);
      for (const char* key : {"single_word", "lstrip", "rstrip"})
        if (!special && token.value(key, false))
          fail("added token \"" + text + "\" is marked " + key + ", which is not known here");
      if (normalized) added_.push_back({normalise_ ? nfc(text) : text, special ? -1 : id});
      else raw_added_.push_back({text, special ? -1 : id});
    }
    for (std::vector<Added>* added : {&raw_added_, &added_}) {
      if (std::all_of(added->begin(), added->end(), [](const Added& one) { return one.id < 0; })) added->clear();
      std::stable_sort(added->begin(), added->end(),
                       [](const Added& a, const Added& b) { return a.text.size() > b.text.size(); });
    }
    for (const char* text : known_ends_of_text)
      if (end_of_text_ < 0 && id_of_text.count(text)) end_of_text_ = id_of_text[text];
    if (end_of_text_ < 0) {
      std::string all;
      for (const char* text : known_ends_of_text) all += std::string(all.empty() ? "" : ", ") + text;
      fail("has none of the added tokens that end a text: " + all);
    }
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
        if (space == std::string::npos || both.find(' ', space + 1) != std::string::npos)
          fail("merge \"" + both + "\" is not a pair");
        left = both.substr(0, space), right = both.substr(space + 1);
      }
      for (const std::string& part : {left, right, left + right})
        if (!vocab.contains(part)) fail("merge \"" + left + " " + right + "\": \"" + part + "\" is not in the vocabulary");
      merges_[pair_of(vocab[left].get<int>(), vocab[right].get<int>())] = {rank++, vocab[left + right].get<int>()};
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

  // Its parts work one after the other. ByteLevel ends with letters for bytes, and what cut those would mean something
  // else; here bytes stay bytes, so nothing may follow it.
  void load_pre_tokenizer(const nlohmann::json& pre, bool& byte_level) {
    const std::string type = pre.is_null() ? "none" : pre.at("type").get<std::string>();
    if (type == "Sequence") {
      for (const nlohmann::json& one : pre.at("pretokenizers")) load_pre_tokenizer(one, byte_level);
      return;
    }
    if (byte_level) fail("pre_tokenizer: " + type + " behind ByteLevel is not known here");
    if (type == "Split") {
      const bool matches_only = pre.at("behavior") == "Removed" && pre.value("invert", false);
      if (!matches_only && (pre.at("behavior") != "Isolated" || pre.value("invert", false)))
        fail("pre_tokenizer Split: behavior " + pre.at("behavior").dump() +
             (pre.value("invert", false) ? ", inverted," : "") + " is not known here; Isolated is");
      if (!pre.at("pattern").contains("Regex")) fail("pre_tokenizer Split: only a Regex is known here");
      add_step(pre["pattern"]["Regex"].get<std::string>(), false, matches_only);
    } else if (type == "Digits") {
      // Numbers, to the Rust language those of Unicode 17: thirteen more than to Oniguruma.
      add_step(std::string("[\\p{N}\\x{11DE0}-\\x{11DE9}\\x{16FF4}-\\x{16FF6}]") +
                   (pre.value("individual_digits", false) ? "" : "+"), false, false);
    } else if (type == "ByteLevel") {
      byte_level = true;
      const bool prefix_space = pre.value("add_prefix_space", true);
      if (pre.value("use_regex", true))  // GPT-2's: contractions; letters, digits or others behind a space; white space
        add_step("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", prefix_space,
                 false);
      else if (prefix_space)
        add_step("", prefix_space, false);
    } else {
      fail("pre_tokenizer " + type + " is not known here; ByteLevel, Split and Digits are");
    }
  }

  void add_step(const std::string& pattern, bool prefix_space, bool matches_only) {
    Step step;
    step.prefix_space = prefix_space, step.matches_only = matches_only;
    try {
      if (!pattern.empty()) step.pattern = std::make_unique<Pattern>(pattern);
    } catch (const UserError& e) {
      fail(std::string("pre_tokenizer: ") + e.what());
    }
    steps_.push_back(std::move(step));
    splits_ += std::string(prefix_space ? " prefix" : "") + (matches_only ? " match " : " split ") + pattern;
  }

  // ---- Encoding

  // Calls rest(part) for the text between the added tokens, and appends the ids of those. Of several that match at a
  // place the longest counts, as the list is sorted. One that is special stays text, but none begins within it.
  template <class Rest>
  static void cut_out(const std::vector<Added>& list, const std::string& text, std::vector<int>& tokens, Rest rest) {
    if (list.empty()) return rest(text);
    bool starts[256] = {};
    for (const Added& added : list) starts[static_cast<unsigned char>(added.text[0])] = true;
    size_t begin = 0;
    for (size_t i = 0; i < text.size(); i++) {
      if (!starts[static_cast<unsigned char>(text[i])]) continue;
      for (const Added& added : list)
        if (text.compare(i, added.text.size(), added.text) == 0) {
          if (added.id >= 0) {
            if (i > begin) rest(text.substr(begin, i - begin));
            tokens.push_back(added.id);
            begin = i + added.text.size();
          }
          i += added.text.size() - 1;
          break;
        }
    }
    if (begin == 0) return rest(text);
    if (begin < text.size()) rest(text.substr(begin));
  }

  // Cuts the text into words by step number `level` and those behind it, and merges each.
  void split(const std::string& text, size_t level, std::vector<int>& tokens) const {
    if (text.empty()) return;
    Scratch& scratch = threads_[size_t(omp_get_thread_num()) % threads_.size()];
    if (level == steps_.size()) return merge(scratch, text.data(), text.size(), tokens);
    const Step& step = steps_[level];
    const std::string prefixed = step.prefix_space && text[0] != ' ' ? " " + text : "";
    const std::string& whole = prefixed.empty() ? text : prefixed;
    if (!step.pattern) return split(whole, level + 1, tokens);
    if (!scratch.match) {
      scratch.match = pcre2_match_data_create(1, nullptr);
      scratch.context = pcre2_match_context_create(nullptr);
      scratch.stack = pcre2_jit_stack_create(32 << 10, 16 << 20, nullptr);
      pcre2_jit_stack_assign(scratch.context, nullptr, scratch.stack);
    }
    try {
      step.pattern->cut(whole, scratch.match, scratch.context, [&](size_t begin, size_t end, bool matches) {
        if (!matches && step.matches_only) return;
        if (level + 1 == steps_.size()) merge(scratch, whole.data() + begin, end - begin, tokens);
        else split(whole.substr(begin, end - begin), level + 1, tokens);
      });
    } catch (const UserError& e) {
      fail(std::string("pre_tokenizer: ") + e.what());
    }
  }

  // Appends the ids of one word.
  void merge(Scratch& scratch, const char* word, size_t length, std::vector<int>& tokens) const {
    if (length > kCachedLength) return merge_anew(word, length, tokens);
    if (scratch.words.size() >= kCachedWords) scratch.words.clear();
    auto [entry, fresh] = scratch.words.try_emplace(std::string(word, length));
    if (fresh) merge_anew(word, length, entry->second);
    tokens.insert(tokens.end(), entry->second.begin(), entry->second.end());
  }

  // Joins neighbours until no pair is in the list of merges: always the pair of lowest rank, and of those the leftmost. A
  // queue holds the pairs that may be joined; one whose parts have changed since is passed over. O(n log n).
  void merge_anew(const char* word, size_t length, std::vector<int>& tokens) const {
    if (!whole_words_.empty())
      if (const auto found = whole_words_.find(std::string(word, length)); found != whole_words_.end())
        return tokens.push_back(found->second);
    struct Symbol {
      int id, previous, next;  // id -1: joined to the one before
    };
    struct Candidate {
      int rank, left, right, left_id, right_id;
      bool operator<(const Candidate& other) const {  // the queue's first is the largest
        return rank != other.rank ? rank > other.rank : left > other.left;
      }
    };
    std::vector<Symbol> symbols;
    symbols.reserve(length);
    std::vector<Candidate> memory;
    memory.reserve(length);  // a word may have megabytes: without this, growing takes twice of what is needed
    std::priority_queue<Candidate> queue({}, std::move(memory));
    auto consider = [&](int left, int right) {
      if (left < 0 || right < 0) return;
      const int left_id = symbols[size_t(left)].id, right_id = symbols[size_t(right)].id;
      const auto found = merges_.find(pair_of(left_id, right_id));
      if (found != merges_.end()) queue.push({found->second.rank, left, right, left_id, right_id});
    };
    for (size_t i = 0; i < length; i++) {
      const int id = id_of_byte_[static_cast<unsigned char>(word[i])], n = int(symbols.size());
      if (id >= 0) symbols.push_back({id, n - 1, n + 1});
    }
    if (symbols.empty()) return;
    symbols.back().next = -1;
    for (size_t i = 0; i + 1 < symbols.size(); i++) consider(int(i), int(i) + 1);
    while (!queue.empty()) {
      const Candidate c = queue.top();
      queue.pop();
      Symbol &left = symbols[size_t(c.left)], &right = symbols[size_t(c.right)];
      if (left.id != c.left_id || right.id != c.right_id || left.next != c.right) continue;
      left.id = merges_.at(pair_of(c.left_id, c.right_id)).id;
      left.next = right.next;
      right.id = -1;
      if (right.next >= 0) symbols[size_t(right.next)].previous = c.left;
      consider(left.previous, c.left);
      consider(c.left, left.next);
    }
    for (int i = 0; i >= 0; i = symbols[size_t(i)].next) tokens.push_back(symbols[size_t(i)].id);
  }
};

// The tokenizer that meta.json or a checkpoint names: "bytes", or "tokenizer.json", a file in `directory`. UserError if
// there is none.
inline std::unique_ptr<Tokenizer> make_tokenizer(const std::string& name, const std::string& directory) {
  if (name == "bytes") return std::make_unique<ByteTokenizer>();
  if (name == "tokenizer.json") return std::make_unique<BpeTokenizer>(directory + "/" + name);
  throw UserError("tokenizer \"" + name + "\" is not known here; known: bytes, tokenizer.json");
}
