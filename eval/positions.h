#pragma once
// eval positions, eval length: loss by position in the window, up to the training context and beyond it.

#include <optional>

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

// The mean loss over the last `count` targets of each of the first `windows` windows of `longest` positions, of which
// the model sees the last model.T only: the same targets for every T.
template <class Backend, class Real>
std::vector<double> loss_of_ends(Model<Backend, Real>& model, const Dataset& data, size_t windows, int longest,
                                 int count) {
  const int B = model.B, T = model.T, skipped = longest - T;
  std::vector<int> in(longest), out(longest), inputs(size_t(B) * T), targets(size_t(B) * T, -1);
  std::vector<Acc<Real>> losses(size_t(B) * T);
  std::vector<double> means;
  while (means.size() < windows) {
    const int rows = int(std::min<size_t>(B, windows - means.size()));
    for (int b = 0; b < rows; ++b) {
      data.window(means.size() + b, longest, in.data(), out.data());
      std::copy_n(&in[skipped], T, &inputs[size_t(b) * T]);
      std::copy_n(&out[longest - count], count, &targets[size_t(b) * T + T - count]);
    }
    model.forward(inputs.data(), rows, T);
    model.loss(losses.data(), targets.data(), rows, T);
    for (int b = 0; b < rows; ++b) {
      double sum = 0;
      for (int t = T - count; t < T; ++t) sum += double(losses[size_t(b) * T + t]);
      means.push_back(sum / count);
    }
  }
  return means;
}

// Divides every attention score by `temperature`, in what makes the queries: the norm's weight, or the rows of qkv.
template <class Backend, class Real>
void divide_scores(Model<Backend, Real>& model, double temperature) {
  const Config& c = model.config;
  std::vector<Acc<Real>> host(model.table.total);
  model.be.download(host.data(), model.master, host.size() * sizeof(Acc<Real>));
  for (const ParameterRow& row : model.table.rows) {
    auto is = [&](const std::string& name) {
      return row.name.size() > name.size() && row.name.substr(row.name.size() - name.size()) == name;
    };
    const bool queries = c.qk_norm ? is(".q_norm.weight") : is(".qkv.weight") || is(".qkv.bias");
    const size_t count = c.qk_norm ? row.count : row.count / c.qkv_width() * c.heads * c.head_size;
    for (size_t i = 0; queries && i < count; ++i) host[row.offset + i] /= Acc<Real>(temperature);
  }
  model.set_weights(host.data());
}

// Another position code, or sharper or flatter attention, than the model was trained with.
struct PositionChange {
  double base = 0, interpolate = 1, yarn = 1, temperature = 1;  // base 0: the model's; a factor of 0: see factor()
  std::optional<int> R;

  void add_flags(Flags& f) {
    f.group("Position");
    f.add("rope-base", base, "another base of the frequencies; 0: the model's");
    f.add("rope-scale", interpolate, "divides the frequencies (position interpolation); 0: window / training context");
    f.add("yarn", yarn, "YaRN by this factor; 0: window / training context");
    f.add("rotary-dim", R, "another number of rotated channels; 0: none", [] { return 0; }, [](int) {});
    f.add("attention-temperature", temperature, "divides the attention scores");
  }
  // The model's settings for windows of T positions. R is the model's in all scalings, not the head size.
  Config apply(Config c, int T) const {
    auto factor = [&](double given) { return format("%.17g", given == 0 ? double(T) / c.context : given); };
    if (base != 0) c.rope_base = base;
    if (R) c.rotary_dim = *R, c.rotary_layers = "all";
    if (interpolate != 1) c.rope_scaling = "linear:" + factor(interpolate);
    if (yarn != 1) c.rope_scaling = "yarn:" + factor(yarn) + "," + std::to_string(c.context);
    resolve(c);
    return c;
  }
};

// positions and length: the loss by position, at the training context or at several times it.
inline void command_by_position(const std::vector<std::string>& args, const std::vector<int>& lengths,
                                const std::string& description, const std::string& program) {
  Place place;
  PositionChange change;
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
  change.add_flags(f);
  f.parse(args);
  expect_positive("tokens", double(tokens));
  expect_positive("rope-base", change.base, true);
  expect_positive("rope-scale", change.interpolate, true);
  expect_positive("yarn", change.yarn, true);
  expect_positive("attention-temperature", change.temperature);
  if (change.interpolate != 1 && change.yarn != 1) throw UserError("--rope-scale, --yarn: give one of them");
  Source source = open_source(place.run);
  const Config trained = source.settings.model;
  const int context = trained.context, base = context_of(place, source), longest = base * lengths.back();
  const Dataset data = open_data(source, pattern);
  // The ends of the longest windows, as targets: half the first length each, so that a window that is cut to it has
  // the other half and more to look back on.
  const int ends = std::max(1, base / 2);
  const size_t windows = std::min(data.windows(longest),  // a shard that is too short is refused now
                                  std::max<size_t>(1, size_t(tokens) / longest));
  std::string csv = "context,begin,end,windows,loss,stderr\n";
  std::string ends_text, ends_csv = "context,windows,loss,stderr,gain,gain_stderr\n";
  std::vector<double> cut;  // the ends' losses in windows of the training context
  std::printf("%s, on %s, trained at %d positions\n", describe(source).c_str(), pattern.c_str(), context);
  for (int times : lengths) {
    const int T = base * times;
    std::vector<PositionBin> bins;
    std::vector<double> end_losses;
    source.settings.model = change.apply(trained, T);
    with_model(place, source, int(std::clamp<int64_t>(tokens / T, 1, 1024)), T, [&](auto& model) {
      if (change.temperature != 1) divide_scores(model, change.temperature);
      bins = loss_by_position(model, data, size_t(tokens), ProgressLine{"tokens", size_t(tokens)});
      if (lengths.size() > 1) end_losses = loss_of_ends(model, data, windows, longest, ends);
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
    if (times == 1) cut = end_losses;
    Mean loss, gain;
    for (size_t i = 0; i < end_losses.size(); ++i) loss.add(end_losses[i]), gain.add(cut[i] - end_losses[i]);
    if (end_losses.empty()) continue;
    const std::string length = std::to_string(T);
    ends_text += "  " + length + std::string(16 - std::min<size_t>(15, length.size()), ' ');
    ends_text += format("%.4f", loss.mean()) + format(" +- %.4f", loss.error());
    ends_text += times == 1 ? "\n" : format("   %+.4f", gain.mean()) + format(" +- %.4f\n", gain.error());
    ends_csv += length + "," + std::to_string(loss.n);
    for (double x : {loss.mean(), loss.error(), gain.mean(), gain.error()}) ends_csv += "," + format("%.6f", x);
    ends_csv += "\n";
  }
  if (!ends_text.empty())
    std::printf("\n  The same targets at every length: the last %d of %s windows of %d\n  %-15s %s\n%s", ends,
                grouped(windows).c_str(), longest, "positions seen",
                "nats per token   gain over a window cut to the first", ends_text.c_str());
  if (out.empty()) return;
  write_text_file(out, csv);
  if (!ends_text.empty()) write_text_file(out.substr(0, out.rfind(".csv")) + ".ends.csv", ends_csv);
}

inline void command_positions(const std::vector<std::string>& args) {
  command_by_position(args, {1}, "Loss by position in the training window.", "eval positions");
}
inline void command_length(const std::vector<std::string>& args) {
  command_by_position(args, {1, 2, 4, 8}, "Loss at 1, 2, 4 and 8 times the training context, by position.",
                      "eval length");
}
