// What attention's products work on: heads, how their K, V, Q and probabilities are laid out, and who
// multiplies them.
#pragma once

#include "cpu/tiles.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kQueries = 48;  // 3 vectors of AVX-512; all tile heights divide it
constexpr int64_t kKeys = 256;    // a block of scores is 48 KiB: half of it in L1, all of it in L2

constexpr float kLog2E = 1.44269504f;

// Calls f.operator()<N>(j) over [0, n), four at a time, then one.
template <class F>
ALWAYS_INLINE void by_fours(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) f.template operator()<4>(j);
  for (; j < n; ++j) f.template operator()<1>(j);
}

// One head of one sequence; `first` is its first query.
struct Head {
  int64_t b, h, first, queries, first_key, keys;
};

inline Head head_of(const Attention& a, int64_t b, int64_t h) {
  const int64_t first = a.cu_seqlens[b], end = a.cu_seqlens[b + 1];
  const int64_t first_key = a.key_start ? a.key_start[b] : first;
  if (a.asked)
    return {b, h, a.asked[b], a.asked[b + 1] - a.asked[b], first_key, end - first_key};
  return {b, h, first, end - first, first_key, end - first_key};
}

// Row lengths in elements: of `out`, and D padded to whole vectors.
struct Strides {
  int64_t out, padded;
  explicit Strides(const Attention& a)
      : out(a.heads * a.width), padded(round_up(a.width, W)) {}
};

// The rows of one head of Q (part 0), K (1) or V (2).
template <class T>
const T* part_of(const Attention& a, const void* qkv, int64_t part, int64_t token, int64_t h) {
  return static_cast<const T*>(qkv) + token * a.token_step + part * a.part_step + h * a.head_step;
}

// Queries of one head, from one on.
template <class T>
const T* queries_at(const Attention& a, int64_t query, int64_t h) {
  if (!a.asked) return part_of<T>(a, a.qkv, 0, query, h);
  return static_cast<const T*>(a.qkv) + (h * a.asked[a.batch] + query) * a.token_step;
}

// Asks for the rows of the next head, where they are too short and too far apart for the hardware to
// see a stream.
template <class T>
void prefetch_next(const Attention& a, const Head& head, int64_t part) {
  if (head.h + 1 == a.heads || a.token_step == a.width) return;
  const T* next = part_of<T>(a, a.qkv, part, head.first_key, head.h + 1);
  for (int64_t i = 0; i < head.keys; ++i)
    for (int64_t d = 0; d < a.width; d += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(next + i * a.token_step + d);
}

// K (part 1) or V (part 2) of a head as fp32 rows.
template <class T>
void pack_part(const Attention& a, const Head& head, int64_t part, float* to) {
  prefetch_next<T>(a, head, part);
  pack_rows(
      part_of<T>(a, a.qkv, part, head.first_key, head.h), a.token_step, head.keys, a.width, to,
      Strides(a).padded);
}

// The forward's two products by vectors. PACKED steps along k are in one 32-bit element.
template <class PRODUCT, int64_t PACKED>
struct VectorProducts {
  struct State {};

  // scores[keys, queries] = K Q^T
  static void multiply_keys(
      const Attention& a, int64_t queries, int64_t keys, const float* k, int64_t row,
      const float* queries_t, float* scores) {
    multiply<Layout::row_major, false, PRODUCT>(
        keys, round_up(queries, W), a.width / PACKED, k, row, queries_t, kQueries, scores,
        kQueries);
  }

  // sums[queries, D] (+)= P V over the keys from `key`
  template <bool ADD>
  static void multiply_values(
      const Attention& a, const Head&, int64_t queries, int64_t key, int64_t keys,
      const float* probabilities, const float* values, float* sums) {
    const int64_t padded = round_up(a.width, W);
    multiply<Layout::k_major, ADD, PRODUCT>(
        queries, padded, ceil_div(keys, PACKED), probabilities, kQueries,
        values + key / PACKED * padded, padded, sums, padded);
  }

  static void rescale(const Attention& a, int64_t queries, const float* factors, float* sums) {
    const int64_t padded = round_up(a.width, W);
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t d = 0; d < padded; d += W)
        store(sums + i * padded + d, load(sums + i * padded + d) * factors[i]);
  }

  // The sums, a query's in a row; `spare` has room for them.
  static const float* rows_of(const Attention&, int64_t, const float* sums, float*) {
    return sums;
  }
};

