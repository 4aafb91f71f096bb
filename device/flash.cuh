#pragma once
// Flash attention on tensor cores: causal attention, forward and backward, in bf16 with fp32 accumulation, for sm_80
// and up. The same function as the simple kernels of attention.cuh (read those first); the T x T matrix never exists.
//
// The algorithm (Dao et al. 2022, "FlashAttention", algorithms 1 and 4; Dao 2023 for the order of the loops):
//   forward   out_i = sum_j exp(s_ij - lse_i) v_j, s_ij = scale q_i.k_j, with a running row maximum and row sum
//   backward  P = exp(S - lse); dV = P^T dO; dP = dO V^T; dS = P (dP - D), D = rowsum(dO out); dQ = scale dS K;
//             dK = scale dS^T Q. Two kernels, one per tile of queries (dQ) and one per tile of keys (dK, dV), so that
//             every sum has one owner and one order: no atomics, and two runs agree to the bit. The price is that S and
//             dP are computed twice: seven products instead of five.
//   soft cap  s_ij = C tanh(scale q_i.k_j / C), and dS takes its slope, 1 - (s_ij / C)^2, as one more factor
//
// Errors: P, dS and results are rounded to bf16, by 2^-8 each. Sums are fp32: that of a row's exponentials has four
// parts of T / 4 terms, at most T / 4 2^-24 off, and a tensor core adds 16 products at a time to O, truncating, T / 16
// 2^-23 at most: 2^-13 and 2^-14 at T = 8,192, and no more than a quarter of bf16's rounding up to 65,536.
//
// How it maps to the hardware: tiles and products are those of device/tiles.cuh. A warpgroup owns 64 rows of the tile at
// hand for the whole kernel; scores come out of the first product as the second one's operand, so that P and dS never
// leave the registers.
// Heads of 128 and 256 have kernels of their own on Hopper: device/flash_hopper.cuh, which also starts all of them.

#include <algorithm>

#include "device/tiles.cuh"

namespace flash {

// What the backward pass's second kernel must know of each query, the first leaves in a workspace (2, B, NH, padded T)
// fp32: lse log2 e, with which exponentials are powers of two, and -D. Padded, it can be read by whole tiles of up to
// 128 queries; those from T on have zeros.
inline HOST_DEVICE int padded(int T) { return (T + 127) / 128 * 128; }
inline size_t workspace_numbers(int B, int T, int NH) { return size_t(2) * B * NH * padded(T); }

}  // namespace flash

#ifdef __CUDACC__

