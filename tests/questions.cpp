// Benchmarks: what is asked, how it is scored and counted, and loss by position.
#include "eval/questions.h"

#include <doctest/doctest.h>

#include "eval/positions.h"
#include "run/flags.h"
#include "tests/helpers.h"

namespace {

Config tiny(int R, bool qk_norm = false) {
  Config c;
  c.layers = 2, c.width = 16, c.heads = 2, c.mlp_hidden = 24, c.context = 12, c.vocab = 264;
  c.rotary_dim = kRotaryDim.value_or(R), c.qk_norm = qk_norm;
  resolve(c);
  return c;
}

using Tiny = Model<Cpu, float>;
void scatter(Tiny& model) {  // so large that attention has preferences and positions matter
  const std::vector<float> weights = random_values<float>(model.table.total, 5);
  model.set_weights(weights.data());
}

Dataset shard_of(const std::vector<int>& tokens, const std::string& path) {
  std::vector<int32_t> header(shard_header_ints, 0);
  header[0] = shard_formats[0].magic, header[1] = shard_formats[0].version, header[2] = int32_t(tokens.size());
  const std::vector<uint16_t> stored(tokens.begin(), tokens.end());
  write_file(path, {{header.data(), shard_header_bytes}, {stored.data(), stored.size() * 2}});
  return Dataset(path);
}

std::string text_of(const std::vector<int>& ids) { return {ids.begin(), ids.end()}; }

// ln P of each token but the first behind those before it, from the logits of one window of just that length.
std::vector<double> log_likelihoods(Config c, const std::vector<int>& tokens) {
  Cpu cpu;
  const int T = int(tokens.size()) - 1, V = c.vocab;
  c.context = T;
  Tiny model(cpu, c, 1, T, false);
  scatter(model);
  std::vector<float> logits(size_t(T) * V);
  model.forward(tokens.data(), 1, T);
  model.logits(logits.data(), T, T);
  std::vector<double> result;
  for (int t = 0; t < T; ++t) {
    double sum = 0;
    for (int v = 0; v < V; ++v) sum += std::exp(double(logits[size_t(t) * V + v]));
    result.push_back(double(logits[size_t(t) * V + tokens[t + 1]]) - std::log(sum));
  }
  return result;
}

// Two windows that differ in how many neighbours they have are equal up to the rounding of their sums: some 10 products
// in a row per layer, each over some 50 terms; a logit here is below 100.
constexpr double kClose = 10 * 2 * 50 * kRounding<float> * 100;

std::vector<Question> read(const std::string& lines, const std::string& delimiter = " ", size_t limit = 0) {
  TemporaryDirectory directory;
  write_text_file(directory / "q.jsonl", lines);
  return read_questions(directory / "q.jsonl", ByteTokenizer(), delimiter, limit);
}

}  // namespace

TEST_CASE("benchmarks: white space before an answer belongs to the answer, and the context is encoded alone") {
  const ByteTokenizer bytes;
  Request r = make_request(bytes, "Who? \n ", "Ann");
  CHECK(text_of(r.context) == "Who?");
  CHECK(text_of(r.continuation) == " \n Ann");
  CHECK(r.bytes == 3);
  for (const char* empty : {"", " "}) {
    r = make_request(bytes, empty, "Ann");
    CHECK(r.context == std::vector<int>{256});
    CHECK(text_of(r.continuation) == std::string(empty) + "Ann");
  }
  // White space is what Python takes for it.
  for (const char* white : {"\u00a0", "\u3000", "\u2003 ", "\u2028", "\u0085", "\x1f", "\x1c\u205f\u1680"}) {
    r = make_request(bytes, std::string("\u65e5") + white, "x");
    CHECK(text_of(r.context) == "\u65e5");
    CHECK(text_of(r.continuation) == white + std::string("x"));
  }
  for (const char* other : {"\u200b", "\u180e", "\ufeff", "\x1b"})
    CHECK(text_of(make_request(bytes, std::string("a") + other, "x").context) == std::string("a") + other);
  // BPE: the answer's tokens are those of the whole text behind as many as the context alone has.
  const BpeTokenizer bpe("tests/fixtures/tokenizer.json");
  const std::string context = "The fi", answer = "rst seen";
  r = make_request(bpe, context, answer);
  const std::vector<int> alone = encode_text(bpe, context), both = encode_text(bpe, context + answer);
  CHECK(alone.back() != both[alone.size() - 1]);  // "i", but "ir" where the answer follows
  CHECK(r.context == alone);
  CHECK(r.continuation == std::vector<int>(both.begin() + long(alone.size()), both.end()));
}

