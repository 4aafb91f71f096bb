#pragma once
// What the commands of `eval` share: a trained model on disk, the flags that say which and where it runs, its data.

#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "model.h"
#include "run/checkpoint.h"
#include "run/flags.h"
#include "run/print.h"
#include "text/shards.h"
#include "text/tokenizer.h"

// A trained model on disk: what its state.json says.
struct Source {
  std::string checkpoint;  // directory
  Settings settings;
  int step = 0;
  std::unique_ptr<Tokenizer> tokenizer;  // null where the data did not say which
  int vocabulary = 0;                    // ids that mean something; the model's V may be padded beyond
  nlohmann::json special_tokens;         // {"config": ids, "generation": ids} of a model that was imported; or null

  // Ids that end a text: the tokenizer's end of text, and what the imported model says.
  std::vector<int> stop_tokens() const {
    std::vector<int> stop;
    if (tokenizer) stop.push_back(tokenizer->end_of_text());
    for (const nlohmann::json& file : special_tokens) {
      const nlohmann::json ids = file.is_object() ? file.value("eos_token_id", nlohmann::json()) : nlohmann::json();
      for (const nlohmann::json& id : ids)  // one, or a list
        if (id.is_number_integer()) stop.push_back(id.get<int>());
    }
    return stop;
  }
};

// `run` is the name of a run (runs/NAME), or the path of a run's or a checkpoint's directory.
inline Source open_source(const std::string& run) {
  if (run.empty()) throw UserError("--run: say which model: a name in runs/, or the path of a run or checkpoint");
  Source source;
  source.checkpoint = locate_checkpoint(run);
  if (source.checkpoint.empty()) {
    std::vector<std::string> names;
    std::error_code none;
    for (const auto& entry : std::filesystem::directory_iterator("runs", none))
      names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    std::string all;
    for (const std::string& name : names) all += " " + name;
    const std::string guess = closest(run, names);
    throw UserError("--run " + run + ": no checkpoint in runs/" + run + " or " + run +
                    (!guess.empty() && guess != run ? "; did you mean " + guess + "?"
                     : names.empty()                ? "; runs/ is empty"
                                                    : "; there are:" + all));
  }
  const std::string path = source.checkpoint + "/state.json";
  const nlohmann::json state = read_json_file(path);
  source.settings = settings_from_state(path, state);
  source.step = state["step"].get<int>();
  try {
    source.vocabulary = state.value("vocabulary", source.settings.model.vocab);
    source.special_tokens = state.value("special_tokens", nlohmann::json());
    const std::string tokenizer = state.value("tokenizer", "");
    const std::string beside = std::filesystem::exists(source.checkpoint + "/tokenizer.json") ? "" : "/..";
    if (!tokenizer.empty()) source.tokenizer = make_tokenizer(tokenizer, source.checkpoint + beside);
  } catch (const nlohmann::json::exception& e) {
    throw UserError(path + ": not a checkpoint's state: " + e.what());
  }
  resolve_settings(source.settings);
  if (source.vocabulary < 1 || source.vocabulary > source.settings.model.vocab)
    throw UserError(path + ": vocabulary " + std::to_string(source.vocabulary) + " does not fit the model's " +
                    std::to_string(source.settings.model.vocab));
  check_weights(source.settings.model, source.checkpoint);
  return source;
}

inline const Tokenizer& tokenizer_of(const Source& source) {
  if (!source.tokenizer)
    throw UserError(source.checkpoint + ": it does not name a tokenizer, so text and tokens cannot be told apart here");
  return *source.tokenizer;
}

inline std::string describe(const Source& source) {
  return source.checkpoint + ", step " + std::to_string(source.step);
}

// The flags that every command with a model has.
struct Place {
  std::string run, device = "auto", dtype = "auto";
  int threads = 0;
};

inline void add_run_flag(Flags& f, std::string& run) {
  f.add("run", run, "a name in runs/, or the path of a run or checkpoint")->type_name("NAME");
}

inline void add_place_flags(Flags& f, Place& place, bool any_device) {
  f.group("Model");
  add_run_flag(f, place.run);
  if (any_device) {
    f.add("device", place.device, "auto, cpu or cuda")->type_name("auto|cpu|cuda");
    f.add("dtype", place.dtype, "auto, fp32 or bf16 (cuda only)")->type_name("auto|fp32|bf16");
  }
  f.add("threads", place.threads, "CPU threads; 0: all cores");
}

inline void set_threads(int threads) {
  expect_positive("threads", threads, true);
  if (threads) omp_set_num_threads(threads);
}

// Progress on a terminal: a line that is written over and over, and taken away at the end.
struct ProgressLine {
  const char* what;
  size_t of;
  bool live = isatty(STDERR_FILENO);
  ~ProgressLine() {
    if (live) std::fprintf(stderr, "\r\033[K");
  }
  void operator()(size_t done) const {
    if (live) std::fprintf(stderr, "\r%s of %s %s\033[K", grouped(done).c_str(), grouped(of).c_str(), what);
  }
};

// The shards that match `pattern`; where it is empty, the run's validation data, whose pattern it becomes. UserError if
// they are not of the model's tokenizer and vocabulary.
inline Dataset open_data(const Source& source, std::string& pattern) {
  if (pattern.empty()) pattern = source.settings.val;
  if (pattern.empty()) throw UserError("--data: name shards; the model does not say what it was trained on");
  Dataset data(pattern);
  const std::string theirs = read_meta(pattern).tokenizer, ours = source.tokenizer ? source.tokenizer->name() : "";
  if (!theirs.empty() && !ours.empty() && theirs != ours)
    throw UserError("--data " + pattern + ": its tokenizer is \"" + theirs + "\", the model's is \"" + ours + "\"");
  data.check_tokens(source.vocabulary);
  return data;
}

// Makes the model for batches of B x T tokens, loads its weights and calls work(model).
template <class Work>
inline void with_model(const Place& place, const Source& source, int B, int T, Work work) {
  set_threads(place.threads);
  with_backend(place.device, place.dtype, [&](auto& backend, auto real) {
    Model<std::decay_t<decltype(backend)>, decltype(real)> model(backend, source.settings.model, B, T, false);
    load_weights(model, source.checkpoint);
    work(model);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Tokens and means

inline std::vector<int> prompt_tokens(const Tokenizer& tokenizer, const std::string& prompt) {
  std::vector<uint16_t> ids;
  tokenizer.encode(prompt.data(), prompt.size(), ids);
  std::vector<int> tokens = {tokenizer.end_of_text()};  // stands before every document in training
  tokens.insert(tokens.end(), ids.begin(), ids.end());
  return tokens;
}

// A mean with its standard error: the sample's standard deviation / sqrt(n); NaN for one number.
struct Mean {
  double sum = 0, squares = 0;
  size_t n = 0;
  void add(double x) { sum += x, squares += x * x, ++n; }
  double mean() const { return sum / double(n); }
  double error() const { return std::sqrt(std::max(0.0, squares / double(n) - mean() * mean()) / (double(n) - 1)); }
};
