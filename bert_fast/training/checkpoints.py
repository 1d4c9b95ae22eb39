"""The checkpoints of a run: which there are, what each gets, and how many are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

KEPT = 2  # the last one may be half written when a run is killed


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of every checkpoint in `folder`, the first one first; none but Trainer's own:
    a `checkpoint-best` is somebody else's.
    """
    return sorted(
        (int(step), path)
        for path in folder.glob("checkpoint-*")
        if (step := path.name.removeprefix("checkpoint-")).isdecimal()
    )


class Checkpoints(TrainerCallback):
    """Puts the tokenizer into each checkpoint, and removes all but the last ones.

    Trainer can do both, but not only that: given a tokenizer it changes the model's config, and it
    counts whatever is named `checkpoint-*`, the user's own too.
    """

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(self.folder / f"checkpoint-{state.global_step}")
        # What is ahead of this step is what a killed run has left half of.
        done = [path for step, path in numbered(self.folder) if step <= state.global_step]
        for path in done[:-KEPT]:
            shutil.rmtree(path, ignore_errors=True)
