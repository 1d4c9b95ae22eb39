"""CUDA graphs: what is around them runs on a CPU too, where running again stands for replaying."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification

import bert_fast
from bert_fast import graphs
from bert_fast.graphs import Graphs, bucket_of, kept_of, reasons_against_inputs
from bert_fast.inputs import read_batch
from bert_fast.modeling import packed_forward
from bert_fast.ops import weight_copies
from bert_fast.structure import Structure, structure_of

from .models import ids, masks, tiny
from .parity import DEVICE

GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")


def run_again(run: Callable[[], Tensor], place: Any) -> tuple[Callable[[], Any], Tensor]:
    """Stands for recording: the same memory for inputs and output, nothing else kept."""
    output = run()
    return lambda: output.copy_(run()), output


class Model:
    """A packed model and its graphs, with what is to be replayed."""

    def __init__(self) -> None:
        self.model = bert_fast.accelerate(tiny())
        self.graphs = Graphs(self.model, self.look(), run_again)

    def look(self) -> Structure:
        return structure_of(self.model, self.model.bert_fast_family)

    def __call__(self, inputs: dict[str, Tensor], first_only: bool = False) -> tuple[Tensor, ...]:
        """(from a graph, without one)."""
        structure = self.look()
        if structure is not self.graphs.structure:
            self.graphs = Graphs(self.model, structure, self.graphs.capture)
        batch = read_batch(structure, inputs)
        rows = batch.packing.starts() if first_only else None

        def run(batch: Any, rows: Tensor | None) -> Tensor:
            return packed_forward(self.model, structure, batch, "auto", rows=rows)

        with torch.inference_mode():
            self.graphs.look()
            found = self.graphs(bucket_of(batch, rows), batch, rows, run)
            return found, run(batch, rows)


def padded(batch: int, length: int, kind: str = "right") -> dict[str, Tensor]:
    mask = masks(max(batch, 2), max(length, 9))[kind]
    mask = None if mask is None else mask[:batch, :length]
    return {"input_ids": ids(batch, length), "attention_mask": mask}


def test_buckets_hold_and_waste_little() -> None:
    for number in range(1, graphs.MOST_TOKENS + 1):
        held = graphs._round_up(number)
        assert number <= held <= max(number + 15, 1.125 * number)
        assert held - number < graphs._step(held)  # what the sequences that are added can hold
        assert number <= graphs._power(number) < 2 * number + 1


@pytest.mark.parametrize("first_only", [False, True])
def test_every_batch_as_without_graphs(first_only: bool) -> None:
    model = Model()
    for kind in (kind for kind in masks(4, 20) if not kind.startswith("4d")):
        for batch in (1, 2, 3, 4):
            for length in (7, 9, 15, 20):
                inputs = padded(batch, length, kind)
                inputs["token_type_ids"] = ids(batch, length, 2)
                found, expected = model(inputs, first_only)
                assert found.shape == expected.shape
                torch.testing.assert_close(found, expected)
    assert 2 < len(model.graphs.kept) < 32


def test_results_are_the_callers_own() -> None:
    model = Model()
    first, expected = model(padded(2, 9))
    model({"input_ids": ids(2, 9).flip(1), "attention_mask": masks(2, 9)["right"]})
    torch.testing.assert_close(first, expected)
    assert len(model.graphs.kept) == 1


@pytest.mark.parametrize("change", ["weight", "eps", "scale"])
def test_what_is_written_to_is_seen(change: str) -> None:
    model, recorded = Model(), []
    model.graphs.capture = lambda *args: (recorded.append(1), run_again(*args))[1]
    before, _ = model(padded(2, 9))
    layer = model.model.encoder.layer[0]
    if change == "weight":
        with torch.no_grad():
            layer.attention.self.query.weight.mul_(3.0)
    elif change == "scale":
        layer.attention.self.scaling *= 3
    else:
        layer.output.LayerNorm.eps = 0.5
    found, expected = model(padded(2, 9))
    torch.testing.assert_close(found, expected)
    assert (found - before).abs().max() > 1e-3 and len(recorded) == 2


@pytest.mark.skipif(DEVICE.type != "cpu", reason="op by op, fewer weights are copied")
def test_copies_live_as_long_as_the_graph() -> None:
    model = Model()
    model(padded(2, 9))
    (graph,) = model.graphs.kept.values()
    copies = [kind.value for kinds in weight_copies._copies.values() for kind in kinds.values()]
    assert graph.copies and all(any(one is copy for copy in copies) for one in graph.copies)


def test_the_last_used_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes a third time takes the place of the one not used for longest."""
    monkeypatch.setattr(graphs, "KEPT", 2)
    model, kept = Model(), []
    for length in (5, 20, 5, 40, 5, 40, 40, 5, 20):
        torch.testing.assert_close(*model(padded(1, length, "none")))
        kept.append([bucket.longest for bucket in model.graphs.kept])
    assert kept[:3] == [[16], [16, 32], [32, 16]]
    assert kept[3:6] == [[32, 16]] * 3  # 40 came twice
    assert kept[6:] == [[16, 64], [64, 16], [64, 16]]


