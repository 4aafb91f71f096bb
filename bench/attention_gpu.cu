// Flash attention on the GPU: checked against a plain reference, then timed.
//
//   attention_gpu [check|time|small]     both without an argument; small: few sizes, for compute-sanitizer. Exit code 1
//   if a check fails
//
// Build: nvcc -O3 -std=c++17 -I. -gencode arch=compute_90a,code=sm_90a -Xcompiler -fopenmp bench/attention_gpu.cu
// -lcublasLt (compute_80, sm_80 and the like for other GPUs). bench/attention_torch.py times PyTorch at the same
// shapes.

#include <algorithm>
#include <cstdio>
#include <functional>
#include <vector>

#include "device/flash_hopper.cuh"

// A normal deviate from (seed, i): Box-Muller over two hashes.
__device__ uint32_t hash(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
__global__ void fill_normal(bf16* to, size_t n, uint32_t seed, float deviation) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    float u = (hash(uint32_t(2 * i) ^ seed) + 0.5f) * 0x1p-32f, v = hash(uint32_t(2 * i + 1) ^ seed) * 0x1p-32f;
    to[i] = __float2bfloat16(deviation * sqrtf(-2 * logf(u)) * cospif(2 * v));
  }
}

// The reference keeps the matrices P and dS (B, NH, T, T) that flash attention avoids, and adds in double.
struct Shape {
  int B, T, NH, NKV, HS;
  size_t qkv() const { return size_t(B) * T * (NH + 2 * NKV) * HS; }
  size_t out() const { return size_t(B) * T * NH * HS; }
  size_t rows() const { return size_t(B) * NH * T; }
  __device__ size_t at(int b, int t, int head) const { return ((size_t(b) * T + t) * (NH + 2 * NKV) + head) * HS; }
};

// One block per (b, h, t). D comes from `rounded`, the bf16 output that the backward under test is given.
__global__ void reference_rows(Shape s, float* out, float* lse, float* P, float* dS, const bf16* qkv, const bf16* dout,
                               const bf16* rounded) {
  int t = blockIdx.x % s.T, h = blockIdx.x / s.T % s.NH, b = blockIdx.x / s.T / s.NH, kv = h / (s.NH / s.NKV);
  const bf16* q = qkv + s.at(b, t, h);
  size_t o = ((size_t(b) * s.T + t) * s.NH + h) * s.HS, matrix = size_t(blockIdx.x) * s.T;
  __shared__ double sum, D;
  for (int j = threadIdx.x; j < s.T; j += blockDim.x) {
    double dot = 0;
    for (int i = 0; i < s.HS; ++i) dot += double(float(q[i])) * double(float(qkv[s.at(b, j, s.NH + kv) + i]));
    P[matrix + j] = j <= t ? float(dot / sqrt(double(s.HS))) : -INFINITY;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double top = -INFINITY;
    sum = D = 0;
    for (int j = 0; j <= t; ++j) top = fmax(top, double(P[matrix + j]));
    for (int j = 0; j <= t; ++j) sum += exp(P[matrix + j] - top);
    for (int i = 0; i < s.HS; ++i) D += double(float(dout[o + i])) * double(float(rounded[o + i]));
    sum = top + log(sum);
    lse[blockIdx.x] = float(sum);
  }
  __syncthreads();
  for (int j = threadIdx.x; j < s.T; j += blockDim.x) {
    double dP = 0, p = exp(P[matrix + j] - sum);
    for (int i = 0; i < s.HS; ++i)
      dP += double(float(dout[o + i])) * double(float(qkv[s.at(b, j, s.NH + s.NKV + kv) + i]));
    P[matrix + j] = float(p);
    dS[matrix + j] = float(p * (dP - D));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < s.HS; i += blockDim.x) {
    double x = 0;
    for (int j = 0; j <= t; ++j) x += double(P[matrix + j]) * double(float(qkv[s.at(b, j, s.NH + s.NKV + kv) + i]));
    out[o + i] = float(x);
  }
}

