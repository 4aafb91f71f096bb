// model.h: the whole model against PyTorch (tests/fixtures, written by scripts/fixtures.py), and what must not matter:
// the number of threads, how a batch is split, whether earlier positions are computed again.

#include "model.h"

#include "tests/cuda.h"

namespace {

const std::vector<std::string> kFixtures = {"llama", "nope", "parallel_qknorm", "pythia", "interleaved_tied", "mixed",
                                            "rules", "yarn", "gptj", "softcap"};
const std::vector<std::string> kRuns = {"llama", "pythia", "interleaved_tied"};

// Whether this program can run it: after make ROTARY_DIM=6 it knows one rotary dimension only.
bool built_for(const Config& c) {
  const int R = kRotaryDim.value_or(c.rotary_dim);
  return R == c.rotary_dim && (!kRotaryDim || c.rotary_layers == "all");
}

Config config_from(const nlohmann::json& j) {
  Config c;
  c.layers = j["layers"], c.width = j["width"], c.heads = j["heads"], c.kv_heads = j["kv_heads"];
  c.head_size = j["head_size"], c.mlp_hidden = j["mlp_hidden"], c.context = j["context"], c.vocab = j["vocab"];
  c.rotary_dim = j["rotary_dim"], c.rope_base = j["rope_base"], c.qk_norm = j["qk_norm"], c.bias = j["bias"],
  c.tied = j["tied"];
  c.rope_frequencies = j["rope_frequencies"], c.rope_scaling = j["rope_scaling"], c.rotary_layers = j["rotary_layers"];
  c.rope_pairs = j["rope_pairs"] == "half" ? RopePairs::half : RopePairs::interleaved;
  c.block = j["block"] == "parallel" ? BlockKind::parallel : BlockKind::sequential;
  c.norm = j["norm"] == "layer" ? NormKind::layer : NormKind::rms;
  c.mlp = j["mlp"] == "gelu" ? MlpKind::gelu : j["mlp"] == "gelu-tanh" ? MlpKind::gelu_tanh : MlpKind::swiglu;
  c.norm_eps = j["norm_eps"], c.shared_norm = j["shared_norm"], c.qkv_bias = j["qkv_bias"];
  c.head_bias = j["head_bias"];
  c.attention_softcap = j["attention_softcap"];
  if (built_for(c)) resolve(c);
  return c;
}
Config config_of(const Fixture& f) {
  return config_from(nlohmann::json::parse(f.metadata["config"].get<std::string>()));
}

constexpr int kB = 2, kT = 11;

template <class Real>
void set_weights(Model<Cpu, Real>& model, const Fixture& f) {
  std::vector<Real> flat(model.table.total);
  for (const ParameterRow& row : model.table.rows) {
    const std::vector<double>& values = f.at("weight." + row.name);
    REQUIRE(values.size() == row.count);
    std::copy(values.begin(), values.end(), flat.begin() + row.offset);
  }
  model.set_weights(flat.data());
}

template <class Real>
std::vector<Real> tensor(const Real* flat, const ParameterRow& row) {
  return {flat + row.offset, flat + row.offset + row.count};
}

template <class Real>
void gradients_of(Model<Cpu, Real>& model, const std::vector<int>& tokens, const std::vector<int>& targets, int B,
                  int T, double scale, double z_loss = 0) {
  model.forward(tokens.data(), B, T);
  model.backward(targets.data(), B, T, scale, z_loss);
}

// A configuration with everything in it, and a vocabulary for which the loss runs through the tokens in several parts.
Config everything() {
  Config c;
  c.layers = 2, c.width = 24, c.heads = 4, c.kv_heads = 2, c.head_size = 10, c.mlp_hidden = 21, c.context = 80,
  c.vocab = 262147;
  c.rotary_dim = kRotaryDim.value_or(4), c.qk_norm = true, c.bias = true, c.norm = NormKind::layer;
  resolve(c);
  return c;
}

template <class Real>
std::vector<Real> copy(const Real* p, size_t n) {
  return {p, p + n};
}

// A fixture's model with its weights, and its batch.
template <class Real>
struct FixtureModel {
  Cpu be;
  Model<Cpu, Real> model;
  double z_loss;
  std::vector<int> tokens, targets;
  explicit FixtureModel(const Fixture& f)
      : model(be, config_of(f), kB, kT, true),
        z_loss(std::stod(f.metadata["z_loss"].get<std::string>())),
        tokens(f.ints("tokens")),
        targets(f.ints("targets")) {
    set_weights(model, f);
  }
};

}  // namespace

