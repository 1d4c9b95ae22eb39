"""The bench's table in README.md, between its markers; numbers in words, as the page has them."""

from __future__ import annotations

import math
from pathlib import Path

from .results import ROOT, Entry, Interval, Run
from .standings import Standing, cell, emulated, fill, ordered, standings, summary

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
        "time over bert_fast's, with its 95 % interval. Of a batch that is so many per cent full, "
        "the rest is padding."
    ]
    said += ["", *(f"- {sentence}" for sentence in summary(run))]
    kinds = ordered(s.ours.precision for s in found)
    compared = [kind for kind in kinds if not emulated(run, kind)]
    for model in dict.fromkeys(s.ours.model for s in found):
        head = [f"| {model} |"]
        lines = ["| --- |"]
        for kind in kinds:
            head.append(f" {kind} tokens/s |")
            lines.append(" ---: |")
            if kind in compared:
                head.append(f" beside the fastest {kind} peer |")
                lines.append(" --- |")
        said += ["", "".join(head), "".join(lines)]
        mine = {(*cell(s.ours), s.ours.precision): s for s in found if s.ours.model == model}
        for place in dict.fromkeys(key[:3] for key in mine):
            here = {kind: mine.get((*place, kind)) for kind in kinds}
            name = next(_row(s.ours) for s in here.values() if s)
            cells = (_cells(s, kind in compared) for kind, s in here.items())
            said.append(f"| {name} |{''.join(cells)}")
    return "\n".join([*said, "", f"Noise: {noise(run)}."])


def _row(e: Entry) -> str:
    """The workload, and how much of it a machine of this size got: batches are cut to fit."""
    texts = f"{e.batches} x {e.texts // e.batches}" if e.batches else f"{e.texts}"
    return f"{e.workload}, {e.order}: {texts} text{'s' * (e.texts > 1)}, {fill(e):.0%} full"


def _cells(s: Standing | None, compared: bool) -> str:
    rate = f" {number(s.ours.tokens_per_s if s else None, ',.0f')} |"
    if not compared:
        return rate
    if s is None:
        return f"{rate} {NONE} |"
    beside = f"{interval(s.peer.ratio)} {s.peer.contender}: {s.verdict}" if s.peer else s.verdict
    return f"{rate} {beside} |"


def noise(run: Run) -> str:
    """How quiet the machine was, in words."""
    if not run.noise:
        return "not recorded"
    n = run.noise
    forced = f", {n.forced} kept though it was" if n.forced else ""
    return (
        f"{n.kept} windows kept, {n.dropped} dropped because the machine was disturbed{forced}; "
        f"a probe took {n.probe_ms:.3g} ms, give or take {n.probe_spread:.1%}"
    )


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
