#pragma once
// eval logits, eval gradients: what a model computes for given tokens, in files for comparison with other programs.

#include "eval/source.h"

// .npy, version 1.0 (numpy.lib.format): magic, header length, a Python dictionary, padding to 64 bytes, the numbers.

inline std::string npy_header(size_t rows, size_t columns) {
  std::string dictionary = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows) + ", " +
                           std::to_string(columns) + "), }";
  dictionary.append(63 - (10 + dictionary.size()) % 64, ' ');
  dictionary += '\n';
  std::string header = "\x93NUMPY";
  header += {char(1), char(0), char(dictionary.size() & 255), char(dictionary.size() >> 8)};
  return header + dictionary;
}

// values (rows, columns).
inline void write_npy(const std::string& path, const std::vector<float>& values, size_t rows, size_t columns) {
  const std::string header = npy_header(rows, columns);
  write_file(path, {{header.data(), header.size()}, {values.data(), values.size() * sizeof(float)}});
}

// ---------------------------------------------------------------------------------------------------------------------

// Token ids from text: numbers between commas or white space.
inline std::vector<int> parse_ids(const std::string& flag, std::string text, int vocab) {
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

inline void command_logits(const std::vector<std::string>& args) {
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

inline void command_gradients(const std::vector<std::string>& args) {
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
  use_threads(place.threads);
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
