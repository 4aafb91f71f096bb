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

#include <algorithm>
#include <optional>
#include <vector>

#include "device/backend.h"

enum class RopePairs { half, interleaved };

// The R that `make ROTARY_DIM=6` builds into a program, so that its compiler unrolls the loops; usually none.
#ifdef ROTARY_DIM
static_assert(ROTARY_DIM >= 0 && ROTARY_DIM % 2 == 0, "make ROTARY_DIM=: must be even and not negative");
constexpr std::optional<int> kRotaryDim = ROTARY_DIM;
#else
constexpr std::optional<int> kRotaryDim;
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
  if (kRotaryDim && R != *kRotaryDim) {
    const std::string built = std::to_string(*kRotaryDim);
    throw UserError("--rotary-dim " + std::to_string(R) + ": this program was built for " + built +
                    " rotated channels (make ROTARY_DIM=" + built + "); pass --rotary-dim " + built +
                    " or rebuild without it");
  }
}

// What the user asks for: a share of each head's channels, or their number; usually neither.
struct RotaryRequest {
  std::optional<double> fraction;
  std::optional<int> dim;
};
constexpr double kRotaryFraction = 0.1;  // where nothing is asked for

// R of heads with HS channels. UserError for an R that such heads cannot have, and where two flags disagree.
inline int rotary_dim(const RotaryRequest& ask, int HS) {
  const int R = ask.dim        ? *ask.dim
                : ask.fraction ? rotary_dim_from_fraction(*ask.fraction, HS)
                : kRotaryDim   ? *kRotaryDim
                               : rotary_dim_from_fraction(kRotaryFraction, HS);
  check_rotary_dim(R, HS);
  if (ask.fraction && rotary_dim_from_fraction(*ask.fraction, HS) != R)
    throw UserError("--rotary-dim " + std::to_string(R) + " and --rotary-fraction " + std::to_string(*ask.fraction) +
                    " disagree: the fraction means " + std::to_string(rotary_dim_from_fraction(*ask.fraction, HS)) +
                    " of " + std::to_string(HS) + " channels; give one of them");
  return R;
}

// R of each layer. `rule`: "all" have R; "nope:N": every N-th layer has none, the others R; or a list, a number of
// channels for each layer. UserError if that is none of them, or heads of HS channels cannot have it.
inline std::vector<int> rotary_dims_of_layers(const std::string& rule, int R, int layers, int HS) {
  std::vector<int> dims(layers, R);
  auto fail = [&] {
    throw UserError("--rotary-layers " + rule + ": must be all, nope:N (2 or more) for none in every N-th layer, or " +
                    std::to_string(layers) + " numbers of channels, one for each layer");
  };
  if (rule == "all") return dims;
  const bool every = rule.rfind("nope:", 0) == 0;
  const std::vector<double> numbers = parse_list("--rotary-layers", every ? rule.substr(5) : rule);
  for (double n : numbers)
    if (n != std::floor(n) || std::fabs(n) > 1 << 20) fail();
  if (every ? numbers.size() != 1 || numbers[0] < 2 : int(numbers.size()) != layers) fail();
  for (int l = 0; l < layers; ++l) dims[l] = !every ? int(numbers[l]) : (l + 1) % int(numbers[0]) ? R : 0;
  for (int dim : dims) check_rotary_dim(dim, HS);
  return dims;
}

// theta_i in radians per position.
inline double rope_frequency(int i, int R, double base) { return std::pow(base, -2.0 * i / R); }

// theta of every pair, and what cos and sin are multiplied by (only some published models do).
struct RopeAngles {
  std::vector<double> theta;  // (R/2), radians per position
  double attention = 1;
  std::vector<double> longer;  // theta where there are more than `limit` positions
  double limit = INFINITY;
  const std::vector<double>& of(int positions) const { return positions > limit ? longer : theta; }
};

// `rule`: "rotary": base^(-2i/R); "head": base^(-2i/HS), the highest frequencies of a head that is rotated in full; or
// a list of R/2 wavelengths, in positions.
inline RopeAngles rope_angles(int R, int HS, double base, const std::string& rule = "rotary") {
  RopeAngles angles;
  angles.theta.resize(R / 2);
  if (rule == "rotary" || rule == "head") {
    for (int i = 0; i < R / 2; ++i) angles.theta[i] = rope_frequency(i, rule == "head" ? HS : R, base);
    return angles;
  }
  const std::vector<double> wavelengths = parse_list("--rope-frequencies", rule);
  if (R > 0 && int(wavelengths.size()) != R / 2)
    throw UserError("--rope-frequencies " + rule + ": must be rotary, head or " + std::to_string(R / 2) +
                    " wavelengths, one for each of the " + std::to_string(R / 2) + " pairs");
  for (int i = 0; i < R / 2; ++i) {
    if (!(wavelengths[i] > 0)) throw UserError("--rope-frequencies " + rule + ": wavelengths must be above 0");
    angles.theta[i] = 2 * M_PI / wavelengths[i];
  }
  return angles;
}

