"""Checks of the exercises of token_mdp."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, attempt, judge, judge_number, vector
from rlhf_helpers.worlds import enumerable


def check_targets(answer: Function) -> None:
    """Exercise 1: answer(rewards [T], values [T], lam) -> value targets [T], without discount."""

    def right(
        rewards: Tensor,
        values: Tensor,
        lam: float,
        end: Tensor | float = 0.0,
        mix: Function = lambda guess, target, lam: (1 - lam) * guess + lam * target,
    ) -> Tensor:
        targets = torch.zeros_like(values)
        after = target = torch.as_tensor(end, dtype=values.dtype)
        for t in reversed(range(len(rewards))):
            target = rewards[t] + mix(after, target, lam)
            targets[t], after = target, values[t]
        return targets

    judge(
        answer,
        right,
        [
            (vector([0.0, 0.5, 3.0]), vector([1.0, 0.4, 2.0]), 0.5),
            (vector([-0.1, 0.0, -0.3, 2.0]), vector([0.2, -0.7, 1.1, 0.6]), 0.9),
            (vector([4.0]), vector([1.5]), 0.95),
        ],
        {
            "these are the advantages; the targets are larger by the values.": (
                lambda r, v, lam: right(r, v, lam) - v
            ),
            "these are TD's targets, which is λ = 0; mix in the next target with weight λ.": (
                lambda r, v, lam: right(r, v, 0.0)
            ),
            "these are the returns, which is λ = 1; mix in the next value with weight 1 − λ.": (
                lambda r, v, lam: right(r, v, 1.0)
            ),
            "λ and 1 − λ have changed places: a large λ follows the text, not the critic.": (
                lambda r, v, lam: right(r, v, 1 - lam)
            ),
            "the value after the last token is 0; here the last value is used again.": (
                lambda r, v, lam: right(r, v, lam, end=v[-1])
            ),
            "the next target is multiplied by λ, but the next value is missing: it has weight "
            "1 − λ.": lambda r, v, lam: right(r, v, lam, mix=lambda guess, target, m: m * target),
            "the next value has the weight 1; with the next target beside it, it is 1 − λ.": (
                lambda r, v, lam: right(r, v, lam, mix=lambda guess, target, m: guess + m * target)
            ),
        },
    )


def check_first_credit(answer: float | None) -> None:
    """Exercise 2: what λ = 1 credits the first letter of 'aa' with: its return 1, less 0.9."""
    judge_number(
        answer,
        0.1,
        {
            "that is the exact advantage, which is λ = 0 with an exact critic; λ = 1 takes this "
            "text's return.": (0.85),
            "that is the return; subtract the value at the start.": 1.0,
            "that is the credit of the second a; the question is about the first.": -0.75,
            "the sign is turned round: the return is above the value at the start.": -0.1,
            "that is the value at the start; subtract it from the return.": 0.9,
        },
    )


def check_new_habit(answer: float | None) -> None:
    """Exercise 3: the advantage of the first a, if b follows it half of the time: V(a) = 2.5, and
    0.4 · 2.5 + 0.4 · 0.5 = 1.2 at the start."""
    judge_number(
        answer,
        1.3,
        {
            "that compares with the old 0.9; the value at the start has changed, too.": 1.6,
            "that is the new value after a; subtract the new value at the start.": 2.5,
            "that is the new value at the start; what is the value after a?": 1.2,
            "that was the advantage before; the value after a has changed.": 0.85,
            "that uses the old value after a.": 0.55,
        },
    )


def check_lambda_bias(answer: object) -> None:
    """Exercise 4: three numbers, the bias of the first credit at λ = 0, ½ and 1, if the critic is
    too high by 1 after a: 1 − λ."""
    if answer is None or (isinstance(answer, (list, tuple)) and None in answer):
        print("Not attempted: replace None with your prediction, then run this cell again.")
        return
    try:
        given = torch.as_tensor(answer, dtype=torch.float64).detach().reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        given = torch.zeros(0)
    if len(given) != 3:
        print(f"Not yet: {answer!r} is not three numbers; write them such as (0.2, 0.1, 0.0).")
        return
    said = {
        (1.0, 0.5, 0.0): "Right.",
        (1.0, 1.0, 1.0): "Not yet: the value after a is in two TD errors, once with + and once "
        "with −; the second has the weight λ.",
        (0.0, 0.5, 1.0): "Not yet: that is the wrong way round; λ = 0 trusts the critic most.",
        (-1.0, -0.5, 0.0): "Not yet: the sign is turned round; the a seems to lead to more than "
        "it does.",
        (1.0, 1.5, 2.0): "Not yet: the second TD error holds the wrong value with a minus.",
        (0.0, 0.0, 0.0): "Not yet: only at λ = 1 the critic's error cancels.",
        (1.85, 1.35, 0.85): "Not yet: these are the mean credits; the bias is how far they are "
        "from the advantage, 0.85.",
    }
    for numbers, verdict in said.items():
        if torch.allclose(given, vector(list(numbers)), atol=0.015):
            print(verdict)
            return
    print("Not yet: write down both TD errors of a text that goes on from a, then add them up.")


def check_whitened_targets(answer: Function) -> None:
    """Exercise 5: answer(advantages [N], values [N]) -> (whitened advantages, value targets)."""

    def white(x: Tensor) -> Tensor:
        return (x - x.mean()) / x.std()

    judge(
        answer,
        lambda a, v: (white(a), a + v),
        [
            (vector([1.0, 2.0, 6.0]), vector([0.5, -1.0, 2.0])),
            (vector([-0.3, 0.1, 0.0, 0.9]), vector([0.4, 0.4, -0.2, 0.1])),
        ],
        {
            "now nothing is whitened; the policy's advantages should be.": (
                lambda a, v: (a, a + v)
            ),
            "the targets are whitened as well; a critic has to learn rewards as they are.": (
                lambda a, v: (white(a), white(a + v))
            ),
            "the values are missing from the targets.": lambda a, v: (white(a), a),
            "the two have changed places; return the advantages first.": (
                lambda a, v: (a + v, white(a))
            ),
        },
        untouched=lambda a, v: (white(a), white(a) + v),
    )


def check_half_way(answer: float | None) -> None:
    """Exercise 6: the smallest distance from the end at which 0.95^d is below one half: 14."""
    judge_number(
        answer,
        14,
        {
            "0.95^13 is still a little above one half.": 13,
            "that is where 0.99 falls below one half.": 69,
            "that is how far 1/(1 − λ) reaches, where about a third is left.": 20,
            "count the steps between the token and the last one: λ^d with d = T − t.": 15,
        },
        tolerance=1e-6,
    )


# --- exercise 7 ----------------------------------------------------------------------------------

_CALLS, _TEXTS, _ENOUGH = 100, 16, 0.75
_LANGUAGE = enumerable.language(vocabulary=5, length=4)


def training_task() -> tuple[Tensor, Tensor]:
    """What exercise 7 is about: log π_ref [85, 5] of a policy, and the rewards [341] that `collect`
    pays."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(_LANGUAGE.num_states, 5, generator=generator, dtype=torch.float64)
    rewards = enumerable.utilities(_LANGUAGE, seed=5, structure=0.5)
    return logits.log_softmax(-1), rewards.double()


