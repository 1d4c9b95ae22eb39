// feed_forward: y = activation(x U^T + b) D^T, the inner states never in memory as a whole.
//
// For a block of rows, kSlice of the inner columns at a time: the slice of activation(x U^T + b) is
// made from the panels of U that hold it, stays in L2, and is multiplied by its depths of D's
// panels into sums that stay there too. Nothing of [T, F] is written to memory or read from it, and
// each weight still streams once per block of rows. Rows are dealt to threads; with too few of them
// for every thread, the caller runs the two products one after the other, which can share columns.
#pragma once

#include "cpu/linear.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kSlice = 192;  // inner columns
static_assert(kSlice % kPanel == 0, "a slice is whole panels");
constexpr int64_t kFeedForwardRows = 128;  // more leave L2, fewer read the weights more often

// Not for products of pairs: they take the inner states as bf16, in memory as rows.
inline bool feed_forward_fits(const FeedForward& a) {
  if (kPairs && a.dtype == Dtype::bf16 && !a.int8) return false;
  return a.inner > 0 && a.rows >= thread_count() * kLaneRows;
}

struct FeedForwardBuffers {
  Scratch memory;
  float *rows, *panel, *sums, *inner, *out;
  FeedForwardBuffers(int64_t block, const FeedForward& a, bool widen)
      : memory(
            (widen ? block * a.hidden + kPanel * kDepth : 0) + (block + kSpareRows) * kPanel +
            block * (kSlice + round_up(a.cols, kPanel))),
        rows(memory.data), panel(rows + block * a.hidden * widen),
        sums(panel + kPanel * kDepth * widen), inner(sums + (block + kSpareRows) * kPanel),
        out(inner + block * kSlice) {}
};

// inner[i, :] = activation(x[i, :] U^T + b) for the columns [first, first + wide) of U.
template <class T, Activation A>
void make_slice(
    const FeedForward& a, FeedForwardBuffers& m, const float* x, int64_t rows, int64_t first,
    int64_t wide) {
  for (int64_t j = 0; j < wide; j += kPanel) {
    const int64_t col = first + j, cols = smaller(kPanel, wide - j);
    const T* panel = static_cast<const T*>(a.up) + col * a.hidden;
    const T* next = j + kPanel < wide ? panel + kPanel * a.hidden
                                      : static_cast<const T*>(a.down) + first * kPanel;
    multiply_by_panel<false>(rows, a.hidden, x, a.hidden, panel, next, m.panel, m.sums);
    const T* bias = a.up_bias ? static_cast<const T*>(a.up_bias) + col : nullptr;
    finish_sums<T, A>(rows, cols, bias, m.sums, m.inner + j, kSlice);
  }
}

template <class T, Activation A>
void feed_forward_forward(const FeedForward& a) {
  const int64_t threads = thread_count();
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t top = a.rows * begin / threads, bottom = a.rows * end / threads;
    FeedForwardBuffers m(smaller(kFeedForwardRows, bottom - top), a, sizeof(T) < sizeof(float));
    for_row_blocks(top, bottom, kFeedForwardRows, 1, [&](int64_t row, int64_t rows) {
      const T* from = static_cast<const T*>(a.x) + row * a.hidden;
      const float* x = as_fp32(from, rows * a.hidden, m.rows);
      for (int64_t first = 0; first < a.inner; first += kSlice) {
        const int64_t wide = smaller(kSlice, a.inner - first);
        make_slice<T, A>(a, m, x, rows, first, wide);
        for (int64_t col = 0; col < a.cols; col += kPanel) {
          const T* panel = static_cast<const T*>(a.down) + col * a.inner + first * kPanel;
          const T* next = col + kPanel < a.cols
              ? panel + kPanel * a.inner
              : static_cast<const T*>(a.up) + (first + wide) % a.inner * a.hidden;
          float* sums = m.out + col * rows;
          if (first == 0)
            multiply_by_panel<false>(rows, wide, m.inner, kSlice, panel, next, m.panel, sums);
          else
            multiply_by_panel<true>(rows, wide, m.inner, kSlice, panel, next, m.panel, sums);
        }
      }
      for (int64_t col = 0; col < a.cols; col += kPanel)
        finish_sums<T, Activation::none>(
            rows, smaller(kPanel, a.cols - col), nullptr, m.out + col * rows,
            static_cast<T*>(a.y) + row * a.cols + col, a.cols);
    });
  });
}

// In 8 bits: a slice of the inner states is rounded to whole groups of the second product's left
// factor, which is kept for all of a block's rows: a quarter of what they take in fp32.
template <class T, Activation A, bool DOT>
void feed_forward_int8(const FeedForward& a) {
  constexpr int64_t kWide = kGroup * (kPanel % 3 ? 1 : 3);
  static_assert(kWide % kPanel == 0 && kWide % kGroup == 0, "a slice is whole panels and groups");
  using Product = Int8Product<T, DOT>;
  const int64_t threads = thread_count();
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t top = share_of(a.rows, begin, threads, Product::kRowStep);
    const int64_t bottom = share_of(a.rows, end, threads, Product::kRowStep);
    const int64_t most =
        smaller(bottom - top, smaller(Product::most_rows(a.hidden), Product::most_rows(a.inner)));
    Product up(most, a.hidden), down(most, a.inner);
    Scratch sums((most + kSpareRows) * kPanel), slice(most * kWide);
    T* inner = reinterpret_cast<T*>(slice.data);
    for_row_blocks(top, bottom, most, Product::kRowStep, [&](int64_t row, int64_t rows) {
      up.take(static_cast<const T*>(a.x) + row * a.hidden, rows);
      down.rows = rows;
      for (int64_t first = 0; first < a.inner; first += kWide) {
        const int64_t wide = smaller(kWide, a.inner - first);
        for (int64_t j = 0; j < wide; j += kPanel) {
          const int64_t col = first + j, cols = smaller(kPanel, wide - j);
          up.multiply(a.up, col / kPanel, sums.data);
          const T* bias = a.up_bias ? static_cast<const T*>(a.up_bias) + col : nullptr;
          finish_sums<T, A>(rows, cols, bias, sums.data, inner + j, kWide);
        }
        down.take_columns(inner, kWide, first, wide);
      }
      for (int64_t col = 0; col < a.cols; col += kPanel) {
        down.multiply(a.down, col / kPanel, sums.data);
        T* y = static_cast<T*>(a.y) + row * a.cols + col;
        finish_sums<T, Activation::none>(
            rows, smaller(kPanel, a.cols - col), nullptr, sums.data, y, a.cols);
      }
    });
  });
}

template <bool DOT>
void feed_forward_forward(const FeedForward& a) {
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<Activation A>() {
      a.int8 ? feed_forward_int8<T, A, DOT>(a) : feed_forward_forward<T, A>(a);
    });
  });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
