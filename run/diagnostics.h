#pragma once
// What a run tells about itself: loss spikes, and for the steps of --diagnostics-every what goes on inside the model: as
// csv files, a table and figures of the summary. The numbers are made in run/diagnostics.cuh.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "run/csv.h"

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
  void sync() {
    layers_.sync();
    tensors_.sync();
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
