// LayerNorm over rows, forward and backward, for every op that ends in one.
//
// An op supplies a Source: how a row of z (the LayerNorm's input) is assembled, and what happens
// around it. The statistics are two-pass over the row held in registers. A row belongs to one warp
// where its registers allow that, so that no barrier is needed, and to a block beyond.
//
//   struct Source {
//     static constexpr bool kColumnSum;   // backward also sums what store_grad leaves, by column
//     __device__ void load_row<Row>(row, hidden, thread, float (&z)[kPacks][kItems]);
//     __device__ void finish<N>(row, column, float (&y)[N]);                 // last step on y
//     __device__ void load_grad<Row>(row, hidden, thread, float (&dy)[kPacks][kItems]);
//     __device__ void store_grad<N>(row, hidden, column, float (&dz)[N]); // may scale dz
//   };
#pragma once

#include <type_traits>

#include "../reduce.cuh"

namespace bert_fast {

constexpr int kRowBlock = 128;  // threads of a block of warp-sized rows
constexpr int64_t kMaxHidden = 4096;
// A backward is cut into blocks that together have this many threads at most: about what an H200
// holds at the kernel's registers, and a constant, so that the order in which parameter gradients
// are summed depends on the shape alone.
constexpr int64_t kBackwardThreads = 132 * 384;

// How a row of type T is spread: ITEMS elements an access, PACKS accesses a thread, THREADS a row.
template <typename T, int ITEMS, int PACKS, int THREADS>
struct RowShape {
  using Type = T;
  static constexpr int kItems = ITEMS;
  static constexpr int kPacks = PACKS;
  static constexpr int kThreads = THREADS;
  static constexpr int kBlock = THREADS == kWarpSize ? kRowBlock : THREADS;
  static constexpr int kRowsPerBlock = kBlock / THREADS;
  static constexpr int64_t kMaxParts = kBackwardThreads / kBlock;

  static __device__ __forceinline__ int column(int pack, int thread) {
    return (pack * THREADS + thread) * ITEMS;
  }
};

template <typename Row>
__device__ __forceinline__ void load_row_packs(
    const typename Row::Type* row, int hidden, int thread,
    Pack<typename Row::Type, Row::kItems> (&packs)[Row::kPacks]) {
#pragma unroll
  for (int i = 0; i < Row::kPacks; ++i) {
    const int column = Row::column(i, thread);
    if (column < hidden) packs[i] = load_pack<typename Row::Type, Row::kItems>(row + column);
  }
}

// What unpack gives; bf16 in pairs, where single items take an instruction more for every second.
template <typename T, int N>
__device__ __forceinline__ void widen(const Pack<T, N>& pack, float (&out)[N]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
    uint32_t words[N / 2];
    memcpy(words, &pack, sizeof(words));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
    unpack(pack, out);
  }
}

template <typename T, int N>
__device__ __forceinline__ void add(float (&z)[N], const Pack<T, N>& term) {
  float values[N];
  widen(term, values);
#pragma unroll
  for (int j = 0; j < N; ++j) z[j] += values[j];
}

// Subtracts the mean from a row; gives it, and 1 / sqrt(variance + eps).
template <typename Row>
__device__ __forceinline__ void centre_row(float (&z)[Row::kPacks][Row::kItems], int hidden,
                                           int thread, float eps,
                                           float (&scratch)[Row::kThreads / kWarpSize][1],
                                           float& mean, float& rstd) {
  float sum[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < Row::kPacks; ++i) {
    if (Row::column(i, thread) < hidden) {
#pragma unroll
      for (int j = 0; j < Row::kItems; ++j) sum[0] += z[i][j];
    }
  }
  group_sum<Row::kThreads>(sum, scratch);
  mean = sum[0] / hidden;

  float squares[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < Row::kPacks; ++i) {
    if (Row::column(i, thread) < hidden) {
#pragma unroll
      for (int j = 0; j < Row::kItems; ++j) {
        z[i][j] -= mean;
        squares[0] = fmaf(z[i][j], z[i][j], squares[0]);
      }
    }
  }
  group_sum<Row::kThreads>(squares, scratch);
  rstd = rsqrtf(squares[0] / hidden + eps);
}

template <typename Source, typename Row>
__global__ void __launch_bounds__(Row::kBlock, 1)
    layernorm_forward_kernel(Source source,
                             const typename Row::Type* __restrict__ weight,  // [H]
                             const typename Row::Type* __restrict__ bias,    // [H]
                             typename Row::Type* __restrict__ y,             // [T, H]
                             float* __restrict__ mean_out,                   // [T] or null
                             float* __restrict__ rstd_out,                   // [T] or null
                             int64_t rows,
                             int hidden,
                             float eps) {
  using T = typename Row::Type;
  constexpr int N = Row::kItems;
  __shared__ float scratch[Row::kThreads / kWarpSize][1];
  const int thread = threadIdx.x % Row::kThreads;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * Row::kRowsPerBlock + threadIdx.x / Row::kThreads;
  if (row >= rows) return;  // a whole warp, or the whole block

  float z[Row::kPacks][N];
  source.template load_row<Row>(row, hidden, thread, z);

  float mean, rstd;
  centre_row<Row>(z, hidden, thread, eps, scratch, mean, rstd);

#pragma unroll
  for (int i = 0; i < Row::kPacks; ++i) {
    const int column = Row::column(i, thread);
    if (column < hidden) {
      float scale[N], shift[N], result[N];
      load_floats(weight + column, scale);
      load_floats(bias + column, shift);
#pragma unroll
      for (int j = 0; j < N; ++j) result[j] = fmaf(z[i][j] * rstd, scale[j], shift[j]);
      source.finish(row, column, result);
      store_floats<T>(y + row * hidden + column, result);
    }
  }
  if (thread == 0 && mean_out != nullptr) {
    mean_out[row] = mean;
    rstd_out[row] = rstd;
  }
}