namespace flash {

constexpr float kLn2 = 0.6931471805599453f;

// How RoPE turned the first R channels of queries and keys, which is undone in their gradients: pair i of position t,
// channels i and i + R/2 or with `interleaved` 2i and 2i + 1, by the angle at cos_sin (T, R/2, 2). R = 0: not at all.
struct Rotation {
  const float* cos_sin = nullptr;
  int R = 0;
  bool interleaved = false;
  Rows table = {};  // all of the table, where turns_all()
};

// A head's rows of the workspace.
struct Numbers {
  float *lse2, *minus_D;
  __device__ __forceinline__ Numbers(float* workspace, size_t heads, int T, size_t head)
      : lse2(workspace + head * padded(T)), minus_D(lse2 + heads * padded(T)) {}
  // Of the thread's rows, `row` and `row` + 8: lse log2 e, which is returned as well, from the head's lse (T), and -D.
  __device__ __forceinline__ void leave(float (&lse_log2e)[2], const float (&D)[2], const float* lse, int row,
                                        int T) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = row + 8 * h;
      lse_log2e[h] = t < T ? lse[t] * kLog2e : 0;
      if (lane() % 4 == 0) lse2[t] = lse_log2e[h], minus_D[t] = -D[h];
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Small pieces

// cap tanh(x / cap), by 1 - 2 / (1 + e^2y): off by 2^-22 cap. tanh.approx would be one instruction instead of two, and
// off by 2^-11.
__device__ __forceinline__ float soft_cap(float x, float cap) {
  return cap - __fdividef(2 * cap, 1 + exp2_(x * (2 * kLog2e / cap)));
}
// The cap's slope at the score that has the weight p: score / cap comes back from log2 p = score log2 e - lse2, and no
// register keeps it until then. A weight that became 0 gets any number.
__device__ __forceinline__ float soft_cap_slope(float p, float lse2, float log2e_per_cap) {
  const float tanh = (log2_(fmaxf(p, 0x1p-126f)) + lse2) * log2e_per_cap;
  return 1 - tanh * tanh;
}

__device__ __forceinline__ float2 load_pair(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

// Over the four threads that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// For the thread's two rows: the row of one tile times that of another, added up. They are the diagonal of a product of
// 16 x 16, of which the tensor cores make two pieces of 16 x 8.
template <int HS>
__device__ __forceinline__ void row_products(float (&sum)[2], Tile<kRows, HS> a, Tile<kRows, HS> b) {
  float pieces[2][4] = {};
#pragma unroll
  for (int k = 0; k < HS / 16; ++k) {
    uint32_t x[4], y[4];
    load_operand(x, a, 0, k);
    load_operand(y, b, 0, k);
    mma_sync::mma(pieces[0], x, y[0], y[2]);
    mma_sync::mma(pieces[1], x, y[1], y[3]);
  }
  const int g = lane() / 4;  // columns g and g + 8 of rows g and g + 8 are in thread g / 2 of the four that share them
#pragma unroll
  for (int h = 0; h < 2; ++h) sum[h] = __shfl_sync(~0u, pieces[h][2 * h + g % 2], g * 4 + g / 2);
}

// Scores before their scale: cap is C / scale.
template <bool CAPPED, int N>
__device__ __forceinline__ void cap_scores(float (&S)[N][4], float cap) {
  if constexpr (CAPPED) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) S[n][i] = soft_cap(S[n][i], cap);
  }
}

// The scores S of the keys from first_key on become exp(S - m), with the rows' m and sums l brought up to date. m is
// subtracted to keep exp in range, and need not be the maximum for that: it follows the maximum only when exp has grown
// by a factor of 2^8, so that O is rarely rescaled. True if O must be, by factor. The warpgroup's queries start at row0,
// the thread's are `row` and `row` + 8.
template <bool CAPPED, int N>
__device__ __forceinline__ bool weights(float (&S)[N][4], float (&m)[2], float (&l)[2], float (&factor)[2],
                                        int first_key, int row0, int row, float scale2, float cap) {
  cap_scores<CAPPED>(S, cap);
  if (first_key + N * 8 - 1 > row0) {  // the diagonal passes through. Keys from T on lie right of it for every row < T.
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first_key + n * 8 + lane() % 4 * 2 + i % 2 > row + i / 2 * 8) S[n][i] = -INFINITY;
  }
  // A thread has columns of two rows, g and g + 8: two maxima, two sums.
  float top[2] = {S[0][0], S[0][2]};
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], S[n][i]);
  const float slack = 8 / scale2;
  // All of the warp or none, since the reduction below needs all of its lanes.
  const bool rescale = __any_sync(~0u, top[0] > m[0] + slack || top[1] > m[1] + slack);
  if (rescale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float grown = fmaxf(m[h], row_max(top[h]));  // finite: every row sees key 0, in the first tile
      factor[h] = exp2_((m[h] - grown) * scale2);
      m[h] = grown;
      l[h] *= factor[h];  // O follows when its product is done
    }
  }
  const float shift[2] = {m[0] * scale2, m[1] * scale2};  // so that each exponent is one multiply-add
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      S[n][i] = exp2_(S[n][i] * scale2 - shift[i / 2]);
      l[i / 2] += S[n][i];
    }
  return rescale;
}

// The same in the backward pass, where the rows' lse is known: S becomes P = exp(S - lse), 0 beyond the diagonal.
template <bool CAPPED, int N>
__device__ __forceinline__ void weights_again(float (&S)[N][4], const float (&lse2)[2], int first_key, int row0, int row,
                                              float scale2, float cap) {
  cap_scores<CAPPED>(S, cap);
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) S[n][i] = exp2_(S[n][i] * scale2 - lse2[i / 2]);
  if (first_key + N * 8 - 1 > row0) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first_key + n * 8 + lane() % 4 * 2 + i % 2 > row + i / 2 * 8) S[n][i] = 0;
  }
}
// In the forward pass P = softmax(S): dS = P (dP - D), in the place of P. Its scale comes last, with dQ.
template <bool CAPPED, int N>
__device__ __forceinline__ void score_gradients(float (&P)[N][4], const float (&dP)[N][4], const float (&D)[2],
                                                const float (&lse2)[2], float scale2, float cap) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float slope = CAPPED ? soft_cap_slope(P[n][i], lse2[i / 2], 1 / (cap * scale2)) : 1;
      P[n][i] *= (dP[n][i] - D[i / 2]) * slope;
    }
}

// Each of the thread's two rows times its factor.
template <int N>
__device__ __forceinline__ void multiply_rows(float (&O)[N][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) O[n][i] *= factor[i / 2];
}

extern __shared__ __align__(1024) unsigned char shared_memory[];
__device__ __forceinline__ uint32_t shared_start() { return uint32_t(__cvta_generic_to_shared(shared_memory)); }

// Channel of a row of a tile, as a pointer.
template <int ROWS, int HS>
__device__ __forceinline__ bf16* element(Tile<ROWS, HS> tile, int row, int channel) {
  return reinterpret_cast<bf16*>(shared_memory + (tile.address(row, channel / 8) - shared_start())) + channel % 8;
}

