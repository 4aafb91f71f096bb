#pragma once
// What a device is: memory, copies, order of execution, number types, errors. Nothing here knows of models.
//
// Every operation of the trainer is a function with two overloads, on the type of its first argument: `Cpu` and `Cuda`.
// The CPU's is the definition, loops in the order of the formula, but for two operations that take most of the time:
// the matrix product (device/matmul.cuh) is made tile by tile from packed panels, and attention of such products; a
// product's definition is one line, attention's stands first in attention.cuh, and the tests hold both to it. The
// `Cuda` version is the speed. A build without nvcc has `Cpu` only.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <type_traits>
#include <utility>

#include <omp.h>
#include <unistd.h>

#include "run/error.h"

#ifdef __CUDACC__
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
using bf16 = __nv_bfloat16;
#define HOST_DEVICE __host__ __device__  // a function for kernels as well
#else
#define HOST_DEVICE
#endif

// The type of statistics, losses and parameter gradients that go with tensors of type Real: fp32, also under bf16;
// double under double (the gradient tests).
template <class Real>
using Acc = std::conditional_t<std::is_same_v<Real, double>, double, float>;

template <class Real>
constexpr const char* dtype_name() {
  return sizeof(Real) == 8 ? "fp64" : sizeof(Real) == 4 ? "fp32" : "bf16";
}

// ---------------------------------------------------------------------------------------------------------------------
// CPU: main memory, and operations that have finished when they return.

struct Cpu {
  static constexpr const char* name = "cpu";

  // Memory is zeroed, at a multiple of 64 bytes.
  void* allocate(size_t bytes) {
    // 64: a cache line, and the widest vector; aligned_alloc wants a multiple of it.
    size_t padded = (bytes + 63) / 64 * 64;
    void* p = std::aligned_alloc(64, padded ? padded : 64);
    if (!p)
      throw UserError("out of memory: could not allocate " + std::to_string(bytes >> 20) +
                      " MiB; try a smaller --batch or --accumulate");
    std::memset(p, 0, padded);
    return p;
  }
  void release(void* p) { std::free(p); }
  void zero(void* p, size_t bytes) { std::memset(p, 0, bytes); }
  void upload(void* to, const void* from_host, size_t bytes) {
    if (bytes) std::memcpy(to, from_host, bytes);  // an empty vector's pointer may be null, which memcpy forbids
  }
  void download(void* to_host, const void* from, size_t bytes) {
    if (bytes) std::memcpy(to_host, from, bytes);
  }
  void synchronize() {}
  size_t available_memory() const { return size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)); }
  // Memory that copies to and from the device go through; see Cuda.
  void* allocate_host(size_t bytes) { return allocate(bytes); }
  void release_host(void* p) { release(p); }
  struct Recording {};
  template <class Work>
  void replay(Recording&, Work work) { work(); }
};

// Sums. Added one by one to a large number in fp32, many small ones would be lost: 50,000 probabilities beside one of
// nearly 1. So at most kSumChunk terms are added up in Real before they join the others in double. With u for half a
// unit in the last place of 1, 2^-24 in fp32, such a sum is off by at most kSumChunk u times the sum of the terms'
// sizes, whatever their number.
constexpr int kSumChunk = 256;

// The sum of term(i) over i = 0 .. n-1, in an order that depends on n alone. term may also store what it computes. It is
// to capture by value, [=]: behind references the compiler reads everything anew for each i, at twice the time.
template <class Real, class Term>
double sum_in_chunks(int n, Term term) {
  double sum = 0;
  for (int begin = 0; begin < n; begin += kSumChunk) {
    const int end = std::min(begin + kSumChunk, n);
    Real part = 0;
#pragma omp simd reduction(+ : part)
    for (int i = begin; i < end; ++i) part += term(i);
    sum += part;
  }
  return sum;
}

// Sums over rows (parameter gradients) are made from partial sums over chunks of rows, added in order: the result does
// not depend on the number of threads. Calls work(chunk, begin, end) for each chunk of the N rows.
inline int row_chunks(int N) { return std::max(16, (N + kSumChunk - 1) / kSumChunk); }
template <class Work>
void for_row_chunks(int N, Work work) {
  const int chunks = row_chunks(N);
#pragma omp parallel for schedule(dynamic)
  for (int chunk = 0; chunk < chunks; ++chunk)
    work(chunk, int(int64_t(N) * chunk / chunks), int(int64_t(N) * (chunk + 1) / chunks));
}

