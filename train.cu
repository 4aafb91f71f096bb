// train: trains a GPT with partial RoPE on tokenized shards.
//
// One optimiser step: `accumulate` micro-batches forward and backward, clipping, AdamW. What a run writes is in
// runs/NAME: config.json, log.csv, val.csv, spikes.csv, summary.json, checkpoint/, and with --diagnostics-every
// layers.csv and tensors.csv. Ctrl-C finishes the step and saves. --replay-step repeats a step of a run to look into it.

#include <unistd.h>

#include <chrono>
#include <cstdio>

#include "run/prepare.h"    // defines: Run, prepare, expect_memory, print_start
#include "run/trainer.h"    // defines: Trainer: step, validate, save
#include "run/log.h"        // defines: RunLog
#include "run/replay.h"     // defines: replay
#include "run/interrupt.h"  // defines: interrupted, watch_interrupts
#include "run/print.h"      // defines: duration_text, print_curve, printable
#include "eval/generate.h"  // defines: generate

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Backend, class Real>
std::string sample(Trainer<Backend, Real>& trainer, int count) {
  const Tokenizer& tokenizer = *trainer.run.tokenizer;
  std::string text;
  std::vector<int> tokens = {tokenizer.end_of_text()};
  generate(trainer.model, tokens, count, 0.8, 0, trainer.s.seed + trainer.done, {tokenizer.end_of_text()},
           tokenizer.vocabulary(), [&](int token) { tokenizer.decode(token, text); });
  return printable(text);
}

// summary.json, the curve, a sample and what to do next.
template <class Backend, class Real>
void finish(Trainer<Backend, Real>& trainer, const RunLog& log, double val_loss, int steps_now, double seconds) {
  const Run& run = trainer.run;
  const Settings& s = run.s;
  const Config& c = s.model;
  const double floor = run.meta.val.entropy;
  const MemoryReport memory = memory_report<Backend, Real>(c, s.batch, c.context);
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
  write_text_file(run.directory + "/summary.json", summary.dump(2) + "\n");

  print_curve(read_column(run.directory + "/log.csv", "step"), log.losses, floor);
  std::printf("validation loss %.4f nats per token", val_loss);
  if (!std::isnan(floor))
    std::printf("; the lowest that any model can reach on this corpus is %.4f (%.1f %% above it)", floor,
                100 * (val_loss / floor - 1));
  std::printf("\n");
  if (run.tokenizer)
    std::printf("\nA sample (temperature 0.8):\n%s\n", sample(trainer, std::min(400, c.context)).c_str());
  std::printf("\nFiles: %s: log.csv val.csv spikes.csv%s summary.json config.json checkpoint/\n", run.directory.c_str(),
              log.looks_inside() ? " layers.csv tensors.csv" : "");
  std::printf(
      "Next:\n"
      "  make                                        builds build/eval as well\n"
      "  build/eval trace --run %s --prompt \"...\"    one token through the partial-RoPE path, byte by byte\n"
      "  build/eval sample --run %s                  more text\n"
      "  make train ARGS=\"--rotary-fraction 0\"       the same without position (NoPE); 1 is full RoPE\n",
      s.run.c_str(), s.run.c_str());
}

template <class Backend, class Real>
int train(Backend& be, Run& run) {
  const Settings& s = run.s;
  const int val_every = s.val_every ? s.val_every : std::max(1, s.steps / 8);
  const int checkpoint_every = s.checkpoint_every ? s.checkpoint_every : std::max(1, s.steps / 4);
  const bool terminal = isatty(STDOUT_FILENO);
  const std::string resume = "train --run " + s.run + " --resume";

  Trainer<Backend, Real> trainer(be, run);
  const int& step = trainer.done;
  const int first_step = step;
  RunLog log(run, first_step);
  print_start<Backend, Real>(run, trainer.model.table.parameters, first_step);

  double val_loss = NAN, training_seconds = 0;
  int last_saved = step;
  watch_interrupts();
  while (step < s.steps && !interrupted) {
    // ---- A training step begins here ---------------------------------------------------------------------------------
    const double started = now();
    const bool diagnose = s.diagnostics_every && ((step + 1) % s.diagnostics_every == 0 || step + 1 == s.steps);
    StepDiagnostics inside;
    const auto result = trainer.step(diagnose ? &inside : nullptr);
    const double seconds = now() - started;
    training_seconds += seconds;
    // ---- and ends here: `step` counts it -----------------------------------------------------------------------------

    log.step(trainer, result, seconds, diagnose ? &inside : nullptr);
    if (!result.finite()) {
      if (terminal) std::printf("\n");
      throw UserError("step " + std::to_string(step) + ": loss " + decimals(result.loss) + ", gradient norm " +
                      decimals(result.norm) + " (micro-batches from " +
                      std::to_string(trainer.first_micro_batch(step - 1)) + "); stopped. " +
                      (last_saved ? "The last good checkpoint is of step " + std::to_string(last_saved) + ": " + resume
                                  : "There is no checkpoint yet; try a smaller --lr") +
                      ". To look into the step: train --run " + s.run + " --replay-step " + std::to_string(step));
    }

    const bool validated = step % val_every == 0 || step == s.steps;
    if (validated) {
      val_loss = trainer.validate();
      log.validation(step, size_t(step) * trainer.tokens_per_step, val_loss);
    }

    const int steps_now = step - first_step;
    const double left = training_seconds / steps_now * (s.steps - step);
    char line[160], val_text[24] = "";
    if (!std::isnan(val_loss)) std::snprintf(val_text, sizeof val_text, "  val %.4f", val_loss);
    std::snprintf(line, sizeof line, "step %d/%d  loss %.4f%s  %.0f tokens/s  %s left", step, s.steps, result.loss,
                  val_text, steps_now * trainer.tokens_per_step / training_seconds, duration_text(left).c_str());
    if (terminal)
      std::printf("\r\033[K%s%s", line, validated ? "\n" : "");
    else if (validated || step % std::max(1, s.steps / 20) == 0 || steps_now == 1)
      std::printf("%s\n", line);
    if (s.sample_every && run.tokenizer && step % s.sample_every == 0)
      std::printf("%s--- sample at step %d\n%s\n---\n", terminal && !validated ? "\n" : "", step,
                  sample(trainer, 200).c_str());
    std::fflush(stdout);

    if (step % checkpoint_every == 0 || step == s.steps) {
      trainer.save();
      last_saved = step;
    }
  }
  if (step < s.steps) {
    if (last_saved != step) trainer.save();
    std::printf("\nInterrupted: saved at step %d in %s/checkpoint. Go on with: %s\n", step, run.directory.c_str(),
                resume.c_str());
    return 0;
  }
  if (std::isnan(val_loss)) val_loss = trainer.validate();
  finish(trainer, log, val_loss, step - first_step, training_seconds);
  return 0;
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
