// Tests of eval/generate.h, loss.h, logits.h, memory.h and trace.h: text with the key/value cache, loss over shards, .npy
// files, memory, the trace.
#include "eval/loss.h"

#include <filesystem>

#include "run/flags.h"
#include "eval/generate.h"
#include "eval/logits.h"
#include "eval/memory.h"
#include "eval/trace_print.h"
#include "tests/helpers.h"

namespace {

Config tiny(int R, RopePairs pairs = RopePairs::half, bool qk_norm = false, BlockKind block = BlockKind::sequential) {
  Config c;
  c.layers = 2, c.width = 48, c.heads = 4, c.kv_heads = 2, c.head_size = 12, c.mlp_hidden = 64, c.context = 24,
  c.vocab = 264;
  c.rotary_dim = kRotaryDim.value_or(R), c.rope_pairs = pairs, c.qk_norm = qk_norm, c.block = block;
  resolve(c);
  return c;
}

// Every way through the block that has a trace of its own.
std::vector<Config> configs() {
  std::vector<Config> list = {tiny(4), tiny(0), tiny(12), tiny(6, RopePairs::interleaved),
                              tiny(2, RopePairs::half, true, BlockKind::parallel)};
  Config pythia = tiny(4);
  pythia.kv_heads = 4, pythia.norm = NormKind::layer, pythia.mlp = MlpKind::gelu, pythia.bias = true,
  pythia.tied = true;
  list.push_back(pythia);
  list.push_back(tiny(4));
  list.back().attention_softcap = 1.5;
  return list;
}

// Weights large enough for attention to have preferences.
void scatter(Model<Cpu, float>& model, uint64_t seed) {
  const std::vector<float> weights = random_values<float>(model.table.total, seed, 0.3);
  model.set_weights(weights.data());
}

template <class M>
std::vector<float> logits_of(M& model, const std::vector<int>& tokens, int first) {
  std::vector<float> logits(model.config.vocab);
  model.forward(tokens.data(), 1, int(tokens.size()), first);
  model.logits(logits.data(), int(tokens.size()), 1);
  return logits;
}

// Columns of a line on a terminal: without colour codes, one for each UTF-8 character.
std::string without_colour(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i)
    if (text[i] == '\033') i = text.find('m', i);
    else plain += text[i];
  return plain;
}
std::string without_spaces(std::string text) {
  text.erase(std::remove_if(text.begin(), text.end(), [](char c) { return c == ' ' || c == '\n'; }), text.end());
  return text;
}
size_t widest_line(const std::string& text) {
  size_t widest = 0, column = 0;
  for (unsigned char byte : without_colour(text)) {
    column = byte == '\n' ? 0 : column + ((byte & 0xC0) != 0x80);
    widest = std::max(widest, column);
  }
  return widest;
}

// Shards in a directory of their own.
struct Folder : TemporaryDirectory {
  void shard(const std::string& name, const std::vector<uint16_t>& tokens) const {
    std::vector<int32_t> header(shard_header_ints, 0);
    header[0] = shard_formats[0].magic, header[1] = shard_formats[0].version, header[2] = int32_t(tokens.size());
    write_file(path + "/" + name, {{header.data(), shard_header_bytes}, {tokens.data(), tokens.size() * 2}});
  }
};

std::vector<uint16_t> random_ids(size_t n, int vocabulary, uint64_t seed) {
  const std::vector<int> ids = random_tokens(n, vocabulary, seed);
  return {ids.begin(), ids.end()};
}

}  // namespace

