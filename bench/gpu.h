#pragma once
// What the measurements on a GPU share: the GPU, its clock, tensors of random numbers.

#include <algorithm>
#include <random>
#include <vector>

#include "device/backend.h"

static Cuda* be;  // the program's GPU, set first of all in main()

// Milliseconds of work() on the GPU, the median of some runs after two to warm up.
template <class Work>
double milliseconds(Work work, int runs = 10) {
  std::vector<float> times;
  for (int i = 0; i < runs + 2; ++i) {
    const float ms = milliseconds_once(*be, work);
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// A tensor of random numbers; time on zeros would flatter.
template <class T>
struct Tensor {
  Buffer<Cuda> memory;
  explicit Tensor(size_t n, float deviation = 1) : memory(*be, n * sizeof(T)) {
    std::vector<T> host(std::min<size_t>(n, 1 << 20));
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0, deviation);
    for (T& x : host) x = T(normal(random));
    for (size_t i = 0; i < n; i += host.size())
      be->upload(memory.template as<T>() + i, host.data(), std::min(host.size(), n - i) * sizeof(T));
    be->synchronize();
  }
  T* operator()() const { return memory.template as<T>(); }  // its address on the GPU
};
