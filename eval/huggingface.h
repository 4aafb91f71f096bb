#pragma once
// Models to and from Hugging Face's format: a directory with config.json, model.safetensors and tokenizer.json, which
// AutoModelForCausalLM and AutoTokenizer load as it is. eval/huggingface_families.h has the classes of theirs; a model
// that none of them holds is written with a class of our own, whose code goes with it:
// scripts/modeling_partial_rope.py.
//
// A fraction is written as partial_rotary_factor in rope_parameters (Transformers 5) and under the older flat keys,
// because loaders have quietly taken their default where the one that they look for was missing.

#include <list>

#include "eval/huggingface_rope.h"
#include "eval/source.h"
#include "python.h"  // made by the Makefile: files of scripts/ as strings
#include "run/checkpoint.h"
#include "run/flags.h"
#include "text/tokenizer.h"

// Their tensor `theirs` is `rows` of our tensor `ours`.
struct TensorPart {
  std::string theirs, ours;
  Rows rows = Rows::all;
};

// All tensors of a model of theirs, in the order of the family's row. family null: our own class, which has our names.
inline std::vector<TensorPart> tensor_parts(const Family* family, const Described& d) {
  std::set<std::string> names;
  for (const ParameterRow& row : parameter_table(d.c).rows) names.insert(row.name);
  std::vector<TensorPart> parts;
  if (!family) {
    for (const std::string& name : names) parts.push_back({name, name});
    return parts;
  }
  auto numbered = [](std::string name, int layer) {
    const size_t at = name.find('#');
    return at == std::string::npos ? name : name.replace(at, 1, std::to_string(layer));
  };
  for (const TensorRow& row : family->tensors) {
    const bool per_layer = row.ours.find('#') != std::string::npos;
    const std::string layer_name = row.ours.substr(row.ours.rfind('.') + 1);
    const bool linear = per_layer && layer_name.find("norm") == std::string::npos;
    for (int l = 0; l < (per_layer ? d.c.layers : 1); ++l)
      for (const char* kind : {".weight", ".bias"}) {
        const std::string ours = numbered(row.ours, l) + kind;
        if (!names.count(ours) || (linear && kind[1] == 'b' && !d.biases.count(layer_name))) continue;
        parts.push_back({numbered(row.theirs, l) + kind, ours, row.rows});
      }
  }
  return parts;
}

// What our model has and the files of theirs have not: biases, which are zero then.
inline std::vector<ParameterRow> tensors_without_part(const std::vector<TensorPart>& parts, const Config& c) {
  std::set<std::string> covered;
  for (const TensorPart& part : parts) covered.insert(part.ours);
  std::vector<ParameterRow> left;
  for (const ParameterRow& row : parameter_table(c).rows)
    if (!covered.count(row.name)) left.push_back(row);
  return left;
}

inline bool all_finite(const float* values, size_t n) {
  bool finite = true;
#pragma omp parallel for reduction(&& : finite)
  for (size_t i = 0; i < n; ++i) finite = finite && std::isfinite(values[i]);
  return finite;
}

// ---------------------------------------------------------------------------------------------------------------------
// config.json

// --rope-scaling of our own class: rope_scaling has another meaning in their library, which looks into it.
inline constexpr const char* kOwnScaling = "frequency_scaling";