TEST_CASE("model: losses and every gradient equal PyTorch's, in fp64") {
  for (const std::string& name : kFixtures) {
    CAPTURE(name);
    const Fixture f(name);
    if (!built_for(config_of(f))) continue;
    FixtureModel<double> x(f);
    auto& [be, model, z_loss, tokens, targets] = x;
    std::vector<double> losses(kB * kT);
    model.forward(tokens.data(), kB, kT);
    model.loss(losses.data(), targets.data(), kB, kT);
    // Both sides compute in fp64, each with a chain of about 50 operations on dot products of up to 30 terms.
    CHECK(distance(losses, f.at("losses")) <= 1e-12);
    model.backward(targets.data(), kB, kT, 1.0 / (kB * kT), z_loss);
    CHECK(distance(copy(model.acts.losses, kB * kT), f.at("losses")) <= 1e-12);
    size_t checked = 0;
    for (const ParameterRow& row : model.table.rows) {
      const std::vector<double> ours = tensor(model.gradients_flat, row), theirs = f.at("gradient." + row.name);
      double worst = 0;
      for (size_t i = 0; i < theirs.size(); ++i)  // theirs is rounded to fp32
        worst = std::max(worst, std::fabs(ours[i] - theirs[i]) - kRounding<float> * std::fabs(theirs[i]));
      INFO(row.name);
      CHECK(worst <= 1e-12 * std::max(1.0, largest(theirs)));
      CHECK(largest(theirs) > 1e-6);  // there was something to compare
      ++checked;
    }
    size_t in_file = 0;
    for (const auto& [key, values] : f.tensors) in_file += key.rfind("gradient.", 0) == 0;
    CHECK(checked == in_file);
  }
}

TEST_CASE("model: losses and every gradient equal PyTorch's, in fp32") {
  for (const std::string& name : kFixtures) {
    CAPTURE(name);
    const Fixture f(name);
    if (!built_for(config_of(f))) continue;
    FixtureModel<float> x(f);
    auto& [be, model, z_loss, tokens, targets] = x;
    gradients_of(model, tokens, targets, kB, kT, 1.0 / (kB * kT), z_loss);
    // A number passes about 25 operations forward and 25 back. Each is a sum of up to 30 terms, whose roundings add up
    // to about sqrt(30) = 5, and the operations' errors add up like independent ones: sqrt(50) * 5 = 35 roundings in
    // the root mean square; four times that for the ways in which errors are multiplied (norms, softmax).
    const double tolerance = 140 * kRounding<float>;
    CHECK(distance(copy(model.acts.losses, kB * kT), f.at("losses")) <= tolerance);
    for (const ParameterRow& row : model.table.rows) {
      INFO(row.name);
      CHECK(relative_distance(tensor(model.gradients_flat, row), f.at("gradient." + row.name)) <= tolerance);
    }
  }
}

namespace {

// Ten steps as scripts/fixtures.py made them; checks losses, norms, rates and the final weights.
template <class Real>
void follow_run(const std::string& name, double loss_tolerance, double weight_tolerance) {
  CAPTURE(name);
  const Fixture f(name);
  const Config c = config_of(f);
  if (!built_for(c)) return;
  const nlohmann::json run = nlohmann::json::parse(f.metadata["run"].get<std::string>());
  Cpu be;
  Model<Cpu, Real> model(be, c, kB, kT, true);
  set_weights(model, f);
  const std::vector<int> all = f.ints("run.tokens");
  const int steps = int(f.at("run.losses").size());
  REQUIRE(steps == 10);
  for (int step = 0; step < steps; ++step) {
    std::vector<int> tokens, targets;
    for (int b = 0; b < kB; ++b)
      for (int t = 0; t < kT; ++t) {
        const int* sequence = &all[(step * kB + b) * (kT + 1)];
        tokens.push_back(sequence[t]);
        targets.push_back(sequence[t + 1]);
      }
    model.zero_gradients();
    gradients_of(model, tokens, targets, kB, kT, 1.0 / (kB * kT));
    AdamW a;
    a.lr = learning_rate(Schedule::cosine, step, steps, run["warmup"], run["lr"], run["min_lr"]);
    a.beta1 = run["betas"][0], a.beta2 = run["betas"][1], a.eps = 1e-8, a.weight_decay = run["weight_decay"],
    a.clip = run["clip"];
    a.step = step + 1;
    model.update(a);
    double loss = 0;
    for (int n = 0; n < kB * kT; ++n) loss += model.acts.losses[n] / (kB * kT);
    CAPTURE(step);
    CHECK(std::fabs(loss - f.at("run.losses")[step]) <= loss_tolerance);
    CHECK(std::fabs(model.result->norm / f.at("run.norms")[step] - 1) <= 10 * loss_tolerance);
    CHECK(std::fabs(a.lr - f.at("run.rates")[step]) <= 1e-14);
  }
  for (const ParameterRow& row : model.table.rows) {
    INFO(row.name);
    // What a key's bias adds to an unrotated channel adds the same to all scores of a query, and softmax does not see
    // it: its gradient is 0 in theory, and noise divided by its own size in Adam. It may drift by the sum of the rates.
    const bool drifts = sizeof(Real) == 4 && contains(row.name, "qkv.bias");
    double rates = 0;
    for (double rate : f.at("run.rates")) rates += rate;
    const std::vector<double>& expected = f.at("run.weight." + row.name);
    CHECK(relative_distance(tensor(model.master, row), expected) <= (drifts ? rates / 0.2 : weight_tolerance));
  }
}

}  // namespace

