"""Every op x backend x dtype x sample x {eager, compiled}: output and every gradient."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bert_fast.ops import OPS
from bert_fast.ops.backends import ISAS, has_isa

from .guard import guarded_allocations
from .parity import (
    DEVICE,
    DTYPES,
    gradients,
    leaves_of,
    results,
    sample_names,
    smallest_sample,
    smallest_samples,
    trainable,
    truth,
    violations,
)

OF_CPUS = (*ISAS, "onednn")
LARGE = (("feed_forward", "blocks"), ("attention", "longer_than_a_block"))
# What only an output rounded to 16 bits upsets.
NARROW = (
    *(("attention", "alike"), ("bias_gelu", "far"), ("bias_gelu", "negative")),
    *((op, "tiles") for op in ("linear", "linear_gelu", "linear_row_int8")),  # TMA takes 16 bits
)
CASES = [
    pytest.param(op, kernel.backend, sample, id=f"{op}-{kernel.backend}-{sample}")
    for op in OPS
    for kernel in OPS[op].kernels
    if kernel.backend != "reference"  # the yardstick itself
    if DEVICE.type == "cpu" or kernel.backend not in OF_CPUS
    for sample in sample_names(op)
]
BACKENDS = [
    (op, kernel.backend)
    for op in OPS
    for kernel in OPS[op].kernels
    if DEVICE.type == "cpu" or kernel.backend not in OF_CPUS
]


@pytest.fixture(autouse=True, scope="module")
def poisoned_by_glibc() -> Iterator[None]:
    """The C++ kernels allocate below what torch fills: glibc then hands out memory that holds large
    numbers (-1.7e38 as fp32 and as bf16)."""
    perturb = -6  # M_PERTURB
    set_option = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    set_option(perturb, 1)
    yield
    set_option(perturb, 0)


def interpreted(backend: str) -> bool:
    """Whether its kernels run in Triton's interpreter, a thousand times slower than on a GPU."""
    return backend == "triton" and DEVICE.type == "cpu"


def skip_unless_willing(op: str, backend: str, args: tuple) -> None:
    why = dict(OPS[op].reasons(args))[backend]
    if why:
        pytest.skip("; ".join(why))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "backend", "sample"), CASES)
def test_eager(name: str, backend: str, sample: str, dtype: torch.dtype) -> None:
    expected, op = truth(name, sample, dtype), OPS[name]
    skip_unless_willing(name, backend, expected.args)
    if interpreted(backend) and (name, sample) in LARGE:
        pytest.skip("larger than the blocks of C++ kernels; what is interpreted has smaller ones")
    few = {torch.bfloat16: smallest_samples(name), torch.float16: [smallest_sample(name)]}
    narrow = dtype == torch.bfloat16 and (name, sample) in NARROW
    if interpreted(backend) and not narrow and sample not in few.get(dtype, [sample]):
        pytest.skip("interpreted, 16 bits are computed in fp32: a sample of each mode in bf16")
    with guarded_allocations() as guard:
        wanted = trainable(op, backend, expected.args)
        found = results(
            op, lambda *args: op(*args, backend=backend), expected.args, expected.dy, wanted
        )
        inferred = found[0]
        if not interpreted(backend) or sample in smallest_samples(name):
            with torch.inference_mode():
                inferred = op(*expected.args, backend=backend)
    assert not guard.broken()
    assert not violations(expected, found, wanted)
    assert not violations(expected, [inferred, *found[1:]], wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [b for op, b in BACKENDS if op == "attention"])
