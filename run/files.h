// A whole file as bytes, and as JSON.
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "run/error.h"

// The bytes of a file. UserError if it cannot be read.
inline std::string read_text_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (!file.is_open() || file.bad()) throw UserError(path + ": cannot read: " + std::strerror(errno));
  return bytes;
}

// UserError if the file is not JSON, or nested so deeply that what walks through it could run out of stack.
inline nlohmann::json read_json_file(const std::string& path) {
  const std::string text = read_text_file(path);
  try {
    return nlohmann::json::parse(text, [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
      if (depth > 16) throw UserError(path + ": is nested too deeply");
      return true;
    });
  } catch (const nlohmann::json::exception& e) {
    throw UserError(path + ": not valid JSON: " + e.what());
  }
}

// A file that is written piece by piece and synced at the end. UserError (disk full, not writable) with the file's name.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path)
      : path_(path), file_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644)) {
    if (file_ < 0) fail();
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile() {
    if (file_ >= 0) ::close(file_);
  }
  void write(const void* data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
      const ssize_t n = ::write(file_, static_cast<const char*>(data) + done, bytes - done);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) fail();
      done += size_t(n);
    }
  }
  void finish() {
    const bool synced = ::fsync(file_) == 0;
    if (::close(std::exchange(file_, -1)) != 0 || !synced) fail();
  }

 private:
  std::string path_;
  int file_;
  [[noreturn]] void fail() const { throw UserError(path_ + ": cannot write: " + std::strerror(errno)); }
};

inline void write_file(const std::string& path, const std::vector<std::pair<const void*, size_t>>& pieces) {
  OutputFile file(path);
  for (const auto& [data, bytes] : pieces) file.write(data, bytes);
  file.finish();
}

inline void write_text_file(const std::string& path, const std::string& text) {
  write_file(path, {{text.data(), text.size()}});
}

// The same in place of a file that is there: whenever the machine stops, one of the two is whole.
inline void replace_text_file(const std::string& path, const std::string& text) {
  write_text_file(path + ".part", text);
  if (::rename((path + ".part").c_str(), path.c_str()) != 0)
    throw UserError(path + ": cannot write: " + std::strerror(errno));
}
