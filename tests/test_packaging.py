"""The wheel, what importing costs, the name `kernels`, and who may import whom."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]


def run(*line, cwd=ROOT, **more):
    """The stdout of a command that succeeds."""
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, cwd=cwd, **more)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code, **more):
    return run(sys.executable, "-c", textwrap.dedent(code), **more)


# -- the wheel ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `make wheel` builds, from the objects of the last build where those are not stale."""
    out = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    with FileLock(tmp_path_factory.getbasetemp().parent / "wheel.lock"):  # another worker may too
        for left_over in ROOT.glob("build/lib*"):  # a module deleted since would be packed too
            shutil.rmtree(left_over)
        run(*pip, "-w", out, ROOT)
    (file,) = out.iterdir()
    return file


@pytest.mark.slow
def test_wheel_serves_every_python_and_installs_bert_fast_only(wheel):
    assert "-cp310-abi3-" in wheel.name
    files = zipfile.ZipFile(wheel)
    names = files.namelist()
    assert str(ROOT).encode() not in files.read("bert_fast/_C.abi3.so")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bert_fast"}
    for wanted in ("_C.abi3.so", "_triton/tiles.py", "ops/registry.py", "cli.py", "py.typed"):
        assert f"bert_fast/{wanted}" in names
    sources = (".cpp", ".cu", ".cuh", ".h", ".inc")
    assert not [name for name in names if name.endswith(sources)]


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "venv")
    empty = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", empty, "install", "-q", "--no-deps"]
    run(*pip, wheel, cwd=tmp_path)
    # A path file lends torch and transformers; path files found through it do not count, so the
    # editable install of this checkout stays out.
    site = Path(run(empty, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    code = """
        import torch, bert_fast
        from transformers import BertConfig, BertModel
        assert bert_fast.__file__.startswith({site!r}), bert_fast.__file__
        import bert_fast._C
        from bert_fast.ops.backends import extension_missing
        assert not extension_missing()
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        model = BertModel(BertConfig(vocab_size=30, intermediate_size=37, **sizes)).eval()
        ids = torch.arange(12).reshape(2, 6)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
        with torch.inference_mode():
            before = model(ids, mask).last_hidden_state
            after = bert_fast.accelerate(model)(ids, mask).last_hidden_state
        assert (before - after)[mask.bool()].abs().max() < 5e-6
        told = bert_fast.explain(model, dict(input_ids=ids, attention_mask=mask))
        assert not told.fallback, told
    """
    run(empty, "-c", textwrap.dedent(code.format(site=str(site))), cwd=tmp_path)
    assert run(empty.parent / "bert-fast", "--version", cwd=tmp_path).strip()
    license_text = "Apache License"
    (found,) = site.glob("bert_fast-*.dist-info/licenses/LICENSE")
    assert license_text in found.read_text()


NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{release}.0" ;;
  *--list-gpu-code*) echo "sm_75 sm_80 sm_90" ;;
  *sm_100a*) echo "nvcc fatal: Unsupported gpu architecture"; exit 1 ;;
  *) {compile} ;;
