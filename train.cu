// train: trains a GPT with partial RoPE on tokenized shards.
//
// One optimiser step: `accumulate` micro-batches forward and backward, clipping, AdamW. What a run writes is in
// runs/NAME: config.json, log.csv, val.csv, summary.json, checkpoint/. Ctrl-C finishes the step and saves.

#include <sys/ioctl.h>

#include <csignal>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <memory>

#include "checkpoint.h"
#include "data.h"
#include "eval.h"
#include "flags.h"
#include "generate.h"

namespace fs = std::filesystem;

static volatile std::sig_atomic_t interrupted = 0;
static void on_interrupt(int) { interrupted = 1; }

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static std::string duration_text(double seconds) {
  const long s = std::lround(std::max(0.0, seconds));
  char text[32];
  if (s < 3600)
    std::snprintf(text, sizeof text, "%ld:%02ld", s / 60, s % 60);
  else
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
  return text;
}

// A csv file of the run. On resume, rows of steps after the checkpoint are dropped: they will be computed again.
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
    fs::rename(path + ".part", path);
    file_ = std::fopen(path.c_str(), "a");
    if (!file_) throw UserError(path + ": cannot write: " + std::strerror(errno));
  }
  ~CsvLog() { std::fclose(file_); }
  template <class... Values>
  void row(const char* format, Values... values) {
    if (std::fprintf(file_, format, values...) < 0 || std::fflush(file_) != 0)
      throw UserError(path_ + ": cannot write: " + std::strerror(errno));
  }

 private:
  std::string path_;
  std::FILE* file_;
};

// Reads rows of a csv file back as (first column, column `value`).
static std::vector<std::pair<double, double>> read_csv(const std::string& path, int value) {
  std::vector<std::pair<double, double>> rows;
  std::ifstream file(path);
  std::string line, cell;
  std::getline(file, line);
  while (std::getline(file, line)) {
    std::stringstream cells(line);
    std::vector<double> row;
    while (std::getline(cells, cell, ',')) row.push_back(std::atof(cell.c_str()));
    if (int(row.size()) > value) rows.push_back({row[0], row[value]});
  }
  return rows;
}

// The loss over the steps as a picture of text: a column per stretch of steps, its mean as a dot; the floor as a line.
// The axis is logarithmic: most of a run happens near its end.
static void print_curve(const std::vector<std::pair<double, double>>& points, double floor) {
  const int width = 64, height = 12;
  if (points.size() < 2) return;
  std::vector<double> sum(width), count(width);
  for (size_t i = 0; i < points.size(); ++i) {
    const size_t column = i * width / points.size();
    sum[column] += points[i].second;
    count[column] += 1;
  }
  double high = -INFINITY, low = std::isnan(floor) ? INFINITY : floor;
  for (int x = 0; x < width; ++x)
    if (count[x]) high = std::max(high, sum[x] / count[x]), low = std::min(low, sum[x] / count[x]);
  if (!(low > 0 && high > low)) return;
  const double range = std::log(high / low);
  auto line_of = [&](double value) { return int(std::lround(std::log(high / value) / range * (height - 1))); };
  std::printf("\n  training loss, nats per token\n");
  for (int y = 0; y < height; ++y) {
    std::string line(width, !std::isnan(floor) && line_of(floor) == y ? '.' : ' ');
    for (int x = 0; x < width; ++x)
      if (count[x] && line_of(sum[x] / count[x]) == y) line[x] = '*';
    std::printf("  %6.2f |%s%s\n", high * std::exp(-range * y / (height - 1)), line.c_str(),
                !std::isnan(floor) && line_of(floor) == y ? " floor" : "");
  }
  std::printf("         +%s\n          step %-10.0f%*s%.0f\n\n", std::string(width, '-').c_str(), points.front().first,
              width - 22, "", points.back().first);
}

// What is decided before any memory is taken: settings, data, where the run's files go, what it starts from.
struct Run {
  Settings s;
  std::string directory;
  std::string checkpoint, init;  // the checkpoint to resume from, or to take the weights from, or empty
  nlohmann::json state;
  Meta meta;
  std::unique_ptr<Dataset> train, val;
  std::unique_ptr<Tokenizer> tokenizer;  // null where the shards do not say which
};

