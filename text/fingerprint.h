// Fingerprints: 16 hex digits that tell whether two things are the same, such as the tokens of two shards or the rules of
// two tokenizers. They find mistakes; nobody is kept from making two things with the same one on purpose.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

class Fingerprint {
 public:
  // Bytes, eight at a time: several gigabytes per second. What is added ends where it ends: "ab", "c" is not "a", "bc".
  Fingerprint& add(const void* data, size_t bytes) {
    const char* from = static_cast<const char*>(data);
    for (size_t i = 0; i < bytes; i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, from + i, bytes - i < 8 ? bytes - i : 8);
      mix(word);
    }
    return add(uint64_t(bytes));
  }
  Fingerprint& add(const std::string& text) { return add(text.data(), text.size()); }
  Fingerprint& add(uint64_t number) { return mix(number), *this; }

  std::string text() const {
    char digits[17];
    std::snprintf(digits, sizeof digits, "%016llx", (unsigned long long)(state_));
    return digits;
  }

 private:
  uint64_t state_ = 0x9e3779b97f4a7c15ull;

  // An odd factor carries every bit upwards and loses nothing; the shift brings it down again for the next word.
  void mix(uint64_t word) {
    state_ = (state_ ^ word) * 0xbf58476d1ce4e5b9ull;
    state_ ^= state_ >> 32;
  }
};
