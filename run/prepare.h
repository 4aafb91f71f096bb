#pragma once
// What is decided before a run starts: its settings, its data, where its files go and what it starts from.

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <set>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "device/ranks.h"
#include "run/checkpoint.h"
#include "run/csv.h"
#include "run/history.h"
#include "run/print.h"
#include "run/program.h"
#include "run/settings.h"
#include "text/identity.h"
#include "text/shards.h"
#include "text/tokenizer.h"

// A run is trained by one process at a time: the one that holds the lock on its file `lock`. It ends with the process.
class RunLock {
 public:
  explicit RunLock(const std::string& directory) : file_(::open((directory + "/lock").c_str(), O_RDWR | O_CREAT, 0644)) {
    if (file_ < 0) throw UserError(directory + "/lock: cannot write: " + std::strerror(errno));
    if (::flock(file_, LOCK_EX | LOCK_NB) == 0) return;
    ::close(file_);
    throw UserError(directory + ": another process is training this run; wait for it, or choose another --run");
  }
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;
  ~RunLock() { ::close(file_); }

 private:
  int file_;
};

// What is decided before any memory is taken: settings, data, where the run's files go, what it starts from.
struct Run {
  Settings s;
  std::string directory;
  std::unique_ptr<RunLock> lock;
  std::vector<std::string> flags;  // as the user gave them
  std::string checkpoint, init;  // the checkpoint to resume from, or to take the weights from, or empty
  nlohmann::json state;
  std::string changes;  // of settings, to what it starts from
  nlohmann::json special_tokens;  // of the model that the weights were imported from, see eval/source.h
  std::vector<Stretch> history;  // the last one is what holds now
  int kept_step = 0;  // of the run's checkpoint, when a step is replayed
  Meta meta;
  std::unique_ptr<Dataset> train, val;
  std::unique_ptr<Tokenizer> tokenizer;  // null where the shards do not say which
};

inline bool was_given(const std::vector<std::string>& args, const std::string& flag) {
  return std::any_of(args.begin(), args.end(),
                     [&](const std::string& arg) { return arg == flag || arg.rfind(flag + "=", 0) == 0; });
}

// The learning rate of the step after `done` steps.
inline double learning_rate(const Settings& s, int done) {
  const int warmup = s.warmup >= 0 ? s.warmup : (s.steps + 19) / 20;
  return learning_rate(s.schedule, done, s.steps, warmup, s.lr, s.min_lr >= 0 ? s.min_lr : s.lr / 10);
}

// Whether a directory is a run of which nothing was saved: a new one may take its place.
inline bool nothing_saved(const std::string& directory) {
  if (!newest_checkpoint(directory).empty()) return false;
  if (std::filesystem::exists(directory + "/config.json")) return true;
  if (!std::filesystem::is_directory(directory)) return false;
  for (const auto& entry : std::filesystem::directory_iterator(directory))
    if (entry.path().filename() != "lock") return false;
  return true;
}

// --resume: from the run's checkpoint; from the beginning where nothing was saved yet.
inline void prepare_resume(Run& run, const Settings& asked, bool root) {
  if (asked.run.empty()) throw UserError("--resume: say which run with --run NAME");
  run.directory = run_directory(asked.run);
  const std::string config = run.directory + "/config.json";
  if (newest_checkpoint(run.directory).empty() && !std::filesystem::exists(config))
    throw UserError("--resume: " + run.directory + ": no checkpoint there (" + run.directory +
                    "/checkpoint/state.json)");
  if (root) run.lock = std::make_unique<RunLock>(run.directory);
  run.checkpoint = newest_checkpoint(run.directory);
  if (run.checkpoint.empty()) {
    run.s = settings_from_json(config, read_json_file(config));
    if (!run.s.init.empty()) run.init = locate_checkpoint(run.s.init);
    if (run.init.empty() && !run.s.init.empty())
      throw UserError("--resume: the run started from " + run.s.init + ", which is no longer there");
    if (root) std::fprintf(stderr, "note: %s has no checkpoint yet: it begins again\n", run.directory.c_str());
    return;
  }
  const std::string state = run.checkpoint + "/state.json";
  run.state = read_json_file(state);
  run.s = settings_from_state(state, run.state);
  check_weights(run.s.model, run.checkpoint);
  run.special_tokens = run.state.value("special_tokens", nlohmann::json());
  const int step = run.state["step"];
  run.history = read_history(run.directory);
  while (run.history.size() > 1 && run.history.back().from >= step) run.history.pop_back();
}

