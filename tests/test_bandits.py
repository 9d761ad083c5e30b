"""The bandit worlds, against enumeration, autograd, quadrature and their own samples."""

import math

import numpy as np
import pytest
import torch

from rlhf_helpers.worlds.bandits import GaussianBandit, LinearBandit, fan, stretched, ten_arms

MEANS = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_expected_reward_of_the_worked_example():
    """Oracle: arithmetic by hand, 0.5·1 + 0.3·2 + 0.2·0 = 1.1."""
    assert GaussianBandit(MEANS).expected_reward(LOGITS).item() == pytest.approx(1.1)


@pytest.mark.equation("eq:bandit-gradient")
def test_gradient_is_autograd_of_the_expected_reward():
    """Oracle: autograd through the sum over arms, and the hand-computed −0.05, 0.27, −0.22."""
    logits = LOGITS.clone().requires_grad_()
    bandit = GaussianBandit(MEANS)
    (expected,) = torch.autograd.grad(bandit.expected_reward(logits), logits)
    torch.testing.assert_close(bandit.gradient(LOGITS), expected)
    torch.testing.assert_close(
        bandit.gradient(LOGITS), torch.tensor([-0.05, 0.27, -0.22], dtype=torch.float64)
    )


@pytest.mark.equation("eq:gradient-variance")
@pytest.mark.parametrize("baseline", [0.0, 1.1, 3.0])
def test_gradient_variance_is_that_of_samples(baseline):
    """Oracle: the empirical variance of 400,000 one-sample estimates whose scores autograd
    computes."""
    bandit = GaussianBandit(MEANS, noise_std=0.7)
    g = generator(1)
    scores = torch.stack(
        [torch.func.grad(lambda z, a=a: z.log_softmax(-1)[a])(LOGITS) for a in range(3)]
    )
    actions = torch.multinomial(LOGITS.exp(), 400_000, replacement=True, generator=g)
    estimates = (bandit.pull(actions, g) - baseline).unsqueeze(-1) * scores[actions]
    torch.testing.assert_close(
        bandit.gradient_variance(LOGITS, baseline), estimates.var(0), rtol=0.02, atol=1e-3
    )


def test_pulls_follow_the_arm_means_and_noise():
    """Oracle: mean and standard deviation of each arm, within five standard errors."""
    bandit = GaussianBandit(MEANS, noise_std=0.5)
    rewards = bandit.pull(torch.arange(3).repeat_interleave(40_000), generator()).view(3, -1)
    assert ((rewards.mean(1) - MEANS).abs() < 5 * 0.5 / 200).all()
    assert ((rewards.std(1) - 0.5).abs() < 5 * 0.5 / math.sqrt(80_000)).all()


def test_side_by_side_bandits_use_their_own_means():
    """Oracle: without noise, the reward of run r and arm a is means[r, a]."""
    means = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    actions = torch.tensor([[0, 2], [1, 1]])
    rewards = GaussianBandit(means, noise_std=0.0).pull(actions, generator())
    assert rewards.tolist() == [[0.0, 2.0], [4.0, 4.0]]
    assert GaussianBandit(means).optimal_value().tolist() == [2.0, 5.0]


def test_same_seed_same_world():
    """Oracle: repetition, and another seed as the counter-example."""
    assert torch.equal(ten_arms(3, seed=5).means, ten_arms(3, seed=5).means)
    assert not torch.equal(ten_arms(3, seed=5).means, ten_arms(3, seed=6).means)
    assert torch.allclose(ten_arms(3, offset=4.0, seed=5).means, ten_arms(3, seed=5).means + 4)


