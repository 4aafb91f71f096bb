// run/diagnostics.cuh: what a step's diagnostics say against what the tensors hold, spikes, the csv files; and that looking
// changes nothing.

#include "run/diagnostics.cuh"

#include <array>

#include "tests/cuda.h"

namespace {

Ranks alone;

// Noise around a level, one value after the other.
std::vector<double> noisy(size_t n, double level, double deviation) {
  std::vector<double> losses = random_values<double>(n, 120, deviation);
  for (double& loss : losses) loss += level;
  return losses;
}

Config small_config() {
  Config c;
  c.layers = 2, c.width = 24, c.heads = 4, c.kv_heads = 2, c.head_size = 10, c.mlp_hidden = 21, c.context = 9;
  c.vocab = 31, c.rotary_dim = kRotaryDim.value_or(4);
  resolve(c);
  return c;
}

size_t qkv_size(AttentionShape s) { return size_t(s.B) * s.T * (s.NH + 2 * s.NKV) * s.HS; }
size_t rows(AttentionShape s) { return size_t(s.B) * s.NH * s.T; }

template <class Real>
std::vector<Real> lse_of(const std::vector<Real>& qkv, AttentionShape s, double softcap = 0) {
  Cpu be;
  std::vector<Real> out(rows(s) * s.HS), lse = garbage<Real>(rows(s));
  attention_forward(be, out.data(), lse.data(), qkv.data(), s, softcap);
  return lse;
}

const std::vector<AttentionShape> kShapes = {{1, 1, 1, 1, 1}, {2, 11, 3, 3, 5},  {2, 13, 6, 2, 8},
                                             {1, 64, 4, 1, 3}, {1, 65, 2, 1, 3}, {2, 150, 2, 2, 16}};

}  // namespace

TEST_CASE("diagnostics: z-scores by hand") {
  // 128 losses of 3 and 5 in turn have mean 4 and standard deviation 1.
  std::vector<double> losses;
  for (int i = 0; i < 128; ++i) losses.push_back(i % 2 ? 5 : 3);
  losses.insert(losses.end(), {11.5, 4, -4});
  for (size_t i = 0; i < 128; ++i) CHECK(z_score(losses, i, 128) == 0);  // too few before
  CHECK(z_score(losses, 128, 128) == about(7.5));
  CHECK(z_score(losses, 128, 1000) == about(7.5));  // as many as there are
  // The window moves on: without the first 3, with the 11.5.
  const double mean = (64 * 5 + 63 * 3 + 11.5) / 128,
               variance = (64 * std::pow(5 - mean, 2) + 63 * std::pow(3 - mean, 2) + std::pow(11.5 - mean, 2)) / 128;
  CHECK(z_score(losses, 129, 128) == about((4 - mean) / std::sqrt(variance), 1e-11));
  // The first 3 is still in a window of 129.
  const double mean129 = (mean * 128 + 3) / 129,
               variance129 = (variance * 128 + 128 * std::pow(mean - mean129, 2) + std::pow(3 - mean129, 2)) / 129;
  CHECK(z_score(losses, 129, 129) == about((4 - mean129) / std::sqrt(variance129), 1e-11));
  CHECK(spike_score(losses, 128) == about(1.0 / 131));
  losses.back() = -40;  // a drop counts as well
  CHECK(spike_score(losses, 128) == about(2.0 / 131));
  losses[128] = 10.9;
  CHECK(spike_score(losses, 128) == about(1.0 / 131));
  CHECK(spike_score({}, 128) == 0);
}

TEST_CASE("diagnostics: spikes in noise, and in a window that is longer than the run") {
  std::vector<double> losses = noisy(3000, 3, 0.01);
  CHECK(spike_score(losses, 128) == 0);  // 7 standard deviations: once in 4e11
  CHECK(spike_score(losses, 1000) == 0);
  losses[700] += 0.1;   // 10 standard deviations
  losses[2000] += 0.1;
  CHECK(spike_score(losses, 128) == about(2.0 / 3000));
  CHECK(spike_score(losses, 1000) == about(2.0 / 3000));
  losses[2001] = NAN;  // and what comes after has no mean
  CHECK(spike_score(losses, 128) == about(2.0 / 3000));
  CHECK(std::isnan(z_score(losses, 2100, 128)));
  CHECK(std::isfinite(z_score(losses, 2130, 128)));
}

