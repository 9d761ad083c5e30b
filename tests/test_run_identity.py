"""Which run a folder belongs to: what makes two runs different is refused by name before a weight
is touched, an interrupted cell can be run again, and the reference stays what it was."""

import copy
import functools
import os

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import build
from numbers_and_words import WORDS, letters
from peft import LoraConfig, get_peft_model
from tokenizers import processors

from rlhf_helpers import checkpoint, models
from rlhf_helpers.algorithms import dpo, grpo, ppo
from rlhf_helpers.algorithms._resume import digest, name_of
from rlhf_helpers.logprobs import completion_log_probs

PROMPTS = ["a b", "c", "d e f g", "h i"]
ANSWERS = ["a", "b", "c", "d"]
SMALL = {"iterations": 3, "prompts": 2, "samples_per_prompt": 3, "max_new_tokens": 4}
IDS = torch.arange(1, 13)[None]


def small(architecture="gpt2", rank=None, alpha=16, **changes):
    policy = build(architecture, vocab_size=len(WORDS), **changes)
    if rank:
        torch.manual_seed(0)
        policy = models.lora_policy(policy, rank, alpha)
    return policy


def early(prompts, completions, **columns):
    return [sum(w < "m" for w in text.split()) + len(text) / 9 for text in completions]


def late(prompts, completions, **columns):
    return [-score for score in early(prompts, completions)]


def run(loop, folder, policy=None, config=(), reward=early, tokenizer=None, prompts=None, **more):
    """Metrics of a small run of `ppo` or `grpo`."""
    settings = SMALL | {"mini_batches": 1} | dict(config)
    given = {"columns": {"answer": ANSWERS}, "save_every": 1, "folder": folder} | more
    policy = small() if policy is None else policy
    tokenizer = letters() if tokenizer is None else tokenizer
    return loop.train(
        policy, tokenizer, prompts or PROMPTS, reward, loop.Config(**settings), **given
    )


def bits(policy):
    return {name: weight.clone() for name, weight in policy.state_dict().items()}


def same(policy, before):
    return all(torch.equal(before[name], w) for name, w in policy.state_dict().items())


# --- the reference stays -------------------------------------------------------------------------

BESIDE = {
    "all biases": {"bias": "all"},
    "biases of the adapted": {"bias": "lora_only"},
    "a bias of the adapter": {"lora_bias": True},
    "magnitudes": {"use_dora": True},
    "another scale": {"use_rslora": True},
    "a whole layer": {"modules_to_save": ["lm_head"]},
    "an unfrozen norm": {},
}