def rayleigh_quadrature(weights):
    """E max_a w_a·x by integrating over 100,000 directions; the mean length of a planar normal is
    √(π/2)."""
    angles = np.linspace(0, 2 * np.pi, 100_000, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    return (weights @ directions).max(0).mean() * math.sqrt(math.pi / 2)


@pytest.mark.equation("eq:linear-optimum")
@pytest.mark.parametrize("arms", [2, 3, 4, 9])
def test_linear_optimum_is_the_integral_over_directions(arms):
    """Oracle: numerical quadrature over the direction of the context."""
    weights = torch.randn(arms, 2, generator=generator(arms), dtype=torch.float64)
    assert LinearBandit(weights).optimal_value() == pytest.approx(
        rayleigh_quadrature(weights.numpy()), rel=1e-6
    )


@pytest.mark.equation("eq:linear-optimum")
def test_linear_optimum_where_it_is_known():
    """Oracle: two opposite arms earn E|x| = √(2/π); two equal arms 0; three on a line, as their
    ends."""
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert LinearBandit(opposite).optimal_value() == pytest.approx(math.sqrt(2 / math.pi))
    assert LinearBandit(opposite[[0, 0]]).optimal_value() == pytest.approx(0.0)
    inner = torch.cat([opposite, torch.tensor([[0.3, 0.0]], dtype=torch.float64)])
    assert LinearBandit(inner).optimal_value() == pytest.approx(math.sqrt(2 / math.pi))


@pytest.mark.equation("eq:linear-optimum")
def test_linear_optimum_is_what_the_best_policy_earns():
    """Oracle: Monte Carlo over 200,000 contexts, within five standard errors."""
    bandit = fan(8)
    best = bandit.mean_rewards(bandit.contexts(200_000, generator=generator())).max(-1).values
    assert abs(best.mean().item() - bandit.optimal_value()) < 5 * best.std().item() / math.sqrt(
        len(best)
    )


def test_stretching_changes_the_scales_of_a_context_and_not_what_the_arms_pay():
    """Oracle: the sample covariance of 400,000 contexts has the eigenvalues 10^(−2·decades·i/(D −
    1)), and each arm's mean reward is a standard normal number, as the direction of length 1 says.
    """
    bandit = stretched(arms=5, size=4, decades=1.5, seed=3)
    contexts = bandit.contexts(400_000, generator=generator(1))
    spreads = torch.linalg.eigvalsh(torch.cov(contexts.T)).flip(0)
    expected = 10.0 ** torch.tensor([0.0, -1.0, -2.0, -3.0], dtype=torch.float64)
    torch.testing.assert_close(spreads, expected, rtol=0.01, atol=0)
    pays = bandit.mean_rewards(contexts)
    torch.testing.assert_close(pays.std(0), torch.ones(5, dtype=torch.float64), rtol=0, atol=0.01)
    torch.testing.assert_close(pays.mean(0), torch.zeros(5).double(), rtol=0, atol=0.01)


def test_without_a_stretch_the_contexts_are_standard_normal():
    """Oracle: an orthogonal mixing of equal scales is the identity."""
    bandit = stretched(decades=0.0)
    torch.testing.assert_close(bandit.mixing, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(bandit.weights.norm(dim=1), torch.ones(8, dtype=torch.float64))


def test_linear_pulls_and_expected_reward_agree():
    """Oracle: the mean of many pulls of a fixed policy, against the exact expected reward."""
    bandit = fan(5, noise_std=0.5)
    context = torch.tensor([0.4, -1.2], dtype=torch.float64)
    logits = torch.linspace(-1, 1, 5, dtype=torch.float64)
    g = generator(2)
    actions = torch.multinomial(logits.softmax(-1), 100_000, replacement=True, generator=g)
    rewards = bandit.pull(context.expand(100_000, 2), actions, g)
    exact = bandit.expected_reward(logits, context).item()
    assert abs(rewards.mean().item() - exact) < 5 * rewards.std().item() / math.sqrt(100_000)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: GaussianBandit(torch.tensor([])), "means"),
        (lambda: GaussianBandit(torch.tensor([1.0, math.nan])), "means"),
        (lambda: GaussianBandit(MEANS, noise_std=-1.0), "noise_std"),
        (lambda: GaussianBandit(MEANS).pull(torch.tensor([3]), generator()), "actions"),
        (lambda: GaussianBandit(MEANS).pull(torch.tensor([0.0]), generator()), "actions"),
        (lambda: GaussianBandit(MEANS).gradient_variance(LOGITS[:2]), "logits"),
        (lambda: LinearBandit(torch.ones(3)), "weights"),
        (lambda: LinearBandit(torch.ones(3, 3)).optimal_value(), "weights"),
        (
            lambda: fan(4).pull(
                torch.ones(2, 2, dtype=torch.float64), torch.tensor([1]), generator()
            ),
            "actions",
        ),
        (lambda: stretched(arms=1), "arms"),
        (lambda: stretched(size=0), "size"),
        (lambda: stretched(decades=-1.0), "decades"),
        (lambda: LinearBandit(torch.eye(2), mixing=torch.eye(3)), "mixing"),
        (lambda: LinearBandit(torch.eye(2), mixing=torch.full((2, 2), math.nan)), "mixing"),
        (lambda: stretched(size=2).optimal_value(), "mixing"),
        (lambda: fan(1), "arms"),
        (lambda: ten_arms(0), "runs"),
    ],
)
def test_bad_input_is_named(call, name):
    """Oracle: the message begins with, or holds, the argument's name."""
    with pytest.raises(ValueError, match=name):
        call()
