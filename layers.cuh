#pragma once
// The layers between the attentions: embedding, norms, linear, MLP activations, loss. Forward and backward side by
// side. N rows are tokens (N = B*T unless said otherwise), C the width.

#include <vector>

#include "device/backend.h"
#include "device/gemm.cuh"
#include "device/matmul.cuh"
#include "rope.cuh"

enum class NormKind { rms, layer };
enum class GeluKind { exact, tanh };

// ---------------------------------------------------------------------------------------------------------------------
// CPU

// x (N, C) = rows of weight (V, C) chosen by tokens (N).
template <class Real>
void embedding_forward(Cpu&, Real* x, const int* tokens, const Real* weight, int N, int C) {
#pragma omp parallel for
  for (int n = 0; n < N; ++n) std::memcpy(x + size_t(n) * C, weight + size_t(tokens[n]) * C, C * sizeof(Real));
}

// dweight (V, C) += dx (N, C), each row at its token. A thread owns some columns of all rows, so that the order of the
// sums is that of the tokens. The row of a token that occurs k times is off by at most k u of the sum of |dx|.
template <class Real>
void embedding_backward(Cpu&, Acc<Real>* dweight, const Real* dx, const int* tokens, int N, int V, int C) {
  (void)V;
  const int columns = 64;
#pragma omp parallel for
  for (int c0 = 0; c0 < C; c0 += columns)
    for (int n = 0; n < N; ++n)
      // In the forward pass row tokens[n] was copied to row n, so each copy's gradient comes back to the one row.
      for (int c = c0; c < std::min(c0 + columns, C); ++c) dweight[size_t(tokens[n]) * C + c] += dx[size_t(n) * C + c];
}

// RMSNorm:    out = x / sqrt(mean(x^2) + eps) * weight
// LayerNorm:  out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
// out, x (N, C); weight, bias (C); keeps mean (N, LayerNorm only) and rstd (N) for the backward pass.
// Errors: rstd, relatively, by (kSumChunk / 2 + 4) u at most, however much larger than the others some channels are.
template <class Real>
void norm_forward(Cpu&, NormKind kind, Real* out, Acc<Real>* mean, Acc<Real>* rstd, const Real* x, const Real* weight,
                  const Real* bias, int N, int C, double eps) {
#pragma omp parallel for
  for (int n = 0; n < N; ++n) {
    const Real* row = x + size_t(n) * C;
    Real m = 0;
    if (kind == NormKind::layer) mean[n] = m = Real(sum_in_chunks<Real>(C, [=](int c) { return row[c]; }) / C);
    // The variance around the mean in a second pass: mean(x^2) - mean(x)^2 would lose its digits where m is large. For
    // RMSNorm m is 0.
    const Real v = Real(sum_in_chunks<Real>(C, [=](int c) { return (row[c] - m) * (row[c] - m); }) / C);
    const Real r = Real(1) / std::sqrt(v + Real(eps));
    rstd[n] = r;
    Real* o = out + size_t(n) * C;
    if (kind == NormKind::layer)
      for (int c = 0; c < C; ++c) o[c] = (row[c] - m) * r * weight[c] + bias[c];
    else
      for (int c = 0; c < C; ++c) o[c] = row[c] * r * weight[c];
  }
}

// dx (N, C) = dresidual + the gradient through the norm: x feeds both the norm and the residual stream past it, and
// the two gradients meet here. dx may be dresidual itself; dresidual = nullptr where nothing runs past the norm.
// dweight, dbias (C) accumulate. With xhat = (x - mean) rstd and g = dout * weight:
//     dx = rstd (g - mean(g) - xhat mean(g xhat)), without the term mean(g) for RMSNorm.
// Errors: the means, dweight and dbias by (kSumChunk + 4) u at most of the mean, or the sum, of their terms' sizes.
template <class Real>
void norm_backward(Cpu&, NormKind kind, Real* dx, Acc<Real>* dweight, Acc<Real>* dbias, const Real* dresidual,
                   const Real* dout, const Real* x, const Acc<Real>* mean, const Acc<Real>* rstd, const Real* weight,
                   int N, int C) {
  const bool layer = kind == NormKind::layer;
  std::vector<Acc<Real>> partial(size_t(row_chunks(N)) * 2 * C);  // (chunks, weight or bias, C)
  for_row_chunks(N, [&](int chunk, int begin, int end) {
    Acc<Real>* dw = &partial[size_t(chunk) * 2 * C];
    Acc<Real>* db = dw + C;
    for (int n = begin; n < end; ++n) {
      const Real *row = x + size_t(n) * C, *d = dout + size_t(n) * C;
      const Real m = layer ? mean[n] : 0, r = rstd[n];
      // Forward, xhat = (x - mean) rstd and out = xhat weight + bias. So dweight = dout xhat and g = dout weight is the
      // gradient of xhat; through mean and rstd each x is in every xhat of the row, which gives the two means over g.
      const Real gx_mean = Real(sum_in_chunks<Real>(C, [=](int c) {
        const Real xhat = (row[c] - m) * r;
        dw[c] += d[c] * xhat;
        return d[c] * weight[c] * xhat;
      }) / C);
      const Real g_mean = !layer ? 0 : Real(sum_in_chunks<Real>(C, [=](int c) {
        db[c] += d[c];
        return d[c] * weight[c];
      }) / C);
      // The branch's gradient joins that of the stream past it.
      Real* o = dx + size_t(n) * C;
      const Real* past = dresidual ? dresidual + size_t(n) * C : nullptr;
      for (int c = 0; c < C; ++c) {
        const Real xhat = (row[c] - m) * r;
        o[c] = (past ? past[c] : Real(0)) + r * (d[c] * weight[c] - g_mean - xhat * gx_mean);
      }
    }
  });
  add_row_chunks(dweight, partial.data(), N, C, 2 * C);
  if (layer) add_row_chunks(dbias, partial.data() + C, N, C, 2 * C);
}

// Two norms of the same x, as in the parallel block: out1 and out2 (N, C) by their own weights and biases (C). mean and
// rstd (N) are the same for both.
template <class Real>
void norm_pair_forward(Cpu& be, NormKind kind, Real* out1, Real* out2, Acc<Real>* mean, Acc<Real>* rstd, const Real* x,
                       const Real* weight1, const Real* bias1, const Real* weight2, const Real* bias2, int N, int C,
                       double eps) {
  norm_forward(be, kind, out1, mean, rstd, x, weight1, bias1, N, C, eps);
  norm_forward(be, kind, out2, mean, rstd, x, weight2, bias2, N, C, eps);
}

// dx (N, C) = dresidual + the gradient through both norms, from dout1 and dout2 (N, C); dweight and dbias (C) of each
// accumulate. dx may be dresidual. The two may share a weight.
template <class Real>
void norm_pair_backward(Cpu& be, NormKind kind, Real* dx, Acc<Real>* dweight1, Acc<Real>* dbias1, Acc<Real>* dweight2,
                        Acc<Real>* dbias2, const Real* dresidual, const Real* dout1, const Real* dout2, const Real* x,
                        const Acc<Real>* mean, const Acc<Real>* rstd, const Real* weight1, const Real* weight2, int N,
                        int C) {
  norm_backward(be, kind, dx, dweight2, dbias2, dresidual, dout2, x, mean, rstd, weight2, N, C);
  norm_backward(be, kind, dx, dweight1, dbias1, (const Real*)dx, dout1, x, mean, rstd, weight1, N, C);
}

// out (N, OC) = inp (N, IC) weight^T + bias; weight (OC, IC), bias (OC) or nullptr. torch.nn.functional.linear.
template <class Real>
void linear_forward(Cpu&, Real* out, const Real* inp, const Real* weight, const Real* bias, int N, int IC, int OC) {
  matmul(out, bias, 0, row_major(inp, IC), transposed(weight, IC), N, OC, IC);
}

