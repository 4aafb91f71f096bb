// The operations of a training step on the GPU, alone and together.
//
//   ops_gpu                every operation at the shapes of a 12 x 768 model, then whole steps of four models
//   ops_gpu ops            the operations only
//   ops_gpu steps [NAME]   the steps only, of models with NAME in their names
//   ops_gpu fused [NAME]   products with what comes next in their epilogue, at the shapes of these models
//   ops_gpu floor [NAME]   a step of each beside what its products, attention and bytes take at least
//   ops_gpu rotation NAME [ROUNDS]   what 10 % and 100 % of rotation add to a step of the model, by turns with none
//   ops_gpu kernels        every rung of RoPE and attention as CSV: notebooks/kernels.csv, which 05_kernels reads
//
// GB/s counts each tensor that an operation must read or write once, next to a plain device-to-device copy (bytes read
// plus bytes written); TFLOP/s counts 2 per multiply-add, and for causal attention only the lower half.

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench/gpu.h"
#include "run/diagnostics.cuh"

static void row(const char* name, double ms, double bytes, double flops = 0) {
  std::printf("%-34s %9.3f ms", name, ms);
  if (bytes > 0) std::printf(" %8.0f GB/s", bytes / ms * 1e-6);
  if (flops > 0) std::printf(" %8.0f TFLOP/s", flops / ms * 1e-9);
  std::printf("\n");
}

// Calls visit(name, milliseconds) for every rung of RoPE that can work on bf16 heads of such a shape.
template <class Visit>
static void for_rope_rungs(RopeShape s, int R, RopePairs pairs, Visit visit) {
  Tensor<bf16> qkv(size_t(s.B) * s.T * (s.NH + 2 * s.NKV) * s.HS);
  Tensor<float> values(size_t(s.T) * R);
  const RopeTable table(values(), s.T, R, pairs);
  visit("pair by pair", milliseconds([&] { rope_pairs(*be, qkv(), table, s, 1); }));
  auto wide = [&](const char* name, auto W) {
    if (rope_wide_fits<W()>(qkv(), table, s))
      visit(name, milliseconds([&] { rope_wide<W()>(*be, qkv(), table, s, 1); }));
  };
  wide("1 pair", std::integral_constant<int, 1>());
  wide("2 pairs", std::integral_constant<int, 2>());
  wide("8 pairs", std::integral_constant<int, 8>());
  if (rope_sectors_fit(qkv(), table, s))
    visit("16 channels", milliseconds([&] { rope_sectors(*be, qkv(), table, s, 1); }));
  visit("as used", milliseconds([&] { rope_forward(*be, qkv(), table, s); }));
}

// The rungs side by side: 65,536 tokens of 768 channels. GB/s: of the rung that is used, the channels that it must read
// and write.
static void rope_rungs() {
  const std::vector<std::string> names = {"pair by pair", "1 pair", "2 pairs", "8 pairs", "16 channels", "as used"};
  const int N = 65536, C = 768, T = 1024;
  std::printf("rope, milliseconds        ");
  for (const std::string& name : names) std::printf(" %12s", name.c_str());
  std::printf("\n");
  for (RopePairs pairs : {RopePairs::half, RopePairs::interleaved})
    for (int HS : {64, 128, 256})
      for (double fraction : {0.1, 0.25, 1.0}) {
        const int R = rotary_dim_from_fraction(fraction, HS);
        std::map<std::string, double> ms;
        for_rope_rungs({N / T, T, C / HS, C / HS, HS}, R, pairs, [&](const char* name, double t) { ms[name] = t; });
        std::printf("%-11s %3d of %3d    ", pairs == RopePairs::half ? "half" : "interleaved", R, HS);
        for (const std::string& name : names)
          ms.count(name) ? std::printf(" %12.4f", ms[name]) : std::printf(" %12s", "-");
        std::printf(" %6.0f GB/s\n", double(N) * 2 * (C / HS) * R * 2 * 2 / ms["as used"] * 1e-6);
      }
}

