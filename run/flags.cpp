// The table of flags, and what is made of it. An object of its own: CLI11 and JSON are most of what there is to compile,
// and so it is done beside the program that uses it, and once for all.
#include "run/flags.h"

const std::map<std::string, std::vector<std::string>>& presets() {
  static const std::map<std::string, std::vector<std::string>> table = {
      // For a CPU: minutes, and about an hour.
      {"nano",
       {"--layers=4", "--width=96", "--heads=3", "--mlp-hidden=192", "--context=256", "--batch=4",
        "--steps=2200", "--lr=3e-3", "--init-std=0.05"}},
      {"small",
       {"--layers=6", "--width=384", "--heads=6", "--mlp-hidden=1024", "--context=256", "--batch=16",
        "--steps=2000", "--lr=1e-3"}},
      // GPT-2's size, with the block of today: for one GPU.
      {"gpt-124m",
       {"--layers=12", "--width=768", "--heads=12", "--mlp-hidden=2048", "--context=1024", "--vocab=50304", "--tied",
        "--batch=64", "--accumulate=8", "--steps=19000", "--lr=6e-4"}},
      // The two 1B models of arXiv 2603.11611 at 10 % rotation: 8.4 M tokens a step, 12,000 steps.
      {"llama-1b",
       {"--layers=16", "--width=2048", "--heads=32", "--kv-heads=8", "--head-size=64", "--mlp-hidden=8192",
        "--context=2048", "--vocab=50304", "--batch=8", "--accumulate=512", "--steps=12000", "--lr=4e-4",
        "--min-lr=4e-5"}},
      {"parallel-1b",
       {"--layers=16", "--width=2048", "--heads=8", "--head-size=256", "--mlp-hidden=2816", "--context=2048",
        "--vocab=50304", "--block=parallel", "--batch=8", "--accumulate=512", "--steps=12000", "--lr=4e-4",
        "--min-lr=4e-5"}},
      // Their third, of 8B, which needs several GPUs: the micro-batches are enough for 1 to 64 of them.
      {"llama-8b",
       {"--layers=36", "--width=4096", "--heads=32", "--kv-heads=8", "--head-size=128", "--mlp-hidden=14336",
        "--context=2048", "--vocab=50304", "--batch=2", "--accumulate=2048", "--recompute", "--steps=12000", "--lr=4e-4",
        "--min-lr=4e-5"}},
      // The Pythia block (Biderman et al. 2023, arXiv 2304.01373): LayerNorm, GELU, biases, parallel, 25 %.
      {"pythia-70m",
       {"--layers=6", "--width=512", "--heads=8", "--mlp-hidden=2048", "--context=2048", "--vocab=50304",
        "--block=parallel", "--norm=layer", "--mlp=gelu", "--bias", "--rotary-fraction=0.25", "--batch=32",
        "--accumulate=32", "--steps=143000", "--lr=1e-3"}},
      {"pythia-160m",
       {"--layers=12", "--width=768", "--heads=12", "--mlp-hidden=3072", "--context=2048", "--vocab=50304",
        "--block=parallel", "--norm=layer", "--mlp=gelu", "--bias", "--rotary-fraction=0.25", "--batch=32",
        "--accumulate=32", "--steps=143000", "--lr=6e-4"}},
  };
  return table;
}

