// y = activation(x + bias), elementwise over [T, F], with dbias in the backward.
//
// Bound by memory, just: with 16-bit elements the activation may take about thirty instructions
// before arithmetic costs more than the traffic. A warp covers 32 neighbouring vectors of a row and
// walks down the rows, so a thread keeps its piece of bias and sums its dbias in registers.
#include "partials.cuh"

namespace bert_fast {
namespace {

// ---- pointer kernels ----

constexpr int kTileRows = 8;                  // rows a block covers at once, one per warp
constexpr int kRowsInFlight = 4;              // rows whose loads a thread issues together
constexpr int64_t kBackwardBlocks = 132 * 6;  // a constant: it fixes the order of dbias' sum
constexpr int64_t kMaxGridRows = 65535;

template <typename T, int N>
__device__ __forceinline__ void load_bias(const T* bias, int64_t column, float (&out)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = 0.0f;
  if (bias != nullptr) load_floats(bias + column, out);
}

// Loads rows first, first + step, ... of one vector column; those past the end stay unset.
template <typename T, int N>
__device__ __forceinline__ void load_rows(const T* source, int64_t first, int64_t step,
                                          int64_t rows, int64_t columns, int64_t column,
                                          Pack<T, N> (&packs)[kRowsInFlight]) {
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) {
    const int64_t row = first + i * step;
    if (row < rows) packs[i] = load_pack<T, N>(source + row * columns + column);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kWarpSize* kTileRows, 3)
    bias_gelu_forward_kernel(const T* __restrict__ x,     // [T, F]
                             const T* __restrict__ bias,  // [F] or null
                             T* __restrict__ y,           // [T, F]
                             int64_t rows,
                             int64_t columns,
                             Activation activation) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x) * N;
  if (column >= columns) return;
  float shift[N];
  load_bias(bias, column, shift);
  const int64_t step = static_cast<int64_t>(gridDim.y) * kTileRows;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kTileRows + threadIdx.y; first < rows;
       first += kRowsInFlight * step) {
    Pack<T, N> packs[kRowsInFlight];
    load_rows(x, first, step, rows, columns, column, packs);
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t row = first + i * step;
      if (row < rows) {
        float values[N];
        unpack(packs[i], values);
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] += shift[j];
        activate<T>(activation, values);
        store_floats<T>(y + row * columns + column, values);
      }
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kWarpSize* kTileRows, 2)
    bias_gelu_backward_kernel(const T* __restrict__ dy,         // [T, F]
                              const T* __restrict__ x,          // [T, F]
                              const T* __restrict__ bias,       // [F] or null
                              T* __restrict__ dx,               // [T, F] or null
                              float* __restrict__ partials,     // [gridDim.y, F] or null
                              int64_t rows,
                              int64_t columns,
                              Activation activation) {
  __shared__ float stripes[kTileRows][N][kWarpSize];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x) * N;
  float sum[N] = {};
  if (column < columns) {
    float shift[N];
    load_bias(bias, column, shift);
    const int64_t step = static_cast<int64_t>(gridDim.y) * kTileRows;
    for (int64_t first = static_cast<int64_t>(blockIdx.y) * kTileRows + threadIdx.y; first < rows;
         first += kRowsInFlight * step) {
      Pack<T, N> x_packs[kRowsInFlight], dy_packs[kRowsInFlight];
      load_rows(x, first, step, rows, columns, column, x_packs);
      load_rows(dy, first, step, rows, columns, column, dy_packs);
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const int64_t row = first + i * step;
        if (row < rows) {
          float values[N], grads[N];
          unpack(x_packs[i], values);
          unpack(dy_packs[i], grads);
#pragma unroll
          for (int j = 0; j < N; ++j) values[j] += shift[j];
          activation_slope<T>(activation, values);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            grads[j] *= values[j];
            sum[j] += grads[j];
          }
          if (dx != nullptr) store_floats<T>(dx + row * columns + column, grads);
        }
      }
    }
  }
  if (partials == nullptr) return;
#pragma unroll
  for (int j = 0; j < N; ++j) stripes[threadIdx.y][j][threadIdx.x] = sum[j];
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  float* target = partials + blockIdx.y * columns + column;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    for (int i = 1; i < kTileRows; ++i) sum[j] += stripes[i][j][threadIdx.x];
    target[j] = sum[j];
  }
}

