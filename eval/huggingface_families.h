#pragma once
// The classes of Hugging Face's library that hold models of ours: a row each in families(), which says how the keys of
// their config.json and their tensors map to our Config and our parameters. Reading and writing go by the same row.
//
// To add a class: a row with what it always has, its keys, and its tensors. scripts/parity.py must then have it, too.

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "model.h"
#include "run/error.h"

// A model as a config.json of theirs describes it.
struct Described {
  Config c;
  std::set<std::string> biases;  // of our linear layers, those that have one there: qkv, proj, up, down
  std::vector<bool> rotated;     // by layer; empty: all are
};

// One key of config.json and what it is here.
struct Key {
  using Json = nlohmann::json;
  std::string name;
  Json missing, null;  // what counts where the key is missing, or null; a null of ours leaves the Config as it is
  std::function<std::string(Described&, const Json&)> read;  // returns what would be right, or nothing if all is well
  std::function<Json(const Described&)> write;               // discarded: the key is not written
};

inline const nlohmann::json refused = nlohmann::json(nlohmann::json::value_t::discarded);

// A value as it stands in a message: lists and objects can be long.
inline std::string shown(const nlohmann::json& value) {
  if (value.is_array()) return "a list of " + std::to_string(value.size());
  if (value.is_object()) return "an object";
  const std::string text = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  return text.size() <= 60 ? text : text.substr(0, 60) + "...";
}

// ---- Kinds of keys

inline Key whole(const char* name, int Config::*member, nlohmann::json missing = refused,
                 nlohmann::json null = refused) {
  return {name, missing, null,
          [=](Described& d, const nlohmann::json& value) -> std::string {
            if (!value.is_number_integer() || value.get<int64_t>() < 1 || value.get<int64_t>() > INT32_MAX)
              return "it must be a number from 1 up";
            d.c.*member = value.get<int>();
            return "";
          },
          [=](const Described& d) { return d.c.*member; }};
}

// Values of theirs and what they are here; the first that fits is written.
template <class T>
Key choice(const char* name, T Config::*member, std::vector<std::pair<nlohmann::json, T>> values,
           nlohmann::json missing = refused) {
  return {name, missing, missing,
          [=](Described& d, const nlohmann::json& value) {
            std::string all;
            for (const auto& [theirs, ours] : values) {
              if (value == theirs) return d.c.*member = ours, std::string();
              all += (all.empty() ? "only " : " or ") + theirs.dump();
            }
            return all + " can be imported";
          },
          [=](const Described& d) {
            for (const auto& [theirs, ours] : values)
              if (d.c.*member == ours) return theirs;
            return nlohmann::json();  // what is read from it will not be the model that was to be written
          }};
}

inline Key truth(const char* name, bool Config::*member, bool missing) {
  return choice<bool>(name, member, {{true, true}, {false, false}}, missing);
}

// The key is here for what it must be.
inline Key fixed(const char* name, nlohmann::json only) {
  return {name, only, only,
          [=](Described&, const nlohmann::json& value) {
            return value == only ? "" : "only " + only.dump() + " can be imported";
          },
          [=](const Described&) { return only; }};
}

// Whether the linear layers `which` have biases.
inline Key biases(const char* name, std::set<std::string> which, bool missing) {
  return {name, missing, missing,
          [=](Described& d, const nlohmann::json& value) {
            if (!value.is_boolean()) return "it must be true or false";
            if (value == true) d.biases.insert(which.begin(), which.end());
            return "";
          },
          [=](const Described& d) { return d.biases.count(*which.begin()) > 0; }};
}

inline Key norm_eps(const char* name) {
  return {name, refused, refused,
          [](Described&, const nlohmann::json& value) {
            const bool same = value.is_number() && value.get<float>() == float(Config().norm_eps);  // some files print fp32
            return same ? "" : "only " + nlohmann::json(Config().norm_eps).dump() + " can be imported";
          },
          [](const Described&) { return Config().norm_eps; }};
}

