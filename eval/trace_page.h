#pragma once
// The page of `eval trace --html`: page.html with the numbers in it, which `eval trace --json` prints as well.
//
// trace.h follows one head; here is what the page's sliders need beyond it: queries and keys of every layer, head and
// position before RoPE, the table, the log-sum-exps that the model kept, and one token's way through all layers.

#include <cmath>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include <nlohmann/json.hpp>

#include "eval/trace.h"
#include "run/checkpoint.h"
#include "run/print.h"
#include "page.h"  // made from page.html

// A token as one short printable word.
inline std::string token_text(const Tokenizer* tokenizer, int token) {
  if (!tokenizer) return "#" + std::to_string(token);
  if (token == tokenizer->end_of_text()) return "<end>";
  std::string bytes, shown;
  if (token < tokenizer->vocabulary()) tokenizer->decode(token, bytes);
  for (unsigned char b : bytes) {
    char hex[8];
    std::snprintf(hex, sizeof hex, "\\x%02x", b);
    shown += b == '\n' ? "\\n" : b == '\t' ? "\\t" : b == ' ' ? "_" : b > 32 && b < 127 ? std::string(1, char(b)) : hex;
  }
  return shown.size() > 12 ? shown.substr(0, 11) + "~" : shown;
}

// The trace as one object, for plots. Heads have a number per channel, `scores` one per key; theta and angle are in
// radians; `queries` and `keys` (T, HS) are this head's after RoPE, of every position.
inline nlohmann::json trace_json(const Trace& trace, const Config& c, const std::vector<int>& tokens,
                                 const Tokenizer* tokenizer) {
  using nlohmann::json;
  auto head = [](const HeadTrace& h) { return json{{"raw", h.raw}, {"before", h.before}, {"after", h.after}}; };
  json object = {{"layer", trace.layer},         {"head", trace.head},           {"kv_head", trace.kv_head},
                 {"position", trace.position},   {"against", trace.against},     {"head_size", c.head_size},
                 {"rotary_dim", 2 * trace.pairs.size()}, {"query", head(trace.query)}, {"key", head(trace.key)},
                 {"other", head(trace.other)},   {"queries", trace.queries},     {"keys", trace.keys},
                 {"tokens", json::array()},      {"pairs", json::array()},       {"agrees", trace.agrees()}};
  for (int token : tokens) object["tokens"].push_back(token_text(tokenizer, token));
  for (const PairTrace& p : trace.pairs)
    object["pairs"].push_back(
        {{"a", p.a}, {"b", p.b}, {"theta", p.theta}, {"angle", p.angle}, {"cos", p.cos}, {"sin", p.sin}});
  for (const ScoreTrace& s : trace.scores) {
    object["scores"]["rotated"].push_back(s.rotated);
    object["scores"]["rest"].push_back(s.rest);
    object["scores"]["probability"].push_back(s.probability);
  }
  return object;
}

// Rows of numbers as printable characters, three each: `text` holds n = c0 * 8100 + c1 * 90 + c2 of every number, and
// the number is scale[row] * (n / 364499 - 1), within 1.5e-6 of the largest of its row. A c is a character's place
// among the 90 from '#' to '~' without '<' and '\', so that neither JSON nor HTML has to escape any. Half the size of
// decimals of that precision: a page of `small` stays under 1 MB. Row r starts at values + r * stride. What is
// not finite becomes 0: the page's check finds it.
inline nlohmann::json packed(const float* values, size_t rows, size_t columns, size_t stride) {
  constexpr int half = 364499;  // 90^3 = 729,000 values; the middle one is 0
  auto character = [](int c) {
    c += '#';
    c += c >= '<';
    return char(c + (c >= '\\'));
  };
  nlohmann::json scales = nlohmann::json::array();
  std::string text;
  for (size_t r = 0; r < rows; ++r) {
    const float* row = values + r * stride;
    float largest = 0;
    for (size_t i = 0; i < columns; ++i)
      if (std::isfinite(row[i])) largest = std::max(largest, std::fabs(row[i]));
    const double scale = largest > 0 ? std::atof(format("%.2g", largest * 1.06).c_str()) : 1;  // never below largest
    scales.push_back(scale);
    for (size_t i = 0; i < columns; ++i) {
      const int n = std::isfinite(row[i]) ? int(std::lround((row[i] / scale + 1) * half)) : half;
      text += {character(n / 8100), character(n / 90 % 90), character(n % 90)};
    }
  }
  return {{"scale", scales}, {"text", text}};
}

