// What tells, by where they are and by some of their elements, that weights are no longer the same.
#include <cstring>

#include "cpu/tensors.h"

namespace bert_fast::cpu {

// Elements along a diagonal: of up to so many heads, one at least of each one's rows and columns.
constexpr int64_t kSamples = 16;

struct Element {
  const char* at;
  size_t bytes;
};

// Of devices, addresses, dtypes, shapes and strides of all; on the CPU, of elements of those at `read`:
// to read a GPU's would stall its queue.
static int64_t fingerprint(const Tensors& weights, const std::vector<int64_t>& read) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a, on words
  auto add = [&](uint64_t word) { hash = (hash ^ word) * 0x100000001b3; };
  for (const Tensor& weight : weights) {
    add(reinterpret_cast<uintptr_t>(weight.data_ptr()));
    add(weight.is_cpu() ? 0 : 1 + static_cast<uint64_t>(weight.get_device_index()));
    add(static_cast<uint64_t>(weight.scalar_type()));
    for (const int64_t size : weight.sizes()) add(size);
    for (const int64_t stride : weight.strides()) add(stride);
  }
  std::vector<Element> elements;
  elements.reserve(read.size() * kSamples);
  for (const int64_t at : read) {
    require(
        0 <= at && at < int64_t(weights.size()), "fingerprint: read has ", at, " of ",
        weights.size(), " weights");
    const Tensor& weight = weights[at];
    if (!weight.is_cpu() || weight.numel() == 0) continue;
    const auto* data = static_cast<const char*>(weight.data_ptr());
    const size_t bytes = weight.element_size();
    require(bytes <= 8, "fingerprint: elements have ", bytes, " bytes, expected 8 at most");
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
  for (const Element& element : elements) {
    uint64_t word = 0;
    std::memcpy(&word, element.at, element.bytes);
    add(word);
  }
  return static_cast<int64_t>(hash);
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) {
  m.def("fingerprint(Tensor[] weights, int[] read) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("fingerprint", TORCH_BOX(&bert_fast::cpu::fingerprint));
}
