"""Which Hugging Face models run packed: one row a family, one function a layout of names.

Every row is the same post-LN encoder (Vaswani et al., arXiv 1706.03762; Devlin et al.,
arXiv 1810.04805) under other names: a new family is a new row. Nothing here imports transformers;
rows are found by the names of classes. Whether a row is true of the transformers installed, a
small model of the class tells (`probe`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn


class LayerParts(NamedTuple):
    """The leaf modules of one post-LN encoder layer; None for a dropout it does not have.

    width: of a head, by which transformers cuts queries, keys and values; how many heads there are
        it asks of nobody.
    attention: whose mode says whether its dropout is applied, as transformers asks it.
    """

    width: int
    attention: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_dropout: nn.Module
    out: nn.Module
    out_dropout: nn.Module | None
    out_norm: nn.Module
    up: nn.Module
    activation: nn.Module
    down: nn.Module
    down_dropout: nn.Module | None
    down_norm: nn.Module

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        for name in ("query", "key", "value", "out", "up", "down"):
            yield name, getattr(self, name)

    def norms(self) -> Iterator[tuple[str, nn.Module]]:
        yield "out_norm", self.out_norm
        yield "down_norm", self.down_norm

    def dropouts(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Each with the module whose mode switches it."""
        yield self.attention, self.attention_dropout
        for one in (self.out_dropout, self.down_dropout):
            if one is not None:
                yield one, one

    @property
    def scale(self) -> float:
        """Of the scores, asked of the module as transformers asks it."""
        return getattr(self.attention, "scaling", self.width**-0.5)

    def leaves(self) -> set[nn.Module]:
        """All that run as they are or are replaced by a fusion: whose insides are their own."""
        return {part for part in self[2:] if isinstance(part, nn.Module)}


def bert_layer(layer: nn.Module) -> LayerParts:
    attention, out, end = layer.attention.self, layer.attention.output, layer.output
    return LayerParts(
        *(attention.attention_head_size, attention),
        *(attention.query, attention.key, attention.value, attention.dropout),
        *(out.dense, out.dropout, out.LayerNorm),
        *(layer.intermediate.dense, layer.intermediate.intermediate_act_fn),
        *(end.dense, end.dropout, end.LayerNorm),
    )


def mpnet_layer(layer: nn.Module) -> LayerParts:
    outer, end = layer.attention, layer.output
    attention = outer.attn
    return LayerParts(
        *(attention.attention_head_size, attention.dropout),
        *(attention.q, attention.k, attention.v, attention.dropout),
        *(attention.o, outer.dropout, outer.LayerNorm),
        *(layer.intermediate.dense, layer.intermediate.intermediate_act_fn),
        *(end.dense, end.dropout, end.LayerNorm),
    )


def distilbert_layer(layer: nn.Module) -> LayerParts:
    attention, ffn = layer.attention, layer.ffn
    return LayerParts(
        *(attention.attention_head_size, attention),
        *(attention.q_lin, attention.k_lin, attention.v_lin, attention.dropout),
        *(attention.out_lin, None, layer.sa_layer_norm),
        *(ffn.lin1, ffn.activation),
        *(ffn.lin2, ffn.dropout, layer.output_layer_norm),
    )


def albert_layer(layer: nn.Module) -> LayerParts:
    attention = layer.attention
    return LayerParts(
        *(attention.attention_head_size, attention),
        *(attention.query, attention.key, attention.value, attention.attention_dropout),
        *(attention.dense, attention.output_dropout, attention.LayerNorm),
        *(layer.ffn, layer.activation),
        *(layer.ffn_output, None, layer.full_layer_layer_norm),
    )


def albert_layers(model: nn.Module) -> list[nn.Module]:
    """The layers in the order they run, shared ones several times."""
    config, groups = model.config, model.encoder.albert_layer_groups
    per_group = config.num_hidden_layers / config.num_hidden_groups
    return [
        layer
        for i in range(config.num_hidden_layers)
        for layer in groups[int(i / per_group)].albert_layers
    ]


def bert_pooled(model: nn.Module, last: Tensor) -> Tensor | None:
    return None if model.pooler is None else model.pooler(last)


def albert_pooled(model: nn.Module, last: Tensor) -> Tensor | None:
    return None if model.pooler is None else model.pooler_activation(model.pooler(last[:, 0]))


def mpnet_bias(model: nn.Module, length: int, like: Tensor) -> Tensor:
    """[1, N, length, length], learned, by relative position (Song et al., arXiv 2004.09297)."""
    return model.encoder.compute_position_bias(like.new_empty(1, length))


