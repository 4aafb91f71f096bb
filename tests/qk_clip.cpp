// run/qk_clip.cuh: what a clipped head's logits become, and that nothing else changes.

#include "run/qk_clip.cuh"

#include "tests/cuda.h"

namespace {

Ranks alone;

Config small_config(int kv_heads) {
  Config c;
  c.layers = 2, c.width = 24, c.heads = 4, c.kv_heads = kv_heads, c.head_size = 32, c.mlp_hidden = 21, c.context = 19;
  c.vocab = 31, c.rotary_dim = kRotaryDim.value_or(6), c.bias = true;
  resolve(c);
  return c;
}

template <class Backend, class Real>
struct Step {
  Backend& be;
  Config c;
  Model<Backend, Real> model;
  Comm<Backend> comm;
  Step(Backend& backend, const Config& config)
      : be(backend), c(config), model(be, c, 3, c.context, true), comm(be, alone) {
    model.initialise_weights(5, 0.3);
    std::vector<Acc<Real>> flat = weights();
    for (const ParameterRow& row : model.table.rows)  // biases that count
      if (row.name.find("qkv.bias") != std::string::npos)
        for (size_t i = 0; i < row.count; ++i) flat[row.offset + i] = Acc<Real>(std::sin(double(i)));
    model.set_weights(flat.data());
  }
  std::vector<Acc<Real>> weights() {
    std::vector<Acc<Real>> flat(model.table.total);
    be.download(flat.data(), model.master, flat.size() * sizeof flat[0]);
    return flat;
  }
  // Two micro-batches and an update that changes nothing, but for the clip. Returns the largest logits (layers, NH).
  std::vector<double> run(double tau) {
    Diagnostics<Backend, Real> diagnostics(model);
    QkClip<Backend, Real> clip(model, tau);
    diagnostics.begin();
    for (int step = 0; step < 2; ++step) {  // what the first has seen does not count
      model.zero_gradients();
      clip.begin();
      for (int micro = 0; micro < (step ? 2 : 1); ++micro) {
        const int N = model.B * model.T;
        const std::vector<int> tokens = random_tokens(N + 1, c.vocab, 130 + 7 * step + micro);
        model.train_batch(tokens.data(), tokens.data() + 1, 0.5 / N, 0);
        be.synchronize();
        if (step) diagnostics.add_micro_batch();
        clip.add_micro_batch();
      }
      if (step) model.update({0, 0.9, 0.95, 1e-8, 0, 1, 1});
    }
    clip.apply(comm);
    std::vector<double> logits;
    for (const HeadDiagnostics& h : diagnostics.read(alone).heads) logits.push_back(h.max_logit);
    return logits;
  }
};

// Logits are looked at in layer 0, whose input the clip leaves alone. error: of one, relative to tau.
template <class Real, class Backend>
void test_clip(Backend& be, int kv_heads, double error) {
  CAPTURE(kv_heads);
  Step<Backend, Real> step(be, small_config(kv_heads));
  const Config& c = step.c;
  const int NH = c.heads, group = NH / kv_heads;
  const std::vector<Acc<Real>> before = step.weights();
  const std::vector<double> was = step.run(0);
  CHECK(same_bits(step.weights(), before));
  std::vector<double> sorted(was.begin(), was.begin() + NH);
  std::sort(sorted.begin(), sorted.end());
  const double tau = (sorted[1] + sorted[2]) / 2;  // two heads above, two below
  REQUIRE(sorted[2] > 1.01 * sorted[1]);
  CHECK(step.run(tau) == was);
  const std::vector<Acc<Real>> after = step.weights();
  const std::vector<double> is = step.run(0);
  for (int h = 0; h < NH; ++h) {
    CAPTURE(h);
    CHECK(std::fabs(is[h] - std::min(was[h], tau)) <= (was[h] > tau ? error * tau : 0));
  }
  for (const ParameterRow& row : step.model.table.rows) {
    CAPTURE(row.name);
    const bool qkv = row.name.find("qkv") != std::string::npos;
    const size_t width = qkv ? row.count / c.qkv_width() * c.head_size : 1, layer = qkv ? row.name[7] - '0' : 0;
    double worst = 0;
    for (size_t i = 0; i < row.count; ++i) {
      const size_t head = i / width, query = head < size_t(NH) ? head : head - NH;
      double factor = 1;
      if (qkv && head < size_t(NH) + (group == 1 ? kv_heads : 0) && was[layer * NH + query] > tau)
        factor = tau / was[layer * NH + query];
      if (group == 1) factor = std::sqrt(factor);
      const double want = before[row.offset + i] * factor;
      // A rounding of the factor and one of the product; where the factor is 1, none.
      const double room = factor == 1 ? 0 : 3 * kRounding<Acc<Real>> * std::fabs(want);
      worst = std::max(worst, std::fabs(after[row.offset + i] - want) - room);
    }
    CHECK(worst <= 0);
  }
}

}  // namespace

