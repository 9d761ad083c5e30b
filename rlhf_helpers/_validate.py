"""Argument checks shared by the mathematics: every message names the argument and the fix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def same_shape(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors (None is skipped) have one shape."""
    given = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in given.items())
        raise ValueError(f"shapes differ: {listed}; pass tensors of one shape")


def one_of(value: str, known: Iterable[str], name: str) -> None:
    """Raise ValueError unless `value` is among the `known` names."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, known))}")


def in_range(
    value: float, name: str, low: float, high: float = float("inf"), *, open_low: bool = False
) -> None:
    """Raise ValueError unless low ≤ value ≤ high (low < value if `open_low`); NaN is refused."""
    above = value > low if open_low else value >= low
    if not (above and value <= high):
        left = "(" if open_low else "["
        right = ")" if high == float("inf") else "]"
        raise ValueError(f"{name}={value} must lie in {left}{low}, {high}{right}")


def finite(values: Tensor, name: str, mask: Tensor | None = None) -> None:
    """Raise ValueError if a counted entry of `values` is NaN or infinite, saying where the first
    one is."""
    bad = ~torch.isfinite(values.detach())
    if mask is not None:
        bad = bad & mask
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name}{list(where)} is {values[where].item()}; it must be finite")


def as_mask(mask: Tensor | None, like: Tensor, name: str = "mask") -> Tensor:
    """Return `mask` as booleans of the shape of `like` (all True for None); refuse other shapes
    and empty masks."""
    if mask is None:
        mask = torch.ones_like(like, dtype=torch.bool)
    if mask.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}, the values {tuple(like.shape)}; make them equal"
        )
    mask = mask.bool()
    if not mask.any():
        raise ValueError(f"{name} is empty: no entry counts; pass at least one 1")
    return mask
