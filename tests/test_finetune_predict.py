"""`bert-fast finetune --predict`, and without --train: as stock transformers has it, row by row."""

import json
import os

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.training import classes, embedding
from bert_fast.training.items import outputs_of

from . import tiny
from .test_cli import refused

TEXTS = [text for text in tiny.TEXTS if text]  # of several lengths, and not sorted by them
PAIRS = list(zip(TEXTS, reversed(TEXTS), strict=True))
NAMES = ("owl", "cat", "dog")  # in no order


@pytest.fixture
def trained(tmp_path):
    """A folder of a model with a head, whose weights are large enough for answers to differ."""

    def make(kind="SequenceClassification", names=NAMES, **config):
        folder = tiny.save(tmp_path / "model")
        labels = {
            "id2label": dict(enumerate(names)),
            "label2id": {n: i for i, n in enumerate(names)},
        }
        cls = getattr(transformers, f"BertFor{kind}")
        torch.manual_seed(1)
        model = cls(transformers.BertConfig.from_pretrained(folder, **labels, **config))
        for parameter in model.parameters():
            if parameter.dim() == 2:  # biases would be the same for every text
                parameter.data.normal_(0.0, 0.5)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def run(tmp_path):
    """Runs the command; gives the result, the rows of predictions.jsonl and the output folder."""

    def command(task, model, *options, output="out", **files):
        line = ["finetune", "--task", task, "--model", model, "--output", tmp_path / output]
        for name, file in files.items():
            line += [f"--{name}", file]
        result = CliRunner().invoke(app, [*map(str, line), *map(str, options)])
        file = tmp_path / output / "predictions.jsonl"
        rows = file.read_text().splitlines() if file.exists() else []
        return result, list(map(json.loads, rows)), tmp_path / output

    return command


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def logits_of(folder, *texts, kind="SequenceClassification"):
    """Those of stock transformers, one text (or pair) at a time."""
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [
            model(**tokenizer(*row, return_tensors="pt", truncation=True, max_length=24)).logits[0]
            for row in zip(*texts, strict=True)
        ]


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


# -- a label or a score for a text or two -------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "pairs"])
def test_every_row_gets_its_label(run, trained, tmp_path, task):
    model = trained()
    texts = [TEXTS] if task == "classification" else list(zip(*PAIRS, strict=True))
    # Labels that training would refuse are not read.
    labels = [None, "bird", "cat", "", -1, [1]]
    rows = [
        {**dict(zip(("text", "text_b"), row, strict=False)), "label": label}
        for *row, label in zip(*texts, labels, strict=True)
    ]
    file = lines(tmp_path / "rows.jsonl", rows)
    result, found, folder = run(task, model, "--label-column", "gold", predict=file)
    assert result.exit_code == 0, result.output
    shares = [logits.softmax(-1).tolist() for logits in logits_of(model, *texts)]
    assert [list(row["probabilities"]) for row in found] == [list(NAMES)] * len(rows)
    np.testing.assert_allclose(
        [list(row["probabilities"].values()) for row in found], shares, atol=1e-5
    )
    assert [row["label"] for row in found] == [NAMES[np.argmax(row)] for row in shares]
    assert np.ptp(shares, axis=0).max() > 0.1  # in another order they would not be these
    assert {file.name for file in folder.iterdir()} == {"predictions.jsonl"}
    assert f"predicted; {folder}" in result.stderr


@pytest.mark.parametrize(
    ("name", "header", "row"),
    [
        ("test.tsv", "index\tsentence1\tsentence2\n", "{}\t{}\t{}\n"),
        ("test.csv", "question1,question2\n", '"{1}","{2}"\n'),
        ("test.jsonl", "", '{{"anchor": "{1}", "positive": "{2}"}}\n'),
    ],
)
def test_scores_of_files_without_a_column_of_labels(run, trained, tmp_path, name, header, row):
    model = trained(names=["LABEL_0"])
    rows = [row.format(i, *pair) for i, pair in enumerate(PAIRS)]
    (tmp_path / name).write_text(header + "".join(rows))
    result, found, _ = run("pairs", model, predict=tmp_path / name)
    assert result.exit_code == 0, result.output
    wanted = [logits.item() for logits in logits_of(model, *zip(*PAIRS, strict=True))]
    assert [list(row) for row in found] == [["score"]] * len(PAIRS)
    np.testing.assert_allclose([row["score"] for row in found], wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_trained_model_predicts_as_it_does_later_on(run, tmp_path, dtype):
    model = tiny.save(tmp_path / "model")
    file = lines(
        tmp_path / "rows.jsonl", [{"text": t, "label": i % 2} for i, t in enumerate(TEXTS)]
    )
    # One text a row, as there is to train on.
    asked = lines(tmp_path / "asked.jsonl", [{"text": a, "text_b": b} for a, b in PAIRS])
    options = ("--max-steps", 2, "--lr", 0.01, "--dtype", dtype)
    result, first, out = run(
        "classification", model, *options, train=file, validation=file, predict=asked
    )
    assert result.exit_code == 0 and (out / "model.safetensors").exists(), result.output
    result, again, other = run(
        "classification", out, "--dtype", dtype, output="again", validation=file, predict=asked
    )
    assert again == first and {row["label"] for row in first} <= {"0", "1"}
    assert metrics_of(other)["accuracy"] == metrics_of(out)["accuracy"]
    assert {file.name for file in other.iterdir()} == {"metrics.json", "predictions.jsonl"}
    alone = run("classification", out, output="fp32", predict=file)[1]
    assert (alone == again) == (dtype == "fp32")


def test_evaluation_alone(run, trained, tmp_path):
    model = trained()
    best = [NAMES[logits.argmax()] for logits in logits_of(model, TEXTS)]
    wrong = [NAMES[NAMES.index(best[0]) - 1], *best[1:]]
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, wrong, strict=True)]
    result, found, folder = run(
        "classification", model, validation=lines(tmp_path / "a.jsonl", rows)
    )
    assert metrics_of(folder)["accuracy"] == pytest.approx(1 - 1 / len(TEXTS)), result.output
    assert found == [] and {file.name for file in folder.iterdir()} == {"metrics.json"}
    rows[2]["label"] = "bird"
    result, _, _ = run("classification", model, validation=lines(tmp_path / "a.jsonl", rows))
    refused(result, "a.jsonl, line 3", "'bird'", "'owl', 'cat', 'dog'")


