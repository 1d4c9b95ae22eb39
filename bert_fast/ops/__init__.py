"""The ops of a post-LN encoder on packed tokens; `OPS` holds their contracts by name."""

from .add_layernorm import add_layernorm
from .attention import attention
from .bias_gelu import bias_gelu
from .embed_layernorm import embed_layernorm
from .encoder import encoder
from .feed_forward import feed_forward
from .feed_forward_fp8 import feed_forward_fp8
from .linear import linear
from .linear_fp8 import linear_fp8
from .linear_gelu import linear_gelu
from .linear_int8 import linear_int8
from .linear_row_int8 import linear_row_int8
from .masked_lm_loss import masked_lm_loss
from .padding import pad, unpad
from .pool import pool
from .qkv_linear import qkv_linear
from .registry import OPS
from .splade import splade

__all__ = [
    "OPS",
    "add_layernorm",
    "attention",
    "bias_gelu",
    "embed_layernorm",
    "encoder",
    "feed_forward",
    "feed_forward_fp8",
    "linear",
    "linear_fp8",
    "linear_gelu",
    "linear_int8",
    "linear_row_int8",
    "masked_lm_loss",
    "pad",
    "pool",
    "qkv_linear",
    "splade",
    "unpad",
]
