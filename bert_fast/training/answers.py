"""The task `spans` of `bert-fast finetune`: SQuAD in, answers, exact match and F1 out.

The loss is a cross-entropy over the real tokens of a window. transformers' own also sums over its
padding, so that it depends on what else is in the batch; without that, no padding is computed.
What is predicted never pointed to padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from .items import Item, collator, outputs_of
from .loop import Objective
from .spans import Feature, Prediction, make_features, predict
from .squad import Squad, read_squad
from .squad_metrics import evaluate as squad_scores
from .tasks import Job, Metrics, Task, load_config, load_model, token_limit

MAX_LENGTH = 384
MAX_ANSWER_TOKENS = 30
CONFIG_KEY = "spans"  # what config.json keeps of the training, for predictions later on


def spans(job: Job) -> Task:
    """Task `spans`; without training data it answers with the model as it is."""
    files = {name: getattr(job, name) for name in ("train", "validation", "predict")}
    squads = {
        name: read_squad(file, answered=name != "train")
        for name, file in files.items()
        if file is not None
    }
    train, held_out = squads.get("train"), squads.get("predict", squads.get("validation"))
    _, tokenizer = load_config(job.model)
    kind = transformers.AutoModelForQuestionAnswering
    model = load_model(kind, job.model, {"num_labels": 2}, trained=train is None)
    limit = token_limit(model, tokenizer, job.max_length, MAX_LENGTH)
    stride = limit // 3 if job.doc_stride is None else job.doc_stride

    notes: list[str] = []
    items: list[Item] = []
    if train is not None:
        features, lost = make_features(train.questions, tokenizer, limit, stride)
        items, kept = _training_items(train, features, set(lost), notes)
        longest = max((f.end - f.start + 1 for f in kept), default=1)
        settings = {
            "null_allowed": any(q.labelled and not q.answers for q in train.questions),
            "max_answer_tokens": max(MAX_ANSWER_TOKENS, longest),
        }
        setattr(model.config, CONFIG_KEY, settings)
    known = getattr(model.config, CONFIG_KEY, {})
    answering = {
        "null_allowed": known.get("null_allowed", held_out is not None and held_out.version == 2),
        "null_threshold": job.null_threshold,
        "max_answer_tokens": known.get("max_answer_tokens", MAX_ANSWER_TOKENS),
    }
    asked = {
        name: _Asked(squad, tokenizer, limit, stride, answering)
        for name, squad in squads.items()
        if name != "train"
    }
    scored = next((a for a in asked.values() if a.labelled), None)

    def write(model: nn.Module, folder: Path) -> None:
        last = asked["predict" if "predict" in asked else "validation"]
        write_predictions(folder, last.squad, last.predictions(model), answering)

    return Task(
        model,
        model.base_model,  # alone, padding is spared: see the loss above
        items,
        collator(tokenizer),
        scored.evaluate if scored is not None else None,
        lambda folder: tokenizer.save_pretrained(folder),
        write if held_out is not None else None,
        OBJECTIVE,
        notes,
        tokenizer,
    )


def _training_items(
    train: Squad, features: Sequence[Feature], lost: set[int], notes: list[str]
) -> tuple[list[Item], list[Feature]]:
    usable = [q.labelled and i not in lost for i, q in enumerate(train.questions)]
    kept = [feature for feature in features if usable[feature.question]]
    if not kept:
        raise ValueError(f"{train.file}: no question has an answer that stands in its context")
    if lost:
        notes.append(
            f"{train.file}: {len(lost)} of {len(train)} questions left out, their answers do not "
            f"stand in their contexts (the first is {train.questions[min(lost)].id!r})"
        )
    notes.append(f"{sum(usable)} questions in {len(kept)} windows")
    items = [
        {**feature.inputs, "start_positions": feature.start, "end_positions": feature.end}
        for feature in kept
    ]
    return items, kept


# -- the loss -----------------------------------------------------------------------------------


def _means(outputs: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor]:
    padding = inputs["attention_mask"] == 0
    losses = [
        F.cross_entropy(
            outputs[f"{side}_logits"].float().masked_fill(padding, -torch.inf),
            inputs[f"{side}_positions"],
        )
        for side in ("start", "end")
    ]
    return ((losses[0] + losses[1]) / 2,)


OBJECTIVE = Objective(("loss",), lambda inputs: (len(inputs["start_positions"]),), _means)


# -- answers ------------------------------------------------------------------------------------


class _Asked:
    """A file of questions that is answered after every epoch; the last answers are kept."""

    def __init__(
        self, squad: Squad, tokenizer: Any, limit: int, stride: int, answering: dict[str, Any]
    ) -> None:
        self.squad, self.answering, self.collate = squad, answering, collator(tokenizer)
        self.features, _ = make_features(squad.questions, tokenizer, limit, stride)
        self.labelled = any(question.labelled for question in squad.questions)
        self.found: list[Prediction] | None = None

    def predictions(self, model: nn.Module) -> list[Prediction]:
        """Those of the last evaluation, or now."""
        if self.found is None:
            self.answer(model)
        assert self.found is not None
        return self.found

    def answer(self, model: nn.Module) -> list[Prediction]:
        items = [feature.inputs for feature in self.features]
        logits = outputs_of(model, items, self.collate, "start_logits", "end_logits")
        starts, ends = zip(*logits, strict=True)
        self.found = predict(self.squad.questions, self.features, starts, ends, **self.answering)
        return self.found

    def evaluate(self, model: nn.Module) -> Metrics:
        answers = self.answer(model)
        questions = [question for question in self.squad.questions if question.labelled]
        golds = {q.id: [text for text, _ in q.answers] for q in questions}
        found = {q.id: answer.text for q, answer in zip(self.squad.questions, answers, strict=True)}
        return squad_scores(golds, found, self.squad.version)


def write_predictions(
    folder: Path, squad: Squad, found: Sequence[Prediction], answering: Mapping[str, Any]
) -> None:
    """predictions.json (id: text, as SQuAD's scripts take it), nbest_predictions.json, and
    null_odds.json where "no answer" is one.
    """
    ids = [question.id for question in squad.questions]
    files: dict[str, dict[str, Any]] = {
        "predictions": {key: p.text for key, p in zip(ids, found, strict=True)},
        "nbest_predictions": {
            key: [
                {"text": a.text, "probability": a.probability, "score": a.score} for a in p.n_best
            ]
            for key, p in zip(ids, found, strict=True)
        },
    }
    (folder / "null_odds.json").unlink(missing_ok=True)  # of another file's predictions
    if answering["null_allowed"]:
        files["null_odds"] = {key: p.null_odds for key, p in zip(ids, found, strict=True)}
    for name, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
