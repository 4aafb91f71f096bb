#pragma once
// Matrix products. On the GPU they are cuBLASLt's, at the end of this file. On the CPU they are made by hand:
// c (M, N) = start + a b, row-major, fp32 or double.
//
// The method is that of Goto and van de Geijn (2008, "Anatomy of high-performance matrix multiplication"). The inner
// loop multiplies kTileRows rows of `a` with one panel of `b`, a few vectors of columns, and keeps that tile of c in
// registers: every number that is loaded is used several times. Panels of b are packed, so that the inner loop reads
// them in order and from the L1 cache; a is read where it stands, or packed if its rows lie across memory.
//
// An element of c is a sum over k in slices of at most kDepth, in order. Nothing else about how the work is divided
// reaches the result, so it is the same for any number of threads, to the bit.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <map>
#include <tuple>
#include <vector>

#include <omp.h>

#include "device/backend.h"

// Vectors are those of GCC and clang, not of one processor: the compiler turns them into AVX-512, AVX, SSE or NEON.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 12;  // 32 registers: 12 x 2 of them hold the tile of c
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kTileRows = 6;  // 16 registers: 6 x 2 for c, 2 for b, 1 for a
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 12;
#else
constexpr int kVectorBytes = 16, kTileRows = 6;
#endif
template <class Real>
constexpr int kTileColumns = 2 * kVectorBytes / int(sizeof(Real));

// k per slice: a panel of b (kDepth, kTileColumns) takes 24 KiB of the L1 cache with AVX, 48 with AVX-512.
constexpr int kDepth = 384;
constexpr int kRowBlock = 96;  // rows per task: their part of a (kRowBlock, kDepth) takes 144 KiB of the L2 cache
// b is packed a slab at a time: up to kSlabDepth of k by kSlabColumns, 8 MiB in fp32, part of which the L3 cache holds.
constexpr int kSlabDepth = 2048, kSlabColumns = 1024;

// A matrix in memory: element (i, j) at data[i * row + j * column]. The transpose swaps the strides.
template <class Real>
struct Strided {
  const Real* data;
  size_t row, column;
  const Real* at(size_t i, size_t j) const { return data + i * row + j * column; }
};
template <class Real>
Strided<Real> row_major(const Real* data, size_t stride) { return {data, stride, 1}; }
template <class Real>
Strided<Real> transposed(const Real* data, size_t stride) { return {data, 1, stride}; }

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// The length of the slices that k is cut into: equal ones, and a function of K alone.
inline int depth_of_slices(int K) {
  const int slices = std::max(1, (K + kDepth - 1) / kDepth);
  return std::max(1, (K + slices - 1) / slices);
}

// One tile: c (rows <= kTileRows, columns <= kTileColumns) = start + a (rows, K) b (K, kTileColumns), b packed.
// start may be nullptr for 0, or c itself; its rows lie start_stride apart (0: one row for all, a bias).
template <class Real>
void multiply_tile(Real* c, size_t c_stride, const Real* start, size_t start_stride, Strided<Real> a, const Real* b,
                   int rows, int columns, int K) {
  constexpr int kLanes = kVectorBytes / int(sizeof(Real));
  typedef Real Vector __attribute__((vector_size(kVectorBytes)));
  const Real* a_row[kTileRows];  // pointers that the loop only adds to
  for (int i = 0; i < kTileRows; ++i) a_row[i] = a.at(std::min(i, rows - 1), 0);  // rows past the edge: any, not kept
  // The loop in which training on a CPU spends most of its time: two loads of b, then for each row a number of a,
  // spread over a vector, and two multiply-adds. The sums stay in registers to the end. Meanwhile the rows of c come to
  // the cache, one by one: all at once they would hold up the loads.
  Vector sum[kTileRows][2] = {};
  const int part = (K + kTileRows - 1) / kTileRows;
  for (int k = 0, row = 0; k < K; ++row) {
    for (int j = 0; row < rows && j < columns; j += 64 / int(sizeof(Real)))
      __builtin_prefetch(c + row * c_stride + j, 1);
    for (const int end = std::min(K, k + part); k < end; ++k) {
      Vector b0, b1;
      std::memcpy(&b0, b + size_t(k) * 2 * kLanes, sizeof b0);
      std::memcpy(&b1, b + size_t(k) * 2 * kLanes + kLanes, sizeof b1);
      for (int i = 0; i < kTileRows; ++i) {
        const Real x = a_row[i][k * a.column];
        sum[i][0] += x * b0;
        sum[i][1] += x * b1;
      }
    }
  }
  // A whole tile goes out vector by vector.
  if (rows == kTileRows && columns == 2 * kLanes) {
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < 2; ++v) {
        Vector from = {};
        if (start) std::memcpy(&from, start + i * start_stride + v * kLanes, sizeof from);
        from += sum[i][v];
        std::memcpy(c + i * c_stride + v * kLanes, &from, sizeof from);
      }
    return;
  }
  // At the edge of c a part of the tile, number by number.
  Real tile[kTileRows][2 * kLanes];
  std::memcpy(tile, sum, sizeof tile);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j)
      c[i * c_stride + j] = (start ? start[i * start_stride + j] : Real(0)) + tile[i][j];
}