TEST_CASE("model: ten steps with AdamW give PyTorch's losses, norms and weights") {
  for (const std::string& name : kRuns) {
    // fp64: the final weights are stored in fp32, and what Adam makes of rounding errors is far below that.
    follow_run<double>(name, 1e-9, 2 * kRounding<float>);
    // fp32: a loss is off by some tens of roundings, as above. A step moves a weight by lr times the relative error of
    // its gradient, up to 140 roundings, which is nothing beside the weight; what is left is a rounding or two of the
    // weight itself in each step, ten of them adding up like independent ones.
    follow_run<float>(name, 200 * kRounding<float>, 10 * kRounding<float>);
  }
}

TEST_CASE("model: gradients are the slopes of the loss, with z-loss and skipped targets") {
  Config c = everything();
  c.vocab = 11;
  Cpu be;
  Model<Cpu, double> model(be, c, 1, 5, true);
  std::vector<double> flat = random_values<double>(model.table.total, 100, 0.3);
  model.set_weights(flat.data());
  const std::vector<int> tokens = random_tokens(5, c.vocab, 101);
  std::vector<int> targets = random_tokens(5, c.vocab, 102);
  targets[1] = -1;
  const double z_loss = 0.05;
  gradients_of(model, tokens, targets, 1, 5, 0.2, z_loss);
  const std::vector<double> gradients = copy(model.gradients_flat, model.table.total);
  auto loss = [&] {
    std::vector<double> losses(5), logits(5 * c.vocab);
    model.set_weights(flat.data());
    model.forward(tokens.data(), 1, 5);
    model.loss(losses.data(), targets.data(), 1, 5);
    model.logits(logits.data(), 5, 5);
    double total = 0;
    for (int n = 0; n < 5; ++n) {
      if (targets[n] < 0) continue;
      double z = 0;
      for (int v = 0; v < c.vocab; ++v) z += std::exp(logits[n * c.vocab + v]);
      total += losses[n] + z_loss * std::log(z) * std::log(z);
    }
    return 0.2 * total;
  };
  for (const ParameterRow& row : model.table.rows) {
    for (size_t i = 0; i < row.count; i += row.count / 3 + 1) {  // a few elements of every tensor
      std::vector<double> one{flat[row.offset + i]};
      const double worst = slope_distance(one, {gradients[row.offset + i]}, [&] {
        flat[row.offset + i] = one[0];
        return loss();
      });
      flat[row.offset + i] = one[0];
      INFO(row.name << " " << i);
      CHECK(worst < kSlope);
    }
  }
  for (const ParameterRow& row : model.table.rows)  // nothing is written between the tensors
    for (size_t i = row.offset + row.count; i < row.offset + (row.count + 63) / 64 * 64; ++i) CHECK(gradients[i] == 0);
}

