"""Checks of the exercises of bandit."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, attempt, judge, judge_number, vector
from rlhf_helpers.worlds.bandits import GaussianBandit, ten_arms


def check_gradient_estimate(answer: Function) -> None:
    """Exercise 1: answer(probs [K], actions [N], rewards [N]) -> estimate of the gradient, [K]."""

    def scores(p: Tensor, a: Tensor) -> Tensor:
        return torch.eye(len(p), dtype=p.dtype)[a] - p

    judge(
        answer,
        lambda p, a, r: (r[:, None] * scores(p, a)).mean(0),
        [
            (vector([0.5, 0.3, 0.2]), torch.tensor([1, 0, 2, 1]), vector([2.0, 1.0, -0.5, 3.0])),
            (vector([0.1, 0.9]), torch.tensor([1, 0, 1]), vector([4.0, -1.0, 3.0])),
        ],
        {
            "the sign is turned round: a pulled arm that paid must get a positive number.": (
                lambda p, a, r: -(r[:, None] * scores(p, a)).mean(0)
            ),
            "nothing is subtracted: the probability of each arm is, so that an arm that is raised"
            " takes from all others.": (lambda p, a, r: (r[:, None] * (scores(p, a) + p)).mean(0)),
            "this is the sum over the plays; take the mean, or the step grows with the batch.": (
                lambda p, a, r: (r[:, None] * scores(p, a)).sum(0)
            ),
            "arms that you play rarely are drawn rarely already; do not weight by the probability"
            " again.": (lambda p, a, r: (p[a][:, None] * r[:, None] * scores(p, a)).mean(0)),
            "no baseline was asked for: use the rewards as they are.": (
                lambda p, a, r: ((r - r.mean())[:, None] * scores(p, a)).mean(0)
            ),
        },
    )


def check_leave_one_out(answer: Function) -> None:
    """Exercise 2: answer(rewards [N]) -> reward minus the mean of the others, [N]."""
    judge(
        answer,
        lambda r: r - (r.sum() - r) / (len(r) - 1),
        [(vector([1.0, 2.0, 6.0]),), (vector([0.0, 1.0, 0.0, 0.0, 5.0]),)],
        {
            "this subtracts the mean of all, which contains the reward itself.": lambda r: (
                r - r.mean()
            ),
            "the others are one fewer than all: divide their sum by N − 1.": lambda r: (
                r - (r.sum() - r) / len(r)
            ),
            "this is the baseline; the advantage is the reward minus it.": lambda r: (
                (r.sum() - r) / (len(r) - 1)
            ),
            "the sign is turned round: a reward above the others must get a positive number.": (
                lambda r: (r.sum() - r) / (len(r) - 1) - r
            ),
        },
    )


def check_batch_mean_factor(answer: float | None) -> None:
    """Exercise 3: the factor by which a batch-mean baseline shrinks the expected gradient, for N
    = 4."""
    judge_number(
        answer,
        0.75,
        {
            "that would be unbiased, but this baseline contains the play's own reward; it "
            "depends on the action.": (1.0),
            "that is the share of the reward itself in the mean; how much is left?": 0.25,
            "that is the factor that would undo the shrinking.": 4 / 3,
        },
    )


def check_bad_start(answer: float | None) -> None:
    """Exercise 5: around which mean an average of 0 for untried arms ruins ε-greedy."""
    judge_number(
        answer,
        4,
        {
            "there every arm that is tried looks worse than an untried one, so all are tried at"
            " once: a good start.": -4,
            "there it does harm, too, when the first arm pays more than 0; where is that always"
            " so?": 0,
        },
    )


_ARMS = (10, 11, 12)  # seeds of the bandits that a loop is tried on
_PULLS = 5_000


def check_reinforce(answer: Function) -> None:
    """Exercise 6: answer(pull) -> logits [10]; pull takes arms [N], returns rewards [N]."""
    _judge_loop(
        answer,
        "it has learned nothing. Does each play keep its own loss (reduction='none')? Are the arms"
        " in the loss those that were pulled, and is the step taken?",
    )


def check_fixed_loop(answer: Function) -> None:
    """Exercise 4: as exercise 6, for the loop that was given with a bug."""
    _judge_loop(
        answer,
        "the policy still learns nothing, so the bug is still there. Which arms is the loss about?",
    )


def _judge_loop(answer: Function, nothing: str) -> None:
    """Print the verdict on a loop: how much of the way from the average arm to the best one its
    policy goes, on bandits that it has not seen."""
    ways = []
    for seed in _ARMS:
        bandit = GaussianBandit(ten_arms(offset=4.0, seed=seed).means[0])
        logits = attempt(partial(_logits_of, answer, bandit, seed))
        if logits is None:
            return
        average = bandit.means.mean()
        way = (bandit.expected_reward(logits) - average) / (bandit.optimal_value() - average)
        ways.append(way.item())
    mean = sum(ways) / len(ways)
    if mean > 0.7:
        print("Right.")
    elif mean < -0.15:
        print("Not yet: the sign is turned round, so the policy looks for the worst arm.")
    elif mean < 0.15:
        print(f"Not yet: {nothing}")
    else:
        print(
            f"Not yet: the policy goes {mean:.1%} of the way from the average arm to the best one;"
            " it should go more than 70%. Has it a baseline, enough steps that are not too large,"
            " and logits (not probabilities) in the cross-entropy?"
        )


def _logits_of(answer: Function, bandit: GaussianBandit, seed: int) -> Tensor | None:
    """What a loop returns for one bandit, with random numbers that the notebook does not notice."""
    # another seed than below: noise and choices must not be the same random numbers
    generator, pulls = torch.Generator().manual_seed(seed + 1000), 0

    def pull(actions: Tensor) -> Tensor:
        nonlocal pulls
        pulls += actions.numel()
        if pulls > _PULLS:
            raise RuntimeError(f"more than {_PULLS:,} pulls")
        return bandit.pull(actions, generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = answer(pull)
    if found is None:
        return None
    logits = torch.as_tensor(found, dtype=torch.float64).detach()
    if logits.shape != bandit.means.shape:
        raise ValueError(f"return ten logits; these have the shape {tuple(logits.shape)}")
    if not logits.isfinite().all():
        raise ValueError("the logits hold a NaN or an infinity; take smaller steps")
    if (logits >= 0).all() and abs(logits.sum().item() - 1) < 1e-6:
        raise ValueError("these are probabilities; return the logits")
    return logits
