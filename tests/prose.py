"""A small made-up corpus: documents with words of their own, so that pairs can be told apart."""

import numpy as np

NAMES = "cat dog sun rain mat tree house river king bread".split()
VERBS = "sees likes finds eats draws hears".split()


def documents(count: int, seed: int = 0) -> list[str]:
    """`count` documents of 2 to 12 sentences of 4 to 20 words."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        own = random.choice(NAMES, 3, replace=False)
        sentences = [
            " ".join(random.choice([*own, *VERBS, "the", "a"], random.integers(4, 21))) + "."
            for _ in range(random.integers(2, 13))
        ]
        found.append(" ".join(sentence.capitalize() for sentence in sentences))
    return found


def write(file, count: int = 60) -> str:
    file.write_text("\n\n".join(documents(count)) + "\n")
    return str(file)
