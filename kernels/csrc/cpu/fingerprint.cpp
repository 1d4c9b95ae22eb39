// What tells, by some of its elements, that somebody has written to a weight.
#include <cstring>

#include "cpu/tensors.h"

namespace bert_fast::cpu {

// Elements along a diagonal: of up to so many heads, one at least of each one's rows and columns.
constexpr int64_t kSamples = 16;

struct Element {
  const char* at;
  size_t bytes;
};

static int64_t fingerprint(const Tensors& weights) {
  std::vector<Element> elements;
  elements.reserve(weights.size() * kSamples);
  for (const Tensor& weight : weights) {
    const auto* data = static_cast<const char*>(weight.data_ptr());
    const size_t bytes = weight.element_size();
    require(weight.is_cpu(), "fingerprint: a weight is not on the CPU");
    require(bytes <= 8, "fingerprint: elements have ", bytes, " bytes, expected 8 at most");
    if (weight.numel() == 0) continue;
    require(data != nullptr, "fingerprint: a weight has no memory");
    const auto sizes = weight.sizes(), strides = weight.strides();
    for (int64_t i = 0; i < kSamples; ++i) {
      int64_t at = 0;
      for (size_t d = 0; d < sizes.size(); ++d)
        at += (2 * i + 1) * sizes[d] / (2 * kSamples) * strides[d];
      elements.push_back({data + at * int64_t(bytes), bytes});
      __builtin_prefetch(elements.back().at);  // each on a page of its own: many at a time
    }
  }
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a, on words
  for (const Element& element : elements) {
    uint64_t word = 0;
    std::memcpy(&word, element.at, element.bytes);
    hash = (hash ^ word) * 0x100000001b3;
  }
  return static_cast<int64_t>(hash);
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) { m.def("fingerprint(Tensor[] weights) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CPU, m) {
  m.impl("fingerprint", TORCH_BOX(&bert_fast::cpu::fingerprint));
}
