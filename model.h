#pragma once
// The model: configuration, the table of parameters, the activations, forward(), backward(), memory.
//
// A block, with rows N = B*T. The parallel block differs in one thing: norm2 reads x instead of x2, so that one pass makes
// both norms. With a shared norm, h2 is h1.
//
//     h1   = norm1(x)
//     qkv  = h1 Wqkv^T                      (N, NH + 2*NKV, HS), side by side
//     qkv  = rope(qkv)                      the first R channels of queries and keys, in place
//     att  = attention(qkv)                 (N, NH, HS)
//     x2   = x + att Wproj^T
//     h2   = norm2(x2)
//     up   = h2 Wup^T                       (N, 2F) for SwiGLU: gate, up
//     act  = swiglu(up)                     (N, F)
//     next = x2 + act Wdown^T

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "attention.cuh"
#include "device/backend.h"
#include "device/comm.h"
#include "layers.cuh"
#include "loss.cuh"
#include "norms.cuh"
#include "optimizer.cuh"
#include "rope.cuh"
#include "run/random.h"

enum class BlockKind { sequential, parallel };
enum class MlpKind { swiglu, gelu, gelu_tanh };

struct Config {
  int layers = 6;        // L
  int width = 128;       // C
  int heads = 4;         // NH
  int kv_heads = 0;      // NKV; 0: as many as heads
  int head_size = 0;     // HS; 0: width / heads
  int mlp_hidden = 0;    // F; 0: SwiGLU 8/3 of the width rounded up to a multiple of 64, GELU 4 times the width
  int context = 256;     // T in training, and the positions of the RoPE table
  int vocab = 0;         // V; 0: that of the data
  int rotary_dim = kRotaryDim.value_or(0);  // R
  double rope_base = 10000;
  RopePairs rope_pairs = RopePairs::half;
  std::string rope_frequencies = "rotary", rope_scaling = "none", rotary_layers = "all";  // rules: see rope.cuh
  bool qk_norm = false;
  double attention_softcap = 0;  // C: scores become C tanh(score / C); 0: they stay
  BlockKind block = BlockKind::sequential;
  NormKind norm = NormKind::rms;
  MlpKind mlp = MlpKind::swiglu;
  double norm_eps = 1e-5;    // of every norm; computed with in fp32
  bool shared_norm = false;  // of the parallel block: one norm for attention and MLP
  bool bias = false;         // of all linear layers of the blocks
  bool qkv_bias = false;     // of qkv alone, where bias is false
  bool head_bias = false;
  bool tied = false;
  bool recompute = false;  // of training, not of the model: the backward pass makes h1, h2 and act of a block again

  int qkv_width() const { return (heads + 2 * kv_heads) * head_size; }
  GeluKind gelu() const { return mlp == MlpKind::gelu_tanh ? GeluKind::tanh : GeluKind::exact; }
  int up_width() const { return mlp == MlpKind::swiglu ? 2 * mlp_hidden : mlp_hidden; }
  std::vector<int> rotary_dims() const {  // R of each layer
    return rotary_dims_of_layers(rotary_layers, rotary_dim, layers, head_size);
  }
  RopeAngles angles(int R) const {  // of the layers with that R
    RopeAngles angles = rope_angles(R, head_size, rope_base, rope_frequencies);
    rope_scale(angles, rope_scaling, rope_base, rope_frequencies == "head" ? head_size : R);
    return angles;
  }
  RopeShape heads_shape(int B, int T, int first) const { return {B, T, heads, kv_heads, head_size, first}; }
};

// Fills in the sizes that were left to be derived, and refuses those that cannot be.
inline void derive_sizes(Config& c) {
  // The upper bounds are above any model, and keep what is computed from files and flags within an int.
  auto positive = [](const char* flag, int value, int most = 1 << 20) {
    if (value <= 0) throw UserError(std::string(flag) + " " + std::to_string(value) + ": must be at least 1");
    if (value > most)
      throw UserError(std::string(flag) + " " + std::to_string(value) + ": must be at most " + std::to_string(most));
  };
  positive("--layers", c.layers, 4096);
  positive("--width", c.width);
  positive("--heads", c.heads);
  positive("--context", c.context);
  positive("--vocab", c.vocab);
  if (c.kv_heads == 0) c.kv_heads = c.heads;
  if (c.head_size == 0) {
    if (c.width % c.heads)
      throw UserError("--heads " + std::to_string(c.heads) + ": does not divide --width " + std::to_string(c.width) +
                      "; choose a divisor or give --head-size");
    c.head_size = c.width / c.heads;
  }
  if (c.mlp_hidden == 0) c.mlp_hidden = c.mlp == MlpKind::swiglu ? (c.width * 8 / 3 + 63) / 64 * 64 : 4 * c.width;
  positive("--kv-heads", c.kv_heads);
  positive("--head-size", c.head_size, (1 << 20) / c.heads);
  positive("--mlp-hidden", c.mlp_hidden, 1 << 23);
  if (c.heads % c.kv_heads)
    throw UserError("--kv-heads " + std::to_string(c.kv_heads) + ": must divide --heads " + std::to_string(c.heads));
}