@dataclass(frozen=True, eq=False)  # one object a row
class Family:
    """One row: where a family's classes are, and where its parts are by name.

    module: the dotted module of its model class `model` and its layer class `layer`.
    layers, parts: a model's layers in running order, a layer's leaf modules.
    project: the linear map between embeddings and layers, where sizes differ.
    pooled: the pooler's output of the last hidden state [B, S, H]; None for models without one.
    bias: a learned bias of the scores, [1, N, S, S].
    extra: embedding inputs beyond ids, types and positions, and the trailing shape of the zeros
        that stand for an absent one (None: it may be absent).
    output: the class of its outputs in `transformers.modeling_outputs`.
    pooled_in_tuple: whether a tuple of them has a None where there is no pooler.
    """

    module: str
    model: str
    layer: str
    layers: Callable[[nn.Module], Any] = lambda model: model.encoder.layer
    parts: Callable[[nn.Module], LayerParts] = bert_layer
    project: Callable[[nn.Module], nn.Module | None] = lambda model: None
    pooled: Callable[[nn.Module, Tensor], Tensor | None] | None = bert_pooled
    bias: Callable[[nn.Module, int, Tensor], Tensor] | None = None
    extra: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"
    pooled_in_tuple: bool = False


def _row(folder: str, stem: str, file: str | None = None, **changes: Any) -> Family:
    changes = {"model": f"{stem}Model", "layer": f"{stem}Layer", **changes}
    return Family(f"transformers.models.{folder}.modeling_{file or folder}", **changes)


_POOLING, _PAST = "BaseModelOutputWithPooling", "BaseModelOutputWithPastAndCrossAttentions"

FAMILIES = (
    _row("bert", "Bert"),
    _row("roberta", "Roberta"),
    _row("xlm_roberta", "XLMRoberta"),
    _row("camembert", "Camembert"),
    _row("data2vec", "Data2VecText", "data2vec_text"),
    _row("ernie", "Ernie", extra={"task_type_ids": None}),
    _row("roc_bert", "RoCBert", extra={"input_shape_ids": None, "input_pronunciation_ids": None}),
    _row("bert_generation", "BertGeneration", model="BertGenerationEncoder", pooled=None,
         output=_PAST),
    _row("electra", "Electra", project=lambda model: getattr(model, "embeddings_project", None),
         pooled=None, output=_PAST),
    _row("distilbert", "DistilBert", layer="TransformerBlock", parts=distilbert_layer,
         layers=lambda model: model.transformer.layer, pooled=None, output="BaseModelOutput"),
    _row("albert", "Albert", layers=albert_layers, parts=albert_layer, pooled=albert_pooled,
         project=lambda model: model.encoder.embedding_hidden_mapping_in, output=_POOLING),
    _row("mpnet", "MPNet", parts=mpnet_layer, bias=mpnet_bias, output=_POOLING,
         pooled_in_tuple=True),
    _row("layoutlm", "LayoutLM", extra={"bbox": (4,)}, output=_POOLING),
    _row("markuplm", "MarkupLM", extra={"xpath_tags_seq": None, "xpath_subs_seq": None},
         output=_POOLING),
    _row("splinter", "Splinter", pooled=None, output="BaseModelOutput"),
)  # fmt: skip

BY_CLASS = {(row.module, row.model): row for row in FAMILIES}


class HeadParts(NamedTuple):
    """The leaf modules of a masked-LM head; the activation by name where it is no module."""

    dense: nn.Module
    activation: nn.Module | str
    norm: nn.Module
    decoder: nn.Module


def bert_head(model: nn.Module) -> HeadParts:
    predictions = model.cls.predictions
    first = predictions.transform
    return HeadParts(first.dense, first.transform_act_fn, first.LayerNorm, predictions.decoder)


def roberta_head(model: nn.Module) -> HeadParts:
    head = model.lm_head
    return HeadParts(head.dense, "gelu", head.layer_norm, head.decoder)


def electra_head(model: nn.Module) -> HeadParts:
    first = model.generator_predictions
    return HeadParts(first.dense, first.activation, first.LayerNorm, model.generator_lm_head)


def distilbert_head(model: nn.Module) -> HeadParts:
    dense, norm = model.vocab_transform, model.vocab_layer_norm
    return HeadParts(dense, model.activation, norm, model.vocab_projector)


def albert_head(model: nn.Module) -> HeadParts:
    head = model.predictions
    return HeadParts(head.dense, head.activation, head.LayerNorm, head.decoder)


class PairTask(NamedTuple):
    """The task on the pooled output beside masked LM: its classifier, and the names of its
    logits among the outputs and of its labels among the arguments."""

    classifier: Callable[[nn.Module], nn.Module]
    logits: str
    labels: str


