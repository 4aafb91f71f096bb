#pragma once
// What a run tells about itself: its csv files, loss spikes, and for the steps of --diagnostics-every what goes on
// inside: attention logits and entropies, sizes of queries, keys, residual stream, gradients and updates.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "run/checkpoint.h"
#include "model.h"

// ---------------------------------------------------------------------------------------------------------------------
// csv files

// A number as the csv files have it; NaN without the sign that it may carry.
inline double unsigned_nan(double x) { return std::isnan(x) ? NAN : x; }
inline std::string decimals(double x) {
  char text[340];
  std::snprintf(text, sizeof text, "%.6f", unsigned_nan(x));
  return text;
}

// A csv file of the run, a row per step or several, steps in the first column. On resume, rows of steps after the
// checkpoint are dropped: they will be computed again.
class CsvLog {
 public:
  CsvLog(const std::string& path, const std::string& header, int keep_up_to_step) : path_(path) {
    std::string kept = header + "\n";
    std::ifstream before(path);
    std::string line;
    std::getline(before, line);
    while (std::getline(before, line))
      if (std::atoi(line.c_str()) <= keep_up_to_step && keep_up_to_step > 0) kept += line + "\n";
    write_text_file(path + ".part", kept);
    std::filesystem::rename(path + ".part", path);
    file_ = std::fopen(path.c_str(), "a");
    if (!file_) throw UserError(path + ": cannot write: " + std::strerror(errno));
  }
  CsvLog(const CsvLog&) = delete;
  CsvLog& operator=(const CsvLog&) = delete;
  ~CsvLog() { std::fclose(file_); }
  template <class... Values>
  void row(const char* format, Values... values) {
    if (std::fprintf(file_, format, cell(values)...) < 0) fail();
  }
  void flush() {  // after the rows of a step
    if (std::fflush(file_) != 0) fail();
  }

 private:
  std::string path_;
  std::FILE* file_;
  static double cell(double x) { return unsigned_nan(x); }
  template <class T>
  static T cell(T x) {
    return x;
  }
  void fail() { throw UserError(path_ + ": cannot write: " + std::strerror(errno)); }
};

// The columns of a csv file by name, as text; without rows if there is no file.
inline std::map<std::string, std::vector<std::string>> read_csv(const std::string& path) {
  std::map<std::string, std::vector<std::string>> columns;
  std::ifstream file(path);
  std::string line, cell;
  std::vector<std::string> names;
  std::getline(file, line);
  for (std::stringstream cells(line); std::getline(cells, cell, ',');) names.push_back(cell);
  while (std::getline(file, line)) {
    std::stringstream cells(line);
    for (const std::string& name : names) {
      cell.clear();
      std::getline(cells, cell, ',');
      columns[name].push_back(cell);
    }
  }
  return columns;
}

// A column of it as numbers.
inline std::vector<double> read_column(const std::string& path, const std::string& name) {
  std::vector<double> values;
  auto columns = read_csv(path);
  for (const std::string& cell : columns[name]) values.push_back(std::atof(cell.c_str()));
  return values;
}

// ---------------------------------------------------------------------------------------------------------------------
// Spikes

constexpr double kSpike = 7;             // standard deviations
constexpr size_t kSpikeWindow = 128;     // of spikes.csv
constexpr size_t kSpikeWindowMin = 128;  // losses that must have gone before

// How many standard deviations losses[i] lies above the mean of the `window` losses before it, of as many as there are
// at the start of a run; 0 as long as there are fewer than kSpikeWindowMin.
inline double z_score(const std::vector<double>& losses, size_t i, size_t window) {
  const size_t n = std::min(i, window);
  if (n < kSpikeWindowMin) return 0;
  double mean = 0, variance = 0;
  for (size_t j = i - n; j < i; ++j) mean += losses[j] / n;
  for (size_t j = i - n; j < i; ++j) variance += (losses[j] - mean) * (losses[j] - mean) / n;
  return (losses[i] - mean) / std::sqrt(variance);
}

// The share of steps whose loss is more than 7 standard deviations from the rolling mean, on either side (OLMo et al.
// 2025, arXiv 2501.00656, section 3.1, for a window of 1,000).
inline double spike_score(const std::vector<double>& losses, size_t window) {
  size_t spikes = 0;
  for (size_t i = 0; i < losses.size(); ++i) spikes += std::fabs(z_score(losses, i, window)) > kSpike;
  return losses.empty() ? 0 : double(spikes) / losses.size();
}

// ---------------------------------------------------------------------------------------------------------------------
// Inside the model

