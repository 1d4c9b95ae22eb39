// encoder: what the ops of its layers compute, in one call and with no round trip between two.
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/dispatch.h"

namespace bert_fast::cpu {

using Tensors = std::vector<Tensor>;

// One layer's weights, in the order of bert_fast/ops/encoder.py; q, k and v are one, and matrices
// are in panels.
struct Layer {
  static constexpr size_t kTensors = 12;
  int64_t inside, inner;  // heads * head_dim; width of the feed-forward network
  const void *qkv, *qkv_bias, *out, *out_bias, *out_norm, *out_norm_bias;
  const void *up, *up_bias, *down, *down_bias, *down_norm, *down_norm_bias;
};

static Layer layer_at(
    const char* op, const Tensors& weights, size_t index, const Tensor& x, bool int8,
    const Kernels& kernels) {
  const int64_t hidden = x.size(1);
  const Tensor* next = weights.data() + index * Layer::kTensors;
  Layer layer{next[1].numel() / 3, next[7].numel()};
  auto matrix = [&](const char* name, int64_t cols, int64_t depth) {
    return checked_panels(op, name, *next++, x, int8, cols, depth, kernels);
  };
  auto row = [&](const char* name, int64_t cols) {
    return checked(op, name, *next++, x.scalar_type(), {cols});
  };
  layer.qkv = matrix("qkv", 3 * layer.inside, hidden);
  layer.qkv_bias = row("qkv_bias", 3 * layer.inside);
  layer.out = matrix("out", hidden, layer.inside);
  layer.out_bias = row("out_bias", hidden);
  layer.out_norm = row("out_norm", hidden);
  layer.out_norm_bias = row("out_norm_bias", hidden);
  layer.up = matrix("up", layer.inner, hidden);
  layer.up_bias = row("up_bias", layer.inner);
  layer.down = matrix("down", hidden, layer.inner);
  layer.down_bias = row("down_bias", hidden);
  layer.down_norm = row("down_norm", hidden);
  layer.down_norm_bias = row("down_norm_bias", hidden);
  return layer;
}

// Moves row rows[i] of [n, bytes] to row i.
static Tensor taken(
    const void* from, const int64_t* rows, int64_t count, int64_t cols, ScalarType type) {
  Tensor to = uninitialised({count, cols}, type);
  const int64_t bytes = cols * static_cast<int64_t>(to.element_size());
  auto* target = static_cast<char*>(to.data_ptr());
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(target + i * bytes, static_cast<const char*>(from) + rows[i] * bytes, bytes);
  return to;
}

static Tensor encoder_forward(
    const Tensor& x, const Tensor& cu_seqlens, const OptionalTensor& key_start,
    const OptionalTensor& bias, const OptionalTensor& rows, const Tensors& weights, int64_t heads,
    double eps, String activation, int64_t isa) {
  const char* op = "encoder";
  const Activation act = activation_of(op, take(activation));
  require_rank(op, "x", x, 2);
  require(heads > 0, op, ": heads is ", heads, ", expected a positive number");
  const size_t layers = weights.size() / Layer::kTensors;
  require(
      layers > 0 && weights.size() % Layer::kTensors == 0, op, ": weights has ", weights.size(),
      " tensors, expected ", Layer::kTensors, " for each layer");
  const bool int8 = has_int8_values(weights[0]);  // then all are; no other kind is mixed in
  const Kernels& kernels = kernels_for(op, isa);
  const Dtype dtype = float_dtype(op, "x", x);
  const ScalarType type = x.scalar_type();
  const int64_t tokens = x.size(0), hidden = x.size(1);
  const void* input = checked(op, "x", x, type, {tokens, hidden});
  int64_t count = tokens;  // rows that are computed
  auto empty = [&] { return uninitialised({tokens, hidden}, type); };
  Tensor branch = empty(), middle = empty(), y = empty(), qkv = y, context = y;
  int64_t inside = 0;

  auto project = [&](const void* from, int64_t depth, int64_t cols, const void* matrix,
                     const void* shift, void* to) {
    kernels.linear_forward(
        {dtype, int8, Activation::none, count, depth, cols, from, matrix, shift, to});
  };
  auto add_norm = [&](const void* shift, const void* residual, const void* weight,
                      const void* norm_bias, void* to) {
    AddLayerNorm a{};
    a.dtype = dtype;
    a.rows = count;
    a.cols = hidden;
    a.eps = float(eps);
    a.x = branch.data_ptr();
    a.linear_bias = shift;
    a.residual = residual;
    a.weight = weight;
    a.bias = norm_bias;
    a.y = to;
    kernels.add_layernorm_forward(a);
  };

  for (size_t i = 0; i < layers; ++i) {
    const Layer m = layer_at(op, weights, i, x, int8, kernels);
    require(
        m.inside % heads == 0, op, ": heads is ", heads, ", expected a divisor of ", m.inside);
    Tensor residual = x;
    if (m.inside != inside) {  // else as before: fresh memory costs page faults
      inside = m.inside;
      qkv = uninitialised({tokens, 3, heads, inside / heads}, type);
      context = uninitialised({tokens, inside}, type);
    }
    project(input, hidden, 3 * m.inside, m.qkv, m.qkv_bias, qkv.data_ptr());
    Attention attention = attention_arguments(
        op, qkv, cu_seqlens, key_start, bias, 1.0 / std::sqrt(double(m.inside / heads)));
    attention.out = context.data_ptr();
    kernels.attention_forward(attention);
    if (rows && i == layers - 1) {
      count = rows->numel();
      const Indices found = indices_below(op, "rows", *rows, count, tokens);
      require(found.is_64, op, ": rows is not int64");
      const auto* wanted = static_cast<const int64_t*>(found.data);
      context = taken(context.data_ptr(), wanted, count, m.inside, type);
      residual = taken(input, wanted, count, hidden, type);
      input = residual.data_ptr();
      y = uninitialised({count, hidden}, type);
    }
    project(context.data_ptr(), m.inside, hidden, m.out, nullptr, branch.data_ptr());
    add_norm(m.out_bias, input, m.out_norm, m.out_norm_bias, middle.data_ptr());
    feed_forward(
        kernels,
        {dtype, int8, act, count, hidden, m.inner, hidden, middle.data_ptr(), m.up, m.up_bias,
         m.down, branch.data_ptr()});
    add_norm(m.down_bias, middle.data_ptr(), m.down_norm, m.down_norm_bias, y.data_ptr());
    input = y.data_ptr();  // the next layer writes it when it has read it
  }
  return y;
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) {
  m.def(
      "encoder_forward(Tensor x, Tensor cu_seqlens, Tensor? key_start, Tensor? bias, "
      "Tensor? rows, Tensor[] weights, int heads, float eps, str activation, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CPU, m) {
  m.impl("encoder_forward", TORCH_BOX(&bert_fast::cpu::encoder_forward));
}
