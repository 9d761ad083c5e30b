"""Checks for the exercises: 'not attempted', 'right', or the name of the typical mistake.

A check compares the reader's function with the right one on a few cases, and if it differs, with the functions that
typical mistakes produce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., object]


def judge(answer: Function, right: Function, cases: Sequence[tuple], mistakes: dict[str, Function]) -> None:
    """Print the verdict on `answer`, a function that returns a number or tensor (or a tuple of them).

    Args:
        answer: the reader's function; returning None means not attempted.
        right: the right function.
        cases: arguments to call both with; each call gets fresh copies.
        mistakes: what to say -> the function that this mistake produces.
    """
    try:
        given = [_numbers(answer(*_copies(case))) for case in cases]
    except NotImplementedError:
        given = [None]
    except Exception as error:
        print(f"Not yet: your function raised {type(error).__name__}: {error}")
        return
    if any(one is None for one in given):
        print("Not attempted: replace the stub's `return None` with your own code, then run this cell again.")
        return
    wanted = [_numbers(right(*_copies(case))) for case in cases]
    if _agree(given, wanted):
        print("Right.")
        return
    for message, mistake in mistakes.items():
        if _agree(given, [_numbers(mistake(*_copies(case))) for case in cases]):
            print(f"Not yet: {message}")
            return
    index = next(i for i, pair in enumerate(zip(given, wanted, strict=True)) if not _agree(*([one] for one in pair)))
    print(f"Not yet: in test case {index + 1} your function gives {_short(given[index])}, not {_short(wanted[index])}.")


def judge_number(answer: float | None, right: float, mistakes: dict[str, float], tolerance: float = 0.01) -> None:
    """Print the verdict on a predicted number: right within `tolerance` (relative), or which mistake gives it.

    Args:
        answer: the prediction; None means not attempted.
        right: the right number.
        mistakes: what to say -> the number that this mistake produces.
        tolerance: relative to the right number, and absolute where that is smaller than 1.
    """

    def near(x: float, y: float) -> bool:
        return abs(x - y) <= tolerance * max(1.0, abs(y))

    if answer is None:
        print("Not attempted: replace None with your prediction, then run this cell again.")
        return
    if near(float(answer), right):
        print("Right.")
        return
    for message, wrong in mistakes.items():
        if near(float(answer), wrong):
            print(f"Not yet: {message}")
            return
    print("Not yet: work it out on paper with the numbers above; no typical mistake gives this one.")


def _copies(case: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in case)


def _numbers(value: object) -> Tensor | None:
    """A number, tensor or tuple of them as one flat float64 tensor; None stays None."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        parts = [_numbers(part) for part in value]
        return None if any(part is None for part in parts) else torch.cat(parts)
    return torch.as_tensor(value, dtype=torch.float64).detach().reshape(-1)


def _agree(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    pairs = zip(given, wanted, strict=True)
    return all(g.shape == w.shape and torch.allclose(g, w, rtol=1e-5, atol=1e-8, equal_nan=True) for g, w in pairs)


def _short(numbers: Tensor) -> str:
    shown = ", ".join(f"{x:.4g}" for x in numbers[:4].tolist())
    return f"[{shown}{', …' if len(numbers) > 4 else ''}]" if len(numbers) != 1 else shown


# Chapter 01


# Chapter 02


# Chapter 03