static Run prepare(const std::vector<std::string>& args) {
  Run run;
  Settings& s = run.s;
  Settings asked;
  apply_flags(asked, args);
  if (asked.resume) {
    if (asked.run.empty()) throw UserError("--resume: say which run with --run NAME");
    run.directory = "runs/" + asked.run;
    run.checkpoint = find_checkpoint(run.directory);
    run.state = read_json_file(run.checkpoint + "/state.json");
    s = settings_from_state(run.checkpoint + "/state.json", run.state);
    check_weights(s.model, run.checkpoint);
  } else {
    apply_flags(s, preset_flags(asked.preset));
  }
  if (!asked.init.empty() && !asked.resume) {
    run.init = locate_checkpoint(asked.init);
    if (run.init.empty())
      throw UserError("--init " + asked.init + ": no checkpoint in runs/" + asked.init + " or " + asked.init);
    const std::string state = run.init + "/state.json";
    s.model = settings_from_state(state, read_json_file(state)).model;
    check_weights(s.model, run.init);
    s.rotary_fraction = NAN;
  }
  Settings before = s;
  // A preset named again on resume must not reset the run's own flags: its flags count as given by the user.
  std::vector<std::string> user = args;
  if (asked.resume)
    for (const std::string& arg : args)
      if (arg.rfind("--preset", 0) == 0) {
        user = preset_flags(asked.preset);
        user.insert(user.end(), args.begin(), args.end());
      }
  apply_flags(s, user);

  expect_positive("steps", s.steps);
  expect_positive("batch", s.batch);
  expect_positive("accumulate", s.accumulate);
  expect_positive("lr", s.lr);
  if (s.min_lr != -1) expect_positive("min-lr", s.min_lr, true);
  if (s.warmup != -1) expect_positive("warmup", s.warmup, true);
  expect_positive("weight-decay", s.weight_decay, true);
  expect_positive("eps", s.eps);
  expect_positive("init-std", s.init_std);
  expect_positive("clip", s.clip, true);
  expect_positive("z-loss", s.z_loss, true);
  expect_positive("val-every", s.val_every, true);
  expect_positive("val-tokens", s.val_tokens);
  expect_positive("sample-every", s.sample_every, true);
  expect_positive("checkpoint-every", s.checkpoint_every, true);
  expect_positive("threads", s.threads, true);
  for (auto [flag, beta] : {std::pair{"--beta1 ", s.beta1}, std::pair{"--beta2 ", s.beta2}})
    if (!(beta >= 0 && beta < 1)) throw UserError(flag + std::to_string(beta) + ": must lie between 0 and 1");

  if (s.val.empty()) {
    s.val = s.data;
    const size_t slash = s.val.rfind('/') == std::string::npos ? 0 : s.val.rfind('/');
    const size_t at = s.val.find("train", slash);
    if (at == std::string::npos)
      throw UserError("--val: cannot be guessed from --data " + s.data + ", which does not say train");
    s.val.replace(at, 5, "val");
  }
  run.train = std::make_unique<Dataset>(s.data);
  run.val = std::make_unique<Dataset>(s.val);
  run.meta = read_meta(s.data);
  if (!run.meta.tokenizer.empty()) run.tokenizer = make_tokenizer(run.meta.tokenizer, directory_of(s.data));
  if (s.model.vocab == 0) {
    if (!run.meta.vocabulary) throw UserError("--vocab: needed, because there is no meta.json beside " + s.data);
    s.model.vocab = (run.meta.vocabulary + 7) / 8 * 8;
  }
  resolve(s.model, s.rotary_fraction);
  for (const Dataset* data : {run.train.get(), run.val.get()}) {
    data->windows(s.model.context);
    data->check_tokens(s.model.vocab);
  }
  if (asked.resume || !run.init.empty()) {
    std::vector<std::string> groups = {"Model"};
    if (asked.resume) groups.push_back("Optimiser");
    const auto was = settings_json(before, groups), is = settings_json(s, groups);
    for (const auto& [key, value] : was.items())
      if (key != (asked.resume ? "steps" : "context") && is[key] != value)
        throw UserError((asked.resume ? "--resume: " : "--init: ") + key + " is " + is[key].dump() + " but was " +
                        value.dump() + " in " + (asked.resume ? run.checkpoint : run.init) +
                        "; leave the flag out, or start a new run");
  }
  if (!asked.resume) {
    const std::string base = s.run.empty() ? s.preset : s.run;
    std::string name = base;
    for (int i = 2; s.run.empty() && fs::exists("runs/" + name); ++i) name = base + "-" + std::to_string(i);
    run.directory = "runs/" + name;
    if (fs::exists(run.directory))
      throw UserError("--run " + name + ": " + run.directory +
                      " exists; add --resume to go on with it, or choose another name");
    s.run = name;
  }
  return run;
}