static void operations() {
  const int B = 64, T = 1024, NH = 12, HS = 64, C = 768, F = 2048, V = 50304, N = B * T, QKV = 3 * C, rows = 9408;
  const size_t n = N;
  using R = bf16;
  {
    Tensor<char> from(size_t(2) << 30), to(size_t(2) << 30);
    const double ms = milliseconds(
        [&] { check(cudaMemcpyAsync(to(), from(), size_t(2) << 30, cudaMemcpyDeviceToDevice, be->stream), "copy"); });
    row("copy, 2 GiB", ms, 2.0 * (size_t(2) << 30));
  }
  Tensor<R> x(n * C), h(n * C), w(size_t(C) * C), qkv(n * QKV), up(n * 2 * F), act(n * F), wqkv(size_t(QKV) * C, 0.02f),
      wup(size_t(2) * F * C, 0.02f), wdown(size_t(F) * C, 0.02f), head(size_t(V) * C, 0.02f), logits(size_t(rows) * V),
      norm(C);
  Tensor<R> dqkv(n * QKV), out(n * C), dout(n * C), dup(n * 2 * F);
  Tensor<float> gw(size_t(V) * C), mean(n), rstd(n), lse(n * NH), losses(n), one(1);
  Tensor<float> delta(attention_workspace<bf16>({B, T, NH, NH, HS}));
  std::vector<int> host(N);
  std::mt19937 random(2);
  for (int& t : host) t = random() % 4 ? random() % V : random() % 40;
  Buffer<Cuda> tokens_memory(*be, n * sizeof(int));
  int* tokens = tokens_memory.as<int>();
  be->upload(tokens, host.data(), n * sizeof(int));

  auto linear = [&](const char* name, R* y, R* in, R* weight, int M, int IC, int OC) {
    const double flops = 2.0 * M * IC * OC;
    char label[64];
    std::snprintf(label, sizeof label, "%s forward", name);
    row(label, milliseconds([&] { linear_forward(*be, y, in, weight, (R*)nullptr, M, IC, OC); }), 0, flops);
    std::snprintf(label, sizeof label, "%s backward, input", name);
    row(label, milliseconds([&] {
          multiply(*be, Product<R>{in, nullptr, nullptr, IC, M, OC, false, false}, weight, y);
        }),
        0, flops);
    std::snprintf(label, sizeof label, "%s backward, weight", name);
    row(label, milliseconds([&] {
          multiply(*be, Product<float>{gw(), gw(), nullptr, IC, OC, M, false, true}, in, y);
        }),
        0, flops);
  };
  linear("qkv", qkv(), h(), wqkv(), N, C, QKV);
  linear("proj", out(), h(), w(), N, C, C);
  row("proj forward + residual",
      milliseconds([&] { linear_residual_forward(*be, out(), x(), h(), w(), (R*)nullptr, N, C, C); }), 0,
      2.0 * N * C * C);
  linear("up", up(), h(), wup(), N, C, 2 * F);
  linear("down", h(), act(), wdown(), N, F, C);
  linear("head, 9408 rows", logits(), h(), head(), rows, C, V);

  rope_rungs();
  {
    Tensor<float> table(size_t(T) * 64), qk_rstd(n * 2 * NH);
    Tensor<R> raw(n * 2 * C);
    const RopeTable rope = {table(), T, 6, RopePairs::half};
    const RopeShape s = {B, T, NH, NH, HS};
    row("qk-norm + rope forward",
        milliseconds([&] { qk_norm_rope_forward(*be, dqkv(), raw(), qk_rstd(), norm(), norm(), rope, s, 1e-5); }),
        double(n) * 2 * C * 2 * 3);
    row("qk-norm + rope backward", milliseconds([&] {
          qk_norm_rope_backward(*be, dqkv(), gw(), gw(), raw(), qk_rstd(), norm(), norm(), rope, s);
        }),
        double(n) * 2 * C * 2 * 3);
  }
  const AttentionShape s = {B, T, NH, NH, HS};
  const double half = 2.0 * B * NH * T * T / 2 * HS;  // one product of attention
  for (double softcap : {0.0, 50.0}) {
    const std::string label = softcap ? ", soft cap" : "";
    row(("attention forward" + label).c_str(),
        milliseconds([&] { attention_forward(*be, out(), lse(), qkv(), s, softcap); }), 0, 2 * half);
    row(("attention backward" + label).c_str(), milliseconds([&] {
          attention_backward(*be, dqkv(), delta(), dout(), qkv(), out(), lse(), s, softcap);
        }),
        0, 5 * half);
  }
  Buffer<Cuda> sums_memory(*be, 2 * NH * sizeof(double));
  double* sums = sums_memory.as<double>();
  row("attention statistics",
      milliseconds([&] { attention_statistics(*be, sums, sums + NH, delta(), qkv(), lse(), s); }), 0, half);
  row("squares of queries and keys", milliseconds([&] { add_squares(*be, sums, qkv(), N, 2 * NH, HS, QKV); }),
      double(n) * 2 * C * 2);
  const double tensor = double(n) * C * 2;
  row("embedding forward", milliseconds([&] { embedding_forward(*be, x(), tokens, head(), N, C); }), 2 * tensor);
  row("embedding backward", milliseconds([&] { embedding_backward(*be, gw(), x(), tokens, N, V, C); }), tensor);
  for (NormKind kind : {NormKind::rms, NormKind::layer}) {
    const char* label[] = {"rms norm forward", "rms norm backward + residual", "layer norm forward",
                           "layer norm backward + residual"};
    const int k = kind == NormKind::rms ? 0 : 2;
    row(label[k], milliseconds([&] { norm_forward(*be, kind, h(), mean(), rstd(), x(), norm(), norm(), N, C, 1e-5); }),
        2 * tensor);
    row(label[k + 1], milliseconds([&] {
          norm_backward(*be, kind, out(), gw(), gw(), dout(), h(), x(), mean(), rstd(), norm(), N, C);
        }),
        4 * tensor);
  }
  row("swiglu forward", milliseconds([&] { swiglu_forward(*be, act(), up(), N, F); }), double(n) * F * 2 * 3);
  row("swiglu backward", milliseconds([&] { swiglu_backward(*be, dup(), act(), up(), N, F); }), double(n) * F * 2 * 5);
  row("gelu forward", milliseconds([&] { gelu_forward(*be, GeluKind::exact, dup(), up(), N, 2 * F); }),
      double(n) * F * 2 * 4);
  row("gelu backward", milliseconds([&] { gelu_backward(*be, GeluKind::exact, dup(), up(), up(), N, 2 * F); }),
      double(n) * F * 2 * 6);
  row("cross-entropy, 9408 rows",
      milliseconds([&] { cross_entropy(*be, losses(), losses() + rows, logits(), tokens, 1e-5, 0.0, rows, V); }),
      double(rows) * V * 2 * 2);
  {
    const size_t count = size_t(162) << 20;
    Tensor<float> g(count, 1e-3f), master(count), m(count), v(count, 0);
    Tensor<R> p(count);
    Tensor<double> partial(partial_sums(*be, count));
    row("gradient norm, 170 M", milliseconds([&] {
          sum_squares(*be, partial(), g(), count);
          gradient_norm(*be, one(), partial(), partial_sums(*be, count));
        }),
        count * 4.0);
    row("adamw, 170 M", milliseconds([&] {
          adamw(*be, p(), master(), g(), m(), v(), one(), count, {1e-4, 0.9, 0.95, 1e-8, 0.1, 1.0, 1});
        }),
        count * 30.0);
    row("zero gradients, 170 M", milliseconds([&] { be->zero(g(), count * 4); }), count * 4.0);
  }
}

