#pragma once
// report.html: a run in plots, made from the files that it wrote. No script, nothing to fetch.

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "run/checkpoint.h"
#include "run/diagnostics.h"
#include "run/print.h"

// Text as HTML shows it, whatever is in it.
inline std::string escaped(const std::string& text) {
  std::string html;
  for (char c : text)
    switch (c) {
      case '&': html += "&amp;"; break;
      case '<': html += "&lt;"; break;
      case '>': html += "&gt;"; break;
      case '"': html += "&quot;"; break;
      default: html += c;
    }
  return html;
}

// A line of a plot: y over x. Where y is not finite the line has a gap.
struct Curve {
  std::string name, colour;
  std::vector<double> x, y;
  bool band = false, dashed = false;  // band: also the range of what a point stands for
};

// A plot as a figure of HTML: the lines in an SVG that stretches with the page, the labels around it in its own size.
class Plot {
 public:
  Plot(const std::string& title, bool log_scale) : title_(title), log_(log_scale) {}
  void add(const Curve& curve) {
    for (size_t i = 0; i < curve.y.size(); ++i) {
      if (!fits(curve.y[i])) continue;
      low_ = std::min(low_, curve.y[i]), high_ = std::max(high_, curve.y[i]);
      first_ = std::min(first_, curve.x[i]), last_ = std::max(last_, curve.x[i]);
    }
    curves_.push_back(curve);
  }
  void level(const std::string& name, double y) { levels_.push_back({name, y}); }

  std::string html() const {
    if (!(high_ >= low_)) return "";
    Plot p = *this;  // the range, with room above and below
    for (const auto& [name, y] : levels_)
      if (fits(y)) p.low_ = std::min(p.low_, y), p.high_ = std::max(p.high_, y);
    if (log_) {
      p.low_ /= 1.05, p.high_ *= 1.05;
    } else {
      const double room = p.high_ > p.low_ ? 0.04 * (p.high_ - p.low_) : std::fabs(p.high_) * 0.1 + 1e-9;
      p.low_ = p.low_ >= 0 ? std::max(0.0, p.low_ - room) : p.low_ - room, p.high_ += room;
    }
    return p.drawn();
  }

 private:
  static constexpr size_t kPoints = 400;  // a curve of more points is drawn as the means of that many stretches
  std::string title_;
  bool log_;
  double low_ = INFINITY, high_ = -INFINITY, first_ = INFINITY, last_ = -INFINITY;
  std::vector<Curve> curves_;
  std::vector<std::pair<std::string, double>> levels_;

  bool fits(double y) const { return std::isfinite(y) && (!log_ || y > 0); }
  double across(double x) const { return last_ > first_ ? 100 * (x - first_) / (last_ - first_) : 50; }
  double down(double y) const {
    const double up = log_ ? std::log(y / low_) / std::log(high_ / low_) : (y - low_) / (high_ - low_);
    return 100 * (1 - up);
  }

  // Round numbers between two others: steps of 1, 2 or 5, or on a logarithmic axis numbers that begin with them.
  static std::vector<double> ticks(double low, double high, bool log_scale) {
    std::vector<double> list;
    if (log_scale) {
      for (int power = int(std::floor(std::log10(low))); power <= std::log10(high); ++power)
        for (double digit : {1, 2, 5}) {
          const double y = digit * std::pow(10, power);
          if (y >= low && y <= high && (digit == 1 || high / low < 300)) list.push_back(y);
        }
      if (list.size() >= 3) return list;
      list.clear();
    }
    const double rough = (high - low) / 5, power = std::pow(10, std::floor(std::log10(rough)));
    double step = 10 * power;
    for (double digit : {5, 2, 1})
      if (digit * power >= rough) step = digit * power;
    for (double y = std::ceil(low / step) * step; y <= high; y += step) list.push_back(std::fabs(y) < step / 2 ? 0 : y);
    return list;
  }

