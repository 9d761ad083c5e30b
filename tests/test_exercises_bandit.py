"""The exercises of bandit: the stub, a right answer and each typical mistake get the verdict
they deserve."""

import pytest
import torch

from rlhf_helpers.algorithms.action_values import epsilon_greedy
from rlhf_helpers.book.checks import bandit as checks
from rlhf_helpers.worlds.bandits import ten_arms


def verdict(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out


def stub(*arguments):
    return None


def scores_of(probs, action):
    return [(1.0 if k == action else 0.0) - p for k, p in enumerate(probs.tolist())]


def estimate(probs, actions, rewards, weight=lambda p, a: 1.0):
    """The mean over plays in plain Python."""
    plays = list(zip(actions.tolist(), rewards.tolist(), strict=True))
    return [
        sum(r * weight(probs, a) * scores_of(probs, a)[k] for a, r in plays) / len(plays)
        for k in range(len(probs))
    ]


def by_autograd(probs, actions, rewards):
    logits = probs.log().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        logits.expand(len(actions), -1), actions, reduction="none"
    )
    return torch.autograd.grad(-(rewards * losses).mean(), logits)[0]


GRADIENTS = {
    "Right": estimate,
    "Right.": by_autograd,
    "sign": lambda p, a, r: [-g for g in estimate(p, a, r)],
    "nothing is subtracted": lambda p, a, r: [
        sum(x for b, x in zip(a, r, strict=True) if b == k) / len(a) for k in range(len(p))
    ],
    "the sum over the plays": lambda p, a, r: [g * len(a) for g in estimate(p, a, r)],
    "do not weight by the probability": lambda p, a, r: estimate(p, a, r, lambda p, a: p[a]),
    "no baseline was asked for": lambda p, a, r: estimate(p, a, r - sum(r) / len(r)),
    "test case 1": lambda p, a, r: p * 0,
    "raised ZeroDivisionError": lambda p, a, r: 1 / 0,
}


@pytest.mark.parametrize("expected", GRADIENTS)
def test_gradient_estimate(capsys, expected):
    """Oracle: the verdict that the exercise promises, from plain Python sums and from autograd."""
    assert expected in verdict(capsys, checks.check_gradient_estimate, GRADIENTS[expected])


def others(rewards, i):
    return [r for j, r in enumerate(rewards.tolist()) if j != i]


LEAVE_ONE_OUT = {
    "Right": lambda r: [
        x - sum(others(r, i)) / len(others(r, i)) for i, x in enumerate(r.tolist())
    ],
    "contains the reward itself": lambda r: [x - sum(r.tolist()) / len(r) for x in r.tolist()],
    "N − 1": lambda r: [x - sum(others(r, i)) / len(r) for i, x in enumerate(r.tolist())],
    "sign": lambda r: [sum(others(r, i)) / len(others(r, i)) - x for i, x in enumerate(r.tolist())],
    "this is the baseline": lambda r: [
        sum(others(r, i)) / len(others(r, i)) for i in range(len(r))
    ],
}


@pytest.mark.parametrize("expected", LEAVE_ONE_OUT)
def test_leave_one_out(capsys, expected):
    """Oracle: the verdict that the exercise promises, from plain Python sums."""
    answer = LEAVE_ONE_OUT[expected]
    assert expected in verdict(
        capsys, checks.check_leave_one_out, lambda r: torch.tensor(answer(r))
    )


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (0.75, "Right"),
        (1, "would be unbiased"),
        (0.25, "share of the reward"),
        (1.333, "undo"),
        (7, "no typical"),
        ("3/4", "not a number"),
    ],
)
def test_batch_mean_factor(capsys, answer, expected):
    """Oracle: the verdict that the exercise promises."""
    assert expected in verdict(capsys, checks.check_batch_mean_factor, answer)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(4, "Right"), (-4, "a good start"), (0, "too, when"), (10, "no typical"), (None, "Not att")],
)
def test_bad_start(capsys, answer, expected):
    """Oracle: the verdict that the exercise promises."""
    assert expected in verdict(capsys, checks.check_bad_start, answer)


def test_the_bad_start_is_the_one_that_the_exercise_calls_bad():
    """Oracle: the regret itself, in the world of the exercise."""

    def regret(offset):
        bandits = ten_arms(runs=50, offset=offset, seed=1)
        pulls = epsilon_greedy(bandits, 300, 0.01, untried=0.0)
        return (bandits.optimal_value()[:, None] - bandits.means.gather(1, pulls)).sum(1).mean()

    assert max((-4.0, 0.0, 4.0), key=regret) == 4.0


def loop(pull, sign=1.0, learning_rate=0.2, updates=300, batch=8, actions_again=False):
    """REINFORCE without autograd."""
    logits = torch.zeros(10, dtype=torch.float64)
    for _ in range(updates):
        probs = logits.softmax(-1)
        actions = torch.multinomial(probs, batch, replacement=True)
        rewards = pull(actions)
        if actions_again:
            actions = torch.multinomial(probs, batch, replacement=True)
        advantages = rewards - (rewards.sum() - rewards) / (batch - 1)
        scores = torch.eye(10, dtype=torch.float64)[actions] - probs
        logits += sign * learning_rate * (advantages[:, None] * scores).mean(0)
    return logits


LOOPS = {
    "Right": loop,
    "Right.": lambda pull: loop(pull).tolist(),
    "sign": lambda pull: loop(pull, sign=-1.0),
    "learned nothing": lambda pull: loop(pull, actions_again=True),
    "of the way": lambda pull: loop(pull, updates=20),
    "more than 5,000 pulls": lambda pull: loop(pull, updates=1000),
    "probabilities; return the logits": lambda pull: loop(pull).softmax(-1),
    "ten logits; these have the shape": lambda pull: loop(pull)[None],
    "NaN": lambda pull: loop(pull) * float("nan"),
    "Not attempted": stub,
}


@pytest.mark.parametrize("expected", LOOPS)
def test_reinforce(capsys, expected):
    """Oracle: the verdict that the exercise promises, of a loop without autograd."""
    assert expected in verdict(capsys, checks.check_reinforce, LOOPS[expected])


def test_the_bug_is_found_and_its_repair_is_right(capsys):
    """Oracle: the verdict that the exercise promises, of the bug and of a loop without it."""
    broken = verdict(capsys, checks.check_fixed_loop, LOOPS["learned nothing"])
    assert "the bug is still there" in broken
    assert "Right" in verdict(capsys, checks.check_fixed_loop, loop)


def test_a_check_leaves_the_notebook_its_random_numbers(capsys):
    """Oracle: the global state before."""
    before = torch.random.get_rng_state()
    verdict(capsys, checks.check_reinforce, loop)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("check", [checks.check_gradient_estimate, checks.check_leave_one_out])
def test_stub_is_not_attempted(capsys, check):
    """Oracle: the verdict that the exercise promises."""
    assert "Not attempted" in verdict(capsys, check, stub)


def test_number_stub_is_not_attempted(capsys):
    """Oracle: the verdict that the exercise promises."""
    assert "Not attempted" in verdict(capsys, checks.check_batch_mean_factor, None)
