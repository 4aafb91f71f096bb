#pragma once
// Models to and from Hugging Face's format: a directory with config.json, model.safetensors and tokenizer.json, which
// AutoModelForCausalLM and AutoTokenizer load as it is.
//
//     our block                                               their class
//     sequential, RMSNorm, SwiGLU, R > 0                      Phi3ForCausalLM
//     the same with QK-Norm                                   Glm4MoeForCausalLM, with dense layers only
//     the same, R = 0 (NoPE), no QK-Norm                      SmolLM3ForCausalLM, with no layer rotated
//     LayerNorm, GELU, biases, R > 0, as many key as query heads    GPTNeoXForCausalLM
//     any, with code                                          ours: scripts/modeling_partial_rope.py
//     read only: full rotation                                LlamaForCausalLM
//
// None of theirs holds interleaved pairs, nor the parallel block with RMSNorm. A fraction is written as
// partial_rotary_factor in rope_parameters (Transformers 5) and under the older flat keys, because loaders have quietly
// taken their default where the one that they look for was missing.

#include <list>

#include "eval/source.h"
#include "run/checkpoint.h"
#include "run/flags.h"
#include "python.h"  // made by the Makefile: files of scripts/ as strings
#include "text/tokenizer.h"

// Their tensor `theirs` is rows [row, row + rows) of our tensor `ours`; all of them where rows is 0. per_head: query,
// key and value rows of a head stand together there, as in GPT-NeoX.
struct TensorPart {
  std::string theirs, ours;
  size_t row = 0, rows = 0;
  bool per_head = false;
};

// All tensors of a model of their class `type` (a model_type of config.json) with our configuration.
inline std::vector<TensorPart> tensor_parts(const std::string& type, const Config& c) {
  std::vector<TensorPart> parts;
  if (type == "partial_rope") {  // our class has our names
    for (const ParameterRow& row : parameter_table(c).rows) parts.push_back({row.name, row.name});
    return parts;
  }
  const size_t Q = size_t(c.heads) * c.head_size, K = size_t(c.kv_heads) * c.head_size, F = c.mlp_hidden;
  const bool neox = type == "gpt_neox", fused = type == "phi3";
  parts.push_back({neox ? "gpt_neox.embed_in.weight" : "model.embed_tokens.weight", "embedding.weight"});
  for (int l = 0; l < c.layers; ++l) {
    const std::string ours = "layers." + std::to_string(l) + ".";
    if (neox) {
      const std::string theirs = "gpt_neox.layers." + std::to_string(l) + ".";
      for (const char* kind : {"weight", "bias"}) {
        parts.push_back({theirs + "input_layernorm." + kind, ours + "norm1." + kind});
        parts.push_back({theirs + "post_attention_layernorm." + kind, ours + "norm2." + kind});
        parts.push_back({theirs + "attention.query_key_value." + kind, ours + "qkv." + kind, 0, 0, true});
        parts.push_back({theirs + "attention.dense." + kind, ours + "proj." + kind});
        parts.push_back({theirs + "mlp.dense_h_to_4h." + kind, ours + "up." + kind});
        parts.push_back({theirs + "mlp.dense_4h_to_h." + kind, ours + "down." + kind});
      }
      continue;
    }
    const std::string theirs = "model.layers." + std::to_string(l) + ".";
    parts.push_back({theirs + "input_layernorm.weight", ours + "norm1.weight"});
    parts.push_back({theirs + "post_attention_layernorm.weight", ours + "norm2.weight"});
    parts.push_back({theirs + "self_attn.o_proj.weight", ours + "proj.weight"});
    parts.push_back({theirs + "mlp.down_proj.weight", ours + "down.weight"});
    if (fused) {
      parts.push_back({theirs + "self_attn.qkv_proj.weight", ours + "qkv.weight"});
      parts.push_back({theirs + "mlp.gate_up_proj.weight", ours + "up.weight"});
      continue;
    }
    parts.push_back({theirs + "self_attn.q_proj.weight", ours + "qkv.weight", 0, Q});
    parts.push_back({theirs + "self_attn.k_proj.weight", ours + "qkv.weight", Q, K});
    parts.push_back({theirs + "self_attn.v_proj.weight", ours + "qkv.weight", Q + K, K});
    parts.push_back({theirs + "mlp.gate_proj.weight", ours + "up.weight", 0, F});
    parts.push_back({theirs + "mlp.up_proj.weight", ours + "up.weight", F, F});
    if (c.qk_norm) {
      parts.push_back({theirs + "self_attn.q_norm.weight", ours + "q_norm.weight"});
      parts.push_back({theirs + "self_attn.k_norm.weight", ours + "k_norm.weight"});
    }
  }
  parts.push_back({neox ? "gpt_neox.final_layer_norm.weight" : "model.norm.weight", "final_norm.weight"});
  if (neox) parts.push_back({"gpt_neox.final_layer_norm.bias", "final_norm.bias"});
  if (!c.tied) parts.push_back({neox ? "embed_out.weight" : "lm_head.weight", "head.weight"});
  return parts;
}

