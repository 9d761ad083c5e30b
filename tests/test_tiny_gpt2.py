"""The GPT-2 that ships with the book: what its card says is true, and the command that makes it
runs."""

import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from experiments import train_tiny_gpt2
from rlhf_helpers import models, rollout
from rlhf_helpers.algorithms import sft
from rlhf_helpers.worlds import reviews

FOLDER = train_tiny_gpt2.FOLDER


@pytest.fixture(scope="module")
def tiny():
    return models.load(models.TINY)


def test_the_files_are_small_and_hold_no_pickle():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert files["model.safetensors"] < 8 * 2**20
    assert not [name for name in files if re.search(r"\.(bin|pt|pth|pkl|pickle|ckpt|py)$", name)]
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118


def test_the_library_alone_loads_it():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert isinstance(model, GPT2LMHeadModel)
    assert 1e6 <= model.num_parameters() <= 2e6
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    text = "Any text, even \N{SNOWMAN} and\nline breaks, comes back."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_is_close_to_the_grammar_on_films_it_never_saw(tiny):
    """Oracle: the grammar's own probability of the same reviews. The bound was set before the model
    was trained: 0.05 nat a token, of whole reviews and of what follows an opening."""
    sample = reviews.sample(600, seed=99, split="held_out")
    # an empty prompt is the start token alone
    for heads, rests, floor in (
        ([""] * 600, [r.text for r in sample], [r.log_prob for r in sample]),
        ([r.opening for r in sample], [r.body for r in sample], [r.body_log_prob for r in sample]),
    ):
        nats, tokens = sft.surprise(*tiny, list(zip(heads, rests, strict=True)))
        excess = (nats + torch.tensor(floor)).sum() / tokens.sum()
        assert -0.01 < excess < 0.05


def test_the_card_tells_the_numbers_of_these_weights(tiny):
    """Oracle: the same measure with another implementation of the log-probabilities, within four
    standard errors."""
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    row = re.search(
        r"what follows the opening.*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", card
    )
    model, grammar, difference, _ = map(float, row.groups())
    sample = reviews.sample(1000, seed=5, split="held_out")
    nats, tokens = sft.surprise(*tiny, [(r.opening, r.body) for r in sample])
    per_token = nats * len(sample) / tokens.sum()
    assert abs(per_token.mean() - model) < 4 * per_token.std() / len(sample) ** 0.5
    assert difference == pytest.approx(model - grammar, abs=2e-4)
    assert f"{tiny[0].num_parameters():,} parameters" in card


def test_it_writes_reviews(tiny):
    generator = torch.Generator().manual_seed(3)
    openings = reviews.openings("held_out", 200, seed=9)
    texts = rollout.write(*tiny, openings, 64, generator=generator)
    good = [reviews.parse(o + t) is not None for o, t in zip(openings, texts, strict=True)]
    assert sum(good) > 0.7 * len(good)
    assert len(set(texts)) > 190


def test_prompts_work_with_and_without_the_start_token(tiny):
    policy, tokenizer = tiny
    sample = reviews.sample(300, seed=7, split="held_out")
    examples = sft.encode(tokenizer, [(r.opening, r.body) for r in sample])
    excess = []
    for first in ([], [tokenizer.eos_token_id]):
        begun = [one._replace(prompt=[*first, *one.prompt]) for one in examples]
        batch = sft.collate(begun, tokenizer.pad_token_id)
        with torch.no_grad():
            loss = sft.sft_loss(policy, batch).item()
        floor = sum(r.body_log_prob for r in sample) / batch.loss_mask.sum().item()
        excess.append(loss + floor)
    assert max(excess) < 0.05


def test_the_command_makes_one_and_makes_the_same_again(monkeypatch, tmp_path):
    monkeypatch.setattr(train_tiny_gpt2, "STEPS", 2)
    monkeypatch.setattr(train_tiny_gpt2, "BATCH", 8)
    tokenizer = train_tiny_gpt2.train_tokenizer(reviews.texts("train", 300))
    weights = []
    for _ in range(2):
        model = train_tiny_gpt2.new_model(tokenizer)
        train_tiny_gpt2.train(model, tokenizer)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    measured = train_tiny_gpt2.evaluate(model, tokenizer, n=50)
    assert measured["review"]["excess"] > 1  # two steps teach little
    train_tiny_gpt2.write_card(
        tmp_path, model, tokenizer, measured | {"seconds": 1, "sampled": 9, "grammatical": 0.0}
    )
    assert models.load(tmp_path)[0].num_parameters() == model.num_parameters()
