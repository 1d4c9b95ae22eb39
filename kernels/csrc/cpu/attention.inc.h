// attention, forward: out = (softmax(scale Q K^T + bias) * dropout) V per sequence and head.
//
// Flash style (Dao, arXiv 2307.08691): blocks of kQueries queries against blocks of kKeys keys with
// a running maximum and sum, in fp32 throughout. The scores are kept transposed, [keys, queries],
// so that a vector holds one key for W queries: maximum and sum over keys are plain vertical
// operations, and four keys of one Philox call are four vectors. K and V of a head are packed to
// fp32 rows once and serve all its query blocks; only Q has to be transposed.
//
// Work is dealt to threads by cost (queries x keys), in query blocks: sequences of very different
// lengths balance, and a block's result does not depend on who computes it.
#pragma once

#include "cpu/attention_operands.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kLaneCost = 65536;  // FMAs below which a second thread is not worth waking

// Calls f(head, block) for this lane's share of all blocks of `block` queries (0: whole heads).
// A lane takes the blocks that start inside its equal share of the total cost.
template <class F>
void for_each_block(const Attention& a, int64_t block, int64_t lane, int64_t lanes, const F& f) {
  auto cost = [](const Head& head) { return double(head.queries) * double(head.keys + 32); };
  double total = 0, at = 0;
  for (int64_t b = 0; b < a.batch; ++b) total += cost(head_of(a, b, 0)) * double(a.heads);
  const double low = total * double(lane) / double(lanes);
  const double high = lane + 1 == lanes ? 2 * total : total * double(lane + 1) / double(lanes);
  for (int64_t b = 0; b < a.batch; ++b) {
    Head head = head_of(a, b, 0);
    const double each = cost(head);
    const int64_t blocks = block ? ceil_div(head.queries, block) : head.queries > 0;
    for (; head.h < a.heads; ++head.h, at += each) {
      if (at + each <= low || at >= high) continue;
      for (int64_t i = 0; i < blocks; ++i) {
        const double start = at + each * double(i) / double(blocks);
        if (start >= low && start < high) f(head, i);
      }
    }
  }
}

inline int64_t lanes_for(const Attention& a) {
  int64_t cost = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const Head head = head_of(a, b, 0);
    cost += head.queries * (head.keys + 32);
  }
  const int64_t most = smaller(thread_count(), cost * a.heads * a.width / kLaneCost);
  return larger<int64_t>(1, most);
}

// scores[j, i] = scale scores[j, i] + bias[query + i, key + j]; W x W blocks are transposed.
template <class B>
void add_bias(
    const Attention& a, const Head& head, int64_t query, int64_t queries, int64_t key, int64_t keys,
    float* scores) {
  const int64_t column = head.first_key - head.first + key;
  const B* bias = static_cast<const B*>(a.bias) + head.b * a.bias_batch + head.h * a.bias_head +
      query * a.bias_row + column;
  for (int64_t i = 0; i < queries; i += W)
    for (int64_t j = 0; j < keys; j += W) {
      vf block[W];
      for (int r = 0; r < W; ++r)
        block[r] =
            i + r < queries ? load_up_to(bias + (i + r) * a.bias_row + j, keys - j) : vf{};
      transpose(block);
      for (int64_t r = 0; r < smaller<int64_t>(W, keys - j); ++r) {
        float* at = scores + (j + r) * kQueries + i;
        store(at, fma(load(at), set1(a.scale), block[r]));
      }
    }
}

// factors[j, i]: dropout factors of the same block.
inline void fill_factors(
    const Attention& a, const Head& head, int64_t query, int64_t queries, int64_t key, int64_t keys,
    float* factors) {
  const int64_t column = head.first_key - head.first + key;
  for (int64_t i = 0; i < queries; i += W) {
    const uint32_t row = uint32_t((head.first + query + i) * a.heads + head.h);
    const vu rows = (vu)lane_index() * uint32_t(a.heads) + row;
    for (int64_t group = column & ~int64_t(3); group < column + keys; group += 4) {
      vu c[4] = {vu{} + uint32_t(group / 4), rows};
      philox(c, a.dropout.key[0], a.dropout.key[1]);
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t j = group + r - column;
        if (j >= 0 && j < keys) store(factors + j * kQueries + i, keep_factor(a.dropout, c[r]));
      }
    }
  }
}

