#pragma once
// What is decided before a run starts: its settings, its data, where its files go and what it starts from.

#include <set>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "device/ranks.h"
#include "run/checkpoint.h"
#include "run/csv.h"
#include "run/flags.h"
#include "run/print.h"
#include "text/shards.h"
#include "text/tokenizer.h"

// What is decided before any memory is taken: settings, data, where the run's files go, what it starts from.
struct Run {
  Settings s;
  std::string directory;
  std::string checkpoint, init;  // the checkpoint to resume from, or to take the weights from, or empty
  nlohmann::json state;
  std::string changes;  // of settings, to what it starts from
  nlohmann::json special_tokens;  // of the model that the weights were imported from, see eval/source.h
  int kept_step = 0;  // of the run's checkpoint, when a step is replayed
  Meta meta;
  std::unique_ptr<Dataset> train, val;
  std::unique_ptr<Tokenizer> tokenizer;  // null where the shards do not say which
};

// --replay-step: the run's settings; and its checkpoint if that is of an earlier step than the one to be repeated,
// else what it started from.
inline void prepare_replay(Run& run, const Settings& asked) {
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

// `args` are the flags of train, which runs on `ranks` ranks.
inline Run prepare(const std::vector<std::string>& args, int ranks) {
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
    run.special_tokens = run.state.value("special_tokens", nlohmann::json());
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
    const Settings from = settings_from_state(state, read_json_file(state));
    s.model = from.model, s.rotary = from.rotary;
    check_weights(s.model, run.init);
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
  if (s.lanes == 0) s.lanes = ranks;
  expect_divides(ranks, s.lanes);
  if (s.accumulate % s.lanes)
    throw UserError("--accumulate " + std::to_string(s.accumulate) + ": must be a multiple of --lanes " +
                    std::to_string(s.lanes) + ", which is the number of ranks unless it is given");
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
  resolve_settings(s);
  for (const Dataset* data : {run.train.get(), run.val.get()}) {
    data->windows(s.model.context);
    data->check_tokens(s.model.vocab);
  }
  if (again || !run.init.empty()) {
    std::vector<std::string> groups = {"Model"};
    if (again) groups.push_back("Optimiser");
    const std::string flag = replay ? "--replay-step" : asked.resume ? "--resume" : "--init";
    // Weights know nothing of the position code: a trained model may go on with another one, or with none.
    std::set<std::string> may_differ = {"context", "rotary_fraction", "rotary_dim", "rotary_layers", "rope_base",
                                        "rope_frequencies", "rope_scaling"};
    if (again) may_differ = {replay ? "" : "steps"};
    const auto was = settings_json(before, groups), is = settings_json(s, groups);
    for (const auto& [key, value] : was.items())
      if (is[key] != value && may_differ.count(key))
        run.changes += (run.changes.empty() ? "" : ", ") + key + " " + is[key].dump() + " (was " + value.dump() + ")";
      else if (is[key] != value)
        throw UserError(flag + ": " + key + " is " + is[key].dump() + " but was " + value.dump() + " in " +
                        (replay ? run.directory : asked.resume ? run.checkpoint : run.init) +
                        "; leave the flag out, or start a new run");
  }
  if (!again) {
    const std::string base = s.run.empty() ? s.preset : s.run;
    std::string name = base;
    for (int i = 2; s.run.empty() && std::filesystem::exists("runs/" + name); ++i) name = base + "-" + std::to_string(i);
    run.directory = "runs/" + name;
    if (std::filesystem::exists(run.directory))
      throw UserError("--run " + name + ": " + run.directory +
                      " exists; add --resume to go on with it, or choose another name");
    s.run = name;
  }
  return run;
}

// Refuses ranks that were started with other settings, other data or another checkpoint than rank 0.
inline void expect_same(Run& run, Ranks& ranks) {
  nlohmann::ordered_json mine = settings_json(run.s);
  mine["tokens of the training data"] = run.train->tokens();
  mine["tokens of the validation data"] = run.val->tokens();
  mine["the step to go on from"] = run.checkpoint.empty() ? 0 : run.state["step"].get<int>();
  const std::vector<std::string> all = ranks.gather(mine.dump());
  for (size_t r = 1; r < all.size(); ++r) {
    const auto theirs = nlohmann::ordered_json::parse(all[r]);
    for (const auto& [key, value] : mine.items())
      if (theirs.at(key) != value)
        throw UserError(ranks.name(int(r)) + ": " + key + " is " + theirs[key].dump() + " but " + value.dump() +
                        " on rank 0; start all ranks with the same flags, on the same files");
  }
}

// All settings, a group a paragraph, lines of at most 110 characters.
inline void print_settings(Settings& s) {
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
void expect_memory(Config c, int B, const Division& division, size_t available) {
  auto needed = [&] { return memory_report<Backend, Real>(c, B, c.context, division).total(); };
  const size_t all = needed();
  if (all <= available) return;
  std::string advice;
  if (!c.recompute) {
    c.recompute = true;
    advice = "; --recompute would take " + human_bytes(needed());
    c.recompute = false;
  }
  while (B > 1 && needed() > available) --B;
  if (needed() <= available)
    advice += "; --batch " + std::to_string(B) + " fits (with more --accumulate)";
  else
    advice += "; even --batch 1 does not fit: a smaller model or --context is needed";
  throw UserError("--batch: not enough memory: " + human_bytes(all) + " needed, " + human_bytes(available) +
                  (std::is_same_v<Backend, Cpu> ? " in this machine" : " free on the GPU") + advice);
}

// What a run says when it starts.
template <class Backend, class Real>
void print_start(Run& run, const Division& division, size_t parameters, int step) {
  Settings& s = run.s;
  const Config& c = s.model;
  const MemoryReport memory = memory_report<Backend, Real>(c, s.batch, c.context, division);
  const size_t tokens_per_step = size_t(s.batch) * c.context * s.accumulate;
  print_settings(s);
  if (!run.changes.empty()) std::printf("Changed: %s.\n", run.changes.c_str());
  const std::string layers = c.rotary_layers == "all" ? "" : ", by layer " + c.rotary_layers;
  std::printf("RoPE turns %d of %d channels of each query and key head (%.1f %%)%s; table %s.\n", c.rotary_dim,
              c.head_size, 100.0 * c.rotary_dim / c.head_size, layers.c_str(), human_bytes(memory.rope_table).c_str());
  std::string ranks, exchange;
  if (division.ranks > 1) ranks = ", on " + std::to_string(division.ranks) + " ranks";
  if (memory.exchange) exchange = ", exchange " + human_bytes(memory.exchange);
  std::printf(
      "%.2f M parameters on %s, %s%s. Memory%s: parameters %s, gradients %s, optimiser %s%s, activations %s; "
      "%s in all.\n",
      parameters * 1e-6, Backend::name, dtype_name<Real>(), ranks.c_str(), division.ranks > 1 ? " of each" : "",
      human_bytes(memory.parameters).c_str(), human_bytes(memory.gradients).c_str(),
      human_bytes(memory.optimizer).c_str(), exchange.c_str(), human_bytes(memory.activations).c_str(),
      human_bytes(memory.total()).c_str());
  std::printf("Data: %.2f M training tokens, %zu a step, so %.2f epochs in %d steps.\n", run.train->tokens() * 1e-6,
              tokens_per_step, double(tokens_per_step) * s.steps / run.train->tokens(), s.steps);
  if (step) std::printf("Resumed at step %d.\n", step);
  std::fflush(stdout);
}
