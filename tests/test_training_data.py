"""What `bert-fast finetune` reads: tables, labels, tagged words; and what it refuses."""

import gzip
import json

import pytest

from bert_fast.training.readers import Columns, label_name, labels_of, read_texts
from bert_fast.training.words import read_words

ROWS = [("a cat", "yes"), ('the "big" dog, barking', "no"), ("Zürich\u2028 sun", "yes")]


def write(file, text):
    file.write_text(text, encoding="utf-8")
    return file


def as_csv(rows):
    quoted = [f'"{text.replace(chr(34), chr(34) * 2)}",{label}\n' for text, label in rows]
    return "text,label\n" + "".join(quoted)


def as_tsv(rows):
    return "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)


def as_jsonl(rows):
    return "".join(json.dumps({"text": t, "label": n}) + "\n\n" for t, n in rows)


def as_json(rows):
    return json.dumps([{"text": text, "label": label} for text, label in rows])


FORMATS = {"csv": as_csv, "tsv": as_tsv, "jsonl": as_jsonl, "json": as_json}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_format_gives_the_same_rows(tmp_path, kind, end, mark):
    text = (mark + FORMATS[kind](ROWS)).replace("\n", end)
    file = tmp_path / f"rows.{kind}"
    file.write_bytes(text.encode())
    found = read_texts(file, pairs=False)
    assert list(zip(found.texts, found.labels, strict=True)) == ROWS


@pytest.mark.parametrize("kind", FORMATS)
def test_compressed_rows(tmp_path, kind):
    file = tmp_path / f"rows.{kind}.gz"
    file.write_bytes(gzip.compress(FORMATS[kind](ROWS).encode()))
    assert read_texts(file, pairs=False).texts == [text for text, _ in ROWS]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"rows\.\w+\.gz: Compressed file ended"):
        read_texts(file, pairs=False)


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"text": [t for t, _ in ROWS], "label": [0, 1, 0]}
    parquet.write_table(arrow.table(columns), tmp_path / "rows.parquet")
    found = read_texts(tmp_path / "rows.parquet", pairs=False)
    assert found.texts == columns["text"] and found.labels == columns["label"]
    with pytest.raises(ValueError, match="not Parquet"):
        read_texts(write(tmp_path / "bad.parquet", "text,label"), pairs=False)


def test_csv_fields_may_hold_line_ends(tmp_path):
    file = write(tmp_path / "rows.csv", 'text,label\n"two\nlines",a\n\none,\n')
    with pytest.raises(ValueError, match=r"rows.csv, line 5, column 'label': no label"):
        read_texts(file, pairs=False)


def test_a_row_of_empty_fields_is_a_row(tmp_path):
    file = write(tmp_path / "a.tsv", "text\ttext_b\nthe cat\ta dog\n\t\n\na\tb\n")
    found = read_texts(file, pairs=True, labelled=False)
    assert found.texts == ["the cat", "", "a"] and list(found.table.places) == [2, 3, 5]


def test_labels_that_are_hardly_numbers(tmp_path):
    """Longer than a float takes, and with two signs."""
    for labels in (["1" * 400, "2"], ["--1", "1"]):
        assert set(labels_of(with_labels(tmp_path, labels)).names) == set(labels)
    long = write(tmp_path / "a.jsonl", f'{{"text": "a", "label": {"1" * 400}}}\n' * 2)
    with pytest.raises(ValueError):
        labels_of(read_texts(long, pairs=False))


def test_columns_by_name_and_as_in_glue(tmp_path):
    header = "id\tquestion1\tquestion2\tis_duplicate\n"
    file = write(tmp_path / "qqp.tsv", header + "7\tis it?\tis it so?\t1\n")
    found = read_texts(file, pairs=True)
    assert (found.texts, found.texts_b, found.labels) == (["is it?"], ["is it so?"], ["1"])
    found = read_texts(file, pairs=False, columns=Columns("question2", None, "id"))
    assert (found.texts, found.texts_b, found.labels) == (["is it so?"], None, ["7"])


