// out = softmax(scale Q K^T) V within each packed sequence, and the row-wise log-sum-exp.
//
// The scheme of FlashAttention-2 (Dao, arXiv 2307.08691): a block owns a tile of queries of one
// (sequence, head) and walks over the keys with a running maximum and sum, so that the S x S matrix
// never exists. Products are mma.sync m16n8k16 with fp32 accumulation; key and value tiles arrive
// by cp.async into two buffers in turn, one barrier a tile. A warp holds up to 32 query rows, so
// that each fragment of K and V read from shared memory is used twice.
//
// Limits: bf16 and fp16; head_dim 32, 64 or 128; no additive bias; scale > 0 (the maximum is taken
// before scaling). Forward only.
#pragma once

#include "launch.cuh"
#include "mma.cuh"

namespace bert_fast {

constexpr int kKeyTile = 64;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.69314718055994531f;

// The tile of a block: WARPS warps of M_TILES * 16 query rows each. Dropout is decided at compile
// time: the generator would take registers from the tensor cores' operands.
template <typename T, int D, int WARPS, int M_TILES, bool DROP>
struct AttentionShape {
  using Type = T;
  static constexpr bool kDrop = DROP;
  static constexpr int kWidth = D;
  static constexpr int kThreads = WARPS * kWarpSize;
  // Blocks that a multiprocessor's registers must hold: eight warps, up to 255 registers each.
  static constexpr int kMinBlocks = 8 / WARPS;
  static constexpr int kMTiles = M_TILES;
  static constexpr int kWarpRows = M_TILES * 16;
  static constexpr int kQueryTile = WARPS * kWarpRows;
  static constexpr int kChunks = D / 8;       // of 16 bytes in a row
  static constexpr int kRowBytes = D * 2;
  static constexpr int kKeyBytes = kKeyTile * kRowBytes;
  static constexpr int kQueryBytes = kQueryTile * kRowBytes;
  // Queries, then two buffers of keys and values.
  static constexpr int kSharedBytes = kQueryBytes + 4 * kKeyBytes;
  // At D = 128 the query fragments would not fit into registers beside the accumulators.
  static constexpr bool kQueriesInRegisters = D <= 64;

  // Byte offset of a 16-byte chunk of a row in a tile. Chunks are permuted within a row, so that
  // eight rows of one chunk column (what ldmatrix reads at once) fall into different banks.
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    const int swizzle = kChunks >= 8 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + ((chunk ^ swizzle) << 4);
  }
};

struct AttentionArguments {
  const void* qkv;            // [T, 3, N, D]
  const int32_t* cu_seqlens;  // [B + 1]
  const int32_t* key_start;   // [B] or null
  void* out;                  // [T, N, D]
  float* lse;                 // [N, T] or null
  int64_t tokens;
  int heads;
  int tiles;                  // of queries per sequence
  float scale;
  Dropout dropout;
};

// Starts copying `rows` rows of a [*, stride] matrix into a tile of ROWS, the rest as zeros.
template <typename Shape, int ROWS>
__device__ __forceinline__ void copy_tile(uint32_t target, const typename Shape::Type* source,
                                          int64_t stride, int rows) {
  static_assert(ROWS * Shape::kChunks % Shape::kThreads == 0, "whole rounds of copies");
#pragma unroll
  for (int i = 0; i < ROWS * Shape::kChunks / Shape::kThreads; ++i) {
    const int index = i * Shape::kThreads + threadIdx.x;
    const int row = index / Shape::kChunks, chunk = index % Shape::kChunks;
    const bool valid = row < rows;
    copy_async(target + Shape::offset(row, chunk), source + (valid ? row : 0) * stride + chunk * 8,
               valid);
  }
}

// Fragment A of 16 query rows and 16 columns, from shared memory.
template <typename Shape>
__device__ __forceinline__ void load_queries(uint32_t (&a)[4], uint32_t tile, int row, int k_step) {
  const int lane = threadIdx.x % kWarpSize;
  load_matrices(a, tile + Shape::offset(row + lane % 16, k_step * 2 + lane / 16));
}

template <typename Shape>
__device__ __forceinline__ void zero_rows(const AttentionArguments& args, int64_t first, int rows,
                                          int head) {
  using T = typename Shape::Type;
  const int64_t stride = static_cast<int64_t>(args.heads) * Shape::kWidth;
  for (int i = threadIdx.x; i < rows * Shape::kChunks; i += Shape::kThreads) {
    T* target = static_cast<T*>(args.out) + (first + i / Shape::kChunks) * stride +
                head * Shape::kWidth + i % Shape::kChunks * 8;
    *reinterpret_cast<uint4*>(target) = make_uint4(0u, 0u, 0u, 0u);
  }
  if (args.lse != nullptr) {
    for (int i = threadIdx.x; i < rows; i += Shape::kThreads)
      args.lse[head * args.tokens + first + i] = -INFINITY;
  }
}

