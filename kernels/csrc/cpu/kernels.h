// What the checking wrappers hand to the kernels: plain structs of pointers and sizes, and a table
// of function pointers per instruction set. Only declarations and aggregates live here: an inline
// function shared between files compiled for different instruction sets could run on the wrong CPU.
#pragma once

#include <cstdint>

namespace bert_fast::cpu {

enum class Dtype { f32, bf16, f16 };
enum class Activation { none, gelu, gelu_tanh, relu, silu };

// A 1-D tensor of int32 or int64 indices.
struct Indices {
  const void* data;
  bool is_64;
};

// keep(row, col) = philox(row, col) >= threshold; kept values are multiplied by `scale`.
struct Dropout {
  bool on;
  uint32_t key[2];
  uint32_t threshold;
  float scale;
};

// Row gradients of LayerNorm and bias_gelu sum over tokens. Each chunk of this many rows makes one
// fp32 partial sum, and the partials are added in order: the result does not depend on the number
// of threads, and no sum is long enough to lose digits.
constexpr int64_t kChunkRows = 32;

struct LayerNorm {
  Dtype dtype;
  int64_t rows, cols;
  float eps;
  Dropout dropout;
  const void* weight;  // [cols]
  const void* bias;    // [cols]
  void* y;             // [rows, cols]
  float* mean;         // [rows], or null in a forward that saves nothing
  float* rstd;         // [rows]
  // backward
  const void* dy;   // [rows, cols]
  void* dz;         // [rows, cols] or null; gradient of what is normalised
  float* partials;  // [chunks, 3, cols]
  void* dweight;    // [cols] or null
  void* dbias;      // [cols] or null
};

struct EmbedLayerNorm : LayerNorm {
  Indices input_ids, token_type_ids, position_ids;  // [rows]; token_type_ids.data may be null
  const void* word;                                 // [V, cols]
  const void* position;                             // [P, cols]
  const void* token_type;                           // [Y, cols] or null
};

struct AddLayerNorm : LayerNorm {
  const void* x;            // [rows, cols]
  const void* linear_bias;  // [cols] or null
  const void* residual;     // [rows, cols] or null
  void* dx;                 // [rows, cols] or null; equals dz without dropout
  void* dlinear_bias;       // [cols] or null
};

struct BiasGelu {
  Dtype dtype;
  Activation activation;
  int64_t rows, cols;
  const void* x;     // [rows, cols]
  const void* bias;  // [cols] or null
  void* y;           // [rows, cols]
  const void* dy;    // [rows, cols]
  void* dx;          // [rows, cols] or null
  float* partials;   // [chunks, cols]
  void* dbias;       // [cols] or null
};

// The weight is packed for one instruction set: panels of kPanel columns, [cols / kPanel, depth,
// kPanel], zeros beyond the last column; bf16 that is multiplied in pairs as product_pairs.inc.h, 8
// bits as product_int8.inc.h has it.
struct PackWeight {
  Dtype dtype;
  bool int8;
  int64_t cols, depth;
  const void* weight;  // [cols, depth]
  void* packed;        // packed_bytes
};

struct Linear {
  Dtype dtype;
  bool int8;
  Activation activation;
  int64_t rows, depth, cols;
  const void* x;       // [rows, depth]
  const void* packed;  // of PackWeight
  const void* bias;    // [cols] or null
  void* y;             // [cols / group, rows, group]
  int64_t group = 0;   // 0: all columns
  // Of products of fp32 in 8 bits without an activation: x or y is bf16, the rest is not.
  bool narrow_x = false, narrow_y = false;
};

struct FeedForward {
  Dtype dtype;
  bool int8;
  Activation activation;
  int64_t rows, hidden, inner, cols;
  const void* x;        // [rows, hidden]
  const void* up;       // of PackWeight, [inner, hidden]
  const void* up_bias;  // [inner] or null
  const void* down;     // of PackWeight, [cols, inner]
  void* y;              // [rows, cols]
};

struct Pool {
  Dtype dtype;
  bool mean, normalize;
  int64_t batch, rows, cols;
  const int32_t* cu_seqlens;  // [batch + 1]
  const void* x;              // [rows, cols]
  void* y;                    // [batch, cols]
  const void* dy;             // [batch, cols]
  void* dx;                   // [rows, cols]
};

struct Attention {
  Dtype dtype, bias_dtype;
  int64_t tokens, heads, width, batch, longest;
  const int32_t* cu_seqlens;        // [batch + 1]
  const int32_t* key_start;         // [batch] or null
  const void* bias;                 // [1 or batch, 1 or heads, S, S] or null
  int64_t bias_batch, bias_head;    // element strides, 0 where broadcast
  int64_t bias_row;                 // S
  float scale;
  Dropout dropout;
  // Elements of qkv, and of dqkv, from one token, head and part (Q, K, V) to the next.
  int64_t token_step, head_step, part_step;
  const void* qkv;   // [tokens, 3, heads, width] in any order
  // Where queries are asked for of some tokens only, these, head by head: [heads, asked, width] in
  // the place of Q. Without bias and dropout, which count tokens.
  const int32_t* asked;  // [batch + 1], where each sequence's begin, and their number; or null
  void* out;         // [tokens, heads, width]
  float* lse;        // [heads, tokens], or null in a forward that saves nothing
  const void* dout;  // [tokens, heads, width]
  void* dqkv;        // as qkv
};

struct Kernels {
  void (*embed_layernorm_forward)(const EmbedLayerNorm&);
  void (*embed_layernorm_backward)(const EmbedLayerNorm&);
  void (*add_layernorm_forward)(const AddLayerNorm&);
  void (*add_layernorm_backward)(const AddLayerNorm&);
  void (*bias_gelu_forward)(const BiasGelu&);
  void (*bias_gelu_backward)(const BiasGelu&);
  bool pairs;     // whether products of bf16 are faster than those of fp32
  int64_t panel;  // columns of a weight that are packed together
  int64_t (*packed_bytes)(const PackWeight&);
  void (*pack_weight)(const PackWeight&);
  void (*linear_forward)(const Linear&);
  bool (*feed_forward_fits)(const FeedForward&);
  void (*feed_forward_forward)(const FeedForward&);
  void (*pool_forward)(const Pool&);
  void (*pool_backward)(const Pool&);
  void (*attention_forward)(const Attention&);
  void (*attention_backward)(const Attention&);
};

extern const Kernels kernels_generic, kernels_avx2, kernels_avx512, kernels_avx512_vnni;
extern const Kernels kernels_avx512_bf16, kernels_amx;

// Runs call(begin, end, context) over [0, n) on torch's threads, at least `grain` items each.
void run_parallel(int64_t n, int64_t grain, void (*call)(int64_t, int64_t, void*), void* context);
int64_t thread_count();

// 64-byte aligned scratch memory of `count` floats; throws std::bad_alloc.
float* allocate_floats(int64_t count);
void free_floats(float* memory);

}  // namespace bert_fast::cpu
