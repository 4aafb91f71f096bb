// CUDA against the CPU: the operations that have no tests of their own file yet, and the model. See tests/cuda.h.

#include "tests/cuda.h"

#ifdef __CUDACC__

#include <array>

#include "run/diagnostics.cuh"

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
void test_attention(AttentionShape s, bool flash) {
  CAPTURE(s.T);
  CAPTURE(s.NH);
  CAPTURE(s.NKV);
  CAPTURE(s.HS);
  CAPTURE(s.first);
  CAPTURE(flash);
  const size_t N = size_t(s.B) * s.T, stride = size_t(s.NH + 2 * s.NKV) * s.HS;
  const Values qkv = numbers<Real>(N * stride, 6);
  const std::vector<double> exact(qkv.begin(), qkv.end());
  std::vector<double> exact_out(N * s.NH * s.HS), exact_lse(N * s.NH);
  attention_forward_by_definition(exact_out.data(), exact_lse.data(), exact.data(), s);
  const Values out(exact_out.begin(), exact_out.end()), lse(exact_lse.begin(), exact_lse.end());
  Values sums = out, lse_again = lse, with_absolute_values = qkv;
  for (size_t i = 0; i < qkv.size(); ++i)
    if (i % stride >= size_t(s.NH + s.NKV) * s.HS) with_absolute_values[i] = std::fabs(qkv[i]);
  attention_forward(cpu, sums.data(), lse_again.data(), with_absolute_values.data(), s);  // sum of p |v|

  Tensor<Real> device_qkv(qkv), got(out.size());
  Tensor<float> got_lse(lse.size());
  if (flash)
    attention_forward(*gpu(), got(), got_lse(), device_qkv(), s);
  else
    simple_attention_forward(*gpu(), got(), got_lse(), device_qkv(), s);
  Values result = got.host(), result_lse = got_lse.host();
  for (size_t n = 0; n < N; ++n)
    if (int(n % s.T) < s.first)  // rows that were not asked for
      for (int h = 0; h < s.NH; ++h) {
        for (int c = 0; c < s.HS; ++c) result[(n * s.NH + h) * s.HS + c] = out[(n * s.NH + h) * s.HS + c];
        const size_t row = (n / s.T * s.NH + h) * s.T + n % s.T;
        result_lse[row] = lse[row];
      }
  // A score is a sum of HS products: off by at most HS half units of sum |q k| / sqrt(HS) <= 2 sqrt(HS) or so here, and
  // exp turns that into a relative error of p. The flash kernels then round p to bf16. Both weigh on sum p |v|.
  const double p_error = 4 * s.HS * 0x1p-24 * 2 * std::sqrt(s.HS) + 1e-5 + (flash ? 0x1p-8 : 0);
  close("attention_forward", result, out, kRound<Real>, p_error, sums);
  close("lse", result_lse, lse, 0, 4 * s.HS * 0x1p-24 * 2 * std::sqrt(s.HS) + 1e-5);
  if (s.first > 0) return;

  const Values dout = numbers<Real>(out.size(), 7);
  const std::vector<double> exact_dout(dout.begin(), dout.end());
  std::vector<double> dqkv(qkv.size());
  attention_backward_by_definition(dqkv.data(), exact_dout.data(), exact.data(), s);
  Tensor<Real> device_dout(dout), got_dqkv(qkv.size());
  Tensor<float> got_D(lse.size());
  if (flash)
    attention_backward(*gpu(), got_dqkv(), got_D(), device_dout(), device_qkv(), got(), got_lse(), s);
  else
    simple_attention_backward(*gpu(), got_dqkv(), got_D(), device_dout(), device_qkv(), got(), got_lse(), s);
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
        for (int first : {0, T - 1, T / 3}) test_attention<Real>({2, T, 4, NKV, HS, first}, false);
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
      for (int HS : {32, 64, 128, 256}) test_attention<bf16>({2, T, 4, NKV, HS}, true);
}

