#pragma once
// A matrix product of our own for Hopper (sm_90a), in bf16 with fp32 sums, which can go on with what comes next:
//     out (M, N) = A (M, K) B (N, K)^T, then an epilogue: nothing, a residual added, SwiGLU, RoPE, exponentials,
//     out (M, N) = A (M, K) B (N, K)^T + A2 (M, K2) B2 (N, K2)^T, then the same: two layers that end in one sum,
//     out (M, N) = A (M, K) B (K, N), then SwiGLU's gradient.
// The first is a linear layer's forward product: A holds its inputs, B its weights, both with K running along memory. The
// last is the gradient of its inputs, where the same weights are read across (BY_COLUMN below). The product alone is a
// little slower than cuBLASLt's; an epilogue pays because what it needs is still on the chip, while an operation of its
// own would read it from device memory again.
//
// How it works (bench/matmul_ladder.cu leads up to it). A block makes tiles of 128 x 256 of `out`, one after the other:
//   - One thread, the producer, asks the copy engine (TMA) for slices of A (128, 64) and B (256, 64), as slots for them
//     become free. It also has finished tiles copied to device memory, in panels of (64, 64), each right behind the
//     request for a slice: sent as soon as they are there, they hold up the slices, for 4 % of the product's time on an
//     H200.
//   - Two warpgroups, the consumers, own 64 rows each: 128 fp32 sums a thread. wgmma reads both operands straight from
//     shared memory. What an epilogue adds to the sums, or turns them by, comes as slices, too, behind those of A and B.
//     They leave a finished tile in shared memory, rounded to bf16, and go on with the next.
//   - Three warps, the finishers, do there what the epilogue wants done, meanwhile.
//   - Barriers pass all of it on: `full` and `empty` for each slot, `ready`, `changed` and `free` for the finished tile.
//   - Two blocks, a cluster, work on tiles one above the other, which need the same slice of B: each fetches half of it
//     and the copy engine delivers it to both. Without that the L2 cache cannot keep up.
// Barriers are waited for in the scope of the block: in that of the cluster each wait would also empty the L1 cache and
// each arrival wait for all of memory, which took a third of the speed.
// Every sum has one owner and one order: the result is the same in every run.

#include "device/copy_engine.cuh"

#ifdef __CUDACC__

#if HOPPER
#define GEMM_CLUSTER __cluster_dims__(2, 1, 1)
#else  // the kernel is empty for other targets, and supports() says so
#define GEMM_CLUSTER
#endif