TEST_CASE("model: two accumulated micro-batches equal one batch") {
  const Config c = everything();
  const int B = 4, T = 60;
  CHECK(loss_rows<Cpu>(c, B * T) < B * T);  // the large batch goes through the head in parts
  Cpu be;
  Model<Cpu, double> whole(be, c, B, T, true), half(be, c, B / 2, T, true);
  whole.initialise_weights(7);
  half.initialise_weights(7);
  const std::vector<int> tokens = random_tokens(B * T, c.vocab, 103), targets = random_tokens(B * T, c.vocab, 104);
  gradients_of(whole, tokens, targets, B, T, 1.0 / (B * T), 1e-3);
  for (int part : {0, 1}) {
    const int at = part * B / 2 * T;
    half.forward(&tokens[at], B / 2, T);
    half.backward(&targets[at], B / 2, T, 1.0 / (B * T), 1e-3);
    CHECK(distance(copy(half.acts.losses, B / 2 * T), copy(whole.acts.losses + at, B / 2 * T)) <= 1e-13);
  }
  // Only the order of the sums over tokens differs.
  for (const ParameterRow& row : whole.table.rows) {
    INFO(row.name);
    CHECK(relative_distance(tensor(half.gradients_flat, row), tensor(whole.gradients_flat, row)) <= 1e-12);
  }
}

TEST_CASE("model: a smaller batch in a larger model gives the same, to the bit") {
  Config c = everything();
  c.vocab = 31;
  const int B = 2, T = 13;
  Cpu be;
  Model<Cpu, float> exact(be, c, B, T, true), roomy(be, c, 3, 40, true);
  exact.initialise_weights(8);
  roomy.initialise_weights(8);
  const std::vector<int> tokens = random_tokens(B * T, c.vocab, 105), targets = random_tokens(B * T, c.vocab, 106);
  const std::vector<int> other = random_tokens(3 * 40, c.vocab, 107);
  gradients_of(roomy, other, other, 3, 40, 1.0);  // what was there before must not matter
  roomy.zero_gradients();
  gradients_of(exact, tokens, targets, B, T, 0.1);
  gradients_of(roomy, tokens, targets, B, T, 0.1);
  CHECK(same_bits(copy(exact.gradients_flat, exact.table.total), copy(roomy.gradients_flat, exact.table.total)));
  CHECK(same_bits(copy(exact.acts.losses, B * T), copy(roomy.acts.losses, B * T)));
}

TEST_CASE("model: a micro-batch of training is forward and backward; recomputing changes the memory only") {
  for (int variant = 0; variant < 4; ++variant) {
    Config c = everything();
    c.vocab = 257;
    if (variant == 1) c.block = BlockKind::parallel, c.norm = NormKind::rms;
    if (variant == 3) c.block = BlockKind::parallel, c.shared_norm = true, c.mlp = MlpKind::gelu_tanh;
    if (variant == 2) c.mlp = MlpKind::gelu;
    CAPTURE(variant);
    Config less = c;
    less.recompute = true;
    const int B = 2, T = 9;
    const size_t kept = memory_report<Cpu, float>(c, B, T).activations;
    // h1 and, if it is another one, h2 of C, act of F: for each block but one.
    const int norms = c.shared_norm ? 1 : 2;
    const size_t saved =
        (c.layers - 1) * 4 * ((norms * B * T * c.width + 63) / 64 * 64 + (B * T * c.mlp_hidden + 63) / 64 * 64);
    CHECK(kept - memory_report<Cpu, float>(less, B, T).activations >= saved - 256);
    CHECK(kept - memory_report<Cpu, float>(less, B, T).activations <= saved + 512);
    const std::vector<int> tokens = random_tokens(B * T, c.vocab, 110), targets = random_tokens(B * T, c.vocab, 111);
    Cpu be;
    Model<Cpu, float> plain(be, c, B, T, true), step(be, c, B, T, true), again(be, less, B, T, true);
    for (Model<Cpu, float>* model : {&plain, &step, &again}) model->initialise_weights(9);
    gradients_of(plain, tokens, targets, B, T, 0.1);
    step.train_batch(tokens.data(), targets.data(), 0.1, 0.0);
    again.train_batch(tokens.data(), targets.data(), 0.1, 0.0);
    double sum = 0;
    for (int i = 0; i < B * T; ++i) sum += plain.acts.losses[i];
    CHECK(step.result->loss == sum);
    step.train_batch(tokens.data(), targets.data(), 0.1, 0.0);
    CHECK(step.result->loss == sum + sum);
    for (const ParameterRow& row : step.table.rows)  // whatever was there does not matter
      std::fill_n(step.gradients_flat + row.offset, row.count, NAN);
    step.zero_gradients();
    step.train_batch(tokens.data(), targets.data(), 0.1, 0.0);
    CHECK(step.result->loss == sum);
    const std::vector<float> want = copy(plain.gradients_flat, plain.table.total);
    CHECK(same_bits(copy(step.gradients_flat, step.table.total), want));
    CHECK(same_bits(copy(again.gradients_flat, again.table.total), want));
  }
}