// A line of kernels.csv. bytes: what the kernel must read and write at least, each tensor once; a shape of 0 is none.
static void kernel_row(const char* kernel, const char* rung, const char* dtype, RopeShape s, int R, double bytes,
                       double flops, double ms) {
  std::printf("%s,%s,%s,%d,%d,%d,%d,%d,%d,%.0f,%.0f,%.4g\n", kernel, rung, dtype, s.B, s.T, s.NH, s.NKV, s.HS, R, bytes,
              flops, ms * 1e-3);
  std::fflush(stdout);
}

// The two roofs: what memory and the matrix units do at best, measured as a copy and as a large product.
template <class Real>
static void roofs() {
  const int n = 8192;
  Tensor<Real> a(size_t(n) * n), b(size_t(n) * n), out(size_t(n) * n);
  const double bytes = double(n) * n * sizeof(Real);
  kernel_row("copy", "device to device", dtype_name<Real>(), {}, 0, 2 * bytes, 0, milliseconds([&] {
               check(cudaMemcpyAsync(out(), a(), size_t(bytes), cudaMemcpyDeviceToDevice, be->stream), "copy");
             }));
  kernel_row("matrix product", "cuBLASLt", dtype_name<Real>(), {}, 0, 3 * bytes, 2.0 * n * n * n, milliseconds([&] {
               multiply(*be, Product<Real>{out(), nullptr, nullptr, n, n, n, false, false}, a(), b());
             }));
}

