"""Accuracy of MiniLM fine-tuned on movie sentences, through bert_fast and through transformers.

    python -m bench.finetuning [--seeds 5] [--train 2000] [--validation 1000] [--json OUT]

The label is the sign of a sentence's mean rating. The split is the same on every machine: sentences
in the order of a fixed shuffle, the first ones for validation. Both sides run `bert-fast finetune`,
with the same seeds (the dropout differs: each draws it in its own way), and SDPA in transformers.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from bert_fast.training.finetune import finetune
from bert_fast.training.loop import Settings
from bert_fast.training.tasks import Job

from . import assets


def write_split(folder: Path, train: int | None, validation: int) -> tuple[Path, Path]:
    """train.jsonl and validation.jsonl in `folder`; all that is left trains where `train` is None.

    Sentences with a mean rating of 0 have no label and are left out.
    """
    rows = [(text, int(rating > 0)) for text, rating in assets.movie_reviews() if rating]
    random.Random(0).shuffle(rows)
    stop = None if train is None else validation + train
    parts = {"train": rows[validation:stop], "validation": rows[:validation]}
    for name, part in parts.items():
        lines = [json.dumps({"text": text, "label": label}) for text, label in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl", folder / "validation.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.finetuning", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train", type=int, default=2000, help="sentences; 0: all")
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    accuracies: dict[str, list[float]] = {"transformers": [], "bert_fast": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, validation = write_split(folder, options.train or None, options.validation)
        for seed in range(options.seeds):
            for side, found in accuracies.items():
                settings = Settings(
                    folder / f"{side}-{seed}", epochs=options.epochs, lr=options.lr, seed=seed
                )
                job = Job(
                    "classification", assets.minilm(), settings, train, validation,
                    max_length=64, accelerate=side == "bert_fast",
                )  # fmt: skip
                found.append(finetune(job, told=lambda note: None)["accuracy"])
                print(f"seed {seed}, {side}: {found[-1]:.4f}", flush=True)
    for side, found in accuracies.items():
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"{side}: mean {statistics.mean(found):.4f}, standard deviation {spread:.4f}")
    if options.json:
        options.json.write_text(json.dumps(accuracies, indent=1) + "\n")


if __name__ == "__main__":
    main()
