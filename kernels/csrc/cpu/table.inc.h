// Every kernel body, and the table of those compiled for this file's instruction set.
#pragma once

#include "cpu/attention_backward.inc.h"
#include "cpu/bias_gelu.inc.h"
#include "cpu/feed_forward.inc.h"
#include "cpu/layernorm.inc.h"
#include "cpu/pool.inc.h"

namespace bert_fast::cpu::BERT_FAST_ISA {

template <bool DOT>
constexpr Kernels kernels_with = {
    embed_layernorm_forward, embed_layernorm_backward, add_layernorm_forward,
    add_layernorm_backward,  bias_gelu_forward,        bias_gelu_backward,
    kPairs,                  kPanel,                   packed_bytes,             pack_weight,
    linear_forward<DOT>,     feed_forward_fits,        feed_forward_forward<DOT>,
    pool_forward,            pool_backward,            attention_forward,        attention_backward,
};

constexpr Kernels kernels = kernels_with<kHasDot>;

}  // namespace bert_fast::cpu::BERT_FAST_ISA
