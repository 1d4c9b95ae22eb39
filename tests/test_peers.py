"""The benchmark's contenders: each against transformers in fp64, on ragged batches."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers, peers_exported, peers_torch
from bench.peers import PEERS, Peer

from .models import tiny

MOST = {"fp32": 1e-4, "bf16": 3e-2, "int8": 0.4, "fp8": 0.15}  # relative L2 over the real tokens
PARAMETERS = [
    pytest.param(
        of,
        id=f"{of.name}-{of.precision}",
        marks=[pytest.mark.slow] if of.name == "torch_compile" else [],
    )
    for of in PEERS
]
LENGTHS = ((9, 3, 17, 1), (5, 12))


def peer(name: str, precision: str) -> Peer:
    (found,) = [p for p in PEERS if (p.name, p.precision) == (name, precision)]
    if why := found.missing():
        pytest.skip(why)
    return found


def model() -> Any:
    return tiny(vocab_size=2000, intermediate_size=128).cpu()


def padded(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": torch.randint(5, 2000, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
    }


BATCHES = [padded(lengths) for lengths in LENGTHS]


def relative_l2(found: Tensor, truth: Tensor, batch: dict[str, Tensor]) -> float:
    real = batch["attention_mask"].bool()
    return float((found[real].double() - truth[real]).norm() / truth[real].norm())


@pytest.mark.parametrize("of", PARAMETERS)
def test_values(of: Peer, tmp_path: Path) -> None:
    forward = peer(of.name, of.precision).build(theirs := model(), tmp_path, BATCHES)
    found = [forward(batch) for batch in BATCHES]  # kept: no output may lie in a reused buffer
    truths = copy.deepcopy(theirs).double()
    for hidden, batch in zip(found, BATCHES, strict=True):
        with torch.inference_mode():
            truth = truths(**batch).last_hidden_state
        assert hidden.shape == truth.shape
        assert relative_l2(hidden, truth, batch) < MOST[of.precision]
    for name, value in model().state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), f"{name} was changed"
    assert theirs.config._attn_implementation == model().config._attn_implementation


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "openvino_static", "ctranslate2"])
def test_exports_are_used_again(name: str, tmp_path: Path) -> None:
    first = peer(name, "int8").build(model(), tmp_path, BATCHES)(BATCHES[0])
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = peer(name, "int8").build(model(), tmp_path, BATCHES)(BATCHES[0])
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    real = BATCHES[0]["attention_mask"].bool()
    assert torch.equal(first[real], again[real])


def test_a_digest_tells_exports_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = model(), model()
    found = [peers_exported.digest(first), peers_exported.digest(second)]
    assert found[0] == found[1]  # the same weights
    with torch.no_grad():
        second.embeddings.word_embeddings.weight[-1, -1] += 1
    found[1] = peers_exported.digest(second)
    second.config.layer_norm_eps = 0.1
    found.append(peers_exported.digest(second))
    for name, value in (("versions_of", {"onnx": "0"}), ("products_saturate", "as never before")):
        monkeypatch.setattr(peers_exported, name, lambda *names, value=value: value)
        found.append(peers_exported.digest(first))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("saturates", [True, False])
def test_weights_have_a_bit_to_spare_where_products_saturate(
    saturates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_exported, "products_saturate", lambda: saturates)
    peer("onnxruntime", "int8").build(model(), tmp_path, BATCHES)
    peer("openvino", "int8").build(model(), tmp_path, BATCHES)
    import onnx
    import openvino
    from onnx import numpy_helper

    graph = onnx.load(tmp_path / "onnxruntime_int8.onnx").graph
    weights = [numpy_helper.to_array(w) for w in graph.initializer if w.data_type == 3]
    most = 64 if saturates else 127
    assert weights and max(abs(w.astype(int)).max() for w in weights) == most
    xml = openvino.Core().read_model(tmp_path / "openvino_int8_rerank" / "model.xml")
    packed = [op.data for op in xml.get_ops() if op.get_type_name() == "Constant"]
    shapes = (64, 128), (128, 64)  # of the products up and down, and of no embedding
    narrow = [w for w in packed if w.dtype == "int8" and w.shape in shapes]
    assert narrow and max(abs(w.astype(int)).max() for w in narrow) == most


def test_onnxruntime_gets_its_fused_attention(tmp_path: Path) -> None:
    peer("onnxruntime", "int8").build(model(), tmp_path, BATCHES)
    import onnx

    for precision, op in (("fp32", "Attention"), ("int8", "QAttention")):
        graph = onnx.load(tmp_path / f"onnxruntime_{precision}.onnx").graph
        assert [node.op_type for node in graph.node].count(op) == 2


@pytest.mark.slow
def test_compiled_is_frozen_for_one_text_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of one text compiles again: frozen as well, and the setting is put back."""
    of = peer("torch_compile", "fp32")
    from torch._inductor import compile_fx, config

    frozen = []
    freeze = compile_fx.fw_compiler_freezing
    monkeypatch.setattr(
        compile_fx,
        "fw_compiler_freezing",
        lambda *args, **names: (frozen.append(True), freeze(*args, **names))[1],
    )
    forward = of.build(theirs := model(), tmp_path, BATCHES)
    assert len(frozen) == 1
    hidden = forward(one := padded((7,)))
    assert len(frozen) == 2 and not config.freezing
    with torch.inference_mode():
        truth = copy.deepcopy(theirs).double()(**one).last_hidden_state
    assert relative_l2(hidden, truth, one) < MOST["fp32"]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_compiled_has_cuda_graphs_on_a_gpu(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def compiled(encoder: Any, *, mode: str | None, **names: Any) -> Any:
        modes.append(mode)
        return encoder

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(peers_torch, "on_gpu", lambda batch: on_gpu)
    peers_torch.build_compiled(model(), BATCHES, torch.float32)
    assert modes == ["max-autotune" if on_gpu else None]


def test_another_precision_is_refused(tmp_path: Path) -> None:
    peer("openvino", "fp32").build(model(), tmp_path, BATCHES)
    import openvino

    path = tmp_path / "openvino_fp32" / "model.xml"
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    peers_exported.check_precision(compiled, "fp32")
    for precision in ("bf16", "int8"):
        with pytest.raises(RuntimeError, match=r"matrix products in .*f32"):
            peers_exported.check_precision(compiled, precision)


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    def write(to: Path) -> None:
        to.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        peers_exported._cached(tmp_path / "new", "model", write)
    assert not list((tmp_path / "new").iterdir())


def test_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = {o.name: o.missing() for o in PEERS if o.precision == "int8" and o.name != "bert_fast"}
    assert told == {
        "onnxruntime": "no onnx, onnxruntime (pip install --no-build-isolation -e '.[peers]')",
        "openvino": "no openvino, nncf (pip install --no-build-isolation -e '.[peers]')",
        "openvino_static": "no openvino, nncf (pip install --no-build-isolation -e '.[peers]')",
        "ctranslate2": "no ctranslate2 (pip install --no-build-isolation -e '.[peers]')",
    }
    inside = [o for o in PEERS if o.name in ("bert_fast", "hf_sdpa") and o.precision != "fp8"]
    assert all(of.missing() is None for of in inside)


def test_missing_instructions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    for of in PEERS:
        if of.name.startswith("openvino") and of.precision == "bf16":
            assert "AVX-512 BF16" in (of.missing() or "")
        if of.name == "torch_compile":
            assert "C++ compiler" in (of.missing() or "")


def test_names() -> None:
    pairs = [(of.name, of.precision) for of in PEERS]
    assert len(set(pairs)) == len(pairs)
    assert {precision for _, precision in pairs} == set(MOST)
