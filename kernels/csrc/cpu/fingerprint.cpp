// What tells, in a few microseconds, that somebody has written to a weight.
#include <cstring>

#include "cpu/tensors.h"

namespace bert_fast::cpu {

// Elements along a diagonal: one at least of every head's rows, and of its columns.
constexpr int64_t kSamples = 16;

static int64_t fingerprint(const Tensors& weights) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a, on words
  for (const Tensor& weight : weights) {
    const auto* data = static_cast<const char*>(weight.data_ptr());
    const int64_t bytes = static_cast<int64_t>(weight.element_size());
    require(bytes <= 8, "fingerprint: elements have ", bytes, " bytes, expected 8 at most");
    if (weight.numel() == 0) continue;
    for (int64_t i = 0; i < kSamples; ++i) {
      int64_t at = 0;
      for (int64_t d = 0; d < weight.dim(); ++d)
        at += (2 * i + 1) * weight.size(d) / (2 * kSamples) * weight.stride(d);
      uint64_t word = 0;
      std::memcpy(&word, data + at * bytes, static_cast<size_t>(bytes));
      hash = (hash ^ word) * 0x100000001b3;
    }
  }
  return static_cast<int64_t>(hash);
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) { m.def("fingerprint(Tensor[] weights) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("fingerprint", TORCH_BOX(&bert_fast::cpu::fingerprint));
}