def with_adapter(family, beside):
    projections = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    settings = dict(BESIDE[beside], target_modules=projections, fan_in_fan_out=family == "gpt2")
    model = build(family, tie_word_embeddings=False, vocab_size=len(WORDS))
    torch.manual_seed(0)
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **settings)).eval()
    if beside == "an unfrozen norm":
        for name, parameter in policy.named_parameters():
            if "ln_f" in name or name.endswith("model.norm.weight"):
                parameter.requires_grad_(True)
    return policy


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("beside", BESIDE)
def test_the_reference_stays_whatever_is_trained_beside_an_adapter(family, beside):
    """Oracle: the policy's own log-probabilities before anything moved."""
    if family == "llama" and "bias" in beside and beside != "all biases":
        pytest.skip("its projections have no bias")
    policy = with_adapter(family, beside)
    where = (IDS, torch.ones_like(IDS), 6)
    before = completion_log_probs(policy, *where).detach()
    frozen, start = models.reference(policy), models.weights_digest(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    with frozen() as reference:
        torch.testing.assert_close(completion_log_probs(reference, *where), before)
        assert models.weights_digest(reference) == start
    assert (completion_log_probs(policy, *where) - before).abs().max() > 1e-3
    assert models.weights_digest(policy) != start


# --- another run is refused ----------------------------------------------------------------------


def renamed():
    tokenizer = letters()
    rules = tokenizer.backend_tokenizer
    rules.post_processor = processors.TemplateProcessing("a $A", special_tokens=[("a", 1)])
    return tokenizer


def with_value_model(seed):
    policy = small()
    value_model = models.ValueModel(policy)
    torch.manual_seed(seed)
    torch.nn.init.normal_(value_model.head.weight)
    return {"policy": policy, "value_model": value_model}


BASE = {
    "plain": dict,
    "adapter": lambda: {"policy": small(rank=2)},
    "kinds": lambda: {"kinds": list("xyxy")},
    "ptx": lambda: {"ptx": [("a", "b")], "config": {"ptx_coefficient": 0.1}},
    "value": lambda: with_value_model(1),
}
OTHERS = [
    ("both", "plain", lambda: {"columns": {"answer": ["a"] * 4}}, "columns is"),
    ("both", "plain", lambda: {"columns": {"right": ANSWERS}}, "columns is"),
    ("both", "plain", lambda: {"columns": None}, "columns is"),
    ("both", "plain", lambda: {"prompts": PROMPTS[::-1]}, "prompts is"),
    ("both", "plain", lambda: {"reward": late}, r"reward is '.*early' there and '.*late' here"),
    ("both", "plain", lambda: {"config": {"clip": 0.3}}, r"config\['clip'\] is 0.2 .* 0.3 here"),
    ("both", "plain", lambda: {"policy": small(layer_norm_epsilon=0.1)}, "layer_norm_epsilon"),
    ("both", "plain", lambda: {"policy": small(seed=1)}, "weights of the policy are not"),
    ("both", "plain", lambda: {"policy": small().bfloat16()}, "precision"),
    ("both", "plain", lambda: {"policy": small("llama")}, "class"),
    ("both", "plain", lambda: {"tokenizer": renamed()}, r"tokenizer\['rules'\]"),
    ("both", "adapter", lambda: {"policy": small(rank=2, alpha=99)}, "lora_alpha"),
    ("both", "adapter", lambda: {"policy": small(rank=3)}, r"\['r'\] is 2 there and 3 here"),
    ("both", "adapter", dict, "adapter"),
    ("grpo", "kinds", lambda: {"kinds": list("xxyy")}, "kinds is"),
    ("grpo", "kinds", dict, "kinds is"),
    ("ppo", "ptx", lambda: {"ptx": [("a", "c")]}, "ptx is"),
    ("ppo", "value", lambda: with_value_model(2), "value model"),
]
CASES = [
    (loop, *rest)
    for which, *rest in OTHERS
    for loop in ((ppo, grpo) if which == "both" else ((ppo,) if which == "ppo" else (grpo,)))
]


@pytest.mark.parametrize(("loop", "base", "change", "message"), CASES)
def test_a_run_does_not_go_on_as_another_run(tmp_path, loop, base, change, message):
    """Oracle: the specification: what differs is named, nothing else is, and neither the policy nor
    the folder is touched."""
    given = BASE[base]()
    next(run(loop, tmp_path, **given))
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    fresh = {name: value for name, value in BASE[base]().items() if name in ("config", "kinds")}
    other = fresh | {"policy": small()} | change()
    if base == "kinds" and "kinds" not in change():
        del other["kinds"]
    before = bits(other["policy"])
    with pytest.raises(ValueError, match=message) as caught:
        next(run(loop, tmp_path, **other))
    assert "delete" not in str(caught.value)
    assert "iterations" not in str(caught.value)
    assert same(other["policy"], before)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stored


def test_a_run_that_is_the_same_goes_on_however_its_data_are_held(tmp_path):
    """Oracle: the metrics of the run with lists."""
    kinds = [list, tuple, np.array, lambda x: pd.Series(x, index=range(7, 11)), torch.tensor]
    rates = [float, np.float64, np.float32]
    seen, found = [], []

    def reward(prompts, completions, answer):
        seen.append(list(map(str, answer)))
        return early(prompts, completions)

    for index, kind in enumerate(kinds):
        columns = {"answer": kind([1, 2, 3, 4])}
        texts = kind(PROMPTS) if kind is not torch.tensor else PROMPTS
        config = {"learning_rate": rates[index % 3](2**-10)}
        for loop in (ppo, grpo):
            folder = tmp_path / loop.__name__
            one = loop.Config(**SMALL, mini_batches=1, **config)
            whole = loop.train(small(), letters(), texts, reward, one, columns=columns)
            found.append([metrics.reward for metrics in whole])
            paused = loop.train(
                small(), letters(), texts, reward, one, columns=columns, folder=folder, save_every=1
            )
            # each goes on from where the one before it stopped
            last = [next(paused) for _ in range(min(index + 1, 3))][-1]
            assert last.reward == found[-1][last.iteration - 1]
    assert len({tuple(one) for one in found[::2]}) == len({tuple(one) for one in found[1::2]}) == 1
    assert {answer for one in seen for answer in one} == set("1234")


def test_what_cannot_tell_runs_apart_is_refused_before_anything_is_sampled(tmp_path):
    for loop in (ppo, grpo):
        columns = {"answer": [object()] * 4}
        with pytest.raises(ValueError, match="columns: a object cannot tell one run"):
            next(
                run(loop, tmp_path, reward=lambda **given: pytest.fail("sampled"), columns=columns)
            )
        assert next(run(loop, None, columns=columns)).iteration == 1
        for bad in ("abcd", dict.fromkeys(range(4)), iter("abcd")):
            with pytest.raises(ValueError, match=r"columns\['answer'\] is a .*; pass a list"):
                next(run(loop, None, columns={"answer": bad}))


def test_names_of_rewards_and_digests():
    """Oracle: the specification."""
    assert name_of(early).endswith("test_run_identity.early")
    assert name_of(functools.partial(early, bonus=2)).endswith("early(bonus=2)")
    assert "0x" not in name_of(functools.partial(early, model=object()))
    assert name_of(Judge()).endswith("test_run_identity.Judge")
    same_values = ([1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2]), pd.Series([1, 2]))
    assert len({digest(values) for values in same_values}) == 1
    assert digest([1, 2]) != digest([2, 1])
    assert digest(pd.Timestamp("2020-01-01")) == digest("2020-01-01T00:00:00")