// to (columns) += the partial sums of all chunks; chunk k's begin at partial + k * stride.
template <class Real, class Partial>
void add_row_chunks(Real* to, const Partial* partial, int N, int columns, int stride) {
  const int chunks = row_chunks(N);
  for (int c = 0; c < columns; ++c) {
    double sum = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) sum += partial[size_t(chunk) * stride + c];
    to[c] += Real(sum);
  }
}

// e^x for fp32 as plain arithmetic, so that the compiler vectorises loops over it (libm's expf is a call).
// e^x = 2^n e^r with |r| <= ln2/2: r by Cody-Waite subtraction, e^r by its Taylor polynomial to degree 7 (truncation
// under 1e-8 relative). Within 2 ulp of exp on [-87, 88]; below it flushes towards e^-87 = 1.6e-38, NaN stays NaN.
inline float exp_(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  // x = n ln2 + r. ln2 in two pieces, of which the first has few bits: n times it is exact.
  float n = std::nearbyint(x * 1.44269504f);
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  // e^r by Horner's rule, from the highest power down.
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits = (uint32_t(int32_t(n)) + 127) << 23;  // 2^n; unsigned: of a NaN, n is any number
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}
inline double exp_(double x) { return std::exp(x); }

// ---------------------------------------------------------------------------------------------------------------------
// CUDA: device memory, and one stream on which everything runs in order.

#ifdef __CUDACC__

// A failed CUDA call ends the program with one line: it is a fault of the machine or of this program, not of the user.
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
inline void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string(what) + ": " + cublasLtGetStatusString(status));
}

struct Cuda {
  static constexpr const char* name = "cuda";
  static constexpr size_t kWorkspaceBytes = 64u << 20;

  cudaStream_t stream = nullptr;
  cublasLtHandle_t blas = nullptr;
  void* workspace = nullptr;  // scratch of the matrix products and of reductions
  int multiprocessors = 0;
  int capability = 0;  // 10 * major + minor, e.g. 90
  size_t shared_bytes = 0;  // most shared memory that a block may ask for
  std::string name_of_gpu, id_of_gpu;  // the model, and which one it is

