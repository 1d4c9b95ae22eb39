"""`bert-fast pretrain` and `bert-fast train-tokenizer`; torch is imported inside them."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import check_model, log, one_line_errors

Texts = Annotated[
    list[str],
    typer.Argument(
        metavar="TEXT...",
        help="Files or patterns: text with a blank line between documents, .csv, .jsonl; also .gz",
    ),
]
TextField = Annotated[str, typer.Option(help="The field of .csv and .jsonl files.")]


def pretrain(
    texts: Texts,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a tokenizer; unless given, one is learnt.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens of a tokenizer that is learnt.")] = 30_522,
    layers: Annotated[int, typer.Option(help="Layers of a new model.")] = 12,
    hidden: Annotated[int, typer.Option(help="Width of a new model.")] = 768,
    heads: Annotated[int, typer.Option(help="Attention heads of a new model.")] = 12,
    intermediate: Annotated[
        int | None, typer.Option(help="Inner width of a new model; unless given, 4 x hidden.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Dropout of a new model.")] = 0.1,
    config: Annotated[
        Path | None, typer.Option(help="A config.json to start from, instead of sizes.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a model to go on from, instead of sizes.")
    ] = None,
    start: Annotated[
        str, typer.Option(help="Of a new model: bert, or mimetic: sees context far sooner.")
    ] = "bert",
    max_length: Annotated[int, typer.Option(help="Tokens of a pair of texts.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Pairs per batch and process.")] = 256,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Real tokens per batch and process, instead.")
    ] = None,
    accumulation: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    epochs: Annotated[int, typer.Option(help="Passes over the text.")] = 40,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead.")] = None,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-4,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which it rises; steps if >= 1.")
    ] = 0.01,
    weight_decay: Annotated[float, typer.Option(help="Of weight matrices and tables.")] = 0.01,
    optimizer: Annotated[str, typer.Option(help="adamw, or lamb for large batches.")] = "adamw",
    dtype: Annotated[str, typer.Option(help="fp32, or bf16: autocast.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of weights, data order, masks and dropout.")] = 0,
    whole_word: Annotated[bool, typer.Option(help="Mask all pieces of a word or none.")] = False,
    mlm_probability: Annotated[float, typer.Option(help="Share of the tokens to predict.")] = 0.15,
    validation_fraction: Annotated[float, typer.Option(help="Documents held back.")] = 0.05,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; else none is kept.")
    ] = None,
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps between evaluations; always after an epoch.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's last checkpoint, if any.")
    ] = False,
    text_field: TextField = "text",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Masked LM and next-sentence prediction from text, by BERT's own recipe.

    Writes a checkpoint that transformers loads as BertForPreTraining, its tokenizer, metrics.csv
    and metrics.json. With --save-steps, a run that was killed goes on by --resume,
    with the very same losses.
    """
    with one_line_errors():
        need_accelerate()
        for folder in filter(None, (model, tokenizer)):
            if not folder.is_dir():
                raise ValueError(f"no folder {folder}")
        if model:
            check_model(model)
        if config and not config.is_file():
            raise ValueError(f"no file {config}")

        from .loop import Settings
        from .pretrain import Recipe
        from .pretrain import pretrain as run

        recipe = Recipe(
            texts, text_field, tokenizer, vocab_size, model, config, layers, hidden, heads,
            intermediate, dropout, max_length, whole_word, mlm_probability,
            validation_fraction, start,
        )  # fmt: skip
        settings = Settings(
            output, epochs=epochs, max_steps=steps, lr=lr, warmup=warmup, batch_size=batch_size,
            weight_decay=weight_decay, batch_tokens=batch_tokens, accumulation=accumulation,
            seed=seed, dtype=dtype, optimizer=optimizer, save_steps=save_steps,
            eval_steps=eval_steps, resume=resume, device=device,
        )  # fmt: skip
        tell(output, run(recipe, settings))


def train_tokenizer(
    texts: Texts,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, special ones included.")] = 30_522,
    lowercase: Annotated[bool, typer.Option(help="Lowercase and drop accents.")] = True,
    text_field: TextField = "text",
) -> None:
    """Learns a WordPiece vocabulary from text; AutoTokenizer loads the folder."""
    with one_line_errors():
        from .text import find_files, read_documents
        from .tokenizer import train_tokenizer as learn

        if (output / "config.json").exists():
            raise ValueError(
                f"{output} holds a model, which would have another's vocabulary: choose another "
                "output folder"
            )
        documents = functools.partial(read_documents, find_files(texts), text_field)
        output.mkdir(parents=True, exist_ok=True)  # transformers only logs that it is a file
        learnt = learn(documents, vocab_size, lowercase)
        learnt.save_pretrained(output)
        log.print(f"{len(learnt)} tokens; {output}")


def need_accelerate() -> None:
    """Raises: ValueError where the package that transformers' Trainer runs on is missing."""
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("pretrain and finetune need accelerate (pip install accelerate)")


def tell(output: Path, metrics: dict[str, Any]) -> None:
    """One line with the metrics, on stderr, from the main process."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    told = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    log.print(f"{told}; {output}")
