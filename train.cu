// train: trains a GPT with partial RoPE on tokenized shards.
//
// One optimiser step: `accumulate` micro-batches forward and backward, clipping, AdamW. What a run writes is in
// runs/NAME: config.json, history.json (which settings held from which step on), log.csv, val.csv, spikes.csv,
// summary.json, checkpoint/, report.html, page.html, and with --diagnostics-every layers.csv and tensors.csv. Ctrl-C
// finishes the step and saves. --replay-step repeats a step of a run to look into it.

#include <unistd.h>

#include <cstdio>

#include "run/prepare.h"      // defines: Run, prepare, expect_memory, print_start
#include "run/trainer.h"      // defines: Trainer: step, validate, save
#include "run/log.h"          // defines: RunLog
#include "run/replay.h"       // defines: replay
#include "run/report.h"       // defines: write_report
#include "run/program.h"      // defines: run_program, watch_interrupts, use_threads, program
#include "device/comm.h"      // defines: Ranks, start_ranks, Comm
#include "run/print.h"        // defines: duration_text, metric, print_curve, printable
#include "eval/generate.h"    // defines: generate
#include "eval/trace_page.h"  // defines: page_length, write_page

template <class Backend, class Real>
std::string sample(Trainer<Backend, Real>& trainer, int count) {
  const Tokenizer& tokenizer = *trainer.run.tokenizer;
  std::string text;
  std::vector<int> tokens = {tokenizer.end_of_text()};
  generate(trainer.model, tokens, count, 0.8, 0, trainer.s.seed + trainer.done, {tokenizer.end_of_text()},
           tokenizer.vocabulary(), [&](int token) { tokenizer.decode(token, text); });
  return printable(text);
}

// The command line of a run of this kind, without its name and what is rotated.
static std::string again(const std::vector<std::string>& flags) {
  std::string line = program;
  for (size_t i = 0; i < flags.size(); ++i) {
    const std::string flag = flags[i].substr(0, flags[i].find('='));
    if (flag == "--run" || flag == "--rotary-fraction" || flag == "--rotary-dim") {
      i += flag == flags[i];  // its value is a word of its own
      continue;
    }
    const bool plain = flags[i].find_first_of(" *?[]$\"'&;|<>()\\") == std::string::npos;
    line += " " + (plain ? flags[i] : "'" + flags[i] + "'");
  }
  return line;
}

// page.html: the first validation text on its way through the model as it was saved. False where none is written: a
// very large model would keep the user waiting.
bool write_own_page(const Run& run, size_t parameters) {
  if (parameters > 300'000'000) return false;
  const int T = page_length(run.s.model);
  std::vector<int> tokens(T), next(T);
  run.val->window(0, T, tokens.data(), next.data());
  write_page(run.directory + "/page.html", run.directory + "/checkpoint", run.s.model, tokens, run.tokenizer.get(),
             run.s.run);
  return true;
}