// Our configuration from their config.json, and the family that it is of (null: our own class). UserError, naming the
// key, for whatever our model would compute otherwise, and for what nobody here knows.
inline Described imported_config(const std::string& path, const nlohmann::json& json, const Family*& family) try {
  if (!json.is_object()) throw UserError("not a model's configuration");
  if (!json.contains("model_type")) throw UserError("has no model_type");
  const nlohmann::json& named = json["model_type"];
  const std::string type = named.is_string() ? named.get<std::string>() : shown(named);
  Described d;
  family = nullptr;
  if (type == "partial_rope") {
    Settings s;
    const nlohmann::ordered_json needed = settings_json(s, {"Model"});
    const std::set<std::string> later = {"rope_frequencies", "rope_scaling", "rotary_layers",
                                         "norm_eps",         "shared_norm",  "qkv_bias",
                                         "head_bias",        "attention_softcap"};  // older exports lack them
    for (const auto& [key, value] : needed.items())
      if (!json.contains(key) && !later.count(key)) throw UserError("has no " + key);
    nlohmann::json flags = json;
    if (json.contains(kOwnScaling)) flags["rope_scaling"] = json[kOwnScaling];
    d.c = settings_from_json(path, flags).model;
    resolve(d.c);
    return d;
  }
  std::string known;
  for (const Family& row : families()) {
    if (row.type == type) family = &row;
    known += row.type + ", ";
  }
  if (!family) {
    const std::string reason = reason_against(type);
    throw UserError("model_type " + type + " cannot be imported" +
                    (reason.empty() ? "; " + known + "partial_rope can" : ": it has " + reason));
  }
  d.c = family->always;
  d.biases = family->biases;
  std::set<std::string> names = {"rope_parameters", "rope_scaling", "original_max_position_embeddings"};
  names.insert(fraction_keys.begin(), fraction_keys.end());
  names.insert(base_keys.begin(), base_keys.end());
  if (family->rotation.dimension_key) names.insert(family->rotation.dimension_key);
  for (const Key& key : family->keys) {
    names.insert(key.name);
    const auto said = json.find(key.name);
    const bool missing = said == json.end();
    const nlohmann::json& value = missing ? key.missing : said->is_null() ? key.null : *said;
    if (value.is_null()) continue;
    if (missing && value.is_discarded()) throw UserError("has no " + key.name);
    const std::string problem = value.is_discarded() ? "it must be a value" : key.read(d, value);
    if (!problem.empty()) throw UserError(key.name + " is " + (missing ? "missing" : shown(*said)) + "; " + problem);
  }
  for (const auto& [name, value] : json.items())
    if (!names.count(name) && !harmless(name, value))
      throw UserError(name + " is " + shown(value) + "; that is not known here and may change what is computed");
  if (!d.c.head_size) {
    if (d.c.width % d.c.heads)
      throw UserError("num_attention_heads " + std::to_string(d.c.heads) + " does not divide hidden_size " +
                      std::to_string(d.c.width));
    d.c.head_size = d.c.width / d.c.heads;
  }
  d.c.qkv_bias = d.biases == std::set<std::string>{"qkv"};
  d.c.bias = !d.biases.empty() && !d.c.qkv_bias;
  read_rotation(*family, json, d);
  resolve(d.c);
  return d;
} catch (const UserError& e) {
  const std::string what = e.what();
  throw UserError(what.rfind(path, 0) == 0 ? what : path + ": " + what);
}

// config.json of a model in the family's class. What the class cannot hold is not what is read from it again.
inline nlohmann::ordered_json exported_config(const Family& family, const Config& c) {
  nlohmann::ordered_json json = {{"architectures", {family.architecture}},
                                 {"model_type", family.type},
                                 {"torch_dtype", "float32"},
                                 {"transformers_version", family.since},
                                 {"initializer_range", 0.02}};
  Described d;
  d.c = c;
  if (c.qkv_bias) d.biases = {"qkv"};
  if (c.bias) d.biases = {"qkv", "proj", "up", "down"};
  for (const Key& key : family.keys) {
    const nlohmann::json value = key.write(d);
    if (!value.is_discarded()) json[key.name] = value;
  }
  write_rotation(family, c, json);
  return json;
}

inline constexpr const char* kCodeSince = "4.46";  // the version that our own class was tried with

// config.json of our own class: the model's flags, as in a run's config.json.
inline nlohmann::ordered_json exported_config_with_code(const Config& c) {
  Settings s;
  s.model = c;
  nlohmann::ordered_json json = settings_json(s, {"Model"});
  json.erase("rope_scaling");
  json.update({{kOwnScaling, c.rope_scaling},
               {"architectures", {"PartialRopeForCausalLM"}},
               {"model_type", "partial_rope"},
               {"auto_map", {{"AutoConfig", "modeling_partial_rope.PartialRopeConfig"},
                             {"AutoModelForCausalLM", "modeling_partial_rope.PartialRopeForCausalLM"}}},
               {"torch_dtype", "float32"},
               {"transformers_version", kCodeSince},
               {"tie_word_embeddings", false},  // the class does that itself
               {"use_cache", false}});
  return json;
}

