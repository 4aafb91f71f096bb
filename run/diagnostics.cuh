#pragma once
// The numbers of run/diagnostics.h: operations that look at what a step left in memory, and the class that calls them.

#include <algorithm>
#include <cmath>
#include <vector>

#include "model.h"
#include "run/diagnostics.h"

// ---------------------------------------------------------------------------------------------------------------------
// CPU

// For diagnostics, what the attention weights of each query head are like. entropies (B, NH, T): of each query's
// distribution, -sum_s p_s log p_s, in nats, 0 to log(t + 1); entropy (NH) += their sum over the batch. max_logit (NH)
// is raised to the largest |score_s| of the causal pairs, before the soft cap. From qkv and lse as attention_forward()
// read and left them, s.first = 0: the scores are computed again. Scores that are NaN make the entropy NaN and are not
// in max_logit.
//
// With d_s = lse - score_s = -log p_s the entropy is sum_s exp(-d_s) d_s: no difference of two large numbers, as
// lse - sum_s p_s score_s would be when the logits have grown to thousands.
template <class Real>
void attention_statistics(Cpu&, double* max_logit, double* entropy, Acc<Real>* entropies, const Real* qkv,
                          const Acc<Real>* lse, AttentionShape s, double softcap = 0) {
  const int group = s.NH / s.NKV, stride = (s.NH + 2 * s.NKV) * s.HS, p_stride = round_up(s.T, 16) + 16;
  const Real scale = Real(1) / std::sqrt(Real(s.HS));
  std::vector<Real> highest(size_t(s.B) * s.NH);
#pragma omp parallel for schedule(dynamic)
  for (int bh = 0; bh < s.B * s.NH; ++bh) {
    const int h = bh % s.NH;
    const Real* sequence = qkv + size_t(bh / s.NH) * s.T * stride;
    static thread_local Kept<Real> k_memory, p_memory;
    const Packed<Real> k_transposed =
        pack(k_memory, transposed(sequence + (s.NH + h / group) * s.HS, stride), s.HS, s.T);
    Real* p = p_memory.room(size_t(kQueryBlock) * p_stride);
    for (int t0 = 0; t0 < s.T; t0 += kQueryBlock) {
      const int t1 = std::min(t0 + kQueryBlock, s.T);
      multiply_packed<Real>(p, p_stride, nullptr, 0,
                            row_major(sequence + size_t(t0) * stride + h * s.HS, stride), k_transposed, t1 - t0, t1,
                            s.HS);
      for (int t = t0; t < t1; ++t) {
        const Real *row = p + size_t(t - t0) * p_stride, row_lse = lse[size_t(bh) * s.T + t];
        Real top = 0;
#pragma omp simd reduction(max : top)
        for (int j = 0; j <= t; ++j) {
          const Real size = std::fabs(row[j] * scale);
          top = size > top ? size : top;
        }
        highest[bh] = std::max(highest[bh], top);
        entropies[size_t(bh) * s.T + t] = Real(sum_in_chunks<Real>(t + 1, [=](int j) {
          const Real score = row[j] * scale, d = row_lse - (softcap ? soft_cap(score, Real(softcap)) : score);
          return exp_(-d) * d;
        }));
      }
    }
  }
  for (int b = 0; b < s.B; ++b)
    for (int h = 0; h < s.NH; ++h) {
      const int bh = b * s.NH + h;
      max_logit[h] = std::max(max_logit[h], double(highest[bh]));
      double sum = 0;
      for (int t = 0; t < s.T; ++t) sum += entropies[size_t(bh) * s.T + t];
      entropy[h] += sum;
    }
}

// sums (groups) += the squares of each group of channels, over all rows: x holds N rows, `stride` elements apart, that
// begin with `groups` groups of `width` channels. For diagnostics: the residual stream is one group, queries and keys
// are a group per head. In double.
template <class Real>
void add_squares(Cpu&, double* sums, const Real* x, int N, int groups, int width, int stride) {
  std::vector<double> partial(size_t(row_chunks(N)) * groups);
  for_row_chunks(N, [&](int chunk, int begin, int end) {
    for (int n = begin; n < end; ++n)
      for (int g = 0; g < groups; ++g) {
        const Real* row = x + size_t(n) * stride + g * width;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < width; ++c) sum += double(row[c]) * double(row[c]);
        partial[size_t(chunk) * groups + g] += sum;
      }
  });
  add_row_chunks(sums, partial.data(), N, groups, groups);
}

