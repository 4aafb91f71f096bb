// layers.cuh and exp_: every layer against its formula and against finite differences.

#include "layers.cuh"

#include <array>
#include <functional>

#include "loss.cuh"
#include "norms.cuh"
#include "tests/cuda.h"

namespace {

float exp_float(float x) { return exp_(x); }

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("layers: exp_ is within 2 ulp of exp from -87 to 88, alone and in a vectorised loop") {
  std::vector<float> x, y;
  for (double v = -87; v <= 88; v += 1.0 / 8192) x.push_back(float(v));
  for (int e = -40; e < 0; ++e)  // near 0, where most softmax arguments are
    for (float sign : {-1.0f, 1.0f}) x.push_back(sign * std::ldexp(1.3f, e));
  y.resize(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = exp_(x[i]);
  double worst = 0, disagreement = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(double(x[i]));
    const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
    worst = std::max(worst, std::fabs(y[i] - exact) / ulp);
    disagreement = std::max(disagreement, std::fabs(double(exp_float(x[i])) - y[i]) / ulp);
  }
  MESSAGE("largest error of exp_: ", worst, " ulp");
  CHECK(worst <= 2);
  CHECK(disagreement <= 1);
  CHECK(exp_(0.0f) == 1.0f);
}

TEST_CASE("layers: exp_ saturates outside its range and keeps NaN") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(exp_(-inf) == about(1.6458115e-38, 1e-6));  // e^-87: nothing next to a 1, but not 0
  CHECK(exp_(-1000.0f) == exp_(-87.0f));
  CHECK(exp_(1000.0f) == exp_(88.0f));
  CHECK(exp_(inf) == exp_(88.0f));
  CHECK(std::isnan(exp_(nan)));
  std::vector<float> x(67, 1.0f), y(67);  // vector instructions order minimum and maximum differently for NaN
  for (size_t i = 0; i < x.size(); i += 3) x[i] = nan;
  for (size_t i = 0; i < x.size(); ++i) y[i] = exp_(x[i]);
  for (size_t i = 0; i < x.size(); ++i) CHECK(std::isnan(y[i]) == (i % 3 == 0));
  CHECK(exp_(double(-800)) == 0.0);  // in double it is the library's
}

// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("layers: embedding picks rows, and its backward adds to them", Real, float, double) {
  Cpu be;
  for (int C : {1, 5, 64, 129}) {
    const int N = 37, V = 7;
    const std::vector<int> tokens = random_tokens(N, V - 1, 40);  // the last row is never picked
    const std::vector<Real> weight = random_values<Real>(V * C, 41), dx = random_values<Real>(N * C, 42);
    std::vector<Real> x = garbage<Real>(N * C), dweight(V * C, Real(kStart));
    embedding_forward(be, x.data(), tokens.data(), weight.data(), N, C);
    embedding_backward(be, dweight.data(), dx.data(), tokens.data(), N, V, C);
    std::vector<Real> expected_x(N * C), expected(V * C, Real(kStart));
    for (int n = 0; n < N; ++n)
      for (int c = 0; c < C; ++c) {
        expected_x[n * C + c] = weight[tokens[n] * C + c];
        expected[tokens[n] * C + c] += dx[n * C + c];  // in the order of the tokens
      }
    CHECK(same_bits(x, expected_x));
    CHECK(same_bits(dweight, expected));
  }
}

// ---------------------------------------------------------------------------------------------------------------------

namespace {

struct LinearCase {
  int N, IC, OC;
};
// Smaller and larger than a tile (512), and single rows and columns.
const std::vector<LinearCase> kLinear = {{1, 1, 1}, {7, 5, 3}, {1, 64, 33}, {33, 17, 513}, {515, 9, 21}, {520, 530, 5}};

template <class Real>
std::vector<double> multiply_slowly(const std::vector<Real>& x, const std::vector<Real>& w, LinearCase c) {
  std::vector<double> y(size_t(c.N) * c.OC);
  for (int n = 0; n < c.N; ++n)
    for (int o = 0; o < c.OC; ++o)
      for (int i = 0; i < c.IC; ++i)
        y[size_t(n) * c.OC + o] += double(x[size_t(n) * c.IC + i]) * double(w[size_t(o) * c.IC + i]);
  return y;
}

}  // namespace

