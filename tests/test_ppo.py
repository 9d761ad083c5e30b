"""PPO: against sequences run one by one, plain autograd, tables worked by hand, a language whose
optimum is known, and runs that are killed.

Called as a script, this file is the run that gets killed.
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from architectures import EOS, FIVE, build, scored_alone
from killing import ending, in_child, needs_fork, tear_a_write
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rlhf_helpers import models
from rlhf_helpers.algorithms import ppo, sft
from rlhf_helpers.algorithms.ppo import Config, TrainingStopped
from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.worlds import enumerable as world

WORDS = ["<end>", *"abcdefgh"]
PROMPTS = ["a b c d e", "f", "g h", "b a d c"]
PTX = [("a b", "c"), ("d", "e f g h"), ("h g f", "e d"), ("c", "b a c")]
SMALL = Config(
    iterations=6,
    prompts=4,
    samples_per_prompt=3,
    max_new_tokens=7,
    temperature=0.8,
    epochs=2,
    mini_batches=2,
)
SECONDS = ("rollout_seconds", "update_seconds")


def word_tokenizer():
    """One token a word; pad, end and start are one token, the hard case."""
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = dict.fromkeys(("eos_token", "pad_token", "bos_token"), "<end>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **roles)


TOKENIZER = word_tokenizer()


def early(prompts, completions, **columns):
    """Letters from the beginning of the alphabet are worth more."""
    return [sum(4.5 - WORDS.index(w) for w in text.split()) / 4 for text in completions]


def small_policy(lora=False, architecture="gpt2", dtype=torch.float32, **changes):
    model = build(architecture, dtype=dtype, vocab_size=len(WORDS), **changes)
    if lora:
        torch.manual_seed(0)
        model = models.lora_policy(model)
    return model


def started(config=SMALL, values=0.3, **how):
    """A run whose value function has an opinion."""
    run = ppo.start(small_policy(**how), TOKENIZER, config)
    if run.value_model is not None:
        torch.manual_seed(1)
        torch.nn.init.normal_(run.value_model.head.weight, std=values)
    return run


def collected(run, config=SMALL, prompts=PROMPTS, reward=early):
    return ppo.collect(run, prompts, reward, config)


def gradients(run):
    found = {}
    for name, model in (("policy", run.policy), ("value_model", run.value_model)):
        for key, parameter in [] if model is None else model.named_parameters():
            grad = parameter.grad
            found[f"{name}.{key}"] = torch.zeros_like(parameter) if grad is None else grad.clone()
    return found


def nudged(run, by=0.02):
    """Move the policy and the value function, so that ratios are no longer 1 and some are
    clipped."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for model in (run.policy, run.value_model):
            for parameter in [] if model is None else model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(by * noise)


def assert_close(found, wanted, atol=1e-10):
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=atol, msg=name)


def biggest(grads):
    return max(grad.abs().max().item() for grad in grads.values())


def without_seconds(history):
    return [[v for k, v in m._asdict().items() if k not in SECONDS] for m in history]


# --- collect -------------------------------------------------------------------------------------