// out (N, OC) = residual (N, OC) + inp (N, IC) weight^T + bias: a branch joins the residual stream.
template <class Real>
void linear_residual_forward(Cpu&, Real* out, const Real* residual, const Real* inp, const Real* weight,
                             const Real* bias, int N, int IC, int OC) {
  if (bias) {  // the product adds to one thing only
#pragma omp parallel for
    for (int n = 0; n < N; ++n)
      for (int c = 0; c < OC; ++c) out[size_t(n) * OC + c] = residual[size_t(n) * OC + c] + bias[c];
    residual = out;
  }
  matmul(out, residual, OC, row_major(inp, IC), transposed(weight, IC), N, OC, IC);
}

// dinp (N, IC) = dout (N, OC) weight;  dweight (OC, IC) += dout^T inp;  dbias (OC) += column sums of dout. With `first`,
// dweight is assigned, whatever it held.
// Errors: products as matmul.cuh says; dbias by kSumChunk u at most of the sum of |dout|.
template <class Real>
void linear_backward(Cpu&, Real* dinp, Acc<Real>* dweight, Acc<Real>* dbias, const Real* dout, const Real* inp,
                     const Real* weight, int N, int IC, int OC, bool first = false) {
  // Forward, out[n][o] = sum_i inp[n][i] weight[o][i] + bias[o]. Each factor's gradient is dout times the other factor,
  // summed over the index that it does not have: inp's over o, the weight's over n; so is the bias's, times 1.
  matmul<Real>(dinp, nullptr, 0, row_major(dout, OC), row_major(weight, IC), N, IC, OC);
  matmul<Real>(dweight, first ? nullptr : dweight, IC, transposed(dout, OC), row_major(inp, IC), OC, IC, N);
  if (!dbias) return;
  std::vector<Acc<Real>> partial(size_t(row_chunks(N)) * OC);  // (chunks, OC)
  for_row_chunks(N, [&](int chunk, int begin, int end) {
    Acc<Real>* sum = &partial[size_t(chunk) * OC];
    for (int n = begin; n < end; ++n)
      for (int c = 0; c < OC; ++c) sum[c] += dout[size_t(n) * OC + c];
  });
  add_row_chunks(dbias, partial.data(), N, OC, OC);
}

// SwiGLU (Shazeer 2020, arXiv 2002.05202): out (N, F) = silu(gate) * up, with gate and up the halves of gate_up
// (N, 2F); silu(z) = z / (1 + e^-z).
template <class Real>
void swiglu_forward(Cpu&, Real* out, const Real* gate_up, int N, int F) {
#pragma omp parallel for
  for (int n = 0; n < N; ++n) {
    const Real *gate = gate_up + size_t(n) * 2 * F, *up = gate + F;
    Real* o = out + size_t(n) * F;
    for (int f = 0; f < F; ++f) o[f] = gate[f] / (Real(1) + exp_(-gate[f])) * up[f];
  }
}

// A linear layer and SwiGLU at once: gate_up (N, 2F) = inp (N, C) weight (2F, C)^T [+ bias], and
// out (N, F) = swiglu(gate_up).
template <class Real>
void linear_swiglu_forward(Cpu& be, Real* out, Real* gate_up, const Real* inp, const Real* weight, const Real* bias,
                           int N, int C, int F) {
  linear_forward(be, gate_up, inp, weight, bias, N, C, 2 * F);
  swiglu_forward(be, out, gate_up, N, F);
}

// dgate_up (N, 2F) from dout (N, F).
template <class Real>
void swiglu_backward(Cpu&, Real* dgate_up, const Real* dout, const Real* gate_up, int N, int F) {
#pragma omp parallel for
  for (int n = 0; n < N; ++n) {
    const Real *gate = gate_up + size_t(n) * 2 * F, *up = gate + F, *d = dout + size_t(n) * F;
    Real *dgate = dgate_up + size_t(n) * 2 * F, *dup = dgate + F;
    for (int f = 0; f < F; ++f) {
      // Forward, out = silu(gate) up with silu(z) = z sigmoid(z), whose slope is sigmoid + silu (1 - sigmoid).
      const Real sigmoid = Real(1) / (Real(1) + exp_(-gate[f]));
      const Real silu = gate[f] * sigmoid;
      dgate[f] = d[f] * up[f] * (sigmoid + silu * (Real(1) - sigmoid));
      dup[f] = d[f] * silu;
    }
  }
}

// Backward through SwiGLU and the linear layer behind it, out (N, C) = swiglu(gate_up) weight (C, F)^T [+ bias]:
// dgate_up (N, 2F) from dout (N, C), and dweight, dbias as in linear_backward(). act (N, F) is swiglu(gate_up), dact (N, F)
// room for its gradient, which may not be made.
template <class Real>
void linear_swiglu_backward(Cpu& be, Real* dgate_up, Real* dact, Acc<Real>* dweight, Acc<Real>* dbias, const Real* dout,
                            const Real* act, const Real* gate_up, const Real* weight, int N, int F, int C,
                            bool first = false) {
  linear_backward(be, dact, dweight, dbias, dout, act, weight, N, F, C, first);
  swiglu_backward(be, dgate_up, dact, gate_up, N, F);
}

// A linear layer and RoPE at once: the rows of qkv (B, T, NH + 2*NKV, HS) from position s.first on are inp weight^T
// [+ bias], weight (., C), then their queries and keys are turned. inp has those rows only; with s.first > 0, B is 1.
template <class Real>
void linear_rope_forward(Cpu& be, Real* qkv, const Real* inp, const Real* weight, const Real* bias,
                         const RopeTable& table, RopeShape s, int C) {
  const int width = (s.NH + 2 * s.NKV) * s.HS;
  linear_forward(be, qkv + size_t(s.first) * width, inp, weight, bias, s.B * (s.T - s.first), C, width);
  rope_forward(be, qkv, table, s);
}

// 2u of GELU's tanh form below, and its derivative.
template <class Real>
HOST_DEVICE inline Real tanh_gelu_2u(Real x) {
  return Real(1.5957691216057308) * (x + Real(0.044715) * x * x * x);  // 2 sqrt(2/pi)
}
template <class Real>
HOST_DEVICE inline Real tanh_gelu_2u_slope(Real x) {
  return Real(1.5957691216057308) * (Real(1) + Real(3 * 0.044715) * x * x);
}

// GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415): out = x Phi(x), out, x (N, F).
//     exact:  Phi(x) = (1 + erf(x / sqrt(2))) / 2, the normal distribution.     torch.nn.functional.gelu
//     tanh:   Phi(x) = (1 + tanh(u)) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3).    the same, approximate="tanh"
template <class Real>
void gelu_forward(Cpu&, GeluKind kind, Real* out, const Real* x, int N, int F) {
#pragma omp parallel for
  for (int n = 0; n < N; ++n) {
    const Real* row = x + size_t(n) * F;
    Real* o = out + size_t(n) * F;
    if (kind == GeluKind::exact)
      for (int f = 0; f < F; ++f) o[f] = row[f] * Real(0.5) * (Real(1) + std::erf(row[f] * Real(M_SQRT1_2)));
    else  // (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), which keeps its digits where tanh is nearly -1
      for (int f = 0; f < F; ++f) o[f] = row[f] / (Real(1) + exp_(-tanh_gelu_2u(row[f])));
  }
}

// dx (N, F) from dout: d/dx x Phi(x) = Phi(x) + x Phi'(x).
template <class Real>
void gelu_backward(Cpu&, GeluKind kind, Real* dx, const Real* dout, const Real* x, int N, int F) {
#pragma omp parallel for
  for (int n = 0; n < N; ++n) {
    const Real *row = x + size_t(n) * F, *d = dout + size_t(n) * F;
    Real* to = dx + size_t(n) * F;
    if (kind == GeluKind::exact)
      for (int f = 0; f < F; ++f) {
        const Real Phi = Real(0.5) * (Real(1) + std::erf(row[f] * Real(M_SQRT1_2)));
        const Real phi = exp_(Real(-0.5) * row[f] * row[f]) * Real(0.3989422804014327);  // 1/sqrt(2 pi)
        to[f] = d[f] * (Phi + row[f] * phi);
      }
    else  // the derivative of 1 / (1 + e^-2u) is Phi (1 - Phi) times that of 2u
      for (int f = 0; f < F; ++f) {
        const Real Phi = Real(1) / (Real(1) + exp_(-tanh_gelu_2u(row[f])));
        to[f] = d[f] * (Phi + row[f] * Phi * (Real(1) - Phi) * tanh_gelu_2u_slope(row[f]));
      }
  }
}

