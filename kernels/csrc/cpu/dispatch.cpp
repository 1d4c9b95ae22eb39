#include "cpu/dispatch.h"

#include <cmath>
#include <cstdlib>
#include <new>

namespace bert_fast::cpu {

void run_parallel(int64_t n, int64_t grain, void (*call)(int64_t, int64_t, void*), void* context) {
  // One thread's worth of work (every call of a small model) skips the round trip through torch.
  if (n <= grain) {
    if (n > 0) call(0, n, context);
    return;
  }
  require(torch_parallel_for(0, n, grain, call, context) == 0, "cpu: a parallel section failed");
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

// Aligned by hand: what an aligned allocation of glibc's leaves when it is freed is too small for
// the next one of its size, so that every call would get new pages.
float* allocate_floats(int64_t count) {
  constexpr uintptr_t kAlignment = 64;
  void* memory = std::malloc(count * sizeof(float) + kAlignment + sizeof(void*));
  if (memory == nullptr) throw std::bad_alloc();
  const auto least = reinterpret_cast<uintptr_t>(memory) + sizeof(void*);
  auto* aligned = reinterpret_cast<float*>((least + kAlignment - 1) / kAlignment * kAlignment);
  reinterpret_cast<void**>(aligned)[-1] = memory;
  return aligned;
}

void free_floats(float* memory) { std::free(reinterpret_cast<void**>(memory)[-1]); }

// __builtin_cpu_supports also asks the operating system whether it saves the registers.
static int64_t best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

const Kernels& kernels_for(const char* op, int64_t isa) {
  static const int64_t best = best_isa();
  require(
      0 <= isa && (isa <= best || (isa == 3 && best == 2)), op, ": isa is ", isa,
      ", this machine runs 0 to ", best, " (0 generic, 1 AVX2, 2 AVX-512)");
#if defined(__x86_64__)
  static const bool has_bf16 =
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (isa == 2 && has_bf16) return kernels_avx512_bf16;
  if (isa >= 2) return kernels_avx512;
  if (isa == 1) return kernels_avx2;
#endif
  return kernels_generic;
}

Dtype float_dtype(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  require(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
      ": ", name, " is ", torch::headeronly::toString(dtype), ", expected Float, BFloat16 or Half");
  return dtype == ScalarType::Float      ? Dtype::f32
      : dtype == ScalarType::BFloat16 ? Dtype::bf16
                                      : Dtype::f16;
}

Activation activation_of(const char* op, const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  require(
      name == "silu", op, ": activation is '", name,
      "', expected gelu, gelu_tanh, relu, silu or none");
  return Activation::silu;
}

Dropout dropout_of(const char* op, double p, const OptionalTensor& seed) {
  require(p >= 0.0 && p < 1.0, op, ": p is ", p, ", expected 0 <= p < 1");
  if (p == 0.0) return {};
  require(seed.has_value(), op, ": p is ", p, " but seed is None");
  const uint64_t key = *static_cast<const uint64_t*>(
      checked(op, "seed", *seed, ScalarType::Long, {1}));
  return {
      true,
      {uint32_t(key), uint32_t(key >> 32)},
      uint32_t(std::floor(p * 4294967296.0)),
      float(1.0 / (1.0 - p))};
}

const int32_t* sequence_bounds(const char* op, const Tensor& cu_seqlens, int64_t rows) {
  require_rank(op, "cu_seqlens", cu_seqlens, 1);
  const int64_t count = cu_seqlens.size(0);
  require(count > 0, op, ": cu_seqlens is empty, expected B + 1 values");
  const auto* bounds = static_cast<const int32_t*>(
      checked(op, "cu_seqlens", cu_seqlens, ScalarType::Int, {count}));
  require(bounds[0] == 0, op, ": cu_seqlens[0] is ", bounds[0], ", expected 0");
  for (int64_t i = 1; i < count; ++i)
    require(
        bounds[i] >= bounds[i - 1], op, ": cu_seqlens[", i, "] is ", bounds[i],
        ", less than the value before it, ", bounds[i - 1]);
  require(
      bounds[count - 1] == rows, op, ": cu_seqlens ends with ", bounds[count - 1], ", expected ",
      rows, ", the number of rows");
  return bounds;
}

template <class T>
static void check_range(
    const char* op, const char* name, const T* indices, int64_t rows, int64_t limit) {
  // First without branches, at the speed of memory; the culprit is looked for only if there is one.
  bool bad = false;
  for (int64_t i = 0; i < rows; ++i) bad |= uint64_t(int64_t(indices[i])) >= uint64_t(limit);
  for (int64_t i = 0; bad && i < rows; ++i)
    require(
        0 <= indices[i] && indices[i] < limit, op, ": ", name, "[", i, "] is ", indices[i],
        ", expected 0 <= value < ", limit);
}

Indices indices_below(
    const char* op, const char* name, const Tensor& t, int64_t rows, int64_t limit) {
  const bool is_64 = t.scalar_type() != ScalarType::Int;
  const void* data = checked(op, name, t, is_64 ? ScalarType::Long : ScalarType::Int, {rows});
  if (is_64)
    check_range(op, name, static_cast<const int64_t*>(data), rows, limit);
  else
    check_range(op, name, static_cast<const int32_t*>(data), rows, limit);
  return {data, is_64};
}

Tensor chunk_sums(int64_t rows, int64_t floats_per_chunk) {
  const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  return uninitialised({chunks * floats_per_chunk}, ScalarType::Float);
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) { m.def("best_isa() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("best_isa", TORCH_BOX(&bert_fast::cpu::best_isa));
}