static void rope_ladder(RopeShape s, int R) {
  const size_t heads = size_t(s.B) * s.T * (s.NH + s.NKV);
  for_rope_rungs(s, R, RopePairs::half, [&](const char* name, double ms) {
    kernel_row("rope", name, "bf16", s, R, 4.0 * heads * R + 4.0 * s.T * R, 3.0 * heads * R, ms);
  });
}

template <class Real>
static void attention_ladder(AttentionShape s) {
  const size_t rows = size_t(s.B) * s.T, in = rows * (s.NH + 2 * s.NKV) * s.HS, n = rows * s.NH * s.HS;
  Tensor<Real> qkv(in), dqkv(in), out(n), dout(n);
  Tensor<float> lse(rows * s.NH), delta(attention_workspace<bf16>(s));
  const double product = double(n) * s.T;  // flops: 2 per multiply-add, of half of the T x T pairs
  auto rung = [&](const char* name, auto forward, auto backward) {
    kernel_row("attention forward", name, dtype_name<Real>(), s, 0, (in + n) * sizeof(Real) + 4.0 * rows * s.NH,
               2 * product, milliseconds(forward));
    kernel_row("attention backward", name, dtype_name<Real>(), s, 0,
               (2 * in + 2 * n) * sizeof(Real) + 4.0 * rows * s.NH, 5 * product, milliseconds(backward));
  };
  rung("simple", [&] { simple_attention_forward(*be, out(), lse(), qkv(), s); },
       [&] { simple_attention_backward(*be, dqkv(), delta(), dout(), qkv(), out(), lse(), s); });
  if (use_flash_attention<Real>(*be, s))
    rung("flash", [&] { attention_forward(*be, out(), lse(), qkv(), s); },
         [&] { attention_backward(*be, dqkv(), delta(), dout(), qkv(), out(), lse(), s); });
}

static void kernels() {
  const int N = 65536, C = 768;
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("# %s\nkernel,rung,dtype,B,T,NH,NKV,HS,R,bytes,flops,seconds\n", properties.name);
  roofs<float>();
  roofs<bf16>();
  for (int HS : {64, 128, 256})
    for (int R : {HS, HS / 2, HS / 4, rotary_dim_from_fraction(0.1, HS), 2})
      rope_ladder({N / 1024, 1024, C / HS, C / HS, HS}, R);
  for (int HS : {64, 128})
    for (int T : {256, 1024, 4096}) {
      const AttentionShape s = {N / T, T, C / HS, C / HS, HS};
      attention_ladder<float>(s);
      attention_ladder<bf16>(s);
    }
}

struct Row {
  const char* name;
  int layers, width, heads, kv_heads, head_size, mlp_hidden, vocab, T, B;
  BlockKind block;
};

static Config config_of(const Row& r, int percent) {
  Config c;
  c.layers = r.layers, c.width = r.width, c.heads = r.heads, c.kv_heads = r.kv_heads, c.head_size = r.head_size,
  c.mlp_hidden = r.mlp_hidden, c.vocab = r.vocab;
  c.context = r.T, c.block = r.block, c.rotary_dim = rotary_dim_from_fraction(percent / 100.0, r.head_size);
  resolve(c);
  return c;
}