// Scores of a block, transposed, before the factor that is returned: rounding scale q_i k_j once,
// in the exponent, is more accurate than rounding scale q_i first.
template <class OPERANDS>
float block_scores(
    const Attention& a, const Head& head, int64_t query, int64_t queries, int64_t key, int64_t keys,
    const float* k, const float* queries_t, float* scores) {
  const int64_t row = OPERANDS::key_row(a);
  OPERANDS::multiply_keys(a, queries, keys, k + key * row, row, queries_t, scores);
  if (a.bias == nullptr) return a.scale;
  with_dtype(a.bias_dtype, [&]<class B>() {
    add_bias<B>(a, head, query, queries, key, keys, scores);
  });
  return 1.0f;
}

// The factor before scores that exp(factor score - base) takes. Where a base is so far out that the
// rounding of scale score, which a fused multiply-add leaves out, is no small number, scores are
// multiplied here and rounded as their base was: the largest must come to exp(0).
ALWAYS_INLINE float factor_before(float* scores, int64_t keys, float scale, vf base) {
  if (hsum(magnitude(base) > 0x1p20f ? set1(1.0f) : vf{}) == 0.0f) return scale;
  for (int64_t j = 0; j < keys * kQueries; j += kQueries) store(scores + j, load(scores + j) * scale);
  return 1.0f;
}

// Turns scores into exp(scale score - running maximum); updates maximum and sum of W queries.
// Returns the factor that rescales what earlier blocks summed. The base is changed after the
// subtraction: a finite mask over all keys of a query, times log2 e, would be infinite.
template <class T>
ALWAYS_INLINE vf softmax_columns(
    float* scores, int64_t keys, float scale, float* maximum, float* sum) {
  const vf none = set1(-__builtin_inff()), before = load(maximum);
  vf top = before;
  for (int64_t j = 0; j < keys; ++j) top = vmax(top, load(scores + j * kQueries) * scale);
  // A query that saw no key yet: any finite base gives exp(-inf) = 0 instead of NaN.
  const vf base = top > none ? top : vf{};
  scale = factor_before(scores, keys, scale, base);
  vf total{};
  by_fours(keys, [&]<int N>(int64_t j) ALWAYS_INLINE_LAMBDA {
    float* at = scores + j * kQueries;
    vf p[N];
    each<N>([&](int i) ALWAYS_INLINE_LAMBDA {
      p[i] = fma(load(at + i * kQueries), set1(scale), -base) * kLog2E;
    });
    exp2<T>(p);
    each<N>([&](int i) ALWAYS_INLINE_LAMBDA {
      store(at + i * kQueries, p[i]);
      total += p[i];
    });
  });
  vf rescale[] = {(before - base) * kLog2E};
  exp2(rescale);
  store(maximum, top);
  store(sum, fma(load(sum), rescale[0], total));
  return rescale[0];
}

struct ForwardBuffers {
  Strides strides;
  int64_t part;  // of K or V, whole tiles of keys
  Scratch memory;
  float *keys, *values, *queries_t, *scores, *factors, *sums, *maximum, *total, *rescale;
  const float *k = nullptr, *v = nullptr;  // of the head at hand, packed or where they were

  explicit ForwardBuffers(const Attention& a)
      : strides(a), part(round_up(a.longest, 2 * kTilePairs) * strides.padded),
        memory(
            2 * part + a.width * kQueries + 2 * kKeys * kQueries +
            kQueries * strides.padded + 3 * kQueries),
        keys(memory.data), values(keys + part), queries_t(values + part),
        scores(queries_t + a.width * kQueries),
        factors(scores + kKeys * kQueries), sums(factors + kKeys * kQueries),
        maximum(sums + kQueries * strides.padded), total(maximum + kQueries),
        rescale(total + kQueries) {}
};

