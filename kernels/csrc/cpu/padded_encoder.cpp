// padded_encoder: from a padded batch of ids to its states and the pooler's output, in one call.
//
// The steps are the ops' own. A short input takes less time in them than between them, where Python
// runs on memory that the weights have pushed out of the caches.
#include <array>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/steps.h"

namespace bert_fast::cpu {

// Integers [B or 1, S], however they lie in memory.
class Grid {
 public:
  Grid(const char* op, const char* name, const Tensor& t, int64_t batch, int64_t length) {
    const ScalarType dtype = t.scalar_type();
    require(t.is_cpu(), op, ": ", name, " is not on the CPU");
    require(
        dtype == ScalarType::Long || dtype == ScalarType::Int || dtype == ScalarType::Bool, op,
        ": ", name, " is ", torch::headeronly::toString(dtype), ", expected Long, Int or Bool");
    require_rank(op, name, t, 2);
    require(
        (t.size(0) == batch || t.size(0) == 1) && t.size(1) == length, op, ": ", name,
        " has shape ", shape_text(t.sizes().data(), 2), ", expected (", batch, ", ", length, ")");
    data_ = t.data_ptr();
    bytes_ = t.element_size();
    row_ = t.size(0) == 1 ? 0 : t.stride(0);
    column_ = t.stride(1);
  }

  int64_t operator()(int64_t b, int64_t s) const {
    const int64_t at = b * row_ + s * column_;
    if (bytes_ == 8) return static_cast<const int64_t*>(data_)[at];
    if (bytes_ == 4) return static_cast<const int32_t*>(data_)[at];
    return static_cast<const uint8_t*>(data_)[at];
  }

 private:
  const void* data_;
  size_t bytes_;
  int64_t row_, column_;
};

// The tokens that are kept, one after the other: the rules are those of bert_fast/inputs.py and
// padding.py.
struct Tokens {
  std::vector<int64_t> kept;           // of the flattened batch
  std::vector<int32_t> bounds, first;  // where a sequence begins, and the first of its keys
  bool hidden = false;                 // whether some sequence's first token is no key

