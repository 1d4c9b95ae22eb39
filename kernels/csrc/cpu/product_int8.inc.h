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

#include "cpu/groups_int8.inc.h"
#include "cpu/tiles.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

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

inline int64_t int8_bytes(int64_t cols, int64_t depth) {
  return ceil_div(cols, kPanel) * groups_of(depth) * kPanelGroup;
}

// ---- weights -----------------------------------------------------------------------------------

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
