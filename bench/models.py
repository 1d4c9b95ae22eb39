"""Whole models: bert_fast and its peers on every workload, in turns, after their values hold."""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import assets, workloads
from .noise import Probe, interleaved, ratio
from .peers import PEERS, Peer
from .peers_exported import digest
from .peers_torch import on_gpu
from .results import ROOT, Entry, Run
from .standings import OURS, emulated

# Relative L2 to fp64 over the real tokens above which an answer is wrong, not merely rounded.
WRONG = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2, "int8": 0.6, "fp8": 0.3}
CHECKED = 4  # texts of the first batch that are compared with fp64
ROUNDS = 25
# Seconds of a pass over all batches beyond which a contender is named instead of timed: a few
# rounds of one emulated dtype would take minutes of everybody's time.
LONGEST_PASS = 3.0
TELLING = 128  # tokens of a batch whose time grows with tokens, and foretells larger ones
# Seconds that a turn takes at least: a shorter pass is repeated, as who uses one library alone
# finds the weights in the caches, as far as they fit, and not where another has left them.
TURN = 0.1
LARGE = ("single16", "single128", "full128", "full512", "sentence", "squad")

Call = Callable[[Mapping[str, Tensor]], Tensor]
Batch = dict[str, Tensor]
Truth = dict[tuple[int, int], Tensor]  # by batch and row: the real tokens of a text [S, H]


@dataclass(frozen=True)
class Plan:
    """What to run: the rounds of a workload take about `seconds`, or five rounds if that is more.

    workloads: of every model, as `workloads.named` takes them; empty: all of a small model, those
        of LARGE of a larger one.
    batches: a pass, of texts of different lengths; flop: of a padded batch at most: it gets fewer
        texts until it fits.
    """

    models: tuple[str, ...] = ("minilm-l6", "bert-base")
    workloads: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()  # empty: all that are here
    precisions: tuple[str, ...] = ("fp32", "bf16", "int8")
    batches: int = 2
    flop: float = 0.09e12
    seconds: float = 10.0

    def peers(self) -> list[Peer]:
        return [
            peer
            for peer in PEERS
            if peer.precision in self.precisions
            and (not self.contenders or peer.name in self.contenders)
        ]


def workloads_of(plan: Plan, model: workloads.Model) -> list[workloads.Workload]:
    every = LARGE if model.hidden > 512 else tuple(workloads.WORKLOADS)
    return [workloads.named(name) for name in plan.workloads or every]


QUICK = Plan(
    models=("minilm-l6",),
    workloads=("single16", "full128", "sentence", "squad"),
    contenders=("bert_fast", "hf_sdpa"),
    flop=0.05e12,
)


def bench_models(
    run: Run, plan: Plan, device: torch.device, probe: Probe, tell: Callable[[str], None]
) -> Iterable[None]:
    """Fills `run.models`; yields after every workload, so that the caller can save."""
    for name in plan.models:
        shape = workloads.MODELS[name]
        model = load(shape).to(device)
        # A stale export would be timed: what it depends on is in the folder's name.
        folder = ROOT / ".cache" / "bench" / f"{name}-{digest(model)}"
        folder.mkdir(parents=True, exist_ok=True)
        contenders = Contenders(model, folder, _present(run, plan.peers()))
        for named in workloads_of(plan, shape):
            count = plan.batches if named.ragged else 1  # others would be the same again
            workload = workloads.fitted(named, shape, count, plan.flop)
            for order in workloads.orders(workload, count):
                texts = workloads.lengths(workload, count, order)
                batches = [
                    {k: v.to(device) for k, v in workloads.padded(shape.vocab, batch, i).items()}
                    for i, batch in enumerate(texts)
                ]
                entries = _cell(plan, contenders, batches, probe)
                for entry in entries:
                    entry.model, entry.workload, entry.order = name, workload.name, order
                    entry.texts, entry.batches = sum(map(len, texts)), len(texts)
                    entry.flop = sum(workloads.flop(shape, batch) for batch in texts)
                    _rates(entry)
                run.models += entries
                tell(told(entries))
                yield


