#pragma once
// eval memory: every tensor's bytes for a configuration, from the lists in model.h; nothing is allocated.

#include <map>

#include "eval/source.h"

// For counting without a GPU: the same sizes as Cuda and bf16.
struct AnyGpu {};
struct AnyBf16 {
  uint16_t bits;
};

struct MemoryRow {
  std::string name;
  std::vector<size_t> shape;  // of parameters; activations say how many numbers
  size_t elements = 0;        // of one
  size_t element_bytes = 0;   // of one element of an activation
  size_t copies = 0;          // one per layer, mostly
};

// Parameter tensors: those that differ by their layer alone in one row, unless `each`.
inline std::vector<MemoryRow> parameter_rows(const Config& c, bool each) {
  std::vector<MemoryRow> rows;
  std::map<std::string, size_t> place;
  for (const ParameterRow& row : parameter_table(c).rows) {
    std::string name = row.name;
    if (!each && name.rfind("layers.", 0) == 0) name = "layers.*" + name.substr(name.find('.', 7));
    if (place.emplace(name, rows.size()).second) rows.push_back({name, row.shape, row.count, 0, 0});
    ++rows[place[name]].copies;
  }
  return rows;
}

// Activations and their gradients for B x T tokens, in the order of the forward and the backward pass.
template <class Backend, class Real>
std::vector<MemoryRow> activation_rows(const Config& c, int B, int T) {
  std::vector<MemoryRow> rows;
  std::map<std::string, size_t> place;
  auto visit = [&](const char* name, size_t elements, auto*& pointer) {
    if (place.emplace(name, rows.size()).second) rows.push_back({name, {}, elements, sizeof(*pointer), 0});
    ++rows[place[name]].copies;
  };
  Activations<Real> a;
  ActivationGradients<Real> d;
  visit_activations<Backend>(c, size_t(B) * T, a, visit);
  visit_activation_gradients(c, B, T, d, visit);
  return rows;
}

inline std::string shape_text(const std::vector<size_t>& shape) {
  std::string text;
  for (size_t n : shape) text += (text.empty() ? "(" : ", ") + std::to_string(n);
  return text + ")";
}

template <class Backend, class Real>
inline void print_memory(const Config& c, int B, const Division& division, bool each, const std::string& device) {
  const size_t N = size_t(B) * c.context;
  const ParameterTable table = parameter_table(c);
  const MemoryReport report = memory_report<Backend, Real>(c, B, c.context, division);
  const bool own_master = !std::is_same_v<Real, Acc<Real>>;
  const size_t weight = sizeof(Real), optimizer = sizeof(Acc<Real>) * (own_master ? 3 : 2);
  const char* dtype = sizeof(Real) == 2 ? "bf16" : "fp32";

  std::printf("Parameters: %s numbers in %zu tensors\n", grouped(table.parameters).c_str(), table.rows.size());
  std::printf("  weights %s, gradients fp32, optimiser fp32: AdamW's m and v%s\n\n", dtype,
              own_master ? " and the master weights" : "");
  std::printf("  %-25s %-16s %3s %13s %11s %11s %12s\n", "tensor", "shape", "x", "bytes each", "weights", "gradients",
              "optimiser");
  for (const MemoryRow& row : parameter_rows(c, each)) {
    const size_t n = row.elements * row.copies;
    std::printf("  %-25s %-16s %3zu %13s %11s %11s %12s\n", row.name.c_str(), shape_text(row.shape).c_str(), row.copies,
                grouped(row.elements * weight).c_str(), human_bytes(n * weight).c_str(),
                human_bytes(n * sizeof(float)).c_str(), human_bytes(n * optimizer).c_str());
  }
  std::printf("\nActivations: %d x %d = %s tokens, %s; the gradients (d...) are one set, used again by every layer\n\n",
              B, c.context, grouped(N).c_str(), dtype);
  std::printf("  %-25s %16s %5s %3s %17s %12s\n", "tensor", "numbers", "bytes", "x", "bytes each", "all");
  size_t listed = 0;
  for (const MemoryRow& row : activation_rows<Backend, Real>(c, B, c.context)) {
    const size_t one = row.elements * row.element_bytes;
    listed += one * row.copies;
    std::printf("  %-25s %16s %5zu %3zu %17s %12s\n", row.name.c_str(), grouped(row.elements).c_str(),
                row.element_bytes, row.copies, grouped(one).c_str(), human_bytes(one * row.copies).c_str());
  }
  const char* on = device == "cuda" ? "GPU" : "CPU";
  if (division.ranks == 1) std::printf("\nIn all, for training on the %s\n\n", on);
  else std::printf("\nIn all, on each of %d %ss: of the optimiser's numbers each has its share\n\n", division.ranks, on);
  auto total = [&](const char* name, size_t bytes) {
    std::printf("  %-25s %16s %17s bytes %5.1f %%\n", name, human_bytes(bytes).c_str(), grouped(bytes).c_str(),
                100.0 * double(bytes) / double(report.total()));
  };
  total("parameters", report.parameters);
  total("gradients", report.gradients);
  total("optimiser", report.optimizer);
  if (report.exchange) total("exchange of gradients", report.exchange);
  total("activations", report.activations);
  total("RoPE table", report.rope_table);
  total("total", report.total());
  const size_t numbers = table.parameters * (weight + sizeof(Acc<Real>)) + table.parameters / division.ranks * optimizer;
  const size_t gaps = report.parameters + report.gradients + report.optimizer + report.activations - listed - numbers;
  if (gaps)
    std::printf("  (%s of it are gaps: tensors start at multiples of 256 bytes, or of 64 numbers)\n",
                human_bytes(gaps).c_str());
}

