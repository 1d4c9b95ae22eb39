// y = LayerNorm(dropout(x + linear_bias) + residual), the tail of both halves of a BERT layer.
//
// Bound by memory: x and residual are read once and y is written once, everything between stays in
// registers. The backward recomputes z instead of reading a saved one.
#include "layernorm_launch.cuh"

namespace bert_fast {
namespace {

// ---- pointer kernel: what LayerNorm's rows are made of ----

template <typename T>
struct AddSource {
  static constexpr bool kColumnSum = true;  // dlinear_bias = column sum of dx
  // On an H200 rows of 1024 take 19 us of 22 when streamed at 8,192 rows, and 60 of 57 at 32,768.
  static constexpr int64_t kMostStreamedWide = 16'384;

  const T* x;            // [T, H]
  const T* linear_bias;  // [H] or null
  const T* residual;     // [T, H] or null
  const T* dy;           // [T, H], backward only
  T* dx;                 // [T, H] or null
  T* dresidual;          // [T, H] or null
  Dropout dropout;

  template <typename Row>
  __device__ __forceinline__ void load_row(int64_t row, int hidden, int thread,
                                           float (&z)[Row::kPacks][Row::kItems]) const {
    Pack<T, Row::kItems> x_packs[Row::kPacks], residual_packs[Row::kPacks];
    load_row_packs<Row>(x + row * hidden, hidden, thread, x_packs);
    if (residual != nullptr)
      load_row_packs<Row>(residual + row * hidden, hidden, thread, residual_packs);
    const bool drop = dropout.seed != nullptr;
    const uint2 key = drop ? dropout.key() : make_uint2(0u, 0u);
#pragma unroll
    for (int i = 0; i < Row::kPacks; ++i) {
      const int column = Row::column(i, thread);
      if (column < hidden) {
        unpack(x_packs[i], z[i]);
        if (linear_bias != nullptr) add(z[i], load_pack<T, Row::kItems>(linear_bias + column));
        if (drop) apply_dropout(dropout, key, row, column, z[i]);
        if (residual != nullptr) add(z[i], residual_packs[i]);
      }
    }
  }

  // x and residual are dead after this, or for long, and y is wanted next: it is y that the L2
  // cache should keep.
  template <typename Row>
  struct Stream {
    static constexpr int N = Row::kItems;
    const AddSource& source;
    int lane;
    uint64_t policy = evict_first();

    __device__ __forceinline__ Stream(const AddSource& source, int lane)
        : source(source), lane(lane) {}

    __device__ __forceinline__ void look_ahead(int64_t, int64_t, int64_t) {}

    __device__ __forceinline__ void copy(int, int64_t row, uint32_t address) const {
      const auto once = [&](uint32_t to, const T* from) { copy_async_once(to, from, policy); };
      copy_row<Row, 0>(source.x + row * kHidden<Row>, lane, address, once);
      if (source.residual != nullptr)
        copy_row<Row, 1>(source.residual + row * kHidden<Row>, lane, address, once);
    }

    __device__ __forceinline__ void load_row(int, int64_t row, const Pack<T, N>* stage,
                                             float (&z)[Row::kPacks][N]) const {
      copy_wait<kAhead>();
      // The bias and the seed come from the L1 cache, at every row: registers are short.
      const bool drop = source.dropout.seed != nullptr;
      const uint2 key = drop ? source.dropout.key() : make_uint2(0u, 0u);
#pragma unroll
      for (int i = 0; i < Row::kPacks; ++i) {
        const int column = Row::column(i, lane);
        widen(staged_pack<Row, 0>(stage, i), z[i]);
        if (source.linear_bias != nullptr) add(z[i], load_pack<T, N>(source.linear_bias + column));
        if (drop) apply_dropout(source.dropout, key, row, column, z[i]);
        if (source.residual != nullptr) add(z[i], staged_pack<Row, 1>(stage, i));
      }
    }
  };

  template <int N>
  __device__ __forceinline__ void finish(int64_t, int, float (&)[N]) const {}

  template <typename Row>
  __device__ __forceinline__ void load_grad(int64_t row, int hidden, int thread,
                                            float (&grad)[Row::kPacks][Row::kItems]) const {
    Pack<T, Row::kItems> packs[Row::kPacks];
    load_row_packs<Row>(dy + row * hidden, hidden, thread, packs);
#pragma unroll
    for (int i = 0; i < Row::kPacks; ++i) {
      if (Row::column(i, thread) < hidden) unpack(packs[i], grad[i]);
    }
  }