// Undoes the rotation, to the bit as rope_backward(), in the warp's own 16 rows of a tile whose row 0 is at position
// `first`. Two lanes share a row, each has every other pair. Rows from T on are not stored, whatever they are.
template <int HS>
__device__ __forceinline__ void turn_pairs_back(Tile<kRows, HS> tile, const Rotation& rope, int first, int T) {
  const int R = rope.R, row = threadIdx.x % kGroup / 32 * 16 + lane() % 16;
  const float* angles = rope.cos_sin + size_t(min(first + row, T - 1)) * R;
  for (int i = lane() / 16; i < R / 2; i += 2) {
    bf16* a = element(tile, row, rope.interleaved ? 2 * i : i);
    bf16* b = element(tile, row, rope.interleaved ? 2 * i + 1 : i + R / 2);
    float angle[2], x = float(*a), y = float(*b);
    load<2>(angle, angles + 2 * i);
    turn(x, y, angle[0], -angle[1]);
    *a = bf16(x), *b = bf16(y);
  }
}

// The same for R = 8 LANES: so many lanes share a row, of which each turns four neighbouring pairs. Together they read
// whole rows of the table; with a row to a lane, the L1 cache would look up a line for every lane.
template <int LANES, int HS>
__device__ __forceinline__ void turn_fours_back(Tile<kRows, HS> tile, const Rotation& rope, int first, int T) {
  const int i = lane() % LANES * 4;
#pragma unroll 4
  for (int n = 0; n < 16; n += 32 / LANES) {
    if (LANES == 1 && lane() >= 16) break;
    const int row = threadIdx.x % kGroup / 32 * 16 + n + lane() / LANES;
    const float4* angles =
        reinterpret_cast<const float4*>(rope.cos_sin + size_t(min(first + row, T - 1)) * (8 * LANES) + 2 * i);
    const float4 angle[2] = {__ldg(angles), __ldg(angles + 1)};
    bf16* a = element(tile, row, rope.interleaved ? 2 * i : i);
    bf16* b = rope.interleaved ? a + 4 : element(tile, row, i + 4 * LANES);
    float x[4], y[4];
    load<4>(x, a), load<4>(y, b);
    if (rope.interleaved) {
      turn(x[0], x[1], angle[0].x, -angle[0].y), turn(x[2], x[3], angle[0].z, -angle[0].w);
      turn(y[0], y[1], angle[1].x, -angle[1].y), turn(y[2], y[3], angle[1].z, -angle[1].w);
    } else {
      turn(x[0], y[0], angle[0].x, -angle[0].y), turn(x[1], y[1], angle[0].z, -angle[0].w);
      turn(x[2], y[2], angle[1].x, -angle[1].y), turn(x[3], y[3], angle[1].z, -angle[1].w);
    }
    store<4>(a, x), store<4>(b, y);
  }
}

template <int HS>
__device__ __forceinline__ void turn_rows_back(Tile<kRows, HS> tile, const Rotation& rope, int first, int T) {
  if (rope.R == HS) turn_fours_back<HS / 8>(tile, rope, first, T);
  else if (rope.R == HS / 2) turn_fours_back<HS / 16>(tile, rope, first, T);
  else if (rope.R == HS / 4) turn_fours_back<HS / 32>(tile, rope, first, T);
  else turn_pairs_back(tile, rope, first, T);
}

// Two other ways, to the same bits, for channels that are paired by halves and still in registers (x, as accumulators).
//
// All channels: a thread has both of each pair, and the angles of the block's rows come to shared memory while its last
// products are on their way, (kRows, HS/2, 2) fp32 as a tile of twice as many bf16.
template <int HS>
using Angles = Tile<kRows, 2 * HS>;
template <int HS>
HOST_DEVICE bool turns_all(const Rotation& rope) {
  return rope.R == HS && !rope.interleaved;
}
template <int HS>
__device__ __forceinline__ void turn_all_back(float (&x)[HS / 8][4], Angles<HS> angles) {
  const uint32_t first_angle = angles.address(own_row(), lane() % 4);
#pragma unroll
  for (int n = 0; n < HS / 16; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 angle = read_angles(first_angle, n, h);
      float *a = &x[n][2 * h], *b = &x[n + HS / 16][2 * h];
#pragma unroll
      for (int i = 0; i < 2; ++i) a[i] = rounded(a[i]), b[i] = rounded(b[i]);
      turn(a[0], b[0], angle.x, -angle.y);
      turn(a[1], b[1], angle.z, -angle.w);
    }
}

