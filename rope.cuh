#pragma once
// Rotary position embedding (RoPE; Su et al. 2021, arXiv 2104.09864) on the first R of each head's HS channels.
//
// A pair of channels (a, b) of a query or key at position t is turned by the angle t * theta_i:
//     a' = a cos - b sin        theta_i = base^(-2i/R),  i = 0 .. R/2-1
//     b' = a sin + b cos
// A query at t and a key at s meet in a dot product, in which only the difference t - s of the two turns is left.
// Channels R .. HS-1 are not touched: they compare content only. R = 0 is NoPE, R = HS is the full RoPE.
//
// Which channels pair up:  half:        (i, i + R/2)     GPT-NeoX, Hugging Face
//                          interleaved: (2i, 2i + 1)     GPT-J, the original Llama

#include "device/backend.h"

enum class RopePairs { half, interleaved };

// `make ROTARY_DIM=6` makes R a constant of the program, so that the compiler unrolls the loops over pairs.
#ifdef ROTARY_DIM
#define ROTARY_DIM_OR(run_time_value) ROTARY_DIM
#else
#define ROTARY_DIM_OR(run_time_value) (run_time_value)
#endif

// The number of rotated channels for a fraction of the head: the even number nearest to fraction * HS (an exact tie
// goes up), at least 2 when anything is to be rotated. 10 % of 64, 128, 256 gives 6, 12, 26 (arXiv 2603.11611,
// Table 1).
inline int rotary_dim_from_fraction(double fraction, int HS) {
  if (!(fraction >= 0 && fraction <= 1))
    throw UserError("--rotary-fraction " + std::to_string(fraction) + ": must lie between 0 and 1");
  if (fraction == 0) return 0;
  int R = 2 * int(std::floor(fraction * HS / 2 + 0.5));
  R = R < 2 ? 2 : R;
  return R > HS ? HS / 2 * 2 : R;
}

inline void check_rotary_dim(int R, int HS) {
  if (R < 0 || R % 2 || R > HS)
    throw UserError("--rotary-dim " + std::to_string(R) + ": must be even, from 0 to the head size " +
                    std::to_string(HS));
#ifdef ROTARY_DIM
  static_assert(ROTARY_DIM >= 0 && ROTARY_DIM % 2 == 0, "make ROTARY_DIM=: must be even and not negative");
  if (R != ROTARY_DIM)
    throw UserError("--rotary-dim " + std::to_string(R) + ": this program was built for " + std::to_string(ROTARY_DIM) +
                    " rotated channels (make ROTARY_DIM=" + std::to_string(ROTARY_DIM) + "); pass --rotary-dim " +
                    std::to_string(ROTARY_DIM) + " or rebuild without it");
#endif
}

// theta_i in radians per position.
inline double rope_frequency(int i, int R, double base) { return std::pow(base, -2.0 * i / R); }

// cos and sin of every angle. All that partial RoPE saves in memory is here: the table shrinks with R.
struct RopeTable {
  const float* cos_sin = nullptr;  // (positions, R/2, 2): cos, sin
  int positions = 0;
  int R = 0;
  RopePairs pairs = RopePairs::half;
};

// Bytes of the table: positions x R/2 pairs x 2 values x 4 bytes.
inline size_t rope_table_bytes(size_t positions, int R) { return positions * (R / 2) * 2 * sizeof(float); }

// Fills the host array cos_sin (positions, R/2, 2). Angles are computed in double: at position 100,000 an fp32 angle
// would be off by up to 0.004 radians.
inline void rope_fill_table(float* cos_sin, int positions, int R, double base) {
  for (int t = 0; t < positions; ++t)
    for (int i = 0; i < R / 2; ++i) {
      double angle = t * rope_frequency(i, R, base);
      cos_sin[(size_t(t) * (R / 2) + i) * 2 + 0] = float(std::cos(angle));
      cos_sin[(size_t(t) * (R / 2) + i) * 2 + 1] = float(std::sin(angle));
    }
}