// --replay-step: the settings that the step had; and the run's checkpoint if that is of an earlier step, else what the
// run started from.
inline void prepare_replay(Run& run, const Settings& asked) {
  const std::string flag = "--replay-step " + std::to_string(asked.replay_step);
  if (asked.run.empty()) throw UserError(flag + ": say of which run with --run NAME");
  run.directory = run_directory(asked.run);
  const std::vector<double> logged = read_column(run.directory + "/log.csv", "step");
  if (logged.empty()) throw UserError(flag + ": there are no steps in " + run.directory + "/log.csv");
  if (asked.replay_step < 1 || asked.replay_step > logged.back())
    throw UserError(flag + ": must be one of the steps 1 to " + std::to_string(int(logged.back())) + " of " +
                    run.directory + "/log.csv");
  run.history = read_history(run.directory);
  while (run.history.size() > 1 && run.history.back().from >= asked.replay_step) run.history.pop_back();
  run.s = run.history.back().s;
  run.checkpoint = newest_checkpoint(run.directory);
  int first = 0;
  if (!run.checkpoint.empty()) {
    const std::string state = run.checkpoint + "/state.json";
    run.state = read_json_file(state);
    settings_from_state(state, run.state);  // refuses what is no state
    run.kept_step = run.state["step"];
    if (run.kept_step >= asked.replay_step) run.checkpoint = "";
    else first = run.kept_step;
  }
  if (run.checkpoint.empty() && !run.s.init.empty()) {
    run.init = locate_checkpoint(run.s.init);
    if (run.init.empty()) throw UserError(flag + ": the run started from " + run.s.init + ", which is no longer there");
  }
  if (const Stretch& before = stretch_of(run.history, first); before.train != run.history.back().train)
    throw UserError(flag + ": steps up to " + std::to_string(run.history.back().from) + " were on other data (" +
                    run.directory + "/history.json), and there is no checkpoint from after them");
}

// What a checkpoint's tokens mean: the name of its tokenizer and the fingerprint, which older ones take from the
// tokenizer itself.
inline TokenizerIdentity identity_of_checkpoint(const std::string& checkpoint, const nlohmann::json& state) {
  TokenizerIdentity identity{state.value("tokenizer", ""), state.value("tokenizer_fingerprint", "")};
  if (identity.fingerprint.empty() && !identity.name.empty()) {
    const std::string beside = std::filesystem::exists(checkpoint + "/tokenizer.json") ? "" : "/..";
    try {
      identity.fingerprint = make_tokenizer(identity.name, checkpoint + beside)->fingerprint();
    } catch (const UserError&) {
    }
  }
  return identity;
}

// What a run that goes on, or a step that is repeated, reads must be what it was: `flag` says which of the two. On resume
// --data and --val say that other data are meant.
inline void check_data(const Run& run, const std::string& flag, const std::vector<std::string>& args, int step,
                       bool root) {
  const Stretch &was = run.history.back(), is{step, run.s, run.train->fingerprint(), run.val->fingerprint()};
  for (const auto& [name, data, before, now] :
       {std::tuple{"--data", &run.s.data, &was.train, &is.train}, std::tuple{"--val", &run.s.val, &was.val, &is.val}}) {
    const std::string what = std::string(name) + " " + *data;
    if (flag != "--resume" && data == &run.s.val) continue;  // no part of a training step
    if (before->empty() && root) {
      std::fprintf(stderr, "note: %s: nothing says whether these are the data of before; taken for the same\n",
                   what.c_str());
    } else if (!before->empty() && *before != *now) {
      if (flag != "--resume" || !was_given(args, name))
        throw UserError(flag + ": " + what + ": not the data that the run read until now (fingerprint " + *now +
                        ", was " + *before + ")" +
                        (flag == "--resume" ? "; bring those back, or go on with others by giving " + std::string(name)
                                            : ""));
      if (root) std::fprintf(stderr, "note: %s: other data than up to step %d\n", what.c_str(), step);
    }
  }
}

