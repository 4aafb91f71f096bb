#pragma once
// The partial-RoPE path of one token, byte by byte: what `eval trace` shows.
//
// trace_head() runs the model on the CPU in fp32, does every step of the path again beside it (in double where it is
// arithmetic), and writes down whatever does not agree. print_trace() and trace_json() only show.

#include <cstdarg>
#include <cstdio>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "eval/loss.h"
#include "run/print.h"
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

// tokens: the whole text, at most model.T of them. against < 0: the earlier key with the highest probability.
inline Trace trace_head(Model<Cpu, float>& model, const std::vector<int>& tokens, int position, int layer, int head,
                        int against) {
  const Config& c = model.config;
  const int T = int(tokens.size()), HS = c.head_size, R = c.rotary_dim, QKV = c.qkv_width(),
            heads = c.heads + c.kv_heads;
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
  const BlockActivations<float>& a = model.acts.blocks[layer];
  const BlockParameters<float>& w = model.weights.blocks[layer];
  const RopeShape shape = c.heads_shape(1, T, 0);

  // The matrix product, QK-Norm and RoPE again, by the model's own operations, stopping to look after each.
  std::vector<float> raw(size_t(T) * QKV), before, again;
  linear_forward(model.be, raw.data(), a.h1, w.qkv, w.qkv_bias, T, c.width, QKV);
  before = again = raw;
  std::vector<float> scratch(size_t(T) * heads * HS), rstd(size_t(T) * heads), no_turn(size_t(T) * R);
  for (size_t i = 0; i < no_turn.size(); i += 2) no_turn[i] = 1;  // cos 1, sin 0
  const RopeTable still = {no_turn.data(), T, R, c.rope_pairs};
  if (c.qk_norm) {
    qk_norm_rope_forward(model.be, before.data(), scratch.data(), rstd.data(), w.q_norm, w.k_norm, still, shape,
                         c.norm_eps);
    qk_norm_rope_forward(model.be, again.data(), scratch.data(), rstd.data(), w.q_norm, w.k_norm, model.rope, shape,
                         c.norm_eps);
  } else {
    rope_forward(model.be, again.data(), model.rope, shape);
  }

  Trace trace;
  trace.layer = layer, trace.head = head, trace.kv_head = head / (c.heads / c.kv_heads), trace.position = position;
  trace.row_bytes = size_t(QKV) * sizeof(float);
  trace.qkv_bytes = T * trace.row_bytes;
  auto head_at = [&](int t, int slot) {
    HeadTrace h;
    h.slot = slot;
    const size_t at = (size_t(t) * (c.heads + 2 * c.kv_heads) + slot) * HS;
    h.offset = at * sizeof(float);
    h.raw.assign(&raw[at], &raw[at] + HS);
    h.before.assign(&before[at], &before[at] + HS);
    h.after.assign(a.qkv + at, a.qkv + at + HS);
    if (c.qk_norm) h.rstd = a.qk_rstd[size_t(t) * heads + slot];
    return h;
  };
  trace.query = head_at(position, head);
  trace.key = head_at(position, c.heads + trace.kv_head);
  for (int t = 0; t < T; ++t) {
    trace.queries.push_back(head_at(t, head).after);
    trace.keys.push_back(head_at(t, c.heads + trace.kv_head).after);
  }

  bool table_agrees = true;
  for (int i = 0; i < R / 2; ++i) {
    PairTrace p;
    p.a = rope_first(c.rope_pairs, i), p.b = rope_second(c.rope_pairs, i, R);
    p.theta = rope_frequency(i, R, c.rope_base);
    p.angle = position * p.theta;
    p.table_offset = (size_t(position) * (R / 2) + i) * 2 * sizeof(float);
    p.cos = model.rope.cos_sin[p.table_offset / sizeof(float)];
    p.sin = model.rope.cos_sin[p.table_offset / sizeof(float) + 1];
    table_agrees = table_agrees && p.cos == float(std::cos(p.angle)) && p.sin == float(std::sin(p.angle));
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
    highest = std::max(highest, score.score());
    trace.scores.push_back(score);
  }
  trace.lse = a.lse[size_t(head) * T + position];
  for (ScoreTrace& s : trace.scores) {
    s.probability = std::exp(s.score() - trace.lse);
    sum += std::exp(s.score() - highest);
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
    check(std::memcmp(scratch.data(), a.qk_raw, scratch.size() * sizeof(float)) == 0,
          "h1 Wqkv^T, done again, is what QK-Norm read, to the bit");
  check(std::memcmp(again.data(), a.qkv, again.size() * sizeof(float)) == 0,
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
    met += scale * pair_score(trace.query.before[p.a], trace.query.before[p.b], trace.other.before[p.a],
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

// ---------------------------------------------------------------------------------------------------------------------
// Print: at most 100 columns; colour as ANSI sequences where asked for.

class Page {
 public:
  std::string text;
  explicit Page(bool colour) : colour_(colour) {}
  __attribute__((format(printf, 2, 3))) void say(const char* format, ...) {
    va_list arguments, again;
    va_start(arguments, format);
    va_copy(again, arguments);
    const size_t start = text.size(), length = std::vsnprintf(nullptr, 0, format, arguments);
    text.resize(start + length + 1);  // and the zero
    std::vsnprintf(&text[start], length + 1, format, again);
    text.pop_back();
    va_end(again);
    va_end(arguments);
  }
  std::string paint(const char* code, const std::string& s) const {
    return colour_ ? std::string("\033[") + code + "m" + s + "\033[0m" : s;
  }
  void title(const std::string& s) { text += "\n" + paint("1", s) + "\n"; }
  // Words of printed width `widths`, in lines that start with an indent.
  void flow(const std::vector<std::pair<std::string, size_t>>& words, size_t indent) {
    size_t column = 0;
    for (const auto& [word, width] : words) {
      if (column && column + 1 + width > 100) text += "\n", column = 0;
      text += column ? " " : std::string(indent, ' ');
      column += (column ? 1 : indent) + width;
      text += word;
    }
    text += "\n";
  }

 private:
  bool colour_;
};

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

// The bytes of a number, e.g. "3f 80 00 00" for 1.
inline std::string hex_bytes(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  char text[16];
  std::snprintf(text, sizeof text, "%02x %02x %02x %02x", bits >> 24, bits >> 16 & 255, bits >> 8 & 255, bits & 255);
  return text;
}

// The direction of a pair (a, b) as an arrow, a to the right and b up.
inline const char* arrow(double a, double b) {
  static const char* arrows[] = {"→", "↗", "↑", "↖", "←", "↙", "↓", "↘"};
  return arrows[(int(std::lround(std::atan2(b, a) / (M_PI / 4))) + 8) % 8];
}

// A bar of up to 12 columns for a share between 0 and 1.
inline std::string bar(double share) {
  static const char* parts[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const int eighths = std::clamp(int(std::lround(share * 96)), 0, 96);
  std::string text;
  for (int i = 0; i < eighths / 8; ++i) text += "█";
  return text + parts[eighths % 8];
}

// `all` shows every pair, channel and key; otherwise long lists are cut, and say so.
inline std::string print_trace(const Trace& trace, const Config& c, const std::vector<int>& tokens,
                               const Tokenizer* tokenizer, bool colour, bool all) {
  const int HS = c.head_size, R = c.rotary_dim, t = trace.position, pairs = R / 2, T = int(tokens.size());
  const size_t head_bytes = HS * sizeof(float);
  static const char* colours[] = {"36", "33", "35", "32", "34", "31"};
  const char *dim = "2", *bold = "1";
  Page page(colour);
  auto plural = [](int n, const char* noun) { return std::to_string(n) + " " + noun + (n == 1 ? "" : "s"); };

  page.say("%s\n", page.paint(bold, "One token through partial RoPE, byte by byte").c_str());
  page.say("Layer %d of %d, query head %d of %d, key/value head %d of %d. A head has HS = %d channels;\n", trace.layer,
           c.layers, trace.head, c.heads, trace.kv_head, c.kv_heads, HS);
  page.say("RoPE turns the first R = %d of them (%.4g %%), in %s, base %.6g.\n", R, 100.0 * R / HS,
           R == 0                            ? "no pairs at all: this is NoPE"
           : c.rope_pairs == RopePairs::half ? "half-split pairs (i, i + R/2)"
                                             : "interleaved pairs (2i, 2i + 1)",
           c.rope_base);

  page.title("The tokens, as position:text. We follow the one in brackets.");
  std::vector<std::pair<std::string, size_t>> list;
  for (int s = 0; s < T; ++s) {
    if (!all && T > 120 && s >= 40 && s < T - 40 && std::abs(s - t) > 8) {
      if (list.back().first != "...") list.push_back({"...", 3});
      continue;
    }
    const std::string name = std::to_string(s) + ":" + token_text(tokenizer, tokens[s]),
                      shown = s == t ? "[" + name + "]" : name;
    list.push_back({s == t ? page.paint("1;33", shown) : shown, shown.size()});
  }
  page.flow(list, 2);

  // 1
  page.title("1  Where the query and the key lie");
  page.say(
      "   One matrix product, qkv = h1 Wqkv^T, writes all heads of a position side by side. The buffer\n"
      "   of this layer has shape (T %d, heads %d + 2*%d, channels %d), fp32: %s bytes.\n"
      "   Position %d is bytes %s to %s:\n",
      T, c.heads, c.kv_heads, HS, grouped(trace.qkv_bytes).c_str(), t, grouped(t * trace.row_bytes).c_str(),
      grouped((t + 1) * trace.row_bytes - 1).c_str());
  list.clear();
  for (int slot = 0; slot < c.heads + 2 * c.kv_heads; ++slot) {
    const int kind = slot < c.heads ? 0 : slot < c.heads + c.kv_heads ? 1 : 2;
    const std::string name = std::string(1, "qkv"[kind]) + std::to_string(kind == 0   ? slot
                                                                          : kind == 1 ? slot - c.heads
                                                                                      : slot - c.heads - c.kv_heads);
    const bool ours = slot == trace.query.slot || slot == trace.key.slot;
    list.push_back({ours ? page.paint("1;33", "[" + name + "]") : page.paint(dim, name), name.size() + 2 * ours});
  }
  page.flow(list, 5);
  page.say("   Each head is %zu bytes. Channel c of a head stands 4 c bytes behind its start:\n", head_bytes);
  page.say("     query head %-3d starts at byte (%d*%d + %d) * %zu = %s\n", trace.head, t, c.heads + 2 * c.kv_heads,
           trace.query.slot, head_bytes, grouped(trace.query.offset).c_str());
  page.say("     key head %-5d starts at byte (%d*%d + %d) * %zu = %s\n", trace.kv_head, t, c.heads + 2 * c.kv_heads,
           trace.key.slot, head_bytes, grouped(trace.key.offset).c_str());

  // The rotated channels in the colours of their pairs, the untouched ones dim. `from` 0 or R.
  auto channels = [&](const std::vector<float>& values, int from, size_t room) {
    std::vector<const char*> paint(HS, dim);
    for (int i = 0; i < pairs; ++i) paint[trace.pairs[i].a] = paint[trace.pairs[i].b] = colours[i % 6];
    std::string text;
    const int shown = std::min<int>(HS - from, all ? HS : room);
    for (int i = 0; i < shown; ++i) {
      if (all && i && i % room == 0) text += "\n      ";
      text += page.paint(paint[from + i], format(" %8.4f", values[from + i]));
    }
    return text + (shown < HS - from ? " ..." : "");
  };
  auto length = [](const std::vector<float>& values) {
    double sum = 0;
    for (float v : values) sum += double(v) * v;
    return std::sqrt(sum);
  };
  page.say("\n   Channels 0, 1, 2, ... before RoPE%s%s:\n", c.qk_norm ? " and QK-Norm" : "",
           !colour || R == 0 ? ""
           : R == HS         ? " (the two of a pair in one colour)"
                             : " (a pair in one colour, what RoPE leaves alone dim)");
  for (auto [name, h] : {std::pair{"q", &trace.query}, std::pair{"k", &trace.key}})
    page.say("     %s%s   length %.4f\n", name, channels(h->raw, 0, 8).c_str(), length(h->raw));
  if (c.qk_norm) {
    page.say("\n   QK-Norm divides each head by its root mean square, times a learned weight per channel:\n");
    for (auto [name, h] : {std::pair{"q", &trace.query}, std::pair{"k", &trace.key}})
      page.say("     %s%s   length %.4f\n", name, channels(h->before, 0, 8).c_str(), length(h->before));
    page.say("     (1 / root mean square: query %.5f, key %.5f)\n", trace.query.rstd, trace.key.rstd);
  }

  // Rows of a list of pairs that are shown.
  auto shown_pair = [&](int i) { return all || pairs <= 12 || i < 8 || i >= pairs - 3; };
  auto skipped = [&](int i) {
    if (i == 8)
      page.say("     %s\n",
               page.paint(dim, "... " + plural(pairs - 11, "pair") + " left out; --all shows them").c_str());
  };

  // 2
  page.title("2  The angles");
  if (R == 0) {
    page.say("   R = 0: there is no table and nothing turns. The query and the key go on as they are.\n");
  } else {
    page.say(
        "   Pair i turns by theta_i = base^(-2i/R) radians per position, so here by t theta_i with t = %d.\n"
        "   cos and sin come from the table (position, pair, {cos, sin}), fp32; position t starts at byte\n"
        "   t * R/2 * 2 * 4 = %s. Slow pairs tell far positions apart, quick ones near positions.\n\n",
        t, grouped(size_t(t) * R * sizeof(float)).c_str());
    page.say(
        "     %s\n",
        page.paint(bold, "pair     theta_i   turns once in   t theta_i   mod 360       cos        sin  table bytes")
            .c_str());
    for (int i = 0; i < pairs; ++i) {
      const PairTrace& p = trace.pairs[i];
      if (!shown_pair(i)) {
        skipped(i);
        continue;
      }
      char row[160];
      std::snprintf(row, sizeof row, "%4d %11.4g %10.5g pos. %11.4f %7.2f°  %9.6f  %9.6f  %s", i, p.theta,
                    2 * M_PI / p.theta, p.angle, std::fmod(p.angle, 2 * M_PI) * 180 / M_PI, p.cos, p.sin,
                    (grouped(p.table_offset) + ", " + grouped(p.table_offset + 4)).c_str());
      page.say("     %s\n", page.paint(colours[i % 6], row).c_str());
    }
  }

  // 3
  if (R) {
    page.title("3  The turn, in place:  a' = a cos - b sin,  b' = a sin + b cos");
    page.say("   The arrow is the pair (a, b) as a vector in the plane. It turns; its length stays.\n");
    for (auto [name, h] : {std::pair{"query", &trace.query}, std::pair{"key", &trace.key}}) {
      char row[200];
      std::snprintf(row, sizeof row, "%-5s  %-10s %22s  %8s  %8s    %8s  %8s   %8s", name, "channels", "at bytes", "a",
                    "b", "a'", "b'", "length");
      page.say("\n     %s\n", page.paint(bold, row).c_str());
      for (int i = 0; i < pairs; ++i) {
        const PairTrace& p = trace.pairs[i];
        if (!shown_pair(i)) {
          skipped(i);
          continue;
        }
        const float a = h->before[p.a], b = h->before[p.b], a2 = h->after[p.a], b2 = h->after[p.b];
        std::snprintf(row, sizeof row, "%5d  %-10s %22s  %8.4f  %8.4f %s  %8.4f  %8.4f %s %8.4f", i,
                      ("(" + std::to_string(p.a) + ", " + std::to_string(p.b) + ")").c_str(),
                      (grouped(h->offset + 4 * p.a) + ", " + grouped(h->offset + 4 * p.b)).c_str(), a, b, arrow(a, b),
                      a2, b2, arrow(a2, b2), std::hypot(a2, b2));
        page.say("     %s\n", page.paint(colours[i % 6], row).c_str());
      }
    }
    const PairTrace& p = trace.pairs[0];
    const HeadTrace& q = trace.query;
    // Negative factors in parentheses, as one writes them.
    auto factor = [](const char* pattern, double value) {
      return value < 0 ? "(" + format(pattern, value) + ")" : format(pattern, value);
    };
    const std::string a = factor("%.4f", q.before[p.a]), b = factor("%.4f", q.before[p.b]),
                      cosine = factor("%.6f", p.cos), sine = factor("%.6f", p.sin);
    page.say(
        "\n   Pair 0 of the query by hand:\n     a' = %s * %s - %s * %s = %.4f\n     b' = %s * %s + %s * %s = %.4f\n",
        a.c_str(), cosine.c_str(), b.c_str(), sine.c_str(), q.after[p.a], a.c_str(), sine.c_str(), b.c_str(),
        cosine.c_str(), q.after[p.b]);
    page.say("   The four bytes of channel %d, highest first:  %s before, %s after.\n", p.a,
             hex_bytes(q.before[p.a]).c_str(), hex_bytes(q.after[p.a]).c_str());
  }

  // 4
  page.title("4  What RoPE leaves alone");
  if (R == HS) {
    page.say("   Nothing: R = HS is full RoPE. Every channel carries position as well as content.\n");
  } else {
    page.say("   Channels %d to %d, %d of %d: bytes %s to %s of the query,\n   %s to %s of the key.\n", R, HS - 1,
             HS - R, HS, grouped(trace.query.offset + 4 * R).c_str(),
             grouped(trace.query.offset + head_bytes - 1).c_str(), grouped(trace.key.offset + 4 * R).c_str(),
             grouped(trace.key.offset + head_bytes - 1).c_str());
    page.say("   They hold the same bits before and after, and know nothing of position: they compare content.\n");
    page.say("     q%s\n     k%s\n", channels(trace.query.after, R, 8).c_str(),
             channels(trace.key.after, R, 8).c_str());
    page.say("   The four bytes of channel %d of the query:  %s before, %s after.\n", R,
             hex_bytes(trace.query.before[R]).c_str(), hex_bytes(trace.query.after[R]).c_str());
  }

  // 5
  page.title("5  The scores:  q . k / sqrt(HS),  in two parts");
  page.say(
      "   The query of position %d meets the key of every position up to its own. The rotated channels\n"
      "   give a part that depends on the distance, the others one that does not. softmax makes\n"
      "   probabilities of the sums.\n\n",
      t);
  std::vector<int> rows;
  for (int s = 0; s <= t; ++s) rows.push_back(s);
  if (!all && t >= 20) {  // the four highest of the earlier ones, and the last 16
    std::sort(rows.begin(), rows.begin() + (t - 15),
              [&](int x, int y) { return trace.scores[x].score() > trace.scores[y].score(); });
    rows.erase(rows.begin() + 4, rows.begin() + (t - 15));
    std::sort(rows.begin(), rows.begin() + 4);
    page.say("   (the four highest of the first %d, and the last 16; --all shows every one)\n", t - 15);
  }
  page.say("     %s\n",
           page.paint(bold, "position  token         distance    rotated  +   rest  =   score  probability").c_str());
  double left = 1;
  for (int s : rows) {
    const ScoreTrace& score = trace.scores[s];
    left -= score.probability;
    page.say("     %8d  %-12s  %8d  %s  %s  %8.4f   %8.2f %%  %s%s\n", s, token_text(tokenizer, tokens[s]).c_str(),
             t - s, page.paint("36", format("%9.4f", score.rotated)).c_str(),
             page.paint(dim, format("%8.4f", score.rest)).c_str(), score.score(), 100 * score.probability,
             page.paint("32", bar(score.probability)).c_str(), s == trace.against ? " <" : "");
  }
  if (int(rows.size()) <= t)
    page.say("     %8s  %d others %50.2f %%\n", "", t + 1 - int(rows.size()), 100 * std::max(0.0, left));

  // 6
  page.title("6  One meeting, pair by pair: the query of " + std::to_string(t) + " and the key of " +
             std::to_string(trace.against) + (trace.against == t ? ", its own" : ""));
  const int distance = t - trace.against;
  const double scale = 1 / std::sqrt(double(HS));
  if (R) {
    page.say(
        "   The query was turned by %d theta_i, the key by %d theta_i. In their dot product only the\n"
        "   difference is left, %d theta_i: the distance. With alpha_i the angle from query to key before\n"
        "   RoPE, pair i adds  |q| |k| cos(alpha_i - %d theta_i) / sqrt(HS):\n\n",
        t, trace.against, distance, distance);
    page.say(
        "     %s\n",
        page.paint(bold, "pair      |q|      |k|   alpha_i   distance theta_i      adds   (without the turn)").c_str());
    double still = 0;
    for (int i = 0; i < pairs; ++i) {
      const PairTrace& p = trace.pairs[i];
      const double qa = trace.query.before[p.a], qb = trace.query.before[p.b], ka = trace.other.before[p.a],
                   kb = trace.other.before[p.b];
      still += scale * pair_score(qa, qb, ka, kb, 0);
      if (!shown_pair(i)) {
        skipped(i);
        continue;
      }
      char row[160];
      std::snprintf(row, sizeof row, "%4d  %7.4f  %7.4f  %7.2f°  %15.2f°  %9.4f   (%8.4f)", i, std::hypot(qa, qb),
                    std::hypot(ka, kb), std::atan2(qa * kb - qb * ka, qa * ka + qb * kb) * 180 / M_PI,
                    std::fmod(distance * p.theta, 2 * M_PI) * 180 / M_PI,
                    scale * pair_score(qa, qb, ka, kb, distance * p.theta), scale * pair_score(qa, qb, ka, kb, 0));
      page.say("     %s\n", page.paint(colours[i % 6], row).c_str());
    }
    page.say("     %-51s %8.4f   (%8.4f)\n", "the rotated channels together", trace.scores[trace.against].rotated,
             still);
  } else {
    page.say("   No channel is rotated: the score is the same at any distance.\n");
  }
  if (HS > R)
    page.say("     %-51s %8.4f   whatever the distance\n",
             ("channels " + std::to_string(R) + " to " + std::to_string(HS - 1)).c_str(),
             trace.scores[trace.against].rest);
  page.say("     %-51s %8.4f   exp(score - %.4f) = %.2f %%\n", "the score", trace.scores[trace.against].score(),
           trace.lse, 100 * trace.scores[trace.against].probability);

  page.title(trace.agrees() ? "Checked against the model's own buffers" : "THIS TRACE DOES NOT AGREE WITH THE MODEL");
  for (const CheckTrace& check : trace.checks) {
    page.text += "   " + page.paint(check.agrees ? "32" : "1;31", check.agrees ? "agrees " : "WRONG  ");
    list.clear();
    std::string word;
    for (char letter : check.what + " ") {
      if (letter != ' ') {
        word += letter;
        continue;
      }
      list.push_back({word, word.size()});
      word.clear();
    }
    const size_t start = page.text.size();
    page.flow(list, 10);
    page.text.erase(start, 10);  // the first line already has its beginning
  }
  return page.text;
}

// The trace as one object, for plots. Heads have a number per channel, `scores` one per key; theta and angle are in
// radians; `queries` and `keys` (T, HS) are this head's after RoPE, of every position.
inline nlohmann::json trace_json(const Trace& trace, const Config& c, const std::vector<int>& tokens,
                                 const Tokenizer* tokenizer) {
  using nlohmann::json;
  auto head = [](const HeadTrace& h) { return json{{"raw", h.raw}, {"before", h.before}, {"after", h.after}}; };
  json object = {{"layer", trace.layer},         {"head", trace.head},           {"kv_head", trace.kv_head},
                 {"position", trace.position},   {"against", trace.against},     {"head_size", c.head_size},
                 {"rotary_dim", c.rotary_dim},   {"query", head(trace.query)},   {"key", head(trace.key)},
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
