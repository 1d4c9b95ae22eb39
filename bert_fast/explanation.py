"""explain(model, inputs): which kernel runs for each op, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .convert import is_encoder
from .families import ATTENTION_ONLY
from .inputs import read_batch
from .modeling import packed_forward
from .ops.encoder import OP as ENCODER
from .ops.registry import Kernel, Op
from .packed import (
    REAL_ONLY,
    Packed,
    asked,
    options_of,
    reasons_against,
    reasons_against_call,
    rows_read,
)
from .paths import Backend, chosen
from .structure import Structure, structure_of
from .swap import arguments


@dataclass(frozen=True)
class Choice:
    """Which kernel of an op ran, on what, and why the ones before it would not."""

    op: str
    kernel: str
    backward: str
    on: str
    reasons: dict[str, list[str]]
    calls: int = 1


@dataclass(frozen=True)
class Explanation:
    """`choices` in the order of the forward pass; `fallback` where Hugging Face's forward runs."""

    tokens: int = 0
    padded_tokens: int = 0
    fallback: list[str] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    def __str__(self) -> str:
        if self.fallback:
            return "Hugging Face's own forward runs: " + "; ".join(self.fallback)
        spared = 1.0 - self.tokens / max(self.padded_tokens, 1)
        lines = [f"{self.tokens} tokens of {self.padded_tokens} ({spared:.0%} padding spared)"]
        for c in self.choices:
            lines.append(f"{c.op} {c.on} x{c.calls}: {c.kernel} (backward: {c.backward})")
            alike: dict[str, list[str]] = {}
            for name, why in c.reasons.items():
                if why:
                    alike.setdefault("; ".join(why), []).append(name)
            lines += [f"    not {', '.join(names)}: {why}" for why, names in alike.items()]
        return "\n".join(lines)


def explain(model: nn.Module, inputs: Mapping[str, Any]) -> Explanation:
    """Runs `model(**inputs)`; tells which kernel runs for each op of its encoder, and why no other.

    The encoder runs once more, watched, with the gradient mode and train/eval state of the moment.
    Of several encoders inside, the first one called is explained; what a head runs is not.

    Args:
        model: any module with a transformers encoder inside; accelerated, or it says so.
        inputs: keyword arguments of its forward.

    Returns: tokens and padding, and for each op and shape: the kernel, of the backward too, the
        number of calls, and the reasons against every other kernel. `str()` is a text of it.
    Raises: ValueError if no encoder inside was called.
    """
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((module, args, kwargs))

    encoders = [m for m in model.modules() if is_encoder(m)]
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in encoders]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:  # sentence-transformers calls `forward` itself, past all hooks
        _by_forward(model, inputs, encoders, note)
    if not calls:
        others = {type(m).__name__ for m in model.modules()} & set(ATTENTION_ONLY.values())
        about = f": {others.pop()} takes the attention alone" if others else ""
        raise ValueError(f"{type(model).__name__} called no encoder that can run packed{about}")
    module, args, kwargs = calls[0]
    cls = type(module)
    if not issubclass(cls, Packed):
        return Explanation(fallback=["the model is not accelerated"])
    given = arguments(cls, args, kwargs)
    structure = structure_of(module, cls.bert_fast_family)
    why = reasons_against_call(cls, module, given) or reasons_against(module, structure)
    return Explanation(fallback=why) if why else _explained(module, structure, given)


def _by_forward(
    model: nn.Module, inputs: Mapping[str, Any], encoders: list[nn.Module], note: Any
) -> None:
    """Runs the model with encoders whose `forward` tells of its call first."""
    free = [m for m in encoders if "forward" not in vars(m)]

    def noted(own: Any, module: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            note(module, args, kwargs)
            return own(*args, **kwargs)

        return forward

    for m in free:
        vars(m)["forward"] = noted(m.forward, m)
    try:
        model(**inputs)
    finally:
        for m in free:
            del vars(m)["forward"]


@dataclass(frozen=True)
class _Watch:
    """Chooses as `backend` says, and keeps what was chosen by op and what it ran on."""

    backend: Backend
    seen: dict[tuple[str, str], Choice] = field(default_factory=dict)

    def __call__(self, op: Op, args: tuple[Any, ...]) -> Kernel:
        kernel = op.choose(args, chosen(self.backend, op.name))
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        on = "x".join(map(str, tensors[0].shape)) + f" {tensors[0].dtype}".replace("torch.", "")
        # Where no kernel takes the layers as a whole, their ops follow, and tell of themselves.
        by_ops = op is ENCODER and kernel.backend == "reference"
        if op is ENCODER and args[-1] and not by_ops:
            on += " in int8"
        before = self.seen.get((op.name, on))
        self.seen[op.name, on] = Choice(
            op.name,
            "op by op" if by_ops else kernel.backend,
            kernel.backward_backend,
            on,
            {name: why for name, why in op.reasons(args) if name != kernel.backend},
            before.calls + 1 if before else 1,
        )
        return kernel


def _explained(module: Any, structure: Structure, given: dict[str, Any]) -> Explanation:
    options = options_of(module)
    watch = _Watch(options.backend)
    keep_padding = options.keep_padding and not given.get(REAL_ONLY)
    batch = read_batch(structure, given, keep_padding)
    whole = asked(module, given, "output_hidden_states")
    rows = None if whole else rows_read(given, batch.packing)
    h = packed_forward(module, structure, batch, watch, rows=rows, dtype=options.dtype)
    if rows is None:  # a head pads its logits instead
        batch.packing.pad(h, watch)
    packing = batch.packing
    return Explanation(
        tokens=batch.tokens,
        padded_tokens=packing.batch * packing.length,
        choices=list(watch.seen.values()),
    )
