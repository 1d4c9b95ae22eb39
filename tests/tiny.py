"""A BERT of a few kilobytes with a real tokenizer, saved as `from_pretrained` takes it."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = "the a cat dog sat on mat ran ##s ##ing in under sun rain . , !".split()
TEXTS = [
    "the cat sat on the mat.",
    "",
    "a dog ran",
    "the sun, the rain, the sun, the rain, the sun, the rain!",
    "dogs running in the rain",
    "under",
    "the cat sat on the mat.",
]


def save(folder: Path, **config: object) -> Path:
    """Writes config.json, weights and tokenizer; `config` overrides the sizes."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    sizes = dict(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{**sizes, **config}))
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2)  # so that no gate, gain or bias is at its neutral value
    model.save_pretrained(folder)
    tokens = {word: i for i, word in enumerate(vocab)}
    BertTokenizer(vocab=tokens, model_max_length=512).save_pretrained(folder)
    return folder