TEST_CASE_TEMPLATE("cuda: embedding", Real, BOTH_TYPES) {
  NEEDS_GPU;
  using Sizes = std::array<int, 3>;
  for (Sizes sizes :
       {Sizes{1, 1, 1}, {17, 5, 8}, {1000, 3, 24}, {1000, 70000, 24}, {2000, 257, 65}, {2000, 300, 520}}) {
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
      Values out(n), dx(2 * n), gelu(n), dgelu(n);
      swiglu_forward(cpu, out.data(), x.data(), N, F);
      swiglu_backward(cpu, dx.data(), dout.data(), x.data(), N, F);
      gelu_forward(cpu, gelu.data(), half.data(), N, F);
      gelu_backward(cpu, dgelu.data(), dout.data(), half.data(), N, F);
      Tensor<Real> device_x(x), device_half(half), device_dout(dout), got(n), got_dx(2 * n), got_gelu(n), got_dgelu(n);
      swiglu_forward(*gpu(), got(), device_x(), N, F);
      swiglu_backward(*gpu(), got_dx(), device_dout(), device_x(), N, F);
      gelu_forward(*gpu(), got_gelu(), device_half(), N, F);
      gelu_backward(*gpu(), got_dgelu(), device_dout(), device_half(), N, F);
      // e^x by the GPU's fast instruction: 2 units plus |x| half units, |x| < 20 here; products of up to 15 * 15 * 5.
      // erf cancels near -1 on the CPU: an absolute error of a few half units of |x|.
      close("swiglu_forward", got.host(), out, kRound<Real> + 64 * 0x1p-24, 0x1p-24);
      close("swiglu_backward", got_dx.host(), dx, kRound<Real> + 64 * 0x1p-24, 64 * 0x1p-24);
      close("gelu_forward", got_gelu.host(), gelu, kRound<Real> + 16 * 0x1p-24, 64 * 0x1p-24);
      close("gelu_backward", got_dgelu.host(), dgelu, kRound<Real> + 64 * 0x1p-24, 256 * 0x1p-24);
    }
}