// Our row of the qkv matrix that is row r of theirs, whose rows run over heads, then query, key, value, then channels.
inline size_t per_head_row(const Config& c, size_t r) {
  const size_t HS = c.head_size, head = r / (3 * HS), part = r / HS % 3;
  return (part * c.heads + head) * HS + r % HS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Export

// The model_type of theirs that holds this configuration unchanged. UserError with the reason if there is none.
inline std::string model_type_of(const Config& c) {
  auto none = [](const std::string& why) -> std::string {
    throw UserError("export: no class of Hugging Face's library holds this model: " + why +
                    "; --with-code writes it with a class of its own");
  };
  if (c.rope_pairs == RopePairs::interleaved && c.rotary_dim > 0) return none("--rope-pairs interleaved");
  if (c.rope_frequencies != "rotary") return none("--rope-frequencies " + c.rope_frequencies);
  if (c.rope_scaling != "none") return none("--rope-scaling " + c.rope_scaling);
  if (c.rotary_layers != "all") return none("--rotary-layers " + c.rotary_layers);
  if (c.norm == NormKind::layer) {
    if (c.mlp != MlpKind::gelu || !c.bias) return none("--norm layer needs --mlp gelu and --bias (GPT-NeoX)");
    if (c.qk_norm) return none("--norm layer with --qk-norm");
    if (c.rotary_dim == 0) return none("--norm layer without rotation (GPT-NeoX rotates at least 2 channels)");
    if (c.kv_heads != c.heads) return none("--norm layer with fewer key than query heads");
    if (c.head_size * c.heads != c.width) return none("--norm layer with a head size other than width / heads");
    return "gpt_neox";
  }
  if (c.block == BlockKind::parallel) return none("--block parallel with --norm rms (the paper's second model)");
  if (c.mlp != MlpKind::swiglu) return none("--norm rms with --mlp gelu");
  if (c.bias) return none("--norm rms with --bias");
  if (c.qk_norm && c.rotary_dim == 0) return none("--qk-norm without rotation");
  return c.qk_norm ? "glm4_moe" : c.rotary_dim == 0 ? "smollm3" : "phi3";
}

// end_of_text: an id, or -1.
inline void add_special_tokens(nlohmann::ordered_json& json, int end_of_text) {
  for (const char* token : {"bos_token_id", "eos_token_id", "pad_token_id"})
    json[token] = end_of_text >= 0 ? nlohmann::ordered_json(end_of_text) : nlohmann::ordered_json();
}

// R / HS as a number f for which int(f * HS), which is what their library computes, is R.
inline double exported_fraction(int R, int HS) {
  double f = double(R) / HS;
  while (int(f * HS) < R) f = std::nextafter(f, 2.0);
  return f;
}

// config.json of our own class: the model's flags, as in a run's config.json.
inline nlohmann::ordered_json exported_config_with_code(const Config& c, int end_of_text) {
  Settings s;
  s.model = c;
  nlohmann::ordered_json json = settings_json(s, {"Model"});
  json.update({{"architectures", {"PartialRopeForCausalLM"}},
               {"model_type", "partial_rope"},
               {"auto_map", {{"AutoConfig", "modeling_partial_rope.PartialRopeConfig"},
                             {"AutoModelForCausalLM", "modeling_partial_rope.PartialRopeForCausalLM"}}},
               {"torch_dtype", "float32"},
               {"tie_word_embeddings", false},  // the class does that itself
               {"use_cache", false}});
  add_special_tokens(json, end_of_text);
  return json;
}

// config.json of a class of theirs that holds this configuration.
inline nlohmann::ordered_json exported_config(const Config& c, const std::string& type, int end_of_text) {
  const std::map<std::string, const char*> classes = {{"phi3", "Phi3ForCausalLM"},
                                                      {"glm4_moe", "Glm4MoeForCausalLM"},
                                                      {"smollm3", "SmolLM3ForCausalLM"},
                                                      {"gpt_neox", "GPTNeoXForCausalLM"}};
  const double fraction = exported_fraction(c.rotary_dim, c.head_size);
  nlohmann::ordered_json json = {{"architectures", {classes.at(type)}},
                                 {"model_type", type},
                                 {"torch_dtype", "float32"},
                                 {"vocab_size", c.vocab},
                                 {"hidden_size", c.width},
                                 {"intermediate_size", c.mlp_hidden},
                                 {"num_hidden_layers", c.layers},
                                 {"num_attention_heads", c.heads},
                                 {"max_position_embeddings", c.context},
                                 {"tie_word_embeddings", c.tied},
                                 {"initializer_range", 0.02},
                                 {"rope_theta", c.rope_base},
                                 {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", c.rope_base}}}};
  add_special_tokens(json, end_of_text);
  if (type != "smollm3") json["partial_rotary_factor"] = json["rope_parameters"]["partial_rotary_factor"] = fraction;
  if (type == "gpt_neox") {
    json.update({{"hidden_act", "gelu"},
                 {"layer_norm_eps", Config::norm_eps},
                 {"use_parallel_residual", c.block == BlockKind::parallel},
                 {"attention_bias", true},
                 {"rotary_pct", fraction},
                 {"rotary_emb_base", c.rope_base}});
    return json;
  }
  json.update({{"hidden_act", "silu"},
               {"rms_norm_eps", Config::norm_eps},
               {"num_key_value_heads", c.kv_heads},
               {"head_dim", c.head_size},
               {"attention_bias", false}});
  if (type == "phi3") json.update({{"original_max_position_embeddings", c.context}, {"sliding_window", nullptr}});
  if (type == "glm4_moe") json.update({{"use_qk_norm", true}, {"first_k_dense_replace", c.layers}});
  if (type == "smollm3")
    json.update({{"no_rope_layers", std::vector<int>(c.layers, 0)},
                 {"use_sliding_window", false},
                 {"mlp_bias", false}});
  return json;
}

// The tokenizer of bytes as a tokenizer.json: a BPE without merges.
inline nlohmann::ordered_json byte_tokenizer_json() {
  nlohmann::ordered_json vocab;
  for (int b = 0, next = 256; b < 256; ++b) {
    const int code = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174 ? b : next++;
    std::string key;
    if (code < 128) key = char(code);
    else key = {char(0xC0 | code >> 6), char(0x80 | (code & 63))};
    vocab[key] = b;
  }
  vocab["<|endoftext|>"] = 256;
  const nlohmann::ordered_json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens",
           {{{"id", 256}, {"content", "<|endoftext|>"}, {"single_word", false}, {"lstrip", false}, {"rstrip", false},
             {"normalized", false}, {"special", true}}}},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"vocab", vocab},
            {"merges", nlohmann::ordered_json::array()}}}};
}