TEST_CASE("generate: the key/value cache gives what computing from scratch gives, also past the context") {
  for (const Config& c : configs()) {
    Cpu cpu;
    Model<Cpu, float> cached(cpu, c, 1, c.context, false), scratch(cpu, c, 1, c.context, false);
    scatter(cached, 1), scatter(scratch, 1);

    // About 10 products in a row per layer, each a sum of some 50 terms with an error of at most 50 * 2^-24 of their
    // magnitudes; the order of the sums is all that differs.
    std::vector<int> tokens = random_tokens(c.context, 257, 2), so_far(tokens.begin(), tokens.begin() + 5);
    logits_of(cached, so_far, 0);
    for (int t = 5; t < c.context; ++t) {
      so_far.push_back(tokens[t]);
      const std::vector<float> a = logits_of(cached, so_far, t), b = logits_of(scratch, so_far, 0);
      CHECK(distance(a, b) <= 10 * c.layers * 50 * kRounding<float> * largest(b));
    }

    std::vector<int> text = {256, 65}, expected = text;
    generate(cached, text, 40, 0, 0, 1, {}, 257, [](int) {});
    for (size_t start = 0; expected.size() < 42;) {
      if (expected.size() - start > size_t(c.context)) start = expected.size() - c.context / 2;
      const std::vector<float> logits = logits_of(scratch, {expected.begin() + start, expected.end()}, 0);
      expected.push_back(int(std::max_element(logits.begin(), logits.begin() + 257) - logits.begin()));
    }
    CHECK(text == expected);
  }
}

TEST_CASE("generate: what is drawn depends on seed and position alone; the stop token ends the text") {
  const Config c = tiny(4);
  Cpu cpu;
  Model<Cpu, float> model(cpu, c, 1, c.context, false);
  scatter(model, 3);
  std::vector<int> once = {256}, twice = {256}, other = {256}, emitted;
  generate(model, once, 16, 1.0, 0, 7, {}, 257, [&](int token) { emitted.push_back(token); });
  generate(model, twice, 6, 1.0, 0, 7, {}, 257, [](int) {});
  generate(model, twice, 10, 1.0, 0, 7, {}, 257, [](int) {});
  generate(model, other, 16, 1.0, 0, 8, {}, 257, [](int) {});
  CHECK(once == twice);
  CHECK(once != other);
  CHECK(emitted == std::vector<int>(once.begin() + 1, once.end()));

  const int stop = once[5];
  const size_t first = std::find(once.begin() + 1, once.end(), stop) - once.begin();
  std::vector<int> stopped = {256};
  emitted.clear();
  generate(model, stopped, 16, 1.0, 0, 7, {-1, stop}, 257, [&](int token) { emitted.push_back(token); });
  CHECK(stopped == std::vector<int>(once.begin(), once.begin() + first + 1));
  CHECK(emitted.size() == first - 1);
}

TEST_CASE("sample_token: softmax at the temperature, top-k, no padding, no NaN") {
  const std::vector<float> logits = {1, 3, 2, 3, -1, 50};  // the last is padding
  CHECK(sample_token(logits.data(), 5, 0, 0, 0.9) == 1);   // of equals the lowest id
  const int n = 1000;
  for (double temperature : {0.5, 1.0, 2.0})
    for (int top_k : {0, 1, 3, 9}) {
      std::vector<double> expected = {1, 1, 1, 1, 1};
      if (top_k == 1) expected = {0, 1, 0, 0, 0};
      if (top_k == 3) expected = {0, 1, 1, 1, 0};
      double sum = 0;
      for (int i = 0; i < 5; ++i) sum += expected[i] *= std::exp(logits[i] / temperature);
      std::vector<double> drawn(5);
      for (int i = 0; i < n; ++i) drawn.at(sample_token(logits.data(), 5, temperature, top_k, (i + 0.5) / n)) += 1;
      // Each id has an interval of u; a grid of n points counts it to within one point at either end.
      for (int i = 0; i < 5; ++i) CHECK(std::fabs(drawn[i] / n - expected[i] / sum) <= 1.0 / n);
    }
  CHECK(sample_token(logits.data(), 5, 1, 0, 0x1.fffffffffffffp-1) == 4);
  const std::vector<float> broken = {1, NAN};
  CHECK(contains(error_of([&] { sample_token(broken.data(), 2, 1, 0, 0.5); }), "not finite"));
}

