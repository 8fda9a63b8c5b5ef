"""Number formats: bits to numbers and back, rounded to nearest even and only once."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Array = np.ndarray


def bf16_from_f32(x: Array) -> Array:
    """The bits of bfloat16 for float32 values."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def bf16_from_f64(x: Array) -> Array:
    """The bits of bfloat16 for float64 values, by way of a float32 rounded to odd."""
    near = x.astype(np.float32)
    bits = np.ascontiguousarray(near).view(np.uint32)
    exact = near.astype(np.float64) == x
    toward_zero = bits - (np.abs(near.astype(np.float64)) > np.abs(x))
    odd = np.where(exact | ~np.isfinite(near), bits, toward_zero | 1).astype(np.uint32)
    return bf16_from_f32(odd.view(np.float32))


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _table(dtype: torch.dtype) -> Array:
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).numpy()


FP8 = {"e4m3": _table(torch.float8_e4m3fn), "e5m2": _table(torch.float8_e5m2)}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def fp8_from_f32(x: Array, kind: str) -> Array:
    """The bits of an 8-bit float, saturated to the largest finite value as .satfinite does."""
    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    clipped = np.where(np.isnan(x), x, np.clip(x, -LARGEST[kind], LARGEST[kind])).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(clipped)).to(dtype).view(torch.uint8).numpy()


@dataclass(frozen=True)
class Float:
    """How an instruction type reads and writes a register: `load` to the numbers it computes with, `store` back."""

    load: Callable[[Array], Array]  # [threads] of unsigned → [threads] or, packed, [threads, 2]
    store: Callable[[Array], Array]


def _packed(element: Float, half: type, whole: type) -> Float:
    return Float(
        lambda bits: element.load(bits.view(half).reshape(-1, 2)),
        lambda x: np.ascontiguousarray(element.store(x)).view(whole).reshape(-1),
    )


_f32 = Float(lambda bits: bits.view(np.float32), lambda x: x.astype(np.float32, copy=False).view(np.uint32))
_f64 = Float(lambda bits: bits.view(np.float64), lambda x: x.view(np.uint64))
_f16 = Float(lambda bits: bits.view(np.float16).astype(np.float64), lambda x: x.astype(np.float16).view(np.uint16))
_bf16 = Float(lambda bits: bf16_to_f32(bits).astype(np.float64), lambda x: bf16_from_f64(x.astype(np.float64)))
FLOATS = {
    "f32": _f32,
    "f64": _f64,
    "f16": _f16,
    "bf16": _bf16,
    "f32x2": _packed(_f32, np.uint32, np.uint64),
    "f16x2": _packed(_f16, np.uint16, np.uint32),
    "bf16x2": _packed(_bf16, np.uint16, np.uint32),
}
