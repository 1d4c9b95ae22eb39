"""The bench's table in README.md, between its markers; numbers in words, as the page has them."""

from __future__ import annotations

import math
from pathlib import Path

from .results import ROOT, Interval, Run
from .standings import Standing, cell, ordered, standings, summary

README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NONE = "–"  # noqa: RUF001


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    return NONE if value is None or math.isnan(value) else format(value * scale, form)


def interval(ratio: Interval | None) -> str:
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else NONE


def table(run: Run, path: Path) -> str:
    """Markdown: what the run says, then a row a workload and order, for each model.

    path: the run's file, named in the text.
    """
    found = standings(run)
    said = [
        f"From `{relative(path)}`, made by `{run.command}` on {run.device}, with {run.threads} "
        f"threads, at commit {(run.commit or 'unknown')[:10]}"
        f"{' (modified)' if run.modified else ''}. "
        "Each is compared with the fastest peer of the same precision; the ratio is the peer's "
        "time over bert_fast's, with its 95 % interval."
    ]
    said += ["", *(f"- {sentence}" for sentence in summary(run))]
    kinds = ordered(s.ours.precision for s in found)
    for model in dict.fromkeys(s.ours.model for s in found):
        head = [f"| {model} |"]
        head += [f" {kind} tokens/s | beside the fastest {kind} peer |" for kind in kinds]
        said += ["", "".join(head), "| --- |" + " ---: | --- |" * len(kinds)]
        mine = {(*cell(s.ours), s.ours.precision): s for s in found if s.ours.model == model}
        for place in dict.fromkeys(key[:3] for key in mine):
            cells = (_cells(mine.get((*place, kind))) for kind in kinds)
            said.append(f"| {place[1]}, {place[2]} |{''.join(cells)}")
    return "\n".join(said)


def _cells(s: Standing | None) -> str:
    if s is None:
        return f" {NONE} |" * 2
    beside = f"{interval(s.peer.ratio)} {s.peer.contender}: {s.verdict}" if s.peer else s.verdict
    return f" {number(s.ours.tokens_per_s, ',.0f')} | {beside} |"


def relative(path: Path) -> str:
    path = path.resolve()
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


def section(text: str) -> str | None:
    """What stands between the markers, None where they are not there."""
    if BEGIN not in text or END not in text:
        return None
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")


def write_readme(run: Run, path: Path, readme: Path = README) -> None:
    """Raises: ValueError where the markers are not there, or nothing is to be put between them."""
    if not standings(run):
        raise ValueError(f"{path} timed no whole model")
    replace(readme, (BEGIN, END), table(run, path))


def replace(readme: Path, markers: tuple[str, str], text: str) -> None:
    """Puts `text` between two markers. Raises: ValueError where they are not there."""
    before, (begin, end) = readme.read_text(), markers
    head, found, rest = before.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{readme} has no {begin} and {end}")
    readme.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
