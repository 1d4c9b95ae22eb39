// A block of rows times a weight packed once into panels, both in 8-bit integers, summed exactly.
//
// Rows of x and of W are cut into groups of 128 along the depth and rotated there by the Hadamard
// matrix. That leaves x W^T as it is and spreads an outlier over all of the group (QuaRot, Ashkboos
// et al., arXiv 2404.00456), so its range is narrow. Then
//
//   x = low + step q,  q in 0 .. 127, low and step of each row and group, found at every call;
//   W = scale p,       p in -127 .. 127, scale of each column and group, found once;
//   x W^T = sum over groups of scale (step sum(q p) + low sum(p)).
//
// Without dot-product instructions, sums of eight products are held in 16 bits: the weight's scale
// is never so small that one could overflow, whatever x is (kMostOfEight). The same integers come
// out on every machine.
#pragma once

#include <cstring>
#include <utility>

#include "cpu/product.inc.h"
#include "cpu/tiles.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kGroup = 128;  // of the depth
constexpr float kMostOfX = 127.0f, kMostOfWeight = 127.0f;
constexpr float kMostOfEight = 254.0f;  // + 8 x 0.5 of rounding, x 127 = 32,766
constexpr int64_t kPanelGroup = (kGroup + 2 * int64_t(sizeof(float))) * kPanel;  // bytes

// Dot products of bytes in one instruction (VNNI): every CPU with BF16 has them, and some with
// AVX-512 alone (Cascade Lake, Ice Lake), for which functions are compiled beside the others.
#if defined(BERT_FAST_AVX512_BF16)
constexpr bool kHasDot = true;
#define BERT_FAST_DOT
#else
constexpr bool kHasDot = false;
#if defined(EMULATED_ISA)
#define BERT_FAST_DOT
#else
#define BERT_FAST_DOT __attribute__((target("avx512vnni")))
#endif
#endif
template <bool DOT>
constexpr int kInt8Rows = DOT ? 6 : kMaxVectors == 3 ? 3 : 5;  // of a register tile

inline int64_t groups_of(int64_t depth) { return ceil_div(depth, kGroup); }

inline int64_t int8_bytes(int64_t cols, int64_t depth) {
  return ceil_div(cols, kPanel) * groups_of(depth) * kPanelGroup;
}

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

template <class T>
void pack_weight_int8(const PackWeight& a) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t groups = groups_of(a.depth);
  parallel(ceil_div(a.cols, kPanel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * groups; i < end * groups; ++i) {
      const int64_t first = i % groups * kGroup, n = smaller(kGroup, a.depth - first);
      auto* to = static_cast<int8_t*>(a.packed) + i * kPanelGroup;
      std::memset(to, 0, kPanelGroup);
      auto* scales = reinterpret_cast<float*>(to + kGroup * kPanel);
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t col = i / groups * kPanel + j;
        const T* from = weight + col * a.depth + first;
        if (col < a.cols) pack_group(from, n, to + 4 * j, scales + j, scales + kPanel + j);
      }
    }
  });
}

// ---- products ----------------------------------------------------------------------------------

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

constexpr int64_t kSteps = 16;  // depths between two widenings

// sums[j] += the products of x and each column of a panel, 16 depths of both at once.
ALWAYS_INLINE void add_int8_products(vi (&sums)[kMaxVectors], const uint8_t* x, const int8_t* w) {
#if defined(BERT_FAST_AVX512) || defined(BERT_FAST_AVX2)
#if defined(BERT_FAST_AVX512)
  typedef __m512i bytes;
  auto spread = [](int four) { return _mm512_set1_epi32(four); };
#else
  typedef __m256i bytes;
  auto spread = [](int four) { return _mm256_set1_epi32(four); };
#endif
  bytes eights[kMaxVectors];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    int four;
    std::memcpy(&four, x + 4 * q, sizeof(four));
    const bytes x4 = spread(four);
#pragma GCC unroll 4
    for (int j = 0; j < kMaxVectors; ++j) {
      bytes w4;
      std::memcpy(&w4, w + (q * kMaxVectors + j) * sizeof(bytes), sizeof(bytes));
#if defined(BERT_FAST_AVX512)
      const bytes twos = _mm512_maddubs_epi16(x4, w4);
      eights[j] = q == 0 ? twos : _mm512_add_epi16(eights[j], twos);
#else
      const bytes twos = _mm256_maddubs_epi16(x4, w4);
      eights[j] = q == 0 ? twos : _mm256_add_epi16(eights[j], twos);
      asm("" : "+x"(eights[j]));  // one after another: GCC's tree of sums would spill
#endif
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kMaxVectors; ++j)
#if defined(BERT_FAST_AVX512)
    sums[j] += (vi)_mm512_madd_epi16(eights[j], _mm512_set1_epi16(1));
#else
    sums[j] += (vi)_mm256_madd_epi16(eights[j], _mm256_set1_epi16(1));
#endif
#else
  for (int k = 0; k < kSteps; ++k)
    for (int c = 0; c < kPanel; ++c)
      sums[c / W][c % W] += int(x[k]) * w[k / 4 * 4 * kPanel + 4 * c + k % 4];
#endif
}

