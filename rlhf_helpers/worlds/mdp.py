"""Small Markov decision processes in which values, advantages and the policy-improvement bound are
exact.

A policy is a table of probabilities [S, A]: one row a state. S states, A actions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_helpers._validate import finite, floats, has, in_range
from rlhf_helpers.kl import exact_kl


@dataclass(frozen=True)
class MDP:
    """A finite discounted decision process.

    Args:
        transitions: [S, A, S], P(next state | state, action); rows sum to 1.
        rewards: [S, A], mean reward of an action in a state.
        start: [S], distribution of the first state.
        gamma: discount, in [0, 1).
    Raises: ValueError on shapes that do not fit, rows that are no distribution, gamma outside [0,
        1).
    """

    transitions: Tensor
    rewards: Tensor
    start: Tensor
    gamma: float

    def __post_init__(self) -> None:
        floats(transitions=self.transitions, rewards=self.rewards, start=self.start)
        if self.rewards.dim() != 2:
            raise ValueError(
                f"rewards has shape {tuple(self.rewards.shape)}; pass [states, actions]"
            )
        states, actions = self.rewards.shape
        if self.transitions.shape != (states, actions, states) or self.start.shape != (states,):
            raise ValueError(
                f"rewards is [{states}, {actions}], so transitions must be [{states}, {actions},"
                f" {states}] and start [{states}]; they are {list(self.transitions.shape)} and"
                f" {list(self.start.shape)}"
            )
        finite(self.rewards, "rewards")
        _check_distribution(self.transitions, "transitions")
        _check_distribution(self.start, "start")
        for name in ("transitions", "start"):
            _check_dtype(getattr(self, name), name, self.rewards)
        in_range(self.gamma, "gamma", 0.0, math.inf)
        if self.gamma >= 1:
            raise ValueError(
                f"gamma={self.gamma} must lie in [0, 1): without an end, γ = 1 has no finite value"
            )


def state_values(mdp: MDP, policy: Tensor) -> Tensor:
    """V_π(s), by solving V = r_π + γ·P_π·V. policy [S, A] -> [S]."""
    step = _step_matrix(mdp, policy)
    identity = torch.eye(len(step), dtype=step.dtype)
    return torch.linalg.solve(identity - mdp.gamma * step, (policy * mdp.rewards).sum(1))


def advantages(mdp: MDP, policy: Tensor) -> Tensor:
    """A_π(s, a) = r(s, a) + γ·E[V_π(s')] − V_π(s). policy [S, A] -> [S, A]."""
    values = state_values(mdp, policy)
    return mdp.rewards + mdp.gamma * mdp.transitions @ values - values.unsqueeze(1)


def visitation(mdp: MDP, policy: Tensor) -> Tensor:
    """ν_π(s) = Σ_t γ^t·P(s_t = s): discounted visits, summing to 1/(1 − γ). policy [S, A] ->
    [S]."""
    step = _step_matrix(mdp, policy)
    identity = torch.eye(len(step), dtype=step.dtype)
    return torch.linalg.solve(identity - mdp.gamma * step.T, mdp.start)


def objective(mdp: MDP, policy: Tensor) -> Tensor:
    """J(π) = Σ_s start(s)·V_π(s), the expected discounted return. policy [S, A] -> scalar."""
    _check_policy(mdp, policy, "policy")
    return mdp.start @ state_values(mdp, policy)


def surrogate(mdp: MDP, policy: Tensor, new_policy: Tensor) -> Tensor:
    """What the new policy would earn if it visited states as often as the old one does. Two [S, A]
    -> scalar.

    Equation: eq:surrogate

    L = J(π) + Σ_s ν_π(s) Σ_a π̃(a|s)·A_π(s, a). It has the value and the gradient of J at π̃ = π.

    Raises: ValueError if a policy is no table of distributions.
    Source: Kakade and Langford 2002; Schulman et al. 2015, "Trust Region Policy Optimization",
        equation 3.
    """
    _check_policy(mdp, new_policy, "new_policy")
    gain = (new_policy * advantages(mdp, policy)).sum(1)
    return objective(mdp, policy) + visitation(mdp, policy) @ gain


def lower_bound(mdp: MDP, policy: Tensor, new_policy: Tensor) -> Tensor:
    """The surrogate minus a penalty that J(new_policy) can never fall below. Two [S, A] -> scalar.

    Equation: eq:performance-bound

    J(π̃) ≥ L − C·max_s KL(π‖π̃)[s] with C = 4·ε·γ/(1 − γ)² and ε = max |A_π(s, a)|.

    Raises: ValueError if a policy is no table of distributions.
    Source: Schulman et al. 2015, "Trust Region Policy Optimization", theorem 1 and equation 9.
    """
    _check_policy(mdp, new_policy, "new_policy")
    worst = advantages(mdp, policy).abs().max()
    penalty = 4 * worst * mdp.gamma / (1 - mdp.gamma) ** 2
    return (
        surrogate(mdp, policy, new_policy)
        - penalty * exact_kl(policy.log(), new_policy.log()).max()
    )


def corridor(states: int = 5, slip: float = 0.1, gamma: float = 0.9) -> MDP:
    """A corridor: action 0 walks left, action 1 right, and with probability `slip` the step goes
    the other way.

    The left end pays 0.2 for every step spent there, the right end 1. The walk starts at the left
    end.

    Raises: ValueError if states < 2, slip is outside [0, 1] or gamma outside [0, 1).
    """
    in_range(states, "states", 2)
    in_range(slip, "slip", 0.0, 1.0)
    transitions = torch.zeros(states, 2, states, dtype=torch.float64)
    for s in range(states):
        left, right = max(s - 1, 0), min(s + 1, states - 1)
        for action, (goal, other) in enumerate([(left, right), (right, left)]):
            transitions[s, action, goal] += 1 - slip
            transitions[s, action, other] += slip
    rewards = torch.zeros(states, 2, dtype=torch.float64)
    rewards[0], rewards[-1] = 0.2, 1.0
    start = torch.zeros(states, dtype=torch.float64)
    start[0] = 1.0
    return MDP(transitions, rewards, start, gamma)


def _step_matrix(mdp: MDP, policy: Tensor) -> Tensor:
    """P(next state | state) under the policy: [S, S]."""
    _check_policy(mdp, policy, "policy")
    return torch.einsum("sa,sat->st", policy, mdp.transitions)


def _check_policy(mdp: MDP, policy: Tensor, name: str) -> None:
    has(mdp, "mdp", "an MDP", "transitions", "rewards", "start", "gamma")
    floats(**{name: policy})
    _check_dtype(policy, name, mdp.rewards)
    if policy.shape != mdp.rewards.shape:
        raise ValueError(
            f"{name} has shape {tuple(policy.shape)}; pass probabilities {tuple(mdp.rewards.shape)}"
        )
    _check_distribution(policy, name)


def _check_dtype(given: Tensor, name: str, rewards: Tensor) -> None:
    if given.dtype != rewards.dtype:
        raise ValueError(
            f"{name} has dtype {given.dtype}, the rewards have {rewards.dtype}; make them equal"
        )


def _check_distribution(probs: Tensor, name: str) -> None:
    sums = probs.detach().sum(-1)
    if (probs < 0).any() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-6):
        raise ValueError(
            f"{name} must hold probabilities: entries ≥ 0, the last dimension summing to 1"
        )
