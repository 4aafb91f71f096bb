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
#include "run/program.h"
#include "text/identity.h"
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
    const std::string trained_with = state.value("tokenizer_fingerprint", "");
    if (source.tokenizer && !trained_with.empty() && source.tokenizer->fingerprint() != trained_with)
      throw UserError(source.checkpoint + beside + "/tokenizer.json: not the tokenizer that the model was trained with (" +
                      source.tokenizer->fingerprint() + ", was " + trained_with + ")");
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

// A loss that is none is no result. UserError.
inline void expect_finite(double loss, const Source& source) {
  if (!std::isfinite(loss))
    throw UserError("--run: the loss of " + describe(source) + " is not finite: the model diverged while it trained");
}

// The flags that every command with a model has.
struct Place {
  std::string run, device = "auto", dtype = "auto";
  int threads = 0, context = 0, batch = 0;  // 0: all cores; the model's context; as memory allows
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

inline void add_context_flag(Flags& f, Place& place) {
  f.add("context", place.context, "positions that the model sees at most; 0: as many as it was trained with");
}
inline void add_batch_flag(Flags& f, Place& place, const std::string& what) {
  f.add("batch", place.batch, what + " worked on together; 0: as many as memory allows, up to 16");
}

// The positions that are worked with: --context, or the model's own.
inline int context_of(const Place& place, const Source& source) {
  const int own = source.settings.model.context;
  expect_positive("context", place.context, true);
  if (place.context > own)
    throw UserError("--context " + std::to_string(place.context) + ": the model was trained with " +
                    std::to_string(own) + " positions; eval length looks beyond them");
  return place.context ? place.context : own;
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
  check_same_tokenizer("--data " + pattern, identity_of(read_meta(pattern), pattern), "the model",
                       identity_of(source.tokenizer.get()));
  data.check_tokens(source.vocabulary);
  return data;
}

// Bytes of a model that is not trained, for batches of B x T tokens.
template <class Backend, class Real>
size_t bytes_without_training(const Config& c, int B, int T) {
  constexpr bool own_master = !std::is_same_v<Real, Acc<Real>>;
  size_t bytes = parameter_table(c).total * (sizeof(Real) + (own_master ? sizeof(Acc<Real>) : 0));
  Activations<Real> a;
  visit_activations<Backend>(c, size_t(B) * T, a, [&](const char*, size_t count, auto*& pointer) {
    bytes += (count * sizeof(*pointer) + 255) / 256 * 256;
  });
  return bytes + rope_table_bytes(std::max(T, c.context), c.rotary_dim);
}

// Makes the model for batches of up to `most` x T tokens, loads its weights and calls work(model). Without --batch, as
// large ones as fit into half of the memory that there is. UserError if one of a single window does not fit.
template <class Work>
void with_model(const Place& place, const Source& source, int most, int T, Work work) {
  expect_positive("batch", place.batch, true);
  use_threads(place.threads);
  with_backend(place.device, place.dtype, [&](auto& backend, auto real) {
    using Backend = std::decay_t<decltype(backend)>;
    const Config& c = source.settings.model;
    auto needed = [&](int B) { return bytes_without_training<Backend, decltype(real)>(c, B, T); };
    const size_t available = backend.available_memory();
    int B = std::min(place.batch ? place.batch : 16, most);
    while (!place.batch && B > 1 && needed(B) > available / 2) --B;
    if (needed(B) > available)
      throw UserError((B > 1 ? "--batch " + std::to_string(B) : "--run " + place.run) + ": not enough memory: " +
                      human_bytes(needed(B)) + " needed for " + std::to_string(B) + " x " + std::to_string(T) +
                      " positions, " + human_bytes(available) + " there; a smaller --batch or --context takes less");
    Model<Backend, decltype(real)> model(backend, c, B, T, false);
    load_weights(model, source.checkpoint);
    work(model);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Tokens and means

inline std::vector<int> prompt_tokens(const Tokenizer& tokenizer, const std::string& prompt) {
  std::vector<int> tokens = {tokenizer.end_of_text()};  // stands before every document in training
  tokenizer.encode(prompt.data(), prompt.size(), tokens);
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
