#pragma once
// Flash attention for heads of 128 and 256 on Hopper (sm_90a), and the functions that start flash attention on any GPU:
// which kernel it is, they choose. The algorithm is that of device/flash.cuh: read that first.

#include <cmath>
#include <stdexcept>

#include "device/flash.cuh"

#ifdef __CUDACC__

namespace flash {

// ---------------------------------------------------------------------------------------------------------------------
// For large heads on Hopper: kernels whose blocks stay, one to a multiprocessor, and work on one item after the other. A
// warp of their own, the producer, asks the copy engine for tiles; two or three warpgroups, the consumers, multiply.

constexpr int kSlotBytes = 16;  // of a slot's barriers

// A wait for products is no obstacle to ptxas: what does not need them it may move behind the wait, and then the tensor
// cores run beside nothing. What `never` is computed from stays before it. `never` is false, but only we know.
__device__ __forceinline__ void finish_before_wait(bool never) {
#if HOPPER
  if (never) asm volatile("nanosleep.u32 0;");
#endif
}

#if HOPPER

// Tiles that pass through SLOTS slots in shared memory, one after the other. Both sides count along: a slot's barrier
// `full` says that a tile has arrived, `empty` that all consumers have released it.
template <int SLOTS>
struct Ring {
  uint32_t full, empty;
  int slot = 0, parity = 0;  // of the next tile

  __device__ __forceinline__ explicit Ring(uint32_t barriers) : full(barriers), empty(barriers + SLOTS * 8) {}
  // How many arrivals complete a tile, and how many warps release it. By one thread.
  __device__ __forceinline__ void init(int arrivals, int releases) const {
    for (int i = 0; i < SLOTS; ++i) {
      hopper::init_barrier(full + 8 * i, arrivals);
      hopper::init_barrier(empty + 8 * i, 32 * releases);
    }
  }
  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
  // For the producer: waits until the next slot is empty, as all are the first time round.
  __device__ __forceinline__ void wait_empty() const {
    hopper::wait_barrier(empty + 8 * slot, parity ^ 1);
  }
  // For consumers: waits for the next tile, and returns its slot.
  __device__ __forceinline__ int next() {
    const int mine = slot;
    hopper::wait_barrier(full + 8 * slot, parity);
    advance();
    return mine;
  }
  // By all threads of a warp, each when neither it nor a product under way needs the tile any more. One lane for all,
  // after __syncwarp(), would do as well, but was no faster, and compute-sanitizer would not follow it.
  __device__ __forceinline__ void release(int slot) const { hopper::arrive(empty + 8 * slot); }
};

// The copy engine fills a tile; the barrier has one arrival for it, this one.
template <int ROWS, int HS>
__device__ __forceinline__ void fetch_tile(Tile<ROWS, HS> tile, const CUtensorMap& matrix, int column, int row, int b,
                                           uint32_t barrier) {
  hopper::expect_bytes(barrier, tile.kBytes);
  fetch_boxes<ROWS>(tile, matrix, column, row, b, barrier);
}

// Registers move from the producer's warpgroup to the consumers.
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif

// The items that a block works on, one after the other: tiles of rows of a head of a sequence, of which the last is the
// longest. Heads come in sections of about two items to a block, whose keys and values fit in the L2 cache together. A
// section starts with its longest items. Blocks take one each, in order, then one each in opposite order, and every
// second section starts the other way round: so all get about as much to do.
struct Items {
  int tiles, rows, heads;  // tiles of a head, heads in all, heads of a sequence
  int together, rounds;    // heads of a section, and rounds in which the blocks take its items
  int section = 0, round = -1;
  Place at;

