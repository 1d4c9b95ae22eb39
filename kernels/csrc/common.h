// What every checking wrapper needs, on torch's stable ABI only: tensors, errors, dtypes.
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

namespace bert_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws (a RuntimeError in Python) with the parts as its message. Unlike STD_TORCH_CHECK it does
// not prepend the path of the source file on the build machine.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "bert_fast.";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A str argument. The stable ABI's own conversion to std::string leaks a copy per call, so the
// handle is taken as it is and released here.
using String = StringHandle;

inline std::string take(String handle) {
  size_t length = 0;
  const char* data = nullptr;
  torch_string_length(handle, &length);
  torch_string_c_str(handle, &data);
  std::string text(data, length);
  torch_delete_string(handle);
  return text;
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
  require(
      t.scalar_type() == dtype, op, ": ", name, " is ", torch::headeronly::toString(t.scalar_type()),
      ", expected ", torch::headeronly::toString(dtype));
  const auto sizes = t.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape.begin()[i];
  require(
      same, op, ": ", name, " has shape ", shape_text(sizes.data(), sizes.size()), ", expected ",
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

// Stands for "no such output": the registry of ops treats it like None.
inline Tensor absent(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

inline Tensor fresh_like(const Tensor& like) {
  return torch::stable::new_empty(like, like.sizes());
}

}  // namespace bert_fast
