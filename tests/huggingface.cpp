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

// Phi's block: one norm for both, the older GELU, a head with a bias.
Config phi() {
  Config c = neox();
  c.mlp = MlpKind::gelu_tanh, c.shared_norm = c.head_bias = true, c.norm_eps = 3e-6;
  return c;
}
[[maybe_unused]] Config stablelm() {
  Config c = neox();
  c.mlp = MlpKind::swiglu, c.block = BlockKind::sequential, c.bias = false;
  return c;
}

// A checkpoint of random weights; zero are those whose name holds one of `cleared`. The flat array that went into it.
std::vector<float> write_checkpoint(const std::string& directory, const Config& c,
                                    const std::vector<std::string>& cleared = {}) {
  const ParameterTable table = parameter_table(c);
  std::vector<float> weights = random_values<float>(table.total, 77);
  for (const ParameterRow& row : table.rows)
    for (const std::string& name : cleared)
      if (contains(row.name, name)) std::fill_n(&weights[row.offset], row.count, 0.0f);
  std::filesystem::create_directories(directory);
  write_safetensors(directory + "/model.safetensors", named(table, weights.data(), ""));
  return weights;
}

const Family& family_named(const std::string& type) {
  for (const Family& family : families())
    if (family.type == type) return family;
  throw std::logic_error(type);
}

// What open_source() makes of a run's checkpoint.
Source source_of(const std::string& checkpoint, const Config& c, bool tokenizer = false,
                 const nlohmann::json& special_tokens = nullptr) {
  Source source;
  source.checkpoint = checkpoint, source.settings.model = c, source.vocabulary = 257;
  source.special_tokens = special_tokens;
  if (tokenizer) source.tokenizer = std::make_unique<ByteTokenizer>();
  return source;
}

std::string weights_of(const std::string& checkpoint) { return read_text_file(checkpoint + "/model.safetensors"); }

nlohmann::ordered_json flags_of(const Config& c) {
  Settings s;
  s.model = c;
  return settings_json(s, {"Model"});
}

void round_trip(const Config& c, const std::string& type, bool with_code = false,
                const std::vector<std::string>& cleared = {}) {
  CAPTURE(type);
  TemporaryDirectory directory;
  write_checkpoint(directory / "run", c, cleared);
  CHECK(export_model(directory / "out", source_of(directory / "run", c, true), with_code)["model_type"] == type);
  CHECK(read_json_file(directory / "out/config.json")["model_type"] == type);
  CHECK(flags_of(import_model(directory / "out", directory / "back").model) == flags_of(c));
  CHECK(weights_of(directory / "run") == weights_of(directory / "back/checkpoint"));
  // The byte tokenizer became one that gives the same ids.
  const ByteTokenizer bytes;
  const std::string text = "Ann ran.\n\xC3\xA9\t \x01";
  std::vector<int> ours, theirs;
  bytes.encode(text.data(), text.size(), ours);
  make_tokenizer("tokenizer.json", directory / "back")->encode(text.data(), text.size(), theirs);
  CHECK(ours == theirs);
}

}  // namespace

