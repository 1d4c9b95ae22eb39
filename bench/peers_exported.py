"""The benchmark's contenders outside PyTorch: ONNX Runtime, OpenVINO and CTranslate2.

Their packages are imported when a contender is built, never before. What is exported is kept in
the model's cache folder, one entry each, and used again. A contender that would run in another
precision than its class raises: libraries fall back without a word where the processor lacks an
instruction.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.doctor import versions_of

from . import workloads
from .peers_torch import Batch, Forward, LastHidden
from .results import PEERS as PACKAGES

INPUTS = ("input_ids", "attention_mask")
# What static int8 is calibrated on, whatever is timed first.
CALIBRATION, CALIBRATION_BATCHES = replace(workloads.WORKLOADS["rerank"], batch=4), 16


def products_saturate() -> bool:
    """Whether 8-bit products are added in pairs in 16 bits, which is too few: x86 without VNNI.

    Both quantizers then have a setting that leaves weights a bit to spare.
    """
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni"}


def digest(model: nn.Module) -> str:
    """Of all that an export depends on: the model, this file's settings, packages, processor."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    config: Any = model.config
    made_by = versions_of("torch", "transformers", "onnx", *PACKAGES)
    calibration = CALIBRATION, CALIBRATION_BATCHES
    found.update(repr((config.to_dict(), made_by, calibration, products_saturate())).encode())
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def build_onnxruntime(model: nn.Module, folder: Path, precision: str) -> Forward:
    import onnxruntime

    path = _cached(folder, "onnxruntime_fp32.onnx", partial(_export_onnx, model))
    if precision == "int8":
        path = _cached(folder, "onnxruntime_int8.onnx", partial(_quantize_onnx, path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads spin on after a run, as they would for who uses it alone: whoever has the next
    # turn waits for them (noise.wait_for_rest).
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(batch: Batch) -> Tensor:
        (hidden,) = session.run(None, {name: batch[name].numpy() for name in INPUTS})
        return torch.from_numpy(hidden)

    return forward


def build_openvino(
    model: nn.Module, folder: Path, batches: Sequence[Batch], precision: str, static: bool
) -> Forward:
    import openvino

    path = _cached(folder, "openvino_fp32", partial(_export_openvino, model))
    if precision == "int8":
        write = partial(_quantize_openvino, path, model.config)
        path = _cached(folder, f"openvino_int8_{CALIBRATION.name}", write)
    core = openvino.Core()
    graph = core.read_model(path / "model.xml")
    shape = torch.Size(max(batch["input_ids"].shape[i] for batch in batches) for i in (0, 1))
    if static:
        graph.reshape({name: list(shape) for name in INPUTS})
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    if precision != "int8":  # the rest of an int8 model runs in what the plugin finds fastest
        options["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[precision]
    compiled = core.compile_model(graph, "CPU", options)
    check_precision(compiled, precision)
    request = compiled.create_infer_request()

    def forward(batch: Batch) -> Tensor:
        inputs = {name: batch[name].numpy() for name in INPUTS}
        # The output is copied: the request's own buffer is overwritten by the next call.
        return torch.from_numpy(request.infer(inputs, share_inputs=True)[0])

    return _padded_to(shape, forward) if static else forward


def build_ctranslate2(model: nn.Module, folder: Path, precision: str) -> Forward:
    """CTranslate2 drops padding, too; it takes lengths, so padding has to be on the right."""
    import ctranslate2
    import numpy as np

    path = _cached(folder, "ctranslate2_fp32", partial(_convert_ctranslate2, model))
    wanted = {"fp32": "float32", "int8": "int8_float32"}[precision]
    encoder = ctranslate2.Encoder(
        str(path),
        device="cpu",
        compute_type=wanted,
        inter_threads=1,
        intra_threads=torch.get_num_threads(),
    )
    if encoder.compute_type != wanted:
        raise RuntimeError(f"CTranslate2 would run in {encoder.compute_type}, not in {wanted}")

    def forward(batch: Batch) -> Tensor:
        ids = batch["input_ids"].int().numpy()
        lengths = batch["attention_mask"].sum(1, dtype=torch.int32).numpy()
        view = ctranslate2.StorageView.from_array
        output = encoder.forward_batch(view(ids), view(lengths))
        return torch.from_numpy(np.asarray(output.last_hidden_state))

    return forward


def check_precision(compiled: Any, precision: str) -> None:
    """Raises RuntimeError unless most matrix products of an OpenVINO model run in `precision`."""
    infos = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    found = Counter(
        info["runtimePrecision"].astype(str)
        for info in infos
        if "layerType" in info and info["layerType"].astype(str) == "FullyConnected"
    )
    wanted = {"fp32": ("f32",), "bf16": ("bf16",), "int8": ("u8", "i8")}[precision]
    if 2 * sum(found[name] for name in wanted) <= found.total():
        raise RuntimeError(f"OpenVINO would run its matrix products in {dict(found)}")


def _padded_to(shape: torch.Size, forward: Forward) -> Forward:
    ids = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)

    def padded(batch: Batch) -> Tensor:
        texts, length = batch["input_ids"].shape
        if (texts, length) == shape:
            return forward(batch)
        ids.zero_()[:texts, :length] = batch["input_ids"]
        mask.zero_()[:texts, :length] = batch["attention_mask"]
        mask[texts:, 0] = 1  # a softmax over nothing would be NaN
        return forward({"input_ids": ids, "attention_mask": mask})[:texts, :length]

    return padded


def _cached(folder: Path, name: str, write: Callable[[Path], None]) -> Path:
    """`folder / name`, which `write` makes at a temporary place if it is not there yet."""
    target = folder / name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / name
            write(made)
            made.rename(target)  # at once, so that an interrupted export leaves nothing behind
    return target


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Both exporters trace, which torch calls deprecated dozens of times."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _example() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    return torch.arange(16).view(2, 8), mask


def _export_onnx(model: nn.Module, to: Path) -> None:
    from onnxruntime.transformers import optimizer

    raw = to.with_suffix(".raw.onnx")
    # ONNX Runtime's fusions know the graph of eager attention as TorchScript's exporter writes it:
    # in that of torch.export they find no Attention.
    with _without_warnings(), torch.no_grad():
        torch.onnx.export(
            LastHidden(model, "eager"),
            _example(),
            raw,
            input_names=list(INPUTS),
            output_names=["last_hidden_state"],
            dynamic_axes={name: {0: "B", 1: "S"} for name in (*INPUTS, "last_hidden_state")},
            opset_version=18,
            dynamo=False,
        )
    config: Any = model.config
    sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    optimizer.optimize_model(str(raw), "bert", **sizes).save_model_to_file(str(to))


def _quantize_onnx(source: Path, to: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        to,
        per_channel=True,
        weight_type=QuantType.QInt8,
        reduce_range=products_saturate(),
        # ONNX cannot infer types through ONNX Runtime's fused ops.
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def _export_openvino(model: nn.Module, to: Path) -> None:
    import openvino

    with _without_warnings():
        graph = openvino.convert_model(
            LastHidden(model, "sdpa"),
            example_input=dict(zip(INPUTS, _example(), strict=True)),
            input=[(name, [-1, -1], openvino.Type.i64) for name in INPUTS],
        )
    openvino.save_model(graph, to / "model.xml", compress_to_fp16=False)


def _quantize_openvino(source: Path, config: Any, to: Path) -> None:
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import OverflowFix

    batches = []
    for i, batch in enumerate(workloads.lengths(CALIBRATION, CALIBRATION_BATCHES, "arrival")):
        lengths = [min(length, config.max_position_embeddings) for length in batch]
        inputs = workloads.padded(config.vocab_size, lengths, i)
        batches.append({name: value.numpy() for name, value in inputs.items()})
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        graph = nncf.quantize(
            openvino.Core().read_model(source / "model.xml"),
            nncf.Dataset(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.ENABLE if products_saturate() else None
            ),
        )
    openvino.save_model(graph, to / "model.xml", compress_to_fp16=False)


def _convert_ctranslate2(model: nn.Module, to: Path) -> None:
    from ctranslate2.converters import TransformersConverter
    from transformers import BertTokenizer

    with tempfile.TemporaryDirectory(dir=to.parent) as source:
        saved: Any = copy.deepcopy(model)
        saved.config.position_embedding_type = "absolute"  # the converter still asks for it
        saved.save_pretrained(source)
        # It wants a tokenizer, and fills the vocabulary up; ids are all that is used here.
        words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(source)
        TransformersConverter(source).convert(str(to))
