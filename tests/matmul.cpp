// device/matmul.cuh against sums in double, over odd sizes, in all three ways that a linear layer uses it.

#define EIGEN_DONT_PARALLELIZE
#define EIGEN_NO_CUDA
#include <Eigen/Core>

#include "layers.cuh"
#include "device/matmul.cuh"
#include "tests/cuda.h"

#include <array>
#include <cmath>
#include <random>

#include <doctest/doctest.h>

namespace {

template <class Real>
std::vector<Real> random_matrix(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Real> values(count);
  for (Real& v : values) v = Real(random() % 2001) / 1000 - 1;
  return values;
}

// The largest error of c = start + a b, in units of the bound below.
template <class Real>
double worst(const std::vector<Real>& c, const std::vector<Real>& start, size_t start_stride, Strided<Real> a,
             Strided<Real> b, int M, int N, int K) {
  double worst = 0;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      double sum = start.empty() ? 0 : start[i * start_stride + j], size = std::abs(sum);
      for (int k = 0; k < K; ++k) {
        sum += double(*a.at(i, k)) * *b.at(k, j);
        size += std::abs(double(*a.at(i, k)) * *b.at(k, j));
      }
      // A sum of n rounded terms, in any order, is off by at most n eps/2 times the sum of their sizes (Higham, section
      // 4.2); double sums of double numbers are compared with each other, hence the factor 2.
      const double bound = std::numeric_limits<Real>::epsilon() * (K + 2) * size + 1e-300;
      worst = std::max(worst, std::abs(c[size_t(i) * N + j] - sum) / bound);
    }
  return worst;
}

template <class Real>
void check_shape(int M, int N, int K) {
  CAPTURE(M);
  CAPTURE(N);
  CAPTURE(K);
  const std::vector<Real> a = random_matrix<Real>(size_t(M) * K, 1), b = random_matrix<Real>(size_t(K) * N, 2),
                          start = random_matrix<Real>(size_t(M) * N, 3), none;
  std::vector<Real> c(size_t(M) * N, Real(NAN));
  const Strided<Real> ways_a[] = {row_major(a.data(), K), transposed(a.data(), M)};
  const Strided<Real> ways_b[] = {row_major(b.data(), N), transposed(b.data(), K)};
  for (Strided<Real> x : ways_a)
    for (Strided<Real> y : ways_b) {
      matmul<Real>(c.data(), nullptr, 0, x, y, M, N, K);
      CHECK(worst(c, none, 0, x, y, M, N, K) <= 1);
      matmul<Real>(c.data(), start.data(), N, x, y, M, N, K);
      CHECK(worst(c, start, N, x, y, M, N, K) <= 1);
      matmul<Real>(c.data(), start.data(), 0, x, y, M, N, K);  // a bias
      CHECK(worst(c, start, 0, x, y, M, N, K) <= 1);
      c = start;
      matmul<Real>(c.data(), c.data(), N, x, y, M, N, K);  // accumulate
      CHECK(worst(c, start, N, x, y, M, N, K) <= 1);
    }
}

}  // namespace

TEST_CASE("matmul equals sums in double, at every edge of tiles, panels and slices") {
  const int tile_rows = kTileRows, tile_columns = kTileColumns<float>;
  for (int M : {1, 3, tile_rows + 1, kRowBlock + 5})
    for (int N : {1, tile_columns, 2 * tile_columns + 3})
      for (int K : {1, 65, kDepth + 1}) {
        check_shape<float>(M, N, K);
        check_shape<double>(M, N, K);
      }
  check_shape<float>(3, 5, kSlabDepth + 3);  // more than one slab of b
  check_shape<float>(3, kSlabColumns + 2, 70);
}

TEST_CASE("matmul: what is packed begins with a cache line, however large") {
  const std::vector<double> b = random_values<double>(600 * 300, 1);
  for (int K : {1, 7, 64, 600}) {
    Kept<double> memory;
    CHECK(reinterpret_cast<uintptr_t>(pack(memory, row_major(b.data(), 300), K, 300).data) % 64 == 0);
  }
}

