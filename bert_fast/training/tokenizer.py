"""WordPiece vocabularies (Schuster and Nakajima 2012), learnt by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(
    texts: Callable[[], Iterable[str]],
    vocab_size: int,
    lowercase: bool = True,
    max_length: int = 512,
) -> Any:
    """A BertTokenizer whose vocabulary fits these texts; the same for the same texts.

    Args:
        texts: called twice, for all texts.
        vocab_size: tokens, the five special ones included; fewer where the texts have no more.
        lowercase: texts are lowercased and lose their accents, as in BERT's uncased models.
        max_length: what the tokenizer says a model takes (`model_max_length`).
    Raises: ValueError for a vocab_size below the number of different characters, or no text.
    """
    learnt = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learnt.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    learnt.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Pieces of one character are named beforehand, in order: the trainer would find them in an
    # order that changes from run to run, which decides between pieces that are as frequent.
    pieces = [*SPECIALS, *(f"##{character}" for character in _inside_words(learnt, texts()))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=pieces, show_progress=False
    )
    learnt.train_from_iterator(texts(), trainer)
    vocab = learnt.get_vocab()
    if len(vocab) == len(SPECIALS):
        raise ValueError("the corpus is empty: no document in any file")
    if len(vocab) > vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the characters of the text alone, at the start of "
            f"words and inside them, are {len(vocab)} tokens"
        )
    return BertTokenizer(vocab=vocab, do_lower_case=lowercase, model_max_length=max_length)


def _inside_words(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The characters of the texts that do not end a word where they stand, sorted."""
    characters: set[str] = set()
    for text in texts:
        characters |= set(tokenizer.normalizer.normalize_str(text))

    def inside(character: str) -> bool:
        word = f"a{character}a"
        normal = tokenizer.normalizer.normalize_str(word)
        return normal == word and len(tokenizer.pre_tokenizer.pre_tokenize_str(word)) == 1

    return sorted(filter(inside, characters))
