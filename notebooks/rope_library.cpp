// The project's own rotation and attention as a shared library, build/librope.so, that 01_rope_by_hand calls through
// ctypes. A line of C around each function of rope.cuh and attention.cuh; all numbers are fp32.

#include "attention.cuh"

static RopePairs pairs(int interleaved) { return interleaved ? RopePairs::interleaved : RopePairs::half; }
static Cpu cpu;

extern "C" {

int rotary_dim(double fraction, int HS) { return rotary_dim_from_fraction(fraction, HS); }
double frequency(int i, int R, double base) { return rope_frequency(i, R, base); }  // radians per position
size_t table_bytes(size_t positions, int R) { return rope_table_bytes(positions, R); }

// cos_sin (positions, R/2, 2).
void fill_table(float* cos_sin, int positions, int R, double base) { rope_fill_table(cos_sin, positions, R, base); }

// The two channels of pair i.
int first(int interleaved, int i) { return rope_first(pairs(interleaved), i); }
int second(int interleaved, int i, int R) { return rope_second(pairs(interleaved), i, R); }

// In place on qkv (B, T, NH + 2*NKV, HS), cos_sin (T, R/2, 2): turns the first R channels of queries and keys.
void rotate(float* qkv, const float* cos_sin, int R, int interleaved, int B, int T, int NH, int NKV, int HS) {
  rope_forward(cpu, qkv, {cos_sin, T, R, pairs(interleaved)}, {B, T, NH, NKV, HS});
}
void rotate_back(float* qkv, const float* cos_sin, int R, int interleaved, int B, int T, int NH, int NKV, int HS) {
  rope_backward(cpu, qkv, {cos_sin, T, R, pairs(interleaved)}, {B, T, NH, NKV, HS});
}

// out (B, T, NH, HS), lse (B, NH, T): the log-sum-exp of the scores; qkv (B, T, NH + 2*NKV, HS).
void attention(float* out, float* lse, const float* qkv, int B, int T, int NH, int NKV, int HS) {
  attention_forward(cpu, out, lse, qkv, {B, T, NH, NKV, HS});
}

}  // extern "C"
