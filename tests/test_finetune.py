"""`bert-fast finetune`: it learns, says so rightly, and what it saves is transformers' own."""

import csv
import json
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.training import finetune_command
from bert_fast.training.finetune import TASKS
from bert_fast.training.loop import Settings
from bert_fast.training.tags import tokens
from bert_fast.training.tasks import Job

from . import spy, tiny

NOUNS = ("cat", "dog", "mat", "sun", "rain")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "max_position_embeddings": 64, "initializer_range": 0.1}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig.from_pretrained(folder, **sizes, **off)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other cost more than such a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def finetune(model, tmp_path):
    """Runs the command; gives the result, metrics.json and the output folder."""

    def run(task, *options, output="out", model=model, **files):
        line = ["finetune", "--task", task, "--model", model, "--output", tmp_path / output]
        for name, file in files.items():
            line += [f"--{name}", file]
        result = CliRunner().invoke(app, [*map(str, line), *map(str, options)])
        file = tmp_path / output / "metrics.json"
        return result, json.loads(file.read_text()) if file.exists() else None, tmp_path / output

    return run


def fast(*more, epochs=6, lr=1e-3):
    return ("--epochs", epochs, "--lr", lr, "--batch-size", 8, *more)


def losses(metrics):
    return [row["loss"] for row in metrics["history"] if "loss" in row]


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sentence(noun, number):
    words = random.Random(number).sample(["sat", "ran", "on", "under", "the", "a", "in"], 4)
    return " ".join([*words[: number % 4], noun, *words[number % 4 :]])


@pytest.fixture
def sentences(tmp_path):
    """48 sentences; whether there is a cat in it."""
    rows = [
        {"text": sentence(NOUNS[i % 2], i), "label": ("dog", "cat")[i % 2 == 0]} for i in range(48)
    ]
    return lines(tmp_path / "sentences.jsonl", rows)


# -- classification -------------------------------------------------------------------------


