// A block of rows times a weight packed once into panels, in fp32 arithmetic.
//
// The register tile of attention's products (gemm.inc.h) runs over panels of the weight that stay
// in L1 while a block of rows, which stays in L2, passes by. x is read where it lies (its rows are
// contiguous; 16-bit ones are widened once per block). 16-bit weights stay 16 bits in memory and
// are widened panel by panel, once for all rows of a block.
#pragma once

#include "cpu/gemm.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kPanel = kMaxVectors * W;
constexpr int64_t kDepth = kPanel < 16 ? 384 : 6144 / kPanel;  // 24 KiB of a panel, most of L1
constexpr int64_t kBlockBytes = 393216;  // of rows in fp32, beside the panels in L2
constexpr int64_t kMaxBlock = 192;       // rows: 12 KiB of sums, or 18 with AVX2
constexpr int64_t kLaneRows = 48;        // fewer, and a thread mostly waits for panels

inline int64_t packed_columns(int64_t cols) { return round_up(cols, kPanel); }

template <class T>
void pack_weight(const PackWeight& a) {
  const T* weight = static_cast<const T*>(a.weight);
  parallel(ceil_div(a.cols, kPanel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      T* to = static_cast<T*>(a.packed) + panel * kPanel * a.depth;
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t col = panel * kPanel + j;
        for (int64_t k = 0; k < a.depth; ++k)
          to[k * kPanel + j] = col < a.cols ? weight[col * a.depth + k] : T{};
      }
    }
  });
}

// n floats at p: where they are, or widened to `buffer`.
inline const float* as_fp32(const float* p, int64_t, float*) { return p; }
template <class T>
const float* as_fp32(const T* p, int64_t n, float* buffer) {
  sweep(n, [&](int64_t i, auto lanes) { store(buffer + i, load(p + i, lanes), lanes); });
  return buffer;
}

// sums[i, :] (+)= x[i, :] . panel for `rows` rows of x, ldx apart, all of the depth. `next` is the
// panel that is multiplied by after this one.
template <bool MORE, class T>
void multiply_by_panel(
    int64_t rows, int64_t depth, const float* x, int64_t ldx, const T* panel, const T* next,
    float* buffer, float* sums) {
  const int64_t blocks = larger<int64_t>(1, ceil_div(depth, kDepth));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = depth * block / blocks, deep = depth * (block + 1) / blocks - first;
    const float* right = as_fp32(panel + first * kPanel, deep * kPanel, buffer);
    const T* ahead = block + 1 < blocks ? panel + (first + deep) * kPanel : next;
    auto run = [&]<bool ADD>() {
      multiply_panel<Fp32Product, Layout::row_major, ADD, kPanel, kMaxVectors>(
          rows, deep, x + first, ldx, right, kPanel, sums, kPanel, ahead,
          deep * kPanel * int64_t(sizeof(T)));
    };
    if (block == 0 && !MORE)
      run.template operator()<false>();
    else
      run.template operator()<true>();
  }
}

inline int64_t block_rows(int64_t floats_per_row) {
  const int64_t fitting = kBlockBytes / 4 / larger<int64_t>(1, floats_per_row);
  return smaller(kMaxBlock, larger(kLaneRows, fitting));
}

// A block of rows of x and its product with a panel of a weight of the same dtype.
template <class T>
struct FloatProduct {
  static constexpr int64_t kRowStep = 1;  // blocks of rows best begin at a multiple of this
  static constexpr int64_t kLeastRows = kLaneRows;  // of a thread that reads all panels
  static constexpr bool kWiden = sizeof(T) < sizeof(float);
  static int64_t most_rows(int64_t depth) { return block_rows(depth); }

  int64_t depth, rows = 0;
  Scratch memory;
  float *wide, *panels;
  const float* x = nullptr;
  FloatProduct(int64_t block, int64_t depth)
      : depth(depth), memory(kWiden ? block * depth + kPanel * kDepth : 0), wide(memory.data),
        panels(wide + block * depth * kWiden) {}

  void take(const T* from, int64_t count) {
    rows = count;
    x = as_fp32(from, rows * depth, wide);
  }

  void multiply(const void* packed, int64_t panel, float* sums) const {
    const T* w = static_cast<const T*>(packed) + panel * kPanel * depth;
    multiply_by_panel<false>(rows, depth, x, depth, w, w + kPanel * depth, panels, sums);
  }
};

}  // namespace bert_fast::cpu::BERT_FAST_ISA
