#pragma once
// The rotation of a model in Hugging Face's format: which channels, with which frequencies. rope_parameters
// (Transformers 5), rope_scaling and flat keys (4) may stand side by side, and must then agree. UserError, naming the
// key.

#include <algorithm>
#include <cmath>

#include "eval/huggingface_families.h"

// Names under which fraction and base stand outside of rope_parameters; a class heeds one of each.
inline const std::vector<const char*> fraction_keys = {"partial_rotary_factor", "rotary_pct"};
inline const std::vector<const char*> base_keys = {"rope_theta", "rotary_emb_base"};
inline const std::vector<const char*> rope_objects = {"rope_scaling", "rope_parameters"};

// What rope_parameters and rope_scaling say together.
inline nlohmann::json rope_settings(const nlohmann::json& json) {
  nlohmann::json settings = nlohmann::json::object();
  for (const char* name : rope_objects) {
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
// shorten the context: where LongRoPE has other factors for longer texts, it becomes that of the first training.
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
      throw UserError("rope_parameters: " + key + " is " + shown(value) + ", which means nothing for rope_type " +
                      type);
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
    return "yarn:" + digits(factor) + "," + digits(positions) + "," + digits(number("attention_factor", inferred)) +
           "," + digits(number("beta_fast", 32)) + "," + digits(number("beta_slow", 1));
  }
  const double inferred = factor <= 1 ? 1 : std::sqrt(1 + std::log(factor) / std::log(positions)),
               attention = number("attention_factor", inferred);
  bool changes = attention != 1;
  auto factors = [&](const char* key) {
    const nlohmann::json list = settings.value(key, nlohmann::json());
    if (!list.is_array() || list.size() != size_t(c.rotary_dim / 2))
      throw UserError(std::string("rope_parameters: ") + key + " is " + shown(list) + "; it must be a list of " +
                      std::to_string(c.rotary_dim / 2) + ", one for each pair of channels");
    std::string text;
    for (const nlohmann::json& one : list) {
      if (!one.is_number() || !(one.get<double>() > 0) || !std::isfinite(one.get<double>()))
        throw UserError(std::string("rope_parameters: ") + key + " has " + shown(one) +
                        "; its factors must be numbers above 0");
      text += "," + digits(one.get<double>());
      changes = changes || one != 1;
    }
    return text;
  };
  const std::string in_short = factors("short_factor"), scaling = "longrope:" + digits(attention) + in_short;
  const std::string in_long = factors("long_factor");
  if (in_short == in_long) return changes ? scaling : "none";
  c.context = int(std::min<double>(c.context, positions));
  return scaling + ";" + digits(positions) + in_long;
}

// Fills in R, base and what changes the frequencies. After the keys of the family.
inline void read_rotation(const Family& family, const nlohmann::json& json, Described& d) {
  Config& c = d.c;
  const Rotation& rotation = family.rotation;
  if (rotation.dimension_key) {
    for (const auto* keys : {&fraction_keys, &base_keys, &rope_objects})
      for (const char* key : *keys)
        if (json.contains(key) && !json[key].is_null())
          throw UserError(std::string(key) + " is " + shown(json[key]) + ", which " + family.architecture + " ignores");
    const nlohmann::json R = json.value(rotation.dimension_key, nlohmann::json());
    if (!R.is_number_integer() || R < 2 || R > c.head_size || R.get<int>() % 2)
      throw UserError(std::string(rotation.dimension_key) + " is " + shown(R) +
                      "; it must be an even number from 2 to the head size " + std::to_string(c.head_size));
    c.rotary_dim = R.get<int>(), c.rope_base = rotation.base;
    return;
  }
  const nlohmann::json settings = rope_settings(json), kind = settings.value("rope_type", nlohmann::json("default"));
  const std::string type = kind.is_string() ? kind.get<std::string>() : shown(kind);
  c.rope_base = rope_number(json, settings, "rope_theta", rotation.base_key, base_keys, rotation.base);
  const double fraction = rope_number(json, settings, "partial_rotary_factor", rotation.fraction_key, fraction_keys,
                                      rotation.fraction);
  const std::string said = "partial_rotary_factor " + digits(fraction);
  if (!(fraction >= 0 && fraction <= 1)) throw UserError(said + " is not between 0 and 1");
  if (!rotation.partial && fraction != 1) throw UserError(said + " is ignored by " + family.architecture);
  c.rotary_dim = int(fraction * c.head_size);
  if (c.rotary_dim == 0 && !rotation.none)
    throw UserError(said + ": " + family.architecture + " does not work with it");
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
// factor for each.
inline void write_rotation(const Family& family, const Config& c, nlohmann::ordered_json& json) {
  const Rotation& rotation = family.rotation;
  const int R = c.rotary_dim;
  if (rotation.dimension_key) {
    json[rotation.dimension_key] = R;
    return;
  }
  const bool phi3 = family.type == "phi3", plain = c.rope_frequencies == "rotary";
  const RopeScaling parts = rope_scaling_parts(c.rope_scaling);
  const std::string& type = parts.type;
  const std::vector<double>&x = parts.x, &y = parts.y;
  nlohmann::ordered_json rope = {{"rope_type", "default"}};
  // Phi3's class counts its factors by width / heads, so it refuses them where the head size is another one. Where it
  // is not, they are also a guard: versions that do not know of a fraction refuse lists that are not of HS/2 factors.
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
    auto factors = [&](int positions) {
      std::vector<double> all;
      for (int i = 0; i < R / 2; ++i)
        all.push_back(plain && type == "longrope" ? (positions > angles.limit ? y : x)[1 + i]
                      : plain && type == "none"   ? 1
                                                  : rope_frequency(i, R, c.rope_base) / angles.of(positions)[i]);
      return all;
    };
    // A model of more positions than the limit has only the factors for longer texts.
    const bool two = !y.empty() && c.context <= angles.limit;
    const int positions = two ? int(angles.limit) : c.context;
    rope = {{"rope_type", "longrope"}, {"short_factor", factors(c.context)}, {"long_factor", factors(INT32_MAX)},
            {"original_max_position_embeddings", positions}, {"attention_factor", angles.attention}};
    json["original_max_position_embeddings"] = positions;
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
