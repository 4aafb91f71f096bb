// Tests of run/checkpoint.h and run/csv.h: files that lie are refused before anything that they claim is read or
// allocated; what a machine that stopped leaves behind.
#include "run/checkpoint.h"

#include <doctest/doctest.h>

#include "run/csv.h"
#include "run/settings.h"
#include "tests/helpers.h"

namespace {

// A safetensors file from its header as text. `claimed`: the header's length as the file states it.
std::string safetensors(const std::string& header, const std::string& data, uint64_t claimed = UINT64_MAX) {
  const uint64_t length = claimed == UINT64_MAX ? header.size() : claimed;
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

std::string entry(const std::string& name, const std::string& shape, const std::string& offsets,
                  const std::string& dtype = "F32") {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

}  // namespace

TEST_CASE("checkpoint: safetensors that lie are refused, each with its reason") {
  TemporaryDirectory directory;
  const std::string path = directory / "a.safetensors", data(32, 'x');
  auto error = [&](const std::string& bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
    const std::string message = error_of([&] { SafeTensors file(path); });
    CHECK((message.empty() || contains(message, path)));
    return message;
  };
  auto header = [&](const std::string& entries) { return error(safetensors("{" + entries + "}", data)); };
  CHECK(header(entry("a", "[2,2]", "[0,16]") + "," + entry("b", "[4]", "[16,32]")) == "");
  CHECK(header(entry("a", "[0]", "[0,0]") + "," + entry("b", "[8]", "[0,32]")) == "");
  CHECK(contains(header(entry("a", "[2,2]", "[0,16]")), "16 bytes follow the last tensor"));
  CHECK(contains(header(entry("a", "[4]", "[16,32]")), "bytes 0 to 16 are of no tensor"));
  // Header lengths: behind the end, 4 GB, all bits set.
  CHECK(contains(error(safetensors("{}", "", 3)), "the header claims 3 bytes"));
  CHECK(contains(error(safetensors("{}", "", uint64_t(1) << 32)), "the header claims 4294967296 bytes"));
  CHECK(contains(error(safetensors("{}", "", UINT64_MAX - 1)), "truncated"));
  CHECK(contains(error(""), "empty"));
  CHECK(contains(error("1234567"), "truncated"));
  // Offsets: behind the end, backwards, not the shape's, negative, no whole number, wrapping around.
  CHECK(contains(header(entry("a", "[9]", "[0,36]")), "ends behind the end"));
  CHECK(contains(header(entry("a", "[4]", "[16,0]")), "ends behind the end"));
  CHECK(contains(header(entry("a", "[4]", "[0,12]")), "does not fit its shape"));
  CHECK(contains(header(entry("a", "[4]", "[-16,0]")), "-16 is not a whole number"));
  CHECK(contains(header(entry("a", "[4]", "[0,1e30]")), "is not a whole number"));
  CHECK(contains(header(entry("a", "[4]", "[0]")), "not one"));
  CHECK(contains(header(entry("a", "[4]", "[0,16,16]")), "not one"));
  CHECK(contains(header(entry("a", "[4]", "[0,18446744073709551615]")), "ends behind the end"));
  CHECK(contains(header(entry("a", "[4294967296,4294967296]", "[0,0]")), "larger than the file"));
  CHECK(contains(header(entry("a", "[-1]", "[0,4]")), "-1 is not a whole number"));
  CHECK(contains(header(entry("a", "4", "[0,16]")), "not one"));
  // Tensors that share bytes, whole or in part; keys that stand there twice.
  CHECK(contains(header(entry("a", "[4]", "[0,16]") + "," + entry("b", "[4]", "[0,16]")), "overlap"));
  CHECK(contains(header(entry("a", "[4]", "[0,16]") + "," + entry("b", "[4]", "[8,24]")), "overlap"));
  CHECK(contains(header(entry("a", "[4]", "[0,16]") + "," + entry("a", "[4]", "[16,32]")), "a stands in the header"));
  CHECK(contains(header(R"("a":{"shape":[4],"dtype":"F32","shape":[2],"data_offsets":[0,16]})"), "shape stands"));
  CHECK(contains(header(entry("a", "[4]", "[0,16]", "F33")), "unknown type"));
  CHECK(contains(header("\"a\":[]"), "not valid"));
  CHECK(contains(error(safetensors(std::string(100000, '['), data)), "nested"));
  // A good file cut short anywhere.
  const std::string good = safetensors("{" + entry("a", "[4]", "[0,16]") + "}", data.substr(0, 16));
  for (size_t length = 0; length < good.size(); length++) CHECK(error(good.substr(0, length)) != "");
  CHECK(error(good) == "");
}

TEST_CASE("checkpoint: a state.json that claims too much is refused before memory is taken") {
  TemporaryDirectory directory;
  Settings s;
  s.model.layers = 2, s.model.width = 16, s.model.heads = 2, s.model.vocab = 8, s.model.rotary_dim = 2;
  resolve(s.model);
  const ParameterTable table = parameter_table(s.model);
  const std::vector<float> weights(table.total, 1.0f);
  write_safetensors(directory / "model.safetensors", named(table, weights.data(), ""));
  auto error = [&](const std::string& key, const nlohmann::json& value) {
    nlohmann::json state = {{"step", 5}, {"vocabulary", 8}, {"settings", settings_json(s)}};
    if (!key.empty()) (state.contains(key) ? state : state["settings"])[key] = value;
    return error_of([&] {
      check_weights(settings_from_state("state.json", nlohmann::json::parse(state.dump())).model, directory.path);
    });
  };
  CHECK(error("", 0) == "");
  for (const std::string key : {"layers", "width", "heads", "head_size", "mlp_hidden", "context", "vocab"}) {
    CAPTURE(key);
    for (int value : {INT32_MAX, -1}) CHECK(error(key, value) != "");
    CHECK(contains(error(key, 1e10), "not such a number"));
    CHECK(contains(error(key, uint64_t(1) << 32), "not such a number"));
    CHECK(contains(error(key, "8"), "not such a number"));
    CHECK(contains(error(key, nullptr), "not such a number"));
  }
  CHECK(contains(error("width", 32), "shape"));
  CHECK(contains(error("layers", 3), "layers.2."));
  CHECK(contains(error("block", "sideways"), "sequential|parallel"));
  CHECK(contains(error("tied", 1), "tied is 1"));
  CHECK(contains(error("data", 1), "data is 1"));
  CHECK(contains(error("rotary_dim", 3), "rotary-dim"));
  for (const char* key : {"step", "vocabulary"}) CHECK(contains(error(key, -1), "not a checkpoint's state"));
  CHECK(contains(error("settings", -1), "no settings"));
}

TEST_CASE("run: names and paths") {
  CHECK(run_directory("nano") == "runs/nano");
  CHECK(run_directory("sweep/rotate=0") == "runs/sweep/rotate=0");
  CHECK(run_directory("/tmp/x") == "/tmp/x");
  CHECK(run_directory("../x") == "../x");
  CHECK(contains(error_of([] { run_directory("a/../x"); }), "leads out of runs/"));
}

TEST_CASE("run: weights that are not finite are refused, wherever they are") {
  Config c;
  c.layers = 1, c.width = 16, c.heads = 2, c.mlp_hidden = 16, c.context = 8, c.vocab = 16;
  resolve(c);
  c.rotary_dim = kRotaryDim.value_or(2);
  const ParameterTable table = parameter_table(c);
  std::vector<float> weights(table.total, 1e30f);
  const TemporaryDirectory directory;
  auto saved = [&] {
    write_safetensors(directory / "model.safetensors", named(table, weights.data(), ""));
    return error_of([&] { check_weights(c, directory / "."); });
  };
  CHECK(saved() == "");
  for (const ParameterRow& row : table.rows)
    for (float bad : {float(INFINITY), -float(INFINITY), float(NAN)}) {
      weights[row.offset + row.count - 1] = bad;
      CHECK(contains(saved(), row.name + " has numbers that are not finite"));
      weights[row.offset + row.count - 1] = 1;
    }
}

TEST_CASE("run: what a machine that stopped has left of a row is dropped on resume") {
  const TemporaryDirectory directory;
  const std::string path = directory / "log.csv";
  auto kept = [&](const std::string& before, int step) {
    write_text_file(path, before);
    { CsvLog log(path, "step,loss", step); }
    return read_text_file(path);
  };
  CHECK(kept("step,loss\n1,2\n2,3\n3,4\n", 2) == "step,loss\n1,2\n2,3\n");
  CHECK(kept("step,loss\n1,2\n2,3\n", 0) == "step,loss\n");
  CHECK(kept("step,loss\n1,2\n2", 2) == "step,loss\n1,2\n");
  CHECK(kept("step,loss\n1,2\n2,3", 2) == "step,loss\n1,2\n");  // 3, or the beginning of 3.1?
  CHECK(kept("step,loss\n1,2\n2\n2,3\n", 2) == "step,loss\n1,2\n2,3\n");
}