// ---- checking wrapper ----

constexpr const char* kOp = "bert_fast_cuda::bias_gelu";

Activation parse_activation(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  STD_TORCH_CHECK(false, kOp, ": activation must be gelu, gelu_tanh, relu or silu, got ", name);
}

void check_arguments(const Tensor& x, const MaybeTensor& bias) {
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": x must be [T, F]");
  check_float(kOp, "x", x, x, {x.size(0), x.size(1)});
  check_float(kOp, "bias", bias, x, {x.size(1)});
}

// Calls f with the number of elements of an access as a compile-time constant.
template <typename T, typename F>
void dispatch_vector(bool vectors, F&& f) {
  if (vectors) return f(std::integral_constant<int, kVectorBytes / sizeof(T)>{});
  return f(std::integral_constant<int, 1>{});
}

Tensor bias_gelu_forward(Tensor x, MaybeTensor bias, String activation, bool /*save*/) {
  const Activation which = parse_activation(take(activation));
  check_arguments(x, bias);
  const int64_t rows = x.size(0), columns = x.size(1);
  const OnDevice device(x);
  const Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  dispatch_float(kOp, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = vectors_fit<T>(columns, {data<T>(x), data<T>(bias), data<T>(y)});
    dispatch_vector<T>(vectors, [&](auto items) {
      constexpr int N = decltype(items)::value;
      const dim3 grid(ceil_div(columns, kWarpSize * N),
                      std::min(ceil_div(rows, kTileRows * kRowsInFlight), kMaxGridRows));
      bias_gelu_forward_kernel<T, N><<<grid, dim3(kWarpSize, kTileRows), 0, device.stream()>>>(
          data<T>(x), data<T>(bias), output<T>(y), rows, columns, which);
      BERT_FAST_LAUNCH_CHECK();
    });
  });
  return y;
}

// needs: x, bias.
std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor dy, Tensor x, MaybeTensor bias,
                                              String activation, std::vector<bool> needs) {
  const Activation which = parse_activation(take(activation));
  check_arguments(x, bias);
  const int64_t rows = x.size(0), columns = x.size(1);
  check_float(kOp, "dy", dy, x, {rows, columns});
  STD_TORCH_CHECK(needs.size() == 2, kOp, ": needs must have 2 entries, got ", needs.size());
  const OnDevice device(x);
  const bool wants_bias = needs[1] && bias.has_value();
  const Tensor dx = needs[0] ? torch::stable::empty_like(x) : absent(x);
  const Tensor dbias = wants_bias ? make_parameter_grad(*bias, rows) : absent(x);
  if (x.numel() == 0) return {dx, dbias};
  dispatch_float(kOp, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = vectors_fit<T>(
        columns, {data<T>(x), data<T>(bias), data<T>(dy), static_cast<const T*>(output<T>(dx))});
    dispatch_vector<T>(vectors, [&](auto items) {
      constexpr int N = decltype(items)::value;
      const int64_t column_blocks = ceil_div(columns, kWarpSize * N);
      const int64_t parts = std::min(ceil_div(rows, kTileRows * kRowsInFlight),
                                     std::max<int64_t>(kBackwardBlocks / column_blocks, 1));
      const Tensor partials =
          torch::stable::new_empty(x, {wants_bias ? parts : 0, columns}, ScalarType::Float);
      bias_gelu_backward_kernel<T, N>
          <<<dim3(column_blocks, parts), dim3(kWarpSize, kTileRows), 0, device.stream()>>>(
              data<T>(dy), data<T>(x), data<T>(bias), output<T>(dx), output<float>(partials), rows,
              columns, which);
      BERT_FAST_LAUNCH_CHECK();
      if (wants_bias)
        sum_partials<T>(partials, parts, 1, columns, {{output<T>(dbias), nullptr, nullptr}},
                        device.stream());
    });
  });
  return {dx, dbias};
}

}  // namespace
}  // namespace bert_fast

// ---- registration ----

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cuda, m) {
  m.def("bias_gelu_forward(Tensor x, Tensor? bias, str activation, bool save) -> Tensor");
  m.def(
      "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, str activation, bool[] needs) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cuda, CUDA, m) {
  m.impl("bias_gelu_forward", TORCH_BOX(&bert_fast::bias_gelu_forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&bert_fast::bias_gelu_backward));
}
