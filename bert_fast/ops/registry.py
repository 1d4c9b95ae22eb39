"""The op contract: one op, its reference, its ordered table of kernels, one gradient for all.

An `Op` page (one file per op beside this one) states the formula, a plain-PyTorch reference and the
kernels that compute it faster. The registry picks the first willing kernel, runs it, and wires
autograd, torch.compile and torch.export once for every op:

- eager inference calls the kernel directly (a few microseconds instead of a dispatcher round trip);
- eager training goes through one shared `autograd.Function`;
- under torch.compile, torch.export or a dispatch mode, through `torch.ops.bert_fast.<op>`.

All three run the same kernel and the same backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .modes import tracing, without_autocast

LIBRARY = torch.library.Library("bert_fast", "DEF")
OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Kernel:
    """One way to compute an op.

    `forward(*args, save)` returns `(y, *residuals)`; `backward(dy, *args, [y,] *residuals, needs)`
    returns one gradient per differentiable argument (None or an empty tensor where none is
    needed). A kernel without a backward borrows the reference's, or that of `backward_by`.
    `why_not(*args)` lists the reasons why it cannot run on these arguments; an empty list means
    it can. Where `leads(*args)` holds, "auto" asks it before those that stand before it.
    `device`: the type of device that it is for, where "auto" asks no other; None: any.
    """

    backend: str
    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., Sequence[Tensor | None]] | None
    why_not: Callable[..., list[str]]
    backward_by: str | None = None
    leads: Callable[..., bool] | None = None
    device: str | None = None

    @property
    def backward_backend(self) -> str:
        """Whose backward runs."""
        return self.backward_by or (self.backend if self.backward else "reference")


Chooser = Callable[["Op", tuple[Any, ...]], Kernel]


@dataclass(frozen=True)
class Sample:
    """A named argument tuple for the parity tests."""

    name: str
    args: tuple[Any, ...]


@dataclass
class Op:
    """An op's contract. `arguments` is its schema text, e.g. "Tensor x, Tensor? bias, float p".

    Those named in `differentiable` have the dtype of `lead`, as have all tensors of a list.
    """

    name: str
    arguments: str
    reference: Callable[..., Tensor]
    check: Callable[..., None]
    fake: Callable[..., tuple[Tensor, ...]]
    kernels: tuple[Kernel, ...]
    samples: Callable[[torch.device, torch.dtype], Iterable[Sample]]
    cost: Callable[..., tuple[int, int]]
    differentiable: tuple[str, ...]
    residuals: int = 0
    saves_output: bool = False
    lead: str = "x"
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = [part.split()[-1] for part in self.arguments.split(", ")]
        self._lead = self.names.index(self.lead)
        self._wanted = [self.names.index(name) for name in self.differentiable]
        self._tensors = [
            (i, self.names[i], self.names[i] in self.differentiable)
            for i, part in enumerate(self.arguments.split(", "))
            if part.startswith("Tensor")
        ]
        self.kernels = (*self.kernels, self._reference_kernel())
        self._by_backend = {kernel.backend: kernel for kernel in self.kernels}
        OPS[self.name] = self
        _register(self)

    # -- choosing ---------------------------------------------------------------------------

    def reasons(self, args: tuple[Any, ...]) -> list[tuple[str, list[str]]]:
        """For every kernel, in order of preference (but see `Kernel.leads`), why it would not run
        (empty: it would)."""
        return [(kernel.backend, kernel.why_not(*args)) for kernel in self.kernels]

    def choose(self, args: tuple[Any, ...], backend: str | Chooser = "auto") -> Kernel:
        """The first willing kernel, or the forced one; raises ValueError with every reason.

        A callable `backend` decides by itself (this is how `explain` watches a forward pass).
        """
        if not isinstance(backend, str):
            return backend(self, args)
        if backend == "auto":
            on = args[self._lead].device.type
            near = [k for k in self.kernels if k.device in (None, on)]
            first = [k for k in near if k.leads is not None and k.leads(*args)]
            for kernel in (*first, *near):
                if not kernel.why_not(*args):
                    return kernel
        elif backend in self._by_backend and not self._by_backend[backend].why_not(*args):
            return self._by_backend[backend]
        told = "\n".join(
            f"  {name}: {'; '.join(why) or 'would run'}" for name, why in self.reasons(args)
        )
        known = "" if backend in self._by_backend else " (no such backend for this op)"
        raise ValueError(f"bert_fast.{self.name}: backend {backend!r} cannot run{known}\n{told}")

    # -- running ----------------------------------------------------------------------------

    def __call__(self, *args: Any, backend: str | Chooser = "auto") -> Tensor:
        """Checks the arguments, picks a kernel and runs it, differentiably where asked."""
        kind = args[self._lead].device.type
        if torch.is_autocast_enabled(kind):
            # An op computes in the dtype it is given; what is cast under autocast, its caller says.
            with torch.autocast(kind, enabled=False) if tracing() else without_autocast(kind):
                return self(*args, backend=backend)
        self.validate(args)
        if tracing():  # the kernel is chosen when the traced call runs, on real tensors
            op = getattr(torch.ops.bert_fast, self.name)
            out = op(*args, backend, self._needs_gradient(args))
            return out if isinstance(out, Tensor) else out[0]
        kernel = self.choose(args, backend)
        if self._needs_gradient(args):
            return _Differentiable.apply(self, kernel, *map(contiguous, args))
        return self.infer(kernel, args)

    def validate(self, args: tuple[Any, ...]) -> None:
        """Raises what the op says of arguments that it cannot take."""
        self._check_tensors(args)
        self.check(*args)

    def given(self, args: Sequence[Any]) -> list[bool]:
        """Which of the differentiable arguments are there."""
        return [args[i] is not None for i in self._wanted]

    def infer(self, kernel: Kernel, args: tuple[Any, ...]) -> Tensor:
        """Runs a chosen kernel on arguments known to be right, without a gradient."""
        return kernel.forward(*map(contiguous, args), save=False)[0]

    def for_backward(self, args: Sequence[Any], outputs: Sequence[Tensor]) -> list[Any]:
        """What `backward` reads: the arguments, then what of a kernel's outputs is kept."""
        return [*args, *(outputs if self.saves_output else outputs[1:])]

    def backward(
        self, kernel: Kernel, dy: Tensor, values: Sequence[Any], needs: list[bool]
    ) -> list[Tensor | None]:
        """Gradients of the differentiable arguments, None where not needed."""
        run = kernel.backward or self._reference_backward
        grads = run(dy.contiguous(), *values, needs=needs)
        return [g if need else None for g, need in zip(grads, needs, strict=True)]

    # -- inside -----------------------------------------------------------------------------

    def _needs_gradient(self, args: tuple[Any, ...]) -> bool:
        return torch.is_grad_enabled() and any(
            args[i] is not None and args[i].requires_grad for i in self._wanted
        )

    def _check_tensors(self, args: tuple[Any, ...]) -> None:
        lead = args[self._lead]
        device, dtype = lead.device, lead.dtype
        for i, name, typed in self._tensors:
            value = args[i]
            if value is None:
                continue
            for one in value if isinstance(value, list) else (value,):
                if not isinstance(one, Tensor):
                    raise TypeError(f"bert_fast.{self.name}: {name} is {one!r}, expected a Tensor")
                if one.device != device:
                    raise ValueError(
                        f"bert_fast.{self.name}: {name} is on {one.device}, "
                        f"{self.lead} on {device}; all must share one device"
                    )
                if (typed or one is not value) and one.dtype != dtype:
                    raise TypeError(
                        f"bert_fast.{self.name}: {name} is {one.dtype}, {self.lead} is "
                        f"{dtype}; all floating tensors of a call must share one dtype"
                    )

    def _reference_kernel(self) -> Kernel:
        def forward(*args: Any, save: bool) -> tuple[Tensor, ...]:
            with torch.no_grad():
                y = self.reference(*args)
            # Its backward recomputes, so the residuals are only placeholders of the right shape.
            return (y, *map(torch.zeros_like, self.fake(*args, save=save)[1:]))

        return Kernel("reference", forward, None, lambda *args: [])

    def _reference_backward(self, dy: Tensor, *rest: Any, needs: list[bool]) -> list[Tensor | None]:
        args = [
            a.detach().requires_grad_(i in self._wanted and a.is_floating_point())
            if isinstance(a, Tensor)
            else a
            for i, a in enumerate(rest[: len(self.names)])
        ]
        with torch.enable_grad():
            y = self.reference(*args)
        inputs = [args[i] for i, need in zip(self._wanted, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, inputs, dy, allow_unused=True) if inputs else ())
        return [next(found) if need else None for need in needs]


