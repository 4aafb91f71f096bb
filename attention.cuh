#pragma once
// Causal self-attention over the buffer qkv, in which a token's queries, keys and values stand side by side; QK-Norm.
//
// For a query q at position t and the keys k_s, values v_s at positions s <= t of its sequence:
//     score_s = q . k_s / sqrt(HS)      p = softmax(score)      out = sum_s p_s v_s
// Grouped-query attention: NH query heads share NKV key/value heads; query head h reads key/value head h / (NH/NKV).
//
// With a soft cap C > 0 (Gemma 2, arXiv 2408.00118, section 2.2) a score becomes C tanh(score / C), which stays within
// (-C, C), before the softmax. Everything below takes C as `softcap`; 0, the default, is none.
//
// The matrix of probabilities (T, T) is never kept. The forward pass stores one number per row, the log-sum-exp of its
// scores, from which the backward pass makes the probabilities again: p_s = exp(score_s - lse).
//
// The ladder:
//   rung 0   the definition, loops in the order of the formula (CPU); the tests hold every other version against it
//   CPU      the same with matrix products, a block of queries at a time: what training on a CPU runs
//   rung 1   a GPU kernel with a warp per query, for any shape and number type
//   last     device/flash.cuh, flash_hopper.cuh: tensor cores, bf16; bench/attention_ladder.cu has the steps between,
//            with their times

#include <algorithm>
#include <vector>

#include "device/backend.h"
#include "device/flash_hopper.cuh"
#include "device/matmul.cuh"
#include "rope.cuh"

// Shapes of one attention call. Positions first .. T-1 of each sequence are the queries; keys and values of all
// positions 0 .. T-1 are read from the buffer (first > 0 while sampling: the buffer is the key/value cache).
using AttentionShape = RopeShape;

// ---------------------------------------------------------------------------------------------------------------------
// Rung 0: the definition

// Where in qkv (B, T, NH + 2*NKV, HS) a head begins. Query head h reads key head NH + h / (NH/NKV), and the value head
// that lies NKV heads further.
inline size_t head_at(AttentionShape s, int b, int t, int head) {
  return ((size_t(b) * s.T + t) * (s.NH + 2 * s.NKV) + head) * s.HS;
}

// The scores of query head h at position t: q . k_j / sqrt(HS), capped, for the keys j = 0 .. t.
template <class Real>
std::vector<Real> attention_scores(const Real* qkv, AttentionShape s, int b, int h, int t, double softcap = 0) {
  const Real* q = qkv + head_at(s, b, t, h);
  std::vector<Real> score(t + 1);
  for (int j = 0; j <= t; ++j) {
    const Real* k = qkv + head_at(s, b, j, s.NH + h / (s.NH / s.NKV));
    for (int c = 0; c < s.HS; ++c) score[j] += q[c] * k[c];
    score[j] /= std::sqrt(Real(s.HS));
    if (softcap) score[j] = Real(softcap) * std::tanh(score[j] / Real(softcap));
  }
  return score;
}

// Scores to probabilities: p_j = exp(score_j) / sum_i exp(score_i). Returns log sum_i exp(score_i). The highest score
// is taken out first, which changes neither and keeps exp from overflowing.
template <class Real>
Real softmax(std::vector<Real>& score) {
  const Real highest = *std::max_element(score.begin(), score.end());
  Real sum = 0;
  for (Real& x : score) sum += x = std::exp(x - highest);
  for (Real& x : score) x /= sum;
  return highest + std::log(sum);
}

// out (B, T, NH, HS), lse (B, NH, T) from qkv (B, T, NH + 2*NKV, HS), as attention_forward().
template <class Real>
void attention_forward_by_definition(Real* out, Acc<Real>* lse, const Real* qkv, AttentionShape s, double softcap = 0) {
#pragma omp parallel for collapse(3)
  for (int b = 0; b < s.B; ++b)
    for (int h = 0; h < s.NH; ++h)
      for (int t = s.first; t < s.T; ++t) {
        std::vector<Real> p = attention_scores(qkv, s, b, h, t, softcap);
        lse[(size_t(b) * s.NH + h) * s.T + t] = softmax(p);
        Real* o = out + ((size_t(b) * s.T + t) * s.NH + h) * s.HS;
        std::fill_n(o, s.HS, Real(0));
        for (int j = 0; j <= t; ++j) {  // out = sum_j p_j v_j
          const Real* v = qkv + head_at(s, b, j, s.NH + s.NKV + h / (s.NH / s.NKV));
          for (int c = 0; c < s.HS; ++c) o[c] += p[j] * v[c];
        }
      }
}