  // The GPU with this number among those that the process sees; of a single one, that.
  explicit Cuda(int gpu = 0) {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0)
      throw UserError("--device cuda: no CUDA GPU found; use --device cpu");
    check(cudaSetDevice(gpu % count), "cudaSetDevice");
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, gpu % count), "cudaGetDeviceProperties");
    name_of_gpu = properties.name;
    id_of_gpu.assign(properties.uuid.bytes, sizeof properties.uuid.bytes);
    capability = 10 * properties.major + properties.minor;
    multiprocessors = properties.multiProcessorCount;
    shared_bytes = properties.sharedMemPerBlockOptin;
    if (capability < 75)
      throw UserError("--device cuda: " + std::string(properties.name) + " has compute capability " +
                      std::to_string(properties.major) + "." + std::to_string(properties.minor) +
                      "; 7.5 or newer is needed; use --device cpu");
    // Memory brings the L2 cache a sector of 32 bytes, not two, of which partial RoPE would not read one: 6 of 64
    // channels, 65,536 tokens x 24 heads, then take 0.078 ms instead of 0.090 (H100). A hint; all 64 take the same.
    cudaDeviceSetLimit(cudaLimitMaxL2FetchGranularity, 32);
    cudaGetLastError();  // GPUs before sm_80 do not know it
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cublasLtCreate(&blas), "cublasLtCreate");
    workspace = allocate(kWorkspaceBytes);
  }
  Cuda(const Cuda&) = delete;
  Cuda& operator=(const Cuda&) = delete;
  ~Cuda() {
    release(workspace);
    cublasLtDestroy(blas);
    cudaStreamDestroy(stream);
  }

  void* allocate(size_t bytes) {
    void* p = nullptr;
    if (cudaMalloc(&p, bytes ? bytes : 1) != cudaSuccess) {
      cudaGetLastError();
      size_t free_bytes = 0, total = 0;
      cudaMemGetInfo(&free_bytes, &total);
      throw UserError("out of GPU memory: needed " + std::to_string(bytes >> 20) + " MiB more, " +
                      std::to_string(free_bytes >> 20) + " of " + std::to_string(total >> 20) +
                      " MiB are free; try a smaller --batch with more --accumulate, or --recompute");
    }
    zero(p, bytes);
    return p;
  }
  void release(void* p) { cudaFree(p); }
  void zero(void* p, size_t bytes) { check(cudaMemsetAsync(p, 0, bytes, stream), "cudaMemsetAsync"); }
  void upload(void* to, const void* from_host, size_t bytes) {
    check(cudaMemcpyAsync(to, from_host, bytes, cudaMemcpyHostToDevice, stream), "copy to the GPU");
  }
  void download(void* to_host, const void* from, size_t bytes) {
    check(cudaMemcpyAsync(to_host, from, bytes, cudaMemcpyDeviceToHost, stream), "copy from the GPU");
    synchronize();
  }
  void synchronize() { check(cudaStreamSynchronize(stream), "cudaStreamSynchronize"); }
  size_t available_memory() const {
    size_t available = 0, total = 0;
    check(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
    return available;
  }

  // Page-locked main memory: a copy from it is queued on the stream like a kernel, the program does not wait for it.
  void* allocate_host(size_t bytes) {
    void* p = nullptr;
    check(cudaMallocHost(&p, bytes ? bytes : 1), "cudaMallocHost");
    return p;
  }
  void release_host(void* p) { cudaFreeHost(p); }

  // Runs work(), a row of kernel launches that is the same every time, to the addresses: the first time as it stands
  // (so that libraries load what they need), the second time recorded as a CUDA graph, which is started as a whole from
  // then on. That takes a small model's step off the time that some hundred single launches need. Under `make DEBUG=1`
  // nothing is recorded, so that a breakpoint in work() stops every time.
  struct Recording {
    cudaGraphExec_t graph = nullptr;
    bool warm = false;
    Recording() = default;
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;
    ~Recording() {
      if (graph) cudaGraphExecDestroy(graph);
    }
  };
  bool recording() const {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    return status == cudaStreamCaptureStatusActive;
  }
  template <class Work>
  void replay(Recording& recording, Work work) {
#ifdef DEBUG
    recording.warm = false;
#endif
    if (!recording.warm) {
      recording.warm = true;
      return work();
    }
    if (!recording.graph) {
      cudaGraph_t graph = nullptr;
      check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
      work();
      check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
      check(cudaGraphInstantiate(&recording.graph, graph, 0), "cudaGraphInstantiate");
      cudaGraphDestroy(graph);
    }
    check(cudaGraphLaunch(recording.graph, stream), "cudaGraphLaunch");
  }
};

// Milliseconds that the GPU needs for work(), which queues something; waits for its end.
template <class Work>
float milliseconds_once(Cuda& be, Work work) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  check(cudaEventRecord(begin, be.stream), "cudaEventRecord");
  work();
  check(cudaEventRecord(end, be.stream), "cudaEventRecord");
  check(cudaEventSynchronize(end), "cudaEventSynchronize");
  float ms = 0;
  check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return ms;
}

// What every kernel needs. A tensor is read and written W elements at a time, 16 bytes where its columns and addresses
// allow it (wide), else one element; either way it is computed with as fp32.

template <class Real>
constexpr int kWide = 16 / sizeof(Real);  // 4 fp32 or 8 bf16

template <class Real, int W>
struct alignas(W * sizeof(Real) < 16 ? W * sizeof(Real) : 16) Vector {
  Real x[W];
};
template <int W, class Real>
__device__ __forceinline__ void load(float (&to)[W], const Real* from) {
  const Vector<Real, W> vector = *reinterpret_cast<const Vector<Real, W>*>(from);
#pragma unroll
  for (int k = 0; k < W; ++k) to[k] = float(vector.x[k]);
}
template <int W, class Real>
__device__ __forceinline__ void store(Real* to, const float (&from)[W]) {
  Vector<Real, W> vector;
#pragma unroll
  for (int k = 0; k < W; ++k) vector.x[k] = Real(from[k]);
  *reinterpret_cast<Vector<Real, W>*>(to) = vector;
}

// Two numbers as bf16 in 32 bits; one, rounded to bf16, as fp32 again.
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<uint32_t&>(pair);
}
__device__ __forceinline__ float rounded(float x) { return __uint_as_float(pack_pair(0, x)); }

