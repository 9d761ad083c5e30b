"""Losses of comparisons: values and gradients against closed forms, enumeration of all rankings,
TRL, SciPy's logistic distribution and finite differences."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
import trl_stubs
from numbers_and_words import normal, value_and_gradient
from scipy.stats import logistic

from rlhf_helpers.losses import (
    DPO_VARIANTS,
    bradley_terry_loss,
    dpo_loss,
    plackett_luce_loss,
    rao_kupper_loss,
    simpo_loss,
)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def central_differences(function, x, step=1e-6):
    gradient = torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.clone(), x.clone()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


# bradley_terry_loss


@pytest.mark.equation("eq:bradley-terry")
def test_by_hand():
    """Oracle: by hand: scores log 3 apart give the chosen one 3/4, so the loss is log(4/3); with a
    margin of log 3 it is log 2."""
    chosen, rejected = double([math.log(3.0) + 5]), double([5.0])
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(math.log(4 / 3))
    with_margin = bradley_terry_loss(chosen, rejected, margin=math.log(3.0))
    assert with_margin.item() == pytest.approx(math.log(2))
    soft = bradley_terry_loss(chosen, rejected, preference=0.25)
    assert soft.item() == pytest.approx(0.25 * math.log(4 / 3) + 0.75 * math.log(4))


@pytest.mark.equation("eq:bradley-terry")
def test_value_and_gradient_with_everything_given():
    """Oracle: SciPy's logistic distribution for the value, one pair at a time; σ(z) − p, weighted,
    for the gradient."""
    chosen, rejected, margin = normal(3, 7)
    preference, weight = torch.sigmoid(normal(7, seed=1)), normal(7, seed=2).abs()
    z = (chosen - rejected - margin).numpy()
    terms = [
        -p * logistic.logcdf(a) - (1 - p) * logistic.logsf(a)
        for a, p in zip(z, preference.tolist(), strict=True)
    ]
    share = weight / weight.sum()
    slope = share * (torch.from_numpy(logistic.cdf(z)) - preference)

    def loss(x):
        return bradley_terry_loss(x[0], x[1], margin, preference, weight)

    value, gradient = value_and_gradient(loss, torch.stack([chosen, rejected]))
    assert value.item() == pytest.approx(np.average(terms, weights=weight), rel=1e-12)
    torch.testing.assert_close(gradient, torch.stack([slope, -slope]), rtol=1e-12, atol=1e-15)
    # nothing but the scores is trained
    parts = [margin, preference, weight]
    constants = [part.clone().requires_grad_() for part in parts]
    bradley_terry_loss(chosen.requires_grad_(), rejected, *constants).backward()
    assert all(constant.grad is None for constant in constants)


@pytest.mark.equation("eq:bradley-terry")
@pytest.mark.parametrize("with_margin", [False, True])
def test_equals_trl(with_margin):
    """Oracle: TRL's RewardTrainer.compute_loss on the same scores, value and gradient."""
    margin = normal(6, seed=3).abs() if with_margin else None

    def theirs(scores):
        return trl_stubs.reward_loss(scores, margin)

    def ours(scores):
        return bradley_terry_loss(*scores, margin=margin)

    scores = normal(2, 6)
    expected, slope = value_and_gradient(theirs, scores)
    value, gradient = value_and_gradient(ours, scores)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-14, atol=0)


@pytest.mark.equation("eq:bradley-terry")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_far_apart(dtype):
    """Oracle: −log σ(z) is −z for z = −2000 and 0 for z = 2000, with slopes −1 and 0; σ itself has
    no logarithm there."""
    far = torch.tensor([1000.0], dtype=dtype)
    assert value_and_gradient(lambda x: bradley_terry_loss(x, far), -far) == (2000.0, -1.0)
    assert value_and_gradient(lambda x: bradley_terry_loss(x, -far), far) == (0.0, 0.0)
    both = bradley_terry_loss(far, -far, preference=0.5)
    assert both.item() == 1000.0


