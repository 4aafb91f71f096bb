// Random numbers, the same on every machine: SplitMix64 (Steele, Lea, Flood 2014). All of the project's come from here.
#pragma once
#include <cstdint>

constexpr uint64_t kGoldenRatio = 0x9e3779b97f4a7c15ull;  // 2^64 / 1.618..., SplitMix64's step

// A well-mixing function of 64 bits: SplitMix64's finaliser.
inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// A number in [0, 1) for each (seed, stream, index): no state, so that the order of the calls does not matter.
inline double uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  uint64_t z = seed * kGoldenRatio + stream;
  for (int round = 0; round < 2; ++round) z = mix_bits(z + index + kGoldenRatio);
  return double(z >> 11) * 0x1p-53;
}

// One number after the other: 64 random bits per call, the same everywhere, unlike std:: distributions.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed) {}

  uint64_t next() { return mix_bits(state += kGoldenRatio); }

  // Uniform in [0, n). The bias of the multiplication is below n / 2^32, far under the precision of a reported loss.
  int below(int n) { return int(((next() >> 32) * uint64_t(n)) >> 32); }
};
