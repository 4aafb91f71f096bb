// The one exception type for mistakes that the user can mend, and what becomes of it; and lists that a user writes.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
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

// The body of every main(): calls work(), which gives the exit code. A user's mistake ends in one line on stderr and
// exit code 2, whatever else goes wrong in one line and exit code 1.
template <class Work>
int exit_code_of(Work work) {
  try {
    return work();
  } catch (const UserError& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 2;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}
