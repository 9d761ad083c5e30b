"""What the training loops share: the schedule, the order of examples and prompts, and what stops a
run."""

import dataclasses
import math

import pytest
import torch
from architectures import build
from numbers_and_words import WORDS, letters
from transformers import get_linear_schedule_with_warmup

from rlhf_helpers import models
from rlhf_helpers.algorithms import dpo, grpo, ppo, reward_model, sft
from rlhf_helpers.algorithms._loop import (
    TrainingStopped,
    adamw,
    check_finite,
    learning_rate_at,
    mean_of_updates,
    old_log_probs,
    prompt_indices,
    set_learning_rate,
    shuffled,
    steps_per_epoch,
)
from rlhf_helpers.rollout import Rollout

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


def test_a_schedule_may_rise_to_its_end():
    """Oracle: by hand: a straight line to the highest rate, and no step after it."""
    rates = [learning_rate_at(step, 4, 3.0, warm_up=1.0) for step in range(4)]
    assert rates == [0.75, 1.5, 2.25, 3.0]


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


# --- every loop ----------------------------------------------------------------------------------

DATA = ["a b", "c", "d e f g", "h i"]
PAIRS = [("a b", "c d"), ("c", "e"), ("d e f g", "h"), ("h i", "j k")]
RATE = 1e-3


def early(prompts, completions, **columns):
    return [sum(w < "m" for w in text.split()) + len(text) / 9 for text in completions]


def words_policy(dtype=torch.float32, adapter=None, **changes):
    policy = build("gpt2", dtype=dtype, vocab_size=len(WORDS), **changes)
    if adapter is not None:
        torch.manual_seed(0)
        policy = models.lora_policy(policy)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter)
    return policy


def comparisons():
    pairs = [{"prompt": p, "chosen": r, "rejected": "x y"} for p, r in PAIRS]
    return reward_model.comparisons(pairs)


def run_sft(policy, rate=RATE):
    return sft.train(policy, letters(), PAIRS, sft.Config(batch_size=4, learning_rate=rate))


def run_dpo(policy, rate=RATE):
    tokenizer, config = letters(), dpo.Config(batch_size=4, epochs=1, learning_rate=rate)
    return dpo.train(policy, tokenizer, dpo.encode(tokenizer, comparisons()), config)


def run_online(policy, rate=RATE):
    sizes = {"prompts": 4, "samples_per_prompt": 3, "max_new_tokens": 4, "batch_size": 4}
    config = dpo.Config(iterations=1, epochs=1, learning_rate=rate, **sizes)
    return dpo.online(policy, letters(), DATA, early, config)


def run_reward_model(model, rate=RATE):
    config = reward_model.Config(batch_size=4, epochs=1, learning_rate=rate)
    return reward_model.train(model, letters(), comparisons(), config)


# one step an iteration, so that the last step is the first too
SIZES = {"prompts": 4, "samples_per_prompt": 3, "max_new_tokens": 4, "mini_batches": 1, "epochs": 1}


def run_ppo(policy, rate=RATE, iterations=1, **more):
    config = ppo.Config(iterations=iterations, learning_rate=rate, **SIZES)
    return ppo.train(policy, letters(), DATA, early, config, **more)


def run_grpo(policy, rate=RATE, iterations=1, **more):
    config = grpo.Config(iterations=iterations, learning_rate=rate, **SIZES)
    return grpo.train(policy, letters(), DATA, early, config, **more)


LOOPS = [run_sft, run_reward_model, run_dpo, run_online, run_ppo, run_grpo]


def subject(loop, **how):
    """What a loop trains."""
    policy = words_policy(**how)
    return policy if loop is not run_reward_model else reward_model.load(policy, letters())[0]


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_model_without_anything_to_train_is_refused_by_name(loop):
    model = subject(loop).requires_grad_(False)
    with pytest.raises(ValueError, match=r"(policy|model) has nothing to train: all its weights"):
        next(loop(model))


def test_a_frozen_value_model_may_stand_beside_a_policy_that_trains():
    policy = words_policy()
    value_model = models.ValueModel(policy).requires_grad_(False)
    before = weights(policy)
    assert next(run_ppo(policy, value_model=value_model)).grad_norm > 0
    assert any(not torch.equal(before[name], w) for name, w in policy.state_dict().items())


@pytest.mark.parametrize("loop", LOOPS)
def test_gradient_checkpointing_is_refused_since_dropout_is_off(loop):
    """Oracle: without it the same loop trains."""
    model = subject(loop)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing on.*gradient_checkpointing_dis"):
        next(loop(model))
    model.gradient_checkpointing_disable()
    next(loop(model))


def test_gradient_checkpointing_of_a_value_model_is_refused():
    policy = words_policy()
    value_model = models.ValueModel(policy)
    value_model.trunk.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="value_model has gradient checkpointing on"):
        next(run_ppo(policy, value_model=value_model))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("broken", ["rate", "gradient", "weights"])