// What keeps a model from being one of the family's class: flags that the class has otherwise, or biases that it lacks
// and that are not zero in `weights`. Nothing, if it holds the model as it is.
inline std::vector<std::string> misfits(const Family& family, const Config& c, const SafeTensors& weights) {
  const bool any_head_size = std::any_of(family.keys.begin(), family.keys.end(),
                                         [](const Key& key) { return key.name == "head_dim"; });
  if (!any_head_size && c.head_size * c.heads != c.width) return {"--head-size " + std::to_string(c.head_size)};
  const Family* same = nullptr;
  Described d;
  try {
    d = imported_config("", nlohmann::json(exported_config(family, c)), same);
  } catch (const UserError&) {  // the class turns another, odd number of channels
    return {"--rotary-dim " + std::to_string(c.rotary_dim)};
  }
  Settings ours, theirs;
  ours.model = c, theirs.model = d.c;
  const nlohmann::ordered_json is = settings_json(ours, {"Model"}), holds = settings_json(theirs, {"Model"});
  const std::set<std::string> rotation = {"rotary_fraction", "rotary_dim",       "rotary_layers",
                                          "rope_base",       "rope_frequencies", "rope_scaling"};
  std::vector<std::string> flags;
  auto add = [&](std::string key) {
    const nlohmann::json value = is[key];
    std::replace(key.begin(), key.end(), '_', '-');
    flags.push_back((value == false ? "--no-" : "--") + key);
    if (!value.is_boolean()) flags.back() += " " + (value.is_string() ? value.get<std::string>() : value.dump());
  };
  for (const auto& [key, value] : is.items())
    if (holds[key] != value && !rotation.count(key)) add(key);
  // The rotation is its angles, whatever rules they follow.
  const std::vector<int> dims = c.rotary_dims();
  if (dims != d.c.rotary_dims()) {
    add(c.rotary_dim != d.c.rotary_dim ? "rotary_dim" : "rotary_layers");
  } else if (c.rotary_dim > 0) {
    const RopeAngles angles = c.angles(c.rotary_dim), read = d.c.angles(c.rotary_dim);
    bool same = std::fabs(angles.attention - read.attention) < 1e-12 &&
                (angles.limit == read.limit || c.context > angles.limit);
    for (int positions : {c.context, INT32_MAX})
      for (size_t i = 0; i < angles.theta.size(); ++i)
        same = same && std::fabs(angles.of(positions)[i] / read.of(positions)[i] - 1) < 1e-12;
    if (!same)
      add(c.rope_base != d.c.rope_base ? "rope_base"
          : c.rope_scaling != "none"   ? "rope_scaling"
                                       : "rope_frequencies");
  }
  if (!flags.empty()) return flags;
  for (const ParameterRow& row : tensors_without_part(tensor_parts(&family, d), c)) {
    const float* values = weights.get(row.name, row.shape);
    if (std::any_of(values, values + row.count, [](float value) { return value != 0; })) return {row.name};
  }
  return {};
}

// The family whose class holds this model unchanged. UserError with the reason if there is none.
inline const Family& family_for(const Config& c, const SafeTensors& weights) {
  const Family* nearest = nullptr;
  std::vector<std::string> least;
  auto distance = [](const std::vector<std::string>& why) {  // how much is turned counts most, a bias least
    size_t sum = 0;
    for (const std::string& one : why) sum += one.rfind("--rotary-dim", 0) == 0 ? 100 : one.rfind("--", 0) == 0;
    return sum;
  };
  for (const Family& family : families()) {
    if (family.since.empty()) continue;
    const std::vector<std::string> why = misfits(family, c, weights);
    if (why.empty()) return family;
    if (!nearest || distance(why) < distance(least)) nearest = &family, least = why;
  }
  std::string all;
  for (const std::string& one : least) all += (all.empty() ? "" : ", ") + one;
  throw UserError("export: no class of Hugging Face's library holds this model: " + nearest->architecture +
                  " comes nearest, and has not " + all + "; --with-code writes it with a class of its own");
}

// ---------------------------------------------------------------------------------------------------------------------
// Export

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

// The ids of special tokens as config.json and generation_config.json say them: an import keeps those of its source in
// state.json under special_tokens, so that an export has them again.
inline nlohmann::json special_tokens_of(const nlohmann::json& file) {
  nlohmann::json ids = nlohmann::json::object();
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    if (file.contains(key) && (file[key].is_number_integer() || file[key].is_array())) ids[key] = file[key];
  return ids;
}

