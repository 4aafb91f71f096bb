// The one exception type for mistakes that the user can mend, and what becomes of it.
#pragma once
#include <cstdio>
#include <stdexcept>
#include <string>

// What a user did wrong, in one line that names the flag or file, the value, and what would be right.
struct UserError : std::runtime_error {
  explicit UserError(const std::string& message) : std::runtime_error(message) {}
};

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
