"""What one chapter makes and a later one uses: the pairs, the reward model, the model that adds. At
scale tiny the models are read from the package; at others they are made anew, which takes
minutes."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers import models, preferences, rewards, worlds
from rlhf_helpers._validate import check_seed, has, in_range
from rlhf_helpers.algorithms import reward_model as rm
from rlhf_helpers.algorithms import sft
from rlhf_helpers.settings import Settings
from rlhf_helpers.worlds import arithmetic

DEMONSTRATIONS = 6400  # of a careless writer, that a model learns to add from


def preference_pairs(run: Settings, seed: int = 0, count: int = rm.PAIRS) -> list[rm.Comparison]:
    """Two responses of the language model to each opening, and how many of five simulated
    annotators prefer the first: what the reward model and DPO are trained on.

    Args:
        run: model, world and annotators' temperature.
        seed: of the openings, the responses and the answers.
        count: how many pairs.
    """
    _check(run)
    check_seed(seed)
    in_range(count, "count", 1)
    policy, tokenizer = models.load(run.model, device=run.device)
    prompts = worlds.load(run.world).openings("train", count, seed)
    luck = torch.Generator(run.device).manual_seed(seed)
    pairs = preferences.sample_pairs(policy, tokenizer, prompts, run.max_new_tokens, luck)
    people = preferences.crowd(run.annotator_temperature)
    said = preferences.annotate(*pairs, rewards.true_utility(run), people, seed).preferences
    return rm.labelled(*pairs, said.mean(1))


def fit_reward_model(run: Settings, seed: int = 0) -> PreTrainedModel:
    """A reward model, made from `preference_pairs` in one pass.

    Args:
        run: as in `preference_pairs`.
        seed: of the pairs and the order of training.
    """
    _check(run)
    check_seed(seed)
    model, tokenizer = rm.load(*models.load(run.model, device=run.device), run.device)
    config = rm.Config(**rm.AT_SCALE[run.scale], seed=seed)
    for _ in rm.train(model, tokenizer, preference_pairs(run, seed), config):
        pass
    return model


def reward_model(run: Settings) -> PreTrainedModel:
    """The reward model of the chapter on preferences, for those after it: read from the package at
    scale tiny, made anew by `fit_reward_model` at others.

    Raises: OSError or ValueError, as `models.load`, if the package is not whole.
    """
    _check(run)
    if not run.reward_model:
        return fit_reward_model(run)
    kind = AutoModelForSequenceClassification
    model = models.from_files(kind, run.reward_model, torch.float32, "reward model")
    return model.to(run.device).eval()


def adder(run: Settings) -> tuple[nn.Module, Tokenizer]:
    """The model that adds, carelessly, and its tokenizer: read from the package at scale tiny, made
    anew from demonstrations of a careless writer at others.

    Raises: OSError as `models.load`.
    """
    _check(run)
    policy, tokenizer = models.load(run.arithmetic_model or run.model, device=run.device)
    if not run.arithmetic_model:
        examples = arithmetic.demonstrations(DEMONSTRATIONS)
        config = sft.Config(**sft.AT_SCALE[run.scale], batch_size=32)
        for _ in sft.train(policy, tokenizer, examples, config):
            pass
    return policy, tokenizer


def _check(run: Settings) -> None:
    fields = Settings.__dataclass_fields__
    has(run, "run", "the settings, as settings.load returns them", *fields)