  std::string drawn() const {
    std::string lines, labels, legend;
    auto point = [&](double x, double y) { return format("%.2f", across(x)) + " " + format("%.2f", down(y)); };
    for (double y : ticks(low_, high_, log_)) {
      const std::string at = format("%.2f", down(y));
      lines += "<path class='grid' d='M0 " + at + "H100'/>";
      labels += "<span class='y' style='top:" + at + "%'>" + format("%.4g", y) + "</span>";
    }
    for (double x : ticks(first_, last_, false))
      labels += "<span class='x' style='left:" + format("%.2f", across(x)) + "%'>" + grouped(size_t(x)) + "</span>";
    for (const auto& [name, y] : levels_) {
      if (!fits(y)) continue;
      lines += "<path class='level' d='M0 " + format("%.2f", down(y)) + "H100'/>";
      legend += "<li><i class='dashed'></i>" + escaped(name) + " " + format("%.4g", y) + "</li>";
    }
    for (const Curve& c : curves_) {
      std::string path, upper, lower;
      bool open = false;
      const size_t n = c.y.size(), points = std::min(n, kPoints);
      for (size_t k = 0; k < points; ++k) {
        double sum = 0, count = 0, least = INFINITY, most = -INFINITY;
        const size_t begin = k * n / points, end = (k + 1) * n / points;
        for (size_t i = begin; i < end; ++i)
          if (fits(c.y[i])) sum += c.y[i], ++count, least = std::min(least, c.y[i]), most = std::max(most, c.y[i]);
        if (count) {
          const double x = (c.x[begin] + c.x[end - 1]) / 2;
          path += (open ? "L" : "M") + point(x, sum / count);
          upper += (upper.empty() ? "M" : "L") + point(x, most);
          lower = "L" + point(x, least) + lower;
        }
        open = count > 0;
      }
      const std::string paint = "stroke:" + c.colour + (c.dashed ? ";stroke-dasharray:5 4" : "");
      if (c.band && n > points) lines += "<path style='fill:" + c.colour + ";opacity:.2' d='" + upper + lower + "Z'/>";
      lines += "<path class='line' style='" + paint + "' d='" + path + "'/>";
      if (!c.name.empty())
        legend += "<li><i style='background:" + c.colour + "'></i>" + escaped(c.name) + "</li>";
    }
    return "<figure><h2>" + escaped(title_) + "</h2>" + (legend.empty() ? "" : "<ul>" + legend + "</ul>") +
           "<div class='plot' role='img' aria-label='" + escaped(title_) + ": between " + format("%.4g", low_) +
           " and " + format("%.4g", high_) + ", steps " + format("%.0f", first_) + " to " + format("%.0f", last_) +
           "'><svg viewBox='0 0 100 100' preserveAspectRatio='none' aria-hidden='true'>" + lines + "</svg>" + labels +
           "</div></figure>\n";
  }
};

// One column of layers.csv over the steps, a curve for each layer: of its heads the largest, or the smallest.
inline void add_layers(Plot& plot, std::map<std::string, std::vector<std::string>>& csv, const std::string& column,
                       bool largest) {
  std::map<int, std::map<double, double>> layers;  // layer -> step -> value
  for (size_t i = 0; i < csv["step"].size(); ++i) {
    const double step = std::atof(csv["step"][i].c_str()), value = std::atof(csv[column][i].c_str());
    auto [at, is_new] = layers[std::atoi(csv["layer"][i].c_str())].insert({step, value});
    if (!is_new && (largest ? value > at->second : value < at->second)) at->second = value;
  }
  for (const auto& [layer, values] : layers) {
    // From blue to yellow, light enough at the end: tells more from less to the colour-blind as well.
    const double depth = layers.size() > 1 ? double(layer) / double(layers.size() - 1) : 0;
    Curve curve;
    if (layers.size() <= 8 || layer == 0 || layer == int(layers.size()) - 1)
      curve.name = "layer " + std::to_string(layer);
    curve.colour = "color-mix(in srgb,var(--last) " + format("%.0f", 100 * depth) + "%,var(--first))";
    for (const auto& [step, value] : values) curve.x.push_back(step), curve.y.push_back(value);
    plot.add(curve);
  }
}