// Softmax cross-entropy with the log Z penalty of z-loss (Chowdhery et al. 2022, arXiv 2204.02311):
//     loss = log Z - logit[target] + z_loss (log Z)^2,  Z = sum exp(logit), in nats.
// Reads logits (N, V) and writes the gradient of scale * sum(losses) in their place; losses (N) without the penalty, so
// that runs compare, and log_z (N). Rows whose target is negative have loss, log_z and gradient 0.
// Errors: log Z is off by at most (kSumChunk + 4) u, for the sum and exp_, and one rounding; so is a probability,
// relatively. It does not grow with V.
template <class Real>
void cross_entropy(Cpu&, Acc<Real>* losses, Acc<Real>* log_z, Real* logits, const int* targets, double scale,
                   double z_loss, int N, int V) {
#pragma omp parallel for
  for (int n = 0; n < N; ++n) {
    Real* row = logits + size_t(n) * V;
    if (targets[n] < 0) {
      losses[n] = log_z[n] = 0;
      for (int v = 0; v < V; ++v) row[v] = 0;
      continue;
    }
    // Relative to the largest logit no exponential overflows, and the sum is 1 at least.
    Real highest = row[0];
#pragma omp simd reduction(max : highest)
    for (int v = 1; v < V; ++v) highest = row[v] > highest ? row[v] : highest;
    const double target_logit = row[targets[n]];
    const double sum = sum_in_chunks<Real>(V, [=](int v) { return row[v] = exp_(row[v] - highest); });
    // Where the target is all but certain, log Z and its logit are nearly the same number: their difference is taken
    // before anything is rounded to Real.
    log_z[n] = Acc<Real>(highest + std::log(sum));
    losses[n] = Acc<Real>(highest - target_logit + std::log(sum));
    // d log Z / d logit is the probability p = e^logit / Z. So the gradient of log Z - logit[target] + z_loss (log Z)^2
    // is p (1 + 2 z_loss log Z), less 1 at the target.
    const Real factor = Real(scale * (1 + 2 * z_loss * log_z[n]) / sum);
    for (int v = 0; v < V; ++v) row[v] *= factor;
    row[targets[n]] -= Real(scale);
  }
}

// loss (1) += the sum of losses (N), z (1) += that of log_z (N); added up in order, in double.
template <class Real>
void add_losses(Cpu&, double* loss, double* z, const Real* losses, const Real* log_z, int N) {
  double loss_sum = 0, z_sum = 0;
  for (int n = 0; n < N; ++n) loss_sum += losses[n], z_sum += log_z[n];
  *loss += loss_sum;
  *z += z_sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA. Kernels of W elements per access: 16 bytes' worth, or 1 where a width or an address does not allow it.

#ifdef __CUDACC__

#include <cub/device/device_radix_sort.cuh>

// A thread copies W channels of one row.
template <class Real, int W>
__global__ void embedding_forward_kernel(Real* x, const int* tokens, const Real* weight, int N, int C) {
  const int vectors = C / W;
  const size_t id = blockIdx.x * size_t(blockDim.x) + threadIdx.x, n = id / vectors;
  if (n >= N) return;
  const int c = int(id % vectors) * W;
  using Part = Vector<Real, W>;
  *reinterpret_cast<Part*>(x + n * C + c) = *reinterpret_cast<const Part*>(weight + size_t(tokens[n]) * C + c);
}

template <class Real>
void embedding_forward(Cuda& be, Real* x, const int* tokens, const Real* weight, int N, int C) {
  with_width<kWide<Real>>(wide(C, x, weight), [&](auto W) {
    launch(be, "embedding_forward", embedding_forward_kernel<Real, W()>, divide_up(size_t(N) * C / W(), 256), 256, 0, x,
           tokens, weight, N, C);
  });
}

// For the backward pass, the rows are sorted by token; the sort is stable, so that the rows of a token are added up in
// their order, whatever the order in which blocks run.

static __global__ void count_up_kernel(int* to, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] = i;
}
// Where the rows of each token begin and end in the sorted list; both 0 for a token that does not occur.
static __global__ void find_tokens_kernel(int* begin, int* end, const int* sorted, int N) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= N) return;
  if (i == 0 || sorted[i] != sorted[i - 1]) begin[sorted[i]] = i;
  if (i == N - 1 || sorted[i] != sorted[i + 1]) end[sorted[i]] = i + 1;
}

constexpr int kEmbeddingWarps = 8;

// The sum of every step-th of the rows begin .. end-1 of the list, in the W columns from c on.
template <class Real, int W>
__device__ __forceinline__ void add_rows_of_token(float (&sum)[W], const Real* dx, const int* rows, int begin, int end,
                                                  int step, int C, int c) {
#pragma unroll 4
  for (int i = begin; i < end; i += step) {
    float d[W];
    load<W>(d, dx + size_t(rows[i]) * C + c);
#pragma unroll
    for (int k = 0; k < W; ++k) sum[k] += d[k];
  }
}
template <int W>
__device__ __forceinline__ void add_to(float* to, const float (&sum)[W]) {
  float old[W];
  load<W>(old, to);
#pragma unroll
  for (int k = 0; k < W; ++k) old[k] += sum[k];
  store<W>(to, old);
}

// A block has 8 tokens, gridDim.x apart, and 32 W columns. A warp adds up the rows of one token, a lane W columns of
// them; where a token is frequent, all warps share its rows.
template <class Real, int W>
__global__ void __launch_bounds__(kEmbeddingWarps * 32)
    embedding_backward_kernel(float* dweight, const Real* dx, const int* rows, const int* begin, const int* end, int V,
                              int C) {
  __shared__ float sums[kEmbeddingWarps][32 * W];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = (blockIdx.y * 32 + lane) * W;
  constexpr int kFrequent = 32;  // rows; a frequent token has thousands, for which seven warps would wait
  for (int i = 0; i < kEmbeddingWarps; ++i) {
    const int token = blockIdx.x + i * gridDim.x;
    if (token >= V) break;
    const int first = begin[token], last = end[token];
    const bool frequent = last - first > kFrequent;  // the same for the whole block
    float sum[W] = {};
    if (!frequent) {  // the i-th token is the i-th warp's alone
      if (i != warp || first == last || c >= C) continue;
      add_rows_of_token<Real, W>(sum, dx, rows, first, last, 1, C, c);
      add_to<W>(dweight + size_t(token) * C + c, sum);
      continue;
    }
    if (c < C) add_rows_of_token<Real, W>(sum, dx, rows, first + warp, last, kEmbeddingWarps, C, c);
    for (int k = 0; k < W; ++k) sums[warp][k * 32 + lane] = sum[k];
    __syncthreads();
    if (warp == 0 && c < C) {  // the warps' sums in their order, so that the bits are always the same
      for (int w = 1; w < kEmbeddingWarps; ++w)
        for (int k = 0; k < W; ++k) sum[k] += sums[w][k * 32 + lane];
      add_to<W>(dweight + size_t(token) * C + c, sum);
    }
    __syncthreads();  // before the next frequent token overwrites them
  }
}

