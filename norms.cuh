#pragma once
// The norms of the residual stream, RMSNorm and LayerNorm: forward and backward side by side. N rows are tokens, C the
// width.

#include <vector>

#include "device/backend.h"

enum class NormKind { rms, layer };

// ---------------------------------------------------------------------------------------------------------------------
// CPU

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

// ---------------------------------------------------------------------------------------------------------------------
// CUDA. Kernels of W elements per access: 16 bytes' worth, or 1 where a width or an address does not allow it.

#ifdef __CUDACC__

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

// Blocks of the next kernel for a multiprocessor, as the registers allow that its vectors of sums take.
constexpr int narrow_blocks(int sums) { return sums <= 2 ? 3 : sums <= 4 ? 2 : 1; }

// The same for rows of which a lane holds at most 2 vectors: everything stays in registers, the sums for dweight and dbias
// too, which meet in shared memory, (warps, C), at the end. Errors: dweight and dbias with 396 blocks, k = 21.
template <class Real, int W, NormKind KIND, bool PAIR, int VECTORS>
__global__ void __launch_bounds__(kNormWarps * 32, narrow_blocks(norm_sums(KIND, PAIR) * VECTORS))
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
void start_norm_backward(Cuda& be, NormKind kind, Real* dx, const RowSums& dsums, const Real* dresidual,
                         const Real* dout, const Real* dout2, const Real* x, const float* mean, const float* rstd,
                         const Real* weight, const Real* weight2, int N, int C) {
  const int sums = norm_sums(kind, PAIR);
  float* partial = static_cast<float*>(be.workspace);
  if (constexpr int W = kWide<Real>; C <= 2 * 32 * W && wide(C, dx, dresidual, dout, dout2, x, weight, weight2)) {
    const int per_multiprocessor = narrow_blocks(sums * (C <= 32 * W ? 1 : 2));
    const int blocks = int(std::min<size_t>(per_multiprocessor * be.multiprocessors, divide_up(N, kNormWarps)));
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
    return add_rows(be, dsums, partial, blocks, C);
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
  add_rows(be, dsums, partial, blocks, C);
}
template <class Real>
void norm_backward(Cuda& be, NormKind kind, Real* dx, Acc<Real>* dweight, Acc<Real>* dbias, const Real* dresidual,
                   const Real* dout, const Real* x, const Acc<Real>* mean, const Acc<Real>* rstd, const Real* weight,
                   int N, int C) {
  const Real* none = nullptr;
  const RowSums dsums = kind == NormKind::rms ? RowSums{dweight} : RowSums{dweight, dbias};
  start_norm_backward<false>(be, kind, dx, dsums, dresidual, dout, none, x, mean, rstd, weight, none, N, C);
}
template <class Real>
void norm_pair_backward(Cuda& be, NormKind kind, Real* dx, Acc<Real>* dweight1, Acc<Real>* dbias1, Acc<Real>* dweight2,
                        Acc<Real>* dbias2, const Real* dresidual, const Real* dout1, const Real* dout2, const Real* x,
                        const Acc<Real>* mean, const Acc<Real>* rstd, const Real* weight1, const Real* weight2, int N,
                        int C) {
  const RowSums dsums =
      kind == NormKind::rms ? RowSums{dweight1, dweight2} : RowSums{dweight1, dbias1, dweight2, dbias2};
  start_norm_backward<true>(be, kind, dx, dsums, dresidual, dout1, dout2, x, mean, rstd, weight1, weight2, N, C);
}

#endif  // __CUDACC__