@dataclass(frozen=True, eq=False)
class Head:
    """One row: a head that predicts masked tokens, dense + activation + LayerNorm + decoder.

    module: the dotted module of its class `model` and of the class of its outputs, `output`.
    logits: the name of the token logits among the outputs.
    """

    module: str
    model: str
    parts: Callable[[nn.Module], HeadParts] = bert_head
    output: str = "MaskedLMOutput"
    logits: str = "logits"
    pair: PairTask | None = None


def _masked_lm(folder: str, stem: str, file: str | None = None, **changes: Any) -> Head:
    module = f"transformers.models.{folder}.modeling_{file or folder}"
    return Head(module, f"{stem}ForMaskedLM", **changes)


def _pre_training(folder: str, stem: str, pair: PairTask, **changes: Any) -> Head:
    model = f"{stem}ForPreTraining"
    module = f"transformers.models.{folder}.modeling_{folder}"
    return Head(module, model, output=f"{model}Output", logits="prediction_logits", pair=pair,
                **changes)  # fmt: skip


_NEXT_SENTENCE = PairTask(
    lambda model: model.cls.seq_relationship, "seq_relationship_logits", "next_sentence_label"
)
_SENTENCE_ORDER = PairTask(
    lambda model: model.sop_classifier, "sop_logits", "sentence_order_label"
)  # fmt: skip

HEADS = (
    _masked_lm("bert", "Bert"),
    _pre_training("bert", "Bert", _NEXT_SENTENCE),
    _masked_lm("roberta", "Roberta", parts=roberta_head),
    _masked_lm("xlm_roberta", "XLMRoberta", parts=roberta_head),
    _masked_lm("camembert", "Camembert", parts=roberta_head),
    _masked_lm("data2vec", "Data2VecText", "data2vec_text", parts=roberta_head),
    _masked_lm("ernie", "Ernie"),
    _pre_training("ernie", "Ernie", _NEXT_SENTENCE),
    _masked_lm("electra", "Electra", parts=electra_head),
    _masked_lm("distilbert", "DistilBert", parts=distilbert_head),
    _masked_lm("albert", "Albert", parts=albert_head),
    _pre_training("albert", "Albert", _SENTENCE_ORDER, parts=albert_head),
    _masked_lm("mpnet", "MPNet", parts=roberta_head),
    _masked_lm("layoutlm", "LayoutLM"),
)


class Reading(NamedTuple):
    """What a head reads of its encoder's states: "first tokens", by itself or through the pooler,
    or "real tokens" (so far as there is no loss; see `reading`).

    by: the child that is handed all states and, as transformers made it, reads no more.
    """

    what: str
    by: str | None = None


# By its class, where it hands keywords on to the encoder (MPNet's do not). Of spans, where the
# words alone are the input.
_FIRST = ("SequenceClassification",)
_CHOICE = (*_FIRST, "MultipleChoice")
_PAIR = (*_CHOICE, "NextSentencePrediction")
READING_HEADS = {
    (f"transformers.models.{folder}.modeling_{file or folder}", f"{stem}For{task}"): reads
    for folder, file, stem, first, classifier in (
        ("bert", None, "Bert", _PAIR, None),
        ("roberta", None, "Roberta", _CHOICE, "classifier"),
        ("xlm_roberta", None, "XLMRoberta", _CHOICE, "classifier"),
        ("camembert", None, "Camembert", _CHOICE, "classifier"),
        ("data2vec", "data2vec_text", "Data2VecText", _CHOICE, "classifier"),
        ("ernie", None, "Ernie", _PAIR, None),
        ("electra", None, "Electra", _FIRST, "classifier"),
        ("distilbert", None, "DistilBert", _CHOICE, None),
        ("albert", None, "Albert", _CHOICE, None),
    )
    for reads, tasks in (
        (Reading("first tokens", classifier), _FIRST),
        (Reading("first tokens"), first[1:]),
        (Reading("real tokens", "qa_outputs"), ("QuestionAnswering",)),
    )
    for task in tasks
}

HEAD_BY_CLASS = {(row.module, row.model): row for row in HEADS}

# Other encoders: not post-LN, or with rotary positions. They take the attention alone, where
# their code asks transformers' registry for it; the reason is what `accelerate` says otherwise.
ATTENTION_ONLY = {
    "transformers.models.esm.modeling_esm": "EsmModel",
    "transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm":
        "RobertaPreLayerNormModel",
    "transformers.models.modernbert.modeling_modernbert": "ModernBertModel",
}  # fmt: skip
REFUSED = {
    "transformers.models.megatron_bert.modeling_megatron_bert": (
        "MegatronBertModel",
        "megatron_bert normalises before each sublayer and computes its attention by itself",
    ),
}


def family_of(model: nn.Module) -> Family | None:
    """The row of a model's class, or of the class it was before it was accelerated."""
    for cls in type(model).__mro__:
        if row := BY_CLASS.get((cls.__module__, cls.__name__)):
            return row
    return None
