"""Pre-training from text: masked LM and next-sentence prediction, by BERT's own recipe.

Devlin et al., arXiv 1810.04805, section 3.1 and appendix A.2.
"""

from __future__ import annotations

import functools
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertForPreTraining

from .. import accelerate
from ..console import load_tokenizer, load_weights, vocabulary_size
from ..ops.masked_lm_loss import IGNORED
from .checkpoints import checkpoints_of, numbered
from .corpus import load_corpus, remove_parts
from .items import Collate, collator
from .loop import Objective, Settings, train
from .masking import SHARE, Masking
from .mimetic import start_mimetic
from .monitor import write_metrics
from .pairs import LEAST, SPECIALS, SentencePairs
from .text import find_files, read_documents
from .tokenizer import train_tokenizer

EVALUATED = 2_048  # pairs of held-back text, at most
FOREIGN = 0.4  # share of pairs with a foreign B, below which the user is told
POSITIONS = 512  # of a new model, at least
# How long processes wait for the main one to read the text: torch's own 10 minutes would end a run
# on a large corpus.
PATIENCE = timedelta(days=2)
STARTS = ("bert", "mimetic")


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what.

    sources: files and patterns; text_field: of .csv and .jsonl files.
    tokenizer: a folder; None: that of `model`, or a new one of `vocab_size` tokens.
    model: a folder with weights to go on from; config: a config.json to start from; neither: a
        new BERT of the sizes below.
    start: first values of a new model: "bert" (normal ones) or "mimetic" (see mimetic.py).
    max_length: tokens of a pair, specials included.
    mlm_probability: share of the tokens to predict. What is held back is measured at BERT's 0.15,
        whatever this is, so that runs compare.
    validation_fraction: of the documents, held back; 0 for none.

    Raises: ValueError for values out of range.
    """

    sources: Sequence[str | Path]
    text_field: str = "text"
    tokenizer: Path | None = None
    vocab_size: int = 30_522
    model: Path | None = None
    config: Path | None = None
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    intermediate: int | None = None
    dropout: float = 0.1
    max_length: int = 128
    whole_words: bool = False
    mlm_probability: float = SHARE
    validation_fraction: float = 0.05
    start: str = "bert"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"start is {self.start!r}, expected one of {', '.join(STARTS)}")
        if self.model and self.start != "bert":
            raise ValueError(f"start {self.start!r} is for a new model, but a trained one is given")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}, expected 0 or more, below 1"
            )
        if not 0 < self.mlm_probability < 1:
            raise ValueError(
                f"mlm_probability is {self.mlm_probability}, expected more than 0, below 1"
            )
        if self.max_length < SPECIALS + LEAST:
            raise ValueError(
                f"max_length is {self.max_length}, expected {SPECIALS + LEAST} or more"
            )
        for name in ("layers", "hidden", "heads", "vocab_size", "intermediate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        if not (self.model or self.config) and self.hidden % self.heads:
            raise ValueError(
                f"hidden {self.hidden} is no multiple of heads {self.heads}: every head takes an "
                "equal part"
            )

    # What may change between a run and its resumption: where things lie.
    PLACES = ("sources", "tokenizer", "model", "config")

    def to_json(self) -> dict[str, Any]:
        """What a resumed run has to agree with."""
        return {name: value for name, value in asdict(self).items() if name not in self.PLACES}


def pretrain(recipe: Recipe, settings: Settings) -> dict[str, float]:
    """Trains and saves a BertForPreTraining with its tokenizer to `settings.output_dir`.

    metrics.json there gets mlm_loss, mlm_accuracy, nsp_loss and nsp_accuracy on the documents
    held back, tokens_per_second, and the history of losses.

    Returns: these metrics, without the history.
    Raises: ValueError and OSError for what the user can get wrong.
    """
    prepared = prepare(recipe, settings)
    accelerate(prepared.model, sparse_logits=True)
    held, collate = prepared.held, prepared.collate
    history = train(
        prepared.model,
        prepared.pairs,
        settings,
        collate,
        lengths=prepared.pairs.lengths,
        evaluate=None if held is None else lambda model: evaluate(model, held, collate),
        objective=OBJECTIVE,
        about=recipe.to_json() | {"text and tokenizer": prepared.pairs.corpus.fingerprint},
        tokenizer=prepared.tokenizer,
    )
    speed = next(row["tokens_per_second"] for row in reversed(history) if "loss" in row)
    values = {name[5:]: v for name, v in history[-1].items() if name.startswith("eval_")}
    metrics = {**values, "tokens_per_second": speed}
    if PartialState().is_main_process:
        prepared.tokenizer.save_pretrained(settings.output_dir)
        write_metrics(settings.output_dir, history, **metrics)
    return metrics


class Prepared(NamedTuple):
    """What is trained, and on what; held: pairs of the documents held back, or None."""

    tokenizer: Any
    model: Any
    pairs: SentencePairs
    held: SentencePairs | None
    collate: Collate


@contextmanager
def main_first(processes: PartialState) -> Iterator[None]:
    """The main process alone; then the others, which find what it has done."""
    if processes.num_processes == 1:
        yield
        return
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    if not processes.is_main_process:
        torch.distributed.barrier(group)
    yield
    if processes.is_main_process:
        torch.distributed.barrier(group)
    torch.distributed.destroy_process_group(group)


def prepare(recipe: Recipe, settings: Settings) -> Prepared:
    """Reads the text, learns or loads the tokenizer, makes the model: transformers' own."""
    files = find_files(recipe.sources)
    # A run that is refused must not write over the other's tokenizer.
    checkpoints_of(settings.output_dir, settings.resume)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    processes = PartialState(cpu=settings.on_cpu)
    with main_first(processes):
        if processes.is_main_process:
            remove_parts(settings.output_dir / "corpus")
        tokenizer = _tokenizer(recipe, files, settings)
        corpus = load_corpus(files, tokenizer, settings.output_dir / "corpus", recipe.text_field)
    model = new_model(recipe, tokenizer, settings.seed)
    # What it says a model takes may be less than this one has positions for, or more.
    most = max(tokenizer.model_max_length, recipe.max_length)
    tokenizer.model_max_length = min(most, model.config.max_position_embeddings)
    kept, held = corpus.split(recipe.validation_fraction, settings.seed)

    def pairs(documents: np.ndarray, share: float) -> SentencePairs:
        length, seed = recipe.max_length, settings.seed
        masking = Masking.of(tokenizer, recipe.whole_words, share)
        return SentencePairs(corpus, documents, tokenizer, masking, length, seed)

    trained = pairs(kept, recipe.mlm_probability)
    others = pairs(held, SHARE) if len(held) else None
    for found, what in ((trained, "to train on"), (others, "held back")):
        if found is not None and not found.any_maskable():
            raise ValueError(f"the tokenizer knows no token of the documents {what}")
    if processes.is_main_process:
        _tell(len(corpus.documents) - 1, len(kept) + len(held), trained)
    return Prepared(tokenizer, model, trained, others, collator(tokenizer))


