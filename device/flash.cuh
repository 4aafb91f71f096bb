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

#ifdef __CUDACC__

namespace flash {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// How RoPE turned the first R channels of queries and keys, which is undone in their gradients: pair i of position t,
// channels i and i + R/2 or with `interleaved` 2i and 2i + 1, by the angle at cos_sin (T, R/2, 2). R = 0: not at all.
struct Rotation {
  const float* cos_sin = nullptr;
  int R = 0;
  bool interleaved = false;
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
  float log2_p;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2_p) : "f"(fmaxf(p, 0x1p-126f)));
  const float tanh = (log2_p + lse2) * log2e_per_cap;
  return 1 - tanh * tanh;
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

// O, of a thread's two rows, follows them when they were rescaled.
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
template <int ROWS, int HS>
__device__ __forceinline__ void turn_pairs_back(Tile<ROWS, HS> tile, const Rotation& rope, int first, int T) {
  const int R = rope.R, row = threadIdx.x / 32 * 16 + lane() % 16;
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
template <int LANES, int ROWS, int HS>
__device__ __forceinline__ void turn_fours_back(Tile<ROWS, HS> tile, const Rotation& rope, int first, int T) {
  const int i = lane() % LANES * 4;
#pragma unroll 4
  for (int n = 0; n < 16; n += 32 / LANES) {
    if (LANES == 1 && lane() >= 16) break;
    const int row = threadIdx.x / 32 * 16 + n + lane() / LANES;
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

template <int ROWS, int HS>
__device__ __forceinline__ void turn_rows_back(Tile<ROWS, HS> tile, const Rotation& rope, int first, int T) {
  if (rope.R == HS) turn_fours_back<HS / 8>(tile, rope, first, T);
  else if (rope.R == HS / 2) turn_fours_back<HS / 16>(tile, rope, first, T);
  else if (rope.R == HS / 4) turn_fours_back<HS / 32>(tile, rope, first, T);
  else turn_pairs_back(tile, rope, first, T);
}

// All channels paired by halves are turned back in registers, for a thread has both of each pair, and by angles that come
// to shared memory while the last products are on their way.
template <int HS>
__device__ __forceinline__ bool turns_registers(const Rotation& rope) {
  return rope.R == HS && !rope.interleaved;
}
template <int HS>
using Angles = Tile<kRows, 2 * HS>;  // those of the block's rows, (kRows, HS/2, 2) fp32, as twice as many bf16
template <int HS>
__device__ __forceinline__ void load_angles(uint32_t to, const Rotation& rope, int first, int T) {
  load_tile<kGroup>(Angles<HS>{to}, reinterpret_cast<const bf16*>(rope.cos_sin), 2 * HS, first, T);
  commit_loads();
}
__device__ __forceinline__ void wait_angles() {  // if any were asked for; and until all of the block's threads are here
  wait_own_loads();
  __syncthreads();
}

// Writes accumulators (64, HS), times factor0 (rows g) or factor1 (rows g + 8), to rows first.. of a matrix (T, HS)
// with the given stride, by way of the warp's own 16 rows of a tile, so that global memory sees 16-byte accesses. On
// that way a rotation is undone; ANGLES: if turns_registers(), by those at `angles`.
template <bool ANGLES = false, int ROWS, int HS>
__device__ __forceinline__ void store_rows(bf16* to, size_t stride, int first, int T, const float (&acc)[HS / 8][4],
                                           float factor0, float factor1, Tile<ROWS, HS> tile,
                                           const Rotation& rope = {}, uint32_t angles = 0) {
  int row = group() * kRows + own_row();
  auto put = [&](int n, int h, float x, float y) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile.address(row + 8 * h, n) + lane() % 4 * 4), "r"(pack_pair(x, y))
                 : "memory");
  };
  const bool turned = ANGLES && turns_registers<HS>(rope);
  if (turned) {
    const uint32_t first_angle = Angles<HS>{angles}.address(row, lane() % 4);
#pragma unroll
    for (int n = 0; n < HS / 16; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float factor = h ? factor1 : factor0;
        const float (&u)[4] = acc[n], (&v)[4] = acc[n + HS / 16];
        float x0 = rounded(u[2 * h] * factor), x1 = rounded(u[2 * h + 1] * factor);
        float y0 = rounded(v[2 * h] * factor), y1 = rounded(v[2 * h + 1] * factor);
        const float4 angle = read_angles(first_angle, n, h);
        turn(x0, y0, angle.x, -angle.y);
        turn(x1, y1, angle.z, -angle.w);
        put(n, h, x0, x1), put(n + HS / 16, h, y0, y1);
      }
  } else {
#pragma unroll
    for (int n = 0; n < HS / 8; ++n)
      put(n, 0, acc[n][0] * factor0, acc[n][1] * factor0), put(n, 1, acc[n][2] * factor1, acc[n][3] * factor1);
  }
  __syncwarp();
  if (rope.R > 0 && !turned) {
    turn_rows_back(tile, rope, first, T);
    __syncwarp();
  }
  constexpr int kChunks = HS / 8;
  int warp_row = threadIdx.x / 32 * 16;
#pragma unroll
  for (int i = lane(); i < 16 * kChunks; i += 32) {
    int r = warp_row + i / kChunks, chunk = i % kChunks;
    const uint4 v = read_chunk(tile.address(r, chunk));
    if (first + r < T) *reinterpret_cast<uint4*>(to + (first + r) * stride + chunk * 8) = v;
  }
}

