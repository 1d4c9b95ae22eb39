// embed_layernorm and add_layernorm: they differ in where a row z comes from and in where dropout
// sits, and share everything else.
//
//   mean = sum_c z / C,  rstd = 1 / sqrt(sum_c (z - mean)^2 / C + eps)
//   y = (z - mean) * rstd * weight + bias
//   xhat = (z - mean) * rstd,  g = dy * weight
//   dz = rstd * (g - mean_c(g) - xhat * mean_c(g * xhat))
//   dweight = sum_rows dy * xhat,  dbias = sum_rows dy
//
// One row at a time: z is built once in fp32 in a buffer that stays in L1, so the variance is the
// exact two-pass one at the price of one pass over memory. Rows are split over threads; sums over
// rows go through fixed chunks (kernels.h: kChunkRows).
#pragma once

#include "cpu/rows.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

// The buffers of one thread, each as wide as a row rounded up to whole dropout blocks.
struct RowBuffers {
  int64_t width;
  Scratch memory;
  float *z, *g, *factors, *weight, *bias, *linear_bias;

  explicit RowBuffers(int64_t cols)
      : width(round_up(cols, 4 * W)), memory(6 * width), z(memory.data), g(z + width),
        factors(g + width), weight(factors + width), bias(weight + width),
        linear_bias(bias + width) {}
};

// A parameter row in fp32: as it is, or converted once per thread instead of once per row.
template <class T>
const float* as_floats(const void* row, int64_t cols, float* buffer) {
  if constexpr (sizeof(T) == sizeof(float)) return static_cast<const float*>(row);
  if (row == nullptr) return nullptr;
  sweep(cols, [&](int64_t i, auto lanes) {
    store(buffer + i, load(static_cast<const T*>(row) + i, lanes));
  });
  return buffer;
}

// Dropout factors of a row, or null where everything is kept.
inline const float* row_factors(const LayerNorm& a, int64_t row, const RowBuffers& buffers) {
  if (!a.dropout.on) return nullptr;
  keep_factors(a.dropout, row, a.cols, buffers.factors);
  return buffers.factors;
}

template <class T>
struct EmbeddedRow {
  static constexpr bool drops_output = true;
  const EmbedLayerNorm& a;
  const T *word, *position, *type;

  EmbeddedRow(const EmbedLayerNorm& args, RowBuffers&) : a(args) {}
  void move_to(int64_t row, const float*) {
    word = static_cast<const T*>(a.word) + index_at(a.input_ids, row) * a.cols;
    position = static_cast<const T*>(a.position) + index_at(a.position_ids, row) * a.cols;
    type = static_cast<const T*>(a.token_type);
    if (a.token_type_ids.data) type += index_at(a.token_type_ids, row) * a.cols;
  }
  template <class L>
  ALWAYS_INLINE vf z(int64_t i, L lanes) const {
    vf sum = load(word + i, lanes);
    if (type) sum += load(type + i, lanes);
    return sum + load(position + i, lanes);
  }
};

template <class T>
struct AddedRow {
  static constexpr bool drops_output = false;
  const AddLayerNorm& a;
  const T *x, *residual;
  const float *factors, *linear_bias;

  AddedRow(const AddLayerNorm& args, RowBuffers& buffers)
      : a(args), linear_bias(as_floats<T>(a.linear_bias, a.cols, buffers.linear_bias)) {}
  void move_to(int64_t row, const float* keep) {
    x = static_cast<const T*>(a.x) + row * a.cols;
    residual = a.residual ? static_cast<const T*>(a.residual) + row * a.cols : nullptr;
    factors = keep;
  }
  template <class L>
  ALWAYS_INLINE vf z(int64_t i, L lanes) const {
    vf sum = load(x + i, lanes);
    if (linear_bias) sum += load(linear_bias + i, lanes);
    if (factors) sum *= load(factors + i);
    if (residual) sum += load(residual + i, lanes);
    return sum;
  }
};

template <class T, class Row, class Args>
void layernorm_forward(const Args& a) {
  parallel(a.rows, larger<int64_t>(1, kGrain / (a.cols + 1)), [&](int64_t begin, int64_t end) {
    RowBuffers buffers(a.cols);
    Row source(a, buffers);
    const float* weight = as_floats<T>(a.weight, a.cols, buffers.weight);
    const float* bias = as_floats<T>(a.bias, a.cols, buffers.bias);
    for (int64_t row = begin; row < end; ++row) {
      const float* factors = row_factors(a, row, buffers);
      source.move_to(row, factors);
      Sums sums, squares;
      sweep_by_four(a.cols, [&](int64_t i, auto lanes, int slot) ALWAYS_INLINE_LAMBDA {
        vf z = keep_lanes(source.z(i, lanes), lanes);
        store(buffers.z + i, z);
        sums.part[slot] += z;
      });
      const float mean = hsum(sums.total()) / float(a.cols);
      sweep_by_four(a.cols, [&](int64_t i, auto lanes, int slot) ALWAYS_INLINE_LAMBDA {
        vf centred = keep_lanes(load(buffers.z + i) - mean, lanes);
        squares.part[slot] = fma(centred, centred, squares.part[slot]);
      });
      const float rstd = 1.0f / __builtin_sqrtf(hsum(squares.total()) / float(a.cols) + a.eps);
      T* y = static_cast<T*>(a.y) + row * a.cols;
      sweep(a.cols, [&](int64_t i, auto lanes) {
        vf xhat = (load(buffers.z + i) - mean) * rstd;
        vf out = fma(xhat, load(weight + i, lanes), load(bias + i, lanes));
        if (Row::drops_output && factors) out *= load(factors + i);
        store(y + i, out, lanes);
      });
      if (a.mean) a.mean[row] = mean, a.rstd[row] = rstd;
    }
  });
}