TEST_CASE("model: the number of threads changes nothing: losses, gradients, weights after two steps") {
  for (int variant = 0; variant < 4; ++variant) {
    Config c = everything();
    c.vocab = variant == 0 ? 262147 : 257;
    if (variant == 1)
      c.width = 67, c.mlp_hidden = 301, c.norm = NormKind::rms, c.bias = false, c.block = BlockKind::parallel;
    if (variant == 2) c.mlp = MlpKind::gelu, c.qk_norm = false, c.tied = true;
    if (variant == 3) c.width = 128, c.heads = 4, c.kv_heads = 1, c.head_size = 32, c.mlp_hidden = 384;
    const int B = 3, T = 70;
    const std::vector<int> tokens = random_tokens(B * T, c.vocab, 108), targets = random_tokens(B * T, c.vocab, 109);
    CAPTURE(variant);
    CHECK(same_for_any_threads([&] {
      Cpu be;
      Model<Cpu, float> model(be, c, B, T, true);
      model.initialise_weights(9);
      std::vector<float> all;
      for (int step = 1; step <= 2; ++step) {
        model.zero_gradients();
        gradients_of(model, tokens, targets, B, T, 1.0 / (B * T), 1e-4);
        model.update({1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, step});
        all.insert(all.end(), model.acts.losses, model.acts.losses + B * T);
        all.insert(all.end(), model.gradients_flat, model.gradients_flat + model.table.total);
        all.insert(all.end(), model.master, model.master + model.table.total);
        all.push_back(model.result->norm);
      }
      return all;
    }));
  }
}

TEST_CASE("model: position by position with the key/value cache equals all at once") {
  for (const std::string& name : kFixtures) {
    CAPTURE(name);
    const Fixture f(name);
    const Config c = config_of(f);
    if (!built_for(c)) continue;
    Cpu be;
    Model<Cpu, double> whole(be, c, 1, kT, false), cached(be, c, 1, kT, false);
    set_weights(whole, f);
    set_weights(cached, f);
    const std::vector<int> tokens = f.ints("tokens");
    int done = 0;
    for (int length : {3, 4, 8, 9, kT}) {  // a prompt of 3, then 1, 4, 1 and 2 more
      std::vector<double> a(size_t(length - done) * c.vocab), b = a;
      whole.forward(tokens.data(), 1, length);
      whole.logits(a.data(), length, length - done);
      cached.forward(tokens.data(), 1, length, done);
      cached.logits(b.data(), length, length - done);
      CHECK(distance(a, b) <= 1e-12 * largest(a));
      CHECK(largest(a) > 0.1);
      done = length;
    }
  }
}

TEST_CASE("model: logits and losses agree") {
  Config c = everything();
  c.vocab = 300;
  const int T = 20;
  Cpu be;
  Model<Cpu, double> model(be, c, 1, T, false);
  model.initialise_weights(10);
  const std::vector<int> tokens = random_tokens(T, c.vocab, 110);
  std::vector<int> targets = random_tokens(T, c.vocab, 111);
  targets[4] = -1;
  std::vector<double> losses(T), logits(T * c.vocab), last(c.vocab);
  model.forward(tokens.data(), 1, T);
  model.loss(losses.data(), targets.data(), 1, T);
  model.logits(logits.data(), T, T);
  model.logits(last.data(), T, 1);
  for (int t = 0; t < T; ++t) {
    double z = 0;
    for (int v = 0; v < c.vocab; ++v) z += std::exp(logits[t * c.vocab + v]);
    CHECK(losses[t] == about(targets[t] < 0 ? 0 : std::log(z) - logits[t * c.vocab + targets[t]]));
  }
  CHECK(distance(last, copy(&logits[(T - 1) * c.vocab], c.vocab)) <= 1e-13);
}

// ---------------------------------------------------------------------------------------------------------------------