@pytest.mark.parametrize(
    ("header", "second"),
    [
        ("text\ttext_b\tlabel", "b"),
        ("text\tother\tlabel", None),
        ("question\tsentence\tlabel", "b"),
        ("premise\thypothesis\tlabel", "b"),
        ("text\tsentence1\tlabel\tsentence2", None),  # documented names before GLUE's
    ],
)
def test_pairs_where_the_columns_are_so(tmp_path, header, second):
    row = "\t".join("abcd"[: len(header.split("\t"))])
    found = read_texts(write(tmp_path / "a.tsv", f"{header}\n{row}\n"), pairs=None)
    assert found.texts == ["a"] and found.texts_b == (None if second is None else [second])


def test_pairs_without_scores(tmp_path):
    file = write(tmp_path / "pairs.tsv", "anchor\tpositive\na\tb\n")
    assert read_texts(file, pairs=True, labelled=False).labels == []
    with pytest.raises(ValueError, match="no column 'text'"):
        read_texts(file, pairs=True)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "text,label\na,b,c\n", ["a.csv, line 2", "3 fields, expected 2", "text, label"]),
        ("a.csv", 'text,label\n"a,b\n', ["a.csv, line 2", "not CSV"]),
        ("a.csv", "text,text\na,b\n", ["'text' more than once"]),
        ("a.tsv", "text\tlabel\n", ["has no rows"]),
        ("a.tsv", "", ["has no rows"]),
        ("a.tsv", "text\tsize\na\tb\n", ["no column 'label'", "'size'", "--label-column"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', ["line 2", "no field 'label'"]),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "label": 1}\n', ["line 1", "no field 'label'"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{\n', ["line 2", "not JSON"]),
        ("a.jsonl", "[1]\n", ["line 1", "list, expected an object"]),
        ("a.jsonl", '{"text": 5, "label": 1}\n', ["line 1, column 'text'", "5 is no string"]),
        ("a.jsonl", '{"text": "a", "label": null}\n', ["line 1, column 'label'", "no label"]),
        (
            "a.jsonl",
            '{"text": "a", "label": [0, 4]}\n',
            ["column 'label': label [0, 4]", "one label"],
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": Infinity}\n',
            ["label inf, expected a string or a fin"],
        ),
        ("a.json", '[{"text": "a"}, 3]', ["item 2", "int, expected an object"]),
        ("a.xml", "<a>", ["unknown kind '.xml'", ".jsonl", ".parquet"]),
    ],
)
def test_tables_refused(tmp_path, name, text, words):
    with pytest.raises(ValueError) as told:
        read_texts(write(tmp_path / name, text), pairs=False)
    assert all(word in str(told.value) for word in words), told.value


def test_not_utf_8(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\nna\xefve\t1\n")
    with pytest.raises(ValueError, match=r"a.tsv, line 2: not UTF-8"):
        read_texts(tmp_path / "a.tsv", pairs=False)


# -- labels ---------------------------------------------------------------------------------


def with_labels(tmp_path, labels):
    lines = [json.dumps({"text": "a", "label": label}) for label in labels]
    return read_texts(write(tmp_path / "labels.jsonl", "\n".join(lines)), pairs=False)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 9], ("9", "10")),  # by value, not by digits
        (["10", "9 ", " 9"], ("9", "10")),
        ([1.0, 0, "1.0"], ("0", "1")),
        (["b", "a", 1], ("1", "a", "b")),
        ([True, False], ("false", "true")),
        ([-1, 1], ("-1", "1")),
        ([0.5, 2], ()),  # scores
        (["3.8", "5.000"], ()),
        (["3.8", "high"], ("3.8", "high")),
        (["nan", "inf", "1.5"], ("1.5", "inf", "nan")),
    ],
)
def test_label_names(tmp_path, labels, names):
    examples = with_labels(tmp_path, labels)
    found = labels_of(examples)
    assert found.names == names
    if names:
        assert found.encode(examples) == [names.index(label_name(label)) for label in labels]
    else:
        assert found.encode(examples) == [float(label) for label in labels]