TEST_CASE("huggingface: every class there and back, to the bit") {
#ifndef ROTARY_DIM
  for (int R : {0, 2, 4, 6, 10}) {
    Config c = small();
    c.rotary_dim = R;
    round_trip(c, R == 0 ? "smollm3" : R == 10 ? "llama" : "phi3");
    c.qk_norm = true;
    round_trip(c, R == 10 ? "qwen3" : "glm4_moe");
    if (R == 0) continue;
    c.qk_norm = false, c.rope_pairs = RopePairs::interleaved, c.norm_eps = 1.5625e-7;
    round_trip(c, "glm");
    c.qkv_bias = true;
    round_trip(c, "glm");
    c.rope_pairs = RopePairs::half;
    round_trip(c, R == 10 ? "qwen2" : "glm4_moe");
  }
  for (int R : {0, 2, 4, 6}) {
    Config c = neox();
    c.rotary_dim = R;
    round_trip(c, "gpt_neox");
    c.mlp = MlpKind::gelu_tanh;
    round_trip(c, "gpt_neox");
    c = phi(), c.rotary_dim = R;
    round_trip(c, "phi");
    c.rope_pairs = RopePairs::interleaved;  // whose attention has no biases
    if (R > 0) round_trip(c, "gptj", false, {"qkv.bias", "proj.bias"});
    c = stablelm(), c.rotary_dim = R;
    if (R > 0) round_trip(c, "stablelm");
    c.qkv_bias = true;
    if (R > 0) round_trip(c, "stablelm");
  }
  Config full = small();
  full.rotary_dim = 10, full.bias = true, full.norm_eps = 9.999999974752427e-07;
  round_trip(full, "llama");
  full.qk_norm = true;
  round_trip(full, "qwen3", false, {"up.bias", "down.bias"});
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
  parallel.attention_softcap = 50;
  round_trip(parallel, "partial_rope", true);
  parallel.tied = false, parallel.shared_norm = parallel.head_bias = true, parallel.norm_eps = 1e-3;
  parallel.mlp = MlpKind::gelu_tanh, parallel.rope_scaling = "linear:4";
  round_trip(parallel, "partial_rope", true);
}

#ifndef ROTARY_DIM
TEST_CASE("huggingface: what is done to the frequencies, and which layers turn, goes out and comes back") {
  TemporaryDirectory directory;
  auto there_and_back = [&](const Config& c, const std::string& type, const std::string& rope_type) {
    CAPTURE(c.rope_scaling);
    std::filesystem::remove_all(directory / "out");
    std::filesystem::remove_all(directory / "back");
    write_checkpoint(directory / "run", c);
    const auto config = export_model(directory / "out", source_of(directory / "run", c), false);
    CHECK(config["model_type"] == type);
    CHECK(config["rope_parameters"]["rope_type"] == rope_type);
    const Config d = import_model(directory / "out", directory / "back").model;
    CHECK(d.rotary_dims() == c.rotary_dims());
    CHECK(d.context == c.context);
    const RopeAngles ours = c.angles(c.rotary_dim), back = d.angles(c.rotary_dim);
    CHECK(back.attention == ours.attention);
    for (size_t i = 0; i < ours.theta.size(); ++i)
      CHECK(back.theta[i] == doctest::Approx(ours.of(c.context)[i]).epsilon(1e-14));
    return d;
  };
  Config part = small(), full = small();
  part.width = 40;  // heads of width / heads channels, as Phi3 counts them
  full.rotary_dim = 10;
  for (const char* scaling : {"linear:4", "llama3:8,1,4,16", "yarn:4,8,1.25,16,2", "yarn:4,8"}) {
    full.rope_scaling = part.rope_scaling = scaling;
    there_and_back(full, "llama", std::string(scaling).substr(0, std::string(scaling).find(':')));
    there_and_back(part, "phi3", "longrope");  // Phi3 has no other
  }
  for (const char* scaling : {"longrope:1.25,1,2.5,4", "longrope:1.25,1,2.5,4;60,2,3,4.5"}) {
    part.rope_scaling = scaling;
    const Config d = there_and_back(part, "phi3", "longrope");
    CHECK(d.angles(6).of(61) == part.angles(6).of(61));
    CHECK(d.angles(6).limit == part.angles(6).limit);
  }
  part.rope_scaling = "longrope:1.25,1,2.5,4;20,2,3,4.5";  // all of its texts are longer
  CHECK(there_and_back(part, "phi3", "longrope").rope_scaling == "longrope:1.25,2.0,3.0,4.5");
  part.rope_scaling = "none", part.rope_frequencies = "head";
  there_and_back(part, "phi3", "longrope");
  part.rope_frequencies = "10,20,300.5";
  there_and_back(part, "phi3", "longrope");
  part.width = 24;  // here its class would refuse the list
  there_and_back(part, "glm4_moe", "longrope");
  full.rope_scaling = "none";
  for (const char* layers : {"nope:2", "10,0", "0,10", "0,0", "10,10"}) {
    full.rotary_layers = layers;
    const bool none = !std::strcmp(layers, "0,0"), all = !std::strcmp(layers, "10,10");
    if (none) full.rotary_dim = 0;
    const Config d = there_and_back(full, all ? "llama" : "smollm3", "default");
    CHECK(d.rotary_layers == (none || all ? "all" : !std::strcmp(layers, "0,10") ? "0,10" : "nope:2"));
    full.rotary_dim = 10;
  }
  full.rotary_layers = "10,4";
  write_checkpoint(directory / "run", full);
  const SafeTensors weights(directory / "run/model.safetensors");
  CHECK(contains(error_of([&] { family_for(full, weights); }), "--rotary-layers 10,4"));
}