// The same for all of a configuration; R becomes the largest of its layers.
inline void resolve(Config& c) {
  derive_sizes(c);
  if (!(c.rope_base > 1 && std::isfinite(c.rope_base)))
    throw UserError("--rope-base " + std::to_string(c.rope_base) + ": must be a finite number above 1");
  if (!(c.norm_eps >= 0 && c.norm_eps <= 1))
    throw UserError("--norm-eps " + std::to_string(c.norm_eps) + ": must be a number from 0 to 1");
  // Outside these bounds fp32 could not tell a capped score from the cap, or from the score.
  if (c.attention_softcap != 0 && !(c.attention_softcap >= 0.01 && c.attention_softcap <= 10000))
    throw UserError("--attention-softcap " + std::to_string(c.attention_softcap) +
                    ": must be a number from 0.01 to 10000, or 0 for none");
  if (c.shared_norm && c.block != BlockKind::parallel)
    throw UserError("--shared-norm: only with --block parallel, whose attention and MLP read the same");
  if (c.head_bias && c.tied) throw UserError("--head-bias: not with --tied, where the embedding is the head");
  check_rotary_dim(c.rotary_dim, c.head_size);
  const std::vector<int> dims = c.rotary_dims();
  for (int R : dims) c.angles(R);
  c.rotary_dim = *std::max_element(dims.begin(), dims.end());
}

// ---------------------------------------------------------------------------------------------------------------------
// Parameters, and their gradients, which have the same names and shapes.

template <class T>
struct BlockParameters {
  T *norm1 = nullptr, *norm1_bias = nullptr, *qkv = nullptr, *qkv_bias = nullptr, *q_norm = nullptr, *k_norm = nullptr,
    *proj = nullptr, *proj_bias = nullptr, *norm2 = nullptr, *norm2_bias = nullptr, *up = nullptr, *up_bias = nullptr,
    *down = nullptr, *down_bias = nullptr;
};

template <class T>
struct Parameters {
  T *embedding = nullptr, *final_norm = nullptr, *final_norm_bias = nullptr, *head = nullptr, *head_bias = nullptr;
  std::vector<BlockParameters<T>> blocks;
};

enum class Init { normal, ones, zeros };  // normal: N(0, std) for every matrix, without depth scaling

// Visits every parameter tensor: visit(name, shape, init, pointer). This list is the only one: allocation,
// initialisation, AdamW, checkpoints, gradient tests and the memory report are made from it.
template <class T, class Visit>
void visit_parameters(const Config& c, Parameters<T>& p, Visit visit) {
  const size_t C = c.width, HS = c.head_size, F = c.mlp_hidden, V = c.vocab, QKV = c.qkv_width(), UP = c.up_width();
  const size_t A = size_t(c.heads) * HS;
  const bool layer_norm = c.norm == NormKind::layer;
  using Shape = std::vector<size_t>;
  p.blocks.resize(c.layers);
  visit("embedding.weight", Shape{V, C}, Init::normal, p.embedding);
  for (int l = 0; l < c.layers; ++l) {
    BlockParameters<T>& b = p.blocks[l];
    const std::string block = "layers." + std::to_string(l) + ".";
    visit(block + "norm1.weight", Shape{C}, Init::ones, b.norm1);
    if (layer_norm) visit(block + "norm1.bias", Shape{C}, Init::zeros, b.norm1_bias);
    visit(block + "qkv.weight", Shape{QKV, C}, Init::normal, b.qkv);
    if (c.bias || c.qkv_bias) visit(block + "qkv.bias", Shape{QKV}, Init::zeros, b.qkv_bias);
    if (c.qk_norm) visit(block + "q_norm.weight", Shape{HS}, Init::ones, b.q_norm);
    if (c.qk_norm) visit(block + "k_norm.weight", Shape{HS}, Init::ones, b.k_norm);
    visit(block + "proj.weight", Shape{C, A}, Init::normal, b.proj);
    if (c.bias) visit(block + "proj.bias", Shape{C}, Init::zeros, b.proj_bias);
    if (c.shared_norm) b.norm2 = b.norm1, b.norm2_bias = b.norm1_bias;
    if (!c.shared_norm) visit(block + "norm2.weight", Shape{C}, Init::ones, b.norm2);
    if (!c.shared_norm && layer_norm) visit(block + "norm2.bias", Shape{C}, Init::zeros, b.norm2_bias);
    visit(block + "up.weight", Shape{UP, C}, Init::normal, b.up);
    if (c.bias) visit(block + "up.bias", Shape{UP}, Init::zeros, b.up_bias);
    visit(block + "down.weight", Shape{C, F}, Init::normal, b.down);
    if (c.bias) visit(block + "down.bias", Shape{C}, Init::zeros, b.down_bias);
  }
  visit("final_norm.weight", Shape{C}, Init::ones, p.final_norm);
  if (layer_norm) visit("final_norm.bias", Shape{C}, Init::zeros, p.final_norm_bias);
  if (!c.tied) visit("head.weight", Shape{V, C}, Init::normal, p.head);
  if (c.head_bias) visit("head.bias", Shape{V}, Init::zeros, p.head_bias);
}

