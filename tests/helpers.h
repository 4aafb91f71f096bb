#pragma once
// What the tests share: random tensors, distances, finite differences, threads, fixtures.

#include <doctest/doctest.h>
#include <omp.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

// Half a unit in the last place of 1: the largest relative error of one rounding.
template <class Real>
constexpr double kRounding = std::numeric_limits<Real>::epsilon() / 2.0;

// n normal numbers, exact in fp32 so that a float and a double test start from the same values.
template <class Real>
std::vector<Real> random_values(size_t n, uint64_t seed, double deviation = 1) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal(0, deviation);
  std::vector<Real> values(n);
  for (Real& v : values) v = Real(float(normal(engine)));
  return values;
}

inline std::vector<int> random_tokens(size_t n, int vocab, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::vector<int> tokens(n);
  for (int& t : tokens) t = int(engine() % vocab);
  return tokens;
}

// For buffers that an operation must assign: whatever it leaves out or adds to shows up as NaN.
template <class Real>
std::vector<Real> garbage(size_t n) {
  return std::vector<Real>(n, std::numeric_limits<Real>::quiet_NaN());
}

// Largest absolute difference; NaN where either side has one that the other has not, or where sizes differ.
template <class A, class B>
double distance(const std::vector<A>& a, const std::vector<B>& b) {
  if (a.size() != b.size()) return std::nan("");
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = std::fabs(double(a[i]) - double(b[i]));
    if (!(d <= worst)) worst = d;
    if (std::isnan(worst)) return worst;
  }
  return worst;
}

// Root mean square of the difference, relative to that of b.
template <class A, class B>
double relative_distance(const std::vector<A>& a, const std::vector<B>& b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += (double(a[i]) - double(b[i])) * (double(a[i]) - double(b[i]));
    size += double(b[i]) * double(b[i]);
  }
  return a.size() == b.size() ? std::sqrt(difference / size) : std::nan("");
}

template <class Real>
double largest(const std::vector<Real>& a) {
  double m = 0;
  for (Real v : a) m = std::max(m, std::fabs(double(v)));
  return m;
}

template <class Real>
bool same_bits(const std::vector<Real>& a, const std::vector<Real>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Real)) == 0;
}

template <class A, class B>
double dot(const std::vector<A>& a, const std::vector<B>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double(a[i]) * double(b[i]);
  return sum;
}

// Largest difference between `gradient` and the slope of `loss` along each element of `input`, relative to the
// largest slope. The slope is the five-point difference with h = 1e-3: its truncation error h^4/30 f''''' is about
// 3e-14 f''''', its rounding error about 2^-53 |loss| / h = 1e-13 |loss|. kSlope leaves three orders of magnitude for
// |loss| and f'''''.
constexpr double kSlope = 1e-9;
template <class Loss>
double slope_distance(std::vector<double>& input, const std::vector<double>& gradient, Loss loss) {
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);  // thousands of tiny operations: waiting for threads would take longer than the work
  const double h = 1e-3;
  std::vector<double> slopes(input.size());
  for (size_t i = 0; i < input.size(); ++i) {
    const double x = input[i];
    auto at = [&](double offset) {
      input[i] = x + offset;
      return double(loss());
    };
    slopes[i] = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
    input[i] = x;
  }
  omp_set_num_threads(threads);
  return distance(gradient, slopes) / std::max(1.0, largest(slopes));
}

// Calls work() with 1, 2 and 3 threads and returns whether the vectors it returned are equal to the bit.
template <class Work>
bool same_for_any_threads(Work work) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  const auto expected = work();
  bool same = true;
  for (int threads : {2, 3}) {
    omp_set_num_threads(threads);
    same = same && same_bits(work(), expected);
  }
  omp_set_num_threads(before);
  return same;
}

// A file of tests/fixtures, written by scripts/fixtures.py: metadata, and tensors as double.
struct Fixture {
  nlohmann::json metadata;
  std::map<std::string, std::vector<double>> tensors;

  explicit Fixture(const std::string& name) {
    const std::string path = "tests/fixtures/" + name + ".safetensors";
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + ": not found; run the tests from the top folder");
    uint64_t length = 0;
    file.read(reinterpret_cast<char*>(&length), 8);
    std::string text(length, ' ');
    file.read(text.data(), length);
    const nlohmann::json header = nlohmann::json::parse(text);
    metadata = header["__metadata__"];
    for (const auto& [key, entry] : header.items()) {
      if (key == "__metadata__") continue;
      const size_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1];
      std::vector<char> bytes(end - begin);
      file.seekg(8 + length + begin);
      file.read(bytes.data(), bytes.size());
      if (!file) throw std::runtime_error(path + ": truncated");
      std::vector<double>& values = tensors[key];
      auto widen = [&](auto example) {
        for (size_t at = 0; at < bytes.size(); at += sizeof(example)) {
          std::memcpy(&example, &bytes[at], sizeof(example));
          values.push_back(double(example));
        }
      };
      if (entry["dtype"] == "F64") widen(double());
      if (entry["dtype"] == "F32") widen(float());
      if (entry["dtype"] == "I32") widen(int32_t());
    }
  }
  const std::vector<double>& at(const std::string& name) const {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw std::runtime_error("fixture without " + name);
    return found->second;
  }
  std::vector<int> ints(const std::string& name) const { return {at(name).begin(), at(name).end()}; }
};

// For == with a number of any size: equal up to `relative`. (doctest's own default is absolute for small numbers.)
inline doctest::Approx about(double value, double relative = 1e-12) {
  return doctest::Approx(value).epsilon(relative).scale(1e-290);
}

// Queries, keys and values (T, 3, 4) of one attention head in which one key has nearly all the weight, as the first one
// often has in trained models: its score is 16.5, all others are 0. Its value is 0, all others are 1.
template <class Real>
std::vector<Real> attention_sink(int T) {
  std::vector<Real> qkv(size_t(T) * 12);
  for (int t = 0; t < T; ++t) {
    qkv[size_t(t) * 12] = 2;  // and 2 * 16.5 / sqrt(4) = 16.5
    for (int c = 8; c < 12; ++c) qkv[size_t(t) * 12 + c] = t > 0;
  }
  qkv[4] = 16.5;
  return qkv;
}

template <class Real>
const Real* none() {
  return nullptr;
}

// Adds a known start to parameter gradients and takes it off again: they must accumulate, not be assigned.
constexpr double kStart = 8;
inline std::vector<double> started(size_t n) { return std::vector<double>(n, kStart); }
inline std::vector<double> without_start(std::vector<double> d) {
  for (double& x : d) x -= kStart;
  return d;
}

// The message of the UserError (or whatever was thrown) of work(); empty if it threw nothing.
template <class Work>
std::string error_of(Work work) {
  try {
    work();
  } catch (const std::exception& e) {
    CHECK(std::string(e.what()).find('\n') == std::string::npos);  // one line
    return e.what();
  }
  return "";
}
inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// A directory of its own for a test, removed at the end.
struct TemporaryDirectory {
  std::string path;
  TemporaryDirectory() {
    path = (std::filesystem::temp_directory_path() / "partial-rope-XXXXXX").string();
    if (!::mkdtemp(path.data())) throw std::runtime_error("mkdtemp failed");
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path); }
  std::string operator/(const std::string& name) const { return path + "/" + name; }
  std::set<std::string> files() const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path)) names.insert(entry.path().filename());
    return names;
  }
};
