#pragma once
// train --replay-step: a step of a run once more, to look into it.

#include <unistd.h>

#include "run/program.h"
#include "run/trainer.h"

// Repeats a run up to and including step --replay-step, looks into that step and writes what it sees to replay-STEP/ in
// the run's directory; nothing else there is touched. 1 if the repeated steps are not the logged ones.
template <class Backend, class Real>
int replay(Backend& be, Comm<Backend>& comm, Run& run) {
  Settings& s = run.s;
  const int last = s.replay_step, T = s.model.context;
  const bool terminal = isatty(STDOUT_FILENO);
  Trainer<Backend, Real> trainer(be, comm, run);
  StepDiagnostics inside;
  std::vector<Acc<Real>> losses;
  auto looks = [&](int step) {  // at this step?
    return step == last || (s.diagnostics_every && step % s.diagnostics_every == 0);
  };
  auto next_step = [&] {
    const int step = trainer.done + 1;
    return trainer.step(looks(step) ? &inside : nullptr, step == last ? &losses : nullptr);
  };
  watch_interrupts(trainer.ranks.root() ? "\nStopping after this step; Ctrl-C again ends at once.\n" : "");
  if (!trainer.ranks.root()) {  // rank 0 says and writes what is seen
    while (trainer.done < last && !trainer.told_to_stop()) next_step();
    return trainer.told_to_stop() ? 128 + trainer.told_to_stop() : 0;
  }
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
  std::filesystem::create_directories(directory, error);  // if it fails, so does the first file
  CsvLog log(directory + "/log.csv", "step,tokens,loss,lr,grad_norm,log_z", 0);
  CsvLog windows(directory + "/windows.csv", "micro_batch,window,loss", 0);
  DiagnosticsLog inside_log(directory, 0);
  std::string difference;  // to the first step that is not as it was
  while (trainer.done < last && !trainer.told_to_stop()) {
    const int step = trainer.done + 1;
    const auto result = next_step();
    const std::string loss = decimals(result.loss), norm = decimals(result.norm);
    log.row("%d,%zu,%s,%.6e,%s,%.6f\n", step, size_t(step) * trainer.tokens_per_step, loss.c_str(), result.lr,
            norm.c_str(), result.log_z);
    if (looks(step)) inside_log.write(step, inside);
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
  if (trainer.done < last) {
    std::printf("Interrupted before step %d.\n", last);
    return 128 + trainer.told_to_stop();
  }

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
    std::vector<int> inputs(trainer.N), targets(trainer.N);
    run.train->batch(s.seed, trainer.first_micro_batch(last - 1) + w / s.batch, s.batch, T, inputs.data(),
                     targets.data());
    std::string text;
    for (int t = 0; run.tokenizer && t < std::min(T, 64); ++t)
      run.tokenizer->decode(inputs[w % s.batch * T + t], text);
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
