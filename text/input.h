// Where text comes from: files and standard input, plain, compressed or in archives.
#pragma once
#include <archive.h>
#include <archive_entry.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "run/error.h"
#include "text/unicode.h"

// Text from a file or, for "-", from standard input. What gzip, bzip2, xz, lzma, zstd or lz4 compressed is unpacked on
// the way, and the files of a .zip or .tar come one after the other (libarchive). UTF-16 with its mark becomes UTF-8.
// UserError for what is no text, or not UTF-8, by its first bytes.
class TextInput {
 public:
  explicit TextInput(const std::string& path)
      : path_(path == "-" ? "standard input" : path), archive_(archive_read_new()) {
    struct stat status;
    if (path != "-" && ::stat(path.c_str(), &status) != 0)
      throw UserError("--input " + path + ": cannot open text: " + std::strerror(errno));
    if (path != "-" && !S_ISREG(status.st_mode))
      throw UserError("--input " + path + ": not a regular file; a text file is wanted");
    if (path != "-") size_ = uint64_t(status.st_size);
    for (auto support :
         {archive_read_support_filter_gzip, archive_read_support_filter_bzip2, archive_read_support_filter_xz,
          archive_read_support_filter_lzma, archive_read_support_filter_zstd, archive_read_support_filter_lz4,
          archive_read_support_format_zip, archive_read_support_format_tar, archive_read_support_format_raw,
          archive_read_support_format_empty})
      support(archive_.get());
    if (archive_read_open_filename(archive_.get(), path == "-" ? nullptr : path.c_str(), 1 << 18) != ARCHIVE_OK) fail();
  }

  // Goes on to the next file of an archive; what is none is one file. False behind the last.
  bool next() {
    archive_entry* entry;
    for (;;) {
      const int status = archive_read_next_header(archive_.get(), &entry);
      if (status == ARCHIVE_EOF) return false;
      if (status != ARCHIVE_OK && status != ARCHIVE_WARN) fail();
      name_ = path_;
      if (archive_format(archive_.get()) == ARCHIVE_FORMAT_RAW) break;
      if (archive_entry_filetype(entry) != AE_IFREG) continue;
      const char* member = archive_entry_pathname(entry);
      const std::filesystem::path file = member ? member : "a file in it";
      name_ += ": " + file.string();
      if (file.filename().string().compare(0, 2, "._") != 0) break;  // macOS's own notes about a file
    }
    ready_.clear();
    utf16_ = 0;
    char first[4096];
    size_t n = 0;
    while (const size_t got = n < sizeof first ? read_bytes(first + n, sizeof first - n) : 0) n += got;
    look_at(std::string(first, n));
    return true;
  }
  const std::string& name() const { return name_; }  // of the file, for messages

  // Its next bytes, at most n; 0 at the end.
  size_t read(char* to, size_t n) {
    if (ready_.empty() && utf16_) {
      char units[1 << 15];
      while (const size_t got = ready_.empty() ? read_bytes(units, sizeof units) : 0) convert(std::string(units, got));
      if (ready_.empty()) convert("");
    }
    const size_t some = ready_.copy(to, n);
    ready_.erase(0, some);
    return some + (some < n && !utf16_ ? read_bytes(to + some, n - some) : 0);
  }

  // Bytes of text in a file, which is read through for it where they are not those on the disk; 0 for standard input.
  static uint64_t size(const std::string& path) {
    if (path == "-") return 0;
    TextInput input(path);
    uint64_t size = 0;
    std::vector<char> buffer(1 << 18);
    while (input.next()) {
      const bool plain = archive_format(input.archive_.get()) == ARCHIVE_FORMAT_RAW && !input.utf16_;
      if (plain && archive_filter_count(input.archive_.get()) == 1) return input.size_;
      while (const size_t n = input.read(buffer.data(), buffer.size())) size += n;
    }
    return size;
  }

 private:
  struct Free {
    void operator()(archive* a) const { archive_read_free(a); }
  };
  std::string path_, name_;
  std::unique_ptr<archive, Free> archive_;
  uint64_t size_ = 0;
  std::string ready_;  // text that comes before what the archive gives next
  int utf16_ = 0;      // the place of the higher byte in a pair, plus one; 0: not UTF-16
  std::string units_;  // bytes of UTF-16 that wait for more

