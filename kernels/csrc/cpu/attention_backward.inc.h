// attention, backward. With P the probabilities (recomputed from lse), M the dropout factors:
//
//   dV = (P M)^T dout,  dP = M (dout V^T),  delta = rowsum(dout out)
//   dS = scale P (dP - delta),  dQ = dS K,  dK = dS^T Q
//
// The unit of work is one head of one sequence, so dK and dV are summed by one thread in a fixed
// order: deterministic for any number of threads. Scores, their gradient and all five products stay
// in blocks of [kKeys, kQueries] as in the forward, transposed for the same reasons.
#pragma once

#include "cpu/attention.inc.h"

namespace bert_fast::BERT_FAST_ISA {

struct BackwardBuffers {
  Strides strides;
  Scratch memory;
  float *keys_t, *values_t, *keys, *dkeys, *dvalues;                // one head
  float *queries_t, *dout_t, *queries, *dout, *dqueries;            // one block of queries
  float *scores, *dscores, *factors, *lse, *delta;                  // one block of scores

  explicit BackwardBuffers(const Attention& a)
      : strides(a),
        memory(
            2 * a.width * strides.keys + 3 * a.longest * strides.padded + 2 * a.width * kQueries +
            3 * kQueries * strides.padded + 3 * kKeys * kQueries + 2 * kQueries) {
    const int64_t rows = a.longest * strides.padded, block = kQueries * strides.padded;
    keys_t = memory.data;
    values_t = keys_t + a.width * strides.keys;
    keys = values_t + a.width * strides.keys;
    dkeys = keys + rows;
    dvalues = dkeys + rows;
    queries_t = dvalues + rows;
    dout_t = queries_t + a.width * kQueries;
    queries = dout_t + a.width * kQueries;
    dout = queries + block;
    dqueries = dout + block;
    scores = dqueries + block;
    dscores = scores + kKeys * kQueries;
    factors = dscores + kKeys * kQueries;
    lse = factors + kKeys * kQueries;
    delta = lse + kQueries;
  }
};

// scores -> P M, dscores (dout V^T on entry) -> dS, for W queries.
template <bool DROPOUT>
ALWAYS_INLINE void gradient_columns(
    float* scores, float* dscores, const float* factors, int64_t keys, float scale, vf lse,
    vf delta) {
  for (int64_t j = 0; j < keys * kQueries; j += kQueries) {
    vf p = exp2(load(scores + j) - lse), dp = load(dscores + j), kept = p;
    if constexpr (DROPOUT) {
      vf factor = load(factors + j);
      kept *= factor;
      dp *= factor;
    }
    store(scores + j, kept);
    store(dscores + j, p * (dp - delta) * scale);
  }
}

template <class T>
void attention_gradient_block(
    const Attention& a, const Head& head, int64_t query, BackwardBuffers& m) {
  const Strides& s = m.strides;
  const int64_t queries = smaller(kQueries, head.queries - query), token = head.first + query;
  const T* q = part_of<T>(a, a.qkv, 0, token, head.h);
  const int64_t out_row = a.heads * a.width, o_out = token * out_row + head.h * a.width;
  const T *out = static_cast<const T*>(a.out) + o_out, *dout = static_cast<const T*>(a.dout) + o_out;
  pack_transposed(q, s.row, queries, a.width, a.scale * kLog2e, m.queries_t, kQueries);
  pack_rows(q, s.row, queries, a.width, m.queries, s.padded);
  pack_transposed(dout, out_row, queries, a.width, 1.0f, m.dout_t, kQueries);
  pack_rows(dout, out_row, queries, a.width, m.dout, s.padded);
  for (int64_t i = 0; i < round_up(queries, W); ++i) {
    // Rows without keys (lse = -inf) and padding lanes: exp2(score - inf) = 0, no gradient.
    const float lse = i < queries ? a.lse[head.h * a.tokens + token + i] : 0.0f;
    m.lse[i] = i < queries && lse > -__builtin_inff() ? lse * kLog2e : __builtin_inff();
    vf sum{};
    if (i < queries)
      sweep(a.width, [&](int64_t d, auto lanes) {
        sum = fma(load(out + i * out_row + d, lanes), load(dout + i * out_row + d, lanes), sum);
      });
    m.delta[i] = hsum(sum);
  }
  memset(m.dqueries, 0, queries * s.padded * sizeof(float));
  for (int64_t key = 0; key < head.keys; key += kKeys) {
    const int64_t keys = smaller(kKeys, head.keys - key);
    block_scores(a, head, query, queries, key, keys, m.keys_t, s.keys, m.queries_t, m.scores);
    multiply<Layout::k_major, false>(
        keys, round_up(queries, W), a.width, m.values_t + key, s.keys, m.dout_t, kQueries,
        m.dscores, kQueries);
    if (a.dropout.on) fill_factors(a, head, query, queries, key, keys, m.factors);
    for (int64_t i = 0; i < queries; i += W) {
      const vf lse = load(m.lse + i), delta = load(m.delta + i);
      float *scores = m.scores + i, *dscores = m.dscores + i, *factors = m.factors + i;
      if (a.dropout.on)
        gradient_columns<true>(scores, dscores, factors, keys, a.scale, lse, delta);
      else
        gradient_columns<false>(scores, dscores, nullptr, keys, a.scale, lse, delta);
    }
    multiply<Layout::row_major, true>(
        keys, s.padded, queries, m.scores, kQueries, m.dout, s.padded, m.dvalues + key * s.padded,
        s.padded);
    multiply<Layout::row_major, true>(
        keys, s.padded, queries, m.dscores, kQueries, m.queries, s.padded,
        m.dkeys + key * s.padded, s.padded);
    multiply<Layout::k_major, true>(
        queries, s.padded, keys, m.dscores, kQueries, m.keys + key * s.padded, s.padded,
        m.dqueries, s.padded);
  }
  T* dq = const_cast<T*>(part_of<T>(a, a.dqkv, 0, token, head.h));
  for (int64_t i = 0; i < queries; ++i)
    sweep(a.width, [&](int64_t d, auto lanes) {
      store(dq + i * s.row + d, load(m.dqueries + i * s.padded + d), lanes);
    });
}

template <class T>
void attention_gradient(const Attention& a, const Head& head, BackwardBuffers& m) {
  const Strides& s = m.strides;
  const T* k = part_of<T>(a, a.qkv, 1, head.first_key, head.h);
  pack_transposed(k, s.row, head.keys, a.width, 1.0f, m.keys_t, s.keys);
  pack_rows(k, s.row, head.keys, a.width, m.keys, s.padded);
  pack_transposed(
      part_of<T>(a, a.qkv, 2, head.first_key, head.h), s.row, head.keys, a.width, 1.0f, m.values_t,
      s.keys);
  memset(m.dkeys, 0, head.keys * s.padded * sizeof(float));
  memset(m.dvalues, 0, head.keys * s.padded * sizeof(float));
  for (int64_t query = 0; query < head.queries; query += kQueries)
    attention_gradient_block<T>(a, head, query, m);
  // Rows before key_start are queries only: their dK and dV are zero.
  const int64_t skipped = head.first_key - head.first;
  for (int64_t i = 0; i < head.queries; ++i) {
    T* dk = const_cast<T*>(part_of<T>(a, a.dqkv, 1, head.first + i, head.h));
    T* dv = const_cast<T*>(part_of<T>(a, a.dqkv, 2, head.first + i, head.h));
    const int64_t at = (i - skipped) * s.padded;
    sweep(a.width, [&](int64_t d, auto lanes) {
      store(dk + d, i < skipped ? vf{} : load(m.dkeys + at + d), lanes);
      store(dv + d, i < skipped ? vf{} : load(m.dvalues + at + d), lanes);
    });
  }
}

inline void attention_backward(const Attention& a) {
  with_dtype(a.dtype, [&]<class T>() {
    const int64_t lanes = lanes_for(a);
    parallel(lanes, 1, [&](int64_t begin, int64_t end) {
      BackwardBuffers m(a);
      for (int64_t lane = begin; lane < end; ++lane)
        for_each_block(a, 0, lane, lanes, [&](const Head& head, int64_t) {
          attention_gradient<T>(a, head, m);
        });
    });
  });
}

}  // namespace bert_fast::BERT_FAST_ISA
