// What every checking wrapper of a CPU op needs, on torch's stable ABI only: tensors and errors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "string_argument.h"

namespace bert_fast::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// Throws (a RuntimeError in Python) with the parts as its message. Unlike STD_TORCH_CHECK it does
// not prepend the path of the source file on the build machine.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "bert_fast.";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

inline std::string shape_text(const int64_t* sizes, size_t rank) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < rank; ++i) text << (i ? ", " : "") << sizes[i];
  text << ')';
  return text.str();
}

// Checks device (the CPU), contiguity, dtype and shape of an argument, and gives its address.
inline void* checked(
    const char* op, const char* name, const Tensor& t, ScalarType dtype,
    std::initializer_list<int64_t> shape) {
  require(t.is_cpu(), op, ": ", name, " is not on the CPU");
  require(t.is_contiguous(), op, ": ", name, " is not contiguous");
  const ScalarType found = t.scalar_type();
  require(
      found == dtype, op, ": ", name, " is ", torch::headeronly::toString(found), ", expected ",
      torch::headeronly::toString(dtype));
  const auto sizes = t.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape.begin()[i];
  if (!same)
    fail(
        op, ": ", name, " has shape ", shape_text(sizes.data(), sizes.size()), ", expected ",
        shape_text(shape.begin(), shape.size()));
  return t.data_ptr();
}

inline void* checked(
    const char* op, const char* name, const OptionalTensor& t, ScalarType dtype,
    std::initializer_list<int64_t> shape) {
  return t ? checked(op, name, *t, dtype, shape) : nullptr;
}

inline void require_rank(const char* op, const char* name, const Tensor& t, int64_t rank) {
  require(t.dim() == rank, op, ": ", name, " has ", t.dim(), " dimensions, expected ", rank);
}

inline void require_needs(const char* op, const std::vector<bool>& needs, size_t count) {
  require(needs.size() == count, op, ": needs has ", needs.size(), " values, expected ", count);
}

// An uninitialised CPU tensor, straight from the allocator: looking up aten::empty by name, as the
// stable ABI's own functions do, costs more than a microsecond per output.
inline Tensor uninitialised(const int64_t* sizes, size_t rank, ScalarType dtype) {
  int64_t strides[8], step = 1;
  require(rank <= 8, "cpu: more than 8 dimensions");
  for (size_t i = rank; i-- > 0; step *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = step;
  AtenTensorHandle handle = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const AOTITorchError error = aoti_torch_empty_strided(
      static_cast<int64_t>(rank), sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle);
  if (error != 0) fail("cpu: cannot allocate a tensor of shape ", shape_text(sizes, rank));
  return Tensor(handle);
}

inline Tensor uninitialised(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return uninitialised(sizes.begin(), sizes.size(), dtype);
}

inline Tensor uninitialised_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return uninitialised(sizes.data(), sizes.size(), like.scalar_type());
}

// Stands for "no such output": the registry of ops treats it like None.
inline Tensor absent(const Tensor& like) { return uninitialised({0}, like.scalar_type()); }

}  // namespace bert_fast::cpu