def test_regression_as_asked(tmp_path):
    assert labels_of(with_labels(tmp_path, [1, 2]), regression=True).regression
    assert labels_of(with_labels(tmp_path, [1.5, 2]), regression=False).names == ("1.5", "2")
    with pytest.raises(ValueError, match=r"labels.jsonl, line 2, column 'label': 'x', expected a"):
        labels_of(with_labels(tmp_path, [1, "x"]), regression=True)


def test_a_models_own_order_stays(tmp_path):
    known = {"positive": 0, "negative": 1, "neutral": 2}
    examples = with_labels(tmp_path, ["negative", "positive"])
    assert labels_of(examples, known).names == ("positive", "negative", "neutral")
    assert labels_of(examples, {"LABEL_0": 0, "LABEL_1": 1}).names == ("negative", "positive")


def test_labels_refused(tmp_path):
    with pytest.raises(ValueError, match="every label is 'a', expected two"):
        labels_of(with_labels(tmp_path, ["a", "a"]))
    labels = labels_of(with_labels(tmp_path, ["a", "b"]))
    with pytest.raises(ValueError, match=r"line 2, .*label 'c', expected one of 'a', 'b'"):
        labels.encode(with_labels(tmp_path, ["a", "c"]))


# -- words with labels ----------------------------------------------------------------------

CONLL = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\n# HASH O\nPeter NNP B-PER\n"


@pytest.mark.parametrize("name", ["a.txt", "a.conll", "a.tsv"])
def test_conll(tmp_path, name):
    text = CONLL.replace(" ", "\t") if name == "a.tsv" else CONLL
    found = read_words(write(tmp_path / name, text))
    assert found.words == [["EU", "rejects"], ["#", "Peter"]]
    assert found.labels == [["B-ORG", "O"], ["O", "B-PER"]]
    assert list(found.places) == [3, 7]


def test_words_of_json_lines(tmp_path):
    rows = [{"tokens": [], "ner_tags": []}, {"tokens": ["EU", "rejects"], "ner_tags": [3, 0]}]
    found = read_words(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert (found.words, found.labels, found.places) == ([["EU", "rejects"]], [["3", "0"]], [2])


def test_other_spaces_part_no_words(tmp_path):
    found = read_words(write(tmp_path / "a.txt", "10\u00a0000  B-NUM\ncats O\n"))
    assert found.words == [["10\u00a0000", "cats"]] and found.labels == [["B-NUM", "O"]]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        *(
            ("a.jsonl", f'{{"tokens": ["a"], "labels": [{value}]}}', ["line 1, column 'labels'"])
            for value in ("NaN", "Infinity", '{"a": 1}', "[1]", "null")
        ),
        ("a.txt", "EU B-ORG\nrejects\n", ["line 2", "'rejects'", "a word and its label"]),
        ("a.txt", "\n\n", ["has no words"]),
        ("a.conllu", "1-2" + "\t_" * 9 + "\n1" + "\ta" * 9 + "\n", ["CoNLL-U", "a word first"]),
        ("a.csv", "text,label\n", ["not .csv"]),
        ("a.jsonl", '{"tokens": ["a"], "labels": []}', ["line 1", "1 words", "0 labels"]),
        ("a.jsonl", '{"tokens": "a b", "labels": ["x"]}', ["line 1, column 'tokens'", "list"]),
        ("a.jsonl", '{"tokens": [1], "labels": ["x"]}', ["column 'tokens'", "strings"]),
        ("a.jsonl", '{"words": ["a"]}', ["no column 'labels'", "--label-column"]),
    ],
)
def test_words_refused(tmp_path, name, text, words):
    with pytest.raises(ValueError) as told:
        read_words(write(tmp_path / name, text))
    assert all(word in str(told.value) for word in words), told.value
