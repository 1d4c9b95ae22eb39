"""Pre-training steps of `bert-fast pretrain`, beside the same run on transformers' eager BERT.

    python -m bench.pretraining [--steps 12] [--rounds 3] [--batch-size 32] [--json OUT]

Both sides train the same weights on the same batches of real text through the same loop; only the
model differs. They take turns of `--steps` steps; the first two of a turn are not counted, the
ratio is the median over the turns. The losses have to agree.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import bert_fast
from bert_fast.training.loop import Settings, train
from bert_fast.training.pretrain import OBJECTIVE, Prepared, Recipe, prepare

from . import assets

SKIPPED = 2  # steps of a turn


def turn(prepared: Prepared, model: Any, settings: Settings) -> tuple[float, list[float]]:
    """Real tokens per second after the first steps, and the losses, of one side's turn."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(Path(folder), **settings.to_json())
        rows = train(
            copy.deepcopy(model),
            prepared.pairs,
            settings,
            prepared.collate,
            lengths=prepared.pairs.lengths,
            objective=OBJECTIVE,
        )
    tokens = [row["num_input_tokens_seen"] for row in rows]
    seconds = [n / row["tokens_per_second"] for n, row in zip(tokens, rows, strict=True)]
    counted = tokens[-1] - tokens[SKIPPED - 1], seconds[-1] - seconds[SKIPPED - 1]
    return counted[0] / counted[1], [row["loss"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pretraining", description=__doc__)
    parser.add_argument("--text", default=None, help="a file; the news articles unless given")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    recipe = Recipe(
        [options.text or assets.news_articles()],
        vocab_size=options.vocab_size, layers=options.layers, hidden=options.hidden,
        heads=options.heads, dropout=0.0, max_length=options.max_length, validation_fraction=0.0,
    )  # fmt: skip
    settings = Settings(
        assets.CACHE / "pretraining", max_steps=options.steps, batch_size=options.batch_size,
        lr=1e-4, dtype=options.dtype, resume=True,
    )  # fmt: skip
    prepared = prepare(recipe, settings)
    eager = copy.deepcopy(prepared.model)
    eager.set_attn_implementation("eager")
    ours = bert_fast.accelerate(prepared.model, sparse_logits=True)
    sides = {"transformers": eager, "bert_fast": ours}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {}
    for index in range(options.rounds):
        for name in list(sides) if index % 2 else reversed(sides):
            speed, losses[name] = turn(prepared, sides[name], settings)
            speeds[name].append(speed)
    torch.testing.assert_close(*map(torch.tensor, losses.values()), rtol=1e-3, atol=0)
    ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
    result = {name: statistics.median(found) for name, found in speeds.items()}
    result["ratio"] = statistics.median(ratios)
    print(
        f"{options.layers} layers, {options.hidden} wide, {options.dtype}, batches of "
        f"{options.batch_size} x {options.max_length}: transformers eager "
        f"{result['transformers']:.0f} tokens/s, bert_fast {result['bert_fast']:.0f} tokens/s, "
        f"ratio {result['ratio']:.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    )
    if options.json:
        options.json.write_text(json.dumps({**result, "turns": speeds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
