#pragma once
// eval positions, eval length: loss by position in the window, up to the training context and beyond it.

#include "eval/source.h"

// Positions [begin, end) of the window, and the loss there over windows.
struct PositionBin {
  int begin, end;
  Mean loss;
};

// Bins of positions 0, 1, 2-3, 4-7, ... up to T. One ends at `context`, so that what lies beyond it stands apart.
inline std::vector<PositionBin> position_bins(int T, int context) {
  std::vector<PositionBin> bins;
  for (int begin = 0; begin < T;) {
    int end = std::min(T, std::max(1, 2 * begin));
    if (begin < context && context < end) end = context;
    bins.push_back({begin, end, {}});
    begin = end;
  }
  return bins;
}

// The loss in windows of model.T positions, about `limit` tokens of them, from the beginning of the data on. A window
// adds its mean over a bin to the bin, so the standard errors are those between windows.
template <class Backend, class Real, class Progress>
std::vector<PositionBin> loss_by_position(Model<Backend, Real>& model, const Dataset& data, size_t limit,
                                          Progress progress) {
  const int B = model.B, T = model.T;
  std::vector<PositionBin> bins = position_bins(T, model.config.context);
  std::vector<int> inputs(size_t(B) * T), targets(size_t(B) * T);
  std::vector<Acc<Real>> losses(size_t(B) * T);
  const size_t windows = std::min(data.windows(T), std::max<size_t>(1, limit / T));
  for (size_t w = 0; w < windows; w += size_t(B)) {
    const int count = int(std::min<size_t>(B, windows - w));
    for (int b = 0; b < count; ++b) data.window(w + b, T, &inputs[size_t(b) * T], &targets[size_t(b) * T]);
    model.forward(inputs.data(), count, T);
    model.loss(losses.data(), targets.data(), count, T);
    for (int b = 0; b < count; ++b)
      for (PositionBin& bin : bins) {
        double sum = 0;
        for (int t = bin.begin; t < bin.end; ++t) sum += double(losses[size_t(b) * T + t]);
        bin.loss.add(sum / (bin.end - bin.begin));
      }
    progress((w + count) * T);
  }
  return bins;
}

// positions and length: the loss by position, at the training context or at several times it.
inline void command_by_position(const std::vector<std::string>& args, const std::vector<int>& lengths,
                         const std::string& description, const std::string& program) {
  Place place;
  std::string pattern, out;
  int64_t tokens = 1 << 18;
  Flags f(description, program);
  add_place_flags(f, place, true);
  f.group("Data");
  f.add("data", pattern, "shards, a glob pattern; default: the run's validation data");
  f.add("tokens", tokens, "about how many to predict, at each length");
  add_context_flag(f, place);
  add_batch_flag(f, place, "windows");
  f.add("out", out, "a .csv file of the table; scripts/plot_positions.py draws it");
  f.parse(args);
  expect_positive("tokens", double(tokens));
  const Source source = open_source(place.run);
  const int context = source.settings.model.context, base = context_of(place, source);
  const Dataset data = open_data(source, pattern);
  data.windows(base * lengths.back());  // a shard that is too short is refused now
  std::string csv = "context,begin,end,windows,loss,stderr\n";
  std::printf("%s, on %s, trained at %d positions\n", describe(source).c_str(), pattern.c_str(), context);
  for (int times : lengths) {
    const int T = base * times;
    std::vector<PositionBin> bins;
    with_model(place, source, int(std::clamp<int64_t>(tokens / T, 1, 1024)), T, [&](auto& model) {
      bins = loss_by_position(model, data, size_t(tokens), ProgressLine{"tokens", size_t(tokens)});
    });
    std::printf("\n  %s windows of %d\n", grouped(bins[0].loss.n).c_str(), T);
    std::printf("  %-15s %s\n", "positions", "nats per token");
    expect_finite(bins[0].loss.mean(), source);
    double all = 0;
    for (const PositionBin& bin : bins) {
      const double mean = bin.loss.mean(), error = bin.loss.error();
      const std::string last = bin.end - bin.begin > 1 ? " to " + std::to_string(bin.end - 1) : "";
      std::printf("  %-15s %.4f +- %.4f%s\n", (std::to_string(bin.begin) + last).c_str(), mean, error,
                  bin.begin >= context ? "   beyond the training context" : "");
      for (size_t n : {size_t(T), size_t(bin.begin), size_t(bin.end), bin.loss.n}) csv += std::to_string(n) + ",";
      csv += format("%.6f", mean) + "," + format("%.6f", error) + "\n";
      all += mean * (bin.end - bin.begin) / T;
    }
    std::printf("  %-15s %.4f\n", "all", all);
  }
  if (!out.empty()) write_text_file(out, csv);
}

inline void command_positions(const std::vector<std::string>& args) {
  command_by_position(args, {1}, "Loss by position in the training window.", "eval positions");
}
inline void command_length(const std::vector<std::string>& args) {
  command_by_position(args, {1, 2, 4, 8}, "Loss at 1, 2, 4 and 8 times the training context, by position.",
                      "eval length");
}
