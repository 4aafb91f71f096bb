// train: trains a GPT with partial RoPE on tokenized shards.
//
// One optimiser step: `accumulate` micro-batches forward and backward, clipping, AdamW. What a run writes is in
// runs/NAME: config.json, log.csv, val.csv, spikes.csv, summary.json, checkpoint/, and with --diagnostics-every
// layers.csv and tensors.csv. Ctrl-C finishes the step and saves. --replay-step repeats a step of a run to look into it.

#include <sys/ioctl.h>

#include <csignal>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <memory>

#include "run/checkpoint.h"
#include "text/shards.h"
#include "run/diagnostics.h"
#include "eval/loss.h"
#include "run/flags.h"
#include "eval/generate.h"

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

// The loss over the steps as a picture of text: a column per stretch of steps, its mean as a dot; the floor as a line.
// The axis is logarithmic: most of a run happens near its end.
static void print_curve(const std::vector<double>& steps, const std::vector<double>& losses, double floor) {
  const int width = 64, height = 12;
  if (losses.size() < 2) return;
  std::vector<double> sum(width), count(width);
  for (size_t i = 0; i < losses.size(); ++i) {
    const size_t column = i * width / losses.size();
    sum[column] += losses[i];
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
  std::printf("         +%s\n          step %-10.0f%*s%.0f\n\n", std::string(width, '-').c_str(), steps.front(),
              width - 22, "", steps.back());
}

// What is decided before any memory is taken: settings, data, where the run's files go, what it starts from.
struct Run {
  Settings s;
  std::string directory;
  std::string checkpoint, init;  // the checkpoint to resume from, or to take the weights from, or empty
  nlohmann::json state;
  int kept_step = 0;  // of the run's checkpoint, when a step is replayed
  Meta meta;
  std::unique_ptr<Dataset> train, val;
  std::unique_ptr<Tokenizer> tokenizer;  // null where the shards do not say which
};

// --replay-step: the run's settings; and its checkpoint if that is of an earlier step than the one to be repeated,
// else what it started from.
static void prepare_replay(Run& run, const Settings& asked) {
  const std::string flag = "--replay-step " + std::to_string(asked.replay_step);
  if (asked.run.empty()) throw UserError(flag + ": say of which run with --run NAME");
  run.directory = "runs/" + asked.run;
  const std::vector<double> logged = read_column(run.directory + "/log.csv", "step");
  if (logged.empty()) throw UserError(flag + ": there are no steps in " + run.directory + "/log.csv");
  if (asked.replay_step < 1 || asked.replay_step > logged.back())
    throw UserError(flag + ": must be one of the steps 1 to " + std::to_string(int(logged.back())) + " of " +
                    run.directory + "/log.csv");
  const std::string config = run.directory + "/config.json";
  run.s = settings_from_json(config, read_json_file(config));
  run.checkpoint = locate_checkpoint(run.directory);
  if (!run.checkpoint.empty()) {
    const std::string state = run.checkpoint + "/state.json";
    run.state = read_json_file(state);
    settings_from_state(state, run.state);  // refuses what is no state
    run.kept_step = run.state["step"];
    if (run.kept_step >= asked.replay_step) run.checkpoint = "";
  }
  if (run.checkpoint.empty() && !run.s.init.empty()) {
    run.init = locate_checkpoint(run.s.init);
    if (run.init.empty()) throw UserError(flag + ": the run started from " + run.s.init + ", which is no longer there");
  }
}

static Run prepare(const std::vector<std::string>& args) {
  Run run;
  Settings& s = run.s;
  Settings asked;
  apply_flags(asked, args);
  const bool replay = asked.replay_step != -1, again = asked.resume || replay;
  if (asked.resume && replay) throw UserError("--resume, --replay-step: give one of them");
  if (asked.resume) {
    if (asked.run.empty()) throw UserError("--resume: say which run with --run NAME");
    run.directory = "runs/" + asked.run;
    run.checkpoint = find_checkpoint(run.directory);
    run.state = read_json_file(run.checkpoint + "/state.json");
    s = settings_from_state(run.checkpoint + "/state.json", run.state);
    check_weights(s.model, run.checkpoint);
  } else if (replay) {
    prepare_replay(run, asked);
  } else {
    apply_flags(s, preset_flags(asked.preset));
  }
  if (!asked.init.empty() && !again) {
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
  if (again)
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
  expect_positive("diagnostics-every", s.diagnostics_every, true);
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
  if (again || !run.init.empty()) {
    std::vector<std::string> groups = {"Model"};
    if (again) groups.push_back("Optimiser");
    const std::string flag = replay ? "--replay-step" : asked.resume ? "--resume" : "--init",
                      may_differ = replay ? "" : asked.resume ? "steps" : "context";
    const auto was = settings_json(before, groups), is = settings_json(s, groups);
    for (const auto& [key, value] : was.items())
      if (key != may_differ && is[key] != value)
        throw UserError(flag + ": " + key + " is " + is[key].dump() + " but was " + value.dump() + " in " +
                        (replay ? run.directory : asked.resume ? run.checkpoint : run.init) +
                        "; leave the flag out, or start a new run");
  }
  if (!again) {
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

// Training, a step at a time.
template <class Backend, class Real>
struct Trainer {
  Backend& be;
  const Run& run;
  const Settings& s;
  const int N = s.batch * s.model.context;  // tokens of a micro-batch
  const size_t tokens_per_step = size_t(N) * s.accumulate;
  Model<Backend, Real> model;
  Diagnostics<Backend, Real> diagnostics;
  int done = 0;  // steps that the weights have behind them

  // In nats per token; norm is that of the gradient before clipping.
  struct Result {
    double loss, log_z, norm, lr;
    bool finite() const { return std::isfinite(loss) && std::isfinite(norm); }
  };

  // From the run's checkpoint, the weights of --init, or new ones.
  Trainer(Backend& backend, const Run& r)
      : be(backend), run(r), s(r.s), model(be, s.model, s.batch, s.model.context, true), diagnostics(model),
        tokens_(be, 4 * tokens_per_step) {
    if (!run.checkpoint.empty()) {
      load_weights(model, run.checkpoint);
      load_optimizer(model, run.checkpoint);
      done = run.state["step"];
    } else if (!run.init.empty()) {
      load_weights(model, run.init);
    } else {
      model.initialise_weights(s.seed, s.init_std);
    }
  }

  // The next step; with `inside`, looks into it; with `losses`, keeps the loss of each token (accumulate, B, T).
  Result step(StepDiagnostics* inside = nullptr, std::vector<Acc<Real>>* losses = nullptr) {
    const int warmup = s.warmup >= 0 ? s.warmup : (s.steps + 19) / 20;
    const double min_lr = s.min_lr >= 0 ? s.min_lr : s.lr / 10;
    const AdamW a = {learning_rate(s.schedule, done, s.steps, warmup, s.lr, min_lr),
                     s.beta1, s.beta2, s.eps, s.weight_decay, s.clip, done + 1};
    if (read_ < done) read_batches(done);
    model.zero_gradients();
    if (inside) diagnostics.begin();
    if (losses) losses->resize(tokens_per_step);
    for (int micro = 0; micro < s.accumulate; ++micro) {
      const size_t at = size_t(micro) * N;
      model.train_batch(inputs_of(done) + at, targets_of(done) + at, 1.0 / double(tokens_per_step), s.z_loss);
      if (inside) diagnostics.add_micro_batch();
      if (losses) be.download(losses->data() + at, model.acts.losses, N * sizeof(Acc<Real>));
    }
    model.update(a);
    if (inside) diagnostics.add_update(a);
    if (done + 1 < s.steps) read_batches(done + 1);  // a GPU is still at work
    typename Model<Backend, Real>::StepResult result;
    be.download(&result, model.result, sizeof result);
    if (inside) *inside = diagnostics.read();
    ++done;
    return {result.loss / double(tokens_per_step), result.log_z / double(tokens_per_step), double(result.norm), a.lr};
  }

  const int* inputs_of(int step) { return batches_of(step); }  // (accumulate, B, T)
  const int* targets_of(int step) { return batches_of(step) + tokens_per_step; }
  size_t first_micro_batch(int step) const { return size_t(step) * s.accumulate; }

 private:
  // The micro-batches of two steps: while the device works on one, the other is read from the shards.
  HostArray<Backend, int> tokens_;
  int read_ = -1;

  int* batches_of(int step) { return tokens_.data + (step % 2) * 2 * tokens_per_step; }
  void read_batches(int step) {
    for (int micro = 0; micro < s.accumulate; ++micro) {
      int* inputs = batches_of(step) + size_t(micro) * N;
      run.train->batch(s.seed, first_micro_batch(step) + micro, s.batch, s.model.context, inputs,
                       inputs + tokens_per_step);
    }
    read_ = step;
  }
};

template <class Backend, class Real>
int train(Backend& be, Run& run) {
  using A = Acc<Real>;
  Settings& s = run.s;
  const Config& c = s.model;
  const int B = s.batch, T = c.context, N = B * T;
  const int val_every = s.val_every ? s.val_every : std::max(1, s.steps / 8);
  const int checkpoint_every = s.checkpoint_every ? s.checkpoint_every : std::max(1, s.steps / 4);
  const double floor = run.meta.val.entropy;
  const bool terminal = isatty(STDOUT_FILENO);

  const MemoryReport memory = memory_report<Backend, Real>(c, B, T);
  Trainer<Backend, Real> trainer(be, run);
  Model<Backend, Real>& model = trainer.model;
  const int& step = trainer.done;
  const size_t tokens_per_step = trainer.tokens_per_step;
  std::error_code error;
  fs::create_directories(run.directory, error);
  if (error) throw UserError(run.directory + ": cannot create the run's directory: " + error.message());
  write_text_file(run.directory + "/config.json", settings_json(s).dump(2) + "\n");
  if (run.tokenizer && !run.tokenizer->file().empty())
    write_text_file(run.directory + "/tokenizer.json", read_text_file(run.tokenizer->file()));  // for eval
  CsvLog log(run.directory + "/log.csv", "step,tokens,loss,lr,grad_norm,tokens_per_second,log_z", step);
  CsvLog val_log(run.directory + "/val.csv", "step,tokens,val_loss", step);
  CsvLog spikes_log(run.directory + "/spikes.csv", "step,loss,z_score,micro_batch", step);
  std::unique_ptr<DiagnosticsLog> inside_log;
  if (s.diagnostics_every || fs::exists(run.directory + "/layers.csv"))
    inside_log = std::make_unique<DiagnosticsLog>(run.directory, step);
  std::vector<double> losses = read_column(run.directory + "/log.csv", "loss");  // what is kept of a resumed run's

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
                                    {"micro_batches", trainer.first_micro_batch(step)},
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

  double val_loss = NAN;
  int last_saved = step;
  const int first_step = step;
  double training_seconds = 0;
  std::signal(SIGINT, on_interrupt);
  std::signal(SIGTERM, on_interrupt);
  while (step < s.steps && !interrupted) {
    const double started = now();
    const bool diagnose = s.diagnostics_every && ((step + 1) % s.diagnostics_every == 0 || step + 1 == s.steps);
    StepDiagnostics inside;
    const auto result = trainer.step(diagnose ? &inside : nullptr);
    const double seconds = now() - started;
    training_seconds += seconds;
    const std::string loss_text = decimals(result.loss);
    log.row("%d,%zu,%s,%.6e,%.6f,%.0f,%.6f\n", step, size_t(step) * tokens_per_step, loss_text.c_str(),
            result.lr, result.norm, tokens_per_step / seconds, result.log_z);
    log.flush();
    if (diagnose) inside_log->write(step, inside);
    losses.push_back(std::atof(loss_text.c_str()));  // as a resumed run will read it
    if (const double z = z_score(losses, losses.size() - 1, kSpikeWindow); z > kSpike) {
      spikes_log.row("%d,%s,%.2f,%zu\n", step, loss_text.c_str(), z, trainer.first_micro_batch(step - 1));
      spikes_log.flush();
    }
    if (!result.finite()) {
      if (terminal) std::printf("\n");
      throw UserError("step " + std::to_string(step) + ": loss " + loss_text + ", gradient norm " +
                      decimals(result.norm) + " (micro-batches from " +
                      std::to_string(trainer.first_micro_batch(step - 1)) + "); stopped. " +
                      (last_saved ? "The last good checkpoint is of step " + std::to_string(last_saved) + ": " + resume
                                  : "There is no checkpoint yet; try a smaller --lr") +
                      ". To look into the step: train --run " + s.run + " --replay-step " + std::to_string(step));
    }

    const bool validated = step % val_every == 0 || step == s.steps;
    if (validated) {
      val_loss = validate();
      val_log.row("%d,%zu,%.6f\n", step, size_t(step) * tokens_per_step, val_loss);
      val_log.flush();
    }
    const double left = training_seconds / (step - first_step) * (s.steps - step);
    char line[160], val_text[24] = "";
    if (!std::isnan(val_loss)) std::snprintf(val_text, sizeof val_text, "  val %.4f", val_loss);
    std::snprintf(line, sizeof line, "step %d/%d  loss %.4f%s  %.0f tokens/s  %s left", step, s.steps, result.loss,
                  val_text, (step - first_step) * tokens_per_step / training_seconds, duration_text(left).c_str());
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
                                    {"train_loss", losses.empty() ? NAN : losses.back()},
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
  summary.update(diagnostics_summary(run.directory, s.clip));
  if (std::isnan(summary["train_loss"].get<double>())) summary.erase("train_loss");
  write_text_file(run.directory + "/summary.json", summary.dump(2) + "\n");

  print_curve(read_column(run.directory + "/log.csv", "step"), losses, floor);
  std::printf("validation loss %.4f nats per token", val_loss);
  if (!std::isnan(floor))
    std::printf("; the lowest that any model can reach on this corpus is %.4f (%.1f %% above it)", floor,
                100 * (val_loss / floor - 1));
  std::printf("\n");
  if (run.tokenizer) std::printf("\nA sample (temperature 0.8):\n%s\n", sample(std::min(400, T)).c_str());
  std::printf("\nFiles: %s: log.csv val.csv spikes.csv%s summary.json config.json checkpoint/\n",
              run.directory.c_str(), inside_log ? " layers.csv tensors.csv" : "");
  std::printf(
      "Next:\n"
      "  make                                        builds build/eval as well\n"
      "  build/eval trace --run %s --prompt \"...\"    one token through the partial-RoPE path, byte by byte\n"
      "  build/eval sample --run %s                  more text\n"
      "  make train ARGS=\"--rotary-fraction 0\"       the same without position (NoPE); 1 is full RoPE\n",
      s.run.c_str(), s.run.c_str());
  return 0;
}

// Repeats a run up to and including step --replay-step, looks into that step and writes what it sees to replay-STEP/ in
// the run's directory; nothing else there is touched. 1 if the repeated steps are not the logged ones.
template <class Backend, class Real>
int replay(Backend& be, Run& run) {
  Settings& s = run.s;
  const int last = s.replay_step, T = s.model.context;
  const bool terminal = isatty(STDOUT_FILENO);
  Trainer<Backend, Real> trainer(be, run);
  const std::string start = !run.checkpoint.empty() ? "its checkpoint of step " + std::to_string(trainer.done)
                            : !run.init.empty()     ? "the weights of " + run.init
                                                    : "its initial weights";
  std::printf("Repeating steps %d to %d of %s from %s", trainer.done + 1, last, run.directory.c_str(), start.c_str());
  if (run.checkpoint.empty() && run.kept_step) std::printf(" (the checkpoint, of step %d, is too late)", run.kept_step);
  std::printf(".\n");
  std::fflush(stdout);

  auto logged = read_csv(run.directory + "/log.csv");
  const std::string directory = run.directory + "/replay-" + std::to_string(last);
  std::error_code error;
  fs::create_directories(directory, error);  // if it fails, so does the first file
  CsvLog log(directory + "/log.csv", "step,tokens,loss,lr,grad_norm,log_z", 0);
  CsvLog windows(directory + "/windows.csv", "micro_batch,window,loss", 0);
  DiagnosticsLog inside_log(directory, 0);
  StepDiagnostics inside;
  std::vector<Acc<Real>> losses;
  std::string difference;  // to the first step that is not as it was
  std::signal(SIGINT, on_interrupt);
  std::signal(SIGTERM, on_interrupt);
  while (trainer.done < last && !interrupted) {
    const int step = trainer.done + 1;
    const bool diagnose = step == last || (s.diagnostics_every && step % s.diagnostics_every == 0);
    const auto result = trainer.step(diagnose ? &inside : nullptr, step == last ? &losses : nullptr);
    const std::string loss = decimals(result.loss), norm = decimals(result.norm);
    log.row("%d,%zu,%s,%.6e,%s,%.6f\n", step, size_t(step) * trainer.tokens_per_step, loss.c_str(), result.lr,
            norm.c_str(), result.log_z);
    if (diagnose) inside_log.write(step, inside);
    const auto row = std::find(logged["step"].begin(), logged["step"].end(), std::to_string(step));
    const size_t at = row - logged["step"].begin();
    const bool known = row != logged["step"].end();
    if (difference.empty() && !(known && logged["loss"][at] == loss && logged["grad_norm"][at] == norm))
      difference = "step " + std::to_string(step) + " has loss " + loss + " and gradient norm " + norm +
                   ", in log.csv " + (known ? logged["loss"][at] + " and " + logged["grad_norm"][at] : "no row");
    if (terminal) std::printf("\r\033[Kstep %d/%d  loss %s", step, last, loss.c_str());
    std::fflush(stdout);
  }
  if (terminal) std::printf("\n");
  if (trainer.done < last) throw UserError("interrupted before step " + std::to_string(last));

  print_diagnostics(inside, s.model.heads);

  // The windows of the step's batch, and how the hardest of them begin.
  std::vector<std::pair<double, size_t>> hardest;
  for (size_t w = 0; w < losses.size() / T; ++w) {
    double sum = 0;
    for (int t = 0; t < T; ++t) sum += losses[w * T + t];
    windows.row("%zu,%zu,%.6f\n", trainer.first_micro_batch(last - 1) + w / s.batch, w % s.batch, sum / T);
    hardest.push_back({unsigned_nan(sum / T), w});
  }
  std::sort(hardest.begin(), hardest.end(), [](const auto& a, const auto& b) {
    return std::isnan(a.first) != std::isnan(b.first) ? std::isnan(a.first) : a.first > b.first;
  });
  std::printf("\nThe windows with the largest loss:\n");
  for (size_t i = 0; i < std::min<size_t>(3, hardest.size()); ++i) {
    const size_t w = hardest[i].second;
    std::string text;
    for (int t = 0; run.tokenizer && t < std::min(T, 64); ++t)
      run.tokenizer->decode(trainer.inputs_of(last - 1)[w * T + t], text);
    text = printable(text.substr(0, 64));
    std::replace(text.begin(), text.end(), '\n', ' ');
    std::printf("  %.4f  micro-batch %zu, window %zu  %s\n", hardest[i].first,
                trainer.first_micro_batch(last - 1) + w / s.batch, w % s.batch, text.c_str());
  }
  log.flush();
  windows.flush();
  std::printf("\nFiles: %s: log.csv layers.csv tensors.csv windows.csv\n", directory.c_str());
  if (difference.empty()) {
    std::printf("Loss and gradient norm of all repeated steps are those of the run's log.csv.\n");
    return 0;
  }
  std::printf("This is not how the run went: %s. Another device, --dtype, program or data?\n", difference.c_str());
  return 1;
}

int main(int argc, char** argv) {
  return exit_code_of([&] {
    Run run = prepare({argv + 1, argv + argc});
    Settings& s = run.s;
    if (s.threads) omp_set_num_threads(s.threads);
    int status = 0;
    with_backend(s.device, s.dtype, [&](auto& be, auto real) {
      using Backend = std::decay_t<decltype(be)>;
      using Real = decltype(real);
      expect_memory<Backend, Real>(s.model, s.batch, be.available_memory(),
                                   memory_report<Backend, Real>(s.model, s.batch, s.model.context));
      status = s.replay_step == -1 ? train<Backend, Real>(be, run) : replay<Backend, Real>(be, run);
    });
    return status;
  });
}
