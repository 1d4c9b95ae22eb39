"""Runs of the bench that nobody ran, for what reads them."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np

from bench import noise
from bench.results import Entry, Noise, OpEntry, Run, Scaling

WORKLOADS = {"single16": (16, 16), "full128": (1_024, 1_024), "sentence": (864, 2_528)}
# Seconds for 1,000 tokens; a padded token costs the peers as much as a real one.
PEERS = {
    ("hf_sdpa", "fp32"): 1.0,
    ("hf_sdpa", "bf16"): 0.6,
    ("ort_cpu", "fp32"): 0.7,
    ("ort_dynamic", "int8"): 0.15,
    ("onednn_graph", "bf16"): 0.5,
}
OURS = {"fp32": 0.7, "bf16": 0.35}
LOSES = ("single16", "fp32")  # and ties on full128, with ort_cpu


def windows(draw: np.random.Generator, median: float, count: int = 20) -> list[float]:
    """With 2 % noise."""
    return (median * (1 + 0.02 * draw.standard_normal(count))).tolist()


def timed(entry: Entry, seconds: list[float]) -> Entry:
    median = statistics.median(seconds)
    return replace(
        entry, seconds=seconds, median_s=median, p95_s=float(np.percentile(seconds, 95)),
        tokens_per_s=entry.tokens / median, tflop_per_s=entry.flop / median / 1e12,
        first_call_s=0.2, peak_mb=120.0, relative_l2=3e-7,
        cosine=0.98567 if entry.precision == "int8" else 0.99999,
    )  # fmt: skip


def made_up(seed: int = 0, slowdown: float = 1.0, machine: float = 1.0) -> Run:
    """A run with a win, a loss, a tie, a failure, a missing peer, int8, ops and scaling.

    slowdown: of bert_fast alone; machine: of everything.
    """
    draw = np.random.default_rng(seed)
    run = Run(
        "bert-fast bench", "0123456789abcdef", True, "2026-01-02T03:04:05Z",
        {"CPU": "A <fast> CPU"}, {"torch": "2.13.0", "transformers": "5.23.0"}, 2, "A <fast> CPU",
        ceilings={"copy_gb_per_s": 20.0, "matmul_fp32_tflop_per_s": 0.2,
                  "matmul_bf16_tflop_per_s": 0.5},
        noise=Noise(1.5, 0.02, 120, 7), missing={"openvino bf16": "openvino is not installed"},
    )  # fmt: skip
    for workload, (tokens, padded) in WORKLOADS.items():
        for order in ("arrival", "sorted") if tokens < padded else ("arrival",):
            width = padded if order == "arrival" else tokens + 10
            ours: dict[str, list[float]] = {}
            for precision, cost in OURS.items():
                lost = 1.2 if (workload, precision) == LOSES else 1.0
                seconds = windows(draw, cost * tokens / 1e3 * lost * slowdown * machine)
                ours[precision] = seconds
                entry = Entry("minilm", workload, order, "bert_fast", precision, 8, tokens, width)
                run.models.append(timed(replace(entry, flop=tokens * 2e7), seconds))
            for (contender, precision), cost in PEERS.items():
                entry = Entry("minilm", workload, order, contender, precision, 8, tokens, width)
                if contender == "onednn_graph" and workload == "sentence":
                    run.models.append(replace(entry, failed="RuntimeError: no <dynamic> shapes"))
                    continue
                entry = timed(entry, windows(draw, cost * width / 1e3 * machine))
                if precision in ours:
                    entry.ratio = noise.ratio(entry.seconds, ours[precision], 0.01)
                run.models.append(entry)
            absent = Entry("minilm", workload, order, "openvino", "bf16", 8, tokens, width)
            run.models.append(replace(absent, failed=run.missing["openvino bf16"]))
    for op in ("linear", "attention", "pool"):
        for dtype, kernel, cost in (("fp32", "avx2", 1.0), ("fp32", "reference", 2.0),
                                    ("bf16", "avx2", 0.6), ("bf16", "reference", 1.5)):  # fmt: skip
            own = slowdown if kernel != "reference" else 1.0
            ms = cost * machine * own * (1 + 0.005 * draw.standard_normal())
            flop, moved = (2e8, 1e7) if op != "pool" else (4e5, 2e6)
            run.ops.append(
                OpEntry(op, "minilm/T1024", dtype, kernel, "forward", flop, moved, ms,
                        flop / ms / 1e9, moved / ms / 1e6, 0.5, 1e-6, 2e-6)
            )  # fmt: skip
    run.ops.append(OpEntry("pad", "minilm/T1024", "fp32", "avx2", "forward", 0, 1e6, 0.1 * machine))
    run.ops.append(OpEntry("unpad", "c", "fp32", "avx2", "forward", 0, 1e6, failed="wrong: 1e-3"))
    x = [128.0, 256.0, 512.0]
    curves = {"bert_fast": [0.01, 0.021, 0.043], "hf_sdpa": [0.02, 0.05, 0.13]}
    run.scaling.append(
        Scaling("minilm", "fp32", "tokens", x, curves, {"bert_fast": 1.03, "hf_sdpa": 1.4})
    )
    run.failed.append("models: onednn_graph")
    return run
