"""The checks of trust_regions: the stub, a right answer, and every typical mistake, each told
apart."""

import math
import re

import pytest
import torch

from rlhf_helpers.book.checks import trust_regions as checks


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
    "check", [checks.check_categorical_kl, checks.check_fisher_product, checks.check_line_search]
)
def test_stub_is_not_attempted(capsys, check):
    assert verdict(capsys, check, lambda *_: None).startswith("Not attempted")


def test_prediction_stub_is_not_attempted(capsys):
    assert verdict(capsys, checks.check_batches_to_double, None).startswith("Not attempted")


# 3.1


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
        (lambda old, new: (old.log_softmax(-1) - new.log_softmax(-1)).mean(), "weigh it"),
        (on_probs(lambda p, q: kl_by_loop(p, q) / 0.6931471805599453), "bits"),
    ],
)
def test_kl_mistakes(capsys, answer, words):
    told(capsys, checks.check_categorical_kl, answer, words)


# 3.2


def fisher_matrix(logits):
    """From its definition: the mean outer product of ∇ log π(a)."""
    probs = logits.softmax(-1)
    rows = torch.autograd.functional.jacobian(lambda z: z.log_softmax(-1), logits)
    return (probs[:, None, None] * rows[:, :, None] * rows[:, None, :]).sum(0)


def test_fisher_right(capsys):
    """Oracle: the mean outer product of the scores, from autograd."""
    answer = lambda logits, v: fisher_matrix(logits) @ v  # noqa: E731
    assert verdict(capsys, checks.check_fisher_product, answer) == "Right."


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda z, v: v @ fisher_matrix(z) @ v, "number vᵀ·F·v"),
        (lambda z, v: z.softmax(-1).diag() @ v, "diag(p)·v"),
        (lambda z, v: v - (z.softmax(-1) * v).sum(), "weigh each entry"),
        (lambda z, v: z.softmax(-1) * (v - v.sum() / len(v)), "plain mean"),
        (
            lambda z, v: (z.softmax(-1).diag() + torch.outer(z.softmax(-1), z.softmax(-1))) @ v,
            "added",
        ),
        (lambda z, v: (z.diag() - torch.outer(z, z)) @ v, "softmax first"),
    ],
)
def test_fisher_mistakes(capsys, answer, words):
    told(capsys, checks.check_fisher_product, answer, words)


# 3.3


def test_batches_right(capsys):
    """Oracle: multiply by 1.2 until it is enough."""
    coefficient, batches = 1.0, 0
    while coefficient < 2:
        coefficient, batches = coefficient * 1.2, batches + 1
    assert verdict(capsys, checks.check_batches_to_double, batches) == "Right."


def test_no_message_on_the_batches_gives_the_answer_away(capsys):
    for wrong in (1, 3, 5, 7):
        assert not re.search(
            r"4|four|1\.728", verdict(capsys, checks.check_batches_to_double, wrong)
        )


@pytest.mark.parametrize(("answer", "words"), [(1, "clipped"), (5, "multiply"), (3, "once more")])
def test_batches_mistakes(capsys, answer, words):
    told(capsys, checks.check_batches_to_double, answer, words)


# 3.4


def test_line_search_right(capsys):
    assert verdict(capsys, checks.check_line_search, shares(inside_and_better)) == "Right."


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (shares(lambda gain, kl, budget: kl <= budget or gain > 0, otherwise=0.25), "both"),
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

    told(capsys, checks.check_line_search, printed, "both conditions")