// Largest score and entropies from the matrix of all weights, which is kept.
TEST_CASE_TEMPLATE("diagnostics: attention statistics equal those of the explicit matrix", Real, float, double) {
  Cpu be;
  for (const AttentionShape& s : kShapes)
    // 30: scores of some thousands, weights that are one-hot or nearly.
    for (auto [deviation, softcap] : {std::pair{1.0, 0.0}, {1.0, 1.5}, {30.0, 0.0}, {30.0, 50.0}}) {
      const std::vector<Real> qkv = random_values<Real>(qkv_size(s), 16, deviation);
      const std::vector<double> exact(qkv.begin(), qkv.end());
      const std::vector<Real> lse = lse_of(qkv, s, softcap);
      std::vector<double> max_logit(s.NH, 0.125), entropy(s.NH, 3.0), expected_logit = max_logit,
                          expected_entropy = entropy, expected(rows(s));
      std::vector<Real> entropies = garbage<Real>(rows(s));
      attention_statistics(be, max_logit.data(), entropy.data(), entropies.data(), qkv.data(), lse.data(), s, softcap);
      for (int b = 0; b < s.B; ++b)
        for (int h = 0; h < s.NH; ++h)
          for (int t = 0; t < s.T; ++t) {
            std::vector<double> score = attention_scores(exact.data(), s, b, h, t);
            for (double x : score) expected_logit[h] = std::max(expected_logit[h], std::fabs(x));  // before the cap
            score = attention_scores(exact.data(), s, b, h, t, softcap);
            softmax(score);
            double& row = expected[(size_t(b) * s.NH + h) * s.T + t];
            for (double p : score)
              if (p > 0) row -= p * std::log(p);
            expected_entropy[h] += row;
          }
      // A score is a sum of HS terms: off by HS roundings of the sum of their sizes, up to 2 sqrt(HS) deviation^2 or
      // so, and lse by one of its own. That is an absolute error of log p, relative of p; an entropy's is as large.
      const double error = (s.HS + 8) * 8 * std::sqrt(s.HS) * deviation * deviation * kRounding<Real>;
      CHECK(distance(entropies, expected) <= error);
      CHECK(distance(entropy, expected_entropy) <= error * s.B * s.T);
      CHECK(distance(max_logit, expected_logit) <= error);
      CHECK(largest(entropy) >= 3);
    }
}

TEST_CASE("diagnostics: attention statistics at their bounds") {
  Cpu be;
  const AttentionShape s{1, 70, 1, 1, 4};
  std::vector<double> qkv(qkv_size(s)), max_logit(1), entropy(1), entropies(s.T);
  auto look = [&] {
    const std::vector<double> lse = lse_of(qkv, s);
    attention_statistics(be, max_logit.data(), entropy.data(), entropies.data(), qkv.data(), lse.data(), s);
  };
  look();  // zeros: all weights equal
  for (int t = 0; t < s.T; ++t) CHECK(entropies[t] == doctest::Approx(std::log(t + 1.0)).epsilon(1e-13));
  CHECK(max_logit[0] == 0);
  for (int t = 0; t < s.T; ++t) qkv[t * 12 + 1] = 2, qkv[t * 12 + 5] = -0.5 * t;  // scores 0, -0.5, -1, ...
  look();
  CHECK(max_logit[0] == 34.5);  // the largest size is that of a negative one
  qkv[50 * 12 + 6] = NAN;       // in the key of position 50
  look();
  CHECK(std::isnan(entropy[0]));
  CHECK(std::isnan(entropies[60]));
  CHECK(std::isfinite(entropies[49]));
}

