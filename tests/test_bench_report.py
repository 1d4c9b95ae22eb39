"""bench.compare and bench.report on made-up runs: what is flagged, what is said, what is drawn."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bench import compare, noise, readme, report, results, standings
from bench.compare import IMPROVEMENT, NOISE, REGRESSION
from bench.results import Entry, Interval, Noise, OpEntry, Run, Scaling, load, output_of

WORKLOADS = {"single16": (16, 16), "full128": (1_024, 1_024), "sentence": (864, 2_528)}
# Seconds for 1,000 tokens; a padded token costs the peers as much as a real one.
PEERS = {
    ("hf_sdpa", "fp32"): 1.0,
    ("hf_sdpa", "bf16"): 0.6,
    ("ort_cpu", "fp32"): 0.7,
    ("ort_dynamic", "int8"): 0.15,
    ("onednn_graph", "bf16"): 0.5,
}
OURS = {"fp32": 0.7, "bf16": 0.35}
LOSES = ("single16", "fp32")  # and ties on full128, with ort_cpu


def windows(draw: np.random.Generator, median: float, count: int = 20) -> list[float]:
    """With 2 % noise."""
    return (median * (1 + 0.02 * draw.standard_normal(count))).tolist()


def timed(entry: Entry, seconds: list[float]) -> Entry:
    median = statistics.median(seconds)
    return replace(
        entry, seconds=seconds, median_s=median, p95_s=float(np.percentile(seconds, 95)),
        tokens_per_s=entry.tokens / median, tflop_per_s=entry.flop / median / 1e12,
        first_call_s=0.2, peak_mb=120.0, relative_l2=3e-7,
        cosine=0.98567 if entry.precision == "int8" else 0.99999,
    )  # fmt: skip


def made_up(seed: int = 0, slowdown: float = 1.0, machine: float = 1.0) -> Run:
    """A run with a win, a loss, a tie, a failure, a missing peer, int8, ops and scaling.

    slowdown: of bert_fast alone; machine: of everything.
    """
    draw = np.random.default_rng(seed)
    run = Run(
        "bert-fast bench", "0123456789abcdef", True, "2026-01-02T03:04:05Z",
        {"CPU": "A <fast> CPU"}, {"torch": "2.13.0", "transformers": "5.23.0"}, 2, "A <fast> CPU",
        ceilings={"copy_gb_per_s": 20.0, "matmul_fp32_tflop_per_s": 0.2,
                  "matmul_bf16_tflop_per_s": 0.5},
        noise=Noise(1.5, 0.02, 120, 7), missing={"openvino bf16": "openvino is not installed"},
    )  # fmt: skip
    for workload, (tokens, padded) in WORKLOADS.items():
        for order in ("arrival", "sorted") if tokens < padded else ("arrival",):
            width = padded if order == "arrival" else tokens + 10
            ours: dict[str, list[float]] = {}
            for precision, cost in OURS.items():
                lost = 1.2 if (workload, precision) == LOSES else 1.0
                seconds = windows(draw, cost * tokens / 1e3 * lost * slowdown * machine)
                ours[precision] = seconds
                entry = Entry("minilm", workload, order, "bert_fast", precision, 8, tokens, width)
                run.models.append(timed(replace(entry, flop=tokens * 2e7), seconds))
            for (contender, precision), cost in PEERS.items():
                entry = Entry("minilm", workload, order, contender, precision, 8, tokens, width)
                if contender == "onednn_graph" and workload == "sentence":
                    run.models.append(replace(entry, failed="RuntimeError: no <dynamic> shapes"))
                    continue
                entry = timed(entry, windows(draw, cost * width / 1e3 * machine))
                if precision in ours:
                    entry.ratio = noise.ratio(entry.seconds, ours[precision], 0.01)
                run.models.append(entry)
            absent = Entry("minilm", workload, order, "openvino", "bf16", 8, tokens, width)
            run.models.append(replace(absent, failed=run.missing["openvino bf16"]))
    for op in ("linear", "attention", "pool"):
        for dtype, kernel, cost in (("fp32", "avx2", 1.0), ("fp32", "reference", 2.0),
                                    ("bf16", "avx2", 0.6), ("bf16", "reference", 1.5)):  # fmt: skip
            own = slowdown if kernel != "reference" else 1.0
            ms = cost * machine * own * (1 + 0.005 * draw.standard_normal())
            flop, moved = (2e8, 1e7) if op != "pool" else (4e5, 2e6)
            run.ops.append(
                OpEntry(op, "minilm/T1024", dtype, kernel, "forward", flop, moved, ms,
                        flop / ms / 1e9, moved / ms / 1e6, 0.5, 1e-6, 2e-6)
            )  # fmt: skip
    run.ops.append(OpEntry("pad", "minilm/T1024", "fp32", "avx2", "forward", 0, 1e6, 0.1 * machine))
    run.ops.append(OpEntry("unpad", "c", "fp32", "avx2", "forward", 0, 1e6, failed="wrong: 1e-3"))
    x = [128.0, 256.0, 512.0]
    curves = {"bert_fast": [0.01, 0.021, 0.043], "hf_sdpa": [0.02, 0.05, 0.13]}
    run.scaling.append(
        Scaling("minilm", "fp32", "tokens", x, curves, {"bert_fast": 1.03, "hf_sdpa": 1.4})
    )
    run.failed.append("models: onednn_graph")
    return run


# -- compare ----------------------------------------------------------------------------------


def verdicts(old: Run, new: Run) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"models": [], "ops": []}
    for change in compare.compare(old, new):
        found["models" if "bert_fast" in change.key else "ops"].append(change.verdict)
    return found


@pytest.mark.parametrize("machine", [1.0, 1.3])
def test_two_draws_of_one_distribution_are_no_change(machine: float) -> None:
    for seed in range(1, 6):
        found = verdicts(made_up(0), made_up(seed, machine=machine))
        assert set(found["models"]) == {NOISE} and len(found["models"]) == 8
        assert set(found["ops"]) == {NOISE}


@pytest.mark.parametrize("machine", [1.0, 0.8, 1.3])
def test_a_planted_slowdown_is_flagged(machine: float) -> None:
    slow = made_up(1, slowdown=1.1, machine=machine)
    found = verdicts(made_up(0), slow)
    assert set(found["models"]) == {REGRESSION}
    kernels = {c.key[3]: c.verdict for c in compare.compare(made_up(0), slow) if "linear" in c.key}
    assert kernels == {"avx2": REGRESSION, "reference": NOISE}
    assert set(verdicts(slow, made_up(0))["models"]) == {IMPROVEMENT}


def test_a_change_of_the_yardstick_alone_is_not_blamed_on_us() -> None:
    old, new = made_up(0), made_up(1)
    for e in new.models:
        if e.contender == "hf_sdpa":
            e.seconds = [s / 1.15 for s in e.seconds]
    assert set(verdicts(old, new)["models"]) == {NOISE}


def test_failures_and_what_cannot_be_compared() -> None:
    old, new = made_up(0), made_up(1)
    before, after = ([e for e in r.models if e.contender == "bert_fast"] for r in (old, new))
    new.models.remove(after[0])
    after[1].median_s, after[1].seconds, after[1].failed = None, [], "wrong: 1e-2"
    before[2].median_s, before[2].seconds, before[2].failed = None, [], "it was broken"
    after[3].seconds = after[3].seconds[:4]
    after[4].tokens += 1
    new.ops[0].ms, new.ops[0].failed = None, "wrong: 1e-2"
    found = {c.key: c for c in compare.compare(old, new)}
    assert [found[e.key].verdict for e in before[:6]] == [
        compare.VANISHED, REGRESSION, IMPROVEMENT, compare.FEW, compare.OTHER, NOISE
    ]  # fmt: skip
    assert "wrong: 1e-2" in found[before[1].key].note
    assert found[old.ops[0].key].verdict == REGRESSION
    unpad = next(e for e in old.ops if e.failed)
    assert unpad.key not in found  # failed before and after


def test_without_a_yardstick_times_are_compared_as_they_are() -> None:
    old, slow = made_up(0), made_up(1, machine=1.3)
    for run in (old, slow):
        run.models = [e for e in run.models if e.contender != "hf_sdpa"]
        run.ops = [e for e in run.ops if e.kernel != "reference"]
    changes = compare.compare(old, slow)
    assert {c.verdict for c in changes} == {REGRESSION}
    assert {c.note for c in changes} == {"not normalised"}


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("old.json", "same.json", "slow.json")]
    slow = made_up(2, slowdown=1.1)
    slow.threads = 4
    for file, run in zip(files, (made_up(0), made_up(1), slow), strict=True):
        run.save(file)
    assert compare.main([str(files[0]), str(files[1])]) == 0
    assert "within noise" in capsys.readouterr().out
    assert compare.main([str(files[0]), str(files[2])]) == 1
    told = capsys.readouterr().out
    assert "regression" in told and "threads: 2 became 4" in told and "minilm sentence" in told
    assert compare.main([str(files[0]), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_what_did_not_change_widens_what_is_said_of_the_rest() -> None:
    old, slow = made_up(0), made_up(1, slowdown=1.06)
    assert set(verdicts(old, slow)["ops"]) == {NOISE, REGRESSION}
    factors = (0.9, 1.1, 0.93, 1.07, 1.0, 1.08)
    references = [e for e in slow.ops if e.kernel == "reference"]
    for e, factor in zip(references, factors, strict=True):
        e.ms = (e.ms or 0) * factor
    assert set(verdicts(old, slow)["ops"]) == {NOISE}
    noisy = made_up(1, slowdown=1.06)
    for e in noisy.ops:
        e.spread = 0.1
    assert set(verdicts(old, noisy)["ops"]) == {NOISE}


def test_agreement_counts_ratios_whose_intervals_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = made_up(0), made_up(1)
    found = compare.agreement(old, new)
    assert len(found) == sum(e.ratio is not None for e in old.models) > 10
    rated = [e for e in new.models if e.ratio]
    rated[0].ratio = Interval(9.0, 8.9, 9.1)
    assert [agrees for *_, agrees in compare.agreement(old, new)].count(False) == 1
    for name, run in (("old", old), ("new", new)):
        run.save(tmp_path / f"{name}.json")
    compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    told = capsys.readouterr().out
    assert f"disagrees: {' '.join(rated[0].key)}" in told
    assert f"{len(found) - 1} of {len(found)} agree within their intervals" in told
    assert "in one run only" not in told


def test_what_only_one_run_has_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = made_up(0), made_up(1)
    peers = [e for e in new.models if e.ratio]
    peers[0].ratio, peers[0].seconds, peers[0].failed = None, [], "too slow to repeat"
    new.models.remove(peers[1])
    next(e for e in old.models if e.key == peers[2].key).ratio = None
    for name, run in (("old", old), ("new", new)):
        run.save(tmp_path / f"{name}.json")
    compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    told = capsys.readouterr().out
    assert "3 ratios are in one run only" in told
    assert re.search(r", 2 vanished$", told, re.M) and "too slow to repeat" in told


# -- report -----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every tag closed in order, every id and every reference."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.handle_attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_attributes(attrs)

    def handle_attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            assert name not in ("src", "srcset", "data") and not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href"):
                self.references.append(value or "")
            self.references += re.findall(r"url\((.*?)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html() -> str:
    return report.render(made_up())


def test_page_stands_alone_and_its_links_hold(html: str) -> None:
    page = Page(html)
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert len(page.references) > 100
    assert {r.removeprefix("#") for r in page.references} <= set(page.ids)
    assert html.count("<svg") == 6  # bars in three precisions, padding, roofs, scaling
    assert "<fast>" not in html and "A &lt;fast&gt; CPU" in html
    assert html == report.render(made_up())


def test_page_holds_every_entry(html: str) -> None:
    run = made_up()
    text = re.sub(r"<svg.*?</svg>", "", html, flags=re.S)
    times = [f"{e.median_s * 1e3:,.2f}" for e in run.models if e.median_s]
    assert times and all(f">{ms}<" in text for ms in times)
    for said in (
        "no &lt;dynamic&gt; shapes", "openvino is not installed", "wrong: 1e-3", "0123456789abcdef",
        "not committed", "120 windows kept, 7 dropped", "2026-01-02", "torch 2.13.0", "0.999990",
        "models: onednn_graph",
    ):  # fmt: skip
        assert said in text, said


def test_page_of_an_empty_run() -> None:
    run = made_up()
    run.models, run.ops, run.scaling, run.failed, run.noise = [], [], [], [], None
    run.missing = {}
    assert "timed no whole model" in report.render(run)
    run.models = [Entry("m", "w", "arrival", "bert_fast", "fp32", failed="no memory")]
    assert "bert_fast itself failed on m w arrival (no memory)" in report.render(run)


def test_summary_says_where_we_lose() -> None:
    said = standings.summary(made_up())
    told = "\n".join(said)
    assert re.search(
        r"fp32: beside the fastest peer bert_fast is [\d.]+ times as fast on ragged", told
    )
    assert "within noise of the fastest on 2, slower on 1: minilm single16 arrival (0.8" in told
    assert "times as fast as ort_cpu)" in told
    assert "bf16, workload by workload: it is faster than every peer on 4 of 4, within noi" in told
    assert "slower on none" in told
    assert (
        "int8: this run timed no bert_fast in int8" in told and "cosine of 0.9856 or more" in told
    )


def test_fastest_peer_is_of_the_same_precision() -> None:
    found = {s.ours.key: s for s in standings.standings(made_up())}
    names = {key[1:3] + key[4:]: s.peer.contender if s.peer else None for key, s in found.items()}
    assert names["sentence", "arrival", "fp32"] == "ort_cpu"  # not the faster int8
    assert names["full128", "arrival", "bf16"] == "onednn_graph"
    assert names["sentence", "arrival", "bf16"] == "hf_sdpa"  # onednn_graph failed
    kinds = {key[1:3]: s.kind for key, s in found.items()}
    assert kinds["sentence", "arrival"] == "ragged" and kinds["sentence", "sorted"] == "sorted"
    assert kinds["full128", "arrival"] == "full"


def test_readme_is_replaced_between_its_markers(tmp_path: Path) -> None:
    page, file = tmp_path / "README.md", tmp_path / "run.json"
    made_up().save(file)
    page.write_text("no markers\n")
    with pytest.raises(ValueError, match="bench:begin"):
        readme.write_readme(load(file), file, page)
    page.write_text(f"head\n{readme.BEGIN}\nold\n{readme.END}\ntail\n")
    for _ in range(2):
        readme.write_readme(load(file), file, page)
        text = page.read_text()
        assert text.startswith("head\n") and text.endswith("\ntail\n") and "old" not in text
        assert readme.section(text) == readme.table(load(file), file)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 and len({line.count("|") for line in table}) == 1
    assert str(file) in text and "`bert-fast bench`" in text and ": slower |" in text
    # What a workload was cut to, and how quiet it was.
    assert any(line.startswith("| sentence, arrival: 8 texts, 34% full |") for line in table)
    assert "Noise: 120 windows kept, 7 dropped because" in text
    run = load(file)
    for e in run.models:
        e.batches = 2
    assert "| sentence, arrival: 2 x 4 texts, 34% full |" in readme.table(run, file)


def test_nothing_is_claimed_of_an_emulated_precision(tmp_path: Path) -> None:
    run = made_up()
    run.machine |= {"GPU": "none", "oneDNN natively in": "float32"}
    told = [line for line in standings.summary(run) if line.startswith("bf16")]
    assert len(told) == 1 and "they are not set beside it" in told[0]
    table = readme.table(run, tmp_path / "run.json")
    assert "bf16 tokens/s" in table and "fastest bf16 peer" not in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_a_precision_without_peers_is_not_said_to_have_slow_ones() -> None:
    run = made_up()
    told = "\n".join(standings.summary(run))
    assert "took part" not in told and "too slow" not in told
    entry = Entry("minilm", "squad", "arrival", "bert_fast", "fp8", 8, 100, 120)
    run.models.append(timed(entry, [1.0, 1.1, 1.2]))
    (told,) = [line for line in standings.summary(run) if line.startswith("fp8")]
    assert told == (
        "fp8: no peer of this precision took part beside bert_fast on minilm squad arrival."
    )


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    made_up().save(file)
    assert report.main([str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run.html")
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")
    file.write_text("[]")
    assert report.main([str(file)]) == 2
    assert "schema" in capsys.readouterr().err


def test_readme_quotes_results_of_the_repository_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    made_up().save(file)
    before = readme.README.read_text()
    assert report.main(["--readme", str(file)]) == 2
    assert "not under bench/results" in capsys.readouterr().err
    assert readme.README.read_text() == before


def test_readme_matches_the_committed_json() -> None:
    committed = output_of("git", "ls-files", "bench/results/*.json")
    section = readme.section(readme.README.read_text())
    assert section is not None, "README.md lost the markers of the bench"
    named = re.search(r"`(bench/results/[^`]+\.json)`", section)
    if not committed and not named:
        pytest.skip("no result is committed and README.md quotes none")
    assert named, f"bench/results holds {committed}, and README.md quotes none of it"
    path = results.ROOT / named[1]
    assert committed is None or named[1] in committed.split(), f"{named[1]} is not committed"
    assert section == readme.table(load(path), path)
