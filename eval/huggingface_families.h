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
            if (!value.is_number_integer() || value.get<int64_t>() < 1 || value.get<int64_t>() > 1 << 24)
              return "it must be a number from 1 to 16777216";  // more layers than that would take long to walk through
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
          [](Described& d, const nlohmann::json& value) {
            if (value.is_number()) d.c.norm_eps = value.get<double>();
            return value.is_number() && value >= 0 && value <= 1 ? "" : "it must be a number from 0 to 1";
          },
          [](const Described& d) { return d.c.norm_eps; }};
}

// CodeGen's heads come in four groups.
inline Key heads_of_four(const char* name) {
  Key key = whole(name, &Config::heads);
  key.read = [read = key.read](Described& d, const nlohmann::json& value) {
    const std::string problem = read(d, value);
    return problem.empty() && d.c.heads % 4 ? "it must be a multiple of 4" : problem;
  };
  return key;
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
  const char* dimension_key = nullptr;  // where a class has a number of channels instead, and the one base
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
inline Key head_dim(nlohmann::json missing = nullptr) {
  return whole("head_dim", &Config::head_size, missing, nullptr);
}
inline Key silu() { return choice<MlpKind>("hidden_act", &Config::mlp, {{"silu", MlpKind::swiglu}}, "silu"); }
inline Key tied(bool missing = false) { return truth("tie_word_embeddings", &Config::tied, missing); }

inline Key not_tied() { return fixed("tie_word_embeddings", false); }  // where the head has a bias

inline Key gelu(const char* name, const char* missing) {
  return choice<MlpKind>(name, &Config::mlp, {{"gelu", MlpKind::gelu},
                                              {"gelu_new", MlpKind::gelu_tanh},
                                              {"gelu_fast", MlpKind::gelu_tanh},
                                              {"gelu_pytorch_tanh", MlpKind::gelu_tanh}},
                         missing);
}

inline std::vector<Key> llama_keys(bool tied_missing = false, nlohmann::json head_dim_missing = nullptr) {
  return size_keys() +
         std::vector<Key>{head_dim(head_dim_missing), silu(), norm_eps("rms_norm_eps"), tied(tied_missing)};
}
// Those of GPT-J and CodeGen.
inline std::vector<Key> gptj_keys(Key heads) {
  return {whole("vocab_size", &Config::vocab), whole("n_embd", &Config::width),
          whole("n_inner", &Config::mlp_hidden, nullptr, nullptr), whole("n_layer", &Config::layers), heads,
          whole("n_positions", &Config::context), gelu("activation_function", "gelu_new"),
          norm_eps("layer_norm_epsilon"), not_tied(), unused("n_ctx")};
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

inline std::vector<TensorRow> phi_tensors() {
  const std::string theirs = "model.layers.#.", ours = "layers.#.";
  return {{"model.embed_tokens", "embedding"},
          {theirs + "input_layernorm", ours + "norm1"},
          {theirs + "self_attn.q_proj", ours + "qkv", Rows::query},
          {theirs + "self_attn.k_proj", ours + "qkv", Rows::key},
          {theirs + "self_attn.v_proj", ours + "qkv", Rows::value},
          {theirs + "self_attn.dense", ours + "proj"},
          {theirs + "mlp.fc1", ours + "up"},
          {theirs + "mlp.fc2", ours + "down"},
          {"model.final_layernorm", "final_norm"},
          {"lm_head", "head"}};
}

inline std::vector<TensorRow> gptj_tensors(bool fused_qkv) {
  const std::string theirs = "transformer.h.#.", ours = "layers.#.";
  std::vector<TensorRow> rows = {{"transformer.wte", "embedding"},
                                 {theirs + "ln_1", ours + "norm1"},
                                 {theirs + "attn.out_proj", ours + "proj"},
                                 {theirs + "mlp.fc_in", ours + "up"},
                                 {theirs + "mlp.fc_out", ours + "down"},
                                 {"transformer.ln_f", "final_norm"},
                                 {"lm_head", "head"}};
  if (fused_qkv) rows.push_back({theirs + "attn.qkv_proj", ours + "qkv", Rows::by_shard});
  else
    for (auto [name, part] : {std::pair{"q", Rows::query}, {"k", Rows::key}, {"v", Rows::value}})
      rows.push_back({theirs + "attn." + name + "_proj", ours + "qkv", part});
  return rows;
}

// ---- The classes. `export` takes the first that holds a model.

inline const std::vector<Family>& families() {
  using Keys = std::vector<Key>;
  static const std::vector<Family> table = [] {
    Keys experts;  // GLM-4.5's
    for (const char* name : {"moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts",
                             "norm_topk_prob", "num_experts_per_tok", "num_local_experts", "num_mtp_layers",
                             "num_nextn_predict_layers", "output_router_logits", "routed_scaling_factor", "topk_group"})
      experts.push_back(unused(name));
    Config rms, rms_qk, rms_interleaved, layer_swiglu, layer_gelu, phi, gptj;
    rms_qk.qk_norm = true;
    rms_interleaved.rope_pairs = RopePairs::interleaved;
    layer_swiglu.norm = layer_gelu.norm = NormKind::layer;
    layer_gelu.mlp = MlpKind::gelu;
    phi = layer_gelu;
    phi.block = BlockKind::parallel, phi.shared_norm = phi.head_bias = true;
    gptj = phi;
    gptj.rope_pairs = RopePairs::interleaved;
    const std::set<std::string> attention = {"qkv", "proj"}, mlp = {"up", "down"};
    const Rotation full = {1, false}, part;
    Rotation all_or_none = {1, false};
    all_or_none.base = 2000000;
    Rotation neox = {0.25};
    neox.fraction_key = "rotary_pct", neox.base_key = "rotary_emb_base";
    Rotation dimension = {1, true, false};
    dimension.dimension_key = "rotary_dim";
    return std::vector<Family>{
        {"llama", "LlamaForCausalLM", "4.48", rms, {}, full,
         llama_keys() + Keys{kv_heads(nullptr), biases("attention_bias", attention, false),
                             biases("mlp_bias", mlp, false)},
         llama_tensors(false, false)},
        {"mistral", "MistralForCausalLM", "", rms, {}, full,
         llama_keys() + Keys{kv_heads(), sliding_window(4096)}, llama_tensors(false, false)},
        {"smollm3", "SmolLM3ForCausalLM", "4.53", rms, {}, all_or_none,
         llama_keys(true) + Keys{kv_heads(), no_rope_layer_interval(), no_rope_layers(),
                                 biases("attention_bias", attention, false), biases("mlp_bias", mlp, false)} +
             no_window_keys(),
         llama_tensors(false, false)},
        {"qwen2", "Qwen2ForCausalLM", "4.48", rms, {"qkv"}, full,
         llama_keys() + Keys{kv_heads()} + no_window_keys(), llama_tensors(false, false)},
        {"qwen3", "Qwen3ForCausalLM", "4.51", rms_qk, {}, full,
         llama_keys(false, 128) + Keys{kv_heads(), biases("attention_bias", attention, false)} + no_window_keys(),
         llama_tensors(false, false)},
        {"phi3", "Phi3ForCausalLM", "4.49", rms, {}, part,
         llama_keys() + Keys{kv_heads(nullptr), sliding_window(nullptr)}, llama_tensors(true, true)},
        {"glm", "GlmForCausalLM", "4.46", rms_interleaved, {}, {0.5},
         llama_keys(false, 128) + Keys{kv_heads(), biases("attention_bias", {"qkv"}, true)},
         llama_tensors(false, true)},
        {"glm4_moe", "Glm4MoeForCausalLM", "4.54", rms_qk, {}, {0.5},
         llama_keys() + Keys{kv_heads(), truth("use_qk_norm", &Config::qk_norm, false),
                             plain_layers("first_k_dense_replace"), biases("attention_bias", {"qkv"}, false)} + experts,
         llama_tensors(false, false)},
        {"gpt_neox", "GPTNeoXForCausalLM", "4.25", layer_gelu, mlp, neox,
         size_keys() + Keys{gelu("hidden_act", "gelu"), norm_eps("layer_norm_eps"), tied(),
                            biases("attention_bias", attention, true),
                            choice<BlockKind>("use_parallel_residual", &Config::block,
                                              {{true, BlockKind::parallel}, {false, BlockKind::sequential}}, true)},
         neox_tensors()},
        {"stablelm", "StableLmForCausalLM", "4.38", layer_swiglu, {}, {0.25, true, false},
         size_keys() + Keys{kv_heads(), silu(), norm_eps("layer_norm_eps"), tied(),
                            biases("use_qkv_bias", {"qkv"}, false), fixed("qk_layernorm", false),
                            fixed("use_parallel_residual", false)},
         llama_tensors(false, false)},
        {"phi", "PhiForCausalLM", "4.37", phi, {"qkv", "proj", "up", "down"}, {0.5},
         size_keys() + Keys{kv_heads(nullptr), gelu("hidden_act", "gelu_new"), norm_eps("layer_norm_eps"), not_tied()},
         phi_tensors()},
        {"gptj", "GPTJForCausalLM", "4.22", gptj, mlp, dimension, gptj_keys(whole("n_head", &Config::heads)),
         gptj_tensors(false)},
        {"codegen", "CodeGenForCausalLM", "", gptj, mlp, dimension, gptj_keys(heads_of_four("n_head")),
         gptj_tensors(true)},
    };
  }();
  return table;
}

// ---------------------------------------------------------------------------------------------------------------------

// Why well-known families are not in the table.
inline std::string reason_against(const std::string& type) {
  static const std::vector<std::pair<std::string, std::set<std::string>>> reasons = {
      {"mixtures of experts",
       {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "phimoe", "gpt_oss",
        "glm4_moe_lite", "granitemoe", "ernie4_5_moe", "minimax", "dbrx", "jetmoe", "llama4", "llama4_text"}},
      {"linear attention or recurrence",
       {"qwen3_next", "recurrent_gemma", "mamba", "mamba2", "jamba", "bamba", "rwkv", "falcon_mamba", "falcon_h1",
        "zamba", "zamba2", "lfm2", "granitemoehybrid"}},
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
      "max_sequence_length",
      // of training
      "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout", "embd_pdrop",
      "embedding_dropout", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "initializer_range",
      "resid_pdrop",
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
