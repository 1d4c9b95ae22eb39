"""`python -m bench.training`: time and peak memory of a training step, beside transformers.

`--what mlm` trains a random BERT on masked LM and next sentences, `--what minilm` the real MiniLM
on movie sentences in batches as they arrive. Memory is the process's peak (VmHWM) over two steps,
each side in a process of its own; times are medians over steps in which the sides take turns.

    python -m bench.training --what mlm --size base --memory     # the bar: at most 0.60
    python -m bench.training --what mlm --size small             # 4 layers, 256 wide
    python -m bench.training --what minilm --dtype bf16
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    logging,
)

import bert_fast

from . import assets

BATCH, LENGTH, VOCABULARY = 32, 128, 30_522
SIZES = {"tiny": (2, 128), "small": (4, 256), "base": (12, 768)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES: dict[str, Callable[[Any], Any]] = {
    "eager": lambda model: model,
    "sdpa": lambda model: model,
    "bert_fast": lambda model: bert_fast.accelerate(model, sparse_logits=True),
    "selective": lambda m: bert_fast.accelerate(m, sparse_logits=True, checkpoint="selective"),
    "full": lambda m: bert_fast.accelerate(m, sparse_logits=True, checkpoint="full"),
}


def mlm_batches(count: int, ragged: bool) -> list[dict[str, Any]]:
    """Random tokens, 15 % of them scored; ragged: lengths from half of `LENGTH` to all of it."""
    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(count):
        ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=generator)
        least = LENGTH // 2 if ragged else LENGTH
        lengths = torch.randint(least, LENGTH + 1, (BATCH, 1), generator=generator)
        mask = torch.arange(LENGTH) < lengths
        scored = (torch.rand(BATCH, LENGTH, generator=generator) < 0.15) & mask
        following = torch.randint(0, 2, (BATCH,), generator=generator)
        made.append(
            {
                "input_ids": ids,
                "attention_mask": mask.long(),
                "labels": ids.masked_fill(~scored, -100),
                "next_sentence_label": following,
            }
        )
    return made


def minilm_batches(count: int) -> list[dict[str, Any]]:
    """Movie sentences with their sign as label, `BATCH` at a time in the order of the file."""
    tokenizer, reviews = AutoTokenizer.from_pretrained(assets.minilm()), assets.movie_reviews()
    made = []
    for i in range(count):
        some = reviews[BATCH * i : BATCH * (i + 1)]
        batch = tokenizer([text for text, _ in some], padding=True, return_tensors="pt")
        labels = torch.tensor([int(valence > 0) for _, valence in some])
        made.append({**batch, "labels": labels})
    return made


def model_of(args: argparse.Namespace, side: str) -> Any:
    torch.manual_seed(0)
    attention = "eager" if side == "eager" else "sdpa"
    if args.what == "minilm":
        model = AutoModelForSequenceClassification.from_pretrained(
            assets.minilm(), attn_implementation=attention
        )
    else:
        layers, hidden = SIZES[args.size]
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, intermediate_size=4 * hidden,
            attn_implementation=attention,
        )  # fmt: skip
        model = BertForPreTraining(config)
    return SIDES[side](model.to(DTYPES[args.dtype]).train())


def batches_of(args: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    if args.what == "minilm":
        return minilm_batches(count)
    return mlm_batches(count, ragged=not args.memory)


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
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def inside(args: argparse.Namespace) -> None:
    model = model_of(args, args.inside)
    for batch in batches_of(args, 2):
        step(model, batch)
    (line,) = [x for x in Path("/proc/self/status").read_text().split("\n") if "VmHWM" in x]
    print(int(line.split()[1]) // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", choices=("mlm", "minilm"), default="mlm")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--sides", default="", help="comma-separated; the first is compared with")
    parser.add_argument("--inside", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    if args.inside:
        return inside(args)
    usual = "eager,bert_fast,selective,full" if args.memory else "eager,sdpa,bert_fast"
    sides = (args.sides or usual).split(",")
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
