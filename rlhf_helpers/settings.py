"""The one switch: RLHF_SCALE=tiny runs offline on a CPU, RLHF_SCALE=gpt2 is meant for one GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

SCALES = ("tiny", "gpt2")
# The small GPT-2 that the package carries, with its tokenizer.
TINY = str(Path(__file__).parent / "assets" / "tiny-gpt2")
# The reward model that chapter 06 trains on it.
TINY_REWARD = str(Path(__file__).parent / "assets" / "tiny-reward")

# The model that adds, carelessly, of chapter 09.
TINY_ARITHMETIC = str(Path(__file__).parent / "assets" / "tiny-arithmetic")


@dataclass(frozen=True)
class Settings:
    """What the notebooks of one scale share.

    Args:
        scale: "tiny" or "gpt2".
        device: where models live: "cpu", or "cuda" at scale gpt2 where there is a GPU.
        model: what `models.load` takes: the folder of the shipped model, or GPT-2's name on the hub.
        world: where prompts come from, a module of `rlhf_helpers.worlds`: "reviews" or "imdb".
        max_new_tokens: the longest completion.
        sft_examples: pairs that chapter 05 fine-tunes on.
        sft_learning_rate, lora_learning_rate: for all weights, and for an adapter.
        classifier: name on the hub of the sentiment classifier that simulated annotators think
            like; "" where the world itself tells how good a response is.
        preference_pairs: pairs that chapter 06 trains its reward model on.
        annotator_temperature: of the simulated annotators, in units of their utility.
        reward_learning_rate: for the reward model.
        ppo_iterations, ppo_learning_rate, ppo_value_learning_rate: of chapter 07.
        ppo_micro_batch: prompts that go through the model at once in an update, so that GPT-2 fits
            into the memory of a small GPU; None takes a mini-batch whole.
        dpo_learning_rate, dpo_beta: of chapter 08.
        arithmetic_model: folder of the model that adds, for chapter 09; "" where `model` has to be
            fine-tuned on demonstrations first.
        demonstrations: how many of them.
        grpo_iterations, grpo_learning_rate: of chapter 09.
        reward_model: folder of the one that chapter 06 trains; "" where it has to be trained.
    """

    scale: str
    device: str
    model: str
    world: str
    max_new_tokens: int
    sft_examples: int
    sft_learning_rate: float
    lora_learning_rate: float
    classifier: str
    preference_pairs: int
    annotator_temperature: float
    reward_learning_rate: float
    reward_model: str
    ppo_iterations: int
    ppo_learning_rate: float
    ppo_value_learning_rate: float
    ppo_micro_batch: int | None
    dpo_learning_rate: float
    dpo_beta: float
    arithmetic_model: str
    demonstrations: int
    grpo_iterations: int
    grpo_learning_rate: float


def _tiny() -> Settings:
    return Settings(
        scale="tiny",
        device="cpu",
        model=TINY,
        world="reviews",
        max_new_tokens=48,
        sft_examples=3200,
        sft_learning_rate=1e-3,
        lora_learning_rate=1e-2,
        classifier="",
        preference_pairs=2000,
        annotator_temperature=0.75,
        reward_learning_rate=6e-4,
        reward_model=TINY_REWARD,
        ppo_iterations=15,
        ppo_learning_rate=5e-4,
        ppo_value_learning_rate=1e-3,
        ppo_micro_batch=None,
        dpo_learning_rate=5e-4,
        dpo_beta=0.1,
        arithmetic_model=TINY_ARITHMETIC,
        demonstrations=0,
        grpo_iterations=300,
        grpo_learning_rate=7e-4,
    )


def _gpt2() -> Settings:
    import torch

    return Settings(
        scale="gpt2",
        device="cuda" if torch.cuda.is_available() else "cpu",
        model="gpt2",
        world="imdb",
        max_new_tokens=64,
        sft_examples=1600,
        sft_learning_rate=5e-5,
        lora_learning_rate=1e-3,
        classifier="lvwerra/distilbert-imdb",
        preference_pairs=2000,
        annotator_temperature=2.0,
        reward_learning_rate=2e-5,
        reward_model="",
        ppo_iterations=60,
        ppo_learning_rate=1e-5,
        ppo_value_learning_rate=1e-5,
        ppo_micro_batch=2,
        dpo_learning_rate=1e-5,
        dpo_beta=0.1,
        arithmetic_model="",
        demonstrations=6400,
        grpo_iterations=100,
        grpo_learning_rate=1e-5,
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
