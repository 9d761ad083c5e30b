"""REINFORCE and the action-value players on Gaussian bandits."""

import pytest
import torch

from rlhf_helpers.algorithms import reinforce
from rlhf_helpers.algorithms.action_values import epsilon_greedy, ucb
from rlhf_helpers.worlds.bandits import GaussianBandit, ten_arms


def run(baseline, offset=0.0, batch_size=4, runs=20, steps=300, seed=0):
    bandit = ten_arms(runs, offset=offset, seed=1)
    logits = torch.zeros(runs, 10, dtype=torch.float64)
    config = reinforce.Config(
        steps=steps, batch_size=batch_size, learning_rate=0.2, baseline=baseline, seed=seed
    )
    return bandit, logits, list(reinforce.train(logits, bandit, config))


def test_update_is_one_step_along_the_enumerated_estimate():
    """Oracle: a loop over runs and samples of A·(one-hot − π), averaged over the batch of each run
    alone."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=g, dtype=torch.float64)
    actions = torch.randint(4, (3, 5), generator=g)
    advantages = torch.randn(3, 5, generator=g, dtype=torch.float64)
    expected = logits.clone()
    for r in range(3):
        probs = logits[r].softmax(-1)
        for n in range(5):
            one_hot = torch.eye(4, dtype=torch.float64)[actions[r, n]]
            expected[r] += 0.3 * advantages[r, n] * (one_hot - probs) / 5
    moved = logits.clone().requires_grad_()
    reinforce.update(moved, actions, advantages, 0.3)
    torch.testing.assert_close(moved.detach(), expected)


@pytest.mark.parametrize("baseline", reinforce.BASELINES)
def test_it_learns(baseline):
    """Oracle: the optimum: the gap to the best arm's mean shrinks to a fifth of the uniform
    policy's."""
    bandit, _, history = run(baseline)
    gap = bandit.optimal_value() - torch.stack([m.expected_reward for m in history], 1).T
    assert gap[-1].mean() < 0.2 * gap[0].mean()


def test_expected_reward_belongs_to_the_policy_that_pulled():
    """Oracle: the first policy is uniform, so its expected reward is the plain mean of the arms."""
    bandit, _, history = run("none", steps=1)
    torch.testing.assert_close(history[0].expected_reward, bandit.means.mean(-1))


def test_leave_one_out_does_not_feel_a_constant_added_to_all_rewards():
    """Oracle: the same run without the constant; without a baseline the two runs part."""
    _, plain, _ = run("leave_one_out")
    _, shifted, _ = run("leave_one_out", offset=4.0)
    torch.testing.assert_close(plain.detach(), shifted.detach())
    _, plain, _ = run("none")
    _, shifted, _ = run("none", offset=4.0)
    assert (plain - shifted).abs().max() > 0.1


def test_the_first_batch_only_sets_the_running_mean():
    """Oracle: the specification: with one step there is no past, and nothing moves, however far the
    rewards are from zero."""
    _, logits, _ = run("running_mean", steps=1, offset=40.0)
    assert not logits.any()


def test_the_running_mean_is_that_of_all_earlier_rewards():
    """Oracle: the steps again, with the mean of the rewards in the history taken by hand."""
    _, logits, history = run("running_mean", offset=4.0, batch_size=4, runs=3, steps=4)
    again = torch.zeros(3, 10, dtype=torch.float64, requires_grad=True)
    earlier = []
    for one in history:
        mean = torch.cat(earlier, 1).mean(1, keepdim=True) if earlier else one.rewards
        reinforce.update(again, one.actions, one.rewards - mean, 0.2)
        earlier.append(one.rewards)
    torch.testing.assert_close(logits.detach(), again.detach())


def test_same_seed_same_weights():
    """Oracle: repetition, bit for bit; another seed differs."""
    assert torch.equal(run("running_mean")[1], run("running_mean")[1])
    assert not torch.equal(run("running_mean")[1], run("running_mean", seed=1)[1])


def test_greedy_without_noise_stays_with_the_best_arm_it_has_tried():
    """Oracle: ε = 0 on arms that all pay more than the initial average 0 never leaves arm 0."""
    bandit = GaussianBandit(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), noise_std=0.0)
    assert epsilon_greedy(bandit, 20, epsilon=0.0, untried=0.0).tolist() == [[0] * 20]


def test_greedy_pulls_every_arm_once_first_wherever_zero_lies():
    """Oracle: without noise one pull of each arm shows the best one, and a constant added to all
    rewards changes no choice."""
    for shift in (-10.0, 0.0, 10.0):
        means = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64) + shift
        actions = epsilon_greedy(GaussianBandit(means, noise_std=0.0), 6, epsilon=0.0)
        assert actions.tolist() == [[0, 1, 2, 1, 1, 1]]


def test_epsilon_one_is_uniform():
    """Oracle: the binomial standard deviation of uniform choices, five of them."""
    actions = epsilon_greedy(ten_arms(50), 400, epsilon=1.0)
    counts = torch.bincount(actions.flatten(), minlength=10)
    assert ((counts - 2000).abs() < 5 * (20_000 * 0.09) ** 0.5).all()


def test_ucb_tries_every_arm_once_and_then_follows_its_formula():
    """Oracle: a plain loop with the textbook formula on one noiseless bandit."""
    means = [0.1, 0.5, 0.4]
    actions = ucb(
        GaussianBandit(torch.tensor([means], dtype=torch.float64), noise_std=0.0), 60, width=0.7
    )[0].tolist()
    assert sorted(actions[:3]) == [0, 1, 2]
    counts = [1, 1, 1]
    for t in range(3, 60):
        scores = [
            means[a] + 0.7 * (torch.tensor(t + 1.0).log().item() / counts[a]) ** 0.5
            for a in range(3)
        ]
        assert actions[t] == max(range(3), key=scores.__getitem__)
        counts[actions[t]] += 1


BANDIT = ten_arms(2)


def start(logits, **settings):
    return next(reinforce.train(logits, BANDIT, reinforce.Config(**settings)))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: start(torch.zeros(10)), "logits"),
        (lambda: start(torch.zeros(3, 10)), "logits"),
        (lambda: start(torch.zeros(2, 10), baseline="mean"), "'running_mean'"),
        (lambda: start(torch.zeros(2, 10), baseline="leave_one_out"), "batch_size"),
        (lambda: start(torch.zeros(2, 10), learning_rate=0), "learning_rate"),
        (lambda: start(torch.zeros(2, 10), steps=0), "steps"),
        (lambda: epsilon_greedy(BANDIT, 10, epsilon=2.0), "epsilon"),
        (lambda: epsilon_greedy(BANDIT, 10, untried=float("nan")), "untried"),
        (lambda: ucb(BANDIT, 0), "pulls"),
        (lambda: ucb(GaussianBandit(torch.ones(3)), 5), "bandit"),
    ],
)
def test_bad_input_is_named(call, name):
    """Oracle: the message holds the argument's name, or the list of known values."""
    with pytest.raises(ValueError, match=name):
        call()
