// Device building blocks of the CUDA kernels: vector access, reductions, activations, dropout.
//
// Everything here computes in fp32; bf16 and fp16 exist only in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace bert_fast {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kVectorBytes = 16;

// ---- memory: N elements at once, converted to and from fp32 ----

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// N elements that move as one access; sizeof(T) * N is 16 bytes on the vector path.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T item[N];
};

// The machine word of a Pack.
template <int BYTES>
struct Word;
template <>
struct Word<16> {
  using Type = uint4;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<2> {
  using Type = uint16_t;
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* source) {
  using W = typename Word<sizeof(T) * N>::Type;
  const W word = *reinterpret_cast<const W*>(source);
  Pack<T, N> pack;
  memcpy(&pack, &word, sizeof(word));
  return pack;
}

template <typename T, int N>
__device__ __forceinline__ void unpack(const Pack<T, N>& pack, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(pack.item[i]);
}

template <typename T, int N>
__device__ __forceinline__ void load_floats(const T* source, float (&out)[N]) {
  unpack(load_pack<T, N>(source), out);
}

template <typename T, int N>
__device__ __forceinline__ void store_floats(T* target, const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.item[i] = from_float<T>(values[i]);
  using W = typename Word<sizeof(T) * N>::Type;
  W word;
  memcpy(&word, &pack, sizeof(word));
  __stcg(reinterpret_cast<W*>(target), word);  // a plain assignment may be split into 4-byte stores
}

// ---- reductions ----

// Butterfly sum: every lane ends with the same bits, in an order fixed by the lane numbers.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// Sums of K values over the THREADS threads that share a row: one warp, or the whole block.
// `scratch` is used by the block form only.
template <int THREADS, int K>
__device__ __forceinline__ void group_sum(float (&values)[K],
                                          float (&scratch)[THREADS / kWarpSize][K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = warp_sum(values[k]);
  if constexpr (THREADS > kWarpSize) {
    __syncthreads();  // the previous sums may still be being read
    if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) scratch[threadIdx.x / kWarpSize][k] = values[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      values[k] = 0.0f;
#pragma unroll
      for (int i = 0; i < THREADS / kWarpSize; ++i) values[k] += scratch[i][k];
    }
  }
}

// ---- activations: value and derivative of one pre-activation ----

enum class Activation : int { kGelu, kGeluTanh, kRelu, kSilu };

// Whether the result is rounded to 16 bits, where hardware approximations of about 1e-7 vanish.
template <typename T>
constexpr bool kShortType = sizeof(T) == 2;

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Phi(-x) of x = min(|u|, 10), which is set too, for short types.
//
// A minimax fit of log2 Phi(-x) on 0 .. 5.5: Phi is off by 2e-5 of itself there, and beyond it by
// less than 1e-8; at 10 it is 2^-75. A third of the instructions of erff, which at two bytes an
// element would take longer than the memory; the negative tail stays relative (no 1 - 1).
__device__ __forceinline__ float normal_tail(float u, float& x) {
  x = fminf(fabsf(u), 10.0f);
  float r = fmaf(x, 2.615375e-05f, -0.0006609812f);
  r = fmaf(r, x, 0.00748831f);
  r = fmaf(r, x, -0.05197041f);
  r = fmaf(r, x, -0.4603295f);
  r = fmaf(r, x, -1.150584f);
  r = fmaf(r, x, -1.000036f);
  return fast_exp2(r);
}

// gelu(u) = u Phi(u), Phi the normal distribution function; and its derivative Phi(u) + u phi(u).
template <typename T>
__device__ __forceinline__ float gelu(float u) {
  if constexpr (kShortType<T>) {
    float x;
    const float tail = normal_tail(u, x);
    return fmaf(-x, tail, u < 0.0f ? 0.0f : u);  // this way round NaN stays NaN
  } else {
    return u * 0.5f * erfcf(-u * 0.70710678118654752f);
  }
}

template <typename T>
__device__ __forceinline__ float gelu_slope(float u) {
  constexpr float kInvSqrt2Pi = 0.39894228040143268f;
  if constexpr (kShortType<T>) {
    float x;
    const float tail = normal_tail(u, x);
    const float density = fast_exp2(u * u * -0.72134752044448170f) * kInvSqrt2Pi;
    return fmaf(u, density, u < 0.0f ? tail : 1.0f - tail);
  } else {
    return fmaf(u, kInvSqrt2Pi * expf(-0.5f * u * u), 0.5f * erfcf(-u * 0.70710678118654752f));
  }
}

// gate = 1 / (1 + exp(-x)) and rest = 1 - gate, without its cancellation.
template <typename T>
__device__ __forceinline__ void sigmoid(float x, float& gate, float& rest) {
  const float bounded = fmaxf(x, -80.0f);  // the exponential must stay finite for rest
  if constexpr (kShortType<T>) {
    const float e = __expf(-bounded);
    gate = __fdividef(1.0f, 1.0f + e);
    rest = e * gate;
  } else {
    const float e = expf(-bounded);
    gate = 1.0f / (1.0f + e);
    rest = e * gate;
  }
}

// gelu_tanh(x) = x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu_tanh_argument(float x) {
  constexpr float kTwoSqrt2OverPi = 1.5957691216057308f;
  return kTwoSqrt2OverPi * (x + 0.044715f * x * x * x);
}