def test_classification(finetune, sentences):
    result, metrics, folder = finetune(
        "classification", *fast(), train=sentences, validation=sentences
    )
    assert result.exit_code == 0, result.output
    assert metrics["accuracy"] == 1.0 and losses(metrics)[-1] < 0.1 < losses(metrics)[0]
    assert "48 examples, 2 labels" in result.stderr
    with (folder / "metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == losses(metrics)
    # Stock transformers, from the folder alone.
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(loaded) is transformers.BertForSequenceClassification
    assert loaded.config.id2label == {0: "cat", 1: "dog"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    classify = transformers.pipeline("text-classification", loaded, tokenizer=tokenizer)
    assert [row["label"] for row in classify(["the cat sat", "a dog ran"])] == ["cat", "dog"]


def test_accuracy_is_of_the_saved_model_on_the_validation_data(finetune, sentences, tmp_path):
    rows = [
        {
            "text": sentence(noun, i) + " sat" * (i % 5),
            "label": noun if i % 5 else "cat",  # some are wrong
        }
        for i, noun in enumerate(("cat", "dog", "dog") * 15)
    ]
    held_out = lines(tmp_path / "held_out.jsonl", rows)
    _, metrics, folder = finetune("classification", *fast(), train=sentences, validation=held_out)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in rows:
        with torch.inference_mode():
            found = loaded(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item()
        right += loaded.config.id2label[found] == row["label"]
    assert metrics["accuracy"] == pytest.approx(right / len(rows))
    assert 0.7 < metrics["accuracy"] < 1.0  # in another order of the rows about 0.55
    evaluations = [row["eval_accuracy"] for row in metrics["history"] if "eval_accuracy" in row]
    assert len(evaluations) == 6 and evaluations[-1] == metrics["accuracy"]


@pytest.mark.parametrize("task", ["classification", "spans"])
def test_losses_are_those_of_transformers_own_forward(
    finetune, sentences, questions, task, monkeypatch
):
    train = sentences if task == "classification" else questions
    options = fast("--max-length", 24, epochs=8, lr=5e-4)
    seen = spy.forwards(monkeypatch, transformers.BertForSequenceClassification)
    _, ours, folder = finetune(task, *options, train=train)
    assert len(seen) == len(losses(ours)) >= 20  # by our forward, and padding spared
    spared = sum(one.padded - one.tokens for one in seen)
    assert (spared > 0) == (task == "spans")  # all sentences are of a length
    assert all((one.rows is None) == (task == "spans") for one in seen)
    seen.clear()
    _, theirs, other = finetune(task, *options, "--no-accelerate", train=train, output="hf")
    assert not seen
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-4)
    kind = {"classification": "SequenceClassification", "spans": "QuestionAnswering"}[task]
    kind = getattr(transformers, f"AutoModelFor{kind}")
    weights = [
        torch.nn.utils.parameters_to_vector(kind.from_pretrained(path).parameters())
        for path in (folder, other)
    ]
    assert (weights[0] - weights[1]).norm() <= 1e-3 * weights[1].norm()


def test_a_seed_settles_everything(finetune, sentences):
    runs = [
        losses(finetune("classification", *fast("--seed", seed, epochs=1), train=sentences,
                        output=str(i))[1])
        for i, seed in enumerate([1, 1, 2])
    ]  # fmt: skip
    assert runs[0] == runs[1] != runs[2]


def test_resumed_where_it_was_stopped(finetune, sentences):
    options = fast("--save-steps", 4, epochs=2)
    _, whole, folder = finetune("classification", *options, train=sentences, validation=sentences)
    rows = (folder / "metrics.csv").read_text()
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-12"}
    shutil.rmtree(folder / "checkpoint-12")
    files = {"train": sentences, "validation": sentences}
    result, again, _ = finetune("classification", *options, **files)
    assert result.exit_code == 2 and "resume it" in result.stderr
    result, again, _ = finetune("classification", *options, "--resume", **files)
    assert result.exit_code == 0 and again["accuracy"] == whole["accuracy"]
    assert losses(again) == losses(whole)
    named = [list(csv.DictReader(text.splitlines()))
             for text in (rows, (folder / "metrics.csv").read_text())]  # fmt: skip
    assert [row["loss"] for row in named[0]] == [row["loss"] for row in named[1]]
    text = sentences.read_text()
    text = text.replace('"dog"}', '"?"}').replace('"cat"}', '"dog"}').replace('"?"}', '"cat"}')
    sentences.write_text(text)
    result, _, _ = finetune("classification", *options, "--resume", **files)
    assert result.exit_code == 2 and "with contents" in result.stderr


def test_pairs(finetune, tmp_path):
    rows = [(a, b, int(a == b)) for a in NOUNS for b in NOUNS]
    rows += [row for row in rows if row[2]] * 3
    text = "sentence1\tsentence2\tlabel\n" + "".join(
        f"the {a}\ta {b}\t{label}\n" for a, b, label in rows
    )
    (tmp_path / "pairs.tsv").write_text(text)
    file = tmp_path / "pairs.tsv"
    _, metrics, folder = finetune("pairs", *fast(epochs=25), train=file, validation=file)
    assert metrics["accuracy"] > 0.9
    assert transformers.AutoConfig.from_pretrained(folder).id2label == {0: "0", 1: "1"}


def test_regression(finetune, tmp_path):
    rows = [{"text": sentence(NOUNS[i % 3], i), "label": i % 3 * 2.5} for i in range(48)]
    file = lines(tmp_path / "scores.jsonl", rows)
    result, metrics, folder = finetune(
        "classification", *fast(epochs=12), train=file, validation=file
    )
    assert "regression" in result.stderr
    assert metrics["pearson"] > 0.9 and metrics["spearman"] > 0.8 and metrics["mse"] < 1
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.num_labels == 1 and config.problem_type == "regression"


def test_a_trained_head_is_kept(finetune, sentences):
    _, _, folder = finetune("classification", *fast(), train=sentences)
    options = ("--max-steps", 1, "--lr", 1e-9)
    _, again, _ = finetune(
        "classification", *options, model=folder, train=sentences, output="again"
    )
    assert losses(again)[0] < 0.1


def test_token_budget(finetune, sentences):
    _, metrics, _ = finetune("classification", "--epochs", 1, "--batch-tokens", 40, train=sentences)
    assert len(losses(metrics)) == 10  # 48 sentences of 7 tokens: 5 in a batch


def test_without_validation_there_is_the_loss_only(finetune, sentences):
    result, metrics, _ = finetune("classification", *fast(epochs=1), train=sentences)
    assert result.exit_code == 0 and "trained" in result.stderr
    assert set(metrics) == {"task", "seed", "history"} and len(losses(metrics)) == 6


# -- tokens ---------------------------------------------------------------------------------


def test_tokens(finetune, tmp_path):
    text = ""
    for i in range(40):
        tags = {"cat": "B-PET", "dog": "B-PET", "mats": "I-PET"}
        words = [random.Random(i).choice(["the", "sunrunning", "on"]), NOUNS[i % 3], "mats", "."]
        words = words if i % 2 else [*words[:2], "."]
        text += "".join(f"{word} {tags.get(word, 'O')}\n" for word in words) + "\n"
    (tmp_path / "train.conll").write_text(text)
    file = tmp_path / "train.conll"
    _, metrics, folder = finetune("tokens", *fast(epochs=12), train=file, validation=file)
    assert metrics["accuracy"] == 1.0 and metrics["f1"] == 1.0
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    assert loaded.config.id2label == {0: "B-PET", 1: "I-PET", 2: "O"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tag = transformers.pipeline("token-classification", loaded, tokenizer=tokenizer)
    assert [row["entity"] for row in tag("the cat mats")][:2] == ["B-PET", "I-PET"]


def test_the_first_piece_of_a_word_has_its_label(model, tmp_path):
    (tmp_path / "train.conll").write_text("mats B-PET\nran O\n\n\u200b O\n\ncats I-PET\n")
    job = Job("tokens", model, Settings(tmp_path), tmp_path / "train.conll")
    found = [item["labels"].tolist() for item in tokens(job).items]
    # [CLS] mat ##s ran [SEP]; a sentence of no known characters is left out.
    assert found == [[-100, 0, -100, 2, -100], [-100, 1, -100, -100]]


# -- spans ----------------------------------------------------------------------------------


def squad(impossible):
    """Questions for the word before a noun, in contexts that need several windows."""
    data = []
    for i in range(12):
        words = [
            random.Random(i + 100 * n).choice(["sat", "ran", "on", "under"]) for n in range(30)
        ]
        noun = NOUNS[i % 5]
        place = (7 * i) % 28
        words[place + 1] = noun
        context = "  ".join(words)
        start = len("  ".join(words[:place])) + 2 * bool(place)
        answer = [{"text": words[place], "answer_start": start}]
        asked = [{"id": f"{i}", "question": noun, "answers": answer * (1 + i % 3)}]
        if impossible:
            other = NOUNS[(i + 1) % 5]
            gone = {"answers": [], "is_impossible": True}
            asked = [
                {**asked[0], "is_impossible": False},
                {"id": f"{i}x", "question": other, **gone},
            ]
        data.append({"title": f"{i}", "paragraphs": [{"context": context, "qas": asked}]})
    return {"version": "v2.0" if impossible else "1.1", "data": data}


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "squad.json"
    file.write_text(json.dumps(squad(impossible=False)))
    return file


WINDOWS = ("--max-length", 24, "--doc-stride", 6)
OVERFIT = fast(*WINDOWS, epochs=40, lr=2e-3)


def test_spans(finetune, questions, tmp_path):
    result, metrics, folder = finetune("spans", *OVERFIT, train=questions, validation=questions)
    assert result.exit_code == 0, result.output
    assert metrics["f1"] >= 90 and metrics["exact_match"] >= 90 and metrics["total"] == 12
    predictions = json.loads((folder / "predictions.json").read_text())
    golds = {
        q["id"]: q["answers"][0]["text"]
        for article in squad(False)["data"]
        for q in article["paragraphs"][0]["qas"]
    }
    assert predictions.keys() == golds.keys()
    right = sum(predictions[key] == golds[key] for key in golds)
    assert metrics["exact_match"] == pytest.approx(100 * right / 12)
    n_best = json.loads((folder / "nbest_predictions.json").read_text())
    assert all(n_best[key][0]["text"] == text for key, text in predictions.items())
    assert not (folder / "null_odds.json").exists()
    assert type(transformers.AutoModelForQuestionAnswering.from_pretrained(folder)) is (
        transformers.BertForQuestionAnswering
    )
    # The saved model answers the same, without training.
    for name in ("predict", "validation"):
        _, again, other = finetune(
            "spans", *WINDOWS, model=folder, output=name, **{name: questions}
        )
        assert json.loads((other / "predictions.json").read_text()) == predictions
        assert again["f1"] == metrics["f1"] and not (other / "model.safetensors").exists()


def test_spans_without_an_answer(finetune, tmp_path):
    file = tmp_path / "squad2.json"
    file.write_text(json.dumps(squad(impossible=True)))
    _, metrics, folder = finetune("spans", *OVERFIT, train=file, predict=file)
    assert metrics["f1"] >= 90 and metrics["NoAns_f1"] >= 90 and metrics["HasAns_total"] == 12
    odds = json.loads((folder / "null_odds.json").read_text())
    predictions = json.loads((folder / "predictions.json").read_text())
    assert all((odds[key] > 0) is (text == "") for key, text in predictions.items())
    _, strict, _ = finetune(
        "spans", *WINDOWS, "--null-threshold", 1e9, model=folder, predict=file, output="never"
    )
    assert strict["NoAns_f1"] == 0


def test_spans_from_a_checkpoint_of_another_head(finetune, questions, model, tmp_path):
    config = transformers.BertConfig.from_pretrained(model, num_labels=3)
    other = tmp_path / "three"
    transformers.BertForSequenceClassification(config).save_pretrained(other)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(other)
    result, metrics, _ = finetune(
        "spans", *fast(*WINDOWS, epochs=1), model=other, train=questions, validation=questions
    )
    assert result.exit_code == 0 and "f1" in metrics, result.output


def test_spans_leave_out_answers_that_are_not_there(finetune, tmp_path):
    document = squad(impossible=False)
    for article in document["data"][:3]:
        article["paragraphs"][0]["qas"][0]["answers"] = [{"text": "owl", "answer_start": 3}]
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(document))
    result, _, _ = finetune("spans", *fast("--max-length", 24, epochs=1), train=file)
    assert "3 of 12 questions left out" in result.stderr and "'0'" in result.stderr
    for article in document["data"]:
        article["paragraphs"][0]["qas"][0]["answers"] = [{"text": "owl", "answer_start": 3}]
    file.write_text(json.dumps(document))
    result, _, _ = finetune("spans", "--epochs", 1, train=file, output="none")
    assert result.exit_code == 2 and "no question has an answer" in result.stderr


# -- embedding ------------------------------------------------------------------------------


def test_an_embedding_model_is_saved_as_it_was_trained(finetune, model, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = tmp_path / "lower"
    made = sentence_transformers.SentenceTransformer(str(model), device="cpu")
    made.save(str(folder))
    for name, settings in (
        ("tokenizer_config.json", {"do_lower_case": False}),  # the words alone make them small
        ("sentence_bert_config.json", {"do_lower_case": True}),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "the: "}, "default_prompt_name": "query"},
        ),
    ):
        given = folder / name
        given.write_text(json.dumps(json.loads(given.read_text()) | settings))
    file = lines(tmp_path / "pairs.jsonl", [{"text": "The CAT", "text_b": "A Dog SAT"}] * 8)
    result, _, out = finetune("embedding", *fast(epochs=1), "--model", folder, train=file)
    assert result.exit_code == 0 and "default prompt 'query'" in result.stderr, result.output
    loaded = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    upper, lower = loaded.encode(["The CAT sat", "the cat sat"])
    np.testing.assert_allclose(upper, lower)


