// eval: what a trained model knows, says and does.
//
//   eval loss       nats per token and bits per byte on a shard
//   eval sample     text from the model
//   eval trace      one token through partial RoPE, byte by byte
//   eval choices    multiple choice by log-likelihood
//   eval lambada    the last word of a passage
//   eval positions  loss by position in the window
//   eval length     the same beyond the training context
//   eval memory     every tensor's bytes for a configuration
//   eval export     a directory that Hugging Face's library loads
//   eval import     a run from such a directory
//   eval logits     token ids in, a .npy file of logits out
//   eval gradients  token ids in, a safetensors file of gradients out

#include <cstdio>
#include <filesystem>
#include <iostream>

#include "eval/questions.h"
#include "run/checkpoint.h"
#include "text/shards.h"
#include "eval/loss.h"
#include "run/flags.h"
#include "eval/generate.h"
#include "eval/huggingface.h"
#include "eval/trace_print.h"

namespace {

namespace fs = std::filesystem;

// A trained model on disk: what its state.json says.
struct Source {
  std::string checkpoint;  // directory
  Settings settings;
  int step = 0;
  std::unique_ptr<Tokenizer> tokenizer;  // null where the data did not say which
  int vocabulary = 0;                    // ids that mean something; the model's V may be padded beyond
};

// `run` is the name of a run (runs/NAME), or the path of a run's or a checkpoint's directory.
Source open_source(const std::string& run) {
  if (run.empty()) throw UserError("--run: say which model: a name in runs/, or the path of a run or checkpoint");
  Source source;
  source.checkpoint = locate_checkpoint(run);
  if (source.checkpoint.empty()) {
    std::vector<std::string> names;
    std::error_code none;
    for (const auto& entry : fs::directory_iterator("runs", none)) names.push_back(entry.path().filename().string());
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
    const std::string tokenizer = state.value("tokenizer", "");
    const std::string beside = fs::exists(source.checkpoint + "/tokenizer.json") ? "" : "/..";
    if (!tokenizer.empty()) source.tokenizer = make_tokenizer(tokenizer, source.checkpoint + beside);
  } catch (const nlohmann::json::exception& e) {
    throw UserError(path + ": not a checkpoint's state: " + e.what());
  }
  resolve(source.settings.model, NAN);
  if (source.vocabulary < 1 || source.vocabulary > source.settings.model.vocab)
    throw UserError(path + ": vocabulary " + std::to_string(source.vocabulary) + " does not fit the model's " +
                    std::to_string(source.settings.model.vocab));
  check_weights(source.settings.model, source.checkpoint);
  return source;
}

const Tokenizer& tokenizer_of(const Source& source) {
  if (!source.tokenizer)
    throw UserError(source.checkpoint + ": it does not name a tokenizer, so text and tokens cannot be told apart here");
  return *source.tokenizer;
}

std::string describe(const Source& source) { return source.checkpoint + ", step " + std::to_string(source.step); }

// The flags that every command with a model has.
struct Place {
  std::string run, device = "auto", dtype = "auto";
  int threads = 0;
};

void add_run_flag(Flags& f, std::string& run) {
  f.add("run", run, "a name in runs/, or the path of a run or checkpoint")->type_name("NAME");
}

void add_place_flags(Flags& f, Place& place, bool any_device) {
  f.group("Model");
  add_run_flag(f, place.run);
  if (any_device) {
    f.add("device", place.device, "auto, cpu or cuda")->type_name("auto|cpu|cuda");
    f.add("dtype", place.dtype, "auto, fp32 or bf16 (cuda only)")->type_name("auto|fp32|bf16");
  }
  f.add("threads", place.threads, "CPU threads; 0: all cores");
}

void set_threads(int threads) {
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
Dataset open_data(const Source& source, std::string& pattern) {
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
void with_model(const Place& place, const Source& source, int B, int T, Work work) {
  set_threads(place.threads);
  with_backend(place.device, place.dtype, [&](auto& backend, auto real) {
    Model<std::decay_t<decltype(backend)>, decltype(real)> model(backend, source.settings.model, B, T, false);
    load_weights(model, source.checkpoint);
    work(model);
  });
}

// ---------------------------------------------------------------------------------------------------------------------

void command_loss(const std::vector<std::string>& args) {
  Place place;
  std::string pattern;
  int64_t tokens = 0;
  int batch = 16;
  Flags f("Loss of a model on shards: every token but the first of each is predicted.", "eval loss");
  add_place_flags(f, place, true);
  f.group("Data");
  f.add("data", pattern, "shards, a glob pattern; default: the run's validation data");
  f.add("tokens", tokens, "how many to predict; 0: all");
  f.add("batch", batch, "windows worked on together");
  f.parse(args);
  expect_positive("tokens", double(tokens), true);
  expect_positive("batch", batch);
  const Source source = open_source(place.run);
  const Config& c = source.settings.model;
  const Dataset data = open_data(source, pattern);
  const Meta meta = read_meta(pattern);
  size_t most = 0;
  for (const Shard& shard : data.shards()) most += shard.size() - 1;
  if (most == 0) throw UserError("--data " + pattern + ": one token alone predicts nothing; two or more are needed");
  if (tokens) most = std::min(most, size_t(tokens));
  LossReport report;
  const int B = int(std::min<size_t>(batch, (most + c.context - 1) / c.context));
  with_model(place, source, B, c.context, [&](auto& model) {
    report = evaluate_loss(model, data, source.tokenizer.get(), size_t(tokens), ProgressLine{"tokens", most});
  });
  // The floor of the split that the shards are of, by their name.
  const std::string name = fs::path(pattern).filename().string();
  const double floor = name.find("train") != std::string::npos ? meta.train.entropy
                       : name.find("val") != std::string::npos ? meta.val.entropy
                                                               : NAN;
  std::printf("%s, on %s in windows of %d\n", describe(source).c_str(), pattern.c_str(), c.context);
  std::printf("  tokens predicted   %s\n", grouped(report.tokens).c_str());
  std::printf("  loss               %.4f nats per token", report.loss());
  if (!std::isnan(floor))
    std::printf("   (lowest that any model can reach on the whole: %.4f; this is %.1f %% above)", floor,
                100 * (report.loss() / floor - 1));
  std::printf("\n  perplexity         %.4f\n", report.perplexity());
  if (report.bytes)
    std::printf("  bits per byte      %.4f   (over %s bytes of text)\n", report.bits_per_byte(),
                grouped(report.bytes).c_str());
}

// ---------------------------------------------------------------------------------------------------------------------

void write_text(const std::string& text, bool terminal) {
  const std::string shown = terminal ? printable(text) : text;
  std::fwrite(shown.data(), 1, shown.size(), stdout);
  std::fflush(stdout);
}

std::vector<int> prompt_tokens(const Tokenizer& tokenizer, const std::string& prompt) {
  std::vector<uint16_t> ids;
  tokenizer.encode(prompt.data(), prompt.size(), ids);
  std::vector<int> tokens = {tokenizer.end_of_text()};  // stands before every document in training
  tokens.insert(tokens.end(), ids.begin(), ids.end());
  return tokens;
}

void command_sample(const std::vector<std::string>& args) {
  Place place;
  std::string prompt;
  int tokens = 400, top_k = 0, count = 1;
  double temperature = 0.8;
  uint64_t seed = 1;
  Flags f("Text from a model.", "eval sample");
  add_place_flags(f, place, true);
  f.group("Text");
  f.add("prompt", prompt, "how the text begins");
  f.add("tokens", tokens, "most tokens to add; the end of a document ends it before");
  f.add("temperature", temperature, "divides the logits; 0: always the likeliest token");
  f.add("top-k", top_k, "choose among the k likeliest; 0: all");
  f.add("seed", seed, "of the random choices; sample i uses seed + i");
  f.add("count", count, "samples");
  f.parse(args);
  expect_positive("tokens", tokens);
  expect_positive("temperature", temperature, true);
  expect_positive("top-k", top_k, true);
  expect_positive("count", count);
  const Source source = open_source(place.run);
  const Tokenizer& tokenizer = tokenizer_of(source);
  const bool terminal = isatty(STDOUT_FILENO);
  with_model(place, source, 1, source.settings.model.context, [&](auto& model) {
    for (int i = 0; i < count; ++i) {
      if (count > 1) std::printf("%s--- sample %d, seed %llu\n", i ? "\n" : "", i + 1, (unsigned long long)(seed + i));
      std::vector<int> text = prompt_tokens(tokenizer, prompt);
      write_text(prompt, terminal);
      char last = '\n';
      generate(model, text, tokens, temperature, top_k, seed + i, tokenizer.end_of_text(), source.vocabulary,
               [&](int token) {
                 std::string bytes;
                 tokenizer.decode(token, bytes);
                 write_text(bytes, terminal);
                 if (!bytes.empty()) last = bytes.back();
               });
      if (last != '\n') std::printf("\n");
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------

// Token ids from text: numbers between commas or white space.
std::vector<int> parse_ids(const std::string& flag, std::string text, int vocab) {
  std::replace(text.begin(), text.end(), ',', ' ');
  std::stringstream words(text);
  std::vector<int> ids;
  for (std::string word; words >> word;) {
    char* end = nullptr;
    const long id = std::strtol(word.c_str(), &end, 10);
    if (*end || id < 0 || id >= vocab)
      throw UserError(flag + ": \"" + word + "\" is not a token id; the model's are 0 to " + std::to_string(vocab - 1));
    ids.push_back(int(id));
  }
  if (ids.empty()) throw UserError(flag + ": no token ids there; one or more are needed, such as 256,72,105");
  return ids;
}

void command_logits(const std::vector<std::string>& args) {
  Place place;
  std::string tokens, input, out = "logits.npy";
  Flags f("Logits of a model for given tokens, for comparison with other programs.", "eval logits");
  add_place_flags(f, place, true);
  f.group("Tokens");
  f.add("tokens", tokens, "ids, such as 256,72,105");
  f.add("input", input, "a text file of ids instead");
  f.add("out", out, "the .npy file to write: float32 (tokens, vocabulary)");
  f.parse(args);
  if (tokens.empty() == input.empty())
    throw UserError("--tokens or --input: give the token ids, in one of the two ways");
  if (!input.empty()) {
    std::ifstream file(input);
    if (!file) throw UserError("--input " + input + ": cannot read: " + std::strerror(errno));
    tokens.assign(std::istreambuf_iterator<char>(file), {});
  }
  const Source source = open_source(place.run);
  const int V = source.settings.model.vocab;
  const std::vector<int> ids = parse_ids(input.empty() ? "--tokens" : "--input " + input, tokens, V);
  const int T = int(ids.size());
  with_model(place, source, 1, T, [&](auto& model) {
    std::vector<float> logits(size_t(T) * V);
    model.forward(ids.data(), 1, T);
    model.logits(logits.data(), T, T);
    write_npy(out, logits, T, V);
    std::printf("%s: float32 (%d, %d) from %s\n", out.c_str(), T, V, describe(source).c_str());
    if (V > source.vocabulary) std::printf("The last %d columns are padding, not tokens.\n", V - source.vocabulary);
    if (T > source.settings.model.context)
      std::printf("Positions from %d on are beyond the training context.\n", source.settings.model.context);
  });
}

// ---------------------------------------------------------------------------------------------------------------------

void command_gradients(const std::vector<std::string>& args) {
  Place place;
  std::string tokens, out = "gradients.safetensors";
  Flags f("Gradients of the loss over given tokens, for comparison with other programs.", "eval gradients");
  add_place_flags(f, place, true);
  f.group("Tokens");
  f.add("tokens", tokens, "ids, such as 256,72,105; every one but the first is predicted");
  f.add("out", out, "the safetensors file to write: fp32, the checkpoint's names and shapes");
  f.parse(args);
  const Source source = open_source(place.run);
  const std::vector<int> ids = parse_ids("--tokens", tokens, source.settings.model.vocab);
  const int T = int(ids.size()) - 1;
  if (T < 1) throw UserError("--tokens: one token alone predicts nothing; two or more are needed");
  set_threads(place.threads);
  with_backend(place.device, place.dtype, [&](auto& backend, auto real) {
    Model<std::decay_t<decltype(backend)>, decltype(real)> model(backend, source.settings.model, 1, T, true);
    load_weights(model, source.checkpoint);
    model.zero_gradients();
    model.forward(ids.data(), 1, T);
    model.backward(ids.data() + 1, 1, T, 1.0 / T, 0);
    typename std::decay_t<decltype(model)>::StepResult result;
    backend.download(&result, model.result, sizeof result);
    std::vector<float> gradients(model.table.total);
    backend.download(gradients.data(), model.gradients_flat, gradients.size() * sizeof(float));
    write_safetensors(out, named(model.table, gradients.data(), ""));
    std::printf("%s: gradients of the mean loss, %.7f nats per token, %s\n", out.c_str(), result.loss / T,
                describe(source).c_str());
  });
}

// ---------------------------------------------------------------------------------------------------------------------

// choices and lambada, which differ in what they print.
void command_questions(const std::vector<std::string>& args, bool lambada) {
  Place place;
  std::string path, out, delimiter = " ";
  int batch = 16;
  int64_t limit = 0;
  Flags f(lambada ? "LAMBADA: will the model say the last word? Accuracy and perplexity."
                  : "Multiple choice by log-likelihood: accuracy, the same per byte, bits per byte of the answer.",
          lambada ? "eval lambada" : "eval choices");
  add_place_flags(f, place, true);
  f.group("Questions");
  f.add("data", path, lambada ? "JSON lines (or .gz, .xz, .zst): context, continuation; or text"
                              : "JSON lines (or .gz, .xz, .zst): query, choices, gold; or WinoGrande's form");
  if (!lambada) f.add("delimiter", delimiter, "stands before every choice; for PIQA and ARC \"\\nAnswer: \"");
  f.add("limit", limit, "only the first so many questions; 0: all");
  f.add("batch", batch, "choices worked on together");
  f.add("out", out, "a .json file for the results, with the log-likelihood of every choice");
  f.parse(args);
  if (!fs::is_regular_file(path)) throw UserError("--data \"" + path + "\": no such file; name one of JSON lines");
  expect_positive("limit", double(limit), true);
  expect_positive("batch", batch);
  for (size_t at; (at = delimiter.find("\\n")) != std::string::npos;) delimiter.replace(at, 2, "\n");
  const Source source = open_source(place.run);
  const std::vector<Question> questions = read_questions(path, tokenizer_of(source), delimiter, size_t(limit));
  std::vector<const Request*> requests;
  size_t longest = 0, context = size_t(source.settings.model.context), cut = 0;
  for (const Question& question : questions) {
    if ((question.choices.size() == 1) != lambada)
      throw UserError("--data " + path + (lambada ? ": has several choices; eval choices is for them"
                                                  : ": has a question with one answer only; eval lambada is for it"));
    for (const Request& request : question.choices) {
      const size_t n = request.context.size() + request.continuation.size() - 1;
      if (request.continuation.size() > context)
        throw UserError("--data " + path + ": an answer of " + std::to_string(request.continuation.size()) +
                        " tokens is longer than the model's context of " + std::to_string(context) +
                        "; leave it out, or take another model");
      requests.push_back(&request);
      longest = std::max(longest, std::min(n, context));
      cut += n > context;
    }
  }
  std::vector<Score> scores;
  with_model(place, source, int(std::min<size_t>(batch, requests.size())), int(longest), [&](auto& model) {
    scores = score(model, requests, ProgressLine{"choices", requests.size()});
  });
  const Report r = report(questions, scores);
  nlohmann::ordered_json results = {{"data", path}, {"model", describe(source)}, {"questions", questions.size()}};
  std::printf("%s, on %s: %s questions\n", describe(source).c_str(), path.c_str(), grouped(questions.size()).c_str());
  auto row = [&](const char* name, const std::string& key, double value, double error) {
    std::printf("  %-28s %10.4f +- %.4f\n", name, value, error);
    results[key] = value;
    results[key + "_stderr"] = error;
  };
  row("accuracy", "accuracy", r.accuracy.mean(), r.accuracy.error());
  if (lambada) {
    const double perplexity = std::exp(-r.log_likelihood.mean());
    row("perplexity of the last word", "perplexity", perplexity, perplexity * r.log_likelihood.error());
  } else {
    row("accuracy, per byte", "accuracy_per_byte", r.accuracy_per_byte.mean(), r.accuracy_per_byte.error());
  }
  row("bits per byte, right answer", "bits_per_byte", r.bits_per_byte.mean(), r.bits_per_byte.error());
  if (cut) std::printf("  %s were longer than %zu tokens and lost their beginning\n", grouped(cut).c_str(), context);
  results["contexts_cut"] = cut;
  const Score* next = scores.data();
  for (const Question& question : questions) {
    nlohmann::ordered_json likelihoods;
    for (size_t i = 0; i < question.choices.size(); ++i) likelihoods.push_back(next++->log_likelihood);
    results["log_likelihoods"].push_back(likelihoods);
  }
  if (!out.empty()) write_text_file(out, results.dump() + "\n");
}

// positions and length: the loss by position, at the training context or at several times it.
void command_by_position(const std::vector<std::string>& args, const std::vector<int>& lengths,
                         const std::string& description, const std::string& program) {
  Place place;
  std::string pattern, out;
  int64_t tokens = 1 << 18;
  int batch = 8;
  Flags f(description, program);
  add_place_flags(f, place, true);
  f.group("Data");
  f.add("data", pattern, "shards, a glob pattern; default: the run's validation data");
  f.add("tokens", tokens, "about how many to predict, at each length");
  f.add("batch", batch, "windows of the training context worked on together; fewer longer ones");
  f.add("out", out, "a .csv file of the table; scripts/plot_positions.py draws it");
  f.parse(args);
  expect_positive("tokens", double(tokens));
  expect_positive("batch", batch);
  const Source source = open_source(place.run);
  const int context = source.settings.model.context;
  const Dataset data = open_data(source, pattern);
  data.windows(context * lengths.back());  // a shard that is too short is refused now
  std::string csv = "context,begin,end,windows,loss,stderr\n";
  std::printf("%s, on %s, trained at %d positions\n", describe(source).c_str(), pattern.c_str(), context);
  for (int times : lengths) {
    const int T = context * times;
    std::vector<PositionBin> bins;
    with_model(place, source, std::max(1, batch / times), T, [&](auto& model) {
      bins = loss_by_position(model, data, size_t(tokens), ProgressLine{"tokens", size_t(tokens)});
    });
    std::printf("\n  %s windows of %d\n", grouped(bins[0].loss.n).c_str(), T);
    std::printf("  %-15s %s\n", "positions", "nats per token");
    double all = 0;
    for (const PositionBin& bin : bins) {
      const double mean = bin.loss.mean(), error = bin.loss.error();
      const std::string last = bin.end - bin.begin > 1 ? " to " + std::to_string(bin.end - 1) : "";
      std::printf("  %-15s %.4f +- %.4f%s\n", (std::to_string(bin.begin) + last).c_str(), mean, error,
                  bin.begin >= context ? "   beyond the training context" : "");
      for (size_t n : {size_t(T), size_t(bin.begin), size_t(bin.end), bin.loss.n}) csv += std::to_string(n) + ",";
      csv += format("%.6f", mean) + "," + format("%.6f", error) + "\n";
      all += mean * (bin.end - bin.begin) / T;
    }
    std::printf("  %-15s %.4f\n", "all", all);
  }
  if (!out.empty()) write_text_file(out, csv);
}

// ---------------------------------------------------------------------------------------------------------------------

void command_export(const std::vector<std::string>& args) {
  std::string run, out;
  bool with_code = false;
  Flags f("Writes a model as a directory that Hugging Face's AutoModelForCausalLM loads.", "eval export");
  f.group("Model");
  add_run_flag(f, run);
  f.add("out", out, "the directory to make");
  f.add("with-code", with_code, "for any model: our own class goes with it; load with trust_remote_code=True");
  f.parse(args);
  if (out.empty()) throw UserError("--out: name the directory to write to");
  const Source source = open_source(run);
  const std::string type =
      export_model(out, source.settings.model, source.checkpoint, source.tokenizer.get(), with_code);
  std::printf("%s: %s from %s%s\n", out.c_str(), type.c_str(), describe(source).c_str(),
              source.tokenizer ? "" : "; its tokenizer is not known, so there is none in it");
}

void command_import(const std::vector<std::string>& args) {
  std::string run, from;
  Flags f("Reads a Hugging Face model of a class that this project knows into a run.", "eval import");
  f.group("Model");
  f.add("from", from, "directory with config.json and model.safetensors");
  f.add("run", run, "name of the run to make in runs/")->type_name("NAME");
  f.parse(args);
  if (from.empty()) throw UserError("--from: name the directory to read");
  if (run.empty()) throw UserError("--run: name the run to make");
  Settings s = import_model(from, "runs/" + run);
  const Config& c = s.model;
  std::printf("runs/%s: %d layers, width %d, %.2f M parameters; RoPE turns %d of %d channels\n", run.c_str(), c.layers,
              c.width, double(parameter_table(c).parameters) * 1e-6, c.rotary_dim, c.head_size);
}

// ---------------------------------------------------------------------------------------------------------------------

int command_trace(const std::vector<std::string>& args) {
  Place place;
  std::string prompt;
  int token = -1, layer = 0, head = 0, against = -1;
  bool all = false, json = false;
  Flags f("One token, layer and head through partial RoPE, byte by byte (on the CPU, in fp32).", "eval trace");
  add_place_flags(f, place, false);
  f.group("Where to look");
  f.add("prompt", prompt, "the text");
  f.add("token", token, "position to follow; 0 is the end-of-text token before the prompt, -1 the last");
  f.add("layer", layer, "from 0");
  f.add("head", head, "query head, from 0");
  f.add("against", against, "position of a key to meet; -1: the one that the query attends to most");
  f.add("all", all, "show every pair, channel and key");
  f.add("json", json, "print the numbers as one JSON object instead");
  f.parse(args);
  if (prompt.empty()) throw UserError("--prompt: give a text to trace, such as --prompt \"Once upon a time\"");
  const Source source = open_source(place.run);
  const std::vector<int> tokens = prompt_tokens(tokenizer_of(source), prompt);
  const int T = int(tokens.size()), context = source.settings.model.context;
  if (T > context)
    throw UserError("--prompt: " + std::to_string(T - 1) + " tokens; the model's context holds " +
                    std::to_string(context - 1) + " behind the end-of-text token");
  if (token < -1)
    throw UserError("--token " + std::to_string(token) + ": must lie between 0 and " + std::to_string(T - 1) +
                    ", or be -1");
  if (against < -1)
    throw UserError("--against " + std::to_string(against) + ": must be a position up to that of --token, or -1");
  set_threads(place.threads);
  Cpu backend;
  Config config = source.settings.model;
  config.recompute = false;  // the trace looks into every block
  Model<Cpu, float> model(backend, config, 1, T, false);
  load_weights(model, source.checkpoint);
  const Trace trace = trace_head(model, tokens, token < 0 ? T - 1 : token, layer, head, against);
  const char* no_colour = std::getenv("NO_COLOR");
  const bool colour = isatty(STDOUT_FILENO) && !(no_colour && *no_colour);
  if (json)
    std::printf("%s\n", trace_json(trace, model.config, tokens, source.tokenizer.get()).dump().c_str());
  else
    std::printf("%s\n%s", describe(source).c_str(),
                print_trace(trace, model.config, tokens, source.tokenizer.get(), colour, all).c_str());
  if (trace.agrees()) return 0;
  std::fflush(stdout);
  std::fprintf(stderr, "error: the trace does not agree with the model's buffers (lines marked WRONG above)\n");
  return 1;
}

// ---------------------------------------------------------------------------------------------------------------------

std::vector<double> parse_list(const std::string& flag, const std::string& text) {
  std::stringstream words(text);
  std::vector<double> values;
  for (std::string word; std::getline(words, word, ',');) {
    char* end = nullptr;
    const double value = std::strtod(word.c_str(), &end);
    if (word.empty() || *end || !std::isfinite(value))
      throw UserError(flag + " " + text + ": \"" + word + "\" is not a number");
    values.push_back(value);
  }
  if (values.empty()) throw UserError(flag + ": give one number or more, with commas between");
  return values;
}

std::string shape_text(const std::vector<size_t>& shape) {
  std::string text;
  for (size_t n : shape) text += (text.empty() ? "(" : ", ") + std::to_string(n);
  return text + ")";
}

template <class Backend, class Real>
void print_memory(const Config& c, int B, bool each, const std::string& device) {
  const size_t N = size_t(B) * c.context;
  const ParameterTable table = parameter_table(c);
  const MemoryReport report = memory_report<Backend, Real>(c, B, c.context);
  const bool own_master = !std::is_same_v<Real, Acc<Real>>;
  const size_t weight = sizeof(Real), optimizer = sizeof(Acc<Real>) * (own_master ? 3 : 2);
  const char* dtype = sizeof(Real) == 2 ? "bf16" : "fp32";

  std::printf("Parameters: %s numbers in %zu tensors\n", grouped(table.parameters).c_str(), table.rows.size());
  std::printf("  weights %s, gradients fp32, optimiser fp32: AdamW's m and v%s\n\n", dtype,
              own_master ? " and the master weights" : "");
  std::printf("  %-25s %-16s %3s %13s %11s %11s %12s\n", "tensor", "shape", "x", "bytes each", "weights", "gradients",
              "optimiser");
  for (const MemoryRow& row : parameter_rows(c, each)) {
    const size_t n = row.elements * row.copies;
    std::printf("  %-25s %-16s %3zu %13s %11s %11s %12s\n", row.name.c_str(), shape_text(row.shape).c_str(), row.copies,
                grouped(row.elements * weight).c_str(), human_bytes(n * weight).c_str(),
                human_bytes(n * sizeof(float)).c_str(), human_bytes(n * optimizer).c_str());
  }
  std::printf("\nActivations: %d x %d = %s tokens, %s; the gradients (d...) are one set, used again by every layer\n\n",
              B, c.context, grouped(N).c_str(), dtype);
  std::printf("  %-25s %16s %5s %3s %17s %12s\n", "tensor", "numbers", "bytes", "x", "bytes each", "all");
  size_t listed = 0;
  for (const MemoryRow& row : activation_rows<Backend, Real>(c, B, c.context)) {
    const size_t one = row.elements * row.element_bytes;
    listed += one * row.copies;
    std::printf("  %-25s %16s %5zu %3zu %17s %12s\n", row.name.c_str(), grouped(row.elements).c_str(),
                row.element_bytes, row.copies, grouped(one).c_str(), human_bytes(one * row.copies).c_str());
  }
  std::printf("\nIn all, for training on the %s\n\n", device == "cuda" ? "GPU" : "CPU");
  auto total = [&](const char* name, size_t bytes) {
    std::printf("  %-25s %16s %17s bytes %5.1f %%\n", name, human_bytes(bytes).c_str(), grouped(bytes).c_str(),
                100.0 * double(bytes) / double(report.total()));
  };
  total("parameters", report.parameters);
  total("gradients", report.gradients);
  total("optimiser", report.optimizer);
  total("activations", report.activations);
  total("RoPE table", report.rope_table);
  total("total", report.total());
  const size_t gaps = report.parameters + report.gradients + report.optimizer + report.activations - listed -
                      table.parameters * (weight + sizeof(Acc<Real>) + optimizer);
  if (gaps)
    std::printf("  (%s of it are gaps: tensors start at multiples of 256 bytes, or of 64 numbers)\n",
                human_bytes(gaps).c_str());
}

void command_memory(const std::vector<std::string>& args) {
  Settings s;
  std::string preset = "nano", run, device = "auto", dtype = "auto", fractions = "0,2,0.1,0.25,0.5,0.75,1",
              contexts = "2048,131072,1048576,10000000";
  bool each = false;
  auto parse = [&](Settings& settings) {
    Flags f("Every tensor's bytes for a configuration; nothing is allocated.", "eval memory");
    f.group("Configuration");
    f.add("preset", preset, "what the flags below start from")->type_name("NAME");
    add_run_flag(f, run);
    f.add("batch", settings.batch, "windows in a micro-batch");
    f.add("recompute", settings.model.recompute, "as in train");
    f.add("device", device, "cpu or cuda; auto: cuda for bf16")->type_name("auto|cpu|cuda");
    f.add("dtype", dtype, "fp32 or bf16; auto: fp32, on cuda bf16")->type_name("auto|fp32|bf16");
    f.add("all", each, "a row for every parameter tensor of every layer");
    f.group("RoPE table");
    f.add("fractions", fractions, "shares of the head, up to 1; above 1 numbers of channels");
    f.add("contexts", contexts, "positions");
    add_model_flags(f, settings.model, settings.rotary_fraction);
    f.parse(args);
    settle_rotary(f, settings.model, settings.rotary_fraction);
  };
  Settings unused;
  parse(unused);  // for --preset and --run
  if (run.empty()) apply_flags(s, preset_flags(preset));
  else s = open_source(run).settings;
  parse(s);
  Config& c = s.model;
  if (c.vocab == 0) c.vocab = 264;  // the byte tokenizer's 257, rounded up as train does
  resolve(c, s.rotary_fraction);
  expect_positive("batch", s.batch);
  check_device_and_dtype(device, dtype);
  if (device == "auto") device = dtype == "bf16" ? "cuda" : "cpu";
  if (dtype == "auto") dtype = device == "cuda" ? "bf16" : "fp32";
  if (device == "cpu" && dtype == "bf16")
    throw UserError("--dtype bf16: the CPU works in fp32; use --dtype fp32 or --device cuda");

  std::vector<size_t> positions;
  for (double value : parse_list("--contexts", contexts)) {
    if (!(value >= 1 && value <= 1e12 && value == std::floor(value)))
      throw UserError("--contexts " + contexts + ": must be whole numbers from 1 to 10^12");
    positions.push_back(size_t(value));
  }
  std::vector<std::pair<std::string, int>> rotated;  // name, R
  for (double share : parse_list("--fractions", fractions)) {
    const int R = share > 1 ? int(std::min(share, 1e6)) : rotary_dim_from_fraction(share, c.head_size);
    if (share > 1 && (share != R || R % 2 || R > c.head_size))
      throw UserError("--fractions " + fractions + ": " + format("%g", share) +
                      " must be a share up to 1, or an even number of channels up to " + std::to_string(c.head_size));
    rotated.push_back({share > 1 ? std::to_string(R) + " channels" : format("%g %%", 100 * share), R});
  }

  std::printf("%s: %d layers, width %d, %d query and %d key/value heads of %d, MLP %d, context %d, vocabulary %d%s\n",
              run.empty() ? preset.c_str() : run.c_str(), c.layers, c.width, c.heads, c.kv_heads, c.head_size,
              c.mlp_hidden, c.context, c.vocab, c.tied ? ", tied" : "");
  std::printf("RoPE turns %d of %d channels (%.4g %%)\n\n", c.rotary_dim, c.head_size,
              100.0 * c.rotary_dim / c.head_size);
  if (device == "cpu") print_memory<Cpu, float>(c, s.batch, each, device);
  else if (dtype == "fp32") print_memory<AnyGpu, float>(c, s.batch, each, device);
  else print_memory<AnyGpu, AnyBf16>(c, s.batch, each, device);

  std::printf(
      "\nRoPE table: positions x R/2 pairs x 2 (cos, sin) x 4 bytes; HS = %d, the same for all layers and heads\n\n  "
      "%-13s %4s",
      c.head_size, "rotated", "R");
  for (size_t n : positions) std::printf(" %18s", (grouped(n) + " pos.").c_str());
  std::printf("\n");
  for (const auto& [name, R] : rotated) {
    std::printf("  %-13s %4d", name.c_str(), R);
    for (size_t n : positions) std::printf(" %18s", human_bytes(rope_table_bytes(n, R)).c_str());
    std::printf("\n  %-13s %4s", "", "");
    for (size_t n : positions) std::printf(" %18s", grouped(rope_table_bytes(n, R)).c_str());
    std::printf("\n");
  }
}

// ---------------------------------------------------------------------------------------------------------------------

const char* const kHelp =
    "What a trained model knows, says and does.\n"
    "Usage: eval COMMAND [flags]\n\n"
    "  loss       nats per token and bits per byte on a shard\n"
    "  sample     text from the model\n"
    "  trace      one token through partial RoPE, byte by byte\n"
    "  choices    multiple choice by log-likelihood\n"
    "  lambada    the last word of a passage\n"
    "  positions  loss by position in the window\n"
    "  length     the same at 1, 2, 4 and 8 times the training context\n"
    "  memory     every tensor's bytes for a configuration\n"
    "  export     a directory that Hugging Face's library loads\n"
    "  import     a run from such a directory\n"
    "  logits     token ids in, a .npy file of logits out\n"
    "  gradients  token ids in, a safetensors file of gradients out\n\n"
    "eval COMMAND --help lists the flags of a command.\n";

int command(const std::vector<std::string>& args) {
  using Command = std::function<int(const std::vector<std::string>&)>;
  auto always_0 = [](void (*work)(const std::vector<std::string>&)) {
    return Command([=](const std::vector<std::string>& rest) { return work(rest), 0; });
  };
  using Args = std::vector<std::string>;
  const std::vector<std::pair<std::string, Command>> commands = {
      {"loss", always_0(command_loss)},
      {"sample", always_0(command_sample)},
      {"trace", command_trace},
      {"choices", always_0([](const Args& rest) { command_questions(rest, false); })},
      {"lambada", always_0([](const Args& rest) { command_questions(rest, true); })},
      {"positions", always_0([](const Args& rest) {
         command_by_position(rest, {1}, "Loss by position in the training window.", "eval positions");
       })},
      {"length", always_0([](const Args& rest) {
         command_by_position(rest, {1, 2, 4, 8}, "Loss at 1, 2, 4 and 8 times the training context, by position.",
                             "eval length");
       })},
      {"memory", always_0(command_memory)},
      {"export", always_0(command_export)},
      {"import", always_0(command_import)},
      {"logits", always_0(command_logits)},
      {"gradients", always_0(command_gradients)},
  };
  std::vector<std::string> names;
  std::string all;
  for (const auto& [name, work] : commands) names.push_back(name), all += (all.empty() ? "" : ", ") + name;
  if (args.empty()) throw UserError("no command; there are: " + all + " (eval --help)");
  const std::string& name = args[0];
  if (name == "--help" || name == "-h" || name == "help") return std::fputs(kHelp, stdout), 0;
  for (const auto& [known, work] : commands)
    if (name == known) return work({args.begin() + 1, args.end()});
  const std::string guess = closest(name, names);
  throw UserError(name + ": no such command; " + (guess.empty() ? "there are: " + all : "did you mean " + guess + "?"));
}

}  // namespace

int main(int argc, char** argv) {
  return exit_code_of([&] { return command({argv + 1, argv + argc}); });
}
