"""Device functions and launch helpers shared by the Triton kernels.

All arithmetic is in float32: `load` widens at once, `store` narrows with round-to-nearest-even.
The interpreter computes wrongly in bfloat16 and truncates when it narrows to it, so both places
know whether they are interpreted (INTERPRET); compiled code pays nothing for that.
"""

import functools

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)

# ------------------------------------------------------------------------------ memory


@triton.jit
def load(
    p_x,  # block of pointers
    mask,  # block of booleans, or None
):
    """x as float32, 0 where masked."""
    if mask is None:
        return tl.load(p_x).to(tl.float32)
    return tl.load(p_x, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_operand(
    p_x,  # block of pointers
    mask,  # block of booleans, or None
):
    """x in its own dtype for tensor cores, 0 where masked (floats as float32 when interpreted)."""
    if mask is None:
        x = tl.load(p_x)
    else:
        x = tl.load(p_x, mask=mask, other=0.0)
    return operand(x)


@triton.jit
def operand(
    x,
):
    """What tensor cores are given of a block (floats as float32 when interpreted)."""
    if INTERPRET and x.dtype != tl.int8:
        x = x.to(tl.float32)
    return x


@triton.jit
def rounded(
    y,  # float32 block
    dtype: tl.constexpr,
):
    """y, and where the interpreter would cut it off to `dtype`, rounded to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        bits = (bits + ((bits >> 16) & 1) + 0x7FFF) & 0xFFFF0000
        y = tl.where(y == y, bits.to(tl.float32, bitcast=True), y)
    if INTERPRET and dtype == tl.float8e4nv:
        bits = y.to(tl.uint32, bitcast=True)
        bits = (bits + ((bits >> 20) & 1) + 0x7FFFF) & 0xFFF00000
        # below 2^-6 its numbers are 2^-9 apart, as those of float32 are at 2^14
        y = tl.where(tl.abs(y) < 0.015625, y + 24576.0 - 24576.0, bits.to(tl.float32, bitcast=True))
    return y


@triton.jit
def store(
    p_y,  # block of pointers
    y,  # float32 block
    mask,  # block of booleans
):
    """Writes y in the dtype of the pointer, rounded to nearest even."""
    dtype: tl.constexpr = p_y.dtype.element_ty
    tl.store(p_y, rounded(y, dtype).to(dtype), mask=mask)


@triton.jit
def inverse_of_power(
    p,  # float32 powers of two, from 2^-126 to 2^127
):
    """1 / p, exactly, which a division on a GPU does not promise."""
    return (0x7F000000 - p.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


# ------------------------------------------------------------------------- activations


@triton.jit
def _normal_tail(
    u,  # float32 block
):
    """(Phi(-x), x) of x = min(|u|, 10), by a polynomial of degree 6 in the exponent.

    A minimax fit of log2 Phi(-x) on 0 .. 5.5: Phi is off by 2e-5 of itself there, and beyond it by
    less than 1e-8; at 10 it is 2^-75. A third of the instructions of erf, which would take longer
    than a product of 768 terms on tensor cores.
    """
    x = tl.minimum(tl.abs(u), 10.0)
    r = x * 2.615375e-05 - 0.0006609812
    r = r * x + 0.00748831
    r = r * x - 0.05197041
    r = r * x - 0.4603295
    r = r * x - 1.150584
    r = r * x - 1.000036
    return tl.exp2(r), x


@triton.jit
def activate(
    u,  # float32 block
    ACT: tl.constexpr,  # "gelu" | "gelu_tanh" | "relu" | "silu" | "none"
    SHORT: tl.constexpr,  # whether act(u) is rounded to 16 bits or fewer: a few 1e-6 vanish then
):
    """act(u)."""
    if ACT == "gelu" and SHORT:
        tail, x = _normal_tail(u)
        y = tl.where(u < 0.0, 0.0, u) - x * tail  # NaN stays NaN
    elif ACT == "gelu":
        y = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z): one exponential, no overflow
        y = u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    elif ACT == "relu":
        y = tl.where(u < 0.0, 0.0, u)  # keeps NaN, unlike maximum
    elif ACT == "silu":
        y = u * tl.sigmoid(u)
    else:
        tl.static_assert(ACT == "none")
        y = u
    return y


@triton.jit
def _sigmoid_slope(
    v,  # float32 block
):
    """sigmoid(v) and its derivative s (1 - s), without the cancellation in 1 - s."""
    t = tl.exp(-tl.abs(v))
    r = 1.0 / (1.0 + t)
    return tl.where(v < 0.0, t * r, r), t * r * r


@triton.jit
def activate_grad(
    u,  # float32 block
    ACT: tl.constexpr,  # as in activate
    SHORT: tl.constexpr,  # as in activate
):
    """act'(u)."""
    if ACT == "gelu" and SHORT:
        tail, _ = _normal_tail(u)
        density = tl.exp2(u * u * -0.7213475204444817) * 0.3989422804014327
        d = tl.where(u < 0.0, tail, 1.0 - tail) + u * density
    elif ACT == "gelu":
        phi = tl.exp(-0.5 * u * u) * 0.3989422804014327
        d = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * phi
    elif ACT == "gelu_tanh":
        s, slope = _sigmoid_slope(1.5957691216057308 * (u + 0.044715 * u * u * u))
        d = s + u * slope * 1.5957691216057308 * (1.0 + 0.134145 * u * u)
    elif ACT == "relu":
        d = tl.where(u <= 0.0, 0.0, 1.0)  # 1 of NaN, as PyTorch
    elif ACT == "silu":
        s, slope = _sigmoid_slope(u)
        d = s + u * slope
    else:
        tl.static_assert(ACT == "none")
        d = u * 0.0 + 1.0
    return d


# ----------------------------------------------------------------------------- dropout


@triton.jit
def keep_mask(
    p_seed,  # [1] int64
    o_row,  # [ROWS] row of the mask
    col,  # first column of the tile, a multiple of 4
    threshold,  # int32: floor(p 2^32) - 2^31
    COLS: tl.constexpr,  # columns of the tile, a multiple of 4
):
    """keep[r, c] = philox(seed, (c >> 2, r, 0, 0))[c & 3] >= floor(p 2^32), as [ROWS, COLS].

    One Philox call serves four neighbouring columns: its four words are joined, not recomputed.
    """
    group = (col // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)
    c0 = group[None, :]
    c1 = o_row.to(tl.uint32)[:, None] + (c0 * 0)
    zero = c1 * 0
    r0, r1, r2, r3 = tl.philox(tl.load(p_seed), c0 + zero, c1, zero, zero)
    even = tl.join(_kept(r0, threshold), _kept(r2, threshold))
    odd = tl.join(_kept(r1, threshold), _kept(r3, threshold))
    return tl.reshape(tl.join(even, odd), (o_row.shape[0], COLS))  # from [ROWS, COLS / 4, 2, 2]


@triton.jit
def _kept(
    word,  # uint32 block
    threshold,  # int32: floor(p 2^32) - 2^31
):
    """word >= floor(p 2^32), unsigned: the sign bit is flipped, as `threshold` travels as int32."""
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@functools.lru_cache
def dropout_args(p: float) -> tuple[int, float]:
    """(threshold, 1 / (1 - p)) as the kernels take them; p = 1 keeps (almost) nothing, times 0."""
    threshold = min(int(p * 2**32), 2**32 - 1) - 2**31
    return threshold, 1.0 / (1.0 - p) if p < 1.0 else 0.0


# --------------------------------------------------------------------------- row norms


@triton.jit
def row_stats(
    z,  # [ROWS, COLS] float32, 0 where masked
    mask,  # [ROWS, COLS]
    n_cols,
    eps,
):
    """Mean and 1 / sqrt(var + eps) of every row; two passes over registers, so no cancellation."""
    mean = tl.sum(z, 1) / n_cols
    centred = tl.where(mask, z - mean[:, None], 0.0)
    var = tl.sum(centred * centred, 1) / n_cols
    return mean, 1.0 / tl.sqrt(var + eps)


@triton.jit
def norm_grad(
    dy,  # [ROWS, COLS] float32, 0 where masked
    xhat,  # [ROWS, COLS] float32, 0 where masked
    weight,  # [COLS] float32
    rstd,  # [ROWS]
    n_cols,
):
    """dz = rstd (g - mean(g) - xhat mean(g xhat)) with g = dy weight."""
    g = dy * weight[None, :]
    mean_g = tl.sum(g, 1) / n_cols
    mean_gx = tl.sum(g * xhat, 1) / n_cols
    return rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])


