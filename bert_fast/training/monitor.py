"""What a run tells: a progress line, metrics.csv while it runs; when it is done metrics.json and
predictions.jsonl.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as Remaining
from transformers import TrainerCallback

from ..console import write_whole


def write_metrics(folder: Path, history: Sequence[Mapping[str, Any]], **values: Any) -> Path:
    """Writes metrics.json whole or not at all: `values`, then "history" with a row per log.

    Returns: the file.
    """
    rows = {**values, "history": list(history)}
    return write_whole(folder / "metrics.json", _json(rows, indent=1))


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes predictions.jsonl, a row a line, whole or not at all.

    Returns: the file.
    """
    return write_whole(folder / "predictions.jsonl", "".join(map(_json, rows)))


def _json(value: Any, indent: int | None = None) -> str:
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return f"{text}\n"


def _finite(value: Any) -> Any:
    """JSON has no word for a loss that is not finite: null."""
    if isinstance(value, Mapping):
        return {name: _finite(found) for name, found in value.items()}
    if isinstance(value, list):
        return [_finite(found) for found in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Speed(TrainerCallback):
    """Real tokens per second, and the share of the matmul rate, over this session's steps.

    Time that evaluation and checkpoints take is not counted.
    """

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.seconds = self.tokens_per_second = self.mfu = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens, self.flops = state.num_input_tokens_seen, state.total_flos
        self.restart()

    def restart(self) -> None:
        self.mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - self.mark
        self.mark = now
        self.tokens_per_second = (state.num_input_tokens_seen - self.tokens) / self.seconds
        done = state.total_flos - self.flops  # complete at the latest log
        self.mfu = done / self.seconds / self.peak / max(1, args.world_size)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restart()


class Bar(TrainerCallback):
    """Steps, loss, tokens/s, MFU, time that remains; a few plain lines without a terminal."""

    def __init__(self, speed: Speed) -> None:
        self.speed, self.console = speed, Console(stderr=True, highlight=False, markup=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            Remaining(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.task = self.progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, told=""
            )
            self.progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" not in logs:
            values = [f"{n} {value:.4g}" for n, value in logs.items() if n.startswith("eval_")]
            if values:
                self.console.print(f"step {state.global_step}: {', '.join(values)}", soft_wrap=True)
            return
        told = (
            f"loss {logs['loss']:.4f}  {self.speed.tokens_per_second:.0f} tokens/s  "
            f"MFU {self.speed.mfu:.1%}"
        )
        self.progress.update(self.task, completed=state.global_step, told=told)
        every = max(1, state.max_steps // 20)
        if not self.console.is_terminal and state.global_step % every == 0:
            line = f"step {state.global_step} of {state.max_steps}: {told}"
            self.console.print(line, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


class Csv(TrainerCallback):
    """metrics.csv: a row per log; a resumed run drops the rows after its checkpoint."""

    COLUMNS = (
        *("step", "epoch", "loss", "learning_rate", "grad_norm"),
        *("num_input_tokens_seen", "tokens_per_second"),
    )

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self.file = folder / "metrics.csv"
        self.columns = [*self.COLUMNS, *columns]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.file.open("w", newline="") as opened:
                csv.writer(opened).writerow(self.columns)
            self._append(state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            self._append([{**logs, "step": state.global_step}])

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self.file.open("a", newline="") as opened:
            writer = csv.DictWriter(opened, self.columns, extrasaction="ignore")
            writer.writerows(row for row in rows if "loss" in row)


class Epochs(TrainerCallback):
    """Tells data and sampler which epoch it is; asks for an evaluation at the end of each epoch;
    and sees to it that steps are counted as this run has it, not as the one it resumes.

    Trainer tells them too, but not after it skipped the batches that a resumed run had done.
    """

    def __init__(self, listeners: Sequence[Any], eval_steps: int | None) -> None:
        self.listeners, self.eval_steps = listeners, eval_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run's state is its checkpoint's, with the save_steps of that run.
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Later versions of Trainer and accelerate do so too; earlier ones not for a sampler that
        # is sharded over processes.
        for listener in self.listeners:
            if hasattr(listener, "set_epoch"):
                listener.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # With the last step, not after it: a checkpoint of that step has the evaluation in it.
        last = state.global_step >= state.max_steps or state.epoch == int(state.epoch)
        if last or (self.eval_steps and state.global_step % self.eval_steps == 0):
            control.should_evaluate = True
