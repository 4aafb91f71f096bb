// Writing text as shards, and reading it back. What data.cpp's commands do, without the command line.
#pragma once
#include <archive.h>
#include <archive_entry.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "text/shards.h"
#include "text/stories.h"
#include "text/tokenizer.h"

// A file that appears under its name only when it is complete: written as NAME.part, synced, renamed by commit().
// Without commit() the destructor removes it. UserError when the disk is full or the directory not writable.
class NewFile {
 public:
  explicit NewFile(const std::string& path) : path_(path), file_(std::fopen((path + ".part").c_str(), "w+b")) {
    if (!file_) fail("cannot write");
  }
  NewFile(NewFile&& other) noexcept : path_(std::move(other.path_)), file_(other.file_), done_(other.done_) {
    other.file_ = nullptr;
    other.done_ = true;
  }
  NewFile& operator=(NewFile&&) = delete;
  ~NewFile() {
    if (file_) std::fclose(file_);
    if (!done_) ::unlink((path_ + ".part").c_str());
  }

  const std::string& path() const { return path_; }

  void write(const void* data, size_t bytes) {
    if (std::fwrite(data, 1, bytes, file_) != bytes) fail("cannot write");
  }
  void write_at(long offset, const void* data, size_t bytes) {
    if (std::fseek(file_, offset, SEEK_SET) != 0) fail("cannot write");
    write(data, bytes);
    if (std::fseek(file_, 0, SEEK_END) != 0) fail("cannot write");
  }
  // Reads back from `offset`; the number of bytes read, less than asked for only at the end.
  size_t read_at(long offset, void* data, size_t bytes) {
    if (std::fseek(file_, offset, SEEK_SET) != 0) fail("cannot read back");
    size_t got = std::fread(data, 1, bytes, file_);
    if (std::ferror(file_)) fail("cannot read back");
    return got;
  }
  // Everything on the disk, before the name changes: a crash leaves the old file or the new one.
  void sync() {
    if (std::fflush(file_) != 0 || ::fsync(::fileno(file_)) != 0) fail("cannot write");
  }
  void commit() {
    std::FILE* file = file_;
    file_ = nullptr;
    if (std::fclose(file) != 0 || std::rename((path_ + ".part").c_str(), path_.c_str()) != 0) fail("cannot write");
    done_ = true;
  }

 private:
  std::string path_;
  std::FILE* file_;
  bool done_ = false;

  [[noreturn]] void fail(const char* what) const {
    throw UserError(path_ + ": " + what + ": " + std::strerror(errno));
  }
};

// One split ("train" or "val") as a row of shards DIR/NAME_000.bin, NAME_001.bin, ... of about `shard_tokens` each.
class ShardWriter {
 public:
  ShardWriter(std::string directory, std::string name, size_t shard_tokens)
      : directory_(std::move(directory)), name_(std::move(name)), shard_tokens_(shard_tokens) {}

  uint64_t tokens() const { return tokens_; }

  void add(const uint16_t* tokens, size_t n) {  // (n)
    tokens_ += n;
    while (n > 0) {
      if (files_.empty() || counts_.back() == shard_tokens_) open();
      size_t some = std::min(n, shard_tokens_ - counts_.back());
      files_.back().write(tokens, some * sizeof(uint16_t));
      counts_.back() += some;
      tokens += some;
      n -= some;
    }
  }

  // Fills in the headers, and says the fingerprint of each file. Nothing has its final name yet.
  void finish(std::map<std::string, std::string>& fingerprints) {
    // A last shard of a few tokens would be too short for any context: what is less than half full joins its neighbour.
    if (files_.size() > 1 && counts_.back() < shard_tokens_ / 2) {
      std::vector<char> buffer(1 << 20);
      long offset = shard_header_bytes;
      NewFile& last = files_.back();
      NewFile& before = files_[files_.size() - 2];
      while (size_t got = last.read_at(offset, buffer.data(), buffer.size())) {
        before.write(buffer.data(), got);
        offset += long(got);
      }
      size_t moved = counts_.back();
      files_.pop_back();
      counts_.pop_back();
      counts_.back() += moved;
    }
    for (size_t i = 0; i < files_.size(); i++) {
      int32_t header[3] = {shard_magic, shard_version, int32_t(counts_[i])};
      files_[i].write_at(0, header, sizeof header);
      files_[i].sync();
      fingerprints[std::filesystem::path(path(i)).filename()] = Shard(path(i) + ".part").fingerprint();
    }
  }

