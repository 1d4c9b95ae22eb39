// Chunks of a batch: whole sequences that go through a layer together, and in which order they do.
#pragma once

#include <algorithm>
#include <mutex>
#include <numeric>
#include <vector>

#include "cpu/dispatch.h"

namespace bert_fast::cpu {

struct Chunk {
  int64_t row = 0;                         // of the first token
  std::vector<int32_t> bounds, key_start;  // counted from that row
  std::vector<int64_t> wanted, at;  // rows of this chunk that are asked for, ascending, and of y
  std::vector<int32_t> asked;       // how many of them come before each sequence, and all
  Attention attention{};
};

inline Chunk chunk_of(const Attention& all, int64_t first, int64_t end) {
  Chunk chunk{all.cu_seqlens[first]};
  for (int64_t b = first; b <= end; ++b)
    chunk.bounds.push_back(int32_t(all.cu_seqlens[b] - chunk.row));
  for (int64_t b = first; all.key_start && b < end; ++b)
    chunk.key_start.push_back(int32_t(all.key_start[b] - chunk.row));
  Attention& a = chunk.attention = all;
  a.tokens = chunk.bounds.back();
  a.batch = end - first;
  a.cu_seqlens = chunk.bounds.data();
  a.key_start = all.key_start ? chunk.key_start.data() : nullptr;
  if (a.bias)
    a.bias = static_cast<const char*>(a.bias) + first * a.bias_batch * size_of(a.bias_dtype);
  return chunk;
}

// Of about `size` tokens, as alike as whole sequences allow.
inline std::vector<Chunk> chunks_of(const Attention& all, int64_t size) {
  std::vector<Chunk> chunks;
  for (int64_t first = 0, b = 0; b < all.batch; first = b) {
    const int64_t begin = all.cu_seqlens[first], left = all.tokens - begin;
    const int64_t parts = std::max<int64_t>(1, (left + size - 1) / size);
    auto past_half = [&](int64_t b) {  // of sequence b, is where the chunk should end
      return (int64_t(all.cu_seqlens[b]) + all.cu_seqlens[b + 1] - 2 * begin) * parts > 2 * left;
    };
    do ++b;
    while (b < all.batch && (parts == 1 || !past_half(b)));
    chunks.push_back(chunk_of(all, first, b));
  }
  return chunks;
}

// Gives each chunk its share of the rows that are asked for.
inline void deal_rows(std::vector<Chunk>& chunks, const int64_t* rows, int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  auto earlier = [&](int64_t i, int64_t j) { return rows[i] < rows[j]; };
  if (!std::is_sorted(rows, rows + count)) std::stable_sort(order.begin(), order.end(), earlier);
  size_t next = 0;
  for (Chunk& chunk : chunks)
    for (int32_t end : chunk.bounds) {
      for (; next < order.size() && rows[order[next]] < chunk.row + end; ++next) {
        chunk.wanted.push_back(rows[order[next]] - chunk.row);
        chunk.at.push_back(order[next]);
      }
      chunk.asked.push_back(int32_t(chunk.wanted.size()));
    }
}

// Threads that each take a chunk through a layer, put it back and take the one with the most left to
// do, those that are held aside: none waits for another, and the last are done within the time of
// one step (McNaughton's rule for jobs that may be interrupted, Management Science 6(1), 1959).
class Schedule {
 public:
  struct Step {
    size_t chunk;
    int64_t layer;
  };

  // token_cost: multiplications of one token in one layer, but for `inside` a key.
  Schedule(const std::vector<Chunk>& chunks, int64_t layers, int64_t token_cost, int64_t inside)
      : layers_(layers) {
    for (const Chunk& chunk : chunks) {
      double cost = double(chunk.attention.tokens) * double(token_cost);
      for (size_t b = 1; b < chunk.bounds.size(); ++b) {
        const double length = chunk.bounds[b] - chunk.bounds[b - 1];
        cost += 2 * length * length * double(inside);
      }
      jobs_.push_back({cost, 0, false});
    }
  }

  // Whether so many threads would all be busy nearly to the end.
  bool occupies(int64_t threads) const {
    double total = 0, most = 0;
    for (const Job& job : jobs_) {
      total += job.cost;
      most = std::max(most, job.cost);
    }
    return most * double(threads) <= total * 1.05;
  }

  // False where every chunk is done or held: whoever holds one goes on with it.
  bool take(Step& step) {
    const std::lock_guard<std::mutex> lock(mutex_);
    double most = 0;
    for (size_t i = 0; i < jobs_.size(); ++i) {
      const Job& job = jobs_[i];
      const double left = job.cost * double(layers_ - job.layer);
      if (job.held || left <= most) continue;
      most = left;
      step = {i, job.layer};
    }
    if (most > 0) jobs_[step.chunk].held = true;
    return most > 0;
  }

  void put_back(const Step& step) {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_[step.chunk].layer = step.layer + 1;
    jobs_[step.chunk].held = false;
  }

 private:
  struct Job {
    double cost;  // of a layer
    int64_t layer;
    bool held;
  };
  const int64_t layers_;
  std::vector<Job> jobs_;
  std::mutex mutex_;
};

}  // namespace bert_fast::cpu