// A product and what comes next, bf16: as two kernels, as one (Hopper), and as an operation of the trainer, which takes
// the faster. For RoPE the product alone as well: what rotation costs is the difference.
static void fused(const Row& r) {
  const int N = r.B * r.T, C = r.width, F = r.mlp_hidden, QKV = (r.heads + 2 * r.kv_heads) * r.head_size;
  const size_t n = N;
  if (!gemm::supports(*be, 8, 8, nullptr, nullptr, nullptr)) return;
  auto line = [&](const char* what, int R, double apart, double one, double used, double alone, double own) {
    std::printf("%-20s %-18s R %3d  apart %7.3f  one %7.3f  as used %7.3f ms", r.name, what, R, apart, one, used);
    if (alone > 0) std::printf("  product alone %7.3f, own %7.3f", alone, own);
    std::printf("\n");
    std::fflush(stdout);
  };
  Tensor<bf16> x(n * C), w(size_t(2) * F * C, 0.02f), up(n * 2 * F), act(n * F), dup(n * 2 * F);
  const double forward_apart = milliseconds([&] {
    linear_forward(*be, up(), x(), w(), (bf16*)nullptr, N, C, 2 * F);
    swiglu_forward(*be, act(), up(), N, F);
  });
  const double forward = milliseconds(
      [&] { gemm::multiply(*be, up(), x(), w(), N, 2 * F, C, gemm::SwiGlu(act())); });
  line("up, swiglu", 0, forward_apart, forward, milliseconds([&] {
         linear_swiglu_forward(*be, act(), up(), x(), w(), (bf16*)nullptr, N, C, F);
       }), 0, 0);
  auto input = [&] { linear_backward_input(*be, act(), x(), w(), N, F, C); };
  const double backward_apart = milliseconds([&] {
    input();
    swiglu_backward(*be, dup(), act(), up(), N, F);
  });
  const double backward = milliseconds([&] {
    gemm::multiply<true>(*be, dup(), x(), w(), N, F, C, gemm::SwiGluBackward(up(), dup()));
  });
  Tensor<float> dw(size_t(C) * F);
  const double weight = milliseconds(
      [&] { linear_backward_parameters(*be, dw(), (float*)nullptr, x(), act(), N, F, C); });
  line("swiglu, down, back", 0, backward_apart, backward, milliseconds([&] {
         linear_swiglu_backward(*be, dup(), act(), dw(), (float*)nullptr, x(), act(), up(), w(), N, F, C);
       }) - weight, milliseconds(input), milliseconds([&] {
         gemm::multiply<true>(*be, act(), x(), w(), N, F, C, gemm::Store{});
       }));
  // Residuals: by cuBLASLt, which adds them too, and by our own product.
  const int A = r.heads * r.head_size;
  Tensor<bf16> sum(n * C), between(n * C), att(n * A);
  auto by_cublas = [&](bf16* out, const bf16* residual, const bf16* inp, int IC) {
    multiply(*be, Product<bf16>{out, residual, nullptr, C, N, IC, true, false}, w(), inp);
  };
  auto residual_line = [&](const char* what, const bf16* inp, int IC) {
    const double apart = milliseconds([&] { by_cublas(sum(), x(), inp, IC); });
    const double one =
        milliseconds([&] { gemm::multiply(*be, sum(), inp, w(), N, C, IC, gemm::Residual(x(), N, C)); });
    const double used = milliseconds(
        [&] { linear_residual_forward(*be, sum(), x(), inp, w(), (const bf16*)nullptr, N, IC, C); });
    const double alone = milliseconds([&] { linear_forward(*be, sum(), inp, w(), (const bf16*)nullptr, N, IC, C); });
    line(what, 0, apart, one, used, alone, milliseconds([&] {
           gemm::multiply(*be, sum(), inp, w(), N, C, IC, gemm::Store{});
         }));
  };
  residual_line("proj, residual", att(), A);
  residual_line("down, residual", act(), F);
  const double pair_apart =
      milliseconds([&] { by_cublas(between(), x(), att(), A), by_cublas(sum(), between(), act(), F); });
  const double pair = milliseconds([&] {
    linear_pair_residual_forward(*be, sum(), between(), x(), att(), w(), (const bf16*)nullptr, act(), w(),
                                 (const bf16*)nullptr, N, A, F, C);
  });
  line("both at once", 0, pair_apart, pair, pair, 0, 0);
  // The head: its product with the loss, and these with the way back.
  {
    const int V = r.vocab, rows = loss_rows<Cuda>(config_of(r, 10), n);
    Tensor<bf16> logits(size_t(rows) * V), head(size_t(V) * C, 0.01f), dh(size_t(rows) * C);
    Tensor<float> losses(rows), log_z(rows), factors(rows), dhead(size_t(V) * C), sums(divide_up(V, 64) * size_t(rows));
    Tensor<int> targets(rows);
    be->zero(targets(), rows * sizeof(int)), be->zero(log_z(), rows * sizeof(float));
    auto product = [&] { linear_forward(*be, logits(), x(), head(), (const bf16*)nullptr, rows, C, V); };
    auto loss = [&] { cross_entropy(*be, losses(), log_z(), logits(), targets(), 1e-5, 0.0, rows, V); };
    auto both = [&] { product(), loss(); };
    const double product_apart = milliseconds(both), alone = milliseconds(product);
    const double one = milliseconds([&] {
      gemm::multiply(*be, logits(), x(), head(), rows, V, C,
                     gemm::Exponentials(sums(), losses(), log_z(), targets(), rows, V));
    });
    const bool taken = head_in_exponentials(*be, dh(), logits(), x(), head(), rows, C, V);
    line("head, exponentials", 0, product_apart, one, taken ? one : product_apart, alone, milliseconds([&] {
           gemm::multiply(*be, logits(), x(), head(), rows, V, C, gemm::Store{});
         }));
    const double all_apart = milliseconds([&] {
      both();
      linear_backward(*be, dh(), dhead(), (float*)nullptr, logits(), x(), head(), rows, C, V);
    });
    const double all = milliseconds([&] {
      linear_cross_entropy(*be, losses(), log_z(), dh(), dhead(), (float*)nullptr, logits(), factors(), x(), head(),
                           (const bf16*)nullptr, targets(), 1e-5, 0.0, rows, C, V);
    });
    line("head, loss, back", 0, all_apart, all, all, 0, 0);
  }
  Tensor<bf16> qkv(n * QKV);
  Tensor<float> angles(size_t(r.T) * r.head_size);
  const double alone = milliseconds([&] { linear_forward(*be, qkv(), x(), w(), (bf16*)nullptr, N, C, QKV); });
  const double own = milliseconds([&] { gemm::multiply(*be, qkv(), x(), w(), N, QKV, C, gemm::Store{}); });
  for (double fraction : {0.1, 0.25, 1.0}) {
    const int R = rotary_dim_from_fraction(fraction, r.head_size);
    const RopeShape s = {r.B, r.T, r.heads, r.kv_heads, r.head_size};
    const RopeTable table(angles(), r.T, R, RopePairs::half);
    const double apart = milliseconds([&] {
      linear_forward(*be, qkv(), x(), w(), (bf16*)nullptr, N, C, QKV);
      rope_forward(*be, qkv(), table, s);
    });
    double one = 0;
    with_rope_epilogue(table, s, [&](auto epilogue) {
      one = milliseconds([&] { gemm::multiply(*be, qkv(), x(), w(), N, QKV, C, epilogue); });
    });
    line("qkv, rope", R, apart, one, milliseconds([&] {
           linear_rope_forward(*be, qkv(), x(), w(), (bf16*)nullptr, table, s, C);
         }), alone, own);
  }
}

