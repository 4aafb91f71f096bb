#pragma once
// Text from a model: one token after the other, each fed back to it.
//
// Keys and values of earlier positions stay where the forward pass left them, in the activations: Model::forward() with
// first > 0 works on the new position only and attends to all of them. That is the key/value cache.

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "model.h"

// Chooses a token id below `vocabulary` from logits (at least vocabulary; padding behind it is never chosen) with a
// number u in [0, 1): from softmax(logits / temperature), restricted to the top_k largest (0: all). Temperature 0 takes
// the largest. Equal logits rank by id. UserError if the logits are not finite.
template <class T>
int sample_token(const T* logits, int vocabulary, double temperature, int top_k, double u) {
  std::vector<int> ids(vocabulary);
  std::iota(ids.begin(), ids.end(), 0);
  for (int id : ids)
    if (!std::isfinite(double(logits[id])))
      throw UserError("the model's logits are not finite; it diverged while it trained");
  auto ahead = [&](int a, int b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
  if (temperature == 0) return *std::min_element(ids.begin(), ids.end(), ahead);
  if (top_k > 0 && top_k < vocabulary) {
    std::nth_element(ids.begin(), ids.begin() + (top_k - 1), ids.end(), ahead);
    ids.resize(top_k);
    std::sort(ids.begin(), ids.end());  // the order of the sum below must not depend on the library's algorithm
  }
  double highest = -INFINITY, sum = 0;
  for (int id : ids) highest = std::max(highest, double(logits[id]));
  std::vector<double> up_to(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) up_to[i] = sum += std::exp((logits[ids[i]] - highest) / temperature);
  const size_t chosen = std::upper_bound(up_to.begin(), up_to.end(), u * sum) - up_to.begin();
  return ids[std::min(chosen, ids.size() - 1)];
}

// Appends up to `count` tokens to `tokens` (the prompt, at least one token). emit(token) is called with each; one of
// stop_tokens ends the text, is appended but not emitted. Token n is drawn with a random number that depends
// on (seed, n) alone. When the model's T positions are full, the last half of them is kept and computed again.
template <class Backend, class Real, class Emit>
void generate(Model<Backend, Real>& model, std::vector<int>& tokens, int count, double temperature, int top_k,
              uint64_t seed, const std::vector<int>& stop_tokens, int vocabulary, Emit emit) {
  if (tokens.empty()) throw std::invalid_argument("generate: the prompt needs at least one token");
  std::vector<Acc<Real>> logits(model.config.vocab);
  size_t start = 0;  // tokens before it are forgotten
  int cached = 0;    // positions whose keys and values are in the activations
  for (int i = 0; i < count; ++i) {
    int length = int(tokens.size() - start);
    if (length > model.T) {
      length = std::max(model.T / 2, 1);
      start = tokens.size() - length;
      cached = 0;
    }
    model.forward(tokens.data() + start, 1, length, cached);
    cached = length;
    model.logits(logits.data(), length, 1);
    const int next =
        sample_token(logits.data(), vocabulary, temperature, top_k, uniform(seed, 0x73616d70, tokens.size()));
    tokens.push_back(next);
    if (std::count(stop_tokens.begin(), stop_tokens.end(), next)) return;
    emit(next);
  }
}
