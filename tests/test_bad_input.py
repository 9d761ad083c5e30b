"""Bad input to public functions outside the mathematics: whatever is given, the error names the
argument, and says what to pass. What has the right attributes is taken, whatever its type."""

import random
import re
import tempfile
from pathlib import Path
from types import FunctionType, SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from architectures import build
from numbers_and_words import WORDS, letters
from transformers import GPT2Config

from rlhf_helpers import (
    checkpoint,
    conversations,
    costs,
    logprobs,
    models,
    preferences,
    rewards,
    rollout,
    scale_out,
    settings,
    trust_region,
    worlds,
)
from rlhf_helpers.algorithms import (
    action_values,
    contextual_bandit,
    dpo,
    grpo,
    ppo,
    reinforce,
    reward_model,
    sampling,
    sft,
)
from rlhf_helpers.book import notebook, plots, shipped, source, watch
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


def adam():
    return torch.optim.Adam([weights()])


def folder():
    return Path(tempfile.mkdtemp())


def score(reward, prompts, completions):
    return rewards.score(reward, prompts, completions)


def show(objects):
    return source.show_source(objects)


def sampled():
    tokens, mask = models.encode_prompts(TOKENIZER, ["a b", "c"])
    return rollout.sample(MODEL, tokens, mask, 3, eos_token_id=0, pad_token_id=0, generator=luck())


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
DRAWS = ("plot", "fill_between", "axhline", "annotate", "set_title", "set_xlabel", "set_ylabel")
AXES = SimpleNamespace(**dict.fromkeys(DRAWS, lambda *at, **how: None))
TOKENIZER = letters()
MODEL = build("gpt2", vocab_size=len(WORDS))
JUDGE, _ = reward_model.load(build("gpt2", vocab_size=len(WORDS)), TOKENIZER)
COMPARED = [
    reward_model.Comparison("a b", ("c d e", "f")),
    reward_model.Comparison("g", ("h", "i")),
]
EXAMPLES, ANSWERED = dpo.encode(TOKENIZER, COMPARED), sft.encode(TOKENIZER, [("a b", "c")])
PROMPT_TOKENS, PROMPT_MASK = models.encode_prompts(TOKENIZER, ["a b", "c"])
GAPS = {"gaps": torch.tensor([0.5, -0.2, 0.1]), "preference": torch.tensor([1.0, 1.0, 0.0])}
OF_TWO = {"policy": MODEL, "tokenizer": TOKENIZER, "pairs": [("a b", "c")]}
BEATS = torch.tensor([[0.0, 3.0, 2.0], [1.0, 0.0, 2.0], [2.0, 1.0, 0.0]])
PROBLEMS = arithmetic.sample(2, 1, "train")
COMMAND = scale_out.parse(["--output", "x"])
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
    reviews.kept_back: {"request": reviews.instructions("train", 1)[0]},
    reviews.surprise: {"instructions": reviews.instructions("train", 1)},
    reviews.quality: TEXTS,
    reviews.stars_of: {"valences": (1, -1)},
    reviews.Choices: {"pairs": [("a", 0.5), ("b", 0.5)]},
    reviews.Choices([("a", 1.0)]).draw: {"rng": lambda: random.Random(0)},
    reviews.Choices([("a", 1.0)]).log_prob: {"value": "a"},
    reviews.parse_response: {"text": "a", "topic": "plot"},
    imdb.parse: {"text": "a"},
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
    contextual_bandit.reinforce_update: {"policy": weights, "optimizer": adam, "batch": batch},
    contextual_bandit.ppo_penalty_update: {
        "policy": weights,
        "optimizer": adam,
        "batch": batch,
        "coefficients": torch.ones(2, dtype=torch.float64),
    },
    contextual_bandit.trpo_updates: {"policy": weights, "batch": batch, "target_kl": 0.1},
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
    plots.finish: {"ax": AXES, "title": "a", "xlabel": "b", "ylabel": "c"},
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
    rewards.formatted: TEXTS,
    score: TEXTS | {"reward": rewards.length},
    show: {"objects": rewards.length},
    conversations.chat: {"texts": ["a"]},
    preferences.from_rows: {"rows": [{"prompt": "p", "chosen": "a", "rejected": "b"}]},
    preferences.crowd: {"temperature": 1.0, "count": 2},
    preferences.choice_probabilities: ANNOTATED,
    preferences.annotate: ANNOTATED | {"seed": 0},
    preferences.ceiling: {"probabilities": torch.tensor([[0.5, 0.2, 0.3]])},
    scale_out.hard_pairs: {"data": COMPARED},
    scale_out.config_of: {"args": COMMAND},
    scale_out.problems_of: {"args": COMMAND},
    scale_out.evaluation: {"args": COMMAND},
    conversations.plain_text: {"prompt": "a"},
    preferences.fleiss_kappa: {"table": [[2, 1], [0, 3], [1, 2]], "seed": 0},
    preferences.krippendorff_alpha: {"ratings": [[1, 2, 1], [1, None, 2]], "seed": 0},
    preferences.fit_strengths: {"wins": BEATS},
    preferences.stochastic_transitivity_violations: {"p": torch.full((3, 3), 0.5)},
    trust_region.conjugate_gradient: {"matvec": lambda: lambda v: 2 * v, "b": torch.ones(2)},
    checkpoint.save: {"folder": folder, "step": 1, "state": {"a": 1}, "identity": {"b": 1}},
    checkpoint.load: {"folder": folder, "identity": {"b": 1}},
    checkpoint.begin: {"folder": folder, "start": "a"},
    checkpoint.started: {"folder": folder},
    shipped.preference_pairs: {"run": settings.load(), "seed": 0, "count": 2},
    shipped.reward_model: {"run": settings.load()},
    shipped.adder: {"run": settings.load()},
    models.load: {"source": settings.TINY, "dtype": torch.float32},
    models.load_config: {"source": settings.TINY},
    models.load_tokenizer: {"source": settings.TINY},
    models.prompt_ids: {"tokenizer": TOKENIZER, "prompts": ["a", "b c"]},
    models.decode: {"tokenizer": TOKENIZER, "tokens": PROMPT_TOKENS, "mask": PROMPT_MASK},
    models.lora_policy: {"model": lambda: build("gpt2"), "rank": 2, "alpha": 4},
    logprobs.completion_log_probs: {
        "model": MODEL,
        "tokens": torch.tensor([[1, 2, 3], [4, 5, 6]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
        "completion_length": 1,
    },
    dpo.cached_log_probs: {
        "path": lambda: folder() / "a",
        "model": MODEL,
        "examples": EXAMPLES,
        "pad_token_id": 0,
    },
    models.ValueModel: {"model": MODEL, "share_trunk": False},
    rollout.sample: {
        "model": MODEL,
        "prompt_tokens": PROMPT_TOKENS,
        "prompt_mask": PROMPT_MASK,
        "max_new_tokens": 2,
        "eos_token_id": [0, 1],
        "pad_token_id": 0,
        "temperature": 1.0,
        "generator": luck,
    },
    rollout.ended: {"rollout": sampled, "ends": [0]},
    rollout.texts_of: {
        "rollout": sampled,
        "tokenizer": TOKENIZER,
        "whole": torch.tensor([True, False]),
    },
    sampling.solve: {
        "policy": models.load(settings.TINY_ARITHMETIC)[0],
        "tokenizer": models.load_tokenizer(settings.TINY_ARITHMETIC),
        "problems": PROBLEMS,
        "samples": 1,
        "max_new_tokens": 2,
        "greedy": True,
    },
    sft.encode: {"tokenizer": TOKENIZER, "pairs": [("a b", "c")]},
    sft.collate: {"examples": ANSWERED, "pad_token_id": 0},
    sft.check: {"pairs": [("a b", "c")], "config": sft.Config()},
    sft.surprise: OF_TWO | {"batch_size": 2},
    dpo.encode: {"tokenizer": TOKENIZER, "data": COMPARED},
    dpo.collate: {"examples": EXAMPLES, "reference": torch.zeros(2, 2), "pad_token_id": 0},
    dpo.gradient_weight: {
        "chosen_rewards": torch.zeros(2),
        "rejected_rewards": torch.zeros(2),
        "beta": 0.1,
    },
    dpo.accept: {"scores": torch.zeros(2, 3), "beta": 0.1, "generator": luck},
    dpo.reference_log_probs: {
        "model": MODEL,
        "examples": EXAMPLES,
        "pad_token_id": 0,
        "batch_size": 2,
    },
    reward_model.comparisons: {"pairs": [{"prompt": "p", "chosen": "a", "rejected": "b"}]},
    reward_model.labelled: {
        "prompts": ["a", "b"],
        "first": ["c", "d"],
        "second": ["e", "f"],
        "preference": torch.tensor([1.0, 0.0]),
    },
    reward_model.check_comparisons: {"data": COMPARED},
    reward_model.collate: {"texts": [[1, 2], [3]], "pad_token_id": 0},
    reward_model.encode: {"tokenizer": TOKENIZER, "prompts": ["a", "b"], "responses": ["c", "d"]},
    reward_model.evaluate: {"model": JUDGE, "tokenizer": TOKENIZER, "data": COMPARED},
    reward_model.as_reward: {"model": JUDGE, "tokenizer": TOKENIZER},
    reward_model.accuracy: GAPS,
    reward_model.reliability: GAPS,
    reward_model.fit_temperature: GAPS,
    grpo.start: {"policy": MODEL, "tokenizer": TOKENIZER, "config": grpo.Config()},
    ppo.start: {"policy": MODEL, "tokenizer": TOKENIZER, "config": ppo.Config()},
    ppo.diagnose: {"history": []},
}
# Numbers and switches, of which some odd values are none.
NUMBERS = {
    *("noise_std", "offset", "beta", "learning_rate", "target_kl", "damping", "value", "x", "y"),
    *("temperature", "width", "alpha"),
}
SWITCHES = {"kl", "judge", "worked", "careless", "share_trunk", "greedy"}
MAY_BE_NONE = {"generator", "topic", "dtype", "eos_token_id"}
FREE = {"text": {plots.label_line}, "prompts": {rewards.word_count, rewards.negation_aware}}
FREE["state"] = {checkpoint.save}
FREE["prompts"] |= {arithmetic.exact, arithmetic.well_formed, rewards.formatted}
FREE["colour"] = {plots.band, plots.label_line}  # None is one of Matplotlib's
AS_IT_IS = {"utility", "reward", "objects"}


def made(function):
    """Its arguments, those that it changes anew."""
    return {
        name: value() if isinstance(value, FunctionType) and name not in AS_IT_IS else value
        for name, value in GOOD[function].items()
    }


def is_taken(function, name, odd):
    if function in FREE.get(name, ()):
        return True
    if odd == "None":
        return name in MAY_BE_NONE
    if odd == "a number":
        return name in NUMBERS
    if odd == "True":
        return name in SWITCHES
    if odd in ("complex", "a dictionary", "NumPy's") and name in {"history", "prompts"}:
        return True  # something can be taken from it
    if odd == "complex":
        return name in {"columns", "rows"}
    if odd == "a dictionary":
        return name in {"histories", "instructions", "rows", "identity"}
    return odd == "NumPy's" and name in {"x", "valences"}


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


W = torch.ones(2, dtype=torch.float64, requires_grad=True)
# What was taken once, and gave a wrong result or none.
SILENT = {
    "a valence that no review has": (reviews.stars_of, "valences", (5, 5)),
    "weights that are no shares": (reviews.Choices, "pairs", [("a", 2.0), ("b", -1.0)]),
    "a token that is no whole number": (rollout.sample, "eos_token_id", 1.5),
    "a pad token that is none": (rollout.sample, "pad_token_id", True),
    "masks of other numbers": (models.decode, "mask", 2 * PROMPT_MASK),
    "one tensor in place of a list": (trust_region.hessian_vector_product, "parameters", W),
    "an identity that nothing can be told by": (checkpoint.save, "identity", 5),
    "a folder without a name": (checkpoint.save, "folder", ""),
    "a file in place of a folder": (checkpoint.load, "folder", __file__),
    "a system message that is no text": (conversations.chat, "system", 5),
    "a table of digits as texts": (preferences.fleiss_kappa, "table", [["2", "1"], ["1", "2"]]),
    "rows of unequal length": (preferences.fit_strengths, "wins", [[0, 1], [1]]),
    "no seed": (preferences.krippendorff_alpha, "seed", None),
    "a gap that is NaN": (reward_model.accuracy, "gaps", torch.full((3,), torch.nan)),
    "a share above 1": (reward_model.accuracy, "preference", torch.full((3,), 2.0)),
    "a number for each arm": (bandits.GaussianBandit.gradient_variance, "baseline", RUNS[0]),
    "a reference of another size": (dpo.collate, "reference", torch.zeros(3, 2)),
    "an arm that is not there": (reinforce.update, "actions", torch.full((2, 4), 3)),
    "a policy that is NaN": (contextual_bandit.collect, "policy", weights() * torch.nan),
    "the same, of logits": (reinforce.train, "logits", torch.full((2, 3), torch.nan)),
    "a share below 0": (reward_model.labelled, "preference", torch.tensor([-1.0, 0.0])),
    "one text in place of a list": (models.prompt_ids, "prompts", "a b"),
    "a vector of another precision": (
        trust_region.hessian_vector_product,
        "vector",
        torch.ones(2),
    ),
    "a layer that is no text": (models.lora_policy, "target_modules", [1]),
    "a token below 0": (models.decode, "tokens", -1 - PROMPT_TOKENS),
    "a price below 0": (
        contextual_bandit.ppo_penalty_update,
        "coefficients",
        torch.tensor([1.0, -1.0], dtype=torch.float64),
    ),
    "contexts of another size": (contextual_bandit.measure, "held_out", torch.zeros(5, 3)),
}
GOOD_OF_SILENT = {
    trust_region.hessian_vector_product: {
        "scalar_fn": lambda: W.pow(3).sum(),
        "parameters": [W],
        "vector": W,
    },
    conversations.chat: {"texts": ["a"]},
    bandits.GaussianBandit.gradient_variance: {"self": arms(), "logits": torch.zeros(3)},
    contextual_bandit.measure: {
        "policy": weights(),
        "bandit": line(),
        "batch": batch(),
        "config": contextual_bandit.Config(),
        "initial_logits": torch.zeros(2, 5, 3, dtype=torch.float64),
    },
}


@pytest.mark.parametrize(("function", "name", "value"), SILENT.values(), ids=SILENT)
def test_what_would_give_a_wrong_result_is_refused_by_name(function, name, value):
    """Oracle: the specification: ValueError or TypeError that names the argument."""
    given = GOOD_OF_SILENT[function] if function in GOOD_OF_SILENT else made(function)
    with pytest.raises((ValueError, TypeError), match=rf"\b{re.escape(name)}\b"):
        result_of(function, given | {name: value})


def text_array(*texts):
    return np.array(texts, dtype=object)


UNUSUAL = {
    "NumPy's numbers": (rollout.sample, {"temperature": np.float32(1.0), "top_k": np.int64(2)}),
    "a tensor of end tokens": (rollout.sample, {"eos_token_id": torch.tensor([0, 1])}),
    "one end token of NumPy": (rollout.ended, {"ends": np.int64(0)}),
    "no end token": (rollout.ended, {"ends": ()}),
    "a mask of 1 and 0": (rollout.texts_of, {"whole": torch.tensor([1, 0])}),
    "half precision": (preferences.fit_strengths, {"wins": BEATS.bfloat16()}),
    "with a gradient": (preferences.fit_strengths, {"wins": BEATS.clone().requires_grad_()}),
    "whole numbers in lists": (preferences.fit_strengths, {"wins": [[0, 3], [1, 0]]}),
    "an array turned round": (preferences.fit_strengths, {"wins": BEATS.numpy()[::-1, ::-1]}),
    "objects of NumPy": (preferences.fit_strengths, {"wins": BEATS.numpy().astype(object)}),
    "a range for x": (plots.band, {"x": range(3)}),
    "labels that are whole numbers": (
        reward_model.accuracy,
        {"preference": torch.tensor([1, 0, 1])},
    ),
    "a list of shares": (reward_model.labelled, {"preference": [1, 0.5]}),
    "arrays of texts": (
        reward_model.encode,
        {"prompts": text_array("a", "b"), "responses": text_array("c", "d")},
    ),
    "a tuple of pairs": (sft.check, {"pairs": (("a", "b", "c"),)}),
    "a tuple of comparisons": (reward_model.check_comparisons, {"data": tuple(COMPARED)}),
    "no comparisons, to look at": (reward_model.check_comparisons, {"data": ()}),
    "a tensor of valences": (reviews.stars_of, {"valences": torch.tensor([1, -1])}),
    "an iterator of valences": (reviews.stars_of, {"valences": iter((1, -1))}),
    "a text for a folder": (checkpoint.started, {"folder": "checkpoints-not-there"}),
}


@pytest.mark.parametrize(("function", "some"), UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_and_right_is_taken(function, some):
    """Oracle: no exception."""
    result_of(function, made(function) | some)
