// linear: y = activation(x W^T + bias) with a weight packed once.
//
// The register tile of attention's products (gemm.inc.h) runs over panels of the weight that stay
// in L1 while a block of rows, which stays in L2, passes by. x is read where it lies (its rows are
// contiguous; 16-bit ones are widened once per block), sums are fp32 in a strip of the block's
// height, and bias and activation are applied to that strip while it is in L1: the pre-activation
// never goes to memory. 16-bit weights stay 16 bits in memory and are widened panel by panel, once
// for all rows of a block.
//
// Rows are dealt to threads while each gets enough of them to amortise the panels it streams; what
// threads remain share the columns.
#pragma once

#include "cpu/bias_gelu.inc.h"
#include "cpu/gemm.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kPanel = kMaxVectors * W;
constexpr int64_t kDepth = kPanel < 16 ? 384 : 6144 / kPanel;  // 24 KiB of a panel, most of L1
constexpr int64_t kBlockBytes = 393216;    // of rows in fp32, beside the panels in L2
constexpr int64_t kMaxBlock = 192;         // rows, so that their sums stay in L1
constexpr int64_t kLaneRows = 48;          // fewer, and a thread mostly waits for panels
constexpr int64_t kLaneWork = 1 << 17;     // FMAs below which a second thread is not worth waking

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
inline void pack_weight(const PackWeight& a) {
  with_dtype(a.dtype, [&]<class T>() { pack_weight<T>(a); });
}

struct LinearBuffers {
  Scratch memory;
  float *rows, *panel, *sums;
  LinearBuffers(int64_t block, int64_t depth, bool widen)
      : memory((widen ? block * depth + kPanel * kDepth : 0) + block * kPanel),
        rows(memory.data), panel(rows + block * depth * widen),
        sums(panel + kPanel * kDepth * widen) {}
};

// n floats at p: where they are, or widened to `buffer`.
inline const float* as_fp32(const float* p, int64_t, float*) { return p; }
template <class T>
const float* as_fp32(const T* p, int64_t n, float* buffer) {
  sweep(n, [&](int64_t i, auto lanes) { store(buffer + i, load(p + i, lanes), lanes); });
  return buffer;
}

// sums[i, :] = x[i, :] . panel for `rows` rows of x, all of the depth.
template <class T>
void multiply_by_panel(
    int64_t rows, int64_t depth, const float* x, const T* panel, float* buffer, float* sums) {
  const int64_t blocks = larger<int64_t>(1, ceil_div(depth, kDepth));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = depth * block / blocks, deep = depth * (block + 1) / blocks - first;
    const float* right = as_fp32(panel + first * kPanel, deep * kPanel, buffer);
    auto run = [&]<bool ADD>() {
      multiply_panel<Fp32Product, Layout::row_major, ADD, kMaxVectors>(
          rows, deep, x + first, depth, right, kPanel, sums, kPanel);
    };
    if (block == 0)
      run.template operator()<false>();
    else
      run.template operator()<true>();
  }
}

template <class T, Activation A>
void finish_panel(
    const Linear& a, int64_t row, int64_t rows, int64_t col, const float* sums) {
  const T* bias = a.bias ? static_cast<const T*>(a.bias) + col : nullptr;
  const int64_t wide = smaller(kPanel, a.cols - col);
  for (int64_t i = 0; i < rows; ++i) {
    T* y = static_cast<T*>(a.y) + (row + i) * a.cols + col;
    sweep(wide, [&](int64_t j, auto lanes) {
      vf u = load(sums + i * kPanel + j);
      if (bias) u += load(bias + j, lanes);
      store(y + j, activate<A>(u), lanes);
    });
  }
}

template <class T, Activation A>
void linear_forward(const Linear& a) {
  const int64_t panels = ceil_div(a.cols, kPanel);
  const int64_t threads = larger<int64_t>(
      1, smaller(thread_count(), a.rows * a.depth * a.cols / kLaneWork));
  const int64_t across = larger<int64_t>(1, smaller(threads, a.rows / kLaneRows));
  const int64_t along = larger<int64_t>(1, smaller(threads / across, panels));
  const int64_t fitting = kBlockBytes / 4 / larger<int64_t>(1, a.depth);
  const int64_t block = smaller(kMaxBlock, larger(kLaneRows, fitting));
  parallel(across * along, 1, [&](int64_t begin, int64_t end) {
    LinearBuffers m(smaller(block, a.rows), a.depth, sizeof(T) < sizeof(float));
    for (int64_t lane = begin; lane < end; ++lane) {
      const int64_t i = lane / along, j = lane % along;
      const int64_t first = a.rows * i / across, last = a.rows * (i + 1) / across;
      const int64_t blocks = ceil_div(last - first, block);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t row = first + (last - first) * b / blocks;
        const int64_t rows = first + (last - first) * (b + 1) / blocks - row;
        const float* x =
            as_fp32(static_cast<const T*>(a.x) + row * a.depth, rows * a.depth, m.rows);
        for (int64_t p = panels * j / along; p < panels * (j + 1) / along; ++p) {
          const T* panel = static_cast<const T*>(a.packed) + p * kPanel * a.depth;
          multiply_by_panel(rows, a.depth, x, panel, m.panel, m.sums);
          finish_panel<T, A>(a, row, rows, p * kPanel, m.sums);
        }
      }
    }
  });
}

inline void linear_forward(const Linear& a) {
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<Activation A>() { linear_forward<T, A>(a); });
  });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
