#pragma once
// The layers between the attentions: embedding, linear, MLP activations. Forward and backward side by side. N rows are
// tokens (N = B*T unless said otherwise), C the width.

#include <vector>

#include "device/backend.h"
#include "device/gemm.cuh"
#include "device/matmul.cuh"
#include "rope.cuh"

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

// out (N, OC) = inp (N, IC) weight^T + bias; weight (OC, IC), bias (OC) or nullptr. torch.nn.functional.linear.
template <class Real>
void linear_forward(Cpu&, Real* out, const Real* inp, const Real* weight, const Real* bias, int N, int IC, int OC) {
  matmul(out, bias, 0, row_major(inp, IC), transposed(weight, IC), N, OC, IC);
}

// out (N, OC) = residual (N, OC) + inp (N, IC) weight^T + bias: a branch joins the residual stream. out is not residual.
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

// Two branches at once: out (N, OC) = residual (N, OC) + inp1 (N, IC1) weight1^T + bias1 + inp2 (N, IC2) weight2^T + bias2.
// between (N, OC): room for the sum without the second, which may not be made.
template <class Real>
void linear_pair_residual_forward(Cpu& be, Real* out, Real* between, const Real* residual, const Real* inp1,
                                  const Real* weight1, const Real* bias1, const Real* inp2, const Real* weight2,
                                  const Real* bias2, int N, int IC1, int IC2, int OC) {
  linear_residual_forward(be, between, residual, inp1, weight1, bias1, N, IC1, OC);
  linear_residual_forward(be, out, between, inp2, weight2, bias2, N, IC2, OC);
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
#pragma unroll 8
  for (int i = begin; i < end; i += step) {
    float d[W];
    load<W>(d, dx + size_t(rows[i]) * C + c);
#pragma unroll
    for (int k = 0; k < W; ++k) sum[k] += d[k];
  }
}

// A block has up to 8 tokens, gridDim.x apart, and 32 W columns. A warp adds up the rows of one token, a lane W columns of
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

// For a small vocabulary, to sort the tokens takes longer than to look through the batch for each: a block has one token
// of the vocabulary and 64 W columns. A warp looks through a stretch of the batch, 256 rows at a time, of which it lists
// those that have the token and adds them up; the warps' sums meet in the end, in order.
constexpr int kSmallVocabulary = 512, kListedWarps = 16, kListed = 256;

template <class Real, int W>
__global__ void __launch_bounds__(kListedWarps * 32)
    embedding_backward_small_kernel(float* dweight, const Real* dx, const int* tokens, int N, int C) {
  __shared__ int lists[kListedWarps][kListed];
  __shared__ float sums[kListedWarps][32 * W];
  const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int stretch = (N + kListedWarps - 1) / kListedWarps, end = min((warp + 1) * stretch, N);
  int* list = lists[warp];
  float sum[2][W] = {};
  for (int begin = warp * stretch; begin < end; begin += kListed) {
    int count = 0;
    bool here[kListed / 32];
#pragma unroll
    for (int i = 0; i < kListed / 32; ++i) {
      const int n = begin + i * 32 + lane;
      here[i] = n < end && tokens[n] == token;
    }
#pragma unroll
    for (int i = 0; i < kListed / 32; ++i) {
      const unsigned lanes = __ballot_sync(~0u, here[i]);
      if (here[i]) list[count + __popc(lanes & ((1u << lane) - 1))] = begin + i * 32 + lane;
      count += __popc(lanes);
    }
    __syncwarp();
#pragma unroll
    for (int part = 0; part < 2; ++part)
      if (const int c = ((blockIdx.y * 2 + part) * 32 + lane) * W; c < C)
        add_rows_of_token<Real, W>(sum[part], dx, list, 0, count, 1, C, c);
    __syncwarp();  // before the list is written anew
  }
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int c = ((blockIdx.y * 2 + part) * 32 + lane) * W;
    for (int k = 0; k < W; ++k) sums[warp][k * 32 + lane] = sum[part][k];
    __syncthreads();
    if (warp == 0 && c < C) {
      for (int w = 1; w < kListedWarps; ++w)
        for (int k = 0; k < W; ++k) sum[part][k] += sums[w][k * 32 + lane];
      add_to<W>(dweight + size_t(token) * C + c, sum[part]);
    }
    __syncthreads();
  }
}

template <class Real>
void embedding_backward(Cuda& be, Acc<Real>* dweight, const Real* dx, const int* tokens, int N, int V, int C) {
  const bool is_wide = wide(C, dx) && wide(4, dweight);
  if (V <= kSmallVocabulary)
    return with_width<kWide<Real>>(is_wide, [&](auto W) {
      launch(be, "embedding_backward", embedding_backward_small_kernel<Real, W()>, dim3(V, divide_up(C, 64 * W())),
             kListedWarps * 32, 0, dweight, dx, tokens, N, C);
    });
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
  with_width<kWide<Real>>(is_wide, [&](auto W) {
    launch(be, "embedding_backward", embedding_backward_kernel<Real, W()>,
           dim3(std::max(divide_up(V, kEmbeddingWarps), std::min<size_t>(V, 2 * be.multiprocessors)),
                divide_up(C, 32 * W())),
           kEmbeddingWarps * 32, 0, dweight, dx, (const int*)rows, (const int*)begin, (const int*)end, V, C);
  });
}

