#pragma once
// eval choices, eval lambada: multiple choice and LAMBADA by log-likelihood, with the conventions of EleutherAI's
// lm-evaluation-harness 0.4.13 (api/model.py, `_encode_pair`; api/task.py; tasks/piqa, arc, winogrande, lambada).

#include <numeric>

#include "eval/source.h"
#include "text/input.h"

// How likely is `continuation` behind `context`? Both are ids.
struct Request {
  std::vector<int> context, continuation;
  size_t bytes;  // of the continuation's text, without the space before it
};

// A question: one request per choice, and which of them is right. With a single choice: will the model say it?
struct Question {
  std::vector<Request> choices;
  size_t gold = 0;
};

inline std::vector<int> encode_text(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<int> ids;
  tokenizer.encode(text.data(), text.size(), ids);
  return ids;
}

// Bytes of text, valid UTF-8, without white space at its end: what Python's str.rstrip() leaves.
inline size_t without_white_space(const std::string& text) {
  auto white = [](unsigned c) {
    return (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
  };
  size_t end = text.size();
  while (end > 0) {
    size_t begin = end - 1;
    while (begin > 0 && (text[begin] & 0xC0) == 0x80) begin--;
    size_t behind = begin;
    if (!white(next_character(text, behind))) break;
    end = begin;
  }
  return end;
}

// White space at the end of the context belongs to the continuation, whose tokens are those of both texts together
// behind as many as the context alone has. An empty context is the end of the text before.
inline Request make_request(const Tokenizer& tokenizer, const std::string& context, const std::string& continuation) {
  Request request;
  request.bytes = continuation.size();
  request.context = encode_text(tokenizer, context.substr(0, without_white_space(context)));
  const std::vector<int> both = encode_text(tokenizer, context + continuation);
  request.continuation.assign(both.begin() + long(std::min(request.context.size(), both.size())), both.end());
  if (request.context.empty()) request.context = {tokenizer.end_of_text()};
  return request;
}

// The questions of a file of JSON lines, plain or compressed; the first `limit`, or all (0). Forms of a line:
//     query, choices, gold                     choices behind one query (PIQA, ARC)
//     context_options, continuation, gold      one continuation behind several contexts (WinoGrande)
//     context, continuation                    one answer (LAMBADA)
//     text                                     the same: the last word is the answer
// `delimiter` stands before every continuation; where it begins a line, it takes the place of the query's own line end.
// UserError, naming file and line.
inline std::vector<Question> read_questions(const std::string& path, const Tokenizer& tokenizer,
                                            const std::string& delimiter, size_t limit) {
  std::string text;
  TextInput input(path);
  std::vector<char> buffer(1 << 18);
  while (input.next())
    while (const size_t n = input.read(buffer.data(), buffer.size())) text.append(buffer.data(), n);
  std::stringstream lines(text);
  std::vector<Question> questions;
  size_t number = 0;
  auto fail = [&](const std::string& what) {
    throw UserError(path + ", line " + std::to_string(number) + ": " + what);
  };
  for (std::string line; (limit == 0 || questions.size() < limit) && std::getline(lines, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    Question question;
    auto add = [&](std::string context, const std::string& continuation) {
      if (delimiter[0] == '\n') context.resize(context.find_last_not_of('\n') + 1);
      question.choices.push_back(make_request(tokenizer, context + delimiter, continuation));
    };
    int64_t gold = 0;
    try {
      const nlohmann::json json = nlohmann::json::parse(line);
      if (json.contains("choices")) {
        for (const nlohmann::json& choice : json["choices"])
          add(json.at("query").get<std::string>(), choice.get<std::string>());
      } else if (json.contains("context_options")) {
        for (const nlohmann::json& context : json["context_options"])
          add(context.get<std::string>(), json.at("continuation").get<std::string>());
      } else if (json.contains("text")) {
        const std::string whole = json["text"].get<std::string>();
        const size_t space = whole.rfind(' ');
        if (space == std::string::npos) fail("text of one word; the last word is to be said behind the others");
        add(whole.substr(0, space), whole.substr(space + 1));
      } else {
        add(json.at("context").get<std::string>(), json.at("continuation").get<std::string>());
      }
      if (question.choices.size() > 1) {
        if (!json.at("gold").is_number_integer()) fail("gold is " + json["gold"].dump() + ", not a number of a choice");
        gold = json["gold"].get<int64_t>();
      }
    } catch (const nlohmann::json::exception& e) {
      fail(e.what());
    }
    if (question.choices.empty()) fail("no choices there");
    if (gold < 0 || gold >= int64_t(question.choices.size()))
      fail("gold is " + std::to_string(gold) + "; the choices are 0 to " + std::to_string(question.choices.size() - 1));
    question.gold = size_t(gold);
    for (const Request& request : question.choices) {
      if (request.bytes == 0) fail("an answer is empty");
      if (request.continuation.empty()) fail("a token holds the end of a context and the whole answer behind it");
    }
    questions.push_back(std::move(question));
  }
  if (questions.empty()) throw UserError(path + ": no questions there");
  return questions;
}

// Takes away the questions with an answer of more than `context` tokens, which a model cannot score; says how many.
inline size_t take_too_long(std::vector<Question>& questions, size_t context) {
  const size_t before = questions.size();
  questions.erase(std::remove_if(questions.begin(), questions.end(),
                                 [&](const Question& question) {
                                   return std::any_of(question.choices.begin(), question.choices.end(),
                                                      [&](const Request& r) { return r.continuation.size() > context; });
                                 }),
                  questions.end());
  return before - questions.size();
}

struct Score {
  double log_likelihood = 0;  // nats, of all tokens of the continuation
  bool greedy = true;         // each of them is the likeliest
};

// The score of a continuation from the logits (n, V) of the positions before its tokens.
template <class Real>
Score score_tokens(const Real* logits, const int* tokens, int n, int V) {
  std::vector<Score> each(n);
#pragma omp parallel for
  for (int i = 0; i < n; ++i) {
    const Real* row = logits + size_t(i) * V;
    const double highest = *std::max_element(row, row + V);
    double sum = 0;
    for (int v = 0; v < V; ++v) sum += std::exp(double(row[v]) - highest);
    each[i] = {double(row[tokens[i]]) - highest - std::log(sum), row[tokens[i]] == highest};
  }
  Score all;
  for (const Score& one : each) all.log_likelihood += one.log_likelihood, all.greedy = all.greedy && one.greedy;
  return all;
}

// The scores of all requests, in their order; model.B at a time, the longest first. The model sees as many of a
// request's last tokens as it has positions; no continuation may be longer than that. progress(done) is called on the
// way.
template <class Backend, class Real, class Progress>
std::vector<Score> score(Model<Backend, Real>& model, const std::vector<const Request*>& requests, Progress progress) {
  const int V = model.config.vocab;
  std::vector<std::vector<int>> tokens;
  for (const Request* request : requests) {
    std::vector<int> all = request->context;
    all.insert(all.end(), request->continuation.begin(), request->continuation.end());
    if (all.size() > size_t(model.T) + 1) all.erase(all.begin(), all.end() - model.T - 1);
    tokens.push_back(std::move(all));
  }
  std::vector<size_t> order(requests.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return tokens[a].size() > tokens[b].size(); });
  std::vector<Score> scores(requests.size());
  std::vector<Acc<Real>> logits;
  for (size_t begin = 0; begin < order.size(); begin += size_t(model.B)) {
    const int count = int(std::min<size_t>(model.B, order.size() - begin));
    const int length = int(tokens[order[begin]].size()) - 1;  // the longest; shorter ones are filled up behind
    std::vector<int> inputs(size_t(count) * length, 0);
    for (int b = 0; b < count; ++b)
      std::copy(tokens[order[begin + b]].begin(), tokens[order[begin + b]].end() - 1, &inputs[size_t(b) * length]);
    model.forward(inputs.data(), count, length);
    for (int b = 0; b < count; ++b) {
      const std::vector<int>& all = tokens[order[begin + b]];
      const int n = int(requests[order[begin + b]]->continuation.size());
      logits.resize(size_t(n) * V);
      model.logits(logits.data(), b * length + int(all.size()) - 1, n);
      scores[order[begin + b]] = score_tokens(logits.data(), &all[all.size() - n], n, V);
    }
    progress(begin + count);
  }
  return scores;
}

// What the scores say about the questions.
struct Report {
  Mean accuracy;           // the right choice is the likeliest; a single one: each of its tokens is
  Mean accuracy_per_byte;  // the same for log-likelihoods divided by the bytes of the choice
  Mean bits_per_byte;      // of the right choice
  Mean log_likelihood;     // of the right choice, nats
};

inline Report report(const std::vector<Question>& questions, const std::vector<Score>& scores) {
  Report r;
  const Score* score = scores.data();
  for (const Question& question : questions) {
    size_t best = 0, best_per_byte = 0;
    auto per_byte = [&](size_t i) { return score[i].log_likelihood / double(question.choices[i].bytes); };
    for (size_t i = 1; i < question.choices.size(); ++i) {
      if (score[i].log_likelihood > score[best].log_likelihood) best = i;
      if (per_byte(i) > per_byte(best_per_byte)) best_per_byte = i;
    }
    r.accuracy.add(question.choices.size() > 1 ? best == question.gold : score[0].greedy);
    r.accuracy_per_byte.add(best_per_byte == question.gold);
    r.bits_per_byte.add(-per_byte(question.gold) / M_LN2);
    r.log_likelihood.add(score[question.gold].log_likelihood);
    score += question.choices.size();
  }
  return r;
}

// ---------------------------------------------------------------------------------------------------------------------

// choices and lambada, which differ in what they print.
inline void command_questions(const std::vector<std::string>& args, bool lambada) {
  Place place;
  std::string path, out, delimiter = " ";
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
  add_context_flag(f, place);
  add_batch_flag(f, place, "choices");
  f.add("out", out, "a .json file for the results, with the log-likelihood of every choice");
  f.parse(args);
  if (!std::filesystem::is_regular_file(path))
    throw UserError("--data \"" + path + "\": no such file; name one of JSON lines");
  expect_positive("limit", double(limit), true);
  for (size_t at; (at = delimiter.find("\\n")) != std::string::npos;) delimiter.replace(at, 2, "\n");
  const Source source = open_source(place.run);
  const size_t context = size_t(context_of(place, source));
  std::vector<Question> questions = read_questions(path, tokenizer_of(source), delimiter, size_t(limit));
  const size_t asked = questions.size(), too_long = take_too_long(questions, context);
  if (questions.empty())
    throw UserError("--data " + path + ": every question has an answer that is longer than the context of " +
                    std::to_string(context) + " tokens");
  std::vector<const Request*> requests;
  size_t longest = 0, cut = 0;
  for (const Question& question : questions) {
    if ((question.choices.size() == 1) != lambada)
      throw UserError("--data " + path + (lambada ? ": has several choices; eval choices is for them"
                                                  : ": has a question with one answer only; eval lambada is for it"));
    for (const Request& request : question.choices) {
      const size_t n = request.context.size() + request.continuation.size() - 1;
      requests.push_back(&request);
      longest = std::max(longest, std::min(n, context));
      cut += n > context;
    }
  }
  std::vector<Score> scores;
  with_model(place, source, int(std::min<size_t>(requests.size(), INT_MAX)), int(longest), [&](auto& model) {
    scores = score(model, requests, ProgressLine{"choices", requests.size()});
  });
  const Report r = report(questions, scores);
  expect_finite(r.log_likelihood.mean(), source);
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
  if (too_long)
    std::printf("  %s of %s questions were left out: an answer is longer than %zu tokens\n", grouped(too_long).c_str(),
                grouped(asked).c_str(), context);
  results["contexts_cut"] = cut;
  results["left_out"] = too_long;
  const Score* next = scores.data();
  for (const Question& question : questions) {
    nlohmann::ordered_json likelihoods;
    for (size_t i = 0; i < question.choices.size(); ++i) likelihoods.push_back(next++->log_likelihood);
    results["log_likelihoods"].push_back(likelihoods);
  }
  if (!out.empty()) write_text_file(out, results.dump() + "\n");
}

inline void command_choices(const std::vector<std::string>& args) { command_questions(args, false); }
inline void command_lambada(const std::vector<std::string>& args) { command_questions(args, true); }
