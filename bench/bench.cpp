// bench: how fast the trainer is on this machine.
//
//   bench [--quick]         tables for the CPU: tokens per second, time per operation, RoPE's share by fraction
//   bench --shape PRESET --batch B --context T [--device cpu|cuda] [--dtype fp32|bf16] [--seconds S] [--json] [--any
//         flag of train's model, or --diagnostics-every N]
//                           tokens per second of a training step and each operation's share of it; --json: as one line,
//                           with the config
//
// A training step is zero_gradients, forward, backward, update on random tokens. A figure is the median of those that
// fit into --seconds (at least three), after some to warm up; on a GPU, of runs of steps of about a fifth of a second,
// because only the end of a run is waited for.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#if __has_include(<Eigen/Core>)
#define EIGEN_DONT_PARALLELIZE
#define EIGEN_NO_CUDA
#include <Eigen/Core>
#endif

#include "run/diagnostics.cuh"
#include "run/flags.h"
#include "run/program.h"
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

// A backend with a stopwatch: each operation on it is that on Base, timed.
template <class Base>
struct Timed : Base {
  std::map<std::string, double> seconds;
  void end_step() {}
};

// A GPU's operations are only queued: events in the queue mark where each begins and ends. Those of a recorded graph
// become part of it, and are set anew each time it runs.
#ifdef __CUDACC__
template <>
struct Timed<Cuda> : Cuda {
  struct Span {
    const char* operation;
    cudaEvent_t begin, end;
    bool recorded;
  };
  std::map<std::string, double> seconds;
  std::vector<Span> spans;

  void mark(cudaEvent_t event) {
    check(cudaEventRecordWithFlags(event, stream, recording() ? cudaEventRecordExternal : cudaEventRecordDefault),
          "cudaEventRecord");
  }
  void end_step() {
    synchronize();
    std::vector<Span> keep;
    for (const Span& span : spans) {
      float ms;
      check(cudaEventElapsedTime(&ms, span.begin, span.end), "cudaEventElapsedTime");
      seconds[span.operation] += 1e-3 * ms;
      if (span.recorded) keep.push_back(span);
      if (!span.recorded) cudaEventDestroy(span.begin), cudaEventDestroy(span.end);
    }
    spans = keep;
  }
  ~Timed() {
    for (const Span& span : spans) cudaEventDestroy(span.begin), cudaEventDestroy(span.end);
  }
};
#endif

template <class Work>
void timed(Timed<Cpu>& be, const char* operation, Work work) {
  const double start = now();
  work(static_cast<Cpu&>(be));
  be.seconds[operation] += now() - start;
}
#ifdef __CUDACC__
template <class Work>
void timed(Timed<Cuda>& be, const char* operation, Work work) {
  Timed<Cuda>::Span span = {operation, nullptr, nullptr, be.recording()};
  check(cudaEventCreate(&span.begin), "cudaEventCreate");
  check(cudaEventCreate(&span.end), "cudaEventCreate");
  be.mark(span.begin);
  work(static_cast<Cuda&>(be));
  be.mark(span.end);
  be.spans.push_back(span);
}
#endif

}  // namespace