  // Gives the shards their names, and removes those of an earlier, longer corpus: a pattern would match them as well.
  void commit() {
    for (NewFile& file : files_) file.commit();
    for (size_t i = files_.size(); ::unlink(path(i).c_str()) == 0; i++) {
    }
  }

 private:
  std::string directory_, name_;
  size_t shard_tokens_;
  uint64_t tokens_ = 0;
  std::vector<NewFile> files_;
  std::vector<size_t> counts_;  // tokens in each file

  std::string path(size_t i) const {
    std::string number = std::to_string(i);
    return directory_ + "/" + name_ + "_" + std::string(number.size() < 3 ? 3 - number.size() : 0, '0') + number +
           ".bin";
  }

  void open() {
    const int32_t zeros[shard_header_ints] = {};
    files_.emplace_back(path(files_.size()));
    counts_.push_back(0);
    files_.back().write(zeros, sizeof zeros);
  }
};

constexpr size_t default_shard_tokens = 100'000'000, most_shard_tokens = 1'000'000'000;

// Copies a file, complete or not at all.
inline void copy_file(const std::string& from, const std::string& to) {
  const std::string bytes = read_text_file(from);
  NewFile copy(to);
  copy.write(bytes.data(), bytes.size());
  copy.sync();
  copy.commit();
}

// A corpus in the making: both splits and meta.json. Text comes in as documents, which are encoded some at a time, on all
// threads. Nothing of it is visible before commit(). UserError if the directory cannot be made or written.
class CorpusWriter {
 public:
  CorpusWriter(const std::string& directory, std::unique_ptr<Tokenizer> tokenizer,
               size_t shard_tokens = default_shard_tokens)
      : directory_(directory),
        tokenizer_(std::move(tokenizer)),
        train_{ShardWriter(directory, "train", shard_tokens), {}},
        val_{ShardWriter(directory, "val", shard_tokens), {}} {
    if (shard_tokens < 1 || shard_tokens > most_shard_tokens)
      throw UserError("--shard-tokens " + std::to_string(shard_tokens) + ": should be 1 to " +
                      std::to_string(most_shard_tokens));
    std::error_code error;
    std::filesystem::create_directories(directory, error);
    if (error) throw UserError(directory + ": cannot make the directory: " + error.message());
  }

  // Adds a document, or with `opens` false more of the last one of this split. One without text is left out.
  void document(bool val, std::string text, bool opens = true) {
    if (text.empty()) return;
    waiting_bytes_ += text.size();
    waiting_.push_back({val, opens, std::move(text), {}});
    if (waiting_bytes_ >= (8u << 20)) encode_waiting();
  }

  // Writes the shards, then meta.json. The entropies are in nats per token, NAN if not known.
  Meta commit(double train_entropy = NAN, double val_entropy = NAN) {
    encode_waiting();
    if (train_.shards.tokens() == 0) throw UserError(directory_ + ": there is no text to write");
    Meta meta;
    meta.tokenizer = tokenizer_->name();
    meta.tokenizer_fingerprint = tokenizer_->fingerprint();
    meta.vocabulary = tokenizer_->vocabulary();
    train_.meta.entropy = train_entropy;
    val_.meta.entropy = val_entropy;
    for (Split* split : {&train_, &val_}) {
      split->meta.tokens = split->shards.tokens();
      split->shards.finish(meta.shards);
    }
    meta.train = train_.meta;
    meta.val = val_.meta;
    NewFile file(directory_ + "/meta.json");
    std::string json = meta_to_json(meta).dump(2) + "\n";
    file.write(json.data(), json.size());
    file.sync();
    if (!tokenizer_->file().empty()) copy_file(tokenizer_->file(), directory_ + "/tokenizer.json");
    train_.shards.commit();  // from here on nothing can run out of space
    val_.shards.commit();
    file.commit();
    return meta;
  }

 private:
  struct Split {
    ShardWriter shards;
    Meta::Split meta;
  };
  struct Piece {
    bool val, opens;
    std::string text;
    std::vector<uint16_t> tokens;
  };
  std::string directory_;
  std::unique_ptr<Tokenizer> tokenizer_;
  Split train_, val_;
  std::vector<Piece> waiting_;
  size_t waiting_bytes_ = 0;

  void encode_waiting() {
    std::exception_ptr problem;
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < waiting_.size(); i++) {
      Piece& piece = waiting_[i];
      try {
        if (piece.opens) piece.tokens.push_back(uint16_t(tokenizer_->end_of_text()));
        tokenizer_->encode(piece.text.data(), piece.text.size(), piece.tokens);
      } catch (...) {
#pragma omp critical
        problem = std::current_exception();
      }
    }
    if (problem) std::rethrow_exception(problem);
    for (const Piece& piece : waiting_) {
      Split& split = piece.val ? val_ : train_;
      split.shards.add(piece.tokens.data(), piece.tokens.size());
      split.meta.documents += piece.opens;
      split.meta.bytes += piece.text.size();
    }
    waiting_.clear();
    waiting_bytes_ = 0;
  }
};