TEST_CASE("huggingface: versions of Transformers without a fraction in Phi3 refuse it") {
  // They ask for three keys with lists of HS/2 factors; those that know the fraction, for R/2.
  Config c = small();
  CHECK(!exported_config(family_named("phi3"), c).contains("rope_scaling"));  // no version takes it: 24 / 4 is not 10
  c.width = 40;
  const nlohmann::json partial = exported_config(family_named("phi3"), c);
  CHECK(partial["rope_scaling"].size() == 3);
  CHECK(partial["rope_scaling"]["short_factor"] == nlohmann::json({1.0, 1.0, 1.0}));
  CHECK(partial["rope_scaling"]["long_factor"] == partial["rope_scaling"]["short_factor"]);
  CHECK(partial["original_max_position_embeddings"] == partial["max_position_embeddings"]);
}

TEST_CASE("huggingface: scalings of published models") {
  Config c = small();
  c.rotary_dim = 10, c.context = 4096;
  nlohmann::json config = exported_config(family_named("llama"), c);
  config.erase("rope_parameters");
  const Family* family = nullptr;
  auto scaling = [&](const nlohmann::json& value) {
    config["rope_scaling"] = value;
    return imported_config("config.json", config, family).c.rope_scaling;
  };
  auto error = [&](const nlohmann::json& value) { return error_of([&] { scaling(value); }); };
  nlohmann::json llama3 = {{"factor", 8.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0},
                           {"original_max_position_embeddings", 8192}, {"rope_type", "llama3"}};
  CHECK(scaling(llama3) == "llama3:8.0,1.0,4.0,8192.0");
  CHECK(scaling({{"type", "linear"}, {"factor", 4}}) == "linear:4.0");
  CHECK(scaling({{"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 1024}}) ==
        "yarn:4.0,1024.0," + nlohmann::json(0.1 * std::log(4.0) + 1).dump() + ",32.0,1.0");
  nlohmann::json longrope = {{"type", "longrope"},
                             {"short_factor", {1, 1.5, 2, 2.5, 3}},
                             {"long_factor", {1, 2, 3, 4, 5}},
                             {"original_max_position_embeddings", 1024}};
  CHECK(scaling(longrope) == "longrope:" + nlohmann::json(std::sqrt(1 + std::log(4.0) / std::log(1024.0))).dump() +
                                 ",1.0,1.5,2.0,2.5,3.0;1024.0,1.0,2.0,3.0,4.0,5.0");
  CHECK(imported_config("config.json", config, family).c.context == 1024);  // behind it, other factors count there
  longrope["long_factor"] = longrope["short_factor"];
  CHECK(!contains(scaling(longrope), "1024"));
  CHECK(imported_config("config.json", config, family).c.context == 4096);
  longrope.erase("long_factor");
  CHECK(contains(error(longrope), "long_factor is null; it must be a list of 5"));
  longrope["long_factor"] = {1, 2, 3, 4, 5};
  longrope["short_factor"] = std::vector<double>(48, 1.25);
  CHECK(contains(error(longrope), "short_factor is a list of 48; it must be a list of 5"));
  longrope["short_factor"] = {1, 1, 1, 1, -1};
  CHECK(contains(error(longrope), "short_factor has -1"));
  llama3.erase("low_freq_factor");
  CHECK(contains(error(llama3), "low_freq_factor is null; it must be a number above 0"));
  CHECK(contains(error({{"type", "linear"}, {"factor", 0}}), "factor is 0"));
  CHECK(contains(error({{"type", "yarn"}, {"factor", 4.0}, {"truncate", false}}), "truncate is false"));
  CHECK(contains(error({{"type", "dynamic"}, {"factor", 2}}), "rope_type dynamic cannot be imported"));
}
#endif

TEST_CASE("huggingface: the exported fraction gives back R by truncation, for every head size") {
  for (int HS = 2; HS <= 512; HS += 2)
    for (int R = 0; R <= HS; R += 2) CHECK(int(exported_fraction(R, HS) * HS) == R);
}

TEST_CASE("huggingface: rows in an order of their own") {
  Config c = small();
  c.heads = c.kv_heads = 8, c.head_size = 3;
  size_t theirs = 0;  // CodeGen, as its class splits qkv_proj: four groups of heads, in each queries, values, keys
  for (int group = 0; group < 4; ++group)
    for (int part : {0, 2, 1})
      for (int head = 2 * group; head < 2 * group + 2; ++head)
        for (int i = 0; i < 3; ++i) CHECK(our_row(Rows::by_shard, c, theirs++) == size_t((part * 8 + head) * 3 + i));
  theirs = 0;  // GPT-NeoX: by head, in each query, key, value
  for (int head = 0; head < 8; ++head)
    for (int part : {0, 1, 2})
      for (int i = 0; i < 3; ++i) CHECK(our_row(Rows::by_head, c, theirs++) == size_t((part * 8 + head) * 3 + i));
}

#ifndef ROTARY_DIM
TEST_CASE("huggingface: configurations as they were published") {
  const Family* family = nullptr;
  auto read = [&](const char* text) { return imported_config("config.json", nlohmann::json::parse(text), family).c; };
  const Config neox_20b = read(R"({"architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0,
      "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu_fast", "hidden_dropout_prob": 0, "hidden_size": 6144,
      "initializer_range": 0.02, "intermediate_size": 24576, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
      "model_type": "gpt_neox", "num_attention_heads": 64, "num_hidden_layers": 44, "rotary_emb_base": 10000,
      "rotary_pct": 0.25, "tie_word_embeddings": false, "torch_dtype": "float16", "use_cache": true,
      "vocab_size": 50432})");
  CHECK((neox_20b.rotary_dim == 24 && neox_20b.mlp == MlpKind::gelu_tanh && neox_20b.block == BlockKind::parallel));
  const Config gpt_j = read(R"({"activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"],
      "attn_pdrop": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256,
      "gradient_checkpointing": false, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gptj",
      "n_embd": 4096, "n_head": 16, "n_inner": null, "n_layer": 28, "n_positions": 2048, "resid_pdrop": 0.0,
      "rotary": true, "rotary_dim": 64, "scale_attn_weights": true, "summary_activation": null,
      "summary_first_dropout": 0.1, "summary_proj_to_labels": true, "summary_type": "cls_index",
      "summary_use_proj": true, "task_specific_params": {"text-generation": {"do_sample": true}},
      "tie_word_embeddings": false, "tokenizer_class": "GPT2Tokenizer", "use_cache": true, "vocab_size": 50400})");
  CHECK((gpt_j.rotary_dim == 64 && gpt_j.head_size == 256 && gpt_j.rope_pairs == RopePairs::interleaved));
  CHECK((gpt_j.mlp_hidden == 16384 && gpt_j.shared_norm && gpt_j.head_bias && gpt_j.context == 2048));
  const Config phi_2 = read(R"({"architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 50256,
      "embd_pdrop": 0.0, "eos_token_id": 50256, "hidden_act": "gelu_new", "hidden_size": 2560,
      "initializer_range": 0.02, "intermediate_size": 10240, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
      "model_type": "phi", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
      "partial_rotary_factor": 0.4, "qk_layernorm": false, "resid_pdrop": 0.1, "rope_scaling": null,
      "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "float16", "use_cache": true,
      "vocab_size": 51200})");
  CHECK((phi_2.rotary_dim == 32 && phi_2.head_size == 80 && phi_2.shared_norm && phi_2.bias));
  const Config glm_4 = read(R"({"architectures": ["GlmForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
      "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
      "initializer_range": 0.02, "intermediate_size": 13696, "max_position_embeddings": 131072, "model_type": "glm",
      "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329,
      "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "tie_word_embeddings": false,
      "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 151552})");
  CHECK((glm_4.rotary_dim == 64 && glm_4.rope_pairs == RopePairs::interleaved && glm_4.norm_eps == 1.5625e-7));
  CHECK((glm_4.qkv_bias && !glm_4.bias));
  const Config qwen2 = read(R"({"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
      "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
      "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
      "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
      "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
      "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936})");
  CHECK((qwen2.qkv_bias && qwen2.tied && qwen2.rope_base == 1e6 && qwen2.norm_eps == 1e-6));
}
#endif

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
  export_model(directory / "out", source_of(directory / "run", c), false);
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