template <class Real>
void embedding_backward(Cuda& be, Acc<Real>* dweight, const Real* dx, const int* tokens, int N, int V, int C) {
  // In the workspace: begin (V), end (V), sorted (N), rows (N), counts (N), then the sort's own memory.
  int* memory = static_cast<int*>(be.workspace);
  int *begin = memory, *end = begin + V, *sorted = end + V, *rows = sorted + N, *counts = rows + N;
  void* temporary = memory + (2 * size_t(V) + 3 * size_t(N) + 63) / 64 * 64;
  int bits = 1;  // of a token: the sort's time grows with them
  while (bits < 31 && V > 1 << bits) ++bits;
  size_t bytes = 0;
  check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, tokens, sorted, counts, rows, N, 0, bits, be.stream), "sort");
  if (static_cast<char*>(temporary) + bytes > static_cast<char*>(be.workspace) + Cuda::kWorkspaceBytes)
    throw UserError("--batch: too many tokens at once to sort them (" + std::to_string(N) + "); use a smaller --batch");
  launch(be, "count_up", count_up_kernel, divide_up(N, 256), 256, 0, counts, N);
  check(cub::DeviceRadixSort::SortPairs(temporary, bytes, tokens, sorted, counts, rows, N, 0, bits, be.stream), "sort");
  be.zero(begin, 2 * size_t(V) * sizeof(int));
  launch(be, "find_tokens", find_tokens_kernel, divide_up(N, 256), 256, 0, begin, end, (const int*)sorted, N);
  with_width<kWide<Real>>(wide(C, dx) && wide(4, dweight), [&](auto W) {
    launch(be, "embedding_backward", embedding_backward_kernel<Real, W()>,
           dim3(divide_up(V, kEmbeddingWarps), divide_up(C, 32 * W())), kEmbeddingWarps * 32, 0, dweight, dx,
           (const int*)rows, (const int*)begin, (const int*)end, V, C);
  });
}

constexpr int kNormWarps = 8;

// A warp normalises one row, and reads it up to three times: from memory once, then from the L1 cache. With PAIR two
// norms of it are made.
// Errors: a lane adds up C / 32 squares, then 32 lanes meet: so rstd is off by (C / 64 + 8) u at most, relatively.
template <class Real, int W, NormKind KIND, bool PAIR>
__global__ void __launch_bounds__(kNormWarps * 32)
    norm_forward_kernel(Real* out, Real* out2, float* mean, float* rstd, const Real* x, const Real* weight,
                        const Real* bias, const Real* weight2, const Real* bias2, int N, int C, float eps) {
  const size_t n = blockIdx.x * size_t(kNormWarps) + threadIdx.x / 32;
  if (n >= N) return;
  const int start = threadIdx.x % 32 * W;
  const Real* row = x + n * C;
  float m = 0, square = 0, v[W], w[W], b[W];
  // As on the CPU: the mean, the mean square around it, then each element by the two.
  if (KIND == NormKind::layer) {
#pragma unroll 4
    for (int c = start; c < C; c += 32 * W) {
      load<W>(v, row + c);
#pragma unroll
      for (int k = 0; k < W; ++k) m += v[k];
    }
    m = warp_sum(m) / C;
    if (start == 0) mean[n] = m;
  }
#pragma unroll 4
  for (int c = start; c < C; c += 32 * W) {
    load<W>(v, row + c);
#pragma unroll
    for (int k = 0; k < W; ++k) square += (v[k] - m) * (v[k] - m);
  }
  const float r = rsqrtf(warp_sum(square) / C + eps);
  if (start == 0) rstd[n] = r;
#pragma unroll 4
  for (int c = start; c < C; c += 32 * W) {
    load<W>(v, row + c);
#pragma unroll
    for (int which = 0; which < (PAIR ? 2 : 1); ++which) {
      load<W>(w, (which ? weight2 : weight) + c);
      if (KIND == NormKind::layer) load<W>(b, (which ? bias2 : bias) + c);
      float y[W];
#pragma unroll
      for (int k = 0; k < W; ++k) y[k] = KIND == NormKind::layer ? (v[k] - m) * r * w[k] + b[k] : v[k] * r * w[k];
      store<W>((which ? out2 : out) + n * C + c, y);
    }
  }
}

template <bool PAIR, class Real>
void start_norm_forward(Cuda& be, NormKind kind, Real* out, Real* out2, float* mean, float* rstd, const Real* x,
                        const Real* weight, const Real* bias, const Real* weight2, const Real* bias2, int N, int C,
                        double eps) {
  with_width<kWide<Real>>(wide(C, out, out2, x, weight, bias, weight2, bias2), [&](auto W) {
    launch(be, "norm_forward",
           kind == NormKind::rms ? norm_forward_kernel<Real, W(), NormKind::rms, PAIR>
                                 : norm_forward_kernel<Real, W(), NormKind::layer, PAIR>,
           divide_up(N, kNormWarps), kNormWarps * 32, 0, out, out2, mean, rstd, x, weight, bias, weight2, bias2, N, C,
           float(eps));
  });
}
template <class Real>
void norm_forward(Cuda& be, NormKind kind, Real* out, Acc<Real>* mean, Acc<Real>* rstd, const Real* x,
                  const Real* weight, const Real* bias, int N, int C, double eps) {
  const Real* none = nullptr;
  start_norm_forward<false>(be, kind, out, (Real*)nullptr, mean, rstd, x, weight, bias, none, none, N, C, eps);
}
template <class Real>
void norm_pair_forward(Cuda& be, NormKind kind, Real* out1, Real* out2, Acc<Real>* mean, Acc<Real>* rstd, const Real* x,
                       const Real* weight1, const Real* bias1, const Real* weight2, const Real* bias2, int N, int C,
                       double eps) {
  start_norm_forward<true>(be, kind, out1, out2, mean, rstd, x, weight1, bias1, weight2, bias2, N, C, eps);
}

// A warp works through many rows. Its sums for dweight (and dbias) lie in shared memory, (warps, C) of each, where a
// lane only ever touches its own columns; at the end the block adds the warps up to one row of partial (blocks, sums, C),
// sums being dweight, dbias of a LayerNorm, and with PAIR those of the second norm. Errors, of the sums of the terms'
// sizes: the two means by (C / 32 + 8) u at most; dweight and dbias by (k + 80) u, k being the rows of a warp: with 800
// blocks of 8 warps 11, where N is 65,536.
HOST_DEVICE constexpr int norm_sums(NormKind kind, bool pair) {
  return (kind == NormKind::layer ? 2 : 1) * (pair ? 2 : 1);
}

template <class Real, int W, NormKind KIND, bool PAIR>
__global__ void norm_backward_kernel(Real* dx, float* partial, const Real* dresidual, const Real* dout,
                                     const Real* dout2, const Real* x, const float* mean, const float* rstd,
                                     const Real* weight, const Real* weight2, int N, int C) {
  extern __shared__ float4 shared_sums[];
  constexpr bool layer = KIND == NormKind::layer;
  constexpr int kSums = norm_sums(KIND, PAIR);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, start = threadIdx.x % 32 * W;
  float* sums = reinterpret_cast<float*>(shared_sums);  // (kSums, warps, C)
  for (int i = threadIdx.x; i < kSums * warps * C; i += blockDim.x) sums[i] = 0;
  __syncthreads();
  for (int n = blockIdx.x * warps + warp; n < N; n += gridDim.x * warps) {
    // Forward, out = xhat weight + bias with xhat = (x - mean) rstd, so g = dout weight is the gradient of xhat.
    const size_t at = size_t(n) * C;
    const float m = layer ? mean[n] : 0, r = rstd[n];
    float g_mean = 0, gx_mean = 0, v[W], d[W], w[W];
#pragma unroll 4
    for (int c = start; c < C; c += 32 * W) {
      load<W>(v, x + at + c);
      float* sum = sums + size_t(warp) * C + c;
#pragma unroll
      for (int which = 0; which < (PAIR ? 2 : 1); ++which) {
        load<W>(d, (which ? dout2 : dout) + at + c);
        load<W>(w, (which ? weight2 : weight) + c);
        float add[W];
#pragma unroll
        for (int k = 0; k < W; ++k) {
          const float xhat = (v[k] - m) * r, g = d[k] * w[k];
          if (layer) g_mean += g;
          gx_mean += g * xhat;
          add[k] = d[k] * xhat;
        }
        add_to<W>(sum, add);
        sum += size_t(warps) * C;
        if (layer) add_to<W>(sum, d), sum += size_t(warps) * C;
      }
    }
    g_mean = layer ? warp_sum(g_mean) / C : 0;
    gx_mean = warp_sum(gx_mean) / C;
    // Through mean and rstd every x is in every xhat of the row, hence the two means. The row is read again, from the
    // cache: registers would hold it only if C were a constant.
#pragma unroll 4
    for (int c = start; c < C; c += 32 * W) {
      float past[W] = {}, g[W] = {};
      load<W>(v, x + at + c);
#pragma unroll
      for (int which = 0; which < (PAIR ? 2 : 1); ++which) {
        load<W>(d, (which ? dout2 : dout) + at + c);
        load<W>(w, (which ? weight2 : weight) + c);
#pragma unroll
        for (int k = 0; k < W; ++k) g[k] += d[k] * w[k];
      }
      if (dresidual) load<W>(past, dresidual + at + c);
#pragma unroll
      for (int k = 0; k < W; ++k) past[k] += r * (g[k] - g_mean - (v[k] - m) * r * gx_mean);
      store<W>(dx + at + c, past);
    }
  }
  __syncthreads();
  // Always in the order of warps here and of blocks in add_rows(): no atomic addition, so the bits are always the same.
  for (int i = threadIdx.x; i < kSums * C; i += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += sums[(size_t(i / C) * warps + w) * C + i % C];
    partial[size_t(blockIdx.x) * kSums * C + i] = sum;
  }
}

