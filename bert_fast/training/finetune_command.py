"""`bert-fast finetune`: its options, checked before torch and transformers are imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from ..console import check_choice, check_model, log, one_line_errors
from .commands import need_accelerate

TASKS = ("classification", "pairs", "spans", "tokens", "embedding")


def finetune(
    task: Annotated[str, Option(help=", ".join(TASKS) + ".")],
    model: Annotated[Path, Option(help="Folder with config.json, weights and tokenizer.")],
    output: Annotated[
        Path, Option(help="Folder for the trained model, its metrics and its predictions.")
    ],
    train: Annotated[
        Path | None,
        Option(help="CSV, TSV, JSON(L), Parquet; SQuAD JSON; CoNLL. Without, nothing is trained."),
    ] = None,
    validation: Annotated[
        Path | None, Option(help="The same; evaluated on after every epoch, or once.")
    ] = None,
    predict: Annotated[
        Path | None,
        Option(help="The same, labels or not; into predictions.jsonl (spans: predictions.json)."),
    ] = None,
    epochs: Annotated[int, Option(help="Passes over the training data.")] = 3,
    max_steps: Annotated[
        int | None, Option(help="Optimizer steps; given, epochs do not count.")
    ] = None,
    lr: Annotated[float, Option(help="Highest learning rate.")] = 5e-5,
    warmup: Annotated[float, Option(help="Share of the steps (1 and more: steps).")] = 0.1,
    weight_decay: Annotated[float, Option(help="AdamW's.")] = 0.01,
    batch_size: Annotated[int, Option(help="Examples per batch.")] = 32,
    batch_tokens: Annotated[
        int | None, Option(help="Real tokens per batch; given, --batch-size does not count.")
    ] = None,
    accumulation: Annotated[int, Option(help="Batches per optimizer step.")] = 1,
    max_length: Annotated[
        int | None,
        Option(help="Tokens kept of a text or window; else the model's (spans: 384)."),
    ] = None,
    doc_stride: Annotated[
        int | None, Option(help="Tokens that windows share (spans); else a third of a window.")
    ] = None,
    null_threshold: Annotated[
        float, Option(help="How far 'no answer' has to be ahead of the best answer (spans).")
    ] = 0.0,
    text_column: Annotated[str | None, Option(help="Else text, or as in GLUE; tokens.")] = None,
    text_b_column: Annotated[
        str | None,
        Option(help="Else text_b, or as in GLUE; with --text-column alone none, but for pairs."),
    ] = None,
    label_column: Annotated[str | None, Option(help="Else label, or as in GLUE; labels.")] = None,
    regression: Annotated[
        bool | None, Option(help="Labels are scores; unless given, where some are no integers.")
    ] = None,
    seed: Annotated[int, Option(help="Of new weights, dropout and the order of the data.")] = 0,
    dtype: Annotated[str, Option(help="fp32, or bf16 (autocast; weights stay fp32).")] = "fp32",
    device: Annotated[str, Option(help="auto, cpu or cuda.")] = "auto",
    save_steps: Annotated[int | None, Option(help="Steps between checkpoints; else none.")] = None,
    resume: Annotated[bool, Option(help="Go on from --output's last checkpoint, if any.")] = False,
    accelerate: Annotated[
        bool, Option(help="Without: transformers' own forward, to compare with.")
    ] = True,
) -> None:
    """Trains a checkpoint for a task: text and label in, a checkpoint for transformers out.

    --output gets model.safetensors, config.json, the tokenizer, metrics.json (accuracy; exact_match
    and f1 in percent for spans; the history of the loss) and metrics.csv, one row per step. Without
    --train the model is evaluated, or predicts, as it is: one that was trained before.
    """
    with one_line_errors():
        need_accelerate()
        check_choice("task", task, TASKS)
        check_model(model)
        if output.exists() and not output.is_dir():
            raise ValueError(f"{output} is a file, expected a folder")
        from .finetune import finetune as run
        from .loop import Settings
        from .readers import Columns
        from .tasks import Job

        settings = Settings(
            output_dir=output,
            epochs=epochs,
            max_steps=max_steps,
            lr=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            accumulation=accumulation,
            seed=seed,
            dtype=dtype,
            save_steps=save_steps,
            resume=resume,
            device=device,
        )
        job = Job(
            task=task,
            model=model,
            settings=settings,
            train=train,
            validation=validation,
            predict=predict,
            columns=Columns(text_column, text_b_column, label_column),
            max_length=max_length,
            doc_stride=doc_stride,
            regression=regression,
            null_threshold=null_threshold,
            accelerate=accelerate,
        )
        run(job, told=log.print)
