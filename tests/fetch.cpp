// Tests of text/fetch.h, from file:// URLs: what comes, what is refused, what is continued.
#include "text/fetch.h"

#include <doctest/doctest.h>

#include "tests/helpers.h"

namespace {

void write(const std::string& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

std::string shard_of(const std::vector<uint16_t>& tokens) {
  std::vector<int32_t> header(256);
  header[0] = 20240520, header[1] = 1, header[2] = int32_t(tokens.size());
  return std::string(reinterpret_cast<const char*>(header.data()), 1024) +
         std::string(reinterpret_cast<const char*>(tokens.data()), 2 * tokens.size());
}

// A .zip with these files.
void zip(const std::string& path, const std::vector<std::pair<std::string, std::string>>& files) {
  archive* to = archive_write_new();
  archive_write_set_format_zip(to);
  archive_write_open_filename(to, path.c_str());
  for (const auto& [name, text] : files) {
    archive_entry* entry = archive_entry_new();
    archive_entry_set_pathname(entry, name.c_str());
    archive_entry_set_size(entry, int64_t(text.size()));
    archive_entry_set_filetype(entry, AE_IFREG);
    archive_write_header(to, entry);
    archive_write_data(to, text.data(), text.size());
    archive_entry_free(entry);
  }
  archive_write_free(to);
}

const DataSet& set_named(const std::string& name) {
  for (const DataSet& set : data_sets())
    if (set.name == name) return set;
  throw std::runtime_error("no set " + name);
}

}  // namespace

TEST_CASE("fetch: what a server says of a file") {
  const std::string sum(64, 'a');
  const Remote hub = read_headers("HTTP/2 302 \r\ncontent-length: 1100\r\nx-linked-etag: \"" + sum + "\"\r\n\r\n" +
                                  "HTTP/2 200 \r\nContent-Length: 200001024\r\netag: \"b\"\r\n\r\n");
  CHECK(hub.bytes == 200001024);
  CHECK(hub.sha256 == sum);
  CHECK(read_headers("HTTP/1.1 302 Found\r\nContent-Length: 5\r\n\r\nHTTP/1.1 200 OK\r\n\r\n").bytes == 0);
  // A small file's is not its SHA-256.
  CHECK(read_headers("x-linked-etag: \"" + std::string(40, 'a') + "\"\r\n").sha256 == "");
  CHECK(read_headers("").bytes == 0);
}

TEST_CASE("fetch: shards come as they are, and only if they are shards") {
  for (const char* name : {"fineweb", "fineweb-edu"}) {
    TemporaryDirectory directory;
    const std::string mirror = "file://" + directory.path, out = directory / "out";
    const DataSet& set = set_named(name);
    const std::vector<uint16_t> tokens = {50256, 5, 50255, 50256, 7};
    auto fetch = [&](int shards) { return error_of([&] { fetch_files(set, mirror, out, shards); }); };
    CHECK(contains(fetch(1), mirror + "/" + set.val + "000000.bin"));
    CHECK(contains(fetch(1), "offline"));
    write(directory / (set.val + "000000.bin"), shard_of(tokens));
    write(directory / (set.train + "000001.bin"), shard_of(tokens));
    write(directory / (set.train + "000002.bin"), shard_of({50257}));
    CHECK(fetch(1) == "");
    CHECK(contains(fetch(2), "wrong file"));
    CHECK(contains(fetch(2), "50257"));
    write(directory / (set.train + "000002.bin"), shard_of(tokens).substr(0, 1030));
    CHECK(contains(fetch(2), "truncated"));
    CHECK(!std::filesystem::exists(out + "/" + set.train + "000002.bin.part"));
    write(directory / (set.train + "000002.bin"), shard_of(tokens));
    CHECK(fetch(2) == "");
    CHECK(read_text_file(out + "/" + set.train + "000002.bin") == shard_of(tokens));
    // They can be trained on at once; text cannot be shown without a tokenizer.
    std::string note;
    Meta meta = describe_gpt2_shards(set, mirror, out, note);
    CHECK(contains(note, mirror + "/tokenizer.json"));
    CHECK(meta.vocabulary == 50257);
    CHECK(meta.tokenizer == "");
    CHECK(meta.train.tokens == 10);
    CHECK(meta.train.documents == 4);
    CHECK(meta.val.tokens == 5);
    CHECK(read_meta(out + "/*.bin").vocabulary == 50257);
    write(out + "/" + set.train + "000002.bin", "broken");  // also what is there is checked
    CHECK(contains(fetch(2), "truncated"));
  }
}

TEST_CASE("fetch: an interrupted download is continued, and what is wrong removed") {
  TemporaryDirectory directory;
  const std::string url = "file://" + (directory / "a"), path = directory / "b", part = path + ".part";
  auto nothing = [](const std::string&) {};
  auto get = [&](const std::string& sum) { return error_of([&] { download(url, path, sum, nothing); }); };
  write(directory / "a", "0123456789");
  write(part, "abcde");
  CHECK(get("") == "");
  CHECK(read_text_file(path) == "abcde56789");  // not begun anew
  for (const char* before : {"0123456789", "0123456789 and more", "01", ""}) {  // all of it, too much, a part, nothing
    write(part, before);
    CHECK(get(sha256_of(directory / "a")) == "");
    CHECK(read_text_file(path) == "0123456789");
    CHECK(!std::filesystem::exists(part));
  }
  std::filesystem::remove(path);
  CHECK(contains(get(std::string(64, '0')), "its SHA-256 is"));
  auto refuse = [](const std::string&) { throw UserError("no such thing"); };
  CHECK(contains(error_of([&] { download(url, path, "", refuse); }), "no such thing"));
  CHECK(directory.files() == std::set<std::string>{"a"});
}

TEST_CASE("fetch: an archive is unpacked; its checksum, and its files' own, are those that they should be") {
  TemporaryDirectory directory;
  const std::string mirror = "file://" + directory.path, out = directory / "out";
  const std::string archive = directory / "wikitext-103-raw-v1.zip";
  DataSet set = set_named("wikitext");
  const std::string text = "some text, some text, some text\n";
  zip(archive, {{"wikitext-103-raw/wiki.test.raw", "no"},
                {"wikitext-103-raw/wiki.valid.raw", "val\n"},
                {"wikitext-103-raw/wiki.train.raw", text}});
  auto fetch = [&] { return error_of([&] { fetch_files(set, mirror, out, 1); }); };
  CHECK(contains(fetch(), "wrong file: its SHA-256 is"));
  set.sha256 = sha256_of(archive);
  CHECK(fetch() == "");
  CHECK(read_text_file(out + "/wiki.train.raw") == text);
  CHECK(read_text_file(out + "/wiki.valid.raw") == "val\n");
  CHECK(!std::filesystem::exists(out + "/wikitext-103-raw-v1.zip"));
  std::filesystem::remove(archive);
  CHECK(fetch() == "");  // nothing more to download
  std::filesystem::remove(out + "/wiki.valid.raw");
  zip(archive, {{"wikitext-103-raw/wiki.train.raw", text}});
  set.sha256 = "";
  CHECK(contains(fetch(), "cannot unpack wiki.valid.raw"));
  write(archive, "no zip");
  std::filesystem::remove(out + "/wikitext-103-raw-v1.zip");
  CHECK(contains(fetch(), "cannot unpack"));
}

TEST_CASE("fetch: without space for all of it nothing is downloaded") {
  TemporaryDirectory directory;
  write(directory / "input.txt", "x");
  DataSet set = set_named("shakespeare");
  set.sha256 = "";
  set.space = 1e18;  // bytes on the disk for this one
  auto fetch = [&] { fetch_files(set, "file://" + directory.path, directory / "out/deep", 1); };
  CHECK(contains(error_of(fetch), "not enough space"));
  CHECK(directory.files() == std::set<std::string>{"input.txt"});
}
