"""Checks for the exercises: 'not attempted', 'right', or the name of the typical mistake.

A check compares the reader's function with the right one on a few cases, and if it differs, with
the functions that typical mistakes produce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., object]


def attempt(run: Callable[[], object]) -> object | None:
    """What the reader's code returns; None once it is printed that it raised or returned
    nothing."""
    try:
        found = run()
    except Exception as error:
        print(f"Not yet: your function raised {type(error).__name__}: {error}")
        return None
    if found is None:
        print(
            "Not attempted: your function returns nothing yet. Write it, then run this cell again."
        )
    return found


def judge(
    answer: Function,
    right: Function,
    cases: Sequence[tuple],
    mistakes: dict[str, Function],
    untouched: Function | None = None,
) -> None:
    """Print the verdict on `answer`, a function that returns a number or tensor (or a tuple of
    them).

    Args:
        answer: the reader's function; returning None means not attempted.
        right: the right function.
        cases: arguments to call both with; each call gets fresh copies.
        mistakes: what to say -> the function that this mistake produces.
        untouched: in an exercise to find a bug, the function with the bug.
    """
    try:
        given = [numbers(answer(*_copies(case))) for case in cases]
    except NotImplementedError:
        given = [None]
    except Exception as error:
        print(f"Not yet: your function raised {type(error).__name__}: {error}")
        return
    if any(one is None for one in given):
        print(
            "Not attempted: your function returns nothing yet. Write it, then run this cell again."
        )
        return
    wanted = [numbers(right(*_copies(case))) for case in cases]
    if _agree(given, wanted):
        print("Right.")
        return
    if untouched is not None and _agree(
        given, [numbers(untouched(*_copies(case))) for case in cases]
    ):
        print(
            "Not attempted: the bug is still there. Change the function, then run this cell again."
        )
        return
    for message, mistake in mistakes.items():
        if _agree(given, [numbers(mistake(*_copies(case))) for case in cases]):
            print(f"Not yet: {message}")
            return
    index = next(
        i
        for i, pair in enumerate(zip(given, wanted, strict=True))
        if not _agree(*([one] for one in pair))
    )
    print(
        f"Not yet: in test case {index + 1} your function gives {_short(given[index])}, not"
        f" {_short(wanted[index])}."
    )


def judge_number(
    answer: float | None, right: float, mistakes: dict[str, float], tolerance: float = 0.01
) -> None:
    """Print the verdict on a predicted number: right within `tolerance` (relative), or which
    mistake gives it.

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
    if getattr(answer, "ndim", None) == 0:
        answer = answer.item()  # a number of NumPy or torch
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        print(f"Not yet: {answer!r} is not a number; write one such as 0.5.")
        return
    if near(float(answer), right):
        print("Right.")
        return
    for message, wrong in mistakes.items():
        if near(float(answer), wrong):
            print(f"Not yet: {message}")
            return
    print(
        "Not yet: work it out on paper with the numbers above; no typical mistake gives this one."
    )


def _copies(case: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in case)


def numbers(value: object) -> Tensor | None:
    """A number, tensor or tuple of them as one flat float64 tensor; None stays None."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        parts = [numbers(part) for part in value]
        return None if any(part is None for part in parts) else torch.cat(parts)
    return torch.as_tensor(value, dtype=torch.float64).detach().reshape(-1)


def _agree(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    pairs = zip(given, wanted, strict=True)
    return all(
        g.shape == w.shape and torch.allclose(g, w, rtol=1e-5, atol=1e-8, equal_nan=True)
        for g, w in pairs
    )


def _short(numbers: Tensor) -> str:
    shown = ", ".join(f"{x:.4g}" for x in numbers[:4].tolist())
    return f"[{shown}{', …' if len(numbers) > 4 else ''}]" if len(numbers) != 1 else shown


def gradient_of(loss: Function) -> Function:
    """The same arguments -> the gradient of the loss with respect to the first of them; None stays
    None."""

    def gradient(first: Tensor, *rest: object) -> Tensor | None:
        first = first.requires_grad_()
        value = loss(first, *rest)
        if value is None:
            return None
        if value.numel() != 1:
            raise ValueError("return one number: take the mean")
        if not value.requires_grad:
            raise ValueError("nothing in this loss depends on the logits any more")
        return torch.autograd.grad(value, first)[0]

    return gradient


def vector(values: list) -> Tensor:
    """Numbers as a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)
