"""All layers in one call: the same bits as op by op, and only while the model is what it was."""

from __future__ import annotations

import copy
import functools
import importlib
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bert_fast
from bert_fast import ops
from bert_fast.modeling import encode
from bert_fast.one_call import forget_call
from bert_fast.ops import OPS
from bert_fast.ops.backends import ISAS, best_isa, has_isa, openmp
from bert_fast.ops.encoder import LAYER
from bert_fast.ops.weight_copies import _copies, forget

from .models import ids, masks, tiny

BATCH, LENGTH = 3, 7  # few tokens: the op is preferred on every CPU
ISA = next(name for name, level in ISAS.items() if level <= best_isa())
OP_BY_OP = {op: ISA for op in ("linear", "qkv_linear", "feed_forward")}


def inputs(mask: str = "right") -> dict[str, Any]:
    return {"input_ids": ids(BATCH, LENGTH), "attention_mask": masks(BATCH, LENGTH)[mask]}


def outputs(model: Any, **given: Any) -> list[Tensor]:
    """Every output tensor, those of tuples too."""
    with torch.no_grad():
        values = model(**{**inputs(), **given}).values()
    return [t for v in values for t in (v if isinstance(v, tuple) else (v,))]


def in_one_call(model: Any, **given: Any) -> bool:
    with torch.no_grad():
        choices = bert_fast.explain(model, {**inputs(), **given}).choices
    return [c.kernel for c in choices if c.op == "encoder"] == [ISA]