// A model, and what its training steps read.
struct Training {
  const Config c;
  const int B, T, N;
  Model<Cuda, bf16> model;
  HostArray<Cuda, int> tokens;
  int steps = 0;
  Training(const Row& r, int percent)
      : c(config_of(r, percent)), B(r.B), T(r.T), N(r.B * r.T), model(*be, c, r.B, r.T, true), tokens(*be, N + 1) {
    model.initialise_weights(1);
    std::mt19937 random(3);
    for (int n = 0; n <= N; ++n) tokens.data[n] = random() % c.vocab;
  }
  void update() { model.update({1e-4, 0.9, 0.95, 1e-8, 0.1, 1.0, ++steps}); }
  void step() {
    model.zero_gradients();
    model.train_batch(tokens.data, tokens.data + 1, 1.0 / N, 0);
    update();
  }
};

static void whole_steps(const Row& r) {
  for (int percent : {0, 10, 100}) {
    Training run(r, percent);
    const Config& c = run.c;
    Model<Cuda, bf16>& model = run.model;
    const int N = run.N;
    auto zero = [&] { model.zero_gradients(); };
    auto forward = [&] { model.forward(run.tokens.data, r.B, r.T); };
    auto backward = [&] { model.backward(run.tokens.data + 1, r.B, r.T, 1.0 / N, 0); };
    auto update = [&] { run.update(); };
    const int runs = r.layers * r.width > 20000 ? 3 : 10;
    const double ms = milliseconds([&] { zero(), forward(), backward(), update(); }, runs);
    const double f = milliseconds(forward, runs), b = milliseconds(backward, runs), u = milliseconds(update, runs);
    // 6 per parameter that multiplies and token, and attention: 4 T C forward per token halved by the mask, thrice.
    const double multiplying = double(model.table.parameters) - double(c.vocab) * c.width;
    const double flops = N * (6.0 * multiplying + 6.0 * c.layers * c.heads * c.head_size * r.T);
    std::printf(
        "%-22s %3d %% RoPE %9.2f ms %10.0f tokens/s %6.0f TFLOP/s   forward %8.2f backward %8.2f update %7.2f\n",
        r.name, percent, ms, N / ms * 1e3, flops / ms * 1e-9, f, b, u);
    std::fflush(stdout);
  }
}

