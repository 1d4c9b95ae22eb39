"""accelerate, restore, report: Hugging Face models run packed and fused, in place.

`accelerate` swaps the class of each inner encoder for its packed one (`packed.packed_class`):
same parameters, same state_dict, same name, another forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from . import ops
from .attention_interface import accelerate_attention, restore_attention
from .families import ATTENTION_ONLY, BY_CLASS, REFUSED, Family, family_of
from .graphs import kept_of
from .masked_lm import (
    PackedHead,
    is_head,
    reasons_against_head,
    reasons_against_loss,
    restore_head,
    swap_head,
)
from .modeling import CHECKPOINTS
from .notice import warn_once
from .packed import (
    OPTIONS,
    Options,
    Packed,
    forget_copies,
    options_of,
    packed_class,
    reasons_against,
    reasons_against_kind,
)
from .paths import Backend
from .probe import strange, strange_head, strange_reading_head
from .reading import (
    ReadingHead,
    is_reading_head,
    reasons_against_reading,
    restore_reading_head,
    swap_reading_head,
)
from .structure import forget_structure, reasons_against_layers, structure_of
from .swap import put_back

M = TypeVar("M")
REPLACED = "its forward was replaced before accelerate was called, so that one runs"


def accelerate(
    model: M,
    backend: Backend = "auto",
    verbose: bool = False,
    sparse_logits: bool = False,
    checkpoint: str = "none",
    dtype: str | None = None,
    graphs: bool = False,
    keep_padding: bool = False,
) -> M:
    """Makes every Hugging Face encoder inside `model` run packed and fused, in place.

    Args:
        model: an encoder of a family in `families.FAMILIES` (bert, roberta, distilbert, ...), a
            head on one, or any module that contains one: a SentenceTransformer, a PEFT model; or a
            pipeline of transformers.
        backend: "auto", one backend for every op, or a mapping from op name to backend; a forced
            backend that cannot run raises, with every kernel's reasons.
        verbose: print `report(model)`.
        sparse_logits: a masked-LM head that is given labels returns no logits in training, and in
            evaluation those of the scored tokens only, [scored, V] as `logits[labels != -100]`
            has them; without labels, and by default, all of them, [B, S, V].
        checkpoint: what training recomputes to save memory. "none": only what costs nothing
            (GELU, dropout masks, norms). "selective": also the inner states of the feed-forward
            network, a third less memory for about a tenth more time (`python -m bench.training`).
            "full": every layer from its input. Hugging Face's `gradient_checkpointing_enable()`
            works as well.
        dtype: None: the model's own everywhere. "int8": in inference, products with the layers'
            weights in 8 bits (on a CPU `ops.linear_int8`, on a GPU `ops.linear_row_int8`), all else
            in the model's dtype. "fp8": the same on a GPU that has e4m3, of a model in bf16 or fp16
            (`ops.linear_fp8`, `ops.feed_forward_fp8`). The weights stay as they are. Where that
            cannot be, the model's dtype is used, with the reason said once (but not inside
            torch.compile and torch.export). Cosine similarities to fp32 are about 0.999 in int8,
            0.997 in fp8; `verify` tells yours.
        graphs: in inference on a GPU, batches of up to 8,192 tokens replay CUDA graphs, recorded at
            their first use for buckets of like sizes (at most 32; then where one came three times
            since the graph was used whose place it takes). Elsewhere it changes nothing.
        keep_padding: padded positions are computed too, as queries, as transformers computes them;
            for a head of yours that reads them. Those known to read them (question answering,
            ColBERT's query expansion) get them without being told; in evaluation without labels
            question answering gives the least logit there is at padding, asked or not. A model of
            which bert_fast takes the attention alone is then left as it is.

    Returns: the same object. Parameters, state_dict, dtype and device are not touched; `restore`
        undoes the change. Another call replaces what was asked for, but for `keep_padding`.
    Raises: ValueError if there is nothing to accelerate, with the reasons; for an unknown op,
        backend, checkpoint or dtype. TypeError for what is no module and holds none.
    Warns: UserWarning, once, if the transformers installed computes something else in a class
        than this version of bert_fast knows; the model is then left as it was.
    """
    check_backend(backend)
    if checkpoint not in CHECKPOINTS:
        raise ValueError(
            f"bert_fast.accelerate: checkpoint is {checkpoint!r}, expected one of {CHECKPOINTS}"
        )
    if dtype not in (None, "int8", "fp8"):
        raise ValueError(
            f"bert_fast.accelerate: dtype is {dtype!r}, expected None, 'int8' or 'fp8'"
        )
    modules = list(_module_of(model).modules())
    found = [m for m in modules if family_of(m) or _other(m)]
    if not found:
        raise ValueError(
            f"bert_fast.accelerate: {type(model).__name__} contains no transformers model of a "
            f"known family: {', '.join(sorted(row.model for row in BY_CLASS.values()))}"
        )
    read_whole = _read_whole(modules)
    refused, unknown = {}, 0
    for module in found:
        row = family_of(module)
        if row is None:
            why = _why_not_other(module, keep_padding or module in read_whole)
            if why:
                restore_attention(module)
            else:
                why = accelerate_attention(module)
            if not why and (backend != "auto" or checkpoint != "none" or dtype or graphs):
                warn_once(
                    f"bert_fast: {type(module).__name__} takes the attention alone: backend, "
                    "checkpoint, dtype and graphs do not apply to it",
                    stacklevel=3,
                )
        elif why := _refusal(module, row):
            pass
        elif told := strange(module, row):
            unknown += 1
            warn_once(told, stacklevel=3)
        else:
            if not isinstance(module, Packed):
                module.__class__ = packed_class(type(module))  # type: ignore[arg-type]
            whole = keep_padding or module in read_whole or options_of(module).keep_padding
            module.__dict__[OPTIONS] = Options(
                backend, whole, checkpoint=checkpoint, dtype=dtype, graphs=graphs
            )
            forget_copies(module)  # they are of what it was told before
        if why:
            refused[module] = why
        elif "forward" in module.__dict__ and isinstance(module, Packed):
            warn_once(f"bert_fast: {type(module).__name__}: {REPLACED}", stacklevel=3)
    for head in filter(is_head, modules):
        if told := strange_head(head):
            warn_once(told, stacklevel=3)
        else:
            swap_head(head, Options(backend, sparse_logits=sparse_logits))
    for head in filter(is_reading_head, modules):
        if told := strange_reading_head(head):
            warn_once(told, stacklevel=3)
        else:
            swap_reading_head(head)
    if len(refused) == len(found):
        told = "; ".join(sorted({reason for why in refused.values() for reason in why}))
        raise ValueError(f"bert_fast.accelerate: cannot accelerate this model: {told}")
    if verbose:
        print(report(model))
    return model


def restore(model: M) -> M:
    """Undoes `accelerate`: the model's own classes run again. Returns the same object."""
    for module in _module_of(model).modules():
        restore_attention(module)
        restore_head(module)
        restore_reading_head(module)
        if family_of(module):
            forget_copies(module)  # those that `embed` made, too
            forget_structure(module)
        if isinstance(module, Packed) and OPTIONS in module.__dict__:
            del module.__dict__[OPTIONS]
            put_back(module)
    return model


@dataclass(frozen=True)
class Report:
    """Per module: accelerated, and if not, why. `str()` gives a text of one line each."""

    swapped: dict[str, str]
    skipped: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{name}: accelerated ({how})" for name, how in self.swapped.items()]
        lines += [f"{name}: not accelerated: {'; '.join(w)}" for name, w in self.skipped.items()]
        return "\n".join(lines) or "no transformers model of a known family inside"


def report(model: Any) -> Report:
    """Which inner encoders run packed and fused, and why the others do not.

    A module that is accelerated but in a state that its packed forward cannot serve (a hook, an
    adapter put in later) is listed as skipped with the reason; Hugging Face's forward runs there.
    """
    result = Report({}, {})
    read_whole = _read_whole(_module_of(model).modules())
    for name, module in _module_of(model).named_modules():
        row, name = family_of(module), name or type(module).__name__
        replaced = [REPLACED] if "forward" in module.__dict__ else []
        if isinstance(module, PackedHead):
            why = reasons_against_head(module, module.bert_fast_head)
            if why := [*why, *reasons_against_loss(module), *replaced]:
                result.skipped[name] = why
            else:
                result.swapped[name] = "loss on scored tokens only"
            continue
        if isinstance(module, ReadingHead):
            if why := reasons_against_reading(module) + replaced:
                result.skipped[name] = why
            else:
                result.swapped[name] = f"its encoder computes {module.bert_fast_reads.what}"
            continue
        if row is None:
            if _other(module):
                swapped = module.config._attn_implementation == "bert_fast"
                if swapped:
                    result.swapped[name] = "attention only"
                else:
                    why = _why_not_other(module, module in read_whole)
                    result.skipped[name] = why or ["accelerate was not called"]
            continue
        packed = isinstance(module, Packed)
        why = why_not_packed(module, row) + (replaced if packed else [])
        if packed and not why:
            options = options_of(module)
            how = [f"backend {options.backend}"]
            how += [f"products of the layers in {options.dtype}"] * bool(options.dtype)
            how += [f"small batches by CUDA graphs, {kept_of(module)} kept"] * options.graphs
            how += ["padding kept where its head reads it"] * options.keep_padding
            how += sorted(
                f"{part} unfused: {type(found).__qualname__}"
                for part, found in {
                    item for layer in row.layers(module) for item in row.parts(layer).linears()
                }
                if type(found) is not nn.Linear
            )
            result.swapped[name] = ", ".join(dict.fromkeys(how))
        else:
            result.skipped[name] = why or ["accelerate was not called on it"]
    return result


def is_encoder(module: nn.Module) -> bool:
    """Whether `accelerate` would pack this module or has packed it."""
    return family_of(module) is not None


def why_not_packed(module: nn.Module, row: Family) -> list[str]:
    """Why this encoder, accelerated or not, cannot run packed as it is now (empty: it can)."""
    why = _refusal(module, row)
    if not why and (told := strange(module, row)):
        why = [told]
    return why or reasons_against(module, structure_of(module, row))


def _refusal(module: nn.Module, row: Family) -> list[str]:
    cls = type(module)
    if not isinstance(module, Packed) and (cls.__module__, cls.__name__) != (row.module, row.model):
        return [f"{cls.__qualname__} is a subclass with code of its own"]
    if (why := reasons_against_kind(module)) or not structure_of(module, row).why:
        return why  # the structure has looked at the layers, and is kept as long as they are
    try:
        return reasons_against_layers(module, row)
    except AttributeError as error:  # an unknown layout: of the class, which `strange` tells, or
        return [] if strange(module, row) else [f"its layers have another layout ({error})"]


def _module_of(model: Any) -> nn.Module:
    """A module itself, or that of a pipeline."""
    found = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"bert_fast: got a {type(model).__name__}, expected a module or a pipeline around one"
        )
    return found


