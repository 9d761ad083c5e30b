"""What the training loops share: the schedule, the order of examples and prompts, and what stops a
run."""

import dataclasses
import math

import pytest
import torch
from architectures import build
from transformers import get_linear_schedule_with_warmup

from rlhf_helpers.algorithms import ppo, sft
from rlhf_helpers.algorithms._loop import (
    TrainingStopped,
    adamw,
    check_finite,
    learning_rate_at,
    mean_of_updates,
    prompt_indices,
    set_learning_rate,
    shuffled,
    steps_per_epoch,
)

SMALL = ppo.Config(prompts=4)


@pytest.mark.parametrize("warm_up", [0.0, 0.1, 0.5])
def test_the_schedule_is_the_librarys(warm_up):
    """Oracle: transformers' linear schedule with warm-up, one step on (it begins at 0, which trains
    nothing)."""
    steps = 20
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(warm_up * steps), steps)
    rising = int(warm_up * steps)
    for step in range(steps):
        mine = learning_rate_at(step, steps, 3.0, warm_up)
        if step < rising:
            optimizer.step()
            schedule.step()
            assert mine == pytest.approx(schedule.get_last_lr()[0])
        else:
            assert mine == pytest.approx(3.0 * (steps - step) / (steps - rising))
    assert mine > 0


@pytest.mark.parametrize("name", ["lr", "highest"])
def test_each_group_keeps_its_own_highest_rate(name):
    """Oracle: the shape of the schedule times the rate that each group was given."""
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": [w], name: rate} for w, rate in zip(weights, (0.5, 2.0), strict=True)]
    optimizer = torch.optim.AdamW(groups)
    for step in range(10):
        first = set_learning_rate(optimizer, step, 10, warm_up=0.3)
        shape = learning_rate_at(step, 10, 1.0, 0.3)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * shape, 2.0 * shape]
        assert first == 0.5 * shape


def test_only_what_requires_a_gradient_is_trained():
    """Oracle: the parameters that were left switched on, by identity."""
    model = build("gpt2")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    left = model.transformer.ln_f.weight.requires_grad_()
    (group,) = adamw(model, 1e-3).param_groups
    assert [id(p) for p in group["params"]] == [id(left)]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.0)


@pytest.mark.parametrize(("count", "steps"), [(12, 3), (11, 2), (3, 1)])
def test_a_last_batch_that_is_not_full_is_left_out(count, steps):
    """Oracle: counting; each pass holds whole batches of different examples, and passes differ."""
    config = sft.Config(batch_size=4, epochs=2)
    assert steps_per_epoch(count, config) == steps
    batches = [rows.tolist() for rows in shuffled(count, config)]
    assert len(batches) == 2 * steps
    passes = [[i for rows in part for i in rows] for part in (batches[:steps], batches[steps:])]
    assert all(len(set(one)) == len(one) == min(count, 4 * steps) for one in passes)
    assert count < 4 or passes[0] != passes[1]


@pytest.mark.parametrize(("count", "prompts"), [(12, 4), (10, 4), (3, 7)])
def test_each_pass_takes_every_prompt_once_and_passes_differ(count, prompts):
    """Oracle: the multiset of the indices of each pass."""
    config = ppo.Config(prompts=prompts)
    rounds = 4 * count
    taken = [i for k in range(rounds) for i in prompt_indices(count, k, config)]
    passes = [tuple(taken[i : i + count]) for i in range(0, len(taken), count)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    assert len(set(passes)) > min(2, math.factorial(count) // 4)


def test_an_iteration_takes_its_prompts_whatever_came_before():
    """Oracle: the same call again, after others and after draws from the global generator."""
    first = prompt_indices(10, 7, SMALL)
    torch.manual_seed(3)
    [prompt_indices(10, k, SMALL) for k in range(7)]
    assert prompt_indices(10, 7, SMALL) == first
    other = dataclasses.replace(SMALL, seed=1)
    assert [prompt_indices(10, k, other) for k in range(5)] != [
        prompt_indices(10, k, SMALL) for k in range(5)
    ]


def test_what_is_said_of_several_updates():
    """Oracle: by hand: means, but of the KL from the policy that sampled the last one."""
    rows = [{"loss": 1.0, "approx_kl": 0.1}, {"loss": 4.0, "approx_kl": 0.3}]
    assert mean_of_updates(rows) == {"loss": 2.5, "approx_kl": 0.3, "updates": 2}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(bad):
    check_finite(loss=torch.tensor(1.0))
    with pytest.raises(TrainingStopped, match="gradient holds a NaN or an infinity") as caught:
        check_finite(loss=torch.tensor(1.0), gradient=torch.tensor([0.0, bad]))
    assert caught.value.name == "not finite"
