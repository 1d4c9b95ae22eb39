// The second half of a parameter gradient: partial sums of a fixed partition, added in order.
#pragma once

#include "launch.cuh"

namespace bert_fast {

constexpr int kColumnTile = 32;
constexpr int kColumnStripes = 32;

template <typename T>
struct ParameterGrads {
  T* target[3];  // [H] each; null where not wanted
};

// out[k][column] = sum over parts of partials[part][k][column], parts striped over threadIdx.y.
template <typename T>
__global__ void __launch_bounds__(kColumnTile* kColumnStripes)
    sum_partials_kernel(const float* __restrict__ partials,  // [parts, gridDim.y, H]
                        ParameterGrads<T> grads,
                        int64_t parts,
                        int64_t hidden) {
  __shared__ float stripes[kColumnStripes][kColumnTile];
  T* target = blockIdx.y == 0   ? grads.target[0]
              : blockIdx.y == 1 ? grads.target[1]
                                : grads.target[2];  // an index would copy the array to the stack
  if (target == nullptr) return;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnTile + threadIdx.x;
  float sum = 0.0f;
  if (column < hidden) {
    const float* source = partials + blockIdx.y * hidden + column;
#pragma unroll 8
    for (int64_t part = threadIdx.y; part < parts; part += kColumnStripes)
      sum += source[part * gridDim.y * hidden];
  }
  stripes[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= hidden) return;
#pragma unroll
  for (int i = 1; i < kColumnStripes; ++i) sum += stripes[i][threadIdx.x];
  target[column] = from_float<T>(sum);
}

// An uninitialised gradient of a parameter [H], or zeros where there are no rows to sum.
inline Tensor make_parameter_grad(const Tensor& parameter, int64_t rows) {
  return rows == 0 ? torch::stable::new_zeros(parameter, {parameter.size(0)})
                   : torch::stable::empty_like(parameter);
}

template <typename T>
void sum_partials(const Tensor& partials, int64_t parts, int sums, int64_t hidden,
                  const ParameterGrads<T>& grads, cudaStream_t stream) {
  const dim3 grid(ceil_div(hidden, kColumnTile), sums);
  sum_partials_kernel<T><<<grid, dim3(kColumnTile, kColumnStripes), 0, stream>>>(
      data<float>(partials), grads, parts, hidden);
  BERT_FAST_LAUNCH_CHECK();
}

}  // namespace bert_fast
