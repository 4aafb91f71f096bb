#pragma once
// The loss: softmax cross-entropy in nats per token, whose gradient takes the logits' place, the same with the layer that
// makes the logits, and the sums of losses. N rows are tokens, V the vocabulary.

#include "device/backend.h"
#include "device/copy_engine.cuh"
#include "device/gemm.cuh"
#include "layers.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// CPU

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

// The head, the loss, and the way back through both: with logits (N, V) = inp (N, C) weight (V, C)^T [+ bias], losses and
// log_z as from cross_entropy(), and dinp (N, C), dweight and dbias as from linear_backward(). logits (N, V) and factors
// (N) are room for what is made on the way.
template <class Real>
void linear_cross_entropy(Cpu& be, Acc<Real>* losses, Acc<Real>* log_z, Real* dinp, Acc<Real>* dweight, Acc<Real>* dbias,
                          Real* logits, Acc<Real>* /*factors*/, const Real* inp, const Real* weight, const Real* bias,
                          const int* targets, double scale, double z_loss, int N, int C, int V, bool first = false) {
  linear_forward(be, logits, inp, weight, bias, N, C, V);
  cross_entropy(be, losses, log_z, logits, targets, scale, z_loss, N, V);
  linear_backward(be, dinp, dweight, dbias, logits, inp, weight, N, C, V, first);
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
__device__ __forceinline__ float exp_of(float x) { return exp2_(x * kLog2e); }

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
#if HOPPER
  extern __shared__ float4 shared_row[];
  __shared__ SoftmaxSum warps[2][kLossWorkers / 32];
  __shared__ uint64_t barriers[2 * kMostSlots];
  const uint32_t bytes = V * sizeof(Real), places = uint32_t(__cvta_generic_to_shared(shared_row)),
                 arrived = uint32_t(__cvta_generic_to_shared(barriers)), ready = arrived + 8 * kMostSlots;
  if (threadIdx.x == 0) {
    for (int i = 0; i < slots; ++i) {
      hopper::init_barrier(arrived + 8 * i, 1);           // the bytes of a row
      hopper::init_barrier(ready + 8 * i, kLossWorkers);  // every thread has written its part
    }
    hopper::publish();
  }
  __syncthreads();
  const int step = gridDim.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == kLossWorkers / 32) {
    if (lane > 0) return;
    auto bring = [&](int n, int slot) {
      hopper::expect_bytes(arrived + 8 * slot, bytes);
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       places + slot * bytes),
                   "l"(logits + size_t(n) * V), "r"(bytes), "r"(arrived + 8 * slot)
                   : "memory");
    };
    for (int slot = 0, n = blockIdx.x; slot < slots && n < N; ++slot, n += step) bring(n, slot);
    for (int n = blockIdx.x, slot = 0, parity = 0; n < N; n += step) {
      hopper::wait_barrier(ready + 8 * slot, parity);
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(logits + size_t(n) * V),
                   "r"(places + slot * bytes), "r"(bytes)
                   : "memory");
      hopper::commit_stores();
      hopper::wait_stores();  // the place is free
      if (n + slots * step < N) bring(n + slots * step, slot);
      if (++slot == slots) slot = 0, parity ^= 1;
    }
    return;
  }
  const int vectors = V / W;
  for (int n = blockIdx.x, slot = 0, parity = 0, turn = 0; n < N; n += step, turn ^= 1) {
    Real* row = reinterpret_cast<Real*>(reinterpret_cast<char*>(shared_row) + slot * size_t(bytes));
    const int target = targets[n];
    hopper::wait_barrier(arrived + 8 * slot, parity);
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
    hopper::publish();  // to the copy engine
    hopper::arrive(ready + 8 * slot);
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

// The head and the loss on Hopper. Their product ends in exponentials (gemm::Exponentials), so that the logits, which are
// larger than all else here, are written once and not read before the gradient's own products need them. The
// exponentials are relative to the target's logit, which is cheap to have before, as the row's maximum is not. Then Z comes
// from their sums, and the gradient of the logits is
//     scale (1 + 2 z_loss log Z) / Z e^logit, less scale at the target.
// The factor before the exponential is one number for all of a row. So it need not meet each of them: dinp = d weight and
// dweight = d^T inp take the exponentials as they are, and it goes to the rows of dinp and of inp, which are short. At the
// target stands, in place of its exponential, what the factor turns into the gradient there.
// Errors: an exponential as by exp_of(). The finishers add up 64 of them in 11 steps, a thread V / 1024 such sums, then 16
// threads meet: so log Z is off by (V / 1024 + 27) u at most. Gradients have one more rounding to bf16 than after
// cross_entropy(): of the rows that the factor is multiplied with.

// What a row's exponentials are relative to, in powers of two: offset (N), log2 e times the target's logit as far as fp32
// has it. Infinite where there is no target: then all become 0. A warp works on one row.
template <int W>
__global__ void target_offset_kernel(float* offset, const bf16* inp, const bf16* weight, const int* targets, int N,
                                     int C) {
  const int n = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (n >= N) return;
  const int target = targets[n];
  float sum = 0;
#pragma unroll 4
  for (int c = lane * W; c < (target < 0 ? 0 : C); c += 32 * W) {
    float x[W], w[W];
    load<W>(x, inp + size_t(n) * C + c);
    load<W>(w, weight + size_t(target) * C + c);
#pragma unroll
    for (int k = 0; k < W; ++k) sum += x[k] * w[k];
  }
  sum = warp_sum(sum);
  if (lane == 0) offset[n] = target < 0 ? INFINITY : rounded(sum) * kLog2e;
}

// A row's exponentials add up to less than this, and its target's logit is no further than that from the offset, 44
// nats: then nothing overflows that is made of them, and nothing that counts becomes 0.
constexpr float kMostOfRow = 0x1p64f;
constexpr int kFinishedRows = 32, kFinishWarps = 16;

// From sums (V/64 rounded up, N), a block makes the losses, log Z and factors of 32 rows, and puts the numbers right that
// stand at the targets in exponentials (N, V). losses comes with the targets' logits, log_z with the offsets. A row that
// passes kMostOfRow is made again, relative to its maximum: slowly, for it is rare.
static __global__ void __launch_bounds__(32 * kFinishWarps)
    finish_rows_kernel(float* losses, float* log_z, float* factors, bf16* exponentials, const float* sums,
                       const int* targets, const bf16* inp, const bf16* weight, float scale, float z_loss, int N, int C,
                       int V) {
  __shared__ float parts[kFinishWarps][kFinishedRows];
  __shared__ unsigned rows_to_repeat;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * kFinishedRows;
  // Adds the warps' numbers of each lane.
  auto sum_of_warps = [&](float x) {
    __syncthreads();  // another sum may still be read
    parts[warp][lane] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < kFinishWarps; ++i) x += parts[i][lane];
    return x;
  };
  // Of row n, the exponentials of the target and of all others, added up, and the loss.
  auto finish = [&](int n, float at_target, float others, float loss, float z) {
    losses[n] = loss, log_z[n] = z;
    const float more = 2 * z_loss * z, slope = 1 + more == 0 ? 0x1p-24f : 1 + more;  // not 0: it divides
    factors[n] = scale * slope / (at_target + others);
    exponentials[size_t(n) * V + targets[n]] = bf16((at_target * more - others) / slope);
  };

  const int own = first + lane;
  float sum = 0;
  if (own < N)
#pragma unroll 8
    for (int i = warp; i < (V + 63) / 64; i += kFinishWarps) sum += sums[size_t(i) * N + own];
  sum = sum_of_warps(sum);
  if (warp == 0) {
    bool repeat = false;
    if (own < N && targets[own] < 0) losses[own] = log_z[own] = factors[own] = 0;
    if (own < N && targets[own] >= 0) {
      const float logit = losses[own], distance = __fmaf_rn(logit, kLog2e, -log_z[own]);
      repeat = sum >= kMostOfRow || fabsf(distance) >= log2f(kMostOfRow);  // not for NaN, which stays
      const float at_target = exp2_(distance), loss = log1pf(sum / at_target);
      if (!repeat) finish(own, at_target, sum, loss, logit + loss);
    }
    const unsigned rows = __ballot_sync(~0u, repeat);
    if (lane == 0) rows_to_repeat = rows;
  }
  __syncthreads();
  for (unsigned rows = rows_to_repeat; rows; rows &= rows - 1) {
    const int n = first + __ffs(rows) - 1, target = targets[n];
    bf16* row = exponentials + size_t(n) * V;
    float highest = -INFINITY;
    for (int v = warp; v < V; v += kFinishWarps) {
      float logit = 0;
      for (int c = lane; c < C; c += 32) logit += float(inp[size_t(n) * C + c]) * float(weight[size_t(v) * C + c]);
      logit = rounded(warp_sum(logit));
      highest = fmaxf(highest, logit);
      if (lane == 0) row[v] = bf16(logit);
    }
    __syncthreads();
    parts[warp][lane] = highest;
    __syncthreads();
    for (int i = 0; i < kFinishWarps; ++i) highest = fmaxf(highest, parts[i][lane]);
    const float logit = row[target];
    __syncthreads();
    float others = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
      const float e = v == target ? 0 : exp_of(float(row[v]) - highest);
      others += e;
      row[v] = bf16(e);
    }
    others = warp_sum(sum_of_warps(others));
    const float at_target = exp_of(logit - highest), log_sum = logf(at_target + others);
    if (threadIdx.x == 0) finish(n, at_target, others, highest - logit + log_sum, highest + log_sum);
    __syncthreads();
  }
}