@pytest.mark.parametrize("mask", ["right", "left", "holes", "first_hidden", "4d_bool", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_as_op_by_op(mask: str, dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    one = bert_fast.accelerate(copy.deepcopy(model), backend={"encoder": ISA})
    many = bert_fast.accelerate(copy.deepcopy(model), backend=OP_BY_OP)
    assert in_one_call(one) and not in_one_call(many)
    for states in (False, True):
        given = {"attention_mask": masks(BATCH, LENGTH)[mask], "output_hidden_states": states}
        found = outputs(one, **given), outputs(many, **given)
        assert len(found[0]) == 2 + 3 * states
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    bounds = torch.tensor([0, 4, 9, 21], dtype=torch.int32)
    rows = torch.tensor([0, 20, 9])
    given = (inputs()["input_ids"].flatten(), bounds, 12)
    with torch.no_grad():
        every = encode(model, *given, backend={"encoder": ISA})
        some = encode(model, *given, backend={"encoder": ISA}, rows=rows)
    assert torch.equal(some, every[rows])


@pytest.mark.parametrize("layers", [1, 2])
def test_a_batch_of_many_chunks(layers: int) -> None:
    """More tokens than go through a layer together (256 a thread): as each sequence by itself."""
    args = next(s.args for s in OPS["encoder"].samples(torch.device("cpu"), torch.float32))
    weights, heads, width = args[5] * layers, args[6], args[0].shape[1]
    lengths = torch.tensor([0, 200, 90, 300, 0, 1, 500, 7, 0])
    generator = torch.Generator().manual_seed(0)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    tokens, longest = int(bounds[-1]), int(lengths.max())
    x = torch.randn(tokens, width, generator=generator)
    bias = torch.randn(len(lengths), heads, longest, longest, generator=generator)
    key_start = bounds[:-1] + (lengths > 1)
    rows = torch.randperm(tokens, generator=generator)[:150]

    def run(i: int, end: int, rows: Tensor | None = None) -> Tensor:
        first, last = int(bounds[i]), int(bounds[end])
        return ops.encoder(
            x[first:last], bounds[i : end + 1] - first, longest, weights, heads, 1e-12,
            key_start=key_start[i:end] - first, bias=bias[i:end], rows=rows, backend=ISA,
        )  # fmt: skip

    alone = torch.cat([run(i, i + 1) for i in range(len(lengths))])
    torch.testing.assert_close(run(0, len(lengths)), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(0, len(lengths), rows), alone[rows], rtol=1e-5, atol=1e-5)


def test_a_row_may_be_asked_for_often() -> None:
    """And more rows than there are tokens."""
    args = next(s.args for s in OPS["encoder"].samples(torch.device("cpu"), torch.float32))
    x, bounds, _, _, _, weights, heads, longest, *_ = args
    rows = torch.arange(x.shape[0]).repeat(100)
    every, often = (
        ops.encoder(x, bounds, longest, weights, heads, 1e-12, rows=some, backend=ISA)
        for some in (None, rows)
    )
    torch.testing.assert_close(often, every[rows], rtol=1e-5, atol=1e-5)


def test_what_is_kept_of_weights_for_one_call_is_not_anothers() -> None:
    args = next(s.args for s in OPS["encoder"].samples(torch.device("cpu"), torch.float32))
    x, bounds, _, _, _, weights, heads, longest, eps, *_ = args
    run = functools.partial(ops.encoder, x, bounds, longest, weights)
    for other in (heads, 2 * heads):
        found, expected = run(other, eps, backend=ISA), run(other, eps, backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if has_isa(ISAS["avx2"]):  # what has products in 8 bits
        found = run(heads, eps, int8=True)
        assert 1e-4 < (found - run(heads, eps)).abs().max() < 0.5


@pytest.mark.parametrize("inner", [200, 9])
def test_layers_of_other_widths_and_eps(inner: int) -> None:
    args = next(s.args for s in OPS["encoder"].samples(torch.device("cpu"), torch.float32))
    x, bounds, _, _, _, weights, heads, longest, *_ = args
    torch.manual_seed(0)
    first = dict(zip(LAYER, weights[: len(LAYER)], strict=True))
    hidden = x.shape[1]
    first |= {"up": torch.randn(inner, hidden) / 8, "up_bias": torch.randn(inner)}
    first |= {"down": torch.randn(hidden, inner) / 8}
    layers = [*(first[name] for name in LAYER), *weights[: len(LAYER)]]
    found, expected = (
        ops.encoder(x, bounds, longest, layers, heads, 0.3, backend=name)
        for name in (ISA, "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_vectors_of_any_stride() -> None:
    args = next(s.args for s in OPS["encoder"].samples(torch.device("cpu"), torch.float32))
    x, bounds, _, _, _, weights, heads, longest, eps, *_ = args
    strided = [w if w.dim() == 2 else torch.stack([w, 0 * w], 1)[:, 0] for w in weights]
    found, expected = (ops.encoder(x, bounds, longest, w, heads, eps) for w in (strided, weights))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(200, 1, 89, 310), (60, 7) * 9, (600,)], ids=len)
def test_any_number_of_threads(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same bits by one thread, by a team that shares every step, by threads that take chunks
    each, by more of them than processors, and by several calls at once."""
    weights, heads = next(s.args for s in OPS["encoder"].samples(torch.device("cpu"), dtype))[5:7]
    bounds = torch.tensor((0, *lengths)).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(lengths), weights[0].shape[1], generator=generator).to(dtype)
    rows = torch.tensor([0, sum(lengths) - 1, 200, 3])

    def run(_: int = 0) -> Tensor:
        rest = (bounds, max(lengths), weights * 3, heads, 1e-12)
        return torch.cat([ops.encoder(x, *rest, rows=some, backend=ISA) for some in (None, rows)])

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found += [run() for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(3) as pool:
        found += pool.map(run, range(9))
    assert all(torch.equal(found[0], one) for one in found[1:])


def test_where_it_runs() -> None:
    """In inference by default; not where gradients are wanted, nor where an op is named."""
    model = bert_fast.accelerate(tiny())
    assert in_one_call(model)
    explained = bert_fast.explain(model, inputs())  # gradients are on
    assert [c.op for c in explained.choices if c.kernel == ISA].count("encoder") == 0
    assert not in_one_call(bert_fast.accelerate(tiny(), backend={"attention": "reference"}))
    wide = bert_fast.accelerate(tiny(hidden_size=288, num_attention_heads=2))
    with torch.no_grad():
        told = str(bert_fast.explain(wide, inputs()))
    assert "encoder 15x288 float32 x1: op by op" in told and "head_dim is 144, not 8 to 128" in told


def replaced_linear(model: Any) -> None:
    attention = model.encoder.layer[1].attention.self
    attention.value = copy.deepcopy(attention.value)
    attention.value.weight.data.mul_(-1.0)


def replaced_parameter(model: Any) -> None:
    up = model.encoder.layer[0].intermediate.dense
    up.weight = nn.Parameter(up.weight.detach() * 2.0)


def written_in_place(model: Any) -> None:
    model.encoder.layer[1].output.LayerNorm.bias.data.add_(1.0)


def other_eps(model: Any) -> None:
    model.encoder.layer[0].output.LayerNorm.eps = 50.0


def other_activation(model: Any) -> None:
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.Tanh()


def hooked(model: Any) -> None:
    model.encoder.layer[0].output.dense.register_forward_hook(lambda m, args, out: out * 2.0)


def wrapped(model: Any) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.5

    model.encoder.layer[0].output.dense.__class__ = Scaled


def longer(model: Any) -> None:
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))


def own_forward(model: Any) -> None:
    dense = model.encoder.layer[0].attention.output.dense
    dense.forward = lambda x: nn.functional.linear(x, dense.weight) - 1.0


def to_bf16(model: Any) -> None:
    model.bfloat16()


@pytest.mark.filterwarnings("ignore:bert_fast")
@pytest.mark.parametrize(
    "change",
    [replaced_linear, replaced_parameter, written_in_place, other_eps, other_activation, hooked,
     wrapped, longer, own_forward, to_bf16],
)  # fmt: skip
def test_a_change_after_a_forward_counts(change: Callable[[Any], None]) -> None:
    """What was remembered of the model is looked at again: as transformers' own forward has it."""
    ours, theirs = bert_fast.accelerate(tiny()), tiny()
    before = outputs(ours)[0]
    for model in (ours, theirs):
        change(model)
    real = inputs()["attention_mask"].bool()
    found, expected, before = outputs(ours)[0][real], outputs(theirs)[0][real], before[real]
    loose = 0.1 if change is to_bf16 else 1e-4
    torch.testing.assert_close(found, expected, rtol=loose, atol=loose)
    assert found.dtype != before.dtype or (found - before).abs().max() > 0.01


def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`eval()`, which sentence-transformers calls before every batch of texts, drops no copy."""
    page, packed = importlib.import_module("bert_fast.ops.encoder"), []
    pack = page.pack
    monkeypatch.setattr(page, "pack", lambda *a, **k: packed.append(a) or pack(*a, **k))
    model = bert_fast.accelerate(tiny())
    for _ in range(2):
        outputs(model.eval())
    assert len(packed) == 2  # layers
    outputs(model, output_hidden_states=True)
    outputs(model)
    assert len(packed) == 2
    outputs(model.train().eval())  # the weights may be other ones now
    assert len(packed) == 4


def test_requests_that_come_first_share_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    page, packed = importlib.import_module("bert_fast.ops.encoder"), []
    pack, many = page.pack, 8
    together = Barrier(many)

    def seen(*args: Any, **given: Any) -> Tensor:
        packed.append(args)
        sleep(0.05)  # for the others to come meanwhile
        return pack(*args, **given)

    monkeypatch.setattr(page, "pack", seen)
    model = bert_fast.accelerate(tiny())

    def first(_: int) -> Tensor:
        together.wait()
        return outputs(model)[0]

    with ThreadPoolExecutor(many) as pool:
        found = list(pool.map(first, range(many)))
    assert len(packed) == 2  # layers
    assert all(torch.equal(one, outputs(model)[0]) for one in found)


@pytest.mark.parametrize("step", ["encoder", "padded_encoder"])
def test_copies_dropped_by_another_thread_stay_to_the_end_of_a_call(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What C++ reads it has by address. `openmp` is asked just before it is called."""
    page = importlib.import_module(f"bert_fast.ops.{step}")
    model, dropped = bert_fast.accelerate(tiny()), []
    first = model.encoder.layer[0].attention.self.query.weight
    if step == "padded_encoder":
        outputs(model)  # the next call is one of a whole model

    def drop() -> bool:
        (kept,) = (c.value for k, c in _copies[first].items() if k.startswith("encoder"))
        dropped.append([weakref.ref(weight) for weight in kept.weights])
        del kept
        forget(first)
        forget_call(model)
        assert all(weight() is not None for weight in dropped[-1])
        return openmp()

    monkeypatch.setattr(page, "openmp", drop)
    outputs(model)
    assert len(dropped) == 1 and any(weight() is None for weight in dropped[0])


def test_bad_arguments() -> None:
    args = next(s.args for s in OPS["encoder"].samples(torch.device("cpu"), torch.float32))
    x, bounds, _, _, _, weights, heads, longest, eps, *_ = args
    run = ops.encoder
    with pytest.raises(ValueError, match="encoder: weights has 15 tensors, expected 16 a layer"):
        run(x, bounds, longest, weights[1:], heads, eps)
    with pytest.raises(ValueError, match="encoder: heads is 5, expected a divisor of 64"):
        run(x, bounds, longest, weights, 5, eps)
    with pytest.raises(TypeError, match=r"encoder: weights is torch\.float64, x is"):
        run(x, bounds, longest, [weights[0].double(), *weights[1:]], heads, eps)
    with pytest.raises(ValueError, match="encoder: weights want a gradient"):
        run(x, bounds, longest, [w.clone().requires_grad_() for w in weights], heads, eps)
    with pytest.raises(ValueError, match=r"out_norm has shape \(9,\), expected \(64,\)"):
        run(x, bounds, longest, [*weights[:8], x.new_ones(9), *weights[9:]], heads, eps)
    with pytest.raises(RuntimeError, match=r"encoder: rows\[0\] is 99, expected 0 <= value < 37"):
        run(x, bounds, longest, weights, heads, eps, rows=torch.tensor([99]))
