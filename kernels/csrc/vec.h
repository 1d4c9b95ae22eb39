// One vector type for all CPU kernels: W floats in a GCC/Clang vector, W by the instruction set the
// file is compiled for. Everything lives in a namespace named after that instruction set: the same
// templates compiled with different flags must never be merged by the linker (an AVX-512 body
// picked for a baseline caller dies by SIGILL). For the same reason nothing here, nor in the kernel
// bodies, calls an inline function of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#if defined(__AVX512BF16__)
#define BERT_FAST_AVX512_BF16 1
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define BERT_FAST_ISA amx
#define BERT_FAST_AMX 1
#else
#define BERT_FAST_ISA avx512_bf16
#endif
#else
#define BERT_FAST_ISA avx512
#endif
#define BERT_FAST_AVX512 1
#define BERT_FAST_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define BERT_FAST_ISA avx2
#define BERT_FAST_AVX2 1
#define BERT_FAST_VECTOR_BYTES 32
#else
#define BERT_FAST_ISA generic
#define BERT_FAST_VECTOR_BYTES 16
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int W = BERT_FAST_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// How many lanes an access covers; Full is a compile-time fact, so the main loops carry no masks.
struct Full {
  static constexpr int n = W;
};
struct Tail {
  int n;  // 0 < n < W
};

template <class A>
ALWAYS_INLINE constexpr A smaller(A a, A b) { return b < a ? b : a; }
template <class A>
ALWAYS_INLINE constexpr A larger(A a, A b) { return a < b ? b : a; }
ALWAYS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
ALWAYS_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Calls f(i, lanes) over [0, n) in steps of W, the rest as a Tail.
template <class F>
ALWAYS_INLINE void sweep(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, Full{});
  if (i < n) f(i, Tail{int(n - i)});
}

// The same four at a time, for sums: f(i, lanes, slot) with slot in 0 .. 3, so that consecutive
// additions go to different accumulators and do not wait for each other.
struct Sums {
  vf part[4] = {};
  ALWAYS_INLINE vf total() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};
template <class F>
ALWAYS_INLINE void sweep_by_four(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    f(i, Full{}, 0);
    f(i + W, Full{}, 1);
    f(i + 2 * W, Full{}, 2);
    f(i + 3 * W, Full{}, 3);
  }
  for (; i + W <= n; i += W) f(i, Full{}, 0);
  if (i < n) f(i, Tail{int(n - i)}, 1);
}

// ---- bits and lanes ----------------------------------------------------------------------------

template <class To, class From>
ALWAYS_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

ALWAYS_INLINE vf set1(float x) {
#if defined(BERT_FAST_AVX512)
  return _mm512_set1_ps(x);
#else
  return x - vf{};  // x - 0 is x for every x, -0 and NaN included
#endif
}

ALWAYS_INLINE vi lane_index() {
  vi lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes;
}

ALWAYS_INLINE vf keep_lanes(vf a, Full) { return a; }
ALWAYS_INLINE vf keep_lanes(vf a, Tail t) { return lane_index() < t.n ? a : vf{}; }

