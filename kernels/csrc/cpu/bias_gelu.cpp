// Checking wrapper and registration of bias_gelu.
#include "cpu/dispatch.h"

namespace bert_fast::cpu {

static BiasGelu bias_gelu_arguments(
    const char* op, const Tensor& x, const OptionalTensor& bias, String activation) {
  BiasGelu a{};
  a.activation = activation_of(op, take(activation));
  require_rank(op, "x", x, 2);
  a.dtype = float_dtype(op, "x", x);
  a.rows = x.size(0);
  a.cols = x.size(1);
  a.x = checked(op, "x", x, x.scalar_type(), {a.rows, a.cols});
  a.bias = checked(op, "bias", bias, x.scalar_type(), {a.cols});
  return a;
}

static Tensor bias_gelu_forward(
    const Tensor& x, const OptionalTensor& bias, String activation, bool /*save*/, int64_t isa) {
  const char* op = "bias_gelu";
  BiasGelu a = bias_gelu_arguments(op, x, bias, activation);
  Tensor y = uninitialised_like(x);
  a.y = y.data_ptr();
  kernels_for(op, isa).bias_gelu_forward(a);
  return y;
}

static std::tuple<Tensor, Tensor> bias_gelu_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& bias, String activation,
    const std::vector<bool>& needs, int64_t isa) {
  const char* op = "bias_gelu";
  BiasGelu a = bias_gelu_arguments(op, x, bias, activation);
  require_needs(op, needs, 2);
  a.dy = checked(op, "dy", dy, x.scalar_type(), {a.rows, a.cols});
  Tensor partials = chunk_sums(a.rows, a.cols);
  a.partials = static_cast<float*>(partials.data_ptr());
  Tensor dx = needs[0] ? uninitialised_like(x) : absent(x);
  Tensor dbias = needs[1] && bias ? uninitialised_like(*bias) : absent(x);
  a.dx = needs[0] ? dx.data_ptr() : nullptr;
  a.dbias = needs[1] && bias ? dbias.data_ptr() : nullptr;
  kernels_for(op, isa).bias_gelu_backward(a);
  return {dx, dbias};
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) {
  m.def("bias_gelu_forward(Tensor x, Tensor? bias, str activation, bool save, int isa) -> Tensor");
  m.def(
      "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, str activation, bool[] needs, "
      "int isa) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CPU, m) {
  m.impl("bias_gelu_forward", TORCH_BOX(&bert_fast::cpu::bias_gelu_forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&bert_fast::cpu::bias_gelu_backward));
}