MAX_HIDDEN = 8192  # a row is one block
MANY_ROWS = 4096  # from here on programs take several rows and still fill the device


@functools.lru_cache
def row_config(many_rows: bool, n_cols: int, backward: bool) -> dict[str, int]:
    """Block sizes by width: about 8 columns a thread (one 16-byte access in 16-bit types)."""
    cols = max(16, triton.next_power_of_2(n_cols))
    if cols > MAX_HIDDEN:
        raise ValueError(f"hidden size must be <= {MAX_HIDDEN}, got {n_cols}")
    rows = 1
    if many_rows and cols <= 2048:
        rows = 2 if backward else 4
    warps = min(16, max(1, cols // 256))
    return {"ROWS": rows, "COLS": cols, "num_warps": warps, "enable_fp_fusion": True}


def row_programs(n_rows: int, cfg: dict[str, int], device: torch.device) -> int:
    """Programs of a backward pass: 16 warps a processor (128 registers a thread)."""
    some = triton.cdiv(n_rows, 4 * cfg["ROWS"])
    return min(some, max(1, 16 // cfg["num_warps"]) * processors(device))


# ----------------------------------------------------------------------- ordered sums


@triton.jit(do_not_specialize=["n_parts"])
def _sum_parts_kernel(
    parts,  # [n_parts, n_outs, n_cols] float32
    out_0,  # [n_cols] or None
    out_1,  # [n_cols] or None
    out_2,  # [n_cols] or None
    n_parts,
    n_cols,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    i_out = tl.program_id(1)
    if out_0 is None:
        if i_out == 0:
            return
    if out_1 is None:
        if i_out == 1:
            return
    o_col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    o_part = tl.arange(0, PARTS)
    m_col = o_col < n_cols
    stride = tl.num_programs(1).to(tl.int64) * n_cols
    p_parts = parts + i_out.to(tl.int64) * n_cols + o_col[None, :]
    acc = tl.zeros((PARTS, COLS), tl.float32)
    for i_part in range(0, n_parts, PARTS):
        row = (i_part + o_part)[:, None]
        acc += tl.load(p_parts + row * stride, mask=(row < n_parts) & m_col[None, :], other=0.0)
    total = tl.sum(acc, 0)
    if out_0 is not None:
        if i_out == 0:
            store(out_0 + o_col, total, m_col)
    if out_1 is not None:
        if i_out == 1:
            store(out_1 + o_col, total, m_col)
    if out_2 is not None:
        if i_out == 2:
            store(out_2 + o_col, total, m_col)


def sum_parts(
    parts: torch.Tensor,  # [n_parts, n_outs, n_cols] float32
    *outs: torch.Tensor | None,  # n_outs of [n_cols]; None is skipped
) -> None:
    """out_i = sum over n of parts[n, i], in a fixed order: the same bits every time."""
    n_parts, n_outs, n_cols = parts.shape
    # narrow blocks while the columns are few, to occupy the device
    cols = 32 if n_cols < 2**16 else 128
    _sum_parts_kernel[(triton.cdiv(n_cols, cols), n_outs)](
        parts, *outs, *(None,) * (3 - n_outs), n_parts, n_cols,
        PARTS=32, COLS=cols, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------- host


@functools.lru_cache
def family(device: torch.device) -> str:
    """The column of a config table that serves this device.

    Parts are grouped by what limits a tile: shared memory and the kind of tensor core. Compute
    capabilities 8.6, 8.9 and 12.x have 99 KiB of shared memory, the data-centre parts 163 or 227.
    """
    if INTERPRET.value:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx9"
    return {80: "sm80", 87: "sm80", 90: "sm90", 100: "sm100", 103: "sm100"}.get(
        target.arch, "sm120"
    )


def precision(dtype: torch.dtype) -> str:
    """How float32 matrices are multiplied: exactly, unless torch's own flag allows TF32."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device: how many programs run at a time."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 3 if INTERPRET.value else 132
