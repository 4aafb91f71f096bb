#pragma once
// The exchange of tensors between ranks (device/ranks.h), queued like every other operation of the backend.
//
// The flat array of all gradients is divided into as many shards as there are ranks; rank r looks after shard r.
//
//     add_lanes    what an all-reduce would begin with: every rank has the gradient of a lane, and receives its own
//                  shard of all of them; it adds them up itself, in the order of the ranks, so that the sum has the same
//                  bits whoever computed what (NCCL's reductions promise no order)
//     all_gather   what an all-reduce would end with: every rank has its own row and receives all others
//
// On GPUs NCCL carries them, loaded when it is needed: neither a build nor a single GPU needs it. On the CPU everything
// goes through the sockets to rank 0, which hands it on.

#include <dlfcn.h>

#include <memory>
#include <vector>

#include "device/backend.h"
#include "device/ranks.h"

// Elements of a shard that travel at a time, so that what a rank receives from all others stays within 256 MB.
inline size_t piece_of(size_t shard, int ranks) { return std::min(shard, (size_t(1) << 26) / ranks / 64 * 64); }
// Bytes of memory that they need.
inline size_t exchange_bytes(size_t shard, int ranks) {
  return ranks > 1 ? ranks * piece_of(shard, ranks) * sizeof(float) : 0;
}

template <class Backend>
class Comm;

// sum (n) = or += (first or not) lanes 0 + 1 + ..., in this order; `own` (n) is lane `rank`, the others are rows of
// `received` (ranks, n), whose row `rank` is not read. sum may be own.
inline void add_rows_in_order(Cpu&, float* sum, const float* own, const float* received, int rank, int ranks, size_t n,
                              bool first) {
#pragma omp parallel for
  for (size_t i = 0; i < n; ++i) {
    float x = 0;
    for (int r = 0; r < ranks; ++r) {
      const float lane = r == rank ? own[i] : received[r * n + i];
      x = r > 0 ? x + lane : first ? lane : sum[i] + lane;
    }
    sum[i] = x;
  }
}

template <>
class Comm<Cpu> {
 public:
  Ranks& ranks;
  Comm(Cpu& be, Ranks& all) : ranks(all), be_(be) {}

  // sum (shard) = or += (first or not) this rank's shard of the lanes of rank 0, 1, ...; lane (ranks, shard) is that of
  // this rank. sum may be its own row.
  void add_lanes(float* sum, const float* lane, size_t shard, bool first) {
    const int R = ranks.size, me = ranks.rank;
    const size_t piece = piece_of(shard, R);
    std::vector<float> received(R > 1 ? R * piece : 0), all(R > 1 && me == 0 ? R * R * piece : 0);
    for (size_t at = 0; at < shard; at += piece) {
      const size_t n = std::min(piece, shard - at);
      if (me > 0) {
        for (int r = 0; r < R; ++r) ranks.send(0, lane + r * shard + at, n * sizeof(float));
        ranks.receive(0, received.data(), R * n * sizeof(float));
      } else if (R > 1) {  // all (to, from, n)
        for (int from = 0; from < R; ++from)
          for (int to = 0; to < R; ++to) {
            float* row = &all[(to * R + from) * n];
            if (from) ranks.receive(from, row, n * sizeof(float));
            else std::copy_n(lane + to * shard + at, n, row);
          }
        for (int to = 1; to < R; ++to) ranks.send(to, &all[to * R * n], R * n * sizeof(float));
        std::copy_n(all.data(), R * n, received.data());
      }
      add_rows_in_order(be_, sum + at, lane + me * shard + at, received.data(), me, R, n, first);
    }
  }

  // rows (ranks, bytes): this rank's row goes to all, theirs come here.
  void all_gather(void* rows, size_t bytes) { ranks.all_gather(rows, bytes); }

 private:
  Cpu& be_;
};

// ---------------------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__

// The functions of NCCL that are used, as nccl.h declares them.
struct Nccl {
  struct Id {
    char bytes[128];
  };
  using Handle = struct ncclComm*;
  static constexpr int kBytes = 0;  // ncclInt8

  int (*GetUniqueId)(Id*) = nullptr;
  int (*CommInitRank)(Handle*, int ranks, Id, int rank) = nullptr;
  int (*GroupStart)() = nullptr;
  int (*GroupEnd)() = nullptr;
  int (*Send)(const void*, size_t count, int type, int to, Handle, cudaStream_t) = nullptr;
  int (*Recv)(void*, size_t count, int type, int from, Handle, cudaStream_t) = nullptr;
  int (*AllGather)(const void* own, void* all, size_t count_of_one, int type, Handle, cudaStream_t) = nullptr;
  const char* (*GetLastError)(Handle) = nullptr;

