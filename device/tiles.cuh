#pragma once
// Tiles and their products, of which flash attention is made (device/flash.cuh, flash_hopper.cuh; the ladders in bench/ use
// them on the way): bf16 with fp32 sums, on the tensor cores of sm_80 and up.
//
// Four warps, a warpgroup, own 64 rows and keep their sums, the accumulators, in registers. The other operand streams
// through shared memory in tiles. A product is then one of
//   multiply_transposed   acc (64, N)  = A (64, HS) tile^T       tile (N, HS):    S = Q K^T, dP = dO V^T, ... (or +=)
//   multiply              acc (64, HS) += A (64, ROWS) tile      tile (ROWS, HS): O = P V, dQ = dS K, ...
// and what the first leaves in the accumulators is, rounded to bf16 in place, the A operand of the second. Both products
// are written twice: with mma.sync and ldmatrix (sm_80 and up), and with wgmma, which reads its second operand straight
// from shared memory (sm_90a, the target that `make` picks for Hopper). Registers and shared memory are laid out alike
// for both, so that the kernels do not know which one they use; nor who fills and empties their tiles, all threads or
// the copy engine.

#include "device/copy_engine.cuh"

#ifdef __CUDACC__

namespace flash {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kRows = 64;    // rows that a warpgroup owns: 16 per warp

// ---------------------------------------------------------------------------------------------------------------------
// Tiles in shared memory

// A tile (ROWS, HS) of bf16 in shared memory, starting at a multiple of 1024 bytes. It is cut into panels of up to 64
// columns, each of ROWS rows of up to 128 bytes. Within a panel the 16-byte chunks of a row are permuted by the row's
// number, so that eight rows of one chunk column lie in distinct banks: this is the 128-byte swizzle that wgmma knows
// (64-byte for HS = 32).
template <int ROWS, int HS>
struct Tile {
  static constexpr int kPanel = HS < 64 ? HS : 64;  // columns
  static constexpr int kPanelBytes = ROWS * kPanel * 2;
  static constexpr int kBytes = ROWS * HS * 2;

  uint32_t at;  // address in shared memory

  // The address of 8 columns of a row, starting at column 8 * chunk.
  __device__ __forceinline__ uint32_t address(int row, int chunk) const {
    if (HS == 32) return at + row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
    return at + (chunk >> 3) * kPanelBytes + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
  }

  // wgmma's description of the tile from (row, column) on, for either reading direction: address, distance of the
  // panels (which only a product by columns needs), stride of 8 rows, swizzle (PTX ISA, "Matrix descriptor"; all in
  // units of 16 bytes). row must be a multiple of 8, column of 16.
  __device__ __forceinline__ uint64_t descriptor(int row, int column) const {
    constexpr uint64_t kSwizzle = HS == 32 ? 2 : 1, kRows8 = 8 * kPanel * 2;
    return (kSwizzle << 62 | kRows8 >> 4 << 32 | kPanelBytes >> 4 << 16 | at >> 4) +
           (column / kPanel * kPanelBytes + row * kPanel * 2 + column % kPanel * 2) / 16;
  }
};

// Starts the copy of rows first..first+ROWS-1 of a matrix (T, HS), `stride` elements from row to row, to a tile, by
// THREADS threads; rows from T on become zeros.
template <int THREADS, int ROWS, int HS>
__device__ __forceinline__ void load_tile(Tile<ROWS, HS> tile, const bf16* source, size_t stride, int first, int T) {
#if __CUDA_ARCH__ >= 800
  // A thread copies the same 16 bytes of every kStep-th row.
  constexpr int kChunks = HS / 8, kStep = THREADS / kChunks;
  static_assert(ROWS % kStep == 0);
  const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  // cp.async goes past registers, and with .cg past the L1 cache: what is loaded once would only push other things out.
  const bf16* from = source + (first + row) * stride + chunk * 8;
#pragma unroll
  for (int n = 0; n < ROWS; n += kStep, from += kStep * stride)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(tile.address(row + n, chunk)), "l"(from),
                 "r"(first + row + n < T ? 16 : 0)  // 0: nothing is read, zeros are written
                 : "memory");
#endif
}