// Drops probabilities of one 16 x 8 tile; c0, c1 lie in query row `row`, c2, c3 in row + 8.
__device__ __forceinline__ void drop_probabilities(const Dropout& dropout, float (&c)[4],
                                                   int64_t row, int heads, int head,
                                                   uint32_t column) {
  const uint2 key = dropout.key();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t c1 = static_cast<uint32_t>((row + half * 8) * heads + head);
    const uint4 draw = philox(key, column >> 2, c1);
    // The pair shares a draw unless the first key lies at an odd place in its sequence.
    const uint4 next = (column & 3) == 3 ? philox(key, (column + 1) >> 2, c1) : draw;
    if (pick(draw, column & 3) < dropout.threshold) c[half * 2] = 0.0f;
    if (pick(next, (column + 1) & 3) < dropout.threshold) c[half * 2 + 1] = 0.0f;
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    attention_forward_kernel(AttentionArguments args) {
  using T = typename Shape::Type;
  constexpr int D = Shape::kWidth, M = Shape::kMTiles;
  constexpr int kKSteps = D / 16;           // of Q K^T, over columns
  constexpr int kKeyTiles = kKeyTile / 8;   // columns of scores, 8 each
  constexpr int kOutTiles = D / 8;          // columns of the output, 8 each
  extern __shared__ __align__(128) unsigned char shared[];

  const int sequence = blockIdx.x / args.tiles, head = blockIdx.y;
  const int begin = args.cu_seqlens[sequence], end = args.cu_seqlens[sequence + 1];
  const int64_t query = begin + static_cast<int64_t>(blockIdx.x % args.tiles) * Shape::kQueryTile;
  if (query >= end) return;
  const int queries = static_cast<int>(min(end - query, static_cast<int64_t>(Shape::kQueryTile)));
  const int first_key = args.key_start == nullptr ? begin : max(args.key_start[sequence], begin);
  const int keys = end - first_key;
  if (keys <= 0) return zero_rows<Shape>(args, query, queries, head);

  const int64_t stride = 3LL * args.heads * D;
  const T* q = static_cast<const T*>(args.qkv) + query * stride + head * D;
  const T* k = static_cast<const T*>(args.qkv) + first_key * stride + (args.heads + head) * D;
  const T* v = k + static_cast<int64_t>(args.heads) * D;
  const uint32_t q_tile = shared_address(shared);
  const uint32_t k_tiles = q_tile + Shape::kQueryBytes;
  const uint32_t v_tiles = k_tiles + 2 * Shape::kKeyBytes;

  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int warp_row = threadIdx.x / kWarpSize * Shape::kWarpRows;

  copy_tile<Shape, Shape::kQueryTile>(q_tile, q, stride, queries);
  copy_tile<Shape, kKeyTile>(k_tiles, k, stride, keys);
  copy_tile<Shape, kKeyTile>(v_tiles, v, stride, keys);
  copy_commit();

  const int tiles = (keys + kKeyTile - 1) / kKeyTile;
  // Waits for a tile of keys and values, of which `left` are left, and starts copying the next.
  const auto advance = [&](int tile, int left) {
    copy_wait_all();
    __syncthreads();  // this tile has arrived, and everyone is done with the other buffer
    if (tile + 1 < tiles) {
      const int64_t o_next = (tile + 1LL) * kKeyTile * stride;
      const uint32_t o_buffer = (tile + 1) % 2 * Shape::kKeyBytes;
      copy_tile<Shape, kKeyTile>(k_tiles + o_buffer, k + o_next, stride, left - kKeyTile);
      copy_tile<Shape, kKeyTile>(v_tiles + o_buffer, v + o_next, stride, left - kKeyTile);
      copy_commit();
    }
  };
  // A warp whose rows are all past the end only copies, and leaves the tensor cores to others: in a
  // loop of its own, and by one lane's word, so that the compiler knows that no warp diverges in the
  // other. What it does in case one might costs that a quarter of its speed.
  if (__shfl_sync(kFullWarp, warp_row, 0) >= queries) {
    for (int tile = 0; tile < tiles; ++tile) advance(tile, keys - tile * kKeyTile);
    return;
  }

  uint32_t q_fragments[Shape::kQueriesInRegisters ? kKSteps : 1][M][4];
  float out[M][kOutTiles][4] = {};
  float row_max[M][2], row_sum[M][2];  // of rows g and g + 8; sums over this lane's columns only
#pragma unroll
  for (int m = 0; m < M; ++m) {
    row_max[m][0] = row_max[m][1] = -INFINITY;
    row_sum[m][0] = row_sum[m][1] = 0.0f;
  }
  const float scale2 = args.scale * kLog2E;  // exponentials are powers of two

  for (int tile = 0; tile < tiles; ++tile) {
    const uint32_t k_tile = k_tiles + tile % 2 * Shape::kKeyBytes;
    const uint32_t v_tile = v_tiles + tile % 2 * Shape::kKeyBytes;
    const int left = keys - tile * kKeyTile;
    advance(tile, left);
    if constexpr (Shape::kQueriesInRegisters) {
      if (tile == 0) {
#pragma unroll
        for (int step = 0; step < kKSteps; ++step) {
#pragma unroll
          for (int m = 0; m < M; ++m)
            load_queries<Shape>(q_fragments[step][m], q_tile, warp_row + m * 16, step);
        }
      }
    }

    // Scores: B is K^T, whose column is a key; matrices in the order (keys 0-7, columns 0-7),
    // (keys 0-7, columns 8-15), (keys 8-15, columns 0-7), (keys 8-15, columns 8-15).
    float scores[M][kKeyTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kKSteps; ++step) {
      const int i_fragment = Shape::kQueriesInRegisters ? step : 0;
      if constexpr (!Shape::kQueriesInRegisters) {
#pragma unroll
        for (int m = 0; m < M; ++m)
          load_queries<Shape>(q_fragments[0][m], q_tile, warp_row + m * 16, step);
      }
#pragma unroll
      for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
        uint32_t b[4];
        load_matrices(b, k_tile + Shape::offset(pair * 16 + lane % 8 + lane / 16 * 8,
                                                step * 2 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma<T>(scores[m][pair * 2], q_fragments[i_fragment][m], b[0], b[1]);
          mma<T>(scores[m][pair * 2 + 1], q_fragments[i_fragment][m], b[2], b[3]);
        }
      }
    }
    if (left < kKeyTile) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (n * 8 + t * 2 + c % 2 >= left) {
#pragma unroll
            for (int m = 0; m < M; ++m) scores[m][n][c] = -INFINITY;
          }
        }
      }
    }

    // Softmax: rescale what there is to the new maximum, which is finite, as every tile has a key.
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = row_max[m][half];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
          top = fmaxf(top, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
        const float rescale = exp2_approximate((row_max[m][half] - top) * scale2);
        const float shift = top * scale2;
        row_max[m][half] = top;
        row_sum[m][half] *= rescale;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int c = half * 2; c < half * 2 + 2; ++c) {
            scores[m][n][c] = exp2_approximate(fmaf(scores[m][n][c], scale2, -shift));
            row_sum[m][half] += scores[m][n][c];
          }
        }
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          out[m][n][half * 2] *= rescale;
          out[m][n][half * 2 + 1] *= rescale;
        }
      }
      if constexpr (Shape::kDrop) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
          drop_probabilities(args.dropout, scores[m][n], query + warp_row + m * 16 + g, args.heads,
                             head, first_key - begin + tile * kKeyTile + n * 8 + t * 2);
      }
    }

    // Output: A is the probabilities, B is V; transposed matrices in the order (keys 0-7, columns
    // 0-7), (keys 8-15, columns 0-7), (keys 0-7, columns 8-15), (keys 8-15, columns 8-15).