TEST_CASE_TEMPLATE("diagnostics: squares by group of channels, added to what is there", Real, float, double) {
  Cpu be;
  for (int N : {1, 5, 100})
    for (int groups : {1, 3}) {
      const int width = 7, stride = 25;
      const std::vector<Real> x = random_values<Real>(size_t(N) * stride, 74);
      std::vector<double> expected(groups, 2.0), sums = expected;
      for (int n = 0; n < N; ++n)
        for (int c = 0; c < groups * width; ++c) expected[c / width] += double(x[n * stride + c]) * x[n * stride + c];
      add_squares(be, sums.data(), x.data(), N, groups, width, stride);
      for (int g = 0; g < groups; ++g) CHECK(sums[g] == about(expected[g], 1e-13));  // N * width terms, in double
    }
}

TEST_CASE("diagnostics: squares are the same for any number of threads") {
  Cpu be;
  const int N = 533, stride = 519;
  const std::vector<float> x = random_values<float>(N * stride, 83);
  CHECK(same_for_any_threads([&] {
    std::vector<double> sums(7);
    add_squares(be, sums.data(), x.data(), N, 7, 70, stride);
    return sums;
  }));
}

TEST_CASE_TEMPLATE("diagnostics: of a step with two micro-batches, from the tensors themselves", Real, float, double) {
  const Config c = small_config();
  const int B = 3, T = 9, N = B * T, QKV = c.qkv_width(), group = c.heads / c.kv_heads;
  Cpu be;
  Model<Cpu, Real> model(be, c, B, T, true);
  model.initialise_weights(5, 0.3);
  Diagnostics<Cpu, Real> diagnostics(model);
  StepDiagnostics d;
  const AdamW a{1e-2, 0.9, 0.95, 1e-8, 0.1, 1e-3, 2};
  std::vector<double> max_logit(c.layers * c.heads), entropy(max_logit), q(max_logit), k(max_logit), x(c.layers);
  std::vector<Real> before;
  for (int step = 0; step < 2; ++step) {  // the second step's: what the first left must not matter
    model.zero_gradients();
    diagnostics.begin();
    for (double* sums : {max_logit.data(), entropy.data(), q.data(), k.data()}) std::fill_n(sums, max_logit.size(), 0);
    std::fill(x.begin(), x.end(), 0);
    for (int micro = 0; micro < 2; ++micro) {
      const std::vector<int> tokens = random_tokens(N + 1, c.vocab, 130 + 2 * step + micro);
      model.train_batch(tokens.data(), tokens.data() + 1, 0.5 / N, 0);
      diagnostics.add_micro_batch();
      for (int l = 0; l < c.layers; ++l) {
        const Real* qkv = model.acts.blocks[l].qkv;
        for (int i = 0; i < N * c.width; ++i)
          x[l] += std::pow(double(model.acts.blocks[l].x[i]), 2) / (2 * N * c.width);
        for (int h = 0; h < c.heads; ++h)
          for (int n = 0; n < N; ++n) {
            const Real *query = qkv + n * QKV + h * c.head_size,
                       *keys = qkv + n / T * T * QKV + (c.heads + h / group) * c.head_size;
            std::vector<double> score(n % T + 1);
            double z = 0;
            for (int j = 0; j <= n % T; ++j) {
              for (int i = 0; i < c.head_size; ++i) score[j] += double(query[i]) * double(keys[j * QKV + i]);
              score[j] /= std::sqrt(c.head_size);
              z += std::exp(score[j]);
            }
            const int at = l * c.heads + h;
            for (double s : score) {
              max_logit[at] = std::max(max_logit[at], std::fabs(s));
              entropy[at] -= std::exp(s) / z * std::log(std::exp(s) / z) / (2 * N);
            }
            for (int i = 0; i < c.head_size; ++i) {
              q[at] += std::pow(double(query[i]), 2) / (2 * N * c.head_size);
              k[at] += std::pow(double(keys[n % T * QKV + i]), 2) / (2 * N * c.head_size);
            }
          }
      }
    }
    before.assign(model.master, model.master + model.table.total);
    model.update(a);
    diagnostics.add_update(a);
    d = diagnostics.read(alone);
  }
  REQUIRE(d.heads.size() == size_t(c.layers * c.heads));
  // Scores are sums of 10 terms and up to 20 here; their roundings are absolute errors of log p.
  const double tolerance = 20 * 20 * kRounding<Real>;
  for (int l = 0; l < c.layers; ++l)
    for (int h = 0; h < c.heads; ++h) {
      const int at = l * c.heads + h;
      CAPTURE(at);
      CHECK(d.heads[at].layer == l);
      CHECK(d.heads[at].head == h);
      CHECK(d.heads[at].max_logit == about(max_logit[at], tolerance));
      CHECK(d.heads[at].entropy == about(entropy[at], tolerance));
      CHECK(d.heads[at].q_rms == about(std::sqrt(q[at]), 1e-12));  // in double, of the same numbers
      CHECK(d.heads[at].k_rms == about(std::sqrt(k[at]), 1e-12));
      CHECK(d.heads[at].residual_rms == about(std::sqrt(x[l]), 1e-12));
      CHECK(d.heads[at].max_logit > 0.1);
    }
  REQUIRE(d.tensors.size() == model.table.rows.size());
  for (size_t i = 0; i < d.tensors.size(); ++i) {
    const ParameterRow& row = model.table.rows[i];
    CAPTURE(row.name);
    double g = 0, w = 0, u = 0;
    for (size_t j = row.offset; j < row.offset + row.count; ++j) {
      g += std::pow(double(model.gradients_flat[j]), 2);
      w += std::pow(double(model.master[j]), 2);
      u += std::pow(double(model.master[j]) - double(before[j]), 2);
    }
    CHECK(d.tensors[i].name == row.name);
    CHECK(d.tensors[i].grad_norm == about(std::sqrt(g), 1e-12));
    CHECK(d.tensors[i].weight_rms == about(std::sqrt(w / row.count), 1e-12));
    // Weights of about 1 are rounded after a step of about 0.01, which the difference shows and the ratio does not.
    CHECK(d.tensors[i].update_ratio == about(std::sqrt(u / w), 100 * 4 * kRounding<Real>));
    CHECK(d.tensors[i].nonfinite == 0);
    CHECK(u > 0);
  }
}

