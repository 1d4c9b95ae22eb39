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
      : memory((widen ? block * depth + kPanel * kDepth : 0) + (block + kTogether) * kPanel),
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

// sums[i, :] (+)= x[i, :] . panel for `rows` rows of x, ldx apart, all of the depth.
template <bool MORE, class T>
void multiply_by_panel(
    int64_t rows, int64_t depth, const float* x, int64_t ldx, const T* panel, float* buffer,
    float* sums) {
  const int64_t blocks = larger<int64_t>(1, ceil_div(depth, kDepth));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = depth * block / blocks, deep = depth * (block + 1) / blocks - first;
    const float* right = as_fp32(panel + first * kPanel, deep * kPanel, buffer);
    auto run = [&]<bool ADD>() {
      multiply_panel<Fp32Product, Layout::row_major, ADD, kMaxVectors>(
          rows, deep, x + first, ldx, right, kPanel, sums, kPanel);
    };
    if (block == 0 && !MORE)
      run.template operator()<false>();
    else
      run.template operator()<true>();
  }
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

inline int64_t block_rows(int64_t floats_per_row) {
  const int64_t fitting = kBlockBytes / 4 / larger<int64_t>(1, floats_per_row);
  return smaller(kMaxBlock, larger(kLaneRows, fitting));
}

template <class T, Activation A>
void linear_forward(const Linear& a) {
  const int64_t panels = ceil_div(a.cols, kPanel), block = block_rows(a.depth);
  const Lanes lanes(a.rows, a.rows * a.depth * a.cols, panels);
  parallel(lanes.across * lanes.along, 1, [&](int64_t begin, int64_t end) {
    LinearBuffers m(smaller(block, a.rows), a.depth, sizeof(T) < sizeof(float));
    for (int64_t lane = begin; lane < end; ++lane) {
      const int64_t i = lane / lanes.along, j = lane % lanes.along;
      const int64_t top = a.rows * i / lanes.across, bottom = a.rows * (i + 1) / lanes.across;
      for_row_blocks(top, bottom, block, [&](int64_t row, int64_t rows) {
        const float* x =
            as_fp32(static_cast<const T*>(a.x) + row * a.depth, rows * a.depth, m.rows);
        for (int64_t p = panels * j / lanes.along; p < panels * (j + 1) / lanes.along; ++p) {
          const int64_t col = p * kPanel, cols = smaller(kPanel, a.cols - col);
          const T* panel = static_cast<const T*>(a.packed) + col * a.depth;
          multiply_by_panel<false>(rows, a.depth, x, a.depth, panel, m.panel, m.sums);
          const T* bias = a.bias ? static_cast<const T*>(a.bias) + col : nullptr;
          finish_sums<T, A>(rows, cols, bias, m.sums);
          copy_panel(rows, cols, m.sums, static_cast<T*>(a.y) + row * a.cols + col, a.cols);
        }
      });
    }
  });
}

inline void linear_forward(const Linear& a) {
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<Activation A>() { linear_forward<T, A>(a); });
  });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