  Tokens(const std::optional<Grid>& mask, int64_t batch, int64_t length) {
    kept.reserve(batch * length);
    for (int64_t b = 0; b < batch; ++b) {
      const bool hides = mask && !(*mask)(b, 0);
      bounds.push_back(int32_t(kept.size()));
      first.push_back(int32_t(kept.size()) + hides);
      hidden |= hides;
      for (int64_t s = 0; s < length; ++s)  // column 0 is read, and stays a query
        if (s == 0 || !mask || (*mask)(b, s)) kept.push_back(b * length + s);
    }
    bounds.push_back(int32_t(kept.size()));
  }
};

template <class T>
static Tensor tensor_of(const std::vector<T>& values, ScalarType dtype) {
  Tensor t = uninitialised({static_cast<int64_t>(values.size())}, dtype);
  std::copy(values.begin(), values.end(), static_cast<T*>(t.data_ptr()));
  return t;
}

// [B S, H] as [B, S, H], and not as a view: autograd would not have one written to later.
static Tensor as_batch(const Tensor& x, int64_t batch, int64_t length) {
  const int64_t hidden = x.size(1);
  const int64_t sizes[] = {batch, length, hidden}, strides[] = {length * hidden, hidden, 1};
  AtenTensorHandle handle = nullptr;
  if (aoti_torch__reinterpret_tensor(x.get(), 3, sizes, strides, 0, &handle) != 0)
    fail("padded_encoder: states cannot be a tensor of shape ", shape_text(sizes, 3));
  return Tensor(handle);
}

// tanh(x W^T + b), by torch.
static Tensor pooled(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> linear{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", linear.data(), TORCH_ABI_VERSION));
  std::array<StableIValue, 1> tanh{linear[0]};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::tanh", "", tanh.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(tanh[0]);
}

// Gives (states [B, S, H], zero at padding; pooled [B, H], empty without a pooler). first_only: of
// first tokens [B, 1, H].
// padding_idx: positions count the ids of a row that are not this one, from the number after it,
// which itself is the position of the others; -1: they are columns.
static std::tuple<Tensor, Tensor> padded_encoder(
    const Tensor& input_ids, const OptionalTensor& token_type_ids, const OptionalTensor& mask,
    int64_t padding_idx, const Tensor& word, const Tensor& position,
    const OptionalTensor& token_type, const Tensor& norm, const Tensor& norm_bias, double norm_eps,
    const Tensor& table, double eps, String activation, const OptionalTensor& pooler,
    const OptionalTensor& pooler_bias, bool first_only, bool team, int64_t isa) {
  const char* op = "padded_encoder";
  const Activation act = activation_of(op, take(activation));
  require_rank(op, "input_ids", input_ids, 2);
  const int64_t batch = input_ids.size(0), length = input_ids.size(1);
  require(
      0 < batch && 0 < length && batch * length < INT32_MAX, op, ": input_ids has shape ",
      shape_text(input_ids.sizes().data(), 2), ", expected 1 to 2^31 - 2 ids");
  const Grid ids(op, "input_ids", input_ids, batch, length);
  std::optional<Grid> kinds, keep;
  if (token_type_ids) kinds.emplace(op, "token_type_ids", *token_type_ids, batch, length);
  if (mask) keep.emplace(op, "mask", *mask, batch, length);

  const Tokens tokens(keep, batch, length);
  const auto count = static_cast<int64_t>(tokens.kept.size());
  Tensor token_ids = uninitialised({count}, ScalarType::Long);
  Tensor positions = uninitialised({count}, ScalarType::Long);
  OptionalTensor types;
  if (kinds && token_type) types = uninitialised({count}, ScalarType::Long);
  auto* to_ids = static_cast<int64_t*>(token_ids.data_ptr());
  auto* to_positions = static_cast<int64_t*>(positions.data_ptr());
  auto* to_types = types ? static_cast<int64_t*>(types->data_ptr()) : nullptr;
  size_t next = 0;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t seen = 0;
    for (int64_t s = 0; s < length; ++s) {
      const int64_t id = ids(b, s), real = id != padding_idx;
      seen += real;
      if (next == tokens.kept.size() || tokens.kept[next] != b * length + s) continue;
      to_ids[next] = id;
      to_positions[next] = padding_idx < 0 ? s : padding_idx + real * seen;
      if (to_types) to_types[next] = (*kinds)(b, s);
      ++next;
    }
  }
  const auto [x, mean, rstd] = embed_layernorm_forward(
      token_ids, types, positions, word, position, token_type, norm, norm_bias, norm_eps, -1, 0.0,
      {}, false, isa);
  OptionalTensor key_start;
  if (tokens.hidden) key_start = tensor_of(tokens.first, ScalarType::Int);
  OptionalTensor rows;
  if (first_only)
    rows = tensor_of(std::vector<int64_t>(tokens.bounds.begin(), tokens.bounds.end() - 1),
                     ScalarType::Long);
  Tensor states = encoder_states(
      x, tensor_of(tokens.bounds, ScalarType::Int), key_start, {}, rows, table, eps, act, team, isa);
  if (!first_only && count < batch * length)
    states = scatter(
        op, "states", states, tensor_of(tokens.kept, ScalarType::Long), batch * length, isa);
  states = as_batch(states, batch, first_only ? 1 : length);
  if (!pooler) return {states, absent(states)};
  return {states, pooled(torch::stable::select(states, 1, 0), *pooler, pooler_bias)};
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) {
  m.def(
      "padded_encoder(Tensor input_ids, Tensor? token_type_ids, Tensor? mask, int padding_idx, "
      "Tensor word, Tensor position, Tensor? token_type, Tensor norm, Tensor norm_bias, "
      "float norm_eps, Tensor table, float eps, str activation, Tensor? pooler, "
      "Tensor? pooler_bias, bool first_only, bool team, int isa) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CPU, m) {
  m.impl("padded_encoder", TORCH_BOX(&bert_fast::cpu::padded_encoder));
}
