#pragma once
// The csv files that a run keeps while it trains.

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "run/trainer.h"

class RunLog {
 public:
  std::vector<double> losses;  // of all steps, those before a resume included

  // Makes the run's directory and what does not change in it; rows of steps after `step` are dropped.
  RunLog(Run& run, int step)
      : log_(made(run) + "/log.csv", "step,tokens,loss,lr,grad_norm,tokens_per_second,log_z", step),
        val_(run.directory + "/val.csv", "step,tokens,val_loss", step),
        spikes_(run.directory + "/spikes.csv", "step,loss,z_score,micro_batch", step) {
    if (run.s.diagnostics_every || std::filesystem::exists(run.directory + "/layers.csv"))
      inside_ = std::make_unique<DiagnosticsLog>(run.directory, step);
    losses = read_column(run.directory + "/log.csv", "loss");
  }

  // The step that the trainer has just done, in `seconds`; `inside` where it was looked into.
  template <class Backend, class Real>
  void step(const Trainer<Backend, Real>& trainer, const typename Trainer<Backend, Real>::Result& result,
            double seconds, const StepDiagnostics* inside) {
    const int step = trainer.done;
    const std::string loss = decimals(result.loss);
    log_.row("%d,%zu,%s,%.6e,%.6f,%.0f,%.6f\n", step, size_t(step) * trainer.tokens_per_step, loss.c_str(), result.lr,
             result.norm, trainer.tokens_per_step / seconds, result.log_z);
    log_.flush();
    if (inside) inside_->write(step, *inside);
    losses.push_back(std::atof(loss.c_str()));  // as a resumed run will read it
    if (const double z = z_score(losses, losses.size() - 1, kSpikeWindow); z > kSpike) {
      spikes_.row("%d,%s,%.2f,%zu\n", step, loss.c_str(), z, trainer.first_micro_batch(step - 1));
      spikes_.flush();
    }
  }

  // Before a checkpoint.
  void sync() {
    for (CsvLog* log : {&log_, &val_, &spikes_}) log->sync();
    if (inside_) inside_->sync();
  }

  void validation(int step, size_t tokens, double loss) {
    val_.row("%d,%zu,%.6f\n", step, tokens, loss);
    val_.flush();
  }

  bool looks_inside() const { return inside_ != nullptr; }

 private:
  CsvLog log_, val_, spikes_;
  std::unique_ptr<DiagnosticsLog> inside_;

  static const std::string& made(Run& run) {
    std::error_code error;
    std::filesystem::create_directories(run.directory, error);
    if (error) throw UserError(run.directory + ": cannot create the run's directory: " + error.message());
    if (!run.lock) run.lock = std::make_unique<RunLock>(run.directory);
    std::filesystem::remove(run.directory + "/summary.json", error);  // of fewer steps
    replace_text_file(run.directory + "/config.json", settings_json(run.s).dump(2) + "\n");
    write_history(run.directory, run.history);
    if (run.tokenizer && !run.tokenizer->file().empty())
      replace_text_file(run.directory + "/tokenizer.json", read_text_file(run.tokenizer->file()));  // for eval
    return run.directory;
  }
};