// Milliseconds of work() when it runs for two seconds without a pause, so at the clock that the card holds under that load:
// the median of runs of about a tenth of a second, but for those of the first second.
template <class Work>
static double sustained_milliseconds(Work work) {
  work();
  const int times = std::max(1, int(100 / milliseconds_once(*be, work)));
  std::vector<double> ms;
  for (double all = 0; all < 2000; all += ms.back() * times) {
    if (all < 1000) ms.clear();
    ms.push_back(milliseconds_once(*be, [&] {
                   for (int i = 0; i < times; ++i) work();
                 }) / times);
  }
  std::sort(ms.begin(), ms.end());
  return ms[ms.size() / 2];
}

// What a step cannot be faster than with its products and its attention one after the other as they are, each in a loop
// of its own, as the step is; all else would cost no more than to read and write its tensors once, at the rate of a copy,
// RoPE nothing.
static void step_floor(const Row& r) {
  Training run(r, 10);
  const Config& c = run.c;
  Model<Cuda, bf16>& model = run.model;
  const int N = run.N, C = c.width, A = c.heads * c.head_size, F = c.mlp_hidden, V = c.vocab, QKV = c.qkv_width();
  auto& d = model.grads;
  auto products = [&] {
    for (int l = 0; l < c.layers; ++l) {
      const auto& w = model.weights.blocks[l];
      const auto& a = model.acts.blocks[l];
      linear_forward(*be, a.qkv, a.h1, w.qkv, (bf16*)nullptr, N, C, QKV);
      linear_forward(*be, a.up, a.h2, w.up, (bf16*)nullptr, N, C, 2 * F);
      if (c.block == BlockKind::parallel) {
        linear_pair_residual_forward(*be, model.acts.x, a.x2, a.x, a.att, w.proj, (bf16*)nullptr, a.act, w.down,
                                     (bf16*)nullptr, N, A, F, C);
      } else {
        linear_residual_forward(*be, a.x2, a.x, a.att, w.proj, (bf16*)nullptr, N, A, C);
        linear_residual_forward(*be, model.acts.x, a.x2, a.act, w.down, (bf16*)nullptr, N, F, C);
      }
    }
    for (int n = 0, chunk = loss_rows<Cuda>(c, N); n < N; n += chunk) {
      const int rows = std::min(chunk, N - n);
      const bf16* final = model.acts.final + size_t(n) * C;
      linear_forward(*be, model.acts.logits, final, model.weights.head, (bf16*)nullptr, rows, C, V);
      linear_backward(*be, d.dh + size_t(n) * C, model.gradients.head, (float*)nullptr, model.acts.logits, final,
                      model.weights.head, rows, C, V, n == 0);
    }
    for (int l = c.layers - 1; l >= 0; --l) {
      const auto& w = model.weights.blocks[l];
      const auto& g = model.gradients.blocks[l];
      const auto& a = model.acts.blocks[l];
      linear_backward(*be, d.dact, g.down, (float*)nullptr, d.dx, a.act, w.down, N, F, C, true);
      linear_backward(*be, d.dh, g.up, (float*)nullptr, d.dup, a.h2, w.up, N, C, 2 * F, true);
      linear_backward(*be, d.datt, g.proj, (float*)nullptr, d.dx, a.att, w.proj, N, A, C, true);
      linear_backward(*be, d.dh, g.qkv, (float*)nullptr, d.dqkv, a.h1, w.qkv, N, C, QKV, true);
    }
  };
  auto attention = [&] {
    const RopeShape s = c.heads_shape(r.B, r.T, 0);
    for (int l = 0; l < c.layers; ++l) {
      const auto& a = model.acts.blocks[l];
      attention_forward(*be, a.att, a.lse, a.qkv, s);
      attention_backward(*be, d.dqkv, d.D, d.datt, a.qkv, a.att, a.lse, s);
    }
  };
  const size_t copied = size_t(2) << 30;
  Tensor<char> from(copied), to(copied);
  auto copy = [&] { check(cudaMemcpyAsync(to(), from(), copied, cudaMemcpyDeviceToDevice, be->stream), "copy"); };
  // Elements of activations, 2 bytes: a block's two norms, forward (x, h) and backward (dh, x, the gradient that runs
  // past, dx), and SwiGLU (act written; gate, up read, their gradients written); embedding and final norm; the logits, or
  // where they are not read, their targets' weights, and the head's input and its gradient, which are scaled.
  const bool exponentials = head_in_exponentials(*be, d.dh, model.acts.logits, model.acts.final, model.weights.head,
                                                 loss_rows<Cuda>(c, N), C, V);
  const double loss = exponentials ? 2.0 * C + 4.0 * C : 2.0 * V;
  const double elements = double(N) * (c.layers * (2 * 6.0 * C + 5.0 * F) + 4.0 * C + 5.0 * C + loss);
  const double parameters = double(model.table.parameters);  // 4 bytes for the norm; gradient, m, v, master, weight
  const double bytes = 2 * elements + parameters * (4 + 30);
  for (int i = 0; i < 3; ++i) run.step();  // chooses algorithms, and records the step
  const double step_ms = sustained_milliseconds([&] { run.step(); }), product_ms = sustained_milliseconds(products),
               attention_ms = sustained_milliseconds(attention),
               rest_ms = sustained_milliseconds(copy) * bytes / (2.0 * copied),
               floor_ms = product_ms + attention_ms + rest_ms;
  std::printf("%-22s step %8.2f ms %9.0f tokens/s   floor %8.2f ms %9.0f tokens/s = products %.2f + attention %.2f + "
              "%.1f GB of the rest %.2f\n",
              r.name, step_ms, N / step_ms * 1e3, floor_ms, N / floor_ms * 1e3, product_ms, attention_ms, bytes * 1e-9,
              rest_ms);
  std::fflush(stdout);
}

