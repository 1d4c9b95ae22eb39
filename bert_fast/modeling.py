"""The packed BERT encoder: its forward reads as the list of fusions.

It works on the modules of a Hugging Face BERT (by their attribute names, without importing
transformers) and on packed tokens [T, H]; see `padding` for the way in and out. Architecture:
Devlin et al., arXiv 1810.04805 (post-LN Transformer encoder, Vaswani et al., arXiv 1706.03762).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import ops
from .ops.onednn import forget
from .ops.registry import Chooser
from .ops.rng import draw_seeds

Backend = str | Mapping[str, str] | Chooser

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class LayerParts(NamedTuple):
    """The leaf modules of one encoder layer."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_dropout: nn.Dropout
    out: nn.Linear
    out_norm: nn.LayerNorm
    out_dropout: nn.Dropout
    up: nn.Linear
    down: nn.Linear
    down_norm: nn.LayerNorm
    down_dropout: nn.Dropout

    @classmethod
    def of(cls, layer: nn.Module) -> LayerParts:
        attention, up, end = layer.attention, layer.intermediate.dense, layer.output
        inner, out = attention.self, attention.output
        return cls(
            *(inner.query, inner.key, inner.value, inner.dropout),
            *(out.dense, out.LayerNorm, out.dropout),
            *(up, end.dense, end.LayerNorm, end.dropout),
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        for module in self:
            yield from module._parameters.values()


@dataclass(frozen=True)
class PackedLayer:
    """One layer's parts with query, key and value as one projection [3H, H]."""

    parts: LayerParts
    heads: int
    head_dim: int
    activation: str
    qkv: Tensor
    qkv_bias: Tensor | None


def pack_layer(layer: nn.Module, parts: LayerParts, activation: str) -> PackedLayer:
    projections = (parts.query, parts.key, parts.value)
    biases = [p.bias for p in projections]
    attention = layer.attention.self
    return PackedLayer(
        parts,
        attention.num_attention_heads,
        attention.attention_head_size,
        activation,
        torch.cat([p.weight for p in projections]),
        None if biases[0] is None else torch.cat(biases),
    )


@dataclass(frozen=True)
class _Cache:
    stamp: tuple[Any, ...]
    probes: list[Tensor]
    probed: list[float]
    layers: list[PackedLayer]

    def fresh(self, stamp: tuple[Any, ...]) -> bool:
        return self.stamp == stamp and _read(self.probes) == self.probed


# Beside the modules, not on them: a deepcopy or a pickle of the model carries no stale weights.
_caches: WeakKeyDictionary[nn.Module, _Cache] = WeakKeyDictionary()


def forget_packed(encoder: nn.Module) -> None:
    """Drops every packed copy of the encoder's weights."""
    cache = _caches.pop(encoder, None)
    for layer in cache.layers if cache else ():
        for weight in (layer.parts.out.weight, layer.parts.up.weight, layer.parts.down.weight):
            forget(weight)


def packed_layers(encoder: nn.Module, activation: str) -> list[PackedLayer]:
    """The encoder's layers, packed; kept between calls while no weight changes.

    A weight that is being trained is packed afresh each time, so that its gradient flows.
    """
    parts = [LayerParts.of(layer) for layer in encoder.layer]
    parameters = [p for part in parts for p in part.parameters() if p is not None]
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        return [
            pack_layer(layer, part, activation)
            for layer, part in zip(encoder.layer, parts, strict=True)
        ]
    stamp = (
        *map(id, parameters),
        *(p.data_ptr() for p in parameters),
        *(0 if p.is_inference() else p._version for p in parameters),
    )
    cache = _caches.get(encoder)
    if cache is None or not cache.fresh(stamp):
        forget_packed(encoder)
        # Not as inference tensors, which have no version to keep reordered copies by.
        with torch.inference_mode(False), torch.no_grad():
            layers = [
                pack_layer(layer, part, activation)
                for layer, part in zip(encoder.layer, parts, strict=True)
            ]
        probes = _probes(parameters)
        cache = _caches[encoder] = _Cache(stamp, probes, _read(probes), layers)
    return cache.layers


def embed(
    embeddings: nn.Module,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    inputs_embeds: Tensor | None,
    backend: Backend,
) -> Tensor:
    """The embedding layer on packed tokens: ids [T] (or embeddings [T, H]) -> [T, H]."""
    word, norm = embeddings.word_embeddings, embeddings.LayerNorm
    table, padding_idx = word.weight, word.padding_idx
    if inputs_embeds is not None:  # rows of a table of their own
        table, padding_idx = inputs_embeds, None
        input_ids = torch.arange(inputs_embeds.shape[0], device=inputs_embeds.device)
    p = rate(embeddings.dropout)
    return ops.embed_layernorm(
        input_ids,
        token_type_ids,
        position_ids,
        table,
        embeddings.position_embeddings.weight,
        embeddings.token_type_embeddings.weight,
        norm.weight,
        norm.bias,
        norm.eps,
        -1 if padding_idx is None else padding_idx,
        p,
        draw_seeds(1, table.device) if p else None,
        chosen(backend, "embed_layernorm"),
    )


def layer_forward(
    h: Tensor,
    layer: PackedLayer,
    sequences: Sequences,
    seeds: Tensor | None,
    backend: Backend,
) -> Tensor:
    """One post-LN encoder layer on packed tokens [T, H] -> [T, H]."""
    m, tokens = layer.parts, h.shape[0]
    s0, s1, s2 = (None, None, None) if seeds is None else seeds.split(1)
    p0, p1, p2 = rate(m.attention_dropout), rate(m.out_dropout), rate(m.down_dropout)
    use = partial(chosen, backend)

    qkv = ops.linear(h, layer.qkv, layer.qkv_bias, use("linear"))
    qkv = qkv.view(tokens, 3, layer.heads, layer.head_dim)  # [T, 3, N, D]
    context = ops.attention(
        qkv, sequences.cu_seqlens, sequences.max_seqlen, layer.head_dim**-0.5,
        sequences.key_start, sequences.bias, p0, s0 if p0 else None, use("attention"),
    ).flatten(1)  # fmt: skip
    out = ops.linear(context, m.out.weight, None, use("linear"))
    h = ops.add_layernorm(
        out, m.out.bias, h, m.out_norm.weight, m.out_norm.bias, m.out_norm.eps,
        p1, s1 if p1 else None, use("add_layernorm"),
    )  # fmt: skip
    up = ops.linear_gelu(h, m.up.weight, m.up.bias, layer.activation, use("linear_gelu"))
    down = ops.linear(up, m.down.weight, None, use("linear"))
    return ops.add_layernorm(
        down, m.down.bias, h, m.down_norm.weight, m.down_norm.bias, m.down_norm.eps,
        p2, s2 if p2 else None, use("add_layernorm"),
    )  # fmt: skip


class Sequences(NamedTuple):
    """What attention needs to know of the packed sequences; see `ops.attention`."""

    cu_seqlens: Tensor
    max_seqlen: int
    key_start: Tensor | None = None
    bias: Tensor | None = None


def run_layers(
    encoder: nn.Module,
    activation: str,
    h: Tensor,
    sequences: Sequences,
    backend: Backend = "auto",
    between: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Every layer of the encoder on packed tokens [T, H] -> [T, H].

    between: called on the hidden states before the first and after each layer; what it returns
        goes on (how hidden states are collected).
    """
    layers = packed_layers(encoder, activation)
    recompute = encoder.training and torch.is_grad_enabled()
    recompute = recompute and any(
        getattr(m, "gradient_checkpointing", False) for m in encoder.layer
    )
    if recompute and not h.requires_grad:
        h = h.detach().requires_grad_()  # reentrant checkpoints need an input with a gradient
    dropping = any(
        rate(d)
        for layer in layers
        for d in (layer.parts.attention_dropout, layer.parts.out_dropout, layer.parts.down_dropout)
    )
    seeds = draw_seeds(3 * len(layers), h.device) if dropping else None
    h = h if between is None else between(h)
    for i, (module, layer) in enumerate(zip(encoder.layer, layers, strict=True)):
        run = partial(
            layer_forward,
            layer=layer,
            sequences=sequences,
            seeds=None if seeds is None else seeds[3 * i : 3 * i + 3],
            backend=backend,
        )
        if recompute and module.gradient_checkpointing:
            h = module._gradient_checkpointing_func(run, h)
        else:
            h = run(h)
        h = h if between is None else between(h)
    return h


def encode(
    model: nn.Module,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The last hidden states of packed tokens, without any padding on the way.

    Args:
        model: a Hugging Face BertModel (accelerated or not).
        input_ids: [T], int32 or int64, the tokens of all sequences one after the other.
        cu_seqlens: [B + 1] int32, where each sequence starts, and T.
        max_seqlen: an upper bound of the longest sequence.
        token_type_ids: [T] or None (type 0).
        position_ids: [T] or None (0, 1, ... within each sequence).
        backend: "auto", one backend for every op, or a mapping from op to backend.

    Returns: [T, H] in the model's dtype.
    Raises: ValueError for a sequence longer than the position table; what the ops raise.
    """
    limit = model.embeddings.position_embeddings.weight.shape[0]
    if position_ids is None:
        if max_seqlen > limit:
            raise ValueError(f"a sequence of {max_seqlen} tokens exceeds the {limit} positions")
        starts, lengths = cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]
        offsets = torch.repeat_interleave(starts, lengths, output_size=input_ids.shape[0])
        position_ids = torch.arange(input_ids.shape[0], device=input_ids.device) - offsets
    h = embed(model.embeddings, input_ids, token_type_ids, position_ids, None, backend)
    activation = ACTIVATIONS[model.config.hidden_act]
    return run_layers(model.encoder, activation, h, Sequences(cu_seqlens, max_seqlen), backend)


def rate(dropout: nn.Module) -> float:
    """A dropout module's probability now: 0 in eval mode."""
    return dropout.p if dropout.training else 0.0


def chosen(backend: Backend, op: str) -> str | Chooser:
    """The backend asked for this op."""
    return backend.get(op, "auto") if isinstance(backend, Mapping) else backend


def _probes(parameters: list[nn.Parameter]) -> list[Tensor]:
    # A write through `.data` (as EMA code does) leaves a tensor's version as it was. One element
    # of every matrix, read in one gather per call, tells. Only on the CPU: reading from a GPU
    # would stall its queue.
    if not parameters or parameters[0].device.type != "cpu":
        return []
    return [p.detach()[p.shape[0] // 3, p.shape[1] // 2] for p in parameters if p.dim() == 2]


def _read(probes: list[Tensor]) -> list[float]:
    return torch.stack(probes).tolist() if probes else []