// Makes a directory whole or not at all: write(path) fills path.part, which is then renamed. UserError if it exists.
template <class Write>
void make_directory(const std::string& path, Write write) {
  namespace fs = std::filesystem;
  if (fs::exists(path)) throw UserError(path + ": exists; choose another name");
  const std::string part = path + ".part";
  std::error_code ignored;
  fs::remove_all(part, ignored);
  try {
    fs::create_directories(part);
    write(part);
    sync_directory(part);
    fs::rename(part, path);
  } catch (const fs::filesystem_error& e) {
    fs::remove_all(part, ignored);
    throw UserError(path + ": cannot write: " + e.code().message());
  } catch (...) {
    fs::remove_all(part, ignored);
    throw;
  }
}

// Writes a checkpoint's weights, with its tokenizer if there is one, to the new directory `out`. with_code: for our own
// class, whose code goes with them. Returns the model_type.
inline std::string export_model(const std::string& out, const Config& c, const std::string& checkpoint,
                                const Tokenizer* tokenizer, bool with_code) {
  const std::string type = with_code ? "partial_rope" : model_type_of(c);
  const ParameterTable table = parameter_table(c);
  std::map<std::string, const ParameterRow*> rows;
  for (const ParameterRow& row : table.rows) rows[row.name] = &row;
  const SafeTensors file(checkpoint + "/model.safetensors");
  std::vector<NamedTensor> tensors;
  std::list<std::vector<float>> reordered;
  for (const TensorPart& part : tensor_parts(type, c)) {
    const ParameterRow& row = *rows.at(part.ours);
    std::vector<size_t> shape = row.shape;
    const size_t columns = row.count / shape[0];
    const float* data = file.get(row.name, row.shape) + part.row * columns;
    if (part.rows) shape[0] = part.rows;
    if (part.per_head) {
      std::vector<float> turned(row.count);
      for (size_t r = 0; r < shape[0]; ++r)
        std::copy_n(data + per_head_row(c, r) * columns, columns, &turned[r * columns]);
      reordered.push_back(std::move(turned));
      data = reordered.back().data();
    }
    tensors.push_back({part.theirs, shape, data, shape[0] * columns});
  }
  const int end_of_text = tokenizer ? tokenizer->end_of_text() : -1;
  const nlohmann::ordered_json config =
      with_code ? exported_config_with_code(c, end_of_text) : exported_config(c, type, end_of_text);
  make_directory(out, [&](const std::string& part) {
    write_safetensors(part + "/model.safetensors", tensors, {{"format", "pt"}});
    write_text_file(part + "/config.json", config.dump(2) + "\n");
    if (with_code) write_text_file(part + "/modeling_partial_rope.py", k_modeling_partial_rope_py);
    if (with_code) write_text_file(part + "/reference.py", k_reference_py);
    if (!tokenizer) return;
    write_text_file(part + "/tokenizer.json", tokenizer->file().empty() ? byte_tokenizer_json().dump() + "\n"
                                                                        : read_text_file(tokenizer->file()));
    const nlohmann::ordered_json special = {{"bos_token", "<|endoftext|>"},
                                            {"eos_token", "<|endoftext|>"},
                                            {"pad_token", "<|endoftext|>"},
                                            {"unk_token", nullptr},
                                            {"tokenizer_class", "PreTrainedTokenizerFast"},
                                            {"clean_up_tokenization_spaces", false},
                                            {"model_max_length", c.context}};
    write_text_file(part + "/tokenizer_config.json", special.dump(2) + "\n");
    const nlohmann::ordered_json generation = {
        {"bos_token_id", end_of_text}, {"eos_token_id", end_of_text}, {"pad_token_id", end_of_text}};
    write_text_file(part + "/generation_config.json", generation.dump(2) + "\n");
  });
  return type;
}

