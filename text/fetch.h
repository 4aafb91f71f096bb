// Data sets by name: where they are, how they come here, and whether what came is whole.
#pragma once
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "text/encode.h"

// Files of text, or shards of GPT-2's tokens, all in the directory `url`.
struct DataSet {
  std::string name, url;
  std::string train, val;  // files; of shards, what stands before the number and .bin. No val: the end of train
  std::string archive;     // the .zip that holds them, if they come in one
  std::string sha256;      // of the one file to download, where it is known never to change
  int shards = 0;          // of training, from number 1 on; 0: this is text
  double space = 1;        // bytes on the disk per byte of download: unpacked, and as 2 bytes per token
};

inline const std::vector<DataSet>& data_sets() {
  const std::string hub = "https://huggingface.co/datasets/";
  static const std::vector<DataSet> sets = {
      {"shakespeare", "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare", "input.txt", "",
       "", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 0, 3},
      {"tinystories", hub + "roneneldan/TinyStories/resolve/main", "TinyStoriesV2-GPT4-train.txt",
       "TinyStoriesV2-GPT4-valid.txt", "", "", 0, 3},
      {"wikitext", "https://wikitext.smerity.com", "wiki.train.raw", "wiki.valid.raw", "wikitext-103-raw-v1.zip",
       "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794", 0, 10},
      // Of modded-nanogpt, and of llm.c.
      {"fineweb", hub + "kjj0/fineweb10B-gpt2/resolve/main", "fineweb_train_", "fineweb_val_", "", "", 103},
      {"fineweb-edu", hub + "karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main", "edu_fineweb_train_",
       "edu_fineweb_val_", "", "", 1001},
  };
  return sets;
}

constexpr const char* gpt2_tokenizer_url = "https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json";
constexpr int gpt2_vocabulary = 50257, gpt2_end_of_text = 50256;

// Runs a program without a shell, so that no argument can be taken for anything else. Its standard output is added to
// `output`, its standard error is ours. The exit status; 127 if there is no such program.
inline int run_program(const std::vector<std::string>& arguments, std::string& output) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  int ends[2];
  if (::pipe(ends) != 0) throw UserError(std::string("cannot make a pipe: ") + std::strerror(errno));
  std::fflush(stdout);
  pid_t child = ::fork();
  if (child < 0) throw UserError(std::string("cannot start a program: ") + std::strerror(errno));
  if (child == 0) {
    ::dup2(ends[1], STDOUT_FILENO);
    ::close(ends[0]);
    ::close(ends[1]);
    ::execvp(argv[0], argv.data());
    ::_exit(127);
  }
  ::close(ends[1]);
  char buffer[4096];
  ssize_t got;
  while ((got = ::read(ends[0], buffer, sizeof buffer)) > 0 || (got < 0 && errno == EINTR))
    if (got > 0) output.append(buffer, size_t(got));
  ::close(ends[0]);
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

inline std::string sha256_of(const std::string& path) {
  std::string file = path[0] == '-' ? "./" + path : path;
  std::string output;
  if (run_program({"sha256sum", file}, output) != 0) {
    output.clear();
    if (run_program({"shasum", "-a", "256", file}, output) != 0)
      throw UserError(path + ": cannot take its SHA-256: neither sha256sum nor shasum works here");
  }
  if (output[0] == '\\') output.erase(0, 1);  // sha256sum marks unusual file names so
  return output.substr(0, 64);
}

// What a server says of a file before sending it; 0 and empty where it does not say.
struct Remote {
  uint64_t bytes = 0;
  std::string sha256;
};

// From the headers of its answers: one for each redirection, the last is the file's. The Hugging Face Hub names a large
// file's SHA-256 in X-Linked-ETag.
inline Remote read_headers(const std::string& text) {
  Remote remote;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    while (!line.empty() && (line.back() == '\r' || line.back() == '"')) line.pop_back();
    const size_t colon = line.find(": ");
    if (line.rfind("HTTP/", 0) == 0) remote.bytes = 0;
    if (colon == std::string::npos) continue;
    std::string key = line.substr(0, colon), value = line.substr(colon + 2);
    for (char& c : key) c = char(std::tolower(static_cast<unsigned char>(c)));
    if (key == "content-length") remote.bytes = std::strtoull(value.c_str(), nullptr, 10);
    if (key == "x-linked-etag" && value.size() == 65 && value[0] == '"' &&
        value.find_first_not_of("0123456789abcdef", 1) == std::string::npos)
      remote.sha256 = value.substr(1);
  }
  return remote;
}