  __device__ __forceinline__ Items(int tiles, int rows, int heads) : tiles(tiles), rows(rows), heads(heads) {
    const int blocks = gridDim.x, most = max(1, 2 * blocks / tiles);
    const int sections = (rows + most - 1) / most;
    together = (rows + sections - 1) / sections;
    rounds = (together * tiles + blocks - 1) / blocks;
  }
  // Goes to the block's next item; false if there is none.
  __device__ __forceinline__ bool next() {
    const int blocks = gridDim.x;
    for (;;) {
      if (++round == rounds) round = 0, ++section;
      const int first = section * together, height = min(together, rows - first);
      if (height <= 0) return false;
      const int i = round * blocks + ((section + round) % 2 ? blocks - 1 - int(blockIdx.x) : int(blockIdx.x));
      if (i >= height * tiles) continue;
      const int row = first + i % height;
      at = {row / heads, row % heads, tiles - 1 - i / height};
      return true;
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward on Hopper, for large heads

// GROUPS warpgroups of 64 queries per block; N keys of a tile; SLOTS for tiles of keys or values. By measurement on an
// H200; at head size 64, forward_kernel is faster.
template <int GROUPS, int N, int SLOTS>
struct StreamConfig {
  static constexpr int kGroups = GROUPS, kN = N, kSlots = SLOTS;
  static constexpr int kThreads = (GROUPS + 1) * kGroup, kTile = GROUPS * kRows;
  static constexpr int kRegisters = GROUPS == 2 ? 240 : 160;  // of a consumer's thread
};
// clang-format off
template <int HS> struct StreamForwardConfig;
template <> struct StreamForwardConfig<128> : StreamConfig<3, 80, 5> {};
template <> struct StreamForwardConfig<256> : StreamConfig<2, 64, 5> {};
// clang-format on

template <int HS, class C>
constexpr size_t stream_forward_bytes() {
  return Tile<C::kTile, HS>::kBytes + kSlotBytes + C::kSlots * (Tile<C::kN, HS>::kBytes + kSlotBytes);
}

template <int HS, class C, bool CAPPED>
__global__ __launch_bounds__(HOPPER ? C::kThreads : 32, 1) void stream_forward_kernel(
    bf16* out, float* lse, const __grid_constant__ CUtensorMap queries, const __grid_constant__ CUtensorMap keys, int B,
    int T, int NH, int NKV, float scale, float cap) {
#if HOPPER
  constexpr int M = C::kTile, N = C::kN;
  const Tile<M, HS> q_tile{shared_start()};
  auto tile = [&](int slot) { return Tile<N, HS>{q_tile.at + q_tile.kBytes + slot * Tile<N, HS>::kBytes}; };
  Ring<1> q_ring(tile(C::kSlots).at);
  Ring<C::kSlots> ring(q_ring.full + kSlotBytes);  // keys and values
  if (threadIdx.x == 0) {
    q_ring.init(1, C::kGroups * 4);  // the producer, and then the bytes that it has asked for; every consumer's warp
    ring.init(1, C::kGroups * 4);
    hopper::publish_barriers();
  }
  __syncthreads();

  Items items((T + M - 1) / M, B * NH, NH);
  auto key_tiles = [&](int q0) { return (min(q0 + M, T) + N - 1) / N; };

  if (group() == C::kGroups) {  // the producer
    give_registers<24>();
    if (threadIdx.x % kGroup > 0) return;
    while (items.next()) {
      const Place at = items.at;
      const int q0 = at.tile * M, tiles = key_tiles(q0), head = NH + at.head / (NH / NKV);
      auto load = [&](int head, int j) {
        ring.wait_empty();
        fetch_tile(tile(ring.slot), keys, head * HS, j * N, at.b, ring.full + 8 * ring.slot);
        ring.advance();
      };
      load(head, 0);
      q_ring.wait_empty();
      fetch_tile(q_tile, queries, at.head * HS, q0, at.b, q_ring.full);
      q_ring.advance();
      for (int j = 0; j < tiles; ++j) {  // in the order of their use: keys run one tile ahead of values
        if (j + 1 < tiles) load(head, j + 1);
        load(head + NKV, j);
      }
    }
    return;
  }

  take_registers<C::kRegisters>();
  const float scale2 = scale * kLog2e;  // exponentials are powers of two
  const Shared<M, HS> Q{q_tile, group() * kRows};
  float S[N / 8][4], O[HS / 8][4], m[2], l[2], factor[2];
  uint32_t P[N / 16][4];  // the weights of the tile before, as an A operand
  int k, v;               // slots
  // Starts the product of an item's queries with its first keys.
  auto start = [&] {
    q_ring.next();
    k = ring.next();
    multiply_transposed<N>(S, Q, tile(k));
  };
  auto have_scores = [&] {
    wait_products<0>(S);
    ring.release(k);
  };
  items.next();  // every block has one
  start();
  have_scores();
  for (;;) {
    const Place at = items.at;
    const int q0 = at.tile * M, row0 = q0 + group() * kRows, row = row0 + own_row(), tiles = key_tiles(q0),
              mine = min(tiles, (row0 + kRows - 1) / N + 1);  // tiles of keys that any query of this warpgroup sees
    m[0] = m[1] = -INFINITY, l[0] = l[1] = 0;
    weights<CAPPED>(S, m, l, factor, 0, row0, row, scale2, cap);
    to_operand<N>(P, S);
#pragma unroll
    for (int n = 0; n < HS / 8; ++n) O[n][0] = O[n][1] = O[n][2] = O[n][3] = 0;

    // As in forward_kernel: the scores of the next tile, then the values of this one, and softmax meanwhile.
    for (int j = 0; j < mine - 1; ++j) {
      k = ring.next();
      multiply_transposed<N>(S, Q, tile(k));
      v = ring.next();
      multiply<N, HS>(O, P, tile(v));
      wait_products<1>(S);
      ring.release(k);
      const bool rescale = weights<CAPPED>(S, m, l, factor, (j + 1) * N, row0, row, scale2, cap);
      finish_before_wait(l[0] + l[1] < 0);
      wait_products<0>(O);
      ring.release(v);
      if (rescale) multiply_rows(O, factor);
      to_operand<N>(P, S);
    }
    q_ring.release(0);
    for (int j = mine - 1; j < tiles; ++j) {  // the last tile; and those that only other warpgroups need
      if (j + 1 < tiles) ring.release(ring.next());
      v = ring.next();
      if (j == mine - 1) {
        multiply<N, HS>(O, P, tile(v));
        wait_products<0>(O);
      }
      ring.release(v);
    }

    auto finish = [&] {
      float* lse_row = lse + (size_t(at.b) * NH + at.head) * T;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        l[h] = row_sum(l[h]);
        if (lane() % 4 == 0 && row + 8 * h < T) lse_row[row + 8 * h] = m[h] * scale + log2_(l[h]) * kLn2;
      }
      store_rows<HS>(out + (size_t(at.b) * T * NH + at.head) * HS, size_t(NH) * HS, row0, T, O, 1 / l[0], 1 / l[1]);
    };
    if (!items.next()) {
      finish();
      break;
    }
    start();  // the next item's scores are under way while this one's results are stored
    finish();
    have_scores();
  }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward on Hopper, queries of large heads: a block per tile of 128 queries, 64 for each of its two warpgroups.

constexpr int kStreamQuerySlots = 3;

template <int HS>
constexpr size_t stream_query_bytes() {
  return 4 * Tile<kRows, HS>::kBytes + 2 * kSlotBytes +
         kStreamQuerySlots * (Tile<kRows, HS>::kBytes + kSlotBytes);
}

template <int HS, bool CAPPED>
__global__ __launch_bounds__(HOPPER ? 3 * kGroup : 32, 1) void stream_query_kernel(
    const __grid_constant__ Rows dqkv, float* workspace, const __grid_constant__ CUtensorMap qkv,
    const __grid_constant__ CUtensorMap dout, const __grid_constant__ CUtensorMap out, const float* lse,
    const __grid_constant__ Rotation rope, int B, int T, int NH, int NKV, float scale, float cap) {
#if HOPPER
  constexpr int N = kRows, M = 2 * kRows;
  using T64 = Tile<N, HS>;
  auto q_tile = [&](int group) { return T64{shared_start() + 2 * group * T64::kBytes}; };
  auto do_tile = [&](int group) { return T64{q_tile(group).at + T64::kBytes}; };
  auto tile = [&](int slot) { return T64{q_tile(2).at + slot * T64::kBytes}; };
  Ring<2> q_ring(tile(kStreamQuerySlots).at);  // a slot for each warpgroup's Q and dO
  Ring<kStreamQuerySlots> ring(q_ring.full + 2 * kSlotBytes);  // out, then keys and values
  if (threadIdx.x == 0) {
    q_ring.init(2, 4);
    ring.init(1, 8);
    hopper::publish_barriers();
  }
  __syncthreads();

  Items items((T + M - 1) / M, B * NH, NH);
  auto key_tiles = [&](int q0) { return (min(q0 + M, T) + N - 1) / N; };

  if (group() == 2) {
    give_registers<24>();
    if (threadIdx.x % kGroup > 0) return;
    while (items.next()) {
      const Place at = items.at;
      const int q0 = at.tile * M, head = NH + at.head / (NH / NKV);
      auto load = [&](const CUtensorMap& matrix, int head, int row) {
        ring.wait_empty();
        fetch_tile(tile(ring.slot), matrix, head * HS, row, at.b, ring.full + 8 * ring.slot);
        ring.advance();
      };
      for (int g = 0; g < 2; ++g) load(out, at.head, q0 + g * kRows);
      for (int g = 0; g < 2; ++g) {
        q_ring.wait_empty();
        fetch_tile(q_tile(g), qkv, at.head * HS, q0 + g * kRows, at.b, q_ring.full + 8 * g);
        fetch_tile(do_tile(g), dout, at.head * HS, q0 + g * kRows, at.b, q_ring.full + 8 * g);
        q_ring.advance();
      }
      for (int j = key_tiles(q0) - 1; j >= 0; --j) {  // values are done with first: their slots are free again early
        load(qkv, head + NKV, j * N);
        load(qkv, head, j * N);
      }
    }
    return;
  }

  take_registers<240>();
  const float scale2 = scale * kLog2e;
  const T64 my_q = q_tile(group()), my_do = do_tile(group());
  const Shared<N, HS> Q{my_q, 0}, dO{my_do, 0};
  // One warpgroup starts its products while the other is at its softmax: barrier 1 + g passes the turn to warpgroup g.
  auto take_turn = [&] { asm volatile("bar.sync %0, %1;" ::"r"(1 + group()), "n"(2 * kGroup) : "memory"); };
  auto pass_turn = [&] { asm volatile("bar.arrive %0, %1;" ::"r"(2 - group()), "n"(2 * kGroup) : "memory"); };
  if (group() == 1) pass_turn();

  for (int parity = 0; items.next(); parity ^= 1) {
    const Place at = items.at;
    const int q0 = at.tile * M, row0 = q0 + group() * kRows, row = row0 + own_row();
    const size_t head = size_t(at.b) * NH + at.head;
    const Numbers numbers(workspace, size_t(B) * NH, T, head);
    float D[2], lse2[2];
    for (int g = 0; g < 2; ++g) {
      const int o = ring.next();
      if (g == group()) {
        hopper::wait_barrier(q_ring.full + 8 * g, parity);
        row_products(D, my_do, tile(o));  // D = rowsum(dO out)
      }
      ring.release(o);
    }
    numbers.leave(lse2, D, lse + head * T, row, T);

    float dQ[HS / 8][4] = {};
    for (int j = key_tiles(q0) - 1; j >= 0; --j) {
      const int v = ring.next();
      take_turn();
      if (j * N > row0 + kRows - 1) {  // for the other warpgroup
        pass_turn();
        ring.release(v);
        ring.release(ring.next());
        continue;
      }
      float S[N / 8][4], dP[N / 8][4];
      multiply_transposed<N>(dP, dO, tile(v));
      const int k = ring.next();
      multiply_transposed<N>(S, Q, tile(k));
      pass_turn();
      wait_products<1>(dP);
      ring.release(v);
      wait_products<0>(S);
      weights_again<CAPPED>(S, lse2, j * N, row0, row, scale2, cap);
      score_gradients<CAPPED>(S, dP, D, lse2, scale2, cap);
      uint32_t dS[N / 16][4];
      to_operand<N>(dS, S);
      multiply<N, HS>(dQ, dS, tile(k));
      wait_products<0>(dQ);
      ring.release(k);
    }
    write_turned_back<false>(my_q, dQ, scale, rope, row0, T);
    finish_rows();
    send_rows(dqkv, at.b, row0, at.head * HS, my_q);
    wait_sent();
    q_ring.release(group());
  }
  if (group() == 0) take_turn();  // nobody leaves a turn behind
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward on Hopper, keys and values of large heads: a block per tile of 64 keys, for which its two warpgroups do two
// products each. The first makes P^T and dV, the second dP^T, dS^T and dK; P^T goes from one to the other through shared
// memory, each number from a thread to the thread that has its place in the other warpgroup.

template <int HS>
constexpr int kStreamQueries = HS == 256 ? 64 : 128;  // of a tile

template <int HS>
constexpr size_t stream_key_bytes() {
  // K, V, two tiles of Q and of dO, with lse and D, and P twice.
  return 2 * (Tile<kRows, HS>::kBytes + kSlotBytes) +
         4 * (Tile<kStreamQueries<HS>, HS>::kBytes + kStreamQueries<HS> * sizeof(float) + kSlotBytes) +
         2 * (kRows * kStreamQueries<HS> * sizeof(float) + kSlotBytes);
}

template <int HS, bool CAPPED>
__global__ __launch_bounds__(HOPPER ? 3 * kGroup : 32, 1) void stream_key_kernel(
    const __grid_constant__ Rows dqkv, const __grid_constant__ CUtensorMap keys,
    const __grid_constant__ CUtensorMap queries, const __grid_constant__ CUtensorMap dout, float* workspace,
    const __grid_constant__ Rotation rope, int B, int T, int NH, int NKV, float scale, float cap) {
#if HOPPER
  constexpr int N = kStreamQueries<HS>;
  using KeyTile = Tile<kRows, HS>;
  using QueryTile = Tile<N, HS>;
  const KeyTile k_tile{shared_start()}, v_tile{k_tile.at + KeyTile::kBytes};
  auto q_tile = [&](int slot) { return QueryTile{v_tile.at + KeyTile::kBytes + slot * QueryTile::kBytes}; };
  auto do_tile = [&](int slot) { return q_tile(2 + slot); };
  const uint32_t exchange = do_tile(2).at, statistics = exchange + 2 * kRows * N * 4;
  auto lse_tile = [&](int slot) { return statistics + slot * N * 4; };
  auto D_tile = [&](int slot) { return lse_tile(2 + slot); };
  Ring<1> k_ring(D_tile(2)), v_ring(k_ring.full + kSlotBytes);
  Ring<2> q_ring(v_ring.full + kSlotBytes), do_ring(q_ring.full + 2 * kSlotBytes),
      weights_ring(do_ring.full + 2 * kSlotBytes);
  if (threadIdx.x == 0) {
    k_ring.init(1, 4);
    v_ring.init(1, 4);
    q_ring.init(1, 8);
    do_ring.init(1, 8);
    weights_ring.init(kGroup, 4);
    hopper::publish_barriers();
  }
  __syncthreads();

  const int row_tiles = (T + kRows - 1) / kRows, heads = NH / NKV;
  Items items(row_tiles, B * NKV, NKV);
  // Steps: the heads of the group, and of each the tiles of queries from the diagonal on.
  auto first_key = [&](Place at) { return (row_tiles - 1 - at.tile) * kRows; };  // the first keys have most queries
  auto steps_per_head = [&](int k0) { return (T + N - 1) / N - k0 / N; };

  if (group() == 2) {
    give_registers<24>();
    if (threadIdx.x % kGroup > 0) return;
    while (items.next()) {
      const Place at = items.at;
      const int k0 = first_key(at), per_head = steps_per_head(k0);
      auto load_fixed = [&](Ring<1>& ring, KeyTile tile, int head) {
        ring.wait_empty();
        fetch_tile(tile, keys, head * HS, k0, at.b, ring.full);
        ring.advance();
      };
      auto load = [&](Ring<2>& ring, QueryTile tile, const CUtensorMap& matrix, int head, int q0, uint32_t to,
                      const float* numbers) {
        ring.wait_empty();
        const uint32_t full = ring.full + 8 * ring.slot;
        hopper::expect_more_bytes(full, N * 4);
        hopper::load_bytes(to, numbers + q0, N * 4, full);
        fetch_tile(tile, matrix, head * HS, q0, at.b, full);
        ring.advance();
      };
      load_fixed(k_ring, k_tile, NH + at.head);
      load_fixed(v_ring, v_tile, NH + NKV + at.head);
      for (int h = 0; h < heads; ++h)
        for (int i = 0; i < per_head; ++i) {
          const int head = at.head * heads + h, q0 = (k0 / N + i) * N;
          const Numbers numbers(workspace, size_t(B) * NH, T, size_t(at.b) * NH + head);
          load(q_ring, q_tile(q_ring.slot), queries, head, q0, lse_tile(q_ring.slot), numbers.lse2);
          load(do_ring, do_tile(do_ring.slot), dout, head, q0, D_tile(do_ring.slot), numbers.minus_D);
        }
    }
    return;
  }

  take_registers<240>();
  const float scale2 = scale * kLog2e;
  const int row = own_row();
  float acc[HS / 8][4];      // dV or dK
  float S[N / 8][4];         // rows are keys
  uint32_t operand[N / 16][4];
  auto clear = [&] {
#pragma unroll
    for (int n = 0; n < HS / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
  };
  // Where the thread's numbers of piece n lie in P.
  auto place_of = [&](int slot, int n) { return exchange + ((slot * (N / 8) + n) * kGroup + threadIdx.x % kGroup) * 16; };

  if (group() == 0) {
    while (items.next()) {
      const Place at = items.at;
      const int k0 = first_key(at), per_head = steps_per_head(k0), steps = heads * per_head;
      const Shared<kRows, HS> K{k_tile, 0};
      // The scores of a step become P^T, which the other warpgroup gets.
      auto to_weights = [&](int step, int q) {
        cap_scores<CAPPED>(S, cap);
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          // Rows are keys here, so each column, a query, has its own lse.
          const float2 lse2 = load_pair(lse_tile(q) + (n * 8 + lane() % 4 * 2) * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i) S[n][i] = exp2_(S[n][i] * scale2 - (i % 2 ? lse2.y : lse2.x));
        }
        if (step % per_head == 0) {  // the diagonal passes through
#pragma unroll
          for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (k0 / N * N + n * 8 + lane() % 4 * 2 + i % 2 < k0 + row + i / 2 * 8) S[n][i] = 0;
        }
        q_ring.release(q);
        weights_ring.wait_empty();
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
          asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(place_of(weights_ring.slot, n)), "f"(S[n][0]),
                       "f"(S[n][1]), "f"(S[n][2]), "f"(S[n][3])
                       : "memory");
        hopper::arrive(weights_ring.full + 8 * weights_ring.slot);
        weights_ring.advance();
      };
      k_ring.next();
      int q = q_ring.next();
      multiply_transposed<N>(S, K, q_tile(q));
      wait_products<0>(S);
      to_weights(0, q);
      to_operand<N>(operand, S);
      clear();
      for (int step = 0; step < steps - 1; ++step) {
        q = q_ring.next();
        multiply_transposed<N>(S, K, q_tile(q));
        const int d = do_ring.next();
        // In the forward pass out = P V, so dV = P^T dO.
        multiply<N, HS>(acc, operand, do_tile(d));
        wait_products<1>(S);
        to_weights(step + 1, q);
        wait_products<0>(acc);
        do_ring.release(d);
        to_operand<N>(operand, S);
      }
      const int d = do_ring.next();
      multiply<N, HS>(acc, operand, do_tile(d));
      wait_products<0>(acc);
      do_ring.release(d);
      write_rows(k_tile, acc);  // nobody else reads K
      finish_rows();
      send_rows(dqkv, at.b, k0, (NH + NKV + at.head) * HS, k_tile);
      wait_sent();
      k_ring.release(0);
    }
  } else {
    while (items.next()) {
      const Place at = items.at;
      const int k0 = first_key(at), steps = heads * steps_per_head(k0);
      const Shared<kRows, HS> V{v_tile, 0};
      v_ring.next();
      clear();
      for (int step = 0; step < steps; ++step) {
        const int d = do_ring.next();
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {  // dP begins with -D
          const float2 minus_D = load_pair(D_tile(d) + (n * 8 + lane() % 4 * 2) * 4);
          S[n][0] = S[n][2] = minus_D.x, S[n][1] = S[n][3] = minus_D.y;
        }
        multiply_transposed<N>(S, V, do_tile(d), true);
        const int q = q_ring.next(), p = weights_ring.next();
        wait_products<0>(S);
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          float P[4];
          asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(P[0]), "=f"(P[1]), "=f"(P[2]), "=f"(P[3])
                       : "r"(place_of(p, n))
                       : "memory");
          const float2 lse2 = CAPPED ? load_pair(lse_tile(q) + (n * 8 + lane() % 4 * 2) * 4) : float2();
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float slope = CAPPED ? soft_cap_slope(P[i], i % 2 ? lse2.y : lse2.x, 1 / (cap * scale2)) : 1;
            S[n][i] *= P[i] * slope;
          }
        }
        weights_ring.release(p);
        do_ring.release(d);
        to_operand<N>(operand, S);
        // In the forward pass S = scale Q K^T, so dK = scale dS^T Q.
        multiply<N, HS>(acc, operand, q_tile(q));
        wait_products<0>(acc);
        q_ring.release(q);
      }
      write_turned_back<false>(v_tile, acc, scale, rope, k0, T);
      finish_rows();
      send_rows(dqkv, at.b, k0, (NH + at.head) * HS, v_tile);
      wait_sent();
      v_ring.release(0);
    }
  }
#endif
}

}  // namespace flash

