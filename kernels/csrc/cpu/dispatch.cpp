#include "cpu/dispatch.h"

#include <cmath>
#include <cstdlib>
#include <new>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bert_fast::cpu {

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

#if defined(__x86_64__)
// The registers of one leaf: older compilers' __builtin_cpu_supports has no name for all of it.
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit Cpuid(unsigned leaf) { __get_cpuid_count(leaf, 0, &a, &b, &c, &d); }
};
#endif

// The kernels of each `isa`, null where this machine lacks instructions.
struct Tables {
  const Kernels* of[7] = {&kernels_generic};

  // __builtin_cpu_supports also asks the operating system whether it saves the registers.
  Tables() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    constexpr unsigned kF16C = 1u << 29;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && Cpuid(1).c & kF16C)
      of[1] = &kernels_avx2;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
      return;
    of[2] = of[3] = &kernels_avx512;
    if (!__builtin_cpu_supports("avx512vnni")) return;
    of[2] = of[4] = &kernels_avx512_vnni;
    if (!__builtin_cpu_supports("avx512bf16")) return;
    of[2] = of[5] = &kernels_avx512_bf16;
    if (has_tiles()) of[2] = of[6] = &kernels_amx;
#endif
  }

  // Linux saves tiles only for a process that has asked for it (its Documentation/arch/x86/xstate).
  static bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tile, int8
    return (Cpuid(7).d & kAmx) == kAmx && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
  }
};

static const Kernels* kernels_of(int64_t isa) {
  static const Tables tables;
  return 0 <= isa && isa < 7 ? tables.of[isa] : nullptr;
}

static bool has_isa(int64_t isa) { return kernels_of(isa) != nullptr; }

const Kernels& kernels_for(const char* op, int64_t isa) {
  const Kernels* kernels = kernels_of(isa);
  require(
      kernels != nullptr, op, ": isa is ", isa, ", which this machine does not run (0 generic, ",
      "1 AVX2, 2 the best AVX-512; 3 AVX-512 alone, 4 with VNNI, 5 and BF16, 6 and AMX)");
  return *kernels;
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

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) { m.def("has_isa(int isa) -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("has_isa", TORCH_BOX(&bert_fast::cpu::has_isa));
}
