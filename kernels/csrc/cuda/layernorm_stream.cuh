// LayerNorm's forward of many rows of BERT's widths: a warp a row, the rows to come on their way.
//
// What bounds it is memory, and its latency: a block stays for many rows, keeps the parameters in
// registers, and copies rows ahead to shared memory while it normalises others. A lane reads back
// only what it copied itself, so there are no barriers. The width is a constant: predicates and
// addresses would be a third of the instructions.
//
//   struct Source {                            // beside what layernorm.cuh asks for
//     template <typename Row> struct Stream {  // of a warp
//       Stream(const Source&, lane);
//       void look_ahead(row, step, rows);      // before the 32 rows row, row + step, ...
//       void copy(index, row, address);        // starts the copy of one of these to a stage
//       void load_row(index, row, stage, float (&z)[kPacks][kItems]);  // waits for it
//     };
//   };
#pragma once

#include "layernorm.cuh"
#include "mma.cuh"

namespace bert_fast {

constexpr int kStages = 3;  // rows of a warp in shared memory: one is read, the others come
constexpr int kAhead = kStages - 1;
constexpr int kStreamBlocks = 4;  // of a multiprocessor, as registers and shared memory allow

constexpr int kLineBytes = kWarpSize * kVectorBytes;

template <typename T, int HIDDEN>
using StreamRow =
    RowShape<T, kVectorBytes / sizeof(T), HIDDEN * sizeof(T) / kLineBytes, kWarpSize>;

template <typename Row>
constexpr int kHidden = Row::kPacks * Row::kItems * kWarpSize;

// Warps of a block: what the 48 KB that every block may have are enough for.
template <typename Row>
constexpr int kStreamWarps = Row::kPacks <= 4 ? 4 : 2;

// A stage holds two rows that z is a sum of, in lines of one pack a lane.
template <typename Row>
constexpr int kStageLines = 2 * Row::kPacks;

// Calls copy(shared address, source) for each access of this lane to a row, which becomes the
// stage's first or second.
template <typename Row, int WHICH, typename Copy>
__device__ __forceinline__ void copy_row(const typename Row::Type* row, int lane, uint32_t address,
                                         Copy&& copy) {
  row += Row::column(0, lane);
#pragma unroll
  for (int i = 0; i < Row::kPacks; ++i) {
    const int line = WHICH * Row::kPacks + i;
    copy(address + line * kLineBytes, row + Row::column(i, 0));
  }
}

template <typename Row, int WHICH>
__device__ __forceinline__ Pack<typename Row::Type, Row::kItems> staged_pack(
    const Pack<typename Row::Type, Row::kItems>* stage, int pack) {
  return load_pack<typename Row::Type, Row::kItems>(
      stage[(WHICH * Row::kPacks + pack) * kWarpSize].item);
}

// Hides from the compiler that a pack stays the same: it would convert the parameters ahead of the
// loop, to twice the registers.
template <typename T, int N>
__device__ __forceinline__ void keep_packed(Pack<T, N>& pack) {
  uint4 word;
  memcpy(&word, &pack, sizeof(word));
  asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
  memcpy(&pack, &word, sizeof(word));
}

template <typename Source, typename Row>
__global__ void __launch_bounds__(kStreamWarps<Row>* kWarpSize, kStreamBlocks)
    layernorm_stream_kernel(Source source,
                            const typename Row::Type* __restrict__ weight,  // [H]
                            const typename Row::Type* __restrict__ bias,    // [H]
                            typename Row::Type* __restrict__ y,             // [T, H]
                            float* __restrict__ mean_out,                   // [T] or null
                            float* __restrict__ rstd_out,                   // [T] or null
                            int64_t rows,
                            float eps) {
  using T = typename Row::Type;
  constexpr int N = Row::kItems, H = kHidden<Row>;
  constexpr int kWarps = kStreamWarps<Row>, kLines = kStageLines<Row>;
  constexpr uint32_t kStageBytes = kLines * kLineBytes;
  __shared__ Pack<T, N> lines[kWarps][kStages * kLines][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Pack<T, N>* const own = &lines[warp][0][lane];
  const uint32_t address = shared_address(own);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row >= rows) return;  // a whole warp

  typename Source::template Stream<Row> stream(source, lane);
  stream.look_ahead(row, step, rows);
  Pack<T, N> scales[Row::kPacks], shifts[Row::kPacks];
  load_row_packs<Row>(weight, H, lane, scales);
  load_row_packs<Row>(bias, H, lane, shifts);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (row + i * step < rows) stream.copy(i, row + i * step, address + i * kStageBytes);
    copy_commit();
  }

  int slot = 0;
  for (int index = 0; row < rows; ++index, row += step) {
    if (index == kWarpSize - kAhead) {
      stream.look_ahead(row, step, rows);
      index = 0;
    }
    const int64_t next = row + kAhead * step;
    const int vacant = slot == 0 ? kStages - 1 : slot - 1;
    if (next < rows) stream.copy(index + kAhead, next, address + vacant * kStageBytes);
    copy_commit();  // an empty group counts too

    float z[Row::kPacks][N], none[1][1], mean, rstd;
    stream.load_row(index, row, own + slot * kLines * kWarpSize, z);
    slot = slot == kStages - 1 ? 0 : slot + 1;
    centre_row<Row>(z, H, lane, eps, none, mean, rstd);
    T* const target = y + row * H + Row::column(0, lane);
#pragma unroll
    for (int i = 0; i < Row::kPacks; ++i) {
      float scale[N], shift[N], result[N];
      keep_packed(scales[i]);
      keep_packed(shifts[i]);
      widen(scales[i], scale);
      widen(shifts[i], shift);
#pragma unroll
      for (int j = 0; j < N; ++j) result[j] = fmaf(z[i][j] * rstd, scale[j], shift[j]);
      source.finish(row, Row::column(i, lane), result);
      store_floats<T>(target + Row::column(i, 0), result);
    }
    if (lane == 0 && mean_out != nullptr) {
      mean_out[row] = mean;
      rstd_out[row] = rstd;
    }
  }
}

}  // namespace bert_fast