namespace {

// The CPU, counting what is asked of it.
struct CountingCpu : Cpu {
  size_t bytes = 0;
  void* allocate(size_t n) {
    bytes += n;
    return Cpu::allocate(n);
  }
};

template <class Real>
void check_memory(const Config& c, int B, int T, const Division& division = {}) {
  CountingCpu be;
  Model<CountingCpu, Real> model(be, c, B, T, true, division);
  const MemoryReport report = memory_report<CountingCpu, Real>(c, B, T, division);
  be.bytes += exchange_bytes(model.shard, division.ranks);  // that is Comm's
  // 256: the result of a step; and the partial sums of the gradient's norm.
  CHECK(be.bytes == report.total() + 256 + division.lanes * model.squares_of_part * sizeof(double));
}

}  // namespace

TEST_CASE("model: the memory report is what is allocated") {
  for (const std::string& name : kFixtures) {
    const Config c = config_of(Fixture(name));
    if (!built_for(c)) continue;
    check_memory<float>(c, 1, 1);
    check_memory<float>(c, 3, 13);   // as long as the context
    check_memory<double>(c, 2, 40);  // longer than the context
    for (const Division& division : {Division{4, 1, 0}, Division{4, 2, 1}, Division{3, 3, 2}})
      check_memory<float>(c, 3, 13, division);
  }
}

TEST_CASE("model: parameters lie in one array, matrices first, none overlapping") {
  for (const std::string& name : kFixtures) {
    const Fixture f(name);
    const ParameterTable table = parameter_table(config_of(f));
    std::vector<int> owner(table.total, 0);
    size_t count = 0;
    for (const ParameterRow& row : table.rows) {
      size_t n = 1;
      for (size_t d : row.shape) n *= d;
      CHECK(n == row.count);
      CHECK(row.offset % 64 == 0);
      CHECK(row.decays() == (row.offset < table.decayed));
      CHECK(row.decays() == !(contains(row.name, "norm") || contains(row.name, "bias")));
      for (size_t i = 0; i < row.count; ++i) ++owner.at(row.offset + i);
      count += row.count;
    }
    CHECK(*std::max_element(owner.begin(), owner.end()) == 1);
    CHECK(count == table.parameters);
    size_t theirs = 0;
    for (const auto& [key, values] : f.tensors) theirs += key.rfind("weight.", 0) == 0 ? values.size() : 0;
    CHECK(count == theirs);
  }
}

TEST_CASE("model: initial weights are N(0, 0.02) from the seed, norms one, biases zero") {
  Config c = everything();
  c.width = 96, c.mlp_hidden = 250, c.vocab = 1000;
  Cpu be;
  Model<Cpu, float> a(be, c, 1, 1, false), b(be, c, 1, 1, false), other(be, c, 1, 1, false);
  a.initialise_weights(1);
  b.initialise_weights(1);
  other.initialise_weights(2);
  CHECK(same_bits(copy(a.master, a.table.total), copy(b.master, a.table.total)));
  std::vector<float> previous;
  for (const ParameterRow& row : a.table.rows) {
    const std::vector<float> w = tensor(a.master, row);
    INFO(row.name);
    if (row.decays()) {
      double sum = 0, sum2 = 0, sum4 = 0, neighbours = 0;
      const double n = double(w.size());
      for (size_t i = 0; i < w.size(); ++i) {
        sum += w[i] / 0.02;
        sum2 += std::pow(w[i] / 0.02, 2);
        sum4 += std::pow(w[i] / 0.02, 4);
        neighbours += w[i] * w[(i + 1) % w.size()] / 0.0004;
      }
      // Five standard errors of the mean, variance (2/n), fourth moment (96/n) and correlation of neighbours of a
      // normal.
      CHECK(std::fabs(sum / n) <= 5 / std::sqrt(n));
      CHECK(std::fabs(sum2 / n - 1) <= 5 * std::sqrt(2 / n));
      CHECK(std::fabs(sum4 / n - 3) <= 5 * std::sqrt(96 / n));
      CHECK(std::fabs(neighbours / n) <= 5 / std::sqrt(n));
      CHECK_FALSE(same_bits(w, tensor(other.master, row)));
      const size_t common = std::min(previous.size(), w.size());
      if (common)
        CHECK(std::fabs(dot(copy(w.data(), common), copy(previous.data(), common)) / 0.0004) <=
              5 * std::sqrt(double(common)));
      previous = w;
    } else {
      const float value = contains(row.name, "bias") ? 0.0f : 1.0f;
      CHECK(w == std::vector<float>(w.size(), value));
    }
  }
}

