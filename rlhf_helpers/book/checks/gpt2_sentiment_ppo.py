"""Checks of the exercises of gpt2_sentiment_ppo."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, judge, judge_number, vector

DIAGNOSIS = {"A": "hacked", "B": "moving", "C": "healthy"}


def _loss(
    log_probs: Tensor,
    values: Tensor,
    old: Tensor,
    ref: Tensor,
    old_values: Tensor,
    scores: Tensor,
    mask: Tensor,
    beta: float,
    clip: float,
    c1: float,
    mistake: str = "",
) -> Tensor:
    """The loss of exercise 1, or what one mistake makes of it."""
    drift = (log_probs if mistake == "price" else old) - ref
    rewards = (beta if mistake == "paid" else -beta) * drift * mask
    if mistake == "everywhere":
        rewards = rewards + scores[:, None] * mask
    else:
        last = torch.full_like(scores, -1).long() if mistake == "column" else mask.sum(1) - 1
        rewards[torch.arange(len(scores)), last] += scores
        rewards = rewards * mask
    targets = rewards if mistake == "returns" else rewards.flip(1).cumsum(1).flip(1)
    advantages = targets - (values if mistake == "values" else old_values)
    counted = advantages.flatten() if mistake == "padding" else advantages[mask]
    white = (advantages - counted.mean()) / counted.std()
    if mistake == "plain":
        white = advantages
    if mistake == "targets":
        targets = white + old_values
    ratio = (log_probs - old).exp()
    held = ratio.clamp(1 - clip, 1 + clip) * white
    gain = {"free": ratio * white, "held": held, "max": torch.maximum(ratio * white, held)}.get(
        mistake, torch.minimum(ratio * white, held)
    )
    if mistake == "rows":
        policy = -((gain * mask).sum(1) / mask.sum(1)).mean()
    elif mistake == "all":
        policy = -(gain * mask).mean()
    else:
        policy = (1 if mistake == "sign" else -1) * gain[mask].mean()
    error = ((values - targets)[mask] ** 2).mean()
    half = 1.0 if mistake == "half" else 0.5
    return policy + (1.0 if mistake == "c1" else c1) * half * error


_MISTAKES = {
    "sign": "the sign of the policy loss is wrong: the gain is to be made large, so its loss is"
    " minus its mean.",
    "paid": "the sign of the price is wrong: drifting away is paid for, not charged.",
    "price": "the price is taken from log_probs, so it moves and has a gradient; it is a number of"
    " the sampler: old − ref.",
    "everywhere": "the score is on every token; it is earned once, at the last.",
    "column": "the score is in the last column, where shorter responses have padding, and is lost;"
    " it belongs to the last token that the mask counts.",
    "returns": "the target of a token is its reward and all later ones, summed from the end.",
    "values": "the advantages are measured from the values of now; take old_values, which are"
    " numbers.",
    "padding": "the mean and deviation of the whitening include the padding.",
    "plain": "the advantages are not whitened.",
    "targets": "the value targets are made of whitened advantages; they stay in units of reward.",
    "free": "nothing is clipped: take the smaller of the free and the clipped gain.",
    "held": "the clipped gain counts everywhere; take the smaller of the two.",
    "max": "this takes the larger of the two gains; the smaller counts.",
    "rows": "this is the mean per response, then over responses; take the mean over all tokens.",
    "all": "the mean of the policy loss includes the padding.",
    "half": "the factor ½ of the value loss is missing.",
    "c1": "c1 is missing.",
}


def _with_gradients(loss: Function) -> Function:
    """The same arguments -> the loss and its gradients in the first two of them."""

    def found(log_probs: Tensor, values: Tensor, *rest: object) -> tuple | None:
        leaves = [log_probs.requires_grad_(), values.requires_grad_()]
        value = loss(*leaves, *rest)
        if value is None:
            return None
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError("return one number, a tensor: take the mean")
        if not value.requires_grad:
            raise ValueError("nothing in this loss depends on log_probs or values any more")
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        return value, *(
            torch.zeros_like(leaf) if one is None else one
            for leaf, one in zip(leaves, gradients, strict=True)
        )

    return found


def _batch(seed: int, lengths: list[int], beta: float, clip: float, c1: float) -> tuple:
    """Arguments of exercise 1: responses of these lengths."""
    luck = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=luck, dtype=torch.float64)

    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    old = -draw(*shape).abs() * mask
    near = [(old + scale * draw(*shape)) * mask for scale in (0.4, 0.8)]
    values = [draw(*shape) * mask for _ in range(2)]
    return near[0], values[0], old, near[1], values[1], draw(len(lengths)), mask, beta, clip, c1


def check_ppo_loss(answer: Function) -> None:
    """Exercise 1: answer(log_probs, values, old, ref, old_values, scores, mask, beta, clip, c1) ->
    the loss of a batch, a scalar; its gradients are checked too."""

    def wrong(mistake: str) -> Function:
        return _with_gradients(lambda *given: _loss(*given, mistake=mistake))

    judge(
        _with_gradients(answer),
        _with_gradients(_loss),
        [_batch(0, [4, 2, 3], 0.3, 0.2, 0.5), _batch(1, [3, 5], 0.1, 0.1, 2.0)],
        {text: wrong(mistake) for mistake, text in _MISTAKES.items()},
    )


def check_diagnosis(answer: Mapping[str, str | None]) -> None:
    """Exercise 2: which of the runs A, B and C is healthy, hacked, or has a moving reference."""
    if not isinstance(answer, Mapping) or set(answer) != set(DIAGNOSIS):
        print('Not yet: give a word for each of "A", "B" and "C".')
        return
    if all(word is None for word in answer.values()):
        print("Not attempted: replace each None with a word, then run this cell again.")
        return
    words = {name: str(word).strip().lower() for name, word in answer.items()}
    unknown = [word for word in words.values() if word not in DIAGNOSIS.values()]
    if unknown:
        print(f'Not yet: "{unknown[0]}" is none of "healthy", "hacked" and "moving".')
    elif words == DIAGNOSIS:
        print("Right.")
    elif words["B"] != "moving":
        print(
            "Not yet: one KL is exactly 0 to the end, though that policy learns. Which two"
            " policies must be the same, then?"
        )
    else:
        print(
            "Not yet: the score of the one that hacks is no lower; look at its KL and its"
            " explained variance."
        )


def check_same_beta(answer: float | None) -> None:
    """Exercise 3: β = 0.2; with rewards 2r + 5, the β of the same π*."""
    judge_number(
        answer,
        0.4,
        {
            "the other way: larger rewards need a larger price.": 0.1,
            "that is the same price; twice the reward at the same price is half the price.": 0.2,
            "adding 5 to every response changes no preference between two of them.": 0.2 * 7,
        },
    )


def check_batches(answer: float | None) -> None:
    """Exercise 4: batches from 0.002 to 0.05 at 25.6 % per batch; 14 to 15 are right."""
    exact = math.log(25) / math.log(1.256)
    if isinstance(answer, (int, float)) and 13.95 <= answer <= 15.05:
        answer = exact  # two digits, or the whole batches that it takes
    judge_number(
        answer,
        exact,
        {
            "the growth is compound: each batch multiplies β by 1.256.": 24 / 0.256,
            "this is with 20 % per batch; it is 0.2 · 128/100.": math.log(25) / math.log(1.2),
            "divide the two logarithms.": math.log(25),
            "how many times does 1.256 fit into 25, as a factor?": 25 / 1.256,
        },
        tolerance=0.02,
    )


def check_prepare(answer: Function) -> None:
    """Exercise 5: answer(advantages [T], values [T]) -> whitened advantages and value targets, each
    [T]."""

    def whitened(x: Tensor) -> Tensor:
        return (x - x.mean()) / x.std()

    judge(
        answer,
        lambda a, v: (whitened(a), a + v),
        [
            (vector([1.0, -0.5, 2.0]), vector([0.5, 0.2, -1.0])),
            (vector([0.3, 0.1, -0.7, 4.0]), vector([1.0, 2.0, 0.0, 0.5])),
        ],
        {
            "the targets are right, and the advantages are no longer whitened.": (
                lambda a, v: (a, a + v)
            ),
            "the targets are the advantages alone; a target is the advantage plus the value.": (
                lambda a, v: (whitened(a), a)
            ),
            "the sign of the values is wrong.": lambda a, v: (whitened(a), a - v),
            "the targets are whitened now; they stay in units of reward.": (
                lambda a, v: (whitened(a), whitened(a + v))
            ),
            "the mean is still taken away from the advantages in the targets.": (
                lambda a, v: (whitened(a), a - a.mean() + v)
            ),
        },
        untouched=lambda a, v: (whitened(a), whitened(a) + v),
    )