// One max or min instruction each, which gives b where either is NaN: at_least and at_most keep a
// NaN in `a`.
ALWAYS_INLINE vf vmax(vf a, vf b) {
#if defined(BERT_FAST_AVX512)
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
ALWAYS_INLINE vf vmin(vf a, vf b) {
#if defined(BERT_FAST_AVX512)
  return _mm512_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
ALWAYS_INLINE vf at_least(vf a, float low) { return vmax(set1(low), a); }
ALWAYS_INLINE vf at_most(vf a, float high) { return vmin(set1(high), a); }

ALWAYS_INLINE vf fma(vf a, vf b, vf c) {
#if defined(BERT_FAST_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(BERT_FAST_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
ALWAYS_INLINE vf fma(vf a, vf b, float c) { return fma(a, b, set1(c)); }

ALWAYS_INLINE vf magnitude(vf a) { return bits_as<vf>(bits_as<vu>(a) & 0x7fffffffu); }

ALWAYS_INLINE float hsum(vf a) {
#if defined(BERT_FAST_AVX512)
  return _mm512_reduce_add_ps(a);
#else
  float lanes[W];
  memcpy(lanes, &a, sizeof a);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// ---- memory ------------------------------------------------------------------------------------

ALWAYS_INLINE vf load(const float* p, Full = {}) {
  vf a;
  memcpy(&a, p, sizeof a);
  return a;
}
ALWAYS_INLINE void store(float* p, vf a, Full = {}) { memcpy(p, &a, sizeof a); }

// GCC makes several shuffles of a generic conversion between 16 and 32 bits, hence the intrinsics.
ALWAYS_INLINE vu widen(vh half) {
#if defined(BERT_FAST_AVX512)
  return (vu)_mm512_cvtepu16_epi32((__m256i)half);
#elif defined(BERT_FAST_AVX2)
  return (vu)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, vu);
#endif
}
ALWAYS_INLINE vh narrow(vu whole) {  // every lane below 2^16
#if defined(BERT_FAST_AVX512)
  return (vh)_mm512_cvtepi32_epi16((__m512i)whole);
#elif defined(BERT_FAST_AVX2)
  __m256i pairs = _mm256_packus_epi32((__m256i)whole, (__m256i)whole);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  return __builtin_convertvector(whole, vh);
#endif
}

ALWAYS_INLINE vf load(const bf16* p, Full = {}) {
  vh half;
  memcpy(&half, p, sizeof half);
  return bits_as<vf>(widen(half) << 16);
}

// Round to nearest even; a NaN stays one (its rounding could carry into infinity).
ALWAYS_INLINE vh bf16_bits(vf a) {
#if defined(BERT_FAST_AVX512_BF16)
  return (vh)_mm512_cvtneps_pbh(a);
#else
  vu bits = bits_as<vu>(a);
  vu rounded = bits + 0x7fff + (bits >> 16 & 1);
  vu nan = bits | 0x400000;
  return narrow((a == a ? rounded : nan) >> 16);
#endif
}
ALWAYS_INLINE void store(bf16* p, vf a, Full = {}) {
  vh half = bf16_bits(a);
  memcpy(p, &half, sizeof half);
}

// The exact fp16 conversions by integer arithmetic, for machines without F16C.
inline float f16_to_float(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, body = half & 0x7fff;
  if (body >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (body & 0x3ff) << 13);
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(body << 13) * 0x1p112f));
}
inline uint16_t float_to_f16(float x) {
  uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000, body = bits & 0x7fffffff;
  if (body > 0x7f800000) return sign | 0x7e00 | (body >> 13 & 0x1ff);
  if (body >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (body < 0x38800000)  // subnormal: adding 0.5 makes the FPU round at 2^-24
    return sign | (bits_as<uint32_t>(bits_as<float>(body) + 0.5f) - 0x3f000000);
  return sign | ((body + 0xfff + (body >> 13 & 1) - 0x38000000) >> 13);
}

ALWAYS_INLINE vf load(const f16* p, Full = {}) {
#if defined(BERT_FAST_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(BERT_FAST_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf a;
  for (int i = 0; i < W; ++i) a[i] = f16_to_float(p[i].bits);
  return a;
#endif
}
ALWAYS_INLINE void store(f16* p, vf a, Full = {}) {
#if defined(BERT_FAST_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
#elif defined(BERT_FAST_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) p[i].bits = float_to_f16(a[i]);
#endif
}

// Tails never touch memory outside the row; missing lanes read as zero.
template <class T>
ALWAYS_INLINE vf load(const T* p, Tail t) {
#if defined(BERT_FAST_AVX512)
  const __mmask16 mask = __mmask16((1u << t.n) - 1);
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(mask, p);
  } else {
    T row[W];
    _mm256_storeu_si256((__m256i*)row, _mm256_maskz_loadu_epi16(mask, p));
    return load(row);
  }
#else
  T row[W] = {};
  memcpy(row, p, t.n * sizeof(T));
  return load(row);
#endif
}
template <class T>
ALWAYS_INLINE void store(T* p, vf a, Tail t) {
  T row[W];
  store(row, a);
  memcpy(p, row, t.n * sizeof(T));
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
