// Host side of the CUDA kernels: checks, dtype dispatch, stream, allocation.
//
// Only libtorch's stable ABI is used, so one build serves every torch from 2.11 on.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // the stable headers declare their CUDA functions only under it
#endif

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "../reduce.cuh"
#include "../string_argument.h"

namespace bert_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Follow every <<<>>> with this: it turns a refused launch into an exception.
#define BERT_FAST_LAUNCH_CHECK() STD_CUDA_CHECK(cudaGetLastError())

// Makes a tensor's device current and holds its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* data(const MaybeTensor& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}
// Null for the empty tensors that stand for an output nobody asked for.
template <typename T>
T* output(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor absent(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;  // null counts as aligned
}

// Whether rows of `columns` elements can be read 16 bytes at a time from all these pointers.
template <typename T>
bool vectors_fit(int64_t columns, std::initializer_list<const void*> pointers) {
  constexpr int64_t kItems = kVectorBytes / sizeof(T);
  return columns % kItems == 0 && std::all_of(pointers.begin(), pointers.end(), aligned);
}

inline void check_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                         std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), op,
                  ": ", name, " must be on the CUDA device of the first argument");
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), op, ": ", name, " has ",
                  tensor.dim(), " dimensions, expected ", shape.size());
  int64_t axis = 0;
  for (const int64_t extent : shape) {
    STD_TORCH_CHECK(tensor.size(axis) == extent, op, ": ", name, " has size ", tensor.size(axis),
                    " in dimension ", axis, ", expected ", extent);
    ++axis;
  }
}

// The same for a floating-point argument, which must share the dtype of `like`.
inline void check_float(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                        std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name,
                  " must have the dtype of the other floating-point arguments");
  check_tensor(op, name, tensor, like, shape);
}

inline void check_float(const char* op, const char* name, const MaybeTensor& tensor,
                        const Tensor& like, std::initializer_list<int64_t> shape) {
  if (tensor.has_value()) check_float(op, name, *tensor, like, shape);
}

inline void check_stats(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                        int64_t rows) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
  check_tensor(op, name, tensor, like, {rows});
}

inline Dropout make_dropout(const char* op, double p, const MaybeTensor& seed, const Tensor& like) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, op, ": p must be in [0, 1], got ", p);
  if (p == 0.0) return Dropout{nullptr, 0u, 1.0f};
  STD_TORCH_CHECK(seed.has_value(), op, ": p > 0 needs a seed");
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long, op, ": seed must be int64");
  check_tensor(op, "seed", *seed, like, {1});
  const double threshold = std::min(std::floor(p * 4294967296.0), 4294967295.0);
  const float scale = p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p));
  return Dropout{data<int64_t>(*seed), static_cast<uint32_t>(threshold), scale};
}

// Calls f with a value of the element type that stands for the dtype.
template <typename F>
void dispatch_float(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, float16 or bfloat16");
  }
}

// Multiprocessors of the current device.
inline int64_t processors() {
  int device = 0, count = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace bert_fast