// A rule of rope_scale() in its parts, TYPE:x[;y]; without a semicolon y is empty. UserError for what is no number.
struct RopeScaling {
  std::string type;
  std::vector<double> x, y;
};
inline RopeScaling rope_scaling_parts(const std::string& rule) {
  const size_t colon = std::min(rule.find(':'), rule.size()), semicolon = std::min(rule.find(';'), rule.size());
  RopeScaling parts{rule.substr(0, colon), {}, {}};
  if (colon < semicolon) parts.x = parse_list("--rope-scaling", rule.substr(colon + 1, semicolon - colon - 1));
  if (semicolon < rule.size()) parts.y = parse_list("--rope-scaling", rule.substr(semicolon + 1));
  return parts;
}

// What published models do to their frequencies to reach further than they were trained, as
//   none
//   linear:FACTOR                                 theta / FACTOR: positions as if between those of training
//                                                 (arXiv 2306.15595)
//   llama3:FACTOR,LOW,HIGH,POSITIONS              as linear if a wave fits less than LOW times into POSITIONS, those of
//                                                 the first training, unchanged if more than HIGH times, a mean between
//   yarn:FACTOR,POSITIONS[,ATTENTION[,FAST,SLOW]] the same between SLOW and FAST, 1 and 32, with the mean by number of
//                                                 pair; ATTENTION is 0.1 ln FACTOR + 1 (arXiv 2309.00071)
//   longrope:ATTENTION,F0,F1,...                  theta_i / F_i (arXiv 2402.13753); behind that, ;POSITIONS,G0,G1,...:
//                                                 theta_i / G_i for all tokens of texts of more than so many
// Equal to ROPE_INIT_FUNCTIONS of Hugging Face's Transformers.
inline void rope_scale(RopeAngles& angles, const std::string& scaling, double base, int denominator) {
  if (scaling == "none") return;
  const RopeScaling parts = rope_scaling_parts(scaling);
  const std::string& type = parts.type;
  const std::vector<double>&x = parts.x, &y = parts.y;
  bool positive = y.empty() || (type == "longrope" && y.size() == x.size());
  for (const auto* list : {&x, &y})
    for (double v : *list) positive = positive && v > 0;
  const size_t n = positive ? x.size() : 0, pairs = angles.theta.size();
  // The share 1 - keep of an angle is divided by the factor.
  auto mix = [&](double& theta, double keep) {
    keep = std::min(std::max(keep, 0.0), 1.0);
    theta = (1 - keep) * theta / x[0] + keep * theta;
  };
  if (type == "linear" && n == 1) {
    for (double& theta : angles.theta) theta /= x[0];
  } else if (type == "llama3" && n == 4 && x[1] < x[2]) {
    for (double& theta : angles.theta) mix(theta, (x[3] * theta / (2 * M_PI) - x[1]) / (x[2] - x[1]));
  } else if (type == "yarn" && (n == 2 || n == 3 || (n == 5 && x[3] > x[4]))) {
    // The pair whose wave fits `turns` times into the positions of training.
    auto pair = [&](double turns) { return denominator * std::log(x[1] / (turns * 2 * M_PI)) / (2 * std::log(base)); };
    const double fast = std::max(std::floor(pair(n == 5 ? x[3] : 32)), 0.0),
                 slow = std::min(std::ceil(pair(n == 5 ? x[4] : 1)), denominator - 1.0);
    for (size_t i = 0; i < pairs; ++i) mix(angles.theta[i], 1 - (i - fast) / (slow == fast ? 0.001 : slow - fast));
    angles.attention = n > 2 ? x[2] : 0.1 * std::log(x[0]) + 1;
  } else if (type == "longrope" && n > 1 && (n == 1 + pairs || pairs == 0)) {
    if (!y.empty()) angles.limit = y[0], angles.longer = angles.theta;
    for (size_t i = 0; i < angles.longer.size(); ++i) angles.longer[i] /= y[1 + i];
    for (size_t i = 0; i < pairs; ++i) angles.theta[i] /= x[1 + i];
    angles.attention = x[0];
  } else {
    throw UserError("--rope-scaling " + scaling + ": must be none, linear:FACTOR, llama3:FACTOR,LOW,HIGH,POSITIONS, " +
                    "yarn:FACTOR,POSITIONS[,ATTENTION[,FAST,SLOW]] or longrope:ATTENTION,F0,F1,...[;POSITIONS,G0,G1,...] with " +
                    std::to_string(pairs) + " factors; numbers above 0");
  }
}