// What diagnostics say of a parameter tensor: sums of squares of its gradient (before clipping), of its weights, and of
// the step's change of the weights; and how many elements of its gradient are not finite.
struct TensorStatistics {
  double gradient, weight, update, nonfinite;
};
// Where it lies in the flat array of all parameters, and whether it decays.
struct TensorPlace {
  size_t offset, count;
  int decays;
};

// The change that the AdamW step `a` made to a weight, from what it left behind: w' = keep w - u gives
// w' - w = -(u + (1 - keep) w) with w = (w' + u) / keep. No copy of the weights is needed, and no two numbers that are
// almost the same are subtracted.
template <class T>
struct AdamWChange {
  T step_size, correction2, eps, decay;
  explicit AdamWChange(const AdamW& a)
      : step_size(T(a.lr / (1 - std::pow(a.beta1, a.step)))),
        correction2(T(1 / std::sqrt(1 - std::pow(a.beta2, a.step)))),
        eps(T(a.eps)),
        decay(1 - T(1 - a.lr * a.weight_decay)) {}
  HOST_DEVICE T operator()(T master, T m, T v, bool decays) const {
    const T u = step_size * m / (sqrt(v) * correction2 + eps), lost = decays ? decay : T(0);
    return -(u + lost * (master + u) / (1 - lost));
  }
};