namespace gemm {

using namespace hopper;

constexpr int kM = 128, kN = 256, kK = 64;  // a block's tile, and the depth of a slice
constexpr int kSlots = 3;                 // for slices that are on their way or in use
constexpr int kCluster = 2;  // blocks
constexpr int kThreads = 3 * 128;  // at most 168 registers each, of which a consumer needs 128 for its sums
constexpr int kBytesA = kM * kK * 2, kBytesB = kN * kK * 2, kBytesSlice = kBytesA + kBytesB;
constexpr int kBytesTile = kM * kN * 2;     // a finished tile: of each consumer four panels of (64, 64)
constexpr int kBytesPanel = 64 * 64 * 2;  // a slice of a B by column is four of them, too
constexpr int kBytesShared = kSlots * kBytesSlice + kBytesTile + 128;  // 128: barriers, and column_of_slot
constexpr int kFinishers = 3 * 32;

// Where a tile of `out` begins, and which rows of B (columns, BY_COLUMN) make its two halves of 128 columns.
struct Place {
  int row, column, first_half, second_half;
};

#if HOPPER

// ---------------------------------------------------------------------------------------------------------------------
// wgmma

// Its description of rows of 64 bf16 at a multiple of 1024 bytes, 128-byte swizzle (PTX ISA, "Matrix descriptor"), in
// units of 16 bytes: address, distance of one group of 8 rows from the next, and, if the rows are k, that of one panel of
// 64 columns from the next. 16 further along k is 32 bytes further where k runs along the rows, else 16 rows.
__device__ __forceinline__ uint64_t descriptor(uint32_t at) {
  // In the second block of a cluster an address has a bit set above the 18 that belong here.
  return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(kBytesPanel >> 4) << 16 | (at & 0x3ffff) >> 4;
}
template <bool BY_COLUMN>
constexpr int kStepK = (BY_COLUMN ? 16 * 128 : 32) >> 4;

// clang-format off
#define GEMM_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define GEMM_D16(n) GEMM_D4(n), GEMM_D4(n + 1), GEMM_D4(n + 2), GEMM_D4(n + 3)
#define GEMM_D64(n) GEMM_D16(n), GEMM_D16(n + 4), GEMM_D16(n + 8), GEMM_D16(n + 12)
#define GEMM_R128                                                                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"    \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,"   \
  "%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,"   \
  "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,"    \
  "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}"
// clang-format on

// d (64, 256) = [d +] A (64, 16) B (256, 16)^T, or B (16, 256) with BY_COLUMN. Of each piece of 8 columns a thread holds, as
// everywhere in tensor cores, rows g and g + 8 (g = lane / 4, from its warp's 16 rows on), columns 2t and 2t + 1
// (t = lane % 4).
template <bool BY_COLUMN>
__device__ __forceinline__ void wgmma(float (&d)[32][4], uint64_t a, uint64_t b, int accumulate) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %130, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " GEMM_R128 ", %128, %129, p, 1, 1, 0, %131;}"
               : GEMM_D64(0), GEMM_D64(16)
               : "l"(a), "l"(b), "r"(accumulate), "n"(int(BY_COLUMN)));
}
template <int PENDING>
__device__ __forceinline__ void wait_products(float (&d)[32][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  if (PENDING == 0)
#pragma unroll
    for (int n = 0; n < 32; ++n)  // keeps the compiler from reading the registers before the wait
      asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// A finished tile (128, 256) in shared memory

// The address of 8 columns of a row: panels have rows of 128 bytes, whose 16-byte chunks are permuted by the row's
// number. So 8 rows never meet in the same banks, and the copy engine knows it as its 128-byte swizzle.
__device__ __forceinline__ uint32_t chunk_address(uint32_t tile, uint32_t row, uint32_t chunk) {
  const uint32_t panel = tile + row / 64 * (kBytesTile / 2) + (chunk >> 3) * kBytesPanel;
  return panel + row % 64 * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}
// A warp's 16 rows from `row` on; stmatrix takes pieces of 8 x 8 as the tensor cores leave them, four at a time.
__device__ __forceinline__ void write_tile(uint32_t tile, int row, const float (&d)[32][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < 32; n += 2)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     chunk_address(tile, row + lane % 16, n + lane / 16)),
                 "r"(pack_pair(d[n][0], d[n][1])), "r"(pack_pair(d[n][2], d[n][3])),
                 "r"(pack_pair(d[n + 1][0], d[n + 1][1])), "r"(pack_pair(d[n + 1][2], d[n + 1][3]))
                 : "memory");
}
// The same as a pointer, to any column.
__device__ __forceinline__ bf16* element(uint32_t tile, int row, int column) {
  extern __shared__ uint8_t memory[];
  const uint32_t offset = chunk_address(tile, row, column >> 3) - uint32_t(__cvta_generic_to_shared(memory));
  return reinterpret_cast<bf16*>(memory + offset) + (column & 7);
}
// 8 columns of a chunk as fp32.
__device__ __forceinline__ void unpack(float (&x)[8], uint4 packed) {
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
}
#endif  // HOPPER

// ---------------------------------------------------------------------------------------------------------------------
// Epilogues. Each says which rows of B make a tile, and to which columns of out its four panels go (N: nowhere).
// Behind the slices of the factors come kSlices more: the producer calls load_slice() for each, a consumer's warp use_slice()
// with the sums of its 16 rows, from `row` of the tile on; the tile begins at `column`. The finishers call prepare() while
// a tile is being made, and then finish(), or, if they change it, each warp finish_piece() for a piece of 64 rows and
// piece_columns() columns. Behind the tile there are kBytes of shared memory.

enum class Finish { nothing, reads, changes };  // what finishers do with a tile

// out as it is.
struct Store {
  static constexpr Finish kFinish = Finish::nothing;
  static constexpr int kBytes = 0, kSlices = 0;
  __device__ int piece_columns() const { return 64; }
  __device__ Place place(int row, int j, int /*N*/) const { return {row, j * kN, j * kN, j * kN + 128}; }
  __device__ int panel_column(Place at, int panel, int) const { return at.column + panel * 64; }
  __device__ void load_slice(uint32_t /*to*/, Place, int /*part*/, uint32_t /*barrier*/) const {}
  __device__ void use_slice(float (&)[32][4], uint32_t /*slice*/, int /*part*/, int /*column*/, int /*row*/) const {}
  __device__ void prepare(uint32_t, Place, int, int, int) const {}
  __device__ void finish(uint32_t, Place, int, int, int) const {}
};