struct HeadDiagnostics {
  int layer, head;
  double max_logit, entropy, q_rms, k_rms, residual_rms;
};
struct TensorDiagnostics {
  std::string name;
  double grad_norm, weight_rms, update_ratio, nonfinite;
};
struct StepDiagnostics {
  std::vector<HeadDiagnostics> heads;
  std::vector<TensorDiagnostics> tensors;
};

// Looks at a training step from outside: it reads what the step leaves in memory and changes nothing, so that a run is
// the same, to the bit, with and without it. Around one step: begin(), after each micro-batch add_micro_batch(), after
// the update add_update(), then read().
template <class Backend, class Real>
class Diagnostics {
 public:
  explicit Diagnostics(Model<Backend, Real>& model)
      : model_(model), c_(model.config), tensors_(int(model.table.rows.size())) {
    sums_memory_ = Buffer<Backend>(model.be, sums_count() * sizeof(double) + tensors_ * sizeof(TensorStatistics));
    sums_ = sums_memory_.template as<double>();
    tensor_sums_ = reinterpret_cast<TensorStatistics*>(sums_ + sums_count());
    std::vector<TensorPlace> places;
    for (const ParameterRow& row : model.table.rows) places.push_back({row.offset, row.count, row.decays()});
    places_memory_ = Buffer<Backend>(model.be, tensors_ * sizeof(TensorPlace));
    model.be.upload(places_memory_.data, places.data(), places_memory_.bytes);
    model.be.synchronize();
  }

  void begin() {
    model_.be.zero(sums_memory_.data, sums_memory_.bytes);
    tokens_ = 0;
  }

  // After train_batch(): the activations are still those of its forward pass, on the whole batch.
  void add_micro_batch() {
    const int N = model_.B * model_.T, heads = c_.heads + c_.kv_heads;
    for (int l = 0; l < c_.layers; ++l) {
      const BlockActivations<Real>& a = model_.acts.blocks[l];
      const LayerSums sums = of_layer(sums_, l);
      attention_statistics(model_.be, sums.max_logit, sums.entropy, model_.grads.delta, a.qkv, a.lse,
                           c_.heads_shape(model_.B, model_.T, 0));
      add_squares(model_.be, sums.qk_squares, a.qkv, N, heads, c_.head_size, c_.qkv_width());
      add_squares(model_.be, sums.x_squares, a.x, N, 1, c_.width, c_.width);
    }
    tokens_ += N;
  }

  void add_update(const AdamW& a) {
    tensor_statistics(model_.be, tensor_sums_, places_memory_.template as<TensorPlace>(), tensors_, model_.master,
                      model_.gradients_flat, model_.m, model_.v, &model_.result->norm, a);
  }

  // Waits for the device.
  StepDiagnostics read() {
    std::vector<double> host(sums_memory_.bytes / sizeof(double));
    model_.be.download(host.data(), sums_memory_.data, sums_memory_.bytes);
    StepDiagnostics d;
    for (int l = 0; l < c_.layers; ++l) {
      const LayerSums sums = of_layer(host.data(), l);
      auto rms = [&](double squares, int width) { return unsigned_nan(std::sqrt(squares / tokens_ / width)); };
      for (int h = 0; h < c_.heads; ++h)
        d.heads.push_back({l, h, sums.max_logit[h], unsigned_nan(sums.entropy[h] / tokens_),
                           rms(sums.qk_squares[h], c_.head_size),
                           rms(sums.qk_squares[c_.heads + h / (c_.heads / c_.kv_heads)], c_.head_size),
                           rms(sums.x_squares[0], c_.width)});
    }
    const TensorStatistics* t = reinterpret_cast<const TensorStatistics*>(host.data() + sums_count());
    for (const ParameterRow& row : model_.table.rows) {
      d.tensors.push_back({row.name, unsigned_nan(std::sqrt(t->gradient)), std::sqrt(t->weight / row.count),
                           t->weight > 0 ? std::sqrt(t->update / t->weight) : 0, t->nonfinite});
      ++t;
    }
    return d;
  }

 private:
  Model<Backend, Real>& model_;
  const Config& c_;
  const int tensors_;
  size_t tokens_ = 0;
  Buffer<Backend> sums_memory_, places_memory_;
  double* sums_;  // (layers, LayerSums)
  TensorStatistics* tensor_sums_;

  struct LayerSums {
    double *max_logit, *entropy /* (NH) */, *qk_squares /* (NH + NKV) */, *x_squares /* (1) */;
  };
  size_t sums_count() const { return size_t(c_.layers) * (3 * c_.heads + c_.kv_heads + 1); }
  LayerSums of_layer(double* sums, int layer) const {
    double* at = sums + size_t(layer) * (3 * c_.heads + c_.kv_heads + 1);
    return {at, at + c_.heads, at + 2 * c_.heads, at + 3 * c_.heads + c_.kv_heads};
  }
};

