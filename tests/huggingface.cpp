// Hugging Face's format: there and back for every class, and what is refused. That the models mean the same over there
// is scripts/parity.py's business.
#include "eval/huggingface.h"

#include <doctest/doctest.h>

#include "tests/helpers.h"

namespace {

Config small() {
  Config c;
  c.layers = 2, c.width = 24, c.heads = 4, c.kv_heads = 2, c.head_size = 10, c.mlp_hidden = 21, c.context = 30,
  c.vocab = 264;
  c.rotary_dim = kRotaryDim.value_or(6);
  return c;
}
Config neox() {
  Config c = small();
  c.kv_heads = 4, c.head_size = 6, c.norm = NormKind::layer, c.mlp = MlpKind::gelu, c.bias = true;
  c.rotary_dim = kRotaryDim.value_or(2), c.block = BlockKind::parallel;
  return c;
}

// A checkpoint of random weights; the flat array that went into it.
std::vector<float> write_checkpoint(const std::string& directory, const Config& c) {
  const ParameterTable table = parameter_table(c);
  const std::vector<float> weights = random_values<float>(table.total, 77);
  std::filesystem::create_directories(directory);
  write_safetensors(directory + "/model.safetensors", named(table, weights.data(), ""));
  return weights;
}

std::string weights_of(const std::string& checkpoint) { return read_text_file(checkpoint + "/model.safetensors"); }

void round_trip(const Config& c, const std::string& type, bool with_code = false) {
  TemporaryDirectory directory;
  write_checkpoint(directory / "run", c);
  const ByteTokenizer bytes;
  CHECK(export_model(directory / "out", c, directory / "run", &bytes, with_code) == type);
  CHECK(read_json_file(directory / "out/config.json")["model_type"] == type);
  const Settings back = import_model(directory / "out", directory / "back");
  const Config& d = back.model;
  CHECK(d.rotary_dim == c.rotary_dim);
  CHECK(d.head_size == c.head_size);
  CHECK(d.context == c.context);
  CHECK((d.block == c.block && d.norm == c.norm && d.qk_norm == c.qk_norm && d.tied == c.tied && d.bias == c.bias));
  CHECK((d.mlp == c.mlp && d.rope_pairs == c.rope_pairs && d.rope_base == c.rope_base));
  CHECK(weights_of(directory / "run") == weights_of(directory / "back/checkpoint"));
  // The byte tokenizer became one that gives the same ids.
  const std::string text = "Ann ran.\n\xC3\xA9\t \x01";
  std::vector<uint16_t> ours, theirs;
  bytes.encode(text.data(), text.size(), ours);
  make_tokenizer("tokenizer.json", directory / "back")->encode(text.data(), text.size(), theirs);
  CHECK(ours == theirs);
}

}  // namespace

TEST_CASE("huggingface: every class there and back, to the bit") {
#ifndef ROTARY_DIM
  for (int R : {2, 4, 6, 10}) {
    Config c = small();
    c.rotary_dim = R;
    round_trip(c, "phi3");
    c.qk_norm = true;
    round_trip(c, "glm4_moe");
  }
  Config c = small();
  c.rotary_dim = 0;
  round_trip(c, "smollm3");
  for (int R : {2, 4, 6}) {
    c = neox();
    c.rotary_dim = R;
    round_trip(c, "gpt_neox");
  }
#endif
  Config tied = small();
  tied.tied = true, tied.rope_base = 500;
  round_trip(tied, "phi3");
  Config sequential = neox();
  sequential.block = BlockKind::sequential;
  round_trip(sequential, "gpt_neox");
  Config parallel = small();
  parallel.block = BlockKind::parallel, parallel.qk_norm = true, parallel.rope_pairs = RopePairs::interleaved;
  round_trip(parallel, "partial_rope", true);
  parallel.norm = NormKind::layer, parallel.mlp = MlpKind::gelu, parallel.bias = parallel.tied = true;
  round_trip(parallel, "partial_rope", true);
}

TEST_CASE("huggingface: the exported fraction gives back R by truncation, for every head size") {
  for (int HS = 2; HS <= 512; HS += 2)
    for (int R = 0; R <= HS; R += 2) CHECK(int(exported_fraction(R, HS) * HS) == R);
}

TEST_CASE("huggingface: half precision") {
  const uint16_t halves[16] = {0x0000, 0x3C00, 0xC000, 0x7BFF, 0x0400, 0x0001, 0x8001, 0x3555};
  const float values[] = {0, 1, -2, 65504, 0x1p-14f, 0x1p-24f, -0x1p-24f, 0.333251953125f};
  float got[8];
  to_fp32(got, reinterpret_cast<const char*>(halves), "F16", 8);
  for (int i = 0; i < 8; ++i) CHECK(got[i] == values[i]);
  const uint16_t brains[16] = {0x3F80, 0xC049, 0x0001};
  to_fp32(got, reinterpret_cast<const char*>(brains), "BF16", 3);
  CHECK(got[0] == 1);
  CHECK(got[1] == -3.140625f);
  CHECK(got[2] == 0x1p-133f);
}

