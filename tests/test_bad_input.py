"""Bad input to public functions outside the mathematics: whatever is given, the error names the
argument, and says what to pass. What has the right attributes is taken, whatever its type."""

import re
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from transformers import GPT2Config

from rlhf_helpers import (
    conversations,
    costs,
    preferences,
    rewards,
    scale_out,
    settings,
    worlds,
)
from rlhf_helpers.algorithms import action_values, contextual_bandit, reinforce
from rlhf_helpers.book import notebook, plots, watch
from rlhf_helpers.worlds import arithmetic, bandits, enumerable, imdb, mdp, reviews

matplotlib.use("Agg")

ODD = {
    "None": None,
    "a number": 1.5,
    "True": True,
    "an object": object(),
    "a dictionary": {},
    "complex": torch.ones(2, dtype=torch.complex64),
    "NumPy's": np.arange(3.0),
}


def luck():
    return torch.Generator().manual_seed(0)


def arms():
    return bandits.GaussianBandit(torch.arange(3.0))


def line():
    return bandits.fan(3)


def distribution():
    return torch.zeros(len(LANGUAGE.tokens), dtype=torch.float64).log_softmax(-1)


def weights(runs=2):
    return torch.zeros(runs, 3, 2, dtype=torch.float64).requires_grad_()


def batch(runs=2):
    return contextual_bandit.collect(weights(runs), line(), 4, luck())


SHAPE = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=16)
STEP = costs.Batch(2, 2, 3, 4)
LANGUAGE = enumerable.language(3, 2)
WALK = mdp.corridor(3)
UNIFORM = torch.full((3, 2), 0.5, dtype=torch.float64)
TEXTS = {"prompts": ["1+1=", "2+2="], "completions": ["2", "5"]}
PAIRS = [("p", "a", "b"), ("q", "c", "d")]
ANNOTATED = {
    "prompts": ["p", "q"],
    "first": ["a", "b"],
    "second": ["c", "d"],
    "utility": rewards.length,
    "annotators": [preferences.Annotator("one")],
}
AXES = SimpleNamespace(
    **dict.fromkeys(("plot", "fill_between", "axhline", "annotate"), lambda *at, **how: None)
)
RUNS = torch.arange(12.0).view(4, 3)