// Up to 8 channels: a row's lie in four threads, two in each, and a shuffle brings each channel the other of its pair.
__device__ __forceinline__ bool turns_first_piece(const Rotation& rope) {
  return rope.R > 0 && rope.R <= 8 && !rope.interleaved;
}
__device__ __forceinline__ void turn_first_piece_back(float (&x)[4], const Rotation& rope, int first, int T) {
  const int half = rope.R / 2;
  float angle[4][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int c = lane() % 4 * 2 + i % 2, pair = c < half ? c : c < rope.R ? c - half : 0;
    load<2>(angle[i], rope.cos_sin + size_t(min(first + own_row() + i / 2 * 8, T - 1)) * rope.R + 2 * pair);
    x[i] = rounded(x[i]);
  }
  float turned[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int c = lane() % 4 * 2 + i % 2, other = c < half ? c + half : c - half;
    // An even channel's other is even, too, if half is.
    const float y = __shfl_sync(~0u, half % 2 ? x[i ^ 1] : x[i], (lane() & ~3) + other / 2);
    const float sine = c < half ? -angle[i][1] : angle[i][1];  // as turned_first(x, y), or turned_second(y, x)
    turned[i] = c < rope.R ? turned_first(x[i], y, angle[i][0], sine) : x[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = turned[i];
}

// Writes accumulators (64, HS) as bf16 to the warp's own 16 rows of a tile, from where they can be sent (finish_rows()).
template <int HS>
__device__ __forceinline__ void write_rows(Tile<kRows, HS> tile, const float (&acc)[HS / 8][4]) {
  uint32_t a[HS / 16][4];
  to_operand<HS>(a, acc);
#pragma unroll
  for (int k = 0; k < HS / 16; ++k) store_operand(tile, a[k], k);
}
// The same, times factor, where a rotation is undone on the way. The tile's row 0 is at position `first`. ANGLES:
// turn_all_back() has its angles.
template <bool ANGLES, int HS>
__device__ __forceinline__ void write_turned_back(Tile<kRows, HS> tile, float (&x)[HS / 8][4], float factor,
                                                  const Rotation& rope, int first, int T, Angles<HS> angles = {}) {
  multiply_rows(x, {factor, factor});
  const bool all = ANGLES && turns_all<HS>(rope), piece = turns_first_piece(rope);
  if (all) turn_all_back<HS>(x, angles);
  if (piece) turn_first_piece_back(x[0], rope, first, T);
  write_rows(tile, x);
  if (rope.R == 0 || all || piece) return;
  __syncwarp();
  turn_rows_back(tile, rope, first, T);
}

// As write_rows(), but without a tile, to rows first.. of a matrix (T, HS), `stride` elements from row to row: the four
// threads that share a row exchange their pairs, until each has 8 columns of it.
template <int HS>
__device__ __forceinline__ void store_rows(bf16* to, size_t stride, int first, int T, const float (&acc)[HS / 8][4],
                                           float factor0, float factor1) {
  const bool odd = lane() & 1, high = lane() & 2;
#pragma unroll
  for (int n = 0; n < HS / 8; n += 4)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = h ? factor1 : factor0;
      uint32_t x[4];  // x[i], columns 2t and 2t + 1 of piece n + i, becomes columns 2i and 2i + 1 of piece n + t
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = pack_pair(acc[n + i][2 * h] * factor, acc[n + i][2 * h + 1] * factor);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t other = __shfl_xor_sync(~0u, odd ? x[i] : x[i + 1], 1);
        (odd ? x[i] : x[i + 1]) = other;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t other = __shfl_xor_sync(~0u, high ? x[i] : x[i + 2], 2);
        (high ? x[i] : x[i + 2]) = other;
      }
      const int row = first + own_row() + 8 * h;
      if (row < T)
        *reinterpret_cast<uint4*>(to + row * stride + (n + lane() % 4) * 8) = make_uint4(x[0], x[1], x[2], x[3]);
    }
}

// Whether a turn of a loop starts its products before it asks for the next tiles. On Hopper they run on by themselves, and
// would wait for the one thread that asks: 2 % of the backward pass on an H200. With mma.sync they are over by then.
constexpr bool kProductsFirst = HOPPER;

// Where a block works, in a grid (tiles, heads, B). Blocks count fastest over the tiles of one head, whose keys and
// values then stay in the cache.
struct Place {
  int b, head, tile;
};
__device__ __forceinline__ Place place() { return {int(blockIdx.z), int(blockIdx.y), int(blockIdx.x)}; }

// ---------------------------------------------------------------------------------------------------------------------
// Tile sizes, found by measurement on an H100 and an H200. N rows of the streamed tile; STAGES (backward): 2, the next
// tile loads while this one is used, or 1, where shared memory is short; REGISTERS: with mma.sync the fixed operands
// (Q, ...) stay in registers; BLOCKS per multiprocessor, which bounds registers per thread.
template <int N, int STAGES, bool REGISTERS, int BLOCKS>
struct Config {
  static constexpr int kN = N, kStages = STAGES, kBlocks = BLOCKS;
  // For wgmma never: ptxas 13.0 overwrites the registers of an A operand that is the same in every turn of a loop.
  static constexpr bool kRegisters = REGISTERS && !HOPPER;
};

// clang-format off
template <int HS> struct ForwardConfig;
template <> struct ForwardConfig<32> : Config<64, 2, true, 4> {};
template <> struct ForwardConfig<64> : Config<64, 2, true, HOPPER ? 3 : 2> {};
template <> struct ForwardConfig<128> : Config<64, 2, true, HOPPER ? 2 : 1> {};
template <> struct ForwardConfig<256> : Config<32, 2, false, 2> {};