TEST_CASE("loss: every token but the first of each shard, also in the last, shorter window") {
  const Config c = tiny(4);
  Cpu cpu;
  Folder folder;
  const int T = c.context;
  const std::vector<std::vector<uint16_t>> shards = {random_ids(2 * T + 6, 257, 4), random_ids(7, 257, 5),
                                                     random_ids(T + 1, 257, 6)};
  for (size_t i = 0; i < shards.size(); ++i) folder.shard("val_" + std::to_string(i) + ".bin", shards[i]);
  const Dataset data(folder.path + "/val_*.bin");
  const ByteTokenizer tokenizer;

  // From the logits of each window by itself.
  Model<Cpu, float> alone(cpu, c, 1, T, false);
  scatter(alone, 7);
  std::vector<double> nats;
  std::vector<size_t> bytes;
  for (const auto& shard : shards)
    for (size_t start = 0; start + 1 < shard.size(); start += T) {
      const int n = int(std::min<size_t>(T, shard.size() - 1 - start));
      const std::vector<int> inputs(shard.begin() + start, shard.begin() + start + n);
      std::vector<float> logits(size_t(n) * c.vocab);
      alone.forward(inputs.data(), 1, n);
      alone.logits(logits.data(), n, n);
      for (int t = 0; t < n; ++t) {
        const int target = shard[start + t + 1];
        double sum = 0;
        for (int v = 0; v < c.vocab; ++v) sum += std::exp(double(logits[size_t(t) * c.vocab + v]));
        nats.push_back(std::log(sum) - logits[size_t(t) * c.vocab + target]);
        bytes.push_back(target < 256);
      }
    }

  for (int B : {1, 2, 5})
    for (size_t limit : {size_t(0), size_t(1), size_t(T + 3), size_t(100000)}) {
      Model<Cpu, float> model(cpu, c, B, T, false);
      scatter(model, 7);
      const LossReport report = evaluate_loss(model, data, &tokenizer, limit, [](size_t) {});
      const size_t expected = limit ? std::min(limit, nats.size()) : nats.size();
      double sum = 0, magnitude = 0;
      size_t text = 0;
      for (size_t i = 0; i < expected; ++i) sum += nats[i], magnitude += std::fabs(nats[i]) + 1, text += bytes[i];
      CHECK(report.tokens == expected);
      CHECK(report.bytes == text);
      // As for the cached logits above, and the logits are of the size of the losses.
      CHECK(std::fabs(report.nats - sum) <= 10 * c.layers * 50 * kRounding<float> * magnitude);
    }
  CHECK(nats.size() == shards[0].size() + shards[1].size() + shards[2].size() - 3);
}

TEST_CASE("loss: nats, bits per byte and perplexity of a model that knows nothing") {
  LossReport coin;
  coin.tokens = 8, coin.bytes = 4, coin.nats = 8 * M_LN2;
  CHECK(coin.loss() == doctest::Approx(M_LN2).epsilon(1e-15));
  CHECK(coin.bits_per_byte() == doctest::Approx(2).epsilon(1e-15));
  CHECK(coin.perplexity() == doctest::Approx(2).epsilon(1e-15));

  const Config c = tiny(4);
  Cpu cpu;
  Model<Cpu, float> model(cpu, c, 2, c.context, false);  // weights zero: all logits are equal
  Folder folder;
  folder.shard("val_0.bin", {256, 72, 105, 256, 33, 33});
  const ByteTokenizer tokenizer;
  const LossReport report = evaluate_loss(model, Dataset(folder.path + "/val_*.bin"), &tokenizer, 0, [](size_t) {});
  CHECK(report.tokens == 5);
  CHECK(report.bytes == 4);  // the end of text has none
  // fp32: log Z is rounded once, its sum of 264 ones is exact.
  CHECK(std::fabs(report.loss() - std::log(264.0)) <= 2 * kRounding<float> * std::log(264.0));
  CHECK(report.bits_per_byte() == doctest::Approx(report.loss() * 5 / std::log(2.0) / 4).epsilon(1e-14));
}

