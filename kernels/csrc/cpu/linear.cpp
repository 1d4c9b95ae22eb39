// Checking wrappers and registration of linear and feed_forward with packed weights.
#include <algorithm>

#include "cpu/dispatch.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace bert_fast::cpu {

// Elements of a packed weight: bytes where its values have 8 bits, else of the weight's dtype.
static int64_t packed_elements(const Kernels& kernels, const PackWeight& a) {
  return kernels.packed_bytes(a) / (a.int8 ? 1 : size_of(a.dtype));
}

bool has_int8_values(const Tensor& packed) { return packed.scalar_type() == ScalarType::Byte; }

const void* checked_panels(
    const char* op, const char* name, const Tensor& packed, const Tensor& x, bool int8,
    int64_t cols, int64_t depth, const Kernels& kernels, int64_t apart) {
  const Dtype dtype = float_dtype(op, "x", x);
  const PackWeight first{dtype, int8, apart, depth}, rest{dtype, int8, cols - apart, depth};
  const int64_t elements = packed_elements(kernels, first) + packed_elements(kernels, rest);
  return checked(op, name, packed, int8 ? ScalarType::Byte : x.scalar_type(), {elements});
}

// Asks for huge pages: a weight is read from end to end in every call, and of few tokens' time the
// lookup of small pages' addresses is a part. A hint, which a system without them does not take; not
// for weights smaller than such a page, as each hint may split the heap's mapping.
static void hint_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = 1 << 21;
  if (bytes < kHugePage) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The first `apart` columns and the others are in panels of their own.
static Tensor pack_weight(const Tensor& weight, bool int8, int64_t apart, int64_t isa) {
  const char* op = "pack_weight";
  PackWeight first{};
  require_rank(op, "weight", weight, 2);
  const int64_t cols = weight.size(0);
  require(
      0 <= apart && apart <= cols, op, ": apart is ", apart, ", expected 0 to ", cols);
  first.dtype = float_dtype(op, "weight", weight);
  first.int8 = int8;
  first.cols = apart;
  first.depth = weight.size(1);
  first.weight = checked(op, "weight", weight, weight.scalar_type(), {cols, first.depth});
  PackWeight rest = first;
  rest.cols = cols - apart;
  rest.weight =
      static_cast<const char*>(first.weight) + apart * first.depth * size_of(first.dtype);
  const Kernels& kernels = kernels_for(op, isa);
  const int64_t elements = packed_elements(kernels, first) + packed_elements(kernels, rest);
  Tensor packed = uninitialised({elements}, int8 ? ScalarType::Byte : weight.scalar_type());
  const int64_t bytes = kernels.packed_bytes(first);
  first.packed = packed.data_ptr();
  rest.packed = static_cast<char*>(first.packed) + bytes;
  hint_huge_pages(first.packed, bytes + kernels.packed_bytes(rest));
  kernels.pack_weight(first);
  kernels.pack_weight(rest);
  return packed;
}

static Tensor linear_forward(
    const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t cols,
    String activation, int64_t isa) {
  const char* op = "linear";
  Linear a{};
  a.activation = activation_of(op, take(activation));
  require_rank(op, "x", x, 2);
  a.dtype = float_dtype(op, "x", x);
  a.int8 = has_int8_values(packed);
  a.rows = x.size(0);
  a.depth = x.size(1);
  a.cols = cols;
  const Kernels& kernels = kernels_for(op, isa);
  a.x = checked(op, "x", x, x.scalar_type(), {a.rows, a.depth});
  a.packed = checked_panels(op, "packed", packed, x, a.int8, cols, a.depth, kernels);
  a.bias = checked(op, "bias", bias, x.scalar_type(), {cols});
  Tensor y = uninitialised({a.rows, cols}, x.scalar_type());
  a.y = y.data_ptr();
  kernels.linear_forward(a);
  return y;
}

int64_t rows_at_once() { return std::max<int64_t>(512, 64 * thread_count()); }

void feed_forward(const Kernels& kernels, const FeedForward& a, void* states) {
  if (kernels.feed_forward_fits(a)) return kernels.feed_forward_forward(a);
  const int64_t most = std::min(a.rows, rows_at_once());
  const int64_t bytes = size_of(a.dtype);
  for (int64_t row = 0; row < a.rows; row += most) {
    const int64_t rows = a.rows - row < most ? a.rows - row : most;
    const void* x = static_cast<const char*>(a.x) + row * a.hidden * bytes;
    void* y = static_cast<char*>(a.y) + row * a.cols * bytes;
    kernels.linear_forward(
        {a.dtype, a.int8, a.activation, rows, a.hidden, a.inner, x, a.up, a.up_bias, states});
    kernels.linear_forward(
        {a.dtype, a.int8, Activation::none, rows, a.inner, a.cols, states, a.down, nullptr, y});
  }
}

static Tensor feed_forward_forward(
    const Tensor& x, const Tensor& up, const OptionalTensor& up_bias, const Tensor& down,
    int64_t inner, int64_t cols, String activation, int64_t isa) {
  const char* op = "feed_forward";
  FeedForward a{};
  a.activation = activation_of(op, take(activation));
  require_rank(op, "x", x, 2);
  a.dtype = float_dtype(op, "x", x);
  a.rows = x.size(0);
  a.hidden = x.size(1);
  a.inner = inner;
  a.cols = cols;
  const Kernels& kernels = kernels_for(op, isa);
  a.x = checked(op, "x", x, x.scalar_type(), {a.rows, a.hidden});
  a.up = checked_panels(op, "up", up, x, false, inner, a.hidden, kernels);
  a.up_bias = checked(op, "up_bias", up_bias, x.scalar_type(), {inner});
  a.down = checked_panels(op, "down", down, x, false, cols, inner, kernels);
  Tensor y = uninitialised({a.rows, cols}, x.scalar_type());
  a.y = y.data_ptr();
  Tensor states = uninitialised({std::min(a.rows, rows_at_once()), inner}, x.scalar_type());
  feed_forward(kernels, a, states.data_ptr());
  return y;
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) {
  m.def("pack_weight(Tensor weight, bool int8, int apart, int isa) -> Tensor");
  m.def(
      "linear_forward(Tensor x, Tensor packed, Tensor? bias, int cols, str activation, int isa) "
      "-> Tensor");
  m.def(
      "feed_forward_forward(Tensor x, Tensor up, Tensor? up_bias, Tensor down, int inner, "
      "int cols, str activation, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&bert_fast::cpu::pack_weight));
  m.impl("linear_forward", TORCH_BOX(&bert_fast::cpu::linear_forward));
  m.impl("feed_forward_forward", TORCH_BOX(&bert_fast::cpu::feed_forward_forward));
}