TEST_CASE("matmul with nothing to do: no rows, no columns, no terms") {
  std::vector<float> a(8), b(8), c = {1, 2, 3, 4};
  matmul<float>(c.data(), nullptr, 0, row_major(a.data(), 2), row_major(b.data(), 2), 0, 2, 2);
  matmul<float>(c.data(), nullptr, 0, row_major(a.data(), 2), row_major(b.data(), 2), 2, 0, 2);
  matmul<float>(c.data(), c.data(), 2, row_major(a.data(), 0), row_major(b.data(), 2), 2, 2, 0);
  CHECK(c == std::vector<float>{1, 2, 3, 4});
  matmul<float>(c.data(), nullptr, 0, transposed(a.data(), 3), transposed(b.data(), 0), 3, 1, 0);
  CHECK(c == std::vector<float>{0, 0, 0, 4});
}

TEST_CASE("matmul gives the same bits for any number of threads") {
  const int M = 131, N = 75, K = kSlabDepth + 900, threads = omp_get_max_threads();
  const std::vector<float> a = random_matrix<float>(size_t(M) * K, 1), b = random_matrix<float>(size_t(K) * N, 2);
  std::vector<float> one(size_t(M) * N), many(size_t(M) * N);
  for (bool transpose_a : {false, true})
    for (bool transpose_b : {false, true}) {
      const Strided<float> x = transpose_a ? transposed(a.data(), M) : row_major(a.data(), K);
      const Strided<float> y = transpose_b ? transposed(b.data(), K) : row_major(b.data(), N);
      omp_set_num_threads(1);
      matmul<float>(one.data(), nullptr, 0, x, y, M, N, K);
      for (int n : {2, 3, 7}) {
        omp_set_num_threads(n);
        matmul<float>(many.data(), nullptr, 0, x, y, M, N, K);
        CHECK(one == many);
      }
    }
  omp_set_num_threads(threads);
}

TEST_CASE("matmul: a linear layer's product is Eigen's") {
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const int N = 67, IC = 450, OC = 130;
  const std::vector<float> x = random_matrix<float>(size_t(N) * IC, 5), w = random_matrix<float>(size_t(OC) * IC, 6);
  std::vector<float> y(size_t(N) * OC, NAN);
  Cpu be;
  linear_forward(be, y.data(), x.data(), w.data(), (const float*)nullptr, N, IC, OC);
  const Eigen::Map<const Matrix> X(x.data(), N, IC), W(w.data(), OC, IC), Y(y.data(), N, OC);
  const Matrix expected = X * W.transpose(), sizes = X.cwiseAbs() * W.cwiseAbs().transpose();
  // Both round IC terms in orders of their own: each is off by at most IC eps/2 times the sum of the terms' sizes.
  const Matrix bound = sizes * (IC * std::numeric_limits<float>::epsilon());
  CHECK(((Y - expected).cwiseAbs().array() <= bound.array()).all());
}

#ifdef __CUDACC__

// A sum of K products in fp32, in any order, is off by at most K half units of the sum of their absolute values; twice
// that, as the CPU's sum is in fp32 too.
static Values sums_of(const Values& a, const Values& b, int M, int N, int K, bool by_column) {
  const Values x = absolute(a), y = absolute(b);
  Values sums(size_t(M) * N);
  matmul<float>(sums.data(), nullptr, 0, row_major(x.data(), K),
                by_column ? transposed(y.data(), K) : row_major(y.data(), N), M, N, K);
  for (float& sum : sums) sum *= 2 * (K + 2) * 0x1p-24f;
  return sums;
}