template <int HS> struct QueryConfig;  // dQ
template <> struct QueryConfig<32> : Config<64, 2, true, 3> {};
template <> struct QueryConfig<64> : Config<64, 2, true, HOPPER ? 4 : 2> {};
template <> struct QueryConfig<128> : Config<64, 2, false, 2> {};
template <> struct QueryConfig<256> : Config<32, 1, false, 2> {};

template <int HS> struct KeyConfig;  // dK and dV
template <> struct KeyConfig<32> : Config<64, 2, true, 2> {};
template <> struct KeyConfig<64> : Config<64, 2, true, HOPPER ? 3 : 2> {};
template <> struct KeyConfig<128> : Config<64, 2, false, 1> {};
template <> struct KeyConfig<256> : Config<32, 1, false, 2> {};
// clang-format on

// A fixed operand, in registers or in shared memory.
template <bool REGISTERS, int ROWS, int HS>
struct Operand {
  uint32_t a[HS / 16][4];
  __device__ __forceinline__ Operand(Tile<ROWS, HS> tile) { load_operand(a, tile, 0); }
  template <int N>
  __device__ __forceinline__ void times(float (&acc)[N / 8][4], Tile<N, HS> tile, bool add = false) const {
    multiply_transposed<N, HS>(acc, a, tile, add);
  }
};
template <int ROWS, int HS>
struct Operand<false, ROWS, HS> {
  Shared<ROWS, HS> a;
  __device__ __forceinline__ Operand(Tile<ROWS, HS> tile) : a{tile, 0} {}
  template <int N>
  __device__ __forceinline__ void times(float (&acc)[N / 8][4], Tile<N, HS> tile, bool add = false) const {
    multiply_transposed<N, ROWS, HS>(acc, a, tile, add);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward: a block per tile of queries, over the tiles of keys up to the diagonal.

template <int HS, class C>
constexpr size_t forward_bytes() {
  return Tile<kRows, HS>::kBytes + 4 * Tile<C::kN, HS>::kBytes;
}

template <int HS, class C, bool CAPPED = false>
__global__ __launch_bounds__(kGroup, C::kBlocks) void forward_kernel(const __grid_constant__ Rows out, float* lse,
                                                                     const __grid_constant__ Rows qkv, int T, int NH,
                                                                     int NKV, float scale, float cap) {
  constexpr int M = kRows, N = C::kN;  // queries of the block, keys of a tile
  const Place at = place();
  const int q0 =
      (int(gridDim.x) - 1 - at.tile) * M;  // the longest rows first: the short ones fill the gaps at the end
  const int k = (NH + at.head / (NH / NKV)) * HS, v = k + NKV * HS;  // columns

  const Tile<M, HS> q_tile{shared_start()};
  Copies copies;
  auto k_tile = [&](int j) { return Tile<N, HS>{q_tile.at + q_tile.kBytes + j % 2 * Tile<N, HS>::kBytes}; };
  auto v_tile = [&](int j) { return Tile<N, HS>{k_tile(j).at + 2 * Tile<N, HS>::kBytes}; };
  const int row = q0 + own_row(), tiles = (min(q0 + M, T) + N - 1) / N;  // tiles of keys that any query sees
  auto load = [&](int j) {  // keys run one tile ahead of values
    if (j + 1 < tiles) copies.load(k_tile(j + 1), qkv, at.b, (j + 1) * N, k);
    if (j >= 0) copies.load(v_tile(j), qkv, at.b, j * N, v);
    copies.commit();
  };

  const float scale2 = scale * kLog2e;  // exponentials are powers of two from here on
  float S[N / 8][4], O[HS / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, factor[2];
  uint32_t P[N / 16][4];  // the weights of the tile before, as an A operand

  auto softmax = [&](int j) { return weights<CAPPED>(S, m, l, factor, j * N, q0, row, scale2, cap); };

  // The queries and the first keys, then, while S is computed, their values and the next keys.
  copies.load(q_tile, qkv, at.b, q0, at.head * HS);
  load(-1);
  copies.wait();
  load(0);
  const Operand<C::kRegisters, M, HS> Q(q_tile);
  Q.template times<N>(S, k_tile(0));
  wait_products<0>(S);
  softmax(0);
  to_operand<N>(P, S);

  // While the tensor cores multiply by the values of tile j, the other units turn the scores of tile j + 1 into
  // weights.
  for (int j = 0; j < tiles - 1; ++j) {
    copies.wait();
    if (!kProductsFirst) load(j + 1);
    // Two products are under way from here: that of the scores is waited for first.
    Q.template times<N>(S, k_tile(j + 1));
    if (kProductsFirst) load(j + 1);
    multiply<N, HS>(O, P, v_tile(j));
    wait_products<1>(S);
    const bool rescale = softmax(j + 1);
    wait_products<0>(O);
    if (rescale) multiply_rows(O, factor);
    to_operand<N>(P, S);
  }
  copies.wait();
  multiply<N, HS>(O, P, v_tile(tiles - 1));
  wait_products<0>(O);

  float* lse_row = lse + (size_t(at.b) * NH + at.head) * T;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // Each thread has summed its own columns; rescaling was the same for all four, so their sums just add up.
    l[h] = row_sum(l[h]);
    if (lane() % 4 == 0 && row + 8 * h < T) lse_row[row + 8 * h] = m[h] * scale + log2_(l[h]) * kLn2;
  }
  __syncthreads();  // the queries' tile is used again
  multiply_rows(O, {1 / l[0], 1 / l[1]});
  write_rows(q_tile, O);
  finish_rows();
  send_rows(out, at.b, q0, at.head * HS, q_tile);
  wait_sent();
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward, queries: a block per tile of queries, over the tiles of keys. Also leaves what the keys' kernel needs.

template <int HS, class C>
constexpr size_t query_bytes() {
  return 2 * Tile<kRows, HS>::kBytes +
         std::max(size_t(2 * C::kStages) * Tile<C::kN, HS>::kBytes, size_t(Tile<kRows, HS>::kBytes));
}

template <int HS, class C, bool CAPPED = false>
__global__ __launch_bounds__(kGroup, C::kBlocks) void query_kernel(
    const __grid_constant__ Rows dqkv, float* workspace, const __grid_constant__ Rows dout,
    const __grid_constant__ Rows qkv, const __grid_constant__ Rows out, const float* lse,
    const __grid_constant__ Rotation rope, int T, int NH, int NKV, float scale, float cap) {
  constexpr int M = kRows, N = C::kN;
  const Place at = place();
  const int q0 = (int(gridDim.x) - 1 - at.tile) * M;
  const int q = at.head * HS, k = (NH + at.head / (NH / NKV)) * HS, v = k + NKV * HS;  // columns

  const Tile<M, HS> q_tile{shared_start()}, do_tile{q_tile.at + q_tile.kBytes}, out_tile{do_tile.at + do_tile.kBytes};
  Copies copies;
  auto k_tile = [&](int stage) { return Tile<N, HS>{out_tile.at + stage * 2 * Tile<N, HS>::kBytes}; };
  auto v_tile = [&](int stage) { return Tile<N, HS>{k_tile(stage).at + Tile<N, HS>::kBytes}; };
  auto load = [&](int j, int stage) {
    copies.load(k_tile(stage), qkv, at.b, j * N, k);
    copies.load(v_tile(stage), qkv, at.b, j * N, v);
    copies.commit();
  };
  auto angles = [&](int stage) { return Angles<HS>{k_tile(stage).at}; };
  copies.load(q_tile, qkv, at.b, q0, q);
  copies.load(do_tile, dout, at.b, q0, q);
  copies.load(out_tile, out, at.b, q0, q);  // in the place of stage 0
  const int tiles = (min(q0 + M, T) + N - 1) / N;
  int stage = C::kStages - 1;
  if (C::kStages == 2) load(tiles - 1, stage);
  else copies.commit();
  copies.wait();

  const int row = q0 + own_row();
  const float scale2 = scale * kLog2e;
  float D[2], lse2[2];
  row_products(D, do_tile, out_tile);  // D = rowsum(dO out)
  const size_t head = size_t(at.b) * NH + at.head;
  const Numbers numbers(workspace, gridDim.z * NH, T, head);
  numbers.leave(lse2, D, lse + head * T, row, T);
  const int behind = q0 + M + threadIdx.x;  // no tile has them
  if (at.tile == 0 && behind < padded(T)) numbers.lse2[behind] = numbers.minus_D[behind] = 0;
  const Operand<C::kRegisters, M, HS> Q(q_tile), dO(do_tile);
  float dQ[HS / 8][4] = {};
  __syncthreads();  // out_tile is done with

  for (int j = tiles - 1; j >= 0; --j) {
    if (C::kStages == 1) {
      if (j < tiles - 1) __syncthreads();
      load(j, 0);
    }
    if (C::kStages == 1 || j < tiles - 1) copies.wait();
    auto load_next = [&] {
      if (C::kStages == 1) return;
      if (j > 0) load(j - 1, stage ^ 1);
      else if (turns_all<HS>(rope)) copies.load(angles(stage ^ 1), rope.table, 0, q0, 0), copies.commit();
    };
    if (!kProductsFirst) load_next();
    float S[N / 8][4], dP[N / 8][4];
    Q.template times<N>(S, k_tile(stage));
    dO.template times<N>(dP, v_tile(stage));
    if (kProductsFirst) load_next();
    // P = exp(S - lse), while dP = dO V^T is still on its way.
    wait_products<1>(S);
    weights_again<CAPPED>(S, lse2, j * N, q0, row, scale2, cap);
    wait_products<0>(dP);
    score_gradients<CAPPED>(S, dP, D, lse2, scale2, cap);
    uint32_t dS[N / 16][4];
    to_operand<N>(dS, S);
    // In the forward pass S = scale Q K^T, so dQ = scale dS K.
    multiply<N, HS>(dQ, dS, k_tile(stage));
    wait_products<0>(dQ);
    if (C::kStages == 2) stage ^= 1;
  }
  if (C::kStages == 2 && turns_all<HS>(rope)) copies.wait();
  else __syncthreads();  // the queries' tile is used again
  write_turned_back<C::kStages == 2>(q_tile, dQ, scale, rope, q0, T, angles(stage));
  finish_rows();
  send_rows(dqkv, at.b, q0, q, q_tile);
  wait_sent();
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward, keys and values: a block per tile of keys, over the query heads of its group and their tiles of queries.
// Everything is transposed (rows are keys), so that P^T and dS^T come out as A operands. DK and DV say which of the two
// are computed: at head size 256 both at once do not fit the registers.

template <int HS, class C>
constexpr size_t key_bytes() {
  return 2 * Tile<kRows, HS>::kBytes +
         size_t(C::kStages) * (2 * Tile<C::kN, HS>::kBytes + 2 * C::kN * sizeof(float));
}

template <int HS, class C, bool DK, bool DV, bool CAPPED = false>
__global__ __launch_bounds__(kGroup, C::kBlocks) void key_kernel(const __grid_constant__ Rows dqkv,
                                                                 const __grid_constant__ Rows dout,
                                                                 const __grid_constant__ Rows qkv,
                                                                 float* workspace,
                                                                 const __grid_constant__ Rotation rope, int T, int NH,
                                                                 int NKV, float scale, float cap) {
  constexpr int M = kRows, N = C::kN;
  const Place at = place();
  const int k0 = at.tile * M, heads = NH / NKV;
  const int k = (NH + at.head) * HS, v = k + NKV * HS;  // columns

  const Tile<M, HS> k_shared{shared_start()}, v_shared{k_shared.at + k_shared.kBytes};
  const uint32_t streamed = v_shared.at + v_shared.kBytes, statistics = streamed + C::kStages * 2 * Tile<N, HS>::kBytes;
  auto q_tile = [&](int stage) { return Tile<N, HS>{streamed + stage * 2 * Tile<N, HS>::kBytes}; };
  auto do_tile = [&](int stage) { return Tile<N, HS>{q_tile(stage).at + Tile<N, HS>::kBytes}; };
  Copies copies;

  // Steps: the heads of the group, and of each the tiles of queries from the diagonal on.
  // Queries before the first key of the tile see none of it.
  const int first = k0 / N, per_head = (T + N - 1) / N - first, steps = heads * per_head;
  int next_head = at.head * heads, next_tile = first;  // of the tile to be loaded next
  auto load = [&](int stage) {
    const int q0 = next_tile * N;
    copies.load(q_tile(stage), qkv, at.b, q0, next_head * HS);
    copies.load(do_tile(stage), dout, at.b, q0, next_head * HS);
    const Numbers numbers(workspace, gridDim.z * NH, T, size_t(at.b) * NH + next_head);
    copies.load_numbers<N>(statistics + stage * 2 * N * 4, numbers.lse2 + q0);
    if (DK) copies.load_numbers<N>(statistics + (stage * 2 + 1) * N * 4, numbers.minus_D + q0);
    copies.commit();
    if (++next_tile == first + per_head) next_tile = first, ++next_head;
  };
  auto angles = [&](int stage) { return Angles<HS>{q_tile(stage).at}; };
  copies.load(k_shared, qkv, at.b, k0, k);
  if (DK) copies.load(v_shared, qkv, at.b, k0, v);
  load(0);
  copies.wait();

  const int row = k0 + own_row();
  const Operand<C::kRegisters, M, HS> K(k_shared), V(v_shared);
  const float scale2 = scale * kLog2e;
  float dK[HS / 8][4] = {}, dV[HS / 8][4] = {};

  for (int step = 0, stage = 0, tile = first; step < steps; ++step) {
    if (step > 0) {
      if (C::kStages == 1) {
        __syncthreads();
        load(0);
      }
      copies.wait();
    }
    auto load_next = [&] {
      if (C::kStages == 1) return;
      if (step + 1 < steps) load(stage ^ 1);
      else if (DK && turns_all<HS>(rope)) copies.load(angles(stage ^ 1), rope.table, 0, k0, 0), copies.commit();
    };
    if (!kProductsFirst) load_next();
    const int q0 = tile * N;
    if (++tile == first + per_head) tile = first;
    float S[N / 8][4], dP[N / 8][4];
    // Rows are keys here, so each column, a query, has its own lse and D. dP begins with -D instead of 0.
    const uint32_t lse_tile = statistics + (stage * 2 * N + lane() % 4 * 2) * 4, D_tile = lse_tile + N * 4;
    if (DK) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        const float2 minus_D = load_pair(D_tile + n * 32);
        dP[n][0] = dP[n][2] = minus_D.x, dP[n][1] = dP[n][3] = minus_D.y;
      }
      V.template times<N>(dP, do_tile(stage), true);
    }
    K.template times<N>(S, q_tile(stage));
    if (kProductsFirst) load_next();
    if (DK) wait_products<1>(dP);
    wait_products<0>(S);
    cap_scores<CAPPED>(S, cap);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      const float2 lse2 = load_pair(lse_tile + n * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) S[n][i] = exp2_(S[n][i] * scale2 - (i % 2 ? lse2.y : lse2.x));
    }
    if (q0 < k0 + kRows - 1) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (q0 + n * 8 + lane() % 4 * 2 + i % 2 < row + i / 2 * 8) S[n][i] = 0;
    }
    uint32_t P[N / 16][4], dS[N / 16][4];
    if (DV) {
      to_operand<N>(P, S);
      // In the forward pass out = P V, so dV = P^T dO; P^T is what is at hand.
      multiply<N, HS>(dV, P, do_tile(stage));
    }
    if (DK) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        const float2 lse2 = CAPPED ? load_pair(lse_tile + n * 32) : float2();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float slope = CAPPED ? soft_cap_slope(S[n][i], i % 2 ? lse2.y : lse2.x, 1 / (cap * scale2)) : 1;
          S[n][i] *= dP[n][i] * slope;
        }
      }
      to_operand<N>(dS, S);
      // In the forward pass S = scale Q K^T, so dK = scale dS^T Q.
      multiply<N, HS>(dK, dS, q_tile(stage));
      wait_products<0>(dK);
    }
    if (DV) wait_products<0>(dV);
    if (C::kStages == 2) stage ^= 1;
  }
  if (DK && C::kStages == 2 && turns_all<HS>(rope)) copies.wait();
  else __syncthreads();  // the tiles of keys and values are used again
  if (DK) write_turned_back<C::kStages == 2>(k_shared, dK, scale, rope, k0, T, angles(steps % 2));
  if (DV) write_rows(v_shared, dV);
  finish_rows();
  if (DK) send_rows(dqkv, at.b, k0, k, k_shared);
  if (DV) send_rows(dqkv, at.b, k0, v, v_shared);
  wait_sent();
}

