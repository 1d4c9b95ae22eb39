"""Was the machine quiet? A probe around every round, and intervals that say what is noise."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from .results import Interval, Noise

Name = TypeVar("Name", bound=Hashable)
Found = TypeVar("Found")
DISTURBED = 1.25  # a probe this much slower than the median so far marks its round
FOREIGN = 0.05  # of the processors' time, taken by others: so much disturbs a round
TICKS = 0.03  # seconds: what the kernel's clock ticks may be off by
DRAWS = 2_000
# Rounds at least: from the least to the largest of fewer is no 95 % interval of their median.
LEAST = 5
REST = 0.5  # seconds at most that a turn waits for the threads of the one before
SLOW = 3.0  # times as long as the one beside it: so much is seen in the first rounds


def extent(device: torch.device) -> tuple[int, int]:
    """The rows of the probe's square matrix, and the elements that it copies: a millisecond or so.

    On a GPU, less would measure how much the launches vary, and not how busy the GPU is.
    """
    return (4096, 1 << 26) if device.type == "cuda" else (384, 1 << 20)


class Probe:
    """A fixed piece of work, a matmul and a copy, timed before and after each round."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        size, elements = extent(device)
        self.a = torch.randn(size, size, generator=generator, device=device)
        self.b = torch.randn(elements, generator=generator, device=device)
        self.device = device
        self.times: list[float] = []
        self.kept = self.dropped = self.forced = 0
        for _ in range(12):
            self()

    def __call__(self) -> float:
        """Milliseconds of the probe now; the best of three, as one may be cut by a switch."""
        best = min(self._once() for _ in range(3))
        self.times.append(best)
        return best

    def _once(self) -> float:
        start = time.perf_counter()
        x = self.a @ self.a
        y = self.b.clone()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        del x, y
        return (time.perf_counter() - start) * 1e3

    def quiet(self) -> bool:
        return self() <= DISTURBED * statistics.median(self.times)

    @property
    def spread(self) -> float:
        """Half the middle half of the probe's times, relative to their median."""
        low, middle, high = np.percentile(self.times, (25, 50, 75))
        return float((high - low) / 2 / middle)

    def summary(self) -> Noise:
        middle = statistics.median(self.times)
        return Noise(middle, self.spread, self.kept, self.dropped, self.forced)


class Others:
    """Processor time that other processes, or the host of a virtual machine, took since `start`.

    A probe of a millisecond fits between two turns of another process and sees nothing; a pass of
    a second does not. Linux only; elsewhere nobody is seen.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.taken, self.at = self._taken(), time.perf_counter()

    def disturbed(self) -> bool:
        wall = time.perf_counter() - self.at
        return self._taken() - self.taken > FOREIGN * wall * (os.cpu_count() or 1) + TICKS

    @staticmethod
    def _taken() -> float:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
            user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        except (OSError, ValueError):
            return 0.0
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time()


def undisturbed(measure: Callable[[], Found]) -> Found:
    """What `measure` finds while nobody else computes; after three tries, what it found last."""
    others = Others()
    for _ in range(3):
        others.start()
        found = measure()
        if not others.disturbed():
            break
    return found


def wait_for_rest() -> None:
    """Until no thread of this process computes.

    The threads of a library spin on after its call, in case work comes (Intel's OpenMP, which
    CTranslate2 brings, for 200 ms): whoever came next would share the cores with them.
    """
    for _ in range(round(REST / 0.005)):
        before = time.process_time()
        time.sleep(0.005)
        if time.process_time() - before < 0.0005:
            return


def interleaved(
    runs: Mapping[Name, Callable[[], object]],
    probe: Probe,
    rounds: int,
    seconds: float,
    beside: Mapping[Name, Name] | None = None,
) -> dict[Name, list[float]]:
    """Seconds of each contender in each kept round, taking turns; who begins changes.

    rounds: at most; after LEAST the time budget `seconds` ends it too. A disturbed round is
        dropped and repeated, up to as many again and for twice the time; then disturbed ones are
        kept and counted, up to LEAST.
    beside: whom a contender is compared with: it leaves after LEAST rounds where its median is
        SLOW times as long by then; its times belong to the first rounds.
    """
    times: dict[Name, list[float]] = {name: [] for name in runs}
    order = list(runs)
    start, kept, tried, others = time.perf_counter(), 0, 0, Others()
    least = min(LEAST, rounds)
    while kept < rounds and tried < 2 * rounds:
        if kept >= least and time.perf_counter() - start > seconds:
            break
        quiet, found = probe.quiet(), {}
        others.start()
        for name in order[tried % len(order) :] + order[: tried % len(order)]:
            wait_for_rest()
            begin = time.perf_counter()
            runs[name]()
            found[name] = time.perf_counter() - begin
        tried += 1
        quiet = not others.disturbed() and quiet and probe.quiet()
        late = tried >= 2 * rounds - least or time.perf_counter() - start > 2 * seconds
        if quiet or (late and kept < least):
            kept += 1
            probe.forced += not quiet
            for name, taken in found.items():
                times[name].append(taken)
            if kept == LEAST and beside:
                middle = {name: statistics.median(found) for name, found in times.items()}
                slow = {name for name, of in beside.items() if middle[name] > SLOW * middle[of]}
                order = [name for name in runs if name not in slow]
    probe.kept += kept
    probe.dropped += tried - kept
    return times


def ratio(theirs: Sequence[float], ours: Sequence[float], floor: float) -> Interval:
    """The median ratio of times paired by round, with its 95 % bootstrap interval.

    floor: relative, added to both ends: what the machine varies by between rounds, which a few
        paired rounds cannot show.
    """
    both = min(len(theirs), len(ours))  # a slow one left after the first rounds
    ratios = np.asarray(theirs[:both]) / np.asarray(ours[:both])
    draws = np.random.default_rng(0).choice(ratios, (DRAWS, len(ratios)))
    low, high = np.percentile(np.median(draws, 1), (2.5, 97.5))
    return Interval(float(np.median(ratios)), float(low) * (1 - floor), float(high) * (1 + floor))


def spread_of_median(samples: Sequence[float]) -> float:
    """Half the 95 % interval of the samples' median, relative to it, from their order alone."""
    ranked, reach = sorted(samples), 0.98 * len(samples) ** 0.5
    low = max(0, int(len(ranked) / 2 - reach))
    high = min(len(ranked) - 1, int(len(ranked) / 2 + reach))
    return (ranked[high] - ranked[low]) / 2 / statistics.median(ranked)