TEST_CASE("cuda: every way that cuBLASLt proposes is right, also where it splits sums that do not divide evenly") {
  NEEDS_GPU;
  const int K = 4104;  // the head's input gradient with as large a vocabulary
  for (auto [M, N] : {std::pair{16, 64}, {64, 256}, {130, 384}, {1024, 128}, {8, 768}}) {
    CAPTURE(M);
    CAPTURE(N);
    const Values dout = numbers<bf16>(size_t(M) * K, 1), weight = numbers<bf16>(size_t(K) * N, 2);
    Values want(size_t(M) * N);
    matmul<float>(want.data(), nullptr, 0, row_major(dout.data(), K), row_major(weight.data(), N), M, N, K);
    const Values sums = sums_of(dout, weight, M, N, K, false);
    Tensor<bf16> a(weight), b(dout);
    Tensor<bf16> shape(want.size());
    const Product<bf16> product = {shape(), nullptr, nullptr, N, M, K, false, false};
    ProductPlan plan;
    const auto proposals = make_plan(*gpu(), plan, product, a(), b());
    CHECK(proposals.size() > 1);
    for (const cublasLtMatmulAlgo_t& algorithm : proposals) {
      Tensor<bf16> got(want.size());
      REQUIRE(start_product(*gpu(), plan, algorithm, product, got(), a(), b()) == CUBLAS_STATUS_SUCCESS);
      close("product", got.host(), want, kRound<bf16>, 1, sums);
    }
  }
}

TEST_CASE("cuda: no way to add a residual is one of those that went wrong on a GPU that two processes share") {
  NEEDS_GPU;
  const int N = 65536, C = 256;  // where it was seen
  Tensor<bf16> inp(size_t(N) * C), weight(size_t(C) * C), residual(size_t(N) * C), out(size_t(N) * C);
  const Product<bf16> product = {out(), residual(), nullptr, C, N, C, true, false};
  ProductPlan plan;
  for (const cublasLtMatmulAlgo_t& algorithm : make_plan(*gpu(), plan, product, weight(), inp())) {
    int id = 0, tile = 0;
    REQUIRE(cublasLtMatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_ID, &id, sizeof id, nullptr) == 0);
    REQUIRE(cublasLtMatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof tile,
                                                 nullptr) == 0);
    CHECK_FALSE((id == 66 && (tile == CUBLASLT_MATMUL_TILE_128x160 || tile == CUBLASLT_MATMUL_TILE_128x192)));
  }
}

TEST_CASE("cuda: the product of our own, as it is and with SwiGLU, at sizes that fit no tile") {
  NEEDS_GPU;
  NEEDS_HOPPER;
  // Rows, F, K: a part of a tile, several tiles for a block to make one after the other, slices that K does not fill.
  for (auto [M, F, K] : {std::array{1, 64, 8}, {100, 128, 64}, {300, 704, 200}, {129, 192, 1032}, {5000, 1024, 136}}) {
    if (small() && M > 1000) continue;
    CAPTURE(M);
    CAPTURE(F);
    CAPTURE(K);
    const int N = 2 * F;
    const Values inp = numbers<bf16>(size_t(M) * K, 3), weight = numbers<bf16>(size_t(N) * K, 4, 0.1f);
    Values want(size_t(M) * N);
    matmul<float>(want.data(), nullptr, 0, row_major(inp.data(), K), transposed(weight.data(), K), M, N, K);
    Tensor<bf16> a(inp), b(weight), got(want.size()), gate_up(want.size()), act(size_t(M) * F), act_apart(act.n);
    gemm::multiply(*gpu(), got(), a(), b(), M, N, K, gemm::Store{});
    close("product", got.host(), want, kRound<bf16>, 1, sums_of(inp, weight, M, N, K, true));
    gemm::multiply(*gpu(), gate_up(), a(), b(), M, N, K, gemm::SwiGlu{act()});
    CHECK(same_bits(gate_up.bits(), got.bits()));
    swiglu_forward(*gpu(), act_apart(), got(), M, F);
    CHECK(same_bits(act.bits(), act_apart.bits()));
  }
}

