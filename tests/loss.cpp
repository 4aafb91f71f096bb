// loss.cuh: against the formula and against finite differences.

#include "loss.cuh"

#include "tests/cuda.h"

TEST_CASE_TEMPLATE(
    "loss: cross-entropy equals its formula, skips negative targets and leaves z-loss out of the losses", Real, float,
    double) {
  Cpu be;
  for (int V : {1, 2, 29, 1000}) {
    const int N = 9;
    const std::vector<Real> logits = random_values<Real>(N * V, 70, 4);
    std::vector<int> targets = random_tokens(N, V, 71);
    targets[3] = -1;
    std::vector<double> expected(N), expected_log_z(N);
    double largest_loss = 1;
    for (int n = 0; n < N; ++n) {
      double z = 0;
      for (int v = 0; v < V; ++v) z += std::exp(double(logits[n * V + v]));
      expected[n] = targets[n] < 0 ? 0 : std::log(z) - logits[n * V + targets[n]];
      expected_log_z[n] = targets[n] < 0 ? 0 : std::log(z);
      largest_loss = std::max(largest_loss, expected[n]);
    }
    for (double z_loss : {0.0, 0.1}) {
      std::vector<Real> d = logits, losses = garbage<Real>(N), log_z = garbage<Real>(N);
      cross_entropy(be, losses.data(), log_z.data(), d.data(), targets.data(), 0.5, z_loss, N, V);
      // log Z and the logit, up to about 20, are subtracted: a rounding of 20 each, and the sum's roundings.
      CHECK(distance(losses, expected) <= (32 * 2 + 2 * std::sqrt(V)) * kRounding<Real>);
      CHECK(distance(log_z, expected_log_z) <= (32 * 2 + 2 * std::sqrt(V)) * kRounding<Real>);
      bool skipped = true;
      double sum = 0;
      for (int v = 0; v < V; ++v) skipped = skipped && d[3 * V + v] == 0, sum += d[v];
      CHECK(skipped);
      if (z_loss == 0) CHECK(std::fabs(sum) <= (V + 8) * kRounding<Real>);  // probabilities sum to 1
    }
  }
}

TEST_CASE("loss: cross-entropy's gradient is the derivative of scale * (loss + z-loss)") {
  Cpu be;
  const int N = 5, V = 13;
  std::vector<double> logits = random_values<double>(N * V, 72);
  std::vector<int> targets = random_tokens(N, V, 73);
  targets[2] = -1;
  for (double scale : {1.0, 0.125, 0.0})
    for (double z_loss : {0.0, 0.3}) {
      auto loss = [&] {
        double total = 0;
        for (int n = 0; n < N; ++n) {
          if (targets[n] < 0) continue;
          double z = 0;
          for (int v = 0; v < V; ++v) z += std::exp(logits[n * V + v]);
          total += std::log(z) - logits[n * V + targets[n]] + z_loss * std::log(z) * std::log(z);
        }
        return scale * total;
      };
      std::vector<double> d = logits, losses(N), log_z(N);
      cross_entropy(be, losses.data(), log_z.data(), d.data(), targets.data(), scale, z_loss, N, V);
      CHECK(slope_distance(logits, d, loss) < kSlope);
    }
}

TEST_CASE_TEMPLATE("loss: cross-entropy of huge logits is finite, of NaN and infinity is not", Real, float, double) {
  Cpu be;
  const int V = 37;
  auto run = [&](Real odd, int target) {
    std::vector<Real> logits(V, Real(0)), losses(1), log_z(1);
    logits[5] = odd;
    cross_entropy(be, losses.data(), log_z.data(), logits.data(), &target, 1.0, 0.0, 1, V);
    return std::make_pair(double(losses[0]), double(logits[5]));
  };
  CHECK(run(10000, 5).first == 0);
  CHECK(run(10000, 6).first == 10000);
  CHECK(run(-10000, 5).first == about(10000 + std::log(36.0), 1e-6));
  CHECK(run(10000, 6).second == about(1, 1e-6));
  CHECK(std::isnan(run(std::numeric_limits<Real>::quiet_NaN(), 6).first));
  CHECK_FALSE(std::isfinite(run(std::numeric_limits<Real>::infinity(), 6).first));
}