void add_model_flags(Flags& f, Config& c, RotaryRequest& rotary) {
  f.group("Model");
  f.add("layers", c.layers, "transformer blocks");
  f.add("width", c.width, "channels of the residual stream");
  f.add("heads", c.heads, "query heads");
  f.add("kv-heads", c.kv_heads, "key/value heads; 0: as many as --heads");
  f.add("head-size", c.head_size, "channels of a head; 0: width / heads");
  f.add("mlp-hidden", c.mlp_hidden, "channels inside the MLP; 0: 8/3 (swiglu) or 4 (gelu) times the width");
  f.add("context", c.context, "positions in a training window");
  f.add("vocab", c.vocab, "vocabulary size; 0: that of the data, rounded up to a multiple of 8");
  f.add("rotary-fraction", rotary.fraction, "share of each head's channels that RoPE rotates, 0 to 1",
        [&c] { return double(c.rotary_dim) / c.head_size; }, [](double) {})
      ->default_str(kRotaryDim ? "" : format("%g", kRotaryFraction));
  f.add("rotary-dim", rotary.dim, "the same as a number of channels, even", [&c] { return c.rotary_dim; },
        [&](int R) { c.rotary_dim = R, rotary = {{}, R}; })
      ->default_str(kRotaryDim ? std::to_string(*kRotaryDim) : "");
  f.add("rope-base", c.rope_base, "base of the rotation frequencies");
  f.add_choice("rope-pairs", c.rope_pairs, {"half", "interleaved"}, "which channels pair up");
  f.add("rope-frequencies", c.rope_frequencies,
        "rotary: base^(-2i/R), head: base^(-2i/HS), or wavelengths in positions, such as 6.3,135");
  f.add("rope-scaling", c.rope_scaling,
        "what is done to them: none, linear:FACTOR, llama3:..., yarn:... or longrope:... (rope_scale in rope.cuh)");
  f.add("rotary-layers", c.rotary_layers,
        "all, nope:N: none in every N-th layer, or each layer's number of channels, such as 16,16,0");
  f.add("qk-norm", c.qk_norm, "RMSNorm on queries and keys before RoPE");
  f.add("attention-softcap", c.attention_softcap, "C: attention scores become C tanh(score / C); 0: they stay");
  f.add_choice("block", c.block, {"sequential", "parallel"}, "attention then MLP, or side by side");
  f.add_choice("norm", c.norm, {"rms", "layer"}, "RMSNorm or LayerNorm");
  f.add("norm-eps", c.norm_eps, "added to the mean square in every norm");
  f.add("shared-norm", c.shared_norm, "one norm for attention and MLP of a parallel block");
  f.add_choice("mlp", c.mlp, {"swiglu", "gelu", "gelu-tanh"}, "MLP activation; gelu-tanh: GELU's older formula");
  f.add("bias", c.bias, "biases in the linear layers of the blocks");
  f.add("qkv-bias", c.qkv_bias, "biases of queries, keys and values alone");
  f.add("head-bias", c.head_bias, "a bias of the head");
  f.add("tied", c.tied, "share the weights of embedding and head");
}

void add_optimizer_flags(Flags& f, Settings& s) {
  f.group("Optimiser");
  f.add("steps", s.steps, "optimiser steps");
  f.add("batch", s.batch, "windows in a micro-batch");
  f.add("accumulate", s.accumulate, "micro-batches in a step, of all ranks together");
  f.add("lanes", s.lanes, "sums of them that are added up in order; the ranks must divide them; 0: as many as ranks");
  f.add("lr", s.lr, "peak learning rate");
  f.add("min-lr", s.min_lr, "learning rate at the end; -1: a tenth of --lr");
  f.add("warmup", s.warmup, "steps of linear warm-up; -1: 5 % of --steps");
  f.add_choice("schedule", s.schedule, {"cosine", "linear", "constant"}, "learning rate after the warm-up");
  f.add("weight-decay", s.weight_decay, "decoupled weight decay, on matrices only");
  f.add("beta1", s.beta1, "AdamW: decay of the mean of gradients");
  f.add("beta2", s.beta2, "AdamW: decay of the mean of squared gradients");
  f.add("eps", s.eps, "AdamW: added to the denominator");
  f.add("clip", s.clip, "largest global gradient norm; 0: no clipping");
  f.add("z-loss", s.z_loss, "weight of (log Z)^2 in the loss");
  f.add("qk-clip", s.qk_clip,
        "largest attention logit: after a step, heads above it have their query and key weights scaled; 0: none");
  f.add("init-std", s.init_std, "standard deviation of the initial matrices");
  f.add("seed", s.seed, "of the initial weights and of the order of the data");
}

void add_run_flags(Flags& f, Settings& s) {
  f.group("Run");
  std::string names;
  for (const auto& preset : presets()) names += (names.empty() ? "" : " ") + preset.first;
  f.add("preset", s.preset, "set of flags: " + names);
  f.add("data", s.data, "training shards, a glob pattern");
  f.add("val", s.val, "validation shards; default: --data with train replaced by val");
  f.add("run", s.run, "the run's files go to runs/NAME; default: the preset's name, numbered");
  f.add("device", s.device, "auto, cpu or cuda")->type_name("auto|cpu|cuda");
  f.add("dtype", s.dtype, "auto, fp32 or bf16 (cuda only)")->type_name("auto|fp32|bf16");
  f.add("val-every", s.val_every, "steps between validations; 0: four in a run");
  f.add("val-tokens", s.val_tokens, "tokens of a validation");
  f.add("sample-every", s.sample_every, "steps between samples of text; 0: none");
  f.add("checkpoint-every", s.checkpoint_every, "steps between checkpoints; 0: four in a run");
  f.add("diagnostics-every", s.diagnostics_every, "steps between rows of layers.csv and tensors.csv; 0: none");
  f.add("threads", s.threads, "CPU threads; 0: all cores");
  f.add("recompute", s.model.recompute, "less memory: make cheap activations again in the backward pass");
  f.add("init", s.init, "start from the model and weights of this run or checkpoint")->type_name("NAME");
  f.add("resume", s.resume, "go on from the run's checkpoint");
  f.add("ranks", s.ranks, "processes to start on this host, one for each GPU");
  f.add("replay-step", s.replay_step, "repeat a step of --run and look into it; -1: train");
}

