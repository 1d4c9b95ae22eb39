// The small fp32 matrix product inside attention: C[m, n] (+)= A[m, k] B[k, n].
//
// One register tile of MR x NR vectors of C is built by broadcasting A and streaming B; NR and MR
// follow the shape (with AVX-512 a head of 32 is two vectors wide: 12 x 2; a block of 64 is four:
// 6 x 4), so that the accumulators always hide the FMA latency. Rows are dealt evenly to the tiles:
// 25 rows are 9 + 8 + 8, not 12 + 12 + 1. Operands are packed by the caller: n is a multiple of W.
//
// Two threads of a core share its front end, and so do tenants of a cloud's machine: what counts
// then is instructions per FMA. Hence, with AVX2, tiles of 4 x 3 rather than 6 x 2 (19 loads and
// FMAs for 12 instead of 20), and steps along k in fours, which share what is not a product; where
// the distance of B's rows is known, their addresses are displacements.
#pragma once

#include <utility>

#include "cpu/rows.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

#if defined(BERT_FAST_AVX512) || defined(__aarch64__)
constexpr int kMaxVectors = 4, kAccumulators = 24, kMaxRows = 12;  // of 32 registers
#elif defined(BERT_FAST_AVX2)
constexpr int kMaxVectors = 3, kAccumulators = 12, kMaxRows = 6;  // of 16 registers
#else
constexpr int kMaxVectors = 2, kAccumulators = 12, kMaxRows = 6;  // of 16, one of them for products
#endif

constexpr int kCacheLine = 64;  // bytes

// Where element (i, k) of A lies: k_major: a[k * lda + i], row_major: a[i * lda + k].
enum class Layout { k_major, row_major };

// What one step along k multiplies: fp32 values, or pairs of bf16 in 32 bits (two steps of k at
// once, exact products, fp32 sums). Both kinds move through memory and broadcasts as floats.
struct Fp32Product {
  static ALWAYS_INLINE vf add(vf sum, vf left, vf right) {
#if defined(BERT_FAST_AVX2)
    // All 16 registers are in use: the sums must stay in theirs, which GCC would move and spill.
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(left), "x"(right));
    return sum;
#else
    return fma(left, right, sum);
#endif
  }
};
#if defined(BERT_FAST_AVX512_BF16)
struct Bf16PairProduct {
  static ALWAYS_INLINE vf add(vf sum, vf left, vf right) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
};
#endif

constexpr int kUnrolled = 4;  // steps along k

// LDB: the distance of B's rows where it is known, else 0.
template <class PRODUCT, Layout LAYOUT, bool ADD, int64_t LDB, int NR, int MR>
void multiply_tile(
    int64_t depth,
    const float* a,
    int64_t lda,
    const float* b,  // [depth, NR * W]
    int64_t ldb,
    float* c,  // [MR, NR * W]
    int64_t ldc,
    const char* ahead,  // what to ask memory for, `step` bytes at every kUnrolled of k
    int64_t step) {
  vf sums[MR][NR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NR; ++j) sums[i][j] = vf{};
  // Row-major A: one pointer per three rows, the others by scaled addressing, else the pointers
  // alone would use up the integer registers.
  constexpr int kPointers = LAYOUT == Layout::row_major ? (MR + 2) / 3 : 1;
  const float* rows[kPointers];
#pragma GCC unroll 16
  for (int i = 0; i < kPointers; ++i) rows[i] = a + 3 * i * lda;
  auto multiply_steps = [&]<int STEPS>() ALWAYS_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int k = 0; k < STEPS; ++k) {
      vf right[NR];
#pragma GCC unroll 16
      for (int j = 0; j < NR; ++j) right[j] = load(b + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const vf left = set1(LAYOUT == Layout::row_major ? rows[i / 3][i % 3 * lda] : rows[0][i]);
#pragma GCC unroll 16
        for (int j = 0; j < NR; ++j) sums[i][j] = PRODUCT::add(sums[i][j], left, right[j]);
      }
      b += LDB ? LDB : ldb;
#pragma GCC unroll 16
      for (int i = 0; i < kPointers; ++i) rows[i] += LAYOUT == Layout::row_major ? 1 : lda;
    }
  };
  int64_t k = 0;
  for (; k + kUnrolled <= depth; k += kUnrolled) {
    for (int64_t line = 0; line < step; line += kCacheLine) __builtin_prefetch(ahead + line, 0, 2);
    ahead += step;
    multiply_steps.template operator()<kUnrolled>();
  }
  for (; k < depth; ++k) multiply_steps.template operator()<1>();
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NR; ++j) {
      // Added last: partial sums of blocks of k are shorter chains, hence smaller errors, than one.
      if (ADD) sums[i][j] += load(c + i * ldc + j * W);
      store(c + i * ldc + j * W, sums[i][j]);
    }
}

