"""Casts under autocast: the values and gradients of `Tensor.to`, in few steps."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

import bert_fast
from bert_fast.casting import cast

from .models import ids, small
from .parity import DEVICE

pytestmark = pytest.mark.gpu


def tensors() -> list[Tensor | None]:
    """A leaf, what is computed and not contiguous, a frozen one, none, one in bf16, one of fp64."""
    torch.manual_seed(0)
    leaf = torch.randn(5, 7, device=DEVICE, requires_grad=True)
    wide = torch.randn(3, device=DEVICE, dtype=torch.float64, requires_grad=True)
    frozen, narrow = torch.randn(4, device=DEVICE), torch.randn(2, device=DEVICE).bfloat16()
    return [leaf, (2 * leaf).t(), frozen, None, narrow.requires_grad_(), wide]


def test_values_and_gradients_are_those_of_to() -> None:
    found = {}
    for together in (True, False):
        given = tensors()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            if together:
                some = cast(*given)
            else:
                some = tuple(None if t is None else t.to(torch.bfloat16) for t in given)
        for before, after in zip(given, some, strict=True):
            if before is None or before.dtype == torch.bfloat16:
                assert after is before
                continue
            assert after.dtype == torch.bfloat16 and after.stride() == before.stride()
            assert after.requires_grad == before.requires_grad
        sum((t.float() * 1.7).sin().sum() for t in some if t is not None).backward()
        found[together] = [*some, *(t.grad for t in given if t is not None and t.is_leaf)]
    for ours, theirs in zip(found[True], found[False], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_nothing_is_cast_without_autocast() -> None:
    given = tensors()
    assert all(after is before for before, after in zip(given, cast(*given), strict=True))


def test_part_of_the_gradients() -> None:
    leaf, _, _, _, _, wide = tensors()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        first, second = cast(leaf, wide)
    first.float().sum().backward()
    assert wide.grad is None and torch.equal(leaf.grad, torch.ones_like(leaf))
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        assert not any(t.requires_grad for t in cast(leaf, wide))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad,) = torch.autograd.grad(second.float().square().sum(), wide, create_graph=True)
        grad.sum().backward()


def test_traced_casts_are_those_of_to() -> None:
    """A graph holds casts that a compiler can fuse, and nothing that needs real tensors."""

    def run(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            x, weight, none = cast(x, weight, None)
        assert none is None
        return x @ weight

    calls: list[object] = []

    def note(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        calls.extend(node.target for node in module.graph.nodes if node.op.startswith("call"))
        return module

    x, weight = torch.randn(3, 4, device=DEVICE), torch.randn(4, 5, device=DEVICE)
    found = torch.compile(run, backend=note, fullgraph=True)(x, weight)
    assert torch.equal(found, run(x, weight)) and found.dtype == torch.bfloat16
    assert calls.count("to") == 2, calls


def casts_of(loss: Tensor) -> int:
    """Nodes in the graph of a loss that cast."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [to for to, _ in node.next_functions]
    return sum(node.name() in ("ToCopyBackward0", "_CastBackward") for node in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("module", "name"), [
    ("albert", "AlbertModel"), ("electra", "ElectraModel"), ("roc_bert", "RoCBertModel"),
])  # fmt: skip
def test_what_a_product_comes_in_is_no_residual(module: str, name: str, grad: bool) -> None:
    """Embeddings that end in a product are in autocast's dtype."""
    module = f"transformers.models.{module}.modeling_{module}"
    model = small(module, name, embedding_size=16)
    ours, exact = (copy.deepcopy(model) for _ in range(2))
    bert_fast.accelerate(ours)
    exact = exact.double()
    tokens = ids(3, 12)
    with torch.set_grad_enabled(grad):
        expected = exact(tokens).last_hidden_state
        with torch.autocast(DEVICE.type, torch.bfloat16):
            theirs, found = (one(tokens).last_hidden_state for one in (model, ours))
        assert found.dtype == torch.float32
        errors = [(one.double() - expected).norm() for one in (found, theirs)]
    assert errors[0] <= 2 * errors[1]
    if grad:
        found.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_a_layer_casts_in_five_steps() -> None:
    """One that is not one node: of 14 tensors, three times for products, and a sum before each
    norm."""
    count = {}
    for layers in (1, 3):
        config = BertConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=40,
            vocab_size=50,
        )  # fmt: skip
        model = bert_fast.accelerate(BertForMaskedLM(config).to(DEVICE).train())
        for layer in model.bert.encoder.layer:
            layer.output.LayerNorm.bias.requires_grad_(False)
        ids = torch.arange(5, 25, device=DEVICE).view(2, 10)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        count[layers] = casts_of(loss)
    assert (count[3] - count[1]) / 2 == 5, count


@pytest.mark.parametrize("training", [False, True])
def test_fp64_stays_fp64(training: bool) -> None:
    """As autocast has it."""
    module = "transformers.models.bert.modeling_bert"
    model = small(module, "BertForMaskedLM").double().train(training)
    ours, tokens, found = bert_fast.accelerate(copy.deepcopy(model)), ids(3, 12), []
    for one in (model, ours):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = one(tokens, labels=tokens).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in one.parameters())])
    for theirs, our in zip(*found, strict=True):
        torch.testing.assert_close(our, theirs, rtol=1e-10, atol=1e-10)
