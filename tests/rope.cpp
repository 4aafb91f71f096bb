// rope.cuh: the rule for fractions, the table, and what a rotation must leave alone.

#include "rope.cuh"

#include <complex>

#include "tests/cuda.h"
#include "tests/helpers.h"

namespace {

struct Case {
  int B, T, NH, NKV, HS, R;
  RopePairs pairs;
  double base;
  size_t size() const { return size_t(B) * T * (NH + 2 * NKV) * HS; }
  RopeShape shape() const { return {B, T, NH, NKV, HS}; }
  // The first element of head h at position t of sequence b.
  size_t at(int b, int t, int h) const { return ((size_t(b) * T + t) * (NH + 2 * NKV) + h) * HS; }
};

// Odd sizes on purpose, and R in {0, 2, HS/4, HS}.
std::vector<Case> cases() {
  std::vector<Case> all;
  for (RopePairs pairs : {RopePairs::half, RopePairs::interleaved})
    for (int R : {0, 2, 4, 16}) {
      all.push_back({1, 1, 1, 1, 16, R, pairs, 10000});
      all.push_back({3, 7, 5, 5, 16, R, pairs, 10000});
      all.push_back({2, 13, 6, 2, 16, R, pairs, 500});
    }
  all.push_back(
      {2, 5, 3, 1, 7, 6, RopePairs::half, 10000});  // an odd head size: its last channel cannot have a partner
  all.push_back({2, 5, 3, 1, 7, 6, RopePairs::interleaved, 10000});
  std::vector<Case> kept;
  for (const Case& c : all)
    if (c.R == kRotaryDim.value_or(c.R)) kept.push_back(c);  // a program built for one R knows no other
  return kept;
}

struct Table {
  std::vector<float> values;
  RopeTable table;
  Table(int positions, int R, RopePairs pairs, double base) : values(size_t(positions) * R) {
    rope_fill_table(values.data(), positions, R, base);
    table = {values.data(), positions, R, pairs};
  }
  explicit Table(const Case& c) : Table(c.T, c.R, c.pairs, c.base) {}
};

template <class Real>
std::vector<Real> rotated(const Case& c, std::vector<Real> qkv, int first = 0) {
  Cpu be;
  Table t(c);
  RopeShape s = c.shape();
  s.first = first;
  rope_forward(be, qkv.data(), t.table, s);
  return qkv;
}

}  // namespace

TEST_CASE("rope: fractions give the paper's rotary dimensions") {
  CHECK(rotary_dim_from_fraction(0.10, 64) == 6);  // arXiv 2603.11611, Table 1
  CHECK(rotary_dim_from_fraction(0.10, 128) == 12);
  CHECK(rotary_dim_from_fraction(0.10, 256) == 26);
  CHECK(rotary_dim_from_fraction(0.25, 64) == 16);  // GPT-NeoX and Pythia
  for (int HS : {1, 2, 16, 64, 80, 256}) CHECK(rotary_dim_from_fraction(0, HS) == 0);
  for (int HS : {2, 16, 64, 80, 256}) {
    CHECK(rotary_dim_from_fraction(1, HS) == HS);
    CHECK(rotary_dim_from_fraction(1e-9, HS) == 2);  // anything above 0 rotates something
    CHECK(rotary_dim_from_fraction(0.5, HS) == 2 * ((HS + 2) / 4));
  }
}

TEST_CASE("rope: fractions round to the nearest even number, ties up, and stay inside the head") {
  CHECK(rotary_dim_from_fraction(5.0 / 64, 64) == 6);  // 5 lies between 4 and 6
  CHECK(rotary_dim_from_fraction(4.99 / 64, 64) == 4);
  CHECK(rotary_dim_from_fraction(63.0 / 64, 64) == 64);
  CHECK(rotary_dim_from_fraction(1, 7) == 6);  // odd head sizes keep one channel unrotated
  CHECK(rotary_dim_from_fraction(0.99, 65) == 64);
  CHECK(rotary_dim_from_fraction(0.5, 3) == 2);
  for (int HS = 2; HS <= 130; ++HS)
    for (int percent = 0; percent <= 100; ++percent) {
      const int R = rotary_dim_from_fraction(percent / 100.0, HS);
      const bool valid = R >= 0 && R <= HS && R % 2 == 0 && (R > 0) == (percent > 0);
      const bool nearest = std::fabs(R - percent / 100.0 * HS) <= 1 + 1e-9 || (R == 2 && percent > 0);
      if (!valid || !nearest) FAIL_CHECK("HS " << HS << ", " << percent << " %: R " << R);
    }
}