// Runs curl on `url`, which is to become `path`. What it writes to its standard output.
inline std::string curl(const std::string& url, const std::string& path, const std::vector<std::string>& options) {
  std::vector<std::string> arguments = {"curl", "--fail", "--location", "--proto", "=https,http,file", "--retry", "3",
                                        "--connect-timeout", "20", "--url", url, "--write-out", "\n%{errormsg}"};
  arguments.insert(arguments.end(), options.begin(), options.end());
  std::string output;
  const int status = run_program(arguments, output);
  if (status == 0) return output;
  std::string message = output.substr(std::min(output.rfind('\n') + 1, output.size()));
  if (message.empty() || message.find("errormsg") != std::string::npos)
    message = "curl's exit code is " + std::to_string(status);  // curl before 7.75 has no %{errormsg}
  throw UserError("cannot download " + url + " (" + (status == 127 ? "there is no curl program" : message) +
                  "); offline: get the file elsewhere, put it at " + path +
                  " and run this again, or use --url file:///DIRECTORY");
}

inline Remote look_up(const std::string& url, const std::string& path) {
  return read_headers(curl(url, path, {"--head", "--silent"}));
}

inline uint64_t bytes_of_file(const std::string& path) {  // 0 if there is none
  std::error_code none;
  const auto size = std::filesystem::file_size(path, none);
  return none ? 0 : uint64_t(size);
}

// Downloads to `path`, which appears when the file is whole and check(file) does not throw. What an interrupted
// download left, path.part, is continued. `sha256`: of the file; empty: what the server says.
template <class Check>
void download(const std::string& url, const std::string& path, std::string sha256, Check check) {
  const std::string part = path + ".part";
  const Remote remote = look_up(url, path);
  if (sha256.empty()) sha256 = remote.sha256;
  if (::isatty(STDOUT_FILENO))
    std::printf("%s: %.1f MB, to %s\n", url.c_str(), double(remote.bytes) * 1e-6, path.c_str());
  if (remote.bytes > 0 && bytes_of_file(part) > remote.bytes) ::unlink(part.c_str());
  if (remote.bytes == 0 || bytes_of_file(part) != remote.bytes)  // servers refuse to go on behind the end
    curl(url, path, {"--continue-at", "-", "--output", part, ::isatty(STDERR_FILENO) ? "--progress-bar" : "--silent"});
  try {
    const uint64_t bytes = bytes_of_file(part);
    if (remote.bytes > 0 && bytes != remote.bytes)
      throw UserError(std::to_string(bytes) + " bytes came, should be " + std::to_string(remote.bytes));
    if (!sha256.empty())
      if (const std::string sum = sha256_of(part); sum != sha256)
        throw UserError("its SHA-256 is " + sum + ", should be " + sha256);
    check(part);
  } catch (const UserError& e) {
    ::unlink(part.c_str());
    throw UserError(url + ": wrong file: " + e.what() + "; the download was removed");
  }
  if (std::rename(part.c_str(), path.c_str()) != 0) throw UserError(path + ": cannot write: " + std::strerror(errno));
}

// Writes the file of that name, in whatever directory of the .zip it is, to `path`.
inline void unpack(const std::string& zip, const std::string& name, const std::string& path) {
  std::unique_ptr<archive, int (*)(archive*)> from(archive_read_new(), archive_read_free);
  auto fail = [&](const std::string& what) { throw UserError(zip + ": cannot unpack " + name + ": " + what); };
  auto reason = [&] { return archive_error_string(from.get()); };
  archive_read_support_format_zip(from.get());
  if (archive_read_open_filename(from.get(), zip.c_str(), 1 << 18) != ARCHIVE_OK) fail(reason());
  archive_entry* entry;
  do {
    const int status = archive_read_next_header(from.get(), &entry);
    if (status == ARCHIVE_EOF) fail("it is not in there");
    if (status != ARCHIVE_OK) fail(reason());
  } while (std::filesystem::path(archive_entry_pathname(entry)).filename() != name);
  NewFile to(path);
  std::vector<char> buffer(1 << 18);
  for (;;) {
    const la_ssize_t n = archive_read_data(from.get(), buffer.data(), buffer.size());
    if (n < 0) fail(reason());
    if (n == 0) break;
    to.write(buffer.data(), size_t(n));
  }
  to.sync();
  to.commit();
}

// A shard of GPT-2's tokens: its format, length and ids.
inline void check_gpt2_shard(const std::string& path) { Shard(path).check_tokens(gpt2_vocabulary); }

