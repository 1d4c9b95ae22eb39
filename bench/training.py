"""`python -m bench.training`: time and peak memory of a training step, beside transformers.

`--what mlm` trains a random BERT on masked LM and next sentences, `--what minilm` the real MiniLM
on movie sentences in batches as they arrive. Memory is the process's peak (VmHWM) over two steps,
each side in a process of its own; times are medians over steps in which the sides take turns.

    python -m bench.training --what mlm --size base --memory     # the bar: at most 0.60
    python -m bench.training --what mlm --size small             # 4 layers, 256 wide
    python -m bench.training --what minilm --dtype bf16
    python -m bench.training --device cuda --size large          # see `bench.training_gpu`
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from . import assets, training_gpu
from .training_cases import LENGTHS, SIDES, SIZES, batch_of, mlm_batches, untrained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def minilm_batches(count: int, size: int) -> list[dict[str, Any]]:
    """Movie sentences with their sign as label, `size` at a time in the order of the file."""
    tokenizer, reviews = AutoTokenizer.from_pretrained(assets.minilm()), assets.movie_reviews()
    made = []
    for i in range(count):
        some = reviews[size * i : size * (i + 1)]
        batch = tokenizer([text for text, _ in some], padding=True, return_tensors="pt")
        labels = torch.tensor([int(valence > 0) for _, valence in some])
        made.append({**batch, "labels": labels})
    return made


def model_of(args: argparse.Namespace, side: str) -> Any:
    if args.what == "mlm":
        model = untrained(args.size, side, torch.device("cpu"))
    else:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            assets.minilm(), attn_implementation="eager" if side == "eager" else "sdpa"
        ).train()
    return SIDES[side](model.to(DTYPES[args.dtype]))


def batches_of(args: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    if args.what == "minilm":
        return minilm_batches(count, args.batch)
    return list(mlm_batches(args.lengths, args.batch, count, SIZES[args.size].vocab))


def step(model: Any, batch: dict[str, Any]) -> float:
    """Forward, backward and plain gradient descent, in seconds."""
    start = time.perf_counter()
    model(**batch).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-5 * parameter.grad
                parameter.grad = None
    return time.perf_counter() - start


def peak(args: argparse.Namespace, side: str) -> int:
    """VmHWM in MiB of a fresh process that takes two steps."""
    line = [sys.executable, "-m", "bench.training", "--inside", side, "--memory"]
    line += ["--what", args.what, "--size", args.size, "--dtype", args.dtype]
    line += ["--lengths", args.lengths, "--batch", str(args.batch)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def inside(args: argparse.Namespace) -> None:
    model = model_of(args, args.inside)
    for batch in batches_of(args, 2):
        step(model, batch)
    (line,) = [x for x in Path("/proc/self/status").read_text().split("\n") if "VmHWM" in x]
    print(int(line.split()[1]) // 1024)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--what", choices=("mlm", "minilm"), default="mlm")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=DTYPES, help="fp32; on a GPU bf16, by autocast")
    parser.add_argument("--lengths", choices=LENGTHS, help="ragged; fixed of --memory; "
                        "on a GPU wiki512")  # fmt: skip
    parser.add_argument("--batch", type=int, help="texts a step (32; 64 of base on wiki512)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--sides", default="", help="comma-separated; the first is compared with")
    parser.add_argument("--inside", choices=SIDES, help=argparse.SUPPRESS)
    return parser


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What is asked for, with the defaults that depend on it; `sides` as a list."""
    args, on_gpu = parser().parse_args(arguments), False
    if args.device == "cuda":
        on_gpu = True
        if not torch.cuda.is_available():
            parser().error("this torch sees no GPU")
        if args.memory or args.what != "mlm":
            parser().error("--device cuda times --what mlm, and tells its memory unasked")
    usual = "eager,sdpa,bert_fast"
    if on_gpu:
        usual = "sdpa,bert_fast,compiled"
    elif args.memory:
        usual = "eager,bert_fast,selective,full"
    args.sides = (args.sides or usual).split(",")
    if unknown := [side for side in args.sides if side not in SIDES]:
        parser().error(f"unknown sides {unknown}, expected some of {', '.join(SIDES)}")
    args.dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    usual = "wiki512" if on_gpu else "fixed" if args.memory else "ragged"
    args.lengths = args.lengths or usual
    args.batch = args.batch or batch_of(args.size, args.lengths)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = options_of(arguments)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    if args.inside:
        return inside(args)
    sides = args.sides
    if args.device == "cuda":
        rows = training_gpu.measure(
            torch.device("cuda"), (args.size,), sides, args.steps, quick=False,
            lengths=args.lengths, batch=args.batch, dtype=DTYPES[args.dtype],
        )  # fmt: skip
        return Console().print(training_gpu.table(rows))
    table = Table("side", "MiB, peak" if args.memory else "ms a step", f"of {sides[0]}'s")
    if args.memory:
        found = {side: [float(peak(args, side))] for side in sides}
    else:
        batches = batches_of(args, args.steps)
        models = {side: model_of(args, side) for side in sides}
        for model in models.values():
            step(model, batches[0])
        found = {side: [] for side in sides}
        for batch in batches:
            for side, model in models.items():
                found[side].append(1e3 * step(model, batch))
    for side, values in found.items():
        ratios = [a / b for a, b in zip(values, found[sides[0]], strict=True)]
        table.add_row(side, f"{statistics.median(values):.1f}", f"{statistics.median(ratios):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