  template <int N>
  __device__ __forceinline__ void store_grad(int64_t row, int hidden, int column,
                                             float (&dz)[N]) const {
    if (dresidual != nullptr) store_floats<T>(dresidual + row * hidden + column, dz);
    if (dropout.seed != nullptr) apply_dropout(dropout, dropout.key(), row, column, dz);
    if (dx != nullptr) store_floats<T>(dx + row * hidden + column, dz);
  }
};

// ---- checking wrapper ----

constexpr const char* kOp = "bert_fast_cuda::add_layernorm";

void check_arguments(const Tensor& x, const MaybeTensor& linear_bias, const MaybeTensor& residual,
                     const Tensor& weight, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": x must be [T, H]");
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_hidden(kOp, hidden);
  check_float(kOp, "x", x, x, {rows, hidden});
  check_float(kOp, "linear_bias", linear_bias, x, {hidden});
  check_float(kOp, "residual", residual, x, {rows, hidden});
  check_float(kOp, "weight", weight, x, {hidden});
  check_float(kOp, "bias", bias, x, {hidden});
}

std::tuple<Tensor, Tensor, Tensor> add_layernorm_forward(
    Tensor x, MaybeTensor linear_bias, MaybeTensor residual, Tensor weight, Tensor bias, double eps,
    double p, MaybeTensor seed, bool save) {
  check_arguments(x, linear_bias, residual, weight, bias);
  const Dropout dropout = make_dropout(kOp, p, seed, x);
  const int64_t rows = x.size(0);
  const OnDevice device(x);
  const Tensor y = torch::stable::empty_like(x);
  const auto make_stats = [&] {
    return torch::stable::new_empty(x, {save ? rows : 0}, ScalarType::Float);
  };
  const Tensor mean = make_stats(), rstd = save ? make_stats() : mean;
  if (rows == 0) return {y, mean, rstd};
  dispatch_float(kOp, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const AddSource<T> source{data<T>(x), data<T>(linear_bias), data<T>(residual), nullptr,
                              nullptr,    nullptr,              dropout};
    const bool vectors =
        vectors_fit<T>(x.size(1), {source.x, source.linear_bias, source.residual});
    launch_layernorm_forward<T>(source, vectors, weight, bias, y, mean, rstd, eps, device.stream());
  });
  return {y, mean, rstd};
}

// needs: x, linear_bias, residual, weight, bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layernorm_backward(
    Tensor dy, Tensor x, MaybeTensor linear_bias, MaybeTensor residual, Tensor weight, Tensor bias,
    double /*eps*/, double p, MaybeTensor seed, Tensor mean, Tensor rstd, std::vector<bool> needs) {
  check_arguments(x, linear_bias, residual, weight, bias);
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_float(kOp, "dy", dy, x, {rows, hidden});
  check_stats(kOp, "mean", mean, x, rows);
  check_stats(kOp, "rstd", rstd, x, rows);
  STD_TORCH_CHECK(needs.size() == 5, kOp, ": needs must have 5 entries, got ", needs.size());
  const Dropout dropout = make_dropout(kOp, p, seed, x);
  const OnDevice device(x);
  const Tensor none = absent(x);
  const bool wants_linear_bias = needs[1] && linear_bias.has_value();
  const bool wants_residual = needs[2] && residual.has_value();
  // Without dropout dx and dresidual are equal: written once, returned twice.
  const bool shared = needs[0] && wants_residual && dropout.seed == nullptr;
  const Tensor dx = needs[0] ? torch::stable::empty_like(x) : none;
  const Tensor dresidual = shared ? dx : wants_residual ? torch::stable::empty_like(x) : none;
  const Tensor dlinear_bias = wants_linear_bias ? make_parameter_grad(*linear_bias, rows) : none;
  const Tensor dweight = needs[3] ? make_parameter_grad(weight, rows) : none;
  const Tensor dbias = needs[4] ? make_parameter_grad(bias, rows) : none;
  if (rows == 0) return {dx, dlinear_bias, dresidual, dweight, dbias};
  dispatch_float(kOp, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const AddSource<T> source{data<T>(x),
                              data<T>(linear_bias),
                              data<T>(residual),
                              data<T>(dy),
                              output<T>(dx),
                              shared ? nullptr : output<T>(dresidual),
                              dropout};
    const bool vectors = vectors_fit<T>(hidden, {source.x, source.linear_bias, source.residual,
                                                 source.dy, source.dx, source.dresidual});
    const ParameterGrads<T> grads{{output<T>(dweight), output<T>(dbias), output<T>(dlinear_bias)}};
    launch_layernorm_backward<T>(source, vectors, weight, mean, rstd, rows, grads, device.stream());
  });
  return {dx, dlinear_bias, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace bert_fast

// ---- registration ----

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cuda, m) {
  m.def(
      "add_layernorm_forward(Tensor x, Tensor? linear_bias, Tensor? residual, Tensor weight, "
      "Tensor bias, float eps, float p, Tensor? seed, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_layernorm_backward(Tensor dy, Tensor x, Tensor? linear_bias, Tensor? residual, "
      "Tensor weight, Tensor bias, float eps, float p, Tensor? seed, Tensor mean, Tensor rstd, "
      "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cuda, CUDA, m) {
  m.impl("add_layernorm_forward", TORCH_BOX(&bert_fast::add_layernorm_forward));
  m.impl("add_layernorm_backward", TORCH_BOX(&bert_fast::add_layernorm_backward));
}
