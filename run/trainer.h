#pragma once
// Training, a step at a time: the forward and backward pass of each micro-batch, clipping, AdamW. With several ranks
// (device/ranks.h) every one has a Trainer and calls the same functions in the same order; step() shows what they
// exchange.

#include <chrono>
#include <functional>
#include <numeric>
#include <vector>

#include "device/comm.h"
#include "run/diagnostics.cuh"
#include "run/prepare.h"
#include "run/program.h"
#include "run/qk_clip.cuh"

constexpr double kSaveSeconds = 600;  // between checkpoints, at most

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Backend, class Real>
struct Trainer {
  Backend& be;
  Comm<Backend>& comm;
  Ranks& ranks;
  Run& run;
  Settings& s;
  const Division division;
  const int N = s.batch * s.model.context;  // tokens of a micro-batch
  const size_t tokens_per_step = size_t(N) * s.accumulate;
  Model<Backend, Real> model;
  Diagnostics<Backend, Real> diagnostics;
  QkClip<Backend, Real> qk_clip;
  int done = 0;  // steps that the weights have behind them
  std::function<void(int)> on_micro_batch;  // called before each of a step, from 0

  // In nats per token; norm is that of the gradient before clipping.
  struct Result {
    double loss, log_z, norm, lr;
    bool finite() const { return std::isfinite(loss) && std::isfinite(norm); }
  };

  // From the run's checkpoint, the weights of --init, or new ones.
  Trainer(Backend& backend, Comm<Backend>& c, Run& r)
      : be(backend), comm(c), ranks(c.ranks), run(r), s(r.s), division{s.lanes, ranks.size, ranks.rank},
        model(be, s.model, s.batch, s.model.context, true, division), diagnostics(model),
        qk_clip(model, s.qk_clip), tokens_(be, 4 * tokens_per_step) {
    if (!run.checkpoint.empty()) {
      load_weights(model, run.checkpoint);
      load_optimizer(model, run.checkpoint);
      done = run.state["step"];
    } else if (!run.init.empty()) {
      load_weights(model, run.init);
    } else {
      model.initialise_weights(s.seed, s.init_std);
    }
    gather_weights();
    ranks.checkpoint = done;
  }

  // The next step; with `inside`, looks into it; with `losses`, keeps the loss of each token (accumulate, B, T). Rank 0
  // receives both.
  Result step(StepDiagnostics* inside = nullptr, std::vector<Acc<Real>>* losses = nullptr) {
    const AdamW a = {learning_rate(stretch_of(run.history, done).s, done), s.beta1, s.beta2, s.eps, s.weight_decay,
                     s.clip, done + 1};
    if (read_ < done) read_batches(done);
    if (inside) diagnostics.begin();
    qk_clip.begin();
    if (losses) losses->resize(tokens_per_step);
    std::vector<Lane> lanes(s.lanes);  // (ranks, rounds)
    Lane* mine = &lanes[division.rank * division.rounds()];
    for (int round = 0; round < division.rounds(); ++round) {
      if (round > 0) mine[round - 1] = read_lane();
      if (round > 0 && inside) diagnostics.next_lane();
      model.zero_gradients();
      for (int micro : micro_batches(round)) {
        if (on_micro_batch) on_micro_batch(micro);
        const size_t at = size_t(micro) * N;
        model.train_batch(inputs_of(done) + at, targets_of(done) + at, 1.0 / double(tokens_per_step), s.z_loss);
        if (inside) diagnostics.add_micro_batch();
        qk_clip.add_micro_batch();
        if (losses) be.download(losses->data() + at, model.acts.losses, N * sizeof(Acc<Real>));
      }
      // Here an all-reduce of the gradient begins: each rank receives its shard of the lanes of all, and adds them up.
      if (s.lanes > 1) comm.add_lanes(model.gradient, model.gradients_flat, model.shard, round == 0);
    }
    model.square(model.gradient);
    comm.all_gather(model.squares, division.rounds() * model.squares_of_part * sizeof(double));
    model.update_shard(a);
    if (inside) diagnostics.add_update(a);  // of AdamW alone
    qk_clip.apply(comm);
    gather_weights();  // and here it ends, with the new weights in place of the gradient
    if (done + 1 < s.steps) read_batches(done + 1);  // a GPU is still at work

    mine[division.rounds() - 1] = read_lane();
    ranks.all_gather(lanes.data(), division.rounds() * sizeof(Lane));
    Lane sum = {0, 0, mine[division.rounds() - 1].norm, 0, 0};
    overdue_ = false;
    for (int lane = 0; lane < s.lanes; ++lane) {
      const Lane& one = lanes[lane % ranks.size * division.rounds() + lane / ranks.size];
      sum.loss += one.loss;
      sum.log_z += one.log_z;
      told_to_stop_ = std::max(told_to_stop_, one.interrupted);
      overdue_ = overdue_ || one.overdue;
    }
    if (inside) *inside = diagnostics.read(ranks);
    if (losses) collect_losses(losses->data());
    ++done;
    return {sum.loss / double(tokens_per_step), sum.log_z / double(tokens_per_step), sum.norm, a.lr};
  }

