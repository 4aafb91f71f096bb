// run/random.h against the published numbers of SplitMix64.

#include "run/random.h"

#include "tests/helpers.h"

TEST_CASE("random: SplitMix64 from seeds 0 and 1234567") {
  Random zero(0), other(1234567);
  for (uint64_t expected : {0xe220a8397b1dcdafull, 0x6e789e6aa1b965f4ull, 0x06c45d188009454full})
    CHECK(zero.next() == expected);
  for (uint64_t expected : {6457827717110365317ull, 3203168211198807973ull, 9817491932198370423ull})
    CHECK(other.next() == expected);
}

TEST_CASE("random: uniform() lies in [0, 1), evenly, and differs in each of its arguments") {
  double sum = 0;
  for (int i = 0; i < 10000; ++i) {
    const double u = uniform(1, 2, i);
    CHECK((u >= 0 && u < 1));
    sum += u / 10000;
  }
  CHECK(std::fabs(sum - 0.5) < 5 / std::sqrt(12 * 10000.0));  // five standard deviations of the mean
  CHECK(uniform(1, 2, 3) != uniform(2, 2, 3));
  CHECK(uniform(1, 2, 3) != uniform(1, 3, 3));
  CHECK(uniform(1, 2, 3) != uniform(1, 2, 4));
}