__device__ __forceinline__ void commit_loads() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all of the block's copies have arrived and all its threads are here, i.e. are done with the tiles before.
__device__ __forceinline__ void wait_loads() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#if HOPPER
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads shared memory by another path
#endif
  __syncthreads();
#endif
}

#if HOPPER
// The copy engine fills a tile, in boxes of BOX rows, with the HS columns from `column` on, rows from `row` on, of
// sequence b; by one thread, which tells the barrier how many bytes to expect.
template <int BOX, int ROWS, int HS>
__device__ __forceinline__ void fetch_boxes(Tile<ROWS, HS> tile, const CUtensorMap& matrix, int column, int row, int b,
                                            uint32_t barrier) {
  for (int p = 0; p < HS / tile.kPanel; ++p)
    for (int r = 0; r < ROWS; r += BOX)
      hopper::load_box(tile.at + p * tile.kPanelBytes + r * tile.kPanel * 2, matrix, column + p * tile.kPanel, row + r,
                       b, barrier);
}
#endif

// A matrix (B, T, columns) of bf16 in device memory, whose rows tiles are filled with, or get.
struct Rows {
  bf16* data;
  int T, columns;
  CUtensorMap map;  // describes it to Hopper's copy engine, in boxes of kBoxRows<HS> rows of a panel
};
template <int HS>
constexpr int kBoxRows = HS < 256 ? 64 : 32;  // all tiles of such heads have a multiple of it

// The copies of a block that are under way: those asked for since the last wait(). They are asked for by load(), and
// commit() after the last of them; wait() waits until they are here and all of the block's threads are, too. On Hopper
// one thread asks the copy engine for whole tiles, else all threads copy: there, reckoning where each 16 bytes come from
// was 11 to 17 % of the kernels' instructions.
struct Copies {
#if HOPPER
  uint32_t barrier;
  int parity = 0;
  __device__ __forceinline__ Copies() {
    __shared__ uint64_t place;
    barrier = uint32_t(__cvta_generic_to_shared(&place));
    if (threadIdx.x == 0) {
      hopper::init_barrier(barrier, 1);
      hopper::publish_barriers();
    }
    __syncthreads();
  }
#endif
  // Columns column.. and rows first.. of sequence b come to a tile; rows from T on become zeros.
  template <int ROWS, int HS>
  __device__ __forceinline__ void load(Tile<ROWS, HS> tile, const Rows& from, int b, int first, int column) {
#if HOPPER
    if (threadIdx.x == 0) {
      hopper::expect_more_bytes(barrier, tile.kBytes);
      fetch_boxes<kBoxRows<HS>>(tile, from.map, column, first, b, barrier);
    }
#else
    load_tile<kGroup>(tile, from.data + size_t(b) * from.T * from.columns + column, from.columns, first, from.T);
#endif
  }
  // COUNT floats; both addresses are multiples of 16.
  template <int COUNT>
  __device__ __forceinline__ void load_numbers(uint32_t to, const float* from) {
#if HOPPER
    if (threadIdx.x == 0) {
      hopper::expect_more_bytes(barrier, COUNT * 4);
      hopper::load_bytes(to, from, COUNT * 4, barrier);
    }
#elif __CUDA_ARCH__ >= 800
    if (threadIdx.x < COUNT / 4)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + threadIdx.x * 16), "l"(from + threadIdx.x * 4)
                   : "memory");