// Brings the files of a data set to `directory`, those that are not there yet. `url`: another directory to get them
// from; empty: the set's own. UserError without space for all of it, before anything is downloaded.
inline void fetch_files(const DataSet& set, std::string url, const std::string& directory, int shards) {
  namespace fs = std::filesystem;
  std::vector<std::string> files;  // to download
  if (set.shards > 0) {
    auto name = [](const std::string& start, int number) {
      char digits[16];
      std::snprintf(digits, sizeof digits, "%06d", number);
      return start + digits + ".bin";
    };
    files.push_back(name(set.val, 0));
    for (int i = 1; i <= shards; i++) files.push_back(name(set.train, i));
  } else if (set.archive.empty()) {
    files.push_back(set.train);
    if (!set.val.empty()) files.push_back(set.val);
  } else if (!fs::exists(directory + "/" + set.train) || !fs::exists(directory + "/" + set.val)) {
    files.push_back(set.archive);
  }
  auto check = [&](const std::string& path) {
    if (set.shards > 0) check_gpt2_shard(path);
  };
  if (url.empty()) url = set.url;
  std::vector<std::string> missing;
  Remote remote;
  double needed = 0;
  for (const std::string& file : files) {
    const std::string path = directory + "/" + file;
    if (fs::exists(path)) {
      if (!set.sha256.empty() && sha256_of(path) != set.sha256)
        throw UserError(path + ": wrong file: its SHA-256 should be " + set.sha256 + "; remove it and run this again");
      check(path);
      continue;
    }
    if (missing.empty() || set.shards == 0) remote = look_up(url + "/" + file, path);  // shards are of one size
    missing.push_back(file);
    needed += set.space * double(remote.bytes) - double(std::min(remote.bytes, bytes_of_file(path + ".part")));
  }
  std::error_code error;
  fs::path existing = fs::absolute(directory);
  while (!fs::exists(existing)) existing = existing.parent_path();
  const double free = double(fs::space(existing, error).available);
  if (!error && needed > free) {
    char sizes[80];
    std::snprintf(sizes, sizeof sizes, "%.1f GB needed, %.1f GB free", needed * 1e-9, free * 1e-9);
    throw UserError(directory + ": not enough space for " + set.name + ": " + sizes + "; use --out on another disk" +
                    (set.shards > 0 ? ", or fewer --shards" : ""));
  }
  fs::create_directories(directory, error);
  if (error) throw UserError(directory + ": cannot make the directory: " + error.message());
  for (const std::string& file : missing)
    download(url + "/" + file, directory + "/" + file, set.sha256, check);
  if (files.empty() || set.archive.empty()) return;
  const std::string zip = directory + "/" + set.archive;
  for (const std::string& file : {set.train, set.val}) unpack(zip, file, directory + "/" + file);
  ::unlink(zip.c_str());
}

// Writes meta.json beside fetched shards of GPT-2's tokens. Their text can be shown where there is GPT-2's
// tokenizer.json, which is downloaded as well; without it everything else works, and `note` says why it is missing.
inline Meta describe_gpt2_shards(const DataSet& set, const std::string& url, const std::string& directory,
                                 std::string& note) {
  const std::string path = directory + "/tokenizer.json";
  std::unique_ptr<Tokenizer> tokenizer;
  auto check = [](const std::string& file) {
    const BpeTokenizer read(file);
    if (read.vocabulary() != gpt2_vocabulary || read.end_of_text() != gpt2_end_of_text)
      throw UserError(file + ": not GPT-2's tokenizer, which has " + std::to_string(gpt2_vocabulary) + " tokens");
  };
  try {
    if (!std::filesystem::exists(path))
      download(url.empty() ? gpt2_tokenizer_url : url + "/tokenizer.json", path, "", check);
    check(path);
    tokenizer = std::make_unique<BpeTokenizer>(path);
  } catch (const UserError& e) {
    note = e.what();
  }
  std::vector<uint64_t> bytes_of(gpt2_vocabulary);
  for (int token = 0; tokenizer && token < gpt2_vocabulary; token++) {
    std::string text;
    tokenizer->decode(token, text);
    bytes_of[size_t(token)] = text.size();
  }
  Meta meta;
  meta.tokenizer = tokenizer ? tokenizer->name() : "";
  meta.tokenizer_fingerprint = tokenizer ? tokenizer->fingerprint() : "";
  meta.vocabulary = gpt2_vocabulary;
  for (const auto& [name, split] : {std::pair{set.train, &meta.train}, std::pair{set.val, &meta.val}}) {
    const Dataset data(directory + "/" + name + "*.bin");
    for (const Shard& shard : data.shards()) {
      shard.check_tokens(gpt2_vocabulary);
      split->tokens += shard.size();
      meta.shards[std::filesystem::path(shard.path()).filename()] = shard.fingerprint();
      for (size_t i = 0; i < shard.size(); i++) {
        split->documents += shard[i] == gpt2_end_of_text;
        split->bytes += bytes_of[shard[i]];
      }
    }
  }
  const std::string json = meta_to_json(meta).dump(2) + "\n";
  NewFile file(directory + "/meta.json");
  file.write(json.data(), json.size());
  file.sync();
  file.commit();
  return meta;
}