  size_t read_bytes(char* to, size_t n) {
    const la_ssize_t got = archive_read_data(archive_.get(), to, n);
    if (got < 0) fail();
    return size_t(got);
  }

  void look_at(const std::string& first) {
    auto begins = [&](const std::string& with) { return first.compare(0, with.size(), with) == 0; };
    if (begins(std::string("\xFF\xFE\0\0", 4)) || begins(std::string("\0\0\xFE\xFF", 4)))
      throw UserError(name_ + ": is UTF-32 by its mark; UTF-8 is wanted: iconv -f UTF-32 -t UTF-8");
    utf16_ = begins("\xFE\xFF") ? 1 : begins("\xFF\xFE") ? 2 : 0;
    if (utf16_) return units_.clear(), convert(first.substr(2));
    const std::pair<std::string, const char*> others[] = {
        {"\x1F\x8B", "gzip"}, {"BZh", "bzip2"}, {"\xFD" "7zXZ", "xz"}, {"\x28\xB5\x2F\xFD", "zstd"}, {"PK\3\4", "zip"},
        {"7z\xBC\xAF", "7-Zip"}, {"Rar!\x1A", "RAR"}, {"PAR1\x15", "Parquet"}, {"ARROW1", "Arrow"}, {"%PDF-", "PDF"},
        {"\x93NUMPY", "NumPy"}, {"\x88\xD8\x34\x01", "a shard of tokens"}, {"\xA1\xD9\x34\x01", "a shard of tokens"}};
    for (const auto& [with, what] : others)
      if (begins(with) && (with != "BZh" || first.find("1AY&SY", 4) == 4))
        throw UserError(name_ + ": is no text but " + what +
                        ", by its first bytes; text is wanted, plain or compressed once");
    // A stray byte that is no text is text of a kind, and kept; many are another encoding, or a file of another kind.
    size_t wrong = size_t(std::count(first.begin(), first.end(), '\0'));
    for (size_t i = 0, bad = 0; i + 4 <= first.size();) {  // the last character may go on behind them
      const size_t length = utf8_length(first.data(), first.size(), i, bad);
      wrong += length ? 0 : bad;
      i += length ? length : bad;
    }
    if (wrong >= 8 && 100 * wrong > first.size())
      throw UserError(name_ + ": is no UTF-8 text: " + std::to_string(wrong) + " of its first " +
                      std::to_string(first.size()) + " bytes are 0 or in no character; iconv -f ENCODING -t UTF-8 " +
                      "converts text in another encoding");
    ready_ = first;
  }

  // Adds UTF-16 to what is ready, as UTF-8; a half of a pair alone becomes U+FFFD. Without bytes: there are no more.
  void convert(const std::string& bytes) {
    units_ += bytes;
    auto unit = [&](size_t i) {
      const unsigned a = static_cast<unsigned char>(units_[i]), b = static_cast<unsigned char>(units_[i + 1]);
      return utf16_ == 1 ? a << 8 | b : b << 8 | a;
    };
    size_t i = 0;
    for (; i + 2 <= units_.size(); i += 2) {
      unsigned code = unit(i);
      if (code >= 0xD800 && code < 0xDC00) {
        if (i + 4 > units_.size() && !bytes.empty()) break;
        const unsigned low = i + 4 <= units_.size() ? unit(i + 2) : 0;
        const bool pair = low >= 0xDC00 && low < 0xE000;
        code = pair ? 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00) : 0xFFFD;
        if (pair) i += 2;
      } else if (code >= 0xDC00 && code < 0xE000) {
        code = 0xFFFD;
      }
      append_utf8(code, ready_);
    }
    units_.erase(0, i);
    if (bytes.empty() && !units_.empty()) append_utf8(0xFFFD, ready_), units_.clear();
  }

  [[noreturn]] void fail() const {
    const char* message = archive_error_string(archive_.get());
    throw UserError((name_.empty() ? path_ : name_) + ": cannot read text: " + (message ? message : "unknown error"));
  }
};
