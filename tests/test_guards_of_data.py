"""Metrics, tables, masks and pairs, each rule by itself: what bugs planted there once survived."""

import json

import numpy as np
import pytest
from transformers import BertTokenizer

from bert_fast.training.corpus import Corpus
from bert_fast.training.masking import Masking
from bert_fast.training.pairs import SPECIALS, SentencePairs
from bert_fast.training.readers import (
    Columns,
    classes_of,
    in_order,
    label_name,
    labelled,
    labels_of,
    others,
    read_texts,
)
from bert_fast.training.scores import entities, is_bio, pearson, spearman
from bert_fast.training.squad_metrics import evaluate, normalize
from bert_fast.training.words import read_words

# -- metrics -------------------------------------------------------------------------------------


def test_an_article_between_leaves_a_space():
    assert normalize("cat—a—dog") == "cat— —dog"


def test_scores_of_version_2_by_kind():
    found = evaluate({"1": ["the"], "2": ["cat"]}, {"1": "", "2": "cat"}, 2)
    assert found["HasAns_total"] == 2 and "NoAns_total" not in found and found["f1"] == 100
    assert evaluate({"1": ["cat"]}, {}, 2) == {"exact_match": 0, "f1": 0, "total": 0}


def test_correlations():
    x, y = np.array([1.0, 2, 2, 5, 9]), np.array([10.0, 30, 20, 20, 100])
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = np.array([1, 2.5, 2.5, 4, 5]), np.array([1, 4, 2.5, 2.5, 5])
    assert spearman(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    tied = np.array([1.0, 1, 1, 2, 3])  # ranks 2, 2, 2, 4, 5
    assert spearman(tied, x) == pytest.approx(np.corrcoef([2, 2, 2, 4, 5], ranks[0])[0, 1])
    assert pearson(x, x * 0 + 3) == spearman(x * 0, y) == 0.0


@pytest.mark.parametrize(
    ("names", "bio"),
    [
        (["O", "B-A", "I-A"], True),
        (["B-A"], True),
        (["O", "I-A"], False),
        (["O"], False),
        (["O", "B-A", "I-A", "E-A", "S-A"], False),
        (["O", "B-A", "NOUN"], False),
        (["NOUN", "VERB"], False),
    ],
)
def test_which_labels_are_bio(names, bio):
    assert is_bio(names) is bio


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (["B-A", "I-A", "O"], {("A", 0, 2)}),
        (["B-A", "I-B"], {("A", 0, 1), ("B", 1, 2)}),
        (["O", "I-A", "I-A", "B-A"], {("A", 1, 3), ("A", 3, 4)}),
        (["O", "O"], set()),
    ],
)
def test_entities(tags, found):
    assert entities(tags) == found


# -- tables and words ----------------------------------------------------------------------------


