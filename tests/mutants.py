"""Plants known bugs one at a time and checks that the tests see each: `make mutants`.

A test that cannot fail is a defect. Every mutant replaces one piece of text in a copy of the
checkout (the extension is rebuilt for C++), runs the tests that guard that place, and is caught
when they fail. Exit code 0: all caught.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PARITY = "tests/test_parity.py"


class Mutant(NamedTuple):
    """`old` must occur exactly once in `file`; `tests` are pytest arguments that must fail."""

    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def parity(which: str) -> tuple[str, ...]:
    return (PARITY, "-k", f"test_eager and {which}")


CPU, TRITON = "kernels/csrc/cpu/", "kernels/_triton/"
MODEL, FAMILIES = ("tests/test_model.py",), ("tests/test_families.py",)
TRAINING = "bert_fast/training/"
LOOP, PRETRAINING = ("tests/test_training_loop.py",), ("tests/test_pretraining.py",)
SPANS, FINETUNE = ("tests/test_spans.py",), ("tests/test_finetune.py",)
ENCODER = ("tests/test_encoder.py",)
EMULATED = ("tests/test_emulation.py",)
COPIES = "bert_fast/ops/weight_copies.py"
MUTANTS = [
    # C++
    Mutant("add_layernorm: eps lost", CPU + "layernorm.inc.h",
           "float(a.cols) + a.eps)", "float(a.cols))",
           parity("add_layernorm and (avx512 or avx2) and small_variance")),
    Mutant("add_layernorm: residual lost", CPU + "layernorm.inc.h",
           "if (residual) sum += load(residual + i, lanes);", "",
           parity("add_layernorm and (avx512 or avx2) and bert")),
    Mutant("add_layernorm: linear bias lost", CPU + "layernorm.inc.h",
           "if (linear_bias) sum += load(linear_bias + i, lanes);", "",
           parity("add_layernorm and avx2 and bert")),
    Mutant("layernorm backward: mean(g xhat) lost", CPU + "layernorm.inc.h",
           "- mean_g - load(buffers.z + i) * mean_gx) * rstd", "- mean_g) * rstd",
           parity("layernorm and (avx512 or avx2) and bert")),
    Mutant("tiles: only the last slice of the depth counts", CPU + "tiles.inc.h",
           "load_sums<N>(c, row_c);", "zero_sums<N>();", EMULATED),
    Mutant("tiles: the second tile of columns read twice", CPU + "tiles.inc.h",
           "right + 2 * W, row_b", "right + W, row_b", EMULATED),
    Mutant("tiles: half of a group of bytes", CPU + "tiles.inc.h",
           "k < depth; k += 4 * kTilePairs", "k < depth / 2; k += 4 * kTilePairs", EMULATED),
    Mutant("attention by tiles: earlier blocks not rescaled", CPU + "attention_operands.inc.h",
           "store(sums + i, load(sums + i) * load(factors + i))", "(void)factors", EMULATED),
    Mutant("attention by tiles: keys from the first one in every block",
           CPU + "attention_operands.inc.h", "values + key / 2, value_row", "values, value_row",
           EMULATED),
    Mutant("team: nobody waits at the end of a section", CPU + "threads.cpp",
           "return member.team->wait();", "return;", ENCODER),
    Mutant("encoder: the residual is not of the rows asked for", CPU + "encoder.cpp",
           "residual = gather(x,", "gather(x,", parity("encoder and rows")),
    Mutant("encoder: rows taken in every layer", CPU + "encoder.cpp",
           "chosen && i == count - 1;", "chosen;", parity("encoder and rows")),
    Mutant("encoder: the first sequences' bias for all", CPU + "encoder.cpp",
           "first * a.bias_batch", "0", ENCODER),
    Mutant("encoder: first keys counted from the first row of all", CPU + "encoder.cpp",
           "int32_t(all.key_start[b] - chunk.row)", "all.key_start[b]", ENCODER),
    Mutant("encoder: rows dealt to the chunk after theirs", CPU + "encoder.cpp",
           "*(after - 1)", "*(after == chunks.end() ? after - 1 : after)", ENCODER),
    Mutant("encoder: the first layer's weights in all", CPU + "encoder.cpp",
           "layer_at(op, weights, i, like", "layer_at(op, weights, 0, like",
           parity("encoder and rows")),
    Mutant("structure: hooks added later are not seen", "bert_fast/structure.py",
           " or found.hooks != hooks", "", ENCODER),
    Mutant("structure: classes changed later are not seen", "bert_fast/structure.py",
           "            list(map(type, self.modules)),\n", "", ENCODER),
    Mutant("structure: replaced parameters are not seen", "bert_fast/structure.py",
           " and all(map(is_, parameters, self.parameters))", "", ENCODER),
    Mutant("spans: padding spared where a loss may read it", "bert_fast/reading.py",
           "if model.training or labelled or", "if", ("tests/test_last_layer.py",)),
    Mutant("spans: padding may be the best place", "bert_fast/reading.py",
           "torch.finfo(logits.dtype).min", "0.0", ("tests/test_last_layer.py",)),
    Mutant("encoder: an eps set later is not seen", "bert_fast/paths.py",
           "norm.eps != plain.eps", "False", ENCODER),
    Mutant("linear: bias lost", CPU + "linear.inc.h",
           "load(strip + j * W) + shift[j % kMaxVectors]", "load(strip + j * W)",
           parity("linear-avx2 and qkv")),
    Mutant("linear_int8: the least of a group lost", CPU + "product_int8.inc.h",
           "whole, shift);", "whole, vf{});", parity("linear_int8-avx2")),
    Mutant("linear_int8: eight overflow 16 bits", CPU + "product_int8.inc.h",
           "kMostOfEight = 254.0f", "kMostOfEight = 4096.0f", parity("int8-avx2 and greatest")),
    Mutant("linear_int8: rounded towards zero", CPU + "product_int8.inc.h",
           "int32_t(__builtin_rintf(levels[k]))", "int32_t(levels[k])", parity("linear_int8-avx2")),
    Mutant("linear_int8: the first group's range for all", CPU + "product_int8.inc.h",
           "ranges + g * rows, w", "ranges, w", parity("linear_int8-avx2 and blocks")),
    Mutant("int8: another precision without a word", "bert_fast/modeling.py",
           "if dtype and why and not tracing():", "if False:", ("tests/test_int8.py",)),
    Mutant("linear_fp8: the scales of columns lost", TRITON + "linear.py",
           "acc *= tiles.load(b_scale + o_n, m_n)[None, :]", "pass", parity("linear_fp8-triton")),
    Mutant("linear_fp8: the first row's scale for all", TRITON + "linear.py",
           "tiles.load(a_scale + o_m, m_m)", "tiles.load(a_scale + o_m * 0, m_m)",
           parity("linear_fp8-triton")),
    Mutant("linear_fp8: not a number becomes one", TRITON + "linear_fp8.py",
           'tl.where(exponent == 255, float("nan"), b_scale)', "b_scale", ("tests/test_fp8.py",)),
    Mutant("linear_fp8: the bias lost before an activation", "bert_fast/ops/linear_fp8.py",
           "args = (y, bias, activation)", "args = (y, None, activation)", ("tests/test_fp8.py",)),
    Mutant("graphs: the last batch's sequences stay", "bert_fast/graphs.py",
           "        rest.clamp_max_(self.ids.shape[0])\n", "", ("tests/test_graphs.py",)),
    Mutant("graphs: weights written to later are not seen", "bert_fast/graphs.py",
           "*map(_version, self.parameters), ", "0, ", ("tests/test_graphs.py",)),
    Mutant("graphs: a result is the graph's own memory", "bert_fast/graphs.py",
           "rows.shape[0]].clone()", "rows.shape[0]]", ("tests/test_graphs.py",)),
    Mutant("pretrain: keys of their own in a mimetic start", TRAINING + "mimetic.py",
           "layer.attention.self.key.weight.copy_(layer.attention.self.query.weight)", "pass",
           PRETRAINING),
    Mutant("linear: sums of earlier blocks of depth lost", CPU + "product.inc.h",
           "run.template operator()<true>();", "run.template operator()<false>();",
           parity("linear-avx2 and blocks and float32")),
    Mutant("linear: a column too many in the panel's tail", CPU + "linear.inc.h",
           "smaller(kPanel, a.cols - col)", "kPanel",
           parity("linear-avx2 and odd")),
    Mutant("feed_forward: sums of earlier slices lost", CPU + "feed_forward.inc.h",
           "multiply_by_panel<true>", "multiply_by_panel<false>",
           parity("feed_forward-avx2 and blocks and float32")),
    Mutant("feed_forward: rows of one thread lost", CPU + "feed_forward.inc.h",
           "const int64_t top = a.rows * begin / threads",
           "const int64_t top = a.rows * begin / threads + (begin > 0)",
           parity("feed_forward-avx2 and blocks and float32")),
    Mutant("bias_gelu: tanh for erf", CPU + "bias_gelu.inc.h",
           "u[i] *= phi[i]", "u[i] *= sigmoid(tanh_argument(u[i]))",
           parity("bias_gelu and generic and tails and float32")),
    Mutant("bias_gelu backward: u phi(u) lost", CPU + "bias_gelu.inc.h",
           "return fma(u * exp(-0.5f * u * u), set1(0.3989422804f), normal_cdf(u));",
           "return normal_cdf(u);",
           parity("bias_gelu and (avx512 or avx2) and gelu")),
    Mutant("attention: last key of a sequence dropped", CPU + "attention_operands.inc.h",
           "return {b, h, first, end - first, first_key, end - first_key};",
           "return {b, h, first, end - first, first_key, larger<int64_t>(0, end - first_key - 1)};",
           parity("attention and (avx512 or avx2) and ragged")),
    Mutant("attention: key_start ignored", CPU + "attention_operands.inc.h",
           "a.key_start ? a.key_start[b] : first", "first",
           parity("attention and (avx512 or avx2) and masked_first_column")),
    Mutant("attention: earlier blocks not rescaled", CPU + "attention.inc.h",
           "store(sum, fma(load(sum), rescale, total));", "store(sum, load(sum) + total);",
           parity("attention and (avx512 or avx2) and longer_than_a_block")),
    Mutant("attention backward: P not normalised again", CPU + "attention_backward.inc.h",
           "const vf norm = sum > 0.f ? 1.f / sum : vf{};", "const vf norm = set1(1.f);",
           ("tests/test_random_configs.py",)),
    Mutant("attention backward: delta not corrected", CPU + "attention_backward.inc.h",
           "p * (load(dscores + j) - rest) * dscale", "p * load(dscores + j) * dscale",
           ("tests/test_random_configs.py",)),
    Mutant("pool: mean divides by one too many", CPU + "pool.inc.h",
           "store(v + i, load(v + i, lanes) / float(rows), lanes);",
           "store(v + i, load(v + i, lanes) / float(rows + 1), lanes);",
           parity("pool and (avx512 or avx2) and mean")),
    # Triton
    Mutant("row statistics: variance over one element less", TRITON + "tiles.py",
           "var = tl.sum(centred * centred, 1) / n_cols",
           "var = tl.sum(centred * centred, 1) / (n_cols - 1)",
           parity("add_layernorm and triton and bert")),
    Mutant("row statistics: E[x^2] - E[x]^2", TRITON + "tiles.py",
           "var = tl.sum(centred * centred, 1) / n_cols",
           "var = tl.sum(z * z, 1) / n_cols - mean * mean",
           parity("add_layernorm and triton and offset")),
    Mutant("row statistics in half precision", TRITON + "tiles.py",
           "mean = tl.sum(z, 1) / n_cols",
           "mean = (tl.sum(z, 1) / n_cols).to(tl.float16).to(tl.float32)",
           parity("add_layernorm and triton and bert and float32")),
    Mutant("gelu: tanh for erf", TRITON + "tiles.py",
           "y = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))",
           "y = u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))",
           parity("bias_gelu and triton and tails and float32")),
    Mutant("dropout: mask shifted by a column group", TRITON + "tiles.py",
           "group = (col // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)",
           "group = (1 + col // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)",
           parity("add_layernorm and triton and dropout")),
    Mutant("attention: key past the end attended", TRITON + "attention_blocks.py",
           "(o_n >= first) & (o_n < length)", "(o_n >= first) & (o_n <= length)",
           parity("attention and triton and ragged")),
    Mutant("attention: key_start ignored", TRITON + "attention_blocks.py",
           "(o_n >= first) & (o_n < length)", "(o_n < length)",
           parity("attention and triton and masked_first_column")),
    Mutant("attention: sequence start off by one", TRITON + "attention_blocks.py",
           "start = tl.load(cu_seqlens + i_seq)\n    length",
           "start = tl.load(cu_seqlens + i_seq) + i_seq\n    length",
           parity("attention and triton and ragged")),
    Mutant("pool: unwritten tail", TRITON + "pool.py",
           "tiles.store(y + i_seq.to(tl.int64) * n_cols + o_col, v, m_col)",
           "tiles.store(y + i_seq.to(tl.int64) * n_cols + o_col, v, o_col < n_cols - 1)",
           parity("pool and triton and mean")),
    Mutant("pool: columns past the end written", TRITON + "pool.py",
           "tiles.store(y + i_seq.to(tl.int64) * n_cols + o_col, v, m_col)",
           "tiles.store(y + i_seq.to(tl.int64) * n_cols + o_col, v, o_col < n_cols + 3)",
           parity("pool and triton and empty_sequences")),
    # The model
    Mutant("model: no attention scale", "bert_fast/modeling.py",
           "qkv.shape[3] ** -0.5,", "1.0,", (*MODEL, "-k", "test_shapes")),
    Mutant("model: bias of the output projection lost", "bert_fast/modeling.py",
           "return y, part.bias\n", "return y, None\n", (*MODEL, "-k", "test_shapes")),
    Mutant("last layer: other rows than those read", "bert_fast/modeling.py",
           "context, h = ops.unpad(context, rows, use), ops.unpad(h, rows, use)",
           "context, h = ops.unpad(context, rows, use), ops.unpad(h, rows.flip(0), use)",
           ("tests/test_last_layer.py",)),
    Mutant("embed: vectors of equal texts in other places", "bert_fast/encode.py",
           "else out[which]", "else out[which[::-1]]",
           ("tests/test_encode.py", "-k", "equal_texts")),
    Mutant("model: position ids packed as if without padding", "bert_fast/modeling.py",
           "packing.unpad_ids(batch.position_ids),",
           "torch.arange(batch.tokens, device=ids.device) % packing.length,",
           (*MODEL, "-k", "test_masks")),
    Mutant("model: hidden column 0 attended", "bert_fast/padding.py",
           "key_start = (bounds[:-1] + hidden_first.int()) if any_hidden_first else None",
           "key_start = None", (*MODEL, "-k", "first_hidden")),
    Mutant("model: hidden column 0 dropped", "bert_fast/padding.py",
           "        keep[:, 0] = True\n", "", (*MODEL, "-k", "first_hidden or nothing_left")),
    Mutant("model: 4D mask inverted", "bert_fast/inputs.py",
           "zero.where(mask, -torch.inf)", "zero.where(~mask, -torch.inf)",
           (*MODEL, "-k", "4d_bool")),
    Mutant("model: key and value swapped in the packed projection", "bert_fast/modeling.py",
           "three = (m.query, m.key, m.value)", "three = (m.query, m.value, m.key)",
           (*MODEL, "-k", "test_shapes")),
    Mutant("model: stale packed weights", COPIES,
           "if found is None or found.stamp != stamp:", "if found is None:",
           ("tests/test_accelerate.py", "-k", "changed_weights")),
    Mutant("model: writes through .data unseen", COPIES,
           "stamp += (_fingerprint(given),)", "pass",
           ("tests/test_accelerate.py", "-k", "through_data")),
    Mutant("model: only the first element of a weight tells of a write", CPU + "fingerprint.cpp",
           "weight.size(d) / (2 * kSamples) * weight.stride(d)", "0",
           ("tests/test_accelerate.py", "-k", "through_data")),
    Mutant("model: a hook on the encoder sees what a head asked for", "bert_fast/packed.py",
           "        and not sees_output(encoder)\n", "",
           ("tests/test_last_layer.py", "-k", "reads_the_encoders_output")),
    Mutant("model: accelerate starts threads that a fork loses", "bert_fast/probe.py",
           "apart.submit(_asked, original, forwards, difference).result()",
           "_asked(original, forwards, difference)", ("tests/test_accelerate.py", "-k", "fork")),
    Mutant("model: dropout off in training", "bert_fast/modeling.py",
           "return dropout.p if dropout is not None and dropout.training else 0.0", "return 0.0",
           (*MODEL, "-k", "dropout_trains")),
    Mutant("roberta: positions are columns", "bert_fast/inputs.py",
           "return real.cumsum(1) * real + first - 1", "return real.cumsum(1) + first - 1",
           (*FAMILIES, "-k", "gradients and RobertaModel and float32")),
    Mutant("roberta: the padding position is trained", "bert_fast/modeling.py",
           "return torch.where(rows == row, table.detach(), table)", "return table",
           (*FAMILIES, "-k", "gradients and RobertaModel and float32")),
    Mutant("mpnet: holes packed under a bias by columns", "bert_fast/inputs.py",
           "return bool((keep[:, 1:] & ~keep[:, :-1]).any())", "return False",
           (*FAMILIES, "-k", "gradients and MPNetModel and float32")),
    Mutant("albert: one layer too few", "bert_fast/families.py",
           "for i in range(config.num_hidden_layers)",
           "for i in range(config.num_hidden_layers - 1)",
           (*FAMILIES, "-k", "gradients and AlbertModel and float32")),
    Mutant("compile: padding attended", "bert_fast/padding.py",
           "key_start = torch.cat((bounds[:batch] + hidden_first, bounds[batch + 1 :]))",
           "key_start = torch.cat((bounds[:batch] + hidden_first, bounds[batch:-1]))\n"
           "    bounds = torch.cat((bounds[:batch], bounds[batch + 1 :], bounds[-1:]))",
           ("tests/test_compile.py", "-k", "many_shapes and False")),
    Mutant("compile: padded rows not zeroed", "bert_fast/padding.py",
           "return x if self.real is None else x.masked_fill(~self.real.unsqueeze(-1), 0.0)",
           "return x", ("tests/test_compile.py", "-k", "many_shapes and False")),
    Mutant("autocast: ignored", "bert_fast/modeling.py",
           "return x.to(torch.get_autocast_dtype(x.device.type))", "return x",
           ("tests/test_compile.py", "-k", "autocast")),
    Mutant("attention by name: no mask function", "bert_fast/attention_interface.py",
           "    AttentionMaskInterface.register(NAME, attention_mask)\n", "",
           ("tests/test_ecosystem.py", "-k", "attention_by_name")),
    Mutant("a changed class is not seen", "bert_fast/probe.py",
           "None if found < 1e-4 else", "None if True else",
           (*FAMILIES, "-k", "unknown_layout and scaled")),
    Mutant("masked_lm_loss: only the first chunk's dW", "bert_fast/ops/masked_lm_loss.py",
           "dw.addmm_(g.t(), some)", "dw.copy_(g.t() @ some)",
           parity("masked_lm_loss and chunks and float32")),
    Mutant("masked_lm_loss: mean over all rows", "bert_fast/ops/masked_lm_loss.py",
           "total.new_full((), kept.shape[0])", "total.new_full((), x.shape[0])",
           parity("masked_lm_loss and fifteen")),
    Mutant("masked_lm_loss: p for p - 1", "bert_fast/ops/masked_lm_loss.py",
           "log_p.new_full(target.shape, -1.0)", "log_p.new_zeros(target.shape)",
           parity("masked_lm_loss and every_row")),
    Mutant("masked_lm_loss: fp16 gradients not scaled back", "bert_fast/ops/masked_lm_loss.py",
           "dx, dw = dx / scale, dw / scale", "pass",
           parity("masked_lm_loss and odd and float16")),
    Mutant("splade: the first token wins", "bert_fast/ops/splade.py",
           "won[b, words] = index + first", "won[b, words] = first",
           parity("splade and ragged and float32")),
    Mutant("splade: relu's gradient everywhere", "bert_fast/ops/splade.py",
           "torch.where(top > 0, 1 / (1 + top), 0.0)", "1 / (1 + top)",
           parity("splade and odd and float32")),
    Mutant("splade: log1p's slope lost", "bert_fast/ops/splade.py",
           "torch.where(top > 0, 1 / (1 + top), 0.0)", "torch.where(top > 0, 1.0, 0.0)",
           parity("splade and odd and float32")),
    Mutant("splade: bias before an empty sequence's zero", "bert_fast/ops/splade.py",
           "(cu_seqlens.diff() == 0)", "(cu_seqlens.diff() < 0)",
           parity("splade and empty and float32")),
    Mutant("splade: an empty sequence overwrites a token's gradient", "bert_fast/ops/splade.py",
           "dense.scatter_add_(", "dense.scatter_(", parity("splade and empty and float32")),
    Mutant("splade: masked rows pooled", "bert_fast/masked_lm.py",
           "packing.indices is None or packing.key_start is not None", "False",
           ("tests/test_splade.py",)),
    Mutant("qkv_linear: a stale copy of trained weights", "bert_fast/ops/qkv_linear.py",
           "trained = save and any", "trained = not save and any",
           (PARITY, "-k", "gradcheck and qkv")),
    Mutant("a reference whose gradient is another", "bert_fast/ops/pool.py",
           "total / lengths.clamp(min=1)", "total.detach() / lengths.clamp(min=1)",
           (PARITY, "-k", "gradcheck and pool")),
    Mutant("feed_forward: u for activation(u)", "bert_fast/ops/feed_forward.py",
           "save=False)[0] if needs[3] else u", "save=False)[0] if not needs[3] else u",
           parity("feed_forward and aten and qkv")),
    Mutant("feed_forward: bias lost where recomputed", "bert_fast/ops/feed_forward.py",
           "u = second.forward(x, up, up_bias, save=False)[0]",
           "u = second.forward(x, up, None, save=False)[0]",
           parity("feed_forward and aten and recompute_qkv")),
    Mutant("head: next-sentence loss lost", "bert_fast/masked_lm.py",
           'fields["loss"] = fields["loss"] + other', "pass",
           ("tests/test_masked_lm.py", "-k", "every_head and BertForPreTraining")),
    Mutant("head: labels not packed as tokens are", "bert_fast/padding.py",
           "return self.unpad_ids(labels)", "return labels.flatten()[: self.indices.shape[0]]",
           ("tests/test_masked_lm.py", "-k", "every_head and BertForMaskedLM")),
    Mutant("training: inner states kept in spite of selective", "bert_fast/ops/feed_forward.py",
           "keep = save and not recompute", "keep = save",
           ("tests/test_training.py", "-k", "keeps")),
    Mutant("autograd: gradient of the wrong argument", "bert_fast/ops/registry.py",
           "grads[2 + i] = grad\n", "grads[1 + i] = grad\n",
           parity("bias_gelu and (avx512 or avx2)")),
    # Training
    Mutant("loop: a mean of means", TRAINING + "loop.py",
           "share = self._counts(inputs, means.device) / num_items_in_batch",
           "share = torch.full_like(means, 1 / self.args.gradient_accumulation_steps)",
           (*LOOP, "-k", "split_batch")),
    Mutant("loop: half a checkpoint is taken", TRAINING + "loop.py",
           "whole = [checkpoint for checkpoint in checkpoints if _whole(checkpoint)]",
           "whole = checkpoints", (*LOOP, "-k", "half")),
    Mutant("loop: the matmul's rate takes random numbers of the run", TRAINING + "throughput.py",
           "device=device, generator=generator)", "device=device)", (*LOOP, "-k", "killed")),
    Mutant("lamb: no trust ratio", TRAINING + "lamb.py",
           "torch.where((size > 0) & (length > 0), size / length, 1.0)", "1.0",
           (*LOOP, "-k", "lamb")),
    Mutant("masking: specials chosen", TRAINING + "masking.py",
           "candidates = np.flatnonzero(~self.special[ids])", "candidates = np.arange(len(ids))",
           (*PRETRAINING, "-k", "masking")),
    Mutant("masking: every choice a mask", TRAINING + "masking.py",
           "masked[chosen[fate < 0.8]] = self.mask", "masked[chosen] = self.mask",
           (*PRETRAINING, "-k", "masking")),
    Mutant("pairs: a foreign B of any length", TRAINING + "pairs.py",
           "chosen = chosen[np.lexsort((a[chosen], b[chosen]))]", "pass",
           (*PRETRAINING, "-k", "lengths")),
    Mutant("pairs: a foreign B of the same document", TRAINING + "pairs.py",
           "foreign = document[donor] != document", "foreign = donor != np.arange(len(donor))",
           (*PRETRAINING, "-k", "test_pairs")),
    # Fine-tuning
    Mutant("SQuAD: articles before punctuation", TRAINING + "squad_metrics.py",
           "bare = answer.lower().translate(WITHOUT_PUNCTUATION)\n    return "
           '" ".join(ARTICLES.sub(" ", bare).split())',
           'bare = ARTICLES.sub(" ", answer.lower())\n    return '
           '" ".join(bare.translate(WITHOUT_PUNCTUATION).split())',
           ("tests/test_squad_metrics.py",)),
    Mutant("SQuAD: repeated words count once", TRAINING + "squad_metrics.py",
           "sum((Counter(found) & Counter(wanted)).values())", "len(set(found) & set(wanted))",
           ("tests/test_squad_metrics.py",)),
    Mutant("spans: half an answer is one", TRAINING + "spans.py",
           "if low <= place[0] and place[1] <= high and len(inside):", "if len(inside):",
           SPANS),
    Mutant("spans: the last window's null score", TRAINING + "spans.py",
           "min(nulls[feature.question], null)", "null", SPANS),
    Mutant("spans: padding is an answer", TRAINING + "spans.py",
           "feature.first + len(feature.offsets))", "None)", SPANS),
    Mutant("spans: padding in the loss", TRAINING + "answers.py",
           ".masked_fill(padding, -torch.inf)", "",
           (*FINETUNE, "-k", "own_forward and spans")),
    Mutant("tokens: every piece of a word is labelled", TRAINING + "tasks.py",
           "if word is not None and word != before:", "if word is not None:",
           (*FINETUNE, "-k", "first_piece")),
    Mutant("accuracy of other rows", TRAINING + "items.py",
           "found[row] = tuple(", "found[i] = tuple(", (*FINETUNE, "-k", "accuracy_is")),
    Mutant("labels by their digits", TRAINING + "readers.py",
           "sorted(names, key=int)", "sorted(names)",
           ("tests/test_training_data.py", "-k", "label_names")),
]  # fmt: skip


def copy_checkout(into: Path) -> None:
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
    # An editable install would resolve this package to the original checkout.
    (into / "bert_fast" / "_triton").symlink_to(into / "kernels" / "_triton")


def build(where: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def caught(where: Path, tests: tuple[str, ...]) -> bool:
    """Whether the tests fail, or die of a signal, as writes outside an array make them do.

    Anything else (no tests, an error of pytest's own) is a defect.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    if done.returncode > 1:
        raise RuntimeError(f"pytest exited {done.returncode}: {done.stdout[-2000:]}")
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--only", default="", help="mutants whose bug or file contains this text")
    only = parser.parse_args().only
    chosen = [m for m in MUTANTS if only in m.bug or only in m.file]
    if not chosen:
        parser.error(f"--only {only!r}: no mutant's bug or file contains this")
    console, table = Console(), Table("bug", "file", "seconds", "caught")
    missed, stale = 0, False
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        copy_checkout(where)
        build(where)
        for tests in sorted({m.tests for m in chosen}):
            if caught(where, tests):
                console.print(f"these tests fail without any bug: {' '.join(tests)}")
                return 2
        for mutant in chosen:
            start, file = time.monotonic(), where / mutant.file
            healthy = file.read_text()
            if healthy.count(mutant.old) != 1:
                raise RuntimeError(f"{mutant.bug}: its text is not once in {mutant.file}")
            file.write_text(healthy.replace(mutant.old, mutant.new))
            native = mutant.file.startswith("kernels/csrc") and mutant.tests != EMULATED
            if native or stale:
                build(where)
            stale = native  # the next build takes this bug out again
            seen = caught(where, mutant.tests)
            file.write_text(healthy)
            missed += not seen
            took = f"{time.monotonic() - start:.0f}"
            table.add_row(mutant.bug, mutant.file, took, "yes" if seen else "NO")
            console.print(f"{'caught' if seen else 'MISSED'}: {mutant.bug}")
    console.print(table)
    console.print(f"{len(chosen) - missed} of {len(chosen)} planted bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