// The same without a tile: the four threads that share a row exchange their pairs, until each has 8 columns of it.
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

// Where a block works. Blocks count fastest over the tiles of one head, whose keys and values then stay in the cache.
struct Place {
  int b, head, tile;
};
__device__ __forceinline__ Place place(int tiles, int heads) {
  int bh = blockIdx.x / tiles;
  return {bh / heads, bh % heads, int(blockIdx.x % tiles)};
}

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
  __device__ __forceinline__ void times(float (&acc)[N / 8][4], Tile<N, HS> tile) const {
    multiply_transposed<N, HS>(acc, a, tile);
  }
};
template <int ROWS, int HS>
struct Operand<false, ROWS, HS> {
  Shared<ROWS, HS> a;
  __device__ __forceinline__ Operand(Tile<ROWS, HS> tile) : a{tile, 0} {}
  template <int N>
  __device__ __forceinline__ void times(float (&acc)[N / 8][4], Tile<N, HS> tile) const {
    multiply_transposed<N, ROWS, HS>(acc, a, tile);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward: a block per tile of queries, over the tiles of keys up to the diagonal.

template <int HS, class C>
constexpr size_t forward_bytes() {
  return Tile<kRows, HS>::kBytes + 4 * Tile<C::kN, HS>::kBytes;
}

template <int HS, class C, bool CAPPED = false>
__global__ __launch_bounds__(kGroup, C::kBlocks) void forward_kernel(bf16* out, float* lse,
                                                                     const __grid_constant__ Rows qkv, int T, int NH,
                                                                     int NKV, float scale, float cap) {
  constexpr int M = kRows, N = C::kN;  // queries of the block, keys of a tile
  const Place at = place((T + M - 1) / M, NH);
  const int q0 =
      ((T + M - 1) / M - 1 - at.tile) * M;  // the longest rows first: the short ones fill the gaps at the end
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
    load(j + 1);
    // Two products are under way from here: that of the scores is waited for first.
    Q.template times<N>(S, k_tile(j + 1));
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
    if (lane() % 4 == 0 && row + 8 * h < T) lse_row[row + 8 * h] = m[h] * scale + log2f(l[h]) * kLn2;
  }
  __syncthreads();  // the queries' tile is used again
  store_rows(out + (size_t(at.b) * T * NH + at.head) * HS, size_t(NH) * HS, q0, T, O, 1 / l[0], 1 / l[1], q_tile);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward, queries: a block per tile of queries, over the tiles of keys. Also leaves D for the keys' kernel.

template <int HS, class C>
constexpr size_t query_bytes() {
  return 2 * Tile<kRows, HS>::kBytes +
         std::max(size_t(2 * C::kStages) * Tile<C::kN, HS>::kBytes, size_t(Tile<kRows, HS>::kBytes));
}

template <int HS, class C, bool CAPPED = false>
__global__ __launch_bounds__(kGroup, C::kBlocks) void query_kernel(bf16* dqkv, float* D_out,
                                                                   const __grid_constant__ Rows dout,
                                                                   const __grid_constant__ Rows qkv,
                                                                   const __grid_constant__ Rows out, const float* lse,
                                                                   Rotation rope, int T, int NH, int NKV, float scale,
                                                                   float cap) {
  constexpr int M = kRows, N = C::kN;
  const Place at = place((T + M - 1) / M, NH);
  const int q0 = ((T + M - 1) / M - 1 - at.tile) * M;
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
  copies.load(q_tile, qkv, at.b, q0, q);
  copies.load(do_tile, dout, at.b, q0, q);
  copies.load(out_tile, out, at.b, q0, q);  // where the keys will be
  copies.commit();
  copies.wait();

  const int row = q0 + own_row();
  const float scale2 = scale * kLog2e;
  // D = rowsum(dO out), from the tiles as A operands: any layout does, if it is the same for both.
  float D[2] = {0, 0}, lse2[2];
#pragma unroll
  for (int n = 0; n < HS / 16; ++n) {
    uint32_t x[4], y[4];
    load_operand(x, do_tile, 0, n);
    load_operand(y, out_tile, 0, n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 a = __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(x[i])),
             b = __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(y[i]));
      D[i % 2] += a.x * b.x + a.y * b.y;
    }
  }
  const size_t statistics = (size_t(at.b) * NH + at.head) * T;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    bool inside = row + 8 * h < T;
    D[h] = row_sum(D[h]);
    lse2[h] = inside ? lse[statistics + row + 8 * h] * kLog2e : 0;
    if (inside && lane() % 4 == 0) D_out[statistics + row + 8 * h] = D[h];
  }
  const Operand<C::kRegisters, M, HS> Q(q_tile), dO(do_tile);
  float dQ[HS / 8][4] = {};
  __syncthreads();  // out_tile is done with: the keys' tiles lie in the same place

  const int tiles = (min(q0 + M, T) + N - 1) / N;
  if (C::kStages == 2) load(tiles - 1, 0);
  for (int j = tiles - 1, stage = 0; j >= 0; --j) {
    if (C::kStages == 1) {
      if (j < tiles - 1) __syncthreads();
      load(j, 0);
    }
    copies.wait();
    if (C::kStages == 2) {
      if (j > 0) load(j - 1, stage ^ 1);
      else if (turns_registers<HS>(rope)) load_angles<HS>(k_tile(stage ^ 1).at, rope, q0, T);
    }
    float S[N / 8][4], dP[N / 8][4];
    Q.template times<N>(S, k_tile(stage));
    dO.template times<N>(dP, v_tile(stage));
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
  wait_angles();
  const size_t stride = size_t(NH + 2 * NKV) * HS;
  store_rows<C::kStages == 2>(dqkv + size_t(at.b) * T * stride + q, stride, q0, T, dQ, scale, scale, q_tile, rope,
                              k_tile(tiles % 2).at);
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
__global__ __launch_bounds__(kGroup, C::kBlocks) void key_kernel(bf16* dqkv, const __grid_constant__ Rows dout,
                                                                 const __grid_constant__ Rows qkv, const float* lse,
                                                                 const float* D, Rotation rope, int T, int NH, int NKV,
                                                                 float scale, float cap) {
  constexpr int M = kRows, N = C::kN;
  static_assert(kGroup >= 2 * N);
  const Place at = place((T + M - 1) / M, NKV);
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
  // The next tile to be loaded. Of its lse, and then of its D, a thread loads one number each.
  int next_head = at.head * heads, next_tile = first;
  const float* number = (threadIdx.x < N ? lse : D) + (size_t(at.b) * NH + next_head) * T + first * N + threadIdx.x % N;
  auto load = [&](int stage) {
    const int q0 = next_tile * N;
    copies.load(q_tile(stage), qkv, at.b, q0, next_head * HS);
    copies.load(do_tile(stage), dout, at.b, q0, next_head * HS);
    if (threadIdx.x < (DK ? 2 : 1) * N)
      load_number(statistics + (stage * 2 * N + threadIdx.x) * 4, number, q0 + int(threadIdx.x) % N < T);
    copies.commit();
    number += N;
    if (++next_tile == first + per_head) next_tile = first, ++next_head, number += T - per_head * N;
  };
  copies.load(k_shared, qkv, at.b, k0, k);
  if (DK) copies.load(v_shared, qkv, at.b, k0, v);
  load(0);
  wait_own_loads();
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
      wait_own_loads();
      copies.wait();
    }
    if (C::kStages == 2) {
      if (step + 1 < steps) load(stage ^ 1);
      else if (DK && turns_registers<HS>(rope)) load_angles<HS>(q_tile(stage ^ 1).at, rope, k0, T);
    }
    const int q0 = tile * N;
    if (++tile == first + per_head) tile = first;
    float S[N / 8][4], dP[N / 8][4];
    K.template times<N>(S, q_tile(stage));
    if (DK) V.template times<N>(dP, do_tile(stage));
    wait_products<DK ? 1 : 0>(S);
    cap_scores<CAPPED>(S, cap);
    const float* lse_tile =
        reinterpret_cast<const float*>(shared_memory + (statistics - shared_start())) + stage * 2 * N;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      // Rows are keys here, so each column, a query, has its own lse.
      float2 x = *reinterpret_cast<const float2*>(lse_tile + n * 8 + lane() % 4 * 2);
      float lse2[2] = {x.x * kLog2e, x.y * kLog2e};
#pragma unroll
      for (int i = 0; i < 4; ++i) S[n][i] = exp2_(S[n][i] * scale2 - lse2[i % 2]);
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
      wait_products<DV ? 1 : 0>(dP);
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        float2 x = *reinterpret_cast<const float2*>(lse_tile + N + n * 8 + lane() % 4 * 2);
        float d[2] = {x.x, x.y};
        float2 y = *reinterpret_cast<const float2*>(lse_tile + n * 8 + lane() % 4 * 2);
        float lse2[2] = {y.x * kLog2e, y.y * kLog2e};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float slope = CAPPED ? soft_cap_slope(S[n][i], lse2[i % 2], 1 / (cap * scale2)) : 1;
          S[n][i] *= (dP[n][i] - d[i % 2]) * slope;
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
  wait_angles();
  const size_t stride = size_t(NH + 2 * NKV) * HS;
  bf16* to = dqkv + size_t(at.b) * T * stride;
  if (DK)
    store_rows<C::kStages == 2>(to + k, stride, k0, T, dK, scale, scale, k_shared, rope, q_tile(steps % 2).at);
  if (DV) store_rows(to + v, stride, k0, T, dV, 1.0f, 1.0f, v_shared);
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
  const Place at = place((T + M - 1) / M, NH);
  const int q0 = ((T + M - 1) / M - 1 - at.tile) * M;
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