@pytest.mark.equation("eq:kl-reward")
def test_the_reward_of_each_token_by_hand():
    """Oracle: a table of two completions worked by hand, β = ½."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    log_probs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 9.0, math.nan]])
    ref_log_probs = torch.tensor([[-2.0, -1.0, -1.5], [-2.5, -9.0, 1.0]])
    found = ppo.kl_rewards(torch.tensor([10.0, -4.0]), log_probs, ref_log_probs, mask, 0.5)
    assert found.tolist() == [[-0.5, 0.5, 9.5], [-3.75, 0.0, 0.0]]


@pytest.mark.equation("eq:kl-reward")
def test_the_rewards_of_a_rollout_sum_to_score_less_price_and_the_score_is_at_the_end():
    """Oracle: log-ratios of the policy and of a copy made before it moved, one sequence at a time;
    and the same batch with twice the score, which may differ at the last token alone."""
    run = started(dtype=torch.float64)
    before = copy.deepcopy(run.policy)
    nudged(run)
    run.kl_coefficient = 0.7
    state = run.sampling.get_state()
    batch = collected(run)
    length = batch.mask.shape[1]
    where = (batch.tokens, batch.attention_mask, length, SMALL.temperature)
    ratio = scored_alone(run.policy, *where) - scored_alone(before, *where)
    assert ratio.abs().max() > 0.01
    assert torch.allclose(batch.rewards.sum(1), batch.scores - 0.7 * ratio.sum(1), atol=1e-6)
    run.sampling.set_state(state)
    twice = collected(run, reward=lambda prompts, texts: [2 * x for x in early(prompts, texts)])
    assert torch.equal(twice.tokens, batch.tokens)
    for row, score, mask in zip(
        twice.rewards - batch.rewards, batch.scores, batch.mask, strict=True
    ):
        last = max(t for t in range(length) if mask[t])
        assert row[last].item() == pytest.approx(score.item(), abs=1e-6)
        assert row.count_nonzero() == (score != 0)
    assert len(batch.mask.sum(1).unique()) > 2


def test_a_batch_holds_what_was_asked_for():
    """Oracle: the tokens, read one by one: prompts in neighbouring rows, the end counted, texts and
    scores those of the tokens; the penalty falls on completions without an end."""
    # so hot that some end and some do not, whatever the random weights
    config = dataclasses.replace(SMALL, missing_end_penalty=5.0, max_new_tokens=9, temperature=20.0)
    seen = {}

    def reward(prompts, completions, stars):
        seen.update(prompts=prompts, completions=completions, stars=stars)
        return early(prompts, completions)

    batch = ppo.collect(started(config), PROMPTS, reward, config, {"stars": [1, 2, 3, 4]})
    assert seen["prompts"] == [p for p in PROMPTS for _ in range(3)]
    assert seen["stars"] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    width = batch.tokens.shape[1] - batch.mask.shape[1]
    for i, text in enumerate(batch.texts):
        prompt = batch.tokens[i, :width][batch.attention_mask[i, :width].bool()]
        completion = batch.tokens[i, width:][batch.mask[i]].tolist()
        assert [WORDS[t] for t in prompt] == PROMPTS[i // 3].split()
        ended = EOS in completion
        assert ended == (completion[-1] == EOS) == batch.ended[i].item()
        assert ended or len(completion) == 9
        letters = [WORDS[t] for t in completion if t != EOS]
        assert text.split() == letters
        wanted = early([""], [" ".join(letters)])[0] - 5.0 * (not ended)
        assert batch.scores[i].item() == pytest.approx(wanted, abs=1e-6)
    assert {True, False} == set(batch.ended.tolist())


@pytest.mark.parametrize("architecture", FIVE)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_the_log_probs_of_training_are_those_of_sampling(architecture, temperature):
    """Oracle: each sequence alone, without padding; both paths of the update, with and without the
    entropy bonus, find the ratio 1."""
    config = dataclasses.replace(SMALL, temperature=temperature)
    run = started(config, architecture=architecture)
    batch = collected(run, config)
    length = batch.mask.shape[1]
    assert len(batch.mask.sum(1).unique()) > 1
    where = (batch.tokens, batch.attention_mask, length)
    with torch.no_grad():
        alone = scored_alone(run.policy, *where, temperature)
        scored = completion_log_probs(run.policy, *where, temperature, samples_per_prompt=3)
    assert (alone - batch.old_log_probs).abs().max() < 1e-5
    assert (scored - batch.old_log_probs).abs().max() < 1e-5
    assert (batch.ref_log_probs - batch.old_log_probs).abs().max() < 1e-5
    rows = torch.arange(len(batch.scores))
    found = {}
    for coefficient in (0.0, 1e-9):
        settings = dataclasses.replace(config, entropy_coefficient=coefficient)
        with torch.no_grad():
            loss, found[coefficient] = ppo.losses(run, batch, rows, settings, first=True)
        assert found[coefficient]["approx_kl"] < 1e-9
        assert found[coefficient]["clip_fraction"] == 0
        found[coefficient]["loss"] = loss.item()
    assert found[0.0] == pytest.approx(found[1e-9], abs=1e-5)


@pytest.mark.parametrize("entropy", [0.0, 0.1])
@pytest.mark.parametrize("fault", ["dropout", "temperature"])
def test_a_first_ratio_other_than_one_stops_the_run(fault, entropy):
    """Oracle: the specification; the same batch without the fault is learned from."""
    config = dataclasses.replace(SMALL, entropy_coefficient=entropy)
    run = started(config, resid_pdrop=0.1)
    batch = collected(run, config)
    torch.manual_seed(0)
    wrong = config
    if fault == "dropout":
        run.policy.train()
    else:
        wrong = dataclasses.replace(config, temperature=1.0)
    with pytest.raises(TrainingStopped, match="dropout that is on, another temperature") as caught:
        ppo.update(run, batch, wrong)
    assert caught.value.name == "first ratio"
    run.policy.eval()
    assert ppo.update(run, batch, config)["updates"] == 4


# --- advantages ----------------------------------------------------------------------------------

REWARDS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [0.0, 8.0, 0.0], [2.0, 2.0, 2.0]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
VALUES = torch.tensor([[1.0, 1.0, 2.0], [3.0, 0.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
# sums to the end of each row
TO_COME = [[6.0, 5.0, 3.0], [4.0, 0.0, 0.0], [8.0, 8.0, 0.0], [6.0, 4.0, 2.0]]
BY_HAND = {
    # λ = ½: δ = r + V(next) − V, A = δ + ½·A(next)
    "value": [[2.75, 3.5, 1.0], [1.0, 0.0, 0.0], [4.0, 4.0, 0.0], [3.5, 3.0, 2.0]],
    # two samples a prompt: less the other one's sum, 4 and 6, and 6 and 8
    "group": [[2.0, 1.0, -1.0], [-2.0, 0.0, 0.0], [2.0, 2.0, 0.0], [-2.0, -4.0, -6.0]],
    "none": TO_COME,
}


def test_the_discount_of_a_value_function_by_hand():
    """Oracle: the table above with γ = ½ too: δ = r + ½·V(next) − V, A = δ + ¼·A(next)."""
    config = Config(baseline="value", gamma=0.5, lam=0.5, whiten=False)
    advantages, returns = ppo.advantages_of(REWARDS, VALUES, MASK, config)
    wanted = [[1.0625, 2.25, 1.0], [1.0, 0.0, 0.0], [1.0, 4.0, 0.0], [2.625, 2.5, 2.0]]
    assert advantages.tolist() == wanted
    assert torch.equal(returns, advantages + VALUES)


@pytest.mark.parametrize("baseline", ppo.BASELINES)
@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_by_hand_and_whitening_leaves_the_returns(baseline, whiten):
    """Oracle: a table of four completions worked by hand, two of each prompt; whitening by NumPy's
    mean and standard deviation of the entries that count."""
    config = Config(samples_per_prompt=2, baseline=baseline, lam=0.5, whiten=whiten)
    advantages, returns = ppo.advantages_of(REWARDS, VALUES, MASK, config)
    wanted = torch.tensor(BY_HAND[baseline])
    to_come = wanted + VALUES if baseline == "value" else torch.tensor(TO_COME)
    torch.testing.assert_close(returns, to_come)
    if whiten:
        counted = wanted[MASK].numpy()
        counted = (counted - counted.mean()) / counted.std(ddof=1)
        wanted = torch.zeros_like(wanted)
        wanted[MASK] = torch.tensor(counted)
    torch.testing.assert_close(advantages, wanted)


def test_the_group_baseline_is_the_mean_of_the_others_and_discount_reaches_the_returns():
    """Oracle: plain loops over three samples of each of four prompts."""
    config = Config(samples_per_prompt=3, baseline="group", gamma=0.5, whiten=False)
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.randint(1, 5, (12, 1), generator=generator)
    rewards = torch.randn(12, 4, generator=generator) * mask
    advantages, returns = ppo.advantages_of(rewards, torch.zeros(12, 4), mask, config)
    for i in range(12):
        others = [j for j in range(12) if j // 3 == i // 3 and j != i]
        mean = sum(rewards[j].sum().item() for j in others) / 2
        for t in range(int(mask[i].sum())):
            to_come = sum(0.5 ** (k - t) * rewards[i, k].item() for k in range(t, 4))
            assert returns[i, t].item() == pytest.approx(to_come, abs=1e-5)
            assert advantages[i, t].item() == pytest.approx(to_come - mean, abs=1e-5)
    assert not advantages[~mask].any()


# --- the gradient --------------------------------------------------------------------------------


def plain_loss(run, batch, rows, config, with_prompt=False):
    """The objective written out in plain PyTorch, one sequence at a time and without padding."""
    width = batch.tokens.shape[1] - batch.mask.shape[1]
    objective, errors, entropies, count = 0.0, 0.0, 0.0, 0
    for i in rows.tolist():
        ids = batch.tokens[i][batch.attention_mask[i].bool()].unsqueeze(0)
        start = int(batch.attention_mask[i, :width].sum())
        n = ids.shape[1] - start
        logits = run.policy(ids).logits[0, :-1] / config.temperature
        table = logits.log_softmax(-1)
        log_probs = table[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        if with_prompt:
            objective = objective + log_probs[: start - 1].sum()
        table, log_probs = table[start - 1 :], log_probs[start - 1 :]
        assert log_probs.shape == (n,)
        ratio = torch.exp(log_probs - batch.old_log_probs[i, :n])
        gain = batch.advantages[i, :n]
        low, high = 1 - config.clip, 1 + config.clip
        objective = objective + torch.minimum(ratio * gain, ratio.clamp(low, high) * gain).sum()
        entropies = entropies - (table.exp() * table).sum()
        if run.value_model is not None:
            hidden = run.value_model.trunk(ids).last_hidden_state[0, start - 1 : -1]
            head = run.value_model.head
            values = hidden @ head.weight[0] + head.bias[0]
            error = (values - batch.returns[i, :n]).square()
            if config.value_clip is not None:
                old, most = batch.values[i, :n], config.value_clip
                moved = old + (values - old).clamp(-most, most)
                error = torch.maximum(error, (moved - batch.returns[i, :n]).square())
            errors = errors + 0.5 * error.sum()
        count += n
    return (errors - objective - config.entropy_coefficient * entropies) / count


VARIANTS = {
    "plain": {},
    "no value function": {"baseline": "group", "whiten": False},
    "everything": {"entropy_coefficient": 0.3, "value_clip": 0.05, "clip": 0.05},
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_that_of_the_objective_written_out(variant, moved, lora):
    """Oracle: autograd of plain PyTorch, each sequence alone; at the first update, and after the
    policy has moved so far that ratios are clipped. With the prompts' tokens in the loss it is
    another."""
    config = dataclasses.replace(SMALL, max_grad_norm=1e9, **VARIANTS[variant])
    run = started(config, lora=lora, dtype=torch.float64)
    batch = collected(run, config)
    if moved:
        nudged(run)
    prompts = torch.tensor([2, 0])
    rows = torch.tensor([6, 7, 8, 0, 1, 2])
    wanted = {}
    for with_prompt in (False, True):
        run.optimizer.zero_grad()
        loss = plain_loss(run, batch, rows, config, with_prompt)
        loss.backward()
        wanted[with_prompt] = (loss.item(), gradients(run))
    found = ppo.step(run, batch, prompts, config, first=not moved)
    assert_close(gradients(run), wanted[False][1])
    assert biggest(wanted[False][1]) > 1e-3
    apart = wanted[False][1].values(), wanted[True][1].values()
    assert max((a - b).abs().max() for a, b in zip(*apart, strict=True)) > 1e-3
    assert (found["clip_fraction"] > 0) == moved
    bonus = config.entropy_coefficient
    if not bonus:
        both = found["policy_loss"] + found["value_loss"]
        assert both == pytest.approx(wanted[False][0], abs=1e-10)


def test_each_gradient_is_shortened_by_itself_and_its_norm_before_that_is_told():
    """Oracle: the norm of all gradients of the policy, and of the value function, unshortened."""
    config = dataclasses.replace(SMALL, max_grad_norm=1e9)
    run = started(config, dtype=torch.float64)
    batch = collected(run, config)
    told = ppo.step(run, batch, torch.arange(2), config)["grad_norm"]
    free = gradients(run)
    norms = {
        part: math.sqrt(sum(g.square().sum().item() for k, g in free.items() if k.startswith(part)))
        for part in ("policy", "value_model")
    }
    assert told == pytest.approx(norms["policy"])
    config = dataclasses.replace(config, max_grad_norm=norms["policy"] / 2)
    run = started(config, dtype=torch.float64)
    ppo.step(run, collected(run, config), torch.arange(2), config)
    for key, grad in gradients(run).items():
        norm = norms[key.partition(".")[0]]
        factor = min(1.0, config.max_grad_norm / norm)
        torch.testing.assert_close(grad, factor * free[key], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_give_the_gradient_of_the_whole(micro_batch, variant):
    """Oracle: the mini-batch in one piece; completions from 1 to 20 tokens long."""
    found = []
    for size in (None, micro_batch):
        config = dataclasses.replace(
            SMALL,
            max_new_tokens=20,
            micro_batch=size,
            mini_batches=1,
            max_grad_norm=1e9,
            ptx_coefficient=0.3,
            **VARIANTS[variant],
        )
        run = started(config, dtype=torch.float64)
        batch = collected(run, config)
        nudged(run)
        lengths = batch.mask.sum(1)
        assert lengths.min() <= 2
        assert lengths.max() >= 15
        told = ppo.step(run, batch, torch.arange(4), config, sft.encode(TOKENIZER, PTX))
        found.append((gradients(run), told))
    assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-10)


def test_the_ptx_term_adds_its_share_of_the_fine_tuning_gradient():
    """Oracle: the difference that the term makes, against λ times autograd of the mean negative
    log-probability of the drawn examples, one at a time; as many as the mini-batch has rows."""
    examples, found = sft.encode(TOKENIZER, PTX), {}
    for coefficient in (0.0, 0.7):
        config = dataclasses.replace(SMALL, ptx_coefficient=coefficient, max_grad_norm=1e9)
        run = started(config, dtype=torch.float64)
        batch = collected(run, config)
        state = run.order.get_state()
        ppo.step(run, batch, torch.tensor([1, 3]), config, examples)
        found[coefficient] = gradients(run)
    run = started(SMALL, dtype=torch.float64)
    drawn = torch.randint(len(PTX), (6,), generator=torch.Generator().set_state(state)).tolist()
    assert len(set(drawn)) > 1
    total, count = 0.0, 0
    for i in drawn:
        prompt, response = ([WORDS.index(w) for w in text.split()] for text in PTX[i])
        ids = torch.tensor([[*prompt, *response, EOS]])
        table = run.policy(ids).logits[0].log_softmax(-1)
        for t in range(len(prompt), ids.shape[1]):
            total, count = total - table[t - 1, ids[0, t]], count + 1
    (0.7 * total / count).backward()
    wanted = gradients(run)
    assert biggest(wanted) > 1e-3
    apart = {name: found[0.7][name] - found[0.0][name] for name in wanted}
    assert_close(apart, wanted)


def test_the_ptx_examples_differ_from_update_to_update():
    """Oracle: the loss of each draw, which would be one number if the same were drawn."""
    run, examples = started(), sft.encode(TOKENIZER, PTX)
    with torch.no_grad():
        assert len({ppo.ptx_loss(run, examples, 2).item() for _ in range(6)}) > 2


# --- update --------------------------------------------------------------------------------------


def test_every_prompt_is_used_once_a_pass(monkeypatch):
    """Oracle: the indices that arrive, in passes of two mini-batches."""
    run, seen = started(), []
    batch = collected(run)

    def step(run, batch, prompts, config, ptx, first):
        seen.append((prompts.tolist(), first))
        return {"approx_kl": 0.0}

    monkeypatch.setattr(ppo, "step", step)
    ppo.update(run, batch, dataclasses.replace(SMALL, epochs=5))
    assert [first for _, first in seen] == [True] + 9 * [False]
    passes = [seen[i][0] + seen[i + 1][0] for i in range(0, 10, 2)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in passes)
    assert len(set(map(tuple, passes))) > 2


def test_the_price_adapts_by_the_samples_of_an_iteration():
    """Oracle: the formula of Ziegler et al. by hand: 12 samples, of four prompts, by a horizon of
    50."""
    config = dataclasses.replace(SMALL, kl_target=0.01, kl_horizon=50, learning_rate=1e-2)
    run = started(config)
    first, second, third = (ppo.iterate(run, PROMPTS, early, config) for _ in range(3))
    for one, after in ((first, second), (second, third)):
        error = min(max(one.kl / 0.01 - 1, -0.2), 0.2)
        wanted = one.kl_coefficient * (1 + error * 12 / 50)
        assert after.kl_coefficient == pytest.approx(wanted, rel=1e-9)


def test_the_kl_that_is_logged_is_that_of_the_last_mini_batch_before_its_step(monkeypatch):
    """Oracle: Schulman's estimate from the log-probabilities of the batch and those just before the
    last step, on the prompts of that step alone."""
    run = started()
    batch = collected(run)
    step, seen = ppo.step, []

    def watched(run, batch, prompts, config, ptx, first):
        rows = (prompts[:, None] * config.samples_per_prompt + torch.arange(3)).flatten()
        where = (batch.tokens[rows], batch.attention_mask[rows], batch.mask.shape[1])
        with torch.no_grad():
            now = completion_log_probs(run.policy, *where, config.temperature)
        difference = (now - batch.old_log_probs[rows])[batch.mask[rows]].double()
        seen.append((difference.exp() - 1 - difference).mean().item())
        return step(run, batch, prompts, config, ptx, first)

    monkeypatch.setattr(ppo, "step", watched)
    found = ppo.update(run, batch, SMALL)
    assert found["approx_kl"] == pytest.approx(seen[-1], rel=1e-3)
    assert seen[-1] != pytest.approx(sum(seen) / len(seen), rel=0.1)


def test_a_batch_of_one_completion_has_no_spread():
    """Oracle: by hand: 0, not NaN."""
    config = dataclasses.replace(SMALL, prompts=1, samples_per_prompt=1, whiten=False)
    run = started(config)
    batch = collected(run, config, PROMPTS[:1])
    assert ppo.measure(run, batch, config)["score_std"] == 0.0


def test_updates_end_early_when_the_policy_has_gone_far():
    """Oracle: the KL of each update in the run that goes on: the first above 1.5 times the limit is
    the last one done."""
    config = dataclasses.replace(SMALL, epochs=8, learning_rate=3e-3)

    def updates(stop_kl):
        settings = dataclasses.replace(config, stop_kl=stop_kl)
        run = started(settings)
        batch, kls, step = collected(run, settings), [], ppo.step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo, "step", lambda *a, **k: kls.append(step(*a, **k)) or kls[-1])
            found = ppo.update(run, batch, settings)
        kls = [one["approx_kl"] for one in kls]
        assert found["updates"] == len(kls)
        assert found["approx_kl"] == kls[-1]
        return kls

    free = updates(None)
    assert len(free) == 16
    # one limit that an update before the last exceeds, and one that the last exceeds by a little
    exceeded, just_passed = 0.95 * max(free[:6]), max(free[:8]) / 1.55
    for limit in (just_passed, exceeded):
        count = next(i for i, kl in enumerate(free) if kl > 1.5 * limit) + 1
        assert 1 < count < len(free)
        assert updates(limit) == free[:count]
    assert max(free[: count - 1]) > exceeded
    assert updates(max(free)) == free


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_stays_and_the_policy_moves(lora):
    """Oracle: a second copy of the model as it was built, which no run has seen."""
    config = dataclasses.replace(SMALL, learning_rate=1e-2)
    run = started(config, lora=lora)
    batch = collected(run, config)
    for _ in range(3):
        ppo.update(run, collected(run, config), config)
    where = (batch.tokens, batch.attention_mask, batch.mask.shape[1], SMALL.temperature)
    with torch.no_grad():
        original = completion_log_probs(small_policy(), *where)
        moved = completion_log_probs(run.policy, *where)
    with run.reference() as reference:
        found = completion_log_probs(reference, *where)
    assert torch.allclose(found, original, atol=1e-6)
    assert (moved - original).abs().max() > 0.05
    later = collected(run, config)
    where = (later.tokens, later.attention_mask, later.mask.shape[1], SMALL.temperature)
    with torch.no_grad():
        assert torch.allclose(
            later.ref_log_probs, completion_log_probs(small_policy(), *where), atol=1e-5
        )


def test_values_learn_to_foresee_what_the_prompt_decides():
    """Oracle: the reward, +1 after one prompt and −1 after another whatever follows, so all of its
    variance can be foreseen."""
    config = dataclasses.replace(
        SMALL,
        iterations=15,
        max_new_tokens=3,
        kl_coefficient=0.0,
        learning_rate=1e-5,
        value_learning_rate=1e-2,
        warm_up=0.0,
    )

    def reward(prompts, completions):
        return [1.0 if prompt == "f" else -1.0 for prompt in prompts]

    found = [
        m.explained_variance
        for m in ppo.train(small_policy(), TOKENIZER, ["f", "a b"], reward, config)
    ]
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert min(found[-3:]) > 0.9


def test_the_metrics_of_a_batch_by_hand():
    """Oracle: plain loops over the rows of the batch, and the full softmax of each sequence
    alone."""
    run = started()
    nudged(run)
    batch = collected(run)
    found = ppo.measure(run, batch, SMALL)
    rows, values = range(len(batch.scores)), batch.values
    lengths = [int(batch.mask[i].sum()) for i in rows]
    ratios = [
        sum((batch.old_log_probs - batch.ref_log_probs)[i, :n].tolist())
        for i, n in zip(rows, lengths, strict=True)
    ]
    scores = batch.scores.tolist()
    mean = sum(scores) / 12
    entropies = []
    for i, n in zip(rows, lengths, strict=True):
        ids = batch.tokens[i][batch.attention_mask[i].bool()].unsqueeze(0)
        with torch.no_grad():
            p = (run.policy(ids).logits[0, -n - 1 : -1] / SMALL.temperature).softmax(-1)
        entropies += (-(p * p.log()).sum(-1)).tolist()
    returns = torch.cat([batch.returns[i, :n] for i, n in zip(rows, lengths, strict=True)])
    errors = returns - torch.cat([values[i, :n] for i, n in zip(rows, lengths, strict=True)])
    wanted = {
        "reward": mean - SMALL.kl_coefficient * sum(ratios) / 12,
        "score": mean,
        "score_std": math.sqrt(sum((x - mean) ** 2 for x in scores) / 11),
        "kl": sum(ratios) / 12,
        "kl_coefficient": SMALL.kl_coefficient,
        "entropy": sum(entropies) / len(entropies),
        "explained_variance": 1 - errors.numpy().var() / returns.numpy().var(),
        "length": sum(lengths) / 12,
        "unended": sum(not x for x in batch.ended.tolist()) / 12,
        "distinct": len(set(batch.texts)) / 12,
    }
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


# --- prompts and their columns -------------------------------------------------------------------


def test_prompts_and_columns_arrive_together():
    """Oracle: the column holds the prompt itself."""
    pairs = []

    def reward(prompts, completions, same):
        pairs.append((prompts, same))
        return early(prompts, completions)

    config = dataclasses.replace(SMALL, iterations=3, prompts=2)
    list(ppo.train(small_policy(), TOKENIZER, PROMPTS, reward, config, columns={"same": PROMPTS}))
    assert len(pairs) == 3
    assert all(prompts == same for prompts, same in pairs)
    assert sorted(pairs[0][0] + pairs[1][0]) == sorted(PROMPTS * 3)


# --- what stops a run ----------------------------------------------------------------------------


def poison(model):
    parameter = dict(model.named_parameters())["transformer.h.1.mlp.c_fc.weight"]
    with torch.no_grad():
        parameter.view(-1)[0] = math.nan


@pytest.mark.parametrize("fault", [math.nan, 0.1])
def test_a_first_ratio_that_is_off_by_a_little_or_no_number_stops_the_run(fault):
    """Oracle: the specification: log-probabilities of sampling are those of training, up to
    rounding."""
    run = started()
    batch = collected(run)
    other = batch._replace(old_log_probs=batch.old_log_probs + fault)
    with pytest.raises(TrainingStopped, match="first ratio"):
        ppo.update(run, other, SMALL)


def test_a_nan_is_stopped_where_it_is_by_its_name():
    """Oracle: the tensor that was poisoned."""
    run = started()
    batch = collected(run)
    with run.reference() as reference:
        poison(reference)
    with pytest.raises(TrainingStopped, match="reference_log_probs holds a NaN") as caught:
        collected(run)
    assert caught.value.name == "not finite"
    run = started()
    with torch.no_grad():
        run.value_model.head.bias[0] = math.inf
    with pytest.raises(TrainingStopped, match=r"value_model\.head\.bias holds a NaN"):
        collected(run)
    with pytest.raises(TrainingStopped, match="value_loss holds a NaN"):
        ppo.update(run, batch, SMALL)
    run = started()
    poison(run.policy)
    with pytest.raises(TrainingStopped, match=r"policy\.transformer\.h\.1\.mlp\.c_fc\.weight"):
        collected(run)


def test_a_loss_or_gradient_that_is_not_finite_moves_no_weight():
    """Oracle: the weights before, to the bit."""
    run = started()
    batch = collected(run)
    examples = [sft.Example([1], [2, EOS])]
    before = copy.deepcopy(run.policy.state_dict())
    config = dataclasses.replace(SMALL, ptx_coefficient=1e39)
    with pytest.raises(TrainingStopped, match="gradient holds a NaN") as caught:
        ppo.update(run, batch, config, examples)
    assert caught.value.name == "not finite"
    run.value_model.head.weight.data.fill_(math.nan)
    with pytest.raises(TrainingStopped, match="value_loss holds a NaN"):
        ppo.update(run, batch, SMALL)
    assert all(torch.equal(before[name], w) for name, w in run.policy.state_dict().items())


@pytest.fixture(scope="module")
def healthy():
    """The history of a short run in which nothing is wrong."""
    config = dataclasses.replace(SMALL, iterations=ppo.PATIENCE + 1)
    return list(ppo.train(small_policy(), TOKENIZER, PROMPTS, early, config))


FAULTS = {
    "equal rewards": {"score_std": 0.0},
    "collapse": {"entropy": 0.01, "distinct": 0.1},
    "negative KL": {"kl": -0.8},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_lasts_stops_the_run_and_one_that_passes_does_not(healthy, name):
    """Oracle: the specification; histories in which the fault is there for one iteration less."""
    ppo.diagnose(healthy)
    bad = [metrics._replace(**FAULTS[name]) for metrics in healthy]
    with pytest.raises(TrainingStopped) as caught:
        ppo.diagnose(healthy + bad[-ppo.PATIENCE :])
    assert caught.value.name == name
    ppo.diagnose(healthy + bad[1 - ppo.PATIENCE :])
    ppo.diagnose(bad[-ppo.PATIENCE :] + healthy[-1:])
    ppo.diagnose(bad[: ppo.PATIENCE - 1])
    for key, value in FAULTS[name].items():
        if len(FAULTS[name]) > 1:
            ppo.diagnose([metrics._replace(**{key: value}) for metrics in healthy])


@pytest.mark.parametrize("same", [0.0, 0.1, -1.7, 1 / 3])
def test_a_run_whose_completions_all_earn_the_same_stops(same):
    """Oracle: the constant; numbers that float32 cannot hold exactly are among them."""
    run = ppo.train(
        small_policy(),
        TOKENIZER,
        PROMPTS,
        lambda prompts, texts: [same] * len(texts),
        dataclasses.replace(SMALL, iterations=20, epochs=1, max_new_tokens=3),
    )
    assert len([next(run) for _ in range(ppo.PATIENCE)]) == ppo.PATIENCE
    with pytest.raises(TrainingStopped, match="earned the same") as caught:
        next(run)
    assert caught.value.name == "equal rewards"


def test_a_policy_that_writes_one_text_stops_the_run():
    """Oracle: a model whose logits are a hundred times as large, which writes the likeliest text;
    the scores differ by chance."""
    policy = small_policy()
    with torch.no_grad():
        policy.transformer.ln_f.weight.mul_(100)
    config = dataclasses.replace(SMALL, iterations=20, samples_per_prompt=24, learning_rate=1e-6)
    run = ppo.train(policy, TOKENIZER, ["a b"], lambda p, c: [i % 2 for i in range(len(c))], config)
    found = [next(run) for _ in range(ppo.PATIENCE)]
    assert found[-1].distinct < 0.2
    with pytest.raises(TrainingStopped, match="writes one text") as caught:
        next(run)
    assert caught.value.name == "collapse"


def test_a_run_that_was_stopped_stops_again_where_it_did(tmp_path):
    """Oracle: the specification: going on changes nothing, so the same history ends it."""
    config = dataclasses.replace(LONG, iterations=20, ptx_coefficient=0.0)
    for _ in range(2):
        run = going(tmp_path, config=config, reward=lambda prompts, texts: [0.5] * len(texts))
        assert [next(run).iteration for _ in range(ppo.PATIENCE)] == [1, 2, 3, 4, 5]
        with pytest.raises(TrainingStopped, match="equal rewards"):
            next(run)


def test_a_reward_that_is_nan_is_refused_with_its_example():
    """Oracle: the index and text at which the reward function says NaN."""
    told = []

    def reward(prompts, completions):
        told.append(completions[5])
        return [math.nan if i == 5 else 0.0 for i in range(len(completions))]

    with pytest.raises(ValueError, match=r"returned nan for completions\[5\]") as caught:
        next(ppo.train(small_policy(), TOKENIZER, PROMPTS, reward, SMALL))
    assert repr(told[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "critic"}, "baseline='critic' is unknown"),
        ({"baseline": "group", "samples_per_prompt": 1}, "samples_per_prompt of 2"),
        ({"mini_batches": 3}, "mini_batches=3 must divide the 4 prompts"),
        (
            {"prompts": 1, "samples_per_prompt": 1, "mini_batches": 1},
            "prompts=1 with samples_per_prompt=1 is a batch of one completion",
        ),
        ({"kl_target": 1.0, "kl_coefficient": 0.0}, "coefficient=0.0"),
        ({"ptx_coefficient": 0.1}, "ptx is empty"),
        *[({name: 0}, f"{name}=0 must lie") for name in ppo._COUNTS],
        *[({name: 0}, f"{name}=0 must lie") for name in ppo._POSITIVE],
        *[({name: math.nan}, f"{name}=nan must lie") for name in ppo._POSITIVE],
        *[
            ({name: -1}, f"{name}=-1 must lie")
            for name in (
                "kl_coefficient",
                "entropy_coefficient",
                "ptx_coefficient",
                "missing_end_penalty",
                "value_coefficient",
            )
        ],
        *[({name: 1.5}, f"{name}=1.5 must lie") for name in ("gamma", "lam", "warm_up")],
        *[
            ({name: 0}, f"{name}=0 must lie")
            for name in ("value_clip", "kl_target", "stop_kl", "micro_batch")
        ],
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name_before_anything_is_sampled(changes, message):
    config = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=message):
        next(
            ppo.train(
                small_policy(),
                TOKENIZER,
                PROMPTS,
                len,
                config,
                ptx=PTX * (message != "ptx is empty"),
            )
        )


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        ([], {}, "prompts must be a list of at least one text"),
        ("a b", {}, "prompts must be a list of at least one text"),
        (PROMPTS, {"columns": {"stars": [1, 2]}}, r"columns\['stars'\] has 2 entries for 4"),
        (PROMPTS, {"save_every": 0}, "save_every=0"),
        (PROMPTS, {"ptx": [("a", "")]}, r"pairs\[0\] has an empty response"),
    ],
)
def test_bad_data_is_refused_by_name(prompts, more, message):
    with pytest.raises(ValueError, match=message):
        next(ppo.train(small_policy(), TOKENIZER, prompts, early, SMALL, **more))


# --- a language whose optimum is known -----------------------------------------------------------


def test_letters_stand_for_the_tokens_of_a_language():
    """Oracle: by hand; every sequence there and back, and an empty prompt is token 0."""
    language = world.language(4, 3)
    tokenizer = world.tokenizer(language)
    texts = models.decode(tokenizer, language.tokens, language.mask)
    assert texts[:6] == ["", "a", "b", "c", "a a", "a b"]
    assert len(set(texts)) == len(texts) == 40
    rows = tokenizer(texts)["input_ids"]
    assert rows == [[t for t in row if t] for row in language.tokens.tolist()]
    tokens, mask = models.encode_prompts(tokenizer, [""])
    assert (tokens.tolist(), mask.tolist()) == ([[0]], [[1]])
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == 0
    reward = world.reward(language, torch.arange(40.0))
    assert reward([""] * 40, texts, stars=[0] * 40) == list(range(40))
    for wrong in ("d", "a  b", "<end>", "a b c a"):
        with pytest.raises(ValueError, match=rf"completions\[1\], {wrong!r}, is no sequence"):
            reward(["", ""], ["a", wrong])
    with pytest.raises(ValueError, match="utilities has shape"):
        world.reward(language, torch.zeros(39))
    with pytest.raises(ValueError, match=r"utilities\[1\] is nan"):
        world.reward(language, torch.zeros(40).index_fill(0, torch.tensor(1), math.nan))
    with pytest.raises(ValueError, match="lower it to 27 at most"):
        world.tokenizer(world.language(28, 1))


@pytest.mark.parametrize("baseline", ["value", "group"])
def test_training_closes_the_gap_to_the_optimal_policy(baseline):
    """Oracle: π* by enumeration of all 781 sequences; utilities that neighbouring tokens decide."""
    language, beta = world.language(6, 4), 0.4
    utilities = world.utilities(language, structure=1.0)
    policy = world.small_gpt2(6, 4)

    def distribution():
        return world.model_log_probs(policy, language).detach().double().log_softmax(-1)

    start = distribution()
    optimum = world.optimal_policy(start, utilities, beta)
    config = Config(
        iterations=30,
        prompts=32,
        samples_per_prompt=4,
        max_new_tokens=4,
        epochs=2,
        mini_batches=2,
        learning_rate=3e-3,
        kl_coefficient=beta,
        baseline=baseline,
    )
    reward = world.reward(language, utilities)
    list(ppo.train(policy, world.tokenizer(language), [""], reward, config))
    before = world.kl(start, optimum).item()
    assert before > 1.0
    assert world.kl(distribution(), optimum).item() < 0.1 * before


# --- a run that goes on --------------------------------------------------------------------------

LONG = dataclasses.replace(
    SMALL,
    iterations=40,
    max_new_tokens=5,
    samples_per_prompt=2,
    epochs=1,
    learning_rate=5e-3,
    kl_target=0.3,
    kl_horizon=60,
    ptx_coefficient=0.1,
)
FIVE_PROMPTS = [*PROMPTS, "h g f"]


def going(folder, policy=None, prompts=FIVE_PROMPTS, config=LONG, reward=early, **more):
    policy = small_policy() if policy is None else policy
    return ppo.train(policy, TOKENIZER, prompts, reward, config, ptx=PTX, folder=folder, **more)


def digest(policy):
    found = hashlib.sha256()
    for name, weight in policy.state_dict().items():
        found.update(name.encode() + weight.numpy().tobytes())
    return found.hexdigest()


def saved(folder):
    """The last checkpoint: its tensors as bytes, and the rest without the seconds."""
    path = sorted(Path(folder).glob("step-*"))[-1]
    state = json.loads((path / "state.json").read_text())["content"]["state"]
    rest = dict(state["dict"])
    history = [dict(zip(ppo.Metrics._fields, row, strict=True)) for row in rest.pop("history")]
    history = [[v for k, v in row.items() if k not in SECONDS] for row in history]
    return path.name, (path / "tensors.safetensors").read_bytes(), rest, history


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_is_stopped_and_started_again_goes_on_as_if_nothing_had_happened(tmp_path, lora):
    """Oracle: the same run without a pause and without checkpoints: weights to the bit, metrics but
    the seconds, the prompts that the reward function sees, and the coefficient that adapts."""
    config = dataclasses.replace(LONG, iterations=9)
    prompts = {"straight": [], "paused": []}

    def watched(name):
        return lambda p, c: prompts[name].append(p) or early(p, c)

    straight = small_policy(lora)
    wanted = without_seconds(going(None, straight, config=config, reward=watched("straight")))
    for count in (2, 3, 7):
        part = going(tmp_path, small_policy(lora), config=config, reward=watched("paused"))
        found = [next(part) for _ in range(count)]
        assert without_seconds(found) == wanted[:count]
        part.close()
    policy = small_policy(lora)
    found = list(going(tmp_path, policy, config=config, reward=watched("paused")))
    assert without_seconds(found) == wanted
    assert digest(policy) == digest(straight) != digest(small_policy(lora))
    assert prompts["paused"] == prompts["straight"]
    assert len({m.kl_coefficient for m in found}) > 5
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_does_not_go_on_from_another_reference(tmp_path, lora):
    """A policy that was trained already would become the reference without a word."""
    next(going(tmp_path, small_policy(lora)))
    changed = small_policy(lora)
    with torch.no_grad():
        changed.get_input_embeddings().weight[0, 0] += 1.0
    with pytest.raises(ValueError, match="load the policy anew"):
        next(going(tmp_path, changed))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("share_trunk", [False, True])
def test_a_shared_trunk_is_trained_once_and_goes_on(tmp_path, share_trunk, lora):
    """Oracle: each parameter stands in one group, the shared ones at the policy's rate; the same
    run without a pause, to the bit."""
    config = dataclasses.replace(LONG, iterations=4, value_coefficient=0.5, micro_batch=1)

    def run(folder=None):
        policy = small_policy(lora)
        value_model = models.ValueModel(policy, share_trunk=share_trunk)
        torch.manual_seed(3)
        torch.nn.init.normal_(value_model.head.weight)
        run = ppo.start(policy, TOKENIZER, config, value_model)
        owned = [{id(p) for p in group["params"]} for group in run.optimizer.param_groups]
        assert not owned[0] & owned[1]
        assert owned[0] == {id(p) for p in policy.parameters() if p.requires_grad}
        assert owned[0] | owned[1] >= {id(p) for p in value_model.parameters() if p.requires_grad}
        assert (len(owned[1]) == 2) == share_trunk  # weight and bias of the head
        return policy, value_model, going(folder, policy, config=config, value_model=value_model)

    policy, value_model, history = run()
    wanted = without_seconds(history)
    for count in (1, 3):
        part = run(tmp_path)[2]
        for _ in range(count):
            next(part)
        part.close()
    again, value_again, history = run(tmp_path)
    assert without_seconds(history) == wanted
    assert digest(again) == digest(policy)
    assert digest(value_again) == digest(value_model)


def test_the_value_coefficient_scales_the_value_loss_alone():
    """Oracle: with a shared trunk, the gradient of the policy's loss plus that many times the value
    loss's, each by itself."""
    grads = {}
    for coefficient in (0.0, 1.0, 0.25):
        config = dataclasses.replace(SMALL, value_coefficient=coefficient)
        policy = small_policy(dtype=torch.float64)
        value_model = models.ValueModel(policy, share_trunk=True)
        torch.manual_seed(1)
        torch.nn.init.normal_(value_model.head.weight)
        run = ppo.start(policy, TOKENIZER, config, value_model)
        batch = collected(run, config)
        loss, _ = ppo.losses(run, batch, torch.arange(len(batch.scores)), config)
        loss.backward()
        grads[coefficient] = gradients(run)
    value = {name: grads[1.0][name] - grads[0.0][name] for name in grads[0.0]}
    assert biggest(value) > 1e-3
    assert_close(
        grads[0.25], {name: grads[0.0][name] + 0.25 * value[name] for name in value}, atol=1e-9
    )