#endif
  }
  __device__ __forceinline__ void commit() {
#if HOPPER
    if (threadIdx.x == 0) hopper::arrive(barrier);
#else
    commit_loads();
#endif
  }
  __device__ __forceinline__ void wait() {
#if HOPPER
    hopper::wait_barrier(barrier, parity);
    parity ^= 1;
    __syncthreads();
#else
    wait_loads();
#endif
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Fragments. Of a 16 x 8 piece of accumulators, thread 4g + t of a warp holds rows g and g + 8, columns 2t and 2t+1, as
// acc[piece] = {(g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)}; of a 16 x 16 piece of an A operand, (g, 2t..2t+1) of the
// four 8 x 8 quarters as bf16 pairs, in the order top left, bottom left, top right, bottom right.

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }
// Which warpgroup of the block; the shuffle tells the compiler that all threads of a warp agree.
__device__ __forceinline__ int group() { return __shfl_sync(~0u, threadIdx.x / kGroup, 0); }
// Row of the warpgroup's 64 that the thread's accumulators 0 and 1 belong to; 2 and 3 belong to the row 8 further.
__device__ __forceinline__ int own_row() { return threadIdx.x % kGroup / 32 * 16 + lane() / 4; }

// Accumulators (64, N), rounded to bf16, as an A operand.
template <int N>
__device__ __forceinline__ void to_operand(uint32_t (&a)[N / 16][4], const float (&acc)[N / 8][4]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = pack_pair(acc[2 * k + i / 2][i % 2 * 2], acc[2 * k + i / 2][i % 2 * 2 + 1]);
}

template <int TRANSPOSED>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
#if __CUDA_ARCH__ >= 800
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

// The 16 x 16 piece number k of the warp's 16 rows, as an A operand; the warpgroup's rows start at `first`.
template <int ROWS, int HS>
__device__ __forceinline__ void load_operand(uint32_t (&a)[4], Tile<ROWS, HS> tile, int first, int k) {
  int row = first + threadIdx.x % kGroup / 32 * 16 + lane() % 16;
  ldmatrix<0>(a, tile.address(row, 2 * k + lane() / 16));
}
template <int ROWS, int HS>
__device__ __forceinline__ void load_operand(uint32_t (&a)[HS / 16][4], Tile<ROWS, HS> tile, int first) {
#pragma unroll
  for (int k = 0; k < HS / 16; ++k) load_operand(a[k], tile, first, k);
}

// The same the other way, to the warp's own 16 rows of the warpgroup's tile.
template <int HS>
__device__ __forceinline__ void store_operand(Tile<kRows, HS> tile, const uint32_t (&a)[4], int k) {
  const int warp_row = threadIdx.x % kGroup / 32 * 16;
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   tile.address(warp_row + lane() % 16, 2 * k + lane() / 16)),
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile.address(warp_row + lane() / 4 + i % 2 * 8, 2 * k + i / 2) +
                                                 lane() % 4 * 4),
                 "r"(a[i])
                 : "memory");
#endif
}

// An A operand left in shared memory: the 64 rows of a tile from `first` on.
template <int ROWS, int HS>
struct Shared {
  Tile<ROWS, HS> tile;
  int first;
};

// ---------------------------------------------------------------------------------------------------------------------
// Tiles that leave: the warps of a warpgroup have each written their 16 rows of one, or of several; finish_rows(), then
// send_rows() for each tile, and before they are written again, or the block ends, wait_sent().

// Writes the warp's rows of a tile to rows first.. of a matrix (T, HS), `stride` elements from row to row, 16 bytes at a
// time; rows from T on are left out.
template <int HS>
__device__ __forceinline__ void store_tile(bf16* to, size_t stride, int first, int T, Tile<kRows, HS> tile) {
  constexpr int kChunks = HS / 8;
  const int warp_row = threadIdx.x % kGroup / 32 * 16;
#pragma unroll
  for (int i = lane(); i < 16 * kChunks; i += 32) {
    const int row = warp_row + i / kChunks, chunk = i % kChunks;
    const uint4 v = read_chunk(tile.address(row, chunk));
    if (first + row < T) *reinterpret_cast<uint4*>(to + (first + row) * stride + chunk * 8) = v;
  }
}

