// unpad: y = x[indices]; pad: y[indices] = x, zeros elsewhere. Each is the other's gradient.
//
// Rows are copied as bytes, by memcpy, which already uses the widest loads of the machine: there is
// nothing to compile per instruction set or dtype, and `isa` only has to be a valid one.
#include <cstring>
#include <functional>

#include "cpu/dispatch.h"
#include "cpu/steps.h"

namespace bert_fast::cpu {

static void for_each_row(
    int64_t rows, int64_t row_bytes, const std::function<void(int64_t, int64_t)>& body) {
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const std::function<void(int64_t, int64_t)>*>(context))(begin, end);
  };
  const int64_t grain = 65536 / (row_bytes + 1) + 1;
  run_parallel(rows, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

static int64_t row_bytes(const Tensor& x) {
  return x.size(1) * static_cast<int64_t>(x.element_size());
}

static Tensor gather(
    const char* op, const char* name, const Tensor& x, const Tensor& indices, int64_t isa) {
  kernels_for(op, isa);
  require_rank(op, name, x, 2);
  const int64_t rows = indices.numel(), bytes = row_bytes(x);
  const auto* from = static_cast<const char*>(
      checked(op, name, x, x.scalar_type(), {x.size(0), x.size(1)}));
  checked(op, "indices", indices, ScalarType::Long, {rows});
  const auto* at =
      static_cast<const int64_t*>(indices_below(op, "indices", indices, rows, x.size(0)).data);
  Tensor y = uninitialised({rows, x.size(1)}, x.scalar_type());
  auto* to = static_cast<char*>(y.data_ptr());
  for_each_row(rows, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * bytes, from + at[i] * bytes, bytes);
  });
  return y;
}

Tensor scatter(
    const char* op, const char* name, const Tensor& x, const Tensor& indices, int64_t rows,
    int64_t isa) {
  kernels_for(op, isa);
  require_rank(op, name, x, 2);
  require(rows >= 0, op, ": rows is ", rows, ", expected rows >= 0");
  const int64_t count = x.size(0), bytes = row_bytes(x);
  const auto* from = static_cast<const char*>(
      checked(op, name, x, x.scalar_type(), {count, x.size(1)}));
  checked(op, "indices", indices, ScalarType::Long, {count});
  const auto* at =
      static_cast<const int64_t*>(indices_below(op, "indices", indices, count, rows).data);
  Tensor y = uninitialised({rows, x.size(1)}, x.scalar_type());
  auto* to = static_cast<char*>(y.data_ptr());
  for_each_row(rows, bytes, [&](int64_t begin, int64_t end) {
    std::memset(to + begin * bytes, 0, (end - begin) * bytes);
  });
  for_each_row(count, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + at[i] * bytes, from + i * bytes, bytes);
  });
  return y;
}

static Tensor unpad_forward(const Tensor& x, const Tensor& indices, bool /*save*/, int64_t isa) {
  return gather("unpad", "x", x, indices, isa);
}
static Tensor unpad_backward(
    const Tensor& dy, const Tensor& x, const Tensor& indices, const std::vector<bool>& needs,
    int64_t isa) {
  require_needs("unpad", needs, 1);
  return needs[0] ? scatter("unpad", "dy", dy, indices, x.size(0), isa) : absent(x);
}
static Tensor pad_forward(
    const Tensor& x, const Tensor& indices, int64_t rows, bool /*save*/, int64_t isa) {
  return scatter("pad", "x", x, indices, rows, isa);
}
static Tensor pad_backward(
    const Tensor& dy, const Tensor& x, const Tensor& indices, int64_t /*rows*/,
    const std::vector<bool>& needs, int64_t isa) {
  require_needs("pad", needs, 1);
  return needs[0] ? gather("pad", "dy", dy, indices, isa) : absent(x);
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) {
  m.def("unpad_forward(Tensor x, Tensor indices, bool save, int isa) -> Tensor");
  m.def("unpad_backward(Tensor dy, Tensor x, Tensor indices, bool[] needs, int isa) -> Tensor");
  m.def("pad_forward(Tensor x, Tensor indices, int rows, bool save, int isa) -> Tensor");
  m.def(
      "pad_backward(Tensor dy, Tensor x, Tensor indices, int rows, bool[] needs, int isa) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CPU, m) {
  m.impl("unpad_forward", TORCH_BOX(&bert_fast::cpu::unpad_forward));
  m.impl("unpad_backward", TORCH_BOX(&bert_fast::cpu::unpad_backward));
  m.impl("pad_forward", TORCH_BOX(&bert_fast::cpu::pad_forward));
  m.impl("pad_backward", TORCH_BOX(&bert_fast::cpu::pad_backward));
}
