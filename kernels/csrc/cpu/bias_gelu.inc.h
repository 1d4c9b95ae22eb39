// bias_gelu: y = act(x + bias) with act one of
//
//   gelu       u Phi(u)                            act' = Phi(u) + u phi(u)
//   gelu_tanh  u sigmoid(2 k (u + 0.044715 u^3)), k = sqrt(2 / pi): sigmoid(2 v) = (1 + tanh v) / 2
//   relu       max(u, 0)
//   silu       u sigmoid(u)
//
// dx = dy act'(x + bias), dbias = sum_rows dx. Bound by memory for relu, by the exponential for the
// others; rows are split over threads, dbias through fixed chunks (kernels.h: kChunkRows).
#pragma once

#include "cpu/rows.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr float kTanhLinear = 1.5957691216f;  // 2 k
constexpr float kTanhCubic = 0.0713548163f;   // 2 k * 0.044715

constexpr int kTogether = 4;  // vectors activated in lockstep

ALWAYS_INLINE vf tanh_argument(vf u) { return u * fma(u * u, set1(kTanhCubic), kTanhLinear); }

template <class T, Activation A>
ALWAYS_INLINE vf activate(vf u) {
  if constexpr (A == Activation::none) return u;
  if constexpr (A == Activation::gelu) return u * normal_cdf<T>(u);
  if constexpr (A == Activation::gelu_tanh)
    return u * sigmoid(tanh_argument(u));
  if constexpr (A == Activation::relu) return u < 0.0f ? vf{} : u;
  return u * sigmoid(u);
}

// N vectors in place.
template <class T, Activation A, int N>
ALWAYS_INLINE void activate(vf (&u)[N]) {
  if constexpr (A == Activation::gelu) {
    vf phi[N];
    each<N>([&](int i) ALWAYS_INLINE_LAMBDA { phi[i] = u[i]; });
    normal_cdf<T>(phi);
    each<N>([&](int i) ALWAYS_INLINE_LAMBDA { u[i] *= phi[i]; });
  } else {
    each<N>([&](int i) ALWAYS_INLINE_LAMBDA { u[i] = activate<T, A>(u[i]); });
  }
}

template <Activation A>
ALWAYS_INLINE vf activate_slope(vf u) {
  if constexpr (A == Activation::none) return set1(1.0f);
  if constexpr (A == Activation::gelu)
    return fma(u * exp(-0.5f * u * u), set1(0.3989422804f), normal_cdf(u));
  if constexpr (A == Activation::relu) return u <= 0.0f ? vf{} : set1(1.0f);  // 1 of NaN, as PyTorch
  vf slope, inner = set1(1.0f), argument = u;
  if constexpr (A == Activation::gelu_tanh) {
    inner = fma(u * u, set1(3 * kTanhCubic), kTanhLinear);
    argument = tanh_argument(u);
  }
  vf s = sigmoid(argument, slope);
  return fma(u * slope, inner, s);
}

template <class T, class L>
ALWAYS_INLINE vf biased(const T* x, const T* bias, int64_t i, L lanes) {
  vf u = load(x + i, lanes);
  return bias ? u + load(bias + i, lanes) : u;
}

template <class T, Activation A>
void bias_gelu_forward(const BiasGelu& a) {
  parallel(a.rows, larger<int64_t>(1, kGrain / (4 * a.cols + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.cols;
      T* y = static_cast<T*>(a.y) + row * a.cols;
      const T* bias = static_cast<const T*>(a.bias);
      int64_t first = 0;
      for (; first + kTogether * W <= a.cols; first += kTogether * W) {
        vf u[kTogether];
        each<kTogether>([&](int i) ALWAYS_INLINE_LAMBDA {
          u[i] = biased(x, bias, first + i * W, Full{});
        });
        activate<T, A>(u);
        each<kTogether>([&](int i) ALWAYS_INLINE_LAMBDA { store(y + first + i * W, u[i]); });
      }
      sweep(a.cols - first, [&](int64_t i, auto lanes) {
        store(y + first + i, activate<T, A>(biased(x, bias, first + i, lanes)), lanes);
      });
    }
  });
}

template <class T, Activation A>
void bias_gelu_backward(const BiasGelu& a) {
  const int64_t chunks = ceil_div(a.rows, kChunkRows);
  const int64_t grain = larger<int64_t>(1, kGrain / (4 * kChunkRows * a.cols + 1));
  parallel(chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* sums = a.partials + chunk * a.cols;
      memset(sums, 0, a.cols * sizeof(float));
      const int64_t last = smaller((chunk + 1) * kChunkRows, a.rows);
      for (int64_t row = chunk * kChunkRows; row < last; ++row) {
        const T* x = static_cast<const T*>(a.x) + row * a.cols;
        const T* dy = static_cast<const T*>(a.dy) + row * a.cols;
        T* dx = a.dx ? static_cast<T*>(a.dx) + row * a.cols : nullptr;
        sweep(a.cols, [&](int64_t i, auto lanes) {
          vf u = biased(x, static_cast<const T*>(a.bias), i, lanes);
          vf d = load(dy + i, lanes) * activate_slope<A>(u);
          if (dx) store(dx + i, d, lanes);
          store(sums + i, load(sums + i, lanes) + d, lanes);
        });
      }
    }
  });
  sum_partials(a.partials, chunks, a.cols, a.cols, static_cast<T*>(a.dbias));
}

template <class F>
ALWAYS_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none: return f.template operator()<Activation::none>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return f.template operator()<Activation::gelu_tanh>();
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::silu: return f.template operator()<Activation::silu>();
  }
}

inline void bias_gelu_forward(const BiasGelu& a) {
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<Activation A>() { bias_gelu_forward<T, A>(a); });
  });
}
inline void bias_gelu_backward(const BiasGelu& a) {
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<Activation A>() { bias_gelu_backward<T, A>(a); });
  });
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
