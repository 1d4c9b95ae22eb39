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

#include "cpu/gemm.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kQueries = 48;  // 3 vectors of AVX-512; all tile heights divide it
constexpr int64_t kKeys = 256;    // a block of scores is 48 KiB: half of it in L1, all of it in L2
constexpr int64_t kLaneCost = 65536;  // FMAs below which a second thread is not worth waking

// One head of one sequence.
struct Head {
  int64_t b, h, first, queries, first_key, keys;
};

inline Head head_of(const Attention& a, int64_t b, int64_t h) {
  const int64_t first = a.cu_seqlens[b], end = a.cu_seqlens[b + 1];
  const int64_t first_key = a.key_start ? a.key_start[b] : first;
  return {b, h, first, end - first, first_key, end - first_key};
}

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

// Row lengths in elements: of qkv, of `out`, and D padded to whole vectors.
struct Strides {
  int64_t qkv, out, padded;
  explicit Strides(const Attention& a)
      : qkv(3 * a.heads * a.width), out(a.heads * a.width), padded(round_up(a.width, W)) {}
};

// The rows of one head of Q (part 0), K (1) or V (2).
template <class T>
const T* part_of(const Attention& a, const void* qkv, int64_t part, int64_t token, int64_t h) {
  return static_cast<const T*>(qkv) + ((token * 3 + part) * a.heads + h) * a.width;
}