using Tile = decltype(&multiply_tile<Fp32Product, Layout::k_major, false, 0, 1, 1>);

template <class PRODUCT, Layout LAYOUT, bool ADD, int64_t LDB, int NR, int... I>
Tile find_tile(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr Tile tiles[] = {multiply_tile<PRODUCT, LAYOUT, ADD, LDB, NR, I + 1>...};
  return tiles[rows - 1];
}

template <class PRODUCT, Layout LAYOUT, bool ADD, int64_t LDB, int NR>
void multiply_panel(
    int64_t m, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
    int64_t ldc, const void* next, int64_t bytes) {
  constexpr int most = kAccumulators / NR < kMaxRows ? kAccumulators / NR : kMaxRows;
  const int64_t tiles = ceil_div(m, most);
  // What is read next, of a weight. With few rows, reading it is most of the time, so all tiles ask
  // for it evenly: a burst by the first would find the queue to memory full.
  const char* ahead = static_cast<const char*>(next);
  const int64_t steps = larger<int64_t>(1, tiles * (depth / kUnrolled));
  const int64_t step = ceil_div(bytes, steps);
  for (int64_t tile = 0, i = 0; tile < tiles; ++tile) {
    const int64_t rows = m / tiles + (tile < m % tiles);
    find_tile<PRODUCT, LAYOUT, ADD, LDB, NR>(rows, std::make_integer_sequence<int, most>{})(
        depth, a + i * (LAYOUT == Layout::row_major ? lda : 1), lda, b, ldb, c + i * ldc, ldc,
        ahead + bytes * tile / tiles, step);
    i += rows;
  }
}

template <Layout LAYOUT, bool ADD, class PRODUCT = Fp32Product>
void multiply(
    int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc) {
  const int64_t vectors = n / W, panels = ceil_div(vectors, kMaxVectors);
  for (int64_t panel = 0, j = 0; panel < panels; ++panel) {
    const int64_t wide = vectors / panels + (panel < vectors % panels);
    const float* right = b + j * W;
    float* out = c + j * W;
    auto multiply_by = [&]<int NR>() {
      multiply_panel<PRODUCT, LAYOUT, ADD, 0, NR>(m, depth, a, lda, right, ldb, out, ldc, right, 0);
    };
    switch (wide) {
      case 1: multiply_by.template operator()<1>(); break;
      case 2: multiply_by.template operator()<2>(); break;
      case 3: multiply_by.template operator()<3>(); break;
    }
    if constexpr (kMaxVectors > 3)
      if (wide == 4) multiply_by.template operator()<4>();
    j += wide;
  }
}

// ---- packing -----------------------------------------------------------------------------------

template <int STEP, int... L>
ALWAYS_INLINE void exchange(vf (&rows)[W], std::integer_sequence<int, L...>) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & STEP) continue;
    vf upper = rows[i], lower = rows[i | STEP];
#if defined(__clang__)
    rows[i] = __builtin_shufflevector(upper, lower, (L & STEP ? W + L - STEP : L)...);
    rows[i | STEP] = __builtin_shufflevector(upper, lower, (L & STEP ? W + L : L + STEP)...);
#else
    rows[i] = __builtin_shuffle(upper, lower, vi{(L & STEP ? W + L - STEP : L)...});
    rows[i | STEP] = __builtin_shuffle(upper, lower, vi{(L & STEP ? W + L : L + STEP)...});
#endif
  }
}

// Transposes W x W in registers: log2 W rounds, each exchanging the off-diagonal blocks of a size.
ALWAYS_INLINE void transpose(vf (&rows)[W]) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  exchange<1>(rows, lanes);
  exchange<2>(rows, lanes);
  if constexpr (W > 4) exchange<4>(rows, lanes);
  if constexpr (W > 8) exchange<8>(rows, lanes);
}

template <class T>
ALWAYS_INLINE vf load_up_to(const T* p, int64_t n) {
  return n >= W ? load(p) : load(p, Tail{int(n)});
}

// to[d * ld + r] = from[r * stride + d], zeros for the rows up to the next multiple of W.
template <class T>
void pack_transposed(
    const T* from, int64_t stride, int64_t rows, int64_t width, float* to, int64_t ld) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t d = 0; d < width; d += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        block[i] = r + i < rows ? load_up_to(from + (r + i) * stride + d, width - d) : vf{};
      transpose(block);
      const int64_t wide = smaller<int64_t>(W, width - d);
      for (int64_t i = 0; i < wide; ++i) store(to + (d + i) * ld + r, block[i]);
    }
}

// to[r * ld + d] = from[r * stride + d], zeros for the columns up to the next multiple of W.
template <class T>
void pack_rows(
    const T* from, int64_t stride, int64_t rows, int64_t width, float* to, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    sweep(width, [&](int64_t d, auto lanes) {
      store(to + r * ld + d, load(from + r * stride + d, lanes));
    });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