def check_training(answer: Function) -> None:
    """Exercise 7: answer(collect, reference [85, 5]) -> logits [85, 5] of a policy trained for
    reward minus KL to the reference; collect(logits) -> states, tokens, mask [16, 4], rewards [16].
    """
    gains = []
    for seed in range(3):
        gains.append(attempt(partial(_gain, answer, seed)))
        if gains[-1] is None:
            return
    share, nats, earned = (sum(each) / 3 for each in zip(*gains, strict=True))
    if share >= _ENOUGH:
        print(f"Right. You gained {share:.0%} of what can be gained.")
    elif abs(share) < 1e-6:
        print("Not yet: this is the reference; train on what collect returns.")
    elif earned < 0:
        print("Not yet: the texts earn less than before. Is the sign of the loss the right one?")
    elif nats > 2 * _best_nats():
        print(
            f"Not yet: the policy went {nats:.1f} nats from the reference, and the best one only"
            f" {_best_nats():.1f}. Does each token pay its log-ratio? Or is a step too long?"
        )
    else:
        print(
            f"Not yet: you gained {share:.0%} of what can be gained; {_ENOUGH:.0%} is asked for."
            " Is there a baseline, do you use all calls, and is the rate well chosen (1 to 4"
            " for plain gradient steps)?"
        )


def _best_nats() -> float:
    reference, rewards = training_task()
    log_ref = enumerable.sequence_log_probs(reference, _LANGUAGE)
    return enumerable.kl(enumerable.optimal_policy(log_ref, rewards, 1.0), log_ref).item()


def _gain(answer: Function, seed: int) -> tuple[float, float, float] | None:
    """(share of the possible gain, KL to the reference, gain of the reward without its price); the
    random numbers of the notebook stay as they are."""
    reference, rewards = training_task()
    generator, calls = torch.Generator().manual_seed(seed), []

    def collect(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if len(calls) == _CALLS:
            raise RuntimeError(f"collect was called more than {_CALLS} times")
        calls.append(1)
        chance = enumerable.sequence_log_probs(_logits(logits), _LANGUAGE).exp()
        texts = torch.multinomial(chance, _TEXTS, replacement=True, generator=generator)
        rows = (_LANGUAGE.states, _LANGUAGE.tokens, _LANGUAGE.mask, rewards)
        return tuple(each[texts] for each in rows)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = answer(collect, reference.clone())
    if found is None:
        return None
    log_ref = enumerable.sequence_log_probs(reference, _LANGUAGE)
    log_p = enumerable.sequence_log_probs(_logits(found), _LANGUAGE)
    start, reached = (
        enumerable.regularised_objective(x, log_ref, rewards, 1.0) for x in (log_ref, log_p)
    )
    best = enumerable.log_partition(log_ref, rewards, 1.0)
    nats = enumerable.kl(log_p, log_ref)
    share = (reached - start) / (best - start)
    return share.item(), nats.item(), (reached + nats - start).item()


def _logits(value: object) -> Tensor:
    logits = torch.as_tensor(value, dtype=torch.float64).detach()
    if logits.shape != (_LANGUAGE.num_states, 5):
        raise ValueError(f"the logits have the shape {tuple(logits.shape)}; make them [85, 5]")
    if not logits.isfinite().all():
        raise ValueError("the logits hold a NaN or an infinity; take smaller steps")
    return logits
