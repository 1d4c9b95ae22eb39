// y = dropout(LayerNorm(word[ids] + token_type[types] + position[positions])), BERT's input layer.
//
// Three gathers, their sum and LayerNorm in one pass over registers. Backward gives the gradient dz
// of the sum; scattering it into the tables is left to the caller.
//
// An index outside its table stops the kernel with a device-side assertion, as PyTorch's embedding
// does: the next CUDA call raises, and the context is lost. Nothing is clamped.
#include "layernorm_launch.cuh"

namespace bert_fast {
namespace {

// ---- pointer kernel: what LayerNorm's rows are made of ----

struct Indices {
  const void* values;  // [T] int32 or int64, or null for all zeros
  bool wide;

  __device__ __forceinline__ int64_t at(int64_t row, int64_t table_rows) const {
    if (values == nullptr) return 0;
    const int64_t index =
        wide ? static_cast<const int64_t*>(values)[row] : static_cast<const int32_t*>(values)[row];
    if (index < 0 || index >= table_rows)
      __assert_fail("bert_fast.embed_layernorm: index out of range", __FILE__, __LINE__, __func__);
    return index;
  }
};

template <typename T>
struct Table {
  const T* rows;  // [count, H], or null for a table that is not there
  int64_t count;
  Indices indices;
};

template <typename T>
struct EmbedSource {
  static constexpr bool kColumnSum = false;
  static constexpr int64_t kMostStreamedWide = INT64_MAX;

  Table<T> word, position, token_type;
  const T* dy;  // [T, H], backward only
  T* dz;        // [T, H] or null
  Dropout dropout;

  template <typename Row>
  static __device__ __forceinline__ void gather(
      const Table<T>& table, int64_t row, int hidden, int thread,
      Pack<T, Row::kItems> (&packs)[Row::kPacks]) {
    const int64_t index = table.indices.at(row, table.count);
    load_row_packs<Row>(table.rows + index * hidden, hidden, thread, packs);
  }

  template <typename Row>
  __device__ __forceinline__ void load_row(int64_t row, int hidden, int thread,
                                           float (&z)[Row::kPacks][Row::kItems]) const {
    constexpr int N = Row::kItems;
    Pack<T, N> words[Row::kPacks], positions[Row::kPacks], types[Row::kPacks];
    gather<Row>(word, row, hidden, thread, words);
    gather<Row>(position, row, hidden, thread, positions);
    if (token_type.rows != nullptr) gather<Row>(token_type, row, hidden, thread, types);
#pragma unroll
    for (int i = 0; i < Row::kPacks; ++i) {
      if (Row::column(i, thread) < hidden) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          z[i][j] = to_float(words[i].item[j]);
          if (token_type.rows != nullptr) z[i][j] += to_float(types[i].item[j]);
          z[i][j] += to_float(positions[i].item[j]);
        }
      }
    }
  }

  // A lane holds where in their tables the rows of one of the 32 tokens to come start.
  template <typename Row>
  struct Stream {
    static constexpr int N = Row::kItems;
    const EmbedSource& source;
    int lane;
    int64_t word = 0, position = 0, token_type = 0;

    __device__ __forceinline__ Stream(const EmbedSource& source, int lane)
        : source(source), lane(lane) {}

    __device__ __forceinline__ void look_ahead(int64_t row, int64_t step, int64_t rows) {
      row += lane * step;
      if (row >= rows) return;
      word = source.word.indices.at(row, source.word.count) * kHidden<Row>;
      position = source.position.indices.at(row, source.position.count) * kHidden<Row>;
      if (source.token_type.rows != nullptr)
        token_type = source.token_type.indices.at(row, source.token_type.count) * kHidden<Row>;
    }

    static __device__ __forceinline__ const T* found(const Table<T>& table, int64_t start,
                                                     int owner) {
      return table.rows + __shfl_sync(kFullWarp, start, owner);
    }

    // Where sequences are of one length, and `step` is a multiple of it, a warp meets the same
    // position again and again: in the L1 cache, from which words would only displace it.
    __device__ __forceinline__ void copy(int index, int64_t, uint32_t address) const {
      copy_row<Row, 0>(found(source.word, word, index), lane, address,
                       [](uint32_t to, const T* from) { copy_async(to, from, true); });
      copy_row<Row, 1>(found(source.position, position, index), lane, address,
                       [](uint32_t to, const T* from) { copy_async_cached(to, from); });
    }