// Attention to the last so many positions only; here it sees all. Read after max_position_embeddings.
inline Key sliding_window(nlohmann::json missing) {
  return {"sliding_window", missing, nullptr,
          [](Described& d, const nlohmann::json& value) {
            if (!value.is_number_integer()) return "it must be a whole number";
            return value >= d.c.context ? "" : "attention here sees all positions, max_position_embeddings of them";
          },
          [](const Described&) { return nullptr; }};
}

// Sizes of what the file must say is not used.
inline Key unused(const char* name) {
  return {name, nullptr, nullptr, [](Described&, const nlohmann::json&) { return ""; },
          [](const Described&) { return refused; }};
}

inline Key layer_types() {
  return {"layer_types", nullptr, nullptr,
          [](Described&, const nlohmann::json& value) {
            bool full = value.is_array();
            for (const nlohmann::json& type : value) full = full && type == "full_attention";
            return full ? "" : "only layers of \"full_attention\" can be imported";
          },
          [](const Described&) { return refused; }};
}

// GLM-4.5's mixtures of experts begin behind so many plain layers.
inline Key plain_layers(const char* name) {
  return {name, 1, 1,
          [](Described& d, const nlohmann::json& value) {
            if (!value.is_number_integer()) return "it must be a whole number";
            return value >= d.c.layers ? "" : "the layers behind it are mixtures of experts, which cannot be imported";
          },
          [](const Described& d) { return d.c.layers; }};
}

// SmolLM3: 1 for every layer that is rotated, in full, and 0 for every other. Where the list is missing, every fourth
// layer, or another number of them, is not rotated.
inline Key no_rope_layers() {
  return {"no_rope_layers", nullptr, nullptr,
          [](Described& d, const nlohmann::json& value) {
            bool good = value.is_array() && value.size() == size_t(d.c.layers);
            d.rotated.clear();
            for (const nlohmann::json& layer : value) {
              good = good && (layer == 0 || layer == 1);
              d.rotated.push_back(layer == 1);
            }
            return good ? "" : "it must be a list of 0 and 1, a number for each layer";
          },
          [](const Described& d) {
            std::vector<int> rotated;
            for (int R : d.c.rotary_dims()) rotated.push_back(R > 0);
            return rotated;
          }};
}
inline Key no_rope_layer_interval() {
  return {"no_rope_layer_interval", 4, 4,
          [](Described& d, const nlohmann::json& value) {
            if (!value.is_number_integer() || value < 1 || value > INT32_MAX) return "it must be a number from 1 up";
            for (int l = 0; l < d.c.layers; ++l) d.rotated.push_back((l + 1) % value.get<int>() != 0);
            return "";
          },
          [](const Described&) { return refused; }};
}

// ---- Tensors

// Which rows of our matrix a tensor of theirs is, and in which order.
enum class Rows { all, query, key, value, gate, up, by_head, by_shard };

struct TensorRow {
  std::string theirs, ours;  // without ".weight" or ".bias"; # is the number of the layer
  Rows rows = Rows::all;
};

// How many rows of ours, which has `all`, the tensor of theirs has.
inline size_t rows_of(Rows rows, const Config& c, size_t all) {
  if (rows == Rows::query) return size_t(c.heads) * c.head_size;
  if (rows == Rows::key || rows == Rows::value) return size_t(c.kv_heads) * c.head_size;
  return rows == Rows::gate || rows == Rows::up ? all / 2 : all;
}

// Our row that is row r of theirs. Our qkv is queries, keys, values; our up matrix of SwiGLU is gate, up.
inline size_t our_row(Rows rows, const Config& c, size_t r) {
  const size_t HS = c.head_size, Q = size_t(c.heads) * HS;
  switch (rows) {
    case Rows::key: return Q + r;
    case Rows::value: return Q + size_t(c.kv_heads) * HS + r;
    case Rows::up: return size_t(c.mlp_hidden) + r;
    case Rows::by_head: return r / HS % 3 * Q + r / (3 * HS) * HS + r % HS;  // (heads, (q, k, v), HS)
    case Rows::by_shard: {                                                   // CodeGen: (4, (q, v, k), heads / 4, HS)
      const size_t part = r / (Q / 4) % 3;
      return (part == 0 ? 0 : 3 - part) * Q + r / (3 * Q / 4) * (Q / 4) + r % (Q / 4);
    }
    default: return r;
  }
}

