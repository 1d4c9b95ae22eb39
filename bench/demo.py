"""`make demo`: a real sentence encoder on real text, first the values, then the speed.

all-MiniLM-L6-v2 runs as transformers runs it (SDPA) and accelerated. Values that are off end the
demo with exit code 1; a speed below its target is printed as a miss. Both sides get the same
tokenised, padded batches; they take turns on each window of batches, and a ratio is the median
over windows of the two times of a window. `--json OUT` writes the numbers, `--readme` puts the
table into README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import bert_fast
from bert_fast import doctor
from bert_fast.encode import embed
from bert_fast.ops.products import has_native

from . import assets
from .readme import README, replace

EMULATED = (
    "bf16: this processor does not multiply in bf16, and transformers emulates it: the ratios say "
    "nothing of a processor that does."
)
SENTENCES, BATCH, WINDOWS, STRIDE = 2_048, 64, 16, 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# The README of sentence-transformers prints these cosines for this model.
GOLDEN_TEXTS = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
)
GOLDEN = (0.6660, 0.1046, 0.1411)
MOST_DIFFERENCE = 5e-6  # of any entry of a unit vector from transformers' fp32
LEAST_COSINE = {"fp32": 0.999_999, "bf16": 0.999}  # to transformers' fp32
TARGETS = {
    ("fp32", "arrival"): 2.0,
    ("bf16", "arrival"): 2.0,
    ("fp32", "sorted"): 1.2,
    ("bf16", "sorted"): 1.2,
}

console = Console(width=100)


@dataclass(frozen=True)
class Speed:
    """Medians over windows: texts per second of both sides, and the ratio of their times."""

    dtype: str
    order: str
    transformers: float
    bert_fast: float
    ratio: float
    target: float


@dataclass
class Values:
    """Each check by name: what was found, what is allowed, whether that holds."""

    rows: list[tuple[str, str, str, bool]]

    def add(self, name: str, found: str, allowed: str, holds: bool) -> None:
        self.rows.append((name, found, allowed, holds))

    @property
    def hold(self) -> bool:
        return all(row[3] for row in self.rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each speed (20)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    here = {**doctor.machine(), **doctor.versions()}
    facts = Table(show_header=False, box=None)
    for name, value in here.items():
        facts.add_row(name, value)
    console.print(facts)

    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.minilm())
    texts = assets.movie_sentences()[:SENTENCES]
    theirs = {name: load(dtype) for name, dtype in DTYPES.items()}
    ours = {name: bert_fast.accelerate(load(dtype)) for name, dtype in DTYPES.items()}

    values = check_values(theirs["fp32"], ours, tokenizer, texts)
    show_values(values)
    if not values.hold:
        return 1
    speeds = []
    for order in ("arrival", "sorted"):
        batches = tokenized(tokenizer, texts, order)
        for name in DTYPES:
            with console.status(f"timing {name}, batches of {BATCH} in {order} order"):
                pair = theirs[name], ours[name]
                speeds.append(measure(*pair, batches, name, order, options.seconds))
    with console.status("timing embed(texts)"):
        whole = {name: end_to_end(ours[name], tokenizer, texts, options.seconds) for name in DTYPES}
    show_speeds(speeds, whole)

    if options.json:
        result = {
            "machine": here,
            "values": [row[:3] for row in values.rows],
            "speeds": [vars(speed) for speed in speeds],
            "embed_texts_per_second": whole,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.readme:
        write_readme(speeds, whole, here)
    return 0


def load(dtype: torch.dtype) -> nn.Module:
    model = transformers.AutoModel.from_pretrained(
        assets.minilm(), dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval()


def tokenized(tokenizer: Any, texts: list[str], order: str) -> list[Mapping[str, Tensor]]:
    """Padded batches of 64, as they arrive or with texts of like length together."""
    if order == "sorted":
        texts = sorted(texts, key=lambda text: len(tokenizer.tokenize(text)))
    return [
        tokenizer(texts[i : i + BATCH], padding=True, truncation=True, return_tensors="pt")
        for i in range(0, len(texts), BATCH)
    ]


@torch.inference_mode()
def vectors(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> np.ndarray:
    """Mean-pooled unit vectors, computed the usual way from the padded output of `model`."""
    found = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state.float()  # [B, S, H]
        mask = batch["attention_mask"].unsqueeze(2)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        found.append(nn.functional.normalize(mean, dim=1).numpy())
    return np.concatenate(found)


def check_values(
    reference: nn.Module, ours: dict[str, nn.Module], tokenizer: Any, texts: list[str]
) -> Values:
    values = Values([])
    a, b, c = embed(ours["fp32"], tokenizer, GOLDEN_TEXTS)
    cosines = [float(np.dot(x, y)) for x, y in ((a, b), (a, c), (b, c))]
    values.add(
        "cosines of the model card's three sentences, fp32",
        " ".join(f"{cosine:.4f}" for cosine in cosines),
        " ".join(f"{cosine:.4f}" for cosine in GOLDEN),
        [round(cosine, 4) for cosine in cosines] == list(GOLDEN),
    )
    with console.status("comparing values"):
        batches = tokenized(tokenizer, texts[: SENTENCES // 4], "arrival")
        truth = vectors(reference, batches)
        for name, model in ours.items():
            found = {
                "model(**batch)": vectors(model, batches),
                "embed(texts)": embed(model, tokenizer, texts[: len(truth)]),
            }
            for how, mine in found.items():
                if name == "fp32":
                    worst = float(np.abs(mine - truth).max())
                    values.add(
                        f"largest difference from transformers, {name}, {how}",
                        f"{worst:.1e}",
                        f"<= {MOST_DIFFERENCE:.0e}",
                        worst <= MOST_DIFFERENCE,
                    )
                least = float((mine * truth).sum(1).min())
                values.add(
                    f"smallest cosine to transformers' fp32, {name}, {how}",
                    f"{least:.6f}",
                    f">= {LEAST_COSINE[name]}",
                    least >= LEAST_COSINE[name],
                )
    return values


def measure(
    theirs: nn.Module,
    ours: nn.Module,
    batches: list[Mapping[str, Tensor]],
    dtype: str,
    order: str,
    seconds: float,
) -> Speed:
    """Times both sides in turns; a value check of the very batches comes first, and warms up."""
    cosines = (vectors(theirs, batches[::WINDOWS]) * vectors(ours, batches[::WINDOWS])).sum(1)
    if cosines.min() < LEAST_COSINE[dtype]:
        sys.exit(f"{dtype}, {order}: a cosine to transformers is {cosines.min():.6f}")
    # Batches are dealt out, so that all windows hold about the same mix of lengths, and windows are
    # taken in strides, so that a few of them do too.
    windows = [batches[i::WINDOWS] for i in range(WINDOWS)]
    times: list[tuple[float, float]] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < deadline:
        window = windows[STRIDE * len(times) % WINDOWS]
        if len(times) % 2:  # who goes first changes too
            after = run(ours, window)
            times.append((run(theirs, window), after))
        else:
            times.append((run(theirs, window), run(ours, window)))
    texts = SENTENCES / WINDOWS
    return Speed(
        dtype,
        order,
        statistics.median(texts / before for before, _ in times),
        statistics.median(texts / after for _, after in times),
        statistics.median(before / after for before, after in times),
        TARGETS[dtype, order],
    )


@torch.inference_mode()
def run(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Seconds that the model takes for these batches."""
    start = time.perf_counter()
    for batch in batches:
        model(**batch)
    return time.perf_counter() - start