def rows_of(tmp_path, *rows, name="a.jsonl"):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_label_that_is_not_a_number_is_none(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    columns = {"text": ["a", "b", "c"], "label": [1.0, 2.0, float("nan")]}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no label"):
        read_texts(tmp_path / "a.parquet", None)


def test_the_label_of_a_glue_task_is_of_its_texts(tmp_path):
    file = rows_of(tmp_path, {"a": "x", "b": "y", "Quality": 1})
    with pytest.raises(ValueError, match="no column 'label'"):
        read_texts(file, True, Columns(text="a", text_b="b"))


def test_labels_that_are_not_read_may_be_absent(tmp_path):
    found = read_texts(rows_of(tmp_path, {"text": "x"}), None, Columns(label="stars"), None)
    assert found.texts == ["x"] and found.labels == []


def test_the_label_column_is_used(tmp_path):
    assert others(read_texts(rows_of(tmp_path, {"text": "x", "label": 1, "n": 2}), None)) == ["n"]


@pytest.mark.parametrize(
    ("times", "kept"),
    [((1, 100, 100), True), ((1, 101, 101), False), ((1, 50, 200), True), ((1, 200, 50), True)],
)
def test_how_rare_minus_one_has_to_be(tmp_path, times, kept):
    rows = [
        {"text": "x", "label": i} for i, n in zip((-1, 0, 1), times, strict=True) for _ in range(n)
    ]
    found = classes_of(read_texts(rows_of(tmp_path, *rows), None), ())
    assert ("-1" in found) is kept


def test_rows_without_a_label_go_with_both_texts(tmp_path):
    rows = [
        {"text": f"a{i}", "text_b": f"b{i}", "label": label} for i, label in enumerate([0, -1, 1])
    ]
    kept = labelled(read_texts(rows_of(tmp_path, *rows), True), {"0", "1"})
    assert kept.texts == ["a0", "a2"] and kept.texts_b == ["b0", "b2"] and kept.labels == [0, 1]
    assert kept.table.rows == [rows[0], rows[2]] and kept.where(1).startswith(
        f"{tmp_path / 'a.jsonl'}, line 3"
    )


def test_the_order_of_labels():
    assert in_order({"b"}, {"b": 1, "a": 0}) == ("a", "b")
    assert in_order({"10", "2", "-1"}) == ("-1", "2", "10")


@pytest.mark.parametrize(
    ("value", "name"), [("v1.0", "v1.0"), ("-1.0", "-1"), (1e16, "1" + 16 * "0"), ("x.0", "x.0")]
)
def test_names_of_labels(value, name):
    assert label_name(value) == name


def test_truth_is_no_score(tmp_path):
    examples = read_texts(
        rows_of(tmp_path, {"text": "x", "label": True}, {"text": "y", "label": False}), None
    )
    with pytest.raises(ValueError, match="expected a number"):
        labels_of(examples, regression=True)


def conll(tmp_path, text):
    file = tmp_path / "a.conll"
    file.write_text(text)
    return file


@pytest.mark.parametrize("line", ["cat\t ", " \tB-A"])
def test_a_line_with_half_of_what_it_needs(tmp_path, line):
    with pytest.raises(ValueError, match=r"line 2.*expected a word and its label"):
        read_words(conll(tmp_path, f"the\tO\n{line}\n"))


def test_words_and_labels_are_bare(tmp_path):
    found = read_words(conll(tmp_path, " the \t 1.0 \nsat\t0\n"))
    assert found.words == [["the", "sat"]] and found.labels == [["1", "0"]]


def test_ten_fields_that_do_not_count(tmp_path):
    more = "\tx" * 8
    found = read_words(conll(tmp_path, f"1{more}\tO\n\ncat{more}\tB-A\n"))
    assert found.words == [["1"], ["cat"]]


def test_a_comment_with_as_many_fields_as_words(tmp_path):
    found = read_words(conll(tmp_path, "# sent_id = 1\ncat x y B-A\n"))
    assert found.words == [["cat"]]


# -- masks and pairs -----------------------------------------------------------------------------

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c", "##d"]


def of_pieces():
    return BertTokenizer(vocab={word: i for i, word in enumerate(PIECES)})


def chosen_of(ids, whole_words=True, share=0.15, seed=0):
    masking = Masking.of(of_pieces(), whole_words=whole_words, share=share)
    return masking(np.array(ids), np.random.default_rng(seed))[1] != -100


def test_the_share_is_rounded():
    assert chosen_of([2, *[5] * 11, 3], whole_words=False).sum() == 2  # of 1.65


def test_a_piece_behind_a_special_token_is_a_word():
    """ "##c" goes on with no word that a special token parts it from, nor with none at all."""
    found = [tuple(chosen_of([2, 5, 3, 7, 3], seed=seed)) for seed in range(20)]
    assert {sum(one) for one in found} == {1} and len(set(found)) == 2
    ids = [2, 5, *[7] * 9, 3]  # one word of ten pieces: chosen whole though more than the share
    assert chosen_of(ids).sum() == 10


def test_whole_words_fill_the_count_and_no_more():
    ids = [2, *[5] * 20, 3]
    assert {int(chosen_of(ids, seed=seed).sum()) for seed in range(5)} == {3}
    ids = [2, *[5, 7] * 10, 3]
    assert {int(chosen_of(ids, seed=seed).sum()) for seed in range(5)} == {2}


def test_whole_words_need_pieces_that_go_on():
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(PIECES[:7])})
    with pytest.raises(ValueError, match="no pieces that start with ##"):
        Masking.of(tokenizer, whole_words=True)


def pairs_of(seed=0, documents=400, sentences=6, length=5):
    """Documents of equal sentences, of one token each but for its number of pieces."""
    n = documents * sentences
    ids = np.full(n * length, 5, np.uint16)
    corpus = Corpus(
        [ids], np.array([0, len(ids)]), np.arange(n + 1) * length,
        np.arange(documents + 1) * sentences, "",
    )  # fmt: skip
    tokenizer = of_pieces()
    return SentencePairs(corpus, np.arange(documents), tokenizer, Masking.of(tokenizer), 23, seed)


def test_a_tenth_of_the_pairs_is_shorter():
    plan = pairs_of().plan(0)
    short = plan.lengths() < 5 * 2 + SPECIALS  # less than two sentences fit no other way
    assert 0.02 < short.mean() < 0.1


def test_pairs_are_parted_at_any_sentence():
    plan = pairs_of().plan(0)
    assert (plan.a_end - plan.a_start >= 2 * 5).mean() > 0.2


def test_masks_are_of_seed_and_epoch():
    masks, same = set(), pairs_of(0).plan(0)
    for seed in (0, 1):
        pairs = pairs_of(seed)
        pairs.plan = lambda epoch: same  # texts
        for epoch in (0, 1):
            pairs.set_epoch(epoch)
            masks.add(tuple(map(tuple, (pairs[i]["labels"].tolist() for i in range(20)))))
    assert len(masks) == 4


def test_plans_are_of_the_seed():
    assert not np.array_equal(pairs_of(0).plan(0).a_start, pairs_of(1).plan(0).a_start)


def test_pairs_begin_at_any_sentence_but_the_last():
    assert set(np.unique(pairs_of().plan(0).a_start // 5 % 6)) == set(range(5))


def test_pairs_are_cut_at_either_end():
    plan = pairs_of(length=7).plan(0)
    for bound in plan[:2]:
        assert (bound % 7 > 0).any()
