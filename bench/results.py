"""The one schema of what the bench finds: plain values, versioned, one JSON file a run.

Files lie under `bench/results/`. A number in README.md names the file it is from and the command
that made it. `None` stands for what was not measured; `failed` says why where that is a failure.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bert_fast import doctor

SCHEMA = 3
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PEERS = ("onnxruntime", "openvino", "nncf", "ctranslate2")  # packages whose versions matter too


@dataclass
class Interval:
    """A median, and the 95 % interval of it that the bootstrap gives."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of a ratio of times, theirs over ours: whether it is clear of 1."""
        if self.low > 1.0:
            return "faster"
        return "slower" if self.high < 1.0 else "within noise"


@dataclass
class Entry:
    """One contender on one workload.

    contender: "bert_fast", "hf_sdpa", "openvino_static", ...; see `bench.peers`.
    precision: "fp32", "bf16", "fp16", "int8" or "fp8": the class it competes in.
    batches: that the texts are in, of as many texts each; 0 in files older than the field.
    seconds: of each kept window, all batches of the workload once.
    ratio: this contender's time over that of bert_fast in its precision: above 1, bert_fast is
        faster. None for bert_fast itself.
    relative_l2, cosine: against transformers in fp64, over the real tokens; the smallest cosine
        of a text's mean embedding.
    failed: why there are no times: a missing package, a wrong result, an exception.
    """

    model: str
    workload: str
    order: str
    contender: str
    precision: str
    texts: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    flop: float = 0.0
    seconds: list[float] = field(default_factory=list)
    median_s: float | None = None
    p95_s: float | None = None
    tokens_per_s: float | None = None
    tflop_per_s: float | None = None
    first_call_s: float | None = None
    peak_mb: float | None = None
    relative_l2: float | None = None
    cosine: float | None = None
    ratio: Interval | None = None
    failed: str | None = None
    batches: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        return (self.model, self.workload, self.order, self.contender, self.precision)


@dataclass
class OpEntry:
    """One kernel of one op on one case.

    ms: the median call; spread: half its 95 % interval, relative to it.
    share: of the machine's ceiling that binds it, memory or arithmetic.
    """

    op: str
    case: str
    dtype: str
    kernel: str
    step: str  # "forward" or "forward_backward"
    flop: float
    bytes: float
    ms: float | None = None
    tflop_per_s: float | None = None
    gb_per_s: float | None = None
    share: float | None = None
    error: float | None = None
    budget: float | None = None
    spread: float | None = None
    failed: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return (self.op, self.case, self.dtype, self.kernel, self.step)

    @property
    def failure(self) -> str:
        """The line of `Run.failed` that tells of it, if it broke and is not only missing here."""
        return f"op {self.op} {self.case} {self.kernel}: {self.failed}"


@dataclass
class Scaling:
    """Seconds of bert_fast and transformers against one quantity, and the fitted exponents.

    axis: "tokens", "length" or "threads"; seconds ~ x ** exponent, fitted on the upper half.
    """

    model: str
    precision: str
    axis: str
    x: list[float]
    seconds: dict[str, list[float]]
    exponents: dict[str, float]


@dataclass
class Noise:
    """How quiet the machine was: the probe's median and spread, windows kept and dropped.

    forced: of the kept ones, how many were disturbed too, where no quiet time came.
    """

    probe_ms: float
    probe_spread: float
    kept: int
    dropped: int
    forced: int = 0


@dataclass
class Run:
    """One run of the bench. `ceilings` are measured in the same run (see `bench.measure`)."""

    command: str
    commit: str | None
    modified: bool
    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    threads: int
    device: str
    schema: int = SCHEMA
    ceilings: dict[str, float] = field(default_factory=dict)
    noise: Noise | None = None
    models: list[Entry] = field(default_factory=list)
    ops: list[OpEntry] = field(default_factory=list)
    scaling: list[Scaling] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # peers that are not here, and why
    training: list[dict[str, Any]] = field(default_factory=list)  # see `bench.training_gpu`
    tests: dict[str, Any] | None = None
    failed: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(path)


def new_run(command: str, device: torch.device, commit: str | None = None) -> Run:
    """A run of this checkout on this machine, with nothing measured yet."""
    machine = doctor.machine()
    versions = {**doctor.versions(), **doctor.versions_of(*PEERS)}
    name = machine.get("CPU", platform.processor())
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        versions["driver"] = output_of(*query) or "unknown"
        versions["cuda"] = torch.version.cuda or "unknown"
    return Run(
        command,
        commit or output_of("git", "rev-parse", "HEAD"),
        bool(output_of("git", "status", "--porcelain", "--untracked-files=no")),
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine,
        versions,
        torch.get_num_threads(),
        name,
    )


def load(path: Path) -> Run:
    """Reads a file of `Run.save`.

    Raises: ValueError for a file of another schema or of other fields; OSError for one that cannot
        be read.
    """
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a result of schema {SCHEMA}")
    try:
        found["models"] = [
            Entry(**{**row, "ratio": row["ratio"] and Interval(**row["ratio"])})
            for row in found["models"]
        ]
        found["ops"] = [OpEntry(**row) for row in found["ops"]]
        found["scaling"] = [Scaling(**row) for row in found["scaling"]]
        found["noise"] = found["noise"] and Noise(**found["noise"])
        return Run(**found)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole result of schema {SCHEMA}: {error}") from error


def default_path(run: Run, kind: str, part: str = "") -> Path:
    """bench/results/<kind>-<device>-<commit>[-<part>].json"""
    name = re.sub(r"nvidia|\(.*?\)", "", run.device.lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    stem = f"{kind}-{name}-{(run.commit or 'unknown')[:10]}"
    return RESULTS / f"{stem}{'-' * bool(part)}{part}.json"


def output_of(*command: str) -> str | None:
    """The stdout of a command of this checkout, None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
