// encoder: what the ops of its layers compute, in one call and with no round trip between two.
//
// Within a layer a few sequences at a time go from its first step to its last: what is between two
// steps stays in the caches, and needs memory for those few only, however large the batch.
//
// Where there are enough of them, each thread takes such a chunk through a layer by itself, and no
// thread waits for another before the end. Else all threads share every step of one chunk, as a team
// where torch's threads allow it (threads.h).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/chunks.h"
#include "cpu/dispatch.h"
#include "cpu/steps.h"
#include "cpu/threads.h"

namespace bert_fast::cpu {

// One layer's weights, in the order of bert_fast/ops/encoder.py; q, k and v are one, and matrices
// are in panels, those of q apart from those of k and v.
struct Layer {
  static constexpr size_t kTensors = 12;
  int64_t inside, inner;  // heads * head_dim; width of the feed-forward network
  const void *qkv, *qkv_bias, *out, *out_bias, *out_norm, *out_norm_bias;
  const void *up, *up_bias, *down, *down_bias, *down_norm, *down_norm_bias;
};

// `like`: of the dtype of what will be multiplied.
static Layer layer_at(
    const char* op, const Tensors& weights, size_t index, const Tensor& like, bool int8,
    int64_t hidden, const Kernels& kernels) {
  const Tensor* next = weights.data() + index * Layer::kTensors;
  Layer layer{next[1].numel() / 3, next[7].numel()};
  auto matrix = [&](const char* name, int64_t cols, int64_t depth, int64_t apart = 0) {
    return checked_panels(op, name, *next++, like, int8, cols, depth, kernels, apart);
  };
  auto row = [&](const char* name, int64_t cols) {
    return checked(op, name, *next++, like.scalar_type(), {cols});
  };
  layer.qkv = matrix("qkv", 3 * layer.inside, hidden, layer.inside);
  layer.qkv_bias = row("qkv_bias", 3 * layer.inside);
  layer.out = matrix("out", hidden, layer.inside);
  layer.out_bias = row("out_bias", hidden);
  layer.out_norm = row("out_norm", hidden);
  layer.out_norm_bias = row("out_norm_bias", hidden);
  layer.up = matrix("up", layer.inner, hidden);
  layer.up_bias = row("up_bias", layer.inner);
  layer.down = matrix("down", hidden, layer.inner);
  layer.down_bias = row("down_bias", hidden);
  layer.down_norm = row("down_norm", hidden);
  layer.down_norm_bias = row("down_norm_bias", hidden);
  return layer;
}

// What a table of weights begins with; a `Layer` for each layer follows.
struct Header {
  int64_t hidden, heads, dtype, int8, isa;
};

constexpr size_t kHeader = sizeof(Header) / sizeof(int64_t);
constexpr size_t kLayer = sizeof(Layer) / sizeof(int64_t);

// The weights of all layers, checked once: to look at a hundred tensors in every call takes longer
// than a short input does. The caller keeps them, and the table no longer than them.
static Tensor encoder_table(
    const Tensors& weights, const Tensor& like, int64_t heads, int64_t isa) {
  const char* op = "encoder";
  require(heads > 0, op, ": heads is ", heads, ", expected a positive number");
  const size_t count = weights.size() / Layer::kTensors;
  require(
      count > 0 && weights.size() % Layer::kTensors == 0, op, ": weights has ", weights.size(),
      " tensors, expected ", Layer::kTensors, " for each layer");
  const bool int8 = has_int8_values(weights[0]);  // then all are; no other kind is mixed in
  const int64_t hidden = weights[3].numel();
  const Dtype dtype = float_dtype(op, "like", like);
  Tensor table = uninitialised({static_cast<int64_t>(kHeader + count * kLayer)}, ScalarType::Long);
  auto* to = static_cast<int64_t*>(table.data_ptr());
  const Header header{hidden, heads, static_cast<int64_t>(dtype), int8, isa};
  std::memcpy(to, &header, sizeof header);
  for (size_t i = 0; i < count; ++i) {
    const Layer m = layer_at(op, weights, i, like, int8, hidden, kernels_for(op, isa));
    require(
        m.inside % heads == 0, op, ": heads is ", heads, ", expected a divisor of ", m.inside);
    std::memcpy(to + kHeader + i * kLayer, &m, sizeof m);
  }
  return table;
}

// Tokens that one thread takes through a layer at a time: fewer, and each weight is read more often;
// more, and there are too few chunks for all threads to end together, or they leave the caches.
constexpr int64_t kLeastChunk = 128, kMostChunk = 256;
// Tokens a thread, below which it takes longer to read all weights than to share every step.
constexpr int64_t kFewTokens = 48;

// Memory for what is between the steps of a layer, for the largest chunk.
struct Workspace {
  float* memory;
  char *qkv, *context, *branch, *middle, *residual, *states;