// out with `residual` (M, N) added before it is rounded: two slices of its own, 128 columns of the tile each, in two
// panels of 64.
struct Residual : Store {
  static constexpr int kSlices = 2;
  CUtensorMap residual;
  Residual(const bf16* from, int M, int N) : residual(describe(from, M, N, kM)) {}
#if HOPPER
  __device__ void load_slice(uint32_t to, Place at, int part, uint32_t barrier) const {
    expect_bytes(barrier, 2 * kBytesA);
    for (int panel = 0; panel < 2; ++panel)
      load_box(to + panel * kBytesA, residual, at.column + part * 128 + panel * 64, at.row, barrier);
  }
  __device__ __forceinline__ void use_slice(float (&d)[32][4], uint32_t slice, int part, int, int row) const {
    row += threadIdx.x % 16;
#pragma unroll
    for (int n = 0; n < 16; n += 2) {  // as write_tile() writes
      const int chunk = n + threadIdx.x % 32 / 16;
      uint32_t pairs[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                   : "r"(slice + n / 8 * kBytesA + row * 128 + (((chunk & 7) ^ (row & 7)) << 4))
                   : "memory");
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* sums = &d[part * 16 + n + i / 2][i % 2 * 2];
        sums[0] += __uint_as_float(pairs[i] << 16);
        sums[1] += __uint_as_float(pairs[i] & 0xffff0000u);
      }
    }
  }
#endif
};

// out (M, 2F) holds gates in its first F columns and ups behind them; act (M, F) = silu(gate) * up, to the bit as from
// swiglu_forward(). A tile has 128 gates and the 128 ups that go with them. F is a multiple of 64.
struct SwiGlu : Store {
  static constexpr Finish kFinish = Finish::reads;
  bf16* act;
  explicit SwiGlu(bf16* to) : act(to) {}
  __device__ Place place(int row, int j, int N) const { return {row, j * 128, j * 128, N / 2 + j * 128}; }
  __device__ int panel_column(Place at, int panel, int N) const {
    if (at.column + panel % 2 * 64 >= N / 2) return N;  // the right half of the last tile
    return (panel < 2 ? at.first_half : at.second_half) + panel % 2 * 64;
  }
  __device__ void finish(uint32_t tile, Place at, int thread, int M, int N) const {
#if HOPPER
    const int F = N / 2, chunk = thread % 16, rows = min(kM, M - at.row);  // a thread has one chunk of every sixth row
    if (at.column + chunk * 8 >= F) return;
    bf16* to = act + size_t(at.row + thread / 16) * F + at.column + chunk * 8;
#pragma unroll 2
    for (int row = thread / 16; row < rows; row += kFinishers / 16, to += size_t(kFinishers / 16) * F) {
      const uint32_t from = chunk_address(tile, row, chunk);
      float gate[8], up[8];
      unpack(gate, read_chunk(from)), unpack(up, read_chunk(from + 2 * kBytesPanel));
#pragma unroll
      for (int k = 0; k < 8; ++k) up[k] *= gate[k] * sigmoid(gate[k]);
      store<8>(to, up);
    }
#endif
  }
};

// From d, the gradient of silu(gate) up, those of gate and up, in their place.
__device__ __forceinline__ void swiglu_gradient(float& gate, float& up, float d) {
  const float s = sigmoid(gate), silu = gate * s;
  gate = d * up * (s + silu * (1 - s));
  up = d * silu;
}