def test_attention_to_one_key(backend: str, dtype: torch.dtype) -> None:
    """A softmax over one key is constant: its query and key have exactly no gradient.

    Interpreted, Triton multiplies in fp32, where delta alone sees to it: that products in 16 bits
    leave nothing either, only a GPU tells.
    """
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(5, 3, 2, 32, generator=generator).to(DEVICE, dtype).requires_grad_()
    cu_seqlens = torch.tensor([0, 1, 3, 5], dtype=torch.int32, device=DEVICE)
    key_start = torch.tensor([0, 2, 3], dtype=torch.int32, device=DEVICE)
    args = (qkv, cu_seqlens, key_start, None, 2, 0.3, 0.0, None)
    skip_unless_willing("attention", backend, args)
    OPS["attention"](*args, backend=backend).square().sum().backward()
    assert not qkv.grad[:3, :2].any()
    assert qkv.grad[3:, :2].any()
    assert qkv.grad[:, 2].count_nonzero() == 4 * 64


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [b for op, b in BACKENDS if op == "attention"])
def test_keys_that_move_together_change_nothing(backend: str, dtype: torch.dtype) -> None:
    """Softmax does not see what the scores of a row share: the gradients of a sequence's keys sum
    to 0, so far as rounding goes; their sum is what the bias of the keys gets."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(40, 3, 2, 32, generator=generator)
    drawn[:, 1] *= 0.1
    drawn[:, [0, 2]] += 8.0
    dy = torch.randn(40, 2, 32, generator=generator).to(DEVICE, dtype)
    cu_seqlens = torch.tensor([0, 25, 40], dtype=torch.int32, device=DEVICE)

    def left(backend: str) -> float:
        qkv = drawn.to(DEVICE, dtype).requires_grad_()
        args = (qkv, cu_seqlens, None, None, 25, 32**-0.5, 0.0, None)
        skip_unless_willing("attention", backend, args)
        OPS["attention"](*args, backend=backend).backward(dy)
        keys = qkv.grad[:, 1].double().split([25, 15])
        return torch.stack([one.sum(0) for one in keys]).norm().item()

    assert left(backend) <= 3 * left("reference")


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name: str) -> None:
    """The references, which are the truth, and every kernel that takes fp64: finite differences."""
    op = OPS[name]
    if name.endswith(("_int8", "_fp8")):
        pytest.skip("it rounds: differences are steps; test_int8, test_fp8 look at its gradient")
    for sample in op.samples(DEVICE, torch.float64):
        leaves = leaves_of(op, sample.args, op.differentiable)
        for backend, why in op.reasons(leaves):
            if not why:
                run = functools.partial(op, backend=backend)
                assert torch.autograd.gradcheck(run, leaves, fast_mode=True), sample.name


@pytest.mark.parametrize("isa", [3, 5])
@pytest.mark.parametrize("name", OPS)
def test_lesser_avx512(name: str, isa: int) -> None:
    """A machine with the latest runs the older kinds too: 3 is without BF16, 5 without AMX."""
    op, cpu = OPS[name], torch.ops.bert_fast_cpu
    if not has_isa(isa):
        pytest.skip("this CPU lacks the instructions")
    forward = getattr(cpu, f"{name}_forward", None)
    taken = [a.name for a in forward.default._schema.arguments] if forward else []
    packed = name in ("linear", "linear_gelu")
    if not packed and taken != [*op.names, "save", "isa"]:
        pytest.skip("it has no kernel of its own, or of what others have too")
    for sample in sample_names(name):
        expected = truth(name, sample, torch.bfloat16)
        args = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in expected.args]
        if packed:
            x, weight, bias, activation = (*args, "none")[:4]
            panels = cpu.pack_weight(weight, False, 0, isa)
            found = cpu.linear_forward(x, panels, bias, weight.shape[0], activation, isa)
        else:
            found = forward(*args, True, isa)
        y = found if isinstance(found, torch.Tensor) else found[0]
        assert not violations(expected, [y, *expected.plain[1:]], ()), sample


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", OPS)
def test_compiled(name: str, dtype: torch.dtype) -> None:
    """The same through torch.compile: dynamo, fakes, the registered autograd.

    By the kernel that is preferred, and of one sample in all dtypes but one: what compiling adds
    depends on neither, and that each kernel keeps the contract, test_opcheck tells.
    """
    op = OPS[name]
    full = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    chosen = sample_names(name) if dtype == full else [smallest_sample(name)]
    samples = [(sample, truth(name, sample, dtype)) for sample in chosen]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(many: list[tuple[Any, ...]]) -> list[torch.Tensor]:
        return [op(*args) for args in many]

    backends = [op.choose(expected.args).backend for _, expected in samples]
    wanted = [trainable(op, b, e.args) for b, (_, e) in zip(backends, samples, strict=True)]
    leaves = [leaves_of(op, e.args, names) for (_, e), names in zip(samples, wanted, strict=True)]
    torch._dynamo.reset()
    outputs = run(leaves)  # one graph: its making takes far longer than what it holds
    torch.autograd.backward(outputs, [expected.dy for _, expected in samples])
    for (sample, expected), y, args, names in zip(samples, outputs, leaves, wanted, strict=True):
        found = [y.detach(), *gradients(op, args)]
        assert not violations(expected, found, names), sample