TEST_CASE("huggingface: what no class holds is refused, naming what is in the way") {
  TemporaryDirectory directory;
  auto error = [&](void (*change)(Config&), Config c = small()) {
    change(c);
    write_checkpoint(directory / "run", c);
    const SafeTensors weights(directory / "run/model.safetensors");
    return error_of([&] { family_for(c, weights); });
  };
  CHECK(contains(error([](Config& c) { c.block = BlockKind::parallel; }),
                 "Phi3ForCausalLM comes nearest, and has not --block parallel;"));
  CHECK(contains(error([](Config& c) { c.mlp = MlpKind::gelu; }), "--mlp gelu"));
  CHECK(contains(error([](Config& c) { c.bias = true; }), "Phi3ForCausalLM comes nearest, and has not --bias;"));
  CHECK(contains(error([](Config& c) { c.bias = false; }, neox()), "--no-bias"));
  CHECK(contains(error([](Config& c) { c.kv_heads = 2; }, neox()), "--kv-heads 2"));
  CHECK(contains(error([](Config& c) { c.head_size = 8; }, neox()), "--head-size 8"));
  CHECK(contains(error([](Config& c) { c.qk_norm = true; }, neox()), "--qk-norm"));
  CHECK(contains(error([](Config& c) { c.attention_softcap = 50; }), "has not --attention-softcap 50.0;"));
  // A head without the bias that Phi's has, and attention with biases that GPT-J's has not.
  CHECK(contains(error([](Config& c) { c.head_bias = false; }, phi()), "has not --shared-norm;"));
  CHECK(contains(error([](Config& c) { c.rope_pairs = RopePairs::interleaved; }, phi()),
                 "GPTJForCausalLM comes nearest, and has not layers.0.qkv.bias;"));
}