TEST_CASE("diagnostics: gradients that are not finite are counted, and change nothing") {
  const Config c = small_config();
  Cpu be;
  Model<Cpu, float> model(be, c, 1, 9, true);
  model.initialise_weights(6);
  model.gradients_flat[model.table.rows[1].offset + 3] = NAN;
  model.gradients_flat[model.table.rows[2].offset] = INFINITY;
  model.gradients_flat[model.table.rows[2].offset + 1] = -INFINITY;
  const AdamW a{1e-2, 0.9, 0.95, 1e-8, 0.1, 1, 1};
  Diagnostics<Cpu, float> diagnostics(model);
  diagnostics.begin();
  model.update(a);
  diagnostics.add_update(a);
  const StepDiagnostics d = diagnostics.read(alone);
  for (size_t i = 0; i < d.tensors.size(); ++i) {
    CHECK(d.tensors[i].nonfinite == (i == 1 ? 1 : i == 2 ? 2 : 0));
    CHECK(std::isfinite(d.tensors[i].grad_norm) == (i != 1 && i != 2));
    CHECK(d.tensors[i].update_ratio == 0);
  }
}

TEST_CASE("diagnostics: training is the same with and without, to the bit, and so are they for any number of threads") {
  auto run = [&](bool look, bool recompute = false) {
    Config c = small_config();
    c.recompute = recompute;
    Cpu be;
    Model<Cpu, float> model(be, c, 3, 9, true);
    model.initialise_weights(7);
    Diagnostics<Cpu, float> diagnostics(model);
    std::vector<double> seen;
    for (int step = 1; step <= 3; ++step) {
      const std::vector<int> tokens = random_tokens(28, c.vocab, 140 + step);
      model.zero_gradients();
      if (look) diagnostics.begin();
      model.train_batch(tokens.data(), tokens.data() + 1, 1.0 / 27, 0);
      if (look) diagnostics.add_micro_batch();
      const AdamW a{1e-2, 0.9, 0.95, 1e-8, 0.1, 1, step};
      model.update(a);
      if (!look) continue;
      diagnostics.add_update(a);
      const StepDiagnostics d = diagnostics.read(alone);
      for (const HeadDiagnostics& h : d.heads)
        seen.insert(seen.end(), {h.max_logit, h.entropy, h.q_rms, h.k_rms, h.residual_rms});
      for (const TensorDiagnostics& t : d.tensors)
        seen.insert(seen.end(), {t.grad_norm, t.weight_rms, t.update_ratio});
    }
    return std::make_pair(std::vector<float>(model.master, model.master + model.table.total), seen);
  };
  CHECK(same_bits(run(true).first, run(false).first));
  CHECK(same_bits(run(true, true).second, run(true).second));
  CHECK(same_for_any_threads([&] { return run(true).second; }));
}

