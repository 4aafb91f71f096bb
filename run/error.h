// The one exception type for mistakes that the user can mend; output that cannot be written; lists that a user writes.
#pragma once
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// What a user did wrong, in one line that names the flag or file, the value, and what would be right.
struct UserError : std::runtime_error {
  explicit UserError(const std::string& message) : std::runtime_error(message) {}
};

// Numbers between commas.
inline std::vector<double> parse_list(const std::string& flag, const std::string& text) {
  std::stringstream words(text);
  std::vector<double> values;
  for (std::string word; std::getline(words, word, ',');) {
    char* end = nullptr;
    const double value = std::strtod(word.c_str(), &end);
    if (word.empty() || *end || !std::isfinite(value))
      throw UserError(flag + " " + text + ": \"" + word + "\" is not a number");
    values.push_back(value);
  }
  if (values.empty()) throw UserError(flag + ": give one number or more, with commas between");
  return values;
}

// Standard output may be a file on a disk that is full: UserError if what was printed did not get there.
inline void flush_output() {
  const bool before = std::ferror(stdout);
  if (std::fflush(stdout) != 0 || before)
    throw UserError(std::string("cannot write to standard output: ") + std::strerror(errno ? errno : ENOSPC));
}