// dqkv (B, T, NH + 2*NKV, HS), assigned, from dout (B, T, NH, HS) and qkv: the steps of the forward pass in reverse,
// each by the chain rule. s.first = 0.
template <class Real>
void attention_backward_by_definition(Real* dqkv, const Real* dout, const Real* qkv, AttentionShape s,
                                      double softcap = 0) {
  const int group = s.NH / s.NKV;
  const Real scale = Real(1) / std::sqrt(Real(s.HS));
  std::fill_n(dqkv, head_at(s, s.B, 0, 0), Real(0));
#pragma omp parallel for collapse(2)
  for (int b = 0; b < s.B; ++b)
    for (int hkv = 0; hkv < s.NKV; ++hkv)  // the heads of a group add to one dk and one dv
      for (int h = hkv * group; h < (hkv + 1) * group; ++h)
        for (int t = 0; t < s.T; ++t) {
          const size_t q_at = head_at(s, b, t, h), out_at = ((size_t(b) * s.T + t) * s.NH + h) * s.HS;
          const std::vector<Real> score = attention_scores(qkv, s, b, h, t, softcap);
          std::vector<Real> p = score, dp(t + 1);
          softmax(p);
          // Forward, out = sum_j p_j v_j. So dv_j += p_j dout, and dp_j = dout . v_j.
          for (int j = 0; j <= t; ++j) {
            const size_t v_at = head_at(s, b, j, s.NH + s.NKV + hkv);
            for (int c = 0; c < s.HS; ++c) {
              dqkv[v_at + c] += p[j] * dout[out_at + c];
              dp[j] += dout[out_at + c] * qkv[v_at + c];
            }
          }
          // p = softmax(score). dp_i / dscore_j = p_i ((i == j) - p_j), so dscore_j = p_j (dp_j - sum_i p_i dp_i).
          Real mean = 0;
          for (int i = 0; i <= t; ++i) mean += p[i] * dp[i];
          // score_j = C tanh(x_j / C) with x_j = q . k_j / sqrt(HS): dx_j = dscore_j (1 - (score_j / C)^2).
          for (int j = 0; j <= t; ++j) {
            const Real capped = softcap ? score[j] / Real(softcap) : Real(0);
            const Real dscore = p[j] * (dp[j] - mean) * (1 - capped * capped);
            const size_t k_at = head_at(s, b, j, s.NH + hkv);
            for (int c = 0; c < s.HS; ++c) {
              dqkv[q_at + c] += dscore * scale * qkv[k_at + c];
              dqkv[k_at + c] += dscore * scale * qkv[q_at + c];
            }
          }
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// CPU

// Queries worked on together on the CPU: a multiple of kTileRows, and few enough that their scores (kQueryBlock, T)
// stay in the L2 cache and that little is computed beyond the diagonal.
constexpr int kQueryBlock = 48;

inline void check_head_size(Cpu&, int) {}  // any

// cap tanh(x / cap), in arithmetic that the compiler vectorises: off by 2^-22 cap in fp32, and a few ulp.
template <class Real>
Real soft_cap(Real x, Real cap) {
  return cap - 2 * cap / (1 + exp_(2 * x / cap));
}

// out (B, T, NH, HS), lse (B, NH, T): natural log of the sum of exp(scaled scores); qkv (B, T, NH + 2*NKV, HS).
// Equal to torch.nn.functional.scaled_dot_product_attention(is_causal=True, enable_gqa=True).
//
// Both sums of the definition become matrix products, Q K^T and P V, of kQueryBlock queries at a time with all keys and
// values that they see; keys and values are packed once per head, as matmul.cuh packs them.
//
// Errors, u being half a unit in the last place (2^-24 in fp32), whatever T: a score is off by at most HS u times
// sum_c |q_c k_c| / sqrt(HS), so a probability by as much, relatively; and by (kSumChunk + 8) u, from its exponential
// and the sum. out adds up to (kDepth + T / kDepth) u sum_s p_s |v_s|, for the order in which matmul.cuh adds.
template <class Real>
void attention_forward(Cpu&, Real* out, Acc<Real>* lse, const Real* qkv, AttentionShape s, double softcap = 0) {
  const int heads = s.NH + 2 * s.NKV, group = s.NH / s.NKV, stride = heads * s.HS, p_stride = round_up(s.T, 16) + 16;
  const Real scale = Real(1) / std::sqrt(Real(s.HS)), cap = Real(softcap) / scale;
#pragma omp parallel for schedule(dynamic)
  for (int bh = 0; bh < s.B * s.NH; ++bh) {
    const int b = bh / s.NH, h = bh % s.NH;
    const Real* sequence = qkv + size_t(b) * s.T * stride;  // (T, heads, HS)
    static thread_local Kept<Real> k_memory, v_memory, p_memory;
    // Packed once for all queries of the head. Query heads of a group pack the same keys, each for itself: that takes
    // little beside the products.
    const Packed<Real> k_transposed =
        pack(k_memory, transposed(sequence + (s.NH + h / group) * s.HS, stride), s.HS, s.T);
    const Packed<Real> v = pack(v_memory, row_major(sequence + (s.NH + s.NKV + h / group) * s.HS, stride), s.T, s.HS);
    Real* p = p_memory.room(size_t(kQueryBlock) * p_stride);  // (kQueryBlock, T): scores, then probabilities
    for (int t0 = s.first; t0 < s.T; t0 += kQueryBlock) {
      const int t1 = std::min(t0 + kQueryBlock, s.T), n = t1 - t0;      // queries t0 .. t1-1
      const Real* q = sequence + size_t(t0) * stride + h * s.HS;        // (n, HS), rows `stride` apart
      Real* o = out + (size_t(b) * s.T + t0) * s.NH * s.HS + h * s.HS;  // (n, HS), rows NH * HS apart
      Real sums[kQueryBlock];
      // Pass 1, scores without 1/sqrt(HS): p (n, t1) = q k^T. Keys from t1 on are in the future of all these queries;
      // of the others, each query masks those beyond itself.
      multiply_packed<Real>(p, p_stride, nullptr, 0, row_major(q, stride), k_transposed, n, t1, s.HS);
      for (int i = 0; i < n; ++i) {
        Real* row = p + size_t(i) * p_stride;
        const int t = t0 + i;
        // C tanh(x scale / C) is cap tanh(x / cap) scale with cap = C / scale: these scores have no scale yet.
        if (softcap)
#pragma omp simd
          for (int j = 0; j <= t; ++j) row[j] = soft_cap(row[j], cap);
        // Passes 2 and 3, the row's maximum, then its exponentials and their sum. p stays without its denominator: to
        // divide the HS outputs takes less than to divide the t + 1 probabilities.
        Real highest = row[0];
#pragma omp simd reduction(max : highest)
        for (int j = 0; j <= t; ++j) highest = row[j] > highest ? row[j] : highest;
        const double sum = sum_in_chunks<Real>(t + 1, [=](int j) { return row[j] = exp_((row[j] - highest) * scale); });
        for (int j = t + 1; j < t1; ++j) row[j] = 0;  // the future
        sums[i] = Real(sum);
        lse[size_t(bh) * s.T + t] = highest * scale + std::log(sums[i]);
      }
      // Pass 4, out = p v.
      multiply_packed<Real>(o, s.NH * s.HS, nullptr, 0, row_major<Real>(p, p_stride), v, n, s.HS, t1);
      for (int i = 0; i < n; ++i)
        for (int c = 0; c < s.HS; ++c) o[size_t(i) * s.NH * s.HS + c] /= sums[i];
    }
  }
}

// Numbers of attention_backward()'s workspace D: D (B, NH, T), or what flash attention leaves there (device/flash.cuh).
template <class Real>
size_t attention_workspace(const AttentionShape& s) {
  return std::is_same_v<Real, Acc<Real>> ? size_t(s.B) * s.NH * s.T : flash::workspace_numbers(s.B, s.T, s.NH);
}

// dqkv (B, T, NH + 2*NKV, HS) from dout (B, T, NH, HS) and what the forward pass read and wrote. With P the
// probabilities:  dV = P^T dO,  dP = dO V^T,  dS = P * (dP - D) with D_t = dO_t . O_t,  dQ = dS K,  dK = dS^T Q.
// Sums over s or t add in pieces, as out does: dQ as there, dK and dV by (kQueryBlock + T / kQueryBlock) u at most.
// D_t is the definition's sum_s p_s dP_s, as out = sum_s p_s v_s. D is left behind: on CUDA one kernel makes it and the
// next reads it.
template <class Real>
void attention_backward(Cpu&, Real* dqkv, Acc<Real>* D, const Real* dout, const Real* qkv, const Real* out,
                        const Acc<Real>* lse, AttentionShape s, double softcap = 0) {
  const int heads = s.NH + 2 * s.NKV, group = s.NH / s.NKV, stride = heads * s.HS, p_stride = round_up(s.T, 16) + 16;
  const size_t out_stride = size_t(s.NH) * s.HS;
  const Real scale = Real(1) / std::sqrt(Real(s.HS)), cap = Real(softcap) / scale;
  // One key/value head of one sequence at a time: its dK and dV are sums over queries, in one fixed order.
#pragma omp parallel for schedule(dynamic)
  for (int task = 0; task < s.B * s.NKV; ++task) {
    const int b = task / s.NKV, hkv = task % s.NKV;
    const Real* sequence = qkv + size_t(b) * s.T * stride;
    Real* dsequence = dqkv + size_t(b) * s.T * stride;
    const int k_at = (s.NH + hkv) * s.HS, v_at = (s.NH + s.NKV + hkv) * s.HS;  // within a token
    // What follows adds to dK and dV, but gradients of activations are assigned.
    for (int t = 0; t < s.T; ++t)
      for (int c = 0; c < s.HS; ++c)
        dsequence[size_t(t) * stride + k_at + c] = dsequence[size_t(t) * stride + v_at + c] = 0;
    // Everything that is read as the right side of a product: K^T and V^T for scores and dP, K itself for dQ.
    static thread_local Kept<Real> kt_memory, vt_memory, k_memory, q_memory, do_memory, p_memory;
    const Packed<Real> k_transposed = pack(kt_memory, transposed(sequence + k_at, stride), s.HS, s.T);
    const Packed<Real> v_transposed = pack(vt_memory, transposed(sequence + v_at, stride), s.HS, s.T);
    const Packed<Real> k = pack(k_memory, row_major(sequence + k_at, stride), s.T, s.HS);
    Real* p = p_memory.room(2 * size_t(kQueryBlock) * p_stride);  // P
    Real* dp = p + size_t(kQueryBlock) * p_stride;                // dP, which becomes dS
    for (int h = hkv * group; h < (hkv + 1) * group; ++h)
      for (int t0 = 0; t0 < s.T; t0 += kQueryBlock) {
        const int t1 = std::min(t0 + kQueryBlock, s.T), n = t1 - t0;
        const size_t head_at = (size_t(b) * s.T + t0) * out_stride + h * s.HS;
        const Strided<Real> q = row_major(sequence + size_t(t0) * stride + h * s.HS, stride);
        const Strided<Real> d_o = row_major(dout + head_at, out_stride);
        // In the forward pass S = Q K^T and out = P V; of the latter, dP = dO V^T.
        multiply_packed<Real>(p, p_stride, nullptr, 0, q, k_transposed, n, t1, s.HS);
        multiply_packed<Real>(dp, p_stride, nullptr, 0, d_o, v_transposed, n, t1, s.HS);
        for (int i = 0; i < n; ++i) {
          const int t = t0 + i;
          const size_t row_at = (size_t(b) * s.NH + h) * s.T + t;
          const Real *do_row = d_o.at(i, 0), *o_row = out + head_at + i * out_stride;
          Real *p_row = p + size_t(i) * p_stride, *dp_row = dp + size_t(i) * p_stride;
          const Real row_lse = lse[row_at];
          // In the forward pass p = softmax(S), which couples the scores of a row: dS_j = p_j (dP_j - sum_s p_s dP_s).
          // That sum is dO . out, over channels instead of positions.
          Real d = 0;
#pragma omp simd reduction(+ : d)
          for (int c = 0; c < s.HS; ++c) d += do_row[c] * o_row[c];
          D[row_at] = d;
          // In the forward pass scores went through the cap: dS, which grows with dP - d, is multiplied by its slope.
          if (softcap)
#pragma omp simd
            for (int j = 0; j <= t; ++j) {
              p_row[j] = soft_cap(p_row[j], cap);
              dp_row[j] = d + (dp_row[j] - d) * (1 - p_row[j] / cap * (p_row[j] / cap));
            }
#pragma omp simd
          for (int j = 0; j <= t; ++j) {
            // P again, from the scores and the log of their denominator, which is all that was kept.
            p_row[j] = exp_(p_row[j] * scale - row_lse);
            dp_row[j] = p_row[j] * (dp_row[j] - d) * scale;  // now dS
          }
          for (int j = t + 1; j < t1; ++j) p_row[j] = dp_row[j] = 0;  // the future has no part in it
        }
        Real *dq = dsequence + size_t(t0) * stride + h * s.HS, *dk = dsequence + k_at, *dv = dsequence + v_at;
        // In the forward pass S = Q K^T, so dQ = dS K and dK = dS^T Q; out = P V, so dV = P^T dO. dQ is complete, dK
        // and dV go on with the next queries.
        multiply_packed<Real>(dq, stride, nullptr, 0, row_major<Real>(dp, p_stride), k, n, s.HS, t1);
        multiply_packed<Real>(dk, stride, dk, stride, transposed<Real>(dp, p_stride), pack(q_memory, q, n, s.HS), t1,
                              s.HS, n);
        multiply_packed<Real>(dv, stride, dv, stride, transposed<Real>(p, p_stride), pack(do_memory, d_o, n, s.HS), t1,
                              s.HS, n);
      }
  }
}

// The same where RoPE made the queries and keys: attention_backward(), then rope_backward().
template <class Real>
void attention_rope_backward(Cpu& be, Real* dqkv, Acc<Real>* D, const Real* dout, const Real* qkv, const Real* out,
                             const Acc<Real>* lse, const RopeTable& table, AttentionShape s, double softcap = 0) {
  attention_backward(be, dqkv, D, dout, qkv, out, lse, s, softcap);
  rope_backward(be, dqkv, table, s);
}

// QK-Norm (Henry et al. 2020, arXiv 2010.04245, in today's form: RMSNorm over the head size, one weight for all query
// heads and one for all key heads), then RoPE. In place on qkv (B, T, NH + 2*NKV, HS); keeps what the backward pass
// needs: qk_raw (B, T, NH + NKV, HS), the heads as they came in, and qk_rstd (B, T, NH + NKV).
template <class Real>
void qk_norm_rope_forward(Cpu&, Real* qkv, Real* qk_raw, Acc<Real>* qk_rstd, const Real* q_weight /* (HS) */,
                          const Real* k_weight /* (HS) */, const RopeTable& table, RopeShape s, double eps) {
  const int R = table.R, heads = s.NH + s.NKV, rows = s.T - s.first;
#pragma omp parallel for
  for (int n = 0; n < s.B * rows; ++n) {
    const size_t at = size_t(n / rows) * s.T + s.first + n % rows;  // the token, of all B*T
    for (int h = 0; h < heads; ++h) {  // queries, then keys; values stay as they are
      Real* x = qkv + (at * (heads + s.NKV) + h) * s.HS;
      Real* raw = qk_raw + (at * heads + h) * s.HS;
      const Real* weight = h < s.NH ? q_weight : k_weight;
      // The norm's input is overwritten here, but its backward pass needs it.
      Real sum = 0;
      for (int c = 0; c < s.HS; ++c) {
        raw[c] = x[c];
        sum += x[c] * x[c];
      }
      const Real rstd = Real(1) / std::sqrt(sum / s.HS + Real(eps));
      qk_rstd[at * heads + h] = rstd;
      for (int c = 0; c < s.HS; ++c) x[c] = x[c] * rstd * weight[c];
      rope_rotate_head(x, table.cos_sin + (s.first + n % rows) * size_t(R), R, table.pairs, Real(1));
    }
  }
}

// In place on dqkv (B, T, NH + 2*NKV, HS); dq_weight and dk_weight (HS) accumulate.
template <class Real>
void qk_norm_rope_backward(Cpu&, Real* dqkv, Acc<Real>* dq_weight, Acc<Real>* dk_weight, const Real* qk_raw,
                           const Acc<Real>* qk_rstd, const Real* q_weight, const Real* k_weight, const RopeTable& table,
                           RopeShape s) {
  const int R = table.R, heads = s.NH + s.NKV, N = s.B * s.T;
  std::vector<double> partial(size_t(row_chunks(N)) * 2 * s.HS);  // (chunks, query or key, HS); a row has many heads
  for_row_chunks(N, [&](int chunk, int begin, int end) {
    double* dweights = &partial[size_t(chunk) * 2 * s.HS];
    for (int n = begin; n < end; ++n)
      for (int h = 0; h < heads; ++h) {
        Real* dx = dqkv + (size_t(n) * (heads + s.NKV) + h) * s.HS;
        const Real* raw = qk_raw + (size_t(n) * heads + h) * s.HS;
        const Real* weight = h < s.NH ? q_weight : k_weight;
        double* dweight = dweights + (h < s.NH ? 0 : s.HS);
        const Real rstd = qk_rstd[size_t(n) * heads + h];
        // In the forward pass the norm came first, then the rotation; so the rotation is undone first, which leaves in
        // dx the gradient of the norm's output.
        rope_rotate_head(dx, table.cos_sin + size_t(n % s.T) * R, R, table.pairs, Real(-1));
        Real dot = 0;  // mean over channels of (gradient of the normalised value) * (normalised value)
        for (int c = 0; c < s.HS; ++c) {
          // y = xhat weight with xhat = raw rstd: so dweight = dy xhat, and the gradient of xhat is dy weight.
          dweight[c] += dx[c] * raw[c] * rstd;
          dot += dx[c] * weight[c] * raw[c] * rstd;
        }
        dot /= s.HS;
        // Every channel is in rstd as well: what it does to all others by that way is -xhat times the mean.
        for (int c = 0; c < s.HS; ++c) dx[c] = rstd * (dx[c] * weight[c] - raw[c] * rstd * dot);
      }
  });
  add_row_chunks(dq_weight, partial.data(), N, s.HS, 2 * s.HS);
  add_row_chunks(dk_weight, partial.data() + s.HS, N, s.HS, 2 * s.HS);
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA. The first rung: kernels that follow the formulas, for fp32, for any head size up to 256, and for sampling.
// The second, for bf16 on tensor cores, is device/flash.cuh.

#ifdef __CUDACC__

constexpr int kAttentionWarps = 8;  // per block, each with a query (or key) of its own

// One row of a head, HS channels, in shared memory as fp32. Each lane of a warp owns channels lane, lane + 32, ...
template <class Real>
__device__ __forceinline__ void stage_row(float* to, const Real* row, int HS) {
  for (int c = threadIdx.x % 32; c < HS; c += 32) to[c] = float(row[c]);
}
// Dot product of a staged row with a row of the tensor, by one thread.
template <class Real>
__device__ __forceinline__ float dot_row(const float* staged, const Real* row, int HS) {
  // 16 bytes a time where bf16 rows begin at such addresses; the same sum in the same order either way.
  float sum = 0;
  if (HS % 8 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0)
    for (int c = 0; c < HS; c += 8) {
      float x[8];
      load<8>(x, row + c);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum += staged[c + k] * x[k];
    }
  else
    for (int c = 0; c < HS; ++c) sum += staged[c] * float(row[c]);
  return sum;
}

// A score on its way through the cap, and the cap's slope there. Without one both are what they were, to the bit.
template <bool CAPPED>
__device__ __forceinline__ float soft_cap(float x, float cap) {
  return CAPPED ? cap * tanhf(x / cap) : x;
}
template <bool CAPPED>
__device__ __forceinline__ float soft_cap_slope(float capped, float cap) {
  return CAPPED ? 1 - capped / cap * (capped / cap) : 1;
}

// Where a warp works: the rows of one head, `row` being the position counted from `first`.
struct AttentionPlace {
  int b, h, row;
};
__device__ __forceinline__ AttentionPlace attention_place(int heads, int rows) {
  const size_t id = blockIdx.x * size_t(kAttentionWarps) + threadIdx.x / 32;  // of the warp, in the whole grid
  return {int(id / rows / heads), int(id / rows % heads), int(id % rows)};
}

// A warp works out one query. It takes 32 keys at a time: first a lane is a key (scores), then a lane is CHANNELS/32
// channels (sum of values), with one maximum and one sum of exponentials carried along (online softmax).
//
// Sums over long rows: 32 keys are added up by themselves before they join what came before, which may be much larger,
// and exponentials join it in double. In fp32 out is off by (32 + T / 32) 2^-24 sum_s p_s |v_s| at most for that; dQ,
// dK and dV below alike, lse by a few 2^-24 whatever T. Scores and __expf come on top.
template <class Real, int CHANNELS, bool CAPPED>
__global__ void __launch_bounds__(kAttentionWarps * 32)
    attention_forward_kernel(Real* out, float* lse, const Real* qkv, AttentionShape s, float scale, float cap) {
  __shared__ float shared[kAttentionWarps][CHANNELS];
  const AttentionPlace at = attention_place(s.NH, s.T - s.first);
  if (at.b >= s.B) return;  // the last block may have warps too many; no barrier of the block follows
  const int lane = threadIdx.x % 32, t = s.first + at.row, HS = s.HS;
  const size_t stride = size_t(s.NH + 2 * s.NKV) * HS;
  const Real* sequence = qkv + size_t(at.b) * s.T * stride;
  const Real* keys = sequence + (s.NH + at.h / (s.NH / s.NKV)) * HS;
  const Real* values = keys + s.NKV * HS;
  float* q = shared[threadIdx.x / 32];
  stage_row(q, sequence + t * stride + at.h * HS, HS);
  __syncwarp();  // all lanes read all of q

  float highest = -INFINITY, o[CHANNELS / 32] = {};  // of this lane: its channels of out, not yet divided by the sum
  double sum = 0;                                    // and its keys' exponentials
  for (int j0 = 0; j0 <= t; j0 += 32) {
    const int j = j0 + lane;
    // A lane is a key: 32 scores at once.
    const float score = j <= t ? soft_cap<CAPPED>(dot_row(q, keys + j * stride, HS) * scale, cap) : -INFINITY;
    const float higher = fmaxf(highest, warp_max(score));
    // What was summed so far was relative to a lower maximum; at first there is nothing, and e^-inf = 0.
    const float rescale = __expf(highest - higher), p = __expf(score - higher);  // 0 for a masked key
    highest = higher;
    sum = sum * rescale + p;
    // Now a lane is some channels: each key's probability goes round, and all lanes read its value row together.
    float part[CHANNELS / 32] = {};
    for (int i = 0; i < min(32, t + 1 - j0); ++i) {
      const float p_i = __shfl_sync(~0u, p, i);
#pragma unroll
      for (int k = 0; k < CHANNELS / 32; ++k)
        if (lane + 32 * k < HS) part[k] += p_i * float(values[(j0 + i) * stride + lane + 32 * k]);
    }
#pragma unroll
    for (int k = 0; k < CHANNELS / 32; ++k) o[k] = o[k] * rescale + part[k];
  }
  // Each lane summed its own keys.
  const float row_sum = warp_sum(float(sum));
  Real* to = out + ((size_t(at.b) * s.T + t) * s.NH + at.h) * HS;
#pragma unroll
  for (int k = 0; k < CHANNELS / 32; ++k)
    if (lane + 32 * k < HS) to[lane + 32 * k] = Real(o[k] / row_sum);
  if (lane == 0) lse[(size_t(at.b) * s.NH + at.h) * s.T + t] = highest + logf(row_sum);
}

// A warp works out dQ of one query, over its keys, and leaves D = dO . O for the keys' kernel.
template <class Real, int CHANNELS, bool CAPPED>
__global__ void __launch_bounds__(kAttentionWarps * 32)
    attention_dq_kernel(Real* dqkv, float* D, const Real* dout, const Real* qkv, const Real* out, const float* lse,
                        AttentionShape s, float scale, float cap) {
  __shared__ float shared[kAttentionWarps][2][CHANNELS];
  const AttentionPlace at = attention_place(s.NH, s.T);
  if (at.b >= s.B) return;
  const int lane = threadIdx.x % 32, t = at.row, HS = s.HS;
  const size_t stride = size_t(s.NH + 2 * s.NKV) * HS, row_at = (size_t(at.b) * s.NH + at.h) * s.T + t;
  const size_t query_at = (size_t(at.b) * s.T + t) * stride + at.h * HS;
  const size_t out_at = ((size_t(at.b) * s.T + t) * s.NH + at.h) * HS;
  const Real* keys = qkv + size_t(at.b) * s.T * stride + (s.NH + at.h / (s.NH / s.NKV)) * HS;
  const Real* values = keys + s.NKV * HS;
  float *q = shared[threadIdx.x / 32][0], *d_o = shared[threadIdx.x / 32][1];
  stage_row(q, qkv + query_at, HS);  // q meets every key, dO every value
  stage_row(d_o, dout + out_at, HS);
  __syncwarp();
  // D = dO . out = sum_s p_s dP_s: see attention_backward() on the CPU.
  float d = 0;
  for (int c = lane; c < HS; c += 32) d += d_o[c] * float(out[out_at + c]);
  d = warp_sum(d);
  if (lane == 0) D[row_at] = d;

  float dq[CHANNELS / 32] = {};
  for (int j0 = 0; j0 <= t; j0 += 32) {
    const int j = j0 + lane;
    float ds = 0;
    if (j <= t) {
      // P again, then dP = dO . v and dS.
      const float score = soft_cap<CAPPED>(dot_row(q, keys + j * stride, HS) * scale, cap);
      const float p = __expf(score - lse[row_at]);
      ds = p * (dot_row(d_o, values + j * stride, HS) - d) * scale * soft_cap_slope<CAPPED>(score, cap);
    }
    float part[CHANNELS / 32] = {};
    for (int i = 0; i < min(32, t + 1 - j0); ++i) {
      // In the forward pass score_j = q . k_j scale, so dq = sum_j dS_j k_j.
      const float ds_i = __shfl_sync(~0u, ds, i);
#pragma unroll
      for (int k = 0; k < CHANNELS / 32; ++k)
        if (lane + 32 * k < HS) part[k] += ds_i * float(keys[(j0 + i) * stride + lane + 32 * k]);
    }
#pragma unroll
    for (int k = 0; k < CHANNELS / 32; ++k) dq[k] += part[k];
  }
#pragma unroll
  for (int k = 0; k < CHANNELS / 32; ++k)
    if (lane + 32 * k < HS) dqkv[query_at + lane + 32 * k] = Real(dq[k]);
}

// A warp works out dK and dV of one key, over the query heads that share it and the queries that see it.
template <class Real, int CHANNELS, bool CAPPED>
__global__ void __launch_bounds__(kAttentionWarps * 32)
    attention_dkv_kernel(Real* dqkv, const float* D, const Real* dout, const Real* qkv, const float* lse,
                         AttentionShape s, float scale, float cap) {
  __shared__ float shared[kAttentionWarps][2][CHANNELS];
  const AttentionPlace at = attention_place(s.NKV, s.T);
  if (at.b >= s.B) return;
  const int lane = threadIdx.x % 32, HS = s.HS, group = s.NH / s.NKV;
  const size_t stride = size_t(s.NH + 2 * s.NKV) * HS, out_stride = size_t(s.NH) * HS;
  const size_t key_at = (size_t(at.b) * s.T + at.row) * stride + (s.NH + at.h) * HS, value_at = key_at + s.NKV * HS;
  float *k_row = shared[threadIdx.x / 32][0], *v_row = shared[threadIdx.x / 32][1];
  stage_row(k_row, qkv + key_at, HS);  // k meets every later query, v every later dO
  stage_row(v_row, qkv + value_at, HS);
  __syncwarp();

  float dk[CHANNELS / 32] = {}, dv[CHANNELS / 32] = {};  // a lane's channels, over all query heads of the group
  for (int h = at.h * group; h < (at.h + 1) * group; ++h) {
    const Real* queries = qkv + size_t(at.b) * s.T * stride + h * HS;
    const Real* douts = dout + size_t(at.b) * s.T * out_stride + h * HS;
    const size_t row_at = (size_t(at.b) * s.NH + h) * s.T;
    // Queries before this key's position do not see it.
    for (int t0 = at.row; t0 < s.T; t0 += 32) {
      const int t = t0 + lane;
      float p = 0, ds = 0;
      if (t < s.T) {
        // The same p and dS as in the kernel above: computed twice, so that no two warps ever add to the same number.
        const float score = soft_cap<CAPPED>(dot_row(k_row, queries + t * stride, HS) * scale, cap);
        p = __expf(score - lse[row_at + t]);
        ds = p * (dot_row(v_row, douts + t * out_stride, HS) - D[row_at + t]) * scale *
             soft_cap_slope<CAPPED>(score, cap);
      }
      float dk_part[CHANNELS / 32] = {}, dv_part[CHANNELS / 32] = {};
      for (int i = 0; i < min(32, s.T - t0); ++i) {
        const float p_i = __shfl_sync(~0u, p, i), ds_i = __shfl_sync(~0u, ds, i);
#pragma unroll
        for (int k = 0; k < CHANNELS / 32; ++k)
          if (lane + 32 * k < HS) {
            // Forward, score_t = q_t . k scale and out_t = sum_k p v, so dk = sum_t dS_t q_t and dv = sum_t p_t dO_t.
            dk_part[k] += ds_i * float(queries[(t0 + i) * stride + lane + 32 * k]);
            dv_part[k] += p_i * float(douts[(t0 + i) * out_stride + lane + 32 * k]);
          }
      }
#pragma unroll
      for (int k = 0; k < CHANNELS / 32; ++k) {
        dk[k] += dk_part[k];
        dv[k] += dv_part[k];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < CHANNELS / 32; ++k)
    if (lane + 32 * k < HS) {
      dqkv[key_at + lane + 32 * k] = Real(dk[k]);
      dqkv[value_at + lane + 32 * k] = Real(dv[k]);
    }
}

// What a model on this backend has to respect.
inline void check_head_size(Cuda&, int HS) {
  if (HS > 256)
    throw UserError("--head-size " + std::to_string(HS) + ": at most 256 on a GPU; use --device cpu");
}

// Calls work(constant) with the smallest of 32, 64, 128, 256 channels that holds a head.
template <class Work>
void with_channels(int HS, Work work) {
  if (HS <= 32) return work(std::integral_constant<int, 32>());
  if (HS <= 64) return work(std::integral_constant<int, 64>());
  if (HS <= 128) return work(std::integral_constant<int, 128>());
  return work(std::integral_constant<int, 256>());
}

template <class Real>
void simple_attention_forward(Cuda& be, Real* out, float* lse, const Real* qkv, AttentionShape s, double softcap = 0) {
  with_channels(s.HS, [&](auto channels) {
    with_cap(softcap, [&](auto capped) {
      launch(be, "attention_forward", attention_forward_kernel<Real, channels(), capped()>,
             divide_up(size_t(s.B) * s.NH * (s.T - s.first), kAttentionWarps), kAttentionWarps * 32, 0, out, lse, qkv,
             s, 1 / std::sqrt(float(s.HS)), float(softcap));
    });
  });
}

template <class Real>
void simple_attention_backward(Cuda& be, Real* dqkv, float* D, const Real* dout, const Real* qkv, const Real* out,
                               const float* lse, AttentionShape s, double softcap = 0) {
  const float scale = 1 / std::sqrt(float(s.HS));
  const int threads = kAttentionWarps * 32;
  with_channels(s.HS, [&](auto channels) {
    with_cap(softcap, [&](auto capped) {
      launch(be, "attention_backward (queries)", attention_dq_kernel<Real, channels(), capped()>,
             divide_up(size_t(s.B) * s.NH * s.T, kAttentionWarps), threads, 0, dqkv, D, dout, qkv, out, lse, s, scale,
             float(softcap));
      launch(be, "attention_backward (keys)", attention_dkv_kernel<Real, channels(), capped()>,
             divide_up(size_t(s.B) * s.NKV * s.T, kAttentionWarps), threads, 0, dqkv, (const float*)D, dout, qkv, lse,
             s, scale, float(softcap));
    });
  });
}

// The one place that chooses between the two rungs. Heads of 128 and 256 need up to 97 KiB of shared memory a block;
// all GPUs from sm_80 on have that.
template <class Real>
bool use_flash_attention(const Cuda& be, const AttentionShape& s) {
  return std::is_same_v<Real, bf16> && be.capability >= 80 && s.first == 0 && flash_attention_supports(s.HS) &&
         be.shared_bytes >= 97 * 1024 && s.B < 1 << 16;  // a grid's limit
}

template <class Real>
void attention_forward(Cuda& be, Real* out, Acc<Real>* lse, const Real* qkv, AttentionShape s, double softcap = 0) {
  if constexpr (std::is_same_v<Real, bf16>)
    if (use_flash_attention<Real>(be, s))
      return flash_attention_forward(be, out, lse, qkv, s.B, s.T, s.NH, s.NKV, s.HS, softcap);
  simple_attention_forward(be, out, lse, qkv, s, softcap);
}

template <class Real>
void attention_backward(Cuda& be, Real* dqkv, Acc<Real>* D, const Real* dout, const Real* qkv, const Real* out,
                        const Acc<Real>* lse, AttentionShape s, double softcap = 0) {
  if constexpr (std::is_same_v<Real, bf16>)
    if (use_flash_attention<Real>(be, s))
      return flash_attention_backward(be, dqkv, D, dout, qkv, out, lse, s.B, s.T, s.NH, s.NKV, s.HS, softcap);
  simple_attention_backward(be, dqkv, D, dout, qkv, out, lse, s, softcap);
}

template <class Real>
void attention_rope_backward(Cuda& be, Real* dqkv, Acc<Real>* D, const Real* dout, const Real* qkv, const Real* out,
                             const Acc<Real>* lse, const RopeTable& table, AttentionShape s, double softcap = 0) {
  auto apart = [&] {
    attention_backward(be, dqkv, D, dout, qkv, out, lse, s, softcap);
    rope_backward(be, dqkv, table, s);
  };
  if constexpr (std::is_same_v<Real, bf16>)
    if (table.R > 0 && use_flash_attention<Real>(be, s)) {
      const bool interleaved = table.pairs == RopePairs::interleaved;
      const size_t n = size_t(s.B) * s.T * (s.NH + 2 * s.NKV) * s.HS;
      return start_faster(be, {s.B * s.NH, s.T, s.HS, interleaved ? -table.R : table.R}, dqkv, n, apart, [&] {
        flash_attention_backward(be, dqkv, D, dout, qkv, out, lse, s.B, s.T, s.NH, s.NKV, s.HS, softcap,
                                 table.cos_sin, table.R, interleaved);
      });
    }
  apart();
}

// How neighbouring lanes of a warp share the first CHANNELS channels of a head at one position: kVectors vectors of W
// for each. The two channels of a pair may lie in different lanes, and meet in shared memory.
template <int CHANNELS, int W>
struct HeadLanes {
  static constexpr int kLanes = CHANNELS / W < 32 ? CHANNELS / W : 32, kVectors = CHANNELS / W / kLanes;
  static constexpr int kHeads = 256 / kLanes;  // that a block of 256 threads works on at a time

  // The first channel of a lane's vector.
  __device__ static int channel(int vector) { return (vector * kLanes + int(threadIdx.x) % kLanes) * W; }
  __device__ static float sum(float x) {  // over the lanes of a head
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
  }

  // Turns those of the lane's channels x that are under R; y (CHANNELS) is the head's place in shared memory, t is the
  // position. All lanes of the warp take part.
  __device__ static void turn(float (&x)[kVectors][W], float* y, const RopeTable& table, int t, float direction) {
    const int R = table.R;
    const float* cos_sin = table.cos_sin + size_t(t) * R;
#pragma unroll
    for (int p = 0; p < kVectors; ++p)
      if (channel(p) < R) store<W>(y + channel(p), x[p]);
    __syncwarp();
#pragma unroll
    for (int p = 0; p < kVectors; ++p)
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const int c = channel(p) + k;
        if (c >= R) continue;
        const bool half = table.pairs == RopePairs::half, is_second = half ? c >= R / 2 : c % 2;
        const int i = half ? c - is_second * (R / 2) : c / 2;
        float angle[2];
        load<2>(angle, cos_sin + 2 * i);
        const float other = y[is_second ? rope_first(table.pairs, i) : rope_second(table.pairs, i, R)];
        const float sine = direction * angle[1];
        x[p][k] = x[p][k] * angle[0] + (is_second ? other * sine : -other * sine);
      }
    __syncwarp();
  }
};

// QK-Norm and RoPE in one pass, a head at one position by neighbouring lanes.
template <class Real, int CHANNELS, int W>
__global__ void __launch_bounds__(256)
    qk_norm_rope_forward_kernel(Real* qkv, Real* qk_raw, float* qk_rstd, const Real* q_weight, const Real* k_weight,
                                RopeTable table, RopeShape s, float eps) {
  using Lanes = HeadLanes<CHANNELS, W>;
  __shared__ __align__(16) float shared[Lanes::kHeads][CHANNELS];
  const int rows = s.T - s.first;
  const unsigned heads = s.NH + s.NKV, id = blockIdx.x * Lanes::kHeads + threadIdx.x / Lanes::kLanes;
  const unsigned n = id / heads, h = id % heads, t = s.first + n % rows;
  const bool inside = n < unsigned(s.B * rows);  // lanes outside go along: the others of the warp wait for them
  const size_t at = size_t(n / rows) * s.T + t;
  Real* x = qkv + (at * (heads + s.NKV) + h) * s.HS;
  Real* raw = qk_raw + (at * heads + h) * s.HS;
  const Real* weight = h < unsigned(s.NH) ? q_weight : k_weight;
  // The whole head in registers: it is read from memory once, for its norm and for what is normalised.
  float v[Lanes::kVectors][W] = {}, w[W], sum = 0;
#pragma unroll
  for (int p = 0; p < Lanes::kVectors; ++p) {
    const int c = Lanes::channel(p);
    if (!inside || c >= s.HS) continue;
    load<W>(v[p], x + c);
    store<W>(raw + c, v[p]);
#pragma unroll
    for (int k = 0; k < W; ++k) sum += v[p][k] * v[p][k];
  }
  // Lanes that have no channel added 0.
  const float rstd = rsqrtf(Lanes::sum(sum) / s.HS + eps);
  if (inside && Lanes::channel(0) == 0) qk_rstd[at * heads + h] = rstd;
#pragma unroll
  for (int p = 0; p < Lanes::kVectors; ++p) {
    if (Lanes::channel(p) >= s.HS) continue;
    load<W>(w, weight + Lanes::channel(p));
#pragma unroll
    for (int k = 0; k < W; ++k) v[p][k] *= rstd * w[k];
  }
  Lanes::turn(v, shared[threadIdx.x / Lanes::kLanes], table, t, 1);
#pragma unroll
  for (int p = 0; p < Lanes::kVectors; ++p)
    if (inside && Lanes::channel(p) < s.HS) store<W>(x + Lanes::channel(p), v[p]);
}

// The same backwards. The lanes of a head take many positions and heads and sum the weights' gradient in registers;
// partial (blocks, 2, HS) gets one row per block, of queries and of keys, for add_rows.
template <class Real, int CHANNELS, int W>
__global__ void __launch_bounds__(256, 4)
    qk_norm_rope_backward_kernel(Real* dqkv, float* partial, const Real* qk_raw, const float* qk_rstd,
                                 const Real* q_weight, const Real* k_weight, RopeTable table, RopeShape s) {
  using Lanes = HeadLanes<CHANNELS, W>;
  __shared__ __align__(16) float shared[Lanes::kHeads][CHANNELS];
  const unsigned heads = s.NH + s.NKV, items = unsigned(s.B) * s.T * heads;
  float* y = shared[threadIdx.x / Lanes::kLanes];
  float dweights[2][Lanes::kVectors][W] = {};
  // All lanes of a block make the same number of turns, because they wait for each other.
  for (unsigned first = blockIdx.x * Lanes::kHeads; first < items; first += gridDim.x * Lanes::kHeads) {
    const unsigned id = first + threadIdx.x / Lanes::kLanes, n = id / heads, h = id % heads;
    const bool inside = id < items, query = h < unsigned(s.NH);
    Real* dx = dqkv + (size_t(n) * (heads + s.NKV) + h) * s.HS;
    const Real* raw = qk_raw + size_t(id) * s.HS;
    const Real* weight = query ? q_weight : k_weight;
    const float rstd = inside ? qk_rstd[id] : 0;
    float dy[Lanes::kVectors][W] = {}, xhat[Lanes::kVectors][W] = {}, w[W], dot = 0;
#pragma unroll
    for (int p = 0; p < Lanes::kVectors; ++p) {
      const int c = Lanes::channel(p);
      if (!inside || c >= s.HS) continue;
      load<W>(dy[p], dx + c);
      load<W>(xhat[p], raw + c);
    }
    // In the forward pass the rotation came last, so it is undone first.
    Lanes::turn(dy, y, table, n % s.T, -1);
#pragma unroll
    for (int p = 0; p < Lanes::kVectors; ++p) {
      if (Lanes::channel(p) >= s.HS) continue;
      load<W>(w, weight + Lanes::channel(p));
#pragma unroll
      for (int k = 0; k < W; ++k) {
        // y = xhat weight, xhat = raw rstd. A lane's sums of dweight go on over all heads that it meets.
        xhat[p][k] *= rstd;
        const float dweight = dy[p][k] * xhat[p][k];
        dweights[0][p][k] += query ? dweight : 0;
        dweights[1][p][k] += query ? 0 : dweight;
        dy[p][k] *= w[k];
        dot += dy[p][k] * xhat[p][k];
      }
    }
    // Through rstd every channel is in every output: hence the mean over the head.
    dot = Lanes::sum(dot) / s.HS;
#pragma unroll
    for (int p = 0; p < Lanes::kVectors; ++p) {
      if (!inside || Lanes::channel(p) >= s.HS) continue;
#pragma unroll
      for (int k = 0; k < W; ++k) dy[p][k] = rstd * (dy[p][k] - xhat[p][k] * dot);
      store<W>(dx + Lanes::channel(p), dy[p]);
    }
  }
  // The heads of the block that share channels add up, in order, by way of shared memory.
  for (int which = 0; which < 2; ++which) {
    __syncthreads();
#pragma unroll
    for (int p = 0; p < Lanes::kVectors; ++p) store<W>(y + Lanes::channel(p), dweights[which][p]);
    __syncthreads();
    for (int c = threadIdx.x; c < s.HS; c += blockDim.x) {
      float sum = 0;
      for (int i = 0; i < Lanes::kHeads; ++i) sum += shared[i][c];
      partial[(size_t(blockIdx.x) * 2 + which) * s.HS + c] = sum;
    }
  }
}

template <class Real>
void qk_norm_rope_forward(Cuda& be, Real* qkv, Real* qk_raw, Acc<Real>* qk_rstd, const Real* q_weight,
                          const Real* k_weight, const RopeTable& table, RopeShape s, double eps) {
  const size_t items = size_t(s.B) * (s.T - s.first) * (s.NH + s.NKV);
  with_channels(s.HS, [&](auto channels) {
    with_width<kWide<Real>>(wide(s.HS, qkv, qk_raw, q_weight, k_weight), [&](auto W) {
      launch(be, "qk_norm_rope_forward", qk_norm_rope_forward_kernel<Real, channels(), W()>,
             divide_up(items, HeadLanes<channels(), W()>::kHeads), 256, 0, qkv, qk_raw, qk_rstd, q_weight, k_weight,
             table, s, float(eps));
    });
  });
}

template <class Real>
void qk_norm_rope_backward(Cuda& be, Real* dqkv, Acc<Real>* dq_weight, Acc<Real>* dk_weight, const Real* qk_raw,
                           const Acc<Real>* qk_rstd, const Real* q_weight, const Real* k_weight, const RopeTable& table,
                           RopeShape s) {
  float* partial = static_cast<float*>(be.workspace);
  const size_t items = size_t(s.B) * s.T * (s.NH + s.NKV);
  int blocks = 0;
  with_channels(s.HS, [&](auto channels) {
    with_width<kWide<Real>>(wide(s.HS, dqkv, qk_raw, q_weight, k_weight), [&](auto W) {
      blocks = int(std::min<size_t>(8 * be.multiprocessors, divide_up(items, HeadLanes<channels(), W()>::kHeads)));
      launch(be, "qk_norm_rope_backward", qk_norm_rope_backward_kernel<Real, channels(), W()>, blocks, 256, 0, dqkv,
             partial, qk_raw, qk_rstd, q_weight, k_weight, table, s);
    });
  });
  add_rows(be, {dq_weight, dk_weight}, partial, blocks, s.HS);
}

#endif  // __CUDACC__