// How a training step is divided: its micro-batches into `lanes`, whose gradients are added up in order, and the flat
// arrays below into as many parts of the same size. Of `ranks` processes each works on every ranks'th lane, and its
// optimizer on a shard, lanes / ranks parts that lie side by side. A lane and a part are the same whoever works on them:
// so the number of ranks changes no bit, the number of lanes does.
struct Division {
  int lanes = 1, ranks = 1, rank = 0;
  int rounds() const { return lanes / ranks; }  // lanes of one rank
};

// A row of the table: where a tensor lies in the flat array of all parameters. Matrices, which decay, come first, so
// that AdamW works on two stretches of memory. Each tensor starts at a multiple of 64 elements; the gaps stay zero.
struct ParameterRow {
  std::string name;
  std::vector<size_t> shape;
  Init init;
  size_t offset = 0, count = 1;
  bool decays() const { return shape.size() > 1; }
};

struct ParameterTable {
  std::vector<ParameterRow> rows;  // in the order of visit_parameters
  size_t decayed = 0;              // elements of the flat array that weight decay applies to: [0, decayed)
  size_t total = 0;                // elements of the flat array
  size_t parameters = 0;           // without the gaps
};

inline ParameterTable parameter_table(const Config& c, int lanes = 1) {
  ParameterTable table;
  Parameters<float> names_only;
  visit_parameters(c, names_only, [&](const std::string& name, const std::vector<size_t>& shape, Init init, float*) {
    table.rows.push_back({name, shape, init});
  });
  for (bool decays : {true, false}) {
    for (ParameterRow& row : table.rows) {
      if (row.decays() != decays) continue;
      for (size_t n : row.shape) row.count *= n;
      row.offset = table.total;
      table.total += (row.count + 63) / 64 * 64;
      table.parameters += row.count;
    }
    if (decays) table.decayed = table.total;
  }
  table.total = (table.total + 64 * lanes - 1) / (64 * lanes) * (64 * lanes);  // lanes parts of the same size
  return table;
}

// Points the names at their places in a flat array.
template <class T>
Parameters<T> bind(const Config& c, const ParameterTable& table, T* flat) {
  Parameters<T> p;
  size_t i = 0;
  visit_parameters(c, p, [&](const std::string&, const std::vector<size_t>&, Init, T*& pointer) {
    pointer = flat + table.rows[i++].offset;
  });
  if (c.tied) p.head = p.embedding;
  return p;
}