TEST_CASE("rope: fractions and dimensions that mean nothing are refused, with the value and what would be right") {
  for (double f : {-0.1, -1e-12, 1.0000001, 25.0, double(NAN), double(INFINITY), -double(INFINITY)}) {
    const std::string message = error_of([&] { rotary_dim_from_fraction(f, 64); });
    CHECK(contains(message, "--rotary-fraction " + std::to_string(f)));
    CHECK(contains(message, "between 0 and 1"));
  }
  for (int R : {-2, -1, 1, 3, 66, 1000}) {
    const std::string message = error_of([&] { check_rotary_dim(R, 64); });
    CHECK(contains(message, "--rotary-dim " + std::to_string(R)));
    CHECK(contains(message, "even, from 0 to the head size 64"));
  }
  if (kRotaryDim) {
    CHECK(error_of([] { check_rotary_dim(*kRotaryDim, 64); }) == "");
    const std::string built = "built for " + std::to_string(*kRotaryDim);
    CHECK(contains(error_of([] { check_rotary_dim(*kRotaryDim + 2, 64); }), built));
  } else {
    for (int R : {0, 2, 6, 64}) CHECK(error_of([&] { check_rotary_dim(R, 64); }) == "");
    CHECK(contains(error_of([] { check_rotary_dim(8, 7); }), "head size 7"));
  }
}

TEST_CASE("rope: R is what is asked for, else the program's own, else a tenth of the head") {
  CHECK(rotary_dim({}, 128) == kRotaryDim.value_or(12));
  for (int HS : {64, 256}) CHECK(error_of([&] { rotary_dim({}, HS); }) == "");
  const int R = kRotaryDim.value_or(16);
  CHECK(rotary_dim({{}, R}, 64) == R);
  CHECK(rotary_dim({R / 64.0, {}}, 64) == R);
  CHECK(rotary_dim({R / 64.0, R}, 64) == R);
  CHECK(contains(error_of([] { rotary_dim({0.5, kRotaryDim.value_or(30)}, 64); }), "the fraction means 32 of 64"));
  CHECK(contains(error_of([] { rotary_dim({{}, -2}, 64); }), "--rotary-dim -2"));
  CHECK(contains(error_of([] { rotary_dim({double(NAN), {}}, 64); }), "--rotary-fraction nan"));
}