template <class T, class OPERANDS>
void attention_block(const Attention& a, const Head& head, int64_t query, ForwardBuffers& m) {
  const Strides& s = m.strides;
  const int64_t queries = smaller(kQueries, head.queries - query), token = head.first + query;
  OPERANDS::pack_queries(a, queries_at<T>(a, token, head.h), queries, m.queries_t);
  for (int64_t i = 0; i < queries; i += W) {
    store(m.maximum + i, set1(-__builtin_inff()));
    store(m.total + i, vf{});
  }
  for (int64_t key = 0; key < head.keys; key += kKeys) {
    const int64_t keys = smaller(kKeys, head.keys - key);
    const float scale = block_scores<OPERANDS>(
        a, head, query, queries, key, keys, m.k, m.queries_t, m.scores);
    for (int64_t i = 0; i < queries; i += W)
      store(
          m.rescale + i,
          softmax_columns<T>(m.scores + i, keys, scale, m.maximum + i, m.total + i));
    if (a.dropout.on) {
      fill_factors(a, head, query, queries, key, keys, m.factors);
      for (int64_t i = 0; i < keys * kQueries; i += W)
        store(m.scores + i, load(m.scores + i) * load(m.factors + i));
    }
    for (int64_t i = 0; i < queries; i += W) OPERANDS::pack_probabilities(m.scores + i, keys);
    auto add_values = [&]<bool ADD>() {
      OPERANDS::template multiply_values<ADD>(
          a, head, queries, key, keys, m.scores, m.v, m.sums);
    };
    if (key == 0) {
      add_values.template operator()<false>();
      continue;
    }
    OPERANDS::rescale(a, queries, m.rescale, m.sums);
    add_values.template operator()<true>();
  }
  const float* sums = OPERANDS::rows_of(a, queries, m.sums, m.queries_t);
  for (int64_t i = 0; i < queries; ++i) {
    const float total = m.total[i], divisor = total == 0.0f ? 1.0f : total;
    T* out = static_cast<T*>(a.out) + ((token + i) * a.heads + head.h) * a.width;
    sweep(a.width, [&](int64_t d, auto lanes) {
      // A head without keys has summed nothing: m.sums is not even initialised then.
      store(out + d, head.keys ? load(sums + i * s.padded + d) / divisor : vf{}, lanes);
    });
    if (a.lse)
      a.lse[head.h * a.tokens + token + i] =
          total == 0.0f ? -__builtin_inff() : m.maximum[i] + __builtin_logf(total);
  }
}

template <class T, class OPERANDS>
void attention_forward_with(const Attention& a) {
  const int64_t lanes = lanes_for(a);
  parallel(lanes, 1, [&](int64_t begin, int64_t end) {
    ForwardBuffers m(a);
    [[maybe_unused]] typename OPERANDS::State state;
    for (int64_t lane = begin; lane < end; ++lane) {
      int64_t packed_b = -1, packed_h = -1;
      for_each_block(a, kQueries, lane, lanes, [&](const Head& head, int64_t block) {
        if (head.b != packed_b || head.h != packed_h) {
          m.k = OPERANDS::pack_keys(a, head, m.keys);
          m.v = OPERANDS::pack_values(a, head, m.values);
          packed_b = head.b, packed_h = head.h;
        }
        attention_block<T, OPERANDS>(a, head, block * kQueries, m);
      });
    }
  });
}

inline void attention_forward(const Attention& a) {
#if defined(BERT_FAST_AMX)
  if (a.dtype == Dtype::bf16 && TileOperands::fits(a))
    return attention_forward_with<bf16, TileOperands>(a);
#endif
#if defined(BERT_FAST_AVX512_BF16)
  if (a.dtype == Dtype::bf16 && a.width % 2 == 0)
    return attention_forward_with<bf16, Bf16PairOperands>(a);
#endif
  with_dtype(a.dtype, [&]<class T>() { attention_forward_with<T, Fp32Operands<T>>(a); });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