// The same for rows of which a lane holds at most 2 vectors: everything stays in registers, the sums for dweight and dbias
// too, which meet in shared memory, (warps, C), at the end. Errors: dweight and dbias with 264 blocks, k = 31.
template <class Real, int W, NormKind KIND, bool PAIR, int VECTORS>
__global__ void __launch_bounds__(kNormWarps * 32)
    norm_backward_narrow_kernel(Real* dx, float* partial, const Real* dresidual, const Real* dout, const Real* dout2,
                                const Real* x, const float* mean, const float* rstd, const Real* weight,
                                const Real* weight2, int N, int C) {
  extern __shared__ float4 shared_sums[];
  constexpr bool layer = KIND == NormKind::layer;
  constexpr int kSums = norm_sums(KIND, PAIR), kNorms = PAIR ? 2 : 1;
  const int warp = threadIdx.x / 32, start = threadIdx.x % 32 * W;
  float sums[kSums][VECTORS][W] = {};
  for (int n = blockIdx.x * kNormWarps + warp; n < N; n += gridDim.x * kNormWarps) {
    const size_t at = size_t(n) * C;
    const float m = layer ? mean[n] : 0, r = rstd[n];
    float xhat[VECTORS][W] = {}, g[VECTORS][W] = {}, past[VECTORS][W] = {}, d[W], w[W], g_mean = 0, gx_mean = 0;
#pragma unroll
    for (int p = 0; p < VECTORS; ++p) {
      const int c = start + p * 32 * W;
      if (c >= C) continue;
      load<W>(xhat[p], x + at + c);
      if (dresidual) load<W>(past[p], dresidual + at + c);
#pragma unroll
      for (int k = 0; k < W; ++k) xhat[p][k] = (xhat[p][k] - m) * r;
#pragma unroll
      for (int which = 0; which < kNorms; ++which) {
        load<W>(d, (which ? dout2 : dout) + at + c);
        load<W>(w, (which ? weight2 : weight) + c);
#pragma unroll
        for (int k = 0; k < W; ++k) {
          g[p][k] += d[k] * w[k];
          sums[which * (kSums / kNorms)][p][k] += d[k] * xhat[p][k];
          if (layer) sums[which * (kSums / kNorms) + (layer ? 1 : 0)][p][k] += d[k];
        }
      }
#pragma unroll
      for (int k = 0; k < W; ++k) gx_mean += g[p][k] * xhat[p][k], g_mean += g[p][k];
    }
    g_mean = layer ? warp_sum(g_mean) / C : 0;
    gx_mean = warp_sum(gx_mean) / C;
#pragma unroll
    for (int p = 0; p < VECTORS; ++p) {
      const int c = start + p * 32 * W;
      if (c >= C) continue;
#pragma unroll
      for (int k = 0; k < W; ++k) past[p][k] += r * (g[p][k] - g_mean - xhat[p][k] * gx_mean);
      store<W>(dx + at + c, past[p]);
    }
  }
  float* shared = reinterpret_cast<float*>(shared_sums);
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    __syncthreads();
#pragma unroll
    for (int p = 0; p < VECTORS; ++p)
      if (start + p * 32 * W < C) store<W>(shared + warp * C + start + p * 32 * W, sums[s][p]);
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += kNormWarps * 32) {
      float sum = 0;
      for (int i = 0; i < kNormWarps; ++i) sum += shared[i * C + c];
      partial[(size_t(blockIdx.x) * kSums + s) * C + c] = sum;
    }
  }
}

// dsums: where each of the kernel's sums goes.
template <bool PAIR, class Real>
void start_norm_backward(Cuda& be, NormKind kind, Real* dx, const std::vector<float*>& dsums, const Real* dresidual,
                         const Real* dout, const Real* dout2, const Real* x, const float* mean, const float* rstd,
                         const Real* weight, const Real* weight2, int N, int C) {
  const int sums = norm_sums(kind, PAIR);
  float* partial = static_cast<float*>(be.workspace);
  if (constexpr int W = kWide<Real>; C <= 2 * 32 * W && wide(C, dx, dresidual, dout, dout2, x, weight, weight2)) {
    const int blocks = int(std::min<size_t>(2 * be.multiprocessors, divide_up(N, kNormWarps)));
    auto start = [&](auto* kernel) {
      launch(be, "norm_backward", kernel, blocks, kNormWarps * 32, kNormWarps * C * sizeof(float), dx, partial,
             dresidual, dout, dout2, x, mean, rstd, weight, weight2, N, C);
    };
    if (kind == NormKind::rms)
      start(C <= 32 * W ? norm_backward_narrow_kernel<Real, W, NormKind::rms, PAIR, 1>
                        : norm_backward_narrow_kernel<Real, W, NormKind::rms, PAIR, 2>);
    else
      start(C <= 32 * W ? norm_backward_narrow_kernel<Real, W, NormKind::layer, PAIR, 1>
                        : norm_backward_narrow_kernel<Real, W, NormKind::layer, PAIR, 2>);
    for (int i = 0; i < sums; ++i) add_rows(be, dsums[i], partial + size_t(i) * C, blocks, C, sums * C);
    return;
  }
  const size_t bytes = size_t(sums) * C * sizeof(float);  // per warp
  const int warps = int(std::min<size_t>(kNormWarps, be.shared_bytes / bytes));
  if (warps == 0)
    throw UserError("--width " + std::to_string(C) + ": too wide for the norms on this GPU; use --device cpu");
  const int per_multiprocessor = kind == NormKind::rms && C <= 1024 ? 4 : 6;  // found by measurement on an H200
  const int blocks = int(std::min({size_t(per_multiprocessor * be.multiprocessors), divide_up(N, warps),
                                   Cuda::kWorkspaceBytes / bytes}));
  with_width<kWide<Real>>(wide(C, dx, dresidual, dout, dout2, x, weight, weight2), [&](auto W) {
    launch(be, "norm_backward",
           kind == NormKind::rms ? norm_backward_kernel<Real, W(), NormKind::rms, PAIR>
                                 : norm_backward_kernel<Real, W(), NormKind::layer, PAIR>,
           blocks, warps * 32, warps * bytes, dx, partial, dresidual, dout, dout2, x, mean, rstd, weight, weight2, N, C);
  });
  for (int i = 0; i < sums; ++i) add_rows(be, dsums[i], partial + size_t(i) * C, blocks, C, sums * C);
}
template <class Real>
void norm_backward(Cuda& be, NormKind kind, Real* dx, Acc<Real>* dweight, Acc<Real>* dbias, const Real* dresidual,
                   const Real* dout, const Real* x, const Acc<Real>* mean, const Acc<Real>* rstd, const Real* weight,
                   int N, int C) {
  const Real* none = nullptr;
  start_norm_backward<false>(be, kind, dx, {dweight, dbias}, dresidual, dout, none, x, mean, rstd, weight, none, N, C);
}
template <class Real>
void norm_pair_backward(Cuda& be, NormKind kind, Real* dx, Acc<Real>* dweight1, Acc<Real>* dbias1, Acc<Real>* dweight2,
                        Acc<Real>* dbias2, const Real* dresidual, const Real* dout1, const Real* dout2, const Real* x,
                        const Acc<Real>* mean, const Acc<Real>* rstd, const Real* weight1, const Real* weight2, int N,
                        int C) {
  std::vector<float*> dsums = {dweight1, dweight2};
  if (kind == NormKind::layer) dsums = {dweight1, dbias1, dweight2, dbias2};
  start_norm_backward<true>(be, kind, dx, dsums, dresidual, dout1, dout2, x, mean, rstd, weight1, weight2, N, C);
}