    __device__ __forceinline__ void load_row(int index, int64_t, const Pack<T, N>* stage,
                                             float (&z)[Row::kPacks][N]) const {
      const bool typed = source.token_type.rows != nullptr;
      const T* types = nullptr;  // few rows: the L1 cache holds them
      if (typed) types = found(source.token_type, token_type, index);
      copy_wait<kAhead>();
#pragma unroll
      for (int i = 0; i < Row::kPacks; ++i) {
        widen(staged_pack<Row, 0>(stage, i), z[i]);
        if (typed) add(z[i], load_pack<T, N>(types + Row::column(i, lane)));
        add(z[i], staged_pack<Row, 1>(stage, i));
      }
    }
  };

  template <int N>
  __device__ __forceinline__ void finish(int64_t row, int column, float (&y)[N]) const {
    if (dropout.seed != nullptr) apply_dropout(dropout, dropout.key(), row, column, y);
  }

  template <typename Row>
  __device__ __forceinline__ void load_grad(int64_t row, int hidden, int thread,
                                            float (&grad)[Row::kPacks][Row::kItems]) const {
    Pack<T, Row::kItems> packs[Row::kPacks];
    load_row_packs<Row>(dy + row * hidden, hidden, thread, packs);
    const bool drop = dropout.seed != nullptr;
    const uint2 key = drop ? dropout.key() : make_uint2(0u, 0u);
#pragma unroll
    for (int i = 0; i < Row::kPacks; ++i) {
      const int column = Row::column(i, thread);
      if (column < hidden) {
        unpack(packs[i], grad[i]);
        if (drop) apply_dropout(dropout, key, row, column, grad[i]);
      }
    }
  }

  template <int N>
  __device__ __forceinline__ void store_grad(int64_t row, int hidden, int column,
                                             float (&grad)[N]) const {
    if (dz != nullptr) store_floats<T>(dz + row * hidden + column, grad);
  }
};

// ---- checking wrapper ----

constexpr const char* kOp = "bert_fast_cuda::embed_layernorm";

// The embedding arguments, as both directions get them.
struct Arguments {
  const Tensor& input_ids;
  const MaybeTensor& token_type_ids;
  const Tensor& position_ids;
  const Tensor& word;
  const Tensor& position;
  const MaybeTensor& token_type;
  const Tensor& weight;
  const Tensor& bias;

  int64_t tokens() const { return input_ids.numel(); }
  int64_t hidden() const { return word.size(1); }

  void check() const {
    STD_TORCH_CHECK(word.dim() == 2 && position.dim() == 2, kOp, ": tables must be [rows, H]");
    check_hidden(kOp, hidden());
    check_ids("input_ids", input_ids);
    check_ids("position_ids", position_ids);
    if (token_type_ids.has_value()) check_ids("token_type_ids", *token_type_ids);
    check_float(kOp, "word", word, word, {word.size(0), hidden()});
    check_float(kOp, "position", position, word, {position.size(0), hidden()});
    if (token_type.has_value()) {
      STD_TORCH_CHECK(token_type->dim() == 2 && token_type->size(0) > 0, kOp,
                      ": token_type must be [rows, H] with at least one row");
      check_float(kOp, "token_type", *token_type, word, {token_type->size(0), hidden()});
    }
    check_float(kOp, "weight", weight, word, {hidden()});
    check_float(kOp, "bias", bias, word, {hidden()});
  }

  void check_ids(const char* name, const Tensor& ids) const {
    STD_TORCH_CHECK(
        ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Long, kOp, ": ",
        name, " must be int32 or int64");
    check_tensor(kOp, name, ids, word, {tokens()});
  }

  static Indices indices(const MaybeTensor& ids) {
    if (!ids.has_value()) return {nullptr, false};
    return {ids->const_data_ptr(), ids->scalar_type() == ScalarType::Long};
  }

  template <typename T>
  EmbedSource<T> source(const Dropout& dropout, const T* dy, T* dz) const {
    EmbedSource<T> source{};
    source.word = {data<T>(word), word.size(0), indices(input_ids)};
    source.position = {data<T>(position), position.size(0), indices(position_ids)};
    if (token_type.has_value())
      source.token_type = {data<T>(*token_type), token_type->size(0), indices(token_type_ids)};
    source.dy = dy;
    source.dz = dz;
    source.dropout = dropout;
    return source;
  }