// fp32 values in as few digits as tell them apart.
inline nlohmann::json decimals_of(const float* values, size_t count) {
  nlohmann::json list = nlohmann::json::array();
  for (size_t i = 0; i < count; ++i) list.push_back(std::atof(format("%.9g", values[i]).c_str()));
  return list;
}

// The bytes of a model's cos/sin table at several lengths, at its own R and at R = HS, and what they stand beside.
inline nlohmann::json bytes_json(const std::string& name, const Config& c) {
  std::set<int> tables;  // layers with the same R have one
  for (int R : c.rotary_dims())
    if (R) tables.insert(R);
  nlohmann::json object = {{"name", name},
                           {"layers", c.layers},
                           {"heads", c.heads},
                           {"kv_heads", c.kv_heads},
                           {"head_size", c.head_size},
                           {"tables", tables},
                           {"qkv", c.qkv_width() * sizeof(float)},  // of a position in a layer
                           {"kv_cache", size_t(c.layers) * 2 * c.kv_heads * c.head_size * 2}};  // of a position, bf16
  for (size_t positions : {1 << 10, 1 << 13, 1 << 17, 1 << 20, 10 << 20}) {
    size_t bytes = 0;
    for (int R : tables) bytes += rope_table_bytes(positions, R);
    object["table"].push_back({positions, bytes, rope_table_bytes(positions, c.head_size / 2 * 2)});
  }
  return object;
}

