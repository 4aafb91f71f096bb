// The regular expressions by which a tokenizer.json splits text, as Hugging Face's `tokenizers` understand them: in the
// dialect of Oniguruma 6.9 with Unicode 16. PCRE2 matches them here. The two agree on much and differ silently on the
// rest (\h, ^, classes within classes, \s, \p{L} of a newer Unicode), so an expression is read in full and written anew in
// forms that mean the same to PCRE2 whatever its version; what has no such form is refused.
#pragma once
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "run/error.h"
#include "text/unicode.h"

// Reads an expression, valid UTF-8, and writes it for PCRE2 with UTF, UCP, MULTILINE and lines that end in "\n". UserError
// for what is not known here.
class PatternReader {
 public:
  explicit PatternReader(const std::string& pattern) : pattern_(pattern) {}

  std::string translated() {
    const std::string all = alternatives(false, 0);
    if (at_ < pattern_.size()) fail("a ) without its (");
    return all;
  }

 private:
  // A set of characters: members of a PCRE2 class, and expressions for the characters that no class can list.
  struct Set {
    std::string members;
    std::vector<std::string> others;
    void add(const Set& set) {
      members += set.members;
      others.insert(others.end(), set.others.begin(), set.others.end());
    }
    std::string text(bool negated) const {
      if (members.empty() && others.size() == 1 && others[0][0] == '[' && !negated) return others[0];
      if (others.empty()) return (negated ? "[^" : "[") + members + "]";
      std::string any = "(?:";
      if (!members.empty()) any += "[" + members + "]|";
      for (size_t i = 0; i < others.size(); i++) any += (i ? "|" : "") + others[i];
      return negated ? "(?:(?!" + any + "))(?s:.))" : any + ")";
    }
  };
  static constexpr int kDeepest = 50;

  const std::string& pattern_;
  size_t at_ = 0;

  [[noreturn]] void fail(const std::string& what) const {
    throw UserError("pattern " + pattern_ + ": " + what + " is not known here");
  }
  bool sees(const std::string& text) const { return pattern_.compare(at_, text.size(), text) == 0; }
  bool takes(const std::string& text) { return sees(text) ? (at_ += text.size(), true) : false; }

  static std::string written(unsigned code) {  // a character that means itself, within a class or without
    if (code < 128 && std::isalnum(int(code))) return std::string(1, char(code));
    char digits[16];
    std::snprintf(digits, sizeof digits, "\\x{%X}", code);
    return digits;
  }

  // One or more sequences with | between them, up to the end of the group. fold: whether case is ignored.
  std::string alternatives(bool fold, int depth) {
    if (depth > kDeepest) fail("nesting this deep");
    std::string out;
    unsigned before = 0;  // the letter before this one, where case is ignored
    while (at_ < pattern_.size() && !sees(")")) {
      if (takes("|")) {
        out += "|", before = 0;
      } else if (takes("(?i)")) {  // holds up to the end of the group, further alternatives included
        out += "(?i:" + alternatives(true, depth + 1) + ")";
      } else {
        out += atom(fold, depth, before);
        out += quantifier();
      }
    }
    return out;
  }

  std::string atom(bool fold, int depth, unsigned& before) {
    const unsigned previous = std::exchange(before, 0);
    if (sees("(")) return group(fold, depth);
    if (sees("[")) return character_class(fold, depth);
    if (takes(".")) return "[^\\n]";
    for (const char* anchor : {"^", "$", "\\A", "\\z"})
      if (takes(anchor)) return anchor;
    for (const char* sign : {"*", "+", "?", "{"})
      if (sees(sign)) fail("\"" + std::string(sign) + "\" with nothing before it");
    Set set;
    unsigned code = 0;
    if (escape(set, code, fold)) return set.text(false);
    if (fold) {
      if (code >= 128) fail("a character beyond ASCII where case is ignored");
      // Oniguruma takes some single letters for two: "ss" for U+00DF, "fi" and the like for ligatures.
      const unsigned pair[] = {unsigned(std::tolower(int(previous))), unsigned(std::tolower(int(code)))};
      if ((pair[0] == 's' && (pair[1] == 's' || pair[1] == 't')) ||
          (pair[0] == 'f' && (pair[1] == 'f' || pair[1] == 'i' || pair[1] == 'l')))
        fail("\"" + std::string{char(pair[0]), char(pair[1])} + "\" where case is ignored");
      before = code;
    }
    return written(code);
  }

