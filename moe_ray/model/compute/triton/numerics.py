"""Device functions by which the trunk's kernels round as the reference does, on a card and in the interpreter.

The interpreter keeps bfloat16 as its bits, multiplies these as integers and cuts where a card rounds. EMULATED, of each
kernel that may meet bfloat16, says that it runs there: then bits are rounded by hand, and products taken in float32.
"""

from __future__ import annotations

from moe_ray.model.compute.triton.launch import tl, triton


@triton.jit
def product(a: tl.tensor, b: tl.tensor, added: tl.tensor, EMULATED: tl.constexpr) -> tl.tensor:
    """a [M, K] times b [K, N] plus `added` [M, N], float32. Of float32 in full: no TF32."""
    if EMULATED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, added, input_precision="ieee")


@triton.jit
def narrowed(x: tl.tensor, DTYPE: tl.constexpr, EMULATED: tl.constexpr) -> tl.tensor:
    """x, float32, in DTYPE: rounded to nearest, ties to even."""
    if EMULATED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = tl.where(x == x, upper, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(DTYPE)
    return result


@triton.jit
def stepped(x: tl.tensor, DTYPE: tl.constexpr, EMULATED: tl.constexpr) -> tl.tensor:
    """x, float32, rounded to DTYPE, as float32: what an operation of the reference in DTYPE leaves of a number."""
    return narrowed(x, DTYPE, EMULATED).to(tl.float32)


@triton.jit
def whole(x: tl.tensor) -> tl.tensor:
    """x, float32 of magnitude below 2^22, rounded to an integer, ties to even, as float32."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: there floats are whole numbers


@triton.jit
def from_float8(bits: tl.tensor) -> tl.tensor:
    """float32 of float8 e4m3 [...], given as uint8: by its bits, for cards before 8.9 cannot convert them."""
    wide = bits.to(tl.uint16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)  # biases are 15 and 7


@triton.jit
def to_float8(x: tl.tensor) -> tl.tensor:
    """x, float32, as float8 e4m3, the bits as uint8: see `to_float8` of torch/kv_rows.py."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    rounded = magnitude.to(tl.uint32, bitcast=True)
    rounded = (rounded + 0x7FFFF + ((rounded >> 20) & 1)) >> 20
    subnormal = whole(magnitude * 512.0).to(tl.uint32)
    code = tl.where(magnitude < 0.015625, subnormal, rounded - 960)  # biases are 127 and 7, of 8 steps each
    code = tl.where(tl.abs(x) < float("inf"), code, 0x7F)
    return (code | ((bits >> 31) << 7)).to(tl.uint8)