// The two channels of pair i.
#ifdef __CUDACC__
__host__ __device__
#endif
inline int rope_first(RopePairs pairs, int i) { return pairs == RopePairs::half ? i : 2 * i; }
#ifdef __CUDACC__
__host__ __device__
#endif
inline int rope_second(RopePairs pairs, int i, int R) { return pairs == RopePairs::half ? i + R / 2 : 2 * i + 1; }

// Where rotation applies in the packed buffer qkv (B, T, NH + 2*NKV, HS): the first R channels of the first NH + NKV
// heads. Positions first .. T-1 of each sequence are worked on (first > 0 while sampling with a key/value cache).
struct RopeShape {
  int B, T, NH, NKV, HS;
  int first = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// CPU

// Turns the pairs of one head at one position; direction +1 is the forward, -1 the backward (the inverse) rotation.
template <class Real>
void rope_rotate_head(Real* head /* (HS) */, const float* cos_sin /* (R/2, 2) */, int R, RopePairs pairs,
                      Real direction) {
#pragma omp simd simdlen(8)  // else few pairs are not worked on together: 16 channels took as long as 64
  for (int i = 0; i < R / 2; ++i) {
    Real c = cos_sin[2 * i], s = direction * Real(cos_sin[2 * i + 1]);
    Real& a = head[rope_first(pairs, i)];
    Real& b = head[rope_second(pairs, i, R)];
    Real a_turned = a * c - b * s;
    b = a * s + b * c;
    a = a_turned;
  }
}

template <class Real>
void rope_rotate(Real* qkv, const RopeTable& table, RopeShape s, Real direction) {
  const int R = ROTARY_DIM_OR(table.R);
  if (R == 0) return;
  const int rows = s.T - s.first;
#pragma omp parallel for
  for (int n = 0; n < s.B * rows; ++n) {
    const int b = n / rows, t = s.first + n % rows;
    Real* heads = qkv + (size_t(b) * s.T + t) * (s.NH + 2 * s.NKV) * s.HS;
    const float* cos_sin = table.cos_sin + size_t(t) * R;  // R/2 pairs x 2
    for (int h = 0; h < s.NH + s.NKV; ++h) rope_rotate_head(heads + h * s.HS, cos_sin, R, table.pairs, direction);
  }
}

// Rotates queries and keys in place. qkv (B, T, NH + 2*NKV, HS); equal to Hugging Face's apply_rotary_pos_emb on the
// first R channels.
template <class Real>
void rope_forward(Cpu&, Real* qkv, const RopeTable& table, RopeShape s) {
  rope_rotate(qkv, table, s, Real(1));
}

// A rotation's derivative is the rotation itself, so gradients turn back by the same angle, in place.
// dqkv (B, T, NH + 2*NKV, HS).
template <class Real>
void rope_backward(Cpu&, Real* dqkv, const RopeTable& table, RopeShape s) {
  rope_rotate(dqkv, table, s, Real(-1));
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA

#ifdef __CUDACC__

// Turns W pairs held as the channels of their two packs: half: (x[k], x[W + k]), interleaved: (x[2k], x[2k + 1]).
template <int W, RopePairs PAIRS>
__device__ __forceinline__ void rope_turn(float (&x)[2][W], const float (&cos_sin)[2 * W], float direction) {
#pragma unroll
  for (int k = 0; k < W; ++k) {
    float& a = PAIRS == RopePairs::half ? x[0][k] : x[2 * k / W][2 * k % W];
    float& b = PAIRS == RopePairs::half ? x[1][k] : x[(2 * k + 1) / W][(2 * k + 1) % W];
    const float c = cos_sin[2 * k], s = direction * cos_sin[2 * k + 1];
    const float turned = a * c - b * s;
    b = a * s + b * c;
    a = turned;
  }
}

// The table's values for pairs i .. i+W-1 at position t.
template <int W>
__device__ __forceinline__ void rope_angles(float (&cos_sin)[2 * W], const float* table, int t, int i, int R) {
  load<2 * W>(cos_sin, table + size_t(t) * R + 2 * i);
}

constexpr int kRopeHeads = 4;  // heads per thread: its part of the table is read once for all of them

// A thread turns W pairs, the same ones, of up to 4 heads at one position; neighbours in a warp work on neighbouring
// pairs, then on the next head. Nothing but the first R channels of queries and keys is read or written.
template <class Real, int W, RopePairs PAIRS>
__global__ void rope_kernel(Real* qkv, const float* table, int run_time_R, RopeShape s, float direction) {
  const int R = ROTARY_DIM_OR(run_time_R), heads = s.NH + s.NKV;
  const int packs = R / 2 / W > 0 ? R / 2 / W : 1;  // never 0 where it runs, but it is compiled for every W
  const int columns = (heads + kRopeHeads - 1) / kRopeHeads, rows = s.T - s.first;
  const unsigned id = blockIdx.x * blockDim.x + threadIdx.x;  // below 2^32: qkv would not fit a GPU otherwise
  const int i = int(id % packs) * W, h0 = int(id / packs % columns), n = int(id / packs / columns);
  if (n >= s.B * rows) return;
  const int b = n / rows, t = s.first + n % rows;
  Real* token = qkv + (size_t(b) * s.T + t) * (heads + s.NKV) * s.HS;
  const int first = PAIRS == RopePairs::half ? i : 2 * i, second = PAIRS == RopePairs::half ? i + R / 2 : 2 * i + W;
  float cos_sin[2 * W], x[kRopeHeads][2][W];
  rope_angles<W>(cos_sin, table, t, i, R);
#pragma unroll
  for (int k = 0; k < kRopeHeads; ++k)
    if (h0 + k * columns < heads) {
      load<W>(x[k][0], token + (h0 + k * columns) * s.HS + first);
      load<W>(x[k][1], token + (h0 + k * columns) * s.HS + second);
    }
#pragma unroll
  for (int k = 0; k < kRopeHeads; ++k)
    if (h0 + k * columns < heads) {
      rope_turn<W, PAIRS>(x[k], cos_sin, direction);
      store<W>(token + (h0 + k * columns) * s.HS + first, x[k][0]);
      store<W>(token + (h0 + k * columns) * s.HS + second, x[k][1]);
    }
}

template <int W, class Real>
void rope_launch(Cuda& be, Real* qkv, const RopeTable& table, RopeShape s, float direction) {
  const int R = ROTARY_DIM_OR(table.R);
  const size_t threads = size_t(s.B) * (s.T - s.first) * divide_up(s.NH + s.NKV, kRopeHeads) * (R / 2 / W);
  launch(be, "rope",
         table.pairs == RopePairs::half ? rope_kernel<Real, W, RopePairs::half>
                                        : rope_kernel<Real, W, RopePairs::interleaved>,
         divide_up(threads, 256), 256, 0, qkv, table.cos_sin, R, s, direction);
}

// How neighbouring lanes of a warp share the first CHANNELS channels of a head at one position: kPacks packs of W for
// each. The two channels of a pair may lie in different lanes, and meet in shared memory.
template <int CHANNELS, int W>
struct HeadLanes {
  static constexpr int kLanes = CHANNELS / W < 32 ? CHANNELS / W : 32, kPacks = CHANNELS / W / kLanes;
  static constexpr int kHeads = 256 / kLanes;  // that a block of 256 threads works on at a time

  // The first channel of a lane's pack.
  __device__ static int channel(int pack) { return (pack * kLanes + int(threadIdx.x) % kLanes) * W; }
  __device__ static float sum(float x) {  // over the lanes of a head
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
  }

  // Turns those of the lane's channels x that are under R; y (CHANNELS) is the head's place in shared memory, cos_sin
  // (R/2, 2) the table's row. All lanes of the warp take part.
  __device__ static void turn(float (&x)[kPacks][W], float* y, const float* cos_sin, int R, RopePairs pairs,
                              float direction) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (channel(p) < R) store<W>(y + channel(p), x[p]);
    __syncwarp();
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const int c = channel(p) + k;
        if (c >= R) continue;
        const bool half = pairs == RopePairs::half, is_second = half ? c >= R / 2 : c % 2;
        const int i = half ? c - is_second * (R / 2) : c / 2;
        float angle[2];
        load<2>(angle, cos_sin + 2 * i);
        const float other = y[is_second ? rope_first(pairs, i) : rope_second(pairs, i, R)], sine = direction * angle[1];
        x[p][k] = x[p][k] * angle[0] + (is_second ? other * sine : -other * sine);
      }
    __syncwarp();
  }
};