// ---- The rotation

struct Rotation {
  double fraction = 1;  // where the file does not say it
  bool partial = true;  // false: the class turns all channels, whatever the file says
  bool none = true;     // false: where nothing is to be turned, the class fails
  const char *fraction_key = "partial_rotary_factor", *base_key = "rope_theta";  // outside of rope_parameters
  double base = 10000;
};

struct Family {
  std::string type, architecture;
  std::string since;  // the first version of Transformers that computes it as it is written here; empty: read only
  Config always;      // what every model of the class has: norm, MLP, block, pairs
  std::set<std::string> biases;  // that every model of the class has
  Rotation rotation;
  std::vector<Key> keys;
  std::vector<TensorRow> tensors;
};

template <class T>
std::vector<T> operator+(std::vector<T> a, const std::vector<T>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// ---- What many classes share

inline std::vector<Key> size_keys() {
  return {whole("vocab_size", &Config::vocab), whole("hidden_size", &Config::width),
          whole("intermediate_size", &Config::mlp_hidden), whole("num_hidden_layers", &Config::layers),
          whole("num_attention_heads", &Config::heads), whole("max_position_embeddings", &Config::context)};
}
// Where a class has a default of its own for the number of key/value heads, the file must say it.
inline Key kv_heads(nlohmann::json missing = refused) {
  return whole("num_key_value_heads", &Config::kv_heads, missing, nullptr);
}
inline Key head_dim() { return whole("head_dim", &Config::head_size, nullptr, nullptr); }
inline Key silu() { return choice<MlpKind>("hidden_act", &Config::mlp, {{"silu", MlpKind::swiglu}}, "silu"); }
inline Key tied(bool missing = false) { return truth("tie_word_embeddings", &Config::tied, missing); }

inline std::vector<Key> llama_keys(bool tied_missing = false) {
  return size_keys() + std::vector<Key>{head_dim(), silu(), norm_eps("rms_norm_eps"), tied(tied_missing)};
}
inline std::vector<Key> no_window_keys() {
  return {fixed("use_sliding_window", false), unused("sliding_window"), unused("max_window_layers"), layer_types()};
}

inline std::vector<TensorRow> llama_tensors(bool fused_qkv, bool fused_up) {
  const std::string theirs = "model.layers.#.", ours = "layers.#.";
  std::vector<TensorRow> rows = {{"model.embed_tokens", "embedding"},
                                 {theirs + "input_layernorm", ours + "norm1"},
                                 {theirs + "post_attention_layernorm", ours + "norm2"},
                                 {theirs + "self_attn.q_norm", ours + "q_norm"},
                                 {theirs + "self_attn.k_norm", ours + "k_norm"},
                                 {theirs + "self_attn.o_proj", ours + "proj"},
                                 {theirs + "mlp.down_proj", ours + "down"},
                                 {"model.norm", "final_norm"},
                                 {"lm_head", "head"}};
  if (fused_qkv) rows.push_back({theirs + "self_attn.qkv_proj", ours + "qkv"});
  else
    for (auto [name, part] : {std::pair{"q", Rows::query}, {"k", Rows::key}, {"v", Rows::value}})
      rows.push_back({theirs + "self_attn." + name + "_proj", ours + "qkv", part});
  if (fused_up) rows.push_back({theirs + "mlp.gate_up_proj", ours + "up"});
  else
    for (auto [name, part] : {std::pair{"gate", Rows::gate}, {"up", Rows::up}})
      rows.push_back({theirs + "mlp." + name + "_proj", ours + "up", part});
  return rows;
}

inline std::vector<TensorRow> neox_tensors() {
  const std::string theirs = "gpt_neox.layers.#.", ours = "layers.#.";
  return {{"gpt_neox.embed_in", "embedding"},
          {theirs + "input_layernorm", ours + "norm1"},
          {theirs + "post_attention_layernorm", ours + "norm2"},
          {theirs + "attention.query_key_value", ours + "qkv", Rows::by_head},
          {theirs + "attention.dense", ours + "proj"},
          {theirs + "mlp.dense_h_to_4h", ours + "up"},
          {theirs + "mlp.dense_4h_to_h", ours + "down"},
          {"gpt_neox.final_layer_norm", "final_norm"},
          {"embed_out", "head"}};
}

// ---- The classes. `export` takes the first that holds a model.

inline const std::vector<Family>& families() {
  using Keys = std::vector<Key>;
  static const std::vector<Family> table = [] {
    Keys experts;  // GLM-4.5's
    for (const char* name : {"moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob",
                             "num_experts_per_tok", "num_local_experts", "num_mtp_layers", "num_nextn_predict_layers",
                             "output_router_logits", "routed_scaling_factor", "topk_group"})
      experts.push_back(unused(name));
    Config rms, rms_qk, layer_swiglu, layer_gelu;
    rms_qk.qk_norm = true;
    layer_swiglu.norm = layer_gelu.norm = NormKind::layer;
    layer_gelu.mlp = MlpKind::gelu;
    const std::set<std::string> attention = {"qkv", "proj"}, mlp = {"up", "down"};
    const Rotation full = {1, false}, part;
    Rotation all_or_none = {1, false};
    all_or_none.base = 2000000;
    Rotation neox = {0.25};
    neox.fraction_key = "rotary_pct", neox.base_key = "rotary_emb_base";
    return std::vector<Family>{
        {"llama", "LlamaForCausalLM", "4.48", rms, {}, full,
         llama_keys() + Keys{kv_heads(nullptr), biases("attention_bias", attention, false), biases("mlp_bias", mlp, false)},
         llama_tensors(false, false)},
        {"mistral", "MistralForCausalLM", "", rms, {}, full,
         llama_keys() + Keys{kv_heads(), sliding_window(4096)}, llama_tensors(false, false)},
        {"smollm3", "SmolLM3ForCausalLM", "4.53", rms, {}, all_or_none,
         llama_keys(true) + Keys{kv_heads(), no_rope_layer_interval(), no_rope_layers(), biases("attention_bias", attention, false),
                                 biases("mlp_bias", mlp, false)} + no_window_keys(),
         llama_tensors(false, false)},
        {"phi3", "Phi3ForCausalLM", "4.49", rms, {}, part,
         llama_keys() + Keys{kv_heads(nullptr), sliding_window(nullptr)}, llama_tensors(true, true)},
        {"glm4_moe", "Glm4MoeForCausalLM", "4.54", rms_qk, {}, {0.5},
         llama_keys() + Keys{kv_heads(), truth("use_qk_norm", &Config::qk_norm, false),
                             plain_layers("first_k_dense_replace"), biases("attention_bias", {"qkv"}, false)} + experts,
         llama_tensors(false, false)},
        {"gpt_neox", "GPTNeoXForCausalLM", "4.25", layer_gelu, mlp, neox,
         size_keys() + Keys{choice<MlpKind>("hidden_act", &Config::mlp, {{"gelu", MlpKind::gelu}}, "gelu"),
                            norm_eps("layer_norm_eps"), tied(), biases("attention_bias", attention, true),
                            choice<BlockKind>("use_parallel_residual", &Config::block,
                                              {{true, BlockKind::parallel}, {false, BlockKind::sequential}}, true)},
         neox_tensors()},
        {"stablelm", "StableLmForCausalLM", "4.38", layer_swiglu, {}, {0.25, true, false},
         size_keys() + Keys{kv_heads(), silu(), norm_eps("layer_norm_eps"), tied(),
                            biases("use_qkv_bias", {"qkv"}, false), fixed("qk_layernorm", false),
                            fixed("use_parallel_residual", false)},
         llama_tensors(false, false)},
    };
  }();
  return table;
}

// ---------------------------------------------------------------------------------------------------------------------

// Why well-known families are not in the table.
inline std::string reason_against(const std::string& type) {
  static const std::vector<std::pair<std::string, std::set<std::string>>> reasons = {
      {"mixtures of experts",
       {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "phimoe", "gpt_oss", "glm4_moe_lite",
        "granitemoe", "ernie4_5_moe", "minimax", "dbrx", "jetmoe", "llama4", "llama4_text"}},
      {"linear attention or recurrence",
       {"qwen3_next", "recurrent_gemma", "mamba", "mamba2", "jamba", "bamba", "rwkv", "falcon_mamba", "falcon_h1", "zamba",
        "zamba2", "lfm2", "granitemoehybrid"}},
      {"norms behind the sublayers", {"glm4", "olmo2", "olmo3", "gemma2", "gemma3", "gemma3_text", "exaone4"}},
      {"squared ReLU", {"nemotron", "persimmon"}},
      {"norms with 1 + weight and scaled embeddings", {"gemma"}},
      {"norms without weights", {"olmo"}},
      {"factors on embeddings, residuals or logits", {"granite", "cohere", "cohere2", "minicpm"}},
      {"learned or no rotary positions", {"gpt2", "gpt_bigcode", "gpt_neo", "opt", "mpt", "bloom"}},
      {"attention of a kind of its own", {"falcon", "starcoder2", "chatglm"}}};
  for (const auto& [reason, types] : reasons)
    if (types.count(type)) return reason;
  return "";
}

// Keys of config.json that change nothing that is computed here, whatever they say; or at one value only. Dropout is
// of their training. A key that is neither here nor in the family's row is refused.
inline bool harmless(const std::string& name, const nlohmann::json& value) {
  static const std::set<std::string> always = {
      // names, and the form of the file
      "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "finetuning_task",
      "id2label", "label2id", "model_type", "pad_token_id", "problem_type", "sep_token_id", "task_specific_params",
      "tokenizer_class", "torch_dtype", "transformers.js_config", "transformers_version", "unsloth_fixed",
      "unsloth_version", "is_llama_config", "num_labels", "unk_token_id", "decoder_start_token_id", "mask_token_id",
      // of training
      "attention_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop", "gradient_checkpointing",
      "hidden_dropout", "initializer_range", "resid_pdrop", "embedding_dropout",
      // how it is computed, not what
      "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "chunk_size_feed_forward",
      "output_attentions", "output_hidden_states", "pretraining_tp", "return_dict", "torchscript", "use_bfloat16",
      "use_cache", "is_decoder",
      // of generation, and of classifiers
      "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
      "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
      "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
      "num_beams", "num_return_sequences", "prefix", "remove_invalid_values", "repetition_penalty",
      "return_dict_in_generate", "output_scores", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
      "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"};
  static const std::map<std::string, nlohmann::json> at = {
      {"add_cross_attention", false}, {"attention_bias", false},         {"full_attn_mod", 1},
      {"interpolate_factor", 1},      {"is_encoder_decoder", false},
      {"lm_head_bias", false},        {"mlp_bias", false},               {"pruned_heads", nlohmann::json::object()},
      {"qk_layernorm", false},        {"rope_interleaved", false},       {"rotary", true},
      {"rotary_scaling_factor", 1},   {"scale_attn_weights", true},      {"tie_encoder_decoder", false},
      {"use_mrope", false},           {"cross_attention_hidden_size", nullptr}, {"tf_legacy_loss", false},
      {"use_sliding_window", false},  {"use_qk_norm", false}};
  if (value.is_null() || always.count(name)) return true;
  const auto found = at.find(name);
  return found != at.end() && found->second == value;
}

// ---------------------------------------------------------------------------------------------------------------------
// The rotation: rope_parameters (Transformers 5), rope_scaling and flat keys (4) may stand side by side, and must then
// agree. UserError, naming the key.

// Names under which fraction and base stand outside of rope_parameters; a class heeds one of each.
inline const std::vector<const char*> fraction_keys = {"partial_rotary_factor", "rotary_pct"};
inline const std::vector<const char*> base_keys = {"rope_theta", "rotary_emb_base"};

// What rope_parameters and rope_scaling say together.
inline nlohmann::json rope_settings(const nlohmann::json& json) {
  nlohmann::json settings = nlohmann::json::object();
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    const nlohmann::json from = json.value(name, nlohmann::json());
    if (from.is_null()) continue;
    if (!from.is_object()) throw UserError(std::string(name) + " is " + shown(from) + ", not an object");
    for (const auto& [their_key, value] : from.items()) {
      const std::string key = their_key == "type" ? "rope_type" : their_key;
      if (value.is_null()) continue;
      if (settings.contains(key) && settings[key] != value)
        throw UserError(key + " stands there twice and disagrees: " + shown(settings[key]) + " and " + shown(value));
      settings[key] = value;
    }
  }
  return settings;
}