// layers.csv and tensors.csv in a directory.
class DiagnosticsLog {
 public:
  DiagnosticsLog(const std::string& directory, int keep_up_to_step)
      : layers_(directory + "/layers.csv", "step,layer,head,max_logit,entropy,q_rms,k_rms,residual_rms",
                keep_up_to_step),
        tensors_(directory + "/tensors.csv", "step,tensor,grad_norm,weight_rms,update_ratio", keep_up_to_step) {}
  void write(int step, const StepDiagnostics& d) {
    for (const HeadDiagnostics& h : d.heads)
      layers_.row("%d,%d,%d,%.6g,%.6g,%.6g,%.6g,%.6g\n", step, h.layer, h.head, h.max_logit, h.entropy, h.q_rms,
                  h.k_rms, h.residual_rms);
    for (const TensorDiagnostics& t : d.tensors)
      tensors_.row("%d,%s,%.6g,%.6g,%.6g\n", step, t.name.c_str(), t.grad_norm, t.weight_rms, t.update_ratio);
    layers_.flush();
    tensors_.flush();
  }

 private:
  CsvLog layers_, tensors_;
};

// The same as tables for the terminal; of the `heads` heads of a layer those that stand out.
inline void print_diagnostics(const StepDiagnostics& d, int heads) {
  std::printf("\nlayer  largest logit (head)   least entropy (head)   largest rms of q, of k   residual rms\n");
  for (auto begin = d.heads.begin(); begin != d.heads.end(); begin += heads) {
    auto by = [](double HeadDiagnostics::*value) {  // NaN counts as the smallest
      return [value](const HeadDiagnostics& a, const HeadDiagnostics& b) {
        return std::isnan(a.*value) != std::isnan(b.*value) ? std::isnan(a.*value) : a.*value < b.*value;
      };
    };
    const auto end = begin + heads, logit = std::max_element(begin, end, by(&HeadDiagnostics::max_logit)),
               entropy = std::min_element(begin, end, by(&HeadDiagnostics::entropy)),
               q = std::max_element(begin, end, by(&HeadDiagnostics::q_rms)),
               k = std::max_element(begin, end, by(&HeadDiagnostics::k_rms));
    std::printf("%5d %14.5g (%d) %18.5g (%d) %15.4g %9.4g %14.4g\n", begin->layer, logit->max_logit, logit->head,
                entropy->entropy, entropy->head, q->q_rms, k->k_rms, begin->residual_rms);
  }
  std::printf("\n%-28s %14s %14s %14s %11s\n", "tensor", "gradient norm", "weight rms", "update/weight", "not finite");
  for (const TensorDiagnostics& t : d.tensors)
    std::printf("%-28s %14.5g %14.5g %14.5g %11.0f\n", t.name.c_str(), t.grad_norm, t.weight_rms, t.update_ratio,
                t.nonfinite);
}

// What the csv files of a run come to, for summary.json. clip: that of AdamW.
inline nlohmann::ordered_json diagnostics_summary(const std::string& directory, double clip) {
  nlohmann::ordered_json summary;
  const std::vector<double> losses = read_column(directory + "/log.csv", "loss"),
                            norms = read_column(directory + "/log.csv", "grad_norm");
  summary["spike_score_128"] = spike_score(losses, 128);
  summary["spike_score_1000"] = spike_score(losses, 1000);
  size_t clipped = 0;
  for (double norm : norms) clipped += clip > 0 && norm > clip;
  summary["clip_rate"] = norms.empty() ? 0 : double(clipped) / norms.size();
  summary["nonfinite"] = 0;  // a step with such a gradient ends the run, without a summary
  const std::vector<double> steps = read_column(directory + "/layers.csv", "step"),
                            logits = read_column(directory + "/layers.csv", "max_logit"),
                            entropies = read_column(directory + "/layers.csv", "entropy");
  if (steps.empty()) return summary;
  double last = 0, ever = 0, entropy = INFINITY;
  for (size_t i = 0; i < steps.size(); ++i) {
    ever = std::max(ever, logits[i]);
    if (steps[i] != steps.back()) continue;
    last = std::max(last, logits[i]);
    entropy = std::min(entropy, entropies[i]);
  }
  summary["max_logit"] = last;
  summary["max_logit_ever"] = ever;
  summary["entropy_min"] = entropy;
  return summary;
}