TEST_CASE("huggingface: a model in several files, and in other types") {
  TemporaryDirectory directory;
  const Config c = small();
  write_checkpoint(directory / "run", c);
  export_model(directory / "out", c, directory / "run", nullptr, false);
  // Split in two by hand, with an index.
  nlohmann::json index;
  {
    const SafeTensors whole(directory / "out/model.safetensors");
    std::vector<NamedTensor> halves[2];
    size_t i = 0;
    for (const auto& [name, t] : whole.tensors) {
      index["weight_map"][name] = "part" + std::to_string(i % 2) + ".safetensors";
      halves[i++ % 2].push_back({name, t.shape, reinterpret_cast<const float*>(t.data), t.count});
    }
    for (int k : {0, 1}) write_safetensors(directory / ("out/part" + std::to_string(k) + ".safetensors"), halves[k]);
  }
  std::filesystem::remove(directory / "out/model.safetensors");
  const std::string index_path = directory / "out/model.safetensors.index.json";
  write_text_file(index_path, index.dump());
  import_model(directory / "out", directory / "back");
  CHECK(weights_of(directory / "run") == weights_of(directory / "back/checkpoint"));
  auto refused = [&] { return error_of([&] { import_model(directory / "out", directory / "no"); }); };
  nlohmann::json outside = index;
  outside["weight_map"].begin().value() = "../part0.safetensors";
  write_text_file(index_path, outside.dump());
  CHECK(contains(refused(), "../part0"));
  write_text_file(index_path, "{}");
  CHECK(contains(refused(), "weight_map"));
  write_text_file(index_path, index.dump());
  std::filesystem::copy_file(directory / "out/part0.safetensors", directory / "out/part1.safetensors",
                             std::filesystem::copy_options::overwrite_existing);
  CHECK(contains(refused(), "another file"));
  CHECK(!std::filesystem::exists(directory / "no"));
  CHECK(!std::filesystem::exists(directory / "no.part"));
}

TEST_CASE("huggingface: what no class holds is refused") {
  auto error = [](void (*change)(Config&), Config c = small()) {
    change(c);
    return error_of([&] { model_type_of(c); });
  };
  CHECK(contains(error([](Config& c) { c.block = BlockKind::parallel; }), "--block parallel"));
  CHECK(contains(error([](Config& c) { c.mlp = MlpKind::gelu; }), "gelu"));
  CHECK(contains(error([](Config& c) { c.bias = true; }), "--bias"));
  CHECK(contains(error([](Config& c) { c.rope_pairs = RopePairs::interleaved, c.rotary_dim = 2; }), "interleaved"));
  CHECK(contains(error([](Config& c) { c.rotary_dim = 0, c.qk_norm = true; }), "--qk-norm"));
  CHECK(contains(error([](Config& c) { c.bias = false; }, neox()), "--bias"));
  CHECK(contains(error([](Config& c) { c.kv_heads = 2; }, neox()), "key"));
  CHECK(contains(error([](Config& c) { c.rotary_dim = 0; }, neox()), "rotation"));
  CHECK(contains(error([](Config& c) { c.head_size = 8; }, neox()), "head size"));
  CHECK(contains(error([](Config& c) { c.qk_norm = true; }, neox()), "qk-norm"));
}

TEST_CASE("huggingface: a config.json that would mean another model is refused, naming the key") {
  const nlohmann::json good = exported_config(small(), "phi3", 256);
  const nlohmann::json good_neox = exported_config(neox(), "gpt_neox", 256);
  std::string type;
  imported_config("config.json", good, type);
  CHECK(type == "phi3");
  auto error = [&](const char* key, const nlohmann::json& value, nlohmann::json json) {
    json[key] = value;
    return error_of([&] { imported_config("config.json", json, type); });
  };
  using Json = nlohmann::json;
  const std::vector<std::pair<const char*, Json>> wrong = {
      {"model_type", "mamba"},        {"model_type", 5},              {"hidden_act", "relu"},
      {"rms_norm_eps", 1e-6},         {"rope_scaling", {{"a", 1}}},   {"attention_bias", true},
      {"hidden_size", 0},             {"hidden_size", "24"},          {"num_hidden_layers", -1},
      {"vocab_size", 1e30},           {"partial_rotary_factor", 1.5}, {"partial_rotary_factor", 0.4},
      {"rope_theta", "x"},            {"rope_theta", 500},            {"num_attention_heads", 5},
      {"sliding_window", 10},         {"num_key_value_heads", 3},     {"head_dim", 9}};
  for (const auto& [key, value] : wrong) {
    CAPTURE(key);
    CAPTURE(value.dump());
    const std::string message = error(key, value, good);
    CHECK(!message.empty());
    CHECK((contains(message, key) || contains(message, "heads") || contains(message, "rotary")));
  }
  CHECK(contains(error("rotary_pct", 1.0, good_neox), "rotary_pct"));
  CHECK(contains(error("hidden_act", "gelu_new", good_neox), "hidden_act"));
  for (const auto& [key, value] : good.items()) {  // without a key: refused, or a default that changes nothing else
    Json json = good;
    json.erase(key);
    const std::string message = error_of([&] { imported_config("config.json", json, type); });
    if (key == "hidden_size" || key == "vocab_size" || key == "model_type" || key == "rms_norm_eps")
      CHECK(contains(message, key == "rms_norm_eps" ? "eps" : key));
  }
  Json moe = good;
  moe["model_type"] = "glm4_moe", moe["first_k_dense_replace"] = 1;
  CHECK(contains(error("use_qk_norm", true, moe), "first_k_dense_replace"));
  Json smol = good;
  smol["model_type"] = "smollm3", smol["no_rope_layers"] = {1, 0};
  CHECK(contains(error("mlp_bias", false, smol), "no_rope_layers"));
  const Json own = exported_config_with_code(small(), 256);
  CHECK(error("vocab", 264, own) == "");
  CHECK(contains(error("block", "sideways", own), "block sideways"));
  CHECK(contains(error("rotary_dim", 11, own), "11"));
  CHECK(!error("heads", "four", own).empty());
  Json less = own;
  less.erase("rope_pairs");
  CHECK(contains(error("vocab", 264, less), "rope_pairs"));
}
