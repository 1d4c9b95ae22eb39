"""How time grows: with tokens, with the length of a text, with threads; fitted exponents."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import nn

import bert_fast

from . import workloads
from .measure import short
from .models import load
from .noise import undisturbed
from .results import Run, Scaling

LENGTH = 64  # of every text on the axis of tokens
TOKENS = 4_096  # in all on the axis of length


def bench_scaling(
    run: Run, model: str, dtype: torch.dtype, quick: bool, tell: Callable[[str], None]
) -> Iterable[None]:
    """Fills `run.scaling` for bert_fast and transformers on a CPU; yields after each axis."""
    shape = workloads.MODELS[model]
    plain = load(shape).to(dtype)
    sides = {"hf_sdpa": plain, "bert_fast": bert_fast.accelerate(copy.deepcopy(plain))}
    tokens = (1, 16, 64, 256, 1024, 4096) if quick else (1, 16, 64, 256, 1024, 4096, 16384, 65536)
    total = TOKENS // 4 if quick else TOKENS
    axes = {
        "tokens": [(n, [min(n, LENGTH)] * max(1, n // LENGTH)) for n in tokens],
        "length": [(n, [n] * (total // n)) for n in (16, 64, 128, 256, 512)],
        "threads": [(n, [LENGTH] * 16) for n in range(1, torch.get_num_threads() + 1)],
    }
    for axis, points in axes.items():
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for x, texts in points:
            before = torch.get_num_threads()
            torch.set_num_threads(x if axis == "threads" else before)
            measured = undisturbed(partial(_measure, sides, shape, texts))
            for name, found in measured.items():
                seconds[name].append(found)
            torch.set_num_threads(before)
        xs = [float(x) for x, _ in points]
        exponents = {name: exponent(xs, found) for name, found in seconds.items()}
        run.scaling.append(Scaling(model, short(dtype), axis, xs, seconds, exponents))
        told = ", ".join(f"{name} {value:.2f}" for name, value in exponents.items())
        tell(f"{model} {short(dtype)}: seconds ~ {axis} ** ({told})")
        yield


def _measure(
    sides: dict[str, nn.Module], shape: workloads.Model, texts: list[int]
) -> dict[str, float]:
    batch = workloads.padded(shape.vocab, texts)
    times: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for turn in range(6):
            for name, side in sides.items():
                start = time.perf_counter()
                side(**batch)
                if turn:
                    times[name].append(time.perf_counter() - start)
            if turn > 1 and sum(map(sum, times.values())) > 8:
                break
    return {name: statistics.median(found) for name, found in times.items()}


def exponent(x: list[float], seconds: list[float]) -> float:
    """Of a power law through the upper half of the points."""
    half = min(len(x) // 2, len(x) - 2)
    return float(np.polyfit(np.log(x[half:]), np.log(seconds[half:]), 1)[0]) if half >= 0 else 0.0
