"""The four updates on the linear contextual bandit."""

import dataclasses
import math

import pytest
import torch

from rlhf_helpers.algorithms import contextual_bandit as cb
from rlhf_helpers.kl import exact_kl
from rlhf_helpers.worlds.bandits import fan

BANDIT = fan(8)


def fresh(runs=3):
    return torch.zeros(runs, 8, 2, dtype=torch.float64)


def learn(runs=3, **settings):
    policy = fresh(runs)
    history = list(
        cb.train(policy, BANDIT, cb.Config(**{"iterations": 30, "learning_rate": 0.1, **settings}))
    )
    return policy.detach(), history


def rollout(runs=1, size=32, spread=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    policy = spread * torch.randn(runs, 8, 2, generator=g, dtype=torch.float64)
    return policy, cb.collect(policy, BANDIT, size, g)


@pytest.mark.parametrize("method", cb.METHODS)
def test_every_method_learns(method):
    """Oracle: the optimum: at least 60 % of the distance from the uniform policy (reward 0) is
    covered in each run."""
    _, history = learn(method=method)
    assert history[-1].reward.min() > 0.6 * BANDIT.optimal_value()


def test_first_ratio_is_one():
    """Oracle: log-probabilities recomputed by torch.distributions for the policy that has not moved
    yet."""
    policy, batch = rollout(runs=2)
    distribution = torch.distributions.Categorical(
        logits=torch.einsum("rkd,rnd->rnk", policy, batch.contexts)
    )
    torch.testing.assert_close(batch.old_log_probs, distribution.log_prob(batch.actions))


def test_advantages_are_whitened_run_by_run():
    """Oracle: torch's own mean and unbiased standard deviation of each run."""
    _, batch = rollout(runs=3)
    torch.testing.assert_close(
        batch.advantages.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(batch.advantages.std(1), torch.ones(3, dtype=torch.float64))


def test_runs_do_not_feel_each_other():
    """Oracle: the update of one run alone, computed from its own part of the batch (SGD, so scale
    shows)."""
    policy, batch = rollout(runs=3)
    together = policy.clone().requires_grad_()
    cb.ppo_clip_update(together, torch.optim.SGD([together], lr=3.0), batch, clip=0.2)
    alone = policy[1:2].clone().requires_grad_()
    part = cb.Batch(*(field[1:2] for field in batch))
    cb.ppo_clip_update(alone, torch.optim.SGD([alone], lr=1.0), part, clip=0.2)
    torch.testing.assert_close(together[1], alone[0])


def test_first_steps_of_all_gradient_methods_agree():
    """Oracle: at ratio 1 the three losses have one gradient, REINFORCE's; the norm in Metrics is
    its length."""
    policy, batch = rollout()
    moved = []
    for step in (
        lambda p, o: cb.reinforce_update(p, o, batch),
        lambda p, o: cb.ppo_clip_update(p, o, batch, 0.2),
        lambda p, o: cb.ppo_penalty_update(p, o, batch, torch.tensor([1.0], dtype=torch.float64)),
    ):
        trained = policy.clone().requires_grad_()
        step(trained, torch.optim.SGD([trained], lr=1.0))
        moved.append(trained.detach() - policy)
    torch.testing.assert_close(moved[0], moved[1])
    torch.testing.assert_close(moved[0], moved[2])
    torch.testing.assert_close(
        cb.gradient_norms(policy.requires_grad_(), batch)[0], moved[0].norm()
    )


def test_a_second_step_begins_with_no_gradient():
    """Oracle: two steps of plain gradient descent on the definitions, by autograd through
    torch.distributions."""
    policy, batch = rollout(runs=2)
    weight = torch.tensor([0.5, 3.0], dtype=torch.float64)

    def loss(p, method):
        logits = torch.einsum("rkd,rnd->rnk", p, batch.contexts)
        new = torch.distributions.Categorical(logits=logits)
        old = torch.distributions.Categorical(logits=batch.old_logits)
        log_probs, a = new.log_prob(batch.actions), batch.advantages
        ratio = (log_probs - batch.old_log_probs).exp()
        if method == "reinforce":
            return -(log_probs * a).mean()
        if method == "ppo_clip":
            return -torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a).mean()
        kl = torch.distributions.kl_divergence(old, new).mean(1)
        return (weight * kl).mean() - (ratio * a).mean()

    updates = {
        "reinforce": lambda p, o: cb.reinforce_update(p, o, batch),
        "ppo_clip": lambda p, o: cb.ppo_clip_update(p, o, batch, 0.1),
        "ppo_penalty": lambda p, o: cb.ppo_penalty_update(p, o, batch, weight),
    }
    for method, update in updates.items():
        mine, plain = policy.clone().requires_grad_(), policy.clone().requires_grad_()
        optimizer = torch.optim.SGD([mine], lr=0.5)
        for _ in range(2):
            update(mine, optimizer)
            slope = torch.autograd.grad(loss(plain, method), plain)[0]
            plain = (plain - 0.5 * slope).detach().requires_grad_()
        torch.testing.assert_close(mine.detach(), plain.detach(), msg=method)


def test_gradient_norms_are_those_of_single_runs():
    """Oracle: each run by itself."""
    policy, batch = rollout(runs=3)
    together = cb.gradient_norms(policy.clone().requires_grad_(), batch)
    for run in range(3):
        part = cb.Batch(*(field[run : run + 1] for field in batch))
        alone = cb.gradient_norms(policy[run : run + 1].clone().requires_grad_(), part)
        torch.testing.assert_close(together[run : run + 1], alone)


def test_minibatches_cut_the_rollout_without_loss():
    """Oracle: the multiset of samples; contexts, actions and log-probabilities stay together."""
    _, batch = rollout(size=12)
    parts = list(cb.minibatches(batch, 3, torch.Generator().manual_seed(0)))
    assert [part.actions.shape for part in parts] == [(1, 4)] * 3
    joined = torch.cat([part.old_log_probs for part in parts], 1)
    assert sorted(joined[0].tolist()) == sorted(batch.old_log_probs[0].tolist())
    for part in parts:
        again = torch.distributions.Categorical(logits=part.old_logits).log_prob(part.actions)
        torch.testing.assert_close(again, part.old_log_probs)
    assert joined.tolist() != batch.old_log_probs.tolist()  # in another order
    torch.manual_seed(1)
    twice = torch.cat(
        [p.old_log_probs for p in cb.minibatches(batch, 3, torch.Generator().manual_seed(0))], 1
    )
    assert torch.equal(twice, joined)


@pytest.mark.equation("eq:trpo-step")
def test_full_trpo_step_is_the_natural_gradient_of_length_delta():
    """Oracle: the explicit Fisher matrix E[∇log π ∇log πᵀ] (summed over all arms) and a dense
    linear solve."""
    policy, batch = rollout()
    x, probs = batch.contexts[0], batch.old_logits[0].softmax(-1)
    fisher = torch.zeros(16, 16, dtype=torch.float64)
    gradient = torch.zeros(16, dtype=torch.float64)
    for n in range(len(x)):
        scores = torch.einsum(
            "ak,d->akd", torch.eye(8, dtype=torch.float64) - probs[n], x[n]
        ).reshape(8, 16)
        fisher += scores.T @ (probs[n].unsqueeze(1) * scores) / len(x)
        gradient += batch.advantages[0, n] * scores[batch.actions[0, n]] / len(x)
    # so small that the quadratic model is the KL, and the line search accepts or halves once
    delta = 1e-6
    direction = torch.linalg.solve(fisher + 1e-3 * torch.eye(16, dtype=torch.float64), gradient)
    full = direction * math.sqrt(2 * delta / (direction @ (fisher @ direction + 1e-3 * direction)))
    moved = policy.clone().requires_grad_()
    share = cb.trpo_update(moved, batch, delta)
    assert share > 0
    torch.testing.assert_close(
        (moved.detach() - policy).flatten(), share * full, rtol=1e-3, atol=1e-9
    )


@pytest.mark.equation("eq:trpo-step")
@pytest.mark.parametrize(
    ("delta", "size", "spread"), [(0.001, 32, 0.5), (0.02, 32, 0.5), (0.5, 32, 0.5), (30.0, 8, 3.0)]
)
def test_trpo_never_leaves_the_region_and_never_lowers_the_surrogate(delta, size, spread):
    """Oracle: KL(π_old‖π) and the surrogate by a plain mean of ratio times advantage."""
    for seed in range(20):
        policy, batch = rollout(seed=seed, size=size, spread=spread)
        moved = policy.clone().requires_grad_()
        cb.trpo_update(moved, batch, delta)
        new_logits = torch.einsum("rkd,rnd->rnk", moved.detach(), batch.contexts)
        old, new = (
            torch.distributions.Categorical(logits=z) for z in (batch.old_logits, new_logits)
        )
        # not kl_divergence, which is infinite once a probability underflows
        assert (old.probs * (old.logits - new.logits)).sum(-1).mean() <= delta
        ratio = (new.log_prob(batch.actions) - old.log_prob(batch.actions)).exp()
        assert (ratio * batch.advantages).mean() > batch.advantages.mean()


@pytest.mark.equation("eq:trpo-step")
def test_trpo_of_many_runs_is_trpo_of_each():
    """Oracle: the update of each run alone."""
    policy, batch = rollout(runs=3)
    together = policy.clone().requires_grad_()
    cb.trpo_updates(together, batch, 0.02)
    for run in range(3):
        alone = policy[run : run + 1].clone().requires_grad_()
        cb.trpo_update(alone, cb.Batch(*(field[run : run + 1] for field in batch)), 0.02)
        torch.testing.assert_close(together[run : run + 1].detach(), alone.detach())
        assert (alone - policy[run : run + 1]).abs().max() > 0


@pytest.mark.equation("eq:trpo-step")
def test_trpo_stays_where_it_is_when_nothing_can_be_learned():
    """Oracle: with all advantages 0 the gradient is 0 and the policy may not move."""
    policy, batch = rollout()
    still = policy.clone().requires_grad_()
    assert (
        cb.trpo_update(still, batch._replace(advantages=torch.zeros_like(batch.advantages)), 0.02)
        == 0.0
    )
    assert torch.equal(still.detach(), policy)


@pytest.mark.equation("eq:trpo-step")
def test_trpo_goes_back_when_no_step_helps():
    """Oracle: the policy before, to the bit, wherever the share is 0. The region is so large that
    the quadratic model says nothing there, and only the full step is tried."""
    shares = []
    for seed in range(20):
        policy, batch = rollout(seed=seed, size=8, spread=3.0)
        moved = policy.clone().requires_grad_()
        shares.append(cb.trpo_update(moved, batch, 0.5, backtracks=1))
        assert torch.equal(moved.detach(), policy) == (shares[-1] == 0.0)
    assert 0.0 in shares


def test_the_coefficient_of_the_penalty_by_hand(monkeypatch):
    """Oracle: β·(1 + KL/target − 1, at most 0.2 from 1), Ziegler et al. 2019, with a horizon of one
    rollout."""
    update, used = cb.ppo_penalty_update, []

    def recorded(policy, optimizer, batch, coefficients):
        used.append(coefficients)
        update(policy, optimizer, batch, coefficients)

    monkeypatch.setattr(cb, "ppo_penalty_update", recorded)
    settings = {"iterations": 4, "epochs": 2, "batch_size": 16, "target_kl": 0.07}
    _, history = learn(method="ppo_penalty", **settings)
    wanted = torch.ones(3, dtype=torch.float64)
    for iteration, one in enumerate(history):
        assert torch.allclose(used[2 * iteration], wanted)
        wanted = wanted * (1 + (one.step_kl / 0.07 - 1).clamp(-0.2, 0.2))
    assert len(used) == 8
    assert not torch.allclose(used[0], used[-1])


def test_penalty_gradient_is_that_of_its_definition():
    """Oracle: autograd through KL(π_old‖π) and the ratio as torch.distributions give them."""
    policy, _ = rollout(runs=2)
    _, stale = rollout(runs=2)
    start = 1.5 * policy.flip(1)  # far enough away that the two directions of the KL differ
    coefficients = torch.tensor([0.5, 3.0], dtype=torch.float64)
    trained = start.clone().requires_grad_()
    cb.ppo_penalty_update(trained, torch.optim.SGD([trained], lr=1.0), stale, coefficients)
    reference = start.clone().requires_grad_()
    new = torch.distributions.Categorical(
        logits=torch.einsum("rkd,rnd->rnk", reference, stale.contexts)
    )
    old = torch.distributions.Categorical(logits=stale.old_logits)
    surrogate = (
        (new.log_prob(stale.actions) - stale.old_log_probs).exp() * stale.advantages
    ).mean()
    penalty = (coefficients * torch.distributions.kl_divergence(old, new).mean(1)).mean()
    (penalty - surrogate).backward()
    torch.testing.assert_close(trained.detach(), start - reference.grad)


def test_penalty_coefficient_steers_the_kl_towards_its_target():
    """Oracle: a higher target lets the policy move further per iteration."""
    narrow = learn(method="ppo_penalty", target_kl=0.002, epochs=8)[1]
    wide = learn(method="ppo_penalty", target_kl=0.2, epochs=8)[1]
    mean = [torch.stack([m.step_kl for m in history[10:]]).mean() for history in (narrow, wide)]
    assert mean[0] < mean[1]


def test_trpo_keeps_to_the_region_of_the_settings():
    """Oracle: the exact KL of each step, which a region ten times as large lets grow."""
    for target in (0.02, 0.2):
        _, history = learn(method="trpo", target_kl=target, iterations=3, batch_size=16)
        found = torch.stack([one.step_kl for one in history])
        assert 0.1 * target < found.max() <= target
        assert target == 0.02 or found.max() > 0.05


def test_metrics_are_what_they_say():
    """Oracle: torch.distributions on the held-out contexts and on what the last rollout must have
    been."""
    policy, history = learn(iterations=1, method="ppo_clip", epochs=3, learning_rate=0.3)
    held_out = BANDIT.contexts(1000, generator=torch.Generator().manual_seed(cb.HELD_OUT_SEED))
    new = torch.distributions.Categorical(logits=torch.einsum("rkd,nd->rnk", policy, held_out))
    torch.testing.assert_close(history[0].entropy, new.entropy().mean(1))
    torch.testing.assert_close(
        history[0].reward, (new.probs * (held_out @ BANDIT.weights.T)).sum(-1).mean(1)
    )
    uniform = torch.distributions.Categorical(logits=torch.zeros_like(new.logits))
    torch.testing.assert_close(
        history[0].kl, torch.distributions.kl_divergence(new, uniform).mean(1)
    )
    batch = cb.collect(fresh(), BANDIT, 64, torch.Generator().manual_seed(0))
    logits = torch.einsum("rkd,rnd->rnk", policy, batch.contexts)
    torch.testing.assert_close(history[0].step_kl, exact_kl(batch.old_logits, logits).mean(-1))
    ratio = logits.log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1).exp() * 8
    torch.testing.assert_close(history[0].approx_kl, (ratio - 1 - ratio.log()).mean(1))
    cut = torch.where(batch.advantages > 0, ratio > 1.2, ratio < 0.8)
    torch.testing.assert_close(history[0].clip_fraction, cut.double().mean(1))


