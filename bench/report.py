"""`python -m bench.report RESULT.json [-o OUT.html] [--readme]`: a run of the bench as one page.

The page needs nothing but itself: plots are inline SVG. `--readme` puts the run's table between the
bench's markers in README.md instead.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from html import escape
from itertools import starmap
from pathlib import Path

from . import figures
from .peers import ABOUT
from .readme import NONE, interval, noise, number, relative, write_readme
from .results import RESULTS, Entry, OpEntry, Run, load
from .standings import KINDS, OURS, cell, fill, standings, summary
from .workloads import named

CSS = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 1140px; margin: 0 auto; padding: 24px }
h1 { font-size: 26px; margin: 0 0 12px } h2 { font-size: 20px; margin: 40px 0 8px;
  border-bottom: 1px solid #ccc; padding-bottom: 4px } h3 { font-size: 16px; margin: 24px 0 4px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0 }
dt { color: #555 } dd { margin: 0; overflow-wrap: anywhere }
nav ul { columns: 2; padding-left: 20px; margin: 8px 0 } .summary li { margin: 4px 0 }
a { color: #14508c } code { font-size: 13px; background: #f3f3f3; padding: 1px 4px }
figure { margin: 8px 0 20px } figure svg { width: 100%; height: auto; display: block }
figcaption { color: #444; font-size: 13.5px }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 12px; margin: 8px 0 }
th, td { padding: 3px 6px; text-align: left; border-bottom: 1px solid #e4e4e4; vertical-align: top;
  white-space: nowrap }
th { background: #f3f3f3; font-weight: 600 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
#failures td { white-space: normal; overflow-wrap: anywhere }
tr.ours td { background: #fdeee6; font-weight: 600 }
.faster { color: #146c2e } .slower { color: #a3120a; font-weight: 600 } .noise { color: #555 }
"""

Section = tuple[str, str, str]  # id, heading, HTML


def render(run: Run) -> str:
    """The page."""
    sections = [s for s in (*_model_sections(run), *_op_sections(run), _not_measured(run)) if s[2]]
    entries = "".join(f'<li><a href="#{i}">{escape(h)}</a></li>' for i, h, _ in sections)
    body = "".join(f'<section id="{i}"><h2>{escape(h)}</h2>{t}</section>' for i, h, t in sections)
    title = f"bert_fast on {run.device}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f'</title><meta name="viewport" content="width=device-width"><style>{CSS}</style></head>\n'
        f"<body><header><h1>{escape(title)}</h1>{_summary(run)}{_facts(run)}</header>\n"
        f"<nav><h2>Contents</h2><ul>{entries}</ul></nav>\n<main>{body}</main></body></html>\n"
    )


def _summary(run: Run) -> str:
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary(run))
    return (
        "<p>bert_fast computes BERT encoders in PyTorch without computing their padding. On this "
        "machine it took turns with other ways to run the same models on the same batches. Only "
        "peers of the same precision are compared. “Times as fast” is the peer's time over "
        "bert_fast's: below 1, bert_fast is slower; within noise, the 95 % interval contains "
        f'1.</p><ul class="summary">{said}</ul>'
    )


def _facts(run: Run) -> str:
    modified = ", with changes that are not committed" if run.modified else ""
    facts = {
        "commit": f"{run.commit or 'unknown'}{modified}",
        "command": run.command,
        "date": run.date,
        "device": f"{run.device}; torch runs {run.threads} threads",
        "machine": "; ".join(f"{k}: {v}" for k, v in run.machine.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in run.versions.items()),
        "ceilings": ", ".join(starmap(figures.ceiling, run.ceilings.items())),
        "noise": noise(run),
        "tests": ", ".join(f"{k}: {v}" for k, v in (run.tests or {}).items()),
    }
    rows = (f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v)
    return f"<h2>The run</h2><dl>{''.join(rows)}</dl>"


def _names(run: Run) -> str:
    """What the workloads and contenders of the run are."""
    places = {}
    for e in run.models:
        if e.texts and e.order == "arrival":
            places[e.workload, e.model] = e
    rows = [
        (e.workload, e.model, _about(e.workload),
         f"{e.texts}", number(e.tokens / e.texts, ".0f"), number(fill(e), ".0%"))
        for e in places.values()
    ]  # fmt: skip
    texts = _table(("workload", "model", "what", "#texts a pass", "#mean tokens a text",
                    "#real tokens among the padded, as texts arrive"), rows)  # fmt: skip
    contenders = dict.fromkeys(e.contender for e in run.models)
    peers = _table(("contender", "what"), [(c, ABOUT.get(c, NONE)) for c in contenders])
    return f"{texts}{peers}"


def _about(workload: str) -> str:
    try:
        return named(workload).about
    except ValueError:  # of an older bench
        return NONE


