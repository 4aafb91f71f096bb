// Writing text as shards, and reading it back. What data.cpp's commands do, without the command line.
#pragma once
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

#include "text/input.h"
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
    open();
    if (std::fwrite(data, 1, bytes, file_) != bytes) fail("cannot write");
  }
  void write_at(long offset, const void* data, size_t bytes) {
    open();
    if (std::fseek(file_, offset, SEEK_SET) != 0) fail("cannot write");
    write(data, bytes);
    if (std::fseek(file_, 0, SEEK_END) != 0) fail("cannot write");
  }
  // Reads back from `offset`; the number of bytes read, less than asked for only at the end.
  size_t read_at(long offset, void* data, size_t bytes) {
    open();
    if (std::fseek(file_, offset, SEEK_SET) != 0) fail("cannot read back");
    size_t got = std::fread(data, 1, bytes, file_);
    if (std::ferror(file_)) fail("cannot read back");
    return got;
  }
  // Everything on the disk, before the name changes: a crash leaves the old file or the new one. The file is closed; what
  // writes or reads after this opens it again.
  void sync() {
    open();
    std::FILE* file = std::exchange(file_, nullptr);
    const bool written = std::fflush(file) == 0 && ::fsync(::fileno(file)) == 0;
    if (std::fclose(file) != 0 || !written) fail("cannot write");
  }
  void commit() {
    if (file_) sync();
    if (std::rename((path_ + ".part").c_str(), path_.c_str()) != 0) fail("cannot write");
    done_ = true;
  }

 private:
  std::string path_;
  std::FILE* file_;
  bool done_ = false;

  void open() {
    if (!file_ && (!(file_ = std::fopen((path_ + ".part").c_str(), "r+b")) || std::fseek(file_, 0, SEEK_END) != 0))
      fail("cannot write");
  }
  [[noreturn]] void fail(const char* what) const {
    throw UserError(path_ + ": " + what + ": " + std::strerror(errno));
  }
};

// One split ("train" or "val") as a row of shards DIR/NAME_000.bin, NAME_001.bin, ... of about `shard_tokens` each. One
// file is open at a time.
class ShardWriter {
 public:
  ShardWriter(std::string directory, std::string name, size_t shard_tokens, int vocabulary)
      : directory_(std::move(directory)),
        name_(std::move(name)),
        shard_tokens_(shard_tokens),
        format_(shard_format_for(vocabulary)) {}

  uint64_t tokens() const { return tokens_; }

  void add(const int* tokens, size_t n) {  // (n)
    tokens_ += n;
    while (n > 0) {
      if (files_.empty() || counts_.back() == shard_tokens_) open();
      const size_t some = std::min(n, shard_tokens_ - counts_.back());
      if (format_.width == 2) narrow_.assign(tokens, tokens + some);
      files_.back().write(format_.width == 2 ? static_cast<const void*>(narrow_.data()) : tokens, some * format_.width);
      counts_.back() += some;
      tokens += some;
      n -= some;
    }
  }

  // Ends the last shard, and says the fingerprint of each file. Nothing has its final name yet.
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
    if (!files_.empty()) end();
    for (size_t i = 0; i < files_.size(); i++)
      fingerprints[std::filesystem::path(path(i)).filename()] = Shard(path(i) + ".part").fingerprint();
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
  ShardFormat format_;
  uint64_t tokens_ = 0;
  std::vector<NewFile> files_;
  std::vector<size_t> counts_;  // tokens in each file
  std::vector<uint16_t> narrow_;

  std::string path(size_t i) const {
    std::string number = std::to_string(i);
    return directory_ + "/" + name_ + "_" + std::string(number.size() < 3 ? 3 - number.size() : 0, '0') + number +
           ".bin";
  }

  void open() {
    if (!files_.empty()) end();
    const int32_t zeros[shard_header_ints] = {};
    files_.emplace_back(path(files_.size()));
    counts_.push_back(0);
    files_.back().write(zeros, sizeof zeros);
  }

  // Fills in the header of the last shard and closes it.
  void end() {
    const int32_t header[3] = {format_.magic, format_.version, int32_t(counts_.back())};
    files_.back().write_at(0, header, sizeof header);
    files_.back().sync();
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
        train_{ShardWriter(directory, "train", shard_tokens, tokenizer_->vocabulary()), {}},
        val_{ShardWriter(directory, "val", shard_tokens, tokenizer_->vocabulary()), {}} {
    if (shard_tokens < 1 || shard_tokens > most_shard_tokens)
      throw UserError("--shard-tokens " + std::to_string(shard_tokens) + ": should be 1 to " +
                      std::to_string(most_shard_tokens));
    std::error_code error;
    std::filesystem::create_directories(directory, error);
    if (error) throw UserError(directory + ": cannot make the directory: " + error.message());
    refuse_others();
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
    std::vector<int> tokens;
  };
  std::string directory_;
  std::unique_ptr<Tokenizer> tokenizer_;
  Split train_, val_;
  std::vector<Piece> waiting_;
  size_t waiting_bytes_ = 0;

  // A meta.json describes all shards of its directory, so there must be none from elsewhere.
  void refuse_others() const {
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(directory_, error)) {
      const std::string name = entry.path().filename();
      if (entry.path().extension() != ".bin" || name.rfind("train_", 0) == 0 || name.rfind("val_", 0) == 0) continue;
      try {
        Shard shard(entry.path());
      } catch (const UserError&) {
        continue;
      }
      throw UserError(directory_ + ": holds a shard from elsewhere, " + name + "; name another directory");
    }
  }

