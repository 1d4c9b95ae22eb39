"""finetune(job): a checkpoint and files in; a trained one, its metrics and predictions out."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState

from ..console import check_output
from ..convert import accelerate
from .answers import spans
from .classes import classification
from .embedding import embedding
from .items import Item, lengths_of
from .loop import train
from .monitor import write_metrics
from .tags import tokens
from .tasks import Job, Task

TASKS: dict[str, Callable[[Job], Task]] = {
    "classification": classification,
    "pairs": classification,
    "spans": spans,
    "tokens": tokens,
    "embedding": embedding,
}


# What a model whose place is taken has left: its answers, and what made it a sentence-transformer.
OF_ANOTHER = (
    "predictions.jsonl", "predictions.json", "nbest_predictions.json", "null_odds.json",
    "modules.json", "config_sentence_transformers.json",
)  # fmt: skip


def finetune(job: Job, told: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains as `job` says, evaluates, predicts, and writes to its settings' output_dir.

    There: the checkpoint as transformers saves it, with tokenizer, and metrics.csv, where there is
    training data; metrics.json, where there is some or data to evaluate on; and predictions.jsonl,
    a line for each row of `job.predict`, in their order: {"label", "probabilities": by label}, or
    {"score"} where labels are scores; {"tokens", "labels"}; {"cosine"} for embedding; for spans
    predictions.json, nbest_predictions.json and null_odds.json instead.

    Args:
        told: called with what a user should know of the data, and at last with the metrics; by
            the main process only.

    Returns: the metrics on the validation data: `accuracy`, with `macro_f1` and `matthews` for a
        label for each text; `pearson`, `spearman` and `mse` for scores; `exact_match` and `f1` in
        percent for spans; also `precision`, `recall` and `f1` of entities for BIO tags.
    Raises: ValueError for a wrong option or wrong data, with file, line and what is allowed;
        OSError for files that cannot be read or written.
    """
    if job.task not in TASKS:
        raise ValueError(f"unknown task {job.task!r}, expected one of {', '.join(TASKS)}")
    if job.train is None and job.validation is None and job.predict is None:
        raise ValueError("nothing to do: give --train, --validation or --predict")
    if job.train is None and job.settings.resume:
        raise ValueError("--resume goes on with training: give --train")
    transformers.set_seed(job.settings.seed)  # a new head is a function of the seed
    task = TASKS[job.task](job)
    folder = job.settings.output_dir
    evaluates_only = job.train is None and task.evaluate is not None
    if evaluates_only and folder.resolve() == job.model.resolve():
        raise ValueError(
            f"{folder} is the model's own folder, whose metrics.json tells of its training: choose "
            "another --output"
        )
    if job.accelerate:
        accelerate(task.encoder)
    processes = PartialState(cpu=job.settings.on_cpu)
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        check_output(folder / "metrics.json")
        for note in task.notes:
            told(note)
    history: list[dict[str, float]] = []
    last: dict[str, float] = {}

    def evaluate(model: Any) -> dict[str, float]:
        assert task.evaluate is not None
        last.clear()
        last.update(task.evaluate(model))
        return last

    if job.train is not None:
        history = train(
            task.model,
            task.items,
            job.settings,
            task.collate,
            lengths=lengths_of(task.items),
            evaluate=evaluate if task.evaluate is not None else None,
            objective=task.objective,
            about=job.to_json() | {"contents": _checksum(task.items)},
            tokenizer=task.tokenizer,
        )
    task.model.to(processes.device)
    # What Trainer has seen to where it trained.
    bf16 = torch.autocast(
        processes.device.type, torch.bfloat16, enabled=job.settings.dtype == "bf16"
    )
    if task.evaluate is not None and not last:  # no training, or a run that was done before
        with bf16:
            evaluate(task.model)
    if processes.is_main_process:
        if job.train is not None:
            for name in OF_ANOTHER:
                (folder / name).unlink(missing_ok=True)
            task.save(folder)
        if history or last:
            write_metrics(folder, history, task=job.task, seed=job.settings.seed, **last)
        if task.predict is not None:
            with bf16:
                task.predict(task.model, folder)
        found = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
        told(f"{found or ('predicted' if job.train is None else 'trained')}; {folder}")
    return last


def _checksum(items: Sequence[Item]) -> int:
    """Of all that is trained on, labels too: what other data a resumed run is told by."""
    found = 0
    for item in items:
        for name in sorted(item):
            found = zlib.crc32(np.asarray(item[name]).tobytes(), found)
    return found
