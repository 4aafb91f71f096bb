#pragma once
// The partial-RoPE path of one token, byte by byte: what `eval trace` shows.
//
// trace_head() runs the model on the CPU in fp32, does every step of the path again beside it (in double where it is
// arithmetic), and writes down whatever does not agree. trace_print.h shows it.

#include <string>
#include <vector>

#include "model.h"
#include "text/tokenizer.h"

// A query or key head at one position, on its way through RoPE. All vectors (HS).
struct HeadTrace {
  int slot = 0;                           // which head of the packed buffer: 0 .. NH + NKV - 1
  size_t offset = 0;                      // bytes from the start of qkv to channel 0
  std::vector<float> raw, before, after;  // from the matrix product; after QK-Norm (else the same); after RoPE
  double rstd = 1;                        // QK-Norm: raw * rstd * weight = before
};

struct PairTrace {
  int a = 0, b = 0;             // the two channels
  double theta = 0, angle = 0;  // radians per position, radians
  float cos = 1, sin = 0;       // from the model's table
  size_t table_offset = 0;      // bytes from the start of the table to this cos; sin is 4 further
};

// A score q.k / sqrt(HS), in the parts that position can and cannot reach.
struct ScoreTrace {
  double rotated = 0, rest = 0;
  double capped = 0;  // the score after the soft cap; without one the score
  double probability = 0;
  double score() const { return rotated + rest; }
};

struct CheckTrace {
  std::string what;
  bool agrees = false;
};

struct Trace {
  int layer = 0, head = 0, kv_head = 0, position = 0, against = 0;
  size_t qkv_bytes = 0, row_bytes = 0;  // of the whole packed buffer, of one position
  HeadTrace query, key, other;          // at position; the key at `against`
  std::vector<PairTrace> pairs;         // (R/2), at position
  std::vector<ScoreTrace> scores;       // (position + 1): the query against key s
  std::vector<std::vector<float>> queries, keys;  // (T, HS): this head's after RoPE, of every position
  double lse = 0;                       // the model's
  double attention = 1;                 // what cos and sin are multiplied by
  std::vector<CheckTrace> checks;
  bool agrees() const {
    for (const CheckTrace& c : checks)
      if (!c.agrees) return false;
    return true;
  }
};

// The score that a pair of channels adds, before scaling, when query pair (qa, qb) and key pair (ka, kb), both as they
// are before RoPE, are turned against each other by `angle` = (t - s) theta_i radians:
//     |q| |k| cos(alpha - angle),  alpha the angle from query to key
inline double pair_score(double qa, double qb, double ka, double kb, double angle) {
  return (qa * ka + qb * kb) * std::cos(angle) + (qa * kb - qb * ka) * std::sin(angle);
}

// The packed heads of a layer, (T, NH + 2*NKV, HS), at each stage: from the matrix product, after QK-Norm (else the
// same), after RoPE; and what QK-Norm read, (T, NH + NKV, HS). Made again from the activations of forward() by the
// model's own operations, stopping to look after each.
struct LayerHeads {
  std::vector<float> raw, before, after, read;
};

inline LayerHeads layer_heads(Model<Cpu, float>& model, int layer, int T) {
  const Config& c = model.config;
  const BlockActivations<float>& a = model.acts.blocks[layer];
  const BlockParameters<float>& w = model.weights.blocks[layer];
  const RopeShape shape = c.heads_shape(1, T, 0);
  const RopeTable& rope = model.rope[layer];
  const size_t heads = size_t(T) * (c.heads + c.kv_heads);
  LayerHeads h;
  h.raw.resize(size_t(T) * c.qkv_width());
  linear_forward(model.be, h.raw.data(), a.h1, w.qkv, w.qkv_bias, T, c.width, c.qkv_width());
  h.before = h.after = h.raw;
  if (c.qk_norm) {
    std::vector<float> rstd(heads), no_turn(size_t(T) * rope.R);
    for (size_t i = 0; i < no_turn.size(); i += 2) no_turn[i] = 1;  // cos 1, sin 0
    const RopeTable still = {no_turn.data(), T, rope.R, c.rope_pairs};
    h.read.resize(heads * c.head_size);
    for (auto [values, table] :
         {std::pair<std::vector<float>*, const RopeTable*>{&h.before, &still}, {&h.after, &rope}})
      qk_norm_rope_forward(model.be, values->data(), h.read.data(), rstd.data(), w.q_norm, w.k_norm, *table, shape,
                           c.norm_eps);
  } else {
    rope_forward(model.be, h.after.data(), rope, shape);
  }
  return h;
}

