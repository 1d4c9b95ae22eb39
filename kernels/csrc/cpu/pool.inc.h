// pool: v_b = the first row of sequence b ("cls") or the mean of its rows; y = v or, normalised,
// v / max(||v||, 1e-12). dv = (dy - y (y . dy)) / max(||v||, 1e-12) (the projection only where the
// norm is above the floor), handed to the first row or spread over all.
//
// One sequence at a time: its sum is built in blocks of rows added to an fp32 buffer in L1, so even
// a long mean keeps its digits. v is recomputed in the backward: cheaper than saving it.
#pragma once

#include "cpu/rows.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr float kNormFloor = 1e-12f;

template <class T>
void pool_row(const Pool& a, int64_t b, float* v) {
  const int64_t first = a.cu_seqlens[b], length = a.cu_seqlens[b + 1] - first;
  const T* x = static_cast<const T*>(a.x) + first * a.cols;
  memset(v, 0, a.cols * sizeof(float));
  const int64_t rows = a.mean ? length : smaller<int64_t>(1, length);
  constexpr int64_t group = 32;
  for (int64_t start = 0; start < rows; start += group) {
    sweep(a.cols, [&](int64_t i, auto lanes) {
      vf sum{};
      for (int64_t row = start; row < smaller(start + group, rows); ++row)
        sum += load(x + row * a.cols + i, lanes);
      store(v + i, load(v + i, lanes) + sum, lanes);
    });
  }
  if (rows > 1)
    sweep(a.cols, [&](int64_t i, auto lanes) {
      store(v + i, load(v + i, lanes) / float(rows), lanes);
    });
}

inline float dot(const float* x, const float* y, int64_t n) {
  vf sum{};
  sweep(n, [&](int64_t i, auto lanes) { sum = fma(load(x + i, lanes), load(y + i, lanes), sum); });
  return hsum(sum);
}

template <class T>
void pool_forward(const Pool& a) {
  const int64_t per_sequence = a.cols * (a.mean ? a.rows / (a.batch + 1) + 1 : 1);
  parallel(a.batch, larger<int64_t>(1, kGrain / (per_sequence + 1)), [&](int64_t b0, int64_t b1) {
    Scratch v(a.cols);
    for (int64_t b = b0; b < b1; ++b) {
      pool_row<T>(a, b, v.data);
      const float norm = a.normalize ? __builtin_sqrtf(dot(v.data, v.data, a.cols)) : 1.0f;
      const float divisor = larger(norm, kNormFloor);
      sweep(a.cols, [&](int64_t i, auto lanes) {
        store(static_cast<T*>(a.y) + b * a.cols + i, load(v.data + i, lanes) / divisor, lanes);
      });
    }
  });
}

template <class T>
void pool_backward(const Pool& a) {
  const int64_t per_sequence = a.cols * (a.rows / (a.batch + 1) + 1);
  parallel(a.batch, larger<int64_t>(1, kGrain / (per_sequence + 1)), [&](int64_t b0, int64_t b1) {
    Scratch v(a.cols), dv(a.cols);
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t first = a.cu_seqlens[b], length = a.cu_seqlens[b + 1] - first;
      const T* dy = static_cast<const T*>(a.dy) + b * a.cols;
      sweep(a.cols, [&](int64_t i, auto lanes) {
        store(dv.data + i, load(dy + i, lanes), lanes);
      });
      float divisor = 1.0f, projection = 0.0f;
      if (a.normalize) {
        pool_row<T>(a, b, v.data);
        const float norm = __builtin_sqrtf(dot(v.data, v.data, a.cols));
        divisor = larger(norm, kNormFloor);
        if (norm > kNormFloor) projection = dot(v.data, dv.data, a.cols) / norm / norm;
      }
      const float share = a.mean ? 1.0f / float(larger<int64_t>(1, length)) : 1.0f;
      for (int64_t row = 0; row < length; ++row) {
        T* dx = static_cast<T*>(a.dx) + (first + row) * a.cols;
        const bool reached = a.mean || row == 0;
        sweep(a.cols, [&](int64_t i, auto lanes) {
          vf d = load(dv.data + i, lanes);
          if (a.normalize) d = (d - load(v.data + i, lanes) * projection) / divisor;
          store(dx + i, reached ? d * share : vf{}, lanes);
        });
      }
    }
  });
}

inline void pool_forward(const Pool& a) {
  with_dtype(a.dtype, [&]<class T>() { pool_forward<T>(a); });
}
inline void pool_backward(const Pool& a) {
  with_dtype(a.dtype, [&]<class T>() { pool_backward<T>(a); });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
