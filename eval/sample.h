#pragma once
// eval sample: text from the model.

#include "eval/generate.h"
#include "eval/source.h"

inline void write_text(const std::string& text, bool terminal) {
  const std::string shown = terminal ? printable(text) : text;
  std::fwrite(shown.data(), 1, shown.size(), stdout);
  std::fflush(stdout);
}

inline void command_sample(const std::vector<std::string>& args) {
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
  add_context_flag(f, place);
  f.parse(args);
  expect_positive("tokens", tokens);
  expect_positive("temperature", temperature, true);
  expect_positive("top-k", top_k, true);
  expect_positive("count", count);
  const Source source = open_source(place.run);
  const Tokenizer& tokenizer = tokenizer_of(source);
  const bool terminal = isatty(STDOUT_FILENO);
  const std::vector<int> beginning = prompt_tokens(tokenizer, prompt);
  const int T = int(std::min<size_t>(context_of(place, source), beginning.size() + size_t(tokens)));
  with_model(place, source, 1, T, [&](auto& model) {
    for (int i = 0; i < count; ++i) {
      if (count > 1) std::printf("%s--- sample %d, seed %llu\n", i ? "\n" : "", i + 1, (unsigned long long)(seed + i));
      std::vector<int> text = beginning;
      std::string bytes;  // of a character that is not whole yet
      write_text(prompt, terminal);
      char last = '\n';
      generate(model, text, tokens, temperature, top_k, seed + i, source.stop_tokens(), source.vocabulary,
               [&](int token) {
                 tokenizer.decode(token, bytes);
                 const std::string whole = take_utf8(bytes, false);
                 write_text(whole, terminal);
                 if (!whole.empty()) last = whole.back();
               });
      write_text(take_utf8(bytes, true), terminal);
      if (last != '\n') std::printf("\n");
    }
  });
}