// Memory that is kept from call to call, and grows. It begins with a cache line, as all of Cpu's: elsewhere vectors of a
// packed b would lie across two of them, and take two loads, and a step of training took 8 to 15 % longer.
template <class T>
struct Kept {
  Buffer<Cpu> memory;
  T* room(size_t n) {
    static Cpu cpu;
    if (memory.bytes < n * sizeof(T)) memory = Buffer<Cpu>(cpu, n * sizeof(T));
    return memory.template as<T>();
  }
};

// A packed b (K, N). The first rows and columns of it may be used alone.
template <class Real>
struct Packed {
  const Real* data;
  int K, N;
};

// Elements that b (K, N) takes when packed.
template <class Real>
size_t packed_elements(int K, int N) { return size_t(K) * round_up(N, kTileColumns<Real>); }

// Packs panels [first, last) of b (K, N): slices of k one after the other, in a slice panel by panel, in a panel row by
// row, in a row kTileColumns numbers, zeros past the edge.
template <class Real>
void pack_panels(Real* packed, Strided<Real> b, int K, int N, int first, int last) {
  constexpr int kColumns = kTileColumns<Real>, kLine = 64 / int(sizeof(Real));
  const int depth = depth_of_slices(K), width = round_up(N, kColumns);  // of a slice
  for (int k0 = 0; k0 < K; k0 += depth)
    for (int panel = first; panel < last; ++panel) {
      const int slice = std::min(depth, K - k0), columns = std::min(kColumns, N - panel * kColumns);
      // Panels of the slices before this one lie in front, each slice as wide as all panels together.
      const Real* from = b.at(k0, panel * kColumns);
      Real* to = packed + size_t(k0) * width + size_t(panel) * kColumns * slice;
      int k = 0;
      if (columns == kColumns && b.row == 1)  // a transpose: a cache line of every column at a time
        for (; k + kLine <= slice; k += kLine, to += kLine * kColumns)
          for (int j = 0; j < kColumns; ++j) {
            const Real* column = from + k + j * b.column;
            __builtin_prefetch(column + 4 * kLine);
            for (int i = 0; i < kLine; ++i) to[i * kColumns + j] = column[i];
          }
      for (; k < slice; ++k, to += kColumns) {
        __builtin_prefetch(from + (k + 8) * b.row);  // rows lie far apart: the hardware does not see them coming
        if (columns == kColumns && b.column == 1)
          std::memcpy(to, from + k * b.row, kColumns * sizeof(Real));
        else
          for (int j = 0; j < kColumns; ++j) to[j] = j < columns ? from[k * b.row + j * b.column] : Real(0);
      }
    }
}
template <class Real>
Packed<Real> pack(Kept<Real>& memory, Strided<Real> b, int K, int N) {
  Real* packed = memory.room(packed_elements<Real>(K, N));
  pack_panels(packed, b, K, N, 0, round_up(N, kTileColumns<Real>) / kTileColumns<Real>);
  return {packed, K, N};
}