template <typename T>
__device__ __forceinline__ float gelu_tanh(float x) {
  float gate, rest;
  sigmoid<T>(gelu_tanh_argument(x), gate, rest);
  return x * gate;
}

template <typename T>
__device__ __forceinline__ float gelu_tanh_slope(float x) {
  constexpr float kTwoSqrt2OverPi = 1.5957691216057308f;
  float gate, rest;
  sigmoid<T>(gelu_tanh_argument(x), gate, rest);
  return gate + x * gate * rest * kTwoSqrt2OverPi * fmaf(0.134145f, x * x, 1.0f);
}

template <typename T>
__device__ __forceinline__ float silu(float x) {
  float gate, rest;
  sigmoid<T>(x, gate, rest);
  return x * gate;
}

template <typename T>
__device__ __forceinline__ float silu_slope(float x) {
  float gate, rest;
  sigmoid<T>(x, gate, rest);
  return gate + x * gate * rest;
}

template <int N, typename F>
__device__ __forceinline__ void each(float (&values)[N], F&& f) {
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] = f(values[j]);
}

// values = activation(values). The choice is outside the loop: between branches, elements would
// wait for one another.
template <typename T, int N>
__device__ __forceinline__ void activate(Activation activation, float (&values)[N]) {
  switch (activation) {
    case Activation::kGelu: return each(values, gelu<T>);
    case Activation::kGeluTanh: return each(values, gelu_tanh<T>);
    case Activation::kRelu:
      return each(values, [](float x) { return x < 0.0f ? 0.0f : x; });  // NaN stays NaN
    default: return each(values, silu<T>);
  }
}

// values = activation'(values)
template <typename T, int N>
__device__ __forceinline__ void activation_slope(Activation activation, float (&values)[N]) {
  switch (activation) {
    case Activation::kGelu: return each(values, gelu_slope<T>);
    case Activation::kGeluTanh: return each(values, gelu_tanh_slope<T>);
    case Activation::kRelu: return each(values, [](float x) { return x <= 0.0f ? 0.0f : 1.0f; });
    default: return each(values, silu_slope<T>);
  }
}

// ---- dropout: a counter-based generator, so forward, backward and every backend agree ----

// Philox4x32-10 with key = seed and counter = (c0, c1, 0, 0).
__device__ __forceinline__ uint4 philox(uint2 key, uint32_t c0, uint32_t c1) {
  constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;
  constexpr uint32_t kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;
  uint4 c = make_uint4(c0, c1, 0u, 0u);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = __umulhi(kM0, c.x), lo0 = kM0 * c.x;
    const uint32_t hi1 = __umulhi(kM1, c.z), lo1 = kM1 * c.z;
    c = make_uint4(hi1 ^ c.y ^ key.x, lo1, hi0 ^ c.w ^ key.y, lo0);
    key.x += kW0;
    key.y += kW1;
  }
  return c;
}

// What a kernel is told; `seed` is null where nothing is dropped.
struct Dropout {
  const int64_t* seed;
  uint32_t threshold;  // floor(p * 2^32): drawn values below it are dropped
  float scale;         // 1 / (1 - p), and 0 at p = 1

  __device__ __forceinline__ uint2 key() const {
    const uint64_t value = static_cast<uint64_t>(*seed);
    return make_uint2(static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32));
  }
};

__device__ __forceinline__ uint32_t pick(const uint4& draw, uint32_t lane) {
  const uint32_t low = lane & 1 ? draw.y : draw.x;
  const uint32_t high = lane & 1 ? draw.w : draw.z;
  return lane & 2 ? high : low;
}

// Drops and scales N consecutive columns of a row. N > 1 needs column % N == 0 and N % 4 == 0.
template <int N>
__device__ __forceinline__ void apply_dropout(const Dropout& dropout, uint2 key, int64_t row,
                                              uint32_t column, float (&values)[N]) {
  const uint32_t c1 = static_cast<uint32_t>(row);
  if constexpr (N == 1) {
    const uint32_t draw = pick(philox(key, column >> 2, c1), column & 3);
    values[0] = draw >= dropout.threshold ? values[0] * dropout.scale : 0.0f;
  } else {
    static_assert(N % 4 == 0, "one draw serves four columns");
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const uint4 draw = philox(key, (column + i) >> 2, c1);
      values[i] = draw.x >= dropout.threshold ? values[i] * dropout.scale : 0.0f;
      values[i + 1] = draw.y >= dropout.threshold ? values[i + 1] * dropout.scale : 0.0f;
      values[i + 2] = draw.z >= dropout.threshold ? values[i + 2] * dropout.scale : 0.0f;
      values[i + 3] = draw.w >= dropout.threshold ? values[i + 3] * dropout.scale : 0.0f;
    }
  }
}

}  // namespace bert_fast
