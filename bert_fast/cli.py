"""The command line: `bert-fast embed`, `verify`, `explain`, `doctor`, `bench`, and training.

torch and transformers are imported inside the commands, so that `--help` answers at once. What a
user can get wrong is one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import (
    check_choice,
    check_model,
    check_output,
    console,
    load_tokenizer,
    load_weights,
    log,
    one_line_errors,
    whole,
    write_whole,
)
from .training import commands as training
from .training.finetune_command import finetune
from .training.text import TABLES, read_lines, text_of

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import nn

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NARROW = {"int8": "float32", "fp8": "bfloat16"}  # of products; and what all else is in
MODES = {**DTYPES, **NARROW}
ModelDtype = Annotated[
    str, typer.Option(help="fp32, bf16, fp16; products in 8 bits: int8, or fp8 on a GPU.")
]
DEVICES = ("auto", "cpu", "cuda")
POOLINGS = ("mean", "cls")
BATCH_TOKENS = 16_384
# Names of files whose lines are no texts.
NOT_TEXT = (*TABLES, ".csv", ".gz")
SAMPLE_TEXTS = (
    "A short text.",
    "A text that is a little longer than the first.",
    "The weather is lovely today, and nobody knows how long it will stay so.",
    "No.",
)

app = typer.Typer(
    help="A Hugging Face BERT with the same answers, faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False):
    if version:
        from . import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def embed(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="Text or .jsonl file, - for stdin")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npy file to write.")],
    model: Annotated[Path, typer.Option(help="Folder with config.json, weights and tokenizer.")],
    dtype: ModelDtype = "fp32",
    batch_tokens: Annotated[int, typer.Option(help="Tokens per batch.")] = BATCH_TOKENS,
    pooling: Annotated[
        str | None, typer.Option(help="mean or cls; unless given, the model's own, else mean.")
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(help="Unit length; unless given, the model's own, else yes."),
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="The field of JSON lines; given, INPUT is JSON lines.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens kept of a text; unless given, the model's own.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, or one backend for every op.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """One embedding per line of INPUT, written as a float32 array (lines x hidden).

    INPUT is UTF-8 text, one text a line, or JSON lines where its name ends in .jsonl. A blank line
    gives the embedding of the empty text. A sentence-transformers folder says how to pool.
    """
    with one_line_errors():
        check_choice("dtype", dtype, MODES)
        check_choice("device", device, DEVICES)
        check_choice("pooling", pooling or "mean", POOLINGS)
        check_output(output, source)
        check_model(model)
        texts = read_texts(source, field_of(source, text_field))

        from .convert import accelerate
        from .encode import embed_tokens, token_limit, tokenize, truncation_note
        from .sentence import sentence_settings

        own = sentence_settings(model)
        if own.lower:
            texts = [text.lower() for text in texts]
        if own.prompt:
            log.print(f"bert-fast: warning: its prompt {own.prompt!r} is not put before the texts")
        bert, tokenizer = load(model, dtype, device)
        if dtype in NARROW:
            accelerate(bert, dtype=dtype)
        limit = token_limit(bert, tokenizer, max_length, own.max_length)
        start = time.perf_counter()
        with log.status("tokenising"):
            tokens = tokenize(tokenizer, texts, limit)
        if tokens.truncated:
            log.print(f"bert-fast: warning: {truncation_note(tokens, limit)}")
        with progress_bar() as bar:
            task = bar.add_task("embedding", total=len(texts), tokens=0)
            vectors = embed_tokens(
                bert,
                tokens,
                batch_tokens=batch_tokens,
                pooling=pooling or own.pooling or "mean",
                normalize=own.normalize is not False if normalize is None else normalize,
                backend=backend,
                progress=lambda n, t: bar.update(
                    task, advance=n, tokens=bar.tasks[task].fields["tokens"] + t
                ),
            )
        vectors = vectors[:, : own.dimensions]
        save(output, vectors)
        seconds = time.perf_counter() - start
        log.print(
            f"{len(texts)} texts, {len(tokens.ids)} tokens in {seconds:.1f} s "
            f"({len(texts) / seconds:.0f} texts/s, {len(tokens.ids) / seconds:.0f} tokens/s); "
            f"{output}: float32 {list(vectors.shape)}",
        )


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(help="Folder with config.json, weights and tokenizer.")],
    texts: Annotated[
        Path | None, typer.Option(help="Text or .jsonl file; its first 32 texts are taken.")
    ] = None,
    dtype: ModelDtype = "fp32",
    backend: Annotated[str, typer.Option(help="auto, or one backend for every op.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    gradients: Annotated[bool, typer.Option(help="Compare gradients too.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here.")
    ] = None,
) -> None:
    """Whether this model through bert_fast is as exact as through transformers, against fp64.

    Exit code 1 where an error is over twice that of transformers in the same dtype (three times
    for gradients), or where bert_fast's own forward does not run; in int8 and fp8, where the cosine
    to the truth is below 0.998 for a text or 0.98 for a token, or where they do not run.
    """
    with one_line_errors():
        check_choice("dtype", dtype, MODES)
        check_choice("device", device, DEVICES)
        check_model(model)
        if json_file:
            check_output(json_file, str(texts or ""))
        chosen = list(SAMPLE_TEXTS)
        if texts:
            given = read_texts(str(texts), field_of(str(texts)))
            chosen = [text for text in given if text.strip()][:32]
        bert, tokenizer = load(model, dtype, device)
        from .verification import verify as compare

        narrow = dtype if dtype in NARROW else None
        found = compare(bert, chosen, tokenizer, backend, gradients, narrow)
        print(found)
        if json_file:
            write_whole(json_file, json.dumps(found.to_json(), indent=1) + "\n")
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def doctor(
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """What this machine has, which kernel runs for each op, and why the others do not."""
    from rich.table import Table

    with one_line_errors():
        check_choice("dtype", dtype, DTYPES)
        import torch

        from . import doctor as report

        found = report.choices(getattr(torch, DTYPES[dtype]))
        facts = Table(show_header=False, box=None)
        for name, value in {**report.versions(), **report.machine()}.items():
            facts.add_row(name, value)
        console.print(facts)

        kernels = Table(title=f"kernels for inference in {dtype}")
        for column in ("op", "on a CPU", "would also run", "on a GPU", "would also run"):
            kernels.add_column(column, overflow="fold")
        for cpu, gpu in zip(found[::2], found[1::2], strict=True):
            cells = [cpu.op]
            for choice in (cpu, gpu):
                willing = [name for name, why in choice.reasons.items() if not why]
                cells += [willing[0], ", ".join(willing[1:])]
            kernels.add_row(*cells)
        console.print(kernels)

        reasons = Table(title="why the others would not run")
        for column in ("on", "backends", "reason", "ops"):
            reasons.add_column(column)
        for (where, reason), (names, op_names) in report.grouped(found).items():
            every = len(op_names) == len(found) // 2
            told = "all" if every else ", ".join(op_names)
            reasons.add_row(where, ", ".join(names), reason, told)
        console.print(reasons)
        for line in report.advice() or ["Nothing is missing for this machine."]:
            console.print(line)


@app.command()
def explain(
    model: Annotated[Path, typer.Argument(help="Folder with config.json, weights and tokenizer.")],
    dtype: ModelDtype = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Which kernels this model runs on a few short texts, after `bert_fast.accelerate`."""
    with one_line_errors():
        check_choice("dtype", dtype, MODES)
        check_choice("device", device, DEVICES)
        check_model(model)
        bert, tokenizer = load(model, dtype, device)
        import torch

        import bert_fast

        batch = tokenizer(list(SAMPLE_TEXTS), padding=True, return_tensors="pt").to(bert.device)
        with torch.inference_mode():
            bert_fast.accelerate(bert, dtype=dtype if dtype in NARROW else None)
            print(bert_fast.explain(bert, batch))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Times bert_fast against its peers on this machine (from a checkout; --help tells more)."""
    with one_line_errors():
        root = Path(__file__).resolve().parents[1]
        if not (root / "bench" / "run.py").is_file():
            raise ValueError(
                "the bench is not installed with the package: install its checkout with pip's -e"
            )
    # The bench imports this package, never the other way round. It takes this process's place, so
    # that what ends the command ends it.
    where = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    line = [sys.executable, "-m", "bench.run", *context.args]
    os.execve(sys.executable, line, {**os.environ, "PYTHONPATH": where})


def field_of(source: str, asked: str | None = None) -> str | None:
    """The field of JSON lines, None for text, by the file's name unless a field is asked for."""
    suffix = Path(source).suffix.lower()
    if asked is None and suffix in NOT_TEXT:
        raise ValueError(f"{source}: {suffix} is not read: expected text or JSON lines (.jsonl)")
    return asked or ("text" if suffix == ".jsonl" else None)