  void encode_waiting() {
    std::exception_ptr problem;
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < waiting_.size(); i++) {
      Piece& piece = waiting_[i];
      try {
        if (piece.opens) piece.tokens.push_back(tokenizer_->end_of_text());
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

// How a file of text holds documents.
struct TextFormat {
  std::string separator = "<|endoftext|>";  // a line of this alone stands between documents; empty: one document
  std::string field;                        // not empty: every line is a JSON object, and this key holds its text
  double val_fraction = 0.05;               // for validation: the last part of each file; 1: all of it
  bool skip_bad = false;                    // lines without such an object are left out and counted
};

// Lines of JSON that were left out, and why the first of them was.
struct BadLines {
  uint64_t count = 0;
  std::string first;
};

constexpr size_t most_document = 16u << 20;  // bytes of a document that are encoded as a whole
constexpr size_t most_line = 1u << 30;       // bytes of a line of JSON

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
// is not known (0), every so many documents. A file within an archive ends a document. Memory does not grow with the
// file, but for a line of JSON. `progress` hears the bytes done.
inline BadLines encode_file(CorpusWriter& corpus, const std::string& path, uint64_t size, const TextFormat& format,
                            const std::function<void(uint64_t)>& progress = {}) {
  TextInput input(path);
  const double first_val = size > 0 && format.val_fraction > 0 ? double(size) * (1 - format.val_fraction) : HUGE_VAL;
  std::vector<char> buffer(1 << 16);
  std::string text;  // of the document that is being read
  size_t line = 0;   // where in it the last line begins; npos: before what is left of it
  uint64_t documents = 0, lines = 0, position = 0;  // position: bytes of text read
  bool val = format.val_fraction >= 1, opens = true, too_long = false;
  BadLines bad;
  auto add = [&](std::string part) {
    if (part.empty()) return;
    corpus.document(val, std::move(part), opens);
    opens = false;
  };
  auto add_up_to = [&](size_t cut) {
    std::string rest = text.substr(cut);
    text.resize(cut);
    line = line == std::string::npos || line < cut ? std::string::npos : line - cut;
    add(std::move(text));
    text = std::move(rest);
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
  const std::string longest = "longer than " + std::to_string(most_line >> 30) + " GiB";
  auto leave_out = [&](const std::string& why) {
    const std::string what = input.name() + ", line " + std::to_string(lines) + ": " + why;
    if (!format.skip_bad) throw UserError(what + "; --skip-bad leaves such lines out");
    if (bad.count++ == 0) bad.first = what;
    text.clear();
  };
  auto end_json = [&] {  // a line that is an object
    const std::string object = std::move(text);
    text.clear();
    line = 0;
    if (too_long) return leave_out(longest);
    if (object.find_first_not_of(" \t\r\n") == std::string::npos) return;
    try {
      text = nlohmann::json::parse(object).at(format.field).get<std::string>();
    } catch (const nlohmann::json::exception& e) {
      return leave_out("no text in \"" + format.field + "\": " + std::string(e.what()).substr(0, 150));
    }
    size_t begin = 0;
    while (text.size() - begin > most_document) {
      const std::string part = text.substr(begin, most_document + 1);
      const size_t cut = place_to_cut(part);
      add(part.substr(0, cut));
      begin += cut;
    }
    text.erase(0, begin);
    end_document();
  };
  auto end_line = [&] {
    lines++;
    if (!format.field.empty()) {
      end_json();
      too_long = false;
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
  while (input.next()) {
    while (const size_t n = input.read(buffer.data(), buffer.size())) {
      for (size_t i = 0; i < n;) {
        const void* newline = std::memchr(&buffer[i], '\n', n - i);
        const size_t end = newline ? size_t(static_cast<const char*>(newline) - buffer.data()) + 1 : n;
        const bool late = !val && !newline && double(position) >= first_val;  // a line without end
        if (!too_long) text.append(&buffer[i], end - i);
        position += end - i;
        i = end;
        if (newline) end_line();
        if (!format.field.empty()) {
          too_long = too_long || text.size() > most_line;
          if (too_long && !format.skip_bad) lines++, leave_out(longest);
          if (too_long) text.clear();
        } else if (late) {
          std::string rest = text.substr(place_to_cut(text));
          text.resize(text.size() - rest.size());
          end_document();
          val = true;
          line = std::string::npos;
          text = std::move(rest);
        } else if (text.size() > most_document) {
          add_up_to(place_to_cut(text));
        }
      }
      if (progress) progress(position);
    }
    if (!text.empty() || too_long) end_line();
    end_document();
    lines = 0;
  }
  return bad;
}

// Tokens [begin, end) of a shard to text, with a separator line before every document but one at the very start: the
// inverse of encode_file. Calls write(bytes) with pieces. The ids are below the tokenizer's vocabulary
// (Shard::check_tokens).
inline void decode_tokens(const Tokenizer& tokenizer, const Shard& shard, size_t begin, size_t end,
                          const std::string& separator, const std::function<void(const std::string&)>& write) {
  std::string text;
  bool line_start = true;
  for (size_t i = begin; i < end; i++) {
    if (int(shard[i]) != tokenizer.end_of_text())
      tokenizer.decode(int(shard[i]), text);
    else if (i > begin)
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