// Text from a file or, for "-", from standard input; what gzip, xz or zstd compressed is unpacked on the way (libarchive).
class TextInput {
 public:
  explicit TextInput(const std::string& path) : name_(path == "-" ? "standard input" : path), archive_(archive_read_new()) {
    struct stat status;
    if (path != "-" && ::stat(path.c_str(), &status) != 0)
      throw UserError("--input " + path + ": cannot open text: " + std::strerror(errno));
    if (path != "-" && !S_ISREG(status.st_mode))
      throw UserError("--input " + path + ": not a regular file; a text file is wanted");
    if (path != "-") size_ = uint64_t(status.st_size);
    archive_read_support_filter_gzip(archive_.get());
    archive_read_support_filter_xz(archive_.get());
    archive_read_support_filter_zstd(archive_.get());
    archive_read_support_format_raw(archive_.get());
    archive_read_support_format_empty(archive_.get());
    archive_entry* entry;
    const int opened = archive_read_open_filename(archive_.get(), path == "-" ? nullptr : path.c_str(), 1 << 18);
    if (opened != ARCHIVE_OK) fail();
    const int next = archive_read_next_header(archive_.get(), &entry);
    if (next == ARCHIVE_EOF) empty_ = true;
    else if (next != ARCHIVE_OK) fail();
  }

  // The next bytes of text, at most n; 0 at the end.
  size_t read(char* to, size_t n) {
    if (empty_) return 0;
    const la_ssize_t got = archive_read_data(archive_.get(), to, n);
    if (got < 0) fail();
    return size_t(got);
  }
  // Bytes of text in a file, which is read through for it if it is compressed; 0 for standard input.
  static uint64_t size(const std::string& path) {
    if (path == "-") return 0;
    TextInput input(path);
    if (archive_filter_count(input.archive_.get()) == 1) return input.size_;
    uint64_t size = 0;
    std::vector<char> buffer(1 << 18);
    while (const size_t n = input.read(buffer.data(), buffer.size())) size += n;
    return size;
  }

 private:
  struct Free {
    void operator()(archive* a) const { archive_read_free(a); }
  };
  std::string name_;
  std::unique_ptr<archive, Free> archive_;
  uint64_t size_ = 0;
  bool empty_ = false;

  [[noreturn]] void fail() const {
    const char* message = archive_error_string(archive_.get());
    throw UserError(name_ + ": cannot read text: " + (message ? message : "unknown error"));
  }
};

// How a file of text holds documents.
struct TextFormat {
  std::string separator = "<|endoftext|>";  // a line of this alone stands between documents; empty: one document
  std::string field;                        // not empty: every line is a JSON object, and this key holds its text
  double val_fraction = 0.05;               // for validation: the last part of each file; 1: all of it
};

constexpr size_t most_document = 16u << 20;  // bytes of a document that are encoded as a whole

// Where a document that is too long may be cut without changing a token: before a space behind a letter or digit. Without
// any such place, before the last character that begins in it.
inline size_t place_to_cut(const std::string& text) {
  for (size_t i = text.size() - 1; i > 0; i--)
    if (text[i] == ' ' && std::isalnum(static_cast<unsigned char>(text[i - 1]))) return i;
  size_t i = text.size() - 1;
  while (i > 1 && (text[i] & 0xC0) == 0x80) i--;
  return i;
}