// One block per (b, t, head of the packed buffer).
__global__ void reference_gradient(Shape s, float* dqkv, const float* P, const float* dS, const bf16* qkv,
                                   const bf16* dout) {
  int heads = s.NH + 2 * s.NKV, head = blockIdx.x % heads, t = blockIdx.x / heads % s.T, b = blockIdx.x / heads / s.T,
      ratio = s.NH / s.NKV;
  for (int i = threadIdx.x; i < s.HS; i += blockDim.x) {
    double x = 0;
    if (head < s.NH) {
      const float* row = dS + ((size_t(b) * s.NH + head) * s.T + t) * s.T;
      for (int j = 0; j <= t; ++j) x += double(row[j]) * double(float(qkv[s.at(b, j, s.NH + head / ratio) + i]));
    } else {
      bool key = head < s.NH + s.NKV;
      int kv = (head - s.NH) % s.NKV;
      for (int h = kv * ratio; h < (kv + 1) * ratio; ++h)
        for (int j = t; j < s.T; ++j) {
          size_t entry = ((size_t(b) * s.NH + h) * s.T + j) * s.T + t,
                 o = ((size_t(b) * s.T + j) * s.NH + h) * s.HS + i;
          x += key ? double(dS[entry]) * double(float(qkv[s.at(b, j, h) + i]))
                   : double(P[entry]) * double(float(dout[o]));
        }
    }
    if (head < s.NH + s.NKV) x /= sqrt(double(s.HS));
    dqkv[s.at(b, t, head) + i] = float(x);
  }
}

