// attention.cuh: causal attention and QK-Norm against plain formulas and finite differences.

#include "attention.cuh"

#include "norms.cuh"
#include "tests/cuda.h"

namespace {

size_t qkv_size(AttentionShape s) { return size_t(s.B) * s.T * (s.NH + 2 * s.NKV) * s.HS; }
size_t out_size(AttentionShape s) { return size_t(s.B) * s.T * s.NH * s.HS; }
size_t rows(AttentionShape s) { return size_t(s.B) * s.NH * s.T; }

template <class Real>
struct Result {
  std::vector<Real> out, lse;
};

template <class Real>
Result<Real> attend(const std::vector<Real>& qkv, AttentionShape s, double softcap = 0) {
  Cpu be;
  Result<Real> r{garbage<Real>(out_size(s)), garbage<Real>(rows(s))};
  attention_forward(be, r.out.data(), r.lse.data(), qkv.data(), s, softcap);
  return r;
}

template <class Real>
std::vector<Real> attend_backward(const std::vector<Real>& qkv, const std::vector<Real>& dout, AttentionShape s,
                                  double softcap = 0) {
  Cpu be;
  const Result<Real> r = attend(qkv, s, softcap);
  std::vector<Real> dqkv = garbage<Real>(qkv.size()), D = garbage<Real>(attention_workspace<Real>(s));
  attention_backward(be, dqkv.data(), D.data(), dout.data(), qkv.data(), r.out.data(), r.lse.data(), s, softcap);
  return dqkv;
}

Result<double> attend_by_definition(const std::vector<double>& qkv, AttentionShape s, double softcap = 0) {
  Result<double> r{garbage<double>(out_size(s)), garbage<double>(rows(s))};
  attention_forward_by_definition(r.out.data(), r.lse.data(), qkv.data(), s, softcap);
  return r;
}

// One and several runs of kQueryBlock queries, with and without a remainder; one, some and all heads for a key head.
const std::vector<AttentionShape> kShapes = {{1, 1, 1, 1, 1}, {2, 11, 3, 3, 5},  {2, 13, 6, 2, 8},
                                             {1, 64, 4, 1, 3}, {1, 65, 2, 1, 3}, {2, 150, 2, 2, 16}};
// None, and one in the midst of the scores, which are of size 1 here.
const std::vector<double> kSoftcaps = {0, 1.5};

}  // namespace

TEST_CASE_TEMPLATE("attention: forward equals the definition", Real, float, double) {
  for (double softcap : kSoftcaps)
    for (const AttentionShape& s : kShapes) {
      const std::vector<Real> qkv = random_values<Real>(qkv_size(s), 10);
      const Result<Real> r = attend(qkv, s, softcap);
      const Result<double> expected = attend_by_definition({qkv.begin(), qkv.end()}, s, softcap);
      // A score is a dot product of HS terms of size about 1, up to 4 in sum after scaling: HS + 1 roundings at worst,
      // exp_ adds 2 ulp, and soft_cap 4 roundings of the cap. Outputs are averages of numbers up to 4.
      const double tolerance = (s.HS + 8 + softcap) * 4 * 4 * kRounding<Real>;
      CHECK(distance(r.out, expected.out) <= tolerance);
      CHECK(distance(r.lse, expected.lse) <= tolerance);
    }
}

TEST_CASE("attention: a soft cap by hand") {
  const AttentionShape s{1, 2, 1, 1, 1};
  // The second token's query is 6, the keys are -1 and 1e6, the values 0 and 1: scores of -6 and 6e6 under a cap of 2.
  const std::vector<float> qkv = {1, -1, 0, 6, 1e6, 1};
  const Result<float> r = attend(qkv, s, 2);
  const double low = 2 * std::tanh(-3.0), high = 2;
  CHECK(r.out[1] == doctest::Approx(1 / (1 + std::exp(low - high))).epsilon(16 * kRounding<float>));
  CHECK(r.lse[1] == doctest::Approx(std::log(std::exp(low) + std::exp(high))).epsilon(16 * kRounding<float>));
  const std::vector<float> dqkv = attend_backward(qkv, {0, 1}, s, 2);
  const double p = 1 / (1 + std::exp(low - high)), dscore = (1 - p) * (0 - p) * (1 - low * low / 4);
  CHECK(dqkv[1] == doctest::Approx(6 * dscore).epsilon(1e-4));  // 0.01 of slope are left, and off by 2^-21
  CHECK(dqkv[4] == 0);                                          // the cap is flat there
}