// How K, V, Q and the probabilities are laid out for them.
template <class T>
struct Fp32Operands : VectorProducts<Fp32Product, 1> {
  static int64_t key_row(const Attention& a) { return round_up(a.width, W); }
  // Packed to `to`, or where they are if they lie as if packed.
  static const float* pack(const Attention& a, const Head& head, int64_t part, float* to) {
    if constexpr (sizeof(T) == sizeof(float))
      if (a.token_step == a.width && a.width % W == 0)
        return part_of<T>(a, a.qkv, part, head.first_key, head.h);
    pack_part<T>(a, head, part, to);
    return to;
  }
  static const float* pack_keys(const Attention& a, const Head& head, float* to) {
    return pack(a, head, 1, to);
  }
  static const float* pack_values(const Attention& a, const Head& head, float* to) {
    return pack(a, head, 2, to);
  }
  static void pack_queries(const Attention& a, const T* q, int64_t queries, float* to) {
    pack_transposed(q, a.token_step, queries, a.width, to, kQueries);
  }
  static void pack_probabilities(float*, int64_t) {}
};

#if defined(BERT_FAST_AVX512_BF16)
// Pairs of bf16: two along d for the scores, where Q and K lie in memory as pairs already, two keys
// for the weighted sum. Products of bf16 are exact and sums fp32, so only rounding P to bf16 costs
// accuracy, and less than rounding the output does.
struct Bf16PairOperands : VectorProducts<Bf16PairProduct, 2> {
  static int64_t key_row(const Attention& a) { return a.width / 2; }
  // Packed to `to`, or where they are if they lie as if packed.
  static const float* pack_keys(const Attention& a, const Head& head, float* to) {
    const bf16* from = part_of<bf16>(a, a.qkv, 1, head.first_key, head.h);
    if (a.token_step == a.width) return reinterpret_cast<const float*>(from);
    prefetch_next<bf16>(a, head, 1);
    for (int64_t i = 0; i < head.keys; ++i)
      memcpy(to + i * (a.width / 2), from + i * a.token_step, a.width * sizeof(bf16));
    return to;
  }
  static const float* pack_values(const Attention& a, const Head& head, float* to) {
    prefetch_next<bf16>(a, head, 2);
    const int64_t padded = round_up(a.width, W);
    for (int64_t i = 0; i < head.keys; i += 2)
      sweep(a.width, [&](int64_t d, auto lanes) {
        store(to + i / 2 * padded + d, pairs_of_keys(a, head, i, d, lanes));
      });
    return to;
  }
  // V of keys i and i + 1.
  template <class LANES>
  static ALWAYS_INLINE vf
  pairs_of_keys(const Attention& a, const Head& head, int64_t i, int64_t d, LANES lanes) {
    const bf16* from = part_of<bf16>(a, a.qkv, 2, head.first_key + i, head.h) + d;
    vu even = bits_as<vu>(load(from, lanes)), odd{};
    if (i + 1 < head.keys) odd = bits_as<vu>(load(from + a.token_step, lanes));
    return bits_as<vf>(even >> 16 | odd);
  }
  static void pack_queries(const Attention& a, const bf16* q, int64_t queries, float* to) {
    pack_transposed(
        reinterpret_cast<const float*>(q), a.token_step / 2, queries, a.width / 2, to, kQueries);
  }
  // In place: row j of pairs replaces rows 2 j and 2 j + 1, which are read first.
  static void pack_probabilities(float* columns, int64_t keys) {
    // 16-bit lanes 0, 16, 1, 17, ...: the halves of the conversion dealt alternately.
    const __m512i interleave = (__m512i)(lane_index() * 0x00010001 + 0x00100000);
    for (int64_t j = 0; j < keys; j += 2) {
      vf even = load(columns + j * kQueries);
      vf odd = j + 1 < keys ? load(columns + (j + 1) * kQueries) : vf{};
      __m512i pairs =
          _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
      store(columns + j / 2 * kQueries, bits_as<vf>(pairs));
    }
  }
};
#endif