TEST_CASE("npy: the header as NumPy writes it") {
  const std::string header = npy_header(3, 264);
  CHECK(header.substr(0, 8) == std::string("\x93NUMPY\x01\x00", 8));
  CHECK(header.size() % 64 == 0);
  CHECK(size_t(uint8_t(header[8])) + 256 * size_t(uint8_t(header[9])) == header.size() - 10);
  CHECK(header.substr(10, 61) == "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 264), }");
  CHECK(header.back() == '\n');
  CHECK(npy_header(123456789, 987654321).size() % 64 == 0);
}

TEST_CASE("memory: the RoPE tables that are known, and units") {
  CHECK(human_bytes(rope_table_bytes(2048, 64)) == "512 KiB");
  CHECK(human_bytes(rope_table_bytes(2048, rotary_dim_from_fraction(0.1, 64))) == "48 KiB");
  CHECK(human_bytes(rope_table_bytes(1 << 20, 256)) == "1 GiB");
  CHECK(human_bytes(rope_table_bytes(1 << 20, rotary_dim_from_fraction(0.1, 256))) == "104 MiB");
  CHECK(rope_table_bytes(10000000, 256) == 10240000000u);
  CHECK(rope_table_bytes(10000000, 0) == 0);
  CHECK(human_bytes(1023) == "1023 B");
  CHECK(human_bytes(1024 * 1024 - 1) == "1 MiB");
  CHECK(grouped(0) == "0");
  CHECK(grouped(999) == "999");
  CHECK(grouped(1234567) == "1,234,567");
}

// Counts what a model takes.
struct CountingCpu : Cpu {
  size_t bytes = 0;
  void* allocate(size_t n) {
    bytes += n;
    return Cpu::allocate(n);
  }
};

TEST_CASE("memory: the report is what a model allocates, and the rows are the report") {
  for (const Config& c : configs()) {
    CountingCpu cpu;
    Model<CountingCpu, float> model(cpu, c, 3, c.context, true);
    const MemoryReport report = memory_report<CountingCpu, float>(c, 3, c.context);
    CHECK(cpu.bytes == report.total() + 256 + model.squares_of_part * sizeof(double));  // and the result of a step
    size_t parameters = 0, tensors = 0, activations = 0, gaps = 0;
    for (bool each : {false, true}) {
      parameters = tensors = 0;
      for (const MemoryRow& row : parameter_rows(c, each))
        parameters += row.elements * row.copies, tensors += row.copies;
      CHECK(parameters == model.table.parameters);
      CHECK(tensors == model.table.rows.size());
    }
    for (const MemoryRow& row : activation_rows<CountingCpu, float>(c, 3, c.context))
      activations += row.elements * row.element_bytes * row.copies, gaps += 255 * row.copies;
    CHECK(activations <= report.activations);
    CHECK(activations + gaps >= report.activations);
  }
}

TEST_CASE("memory: the paper's 1B model, without allocating it") {
  Config c;
  c.layers = 16, c.width = 2048, c.heads = 32, c.kv_heads = 8, c.head_size = 64, c.mlp_hidden = 8192, c.context = 2048,
  c.vocab = 50304;
  c.rotary_dim = kRotaryDim.value_or(6);
  resolve(c);
  const size_t C = 2048, block = (32 + 16) * 64 * C + C * C + 3 * 8192 * C + 2 * C,
               all = 2 * 50304 * C + 16 * block + C;
  CHECK(parameter_table(c).parameters == all);
  const MemoryReport report = memory_report<AnyGpu, AnyBf16>(c, 8, 2048);
  CHECK(report.parameters == 2 * all);  // bf16
  CHECK(report.gradients == 4 * all);
  CHECK(report.optimizer == 12 * all);  // m, v, master weights
  CHECK(report.rope_table == rope_table_bytes(2048, c.rotary_dim));
}