  std::string group(bool fold, int depth) {
    std::string open;
    for (const char* kind : {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"})
      if (open.empty() && takes(kind)) open = kind;
    if (open.empty()) {
      if (sees("(?")) fail("the group " + pattern_.substr(at_, 4));
      at_++;
      open = "(?:";
    }
    const std::string inside = alternatives(fold || open == "(?i:", depth + 1);
    if (!takes(")")) fail("a ( without its )");
    return open + inside + ")";
  }

  // *, +, ?, {n}, {n,}, {n,m}, with ? behind it for the least number; behind the first three also + for all or nothing.
  std::string quantifier() {
    if (at_ == pattern_.size()) return "";
    const size_t begin = at_;
    const char c = pattern_[at_];
    if (c == '*' || c == '+' || c == '?') {
      at_++;
      if (!takes("?")) takes("+");
    } else if (c == '{') {
      at_++;
      auto number = [&] {
        const size_t first = at_;
        while (at_ < pattern_.size() && std::isdigit(static_cast<unsigned char>(pattern_[at_]))) at_++;
        return at_ > first && at_ < first + 5;
      };
      bool known = number();
      const bool exact = known && sees("}");
      if (known && takes(",")) known = sees("}") || number();
      if (!known || !takes("}")) fail(pattern_.substr(begin, at_ + 1 - begin));
      const size_t last = pattern_.find_last_of("{,", at_) + 1;  // the largest number, or the end where there is none
      if (pattern_[last] != '}' && std::stoi(pattern_.substr(last)) == 0)
        fail(pattern_.substr(begin, at_ - begin));  // never: PCRE2 10.42 still goes by what stands before it
      if (exact && sees("?")) fail("{n}?");  // "may be missing" to one, "as few as possible" to the other
      takes("?");
    }
    if (at_ > begin && at_ < pattern_.size() && std::string("*+?{").find(pattern_[at_]) != std::string::npos)
      fail(pattern_.substr(begin, at_ + 1 - begin));
    return pattern_.substr(begin, at_ - begin);
  }

  // One character or, with true, a set of them: \s, \d, \h, \p{..} and their opposites.
  bool escape(Set& set, unsigned& code, bool fold) {
    if (!takes("\\")) {
      code = next_character(pattern_, at_);
      return false;
    }
    if (at_ == pattern_.size()) fail("a \\ at the end");
    const size_t begin = at_ - 1;
    code = next_character(pattern_, at_);
    if (code < 128 && !std::isalnum(int(code))) return false;
    if (const size_t known = std::string("rntfvae").find(char(code)); code < 128 && known != std::string::npos) {
      code = unsigned("\r\n\t\f\v\a\x1B"[known]);
      return false;
    }
    if (code == 'x' || code == 'u') {
      const bool braces = code == 'x' && takes("{");
      const size_t first = at_, longest = braces ? 6 : code == 'x' ? 2 : 4;
      while (at_ < pattern_.size() && at_ - first < longest && std::isxdigit(static_cast<unsigned char>(pattern_[at_])))
        at_++;
      const std::string digits = pattern_.substr(first, at_ - first);
      const bool bytes = code == 'x' && !braces;  // there \xHH is a byte, so beyond ASCII a part of a character
      code = digits.empty() ? ~0u : unsigned(std::stoul(digits, nullptr, 16));
      if ((braces && !takes("}")) || (bytes ? code > 127 : code > 0x10FFFF) || (!bytes && !braces && digits.size() < 4) ||
          (code >= 0xD800 && code < 0xE000))
        fail(pattern_.substr(begin, at_ - begin));
      return false;
    }
    bool negated = false;
    switch (code) {
      case 'S': case 'D': case 'H': case 'P': negated = true;
    }
    switch (code) {
      case 's': case 'S':  // White_Space; PCRE2's \s has U+180E as well
        set.members = "\\t-\\r \\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}";
        break;
      case 'd': case 'D': set = property("Nd"); break;
      case 'h': case 'H': set.members = "0-9A-Fa-f"; break;
      case 'p': case 'P': {
        if (fold) fail("\\p where case is ignored");
        if (!takes("{")) fail("\\p without {");
        if (takes("^")) negated = !negated;
        const size_t end = std::min(pattern_.find('}', at_), pattern_.size());
        set = property(pattern_.substr(at_, end - at_));
        at_ = end;
        if (!takes("}")) fail("\\p{ without }");
        break;
      }
      default: fail(pattern_.substr(begin, at_ - begin));
    }
    if (negated) set = {"", {set.text(true)}};
    return true;
  }

  // A general category, such as L or Lu. What is newer than the library stands beside its own idea of it.
  Set property(const std::string& name) const {
    static const std::vector<std::string> known = {
        "L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "P",  "Pc", "Pd",
        "Ps", "Pe", "Pi", "Pf", "Po", "S",  "Sm", "Sc", "Sk", "So", "Z", "Zs", "Zl", "Zp", "Cc", "Cf"};
    if (std::find(known.begin(), known.end(), name) == known.end()) fail("\\p{" + name + "}");
    std::vector<std::pair<unsigned, unsigned>> ranges, joined;
    for (const auto& [category, its] : newer_than_unicode_13())
      if (category.compare(0, name.size(), name) == 0) ranges.insert(ranges.end(), its.begin(), its.end());
    std::sort(ranges.begin(), ranges.end());
    for (const auto& range : ranges)
      if (!joined.empty() && joined.back().second + 1 == range.first) joined.back().second = range.second;
      else joined.push_back(range);
    Set set{"\\p{" + name + "}", {}};
    for (const auto& [first, last] : joined)
      set.members += written(first) + (last > first ? "-" + written(last) : "");
    if (name == "Mn")  // two that became Mc
      return {"", {"(?![\\x{1734}\\x{1171E}])" + set.text(false)}};
    return set;
  }

  std::string character_class(bool fold, int depth) {
    bool negated = false;
    const Set set = class_set(fold, depth, negated);
    return set.text(negated);
  }

  // From [ to ]. A class within it is a part of it.
  Set class_set(bool fold, int depth, bool& negated) {
    if (depth > kDeepest) fail("nesting this deep");
    at_++;
    negated = takes("^");
    if (fold && negated) fail("a class with ^ where case is ignored");
    if (sees("]")) fail("] as the first of a class");
    Set all;
    for (bool first = true; !takes("]"); first = false) {
      if (at_ >= pattern_.size()) fail("[ without its ]");
      if (sees("[:")) fail("a class of names, [:");
      if (sees("&&")) fail("&& in a class");
      Set one;
      unsigned low = 0, high = 0;
      if (sees("[")) {
        bool inner = false;
        one = class_set(fold, depth + 1, inner);
        if (inner && !one.others.empty())  // it may hold no character at all, which Oniguruma misreads
          fail("a class with ^ within a class, of sets such as \\S,");
        if (inner) one = {"", {one.text(true)}};
        all.add(one);
        if (sees("-") && !sees("-]")) fail("- behind a class");
        continue;
      }
      const bool dash = sees("-");
      if (dash && !first && !sees("-]")) fail("- within a class, but for a range,");
      if (escape(one, low, fold)) {
        all.add(one);
        if (sees("-") && !sees("-]")) fail("- behind " + pattern_.substr(at_ - 2, 2));
        continue;
      }
      high = low;
      if (!dash && sees("-") && !sees("-]")) {
        at_++;
        if (sees("[") || sees("&&") || escape(one, high, fold)) fail("a range to a class");
        if (high < low) fail("a range that goes down");
      }
      if (fold && (low != high || low >= 128)) fail("a range, or a character beyond ASCII, where case is ignored");
      all.members += written(low) + (high > low ? "-" + written(high) : "");
    }
    return all;
  }
};

// A compiled expression. Threads may share it, each with its own space for matches.
class Pattern {
 public:
  // UserError, with the expression and the reason.
  explicit Pattern(const std::string& pattern) {
    const std::string text = PatternReader(pattern).translated();
    std::unique_ptr<pcre2_compile_context, Free> context(pcre2_compile_context_create(nullptr));
    pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
    int error = 0;
    PCRE2_SIZE at = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_START_OPTIMIZE, &error, &at,
                              context.get()));  // which misses matches (10.42): of (?=a)b*a in "ca"
    if (!code_) throw UserError("pattern " + pattern + ": " + message(error));
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // where there is no just-in-time compiler, pcre2_match interprets
  }

  // Calls piece(begin, end, matches) for every part of the text from left to right: what the expression matches, and what
  // lies between. UserError where matching takes more steps or memory than the library allows.
  template <class Piece>
  void cut(const std::string& text, pcre2_match_data* match, pcre2_match_context* context, Piece piece) const {
    size_t done = 0;
    for (size_t at = 0; at < text.size();) {
      const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                    PCRE2_NO_UTF_CHECK, match, context);
      if (found == PCRE2_ERROR_NOMATCH) break;
      if (found < 0) throw UserError("matching fails: " + message(found));
      const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match);
      const size_t begin = range[0], end = range[1];
      if (begin > done) piece(done, begin, false);
      if (end > begin) piece(begin, end, true);
      done = at = end;
      if (end == begin)  // an empty match: go on behind the next character
        do at++;
        while (at < text.size() && (text[at] & 0xC0) == 0x80);
    }
    if (done < text.size()) piece(done, text.size(), false);
  }

 private:
  struct Free {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
    void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
  };
  std::unique_ptr<pcre2_code, Free> code_;

  static std::string message(int error) {
    PCRE2_UCHAR text[200];
    pcre2_get_error_message(error, text, sizeof text);
    return reinterpret_cast<char*>(text);
  }
};