TEST_CASE_TEMPLATE("layers: linear, with bias and residual, equals its formula", Real, float, double) {
  Cpu be;
  for (const LinearCase& c : kLinear)
    for (bool with_bias : {false, true}) {
      const std::vector<Real> x = random_values<Real>(c.N * c.IC, 51), w = random_values<Real>(c.OC * c.IC, 52),
                              bias = random_values<Real>(c.OC, 53), residual = random_values<Real>(c.N * c.OC, 54);
      std::vector<double> expected = multiply_slowly(x, w, c);
      if (with_bias)
        for (int n = 0; n < c.N; ++n)
          for (int o = 0; o < c.OC; ++o) expected[size_t(n) * c.OC + o] += bias[o];
      const Real* b = with_bias ? bias.data() : nullptr;
      std::vector<Real> out = garbage<Real>(c.N * c.OC);
      linear_forward(be, out.data(), x.data(), w.data(), b, c.N, c.IC, c.OC);
      // A dot product of IC terms of size about 1: partial sums of size sqrt(IC), IC roundings that partly cancel; the
      // worst of many elements lies several deviations out.
      const double tolerance = (8 * c.IC + 16) * kRounding<Real>;
      CHECK(distance(out, expected) <= tolerance);
      out = garbage<Real>(c.N * c.OC);
      linear_residual_forward(be, out.data(), residual.data(), x.data(), w.data(), b, c.N, c.IC, c.OC);
      for (size_t i = 0; i < expected.size(); ++i) expected[i] += residual[i];
      CHECK(distance(out, expected) <= tolerance);
      // The same branch twice.
      std::vector<Real> between = garbage<Real>(out.size());
      out = garbage<Real>(out.size());
      linear_pair_residual_forward(be, out.data(), between.data(), residual.data(), x.data(), w.data(), b, x.data(),
                                   w.data(), b, c.N, c.IC, c.IC, c.OC);
      for (size_t i = 0; i < expected.size(); ++i) expected[i] = 2 * expected[i] - residual[i];
      CHECK(distance(out, expected) <= 2 * tolerance);
    }
}

TEST_CASE_TEMPLATE("layers: linear's backward equals its formula at sizes beyond a tile", Real, float, double) {
  Cpu be;
  for (const LinearCase& c : kLinear) {
    const std::vector<Real> x = random_values<Real>(c.N * c.IC, 55), w = random_values<Real>(c.OC * c.IC, 56),
                            dout = random_values<Real>(c.N * c.OC, 57);
    std::vector<Real> dx = garbage<Real>(c.N * c.IC), dw(c.OC * c.IC, Real(kStart)), dbias(c.OC, Real(kStart));
    linear_backward(be, dx.data(), dw.data(), dbias.data(), dout.data(), x.data(), w.data(), c.N, c.IC, c.OC);
    std::vector<double> expected_x(dx.size()), expected_w(dw.size(), kStart), expected_bias(c.OC, kStart);
    for (int n = 0; n < c.N; ++n)
      for (int o = 0; o < c.OC; ++o) {
        const double d = dout[size_t(n) * c.OC + o];
        expected_bias[o] += d;
        for (int i = 0; i < c.IC; ++i) {
          expected_x[size_t(n) * c.IC + i] += d * w[size_t(o) * c.IC + i];
          expected_w[size_t(o) * c.IC + i] += d * x[size_t(n) * c.IC + i];
        }
      }
    CHECK(distance(dx, expected_x) <= (8 * c.OC + 16) * kRounding<Real>);
    CHECK(distance(dw, expected_w) <= (8 * c.N + 16 * kStart) * kRounding<Real>);
    CHECK(distance(dbias, expected_bias) <= (8 * c.N + 16 * kStart) * kRounding<Real>);
  }
}