// The product is the gradient of SwiGLU's output, of which only those of gate and up are kept: dgate_up (M, 2F), to the
// bit as from swiglu_backward(). gate_up is as SwiGlu left it. F is N, a multiple of 8.
//
// Of each tile a warp has every third row, a lane 8 columns of it. Memory answers late: gates and ups are asked for kAhead
// rows before they are needed, the first while the tile is still being made, and come to a place in shared memory that
// each thread has for itself.
struct SwiGluBackward : Store {
  static constexpr Finish kFinish = Finish::reads;
  static constexpr int kAhead = 6, kStep = kFinishers / 32, kBytesRow = kFinishers * 16, kBytes = kAhead * 2 * kBytesRow;
  const bf16* gate_up;
  bf16* dgate_up;
  SwiGluBackward(const bf16* from, bf16* to) : gate_up(from), dgate_up(to) {}
  __device__ int panel_column(Place, int, int N) const { return N; }
#if HOPPER
  __device__ void prepare(uint32_t tile, Place at, int thread, int M, int N) const {
    for (int i = 0; i < kAhead; ++i) start_copy(tile, at, thread, thread / 32 + i * kStep, i, M, N);
  }
  __device__ void start_copy(uint32_t tile, Place at, int thread, int row, int place, int M, int N) const {
    const int r = at.row + row, c = at.column + thread % 32 * 8;
    const uint32_t to = tile + kBytesTile + place * 2 * kBytesRow + thread * 16;
    const bf16* from = gate_up + size_t(r) * 2 * N + c;
    if (row < kM && r < M && c < N)
      asm volatile("cp.async.cg.shared.global [%0], [%2], 16;\n"
                   "cp.async.cg.shared.global [%1], [%3], 16;" ::"r"(to), "r"(to + kBytesRow), "l"(from), "l"(from + N)
                   : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  __device__ void finish(uint32_t tile, Place at, int thread, int M, int N) const {
    const int column = thread % 32 * 8, rows = min(kM, M - at.row);
    if (at.column + column >= N) return;
    bf16* to = dgate_up + size_t(at.row + thread / 32) * 2 * N + at.column + column;
    uint4 gates, ups, ds, next_gates, next_ups, next_ds;
    auto read = [&](int row, int place) {
      if (row >= rows) return;
      asm volatile("cp.async.wait_group %0;" ::"n"(kAhead - 2) : "memory");
      const uint32_t from = tile + kBytesTile + place * 2 * kBytesRow + thread * 16;
      next_gates = read_chunk(from), next_ups = read_chunk(from + kBytesRow);
      next_ds = read_chunk(chunk_address(tile, row, thread % 32));
    };
    read(thread / 32, 0);
#pragma unroll 2
    for (int row = thread / 32, place = 0; row < rows; row += kStep, to += size_t(kStep) * 2 * N) {
      const int next_place = place + 1 < kAhead ? place + 1 : 0;
      gates = next_gates, ups = next_ups, ds = next_ds;
      read(row + kStep, next_place);
      float gate[8], up[8], d[8];
      unpack(gate, gates), unpack(up, ups), unpack(d, ds);
#pragma unroll
      for (int k = 0; k < 8; ++k) swiglu_gradient(gate[k], up[k], d[k]);
      start_copy(tile, at, thread, row + kAhead * kStep, place, M, N);
      store<8>(to, gate);
      store<8>(to + N, up);
      place = next_place;
    }
  }
#endif
};

// out holds `heads` heads of HS channels, and more behind them. The first R channels of each are turned by the angles of
// the row's position, to the bit as by rope_forward(). 256 is a multiple of HS; R is at most 16 or a multiple of 16.
template <bool INTERLEAVED>
struct Rope : Store {
  static constexpr Finish kFinish = Finish::changes;
  const float* cos_sin;  // (T, R/2, 2)
  int T, R, heads, HS;
  Rope(const float* table, int positions, int rotary_dim, int turned, int head_size)
      : cos_sin(table), T(positions), R(rotary_dim), heads(turned), HS(head_size) {}
#if HOPPER
  // A few angles come to the L1 cache while the tile is being made.
  __device__ void prepare(uint32_t, Place at, int thread, int, int) const {
    if (R > 32 || at.column >= heads * HS) return;
    for (int row = thread; row < kM; row += kFinishers)
      asm volatile("prefetch.global.L1 [%0];" ::"l"(cos_sin + size_t((at.row + row) % T) * R));
  }
  __device__ int piece_columns() const { return max(HS, 64); }  // whole heads, and whole panels
  __device__ void finish_piece(uint32_t tile, Place at, int row, int column) const {
    const int end = min(column + piece_columns(), heads * HS - at.column);
    row += threadIdx.x % 32;
    switch (R) {
      case 2: return turn_rows<2>(tile, at, row, column, end, 0, 0, 0);
      case 4: return turn_rows<4>(tile, at, row, column, end, 0, 0, 0);
      case 6: return turn_rows<6>(tile, at, row, column, end, 0, 0, 0);
      case 8: return turn_rows<8>(tile, at, row, column, end, 0, 0, 0);
      case 10: return turn_rows<10>(tile, at, row, column, end, 0, 8, 0);
      case 12: return turn_rows<12>(tile, at, row, column, end, 0, 8, 0);
      case 14: return turn_rows<14>(tile, at, row, column, end, 0, 8, 0);
    }
    for (int i = 0; i < R / 2; i += 8)
      turn_rows<16>(tile, at, row, column, end, INTERLEAVED ? 2 * i : i, INTERLEAVED ? 2 * i + 8 : i + R / 2, i);
  }
  // Turns CHANNELS of the heads in columns column .. end-1, from pair `pair` on: those of 8 channels from `first` on, then
  // of 8 from `second` on. A lane has two rows.
  template <int CHANNELS>
  __device__ __forceinline__ void turn_rows(uint32_t tile, Place at, int row, int column, int end, int first, int second,
                                            int pair) const {
    constexpr int kChunks = (CHANNELS + 7) / 8, kWide = CHANNELS % 4 == 0 ? 4 : 2;
    if (column >= end) return;
    float angle[2][CHANNELS / kWide][kWide];
#pragma unroll
    for (int g = 0; g < 2; ++g)
#pragma unroll
      for (int i = 0; i < CHANNELS / kWide; ++i)
        load<kWide>(angle[g][i], cos_sin + size_t((at.row + row + 32 * g) % T) * R + 2 * pair + i * kWide);
    for (int head = column; head < end; head += HS) {
      bf16* chunk[2][2];
      float x[2][2][8];
#pragma unroll
      for (int g = 0; g < 2; ++g)
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
          load<8>(x[g][c], chunk[g][c] = element(tile, row + 32 * g, head + (c ? second : first)));
#pragma unroll
      for (int g = 0; g < 2; ++g) {
#pragma unroll
        for (int i = 0; i < CHANNELS / 2; ++i) {
          const int a = INTERLEAVED ? 2 * i : i, b = INTERLEAVED ? 2 * i + 1 : i + CHANNELS / 2;
          const float* turns = &angle[g][2 * i / kWide][2 * i % kWide];
          turn(x[g][a / 8][a % 8], x[g][b / 8][b % 8], turns[0], turns[1]);
        }
#pragma unroll
        for (int c = 0; c < kChunks; ++c) store<8>(chunk[g][c], x[g][c]);
      }
    }
  }
#endif
};

// The same for all channels of heads of 64 or 128, paired by halves: then both channels of a pair are in one of the
// consumers' threads, which turns them. The angles come as slices: of 32 pairs each, two panels for each half of the
// tile's rows. T is a multiple of 64.
template <int HS>
struct FullRope : Store {
  static constexpr int kSlices = HS / 64;
  CUtensorMap cos_sin;  // (T, HS/2, 2) fp32, as rows of twice as many bf16
  int T, heads;
  FullRope(const float* table, int positions, int turned)
      : cos_sin(describe(reinterpret_cast<const bf16*>(table), positions, 2 * HS, 64)), T(positions), heads(turned) {}
#if HOPPER
  __device__ void load_slice(uint32_t to, Place at, int part, uint32_t barrier) const {
    if (at.column >= heads * HS) return arrive(barrier);  // nothing turns in this tile
    expect_bytes(barrier, 4 * kBytesPanel);
    for (int n = 0; n < 4; ++n)
      load_box(to + n * kBytesPanel, cos_sin, part * 128 + n % 2 * 64, (at.row + n / 2 * 64) % T, barrier);
  }
  __device__ __forceinline__ void use_slice(float (&d)[32][4], uint32_t slice, int part, int column, int row) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, turned = heads * HS - column;  // columns of the tile
    const uint32_t first = slice + row / 64 * (2 * kBytesPanel) + (row % 64 + g) * 128 + ((t ^ g) << 4);
    if (turned >= kN) turn_heads<true>(d, first, part, turned);  // as most often: no question for each head
    else if (turned > 0) turn_heads<false>(d, first, part, turned);
  }
  template <bool ALL>
  __device__ __forceinline__ void turn_heads(float (&d)[32][4], uint32_t first, int part, int turned) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float4 angle[2];  // of pairs 32 part + 8n + 2t and the next, in both of the thread's rows
#pragma unroll
      for (int h = 0; h < 2; ++h) angle[h] = read_angles(first, n, h);
#pragma unroll
      for (int head = 0; head < kN / HS; ++head) {
        if (!ALL && head * HS >= turned) continue;
        const int piece = head * HS / 8 + part * 4 + n;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float *a = &d[piece][2 * h], *b = &d[piece + HS / 16][2 * h];
          // Turned in place, they would make ptxas wait between products.
          float x0 = rounded(a[0]), x1 = rounded(a[1]), y0 = rounded(b[0]), y1 = rounded(b[1]);
          turn(x0, y0, angle[h].x, angle[h].y);
          turn(x1, y1, angle[h].z, angle[h].w);
          a[0] = x0, a[1] = x1, b[0] = y0, b[1] = y1;
        }
      }
    }
  }