// ---------------------------------------------------------------------------------------------------------------------
// Import

// Our configuration from their config.json. UserError, naming the key, for whatever our model would compute otherwise.
inline Config imported_config(const std::string& path, const nlohmann::json& json, std::string& type) {
  auto fail = [&](const std::string& what) { throw UserError(path + ": " + what); };
  if (!json.is_object()) fail("not a model's configuration");
  auto at = [&](const char* key) -> const nlohmann::json& {
    if (!json.contains(key)) fail(std::string("has no ") + key);
    return json[key];
  };
  auto whole = [&](const char* key) {
    const nlohmann::json& value = at(key);
    if (!value.is_number_integer() || value.get<int64_t>() < 1 || value.get<int64_t>() > INT32_MAX)
      fail(std::string(key) + " is " + value.dump() + "; it must be a number from 1 up");
    return value.get<int>();
  };
  auto truth = [&](const char* key, bool otherwise) {
    if (!json.contains(key)) return otherwise;
    if (!json[key].is_boolean()) fail(std::string(key) + " is " + json[key].dump() + "; it must be true or false");
    return json[key].get<bool>();
  };
  // What must have one value, or be missing or null.
  auto only = [&](const char* key, const nlohmann::json& value) {
    if (json.contains(key) && !json[key].is_null() && json[key] != value)
      fail(std::string(key) + " is " + json[key].dump() + "; only " + value.dump() + " can be imported");
  };
  type = at("model_type").is_string() ? json["model_type"].get<std::string>() : json["model_type"].dump();
  const std::set<std::string> known = {"phi3", "glm4_moe", "smollm3", "gpt_neox", "llama", "partial_rope"};
  if (!known.count(type))
    fail("model_type " + type + " cannot be imported; phi3, glm4_moe, smollm3, gpt_neox, llama and partial_rope can");
  Config c;
  if (type == "partial_rope") {
    Settings s;
    const nlohmann::ordered_json needed = settings_json(s, {"Model"});
    // Older exports lack these.
    const std::set<std::string> later = {"rope_frequencies", "rope_scaling", "rotary_layers"};
    for (const auto& [key, value] : needed.items())
      if (!later.count(key)) at(key.c_str());
    c = settings_from_json(path, json).model;
    try {
      resolve(c);
    } catch (const UserError& e) {
      fail(e.what());
    }
    return c;
  }
  const bool neox = type == "gpt_neox";
  c.vocab = whole("vocab_size"), c.width = whole("hidden_size"), c.mlp_hidden = whole("intermediate_size");
  c.layers = whole("num_hidden_layers"), c.heads = whole("num_attention_heads");
  c.context = whole("max_position_embeddings");
  c.kv_heads = !neox && json.contains("num_key_value_heads") ? whole("num_key_value_heads") : c.heads;
  const bool has_head_dim = !neox && json.contains("head_dim") && !json["head_dim"].is_null();
  c.head_size = has_head_dim ? whole("head_dim") : 0;
  if (!c.head_size && c.width % c.heads) fail("num_attention_heads does not divide hidden_size");
  if (!c.head_size) c.head_size = c.width / c.heads;
  c.tied = truth("tie_word_embeddings", type == "smollm3");
  only("rope_scaling", nullptr);
  only(neox ? "layer_norm_eps" : "rms_norm_eps", Config::norm_eps);
  if (!json.contains(neox ? "layer_norm_eps" : "rms_norm_eps")) fail("does not say the norm's eps");
  only("hidden_act", neox ? "gelu" : "silu");
  if (neox) {
    c.norm = NormKind::layer, c.mlp = MlpKind::gelu, c.bias = true;
    c.block = truth("use_parallel_residual", true) ? BlockKind::parallel : BlockKind::sequential;
    only("attention_bias", true);
  } else {
    only("attention_bias", false);
    only("mlp_bias", false);
    only("use_sliding_window", false);
    if (type == "phi3" && json.contains("sliding_window") && !json["sliding_window"].is_null() &&
        whole("sliding_window") < c.context)
      fail("sliding_window is shorter than max_position_embeddings; attention here sees everything");
    c.qk_norm = type == "glm4_moe" && truth("use_qk_norm", false);
    if (type == "glm4_moe" && (json.contains("first_k_dense_replace") ? whole("first_k_dense_replace") : 1) < c.layers)
      fail("first_k_dense_replace is below num_hidden_layers: mixtures of experts cannot be imported");
  }

  // The rotation: rope_parameters (Transformers 5) and older flat keys may stand side by side, and must then agree.
  const nlohmann::json parameters = json.value("rope_parameters", nlohmann::json());
  if (parameters.is_object() && parameters.contains("rope_type") && parameters["rope_type"] != "default")
    fail("rope_type " + parameters["rope_type"].dump() + " cannot be imported; only \"default\" can");
  auto number = [&](const char* name, std::vector<const char*> flat, double otherwise) {
    double found = NAN;
    auto take = [&](const nlohmann::json& from, const char* key) {
      if (!from.is_object() || !from.contains(key) || from[key].is_null()) return;
      if (!from[key].is_number()) fail(std::string(key) + " is " + from[key].dump() + ", not a number");
      const double value = from[key].get<double>();
      if (!std::isnan(found) && found != value) fail(std::string(key) + " stands there twice and disagrees");
      found = value;
    };
    take(parameters, name);
    for (const char* key : flat) take(json, key);
    return std::isnan(found) ? otherwise : found;
  };
  c.rope_base = number("rope_theta", {"rope_theta", "rotary_emb_base"}, 10000);
  const double fraction = number("partial_rotary_factor", {"partial_rotary_factor", "rotary_pct"},
                                 neox ? 0.25 : type == "glm4_moe" ? 0.5 : 1.0);
  if (!(fraction >= 0 && fraction <= 1)) fail("partial_rotary_factor is not between 0 and 1");
  if (type == "llama" && fraction != 1) fail("LlamaForCausalLM ignores partial_rotary_factor");
  c.rotary_dim = int(fraction * c.head_size);
  if (type == "smollm3") {
    const nlohmann::json layers = json.value("no_rope_layers", nlohmann::json::array());
    auto every = [&](int value) {
      return layers.is_array() && layers.size() == size_t(c.layers) &&
             std::all_of(layers.begin(), layers.end(), [&](const nlohmann::json& layer) { return layer == value; });
    };
    const bool none = every(0), all = every(1);
    if (!none && !all) fail("no_rope_layers rotates some layers and not others, which cannot be imported");
    c.rotary_dim = none ? 0 : c.head_size;
  }
  resolve(c);
  return c;
}