// dz = rstd (g - mean(g) - xhat mean(g xhat)), g = dy weight, xhat = (z - mean) rstd;
// dweight = sum dy xhat, dbias = sum dy. Each block sums its rows into partials[block][k][H].
template <typename Source, typename Row>
__global__ void __launch_bounds__(Row::kBlock, 1)
    layernorm_backward_kernel(Source source,
                              const typename Row::Type* __restrict__ weight,  // [H]
                              const float* __restrict__ mean_in,              // [T]
                              const float* __restrict__ rstd_in,              // [T]
                              float* __restrict__ partials,  // [blocks, 2 or 3, H] or null
                              int64_t rows,
                              int hidden) {
  constexpr int N = Row::kItems;
  constexpr int kSums = Source::kColumnSum ? 3 : 2;
  __shared__ float scratch[Row::kThreads / kWarpSize][2];
  const int thread = threadIdx.x % Row::kThreads;
  const int group = threadIdx.x / Row::kThreads;

  float sums[kSums][Row::kPacks][N] = {};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Row::kRowsPerBlock + group; row < rows;
       row += static_cast<int64_t>(gridDim.x) * Row::kRowsPerBlock) {
    float xhat[Row::kPacks][N], grad[Row::kPacks][N];
    source.template load_row<Row>(row, hidden, thread, xhat);
    source.template load_grad<Row>(row, hidden, thread, grad);
    const float mean = mean_in[row], rstd = rstd_in[row];
    float means[2] = {0.0f, 0.0f};  // of g and of g xhat
#pragma unroll
    for (int i = 0; i < Row::kPacks; ++i) {
      const int column = Row::column(i, thread);
      if (column < hidden) {
        float scale[N];
        load_floats(weight + column, scale);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          xhat[i][j] = (xhat[i][j] - mean) * rstd;
          sums[0][i][j] = fmaf(grad[i][j], xhat[i][j], sums[0][i][j]);
          sums[1][i][j] += grad[i][j];
          grad[i][j] *= scale[j];
          means[0] += grad[i][j];
          means[1] = fmaf(grad[i][j], xhat[i][j], means[1]);
        }
      }
    }
    group_sum<Row::kThreads>(means, scratch);
    means[0] /= hidden;
    means[1] /= hidden;
#pragma unroll
    for (int i = 0; i < Row::kPacks; ++i) {
      const int column = Row::column(i, thread);
      if (column < hidden) {
#pragma unroll
        for (int j = 0; j < N; ++j)
          grad[i][j] = rstd * (grad[i][j] - means[0] - xhat[i][j] * means[1]);
        source.store_grad(row, hidden, column, grad[i]);
        if constexpr (Source::kColumnSum) {
#pragma unroll
          for (int j = 0; j < N; ++j) sums[2][i][j] += grad[i][j];
        }
      }
    }
  }

  if (partials == nullptr) return;
  float* target = partials + static_cast<int64_t>(blockIdx.x) * kSums * hidden;
  if constexpr (Row::kRowsPerBlock == 1) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
      for (int i = 0; i < Row::kPacks; ++i) {
        const int column = Row::column(i, thread);
        if (column < hidden) {
#pragma unroll
          for (int j = 0; j < N; ++j) target[k * hidden + column + j] = sums[k][i][j];
        }
      }
    }
  } else {
    // One warp after the other adds to a shared buffer: a fixed order. Lanes lie side by side in
    // it, which keeps the accesses free of bank conflicts.
    __shared__ float buffer[kSums][Row::kPacks][N][Row::kThreads];
    for (int turn = 0; turn < Row::kRowsPerBlock; ++turn) {
      if (group == turn) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) {
#pragma unroll
          for (int i = 0; i < Row::kPacks; ++i) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
              float& cell = buffer[k][i][j][thread];
              cell = turn == 0 ? sums[k][i][j] : cell + sums[k][i][j];
            }
          }
        }
      }
      __syncthreads();
    }
    for (int k = 0; k < kSums; ++k) {
      for (int column = threadIdx.x; column < hidden; column += Row::kBlock) {
        const int pack = column / N;
        target[k * hidden + column] =
            buffer[k][pack / Row::kThreads][column % N][pack % Row::kThreads];
      }
    }
  }
}

}  // namespace bert_fast