def test_checkpoints_come_when_due_and_at_the_end(tmp_path):
    """Oracle: the steps that stand in the folder after each iteration."""
    config = dataclasses.replace(LONG, iterations=7)
    names = []
    for _ in going(tmp_path, config=config, save_every=3):
        names.append([path.name for path in sorted(tmp_path.glob("step-*"))])
    steps = [[int(name[5:]) for name in some] for some in names]
    assert steps == [[], [], [3], [3], [3], [3, 6], [6, 7]]


def test_another_run_is_not_gone_on_with(tmp_path):
    """Oracle: the specification: what differs is named."""
    config = dataclasses.replace(LONG, iterations=2)
    list(going(tmp_path, config=config))
    changed = dataclasses.replace(config, clip=0.3)
    with pytest.raises(ValueError, match=r"run: config\['clip'\] is 0\.2 there and 0\.3 here"):
        next(going(tmp_path, config=changed))
    for prompts in (FIVE_PROMPTS[::-1], FIVE_PROMPTS[:4]):
        with pytest.raises(ValueError, match="prompts is"):
            next(going(tmp_path, config=config, prompts=prompts))
    with pytest.raises(ValueError, match="ptx is"):
        next(
            ppo.train(
                small_policy(), TOKENIZER, FIVE_PROMPTS, early, config, ptx=PTX[:2], folder=tmp_path
            )
        )