def _model_sections(run: Run) -> Iterable[Section]:
    yield "names", "What was run", _names(run) if run.models else ""
    found, tables = [], []
    classes = dict.fromkeys((e.model, e.precision) for e in run.models if e.median_s)
    for i, (model, precision) in enumerate(classes):
        head = f"<h3>{escape(model)}, {escape(precision)}</h3>"
        svg = figures.bars(f"bars{i}", run, model, precision)
        found.append(head + _figure(svg, BARS))
        timed = [
            e for e in run.models if e.median_s and (e.model, e.precision) == (model, precision)
        ]
        tables.append(head + _table(MODEL_COLUMNS, map(_model_row, timed)))
    yield "tokens", "Tokens per second", "".join(found)
    rated = [s for s in standings(run) if s.peer and s.peer.ratio]
    svg = figures.speedups("speedups", run) if rated else ""
    yield "fill", "Speed-up and padding", svg and _figure(svg, SPEEDUPS)
    yield "standings", "bert_fast and the fastest peer", _standings(run) if run.models else ""
    svg = figures.scaling("scaling", run) if run.scaling else ""
    yield "scaling", "Scaling", svg and _figure(svg, SCALING)
    head = f"<p>{escape(MODELS)}</p>" if tables else ""
    yield "models", "All models", head + "".join(tables)


BARS = (
    "Real tokens per second, more is better. The number above a group is the fastest peer's time "
    "over bert_fast's; a cross marks what failed or is not there."
)
SPEEDUPS = (
    "One mark a workload and order, with its 95 % interval, against the share of the padded batch "
    "that is real tokens. Above the line bert_fast is faster than the fastest peer of its "
    "precision."
)
SCALING = (
    "Seconds of one batch. Left: more and more tokens, in texts of 64 (or fewer). Middle: always "
    "the same number of tokens, in fewer but longer texts, so that only attention has more to do. "
    "Right: 1,024 tokens on more threads. Exponents are fitted on the upper half of the points: "
    "1 is linear, 0 a constant, -1 a perfect gain from threads."
)
MODELS = (
    "Tokens are real ones, without padding. Median and p95 are of a pass over all batches of the "
    "workload; windows is how many passes were kept. Ratio: this contender's time over "
    "bert_fast's, with its 95 % interval. Fill: the share of real tokens in the padded batches. "
    "First call: of the workload, with what is compiled or packed then. Peak MB: what building and "
    "running the contender added to the process at most. Relative L2 and cosine compare its output "
    "with transformers in fp64: 0 and 1 are exact."
)
ROOFS = (
    "A mark is a kernel at one shape: its rate against FLOPs per byte it has to move, both axes "
    "logarithmic. The line is what this machine can do at most: the bandwidth of a copy, then the "
    "rate of a large matmul, both measured in the same run; what fits in the cache may exceed it. "
    "“reference” is plain PyTorch; the others are bert_fast's kernels for the same op."
)
OPS = (
    "T is the number of packed tokens. An op is timed after its result was compared with fp64: "
    "error is the largest difference, allowed is twice that of plain PyTorch (the reference) plus "
    "one rounding step. Share of its roof: of the rate that memory or arithmetic allows here; what "
    "fits in the cache may exceed it. ± is half the 95 % interval of the median."
)


def _figure(svg: str, caption: str) -> str:
    said = escape(caption)
    return f'<figure role="img" aria-label="{said}">{svg}<figcaption>{said}</figcaption></figure>'


def _standings(run: Run) -> str:
    rows = []
    for s in standings(run):
        peer = s.peer
        rows.append((
            *cell(s.ours), s.ours.precision, KINDS[s.kind], number(s.ours.tokens_per_s, ",.0f"),
            peer.contender if peer else NONE, number(peer.tokens_per_s if peer else None, ",.0f"),
            interval(peer.ratio if peer else None), _verdict(s.verdict),
        ))  # fmt: skip
    columns = ("model", "workload", "order", "precision", "kind", "#bert_fast tokens/s",
               "fastest peer", "#its tokens/s", "#ratio", "bert_fast is")  # fmt: skip
    return _table(columns, rows)


def _verdict(verdict: str) -> str:
    kind = {"faster": "faster", "slower": "slower"}.get(verdict, "noise")
    return f'<span class="{kind}">{escape(verdict)}</span>'


MODEL_COLUMNS = ("workload", "order", "contender", "#tokens/s", "#median ms", "#p95 ms", "#ratio",
                 "#TFLOP/s", "#fill", "#first call s", "#peak MB", "#relative L2", "#cosine",
                 "#texts", "#windows")  # fmt: skip


def _model_row(e: Entry) -> tuple[str, ...]:
    return (
        e.workload, e.order, e.contender, number(e.tokens_per_s, ",.0f"),
        number(e.median_s, ",.2f", 1e3), number(e.p95_s, ",.2f", 1e3), interval(e.ratio),
        number(e.tflop_per_s, ".3f"), number(fill(e), ".2f"), number(e.first_call_s, ".2f"),
        number(e.peak_mb, ",.0f"), number(e.relative_l2, ".1e"), number(e.cosine, ".6f"),
        f"{e.texts}", f"{len(e.seconds)}",
    )  # fmt: skip