def test_same_seed_same_weights():
    """Oracle: repetition, bit for bit."""
    assert torch.equal(learn(minibatches=2, iterations=5)[0], learn(minibatches=2, iterations=5)[0])
    assert not torch.equal(learn(iterations=5)[0], learn(iterations=5, seed=1)[0])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"method": "ppo"}, "'ppo_clip'"),
        ({"minibatches": 5}, "minibatches"),
        ({"batch_size": 1}, "batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"target_kl": -1.0}, "target_kl"),
        ({"clip": 0.0}, "clip"),
        ({"iterations": 0}, "iterations"),
    ],
)
def test_bad_settings_are_named(change, name):
    """Oracle: the message holds the setting's name, or the list of known values."""
    with pytest.raises(ValueError, match=name):
        next(cb.train(fresh(), BANDIT, dataclasses.replace(cb.Config(), **change)))


def test_a_policy_that_does_not_fit_is_named():
    """Oracle: the message holds the argument's name."""
    with pytest.raises(ValueError, match="policy"):
        next(cb.train(fresh()[0], BANDIT, cb.Config()))


def test_a_run_takes_no_further_step_once_it_is_beyond_stop_kl():
    """Oracle: a loop over one run at a time, with an optimizer of its own, that ends its passes."""
    bandit, runs, stop = fan(8), 3, 0.02
    sizes = {"iterations": 4, "batch_size": 16, "epochs": 12, "learning_rate": 0.06}
    config = cb.Config(**sizes, stop_kl=stop, clip=0.1)
    together = torch.zeros(runs, 8, 2, dtype=torch.float64)
    history = list(cb.train(together, bandit, config))
    generator = torch.Generator().manual_seed(config.seed)
    alone = [torch.zeros(1, 8, 2, dtype=torch.float64, requires_grad=True) for _ in range(runs)]
    optimizers = [torch.optim.Adam([one], lr=0.06) for one in alone]
    counts = []
    for _ in range(config.iterations):
        rollout = cb.collect(torch.cat(alone), bandit, 16, generator)
        for run, (one, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            part, steps = cb.Batch(*(field[run : run + 1] for field in rollout)), 0
            for _ in range(config.epochs):
                new = part.contexts @ one.transpose(-1, -2)
                before = part.old_logits.log_softmax(-1)
                if (before.exp() * (before - new.log_softmax(-1))).sum(-1).mean() > stop:
                    break
                log_probs = cb.token_log_probs(new, part.actions)
                where = (log_probs, part.old_log_probs, part.advantages, None, 0.1)
                # the loss of R runs is the mean over all
                loss = cb.ppo_clip_loss(*where).loss / runs
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
            counts.append(steps)
    assert 1 <= min(counts) < max(counts) < config.epochs
    rows = torch.tensor(counts).view(config.iterations, runs)
    assert (rows != rows[:, :1]).any()  # runs stop at different steps of one rollout
    assert torch.allclose(together, torch.cat(alone), atol=1e-10)
    assert history[-1].step_kl.max() > stop  # it is looked at after a step, so one goes beyond
