// AMX: products of 16 rows and 16 columns at once, whose sums stay in tiles.
//
// Up to four tiles of sums for the same 16 rows: no product waits for the one before it, and one
// tile of the left factor serves four of the right one, which come from L1. The intrinsics of older
// compilers do not say that they read memory: a barrier keeps what was written ahead of them.
#pragma once

#include "cpu/gemm.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

#if defined(BERT_FAST_AMX)
constexpr int64_t kTileRows = 16;
#else
constexpr int64_t kTileRows = 1;
#endif
constexpr int64_t kTilePairs = 16;  // in the 64 bytes of a tile's row

#if defined(BERT_FAST_AMX)
static_assert(W == kTileRows);

ALWAYS_INLINE void settle_memory() { __asm__ volatile("" ::: "memory"); }

// This thread's tiles, all of 16 rows of 64 bytes, for as long as it lives.
struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};  // the palette; then 16-bit widths, 8-bit heights
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = kTileRows;
    settle_memory();
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The sums of 16 rows, in N tiles.
template <int N>
ALWAYS_INLINE void zero_sums() {
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2) _tile_zero(2);
  if constexpr (N > 3) _tile_zero(3);
}
template <int N>
ALWAYS_INLINE void load_sums(const float* from, int64_t row_bytes) {
  _tile_loadd(0, from, row_bytes);
  if constexpr (N > 1) _tile_loadd(1, from + W, row_bytes);
  if constexpr (N > 2) _tile_loadd(2, from + 2 * W, row_bytes);
  if constexpr (N > 3) _tile_loadd(3, from + 3 * W, row_bytes);
}
template <int N, class F>
ALWAYS_INLINE void store_sums(F* to, int64_t row_bytes) {
  _tile_stored(0, to, row_bytes);
  if constexpr (N > 1) _tile_stored(1, to + W, row_bytes);
  if constexpr (N > 2) _tile_stored(2, to + 2 * W, row_bytes);
  if constexpr (N > 3) _tile_stored(3, to + 3 * W, row_bytes);
}

// C[m, 16 N] (+)= A[m, deep] B[deep, 16 N], A and B of pairs of bf16, `deep` a multiple of 16. Up
// to the next multiple of 16, rows of A past the last are read and rows of C written. `next`: so many
// bytes of what is read after B, asked for evenly.
template <bool ADD, int N>
void multiply_tiles(
    int64_t m, int64_t deep, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
    int64_t ldc, const void* next = nullptr, int64_t bytes = 0) {
  const char *ahead = static_cast<const char*>(next), *end = ahead + bytes;
  const int64_t steps = larger<int64_t>(1, ceil_div(m, kTileRows) * (deep / kTilePairs));
  const int64_t lines = ceil_div(bytes, steps * kCacheLine);
  const int64_t row_a = lda * int64_t(sizeof(float)), row_b = ldb * int64_t(sizeof(float));
  const int64_t row_c = ldc * int64_t(sizeof(float));
  settle_memory();
  for (int64_t i = 0; i < m; i += kTileRows, a += kTileRows * lda, c += kTileRows * ldc) {
    if (ADD)
      load_sums<N>(c, row_c);
    else
      zero_sums<N>();
    for (int64_t k = 0; k < deep; k += kTilePairs) {
      const float* right = b + k * ldb;
      for (int64_t line = 0; line < lines && ahead < end; ++line, ahead += kCacheLine)
        __builtin_prefetch(ahead, 0, 2);
      _tile_loadd(4, a + k, row_a);
      _tile_loadd(5, right, row_b);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (N > 1) {
        _tile_loadd(6, right + W, row_b);
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (N > 2) {
        _tile_loadd(7, right + 2 * W, row_b);
        _tile_dpbf16ps(2, 4, 7);
      }
      if constexpr (N > 3) {
        _tile_loadd(5, right + 3 * W, row_b);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    store_sums<N>(c, row_c);
  }
}

// c[16, 64] = x[16, depth] w[depth, 64], unsigned bytes times signed ones, of which four along the
// depth lie together; their number is a multiple of 64.
ALWAYS_INLINE void multiply_tiles_of_bytes(
    int64_t depth, const uint8_t* x, int64_t ldx, const int8_t* w, int32_t* c) {
  constexpr int64_t kRow = 4 * W * int64_t(sizeof(int32_t));
  settle_memory();
  zero_sums<4>();
  for (int64_t k = 0; k < depth; k += 4 * kTilePairs) {
    const int8_t* right = w + k * 4 * W;
    _tile_loadd(4, x + k, ldx);
    _tile_loadd(5, right, kRow);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(6, right + 4 * W, kRow);
    _tile_dpbusd(1, 4, 6);
    _tile_loadd(7, right + 8 * W, kRow);
    _tile_dpbusd(2, 4, 7);
    _tile_loadd(5, right + 12 * W, kRow);
    _tile_dpbusd(3, 4, 5);
  }
  store_sums<4>(c, kRow);
}
#else
struct Tiles {};
#endif

}  // namespace bert_fast::cpu::BERT_FAST_ISA