#define TIMED(operation)                                                             \
  template <class Base, class... Arguments>                                          \
  void operation(Timed<Base>& be, Arguments&&... arguments) {                        \
    timed(be, #operation, [&](Base& base) { operation(base, arguments...); });       \
  }

TIMED(embedding_forward)
TIMED(embedding_backward)
TIMED(norm_forward)
TIMED(norm_backward)
TIMED(norm_pair_forward)
TIMED(norm_pair_backward)
TIMED(linear_forward)
TIMED(linear_residual_forward)
TIMED(linear_pair_residual_forward)
TIMED(linear_backward)
TIMED(rope_forward)
TIMED(rope_backward)
TIMED(qk_norm_rope_forward)
TIMED(qk_norm_rope_backward)
TIMED(attention_forward)
TIMED(attention_backward)
TIMED(linear_swiglu_forward)
TIMED(linear_swiglu_backward)
TIMED(swiglu_forward)
TIMED(gelu_forward)
TIMED(gelu_backward)
TIMED(cross_entropy)
TIMED(add_losses)
TIMED(sum_squares)
TIMED(gradient_norm)
TIMED(adamw)
TIMED(attention_statistics)
TIMED(add_squares)
TIMED(tensor_statistics)

// On the CPU these are two or three operations each, with times of their own.
template <class Base, class Real>
void linear_cross_entropy(Timed<Base>& be, Acc<Real>* losses, Acc<Real>* log_z, Real* dinp, Acc<Real>* dweight,
                          Acc<Real>* dbias, Real* logits, Acc<Real>* factors, const Real* inp, const Real* weight,
                          const Real* bias, const int* targets, double scale, double z_loss, int N, int C, int V,
                          bool first) {
  if constexpr (std::is_same_v<Base, Cpu>) {
    linear_forward(be, logits, inp, weight, bias, N, C, V);
    cross_entropy(be, losses, log_z, logits, targets, scale, z_loss, N, V);
    linear_backward(be, dinp, dweight, dbias, logits, inp, weight, N, C, V, first);
  } else {
    timed(be, "linear_cross_entropy", [&](Base& base) {
      linear_cross_entropy(base, losses, log_z, dinp, dweight, dbias, logits, factors, inp, weight, bias, targets, scale,
                           z_loss, N, C, V, first);
    });
  }
}
template <class Base, class Real>
void attention_rope_backward(Timed<Base>& be, Real* dqkv, Acc<Real>* D, const Real* dout, const Real* qkv,
                             const Real* out, const Acc<Real>* lse, const RopeTable& table, RopeShape s,
                             double softcap) {
  if constexpr (std::is_same_v<Base, Cpu>) {
    attention_backward(be, dqkv, D, dout, qkv, out, lse, s, softcap);
    rope_backward(be, dqkv, table, s);
  } else {
    timed(be, "attention_rope_backward",
          [&](Base& base) { attention_rope_backward(base, dqkv, D, dout, qkv, out, lse, table, s, softcap); });
  }
}
template <class Base, class Real>
void linear_rope_forward(Timed<Base>& be, Real* qkv, const Real* inp, const Real* weight, const Real* bias,
                         const RopeTable& table, RopeShape s, int C) {
  if constexpr (std::is_same_v<Base, Cpu>) {
    linear_forward(be, qkv, inp, weight, bias, s.B * s.T, C, (s.NH + 2 * s.NKV) * s.HS);
    rope_forward(be, qkv, table, s);
  } else {
    timed(be, "linear_rope_forward",
          [&](Base& base) { linear_rope_forward(base, qkv, inp, weight, bias, table, s, C); });
  }
}

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
  resolve_settings(s);
  return s;
}

// What ends a run of steps that is measured as a whole.
template <class Backend>
void end_run(Backend& be) { be.synchronize(); }
template <class Base>
void end_run(Timed<Base>& be) { be.end_step(); }
template <class Backend>
constexpr bool kStepByStep = std::is_same_v<Backend, Cpu>;
template <class Base>
constexpr bool kStepByStep<Timed<Base>> = true;

// Seconds of a training step: the median of those that fit into `budget` seconds.
template <class Real, class Backend>
double step_seconds(Backend& be, const Settings& s, double budget, const std::function<void()>& after_warm_up = [] {},
                    int* steps_done = nullptr) {
  const int B = s.batch, T = s.model.context, N = B * T;
  Model<Backend, Real> model(be, s.model, B, T, true);
  Diagnostics<Backend, Real> diagnostics(model);
  Ranks alone;
  model.initialise_weights(1);
  HostArray<Backend, int> tokens(be, N), targets(be, N);
  for (int n = 0; n < N; ++n) {
    tokens.data[n] = int(uniform(2, 0, n) * s.model.vocab);
    targets.data[n] = int(uniform(2, 1, n) * s.model.vocab);
  }
  int steps = 0;
  auto seconds_of = [&](int count) {  // of a step, in a run of `count`
    const double start = now();
    for (int i = 0; i < count; ++i) {
      const AdamW a = {s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.clip, ++steps};
      const bool diagnose = s.diagnostics_every && steps % s.diagnostics_every == 0;
      model.zero_gradients();
      if (diagnose) diagnostics.begin();
      model.train_batch(tokens.data, targets.data, 1.0 / N, 0.0);
      if (diagnose) diagnostics.add_micro_batch();
      model.update(a);
      if (diagnose) diagnostics.add_update(a), diagnostics.read(alone);
    }
    end_run(be);
    return (now() - start) / count;
  };
  int run = 1;
  seconds_of(1);
  if (!std::is_base_of_v<Cpu, Backend>) {  // on a GPU the second step is recorded, the third like all that follow
    seconds_of(1);
    const double third = seconds_of(1);
    if (!kStepByStep<Backend>) run = std::max(1, int(0.2 / third));
    seconds_of(run);
  }
  const int warm_up = steps;
  after_warm_up();
  std::vector<double> times;
  for (const double begin = now(); times.size() < 3 || now() - begin < budget;) times.push_back(seconds_of(run));
  if (steps_done) *steps_done = steps - warm_up;
  return median(times);
}

