"""WordPiece vocabularies (Schuster and Nakajima 2012), learnt by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, lowercase: bool = True, max_length: int = 512
) -> Any:
    """A BertTokenizer whose vocabulary fits these texts; the same for the same texts.

    Args:
        vocab_size: tokens, the five special ones included; fewer where the texts have no more.
        lowercase: texts are lowercased and lose their accents, as in BERT's uncased models.
        max_length: what the tokenizer says a model takes (`model_max_length`).
    Raises: ValueError for a vocab_size below the number of different characters, or no text.
    """
    learnt = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learnt.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    learnt.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False
    )
    learnt.train_from_iterator(texts, trainer)
    vocab = learnt.get_vocab()
    if len(vocab) == len(SPECIALS):
        raise ValueError("the corpus is empty: no document in any file")
    if len(vocab) > vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the characters of the text alone, at the start of "
            f"words and inside them, are {len(vocab)} tokens"
        )
    return BertTokenizer(vocab=vocab, do_lower_case=lowercase, model_max_length=max_length)