TEST_CASE("benchmarks: the forms of a line") {
  std::vector<Question> q = read(
      "{\"query\": \"Question: Who?\\n\", \"choices\": [\"Ann\", \"Bob Lee\"], \"gold\": 1}\n\n"
      "{\"context_options\": [\"Ann saw\", \"Bob saw\", \"I saw\"], \"continuation\": \"me.\", \"gold\": 2}\r\n"
      "{\"context\": \"Ann saw\", \"continuation\": \"Bob\"}\n"
      "{\"text\": \"Ann saw old Bob\"}");
  REQUIRE(q.size() == 4);
  REQUIRE(q[0].choices.size() == 2);
  CHECK(q[0].gold == 1);
  CHECK(text_of(q[0].choices[1].context) == "Question: Who?");
  CHECK(text_of(q[0].choices[1].continuation) == "\n Bob Lee");
  REQUIRE(q[1].choices.size() == 3);
  CHECK(q[1].gold == 2);
  CHECK(text_of(q[1].choices[2].context) == "I saw");
  CHECK(text_of(q[1].choices[2].continuation) == " me.");
  CHECK(text_of(q[2].choices[0].continuation) == " Bob");
  CHECK(text_of(q[3].choices[0].context) == "Ann saw old");
  CHECK(text_of(q[3].choices[0].continuation) == " Bob");
  // A delimiter that begins a line takes the place of the query's line end, whether there was one or not.
  for (const char* end : {"\\n", ""}) {
    q = read(std::string("{\"query\": \"Question: Who? ") + end + "\", \"choices\": [\"A\", \"B\"], \"gold\": 0}",
             "\nAnswer: ");
    CHECK(text_of(q[0].choices[1].context) == "Question: Who? \nAnswer:");
    CHECK(text_of(q[0].choices[1].continuation) == " B");
  }
  CHECK(read("{\"text\": \"a b\"}\n{\"text\": \"c d\"}\n{broken", " ", 2).size() == 2);
}