// cos and sin of every angle. All that partial RoPE saves in memory is here: the table shrinks with R.
struct RopeTable {
  const float* cos_sin = nullptr;  // (positions, R/2, 2): cos, sin
  int positions = 0;
#ifdef ROTARY_DIM
  static constexpr int R = ROTARY_DIM;
#else
  int R = 0;
#endif
  RopePairs pairs = RopePairs::half;

  RopeTable() = default;
  RopeTable(const float* values, int length, [[maybe_unused]] int rotary_dim, RopePairs kind)
      : cos_sin(values), positions(length), pairs(kind) {
#ifndef ROTARY_DIM
    R = rotary_dim;
#endif
  }
};

// Bytes of the table: positions x R/2 pairs x 2 values x 4 bytes.
inline size_t rope_table_bytes(size_t positions, int R) { return positions * (R / 2) * 2 * sizeof(float); }

// Fills the host array cos_sin (positions, R/2, 2). Angles are computed in double: at position 100,000 an fp32 angle
// would be off by up to 0.004 radians.
inline void rope_fill_table(float* cos_sin, int positions, const RopeAngles& angles) {
  for (int t = 0; t < positions; ++t)
    for (double theta : angles.of(positions)) {
      *cos_sin++ = float(angles.attention * std::cos(t * theta));
      *cos_sin++ = float(angles.attention * std::sin(t * theta));
    }
}
inline void rope_fill_table(float* cos_sin, int positions, int R, double base) {
  rope_fill_table(cos_sin, positions, rope_angles(R, R, base));
}

// The two channels of pair i.
HOST_DEVICE inline int rope_first(RopePairs pairs, int i) { return pairs == RopePairs::half ? i : 2 * i; }
HOST_DEVICE inline int rope_second(RopePairs pairs, int i, int R) { return pairs == RopePairs::half ? i + R / 2 : 2 * i + 1; }

// Where rotation applies in the buffer qkv (B, T, NH + 2*NKV, HS): the first R channels of the first NH + NKV
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
  const int R = table.R, rows = s.T - s.first;
  if (R == 0) return;
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

