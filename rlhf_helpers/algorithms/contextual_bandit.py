"""Four ways to update a linear softmax policy on a linear contextual bandit, many independent runs
at once.

A policy is a tensor of weights [R, K, D]: run r prefers arm a in context x by the logit weights[r,
a]·x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_helpers._validate import (
    check_generator,
    check_seed,
    finite,
    floats,
    has,
    in_range,
    one_of,
    same_shape,
)
from rlhf_helpers.kl import AdaptiveKLController, exact_kl
from rlhf_helpers.logprobs import entropy, masked_whiten, token_log_probs
from rlhf_helpers.losses import policy_gradient_loss, ppo_clip_loss
from rlhf_helpers.trust_region import conjugate_gradient, hessian_vector_product
from rlhf_helpers.worlds.bandits import LinearBandit

METHODS = ("reinforce", "ppo_clip", "ppo_penalty", "trpo")
HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Args:
        method: "reinforce", "ppo_clip", "ppo_penalty" or "trpo".
        iterations: rollouts.
        batch_size: contexts a rollout.
        epochs: passes over each rollout ("trpo" makes one step instead).
        minibatches: gradient steps a pass; divides batch_size.
        learning_rate: of Adam.
        clip: ε of "ppo_clip"; math.inf turns clipping off.
        target_kl: nats; the KL(π_old‖π) that "ppo_penalty" steers to and "trpo" never exceeds.
        stop_kl: nats; a run takes no further step on a rollout once KL(π_old‖π) on it is above
            this. None never stops; "trpo" makes one step anyway.
        seed: of contexts, actions and noise.
    """

    method: str = "ppo_clip"
    iterations: int = 100
    batch_size: int = 64
    epochs: int = 4
    minibatches: int = 1
    learning_rate: float = 0.05
    clip: float = 0.2
    target_kl: float = 0.02
    stop_kl: float | None = None
    seed: int = 0


class Batch(NamedTuple):
    """One rollout of R runs: what the old policy saw, did and got; advantages whitened per run."""

    contexts: Tensor  # [R, N, D]
    actions: Tensor  # [R, N]
    advantages: Tensor  # [R, N]
    old_log_probs: Tensor  # [R, N]
    old_logits: Tensor  # [R, N, K]


class Metrics(NamedTuple):
    """After one iteration, for each of R runs. `reward`, `kl` and `entropy` are exact, on contexts
    never trained on."""

    iteration: int
    reward: Tensor  # [R] expected reward
    kl: Tensor  # [R] KL(π‖π at the start), nats
    entropy: Tensor  # [R] nats
    clip_fraction: Tensor  # [R] after the update
    approx_kl: Tensor  # [R] mean of ρ − 1 − log ρ after the update, nats
    step_kl: Tensor  # [R] exact KL(π_old‖π) on the rollout, nats
    grad_norm: Tensor  # [R] of the first gradient step


def policy_logits(policy: Tensor, contexts: Tensor) -> Tensor:
    """Logits of every arm: policy [R, K, D], contexts [R, N, D] or [N, D] -> [R, N, K]."""
    floats(policy=policy, contexts=contexts)
    if policy.dim() != 3 or policy.shape[-1:] != contexts.shape[-1:] or contexts.dim() < 2:
        raise ValueError(
            f"policy has shape {tuple(policy.shape)}, contexts {tuple(contexts.shape)}; pass"
            " [runs, arms, context size] and [runs, contexts, context size]"
        )
    if contexts.dim() > 3 or contexts.shape[:-2] not in ((), policy.shape[:1]):
        raise ValueError(
            f"contexts has shape {tuple(contexts.shape)}; pass [contexts, context size], or those"
            f" of each of the {len(policy)} runs of policy"
        )
    if policy.dtype != contexts.dtype:
        raise ValueError(
            f"policy has dtype {policy.dtype}, contexts {contexts.dtype}; make them equal"
        )
    return contexts @ policy.transpose(-1, -2)


def collect(
    policy: Tensor, bandit: LinearBandit, batch_size: int, generator: torch.Generator
) -> Batch:
    """Roll out: draw contexts, act by the policy, see the rewards, and keep the log-probabilities
    it acted with."""
    _check_fit(policy, bandit)
    in_range(batch_size, "batch_size", 2)
    with torch.no_grad():
        contexts = bandit.contexts(len(policy), batch_size, generator=generator)
        logits = policy_logits(policy, contexts)
        actions = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(
            logits.shape[:-1]
        )
        rewards = bandit.pull(contexts, actions, generator)
        everything = torch.ones_like(rewards[0])
        advantages = torch.stack([masked_whiten(run, everything) for run in rewards])
        return Batch(contexts, actions, advantages, token_log_probs(logits, actions), logits)