TEST_CASE("benchmarks: a line that is no question is named") {
  auto error = [](const std::string& line) { return error_of([&] { read("{\"text\": \"a b\"}\n" + line); }); };
  for (const char* line : {"{", "[]", "5", "{}", "{\"choices\": 5}", "{\"context\": \"c\"}", "{\"text\": \"word\"}",
                           "{\"text\": \"\xff a\"}", "{\"context\": \"c\", \"continuation\": \"\"}",
                           "{\"query\": \"q\", \"choices\": [\"a\", \"b\"]}",
                           "{\"query\": \"q\", \"choices\": [], \"gold\": 0}",
                           "{\"query\": 5, \"choices\": [\"a\", \"b\"], \"gold\": 0}",
                           "{\"query\": \"q\", \"choices\": [\"a\", 7], \"gold\": 0}"}) {
    CAPTURE(line);
    CHECK(contains(error(line), "q.jsonl, line 2: "));
  }
  CHECK(contains(error("{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 2}"), "gold is 2"));
  CHECK(contains(error("{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": -1}"), "gold is -1"));
  CHECK(contains(error_of([] { read("\n"); }), "no questions"));
  // An answer that the tokenizer takes into the context's last token.
  TemporaryDirectory directory;
  write_text_file(directory / "q", "{\"context\": \" s\", \"continuation\": \"h\"}");
  const BpeTokenizer bpe("tests/fixtures/tokenizer.json");
  CHECK(contains(error_of([&] { read_questions(directory / "q", bpe, "", 0); }), "a token holds the end of a context"));
}

TEST_CASE("benchmarks: scores are those of each answer by itself, for every batch") {
  for (const Config& c : {tiny(4), tiny(0, true)}) {
    // Lengths from 2 to beyond the 12 positions, where the beginning is lost.
    std::vector<Request> requests;
    for (int n = 2; n <= 20; ++n) {
      const std::vector<int> tokens = random_tokens(n, 257, n);
      const int answer = 1 + n % std::min(n - 1, 7);
      requests.push_back({{tokens.begin(), tokens.end() - answer}, {tokens.end() - answer, tokens.end()}, 1});
    }
    std::vector<const Request*> pointers;
    for (const Request& r : requests) pointers.push_back(&r);
    for (int B : {1, 4, 32}) {
      Cpu cpu;
      Tiny model(cpu, c, B, c.context, false);
      scatter(model);
      size_t done = 0;
      const std::vector<Score> scores = score(model, pointers, [&](size_t n) { done = n; });
      CHECK(done == requests.size());
      for (size_t i = 0; i < requests.size(); ++i) {
        std::vector<int> all = requests[i].context;
        all.insert(all.end(), requests[i].continuation.begin(), requests[i].continuation.end());
        if (all.size() > 13) all.erase(all.begin(), all.end() - 13);
        const std::vector<double> each = log_likelihoods(c, all);
        const int n = int(requests[i].continuation.size());
        const double expected = std::accumulate(each.end() - n, each.end(), 0.0);
        CHECK(std::fabs(scores[i].log_likelihood - expected) < n * kClose);
      }
    }
  }
}

TEST_CASE("benchmarks: the likeliest tokens are greedy, others are not") {
  const float logits[] = {0, 2, 1, /**/ 3, -1, 3, /**/ -5, -6, -7};
  const int likeliest[] = {1, 2, 0}, other[] = {1, 2, 1};
  Score s = score_tokens(logits, likeliest, 3, 3);
  CHECK(s.greedy);
  const double expected = -std::log(std::exp(-2.0) + 1 + std::exp(-1.0)) - std::log(2 + std::exp(-4.0)) -
                          std::log(1 + std::exp(-1.0) + std::exp(-2.0));
  CHECK(s.log_likelihood == about(expected));
  s = score_tokens(logits, other, 3, 3);
  CHECK(!s.greedy);
  CHECK(s.log_likelihood == about(expected - 1));
}

TEST_CASE("benchmarks: three questions counted by hand") {
  auto choice = [](size_t bytes) { return Request{{}, {}, bytes}; };
  const std::vector<Question> questions = {
      {{choice(1), choice(4)}, 0},             // -2, -4: the first; per byte -2, -1: the second
      {{choice(4), choice(1), choice(4)}, 0},  // -4, -2, -6: the second; per byte -1, -2, -1.5: the first
      {{choice(3)}, 0},                        // one answer, not the likeliest token by token
  };
  const std::vector<Score> scores = {{-2, true}, {-4, true}, {-4, true}, {-2, true}, {-6, true}, {-6, false}};
  const Report r = report(questions, scores);
  CHECK(r.accuracy.mean() == about(1 / 3.0));
  CHECK(r.accuracy.error() == about(1 / 3.0));  // variance of 1, 0, 0 is 1/3; / 3
  CHECK(r.accuracy_per_byte.mean() == about(2 / 3.0));
  CHECK(r.accuracy_per_byte.error() == about(1 / 3.0));
  CHECK(r.bits_per_byte.mean() == about((2 + 1 + 2) / 3.0 / M_LN2));
  CHECK(r.log_likelihood.mean() == about(-4));
  CHECK(r.log_likelihood.error() == about(2 / std::sqrt(3.0)));
}

TEST_CASE("benchmarks: bins of positions double, and one ends at the training context") {
  auto ends = [](int T, int context) {
    std::vector<int> all;
    int begin = 0;
    for (const PositionBin& bin : position_bins(T, context)) {
      CHECK(bin.begin == begin);
      all.push_back(begin = bin.end);
    }
    return all;
  };
  CHECK(ends(1, 1) == std::vector<int>{1});
  CHECK(ends(16, 16) == std::vector<int>{1, 2, 4, 8, 16});
  CHECK(ends(48, 12) == std::vector<int>{1, 2, 4, 8, 12, 24, 48});
}

TEST_CASE("benchmarks: loss by position is the mean over windows, within the training context and at 8 times it") {
  for (const Config& c : {tiny(4), tiny(0), tiny(0, true)})
    for (int T : {12, 96}) {
      TemporaryDirectory directory;
      const std::vector<int> tokens = random_tokens(3 * 96 + 1, 257, 9);
      const Dataset data = shard_of(tokens, directory / "a.bin");
      Cpu cpu;
      Tiny model(cpu, c, 2, T, false);
      scatter(model);
      const size_t windows = 3;
      const std::vector<PositionBin> bins = loss_by_position(model, data, windows * T + 5, [](size_t) {});
      std::vector<std::vector<double>> losses;
      for (size_t w = 0; w < windows; ++w)
        losses.push_back(log_likelihoods(c, {tokens.begin() + long(w * T), tokens.begin() + long((w + 1) * T + 1)}));
      for (const PositionBin& bin : bins) {
        Mean expected;
        for (const std::vector<double>& one : losses)
          expected.add(-std::accumulate(one.begin() + bin.begin, one.begin() + bin.end, 0.0) / (bin.end - bin.begin));
        CHECK(bin.loss.n == windows);
        CHECK(std::fabs(bin.loss.mean() - expected.mean()) < kClose);
        CHECK(std::fabs(bin.loss.error() - expected.error()) < kClose);
      }
    }
}

TEST_CASE("length: the same targets at every length, the ends of the longest windows") {
  for (const Config& c : {tiny(4), tiny(0, true)})
    for (int T : {12, 24, 96}) {
      TemporaryDirectory directory;
      const std::vector<int> tokens = random_tokens(3 * 96 + 1, 257, 9);
      const Dataset data = shard_of(tokens, directory / "a.bin");
      Cpu cpu;
      Tiny model(cpu, c, 2, T, false);
      scatter(model);
      const std::vector<double> found = loss_of_ends(model, data, 3, 96, 6);
      CHECK(found.size() == 3);
      for (size_t w = 0; w < found.size(); ++w) {
        const auto end = tokens.begin() + long((w + 1) * 96 + 1);
        const std::vector<double> all = log_likelihoods(c, {end - T - 1, end});
        CHECK(std::fabs(found[w] + std::accumulate(all.end() - 6, all.end(), 0.0) / 6) < kClose);
      }
    }
}

TEST_CASE("length: --attention-temperature divides the scores, with QK-Norm and without") {
  for (const Config& c : {tiny(4), tiny(4, true)}) {
    const int T = 12, HS = c.head_size;
    const std::vector<int> tokens = random_tokens(T, 257, 10);
    Cpu cpu;
    Tiny model(cpu, c, 1, T, false), divided(cpu, c, 1, T, false);
    scatter(model), scatter(divided);
    divide_scores(divided, 3);
    model.forward(tokens.data(), 1, T), divided.forward(tokens.data(), 1, T);
    const float* qkv = model.acts.blocks[0].qkv;  // of the first block: later ones see other inputs
    for (int h = 0; h < c.heads; ++h)
      for (int t = 0; t < T; ++t) {
        double sum = 0, size = 0;
        for (int s = 0; s <= t; ++s) {
          double score = 0;
          for (int i = 0; i < HS; ++i)
            score += double(qkv[t * c.qkv_width() + h * HS + i]) * qkv[s * c.qkv_width() + (c.heads + h) * HS + i];
          score /= 3 * std::sqrt(HS);
          sum += std::exp(score), size = std::max(size, std::fabs(score));
        }
        // A score is within some roundings of each of its HS terms.
        CHECK(std::fabs(divided.acts.blocks[0].lse[h * T + t] - std::log(sum)) < (size + 10) * HS * 16 * 0x1p-24);
      }
  }
}

TEST_CASE("length: another position code for a window, in the model's R") {
  const Config c = tiny(4);
  PositionChange change;
  change.base = 500, change.yarn = 0;
  const Config yarn = change.apply(c, 96);
  CHECK((yarn.rope_base == 500 && yarn.rope_scaling == "yarn:8,12" && yarn.rotary_dim == c.rotary_dim));
  change.yarn = 1, change.interpolate = 2.5;
  CHECK(change.apply(c, 96).rope_scaling == "linear:2.5");
  CHECK(change.apply(c, 12).angles(c.rotary_dim).theta[1] == about(std::pow(500, -2.0 / c.rotary_dim) / 2.5));
  if (kRotaryDim) return;
  change.R = 0;
  CHECK(change.apply(c, 96).rotary_dims() == std::vector<int>{0, 0});
}
