// Ops that are steps of `padded_encoder` too.
#pragma once

#include <tuple>

#include "cpu/dispatch.h"

namespace bert_fast::cpu {

std::tuple<Tensor, Tensor, Tensor> embed_layernorm_forward(
    const Tensor& input_ids, const OptionalTensor& token_type_ids, const Tensor& position_ids,
    const Tensor& word, const Tensor& position, const OptionalTensor& token_type,
    const Tensor& weight, const Tensor& bias, double eps, int64_t padding_idx, double p,
    const OptionalTensor& seed, bool save, int64_t isa);

Tensor encoder_states(
    const Tensor& x, const Tensor& cu_seqlens, const OptionalTensor& key_start,
    const OptionalTensor& bias, const OptionalTensor& rows, const Tensor& table, double eps,
    Activation activation, bool team, int64_t isa);

// y [rows, H], y[indices] = x, zeros elsewhere.
Tensor scatter(
    const char* op, const char* name, const Tensor& x, const Tensor& indices, int64_t rows,
    int64_t isa);

}  // namespace bert_fast::cpu