// 16 bytes of shared memory, at a multiple of 16.
__device__ __forceinline__ uint4 read_chunk(uint32_t address) {
  uint4 packed;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(packed.x), "=r"(packed.y), "=r"(packed.z), "=r"(packed.w)
               : "r"(address)
               : "memory");
  return packed;
}
// Of a table's rows (64, R) fp32 as the copy engine or a Tile leaves them, in panels of 64 rows of 128 bytes, the four
// numbers of chunk 4n + t of a row 8h further than the one whose chunk t is at `first`.
__device__ __forceinline__ float4 read_angles(uint32_t first, int n, int h) {
  const uint4 bits = read_chunk((n % 2 ? first ^ 4 << 4 : first) + n / 2 * (64 * 128) + h * 8 * 128);
  return reinterpret_cast<const float4&>(bits);
}

template <int W>
__device__ __forceinline__ void add_to(float* to, const float (&sum)[W]) {
  float old[W];
  load<W>(old, to);
#pragma unroll
  for (int k = 0; k < W; ++k) old[k] += sum[k];
  store<W>(to, old);
}

// Whether rows of `columns` elements at these addresses can be read 16 bytes at a time; nullptr stands for no tensor.
template <class... T>
bool wide(int columns, const T*... tensors) {
  return ((columns * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(tensors) % 16 == 0) && ...);
}

// Starts the kernel for wide or for narrow access: start(W), W a constant, being WIDE or 1.
template <int WIDE, class Start>
void with_width(bool is_wide, Start start) {
  if (is_wide) return start(std::integral_constant<int, WIDE>());
  start(std::integral_constant<int, 1>());
}

__device__ __forceinline__ float warp_sum(float x) {  // the same in every lane
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exp2_(float x) {  // 2^x to 2 ulp; results under 2^-126 become 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_(float x) {  // to 2^-22 of itself, or for x from 1/2 to 2 of 1; x >= 2^-126
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / (1 + e^-x) by the GPU's own 2^x and 1/x, which are within 2 ulp and 1 ulp: __expf and __fdividef would take as much
// again to treat numbers below 2^-126 well, which make no difference here. 0 where e^-x passes 2^126.
__device__ __forceinline__ float sigmoid(float x) {
  float s;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1 + exp2_(-1.44269504f * x)));
  return s;
}

// The point (a, b) turned by the angle whose cosine and sine are c and s: its first and second coordinate. Which of the
// products is rounded is spelled out, so that all kernels give the same bits.
__device__ __forceinline__ float turned_first(float a, float b, float c, float s) {
  return __fmaf_rn(a, c, -__fmul_rn(b, s));
}
__device__ __forceinline__ float turned_second(float a, float b, float c, float s) {
  return __fmaf_rn(b, c, __fmul_rn(a, s));
}
__device__ __forceinline__ void turn(float& a, float& b, float c, float s) {
  const float first = turned_first(a, b, c, s);
  b = turned_second(a, b, c, s);
  a = first;
}

// Sum over the block, whose number of threads is a power of two, in double and in a fixed order.
__device__ inline double block_sum(double x) {
  __shared__ double sums[1024];
  __syncthreads();  // another sum may still be read
  sums[threadIdx.x] = x;
  // Halves are folded onto each other, so the order is that of the threads' numbers.
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  return sums[0];
}

// Raises *to to x if that is larger; neither may be negative. The order of such calls does not matter, so that the
// result is the same every time: numbers of one sign are ordered like their bits.
__device__ __forceinline__ void raise_to(double* to, double x) {
  atomicMax(reinterpret_cast<long long*>(to), __double_as_longlong(x));
}

inline size_t divide_up(size_t n, size_t by) { return (n + by - 1) / by; }

