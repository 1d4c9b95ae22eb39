"""The task `embedding` of `bert-fast finetune`: a sentence-transformers folder in, one out.

Pairs with a score are trained with CoSENT, which wants more similar pairs to have larger scores,
on whatever scale; pairs without are positives, and the others of the batch negatives (multiple
negatives ranking). Model and losses are sentence-transformers'; both texts of all pairs go through
the encoder as one batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ..console import cannot_load, check_tokenizer, load_weights, write_whole
from ..sentence import sentence_modules
from .items import Collate, Item, collator, item_of, outputs_of, tokenize, was_cut
from .loop import MODEL_LOSS, Objective
from .monitor import write_rows
from .readers import Labels, Texts, others, read_texts
from .scores import accuracy, pearson, spearman
from .tasks import Job, Metrics, Task, token_limit

LOSSES = {True: "CoSENTLoss", False: "MultipleNegativesRankingLoss"}  # by: there are scores
SETTINGS = "sentence_bert_config.json"
PAIRS_AT_ONCE = 4_096  # bounds the memory of their vectors


class _Embedder(nn.Module):
    """A SentenceTransformer called as transformers' models are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model[0].auto_model.config

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """input_ids and what else the encoder takes, [2 B, S] -> embeddings [2 B, H]."""
        features = {name: value for name, value in inputs.items() if name != "labels"}
        return {"embeddings": self.model(features)["sentence_embedding"]}


