// bench: how fast the trainer is on this machine's CPU.
//
//   bench [--quick]                           tables: tokens per second, time per operation, RoPE's share by fraction
//   bench --shape small --batch 8 --context 256 [--threads N] [--seconds S] [--json] [--any flag of train's model]
//                                             one training step's tokens per second; --json: as one line, with the
//                                             config
//
// A training step is zero_gradients, forward, backward, update on random tokens. A figure is the median step of those
// that fit into --seconds (at least three), after one to warm up.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#if __has_include(<Eigen/Core>)
#define EIGEN_DONT_PARALLELIZE
#define EIGEN_NO_CUDA
#include <Eigen/Core>
#endif

#include "flags.h"
#include "model.h"

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

// The CPU with a stopwatch: each operation on it is that on the Cpu, timed.
struct TimedCpu : Cpu {
  std::map<std::string, double> seconds;
  double matmul_flops = 0;
};
struct Stopwatch {
  double& total;
  double start = now();
  explicit Stopwatch(double& t) : total(t) {}
  ~Stopwatch() { total += now() - start; }
};

}  // namespace

#define TIMED(operation)                                        \
  template <class... Arguments>                                 \
  void operation(TimedCpu& be, Arguments&&... arguments) {      \
    Stopwatch watch(be.seconds[#operation]);                    \
    operation(static_cast<Cpu&>(be), std::forward<Arguments>(arguments)...); \
  }
// The last three arguments of a linear layer are N, IC, OC; each product of matrices takes 2 N IC OC operations.
#define TIMED_LINEAR(operation, products)                                              \
  template <class... Arguments>                                                        \
  void operation(TimedCpu& be, Arguments&&... arguments) {                             \
    Stopwatch watch(be.seconds[#operation]);                                           \
    auto all = std::forward_as_tuple(arguments...);                                    \
    constexpr size_t n = sizeof...(Arguments);                                         \
    be.matmul_flops += 2.0 * (products)*std::get<n - 3>(all) * std::get<n - 2>(all) * std::get<n - 1>(all); \
    operation(static_cast<Cpu&>(be), std::forward<Arguments>(arguments)...);           \
  }

TIMED(embedding_forward)
TIMED(embedding_backward)
TIMED(norm_forward)
TIMED(norm_backward)
TIMED_LINEAR(linear_forward, 1)
TIMED_LINEAR(linear_residual_forward, 1)
TIMED_LINEAR(linear_backward, 2)
TIMED(rope_forward)
TIMED(rope_backward)
TIMED(qk_norm_rope_forward)
TIMED(qk_norm_rope_backward)
TIMED(attention_forward)
TIMED(attention_backward)
TIMED(swiglu_forward)
TIMED(swiglu_backward)
TIMED(gelu_forward)
TIMED(gelu_backward)
TIMED(cross_entropy)
TIMED(gradient_norm)
TIMED(adamw)

namespace {

struct Shape {
  std::string preset;
  int batch, context;
};

// A preset's model at another batch and context, with further flags of the model on top.
Settings settings_of(const Shape& shape, std::vector<std::string> more = {}) {
  Settings s;
  apply_flags(s, preset_flags(shape.preset));
  more.push_back("--batch=" + std::to_string(shape.batch));
  more.push_back("--context=" + std::to_string(shape.context));
  apply_flags(s, more);
  if (s.model.vocab == 0) s.model.vocab = 264;  // bytes and the end of a text, rounded up
  resolve(s.model, s.rotary_fraction);
  s.rotary_fraction = double(s.model.rotary_dim) / s.model.head_size;
  return s;
}

// Seconds of a training step: the median of those that fit into `budget` seconds.
template <class Backend>
double step_seconds(Backend& be, Settings& s, double budget, const std::function<void()>& after_warm_up,
                    int* steps_done) {
  const int B = s.batch, T = s.model.context, N = B * T;
  Model<Backend, float> model(be, s.model, B, T, true);
  model.initialise_weights(1);
  std::vector<int> tokens(N), targets(N);
  for (int n = 0; n < N; ++n) {
    tokens[n] = int(uniform(2, 0, n) * s.model.vocab);
    targets[n] = int(uniform(2, 1, n) * s.model.vocab);
  }
  std::vector<double> times;
  const double begin = now();
  for (int step = 1; step <= 4 || now() - begin < budget; ++step) {
    const double start = now();
    model.zero_gradients();
    model.forward(tokens.data(), B, T);
    model.backward(targets.data(), B, T, 1.0 / N, 0.0);
    model.update({s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.clip, step});
    if (step > 1) times.push_back(now() - start);
    if (step == 1) after_warm_up();
  }
  if (steps_done) *steps_done = int(times.size());
  return median(times);
}
double step_seconds(Settings& s, double budget) {
  Cpu be;
  return step_seconds(be, s, budget, [] {}, nullptr);
}

// What this machine reaches in fp32: one large Eigen product per thread at the same time, operations per second.
double peak_flops() {
#ifdef EIGEN_WORLD_VERSION
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const int n = 1024, threads = omp_get_max_threads();
  std::vector<Matrix> a(threads, Matrix::Random(n, n)), b = a, c = a;
  double best = 1e30;
  for (int round = 0; round < 8; ++round) {
    const double start = now();
#pragma omp parallel for schedule(static, 1)
    for (int i = 0; i < threads; ++i) c[i].noalias() = a[i] * b[i];
    best = std::min(best, now() - start);
  }
  return 2.0 * n * n * n * threads / best;
#else
  return 0;
#endif
}

void print_tables(double budget, bool quick) {
  std::vector<Shape> shapes = {{"nano", 16, 256},   {"nano", 4, 1024},    {"small", 16, 256},
                                     {"small", 4, 1024},  {"gpt-124m", 4, 128}, {"gpt-124m", 1, 1024}};
  if (quick) shapes.resize(4);
  std::printf("threads: %d\n\nA training step, fp32\n", omp_get_max_threads());
  std::printf("%-10s %6s %8s %12s %14s %12s\n", "shape", "batch", "context", "parameters", "tokens/s", "ms/step");
  for (const Shape& shape : shapes) {
    Settings s = settings_of(shape);
    const double seconds = step_seconds(s, budget);
    std::printf("%-10s %6d %8d %12zu %14.0f %12.1f\n", shape.preset.c_str(), shape.batch, shape.context,
                parameter_table(s.model).parameters, shape.batch * shape.context / seconds, 1e3 * seconds);
    std::fflush(stdout);
  }

  const double peak = peak_flops();
  for (size_t i = 0; i < shapes.size(); i += 2) {
    const Shape& shape = shapes[i];
    Settings s = settings_of(shape);
    TimedCpu be;
    double total = 0, start = 0;
    int steps = 0;
    step_seconds(be, s, budget, [&] { be.seconds.clear(), be.matmul_flops = 0, start = now(); }, &steps);
    total = now() - start;
    std::vector<std::pair<double, std::string>> operations;
    double products = 0, rest = total;
    for (const auto& [name, seconds] : be.seconds) {
      operations.push_back({seconds, name});
      rest -= seconds;
      if (name.rfind("linear", 0) == 0) products += seconds;
    }
    operations.push_back({rest, "(between operations)"});
    std::sort(operations.rbegin(), operations.rend());
    std::printf("\n%s, batch %d, context %d: time per operation\n", shape.preset.c_str(), shape.batch, shape.context);
    for (const auto& [seconds, name] : operations)
      std::printf("  %-26s %10.3f ms/step %6.1f %%\n", name.c_str(), 1e3 * seconds / steps, 100 * seconds / total);
    std::printf("  linear layers: %.1f GFLOP/s", be.matmul_flops / products / 1e9);
    if (peak > 0)
      std::printf(", %.0f %% of a large Eigen product's %.1f", 100 * be.matmul_flops / products / peak, peak / 1e9);
    std::printf("; everything but linear layers and attention: %.1f %% of the step\n",
                100 * (total - products - be.seconds["attention_forward"] - be.seconds["attention_backward"]) / total);
  }

#ifndef ROTARY_DIM
  std::printf("\nRoPE's share of a step by rotary fraction\n%-10s %10s %6s %14s %14s %9s %14s\n", "shape", "fraction",
              "R", "tokens/s", "RoPE ms/step", "share", "table, bytes");
  for (const Shape& shape : {shapes[0], shapes[2]})
    for (const char* flag : {"--rotary-dim=0", "--rotary-dim=2", "--rotary-fraction=0.1", "--rotary-fraction=0.25",
                             "--rotary-fraction=0.5", "--rotary-fraction=1"}) {
      Settings s = settings_of(shape, {flag});
      TimedCpu be;
      int steps = 0;
      const double seconds = step_seconds(be, s, budget, [&] { be.seconds.clear(); }, &steps);
      const double rope = (be.seconds["rope_forward"] + be.seconds["rope_backward"]) / steps;
      std::printf("%-10s %9.1f%% %6d %14.0f %14.3f %8.2f%% %14zu\n", shape.preset.c_str(),
                  100.0 * s.model.rotary_dim / s.model.head_size, s.model.rotary_dim,
                  shape.batch * shape.context / seconds, 1e3 * rope, 100 * rope / seconds,
                  rope_table_bytes(s.model.context, s.model.rotary_dim));
      std::fflush(stdout);
    }
#endif
}

int run(int argc, char** argv) {
  std::string shape;
  int batch = 8, context = 256, threads = 0;
  double seconds = 3;
  bool json = false, quick = false;
  CLI::App app("Measures the trainer on the CPU. Without --shape: all tables.", "bench");
  app.add_option("--shape", shape, "a preset of train: nano, small, gpt-124m, ...");
  app.add_option("--batch", batch, "windows in a step")->capture_default_str();
  app.add_option("--context", context, "positions in a window")->capture_default_str();
  app.add_option("--threads", threads, "CPU threads; 0: all cores")->capture_default_str();
  app.add_option("--seconds", seconds, "time per figure")->capture_default_str();
  app.add_flag("--json", json, "one line of JSON");
  app.add_flag("--quick", quick, "the tables without gpt-124m, which takes minutes");
  app.allow_extras();
  parse_command_line(app, {argv + 1, argv + argc});
  expect_positive("batch", batch);
  expect_positive("context", context);
  expect_positive("seconds", seconds, true);
  if (threads > 0) omp_set_num_threads(threads);
  if (shape.empty()) {
    if (app.remaining_size()) throw UserError(app.remaining().front() + ": works with --shape only; see --help");
    print_tables(seconds, quick);
    return 0;
  }
  Settings s = settings_of({shape, batch, context}, app.remaining());
  const double step = seconds == 0 ? NAN : step_seconds(s, seconds);  // --seconds 0 --json: the configuration only
  const double rate = batch * context / step;
  if (json) {
    nlohmann::ordered_json line = {
        {"shape", shape}, {"batch", batch}, {"context", context}, {"threads", omp_get_max_threads()}};
    line["tokens_per_second"] = rate;
    line["config"] = settings_json(s, {"Model"});
    std::printf("%s\n", line.dump().c_str());
  } else {
    std::printf("%s, batch %d, context %d: %.0f tokens/s, %.1f ms/step\n", shape.c_str(), batch, context, rate,
                1e3 * step);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return exit_code_of([&] { return run(argc, argv); });
}
