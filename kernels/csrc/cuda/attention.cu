// The checking wrapper of the attention kernel, and its registration.
#include "attention.cuh"

namespace bert_fast {
namespace {

constexpr const char* kOp = "bert_fast_cuda::attention";

template <typename Shape>
void launch(AttentionArguments args, int64_t sequences, int64_t max_seqlen, cudaStream_t stream) {
  const int64_t tiles = ceil_div(max_seqlen, Shape::kQueryTile);
  STD_TORCH_CHECK(tiles * sequences <= INT32_MAX, kOp, ": too many query tiles for one launch");
  args.tiles = static_cast<int>(tiles);
  const auto kernel = attention_forward_kernel<Shape>;
  if (Shape::kSharedBytes > 48 * 1024)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        Shape::kSharedBytes));
  const dim3 grid(tiles * sequences, args.heads);
  kernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(args);
  BERT_FAST_LAUNCH_CHECK();
}

template <typename T, int D>
void launch_width(const AttentionArguments& args, int64_t sequences, int64_t max_seqlen,
                  cudaStream_t stream) {
  constexpr int kSmallWarps = D == 128 ? 8 : 4;
  if (args.dropout.seed != nullptr)
    return launch<AttentionShape<T, D, kSmallWarps, 1, true>>(args, sequences, max_seqlen, stream);
  // 32 rows a warp: not at D = 128, for the registers, nor where half a tile would stay empty or
  // some multiprocessor of a large GPU without one.
  if constexpr (D < 128) {
    if (max_seqlen > 64 && ceil_div(max_seqlen, 128) * sequences * args.heads >= 132)
      return launch<AttentionShape<T, D, 4, 2, false>>(args, sequences, max_seqlen, stream);
  }
  return launch<AttentionShape<T, D, kSmallWarps, 1, false>>(args, sequences, max_seqlen, stream);
}

template <typename T>
void dispatch_width(const AttentionArguments& args, int64_t width, int64_t sequences,
                    int64_t max_seqlen, cudaStream_t stream) {
  if (width == 32) return launch_width<T, 32>(args, sequences, max_seqlen, stream);
  if (width == 64) return launch_width<T, 64>(args, sequences, max_seqlen, stream);
  return launch_width<T, 128>(args, sequences, max_seqlen, stream);
}

std::tuple<Tensor, Tensor> attention_forward(Tensor qkv, Tensor cu_seqlens, MaybeTensor key_start,
                                             MaybeTensor bias, int64_t max_seqlen, double scale,
                                             double p, MaybeTensor seed, bool save) {
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3, kOp, ": qkv must be [T, 3, N, D]");
  const int64_t tokens = qkv.size(0), heads = qkv.size(2), width = qkv.size(3);
  STD_TORCH_CHECK(width == 32 || width == 64 || width == 128, kOp,
                  ": head_dim must be 32, 64 or 128, got ", width);
  STD_TORCH_CHECK(!bias.has_value(), kOp, ": an additive bias is not supported");
  STD_TORCH_CHECK(scale > 0.0, kOp, ": scale must be positive, got ", scale);
  STD_TORCH_CHECK(tokens <= INT32_MAX && heads <= 65535, kOp, ": too many tokens or heads");
  check_float(kOp, "qkv", qkv, qkv, {tokens, 3, heads, width});
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, kOp,
                  ": cu_seqlens must be [B + 1]");
  const int64_t sequences = cu_seqlens.size(0) - 1;
  const auto check_offsets = [&](const char* name, const Tensor& offsets, int64_t size) {
    STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int, kOp, ": ", name, " must be int32");
    check_tensor(kOp, name, offsets, qkv, {size});
  };
  check_offsets("cu_seqlens", cu_seqlens, sequences + 1);
  if (key_start.has_value()) check_offsets("key_start", *key_start, sequences);
  const Dropout dropout = make_dropout(kOp, p, seed, qkv);

  const OnDevice device(qkv);
  const Tensor out = torch::stable::new_empty(qkv, {tokens, heads, width});
  const Tensor lse = save ? torch::stable::new_empty(qkv, {heads, tokens}, ScalarType::Float)
                          : torch::stable::new_empty(qkv, {0}, ScalarType::Float);
  if (tokens == 0 || heads == 0 || sequences == 0 || max_seqlen <= 0) return {out, lse};
  // Copies move 16 bytes: a view that starts elsewhere is copied first.
  const Tensor source = aligned(qkv.const_data_ptr()) ? qkv : torch::stable::clone(qkv);
  AttentionArguments args{};
  args.qkv = source.const_data_ptr();
  args.cu_seqlens = data<int32_t>(cu_seqlens);
  args.key_start = data<int32_t>(key_start);
  args.out = out.mutable_data_ptr();
  args.lse = output<float>(lse);
  args.tokens = tokens;
  args.heads = static_cast<int>(heads);
  args.scale = static_cast<float>(scale);
  args.dropout = dropout;
  switch (qkv.scalar_type()) {
    case ScalarType::Half:
      dispatch_width<__half>(args, width, sequences, max_seqlen, device.stream());
      break;
    case ScalarType::BFloat16:
      dispatch_width<__nv_bfloat16>(args, width, sequences, max_seqlen, device.stream());
      break;
    default:
      STD_TORCH_CHECK(false, kOp, ": dtype must be float16 or bfloat16");
  }
  return {out, lse};
}

}  // namespace
}  // namespace bert_fast

// ---- registration ----

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast_cuda, m) {
  m.def(
      "attention_forward(Tensor qkv, Tensor cu_seqlens, Tensor? key_start, Tensor? bias, "
      "int max_seqlen, float scale, float p, Tensor? seed, bool save) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cuda, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&bert_fast::attention_forward));
}
