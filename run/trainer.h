#pragma once
// Training, a step at a time: the forward and backward pass of each micro-batch, clipping, AdamW.

#include "run/diagnostics.cuh"
#include "run/prepare.h"

template <class Backend, class Real>
struct Trainer {
  Backend& be;
  Run& run;
  Settings& s;
  const int N = s.batch * s.model.context;  // tokens of a micro-batch
  const size_t tokens_per_step = size_t(N) * s.accumulate;
  Model<Backend, Real> model;
  Diagnostics<Backend, Real> diagnostics;
  int done = 0;  // steps that the weights have behind them

  // In nats per token; norm is that of the gradient before clipping.
  struct Result {
    double loss, log_z, norm, lr;
    bool finite() const { return std::isfinite(loss) && std::isfinite(norm); }
  };

  // From the run's checkpoint, the weights of --init, or new ones.
  Trainer(Backend& backend, Run& r)
      : be(backend), run(r), s(r.s), model(be, s.model, s.batch, s.model.context, true), diagnostics(model),
        tokens_(be, 4 * tokens_per_step) {
    if (!run.checkpoint.empty()) {
      load_weights(model, run.checkpoint);
      load_optimizer(model, run.checkpoint);
      done = run.state["step"];
    } else if (!run.init.empty()) {
      load_weights(model, run.init);
    } else {
      model.initialise_weights(s.seed, s.init_std);
    }
  }

  // The next step; with `inside`, looks into it; with `losses`, keeps the loss of each token (accumulate, B, T).
  Result step(StepDiagnostics* inside = nullptr, std::vector<Acc<Real>>* losses = nullptr) {
    const int warmup = s.warmup >= 0 ? s.warmup : (s.steps + 19) / 20;
    const double min_lr = s.min_lr >= 0 ? s.min_lr : s.lr / 10;
    const AdamW a = {learning_rate(s.schedule, done, s.steps, warmup, s.lr, min_lr),
                     s.beta1, s.beta2, s.eps, s.weight_decay, s.clip, done + 1};
    if (read_ < done) read_batches(done);
    model.zero_gradients();
    if (inside) diagnostics.begin();
    if (losses) losses->resize(tokens_per_step);
    for (int micro = 0; micro < s.accumulate; ++micro) {
      const size_t at = size_t(micro) * N;
      model.train_batch(inputs_of(done) + at, targets_of(done) + at, 1.0 / double(tokens_per_step), s.z_loss);
      if (inside) diagnostics.add_micro_batch();
      if (losses) be.download(losses->data() + at, model.acts.losses, N * sizeof(Acc<Real>));
    }
    model.update(a);
    if (inside) diagnostics.add_update(a);
    if (done + 1 < s.steps) read_batches(done + 1);  // a GPU is still at work
    typename Model<Backend, Real>::StepResult result;
    be.download(&result, model.result, sizeof result);
    if (inside) *inside = diagnostics.read();
    ++done;
    return {result.loss / double(tokens_per_step), result.log_z / double(tokens_per_step), double(result.norm), a.lr};
  }

  // The loss over the first --val-tokens of the validation data, in nats per token.
  double validate() {
    const int B = s.batch, T = s.model.context;
    const size_t windows = run.val->windows(T),
                 wanted = std::min(windows, std::max<size_t>(1, size_t(s.val_tokens) / T));
    double sum = 0;
    std::vector<int> inputs(N), targets(N);
    std::vector<Acc<Real>> losses(N);
    for (size_t w = 0; w < wanted; w += B) {
      const int batch = int(std::min<size_t>(B, wanted - w));
      for (int b = 0; b < batch; ++b) run.val->window(w + b, T, &inputs[size_t(b) * T], &targets[size_t(b) * T]);
      model.forward(inputs.data(), batch, T);
      model.loss(losses.data(), targets.data(), batch, T);
      for (int i = 0; i < batch * T; ++i) sum += losses[i];
    }
    return sum / (double(wanted) * T);
  }

  // The run's checkpoint, of the steps done.
  void save() {
    nlohmann::ordered_json state = {
        {"step", done},
        {"micro_batches", first_micro_batch(done)},
        {"tokens", uint64_t(done) * tokens_per_step},
        {"seed", s.seed},
        {"tokenizer", run.meta.tokenizer},
        {"vocabulary", run.meta.vocabulary ? run.meta.vocabulary : s.model.vocab},
        {"settings", settings_json(s)}};
    if (!run.special_tokens.is_null()) state["special_tokens"] = run.special_tokens;
    save_checkpoint(model, run.directory, state);
  }

  const int* inputs_of(int step) { return batches_of(step); }  // (accumulate, B, T)
  const int* targets_of(int step) { return batches_of(step) + tokens_per_step; }
  size_t first_micro_batch(int step) const { return size_t(step) * s.accumulate; }

 private:
  // The micro-batches of two steps: while the device works on one, the other is read from the shards.
  HostArray<Backend, int> tokens_;
  int read_ = -1;

  int* batches_of(int step) { return tokens_.data + (step % 2) * 2 * tokens_per_step; }
  void read_batches(int step) {
    for (int micro = 0; micro < s.accumulate; ++micro) {
      int* inputs = batches_of(step) + size_t(micro) * N;
      run.train->batch(s.seed, first_micro_batch(step) + micro, s.batch, s.model.context, inputs,
                       inputs + tokens_per_step);
    }
    read_ = step;
  }
};
