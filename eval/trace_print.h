#pragma once
// A trace as a terminal shows it, a function per numbered section: trace.h says what is in it. `eval trace`.

#include <cstdarg>

#include "eval/source.h"
#include "eval/trace_page.h"
#include "run/print.h"

// Text as fit() in run/print.h takes it; colour as ANSI sequences where asked for.
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
 private:
  bool colour_;
};

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

// The sections, in their order; `all` shows every pair, channel and key; otherwise long lists are cut, and say so.
class TraceText {
 public:
  TraceText(const Trace& trace_, const Config& config, const std::vector<int>& tokens_, const Tokenizer* tokenizer_,
            bool colour_, bool all_)
      : trace(trace_), c(config), tokens(tokens_), tokenizer(tokenizer_), colour(colour_), all(all_), page(colour_) {}

  // In lines of at most `width` columns.
  std::string text(int width) {
    beginning();
    where_they_lie();
    angles();
    if (R) turn();
    left_alone();
    scores();
    one_meeting();
    checks();
    return fit(page.text, width);
  }

 private:
  const Trace& trace;
  const Config& c;
  const std::vector<int>& tokens;
  const Tokenizer* tokenizer;
  const bool colour, all;
  const int HS = c.head_size, pairs = int(trace.pairs.size()), R = 2 * pairs, t = trace.position, T = int(tokens.size());
  const size_t head_bytes = HS * sizeof(float);
  static constexpr const char *dim = "2", *bold = "1";
  static constexpr const char* colours[] = {"36", "33", "35", "32", "34", "31"};
  Page page;

  // The rotated channels in the colours of their pairs, the untouched ones dim. `from` 0 or R.
  std::string channels(const std::vector<float>& values, int from, size_t room) const {
    std::vector<const char*> paint(HS, dim);
    for (int i = 0; i < pairs; ++i) paint[trace.pairs[i].a] = paint[trace.pairs[i].b] = colours[i % 6];
    std::string text;
    const int shown = std::min<int>(HS - from, all ? HS : room);
    for (int i = 0; i < shown; ++i) {
      if (all && i && i % room == 0) text += "\n      ";
      text += page.paint(paint[from + i], format(" %8.4f", values[from + i]));
    }
    return text + (shown < HS - from ? " ..." : "");
  }
  static double length(const std::vector<float>& values) {
    double sum = 0;
    for (float v : values) sum += double(v) * v;
    return std::sqrt(sum);
  }
  // Rows of a list of pairs that are shown.
  bool shown_pair(int i) const { return all || pairs <= 12 || i < 8 || i >= pairs - 3; }
  void skipped(int i) {
    if (i == 8)
      page.say("     %s\n",
               page.paint(dim, "... " + std::to_string(pairs - 11) + " pairs" + " left out; --all shows them").c_str());
  }

  void beginning() {
    page.say("%s\n", page.paint(bold, "One token through partial RoPE, byte by byte").c_str());
    page.say("Layer %d of %d, query head %d of %d, key/value head %d of %d. A head has HS = %d channels; ",
             trace.layer, c.layers, trace.head, c.heads, trace.kv_head, c.kv_heads, HS);
    page.say("RoPE turns the first R = %d of them (%.4g %%), in %s, base %.6g.\n", R, 100.0 * R / HS,
             R == 0                            ? "no pairs at all: this is NoPE"
             : c.rope_pairs == RopePairs::half ? "half-split pairs (i, i + R/2)"
                                               : "interleaved pairs (2i, 2i + 1)",
             c.rope_base);

    page.title("The tokens, as position:text. We follow the one in brackets.");
    page.text += " ";
    bool skipping = false;
    for (int s = 0; s < T; ++s) {
      const bool skip = !all && T > 120 && s >= 40 && s < T - 40 && std::abs(s - t) > 8;
      const std::string name = std::to_string(s) + ":" + token_text(tokenizer, tokens[s]);
      if (!skip) page.text += " " + (s == t ? page.paint("1;33", "[" + name + "]") : name);
      if (skip && !skipping) page.text += " ...";
      skipping = skip;
    }
    page.text += "\n";
  }