// ---------------------------------------------------------------------------------------------------------------------
// Launches

// Head sizes that the flash kernels know.
inline bool flash_attention_supports(int HS) { return HS == 32 || HS == 64 || HS == 128 || HS == 256; }

// Calls work(constant) with the head size as a constant.
template <class Work>
void with_flash_head_size(int HS, Work work) {
  switch (HS) {
    case 32: return work(std::integral_constant<int, 32>());
    case 64: return work(std::integral_constant<int, 64>());
    case 128: return work(std::integral_constant<int, 128>());
    case 256: return work(std::integral_constant<int, 256>());
    default: throw std::runtime_error("flash attention: the head size must be 32, 64, 128 or 256");
  }
}

// Calls work(constant) with whether there is a soft cap as a constant.
template <class Work>
void with_cap(double softcap, Work work) {
  if (softcap) return work(std::true_type());
  work(std::false_type());
}

// A buffer (B, T, columns) as what kernels fill their tiles for heads of HS from, or what they send them to.
template <int HS>
flash::Rows rows_of(const Cuda& be, const bf16* buffer, int B, int T, int columns) {
  CUtensorMap map = {};
  if (be.capability == 90)
    map = hopper::describe_rows(buffer, B, T, columns, flash::kBoxRows<HS>, flash::Tile<flash::kRows, HS>::kPanel);
  return {const_cast<bf16*>(buffer), T, columns, map};
}

