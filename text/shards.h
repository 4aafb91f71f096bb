// Token shards on disk, and the order in which training reads them.
//
// Knows nothing of models. train.cu and eval.cpp read with it, data.cpp writes with it.
#pragma once
#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "run/files.h"
#include "run/random.h"
#include "text/fingerprint.h"

// ---------------------------------------------------------------------------------------------------------------------
// Shards. llm.c's formats: 256 int32 of header (magic, version, number of tokens, zeros), then the tokens, as uint16 where
// the vocabulary has at most 65,536 and as uint32 where it has more. Little-endian, as every machine this runs on.

struct ShardFormat {
  int32_t magic, version;
  size_t width;  // bytes of a token
};
constexpr ShardFormat shard_formats[] = {{20240520, 1, 2}, {20240801, 7, 4}, {20240520, 2, 4}};  // the last is only read
constexpr size_t shard_header_ints = 256, shard_header_bytes = shard_header_ints * sizeof(int32_t);
constexpr int most_vocabulary = 1 << 20;

inline const ShardFormat& shard_format_for(int vocabulary) { return shard_formats[vocabulary > 65536]; }

// One shard, memory-mapped and read-only: opening costs nothing whatever its size, and the page cache is shared.
// The constructor throws UserError for a file that is missing, empty, of another format or of the wrong length.
class Shard {
 public:
  explicit Shard(const std::string& path) : path_(path) {
    int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw UserError(path + ": cannot open shard: " + std::strerror(errno));
    struct stat status;
    bool known = ::fstat(file, &status) == 0, regular = known && S_ISREG(status.st_mode);
    bytes_ = regular ? size_t(status.st_size) : 0;
    if (bytes_ > 0) {
      void* map = ::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file, 0);
      map_ = map == MAP_FAILED ? nullptr : map;
    }
    ::close(file);  // the mapping stays
    if (!regular) throw UserError(path + ": not a regular file; a shard (.bin) is wanted");
    if (bytes_ == 0) throw UserError(path + ": the shard is empty (0 bytes)");
    if (!map_) throw UserError(path + ": cannot map shard into memory: " + std::strerror(errno));
    try {
      check_header();
    } catch (...) {  // a throwing constructor runs no destructor
      unmap();
      throw;
    }
  }

  Shard(Shard&& other) noexcept { *this = std::move(other); }
  Shard& operator=(Shard&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(map_, other.map_);
    std::swap(bytes_, other.bytes_);
    std::swap(width_, other.width_);
    return *this;
  }
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;
  ~Shard() { unmap(); }

  const std::string& path() const { return path_; }
  size_t size() const { return (bytes_ - shard_header_bytes) / width_; }  // tokens
  uint32_t operator[](size_t i) const { return width_ == 2 ? as<uint16_t>()[i] : as<uint32_t>()[i]; }
  // Copies tokens [begin, begin + n).
  void read(size_t begin, size_t n, int* to) const {  // (n)
    if (width_ == 2) std::copy_n(as<uint16_t>() + begin, n, to);
    else std::copy_n(as<uint32_t>() + begin, n, to);
  }

  // Of the whole file. Reads it.
  std::string fingerprint() const { return Fingerprint().add(map_, bytes_).text(); }

  // Throws UserError if any token is not below `vocabulary`, naming the first such. Reads the whole shard.
  void check_tokens(int vocabulary) const {
    if (width_ == 2) check<uint16_t>(vocabulary);
    else check<uint32_t>(vocabulary);
  }

 private:
  std::string path_;
  void* map_ = nullptr;
  size_t bytes_ = 0, width_ = 2;

  template <class Token>
  const Token* as() const {  // (size())
    return reinterpret_cast<const Token*>(static_cast<const char*>(map_) + shard_header_bytes);
  }

  template <class Token>
  void check(int vocabulary) const {
    const Token* token = as<Token>();
    const size_t n = size(), block = 1 << 14;
    for (size_t start = 0; start < n; start += block) {
      // The maximum of a block first: a loop without an exit, which the compiler turns into vector instructions.
      const size_t end = std::min(n, start + block);
      Token largest = 0;
      for (size_t i = start; i < end; i++) largest = std::max(largest, token[i]);
      if (largest < unsigned(vocabulary)) continue;
      for (size_t i = start; i < end; i++)
        if (token[i] >= unsigned(vocabulary))
          throw UserError(path_ + ": token " + std::to_string(i) + " is " + std::to_string(token[i]) +
                          ", not below the vocabulary of " + std::to_string(vocabulary));
    }
  }

  void check_header() {
    if (bytes_ < shard_header_bytes)
      throw UserError(path_ + ": truncated shard: " + std::to_string(bytes_) + " bytes, the header alone has " +
                      std::to_string(shard_header_bytes));
    int32_t header[3];  // the rest is reserved
    std::memcpy(header, map_, sizeof header);
    width_ = 0;
    std::string versions;
    for (const ShardFormat& format : shard_formats) {
      if (header[0] != format.magic) continue;
      if (header[1] == format.version) width_ = format.width;
      versions += (versions.empty() ? "" : " or ") + std::to_string(format.version);
    }
    if (versions.empty())
      throw UserError(path_ + ": not a token shard: magic " + std::to_string(header[0]) + ", should be " +
                      std::to_string(shard_formats[0].magic) + " or " + std::to_string(shard_formats[1].magic));
    if (width_ == 0)
      throw UserError(path_ + ": shard version " + std::to_string(header[1]) + ", should be " + versions);
    if (header[2] <= 0)
      throw UserError(path_ + ": the shard's header says " + std::to_string(header[2]) +
                      " tokens, should be 1 or more");
    size_t wanted = shard_header_bytes + size_t(header[2]) * width_;
    if (bytes_ != wanted)
      throw UserError(path_ + (bytes_ < wanted ? ": truncated shard: " : ": the shard is too long: ") +
                      std::to_string(bytes_) + " bytes, should be " + std::to_string(wanted) + " for the " +
                      std::to_string(header[2]) + " tokens of " + std::to_string(width_) +
                      " bytes in its header (version " + std::to_string(header[1]) + ")");
  }

  void unmap() {
    if (map_) ::munmap(map_, bytes_);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Order. Training reads windows in a shuffled order, every one once per epoch, as a function of (seed, index) alone:
// to resume, a run needs to know its step and nothing else, and the order takes no memory however large the data.

// A permutation of 0..n-1 chosen by `key`: where element i goes. Constant memory and constant time on average.
// A Feistel network permutes the smallest power of four that holds n, whatever its round function is; what lands
// outside of 0..n-1 is sent through again (cycle walking, Black and Rogaway 2002), less than four times on average.
inline uint64_t permute(uint64_t i, uint64_t n, uint64_t key) {
  int half = 1;
  while (half < 32 && (uint64_t(1) << (2 * half)) < n) half++;
  const uint64_t mask = (uint64_t(1) << half) - 1;
  do {
    uint64_t left = i >> half, right = i & mask;
    for (uint64_t round = 1; round <= 8; round++) {
      uint64_t next = left ^ (mix_bits(key + round * kGoldenRatio + mix_bits(right + 1)) & mask);
      left = right;
      right = next;
    }
    i = left << half | right;
  } while (i >= n);
  return i;
}

// The shards that match a glob pattern, in alphabetical order, cut into windows. A window of T positions is T + 1
// tokens: inputs are the first T, targets the last T. Windows start every T tokens and never cross shards; what is
// left at the end of a shard, fewer than T + 1 tokens, is in no window.
class Dataset {
 public:
  // Opens all shards and checks their headers. UserError if nothing matches, or for a broken shard.
  explicit Dataset(const std::string& pattern) : pattern_(pattern) {
    for (const std::string& path : paths_of(pattern)) {
      shards_.emplace_back(path);
      tokens_ += shards_.back().size();
    }
  }

  const std::string& pattern() const { return pattern_; }
  const std::vector<Shard>& shards() const { return shards_; }
  size_t tokens() const { return tokens_; }

  // Refuses token ids that a model of this vocabulary cannot look up. Reads all the data: once, before training.
  void check_tokens(int vocabulary) const {
    for (const Shard& shard : shards_) shard.check_tokens(vocabulary);
  }

  // Of all shards in their order: the same one, the same windows. Reads all the data.
  std::string fingerprint() const {
    Fingerprint all;
    for (const Shard& shard : shards_) all.add(shard.fingerprint());
    return all.text();
  }

  // Number of windows of T positions. UserError if a shard is too short for even one.
  size_t windows(int T) const {
    if (T < 1) throw UserError("context " + std::to_string(T) + ": should be 1 or more");
    size_t count = 0;
    for (const Shard& shard : shards_) {
      if (shard.size() < size_t(T) + 1)
        throw UserError(shard.path() + ": context longer than the shard: a context of " + std::to_string(T) +
                        " needs " + std::to_string(size_t(T) + 1) + " tokens, the shard has " +
                        std::to_string(shard.size()));
      count += (shard.size() - 1) / size_t(T);
    }
    return count;
  }

  // Window i < windows(T), in the order of the files: for validation.
  void window(size_t i, int T, int* inputs, int* targets) const {  // (T), (T)
    for (const Shard& shard : shards_) {
      size_t here = (shard.size() - 1) / size_t(T);
      if (i >= here) {
        i -= here;
        continue;
      }
      shard.read(i * size_t(T), size_t(T), inputs);
      shard.read(i * size_t(T) + 1, size_t(T), targets);
      return;
    }
    throw std::out_of_range("Dataset::window: no such window");
  }

  // Micro-batch `index`, counted from 0 over the whole run. Batches take B windows each from an endless stream, in
  // which every epoch is another permutation of all windows; a batch may straddle two. Depends on nothing else.
  void batch(uint64_t seed, uint64_t index, int B, int T, int* inputs, int* targets) const {  // (B, T), (B, T)
    const uint64_t n = windows(T);
    for (int b = 0; b < B; b++) {
      uint64_t position = index * uint64_t(B) + uint64_t(b);
      uint64_t key = mix_bits(mix_bits(seed + kGoldenRatio) + position / n);  // of this epoch
      size_t offset = size_t(b) * size_t(T);
      window(size_t(permute(position % n, n, key)), T, inputs + offset, targets + offset);
    }
  }

 private:
  // A file or directory of just this name is meant, whatever signs its name has; otherwise *, ? and [] stand for others.
  static std::vector<std::string> paths_of(const std::string& pattern) {
    if (::access(pattern.c_str(), F_OK) == 0 || pattern.find_first_of("*?[") == std::string::npos) return {pattern};
    const size_t name = pattern.rfind('/') == std::string::npos ? 0 : pattern.rfind('/');
    std::string quoted;
    if (::access(pattern.substr(0, name).c_str(), F_OK) == 0)
      for (size_t i = 0; i < name; i++)
        quoted += (std::strchr("*?[\\", pattern[i]) ? "\\" : "") + std::string(1, pattern[i]);
    else
      quoted = pattern.substr(0, name);
    glob_t found;
    std::vector<std::string> paths;
    if (::glob((quoted + pattern.substr(name)).c_str(), 0, nullptr, &found) == 0)
      paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
    ::globfree(&found);
    if (paths.empty()) throw UserError(pattern + ": no shard matches; write some with `data stories` or `data encode`");
    return paths;
  }

  std::string pattern_;
  std::vector<Shard> shards_;
  size_t tokens_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// meta.json beside the shards: what their tokens are.

struct Meta {
  struct Split {
    uint64_t documents = 0, bytes = 0, tokens = 0;  // bytes of text, without separators
    double entropy = NAN;  // lowest reachable loss in nats per token, NAN where it is not known
  };
  std::string tokenizer;  // empty: unknown
  std::string tokenizer_fingerprint;  // of what it does; empty in older files
  int vocabulary = 0;     // 0: unknown
  Split train, val;
  std::map<std::string, std::string> shards;  // the fingerprint of each file's content; none in older files
};

inline nlohmann::ordered_json meta_to_json(const Meta& meta) {
  auto split = [](const Meta::Split& s) {
    nlohmann::ordered_json json = {{"documents", s.documents}, {"bytes", s.bytes}, {"tokens", s.tokens}};
    if (!std::isnan(s.entropy)) json["entropy_nats_per_token"] = s.entropy;
    return json;
  };
  nlohmann::ordered_json json = {{"tokenizer", meta.tokenizer}};
  if (!meta.tokenizer_fingerprint.empty()) json["tokenizer_fingerprint"] = meta.tokenizer_fingerprint;
  json.update({{"vocabulary", meta.vocabulary}, {"train", split(meta.train)}, {"val", split(meta.val)}});
  if (!meta.shards.empty()) json["shards"] = meta.shards;
  return json;
}

// The directory of a shard or of a pattern of shards.
inline std::string directory_of(const std::string& pattern) {
  const size_t slash = pattern.rfind('/');
  return slash == std::string::npos ? "." : pattern.substr(0, std::max<size_t>(slash, 1));
}

// Reads meta.json from the directory of a shard or of a pattern of shards. Shards from elsewhere have none: then
// everything is unknown. UserError if the file is there but is not what data.cpp writes.
inline Meta read_meta(const std::string& pattern) {
  const std::string path = directory_of(pattern) + "/meta.json";
  Meta meta;
  if (::access(path.c_str(), F_OK) != 0) return meta;
  const nlohmann::json json = read_json_file(path);
  try {
    auto read = [&](const nlohmann::json& from, Meta::Split& split) {
      using Count = std::pair<const char*, uint64_t*>;
      for (auto [key, value] :
           {Count("documents", &split.documents), Count("bytes", &split.bytes), Count("tokens", &split.tokens)}) {
        const nlohmann::json number = from.value(key, nlohmann::json(0u));
        if (!number.is_number_unsigned())
          throw UserError(path + ": " + key + " is " + number.dump() + ", should be a whole number");
        *value = number.get<uint64_t>();
      }
      split.entropy = from.value("entropy_nats_per_token", split.entropy);
    };
    meta.tokenizer = json.at("tokenizer").get<std::string>();
    meta.tokenizer_fingerprint = json.value("tokenizer_fingerprint", "");
    if (json.contains("shards")) meta.shards = json["shards"].get<std::map<std::string, std::string>>();
    if (!json.at("vocabulary").is_number_unsigned() || json["vocabulary"] > most_vocabulary)
      throw UserError(path + ": vocabulary is " + json["vocabulary"].dump() + ", should be 0 to " +
                      std::to_string(most_vocabulary));
    meta.vocabulary = json["vocabulary"].get<int>();
    if (json.contains("train")) read(json["train"], meta.train);
    if (json.contains("val")) read(json["val"], meta.val);
  } catch (const nlohmann::json::exception& e) {
    throw UserError(path + ": not a valid meta.json: " + e.what());
  }
  return meta;
}