  void where_they_lie() {
    page.title("1  Where the query and the key lie");
    page.say(
        "   One matrix product, qkv = h1 Wqkv^T, writes all heads of a position side by side. The buffer "
        "of this layer has shape (T %d, heads %d + 2*%d, channels %d), fp32: %s bytes.\n"
        "   Position %d is bytes %s to %s:\n",
        T, c.heads, c.kv_heads, HS, grouped(trace.qkv_bytes).c_str(), t, grouped(t * trace.row_bytes).c_str(),
        grouped((t + 1) * trace.row_bytes - 1).c_str());
    page.text += "    ";
    for (int slot = 0; slot < c.heads + 2 * c.kv_heads; ++slot) {
      const int kind = slot < c.heads ? 0 : slot < c.heads + c.kv_heads ? 1 : 2;
      const std::string name = std::string(1, "qkv"[kind]) + std::to_string(kind == 0   ? slot
                                                                            : kind == 1 ? slot - c.heads
                                                                                        : slot - c.heads - c.kv_heads);
      const bool ours = slot == trace.query.slot || slot == trace.key.slot;
      page.text += " " + (ours ? page.paint("1;33", "[" + name + "]") : page.paint(dim, name));
    }
    page.text += "\n";
    page.say("   Each head is %zu bytes. Channel c of a head stands 4 c bytes behind its start:\n", head_bytes);
    page.say("     query head %-3d starts at byte (%d*%d + %d) * %zu = %s\n", trace.head, t, c.heads + 2 * c.kv_heads,
             trace.query.slot, head_bytes, grouped(trace.query.offset).c_str());
    page.say("     key head %-5d starts at byte (%d*%d + %d) * %zu = %s\n", trace.kv_head, t, c.heads + 2 * c.kv_heads,
             trace.key.slot, head_bytes, grouped(trace.key.offset).c_str());
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
  }

  void angles() {
    page.title("2  The angles");
    if (R == 0) {
      page.say("   R = 0: there is no table and nothing turns. The query and the key go on as they are.\n");
    } else {
      page.say(
          "   Pair i turns by theta_i%s radians per position, so here by t theta_i with t = %d. "
          "cos and sin come from the table (position, pair, {cos, sin}), fp32; position t starts at byte "
          "t * R/2 * 2 * 4 = %s. Slow pairs tell far positions apart, quick ones near positions.\n\n",
          c.rope_frequencies == "rotary" && c.rope_scaling == "none" ? " = base^(-2i/R)" : "", t,
          grouped(size_t(t) * R * sizeof(float)).c_str());
      page.say(
          "     %s\n",
          page.paint(bold, "pair     theta_i\t   turns once in\t   t theta_i\t   mod 360\t       cos        sin\t  table bytes")
              .c_str());
      for (int i = 0; i < pairs; ++i) {
        const PairTrace& p = trace.pairs[i];
        if (!shown_pair(i)) {
          skipped(i);
          continue;
        }
        char row[160];
        std::snprintf(row, sizeof row, "%4d %11.4g\t %10.5g pos.\t %11.4f\t %7.2f°\t  %9.6f  %9.6f\t  %s", i, p.theta,
                      2 * M_PI / p.theta, p.angle, std::fmod(p.angle, 2 * M_PI) * 180 / M_PI, p.cos, p.sin,
                      (grouped(p.table_offset) + ", " + grouped(p.table_offset + 4)).c_str());
        page.say("     %s\n", page.paint(colours[i % 6], row).c_str());
      }
    }
  }