template <class Real>
void linear_forward(Cuda& be, Real* out, const Real* inp, const Real* weight, const Real* bias, int N, int IC, int OC) {
  multiply(be, Product<Real>{out, nullptr, bias, OC, N, IC, true, false}, weight, inp);
}

template <class Real>
void linear_residual_forward(Cuda& be, Real* out, const Real* residual, const Real* inp, const Real* weight,
                             const Real* bias, int N, int IC, int OC) {
  multiply(be, Product<Real>{out, residual, bias, OC, N, IC, true, false}, weight, inp);
}

// Column sums of some rows: a block has 32 columns, whose rows its 8 warps share; one row of partial (blocks, OC)
// each. Errors: with 64 blocks a warp adds up N / 512 rows, so dbias is off by (N / 512 + 44) u of the sum of |dout|.
template <class Real>
__global__ void __launch_bounds__(256) bias_backward_kernel(float* partial, const Real* dout, int N, int OC) {
  __shared__ float sums[8][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
  float sum = 0;
  if (c < OC)
#pragma unroll 4
    for (int n = blockIdx.y * 8 + warp; n < N; n += gridDim.y * 8) sum += float(dout[size_t(n) * OC + c]);
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= OC) return;
  for (int w = 1; w < 8; ++w) sum += sums[w][lane];
  partial[size_t(blockIdx.y) * OC + c] = sum;
}

// What linear_backward() gives besides dinp.
template <class Real>
void linear_backward_parameters(Cuda& be, Acc<Real>* dweight, Acc<Real>* dbias, const Real* dout, const Real* inp,
                                int N, int IC, int OC, bool first = false) {
  multiply(be, Product<Acc<Real>>{dweight, first ? nullptr : dweight, nullptr, IC, OC, N, false, true}, inp, dout);
  if (!dbias) return;
  float* partial = static_cast<float*>(be.workspace);
  const size_t most = Cuda::kWorkspaceBytes / sizeof(float) / OC;  // of a vocabulary of a million, 16
  const int rows = int(std::min({size_t(64), divide_up(N, 8), most}));
  launch(be, "bias_backward", bias_backward_kernel<Real>, dim3(divide_up(OC, 32), rows), 256, 0, partial, dout, N, OC);
  add_rows(be, dbias, partial, rows, OC, OC);
}

template <class Real>
void linear_backward_input(Cuda& be, Real* dinp, const Real* dout, const Real* weight, int N, int IC, int OC) {
  multiply(be, Product<Real>{dinp, nullptr, nullptr, IC, N, OC, false, false}, weight, dout);
}

template <class Real>
void linear_backward(Cuda& be, Real* dinp, Acc<Real>* dweight, Acc<Real>* dbias, const Real* dout, const Real* inp,
                     const Real* weight, int N, int IC, int OC, bool first = false) {
  linear_backward_input(be, dinp, dout, weight, N, IC, OC);
  linear_backward_parameters(be, dweight, dbias, dout, inp, N, IC, OC, first);
}

// A thread works out W of the F channels of one row.
template <class Real, int W>
__global__ void swiglu_forward_kernel(Real* out, const Real* gate_up, int N, int F) {
  const int vectors = F / W;
  const size_t id = blockIdx.x * size_t(blockDim.x) + threadIdx.x, n = id / vectors;
  if (n >= N) return;
  const int f = int(id % vectors) * W;
  float gate[W], up[W];
  load<W>(gate, gate_up + n * 2 * F + f);
  load<W>(up, gate_up + n * 2 * F + F + f);
#pragma unroll
  for (int k = 0; k < W; ++k) up[k] *= gate[k] * sigmoid(gate[k]);
  store<W>(out + n * F + f, up);
}

template <class Real, int W>
__global__ void swiglu_backward_kernel(Real* dgate_up, const Real* dout, const Real* gate_up, int N, int F) {
  const int vectors = F / W;
  const size_t id = blockIdx.x * size_t(blockDim.x) + threadIdx.x, n = id / vectors;
  if (n >= N) return;
  const int f = int(id % vectors) * W;
  const size_t at = n * 2 * F + f;
  float gate[W], up[W], d[W];
  load<W>(gate, gate_up + at);
  load<W>(up, gate_up + at + F);
  load<W>(d, dout + n * F + f);
#pragma unroll
  for (int k = 0; k < W; ++k) gemm::swiglu_gradient(gate[k], up[k], d[k]);
  store<W>(dgate_up + at, gate);
  store<W>(dgate_up + at + F, up);
}

template <class Real>
void swiglu_forward(Cuda& be, Real* out, const Real* gate_up, int N, int F) {
  with_width<kWide<Real>>(wide(F, out, gate_up), [&](auto W) {
    launch(be, "swiglu_forward", swiglu_forward_kernel<Real, W()>, divide_up(size_t(N) * F / W(), 256), 256, 0, out,
           gate_up, N, F);
  });
}

// On Hopper a product's kernel can do what comes next as well; below a billion multiply-adds it is not tried.
template <class Real>
void linear_swiglu_forward(Cuda& be, Real* out, Real* gate_up, const Real* inp, const Real* weight, const Real* bias,
                           int N, int C, int F) {
  auto apart = [&] {
    linear_forward(be, gate_up, inp, weight, bias, N, C, 2 * F);
    swiglu_forward(be, out, gate_up, N, F);
  };
  if constexpr (std::is_same_v<Real, bf16>)
    if (!bias && F % 64 == 0 && 4.0 * N * C * F > 1e9 && gemm::supports(be, 2 * F, C, gate_up, inp, weight))
      return start_faster(be, {N, C, F}, out, size_t(N) * F, apart, [&] {
        gemm::multiply(be, gate_up, inp, weight, N, 2 * F, C, gemm::SwiGlu(out));
      });
  apart();
}

template <class Real>
void swiglu_backward(Cuda& be, Real* dgate_up, const Real* dout, const Real* gate_up, int N, int F) {
  with_width<kWide<Real>>(wide(F, dgate_up, dout, gate_up), [&](auto W) {
    launch(be, "swiglu_backward", swiglu_backward_kernel<Real, W()>, divide_up(size_t(N) * F / W(), 256), 256, 0,
           dgate_up, dout, gate_up, N, F);
  });
}

// The product is dact, which in one kernel never reaches memory.
template <class Real>
void linear_swiglu_backward(Cuda& be, Real* dgate_up, Real* dact, Acc<Real>* dweight, Acc<Real>* dbias,
                            const Real* dout, const Real* act, const Real* gate_up, const Real* weight, int N, int F,
                            int C, bool first = false) {
  auto apart = [&] {
    linear_backward_input(be, dact, dout, weight, N, F, C);
    swiglu_backward(be, dgate_up, dact, gate_up, N, F);
  };
  auto input = [&] {
    if constexpr (std::is_same_v<Real, bf16>)
      if (2.0 * N * C * F > 1e9 && gemm::supports(be, F, C, dgate_up, dout, weight) && wide(F, gate_up))
        return start_faster(be, {N, C, F}, dgate_up, size_t(N) * 2 * F, apart, [&] {
          gemm::multiply<true>(be, dgate_up, dout, weight, N, F, C, gemm::SwiGluBackward(gate_up, dgate_up));
        });
    apart();
  };
  input();
  linear_backward_parameters(be, dweight, dbias, dout, act, N, F, C, first);
}