def end_to_end(model: nn.Module, tokenizer: Any, texts: list[str], seconds: float) -> float:
    """Texts per second from strings to embeddings, tokenising included."""
    times: list[float] = []
    while sum(times) < seconds / 2:
        start = time.perf_counter()
        embed(model, tokenizer, texts)
        times.append(time.perf_counter() - start)
    return len(texts) / statistics.median(times)


def show_values(values: Values) -> None:
    table = Table(title="values", title_justify="left")
    for column in ("check", "found", "expected", ""):
        table.add_column(column)
    for name, found, allowed, holds in values.rows:
        table.add_row(name, found, allowed, "ok" if holds else "WRONG")
    console.print(table)


def show_speeds(speeds: list[Speed], whole: dict[str, float]) -> None:
    table = Table(
        title=f"texts/s, padded batches of {BATCH} of {SENTENCES:,} movie-review sentences",
        title_justify="left",
    )
    for column in ("dtype", "order", "transformers", "bert_fast", "ratio", "target"):
        table.add_column(column, justify="left" if column in ("dtype", "order") else "right")
    for s in speeds:
        told = f"{s.target:.1f}x {'ok' if s.ratio >= s.target else 'miss'}"
        rates = f"{s.transformers:,.0f}", f"{s.bert_fast:,.0f}"
        table.add_row(s.dtype, s.order, *rates, f"{s.ratio:.2f}x", told)
    console.print(table)
    if not has_native(torch.bfloat16):
        console.print(EMULATED)
    for name, rate in whole.items():
        console.print(f"embed(texts), {name}, tokenising included: {rate:,.0f} texts/s")


def write_readme(speeds: list[Speed], whole: dict[str, float], here: dict[str, str]) -> None:
    rows = [
        f"Made by `make demo` on {here['CPU']}; torch {here['torch']}, "
        f"transformers {here['transformers']}; "
        f"C++ extension {here['C++ extension'].partition(' (')[0]}.",
        "",
        "| texts/s, batches of 64 | transformers (SDPA) | bert_fast | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    for s in speeds:
        order = "as they arrive" if s.order == "arrival" else "sorted by length"
        rates = f"{s.transformers:,.0f} | {s.bert_fast:,.0f}"
        rows.append(f"| {s.dtype}, {order} | {rates} | {s.ratio:.2f}x |")
    for name, rate in whole.items():
        rows.append(f"| {name}, `bert_fast.encode.embed`, from strings | | {rate:,.0f} | |")
    if not has_native(torch.bfloat16):
        rows += ["", EMULATED]
    replace(README, ("<!-- demo:begin -->", "<!-- demo:end -->"), "\n".join(rows))


if __name__ == "__main__":
    sys.exit(main())