// tokens: the whole text, at most model.T of them. against < 0: the earlier key with the highest probability.
inline Trace trace_head(Model<Cpu, float>& model, const std::vector<int>& tokens, int position, int layer, int head,
                        int against) {
  const Config& c = model.config;
  const int T = int(tokens.size()), HS = c.head_size, QKV = c.qkv_width();
  auto in_range = [](const char* flag, int value, int end) {
    if (value < 0 || value >= end)
      throw UserError(std::string(flag) + " " + std::to_string(value) + ": must lie between 0 and " +
                      std::to_string(end - 1));
  };
  in_range("--layer", layer, c.layers);
  in_range("--head", head, c.heads);
  in_range("--token", position, T);
  if (against >= 0) in_range("--against", against, position + 1);  // causal: no key of the future

  model.forward(tokens.data(), 1, T);
  const RopeTable& rope = model.rope[layer];
  const int R = rope.R;
  const BlockActivations<float>& a = model.acts.blocks[layer];
  const LayerHeads heads = layer_heads(model, layer, T);

  Trace trace;
  trace.layer = layer, trace.head = head, trace.kv_head = head / (c.heads / c.kv_heads), trace.position = position;
  trace.row_bytes = size_t(QKV) * sizeof(float);
  trace.qkv_bytes = T * trace.row_bytes;
  auto head_at = [&](int t, int slot) {
    HeadTrace h;
    h.slot = slot;
    const size_t at = (size_t(t) * (c.heads + 2 * c.kv_heads) + slot) * HS;
    h.offset = at * sizeof(float);
    h.raw.assign(&heads.raw[at], &heads.raw[at] + HS);
    h.before.assign(&heads.before[at], &heads.before[at] + HS);
    h.after.assign(a.qkv + at, a.qkv + at + HS);
    if (c.qk_norm) h.rstd = a.qk_rstd[size_t(t) * (c.heads + c.kv_heads) + slot];
    return h;
  };
  trace.query = head_at(position, head);
  trace.key = head_at(position, c.heads + trace.kv_head);
  for (int t = 0; t < T; ++t) {
    trace.queries.push_back(head_at(t, head).after);
    trace.keys.push_back(head_at(t, c.heads + trace.kv_head).after);
  }

  const RopeAngles angles = c.angles(R);
  trace.attention = angles.attention;
  bool table_agrees = true;
  for (int i = 0; i < R / 2; ++i) {
    PairTrace p;
    p.a = rope_first(c.rope_pairs, i), p.b = rope_second(c.rope_pairs, i, R);
    p.theta = angles.of(rope.positions)[i];
    p.angle = position * p.theta;
    p.table_offset = (size_t(position) * (R / 2) + i) * 2 * sizeof(float);
    p.cos = rope.cos_sin[p.table_offset / sizeof(float)];
    p.sin = rope.cos_sin[p.table_offset / sizeof(float) + 1];
    table_agrees = table_agrees && p.cos == float(angles.attention * std::cos(p.angle)) &&
                   p.sin == float(angles.attention * std::sin(p.angle));
    trace.pairs.push_back(p);
  }

  // The scores, in double, from the model's buffer. score_error bounds what fp32 can have done to one of them: HS
  // products and additions, each rounded by at most 2^-24 of the sum of magnitudes.
  const double scale = 1 / std::sqrt(double(HS)), rounding = 0x1p-24;
  double highest = -INFINITY, score_error = 0, sum = 0, total = 0;
  for (int s = 0; s <= position; ++s) {
    const float* k = a.qkv + (size_t(s) * (c.heads + 2 * c.kv_heads) + c.heads + trace.kv_head) * HS;
    ScoreTrace score;
    double magnitude = 0;
    for (int i = 0; i < HS; ++i) {
      const double product = double(trace.query.after[i]) * k[i] * scale;
      (i < R ? score.rotated : score.rest) += product;
      magnitude += std::fabs(product);
    }
    score_error = std::max(score_error, (HS + 2) * rounding * magnitude);
    const double cap = c.attention_softcap;
    score.capped = cap ? cap * std::tanh(score.score() / cap) : score.score();
    highest = std::max(highest, score.capped);
    trace.scores.push_back(score);
  }
  score_error += 4 * rounding * c.attention_softcap;  // soft_cap's
  trace.lse = a.lse[size_t(head) * T + position];
  for (ScoreTrace& s : trace.scores) {
    s.probability = std::exp(s.capped - trace.lse);
    sum += std::exp(s.capped - highest);
    total += s.probability;
  }
  if (against < 0) {
    against = position ? 0 : position;
    for (int s = 0; s < position; ++s)
      if (trace.scores[s].probability > trace.scores[against].probability) against = s;
  }
  trace.against = against;
  trace.other = head_at(against, c.heads + trace.kv_head);

  // What was shown against what the model has.
  auto check = [&](bool agrees, const std::string& what) { trace.checks.push_back({what, agrees}); };
  if (c.qk_norm)
    check(std::memcmp(heads.read.data(), a.qk_raw, heads.read.size() * sizeof(float)) == 0,
          "h1 Wqkv^T, done again, is what QK-Norm read, to the bit");
  check(std::memcmp(heads.after.data(), a.qkv, heads.after.size() * sizeof(float)) == 0,
        std::string(c.qk_norm ? "QK-Norm and RoPE" : "h1 Wqkv^T and RoPE") +
            ", done again, give the model's qkv to the bit");
  if (R) check(table_agrees, "cos and sin in the table are those of t theta_i, to the bit of fp32");
  bool turned = true, untouched = true;
  double met = 0, met_error = 0;
  for (const HeadTrace* h : {&trace.query, &trace.key}) {
    for (const PairTrace& p : trace.pairs) {
      // Two products and their sum, each rounded once.
      const double x = h->before[p.a], y = h->before[p.b];
      const double room = 2.02 * rounding * (std::fabs(x) + std::fabs(y)) + 1e-37;
      turned = turned && std::fabs(x * p.cos - y * p.sin - h->after[p.a]) <= room &&
               std::fabs(x * p.sin + y * p.cos - h->after[p.b]) <= room;
    }
    if (HS > R) untouched = untouched && std::memcmp(&h->before[R], &h->after[R], (HS - R) * sizeof(float)) == 0;
  }
  if (R) check(turned, "a cos - b sin and a sin + b cos, in double, are the values after RoPE within fp32 rounding");
  if (HS > R)
    check(untouched,
          "channels " + std::to_string(R) + " to " + std::to_string(HS - 1) + " are the same after RoPE, to the bit");
  for (const PairTrace& p : trace.pairs) {
    met += scale * angles.attention * angles.attention *
           pair_score(trace.query.before[p.a], trace.query.before[p.b], trace.other.before[p.a],
                      trace.other.before[p.b], (position - against) * p.theta);
    // Each number of a turned pair is off by at most 3.02 roundings of the pair's length (two products, a sum, cos or
    // sin), so the pair by 3.02 sqrt(2) of them, and a product of two by twice that.
    met_error += 10 * rounding * scale * std::hypot(trace.query.before[p.a], trace.query.before[p.b]) *
                 std::hypot(trace.other.before[p.a], trace.other.before[p.b]);
  }
  if (R)
    check(std::fabs(met - trace.scores[against].rotated) <= met_error + 1e-37,
          "turned by the distance " + std::to_string(position - against) +
              " alone, query and key give the same rotated part");
  // exp_ is good to 2 ulp, and a sum of T positive numbers to T roundings.
  const double lse_error = score_error + (T + 8) * rounding + 4 * rounding * std::fabs(trace.lse);
  check(std::fabs(highest + std::log(sum) - trace.lse) <= lse_error,
        "the log-sum-exp of these scores is the one that the model kept");
  check(std::fabs(total - 1) <= 2 * lse_error, "the probabilities exp(score - lse) sum to 1");
  std::vector<double> out(HS), size(HS);
  double out_error = 0;
  for (int s = 0; s <= position; ++s) {
    const float* v = a.qkv + (size_t(s) * (c.heads + 2 * c.kv_heads) + c.heads + c.kv_heads + trace.kv_head) * HS;
    for (int i = 0; i < HS; ++i)
      out[i] += trace.scores[s].probability * v[i], size[i] += trace.scores[s].probability * std::fabs(v[i]);
  }
  for (int i = 0; i < HS; ++i) {
    const double off = std::fabs(out[i] - a.att[(size_t(position) * c.heads + head) * HS + i]);
    out_error = std::max(out_error, off / (size[i] * (2 * score_error + 2 * lse_error + (T + 8) * rounding) + 1e-37));
  }
  check(out_error <= 1, "the values, weighted with these probabilities, sum to the head's output");
  return trace;
}