TEST_CASE("diagnostics: csv files are cut at the checkpoint's step and read back by name") {
  const TemporaryDirectory directory;
  const std::string path = directory / "log.csv";
  {
    CsvLog log(path, "step,loss,grad_norm", 0);
    for (int step = 1; step <= 12; ++step) log.row("%d,%.6f,%.6f\n", step, step == 12 ? -NAN : 1.5 * step, 0.2 * step);
    log.flush();
  }
  CHECK(read_csv(path)["loss"].back() == "nan");
  { CsvLog again(path, "step,loss,grad_norm", 10); }
  CHECK(read_column(path, "loss").size() == 10);
  CHECK(read_column(path, "loss").back() == 15);
  CHECK(read_column(path, "other").empty());
  CHECK(read_column(directory / "none.csv", "loss").empty());
  CHECK(decimals(-NAN) == "nan");
  CHECK(decimals(1.0 / 3) == "0.333333");

  nlohmann::json summary = diagnostics_summary(directory.path, 1.0);
  CHECK(summary["clip_rate"] == 0.5);  // 1.2 to 2.0; a norm of 1.0 is not clipped
  CHECK(summary["spike_score_128"] == 0);
  CHECK_FALSE(summary.contains("max_logit"));
  CHECK(diagnostics_summary(directory.path, 0.0)["clip_rate"] == 0);  // no clipping
  {
    DiagnosticsLog log(directory.path, 0);
    log.write(10, {{{0, 0, 50, 0.5, 1, 1, 1}, {0, 1, 2, 0.75, 1, 1, 1}}, {}});
    log.write(20, {{{0, 0, 4, 1.5, 1, 1, 1}, {0, 1, 8, 1.25, 1, 1, 1}}, {}});
  }
  summary = diagnostics_summary(directory.path, 1.0);
  CHECK(summary["max_logit"] == 8);
  CHECK(summary["max_logit_ever"] == 50);
  CHECK(summary["entropy_min"] == 1.25);
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA against the CPU

#ifdef __CUDACC__

namespace {

// Statistics of attention, from a forward pass on the GPU; deviation 30 makes scores of thousands.
template <class Real>
void test_attention_statistics(AttentionShape s, float deviation, double softcap) {
  CAPTURE(s.T);
  CAPTURE(s.NKV);
  CAPTURE(s.HS);
  CAPTURE(deviation);
  CAPTURE(softcap);
  const size_t N = size_t(s.B) * s.T, rows = N * s.NH;
  const Values qkv = numbers<Real>(N * (s.NH + 2 * s.NKV) * s.HS, 33, deviation);
  Tensor<Real> device_qkv(qkv), out(N * s.NH * s.HS);
  Tensor<float> lse(rows), entropies(rows);
  Tensor<double> max_logit(std::vector<double>(s.NH, 0.125)), entropy(std::vector<double>(s.NH, 3));
  attention_forward(*gpu(), out(), lse(), device_qkv(), s, softcap);
  attention_statistics(*gpu(), max_logit(), entropy(), entropies(), device_qkv(), lse(), s, softcap);
  // The definition in double, from the GPU's qkv and with its own lse.
  std::vector<double> want_logit(s.NH, 0.125), want_entropy(s.NH, 3), want_rows(rows), want_lse(rows);
  const std::vector<double> exact(qkv.begin(), qkv.end());
  std::vector<double> exact_out(out.n);
  attention_forward(cpu, exact_out.data(), want_lse.data(), exact.data(), s, softcap);
  attention_statistics(cpu, want_logit.data(), want_entropy.data(), want_rows.data(), exact.data(), want_lse.data(), s,
                       softcap);
  // A score is a sum of HS products, whose sizes sum to 2 sqrt(HS) deviation^2 or so after scaling; lse comes from such
  // scores and one rounding of its own. All are absolute errors of log p, hence relative ones of p; an entropy's is as
  // large, times log p <= 7 where it counts.
  const double size = double(deviation) * deviation, error = (s.HS + 16) * 0x1p-24 * 2 * std::sqrt(s.HS) * size * 7;
  close("entropies", entropies.host(), Values(want_rows.begin(), want_rows.end()), 8 * 0x1p-24, error + 8 * 0x1p-24);
  const std::vector<double> got_logit = max_logit.bits(), got_entropy = entropy.bits();
  for (int h = 0; h < s.NH; ++h) {
    CAPTURE(h);
    CHECK(std::fabs(got_logit[h] - want_logit[h]) <= error);
    CHECK(std::fabs(got_entropy[h] - want_entropy[h]) <= (error + 8 * 0x1p-24 * 8) * N);
  }
  // The same in every run.
  Tensor<double> again(std::vector<double>(s.NH, 3)), logit_again(std::vector<double>(s.NH, 0.125));
  attention_statistics(*gpu(), logit_again(), again(), entropies(), device_qkv(), lse(), s, softcap);
  CHECK(same_bits(again.bits(), got_entropy));
  CHECK(same_bits(logit_again.bits(), got_logit));
}

}  // namespace

TEST_CASE_TEMPLATE("cuda: attention statistics", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for (int T : lengths())
    for (int NKV : {1, 4})
      for (int HS : {10, 32, 64, 128, 256})
        for (auto [deviation, softcap] : {std::pair{1.0f, 0.0}, {1.0f, 1.5}, {30.0f, 0.0}, {30.0f, 50.0}})
          test_attention_statistics<Real>({2, T, 4, NKV, HS}, deviation, softcap);
}

TEST_CASE_TEMPLATE("cuda: attention statistics of numbers that are none", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for (int HS : {10, 64}) {
    const AttentionShape s = {2, 130, 2, 1, HS};
    const size_t N = size_t(s.B) * s.T, stride = size_t(s.NH + 2 * s.NKV) * HS;
    for (float odd : {float(NAN), float(INFINITY)}) {
      Values qkv = numbers<Real>(N * stride, 34);
      qkv[70 * stride + s.NH * HS] = odd;  // a key at position 70 of the first sequence
      Tensor<Real> device_qkv(qkv), out(N * s.NH * HS);
      Tensor<float> lse(N * s.NH), entropies(N * s.NH);
      Tensor<double> max_logit(std::vector<double>(s.NH)), entropy(std::vector<double>(s.NH));
      attention_forward(*gpu(), out(), lse(), device_qkv(), s);
      attention_statistics(*gpu(), max_logit(), entropy(), entropies(), device_qkv(), lse(), s);
      const Values rows = entropies.host();
      for (int h = 0; h < s.NH; ++h) {
        CHECK_FALSE(std::isfinite(entropy.bits()[h]));
        CHECK_FALSE(std::isfinite(rows[h * s.T + 70]));
        bool finite = true;  // the rows before, and the other sequence
        for (int t = 0; t < s.T; ++t)
          finite = finite && (t >= 70 || std::isfinite(rows[h * s.T + t])) &&
                   std::isfinite(rows[(s.NH + h) * s.T + t]);
        CHECK(finite);
      }
    }
  }
}

TEST_CASE_TEMPLATE("cuda: squares by group of channels", Real, BOTH_TYPES) {
  NEEDS_GPU;
  using Sizes = std::array<int, 4>;  // N, groups, width, stride
  for (Sizes z : {Sizes{1, 1, 1, 1}, {17, 6, 10, 80}, {1000, 5, 64, 448}, {3000, 1, 768, 768}, {333, 3, 7, 25}}) {
    CAPTURE(z[2]);
    const Values x = numbers<Real>(size_t(z[0]) * z[3], 35);
    std::vector<double> want(z[1], 2);
    add_squares(cpu, want.data(), x.data(), z[0], z[1], z[2], z[3]);
    Tensor<Real> device_x(x);
    Tensor<double> got(std::vector<double>(z[1], 2));
    add_squares(*gpu(), got(), device_x(), z[0], z[1], z[2], z[3]);
    const std::vector<double> sums = got.bits();
    // A thread adds up to 3000 * 768 / (256 * 8 * multiprocessors) squares or so in fp32: at most 64; the rest is in
    // double.
    for (int g = 0; g < z[1]; ++g) CHECK(sums[g] == doctest::Approx(want[g]).epsilon(64 * 0x1p-24));
  }
}

TEST_CASE("cuda: statistics of parameter tensors") {
  NEEDS_GPU;
  const std::vector<TensorPlace> places = {{0, 1, 1}, {64, 1000, 1}, {1088, 200001, 1}, {201152, 67, 0}};
  const size_t n = 201280;
  const AdamW a = {1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0, 3};
  Values gradients = numbers<float>(n, 36, 0.1f), master = numbers<float>(n, 37), m = numbers<float>(n, 38, 0.1f),
         v = absolute(numbers<float>(n, 39, 0.1f));
  for (bool broken : {false, true}) {
    if (broken) gradients[70] = NAN, gradients[1100] = INFINITY, gradients[1101] = -INFINITY;
    const float norm = broken ? NAN : 1;
    std::vector<TensorStatistics> want(places.size());
    tensor_statistics(cpu, want.data(), places.data(), int(places.size()), master.data(), gradients.data(), m.data(),
                      v.data(), &norm, a);
    Tensor<float> device_gradients(gradients), device_master(master), device_m(m), device_v(v),
        device_norm(Values{norm});
    Tensor<TensorPlace> device_places(places);
    Tensor<TensorStatistics> got(places.size());
    tensor_statistics(*gpu(), got(), device_places(), int(places.size()), device_master(), device_gradients(),
                      device_m(), device_v(), device_norm(), a);
    const std::vector<TensorStatistics> statistics = got.bits();
    for (size_t i = 0; i < places.size(); ++i) {
      CAPTURE(i);
      CHECK(statistics[i].nonfinite == want[i].nonfinite);
      CHECK(want[i].nonfinite == (broken ? (i == 1) + 2 * (i == 2) : 0));
      CHECK(statistics[i].weight == doctest::Approx(want[i].weight).epsilon(1e-12));  // in double
      if (want[i].nonfinite == 0)
        CHECK(statistics[i].gradient == doctest::Approx(want[i].gradient).epsilon(1e-12));
      else
        CHECK_FALSE(std::isfinite(statistics[i].gradient));
      // Each change is computed in fp32, in about five roundings.
      CHECK(statistics[i].update == doctest::Approx(want[i].update).epsilon(16 * 0x1p-24));
      CHECK((statistics[i].update > 0) == !broken);
    }
  }
}

#endif  // __CUDACC__