// c (M, N) = start + a (M, K) b, with b packed, on this thread; M, N and K may be smaller than what was packed. A long
// `a` that runs across memory is packed, too, in panels of kTileRows rows, one k after the other.
template <class Real>
void multiply_packed(Real* c, size_t c_stride, const Real* start, size_t start_stride, Strided<Real> a, Packed<Real> b,
                     int M, int N, int K) {
  constexpr int kColumns = kTileColumns<Real>;
  static thread_local Kept<Real> memory;
  const int depth = depth_of_slices(b.K), width = round_up(b.N, kColumns);  // as b was packed, not as it is used
  // For weight gradients, a = dout^T: neighbours in k are a row of memory apart.
  const bool pack_a = a.column != 1 && K > 64;
  Real* const packed_a = pack_a ? memory.room(size_t(round_up(M, kTileRows)) * depth) : nullptr;
  for (int k0 = 0; k0 < std::max(K, 1); k0 += depth) {  // K = 0 is one slice of nothing: c = start
    const int slice = std::min(depth, K - k0);
    if (pack_a)
      for (int k = 0; k < slice; ++k) {
        for (int i = 0; i < M; i += 64 / int(sizeof(Real))) __builtin_prefetch(a.at(i, k0 + k + 8));
        for (int i = 0; i < M; i += kTileRows) {
          Real* to = &packed_a[size_t(i) * slice + size_t(k) * kTileRows];
          const Real* from = a.at(i, k0 + k);
          if (a.row == 1 && M - i >= kTileRows)
            std::memcpy(to, from, kTileRows * sizeof(Real));
          else
            for (int r = 0; r < std::min(kTileRows, M - i); ++r) to[r] = from[r * a.row];
        }
      }
    for (int j = 0; j < N; j += kColumns)
      // All rows before the next panel: the panel of b stays in the L1 cache, the rows of a in the L2 cache.
      for (int i = 0; i < M; i += kTileRows) {
        Real* tile = c + i * c_stride + j;
        // The first slice starts from `start`, the others from what the one before left.
        const Real* from = k0 ? tile : start ? start + i * start_stride + j : nullptr;
        const Strided<Real> rows = pack_a ? Strided<Real>{&packed_a[size_t(i) * slice], 1, kTileRows}
                                          : Strided<Real>{a.at(i, k0), a.row, a.column};
        const Real* panel = b.data + size_t(k0) * width + size_t(j) * std::min(depth, b.K - k0);
        multiply_tile(tile, c_stride, from, k0 ? c_stride : start_stride, rows, panel, std::min(kTileRows, M - i),
                      std::min(kColumns, N - j), slice);
      }
  }
}

// c (M, N) = start + a (M, K) b (K, N) on all threads. c has rows of N; start as in multiply_tile.
template <class Real>
void matmul(Real* c, const Real* start, size_t start_stride, Strided<Real> a, Strided<Real> b, int M, int N, int K) {
  constexpr int kColumns = kTileColumns<Real>;
  if (M <= 2 && a.column == 1 && b.row == 1) {  // sampling: b, the weights, is read once, so packing it would not pay
#pragma omp parallel for
    for (int j = 0; j < N; ++j)
      for (int i = 0; i < M; ++i) {
        const Real *x = a.at(i, 0), *y = b.at(0, j);
        Real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int k = 0; k < K; ++k) sum += x[k] * y[k];
        c[size_t(i) * N + j] = (start ? start[i * start_stride + j] : Real(0)) + sum;
      }
    return;
  }
  // All threads pack a slab of b; then a task is kRowBlock rows of c, or fewer where threads would be idle.
  static thread_local Kept<Real> memory;
  // A slab is packed by all and read by all, so that it is packed once.
  const size_t slab = packed_elements<Real>(std::min(K, kSlabDepth), std::min(N, kSlabColumns));
  Real* panels = memory.room(slab);  // the calling thread's, shared by all
  // At least two tasks per thread: one that is late must not keep the others waiting for long.
  const int tasks = 2 * omp_get_max_threads();
  const int row_block = std::min(kRowBlock, round_up((M + tasks - 1) / tasks, kTileRows));
