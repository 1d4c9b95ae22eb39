// linear: y = activation(x W^T + bias) with a weight packed once.
//
// A product (product.inc.h, or product_int8.inc.h) leaves the sums of a block of rows and one panel
// in fp32 in a strip of the block's height; bias and activation are applied to that strip while it
// is in L1: the pre-activation never goes to memory.
//
// Rows are dealt to threads while each gets enough of them to amortise the panels it streams; what
// threads remain share the columns.
#pragma once

#include "cpu/bias_gelu.inc.h"
#include "cpu/product_int8.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kLaneWork = 1 << 17;  // FMAs below which a second thread is not worth waking

inline int64_t packed_bytes(const PackWeight& a) {
  if (a.int8) return int8_bytes(a.cols, a.depth);
  return packed_columns(a.cols) * a.depth * (a.dtype == Dtype::f32 ? 4 : 2);
}

inline void pack_weight(const PackWeight& a) {
  with_dtype(a.dtype, [&]<class T>() { a.int8 ? pack_weight_int8<T>(a) : pack_weight<T>(a); });
}

// activation(sums + bias) of one panel's strip, in place. `cols` of its columns exist.
template <class T, Activation A>
void finish_sums(int64_t rows, int64_t cols, const T* bias, float* sums) {
  constexpr int kRows = larger(1, kTogether / kMaxVectors), kVectors = kRows * kMaxVectors;
  vf shift[kMaxVectors] = {};
  if (bias)
    sweep(cols, [&](int64_t j, auto lanes) { shift[j / W] = load(bias + j, lanes); });
  for (int64_t i = 0; i < rows; i += kRows) {  // past the last row there is room for these
    float* strip = sums + i * kPanel;
    vf u[kVectors];
    each<kVectors>([&](int j) ALWAYS_INLINE_LAMBDA {
      u[j] = load(strip + j * W) + shift[j % kMaxVectors];
    });
    activate<A>(u);
    each<kVectors>([&](int j) ALWAYS_INLINE_LAMBDA { store(strip + j * W, u[j]); });
  }
}

template <class T>
void copy_panel(int64_t rows, int64_t cols, const float* sums, T* y, int64_t ldy) {
  for (int64_t i = 0; i < rows; ++i)
    sweep(cols, [&](int64_t j, auto lanes) {
      store(y + i * ldy + j, load(sums + i * kPanel + j), lanes);
    });
}

// How rows and columns are dealt to threads: `across` shares of the rows, `along` of the columns.
struct Lanes {
  int64_t across, along;
  Lanes(int64_t rows, int64_t work, int64_t panels) {
    const int64_t threads = larger<int64_t>(1, smaller(thread_count(), work / kLaneWork));
    across = larger<int64_t>(1, smaller(threads, rows / kLaneRows));
    along = larger<int64_t>(1, smaller(threads / across, panels));
  }
};

// Calls f(first, rows) for blocks of nearly equal height, at most `most`, of the rows [begin, end).
template <class F>
void for_row_blocks(int64_t begin, int64_t end, int64_t most, const F& f) {
  const int64_t blocks = ceil_div(end - begin, most);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = begin + (end - begin) * b / blocks;
    f(first, begin + (end - begin) * (b + 1) / blocks - first);
  }
}

template <class T, Activation A, class PRODUCT>
void linear_forward(const Linear& a) {
  const int64_t panels = ceil_div(a.cols, kPanel), block = PRODUCT::most_rows(a.depth);
  const Lanes lanes(a.rows, a.rows * a.depth * a.cols, panels);
  parallel(lanes.across * lanes.along, 1, [&](int64_t begin, int64_t end) {
    const int64_t most = smaller(block, a.rows);
    PRODUCT product(most, a.depth);
    Scratch sums((most + kTogether) * kPanel);
    for (int64_t lane = begin; lane < end; ++lane) {
      const int64_t i = lane / lanes.along, j = lane % lanes.along;
      const int64_t top = a.rows * i / lanes.across, bottom = a.rows * (i + 1) / lanes.across;
      for_row_blocks(top, bottom, block, [&](int64_t row, int64_t rows) {
        product.take(static_cast<const T*>(a.x) + row * a.depth, rows);
        for (int64_t p = panels * j / lanes.along; p < panels * (j + 1) / lanes.along; ++p) {
          const int64_t col = p * kPanel, cols = smaller(kPanel, a.cols - col);
          product.multiply(a.packed, p, sums.data);
          const T* bias = a.bias ? static_cast<const T*>(a.bias) + col : nullptr;
          finish_sums<T, A>(rows, cols, bias, sums.data);
          copy_panel(rows, cols, sums.data, static_cast<T*>(a.y) + row * a.cols + col, a.cols);
        }
      });
    }
  });
}

inline void linear_forward(const Linear& a) {
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<Activation A>() {
      a.int8 ? linear_forward<T, A, Int8Product<T>>(a) : linear_forward<T, A, FloatProduct<T>>(a);
    });
  });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
