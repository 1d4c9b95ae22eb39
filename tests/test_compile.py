"""torch.compile, torch.export and torch.autocast: the packed forward, traced whole."""

from __future__ import annotations

import copy
import io
import random
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import BertForQuestionAnswering

import bert_fast

from .against_hf import over_budget, run
from .models import ids, masks, read_rows, tiny
from .parity import DEVICE


def pair() -> tuple[nn.Module, nn.Module]:
    torch._dynamo.reset()
    counters.clear()
    plain = tiny()
    return plain, bert_fast.accelerate(copy.deepcopy(plain))


def ragged(batch: int, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in mask:
        row[random.randint(1, length) :] = 0
        if random.random() < 0.2:
            row.copy_(row.flip(0))
    return ids(batch, length), mask.to(DEVICE)


def ops_in(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if "bert_fast" in str(node.target)}


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_for_many_shapes(training: bool) -> None:
    random.seed(0)
    plain, ours = pair()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    plain.train(training)
    ours.train(training)
    early = 0
    for step in range(20):
        tokens, mask = ragged(random.randint(2, 9), random.randint(2, 40))
        with torch.set_grad_enabled(training):
            found = compiled(tokens, attention_mask=mask)
        if step == 1:
            early = counters["stats"]["unique_graphs"]
        if step % 4:
            continue
        expected = plain(tokens, attention_mask=mask)
        kept = mask.bool()
        torch.testing.assert_close(
            found.last_hidden_state[kept], expected.last_hidden_state[kept], rtol=1e-4, atol=1e-5
        )
        assert not found.last_hidden_state[~kept][1:].any() or not mask[:, 0].all()
        torch.testing.assert_close(
            found.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5
        )
        if training:
            gradients = []
            for model, output in ((plain, expected), (ours, found)):
                model.zero_grad()
                output.pooler_output.sum().backward()
                gradients.append([p.grad for p in model.parameters()])
            for a, b in zip(*gradients, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == early, "recompiled after the first two shapes"
    assert not counters["graph_break"]


def test_inductor() -> None:
    plain, ours = pair()
    tokens, mask = ids(4, 11), masks(4, 11)["right"]
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for rows in (4, 3):
        inputs = {"input_ids": tokens[:rows], "attention_mask": mask[:rows]}
        with torch.no_grad():
            found = compiled(**inputs).pooler_output
            torch.testing.assert_close(found, plain(**inputs).pooler_output, rtol=1e-4, atol=1e-5)
    torch.compile(ours, fullgraph=True)(**inputs).pooler_output.sum().backward()  # of fixed sizes
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_decompositions(strict: bool) -> None:
    plain, ours = pair()
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=40)}
    inputs = {"input_ids": ids(4, 11), "attention_mask": masks(4, 11)["right"]}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(
            ours, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes), strict=strict
        )
        lowered = program.run_decompositions()
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
    assert any("attention" in name for name in ops_in(lowered.graph))
    other = {"input_ids": ids(6, 17), "attention_mask": masks(6, 17)["right"]}
    kept = other["attention_mask"].bool()
    with torch.no_grad():
        expected = plain(**other).last_hidden_state[kept]
        for exported in (program, lowered, loaded):
            found = exported.module()(**other).last_hidden_state[kept]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_spans_are_spared_padding_when_compiled_too() -> None:
    torch._dynamo.reset()
    plain = tiny(BertForQuestionAnswering)
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    mask = masks(4, 11)["right"]
    inputs, kept = {"input_ids": ids(4, 11), "attention_mask": mask}, mask.bool()
    with torch.no_grad():
        found, expected = compiled(**inputs), plain(**inputs)
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(found[name][kept], expected[name][kept], rtol=1e-4, atol=1e-5)
        assert (found[name][~kept] == torch.finfo(torch.float32).min).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["right", "4d_bool"])
def test_autocast_is_as_exact_as_hugging_face(dtype: torch.dtype, kind: str) -> None:
    plain, mask = tiny().train(), masks(4, 11)[kind]
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    inputs, rows = {"input_ids": ids(4, 11), "attention_mask": mask}, read_rows(mask, 4, 11)
    exact = run(copy.deepcopy(plain).double(), inputs, rows)
    results = []
    for model in (plain, ours):

        def call(model: nn.Module = model, **inputs: Tensor) -> object:
            with torch.autocast(DEVICE.type, dtype), warnings.catch_warnings():
                warnings.simplefilter("error")  # no fallback
                return model(**inputs)

        results.append(run(model, inputs, rows, call))
    with torch.autocast(DEVICE.type, dtype):
        ran = {c.op: c.on for c in bert_fast.explain(ours, inputs).choices}
    for op in ("qkv_linear", "attention", "linear", "feed_forward"):
        assert str(dtype).removeprefix("torch.") in ran[op], ran
    assert "float32" in ran["add_layernorm"], ran
    assert results[0]["last"].dtype == results[1]["last"].dtype == torch.float32
    assert results[0]["pooled"].dtype == results[1]["pooled"].dtype == dtype
    assert not over_budget(exact, *results)
