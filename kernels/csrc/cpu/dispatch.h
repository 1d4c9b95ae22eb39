// Between the checking wrappers and the kernel tables: which table, which dtype, which mask.
#pragma once

#include "cpu/tensors.h"
#include "cpu/kernels.h"

namespace bert_fast::cpu {

// The kernels for instruction set `isa`: 0 generic, 1 AVX2, 2 the best AVX-512 of this machine; and
// by name, so that one machine can test them all, 3 AVX-512 alone, 4 with VNNI, 5 with BF16 as well,
// 6 with AMX as well. Refuses what this machine cannot run.
const Kernels& kernels_for(const char* op, int64_t isa);

Dtype float_dtype(const char* op, const char* name, const Tensor& t);
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }  // bytes
Activation activation_of(const char* op, const std::string& name);

// Reads the seed; `on` only where p > 0.
Dropout dropout_of(const char* op, double p, const OptionalTensor& seed);

// Checks int32 sequence bounds: 0 = first <= ... <= last = rows.
const int32_t* sequence_bounds(const char* op, const Tensor& cu_seqlens, int64_t rows);

// Checks a [rows] tensor of int32 or int64 indices, each in [0, limit).
Indices indices_below(
    const char* op, const char* name, const Tensor& t, int64_t rows, int64_t limit);

// The checked arguments of a forward without dropout; `qkv` and `out` are left to the caller.
Attention attention_arguments(
    const char* op, Dtype dtype, int64_t tokens, int64_t heads, int64_t width,
    const Tensor& cu_seqlens, const OptionalTensor& key_start, const OptionalTensor& bias,
    double scale);

// Whether a packed weight is for 8-bit products.
bool has_int8_values(const Tensor& packed);

// The address of a packed weight [cols, depth] that x is multiplied by.
const void* checked_panels(
    const char* op, const char* name, const Tensor& packed, const Tensor& x, bool int8,
    int64_t cols, int64_t depth, const Kernels& kernels, int64_t apart = 0);

// Rows whose inner states are in memory at once, where the two products of a feed-forward network
// are not one kernel: few enough that these states stay in the threads' caches.
int64_t rows_at_once();

// Both products, as one kernel where there are rows enough for it. `states` has room for the inner
// states of min(a.rows, rows_at_once()) rows.
void feed_forward(const Kernels& kernels, const FeedForward& a, void* states);

// Scratch for column sums over `rows` rows: one set of sums per chunk.
Tensor chunk_sums(int64_t rows, int64_t floats_per_chunk);

}  // namespace bert_fast::cpu
