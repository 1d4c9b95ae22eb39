"""SentenceTransformer.encode on real sentences, before and after `bert_fast.accelerate`.

    python -m bench.encode [--dtypes fp32,bf16,fp16] [--texts 10605] [--json OUT]

One model object in two states: Hugging Face's classes, then ours. The corpus is cut into parts,
each side takes its turn on every part, and the ratio is the median over the parts. Before the
timing the vectors of a few texts are compared with those of transformers in fp32 (at most twice
transformers' own distance in the same dtype), and the published cosines are checked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import bert_fast

from . import assets
from .demo import GOLDEN, GOLDEN_TEXTS
from .measure import DTYPES

PARTS = 5


def compare(dtype: str, texts: list[str], truth: np.ndarray) -> dict[str, Any]:
    """Seconds of both sides, their median ratio, and the largest distance 1 - cosine of both."""
    model = load(dtype)

    def encode(part: list[str]) -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        vectors = model.encode(part, normalize_embeddings=True, batch_size=64)
        return time.perf_counter() - start, vectors.astype(np.float64)

    def distance() -> float:
        vectors = encode(texts[: len(truth)])[1]
        cosines = (truth * vectors).sum(1) / np.linalg.norm(vectors, axis=1)
        return float(1.0 - cosines.min())

    theirs = distance()
    bert_fast.accelerate(model)
    ours = distance()
    assert ours <= 2 * theirs + 1e-6, f"{dtype}: distance {ours:.1e}, transformers' {theirs:.1e}"
    golden = encode(list(GOLDEN_TEXTS))[1]
    found = [float(golden[a] @ golden[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert dtype != "fp32" or [round(c, 4) for c in found] == list(GOLDEN), found
    seconds: dict[str, list[float]] = {"transformers": [], "bert_fast": []}
    for i in range(PARTS):
        for side in seconds if i % 2 else reversed(seconds):
            (bert_fast.accelerate if side == "bert_fast" else bert_fast.restore)(model)
            model.encode(texts[:64])  # packs the weights anew: not what is measured
            seconds[side].append(encode(texts[i::PARTS])[0])
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    rate = {side: len(texts) / sum(times) for side, times in seconds.items()}
    return {"dtype": dtype, **rate, "ratio": statistics.median(ratios),
            "distance": ours, "their_distance": theirs}  # fmt: skip


def load(dtype: str) -> Any:
    from sentence_transformers import SentenceTransformer

    options = {"dtype": DTYPES[dtype]}
    return SentenceTransformer(str(assets.minilm()), device="cpu", model_kwargs=options)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.encode", description=__doc__)
    parser.add_argument("--dtypes", default="fp32,bf16,fp16")
    parser.add_argument("--texts", type=int, default=10_605)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    texts = assets.movie_sentences()[: options.texts]
    truth = load("fp32").encode(texts[:256], normalize_embeddings=True).astype(np.float64)
    rows = [compare(dtype, texts, truth) for dtype in options.dtypes.split(",")]
    table = Table(title=f"SentenceTransformer.encode, {len(texts)} sentences, texts/s")
    for column in ("dtype", "transformers", "bert_fast", "ratio", "1 - cosine", "theirs"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["dtype"], f"{row['transformers']:.0f}", f"{row['bert_fast']:.0f}",
            f"{row['ratio']:.2f}", f"{row['distance']:.1e}", f"{row['their_distance']:.1e}",
        )  # fmt: skip
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