// A number from `settings`, else from the class's flat key, else `otherwise`; every other place must agree.
inline double rope_number(const nlohmann::json& json, const nlohmann::json& settings, const char* name,
                          const char* family_key, const std::vector<const char*>& flat_keys, double otherwise) {
  double found = NAN;
  auto take = [&](const nlohmann::json& from, const char* key) {
    if (!from.contains(key)) return;
    if (!from[key].is_number()) throw UserError(std::string(key) + " is " + shown(from[key]) + ", not a number");
    const double value = from[key].get<double>();
    if (!std::isnan(found) && found != value)
      throw UserError(std::string(key) + " is " + shown(from[key]) + ", but " + nlohmann::json(found).dump() +
                      (&from == &json ? " is what counts" : " stands there, too"));
    found = value;
  };
  take(settings, name);
  take(json, family_key);
  if (std::isnan(found)) found = otherwise;
  for (const char* key : flat_keys) take(json, key);
  return found;
}

inline std::string digits(double number) { return nlohmann::json(number).dump(); }

// The rope_scaling of ours for rope_type `type` of theirs (ROPE_INIT_FUNCTIONS of their library), R being known. May
// shorten the context: where LongRoPE changes its factors with the length of a text, only the short ones are held.
inline std::string read_scaling(const Family& family, const nlohmann::json& json, const nlohmann::json& settings,
                                const std::string& type, Config& c) {
  static const std::map<std::string, std::set<std::string>> keys_of_type = {
      {"default", {}},
      {"linear", {"factor"}},
      {"llama3", {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}},
      {"yarn", {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
                "mscale_all_dim", "truncate"}},
      {"longrope", {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}}};
  const auto known = keys_of_type.find(type);
  if (known == keys_of_type.end()) throw UserError("rope_type " + type + " cannot be imported");
  for (const auto& [key, value] : settings.items())
    if (key != "rope_type" && key != "rope_theta" && key != "partial_rotary_factor" && !known->second.count(key))
      throw UserError("rope_parameters: " + key + " is " + shown(value) + ", which means nothing for rope_type " + type);
  auto number = [&](const char* key, double otherwise = NAN) {  // above 0; without a second value: needed
    if (!settings.contains(key) && !std::isnan(otherwise)) return otherwise;
    const nlohmann::json value = settings.value(key, nlohmann::json());
    if (!value.is_number() || !(value.get<double>() > 0) || !std::isfinite(value.get<double>()))
      throw UserError(std::string("rope_parameters: ") + key + " is " + shown(value) + "; it must be a number above 0");
    return value.get<double>();
  };
  if (type == "default") return "none";
  if (type == "linear") return "linear:" + digits(number("factor"));

  // The positions of the first training. What stands outside of rope_parameters counts first there.
  const char* const positions_key = "original_max_position_embeddings";
  if (family.type == "phi3" && !json.contains(positions_key)) throw UserError(std::string("has no ") + positions_key);
  double positions = number(positions_key, c.context);
  if (json.contains(positions_key)) {
    if (!json[positions_key].is_number_integer() || json[positions_key] < 1)
      throw UserError(std::string(positions_key) + " is " + shown(json[positions_key]) + ", not a number from 1 up");
    if (settings.contains(positions_key) && json[positions_key] != settings[positions_key])
      throw UserError(std::string(positions_key) + " stands there twice and disagrees");
    positions = json[positions_key].get<double>();
  }
  if (type == "llama3")
    return "llama3:" + digits(number("factor")) + "," + digits(number("low_freq_factor")) + "," +
           digits(number("high_freq_factor")) + "," + digits(positions);
  const double factor = number("factor", c.context / positions);
  if (type == "yarn") {
    if (settings.contains("truncate") && settings["truncate"] != true)
      throw UserError("rope_parameters: truncate is " + shown(settings["truncate"]) + "; only true can be imported");
    auto scale = [&](double m) { return factor <= 1 ? 1 : 0.1 * m * std::log(factor) + 1; };
    const bool both = settings.contains("mscale") && settings.contains("mscale_all_dim");
    const double inferred = both ? scale(number("mscale")) / scale(number("mscale_all_dim")) : scale(1);
    return "yarn:" + digits(factor) + "," + digits(positions) + "," + digits(number("attention_factor", inferred)) + "," +
           digits(number("beta_fast", 32)) + "," + digits(number("beta_slow", 1));
  }
  c.context = int(std::min<double>(c.context, positions));
  const double inferred = factor <= 1 ? 1 : std::sqrt(1 + std::log(factor) / std::log(positions)),
               attention = number("attention_factor", inferred);
  std::string scaling = "longrope:" + digits(attention);
  bool changes = attention != 1;
  const nlohmann::json factors = settings.value("short_factor", nlohmann::json());
  if (!factors.is_array() || factors.size() != size_t(c.rotary_dim / 2))
    throw UserError("rope_parameters: short_factor is " + shown(factors) + "; it must be a list of " +
                    std::to_string(c.rotary_dim / 2) + ", one for each pair of channels");
  for (const nlohmann::json& one : factors) {
    if (!one.is_number() || !(one.get<double>() > 0) || !std::isfinite(one.get<double>()))
      throw UserError("rope_parameters: short_factor has " + shown(one) + "; its factors must be numbers above 0");
    scaling += "," + digits(one.get<double>());
    changes = changes || one != 1;
  }
  return changes ? scaling : "none";
}