def test_the_last_step_is_looked_at_too(monkeypatch, loop, broken):
    """Oracle: a step that is broken by the rate, the gradient or the weights ends in an error; a
    gradient that is not finite moves nothing."""
    model = subject(loop)
    before = weights(model)
    if broken == "gradient":
        hooked = [p for name, p in model.named_parameters() if "ln_f.weight" in name]
        hooked[0].register_hook(lambda grad: grad * math.nan)
    step = torch.optim.AdamW.step

    def bad_step(self, *args, **kwargs):
        for group in self.param_groups:
            group["lr"] = math.inf if broken == "rate" else group["lr"]
        found = step(self, *args, **kwargs)
        if broken == "weights":
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[0] = math.nan
        return found

    if broken != "gradient":
        monkeypatch.setattr(torch.optim.AdamW, "step", bad_step)
    with pytest.raises(TrainingStopped, match="holds a NaN or an infinity") as caught:
        list(loop(model))
    assert caught.value.name == "not finite"
    if broken == "gradient":
        assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())


@pytest.mark.parametrize("loop", [run_ppo, run_grpo])
def test_no_checkpoint_is_written_of_weights_that_are_not_finite(monkeypatch, tmp_path, loop):
    """Oracle: the names in the folder; the last good step is the newest and can be gone on from."""
    step = torch.optim.AdamW.step
    whole = list(loop(words_policy(), iterations=3))
    run = loop(words_policy(), iterations=3, folder=tmp_path, save_every=1)
    next(run)
    next(run)

    def bad_step(self, *args, **kwargs):
        found = step(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data.view(-1)[0] = math.inf
        return found

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", bad_step)
        with pytest.raises(TrainingStopped, match="not finite"):
            next(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    again = list(loop(words_policy(), iterations=3, folder=tmp_path, save_every=1))
    assert [one.reward for one in again] == [one.reward for one in whole]


# --- half precision ------------------------------------------------------------------------------

HALVES = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float32 on bfloat16": {"dtype": torch.bfloat16, "adapter": torch.float32},
    "float32 on float16": {"dtype": torch.float16, "adapter": torch.float32},
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", HALVES)
def test_half_precision_trains(loop, kind):
    """Oracle: weights that move and stay finite. What would train a value function in float16 is
    refused by name."""
    if loop is run_reward_model and kind != "bfloat16":
        pytest.skip("a reward model has no adapter")
    model = subject(loop, **HALVES[kind])
    before = weights(model)
    if loop is run_ppo and "float16" in kind.split():
        with pytest.raises(ValueError, match=r"value_model trains head\.weight in float16"):
            next(loop(model, 1e-2))
        return
    assert list(loop(model, 1e-2))
    moved = {name for name, w in model.state_dict().items() if not torch.equal(before[name], w)}
    assert moved
    assert all(w.isfinite().all() for w in model.state_dict().values())
    assert "adapter" not in HALVES[kind] or all("lora_" in name for name in moved)


@pytest.mark.parametrize("loop", LOOPS)
def test_weights_that_are_trained_in_float16_are_refused_by_name(loop):
    with pytest.raises(ValueError, match=r"(policy|model) trains .* in float16, half precision"):
        next(loop(subject(loop, dtype=torch.float16)))


@pytest.mark.parametrize("loop", [ppo, grpo])
def test_in_half_precision_the_first_ratio_is_one_and_a_real_fault_is_still_found(loop):
    """Oracle: the old log-probabilities against a pass as in training; in float32 they are the
    sampler's own; dropout between the two stops the run."""
    config = loop.Config(**SIZES)
    for dtype in (torch.float32, torch.bfloat16):
        run = loop.start(words_policy(dtype, resid_pdrop=0.3), letters(), config)
        sample = loop.collect if loop is ppo else loop.groups
        batch = sample(run, DATA, early, config)
        where = (batch.tokens, batch.attention_mask, batch.mask.shape[1])
        rollout = Rollout(*where[:2], batch.mask, batch.old_log_probs + 1, 0)
        found = old_log_probs(run.policy, rollout, 1.0, 3)
        if dtype == torch.float32:
            assert found is rollout.log_probs
        else:
            assert torch.equal(found, batch.old_log_probs)
            assert found.dtype == torch.float32
        run.policy.train()
        torch.manual_seed(0)
        with pytest.raises(TrainingStopped, match="half precision") as caught:
            loop.update(run, batch, config)
        assert caught.value.name == "first ratio"
        assert ("in the mean and in half precision" in str(caught.value)) == (
            dtype == torch.bfloat16
        )
        run.policy.eval()
        assert loop.update(run, batch, config)["updates"] >= 1
