// A group of 128 neighbours along the depth, of a row of x or of a weight: rotated, and rounded to 8
// bits. What for, product_int8.inc.h says.
#pragma once

#include <cstring>
#include <utility>

#include "cpu/product.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kGroup = 128;  // of the depth
constexpr float kMostOfX = 127.0f, kMostOfWeight = 127.0f;
constexpr float kMostOfEight = 254.0f;  // + 8 x 0.5 of rounding, x 127 = 32,766

inline int64_t groups_of(int64_t depth) { return ceil_div(depth, kGroup); }

// Neighbours: eight at least, on every instruction set.
constexpr int kLanes = larger(8, W), kVectors = int(kGroup / kLanes);
typedef int32_t vgi __attribute__((vector_size(4 * kLanes)));
typedef float vg __attribute__((vector_size(4 * kLanes)));

// Sums a + b and differences a - b of the elements STEP apart. Factors of 1 and -1 round nothing,
// fused with the sum or not.
template <int STEP, int... L>
ALWAYS_INLINE vg turned(vg v, std::integer_sequence<int, L...>) {
#if defined(__clang__)
  const vg other = __builtin_shufflevector(v, v, (L ^ STEP)...);
#else
  const vg other = __builtin_shuffle(v, vgi{(L ^ STEP)...});
#endif
  return v * vg{(L & STEP ? -1.0f : 1.0f)...} + other;
}

// One group, widened, zeros beyond `n`, in rotated (not normalised: sqrt(128) times as long) form.
template <class T>
ALWAYS_INLINE void rotate_group(const T* from, int64_t n, vg (&v)[kVectors]) {
  alignas(64) float wide[kGroup];
  const float* group = wide;
  if (n < kGroup) {
    std::memset(wide, 0, sizeof(wide));
    sweep(n, [&](int64_t i, auto lanes) { store(wide + i, load(from + i, lanes), lanes); });
  } else {
    group = as_fp32(from, n, wide);
  }
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    std::memcpy(&v[i], group + i * kLanes, sizeof(vg));
    v[i] = turned<4>(turned<2>(turned<1>(v[i], lanes), lanes), lanes);
    if constexpr (kLanes > 8) v[i] = turned<8>(v[i], lanes);
  }
#pragma GCC unroll 4
  for (int half = 1; half < kVectors; half *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      if (i & half) continue;
      const vg a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
}

// f over all lanes.
template <class V, class F>
ALWAYS_INLINE float reduced(V v, const F& f) {
  if constexpr (sizeof(V) == 4 * sizeof(float)) {
    return f(f(v[0], v[1]), f(v[2], v[3]));
  } else {
    typedef float half __attribute__((vector_size(sizeof(V) / 2)));
    half halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return reduced(f(halves[0], halves[1]), f);
  }
}

// NaN if any element of the group is NaN or infinite, else 0: v[0] has the sum of all.
ALWAYS_INLINE float nan_of(const vg (&v)[kVectors]) {
  return reduced(v[0] * 0.0f, [](auto a, auto b) { return a + b; });
}

// 0 for a step so small that its inverse would be infinite: all levels are 0 then.
ALWAYS_INLINE float inverse_of(float step) { return step >= __FLT_MIN__ ? 1.0f / step : 0.0f; }

// ---- weights -----------------------------------------------------------------------------------

// One column's group -> 8-bit values, strided as a panel has them, its scale and their sum.
template <class T>
void pack_group(const T* weight, int64_t n, int8_t* to, float* scale, float* total) {
  vg v[kVectors];
  rotate_group(weight, n, v);
  alignas(64) float w[kGroup];
  std::memcpy(w, v, sizeof(w));
  float most = 0.0f, sums[kGroup / 8][2] = {};
  for (int64_t k = 0; k < kGroup; ++k) {
    w[k] /= kGroup;  // both rotations' lengths
    most = larger(most, w[k] < 0 ? -w[k] : w[k]);
    // Which eight share 16 bits: the first or the last two of four in a row, sixteen depths long.
    float(&eight)[2] = sums[k / 16 * 2 + k % 4 / 2];
    eight[w[k] < 0] += w[k] < 0 ? -w[k] : w[k];
  }
  float step = most / kMostOfWeight;
  for (auto& eight : sums) step = larger(step, larger(eight[0], eight[1]) / kMostOfEight);
  const float inverse = inverse_of(step);
  float sum = 0.0f;
  for (int64_t k = 0; k < kGroup; ++k) {
    const float q = __builtin_nearbyintf(w[k] * inverse);
    to[k / 4 * 4 * kPanel + k % 4] = int8_t(q);
    sum += q;
  }
  *scale = step + nan_of(v);
  *total = sum;
}

// ---- rows of x ---------------------------------------------------------------------------------

// How a group of a row of x was quantised.
struct Range {
  float step, low;
};

// One group in rotated form, and how it will be quantised.
template <class T>
ALWAYS_INLINE Range rotate_group(const T* x, int64_t n, float* rotated) {
  vg v[kVectors];
  rotate_group(x, n, v);
  std::memcpy(rotated, v, sizeof(v));
  vg least = v[0], most = v[0];
#pragma GCC unroll 16
  for (int i = 1; i < kVectors; ++i) {
    least = v[i] < least ? v[i] : least;
    most = v[i] > most ? v[i] : most;
  }
  const float low = reduced(least, [](auto a, auto b) { return a < b ? a : b; });
  const float high = reduced(most, [](auto a, auto b) { return a > b ? a : b; });
  return {(high - low) / kMostOfX, low + nan_of(v)};
}

ALWAYS_INLINE void quantise_group(const float* rotated, const Range& range, uint8_t* to) {
  const float inverse = inverse_of(range.step);
  alignas(64) float levels[kGroup];
  for (int64_t k = 0; k < kGroup; ++k) levels[k] = (rotated[k] - range.low) * inverse;
  // Not by adding 1.5 x 2^23: fused with the product above, that rounds once where this does twice.
  for (int64_t k = 0; k < kGroup; ++k) to[k] = uint8_t(int32_t(__builtin_rintf(levels[k])));
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
