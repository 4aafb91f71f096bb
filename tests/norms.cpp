// norms.cuh: against the formula and against finite differences.

#include "norms.cuh"

#include "tests/cuda.h"

TEST_CASE_TEMPLATE("norms: they equal their formula", Real, float, double) {
  Cpu be;
  for (NormKind kind : {NormKind::rms, NormKind::layer})
    for (int C : {1, 7, 33, 768}) {
      const int N = 5;
      const double eps = 1e-5;
      std::vector<Real> x = random_values<Real>(N * C, 43);
      for (Real& v : x) v = v * Real(3) + Real(2);  // a mean that is not 0
      const std::vector<Real> weight = random_values<Real>(C, 44), bias = random_values<Real>(C, 45);
      std::vector<Real> out = garbage<Real>(N * C), mean = garbage<Real>(N), rstd = garbage<Real>(N);
      norm_forward(be, kind, out.data(), mean.data(), rstd.data(), x.data(), weight.data(), bias.data(), N, C, eps);
      std::vector<double> expected(N * C);
      for (int n = 0; n < N; ++n) {
        double m = 0, v = 0;
        if (kind == NormKind::layer)
          for (int c = 0; c < C; ++c) m += double(x[n * C + c]) / C;
        for (int c = 0; c < C; ++c) v += (x[n * C + c] - m) * (x[n * C + c] - m) / C;
        for (int c = 0; c < C; ++c) {
          expected[n * C + c] = (x[n * C + c] - m) / std::sqrt(v + eps) * weight[c];
          if (kind == NormKind::layer) expected[n * C + c] += bias[c];
        }
      }
      // C = 1 under LayerNorm: x - mean is 0 up to a rounding of x, which 1/sqrt(eps) multiplies by 316.
      const double amplify = C == 1 && kind == NormKind::layer ? 320 : 1;
      CHECK(distance(out, expected) <=
            (2 * std::sqrt(C) + 8) * kRounding<Real> * amplify * std::max(largest(expected), largest(x)));
    }
}

TEST_CASE("norms: backward is the derivative of their forward, beside and without a residual stream") {
  Cpu be;
  const int N = 19, C = 7;  // more rows than chunks
  for (NormKind kind : {NormKind::rms, NormKind::layer}) {
    std::vector<double> x = random_values<double>(N * C, 46), weight = random_values<double>(C, 47),
                        bias = random_values<double>(C, 48);
    const std::vector<double> dout = random_values<double>(N * C, 49), dresidual = random_values<double>(N * C, 50);
    std::vector<double> out(N * C), mean(N), rstd(N);
    auto forward = [&] {
      norm_forward(be, kind, out.data(), mean.data(), rstd.data(), x.data(), weight.data(), bias.data(), N, C, 1e-5);
    };
    auto loss = [&] {
      forward();
      return dot(out, dout);
    };
    auto loss_beside = [&] { return loss() + dot(x, dresidual); };
    forward();
    std::vector<double> dx = garbage<double>(N * C), dweight = started(C), dbias = started(C);
    norm_backward(be, kind, dx.data(), dweight.data(), dbias.data(), none<double>(), dout.data(), x.data(), mean.data(),
                  rstd.data(), weight.data(), N, C);
    CHECK(slope_distance(x, dx, loss) < kSlope);
    CHECK(slope_distance(weight, without_start(dweight), loss) < kSlope);
    if (kind == NormKind::layer)
      CHECK(slope_distance(bias, without_start(dbias), loss) < kSlope);
    else
      CHECK(dbias == started(C));  // RMSNorm has no bias

    forward();
    std::vector<double> dx_beside = garbage<double>(N * C), in_place = dresidual;
    norm_backward(be, kind, dx_beside.data(), dweight.data(), dbias.data(), dresidual.data(), dout.data(), x.data(),
                  mean.data(), rstd.data(), weight.data(), N, C);
    CHECK(slope_distance(x, dx_beside, loss_beside) < kSlope);
    forward();
    norm_backward(be, kind, in_place.data(), dweight.data(), dbias.data(), in_place.data(), dout.data(), x.data(),
                  mean.data(), rstd.data(), weight.data(), N, C);
    CHECK(same_bits(dx_beside, in_place));
  }
}