// Adds the documents of one file of `size` bytes of text. The last `val_fraction` of them, from the next start of a line
// on, goes to the validation split, so a file that is one long document is split as well; of standard input, whose size
// is not known (0), every so many documents. Memory does not grow with the file. `progress` hears the bytes done.
inline void encode_file(CorpusWriter& corpus, const std::string& path, uint64_t size, const TextFormat& format,
                        const std::function<void(uint64_t)>& progress = {}) {
  TextInput input(path);
  const std::string name = path == "-" ? "standard input" : path;
  const double first_val = size > 0 && format.val_fraction > 0 ? double(size) * (1 - format.val_fraction) : HUGE_VAL;
  std::vector<char> buffer(1 << 16);
  std::string text;  // of the document that is being read
  size_t line = 0;   // where in it the last line begins; npos: before what is left of it
  uint64_t documents = 0, lines = 0, position = 0;  // position: bytes of text read
  bool val = format.val_fraction >= 1, opens = true;
  auto add = [&](std::string part) {
    if (part.empty()) return;
    corpus.document(val, std::move(part), opens);
    opens = false;
  };
  auto end_document = [&] {
    add(std::move(text));
    text.clear();
    line = 0;
    documents += !opens;
    opens = true;
    if (size == 0)
      val = std::floor(double(documents + 1) * format.val_fraction) > std::floor(double(documents) * format.val_fraction);
  };
  auto end_line = [&] {
    lines++;
    if (!format.field.empty()) {
      std::string object = std::move(text);
      text.clear();
      line = 0;
      if (object.find_first_not_of(" \t\r\n") == std::string::npos) return;
      try {
        text = nlohmann::json::parse(object).at(format.field).get<std::string>();
      } catch (const nlohmann::json::exception& e) {
        throw UserError(name + ", line " + std::to_string(lines) + ": no text in \"" + format.field + "\": " + e.what());
      }
      end_document();
      val = val || double(position) >= first_val;
      return;
    }
    size_t end = text.size();
    if (end > 0 && text[end - 1] == '\n') end--;
    if (end > 0 && text[end - 1] == '\r') end--;
    if (line != std::string::npos && !format.separator.empty() && end - line == format.separator.size() &&
        text.compare(line, end - line, format.separator) == 0) {
      text.resize(line);
      end_document();
    }
    line = text.size();
    if (!val && double(position) >= first_val) {
      end_document();
      val = true;
    }
  };
  while (const size_t n = input.read(buffer.data(), buffer.size())) {
    for (size_t i = 0; i < n;) {
      const void* newline = std::memchr(&buffer[i], '\n', n - i);
      const size_t end = newline ? size_t(static_cast<const char*>(newline) - buffer.data()) + 1 : n;
      const bool late = !val && !newline && format.field.empty() && double(position) >= first_val;  // a line without end
      text.append(&buffer[i], end - i);
      position += end - i;
      i = end;
      if (newline) end_line();
      if (text.size() <= most_document && !late) continue;
      if (!format.field.empty())
        throw UserError(name + ", line " + std::to_string(lines + 1) + ": longer than " +
                        std::to_string(most_document >> 20) + " MiB");
      const size_t cut = place_to_cut(text);
      std::string rest = text.substr(cut);
      text.resize(cut);
      line = line == std::string::npos || line < cut ? std::string::npos : line - cut;
      if (late) {
        end_document();
        val = true;
        line = std::string::npos;
      } else {
        add(std::move(text));
      }
      text = std::move(rest);
    }
    if (progress) progress(position);
  }
  if (!text.empty()) end_line();
  end_document();
}

// Tokens to text, with a separator line before every document but one at the very start: the inverse of encode_file.
// Calls write(bytes) with pieces. The ids are below the tokenizer's vocabulary (Shard::check_tokens).
inline void decode_tokens(const Tokenizer& tokenizer, const uint16_t* tokens, size_t n, const std::string& separator,
                          const std::function<void(const std::string&)>& write) {  // (n)
  std::string text;
  bool line_start = true;
  for (size_t i = 0; i < n; i++) {
    if (tokens[i] != tokenizer.end_of_text())
      tokenizer.decode(tokens[i], text);
    else if (i > 0)
      text += (line_start ? "" : "\n") + separator + "\n";
    if (!text.empty()) line_start = text.back() == '\n';
    if (text.size() > 1 << 16) {
      write(text);
      text.clear();
    }
  }
  if (!text.empty()) write(text);
}

// Writes the built-in corpus: about `bytes` of training text and a twentieth of that, from a generator of its own, for
// validation. The entropy in its meta.json is the mean of -log p over these very documents, ends of text included.
inline Meta write_stories(const std::string& directory, uint64_t bytes, uint64_t seed) {
  CorpusWriter corpus(directory, std::make_unique<ByteTokenizer>());
  double entropy[2];
  for (bool val : {false, true}) {
    Storyteller storyteller(mix_bits(2 * seed + uint64_t(val) + 0x51ed270b27a4f9e5ull));
    const uint64_t wanted = val ? std::max<uint64_t>(bytes / 20, 1) : bytes;
    uint64_t written = 0, predicted = 0;
    double nats = 0;
    while (written < wanted) {
      Story story = storyteller.next();
      written += story.text.size();
      predicted += story.text.size() + 1;  // its bytes, and the end of text behind it
      nats -= story.log_probability;
      corpus.document(val, std::move(story.text));
    }
    entropy[val] = nats / double(predicted);
  }
  return corpus.commit(entropy[0], entropy[1]);
}