def _present(run: Run, peers: Iterable[Peer]) -> list[Peer]:
    """Those that can run here and tell something; the others are named in `run.missing`, once."""
    found = []
    for peer in peers:
        why = peer.missing()
        if peer.name != OURS and emulated(run, peer.precision):
            why = why or f"emulates {peer.precision} on this processor, many times as slowly"
        if why:
            run.missing[f"{peer.name} {peer.precision}"] = why
        else:
            found.append(peer)
    return found


def load(shape: workloads.Model) -> nn.Module:
    """The model in fp32: real weights where the assets hold them, else random ones."""
    from transformers import BertConfig, BertModel

    if shape.name == "minilm-l6":
        try:
            return BertModel.from_pretrained(assets.minilm()).eval()
        except FileNotFoundError:
            pass
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.positions,
    )
    return BertModel(config).eval()


@dataclass
class Contenders:
    """The peers of one model, and what is known of them from the workloads so far.

    kept: the built ones that are used again, with the MB of each.
    pace: seconds for a padded token, of batches large enough to tell; the least of all workloads,
        as a hold-up in one should not rule a contender out of the others.
    """

    model: nn.Module
    folder: Path
    peers: Sequence[Peer]
    kept: dict[Peer, tuple[Call, float]] = field(default_factory=dict)
    pace: dict[Peer, float] = field(default_factory=dict)

    def build(self, peer: Peer, batches: Sequence[Batch]) -> tuple[Call, float]:
        """The contender, and the MB that it holds."""
        if peer in self.kept:
            return self.kept[peer]
        before = _reset_peak()
        call = peer.build(self.model, self.folder, batches)
        made = call, _held() - before
        if peer.lasting:
            self.kept[peer] = made
        return made

    def a_pass(self, peer: Peer, call: Call, batches: Sequence[Batch]) -> float:
        """Seconds of a pass over all batches, foretold from the largest.

        The pace of a smaller one would tell too much: a static shape runs all as the largest.
        """
        largest = max(batches, key=_padded)
        pace = _best_of_three(_all(call, [largest], 1)) / _padded(largest)
        if _padded(largest) >= TELLING:
            self.pace[peer] = min(pace, self.pace.get(peer, math.inf))
        return pace * sum(map(_padded, batches))


def _padded(batch: Batch) -> int:
    return batch["input_ids"].numel()


def _cell(
    plan: Plan, contenders: Contenders, batches: Sequence[Batch], probe: Probe
) -> list[Entry]:
    """Every contender on the same batches."""
    exact = _truth(contenders.model, batches)
    entries, ready = [], {}
    for peer in contenders.peers:
        entry = Entry("", "", "", peer.name, peer.precision)
        entry.tokens = sum(workloads.real_tokens(b) for b in batches)
        entry.padded_tokens = sum(map(_padded, batches))
        entries.append(entry)
        try:
            made = _prepared(entry, peer, contenders, batches, exact)
        except Exception as error:  # a peer's failure is its own
            entry.failed = f"{type(error).__name__}: {error}"[:300]
            continue
        if made:
            call, a_pass = made
            repeats = math.ceil(TURN / a_pass)
            ready[peer.name, peer.precision] = entry, _all(call, batches, repeats), repeats
    beside = {key: ours for key in ready if (ours := (OURS, key[1])) in ready}
    runs = {key: run for key, (_, run, _) in ready.items()}
    turns = interleaved(runs, probe, ROUNDS, plan.seconds, beside)
    times = {key: [turn / ready[key][2] for turn in found] for key, found in turns.items()}
    for key, (entry, *_) in ready.items():
        entry.seconds, ours_s = times[key], times.get((OURS, key[1]))
        if ours_s and entry.contender != OURS:
            entry.ratio = ratio(entry.seconds, ours_s, probe.spread)
    return entries