// The mean time of each operation, in seconds per step, with what is left as "(between operations)": they add up to a
// step that is waited for and timed piece by piece.
template <class Real, class Base>
std::map<std::string, double> operation_seconds(const Settings& s, double budget) {
  Timed<Base> be;
  double start = 0;
  int steps = 0;
  step_seconds<Real>(be, s, budget, [&] { be.seconds.clear(), start = now(); }, &steps);
  double rest = (now() - start) / steps;
  for (auto& [name, seconds] : be.seconds) rest -= seconds /= steps;
  be.seconds["(between operations)"] = rest;
  return be.seconds;
}

void print_operations(const std::map<std::string, double>& operations) {
  std::vector<std::pair<double, std::string>> sorted;
  double total = 0;
  for (const auto& [name, seconds] : operations) sorted.push_back({seconds, name}), total += seconds;
  std::sort(sorted.rbegin(), sorted.rend());
  for (const auto& [seconds, name] : sorted)
    std::printf("  %-26s %10.3f ms/step %6.1f %%\n", name.c_str(), 1e3 * seconds, 100 * seconds / total);
}

// Floating-point operations of a step of N tokens in matrix products: 2 per multiply-add; forward, and twice that
// backward. In linear layers every matrix meets every token (the embedding is no product); in causal attention every
// query meets half of the T keys, in two products.
double linear_flops(const Config& c, double N) {
  double weights = c.tied ? 0 : -double(c.vocab) * c.width;
  for (const ParameterRow& row : parameter_table(c).rows) weights += row.decays() ? double(row.count) : 0;
  return 6 * N * weights;
}
double attention_flops(const Config& c, double N) { return 6.0 * N * c.layers * c.heads * c.head_size * c.context; }

// What this machine reaches: operations per second of one large Eigen product per thread at the same time, in fp32.
double peak_flops(Cpu&) {
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
  Cpu cpu;
  std::printf("threads: %d\n\nA training step, fp32\n", omp_get_max_threads());
  std::printf("%-10s %6s %8s %12s %14s %12s\n", "shape", "batch", "context", "parameters", "tokens/s", "ms/step");
  for (const Shape& shape : shapes) {
    Settings s = settings_of(shape);
    const double seconds = step_seconds<float>(cpu, s, budget);
    std::printf("%-10s %6d %8d %12zu %14.0f %12.1f\n", shape.preset.c_str(), shape.batch, shape.context,
                parameter_table(s.model).parameters, shape.batch * shape.context / seconds, 1e3 * seconds);
    std::fflush(stdout);
  }

  const double peak = peak_flops(cpu);
  for (size_t i = 0; i < shapes.size(); i += 2) {
    const Shape& shape = shapes[i];
    Settings s = settings_of(shape);
    const auto operations = operation_seconds<float, Cpu>(s, budget);
    double products = 0, rest = 0;
    for (const auto& [name, seconds] : operations) {
      if (name.rfind("linear", 0) == 0) products += seconds;
      else if (name.rfind("attention", 0) != 0) rest += seconds;
    }
    std::printf("\n%s, batch %d, context %d: time per operation\n", shape.preset.c_str(), shape.batch, shape.context);
    print_operations(operations);
    const double flops = linear_flops(s.model, shape.batch * shape.context) / products;
    std::printf("  linear layers: %.1f GFLOP/s", flops / 1e9);
    if (peak > 0) std::printf(", %.0f %% of a large Eigen product's %.1f", 100 * flops / peak, peak / 1e9);
    std::printf("; everything but linear layers and attention: %.3f ms/step\n", 1e3 * rest);
  }

#ifndef ROTARY_DIM
  std::printf("\nRoPE's share of a step by rotary fraction\n%-10s %10s %6s %14s %14s %9s %14s\n", "shape", "fraction",
              "R", "tokens/s", "RoPE ms/step", "share", "table, bytes");
  for (const Shape& shape : {shapes[0], shapes[2]})
    for (const char* flag : {"--rotary-dim=0", "--rotary-dim=2", "--rotary-fraction=0.1", "--rotary-fraction=0.25",
                             "--rotary-fraction=0.5", "--rotary-fraction=1"}) {
      Settings s = settings_of(shape, {flag});
      auto operations = operation_seconds<float, Cpu>(s, budget);
      double seconds = 0;
      for (const auto& operation : operations) seconds += operation.second;
      const double rope = operations["rope_forward"] + operations["rope_backward"];
      std::printf("%-10s %9.1f%% %6d %14.0f %14.3f %8.2f%% %14zu\n", shape.preset.c_str(),
                  100.0 * s.model.rotary_dim / s.model.head_size, s.model.rotary_dim,
                  shape.batch * shape.context / seconds, 1e3 * rope, 100 * rope / seconds,
                  rope_table_bytes(s.model.context, s.model.rotary_dim));
      std::fflush(stdout);
    }
#endif
}

