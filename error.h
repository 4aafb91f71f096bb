// error.h: the one exception type for mistakes that the user can mend.
#pragma once
#include <stdexcept>
#include <string>

// What a user did wrong, in one line that names the flag or file, the value, and what would be right.
// Every main() prints it as "error: ..." on stderr and exits with code 2.
struct UserError : std::runtime_error {
  explicit UserError(const std::string& message) : std::runtime_error(message) {}
};