def read_texts(source: str, field: str | None) -> list[str]:
    """One text per line of a file, or of stdin for "-"; of JSON lines, the value of `field`.

    Raises: ValueError with the line's number, for a line that is not UTF-8 or not what JSON lines
        with this field are; OSError for a file that cannot be read.
    """
    file = None if source == "-" else Path(source)
    name, lines = file or "stdin", read_lines(file)
    if field is None:
        return lines
    return [
        text_of(line, field, f"{name}, line {number}") if line.strip() else line
        for number, line in enumerate(lines, 1)
    ]


def load(folder: Path, dtype: str, device: str) -> tuple[nn.Module, Any]:
    """The model in evaluation mode and its tokenizer; ValueError where the folder has none."""
    import torch
    import transformers

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtypes = {"dtype": getattr(torch, MODES[dtype])}
    model = load_weights(transformers.AutoModel, folder, **dtypes)
    tokenizer = load_tokenizer(transformers.AutoTokenizer, folder, model.config)
    return model.eval().to(device), tokenizer


def progress_bar() -> Progress:
    """Texts done, with texts/s and tokens/s; silent where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            seconds = max(task.elapsed or 0.0, 1e-9)
            tokens = task.fields["tokens"] / seconds
            return Text(f"{task.completed / seconds:.0f} texts/s, {tokens:.0f} tokens/s")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Speed(),
        Remaining(),
        console=log,
        disable=not log.is_terminal,
    )


def save(file: Path, array: Any) -> None:
    """Writes a .npy file whole or not at all."""
    import numpy as np

    with whole(file) as part, part.open("wb") as opened:
        np.save(opened, array)


app.command()(training.pretrain)
app.command()(training.train_tokenizer)
app.command()(finetune)

if __name__ == "__main__":
    app()