__device__ __forceinline__ void finish_rows() {
#if HOPPER
  hopper::publish();
  asm volatile("bar.sync %0, %1;" ::"r"(3 + group()), "n"(kGroup) : "memory");  // of the warpgroup
#else
  __syncwarp();
#endif
}
// To columns column.. and rows first.. of sequence b. On Hopper one thread asks the copy engine for it.
template <int HS>
__device__ __forceinline__ void send_rows(const Rows& to, int b, int first, int column, Tile<kRows, HS> tile) {
#if HOPPER
  if (threadIdx.x % kGroup == 0) {
    for (int p = 0; p < HS / tile.kPanel; ++p)
      for (int r = 0; r < kRows; r += kBoxRows<HS>)
        hopper::store_box(to.map, column + p * tile.kPanel, first + r, b,
                          tile.at + p * tile.kPanelBytes + r * tile.kPanel * 2);
    hopper::commit_stores();
  }
#else
  store_tile(to.data + size_t(b) * to.T * to.columns + column, to.columns, first, to.T, tile);
#endif
}
__device__ __forceinline__ void wait_sent() {
#if HOPPER
  if (threadIdx.x % kGroup == 0) hopper::wait_stores();
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Products. They start, and may still run until wait_products; a pending product's operands must be left alone.

// With mma.sync, on every GPU from sm_80 on: bench/attention_ladder.cu uses them on Hopper as well.
namespace mma_sync {

// d (16, 8) += A (16, 16) B (16, 8), per warp
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <int N, int HS>
__device__ __forceinline__ void multiply_transposed_step(float (&acc)[N / 8][4], const uint32_t (&a)[4],
                                                         Tile<N, HS> tile, int k) {
#pragma unroll
  for (int n = 0; n < N / 16; ++n) {
    uint32_t b[4];
    ldmatrix<0>(b, tile.address(n * 16 + lane() / 16 * 8 + lane() % 8, 2 * k + lane() / 8 % 2));
    mma(acc[2 * n], a, b[0], b[1]);
    mma(acc[2 * n + 1], a, b[2], b[3]);
  }
}

template <int N>
__device__ __forceinline__ void clear(float (&acc)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
}

// acc (64, N) = [acc +] A (64, HS) tile^T
template <int N, int HS>
__device__ __forceinline__ void multiply_transposed(float (&acc)[N / 8][4], const uint32_t (&a)[HS / 16][4],
                                                    Tile<N, HS> tile, bool add = false) {
  if (!add) clear(acc);
#pragma unroll
  for (int k = 0; k < HS / 16; ++k) multiply_transposed_step<N, HS>(acc, a[k], tile, k);
}
template <int N, int ROWS, int HS>
__device__ __forceinline__ void multiply_transposed(float (&acc)[N / 8][4], Shared<ROWS, HS> a, Tile<N, HS> tile,
                                                    bool add = false) {
  if (!add) clear(acc);
#pragma unroll
  for (int k = 0; k < HS / 16; ++k) {
    uint32_t piece[4];
    load_operand(piece, a.tile, a.first, k);
    multiply_transposed_step<N, HS>(acc, piece, tile, k);
  }
}

// acc (64, HS) += A (64, ROWS) tile
template <int ROWS, int HS>
__device__ __forceinline__ void multiply(float (&acc)[HS / 8][4], const uint32_t (&a)[ROWS / 16][4],
                                         Tile<ROWS, HS> tile) {
#pragma unroll
  for (int k = 0; k < ROWS / 16; ++k)
#pragma unroll
    for (int n = 0; n < HS / 16; ++n) {
      uint32_t b[4];
      ldmatrix<1>(b, tile.address(k * 16 + lane() % 16, 2 * n + lane() / 16));
      mma(acc[2 * n], a[k], b[0], b[1]);
      mma(acc[2 * n + 1], a[k], b[2], b[3]);
    }
}

}  // namespace mma_sync

#if HOPPER

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING products still run; acc, the result of one that has finished, can be read after.
template <int PENDING, int N>
__device__ __forceinline__ void wait_products(float (&acc)[N][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
  for (int n = 0; n < N; ++n)  // keeps the compiler from reading the registers before the wait
    asm volatile("" : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])::"memory");
}

// d (64, N) = [d +] A (64, 16) B (16, N); A in registers or in shared memory. B is stored (N, 16), or with BY_COLUMN
// (16, N).
// clang-format off
#define FLASH_D8(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), \
    "+f"(d[n + 1][0]), "+f"(d[n + 1][1]), "+f"(d[n + 1][2]), "+f"(d[n + 1][3])