TEST_CASE("attention: the definition's backward is the derivative of its forward") {
  for (double softcap : kSoftcaps)
    for (const AttentionShape& s : kShapes) {
      if (s.T > 100) continue;  // takes seconds and shows nothing new
      std::vector<double> qkv = random_values<double>(qkv_size(s), 11), dqkv = garbage<double>(qkv.size());
      const std::vector<double> dout = random_values<double>(out_size(s), 12);
      attention_backward_by_definition(dqkv.data(), dout.data(), qkv.data(), s, softcap);
      CHECK(slope_distance(qkv, dqkv, [&] { return dot(attend_by_definition(qkv, s, softcap).out, dout); }) < kSlope);
    }
}

TEST_CASE_TEMPLATE("attention: backward equals the definition", Real, float, double) {
  for (double softcap : kSoftcaps)
    for (const AttentionShape& s : kShapes) {
      const std::vector<Real> qkv = random_values<Real>(qkv_size(s), 13), dout = random_values<Real>(out_size(s), 14);
      const std::vector<double> exact(qkv.begin(), qkv.end()), exact_dout(dout.begin(), dout.end());
      std::vector<double> expected = garbage<double>(qkv.size());
      attention_backward_by_definition(expected.data(), exact_dout.data(), exact.data(), s, softcap);
      // In turn: scores (HS terms), soft_cap, exp_, dP (HS terms), D, and a sum over at most T terms, whose roundings
      // partly cancel. At T = 1 the gradients of q and k are 0 but for rounding, and measured against that of v.
      CHECK(relative_distance(attend_backward(qkv, dout, s, softcap), expected) <=
            (2 * s.HS + 2 * std::sqrt(s.T) + 8 + 8 * softcap) * kRounding<Real>);
    }
}

TEST_CASE("attention: nothing depends on the future") {
  const AttentionShape s{2, 70, 4, 2, 6};
  const std::vector<float> qkv = random_values<float>(qkv_size(s), 15);
  const Result<float> r = attend(qkv, s);
  for (int cut : {1, 33, 64, 69}) {  // positions from `cut` on become something else altogether
    std::vector<float> other = qkv;
    const size_t position = (s.NH + 2 * s.NKV) * s.HS;
    for (int b = 0; b < s.B; ++b)
      for (size_t i = (size_t(b) * s.T + cut) * position; i < (size_t(b) + 1) * s.T * position; ++i) other[i] = 1e4f;
    const Result<float> o = attend(other, s);
    double worst = 0;
    for (int b = 0; b < s.B; ++b)
      for (size_t i = 0; i < size_t(cut) * s.NH * s.HS; ++i)
        worst = std::max(worst, std::fabs(double(r.out[size_t(b) * s.T * s.NH * s.HS + i]) -
                                          o.out[size_t(b) * s.T * s.NH * s.HS + i]));
    CHECK(worst == 0);
  }
}

TEST_CASE_TEMPLATE("attention: scores of any size give finite probabilities", Real, float, double) {
  const AttentionShape s{1, 67, 2, 1, 8};
  std::vector<Real> qkv = random_values<Real>(qkv_size(s), 16, 300);  // scores up to about 1e6
  const Result<Real> r = attend(qkv, s);
  const Result<double> expected = attend_by_definition({qkv.begin(), qkv.end()}, s);
  // Scores of 1e6 are off by 1e6 * HS roundings: where two are as near as that, fp32 cannot tell which one wins, so
  // only size is checked there, and values in fp64.
  CHECK(largest(r.out) <= 1.001 * largest(qkv));
  if (sizeof(Real) == 8) CHECK(distance(r.out, expected.out) <= 1e6 * 16 * kRounding<Real> * largest(qkv));
  qkv[5] = std::numeric_limits<Real>::quiet_NaN();  // channel 5 of the first query: its own output only
  const Result<Real> bad = attend(qkv, s);
  CHECK(std::isnan(bad.out[0]));
  CHECK(std::isnan(bad.lse[0]));
  CHECK_FALSE(std::isnan(bad.out[size_t(s.NH) * s.HS]));
}