// What `eval trace --json` prints: trace_json() and what this file adds. The model has just run these tokens, in
// trace_head().
inline nlohmann::json page_json(Model<Cpu, float>& model, const Trace& trace, const std::vector<int>& tokens,
                                const Tokenizer* tokenizer, const std::string& name) {
  using nlohmann::json;
  const Config& c = model.config;
  const int T = int(tokens.size()), HS = c.head_size, C = c.width, p = trace.position;
  json object = trace_json(trace, c, tokens, tokenizer);
  object["name"] = name;
  object["model"] = {{"layers", c.layers},
                     {"width", C},
                     {"heads", c.heads},
                     {"kv_heads", c.kv_heads},
                     {"head_size", HS},
                     {"mlp_hidden", c.mlp_hidden},
                     {"context", c.context},
                     {"parameters", model.table.parameters},
                     {"rope_base", c.rope_base},
                     {"rope_frequencies", c.rope_frequencies},
                     {"rope_scaling", c.rope_scaling},
                     {"rope_pairs", c.rope_pairs == RopePairs::half ? "half" : "interleaved"},
                     {"qk_norm", c.qk_norm},
                     {"attention_softcap", c.attention_softcap},
                     {"norm", c.norm == NormKind::rms ? "rms" : "layer"},
                     {"mlp", c.mlp == MlpKind::swiglu ? "swiglu" : "gelu"},
                     {"block", c.block == BlockKind::sequential ? "sequential" : "parallel"}};
  for (const CheckTrace& check : trace.checks)
    object["checks"].push_back({{"what", check.what}, {"agrees", check.agrees}});
  // A token's bytes. Those that are no UTF-8 become U+FFFD when the object is dumped.
  auto text_of = [&](int token) {
    std::string bytes;
    if (tokenizer && token != tokenizer->end_of_text() && token < tokenizer->vocabulary())
      tokenizer->decode(token, bytes);
    return bytes;
  };
  for (int token : tokens) object["texts"].push_back(text_of(token));

  // How each R turns that the layers have; a layer's `rope` is its place in this list.
  std::map<int, size_t> ropes;
  for (const RopeTable& rope : model.rope) {
    if (!ropes.insert({rope.R, ropes.size()}).second) continue;
    const RopeAngles angles = c.angles(rope.R);
    object["ropes"].push_back({{"rotary_dim", rope.R},
                               {"theta", angles.of(rope.positions)},
                               {"attention", angles.attention},
                               {"cos_sin", decimals_of(rope.cos_sin, size_t(T) * rope.R)}});  // (T, R/2, 2)
  }
  const int slots = c.heads + 2 * c.kv_heads;
  for (int l = 0; l < c.layers; ++l) {
    const BlockActivations<float>& a = model.acts.blocks[l];
    const std::vector<float> before = layer_heads(model, l, T).before;
    json layer = {{"rope", ropes[model.rope[l].R]}, {"heads", json::array()}, {"lse", json::array()}};
    for (int slot = 0; slot < c.heads + c.kv_heads; ++slot)  // (T, HS) each: queries, then keys, before RoPE
      layer["heads"].push_back(packed(&before[size_t(slot) * HS], T, HS, size_t(slots) * HS));
    for (int h = 0; h < c.heads; ++h) layer["lse"].push_back(decimals_of(a.lse + size_t(h) * T, T));
    // The token's own way: a row of each activation.
    auto row = [&](const float* values, int width) { return packed(values + size_t(p) * width, 1, width, width); };
    layer["x"] = row(a.x, C);
    layer["v"] = packed(a.qkv + (size_t(p) * slots + c.heads + c.kv_heads) * HS, c.kv_heads, HS, HS);
    layer["att"] = row(a.att, c.heads * HS);
    layer["x2"] = row(a.x2, C);
    object["layers"].push_back(layer);
  }
  object["x"] = packed(model.acts.x + size_t(p) * C, 1, C, C);
  object["final"] = packed(model.acts.final + size_t(p) * C, 1, C, C);

  // What the model expects next: the five most probable tokens.
  std::vector<float> logits(size_t(T - p) * c.vocab);
  model.logits(logits.data(), T, T - p);
  logits.resize(c.vocab);
  const float highest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float logit : logits) sum += std::exp(double(logit) - highest);
  for (int i = 0; i < std::min(5, c.vocab); ++i) {
    const auto best = std::max_element(logits.begin(), logits.end());
    const int token = int(best - logits.begin());
    object["next"].push_back({{"token", token_text(tokenizer, token)},
                              {"text", text_of(token)},
                              {"probability", std::exp(double(*best) - highest) / sum}});
    *best = -INFINITY;
  }

  // The three models of arXiv 2603.11611 at 10 %.
  object["bytes"].push_back(bytes_json("this model", c));
  for (auto [paper, layers, heads, kv_heads, head_size] :
       {std::tuple{"Llama 1B", 16, 32, 8, 64}, {"Pythia 1B", 16, 8, 8, 256}, {"Llama 8B", 36, 32, 8, 128}}) {
    Config other;
    other.layers = layers, other.heads = heads, other.kv_heads = kv_heads, other.head_size = head_size;
    other.rotary_dim = rotary_dim_from_fraction(0.1, head_size);
    object["bytes"].push_back(bytes_json(paper, other));
  }
  return object;
}

// The length of the text in a run's own page: up to 64 tokens, fewer where the page would pass 1 MB.
inline int page_length(const Config& c) {
  const int numbers = c.layers * (c.heads + c.kv_heads) * c.head_size;  // packed, of a position
  return std::min(c.context, std::clamp(250000 / numbers, 16, 64));
}

// An object as text for a terminal or a file: ASCII only, whatever bytes the strings hold.
inline std::string dump_json(const nlohmann::json& object) {
  return object.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
}

// page.html with the object of page_json() in it. Within <script> only '<' could end the data, or begin a comment.
inline std::string trace_page(nlohmann::json object) {
  object.erase("queries"), object.erase("keys");  // the page turns them itself
  std::string data, page = kPage;
  for (char letter : dump_json(object)) letter == '<' ? data += "\\u003c" : data += letter;
  const std::string mark = "{\"the numbers\": \"stand here\"}";
  return page.replace(page.find(mark), mark.size(), data);
}

// The page of a checkpoint: the last of the tokens, in head 0 of layer 0.
inline void write_page(const std::string& path, const std::string& checkpoint, Config c, const std::vector<int>& tokens,
                       const Tokenizer* tokenizer, const std::string& name) {
  const int T = int(tokens.size());
  c.recompute = false;  // the trace looks into every block
  Cpu cpu;
  Model<Cpu, float> model(cpu, c, 1, T, false);
  load_weights(model, checkpoint);
  const Trace trace = trace_head(model, tokens, T - 1, 0, 0, -1);
  write_text_file(path, trace_page(page_json(model, trace, tokens, tokenizer, name)));
}