// Starts a kernel on the backend's stream and checks the launch; no blocks, no launch. A kernel may use up to the
// device's limit of shared memory per block (227 KB on Hopper).
template <class... Parameters, class... Arguments>
void launch(Cuda& be, const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes,
            Arguments... arguments) {
  if (blocks.x == 0) return;
  // More than 48 KiB has to be asked for, kernel by kernel; static shared memory, here less than 16 KiB, counts.
  if (shared_bytes > 32 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  kernel<<<blocks, threads, shared_bytes, be.stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

// Up to four vectors (columns) to which sums are added, in order: two of them may be the same.
struct RowSums {
  int count = 0;
  float* to[4];
  RowSums(std::initializer_list<float*> vectors) {
    for (float* vector : vectors) to[count++] = vector;
  }
};

// Adds to each vector the sum over rows of its part of partial (rows, vectors, columns), in an order that depends on the
// shape only. A block has 32 columns; warp w adds up rows w, w + 32, ..., the first warp the 32 sums.
static __global__ void __launch_bounds__(1024)
    add_rows_kernel(RowSums sums_of, const float* partial, int rows, int columns) {
  __shared__ float sums[32][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
  const size_t stride = size_t(sums_of.count) * columns;
  for (int i = 0; i < sums_of.count; ++i) {
    // A lane is a column and a warp takes every 32nd row: neighbouring lanes read neighbouring numbers.
    const float* from = partial + size_t(i) * columns + c;
    float sum = 0;
    if (c < columns)
#pragma unroll 8
      for (int r = warp; r < rows; r += 32) sum += from[r * stride];
    __syncthreads();  // the sums before have been read
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || c >= columns) continue;
    sum = 0;
    // The first warp adds up what the 32 have; rows of 33 keep its reads in distinct banks.
    for (int w = 0; w < 32; ++w) sum += sums[w][lane];
    sums_of.to[i][c] += sum;
  }
}
inline void add_rows(Cuda& be, const RowSums& sums, const float* partial, int rows, int columns) {
  launch(be, "add_rows", add_rows_kernel, divide_up(columns, 32), 1024, 0, sums, partial, rows, columns);
}

#endif  // __CUDACC__

// ---------------------------------------------------------------------------------------------------------------------
// Memory that belongs to a backend and is released with its owner.

template <class Backend>
struct Buffer {
  Backend* be = nullptr;
  void* data = nullptr;
  size_t bytes = 0;

  Buffer() = default;
  Buffer(Backend& backend, size_t size) : be(&backend), data(backend.allocate(size)), bytes(size) {}
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (data) be->release(data);
  }
  void swap(Buffer& other) {
    std::swap(be, other.be);
    std::swap(data, other.data);
    std::swap(bytes, other.bytes);
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// An array of n T in the host's memory, from which uploads are queued.
template <class Backend, class T>
struct HostArray {
  Backend& be;
  T* data;
  HostArray(Backend& backend, size_t n) : be(backend), data(static_cast<T*>(be.allocate_host(n * sizeof(T)))) {}
  HostArray(const HostArray&) = delete;
  HostArray& operator=(const HostArray&) = delete;
  ~HostArray() { be.release_host(data); }
};

// ---------------------------------------------------------------------------------------------------------------------

inline void check_device_and_dtype(const std::string& device, const std::string& dtype) {
  if (device != "auto" && device != "cpu" && device != "cuda")
    throw UserError("--device " + device + ": must be auto, cpu or cuda");
  if (dtype != "auto" && dtype != "fp32" && dtype != "bf16")
    throw UserError("--dtype " + dtype + ": must be auto, fp32 or bf16");
}

// Calls work(backend, real) for what --device auto|cpu|cuda and --dtype auto|fp32|bf16 say: auto is the GPU where there
// is one, and bf16 where it can. `real` is a value of the model's number type; `gpu` is the GPU's number. UserError
// for what this machine or build cannot do.
template <class Work>
void with_backend(const std::string& device, const std::string& dtype, Work work, [[maybe_unused]] int gpu = 0) {
  check_device_and_dtype(device, dtype);
#ifdef __CUDACC__
  int gpus = 0;
  if (device == "cuda" || (device == "auto" && cudaGetDeviceCount(&gpus) == cudaSuccess && gpus > 0)) {
    Cuda be(gpu);
    const bool has_bf16 = be.capability >= 80;
    if (dtype == "bf16" && !has_bf16)
      throw UserError("--dtype bf16: this GPU has no bf16 (compute capability below 8.0); use --dtype fp32");
    if (dtype == "bf16" || (dtype == "auto" && has_bf16)) return work(be, bf16());
    return work(be, float());
  }
#else
  if (device == "cuda")
    throw UserError("--device cuda: this program was built without nvcc; use --device cpu, or install the CUDA Toolkit "
                    "and make again");
#endif
  if (dtype == "bf16") throw UserError("--dtype bf16: the CPU works in fp32; use --dtype fp32 or --device cuda");
  Cpu be;
  work(be, float());
}