inline void command_memory(const std::vector<std::string>& args) {
  Settings s;
  std::string preset = "nano", run, device = "auto", dtype = "auto", fractions = "0,2,0.1,0.25,0.5,0.75,1",
              contexts = "2048,131072,1048576,10000000";
  bool each = false;
  auto parse = [&](Settings& settings) {
    Flags f("Every tensor's bytes for a configuration; nothing is allocated.", "eval memory");
    f.group("Configuration");
    f.add("preset", preset, "what the flags below start from")->type_name("NAME");
    add_run_flag(f, run);
    f.add("batch", settings.batch, "windows in a micro-batch");
    f.add("ranks", settings.ranks, "GPUs that train together");
    f.add("lanes", settings.lanes, "as in train; 0: as many as ranks");
    f.add("recompute", settings.model.recompute, "as in train");
    f.add("device", device, "cpu or cuda; auto: cuda for bf16")->type_name("auto|cpu|cuda");
    f.add("dtype", dtype, "fp32 or bf16; auto: fp32, on cuda bf16")->type_name("auto|fp32|bf16");
    f.add("all", each, "a row for every parameter tensor of every layer");
    f.group("RoPE table");
    f.add("fractions", fractions, "shares of the head, up to 1; above 1 numbers of channels");
    f.add("contexts", contexts, "positions");
    RotaryRequest rotary;
    add_model_flags(f, settings.model, rotary);
    f.parse(args);
    if (rotary.fraction || rotary.dim) settings.rotary = rotary;
  };
  Settings unused = plain_settings();
  parse(unused);  // for --preset and --run
  if (run.empty()) apply_flags(s, preset_flags(preset));
  else s = open_source(run).settings;
  parse(s);
  Config& c = s.model;
  if (c.vocab == 0) c.vocab = 264;  // the byte tokenizer's 257, rounded up as train does
  resolve_settings(s);
  expect_positive("batch", s.batch);
  expect_positive("ranks", s.ranks);
  if (s.lanes == 0) s.lanes = s.ranks;
  expect_divides(s.ranks, s.lanes);
  const Division division = {s.lanes, s.ranks, 0};
  check_device_and_dtype(device, dtype);
  if (device == "auto") device = dtype == "bf16" ? "cuda" : "cpu";
  if (dtype == "auto") dtype = device == "cuda" ? "bf16" : "fp32";
  if (device == "cpu" && dtype == "bf16")
    throw UserError("--dtype bf16: the CPU works in fp32; use --dtype fp32 or --device cuda");

  std::vector<size_t> positions;
  for (double value : parse_list("--contexts", contexts)) {
    if (!(value >= 1 && value <= 1e12 && value == std::floor(value)))
      throw UserError("--contexts " + contexts + ": must be whole numbers from 1 to 10^12");
    positions.push_back(size_t(value));
  }
  std::vector<std::pair<std::string, int>> rotated;  // name, R
  for (double share : parse_list("--fractions", fractions)) {
    const int R = share > 1 ? int(std::min(share, 1e6)) : rotary_dim_from_fraction(share, c.head_size);
    if (share > 1 && (share != R || R % 2 || R > c.head_size))
      throw UserError("--fractions " + fractions + ": " + format("%g", share) +
                      " must be a share up to 1, or an even number of channels up to " + std::to_string(c.head_size));
    rotated.push_back({share > 1 ? std::to_string(R) + " channels" : format("%g %%", 100 * share), R});
  }

  std::printf("%s: %d layers, width %d, %d query and %d key/value heads of %d, MLP %d, context %d, vocabulary %d%s\n",
              run.empty() ? preset.c_str() : run.c_str(), c.layers, c.width, c.heads, c.kv_heads, c.head_size,
              c.mlp_hidden, c.context, c.vocab, c.tied ? ", tied" : "");
  std::printf("RoPE turns %d of %d channels (%.4g %%)\n\n", c.rotary_dim, c.head_size,
              100.0 * c.rotary_dim / c.head_size);
  if (device == "cpu") print_memory<Cpu, float>(c, s.batch, division, each, device);
  else if (dtype == "fp32") print_memory<AnyGpu, float>(c, s.batch, division, each, device);
  else print_memory<AnyGpu, AnyBf16>(c, s.batch, division, each, device);

  std::printf(
      "\nRoPE table: positions x R/2 pairs x 2 (cos, sin) x 4 bytes; HS = %d, the same for all layers and heads\n\n  "
      "%-13s %4s",
      c.head_size, "rotated", "R");
  for (size_t n : positions) std::printf(" %18s", (grouped(n) + " pos.").c_str());
  std::printf("\n");
  for (const auto& [name, R] : rotated) {
    std::printf("  %-13s %4d", name.c_str(), R);
    for (size_t n : positions) std::printf(" %18s", human_bytes(rope_table_bytes(n, R)).c_str());
    std::printf("\n  %-13s %4s", "", "");
    for (size_t n : positions) std::printf(" %18s", grouped(rope_table_bytes(n, R)).c_str());
    std::printf("\n");
  }
}