#define FLASH_D16 FLASH_D8(0), FLASH_D8(2)
#define FLASH_D32 FLASH_D16, FLASH_D8(4), FLASH_D8(6)
#define FLASH_D40 FLASH_D32, FLASH_D8(8)
#define FLASH_D64 FLASH_D40, FLASH_D8(10), FLASH_D8(12), FLASH_D8(14)
#define FLASH_D128 FLASH_D64, FLASH_D8(16), FLASH_D8(18), FLASH_D8(20), FLASH_D8(22), FLASH_D8(24), FLASH_D8(26), \
    FLASH_D8(28), FLASH_D8(30)
#define FLASH_R16  \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define FLASH_R32 FLASH_R16 "," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FLASH_R40 FLASH_R32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39"
#define FLASH_R64 FLASH_R40 "," \
  "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FLASH_R128 FLASH_R64 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89," \
  "%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// R is N / 2, the number of a thread's results; then come the operands' numbers.
#define FLASH_WGMMA_REGISTERS(N, R, A0, A1, A2, A3, B, P, T)                                                           \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0;\n"                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" FLASH_R##R                                 \
               "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, %" #T ";}"                                 \
               : FLASH_D##R                                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(BY_COLUMN))
#define FLASH_WGMMA_SHARED(N, R, A, B, P, T)                                                                           \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0;\n"                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" FLASH_R##R                                 \
               "}, %" #A ", %" #B ", p, 1, 1, 0, %" #T ";}"                                                            \
               : FLASH_D##R                                                                                            \
               : "l"(a), "l"(b), "r"(accumulate), "n"(BY_COLUMN))
// clang-format on

template <int N, int BY_COLUMN>
__device__ __forceinline__ void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(N == 32 || N == 64 || N == 128 || N == 256);
  if constexpr (N == 32) FLASH_WGMMA_REGISTERS(32, 16, 16, 17, 18, 19, 20, 21, 22);
  if constexpr (N == 64) FLASH_WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37, 38);
  if constexpr (N == 128) FLASH_WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69, 70);
  if constexpr (N == 256) FLASH_WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133, 134);
}
template <int N, int BY_COLUMN>
__device__ __forceinline__ void wgmma(float (*d)[4], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 32 || N == 64 || N == 80 || N == 128);
  if constexpr (N == 32) FLASH_WGMMA_SHARED(32, 16, 16, 17, 18, 19);
  if constexpr (N == 64) FLASH_WGMMA_SHARED(64, 32, 32, 33, 34, 35);
  if constexpr (N == 80) FLASH_WGMMA_SHARED(80, 40, 40, 41, 42, 43);
  if constexpr (N == 128) FLASH_WGMMA_SHARED(128, 64, 64, 65, 66, 67);
}

// acc (64, N) = [acc +] A (64, HS) tile^T
template <int N, int ROWS, int HS>
__device__ __forceinline__ void multiply_transposed(float (&acc)[N / 8][4], Shared<ROWS, HS> a, Tile<N, HS> tile,
                                                    bool add = false) {
  begin_products();
#pragma unroll
  for (int k = 0; k < HS / 16; ++k)
    wgmma<N, 0>(acc, a.tile.descriptor(a.first, k * 16), tile.descriptor(0, k * 16), add || k > 0);
  end_products();
}

// acc (64, HS) += A (64, ROWS) tile
template <int ROWS, int HS>
__device__ __forceinline__ void multiply(float (&acc)[HS / 8][4], const uint32_t (&a)[ROWS / 16][4],
                                         Tile<ROWS, HS> tile) {
  begin_products();
#pragma unroll
  for (int k = 0; k < ROWS / 16; ++k) wgmma<HS, 1>(acc, a[k], tile.descriptor(k * 16, 0), 1);
  end_products();
}

#else

template <int PENDING, int N>
__device__ __forceinline__ void wait_products(float (&)[N][4]) {}

using namespace mma_sync;

#endif

}  // namespace flash

#endif  // __CUDACC__