@pytest.mark.parametrize("scores", [True, False])
def test_embedding(finetune, tmp_path, scores):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    rows = [
        {"text": sentence(a, i), "text_b": sentence(b, 7 * i + 1), "label": 5.0 * (a == b)}
        for i, (a, b) in enumerate((a, b) for a in NOUNS for b in NOUNS)
    ]
    rows += [row for row in rows if row["label"]] * 2
    if not scores:  # one partner is that of two texts
        rows = [{"text": f"the {noun}", "text_b": f"{noun} sat on"} for noun in NOUNS]
        rows.append({"text": f"a {NOUNS[0]}", "text_b": rows[0]["text_b"]})
    file = lines(tmp_path / "pairs.jsonl", rows)
    result, metrics, folder = finetune(
        "embedding", *fast(epochs=15 if scores else 30), train=file, validation=file
    )
    assert result.exit_code == 0, result.output
    if scores:
        assert metrics["pearson"] > 0.8 and metrics["spearman"] > 0.6
    else:
        assert metrics["accuracy"] == 1.0
    loaded = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    texts = [[row[name] for row in rows] for name in ("text", "text_b")]
    first, second = (loaded.encode(part, normalize_embeddings=True) for part in texts)
    cosines = (first * second).sum(-1)
    if scores:
        labels = [row["label"] for row in rows]
        assert np.corrcoef(cosines, labels)[0, 1] == pytest.approx(metrics["pearson"], abs=1e-4)


