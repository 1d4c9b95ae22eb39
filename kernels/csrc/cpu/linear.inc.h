// linear: y = activation(x W^T + bias) with a weight packed once.
//
// A product (product.inc.h, product_pairs.inc.h, product_int8.inc.h) leaves the sums of a block of rows and one panel
// in fp32 in a strip of the block's height; bias and activation are applied on the way from there,
// while it is in L1, to y: the pre-activation never goes to memory.
//
// Rows are dealt to threads while each gets enough of them to amortise the panels it streams; what
// threads remain share the columns.
#pragma once

#include "cpu/bias_gelu.inc.h"
#include "cpu/product_int8.inc.h"
#include "cpu/product_pairs.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kLaneWork = 1 << 17;  // FMAs below which a second thread is not worth waking

inline int64_t packed_bytes(const PackWeight& a) {
  if (a.int8) return int8_bytes(a.cols, a.depth);
#if defined(BERT_FAST_AVX512_BF16)
  if (a.dtype == Dtype::bf16) return packed_columns(a.cols) * pairs_of(a.depth) * 4;
#endif
  return packed_columns(a.cols) * a.depth * (a.dtype == Dtype::f32 ? 4 : 2);
}

inline void pack_weight(const PackWeight& a) {
#if defined(BERT_FAST_AVX512_BF16)
  if (a.dtype == Dtype::bf16 && !a.int8) return pack_weight_pairs(a);
#endif
  with_dtype(a.dtype, [&]<class T>() { a.int8 ? pack_weight_int8<T>(a) : pack_weight<T>(a); });
}

// Rows of sums past the last that products may write, and activations read.
constexpr int64_t kSpareRows = kTileRows;

// y = activation(sums + bias) of `cols` columns of a panel's strip, good to what is rounded to T.
template <class T, Activation A, class Y>
void finish_sums(
    int64_t rows, int64_t cols, const T* bias, const float* sums, Y* y, int64_t ldy) {
  vf shift[kMaxVectors] = {};
  if (bias)
    sweep(cols, [&](int64_t j, auto lanes) { shift[j / W] = load(bias + j, lanes); });
  for (int64_t i = 0; i < rows; ++i, sums += kPanel, y += ldy) {
    if (cols < kPanel) {
      sweep(cols, [&](int64_t j, auto lanes) {
        store(y + j, activate<T, A>(load(sums + j) + shift[j / W]), lanes);
      });
      continue;
    }
    vf u[kMaxVectors];
    each<kMaxVectors>([&](int j) ALWAYS_INLINE_LAMBDA { u[j] = load(sums + j * W) + shift[j]; });
    activate<T, A>(u);
    each<kMaxVectors>([&](int j) ALWAYS_INLINE_LAMBDA { store(y + j * W, u[j]); });
  }
}

// The same of rows from `row` on and columns from `col` on, to where `group` columns of all rows lie
// together.
template <class T, class Y, Activation A>
void finish_groups(
    const Linear& a, int64_t row, int64_t rows, int64_t col, int64_t cols, const float* sums) {
  const int64_t group = a.group ? a.group : a.cols;
  for (int64_t j = 0; j < cols;) {
    const int64_t index = (col + j) / group, within = (col + j) % group;
    const int64_t wide = smaller(group - within, cols - j);
    const T* bias = a.bias ? static_cast<const T*>(a.bias) + col + j : nullptr;
    Y* y = static_cast<Y*>(a.y) + (index * a.rows + row) * group + within;
    finish_sums<T, A>(rows, wide, bias, sums + j, y, group);
    j += wide;
  }
}

// How rows and columns are dealt to threads: `across` shares of the rows, `along` of the columns, so
// that the largest share is done first; it waits for its panels as long as `least_rows` take. Of ways
// nearly alike, the one with most shares of the rows.
struct Lanes {
  int64_t across = 1, along = 1;
  Lanes(int64_t rows, int64_t least_rows, int64_t step, int64_t work, int64_t panels) {
    const int64_t threads = larger<int64_t>(1, smaller(thread_count(), work / kLaneWork));
    int64_t best = 0;
    for (int64_t i = 1; i <= threads; ++i) {
      const int64_t columns = larger<int64_t>(1, smaller(threads / i, panels));
      const int64_t tallest = round_up(ceil_div(rows, i), step);
      const int64_t time = ceil_div(panels, columns) * larger(tallest, least_rows);
      if (i == 1 || 16 * time <= 17 * best) across = i, along = columns;
      best = i == 1 ? time : smaller(best, time);
    }
  }
};

// Where share i of nearly equal `shares` of n rows begins: at a multiple of `step`.
inline int64_t share_of(int64_t n, int64_t i, int64_t shares, int64_t step) {
  return smaller(n, round_up(n * i / shares, step));
}

// Calls f(first, rows) for blocks of nearly equal height of the rows [begin, end): at most `most`,
// a multiple of `step`.
template <class F>
void for_row_blocks(int64_t begin, int64_t end, int64_t most, int64_t step, const F& f) {
  const int64_t n = end - begin, blocks = ceil_div(n, most);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = share_of(n, b, blocks, step);
    f(begin + first, share_of(n, b + 1, blocks, step) - first);
  }
}

// x of X and y of Y, all else of T.
template <class T, class X, class Y, Activation A, class PRODUCT>
void linear_forward(const Linear& a) {
  const int64_t panels = ceil_div(a.cols, kPanel), block = PRODUCT::most_rows(a.depth);
  const int64_t work = a.rows * a.depth * a.cols;
  const Lanes lanes(a.rows, PRODUCT::kLeastRows, PRODUCT::kRowStep, work, panels);
  parallel(lanes.across * lanes.along, 1, [&](int64_t begin, int64_t end) {
    const int64_t most = smaller(block, a.rows);
    PRODUCT product(most, a.depth);
    Scratch sums((most + kSpareRows) * kPanel);
    for (int64_t lane = begin; lane < end; ++lane) {
      const int64_t i = lane / lanes.along, j = lane % lanes.along;
      const int64_t top = share_of(a.rows, i, lanes.across, PRODUCT::kRowStep);
      const int64_t bottom = share_of(a.rows, i + 1, lanes.across, PRODUCT::kRowStep);
      for_row_blocks(top, bottom, block, PRODUCT::kRowStep, [&](int64_t row, int64_t rows) {
        product.take(static_cast<const X*>(a.x) + row * a.depth, rows);
        for (int64_t p = panels * j / lanes.along; p < panels * (j + 1) / lanes.along; ++p) {
          const int64_t col = p * kPanel, cols = smaller(kPanel, a.cols - col);
          product.multiply(a.packed, p, sums.data);
          finish_groups<T, Y, A>(a, row, rows, col, cols, sums.data);
        }
      });
    }
  });
}

// DOT: see add_int8_products.
template <bool DOT>
void linear_forward(const Linear& a) {
  constexpr Activation kNone = Activation::none;
  if (a.narrow_x) return linear_forward<float, bf16, float, kNone, Int8Product<bf16, DOT>>(a);
  if (a.narrow_y) return linear_forward<float, float, bf16, kNone, Int8Product<float, DOT>>(a);
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<Activation A>() {
      using Product = typename ProductOf<T>::type;
      a.int8 ? linear_forward<T, T, T, A, Int8Product<T, DOT>>(a)
             : linear_forward<T, T, T, A, Product>(a);
    });
  });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