// Of the whole sequence in one kernel, where heads end with a tile.
template <class Real>
void linear_rope_forward(Cuda& be, Real* qkv, const Real* inp, const Real* weight, const Real* bias,
                         const RopeTable& table, RopeShape s, int C) {
  const int N = s.B * (s.T - s.first), heads = s.NH + s.NKV, width = (heads + s.NKV) * s.HS, R = table.R;
  auto apart = [&] {
    linear_forward(be, qkv + size_t(s.first) * width, inp, weight, bias, N, C, width);
    rope_forward(be, qkv, table, s);
  };
  if constexpr (std::is_same_v<Real, bf16>)
    if (R > 0 && s.first == 0 && !bias && gemm::kN % s.HS == 0 && 2.0 * N * C * width > 1e9 &&
        gemm::supports(be, width, C, qkv, inp, weight)) {
      const bool half = table.pairs == RopePairs::half;
      auto start = [&](auto epilogue) {
        start_faster(be, {N, C, width, half ? R : -R}, qkv, size_t(N) * width, apart,
                     [&] { gemm::multiply(be, qkv, inp, weight, N, width, C, epilogue); });
      };
      return with_width<4>(R % 8 == 0, [&](auto W) {
        half ? start(gemm::Rope<W(), false>(table.cos_sin, s.T, R, heads, s.HS))
             : start(gemm::Rope<W(), true>(table.cos_sin, s.T, R, heads, s.HS));
      });
    }
  apart();
}

// Phi, the normal distribution up to x, and its density, from one exponential: erfc by Abramowitz and Stegun (1964,
// 7.1.26), which errs by 1.5e-7 at most and, other than 1 - erf, keeps its digits in the tail.
__device__ __forceinline__ float normal_distribution(float x, float* density) {
  const float e = __expf(-0.5f * x * x), t = __fdividef(1, 1 + 0.3275911f * 0.70710678f * fabsf(x));
  const float p =
      t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  *density = 0.3989422804014327f * e;  // 1/sqrt(2 pi)
  return x < 0 ? 0.5f * p * e : 1 - 0.5f * p * e;
}

// Phi of GELU, and its derivative.
template <GeluKind KIND>
__device__ __forceinline__ float gelu_Phi(float x, float* slope) {
  if (KIND == GeluKind::exact) return normal_distribution(x, slope);
  const float Phi = sigmoid(tanh_gelu_2u(x));
  *slope = Phi * (1 - Phi) * tanh_gelu_2u_slope(x);
  return Phi;
}

// A thread works out W elements.
template <class Real, int W, GeluKind KIND>
__global__ void gelu_forward_kernel(Real* out, const Real* x, size_t count) {
  const size_t i = (blockIdx.x * size_t(blockDim.x) + threadIdx.x) * W;
  if (i >= count) return;
  float v[W], slope;
  load<W>(v, x + i);
#pragma unroll
  for (int k = 0; k < W; ++k) v[k] *= gelu_Phi<KIND>(v[k], &slope);
  store<W>(out + i, v);
}

template <class Real, int W, GeluKind KIND>
__global__ void gelu_backward_kernel(Real* dx, const Real* dout, const Real* x, size_t count) {
  const size_t i = (blockIdx.x * size_t(blockDim.x) + threadIdx.x) * W;
  if (i >= count) return;
  float v[W], d[W], slope;
  load<W>(v, x + i);
  load<W>(d, dout + i);
#pragma unroll
  for (int k = 0; k < W; ++k) {
    const float Phi = gelu_Phi<KIND>(v[k], &slope);  // forward, out = x Phi(x)
    d[k] *= Phi + v[k] * slope;
  }
  store<W>(dx + i, d);
}

template <class Real>
void gelu_forward(Cuda& be, GeluKind kind, Real* out, const Real* x, int N, int F) {
  with_width<kWide<Real>>(wide(F, out, x), [&](auto W) {
    launch(be, "gelu_forward",
           kind == GeluKind::exact ? gelu_forward_kernel<Real, W(), GeluKind::exact>
                                   : gelu_forward_kernel<Real, W(), GeluKind::tanh>,
           divide_up(size_t(N) * F / W(), 256), 256, 0, out, x, size_t(N) * F);
  });
}

template <class Real>
void gelu_backward(Cuda& be, GeluKind kind, Real* dx, const Real* dout, const Real* x, int N, int F) {
  with_width<kWide<Real>>(wide(F, dx, dout, x), [&](auto W) {
    launch(be, "gelu_backward",
           kind == GeluKind::exact ? gelu_backward_kernel<Real, W(), GeluKind::exact>
                                   : gelu_backward_kernel<Real, W(), GeluKind::tanh>,
           divide_up(size_t(N) * F / W(), 256), 256, 0, dx, dout, x, size_t(N) * F);
  });
}

// The largest of some numbers and the sum of their exponentials relative to it.
struct SoftmaxSum {
  float highest, sum;
};
__device__ __forceinline__ SoftmaxSum merge(SoftmaxSum a, SoftmaxSum b) {
  const float highest = fmaxf(a.highest, b.highest);
  if (highest == -INFINITY) return {highest, a.sum + b.sum};  // nothing yet, or NaN, which stays
  return {highest, a.sum * __expf(a.highest - highest) + b.sum * __expf(b.highest - highest)};
}

__device__ __forceinline__ SoftmaxSum merge_over_warp(SoftmaxSum total) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    total = merge(total, {__shfl_xor_sync(~0u, total.highest, step), __shfl_xor_sync(~0u, total.sum, step)});
  return total;
}

// e^x in two instructions, where __expf() has more for results under 2^-126, which become 0 here.
__device__ __forceinline__ float exp_of(float x) { return exp2_(x * 1.4426950408889634f); }

// Of W neighbours: the maximum first, then the exponentials, so that they are rescaled as one.
template <int W, class Real>
__device__ __forceinline__ SoftmaxSum softmax_sum(const Real* logits) {
  float x[W];
  load<W>(x, logits);
  SoftmaxSum here = {x[0], 0};
#pragma unroll
  for (int k = 1; k < W; ++k) here.highest = fmaxf(here.highest, x[k]);
#pragma unroll
  for (int k = 0; k < W; ++k) here.sum += exp_of(x[k] - here.highest);
  return here;
}

constexpr int kLossThreads = 512;  // at most

// A block works on one row: one pass for the maximum and the sum together, then one that writes the gradient. A thread
// takes every so many'th vector of W logits, the same in both passes. With KEEP, for rows so short that several fit a
// multiprocessor, shared memory holds them in between; a long row is read from the L2 cache again.
// Errors: a thread adds up V / 512 exponentials, then 512 threads meet: so log Z is off by (V / 512 + 64) u at most.
// An exponential e^-d by exp_of() is off by (4 + 2.4 d) u, relatively.
template <class Real, int W, bool KEEP>
__global__ void __launch_bounds__(kLossThreads)
    cross_entropy_kernel(float* losses, float* log_z, Real* logits, const int* targets, float scale, float z_loss,
                         int V) {
  extern __shared__ float4 shared_row[];
  __shared__ SoftmaxSum warps[kLossThreads / 32];
  using Logits = Vector<Real, W>;
  Logits* kept = reinterpret_cast<Logits*>(shared_row);
  const int n = blockIdx.x, target = targets[n], vectors = V / W;
  Real* row = logits + size_t(n) * V;
  float x[W];
  if (target < 0) {
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
      const float zeros[W] = {};
      store<W>(row + i * W, zeros);
    }
    if (threadIdx.x == 0) losses[n] = log_z[n] = 0;
    return;
  }
  const float target_logit = float(row[target]);
  SoftmaxSum total = {-INFINITY, 0};
