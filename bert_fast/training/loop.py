"""The training loop of every command: transformers' Trainer, with exact resume and exact means.

    history = train(model, dataset, Settings(output_dir, epochs=3), collate)

What is ours: batches of equal token counts (`batches`), a loss whose means are those of the whole
global batch, however it is split into micro-batches and processes, and a resume that goes on with
the very losses of a run that was never stopped. Processes and sharding are accelerate's: start the
command with `torchrun` or `accelerate launch`.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.integrations import is_tensorboard_available

from ..console import check_choice, write_whole
from ..ops.masked_lm_loss import IGNORED
from .batches import BalancedBatches
from .checkpoints import Checkpoints, done, last_checkpoint
from .lamb import Lamb
from .monitor import Bar, Csv, Epochs, Speed
from .throughput import gemm_peak, training_flops

OPTIMIZERS = ("adamw", "lamb")
DTYPES = ("fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    """How to train.

    output_dir: gets checkpoints, metrics.csv and the trained model.
    epochs: passes over the data; max_steps: optimizer steps, which then count instead.
    warmup: share of all steps in which the rate rises linearly (a number of steps if >= 1); it
        falls linearly to 0 after them.
    batch_size: texts of a batch, of one process; batch_tokens: real tokens, which then count.
    accumulation: batches per optimizer step.
    dtype: "fp32", or "bf16": autocast, with weights and optimizer in fp32.
    save_steps: steps between checkpoints (None: none); eval_steps: steps between evaluations
        (there is always one at the end of an epoch).
    resume: go on from the last whole checkpoint in output_dir, or start where there is none.

    Raises: ValueError for values out of range.
    """

    output_dir: Path
    epochs: int = 1
    max_steps: int | None = None
    lr: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    batch_size: int = 32
    batch_tokens: int | None = None
    accumulation: int = 1
    seed: int = 0
    dtype: str = "fp32"
    optimizer: str = "adamw"
    save_steps: int | None = None
    eval_steps: int | None = None
    resume: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "batch_size", "batch_tokens", "accumulation", "lr",
                     "save_steps", "eval_steps"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, expected a positive number")
        for name in ("warmup", "weight_decay", "seed"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, expected 0 or more")
        choices = (("dtype", DTYPES), ("optimizer", OPTIMIZERS), ("device", DEVICES))
        for name, allowed in choices:
            check_choice(name, getattr(self, name), allowed)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no GPU here")

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu" or not torch.cuda.is_available()

    # What may change between a run and its resumption without changing a single loss.
    FREE = ("output_dir", "save_steps", "resume")

    def to_json(self) -> dict[str, Any]:
        """What a resumed run has to agree with."""
        return {name: value for name, value in asdict(self).items() if name not in self.FREE}


class Objective(NamedTuple):
    """A loss as a sum of means: how many items each is over, and their values in one batch.

    names: of the means, logged beside the loss where there are several.
    counts(inputs): items of each mean in this batch (numbers, or tensors of one).
    means(outputs, inputs): the scalar means, in the same order.
    """

    names: tuple[str, ...]
    counts: Callable[[Mapping[str, Any]], Sequence[int | Tensor]]
    means: Callable[[Any, Mapping[str, Any]], Sequence[Tensor]]


def _labelled(inputs: Mapping[str, Any]) -> tuple[int | Tensor]:
    labels = inputs.get("labels")
    if labels is None:
        return (len(next(iter(inputs.values()))),)
    return (labels.numel() if labels.is_floating_point() else (labels != IGNORED).sum(),)


# The model's own loss, a mean over its labels (over the texts where there are no `labels`).
MODEL_LOSS = Objective(
    ("loss",),
    _labelled,
    lambda outputs, inputs: (outputs["loss"] if isinstance(outputs, dict) else outputs[0],),
)


def train(
    model: nn.Module,
    dataset: Any,
    settings: Settings,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    *,
    lengths: Callable[[int], np.ndarray] | Sequence[int] | np.ndarray | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    objective: Objective = MODEL_LOSS,
    about: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> list[dict[str, float]]:
    """Trains `model` in place and saves it to `settings.output_dir`.

    Args:
        model: a transformers model with a head; accelerated or not.
        dataset: map-style, with a length; its `set_epoch(epoch)`, where it has one, is called
            before every epoch. Items have to be functions of (epoch, index) alone, so that a
            resumed run sees the same ones.
        collate: makes a list of items the model's keyword arguments, padded, with attention_mask.
        lengths: tokens of every item, or a function of the epoch that gives them; needed for
            `settings.batch_tokens`.
        evaluate: called on the model, in evaluation mode and without gradients, after each epoch;
            what it returns is logged with `eval_` before the names.
        objective: how the loss is made of means; by default the model's own, over its labels.
        about: what else a resumed run has to agree with, by name: plain values.
        tokenizer: the model's, which every checkpoint gets too.

    Returns: one dict per step (step, epoch, loss, learning_rate, grad_norm, tokens_per_second,
        num_input_tokens_seen) and per evaluation (step, epoch, eval_*); of a resumed run all.
    Raises: ValueError for data that the settings do not fit, for an output_dir with checkpoints
        unless `resume`, and for a resumed run with other settings, data or processes.
    """
    if settings.batch_tokens and lengths is None:
        raise ValueError("batch_tokens is given, but the lengths of the examples are not")
    if not len(dataset):
        raise ValueError("there are no training examples")
    arguments = _arguments(settings)
    agreed = {
        **settings.to_json(),
        **(about or {}),
        "examples": len(dataset),
        "tokens": int(_costs(dataset, lengths)(0).sum()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "processes": arguments.world_size,
    }
    checkpoint = last_checkpoint(
        settings.output_dir, settings.resume, json.loads(json.dumps(agreed))
    )
    if settings.resume and checkpoint is None and arguments.should_save:
        warnings.warn(
            f"bert_fast: {settings.output_dir} holds no checkpoint to resume: starting at step 1",
            stacklevel=2,
        )
    trainer = _Trainer(model, arguments, dataset, settings, collate, lengths, evaluate, objective)
    trainer.add_callback(Checkpoints(settings.output_dir, tokenizer))
    if arguments.should_save:
        write_whole(settings.output_dir / "settings.json", json.dumps(agreed) + "\n")
    if checkpoint and done(checkpoint):  # Trainer would take one more step
        trainer.load(checkpoint)
    else:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:  # Trainer tells the bar of no other end than a good one; it hides the cursor
            trainer.bar.progress.stop()
    trainer.save_model(str(settings.output_dir))
    return [row for row in trainer.state.log_history if "train_runtime" not in row]


class _Trainer(Trainer):
    """Trainer with balanced batches, exact global means, and an evaluation that is a function."""

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        dataset: Any,
        settings: Settings,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        lengths: Any,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
        objective: Objective,
    ) -> None:
        lamb = (Lamb, {"lr": settings.lr}) if settings.optimizer == "lamb" else None
        super().__init__(
            model, arguments, collate, dataset, optimizer_cls_and_kwargs=lamb, callbacks=[]
        )
        self.settings, self.objective, self.evaluation = settings, objective, evaluate
        self.model_accepts_loss_kwargs = True  # so that no version scales the loss once more
        self.parts = torch.zeros(len(objective.names), device=arguments.device)
        self.batches = BalancedBatches(
            _costs(dataset, lengths if settings.batch_tokens else None),
            settings.batch_tokens or settings.batch_size,
            arguments.world_size,
            settings.accumulation,
            settings.seed,
        )
        dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
        self.speed = Speed(gemm_peak(arguments.device, dtype))
        self.bar = Bar(self.speed)
        self.remove_callback(PrinterCallback)
        names = objective.names if len(objective.names) > 1 else ()
        for callback in (
            self.speed,
            Csv(settings.output_dir, names),
            self.bar,
            Epochs((dataset, self.batches), settings.eval_steps),
        ):
            self.add_callback(callback)

    def load(self, checkpoint: Path) -> None:
        """The model and the history of a run that took all its steps."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one step, and the items of every mean in all of them, everywhere."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = sum(self._counts(inputs, device) for inputs in samples)
        return samples, self.accelerator.reduce(counts, "sum")

    def _counts(self, inputs: Mapping[str, Any], device: torch.device) -> Tensor:
        counts = self.objective.counts(inputs)
        return torch.stack([torch.as_tensor(n, device=device, dtype=torch.float64) for n in counts])

    def _get_num_items_in_batch(self, *args: Any) -> None:
        return None  # `get_batch_samples` counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the global loss, times the processes: DDP divides by them."""
        outputs = model(**inputs)
        means = torch.stack([mean.float() for mean in self.objective.means(outputs, inputs)])
        share = self._counts(inputs, means.device) / num_items_in_batch
        # Of nothing the mean is NaN, which would stay in Trainer's sum of losses.
        parts = torch.where(share > 0, means * share.to(means.dtype), 0.0)
        parts = parts * self.accelerator.num_processes
        self.parts += parts.detach()
        loss = parts.sum()
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:  # how torch.save tells of a disk that is full
            why = str(error).partition("\n")[0]
            raise OSError(f"cannot save a checkpoint to {self.args.output_dir}: {why}") from error

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        return training_flops(self.model, inputs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.evaluation is None:
            return {}
        self.model.eval()
        with torch.no_grad():
            found = self.evaluation(self.model)
        self.model.train()
        values = {f"eval_{name}": float(value) for name, value in found.items()}
        self.log(values)
        self.speed.restart()
        self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        return values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if len(self.parts) > 1:
                parts = self.accelerator.reduce(self.parts, "mean").tolist()
                logs |= dict(zip(self.objective.names, parts, strict=True))
            self.parts.zero_()
            logs["tokens_per_second"] = round(self.speed.tokens_per_second, 1)
        super().log(logs)  # without the start time, which adds speeds of padding and checkpoints


def _costs(dataset: Sized, lengths: Any) -> Callable[[int], np.ndarray]:
    if callable(lengths):
        return lengths
    costs = np.ones(len(dataset), np.int64) if lengths is None else np.asarray(lengths)
    if len(costs) != len(dataset):
        raise ValueError(f"{len(costs)} lengths for {len(dataset)} examples")
    return lambda epoch: costs


def _arguments(settings: Settings) -> TrainingArguments:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = TrainingArguments(
        output_dir=str(settings.output_dir),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        weight_decay=settings.weight_decay,
        gradient_accumulation_steps=settings.accumulation,
        seed=settings.seed,
        bf16=settings.dtype == "bf16",
        use_cpu=settings.on_cpu,
        ddp_find_unused_parameters=True,
        dataloader_pin_memory=not settings.on_cpu,
        # The number of batches is a multiple of the processes: none is repeated to even them out.
        accelerator_config={"even_batches": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        report_to=["tensorboard"] if is_tensorboard_available() else [],
        disable_tqdm=True,
        remove_unused_columns=False,
        log_level="error",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are several processes, never threads
    return arguments