TEST_CASE("attention: many small weights beside a large one are not lost") {
  AttentionShape s{1, 32768, 1, 1, 4};
  s.first = s.T - 8;
  const std::vector<float> qkv = attention_sink<float>(s.T);
  Result<float> r = attend(qkv, s);
  Result<double> expected = attend_by_definition({qkv.begin(), qkv.end()}, s);
  for (auto* v : {&r.out, &r.lse}) v->erase(v->begin(), v->end() - v->size() / s.T * 8);
  for (auto* v : {&expected.out, &expected.lse}) v->erase(v->begin(), v->end() - v->size() / s.T * 8);
  // As attention_forward() says; scores are exact, and lse, about 16.5, is the sum of two rounded numbers.
  CHECK(distance(r.lse, expected.lse) <= (kSumChunk + 8 + 2 * 16.5) * kRounding<float>);
  CHECK(distance(r.out, expected.out) <=
        (kDepth + s.T / kDepth + kSumChunk + 8) * kRounding<float> * largest(expected.out));
}

TEST_CASE("attention: first computes the later positions only, from all keys and values") {
  for (const AttentionShape& s : kShapes) {
    const std::vector<double> qkv = random_values<double>(qkv_size(s), 17);
    const Result<double> all = attend(qkv, s);
    for (int first : {1, s.T / 2, s.T - 1}) {
      if (first < 1) continue;
      AttentionShape later = s;
      later.first = first;
      const Result<double> part = attend(qkv, later);
      double worst = 0;
      bool untouched = true;
      for (int b = 0; b < s.B; ++b)
        for (int t = 0; t < s.T; ++t)
          for (int c = 0; c < s.NH * s.HS; ++c) {
            const size_t i = (size_t(b) * s.T + t) * s.NH * s.HS + c;
            if (t < first)
              untouched = untouched && std::isnan(part.out[i]);
            else
              worst = std::max(worst, std::fabs(part.out[i] - all.out[i]));
          }
      CHECK(untouched);
      CHECK(worst <= (s.HS + 8) * 16 * kRounding<double>);
    }
  }
}

