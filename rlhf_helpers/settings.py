"""The one switch: RLHF_SCALE=tiny runs offline on a CPU, RLHF_SCALE=gpt2 is meant for one GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

SCALES = ("tiny", "gpt2")
# The small GPT-2 that the package carries, with its tokenizer.
TINY = str(Path(__file__).parent / "assets" / "tiny-gpt2")
# The reward model that is trained on it.
TINY_REWARD = str(Path(__file__).parent / "assets" / "tiny-reward")
# The model that adds, carelessly.
TINY_ARITHMETIC = str(Path(__file__).parent / "assets" / "tiny-arithmetic")


@dataclass(frozen=True)
class Settings:
    """What the notebooks of one scale share. What one method needs by scale stands beside its
    `Config`, as `AT_SCALE`.

    Args:
        scale: "tiny" or "gpt2".
        device: where models live: "cpu", or "cuda" at scale gpt2 where there is a GPU.
        model: what `models.load` takes: the folder of the shipped model, or GPT-2's name on the
            hub.
        world: where prompts come from, a module of `rlhf_helpers.worlds`: "reviews" or "imdb".
        max_new_tokens: the longest completion.
        classifier: name on the hub of the sentiment classifier that simulated annotators think
            like; "" where the world itself tells how good a response is.
        annotator_temperature: of the simulated annotators, in units of their utility.
        reward_model: folder of the one that ships with the package; "" where it has to be trained.
        arithmetic_model: folder of the model that adds; "" where `model` has to be fine-tuned on
            demonstrations first.
    """

    scale: str
    device: str
    model: str
    world: str
    max_new_tokens: int
    classifier: str
    annotator_temperature: float
    reward_model: str
    arithmetic_model: str


def _tiny() -> Settings:
    return Settings(
        scale="tiny",
        device="cpu",
        model=TINY,
        world="reviews",
        max_new_tokens=48,
        classifier="",
        annotator_temperature=0.75,
        reward_model=TINY_REWARD,
        arithmetic_model=TINY_ARITHMETIC,
    )


def _gpt2() -> Settings:
    import torch

    return Settings(
        scale="gpt2",
        device="cuda" if torch.cuda.is_available() else "cpu",
        model="gpt2",
        world="imdb",
        max_new_tokens=64,
        classifier="lvwerra/distilbert-imdb",
        annotator_temperature=2.0,
        reward_model="",
        arithmetic_model="",
    )


def load() -> Settings:
    """Settings of the scale named by the environment variable RLHF_SCALE (default "tiny").

    Raises: ValueError on an unknown scale.
    """
    scale = os.environ.get("RLHF_SCALE", "tiny")
    if scale not in SCALES:
        raise ValueError(
            f"RLHF_SCALE={scale!r} is unknown; use one of {', '.join(map(repr, SCALES))}"
        )
    return _tiny() if scale == "tiny" else _gpt2()