constexpr int kRopeSmall = 16;  // channels

// The same for R up to 16. Memory moves in sectors of 32 bytes, and to write a part of one costs more than all of it:
// the lanes read and write the first 16 channels of a head in full, those from R on as they were.
template <class Real>
__global__ void __launch_bounds__(256) rope_head_kernel(Real* qkv, const float* table, int run_time_R, RopePairs pairs,
                                                        RopeShape s, float direction) {
  constexpr int W = kWide<Real>;
  using Lanes = HeadLanes<kRopeSmall, W>;
  __shared__ __align__(16) float shared[Lanes::kHeads][kRopeSmall];
  const int R = ROTARY_DIM_OR(run_time_R);
  const unsigned heads = s.NH + s.NKV, rows = s.T - s.first;
  const unsigned id = blockIdx.x * Lanes::kHeads + threadIdx.x / Lanes::kLanes, n = id / heads, h = id % heads;
  const unsigned t = s.first + n % rows;
  const bool inside = n < s.B * rows;
  Real* to = qkv + ((size_t(n / rows) * s.T + t) * (heads + s.NKV) + h) * s.HS + Lanes::channel(0);
  float x[1][W] = {};
  if (inside) load<W>(x[0], to);
  Lanes::turn(x, shared[threadIdx.x / Lanes::kLanes], table + size_t(t) * R, R, pairs, direction);
  if (inside) store<W>(to, x[0]);
}