TEST_CASE("attention: the number of threads changes nothing") {
  for (const AttentionShape& s : kShapes) {
    const std::vector<float> qkv = random_values<float>(qkv_size(s), 18), dout = random_values<float>(out_size(s), 19);
    CHECK(same_for_any_threads([&] { return attend(qkv, s).out; }));
    CHECK(same_for_any_threads([&] { return attend_backward(qkv, dout, s); }));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// QK-Norm

namespace {

struct QkNorm {
  RopeShape s;
  std::vector<float> cos_sin;
  RopeTable table;
  static constexpr double eps = 1e-5;

  QkNorm(RopeShape shape, int R, RopePairs pairs) : s(shape), cos_sin(size_t(shape.T) * R) {
    rope_fill_table(cos_sin.data(), s.T, R, 10000);
    table = {cos_sin.data(), s.T, R, pairs};
  }
  size_t heads() const { return size_t(s.B) * s.T * (s.NH + s.NKV); }

  template <class Real>
  struct Forward {
    std::vector<Real> qkv, raw, rstd;
  };
  template <class Real>
  Forward<Real> forward(std::vector<Real> qkv, const std::vector<Real>& wq, const std::vector<Real>& wk) const {
    Cpu be;
    Forward<Real> f{std::move(qkv), garbage<Real>(heads() * s.HS), garbage<Real>(heads())};
    qk_norm_rope_forward(be, f.qkv.data(), f.raw.data(), f.rstd.data(), wq.data(), wk.data(), table, s, eps);
    return f;
  }
};

std::vector<QkNorm> qk_norm_cases() {
  std::vector<QkNorm> all;
  for (int R : {0, 2, 4, 8})
    for (RopePairs pairs : {RopePairs::half, RopePairs::interleaved}) {
      if (R != kRotaryDim.value_or(R)) continue;
      all.emplace_back(RopeShape{2, 11, 3, 3, 8}, R, pairs);
      all.emplace_back(RopeShape{1, 9, 4, 2, 9}, R, pairs);
    }
  return all;
}

}  // namespace

TEST_CASE_TEMPLATE("attention: QK-Norm is RMSNorm of every query and key head, then RoPE; values stay", Real, float,
                   double) {
  for (const QkNorm& q : qk_norm_cases()) {
    const RopeShape s = q.s;
    const std::vector<Real> qkv = random_values<Real>(qkv_size(s), 20), wq = random_values<Real>(s.HS, 21),
                            wk = random_values<Real>(s.HS, 22);
    const auto f = q.forward(qkv, wq, wk);
    Cpu be;
    std::vector<Real> expected = qkv;
    Real unused_mean, rstd;
    for (int n = 0; n < s.B * s.T; ++n)
      for (int h = 0; h < s.NH + s.NKV; ++h) {
        const size_t at = (size_t(n) * (s.NH + 2 * s.NKV) + h) * s.HS;
        norm_forward(be, NormKind::rms, &expected[at], &unused_mean, &rstd, &qkv[at], h < s.NH ? wq.data() : wk.data(),
                     (const Real*)nullptr, 1, s.HS, q.eps);
      }
    rope_forward(be, expected.data(), q.table, s);
    // Both compute the same few steps; the sum of squares may be taken in another order.
    CHECK(distance(f.qkv, expected) <= (s.HS + 6) * kRounding<Real> * largest(expected));
    double values_changed = 0;
    for (int n = 0; n < s.B * s.T; ++n)
      for (int c = 0; c < s.NKV * s.HS; ++c) {
        const size_t at = (size_t(n) * (s.NH + 2 * s.NKV) + s.NH + s.NKV) * s.HS + c;
        values_changed += f.qkv[at] != qkv[at];
      }
    CHECK(values_changed == 0);
  }
}

TEST_CASE("attention: QK-Norm's backward is the derivative of its forward, and weights' gradients accumulate") {
  for (const QkNorm& q : qk_norm_cases()) {
    const RopeShape s = q.s;
    std::vector<double> qkv = random_values<double>(qkv_size(s), 23), wq = random_values<double>(s.HS, 24),
                        wk = random_values<double>(s.HS, 25);
    const std::vector<double> dout = random_values<double>(qkv.size(), 26);
    const auto f = q.forward(qkv, wq, wk);
    Cpu be;
    std::vector<double> dqkv = dout, dwq(s.HS, 100.0), dwk(s.HS, -100.0);
    qk_norm_rope_backward(be, dqkv.data(), dwq.data(), dwk.data(), f.raw.data(), f.rstd.data(), wq.data(), wk.data(),
                          q.table, s);
    for (int c = 0; c < s.HS; ++c) dwq[c] -= 100, dwk[c] += 100;
    auto loss = [&] { return dot(q.forward(qkv, wq, wk).qkv, dout); };
    CHECK(slope_distance(qkv, dqkv, loss) < kSlope);
    CHECK(slope_distance(wq, dwq, loss) < kSlope);
    CHECK(slope_distance(wk, dwk, loss) < kSlope);
  }
}

TEST_CASE("attention: QK-Norm with first works on the later positions only") {
  for (QkNorm q : qk_norm_cases()) {
    const std::vector<double> qkv = random_values<double>(qkv_size(q.s), 27), wq = random_values<double>(q.s.HS, 28),
                              wk = wq;
    const auto all = q.forward(qkv, wq, wk);
    q.s.first = 5;
    const auto part = q.forward(qkv, wq, wk);
    const size_t position = (q.s.NH + 2 * q.s.NKV) * q.s.HS;
    std::vector<double> expected = all.qkv;
    for (int b = 0; b < q.s.B; ++b)
      std::copy_n(&qkv[size_t(b) * q.s.T * position], 5 * position, &expected[size_t(b) * q.s.T * position]);
    CHECK(same_bits(part.qkv, expected));
  }
}

TEST_CASE("attention: the number of threads changes nothing in QK-Norm") {
  for (const QkNorm& q : qk_norm_cases()) {
    const RopeShape s = q.s;
    const std::vector<float> qkv = random_values<float>(qkv_size(s), 29), wq = random_values<float>(s.HS, 30), wk = wq;
    CHECK(same_for_any_threads([&] {
      Cpu be;
      const auto f = q.forward(qkv, wq, wk);
      std::vector<float> d = f.qkv, dw(2 * s.HS);
      qk_norm_rope_backward(be, d.data(), dw.data(), dw.data() + s.HS, f.raw.data(), f.rstd.data(), wq.data(),
                            wk.data(), q.table, s);
      d.insert(d.end(), dw.begin(), dw.end());
      d.insert(d.end(), f.qkv.begin(), f.qkv.end());
      return d;
    }));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA against the CPU

#ifdef __CUDACC__

TEST_CASE_TEMPLATE("cuda: qk-norm and rope", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for_head_shapes({10, 64}, [](RopeShape s, int R, RopePairs pairs) {
    const DeviceTable table(s.T, R, pairs);
    const int heads = s.NH + s.NKV;
    const size_t N = size_t(s.B) * s.T;
    const Values qkv = numbers<Real>(N * (heads + s.NKV) * s.HS, 2), qw = numbers<Real>(s.HS, 3, 0.3f, 1),
                 kw = numbers<Real>(s.HS, 4, 0.3f, 1), dqkv = numbers<Real>(qkv.size(), 5);
    Values want = qkv, raw(N * heads * s.HS), rstd(N * heads);
    qk_norm_rope_forward(cpu, want.data(), raw.data(), rstd.data(), qw.data(), kw.data(), table.on_cpu, s, 1e-5);
    Tensor<Real> got(qkv), got_raw(raw.size()), q_weight(qw), k_weight(kw);
    Tensor<float> got_rstd(rstd.size());
    qk_norm_rope_forward(*gpu(), got(), got_raw(), got_rstd(), q_weight(), k_weight(), table.on_gpu, s, 1e-5);
    // The sum of HS squares has only positive terms: a relative error of HS half units at most, half of it after the
    // root. Then four roundings, of numbers that the rotation may cancel: hence the absolute part.
    close("qk_norm_rope_forward", got.host(), want, kRound<Real>, (s.HS + 8) * 0x1p-24 * 20);
    if (s.first > 0) return;
    close("qk_raw", got_raw.host(), raw, 0, 0);
    close("qk_rstd", got_rstd.host(), rstd, (s.HS + 4) * 0x1p-24, 0);

    Values d = dqkv, dqw(s.HS, 0.5f), dkw(s.HS, 0.5f);
    Tensor<Real> got_d(dqkv);
    Tensor<float> got_dqw(dqw), got_dkw(dkw);
    qk_norm_rope_backward(cpu, d.data(), dqw.data(), dkw.data(), raw.data(), rstd.data(), qw.data(), kw.data(),
                          table.on_cpu, s);
    qk_norm_rope_backward(*gpu(), got_d(), got_dqw(), got_dkw(), got_raw(), got_rstd(), q_weight(), k_weight(),
                          table.on_gpu, s);
    // Terms of up to rstd * 10 * 3; rstd is large only for tiny heads, of which these have none (HS >= 10).
    close("qk_norm_rope_backward", got_d.host(), d, kRound<Real>, (s.HS + 16) * 0x1p-24 * 60);
    // N * heads products of size about 1: each sum within (number of terms) half units of the sum of sizes.
    const double terms = double(N) * s.NH;
    close("dq_weight", got_dqw.host(), dqw, 0, terms * 0x1p-24, {float(terms * 4)});
    close("dk_weight", got_dkw.host(), dkw, 0, terms * 0x1p-24, {float(terms * 4)});
  });
}

namespace {

template <class Real>
void test_attention(AttentionShape s, bool flash, double softcap) {
  CAPTURE(s.T);
  CAPTURE(s.NH);
  CAPTURE(s.NKV);
  CAPTURE(s.HS);
  CAPTURE(s.first);
  CAPTURE(flash);
  CAPTURE(softcap);
  const size_t N = size_t(s.B) * s.T, stride = size_t(s.NH + 2 * s.NKV) * s.HS;
  const Values qkv = numbers<Real>(N * stride, 6);
  const std::vector<double> exact(qkv.begin(), qkv.end());
  std::vector<double> exact_out(N * s.NH * s.HS), exact_lse(N * s.NH);
  attention_forward_by_definition(exact_out.data(), exact_lse.data(), exact.data(), s, softcap);
  const Values out(exact_out.begin(), exact_out.end()), lse(exact_lse.begin(), exact_lse.end());
  Values sums = out, lse_again = lse, with_absolute_values = qkv;
  for (size_t i = 0; i < qkv.size(); ++i)
    if (i % stride >= size_t(s.NH + s.NKV) * s.HS) with_absolute_values[i] = std::fabs(qkv[i]);
  attention_forward(cpu, sums.data(), lse_again.data(), with_absolute_values.data(), s, softcap);  // sum of p |v|

  Tensor<Real> device_qkv(qkv), got(out.size());
  Tensor<float> got_lse(lse.size());
  if (flash)
    attention_forward(*gpu(), got(), got_lse(), device_qkv(), s, softcap);
  else
    simple_attention_forward(*gpu(), got(), got_lse(), device_qkv(), s, softcap);
  Values result = got.host(), result_lse = got_lse.host();
  for (size_t n = 0; n < N; ++n)
    if (int(n % s.T) < s.first)  // rows that were not asked for
      for (int h = 0; h < s.NH; ++h) {
        for (int c = 0; c < s.HS; ++c) result[(n * s.NH + h) * s.HS + c] = out[(n * s.NH + h) * s.HS + c];
        const size_t row = (n / s.T * s.NH + h) * s.T + n % s.T;
        result_lse[row] = lse[row];
      }
  // A score is a sum of HS products: off by at most HS half units of sum |q k| / sqrt(HS) <= 2 sqrt(HS) or so here, and
  // exp turns that into a relative error of p, as it does with the cap's 2^-22 of itself. The flash kernels then round
  // p to bf16. Both weigh on sum p |v|.
  const double score_error = 4 * s.HS * 0x1p-24 * 2 * std::sqrt(s.HS) + 1e-5 + softcap * 0x1p-22,
               p_error = score_error + (flash ? 0x1p-8 : 0);
  close("attention_forward", result, out, kRound<Real>, p_error, sums);
  close("lse", result_lse, lse, 0, score_error);
  if (s.first > 0) return;

  const Values dout = numbers<Real>(out.size(), 7);
  const std::vector<double> exact_dout(dout.begin(), dout.end());
  std::vector<double> dqkv(qkv.size());
  attention_backward_by_definition(dqkv.data(), exact_dout.data(), exact.data(), s, softcap);
  Tensor<Real> device_dout(dout), got_dqkv(qkv.size());
  Tensor<float> got_D(garbage<float>(attention_workspace<Real>(s)));
  if (flash)
    attention_backward(*gpu(), got_dqkv(), got_D(), device_dout(), device_qkv(), got(), got_lse(), s, softcap);
  else
    simple_attention_backward(*gpu(), got_dqkv(), got_D(), device_dout(), device_qkv(), got(), got_lse(), s, softcap);
  // Every element is a sum of terms each with its own relative error: at most p_error, a rounding, and that of D, which
  // comes from the rounded out; taken over the tensor such errors are relative to its norm. At T = 1 dS is 0 but for
  // rounding (p = 1, dP = D), so dq and dk are measured against dv as well: the norm is that of all of dqkv.
  CHECK(relative_distance(got_dqkv.host(), Values(dqkv.begin(), dqkv.end())) <= p_error + 3 * kRound<Real>);
}

}  // namespace

TEST_CASE_TEMPLATE("cuda: attention, simple kernels", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for (int T : lengths())
    for (int NKV : {1, 4})
      for (int HS : {10, 64, 96, 256})
        for (int first : {0, T - 1, T / 3})
          for (double softcap : kSoftcaps) test_attention<Real>({2, T, 4, NKV, HS, first}, false, softcap);
}

TEST_CASE("cuda: attention, many small weights beside a large one are not lost") {
  NEEDS_GPU;
  const AttentionShape s = {1, 32768, 1, 1, 4, 32768 - 8};
  const Values qkv = attention_sink<float>(s.T);
  const std::vector<double> exact(qkv.begin(), qkv.end());
  std::vector<double> out(s.T * 4), lse(s.T);
  attention_forward_by_definition(out.data(), lse.data(), exact.data(), s);
  Tensor<float> device_qkv(qkv), got(out.size()), got_lse(lse.size());
  simple_attention_forward(*gpu(), got(), got_lse(), device_qkv(), s);
  const Values result = got.host(), result_lse = got_lse.host();
  // As attention_forward_kernel says. lse, about 16.5, is the sum of two rounded numbers; __expf(x) is off by
  // 2 + 1.173 |x| units in the last place.
  const double error = (32 + s.T / 32 + 16) * 0x1p-24 + (2 + 1.173 * 16.5) * 0x1p-23;
  for (int t = s.first; t < s.T; ++t) {
    CHECK(std::fabs(result_lse[t] - lse[t]) <= (16 + 2 * 16.5) * 0x1p-24);
    for (int c = 0; c < 4; ++c) CHECK(std::fabs(result[t * 4 + c] - out[t * 4 + c]) <= error * out[t * 4 + c]);
  }
}

TEST_CASE("cuda: attention, flash kernels") {
  NEEDS_GPU;
  if (gpu()->capability < 80) return;
  for (int T : lengths())
    for (int NKV : {1, 4})
      for (int HS : {32, 64, 128, 256})
        for (double softcap : kSoftcaps) test_attention<bf16>({2, T, 4, NKV, HS}, true, softcap);
}

// Flash attention undoes RoPE where it stores; others call the two one after the other.
TEST_CASE_TEMPLATE("cuda: attention's backward pass and RoPE's at once, to the bit as apart", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for (int T : small() ? std::vector<int>{70} : std::vector<int>{1, 65, 330})
    for (int NKV : small() ? std::vector<int>{1} : std::vector<int>{1, 4})
      for (int HS : {32, 64, 96, 128, 256})
        for (int R : {0, 2, 6, 8, 16, 26, HS / 2, HS})
          for (RopePairs pairs : {RopePairs::half, RopePairs::interleaved}) {
            if (R != kRotaryDim.value_or(R)) continue;
            CAPTURE(T);
            CAPTURE(NKV);
            CAPTURE(HS);
            CAPTURE(R);
            const AttentionShape s = {2, T, 4, NKV, HS};
            const DeviceTable table(T, R, pairs);
            const size_t N = size_t(s.B) * T;
            Tensor<Real> qkv(numbers<Real>(N * (s.NH + 2 * NKV) * HS, 8)), dout(numbers<Real>(N * s.NH * HS, 9)),
                out(dout.n), got(qkv.n), want(qkv.n);
            Tensor<float> lse(N * s.NH), D(attention_workspace<Real>(s));
            attention_forward(*gpu(), out(), lse(), qkv(), s);
            attention_backward(*gpu(), want(), D(), dout(), qkv(), out(), lse(), s);
            rope_backward(*gpu(), want(), table.on_gpu, s);
            attention_rope_backward(*gpu(), got(), D(), dout(), qkv(), out(), lse(), table.on_gpu, s);
            CHECK(same_bits(got.bits(), want.bits()));
            if constexpr (std::is_same_v<Real, bf16>)
              if (gpu()->capability >= 80 && flash_attention_supports(HS)) {  // whichever way that was, by the clock
                Tensor<bf16> turned(qkv.n);
                flash_attention_backward(*gpu(), turned(), D(), dout(), qkv(), out(), lse(), s.B, T, s.NH, NKV, HS, 0,
                                         table.on_gpu.cos_sin, R, pairs == RopePairs::interleaved);
                CHECK(same_bits(turned.bits(), want.bits()));
              }
          }
}

// More tiles than a GPU has multiprocessors, and neither a multiple of the other: blocks that stay take several, and the
// last tiles of keys and of queries are short.
TEST_CASE("cuda: attention, flash kernels whose blocks take several tiles") {
  NEEDS_GPU;
  if (gpu()->capability < 80) return;
  for (int HS : {128, 256})
    for (int NKV : {1, 2})
      for (double softcap : kSoftcaps) test_attention<bf16>({small() ? 1 : 53, small() ? 70 : 210, 4, NKV, HS}, true, softcap);
}

#endif  // __CUDACC__