esac
"""
COMPILE = 'while [ "$1" != -o ]; do shift; done; echo "" | c++ -x c++ -fPIC -c - -o "$2"'


WITH_CC = f'case "$*" in "-ccbin older "*) {COMPILE} ;; *) echo unsupported; exit 1 ;; esac'


@pytest.mark.parametrize(
    ("release", "compile", "library", "told"),
    [("13.1", COMPILE, "libcudart.so", None), ("13.1", WITH_CC, "libcudart.so", None),
     ("12.9", COMPILE, "libcudart.so", "CUDA 13.0"),
     ("13.1", COMPILE, "none.so", "cannot find -lcudart"),
     ("13.1", "echo unsupported GNU version; exit 1", "libcudart.so", "unsupported GNU version")],
)  # fmt: skip
def test_an_nvcc_that_does_not_fit_costs_only_the_cuda_kernels(
    tmp_path, release, compile, library, told
):
    """Nor is it asked for GPUs that it does not know."""
    for name in ("bin", "lib64"):
        (tmp_path / name).mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(release=release, compile=compile))
    nvcc.chmod(0o755)
    run("c++", "-shared", "-x", "c++", "/dev/null", "-o", tmp_path / "lib64" / library)
    setup = """
        import runpy, sys
        import torch
        from torch.utils import cpp_extension
        torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", sys.argv.pop()
        sys.stderr = sys.stdout
        runpy.run_path("setup.py")
    """
    cc = {"CC": "older"} if compile == WITH_CC else {}
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")} | cc
    out = run(sys.executable, "-c", textwrap.dedent(setup), "--version", tmp_path, env=env)
    assert ("built without CUDA kernels" in out) == (told is not None)
    assert told is None or told in out


# -- what importing costs -------------------------------------------------------------------


def test_import_is_light():
    found = python(
        """
        import sys, time, torch
        before, start = set(sys.modules), time.process_time()
        import bert_fast
        print(time.process_time() - start)
        heavy = {"transformers", "triton", "rich", "typer"} & (set(sys.modules) - before)
        assert not heavy, heavy
        """
    )
    assert float(found) < 0.5


def test_ops_import_is_light():
    python(
        """
        import sys, torch
        before = set(sys.modules)
        import bert_fast.ops, bert_fast.modeling, bert_fast.padding
        heavy = {"transformers", "triton"} & (set(sys.modules) - before)
        assert not heavy, heavy
        """
    )


# -- the name `kernels` ---------------------------------------------------------------------


@pytest.fixture
def with_kernels_package(tmp_path):
    """An environment with a package `kernels` installed, as Hugging Face's is; it says so."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(
        textwrap.dedent(
            """
            __version__ = "0.18.2"

            class Anything:  # a class to instantiate, or a decorator that changes nothing
                def __init__(self, *args, **kwargs): pass
                def __call__(self, decorated): return decorated

            def __getattr__(name): return Anything
            """
        )
    )
    (tmp_path / "kernels-0.18.2.dist-info").mkdir()
    (tmp_path / "kernels-0.18.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_our_folder_does_not_hide_the_package_kernels(with_kernels_package):
    # `python -c` puts the repository root first on the path, before the package.
    code = """
        import kernels
        assert kernels.__version__ == "0.18.2", kernels
        from transformers import BertModel
    """
    python(code, env=with_kernels_package)
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_tests_are_collected_beside_the_package_kernels(with_kernels_package):
    # One file that imports transformers stands for all, which take ten seconds to import.
    line = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    assert "tests collected" in run(*line, "tests/test_heads.py", env=with_kernels_package)


# -- who may import whom --------------------------------------------------------------------

# bench, tests -> bert_fast (by `LAYERS`) -> bert_fast.ops -> bert_fast._triton, _C.
# A file may import what starts with one of these; modules outside this list are not ours.
OURS = ("bert_fast", "bench", "tests", "kernels")
ALLOWED = {
    "kernels/_triton": ("bert_fast._triton",),
    "bert_fast/ops": ("bert_fast.ops", "bert_fast._triton", "bert_fast._C"),
    "bert_fast": ("bert_fast",),
    "bench": ("bert_fast", "bench"),
    "tests": ("bert_fast", "bench", "tests"),
}
# bert_fast from the top: a layer imports itself and what is below. "" is the package, which hands
# out `accelerate`, `verify` and the rest.
LAYERS = (
    {"cli"},
    {"training"},
    {"", "aot", "doctor", "encode", "explanation", "heads", "verification"},
    {"convert"},
    {"probe"},
    {"masked_lm", "reading"},
    {"packed"},
    {"graphs", "modeling", "one_call"},
    {"layer_node"},
    {"attention_interface", "casting", "families", "inputs", "padding", "paths", "structure"}
    | {"sentence", "swap"},
    {"console", "notice", "ops"},
)
RANKS = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
# Files of bert_fast that may know transformers, beside those of bert_fast/training.
KNOW_TRANSFORMERS = {
    f"bert_fast/{name}.py" for name in ("packed", "probe", "heads", "attention_interface", "cli")
}
# Imported for `--help`: what they need of torch and transformers they import inside functions.
COMMANDS = {f"bert_fast/{name}.py" for name in ("cli", "console", "training/__init__")}
COMMANDS |= {f"bert_fast/training/{name}.py" for name in ("commands", "finetune_command")}
# Files above the ops that may know the kernels themselves.
KNOW_KERNELS = {"bert_fast/aot.py"}


def python_files() -> Iterator[tuple[str, Path]]:
    """Every Python file of ours with the folder whose rule it is under."""
    for folder in ALLOWED:
        files = (ROOT / folder).rglob("*.py")
        for file in files:
            relative = file.relative_to(ROOT).as_posix()
            if folder == max((f for f in ALLOWED if relative.startswith(f + "/")), key=len):
                yield folder, file


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at the top level) of every import, relative ones made absolute."""
    relative = file.relative_to(ROOT).as_posix().removesuffix(".py")
    relative = relative.replace("kernels/_triton", "bert_fast/_triton")
    package = relative.split("/")[:-1]
    tree = ast.parse(file.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            for alias in node.names:
                # `from package import name` may name a module; for the rules it does.
                yield f"{module}.{alias.name}", id(node) in top


def under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in prefixes)


def rank(module: str) -> int:
    """That of a module, or of a name, of bert_fast."""
    return RANKS[next((part for part in module.split(".")[1:2] if part in RANKS), "")]


def test_every_module_has_a_layer():
    inside = [path for path in (ROOT / "bert_fast").iterdir() if path.name != "py.typed"]
    assert {path.stem for path in inside if path.stem[0] not in "_."} == set(RANKS) - {""}


def test_layers_import_downwards_only():
    wrong, seen = [], 0
    for folder, file in python_files():
        name = file.relative_to(ROOT).as_posix()
        for module, at_top in imports(file):
            seen += 1
            if under(module, OURS) and not under(module, ALLOWED[folder]):
                wrong.append(f"{name} imports {module}")
            ranked = folder == "bert_fast" and file.name != "__init__.py"
            own = name.removesuffix(".py").replace("/", ".")
            if ranked and under(module, ("bert_fast",)) and rank(module) < rank(own):
                wrong.append(f"{name} imports {module}, which is above it")
            skips_ops = folder == "bert_fast" and name not in KNOW_KERNELS
            if skips_ops and under(module, ("bert_fast._triton", "bert_fast._C")):
                wrong.append(f"{name} imports {module}, which only bert_fast.ops may")
            may = folder in ("bench", "tests") or name in KNOW_TRANSFORMERS
            may = may or name.startswith("bert_fast/training/")
            if under(module, ("transformers",)) and not may:
                wrong.append(f"{name} imports {module}, which it may not")
            if name in COMMANDS and at_top and under(module, ("torch", "transformers")):
                wrong.append(f"{name} imports {module} at its top")
    assert seen > 100
    assert not wrong, "\n".join(wrong)


def test_import_is_lazy_at_the_top_of_bert_fast():
    allowed = ("__future__", "typing")
    for module, at_top in imports(ROOT / "bert_fast" / "__init__.py"):
        assert under(module, allowed) or not at_top, module
