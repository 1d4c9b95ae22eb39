"""Plants the bugs of `mutants` and `mutants_models` and checks that tests see each: `make mutants`.

A test that cannot fail is a defect. Every mutant replaces one piece of text in a copy of the
checkout (the extension is rebuilt for C++), runs the tests that guard that place, and is caught
when they fail. Exit code 0: all caught.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .mutants import EMULATED, KERNELS
from .mutants_models import MODELS

MUTANTS = [*KERNELS, *MODELS]
ROOT = Path(__file__).resolve().parents[1]


def copy_checkout(into: Path) -> None:
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
    # An editable install would resolve this package to the original checkout.
    (into / "bert_fast" / "_triton").symlink_to(into / "kernels" / "_triton")


def build(where: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def caught(where: Path, tests: tuple[str, ...]) -> bool:
    """Whether the tests fail, or die of a signal, as writes outside an array make them do.

    Anything else (no tests, an error of pytest's own) is a defect.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    if done.returncode > 1:
        raise RuntimeError(f"pytest exited {done.returncode}: {done.stdout[-2000:]}")
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT",
        help="mutants whose bug or file contains one of these texts",
    )  # fmt: skip
    only = parser.parse_args().only
    chosen = [m for m in MUTANTS if any(text in m.bug or text in m.file for text in only)]
    for text in only:
        if not any(text in m.bug or text in m.file for m in chosen):
            parser.error(f"--only {text!r}: no mutant's bug or file contains this")
    console, table = Console(), Table("bug", "file", "seconds", "caught")
    missed, stale = 0, False
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        copy_checkout(where)
        build(where)
        for tests in sorted({m.tests for m in chosen}):
            if caught(where, tests):
                console.print(f"these tests fail without any bug: {' '.join(tests)}")
                return 2
        for mutant in chosen:
            start, file = time.monotonic(), where / mutant.file
            healthy = file.read_text()
            if healthy.count(mutant.old) != 1:
                raise RuntimeError(f"{mutant.bug}: its text is not once in {mutant.file}")
            file.write_text(healthy.replace(mutant.old, mutant.new))
            native = mutant.file.startswith("kernels/csrc") and mutant.tests != EMULATED
            if native or stale:
                build(where)
            stale = native  # the next build takes this bug out again
            seen = caught(where, mutant.tests)
            file.write_text(healthy)
            missed += not seen
            took = f"{time.monotonic() - start:.0f}"
            table.add_row(mutant.bug, mutant.file, took, "yes" if seen else "NO")
            console.print(f"{'caught' if seen else 'MISSED'}: {mutant.bug}")
    console.print(table)
    console.print(f"{len(chosen) - missed} of {len(chosen)} planted bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
