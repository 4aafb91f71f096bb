// optimizer.cuh: schedules, the gradient's norm, AdamW. (That AdamW equals PyTorch's is in model.cpp: training runs.)

#include "optimizer.cuh"

#include "tests/cuda.h"

namespace {

struct State {
  std::vector<float> parameters, master, gradients, m, v;
  float norm = 0;
};

State start(size_t n) {
  State s;
  s.master = random_values<float>(n, 90);
  s.parameters = s.master;
  s.gradients = random_values<float>(n, 91, 0.1);
  s.m = random_values<float>(n, 92, 0.1);
  s.v = random_values<float>(n, 93, 0.1);
  for (float& v : s.v) v = v * v;
  return s;
}

// The norm of the gradient, from its partial sums.
template <class Real>
void norm_of(Cpu& be, Real* norm, const Real* gradients, size_t n) {
  std::vector<double> partial(partial_sums(be, n));
  sum_squares(be, partial.data(), gradients, n);
  gradient_norm(be, norm, partial.data(), partial.size());
}

void step(State& s, const AdamW& a) {
  Cpu be;
  const size_t n = s.master.size();
  norm_of(be, &s.norm, s.gradients.data(), n);
  adamw(be, s.parameters.data(), s.master.data(), s.gradients.data(), s.m.data(), s.v.data(), &s.norm, n, a);
}

const AdamW kAdamW{1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, 7};

}  // namespace

TEST_CASE("optimizer: learning rates") {
  const double lr = 4e-4, min_lr = 4e-5;
  const int steps = 101, warmup = 11;
  auto rate = [&](Schedule s, int step) { return learning_rate(s, step, steps, warmup, lr, min_lr); };
  for (Schedule s : {Schedule::cosine, Schedule::linear, Schedule::constant}) {
    for (int step = 0; step < warmup; ++step) CHECK(rate(s, step) == about(lr * (step + 1) / 11));
    CHECK(rate(s, warmup) == about(lr));
    CHECK(rate(s, 0) > 0);  // the first step does something
  }
  // 100 is the last step; 55.5 steps in, the middle of 11 .. 100.
  CHECK(rate(Schedule::cosine, 100) == about(min_lr));
  CHECK(rate(Schedule::linear, 100) == about(min_lr));
  CHECK(rate(Schedule::constant, 100) == about(lr));
  CHECK((rate(Schedule::cosine, 55) + rate(Schedule::cosine, 56)) / 2 == about((lr + min_lr) / 2));
  CHECK((rate(Schedule::linear, 55) + rate(Schedule::linear, 56)) / 2 == about((lr + min_lr) / 2));
  CHECK(rate(Schedule::cosine, 11 + 89 / 3) ==
        about(min_lr + (lr - min_lr) * std::pow(std::cos(M_PI / 2 * (89 / 3) / 89.0), 2)));
  for (Schedule s : {Schedule::cosine, Schedule::linear})
    for (int step = warmup; step < steps - 1; ++step) CHECK(rate(s, step + 1) < rate(s, step));
  // Beyond the plan it stays at the bottom; odd plans stay finite and within the bounds.
  CHECK(rate(Schedule::cosine, 500) == about(min_lr));
  CHECK(rate(Schedule::linear, 500) == about(min_lr));
  for (Schedule s : {Schedule::cosine, Schedule::linear, Schedule::constant})
    for (int plan : {1, 2, 10})
      for (int warm : {0, 1, 2, 10, 20})
        for (int step = 0; step < plan; ++step) {
          const double r = learning_rate(s, step, plan, warm, lr, min_lr);
          CHECK((r > 0 && r <= lr));
        }
}

TEST_CASE_TEMPLATE("optimizer: the gradient's norm", Real, float, double) {
  Cpu be;
  for (size_t n : {size_t(1), size_t(1000), size_t(1 << 16), size_t(1 << 16) + 1, size_t(200001)}) {
    const std::vector<Real> g = random_values<Real>(n, 94);
    long double sum = 0;
    for (Real x : g) sum += (long double)(x)*x;
    Real norm = -1;
    norm_of(be, &norm, g.data(), n);
    // Sums are in double for either type; what is left is the rounding of the result.
    CHECK(std::fabs(norm / std::sqrt(double(sum)) - 1) <= kRounding<Real> + 1e-13);
  }
  std::vector<Real> huge(5, Real(1e25));  // squares beyond fp32
  Real norm;
  norm_of(be, &norm, huge.data(), huge.size());
  CHECK(norm == about(std::sqrt(5.0) * 1e25, 2 * kRounding<Real>));
  huge[3] = std::numeric_limits<Real>::quiet_NaN();
  norm_of(be, &norm, huge.data(), huge.size());
  CHECK(std::isnan(norm));
}

