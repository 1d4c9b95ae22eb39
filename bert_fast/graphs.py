"""CUDA graphs of the packed forward, for batches so small that launching takes longer than running.

A graph is recorded for a *bucket*: so many tokens, sequences, and tokens of the longest sequence.
Where sequences begin is data, not shape, so any batch that fits the bucket replays its graph:

    ids, positions, cu_seqlens -> the graph's own inputs;  replay;  its output -> a new tensor

Tokens up to the bucket's make more sequences, and sequences up to the bucket's are empty: nobody
reads what becomes of either.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .inputs import Batch
from .notice import warn_once
from .ops.backends import triton_missing, triton_module
from .ops.modes import for_a_recording, tracing
from .ops.weight_copies import holding_copies
from .padding import Packing
from .structure import KeptInModel, Structure

MOST_TOKENS = 8_192  # more keep a GPU busy for longer than their launches take
KEPT = 32  # graphs of a model, the last used
# Recording takes as long as ten replays save, or more. So once KEPT are there, a bucket has to come
# so often since the graph was used whose place it takes: where more than KEPT take turns, each
# would lose its place before its graph had paid.
SIGHTINGS = 3

Run = Callable[[Batch, Tensor | None], Tensor]
# Records `run` and returns how to run it again on the same memory, and where its result then is.
Capture = Callable[[Callable[[], Tensor], Any], tuple[Callable[[], None], Tensor]]


class Place(NamedTuple):
    """Where a model's graphs are recorded: the memory they share, and a stream of their own.

    On torch's one stream for recordings, a GEMM's workspace would lie in the memory of whichever
    model was recorded first, and go with it.
    """

    pool: Any
    stream: torch.cuda.Stream


# torch records one graph at a time in a process: starting one waits for the device, which a
# recording in another thread would not survive.
_recording = threading.Lock()

_version = attrgetter("_version")


class Bucket(NamedTuple):
    """What a graph is recorded for: upper bounds, and which inputs there are.

    rows: of how many tokens the last layer's states are wanted; 0: of all.
    """

    tokens: int
    sequences: int
    longest: int
    rows: int
    has_types: bool
    has_key_start: bool


def bucket_of(batch: Batch, rows: Tensor | None) -> Bucket:
    packing = batch.packing
    return Bucket(
        _round_up(batch.tokens),
        _power(packing.cu_seqlens.shape[0] - 1),
        max(16, _power(packing.max_seqlen)),
        0 if rows is None else _round_up(rows.shape[0]),
        batch.token_type_ids is not None,
        packing.key_start is not None,
    )


def _round_up(number: int) -> int:
    """To one of eight steps an octave: a sixteenth is wasted in the mean."""
    step = _step(number)
    return -(-number // step) * step


def _step(number: int) -> int:
    return max(16, _power(number) // 16)


def _power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def reasons_against(structure: Structure, batch: Batch) -> list[str]:
    """Why this call is not for a graph (empty: it is)."""
    device = batch.packing.cu_seqlens.device
    if device.type != "cuda":
        return [f"its inputs are on {device}"]
    switches = [switch for switch, _ in structure.dropouts] + [structure.embeddings.dropout]
    if torch.is_grad_enabled() or any(s is not None and s.training for s in switches):
        return ["it trains or records gradients"]
    if tracing() or torch.is_autocast_enabled(device.type):
        return ["it is traced, or autocast is on"]
    if torch.cuda.is_current_stream_capturing():
        return ["a graph is being recorded around it"]
    return reasons_against_inputs(structure, batch)


def reasons_against_inputs(structure: Structure, batch: Batch) -> list[str]:
    """Why a graph cannot take these inputs, wherever they are."""
    if not 0 < batch.tokens <= MOST_TOKENS:
        return [f"{batch.tokens} tokens, not 1 to {MOST_TOKENS}"]
    if batch.input_ids is None or batch.bias is not None or batch.extra:
        return ["it has other inputs than ids and a 2D mask"]
    if structure.family.bias is not None or not structure.embeddings.fused:
        return ["its family reads more than packed tokens"]
    return []


class _Graph:
    """One recorded forward: its inputs, how to replay it, its output."""

    def __init__(
        self, bucket: Bucket, run: Run, device: torch.device, capture: Capture, place: Place | None
    ) -> None:
        def new(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        # So many more sequences hold what a batch may lack of the bucket's tokens.
        sequences = bucket.sequences + -(-_step(bucket.tokens) // bucket.longest)
        with torch.inference_mode(False):
            self.ids, self.positions = new(bucket.tokens), new(bucket.tokens)
            self.types = new(bucket.tokens) if bucket.has_types else None
            ramp = torch.arange(sequences + 1, dtype=torch.int32, device=device) * bucket.longest
            self.ramp, self.bounds = ramp, ramp.clamp_max(bucket.tokens)
            self.key_start = self.bounds[:-1].clone() if bucket.has_key_start else None
            self.rows = new(bucket.rows) if bucket.rows else None
        packing = Packing(1, bucket.tokens, None, self.bounds, self.key_start, bucket.longest)
        self.batch = Batch(
            packing,
            None,
            self.ids.unsqueeze(0),
            None,
            None if self.types is None else self.types.unsqueeze(0),
            self.positions.unsqueeze(0),
        )
        with holding_copies() as self.copies:  # they are read for as long as this lives
            self.replay, self.output = capture(lambda: run(self.batch, self.rows), place)

    def __call__(self, batch: Batch, rows: Tensor | None) -> Tensor:
        tokens = batch.tokens
        self.take(batch)
        if self.rows is not None and rows is not None:  # what stays behind them is a row too
            self.rows[: rows.shape[0]] = rows
        self.replay()
        return self.output[: tokens if rows is None else rows.shape[0]].clone()

    def take(self, batch: Batch) -> None:
        """Copies a batch to where the graph reads it."""
        packing = batch.packing
        counted = packing.indices is None or packing.place is not None
        if not (counted and self.ids.is_cuda) or triton_missing():
            return self.take_piecewise(batch)
        triton_module("pack").stage(
            packing.place, batch.input_ids, batch.token_type_ids, batch.position_ids,
            packing.cu_seqlens, packing.key_start,
            self.ids, self.types, self.positions, self.bounds, self.key_start,
            self.batch.packing.max_seqlen,
        )  # fmt: skip

    def take_piecewise(self, batch: Batch) -> None:
        """`take` by torch's kernels, a dozen of them."""
        packing, tokens = batch.packing, batch.tokens
        assert batch.input_ids is not None
        self.ids[:tokens] = packing.unpad_ids(batch.input_ids)
        assert batch.position_ids is not None
        self.positions[:tokens] = packing.unpad_ids(batch.position_ids)
        if self.types is not None and batch.token_type_ids is not None:
            self.types[:tokens] = packing.unpad_ids(batch.token_type_ids)
        given = packing.cu_seqlens.shape[0]
        self.bounds[:given] = packing.cu_seqlens
        rest = self.bounds[given:]
        torch.add(self.ramp[1 : 1 + rest.shape[0]], tokens, out=rest)
        rest.clamp_max_(self.ids.shape[0])
        if self.key_start is not None and packing.key_start is not None:
            self.key_start.copy_(self.bounds[:-1])
            self.key_start[: given - 1] = packing.key_start