// Four models at once, so that they can take turns of a few steps: without rotation, with 10 %, with 100 %, and without
// again. The card's clock follows its load and warmth, so that a turn is compared with those of its own round; the last
// model says what equal ones differ by. The error is that of the mean over the rounds.
static void rotation(const Row& r, int rounds) {
  const std::vector<int> percents = {0, 10, 100, 0};
  const int steps = std::max(1, 40000 / (r.layers * r.width));
  std::vector<std::unique_ptr<Training>> runs;
  for (int percent : percents) runs.push_back(std::make_unique<Training>(r, percent));
  std::vector<std::vector<double>> ms(runs.size());
  for (int round = -2; round < rounds; ++round)
    for (size_t k = 0; k < runs.size(); ++k) {
      const size_t i = round % 2 ? runs.size() - 1 - k : k;  // there and back
      const double time = milliseconds_once(*be, [&] {
        for (int n = 0; n < steps; ++n) runs[i]->step();
      });
      if (round >= 0) ms[i].push_back(time / steps);
    }
  std::printf("%s, %d rounds of %d steps\n", r.name, rounds, steps);
  for (size_t i = 0; i < runs.size(); ++i) {
    double sum = 0, square = 0, all = 0;
    for (int round = 0; round < rounds; ++round) {
      const double none = i == 0 || i + 1 == runs.size() ? ms[0][round] : (ms[0][round] + ms.back()[round]) / 2;
      const double more = 100 * (ms[i][round] / none - 1);
      sum += more, square += more * more, all += ms[i][round];
    }
    const double mean = sum / rounds, error = std::sqrt((square / rounds - mean * mean) / (rounds - 1));
    std::printf("%4d %% RoPE %9.3f ms %10.0f tokens/s", percents[i], all / rounds, runs[i]->N / (all / rounds) * 1e3);
    const char* equal = i + 1 == runs.size() ? ", though it is the same" : "";
    if (i > 0) std::printf("   %+6.2f %% +- %.2f of a step%s", mean, error, equal);
    std::printf("\n");
  }
}

int main(int argc, char** argv) {
  try {
    Cuda cuda;
    be = &cuda;
    const std::string only = argc > 1 ? argv[1] : "";
    if (only == "kernels") {
      kernels();
      return 0;
    }
    if (only.empty() || only == "ops") operations();
    if (only == "ops") return 0;
    const BlockKind sequential = BlockKind::sequential, parallel = BlockKind::parallel;
    for (const Row& r : {Row{"12 x 768", 12, 768, 12, 12, 64, 2048, 50304, 1024, 64, sequential},
                         Row{"6 x 384", 6, 384, 6, 6, 64, 1024, 256, 256, 64, sequential},
                         Row{"12 x 256, parallel", 12, 256, 2, 2, 128, 704, 4096, 2048, 32, parallel},
                         Row{"llama-1b", 16, 2048, 32, 8, 64, 8192, 50304, 2048, 8, sequential}})
      if (argc < 3 || std::string(r.name).find(argv[2]) != std::string::npos) {
        if (only == "fused") fused(r);
        if (only.empty() || only == "steps") whole_steps(r);
        if (only.empty() || only == "floor") step_floor(r);
        if (only == "rotation" && argc > 2) rotation(r, argc > 3 ? std::max(2, std::atoi(argv[3])) : 24);
      }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 2;
  }
}