# -- a label for each word ----------------------------------------------------------------------

TAGS = ("O", "B-PET", "I-PET")
SENTENCES = [
    ["the", "cats", "sat"],
    [],
    ["mats"],
    # Windows begin at first pieces and at later ones of these.
    "a cats dogs the running sun mats mats rain in under the cat cats dogs sat on mats".split() * 3,
    ["dog", "\u200b", "ran"],  # the second has no token
    ["cat" + "s" * 40],  # whole windows are inside of it
]


def tags_by_hand(folder, sentences, length):
    """Every word's tag by stock transformers, of windows of `length` tokens that share a third:
    from the one in which the nearer end is farther away, the first one of equals.
    """
    room, shared = length - 2, length // 3
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def tags(words):
        pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        flat = [piece for word in pieces for piece in word]
        places = np.cumsum([0, *map(len, pieces)])
        found = [[] for _ in words]
        for start in range(0, max(len(flat) - shared, 1), room - shared):
            part = flat[start : start + room]
            ids = [tokenizer.cls_token_id, *part, tokenizer.sep_token_id]
            with torch.inference_mode():
                best = model(input_ids=torch.tensor([ids])).logits[0, 1:].argmax(-1)
            for i, word in enumerate(pieces):
                at = places[i] - start
                if word and 0 <= at < len(part):
                    found[i].append((min(at, len(part) - 1 - at), TAGS[best[at]]))
        return [max(rows, key=lambda row: row[0])[1] if rows else None for rows in found]

    return [tags(words) for words in sentences]


def test_every_word_gets_its_label(run, trained, tmp_path):
    model = trained("TokenClassification", TAGS)
    file = lines(tmp_path / "a.jsonl", [{"tokens": words, "id": 1} for words in SENTENCES])
    result, found, folder = run("tokens", model, "--max-length", 14, predict=file)
    assert result.exit_code == 0, result.output
    assert [row["tokens"] for row in found] == SENTENCES
    assert [row["labels"] for row in found] == tags_by_hand(model, SENTENCES, 14)
    assert None not in found[3]["labels"] and found[4]["labels"][1] is None
    assert len(set(found[3]["labels"])) > 1
    assert "2 of 6 sentences have more than 14 tokens and are read in windows" in result.stderr
    assert "1 words have no token in this model, and so no label" in result.stderr
    assert {file.name for file in folder.iterdir()} == {"predictions.jsonl"}
    # What the windows say is what is measured, of all words.
    rows = [row for row in found if row["tokens"] and None not in row["labels"]]
    rows[-1]["labels"][-1] = next(tag for tag in TAGS if tag != rows[-1]["labels"][-1])
    options = ("--max-length", 14, "--validation", lines(tmp_path / "b.jsonl", rows))
    _, _, folder = run("tokens", model, *options, output="measured")
    words = sum(len(row["tokens"]) for row in rows)
    assert metrics_of(folder)["accuracy"] == pytest.approx(1 - 1 / words)


@pytest.mark.parametrize("fields", ["", " _ O", "\t_\t"])
def test_conll_with_and_without_labels(run, trained, tmp_path, fields):
    model = trained("TokenClassification", TAGS)
    words = [sentence for sentence in SENTENCES[:3] if sentence]
    text = "\n\n".join("\n".join(word + fields for word in sentence) for sentence in words)
    (tmp_path / "a.conll").write_text(f"# sent_id = 1\n{text}\n")
    result, found, _ = run("tokens", model, predict=tmp_path / "a.conll")
    assert [row["tokens"] for row in found] == words, result.output
    assert [row["labels"] for row in found] == tags_by_hand(model, words, 24)
    told = f"2 sentences; of the {3 if fields else 1} fields of a line the first is its word"
    assert (told in result.stderr) == bool(fields)