// One row of the backward; adds to the chunk's column sums. `dx` is null where dz serves as dx.
template <class T, class Row>
void layernorm_backward_row(
    const LayerNorm& a, Row& source, int64_t row, RowBuffers& buffers, const float* weight,
    void* dx, float* sums) {
  const float* factors = row_factors(a, row, buffers);
  source.move_to(row, factors);
  const float mean = a.mean[row], rstd = a.rstd[row];
  const T* dy = static_cast<const T*>(a.dy) + row * a.cols;
  float *dweight = sums, *dbias = sums + a.cols, *dlinear_bias = sums + 2 * a.cols;
  Sums sum, product;
  sweep_by_four(a.cols, [&](int64_t i, auto lanes, int slot) ALWAYS_INLINE_LAMBDA {
    vf xhat = (source.z(i, lanes) - mean) * rstd;
    vf d = load(dy + i, lanes);
    if (Row::drops_output && factors) d *= load(factors + i);
    store(dweight + i, fma(d, xhat, load(dweight + i, lanes)), lanes);
    store(dbias + i, d + load(dbias + i, lanes), lanes);
    vf g = d * load(weight + i, lanes);
    store(buffers.z + i, xhat);
    store(buffers.g + i, g);
    sum.part[slot] += g;  // zero in missing lanes, as dy is
    product.part[slot] = fma(g, xhat, product.part[slot]);
  });
  const float mean_g = hsum(sum.total()) / float(a.cols);
  const float mean_gx = hsum(product.total()) / float(a.cols);
  sweep(a.cols, [&](int64_t i, auto lanes) {
    vf dz = (load(buffers.g + i) - mean_g - load(buffers.z + i) * mean_gx) * rstd;
    if (a.dz) store(static_cast<T*>(a.dz) + row * a.cols + i, dz, lanes);
    if constexpr (!Row::drops_output) {
      if (factors) dz *= load(factors + i);
      if (dx) store(static_cast<T*>(dx) + row * a.cols + i, dz, lanes);
      store(dlinear_bias + i, dz + load(dlinear_bias + i, lanes), lanes);
    }
  });
}

template <class T, class Row, class Args>
void layernorm_backward(const Args& a, void* dx, void* dlinear_bias) {
  const int64_t chunks = ceil_div(a.rows, kChunkRows), stride = 3 * a.cols;
  const int64_t grain = larger<int64_t>(1, kGrain / (kChunkRows * a.cols + 1));
  parallel(chunks, grain, [&](int64_t begin, int64_t end) {
    RowBuffers buffers(a.cols);
    Row source(a, buffers);
    const float* weight = as_floats<T>(a.weight, a.cols, buffers.weight);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* sums = a.partials + chunk * stride;
      memset(sums, 0, stride * sizeof(float));
      const int64_t last = smaller((chunk + 1) * kChunkRows, a.rows);
      for (int64_t row = chunk * kChunkRows; row < last; ++row)
        layernorm_backward_row<T>(a, source, row, buffers, weight, dx, sums);
    }
  });
  sum_partials(a.partials, chunks, stride, a.cols, static_cast<T*>(a.dweight));
  sum_partials(a.partials + a.cols, chunks, stride, a.cols, static_cast<T*>(a.dbias));
  sum_partials(a.partials + 2 * a.cols, chunks, stride, a.cols, static_cast<T*>(dlinear_bias));
}

inline void embed_layernorm_forward(const EmbedLayerNorm& a) {
  with_dtype(a.dtype, [&]<class T>() { layernorm_forward<T, EmbeddedRow<T>>(a); });
}
inline void embed_layernorm_backward(const EmbedLayerNorm& a) {
  with_dtype(a.dtype, [&]<class T>() {
    layernorm_backward<T, EmbeddedRow<T>>(a, nullptr, nullptr);
  });
}
inline void add_layernorm_forward(const AddLayerNorm& a) {
  with_dtype(a.dtype, [&]<class T>() { layernorm_forward<T, AddedRow<T>>(a); });
}
inline void add_layernorm_backward(const AddLayerNorm& a) {
  with_dtype(a.dtype, [&]<class T>() {
    layernorm_backward<T, AddedRow<T>>(a, a.dx, a.dlinear_bias);
  });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