#if defined(BERT_FAST_AMX)
// The same pairs, multiplied by tiles. V is kept transposed and so are the sums, [D, queries]: what
// is multiplied from the right are the probabilities, which lie as a tile has them.
struct TileOperands : Bf16PairOperands {
  using State = Tiles;

  static bool fits(const Attention& a) { return a.width % (2 * kTilePairs) == 0; }

  // Pairs of keys in a row of V, those past the last zero.
  static int64_t value_row(const Head& head) {
    return round_up(ceil_div(head.keys, 2), kTilePairs);
  }
  static const float* pack_values(const Attention& a, const Head& head, float* to) {
    prefetch_next<bf16>(a, head, 2);
    const int64_t row = value_row(head);
    for (int64_t i = 0; i < row; i += W)
      for (int64_t d = 0; d < a.width; d += W) {
        vf block[W];
        for (int64_t j = 0; j < W; ++j)
          block[j] = 2 * (i + j) < head.keys ? pairs_of_keys(a, head, 2 * (i + j), d, Full{}) : vf{};
        transpose(block);
        for (int64_t j = 0; j < W; ++j) store(to + (d + j) * row + i, block[j]);
      }
    return to;
  }
  static void pack_probabilities(float* columns, int64_t keys) {
    Bf16PairOperands::pack_probabilities(columns, keys);
    const int64_t pairs = ceil_div(keys, 2);
    for (int64_t j = pairs; j < round_up(pairs, kTilePairs); ++j)
      store(columns + j * kQueries, vf{});
  }

  // C[m, queries] (+)= A[m, deep] B[deep, kQueries]
  template <bool ADD>
  static void multiply_columns(
      int64_t queries, int64_t m, int64_t deep, const float* a, int64_t lda, const float* b,
      float* c) {
    static_assert(kQueries == 3 * W);
    auto run = [&]<int N>() {
      multiply_tiles<ADD, N>(m, deep, a, lda, b, kQueries, c, kQueries);
    };
    switch (ceil_div(queries, W)) {
      case 1: return run.template operator()<1>();
      case 2: return run.template operator()<2>();
      default: return run.template operator()<3>();
    }
  }
  static void multiply_keys(
      const Attention& a, int64_t queries, int64_t keys, const float* k, int64_t row,
      const float* queries_t, float* scores) {
    multiply_columns<false>(queries, keys, a.width / 2, k, row, queries_t, scores);
  }
  template <bool ADD>
  static void multiply_values(
      const Attention& a, const Head& head, int64_t queries, int64_t key, int64_t keys,
      const float* probabilities, const float* values, float* sums) {
    const int64_t deep = round_up(ceil_div(keys, 2), kTilePairs);
    multiply_columns<ADD>(
        queries, a.width, deep, values + key / 2, value_row(head), probabilities, sums);
  }

  static void rescale(const Attention& a, int64_t queries, const float* factors, float* sums) {
    for (int64_t d = 0; d < a.width; ++d, sums += kQueries)
      for (int64_t i = 0; i < queries; i += W) store(sums + i, load(sums + i) * load(factors + i));
  }
  static const float* rows_of(
      const Attention& a, int64_t queries, const float* sums, float* spare) {
    pack_transposed(sums, kQueries, a.width, queries, spare, a.width);
    return spare;
  }
};
#endif

}  // namespace bert_fast::cpu::BERT_FAST_ISA