template <class Real>
void linear_forward(Cuda& be, Real* out, const Real* inp, const Real* weight, const Real* bias, int N, int IC, int OC) {
  multiply(be, Product<Real>{out, nullptr, bias, OC, N, IC, true, false}, weight, inp);
}

// On Hopper a product's kernel can do what comes next as well; below half a billion multiply-adds it is not tried.
template <class Real>
void linear_residual_forward(Cuda& be, Real* out, const Real* residual, const Real* inp, const Real* weight,
                             const Real* bias, int N, int IC, int OC) {
  auto by_cublas = [&] { multiply(be, Product<Real>{out, residual, bias, OC, N, IC, true, false}, weight, inp); };
  if constexpr (std::is_same_v<Real, bf16>)
    if (!bias && 2.0 * N * IC * OC > 1e9 && gemm::supports(be, OC, IC, out, inp, weight) && wide(OC, residual))
      return start_faster(be, {N, IC, OC}, out, size_t(N) * OC, by_cublas, [&] {
        gemm::multiply(be, out, inp, weight, N, OC, IC, gemm::Residual(residual, N, OC));
      });
  by_cublas();
}

// In one kernel the sum is rounded once, not twice as apart, so which way is taken must not depend on the clock.
template <class Real>
void linear_pair_residual_forward(Cuda& be, Real* out, Real* between, const Real* residual, const Real* inp1,
                                  const Real* weight1, const Real* bias1, const Real* inp2, const Real* weight2,
                                  const Real* bias2, int N, int IC1, int IC2, int OC) {
  if constexpr (std::is_same_v<Real, bf16>)
    if (!bias1 && !bias2 && 2.0 * N * (IC1 + IC2) * OC > 1e9 && gemm::supports(be, OC, IC1, out, inp1, weight1) &&
        gemm::supports(be, OC, IC2, out, inp2, weight2) && wide(OC, residual))
      return gemm::multiply(be, out, inp1, weight1, N, OC, IC1, gemm::Residual(residual, N, OC), inp2, weight2, IC2);
  linear_residual_forward(be, between, residual, inp1, weight1, bias1, N, IC1, OC);
  linear_residual_forward(be, out, between, inp2, weight2, bias2, N, IC2, OC);
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
  add_rows(be, {dbias}, partial, rows, OC);
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

// Calls work(epilogue) with the epilogue of a product that turns such heads, if there is one.
template <class Work>
bool with_rope_epilogue(const RopeTable& table, RopeShape s, Work work) {
  const int heads = s.NH + s.NKV, R = table.R;
  const bool half = table.pairs == RopePairs::half;
  if (gemm::kN % s.HS != 0 || R == 0 || (R > 16 && R % 16 != 0)) return false;
  const bool full = half && R == s.HS && s.T % 64 == 0;
  if (full && R == 64) work(gemm::FullRope<64>(table.cos_sin, s.T, heads));
  else if (full && R == 128) work(gemm::FullRope<128>(table.cos_sin, s.T, heads));
  else if (half) work(gemm::Rope<false>(table.cos_sin, s.T, R, heads, s.HS));
  else work(gemm::Rope<true>(table.cos_sin, s.T, R, heads, s.HS));
  return true;
}

// Of the whole sequence in one kernel, where heads end with a tile.
template <class Real>
void linear_rope_forward(Cuda& be, Real* qkv, const Real* inp, const Real* weight, const Real* bias,
                         const RopeTable& table, RopeShape s, int C) {
  const int N = s.B * (s.T - s.first), width = (s.NH + 2 * s.NKV) * s.HS, R = table.R;
  auto apart = [&] {
    linear_forward(be, qkv + size_t(s.first) * width, inp, weight, bias, N, C, width);
    rope_forward(be, qkv, table, s);
  };
  if constexpr (std::is_same_v<Real, bf16>)
    if (s.first == 0 && !bias && 2.0 * N * C * width > 1e9 && gemm::supports(be, width, C, qkv, inp, weight) &&
        with_rope_epilogue(table, s, [&](auto epilogue) {
          start_faster(be, {N, C, width, table.pairs == RopePairs::half ? R : -R, s.T}, qkv, size_t(N) * width, apart,
                       [&] { gemm::multiply(be, qkv, inp, weight, N, width, C, epilogue); });
        }))
      return;
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

#endif  // __CUDACC__