# -- what is refused ------------------------------------------------------------------------


def test_tasks_of_command_and_library():
    assert tuple(TASKS) == finetune_command.TASKS


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("guess", (), ["unknown task 'guess'", "classification, pairs, spans"]),
        ("classification", ("--dtype", "fp8"), ["unknown dtype 'fp8'", "fp32, bf16"]),
        ("classification", ("--epochs", 0), ["epochs is 0"]),
        ("classification", ("--lr", -1), ["lr is -1"]),
        ("classification", ("--max-length", 65), ["--max-length is 65, expected 8 to 64"]),
        ("classification", ("--text-column", "body"), ["no column 'body'", "--text-column"]),
        ("classification", ("--batch-tokens", 3), ["3 tokens", "one example has"]),
        ("pairs", (), ["no column 'text_b'", "'text', 'label'"]),
        ("tokens", (), ["column 'text'", "list"]),
        ("spans", (), ["no 'question'"]),
        ("classification", ("--predict", "x.json"), ["x.json: No such file"]),
        ("classification", ("--regression",), ["'cat', expected a number"]),
    ],
)
def test_refused(finetune, sentences, task, options, words):
    result, metrics, folder = finetune(task, *options, train=sentences)
    told = result.stderr.strip().splitlines()
    assert result.exit_code == 2, result.output
    assert told[-1].startswith("bert-fast: ") and all(word in told[-1] for word in words), told
    assert metrics is None and not (folder / "model.safetensors").exists()


def test_files_and_folders_refused(finetune, sentences, tmp_path):
    wrong = lines(tmp_path / "other.jsonl", [{"text": "a", "label": "owl"}])
    (tmp_path / "a_file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    other = tiny.save(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    labels = ["other.jsonl, line 1", "'owl'", "'cat', 'dog'"]
    for files, words in [
        ({}, ["nothing to do", "--train, --validation or --predict"]),
        ({"train": tmp_path / "absent.csv"}, ["absent.csv: No such file"]),
        ({"train": sentences, "validation": wrong}, labels),
        ({"train": sentences, "output": "a_file"}, ["a_file is a file"]),
        ({"train": sentences, "model": tmp_path / "absent"}, ["no model at"]),
        ({"train": sentences, "model": tmp_path / "broken"}, ["cannot load"]),
        ({"train": sentences, "model": other}, ["is [32] in its weights, [16] by its config.json"]),
    ]:
        result, _, _ = finetune("classification", **files)
        assert result.exit_code == 2, result.output
        assert all(word in result.stderr for word in words), result.stderr