  Workspace(int64_t rows, int64_t hidden, int64_t inside, int64_t inner, int64_t bytes) {
    const int64_t row = bytes * rows, some = bytes * std::min(rows, rows_at_once());
    memory = allocate_floats((row * (4 * inside + 3 * hidden) + some * inner) / 4 + 1);
    qkv = reinterpret_cast<char*>(memory);
    context = qkv + row * 3 * inside;
    branch = context + row * inside;
    middle = branch + row * hidden;
    residual = middle + row * hidden;
    states = residual + row * hidden;
  }
  ~Workspace() { free_floats(memory); }
  Workspace(const Workspace&) = delete;
};

constexpr int64_t kRowsCopied = 512;  // by one thread

// copy(i) for the row at each i < n, dealt to threads.
template <class F>
void for_rows(size_t n, const F& copy) {
  auto run = [](int64_t begin, int64_t end, void* p) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(p))(size_t(i));
  };
  run_parallel(int64_t(n), kRowsCopied, run, const_cast<F*>(&copy));
}

// to[i] = from[rows[i]], each of `bytes`.
static const void* gather(
    const void* from, const std::vector<int64_t>& rows, int64_t bytes, char* to) {
  for_rows(rows.size(), [&](size_t i) {
    std::memcpy(to + i * bytes, static_cast<const char*>(from) + rows[i] * bytes, bytes);
  });
  return to;
}

// What all layers share, and one layer's forward.
struct Encoder {
  const Kernels& kernels;
  Dtype dtype;
  bool int8;
  Activation activation;
  int64_t hidden, heads;
  float eps;
  // In 8 bits, attention's operands are bf16 where that is faster: far finer than their products.
  bool narrow = int8 && dtype == Dtype::f32 && kernels.pairs;
  Dtype attended = narrow ? Dtype::bf16 : dtype;

  void project(
      int64_t rows, int64_t depth, int64_t cols, const void* x, const void* packed,
      const void* bias, void* y, int64_t group) const {
    kernels.linear_forward(
        {dtype, int8, Activation::none, rows, depth, cols, x, packed, bias, y, group, false,
         narrow});
  }

  void add_norm(
      int64_t rows, const void* x, const void* linear_bias, const void* residual,
      const void* weight, const void* bias, void* y) const {
    AddLayerNorm a{};
    a.dtype = dtype;
    a.rows = rows;
    a.cols = hidden;
    a.eps = eps;
    a.x = x;
    a.linear_bias = linear_bias;
    a.residual = residual;
    a.weight = weight;
    a.bias = bias;
    a.y = y;
    kernels.add_layernorm_forward(a);
  }