  Nccl() {
    const char* file = std::getenv("PARTIAL_ROPE_NCCL");
    void* library = ::dlopen(file ? file : "libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    auto find = [&](auto& function, const char* name) {
      void* found = library ? ::dlsym(library, name) : nullptr;
      if (!found)
        throw UserError(std::string("several GPUs need NCCL: ") + ::dlerror() +
                        "; it comes as the package libnccl2 and in Python's nvidia-nccl-cu13 (site-packages/nvidia/nccl/"
                        "lib/libnccl.so.2); PARTIAL_ROPE_NCCL in the environment says where");
      function = reinterpret_cast<std::decay_t<decltype(function)>>(found);
    };
    find(GetUniqueId, "ncclGetUniqueId");
    find(CommInitRank, "ncclCommInitRank");
    find(GroupStart, "ncclGroupStart");
    find(GroupEnd, "ncclGroupEnd");
    find(Send, "ncclSend");
    find(Recv, "ncclRecv");
    find(AllGather, "ncclAllGather");
    find(GetLastError, "ncclGetLastError");
  }
  void check(int result, const char* what) const {
    if (result)
      throw std::runtime_error(std::string(what) + ": error " + std::to_string(result) + " of NCCL: " +
                               GetLastError(nullptr) + "; NCCL_DEBUG=WARN in the environment says more");
  }
};

template <int W>
__global__ void __launch_bounds__(256) add_rows_in_order_kernel(float* sum, const float* own, const float* received,
                                                                int rank, int ranks, size_t n, bool first) {
  const size_t i = (blockIdx.x * size_t(256) + threadIdx.x) * W;
  if (i >= n) return;
  float x[W], lane[W];
  if (!first) load<W>(x, sum + i);
  for (int r = 0; r < ranks; ++r) {
    load<W>(lane, r == rank ? own + i : received + r * n + i);
#pragma unroll
    for (int k = 0; k < W; ++k) x[k] = first && r == 0 ? lane[k] : x[k] + lane[k];
  }
  store<W>(sum + i, x);
}
inline void add_rows_in_order(Cuda& be, float* sum, const float* own, const float* received, int rank, int ranks,
                              size_t n, bool first) {
  const bool packs = wide(int(n % 4), sum, own, received);
  launch(be, "add_lanes", packs ? add_rows_in_order_kernel<4> : add_rows_in_order_kernel<1>,
         divide_up(n, packs ? 1024 : 256), 256, 0, sum, own, received, rank, ranks, n, first);
}

template <>
class Comm<Cuda> {
 public:
  Ranks& ranks;

  // UserError where NCCL is missing, or the GPUs are not one of the same model for each rank.
  Comm(Cuda& be, Ranks& all) : ranks(all), be_(be) {
    if (ranks.size == 1) return;
    const std::vector<std::string> gpus = ranks.gather(be.name_of_gpu), ids = ranks.gather(host_name() + be.id_of_gpu);
    for (size_t r = 1; r < gpus.size(); ++r) {
      if (gpus[r] != gpus[0])
        throw UserError(ranks.name(int(r)) + " has a " + gpus[r] + ", rank 0 a " + gpus[0] +
                        ": all GPUs must be of one model, or their results would differ");
      for (size_t other = 0; other < r; ++other)
        if (ids[r] == ids[other])
          throw UserError(ranks.name(int(other)) + " and rank " + std::to_string(r) +
                          " would share a GPU: start at most one rank for each GPU of a host");
    }
    nccl_ = std::make_unique<Nccl>();
    Nccl::Id id = {};
    if (ranks.root()) nccl_->check(nccl_->GetUniqueId(&id), "ncclGetUniqueId");
    ranks.broadcast(&id, sizeof id);
    nccl_->check(nccl_->CommInitRank(&handle_, ranks.size, id, ranks.rank), "ncclCommInitRank");
  }
  // NCCL's handle is left to the end of the process: to give it back would wait for ranks that may be gone.

  void add_lanes(float* sum, const float* lane, size_t shard, bool first) {
    const int R = ranks.size, me = ranks.rank;
    const size_t piece = piece_of(shard, R);
    if (received_.bytes < exchange_bytes(shard, R)) received_ = Buffer<Cuda>(be_, exchange_bytes(shard, R));
    float* received = received_.as<float>();
    for (size_t at = 0; at < shard; at += piece) {
      const size_t n = std::min(piece, shard - at);
      if (R > 1) {
        nccl_->check(nccl_->GroupStart(), "ncclGroupStart");
        for (int r = 0; r < R; ++r) {
          if (r == me) continue;
          nccl_->check(nccl_->Send(lane + r * shard + at, n * 4, Nccl::kBytes, r, handle_, be_.stream), "ncclSend");
          nccl_->check(nccl_->Recv(received + r * n, n * 4, Nccl::kBytes, r, handle_, be_.stream), "ncclRecv");
        }
        nccl_->check(nccl_->GroupEnd(), "ncclGroupEnd");
      }
      add_rows_in_order(be_, sum + at, lane + me * shard + at, received, me, R, n, first);
    }
  }

  void all_gather(void* rows, size_t bytes) {
    if (ranks.size == 1) return;
    nccl_->check(nccl_->AllGather(static_cast<char*>(rows) + ranks.rank * bytes, rows, bytes, Nccl::kBytes, handle_,
                                  be_.stream),
                 "ncclAllGather");
  }

 private:
  Cuda& be_;
  std::unique_ptr<Nccl> nccl_;
  Nccl::Handle handle_ = nullptr;
  Buffer<Cuda> received_;
};

#endif  // __CUDACC__