// The text of an added token of a tokenizer.json; null if no such id is there.
inline nlohmann::json token_text(const nlohmann::json& tokenizer, const nlohmann::json& id) {
  if (tokenizer.contains("added_tokens"))
    for (const nlohmann::json& token : tokenizer["added_tokens"])
      if (token["id"] == (id.is_array() && !id.empty() ? id[0] : id)) return token["content"];
  return nullptr;
}

// Writes a checkpoint's weights, with its tokenizer if there is one, to the new directory `out`. with_code: for our own
// class, whose code goes with them. Returns config.json.
inline nlohmann::ordered_json export_model(const std::string& out, const Source& source, bool with_code) {
  const Config& c = source.settings.model;
  const SafeTensors file(source.checkpoint + "/model.safetensors");
  std::map<std::string, const ParameterRow*> rows;
  const ParameterTable table = parameter_table(c);
  for (const ParameterRow& row : table.rows) {
    rows[row.name] = &row;
    if (!all_finite(file.get(row.name, row.shape), row.count))
      throw UserError(source.checkpoint + ": " + row.name + " has numbers that are not finite; the model diverged");
  }
  const Family* family = with_code ? nullptr : &family_for(c, file);
  nlohmann::ordered_json config = family ? exported_config(*family, c) : exported_config_with_code(c);
  Described d;
  d.c = c;
  if (family) d = imported_config("", nlohmann::json(config), family);
  std::vector<NamedTensor> tensors;
  std::list<std::vector<float>> reordered;
  for (const TensorPart& part : tensor_parts(family, d)) {
    const ParameterRow& row = *rows.at(part.ours);
    std::vector<size_t> shape = row.shape;
    const size_t columns = row.count / shape[0];
    shape[0] = rows_of(part.rows, c, shape[0]);
    const float *all = file.get(row.name, row.shape), *data = all + our_row(part.rows, c, 0) * columns;
    if (part.rows == Rows::by_head || part.rows == Rows::by_shard) {  // the others are rows that follow each other
      std::vector<float>& turned = reordered.emplace_back(row.count);
      for (size_t r = 0; r < shape[0]; ++r)
        std::copy_n(all + our_row(part.rows, c, r) * columns, columns, &turned[r * columns]);
      data = turned.data();
    }
    tensors.push_back({part.theirs, shape, data, shape[0] * columns});
  }

  // No token pads unless the source says so: their classes give the token that pads no gradient. Every key is written,
  // null or not, because the classes have defaults of their own.
  nlohmann::json special = source.special_tokens;
  if (!special.is_object()) {
    special = {{"config", nlohmann::json::object()}, {"generation", nlohmann::json::object()}};
    if (source.tokenizer)
      special["config"] = {{"bos_token_id", source.tokenizer->end_of_text()},
                           {"eos_token_id", source.tokenizer->end_of_text()}};
  }
  nlohmann::json in_config = {{"bos_token_id", nullptr}, {"eos_token_id", nullptr}, {"pad_token_id", nullptr}};
  in_config.update(special["config"]);
  config.update(nlohmann::ordered_json(in_config));
  nlohmann::json generation = special_tokens_of(in_config);
  generation.update(special["generation"]);
  std::vector<int> padding(c.vocab - source.vocabulary);  // ids that are no token
  std::iota(padding.begin(), padding.end(), source.vocabulary);
  if (!padding.empty()) generation["suppress_tokens"] = padding;

  make_directory(out, [&](const std::string& part) {
    write_safetensors(part + "/model.safetensors", tensors, {{"format", "pt"}});
    write_text_file(part + "/config.json", config.dump(2) + "\n");
    write_text_file(part + "/generation_config.json", generation.dump(2) + "\n");
    if (with_code) write_text_file(part + "/modeling_partial_rope.py", k_modeling_partial_rope_py);
    if (with_code) write_text_file(part + "/reference.py", k_reference_py);
    if (!source.tokenizer) return;
    const std::string path = source.tokenizer->file(),
                      text = path.empty() ? byte_tokenizer_json().dump() + "\n" : read_text_file(path);
    write_text_file(part + "/tokenizer.json", text);
    const nlohmann::json tokenizer = nlohmann::json::parse(text);
    nlohmann::ordered_json names = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                                    {"clean_up_tokenization_spaces", false},
                                    {"model_max_length", c.context}};
    for (const char* name : {"bos_token", "eos_token", "pad_token"})
      names[name] = token_text(tokenizer, generation.value(std::string(name) + "_id", nlohmann::json()));
    write_text_file(part + "/tokenizer_config.json", names.dump(2) + "\n");
  });
  return config;
}