#pragma omp parallel
  for (int k = 0; k < std::max(K, 1); k += kSlabDepth)
    for (int j = 0; j < N; j += kSlabColumns) {
      const int depth = std::min(kSlabDepth, K - k), columns = std::min(kSlabColumns, N - j);
#pragma omp for schedule(dynamic)
      for (int panel = 0; panel < (columns + kColumns - 1) / kColumns; ++panel)
        pack_panels(panels, Strided<Real>{b.at(k, j), b.row, b.column}, depth, columns, panel, panel + 1);
#pragma omp for schedule(dynamic)
      for (int i = 0; i < M; i += row_block) {
        Real* part = c + size_t(i) * N + j;
        // The first slab starts from `start`, the others add to what is there.
        const Real* from = k ? part : start ? start + i * start_stride + j : nullptr;
        multiply_packed(part, N, from, k ? size_t(N) : start_stride, Strided<Real>{a.at(i, k), a.row, a.column},
                        Packed<Real>{panels, depth, columns}, std::min(row_block, M - i), columns, depth);
      }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA

#ifdef __CUDACC__

// One matrix product of cuBLASLt, which counts in columns: our row-major (rows, columns) is its (columns, rows).
//     out (columns of b's, rows of a's) = a b, plus `add` when given; shapes as cuBLASLt sees them:
// out (m, n) = op(a) op(b) [+ add (m, n)] [+ bias (m) to every column]. op(a) is (m, k), op(b) (k, n).
template <class Out>
struct Product {
  Out* out;
  const Out* add;  // may be out
  const Out* bias;
  int m, n, k;
  bool transpose_a, transpose_b;
};

// How a product is to be done, found once per shape: asking cuBLASLt costs more than starting it.
struct ProductPlan {
  cublasLtMatmulDesc_t description = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, out = nullptr;
  cublasLtMatmulAlgo_t algorithm;
};

template <class T>
constexpr cudaDataType_t cuda_type() {
  return std::is_same_v<T, bf16> ? CUDA_R_16BF : CUDA_R_32F;
}
inline int alignment(const void* p) {  // the largest power of two that divides the address, up to 256 bytes
  return int(std::min<uintptr_t>(reinterpret_cast<uintptr_t>(p) & -reinterpret_cast<uintptr_t>(p), 256));
}

// sum += a hash of the n numbers at x and of their places, whatever the order in which blocks add to it.
template <class T>
__global__ void __launch_bounds__(256) hash_kernel(unsigned long long* sum, const T* x, size_t n) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  unsigned long long here = 0;
  for (size_t i = blockIdx.x * size_t(256) + threadIdx.x; i < n; i += gridDim.x * size_t(256)) {
    // The element's place is mixed in: two numbers that changed places are another result.
    unsigned long long z = i * 0x9E3779B97F4A7C15ull ^ reinterpret_cast<const Bits*>(x)[i] * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 31) * 0x94D049BB133111EBull;
    here += z ^ z >> 29;
  }
  atomicAdd(sum, here);
}

// Which of `count` ways to compute out (n) is the fastest, by the clock, among those that give the same bits as the first
// that works: then it does not matter that another one may win in the next run. A later one is taken if it needs less
// than `at_most` of the time. start(i) starts the i-th way, gives the same result each time, and returns whether it could.
template <class Out, class Start>
int fastest_of_same_bits(Cuda& be, const Out* out, size_t n, int count, float at_most, Start start) {
  Buffer<Cuda> hash(be, sizeof(unsigned long long));
  unsigned long long first = 0;
  std::vector<int> same;  // the ways with the right bits: those of the first that works, which cuBLASLt would take
  for (int i = 0; i < count; ++i) {
    if (!start(i)) continue;
    unsigned long long bits;
    be.zero(hash.data, sizeof bits);
    launch(be, "hash", hash_kernel<Out>, 8 * be.multiprocessors, 256, 0, hash.as<unsigned long long>(), out, n);
    be.download(&bits, hash.data, sizeof bits);
    if (same.empty()) first = bits;
    if (bits == first) same.push_back(i);
  }
  // By turns, the best of four: a clock that runs slowly at first or when the card is warm, or another program, must not
  // decide.
  std::vector<float> least(count, INFINITY);
  for (int turn = 0; turn < 4; ++turn)
    for (int i : same) least[i] = std::min(least[i], milliseconds_once(be, [&] { start(i); }));
  int best = same.empty() ? 0 : same[0];
  for (int i : same)
    if (least[i] < at_most * least[best]) best = i;
  return best;
}