#pragma unroll 4
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const Logits logit = reinterpret_cast<const Logits*>(row)[i];
    if (KEEP) kept[i] = logit;
    total = merge(total, softmax_sum<W>(logit.x));
  }
  total = merge_over_warp(total);
  const int lane = threadIdx.x % 32;
  if (lane == 0) warps[threadIdx.x / 32] = total;
  __syncthreads();
  // Every warp for itself: the second pass needs it everywhere.
  total = merge_over_warp(lane < blockDim.x / 32 ? warps[lane] : SoftmaxSum{-INFINITY, 0});

  const float z = total.highest + logf(total.sum), factor = scale * (1 + 2 * z_loss * z) / total.sum;
  // The loss is not z - target_logit: where the target is all but certain, little but z's rounding would be left.
  if (threadIdx.x == 0) log_z[n] = z, losses[n] = total.highest - target_logit + logf(total.sum);
  // The gradient takes the logits' place: p (1 + 2 z_loss log Z), less 1 at the target, times scale.
#pragma unroll 4
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const Logits logit = KEEP ? kept[i] : reinterpret_cast<const Logits*>(row)[i];
#pragma unroll
    for (int k = 0; k < W; ++k) x[k] = factor * exp_of(float(logit.x[k]) - total.highest);
    if (i == target / W)
#pragma unroll
      for (int k = 0; k < W; ++k) x[k] -= k == target % W ? scale : 0;
    store<W>(row + i * W, x);
  }
}

// The same on Hopper, for long rows of which at least two fit in shared memory: a row is read once, and written once. A
// block works on every gridDim.x'th row. Its last warp has the copy engine bring rows into `slots` places, one after the
// other, and take them away again when the other warps have put the gradient in the logits' place; meanwhile these are at
// work on the next row.
// Errors: as above with 992 threads, log Z by (V / 992 + 72) u at most.
constexpr int kLossWorkers = 992, kMostSlots = 4;

template <class Real, int W>
__global__ void __launch_bounds__(kLossWorkers + 32, 1)
    cross_entropy_stream_kernel(float* losses, float* log_z, Real* logits, const int* targets, float scale, float z_loss,
                                int N, int V, int slots) {
#if GEMM_HOPPER
  extern __shared__ float4 shared_row[];
  __shared__ SoftmaxSum warps[2][kLossWorkers / 32];
  __shared__ uint64_t barriers[2 * kMostSlots];
  const uint32_t bytes = V * sizeof(Real), places = uint32_t(__cvta_generic_to_shared(shared_row)),
                 arrived = uint32_t(__cvta_generic_to_shared(barriers)), ready = arrived + 8 * kMostSlots;
  if (threadIdx.x == 0) {
    for (int i = 0; i < slots; ++i) {
      gemm::init_barrier(arrived + 8 * i, 1);                // the bytes of a row
      gemm::init_barrier(ready + 8 * i, kLossWorkers / 32);  // every warp has written its part
    }
    gemm::publish();
  }
  __syncthreads();
  const int step = gridDim.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == kLossWorkers / 32) {
    if (lane > 0) return;
    auto bring = [&](int n, int slot) {
      gemm::expect_bytes(arrived + 8 * slot, bytes);
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       places + slot * bytes),
                   "l"(logits + size_t(n) * V), "r"(bytes), "r"(arrived + 8 * slot)
                   : "memory");
    };
    for (int slot = 0, n = blockIdx.x; slot < slots && n < N; ++slot, n += step) bring(n, slot);
    for (int n = blockIdx.x, slot = 0, parity = 0; n < N; n += step) {
      gemm::wait_barrier(ready + 8 * slot, parity);
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(logits + size_t(n) * V),
                   "r"(places + slot * bytes), "r"(bytes)
                   : "memory");
      gemm::commit_stores();
      gemm::wait_stores();  // the place is free
      if (n + slots * step < N) bring(n + slots * step, slot);
      if (++slot == slots) slot = 0, parity ^= 1;
    }
    return;
  }
  const int vectors = V / W;
  for (int n = blockIdx.x, slot = 0, parity = 0, turn = 0; n < N; n += step, turn ^= 1) {
    Real* row = reinterpret_cast<Real*>(reinterpret_cast<char*>(shared_row) + slot * size_t(bytes));
    const int target = targets[n];
    gemm::wait_barrier(arrived + 8 * slot, parity);
    float x[W];
    if (target < 0) {
      for (int i = threadIdx.x; i < vectors; i += kLossWorkers) {
        const float zeros[W] = {};
        store<W>(row + i * W, zeros);
      }
      if (threadIdx.x == 0) losses[n] = log_z[n] = 0;
    } else {
      SoftmaxSum total = {-INFINITY, 0};
#pragma unroll 4
      for (int i = threadIdx.x; i < vectors; i += kLossWorkers) total = merge(total, softmax_sum<W>(row + i * W));
      total = merge_over_warp(total);
      if (lane == 0) warps[turn][warp] = total;
      const float target_logit = float(row[target]);
      asm volatile("bar.sync 1, %0;" ::"n"(kLossWorkers) : "memory");
      total = merge_over_warp(lane < kLossWorkers / 32 ? warps[turn][lane] : SoftmaxSum{-INFINITY, 0});
      const float z = total.highest + logf(total.sum), factor = scale * (1 + 2 * z_loss * z) / total.sum;
      if (threadIdx.x == 0) log_z[n] = z, losses[n] = total.highest - target_logit + logf(total.sum);
#pragma unroll 4
      for (int i = threadIdx.x; i < vectors; i += kLossWorkers) {
        load<W>(x, row + i * W);
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = factor * exp_of(x[k] - total.highest);
        if (i == target / W)
#pragma unroll
          for (int k = 0; k < W; ++k) x[k] -= k == target % W ? scale : 0;
        store<W>(row + i * W, x);
      }
    }
    gemm::publish();  // to the copy engine
    __syncwarp();
    if (lane == 0) gemm::arrive(ready + 8 * slot);
    if (++slot == slots) slot = 0, parity ^= 1;
  }
#endif
}

template <class Real>
void cross_entropy(Cuda& be, Acc<Real>* losses, Acc<Real>* log_z, Real* logits, const int* targets, double scale,
                   double z_loss, int N, int V) {
  const size_t row_bytes = V * sizeof(Real);
  const int slots = int(std::min<size_t>(kMostSlots, (be.shared_bytes - 2048) / row_bytes));
  if (be.capability == 90 && row_bytes > 16 * 1024 && slots > 1 && wide(V, logits))
    return launch(be, "cross_entropy", cross_entropy_stream_kernel<Real, kWide<Real>>,
                  int(std::min<size_t>(N, be.multiprocessors)), kLossWorkers + 32, slots * row_bytes, losses, log_z,
                  logits, targets, float(scale), float(z_loss), N, V, slots);
  with_width<kWide<Real>>(wide(V, logits), [&](auto W) {  // at least four accesses per thread, where there are as many
    const int threads = int(std::min<size_t>(kLossThreads, 32 * divide_up(V / W(), 4 * 32)));
    const size_t bytes = V * sizeof(Real);
    const bool keep = bytes <= 16 * 1024;
    auto kernel = keep ? cross_entropy_kernel<Real, W(), true> : cross_entropy_kernel<Real, W(), false>;
    launch(be, "cross_entropy", kernel, N, threads, keep ? bytes : 0, losses, log_z, logits, targets, float(scale),
           float(z_loss), V);
  });
}

// One block for the losses and one for log Z: thread i adds up elements i, i + 1024, ...
static __global__ void __launch_bounds__(1024)
    add_losses_kernel(double* loss, double* z, const float* losses, const float* log_z, int N) {
  const float* from = blockIdx.x ? log_z : losses;
  double sum = 0;
#pragma unroll 8
  for (int n = threadIdx.x; n < N; n += 1024) sum += from[n];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *(blockIdx.x ? z : loss) += sum;
}
inline void add_losses(Cuda& be, double* loss, double* z, const float* losses, const float* log_z, int N) {
  launch(be, "add_losses", add_losses_kernel, 2, 1024, 0, loss, z, losses, log_z, N);
}

#endif  // __CUDACC__
