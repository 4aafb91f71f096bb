#pragma once
// Checkpoints: a directory with
//     model.safetensors      fp32 master weights, under the names of model.h's table
//     optimizer.safetensors  AdamW's m.NAME and v.NAME, fp32
//     state.json             step, settings, position in the data
//
// A checkpoint is written beside the old one, synced, and takes its place by renaming: whenever the machine stops, one
// of the two is whole. The format of the tensors is safetensors (https://github.com/huggingface/safetensors): 8 bytes
// of header length, a JSON header with type, shape and byte range of each tensor, then the bytes.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <set>

#include <nlohmann/json.hpp>

#include "run/files.h"
#include "model.h"

struct NamedTensor {
  std::string name;
  std::vector<size_t> shape;
  const float* data;
  size_t count;
};

// What a safetensors file begins with; the tensors' numbers follow in the same order.
inline std::string safetensors_header(const std::vector<NamedTensor>& tensors,
                                      const nlohmann::ordered_json& metadata = {}) {
  nlohmann::ordered_json header;
  if (!metadata.empty()) header["__metadata__"] = metadata;
  size_t offset = 0;
  for (const NamedTensor& t : tensors) {
    const size_t end = offset + t.count * sizeof(float);
    header[t.name] = {{"dtype", "F32"}, {"shape", t.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the tensors start at a multiple of 8
  const uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + text;
}

inline void write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                              const nlohmann::ordered_json& metadata = {}) {
  const std::string header = safetensors_header(tensors, metadata);
  std::vector<std::pair<const void*, size_t>> pieces = {{header.data(), header.size()}};
  for (const NamedTensor& t : tensors) pieces.push_back({t.data, t.count * sizeof(float)});
  write_file(path, pieces);
}

// A safetensors file, mapped into memory. Everything that the header claims is checked before it is believed:
// UserError.
class SafeTensors {
 public:
  struct Tensor {
    std::string dtype;
    std::vector<size_t> shape;
    const char* data = nullptr;
    size_t count = 0;
  };
  std::map<std::string, Tensor> tensors;

  explicit SafeTensors(const std::string& path) : path_(path) {
    const int file = ::open(path.c_str(), O_RDONLY);
    if (file < 0) throw UserError(path + ": cannot read: " + std::strerror(errno));
    struct stat info;
    bytes_ = ::fstat(file, &info) == 0 && S_ISREG(info.st_mode) ? size_t(info.st_size) : 0;
    map_ = bytes_ ? ::mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    ::close(file);
    if (map_ == MAP_FAILED) {
      map_ = nullptr;
      fail("is empty or not a file");
    }
    try {
      read_header();
    } catch (...) {
      ::munmap(map_, bytes_);
      throw;
    }
  }
  SafeTensors(const SafeTensors&) = delete;
  SafeTensors& operator=(const SafeTensors&) = delete;
  ~SafeTensors() { ::munmap(map_, bytes_); }

  // The fp32 tensor of this name and shape.
  const float* get(const std::string& name, const std::vector<size_t>& shape) const {
    const auto found = tensors.find(name);
    if (found == tensors.end()) fail("has no tensor " + name);
    const Tensor& t = found->second;
    if (t.dtype != "F32") fail("tensor " + name + " is " + t.dtype + ", expected F32");
    if (t.shape != shape) fail("tensor " + name + " has shape " + text(t.shape) + ", expected " + text(shape));
    return reinterpret_cast<const float*>(t.data);
  }

 private:
  std::string path_;
  void* map_ = nullptr;
  size_t bytes_ = 0;

  [[noreturn]] void fail(const std::string& what) const { throw UserError(path_ + ": " + what); }

  static std::string text(const std::vector<size_t>& shape) {
    std::string s = "(";
    for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + ")";
  }

  void read_header() {
    const char* file = static_cast<const char*>(map_);
    uint64_t length = 0;
    if (bytes_ < 8) fail("truncated: " + std::to_string(bytes_) + " bytes");
    std::memcpy(&length, file, 8);
    if (length > bytes_ - 8)
      fail("truncated: the header claims " + std::to_string(length) + " bytes, the file has " + std::to_string(bytes_));
    const char* data = file + 8 + length;
    const size_t data_bytes = bytes_ - 8 - length;
    std::vector<std::set<std::string>> keys;  // of the objects that are open
    nlohmann::json header;
    auto whole = [&](const nlohmann::json& number) {
      if (!number.is_number_unsigned()) fail("the header is not valid: " + number.dump() + " is not a whole number");
      return number.get<size_t>();
    };
    try {
      header = nlohmann::json::parse(file + 8, data,
                                     [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
                                       using Event = nlohmann::json::parse_event_t;
                                       if (depth > 3) fail("header is nested too deeply");
                                       if (event == Event::object_start) keys.emplace_back();
                                       if (event == Event::object_end) keys.pop_back();
                                       if (event == Event::key && !keys.back().insert(value.get<std::string>()).second)
                                         fail(value.get<std::string>() + " stands in the header twice");
                                       return true;
                                     });
      std::set<std::pair<size_t, size_t>> ranges;
      for (const auto& [name, entry] : header.items()) {
        if (name == "__metadata__") continue;
        Tensor t;
        t.dtype = entry.at("dtype").get<std::string>();
        static const std::map<std::string, size_t> sizes = {{"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2},
                                                            {"I64", 8}, {"I32", 4}, {"I16", 2}, {"I8", 1},
                                                            {"U8", 1},  {"BOOL", 1}};
        const auto size = sizes.find(t.dtype);
        if (size == sizes.end()) fail("tensor " + name + " has the unknown type " + t.dtype);
        const auto &offsets = entry.at("data_offsets"), &shape = entry.at("shape");
        if (!shape.is_array() || !offsets.is_array() || offsets.size() != 2)
          fail("tensor " + name + ": its shape or its byte range is not one");
        const size_t begin = whole(offsets[0]), end = whole(offsets[1]);
        if (begin > end || end > data_bytes) fail("truncated: tensor " + name + " ends behind the end of the file");
        t.count = 1;
        for (const auto& extent : shape) {
          const size_t n = whole(extent);
          if (n && t.count > data_bytes / n)
            fail("tensor " + name + " is larger than the file");
          t.count *= n;
          t.shape.push_back(n);
        }
        if (end - begin != t.count * size->second) fail("tensor " + name + ": its byte range does not fit its shape");
        if (!ranges.insert({begin, end}).second && begin != end) fail("tensor " + name + " overlaps another");
        t.data = data + begin;
        tensors[name] = t;
      }
      size_t last = 0;
      for (const auto& [begin, end] : ranges) {
        if (begin < last) fail("two tensors overlap");
        if (begin > last) fail("bytes " + std::to_string(last) + " to " + std::to_string(begin) + " are of no tensor");
        last = end;
      }
      if (last < data_bytes) fail(std::to_string(data_bytes - last) + " bytes follow the last tensor");
    } catch (const nlohmann::json::exception& e) {
      fail(std::string("the header is not valid: ") + e.what());
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------

// The directory of a run: NAME stands for runs/NAME; what is absolute or begins with a dot is a path itself. UserError
// for a name that leads out of runs/.
inline std::string run_directory(const std::string& name) {
  const std::filesystem::path path(name);
  if (path.is_absolute() || name[0] == '.') return name;
  for (const auto& part : path)
    if (part == "..") throw UserError("--run " + name + ": leads out of runs/; give a path that begins with / or .");
  return "runs/" + name;
}

// The newest whole checkpoint in a run's directory: checkpoint, or checkpoint.old if the machine stopped between the two
// renames of save_checkpoint; empty if there is none.
inline std::string newest_checkpoint(const std::string& directory) {
  for (const char* name : {"/checkpoint", "/checkpoint.old"})
    if (std::filesystem::exists(directory + name + "/state.json")) return directory + name;
  return "";
}

// The checkpoint's directory of `run`: the name of a run, or the path of a run or of a checkpoint; empty if there is
// none.
inline std::string locate_checkpoint(const std::string& run) {
  for (const std::string& directory : {run_directory(run), run}) {
    if (std::filesystem::exists(directory + "/state.json")) return directory;
    if (const std::string found = newest_checkpoint(directory); !found.empty()) return found;
  }
  return "";
}

inline void sync_directory(const std::string& path) {
  const int directory = ::open(path.c_str(), O_RDONLY | O_DIRECTORY);
  if (directory >= 0) {
    ::fsync(directory);
    ::close(directory);
  }
}

inline std::vector<NamedTensor> named(const ParameterTable& table, const float* flat, const std::string& prefix) {
  std::vector<NamedTensor> tensors;
  for (const ParameterRow& row : table.rows)
    tensors.push_back({prefix + row.name, row.shape, flat + row.offset, row.count});
  return tensors;
}

// Writes elements [at, at + n) of an array that is spread over the ranks; `shard` is what this one has of it. Only rank
// 0 has a file; what is not its own comes to it a piece at a time, so that no host needs memory for the whole.
template <class Backend, class Real>
void write_spread(Ranks& ranks, OutputFile* file, Model<Backend, Real>& model, const float* shard, size_t at,
                  size_t n) {
  std::vector<float> piece;
  for (size_t end = at + n, count; at < end; at += count) {
    const int owner = int(at / model.shard);
    const size_t first = owner * model.shard;
    count = std::min({end - at, first + model.shard - at, size_t(1) << 24});
    piece.resize(count);
    if (owner == ranks.rank) model.be.download(piece.data(), shard + (at - first), count * sizeof(float));
    if (owner == ranks.rank && !file) ranks.send(0, piece.data(), count * sizeof(float));
    if (owner != ranks.rank && file) ranks.receive(owner, piece.data(), count * sizeof(float));
    if (file) file->write(piece.data(), count * sizeof(float));
  }
}

// Tensors of the table, in its order, from arrays that are spread over the ranks: (prefix of names, this rank's shard).
template <class Backend, class Real>
void write_spread_safetensors(Ranks& ranks, const std::string& path, Model<Backend, Real>& model,
                              const std::vector<std::pair<std::string, const float*>>& arrays) {
  std::unique_ptr<OutputFile> file;
  if (ranks.root()) {
    std::vector<NamedTensor> tensors;
    for (const auto& [prefix, shard] : arrays)
      for (const NamedTensor& t : named(model.table, nullptr, prefix)) tensors.push_back(t);
    const std::string header = safetensors_header(tensors);
    file = std::make_unique<OutputFile>(path);
    file->write(header.data(), header.size());
  }
  for (const auto& [prefix, shard] : arrays)
    for (const ParameterRow& row : model.table.rows)
      write_spread(ranks, file.get(), model, shard, row.offset, row.count);
  if (file) file->finish();
}

// Writes run_directory/checkpoint: weights, optimizer state and `state`. When anything fails, the old one stays. All
// ranks call it, and rank 0 writes.
template <class Backend, class Real>
void save_checkpoint(Ranks& ranks, Model<Backend, Real>& model, const std::string& run_directory,
                     const nlohmann::ordered_json& state) {
  namespace fs = std::filesystem;
  const std::string now = run_directory + "/checkpoint", next = now + ".new", old = now + ".old";
  auto write_tensors = [&] {
    write_spread_safetensors(ranks, next + "/model.safetensors", model, {{"", model.master}});
    write_spread_safetensors(ranks, next + "/optimizer.safetensors", model, {{"m.", model.m}, {"v.", model.v}});
  };
  if (!ranks.root()) return write_tensors();
  std::error_code ignored;
  fs::remove_all(next, ignored);
  try {
    fs::create_directories(next);
    write_tensors();
    write_text_file(next + "/state.json", state.dump(2) + "\n");
    sync_directory(next);
    if (fs::exists(now)) {
      fs::remove_all(old);
      fs::rename(now, old);
    }
    fs::rename(next, now);
    sync_directory(run_directory);
  } catch (const fs::filesystem_error& e) {
    fs::remove_all(next, ignored);
    throw UserError(now + ": cannot write: " + e.code().message());
  } catch (...) {
    fs::remove_all(next, ignored);
    throw;
  }
  fs::remove_all(old, ignored);
}

// Reads the tensors of the table, under prefix + name: what the rank's `shard` has of them.
template <class Backend, class Real>
void read_tensors(Model<Backend, Real>& model, float* shard, const SafeTensors& file, const std::string& prefix) {
  for (const ParameterRow& row : model.table.rows) {
    const float* tensor = file.get(prefix + row.name, row.shape);
    model.write_shard(shard, row.offset, row.count, [&](size_t first, size_t) { return tensor + first; });
  }
}

// Refuses weights that are not those of the configuration, before memory of the size that it claims is taken, and such
// as are not finite. Reads all of them.
inline void check_weights(Config c, const std::string& checkpoint) {
  resolve(c);
  const std::string path = checkpoint + "/model.safetensors";
  const SafeTensors file(path);
  for (const ParameterRow& row : parameter_table(c).rows) {
    const float* weights = file.get(row.name, row.shape);
    float zero = 0;  // 0 times infinity, and times NaN, is NaN
#pragma omp simd reduction(+ : zero)
    for (size_t i = 0; i < row.count; ++i) zero += 0 * weights[i];
    if (zero != 0)
      throw UserError(path + ": " + row.name + " has numbers that are not finite: the model diverged while it trained");
  }
}

template <class Backend, class Real>
void load_weights(Model<Backend, Real>& model, const std::string& checkpoint) {
  read_tensors(model, model.master, SafeTensors(checkpoint + "/model.safetensors"), "");
  model.master_changed();
}

template <class Backend, class Real>
void load_optimizer(Model<Backend, Real>& model, const std::string& checkpoint) {
  const SafeTensors file(checkpoint + "/optimizer.safetensors");
  read_tensors(model, model.m, file, "m.");
  read_tensors(model, model.v, file, "v.");
}