// Starts an operation, which gives out (n), by cuBLASLt and a kernel for what it cannot do, apart(), or by one kernel of our
// own, together(): whichever is faster for the shape, by the clock, if both give the same bits, which they do unless
// cuBLASLt splits the sums of a product.
template <class Out, class Apart, class Together>
void start_faster(Cuda& be, std::array<int, 5> shape, const Out* out, size_t n, Apart apart, Together together) {
  static std::map<std::pair<cublasLtHandle_t, std::array<int, 5>>, bool> pays;  // of these two ways
  const auto key = std::make_pair(be.blas, shape);
  if (!pays.count(key) && !be.recording()) {
    apart();  // so that its product's algorithm is chosen before it is timed
    pays[key] = fastest_of_same_bits(be, out, n, 2, 1.0f, [&](int way) {
      way ? together() : apart();
      return true;
    });
  }
  pays.count(key) && pays[key] ? together() : apart();
}

// What cuBLASLt proposes for a product, best guess first, less what must not be taken: cuBLAS 12.6 to 13.4 gets wrong
// sums from algorithm 66 where it splits k into runs that do not divide it and whose length is a multiple of its tile's
// depth (known issue 6580689 in its release notes); 64 is the depth of all its tiles for bf16. And where a residual is
// added, that algorithm's tiles of 128 x 160 and 128 x 192 gave other bits in 11 of 5,690 products while another process
// used the GPU as well (docs/speed.md); in the same test no other tile did, nor these without a residual, nor any alone.
inline std::vector<cublasLtMatmulAlgo_t> product_proposals(Cuda& be, const ProductPlan& plan,
                                                           cublasLtMatmulPreference_t preference, int k,
                                                           bool residual) {
  constexpr int kProposals = 8;
  cublasLtMatmulHeuristicResult_t found[kProposals];
  int count = 0;
  check(cublasLtMatmulAlgoGetHeuristic(be.blas, plan.description, plan.a, plan.b, plan.out, plan.out, preference,
                                       kProposals, found, &count),
        "cublasLtMatmulAlgoGetHeuristic");
  std::vector<cublasLtMatmulAlgo_t> proposals;
  for (int i = 0; i < count; ++i) {
    auto get = [&](cublasLtMatmulAlgoConfigAttributes_t name) {
      int value = 0;
      check(cublasLtMatmulAlgoConfigGetAttribute(&found[i].algo, name, &value, sizeof value, nullptr),
            "cublasLtMatmulAlgoConfigGetAttribute");
      return value;
    };
    const int splits = get(CUBLASLT_ALGO_CONFIG_SPLITK_NUM), tile = get(CUBLASLT_ALGO_CONFIG_TILE_ID);
    const bool known_to_be_wrong =
        get(CUBLASLT_ALGO_CONFIG_ID) == 66 &&
        ((splits > 1 && k % splits != 0 && k / splits % 64 == 0) ||
         (residual && (tile == CUBLASLT_MATMUL_TILE_128x160 || tile == CUBLASLT_MATMUL_TILE_128x192)));
    if (found[i].state == CUBLAS_STATUS_SUCCESS && !known_to_be_wrong) proposals.push_back(found[i].algo);
  }
  if (proposals.empty()) throw std::runtime_error("cuBLASLt has no algorithm for a matrix product of this shape");
  return proposals;
}