// The GPU's: one product of 8192 x 8192 matrices of random numbers, in the model's type, the fastest of some.
#ifdef __CUDACC__
template <class Real>
double peak_flops(Cuda& be, Real) {
  const size_t n = 8192;
  Buffer<Cuda> a(be, n * n * sizeof(Real)), b(be, n * n * sizeof(Real)), out(be, n * n * sizeof(Real));
  std::vector<Real> host(n * n);
  std::mt19937 random(1);
  for (const Buffer<Cuda>* to : {&a, &b}) {
    for (Real& x : host) x = Real(float(random()) * 0x1p-31f - 1);
    be.upload(to->data, host.data(), to->bytes);
    be.synchronize();
  }
  double best = 1e30;
  for (int round = 0; round < 5; ++round) {
    const int products = 10;
    const double start = now();
    for (int i = 0; i < products; ++i)
      linear_forward(be, out.as<Real>(), a.as<Real>(), b.as<Real>(), (const Real*)nullptr, n, n, n);
    be.synchronize();
    best = std::min(best, (now() - start) / products);
  }
  return 2.0 * n * n * n / best;
}
#endif
double peak_flops(Cpu& be, float) { return peak_flops(be); }

// One shape in detail. --seconds 0 --json: the configuration only.
template <class Backend, class Real>
void measure(Backend& be, Real real, Settings& s, const std::string& shape, double budget, bool json) {
  const double N = double(s.batch) * s.model.context, flops = linear_flops(s.model, N) + attention_flops(s.model, N);
  double step = NAN, peak = NAN;
  std::map<std::string, double> operations;
  if (budget > 0) {
    peak = peak_flops(be, real);
    step = step_seconds<Real>(be, s, budget);
    operations = operation_seconds<Real, Backend>(s, budget / 2);
  }
  if (json) {
    nlohmann::ordered_json line = {{"shape", shape},
                                   {"batch", s.batch},
                                   {"context", s.model.context},
                                   {"device", Backend::name},
                                   {"threads", omp_get_max_threads()}};
    line["tokens_per_second"] = N / step;
    line["flops_per_token"] = flops / N;
    line["peak_flops"] = peak;
    line["operation_seconds"] = operations;
    line["config"] = settings_json(s, {"Model"});
    std::printf("%s\n", line.dump().c_str());
    return;
  }
  std::printf("%s, batch %d, context %d, %s: %.0f tokens/s, %.2f ms/step, %.3g TFLOP/s in matrix products",
              shape.c_str(), s.batch, s.model.context, Backend::name, N / step, 1e3 * step, flops / step * 1e-12);
  if (peak > 0) std::printf(", %.0f %% of a large product's %.3g", 100 * flops / step / peak, peak * 1e-12);
  std::printf("\n");
  print_operations(operations);
}

int run(int argc, char** argv) {
  std::string shape, device = "cpu", dtype = "auto";
  int batch = 8, context = 256, threads = 0;
  double seconds = 3;
  bool json = false, quick = false;
  CLI::App app("Measures the trainer. Without --shape: all tables for the CPU.", "bench");
  app.add_option("--shape", shape, "a preset of train: nano, small, gpt-124m, ...");
  app.add_option("--batch", batch, "windows in a step")->capture_default_str();
  app.add_option("--context", context, "positions in a window")->capture_default_str();
  app.add_option("--device", device, "auto, cpu or cuda")->capture_default_str();
  app.add_option("--dtype", dtype, "auto, fp32 or bf16")->capture_default_str();
  app.add_option("--threads", threads, "CPU threads; 0: all cores")->capture_default_str();
  app.add_option("--seconds", seconds, "time per figure")->capture_default_str();
  app.add_flag("--json", json, "one line of JSON");
  app.add_flag("--quick", quick, "the tables without gpt-124m, which takes minutes");
  app.allow_extras();
  parse_command_line(app, {argv + 1, argv + argc});
  expect_positive("batch", batch);
  expect_positive("context", context);
  expect_positive("seconds", seconds, true);
  use_threads(threads);
  if (shape.empty()) {
    if (app.remaining_size()) throw UserError(app.remaining().front() + ": works with --shape only; see --help");
    print_tables(seconds, quick);
    return 0;
  }
  Settings s = settings_of({shape, batch, context}, app.remaining());
  with_backend(device, dtype, [&](auto& be, auto real) { measure(be, real, s, shape, seconds, json); });
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(argv, [&](const auto&) { return run(argc, argv); });
}
