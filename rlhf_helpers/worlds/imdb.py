"""The IMDB film reviews, with the same functions as the world of made-up reviews.

The data set is read from the hub through `datasets`, which keeps it in its cache. Nobody knows
what the best response to a request is here, so responses are what reviewers wrote.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from functools import cache

from rlhf_helpers._validate import check_seed, check_text, has, in_range, one_of
from rlhf_helpers.worlds.reviews import SPLITS, Instruction

TOPICS = (
    "plot",
    "acting",
    "music",
    "ending",
    "dialogue",
    "script",
    "cast",
    "story",
    "pace",
    "humour",
)
_OPENING_WORDS = 8
_RESPONSE_WORDS = 40
# The seed that separates validation from train: the same reviews in every run.
_SPLIT_SEED = 0


@cache
def _reviews(split: str) -> tuple[tuple[str, int], ...]:
    """All reviews of a split, (text, label); a tenth of the hub's train split is validation."""
    one_of(split, SPLITS, "split")
    from datasets import load_dataset

    on_hub = "test" if split == "held_out" else "train"
    try:
        rows = load_dataset("stanfordnlp/imdb", split=on_hub)
    except OSError as error:
        raise OSError(
            "No data set 'stanfordnlp/imdb': the cache has none, and the hub gave none.\n"
            "Connect to the hub once, or set RLHF_SCALE=tiny."
        ) from error
    pairs = [(_clean(text), label) for text, label in zip(rows["text"], rows["label"], strict=True)]
    if split == "held_out":
        return tuple(pairs)
    random.Random(_SPLIT_SEED).shuffle(pairs)
    cut = len(pairs) // 10
    return tuple(pairs[:cut] if split == "validation" else pairs[cut:])


def _clean(text: str) -> str:
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def _draw(found: list, n: int, seed: int) -> list:
    in_range(n, "n", 1, len(found))
    check_seed(seed)
    return random.Random(seed).sample(found, n)


def texts(split: str, n: int, seed: int = 0) -> list[str]:
    """The texts of n reviews, without HTML line breaks.

    Args:
        split: "train", "validation" (a tenth of the hub's train split) or "held_out" (its test
            split).
        n: how many, at most what the split holds.
        seed: which ones, and in what order.
    Returns: n texts; no review is drawn twice.
    Raises: ValueError on an unknown split or an n out of range; OSError if the data set is not
        there.
    Source: Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis".
    """
    return _draw([text for text, _ in _reviews(split)], n, seed)


def openings(split: str, n: int, seed: int = 0) -> list[str]:
    """The first eight words of n reviews, all different, to be used as prompts.

    Args, Raises: as in `texts`.
    """
    first = (text.split()[:_OPENING_WORDS] for text, _ in _reviews(split))
    distinct = dict.fromkeys(" ".join(words) for words in first if len(words) == _OPENING_WORDS)
    return _draw(list(distinct), n, seed)


def instructions(split: str, n: int, seed: int = 0) -> list[Instruction]:
    """n requests such as 'Write a 5-star review about the music.' with what a reviewer wrote.

    A positive review counts as 5 stars, a negative one as 1. The topic is the first of `TOPICS`
    that the opening sentences mention; reviews that mention none are left out.

    Args, Raises: as in `texts`.
    """
    found = []
    for text, label in _reviews(split):
        response = _response(text)
        topics = _topics(response)
        if topics:
            stars = 5 if label == 1 else 1
            prompt = f"Write a {stars}-star review about the {topics[0]}.\n"
            found.append(Instruction(prompt, response, topics[0], stars))
    return _draw(found, n, seed)


def _response(text: str) -> str:
    """The first two sentences, or the first if two are longer than forty words, cut there."""
    sentences = re.split(r"(?<=[.!?])\s+", text, maxsplit=2)
    both = " ".join(sentences[:2])
    chosen = both if len(both.split()) <= _RESPONSE_WORDS else sentences[0]
    return " ".join(chosen.split()[:_RESPONSE_WORDS])


def _topics(text: str) -> list[str]:
    words = re.findall(r"[a-z]+", text.lower().replace("humor", "humour"))
    return [word for word in words if word in TOPICS]


def follows(instruction: Instruction, completion: str) -> bool:
    """Whether a completion mentions the topic that was asked for, as a word."""
    has(instruction, "instruction", "an Instruction", "topic")
    check_text(completion, "completion")
    return instruction.topic in _topics(completion)


def surprise(instructions: Iterable[Instruction]) -> list[float]:
    """NaN for each: nobody knows how probable a response was."""
    has(instructions, "instructions", "a list of Instructions", "__iter__")
    instructions = list(instructions)
    for index, one in enumerate(instructions):
        has(one, f"instructions[{index}]", "an Instruction", "response", "topic")
    return [math.nan] * len(instructions)


def parse(text: str) -> None:
    """None: no grammar has written these reviews."""
    check_text(text, "text")
    return None