// Asks cuBLASLt how a product can be done: fills in the plan, with the first proposal as its algorithm; returns all.
template <class Real, class Out>
std::vector<cublasLtMatmulAlgo_t> make_plan(Cuda& be, ProductPlan& plan, const Product<Out>& p, const Real* a,
                                            const Real* b) {
  cublasLtMatmulDesc_t description;
  check(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
  auto set = [&](cublasLtMatmulDescAttributes_t name, auto value) {
    check(cublasLtMatmulDescSetAttribute(description, name, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_TRANSB, p.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  // A bias is one number per row of cuBLASLt's out, a column of ours; it is added before the rounding to Out.
  if (p.bias) set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  if (p.bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, (const void*)p.bias);
  auto layout = [&](cublasLtMatrixLayout_t& to, cudaDataType_t type, int rows, int columns) {
    check(cublasLtMatrixLayoutCreate(&to, type, rows, columns, rows), "cublasLtMatrixLayoutCreate");
  };
  layout(plan.a, cuda_type<Real>(), p.transpose_a ? p.k : p.m, p.transpose_a ? p.m : p.k);
  layout(plan.b, cuda_type<Real>(), p.transpose_b ? p.n : p.k, p.transpose_b ? p.k : p.n);
  layout(plan.out, cuda_type<Out>(), p.m, p.n);
  cublasLtMatmulPreference_t preference;
  check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
  auto prefer = [&](cublasLtMatmulPreferenceAttributes_t name, auto value) {
    check(cublasLtMatmulPreferenceSetAttribute(preference, name, &value, sizeof value),
          "cublasLtMatmulPreferenceSetAttribute");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, Cuda::kWorkspaceBytes);
  // Partial products in fp32, added up in order; none with atomics, none rounded to bf16 in between.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t(alignment(a)));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t(alignment(b)));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, uint32_t(p.add ? alignment(p.add) : alignment(p.out)));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, uint32_t(alignment(p.out)));
  plan.description = description;
  const bool residual = p.add && p.add != p.out;
  const std::vector<cublasLtMatmulAlgo_t> proposals = product_proposals(be, plan, preference, p.k, residual);
  cublasLtMatmulPreferenceDestroy(preference);
  plan.algorithm = proposals[0];
  return proposals;
}

// Starts the product by one of the proposals; what it gives goes to `out`.
template <class Real, class Out>
cublasStatus_t start_product(Cuda& be, const ProductPlan& plan, const cublasLtMatmulAlgo_t& algorithm,
                             const Product<Out>& p, Out* out, const Real* a, const Real* b) {
  const float one = 1, zero = 0;
  return cublasLtMatmul(be.blas, plan.description, &one, a, plan.a, b, plan.b, p.add ? &one : &zero,
                        p.add ? p.add : out, plan.out, out, plan.out, &algorithm, be.workspace, Cuda::kWorkspaceBytes,
                        be.stream);
}

// Inputs in Real, sums in fp32 (never TF32), out in Out. cuBLASLt may split k among blocks, but only to add up partial
// products from the workspace in a fixed order: no reduction scheme with atomics is let in.
template <class Real, class Out>
void multiply(Cuda& be, const Product<Out>& p, const Real* a, const Real* b) {
  using Key = std::tuple<int, int, int, bool, bool, bool, bool, int, int, int, int>;
  static std::map<std::pair<cublasLtHandle_t, Key>, ProductPlan> plans;
  const Key key = {p.m,
                   p.n,
                   p.k,
                   p.transpose_a,
                   p.transpose_b,
                   p.add != nullptr,
                   p.bias != nullptr,
                   alignment(a),
                   alignment(b),
                   alignment(p.out),
                   p.add ? alignment(p.add) : 256};
  ProductPlan& plan = plans[{be.blas, key}];
  std::vector<cublasLtMatmulAlgo_t> proposals;  // of a product met for the first time
  if (!plan.description) proposals = make_plan(be, plan, p, a, b);
  if (p.bias)
    check(cublasLtMatmulDescSetAttribute(plan.description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias, sizeof p.bias),
          "cublasLtMatmulDescSetAttribute");
  // cuBLASLt orders its proposals by an estimate; on an H100 the fastest at 65,536 x 768 x 2048 was the sixth, by 12 %.
  const size_t bytes = size_t(p.m) * p.n * sizeof(Out);
  const bool in_place = p.add == p.out;  // a gradient that accumulates: tried on a copy, lest it be added many times
  if (proposals.size() > 1 && 2.0 * p.m * p.n * p.k > 1e9 && !be.recording() &&
      (!in_place || be.available_memory() > bytes + (64u << 20))) {
    Buffer<Cuda> copy(be, in_place ? bytes : 0);
    Out* out = in_place ? copy.template as<Out>() : p.out;
    auto start = [&](int i) { return start_product(be, plan, proposals[i], p, out, a, b) == CUBLAS_STATUS_SUCCESS; };
    // A later proposal must be 2 % faster: less is noise.
    plan.algorithm =
        proposals[fastest_of_same_bits(be, out, bytes / sizeof(Out), int(proposals.size()), 0.98f, start)];
  }
  check(start_product(be, plan, plan.algorithm, p, p.out, a, b), "cublasLtMatmul");
}

#endif  // __CUDACC__
