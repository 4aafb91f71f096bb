// From three loops to cuBLASLt: the product of a linear layer, C = A B^T, one idea a rung.
//
//   matmul_ladder     holds every rung against the definition, times it at two shapes and prints the table of
//                     docs/kernels.md. Exit code 1 if a rung is wrong
//
// A (N, K), B (M, K) and C (N, M) are bf16 and row-major, sums fp32: A are the activations of N tokens, B the weights,
// as in linear_forward(). Both are read along k. K is a multiple of 64 and M of 8. Rungs are read one after the other,
// with the one before beside them (`diff`).

#include <array>
#include <cstdio>

#include "bench/ladder.h"
#include "layers.cuh"

namespace {

using namespace flash;

// ---------------------------------------------------------------------------------------------------------------------
// Rung 1: a thread works out one element. For each multiply-add it fetches two numbers.

__global__ void __launch_bounds__(256) naive_kernel(bf16* C, const bf16* A, const bf16* B, int N, int M, int K) {
  const size_t i = blockIdx.x * size_t(256) + threadIdx.x;
  if (i >= size_t(N) * M) return;
  const bf16 *a = A + i / M * K, *b = B + i % M * K;
  float sum = 0;
  for (int k = 0; k < K; ++k) sum += float(a[k]) * float(b[k]);
  C[i] = bf16(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rung 2: tiles in shared memory. The 32 x 32 elements of a block share 32 rows of A and of B: the block brings 32 of
// k at a time into shared memory, and each number is fetched once for 32 elements.

__global__ void __launch_bounds__(1024) tiles_kernel(bf16* C, const bf16* A, const bf16* B, int N, int M, int K) {
  __shared__ float a[32][33], b[32][33];  // 33: a column's numbers lie in distinct banks
  const int x = threadIdx.x % 32, y = threadIdx.x / 32, n0 = blockIdx.y * 32, m0 = blockIdx.x * 32;
  float sum = 0;
  for (int k0 = 0; k0 < K; k0 += 32) {
    a[y][x] = n0 + y < N ? float(A[size_t(n0 + y) * K + k0 + x]) : 0.0f;
    b[y][x] = m0 + y < M ? float(B[size_t(m0 + y) * K + k0 + x]) : 0.0f;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 32; ++k) sum += a[y][k] * b[x][k];
    __syncthreads();
  }
  if (n0 + y < N && m0 + x < M) C[size_t(n0 + y) * M + m0 + x] = bf16(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rung 3: register tiles. A thread works out 8 x 8 elements: with 16 numbers from shared memory it makes 64
// multiply-adds, where rung 2 made one with two. A block's 256 threads have 128 x 128 elements.

__global__ void __launch_bounds__(256) registers_kernel(bf16* C, const bf16* A, const bf16* B, int N, int M, int K) {
  __shared__ __align__(16) float a[16][128], b[16][128];  // 16 of k; transposed, so that a thread's rows lie together
  const int x = threadIdx.x % 16, y = threadIdx.x / 16, n0 = blockIdx.y * 128, m0 = blockIdx.x * 128;
  const int row = threadIdx.x % 128, run = threadIdx.x / 128 * 8;  // what the thread copies: 8 of k
  float sum[8][8] = {};
  for (int k0 = 0; k0 < K; k0 += 16) {
    float x_a[8] = {}, x_b[8] = {};
    if (n0 + row < N) load<8>(x_a, A + size_t(n0 + row) * K + k0 + run);
    if (m0 + row < M) load<8>(x_b, B + size_t(m0 + row) * K + k0 + run);
    __syncthreads();  // all are done with the tiles before
#pragma unroll
    for (int k = 0; k < 8; ++k) a[run + k][row] = x_a[k], b[run + k][row] = x_b[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      // Rows 4y to 4y + 3 and the same 64 further, columns alike: lanes next to each other read 16 bytes next to each
      // other.
      float u[2][4], v[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load<4>(u[half], &a[k][64 * half + 4 * y]);
        load<4>(v[half], &b[k][64 * half + 4 * x]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] += u[i / 4][i % 4] * v[j / 4][j % 4];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int n = n0 + i / 4 * 64 + 4 * y + i % 4, m = m0 + j / 4 * 64 + 4 * x + j % 4;
      if (n < N && m < M) C[size_t(n) * M + m] = bf16(sum[i][j]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rung 4: tensor cores. The tiles stay bf16 in shared memory, 64 of k at a time, and a warp has 64 x 32 of the block's
// 128 x 128 elements: with mma.sync its 32 threads together make 16 x 8 x 16 multiply-adds per instruction.

constexpr int kSide = 128, kRun = 64;  // elements of C a side, and k at a time
using Piece = Tile<kSide, kRun>;

// The warp's first row and column among the block's.
__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / 4 * 64; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 4 * 32; }

// acc += a b^T for the warp's 64 x 32 elements: 4 x 4 pieces of 16 x 8, in the fragments that tiles.cuh describes.
__device__ __forceinline__ void multiply_pieces(float (&acc)[4][4][4], Piece a, Piece b) {
#pragma unroll
  for (int k = 0; k < kRun / 16; ++k) {
    uint32_t x[4][4], y[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) ldmatrix<0>(x[i], a.address(warp_row() + i * 16 + lane() % 16, 2 * k + lane() / 16));
#pragma unroll
    for (int j = 0; j < 2; ++j)
      ldmatrix<0>(y[j], b.address(warp_column() + j * 16 + lane() / 16 * 8 + lane() % 8, 2 * k + lane() / 8 % 2));
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_sync::mma(acc[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
  }
}

__device__ __forceinline__ void store_pieces(bf16* C, const float (&acc)[4][4][4], int n0, int m0, int N, int M) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = n0 + warp_row() + i * 16 + half * 8 + lane() / 4;
        const int m = m0 + warp_column() + j * 8 + lane() % 4 * 2;
        if (n < N && m < M)
          *reinterpret_cast<uint32_t*>(C + size_t(n) * M + m) = pack_pair(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
      }
}

__global__ void __launch_bounds__(256, 2) tensor_kernel(bf16* C, const bf16* A, const bf16* B, int N, int M, int K) {
  const int n0 = blockIdx.y * kSide, m0 = blockIdx.x * kSide;
  const Piece a{shared_start()}, b{a.at + a.kBytes};
  float acc[4][4][4] = {};
  for (int k0 = 0; k0 < K; k0 += kRun) {
    __syncthreads();
    copy_tile<256>(a, A + k0, K, n0, N);
    copy_tile<256>(b, B + k0, K, m0, M);
    __syncthreads();
    multiply_pieces(acc, a, b);
  }
  store_pieces(C, acc, n0, m0, N, M);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rung 5: asynchronous copies. cp.async moves data from global to shared memory past the registers; with two pairs of
// tiles the next one arrives while this one is multiplied, and one barrier a tile is enough.

__global__ void __launch_bounds__(256, 2) async_kernel(bf16* C, const bf16* A, const bf16* B, int N, int M, int K) {
  const int n0 = blockIdx.y * kSide, m0 = blockIdx.x * kSide;
  auto a = [&](int k0) { return Piece{shared_start() + k0 / kRun % 2 * 2 * Piece::kBytes}; };
  auto b = [&](int k0) { return Piece{a(k0).at + Piece::kBytes}; };
  auto start_copies = [&](int k0) {
    load_tile<256>(a(k0), A + k0, K, n0, N);
    load_tile<256>(b(k0), B + k0, K, m0, M);
    commit_loads();
  };
  float acc[4][4][4] = {};
  start_copies(0);
  for (int k0 = 0; k0 < K; k0 += kRun) {
    wait_loads();  // this pair is here, and all are done with the one before: its place is free
    if (k0 + kRun < K) start_copies(k0 + kRun);
    multiply_pieces(acc, a(k0), b(k0));
  }
  store_pieces(C, acc, n0, m0, N, M);
}

// ---------------------------------------------------------------------------------------------------------------------
// The rung for Hopper is device/gemm.cuh; the last is linear_forward() in layers.cuh: cuBLASLt.

// A small shape, its input, and what the definition makes of it: c = sum_k a b, and the bound of its error.
struct Case {
  int N, M, K;
  std::vector<bf16> a, b;
  std::vector<double> c, bounds;
};

std::vector<Case> small_cases() {
  std::vector<Case> cases;
  for (const auto& [N, M, K] : {std::array{1, 8, 64}, {17, 136, 128}, {131, 40, 192}, {200, 264, 768}}) {
    Case x{N, M, K, {}, {}, {}, {}};
    std::mt19937 random(N);
    std::normal_distribution<float> normal;
    for (int i = 0; i < N * K; ++i) x.a.push_back(bf16(normal(random)));
    for (int i = 0; i < M * K; ++i) x.b.push_back(bf16(normal(random)));
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) {
        double sum = 0, sizes = 0;
        for (int k = 0; k < K; ++k) {
          const double product = double(x.a[n * K + k]) * double(x.b[m * K + k]);
          sum += product, sizes += std::fabs(product);
        }
        x.c.push_back(sum);
        // Products of bf16 are exact in fp32; each of K additions is off by at most 2^-23 of the sum of sizes (tensor
        // cores truncate), and the result is rounded to half a unit in the last of 8 bits.
        x.bounds.push_back(K * 0x1p-23 * sizes + 0x1p-8 * std::fabs(sum) + 1e-37);
      }
    cases.push_back(std::move(x));
  }
  return cases;
}

template <class Multiply>
Error test(const std::vector<Case>& cases, Multiply multiply) {
  Error worst;
  for (const Case& x : cases) {
    Buffer<Cuda> a(*be, x.a.size() * 2), b(*be, x.b.size() * 2), c(*be, x.c.size() * 2);
    be->upload(a.data, x.a.data(), a.bytes);
    be->upload(b.data, x.b.data(), b.bytes);
    check(cudaMemsetAsync(c.data, 0xff, c.bytes, be->stream), "cudaMemsetAsync");  // NaN: what is left out is found
    multiply(c.as<bf16>(), a.as<const bf16>(), b.as<const bf16>(), x.N, x.M, x.K);
    std::vector<bf16> got(x.c.size());
    be->download(got.data(), c.data, c.bytes);
    for (size_t i = 0; i < got.size(); ++i) worst.add(double(got[i]), x.c[i], x.bounds[i]);
  }
  return worst;
}

bool ladder() {
  const std::vector<Case> cases = small_cases();
  const std::array<int, 3> shapes[] = {{65536, 4096, 768}, {4096, 4096, 4096}};  // N, M, K: a 12 x 768 model's `up`
  std::vector<LargeShape> large;
  std::vector<Tensor<bf16>> a, b, c;
  for (const auto& [N, M, K] : shapes) {
    char name[64];
    std::snprintf(name, sizeof name, "%d x %d x %d", N, M, K);
    large.push_back({name, 2.0 * N * M * K});
    a.emplace_back(size_t(N) * K);
    b.emplace_back(size_t(M) * K, 0.02f);
    c.emplace_back(size_t(N) * M);
  }
  std::vector<Rung> rungs;
  auto rung = [&](const char* idea, const char* verdict, auto multiply) {
    rungs.push_back(
        {idea, verdict, [&cases, multiply] { return test(cases, multiply); },
         [&, multiply](int i) { multiply(c[i](), a[i](), b[i](), shapes[i][0], shapes[i][1], shapes[i][2]); }});
  };
  // By tiles of `side` x `side` elements; neighbouring blocks share their rows of A.
  auto by_tiles = [](auto* kernel, int side, int threads, size_t shared_bytes) {
    return [=](bf16* C, const bf16* A, const bf16* B, int N, int M, int K) {
      launch(*be, "rung", kernel, dim3(divide_up(M, side), divide_up(N, side)), threads, shared_bytes, C, A, B, N, M,
             K);
    };
  };
  rung("a thread an element", "two numbers are fetched for every multiply-add: the caches are the limit",
       [](bf16* C, const bf16* A, const bf16* B, int N, int M, int K) {
         launch(*be, "rung", naive_kernel, divide_up(size_t(N) * M, 256), 256, 0, C, A, B, N, M, K);
       });
  rung("32 x 32 tiles in shared memory", "still two numbers for every multiply-add, only from nearer by",
       by_tiles(tiles_kernel, 32, 1024, 0));
  rung("register tiles: 8 x 8 elements a thread", "a number from shared memory serves 8 times; near what fp32 units do",
       by_tiles(registers_kernel, 128, 256, 0));
  rung("tensor cores (mma.sync)", "the multiply-adds are nearly free now, and the warps wait for their tiles",
       by_tiles(tensor_kernel, kSide, 256, 2 * Piece::kBytes));
  rung("asynchronous copies (cp.async) into a second pair of tiles", "the copy hides behind the products",
       by_tiles(async_kernel, kSide, 256, 4 * Piece::kBytes));
  if (gemm::supports(*be, 8, 8, nullptr, nullptr, nullptr))
    rung("gemm.cuh: wgmma, tiles fetched by TMA for two blocks at once", "what trains where SwiGLU can follow in it",
         [](bf16* C, const bf16* A, const bf16* B, int N, int M, int K) {
           gemm::multiply(*be, C, A, B, N, M, K, gemm::Store{});
         });
  rung("cuBLASLt, as linear_forward() calls it", "what trains elsewhere; the same instructions, tuned for longer",
       [](bf16* C, const bf16* A, const bf16* B, int N, int M, int K) {
         linear_forward(*be, C, A, B, (const bf16*)nullptr, N, K, M);
       });
  return climb("C (N, M) = A (N, K) B (M, K)^T, bf16, at N x M x K", large, rungs);
}

}  // namespace

int main() { return run_ladder(ladder); }