TEST_CASE("trace: agrees with the model for every kind of block, and its parts sum to the scores") {
  const ByteTokenizer tokenizer;
  for (const Config& c : configs()) {
    Cpu cpu;
    const int T = c.context;
    Model<Cpu, float> model(cpu, c, 1, T, false);
    scatter(model, 8);
    const std::vector<int> tokens = random_tokens(T, 257, 9);
    for (int layer : {0, 1})
      for (int head : {0, 3})
        for (int position : {0, 1, T - 1}) {
          const Trace trace = trace_head(model, tokens, position, layer, head, position == T - 1 ? 2 : -1);
          for (const CheckTrace& check : trace.checks) CHECK_MESSAGE(check.agrees, check.what);
          CHECK(trace.kv_head == head / (c.heads / c.kv_heads));
          CHECK(int(trace.pairs.size()) == c.rotary_dim / 2);
          CHECK(int(trace.scores.size()) == position + 1);
          // The offsets lead to the values.
          const float* qkv = model.acts.blocks[layer].qkv;
          CHECK(std::memcmp(qkv + trace.query.offset / 4, trace.query.after.data(), c.head_size * 4) == 0);
          CHECK(std::memcmp(qkv + trace.key.offset / 4, trace.key.after.data(), c.head_size * 4) == 0);
          double sum = 0;
          for (const ScoreTrace& s : trace.scores) {
            sum += s.probability;
            CHECK((c.attention_softcap ? std::fabs(s.capped) < c.attention_softcap : s.capped == s.score()));
            if (c.rotary_dim == 0) CHECK(s.rotated == 0);
            if (c.rotary_dim == c.head_size) CHECK(s.rest == 0);
          }
          CHECK(sum == doctest::Approx(1).epsilon(1e-4));
          // The same as JSON: the scores follow from the queries and keys that it lists.
          const nlohmann::json object = nlohmann::json::parse(trace_json(trace, c, tokens, &tokenizer).dump());
          CHECK(object.at("query").at("after") == object.at("queries").at(position));
          CHECK(object.at("tokens").size() == size_t(T));
          CHECK(object.at("pairs").size() == trace.pairs.size());
          for (int s = 0; s <= position; ++s) {
            double parts[2] = {};
            for (int i = 0; i < c.head_size; ++i)
              parts[i >= c.rotary_dim] += object["queries"][position][i].get<double>() *
                                          object["keys"][s][i].get<double>() / std::sqrt(double(c.head_size));
            CHECK(object["scores"]["rotated"][s] == doctest::Approx(parts[0]).epsilon(1e-12));
            CHECK(object["scores"]["rest"][s] == doctest::Approx(parts[1]).epsilon(1e-12));
          }
          const std::string plain = print_trace(trace, c, tokens, &tokenizer, false, false, 100);
          const std::string colour = print_trace(trace, c, tokens, &tokenizer, true, false, 100);
          const std::string narrow = print_trace(trace, c, tokens, &tokenizer, true, false, 60);
          CHECK(widest_line(narrow) <= 60);
          CHECK(without_spaces(narrow) == without_spaces(colour));
          CHECK(widest_line(plain) <= 100);
          CHECK(plain.find('\033') == std::string::npos);
          CHECK(widest_line(colour) <= 100);
          CHECK(contains(colour, "\033["));
        }
    CHECK(contains(error_of([&] { trace_head(model, tokens, T, 0, 0, -1); }), "--token"));
    CHECK(contains(error_of([&] { trace_head(model, tokens, 3, 2, 0, -1); }), "--layer"));
    CHECK(contains(error_of([&] { trace_head(model, tokens, 3, 0, 4, -1); }), "--head"));
    CHECK(contains(error_of([&] { trace_head(model, tokens, 3, 0, 0, 4); }), "--against"));
  }
}