#endif
};

// e^x of logits and their sums, for cross-entropy. x, a sum rounded to bf16, becomes 2^(x log2 e - offset), with an offset
// (M) of each row; at the row's target (M) it becomes 0, and goes to target_logit (M) itself. A target below 0 is none.
// sums (N/64 rounded up, M): of each 64 columns of a row, before they are rounded. No row's maximum is known yet: where the
// offset is too small they overflow, and the sum says so. N is a multiple of 8.
// Errors: as those of exp_of() in loss.cuh, and 2^-8 for what is stored.
struct Exponentials : Store {
  static constexpr Finish kFinish = Finish::changes;
  const float* offset;
  const int* target;
  float *target_logit, *sums;
  int M, N;
  Exponentials(float* sums_of_rows, float* logit_of_target, const float* offset_of_row, const int* target_of_row,
               int rows, int columns)
      : offset(offset_of_row), target(target_of_row), target_logit(logit_of_target), sums(sums_of_rows), M(rows),
        N(columns) {}
#if HOPPER
  __device__ void prepare(uint32_t, Place at, int thread, int, int) const {  // to the L1 cache
    const int n = at.row + thread % 4 * 32;
    if (thread < 8 && n < M)
      asm volatile("prefetch.global.L1 [%0];" ::"l"(thread < 4 ? static_cast<const void*>(offset + n) : target + n));
  }
  // A lane has two rows, of which it reads, and then writes, 32 columns at a time.
  __device__ void finish_piece(uint32_t tile, Place at, int row, int column) const {
    const int first = at.column + column, columns = min(64, N - first);
    if (columns <= 0) return;
    row += threadIdx.x % 32;
    float shift[2], sum[2] = {};
    int place[2];  // of the target in these columns
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const int n = at.row + row + 32 * g;
      shift[g] = n < M ? offset[n] : INFINITY;
      place[g] = n < M ? target[n] - first : -1;
    }
#pragma unroll
    for (int g = 0; g < 2; ++g)
      if (place[g] >= 0 && place[g] < columns) {
        bf16* x = element(tile, row + 32 * g, column + place[g]);
        target_logit[at.row + row + 32 * g] = float(*x);
        *x = bf16(-INFINITY);
      }
    for (int c = 0; c < columns; c += 32) {
      uint4 packed[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        packed[i % 2][i / 2] = read_chunk(chunk_address(tile, row + i % 2 * 32, (column + c) / 8 + i / 2));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int g = i % 2;
        float x[8];
        unpack(x, packed[g][i / 2]);
#pragma unroll
        for (int k = 0; k < 8; ++k) x[k] = exp2_(__fmaf_rn(x[k], kLog2e, -shift[g]));
        store<8>(element(tile, row + 32 * g, column + c + i / 2 * 8), x);
        if (c + i / 2 * 8 < columns) sum[g] += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
      }
    }
#pragma unroll
    for (int g = 0; g < 2; ++g)
      if (const int n = at.row + row + 32 * g; n < M) sums[size_t(first / 64) * M + n] = sum[g];
  }