@pytest.mark.equation("eq:bradley-terry")
def test_soft_labels_are_fitted_at_their_log_odds():
    """Oracle: the minimum over z of the cross-entropy with label p is at log(p/(1 − p)), where it
    is the entropy of p."""
    p = double([0.1, 0.5, 0.9])
    value, gradient = value_and_gradient(
        lambda x: bradley_terry_loss(x, torch.zeros(3).double(), preference=p), torch.logit(p)
    )
    entropy = torch.distributions.Bernoulli(p).entropy().mean()
    torch.testing.assert_close(value, entropy)
    torch.testing.assert_close(gradient, torch.zeros(3).double(), atol=1e-15, rtol=0)


@pytest.mark.equation("eq:bradley-terry")
def test_what_weights_and_constants_do():
    """Oracle: a weight of 2 is the pair twice; a weight of 0 is no pair; exchanging the responses
    exchanges p and 1 − p."""
    chosen, rejected = normal(2, 3)
    twice = bradley_terry_loss(chosen[[0, 0, 2]], rejected[[0, 0, 2]])
    weighted = bradley_terry_loss(chosen, rejected, weight=double([2.0, 0.0, 1.0]))
    torch.testing.assert_close(weighted, twice)
    p = double([0.1, 0.7, 1.0])
    torch.testing.assert_close(
        bradley_terry_loss(chosen, rejected, preference=p),
        bradley_terry_loss(rejected, chosen, preference=1 - p),
    )
    torch.testing.assert_close(
        bradley_terry_loss(chosen + 7, rejected + 7), bradley_terry_loss(chosen, rejected)
    )


def test_labels_of_another_type_take_the_type_of_the_scores():
    """Oracle: the same numbers in the type of the scores, so that a double label makes no double
    loss."""
    chosen, rejected = normal(2, 3).float()
    labels, weights = double([1, 0, 0.5]), torch.tensor([1, 2, 3])
    result = bradley_terry_loss(chosen, rejected, preference=labels, weight=weights)
    expected = bradley_terry_loss(
        chosen, rejected, preference=labels.float(), weight=weights.float()
    )
    assert result.dtype == torch.float32
    assert result == expected


# plackett_luce_loss


@pytest.mark.equation("eq:plackett-luce")
@pytest.mark.parametrize("k", [2, 3, 5])
def test_probabilities_of_all_rankings_sum_to_one(k):
    """Oracle: enumeration of all K! rankings; the one of the sorted scores is the likeliest."""
    scores = normal(k, seed=k)
    orders = [list(order) for order in itertools.permutations(range(k))]
    losses = [plackett_luce_loss(scores[order][None]).item() for order in orders]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0, rel=1e-12)
    assert orders[int(np.argmin(losses))] == scores.argsort(descending=True).tolist()


@pytest.mark.equation("eq:plackett-luce")
def test_ranking_by_hand():
    """Oracle: by hand: weights 3, 2, 1 in this order have the probability 3/6 · 2/3 · 1/1 = 1/3."""
    scores = double([[3.0, 2.0, 1.0]]).log()
    assert plackett_luce_loss(scores).item() == pytest.approx(math.log(3))


@pytest.mark.equation("eq:plackett-luce")
def test_sorting_noisy_scores_gives_each_ranking_its_probability():
    """Oracle: counts. Scores plus Gumbel noise, sorted, are 200,000 draws from the model; within 4
    standard errors."""
    scores, n = double([0.5, 0.0, -1.0]), 200_000
    noise = np.random.default_rng(0).gumbel(size=(n, 3))
    order = (scores.numpy() + noise).argsort(1)[:, ::-1]
    for ranking in itertools.permutations(range(3)):
        p = math.exp(-plackett_luce_loss(scores[list(ranking)][None]).item())
        share = (order == ranking).all(1).mean()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.equation("eq:plackett-luce")
