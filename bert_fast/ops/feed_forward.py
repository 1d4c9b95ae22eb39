"""feed_forward: y = activation(x U^T + b) D^T, both projections of a layer's feed-forward network.

One op, so that the activation's output, the largest tensor of a layer, need not exist: in inference
the C++ kernels make it a slice at a time in the cache, and training does not keep it. With
u = x U^T + b, a = activation(u), da = dy D and du = da * activation'(u),

    dD = dy^T a,  dx = du U,  dU = du^T x,  db = sum_T du

Saved: the inputs and u; a is recomputed, an elementwise pass. With `recompute`, u is recomputed
too, by one GEMM (selective recomputation: Korthikanti et al., arXiv 2205.05198). The second bias
belongs to `add_layernorm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .backends import ISAS
from .bias_gelu import OP as BIAS_GELU
from .bias_gelu import activate
from .linear import OP as LINEAR
from .linear import check as check_linear
from .linear import gradients
from .linear_gelu import OP as LINEAR_GELU
from .linear_gelu import samples as linear_samples
from .packed_linear import panels
from .registry import Chooser, Kernel, Op, Sample


def reference(x, up, up_bias, down, activation, recompute) -> Tensor:
    return F.linear(activate(F.linear(x, up, up_bias), activation), down)


def check(x, up, up_bias, down, activation, recompute, op: str = "feed_forward") -> None:
    check_linear(x, up, up_bias, op)
    checks.rank(op, "down", down, 2)
    checks.shape(op, "down", down, (down.shape[0], up.shape[0]))
    checks.activation(op, activation)


def fake(x, up, up_bias, down, activation, recompute, *, save) -> tuple[Tensor, ...]:
    u = x.new_empty(0) if recompute else x.new_empty(x.shape[0], up.shape[0])
    return x.new_empty(x.shape[0], down.shape[0]), u


def fused(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, activation: str, isa: int
) -> Tensor:
    """Both products in one C++ kernel that never holds [T, F]."""
    packed = panels(up, isa), up_bias, panels(down, isa)
    run = torch.ops.bert_fast_cpu.feed_forward_forward
    return run(x, *packed, up.shape[0], down.shape[0], activation, isa)


def _kernel(first: Kernel, second: Kernel) -> Kernel:
    """Of a kernel of `linear_gelu` and one of `linear`."""

    def forward(x, up, up_bias, down, activation, recompute, *, save) -> tuple[Tensor, ...]:
        keep = save and not recompute
        if first.backend in ISAS and not keep:  # the inner states stay in the cache
            return fused(x, up, up_bias, down, activation, ISAS[first.backend]), x.new_empty(0)
        a, *u = first.forward(x, up, up_bias, activation, save=keep)
        return second.forward(a, down, None, save=False)[0], u[0] if keep else x.new_empty(0)

    def backward(
        dy, x, up, up_bias, down, activation, recompute, u, *, needs
    ) -> Sequence[Tensor | None]:
        if recompute:
            u = second.forward(x, up, up_bias, save=False)[0]
        elementwise = BIAS_GELU.choose((u, None, activation))
        a = elementwise.forward(u, None, activation, save=False)[0] if needs[3] else u
        da, d_down, _ = gradients(dy, a, down, (any(needs[:3]), needs[3], False))
        del a  # the next three are as large
        if da is None:
            return None, None, None, d_down
        du, _ = BIAS_GELU.backward(elementwise, da, [u, None, activation], [True, False])
        del da
        assert du is not None
        return *gradients(du, x, up, needs[:3]), d_down

    def why_not(x, up, up_bias, down, activation, recompute) -> list[str]:
        why = first.why_not(x, up, up_bias, activation) + second.why_not(x, down, None)
        return list(dict.fromkeys(why))

    return Kernel(first.backend, forward, backward, why_not, leads=first.leads, device=first.device)


def samples(device, dtype) -> Iterable[Sample]:
    for sample in linear_samples(device, dtype):
        x, up, up_bias, activation = sample.args
        if sample.name not in ("qkv", "no_bias", "odd", "empty", "relu"):
            continue  # what they are for, the ops that this one is made of are tested with
        down = up.flip(0).t().contiguous()
        yield Sample(sample.name, (x, up, up_bias, down, activation, False))
        if sample.name in ("qkv", "empty"):
            yield Sample(f"recompute_{sample.name}", (x, up, up_bias, down, activation, True))
    # More rows and inner columns than any kernel takes at once (the C++ ones: 128 a thread, 192).
    generator = torch.Generator().manual_seed(0)
    shapes = (401, 40), (390, 40), (390,), (24, 390)
    drawn = [
        (torch.randn(*shape, generator=generator) * scale).to(device, dtype)
        for shape, scale in zip(shapes, (1.0, 0.16, 1.0, 0.05), strict=True)
    ]
    yield Sample("blocks", (*drawn, "gelu", False))


def cost(x, up, up_bias, down, *rest) -> tuple[int, int]:
    tokens = x.shape[0]
    elements = x.numel() + up.numel() + down.numel() + tokens * down.shape[0]
    return 2 * tokens * (up.numel() + down.numel()), elements * x.element_size()


_LINEAR = {kernel.backend: kernel for kernel in LINEAR.kernels}
# The same backend's; beside Triton's first product ATen's, as the second has no epilogue.
_SECOND = _LINEAR | {"triton": _LINEAR["aten"]}

OP = Op(
    name="feed_forward",
    arguments="Tensor x, Tensor up, Tensor? up_bias, Tensor down, str activation, bool recompute",
    reference=reference,
    check=check,
    fake=fake,
    kernels=tuple(_kernel(k, _SECOND[k.backend]) for k in LINEAR_GELU.kernels if k.backward),
    samples=samples,
    cost=cost,
    differentiable=("x", "up", "up_bias", "down"),
    residuals=1,
)


def feed_forward(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    activation: str = "gelu",
    recompute: bool = False,
    backend: str | Chooser = "auto",
) -> Tensor:
    """activation(x up^T + up_bias) down^T, keeping little for backward; arXiv 1706.03762.

    Args:
        x: [T, H], fp32, bf16 or fp16 (fp64 through ATen).
        up: [F, H]; up_bias: [F] or None; down: [H, F].
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        recompute: keep nothing of [T, F], at the price of one more GEMM in backward.
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, H] in x's dtype.
    Raises: ValueError for a wrong shape, activation, device or backend; TypeError for dtypes.
    """
    return OP(x, up, up_bias, down, activation, recompute, backend=backend)