// sums[i, :] (+)= what the integers of MR rows and one group stand for. Column by column: each scale
// is read once.
template <bool ADD, int MR>
ALWAYS_INLINE void add_scaled(
    const Range* ranges, const int8_t* panel, const vi (&exact)[MR][kMaxVectors], float* sums) {
  const auto* scales = reinterpret_cast<const float*>(panel + kGroup * kPanel);
#pragma GCC unroll 4
  for (int j = 0; j < kMaxVectors; ++j) {
    const vf scale = load(scales + j * W), total = load(scales + kPanel + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      float* to = sums + i * kPanel + j * W;
      const vf whole = __builtin_convertvector(exact[i][j], vf);
      const vf product = fma(set1(ranges[i].step), whole, set1(ranges[i].low) * total);
      store(to, fma(scale, product, ADD ? load(to) : vf{}));
    }
  }
}

ALWAYS_INLINE void prefetch(const int8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(from + i, 0, 3);
}

// sums[i, :] (+)= x[i, :] . panel for MR rows of one group.
template <bool ADD, bool DOT, int MR>
  requires(!DOT)
void multiply_group(
    const uint8_t* x, const Range* ranges, const int8_t* panel, const int8_t* ahead, int64_t step,
    float* sums) {
  vi exact[MR][kMaxVectors] = {};
  for (int64_t k = 0; k < kGroup; k += kSteps, ahead += step) {
    prefetch(ahead, step);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
      add_int8_products(exact[i], x + i * kGroup + k, panel + k * kPanel);
  }
  add_scaled<ADD>(ranges, panel, exact, sums);
}

#if defined(BERT_FAST_AVX512)
// The same by dot products: four vectors of the weight, read once, for all rows.
template <bool ADD, bool DOT, int MR>
  requires DOT
BERT_FAST_DOT void multiply_group(
    const uint8_t* x, const Range* ranges, const int8_t* panel, const int8_t* ahead, int64_t step,
    float* sums) {
  vi exact[MR][kMaxVectors] = {};
  for (int64_t k = 0; k < kGroup; k += kSteps, ahead += step) {
    prefetch(ahead, step);
#pragma GCC unroll 4
    for (int64_t q = k; q < k + kSteps; q += 4) {
      __m512i w4[kMaxVectors];
      std::memcpy(w4, panel + q * kPanel, sizeof(w4));
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        int four;
        std::memcpy(&four, x + i * kGroup + q, sizeof(four));
#pragma GCC unroll 4
        for (int j = 0; j < kMaxVectors; ++j)
          exact[i][j] =
              (vi)_mm512_dpbusd_epi32((__m512i)exact[i][j], _mm512_set1_epi32(four), w4[j]);
      }
    }
  }
  add_scaled<ADD>(ranges, panel, exact, sums);
}
#endif

