"""`python -m bench.compare OLD NEW`: what became slower or faster between two runs of the bench.

Of a model, the ratio of bert_fast's median times, new over old. As the machine itself may be slower
today, it is divided by that of hf_sdpa on the same batches, where both runs have it. Of an op, the
ratio of its kernels' times, divided by the median ratio of the reference kernels. A regression is
an interval wholly above 1.03.

Windows of one run lie closer together than two runs do: a process lays its memory out once, and the
machine's neighbours change by the hour. How much that is shows in code that is the same in both
runs: transformers and the other peers, and the reference kernels. The spread of their ratios is
added to every interval, in quadrature.

Then the ratios to bert_fast that each run printed are compared: two agree where their intervals
overlap, and those that only one run has are counted. The exit code is 1 if anything regressed, 2 if
a file cannot be read or nothing of the two can be compared.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .results import Entry, Interval, OpEntry, Run, load

OURS, YARDSTICK = "bert_fast", "hf_sdpa"
NORMALISED = f"relative to {YARDSTICK}"
MARGIN = 0.03
TORCH = ("reference", "torch.compile")  # kernels that are not ours
DRAWS = 2_000
# Fewer have no 95 % interval of their median: even from the least to the largest is less likely.
LEAST_WINDOWS = 5
SHORT_MS = 1.0
LEAST_UNCHANGED = 5  # entries, to tell their spread

REGRESSION, IMPROVEMENT, NOISE = "regression", "improvement", "within noise"
VANISHED, APPEARED = "vanished", "appeared"
FEW, OTHER = "too few windows", "another workload"


@dataclass(frozen=True)
class Change:
    """One entry in two runs.

    old, new: milliseconds; None where it failed or is not there.
    ratio: new over old, normalised; None where there is nothing to compare.
    verdict: "regression" (slower, or it fails now), "improvement", "within noise", "vanished",
        "appeared", "too few windows" or "another workload".
    note: what the ratio was divided by, or why there is none.
    """

    key: tuple[str, ...]
    old: float | None
    new: float | None
    ratio: Interval | None
    verdict: str
    note: str = ""


def compare(old: Run, new: Run) -> list[Change]:
    """Every model of bert_fast, then every op, that the old run has; in its order.

    Then the peers that were timed in the old run only.
    """
    return _models(old, new) + _ops(old, new) + _vanished_peers(old, new)


def _vanished_peers(old: Run, new: Run) -> list[Change]:
    after = {e.key: e for e in new.models}
    return [
        Change(e.key, _ms(e), None, None, VANISHED, (now and now.failed) or "not in the new run")
        for e in old.models
        if e.contender != OURS and e.seconds and not ((now := after.get(e.key)) and now.seconds)
    ]


def _models(old: Run, new: Run) -> list[Change]:
    before, after = ({e.key: e for e in run.models} for run in (old, new))
    drift = _drift(
        [
            change.ratio.value
            for key, was in before.items()
            if was.contender not in (OURS, YARDSTICK) and was.seconds and key in after
            for change in [_model(was, after[key], *_yardsticks(key, before, after), 0.0)]
            if change and change.ratio and change.note == NORMALISED
        ]
    )
    changes = []
    for key, was in before.items():
        if was.contender != OURS:
            continue
        now = after.get(key)
        broke = now is not None and now.failed is not None
        change = _without_times(was, now, _ms(was), _ms(now), broke)
        if change is None and now is not None:
            change = _model(was, now, *_yardsticks(key, before, after), drift)
        if change:
            changes.append(change)
    return changes


def _yardsticks(
    key: tuple[str, ...], before: dict[tuple[str, ...], Entry], after: dict[tuple[str, ...], Entry]
) -> tuple[Entry | None, Entry | None]:
    """hf_sdpa on the same batches in both runs; in fp32 where it is emulated or absent."""
    for precision in (key[4], "fp32"):
        peer = (*key[:3], YARDSTICK, precision)
        sides = before.get(peer), after.get(peer)
        if all(side and len(side.seconds) >= LEAST_WINDOWS for side in sides):
            return sides
    return None, None


def _model(
    was: Entry, now: Entry, peer_was: Entry | None, peer_now: Entry | None, drift: float
) -> Change | None:
    def change(ratio: Interval | None, verdict: str, note: str) -> Change:
        return Change(was.key, _ms(was), _ms(now), ratio, verdict, note)

    if (was.tokens, was.padded_tokens) != (now.tokens, now.padded_tokens):
        return change(None, OTHER, f"{was.tokens} tokens became {now.tokens}")
    windows = min(len(was.seconds), len(now.seconds))
    if windows < LEAST_WINDOWS:
        return change(None, FEW, f"{windows}, at least {LEAST_WINDOWS} are needed")
    if peer_was and peer_now and peer_was.seconds and peer_now.seconds:
        ratio = ratio_of_medians(was.seconds, now.seconds, peer_was.seconds, peer_now.seconds)
        note = NORMALISED
    else:
        ratio, note = ratio_of_medians(was.seconds, now.seconds), "not normalised"
    ratio = widened(ratio, drift)
    return change(ratio, judge(ratio), note)


def _drift(ratios: Sequence[float]) -> float:
    """Half the 95 % interval of the logarithm of the ratios of code that did not change.

    From the median deviation, as a few wild ones are not what every entry has to bear; from 1, as
    what shifts all of them alike is a change of what they were divided by.
    """
    if len(ratios) < LEAST_UNCHANGED:
        return 0.0
    return float(1.96 * 1.4826 * np.median(np.abs(np.log(ratios))))


def widened(ratio: Interval, *drifts: float) -> Interval:
    """Both ends moved out: independent errors add as squares of their logarithms."""

    def moved(end: float) -> float:
        return math.hypot(math.log(end / ratio.value), *drifts)

    low, high = (math.exp(moved(end)) for end in (ratio.low, ratio.high))
    return Interval(ratio.value, ratio.value / low, ratio.value * high)


def _ms(entry: Entry | None) -> float | None:
    return entry.median_s * 1e3 if entry and entry.median_s else None


def ratio_of_medians(
    old: Sequence[float],
    new: Sequence[float],
    peer_old: Sequence[float] | None = None,
    peer_new: Sequence[float] | None = None,
) -> Interval:
    """New over old, divided by the same of the peer, with its 95 % interval."""
    generator = np.random.default_rng(0)
    drawn_old, found_old = _medians(generator, old, peer_old)
    drawn_new, found_new = _medians(generator, new, peer_new)
    low, high = np.percentile(drawn_new / drawn_old, (2.5, 97.5))
    return Interval(found_new / found_old, float(low), float(high))


def _medians(
    generator: np.random.Generator, ours: Sequence[float], peer: Sequence[float] | None
) -> tuple[np.ndarray, float]:
    """Our median (over the peer's): of every draw [DRAWS], and of the windows as they are."""
    mine = np.asarray(ours)
    picked = generator.integers(len(mine), size=(DRAWS, len(mine)))
    drawn, found = np.median(mine[picked], 1), float(np.median(mine))
    if peer is None:
        return drawn, found
    theirs = np.asarray(peer)
    # Contenders take turns: the same window of both saw the same machine, so it is drawn for both.
    if len(theirs) != len(mine):
        picked = generator.integers(len(theirs), size=(DRAWS, len(theirs)))
    return drawn / np.median(theirs[picked], 1), found / float(np.median(theirs))


def _ops(old: Run, new: Run) -> list[Change]:
    after = {e.key: e for e in new.ops}
    pairs = [(was, after.get(was.key)) for was in old.ops]
    torches = [
        (was.ms, now.ms / was.ms)
        for was, now in pairs
        if was.kernel in TORCH and was.ms and now and now.ms
    ]
    references = [ratio for _, ratio in torches]
    scale, note = 1.0, "not normalised"
    if len(references) >= LEAST_UNCHANGED:
        scale, note = statistics.median(references), "relative to the reference kernels"
    # Short calls, which live in the caches, differ more from run to run than long ones.
    drift = {
        short: _drift([ratio / scale for ms, ratio in torches if (ms < SHORT_MS) is short])
        or _drift([ratio / scale for ratio in references])
        for short in (True, False)
    }
    changes = []
    for was, now in pairs:
        # A kernel that this machine cannot run is told of in the same field as one that broke.
        broke = now is not None and now.failure in new.failed
        change = _without_times(was, now, was.ms, now.ms if now else None, broke)
        if change is None and now is not None and was.ms and now.ms:
            value = now.ms / was.ms / scale
            spreads = (was.spread or 0.0, now.spread or 0.0, drift[was.ms < SHORT_MS])
            ratio = widened(Interval(value, value, value), *spreads)
            change = Change(was.key, was.ms, now.ms, ratio, judge(ratio), note)
        if change:
            changes.append(change)
    return changes


def _without_times(
    was: Entry | OpEntry,
    now: Entry | OpEntry | None,
    old: float | None,
    new: float | None,
    broke: bool,
) -> Change | None:
    """What there is to say where a side has no time; None where both have one, or neither."""
    if now is None:
        return Change(was.key, old, None, None, VANISHED, "not in the new run")
    if old and not new:
        verdict = REGRESSION if broke else VANISHED
        return Change(was.key, old, None, None, verdict, now.failed or "not timed")
    if new and not old:
        return Change(was.key, None, new, None, APPEARED, was.failed or "was not timed")
    return None


def judge(ratio: Interval) -> str:
    if ratio.low > 1 + MARGIN:
        return REGRESSION
    return IMPROVEMENT if ratio.high < 1 - MARGIN else NOISE


def agreement(old: Run, new: Run) -> list[tuple[tuple[str, ...], Interval, Interval, bool]]:
    """Every ratio to bert_fast that both runs printed, and whether the intervals overlap."""
    after = {(e.key, e.tokens, e.padded_tokens): e.ratio for e in new.models}
    return [
        (e.key, e.ratio, now, e.ratio.low <= now.high and now.low <= e.ratio.high)
        for e in old.models
        if e.ratio and (now := after.get((e.key, e.tokens, e.padded_tokens)))
    ]


def show_agreement(old: Run, new: Run, console: Console) -> None:
    found = agreement(old, new)
    rated = sum(e.ratio is not None for run in (old, new) for e in run.models)
    for key, was, now, agrees in found:
        if not agrees:
            spans = (f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in (was, now))
            console.print(f"disagrees: {' '.join(key)}: {' and '.join(spans)}", markup=False)
    if found:
        share = sum(agrees for *_, agrees in found)
        console.print(
            f"printed ratios to bert_fast: {share} of {len(found)} agree within their intervals "
            f"({share / len(found):.1%})"
        )
    if single := rated - 2 * len(found):
        console.print(f"{single} ratios are in one run only")


def differences(old: Run, new: Run) -> list[str]:
    """What else changed: numbers of two machines or threads are not one code's before and after."""
    found = []
    for name in ("device", "threads"):
        if getattr(old, name) != getattr(new, name):
            found.append(f"{name}: {getattr(old, name)} became {getattr(new, name)}")
    for name in ("machine", "versions"):
        before, after = getattr(old, name), getattr(new, name)
        for key in dict.fromkeys((*before, *after)):
            if before.get(key) != after.get(key):
                found.append(f"{key}: {before.get(key)} became {after.get(key)}")
    return found


def show(changes: Sequence[Change], console: Console) -> None:
    table = Table(title="new / old: above 1 is slower", title_justify="left")
    for column in ("entry", "old ms", "new ms", "ratio", "95 %", "verdict", "note"):
        table.add_column(column, justify="right" if column.endswith(("ms", "ratio")) else "left")
    styles = {REGRESSION: "bold red", IMPROVEMENT: "green", VANISHED: "yellow", APPEARED: "yellow"}
    for c in changes:
        times = ("" if ms is None else f"{ms:.3f}" for ms in (c.old, c.new))
        value = f"{c.ratio.value:.3f}" if c.ratio else ""
        span = (
            f"{c.ratio.low:.3f} to {c.ratio.high:.3f}"
            if c.ratio and c.ratio.low < c.ratio.high
            else ""
        )
        verdict = f"[{styles[c.verdict]}]{c.verdict}[/]" if c.verdict in styles else c.verdict
        table.add_row(escape(" ".join(c.key)), *times, value, span, verdict, escape(c.note))
    console.print(table)
    verdicts = [c.verdict for c in changes]
    counts = (f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    console.print(", ".join(counts) or "no entry is in both runs")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    options = parser.parse_args(arguments)
    try:
        old, new = load(options.old), load(options.new)
    except (OSError, ValueError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for difference in differences(old, new):
        console.print(f"differs: {difference}", markup=False)
    changes = compare(old, new)
    show(changes, console)
    show_agreement(old, new, console)
    if any(change.verdict == REGRESSION for change in changes):
        return 1
    if not any(change.ratio for change in changes):
        print("bench.compare: nothing that both runs timed can be compared", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
