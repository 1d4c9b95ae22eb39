"""Where bert_fast stands among its peers in a run of the bench: by cell, and in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .results import Entry, Run

OURS = "bert_fast"
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")
FULL = 0.98  # of a batch are real tokens: nothing to gain from dropping the padding
FULL_NAMES = {"bf16": "bfloat16", "fp16": "float16"}
KINDS = {
    "ragged": "on ragged text as it arrives",
    "sorted": "on ragged text sorted by length",
    "full": "on batches without padding",
}


@dataclass(frozen=True)
class Standing:
    """bert_fast on one workload in one precision, and the fastest peer of that precision."""

    ours: Entry
    peer: Entry | None

    @property
    def verdict(self) -> str:
        if not self.ours.median_s:
            return "failed"
        if self.peer is None:
            return "no peer"
        return self.peer.ratio.verdict if self.peer.ratio else "no interval"

    @property
    def kind(self) -> str:
        """ "ragged", "sorted" or "full"."""
        if self.ours.order == "sorted":
            return "sorted"
        return "full" if fill(self.ours) >= FULL else "ragged"


def standings(run: Run) -> list[Standing]:
    """One for every entry of bert_fast, in the run's order."""
    return [
        Standing(entry, fastest(peers_of(run, entry)))
        for entry in run.models
        if entry.contender == OURS
    ]


def emulated(run: Run, precision: str) -> bool:
    """Whether the run was on a CPU without arithmetic of this precision."""
    native = run.machine.get("oneDNN natively in")
    on_cpu = run.machine.get("GPU") == "none" and native is not None
    return on_cpu and FULL_NAMES.get(precision, "float32") not in str(native)


def peers_of(run: Run, ours: Entry) -> list[Entry]:
    """The other contenders on the same workload in the same precision."""
    return [
        entry
        for entry in run.models
        if entry.contender != OURS
        and entry.precision == ours.precision
        and cell(entry) == cell(ours)
    ]


def fastest(entries: Iterable[Entry]) -> Entry | None:
    timed = [entry for entry in entries if entry.median_s]
    return min(timed, key=lambda entry: entry.median_s or math.inf, default=None)


def cell(entry: Entry) -> tuple[str, str, str]:
    return entry.model, entry.workload, entry.order


def fill(entry: Entry) -> float:
    """The share of real tokens in the padded batches."""
    return entry.tokens / entry.padded_tokens if entry.padded_tokens else 1.0


def ordered(precisions: Iterable[str]) -> list[str]:
    """Each once, the most exact first."""
    rank = {name: i for i, name in enumerate(PRECISIONS)}
    return sorted(set(precisions), key=lambda name: (rank.get(name, len(rank)), name))


def summary(run: Run) -> list[str]:
    """Sentences for somebody who has not read the code; losses as plainly as wins."""
    found = standings(run)
    if not found:
        return ["This run timed no whole model."]
    said = []
    for precision in ordered(s.ours.precision for s in found):
        mine = [s for s in found if s.ours.precision == precision]
        rated = [s for s in mine if s.peer and s.peer.ratio]
        unrated = [s for s in mine if s.verdict == "no peer"]
        if emulated(run, precision):
            said.append(
                f"{precision}: this processor does not multiply in {precision}. bert_fast computes "
                "such a model in fp32; its peers emulate the products, many times as slowly, which "
                "tells nothing of a processor that can: they are not set beside it."
            )
            rated, unrated = [], []
        if rated:
            groups = [[s for s in rated if s.kind == kind] for kind in KINDS]
            means = [_mean(KINDS[group[0].kind], group) for group in groups if group]
            said.append(f"{precision}: beside the fastest peer bert_fast is {_join(means)}.")
            said.append(f"{precision}, workload by workload: {_tally(rated)}.")
        if unrated:
            beside = f"bert_fast on {'; '.join(_name(s) for s in unrated)}."
            peers = any(e.precision == precision and e.contender != OURS for e in run.models)
            said.append(
                f"{precision}: every peer of this precision was too slow to be timed, or did not "
                f"run, beside {beside}"
                if peers
                else f"{precision}: no peer of this precision took part beside {beside}"
            )
        if failed := [s for s in mine if s.verdict == "failed"]:
            named = "; ".join(f"{_name(s)} ({s.ours.failed or 'no times'})" for s in failed)
            said.append(f"{precision}: bert_fast itself failed on {named}.")
    return said + _other_precisions(run)


def _mean(where: str, group: Sequence[Standing]) -> str:
    """Geometric mean of the ratios, least and most."""
    values = [s.peer.ratio.value for s in group if s.peer and s.peer.ratio]
    mean = math.exp(sum(map(math.log, values)) / len(values))
    span = f" (mean of {len(values)}; {min(values):.2f} to {max(values):.2f})"
    return f"{mean:.2f} times as fast {where}{span if len(values) > 1 else ''}"


def _tally(rated: Sequence[Standing]) -> str:
    """How many wins and ties; losses by name."""
    wins, losses, ties = (
        [s for s in rated if s.verdict == verdict]
        for verdict in ("faster", "slower", "within noise")
    )
    told = [f"it is faster than the fastest peer on {len(wins)} of {len(rated)}"]
    told.append(f"within noise of it on {len(ties)}")
    names = [
        f"{_name(s)} ({s.peer.ratio.value:.2f} times as fast as {s.peer.contender})"
        for s in losses
        if s.peer and s.peer.ratio
    ]
    told.append(f"slower on {len(losses)}: {_join(names)}" if losses else "slower on none")
    return ", ".join(told)


def _name(standing: Standing) -> str:
    return " ".join(cell(standing.ours))


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _other_precisions(run: Run) -> list[str]:
    """Of each precision that bert_fast does not run in: how often a peer in it is faster."""
    ours = [entry for entry in run.models if entry.contender == OURS and entry.median_s]
    said = []
    for precision in ordered(e.precision for e in run.models if e.median_s):
        if any(entry.precision == precision for entry in ours):
            continue
        peers = [e for e in run.models if e.precision == precision and e.median_s]
        ratios = {}
        for place in dict.fromkeys(cell(e) for e in peers):
            best = fastest(e for e in ours if cell(e) == place)
            peer = fastest(e for e in peers if cell(e) == place)
            if best and peer and best.median_s and peer.median_s:
                ratios[place] = peer.median_s / best.median_s
        if not ratios:
            continue
        ahead = sum(ratio < 1 for ratio in ratios.values())
        least = min(ratios, key=ratios.__getitem__)
        told = (
            f"{precision}: this run timed no bert_fast in {precision}. Beside its fastest other "
            f"one, the fastest {precision} peer takes less time on {ahead} of {len(ratios)} "
            f"workloads ({ratios[least]:.2f} of it at the least, on {' '.join(least)})"
        )
        cosines = [e.cosine for e in peers if e.cosine is not None]
        if cosines:
            least_cosine = math.floor(min(cosines) * 1e4) / 1e4  # "or more" must stay true
            told += f"; its answers have a cosine of {least_cosine} or more to the exact ones"
        said.append(told + ".")
    return said
