"""Which way layers run: all in one call, their products in 8 bits, or op by op; and why not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.encoder import LAYER
from .ops.encoder import OP as ENCODER
from .ops.linear_fp8 import OP as LINEAR_FP8
from .ops.linear_row_int8 import OP as LINEAR_ROW_INT8
from .ops.modes import tracing
from .ops.registry import Chooser, Op
from .ops.weight_copies import reasons_against_copies
from .structure import Plain, Structure

Backend = str | Mapping[str, str] | Chooser


class Sequences(NamedTuple):
    """What attention needs to know of the packed sequences; see `ops.attention`."""

    cu_seqlens: Tensor
    max_seqlen: int
    key_start: Tensor | None = None
    bias: Tensor | None = None


def chosen(backend: Backend, op: str) -> str | Chooser:
    """The backend asked for this op.

    For `encoder`: "reference", which means op by op, where backends of other ops are named.
    """
    if isinstance(backend, Mapping):
        return backend.get(op, "reference" if op == "encoder" else "auto")
    named = isinstance(backend, str) and backend != "auto"
    return "reference" if named and op == "encoder" else backend


def like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def reasons_against_plain(structure: Structure, dropping: bool, h: Tensor) -> list[str]:
    """Why these layers are now more than what `ops.encoder` computes and 8 bits can serve."""
    plain = structure.plain
    if plain is None:
        return ["its layers have other modules than plain ones, or settings that differ"]
    if dropping or h.requires_grad:
        return ["it trains or records gradients (torch.inference_mode() stops that)"]
    if tracing() or torch.is_autocast_enabled(h.device.type):
        return ["it is traced, or autocast is on"]
    return []


def reasons_against_one_call(structure: Structure) -> list[str]:
    """What is set on plain layers that `ops.encoder` has no argument for."""
    plain = structure.plain
    assert plain is not None
    if any(m.scale != plain.width**-0.5 for m in structure.layers):
        return ["its attention has a scale of its own"]
    return []


def reasons_against_now() -> list[str]:
    """Who watches this call and does not know bert_fast's ops."""
    if torch.compiler.is_dynamo_compiling():
        return []
    if torch._C._functorch.peek_interpreter_stack():
        return ["a torch.func transform is active"]
    if torch.autograd.forward_ad._current_level >= 0:
        return ["forward-mode derivatives are taken"]
    if torch.jit.is_tracing() or _exports_to_onnx():
        return ["a trace is made for TorchScript or ONNX, which do not know bert_fast's ops"]
    return []


def hooked_globally() -> bool:
    """Whether a hook on all modules would see those that are not called."""
    rule = torch.nn.modules.module
    return bool(
        rule._global_forward_hooks
        or rule._global_forward_pre_hooks
        or rule._global_backward_hooks
        or rule._global_backward_pre_hooks
    )


def _exports_to_onnx() -> bool:
    # Asking imports the exporter, which takes a second: where it is at work, it has been imported.
    return "torch.onnx._internal.exporter" in sys.modules and torch.onnx.is_in_onnx_export()


def reasons_against_8_bits(
    dtype: str, plain: Plain | None, h: Tensor, backend: Backend
) -> list[str]:
    """Why the products of plain layers cannot be those of `ops.linear_fp8`, `linear_row_int8`."""
    assert plain is not None
    if why := reasons_against_copies(*plain.weights):
        return why
    up, down = (plain.weights[LAYER.index(name)] for name in ("up", "down"))
    op = LINEAR_FP8
    calls: list[tuple[Any, ...]] = [(h, up, None)]
    if dtype == "int8":  # its kernels hold whole rows, of the inner states too
        inner = h.new_empty((0, down.shape[1]))
        op, calls = LINEAR_ROW_INT8, [(h, up, None, "none"), (inner, down, None, "none")]
    # Not asked through what watches the choices (`explain`): this one runs nothing.
    asked = chosen(getattr(backend, "backend", backend), op.name)
    for args in calls:
        runs = not all(why for _, why in op.reasons(args)[:-1])
        if not runs or op.choose(args, asked).backend == "reference":
            return _told(op, args)
    return []


def _told(op: Op, args: tuple[Any, ...]) -> list[str]:
    """Why no kernel but the reference takes these arguments."""
    reasons = op.reasons(args)[:-1]
    if not all(why for _, why in reasons):
        return [f"the reference of {op.name} is asked for"]
    return [f"{name}: {'; '.join(why)}" for name, why in reasons]


def in_one_call(
    plain: Plain | None,
    h: Tensor,
    sequences: Sequences,
    backend: Backend,
    between: Callable[[Tensor], Tensor] | None,
    rows: Tensor | None,
    int8: bool,
) -> Tensor | list[str]:
    """`run_layers` by `ops.encoder`, layer by layer for `between`; or why no kernel takes it."""
    assert plain is not None
    about = (h, sequences.cu_seqlens, sequences.key_start, like(sequences.bias, h))
    settings = (plain.heads, sequences.max_seqlen, plain.eps, plain.activation, int8)
    everything = (*about, rows, plain.weights, *settings)
    kernel = ENCODER.choose(everything, chosen(backend, "encoder"))
    if kernel.backend == "reference":
        return _told(ENCODER, everything)
    if between is None:
        return ENCODER.infer(kernel, everything)
    h = between(h)
    for i in range(0, len(plain.weights), len(LAYER)):
        weights = plain.weights[i : i + len(LAYER)]
        h = between(ENCODER.infer(kernel, (h, *about[1:], None, weights, *settings)))
    return h
