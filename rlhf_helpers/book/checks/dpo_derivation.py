"""Checks of the exercises of dpo_derivation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, attempt, judge, vector

_NO_ANSWER = "Not attempted: replace None with your prediction, then run this cell again."
_NEAR = 0.02  # nats, of a policy that has learned


def check_hidden_reward(answer: Function) -> None:
    """Exercise 1: answer(ref_probs [Y], best_probs [Y], beta) -> rewards [Y] whose mean under the
    reference is 0."""

    def raw(ref: Tensor, best: Tensor, beta: float) -> Tensor:
        return beta * (best.log() - ref.log())

    def right(ref: Tensor, best: Tensor, beta: float) -> Tensor:
        reward = raw(ref, best, beta)
        return reward - ref @ reward

    judge(
        answer,
        right,
        [
            (vector([0.5, 0.25, 0.25]), vector([0.4, 0.1, 0.5]), 1.0),
            (vector([0.7, 0.1, 0.2]), vector([0.2, 0.5, 0.3]), 0.5),
        ],
        {
            "right up to a constant: now shift it so that the reference earns 0 on average.": raw,
            "shifted by the plain mean; the reference's mean weights each response by its "
            "probability.": lambda ref, best, b: raw(ref, best, b) - raw(ref, best, b).mean(),
            "shifted so that the best policy earns 0; it is the reference that should.": (
                lambda ref, best, b: raw(ref, best, b) - best @ raw(ref, best, b)
            ),
            "the sign is reversed: what became more likely was rewarded.": (
                lambda ref, best, b: -right(ref, best, b)
            ),
            "beta is missing.": lambda ref, best, b: right(ref, best, 1.0),
            "this divides by beta; the reward is beta times the log-ratio.": lambda ref, best, b: (
                right(ref, best, 1 / b)
            ),
        },
    )


def _numbers(answer: object, names: str) -> list[float] | None:
    """As many numbers as there are names; None once it is printed what is wrong."""
    if answer is None:
        print(_NO_ANSWER)
        return None
    given = answer.tolist() if isinstance(answer, Tensor) else answer
    wanted = len(names.split(","))
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != wanted:
        print(f"Not yet: give {wanted} numbers, ({names}).")
        return None
    try:
        return [float(one) for one in given]
    except (TypeError, ValueError):
        print(f"Not yet: give {wanted} numbers, ({names}).")
        return None


def _near(x: float, y: float, digits: float = 0.006) -> bool:
    return abs(x - y) <= digits


def check_two_prompts(answer: Sequence[float] | None) -> None:
    """Exercise 2: by how much the reward of the first response is above that of the second, and
    what the difference of implicit rewards says."""
    given = _numbers(answer, "difference of implicit rewards, difference of rewards")
    if given is None:
        return
    implicit, true = given
    if not _near(implicit, -0.6):
        hints = {
            0.6: "the first less the second, so mind the sign of the first number.",
            -1.2: "the implicit reward is β times the log-ratio; β is 0.5.",
        }
        found = [text for number, text in hints.items() if _near(implicit, number)]
        print(f"Not yet: {found[0] if found else 'β times each log-ratio, then subtract.'}")
    elif _near(true, 0.4):
        print("Right.")
    else:
        hints = {
            -0.6: "that holds within one prompt; log Z differs between these two.",
            -1.6: "β log Z is added to the implicit reward, not taken off.",
            1.4: "log Z counts β times, too.",
            -0.4: "the first less the second: the first one is the better one.",
        }
        found = [text for number, text in hints.items() if _near(true, number)]
        hint = found[0] if found else "r = β · log-ratio + β · log Z, for each prompt its own Z."
        print(f"Not yet: {hint}")


def check_doubled(answer: Sequence[float] | None) -> None:
    """Exercise 3: all rewards doubled, then 5 added: which β gives the same best policy, and what
    it earns."""
    given = _numbers(answer, "beta, what the best policy earns")
    if given is None:
        return
    price, earned = given
    if not _near(price, 2.0):
        hints = {
            0.5: "that doubles r/β twice.",
            1.0: "with the old price r/β is twice as large, so the policy goes further.",
            7.0: "a constant in all rewards cancels in the division by Z.",
        }
        found = [text for number, text in hints.items() if _near(price, number)]
        print(f"Not yet: {found[0] if found else 'which β leaves the differences of r/β alone?'}")
    elif _near(earned, 7.48, 0.03):
        print("Right.")
    else:
        hints = {
            1.24: "the policy is the old one, but what it is paid is not.",
            2.48: "and the 5?",
            6.24: "the price has doubled, and so has everything but the 5.",
            12.48: "every response gets 5 once; the 5 is not multiplied by the price.",
        }
        found = [text for number, text in hints.items() if _near(earned, number, 0.03)]
        print(f"Not yet: {found[0] if found else 'rewards less price: put the new ones into J.'}")


def check_implicit_reward(answer: Function) -> None:
    """Exercise 4: answer(log_p [T], ref_log_p [T], mask [T], beta) -> implicit reward, a
    number."""

    def right(log_p: Tensor, ref: Tensor, mask: Tensor, beta: float) -> Tensor:
        return beta * ((log_p - ref) * mask).sum()

    judge(
        answer,
        right,
        [
            (
                vector([-1.0, -2.0, -0.5, -9.0]),
                vector([-1.5, -1.0, -2.0, -4.0]),
                vector([1, 1, 1, 0]),
                0.5,
            ),
            (vector([-3.0, -2.0, -7.0]), vector([-1.0, -2.5, -1.0]), vector([1, 1, 0]), 0.1),
        ],
        {
            "both are means now, so that a response of forty tokens can say no more than one of "
            "four; DPO's log-ratio is of the whole response.": lambda p, q, m, b: (
                right(p, q, m, b) / m.sum()
            ),
            "the mask is gone: padding counts.": lambda p, q, m, b: b * (p - q).sum(),
            "the sign is reversed: it is the policy less the reference.": lambda p, q, m, b: right(
                q, p, m, b
            ),
            "the reference is gone.": lambda p, q, m, b: b * (p * m).sum(),
        },
        untouched=lambda p, q, m, b: b * ((p * m).sum() - (q * m).sum() / m.sum()),
    )


def check_own_samples(answer: str | None) -> None:
    """Exercise 5: which of two runs trains on its own samples."""
    if answer is None:
        print(_NO_ANSWER)
        return
    given = str(answer).strip().upper()
    if given not in ("A", "B"):
        print('Not yet: answer "A" or "B".')
    elif given == "B":
        print("Right.")
    else:
        print(
            "Not yet: what does a policy say of texts that it has just written, and what of texts"
            " that another policy wrote before it began to move?"
        )


def check_online_dpo(answer: Callable[..., Tensor | None]) -> None:
    """Exercise 6: answer(ref_log_probs [Y], rewards [Y], beta, generator) -> log-probabilities [Y]
    of the policy that online DPO arrives at."""
    cases = [
        (vector([0.5, 0.25, 0.25]).log(), vector([1.0, 0.0, 2.0]), 1.0),
        (vector([0.4, 0.3, 0.2, 0.1]).log(), vector([0.0, 1.0, -0.5, 1.5]), 0.5),
    ]
    for index, (ref, rewards, beta) in enumerate(cases):
        generator = torch.Generator().manual_seed(index)
        found = attempt(lambda: answer(ref.clone(), rewards.clone(), beta, generator))  # noqa: B023
        if found is None:
            return
        problem = _policy_problem(found, ref, rewards, beta)
        if problem:
            print(f"Not yet: {problem}")
            return
    print("Right.")


def _policy_problem(found: object, ref: Tensor, rewards: Tensor, beta: float) -> str | None:
    """What is wrong with a policy that should be the best one."""
    if not isinstance(found, Tensor) or found.shape != ref.shape:
        return f"return log-probabilities, a tensor of shape {tuple(ref.shape)}."
    log_probs = found.detach().double()
    if not log_probs.isfinite().all() or abs(log_probs.exp().sum().item() - 1) > 1e-3:
        return "these are no log-probabilities: their exponentials do not sum to 1."

    def distance(goal: Tensor) -> float:
        return (log_probs.exp() * (log_probs - goal)).sum().item()

    best = (ref + rewards / beta).log_softmax(0)
    if distance(best) < _NEAR:
        return None
    others = {
        "the policy has not moved: does the optimiser hold the logits that you return?": ref,
        "the wrong way: the response with the smaller reward went up.": (
            ref - rewards / beta
        ).log_softmax(0),
        "the reference is missing in the loss.": (rewards / beta).log_softmax(0),
        "it went as far as it would at β = 1: where does beta come in?": (
            ref + rewards
        ).log_softmax(0),
    }
    near = min(others, key=lambda text: distance(others[text]))
    if distance(others[near]) < _NEAR:
        return near
    if log_probs.exp().max() > 0.97:
        return (
            "one response has nearly everything. Is the reference still the policy of the start,"
            " and is a label the *probability* of a preference?"
        )
    return (
        f"the policy ends {distance(best):.3f} nats from the best one, not within {_NEAR}: train"
        " longer, on more pairs per step, or let the rate fall."
    )