TEST_CASE("trace: pairs, angles and offsets") {
  if (kRotaryDim.value_or(6) != 6) return;
  for (RopePairs pairs : {RopePairs::half, RopePairs::interleaved}) {
    const Config c = tiny(6, pairs);
    Cpu cpu;
    Model<Cpu, float> model(cpu, c, 1, c.context, false);
    scatter(model, 10);
    const Trace trace = trace_head(model, random_tokens(c.context, 257, 11), 20, 1, 3, 5);
    const bool half = pairs == RopePairs::half;
    for (int i = 0; i < 3; ++i) {
      CHECK(trace.pairs[i].a == (half ? i : 2 * i));
      CHECK(trace.pairs[i].b == (half ? i + 3 : 2 * i + 1));
      CHECK(trace.pairs[i].angle == doctest::Approx(20 * std::pow(10000.0, -i / 3.0)).epsilon(1e-14));
      CHECK(trace.pairs[i].table_offset == size_t(20 * 3 + i) * 8);
    }
    // Position 20, 8 heads (4 + 2*2) of 12 channels; query head 3 reads key head 1, the sixth of the packed heads.
    CHECK(trace.query.offset == size_t(20 * 8 + 3) * 48);
    CHECK(trace.key.offset == size_t(20 * 8 + 5) * 48);
    CHECK(trace.other.offset == size_t(5 * 8 + 5) * 48);
    CHECK(trace.row_bytes == 8 * 48);
  }
  CHECK(pair_score(1, 2, 3, 4, 0) == 11);
  // A quarter turn of the query (1, 2) makes it (-2, 1).
  CHECK(pair_score(1, 2, 3, 4, M_PI / 2) == doctest::Approx(-2 * 3 + 1 * 4).epsilon(1e-14));
}

TEST_CASE("trace: says so when something does not agree") {
  if (kRotaryDim.value_or(4) != 4) return;
  const Config c = tiny(4);
  Cpu cpu;
  Model<Cpu, float> model(cpu, c, 1, c.context, false);
  scatter(model, 12);
  const std::vector<int> tokens = random_tokens(10, 257, 13);
  RopeTable& table = model.rope[0];
  std::vector<float> wrong(table.cos_sin, table.cos_sin + size_t(table.positions) * 4);
  wrong[9 * 4 + 1] = std::nextafter(wrong[9 * 4 + 1], 2.0f);  // one sine, by one bit
  table.cos_sin = wrong.data();
  const Trace trace = trace_head(model, tokens, 9, 0, 0, -1);
  CHECK(!trace.agrees());
  CHECK(contains(print_trace(trace, c, tokens, nullptr, false, false, 100), "WRONG"));
}

TEST_CASE("trace: long texts and large heads stay within 100 columns, cut or not") {
  Config c = tiny(4);
  c.layers = 1, c.heads = 24, c.kv_heads = 24, c.head_size = 80, c.rotary_dim = kRotaryDim.value_or(80), c.context = 700;
  Cpu cpu;
  Model<Cpu, float> model(cpu, c, 1, c.context, false);
  scatter(model, 14);
  const std::vector<int> tokens = random_tokens(c.context, 257, 15);
  const ByteTokenizer tokenizer;
  const Trace trace = trace_head(model, tokens, 690, 0, 23, -1);
  for (const CheckTrace& check : trace.checks) CHECK_MESSAGE(check.agrees, check.what);
  const std::string part = print_trace(trace, c, tokens, &tokenizer, true, false, 100),
                    whole = print_trace(trace, c, tokens, &tokenizer, true, true, 100);
  CHECK(widest_line(part) <= 100);
  CHECK(widest_line(whole) <= 100);
  CHECK(contains(part, "--all"));
  CHECK(!contains(whole, "--all"));
}