// summary.json, the curve, a sample, what to look at and what to do next.
template <class Backend, class Real>
void finish(Trainer<Backend, Real>& trainer, const RunLog& log, double val_loss, int steps_now, double seconds) {
  const Run& run = trainer.run;
  const Settings& s = run.s;
  const Config& c = s.model;
  const double floor = run.meta.val.entropy;
  const MemoryReport memory = memory_report<Backend, Real>(c, s.batch, c.context, trainer.division);
  nlohmann::ordered_json summary = {{"steps", trainer.done},
                                    {"tokens", uint64_t(trainer.done) * trainer.tokens_per_step},
                                    {"train_loss", log.losses.empty() ? NAN : log.losses.back()},
                                    {"val_loss", val_loss},
                                    {"parameters", trainer.model.table.parameters},
                                    {"rotary_dim", c.rotary_dim},
                                    {"head_size", c.head_size},
                                    {"rope_table_bytes", memory.rope_table},
                                    {"memory_bytes", memory.total()},
                                    {"device", Backend::name},
                                    {"dtype", dtype_name<Real>()}};
  if (steps_now) {
    summary["training_seconds"] = seconds;
    summary["tokens_per_second"] = steps_now * trainer.tokens_per_step / seconds;
  }
  if (!std::isnan(floor)) summary["floor"] = floor;
  summary.update(diagnostics_summary(run.directory, s.clip));
  if (std::isnan(summary["train_loss"].get<double>())) summary.erase("train_loss");
  replace_text_file(run.directory + "/summary.json", summary.dump(2) + "\n");

  print_curve(read_column(run.directory + "/log.csv", "step"), log.losses, floor);
  std::printf("validation loss %.4f nats per token", val_loss);
  if (!std::isnan(floor))
    std::printf("; the lowest that any model can reach on this corpus is %.4f (%.1f %% above it)", floor,
                100 * (val_loss / floor - 1));
  std::printf("\n");
  if (run.tokenizer)
    std::printf("\nA sample (temperature 0.8):\n%s\n", sample(trainer, std::min(400, c.context)).c_str());
  const bool page = write_own_page(run, trainer.model.table.parameters);
  write_report(run.directory);
  std::printf("\nFiles: %s: log.csv val.csv spikes.csv%s summary.json config.json checkpoint/\n", run.directory.c_str(),
              log.looks_inside() ? " layers.csv tensors.csv" : "");
  std::printf("To look at in a browser:\n");
  if (page) std::printf("  %s/page.html      one token's way through partial RoPE\n", run.directory.c_str());
  std::printf("  %s/report.html    the run in plots\n", run.directory.c_str());
  std::printf(
      "Next:\n"
      "  make    builds %s as well; then\n"
      "  %s sample --run %s\n"
      "      more text\n"
      "  %s trace --run %s --prompt \"...\"\n"
      "      one token through the partial-RoPE path, byte by byte\n",
      sibling("eval").c_str(), sibling("eval").c_str(), s.run.c_str(), sibling("eval").c_str(), s.run.c_str());
  if (trainer.done == steps_now)
    std::printf(
        "  %s --rotary-fraction 0\n"
        "      the same without position (NoPE); 1 is full RoPE\n",
        again(run.flags).c_str());
}

