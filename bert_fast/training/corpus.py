"""A corpus, tokenised once: memory-mapped safetensors, found again by a fingerprint.

    FOLDER/<fingerprint>/tokens-00000.safetensors ...   token ids, whole documents to a shard
    FOLDER/<fingerprint>/bounds.safetensors             where sentences and documents start

The fingerprint is of the texts' bytes, the tokenizer and the rules for sentences: a second run on
the same reads nothing but these files, and the operating system only the pages that it touches.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..console import vocabulary_size
from .text import read_documents, split_sentences

RULES = "2"  # of files, sentences and what is stored: another number makes every corpus anew
LONGEST = 128  # tokens of a sentence; a longer one, mostly a list or a table, is cut into several
SHARD = 1 << 27  # tokens
AT_ONCE = 256  # documents tokenised together
PART = ".part-"  # before the name of a corpus that is being made


@dataclass(frozen=True)
class Corpus:
    """Token ids of every sentence of every document, in the order of the files.

    shards: ids, integers [tokens of the shard]; the tokens of shard k follow those of shard k - 1.
    starts: int64 [shards + 1], where each shard starts.
    sentences: int64 [sentences + 1], where each sentence starts, counted in tokens over all shards.
    documents: int64 [documents + 1], the first sentence of each document.
    fingerprint: of the texts and what made tokens of them.
    """

    shards: Sequence[np.ndarray]
    starts: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    fingerprint: str

    def tokens(self, start: int, end: int) -> np.ndarray:
        """The ids from `start` to `end`, which lie in one document, as int64."""
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        offset = self.starts[shard]
        return self.shards[shard][start - offset : end - offset].astype(np.int64)

    def split(self, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Document numbers to train on and to hold back, sorted; each side gets two at least.

        Those of one sentence, which make no pair, are on neither side.

        Raises: ValueError for fewer than 4 documents of two sentences (2 where none is held back).
        """
        usable = np.flatnonzero(np.diff(self.documents) >= 2)
        held = max(2, round(len(usable) * fraction)) if fraction else 0
        if len(usable) - held < 2:
            raise ValueError(
                f"{len(usable)} of {len(self.documents) - 1} documents have two sentences or more, "
                f"and pairs need 2 of them to train on{' and 2 to hold back' if held else ''}: "
                "separate documents by blank lines"
            )
        order = usable[np.random.default_rng(seed).permutation(len(usable))]
        return np.sort(order[held:]), np.sort(order[:held])


def load_corpus(files: Sequence[Path], tokenizer: Any, folder: Path, text_field: str) -> Corpus:
    """The corpus of these files, tokenised unless `folder` has it.

    Args:
        files: what `text.find_files` gives.
        tokenizer: a transformers tokenizer.
        folder: of all corpora; made where it is missing.
    Raises: ValueError for files without text, and what `read_documents` raises.
    """
    fingerprint = _fingerprint(files, tokenizer, text_field)
    target = folder / fingerprint
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder, prefix=PART))
        try:
            _write(part, read_documents(files, text_field), tokenizer)
            part.rename(target)  # at once: an interrupted run leaves no half of a corpus
        finally:
            shutil.rmtree(part, ignore_errors=True)
    bounds = load_file(target / "bounds.safetensors")
    shards = [load_file(file)["ids"].numpy() for file in sorted(target.glob("tokens-*"))]
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    sentences, numbers = bounds["sentences"].numpy(), bounds["documents"].numpy()
    return Corpus(shards, starts, sentences, numbers, fingerprint)


def remove_parts(folder: Path) -> None:
    """Removes what killed runs have left of corpora in `folder`, while nobody makes one there."""
    for part in folder.glob(f"{PART}*"):
        shutil.rmtree(part, ignore_errors=True)


def _fingerprint(files: Sequence[Path], tokenizer: Any, text_field: str) -> str:
    digest = hashlib.sha256(f"{RULES} {LONGEST} {text_field}".encode())
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        kept = {name: rules[name] for name in ("normalizer", "pre_tokenizer", "model")}
        digest.update(json.dumps(kept).encode())
    for file in files:
        digest.update(f"{''.join(file.suffixes)} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def _write(folder: Path, documents: Iterable[str], tokenizer: Any) -> None:
    dtype = torch.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else torch.int32
    lengths: list[int] = []
    counts: list[int] = []
    shard: list[np.ndarray] = []
    size = count = 0

    def flush() -> None:
        ids = torch.from_numpy(np.concatenate(shard)).to(dtype)
        save_file({"ids": ids}, folder / f"tokens-{count:05d}.safetensors")

    for sentences in _tokenized(documents, tokenizer):
        lengths += [len(sentence) for sentence in sentences]
        counts.append(len(sentences))
        shard.append(np.concatenate(sentences))
        size += len(shard[-1])
        if size >= SHARD:
            flush()
            shard, size, count = [], 0, count + 1
    if not counts:
        raise ValueError("the corpus is empty: no document in any file")
    if shard:
        flush()
    bounds = {
        "sentences": torch.from_numpy(np.cumsum([0, *lengths])),
        "documents": torch.from_numpy(np.cumsum([0, *counts])),
    }
    save_file(bounds, folder / "bounds.safetensors")


def _tokenized(documents: Iterable[str], tokenizer: Any) -> Iterator[list[np.ndarray]]:
    """The ids of the sentences of each document that has any."""
    for chunk in _chunks(documents):
        split = [split_sentences(document) for document in chunk]
        flat = [sentence for sentences in split for sentence in sentences]
        ids = iter(
            tokenizer(
                flat, add_special_tokens=False, return_attention_mask=False, verbose=False
            )["input_ids"]
        )  # fmt: skip
        for sentences in split:
            found = [np.asarray(next(ids), np.int32) for _ in sentences]
            pieces = [s[i : i + LONGEST] for s in found for i in range(0, len(s), LONGEST)]
            if pieces:
                yield pieces


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for document in documents:
        chunk.append(document)
        if len(chunk) == AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