TEST_CASE("norms: a wide row with one huge channel") {
  Cpu be;
  const int C = 1 << 17;
  for (NormKind kind : {NormKind::rms, NormKind::layer}) {
    std::vector<float> x = random_values<float>(C, 171), weight(C, 1.0f), bias(C), out(C), mean(1), rstd(1);
    x[0] = 5000;
    const std::vector<double> x64(x.begin(), x.end()), weight64(C, 1.0), bias64(C);
    std::vector<double> out64(C), mean64(1), rstd64(1);
    norm_forward(be, kind, out.data(), mean.data(), rstd.data(), x.data(), weight.data(), bias.data(), 1, C, 1e-5);
    norm_forward(be, kind, out64.data(), mean64.data(), rstd64.data(), x64.data(), weight64.data(), bias64.data(), 1, C,
                 1e-5);
    CHECK(rstd[0] == about(rstd64[0], (kSumChunk / 2 + 4) * kRounding<float>));
    // Backward, the same gradient everywhere but in one channel: sums over terms of one sign.
    std::vector<float> dout(C, 1.0f), dx(C), dw(C), db(C);
    dout[0] = 3e7;
    const std::vector<double> dout64(dout.begin(), dout.end());
    std::vector<double> dx64(C), dw64(C), db64(C), sizes(C), rstd_exact(rstd.begin(), rstd.end()),
        mean_exact(mean.begin(), mean.end());
    norm_backward(be, kind, dx.data(), dw.data(), db.data(), none<float>(), dout.data(), x.data(), mean.data(),
                  rstd.data(), weight.data(), 1, C);
    norm_backward(be, kind, dx64.data(), dw64.data(), db64.data(), none<double>(), dout64.data(), x64.data(),
                  mean_exact.data(), rstd_exact.data(), weight64.data(), 1, C);
    double g = 0, gx = 0;  // the means of the terms' sizes
    for (int c = 0; c < C; ++c) {
      const double xhat = (x64[c] - (kind == NormKind::layer ? mean[0] : 0)) * rstd[0];
      g += dout64[c] / C, gx += std::fabs(dout64[c] * xhat) / C;
      sizes[c] = std::fabs(xhat);
    }
    if (kind == NormKind::rms) g = 0;
    for (int c : {1, 2, 77, C - 1}) {
      const double terms = 1 + g + sizes[c] * gx, error = (kSumChunk + 12) * kRounding<float> * rstd[0] * terms;
      CHECK(std::fabs(dx[c] - dx64[c]) <= error);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA against the CPU

#ifdef __CUDACC__

TEST_CASE_TEMPLATE("cuda: norms", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for (NormKind kind : {NormKind::rms, NormKind::layer})
    for (int N : lengths())
      for (int C : {1, 24, 65, 384, 768, 2048, 5000}) {
        CAPTURE(int(kind));
        CAPTURE(N);
        CAPTURE(C);
        const bool layer = kind == NormKind::layer;
        const Values x = numbers<Real>(size_t(N) * C, 11, 1, 0.5f), weight = numbers<Real>(C, 12, 0.3f, 1),
                     bias = numbers<Real>(C, 13), dout = numbers<Real>(x.size(), 14),
                     residual = numbers<Real>(x.size(), 15);
        Values out(x.size()), mean(N), rstd(N), dx(x.size()), dweight(C, 0.5f), dbias(C, 0.5f);
        norm_forward(cpu, kind, out.data(), mean.data(), rstd.data(), x.data(), weight.data(), bias.data(), N, C, 1e-5);
        Tensor<Real> device_x(x), device_weight(weight), device_bias(bias), got(x.size()), device_dout(dout),
            got_dx(residual);
        Tensor<float> got_mean(N), got_rstd(N), got_dweight(dweight), got_dbias(dbias);
        norm_forward(*gpu(), kind, got(), got_mean(), got_rstd(), device_x(), device_weight(), device_bias(), N, C,
                     1e-5);
        // Sums of C terms: C half units, of the sum of their sizes. The largest |x| is under 6; a width of 1 makes rstd
        // of a LayerNorm 1 / sqrt(eps), which multiplies the error of x - mean.
        const double r = *std::max_element(rstd.begin(), rstd.end()), sum_error = (C + 8) * 0x1p-24;
        if (layer) close("mean", got_mean.host(), mean, 0, sum_error * 6);
        close("rstd", got_rstd.host(), rstd, sum_error * (1 + r * r), 0);
        close("norm_forward", got.host(), out, kRound<Real>, sum_error * 12 * (1 + r));

        // In place on the residual's gradient, from the statistics of the GPU's own forward pass.
        if (layer) mean = got_mean.host();
        rstd = got_rstd.host();
        dx = residual;
        norm_backward(cpu, kind, dx.data(), dweight.data(), dbias.data(), dx.data(), dout.data(), x.data(), mean.data(),
                      rstd.data(), weight.data(), N, C);
        norm_backward(*gpu(), kind, got_dx(), got_dweight(), got_dbias(), got_dx(), device_dout(), device_x(),
                      got_mean(), got_rstd(), device_weight(), N, C);
        close("dx", got_dx.host(), dx, kRound<Real>, sum_error * 60 * r * (1 + r));
        close("dweight", got_dweight.host(), dweight, 0, (N + 8) * 0x1p-24, {float(N * (1 + r) * 4)});
        if (layer) close("dbias", got_dbias.host(), dbias, 0, (N + 8) * 0x1p-24, {float(N * 4)});

        Tensor<Real> fresh(x.size());
        norm_backward(*gpu(), kind, fresh(), got_dweight(), got_dbias(), (const Real*)nullptr, device_dout(),
                      device_x(), got_mean(), got_rstd(), device_weight(), N, C);
        norm_backward(cpu, kind, dx.data(), dweight.data(), dbias.data(), (const float*)nullptr, dout.data(), x.data(),
                      mean.data(), rstd.data(), weight.data(), N, C);
        close("dx, no residual", fresh.host(), dx, kRound<Real>, sum_error * 60 * r * (1 + r));

        // Two norms of x; the other one's weight is this one's bias.
        Tensor<Real> first(x.size()), second(x.size()), pair_dx(residual), device_dout2(residual);
        norm_pair_forward(*gpu(), kind, first(), second(), got_mean(), got_rstd(), device_x(), device_weight(),
                          device_bias(), device_bias(), device_weight(), N, C, 1e-5);
        CHECK(same_bits(first.bits(), got.bits()));
        Values out2(x.size()), dweights[4] = {Values(C, 0.5f), Values(C, 0.5f), Values(C, 0.5f), Values(C, 0.5f)};
        norm_forward(cpu, kind, out2.data(), mean.data(), rstd.data(), x.data(), bias.data(), weight.data(), N, C, 1e-5);
        close("the second of two norms", second.host(), out2, kRound<Real>, sum_error * 24 * (1 + r));
        Tensor<float> got_sums[4] = {Tensor<float>(dweights[0]), Tensor<float>(dweights[1]), Tensor<float>(dweights[2]),
                                     Tensor<float>(dweights[3])};
        dx = residual;
        norm_pair_backward(cpu, kind, dx.data(), dweights[0].data(), dweights[1].data(), dweights[2].data(),
                           dweights[3].data(), (const float*)dx.data(), dout.data(), residual.data(), x.data(),
                           mean.data(), rstd.data(), weight.data(), bias.data(), N, C);
        norm_pair_backward(*gpu(), kind, pair_dx(), got_sums[0](), got_sums[1](), got_sums[2](), got_sums[3](),
                           (const Real*)pair_dx(), device_dout(), device_dout2(), device_x(), got_mean(), got_rstd(),
                           device_weight(), device_bias(), N, C);
        close("dx of two norms", pair_dx.host(), dx, kRound<Real>, sum_error * 180 * r * (1 + r));
        for (int i : {0, 1, 2, 3})
          if (layer || i % 2 == 0)
            close("sums of two norms", got_sums[i].host(), dweights[i], 0, (N + 8) * 0x1p-24, {float(N * (1 + r) * 4)});
      }
}

#endif  // __CUDACC__