  // qkv: Q [heads, rows of xq, width], K and V [heads, rows of x, width].
  void project_qkv(
      const Layer& m, int64_t rows, const void* x, int64_t asked, const void* xq, char* qkv) const {
    const int64_t width = m.inside / heads;
    if (x == xq && m.inside % kernels.panel == 0)  // panels of q end where those of k begin
      return project(rows, hidden, 3 * m.inside, x, m.qkv, m.qkv_bias, qkv, width);
    const auto* packed = static_cast<const char*>(m.qkv);
    const auto* bias = static_cast<const char*>(m.qkv_bias);
    const int64_t part = kernels.packed_bytes({dtype, int8, m.inside, hidden});
    project(asked, hidden, m.inside, xq, packed, bias, qkv, width);
    project(
        rows, hidden, 2 * m.inside, x, packed + part, bias + m.inside * size_of(dtype),
        qkv + rows * m.inside * size_of(attended), width);
  }

  // y may be x. Of the wanted rows only, where `some`: they come one after the other.
  void run(
      const Layer& m, const Chunk& chunk, const void* x, bool some, const Workspace& w,
      void* y) const {
    Attention a = chunk.attention;
    const int64_t tokens = a.tokens;
    const int64_t rows = some ? static_cast<int64_t>(chunk.wanted.size()) : tokens;
    if (rows == 0) return;
    a.width = m.inside / heads;
    a.scale = float(1.0 / std::sqrt(double(a.width)));
    // [3, heads, tokens, width]: what attention reads together lies together
    a.token_step = a.width;
    a.head_step = tokens * a.width;
    a.part_step = heads * a.head_step;
    a.qkv = w.qkv;
    a.out = w.context;
    const void *context = w.context, *residual = x;
    if (some) residual = gather(x, chunk.wanted, hidden * size_of(dtype), w.residual);
    if (some && !a.bias && rows <= tokens) {
      a.asked = chunk.asked.data();
      project_qkv(m, tokens, x, rows, residual, w.qkv);
      kernels.attention_forward(a);
    } else {
      project_qkv(m, tokens, x, tokens, x, w.qkv);
      kernels.attention_forward(a);
      if (some)  // w.qkv has been read
        context = gather(context, chunk.wanted, m.inside * size_of(attended), w.qkv);
    }
    kernels.linear_forward(
        {dtype, int8, Activation::none, rows, m.inside, hidden, context, m.out, nullptr, w.branch,
         0, narrow});
    add_norm(rows, w.branch, m.out_bias, residual, m.out_norm, m.out_norm_bias, w.middle);
    feed_forward(
        kernels,
        {dtype, int8, activation, rows, hidden, m.inner, hidden, w.middle, m.up, m.up_bias, m.down,
         w.branch},
        w.states);
    add_norm(rows, w.branch, m.down_bias, w.middle, m.down_norm, m.down_norm_bias, y);
  }
};