// n numbers of F32, F16 or BF16 as fp32.
inline float from_half(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * std::ldexp(float(exponent ? 1024 + fraction : fraction), (exponent ? exponent : 1) - 25);
}
inline void to_fp32(float* to, const char* from, const std::string& dtype, size_t n) {
  if (dtype == "F32") return void(std::memcpy(to, from, n * 4));
#pragma omp parallel for
  for (size_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    const uint32_t word = uint32_t(bits) << 16;
    if (dtype == "F16") to[i] = from_half(bits);
    else std::memcpy(&to[i], &word, 4);
  }
}

// Reads the model in directory `from` and writes it as the new run `run_directory`, whose checkpoint is of step 0.
// Returns its settings.
inline Settings import_model(const std::string& from, const std::string& run_directory) {
  std::string type;
  Settings s;
  s.model = imported_config(from + "/config.json", read_json_file(from + "/config.json"), type);

  // One file of tensors, or several with an index.
  std::vector<std::string> names = {"model.safetensors"};
  const std::string index_path = from + "/model.safetensors.index.json";
  if (std::filesystem::exists(index_path)) {
    const nlohmann::json index = read_json_file(index_path);
    std::set<std::string> files;
    if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object())
      throw UserError(index_path + ": has no weight_map");
    for (const auto& [tensor, file] : index["weight_map"].items()) {
      if (!file.is_string() || file.get<std::string>().find('/') != std::string::npos)
        throw UserError(index_path + ": tensor " + tensor + " is in " + file.dump() + ", not a file beside it");
      files.insert(file.get<std::string>());
    }
    names.assign(files.begin(), files.end());
  }
  std::list<SafeTensors> files;
  std::map<std::string, std::pair<const SafeTensors::Tensor*, std::string>> theirs;  // tensor, file
  for (const std::string& name : names) {
    files.emplace_back(from + "/" + name);
    for (const auto& [tensor, entry] : files.back().tensors)
      if (!theirs.insert({tensor, {&entry, from + "/" + name}}).second)
        throw UserError(from + "/" + name + ": tensor " + tensor + " is in another file, too");
  }

  // Everything is checked before anything of the model's size is allocated.
  const ParameterTable table = parameter_table(s.model);
  std::map<std::string, const ParameterRow*> rows;
  for (const ParameterRow& row : table.rows) rows[row.name] = &row;
  const std::vector<TensorPart> parts = tensor_parts(type, s.model);
  std::set<std::string> used;
  for (const TensorPart& part : parts) {
    const auto found = theirs.find(part.theirs);
    if (found == theirs.end()) throw UserError(from + ": has no tensor " + part.theirs);
    const auto& [tensor, file] = found->second;
    std::vector<size_t> shape = rows.at(part.ours)->shape;
    if (part.rows) shape[0] = part.rows;
    if (tensor->shape != shape)
      throw UserError(file + ": tensor " + part.theirs + " has not the shape that config.json says");
    if (tensor->dtype != "F32" && tensor->dtype != "F16" && tensor->dtype != "BF16")
      throw UserError(file + ": tensor " + part.theirs + " is " + tensor->dtype + "; F32, F16 and BF16 can be read");
    used.insert(part.theirs);
  }
  for (const auto& entry : theirs) {
    const std::string &tensor = entry.first, &file = entry.second.second;
    auto ends = [&](const std::string& end) {
      return tensor.size() >= end.size() && tensor.compare(tensor.size() - end.size(), end.size(), end) == 0;
    };
    const bool buffer = ends("rotary_emb.inv_freq") || ends("attention.bias") || ends("attention.masked_bias");
    const bool tied = s.model.tied && (tensor == "lm_head.weight" || tensor == "embed_out.weight");
    if (!used.count(tensor) && !buffer && !tied)
      throw UserError(file + ": tensor " + tensor + " has no place in this model");
  }

  std::vector<float> flat(table.total);
  std::vector<float> values;
  for (const TensorPart& part : parts) {
    const ParameterRow& row = *rows.at(part.ours);
    const size_t columns = row.count / row.shape[0];
    const SafeTensors::Tensor& tensor = *theirs.at(part.theirs).first;
    float* to = &flat[row.offset + part.row * columns];
    if (!part.per_head) {
      to_fp32(to, tensor.data, tensor.dtype, tensor.count);
      continue;
    }
    values.resize(tensor.count);
    to_fp32(values.data(), tensor.data, tensor.dtype, tensor.count);
    for (size_t r = 0; r < row.shape[0]; ++r)
      std::copy_n(&values[r * columns], columns, to + per_head_row(s.model, r) * columns);
  }

  // Its tokenizer, if it is one that is known here.
  std::unique_ptr<Tokenizer> tokenizer;
  if (std::filesystem::exists(from + "/tokenizer.json")) {
    try {
      tokenizer = make_tokenizer("tokenizer.json", from);
      if (tokenizer->vocabulary() > s.model.vocab) throw UserError("it has more tokens than the model");
    } catch (const UserError& e) {
      std::fprintf(stderr, "note: without its tokenizer: %s\n", e.what());
      tokenizer.reset();
    }
  }
  s.run = std::filesystem::path(run_directory).filename().string();
  const nlohmann::ordered_json state = {{"step", 0},
                                        {"tokens", 0},
                                        {"seed", s.seed},
                                        {"tokenizer", tokenizer ? tokenizer->name() : ""},
                                        {"vocabulary", tokenizer ? tokenizer->vocabulary() : s.model.vocab},
                                        {"settings", settings_json(s)}};
  make_directory(run_directory, [&](const std::string& part) {
    std::filesystem::create_directory(part + "/checkpoint");
    write_safetensors(part + "/checkpoint/model.safetensors", named(table, flat.data(), ""));
    write_text_file(part + "/checkpoint/state.json", state.dump(2) + "\n");
    write_text_file(part + "/config.json", settings_json(s).dump(2) + "\n");
    if (tokenizer) write_text_file(part + "/tokenizer.json", read_text_file(tokenizer->file()));
  });
  return s;
}