// With several ranks all of them come through here; rank 0 writes the files, and its prints alone are seen.
template <class Backend, class Real>
int train(Backend& be, Comm<Backend>& comm, Run& run) {
  const Settings& s = run.s;
  const int val_every = s.val_every ? s.val_every : std::max(1, s.steps / 4);
  const int checkpoint_every = s.checkpoint_every ? s.checkpoint_every : std::max(1, s.steps / 4);
  const bool terminal = isatty(STDOUT_FILENO);
  const std::string resume = program + " --run " + s.run + " --resume";

  Trainer<Backend, Real> trainer(be, comm, run);
  const int& step = trainer.done;
  const int first_step = step;
  std::unique_ptr<RunLog> log;  // on rank 0
  if (comm.ranks.root()) log = std::make_unique<RunLog>(run, first_step);
  print_start<Backend, Real>(run, trainer.division, trainer.model.table.parameters, first_step);

  double val_loss = NAN, training_seconds = 0, shown_at = -INFINITY;
  int last_saved = step;
  auto diverged = [&](const std::string& what) {
    if (terminal) std::printf("\n");
    throw UserError("step " + std::to_string(step) + ": " + what + " (micro-batches from " +
                    std::to_string(trainer.first_micro_batch(step - 1)) + "); stopped. " +
                    (last_saved ? "The last good checkpoint is of step " + std::to_string(last_saved) + ": " + resume
                                : "There is no checkpoint yet; try a smaller --lr") +
                    ". To look into the step: " + program + " --run " + s.run + " --replay-step " +
                    std::to_string(step));
  };
  // The loss of a step is that of the weights before its update. Here is one of the weights after it.
  auto expect_good = [&](double loss) {
    if (trainer.good(loss)) return;
    if (log) log->validation(step, size_t(step) * trainer.tokens_per_step, NAN);
    diverged("its update makes weights that are not good: loss " + decimals(loss));
  };
  auto save = [&] {
    if (log) log->sync();
    trainer.save();
    last_saved = step;
  };
  trainer.on_micro_batch = [&](int micro) {  // so that something is seen to happen in a long step
    if (!terminal || now() < shown_at + 1) return;
    std::printf("\r\033[Kstep %d/%d micro-batch %d/%d", step + 1, s.steps, micro + 1, s.accumulate);
    std::fflush(stdout);
    shown_at = now();
  };

  watch_interrupts(log ? "\nThe step is finished and saved; Ctrl-C again ends at once, without.\n" : "");
  while (step < s.steps && !trainer.told_to_stop()) {
    // ---- A training step begins here ---------------------------------------------------------------------------------
    const double started = now();
    const bool diagnose = s.diagnostics_every && ((step + 1) % s.diagnostics_every == 0 || step + 1 == s.steps);
    StepDiagnostics inside;
    const auto result = trainer.step(diagnose ? &inside : nullptr);
    const double seconds = now() - started;
    training_seconds += seconds;
    // ---- and ends here: `step` counts it -----------------------------------------------------------------------------

    if (log) log->step(trainer, result, seconds, diagnose ? &inside : nullptr);
    if (!result.finite())
      diverged("loss " + decimals(result.loss) + ", gradient norm " + decimals(result.norm));

    const bool validates = step % val_every == 0 || step == s.steps;
    const bool saves = step % checkpoint_every == 0 || step == s.steps || trainer.overdue();
    if (validates) val_loss = trainer.validate(s.val_tokens);
    if (validates || saves) expect_good(validates ? val_loss : trainer.validate(1));
    if (validates && log) log->validation(step, size_t(step) * trainer.tokens_per_step, val_loss);

    const int steps_now = step - first_step;
    const double left = training_seconds / steps_now * (s.steps - step);
    char line[160], val_text[24] = "";
    if (!std::isnan(val_loss)) std::snprintf(val_text, sizeof val_text, " val %.4f", val_loss);
    std::snprintf(line, sizeof line, "step %d/%d loss %.4f%s %s tok/s %s left", step, s.steps, result.loss, val_text,
                  metric(steps_now * trainer.tokens_per_step / training_seconds).c_str(), duration_text(left).c_str());
    if (terminal)
      std::printf("\r\033[K%.*s%s", terminal_width() - 1, line, validates ? "\n" : "");
    else if (validates || step % std::max(1, s.steps / 20) == 0 || steps_now == 1)
      std::printf("%s\n", line);
    shown_at = now();
    if (log && s.sample_every && run.tokenizer && step % s.sample_every == 0)
      std::printf("%s--- sample at step %d\n%s\n---\n", terminal && !validates ? "\n" : "", step,
                  sample(trainer, 200).c_str());
    std::fflush(stdout);
    if (saves) save();
  }
  if (step < s.steps) {
    if (last_saved != step) {
      expect_good(trainer.validate(1));
      save();
    }
    std::printf("\nInterrupted: saved at step %d in %s/checkpoint. Go on with: %s\n", step, run.directory.c_str(),
                resume.c_str());
    return 128 + trainer.told_to_stop();
  }
  if (std::isnan(val_loss)) expect_good(val_loss = trainer.validate(s.val_tokens));
  if (log) finish(trainer, *log, val_loss, step - first_step, training_seconds);
  return 0;
}

int main(int, char** argv) {
  return run_program(argv, [&](const std::vector<std::string>& args) {
    Settings asked = plain_settings();
    apply_flags(asked, args);
    expect_positive("ranks", asked.ranks);
    const Process process = process_from_environment();
    if (asked.ranks > 1 && process.ranks == 1) return start_ranks(asked.ranks, argv);
    if (asked.ranks > 1 && process.starter < 0)
      throw UserError("--ranks " + std::to_string(asked.ranks) + ": the environment says that this is one of " +
                      std::to_string(process.ranks) + " ranks already; leave the flag out");

    Ranks ranks(process);
    return ranks.guard([&] {
      if (!ranks.root() && !std::freopen("/dev/null", "w", stdout)) throw UserError("/dev/null: cannot write");
      Run run = prepare(args, ranks.size, ranks.root());
      Settings& s = run.s;
      expect_same(run, ranks);
      use_threads(s.threads);
      int status = 0;
      auto work = [&](auto& be, auto real) {
        using Backend = std::decay_t<decltype(be)>;
        using Real = decltype(real);
        Comm<Backend> comm(be, ranks);
        expect_memory<Backend, Real>(s.model, s.batch, {s.lanes, ranks.size, ranks.rank}, be.available_memory());
        status = s.replay_step == -1 ? train<Backend, Real>(be, comm, run) : replay<Backend, Real>(be, comm, run);
      };
      with_backend(s.device, s.dtype, work, process.local);
      return status;
    });
  });
}
