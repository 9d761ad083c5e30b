"""What a loop is given and cannot use is refused by name before anything is trained."""

import copy
import re

import pytest
from architectures import build
from numbers_and_words import WORDS, letters

from rlhf_helpers.algorithms import dpo, grpo, ppo, reward_model, sampling, sft
from rlhf_helpers.algorithms.reward_model import Comparison

TOKENIZER = letters()
MODEL = build("gpt2", vocab_size=len(WORDS))
JUDGE, _ = reward_model.load(build("gpt2", vocab_size=len(WORDS)), TOKENIZER)
PAIRS = [("a b", "c d e"), ("f", "g")]
DATA = [Comparison("a b", ("c d e", "f")), Comparison("g", ("h", "i j"))]
PROMPTS = ["a b", "c"]


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


GIVEN = {"policy": MODEL, "tokenizer": TOKENIZER}
SAMPLED = {"prompts": PROMPTS, "reward": length}
LOOPS = {
    "sft": (sft.train, GIVEN | {"pairs": PAIRS, "config": sft.Config(), "held_out": PAIRS}),
    "dpo": (
        dpo.train,
        GIVEN
        | {"data": dpo.encode(TOKENIZER, DATA), "config": dpo.Config(), "held_out": ()}
        | {"cache": "cache"},
    ),
    "online dpo": (dpo.online, GIVEN | SAMPLED | {"config": dpo.Config()}),
    "reward model": (
        reward_model.train,
        {"model": JUDGE, "tokenizer": TOKENIZER, "data": DATA, "held_out": DATA}
        | {"config": reward_model.Config()},
    ),
    "ppo": (
        ppo.train,
        GIVEN
        | SAMPLED
        | {"config": ppo.Config(), "value_model": MODEL, "ptx": PAIRS, "columns": {"a": [1, 2]}},
    ),
    "grpo": (grpo.train, GIVEN | SAMPLED | {"config": grpo.Config(), "columns": {"a": [1, 2]}}),
    "evaluate": (
        sampling.evaluate,
        GIVEN
        | {"reference": MODEL, "prompts": PROMPTS, "judges": {"length": length}, "seed": 0}
        | {"config": ppo.Config()},
    ),
    "scores": (reward_model.scores, {"model": JUDGE, "tokenizer": TOKENIZER}),
    "surprise": (sft.surprise, GIVEN | {"pairs": PAIRS, "batch_size": 2}),
}
REST = {"scores": {"prompts": PROMPTS, "responses": ["d", "e"]}}
ODD = {"a number": 1.5, "an object": object(), "a truth": True}
CASES = [(loop, name, odd) for loop, (_, given) in LOOPS.items() for name in given for odd in ODD]


@pytest.mark.parametrize(("loop", "name", "odd"), CASES)
def test_what_is_no_such_thing_is_refused_by_name(loop, name, odd):
    """Oracle: the names of the arguments."""
    function, given = LOOPS[loop]
    given = copy.deepcopy(given) | REST.get(loop, {}) | {name: ODD[odd]}
    with pytest.raises((TypeError, ValueError), match=rf"\b{re.escape(name)}"):
        next(iter(function(**given)))


@pytest.mark.parametrize("loop", [name for name in LOOPS if "train" in LOOPS[name][0].__name__])
@pytest.mark.parametrize("folder", ["", 1, object()], ids=str)
def test_a_folder_is_a_text_or_a_path(loop, folder):
    """Oracle: the name of the argument."""
    function, given = LOOPS[loop]
    with pytest.raises((TypeError, ValueError), match="folder"):
        next(function(**copy.deepcopy(given), folder=folder))