def test_where_too_many_take_turns_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KEPT", 4)
    model = Model()
    turns = [padded(batch, length, "none") for batch in (1, 2, 3) for length in (5, 20)]
    for inputs in turns:
        model(inputs)
    model.graphs.capture = lambda *args: pytest.fail("recorded")
    for inputs in turns * graphs.SIGHTINGS:
        torch.testing.assert_close(*model(inputs))
    assert len(model.graphs.waiting) == len(turns) - 4


def test_graphs_nobody_uses_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KEPT", 4)
    model = Model()
    turns = [padded(batch, length, "none") for batch in (1, 2, 3) for length in (5, 20)]
    for inputs in turns[:4]:
        model(inputs)
    for inputs in turns[2:] * graphs.SIGHTINGS:
        model(inputs)
    model.graphs.capture = lambda *args: pytest.fail("recorded")
    for inputs in turns[2:]:
        torch.testing.assert_close(*model(inputs))
    assert len(model.graphs.kept) == 4 and not model.graphs.waiting


def test_where_nothing_can_be_recorded() -> None:
    model = Model()

    def refuse(*args: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    model.graphs.capture = refuse
    assert torch.equal(*model(padded(2, 9)))  # once, another thread may have been in the way
    with pytest.warns(UserWarning, match="no CUDA graph .*: operation not permitted"):
        found, expected = model(padded(2, 9))
    assert torch.equal(found, expected)
    model.graphs.capture = lambda *args: pytest.fail("tried again")
    assert torch.equal(*model(padded(2, 30)))


def test_weights_that_nothing_tells_of() -> None:
    with torch.inference_mode():
        model = Model()  # its parameters have no version
    model.graphs.capture = lambda *args: pytest.fail("recorded")
    assert torch.equal(*model(padded(2, 9)))


def test_threads_take_turns() -> None:
    model, wrong = Model(), []

    def work(length: int) -> None:
        for _ in range(10):
            found, expected = model(padded(3, length))
            if not torch.allclose(found, expected, atol=1e-5):
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(length,)) for length in (9, 10, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_a_graph_cannot_take() -> None:
    model = Model()
    look = partial(read_batch, model.look())
    assert not reasons_against_inputs(model.look(), look(padded(2, 9)))
    embeds = {"inputs_embeds": torch.zeros(2, 9, 64, device=DEVICE)}
    whole = torch.ones(2, 1, 9, 9, dtype=torch.bool, device=DEVICE)
    for inputs in (embeds, {"input_ids": ids(2, 9), "attention_mask": whole}):
        assert reasons_against_inputs(model.look(), look(inputs))
    assert reasons_against_inputs(model.look(), look(padded(300, 40)))
    assert reasons_against_inputs(model.look(), look(padded(0, 9)))
    if DEVICE.type == "cpu":
        assert graphs.reasons_against(model.look(), look(padded(2, 9))) == ["its inputs are on cpu"]


class Waits(TorchDispatchMode):
    """Which ops bring a value or a size from the device: no recording outlives one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        to_host = isinstance(found, Tensor) and not found.is_cuda
        to_host = to_host and any(isinstance(a, Tensor) and a.is_cuda for a in args)
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        if func.overloadpacket in waits or to_host:
            self.seen.append(str(func))
        return found


@pytest.mark.parametrize("kind", ["none", "full"])
def test_inputs_without_a_mask_are_read_without_waiting(kind: str) -> None:
    structure = Model().look()
    with Waits() as waits:
        read_batch(structure, padded(2, 9, kind))
    assert bool(waits.seen) == (kind == "full")


def test_another_backend_has_graphs_of_its_own() -> None:
    model = Model()
    model(padded(2, 9))
    model.model.__dict__[graphs._GRAPHS] = model.graphs
    assert kept_of(model.model) == 1
    bert_fast.accelerate(model.model, {"linear": "reference"})
    assert kept_of(model.model) == 0


@pytest.mark.gpu
def test_accelerated_with_graphs() -> None:
    """On a GPU by graphs, elsewhere as ever."""
    for cls in (None, BertForSequenceClassification):
        model: nn.Module = tiny() if cls is None else tiny(cls)
        expected, found = [], []
        for graphed, into in ((False, expected), (True, found)):
            bert_fast.accelerate(model, graphs=graphed)
            with torch.inference_mode():
                into += [model(**padded(batch, 20))[0] for batch in (1, 2, 3, 3)]
        told = str(bert_fast.report(model))
        assert "by CUDA graphs" in told
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        inner = model if cls is None else model.bert
        assert kept_of(inner) == (3 if DEVICE.type == "cuda" else 0)
        model.train()
        assert kept_of(inner) == 0
        model(**padded(2, 20))[0].sum().backward()


@GPU
@pytest.mark.gpu
def test_graphs_are_recorded_anew_for_changed_weights() -> None:
    """Of two models: what one gives back, the other may not stand on."""
    models = [bert_fast.accelerate(tiny(seed=seed), graphs=True) for seed in (0, 1)]
    for factor in (1.0, 1.5, 0.5):
        for model in models:
            with torch.no_grad():
                model.encoder.layer[0].attention.self.query.weight.mul_(factor)
            plain = bert_fast.accelerate(copy.deepcopy(model))
            with torch.inference_mode():
                for _ in range(2):
                    found, expected = (m(**padded(2, 9))[0] for m in (model, plain))
                    torch.testing.assert_close(found, expected)
            assert kept_of(model) == 1
    models.pop().train()
    torch.cuda.empty_cache()
    with torch.inference_mode():
        plain = bert_fast.accelerate(copy.deepcopy(models[0]))
        found, expected = (m(**padded(2, 9))[0] for m in (models[0], plain))
    torch.testing.assert_close(found, expected)


@GPU
@pytest.mark.gpu
def test_a_graph_has_a_workspace_of_its_own() -> None:
    x = torch.randn(512, 512, device=DEVICE)
    for _ in range(40):  # more than torch has streams: all have a workspace of cuBLAS now
        with torch.cuda.stream(torch.cuda.Stream()):
            x @ x
    torch.cuda.synchronize()
    model = bert_fast.accelerate(tiny(), graphs=True)
    with torch.inference_mode():
        expected = model(**padded(2, 9))[0]
        torch._C._cuda_clearCublasWorkspaces()  # as Inductor does
        torch.cuda.empty_cache()
        other = torch.full((1 << 28,), 3.0, device=DEVICE)  # where they were
        torch.testing.assert_close(model(**padded(2, 9))[0], expected)
        assert (other == 3.0).all()


@GPU
@pytest.mark.gpu
def test_a_graph_of_somebody_elses_reads_the_weights() -> None:
    model = bert_fast.accelerate(tiny())
    inputs = padded(2, 9, "none")  # of a mask's tokens the number is asked, which nothing records
    with torch.inference_mode():
        for _ in range(2):
            model(**inputs)
        here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                found = model(**inputs)[0]
        finally:  # a recording that fails leaves its own stream to the tests after this one
            torch.cuda.set_stream(here)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.query.weight.mul_(3.0)
    model.train()  # gives copies back
    graph.replay()
    with torch.inference_mode():
        torch.testing.assert_close(found, model.eval()(**inputs)[0])


@GPU
@pytest.mark.gpu
def test_streams_do_not_mix() -> None:
    model = bert_fast.accelerate(tiny(), graphs=True)
    batches = [padded(2, 9), padded(2, 10)]
    with torch.inference_mode():
        expected = [model(**batch)[0] for batch in batches]
        for _ in range(20):
            found = []
            for batch in batches:
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    found.append(model(**batch)[0])
            torch.cuda.synchronize()
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs)