// All settings, a group a paragraph, lines of at most 110 characters.
static void print_settings(Settings& s) {
  for (const char* group : {"Model", "Optimiser", "Run"}) {
    std::string line = std::string(group) + ":";
    const nlohmann::ordered_json settings = settings_json(s, {group});
    for (const auto& [key, value] : settings.items()) {
      const std::string item = " " + key + "=" + (value.is_string() ? value.get<std::string>() : value.dump());
      if (line.size() + item.size() > 110) {
        std::printf("%s\n", line.c_str());
        line = " ";
      }
      line += item;
    }
    std::printf("%s\n", line.c_str());
  }
}

// Refuses what does not fit, and says what would.
template <class Backend, class Real>
static void expect_memory(Config c, int B, size_t available, const MemoryReport& needed) {
  if (needed.total() <= available) return;
  std::string advice;
  if (!c.recompute) {
    c.recompute = true;
    advice = "; --recompute would take " + human_bytes(memory_report<Backend, Real>(c, B, c.context).total());
    c.recompute = false;
  }
  while (B > 1 && memory_report<Backend, Real>(c, B, c.context).total() > available) --B;
  if (memory_report<Backend, Real>(c, B, c.context).total() <= available)
    advice += "; --batch " + std::to_string(B) + " fits (with more --accumulate)";
  else
    advice += "; even --batch 1 does not fit: a smaller model or --context is needed";
  throw UserError("--batch: not enough memory: " + human_bytes(needed.total()) + " needed, " + human_bytes(available) +
                  (std::is_same_v<Backend, Cpu> ? " in this machine" : " free on the GPU") + advice);
}