TEST_CASE("optimizer: AdamW equals its formula, with and without clipping and decay") {
  for (double clip : {0.0, 0.5, 1e9})
    for (double decay : {0.0, 0.1})
      for (int t : {1, 2, 1000}) {
        AdamW a = kAdamW;
        a.clip = clip;
        a.weight_decay = decay;
        a.step = t;
        State s = start(1003);
        const State before = s;
        step(s, a);
        double norm = 0;
        for (float g : before.gradients) norm += double(g) * g;
        norm = std::sqrt(norm);
        const double factor =
            clip > 0 && norm > clip ? clip / norm : 1;  // PyTorch's 1e-6 beside the norm is within the tolerance
        double worst = 0, worst_m = 0, worst_v = 0;
        for (size_t i = 0; i < s.master.size(); ++i) {
          const double g = before.gradients[i] * factor;
          const double m = 0.9 * before.m[i] + 0.1 * g, v = 0.95 * before.v[i] + 0.05 * g * g;
          const double update = m / (1 - std::pow(0.9, t)) / (std::sqrt(v / (1 - std::pow(0.95, t))) + 1e-8);
          const double x = before.master[i] * (1 - 1e-3 * decay) - 1e-3 * update;
          worst = std::max(worst, std::fabs(s.master[i] - x));
          worst_m = std::max(worst_m, std::fabs(s.m[i] - m));
          worst_v = std::max(worst_v, std::fabs(s.v[i] - v));
        }
        // Weights up to 4: two roundings of that size. The update, up to about 0.01 here, is off by some roundings and
        // 1e-6 / norm of itself. beta in fp32 is off by 2^-25: 1 - beta by 2^-25 / 0.05 of itself.
        CHECK(worst <= 2 * 4 * kRounding<float> + 0.01 * (20 * kRounding<float> + 1e-6));
        CHECK(worst_m <= 4 * kRounding<float>);
        CHECK(worst_v <= 4 * kRounding<float>);
        CHECK(same_bits(s.parameters, s.master));
        CHECK(same_bits(s.gradients, before.gradients));
        CHECK(s.norm == about(norm, 1e-6));  // that of before clipping
      }
}

TEST_CASE("optimizer: a gradient that is not finite changes nothing") {
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    State s = start(100);
    s.gradients[57] = bad;
    const State before = s;
    step(s, kAdamW);
    CHECK_FALSE(std::isfinite(s.norm));
    CHECK(same_bits(s.master, before.master));
    CHECK(same_bits(s.parameters, before.parameters));
    CHECK(same_bits(s.m, before.m));
    CHECK(same_bits(s.v, before.v));
  }
}

TEST_CASE("optimizer: the gaps between tensors stay zero") {
  State s = start(64);
  for (std::vector<float>* x : {&s.master, &s.gradients, &s.m, &s.v})
    for (int i = 40; i < 64; ++i) (*x)[i] = 0;
  step(s, kAdamW);
  for (int i = 40; i < 64; ++i) CHECK(s.master[i] == 0);
}

TEST_CASE("optimizer: the number of threads changes nothing") {
  for (size_t n : {size_t(1003), size_t(200001)})  // not a multiple of a vector: each thread's remainder lies elsewhere
    CHECK(same_for_any_threads([&] {
      State s = start(n);
      step(s, kAdamW);
      std::vector<float> all = s.master;
      for (const std::vector<float>* x : {&s.m, &s.v}) all.insert(all.end(), x->begin(), x->end());
      all.push_back(s.norm);
      return all;
    }));
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA against the CPU

#ifdef __CUDACC__

TEST_CASE("cuda: gradient norm") {
  NEEDS_GPU;
  for (size_t n : {size_t(1), size_t(3), size_t(1000), size_t(2000003)}) {
    const Values gradients = numbers<float>(n, 25, 0.1f);
    float want;
    std::vector<double> partial(partial_sums(cpu, n));
    sum_squares(cpu, partial.data(), gradients.data(), n);
    gradient_norm(cpu, &want, partial.data(), partial.size());
    Tensor<float> device_gradients(gradients), got(1);
    Tensor<double> device_partial(partial_sums(*gpu(), n));
    sum_squares(*gpu(), device_partial(), device_gradients(), n);
    gradient_norm(*gpu(), got(), device_partial(), device_partial.n);
    close("norm", got.host(), {want}, 8 * 0x1p-24, 0);  // four squares are added up in fp32, the rest is in double
  }
}

TEST_CASE_TEMPLATE("cuda: adamw", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for (size_t n : {size_t(1), size_t(67), size_t(4096)})
    for (float norm : {0.5f, 7.0f, std::numeric_limits<float>::infinity()}) {
      CAPTURE(n);
      CAPTURE(norm);
      const AdamW a = {1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0, 3};
      const Values gradients = numbers<float>(n, 26);
      Values master = numbers<float>(n, 27), m = numbers<float>(n, 28, 0.1f), v = absolute(numbers<float>(n, 29, 0.1f));
      Values parameters(n, 9);
      Tensor<float> got_master(master), got_m(m), got_v(v), device_gradients(gradients), device_norm(Values{norm});
      Tensor<Real> got(parameters);
      adamw(cpu, parameters.data(), master.data(), gradients.data(), m.data(), v.data(), &norm, n, a);
      adamw(*gpu(), got(), got_master(), device_gradients(), got_m(), got_v(), device_norm(), n, a);
      close("m", got_m.host(), m, 0, 8 * 0x1p-24);
      close("v", got_v.host(), v, 8 * 0x1p-24, 8 * 0x1p-24);
      close("master", got_master.host(), master, 8 * 0x1p-24, 1e-2 * 64 * 0x1p-24);  // a step is at most some lr long
      close("parameters", got.host(), parameters, kRound<Real> + 8 * 0x1p-24, 1e-2 * 64 * 0x1p-24);
    }
}

#endif  // __CUDACC__
