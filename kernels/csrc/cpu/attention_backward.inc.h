// attention, backward. With P the probabilities (recomputed from lse), M the dropout factors:
//
//   dV = (P M)^T dout,  dP = M (dout V^T),  delta = rowsum(P dP)
//   dS = scale P (dP - delta),  dQ = dS K,  dK = dS^T Q
//
// delta is also rowsum(dout out), which needs no second pass over the keys; but then dP - delta is
// the difference of two numbers rounded along different ways, which for rows with few keys costs
// several ulp of dQ. P and dP of kQueries queries and all keys are small enough to keep.
//
// The sum of dS over the keys is zero; what rounding leaves of it, times what the keys have in
// common, is an error of dQ that grows with their number. Hence P is normalised once more (rounding
// lse scales a whole row), and delta is summed twice, the second time as a small correction.
//
// The unit of work is one head of one sequence, so dK and dV are summed by one thread in a fixed
// order: deterministic for any number of threads. Scores are transposed, as in the forward.
#pragma once

#include "cpu/attention.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

struct BackwardBuffers {
  Strides strides;
  Scratch memory;
  float *keys, *values, *dkeys, *dvalues;                 // one head
  float *queries_t, *dout_t, *queries, *dout, *dqueries;  // one block of queries
  float *scores, *dscores, *factors;                      // all keys of that block

  explicit BackwardBuffers(const Attention& a)
      : strides(a),
        memory(
            4 * a.longest * strides.padded + 2 * a.width * kQueries +
            3 * kQueries * strides.padded + (a.dropout.on ? 3 : 2) * a.longest * kQueries) {
    const int64_t rows = a.longest * strides.padded, block = kQueries * strides.padded;
    keys = memory.data;
    values = keys + rows;
    dkeys = values + rows;
    dvalues = dkeys + rows;
    queries_t = dvalues + rows;
    dout_t = queries_t + a.width * kQueries;
    queries = dout_t + a.width * kQueries;
    dout = queries + block;
    dqueries = dout + block;
    scores = dqueries + block;
    dscores = scores + a.longest * kQueries;
    factors = dscores + a.longest * kQueries;
  }
};

// For W queries: scores -> P M, dscores (dout V^T on entry) -> dS.
template <bool DROPOUT>
ALWAYS_INLINE void gradient_columns(
    float* scores, float* dscores, const float* factors, int64_t keys, float scale, float dscale,
    vf lse) {
  vf delta{}, sum{};
  by_fours(keys, [&]<int N>(int64_t first) ALWAYS_INLINE_LAMBDA {
    const int64_t at = first * kQueries;
    vf p[N];
    each<N>([&](int i) ALWAYS_INLINE_LAMBDA {
      p[i] = fma(load(scores + at + i * kQueries), set1(scale), -lse) * kLog2E;
    });
    exp2(p);
    each<N>([&](int i) ALWAYS_INLINE_LAMBDA {
      const int64_t j = at + i * kQueries;
      vf dp = load(dscores + j);
      if constexpr (DROPOUT) {
        dp *= load(factors + j);
        store(dscores + j, dp);
      }
      store(scores + j, p[i]);
      sum += p[i];
      delta = fma(p[i], dp, delta);
    });
  });
  const vf norm = sum > 0.f ? 1.f / sum : vf{};
  delta *= norm;
  vf rest{};
  for (int64_t j = 0; j < keys * kQueries; j += kQueries) {
    vf p = load(scores + j) * norm, d = load(dscores + j) - delta;
    store(scores + j, p);
    store(dscores + j, d);
    rest = fma(p, d, rest);
  }
  for (int64_t j = 0; j < keys * kQueries; j += kQueries) {
    vf p = load(scores + j);
    store(dscores + j, p * (load(dscores + j) - rest) * dscale);
    if constexpr (DROPOUT) store(scores + j, p * load(factors + j));
  }
}

template <class T>
void attention_gradient_block(
    const Attention& a, const Head& head, int64_t query, BackwardBuffers& m) {
  const Strides& s = m.strides;
  const int64_t queries = smaller(kQueries, head.queries - query), token = head.first + query;
  const T* q = part_of<T>(a, a.qkv, 0, token, head.h);
  const T* dout = static_cast<const T*>(a.dout) + (token * a.heads + head.h) * a.width;
  pack_transposed(q, a.token_step, queries, a.width, m.queries_t, kQueries);
  pack_rows(q, a.token_step, queries, a.width, m.queries, s.padded);
  pack_transposed(dout, s.out, queries, a.width, m.dout_t, kQueries);
  pack_rows(dout, s.out, queries, a.width, m.dout, s.padded);

  const float scale = block_scores<Fp32Operands<T>>(
      a, head, query, queries, 0, head.keys, m.keys, m.queries_t, m.scores);
  multiply<Layout::row_major, false>(
      head.keys, round_up(queries, W), a.width, m.values, s.padded, m.dout_t, kQueries, m.dscores,
      kQueries);
  if (a.dropout.on) fill_factors(a, head, query, queries, 0, head.keys, m.factors);
  for (int64_t i = 0; i < queries; i += W) {
    // Rows without keys (lse = -inf) and padding lanes: exp(score - inf) = 0, no gradient.
    vf lse = load_up_to(a.lse + head.h * a.tokens + token + i, queries - i);
    vi alive = (lane_index() < int32_t(queries - i)) & (lse != -__builtin_inff());
    float *scores = m.scores + i, *dscores = m.dscores + i;
    const float factor = factor_before(scores, head.keys, scale, alive ? lse : vf{});
    lse = alive ? lse : set1(__builtin_inff());
    if (a.dropout.on)
      gradient_columns<true>(scores, dscores, m.factors + i, head.keys, factor, a.scale, lse);
    else
      gradient_columns<false>(scores, dscores, nullptr, head.keys, factor, a.scale, lse);
  }
  multiply<Layout::row_major, true>(
      head.keys, s.padded, queries, m.scores, kQueries, m.dout, s.padded, m.dvalues, s.padded);
  multiply<Layout::row_major, true>(
      head.keys, s.padded, queries, m.dscores, kQueries, m.queries, s.padded, m.dkeys, s.padded);
  multiply<Layout::k_major, false>(
      queries, s.padded, head.keys, m.dscores, kQueries, m.keys, s.padded, m.dqueries, s.padded);
  T* dq = const_cast<T*>(part_of<T>(a, a.dqkv, 0, token, head.h));
  for (int64_t i = 0; i < queries; ++i)
    sweep(a.width, [&](int64_t d, auto lanes) {
      store(dq + i * a.token_step + d, load(m.dqueries + i * s.padded + d), lanes);
    });
}

template <class T>
void attention_gradient(const Attention& a, const Head& head, BackwardBuffers& m) {
  const Strides& s = m.strides;
  pack_part<T>(a, head, 1, m.keys);
  pack_part<T>(a, head, 2, m.values);
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

}  // namespace bert_fast::cpu::BERT_FAST_ISA