// Fills in R, base and what changes the frequencies. After the keys of the family.
inline void read_rotation(const Family& family, const nlohmann::json& json, Described& d) {
  Config& c = d.c;
  const Rotation& rotation = family.rotation;
  const nlohmann::json settings = rope_settings(json), kind = settings.value("rope_type", nlohmann::json("default"));
  const std::string type = kind.is_string() ? kind.get<std::string>() : shown(kind);
  c.rope_base = rope_number(json, settings, "rope_theta", rotation.base_key, base_keys, rotation.base);
  const double fraction = rope_number(json, settings, "partial_rotary_factor", rotation.fraction_key, fraction_keys,
                                      rotation.fraction);
  const std::string said = "partial_rotary_factor " + digits(fraction);
  if (!(fraction >= 0 && fraction <= 1)) throw UserError(said + " is not between 0 and 1");
  if (!rotation.partial && fraction != 1) throw UserError(said + " is ignored by " + family.architecture);
  c.rotary_dim = int(fraction * c.head_size);
  if (c.rotary_dim == 0 && !rotation.none) throw UserError(said + ": " + family.architecture + " does not work with it");
  if (c.rotary_dim % 2)
    throw UserError(said + " turns " + std::to_string(c.rotary_dim) + " of " + std::to_string(c.head_size) +
                    " channels; only an even number can be imported");
  c.rope_scaling = read_scaling(family, json, settings, type == "su" ? "longrope" : type, c);

  const int none = int(std::count(d.rotated.begin(), d.rotated.end(), false));
  if (none == 0) return;
  if (none == c.layers) {
    c.rotary_dim = 0, c.rope_scaling = "none";
    return;
  }
  const int every = int(std::find(d.rotated.begin(), d.rotated.end(), false) - d.rotated.begin()) + 1;
  c.rotary_layers = every > 1 ? "nope:" + std::to_string(every) : "all";
  std::string list;
  bool regular = every > 1;
  for (int l = 0; l < c.layers; ++l) {
    list += (l ? "," : "") + std::to_string(d.rotated[l] ? c.rotary_dim : 0);
    regular = regular && d.rotated[l] == ((l + 1) % every != 0);
  }
  if (!regular) c.rotary_layers = list;
}

