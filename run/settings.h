#pragma once
// The settings of a run, and what else is asked of its table of flags (run/flags.h), without the parser's headers.

#include <nlohmann/json.hpp>

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "model.h"
#include "run/print.h"

struct Settings {
  Config model;
  RotaryRequest rotary;  // R follows from it once the head size is known: resolve_settings

  int steps = 1000, batch = 16, accumulate = 1, lanes = 0;  // lanes 0: as many as ranks
  double lr = 1e-3, min_lr = -1;  // min_lr -1: a tenth of lr
  int warmup = -1;                // -1: 5 % of the steps
  Schedule schedule = Schedule::cosine;
  double weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, clip = 1.0, z_loss = 0, qk_clip = 0;
  double init_std = 0.02;  // as in arXiv 2603.11611
  uint64_t seed = 1;

  std::string preset = "nano", data = "data/stories/train_*.bin", val, run, init, device = "auto",
              dtype = "auto";
  int val_every = 0, val_tokens = 65536, sample_every = 0,
      checkpoint_every = 0;  // 0: four validations, no samples, four checkpoints
  int threads = 0;                                                                // 0: all cores
  int diagnostics_every = 0;  // 0: never
  int replay_step = -1;       // -1: train
  bool resume = false;
  int ranks = 1;  // of the start, not of the run
};

// A preset is the same as its flags on the command line, before all others. Where none of them says how much RoPE
// rotates, it is a tenth.
const std::map<std::string, std::vector<std::string>>& presets();
std::vector<std::string> preset_flags(const std::string& name);

// Once all flags are read: sizes that follow from others, then R, which needs the head size.
void resolve_settings(Settings& s);

// Flags of `train`, on top of what `s` holds: a preset's, then those of the command line.
void apply_flags(Settings& s, const std::vector<std::string>& args);

// Those of a run that is started without flags: what --help shows.
Settings plain_settings();

// The values of all settings as one flat JSON object, keys as the flags with underscores. This is config.json.
nlohmann::ordered_json settings_json(Settings& s,
                                     const std::vector<std::string>& groups = {"Model", "Optimiser", "Run"});

// The inverse. UserError, naming the file `path`, if that is not an object, or a flag does not take its value.
Settings settings_from_json(const std::string& path, const nlohmann::json& json);

// The settings in a checkpoint's state.json, which `path` names.
Settings settings_from_state(const std::string& path, const nlohmann::json& state);

inline void expect_positive(const char* flag, double value, bool zero_allowed = false) {
  if (!std::isfinite(value) || value < 0 || (value == 0 && !zero_allowed)) {
    throw UserError(std::string("--") + flag + " " + format("%.15g", value) + ": must be a finite number " +
                    (zero_allowed ? "of at least 0" : "above 0"));
  }
}

// What a run's lanes allow.
inline void expect_divides(int ranks, int lanes) {
  if (lanes < 1 || lanes % ranks)
    throw UserError("--lanes " + std::to_string(lanes) + ": must be a multiple of the number of ranks, " +
                    std::to_string(ranks));
}