TEST_CASE("model: configurations that cannot be are refused, naming the flag and the value") {
  auto message = [](auto change) {
    Config c;
    c.vocab = 10;
    c.rotary_dim = kRotaryDim.value_or(2);
    change(c);
    return error_of([&] { resolve(c); });
  };
  CHECK(message([](Config&) {}) == "");
  CHECK(contains(message([](Config& c) { c.layers = 0; }), "--layers 0"));
  CHECK(contains(message([](Config& c) { c.width = -8; }), "--width -8"));
  CHECK(contains(message([](Config& c) { c.heads = 0; }), "--heads 0"));
  CHECK(contains(message([](Config& c) { c.context = 0; }), "--context 0"));
  CHECK(contains(message([](Config& c) { c.vocab = 0; }), "--vocab 0"));
  CHECK(contains(message([](Config& c) { c.kv_heads = -1; }), "--kv-heads -1"));
  CHECK(contains(message([](Config& c) { c.head_size = -4; }), "--head-size -4"));
  CHECK(contains(message([](Config& c) { c.mlp_hidden = -1; }), "--mlp-hidden -1"));
  CHECK(contains(message([](Config& c) { c.heads = 5; }), "--heads 5: does not divide --width 128"));
  CHECK(contains(message([](Config& c) { c.kv_heads = 3; }), "--kv-heads 3: must divide --heads 4"));
  CHECK(contains(message([](Config& c) { c.rotary_dim = 3; }), "--rotary-dim 3"));
  CHECK(contains(message([](Config& c) { c.rotary_dim = 34; }), "--rotary-dim 34"));
  for (double base : {1.0, 0.0, -5.0, double(NAN), double(INFINITY)})
    CHECK(contains(message([&](Config& c) { c.rope_base = base; }), "--rope-base"));

  Config c;
  c.vocab = 10, c.rotary_dim = kRotaryDim.value_or(2);
  resolve(c);
  CHECK(c.kv_heads == 4);
  CHECK(c.head_size == 32);
  CHECK(c.mlp_hidden == 384);  // 8/3 of 128 is 341.3
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA against the CPU

#ifdef __CUDACC__

namespace {

Config small_config() {
  Config c;
  c.layers = 2, c.width = 128, c.heads = 4, c.kv_heads = 2, c.head_size = 32, c.mlp_hidden = 192, c.vocab = 259,
  c.context = 65;
  c.rotary_dim = 8;
  resolve(c);
  return c;
}

struct Run {
  Values losses, gradients, master;  // mean loss of each step; gradients of the first step; weights after the last
};

// Trains for some steps on fixed random tokens; from the third step on a GPU replays the recorded kernels, unless each
// is to be started by itself.
template <class Backend, class Real>
Run train(Backend& be, const Config& c, int steps, bool recorded = true) {
  const int B = 3, T = 65;
  Model<Backend, Real> model(be, c, B, T, true);
  // Weights that bf16 can hold, so that all start from the same.
  Values weights(model.table.total);
  for (size_t i = 0; i < model.table.rows.size(); ++i)
    initialise(&weights[model.table.rows[i].offset], model.table.rows[i], 1, i, 0.02, 0, model.table.rows[i].count);
  for (float& w : weights) w = round_to<bf16>(w * 2);
  model.set_weights(weights.data());
  std::mt19937 random(30);
  std::vector<int> tokens(B * T + 1);
  for (int& token : tokens) token = random() % c.vocab;
  Run run;
  run.gradients.resize(model.table.total);
  run.master.resize(model.table.total);
  for (int step = 1; step <= steps; ++step) {
    model.zero_gradients();
    if (recorded) {
      model.train_batch(tokens.data(), tokens.data() + 1, 1.0 / (B * T), 1e-4);
    } else {
      model.forward(tokens.data(), B, T);
      model.backward(tokens.data() + 1, B, T, 1.0 / (B * T), 1e-4);
    }
    if (step == 1) be.download(run.gradients.data(), model.gradients_flat, run.gradients.size() * sizeof(float));
    typename Model<Backend, Real>::StepResult result;
    be.download(&result, model.result, sizeof result);
    run.losses.push_back(float(result.loss / (B * T)));
    model.update({1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, step});
  }
  be.download(run.master.data(), model.master, run.master.size() * sizeof(float));
  return run;
}

void compare_models(const Config& c) {
  const int steps = 10;
  const ParameterTable table = parameter_table(c);
  const Run want = train<Cpu, float>(cpu, c, steps);
  const Run fp32 = train<Cuda, float>(*gpu(), c, steps), half = train<Cuda, bf16>(*gpu(), c, steps);
  for (const ParameterRow& row : table.rows) {
    CAPTURE(row.name);
    auto part = [&](const Values& all) {
      return Values(all.begin() + row.offset, all.begin() + row.offset + row.count);
    };
    // fp32: errors of sums of some hundred terms, a few 1e-6, through two blocks. bf16: each of some 20 tensors on the
    // way adds a relative error of up to 2^-8, independent of each other: sqrt(20) 2^-8 = 0.017; where gradients of
    // either sign nearly cancel (norm weights, biases) it is relative to more than the result, hence 3 times that.
    CHECK(relative_distance(part(fp32.gradients), part(want.gradients)) < 5e-5);
    CHECK(relative_distance(part(half.gradients), part(want.gradients)) < 0.05);
  }
  for (int step = 0; step < steps; ++step) {
    CAPTURE(step);
    CHECK(std::fabs(fp32.losses[step] - want.losses[step]) < 1e-4 * want.losses[step]);
    // bf16: a loss is off by its last layers' roundings, and gradients that are off by 5 % cost 5 % of the progress.
    CHECK(std::fabs(half.losses[step] - want.losses[step]) <
          0x1p-7 * want.losses[step] + 0.05 * (want.losses[0] - want.losses[step]));
  }
  CHECK(want.losses.back() < want.losses.front());
  const Run again32 = train<Cuda, float>(*gpu(), c, steps, false);
  Config less = c;
  less.recompute = true;
  const Run again16 = train<Cuda, bf16>(*gpu(), less, steps);
  CHECK(same_bits(again32.master, fp32.master));
  CHECK(same_bits(again16.master, half.master));
  CHECK(same_bits(again16.losses, half.losses));
}

}  // namespace

TEST_CASE("cuda: the whole model") {
  NEEDS_GPU;
  SUBCASE("partial rope") { compare_models(small_config()); }
  SUBCASE("no rope, tied") {
    Config c = small_config();
    c.rotary_dim = 0, c.tied = true;
    compare_models(c);
  }
  SUBCASE("full rope, interleaved, qk-norm, parallel block") {
    Config c = small_config();
    c.rotary_dim = 32, c.rope_pairs = RopePairs::interleaved, c.qk_norm = true, c.block = BlockKind::parallel;
    compare_models(c);
  }
  SUBCASE("no rope, soft cap") {  // of scores of up to 0.1 or so
    Config c = small_config();
    c.rotary_dim = 0, c.attention_softcap = 0.05;
    compare_models(c);
  }
  SUBCASE("layer norm, gelu, bias, head size 20") {
    Config c = small_config();
    c.head_size = 20, c.norm = NormKind::layer, c.mlp = MlpKind::gelu, c.bias = true;
    compare_models(c);
  }
  SUBCASE("a shared norm, gelu's tanh form, biases of qkv and of the head") {
    Config c = small_config();
    c.block = BlockKind::parallel, c.norm = NormKind::layer, c.shared_norm = true, c.norm_eps = 1e-3;
    c.mlp = MlpKind::gelu_tanh, c.qkv_bias = c.head_bias = true;
    compare_models(c);
  }
}

TEST_CASE_TEMPLATE("cuda: logits with a key/value cache", Real, BOTH_TYPES) {
  NEEDS_GPU;
  const Config c = small_config();
  const int T = 20;
  Model<Cuda, Real> whole(*gpu(), c, 1, T, false), stepwise(*gpu(), c, 1, T, false);
  whole.initialise_weights(3);
  stepwise.initialise_weights(3);
  std::vector<int> tokens(T);
  for (int t = 0; t < T; ++t) tokens[t] = 7 * t % c.vocab;
  Values want(c.vocab), got(c.vocab);
  whole.forward(tokens.data(), 1, T);
  whole.logits(want.data(), T, 1);
  stepwise.forward(tokens.data(), 1, T / 2);
  for (int t = T / 2; t < T; ++t) stepwise.forward(tokens.data(), 1, t + 1, t);
  stepwise.logits(got.data(), T, 1);
  // The same sums in other tiles; see compare_models.
  CHECK(relative_distance(got, want) < 8 * kRound<Real> * std::sqrt(20.0));
}

#endif  // __CUDACC__