// `args` are the flags of train, which runs on `ranks` ranks. Rank 0, the `root`, locks the run and says what is noted.
inline Run prepare(const std::vector<std::string>& args, int ranks, bool root) {
  Run run;
  Settings& s = run.s;
  Settings asked = plain_settings();
  apply_flags(asked, args);
  const bool replay = asked.replay_step != -1, again = asked.resume || replay;
  if (asked.resume && replay) throw UserError("--resume, --replay-step: give one of them");
  if (asked.resume) {
    prepare_resume(run, asked, root);
  } else if (replay) {
    prepare_replay(run, asked);
  } else {
    apply_flags(s, preset_flags(asked.preset));
  }
  run.flags = args;
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
  expect_positive("qk-clip", s.qk_clip, true);
  if (s.qk_clip && s.model.qk_norm) throw UserError("--qk-clip: not with --qk-norm, which bounds the logits already");
  expect_positive("val-every", s.val_every, true);
  expect_positive("val-tokens", s.val_tokens);
  expect_positive("sample-every", s.sample_every, true);
  expect_positive("checkpoint-every", s.checkpoint_every, true);
  expect_positive("diagnostics-every", s.diagnostics_every, true);
  expect_positive("threads", s.threads, true);
  for (auto [flag, beta] : {std::pair{"--beta1 ", s.beta1}, std::pair{"--beta2 ", s.beta2}})
    if (!(beta >= 0 && beta < 1)) throw UserError(flag + std::to_string(beta) + ": must lie between 0 and 1");

  run.train = std::make_unique<Dataset>(s.data);
  if (s.val.empty()) {
    s.val = s.data;
    const size_t slash = s.val.rfind('/') == std::string::npos ? 0 : s.val.rfind('/');
    const size_t at = s.val.find("train", slash);
    if (at == std::string::npos)
      throw UserError("--val: cannot be guessed from --data " + s.data + ", which does not say train");
    s.val.replace(at, 5, "val");
  }
  run.val = std::make_unique<Dataset>(s.val);
  run.meta = read_meta(s.data);
  if (!run.meta.tokenizer.empty()) run.tokenizer = make_tokenizer(run.meta.tokenizer, directory_of(s.data));
  if (s.model.vocab == 0) {
    if (!run.meta.vocabulary) throw UserError("--vocab: needed, because there is no meta.json beside " + s.data);
    s.model.vocab = (run.meta.vocabulary + 7) / 8 * 8;
  }
  resolve_settings(s);
  if (const std::string from = run.checkpoint.empty() ? run.init : run.checkpoint; !from.empty())
    check_same_tokenizer("--data " + s.data, identity_of(run.meta, s.data), from,
                         identity_of_checkpoint(from, read_json_file(from + "/state.json")));
  for (const Dataset* data : {run.train.get(), run.val.get()}) {
    data->windows(s.model.context);
    data->check_tokens(s.model.vocab);
    check_content(*data, read_meta(data->pattern()));
  }
  const int step = run.checkpoint.empty() ? 0 : run.state["step"].get<int>();
  if (again && !run.history.empty()) check_data(run, replay ? "--replay-step" : "--resume", args, step, root);
  if (again || !run.init.empty()) {
    std::vector<std::string> groups = {"Model"};
    if (again) groups.push_back("Optimiser");
    const std::string flag = replay ? "--replay-step" : asked.resume ? "--resume" : "--init";
    // Weights know nothing of the position code, nor of the cap: a trained model may go on with another, or with none.
    std::set<std::string> may_differ = {"context", "rotary_fraction", "rotary_dim", "rotary_layers", "rope_base",
                                        "rope_frequencies", "rope_scaling", "attention_softcap"};
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
    // Without --run: the preset's name, or that of the directory that other data than the built-in lie in; numbered.
    std::string base = s.run;
    if (base.empty() && s.data != Settings().data)
      base = std::filesystem::path(directory_of(s.data)).lexically_normal().filename();
    if (base.empty() || base == ".") base = s.preset;
    std::string name = base;
    for (int i = 2; s.run.empty() && std::filesystem::exists("runs/" + name); ++i) name = base + "-" + std::to_string(i);
    run.directory = run_directory(name);
    if (std::filesystem::exists(run.directory)) {
      if (!nothing_saved(run.directory))
        throw UserError("--run " + name + ": " + run.directory +
                        " exists; add --resume to go on with it, or choose another name");
      if (root) run.lock = std::make_unique<RunLock>(run.directory);
      if (root) std::fprintf(stderr, "note: nothing was saved in %s yet: it begins anew\n", run.directory.c_str());
    }
    s.run = name;
  }
  if (!replay) {
    const Stretch now{step, s, run.train->fingerprint(), run.val->fingerprint()};
    if (run.history.empty() || run.history.back().train != now.train || run.history.back().val != now.val ||
        settings_json(run.history.back().s) != settings_json(s))
      run.history.push_back(now);
  }
  return run;
}

// Refuses ranks that were started with other settings, other data or another checkpoint than rank 0.
inline void expect_same(Run& run, Ranks& ranks) {
  nlohmann::ordered_json mine = settings_json(run.s);
  mine["the fingerprint of the training data"] = run.train->fingerprint();
  mine["the fingerprint of the validation data"] = run.val->fingerprint();
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
  int fits = 0, too_many = B;  // by halves: a batch may be a billion
  while (too_many - fits > 1) {
    B = fits + (too_many - fits) / 2;
    (needed() <= available ? fits : too_many) = B;
  }
  if (B = fits; B > 0)
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
  if (step) {
    std::printf("Resumed at step %d.\n", step);
    const Settings before = settings_from_state(run.checkpoint + "/state.json", run.state);
    if (before.steps != s.steps)
      std::printf("It was to have %d steps and now has %d: the learning rate goes from %.3g (step %d) to %.3g.\n",
                  before.steps, s.steps, learning_rate(before, step - 1), step, learning_rate(s, step));
  }
  std::fflush(stdout);
}