// Whether the program was built for Hopper's own instructions (sm_90a) and runs there: only then does the kernel have
// its bound of threads.
template <class Kernel>
bool has_stream_kernel(const Cuda& be, Kernel* kernel, int threads) {
  cudaFuncAttributes attributes;
  if (be.capability != 90) return false;
  check(cudaFuncGetAttributes(&attributes, kernel), "flash_attention");
  return attributes.maxThreadsPerBlock == threads;
}

// Causal attention with scale 1/sqrt(HS); query head h reads key/value head h / (NH/NKV). bf16, sm_80 and up, T >= 1,
// 1 <= B < 2^16. out: (B, T, NH, HS). lse: (B, NH, T) fp32, log sum exp of the scaled scores, in nats. qkv: (B, T,
// NH + 2*NKV, HS). Equal to torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
// where softcap is 0.
inline void flash_attention_forward(Cuda& be, bf16* out, float* lse, const bf16* qkv, int B, int T, int NH, int NKV,
                                    int HS, double softcap = 0) {
  with_flash_head_size(HS, [&](auto size) {
    with_cap(softcap, [&](auto capped) {
      const float scale = 1 / std::sqrt(float(HS)), cap = float(softcap) * std::sqrt(float(HS));
      if constexpr (size() >= 128) {
        using C = flash::StreamForwardConfig<size()>;
        auto* kernel = flash::stream_forward_kernel<size(), C, capped()>;
        if (has_stream_kernel(be, kernel, C::kThreads)) {
          const int columns = (NH + 2 * NKV) * HS, items = int(divide_up(T, C::kTile)) * B * NH;
          return launch(be, "flash_attention_forward", kernel, std::min(items, be.multiprocessors), C::kThreads,
                        flash::stream_forward_bytes<size(), C>(), out, lse,
                        hopper::describe_rows(qkv, B, T, columns, C::kTile),
                        hopper::describe_rows(qkv, B, T, columns, C::kN), B, T, NH, NKV, scale, cap);
        }
      }
      using C = flash::ForwardConfig<size()>;
      launch(be, "flash_attention_forward", flash::forward_kernel<size(), C, capped()>,
             dim3(divide_up(T, flash::kRows), NH, B), flash::kGroup, flash::forward_bytes<size(), C>(),
             rows_of<size()>(be, out, B, T, NH * HS), lse, rows_of<size()>(be, qkv, B, T, (NH + 2 * NKV) * HS), T, NH,
             NKV, scale, cap);
    });
  });
}

