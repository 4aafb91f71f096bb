#pragma once
// AdamW, the global norm of the gradient and clipping, learning-rate schedules.

#include <vector>

#include "device/backend.h"

enum class Schedule { cosine, linear, constant };

// Learning rate of step (0, 1, ...): linear warm-up over `warmup` steps to lr, then down to min_lr at the last step.
inline double learning_rate(Schedule schedule, int step, int steps, int warmup, double lr, double min_lr) {
  // From lr / warmup, not from 0: the first step is to do something.
  if (step < warmup) return lr * (step + 1) / warmup;
  if (schedule == Schedule::constant) return lr;
  // The last step, steps - 1, is to have min_lr.
  const double done = steps - 1 > warmup ? double(step - warmup) / (steps - 1 - warmup) : 1.0;
  const double share = schedule == Schedule::linear ? 1 - done : 0.5 * (1 + std::cos(M_PI * done));
  return min_lr + (lr - min_lr) * (done > 1 ? 0 : share);
}

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
  double clip;  // largest global gradient norm; 0: no clipping
  int step;     // 1, 2, ...: for the bias correction
};

// ---------------------------------------------------------------------------------------------------------------------
// CPU

// How many partial sums sum_squares() makes of n elements.
inline size_t partial_sums(Cpu&, size_t n) { return (n + (1 << 16) - 1) >> 16; }

// partial (partial_sums(n)) = sums of the squares of gradients (n) over chunks of a fixed size, in double.
template <class Real>
void sum_squares(Cpu& be, double* partial, const Real* gradients, size_t n) {
  const size_t chunk = 1 << 16, chunks = partial_sums(be, n);
#pragma omp parallel for
  for (size_t i = 0; i < chunks; ++i) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t j = i * chunk; j < std::min(n, (i + 1) * chunk); ++j)
      sum += double(gradients[j]) * double(gradients[j]);
    partial[i] = sum;
  }
}

// norm (1) = the root of the sum of partial (count).
template <class Real>
void gradient_norm(Cpu&, Real* norm, const double* partial, size_t count) {
  double sum = 0;
  for (size_t i = 0; i < count; ++i) sum += partial[i];
  norm[0] = Real(std::sqrt(sum));
}