TEST_CASE("rope: the table holds cos and sin of t * base^(-2i/R), rounded once") {
  for (int R : {2, 6, 64}) {
    const int positions = 5000;
    const double base = 10000;
    Table t(positions, R, RopePairs::half, base);
    double worst = 0;
    for (int p = 0; p < positions; ++p)
      for (int i = 0; i < R / 2; ++i) {
        // In long double by another formula: exp(-2i/R ln base).
        const long double angle = p * std::exp(-2.0L * i / R * std::log((long double)base));
        worst = std::max(worst, std::fabs(double(t.values[(size_t(p) * R / 2 + i) * 2] - std::cos(angle))));
        worst = std::max(worst, std::fabs(double(t.values[(size_t(p) * R / 2 + i) * 2 + 1] - std::sin(angle))));
      }
    // Half an ulp below 1 is 2^-25; the angle itself is off by p * 2^-52 or so.
    CHECK(worst <= std::ldexp(1.0, -25) + positions * std::ldexp(1.0, -52));
  }
  CHECK(rope_table_bytes(2048, 64) == 2048 * 64 * 4);  // R/2 cos and R/2 sin of 4 bytes
  CHECK(rope_table_bytes(10'000'000, 128) == 5'120'000'000u);
  CHECK(rope_table_bytes(10'000'000, 0) == 0);
}

TEST_CASE("rope: frequencies by rule") {
  const RopeAngles own = rope_angles(6, 64, 10000), head = rope_angles(6, 64, 10000, "head"),
                   list = rope_angles(6, 64, 10000, "6.283185307179586,100,1e9");
  for (int i = 0; i < 3; ++i) {
    CHECK(own.theta[i] == about(std::exp(-2.0 * i / 6 * std::log(10000.0))));
    CHECK(head.theta[i] == rope_angles(64, 64, 10000).theta[i]);  // the quickest of a full rotation
  }
  CHECK(list.theta[0] == about(1.0));
  CHECK(list.theta[1] * 100 == about(2 * M_PI));
  CHECK(list.theta[2] * 1e9 == about(2 * M_PI));
  CHECK(rope_angles(0, 64, 10000, "5,6").theta.empty());  // a layer without rotation has no use for them
  CHECK(contains(error_of([] { rope_angles(6, 64, 10000, "5,6"); }), "3 wavelengths"));
  CHECK(contains(error_of([] { rope_angles(4, 64, 10000, "5,0"); }), "above 0"));
  CHECK(contains(error_of([] { rope_angles(4, 64, 10000, "5,quick"); }), "\"quick\" is not a number"));
}

TEST_CASE("rope: scaled frequencies are those of Transformers, and reach cos and sin") {
  std::ifstream file("tests/fixtures/rope_scaling.json");
  const nlohmann::json rows = nlohmann::json::parse(file);
  CHECK(rows.size() == 5);
  for (const auto& row : rows) {
    const std::string scaling = row["scaling"];
    CAPTURE(scaling);
    const int R = row["R"];
    RopeAngles angles = rope_angles(R, 2 * R, row["base"]);
    rope_scale(angles, scaling, row["base"], R);
    // Transformers computes in fp32: a power, then some sums and products, of which one may cancel half of a number.
    for (int i = 0; i < R / 2; ++i) CHECK(angles.theta[i] == about(row["theta"][i].get<double>(), 16 * 0x1p-24));
    CHECK(angles.attention == about(row["attention"].get<double>()));
    std::vector<float> values(size_t(3) * R);
    rope_fill_table(values.data(), 3, angles);
    CHECK(values[2 * R] == float(angles.attention * std::cos(2 * angles.theta[0])));
    CHECK(values[2 * R + 1] == float(angles.attention * std::sin(2 * angles.theta[0])));
  }
  RopeAngles two = rope_angles(4, 8, 100);
  for (const char* wrong : {"", "yarn", "yarn:2", "linear:0", "linear:-1", "linear:1,2", "llama3:8,4,1,512",
                            "longrope:1,2", "longrope:1,2,3,4", "longrope:1,2,3;8,9", "longrope:1,2,3;8,9,0",
                            "linear:2;8", "ntk:2", "linear:x"})
    CHECK(contains(error_of([&] { rope_scale(two, wrong, 100, 4); }), std::string("--rope-scaling ")));
  CHECK(two.theta == rope_angles(4, 8, 100).theta);
  // One factor for texts of up to 3 tokens, another for all tokens of longer ones.
  rope_scale(two, "longrope:1.5,2,4;3,5,8", 100, 4);
  const double theta = rope_angles(4, 8, 100).theta[1];
  std::vector<float> values(16);
  for (int positions : {3, 4}) {
    rope_fill_table(values.data(), positions, two);
    CHECK(values[2 * 4 + 2] == float(1.5 * std::cos(2 * (theta / (positions == 3 ? 4 : 8)))));
  }
}

TEST_CASE("rope: R by layer") {
  using Dims = std::vector<int>;
  const int R = kRotaryDim.value_or(6);
  CHECK(rotary_dims_of_layers("all", R, 3, 16) == Dims{R, R, R});
  if (!kRotaryDim) {
    CHECK(rotary_dims_of_layers("nope:2", 6, 5, 16) == Dims{6, 0, 6, 0, 6});
    CHECK(rotary_dims_of_layers("nope:4", 6, 3, 16) == Dims{6, 6, 6});
    CHECK(rotary_dims_of_layers("16,0,2", 6, 3, 16) == Dims{16, 0, 2});
    CHECK(contains(error_of([] { rotary_dims_of_layers("4,18", 6, 2, 16); }), "head size 16"));
  } else {
    CHECK(contains(error_of([&] { rotary_dims_of_layers("nope:2", R, 2, 16); }), "was built for"));
  }
  for (const char* wrong : {"nope:1", "nope:0", "nope:2,3", "nope:1.5", "6,6", "6,6,6,6", "6,6,6.5", "nope:-1"})
    CHECK(contains(error_of([&] { rotary_dims_of_layers(wrong, R, 3, 16); }), "one for each layer"));
  CHECK(contains(error_of([&] { rotary_dims_of_layers("some", R, 3, 16); }), "--rotary-layers some"));
}

TEST_CASE_TEMPLATE("rope: values, and the channels from R on, other heads and R = 0 unchanged to the bit", Real, float,
                   double) {
  for (const Case& c : cases()) {
    const std::vector<Real> before = random_values<Real>(c.size(), 1), after = rotated(c, before);
    double worst = 0;
    size_t touched = 0;
    for (int b = 0; b < c.B; ++b)
      for (int t = 0; t < c.T; ++t)
        for (int h = 0; h < c.NH + 2 * c.NKV; ++h) {
          const size_t at = c.at(b, t, h);
          const int R = h < c.NH + c.NKV ? c.R : 0;
          touched += std::memcmp(&before[at + R], &after[at + R], (c.HS - R) * sizeof(Real)) != 0;
          for (int i = 0; i < R / 2; ++i) {
            // A pair is a complex number, and RoPE multiplies it by e^(j t theta).
            const int x = c.pairs == RopePairs::half ? i : 2 * i,
                      y = c.pairs == RopePairs::half ? i + R / 2 : 2 * i + 1;
            const std::complex<double> z(before[at + x], before[at + y]);
            const std::complex<double> expected = z * std::polar(1.0, t * std::pow(c.base, -2.0 * i / R));
            worst =
                std::max(worst, std::abs(expected - std::complex<double>(after[at + x], after[at + y])) / std::abs(z));
          }
        }
    CHECK(touched == 0);
    // Table: 2^-25 in each of cos and sin. Arithmetic in Real: two products and a sum, each within a rounding.
    CHECK(worst <= 2 * std::ldexp(1.0, -25) + 4 * kRounding<Real> + 1e-15 * c.T);
    if (c.R == 0) CHECK(same_bits(before, after));
    if (c.R > 0 && c.T > 1) CHECK_FALSE(same_bits(before, after));
  }
}

TEST_CASE_TEMPLATE("rope: backward undoes forward, and lengths are kept", Real, float, double) {
  for (const Case& c : cases()) {
    Cpu be;
    Table table(c);
    const std::vector<Real> before = random_values<Real>(c.size(), 2);
    std::vector<Real> after = rotated(c, before);
    double length_error = 0;
    for (size_t head = 0; head < c.size(); head += c.HS) {
      double length2 = 0, length2_after = 0;
      for (int i = 0; i < c.HS; ++i) {
        length2 += double(before[head + i]) * before[head + i];
        length2_after += double(after[head + i]) * after[head + i];
      }
      length_error = std::max(length_error, std::fabs(std::sqrt(length2_after / length2) - 1));
    }
    // cos and sin in fp32, each off by up to 2^-25, make cos^2 + sin^2 = 1 + d with |d| <= 2 (|cos| + |sin|) 2^-25 <
    // 2^-23.5.
    const double table_error = std::ldexp(1.0, -23);
    CHECK(length_error <= table_error + 4 * kRounding<Real>);
    rope_backward(be, after.data(), table.table, c.shape());
    CHECK(distance(before, after) <= (table_error + 8 * kRounding<Real>) * 1.5 * largest(before));
  }
}

TEST_CASE("rope: backward is the derivative of forward") {
  for (Case c : cases()) {
    c.B = 2, c.T = 3;  // each element is moved in turn
    Cpu be;
    Table table(c);
    std::vector<double> qkv = random_values<double>(c.size(), 3);
    const std::vector<double> dout = random_values<double>(c.size(), 4);
    std::vector<double> dqkv = dout;
    rope_backward(be, dqkv.data(), table.table, c.shape());
    CHECK(slope_distance(qkv, dqkv, [&] {
            std::vector<double> out = qkv;
            rope_forward(be, out.data(), table.table, c.shape());
            return dot(out, dout);
          }) < kSlope);
  }
}

TEST_CASE("rope: q . k depends only on the distance") {
  for (RopePairs pairs : {RopePairs::half, RopePairs::interleaved})
    for (const int R : {2, 4, 16}) {
      if (R != kRotaryDim.value_or(R)) continue;
      const Case c{1, 300, 1, 1, 16, R, pairs, 10000};
      // The same query and the same key at every position.
      std::vector<double> qkv = random_values<double>(c.size(), 5);
      for (int t = 1; t < c.T; ++t) std::memcpy(&qkv[c.at(0, t, 0)], &qkv[0], 3 * c.HS * sizeof(double));
      const std::vector<double> r = rotated(c, qkv);
      auto score = [&](int t, int s) {
        double sum = 0;
        for (int i = 0; i < c.HS; ++i) sum += r[c.at(0, t, 0) + i] * r[c.at(0, s, 1) + i];
        return sum;
      };
      double q2 = 0, k2 = 0, worst = 0, spread = 0;
      for (int i = 0; i < c.HS; ++i) q2 += qkv[i] * qkv[i], k2 += qkv[c.HS + i] * qkv[c.HS + i];
      for (int distance : {0, 1, 2, 17, 100}) {
        spread = std::max(spread, std::fabs(score(distance, 0) - score(0, 0)));
        for (int s = 0; s + distance < c.T; ++s)
          worst = std::max(worst, std::fabs(score(s + distance, s) - score(distance, 0)));
      }
      // Either vector is off by at most sqrt(2) 2^-25 of its length (the table's rounding), in either of the two
      // scores.
      CHECK(worst <= 4 * std::sqrt(2) * std::ldexp(1.0, -25) * std::sqrt(q2 * k2));
      CHECK(spread > 0.1);  // and it does depend on the distance
    }
}

TEST_CASE("rope: R of a head is the full RoPE of a head of R channels") {
  if (kRotaryDim.value_or(6) != 6) return;
  for (RopePairs pairs : {RopePairs::half, RopePairs::interleaved}) {
    const Case partial{2, 9, 3, 1, 16, 6, pairs, 10000}, full{2, 9, 3, 1, 6, 6, pairs, 10000};
    const std::vector<float> before = random_values<float>(partial.size(), 6);
    auto first_channels = [&](const std::vector<float>& x) {
      std::vector<float> head(full.size());
      for (size_t h = 0; h < full.size() / 6; ++h) std::memcpy(&head[h * 6], &x[h * 16], 6 * sizeof(float));
      return head;
    };
    CHECK(same_bits(first_channels(rotated(partial, before)), rotated(full, first_channels(before))));
  }
}

TEST_CASE("rope: interleaved pairs are half-split pairs in another order of channels") {
  const int R = kRotaryDim.value_or(8);
  const int HS = 12;
  if (R == 0 || R > HS) return;
  const Case half{2, 9, 3, 1, HS, R, RopePairs::half, 10000},
      interleaved{2, 9, 3, 1, HS, R, RopePairs::interleaved, 10000};
  auto reorder = [&](const std::vector<float>& x) {  // channels i and i + R/2 to 2i and 2i + 1
    std::vector<float> y = x;
    for (size_t h = 0; h < x.size(); h += HS)
      for (int i = 0; i < R / 2; ++i) y[h + 2 * i] = x[h + i], y[h + 2 * i + 1] = x[h + i + R / 2];
    return y;
  };
  const std::vector<float> before = random_values<float>(half.size(), 7);
  CHECK(same_bits(rotated(interleaved, reorder(before)), reorder(rotated(half, before))));
}

TEST_CASE("rope: first leaves earlier positions alone") {
  for (const Case& c : cases())
    for (int first : {0, 1, c.T - 1}) {
      if (first >= c.T) continue;
      const std::vector<float> before = random_values<float>(c.size(), 8), all = rotated(c, before),
                               part = rotated(c, before, first);
      std::vector<float> expected = all;
      for (int b = 0; b < c.B; ++b)
        std::copy_n(&before[c.at(b, 0, 0)], size_t(first) * (c.NH + 2 * c.NKV) * c.HS, &expected[c.at(b, 0, 0)]);
      CHECK(same_bits(part, expected));
    }
}

TEST_CASE("rope: the number of threads changes nothing") {
  for (const Case& c : cases())
    CHECK(same_for_any_threads([&] { return rotated(c, random_values<float>(c.size(), 9)); }));
}

#ifdef __CUDACC__

TEST_CASE_TEMPLATE("cuda: every rung of RoPE", Real, BOTH_TYPES) {
  NEEDS_GPU;
  for_head_shapes({7, 10, 64}, [](RopeShape s, int R, RopePairs pairs) {
    const DeviceTable table(s.T, R, pairs);
    const Values qkv = numbers<Real>(size_t(s.B) * s.T * (s.NH + 2 * s.NKV) * s.HS, 1);
    auto compare = [&](const char* rung, auto rotate) {
      for (float direction : {1.0f, -1.0f}) {
        Values want = qkv;
        rope_rotate(want.data(), table.on_cpu, s, direction);
        Tensor<Real> got(qkv);
        rotate(got(), direction);
        const Values result = got.host();
        // Two products and a sum of numbers under 6: three roundings of up to 12; then one to Real.
        close(rung, result, want, kRound<Real>, 3 * 12 * 0x1p-24);
        bool untouched = true;  // outside the first R channels of queries and keys of positions from `first` on
        for (size_t i = 0; i < qkv.size(); ++i) {
          const size_t c = i % s.HS, h = i / s.HS % (s.NH + 2 * s.NKV), t = i / s.HS / (s.NH + 2 * s.NKV) % s.T;
          const bool inside = int(c) < R && int(h) < s.NH + s.NKV && int(t) >= s.first;
          untouched = untouched && (inside || result[i] == qkv[i]);
        }
        CHECK(untouched);
      }
    };
    const RopeTable& t = table.on_gpu;
    const Tensor<Real> place(1);  // all allocations are aligned alike
    compare("as used", [&](Real* x, float direction) {
      direction > 0 ? rope_forward(*gpu(), x, t, s) : rope_backward(*gpu(), x, t, s);
    });
    if (R == 0) return;
    compare("pairs", [&](Real* x, float direction) { rope_pairs(*gpu(), x, t, s, direction); });
    if (rope_sectors_fit(place(), t, s))
      compare("sectors", [&](Real* x, float direction) { rope_sectors(*gpu(), x, t, s, direction); });
    if (rope_wide_fits<1>(place(), t, s))
      compare("wide, 1", [&](Real* x, float direction) { rope_wide<1>(*gpu(), x, t, s, direction); });
    if (rope_wide_fits<2>(place(), t, s))
      compare("wide, 2", [&](Real* x, float direction) { rope_wide<2>(*gpu(), x, t, s, direction); });
    if (rope_wide_fits<kWide<Real>>(place(), t, s))
      compare("wide", [&](Real* x, float direction) { rope_wide<kWide<Real>>(*gpu(), x, t, s, direction); });
  });
}

#endif  // __CUDACC__