// The gradient dqkv (B, T, NH + 2*NKV, HS), assigned, from dout (B, T, NH, HS) and the forward's qkv, out and lse.
// workspace: flash::workspace_numbers(B, T, NH) fp32. With a rotation, whose table cos_sin is (T, R/2, 2) fp32, it is the
// gradient of what RoPE got. Deterministic: no atomics, every sum in a fixed order. B < 2^16.
inline void flash_attention_backward(Cuda& be, bf16* dqkv, float* workspace, const bf16* dout, const bf16* qkv,
                                     const bf16* out, const float* lse, int B, int T, int NH, int NKV, int HS,
                                     double softcap = 0, const float* cos_sin = nullptr, int R = 0,
                                     bool interleaved = false) {
  const float scale = 1 / std::sqrt(float(HS)), cap = float(softcap) * std::sqrt(float(HS));
  const int columns = (NH + 2 * NKV) * HS;
  const dim3 blocks(divide_up(T, flash::kRows), NH, B);
  with_flash_head_size(HS, [&](auto size) {
    with_cap(softcap, [&](auto capped) {
      using Q = flash::QueryConfig<size()>;
      using K = flash::KeyConfig<size()>;
      const flash::Rows to = rows_of<size()>(be, dqkv, B, T, columns);
      flash::Rotation rope = {cos_sin, R, interleaved};
      if (flash::turns_all<size()>(rope))
        rope.table = rows_of<2 * size()>(be, reinterpret_cast<const bf16*>(cos_sin), 1, T, 2 * HS);
      bool done = false;
      if constexpr (size() == 256) {
        auto* kernel = flash::stream_query_kernel<size(), capped()>;
        if ((done = has_stream_kernel(be, kernel, 3 * flash::kGroup))) {
          const int items = int(divide_up(T, 2 * flash::kRows)) * B * NH;
          launch(be, "flash_attention_backward (queries)", kernel, std::min(items, be.multiprocessors),
                 3 * flash::kGroup, flash::stream_query_bytes<size()>(), to, workspace,
                 hopper::describe_rows(qkv, B, T, columns, flash::kRows),
                 hopper::describe_rows(dout, B, T, NH * HS, flash::kRows),
                 hopper::describe_rows(out, B, T, NH * HS, flash::kRows), lse, rope, B, T, NH, NKV, scale, cap);
        }
      }
      if (!done)
        launch(be, "flash_attention_backward (queries)", flash::query_kernel<size(), Q, capped()>, blocks,
               flash::kGroup, flash::query_bytes<size(), Q>(), to, workspace, rows_of<size()>(be, dout, B, T, NH * HS),
               rows_of<size()>(be, qkv, B, T, columns), rows_of<size()>(be, out, B, T, NH * HS), lse, rope, T, NH,
               NKV, scale, cap);
      if constexpr (size() >= 128) {
        auto* kernel = flash::stream_key_kernel<size(), capped()>;
        if (has_stream_kernel(be, kernel, 3 * flash::kGroup)) {
          constexpr int queries = flash::kStreamQueries<size()>;
          const int items = int(divide_up(T, flash::kRows)) * B * NKV;
          return launch(be, "flash_attention_backward (keys)", kernel, std::min(items, be.multiprocessors),
                        3 * flash::kGroup, flash::stream_key_bytes<size()>(), to,
                        hopper::describe_rows(qkv, B, T, columns, flash::kRows),
                        hopper::describe_rows(qkv, B, T, columns, queries),
                        hopper::describe_rows(dout, B, T, NH * HS, queries), workspace, rope, B, T, NH, NKV, scale,
                        cap);
        }
      }
      auto keys = [&](auto* kernel) {
        launch(be, "flash_attention_backward (keys)", kernel, dim3(blocks.x, NKV, B), flash::kGroup,
               flash::key_bytes<size(), K>(), to, rows_of<size()>(be, dout, B, T, NH * HS),
               rows_of<size()>(be, qkv, B, T, columns), workspace, rope, T, NH, NKV, scale, cap);
      };
      if constexpr (size() <= 128) {
        keys(flash::key_kernel<size(), K, true, true, capped()>);
      } else {
        keys(flash::key_kernel<size(), K, true, false, capped()>);
        keys(flash::key_kernel<size(), K, false, true, capped()>);
      }
    });
  });
}

// attention_statistics() of run/diagnostics.cuh without the sum of the entropies.
inline void flash_attention_statistics(Cuda& be, double* max_logit, float* entropies, const bf16* qkv, const float* lse,
                                       int B, int T, int NH, int NKV, int HS, double softcap = 0) {
  with_flash_head_size(HS, [&](auto size) {
    with_cap(softcap, [&](auto capped) {
      using C = flash::ForwardConfig<size()>;
      launch(be, "flash_attention_statistics", flash::statistics_kernel<size(), C, capped()>,
             dim3(divide_up(T, flash::kRows), NH, B), flash::kGroup, flash::statistics_bytes<size(), C>(), max_logit,
             entropies, rows_of<size()>(be, qkv, B, T, (NH + 2 * NKV) * HS), lse, T, NH, NKV,
             1 / std::sqrt(float(HS)), float(softcap) * std::sqrt(float(HS)));
    });
  });
}

#endif  // __CUDACC__
