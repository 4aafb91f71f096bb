#pragma once
// Hopper's copy engine (TMA, sm_90a): one thread asks for a box of a matrix, and its bytes come to shared memory, or go
// from there, by themselves. And barriers in shared memory, which say when they have come.

#include <stdexcept>

#include "device/backend.h"

#ifdef __CUDACC__

#include <cuda.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1  // for code that only this target has: the copy engine, barriers that count bytes, wgmma
#else
#define HOPPER 0
#endif

namespace hopper {

// Describes a tensor of bf16 to the copy engine, which takes boxes of it. Its last dimension, the first in `sizes` and
// `box`, runs along memory; a box has 64 or 32 of it.
template <int DIMENSIONS>
CUtensorMap describe(const bf16* tensor, const cuuint64_t (&sizes)[DIMENSIONS], const cuuint32_t (&box)[DIMENSIONS]) {
  static const auto encode = [] {  // the driver's function
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint64_t strides[DIMENSIONS - 1];  // in bytes, of all dimensions but the last
  for (int i = 0; i < DIMENSIONS - 1; ++i) strides[i] = sizes[i] * (i ? strides[i - 1] : sizeof(bf16));
  cuuint32_t steps[DIMENSIONS];
  for (cuuint32_t& step : steps) step = 1;
  CUtensorMap map;
  if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, DIMENSIONS, const_cast<bf16*>(tensor), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: a tensor that the copy engine does not take");
  return map;
}
// Of a matrix (rows, columns), boxes of `box_rows` rows of 64 columns.
inline CUtensorMap describe(const bf16* matrix, int rows, int columns, int box_rows) {
  return describe<2>(matrix, {cuuint64_t(columns), cuuint64_t(rows)}, {64, cuuint32_t(box_rows)});
}
// Of a tensor (B, T, columns), boxes of `rows` rows of `width` columns of one sequence.
inline CUtensorMap describe_rows(const bf16* tensor, int B, int T, int columns, int rows, int width = 64) {
  return describe<3>(tensor, {cuuint64_t(columns), cuuint64_t(T), cuuint64_t(B)},
                     {cuuint32_t(width), cuuint32_t(rows), 1});
}

#if HOPPER

// ---------------------------------------------------------------------------------------------------------------------
// Barriers in shared memory. A phase of one ends when as many threads have arrived as it was told, and the bytes that
// it was told to expect as well.

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Others, the copy engine among them, may use what was initialised after this and a barrier of all threads.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// An arrival, with bytes that are to come.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// The same without an arrival.
__device__ __forceinline__ void expect_more_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The same address in block `rank` of the cluster, and an arrival at a barrier there.
__device__ __forceinline__ uint32_t in_block(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// The copy engine. A box of a matrix comes to shared memory with its 16-byte chunks permuted within rows of 128 bytes
// (the 128-byte swizzle; with boxes of 32 columns within 64 bytes, the 64-byte one), as wgmma expects it; what lies
// outside the matrix arrives as zeros and is not written back.

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& matrix, int column, int row,
                                         uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               ::"r"(to), "l"(&matrix), "r"(barrier), "r"(column), "r"(row)
               : "memory");
}
// The same from describe_rows(): of sequence b.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& matrix, int column, int row, int b,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          to),
      "l"(&matrix), "r"(barrier), "r"(column), "r"(row), "r"(b)
      : "memory");
}
// So many bytes as they lie in memory; all three are multiples of 16.
__device__ __forceinline__ void load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// As the first, to this address in both blocks of the cluster; either block's barrier counts the bytes.
__device__ __forceinline__ void load_box_for_both(uint32_t to, const CUtensorMap& matrix, int column, int row,
                                                  uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&matrix), "r"(barrier), "r"(column), "r"(row), "h"(uint16_t(3))
      : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap& matrix, int column, int row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&matrix), "r"(from),
               "r"(column), "r"(row)
               : "memory");
}
__device__ __forceinline__ void store_box(const CUtensorMap& matrix, int column, int row, int b, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&matrix),
               "r"(from), "r"(column), "r"(row), "r"(b)
               : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until they have read shared memory.
__device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// What threads wrote to shared memory can be read by the copy engine after this and a barrier.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif  // HOPPER

}  // namespace hopper

#endif  // __CUDACC__
