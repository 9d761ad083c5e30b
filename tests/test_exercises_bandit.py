"""The exercises of bandit: the stub, a right answer and each typical mistake get the verdict
they deserve."""

import pytest
import torch

from rlhf_helpers.book.checks import bandit as checks


def verdict(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out


def stub(*arguments):
    return None


def average(probs, means):
    return sum(p * m for p, m in zip(probs, means, strict=True))


GRADIENTS = {
    "Right": lambda p, m: torch.stack([p[k] * (m[k] - average(p, m)) for k in range(len(p))]),
    "sign": lambda p, m: torch.stack([p[k] * (average(p, m) - m[k]) for k in range(len(p))]),
    "weigh each": lambda p, m: torch.stack([m[k] - average(p, m) for k in range(len(p))]),
    "nothing is subtracted": lambda p, m: torch.stack([p[k] * m[k] for k in range(len(p))]),
    "plain mean": lambda p, m: torch.stack(
        [p[k] * (m[k] - sum(m) / len(m)) for k in range(len(p))]
    ),
    "gradient in the probabilities": lambda p, m: list(m),
    "test case 1": lambda p, m: p * 0,
    "raised ZeroDivisionError": lambda p, m: 1 / 0,
}


@pytest.mark.parametrize("expected", GRADIENTS)
def test_bandit_gradient(capsys, expected):
    """Oracle: the verdict that the exercise promises."""
    assert expected in verdict(capsys, checks.check_bandit_gradient, GRADIENTS[expected])


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


def log_probs(logits, actions):
    return torch.distributions.Categorical(logits=logits).log_prob(actions)


LOSSES = {
    "Right": lambda z, a, adv: -(log_probs(z, a) * adv).sum() / len(a),
    "Not attempted: the bug": lambda z, a, adv: -(log_probs(z, a).exp() * adv).sum() / len(a),
    "sign": lambda z, a, adv: (log_probs(z, a) * adv).sum() / len(a),
    "not a log-probability": lambda z, a, adv: -(z[a] * adv).sum() / len(a),
    "take the mean": lambda z, a, adv: -(log_probs(z, a) * adv),
    "depends on the logits": lambda z, a, adv: -(log_probs(z.detach(), a) * adv).mean(),
    "must be a mean": lambda z, a, adv: -(log_probs(z, a) * adv).sum(),
}


@pytest.mark.parametrize("expected", LOSSES)
def test_policy_gradient_loss(capsys, expected):
    """Oracle: the verdict that the exercise promises; only gradients count, so an added constant
    stays right."""
    assert expected in verdict(capsys, checks.check_policy_gradient_loss, LOSSES[expected])


def test_only_gradients_count(capsys):
    """Oracle: adding a constant to a loss does not change its gradient."""
    answer = LOSSES["Right"]
    assert "Right" in verdict(capsys, checks.check_policy_gradient_loss, lambda *x: answer(*x) + 5)


@pytest.mark.parametrize(
    "check",
    [checks.check_bandit_gradient, checks.check_leave_one_out, checks.check_policy_gradient_loss],
)
def test_stub_is_not_attempted(capsys, check):
    """Oracle: the verdict that the exercise promises."""
    assert "Not attempted" in verdict(capsys, check, stub)


def test_number_stub_is_not_attempted(capsys):
    """Oracle: the verdict that the exercise promises."""
    assert "Not attempted" in verdict(capsys, checks.check_batch_mean_factor, None)