TEST_CASE_TEMPLATE("cuda: cross-entropy", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for (int N : {1, 17, 65})
    for (int V : {1, 7, 257, 4096, small() ? 1001 : 50304, small() ? 1001 : 50257})
      for (double z_loss : {0.0, 1e-2}) {
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

TEST_CASE("cuda: lanes are added in the order of the ranks, to the bit") {
  NEEDS_GPU;
  for (size_t n : {size_t(64), size_t(1003), size_t(1 << 20)})
    for (int ranks : {1, 4})
      for (bool first : {true, false}) {
        const int rank = ranks - 1;
        const Values own = numbers<float>(n, 320), received = numbers<float>(n * ranks, 321);
        Values sum = numbers<float>(n, 322);
        Tensor<float> device_own(own), device_received(received), got(sum);
        add_rows_in_order(cpu, sum.data(), own.data(), received.data(), rank, ranks, n, first);
        add_rows_in_order(*gpu(), got(), device_own(), device_received(), rank, ranks, n, first);
        CHECK(same_bits(got.bits(), sum));
        if (!first) continue;
        add_rows_in_order(*gpu(), device_own(), device_own(), device_received(), rank, ranks, n, first);
        CHECK(same_bits(device_own.bits(), sum));  // in the place of the own lane
      }
}

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
    // A thread adds at most n / (1024 * 256) + 1 packs of 4 squares in fp32, the rest is in double.
    close("norm", got.host(), {want}, (4 * (n / 262144 + 1) + 4) * 0x1p-24, 0);
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

namespace {

// Statistics of attention, from a forward pass on the GPU; deviation 30 makes scores of thousands.
template <class Real>
void test_attention_statistics(AttentionShape s, float deviation) {
  CAPTURE(s.T);
  CAPTURE(s.NKV);
  CAPTURE(s.HS);
  CAPTURE(deviation);
  const size_t N = size_t(s.B) * s.T, rows = N * s.NH;
  const Values qkv = numbers<Real>(N * (s.NH + 2 * s.NKV) * s.HS, 33, deviation);
  Tensor<Real> device_qkv(qkv), out(N * s.NH * s.HS);
  Tensor<float> lse(rows), entropies(rows);
  Tensor<double> max_logit(std::vector<double>(s.NH, 0.125)), entropy(std::vector<double>(s.NH, 3));
  attention_forward(*gpu(), out(), lse(), device_qkv(), s);
  attention_statistics(*gpu(), max_logit(), entropy(), entropies(), device_qkv(), lse(), s);
  // The definition in double, from the GPU's qkv and with its own lse.
  std::vector<double> want_logit(s.NH, 0.125), want_entropy(s.NH, 3), want_rows(rows), want_lse(rows);
  const std::vector<double> exact(qkv.begin(), qkv.end());
  std::vector<double> exact_out(out.n);
  attention_forward(cpu, exact_out.data(), want_lse.data(), exact.data(), s);
  attention_statistics(cpu, want_logit.data(), want_entropy.data(), want_rows.data(), exact.data(), want_lse.data(), s);
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
  attention_statistics(*gpu(), logit_again(), again(), entropies(), device_qkv(), lse(), s);
  CHECK(same_bits(again.bits(), got_entropy));
  CHECK(same_bits(logit_again.bits(), got_logit));
}

}  // namespace

TEST_CASE_TEMPLATE("cuda: attention statistics", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for (int T : lengths())
    for (int NKV : {1, 4})
      for (int HS : {10, 32, 64, 128, 256})
        for (float deviation : {1.0f, 30.0f}) test_attention_statistics<Real>({2, T, 4, NKV, HS}, deviation);
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

namespace {

Config small_config() {
  Config c;
  c.layers = 2, c.width = 128, c.heads = 4, c.kv_heads = 2, c.head_size = 32, c.mlp_hidden = 192, c.vocab = 259,
  c.context = 65;
  c.rotary_dim = 8;
  resolve(c);
  return c;
}

struct Run {
  Values losses, gradients, master;  // mean loss of each step; gradients of the first step; weights after the last
};

// Trains for some steps on fixed random tokens; from the third step on a GPU replays the recorded kernels, unless each
// is to be started by itself.
template <class Backend, class Real>
Run train(Backend& be, const Config& c, int steps, bool recorded = true) {
  const int B = 3, T = 65;
  Model<Backend, Real> model(be, c, B, T, true);
  // Weights that bf16 can hold, so that all start from the same.
  Values weights(model.table.total);
  for (size_t i = 0; i < model.table.rows.size(); ++i)
    initialise(&weights[model.table.rows[i].offset], model.table.rows[i], 1, i, 0.02, 0, model.table.rows[i].count);
  for (float& w : weights) w = round_to<bf16>(w * 2);
  model.set_weights(weights.data());
  std::mt19937 random(30);
  std::vector<int> tokens(B * T + 1);
  for (int& token : tokens) token = random() % c.vocab;
  Run run;
  run.gradients.resize(model.table.total);
  run.master.resize(model.table.total);
  for (int step = 1; step <= steps; ++step) {
    model.zero_gradients();
    if (recorded) {
      model.train_batch(tokens.data(), tokens.data() + 1, 1.0 / (B * T), 1e-4);
    } else {
      model.forward(tokens.data(), B, T);
      model.backward(tokens.data() + 1, B, T, 1.0 / (B * T), 1e-4);
    }
    if (step == 1) be.download(run.gradients.data(), model.gradients_flat, run.gradients.size() * sizeof(float));
    typename Model<Backend, Real>::StepResult result;
    be.download(&result, model.result, sizeof result);
    run.losses.push_back(float(result.loss / (B * T)));
    model.update({1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, step});
  }
  be.download(run.master.data(), model.master, run.master.size() * sizeof(float));
  return run;
}

void compare_models(const Config& c) {
  const int steps = 10;
  const ParameterTable table = parameter_table(c);
  const Run want = train<Cpu, float>(cpu, c, steps);
  const Run fp32 = train<Cuda, float>(*gpu(), c, steps), half = train<Cuda, bf16>(*gpu(), c, steps);
  for (const ParameterRow& row : table.rows) {
    CAPTURE(row.name);
    auto part = [&](const Values& all) {
      return Values(all.begin() + row.offset, all.begin() + row.offset + row.count);
    };
    // fp32: errors of sums of some hundred terms, a few 1e-6, through two blocks. bf16: each of some 20 tensors on the
    // way adds a relative error of up to 2^-8, independent of each other: sqrt(20) 2^-8 = 0.017; where gradients of
    // either sign nearly cancel (norm weights, biases) it is relative to more than the result, hence 3 times that.
    CHECK(relative_distance(part(fp32.gradients), part(want.gradients)) < 5e-5);
    CHECK(relative_distance(part(half.gradients), part(want.gradients)) < 0.05);
  }
  for (int step = 0; step < steps; ++step) {
    CAPTURE(step);
    CHECK(std::fabs(fp32.losses[step] - want.losses[step]) < 1e-4 * want.losses[step]);
    // bf16: a loss is off by its last layers' roundings, and gradients that are off by 5 % cost 5 % of the progress.
    CHECK(std::fabs(half.losses[step] - want.losses[step]) <
          0x1p-7 * want.losses[step] + 0.05 * (want.losses[0] - want.losses[step]));
  }
  CHECK(want.losses.back() < want.losses.front());
  const Run again32 = train<Cuda, float>(*gpu(), c, steps, false);
  Config less = c;
  less.recompute = true;
  const Run again16 = train<Cuda, bf16>(*gpu(), less, steps);
  CHECK(same_bits(again32.master, fp32.master));
  CHECK(same_bits(again16.master, half.master));
  CHECK(same_bits(again16.losses, half.losses));
}

}  // namespace

TEST_CASE("cuda: the whole model") {
  NEEDS_GPU;
  SUBCASE("partial rope") { compare_models(small_config()); }
  SUBCASE("no rope, tied") {
    Config c = small_config();
    c.rotary_dim = 0, c.tied = true;
    compare_models(c);
  }
  SUBCASE("full rope, interleaved, qk-norm, parallel block") {
    Config c = small_config();
    c.rotary_dim = 32, c.rope_pairs = RopePairs::interleaved, c.qk_norm = true, c.block = BlockKind::parallel;
    compare_models(c);
  }
  SUBCASE("layer norm, gelu, bias, head size 20") {
    Config c = small_config();
    c.head_size = 20, c.norm = NormKind::layer, c.mlp = MlpKind::gelu, c.bias = true;
    compare_models(c);
  }
}

TEST_CASE_TEMPLATE("cuda: logits with a key/value cache", Real, BOTH_TYPES) {
  NEEDS_GPU;
  const Config c = small_config();
  const int T = 20;
  Model<Cuda, Real> whole(*gpu(), c, 1, T, false), stepwise(*gpu(), c, 1, T, false);
  whole.initialise_weights(3);
  stepwise.initialise_weights(3);
  std::vector<int> tokens(T);
  for (int t = 0; t < T; ++t) tokens[t] = 7 * t % c.vocab;
  Values want(c.vocab), got(c.vocab);
  whole.forward(tokens.data(), 1, T);
  whole.logits(want.data(), T, 1);
  stepwise.forward(tokens.data(), 1, T / 2);
  for (int t = T / 2; t < T; ++t) stepwise.forward(tokens.data(), 1, t + 1, t);
  stepwise.logits(got.data(), T, 1);
  CHECK(relative_distance(got, want) < 8 * kRound<Real> * std::sqrt(20.0));  // the same sums in other tiles; see compare_models
}

#else

TEST_CASE("cuda: skipped") { MESSAGE("this program was built without nvcc: the CUDA tests are skipped"); }

#endif
