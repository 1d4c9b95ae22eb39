"""The planted bugs of `make mutants`, which takes hours, still fit the code they are planted in."""

from .plant import MUTANTS, ROOT


def test_every_bug_can_be_planted() -> None:
    texts = {m.file: (ROOT / m.file).read_text() for m in MUTANTS}
    assert not [m.bug for m in MUTANTS if texts[m.file].count(m.old) != 1]


def test_every_bug_is_guarded_by_tests_that_are_there() -> None:
    files = {word for m in MUTANTS for word in m.tests if word.endswith(".py")}
    assert files and not [file for file in files if not (ROOT / file).is_file()]