void resolve_settings(Settings& s) {
  derive_sizes(s.model);
  s.model.rotary_dim = rotary_dim(s.rotary, s.model.head_size);
  const int R = s.model.rotary_dim;
  resolve(s.model);
  if ((s.rotary.dim || s.rotary.fraction) && s.model.rotary_dim != R)
    throw UserError("--rotary-layers " + s.model.rotary_layers + ": up to " + std::to_string(s.model.rotary_dim) +
                    " channels, where --rotary-dim or --rotary-fraction mean " + std::to_string(R) +
                    "; give --rotary-dim " + std::to_string(s.model.rotary_dim) + ", or --rotary-layers all");
}

void apply_flags(Settings& s, const std::vector<std::string>& args) {
  Flags f("Train a GPT with partial RoPE.", "train");
  RotaryRequest rotary;
  add_model_flags(f, s.model, rotary);
  add_optimizer_flags(f, s);
  add_run_flags(f, s);
  f.parse(args);
  if (rotary.fraction || rotary.dim) s.rotary = rotary;  // either flag overrides both of what `s` came with
}

std::vector<std::string> preset_flags(const std::string& name) {
  const auto found = presets().find(name);
  if (found != presets().end()) {
    std::vector<std::string> flags = found->second;
    if (kRotaryDim)  // the program was built for another R than the preset may have
      flags.erase(std::remove_if(flags.begin(), flags.end(),
                                 [](const std::string& flag) { return flag.rfind("--rotary-fraction", 0) == 0; }),
                  flags.end());
    return flags;
  }
  std::vector<std::string> names;
  for (const auto& preset : presets()) names.push_back(preset.first);
  const std::string guess = closest(name, names);
  std::string all;
  for (const std::string& n : names) all += " " + n;
  throw UserError("--preset " + name + ": unknown" + (guess.empty() ? "" : "; did you mean " + guess + "?") +
                  " There are:" + all);
}

Settings plain_settings() {
  Settings s;
  apply_flags(s, preset_flags(s.preset));
  return s;
}

nlohmann::ordered_json settings_json(Settings& s, const std::vector<std::string>& groups) {
  Flags f("", "");
  add_model_flags(f, s.model, s.rotary);
  add_optimizer_flags(f, s);
  add_run_flags(f, s);
  nlohmann::ordered_json json;
  for (const Flag& flag : f.table) {
    if (std::find(groups.begin(), groups.end(), flag.group) == groups.end()) continue;
    if (flag.name == "resume" || flag.name == "replay-step" || flag.name == "ranks") continue;
    std::string key = flag.name;
    std::replace(key.begin(), key.end(), '-', '_');
    json[key] = flag.get();
  }
  return json;
}

Settings settings_from_json(const std::string& path, const nlohmann::json& json) {
  if (!json.is_object()) throw UserError(path + ": no settings there");
  Settings s;
  Flags f("", "");
  add_model_flags(f, s.model, s.rotary);
  add_optimizer_flags(f, s);
  add_run_flags(f, s);
  for (const Flag& flag : f.table) {
    std::string key = flag.name;
    std::replace(key.begin(), key.end(), '-', '_');
    try {
      if (json.contains(key)) flag.set(json[key]);
    } catch (const nlohmann::json::exception&) {
      throw UserError(path + ": " + key + " is " + json[key].dump());
    } catch (const UserError& e) {
      throw UserError(path + ": " + e.what());
    }
  }
  if (s.lanes == 0) s.lanes = 1;  // of a time when there was nothing else
  return s;
}

Settings settings_from_state(const std::string& path, const nlohmann::json& state) {
  if (!state.contains("settings") || !state.contains("step") || !state["step"].is_number_unsigned() ||
      state["step"] > INT32_MAX || (state.contains("vocabulary") && !state["vocabulary"].is_number_unsigned()))
    throw UserError(path + ": not a checkpoint's state");
  return settings_from_json(path, state["settings"]);
}
