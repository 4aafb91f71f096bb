#pragma once
// QK-Clip (Kimi K2, arXiv 2507.20534, section 2.1): keeps attention logits from growing by way of the weights. After
// an update, each query head whose largest logit of that step is above tau is scaled by what would have made it tau: q
// and k are linear in their rows of Wqkv and of its bias, and so is RoPE in them.
//
//     a key head of its own      sqrt(tau / largest) to the rows of its query and of its key
//     one shared by a group      tau / largest to the rows of its query alone: the others of the group stay as they are
//
// A logit is q . k / sqrt(HS), before --attention-softcap, and the largest is the largest in size, as max_logit in
// layers.csv: other than in the paper, a very negative one counts.

#include <cmath>
#include <vector>

#include "device/comm.h"
#include "run/diagnostics.cuh"

// What a head's rows are multiplied by: `head` counts NH query heads, then NKV key heads. A row of max_logit (ranks,
// stride) begins with a rank's largest logits (NH).
HOST_DEVICE inline double qk_clip_factor(const double* max_logit, int ranks, int stride, int head, int NH, int NKV,
                                         double tau) {
  if (head >= NH && NKV < NH) return 1;
  double largest = 0;
  for (int r = 0; r < ranks; ++r) largest = fmax(largest, max_logit[size_t(r) * stride + head % NH]);
  if (!(largest > tau && largest < INFINITY)) return 1;
  return NKV < NH ? tau / largest : sqrt(tau / largest);
}

// Scales elements first .. first+n-1 of the rows of queries and keys, (NH + NKV, width), of a layer's qkv weight or
// bias: the master weights and the model's own (n each), which may be the same. `width` elements belong to a head.
// Nothing is done after a step whose norm (1) was not finite: it changed nothing.
template <class Real>
void qk_clip(Cpu&, Real* weights, Acc<Real>* master, size_t first, size_t n, size_t width, const double* max_logit,
             int ranks, int stride, int NH, int NKV, double tau, const Acc<Real>* norm) {
  if (!std::isfinite(norm[0])) return;
  std::vector<Real> factors;
  for (int head = 0; head < NH + NKV; ++head)
    factors.push_back(Real(qk_clip_factor(max_logit, ranks, stride, head, NH, NKV, tau)));
  for (size_t i = 0; i < n; ++i) weights[i] = master[i] *= factors[(first + i) / width];
}

#ifdef __CUDACC__

template <class Real>
__global__ void __launch_bounds__(256)
    qk_clip_kernel(Real* weights, float* master, size_t first, size_t n, size_t width, const double* max_logit,
                   int ranks, int stride, int NH, int NKV, double tau, const float* norm) {
  const size_t i = blockIdx.x * size_t(256) + threadIdx.x;
  if (i >= n || !isfinite(norm[0])) return;
  const double factor = qk_clip_factor(max_logit, ranks, stride, int((first + i) / width), NH, NKV, tau);
  if (factor == 1) return;
  const float w = master[i] * float(factor);
  master[i] = w;
  weights[i] = Real(w);
}

template <class Real>
void qk_clip(Cuda& be, Real* weights, float* master, size_t first, size_t n, size_t width, const double* max_logit,
             int ranks, int stride, int NH, int NKV, double tau, const float* norm) {
  launch(be, "qk_clip", qk_clip_kernel<Real>, divide_up(n, 256), 256, 0, weights, master, first, n, width, max_logit,
         ranks, stride, NH, NKV, tau, norm);
}

#endif  // __CUDACC__

// Around one step: begin(), after each micro-batch add_micro_batch(), after the update apply(). With tau 0 they do
// nothing. The largest logits come from a pass of attention_statistics() over what the forward pass left. They are those
// of all micro-batches, lanes and ranks; each rank scales its own shard.
template <class Backend, class Real>
class QkClip {
 public:
  QkClip(Model<Backend, Real>& model, double tau) : model_(model), c_(model.config), tau_(tau) {
    if (!tau_) return;
    logits_ = size_t(c_.layers) * c_.heads;
    memory_ = Buffer<Backend>(model.be, (model.division.ranks * logits_ + c_.heads) * sizeof(double));
    max_logit_ = memory_.template as<double>();
    mine_ = max_logit_ + model.division.rank * logits_;
  }

  void begin() {
    if (tau_) model_.be.zero(memory_.data, memory_.bytes);
  }

  // After train_batch(): the activations are still those of its forward pass, on the whole batch.
  void add_micro_batch() {
    if (!tau_) return;
    double* entropy = max_logit_ + model_.division.ranks * logits_;  // of no use here
    for (int l = 0; l < c_.layers; ++l)
      attention_statistics(model_.be, mine_ + l * c_.heads, entropy, model_.grads.D /* not in use now */,
                           model_.acts.blocks[l].qkv, model_.acts.blocks[l].lse,
                           c_.heads_shape(model_.B, model_.T, 0), c_.attention_softcap);
  }

  // All ranks call it.
  void apply(Comm<Backend>& comm) {
    if (!tau_) return;
    comm.all_gather(max_logit_, logits_ * sizeof(double));
    const size_t heads = c_.heads + c_.kv_heads, begin = model_.shard_begin, end = begin + model_.shard;
    for (int l = 0; l < c_.layers; ++l)
      for (const char* kind : {"weight", "bias"})
        for (const ParameterRow& row : model_.table.rows) {
          if (row.name != "layers." + std::to_string(l) + ".qkv." + kind) continue;
          const size_t width = row.count / c_.qkv_width() * c_.head_size,  // elements of a head
              from = std::max(row.offset, begin), to = std::min(row.offset + heads * width, end);
          if (from < to)
            qk_clip(model_.be, model_.weights_flat + from, model_.master + (from - begin), from - row.offset, to - from,
                    width, max_logit_ + l * c_.heads, model_.division.ranks, int(logits_), c_.heads, c_.kv_heads, tau_,
                    &model_.result->norm);
        }
  }

 private:
  Model<Backend, Real>& model_;
  const Config& c_;
  double tau_;
  size_t logits_ = 0;  // (layers, NH)
  Buffer<Backend> memory_;
  double *max_logit_ = nullptr, *mine_ = nullptr;  // (ranks, layers, NH); this rank's row
};