  // The number of the signal that has told any of the ranks to stop, or 0: the same on all of them, since the last step.
  int told_to_stop() const { return ranks.size == 1 ? interrupted : told_to_stop_; }

  // Whether more than kSaveSeconds have passed since a checkpoint: the same answer on all ranks, since the last step.
  bool overdue() const { return overdue_; }

  // The loss over the first `tokens` of the validation data, a window at least; nats per token. The ranks take turns.
  double validate(int tokens) {
    const int B = s.batch, T = s.model.context;
    const size_t windows = run.val->windows(T),
                 wanted = std::min(windows, std::max<size_t>(1, size_t(tokens) / T));
    double sum = 0;
    std::vector<int> inputs(N), targets(N);
    std::vector<Acc<Real>> losses(N);
    for (size_t w = 0; w < wanted; w += B) {
      const int batch = int(std::min<size_t>(B, wanted - w)), turn = int(w / B % ranks.size);
      if (turn == ranks.rank) {
        for (int b = 0; b < batch; ++b) run.val->window(w + b, T, &inputs[size_t(b) * T], &targets[size_t(b) * T]);
        model.forward(inputs.data(), batch, T);
        model.loss(losses.data(), targets.data(), batch, T);
      }
      hand_to_root(turn, losses.data(), batch * T * sizeof(losses[0]));
      for (int i = 0; i < batch * T; ++i) sum += losses[i];
    }
    ranks.broadcast(&sum, sizeof sum);
    return sum / (double(wanted) * T);
  }

  // Whether the weights are good for a checkpoint: `loss`, which was computed with them, is finite, and so are they.
  bool good(double loss) {
    const size_t sums = division.rounds() * model.squares_of_part;
    model.square(model.master);
    gradient_norm(be, &model.result->norm, model.squares + division.rank * sums, sums);
    std::vector<char> finite(ranks.size);
    finite[ranks.rank] = std::isfinite(read_lane().norm);
    ranks.all_gather(finite.data(), 1);
    return std::isfinite(loss) && std::all_of(finite.begin(), finite.end(), [](char f) { return f; });
  }

  // The run's checkpoint, of the steps done: the same files for any number of ranks.
  void save() {
    nlohmann::ordered_json state = {
        {"step", done},
        {"tokens", uint64_t(done) * tokens_per_step},
        {"seed", s.seed},
        {"tokenizer", run.meta.tokenizer},
        {"tokenizer_fingerprint", identity_of(run.meta, s.data).fingerprint},
        {"vocabulary", run.meta.vocabulary ? run.meta.vocabulary : s.model.vocab},
        {"settings", settings_json(s)}};
    if (!run.special_tokens.is_null()) state["special_tokens"] = run.special_tokens;
    save_checkpoint(ranks, model, run.directory, state);
    ranks.barrier();  // it is there
    ranks.checkpoint = done;
    saved_at_ = now();
  }

  size_t first_micro_batch(int step) const { return size_t(step) * s.accumulate; }

 private:
  // What a lane leaves for the log, and whether its rank was told to stop, or finds that a checkpoint is overdue.
  struct Lane {
    double loss, log_z, norm;
    int interrupted, overdue;
  };
  int told_to_stop_ = 0;
  bool overdue_ = false;
  double saved_at_ = now();

  // Waits for the device.
  Lane read_lane() {
    typename Model<Backend, Real>::StepResult result;
    be.download(&result, model.result, sizeof result);
    return {result.loss, result.log_z, double(result.norm), interrupted, now() > saved_at_ + kSaveSeconds};
  }

  // The micro-batches of the lane that this rank works on in a round.
  std::vector<int> micro_batches(int round) const {
    const int count = s.accumulate / s.lanes, lane = round * ranks.size + ranks.rank;
    std::vector<int> all(count);
    std::iota(all.begin(), all.end(), lane * count);
    return all;
  }

  void gather_weights() { comm.all_gather(model.weights_flat, model.shard * sizeof(Real)); }

  void hand_to_root(int from, void* data, size_t bytes) {
    if (from == 0) return;
    if (ranks.rank == from) ranks.send(0, data, bytes);
    if (ranks.root()) ranks.receive(from, data, bytes);
  }
  void collect_losses(Acc<Real>* losses) {
    for (int micro = 0; micro < s.accumulate; ++micro)
      hand_to_root(micro / (s.accumulate / s.lanes) % ranks.size, losses + size_t(micro) * N, N * sizeof *losses);
  }

  // The micro-batches of two steps: while the device works on one, the other is read from the shards.
  HostArray<Backend, int> tokens_;
  int read_ = -1;

  const int* inputs_of(int step) { return batches_of(step); }  // (accumulate, B, T); of this rank's micro-batches
  const int* targets_of(int step) { return batches_of(step) + tokens_per_step; }
  int* batches_of(int step) { return tokens_.data + (step % 2) * 2 * tokens_per_step; }
  void read_batches(int step) {
    for (int round = 0; round < division.rounds(); ++round)
      for (int micro : micro_batches(round)) {
        int* inputs = batches_of(step) + size_t(micro) * N;
        run.train->batch(s.seed, first_micro_batch(step) + micro, s.batch, s.model.context, inputs,
                         inputs + tokens_per_step);
      }
    read_ = step;
  }
};