  template <typename T>
  bool vectors(const EmbedSource<T>& source) const {
    return vectors_fit<T>(hidden(), {source.word.rows, source.position.rows,
                                     source.token_type.rows, source.dy, source.dz});
  }
};

std::tuple<Tensor, Tensor, Tensor> embed_layernorm_forward(
    Tensor input_ids, MaybeTensor token_type_ids, Tensor position_ids, Tensor word, Tensor position,
    MaybeTensor token_type, Tensor weight, Tensor bias, double eps, int64_t /*padding_idx*/,
    double p, MaybeTensor seed, bool save) {
  const Arguments arguments{input_ids, token_type_ids, position_ids, word,
                            position,  token_type,     weight,       bias};
  arguments.check();
  const Dropout dropout = make_dropout(kOp, p, seed, word);
  const int64_t tokens = arguments.tokens();
  const OnDevice device(word);
  const Tensor y = torch::stable::new_empty(word, {tokens, arguments.hidden()});
  const auto make_stats = [&] {
    return torch::stable::new_empty(word, {save ? tokens : 0}, ScalarType::Float);
  };
  const Tensor mean = make_stats(), rstd = save ? make_stats() : mean;
  if (tokens == 0) return {y, mean, rstd};
  dispatch_float(kOp, word.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto source = arguments.source<T>(dropout, nullptr, nullptr);
    launch_layernorm_forward<T>(source, arguments.vectors(source), weight, bias, y, mean, rstd, eps,
                                device.stream());
  });
  return {y, mean, rstd};
}

// needs: word, position, token_type, weight, bias. Returns dz, dweight, dbias.
std::tuple<Tensor, Tensor, Tensor> embed_layernorm_backward(
    Tensor dy, Tensor input_ids, MaybeTensor token_type_ids, Tensor position_ids, Tensor word,
    Tensor position, MaybeTensor token_type, Tensor weight, Tensor bias, double /*eps*/,
    int64_t /*padding_idx*/, double p, MaybeTensor seed, Tensor mean, Tensor rstd,
    std::vector<bool> needs) {
  const Arguments arguments{input_ids, token_type_ids, position_ids, word,
                            position,  token_type,     weight,       bias};
  arguments.check();
  const int64_t tokens = arguments.tokens(), hidden = arguments.hidden();
  check_float(kOp, "dy", dy, word, {tokens, hidden});
  check_stats(kOp, "mean", mean, word, tokens);
  check_stats(kOp, "rstd", rstd, word, tokens);
  STD_TORCH_CHECK(needs.size() == 5, kOp, ": needs must have 5 entries, got ", needs.size());
  const Dropout dropout = make_dropout(kOp, p, seed, word);
  const OnDevice device(word);
  const Tensor none = absent(word);
  const Tensor dz = needs[0] || needs[1] || needs[2] ? torch::stable::empty_like(dy) : none;
  const Tensor dweight = needs[3] ? make_parameter_grad(weight, tokens) : none;
  const Tensor dbias = needs[4] ? make_parameter_grad(bias, tokens) : none;
  if (tokens == 0) return {dz, dweight, dbias};
  dispatch_float(kOp, word.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto source = arguments.source<T>(dropout, data<T>(dy), output<T>(dz));
    const ParameterGrads<T> grads{{output<T>(dweight), output<T>(dbias), nullptr}};
    launch_layernorm_backward<T>(source, arguments.vectors(source), weight, mean, rstd, tokens,
                                 grads, device.stream());
  });
  return {dz, dweight, dbias};
}

}  // namespace
}  // namespace bert_fast

// ---- registration ----

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cuda, m) {
  m.def(
      "embed_layernorm_forward(Tensor input_ids, Tensor? token_type_ids, Tensor position_ids, "
      "Tensor word, Tensor position, Tensor? token_type, Tensor weight, Tensor bias, float eps, "
      "int padding_idx, float p, Tensor? seed, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "embed_layernorm_backward(Tensor dy, Tensor input_ids, Tensor? token_type_ids, "
      "Tensor position_ids, Tensor word, Tensor position, Tensor? token_type, Tensor weight, "
      "Tensor bias, float eps, int padding_idx, float p, Tensor? seed, Tensor mean, Tensor rstd, "
      "bool[] needs) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cuda, CUDA, m) {
  m.impl("embed_layernorm_forward", TORCH_BOX(&bert_fast::embed_layernorm_forward));
  m.impl("embed_layernorm_backward", TORCH_BOX(&bert_fast::embed_layernorm_backward));
}