// A linear map hands gradients back through its transpose, and a rotation's transpose is its inverse: gradients turn
// back by the same angle, in place.
// dqkv (B, T, NH + 2*NKV, HS).
template <class Real>
void rope_backward(Cpu&, Real* dqkv, const RopeTable& table, RopeShape s) {
  rope_rotate(dqkv, table, s, Real(-1));
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA

#ifdef __CUDACC__

// The times are of one H200 for 65,536 tokens x 768 channels of bf16, R of a head of HS channels (docs/kernels.md has all).
//
// Rung 1: a thread turns one pair. A block works on one position, whose heads' pairs are numbered through.
// 6 of 64: 0.070 ms; 12 of 128: 0.046; 26 of 256: 0.046; 64 of 64: 0.249
template <class Real>
__global__ void rope_pair_kernel(Real* qkv, RopeTable table, RopeShape s, float direction) {
  const int pairs = table.R / 2, heads = s.NH + s.NKV, rows = s.T - s.first;
  const int id = blockIdx.y * blockDim.x + threadIdx.x, h = id / pairs, i = id % pairs;
  if (h >= heads) return;
  const size_t sequence = blockIdx.x / rows, t = s.first + blockIdx.x % rows;
  Real* head = qkv + ((sequence * s.T + t) * (heads + s.NKV) + h) * s.HS;
  const float* cos_sin = table.cos_sin + t * table.R + 2 * i;
  const float c = cos_sin[0], sine = direction * cos_sin[1];
  Real& first = head[rope_first(table.pairs, i)];
  Real& second = head[rope_second(table.pairs, i, table.R)];
  const float a = float(first), b = float(second);
  first = Real(turned_first(a, b, c, sine));
  second = Real(turned_second(a, b, c, sine));
}

template <class Real>
void rope_pairs(Cuda& be, Real* qkv, const RopeTable& table, RopeShape s, float direction) {
  const int threads = 128;
  const dim3 blocks(s.B * (s.T - s.first), divide_up((s.NH + s.NKV) * (table.R / 2), threads));
  launch(be, "rope", rope_pair_kernel<Real>, blocks, threads, 0, qkv, table, s, direction);
}

// Rung 2, for R up to 16: memory moves in sectors of 32 bytes, which are 16 channels of bf16, and to write a part of a
// sector costs more than all of it (the rest must be fetched to be kept). So even for 6 channels the first 16 of a head
// are read and written in full, those from R on as they were; no other sector is touched. Each lane has 16 bytes of a
// head: two lanes for bf16, four for fp32 (and two sectors). R is a constant, so each channel's lane and register are.
// 6 of 64: 0.073 ms; 12 of 128: 0.052; 16 of 64: 0.072, where rung 1 takes 0.089
constexpr int kSectorChannels = 16;

template <int R, RopePairs PAIRS, class Real>
__global__ void __launch_bounds__(256) rope_sector_kernel(Real* qkv, RopeTable table, RopeShape s, float direction) {
  constexpr unsigned W = kWide<Real>, LANES = kSectorChannels / W;
  const unsigned heads = s.NH + s.NKV, rows = s.T - s.first, lane = threadIdx.x % LANES;
  const unsigned id = blockIdx.x * (256 / LANES) + threadIdx.x / LANES, n = id / heads, h = id % heads;
  const unsigned t = s.first + n % rows;
  const bool inside = n < s.B * rows;  // lanes outside go along: a shuffle waits for the whole warp
  Real* channels = qkv + ((size_t(n / rows) * s.T + t) * (heads + s.NKV) + h) * s.HS + lane * W;
  float x[W] = {};
  if (inside) load<W>(x, channels);
#pragma unroll
  for (int i = 0; i < R / 2; ++i) {
    const unsigned first = rope_first(PAIRS, i), second = rope_second(PAIRS, i, R);
    float angle[2], &a = x[first % W], &b = x[second % W];
    load<2>(angle, table.cos_sin + size_t(t) * R + 2 * i);
    const float c = angle[0], sine = direction * angle[1];
    if (first / W == second / W) {  // one lane has both
      const float turned = turned_first(a, b, c, sine);
      if (lane == first / W) b = turned_second(a, b, c, sine), a = turned;
    } else {  // each of two lanes sends the one that it has, and gets the other
      const float other = __shfl_xor_sync(~0u, lane == first / W ? a : b, first / W ^ second / W);
      if (lane == first / W) a = turned_first(a, other, c, sine);
      if (lane == second / W) b = turned_second(other, b, c, sine);
    }
  }
  if (inside) store<W>(channels, x);
}

// Starts the kernel of the table's R, which is at most R.
template <int R = kSectorChannels, class Real>
void rope_sectors(Cuda& be, Real* qkv, const RopeTable& table, RopeShape s, float direction) {
  if constexpr (R > 2)
    if (table.R < R) return rope_sectors<R - 2>(be, qkv, table, s, direction);
  const size_t threads = size_t(s.B) * (s.T - s.first) * (s.NH + s.NKV) * (kSectorChannels / kWide<Real>);
  launch(be, "rope",
         table.pairs == RopePairs::half ? rope_sector_kernel<R, RopePairs::half, Real>
                                        : rope_sector_kernel<R, RopePairs::interleaved, Real>,
         divide_up(threads, 256), 256, 0, qkv, table, s, direction);
}

// Rung 3, for larger R: a thread turns W neighbouring pairs, a being their first and b their second channels: W = 8 for
// bf16 moves 16 bytes at a time. It does so for up to 4 heads, for which it reads the table once.
// 26 of 256 (W = 1): 0.036 ms; 64 of 64 (W = 8): 0.108; 256 of 256: 0.114, where rung 1 takes 0.251
constexpr int kRopeHeads = 4;

template <RopePairs PAIRS, int W, class Real>
__device__ __forceinline__ void load_pairs(float (&a)[W], float (&b)[W], const Real* head, int i, int R) {
  if constexpr (PAIRS == RopePairs::half) {
    load<W>(a, head + i);
    load<W>(b, head + i + R / 2);
  } else {
    float both[2 * W];
    load<2 * W>(both, head + 2 * i);
#pragma unroll
    for (int k = 0; k < W; ++k) a[k] = both[2 * k], b[k] = both[2 * k + 1];
  }
}
template <RopePairs PAIRS, int W, class Real>
__device__ __forceinline__ void store_pairs(Real* head, const float (&a)[W], const float (&b)[W], int i, int R) {
  if constexpr (PAIRS == RopePairs::half) {
    store<W>(head + i, a);
    store<W>(head + i + R / 2, b);
  } else {
    float both[2 * W];
#pragma unroll
    for (int k = 0; k < W; ++k) both[2 * k] = a[k], both[2 * k + 1] = b[k];
    store<2 * W>(head + 2 * i, both);
  }
}

template <int W, RopePairs PAIRS, class Real>
__global__ void rope_wide_kernel(Real* qkv, RopeTable table, RopeShape s, float direction) {
  const int R = table.R, heads = s.NH + s.NKV, rows = s.T - s.first, columns = (heads + kRopeHeads - 1) / kRopeHeads;
  const int vectors = R >= 2 * W ? R / 2 / W : 1;  // never 0 where it runs, but it is compiled for every W
  const unsigned id = blockIdx.x * blockDim.x + threadIdx.x;  // below 2^32: qkv would not fit a GPU otherwise
  const int i = int(id % vectors) * W, h = int(id / vectors % columns), n = int(id / vectors / columns);
  if (n >= s.B * rows) return;
  const int t = s.first + n % rows;
  Real* token = qkv + (size_t(n / rows) * s.T + t) * (heads + s.NKV) * s.HS;
  float cos_sin[2 * W], a[kRopeHeads][W], b[kRopeHeads][W];
  load<2 * W>(cos_sin, table.cos_sin + size_t(t) * R + 2 * i);
  // All heads are read before the first is turned: memory answers late, and so it does that once.
#pragma unroll
  for (int k = 0; k < kRopeHeads; ++k)
    if (h + k * columns < heads) load_pairs<PAIRS>(a[k], b[k], token + (h + k * columns) * s.HS, i, R);
#pragma unroll
  for (int k = 0; k < kRopeHeads; ++k) {
    if (h + k * columns >= heads) continue;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float c = cos_sin[2 * j], sine = direction * cos_sin[2 * j + 1];
      turn(a[k][j], b[k][j], c, sine);
    }
    store_pairs<PAIRS>(token + (h + k * columns) * s.HS, a[k], b[k], i, R);
  }
}

