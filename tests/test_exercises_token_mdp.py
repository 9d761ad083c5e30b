"""The checks of token_mdp: stub, right answer, and each typical mistake."""

import pytest
import torch

from rlhf_helpers.book.checks import token_mdp as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def targets(rewards, values, lam, end=0.0):
    """The value plus the double sum of the definition of GAE, in plain Python."""
    r, v = rewards.tolist(), [*values.tolist(), float(end)]
    td_errors = [r[t] + v[t + 1] - v[t] for t in range(len(r))]
    return torch.tensor(
        [
            v[t] + sum(lam ** (later - t) * td_errors[later] for later in range(t, len(r)))
            for t in range(len(r))
        ],
        dtype=torch.float64,
    )


def targets_with_last_value_again(rewards, values, lam):
    return targets(rewards, values, lam, end=values[-1])


def targets_backwards(rewards, values, lam, of_value, of_target):
    """The loop, with other weights of the next value and the next target."""
    found, value, target = [], 0.0, 0.0
    for r, v in zip(reversed(rewards.tolist()), reversed(values.tolist()), strict=True):
        target = r + of_value(lam) * value + of_target(lam) * target
        found.insert(0, target)
        value = v
    return found


def whitened(x):
    return (x - x.mean()) / x.std()


STUBS = [
    (checks.check_targets, lambda rewards, values, lam: None),
    (checks.check_first_credit, None),
    (checks.check_new_habit, None),
    (checks.check_lambda_bias, None),
    (checks.check_lambda_bias, (None, None, None)),
    (checks.check_whitened_targets, lambda a, v: None),
    (checks.check_whitened_targets, lambda a, v: (whitened(a), whitened(a) + v)),
    (checks.check_half_way, None),
    (checks.check_training, lambda collect, reference: None),
]
RIGHT = [
    (checks.check_targets, targets),
    # a plain list will do
    (checks.check_targets, lambda *x: targets_backwards(*x, lambda m: 1 - m, lambda m: m)),
    (checks.check_first_credit, 1 - (0.4 * 1.75 + 0.4 * 0.5)),
    (checks.check_new_habit, 2.5 - (0.4 * 2.5 + 0.4 * 0.5)),
    (checks.check_lambda_bias, (1, 0.5, 0)),
    (checks.check_lambda_bias, torch.tensor([1.0, 0.5, 0.0])),
    (checks.check_whitened_targets, lambda a, v: (whitened(a), a + v)),
    (checks.check_half_way, next(d for d in range(100) if 0.95**d < 0.5)),
]
MISTAKES = [
    (checks.check_targets, lambda r, v, lam: targets(r, v, lam) - v, "these are the advantages"),
    (checks.check_targets, lambda r, v, lam: targets(r, v, 0.0), "TD's targets"),
    (checks.check_targets, lambda r, v, lam: r.flip(0).cumsum(0).flip(0), "these are the returns"),
    (checks.check_targets, lambda r, v, lam: targets(r, v, 1 - lam), "changed places"),
    (checks.check_targets, targets_with_last_value_again, "the last value is used again"),
    (
        checks.check_targets,
        lambda *x: targets_backwards(*x, lambda m: 0, lambda m: m),
        "the next value is missing",
    ),
    (
        checks.check_targets,
        lambda *x: targets_backwards(*x, lambda m: 1, lambda m: m),
        "has the weight 1",
    ),
    (checks.check_first_credit, 0.85, "the exact advantage"),
    (checks.check_first_credit, 1.0, "that is the return"),
    (checks.check_first_credit, -0.75, "the second a"),
    (checks.check_first_credit, -0.1, "sign is turned round"),
    (checks.check_first_credit, 0.9, "the value at the start; subtract"),
    (checks.check_new_habit, 2.5 - 0.9, "the old 0.9"),
    (checks.check_new_habit, 2.5, "the new value after a"),
    (checks.check_new_habit, 1.2, "the new value at the start"),
    (checks.check_new_habit, 0.85, "the advantage before"),
    (checks.check_new_habit, 1.75 - 1.2, "the old value after a"),
    (checks.check_lambda_bias, (1, 1, 1), "in two TD errors"),
    (checks.check_lambda_bias, (0, 0.5, 1), "the wrong way round"),
    (checks.check_lambda_bias, (-1, -0.5, 0), "sign is turned round"),
    (checks.check_lambda_bias, (1, 1.5, 2), "with a minus"),
    (checks.check_lambda_bias, (0, 0, 0), "only at λ = 1"),
    (checks.check_lambda_bias, (1.85, 1.35, 0.85), "the mean credits"),
    (checks.check_lambda_bias, (3, 1, 4), "both TD errors"),
    (checks.check_lambda_bias, 1.0, "not three numbers"),
    (checks.check_lambda_bias, "1, 0.5, 0", "not three numbers"),
    (checks.check_whitened_targets, lambda a, v: (a, a + v), "nothing is whitened"),
    (
        checks.check_whitened_targets,
        lambda a, v: (whitened(a), whitened(a + v)),
        "whitened as well",
    ),
    (checks.check_whitened_targets, lambda a, v: (whitened(a), a), "the values are missing"),
    (checks.check_whitened_targets, lambda a, v: (a + v, whitened(a)), "changed places"),
    (checks.check_half_way, 13, "0.95^13"),
    (checks.check_half_way, 15, "count the steps"),
    (checks.check_half_way, 69, "0.99"),
    (checks.check_half_way, 20, "1/(1 − λ)"),
]


@pytest.mark.parametrize(("check", "stub"), STUBS)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(("check", "answer"), RIGHT)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(("check", "answer", "message"), MISTAKES)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict


def loop(others=1.0, price=1.0, rate=3.0, calls=100):
    """A loop without autograd and without a critic: each text's total, less `others` times the mean
    total of the other texts."""

    def training(collect, reference):
        logits = reference.clone()
        for _ in range(calls):
            states, tokens, mask, rewards = collect(logits)
            probs = logits.softmax(-1)
            log_ratio = (probs.log() - reference)[states, tokens]
            total = rewards - price * (log_ratio * mask).sum(1)
            credit = total - others * (total.sum() - total) / 15
            for n, t in mask.nonzero().tolist():
                push = -probs[states[n, t]]
                push[tokens[n, t]] += 1
                logits[states[n, t]] += rate / 16 * credit[n] * push
        return logits

    return training


LOOPS = {
    "Right. You gained": loop(),
    "Is there a baseline": loop(others=0.0, rate=1.0),
    "Does each token pay": loop(price=0.0),
    "Is the sign of the loss": loop(rate=-1.0),
    "this is the reference": loop(calls=0),
    "more than 100 times": loop(calls=101, rate=0.0),
    "make them [85, 5]": lambda collect, reference: reference[:3],
    "a NaN or an infinity": lambda collect, reference: reference / 0,
}


@pytest.mark.parametrize("expected", LOOPS)
def test_training(capsys, expected):
    """Oracle: the verdict that the exercise promises, of a loop without autograd."""
    assert expected in said(capsys, checks.check_training, LOOPS[expected])


def test_a_check_of_a_loop_leaves_the_notebook_its_random_numbers(capsys):
    """Oracle: the global state before."""
    before = torch.random.get_rng_state()
    said(capsys, checks.check_training, lambda collect, ref: torch.randn(85, 5).double())
    assert torch.equal(torch.random.get_rng_state(), before)