# What follows up to the test runs in another process, which copies itself


def kill_again_and_again(folder):
    """Kill the run sixteen times: every third in the middle of a write, the others at a random
    moment of the iteration.

    Returns: how far each had come when it was killed.
    """
    draw = random.Random(0)
    begin = time.perf_counter()
    list(going(None, config=dataclasses.replace(LONG, iterations=10)))
    iteration = (time.perf_counter() - begin) / 10
    reached = []
    for i in range(16):
        torn, share = i % 3 == 2, draw.random()
        reader, writer = os.pipe()
        n = draw.randrange(2, 8)

        done = reached[-1] if reached else 0

        def work(torn=torn, n=n, share=share, writer=writer, done=done):
            if torn:
                tear_a_write(n, share)
            for metrics in going(folder):
                os.write(writer, bytes([metrics.iteration]))
                # a machine that became faster must not come to the end before it is killed
                if not torn and metrics.iteration == done + 2:
                    signal.pause()

        child = in_child(work)
        os.close(writer)
        last = 0
        # first come the iterations of those before it
        while not torn and last <= done:
            last = os.read(reader, 1)[0]
        if not torn:
            time.sleep(iteration * share)
            os.kill(child, signal.SIGKILL)
        assert ending(child) == -signal.SIGKILL
        rest = os.read(reader, 10_000)
        os.close(reader)
        reached.append(max([last, *rest]))
    return reached


