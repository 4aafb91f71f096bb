#pragma once
// What the CUDA tests share. They hold every operation, forward and backward, in fp32 and bf16, against the CPU, at
// sizes that fit no tile.
//
// For bf16 the CPU works in fp32 on the same inputs, rounded to bf16. Outputs are poisoned with NaN first, so an
// element that a kernel leaves out is found. Compiled with nvcc -x cu; without a GPU the tests say that they were
// skipped. CUDA_TESTS=small leaves the large sizes out, for compute-sanitizer.

#include "device/backend.h"
#include "tests/helpers.h"

#ifdef __CUDACC__

#include "rope.cuh"

// The GPU, or nullptr where there is none. One for all tests: a Cuda owns a stream and a workspace.
inline Cuda* gpu() {
  static Cuda* be = []() -> Cuda* {
    try {
      return new Cuda();
    } catch (const UserError&) {
      MESSAGE("no CUDA GPU here: the CUDA tests are skipped");
      return nullptr;
    }
  }();
  return be;
}
inline bool small() { return std::getenv("CUDA_TESTS") && std::string(std::getenv("CUDA_TESTS")) == "small"; }
inline std::vector<int> lengths() { return small() ? std::vector<int>{1, 17, 65} : std::vector<int>{1, 17, 65, 1000}; }

using Values = std::vector<float>;
inline Cpu cpu;

// Half a unit in the last place, relative: what one rounding to Real may cost. bf16 has 8 significant bits, fp32 24.
template <class Real>
constexpr double kRound = std::is_same_v<Real, bf16> ? 0x1p-8 : 0x1p-24;

template <class Real>
float round_to(float x) {
  return float(Real(x));
}

// n normal numbers that Real can hold.
template <class Real>
Values numbers(size_t n, int seed, float deviation = 1, float mean = 0) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, deviation);
  Values x(n);
  for (float& value : x) value = round_to<Real>(normal(random));
  return x;
}
inline Values absolute(Values x) {
  for (float& value : x) value = std::fabs(value);
  return x;
}

// A tensor on the GPU. Made from a size, it is full of NaN.
template <class T>
struct Tensor {
  Buffer<Cuda> memory;
  size_t n;
  explicit Tensor(size_t count) : memory(*gpu(), count * sizeof(T)), n(count) {
    check(cudaMemsetAsync(memory.data, 0xff, n * sizeof(T), gpu()->stream), "cudaMemsetAsync");
  }
  template <class U>
  explicit Tensor(const std::vector<U>& host) : Tensor(host.size()) {
    std::vector<T> values(host.begin(), host.end());
    gpu()->upload(memory.data, values.data(), n * sizeof(T));
    gpu()->synchronize();
  }
  T* operator()() const { return memory.template as<T>(); }  // its address on the GPU
  std::vector<T> bits() const {
    std::vector<T> values(n);
    gpu()->download(values.data(), memory.data, n * sizeof(T));
    return values;
  }
  Values host() const {
    std::vector<T> values = bits();
    return Values(values.begin(), values.end());
  }
};

// Each |got - want| <= relative |want| + absolute sum; sum is one number or, per element, the sum of the absolute
// values of the terms that make up the element.
inline void close(const char* what, const Values& got, const Values& want, double relative, double absolute,
                  const Values& sums = {1}) {
  REQUIRE(got.size() == want.size());
  double worst = 0;
  size_t at = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double bound = relative * std::fabs(want[i]) + absolute * sums[sums.size() == 1 ? 0 : i] + 1e-37;
    const double excess = std::isfinite(got[i]) ? std::fabs(double(got[i]) - want[i]) / bound : INFINITY;
    if (excess > worst) worst = excess, at = i;
  }
  INFO(std::string(what) << ": element " << at << " of " << got.size() << " is " << got[at] << ", should be "
                         << want[at]);
  CHECK(worst <= 1);
}

#define NEEDS_GPU \
  if (!gpu()) return
// The products of our own are for Hopper.
#define NEEDS_HOPPER                                               \
  if (gpu()->capability != 90) {                                   \
    MESSAGE("this GPU is not of compute capability 9.0: skipped"); \
    return;                                                        \
  }
#define BOTH_TYPES float, bf16

struct DeviceTable {
  Values host;
  Tensor<float> device;
  RopeTable on_cpu, on_gpu;
  DeviceTable(int positions, int R, RopePairs pairs)
      : host(size_t(positions) * R + 1), device(fill(host, positions, R)) {
    on_cpu = {host.data(), positions, R, pairs};
    on_gpu = {device(), positions, R, pairs};
  }
  static Values& fill(Values& host, int positions, int R) {
    rope_fill_table(host.data(), positions, R, 10000);
    return host;
  }
};

// Calls test(shape, R, pairs) for the shapes of the packed buffer that RoPE and QK-Norm are tested at.
template <class Test>
void for_head_shapes(std::vector<int> head_sizes, Test test) {
  for (int T : lengths())
    for (int NKV : {1, 4})
      for (int HS : head_sizes)
        for (int R : std::set<int>{0, 2, 6, 16, HS / 4 / 2 * 2, HS / 2 * 2})
          for (RopePairs pairs : {RopePairs::half, RopePairs::interleaved})
            for (int first : {0, T / 2}) {
              if (R > HS || R != kRotaryDim.value_or(R)) continue;
              CAPTURE(T);
              CAPTURE(NKV);
              CAPTURE(HS);
              CAPTURE(R);
              CAPTURE(int(pairs));
              CAPTURE(first);
              test(RopeShape{2, T, 4, NKV, HS, first}, R, pairs);
            }
}

#endif  // __CUDACC__