TEST_CASE("huggingface: weights that are not finite go neither out nor in") {
  TemporaryDirectory directory;
  const Config c = small();
  write_checkpoint(directory / "run", c);
  export_model(directory / "good", source_of(directory / "run", c), false);
  const ParameterTable table = parameter_table(c);
  std::vector<float> weights = random_values<float>(table.total, 77);
  weights[table.rows[3].offset + 1] = -INFINITY;
  write_safetensors(directory / "run/model.safetensors", named(table, weights.data(), ""));
  CHECK(contains(error_of([&] { export_model(directory / "out", source_of(directory / "run", c), true); }),
                 table.rows[3].name));
  std::string bytes = read_text_file(directory / "good/model.safetensors");
  const float nan = NAN;
  std::memcpy(&bytes[bytes.size() - 4], &nan, 4);
  write_text_file(directory / "good/model.safetensors", bytes);
  CHECK(contains(error_of([&] { import_model(directory / "good", directory / "no"); }),
                 "mlp.gate_up_proj.weight has numbers"));
  CHECK(!std::filesystem::exists(directory / "out"));
  CHECK(!std::filesystem::exists(directory / "no"));
}

TEST_CASE("huggingface: special tokens are those of the source; padding ids are not said") {
  TemporaryDirectory directory;
  const Config c = small();  // 264 rows, 257 tokens
  write_checkpoint(directory / "run", c);
  export_model(directory / "out", source_of(directory / "run", c, true), false);
  const auto config = read_json_file(directory / "out/config.json"),
             generation = read_json_file(directory / "out/generation_config.json"),
             names = read_json_file(directory / "out/tokenizer_config.json");
  CHECK(config["eos_token_id"] == 256);
  CHECK(config.at("pad_token_id").is_null());  // their classes give the token that pads no gradient
  CHECK(generation["suppress_tokens"] == nlohmann::json({257, 258, 259, 260, 261, 262, 263}));
  CHECK(names["eos_token"] == "<|endoftext|>");
  CHECK(names["pad_token"].is_null());
  CHECK(config["transformers_version"] == "4.49");

  nlohmann::json theirs = config, of_generation = {{"eos_token_id", {5, 256}}, {"pad_token_id", 256}};
  theirs.update({{"bos_token_id", 7}, {"eos_token_id", 5}});
  write_text_file(directory / "out/config.json", theirs.dump());
  write_text_file(directory / "out/generation_config.json", of_generation.dump());
  import_model(directory / "out", directory / "back");
  const auto state = read_json_file(directory / "back/checkpoint/state.json");
  export_model(directory / "again", source_of(directory / "back/checkpoint", c, false, state["special_tokens"]), false);
  const auto again = read_json_file(directory / "again/config.json"),
             generation_again = read_json_file(directory / "again/generation_config.json");
  CHECK((again["bos_token_id"] == 7 && again["eos_token_id"] == 5 && again.at("pad_token_id").is_null()));
  CHECK(source_of("", c, true, state["special_tokens"]).stop_tokens() == std::vector<int>{256, 5, 5, 256});
  CHECK(generation_again["eos_token_id"] == nlohmann::json({5, 256}));
  CHECK((generation_again["pad_token_id"] == 256 && generation_again["bos_token_id"] == 7));
}

