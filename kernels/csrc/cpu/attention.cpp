// Checking wrapper and registration of attention.
#include "cpu/dispatch.h"

namespace bert_fast::cpu {

Attention attention_arguments(
    const char* op, Dtype dtype, int64_t tokens, int64_t heads, int64_t width,
    const Tensor& cu_seqlens, const OptionalTensor& key_start, const OptionalTensor& bias,
    double scale) {
  Attention a{};
  a.dtype = dtype;
  a.tokens = tokens;
  a.heads = heads;
  a.width = width;
  a.cu_seqlens = sequence_bounds(op, cu_seqlens, a.tokens);
  a.batch = cu_seqlens.size(0) - 1;
  a.key_start =
      static_cast<const int32_t*>(checked(op, "key_start", key_start, ScalarType::Int, {a.batch}));
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t start = a.cu_seqlens[b], end = a.cu_seqlens[b + 1];
    a.longest = end - start > a.longest ? end - start : a.longest;
    require(
        !a.key_start || (start <= a.key_start[b] && a.key_start[b] <= end), op, ": key_start[", b,
        "] is ", a.key_start ? a.key_start[b] : 0, ", expected ", start, " to ", end);
  }
  a.scale = float(scale);
  if (bias) {
    require_rank(op, "bias", *bias, 4);
    const int64_t batch = bias->size(0), heads = bias->size(1), size = bias->size(2);
    a.bias_dtype = float_dtype(op, "bias", *bias);
    a.bias = checked(op, "bias", *bias, bias->scalar_type(), {batch, heads, size, size});
    require(
        (batch == 1 || batch == a.batch) && (heads == 1 || heads == a.heads) && size >= a.longest,
        op, ": bias has shape (", batch, ", ", heads, ", ", size, ", ", size, "), expected (1 or ",
        a.batch, ", 1 or ", a.heads, ", S, S) with S >= ", a.longest);
    a.bias_row = size;
    a.bias_head = heads == 1 ? 0 : size * size;
    a.bias_batch = batch == 1 ? 0 : heads * size * size;
  }
  return a;
}

static Attention attention_on(
    const char* op, const Tensor& qkv, const Tensor& cu_seqlens, const OptionalTensor& key_start,
    const OptionalTensor& bias, double scale) {
  require_rank(op, "qkv", qkv, 4);
  Attention a = attention_arguments(
      op, float_dtype(op, "qkv", qkv), qkv.size(0), qkv.size(2), qkv.size(3), cu_seqlens, key_start,
      bias, scale);
  a.head_step = a.width;
  a.part_step = a.heads * a.width;
  a.token_step = 3 * a.part_step;
  a.qkv = checked(op, "qkv", qkv, qkv.scalar_type(), {a.tokens, 3, a.heads, a.width});
  return a;
}

static std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& qkv, const Tensor& cu_seqlens, const OptionalTensor& key_start,
    const OptionalTensor& bias, int64_t /*max_seqlen*/, double scale, double p,
    const OptionalTensor& seed, bool save, int64_t isa) {
  const char* op = "attention";
  Attention a = attention_on(op, qkv, cu_seqlens, key_start, bias, scale);
  a.dropout = dropout_of(op, p, seed);
  Tensor out = uninitialised({a.tokens, a.heads, a.width}, qkv.scalar_type());
  Tensor lse = save
      ? uninitialised({a.heads, a.tokens}, ScalarType::Float)
      : uninitialised({0}, ScalarType::Float);
  a.out = out.data_ptr();
  a.lse = save ? static_cast<float*>(lse.data_ptr()) : nullptr;
  kernels_for(op, isa).attention_forward(a);
  return {out, lse};
}

// `out` is part of the calling rule of every backend; this one has no use for it.
static Tensor attention_backward(
    const Tensor& dout, const Tensor& qkv, const Tensor& cu_seqlens,
    const OptionalTensor& key_start, const OptionalTensor& bias, int64_t /*max_seqlen*/,
    double scale, double p, const OptionalTensor& seed, const Tensor& /*out*/, const Tensor& lse,
    const std::vector<bool>& needs, int64_t isa) {
  const char* op = "attention";
  require_needs(op, needs, 1);
  if (!needs[0]) return absent(qkv);
  Attention a = attention_on(op, qkv, cu_seqlens, key_start, bias, scale);
  a.dropout = dropout_of(op, p, seed);
  const ScalarType dtype = qkv.scalar_type();
  a.dout = checked(op, "dout", dout, dtype, {a.tokens, a.heads, a.width});
  a.lse = static_cast<float*>(checked(op, "lse", lse, ScalarType::Float, {a.heads, a.tokens}));
  Tensor dqkv = uninitialised_like(qkv);
  a.dqkv = dqkv.data_ptr();
  kernels_for(op, isa).attention_backward(a);
  return dqkv;
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) {
  m.def(
      "attention_forward(Tensor qkv, Tensor cu_seqlens, Tensor? key_start, Tensor? bias, "
      "int max_seqlen, float scale, float p, Tensor? seed, bool save, int isa) "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dout, Tensor qkv, Tensor cu_seqlens, Tensor? key_start, "
      "Tensor? bias, int max_seqlen, float scale, float p, Tensor? seed, Tensor out, Tensor lse, "
      "bool[] needs, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&bert_fast::cpu::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&bert_fast::cpu::attention_backward));
}