TEST_CASE("cuda: the product of our own with SwiGLU's gradient, at sizes that fit no tile") {
  NEEDS_GPU;
  NEEDS_HOPPER;
  for (auto [M, F, K] : {std::array{1, 8, 8}, {100, 64, 64}, {300, 704, 200}, {129, 200, 1032}, {5000, 1032, 136}}) {
    if (small() && M > 1000) continue;
    CAPTURE(M);
    CAPTURE(F);
    CAPTURE(K);
    const Values dout = numbers<bf16>(size_t(M) * K, 3), weight = numbers<bf16>(size_t(K) * F, 4, 0.1f);
    Values want(size_t(M) * F);
    matmul<float>(want.data(), nullptr, 0, row_major(dout.data(), K), row_major(weight.data(), F), M, F, K);
    Tensor<bf16> a(dout), b(weight), gate_up(numbers<bf16>(size_t(M) * 2 * F, 5)), dact(want.size());
    gemm::multiply<true>(*gpu(), dact(), a(), b(), M, F, K, gemm::Store{});
    close("product", dact.host(), want, kRound<bf16>, 1, sums_of(dout, weight, M, F, K, false));
    Tensor<bf16> got(gate_up.n), apart(gate_up.n);
    gemm::multiply<true>(*gpu(), got(), a(), b(), M, F, K, gemm::SwiGluBackward{gate_up(), got()});
    swiglu_backward(*gpu(), apart(), dact(), gate_up(), M, F);
    CHECK(same_bits(got.bits(), apart.bits()));
  }
}

TEST_CASE("cuda: the product of our own with a residual, of one pair of factors or of two, at sizes that fit no tile") {
  NEEDS_GPU;
  NEEDS_HOPPER;
  // Rows, N, K of the first pair and of the second (0: none).
  for (auto [M, N, K, K2] : {std::array{1, 8, 8, 0}, {100, 64, 64, 8}, {300, 264, 1032, 0}, {129, 200, 200, 1032},
                             {5000, 776, 264, 0}, {5000, 1032, 136, 712}}) {
    if (small() && M > 1000) continue;
    CAPTURE(M);
    CAPTURE(N);
    CAPTURE(K);
    CAPTURE(K2);
    const Values inp = numbers<bf16>(size_t(M) * K, 3), weight = numbers<bf16>(size_t(N) * K, 4, 0.1f),
                 inp2 = numbers<bf16>(size_t(M) * K2, 5), weight2 = numbers<bf16>(size_t(N) * K2, 6, 0.1f),
                 residual = numbers<bf16>(size_t(M) * N, 7);
    Values want = residual, sums = absolute(residual);
    auto add_product = [&](Values& to, const Values& x, const Values& w, int depth) {
      matmul<float>(to.data(), to.data(), N, row_major(x.data(), depth), transposed(w.data(), depth), M, N, depth);
    };
    add_product(want, inp, weight, K), add_product(want, inp2, weight2, K2);
    add_product(sums, absolute(inp), absolute(weight), K), add_product(sums, absolute(inp2), absolute(weight2), K2);
    for (float& sum : sums) sum *= 2 * (K + K2 + 2) * 0x1p-24f;
    Tensor<bf16> a(inp), b(weight), a2(inp2), b2(weight2), r(residual), got(want.size());
    gemm::multiply(*gpu(), got(), a(), b(), M, N, K, gemm::Residual(r(), M, N), a2(), b2(), K2);
    close("product", got.host(), want, kRound<bf16>, 1, sums);
  }
}