// 10 % of 64, 128 and 256 channels is R = 6, 12 and 26; for R above 16, the widest access that divides the pairs and
// the heads. What 10 % saves depends on the head: in bf16 on an H100 it takes 0.28 of the time of all of 256 channels,
// 0.40 of that of 128, and 0.54 of that of 64, where to write 32 of every 128 bytes takes memory 0.6 of the time of
// writing everything.
template <class Real>
void rope_rotate(Cuda& be, Real* qkv, const RopeTable& table, RopeShape s, float direction) {
  const int R = ROTARY_DIM_OR(table.R);
  if (R == 0) return;
  if (R <= kRopeSmall && s.HS >= kRopeSmall && wide(s.HS, qkv)) {
    const size_t items = size_t(s.B) * (s.T - s.first) * (s.NH + s.NKV);
    return launch(be, "rope", rope_head_kernel<Real>, divide_up(items, HeadLanes<kRopeSmall, kWide<Real>>::kHeads), 256,
                  0, qkv, table.cos_sin, R, table.pairs, s, direction);
  }
  auto fits = [&](int W) {
    return R / 2 % W == 0 && s.HS % W == 0 && reinterpret_cast<uintptr_t>(qkv) % (W * sizeof(Real)) == 0;
  };
  if (fits(kWide<Real>)) return rope_launch<kWide<Real>>(be, qkv, table, s, direction);
  if (fits(2)) return rope_launch<2>(be, qkv, table, s, direction);
  rope_launch<1>(be, qkv, table, s, direction);
}

template <class Real>
void rope_forward(Cuda& be, Real* qkv, const RopeTable& table, RopeShape s) {
  rope_rotate(be, qkv, table, s, 1.0f);
}

template <class Real>
void rope_backward(Cuda& be, Real* dqkv, const RopeTable& table, RopeShape s) {
  rope_rotate(be, dqkv, table, s, -1.0f);
}

#endif  // __CUDACC__