TEST_CASE("huggingface: a config.json that would mean another model is refused, naming the key") {
  const nlohmann::json good = exported_config(family_named("phi3"), small());
  const nlohmann::json good_neox = exported_config(family_named("gpt_neox"), neox());
  const Family* family = nullptr;
  imported_config("config.json", good, family);
  CHECK(family->type == "phi3");
  auto error = [&](const char* key, const nlohmann::json& value, nlohmann::json json) {
    json[key] = value;
    return error_of([&] { imported_config("config.json", json, family); });
  };
  using Json = nlohmann::json;
  const std::vector<std::pair<const char*, Json>> wrong = {
      {"model_type", "mamba"},        {"model_type", 5},              {"hidden_act", "relu"},
      {"rms_norm_eps", -1e-6},        {"rms_norm_eps", "x"},          {"rope_scaling", 4},
      {"attention_bias", true},
      {"quantization_config", {{"quant_method", "fp8"}}},
      {"no_such_key", 1},             {"partial_rotary_factor", nullptr}, {"logit_scale", 0.5},
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
  CHECK(contains(error("rotary_pct", 0.9, good_neox), "rotary_pct"));
  CHECK(contains(error("hidden_act", "quick_gelu", good_neox), "hidden_act"));
  for (const auto& [key, value] : good.items()) {  // without a key: refused, or a default that changes nothing else
    Json json = good;
    json.erase(key);
    const std::string message = error_of([&] { imported_config("config.json", json, family); });
    if (key == "hidden_size" || key == "vocab_size" || key == "model_type" || key == "rms_norm_eps")
      CHECK(contains(message, key == "rms_norm_eps" ? "eps" : key));
  }
  const std::vector<std::pair<const char*, Json>> harmless_keys = {
      {"rope_scaling", nullptr}, {"num_key_value_heads", nullptr},
      {"rms_norm_eps", 9.999999747378752e-06}, {"_name_or_path", "x"}, {"no_such_key", nullptr}};
  for (const auto& [key, value] : harmless_keys) CHECK(error(key, value, good) == "");
  Json full = good;  // without what marks a fraction
  full.erase("rope_scaling"), full.erase("partial_rotary_factor");
  auto rope_error = [&](const char* key, const Json& value) {
    Json parameters = {{key, value}};
    return error("rope_parameters", parameters, full);
  };
  if (!kRotaryDim) CHECK(rope_error("type", "default") == "");
  if (!kRotaryDim) CHECK(rope_error("rope_theta", good["rope_theta"]) == "");
  CHECK(contains(error("rope_scaling", {{"type", "dynamic"}, {"factor", 2}}, good), "rope_type stands there twice"));
  CHECK(contains(error("logit_scale", 0.5, good), "logit_scale is 0.5; that is not known here"));

  CHECK(contains(rope_error("type", "mrope"), "mrope"));
  CHECK(contains(rope_error("factor", 4.0), "factor"));
  CHECK(contains(rope_error("full_attention", {{"rope_type", "default"}}), "full_attention is an object"));
  const std::string list = rope_error("short_factor", std::vector<double>(48, 1.5));
  CHECK((contains(list, "a list of 48") && !contains(list, "1.5")));
  CHECK(contains(error("model_type", "gemma3_text", good), "norms behind the sublayers"));
  Json odd = good;
  odd.erase("rope_parameters"), odd.erase("rope_scaling");
  CHECK(contains(error("partial_rotary_factor", 0.55, odd), "config.json: partial_rotary_factor 0.55 turns 5 of 10"));
  Json moe = good;
  moe["model_type"] = "glm4_moe", moe["first_k_dense_replace"] = 1;
  CHECK(contains(error("use_qk_norm", true, moe), "first_k_dense_replace"));
  Json smol = good;
  smol["model_type"] = "smollm3", smol["no_rope_layers"] = {1, 2};
  CHECK(contains(error("mlp_bias", false, smol), "no_rope_layers"));
  smol.erase("rope_parameters"), smol.erase("rope_scaling");
  smol["no_rope_layers"] = {1, 1};
  smol["partial_rotary_factor"] = 1;
  if (!kRotaryDim) CHECK(error("use_sliding_window", false, smol) == "");
  CHECK(contains(error("layer_types", {"sliding_attention", "full_attention"}, smol), "layer_types"));
  const Json own = exported_config_with_code(small());
  CHECK(own["frequency_scaling"] == "none");
  CHECK(!own.contains("rope_scaling"));  // their library would look into it
  CHECK(contains(error("frequency_scaling", "linear:x", own), "--rope-scaling"));
  CHECK(error("vocab", 264, own) == "");
  CHECK(contains(error("block", "sideways", own), "block sideways"));
  CHECK(contains(error("rotary_dim", 11, own), "11"));
  CHECK(!error("heads", "four", own).empty());
  Json less = own;
  less.erase("rope_pairs");
  CHECK(contains(error("vocab", 264, less), "rope_pairs"));
}