// out (N, C) = each row of in times its factor; a thread has W channels of one row. out can be in.
template <int W>
__global__ void scale_rows_kernel(bf16* out, const bf16* in, const float* factors, int N, int C) {
  const int vectors = C / W;
  const size_t id = blockIdx.x * size_t(blockDim.x) + threadIdx.x, n = id / vectors;
  if (n >= N) return;
  const size_t at = n * C + id % vectors * W;
  float x[W];
  load<W>(x, in + at);
#pragma unroll
  for (int k = 0; k < W; ++k) x[k] *= factors[n];
  store<W>(out + at, x);
}

// Whether the way above can be taken, and saves more than it costs: the logits are long rows beside inp's.
inline bool head_in_exponentials(const Cuda& be, const bf16* dinp, const bf16* logits, const bf16* inp,
                                 const bf16* weight, int N, int C, int V) {
  return V >= 8 * C && 2.0 * N * C * V > 1e9 && wide(C, dinp, inp, weight) &&
         divide_up(V, 64) * size_t(N) * sizeof(float) <= Cuda::kWorkspaceBytes &&
         gemm::supports(be, V, C, logits, inp, weight);
}

template <class Real>
void linear_cross_entropy(Cuda& be, Acc<Real>* losses, Acc<Real>* log_z, Real* dinp, Acc<Real>* dweight,
                          Acc<Real>* dbias, Real* logits, Acc<Real>* factors, const Real* inp, const Real* weight,
                          const Real* bias, const int* targets, double scale, double z_loss, int N, int C, int V,
                          bool first = false) {
  if constexpr (std::is_same_v<Real, bf16>)
    if (!bias && head_in_exponentials(be, dinp, logits, inp, weight, N, C, V)) {
      constexpr int W = kWide<bf16>;
      float* sums = static_cast<float*>(be.workspace);
      auto scale_rows = [&](const bf16* in) {
        launch(be, "scale_rows", scale_rows_kernel<W>, divide_up(size_t(N) * C / W, 256), 256, 0, dinp, in, factors, N, C);
      };
      launch(be, "target_offset", target_offset_kernel<W>, divide_up(N, 8), 256, 0, log_z, inp, weight, targets, N, C);
      gemm::multiply(be, logits, inp, weight, N, V, C, gemm::Exponentials(sums, losses, log_z, targets, N, V));
      launch(be, "finish_rows", finish_rows_kernel, divide_up(N, kFinishedRows), 32 * kFinishWarps, 0, losses, log_z,
             factors, logits, sums, targets, inp, weight, float(scale), float(z_loss), N, C, V);
      scale_rows(inp);  // to dinp, which is free until then
      linear_backward_parameters(be, dweight, dbias, logits, dinp, N, C, V, first);
      linear_backward_input(be, dinp, logits, weight, N, C, V);
      return scale_rows(dinp);
    }
  linear_forward(be, logits, inp, weight, bias, N, C, V);
  cross_entropy(be, losses, log_z, logits, targets, scale, z_loss, N, V);
  linear_backward(be, dinp, dweight, dbias, logits, inp, weight, N, C, V, first);
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