// ---------------------------------------------------------------------------------------------------------------------
// Import

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
  const nlohmann::json config = read_json_file(from + "/config.json");
  const Family* family = nullptr;
  const Described d = imported_config(from + "/config.json", config, family);
  Settings s;
  s.model = d.c;
  const int positions = config.value("max_position_embeddings", s.model.context);
  if (s.model.context < positions)
    std::fprintf(stderr, "note: a context of %d positions, not %d: in longer texts its RoPE has other factors, which "
                 "count where --context or eval length go beyond\n", s.model.context, positions);

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
  else if (!std::filesystem::exists(from + "/" + names[0]))
    for (const char* pickle : {"/pytorch_model.bin", "/pytorch_model.bin.index.json"})
      if (std::filesystem::exists(from + pickle))
        throw UserError(from + pickle + ": only safetensors are read; in Python, " +
                        "AutoModelForCausalLM.from_pretrained(\"" + from + "\").save_pretrained(\"NEW\") writes them");
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
  const std::vector<TensorPart> parts = tensor_parts(family, d);
  std::set<std::string> used;
  for (const TensorPart& part : parts) {
    const auto found = theirs.find(part.theirs);
    if (found == theirs.end()) throw UserError(from + ": has no tensor " + part.theirs);
    const auto& [tensor, file] = found->second;
    std::vector<size_t> shape = rows.at(part.ours)->shape;
    shape[0] = rows_of(part.rows, s.model, shape[0]);
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
    bool buffer = false;  // masks and frequencies, which older versions kept with the weights
    for (const char* end : {"rotary_emb.inv_freq", "attention.bias", "attention.masked_bias", "attn.bias",
                            "attn.masked_bias", "attn.causal_mask"})
      buffer = buffer || ends(end);
    const bool tied = s.model.tied && (tensor == "lm_head.weight" || tensor == "embed_out.weight");
    if (!used.count(tensor) && !buffer && !tied)
      throw UserError(file + ": tensor " + tensor + " has no place in this model");
  }

  std::vector<float> flat(table.total);  // biases that theirs has not are zero
  std::vector<float> values;
  for (const TensorPart& part : parts) {
    const ParameterRow& row = *rows.at(part.ours);
    const size_t columns = row.count / row.shape[0];
    const auto& [tensor, file] = theirs.at(part.theirs);
    values.resize(tensor->count);
    to_fp32(values.data(), tensor->data, tensor->dtype, tensor->count);
    if (!all_finite(values.data(), values.size()))
      throw UserError(file + ": tensor " + part.theirs + " has numbers that are not finite");
    for (size_t r = 0; r < tensor->shape[0]; ++r)
      std::copy_n(&values[r * columns], columns, &flat[row.offset + our_row(part.rows, s.model, r) * columns]);
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
  nlohmann::json special = {{"config", special_tokens_of(config)}, {"generation", nlohmann::json::object()}};
  if (std::filesystem::exists(from + "/generation_config.json"))
    special["generation"] = special_tokens_of(read_json_file(from + "/generation_config.json"));
  s.run = std::filesystem::path(run_directory).filename().string();
  const nlohmann::ordered_json state = {{"step", 0},
                                        {"tokens", 0},
                                        {"seed", s.seed},
                                        {"tokenizer", tokenizer ? tokenizer->name() : ""},
                                        {"vocabulary", tokenizer ? tokenizer->vocabulary() : s.model.vocab},
                                        {"special_tokens", special},
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
  const nlohmann::json config = export_model(out, source, with_code);
  std::printf("%s: %s from %s%s\n", out.c_str(), config["architectures"][0].get<std::string>().c_str(),
              describe(source).c_str(), source.tokenizer ? "" : "; its tokenizer is not known, so there is none in it");
  std::printf("Needs Transformers %s or later%s.\n", config["transformers_version"].get<std::string>().c_str(),
              with_code ? ", and trust_remote_code=True" : "");
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
