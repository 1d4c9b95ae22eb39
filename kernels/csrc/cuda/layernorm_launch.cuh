// Host side of layernorm.cuh and layernorm_stream.cuh: picks the row shape and launches.
#pragma once

#include "launch.cuh"
#include "layernorm_stream.cuh"
#include "partials.cuh"

namespace bert_fast {

// Fewer rows, at a warp each, leave most of a large GPU's warps without one.
constexpr int64_t kFewRows = 2048;

// Calls f with the RowShape for rows of `hidden` elements. A thread holds 32 elements in a forward
// (8 where rows are few), 16 in a backward (which also keeps the gradient and up to three sums for
// each), and 8 on the scalar path, where every element has an index and a predicate of its own.
template <typename T, bool kForward, typename F>
void dispatch_row(int64_t rows, int64_t hidden, bool vectors, F&& f) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  constexpr int kQuarter = 8 / kVector, kHalf = 16 / kVector, kFull = 32 / kVector;
  if (!vectors) {
    if (hidden <= 256) return f(RowShape<T, 1, 8, kWarpSize>{});
    return f(RowShape<T, 1, 8, 512>{});
  }
  if constexpr (kForward) {
    if (rows < kFewRows && hidden > 512 && hidden <= 1024)
      return f(RowShape<T, kVector, kQuarter, 128>{});
  }
  if (hidden <= 512) return f(RowShape<T, kVector, kHalf, kWarpSize>{});
  if constexpr (kForward) {
    if (hidden <= 1024) return f(RowShape<T, kVector, kFull, kWarpSize>{});
  } else {
    if (hidden <= 1024) return f(RowShape<T, kVector, kHalf, 64>{});
  }
  return f(RowShape<T, kVector, kHalf, 256>{});
}

inline void check_hidden(const char* op, int64_t hidden) {
  STD_TORCH_CHECK(hidden >= 1 && hidden <= kMaxHidden, op, ": hidden size must be in [1, ",
                  kMaxHidden, "], got ", hidden);
}

template <typename T, typename Source>
void launch_layernorm_forward(const Source& source, bool vectors, const Tensor& weight,
                              const Tensor& bias, const Tensor& y, const Tensor& mean,
                              const Tensor& rstd, double eps, cudaStream_t stream) {
  const int64_t rows = y.size(0), hidden = y.size(1);
  vectors = vectors && vectors_fit<T>(hidden, {data<T>(weight), data<T>(bias), data<T>(y)});
  const bool wide = hidden == 1024 && rows <= Source::kMostStreamedWide;
  if (vectors && rows >= kFewRows && (hidden == 768 || wide)) {
    const auto launch = [&](auto shape) {
      using Row = decltype(shape);
      constexpr int kWarps = kStreamWarps<Row>;
      // As many blocks as are resident at once, or as few as take no longer: equal shares.
      const int64_t turns = ceil_div(rows, processors() * kStreamBlocks * kWarps);
      const int64_t blocks = ceil_div(rows, turns * kWarps);
      layernorm_stream_kernel<Source, Row><<<blocks, kWarps * kWarpSize, 0, stream>>>(
          source, data<T>(weight), data<T>(bias), output<T>(y), output<float>(mean),
          output<float>(rstd), rows, static_cast<float>(eps));
      BERT_FAST_LAUNCH_CHECK();
    };
    return hidden == 768 ? launch(StreamRow<T, 768>{}) : launch(StreamRow<T, 1024>{});
  }
  dispatch_row<T, true>(rows, hidden, vectors, [&](auto shape) {
    using Row = decltype(shape);
    const int64_t blocks = ceil_div(rows, Row::kRowsPerBlock);
    layernorm_forward_kernel<Source, Row><<<blocks, Row::kBlock, 0, stream>>>(
        source, data<T>(weight), data<T>(bias), output<T>(y), output<float>(mean),
        output<float>(rstd), rows, static_cast<int>(hidden), static_cast<float>(eps));
    BERT_FAST_LAUNCH_CHECK();
  });
}

// `grads` are the targets of dweight, dbias and, where the source has one, its column sum.
template <typename T, typename Source>
void launch_layernorm_backward(const Source& source, bool vectors, const Tensor& weight,
                               const Tensor& mean, const Tensor& rstd, int64_t rows,
                               const ParameterGrads<T>& grads, cudaStream_t stream) {
  constexpr int kSums = Source::kColumnSum ? 3 : 2;
  const int64_t hidden = weight.size(0);
  const bool wanted = grads.target[0] || grads.target[1] || grads.target[2];
  vectors = vectors && vectors_fit<T>(hidden, {data<T>(weight)});
  dispatch_row<T, false>(rows, hidden, vectors, [&](auto shape) {
    using Row = decltype(shape);
    const int64_t parts = std::min(ceil_div(rows, Row::kRowsPerBlock), Row::kMaxParts);
    const Tensor partials =
        wanted ? torch::stable::new_empty(mean, {parts, kSums, hidden}) : absent(mean);
    layernorm_backward_kernel<Source, Row><<<parts, Row::kBlock, 0, stream>>>(
        source, data<T>(weight), data<float>(mean), data<float>(rstd), output<float>(partials),
        rows, static_cast<int>(hidden));
    BERT_FAST_LAUNCH_CHECK();
    if (wanted) sum_partials<T>(partials, parts, kSums, hidden, grads, stream);
  });
}

}  // namespace bert_fast