// R / HS as a number f for which int(f * HS), which is what their library computes, is R.
inline double exported_fraction(int R, int HS) {
  double f = double(R) / HS;
  while (int(f * HS) < R) f = std::nextafter(f, 2.0);
  return f;
}

// The keys of the rotation, in all places where a loader may look: one that does not find a key takes its default.
// Their own names for what is done to the frequencies are used where there are some; all else is LongRoPE, which has a
// factor for each, the same for short texts and long.
inline void write_rotation(const Family& family, const Config& c, nlohmann::ordered_json& json) {
  const Rotation& rotation = family.rotation;
  const int R = c.rotary_dim;
  const bool phi3 = family.type == "phi3", plain = c.rope_frequencies == "rotary";
  const size_t colon = std::min(c.rope_scaling.find(':'), c.rope_scaling.size());
  const std::string type = c.rope_scaling.substr(0, colon);
  std::vector<double> x;
  if (colon < c.rope_scaling.size()) x = parse_list("--rope-scaling", c.rope_scaling.substr(colon + 1));
  nlohmann::ordered_json rope = {{"rope_type", "default"}};
  // Phi3's class counts its factors by width / heads, so it refuses them where the head size is another one. Where it is
  // not, they are also a guard: versions that do not know of a fraction refuse lists that are not of HS/2 factors.
  const bool takes_factors = !phi3 || c.head_size * c.heads == c.width;
  const bool guard = phi3 && takes_factors && R > 0 && R < c.head_size;
  if (R == 0 || !takes_factors || (type == "none" && plain && !guard)) {
  } else if (plain && !phi3 && type == "linear") {
    rope = {{"rope_type", type}, {"factor", x[0]}};
  } else if (plain && !phi3 && type == "llama3") {
    rope = {{"rope_type", type}, {"factor", x[0]}, {"low_freq_factor", x[1]}, {"high_freq_factor", x[2]},
            {"original_max_position_embeddings", int(x[3])}};
  } else if (plain && !phi3 && type == "yarn" && x[1] == int(x[1])) {
    rope = {{"rope_type", type}, {"factor", x[0]}, {"original_max_position_embeddings", int(x[1])},
            {"attention_factor", c.angles(R).attention}, {"beta_fast", x.size() == 5 ? x[3] : 32.0},
            {"beta_slow", x.size() == 5 ? x[4] : 1.0}};
  } else {
    const RopeAngles angles = c.angles(R);
    std::vector<double> factors;
    for (int i = 0; i < R / 2; ++i)
      factors.push_back(plain && type == "longrope" ? x[1 + i]
                        : plain && type == "none"   ? 1
                                                    : rope_frequency(i, R, c.rope_base) / angles.theta[i]);
    rope = {{"rope_type", "longrope"}, {"short_factor", factors}, {"long_factor", factors},
            {"original_max_position_embeddings", c.context}, {"attention_factor", angles.attention}};
    json["original_max_position_embeddings"] = c.context;
  }
  json["rope_theta"] = json[rotation.base_key] = c.rope_base;
  if (rotation.partial)
    json["partial_rotary_factor"] = json[rotation.fraction_key] = exported_fraction(R, c.head_size);
  if (rope["rope_type"] != "default") {
    json["rope_scaling"] = rope;  // Transformers 4; in Phi3 it has three keys there, or is refused
    if (phi3 && rope["attention_factor"] == 1)
      json["rope_scaling"] = {{"type", "longrope"}, {"short_factor", rope["short_factor"]},
                              {"long_factor", rope["long_factor"]}};
    if (!phi3 || rope["attention_factor"] != 1) json["transformers_version"] = "5.0";
  }
  rope["rope_theta"] = c.rope_base;
  if (rotation.partial) rope["partial_rotary_factor"] = exported_fraction(R, c.head_size);
  json["rope_parameters"] = rope;
}