// ---------------------------------------------------------------------------------------------------------------------

inline void command_export(const std::vector<std::string>& args) {
  std::string run, out;
  bool with_code = false;
  Flags f("Writes a model as a directory that Hugging Face's AutoModelForCausalLM loads.", "eval export");
  f.group("Model");
  add_run_flag(f, run);
  f.add("out", out, "the directory to make");
  f.add("with-code", with_code, "for any model: our own class goes with it; load with trust_remote_code=True");
  f.parse(args);
  if (out.empty()) throw UserError("--out: name the directory to write to");
  const Source source = open_source(run);
  const std::string type =
      export_model(out, source.settings.model, source.checkpoint, source.tokenizer.get(), with_code);
  std::printf("%s: %s from %s%s\n", out.c_str(), type.c_str(), describe(source).c_str(),
              source.tokenizer ? "" : "; its tokenizer is not known, so there is none in it");
}

inline void command_import(const std::vector<std::string>& args) {
  std::string run, from;
  Flags f("Reads a Hugging Face model of a class that this project knows into a run.", "eval import");
  f.group("Model");
  f.add("from", from, "directory with config.json and model.safetensors");
  f.add("run", run, "name of the run to make in runs/")->type_name("NAME");
  f.parse(args);
  if (from.empty()) throw UserError("--from: name the directory to read");
  if (run.empty()) throw UserError("--run: name the run to make");
  Settings s = import_model(from, "runs/" + run);
  const Config& c = s.model;
  std::printf("runs/%s: %d layers, width %d, %.2f M parameters; RoPE turns %d of %d channels\n", run.c_str(), c.layers,
              c.width, double(parameter_table(c).parameters) * 1e-6, c.rotary_dim, c.head_size);
}