def _tell(documents: int, used: int, pairs: SentencePairs) -> None:
    """Warns of text that trains less than it seems to."""
    told = []
    if used < documents:
        told.append(
            f"{documents - used} of {documents} documents are left out: they have one sentence, "
            "and a pair needs two"
        )
    foreign = pairs.plan(0).foreign.mean()
    if foreign < FOREIGN:
        told.append(
            f"in {foreign:.0%} of the pairs the second is of another document, half is BERT's "
            "recipe: a few documents hold most of the text"
        )
    for what in told:
        warnings.warn(f"bert_fast: {what}", stacklevel=2)


def new_model(recipe: Recipe, tokenizer: Any, seed: int) -> Any:
    """transformers' BertForPreTraining as the recipe has it; random weights are from the seed.

    Raises: ValueError where tokenizer or length do not fit it.
    """
    torch.manual_seed(seed)
    needed = vocabulary_size(tokenizer)
    if recipe.model:
        model = load_weights(BertForPreTraining, Path(recipe.model), dtype="float32")
    elif recipe.config:
        kind = BertConfig.get_config_dict(recipe.config)[0].get("model_type", "bert")
        if kind != "bert":
            raise ValueError(f"{recipe.config} is the config of a {kind!r}, expected a BERT's")
        model = BertForPreTraining(BertConfig.from_pretrained(recipe.config))
    else:
        model = BertForPreTraining(
            BertConfig(
                vocab_size=needed,
                hidden_size=recipe.hidden,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                intermediate_size=recipe.intermediate or 4 * recipe.hidden,
                max_position_embeddings=max(POSITIONS, recipe.max_length),
                hidden_dropout_prob=recipe.dropout,
                attention_probs_dropout_prob=recipe.dropout,
                # BERT's 0.02 at its width, and as 1 / sqrt(width) at others.
                initializer_range=round(0.02 * (768 / recipe.hidden) ** 0.5, 4),
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    if recipe.start == "mimetic":
        start_mimetic(model, tokenizer.mask_token_id)
    positions, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if recipe.max_length > positions:
        raise ValueError(
            f"max_length is {recipe.max_length}, but the model has {positions} positions"
        )
    if needed > vocabulary:
        raise ValueError(
            f"the tokenizer has {needed} tokens, but the model's vocabulary {vocabulary}"
        )
    return model


def _counts(inputs: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    return (inputs["labels"] != IGNORED).sum(), len(inputs["labels"])


def _means(outputs: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The model's loss is the sum of two means; the second is cheap to compute once more."""
    logits = outputs["seq_relationship_logits"].float()
    next_sentence = F.cross_entropy(logits, inputs["next_sentence_label"])
    return outputs["loss"] - next_sentence, next_sentence


# Over the masked tokens, and over the pairs.
OBJECTIVE = Objective(("mlm_loss", "nsp_loss"), _counts, _means)


def evaluate(model: nn.Module, pairs: SentencePairs, collate: Collate) -> dict[str, float]:
    """Losses and accuracies on the first pairs of epoch 0, in evaluation mode.

    model: a BertForPreTraining. Its head runs on the masked tokens only.
    """
    sums = dict.fromkeys(("mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy"), 0.0)
    masked = 0
    # In random order: neighbours overlap, and the first are of the first documents.
    order = np.random.default_rng(0).permutation(len(pairs))[:EVALUATED]
    for chunk in np.array_split(order, -(-len(order) // 64)):
        batch = {name: t.to(model.device) for name, t in collate([pairs[i] for i in chunk]).items()}
        labels, answers = batch.pop("labels"), batch.pop("next_sentence_label")
        outputs = model.bert(**batch)
        chosen = labels != IGNORED
        words, answer = model.cls(outputs.last_hidden_state[chosen], outputs.pooler_output)
        for task, logits, truth in (("mlm", words, labels[chosen]), ("nsp", answer, answers)):
            sums[f"{task}_loss"] += F.cross_entropy(logits.float(), truth, reduction="sum").item()
            sums[f"{task}_accuracy"] += (logits.argmax(-1) == truth).sum().item()
        masked += int(chosen.sum())
    items = {"mlm": masked or math.nan, "nsp": len(order)}
    return {name: value / items[name[:3]] for name, value in sums.items()}


def _tokenizer(recipe: Recipe, files: Sequence[Path], settings: Settings) -> Any:
    folder = recipe.tokenizer or recipe.model
    made = settings.output_dir / "tokenizer"
    # That of the run that goes on, or what the main process has just made.
    reused = bool(numbered(settings.output_dir)) or not PartialState().is_main_process
    if folder is None and reused and made.is_dir():
        folder = made
    if folder is not None:
        return load_tokenizer(AutoTokenizer, Path(folder))
    texts = functools.partial(read_documents, files, recipe.text_field)
    tokenizer = train_tokenizer(texts, recipe.vocab_size, max_length=POSITIONS)
    part = made.with_suffix(".part")
    tokenizer.save_pretrained(part)
    shutil.rmtree(made, ignore_errors=True)
    part.replace(made)  # at once: a killed run leaves no half of it to resume with
    return tokenizer