#if defined(BERT_FAST_AMX)
template <bool ADD, bool DOT>
void multiply_rows(
    int64_t rows, const uint8_t* x, const Range* ranges, const int8_t* panel, float* sums) {
  alignas(64) int32_t exact[kTileRows][kPanel];
  // As below: asked for evenly, unless there is one tile's rows.
  const int64_t count = ceil_div(rows, kTileRows), share = count > 1 ? kPanelGroup / count : 0;
  const int8_t* ahead = panel + kPanelGroup;
  for (int64_t i = 0; i < rows; ++i) {
    if (i % kTileRows == 0) {
      prefetch(ahead, share);
      ahead += share;
      multiply_tiles_of_bytes(kGroup, x + i * kGroup, kGroup, panel, exact[0]);
    }
    vi whole[1][kMaxVectors];
    memcpy(whole, exact[i % kTileRows], sizeof(whole));
    add_scaled<ADD>(ranges + i, panel, whole, sums + i * kPanel);
  }
}
#else
template <bool ADD, bool DOT, int... I>
void multiply_rows(
    int64_t rows, const uint8_t* x, const Range* ranges, const int8_t* panel, float* sums,
    std::integer_sequence<int, I...>) {
  using Tile = decltype(&multiply_group<ADD, DOT, 1>);
  static constexpr Tile tiles[] = {multiply_group<ADD, DOT, I + 1>...};
  const int64_t count = ceil_div(rows, kInt8Rows<DOT>);
  // The next group is asked for evenly by all tiles; for one tile the hardware does it better.
  const int64_t whole = count > 1 ? kPanelGroup : 0, step = whole / count * kSteps / kGroup;
  const int8_t* ahead = panel + whole;
  for (int64_t t = 0, i = 0; t < count; ++t) {
    const int64_t high = rows / count + (t < rows % count);
    tiles[high - 1](x + i * kGroup, ranges + i, panel, ahead, step, sums + i * kPanel);
    ahead += step * (kGroup / kSteps);
    i += high;
  }
}

template <bool ADD, bool DOT>
void multiply_rows(
    int64_t rows, const uint8_t* x, const Range* ranges, const int8_t* panel, float* sums) {
  constexpr auto tiles = std::make_integer_sequence<int, kInt8Rows<DOT>>{};
  multiply_rows<ADD, DOT>(rows, x, ranges, panel, sums, tiles);
}
#endif

// A block of rows of x, quantised, and its product with a panel of a weight. Group after group, the
// values [groups, rows, 128] and ranges [groups, rows] of all rows: so they are read.
template <class T, bool DOT>
struct Int8Product {
  static constexpr int64_t kRowStep = kTileRows, kLeastRows = kLaneRows;
  static int64_t most_rows(int64_t depth) {
    return block_rows(depth / 4) / kTileRows * kTileRows;
  }

  int64_t depth, groups, rows = 0;
  Scratch memory;
  Tiles tiles;
  float* rotated;  // a row
  Range* ranges;
  uint8_t* values;
  Int8Product(int64_t block, int64_t depth)
      : depth(depth), groups(groups_of(depth)),
        memory(  // a tile reads past the last row
            groups * kGroup +
            (block * groups * int64_t(sizeof(Range) + kGroup) + (kTileRows - 1) * kGroup) /
                int64_t(sizeof(float))),
        rotated(memory.data), ranges(reinterpret_cast<Range*>(rotated + groups * kGroup)),
        values(reinterpret_cast<uint8_t*>(ranges + block * groups)) {}

  void take(const T* x, int64_t count) {
    rows = count;
    take_columns(x, depth, 0, depth);
  }

  // The columns [first, first + wide) of all rows, ldx apart, `first` a multiple of kGroup.
  void take_columns(const T* x, int64_t ldx, int64_t first, int64_t wide) {
    // All groups of a row are rotated before the first is rounded: each takes long to find its range.
    const int64_t begin = first / kGroup, count = ceil_div(wide, kGroup);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t g = 0; g < count; ++g) {
        const T* from = x + i * ldx + g * kGroup;
        ranges[(begin + g) * rows + i] =
            rotate_group(from, smaller(kGroup, wide - g * kGroup), rotated + g * kGroup);
      }
      for (int64_t g = 0; g < count; ++g) {
        const int64_t at = (begin + g) * rows + i;
        quantise_group(rotated + g * kGroup, ranges[at], values + at * kGroup);
      }
    }
  }

  void multiply(const void* packed, int64_t panel, float* sums) const {
    if (groups == 0) std::memset(sums, 0, rows * kPanel * sizeof(float));
    const auto* w = static_cast<const int8_t*>(packed) + panel * groups * kPanelGroup;
    for (int64_t g = 0; g < groups; ++g, w += kPanelGroup) {
      const uint8_t* x = values + g * rows * kGroup;
      if (g == 0)
        multiply_rows<false, DOT>(rows, x, ranges, w, sums);
      else
        multiply_rows<true, DOT>(rows, x, ranges + g * rows, w, sums);
    }
  }
};

}  // namespace bert_fast::cpu::BERT_FAST_ISA