# What each function takes; what is callable without arguments is made anew for each call.
GOOD = {
    costs.parameters: {"config": SHAPE},
    costs.adapter_parameters: {"config": SHAPE, "rank": 2},
    costs.memory: {"config": SHAPE, "method": "dpo", "batch": STEP, "kl": True, "judge": False},
    costs.flops: {"config": SHAPE, "method": "grpo", "batch": STEP, "kl": True, "judge": False},
    costs.rollout_memory: {"config": SHAPE, "batch": STEP},
    worlds.load: {"name": "reviews"},
    bandits.GaussianBandit: {"means": torch.arange(3.0), "noise_std": 1.0},
    arms().pull: {"actions": torch.tensor([0, 1]), "generator": luck},
    arms().expected_reward: {"logits": torch.zeros(3)},
    arms().gradient: {"logits": torch.zeros(3)},
    arms().gradient_variance: {"logits": torch.zeros(3)},
    bandits.LinearBandit: {"weights": torch.randn(3, 2, generator=luck()), "noise_std": 1.0},
    line().mean_rewards: {"contexts": torch.zeros(4, 2, dtype=torch.float64)},
    bandits.ten_arms: {"runs": 2, "offset": 0.5, "seed": 0},
    bandits.fan: {"arms": 3},
    mdp.MDP: dict(WALK.__dict__),
    mdp.state_values: {"mdp": WALK, "policy": UNIFORM},
    mdp.advantages: {"mdp": WALK, "policy": UNIFORM},
    mdp.visitation: {"mdp": WALK, "policy": UNIFORM},
    mdp.objective: {"mdp": WALK, "policy": UNIFORM},
    mdp.surrogate: {"mdp": WALK, "policy": UNIFORM, "new_policy": UNIFORM},
    mdp.lower_bound: {"mdp": WALK, "policy": UNIFORM, "new_policy": UNIFORM},
    enumerable.index_of: {
        "tokens": LANGUAGE.tokens,
        "mask": LANGUAGE.mask,
        "language": LANGUAGE,
    },
    enumerable.small_gpt2: {"vocabulary": 3, "length": 2, "width": 8, "seed": 0},
    enumerable.next_log_probs: {
        "model": lambda: enumerable.small_gpt2(3, 2, width=8),
        "language": LANGUAGE,
    },
    enumerable.sequence_log_probs: {"logits": torch.zeros(3, 3), "language": LANGUAGE},
    enumerable.optimal_policy: {
        "ref_log_probs": distribution,
        "rewards": distribution,
        "beta": 0.7,
    },
    enumerable.kl: {"log_p": distribution, "log_q": distribution},
    enumerable.utilities: {"language": LANGUAGE, "seed": 0, "structure": 0.5},
    enumerable.draw_pairs: {"log_probs": distribution, "n": 2, "generator": luck},
    enumerable.label_pairs: {
        "utilities": distribution,
        "first": torch.tensor([0, 1]),
        "second": torch.tensor([1, 2]),
        "generator": luck,
    },
    enumerable.tokenizer: {"language": LANGUAGE},
    enumerable.reward: {"language": LANGUAGE, "utilities": distribution},
    arithmetic.split_of: {"operands": (3, 4)},
    arithmetic.problems: {"level": 1, "split": "train"},
    arithmetic.sample: {"n": 2, "level": 2, "split": "train", "seed": 0},
    arithmetic.solution: {"problem": arithmetic.sample(1, 2, "train")[0], "worked": True},
    arithmetic.demonstrations: {"n": 2, "seed": 0, "careless": True},
    arithmetic.extract_answer: {"completion": "3"},
    arithmetic.exact: TEXTS | {"answer": ["2", "4"]},
    arithmetic.well_formed: TEXTS,
    reviews.sample: {"n": 2, "seed": 0, "split": "train"},
    reviews.openings: {"n": 2, "seed": 0, "split": "train"},
    reviews.instructions: {"n": 2, "seed": 0, "split": "train"},
    reviews.parse: {"text": "a"},
    reviews.follows: {"instruction": reviews.instructions("train", 1)[0], "completion": "a"},
    reviews.surprise: {"instructions": reviews.instructions("train", 1)},
    reviews.quality: TEXTS,
    imdb.follows: {"instruction": reviews.instructions("train", 1)[0], "completion": "a"},
    contextual_bandit.collect: {
        "policy": weights,
        "bandit": line(),
        "batch_size": 4,
        "generator": luck,
    },
    contextual_bandit.gradient_norms: {"policy": weights, "batch": batch},
    contextual_bandit.trpo_update: {
        "policy": lambda: weights(1),
        "batch": lambda: batch(1),
        "target_kl": 0.1,
        "backtracks": 3,
        "damping": 1e-3,
    },
    reinforce.update: {
        "logits": lambda: torch.zeros(2, 3).requires_grad_(),
        "actions": torch.zeros(2, 4, dtype=torch.int64),
        "advantages": torch.ones(2, 4),
        "learning_rate": 0.1,
    },
    reinforce.train: {
        "logits": lambda: torch.zeros(2, 3),
        "bandit": arms(),
        "config": reinforce.Config(steps=1),
    },
    action_values.epsilon_greedy: {"bandit": bandits.ten_arms(2), "pulls": 2, "seed": 0},
    action_values.ucb: {"bandit": bandits.ten_arms(2), "pulls": 2, "seed": 0},
    plots.interval: {"runs": RUNS, "level": 0.9},
    plots.band: {"ax": AXES, "x": [1, 2, 3], "runs": RUNS, "colour": "red", "faint": 1},
    plots.optimum: {"ax": AXES, "value": 1.0},
    plots.label_line: {"ax": AXES, "x": 1.0, "y": 1.0, "text": "a", "colour": "red"},
    watch.watch: {"history": lambda: iter(()), "iterations": 1},
    notebook.recorded: {"chapter": "grpo", "scale": "tiny"},
    notebook.recorded_sweep: {"chapter": "grpo", "run": settings.load()},
    notebook.table: {"rows": [(1, 2)], "columns": ("a", "b"), "title": "a"},
    notebook.literal: {"text": "a"},
    notebook.brief: {"text": "a", "length": 9},
    notebook.code: {"text": "a"},
    rewards.word_count: TEXTS,
    rewards.negation_aware: TEXTS,
    rewards.relevance: TEXTS,
    conversations.chat: {"texts": ["a"]},
    preferences.from_rows: {"rows": [{"prompt": "p", "chosen": "a", "rejected": "b"}]},
    preferences.crowd: {"temperature": 1.0, "count": 2},
    preferences.choice_probabilities: ANNOTATED,
    preferences.annotate: ANNOTATED | {"seed": 0},
    preferences.ceiling: {"probabilities": torch.tensor([[0.5, 0.2, 0.3]])},
    scale_out.hard_pairs: {"data": [scale_out.reward_model.Comparison("p", ("a", "b"))]},
}
# Numbers and switches, of which some odd values are none.
NUMBERS = {
    *("noise_std", "offset", "beta", "learning_rate", "target_kl", "damping", "value", "x", "y"),
    *("temperature", "width"),
}
SWITCHES = {"kl", "judge", "worked", "careless"}
FREE = {"text": {plots.label_line}, "prompts": {rewards.word_count, rewards.negation_aware}}
FREE["prompts"] |= {arithmetic.exact, arithmetic.well_formed}
FREE["colour"] = {plots.band, plots.label_line}  # None is one of Matplotlib's
UNNAMED = {"utility"}


def made(function):
    """Its arguments, those that it changes anew."""
    return {
        name: value() if callable(value) and name not in UNNAMED else value
        for name, value in GOOD[function].items()
    }


def is_taken(function, name, odd):
    if function in FREE.get(name, ()) or name in UNNAMED:
        return True
    if odd == "None":
        return name == "generator"
    if odd == "a number":
        return name in NUMBERS
    if odd == "True":
        return name in SWITCHES
    if odd in ("complex", "a dictionary", "NumPy's") and name in {"history", "prompts"}:
        return True  # something can be taken from it
    if odd == "complex":
        return name in {"columns", "rows"}
    if odd == "a dictionary":
        return name in {"histories", "instructions", "rows"}
    return odd == "NumPy's" and name in {"x"} and function is plots.band


CASES = [
    pytest.param(f, name, odd, id=f"{f.__qualname__}-{name}-{odd}")
    for f, arguments in GOOD.items()
    for name in arguments
    for odd in ODD
    if not is_taken(f, name, odd)
]


def result_of(function, arguments):
    found = function(**arguments)
    return list(found) if hasattr(found, "__next__") else found


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__qualname__)
def test_the_arguments_of_the_table_are_taken(function):
    """Oracle: no exception, so that a refusal in the other test is due to the one change."""
    result_of(function, made(function))


@pytest.mark.parametrize(("function", "name", "odd"), CASES)
def test_what_is_of_another_type_is_refused_by_name(function, name, odd):
    """Oracle: the specification: ValueError or TypeError that names the argument."""
    with pytest.raises((ValueError, TypeError), match=rf"\b{re.escape(name)}\b"):
        result_of(function, made(function) | {name: ODD[odd]})