def contiguous(value: Any) -> Any:
    """An argument as kernels take it."""
    return value.contiguous() if isinstance(value, Tensor) else value


class _Differentiable(torch.autograd.Function):
    """The one autograd node of eager training, shared by all ops."""

    @staticmethod
    def forward(ctx: Any, op: Op, kernel: Kernel, *args: Any) -> Tensor:
        outputs = kernel.forward(*args, save=True)
        ctx.op, ctx.kernel = op, kernel
        keep(ctx, op.for_backward(args, outputs))
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_second_gradient(ctx.op.name)
        needs = [ctx.needs_input_grad[2 + i] for i in ctx.op._wanted]
        found = ctx.op.backward(ctx.kernel, dy, kept(ctx), needs)
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, grad in zip(ctx.op._wanted, found, strict=True):
            grads[2 + i] = grad
        return tuple(grads)


def refuse_second_gradient(name: str) -> None:
    """Called in a backward, where gradients are on by create_graph only: its term would be missing
    in silence."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"bert_fast.{name}: there is no gradient of a gradient (create_graph=True)"
        )


def keep(ctx: Any, values: Sequence[Any]) -> None:
    """Keeps values for backward, their tensors as autograd wants it: it tells where one was
    written to since."""
    ctx.kept = [_TENSOR if isinstance(v, Tensor) else v for v in values]
    ctx.save_for_backward(*(v for v in values if isinstance(v, Tensor)))


def kept(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)  # once: checkpointing forbids twice
    return [next(tensors) if v is _TENSOR else v for v in ctx.kept]


_TENSOR = object()  # stands where a tensor was


def _register(op: Op) -> None:
    """Defines torch.ops.bert_fast.<op> and <op>_backward: implementation, fake, autograd."""
    forward_outputs = ", ".join(["Tensor"] * (1 + op.residuals))
    LIBRARY.define(f"{op.name}({op.arguments}, str backend, bool save) -> ({forward_outputs})")
    kept_count = op.residuals + op.saves_output
    kept_arguments = "".join(f", Tensor kept_{i}" for i in range(kept_count))
    grads = ", ".join(["Tensor"] * len(op.differentiable))
    LIBRARY.define(
        f"{op.name}_backward(Tensor dy, {op.arguments}{kept_arguments}, bool[] needs, "
        f"str backend) -> ({grads})"
    )

    def one_or_many(values: Sequence[Tensor]) -> Any:
        return values[0] if len(values) == 1 else tuple(values)

    def forward(*inputs: Any) -> Any:
        *args, backend, save = inputs
        args = list(map(contiguous, args))
        kernel = op.choose(tuple(args), backend)
        y, *residuals = _unaliased(kernel.forward(*args, save=save), args)
        return one_or_many([y, *(r if save else y.new_empty(0) for r in residuals)])

    def forward_fake(*inputs: Any) -> Any:
        *args, _, save = inputs
        y, *residuals = op.fake(*args, save=save)
        return one_or_many([y, *(r if save else y.new_empty(0) for r in residuals)])

    def backward(dy: Tensor, *inputs: Any) -> Any:
        *rest, needs, backend = inputs
        args = list(map(contiguous, rest[: len(op.names)]))
        kernel = op.choose(tuple(args), backend)
        grads = op.backward(kernel, dy, [*args, *rest[len(op.names) :]], list(needs))
        filled = [dy.new_empty(0) if g is None else g for g in grads]
        return one_or_many(_unaliased(filled, [dy, *args]))

    def backward_fake(dy: Tensor, *inputs: Any) -> Any:
        *rest, needs, _ = inputs
        wanted = [rest[i] for i in op._wanted]
        return one_or_many(
            [
                torch.empty_like(a, memory_format=torch.contiguous_format)
                if need and a is not None
                else dy.new_empty(0)
                for a, need in zip(wanted, needs, strict=True)
            ]
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *args, backend, _ = inputs
        ctx.backend = backend
        outputs = output if isinstance(output, tuple) else (output,)
        keep(ctx, op.for_backward(args, outputs))

    def gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
        values, needs = kept(ctx), [ctx.needs_input_grad[i] for i in op._wanted]
        run = getattr(torch.ops.bert_fast, f"{op.name}_backward")
        found = run(dy, *values, needs, ctx.backend)
        found = (found,) if isinstance(found, Tensor) else found
        # The dispatcher wants a gradient for each tensor of a list.
        args = (*values[: len(op.names)], None, None)
        grads = [[None] * len(a) if isinstance(a, list) else None for a in args]
        for i, grad, need in zip(op._wanted, found, needs, strict=True):
            grads[i] = grad if need else None
        return tuple(grads)

    for name, run, fake in (
        (op.name, forward, forward_fake),
        (f"{op.name}_backward", backward, backward_fake),
    ):
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, run, key)
        torch.library.register_fake(f"bert_fast::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"bert_fast::{op.name}", gradient, setup_context=setup_context, lib=LIBRARY
    )


def _unaliased(outputs: Sequence[Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """Copies outputs that share storage with an input or an earlier output.

    The dispatcher forbids such aliases; eager autograd does not mind them and skips this.
    """
    seen = {a.untyped_storage().data_ptr() for a in inputs if isinstance(a, Tensor) and a.numel()}
    result = []
    for out in outputs:
        pointer = out.untyped_storage().data_ptr()
        if out.numel() and pointer in seen:
            out = out.clone()
        seen.add(pointer)
        result.append(out)
    return result