// K (part 1) or V (part 2) of a head as fp32 rows. The same rows of the next head are asked for on
// the way: they are too short and too far apart for the hardware to see a stream.
template <class T>
void pack_part(const Attention& a, const Head& head, int64_t part, float* to) {
  const Strides s(a);
  const T* from = part_of<T>(a, a.qkv, part, head.first_key, head.h);
  if (head.h + 1 < a.heads)
    for (int64_t i = 0; i < head.keys; ++i)
      for (int64_t d = 0; d < a.width; d += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(from + i * s.qkv + a.width + d);
  pack_rows(from, s.qkv, head.keys, a.width, to, s.padded);
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

// Scores of a block, transposed, before the factor that is returned: rounding scale q_i k_j once, in
// the exponent, is more accurate than rounding scale q_i first.
inline float block_scores(
    const Attention& a, const Head& head, int64_t query, int64_t queries, int64_t key, int64_t keys,
    const float* k, const float* queries_t, float* scores) {
  const int64_t padded = round_up(a.width, W);
  multiply<Layout::row_major, false>(
      keys, round_up(queries, W), a.width, k + key * padded, padded, queries_t, kQueries, scores,
      kQueries);
  if (a.bias == nullptr) return a.scale;
  with_dtype(a.bias_dtype, [&]<class B>() {
    add_bias<B>(a, head, query, queries, key, keys, scores);
  });
  return 1.0f;
}

// Turns scores into exp(scale score - running maximum); updates maximum and sum of W queries.
// Returns the factor that rescales what earlier blocks summed.
ALWAYS_INLINE vf softmax_columns(
    float* scores, int64_t keys, float scale, float* maximum, float* sum) {
  const vf none = set1(-__builtin_inff()), before = load(maximum);
  vf top = before;
  for (int64_t j = 0; j < keys; ++j) top = vmax(top, load(scores + j * kQueries) * scale);
  // A query that saw no key yet: any finite base gives exp(-inf) = 0 instead of NaN.
  const vf base = top > none ? top : vf{};
  vf total{};
  for (int64_t j = 0; j < keys; ++j) {
    vf p = exp_below_89(fma(load(scores + j * kQueries), set1(scale), -base));
    store(scores + j * kQueries, p);
    total += p;
  }
  const vf rescale = exp_below_89(before - base);
  store(maximum, top);
  store(sum, fma(load(sum), rescale, total));
  return rescale;
}

struct ForwardBuffers {
  Strides strides;
  Scratch memory;
  float *keys, *values, *queries_t, *scores, *factors, *sums, *maximum, *total, *rescale;

  explicit ForwardBuffers(const Attention& a)
      : strides(a),
        memory(
            2 * a.longest * strides.padded + a.width * kQueries + 2 * kKeys * kQueries +
            kQueries * strides.padded + 3 * kQueries),
        keys(memory.data), values(keys + a.longest * strides.padded),
        queries_t(values + a.longest * strides.padded), scores(queries_t + a.width * kQueries),
        factors(scores + kKeys * kQueries), sums(factors + kKeys * kQueries),
        maximum(sums + kQueries * strides.padded), total(maximum + kQueries),
        rescale(total + kQueries) {}
};

template <class T>
void attention_block(const Attention& a, const Head& head, int64_t query, ForwardBuffers& m) {
  const Strides& s = m.strides;
  const int64_t queries = smaller(kQueries, head.queries - query), token = head.first + query;
  pack_transposed(
      part_of<T>(a, a.qkv, 0, token, head.h), s.qkv, queries, a.width, m.queries_t, kQueries);
  for (int64_t i = 0; i < queries; i += W) {
    store(m.maximum + i, set1(-__builtin_inff()));
    store(m.total + i, vf{});
  }
  memset(m.sums, 0, queries * s.padded * sizeof(float));
  for (int64_t key = 0; key < head.keys; key += kKeys) {
    const int64_t keys = smaller(kKeys, head.keys - key);
    const float scale =
        block_scores(a, head, query, queries, key, keys, m.keys, m.queries_t, m.scores);
    for (int64_t i = 0; i < queries; i += W)
      store(
          m.rescale + i,
          softmax_columns(m.scores + i, keys, scale, m.maximum + i, m.total + i));
    if (a.dropout.on) {
      fill_factors(a, head, query, queries, key, keys, m.factors);
      for (int64_t i = 0; i < keys * kQueries; i += W)
        store(m.scores + i, load(m.scores + i) * load(m.factors + i));
    }
    if (key > 0)
      for (int64_t i = 0; i < queries; ++i)
        for (int64_t d = 0; d < s.padded; d += W)
          store(m.sums + i * s.padded + d, load(m.sums + i * s.padded + d) * m.rescale[i]);
    multiply<Layout::k_major, true>(
        queries, s.padded, keys, m.scores, kQueries, m.values + key * s.padded, s.padded, m.sums,
        s.padded);
  }
  for (int64_t i = 0; i < queries; ++i) {
    const float total = m.total[i], divisor = total == 0.0f ? 1.0f : total;
    T* out = static_cast<T*>(a.out) + ((token + i) * a.heads + head.h) * a.width;
    sweep(a.width, [&](int64_t d, auto lanes) {
      store(out + d, load(m.sums + i * s.padded + d) / divisor, lanes);
    });
    if (a.lse)
      a.lse[head.h * a.tokens + token + i] =
          total == 0.0f ? -__builtin_inff() : m.maximum[i] + __builtin_logf(total);
  }
}

template <class T>
void attention_forward(const Attention& a) {
  const int64_t lanes = lanes_for(a);
  parallel(lanes, 1, [&](int64_t begin, int64_t end) {
    ForwardBuffers m(a);
    for (int64_t lane = begin; lane < end; ++lane) {
      int64_t packed_b = -1, packed_h = -1;
      for_each_block(a, kQueries, lane, lanes, [&](const Head& head, int64_t block) {
        if (head.b != packed_b || head.h != packed_h) {
          pack_part<T>(a, head, 1, m.keys);
          pack_part<T>(a, head, 2, m.values);
          packed_b = head.b, packed_h = head.h;
        }
        attention_block<T>(a, head, block * kQueries, m);
      });
    }
  });
}

inline void attention_forward(const Attention& a) {
  with_dtype(a.dtype, [&]<class T>() { attention_forward<T>(a); });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