class Judge:
    def __call__(self, prompts, completions):
        return early(prompts, completions)


def test_a_cache_of_log_probs_knows_the_settings_of_its_model(tmp_path):
    """Oracle: log-probabilities without a cache."""
    examples = [dpo.Example([1, 2], [3, 0], [4, 5, 0], 1.0)]
    path = tmp_path / "cache"
    wanted = dpo.cached_log_probs(path, small(), examples, 0)
    assert torch.equal(dpo.cached_log_probs(path, small(), examples, 0), wanted)
    with pytest.raises(ValueError, match="another model"):
        dpo.cached_log_probs(path, small(layer_norm_epsilon=0.1), examples, 0)
    # an adapter that has an effect makes another model of it
    path, policy = tmp_path / "adapter", small(rank=2)
    wanted = dpo.cached_log_probs(path, policy, examples, 0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    with pytest.raises(ValueError, match="another model"):
        dpo.cached_log_probs(path, policy, examples, 0)
    with policy.disable_adapter():
        assert torch.equal(dpo.cached_log_probs(path, policy, examples, 0), wanted)


# --- an interrupted cell is run again ------------------------------------------------------------


class Stop(KeyboardInterrupt):
    pass


def stopping(function, n):
    """The function, interrupted before its n-th call; at n = 0, never."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            raise Stop
        return function(*args, **kwargs)

    return wrapped


PLACES = ["reward", "ratio", "step", "begin", "save", "replace"]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("loop", [ppo, grpo])
@pytest.mark.parametrize("place", PLACES)
def test_a_cell_that_was_stopped_anywhere_is_run_again(tmp_path, monkeypatch, place, loop, rank):
    """Oracle: the weights of a run that nobody stopped. The cell goes on, or says to load the
    policy anew, and with that done it ends with those weights."""
    wanted = small(rank=rank)
    list(run(loop, None, wanted))
    targets = {
        "ratio": (loop, "check_ratio"),
        "step": (torch.optim.AdamW, "step"),
        "begin": (checkpoint, "begin"),
        "save": (checkpoint, "save"),
        "replace": (os, "replace"),
    }
    for n in (1, 2, 3):
        folder, policy = tmp_path / f"{n}", small(rank=rank)
        with monkeypatch.context() as patch:
            reward = stopping(early, n) if place == "reward" else early
            if place != "reward":
                owner, name = targets[place]
                patch.setattr(owner, name, stopping(getattr(owner, name), n))
            try:
                list(run(loop, folder, policy, reward=functools.wraps(early)(reward)))
            except Stop:
                pass
            else:
                assert place == "begin"
        if not same(policy, bits(small(rank=rank))):
            with pytest.raises(ValueError, match="load the policy anew") as caught:
                list(run(loop, folder, policy))
            assert str(folder) in str(caught.value)
            assert "delete" not in str(caught.value)
            policy = small(rank=rank)
        list(run(loop, folder, policy))
        assert same(policy, bits(wanted)), n


def test_a_policy_that_was_trained_before_may_start_a_run_in_a_folder_of_its_own(tmp_path):
    """A half-trained policy is not refused as such: another folder is another run."""
    policy = small()
    stopped = run(grpo, tmp_path / "one", policy, save_every=3)
    next(stopped)
    stopped.close()
    with pytest.raises(ValueError, match="before its first checkpoint"):
        next(run(grpo, tmp_path / "one", policy))
    assert len(list(run(grpo, tmp_path / "two", policy))) == 3
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["step-000002", "step-000003"]


# --- states of another layout --------------------------------------------------------------------


def without(key):
    return lambda state: state.pop(key)


def with_metric(state):
    state["metrics"].append("surprise")
    for row in state["history"]:
        row.append(0.0)


def first(tensors, change):
    name = next(iter(tensors))
    tensors[name] = change(tensors[name])


def moments(state):
    return next(iter(state["optimizer"]["state"].values()))


MALFORMED = {
    "a metric more": with_metric,
    "a metric less": lambda state: state["metrics"].pop(),
    "a row that is short": lambda state: state["history"][0].pop(),
    "no history": lambda state: state.update(history=None),
    "no weights": without("weights"),
    "no order": without("order"),
    "something unknown": lambda state: state.update(plan="b"),
    "a generator of another device": lambda state: state.update(order=torch.zeros(16).byte()),
    "a text for a generator": lambda state: state.update(sampling="x"),
    "weights of another shape": lambda s: first(leaf(s["weights"]), lambda w: w[..., :-1]),
    "weights of another type": lambda s: first(leaf(s["weights"]), lambda w: w.double()),
    "a weight renamed": lambda s: leaf(s["weights"]).update(x=leaf(s["weights"]).popitem()[1]),
    "no groups": lambda state: state["optimizer"].pop("param_groups"),
    "a group less": lambda state: state["optimizer"]["param_groups"].clear(),
    "a group of others": lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
    "no rate": lambda state: state["optimizer"]["param_groups"][0].pop("lr"),
    "no moments": lambda state: moments(state).pop("exp_avg"),
    "moments of another shape": lambda s: moments(s).update(exp_avg=torch.zeros(2)),
}


def leaf(weights):
    value = next(iter(weights.values()))
    return weights if isinstance(value, torch.Tensor) else leaf(value)


@pytest.mark.parametrize("loop", [ppo, grpo])
def test_a_state_of_another_layout_is_refused_in_words_and_nothing_is_overwritten(
    tmp_path, monkeypatch, loop
):
    """Oracle: the policy before, to the bit; a state as it should be goes on."""
    next(run(loop, tmp_path))
    found = checkpoint.load
    kept = {}
    monkeypatch.setattr(checkpoint, "load", lambda *a: kept.setdefault("good", found(*a)))
    next(run(loop, tmp_path))
    for name, spoil in MALFORMED.items():
        state = copy.deepcopy(kept["good"].state)
        spoil(state)
        monkeypatch.setattr(
            checkpoint, "load", lambda *_, state=state: checkpoint.Checkpoint(1, state)
        )
        policy = small()
        before = bits(policy)
        with pytest.raises(ValueError, match=r"step 1: .* another version of this package"):
            next(run(loop, tmp_path, policy))
        assert same(policy, before), name
    monkeypatch.setattr(checkpoint, "load", lambda *_: kept["good"])
    assert len(list(run(loop, tmp_path))) == 3