TEST_CASE("layers: linear's backward is the derivative of its forward, of every input") {
  Cpu be;
  const int N = 7, IC = 5, OC = 3;
  std::vector<double> x = random_values<double>(N * IC, 58), w = random_values<double>(OC * IC, 59),
                      bias = random_values<double>(OC, 60), residual = random_values<double>(N * OC, 61), out(N * OC);
  const std::vector<double> dout = random_values<double>(N * OC, 62);
  std::vector<double> dx = garbage<double>(N * IC), dw = started(OC * IC), dbias = started(OC);
  linear_backward(be, dx.data(), dw.data(), dbias.data(), dout.data(), x.data(), w.data(), N, IC, OC);
  auto plain = [&] {
    linear_forward(be, out.data(), x.data(), w.data(), bias.data(), N, IC, OC);
    return dot(out, dout);
  };
  auto with_residual = [&] {
    linear_residual_forward(be, out.data(), residual.data(), x.data(), w.data(), bias.data(), N, IC, OC);
    return dot(out, dout);
  };
  for (const std::function<double()>& loss : {std::function<double()>(plain), std::function<double()>(with_residual)}) {
    CHECK(slope_distance(x, dx, loss) < kSlope);
    CHECK(slope_distance(w, without_start(dw), loss) < kSlope);
    CHECK(slope_distance(bias, without_start(dbias), loss) < kSlope);
  }
  CHECK(slope_distance(residual, dout, with_residual) < kSlope);  // the residual's gradient is that of the output
  // Without a bias the other two gradients are the same.
  std::vector<double> dx2 = garbage<double>(N * IC), dw2 = started(OC * IC);
  linear_backward(be, dx2.data(), dw2.data(), (double*)nullptr, dout.data(), x.data(), w.data(), N, IC, OC);
  CHECK(same_bits(dx, dx2));
  CHECK(same_bits(dw, dw2));
}

// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("layers: SwiGLU and GELU equal their formulas, and stay finite for any input", Real, float, double) {
  Cpu be;
  const int N = 5, F = 37;
  std::vector<Real> gate_up = random_values<Real>(N * 2 * F, 63, 3);
  const Real extremes[] = {-1e30f, -1000, -100, -90, -20, 0, 20, 90, 1000, 1e30f};
  std::copy(std::begin(extremes), std::end(extremes), gate_up.begin());
  std::vector<Real> out = garbage<Real>(N * F);
  swiglu_forward(be, out.data(), gate_up.data(), N, F);
  double worst = 0;
  for (int n = 0; n < N; ++n)
    for (int f = 0; f < F; ++f) {
      const double gate = gate_up[n * 2 * F + f], up = gate_up[n * 2 * F + F + f];
      const double expected = gate / (1 + std::exp(-gate)) * up;
      // In fp32 exp_ stops at e^88, so that silu(z) does not fall below z e^-88: nothing, but not 0.
      const double floor = sizeof(Real) == 4 ? std::fabs(gate * up) * std::exp(-88.0) * 1.01 : 1e-300;
      worst = std::max(worst, (std::fabs(out[n * F + f] - expected) - floor) / std::max(1e-30, std::fabs(expected)));
    }
  CHECK(worst <= 8 * kRounding<Real>);  // exp_ 2 ulp = 4 roundings, and four operations

  std::vector<Real> g = garbage<Real>(2 * N * F);
  gelu_forward(be, GeluKind::exact, g.data(), gate_up.data(), N, 2 * F);
  worst = 0;
  for (size_t i = 0; i < g.size(); ++i) {
    const double z = gate_up[i], expected = 0.5 * z * std::erfc(-z / std::sqrt(2));
    // 1 + erf(x) loses digits where it is small: its error is that of a number near 1, times |z| / 2.
    worst = std::max(worst, std::fabs(g[i] - expected) / std::max(1.0, std::fabs(z)));
  }
  CHECK(worst <= 4 * kRounding<Real>);

  g = garbage<Real>(2 * N * F);
  gelu_forward(be, GeluKind::tanh, g.data(), gate_up.data(), N, 2 * F);
  worst = 0;
  for (size_t i = 0; i < g.size(); ++i) {
    const double z = gate_up[i], u = std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z);
    const double expected = z / (1 + std::exp(-2 * u));
    // In fp32 exp_ stops at e^88. Else its argument has about five roundings, of a number of up to 2|u|.
    const double floor = sizeof(Real) == 4 ? std::fabs(z) * std::exp(-88.0) * 1.01 : 1e-300;
    const double size = std::max(1e-30, std::fabs(expected)) * (8 + 5 * std::min(2 * std::fabs(u), 90.0));
    worst = std::max(worst, (std::fabs(g[i] - expected) - floor) / size);
  }
  CHECK(worst <= kRounding<Real>);

  const std::vector<Real> dout = random_values<Real>(N * 2 * F, 64);
  std::vector<Real> d = garbage<Real>(N * 2 * F);
  swiglu_backward(be, d.data(), dout.data(), gate_up.data(), N, F);
  CHECK(std::isfinite(largest(d)));
  CHECK(distance(d, d) == 0);  // no NaN
  for (int f = 0; f < 10; ++f) gate_up[f] = std::min(std::max(gate_up[f], Real(-1e10)), Real(1e10));  // x^3 is finite
  for (GeluKind kind : {GeluKind::exact, GeluKind::tanh}) {
    d = garbage<Real>(N * 2 * F);
    gelu_backward(be, kind, d.data(), dout.data(), gate_up.data(), N, 2 * F);
    CHECK(distance(d, d) == 0);
  }
}