// ---------------------------------------------------------------------------------------------------------------------
// Statistics of the weights, for diagnostics: a block per tile of queries, over the tiles of keys. entropies (B, NH, T)
// and max_logit (NH) as in attention_statistics() of run/diagnostics.cuh, which calls it; it stands here because it is
// made of this file's tiles, operands and products.

template <int HS, class C>
constexpr size_t statistics_bytes() {
  return Tile<kRows, HS>::kBytes + 2 * Tile<C::kN, HS>::kBytes;
}

template <int HS, class C, bool CAPPED>
__global__ __launch_bounds__(kGroup, C::kBlocks) void statistics_kernel(double* max_logit, float* entropies,
                                                                        const __grid_constant__ Rows qkv,
                                                                        const float* lse, int T, int NH, int NKV,
                                                                        float scale, float cap) {
  constexpr int M = kRows, N = C::kN;
  const Place at = place();
  const int q0 = (int(gridDim.x) - 1 - at.tile) * M;
  const size_t rows = (size_t(at.b) * NH + at.head) * T;
  const int k = (NH + at.head / (NH / NKV)) * HS;  // column

  const Tile<M, HS> q_tile{shared_start()};
  auto k_tile = [&](int j) { return Tile<N, HS>{q_tile.at + q_tile.kBytes + j % 2 * Tile<N, HS>::kBytes}; };
  Copies copies;
  auto load = [&](int j) {
    copies.load(k_tile(j), qkv, at.b, j * N, k);
    copies.commit();
  };
  copies.load(q_tile, qkv, at.b, q0, at.head * HS);
  load(0);
  copies.wait();
  const Operand<C::kRegisters, M, HS> Q(q_tile);

  const int row = q0 + own_row();
  const float scale2 = scale * kLog2e;
  float lse2[2], top = 0, sum[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < 2; ++h) lse2[h] = row + 8 * h < T ? lse[rows + row + 8 * h] * kLog2e : 0;

  const int tiles = (min(q0 + M, T) + N - 1) / N;
  for (int j = 0; j < tiles; ++j) {
    if (j > 0) copies.wait();
    if (j + 1 < tiles) load(j + 1);
    float S[N / 8][4];
    Q.template times<N>(S, k_tile(j));
    wait_products<0>(S);
    const bool diagonal = j * N + N - 1 > q0;
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (diagonal && j * N + n * 8 + lane() % 4 * 2 + i % 2 > row + i / 2 * 8) continue;  // the future
        const float d = lse2[i / 2] - (CAPPED ? soft_cap(S[n][i], cap) : S[n][i]) * scale2;  // -log2 p
        top = fmaxf(top, fabsf(S[n][i]));  // 0 in rows from T on, whose queries are zeros
        sum[i / 2] += exp2_(-d) * d;
      }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] = row_sum(sum[h]) * kLn2;
    if (lane() % 4 == 0 && row + 8 * h < T) entropies[rows + row + 8 * h] = sum[h];
  }
  top = warp_max(top);
  if (lane() == 0) raise_to(max_logit + at.head, top * scale);
}

}  // namespace flash

#endif  // __CUDACC__
