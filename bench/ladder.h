#pragma once
// A ladder: the same operation several times, each time with one idea more. Every rung is held against the definition,
// then timed; the table at the end is that of docs/kernels.md.

#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "bench/gpu.h"
#include "device/flash_hopper.cuh"

// How far results are from the definition: the element that is worst in units of what it is allowed.
struct Error {
  double size = 0, allowed = 1;
  void add(double got, double want, double bound) {
    const double here = std::isfinite(got) ? std::fabs(got - want) : INFINITY;
    if (here / bound > size / allowed) size = here, allowed = bound;
  }
};

struct Rung {
  std::string idea, verdict;
  std::function<Error()> test;    // on small shapes
  std::function<void(int)> work;  // on a large shape, by its number
};
struct LargeShape {
  std::string name;
  double flops;
};

// Tests and times all rungs, prints the table. A rung that fails does not stop the others. True if all are right.
inline bool climb(const char* title, const std::vector<LargeShape>& shapes, const std::vector<Rung>& rungs) {
  std::printf("%s\n", title);
  std::vector<std::vector<double>> rates(rungs.size());  // TFLOP/s, by shape; none: failed
  bool all = true;
  for (size_t r = 0; r < rungs.size(); ++r) {
    std::string result;
    try {
      const Error e = rungs[r].test();
      char error[80];
      std::snprintf(error, sizeof error, "largest error %.2e, allowed there %.2e", e.size, e.allowed);
      result = error;
      if (!(e.size <= e.allowed)) throw std::runtime_error(error);
      for (size_t i = 0; i < shapes.size(); ++i) {
        const double once = milliseconds([&] { rungs[r].work(i); }, 1);
        const int runs = int(std::min(20.0, std::max(3.0, 300 / once)));
        rates[r].push_back(shapes[i].flops * 1e-9 / milliseconds([&] { rungs[r].work(i); }, runs));
      }
    } catch (const std::exception& error) {
      result = std::string("FAILED: ") + error.what();
      rates[r].clear();
      all = false;
    }
    std::printf("  rung %zu, %s: %s\n", r + 1, rungs[r].idea.c_str(), result.c_str());
    std::fflush(stdout);
  }

  std::printf("\n| rung | idea |");
  for (const LargeShape& shape : shapes) std::printf(" %s: TFLOP/s | ratio |", shape.name.c_str());
  std::printf(" verdict |\n|---|---|");
  for (size_t i = 0; i < shapes.size(); ++i) std::printf("---|---|");
  std::printf("---|\n");
  for (size_t r = 0; r < rungs.size(); ++r) {
    std::printf("| %zu | %s |", r + 1, rungs[r].idea.c_str());
    for (size_t i = 0; i < shapes.size(); ++i) {
      if (rates[r].empty()) {
        std::printf(" FAILED | |");
        continue;
      }
      std::printf(rates[r][i] < 10 ? " %.1f |" : " %.0f |", rates[r][i]);
      if (r > 0 && !rates[r - 1].empty())
        std::printf(" %.2f |", rates[r][i] / rates[r - 1][i]);
      else
        std::printf(" |");
    }
    std::printf(" %s |\n", rungs[r].verdict.c_str());
  }
  std::printf("\n");
  return all;
}

// The body of a ladder's main(): 1 if a rung is wrong, 2 if it cannot be climbed here.
template <class Ladder>
int run_ladder(Ladder ladder) {
  try {
    Cuda cuda;
    be = &cuda;
    if (be->capability < 80) throw UserError("tensor cores multiply bf16 from compute capability 8.0 on");
    return ladder() ? 0 : 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 2;
  }
}

// Rows first .. first+ROWS-1 of a matrix (T, HS), `stride` elements from row to row, to a tile, by THREADS threads, by
// way of their registers, 16 bytes at a time; rows from T on become zeros. flash::load_tile() does it without
// registers.
template <int THREADS, int ROWS, int HS>
__device__ __forceinline__ void copy_tile(flash::Tile<ROWS, HS> tile, const bf16* source, size_t stride, int first,
                                          int T) {
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * HS / 8; i += THREADS) {
    const int row = i / (HS / 8), chunk = i % (HS / 8);
    uint4 x = {0, 0, 0, 0};
    if (first + row < T) x = *reinterpret_cast<const uint4*>(source + (first + row) * stride + chunk * 8);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(tile.address(row, chunk)), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
  }
}