def capture_cuda(run: Callable[[], Tensor], place: Place) -> tuple[Callable[[], None], Tensor]:
    """Records after two runs, on yet another stream, that compile kernels and copy weights."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside), for_a_recording():
        for _ in range(2):
            run()
    here.wait_stream(aside)
    # cuBLAS keeps a workspace for each stream, and torch hands streams out in turns: one that lies
    # outside the pool, left by whoever had this stream before, may be freed while the graph lives.
    torch._C._cuda_clearCublasWorkspaces()
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may go on using the GPU meanwhile, but not wait for all of it.
        with (
            _recording,
            torch.cuda.graph(graph, place.pool, place.stream, capture_error_mode="thread_local"),
        ):
            output = run()
    finally:  # a recording that fails leaves its own stream as the current one
        torch.cuda.set_stream(here)
        torch._C._cuda_clearCublasWorkspaces()  # the graph's own is nobody else's
    return graph.replay, output


class Graphs(KeptInModel):
    """The graphs of one model; they share memory, as only one of them runs at a time."""

    def __init__(
        self, model: nn.Module, structure: Structure, capture: Capture = capture_cuda
    ) -> None:
        self.structure, self.parameters = structure, list(model.parameters())
        self.capture, self.lock = capture, threading.Lock()
        self.kept: OrderedDict[Bucket, _Graph] = OrderedDict()
        self.calls = 0
        self.used: dict[Bucket, int] = {}  # the last call of each that is kept
        # The last calls of others.
        self.waiting: OrderedDict[Bucket, deque[int]] = OrderedDict()
        self.stamp: Any = None
        # Recording failed twice, as an op waits for values (once, it may be another thread that
        # did); or nothing would tell of a changed weight.
        self.broken = any(map(Tensor.is_inference, self.parameters))
        self.failed = False
        on_gpu = capture is capture_cuda
        self.stream = torch.cuda.Stream(self.parameters[0].device) if on_gpu else None
        self.place = self._place()
        self.done = torch.cuda.Event() if on_gpu else None

    def _place(self) -> Place | None:
        """A new one whenever no graph is left: torch does not take a pool that was given up."""
        return Place(torch.cuda.graph_pool_handle(), self.stream) if self.stream else None

    def look(self) -> None:
        """Forgets the graphs if a weight or a precision that they have inside is another now.

        A call of its own, as it takes a large model's hundreds of weights some 0.1 ms: before the
        wait for a mask's lengths, while the GPU has work, this costs nothing.
        """
        if self.broken:
            return
        stamp = self._stamp()
        with self.lock:
            if stamp != self.stamp:
                if self.done:  # the last replay may be on another stream
                    torch.cuda.current_stream(self.parameters[0].device).wait_event(self.done)
                self.kept.clear()
                self.stamp, self.place = stamp, self._place()

    def __call__(self, bucket: Bucket, batch: Batch, rows: Tensor | None, run: Run) -> Tensor:
        """The replayed forward of a batch, or `run`'s; `look` comes before."""
        if self.broken:
            return run(batch, rows)
        device = batch.packing.cu_seqlens.device
        with self.lock, torch.cuda.device(device) if self.done else nullcontext():
            if self.done:  # the last replay may be on another stream
                torch.cuda.current_stream().wait_event(self.done)
            self.calls += 1
            graph = self.kept.pop(bucket, None)
            if graph is None and self._has_place(bucket):
                graph = self._record(bucket, run, device)
            if graph is not None:
                self.kept[bucket], self.used[bucket] = graph, self.calls
                found = graph(batch, rows)
                if self.done:
                    self.done.record()
                return found
        return run(batch, rows)

    def _has_place(self, bucket: Bucket) -> bool:
        """Whether a bucket is to be recorded now: while there is room at once, then if it came
        often since the graph that was not used for longest."""
        seen = self.waiting.pop(bucket, deque(maxlen=SIGHTINGS))
        seen.append(self.calls)
        if len(self.kept) < KEPT:
            return True
        if len(seen) == SIGHTINGS and seen[0] > self.used[next(iter(self.kept))]:
            return True
        self.waiting[bucket] = seen
        while len(self.waiting) > KEPT:
            self.waiting.popitem(last=False)
        return False

    def _record(self, bucket: Bucket, run: Run, device: torch.device) -> _Graph | None:
        """A new graph, in the place of the one that was not used for longest; None if it fails."""
        while len(self.kept) >= KEPT:
            del self.used[self.kept.popitem(last=False)[0]]
        try:
            return _Graph(bucket, run, device, self.capture, self.place)
        except RuntimeError as error:
            self.kept.clear()
            self.place = self._place()
            self.broken, self.failed = self.failed, True
            if self.broken:
                warn_once(f"bert_fast: no CUDA graph can be recorded here: {error}")
            return None

    def _stamp(self) -> Any:
        """What a graph has inside beside its inputs and what the structure tells of."""
        weights = (*map(_version, self.parameters), *map(Tensor.data_ptr, self.parameters))
        return weights, torch.backends.cuda.matmul.fp32_precision


_GRAPHS = "_bert_fast_graphs"


def graphs_of(model: nn.Module, structure: Structure) -> Graphs:
    """The graphs kept of a model; new ones where its modules are no longer those recorded."""
    found = model.__dict__.get(_GRAPHS)
    if found is None or found.structure is not structure:
        found = model.__dict__[_GRAPHS] = Graphs(model, structure)
    return found


def look(model: nn.Module, structure: Structure) -> None:
    """What a model's graphs have to know before a call whose inputs may be for one."""
    on_gpu = structure.embeddings.words.is_cuda
    if not on_gpu or torch.is_grad_enabled() or tracing():
        return
    # In somebody else's recording none is replayed, and an event of before may not be waited for.
    if not torch.cuda.is_current_stream_capturing():
        graphs_of(model, structure).look()


def kept_of(model: nn.Module) -> int:
    """How many graphs are kept of a model."""
    found = model.__dict__.get(_GRAPHS)
    return len(found.kept) if found else 0


def forget_graphs(model: nn.Module) -> None:
    """Gives the memory of a model's graphs back."""
    model.__dict__.pop(_GRAPHS, None)