// One step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), equal to torch.optim.AdamW after
// torch.nn.utils.clip_grad_norm_. master, gradients, m, v (n); parameters (n) receives the new values in the model's
// own type (it may be master itself). A norm that is not finite changes nothing: the caller stops the run.
template <class Real>
void adamw(Cpu&, Real* parameters, Acc<Real>* master, const Acc<Real>* gradients, Acc<Real>* m, Acc<Real>* v,
           const Acc<Real>* norm, size_t n, const AdamW& a) {
  using T = Acc<Real>;
  if (!std::isfinite(norm[0])) return;
  // torch's formula, with its 1e-6; a norm below the limit changes nothing.
  const T clip = a.clip > 0 ? T(std::min(1.0, a.clip / (double(norm[0]) + 1e-6))) : T(1);
  const T beta1 = T(a.beta1), beta2 = T(a.beta2), eps = T(a.eps);
  // m and v start at 0, so they are too small by 1 - beta^step at first: the corrections, as factors for all elements.
  const T step_size = T(a.lr / (1 - std::pow(a.beta1, a.step)));
  const T correction2 = T(1 / std::sqrt(1 - std::pow(a.beta2, a.step)));
  const T keep = T(1 - a.lr * a.weight_decay);  // in double first: 1 less 1e-5 has few digits in fp32
#pragma omp parallel for simd
  for (size_t i = 0; i < n; ++i) {
    const T g = gradients[i] * clip;
    // Running means of the gradient and of its square; the step goes by their ratio, so not by the gradient's scale.
    m[i] = beta1 * m[i] + (1 - beta1) * g;
    v[i] = beta2 * v[i] + (1 - beta2) * g * g;
    // Decay acts on the weight itself, not by way of the gradient: that is the W of AdamW.
    master[i] = master[i] * keep - step_size * m[i] / (std::sqrt(v[i]) * correction2 + eps);
    parameters[i] = Real(master[i]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA

#ifdef __CUDACC__

constexpr int kNormBlocks = 1024;

inline size_t partial_sums(Cuda&, size_t) { return kNormBlocks; }

// A thread adds up the squares of every (blocks * 256)-th vector of 4.
static __global__ void __launch_bounds__(256) squares_kernel(double* partial, const float* gradients, size_t n) {
  const size_t stride = size_t(gridDim.x) * 256, id = blockIdx.x * size_t(256) + threadIdx.x;
  double sum = 0;  // memory takes longer than this
#pragma unroll 4
  for (size_t i = id; i < n / 4; i += stride) {
    float g[4];
    load<4>(g, gradients + 4 * i);
    sum += g[0] * g[0] + g[1] * g[1] + g[2] * g[2] + g[3] * g[3];
  }
  if (id < n % 4) sum += gradients[n - 1 - id] * gradients[n - 1 - id];
  // One number per block, added up by a second kernel: the order does not depend on which block is ready first.
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}
static __global__ void __launch_bounds__(256) gradient_norm_kernel(float* norm, const double* partial, size_t count) {
  double sum = 0;
  for (size_t i = threadIdx.x; i < count; i += 256) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) norm[0] = float(sqrt(sum));
}

// gradients: at a multiple of 16 bytes.
inline void sum_squares(Cuda& be, double* partial, const float* gradients, size_t n) {
  launch(be, "sum_squares", squares_kernel, kNormBlocks, 256, 0, partial, gradients, n);
}

// The norm stays on the device, where adamw reads it.
inline void gradient_norm(Cuda& be, float* norm, const double* partial, size_t count) {
  launch(be, "gradient_norm", gradient_norm_kernel, 1, 256, 0, norm, partial, count);
}

// The constants of a step, in fp32: what the CPU version computes before its loop.
struct AdamWStep {
  float clip, beta1, beta2, eps, step_size, correction2, keep;
};

// A thread updates W neighbouring parameters.
template <class Real, int W>
__global__ void __launch_bounds__(256) adamw_kernel(Real* parameters, float* master, const float* gradients, float* m,
                                                    float* v, const float* norm, size_t n, AdamWStep a) {
  const size_t i = (blockIdx.x * size_t(256) + threadIdx.x) * W;  // of its W parameters the first
  const float total = norm[0];
  // All threads see the same norm: either all of the weights change or none.
  if (i >= n || !isfinite(total)) return;
  const float clip = a.clip > 0 ? fminf(1.0f, a.clip / (total + 1e-6f)) : 1.0f;
  // Four arrays are read and four written: the kernel is as fast as memory, whatever it computes.
  float w[W], g[W], first[W], second[W];
  load<W>(w, master + i);
  load<W>(g, gradients + i);
  load<W>(first, m + i);
  load<W>(second, v + i);
#pragma unroll
  for (int k = 0; k < W; ++k) {
    g[k] *= clip;
    first[k] = a.beta1 * first[k] + (1 - a.beta1) * g[k];
    second[k] = a.beta2 * second[k] + (1 - a.beta2) * g[k] * g[k];
    // As on the CPU; the two corrections are in step_size and correction2.
    w[k] = w[k] * a.keep - a.step_size * first[k] / (sqrtf(second[k]) * a.correction2 + a.eps);
  }
  store<W>(master + i, w);
  store<W>(m + i, first);
  store<W>(v + i, second);
  // bf16: the model's copy is made here, while the new weight is at hand.
  if (static_cast<void*>(parameters) != master) store<W>(parameters + i, w);
}

template <class Real>
void adamw(Cuda& be, Real* parameters, Acc<Real>* master, const Acc<Real>* gradients, Acc<Real>* m, Acc<Real>* v,
           const Acc<Real>* norm, size_t n, const AdamW& a) {
  const AdamWStep step = {float(a.clip),
                          float(a.beta1),
                          float(a.beta2),
                          float(a.eps),
                          float(a.lr / (1 - std::pow(a.beta1, a.step))),
                          float(1 / std::sqrt(1 - std::pow(a.beta2, a.step))),
                          float(1 - a.lr * a.weight_decay)};
  const bool aligned = wide(4, master, gradients, m, v) && reinterpret_cast<uintptr_t>(parameters) % 8 == 0;
  with_width<4>(n % 4 == 0 && aligned, [&](auto W) {
    launch(be, "adamw", adamw_kernel<Real, W()>, divide_up(n, 256 * W()), 256, 0, parameters, master, gradients, m, v,
           norm, n, step);
  });
}

static __global__ void convert_kernel(bf16* to, const float* from, size_t n) {
  const size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  if (i < n) to[i] = from[i];
}
// to = from, rounded to nearest even; (n).
inline void convert(Cuda& be, bf16* to, const float* from, size_t n) {
  launch(be, "convert", convert_kernel, divide_up(n, 256), 256, 0, to, from, n);
}

#endif  // __CUDACC__