def main(folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    reached = kill_again_and_again(folder / "killed")
    ends = {}
    for name in ("killed", "straight"):
        policy = small_policy()
        history = list(going(folder / name, policy))
        ends[name] = [
            digest(policy),
            [[float(x).hex() for x in m] for m in without_seconds(history)],
        ]
    print(json.dumps([reached, ends]))


@pytest.mark.slow
@needs_fork
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    """Oracle: the same run undisturbed, in the same process: weights of policy and value function,
    optimiser, generators and metrics but the seconds. One thread, set by the child."""
    run = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    reached, ends = json.loads(run.stdout)
    assert reached == sorted(reached)
    assert len(set(reached)) >= 10
    assert reached[-1] < LONG.iterations
    assert ends["killed"] == ends["straight"]
    killed, straight = saved(tmp_path / "killed"), saved(tmp_path / "straight")
    assert killed[0] == straight[0] == f"step-{LONG.iterations:06d}"
    assert killed == straight
    assert b"exp_avg" in killed[1]


if __name__ == "__main__":
    main(*sys.argv[1:])


def test_an_evaluation_samples_judges_and_learns_nothing():
    """Oracle: the exact KL of two policies, both at the temperature of sampling, on a language
    whose every sequence is known, and the exact mean utility; the weights before and after."""
    small = world.language(4, 3)
    words, utilities = world.tokenizer(small), world.utilities(small)
    policy, reference = (world.small_gpt2(4, 3, seed=seed) for seed in (1, 2))
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    config = ppo.Config(samples_per_prompt=20_000, max_new_tokens=3, temperature=0.7)
    judges = {"utility": world.reward(small, utilities)}
    found = ppo.evaluate(policy, reference, words, [""], judges, config)
    exact = []
    for model in (policy, reference):
        colder = copy.deepcopy(model)
        colder.lm_head.weight.data /= 0.7
        exact.append(world.model_log_probs(colder, small).detach())
    log_p, log_q = exact
    error = found.kl.std().item() / len(found.kl) ** 0.5
    assert found.kl.mean().item() == pytest.approx(world.kl(log_p, log_q).item(), abs=4 * error)
    wanted = (log_p.exp() * utilities).sum().item()
    assert found.scores["utility"].mean().item() == pytest.approx(wanted, abs=0.05)
    assert all(torch.equal(before[name], w) for name, w in policy.state_dict().items())
    again = ppo.evaluate(policy, reference, words, [""], judges, config)
    assert again.texts == found.texts