def minibatches(batch: Batch, count: int, generator: torch.Generator) -> Iterator[Batch]:
    """Cut a rollout into `count` random parts of equal size; one part is the rollout itself."""
    _check_batch(batch)
    in_range(count, "count", 1, batch.actions.shape[1])
    check_generator(generator)
    if count == 1:
        yield batch
        return
    order = torch.randperm(batch.actions.shape[1], generator=generator)
    for index in order.chunk(count):
        yield Batch(*(field[:, index] for field in batch))


def reinforce_update(policy: Tensor, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One gradient step on −mean(A·log π): right only while the policy is the one that sampled."""
    _check_batch(batch, policy)
    _check_optimizer(optimizer)
    log_probs = token_log_probs(policy_logits(policy, batch.contexts), batch.actions)
    loss = policy_gradient_loss(log_probs, batch.advantages)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def ppo_clip_update(
    policy: Tensor, optimizer: torch.optim.Optimizer, batch: Batch, clip: float
) -> None:
    """One gradient step on the clipped objective; the ratio corrects for the policy having moved
    since the rollout."""
    _check_batch(batch, policy)
    log_probs = token_log_probs(policy_logits(policy, batch.contexts), batch.actions)
    loss = ppo_clip_loss(log_probs, batch.old_log_probs, batch.advantages, clip=clip).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def ppo_penalty_update(
    policy: Tensor, optimizer: torch.optim.Optimizer, batch: Batch, coefficients: Tensor
) -> None:
    """One gradient step on −mean(ρ·A) + β·KL(π_old‖π), with one coefficient β a run, [R]."""
    _check_batch(batch, policy)
    _check_optimizer(optimizer)
    floats(policy=policy, coefficients=coefficients)
    if not (coefficients >= 0).all():
        raise ValueError("coefficients holds a NaN or a number below 0; pass prices ≥ 0")
    if coefficients.shape != policy.shape[:1]:
        raise ValueError(
            f"coefficients has shape {tuple(coefficients.shape)}; pass one for each of the"
            f" {len(policy)} runs"
        )
    logits = policy_logits(policy, batch.contexts)
    ratio = (token_log_probs(logits, batch.actions) - batch.old_log_probs).exp()
    kl = exact_kl(batch.old_logits, logits).mean(-1)
    loss = -(ratio * batch.advantages).mean() + (coefficients * kl).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def trpo_update(
    policy: Tensor, batch: Batch, target_kl: float, backtracks: int = 10, damping: float = 1e-3
) -> float:
    """The longest natural-gradient step that keeps KL(π_old‖π) ≤ target_kl, up to halvings.

    Equation: eq:trpo-step

    Solve F·u = g by conjugate gradients, stretch u until the quadratic model of the KL equals
    target_kl, then halve the step until the true KL is inside and the surrogate has gone up.

    Args:
        policy: [1, K, D], one run, changed in place.
        batch: the rollout of that run.
        target_kl: δ in nats.
        backtracks: lengths to try, each half the one before.
        damping: added to the diagonal of F, which is singular for a softmax.
    Returns: the share of the full step that was taken, 0.0 if no step helped.
    Source: Schulman et al. 2015, "Trust Region Policy Optimization", section 6 and appendix C.
    """

    _check_batch(batch, policy)
    _check_trpo(target_kl, backtracks, damping)

    def surrogate() -> Tensor:
        log_probs = token_log_probs(policy_logits(policy, batch.contexts), batch.actions)
        return ((log_probs - batch.old_log_probs).exp() * batch.advantages).mean()

    def mean_kl() -> Tensor:
        return exact_kl(batch.old_logits, policy_logits(policy, batch.contexts)).mean()

    def fisher(v: Tensor) -> Tensor:
        return hessian_vector_product(mean_kl, [policy], v, damping)

    before = surrogate()
    gradient = torch.autograd.grad(before, policy)[0].flatten()
    if not gradient.any():
        return 0.0
    direction = conjugate_gradient(fisher, gradient)
    full_step = direction * (2 * target_kl / (direction @ fisher(direction))).sqrt()
    start = policy.detach().clone()
    with torch.no_grad():
        for share in 0.5 ** torch.arange(backtracks, dtype=policy.dtype):
            policy.copy_(start + share * full_step.view_as(policy))
            if mean_kl() <= target_kl and surrogate() > before:
                return share.item()
        policy.copy_(start)
    return 0.0


def train(policy: Tensor, bandit: LinearBandit, config: Config) -> Iterator[Metrics]:
    """Train linear softmax policies; the caller plots, logs and stops.

    Args:
        policy: [R, K, D], one policy a run, changed in place.
        bandit: with weights [K, D].
        config: the settings.
    Yields: Metrics, one an iteration.
    Raises: ValueError on a policy that does not fit the bandit, an unknown method, settings out of
        range.
    """
    _check(policy, bandit, config)
    policy.requires_grad_()
    parts = [policy]
    if config.stop_kl is not None:  # a run that has stopped must not age in the optimizer
        parts = [one[None].clone().requires_grad_() for one in policy.detach()]
    optimizer = torch.optim.Adam(parts, lr=config.learning_rate)
    controllers = [AdaptiveKLController(1.0, config.target_kl, config.batch_size) for _ in policy]
    generator = torch.Generator().manual_seed(config.seed)
    held_out = bandit.contexts(1000, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    initial_logits = policy_logits(policy.detach().clone(), held_out)
    for iteration in range(config.iterations):
        batch = collect(policy, bandit, config.batch_size, generator)
        norms = gradient_norms(policy, batch)
        if config.method == "trpo":
            trpo_updates(policy, batch, config.target_kl)
        else:
            coefficients = torch.tensor([c.coefficient for c in controllers], dtype=policy.dtype)
            _passes(parts, optimizer, batch, config, coefficients, generator)
            with torch.no_grad():
                policy.copy_(torch.cat(parts))
        metrics = measure(policy, bandit, batch, config, held_out, initial_logits)
        if config.method == "ppo_penalty":
            for controller, kl in zip(controllers, metrics["step_kl"], strict=True):
                controller.update(kl, config.batch_size)
        yield Metrics(iteration, grad_norm=norms, **metrics)


def _passes(
    parts: list[Tensor],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: Config,
    coefficients: Tensor,
    generator: torch.Generator,
) -> None:
    """All gradient steps on one rollout; `parts` are the policies, of each run or of all."""
    for _ in range(config.epochs):
        for some in minibatches(batch, config.minibatches, generator):
            policy = torch.cat(parts)
            stopped = _stopped(policy, batch, config.stop_kl)
            if stopped.all():
                return
            with _left_out(optimizer, parts, stopped):
                if config.method == "reinforce":
                    reinforce_update(policy, optimizer, some)
                elif config.method == "ppo_clip":
                    ppo_clip_update(policy, optimizer, some, config.clip)
                else:
                    ppo_penalty_update(policy, optimizer, some, coefficients)


@torch.no_grad()
def _stopped(policy: Tensor, batch: Batch, stop_kl: float | None) -> Tensor:
    """Which runs have gone far enough on this rollout: [R], none without a limit."""
    if stop_kl is None:
        return torch.zeros(len(policy), dtype=torch.bool)
    moved = exact_kl(batch.old_logits, policy_logits(policy, batch.contexts)).mean(-1)
    return moved > stop_kl


@contextmanager
def _left_out(
    optimizer: torch.optim.Optimizer, parts: list[Tensor], stopped: Tensor
) -> Iterator[None]:
    """A step that leaves some parts as they are, and the optimizer's memory of them too."""

    def drop(*_: object) -> None:
        for part, done in zip(parts, stopped, strict=False):
            if done:
                part.grad = None

    hook = optimizer.register_step_pre_hook(drop)
    try:
        yield
    finally:
        hook.remove()


def gradient_norms(policy: Tensor, batch: Batch) -> Tensor:
    """Length of each run's policy gradient on a fresh rollout: [R]. (All methods here share it:
    the ratio is 1.)"""
    _check_batch(batch, policy)
    log_probs = token_log_probs(policy_logits(policy, batch.contexts), batch.actions)
    loss = policy_gradient_loss(log_probs, batch.advantages) * len(policy)
    (gradient,) = torch.autograd.grad(loss, policy)
    return gradient.flatten(1).norm(dim=1)


def trpo_updates(policy: Tensor, batch: Batch, target_kl: float) -> None:
    """A TRPO step for each run by itself, with its own Fisher matrix and line search."""
    floats(policy=policy)
    _check_batch(batch, policy)
    for run in range(len(policy)):
        one = policy.detach()[run : run + 1].clone().requires_grad_()
        trpo_update(one, Batch(*(field[run : run + 1] for field in batch)), target_kl)
        with torch.no_grad():
            policy[run] = one[0]


@torch.no_grad()
def measure(
    policy: Tensor,
    bandit: LinearBandit,
    batch: Batch,
    config: Config,
    held_out: Tensor,
    initial_logits: Tensor,
) -> dict[str, Tensor]:
    """What Metrics holds, but for the gradient norm: exact values on held-out contexts,
    diagnostics on the rollout."""
    _check_fit(policy, bandit)
    _check_batch(batch)
    has(config, "config", "a contextual_bandit.Config", "clip", "method")
    logits = _held_out_logits(policy, held_out, initial_logits)
    rollout_logits = policy_logits(policy, batch.contexts)
    log_probs = token_log_probs(rollout_logits, batch.actions)
    clip = config.clip if config.method == "ppo_clip" else math.inf
    runs = zip(log_probs, batch.old_log_probs, batch.advantages, strict=True)
    losses = [ppo_clip_loss(*run, clip=clip) for run in runs]
    return {
        "reward": bandit.expected_reward(logits, held_out).mean(-1),
        "kl": exact_kl(logits, initial_logits).mean(-1),
        "entropy": entropy(logits).mean(-1),
        "clip_fraction": torch.stack([one.clip_fraction for one in losses]),
        "approx_kl": torch.stack([one.approx_kl for one in losses]),
        "step_kl": exact_kl(batch.old_logits, rollout_logits).mean(-1),
    }


def _held_out_logits(policy: Tensor, held_out: Tensor, initial_logits: Tensor) -> Tensor:
    """Logits on contexts that all runs share, [R, N, K], of the shape of those at the start."""
    floats(held_out=held_out, initial_logits=initial_logits)
    if held_out.dim() != 2 or held_out.shape[1] != policy.shape[2]:
        raise ValueError(
            f"held_out has shape {tuple(held_out.shape)}; pass [contexts, {policy.shape[2]}]"
        )
    if held_out.dtype != policy.dtype:
        raise ValueError(
            f"held_out has dtype {held_out.dtype}, policy {policy.dtype}; make them equal"
        )
    logits = policy_logits(policy, held_out)
    same_shape(initial_logits=initial_logits, **{"logits on held_out": logits})
    return logits


def _check_trpo(target_kl: float, backtracks: int, damping: float) -> None:
    in_range(target_kl, "target_kl", 0.0, open_low=True)
    in_range(backtracks, "backtracks", 1)
    in_range(damping, "damping", 0.0)


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    has(optimizer, "optimizer", "an optimizer of torch, such as Adam", "zero_grad", "step")


def _check_batch(batch: Batch, policy: Tensor | None = None) -> None:
    has(batch, "batch", "a Batch, as collect returns it", *Batch._fields)
    if policy is not None:
        floats(policy=policy)
        if not policy.requires_grad or policy.dim() != 3:
            raise ValueError(
                f"policy has shape {tuple(policy.shape)} and requires_grad={policy.requires_grad};"
                " pass [runs, arms, context size], after policy.requires_grad_()"
            )
        if len(policy) != len(batch.actions):
            raise ValueError(
                f"policy has {len(policy)} runs, batch {len(batch.actions)}; make them equal"
            )
        finite(policy, "policy")


def _check_fit(policy: Tensor, bandit: LinearBandit) -> None:
    floats(policy=policy)
    has(bandit, "bandit", "a LinearBandit", "weights", "contexts", "pull", "expected_reward")
    if policy.dim() != 3 or policy.shape[1:] != bandit.weights.shape:
        raise ValueError(
            f"policy has shape {tuple(policy.shape)}; pass [runs, {list(bandit.weights.shape)}]"
        )
    finite(policy, "policy")


def _check(policy: Tensor, bandit: LinearBandit, config: Config) -> None:
    _check_fit(policy, bandit)
    has(config, "config", "a contextual_bandit.Config", *Config.__dataclass_fields__)
    check_seed(config.seed)
    one_of(config.method, METHODS, "method")
    in_range(config.iterations, "iterations", 1)
    in_range(config.batch_size, "batch_size", 2)
    in_range(config.epochs, "epochs", 1)
    in_range(config.learning_rate, "learning_rate", 0.0, open_low=True)
    in_range(config.target_kl, "target_kl", 0.0, open_low=True)
    if config.stop_kl is not None:
        in_range(config.stop_kl, "stop_kl", 0.0, open_low=True)
    if config.minibatches < 1 or config.batch_size % config.minibatches:
        raise ValueError(
            f"minibatches={config.minibatches} must divide batch_size={config.batch_size}"
        )