// Initial values of one tensor, its elements first, first + 1, ...; values (count), on the host.
template <class T>
void initialise(T* values, const ParameterRow& row, uint64_t seed, uint64_t stream, double deviation, size_t first,
                size_t count) {
#pragma omp parallel for
  for (size_t i = 0; i < count; ++i) {
    if (row.init == Init::normal) {  // Box-Muller
      const double u = 1 - uniform(seed, 2 * stream, first + i), v = uniform(seed, 2 * stream + 1, first + i);
      values[i] = T(deviation * std::sqrt(-2 * std::log(u)) * std::cos(2 * M_PI * v));
    } else {
      values[i] = T(row.init == Init::ones ? 1 : 0);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations: what the forward pass keeps for the backward pass, and the gradients that pass through it.

template <class Real>
struct BlockActivations {
  Real *x = nullptr, *h1 = nullptr, *qkv = nullptr, *qk_raw = nullptr, *att = nullptr, *x2 = nullptr, *h2 = nullptr,
       *up = nullptr, *act = nullptr;
  Acc<Real> *mean1 = nullptr, *rstd1 = nullptr, *qk_rstd = nullptr, *lse = nullptr, *mean2 = nullptr, *rstd2 = nullptr;
};

template <class Real>
struct Activations {
  int *tokens = nullptr, *targets = nullptr;
  std::vector<BlockActivations<Real>> blocks;
  Real *x = nullptr, *final = nullptr, *logits = nullptr;  // x: the residual stream after the last block
  Acc<Real> *final_mean = nullptr, *final_rstd = nullptr, *losses = nullptr, *log_z = nullptr;
};

template <class Real>  // one set, used again by every block
struct ActivationGradients {
  Real *dx = nullptr, *dx2 = nullptr, *dh = nullptr, *dqkv = nullptr, *datt = nullptr, *dup = nullptr, *dact = nullptr;
  Acc<Real>*D = nullptr, *factors = nullptr;  // of attention_backward(), and of linear_cross_entropy()
};

// Rows of logits that exist at one time: loss and head work through the tokens in chunks of this many, so that a large
// vocabulary does not dominate memory.
template <class Backend>
int loss_rows(const Config& c, size_t N) {
  const size_t elements = std::is_base_of_v<Cpu, Backend> ? size_t(1) << 26 : size_t(1) << 29;
  const size_t most = std::max<size_t>(elements / c.vocab / 64 * 64, 64), chunks = N / most + 1;
  return int(std::min(N, N / (64 * chunks) * 64 + 64));  // all chunks of the same size
}

// Visits every activation tensor of N = B*T tokens: visit(name, elements, pointer). With recompute, all blocks share
// one h1, h2 and act.
template <class Backend, class Real, class Visit>
void visit_activations(const Config& c, size_t N, Activations<Real>& a, Visit visit) {
  const size_t C = c.width, F = c.mlp_hidden, QKV = c.qkv_width(), UP = c.up_width(), A = size_t(c.heads) * c.head_size;
  const size_t QK_heads = c.heads + c.kv_heads;
  a.blocks.resize(c.layers);
  visit("tokens", N, a.tokens);
  visit("targets", N, a.targets);
  for (int l = 0; l < c.layers; ++l) {
    BlockActivations<Real>& b = a.blocks[l];
    const bool share = c.recompute && l > 0;
    visit("x", N * C, b.x);
    visit("mean1", N, b.mean1);
    visit("rstd1", N, b.rstd1);
    if (share) b.h1 = a.blocks[0].h1, b.h2 = a.blocks[0].h2, b.act = a.blocks[0].act;
    if (!share) visit("h1", N * C, b.h1);
    visit("qkv", N * QKV, b.qkv);
    if (c.qk_norm) visit("qk_raw", N * QK_heads * c.head_size, b.qk_raw);
    if (c.qk_norm) visit("qk_rstd", N * QK_heads, b.qk_rstd);
    visit("att", N * A, b.att);
    visit("lse", N * c.heads, b.lse);
    visit("x2", N * C, b.x2);
    if (c.shared_norm) b.h2 = b.h1;
    if (c.block == BlockKind::sequential) visit("mean2", N, b.mean2);
    if (c.block == BlockKind::sequential) visit("rstd2", N, b.rstd2);
    if (!c.shared_norm && !share) visit("h2", N * C, b.h2);
    visit("up", N * UP, b.up);
    if (!share) visit("act", N * F, b.act);
  }
  visit("x", N * C, a.x);
  visit("final_mean", N, a.final_mean);
  visit("final_rstd", N, a.final_rstd);
  visit("final", N * C, a.final);
  visit("logits", size_t(loss_rows<Backend>(c, N)) * c.vocab, a.logits);
  visit("losses", N, a.losses);
  visit("log_z", N, a.log_z);
}

// The rows from `first` on, of a batch of one: each tensor moves on by what the rows before take.
template <class Backend, class Real>
Activations<Real> rows_from(const Config& c, Activations<Real> a, int first) {
  visit_activations<Backend>(c, first, a, [](const char*, size_t count, auto*& pointer) { pointer += count; });
  return a;
}

template <class Real, class Visit>
void visit_activation_gradients(const Config& c, int B, int T, ActivationGradients<Real>& d, Visit visit) {
  const size_t N = size_t(B) * T, C = c.width, A = size_t(c.heads) * c.head_size;
  visit("dx", N * C, d.dx);
  visit("dx2", N * C, d.dx2);
  visit("factors", N, d.factors);
  visit("dh", N * C, d.dh);
  visit("dqkv", N * c.qkv_width(), d.dqkv);
  visit("datt", N * A, d.datt);
  visit("D", attention_workspace<Real>(c.heads_shape(B, T, 0)), d.D);
  visit("dup", N * c.up_width(), d.dup);
  visit("dact", N * c.mlp_hidden, d.dact);
}

// Allocates everything that a visitor visits in one buffer, each tensor at a multiple of 256 bytes. `visit_all` is
// called twice, first to count.
template <class Backend, class VisitAll>
Buffer<Backend> allocate_visited(Backend& be, VisitAll visit_all) {
  size_t bytes = 0;
  visit_all([&](const char*, size_t count, auto*& pointer) { bytes += (count * sizeof(*pointer) + 255) / 256 * 256; });
  Buffer<Backend> buffer(be, bytes);
  char* at = buffer.template as<char>();
  visit_all([&](const char*, size_t count, auto*& pointer) {
    pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(at);
    at += (count * sizeof(*pointer) + 255) / 256 * 256;
  });
  return buffer;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory, in bytes, from the same lists and without allocating anything.

struct MemoryReport {
  size_t parameters = 0;    // the model's own copy (bf16: next to the fp32 master weights)
  size_t gradients = 0;     // of parameters, fp32
  size_t optimizer = 0;     // m, v, and under bf16 the master weights, of a rank's shard
  size_t exchange = 0;      // of gradients between lanes and ranks
  size_t activations = 0;   // of one micro-batch, with their gradients and the logits
  size_t rope_table = 0;
  size_t total() const { return parameters + gradients + optimizer + exchange + activations + rope_table; }
};

template <class Backend, class Real>
MemoryReport memory_report(const Config& c, int B, int T, const Division& division = {}) {
  const ParameterTable table = parameter_table(c, division.lanes);
  constexpr bool own_master = !std::is_same_v<Real, Acc<Real>>;
  const size_t shard = table.total / division.ranks;
  MemoryReport m;
  m.parameters = table.total * sizeof(Real);
  m.gradients = table.total * sizeof(Acc<Real>);
  m.optimizer = shard * sizeof(Acc<Real>) * (own_master ? 3 : 2);
  m.exchange = (division.rounds() > 1 ? shard * sizeof(Acc<Real>) : 0) + exchange_bytes(shard, division.ranks);
  auto add = [&](const char*, size_t count, auto*& pointer) {
    m.activations += (count * sizeof(*pointer) + 255) / 256 * 256;
  };
  Activations<Real> a;
  ActivationGradients<Real> d;
  visit_activations<Backend>(c, size_t(B) * T, a, add);
  visit_activation_gradients(c, B, T, d, add);
  const std::vector<int> dims = c.rotary_dims();  // layers with the same R have one table
  for (int R : std::set<int>(dims.begin(), dims.end())) m.rope_table += rope_table_bytes(std::max(T, c.context), R);
  return m;
}

// ---------------------------------------------------------------------------------------------------------------------

template <class Backend, class Real>
struct Model {
  Backend& be;
  Config config;
  ParameterTable table;
  Parameters<Real> weights;
  Parameters<Acc<Real>> gradients;
  std::vector<RopeTable> rope;  // each layer's
  Activations<Real> acts;
  ActivationGradients<Real> grads;
  int B, T;  // the largest batch and length that the activations were made for

  // Flat arrays behind the names (table.total).
  Real* weights_flat = nullptr;
  Acc<Real>* gradients_flat = nullptr;  // of one lane

  // What the optimizer works on: this rank's shard of the flat arrays (shard), which begins at element shard_begin; with
  // one rank all of them. master is the fp32 copy that AdamW updates; in fp32 it is the weights themselves.
  Division division;
  size_t shard_begin, shard;
  Acc<Real>*gradient = nullptr, *master = nullptr, *m = nullptr, *v = nullptr;  // gradient: the sum of the lanes
  double* squares = nullptr;  // (lanes, squares_of_part): partial sums of the squares of the gradient's parts
  size_t squares_of_part = 0;

  // What a step leaves for the log, on the device: the sums of its losses, in nats, and of log Z since
  // zero_gradients(), and the global norm of its gradient before clipping.
  struct StepResult {
    double loss, log_z;
    Acc<Real> norm;
  };
  StepResult* result = nullptr;

  // for_training = false leaves out gradients and optimizer state.
  Model(Backend& backend, const Config& c, int batch, int length, bool for_training, const Division& how = {})
      : be(backend), config(c), table(parameter_table(c, how.lanes)), B(batch), T(length), division(how),
        shard_begin(table.total / how.ranks * how.rank), shard(table.total / how.ranks) {
    check_head_size(be, c.head_size);
    weights_memory_ = Buffer<Backend>(be, table.total * sizeof(Real));
    weights_flat = weights_memory_.template as<Real>();
    if constexpr (std::is_same_v<Real, Acc<Real>>) {
      master = weights_flat + shard_begin;
    } else {
      master_memory_ = Buffer<Backend>(be, shard * sizeof(Acc<Real>));
      master = master_memory_.template as<Acc<Real>>();
    }
    weights = bind(config, table, weights_flat);
    const size_t N = size_t(B) * T;
    activations_memory_ = allocate_visited(be, [&](auto visit) { visit_activations<Backend>(config, N, acts, visit); });
    if (for_training) {
      squares_of_part = partial_sums(be, table.total / division.lanes);
      const bool sums = division.rounds() > 1;  // else the sum of the lanes takes the place of this rank's own lane
      training_memory_ = Buffer<Backend>(be, (table.total + (sums ? 3 : 2) * shard) * sizeof(Acc<Real>) + 256 +
                                                 division.lanes * squares_of_part * sizeof(double));
      gradients_flat = training_memory_.template as<Acc<Real>>();
      m = gradients_flat + table.total;
      v = m + shard;
      gradient = sums ? v + shard : gradients_flat + shard_begin;
      char* rest = reinterpret_cast<char*>(v + (sums ? 2 : 1) * shard);
      result = reinterpret_cast<StepResult*>(rest);
      squares = reinterpret_cast<double*>(rest + 256);
      gradients = bind(config, table, gradients_flat);
      activation_gradients_memory_ =
          allocate_visited(be, [&](auto visit) { visit_activation_gradients(config, B, T, grads, visit); });
    }
    const int positions = std::max(T, config.context);
    for (int R : config.rotary_dims()) {
      Buffer<Backend>& memory = rope_memory_[R];
      if (!memory.data) {
        std::vector<float> host(size_t(positions) * R);
        rope_fill_table(host.data(), positions, config.angles(R));
        memory = Buffer<Backend>(be, host.size() * sizeof(float));
        be.upload(memory.data, host.data(), host.size() * sizeof(float));
        be.synchronize();
      }
      rope.push_back({memory.template as<float>(), positions, R, config.rope_pairs});
    }
  }

  // Initial weights from the seed, in this rank's shard: tensor i of the table draws from stream i.
  void initialise_weights(uint64_t seed, double deviation = 0.02) {
    std::vector<Acc<Real>> host;
    for (size_t i = 0; i < table.rows.size(); ++i) {
      const ParameterRow& row = table.rows[i];
      write_shard(master, row.offset, row.count, [&](size_t first, size_t count) {
        host.resize(count);
        initialise(host.data(), row, seed, i, deviation, first, count);
        return host.data();
      });
    }
    master_changed();
  }

  // Writes elements [at, at + n) of the flat arrays to `shard_of_it`, as far as they are this rank's. values(first,
  // count) gives what is needed of the n: a host array (count).
  template <class Values>
  void write_shard(Acc<Real>* shard_of_it, size_t at, size_t n, Values values) {
    const size_t begin = std::max(at, shard_begin), end = std::min(at + n, shard_begin + shard);
    if (begin >= end) return;
    const Acc<Real>* host = values(begin - at, end - begin);
    be.upload(shard_of_it + (begin - shard_begin), host, (end - begin) * sizeof(Acc<Real>));
    be.synchronize();
  }

  // Sets the master weights, and the model's copy with them, from a host array (table.total).
  void set_weights(const Acc<Real>* host) {
    write_shard(master, 0, table.total, [&](size_t first, size_t) { return host + first; });
    master_changed();
  }

  // Makes the model's own copy anew after the master weights were written: this rank's shard of it.
  void master_changed() {
    if constexpr (!std::is_same_v<Real, Acc<Real>>) convert(be, weights_flat + shard_begin, master, shard);
  }

  // Runs tokens, host (batch, length), through all blocks and the final norm. With first > 0 (and batch 1) only
  // positions first .. length-1 are worked on; what earlier calls left in the activations serves as key/value cache.
  void forward(const int* tokens, int batch, int length, int first = 0) {
    be.upload(acts.tokens + first, tokens + first, size_t(batch) * (length - first) * sizeof(int));
    forward_uploaded(batch, length, first);
  }

  void forward_uploaded(int batch, int length, int first) {
    const Config& c = config;
    const int C = c.width, A = c.heads * c.head_size, F = c.mlp_hidden, QKV = c.qkv_width();
    const int N = batch * (length - first);
    const RopeShape shape = c.heads_shape(batch, length, first);
    const bool parallel = c.block == BlockKind::parallel;
    const Activations<Real> rows = rows_from<Backend>(c, acts, first);  // those to be worked on
    embedding_forward(be, rows.blocks[0].x, rows.tokens, weights.embedding, N, C);
    for (int l = 0; l < c.layers; ++l) {
      const BlockParameters<Real>& w = weights.blocks[l];
      const BlockActivations<Real>&a = rows.blocks[l], &all = acts.blocks[l];  // all: RoPE and attention know `first`
      Real* next = l + 1 < c.layers ? rows.blocks[l + 1].x : rows.x;

      first_norms(a, w, N);
      if (c.qk_norm) {
        linear_forward(be, a.qkv, a.h1, w.qkv, w.qkv_bias, N, C, QKV);
        qk_norm_rope_forward(be, all.qkv, all.qk_raw, all.qk_rstd, w.q_norm, w.k_norm, rope[l], shape, c.norm_eps);
      } else {
        linear_rope_forward(be, all.qkv, a.h1, w.qkv, w.qkv_bias, rope[l], shape, C);
      }
      attention_forward(be, all.att, all.lse, all.qkv, shape, c.attention_softcap);

      if (!parallel) {
        linear_residual_forward(be, a.x2, a.x, a.att, w.proj, w.proj_bias, N, A, C);
        norm_forward(be, c.norm, a.h2, a.mean2, a.rstd2, a.x2, w.norm2, w.norm2_bias, N, C, c.norm_eps);
      }
      if (c.mlp == MlpKind::swiglu) {
        linear_swiglu_forward(be, a.act, a.up, a.h2, w.up, w.up_bias, N, C, F);
      } else {
        linear_forward(be, a.up, a.h2, w.up, w.up_bias, N, C, F);
        gelu_forward(be, c.gelu(), a.act, a.up, N, F);
      }
      if (parallel)
        linear_pair_residual_forward(be, next, a.x2, a.x, a.att, w.proj, w.proj_bias, a.act, w.down, w.down_bias, N, A, F,
                                     C);
      else
        linear_residual_forward(be, next, a.x2, a.act, w.down, w.down_bias, N, F, C);
    }
    norm_forward(be, c.norm, rows.final, rows.final_mean, rows.final_rstd, rows.x, weights.final_norm,
                 weights.final_norm_bias, N, C, c.norm_eps);
  }

  // The norm or norms of a block's x.
  void first_norms(const BlockActivations<Real>& a, const BlockParameters<Real>& w, int N) {
    const Config& c = config;
    if (c.block == BlockKind::parallel && !c.shared_norm)
      norm_pair_forward(be, c.norm, a.h1, a.h2, a.mean1, a.rstd1, a.x, w.norm1, w.norm1_bias, w.norm2, w.norm2_bias, N,
                        c.width, c.norm_eps);
    else
      norm_forward(be, c.norm, a.h1, a.mean1, a.rstd1, a.x, w.norm1, w.norm1_bias, N, c.width, c.norm_eps);
  }

  // After forward(): losses per token in nats, host (batch, length), for targets, host (batch, length); a negative
  // target is skipped (loss 0).
  void loss(Acc<Real>* losses, const int* targets, int batch, int length) {
    const int N = batch * length, C = config.width, V = config.vocab, chunk = loss_rows<Backend>(config, size_t(B) * T);
    be.upload(acts.targets, targets, N * sizeof(int));
    for (int n = 0; n < N; n += chunk) {
      const int rows = std::min(chunk, N - n);
      linear_forward(be, acts.logits, acts.final + size_t(n) * C, weights.head, weights.head_bias, rows, C, V);
      cross_entropy(be, acts.losses + n, acts.log_z + n, acts.logits, acts.targets + n, 0.0, 0.0, rows, V);
    }
    be.download(losses, acts.losses, N * sizeof(Acc<Real>));
  }

  // After forward(): logits, host (rows, V), of the last `rows` positions of a batch of one.
  void logits(Acc<Real>* out, int length, int rows) {
    const int C = config.width, V = config.vocab, chunk = std::min(rows, loss_rows<Backend>(config, size_t(B) * T));
    std::vector<Real> host(size_t(chunk) * V);
    for (int n = length - rows; n < length; n += chunk) {
      const int count = std::min(chunk, length - n);
      linear_forward(be, acts.logits, acts.final + size_t(n) * C, weights.head, weights.head_bias, count, C, V);
      be.download(host.data(), acts.logits, size_t(count) * V * sizeof(Real));
      for (size_t i = 0; i < size_t(count) * V; ++i) *out++ = Acc<Real>(host[i]);
    }
  }

  // Begins a sum of micro-batches. The first of them assigns the gradients of all matrices but the embedding's, which,
  // like those of vectors, is added to zeros.
  void zero_gradients() {
    be.zero(gradients.embedding, size_t(config.vocab) * config.width * sizeof(Acc<Real>));
    be.zero(gradients_flat + table.decayed, (table.total - table.decayed) * sizeof(Acc<Real>));
    be.zero(result, sizeof *result);
    first_ = true;
  }

  // One micro-batch of training, forward and backward: host tokens and targets (B, T). Nothing here waits for the
  // device: the arrays must stay as they are until it is synchronised. scale and z_loss are the same in every call.
  void train_batch(const int* tokens, const int* targets, double scale, double z_loss) {
    be.upload(acts.tokens, tokens, size_t(B) * T * sizeof(int));
    be.upload(acts.targets, targets, size_t(B) * T * sizeof(int));
    be.replay(training_step_[first_], [&] {
      forward_uploaded(B, T, 0);
      backward_uploaded(B, T, scale, z_loss);
    });
    first_ = false;
  }

  // After forward() on the same tokens: adds to the gradients those of scale * (sum of the losses + z-loss), leaves
  // the losses per token in acts.losses, and adds their sum to result->loss and that of log Z to result->log_z. scale
  // is 1 / (tokens of the whole step).
  void backward(const int* targets, int batch, int length, double scale, double z_loss) {
    be.upload(acts.targets, targets, size_t(batch) * length * sizeof(int));
    backward_uploaded(batch, length, scale, z_loss);
    first_ = false;
  }

  void backward_uploaded(int batch, int length, double scale, double z_loss) {
    const Config& c = config;
    const int C = c.width, A = c.heads * c.head_size, F = c.mlp_hidden, V = c.vocab, QKV = c.qkv_width(),
              UP = c.up_width();
    const int N = batch * length, chunk = loss_rows<Backend>(c, size_t(B) * T);
    const RopeShape shape = c.heads_shape(batch, length, 0);
    const bool parallel = c.block == BlockKind::parallel;
    ActivationGradients<Real>& d = grads;
    for (int n = 0; n < N; n += chunk) {
      const int rows = std::min(chunk, N - n);
      linear_cross_entropy(be, acts.losses + n, acts.log_z + n, d.dh + size_t(n) * C, gradients.head, gradients.head_bias,
                           acts.logits, d.factors, acts.final + size_t(n) * C, weights.head, weights.head_bias,
                           acts.targets + n, scale, z_loss, rows, C, V, first_ && n == 0);
    }
    add_losses(be, &result->loss, &result->log_z, acts.losses, acts.log_z, N);
    norm_backward(be, c.norm, d.dx, gradients.final_norm, gradients.final_norm_bias, (const Real*)nullptr, d.dh, acts.x,
                  acts.final_mean, acts.final_rstd, weights.final_norm, N, C);
    for (int l = c.layers - 1; l >= 0; --l) {
      const BlockParameters<Real>& w = weights.blocks[l];
      const BlockParameters<Acc<Real>>& g = gradients.blocks[l];
      const BlockActivations<Real>& a = acts.blocks[l];

      if (c.recompute) {  // the same calls as in forward(), with the same results
        first_norms(a, w, N);
        if (!parallel) norm_forward(be, c.norm, a.h2, a.mean2, a.rstd2, a.x2, w.norm2, w.norm2_bias, N, C, c.norm_eps);
        if (c.mlp == MlpKind::swiglu)
          swiglu_forward(be, a.act, a.up, N, F);
        else
          gelu_forward(be, c.gelu(), a.act, a.up, N, F);
      }

      // d.dx is the gradient of the block's output. It reaches x2 along the residual stream as it is.
      if (c.mlp == MlpKind::swiglu) {
        linear_swiglu_backward(be, d.dup, d.dact, g.down, g.down_bias, d.dx, a.act, a.up, w.down, N, F, C, first_);
      } else {
        linear_backward(be, d.dact, g.down, g.down_bias, d.dx, a.act, w.down, N, F, C, first_);
        gelu_backward(be, c.gelu(), d.dup, d.dact, a.up, N, F);
      }
      // Parallel: the gradient of h2 waits for that of h1, in the place of dx2.
      linear_backward(be, parallel ? d.dx2 : d.dh, g.up, g.up_bias, d.dup, a.h2, w.up, N, C, UP, first_);
      if (!parallel)
        norm_backward(be, c.norm, d.dx2, g.norm2, g.norm2_bias, d.dx, d.dh, a.x2, a.mean2, a.rstd2, w.norm2, N, C);

      // Sequential: x2 feeds norm2, so its gradient is dx2. Parallel: norm2 hangs on x, so that of x2 is still dx.
      linear_backward(be, d.datt, g.proj, g.proj_bias, parallel ? d.dx : d.dx2, a.att, w.proj, N, A, C, first_);
      if (c.qk_norm) {
        attention_backward(be, d.dqkv, d.D, d.datt, a.qkv, a.att, a.lse, shape, c.attention_softcap);
        qk_norm_rope_backward(be, d.dqkv, g.q_norm, g.k_norm, a.qk_raw, a.qk_rstd, w.q_norm, w.k_norm, rope[l], shape);
      } else {
        attention_rope_backward(be, d.dqkv, d.D, d.datt, a.qkv, a.att, a.lse, rope[l], shape, c.attention_softcap);
      }
      linear_backward(be, d.dh, g.qkv, g.qkv_bias, d.dqkv, a.h1, w.qkv, N, C, QKV, first_);
      if (parallel)  // a shared norm's gradients add up: g.norm2 is g.norm1
        norm_pair_backward(be, c.norm, d.dx, g.norm1, g.norm1_bias, g.norm2, g.norm2_bias, d.dx, d.dh, d.dx2, a.x,
                           a.mean1, a.rstd1, w.norm1, w.norm2, N, C);
      else
        norm_backward(be, c.norm, d.dx, g.norm1, g.norm1_bias, d.dx2, d.dh, a.x, a.mean1, a.rstd1, w.norm1, N, C);
    }
    embedding_backward(be, gradients.embedding, d.dx, acts.tokens, N, V, C);
  }

  // One AdamW step on the accumulated gradients; decay on matrices only. The norm before clipping is left in
  // result->norm. Several ranks exchange what they have between and after its two halves: Trainer::step().
  void update(const AdamW& a) {
    square(gradient);
    update_shard(a);
  }

  // Leaves in `squares` the partial sums of this rank's shard of the gradient, or of the weights.
  void square(const Acc<Real>* values /* (shard) */) {
    const size_t part = table.total / division.lanes, first = division.rank * division.rounds();
    for (int i = 0; i < division.rounds(); ++i)
      sum_squares(be, squares + (first + i) * squares_of_part, values + i * part, part);
  }

  void update_shard(AdamW a) {
    Acc<Real>* norm = &result->norm;
    gradient_norm(be, norm, squares, division.lanes * squares_of_part);
    Real* weights = weights_flat + shard_begin;
    const size_t o = std::min(std::max(table.decayed, shard_begin) - shard_begin, shard);  // what decays comes first
    adamw(be, weights, master, gradient, m, v, norm, o, a);
    a.weight_decay = 0;
    adamw(be, weights + o, master + o, gradient + o, m + o, v + o, norm, shard - o, a);
  }

 private:
  Buffer<Backend> weights_memory_, master_memory_, training_memory_, activations_memory_, activation_gradients_memory_;
  std::map<int, Buffer<Backend>> rope_memory_;  // by R
  bool first_ = false;  // the next backward pass is the first after zero_gradients()
  typename Backend::Recording training_step_[2];  // of later micro-batches, and of the first
};
