"""The small decision process, against long rollouts of its matrices, autograd and random
policies."""

import pytest
import torch

from rlhf_helpers.worlds import mdp as world

CORRIDOR = world.corridor()


def random_policy(seed, sharpness=1.0):
    g = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(5, 2, generator=g, dtype=torch.float64)).softmax(-1)


def by_simulation(mdp, policy, steps=600):
    """Discounted return and visits by pushing the state distribution forward, step by step."""
    state, discount = mdp.start.clone(), 1.0
    value, visits = 0.0, torch.zeros_like(mdp.start)
    for _ in range(steps):
        visits += discount * state
        value += discount * (state.unsqueeze(1) * policy * mdp.rewards).sum().item()
        state = torch.einsum("s,sa,sat->t", state, policy, mdp.transitions)
        discount *= mdp.gamma
    return value, visits


@pytest.mark.parametrize("seed", range(3))
def test_objective_and_visitation_are_those_of_a_long_walk(seed):
    """Oracle: 600 explicit steps of the state distribution (0.9^600 is below 1e-27)."""
    policy = random_policy(seed)
    value, visits = by_simulation(CORRIDOR, policy)
    assert world.objective(CORRIDOR, policy).item() == pytest.approx(value)
    torch.testing.assert_close(world.visitation(CORRIDOR, policy), visits)


def test_advantages_average_to_zero_under_the_policy():
    """Oracle: Σ_a π(a|s)·A(s, a) = 0 by definition, and A = what one deviating step changes in a
    long walk."""
    policy = random_policy(1)
    advantages = world.advantages(CORRIDOR, policy)
    torch.testing.assert_close((policy * advantages).sum(1), torch.zeros(5, dtype=torch.float64))
    from_two = world.MDP(
        CORRIDOR.transitions, CORRIDOR.rewards, torch.eye(5, dtype=torch.float64)[2], CORRIDOR.gamma
    )
    after_right = world.MDP(
        CORRIDOR.transitions, CORRIDOR.rewards, CORRIDOR.transitions[2, 1], CORRIDOR.gamma
    )
    stays, _ = by_simulation(from_two, policy)
    goes, _ = by_simulation(after_right, policy)
    deviating = CORRIDOR.rewards[2, 1].item() + CORRIDOR.gamma * goes - stays
    assert advantages[2, 1].item() == pytest.approx(deviating)


@pytest.mark.equation("eq:surrogate")
def test_surrogate_touches_the_objective_with_the_same_gradient():
    """Oracle: the objective itself and its autograd gradient, at the old policy."""
    logits = random_policy(2).log().requires_grad_()
    old = logits.detach().softmax(-1)
    surrogate = world.surrogate(CORRIDOR, old, logits.softmax(-1))
    objective = world.objective(CORRIDOR, logits.softmax(-1))
    assert surrogate.item() == pytest.approx(objective.item())
    (of_surrogate,) = torch.autograd.grad(surrogate, logits)
    (of_objective,) = torch.autograd.grad(objective, logits)
    assert of_objective.abs().max() > 0.01
    torch.testing.assert_close(of_surrogate, of_objective)


@pytest.mark.equation("eq:surrogate")
def test_surrogate_is_the_performance_difference_with_the_old_visits():
    """Oracle: Kakade and Langford's identity: with the NEW policy's visits the same sum gives the
    objective exactly."""
    old, new = random_policy(3), random_policy(4)
    gain = (new * world.advantages(CORRIDOR, old)).sum(1)
    exact = world.objective(CORRIDOR, old) + by_simulation(CORRIDOR, new)[1] @ gain
    torch.testing.assert_close(exact, world.objective(CORRIDOR, new))
    with_old_visits = world.objective(CORRIDOR, old) + by_simulation(CORRIDOR, old)[1] @ gain
    torch.testing.assert_close(world.surrogate(CORRIDOR, old, new), with_old_visits)
    assert abs(world.surrogate(CORRIDOR, old, new) - world.objective(CORRIDOR, new)) > 0.01


@pytest.mark.equation("eq:performance-bound")
@pytest.mark.parametrize("seed", range(20))
def test_bound_holds_and_its_penalty_is_the_theorem_s(seed):
    """Oracle: the objective of 20 random pairs of policies; the penalty recomputed by loops over
    states."""
    old, new = random_policy(seed), random_policy(100 + seed, sharpness=2.0)
    bound = world.lower_bound(CORRIDOR, old, new).item()
    assert bound <= world.objective(CORRIDOR, new).item() + 1e-12
    worst_kl = max(
        sum(p * (p / q).log() for p, q in zip(old[s], new[s], strict=True)).item() for s in range(5)
    )
    worst_advantage = max(abs(x) for row in world.advantages(CORRIDOR, old).tolist() for x in row)
    penalty = 4 * worst_advantage * 0.9 / 0.1**2 * worst_kl
    assert world.surrogate(CORRIDOR, old, new).item() - bound == pytest.approx(penalty)


@pytest.mark.equation("eq:performance-bound")
def test_without_a_future_the_surrogate_is_exact_and_the_penalty_zero():
    """Oracle: at γ = 0 the objective is one expected reward, linear in the policy."""
    bandit = world.MDP(
        CORRIDOR.transitions, CORRIDOR.rewards, torch.full((5,), 0.2, dtype=torch.float64), 0.0
    )
    old, new = random_policy(5), random_policy(6)
    objective = world.objective(bandit, new)
    torch.testing.assert_close(world.surrogate(bandit, old, new), objective)
    torch.testing.assert_close(world.lower_bound(bandit, old, new), objective)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: world.corridor(1), "states"),
        (lambda: world.corridor(slip=1.5), "slip"),
        (lambda: world.corridor(gamma=1.0), "gamma"),
        (lambda: world.objective(CORRIDOR, torch.ones(5, 2, dtype=torch.float64)), "policy"),
        (lambda: world.objective(CORRIDOR, torch.ones(5, dtype=torch.float64)), "policy"),
        (lambda: world.surrogate(CORRIDOR, random_policy(0), random_policy(0)[:4]), "new_policy"),
        (
            lambda: world.MDP(CORRIDOR.transitions[:4], CORRIDOR.rewards, CORRIDOR.start, 0.9),
            "transitions",
        ),
        (
            lambda: world.MDP(CORRIDOR.transitions * 2, CORRIDOR.rewards, CORRIDOR.start, 0.9),
            "transitions",
        ),
    ],
)
def test_bad_input_is_named(call, name):
    """Oracle: the message holds the argument's name."""
    with pytest.raises(ValueError, match=name):
        call()
