// From the kernel that one writes after a lecture to the one that trains: causal attention, forward, in bf16, one idea
// a rung.
//
//   attention_ladder     holds every rung against the definition in attention.cuh, times it at two shapes and prints
//                        the table of docs/kernels.md. Exit code 1 if a rung is wrong
//
// Rungs are read one after the other, with the one before beside them (`diff`). All compute the same, for queries at
// positions t and keys at j <= t:    score_j = q . k_j / sqrt(HS)    p = softmax(score)    out = sum_j p_j v_j
// TFLOP/s count 2 per multiply-add over the lower triangle of T x T.

#include <cstdio>

#include "attention.cuh"
#include "bench/ladder.h"

namespace {

using namespace flash;

// Where a block works: the queries q0, q0 + 1, ... of one head of one sequence.
struct Job {
  int q0;
  size_t stride;          // elements from one position to the next in q, k, v
  const bf16 *q, *k, *v;  // (T, HS), of that head
  bf16* out;              // (T, HS), NH * HS elements from one position to the next
  float* lse;             // (T)
};
template <int HS>
__device__ Job job(int queries, bf16* out, float* lse, const bf16* qkv, AttentionShape s) {
  const Place at = place();
  const size_t stride = size_t(s.NH + 2 * s.NKV) * HS;
  const bf16* sequence = qkv + size_t(at.b) * s.T * stride;
  const bf16* k = sequence + (s.NH + at.head / (s.NH / s.NKV)) * HS;
  return {(int(gridDim.x) - 1 - at.tile) * queries,  // the longest rows first: the short ones fill the gaps at the end
          stride,
          sequence + at.head * HS,
          k,
          k + s.NKV * HS,
          out + (size_t(at.b) * s.T * s.NH + at.head) * HS,
          lse + (size_t(at.b) * s.NH + at.head) * s.T};
}

// ---------------------------------------------------------------------------------------------------------------------
// Rung 1, a warp per query, is attention_forward_kernel in attention.cuh.
//
// Rung 2: tiles in shared memory. The warps of a block have neighbouring queries, which read the same keys and values:
// the block brings 32 of them at a time into shared memory, once for all. What a warp does with them is as before.

constexpr int kQueries = 16;  // per block, a warp each

template <int HS>
__global__ void __launch_bounds__(kQueries * 32)
    tiles_kernel(bf16* out, float* lse, const bf16* qkv, AttentionShape s, float scale) {
  // Four numbers more a row: then the 16 bytes that eight lanes read of eight rows lie in distinct banks.
  __shared__ __align__(16) float q[kQueries][HS], k_tile[32][HS + 4], v_tile[32][HS];
  const Job at = job<HS>(kQueries, out, lse, qkv, s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int t = min(at.q0 + warp, s.T - 1);  // warps behind the end do the last query, too, and write the same
  stage_row(q[warp], at.q + t * at.stride, HS);

  float highest = -INFINITY, o[HS / 32] = {};
  double sum = 0;
  for (int j0 = 0; j0 <= t; j0 += 32) {  // as many turns for all warps: 16 divides q0 and 32
    __syncthreads();                     // all are done with the tile before
    constexpr int W = HS / kQueries;     // elements a thread copies: 32 rows by 16 runs of W
    const int row = threadIdx.x / kQueries, run = threadIdx.x % kQueries * W;
    if (j0 + row < s.T) {
      float x[W];
      load<W>(x, at.k + (j0 + row) * at.stride + run);
      store<W>(&k_tile[row][run], x);
      load<W>(x, at.v + (j0 + row) * at.stride + run);
      store<W>(&v_tile[row][run], x);
    }
    __syncthreads();

    float score = 0;  // a lane is a key
    for (int c = 0; c < HS; c += 4) {
      float x[4], y[4];
      load<4>(x, &q[warp][c]);
      load<4>(y, &k_tile[lane][c]);
      for (int i = 0; i < 4; ++i) score += x[i] * y[i];
    }
    score = j0 + lane <= t ? score * scale : -INFINITY;
    const float higher = fmaxf(highest, warp_max(score));
    const float rescale = __expf(highest - higher), p = __expf(score - higher);
    highest = higher;
    sum = sum * rescale + p;
    float part[HS / 32] = {};
    for (int i = 0; i < min(32, t + 1 - j0); ++i) {  // a lane is HS/32 channels
      const float p_i = __shfl_sync(~0u, p, i);
      for (int c = 0; c < HS / 32; ++c) part[c] += p_i * v_tile[i][lane + 32 * c];
    }
    for (int c = 0; c < HS / 32; ++c) o[c] = o[c] * rescale + part[c];
  }
  const float row_sum = warp_sum(float(sum));
  for (int c = 0; c < HS / 32; ++c) at.out[size_t(t) * s.NH * HS + lane + 32 * c] = bf16(o[c] / row_sum);
  if (lane == 0) at.lse[t] = highest + logf(row_sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rung 3: tensor cores. A block has 64 queries now, a warp 16, and both sums are matrix products of bf16 tiles by
// mma.sync: S = Q K^T (64 keys at a time) and O += P V. A warp's 32 threads hold a product in pieces (the fragments of
// tiles.cuh), and a row of S lies in four of them. So S goes to shared memory, where a whole warp takes one row after
// the other as in rung 2, and P comes back from there.

constexpr int kTile = 64;           // queries of a block, and keys of a tile
constexpr int kStride = kTile + 8;  // floats from row to row of S; the 8 keep a warp's stores in distinct banks

template <int HS>
constexpr size_t tensor_bytes() {  // Q, K, V, P, S, and highest, sum, rescale of each row
  return 3 * Tile<kTile, HS>::kBytes + Tile<kTile, kTile>::kBytes + kTile * kStride * 4 + 3 * kTile * 4;
}

template <int HS>
__global__ void __launch_bounds__(128)
    tensor_kernel(bf16* out, float* lse, const bf16* qkv, AttentionShape s, float scale) {
  const Job at = job<HS>(kTile, out, lse, qkv, s);
  const Tile<kTile, HS> q_tile{shared_start()}, k_tile{q_tile.at + q_tile.kBytes}, v_tile{k_tile.at + k_tile.kBytes};
  const Tile<kTile, kTile> p_tile{v_tile.at + v_tile.kBytes};
  float* scores = reinterpret_cast<float*>(shared_memory + 3 * q_tile.kBytes + p_tile.kBytes);  // (64, kStride)
  float *highest = scores + kTile * kStride, *sum = highest + kTile, *rescale = sum + kTile;    // (64) each
  const int warp_row = threadIdx.x / 32 * 16;  // the first of the warp's 16 rows
  const int row = own_row();                   // of this thread's fragments, as is row + 8
  const float scale2 = scale * kLog2e;         // exponentials are powers of two

  copy_tile<128>(q_tile, at.q, at.stride, at.q0, s.T);
  if (threadIdx.x < kTile) highest[threadIdx.x] = -INFINITY, sum[threadIdx.x] = 0;
  __syncthreads();
  uint32_t Q[HS / 16][4], P[kTile / 16][4];
  load_operand(Q, q_tile, 0);
  float S[kTile / 8][4], O[HS / 8][4] = {};

  for (int j0 = 0; j0 <= at.q0; j0 += kTile) {  // the last tile is on the diagonal
    __syncthreads();
    copy_tile<128>(k_tile, at.k, at.stride, j0, s.T);
    copy_tile<128>(v_tile, at.v, at.stride, j0, s.T);
    __syncthreads();

    mma_sync::multiply_transposed<kTile, HS>(S, Q, k_tile);
    for (int n = 0; n < kTile / 8; ++n)
      for (int half = 0; half < 2; ++half)  // rows `row` and `row` + 8
        *reinterpret_cast<float2*>(&scores[(row + 8 * half) * kStride + n * 8 + lane() % 4 * 2]) =
            make_float2(S[n][2 * half], S[n][2 * half + 1]);
    __syncwarp();

    for (int r = warp_row; r < warp_row + 16; ++r) {  // a lane is two keys
      const float2 x = *reinterpret_cast<const float2*>(&scores[r * kStride + 2 * lane()]);
      const int j = j0 + 2 * lane(), t = at.q0 + r;
      const float a = j <= t ? x.x * scale2 : -INFINITY, b = j + 1 <= t ? x.y * scale2 : -INFINITY;
      const float before = highest[r], higher = fmaxf(before, warp_max(fmaxf(a, b)));
      const float p_a = exp2_(a - higher), p_b = exp2_(b - higher), p_sum = warp_sum(p_a + p_b);
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(p_tile.address(r, lane() / 4) + lane() % 4 * 4),
                   "r"(pack_pair(p_a, p_b))
                   : "memory");
      if (lane() == 0) {
        highest[r] = higher;
        rescale[r] = exp2_(before - higher);
        sum[r] = sum[r] * rescale[r] + p_sum;
      }
    }
    __syncwarp();

    for (int n = 0; n < HS / 8; ++n)
      for (int i = 0; i < 4; ++i) O[n][i] *= rescale[row + i / 2 * 8];
    load_operand(P, p_tile, 0);
    mma_sync::multiply<kTile, HS>(O, P, v_tile);
  }
  for (int half = 0; half < 2; ++half)
    if (const int r = row + 8 * half; lane() % 4 == 0 && at.q0 + r < s.T)
      at.lse[at.q0 + r] = (highest[r] + log2f(sum[r])) * kLn2;
  multiply_rows(O, {1 / sum[row], 1 / sum[row + 8]});
  write_rows(q_tile, O);
  __syncwarp();
  store_tile(at.out, size_t(s.NH) * HS, at.q0, s.T, q_tile);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rung 4: the softmax stays in registers. A row of S lies in four threads of one warp, so its maximum is that of 16
// numbers in each of them and two shuffles. And what a thread holds of S as a result is what it must hold of P as the
// next product's first operand, rounded to bf16 (Dao 2023, "FlashAttention-2"): nothing goes through shared memory.

// S (64, 64), scores not yet scaled, becomes exp(scale (S - m)); m and l, the maximum of this thread's two rows and its
// share of their sums, are brought up to date, and so is O.
template <int HS>
__device__ __forceinline__ void online_softmax(float (&S)[kTile / 8][4], float (&O)[HS / 8][4], float (&m)[2],
                                               float (&l)[2], bool diagonal, float scale2) {
  if (diagonal)
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (n * 8 + lane() % 4 * 2 + i % 2 > own_row() + i / 2 * 8) S[n][i] = -INFINITY;
  float top[2] = {m[0], m[1]}, rescale[2];
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], S[n][i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    top[half] = row_max(top[half]);  // finite: every row sees key 0, in the first tile
    rescale[half] = exp2_((m[half] - top[half]) * scale2);
    m[half] = top[half];
    l[half] *= rescale[half];
  }
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      S[n][i] = exp2_((S[n][i] - m[i / 2]) * scale2);
      l[i / 2] += S[n][i];
    }
#pragma unroll
  for (int n = 0; n < HS / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) O[n][i] *= rescale[i / 2];
}

// The end of rungs 4 and 5: sums of the whole rows, then O and lse to where they belong.
template <int HS>
__device__ __forceinline__ void finish(const Job& at, AttentionShape s, float (&O)[HS / 8][4],
                                       const float (&m)[2], float (&l)[2], Tile<kTile, HS> q_tile, float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = at.q0 + own_row() + 8 * half;
    l[half] = row_sum(l[half]);
    if (lane() % 4 == 0 && t < s.T) at.lse[t] = m[half] * scale + logf(l[half]);
  }
  multiply_rows(O, {1 / l[0], 1 / l[1]});
  write_rows(q_tile, O);
  __syncwarp();
  store_tile(at.out, size_t(s.NH) * HS, at.q0, s.T, q_tile);
}

template <int HS>
__global__ void __launch_bounds__(128)
    registers_kernel(bf16* out, float* lse, const bf16* qkv, AttentionShape s, float scale) {
  const Job at = job<HS>(kTile, out, lse, qkv, s);
  const Tile<kTile, HS> q_tile{shared_start()}, k_tile{q_tile.at + q_tile.kBytes}, v_tile{k_tile.at + k_tile.kBytes};
  copy_tile<128>(q_tile, at.q, at.stride, at.q0, s.T);
  __syncthreads();
  uint32_t Q[HS / 16][4], P[kTile / 16][4];
  load_operand(Q, q_tile, 0);
  float S[kTile / 8][4], O[HS / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};

  for (int j0 = 0; j0 <= at.q0; j0 += kTile) {
    __syncthreads();
    copy_tile<128>(k_tile, at.k, at.stride, j0, s.T);
    copy_tile<128>(v_tile, at.v, at.stride, j0, s.T);
    __syncthreads();

    mma_sync::multiply_transposed<kTile, HS>(S, Q, k_tile);
    online_softmax<HS>(S, O, m, l, j0 == at.q0, scale * kLog2e);
    to_operand<kTile>(P, S);
    mma_sync::multiply<kTile, HS>(O, P, v_tile);
  }
  finish<HS>(at, s, O, m, l, q_tile, scale);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rung 5: asynchronous copies. cp.async moves data from global to shared memory by itself, past the registers. With
// two tiles of keys and values, the next one arrives while this one is used, and one barrier a tile is enough.

template <int HS>
__global__ void __launch_bounds__(128)
    async_kernel(bf16* out, float* lse, const bf16* qkv, AttentionShape s, float scale) {
  const Job at = job<HS>(kTile, out, lse, qkv, s);
  const Tile<kTile, HS> q_tile{shared_start()};
  auto k_tile = [&](int j0) { return Tile<kTile, HS>{q_tile.at + q_tile.kBytes * (1 + j0 / kTile % 2 * 2)}; };
  auto v_tile = [&](int j0) { return Tile<kTile, HS>{k_tile(j0).at + q_tile.kBytes}; };
  auto start_copies = [&](int j0) {
    load_tile<128>(k_tile(j0), at.k, at.stride, j0, s.T);
    load_tile<128>(v_tile(j0), at.v, at.stride, j0, s.T);
    commit_loads();
  };
  copy_tile<128>(q_tile, at.q, at.stride, at.q0, s.T);
  start_copies(0);
  __syncthreads();
  uint32_t Q[HS / 16][4], P[kTile / 16][4];
  load_operand(Q, q_tile, 0);
  float S[kTile / 8][4], O[HS / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};

  for (int j0 = 0; j0 <= at.q0; j0 += kTile) {
    wait_loads();  // this tile is here, and all are done with the one before: its place is free
    if (j0 + kTile <= at.q0) start_copies(j0 + kTile);

    mma_sync::multiply_transposed<kTile, HS>(S, Q, k_tile(j0));
    online_softmax<HS>(S, O, m, l, j0 == at.q0, scale * kLog2e);
    to_operand<kTile>(P, S);
    mma_sync::multiply<kTile, HS>(O, P, v_tile(j0));
  }
  finish<HS>(at, s, O, m, l, q_tile, scale);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rung 6 is forward_kernel in device/flash.cuh.

template <class Kernel>
void start(Kernel* kernel, int queries, int threads, size_t shared_bytes, bf16* out, float* lse, const bf16* qkv,
           AttentionShape s) {
  launch(*be, "rung", kernel, dim3(divide_up(s.T, queries), s.NH, s.B), threads, shared_bytes, out, lse, qkv, s,
         1 / std::sqrt(float(s.HS)));
}

// Calls forward(HS as a constant, out, lse, qkv, s).
template <class Forward>
void with_size(Forward forward, bf16* out, float* lse, const bf16* qkv, AttentionShape s) {
  if (s.HS == 64) return forward(std::integral_constant<int, 64>(), out, lse, qkv, s);
  forward(std::integral_constant<int, 128>(), out, lse, qkv, s);
}

// A small shape, its input, and what the definition makes of it.
struct Case {
  AttentionShape s;
  float deviation;
  std::vector<bf16> qkv;
  std::vector<double> out, lse, sums;  // sums: of p |v|
};

std::vector<Case> small_cases() {
  std::vector<Case> cases;
  for (int HS : {64, 128})
    for (int T : {1, 17, 64, 65, 200})
      for (float deviation : {1.0f, 3.0f}) {  // 3: scores with a deviation of 9, most of a row's weight on a few keys
        Case c{{2, T, 4, 2, HS}, deviation, {}, {}, {}, {}};
        std::mt19937 random(T);
        std::normal_distribution<float> normal(0, deviation);
        for (size_t i = 0; i < head_at(c.s, c.s.B, 0, 0); ++i) c.qkv.push_back(bf16(normal(random)));
        std::vector<double> exact(c.qkv.begin(), c.qkv.end());
        c.out.resize(size_t(c.s.B) * T * c.s.NH * HS), c.lse.resize(size_t(c.s.B) * c.s.NH * T), c.sums = c.out;
        attention_forward_by_definition(c.out.data(), c.lse.data(), exact.data(), c.s);
        for (size_t i = 0; i < exact.size(); ++i)
          if (i / HS % 8 >= 6) exact[i] = std::fabs(exact[i]);  // of the eight heads, the values
        std::vector<double> again(c.lse.size());
        attention_forward_by_definition(c.sums.data(), again.data(), exact.data(), c.s);
        cases.push_back(std::move(c));
      }
  return cases;
}

template <class Forward>
Error test(const std::vector<Case>& cases, Forward forward) {
  Error worst;
  for (const Case& c : cases) {
    Buffer<Cuda> qkv(*be, c.qkv.size() * 2), out(*be, c.out.size() * 2), lse(*be, c.lse.size() * 4);
    be->upload(qkv.data, c.qkv.data(), qkv.bytes);
    for (Buffer<Cuda>* result : {&out, &lse})  // NaN in both types: what is left out is found
      check(cudaMemsetAsync(result->data, 0xff, result->bytes, be->stream), "cudaMemsetAsync");
    with_size(forward, out.as<bf16>(), lse.as<float>(), qkv.as<const bf16>(), c.s);
    std::vector<bf16> got(c.out.size());
    std::vector<float> got_lse(c.lse.size());
    be->download(got.data(), out.data, out.bytes);
    be->download(got_lse.data(), lse.data, lse.bytes);
    // A score is a sum of HS products in fp32, whose sizes add up to 2 sqrt(HS) deviation^2 or so after scaling; each
    // addition is off by at most 2^-23 of that (tensor cores truncate). That is an absolute error of lse, and a
    // relative one of p, twice: by the score and by the sum. exp is good to 1e-6. P and the output are rounded to bf16,
    // to half a unit in the last of 8 bits each.
    const double score = c.s.HS * 0x1p-23 * 2 * std::sqrt(c.s.HS) * c.deviation * c.deviation + 1e-5;
    for (size_t i = 0; i < got.size(); ++i)
      worst.add(double(got[i]), c.out[i], 0x1p-8 * std::fabs(c.out[i]) + (0x1p-8 + 2 * score) * c.sums[i] + 1e-37);
    for (size_t i = 0; i < got_lse.size(); ++i) worst.add(got_lse[i], c.lse[i], score + 0x1p-23 * std::fabs(c.lse[i]));
  }
  return worst;
}

bool ladder() {
  const std::vector<Case> cases = small_cases();
  const AttentionShape shapes[] = {{64, 1024, 12, 12, 64}, {32, 2048, 2, 2, 128}};
  std::vector<LargeShape> large;
  std::vector<Tensor<bf16>> qkv, out;
  std::vector<Tensor<float>> lse;
  for (const AttentionShape& s : shapes) {
    const size_t rows = size_t(s.B) * s.T;
    char name[80];
    std::snprintf(name, sizeof name, "%d x %d, %d heads of %d", s.B, s.T, s.NH, s.HS);
    large.push_back({name, 2.0 * rows * s.T * s.NH * s.HS});
    qkv.emplace_back(rows * (s.NH + 2 * s.NKV) * s.HS);
    out.emplace_back(rows * s.NH * s.HS);
    lse.emplace_back(rows * s.NH);
  }
  std::vector<Rung> rungs;
  auto rung = [&](const char* idea, const char* verdict, auto forward) {
    rungs.push_back({idea, verdict, [&cases, forward] { return test(cases, forward); },
                     [&, forward](int i) { with_size(forward, out[i](), lse[i](), qkv[i](), shapes[i]); }});
  };
  rung("a warp per query",
       "any shape and any type, and one page to read; but every query fetches all keys and values for itself",
       [](auto, auto... a) { simple_attention_forward(*be, a...); });
  rung("keys and values in shared memory, for 16 queries at a time",
       "the caches have less to do; now every multiply-add waits for its number from shared memory",
       [](auto HS, auto... a) { start(tiles_kernel<HS()>, kQueries, kQueries * 32, 0, a...); });
  rung("tensor cores (mma.sync), scores by way of shared memory",
       "one load feeds the products of 16 queries; most of the time now goes into the scores' way there and back",
       [](auto HS, auto... a) { start(tensor_kernel<HS()>, kTile, 128, tensor_bytes<HS()>(), a...); });
  rung("softmax in registers: the scores are the next product's operand",
       "knowing the fragments' layout makes the detour needless; now the warps wait for their tiles",
       [](auto HS, auto... a) { start(registers_kernel<HS()>, kTile, 128, 3 * Tile<kTile, HS()>::kBytes, a...); });
  rung("asynchronous copies (cp.async) into a second tile",
       "the copy hides behind the products; what is left is the time of the products, and of exp between them",
       [](auto HS, auto... a) { start(async_kernel<HS()>, kTile, 128, 5 * Tile<kTile, HS()>::kBytes, a...); });
  rung(be->capability == 90 ? "flash.cuh: wgmma, and softmax while it multiplies"
                            : "flash.cuh: the next product starts before this tile's softmax",
       "what trains", [](auto, bf16* out, float* lse, const bf16* qkv, AttentionShape s) {
         flash_attention_forward(*be, out, lse, qkv, s.B, s.T, s.NH, s.NKV, s.HS);
       });
  return climb("Attention, causal, forward, bf16", large, rungs);
}

}  // namespace

int main() { return run_ladder(ladder); }
