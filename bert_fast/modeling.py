"""The packed encoder: its forward reads as the list of fusions.

It works on the modules of a Hugging Face model (by their attribute names, without importing
transformers; see `families`) and on packed tokens [T, H]; see `padding` for the way in and out.
Architecture: Devlin et al., arXiv 1810.04805 (post-LN Transformer encoder, Vaswani et al.,
arXiv 1706.03762).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from . import layer_node, ops
from .casting import cast
from .families import LayerParts, family_of
from .inputs import Batch, read_batch
from .notice import warn_once
from .ops.backends import ISAS
from .ops.embed_layernorm import OP as EMBED
from .ops.encoder import preferred
from .ops.modes import tracing
from .ops.qkv_linear import packed
from .ops.rng import draw_seeds
from .paths import (
    Backend,
    Sequences,
    chosen,
    in_one_call,
    like,
    reasons_against_8_bits,
    reasons_against_one_call,
    reasons_against_plain,
)
from .structure import Embeddings, Structure, activation_name, structure_of

# What training keeps of a layer: all but what an elementwise pass restores; not the inner states
# of the feed-forward network either (one GEMM more); its input only (the whole layer again).
CHECKPOINTS = ("none", "selective", "full")


def encode(
    model: nn.Module,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    backend: Backend = "auto",
    rows: Tensor | None = None,
    dtype: str | None = None,
) -> Tensor:
    """The last hidden states of packed tokens, without any padding on the way.

    Args:
        model: a Hugging Face model of a family in `families.FAMILIES` (accelerated or not).
        input_ids: [T], int32 or int64, the tokens of all sequences one after the other.
        cu_seqlens: [B + 1] int32, where each sequence starts, and T.
        max_seqlen: an upper bound of the longest sequence.
        token_type_ids: [T] or None (type 0).
        position_ids: [T] or None (counted within each sequence, as transformers' embeddings do).
        backend: "auto", one backend for every op, or a mapping from op to backend.
        rows: [R] int64, distinct, the tokens whose states are wanted; None: all.
        dtype: of products, as `accelerate` has it.

    Returns: [T, H], or [R, H] in the order of `rows`, in the model's dtype.
    Raises: ValueError for a sequence longer than the position table and for a model that cannot
        run packed; what the ops raise.
    """
    family = family_of(model)
    if family is None:
        raise ValueError(f"{type(model).__name__} is of no family that bert_fast packs")
    given = {
        "input_ids": input_ids,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
    }
    inputs = {name: ids.unsqueeze(0) for name, ids in given.items() if ids is not None}
    inputs |= {"cu_seq_lens_q": cu_seqlens, "max_length_q": max_seqlen}
    structure = structure_of(model, family)
    if structure.why:
        raise ValueError(f"{type(model).__name__} cannot run packed: {'; '.join(structure.why)}")
    batch = read_batch(structure, inputs)
    return packed_forward(model, structure, batch, backend, rows=rows, dtype=dtype)


def packed_forward(
    model: nn.Module,
    structure: Structure,
    batch: Batch,
    backend: Backend,
    between: Callable[[Tensor], Tensor] | None = None,
    checkpoint: str = "none",
    rows: Tensor | None = None,
    dtype: str | None = None,
) -> Tensor:
    """Embeddings and every layer on packed tokens -> [T, H], or [R, H] of the rows asked for.

    between: called on the hidden states before the first and after each layer; what it returns
        goes on (how hidden states are collected).
    checkpoint: one of `CHECKPOINTS`, what training keeps of a layer.
    rows: [R] int64, distinct: all that will be read. After its attention, the last layer computes
        nothing else, which changes no value.
    dtype: "int8", "fp8": the layers' products with weights in 8 bits; where that cannot be, says
        why once. None: in the model's own.
    """
    family = structure.family
    h = embed(structure.embeddings, batch, backend)
    projection = family.project(model)
    h = h if projection is None else linear(projection, h, backend)
    h = h.to(structure.embeddings.words.dtype)  # autocast leaves what a product comes in
    packing, bias = batch.packing, batch.bias
    if family.bias is not None:
        learned = family.bias(model, packing.max_seqlen, packing.cu_seqlens).to(h.dtype)
        if learned.requires_grad:
            raise ValueError("the relative position bias wants a gradient, which there is not")
        bias = learned if bias is None else bias + learned
    sequences = Sequences(packing.cu_seqlens, packing.max_seqlen, packing.key_start, bias)
    return run_layers(structure, h, sequences, backend, between, checkpoint, rows, dtype)


def embed(e: Embeddings, batch: Batch, backend: Backend) -> Tensor:
    """The embedding layer -> packed tokens [T, E]."""
    packing, ids = batch.packing, batch.input_ids
    if not e.fused:
        inputs = batch.embedding_inputs()
        if e.known and not hasattr(e.module, "token_type_embeddings"):
            inputs.pop("token_type_ids", None)  # transformers' models do not hand them on either
        return packing.unpad(e.module(**inputs), chosen(backend, "unpad"))
    assert batch.position_ids is not None
    table, padding_idx = e.words, e.word.padding_idx
    if batch.inputs_embeds is None:
        assert ids is not None
        ids = packing.unpad_ids(ids)
    else:  # rows of a table of their own
        table = packing.unpad(batch.inputs_embeds, chosen(backend, "unpad")).to(table.dtype)
        ids, padding_idx = torch.arange(table.shape[0], device=table.device), None
    has_types = e.types is not None and batch.token_type_ids is not None
    p = rate(e.dropout)
    args = (
        ids,
        packing.unpad_ids(batch.token_type_ids) if has_types else None,
        packing.unpad_ids(batch.position_ids),
        table,
        _learned(e.position, e.positions),
        _learned(e.type, e.types),
        e.scale,
        e.shift,
        e.norm.eps,
        -1 if padding_idx is None else padding_idx,
        p,
        draw_seeds(1, table.device) if p else None,
    )
    use = chosen(backend, "embed_layernorm")
    device = table.device.type
    if device != "cpu" or torch.is_grad_enabled() or tracing() or torch.is_autocast_enabled(device):
        return EMBED(*args, backend=use)
    # What `read_batch` and C++ have not checked of these, nobody can get wrong.
    return EMBED.infer(EMBED.choose(args, use), args)


def _learned(module: nn.Embedding | None, table: Tensor | None) -> Tensor | None:
    """The table; where it is trained, without a gradient for the row of padding, as in HF."""
    row = None if module is None else module.padding_idx
    if table is None or row is None or not (torch.is_grad_enabled() and table.requires_grad):
        return table
    rows = torch.arange(table.shape[0], device=table.device).unsqueeze(1)
    return torch.where(rows == row, table.detach(), table)


def run_layers(
    structure: Structure,
    h: Tensor,
    sequences: Sequences,
    backend: Backend,
    between: Callable[[Tensor], Tensor] | None,
    checkpoint: str,
    rows: Tensor | None = None,
    dtype: str | None = None,
) -> Tensor:
    """Every layer on packed tokens [T, H] -> [T, H] or [R, H]; see `packed_forward`."""
    modules, layers = structure.modules, structure.layers
    recompute = torch.is_grad_enabled() and any(
        m.training and getattr(m, "gradient_checkpointing", False) for m in modules
    )
    if recompute and not h.requires_grad:
        h = h.detach().requires_grad_()  # reentrant checkpoints need an input with a gradient
    dropping = any(switch.training and dropout.p for switch, dropout in structure.dropouts)
    why = other = reasons_against_plain(structure, dropping, h)
    if dtype != "fp8":
        int8 = dtype == "int8" and not h.is_cuda  # there, op by op
        why = why or reasons_against_one_call(structure)
        if not why and chosen(backend, "encoder") == "reference":
            why = ["backends of single ops are asked for"]
        if not why and (int8 or preferred(h) or chosen(backend, "encoder") in ISAS):
            found = in_one_call(structure.plain, h, sequences, backend, between, rows, int8)
            if isinstance(found, Tensor):
                return found
            why = found
    if dtype and not other:
        other = reasons_against_8_bits(dtype, structure.plain, h, backend)
    narrow = None if other else dtype
    if dtype and not narrow and not tracing():
        told = other if h.is_cuda else dict.fromkeys([*why, *other])
        warn_once(f"bert_fast: the layers run in {h.dtype}, not in 8 bits: {'; '.join(told)}")
    seeds = draw_seeds(3 * len(layers), h.device) if dropping else None
    plain = None if narrow or tracing() else structure.plain
    h = h if between is None else between(h)
    for i, (module, layer) in enumerate(zip(modules, layers, strict=True)):
        run = partial(
            layer_forward,
            layer=layer,
            sequences=sequences,
            seeds=None if seeds is None else seeds[3 * i : 3 * i + 3],
            backend=backend,
            recompute=checkpoint == "selective",
            narrow=narrow,
            rows=rows if i == len(layers) - 1 else None,
            weights=plain and plain.of(i),
        )
        if recompute and module.gradient_checkpointing:
            h = module._gradient_checkpointing_func(run, h)
        elif checkpoint == "full" and module.training and torch.is_grad_enabled():
            h = torch.utils.checkpoint.checkpoint(run, h, use_reentrant=False)
        else:
            h = run(h)
        h = h if between is None else between(h)
    return h if layers or rows is None else h[rows]


def layer_forward(
    h: Tensor,
    layer: LayerParts,
    sequences: Sequences,
    seeds: Tensor | None,
    backend: Backend,
    recompute: bool = False,
    narrow: str | None = None,
    rows: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """One post-LN encoder layer on packed tokens [T, H] -> [T, H], or [R, H] of `rows`.

    narrow: "fp8": its products with weights are those of `ops.linear_fp8` and `feed_forward_fp8`;
        "int8": those of `ops.linear_row_int8`. Its linears must be plain ones.
    weights: of a plain layer, in the order of `ops.encoder.LAYER`: it may train as one node.
    """
    m = layer
    s0, s1, s2 = (None, None, None) if seeds is None else seeds.split(1)
    p0 = m.attention_dropout.p if m.attention.training else 0.0
    p1, p2 = rate(m.out_dropout), rate(m.down_dropout)
    if weights is not None and layer_node.applies(h, weights):
        settings = layer_node.Settings(
            sequences, weights[0].shape[0] // m.width, m.scale,
            (m.out_norm.eps, m.down_norm.eps), activation_name(m.activation),
            (p0, p1, p2), (s0 if p0 else None, s1 if p1 else None, s2 if p2 else None),
            recompute, rows, backend,
        )  # fmt: skip
        return layer_node.layer_node(h, weights, settings)

    qkv = project_qkv(m, h, backend, narrow)  # [T, 3, N, D]
    context = ops.attention(
        qkv, sequences.cu_seqlens, sequences.max_seqlen, m.scale,
        sequences.key_start, like(sequences.bias, qkv), p0, s0 if p0 else None,
        chosen(backend, "attention"),
    ).flatten(1)  # fmt: skip
    if rows is not None:
        use = chosen(backend, "unpad")
        context, h = ops.unpad(context, rows, use), ops.unpad(h, rows, use)
    h = add_norm(*without_bias(m.out, context, backend, narrow), h, m.out_norm, p1, s1, backend)
    y, bias = feed_forward(m, h, backend, recompute, narrow)
    return add_norm(y, bias, h, m.down_norm, p2, s2, backend)


# -- the pieces, fused where the module is a plain one; under autocast GEMMs and attention run in
# -- its dtype and norms in that of the weights, as torch.autocast has it for their ATen forms


def project_qkv(m: LayerParts, h: Tensor, backend: Backend, narrow: str | None = None) -> Tensor:
    """[T, H] -> queries, keys and values [T, 3, N, D]."""
    three = (m.query, m.key, m.value)
    if narrow:
        one, bias = packed([part.weight for part in three] + [part.bias for part in three], True)
        qkv = narrow_linear(h, one, bias, backend, narrow)
    elif all(type(part) is nn.Linear for part in three) and (
        len({part.bias is None for part in three}) == 1
    ):
        weights, biases = (part.weight for part in three), (part.bias for part in three)
        x, q, k, v, q_bias, k_bias, v_bias = cast(h, *weights, *biases)
        use = chosen(backend, "qkv_linear")
        qkv = ops.qkv_linear(x, q, k, v, q_bias, k_bias, v_bias, use)
    else:
        qkv = torch.cat([linear(part, h, backend) for part in three], -1)
    return qkv.view(h.shape[0], 3, qkv.shape[1] // (3 * m.width), m.width)


def activated_linear(
    part: nn.Module, activation: nn.Module | str, h: Tensor, backend: Backend
) -> Tensor:
    """activation(part(h)) [T, H] -> [T, F]; the activation is a module or a name of `ops`."""
    name = activation_name(activation)
    if name is None:
        return activation(linear(part, h, backend))  # type: ignore[operator]
    if type(part) is not nn.Linear:
        return ops.bias_gelu(linear(part, h, backend), None, name, chosen(backend, "bias_gelu"))
    x, weight, bias = cast(h, part.weight, part.bias)
    return ops.linear_gelu(x, weight, bias, name, chosen(backend, "linear_gelu"))


def normalized(x: Tensor, norm: nn.Module, backend: Backend) -> Tensor:
    """LayerNorm alone."""
    return ops.add_layernorm(
        x.to(norm.weight.dtype), None, None, norm.weight, norm.bias, norm.eps,
        backend=chosen(backend, "add_layernorm"),
    )  # fmt: skip


def feed_forward(
    m: LayerParts, h: Tensor, backend: Backend, recompute: bool, narrow: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """[T, H] -> [T, H] and the bias that is still to be added."""
    name = activation_name(m.activation)
    plain = type(m.up) is type(m.down) is nn.Linear
    if narrow == "int8":
        assert name is not None
        use = chosen(backend, "linear_row_int8")
        inner = ops.linear_row_int8(h, m.up.weight, m.up.bias, name, use)
        return ops.linear_row_int8(inner, m.down.weight, None, "none", use), m.down.bias
    if narrow:
        assert name is not None
        weights, use = (m.up.weight, m.up.bias, m.down.weight), chosen(backend, "feed_forward_fp8")
        return ops.feed_forward_fp8(h, *weights, name, use), m.down.bias
    if name is None or not plain:
        return without_bias(m.down, activated_linear(m.up, m.activation, h, backend), backend)
    x, up, up_bias, down = cast(h, m.up.weight, m.up.bias, m.down.weight)
    use = chosen(backend, "feed_forward")
    return ops.feed_forward(x, up, up_bias, down, name, recompute, use), m.down.bias


def without_bias(
    part: nn.Module, x: Tensor, backend: Backend, narrow: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """A projection and its bias, which is added in the norm; of another module, all at once."""
    if narrow:
        return narrow_linear(x, part.weight, None, backend, narrow), part.bias
    if type(part) is not nn.Linear:
        return linear(part, x, backend), None
    x, weight = cast(x, part.weight)
    return ops.linear(x, weight, None, chosen(backend, "linear")), part.bias


def narrow_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: Backend, narrow: str
) -> Tensor:
    """A projection in 8 bits."""
    if narrow == "fp8":
        return ops.linear_fp8(x, weight, bias, chosen(backend, "linear_fp8"))
    return ops.linear_row_int8(x, weight, bias, "none", chosen(backend, "linear_row_int8"))


def add_norm(
    y: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: nn.Module,
    p: float,
    seed: Tensor | None,
    backend: Backend,
) -> Tensor:
    """LayerNorm(residual + dropout(y + bias))."""
    return ops.add_layernorm(
        y.to(residual.dtype), bias, residual, norm.weight, norm.bias, norm.eps,
        p, seed if p else None, chosen(backend, "add_layernorm"),
    )  # fmt: skip


def linear(part: nn.Module, x: Tensor, backend: Backend) -> Tensor:
    """A projection: fused where it is a plain nn.Linear, else (LoRA, quantised) its own forward."""
    if type(part) is not nn.Linear:
        return part(x)
    x, weight, bias = cast(x, part.weight, part.bias)
    return ops.linear(x, weight, bias, chosen(backend, "linear"))


def rate(dropout: nn.Module | None) -> float:
    """A dropout module's probability now: 0 in eval mode."""
    return dropout.p if dropout is not None and dropout.training else 0.0