# -- a cosine for each pair ---------------------------------------------------------------------


def test_cosines(run, tmp_path, monkeypatch):
    library = pytest.importorskip("sentence_transformers")
    model = tiny.save(tmp_path / "model")
    rows = [{"text": a, "text_b": b, "label": "none"} for a, b in PAIRS]
    file = lines(tmp_path / "pairs.jsonl", rows)
    at_once = []
    monkeypatch.setattr(embedding, "PAIRS_AT_ONCE", 2)
    monkeypatch.setattr(
        embedding,
        "outputs_of",
        lambda model, items, *more: at_once.append(len(items)) or outputs_of(model, items, *more),
    )
    result, found, folder = run("embedding", model, predict=file)
    assert result.exit_code == 0, result.output
    assert at_once == [4] * (len(PAIRS) // 2)  # both texts of two pairs
    whole = library.SentenceTransformer(str(model), device="cpu")
    first, second = (
        whole.encode(part, normalize_embeddings=True) for part in zip(*PAIRS, strict=True)
    )
    np.testing.assert_allclose(
        [row["cosine"] for row in found], (first * second).sum(-1), atol=1e-5
    )
    assert {file.name for file in folder.iterdir()} == {"predictions.jsonl"}
    told = "is no folder of sentence-transformers': the mean of all tokens is taken"
    assert f"{model} {told}" in result.stderr
    whole.save(str(tmp_path / "whole"))
    result, again, _ = run("embedding", tmp_path / "whole", output="again", predict=file)
    assert again == found and told not in result.stderr
    rows = [{**row, "label": cosine["cosine"]} for row, cosine in zip(rows, found, strict=True)]
    _, _, folder = run("embedding", model, output="measured", validation=lines(file, rows))
    assert metrics_of(folder)["pearson"] == pytest.approx(1)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "rows", "options", "words"),
    [
        ("classification", [{"text": "a"}, {"text": None}], (), ["line 2, column 'text'", "None"]),
        ("classification", [{"label": "a"}], (), ["no column 'text'", "--text-column"]),
        ("pairs", [{"text": "a", "label": 1}], (), ["no column 'text_b'", "--text-b-column"]),
        ("classification", [{"text": "a"}], ("--regression",), ["--regression, but", "3 labels"]),
        ("tokens", [{"tokens": ["a"]}], (), ["a BertForSequenceClassification", "--train"]),
        ("spans", [{"id": 1, "question": "a", "context": "a"}], (), ["qa_outputs.bias", "--train"]),
    ],
)
def test_refused(run, trained, tmp_path, task, rows, options, words):
    file = lines(tmp_path / "a.jsonl", rows)
    result, _, folder = run(task, trained(), *options, predict=file)
    refused(result, *words)
    assert not folder.exists()


def test_a_new_head_is_not_measured(run, tmp_path):
    model = tiny.save(tmp_path / "model")
    file = lines(
        tmp_path / "a.jsonl", [{"text": "a", "label": "x", "tokens": ["a"], "labels": [0]}]
    )
    for task in ("classification", "tokens"):
        for name in ("validation", "predict"):
            result, _, _ = run(task, model, **{name: file})
            refused(result, "its head is not trained for this task", "classifier.bias", "--train")
    refused(run("classification", model)[0], "nothing to do", "--validation or --predict")


@pytest.mark.parametrize(
    ("kind", "words"),
    [("multi_label_classification", "any number of labels"), ("regression", "3 scores for a text")],
)
def test_several_answers_for_a_text_are_refused(run, trained, tmp_path, kind, words):
    file = lines(tmp_path / "a.jsonl", [{"text": "a"}])
    result, _, _ = run("classification", trained(problem_type=kind), predict=file)
    refused(result, words, "expected one")


def test_refused_before_the_work_is_done(run, trained, tmp_path, monkeypatch):
    model = trained()
    file = lines(tmp_path / "a.jsonl", [{"text": "a", "label": "cat"}])
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(classes, "outputs_of", None)  # called, it ends in a TypeError
    result, _, _ = run("classification", model, output="file/out", validation=file)
    refused(result, tmp_path / "file", "Not a directory")
    monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK)
    result, _, _ = run("classification", model, validation=file, predict=file)
    refused(result, tmp_path / "out", "is not writable")
    result, _, _ = run("classification", model, "--resume", predict=file)
    refused(result, "--resume", "give --train")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(run("classification", model, predict=file)[0], "finetune need accelerate")


def test_a_models_own_metrics_stay(run, trained, tmp_path):
    model = trained()
    (model / "metrics.json").write_text("of its training")
    file = lines(tmp_path / "a.jsonl", [{"text": "a", "label": "cat"}])
    result, _, _ = run("classification", model, output="model", validation=file)
    refused(result, "the model's own folder", "choose another --output")
    result, found, _ = run("classification", model, output="model", predict=file)
    assert len(found) == 1, result.output
    assert (model / "metrics.json").read_text() == "of its training"
