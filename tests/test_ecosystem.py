"""Libraries around transformers: what a user does with an accelerated model stays as it was."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    pipeline,
)

import bert_fast

from . import tiny as tiny_files
from .models import accelerated, ids, masks, tiny
from .parity import DEVICE

TEXTS = [text for text in tiny_files.TEXTS if text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.save(tmp_path_factory.mktemp("model"))


def close(found: Any, expected: Any) -> None:
    """Equal structures, floats within rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            close(a, b)
    elif isinstance(expected, float | np.floating | np.ndarray | Tensor):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert found == expected


# -- sentence-transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SentenceTransformer", "CrossEncoder", "SparseEncoder"])
def test_sentence_transformers(kind: str, folder: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    source = folder
    if kind == "SparseEncoder":
        BertForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
        source = tmp_path
    torch.manual_seed(0)  # CrossEncoder draws its head
    model = getattr(library, kind)(str(source), device="cpu")
    inputs: Any = [(a, TEXTS[0]) for a in TEXTS] if kind == "CrossEncoder" else TEXTS
    call = model.predict if kind == "CrossEncoder" else model.encode
    expected = call(inputs)
    assert bert_fast.accelerate(model) is model
    found = call(inputs)
    if kind == "SparseEncoder":
        found, expected = found.to_dense(), expected.to_dense()
    close(found, expected)
    bert_fast.restore(model)
    again = call(inputs)
    assert np.array_equal(again.to_dense() if kind == "SparseEncoder" else again, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flattened_inputs_of_the_collator(dtype: torch.dtype) -> None:
    """One row of all samples with their bounds: no sample sees another, on any device and dtype."""
    lengths = (3, 7, 1)
    samples = [{"input_ids": ids(1, n, 90)[0].tolist()} for n in lengths]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    batch = collate(samples)
    batch.pop("labels")
    model = bert_fast.accelerate(tiny().to(dtype))
    with torch.inference_mode():
        packed = model(**batch).last_hidden_state[0].split(lengths)
        for sample, found in zip(samples, packed, strict=True):
            alone = model(torch.tensor([sample["input_ids"]])).last_hidden_state[0]
            torch.testing.assert_close(found, alone)


# -- transformers --------------------------------------------------------------------------------

TASKS = {
    "feature-extraction": (AutoModel, TEXTS, {}),
    "text-classification": (BertForSequenceClassification, TEXTS, {}),
    "token-classification": (BertForTokenClassification, TEXTS, {}),
    "fill-mask": (BertForMaskedLM, ["the [MASK] sat .", "a [MASK] ran"], {}),
    "zero-shot-classification": (
        BertForSequenceClassification,
        TEXTS[:2],
        {"candidate_labels": ["cat", "dog"], "hypothesis_template": "a {}"},
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_pipelines(task: str, folder: Path) -> None:
    cls, texts, options = TASKS[task]
    torch.manual_seed(0)
    model = cls.from_pretrained(folder)
    model.config.label2id = {"entailment": 0, "contradiction": 1}
    pipe = pipeline(task, model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device=-1)
    expected = [pipe(text, **options) for text in texts]
    bert_fast.accelerate(model)
    close([pipe(text, **options) for text in texts], expected)
    assert accelerated(model)


def test_question_answering(folder: Path) -> None:
    """transformers 5 has no such pipeline any more in every version: tokenizer, model, spans."""
    torch.manual_seed(0)
    model = BertForQuestionAnswering.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["a cat", "the dog sat"], ["the cat sat on the mat", "a dog"],
                      padding=True, return_tensors="pt")  # fmt: skip
    spans = {"start_positions": torch.tensor([3, 4]), "end_positions": torch.tensor([4, 6])}
    with torch.inference_mode():
        expected = model(**batch, **spans)
        found = bert_fast.accelerate(model)(**batch, **spans)
    close(found.loss, expected.loss)  # over padded positions too, as Hugging Face has it
    kept = batch["attention_mask"].bool()
    close(found.start_logits[kept], expected.start_logits[kept])


def test_attention_by_name(folder: Path) -> None:
    """attn_implementation="bert_fast": the mask function comes with it, so padding is not read."""
    bert_fast.register_attention()
    plain = AutoModel.from_pretrained(folder).to(DEVICE)
    named = AutoModel.from_pretrained(folder, attn_implementation="bert_fast").to(DEVICE)
    for kind in ("none", "right", "left", "holes", "4d_bool"):
        mask = masks(4, 11)[kind]
        rows = torch.ones(4, 11, dtype=torch.bool) if mask is None or mask.dim() == 4 else mask > 0
        inputs = {"input_ids": ids(4, 11, 20), "attention_mask": mask}
        gradients = []
        for model in (plain, named):
            model.zero_grad()
            model(**inputs).last_hidden_state[rows].square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    decoder = AutoModel.from_pretrained(folder, attn_implementation="bert_fast", is_decoder=True)
    causal = AutoModel.from_pretrained(folder, is_decoder=True)
    close(decoder(ids(2, 6, 20))[0].detach(), causal(ids(2, 6, 20))[0].detach())


@pytest.mark.parametrize("kind", ["bart", "bert"])
def test_attention_by_name_to_another_sequence(kind: str) -> None:
    """As long as the one that attends: the mask is of the keys alone."""
    bert_fast.register_attention()
    mask = masks(3, 12)["right"]
    if kind == "bart":
        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        model = BartModel(BartConfig(**sizes, **heads)).to(DEVICE).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        inputs = {"input_ids": ids(3, 12, 20), "decoder_input_ids": ids(3, 12, 19) + 1,
                  "attention_mask": mask}  # fmt: skip
    else:
        model = tiny(is_decoder=True, add_cross_attention=True)
        inputs = {"input_ids": ids(3, 12), "encoder_attention_mask": mask,
                  "encoder_hidden_states": torch.randn(3, 12, 64, device=DEVICE)}  # fmt: skip
    found = []
    with torch.inference_mode():
        for name in ("sdpa", "bert_fast"):
            model.set_attn_implementation(name)
            found.append(model(**inputs, use_cache=False)[0])
    close(found[1], found[0])


def test_attention_by_name_drops_in_training(folder: Path) -> None:
    bert_fast.register_attention()
    dropping = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
    model = AutoModel.from_pretrained(folder, attn_implementation="bert_fast", **dropping)
    inputs = {"input_ids": ids(2, 9, 20), "attention_mask": masks(2, 9)["right"]}

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.to(DEVICE)(**inputs).last_hidden_state.detach()

    model.train()
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    model.eval()
    assert torch.equal(run(0), run(1))


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer(bf16: bool, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    data = [
        {"input_ids": ids(1, n, 20)[0], "attention_mask": torch.ones(n), "labels": n % 2}
        for n in range(2, 18)
    ]
    curves = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = BertForSequenceClassification.from_pretrained(
            folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model = bert_fast.accelerate(model) if ours else model
        arguments = TrainingArguments(
            tmp_path / str(ours), use_cpu=True, bf16=bf16, max_steps=6, logging_steps=1,
            per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], seed=0,
            gradient_checkpointing=ours, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder)
        trainer = Trainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="bert_fast")
            trainer.train()
        curves.append([x["loss"] for x in trainer.state.log_history if "loss" in x])
    np.testing.assert_allclose(curves[1], curves[0], rtol=3e-2 if bf16 else 1e-3)


# -- peft, accelerate ----------------------------------------------------------------------------


def with_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["query", "value", "dense"], init_lora_weights=False
    )
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("order", ["accelerate_first", "lora_first"])
@pytest.mark.parametrize("autocast", [False, True])
def test_lora_runs_packed_and_trains(order: str, autocast: bool) -> None:
    plain = with_lora(tiny())
    if order == "lora_first":
        ours = bert_fast.accelerate(with_lora(tiny()))
    else:
        ours = with_lora(bert_fast.accelerate(tiny()))
    mask = masks(4, 11)["right"]
    results = []
    for model in (plain, ours):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            output = model(input_ids=ids(4, 11), attention_mask=mask).last_hidden_state
        kept = output[mask.bool()]
        kept.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"kept": kept.detach(), **grads})
    assert not output[~mask.bool()].any(), "it did not run packed"
    tolerance = {"rtol": 0.2, "atol": 0.2} if autocast else {"rtol": 1e-3, "atol": 1e-3}
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        scale = expected.abs().max()
        torch.testing.assert_close(results[1][name] / scale, expected / scale, **tolerance)
    assert "query unfused" in str(bert_fast.report(ours))


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_an_adapter_names_the_class_as_ever(cls: type, tmp_path: Path) -> None:
    """By which peft imports it again, where bert_fast need not be."""
    peft = pytest.importorskip("peft")
    for folder, model in (("stock", tiny(cls)), ("ours", bert_fast.accelerate(tiny(cls)))):
        config = peft.LoraConfig(r=2, target_modules=["query", "value"])
        peft.get_peft_model(model, config).save_pretrained(tmp_path / folder)
    stock, ours = (tmp_path / one / "adapter_config.json" for one in ("stock", "ours"))
    assert ours.read_text() == stock.read_text()


def test_lora_on_the_embeddings() -> None:
    """Its own module runs, on padding too; what comes after is packed."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["word_embeddings"], init_lora_weights=False)
    model = peft.get_peft_model(tiny(), settings).eval()
    inputs = {"input_ids": ids(4, 11), "attention_mask": masks(4, 11)["right"]}
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        found = bert_fast.accelerate(model)(**inputs).last_hidden_state
    kept = inputs["attention_mask"].bool()
    close(found[kept], expected[kept])
    assert not found[~kept].any(), "it did not run packed"


def test_offload_hooks_fall_back(tmp_path: Path) -> None:
    library = pytest.importorskip("accelerate")
    plain = tiny()
    for first in (True, False):
        ours = copy.deepcopy(plain)
        if first:
            bert_fast.accelerate(ours)
        library.disk_offload(ours, tmp_path / str(first), execution_device="cpu")
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not first:
                bert_fast.accelerate(ours)
            assert torch.equal(ours(ids(2, 5))[0], plain(ids(2, 5))[0])
        assert "not accelerated" in str(bert_fast.report(ours))