// The page as text, from log.csv, val.csv, spikes.csv, layers.csv, config.json and summary.json in a run's directory.
inline std::string report_html(const std::string& directory) {
  const nlohmann::json config = read_json_file(directory + "/config.json"),
                       summary = read_json_file(directory + "/summary.json");
  const std::string name = std::filesystem::path(directory).filename().string();
  auto column = [&](const char* file, const char* what) { return read_column(directory + "/" + file, what); };
  const std::vector<double> steps = column("log.csv", "step");
  auto number = [](const nlohmann::json& object, const char* key) {
    const auto found = object.find(key);
    return found != object.end() && found->is_number() ? found->get<double>() : NAN;
  };

  Plot loss("Loss, nats per token", true), rate("Learning rate", false), norm("Gradient norm, before clipping", true);
  loss.add({"training", "var(--first)", steps, column("log.csv", "loss"), true});
  loss.add({"validation", "var(--other)", column("val.csv", "step"), column("val.csv", "val_loss")});
  if (std::isfinite(number(summary, "floor"))) loss.level("lowest possible on this corpus", number(summary, "floor"));
  rate.add({"", "var(--first)", steps, column("log.csv", "lr")});
  norm.add({"", "var(--first)", steps, column("log.csv", "grad_norm"), true});
  if (number(config, "clip") > 0) norm.level("clipped at", number(config, "clip"));
  std::string plots = loss.html() + norm.html() + rate.html();
  auto layers = read_csv(directory + "/layers.csv");
  if (!layers["step"].empty()) {
    struct Inside {
      const char *title, *column;
      bool log_scale, largest;
    };
    for (const Inside& inside : {Inside{"Largest attention logit of a layer", "max_logit", true, true},
                                 {"Least entropy of a head's attention, nats", "entropy", false, false},
                                 {"Root mean square of the queries, largest head", "q_rms", true, true},
                                 {"Root mean square of the residual stream", "residual_rms", true, true}}) {
      Plot plot(inside.title, inside.log_scale);
      add_layers(plot, layers, inside.column, inside.largest);
      plots += plot.html();
    }
  }

  std::string figures;
  auto row = [&](const std::string& what, const std::string& value) {
    figures += "<div><dt>" + escaped(what) + "</dt><dd>" + escaped(value) + "</dd></div>";
  };
  const double val = number(summary, "val_loss"), floor = number(summary, "floor");
  const std::string above = std::isfinite(floor) ? format(", %.1f %% above the floor", 100 * (val / floor - 1)) : "";
  row("validation loss", format("%.4f", val) + above);
  row("RoPE turns",
      format("%.0f of ", number(summary, "rotary_dim")) + format("%.0f channels", number(summary, "head_size")));
  row("parameters", format("%.2f M", number(summary, "parameters") * 1e-6));
  row("steps", format("%.0f, ", number(summary, "steps")) + format("%.4g M tokens", number(summary, "tokens") * 1e-6));
  if (std::isfinite(number(summary, "training_seconds")))
    row("trained", duration_text(number(summary, "training_seconds")) +
                       format(", %.0f tokens/s", number(summary, "tokens_per_second")));
  row("clipped", format("%.1f %% of the steps", 100 * number(summary, "clip_rate")));
  row("loss spikes", std::to_string(column("spikes.csv", "step").size()));
  std::string settings;
  for (const auto& [key, value] : config.items())
    settings += "<tr><th scope='row'>" + escaped(key) + "</th><td>" +
                escaped(value.is_string() ? value.get<std::string>() : value.dump(-1, ' ', true)) + "</td></tr>";

  return R"(<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>)" + escaped(name) + R"(: report</title>
<style>
:root { --paper: #fff; --ink: #1a1f26; --muted: #59636e; --line: #d6dbe1;
  --first: #0072b2; --other: #d55e00; --last: #e6b800; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e7eaee; --muted: #a5afba; --line: #363d46;
    --first: #4da3e8; --other: #ff8142; --last: #f0e442; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --muted: #444; --line: #bbb; }
  figure { break-inside: avoid; }
}
body { margin: 0 auto; max-width: 72rem; padding: 0 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 2rem 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 .3rem; }
a { color: var(--first); }
dl { display: flex; flex-wrap: wrap; gap: .8rem 2.2rem; margin: 1rem 0 2rem; }
dt { color: var(--muted); font-size: .85rem; }
dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 2.2rem 3rem; }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column; }
figure ul { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1.1rem; padding: 0; margin: 0;
  color: var(--muted); font-size: .85rem; }
figure i { display: inline-block; width: 1.1rem; height: 3px; vertical-align: middle; margin-right: .4rem; }
figure i.dashed { height: 0; border-top: 2px dashed var(--ink); }
.plot { position: relative; height: 15rem; margin: auto .4rem 1.8rem 3.2rem; width: calc(100% - 3.6rem); top: .5rem; }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: hidden; box-sizing: border-box;
  border-left: 1px solid var(--line); border-bottom: 1px solid var(--line); }
.plot path { fill: none; vector-effect: non-scaling-stroke; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .level { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 4; }
.plot .line { stroke-width: 2; stroke-linejoin: round; }
.plot span { position: absolute; color: var(--muted); font-size: .78rem; font-variant-numeric: tabular-nums; }
.plot .y { right: calc(100% + .4rem); transform: translateY(-50%); }
.plot .x { top: calc(100% + .2rem); transform: translateX(-50%); }
details { margin-top: 2rem; }
table { border-collapse: collapse; font-size: .88rem; }
th { font-weight: 400; color: var(--muted); text-align: left; padding-right: 1.5rem; }
td { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>)" + escaped(name) + "</h1>\n" +
         (std::filesystem::exists(directory + "/page.html")
              ? "<p><a href='page.html'>One token's way through this model</a></p>\n" : "") +
         "<dl>" + figures + "</dl>\n<main class='plots'>\n" + plots + "</main>\n" +
         "<details><summary>Settings</summary><table>" + settings + "</table></details>\n" +
         "<p>The x axis counts steps. Numbers: log.csv, val.csv" +
         (layers["step"].empty() ? "; with --diagnostics-every, layers.csv adds plots of what happens inside"
                                 : ", layers.csv") +
         ".</p>\n</body>\n</html>\n";
}

inline void write_report(const std::string& directory) {
  write_text_file(directory + "/report.html", report_html(directory));
}