template <int W, class Real>
void rope_wide(Cuda& be, Real* qkv, const RopeTable& table, RopeShape s, float direction) {
  const size_t threads = size_t(s.B) * (s.T - s.first) * divide_up(s.NH + s.NKV, kRopeHeads) * (table.R / 2 / W);
  launch(be, "rope",
         table.pairs == RopePairs::half ? rope_wide_kernel<W, RopePairs::half, Real>
                                        : rope_wide_kernel<W, RopePairs::interleaved, Real>,
         divide_up(threads, 256), 256, 0, qkv, table, s, direction);
}

// Whether rung 2 and rung 3 can work on such heads.
template <class Real>
bool rope_sectors_fit(const Real* qkv, const RopeTable& table, RopeShape s) {
  return table.R <= kSectorChannels && s.HS >= kSectorChannels && wide(s.HS, qkv);
}
template <int W, class Real>
bool rope_wide_fits(const Real* qkv, const RopeTable& table, RopeShape s) {
  const int access = std::min(kWide<Real>, table.pairs == RopePairs::half ? W : 2 * W);  // elements
  return table.R / 2 % W == 0 && s.HS % access == 0 &&
         reinterpret_cast<uintptr_t>(qkv) % (access * sizeof(Real)) == 0;
}

// 10 % of 64, 128 and 256 channels is R = 6, 12 and 26: rung 2, rung 2, and rung 3 with W = 1, as 26 / 2 is odd. What
// 10 % saves depends on the head: in bf16 on an H100 it takes 0.28 of the time of all of 256 channels, 0.40 of that of
// 128, and 0.54 of that of 64, where to write 32 of every 128 bytes takes memory 0.6 of the time of writing everything.
template <class Real>
void rope_rotate(Cuda& be, Real* qkv, const RopeTable& table, RopeShape s, float direction) {
  if (table.R == 0) return;
  if (rope_sectors_fit(qkv, table, s)) return rope_sectors(be, qkv, table, s, direction);
  constexpr int W = kWide<Real>;
  if (rope_wide_fits<W>(qkv, table, s)) return rope_wide<W>(be, qkv, table, s, direction);
  if (rope_wide_fits<2>(qkv, table, s)) return rope_wide<2>(be, qkv, table, s, direction);
  if (rope_wide_fits<1>(qkv, table, s)) return rope_wide<1>(be, qkv, table, s, direction);
  rope_pairs(be, qkv, table, s, direction);
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
