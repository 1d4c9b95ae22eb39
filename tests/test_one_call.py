"""A whole forward in one call of C++: the bits of the packed forward, and only while it is true."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

import bert_fast
from bench.measure import compare
from bert_fast import one_call
from bert_fast.families import FAMILIES
from bert_fast.ops.backends import ISAS, best_isa
from bert_fast.ops.encoder import table_of
from bert_fast.ops.padded_encoder import Parts, Settings, padded_encoder, reference

from .models import ids, masks, small, tiny
from .parity import DEVICE, DTYPES

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="it is for a CPU")


def masked(kind: str, length: int) -> Tensor | None:
    mask = masks(BATCH, length)[kind]
    return None if mask is None else mask.long()


BATCH, LENGTH = 3, 7  # few tokens: the op is preferred on every CPU
# Of those that C++ takes whole: the others have a bias, a projection or more embeddings.
WHOLE = ("bert", "roberta", "xlm_roberta", "camembert", "data2vec", "ernie", "bert_generation")
ROWS = [row for row in FAMILIES if row.module.split(".")[-2] in (*WHOLE, "electra", "distilbert")]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one for each call of C++."""
    found: list[int] = []

    def counted(*args: Any) -> Any:
        found.append(1)
        return padded_encoder(*args)

    monkeypatch.setattr(one_call, "padded_encoder", counted)
    return found


def run(model: Any, *args: Any, **given: Any) -> Any:
    with torch.no_grad():
        return model(*args, **given)


def ready(model: Any = None) -> Any:
    """Accelerated, and run once: the next call is one of C++."""
    model = bert_fast.accelerate(tiny() if model is None else model)
    run(model, ids(BATCH, LENGTH))
    return model


def tensors(output: Any) -> list[Tensor]:
    values = output.values() if hasattr(output, "values") else output
    return [t for v in values for t in (v if isinstance(v, tuple) else (v,)) if t is not None]


def same(found: Any, expected: Any) -> bool:
    a, b = tensors(found), tensors(expected)
    return type(found) is type(expected) and len(a) == len(b) and all(map(torch.equal, a, b))


# -- the op ---------------------------------------------------------------------------------------


