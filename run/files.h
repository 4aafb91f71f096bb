// A whole file as bytes, and as JSON.
#pragma once
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

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
