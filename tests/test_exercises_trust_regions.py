"""The checks of trust_regions: the stub, a right answer, and every typical mistake, each told
apart."""

import math

import pytest
import torch

from rlhf_helpers.book.checks import trust_regions as checks
from rlhf_helpers.kl import AdaptiveKLController


def verdict(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def told(capsys, check, answer, words):
    out = verdict(capsys, check, answer)
    assert out.startswith("Not yet: ")
    assert words in out


def shares(condition, otherwise=0.0):
    def search(gains, kls, budget):
        for i, (gain, kl) in enumerate(zip(gains.tolist(), kls.tolist(), strict=True)):
            if condition(gain, kl, budget):
                return 0.5**i
        return otherwise

    return search


def inside_and_better(gain, kl, budget):
    return kl <= budget and gain > 0


@pytest.mark.parametrize(
    "check",
    [
        checks.check_categorical_kl,
        checks.check_telescope,
        checks.check_line_search,
        checks.check_careful_training,
    ],
)
def test_stub_is_not_attempted(capsys, check):
    assert verdict(capsys, check, lambda *_: None).startswith("Not attempted")


@pytest.mark.parametrize(
    "check",
    [
        checks.check_step_by_hand,
        checks.check_without_reward_noise,
    ],
)
def test_prediction_stub_is_not_attempted(capsys, check):
    assert verdict(capsys, check, None).startswith("Not attempted")


# the distance


def test_kl_right(capsys):
    """Oracle: torch's own kl_div, which takes the new policy first."""

    def answer(old, new):
        return torch.nn.functional.kl_div(
            new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="sum"
        )

    assert verdict(capsys, checks.check_categorical_kl, answer) == "Right."


def kl_by_loop(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def on_probs(function):
    return lambda old, new: function(old.softmax(-1).tolist(), new.softmax(-1).tolist())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (on_probs(lambda p, q: kl_by_loop(q, p)), "swapped"),
        (on_probs(lambda p, q: kl_by_loop(q, q)), "same policy"),
        (on_probs(lambda p, q: -kl_by_loop(p, q)), "never negative"),
        (lambda old, new: torch.dot(old.softmax(-1), old - new), "log_softmax"),
        (lambda old, new: (old.log_softmax(-1) - new.log_softmax(-1)).mean(), "weight it"),
        (on_probs(lambda p, q: kl_by_loop(p, q) / 0.6931471805599453), "bits"),
    ],
)
def test_kl_mistakes(capsys, answer, words):
    told(capsys, checks.check_categorical_kl, answer, words)


# a step by hand


def test_the_step_by_hand_has_the_length_of_its_budget(capsys):
    """Oracle: half the Hessian of the KL, by autograd, along the step; and two digits of the
    answer."""
    logits = torch.tensor([0.70, 0.05, 0.25], dtype=torch.float64).log()
    pays = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    before = logits.log_softmax(-1)

    def kl(new):
        return (before.exp() * (before - new.log_softmax(-1))).sum()

    curvature = torch.autograd.functional.hessian(kl, logits)
    scale = (2 * 0.02 / (pays @ curvature @ pays)).sqrt().item()
    for answer in (2 * scale, round(2 * scale, 2)):
        assert verdict(capsys, checks.check_step_by_hand, answer) == "Right."


@pytest.mark.parametrize(
    ("answer", "words"),
    [(0.392, "one unit of pay"), (0.555, "root is of 2δ"), (0.31, "root of that"), (0.42, "mean")],
)
def test_step_by_hand_mistakes(capsys, answer, words):
    told(capsys, checks.check_step_by_hand, answer, words)


# what cancels


def telescoped(rewards, first, last, gamma):
    """Backwards, as returns are computed."""
    total = last
    for reward in reversed(rewards.tolist()):
        total = reward + gamma * total
    return total - first


def test_telescope_right(capsys):
    """Oracle: Horner's scheme, which knows nothing of advantages."""
    assert verdict(capsys, checks.check_telescope, telescoped) == "Right."


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda r, v, w, g: telescoped(r, v, 0.0, g) + w, "T steps ahead"),
        (lambda r, v, w, g: telescoped(r, v, 0.0, g) + g * w, "once per step"),
        (lambda r, v, w, g: telescoped(r, v, 0.0, g), "does not cancel"),
        (lambda r, v, w, g: telescoped(r, 0.0, w, g), "first value is missing"),
        (lambda r, v, w, g: sum(r) + g ** len(r) * w - v, "discounted, too"),
    ],
)
def test_telescope_mistakes(capsys, answer, words):
    told(capsys, checks.check_telescope, answer, words)


# the thermostat


def clipped(beta, kl, target, samples, horizon):
    error = kl / target - 1
    error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
    return beta + beta * error * samples / horizon