template <class Backend, class Real>
int train(Backend& be, Run& run) {
  using A = Acc<Real>;
  Settings& s = run.s;
  const Config& c = s.model;
  const int B = s.batch, T = c.context, N = B * T;
  const int val_every = s.val_every ? s.val_every : std::max(1, s.steps / 8);
  const int checkpoint_every = s.checkpoint_every ? s.checkpoint_every : std::max(1, s.steps / 4);
  const int warmup = s.warmup >= 0 ? s.warmup : (s.steps + 19) / 20;
  const double min_lr = s.min_lr >= 0 ? s.min_lr : s.lr / 10;
  const size_t tokens_per_step = size_t(N) * s.accumulate;
  const double floor = run.meta.val.entropy;
  const bool terminal = isatty(STDOUT_FILENO);

  const MemoryReport memory = memory_report<Backend, Real>(c, B, T);
  expect_memory<Backend, Real>(c, B, be.available_memory(), memory);
  Model<Backend, Real> model(be, c, B, T, true);
  int step = 0;
  if (!run.init.empty()) {
    load_weights(model, run.init);
  } else if (run.checkpoint.empty()) {
    model.initialise_weights(s.seed, s.init_std);
  } else {
    load_weights(model, run.checkpoint);
    load_optimizer(model, run.checkpoint);
    step = run.state["step"];
  }
  std::error_code error;
  fs::create_directories(run.directory, error);
  if (error) throw UserError(run.directory + ": cannot create the run's directory: " + error.message());
  write_text_file(run.directory + "/config.json", settings_json(s).dump(2) + "\n");
  if (run.tokenizer && !run.tokenizer->file().empty())
    write_text_file(run.directory + "/tokenizer.json", read_text_file(run.tokenizer->file()));  // for eval
  CsvLog log(run.directory + "/log.csv", "step,tokens,loss,lr,grad_norm,tokens_per_second", step);
  CsvLog val_log(run.directory + "/val.csv", "step,tokens,val_loss", step);

  print_settings(s);
  std::printf("RoPE turns %d of %d channels of each query and key head (%.1f %%); table %s.\n", c.rotary_dim,
              c.head_size, 100.0 * c.rotary_dim / c.head_size, human_bytes(memory.rope_table).c_str());
  std::printf(
      "%.2f M parameters on %s, %s. Memory: parameters %s, gradients %s, optimiser %s, activations %s; %s in all.\n",
      model.table.parameters * 1e-6, Backend::name, dtype_name<Real>(), human_bytes(memory.parameters).c_str(),
      human_bytes(memory.gradients).c_str(), human_bytes(memory.optimizer).c_str(),
      human_bytes(memory.activations).c_str(), human_bytes(memory.total()).c_str());
  std::printf("Data: %.2f M training tokens, %zu a step, so %.2f epochs in %d steps.\n", run.train->tokens() * 1e-6,
              tokens_per_step, double(tokens_per_step) * s.steps / run.train->tokens(), s.steps);
  if (step) std::printf("Resumed at step %d.\n", step);
  std::fflush(stdout);

  // The micro-batches of two steps: while the device works on one, the other is read from the shards.
  const size_t step_tokens = size_t(N) * s.accumulate;
  HostArray<Backend, int> tokens(be, 4 * step_tokens);
  auto inputs_of = [&](int step) { return tokens.data + (step % 2) * 2 * step_tokens; };
  auto targets_of = [&](int step) { return inputs_of(step) + step_tokens; };
  auto read_batches = [&](int step) {
    for (int micro = 0; micro < s.accumulate; ++micro)
      run.train->batch(s.seed, uint64_t(step) * s.accumulate + micro, B, T, inputs_of(step) + size_t(micro) * N,
                       targets_of(step) + size_t(micro) * N);
  };

  auto validate = [&] {
    const size_t windows = run.val->windows(T),
                 wanted = std::min(windows, std::max<size_t>(1, size_t(s.val_tokens) / T));
    double sum = 0;
    std::vector<int> inputs(N), targets(N);
    std::vector<A> losses(N);
    for (size_t w = 0; w < wanted; w += B) {
      const int batch = int(std::min<size_t>(B, wanted - w));
      for (int b = 0; b < batch; ++b) run.val->window(w + b, T, &inputs[size_t(b) * T], &targets[size_t(b) * T]);
      model.forward(inputs.data(), batch, T);
      model.loss(losses.data(), targets.data(), batch, T);
      for (int i = 0; i < batch * T; ++i) sum += losses[i];
    }
    return sum / (double(wanted) * T);
  };
  auto save = [&] {
    nlohmann::ordered_json state = {{"step", step},
                                    {"micro_batches", uint64_t(step) * s.accumulate},
                                    {"tokens", uint64_t(step) * tokens_per_step},
                                    {"seed", s.seed},
                                    {"tokenizer", run.meta.tokenizer},
                                    {"vocabulary", run.meta.vocabulary ? run.meta.vocabulary : c.vocab},
                                    {"settings", settings_json(s)}};
    save_checkpoint(model, run.directory, state);
  };
  auto sample = [&](int count) {
    std::string text;
    std::vector<int> tokens = {run.tokenizer->end_of_text()};
    generate(model, tokens, count, 0.8, 0, s.seed + step, run.tokenizer->end_of_text(), run.tokenizer->vocabulary(),
             [&](int token) { run.tokenizer->decode(token, text); });
    return printable(text);
  };
  const std::string resume = "train --run " + s.run + " --resume";

  double val_loss = NAN, loss = NAN;
  int last_saved = step;
  const int first_step = step;
  double training_seconds = 0;
  read_batches(step);
  std::signal(SIGINT, on_interrupt);
  std::signal(SIGTERM, on_interrupt);
  while (step < s.steps && !interrupted) {
    const double started = now();
    model.zero_gradients();
    for (int micro = 0; micro < s.accumulate; ++micro)
      model.train_batch(inputs_of(step) + size_t(micro) * N, targets_of(step) + size_t(micro) * N,
                        1.0 / double(tokens_per_step), s.z_loss);
    const double lr = learning_rate(s.schedule, step, s.steps, warmup, s.lr, min_lr);
    model.update({lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.clip, step + 1});
    if (step + 1 < s.steps) read_batches(step + 1);  // a GPU is still at work
    typename Model<Backend, Real>::StepResult result;
    be.download(&result, model.result, sizeof result);
    const double norm = double(result.norm);
    loss = result.loss / double(tokens_per_step);
    if (!std::isfinite(loss) || !std::isfinite(norm)) {
      if (terminal) std::printf("\n");
      throw UserError("step " + std::to_string(step + 1) + ": loss " + std::to_string(loss) + ", gradient norm " +
                      std::to_string(norm) + " (micro-batches from " + std::to_string(uint64_t(step) * s.accumulate) +
                      "); stopped. " +
                      (last_saved ? "The last good checkpoint is of step " + std::to_string(last_saved) + ": " + resume
                                  : "There is no checkpoint yet; try a smaller --lr"));
    }
    ++step;
    const double seconds = now() - started;
    training_seconds += seconds;
    log.row("%d,%zu,%.6f,%.6e,%.6f,%.0f\n", step, size_t(step) * tokens_per_step, loss, lr, norm,
            tokens_per_step / seconds);

    const bool validated = step % val_every == 0 || step == s.steps;
    if (validated) {
      val_loss = validate();
      val_log.row("%d,%zu,%.6f\n", step, size_t(step) * tokens_per_step, val_loss);
    }
    const double left = training_seconds / (step - first_step) * (s.steps - step);
    char line[160], val_text[24] = "";
    if (!std::isnan(val_loss)) std::snprintf(val_text, sizeof val_text, "  val %.4f", val_loss);
    std::snprintf(line, sizeof line, "step %d/%d  loss %.4f%s  %.0f tokens/s  %s left", step, s.steps, loss, val_text,
                  (step - first_step) * tokens_per_step / training_seconds, duration_text(left).c_str());
    if (terminal)
      std::printf("\r\033[K%s%s", line, validated ? "\n" : "");
    else if (validated || step % std::max(1, s.steps / 20) == 0 || step == first_step + 1)
      std::printf("%s\n", line);
    if (s.sample_every && run.tokenizer && step % s.sample_every == 0)
      std::printf("%s--- sample at step %d\n%s\n---\n", terminal && !validated ? "\n" : "", step, sample(200).c_str());
    std::fflush(stdout);
    if (step % checkpoint_every == 0 || step == s.steps) {
      save();
      last_saved = step;
    }
  }
  if (step < s.steps) {
    if (last_saved != step) save();
    std::printf("\nInterrupted: saved at step %d in %s/checkpoint. Go on with: %s\n", step, run.directory.c_str(),
                resume.c_str());
    return 0;
  }
  if (std::isnan(val_loss)) val_loss = validate();

  nlohmann::ordered_json summary = {{"steps", step},
                                    {"tokens", uint64_t(step) * tokens_per_step},
                                    {"train_loss", loss},
                                    {"val_loss", val_loss},
                                    {"parameters", model.table.parameters},
                                    {"rotary_dim", c.rotary_dim},
                                    {"head_size", c.head_size},
                                    {"rope_table_bytes", memory.rope_table},
                                    {"memory_bytes", memory.total()},
                                    {"device", Backend::name},
                                    {"dtype", dtype_name<Real>()}};
  if (step > first_step) {
    summary["training_seconds"] = training_seconds;
    summary["tokens_per_second"] = (step - first_step) * tokens_per_step / training_seconds;
  }
  if (!std::isnan(floor)) summary["floor"] = floor;
  if (std::isnan(summary["train_loss"].get<double>())) summary.erase("train_loss");
  write_text_file(run.directory + "/summary.json", summary.dump(2) + "\n");

  print_curve(read_csv(run.directory + "/log.csv", 2), floor);
  std::printf("validation loss %.4f nats per token", val_loss);
  if (!std::isnan(floor))
    std::printf("; the lowest that any model can reach on this corpus is %.4f (%.1f %% above it)", floor,
                100 * (val_loss / floor - 1));
  std::printf("\n");
  if (run.tokenizer) std::printf("\nA sample (temperature 0.8):\n%s\n", sample(std::min(400, T)).c_str());
  std::printf("\nFiles: %s: log.csv val.csv summary.json config.json checkpoint/\n", run.directory.c_str());
  std::printf(
      "Next:\n"
      "  make                                        builds build/eval as well\n"
      "  build/eval trace --run %s --prompt \"...\"    one token through the partial-RoPE path, byte by byte\n"
      "  build/eval sample --run %s                  more text\n"
      "  make train ARGS=\"--rotary-fraction 0\"       the same without position (NoPE); 1 is full RoPE\n",
      s.run.c_str(), s.run.c_str());
  return 0;
}

int main(int argc, char** argv) {
  return exit_code_of([&] {
    Run run = prepare({argv + 1, argv + argc});
    Settings& s = run.s;
    if (s.threads) omp_set_num_threads(s.threads);
    int status = 0;
    with_backend(s.device, s.dtype, [&](auto& be, auto real) {
      status = train<std::decay_t<decltype(be)>, decltype(real)>(be, run);
    });
    return status;
  });
}
