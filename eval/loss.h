#pragma once
// eval loss: nats per token and bits per byte on shards.

#include "eval/source.h"

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

inline void command_loss(const std::vector<std::string>& args) {
  Place place;
  std::string pattern;
  int64_t tokens = 0;
  Flags f("Loss of a model on shards: every token but the first of each is predicted.", "eval loss");
  add_place_flags(f, place, true);
  f.group("Data");
  f.add("data", pattern, "shards, a glob pattern; default: the run's validation data");
  f.add("tokens", tokens, "how many to predict; 0: all");
  add_context_flag(f, place);
  add_batch_flag(f, place, "windows");
  f.parse(args);
  expect_positive("tokens", double(tokens), true);
  const Source source = open_source(place.run);
  const int context = context_of(place, source);
  const Dataset data = open_data(source, pattern);
  const Meta meta = read_meta(pattern);
  size_t most = 0;
  for (const Shard& shard : data.shards()) most += shard.size() - 1;
  if (most == 0) throw UserError("--data " + pattern + ": one token alone predicts nothing; two or more are needed");
  if (tokens) most = std::min(most, size_t(tokens));
  LossReport report;
  const int T = int(std::min<size_t>(context, most));  // of less than a window, no more is worked on
  with_model(place, source, int(std::min<size_t>((most + T - 1) / T, INT_MAX)), T, [&](auto& model) {
    report = evaluate_loss(model, data, source.tokenizer.get(), size_t(tokens), ProgressLine{"tokens", most});
  });
  expect_finite(report.loss(), source);
  // The floor of the split that the shards are of, by their name.
  const std::string name = std::filesystem::path(pattern).filename().string();
  const double floor = name.find("train") != std::string::npos ? meta.train.entropy
                       : name.find("val") != std::string::npos ? meta.val.entropy
                                                               : NAN;
  std::printf("%s, on %s in windows of %d\n", describe(source).c_str(), pattern.c_str(), context);
  std::printf("  tokens predicted   %s\n", grouped(report.tokens).c_str());
  std::printf("  loss               %.4f nats per token", report.loss());
  if (!std::isnan(floor))
    std::printf("   (lowest that any model can reach on the whole: %.4f; this is %.1f %% above)", floor,
                100 * (report.loss() / floor - 1));
  std::printf("\n  perplexity         %.4f\n", report.perplexity());
  if (report.bytes)
    std::printf("  bits per byte      %.4f   (over %s bytes of text)\n", report.bits_per_byte(),
                grouped(report.bytes).c_str());
}