def operands(dtype: torch.dtype, padding_idx: int, pooler: str, int8: bool) -> tuple[Any, ...]:
    """Parts, weights and settings of two layers of awkward sizes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    hidden, inner, heads = 48, 37, 3

    def linear(rows: int, depth: int) -> list[Tensor]:
        return [draw(rows, depth, scale=depth**-0.5), draw(rows, scale=0.3)]

    def norm() -> list[Tensor]:
        return [draw(hidden, scale=0.2) + 1.0, draw(hidden, scale=0.2)]

    weights = []
    for _ in range(2):
        three = [linear(hidden, hidden) for _ in range(3)]
        weights += [w for w, _ in three] + [b for _, b in three]
        weights += [*linear(hidden, hidden), *norm(), *linear(inner, hidden)]
        weights += [*linear(hidden, inner), *norm()]
    pooling = linear(hidden, hidden) if pooler != "none" else [None, None]
    if pooler == "no bias":
        pooling[1] = None
    kinds = None if padding_idx >= 0 else draw(2, hidden)
    parts = Parts(draw(99, hidden), draw(20, hidden), kinds, *norm(), *pooling)
    return parts, weights, Settings(1e-12, padding_idx, heads, 1e-12, "gelu", int8)


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("isa", [n for n, level in ISAS.items() if level <= best_isa()])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("mask", "padding_idx", "pooler"),
    [
        *(("none", -1, "bias"), ("full", 1, "no bias"), ("right", 0, "none")),
        *(("left", 1, "bias"), ("holes", 1, "none"), ("first_hidden", -1, "no bias")),
    ],
)
def test_parity(
    mask: str, padding_idx: int, pooler: str, dtype: torch.dtype, isa: str, int8: bool
) -> None:
    parts, weights, settings = operands(dtype, padding_idx, pooler, int8)
    batch = ids(BATCH, 13, 4), ids(1, 13, 2), masked(mask, 13)
    table = table_of(weights, settings.heads, parts.word, ISAS[isa], int8)
    first_only = mask in ("full", "left", "first_hidden")
    found = padded_encoder(*batch, parts, table, settings, ISAS[isa], first_only)
    wide = Parts(*(None if t is None else t.double() for t in parts))
    exact = reference(*batch, wide, [w.double() for w in weights], settings, first_only)
    plain = reference(*batch, parts, weights, settings, first_only)
    assert (found[1] is None) == (pooler == "none")
    for got, truth, theirs in zip(found, exact, plain, strict=True):
        if got is not None:
            assert got.dtype == dtype and got.shape == truth.shape
            errors = compare(got, truth, theirs, 2.0)
            assert errors.holds, errors


def test_ids_as_they_come() -> None:
    """int32, strided, expanded: the same."""
    model = ready()
    words, kinds = ids(BATCH, LENGTH), ids(1, LENGTH, 2)
    mask = masked("holes", LENGTH)
    assert mask is not None
    expected = run(model, words, mask, kinds.expand(BATCH, -1).contiguous())
    for given in (
        (words.int(), mask.int(), kinds.int()),
        (words.t().contiguous().t(), mask.bool(), kinds.expand(BATCH, -1)),
        (torch.stack((words, words), -1)[..., 0], mask.t().contiguous().t(), kinds),
        (words, mask * 7, kinds),
    ):
        assert same(run(model, *given), expected)


@pytest.mark.parametrize("bad", [-1, 99])
def test_ids_out_of_range(bad: int, calls: list[int]) -> None:
    model = ready()
    words, kinds = ids(BATCH, LENGTH), ids(BATCH, LENGTH, 2)
    for name in ("input_ids", "token_type_ids"):
        given = {"input_ids": words.clone(), "token_type_ids": kinds.clone()}
        given[name][1, 2] = bad
        with pytest.raises(IndexError, match=f"{name}.* is {bad}, expected 0 <= value"):
            run(model, **given)
        given["attention_mask"] = torch.ones_like(words)
        given["attention_mask"][1, 2] = 0  # what is padding may be anything
        run(model, **given)
    assert len(calls) == 4


# -- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model)
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_the_bits_of_the_packed_forward(row: Any, dtype: str | None, calls: list[int]) -> None:
    changes = {"embedding_size": 32} if row.model == "ElectraModel" else {}
    model = bert_fast.accelerate(small(row.module, row.model, **changes), dtype=dtype)
    for mask in (kind for kind in masks(BATCH, LENGTH) if not kind.startswith("4d")):
        given = {"input_ids": ids(BATCH, LENGTH), "attention_mask": masked(mask, LENGTH)}
        one_call.forget_call(model)
        calls.clear()
        expected = run(model, **given)
        assert not calls
        found = run(model, **given)
        assert len(calls) == 1 and same(found, expected)
        found = run(model, **given, return_dict=False)
        assert len(calls) == 2 and same(found, run(model, **given).to_tuple())


@pytest.mark.parametrize(
    ("cls", "padded"),
    [
        (BertForSequenceClassification, True),
        (BertForNextSentencePrediction, True),
        (BertForQuestionAnswering, True),
        (BertForTokenClassification, False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*model_input")
def test_heads(cls: type, padded: bool, calls: list[int]) -> None:
    """padded: whether it is one call with padding too, which the last one computes."""
    model = bert_fast.accelerate(tiny(cls), keep_padding=not padded)
    for mask in (kind for kind in masks(BATCH, LENGTH) if not kind.startswith("4d")):
        given = {"input_ids": ids(BATCH, LENGTH), "attention_mask": masked(mask, LENGTH)}
        one_call.forget_call(model.bert)
        expected = run(model, **given)
        calls.clear()
        found = run(model, **given)
        assert len(calls) == (padded or mask in ("none", "full")) and same(found, expected)


def test_outputs_do_not_share_memory() -> None:
    """Who keeps the pooled output keeps no states."""
    found = run(ready(), ids(BATCH, LENGTH))
    states, pooled = found.last_hidden_state, found.pooler_output
    assert states.untyped_storage().nbytes() == states.nbytes
    assert pooled.untyped_storage().nbytes() == pooled.nbytes


def test_too_long_an_input(calls: list[int]) -> None:
    model = ready()
    with pytest.raises(ValueError, match="41 exceeds max_position_embeddings = 40"):
        run(model, ids(1, 41))
    run(model, ids(1, 40))
    assert len(calls) == 1


def test_nothing_is_left_to_run() -> None:
    for shape in ((0, 5), (2, 0)):
        words = torch.zeros(shape, dtype=torch.int64)
        assert same(run(ready(), words), run(bert_fast.accelerate(tiny()), words))


WORDS = ids(BATCH, LENGTH)
MORE: dict[str, dict[str, Any]] = {
    "positions": {"position_ids": ids(BATCH, LENGTH, 40)},
    "embeddings": {"input_ids": None, "inputs_embeds": torch.ones(BATCH, LENGTH, 64)},
    "float mask": {"attention_mask": masks(BATCH, LENGTH)["right"].float()},
    "4d mask": {"attention_mask": masks(BATCH, LENGTH)["4d_bool"]},
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
}


@pytest.mark.filterwarnings("ignore:bert_fast. Hugging Face's own forward runs")
@pytest.mark.parametrize("more", MORE)
def test_a_call_that_asks_for_more(more: str, calls: list[int]) -> None:
    given = {"input_ids": WORDS, **MORE[more]}
    expected = run(bert_fast.accelerate(tiny()), **given)
    model = ready()
    assert same(run(model, **given), expected) and not calls
    run(model, WORDS, output_attentions=False, output_hidden_states=None)
    assert len(calls) == 1  # it still can


def config(model: Any) -> None:
    model.config.output_hidden_states = True


def tuples(model: Any) -> None:
    model.config.return_dict = False


def hidden(model: Any) -> None:
    model.encoder.layer[1].register_forward_hook(lambda m, args, out: out * 0.5)


def pooler(model: Any) -> None:
    model.pooler.activation = nn.Sigmoid()


def no_pooler(model: Any) -> None:
    model.pooler = None


def eps(model: Any) -> None:
    model.embeddings.LayerNorm.eps = 0.5


def method(model: Any) -> None:
    own = model.pooler.forward
    model.pooler.forward = lambda states: 2 * own(states)


def largest(model: Any) -> None:
    model.embeddings.word_embeddings.max_norm = 0.5


def written(model: Any) -> None:
    model.encoder.layer[1].output.dense.weight.data.mul_(1.5)


def elsewhere(model: Any) -> None:
    for part in (model.pooler.dense, model.embeddings.word_embeddings):
        part.weight.data = part.weight.data * 1.5


def directly(model: Any) -> None:
    with torch.no_grad():
        for part in (model.pooler.dense.bias, model.embeddings.LayerNorm.weight):
            part.mul_(1.5)


def buffer(model: Any) -> None:
    model.embeddings.token_type_ids.fill_(1)


def half(model: Any) -> None:
    model.bfloat16()


def half_inside(model: Any) -> None:
    model.embeddings.bfloat16()
    model.encoder.bfloat16()
    model.pooler.bfloat16()


CHANGES = (
    *(config, tuples, hidden, pooler, no_pooler, eps, method, largest),
    *(written, elsewhere, directly, buffer, half, half_inside),
)


@pytest.mark.filterwarnings("ignore:bert_fast. Hugging Face's own forward runs")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_was_changed_since_is_seen(change: Callable[[Any], None]) -> None:
    model, fresh = ready(), tiny()
    before = run(model, WORDS)
    change(model)
    change(fresh)
    expected = run(bert_fast.accelerate(fresh), WORDS)
    assert not same(before, expected)
    for _ in range(2):  # once in its own way, and then in one call again
        assert same(run(model, WORDS), expected)


@pytest.mark.parametrize("backend", ["reference", {"attention": "reference"}])
def test_another_backend(backend: Any, calls: list[int]) -> None:
    model = bert_fast.accelerate(ready(), backend=backend)
    run(model, WORDS), run(model, WORDS)
    assert not calls


@pytest.mark.filterwarnings("ignore:bert_fast. Hugging Face's own forward runs")
@pytest.mark.parametrize("mode", ["gradients", "autocast", "global hook", "vmap", "dropout"])
def test_not_while_somebody_takes_part(mode: str, calls: list[int]) -> None:
    model = ready(tiny(attention_probs_dropout_prob=0.5))  # the layers, not the embeddings
    with torch.no_grad():
        if mode == "gradients":
            with torch.enable_grad():
                assert model(WORDS).last_hidden_state.requires_grad
        elif mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                model(WORDS)
        elif mode == "vmap":
            torch.func.vmap(lambda w: model(w.unsqueeze(0))[0])(WORDS)
        elif mode == "dropout":
            model.train()
            assert not torch.equal(model(WORDS)[0], model(WORDS)[0])
            model.eval()
            model(WORDS)  # it has to be looked at again
        else:
            handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
            model(WORDS)
            handle.remove()
        assert not calls
        model(WORDS)
    assert len(calls) == 1


def test_copies_are_looked_at_by_themselves(calls: list[int]) -> None:
    model = ready()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.pooler.dense.weight.zero_()
        other.pooler.dense.bias.zero_()
    run(other, WORDS)
    assert not calls
    assert not run(other, WORDS).pooler_output.any() and run(model, WORDS).pooler_output.any()
    assert len(calls) == 2


def test_a_model_that_moves_forgets(calls: list[int]) -> None:
    """Its table would keep the memory of the weights that it had."""
    model = ready()
    for change in (model.bfloat16, model.train, lambda: bert_fast.restore(model)):
        change()
        assert not [n for n in vars(model) if n == one_call._READY]
        run(model.eval(), WORDS)
    assert type(model) is BertModel and not calls
