// A block of rows times a weight packed once, both bf16, in pairs along the depth: the products are
// exact and the sums fp32. By the dot product of AVX-512 BF16, or 16 x 16 of them at once by AMX.
//
// A panel holds pairs [depth / 2, kPanel], which a vector of either kind reads as it lies; x is
// pairs already. Depths are padded with zeros to whole rows of a tile.
#pragma once

#include "cpu/product.inc.h"
#include "cpu/tiles.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

#if defined(BERT_FAST_AVX512_BF16)
constexpr bool kPairs = true;

inline int64_t pairs_of(int64_t depth) { return round_up(ceil_div(depth, 2), kTilePairs); }

inline void pack_weight_pairs(const PackWeight& a) {
  const auto* weight = static_cast<const bf16*>(a.weight);
  const int64_t pairs = pairs_of(a.depth);
  parallel(ceil_div(a.cols, kPanel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      bf16* to = static_cast<bf16*>(a.packed) + panel * kPanel * pairs * 2;
      memset(to, 0, kPanel * pairs * 2 * sizeof(bf16));
      for (int64_t j = 0; j < smaller(kPanel, a.cols - panel * kPanel); ++j)
        for (int64_t k = 0; k < a.depth; ++k)
          to[(k / 2 * kPanel + j) * 2 + k % 2] = weight[(panel * kPanel + j) * a.depth + k];
    }
  });
}

struct PairProduct {
  static constexpr int64_t kRowStep = kTileRows;
  // Tiles multiply some eight times as fast as fp32 vectors do, and wait as long for panels. (By
  // their rates: no run has looked for the best value.)
  static constexpr int64_t kLeastRows = kTileRows > 1 ? 8 * kLaneRows : 2 * kLaneRows;
  static int64_t most_rows(int64_t depth) {
    return block_rows(pairs_of(depth)) / kTileRows * kTileRows;
  }

  int64_t depth, pairs, rows = 0, whole = 0;
  Scratch memory;
  Tiles tiles;
  const float *x = nullptr, *rest = nullptr;  // `whole` rows [pairs] where they are, the others
  PairProduct(int64_t block, int64_t depth)
      : depth(depth), pairs(pairs_of(depth)),
        memory((depth == 2 * pairs ? kTileRows : round_up(block, kTileRows)) * pairs) {}

  void take(const bf16* from, int64_t count) {
    rows = count;
    whole = depth == 2 * pairs ? rows / kTileRows * kTileRows : 0;
    x = reinterpret_cast<const float*>(from);
    rest = memory.data;
    // Tiles read whole: what is past the last row takes part, and is not copied from the sums.
    bf16* to = reinterpret_cast<bf16*>(memory.data);
    for (int64_t i = whole; i < rows; ++i, to += 2 * pairs) {
      memcpy(to, from + i * depth, depth * sizeof(bf16));
      memset(to + depth, 0, (2 * pairs - depth) * sizeof(bf16));
    }
    memset(to, 0, (round_up(rows, kTileRows) - rows) * 2 * pairs * sizeof(bf16));
  }

  // sums[i, :] = x[i, :] . panel, kDepth pairs at a time: so much of a panel stays in L1.
  void multiply(const void* packed, int64_t panel, float* sums) const {
    const float* w = static_cast<const float*>(packed) + panel * kPanel * pairs;
    for (int64_t first = 0; first < pairs; first += kDepth) {
      const int64_t deep = smaller(kDepth, pairs - first);
      if (first == 0)
        multiply_block<false>(deep, first, w, sums);
      else
        multiply_block<true>(deep, first, w + first * kPanel, sums);
    }
    if (pairs == 0) memset(sums, 0, rows * kPanel * sizeof(float));
  }

  template <bool ADD>
  void multiply_block(int64_t deep, int64_t first, const float* w, float* sums) const {
    const float* next = w + deep * kPanel;
    const int64_t bytes = deep * kPanel * int64_t(sizeof(float));
#if defined(BERT_FAST_AMX)
    // To one tile's rows the weight comes as a stream, which the hardware sees by itself.
    multiply_tiles<ADD, kMaxVectors>(
        whole, deep, x + first, pairs, w, kPanel, sums, kPanel, next,
        whole > kTileRows ? bytes : 0);
    multiply_tiles<ADD, kMaxVectors>(
        rows - whole, deep, rest + first, pairs, w, kPanel, sums + whole * kPanel, kPanel);
#else
    multiply_panel<Bf16PairProduct, Layout::row_major, ADD, kPanel, kMaxVectors>(
        rows, deep, (whole ? x : rest) + first, pairs, w, kPanel, sums, kPanel, next, bytes);
#endif
  }
};
#else
constexpr bool kPairs = false;
#endif

// What multiplies rows of T by a weight of T.
template <class T>
struct ProductOf {
  using type = FloatProduct<T>;
};
#if defined(BERT_FAST_AVX512_BF16)
template <>
struct ProductOf<bf16> {
  using type = PairProduct;
};
#endif

}  // namespace bert_fast::cpu::BERT_FAST_ISA