def test_controller_right(capsys):
    """Oracle: the package's controller, and the rule by cases."""

    def packaged(beta, kl, target, samples, horizon):
        controller = AdaptiveKLController(beta, target, horizon)
        controller.update(kl, samples)
        return controller.coefficient

    for answer in (packaged, clipped):
        assert verdict(capsys, checks.check_controller, answer) == "Right."


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda b, kl, t, n, h: b * (1 + (kl / t - 1) * n / h), "clipped to"),
        (lambda b, kl, t, n, h: clipped(b, kl, t, 1, 1), "share of the horizon"),
        (lambda b, kl, t, n, h: b * (1 + min(max(kl - t, -0.2), 0.2) * n / h), "relative to"),
        (lambda b, kl, t, n, h: 2 * b - clipped(b, kl, t, n, h), "sign is wrong"),
        (lambda b, kl, t, n, h: clipped(1.0, kl, t, n, h), "the old one times"),
        (lambda b, kl, t, n, h: clipped(b, kl, t, n, h) - b, "must stay"),
    ],
)
def test_controller_mistakes(capsys, answer, words):
    told(capsys, checks.check_controller, answer, words)


# the line search


def test_line_search_right(capsys):
    assert verdict(capsys, checks.check_line_search, shares(inside_and_better)) == "Right."


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (shares(lambda gain, kl, budget: kl <= budget), "gain is not looked at"),
        (shares(lambda gain, kl, budget: gain > 0), "divergence is not looked at"),
        (shares(inside_and_better, otherwise=0.25), "return 0.0"),
        (shares(lambda gain, kl, budget: kl < budget and gain > 0), "exactly the budget"),
        (shares(lambda gain, kl, budget: kl <= budget and gain >= 0), "exactly 0"),
        (
            lambda gains, kls, budget: max(
                (float(g), 0.5**i if g > 0 and kls[i] <= budget else 0.0)
                for i, g in enumerate(gains)
                if kls[i] <= budget
            )[1],
            "largest gain",
        ),
    ],
)
def test_line_search_mistakes(capsys, answer, words):
    told(capsys, checks.check_line_search, answer, words)


def test_the_buggy_search_of_the_exercise_is_recognised(capsys):
    def printed(gains, kls, budget):
        for i in range(len(kls)):
            if kls[i] <= budget or gains[i] > 0:
                break
        return 0.5**i

    out = verdict(capsys, checks.check_line_search, printed)
    assert out.startswith("Not attempted: the bug is still there")


# which noise


@pytest.mark.parametrize(("answer", "words"), [(-1, "Right"), (1, "one arm pays"), (0, "no ty")])
def test_without_reward_noise(capsys, answer, words):
    assert words in verdict(capsys, checks.check_without_reward_noise, answer)


# a loop that keeps its distance


def natural_steps(collect, length=0.03, sign=1.0, calls=30):
    """Natural-gradient steps of a fixed length in nats, with F as a matrix and without autograd."""
    weights = torch.zeros(8, 2, dtype=torch.float64)
    for _ in range(calls):
        contexts, actions, rewards = collect(weights)
        probs = (contexts @ weights.T).softmax(-1)
        scores = torch.nn.functional.one_hot(actions, 8) - probs
        each = (scores[:, :, None] * contexts[:, None, :]).flatten(1)  # ∇ log π
        gradient = ((rewards - rewards.mean())[:, None] * each).mean(0)
        fisher = (probs.diag_embed() - probs[:, :, None] * probs[:, None, :])[:, :, None, :, None]
        fisher = fisher * contexts[:, None, :, None, None] * contexts[:, None, None, None, :]
        matrix = fisher.mean(0).reshape(16, 16) + 1e-3 * torch.eye(16, dtype=torch.float64)
        step = torch.linalg.solve(matrix, gradient)
        step = step * (2 * length / (step @ matrix @ step)).sqrt()
        weights = weights + sign * step.view(8, 2)
    return weights


LOOPS = {
    "Right": natural_steps,
    "Right.": lambda collect: natural_steps(collect).tolist(),
    "0.05 are allowed": lambda collect: natural_steps(collect, length=1.0),
    "sign": lambda collect: natural_steps(collect, sign=-1.0),
    "steps too small": lambda collect: natural_steps(collect, length=1e-4),
    "too few of the 30": lambda collect: natural_steps(collect, calls=3),
    "more than 30 times": lambda collect: natural_steps(collect, calls=31),
    "make them [8, 2]": lambda collect: natural_steps(collect).T,
    "NaN": lambda collect: natural_steps(collect) * float("nan"),
    "were not learned": lambda collect: 5 * checks.fan(8).weights,
}


@pytest.mark.parametrize("expected", LOOPS)
def test_careful_training(capsys, expected):
    """Oracle: the verdict that the exercise promises, of a loop without autograd."""
    assert expected in verdict(capsys, checks.check_careful_training, LOOPS[expected])


def test_a_check_of_a_loop_leaves_the_notebook_its_random_numbers(capsys):
    """Oracle: the global state before."""
    before = torch.random.get_rng_state()
    verdict(capsys, checks.check_careful_training, natural_steps)
    assert torch.equal(torch.random.get_rng_state(), before)