#endif
};

// ---------------------------------------------------------------------------------------------------------------------

// The tile number t: down the rows first, 8 clusters' worth, then to the next column, so that what the blocks at work
// read together stays in the L2 cache.
template <class Epilogue>
__device__ __forceinline__ Place tile_place(const Epilogue& epilogue, int t, int rows, int columns, int N, int rank) {
  constexpr int kGroup = 8;
  const int group = t / (kGroup * columns), first = group * kGroup, height = min(kGroup, rows - first);
  const int inside = t - group * kGroup * columns;
  return epilogue.place((first + inside % height) * kCluster * kM + rank * kM, inside / height, N);
}

// What is multiplied: A and B, and the slices that K is cut into.
struct Factors {
  CUtensorMap a, b;
  int slices;
};

template <bool BY_COLUMN, class Epilogue>
__global__ void GEMM_CLUSTER __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ Factors first, const __grid_constant__ Factors second,
           const __grid_constant__ CUtensorMap out, int M, int N, const __grid_constant__ Epilogue epilogue) {
#if HOPPER
  extern __shared__ uint8_t memory[];
  const uint32_t slots = uint32_t(__cvta_generic_to_shared(memory)), tile = slots + kSlots * kBytesSlice,
                 full = tile + kBytesTile + Epilogue::kBytes, empty = full + 8 * kSlots, ready = empty + 8 * kSlots,
                 changed = ready + 8, free = changed + 8 * 3;
  int* column_of_slot = reinterpret_cast<int*>(memory + (free + 8 - slots));  // of the tile whose own slice is there
  if (slots % 1024) __trap();  // the 128-byte swizzle counts from there; a kernel's shared memory begins there
  // The shuffle tells the compiler that all lanes of a warp agree.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), rank = blockIdx.x % kCluster;
  const int rows = (M + kCluster * kM - 1) / (kCluster * kM), columns = (N + kN - 1) / kN;
  const int slices = first.slices + second.slices, first_tile = blockIdx.x / kCluster, tiles_apart = gridDim.x / kCluster;
  // The producer sends finished tiles to device memory. Changed ones, if they have few slices, would come too late for it:
  // then the finishers do.
  constexpr bool kChanges = Epilogue::kFinish == Finish::changes;
  const bool producer_sends = !kChanges || slices >= 8;
  auto send = [&](Place at, int half, int panel) {  // of the tile's two halves of 64 rows, its four panels of 64 columns
    if (const int column = epilogue.panel_column(at, panel, N); column < N)
      store_box(out, column, at.row + half * 64, tile + (half * 4 + panel) * kBytesPanel);
    commit_stores();
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      init_barrier(full + 8 * i, 1);              // the producer arrives, and says how many bytes are still to come
      init_barrier(empty + 8 * i, 2 * kCluster);  // both consumers of both blocks: B's halves go to both
    }
    init_barrier(ready, 256);  // all threads of the consumers have written their part of the tile
    for (int i = 0; i < 3; ++i) init_barrier(changed + 8 * i, 3);  // each of the finishers' warps has changed a piece more
    // The producer has sent the tile, if it does, and the finishers' warps, if there are any, are done with it.
    init_barrier(free, producer_sends + (Epilogue::kFinish == Finish::nothing ? 0 : 3));
    publish_barriers();
  }
  cluster_barrier();  // nobody may write to the other block, or arrive there, before its barriers exist

  if (warp < 4) {
    if (threadIdx.x == 0) {  // the producer
      int slot = 0, parity = 1;  // the first time round all slots are empty
      Place at = tile_place(epilogue, first_tile, rows, columns, N, rank), before = at;
      // Its other task: the tile before leaves by panels, each right behind the boxes of a slice. The first goes when all
      // slots are on their way, since the consumers are done with that tile by then; where it is changed, two slices later.
      const int requests = slices + Epilogue::kSlices, first_slice = min(kSlots + (kChanges ? 2 : 0), requests) - 1;
      const int panels_a_slice = (8 + max(requests - 4, 1) - 1) / max(requests - 4, 1);
      const int width = epilogue.piece_columns() / 64;
      int sent = 9, tile_parity = 1;  // of its eight panels; 9: and its place is free for the tile after it
      auto make_room = [&] {
        wait_stores();
        arrive(free);
        sent = 9;
      };
      auto send_some = [&](int panels) {
        for (const int end = min(8, sent + panels); sent < end; ++sent) {
          const int piece = sent / width;
          if (kChanges) wait_barrier(changed + 8 * (piece / 3), tile_parity);
          else if (sent == 0) wait_barrier(ready, tile_parity);
          send(before, piece % 2, piece / 2 * width + sent % width);
        }
      };
      if (producer_sends) make_room();
      for (int t = first_tile; t < rows * columns; t += tiles_apart) {
        before = at, at = tile_place(epilogue, t, rows, columns, N, rank);
        for (int k = 0; k < requests; ++k) {
          const uint32_t slice = slots + slot * kBytesSlice;
          // Both blocks of the cluster must be done with the slot: the other writes its half of B here, too.
          wait_barrier(empty + 8 * slot, parity);
          if (k < slices) {
            expect_bytes(full + 8 * slot, kBytesSlice);  // A's box, both halves of B, of which one comes from outside
            const Factors& from = k < first.slices ? first : second;
            const int depth = (k < first.slices ? k : k - first.slices) * kK;
            load_box(slice, from.a, depth, at.row, full + 8 * slot);
            const uint32_t to = slice + kBytesA + rank * (kBytesB / 2);
            const int half = rank ? at.second_half : at.first_half;
            if (!BY_COLUMN) load_box_for_both(to, from.b, depth, half, full + 8 * slot);
            for (int panel = 0; panel < (BY_COLUMN ? 2 : 0); ++panel)
              load_box_for_both(to + panel * kBytesPanel, from.b, half + panel * 64, depth, full + 8 * slot);
          } else {
            column_of_slot[slot] = at.column;
            epilogue.load_slice(slice, at, k - slices, full + 8 * slot);
          }
          if (++slot == kSlots) slot = 0, parity ^= 1;

          if (sent == 8) make_room();
          if (k == first_slice && t > first_tile && producer_sends) sent = 0, tile_parity ^= 1;
          if (k >= first_slice) send_some(panels_a_slice);
        }
      }
      if (sent == 8) make_room();
      if (producer_sends) sent = 0, tile_parity ^= 1, before = at, send_some(8);
      wait_stores();  // while the block's shared memory exists
    }
    if (warp > 0 && Epilogue::kFinish != Finish::nothing) {  // the finishers
      const int thread = threadIdx.x - 32, lane = threadIdx.x % 32;
      int parity = 0;
      for (int t = first_tile; t < rows * columns; t += tiles_apart, parity ^= 1) {
        const Place at = tile_place(epilogue, t, rows, columns, N, rank);
        __syncwarp();
        if (lane == 0) arrive(free);  // the warp is done with the tile before
        epilogue.prepare(tile, at, thread, M, N);
        wait_barrier(ready, parity);
        if constexpr (kChanges) {
          const int width = epilogue.piece_columns(), pieces = 2 * kN / width;
          for (int round = 0; round < 3; ++round) {
            const int piece = round * 3 + warp - 1;
            if (piece < pieces) epilogue.finish_piece(tile, at, piece % 2 * 64, piece / 2 * width);
            publish();
            __syncwarp();
            if (lane == 0 && producer_sends) arrive(changed + 8 * round);
            for (int c = 0; c < width && piece < pieces && lane == 0 && !producer_sends; c += 64)
              send(at, piece % 2, (piece / 2 * width + c) / 64);
          }
        } else {
          epilogue.finish(tile, at, thread, M, N);
        }
        if (!producer_sends) wait_stores();
      }
    }
  } else {  // the consumers
    const int consumer = warp / 4 - 1, thread = threadIdx.x % 128;
    const uint64_t rows_of_a = descriptor(slots + consumer * (kBytesA / 2)), rows_of_b = descriptor(slots + kBytesA);
    const uint32_t empty_there = in_block(empty, thread % kCluster);
    auto release = [&](int slot) {
      if (thread < kCluster) arrive_in_cluster(empty_there + 8 * slot);
    };
    float d[32][4];
    int slot = 0, before = 0, parity = 0, tile_parity = 0;
    auto advance = [&] {
      before = slot;
      if (++slot == kSlots) slot = 0, parity ^= 1;
    };
    for (int t = first_tile; t < rows * columns; t += tiles_apart, tile_parity ^= 1) {
      for (int k = 0; k < slices; ++k) {
        // Both blocks' boxes have arrived.
        wait_barrier(full + 8 * slot, parity);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        const uint64_t slice = slot * (kBytesSlice >> 4);  // in a descriptor's units
#pragma unroll
        for (int i = 0; i < kK / 16; ++i)
          wgmma<BY_COLUMN>(d, rows_of_a + slice + kStepK<false> * i, rows_of_b + slice + kStepK<BY_COLUMN> * i,
                           k > 0 || i > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        wait_products<1>(d);  // the slice before this one has been used
        if (k > 0) release(before);
        advance();
      }
      wait_products<0>(d);
      release(before);
#pragma unroll
      for (int part = 0; part < Epilogue::kSlices; ++part) {
        wait_barrier(full + 8 * slot, parity);
        epilogue.use_slice(d, slots + slot * kBytesSlice, part, column_of_slot[slot], (warp - 4) * 16);
        asm volatile("bar.sync %0, 128;" ::"r"(consumer + 1) : "memory");  // all its warps have read it
        advance();
        release(before);
      }
      wait_barrier(free, tile_parity);  // the tile before has left
      write_tile(tile, (warp - 4) * 16, d);
      publish();
      arrive(ready);
    }
  }
  cluster_barrier();  // neither block may go while the other still sends it something
#endif
}

