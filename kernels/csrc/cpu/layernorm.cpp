// Checking wrappers and registration of embed_layernorm and add_layernorm.
#include "cpu/dispatch.h"
#include "cpu/steps.h"

namespace bert_fast::cpu {

// The parts both ops share: everything about the normalised rows but where they come from.
static void fill_layernorm(
    LayerNorm& a, const char* op, const Tensor& like, int64_t rows, int64_t cols,
    const Tensor& weight, const Tensor& bias, double eps, double p, const OptionalTensor& seed) {
  const ScalarType dtype = like.scalar_type();
  a.rows = rows;
  a.cols = cols;
  a.eps = float(eps);
  a.dropout = dropout_of(op, p, seed);
  a.weight = checked(op, "weight", weight, dtype, {cols});
  a.bias = checked(op, "bias", bias, dtype, {cols});
}

static void fill_gradient(
    LayerNorm& a, const char* op, ScalarType dtype, const Tensor& dy, const Tensor& mean,
    const Tensor& rstd, const Tensor& partials) {
  a.dy = checked(op, "dy", dy, dtype, {a.rows, a.cols});
  a.mean = static_cast<float*>(checked(op, "mean", mean, ScalarType::Float, {a.rows}));
  a.rstd = static_cast<float*>(checked(op, "rstd", rstd, ScalarType::Float, {a.rows}));
  a.partials = static_cast<float*>(partials.data_ptr());
}

// Where a forward saves (mean, rstd); one absent tensor for both where it saves nothing.
static std::pair<Tensor, Tensor> statistics(LayerNorm& a, bool save) {
  Tensor mean = uninitialised({save ? a.rows : 0}, ScalarType::Float);
  if (!save) return {mean, mean};
  Tensor rstd = uninitialised({a.rows}, ScalarType::Float);
  a.mean = static_cast<float*>(mean.data_ptr());
  a.rstd = static_cast<float*>(rstd.data_ptr());
  return {mean, rstd};
}

// A gradient like `like` if it is wanted, else an absent one; `address` gets its memory or null.
static Tensor wanted(const Tensor& like, bool want, void*& address) {
  Tensor t = want ? uninitialised_like(like) : absent(like);
  address = want ? t.data_ptr() : nullptr;
  return t;
}

static EmbedLayerNorm embed_arguments(
    const char* op, const Tensor& input_ids, const OptionalTensor& token_type_ids,
    const Tensor& position_ids, const Tensor& word, const Tensor& position,
    const OptionalTensor& token_type, const Tensor& weight, const Tensor& bias, double eps,
    double p, const OptionalTensor& seed) {
  EmbedLayerNorm a{};
  require_rank(op, "word", word, 2);
  require_rank(op, "position", position, 2);
  const int64_t rows = input_ids.numel(), cols = word.size(1);
  const ScalarType dtype = word.scalar_type();
  a.dtype = float_dtype(op, "word", word);
  fill_layernorm(a, op, word, rows, cols, weight, bias, eps, p, seed);
  a.word = checked(op, "word", word, dtype, {word.size(0), cols});
  a.position = checked(op, "position", position, dtype, {position.size(0), cols});
  a.input_ids = indices_below(op, "input_ids", input_ids, rows, word.size(0));
  a.position_ids = indices_below(op, "position_ids", position_ids, rows, position.size(0));
  if (token_type) {
    require_rank(op, "token_type", *token_type, 2);
    const int64_t types = token_type->size(0);
    require(types > 0, op, ": token_type has no rows");
    a.token_type = checked(op, "token_type", *token_type, dtype, {types, cols});
    if (token_type_ids)
      a.token_type_ids = indices_below(op, "token_type_ids", *token_type_ids, rows, types);
  }
  return a;
}

std::tuple<Tensor, Tensor, Tensor> embed_layernorm_forward(
    const Tensor& input_ids, const OptionalTensor& token_type_ids, const Tensor& position_ids,
    const Tensor& word, const Tensor& position, const OptionalTensor& token_type,
    const Tensor& weight, const Tensor& bias, double eps, int64_t /*padding_idx*/, double p,
    const OptionalTensor& seed, bool save, int64_t isa) {
  const char* op = "embed_layernorm";
  EmbedLayerNorm a = embed_arguments(
      op, input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias, eps, p,
      seed);
  Tensor y = uninitialised({a.rows, a.cols}, word.scalar_type());
  auto [mean, rstd] = statistics(a, save);
  a.y = y.data_ptr();
  kernels_for(op, isa).embed_layernorm_forward(a);
  return {y, mean, rstd};
}

// Gives (dz, dweight, dbias): the scatter of dz into the tables is left to ATen. `needs` follows
// the differentiable arguments: word, position, token_type, weight, bias.
static std::tuple<Tensor, Tensor, Tensor> embed_layernorm_backward(
    const Tensor& dy, const Tensor& input_ids, const OptionalTensor& token_type_ids,
    const Tensor& position_ids, const Tensor& word, const Tensor& position,
    const OptionalTensor& token_type, const Tensor& weight, const Tensor& bias, double eps,
    int64_t /*padding_idx*/, double p, const OptionalTensor& seed, const Tensor& mean,
    const Tensor& rstd, const std::vector<bool>& needs, int64_t isa) {
  const char* op = "embed_layernorm";
  require_needs(op, needs, 5);
  EmbedLayerNorm a = embed_arguments(
      op, input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias, eps, p,
      seed);
  Tensor partials = chunk_sums(a.rows, 3 * a.cols);
  fill_gradient(a, op, word.scalar_type(), dy, mean, rstd, partials);
  Tensor dz = wanted(dy, needs[0] || needs[1] || needs[2], a.dz);
  Tensor dweight = wanted(weight, needs[3], a.dweight);
  Tensor dbias = wanted(bias, needs[4], a.dbias);
  kernels_for(op, isa).embed_layernorm_backward(a);
  return {dz, dweight, dbias};
}

static AddLayerNorm add_arguments(
    const char* op, const Tensor& x, const OptionalTensor& linear_bias,
    const OptionalTensor& residual, const Tensor& weight, const Tensor& bias, double eps, double p,
    const OptionalTensor& seed) {
  AddLayerNorm a{};
  require_rank(op, "x", x, 2);
  const int64_t rows = x.size(0), cols = x.size(1);
  const ScalarType dtype = x.scalar_type();
  a.dtype = float_dtype(op, "x", x);
  fill_layernorm(a, op, x, rows, cols, weight, bias, eps, p, seed);
  a.x = checked(op, "x", x, dtype, {rows, cols});
  a.linear_bias = checked(op, "linear_bias", linear_bias, dtype, {cols});
  a.residual = checked(op, "residual", residual, dtype, {rows, cols});
  return a;
}

static std::tuple<Tensor, Tensor, Tensor> add_layernorm_forward(
    const Tensor& x, const OptionalTensor& linear_bias, const OptionalTensor& residual,
    const Tensor& weight, const Tensor& bias, double eps, double p, const OptionalTensor& seed,
    bool save, int64_t isa) {
  const char* op = "add_layernorm";
  AddLayerNorm a = add_arguments(op, x, linear_bias, residual, weight, bias, eps, p, seed);
  Tensor y = uninitialised_like(x);
  auto [mean, rstd] = statistics(a, save);
  a.y = y.data_ptr();
  kernels_for(op, isa).add_layernorm_forward(a);
  return {y, mean, rstd};
}

// Gives (dx, dlinear_bias, dresidual, dweight, dbias). Without dropout dx is dresidual: one tensor
// is written and returned for both.
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layernorm_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& linear_bias,
    const OptionalTensor& residual, const Tensor& weight, const Tensor& bias, double eps, double p,
    const OptionalTensor& seed, const Tensor& mean, const Tensor& rstd,
    const std::vector<bool>& needs, int64_t isa) {
  const char* op = "add_layernorm";
  require_needs(op, needs, 5);
  AddLayerNorm a = add_arguments(op, x, linear_bias, residual, weight, bias, eps, p, seed);
  Tensor partials = chunk_sums(a.rows, 3 * a.cols);
  fill_gradient(a, op, x.scalar_type(), dy, mean, rstd, partials);
  const bool need_residual = needs[2] && residual.has_value(), shared = !a.dropout.on;
  Tensor dz = wanted(x, need_residual || (shared && needs[0]), a.dz);
  Tensor dx = wanted(x, !shared && needs[0], a.dx);
  Tensor dlinear_bias =
      wanted(linear_bias ? *linear_bias : bias, needs[1] && linear_bias, a.dlinear_bias);
  Tensor dweight = wanted(weight, needs[3], a.dweight);
  Tensor dbias = wanted(bias, needs[4], a.dbias);
  kernels_for(op, isa).add_layernorm_backward(a);
  return {
      shared && needs[0] ? dz : dx, dlinear_bias, need_residual ? dz : absent(x), dweight, dbias};
}

}  // namespace bert_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cpu, m) {
  m.def(
      "embed_layernorm_forward(Tensor input_ids, Tensor? token_type_ids, Tensor position_ids, "
      "Tensor word, Tensor position, Tensor? token_type, Tensor weight, Tensor bias, float eps, "
      "int padding_idx, float p, Tensor? seed, bool save, int isa) -> (Tensor, Tensor, Tensor)");
  m.def(
      "embed_layernorm_backward(Tensor dy, Tensor input_ids, Tensor? token_type_ids, "
      "Tensor position_ids, Tensor word, Tensor position, Tensor? token_type, Tensor weight, "
      "Tensor bias, float eps, int padding_idx, float p, Tensor? seed, Tensor mean, Tensor rstd, "
      "bool[] needs, int isa) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_layernorm_forward(Tensor x, Tensor? linear_bias, Tensor? residual, Tensor weight, "
      "Tensor bias, float eps, float p, Tensor? seed, bool save, int isa) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "add_layernorm_backward(Tensor dy, Tensor x, Tensor? linear_bias, Tensor? residual, "
      "Tensor weight, Tensor bias, float eps, float p, Tensor? seed, Tensor mean, Tensor rstd, "
      "bool[] needs, int isa) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cpu, CPU, m) {
  m.impl("embed_layernorm_forward", TORCH_BOX(&bert_fast::cpu::embed_layernorm_forward));
  m.impl("embed_layernorm_backward", TORCH_BOX(&bert_fast::cpu::embed_layernorm_backward));
  m.impl("add_layernorm_forward", TORCH_BOX(&bert_fast::cpu::add_layernorm_forward));
  m.impl("add_layernorm_backward", TORCH_BOX(&bert_fast::cpu::add_layernorm_backward));
}