  void turn() {
    page.title("3  The turn, in place:  a' = a cos - b sin,  b' = a sin + b cos");
    page.say("   The arrow is the pair (a, b) as a vector in the plane. It turns; its length stays.\n");
    for (auto [name, h] : {std::pair{"query", &trace.query}, std::pair{"key", &trace.key}}) {
      char row[200];
      std::snprintf(row, sizeof row, "%-5s  %-10s\t %22s\t  %8s  %8s  \t  %8s  %8s  \t %8s", name, "channels", "at bytes", "a",
                    "b", "a'", "b'", "length");
      page.say("\n     %s\n", page.paint(bold, row).c_str());
      for (int i = 0; i < pairs; ++i) {
        const PairTrace& p = trace.pairs[i];
        if (!shown_pair(i)) {
          skipped(i);
          continue;
        }
        const float a = h->before[p.a], b = h->before[p.b], a2 = h->after[p.a], b2 = h->after[p.b];
        std::snprintf(row, sizeof row, "%5d  %-10s\t %22s\t  %8.4f  %8.4f %s\t  %8.4f  %8.4f %s\t %8.4f", i,
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

  void left_alone() {
    page.title("4  What RoPE leaves alone");
    if (R == HS) {
      page.say("   Nothing: R = HS is full RoPE. Every channel carries position as well as content.\n");
    } else {
      page.say("   Channels %d to %d, %d of %d: bytes %s to %s of the query, %s to %s of the key.\n", R, HS - 1,
               HS - R, HS, grouped(trace.query.offset + 4 * R).c_str(),
               grouped(trace.query.offset + head_bytes - 1).c_str(), grouped(trace.key.offset + 4 * R).c_str(),
               grouped(trace.key.offset + head_bytes - 1).c_str());
      page.say("   They hold the same bits before and after, and know nothing of position: they compare content.\n");
      page.say("     q%s\n     k%s\n", channels(trace.query.after, R, 8).c_str(),
               channels(trace.key.after, R, 8).c_str());
      page.say("   The four bytes of channel %d of the query:  %s before, %s after.\n", R,
               hex_bytes(trace.query.before[R]).c_str(), hex_bytes(trace.query.after[R]).c_str());
    }
  }

  void scores() {
    page.title("5  The scores:  q . k / sqrt(HS),  in two parts");
    const std::string cap = c.attention_softcap ? format("%g", c.attention_softcap) : "";
    page.say(
        "   The query of position %d meets the key of every position up to its own. The rotated channels "
        "give a part that depends on the distance, the others one that does not. softmax makes "
        "probabilities of the sums%s.\n\n",
        t, cap.empty() ? "" : (", once each is capped: " + cap + " tanh(score / " + cap + ")").c_str());
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
             page.paint(bold, std::string("position  token         distance\t    rotated  +   rest  =   score\t") +
                                  (cap.empty() ? "" : "    capped\t") + "  probability").c_str());
    double left = 1;
    for (int s : rows) {
      const ScoreTrace& score = trace.scores[s];
      left -= score.probability;
      page.say("     %8d  %-12s  %8d\t  %s  %s  %8.4f\t%s   %8.2f %%  %s%s\n", s, token_text(tokenizer, tokens[s]).c_str(),
               t - s, page.paint("36", format("%9.4f", score.rotated)).c_str(),
               page.paint(dim, format("%8.4f", score.rest)).c_str(), score.score(),
               cap.empty() ? "" : format("  %8.4f\t", score.capped).c_str(), 100 * score.probability,
               page.paint("32", bar(score.probability)).c_str(), s == trace.against ? " <" : "");
    }
    if (int(rows.size()) <= t)
      page.say("     %8s  %-22s\t  %28s\t%s   %8.2f %%\n", "", (std::to_string(t + 1 - int(rows.size())) + " others").c_str(),
               "", cap.empty() ? "" : "          \t", 100 * std::max(0.0, left));
  }

  void one_meeting() {
    page.title("6  One meeting, pair by pair: the query of " + std::to_string(t) + " and the key of " +
               std::to_string(trace.against) + (trace.against == t ? ", its own" : ""));
    const int distance = t - trace.against;
    const double scale = 1 / std::sqrt(double(HS));
    if (R) {
      page.say(
          "   The query was turned by %d theta_i, the key by %d theta_i. In their dot product only the "
          "difference is left, %d theta_i: the distance. With alpha_i the angle from query to key before "
          "RoPE, pair i adds  |q| |k| cos(alpha_i - %d theta_i) / sqrt(HS):\n\n",
          t, trace.against, distance, distance);
      page.say(
          "     %s\n",
          page.paint(bold, "pair      |q|      |k|   alpha_i   distance theta_i\t      adds   (without the turn)")
              .c_str());
      double still = 0;
      const double turned = scale * trace.attention * trace.attention;
      for (int i = 0; i < pairs; ++i) {
        const PairTrace& p = trace.pairs[i];
        const double qa = trace.query.before[p.a], qb = trace.query.before[p.b], ka = trace.other.before[p.a],
                     kb = trace.other.before[p.b];
        still += turned * pair_score(qa, qb, ka, kb, 0);
        if (!shown_pair(i)) {
          skipped(i);
          continue;
        }
        char row[160];
        std::snprintf(row, sizeof row, "%4d  %7.4f  %7.4f  %7.2f°  %15.2f°\t  %9.4f   (%8.4f)", i, std::hypot(qa, qb),
                      std::hypot(ka, kb), std::atan2(qa * kb - qb * ka, qa * ka + qb * kb) * 180 / M_PI,
                      std::fmod(distance * p.theta, 2 * M_PI) * 180 / M_PI,
                      turned * pair_score(qa, qb, ka, kb, distance * p.theta), turned * pair_score(qa, qb, ka, kb, 0));
        page.say("     %s\n", page.paint(colours[i % 6], row).c_str());
      }
      page.say("     %-51s\t %8.4f   (%8.4f)\n", "the rotated channels together", trace.scores[trace.against].rotated,
               still);
    } else {
      page.say("   No channel is rotated: the score is the same at any distance.\n");
    }
    if (HS > R)
      page.say("     %-51s\t %8.4f   whatever the distance\n",
               ("channels " + std::to_string(R) + " to " + std::to_string(HS - 1)).c_str(),
               trace.scores[trace.against].rest);
    const ScoreTrace& score = trace.scores[trace.against];
    if (c.attention_softcap)
      page.say("     %-51s\t %8.4f   before the cap\n", "the score", score.score());
    page.say("     %-51s\t %8.4f   exp(score - %.4f) = %.2f %%\n", "the score", score.capped, trace.lse,
             100 * score.probability);
  }

  void checks() {
    page.title(trace.agrees() ? "Checked against the model's own buffers" : "THIS TRACE DOES NOT AGREE WITH THE MODEL");
    for (const CheckTrace& check : trace.checks)
      page.say("   %s%s\n", page.paint(check.agrees ? "32" : "1;31", check.agrees ? "agrees " : "WRONG  ").c_str(),
               check.what.c_str());
  }
};

inline std::string print_trace(const Trace& trace, const Config& c, const std::vector<int>& tokens,
                               const Tokenizer* tokenizer, bool colour, bool all, int width) {
  return TraceText(trace, c, tokens, tokenizer, colour, all).text(width);
}

// ---------------------------------------------------------------------------------------------------------------------

inline int command_trace(const std::vector<std::string>& args) {
  Place place;
  std::string prompt, page;
  int token = -1, layer = 0, head = 0, against = -1;
  bool all = false, json = false;
  Flags f("One token, layer and head through partial RoPE, byte by byte (on the CPU, in fp32).", "eval trace");
  add_place_flags(f, place, false);
  f.group("Where to look");
  f.add("prompt", prompt, "the text");
  f.add("token", token, "position to follow; 0 is the end-of-text token before the prompt, -1 the last");
  f.add("layer", layer, "from 0");
  f.add("head", head, "query head, from 0");
  f.add("against", against, "position of a key to meet; -1: the one that the query attends to most");
  f.add("all", all, "show every pair, channel and key");
  f.add("json", json, "print the numbers, those of all layers and heads too, as one JSON object instead");
  f.add("html", page, "write a page to look at and to move, in one file, instead")->type_name("FILE");
  f.parse(args);
  if (prompt.empty()) throw UserError("--prompt: give a text to trace, such as --prompt \"Once upon a time\"");
  const Source source = open_source(place.run);
  const std::vector<int> tokens = prompt_tokens(tokenizer_of(source), prompt);
  const int T = int(tokens.size()), context = source.settings.model.context;
  if (T > context)
    throw UserError("--prompt: " + std::to_string(T - 1) + " tokens; the model's context holds " +
                    std::to_string(context - 1) + " behind the end-of-text token");
  if (token < -1)
    throw UserError("--token " + std::to_string(token) + ": must lie between 0 and " + std::to_string(T - 1) +
                    ", or be -1");
  if (against < -1)
    throw UserError("--against " + std::to_string(against) + ": must be a position up to that of --token, or -1");
  use_threads(place.threads);
  Cpu backend;
  Config config = source.settings.model;
  config.recompute = false;  // the trace looks into every block
  Model<Cpu, float> model(backend, config, 1, T, false);
  load_weights(model, source.checkpoint);
  const Trace trace = trace_head(model, tokens, token < 0 ? T - 1 : token, layer, head, against);
  const char* no_colour = std::getenv("NO_COLOR");
  const bool colour = isatty(STDOUT_FILENO) && !(no_colour && *no_colour);
  nlohmann::json object;
  if (json || !page.empty()) object = page_json(model, trace, tokens, source.tokenizer.get(), describe(source));
  if (json) std::printf("%s\n", dump_json(object).c_str());
  if (!page.empty()) {
    const std::string text = trace_page(object);
    write_text_file(page, text);
    if (!json) std::printf("%s: %s\n", page.c_str(), human_bytes(text.size()).c_str());
  }
  if (!json && page.empty())
    std::printf("%s\n%s", describe(source).c_str(),
                print_trace(trace, model.config, tokens, source.tokenizer.get(), colour, all,
                            std::min(100, terminal_width()))
                    .c_str());
  if (trace.agrees()) return 0;
  std::fflush(stdout);
  std::fprintf(stderr, "error: the trace does not agree with the model's buffers (lines marked WRONG above)\n");
  return 1;
}