def _prepared(
    entry: Entry, peer: Peer, contenders: Contenders, batches: Sequence[Batch], exact: Truth
) -> tuple[Call, float] | None:
    """Builds a contender, measures its first call and memory, and checks its values.

    Returns the call and the seconds of a pass, None where it is not to be timed.
    """
    expected = contenders.pace.get(peer, 0.0) * entry.padded_tokens
    if expected > LONGEST_PASS and entry.contender != OURS:
        entry.failed = f"too slow to repeat: about {expected:.0f} s a pass"
        return None
    call, held = contenders.build(peer, batches)
    before = _reset_peak()
    start = time.perf_counter()
    hidden = call(batches[0])
    if on_gpu(batches[0]):
        torch.cuda.synchronize()
    entry.first_call_s = time.perf_counter() - start
    found = _texts(exact, 0, hidden)
    a_pass = contenders.a_pass(peer, call, batches)
    if a_pass > LONGEST_PASS and entry.contender != OURS:
        entry.failed = f"too slow to repeat: {a_pass:.0f} s a pass"
        return None
    for i, batch in enumerate(batches[1:], 1):
        found |= _texts(exact, i, call(batch))
    entry.peak_mb = held + _peak() - before
    entry.relative_l2, entry.cosine = _errors(found, exact)
    if not entry.relative_l2 <= WRONG[entry.precision]:  # NaN is wrong too
        entry.failed = f"wrong: relative L2 to fp64 is {entry.relative_l2:.1e}"
        return None
    return call, a_pass


def _best_of_three(run: Callable[[], object]) -> float:
    """Seconds: one call may be held up, and what is foretold from it would rule a peer out.

    Of a call that takes long, two.
    """
    times: list[float] = []
    while len(times) < 2 or (len(times) < 3 and sum(times) < 2.0):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def _truth(model: nn.Module, batches: Sequence[Batch]) -> Truth:
    """The first texts, and the longest of the last batch: where texts are sorted, of all."""
    first, last = batches[0], batches[-1]
    places = {(0, row): None for row in range(min(CHECKED, len(first["input_ids"])))}
    places[len(batches) - 1, int(last["attention_mask"].sum(1).argmax())] = None
    exact, wide = {}, copy.deepcopy(model).double()
    for i, row in places:
        ids = batches[i]["input_ids"][row, : int(batches[i]["attention_mask"][row].sum())]
        exact[i, row] = wide(ids[None]).last_hidden_state[0]
    return exact


def _texts(exact: Truth, batch: int, hidden: Tensor) -> Truth:
    """Those texts of one batch that `exact` has, out of its output, copied."""
    return {
        (i, row): hidden[row, : len(truth)].clone()
        for (i, row), truth in exact.items()
        if i == batch
    }


def _errors(found: Truth, exact: Truth) -> tuple[float, float]:
    """Relative L2 over all tokens, and the smallest cosine of a text's mean embedding."""
    pairs = [(found[place].to(truth), truth) for place, truth in exact.items()]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    cosines = [torch.cosine_similarity(a.mean(0), b.mean(0), 0) for a, b in pairs]
    return math.sqrt(off / sum(float(b.square().sum()) for _, b in pairs)), float(min(cosines))


def _all(call: Call, batches: Sequence[Batch], repeats: int) -> Callable[[], None]:
    wait = on_gpu(batches[0])

    def run() -> None:
        for batch in [*batches] * repeats:
            call(batch)
        if wait:
            torch.cuda.synchronize()

    return run


def _rates(entry: Entry) -> None:
    if entry.seconds:
        entry.median_s = statistics.median(entry.seconds)
        entry.p95_s = float(np.percentile(entry.seconds, 95))
        entry.tokens_per_s = entry.tokens / entry.median_s
        entry.tflop_per_s = entry.flop / entry.median_s / 1e12


def _reset_peak() -> float:
    """MB held now; the peak is counted anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return _held()
    try:
        # What earlier contenders freed would hide what this one takes: back to the system with it.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # not Linux, or not with glibc
        return float("nan")
    return _held()


def _held() -> float:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return _status("VmRSS")


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM")


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return float("nan")


def told(entries: Sequence[Entry]) -> str:
    """A line for each precision of one workload."""
    first = entries[0]
    lines = [f"{first.model} {first.workload} {first.order}: {first.tokens} tokens"]
    for precision in dict.fromkeys(e.precision for e in entries):
        cells = []
        for e in (e for e in entries if e.precision == precision):
            if e.failed:
                cells.append(f"{e.contender} -")
            elif e.ratio:
                cells.append(f"{e.contender} {e.ratio.value:.2f}x ({e.ratio.verdict})")
            elif e.tokens_per_s:
                cells.append(f"{e.contender} {e.tokens_per_s:,.0f} tokens/s")
        lines.append(f"  {precision}: " + ", ".join(cells))
    return "\n".join(lines)
