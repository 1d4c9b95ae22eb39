// Elementary functions of vectors (vec.h).
#pragma once

#include "vec.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

// p * 2^n for integral n in [-151, 129]. Two factors, because 2^n alone leaves the float range
// where the result is subnormal or the largest binade.
ALWAYS_INLINE vf scale_by_power(vf p, vf n) {
#if defined(BERT_FAST_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  vi i = __builtin_convertvector(n, vi), half = i >> 1;
  return p * bits_as<vf>((half + 127) << 23) * bits_as<vf>((i - half + 127) << 23);
#endif
}

ALWAYS_INLINE vf nearest(vf x) {  // |x| < 2^22
#if defined(BERT_FAST_AVX512)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = set1(0x1.8p23f);
  return (x + magic) - magic;
#endif
}

// N vectors in lockstep: one vector's chain of dependent multiply-adds leaves most of the FPU idle
// and fills its scheduler before the next vector's chain comes into sight.
template <int N, class F>
ALWAYS_INLINE void each(const F& f) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) f(i);
}

// p = the polynomial of x with these coefficients, the highest power's first (Horner).
template <int N, int COUNT>
ALWAYS_INLINE void horner(const vf (&x)[N], vf (&p)[N], const float (&coefficients)[COUNT]) {
  each<N>([&](int i) ALWAYS_INLINE_LAMBDA {
    p[i] = fma(set1(coefficients[0]), x[i], coefficients[1]);
  });
#pragma GCC unroll 16
  for (int k = 2; k < COUNT; ++k)
    each<N>([&](int i) ALWAYS_INLINE_LAMBDA { p[i] = fma(p[i], x[i], coefficients[k]); });
}

// Whether fewer terms do for what is rounded to T: 2^-9 of a number, of bf16.
template <class T>
constexpr bool kFewTerms = false;
template <>
inline constexpr bool kFewTerms<bf16> = true;

// 2^x for x <= 127, and 0 below 2^-126: arithmetic on subnormal numbers is slow. The polynomials are
// minimax fits of 2^r on [-1/2, 1/2] with a constant term of exactly 1: relative error 2e-9 before
// rounding, so below 1 ulp after it, and 1.0e-4 of few terms. Adding 2^23 and more rounds x to an
// integer n; 127 more, and the last eight bits of the sum are the exponent field of 2^n: 0, of
// n = -127, makes it 0.
template <class T = float, int N>
ALWAYS_INLINE void exp2(vf (&x)[N]) {
  const vf magic = set1(0x1.8p23f + 127.0f);
  vf r[N], p[N];
  each<N>([&](int i) ALWAYS_INLINE_LAMBDA {
    x[i] = at_least(x[i], -127.0f);
    vf n = x[i] + magic;
    r[i] = x[i] - (n - magic);
    x[i] = n;
  });
  if constexpr (kFewTerms<T>) {
    horner(r, p, {5.500892e-2f, 2.4221096e-1f, 6.9328293e-1f, 1.0f});
  } else {
    horner(r, p, {1.5353360504e-4f, 1.3398875017e-3f, 9.6184369177e-3f, 5.5503323674e-2f,
                  2.4022647738e-1f, 6.9314718246e-1f, 1.0f});
  }
  each<N>([&](int i) ALWAYS_INLINE_LAMBDA {
    x[i] = p[i] * bits_as<vf>(bits_as<vu>(x[i]) << 23);
  });
}

// e^x for x <= 89: as exp2, with ln 2 split in two so that the reduced argument is exact
// (Cody-Waite).
ALWAYS_INLINE vf exp_below_89(vf x) {
  x = at_least(x, -104.0f);
  vf n = nearest(x * 1.44269504f);
  vf r = fma(n, set1(-1.428606765e-6f), fma(n, set1(-0.693145751953125f), x));
  vf p = fma(set1(1.3843652559e-3f), r, 8.3741554990e-3f);
  p = fma(p, r, 4.1668001562e-2f);
  p = fma(p, r, 1.6666431725e-1f);
  p = fma(p, r, 4.9999994040e-1f);
  p = fma(p, r, 1.0f);
  return scale_by_power(fma(p, r, 1.0f), n);
}

ALWAYS_INLINE vf exp(vf x) { return exp_below_89(at_most(x, 89.0f)); }

// 1 / (1 + e^-x)
ALWAYS_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// sigmoid(x), and its slope sigmoid(x) sigmoid(-x) without the cancellation of 1 - sigmoid(x).
ALWAYS_INLINE vf sigmoid(vf x, vf& slope) {
  vf e = exp_below_89(x < 0.0f ? x : -x), large = 1.0f / (1.0f + e), small = e * large;
  slope = large * small;
  return x < 0.0f ? small : large;
}

// The standard normal distribution function, (1 + erf(x / sqrt 2)) / 2, in place. With t = |x|,
// -log2 of the tail Q(t) = erfc(t / sqrt 2) / 2 is nearly a parabola, so one polynomial and one
// exp2 give Q to 3e-8 absolute and 1e-6 relative up to t = 6: unlike 1 + erf nothing cancels for
// negative x. Beyond 6, where Q < 1e-9, a parabola (1 % relative) is enough. Few terms are good to
// 3e-4 relative up to t = 5.
template <class T = float, int N>
ALWAYS_INLINE void normal_cdf(vf (&x)[N]) {
  vf t[N], p[N];
  each<N>([&](int i) ALWAYS_INLINE_LAMBDA { t[i] = magnitude(x[i]); });
  if constexpr (kFewTerms<T>) {
    horner(t, p, {-2.7785976e-4f, 5.4052903e-3f, -4.6850806e-2f, -4.6576991e-1f, -1.14877f, -1.0f});
  } else {
    horner(t, p, {2.6601318925e-9f, -9.8901629997e-8f, 1.6300695052e-6f, -1.5565352426e-5f,
                  9.2540962214e-5f, -3.1304330332e-4f, 3.9434744394e-5f, 6.9234706461e-3f,
                  -5.2436895669e-2f, -4.5921978354e-1f, -1.1511044502e0f, -1.0f});
    each<N>([&](int i) ALWAYS_INLINE_LAMBDA {
      vf far = fma(fma(set1(-0.7138720751f), t[i], -0.2965635061f), t[i], -2.4458642006f);
      p[i] = t[i] > 6.0f ? far : p[i];
    });
  }
  exp2<T>(p);
  each<N>([&](int i) ALWAYS_INLINE_LAMBDA { x[i] = x[i] < 0.0f ? p[i] : 1.0f - p[i]; });
}
template <class T = float>
ALWAYS_INLINE vf normal_cdf(vf x) {
  vf one[] = {x};
  normal_cdf<T>(one);
  return one[0];
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
