// What the row kernels share: threads, scratch memory, the dropout generator, ordered column sums.
#pragma once

#include "cpu/kernels.h"
#include "vec_math.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

// Elements a thread should get before a second one is worth waking (about 5 microseconds of work).
constexpr int64_t kGrain = 16384;

template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  run_parallel(n, grain, call, const_cast<void*>(static_cast<const void*>(&f)));
}

struct Scratch {
  float* data;
  explicit Scratch(int64_t count) : data(allocate_floats(count)) {}
  ~Scratch() { free_floats(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// Runs f.template operator()<T>() with T the element type of `dtype`.
template <class F>
ALWAYS_INLINE void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f.template operator()<float>();
    case Dtype::bf16: return f.template operator()<bf16>();
    case Dtype::f16: return f.template operator()<f16>();
  }
}

inline int64_t index_at(const Indices& indices, int64_t i) {
  return indices.is_64 ? static_cast<const int64_t*>(indices.data)[i]
                       : static_cast<const int32_t*>(indices.data)[i];
}

// ---- dropout -----------------------------------------------------------------------------------

// The 64-bit products m * a of all lanes, as their high and low halves.
ALWAYS_INLINE void multiply_wide(vu a, uint32_t m, vu& high, vu& low) {
#if defined(__x86_64__)
  typedef uint64_t v64 __attribute__((vector_size(4 * W)));
  const v64 odd_lanes = (v64)a >> 32, factor = v64{} + m;
#if defined(BERT_FAST_AVX512)
  v64 even = (v64)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
  v64 odd = (v64)_mm512_mul_epu32((__m512i)odd_lanes, (__m512i)factor);
#elif defined(BERT_FAST_AVX2)
  v64 even = (v64)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
  v64 odd = (v64)_mm256_mul_epu32((__m256i)odd_lanes, (__m256i)factor);
#else
  v64 even = (v64)_mm_mul_epu32((__m128i)a, (__m128i)factor);
  v64 odd = (v64)_mm_mul_epu32((__m128i)odd_lanes, (__m128i)factor);
#endif
  const v64 upper = v64{} + 0xffffffff00000000u;
  high = (vu)((even >> 32) | (odd & upper));
  low = (vu)((even & ~upper) | (odd << 32));
#else
  for (int i = 0; i < W; ++i) {
    uint64_t product = uint64_t(a[i]) * m;
    high[i] = uint32_t(product >> 32);
    low[i] = uint32_t(product);
  }
#endif
}

// Philox4x32-10 (Salmon et al., SC 2011) of the counters (c[0], c[1], 0, 0), one per lane; the four
// outputs replace c.
ALWAYS_INLINE void philox(vu (&c)[4], uint32_t k0, uint32_t k1) {
  c[2] = c[3] = vu{};
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53, high0, low0);
    multiply_wide(c[2], 0xCD9E8D57, high1, low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}

ALWAYS_INLINE vf keep_factor(const Dropout& d, vu random) {
  return random >= d.threshold ? set1(d.scale) : vf{};
}

// factors[0 .. n) of columns 0 .. n of one row; the buffer holds round_up(n, 4 W).
inline void keep_factors(const Dropout& d, int64_t row, int64_t n, float* factors) {
  for (int64_t i = 0; i < n; i += 4 * W) {
    vu c[4] = {(vu)lane_index() + uint32_t(i / 4), vu{} + uint32_t(row)};
    philox(c, d.key[0], d.key[1]);
    float lanes[4][W];
    for (int j = 0; j < 4; ++j) store(lanes[j], keep_factor(d, c[j]));
    for (int lane = 0; lane < W; ++lane)
      for (int j = 0; j < 4; ++j) factors[i + 4 * lane + j] = lanes[j][lane];
  }
}

// ---- ordered column sums -----------------------------------------------------------------------

// to[c] = sum over i < n of partials[i * stride + c], in two levels so that rounding errors grow
// with sqrt-like slowness even for a million rows. `to` may be null: nothing is wanted.
template <class T>
void sum_partials(const float* partials, int64_t n, int64_t stride, int64_t cols, T* to) {
  if (to == nullptr) return;
  constexpr int64_t group = 64;
  const int64_t grain = larger<int64_t>(1, kGrain / (n * W + 1));
  parallel(ceil_div(cols, W), grain, [&](int64_t v0, int64_t v1) {
    sweep(smaller(v1 * W, cols) - v0 * W, [&](int64_t i, auto lanes) {
      const int64_t c = v0 * W + i;
      vf total{};
      for (int64_t first = 0; first < n; first += group) {
        vf sum{};
        for (int64_t row = first; row < smaller(first + group, n); ++row)
          sum += load(partials + row * stride + c, lanes);
        total += sum;
      }
      store(to + c, total, lanes);
    });
  });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