def _op_sections(run: Run) -> Iterable[Section]:
    drawn = any(e.tflop_per_s and e.flop and e.bytes for e in run.ops)
    svg = figures.rooflines("roofs", run) if drawn else ""
    yield "roofs", "Ops below the machine's roofs", svg and _figure(svg, ROOFS)
    reference = {_place(e): e.ms for e in run.ops if e.ms and e.kernel == figures.REFERENCE}
    timed = [e for e in run.ops if e.ms]
    best: dict[tuple[str, ...], OpEntry] = {}
    for e in sorted((e for e in timed if e.kernel != figures.REFERENCE), key=lambda e: e.ms or 0):
        best.setdefault(_place(e), e)
    slower = [
        f"{' '.join(place)} ({e.kernel}, {reference[place] / e.ms:.2f} times as fast)"
        for place, e in best.items()
        if e.ms and e.ms > 1.05 * reference.get(place, math.inf)
    ]
    said = (
        f"Where even the fastest kernel is more than 5 % slower than the reference in plain "
        f"PyTorch: {'; '.join(slower) or 'nowhere'}."
    )
    rows = (_op_row(e, reference.get(_place(e))) for e in timed)
    table = f"<p>{escape(OPS)}</p><p>{escape(said)}</p>{_table(OP_COLUMNS, rows)}" if timed else ""
    yield "ops", "All ops", table


def _place(e: OpEntry) -> tuple[str, ...]:
    return e.op, e.case, e.dtype, e.step


OP_COLUMNS = ("op", "case", "dtype", "step", "kernel", "#ms", "#±", "#reference ms / ms",
              "#TFLOP/s", "#GB/s", "#share of its roof", "#error", "#allowed")  # fmt: skip


def _op_row(e: OpEntry, reference: float | None) -> tuple[str, ...]:
    gain = reference / e.ms if reference and e.ms else None
    return (
        e.op, e.case, e.dtype, e.step, e.kernel, number(e.ms, ",.4g"),
        number(e.spread, ".1%"), number(gain, ".2f"), number(e.tflop_per_s, ".3g"),
        number(e.gb_per_s, ".3g"), number(e.share, ".0%"), number(e.error, ".1e"),
        number(e.budget, ".1e"),
    )  # fmt: skip


def _not_measured(run: Run) -> Section:
    """What failed, then what cannot run here, each with the places that it is from."""
    rows: dict[tuple[str, str], list[str]] = {}
    wrong = [op for op in run.ops if not op.ms and (op.failed or "").startswith("wrong")]
    for op in wrong:
        why = (f"{op.op} {op.kernel} {op.dtype}", op.failed or "")
        rows.setdefault(why, []).append(f"{op.case} {op.step}")
    for e in run.models:
        if not e.median_s and f"{e.contender} {e.precision}" not in run.missing:
            why = (f"{e.contender} {e.precision}", e.failed or "no times")
            rows.setdefault(why, []).append(" ".join(cell(e)))
    for told in run.failed:
        rows.setdefault((told, "failed"), [])
    for name, reason in run.missing.items():
        rows.setdefault((name, reason), [])
    for op in run.ops:
        if not op.ms and op not in wrong:
            places = rows.setdefault((f"{op.kernel} kernels", op.failed or "no time"), [])
            if op.op not in places:
                places.append(op.op)
    cells = ((name, why, "; ".join(places) or NONE) for (name, why), places in rows.items())
    table = _table(("what", "why", "where"), cells) if rows else "<p>Nothing.</p>"
    return "failures", "Missing and failed", table


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are text, or a <span>; columns that start with # are numbers."""
    kinds = [' class="n"' if column.startswith("#") else "" for column in columns]
    pairs = zip(columns, kinds, strict=True)
    head = "".join(f"<th{kind}>{escape(name.removeprefix('#'))}</th>" for name, kind in pairs)
    body = []
    for row in rows:
        mark = ' class="ours"' if OURS in row else ""
        cells = (c if c.startswith("<span") else escape(c) for c in row)
        tds = (f"<td{kind}>{c}</td>" for c, kind in zip(cells, kinds, strict=True))
        body.append(f"<tr{mark}>{''.join(tds)}</tr>\n")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="OUT.html", help="beside RESULT by default"
    )
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args(arguments)
    try:
        run = load(options.result)
        if options.readme:
            if RESULTS not in options.result.resolve().parents:
                raise ValueError(
                    f"README.md quotes committed results: {options.result} is not "
                    f"under {relative(RESULTS)}"
                )
            write_readme(run, options.result)
        if options.out or not options.readme:
            out = options.out or options.result.with_suffix(".html")
            if out.resolve() == options.result.resolve():
                raise ValueError(f"{out} is the result itself: the page needs another name")
            out.write_text(render(run))
            print(out)
    except (OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
