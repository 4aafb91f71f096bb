#pragma once
// What `eval` computes: loss over shards, memory of a configuration, .npy files. eval.cpp has the commands.

#include <cstdio>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "run/checkpoint.h"
#include "run/print.h"
#include "text/shards.h"
#include "model.h"
#include "text/tokenizer.h"

// ---------------------------------------------------------------------------------------------------------------------
// Loss

struct LossReport {
  size_t tokens = 0;                                     // predicted
  size_t bytes = 0;                                      // of text that they stand for
  double nats = 0;                                       // summed over them
  double loss() const { return nats / double(tokens); }  // nats per token
  double perplexity() const { return std::exp(loss()); }
  // Cost of the text in bits per byte, comparable across tokenizers. The ends of documents cost but have no bytes.
  double bits_per_byte() const { return nats / M_LN2 / double(bytes); }
};

// Predicts every token but the first of each shard, or the first `limit` of them (0: all), in windows of model.T
// positions that start afresh, model.B at a time; a shorter window at the end of a shard counts as well. Without a
// tokenizer the bytes stay 0. progress(tokens done) is called after each batch.
template <class Backend, class Real, class Progress>
LossReport evaluate_loss(Model<Backend, Real>& model, const Dataset& data, const Tokenizer* tokenizer, size_t limit,
                         Progress progress) {
  const int B = model.B, T = model.T;
  std::vector<size_t> bytes_of(model.config.vocab, 0);
  for (int id = 0; tokenizer && id < std::min(tokenizer->vocabulary(), model.config.vocab); ++id) {
    std::string text;
    tokenizer->decode(id, text);
    bytes_of[id] = text.size();
  }
  LossReport report;
  std::vector<int> inputs(size_t(B) * T), targets(size_t(B) * T);
  std::vector<Acc<Real>> losses(size_t(B) * T);
  int windows = 0;
  size_t taken = 0;
  auto run = [&] {
    if (windows == 0) return;
    model.forward(inputs.data(), windows, T);
    model.loss(losses.data(), targets.data(), windows, T);
    for (int i = 0; i < windows * T; ++i)
      if (targets[i] >= 0) {
        report.nats += double(losses[i]);
        report.bytes += bytes_of[targets[i]];
        ++report.tokens;
      }
    windows = 0;
    progress(report.tokens);
  };
  for (const Shard& shard : data.shards())
    for (size_t start = 0; start + 1 < shard.size() && (limit == 0 || taken < limit); start += T) {
      size_t count = std::min(size_t(T), shard.size() - 1 - start);
      if (limit) count = std::min(count, limit - taken);
      int* input = &inputs[size_t(windows) * T];
      int* target = &targets[size_t(windows) * T];
      for (int t = 0; t < T; ++t) {
        const bool used = size_t(t) < count;  // attention is causal: what fills the rest cannot be seen
        input[t] = used ? shard[start + t] : 0;
        target[t] = used ? shard[start + t + 1] : -1;
      }
      taken += count;
      if (++windows == B) run();
    }
  run();
  return report;
}

// ---------------------------------------------------------------------------------------------------------------------
// .npy, version 1.0 (numpy.lib.format): magic, header length, a Python dictionary, padding to 64 bytes, the numbers.

inline std::string npy_header(size_t rows, size_t columns) {
  std::string dictionary = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows) + ", " +
                           std::to_string(columns) + "), }";
  dictionary.append(63 - (10 + dictionary.size()) % 64, ' ');
  dictionary += '\n';
  std::string header = "\x93NUMPY";
  header += {char(1), char(0), char(dictionary.size() & 255), char(dictionary.size() >> 8)};
  return header + dictionary;
}

// values (rows, columns).
inline void write_npy(const std::string& path, const std::vector<float>& values, size_t rows, size_t columns) {
  const std::string header = npy_header(rows, columns);
  write_file(path, {{header.data(), header.size()}, {values.data(), values.size() * sizeof(float)}});
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory, tensor by tensor, from the lists in model.h; nothing is allocated.

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
  visit_activation_gradients(c, size_t(B) * T, d, visit);
  return rows;
}
