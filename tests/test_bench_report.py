"""bench.report on a made-up run: what is said, what is drawn."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench import readme, report, results, standings
from bench.results import Entry, load, output_of

from .made_up_runs import made_up, timed


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
    assert "within noise of it on 2, slower on 1: minilm single16 arrival (0.8" in told
    assert "times as fast as ort_cpu)" in told
    assert (
        "bf16, workload by workload: it is faster than the fastest peer on 4 of 4, within noi"
        in told
    )
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
    assert report.main([str(file), "-o", str(file)]) == 2
    assert "is the result itself" in capsys.readouterr().err
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
