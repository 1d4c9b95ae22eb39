"""The checkpoints of a run: which there are, what each gets, and how many are kept."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
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


def checkpoints_of(folder: Path, resume: bool) -> list[Path]:
    """The checkpoints in `folder`, the first one first.

    Raises: ValueError where there are some, but no run is resumed.
    """
    checkpoints = [path for _, path in numbered(folder)]
    if checkpoints and not resume:
        raise ValueError(
            f"{folder} holds checkpoints of another run: resume it, or choose another output folder"
        )
    return checkpoints


def last_checkpoint(folder: Path, resume: bool, agreed: Mapping[str, Any]) -> Path | None:
    """The last whole checkpoint of the run that is resumed; a killed run may leave half of one.

    Raises: ValueError where settings.json of that run lacks what is `agreed`, by name.
    """
    checkpoints = checkpoints_of(folder, resume)
    if not checkpoints:
        return None
    file = folder / "settings.json"
    try:
        before = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"cannot resume {folder}: {file}: {error}") from None
    whole = [one for one in checkpoints if _whole(one, before.get("processes", 1))]
    if not whole:
        return None
    for name, value in agreed.items():
        if before.get(name) != value:
            raise ValueError(
                f"cannot resume {folder} with {name} {value}: it was started with "
                f"{before.get(name)}"
            )
    return whole[-1]


def done(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return bool(state["global_step"] >= state["max_steps"])


def _whole(checkpoint: Path, processes: int) -> bool:
    """Whether everything was written: trainer_state.json is, last of all by the main process, and
    the others do not wait for each other."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    states = list(checkpoint.glob("rng_state*.pth"))
    return len(states) >= processes and all(map(zipfile.is_zipfile, states))


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