template <class X>
struct Array {
  size_t n;
  X* data;
  explicit Array(size_t n) : n(n) { check(cudaMalloc(&data, n * sizeof(X)), "cudaMalloc"); }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data); }
  void poison() { check(cudaMemset(data, 0xff, n * sizeof(X)), "cudaMemset"); }  // NaN in every type
  std::vector<X> host() const {
    std::vector<X> v(n);
    check(cudaMemcpy(v.data(), data, n * sizeof(X), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return v;
  }
};

void fill(Array<bf16>& to, uint32_t seed, float deviation) {
  fill_normal<<<1024, 256>>>(to.data, to.n, seed * 0x9e3779b9u, deviation);
  check(cudaDeviceSynchronize(), "fill_normal");
}

// |got - want| / |want| over the channels for which `part` is true. The second term of the denominator is fp32's
// rounding, for gradients that are zero in exact arithmetic (dq and dk at T = 1). NaN stays NaN, and fails.
double distance(const std::vector<bf16>& got, const std::vector<float>& want, const std::function<bool(size_t)>& part) {
  double error = 0, size = 0, n = 0;
  for (size_t i = 0; i < got.size(); ++i)
    if (part(i)) {
      double g = __bfloat162float(got[i]), w = want[i];
      error += (g - w) * (g - w), size += w * w, n += 1;
    }
  return std::sqrt(error) / (std::sqrt(size) + 1e-2 * std::sqrt(n));
}

bool check_shape(Cuda& be, Shape s, float deviation, double* worst) {
  Array<bf16> qkv(s.qkv()), dout(s.out()), out(s.out()), dqkv(s.qkv());
  Array<float> lse(s.rows()), D(flash::workspace_numbers(s.B, s.T, s.NH)), out_(s.out()), lse_(s.rows()),
      dqkv_(s.qkv()), P(s.rows() * s.T), dS(s.rows() * s.T);
  fill(qkv, 1 + s.T, deviation);
  fill(dout, 2 + s.T, 1);
  auto run = [&] {
    out.poison(), lse.poison(), dqkv.poison(), D.poison();
    check(cudaDeviceSynchronize(), "poison");
    flash_attention_forward(be, out.data, lse.data, qkv.data, s.B, s.T, s.NH, s.NKV, s.HS);
    flash_attention_backward(be, dqkv.data, D.data, dout.data, qkv.data, out.data, lse.data, s.B, s.T, s.NH, s.NKV,
                             s.HS);
    check(cudaDeviceSynchronize(), "flash_attention");
  };
  run();
  auto out1 = out.host(), dqkv1 = dqkv.host();
  auto lse1 = lse.host();
  run();
  auto out2 = out.host(), dqkv2 = dqkv.host();
  auto lse2 = lse.host();
  bool same = !std::memcmp(out1.data(), out2.data(), out1.size() * 2) &&
              !std::memcmp(dqkv1.data(), dqkv2.data(), dqkv1.size() * 2) &&
              !std::memcmp(lse1.data(), lse2.data(), lse1.size() * 4);

  reference_rows<<<unsigned(s.rows()), 128>>>(s, out_.data, lse_.data, P.data, dS.data, qkv.data, dout.data, out.data);
  reference_gradient<<<unsigned(s.B * s.T * (s.NH + 2 * s.NKV)), 128>>>(s, dqkv_.data, P.data, dS.data, qkv.data,
                                                                        dout.data);
  check(cudaDeviceSynchronize(), "reference");
  auto want = out_.host(), gradient = dqkv_.host(), want_lse = lse_.host();

  // Each result has passed two roundings to bf16: P or dS, and itself. One has relative size 2^-8 at most, 2^-8 /
  // sqrt(3) in the mean square; two independent ones, sqrt(2) as much. Everything else is fp32.
  const double tolerance = std::sqrt(2.0 / 3) / 256;
  int heads = s.NH + 2 * s.NKV;
  auto head = [&](size_t i) { return int(i / s.HS % heads); };
  double e[4] = {distance(out1, want, [](size_t) { return true; }),
                 distance(dqkv1, gradient, [&](size_t i) { return head(i) < s.NH; }),
                 distance(dqkv1, gradient, [&](size_t i) { return head(i) >= s.NH && head(i) < s.NH + s.NKV; }),
                 distance(dqkv1, gradient, [&](size_t i) { return head(i) >= s.NH + s.NKV; })};
  double e_lse = 0;  // fp32: a few units in the last place of scores of this size
  for (size_t i = 0; i < lse1.size(); ++i) {
    double d = std::fabs(lse1[i] - want_lse[i]) / (1 + std::fabs(want_lse[i]));
    e_lse = d <= e_lse ? e_lse : d;
  }
  bool ok = same && e_lse <= 1e-5;
  for (int i = 0; i < 4; ++i) {
    ok = ok && e[i] <= tolerance;
    worst[i] = e[i] <= worst[i] ? worst[i] : e[i];
  }
  if (!ok)
    printf(
        "FAIL B %d T %d NH %d NKV %d HS %d deviation %g: out %.2e dq %.2e dk %.2e dv %.2e (at most %.2e) lse %.1e, two "
        "runs %s\n",
        s.B, s.T, s.NH, s.NKV, s.HS, deviation, e[0], e[1], e[2], e[3], tolerance, e_lse, same ? "equal" : "DIFFER");
  return ok;
}

double median_ms(Cuda& be, const std::function<void()>& work) {
  std::vector<float> times;
  for (int i = 0; i < 23; ++i) {
    const float ms = milliseconds_once(be, work);
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int main(int argc, char** argv) try {
  std::string mode = argc > 1 ? argv[1] : "";
  Cuda be;
  bool all = true;
  if (mode != "time") {
    for (int HS : {32, 64, 128, 256})
      for (int NKV : {4, 1}) {
        double worst[4] = {};
        bool ok = true;
        // The last has more tiles than a GPU has multiprocessors: blocks of some kernels work on several.
        std::vector<std::pair<int, int>> sizes = {{2, 1}, {2, 17}, {2, 65}, {2, 1000}, {50, 300}};  // B and T
        if (mode == "small") sizes = {{2, 1}, {2, 17}, {2, 130}};
        for (auto [B, T] : sizes)
          for (float deviation : {1.0f, 3.0f})  // 3: scores of 9 deviations
            ok = check_shape(be, {B, T, 4, NKV, HS}, deviation, worst) && ok;
        printf("%s HS %3d NH/NKV %d, largest relative error out %.2e dq %.2e dk %.2e dv %.2e\n", ok ? "ok  " : "FAIL",
               HS, 4 / NKV, worst[0], worst[1], worst[2], worst[3]);
        all = all && ok;
      }
  }
  if (mode.empty() || mode == "time") {
    printf("%4s %5s %3s %3s %3s %12s %9s %12s %9s\n", "B", "T", "NH", "NKV", "HS", "forward ms", "TFLOP/s",
           "backward ms", "TFLOP/s");
    for (Shape s : {Shape{64, 1024, 12, 12, 64},
                    {8, 2048, 32, 8, 64},
                    {64, 256, 6, 6, 64},
                    {32, 2048, 2, 2, 128},
                    {4, 2048, 8, 8, 256}}) {
      Array<bf16> qkv(s.qkv()), dout(s.out()), out(s.out()), dqkv(s.qkv());
      Array<float> lse(s.rows()), D(flash::workspace_numbers(s.B, s.T, s.NH));
      fill(qkv, 1, 1);
      fill(dout, 2, 1);
      double forward = median_ms(
          be, [&] { flash_attention_forward(be, out.data, lse.data, qkv.data, s.B, s.T, s.NH, s.NKV, s.HS); });
      double backward = median_ms(be, [&] {
        flash_attention_backward(be, dqkv.data, D.data, dout.data, qkv.data, out.data, lse.data, s.B, s.T, s.NH, s.NKV,
                                 s.HS);
      });
      double flops =
          4.0 * s.B * s.NH * s.T * s.T * s.HS / 2;  // two products over the lower triangle; the backward has five
      printf("%4d %5d %3d %3d %3d %12.3f %9.0f %12.3f %9.0f\n", s.B, s.T, s.NH, s.NKV, s.HS, forward,
             flops / forward * 1e-9, backward, 2.5 * flops / backward * 1e-9);
      fflush(stdout);
    }
  }
  return all ? 0 : 1;
} catch (const std::exception& e) {
  fprintf(stderr, "error: %s\n", e.what());
  return 1;
}