TEST_CASE("qk-clip: the same tokens would have given tau; other heads, values and tensors stay, to the bit") {
  Cpu be;
  for (int kv_heads : {4, 2, 1}) {
    // Sums of 24 and of 32 terms, whose sizes come to some 10 times the sum: 60 * 10 roundings.
    test_clip<double>(be, kv_heads, 600 * kRounding<double>);
    test_clip<float>(be, kv_heads, 600 * kRounding<float>);
  }
}

TEST_CASE("qk-clip: factors, over ranks, and of numbers that are none") {
  const double inf = INFINITY, logits[] = {8, 1, 4, inf, -1, 2, 2, 16, 1, 1};  // (2 ranks, 5), of which 4 are heads
  for (int head : {0, 4}) CHECK(qk_clip_factor(logits, 2, 5, head, 4, 4, 2) == 0.5);  // the query's and its key's
  CHECK(qk_clip_factor(logits, 2, 5, 1, 4, 4, 2) == 1);                               // 2 is not above 2
  CHECK(qk_clip_factor(logits, 2, 5, 2, 4, 4, 2) == std::sqrt(0.125));                // the other rank's is larger
  CHECK(qk_clip_factor(logits, 2, 5, 3, 4, 4, 2) == 1);
  CHECK(qk_clip_factor(logits, 2, 5, 0, 4, 2, 2) == 0.25);  // shared keys
  CHECK(qk_clip_factor(logits, 2, 5, 4, 4, 2, 2) == 1);
  Cpu be;
  for (double norm : {1.0, double(NAN), inf}) {
    std::vector<double> weights(16, 3.0);  // 4 + 4 heads of 2: elements 1 to 13 of them
    qk_clip(be, &weights[1], &weights[1], 1, 13, 2, logits, 2, 5, 4, 4, 2.0, &norm);
    const bool good = norm == 1;
    CHECK(weights == std::vector<double>{3, good ? 1.5 : 3, 3, 3, good ? 3 * std::sqrt(0.125) : 3,
                                         good ? 3 * std::sqrt(0.125) : 3, 3, 3, good ? 1.5 : 3, good ? 1.5 : 3, 3, 3,
                                         good ? 3 * std::sqrt(0.125) : 3, good ? 3 * std::sqrt(0.125) : 3, 3, 3});
  }
}

#ifdef __CUDACC__

TEST_CASE("cuda: qk-clip") {
  NEEDS_GPU;
  for (int kv_heads : {4, 2, 1}) {
    test_clip<float>(*gpu(), kv_heads, 600 * kRounding<float>);
    // The model's weights are those of the master copy, rounded by 2^-8 before and after, as are queries and keys.
    test_clip<bf16>(*gpu(), kv_heads, 8 * 0x1p-8);
  }
  Step<Cuda, bf16> step(*gpu(), small_config(2));
  step.run(1.0);
  const std::vector<float> master = step.weights();
  std::vector<bf16> model(master.size()), rounded(master.begin(), master.end());
  gpu()->download(model.data(), step.model.weights_flat, model.size() * sizeof(bf16));
  CHECK(same_bits(model, rounded));
}

#endif  // __CUDACC__