// Whether the kernel exists for this GPU and takes this shape: rows of all matrices start at multiples of 16 bytes.
inline bool supports(const Cuda& be, int N, int K, const void* out, const void* a, const void* b) {
  auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return be.capability == 90 && N % 8 == 0 && K % 8 == 0 && aligned(out) && aligned(a) && aligned(b);
}

// out (M, N) = a (M, K) b (N, K)^T, or b (K, N) with BY_COLUMN, [+ the same of a2 and b2 with K2], finished by the epilogue.
template <bool BY_COLUMN = false, class Epilogue>
void multiply(Cuda& be, bf16* out, const bf16* a, const bf16* b, int M, int N, int K, Epilogue epilogue,
              const bf16* a2 = nullptr, const bf16* b2 = nullptr, int K2 = 0) {
  auto factors = [&](const bf16* x, const bf16* y, int depth) {
    return Factors{describe(x, M, depth, kM), BY_COLUMN ? describe(y, depth, N, kK) : describe(y, N, depth, 128),
                   (depth + kK - 1) / kK};
  };
  const Factors first = factors(a, b, K), second = K2 ? factors(a2, b2, K2) : Factors{first.a, first.b, 0};
  const size_t tiles = divide_up(M, kCluster * kM) * divide_up(N, kN);
  const int blocks = kCluster * int(std::min<size_t>(tiles, be.multiprocessors / kCluster));
  launch(be, "gemm", kernel<BY_COLUMN, Epilogue>, blocks, kThreads, kBytesShared + Epilogue::kBytes, first, second,
         describe(out, M, N, 64), M, N, epilogue);
}

}  // namespace gemm

#endif  // __CUDACC__
