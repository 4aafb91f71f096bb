// encode.h: writing text as shards, and reading it back. What data.cpp's commands do, without the command line.
#pragma once
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "data.h"
#include "stories.h"

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

  // Fills in the headers. Nothing has its final name yet.
  void finish() {
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

// A corpus in the making: both splits and meta.json. Text comes in as documents, in pieces of any size.
// Nothing of it is visible before commit(). UserError if the directory cannot be made or written.
class CorpusWriter {
 public:
  CorpusWriter(const std::string& directory, std::unique_ptr<Tokenizer> tokenizer,
               size_t shard_tokens = default_shard_tokens)
      : directory_(directory),
        tokenizer_(std::move(tokenizer)),
        train_{ShardWriter(directory, "train", shard_tokens), {}, true},
        val_{ShardWriter(directory, "val", shard_tokens), {}, true} {
    if (shard_tokens < 1 || shard_tokens > most_shard_tokens)
      throw UserError("--shard-tokens " + std::to_string(shard_tokens) + ": should be 1 to " +
                      std::to_string(most_shard_tokens));
    std::error_code error;
    std::filesystem::create_directories(directory, error);
    if (error) throw UserError(directory + ": cannot make the directory: " + error.message());
  }

  // The next text() of this split opens a document. Documents without text are left out.
  void begin_document(bool val) { (val ? val_ : train_).fresh = true; }

  void text(bool val, const char* text, size_t bytes) {
    if (bytes == 0) return;
    Split& split = val ? val_ : train_;
    buffer_.clear();
    if (split.fresh) {
      buffer_.push_back(uint16_t(tokenizer_->end_of_text()));
      split.meta.documents++;
      split.fresh = false;
    }
    tokenizer_->encode(text, bytes, buffer_);
    split.shards.add(buffer_.data(), buffer_.size());
    split.meta.bytes += bytes;
  }

  // Writes the shards, then meta.json. The entropies are in nats per token, NAN if not known.
  Meta commit(double train_entropy = NAN, double val_entropy = NAN) {
    if (train_.shards.tokens() == 0) throw UserError(directory_ + ": there is no text to write");
    Meta meta;
    meta.tokenizer = tokenizer_->name();
    meta.vocabulary = tokenizer_->vocabulary();
    train_.meta.entropy = train_entropy;
    val_.meta.entropy = val_entropy;
    for (Split* split : {&train_, &val_}) {
      split->meta.tokens = split->shards.tokens();
      split->shards.finish();
    }
    meta.train = train_.meta;
    meta.val = val_.meta;
    NewFile file(directory_ + "/meta.json");
    std::string json = meta_to_json(meta).dump(2) + "\n";
    file.write(json.data(), json.size());
    file.sync();
    train_.shards.commit();  // from here on nothing can run out of space
    val_.shards.commit();
    file.commit();
    return meta;
  }

 private:
  struct Split {
    ShardWriter shards;
    Meta::Split meta;
    bool fresh;  // the next text opens a document
  };
  std::string directory_;
  std::unique_ptr<Tokenizer> tokenizer_;
  Split train_, val_;
  std::vector<uint16_t> buffer_;
};

// Adds one text file. A line equal to `separator` ends a document (none if it is empty), the end of the file does too.
// The last `val_fraction` of the file, from the next start of a line on, goes to the validation split, so a file that
// is one long document is split as well. Memory does not grow with the file. `progress` hears the bytes read so far.
inline void encode_file(CorpusWriter& corpus, const std::string& path, const std::string& separator,
                        double val_fraction, const std::function<void(uint64_t)>& progress = {}) {
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw UserError(path + ": cannot open text: " + std::strerror(errno));
  struct stat status;
  if (::fstat(::fileno(file.get()), &status) != 0 || !S_ISREG(status.st_mode))
    throw UserError(path + ": not a regular file; a text file is wanted");
  const double first_val = double(status.st_size) * (1 - val_fraction);
  corpus.begin_document(false);
  corpus.begin_document(true);
  // Pieces of at most one line; longer lines come in several. A separator line is shorter than a piece.
  std::vector<char> piece(std::max<size_t>(1 << 16, separator.size() + 3));
  bool line_start = true, val = false;
  uint64_t offset = 0;
  for (;;) {
    size_t n = 0;
    int c = 0;
    while (n < piece.size() && (c = ::getc_unlocked(file.get())) != EOF) {
      piece[n++] = char(c);
      if (c == '\n') break;
    }
    if (std::ferror(file.get())) throw UserError(path + ": cannot read text: " + std::strerror(errno));
    if (n == 0) break;
    bool line_end = piece[n - 1] == '\n', whole = line_start && (line_end || c == EOF);
    // One piece past the point is late enough: a file without line ends has no better place.
    if (val_fraction > 0 && !val && double(offset) >= first_val && (line_start || double(offset) > first_val))
      val = true;
    size_t length = n;  // without the line's end, "\n" or "\r\n"
    if (length > 0 && piece[length - 1] == '\n') length--;
    if (length > 0 && piece[length - 1] == '\r') length--;
    if (whole && !separator.empty() && length == separator.size() &&
        std::memcmp(piece.data(), separator.data(), length) == 0)
      corpus.begin_document(val);
    else
      corpus.text(val, piece.data(), n);
    offset += n;
    line_start = line_end;
    if (progress) progress(offset);
  }
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
      corpus.begin_document(val);
      corpus.text(val, story.text.data(), story.text.size());
      written += story.text.size();
      predicted += story.text.size() + 1;  // its bytes, and the end of text behind it
      nats -= story.log_probability;
    }
    entropy[val] = nats / double(predicted);
  }
  return corpus.commit(entropy[0], entropy[1]);
}
