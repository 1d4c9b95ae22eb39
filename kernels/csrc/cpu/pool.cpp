// Checking wrapper and registration of pool.
#include "cpu/dispatch.h"

namespace bert_fast::cpu {

static Pool pool_arguments(
    const char* op, const Tensor& x, const Tensor& cu_seqlens, String mode, bool normalize) {
  Pool a{};
  const std::string name = take(mode);
  require(
      name == "cls" || name == "mean", op, ": mode is '", name, "', expected cls or mean");
  require_rank(op, "x", x, 2);
  a.dtype = float_dtype(op, "x", x);
  a.mean = name == "mean";
  a.normalize = normalize;
  a.rows = x.size(0);
  a.cols = x.size(1);
  a.cu_seqlens = sequence_bounds(op, cu_seqlens, a.rows);
  a.batch = cu_seqlens.size(0) - 1;
  a.x = checked(op, "x", x, x.scalar_type(), {a.rows, a.cols});
  return a;
}

static Tensor pool_forward(
    const Tensor& x, const Tensor& cu_seqlens, String mode, bool normalize, bool /*save*/,
    int64_t isa) {
  const char* op = "pool";
  Pool a = pool_arguments(op, x, cu_seqlens, mode, normalize);
  Tensor y = uninitialised({a.batch, a.cols}, x.scalar_type());
  a.y = y.data_ptr();
  kernels_for(op, isa).pool_forward(a);
  return y;
}

static Tensor pool_backward(
    const Tensor& dy, const Tensor& x, const Tensor& cu_seqlens, String mode, bool normalize,
    const std::vector<bool>& needs, int64_t isa) {
  const char* op = "pool";
  Pool a = pool_arguments(op, x, cu_seqlens, mode, normalize);
  require_needs(op, needs, 1);
  if (!needs[0]) return absent(x);
  a.dy = checked(op, "dy", dy, x.scalar_type(), {a.batch, a.cols});
  Tensor dx = uninitialised_like(x);
  a.dx = dx.data_ptr();
  kernels_for(op, isa).pool_backward(a);
  return dx;
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) {
  m.def(
      "pool_forward(Tensor x, Tensor cu_seqlens, str mode, bool normalize, bool save, int isa) "
      "-> Tensor");
  m.def(
      "pool_backward(Tensor dy, Tensor x, Tensor cu_seqlens, str mode, bool normalize, "
      "bool[] needs, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CPU, m) {
  m.impl("pool_forward", TORCH_BOX(&bert_fast::cpu::pool_forward));
  m.impl("pool_backward", TORCH_BOX(&bert_fast::cpu::pool_backward));
}