#pragma unroll
    for (int step = 0; step < kKeyTile / 16; ++step) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &scores[m][step * 2 + i / 2][i % 2 * 2];
          a[m][i] = pack_pair<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int pair = 0; pair < kOutTiles / 2; ++pair) {
        uint32_t b[4];
        load_matrices_transposed(
            b, v_tile + Shape::offset(step * 16 + lane % 16, pair * 2 + lane / 16));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma<T>(out[m][pair * 2], a[m], b[0], b[1]);
          mma<T>(out[m][pair * 2 + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // The warp's own query rows are no longer needed: their place takes the output, which then leaves
  // in 16-byte stores. Lanes write where ldmatrix read for other lanes, which only a barrier orders.
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[m][half];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const int row = warp_row + m * 16 + half * 8 + g;
      if (args.lse != nullptr && t == 0 && row < queries)
        args.lse[head * args.tokens + query + row] =
            row_max[m][half] * args.scale + kLn2 * log2f(sum);
      const float factor = args.dropout.scale / sum;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        *reinterpret_cast<uint32_t*>(shared + Shape::offset(row, n) + t * 4) =
            pack_pair<T>(out[m][n][half * 2] * factor, out[m][n][half * 2 + 1] * factor);
      }
    }
  }
  __syncwarp();
  const int64_t out_stride = static_cast<int64_t>(args.heads) * D;
#pragma unroll
  for (int i = 0; i < Shape::kWarpRows * Shape::kChunks / kWarpSize; ++i) {
    const int index = i * kWarpSize + lane;
    const int row = warp_row + index / Shape::kChunks, chunk = index % Shape::kChunks;
    if (row < queries) {
      T* target = static_cast<T*>(args.out) + (query + row) * out_stride + head * D + chunk * 8;
      *reinterpret_cast<uint4*>(target) =
          *reinterpret_cast<const uint4*>(shared + Shape::offset(row, chunk));
    }
  }
}

}  // namespace bert_fast