Tensor encoder_states(
    const Tensor& x, const Tensor& cu_seqlens, const OptionalTensor& key_start,
    const OptionalTensor& bias, const OptionalTensor& rows, const Tensor& table, double eps,
    Activation act, bool team, int64_t isa) {
  const char* op = "encoder";
  require_rank(op, "x", x, 2);
  const Kernels& kernels = kernels_for(op, isa);
  const ScalarType type = x.scalar_type();
  const Dtype dtype = float_dtype(op, "x", x);
  const auto* words = static_cast<const int64_t*>(
      checked(op, "table", table, ScalarType::Long, {table.numel()}));
  const auto size = static_cast<size_t>(table.numel());
  require(
      size > kHeader && (size - kHeader) % kLayer == 0, op, ": table has ", size, " numbers");
  const size_t count = (size - kHeader) / kLayer;
  Header header;
  std::memcpy(&header, words, sizeof header);
  const int64_t tokens = x.size(0), hidden = header.hidden, heads = header.heads;
  require(
      header.isa == isa && header.dtype == static_cast<int64_t>(dtype), op,
      ": the table of weights is for another dtype or instruction set");
  require(heads > 0, op, ": the table of weights is for ", heads, " heads");
  const Encoder encoder{kernels, dtype, header.int8 != 0, act, hidden, heads, float(eps)};
  const auto* input = static_cast<const char*>(checked(op, "x", x, type, {tokens, hidden}));

  std::vector<Layer> layers(count);
  std::memcpy(layers.data(), words + kHeader, count * sizeof(Layer));
  int64_t inside = 0, inner = 0;
  for (const Layer& m : layers) {
    inside = std::max(inside, m.inside);
    inner = std::max(inner, m.inner);
  }
  const Attention attention = attention_arguments(
      op, encoder.attended, tokens, heads, inside / heads, cu_seqlens, key_start, bias, 1.0);
  const int64_t threads = thread_count();
  const int64_t share = std::clamp(tokens / (4 * threads), kLeastChunk, kMostChunk);
  std::vector<Chunk> chunks = chunks_of(attention, share);
  Schedule schedule(chunks, count, 2 * hidden * (2 * inside + inner), inside);
  const bool apart = threads > 1 && tokens >= threads * kFewTokens && schedule.occupies(threads);
  if (!apart && threads > 1) chunks = chunks_of(attention, kMostChunk * threads);
  int64_t most = 0;
  for (const Chunk& chunk : chunks) most = std::max(most, chunk.attention.tokens);

  const int64_t bytes = hidden * size_of(encoder.dtype);
  Tensor states = uninitialised({tokens, hidden}, type), y = states;
  if (rows) {
    const Indices found = indices_below(op, "rows", *rows, rows->numel(), tokens);
    require(found.is_64, op, ": rows is not int64");
    deal_rows(chunks, static_cast<const int64_t*>(found.data), rows->numel());
    y = uninitialised({rows->numel(), hidden}, type);
    for (const Chunk& chunk : chunks)  // a row may be asked for more than once
      most = std::max(most, static_cast<int64_t>(chunk.wanted.size()));
  }
  auto* between = static_cast<char*>(states.data_ptr());
  auto* last = static_cast<char*>(y.data_ptr());
  const bool chosen = rows.has_value();
  auto step = [&](const Chunk& chunk, size_t layer, const Workspace& w) {
    const bool some = chosen && layer == count - 1;
    char* to = some ? w.residual : between + chunk.row * bytes;
    encoder.run(layers[layer], chunk, (layer ? between : input) + chunk.row * bytes, some, w, to);
    if (!some) return;
    for_rows(chunk.at.size(), [&](size_t j) {
      std::memcpy(last + chunk.at[j] * bytes, to + j * bytes, bytes);
    });
  };
  if (apart) {
    each_alone(threads, [&] {
      const Workspace w(most, hidden, inside, inner, size_of(encoder.dtype));
      for (Schedule::Step s; schedule.take(s); schedule.put_back(s))
        step(chunks[s.chunk], s.layer, w);
    });
    return y;
  }
  const Workspace w(most, hidden, inside, inner, size_of(encoder.dtype));
  auto run = [&] {
    for (size_t layer = 0; layer < count; ++layer)
      for (const Chunk& chunk : chunks) step(chunk, layer, w);
  };
  team ? as_team(run) : run();
  return y;
}

static Tensor encoder_forward(
    const Tensor& x, const Tensor& cu_seqlens, const OptionalTensor& key_start,
    const OptionalTensor& bias, const OptionalTensor& rows, const Tensor& table, double eps,
    String activation, bool team, int64_t isa) {
  const Activation act = activation_of("encoder", take(activation));
  return encoder_states(x, cu_seqlens, key_start, bias, rows, table, eps, act, team, isa);
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) {
  m.def(
      "encoder_forward(Tensor x, Tensor cu_seqlens, Tensor? key_start, Tensor? bias, "
      "Tensor? rows, Tensor table, float eps, str activation, bool team, int isa) -> Tensor");
  m.def("encoder_table(Tensor[] weights, Tensor like, int heads, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CPU, m) {
  m.impl("encoder_forward", TORCH_BOX(&bert_fast::cpu::encoder_forward));
  m.impl("encoder_table", TORCH_BOX(&bert_fast::cpu::encoder_table));
}