TEST_CASE("loss: cross-entropy of one large and 50,000 small probabilities") {
  Cpu be;
  const int V = 50257;
  std::vector<float> logits = random_values<float>(V, 170, 0.1);
  logits[7] = 16.7;
  for (int target : {7, 100}) {
    std::vector<float> d = logits, loss(1), log_z(1);
    std::vector<double> want(logits.begin(), logits.end()), want_loss(1), want_log_z(1);
    cross_entropy(be, loss.data(), log_z.data(), d.data(), &target, 1.0, 0.0, 1, V);
    cross_entropy(be, want_loss.data(), want_log_z.data(), want.data(), &target, 1.0, 0.0, 1, V);
    // As cross_entropy() says; the loss and log Z are rounded once.
    const double error = (kSumChunk + 4) * kRounding<float>;
    CHECK(std::fabs(loss[0] - want_loss[0]) <= error + want_loss[0] * kRounding<float>);
    CHECK(std::fabs(log_z[0] - want_log_z[0]) <= error + want_log_z[0] * kRounding<float>);
    for (int v : {7, 100, 101}) {
      const double p = want[v] + (v == target);
      CHECK(std::fabs(d[v] - want[v]) <= (error + 4 * kRounding<float>) * p + kRounding<float> * std::fabs(want[v]));
    }
  }
  // Where the target is all but certain, the loss is a small difference of large numbers.
  float pair[] = {1000, 996}, loss = 0, log_z = 0;
  const int first = 0;
  cross_entropy(be, &loss, &log_z, pair, &first, 1.0, 0.0, 1, 2);
  CHECK(std::fabs(loss - std::log1p(std::exp(-4.0))) <= (2 + 4) * kRounding<float>);
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA against the CPU

#ifdef __CUDACC__

TEST_CASE_TEMPLATE("cuda: cross-entropy", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for (int N : {1, 17, 65, 700})  // 700: a block of the kernel that streams works on more rows than it has places for
    for (int V : {1, 7, 257, 4096, 8200, small() ? 1001 : 50304, small() ? 1001 : 50257})
      for (double z_loss : {0.0, 1e-2}) {
        if (N == 700 && V != 8200 && V != 50304) continue;
        CAPTURE(N);
        CAPTURE(V);
        CAPTURE(z_loss);
        const Values logits = numbers<Real>(size_t(N) * V, 23, 3);
        std::mt19937 random(24);
        std::vector<int> targets(N);
        for (int& target : targets) target = random() % V;
        if (N > 3) targets[3] = -1;
        Values want = logits, losses(N), log_z(N);
        const double scale = 1.0 / N;
        cross_entropy(cpu, losses.data(), log_z.data(), want.data(), targets.data(), scale, z_loss, N, V);
        Tensor<Real> got(logits);
        Tensor<float> got_losses(N), got_log_z(N);
        Tensor<int> device_targets(targets);
        cross_entropy(*gpu(), got_losses(), got_log_z(), got(), device_targets(), scale, z_loss, N, V);
        // Exponentials of differences under 30: relative error 32 half units at most; sums of positive terms: at most V
        // half units on the CPU, of which its 16 or so lanes leave V / 16.
        const double error = (64 + V / 8) * 0x1p-24;
        close("losses", got_losses.host(), losses, 8 * 0x1p-24, error + 32 * 0x1p-24);
        close("log_z", got_log_z.host(), log_z, 8 * 0x1p-24, error + 32 * 0x1p-24);
        close("dlogits", got.host(), want, kRound<Real> + error, scale * 2 * error);
      }
}

TEST_CASE("cuda: cross-entropy of one large and 50,000 small probabilities") {
  NEEDS_GPU;
  const int V = 50257;
  Values logits = numbers<float>(V, 170, 0.1f);
  logits[7] = 16.7f;
  for (int target : {7, 100}) {
    std::vector<double> want(logits.begin(), logits.end()), want_loss(1), want_log_z(1);
    cross_entropy(cpu, want_loss.data(), want_log_z.data(), want.data(), &target, 1.0, 0.0, 1, V);
    Tensor<float> got(logits), loss(1), log_z(1);
    Tensor<int> device_target(std::vector<int>{target});
    cross_entropy(*gpu(), loss(), log_z(), got(), device_target(), 1.0, 0.0, 1, V);
    const Values d = got.host();
    // As cross_entropy_kernel says, the exponentials being of -17.2 at least.
    const double error = (V / 512 + 64 + 4 + 2.4 * 17.2) * 0x1p-24;
    CHECK(std::fabs(loss.host()[0] - want_loss[0]) <= error + 2 * want_loss[0] * 0x1p-24);
    CHECK(std::fabs(log_z.host()[0] - want_log_z[0]) <= error + 2 * want_log_z[0] * 0x1p-24);
    for (int v : {7, 100, 101}) {
      const double p = want[v] + (v == target);
      CHECK(std::fabs(d[v] - want[v]) <= 2 * error * p + 0x1p-24 * std::fabs(want[v]));
    }
  }
  Tensor<float> pair(Values{1000, 996}), loss(1), log_z(1);
  Tensor<int> first(std::vector<int>{0});
  cross_entropy(*gpu(), loss(), log_z(), pair(), first(), 1.0, 0.0, 1, 2);
  CHECK(std::fabs(loss.host()[0] - std::log1p(std::exp(-4.0))) <= (2 + 4) * 0x1p-24);
}

// The way by exponentials, held against the loss of the same product's logits and what goes back from it, in double.
TEST_CASE("cuda: the head and the loss in one") {
  NEEDS_GPU;
  NEEDS_HOPPER;
  struct Size {
    int N, C, V;
  };
  for (const Size& s : {Size{700, 256, 4104}, Size{1301, 64, 8200}, Size{small() ? 300 : 513, 768, small() ? 6144 : 50304}})
    for (double z_loss : {0.0, 1e-2}) {
      const int N = s.N, C = s.C, V = s.V;
      CAPTURE(V);
      CAPTURE(z_loss);
      Values inp = numbers<bf16>(size_t(N) * C, 61), weight = numbers<bf16>(size_t(V) * C, 62, 1 / std::sqrt(float(C)));
      std::mt19937 random(63);
      std::vector<int> targets(N);
      for (int& target : targets) target = random() % V;
      targets[3] = targets[N - 1] = -1;
      targets[7] = V - 1;
      // Rows of one large number, whose logits are exact: the target's is like the others, far below one, far above all.
      auto only = [&](int n, float x) {
        std::fill_n(&inp[size_t(n) * C], C, 0.0f);
        inp[size_t(n) * C] = x;
      };
      only(4, 16384), only(5, 16384), only(6, 16384);
      weight[size_t(targets[5]) * C] = 1, weight[size_t(targets[6]) * C] = 2;
      only(3, 16384);  // ignored, with any logits
      const double scale = 1.0 / N;
      Tensor<bf16> device_inp(inp), device_weight(weight), logits(size_t(N) * V), dinp(inp.size());
      gemm::multiply(*gpu(), logits(), device_inp(), device_weight(), N, V, C, gemm::Store{});
      const Values host_logits = logits.host();
      std::vector<double> d(host_logits.begin(), host_logits.end()), want_losses(N), want_log_z(N);
      const std::vector<double> x(inp.begin(), inp.end()), w(weight.begin(), weight.end());
      cross_entropy(cpu, want_losses.data(), want_log_z.data(), d.data(), targets.data(), scale, z_loss, N, V);
      CHECK(want_losses[4] > 1000);
      CHECK(want_losses[5] > 1000);
      CHECK(want_losses[6] == 0);
      std::vector<double> want_dinp(x.size()), want_dweight(w.size());
      linear_backward(cpu, want_dinp.data(), want_dweight.data(), (double*)nullptr, d.data(), x.data(), w.data(), N, C, V);
      auto absolute_of = [](std::vector<double> values) {
        for (double& value : values) value = std::fabs(value);
        return values;
      };
      std::vector<double> dinp_terms(x.size()), dweight_terms(w.size());  // sums of the terms' absolute values
      linear_backward(cpu, dinp_terms.data(), dweight_terms.data(), (double*)nullptr, absolute_of(d).data(),
                      absolute_of(x).data(), absolute_of(w).data(), N, C, V);

      Tensor<float> losses(N), log_z(N), factors(N), dweight(w.size());
      Tensor<int> device_targets(targets);
      auto run = [&] {
        linear_cross_entropy(*gpu(), losses(), log_z(), dinp(), dweight(), (float*)nullptr, logits(), factors(),
                             device_inp(), device_weight(), (const bf16*)nullptr, device_targets(), scale, z_loss, N, C,
                             V, true);
      };
      REQUIRE(head_in_exponentials(*gpu(), dinp(), logits(), device_inp(), device_weight(), N, C, V));
      run();
      // log Z as the kernels say, with exponentials of differences up to 30; a loss and a log Z are rounded twice.
      const double error = (V / 1024 + 27 + 4 + 2.4 * 30) * 0x1p-24;
      close("losses", losses.host(), Values(want_losses.begin(), want_losses.end()), 2 * 0x1p-24, error);
      close("log_z", log_z.host(), Values(want_log_z.begin(), want_log_z.end()), 2 * 0x1p-24, error);
      // An exponential is rounded to bf16, and so is a product with it, and that times the factor; or the factor times inp.
      close("dinp", dinp.host(), Values(want_dinp.begin(), want_dinp.end()), 2 * kRound<bf16>,
            kRound<bf16> + error + V * 0x1p-23, Values(dinp_terms.begin(), dinp_terms.end()));
      close("dweight", dweight.host(), Values(want_dweight.begin(), want_dweight.end()), 0x1p-24,
            2 * kRound<bf16> + error + N * 0x1p-23, Values(dweight_terms.begin(), dweight_terms.end()));
      const auto bits = dweight.bits();
      run();
      CHECK(same_bits(dweight.bits(), bits));
    }
}

TEST_CASE("cuda: the sums of losses and log Z") {
  NEEDS_GPU;
  for (int N : {1, 17, 1000, 5000}) {
    const Values losses = numbers<float>(N, 31, 1, 3), log_z = numbers<float>(N, 32, 1, 8);
    double want[2] = {1, 2};
    add_losses(cpu, &want[0], &want[1], losses.data(), log_z.data(), N);
    Tensor<float> device_losses(losses), device_log_z(log_z);
    Tensor<double> got(std::vector<double>{1, 2});
    add_losses(*gpu(), got(), got() + 1, device_losses(), device_log_z(), N);
    for (int i : {0, 1}) CHECK(got.bits()[i] == doctest::Approx(want[i]).epsilon(1e-12));  // both in double
  }
}

#endif  // __CUDACC__