// After adamw() with `a` and norm (1): out (tensors), of the tensors at `places` (tensors) of the flat arrays. A step
// whose norm was not finite changed nothing.
template <class Real>
void tensor_statistics(Cpu&, TensorStatistics* out, const TensorPlace* places, int tensors, const Real* master,
                       const Real* gradients, const Real* m, const Real* v, const Real* norm, const AdamW& a) {
  const AdamWChange<Real> change(a);
  const bool changed = std::isfinite(norm[0]);
  const size_t chunk = 1 << 16;
  for (int tensor = 0; tensor < tensors; ++tensor) {
    const TensorPlace& at = places[tensor];
    std::vector<TensorStatistics> partial((at.count + chunk - 1) / chunk);
#pragma omp parallel for
    for (size_t r = 0; r < partial.size(); ++r) {
      double gradient = 0, weight = 0, update = 0, nonfinite = 0;
#pragma omp simd reduction(+ : gradient, weight, update, nonfinite)
      for (size_t i = at.offset + r * chunk; i < at.offset + std::min(at.count, (r + 1) * chunk); ++i) {
        const double g = gradients[i], w = master[i], u = change(master[i], m[i], v[i], at.decays);
        gradient += g * g;
        weight += w * w;
        update += u * u;
        nonfinite += std::isfinite(g) ? 0 : 1;
      }
      partial[r] = {gradient, weight, changed ? update : 0, nonfinite};
    }
    out[tensor] = {0, 0, 0, 0};
    for (const TensorStatistics& p : partial) {
      out[tensor].gradient += p.gradient;
      out[tensor].weight += p.weight;
      out[tensor].update += p.update;
      out[tensor].nonfinite += p.nonfinite;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA

#ifdef __CUDACC__

// Diagnostics: a warp works out one query, a lane every 32nd key.
template <class Real, int CHANNELS, bool CAPPED>
__global__ void __launch_bounds__(kAttentionWarps * 32)
    attention_statistics_kernel(double* max_logit, float* entropies, const Real* qkv, const float* lse,
                                AttentionShape s, float scale, float cap) {
  __shared__ float shared[kAttentionWarps][CHANNELS];
  const AttentionPlace at = attention_place(s.NH, s.T);
  if (at.b >= s.B) return;
  const int lane = threadIdx.x % 32, t = at.row, HS = s.HS;
  const size_t stride = size_t(s.NH + 2 * s.NKV) * HS, row_at = (size_t(at.b) * s.NH + at.h) * s.T + t;
  const Real* sequence = qkv + size_t(at.b) * s.T * stride;
  const Real* keys = sequence + (s.NH + at.h / (s.NH / s.NKV)) * HS;
  float* q = shared[threadIdx.x / 32];
  stage_row(q, sequence + t * stride + at.h * HS, HS);
  __syncwarp();
  float top = 0, sum = 0;
  for (int j = lane; j <= t; j += 32) {
    const float score = dot_row(q, keys + j * stride, HS) * scale, d = lse[row_at] - soft_cap<CAPPED>(score, cap);
    top = fmaxf(top, fabsf(score));
    sum += __expf(-d) * d;
  }
  top = warp_max(top);
  sum = warp_sum(sum);
  if (lane > 0) return;
  entropies[row_at] = sum;
  raise_to(max_logit + at.h, top);
}

// A block adds up the entropies (B, NH, T) of one head.
static __global__ void __launch_bounds__(1024)
    add_entropies_kernel(double* entropy, const float* entropies, int B, int NH, int T) {
  double sum = 0;
  for (int b = 0; b < B; ++b)
    for (int t = threadIdx.x; t < T; t += 1024) sum += entropies[(size_t(b) * NH + blockIdx.x) * T + t];
  sum = block_sum(sum);
  if (threadIdx.x == 0) entropy[blockIdx.x] += sum;
}

template <class Real>
void simple_attention_statistics(Cuda& be, double* max_logit, float* entropies, const Real* qkv, const float* lse,
                                 AttentionShape s, double softcap) {
  with_channels(s.HS, [&](auto channels) {
    with_cap(softcap, [&](auto capped) {
      launch(be, "attention_statistics", attention_statistics_kernel<Real, channels(), capped()>,
             divide_up(size_t(s.B) * s.NH * s.T, kAttentionWarps), kAttentionWarps * 32, 0, max_logit, entropies, qkv,
             lse, s, 1 / std::sqrt(float(s.HS)), float(softcap));
    });
  });
}

template <class Real>
void attention_statistics(Cuda& be, double* max_logit, double* entropy, Acc<Real>* entropies, const Real* qkv,
                          const Acc<Real>* lse, AttentionShape s, double softcap = 0) {
  bool done = false;
  if constexpr (std::is_same_v<Real, bf16>)
    if ((done = use_flash_attention<Real>(be, s)))
      flash_attention_statistics(be, max_logit, entropies, qkv, lse, s.B, s.T, s.NH, s.NKV, s.HS, softcap);
  if (!done) simple_attention_statistics(be, max_logit, entropies, qkv, lse, s, softcap);
  launch(be, "attention_statistics", add_entropies_kernel, s.NH, 1024, 0, entropy, (const float*)entropies, s.B, s.NH,
         s.T);
}

// A block works on some rows of the group blockIdx.y, a thread on every so many'th vector of W channels.
template <class Real, int W>
__global__ void __launch_bounds__(256) squares_of_groups_kernel(double* partial, const Real* x, int N, int width,
                                                                int stride) {
  const unsigned vectors = width / W, count = N * vectors;
  float sum = 0;
#pragma unroll 4
  for (unsigned i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256) {
    float v[W];
    load<W>(v, x + size_t(i / vectors) * stride + blockIdx.y * width + i % vectors * W);
#pragma unroll
    for (int k = 0; k < W; ++k) sum += v[k] * v[k];
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = total;
}
static __global__ void __launch_bounds__(256) add_groups_kernel(double* sums, const double* partial, int parts) {
  double sum = 0;
  for (int i = threadIdx.x; i < parts; i += 256) sum += partial[size_t(blockIdx.x) * parts + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] += sum;
}

template <class Real>
void add_squares(Cuda& be, double* sums, const Real* x, int N, int groups, int width, int stride) {
  double* partial = static_cast<double*>(be.workspace);
  const int parts = int(std::min<size_t>(divide_up(8 * be.multiprocessors, groups), divide_up(size_t(N) * width, 256)));
  with_width<kWide<Real>>(wide(width, x) && wide(stride, x), [&](auto W) {
    launch(be, "add_squares", squares_of_groups_kernel<Real, W()>, dim3(parts, groups), 256, 0, partial, x, N, width,
           stride);
  });
  launch(be, "add_squares", add_groups_kernel, groups, 256, 0, sums, (const double*)partial, parts);
}

constexpr int kTensorBlocks = 128;

// A block works on part of the tensor blockIdx.y; a second kernel adds up the parts (tensors, kTensorBlocks).
static __global__ void __launch_bounds__(256)
    tensor_statistics_kernel(TensorStatistics* partial, const TensorPlace* places, const float* master,
                             const float* gradients, const float* m, const float* v, const float* norm,
                             AdamWChange<float> change) {
  const TensorPlace at = places[blockIdx.y];
  const bool changed = isfinite(norm[0]);
  TensorStatistics sum = {0, 0, 0, 0};
  for (size_t i = blockIdx.x * 256 + threadIdx.x; i < at.count; i += kTensorBlocks * 256) {
    const size_t at_i = at.offset + i;
    const double g = gradients[at_i], w = master[at_i],
                 u = changed ? change(master[at_i], m[at_i], v[at_i], at.decays) : 0;
    sum.gradient += g * g;
    sum.weight += w * w;
    sum.update += u * u;
    sum.nonfinite += !isfinite(g);
  }
  sum = {block_sum(sum.gradient), block_sum(sum.weight), block_sum(sum.update), block_sum(sum.nonfinite)};
  if (threadIdx.x == 0) partial[blockIdx.y * kTensorBlocks + blockIdx.x] = sum;
}
static __global__ void __launch_bounds__(kTensorBlocks)
    add_tensor_statistics_kernel(TensorStatistics* out, const TensorStatistics* partial) {
  const TensorStatistics p = partial[blockIdx.x * kTensorBlocks + threadIdx.x];
  const TensorStatistics sum = {block_sum(p.gradient), block_sum(p.weight), block_sum(p.update),
                                block_sum(p.nonfinite)};
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

inline void tensor_statistics(Cuda& be, TensorStatistics* out, const TensorPlace* places, int tensors,
                              const float* master, const float* gradients, const float* m, const float* v,
                              const float* norm, const AdamW& a) {
  TensorStatistics* partial = static_cast<TensorStatistics*>(be.workspace);
  launch(be, "tensor_statistics", tensor_statistics_kernel, dim3(kTensorBlocks, tensors), 256, 0, partial, places,
         master, gradients, m, v, norm, AdamWChange<float>(a));
  launch(be, "tensor_statistics", add_tensor_statistics_kernel, tensors, kTensorBlocks, 0, out,
         (const TensorStatistics*)partial);
}

#endif  // __CUDACC__

// ---------------------------------------------------------------------------------------------------------------------

// Looks at a training step from outside: it reads what the step leaves in memory and changes nothing, so that a run is
// the same, to the bit, with and without it. Around one step: begin(), after each micro-batch add_micro_batch(), between
// lanes next_lane(), after the update add_update(), then read(). As with the gradient, what is seen of lanes and of
// parts of the flat arrays is added up in order: the number of ranks changes nothing.
template <class Backend, class Real>
class Diagnostics {
 public:
  explicit Diagnostics(Model<Backend, Real>& model) : model_(model), c_(model.config) {
    std::vector<TensorPlace> places;
    for (const auto& piece : pieces_of(model.division.rank)) places.push_back(piece.second);
    pieces_ = int(places.size());
    sums_memory_ = Buffer<Backend>(model.be, sums_count() * sizeof(double) + pieces_ * sizeof(TensorStatistics));
    sums_ = sums_memory_.template as<double>();
    piece_sums_ = reinterpret_cast<TensorStatistics*>(sums_ + sums_count());
    places_memory_ = Buffer<Backend>(model.be, pieces_ * sizeof(TensorPlace));
    model.be.upload(places_memory_.data, places.data(), places_memory_.bytes);
    model.be.synchronize();
  }

  void begin() {
    model_.be.zero(sums_memory_.data, sums_memory_.bytes);
    lanes_.clear();
    tokens_ = 0;
  }

  // After train_batch(): the activations are still those of its forward pass, on the whole batch.
  void add_micro_batch() {
    const int N = model_.B * model_.T, heads = c_.heads + c_.kv_heads;
    for (int l = 0; l < c_.layers; ++l) {
      const BlockActivations<Real>& a = model_.acts.blocks[l];
      const LayerSums sums = of_layer(sums_, l);
      attention_statistics(model_.be, sums.max_logit, sums.entropy, model_.grads.D /* not in use now */, a.qkv, a.lse,
                           c_.heads_shape(model_.B, model_.T, 0), c_.attention_softcap);
      add_squares(model_.be, sums.qk_squares, a.qkv, N, heads, c_.head_size, c_.qkv_width());
      add_squares(model_.be, sums.x_squares, a.x, N, 1, c_.width, c_.width);
    }
    tokens_ += N * model_.division.ranks;  // the other ranks do as many
  }

  // Waits for the device.
  void next_lane() {
    const size_t count = sums_count();
    lanes_.resize(lanes_.size() + count);
    model_.be.download(&lanes_[lanes_.size() - count], sums_, count * sizeof(double));
    model_.be.zero(sums_, count * sizeof(double));
  }

  void add_update(const AdamW& a) {
    tensor_statistics(model_.be, piece_sums_, places_memory_.template as<TensorPlace>(), pieces_, model_.master,
                      model_.gradient, model_.m, model_.v, &model_.result->norm, a);
  }

  // Waits for the device. All ranks call it; rank 0 gets the result, the others nothing.
  StepDiagnostics read(Ranks& ranks) {
    next_lane();
    std::vector<double> mine = lanes_;
    mine.resize(mine.size() + pieces_ * sizeof(TensorStatistics) / sizeof(double));
    model_.be.download(mine.data() + lanes_.size(), piece_sums_, pieces_ * sizeof(TensorStatistics));
    const std::vector<std::vector<double>> of_rank = ranks.gather(mine);
    StepDiagnostics d;
    if (!ranks.root()) return d;

    std::vector<double> all(sums_count());
    std::vector<TensorStatistics> tensors(model_.table.rows.size());
    for (int lane = 0; lane < model_.division.lanes; ++lane) {
      const double* lane_sums = of_rank[lane % ranks.size].data() + lane / ranks.size * sums_count();
      for (size_t i = 0; i < sums_count(); ++i)  // a layer's sums begin with max_logit (NH)
        all[i] = i % layer_sums() < size_t(c_.heads) ? std::max(all[i], lane_sums[i]) : all[i] + lane_sums[i];
    }
    for (int r = 0; r < ranks.size; ++r) {
      const auto* piece = reinterpret_cast<const TensorStatistics*>(of_rank[r].data() + lanes_.size());
      for (const auto& place : pieces_of(r)) {
        TensorStatistics& t = tensors[place.first];
        t.gradient += piece->gradient;
        t.weight += piece->weight;
        t.update += piece->update;
        t.nonfinite += piece++->nonfinite;
      }
    }

    for (int l = 0; l < c_.layers; ++l) {
      const LayerSums sums = of_layer(all.data(), l);
      auto rms = [&](double squares, int width) { return unsigned_nan(std::sqrt(squares / tokens_ / width)); };
      for (int h = 0; h < c_.heads; ++h)
        d.heads.push_back({l, h, sums.max_logit[h], unsigned_nan(sums.entropy[h] / tokens_),
                           rms(sums.qk_squares[h], c_.head_size),
                           rms(sums.qk_squares[c_.heads + h / (c_.heads / c_.kv_heads)], c_.head_size),
                           rms(sums.x_squares[0], c_.width)});
    }
    const TensorStatistics* t = tensors.data();
    for (const ParameterRow& row : model_.table.rows) {
      d.tensors.push_back({row.name, unsigned_nan(std::sqrt(t->gradient)), std::sqrt(t->weight / row.count),
                           t->weight > 0 ? std::sqrt(t->update / t->weight) : 0, t->nonfinite});
      ++t;
    }
    return d;
  }

 private:
  Model<Backend, Real>& model_;
  const Config& c_;
  int pieces_ = 0;
  size_t tokens_ = 0;
  Buffer<Backend> sums_memory_, places_memory_;
  double* sums_;                  // of the lane at work: (layers, LayerSums)
  TensorStatistics* piece_sums_;  // (pieces)
  std::vector<double> lanes_;     // of this rank's lanes: (rounds, layers, LayerSums)

  struct LayerSums {
    double *max_logit, *entropy /* (NH) */, *qk_squares /* (NH + NKV) */, *x_squares /* (1) */;
  };
  size_t layer_sums() const { return 3 * c_.heads + c_.kv_heads + 1; }
  size_t sums_count() const { return c_.layers * layer_sums(); }
  LayerSums of_layer(double* sums, int layer) const {
    double* at = sums + layer * layer_sums();
    return {at, at + c_.heads, at + 2 * c_.heads, at + 3 * c_.heads + c_.kv_heads};
  }

  // What a rank holds of the tensors, each cut where a part of the flat arrays ends: rows of the table, and places in
  // the rank's shard.
  std::vector<std::pair<size_t, TensorPlace>> pieces_of(int rank) const {
    const size_t part = model_.table.total / model_.division.lanes, first = rank * model_.shard;
    std::vector<std::pair<size_t, TensorPlace>> pieces;
    for (size_t i = 0; i < model_.table.rows.size(); ++i) {
      const ParameterRow& row = model_.table.rows[i];
      for (size_t p = first; p < first + model_.shard; p += part) {
        const size_t begin = std::max(row.offset, p), end = std::min(row.offset + row.count, p + part);
        if (begin < end) pieces.push_back({i, {begin - first, end - begin, row.decays()}});
      }
    }
    return pieces;
  }
};