TEST_CASE("layers: SwiGLU's and GELU's backward are the derivatives of their forwards") {
  Cpu be;
  const int N = 3, F = 7;
  std::vector<double> x = random_values<double>(N * 2 * F, 65), out(N * F), out2(N * 2 * F);
  const std::vector<double> dout = random_values<double>(N * F, 66), dout2 = random_values<double>(N * 2 * F, 67);
  std::vector<double> dx = garbage<double>(N * 2 * F);
  swiglu_backward(be, dx.data(), dout.data(), x.data(), N, F);
  CHECK(slope_distance(x, dx, [&] {
          swiglu_forward(be, out.data(), x.data(), N, F);
          return dot(out, dout);
        }) < kSlope);
  for (GeluKind kind : {GeluKind::exact, GeluKind::tanh}) {
    dx = garbage<double>(N * 2 * F);
    gelu_backward(be, kind, dx.data(), dout2.data(), x.data(), N, 2 * F);
    CHECK(slope_distance(x, dx, [&] {
            gelu_forward(be, kind, out2.data(), x.data(), N, 2 * F);
            return dot(out2, dout2);
          }) < kSlope);
  }
}

TEST_CASE("layers: fp32 activations' gradients are those in fp64") {
  Cpu be;
  const int N = 11, F = 53;
  const std::vector<float> x = random_values<float>(N * 2 * F, 68, 2), dout = random_values<float>(N * 2 * F, 69);
  const std::vector<double> x64(x.begin(), x.end()), dout64(dout.begin(), dout.end());
  std::vector<float> d(x.size());
  std::vector<double> d64(x.size());
  swiglu_backward(be, d.data(), dout.data(), x.data(), N, F);
  swiglu_backward(be, d64.data(), dout64.data(), x64.data(), N, F);
  CHECK(relative_distance(d, d64) <= 12 * kRounding<float>);  // exp_ within 4 roundings, and about 8 operations
  for (GeluKind kind : {GeluKind::exact, GeluKind::tanh}) {
    gelu_backward(be, kind, d.data(), dout.data(), x.data(), N, 2 * F);
    gelu_backward(be, kind, d64.data(), dout64.data(), x64.data(), N, 2 * F);
    CHECK(relative_distance(d, d64) <= 12 * kRounding<float>);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Long rows of very different numbers. One by one, fp32 would lose the small ones.

TEST_CASE("layers: parameter gradients of 100,000 rows, one of them huge") {
  Cpu be;
  const int N = 100000, C = 2;
  std::vector<float> dout(size_t(N) * C, 1.0f), x(dout.size()), rstd(N, 1.0f), mean(N), weight(C, 1.0f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = i % 2 ? 1 : -1;
  dout[0] = dout[1] = 1 << 24;
  const double sum = (1 << 24) + N - 1.0, error = (kSumChunk + 4) * kRounding<float>;
  std::vector<float> dx(dout.size()), dw(C), db(C), dbias(C), dweight(C * C);
  norm_backward(be, NormKind::layer, dx.data(), dw.data(), db.data(), none<float>(), dout.data(), x.data(), mean.data(),
                rstd.data(), weight.data(), N, C);
  CHECK(dw[0] == about(-sum, error));
  CHECK(dw[1] == about(sum, error));
  CHECK(db[0] == about(sum, error));
  const std::vector<float> square(C * C, 1.0f);
  linear_backward(be, dx.data(), dweight.data(), dbias.data(), dout.data(), x.data(), square.data(), N, C, C);
  CHECK(dbias[0] == about(sum, error));
  CHECK(dbias[1] == about(sum, error));
}

// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("layers: the number of threads changes nothing") {
  Cpu be;
  const int N = 533, C = 67, OC = 519, V = 31;
  const std::vector<float> x = random_values<float>(N * C, 80), w = random_values<float>(OC * C, 81),
                           bias = random_values<float>(OC, 82), dout = random_values<float>(N * OC, 83),
                           dx = random_values<float>(N * C, 84), weight = random_values<float>(C, 85);
  const std::vector<int> tokens = random_tokens(N, V, 86);
  auto same = [](const char* name, auto work) {
    CAPTURE(name);
    CHECK(same_for_any_threads(work));
  };
  same("linear", [&] {
    std::vector<float> y(N * OC);
    linear_forward(be, y.data(), x.data(), w.data(), bias.data(), N, C, OC);
    return y;
  });
  same("linear_residual", [&] {
    std::vector<float> y(N * OC);
    linear_residual_forward(be, y.data(), dout.data(), x.data(), w.data(), bias.data(), N, C, OC);
    return y;
  });
  same("linear_backward", [&] {
    std::vector<float> d(N * C + OC * C + OC);
    linear_backward(be, d.data(), d.data() + N * C, d.data() + N * C + OC * C, dout.data(), x.data(), w.data(), N, C,
                    OC);
    return d;
  });
  for (NormKind kind : {NormKind::rms, NormKind::layer})
    same("norm", [&] {
      std::vector<float> y(2 * N * C + 2 * N + 2 * C);
      float *mean = &y[N * C], *rstd = mean + N, *dw = rstd + N, *db = dw + C, *d = db + C;
      norm_forward(be, kind, y.data(), mean, rstd, x.data(), weight.data(), weight.data(), N, C, 1e-5);
      norm_backward(be, kind, d, dw, db, none<float>(), dx.data(), x.data(), mean, rstd, weight.data(), N, C);
      return y;
    });
  same("embedding", [&] {
    std::vector<float> y(N * C + V * C);
    embedding_forward(be, y.data(), tokens.data(), w.data(), N, C);
    embedding_backward(be, &y[N * C], dx.data(), tokens.data(), N, V, C);
    return y;
  });
  same("activations", [&] {
    const int F = OC - 1;  // dout serves as (N, 2 * (F / 2)) and as (N, F)
    std::vector<float> y(3 * N * OC);
    swiglu_forward(be, y.data(), dout.data(), N, F / 2);
    swiglu_backward(be, y.data() + N * OC, dout.data(), dout.data(), N, F / 2);
    gelu_forward(be, GeluKind::exact, y.data() + 2 * N * OC, dout.data(), N, F);
    return y;
  });
  same("gelu_backward", [&] {
    std::vector<float> y(N * OC);
    gelu_backward(be, GeluKind::exact, y.data(), dout.data(), dout.data(), N, OC);
    return y;
  });
  same("cross_entropy", [&] {
    std::vector<float> y(dout);
    y.resize(N * OC + 2 * N);
    cross_entropy(be, &y[N * OC], &y[N * OC + N], y.data(), tokens.data(), 0.1, 0.01, N, OC);
    return y;
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA against the CPU

#ifdef __CUDACC__

TEST_CASE_TEMPLATE("cuda: embedding", Real, BOTH_TYPES) {
  NEEDS_GPU;
  using Sizes = std::array<int, 3>;
  for (Sizes sizes :
       {Sizes{1, 1, 1}, {17, 5, 8}, {1000, 3, 24}, {9000, 512, 40}, {2000, 257, 65}, {2000, 300, 520},
        {2000, 513, 520}, {1000, 70000, 24}}) {  // small vocabularies are looked through, others sorted
    const int N = sizes[0], V = sizes[1], C = sizes[2];
    CAPTURE(N);
    CAPTURE(V);
    CAPTURE(C);
    std::mt19937 random(8);
    std::vector<int> tokens(N);
    for (int& token : tokens) token = random() % 3 ? random() % V : V / 2;  // one token in three is the same
    const Values weight = numbers<Real>(size_t(V) * C, 9), dx = numbers<Real>(size_t(N) * C, 10),
                 old(size_t(V) * C, 0.25f);
    Values x(size_t(N) * C), dweight = old, sums(old.size());
    embedding_forward(cpu, x.data(), tokens.data(), weight.data(), N, C);
    embedding_backward(cpu, dweight.data(), dx.data(), tokens.data(), N, V, C);
    embedding_backward(cpu, sums.data(), absolute(dx).data(), tokens.data(), N, V, C);
    Tensor<int> device_tokens(tokens);
    Tensor<Real> device_weight(weight), device_dx(dx), got_x(x.size());
    Tensor<float> got(old);
    embedding_forward(*gpu(), got_x(), device_tokens(), device_weight(), N, C);
    embedding_backward(*gpu(), got(), device_dx(), device_tokens(), N, V, C);
    close("embedding_forward", got_x.host(), x, 0, 0);
    close("embedding_backward", got.host(), dweight, 0x1p-23, N * 0x1p-24, sums);  // up to N terms
    Tensor<float> again(old);
    embedding_backward(*gpu(), again(), device_dx(), device_tokens(), N, V, C);
    CHECK(same_bits(again.bits(), got.bits()));
  }
}

TEST_CASE_TEMPLATE("cuda: linear", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for (int N : lengths())
    for (std::pair<int, int> widths : {std::pair(8, 16), {64, 192}, {65, 33}, {384, 257}, {1, 1}, {1024, 768}})
      for (bool with_bias : {false, true}) {
        const int IC = widths.first, OC = widths.second;
        if (N < 1000 && IC == 1024) continue;  // this one is for the products that choose among algorithms by the clock
        CAPTURE(N);
        CAPTURE(IC);
        CAPTURE(OC);
        CAPTURE(with_bias);
        const Values inp = numbers<Real>(size_t(N) * IC, 16), weight = numbers<Real>(size_t(OC) * IC, 17),
                     bias = numbers<Real>(OC, 18), residual = numbers<Real>(size_t(N) * OC, 19),
                     dout = numbers<Real>(residual.size(), 20), old(weight.size(), 0.5f);
        const Values inp_a = absolute(inp), weight_a = absolute(weight), bias_a = absolute(bias),
                     residual_a = absolute(residual), dout_a = absolute(dout);
        Tensor<Real> device_inp(inp), device_weight(weight), device_bias(bias), device_residual(residual),
            device_dout(dout);
        Tensor<Real> got(residual.size()), got_joined(residual.size()), got_dinp(inp.size());
        Tensor<float> got_dweight(old), got_dbias(Values(OC, 0.5f));
        const float* b = with_bias ? bias.data() : nullptr;
        Real* device_b = with_bias ? device_bias() : nullptr;
        // A sum of K products in fp32, in any order, is off by at most K half units of the sum of their absolute
        // values, which the same operation on absolute values gives. Twice that: the CPU's sum is in fp32 too.
        Values want(residual.size()), sums = want;
        linear_forward(cpu, want.data(), inp.data(), weight.data(), b, N, IC, OC);
        linear_forward(cpu, sums.data(), inp_a.data(), weight_a.data(), with_bias ? bias_a.data() : nullptr, N, IC, OC);
        linear_forward(*gpu(), got(), device_inp(), device_weight(), device_b, N, IC, OC);
        // At widths that are no multiple of 8, cuBLASLt rounds the product once more, before it adds the bias;
        // |product| is at most |out| + |bias| + |residual|, the latter two under 5 each.
        const bool twice = with_bias && (IC % 8 || OC % 8);
        const double rounding = (twice ? 2 : 1) * kRound<Real>;
        for (float& sum : sums) sum = 2 * (IC + 2) * 0x1p-24f * sum + (twice ? 10 * float(kRound<Real>) : 0);
        close("linear_forward", got.host(), want, rounding, 1, sums);
        if (IC == 1024) {
          Cuda another;  // chooses anew
          Tensor<Real> again(want.size());
          linear_forward(another, again(), device_inp(), device_weight(), device_b, N, IC, OC);
          another.synchronize();
          CHECK(same_bits(again.bits(), got.bits()));
        }
        linear_residual_forward(cpu, want.data(), residual.data(), inp.data(), weight.data(), b, N, IC, OC);
        linear_residual_forward(cpu, sums.data(), residual_a.data(), inp_a.data(), weight_a.data(),
                                with_bias ? bias_a.data() : nullptr, N, IC, OC);
        linear_residual_forward(*gpu(), got_joined(), device_residual(), device_inp(), device_weight(), device_b, N, IC,
                                OC);
        for (float& sum : sums) sum = 2 * (IC + 2) * 0x1p-24f * sum + (twice ? 10 * float(kRound<Real>) : 0);
        close("linear_residual_forward", got_joined.host(), want, rounding, 1, sums);

        // A second branch, with dout for its input. As two products the sum without it is rounded, too.
        const Values weight2 = numbers<Real>(size_t(OC) * OC, 21), weight2_a = absolute(weight2);
        Tensor<Real> device_weight2(weight2), got_between(residual.size());
        Values between = want;
        linear_pair_residual_forward(cpu, want.data(), between.data(), residual.data(), inp.data(), weight.data(), b,
                                     dout.data(), weight2.data(), b, N, IC, OC, OC);
        linear_pair_residual_forward(cpu, sums.data(), Values(sums).data(), residual_a.data(), inp_a.data(),
                                     weight_a.data(), with_bias ? bias_a.data() : nullptr, dout_a.data(), weight2_a.data(),
                                     with_bias ? bias_a.data() : nullptr, N, IC, OC, OC);
        linear_pair_residual_forward(*gpu(), got_joined(), got_between(), device_residual(), device_inp(), device_weight(),
                                     device_b, device_dout(), device_weight2(), device_b, N, IC, OC, OC);
        for (size_t i = 0; i < sums.size(); ++i)
          sums[i] = 2 * (IC + OC + 4) * 0x1p-24f * sums[i] +
                    float(kRound<Real>) * (std::fabs(between[i]) + (twice ? 20 : 0));
        close("linear_pair_residual_forward", got_joined.host(), want, rounding, 1, sums);

        Values dinp(inp.size()), dweight = old, dbias(OC, 0.5f), sum_inp = dinp, sum_weight = old, sum_bias = dbias;
        linear_backward(cpu, dinp.data(), dweight.data(), with_bias ? dbias.data() : nullptr, dout.data(), inp.data(),
                        weight.data(), N, IC, OC);
        linear_backward(cpu, sum_inp.data(), sum_weight.data(), with_bias ? sum_bias.data() : nullptr, dout_a.data(),
                        inp_a.data(), weight_a.data(), N, IC, OC);
        linear_backward(*gpu(), got_dinp(), got_dweight(), with_bias ? got_dbias() : nullptr, device_dout(),
                        device_inp(), device_weight(), N, IC, OC);
        close("dinp", got_dinp.host(), dinp, kRound<Real>, 2 * (OC + 1) * 0x1p-24, sum_inp);
        close("dweight", got_dweight.host(), dweight, 0, 2 * (N + 1) * 0x1p-24, sum_weight);
        if (with_bias) close("dbias", got_dbias.host(), dbias, 0, 2 * (N + 1) * 0x1p-24, sum_bias);
        Tensor<float> assigned(weight.size());  // of NaN, which must not matter
        for (float& w : dweight) w = 0;
        linear_backward(cpu, dinp.data(), dweight.data(), (float*)nullptr, dout.data(), inp.data(), weight.data(), N, IC,
                        OC, true);
        linear_backward(*gpu(), got_dinp(), assigned(), (float*)nullptr, device_dout(), device_inp(), device_weight(), N,
                        IC, OC, true);
        close("dweight, assigned", assigned.host(), dweight, 0, 2 * (N + 1) * 0x1p-24, sum_weight);
      }
}

TEST_CASE_TEMPLATE("cuda: swiglu and gelu", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for (int N : lengths())
    for (int F : {1, 24, 65, 704}) {
      CAPTURE(N);
      CAPTURE(F);
      const size_t n = size_t(N) * F;
      const Values x = numbers<Real>(2 * n, 21, 3), dout = numbers<Real>(n, 22);
      const Values half(x.begin(), x.begin() + n);
      Values out(n), dx(2 * n);
      swiglu_forward(cpu, out.data(), x.data(), N, F);
      swiglu_backward(cpu, dx.data(), dout.data(), x.data(), N, F);
      Tensor<Real> device_x(x), device_half(half), device_dout(dout), got(n), got_dx(2 * n);
      swiglu_forward(*gpu(), got(), device_x(), N, F);
      swiglu_backward(*gpu(), got_dx(), device_dout(), device_x(), N, F);
      // e^x by the GPU's fast instruction: 2 units plus |x| half units, |x| < 20 here; products of up to 15 * 15 * 5.
      // erf cancels near -1 on the CPU: an absolute error of a few half units of |x|.
      close("swiglu_forward", got.host(), out, kRound<Real> + 64 * 0x1p-24, 0x1p-24);
      close("swiglu_backward", got_dx.host(), dx, kRound<Real> + 64 * 0x1p-24, 64 * 0x1p-24);
      for (GeluKind kind : {GeluKind::exact, GeluKind::tanh}) {
        Values gelu(n), dgelu(n);
        gelu_forward(cpu, kind, gelu.data(), half.data(), N, F);
        gelu_backward(cpu, kind, dgelu.data(), dout.data(), half.data(), N, F);
        Tensor<Real> got_gelu(n), got_dgelu(n);
        gelu_forward(*gpu(), kind, got_gelu(), device_half(), N, F);
        gelu_backward(*gpu(), kind, got_dgelu(), device_dout(), device_half(), N, F);
        close("gelu_forward", got_gelu.host(), gelu, kRound<Real> + 16 * 0x1p-24, 64 * 0x1p-24);
        close("gelu_backward", got_dgelu.host(), dgelu, kRound<Real> + 64 * 0x1p-24, 256 * 0x1p-24);
      }
    }
}

#endif  // __CUDACC__