TEST_CASE("cuda: the product of our own with RoPE") {
  NEEDS_GPU;
  NEEDS_HOPPER;
  // Heads of queries, of keys, their size, and K: the last heads of a row share a tile with values, or have it for
  // themselves; K is one slice to fourteen. There are more tiles than blocks, or fewer.
  for (auto [NH, NKV, HS, K] : {std::array{12, 12, 64, 72}, {2, 2, 128, 264}, {6, 1, 64, 840}, {3, 1, 256, 200},
                                {8, 2, 32, 392}, {16, 8, 16, 64}})
    for (int R : {2, 4, 6, 8, 10, 12, 14, 16, 26, 32, 48, 64, 128, 256})
      for (RopePairs pairs : {RopePairs::half, RopePairs::interleaved})
        for (int T : {67, 192}) {  // positions of a tile's rows follow each other, or begin anew somewhere
          if (R > HS || R != kRotaryDim.value_or(R) || (T == 192 && R != HS)) continue;
          CAPTURE(HS);
          CAPTURE(R);
          CAPTURE(T);
          CAPTURE(int(pairs));
          const int N = (NH + 2 * NKV) * HS;
          const bool many = !small() && (R == 6 || R == 16 || R == HS);
          const RopeShape s = {many ? 10000000 / N / T : 1 + !small() * 6, T, NH, NKV, HS};
          const int M = s.B * s.T;
          const DeviceTable table(s.T, R, pairs);
          Tensor<bf16> inp(numbers<bf16>(size_t(M) * K, 3)), weight(numbers<bf16>(size_t(N) * K, 4)),
              got(size_t(M) * N), apart(got.n);
          const bool has_epilogue = with_rope_epilogue(table.on_gpu, s, [&](auto epilogue) {
            gemm::multiply(*gpu(), got(), inp(), weight(), M, N, K, epilogue);
          });
          CHECK(has_epilogue == (R != 26));
          if (!has_epilogue) continue;
          gemm::multiply(*gpu(), apart(), inp(), weight(), M, N, K, gemm::Store{});
          rope_forward(*gpu(), apart(), table.on_gpu, s);
          CHECK(same_bits(got.bits(), apart.bits()));
        }
}

TEST_CASE("cuda: a linear layer with RoPE, and with SwiGLU's gradient, gives the bits of its two operations") {
  NEEDS_GPU;
  const int B = small() ? 1 : 4, T = 600, C = 768, NH = 12, HS = 64, F = 704, N = B * T, QKV = 3 * C;
  const DeviceTable table(T, 16, RopePairs::half);
  Tensor<bf16> x(numbers<bf16>(size_t(N) * C, 3)), w_qkv(numbers<bf16>(size_t(QKV) * C, 4, 0.1f)), qkv(size_t(N) * QKV),
      qkv_apart(qkv.n);
  const RopeShape s = {B, T, NH, NH, HS};
  if (kRotaryDim.value_or(16) == 16)
    for (int turn = 0; turn < 2; ++turn) {  // which way is taken is decided in the first
      linear_rope_forward(*gpu(), qkv(), x(), w_qkv(), (const bf16*)nullptr, table.on_gpu, s, C);
      linear_forward(*gpu(), qkv_apart(), x(), w_qkv(), (const bf16*)nullptr, N, C, QKV);
      rope_forward(*gpu(), qkv_apart(), table.on_gpu, s);
      CHECK(same_bits(qkv.bits(), qkv_apart.bits()));
    }
  Tensor<bf16> w_down(numbers<bf16>(size_t(C) * F, 5, 0.1f)), act(numbers<bf16>(size_t(N) * F, 6)),
      gate_up(numbers<bf16>(size_t(N) * 2 * F, 7)), dact(act.n), dgate_up(gate_up.n), dgate_up_apart(gate_up.n);
  const Values zeros(size_t(C) * F), none(C);
  for (int turn = 0; turn < 2; ++turn) {
    Tensor<float> dweight(zeros), dbias(none), dweight_apart(zeros), dbias_apart(none);
    linear_swiglu_backward(*gpu(), dgate_up(), dact(), dweight(), dbias(), x(), act(), gate_up(), w_down(), N, F, C);
    linear_backward(*gpu(), dact(), dweight_apart(), dbias_apart(), x(), act(), w_down(), N, F, C);
    swiglu_backward(*gpu(), dgate_up_apart(), dact(), gate_up(), N, F);
    CHECK(same_bits(dgate_up.bits(), dgate_up_apart.bits()));
    CHECK(same_bits(dweight.bits(), dweight_apart.bits()));
    CHECK(same_bits(dbias.bits(), dbias_apart.bits()));
  }
}

#endif  // __CUDACC__