def test_gradient_of_rankings():
    """Oracle: central differences, and the mean over N from a loop over rankings."""
    scores = normal(4, 5)
    value, gradient = value_and_gradient(plackett_luce_loss, scores)
    rows = [plackett_luce_loss(row[None]).item() for row in scores]
    assert value.item() == pytest.approx(np.mean(rows), rel=1e-12)
    numerical = central_differences(plackett_luce_loss, scores)
    torch.testing.assert_close(gradient, numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.equation("eq:plackett-luce")
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_two_responses_are_a_pair(scale):
    """Oracle: the Bradley-Terry loss, value and gradient, also with scores thousands apart."""
    scores = scale * normal(6, 2)
    pairs = value_and_gradient(lambda x: bradley_terry_loss(x[:, 0], x[:, 1]), scores)
    rankings = value_and_gradient(plackett_luce_loss, scores)
    torch.testing.assert_close(rankings, pairs, rtol=1e-12, atol=1e-15)


@pytest.mark.equation("eq:plackett-luce")
def test_rankings_of_scores_far_apart():
    """Oracle: by hand: the wrong way round, each choice costs the 1000 or 2000 it is behind the
    best of the rest."""
    value, gradient = value_and_gradient(plackett_luce_loss, torch.tensor([[-1000.0, 0.0, 1000.0]]))
    assert value == 2000 + 1000
    assert gradient.tolist() == [[-1.0, -1.0, 2.0]]


# rao_kupper_loss

SCORES = [(0.0, 0.0), (1.3, -0.4), (-2.0, 3.0)]


def outcome_probabilities(a, b, threshold):
    """P(first wins), P(tie), P(second wins)."""
    return [
        math.exp(-rao_kupper_loss(double([a]), double([b]), double([outcome]), threshold).item())
        for outcome in (1.0, 0.5, 0.0)
    ]


@pytest.mark.equation("eq:rao-kupper")
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("threshold", [0.01, 0.7, 5.0])
def test_the_three_outcomes(scores, threshold):
    """Oracle: SciPy's logistic distribution: a difference that is felt with logistic noise lies
    above, within or below the threshold."""
    p = outcome_probabilities(*scores, threshold)
    felt = logistic(loc=scores[0] - scores[1])
    within = felt.cdf(threshold) - felt.cdf(-threshold)
    assert p == pytest.approx([felt.sf(threshold), within, felt.cdf(-threshold)], rel=1e-10)
    assert sum(p) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.equation("eq:rao-kupper")
def test_the_formula_of_the_paper():
    """Oracle: Rao and Kupper's formulas in worths π = exp(score) and θ = exp(threshold)."""
    a, b, threshold = 0.9, -0.3, 0.4
    pi, pj, theta = math.exp(a), math.exp(b), math.exp(threshold)
    tie = (theta**2 - 1) * pi * pj / ((pi + theta * pj) * (theta * pi + pj))
    expected = [pi / (pi + theta * pj), tie, pj / (theta * pi + pj)]
    assert outcome_probabilities(a, b, threshold) == pytest.approx(expected, rel=1e-12)


@pytest.mark.equation("eq:rao-kupper")
def test_without_a_threshold_it_is_bradley_terry():
    """Oracle: the Bradley-Terry loss with the outcomes as labels, value and gradient."""
    scores, outcome = normal(2, 6), double([1, 0, 1, 1, 0, 0])
    pairs = value_and_gradient(lambda x: bradley_terry_loss(*x, preference=outcome), scores)
    found = value_and_gradient(lambda x: rao_kupper_loss(*x, outcome, 0.0), scores)
    torch.testing.assert_close(found, pairs, rtol=1e-14, atol=0)


@pytest.mark.equation("eq:rao-kupper")
def test_gradients_of_scores_and_threshold():
    """Oracle: central differences."""
    scores, outcome = normal(2, 6), double([1, 0.5, 0, 0.5, 1, 0])
    threshold = double(0.3)
    found = value_and_gradient(lambda x: rao_kupper_loss(*x, outcome, threshold), scores)[1]
    numerical = central_differences(lambda x: rao_kupper_loss(*x, outcome, threshold), scores)
    torch.testing.assert_close(found, numerical, rtol=1e-6, atol=1e-8)
    found = value_and_gradient(lambda t: rao_kupper_loss(*scores, outcome, t), threshold)[1]
    numerical = central_differences(lambda t: rao_kupper_loss(*scores, outcome, t), threshold)
    torch.testing.assert_close(found, numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.equation("eq:rao-kupper")
def test_ties_of_scores_far_apart_and_thresholds_far_out():
    """Oracle: by hand: a tie at a difference of 2000 with threshold 1 costs 2001 − log(e^2 − 1); at
    a threshold of 1000 it costs 0."""
    tie, far = torch.tensor([0.5]), torch.tensor([1000.0])
    value = rao_kupper_loss(far, -far, tie, 1.0)
    assert value.item() == pytest.approx(2001 - math.log(math.exp(2) - 1), rel=1e-6)
    value, gradient = value_and_gradient(lambda x: rao_kupper_loss(x, 0 * x, tie, 1000.0), 0 * far)
    assert (value, gradient) == (0.0, 0.0)


# bad input

ONE, TWO = torch.zeros(1), torch.zeros(2)
NAN = torch.tensor([0.0, math.nan])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bradley_terry_loss(TWO, ONE), "shapes differ: chosen_scores (2,), rejected"),
        (lambda: bradley_terry_loss(TWO, TWO[:, None]), "shapes differ"),
        (lambda: bradley_terry_loss(ONE[:0], ONE[:0]), "chosen_scores is empty"),
        (lambda: bradley_terry_loss(TWO, NAN), "rejected_scores[1] is nan"),
        (
            lambda: bradley_terry_loss(TWO, TWO, margin=ONE),
            "margin has shape (1,), the scores (2,)",
        ),
        (lambda: bradley_terry_loss(TWO, TWO, margin=math.inf), "margin=inf must lie in"),
        (lambda: bradley_terry_loss(TWO, TWO, preference=TWO + 1.5), "preference=1.5 must lie in"),
        (lambda: bradley_terry_loss(TWO, TWO, preference=TWO - 0.5), "preference=-0.5 must lie in"),
        (lambda: bradley_terry_loss(TWO, TWO, preference=NAN), "preference[1] is nan"),
        (lambda: bradley_terry_loss(TWO, TWO, weight=ONE), "shapes differ"),
        (lambda: bradley_terry_loss(TWO, TWO, weight=TWO - 1), "weight=-1.0 must lie in"),
        (lambda: bradley_terry_loss(TWO, TWO, weight=TWO), "sum of weight=0.0 must lie in"),
        (lambda: plackett_luce_loss(TWO), "scores has shape (2,); pass [N, K] with K ≥ 2"),
        (lambda: plackett_luce_loss(TWO[:, None]), "scores has shape (2, 1)"),
        (lambda: plackett_luce_loss(torch.zeros(0, 3)), "scores is empty"),
        (lambda: plackett_luce_loss(NAN[None]), "scores[0, 1] is nan"),
        (lambda: rao_kupper_loss(TWO, TWO, ONE, 0.1), "shapes differ"),
        (lambda: rao_kupper_loss(TWO, TWO, TWO - 1, 0.1), "outcome must be 1"),
        (lambda: rao_kupper_loss(TWO, TWO, NAN, 0.1), "outcome must be 1"),
        (lambda: rao_kupper_loss(NAN, TWO, TWO, 0.1), "scores_a[1] is nan"),
        (lambda: rao_kupper_loss(TWO, TWO, TWO, -0.5), "threshold=-0.5 must lie in"),
        (lambda: rao_kupper_loss(TWO, TWO, TWO, TWO), "threshold has shape (2,); pass one number"),
        (lambda: rao_kupper_loss(TWO, TWO, TWO + 0.5, 0.0), "threshold=0 makes ties impossible"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# log-probabilities


@pytest.mark.parametrize("variant", DPO_VARIANTS)
def test_the_implicit_rewards_carry_no_gradient(variant):
    """Oracle: autograd's own bookkeeping: only the loss is trained, and only the policy by it."""
    parts = [each.requires_grad_() for each in -normal(4, 5).abs()]
    found = dpo_loss(*parts, variant=variant)
    found.loss.backward()
    assert not found.chosen_rewards.requires_grad
    assert not found.rejected_rewards.requires_grad
    assert [part.grad is None for part in parts] == [False, False, True, True]


def test_simpo_names_its_own_margin():
    """Oracle: the specification: the message names the argument that the caller gave."""
    with pytest.raises(ValueError, match="gamma"):
        simpo_loss(-TWO - 1, -TWO - 2, TWO + 1, TWO + 1, gamma=math.nan)