def embedding(job: Job) -> Task:
    """Task `embedding`: pairs of texts, with scores or without; what is predicted is cosines."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses
    except ImportError:
        raise ValueError("--task embedding needs sentence-transformers (pip install it)") from None
    train, valid, asked = (
        read_texts(file, True, job.columns, labelled) if file is not None else None
        for file, labelled in ((job.train, False), (job.validation, False), (job.predict, None))
    )
    transformers.logging.set_verbosity_error()
    modules = sentence_modules(job.model)
    load_weights(transformers.AutoModel, job.model / modules.get("Transformer", ""))  # all there?
    with cannot_load(job.model):
        # In fp32, whatever the checkpoint is in; the loop moves it.
        model = SentenceTransformer(
            str(job.model), device="cpu", model_kwargs={"dtype": torch.float32}
        )
    check_tokenizer(model.tokenizer, job.model, model[0].auto_model.config)
    model.max_seq_length = token_limit(
        model[0].auto_model, model.tokenizer, job.max_length, model.max_seq_length
    )
    collate = collator(model.tokenizer)
    notes: list[str] = []
    if not modules:
        notes.append(
            f"{job.model} is no folder of sentence-transformers': the mean of all tokens is taken"
        )
    if name := model.default_prompt_name:
        notes.append(f"its default prompt {name!r} is put before no text")
    items: list[Item] = []
    objective = MODEL_LOSS
    if train is not None:
        notes.append(f"{len(train)} pairs {'with scores' if train.labels else 'that are alike'}")
        if unused := others(train):
            notes.append(f"{train.table.file}: columns not used: {', '.join(map(repr, unused))}")
        objective = _objective(getattr(losses, LOSSES[bool(train.labels)])(model))
        items = _items(train, model, notes)
    evaluate = predict = None
    if valid is not None:
        evaluate = _evaluation(valid, _items(valid, model, notes), collate)
    if asked is not None:
        predict = _prediction(_items(asked, model, notes), collate)
    return Task(
        _Embedder(model),
        model,
        items,
        lambda items: _collate(items, collate),
        evaluate,
        lambda folder: _save(model, folder),
        predict,
        objective,
        notes,
    )


def _save(model: Any, folder: Path) -> None:
    """As a folder of sentence-transformers, which keeps of what it reads all but one setting."""
    model.save(str(folder))
    if getattr(model[0], "do_lower_case", False):
        file = folder / sentence_modules(folder).get("Transformer", "") / SETTINGS
        settings = json.loads(file.read_text(encoding="utf-8")) | {"do_lower_case": True}
        write_whole(file, json.dumps(settings, indent=4) + "\n")


def _objective(loss: Any) -> Objective:
    """One of sentence-transformers' losses, a mean over pairs."""

    def means(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor]:
        halves = list(outputs["embeddings"].chunk(2))
        return (loss.compute_loss_from_embeddings(halves, inputs.get("labels")),)

    return Objective(("loss",), lambda inputs: (len(inputs["input_ids"]) // 2,), means)


def _items(examples: Texts, model: Any, notes: list[str]) -> list[Item]:
    """One for each pair: input_ids of both texts, one after the other, and where they meet."""
    limit, cut, sides = int(model.max_seq_length), 0, []
    assert examples.texts_b is not None
    for texts in (examples.texts, examples.texts_b):
        encodings = list(tokenize(model.tokenizer, texts, None, limit))
        cut += sum(was_cut(*encoding) for encoding in encodings)
        sides.append([item_of(*encoding) for encoding in encodings])
    if cut:
        notes.append(f"{examples.table.file}: {cut} texts cut to {limit} tokens")
    labels: Sequence[Any] = [{}] * len(examples)
    if examples.labels:
        labels = [{"labels": score} for score in Labels(()).encode(examples)]
    return [
        {
            **{name: np.concatenate([a[name], b[name]]) for name in a},
            "meet": len(a["input_ids"]),
            **label,
        }
        for a, b, label in zip(*sides, labels, strict=True)
    ]


def _halves(items: Sequence[Item]) -> list[Item]:
    """First all first texts, then all second ones, without scores."""
    names = [name for name in items[0] if name not in ("meet", "labels")]
    first = [{name: item[name][: item["meet"]] for name in names} for item in items]
    return first + [{name: item[name][item["meet"] :] for name in names} for item in items]


def _collate(items: Sequence[Item], collate: Collate) -> dict[str, Tensor]:
    batch = collate(_halves(items))
    if "labels" in items[0]:
        batch["labels"] = torch.tensor([item["labels"] for item in items])
    return batch


def _evaluation(
    examples: Texts, items: Sequence[Item], collate: Collate
) -> Callable[[nn.Module], Metrics]:
    """Correlation of cosines and scores; how often a text's own partner is nearest, without."""

    def evaluate(model: nn.Module) -> Metrics:
        if not examples.labels:
            first, second = _vectors(model, items, collate)
            assert examples.texts_b is not None
            partners = np.unique(examples.texts_b, return_inverse=True)[1]  # some may be the same
            return {"accuracy": accuracy(partners[_nearest(first, second)], partners)}
        cosines = np.array(list(_cosines(model, items, collate)))
        scores = np.array([item["labels"] for item in items])
        return {"pearson": pearson(cosines, scores), "spearman": spearman(cosines, scores)}

    return evaluate


def _prediction(items: Sequence[Item], collate: Collate) -> Callable[[nn.Module, Path], object]:
    def predict(model: nn.Module, folder: Path) -> object:
        cosines = _cosines(model, items, collate)
        return write_rows(folder, ({"cosine": cosine} for cosine in cosines))

    return predict


def _cosines(model: nn.Module, items: Sequence[Item], collate: Collate) -> Iterator[float]:
    for start in range(0, len(items), PAIRS_AT_ONCE):
        first, second = _vectors(model, items[start : start + PAIRS_AT_ONCE], collate)
        yield from (first * second).sum(-1).tolist()


def _vectors(model: nn.Module, items: Sequence[Item], collate: Collate) -> tuple[Tensor, ...]:
    """The embeddings of first and second texts, of unit length, fp64 [N, H] each."""
    found = outputs_of(model, _halves(items), collate, "embeddings")
    return F.normalize(torch.from_numpy(np.stack([row[0] for row in found])).double()).chunk(2)


def _nearest(first: Tensor, second: Tensor) -> np.ndarray:
    """Which row of `second` has the largest product with each of `first`."""
    # By parts: all products of 100,000 pairs are 80 GB.
    return torch.cat([(part @ second.T).argmax(-1) for part in first.split(1_000)]).numpy()