def _read_whole(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """All that is below a head which reads padded positions."""
    return {inner for head in filter(_reads_padding, modules) for inner in head.modules()}


def _reads_padding(module: nn.Module) -> bool:
    """Whether a head reads padded positions: a softmax over all of them (question answering), or
    ColBERT's queries, whose expansion tokens are masked as keys and scored all the same: as
    sentence-transformers has its setting, and as PyLate has it.
    """
    expansion = getattr(module, "query_expansion", None)
    if isinstance(expansion, Mapping):
        return not expansion.get("attend")
    if getattr(module, "do_query_expansion", None) is True:
        return not getattr(module, "attend_to_expansion_tokens", False)
    return type(module).__name__.endswith("ForQuestionAnswering")


# -- families that take the attention alone -----------------------------------------------------


def _other(module: nn.Module) -> bool:
    cls = type(module)
    refused = REFUSED.get(cls.__module__, ("", ""))[0]
    return cls.__name__ in (ATTENTION_ONLY.get(cls.__module__), refused)


def _why_not_other(module: nn.Module, read_whole: bool) -> list[str]:
    found = REFUSED.get(type(module).__module__)
    if found:
        return [found[1]]
    if getattr(module.config, "is_decoder", False):
        return ["it is a decoder or has cross-attention"]
    if read_whole:
        return ["its head reads padded positions, of which this attention computes nothing"]
    return []


def check_backend(backend: Backend) -> None:
    """Raises: ValueError or TypeError for what is no backend."""
    if not isinstance(backend, str | Mapping):
        if not callable(backend):
            raise TypeError(
                f"bert_fast.accelerate: backend is {backend!r}, expected a name, a mapping from op "
                "to name, or a function that chooses"
            )
        return  # it decides per call
    values = [backend] if isinstance(backend, str) else list(backend.values())
    for name in () if isinstance(backend, str) else backend:
        if name not in ops.OPS:
            raise ValueError(f"bert_fast.accelerate: no op {name!r}; ops are {sorted(ops.OPS)}")
    known = {kernel.backend for op in ops.OPS.values() for kernel in op.kernels} | {"auto"}
    for value in values:
        if value not in known:
            raise ValueError(
                f"bert_fast.accelerate: no backend {value!r}; backends are {sorted(known)}"
            )
