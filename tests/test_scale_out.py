"""TRL's trainers fed by this book, and runs in several processes: losses and gradients against this
book's own functions, two processes against one, a process that is killed, configurations against
accelerate's own checks."""

import copy
import gc
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from architectures import build
from datasets import Dataset
from nbrun import ROOT
from safetensors.torch import load_file
from tokenizers import processors
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from rlhf_helpers import models, scale_out, settings
from rlhf_helpers.advantages import group_relative_advantages
from rlhf_helpers.algorithms import dpo, grpo, reward_model, sft
from rlhf_helpers.algorithms.reward_model import Comparison
from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.losses import GRPO_TYPES, grpo_loss
from rlhf_helpers.rollout import end_tokens
from rlhf_helpers.worlds import arithmetic, reviews

LIMIT = 300  # seconds after which a launched run counts as hanging
SMALL = grpo.Config(iterations=4, prompts=4, samples_per_prompt=4, learning_rate=1e-3)
PROBLEMS = arithmetic.sample(40, 3, "train")
PROMPTS = [one.prompt for one in PROBLEMS]
ANSWERS = {"answer": [one.answer for one in PROBLEMS]}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """No launcher's variables, neither from outside nor left behind by a trainer."""
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_", "MASTER_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def adder():
    """The model that adds, moved a little so that nothing is special about it."""
    return moved(models.load(settings.TINY_ARITHMETIC))


def reviewer():
    return moved(models.load(settings.TINY))


def moved(loaded, by=0.02):
    policy, tokenizer = loaded
    with torch.no_grad():
        for seed, parameter in enumerate(policy.parameters()):
            luck = torch.Generator().manual_seed(seed)
            parameter.add_(by * torch.randn(parameter.shape, generator=luck))
    return policy, tokenizer


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert any(slope.abs().max() > 1e-3 for slope in theirs.values())
    for name, slope in mine.items():
        torch.testing.assert_close(slope, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def first_rows(trainer, count):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])


# --- the same data, the same loss ----------------------------------------------------------------


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """What TRL samples and scores for four prompts."""
    policy, tokenizer = adder()
    arguments = (policy, tokenizer, PROMPTS, arithmetic.exact, SMALL, ANSWERS)
    trainer = scale_out.grpo_trainer(*arguments, folder=tmp_path_factory.mktemp("grpo"))
    rows = [trainer.train_dataset[i] for i in range(4) for _ in range(4)]
    return trainer, trainer._generate_and_score_completions(rows)


def test_trl_gives_a_reward_function_what_this_book_gives_it(generated):
    """Oracle: the answers, taken from the problems and compared by hand; advantages by the book's
    function."""
    trainer, batch = generated
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    right = [
        float(text.rpartition("=")[2] == PROBLEMS[i // 4].answer) for i, text in enumerate(texts)
    ]
    assert 0 < sum(right) < 16
    wanted = group_relative_advantages(torch.tensor(right), 4)
    torch.testing.assert_close(batch["advantages"], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loss_type", GRPO_TYPES)
def test_grpo_has_this_books_loss(generated, loss_type, tmp_path):
    """Oracle: `grpo_loss` of log-probabilities by `completion_log_probs`, on TRL's batch, away from
    ratio 1."""
    batch = generated[1]
    policy, tokenizer = adder()
    config = replace(SMALL, loss_type=loss_type, clip=0.1, clip_high=0.3)
    arguments = (policy, tokenizer, PROMPTS, arithmetic.exact, config, ANSWERS)
    trainer = scale_out.grpo_trainer(*arguments, folder=tmp_path)
    tokens, attention = (
        torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask")
    )
    mask = batch["completion_mask"].bool()
    mine = copy.deepcopy(models.load(settings.TINY_ARITHMETIC)[0])
    mine.load_state_dict(policy.state_dict())
    log_probs = completion_log_probs(mine, tokens, attention, mask.shape[1])
    shift = 0.3 * torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(0))
    old = log_probs.detach() + shift
    limits = (config.clip, config.clip_high)
    found = grpo_loss(
        log_probs,
        old,
        batch["advantages"],
        mask,
        *limits,
        loss_type=loss_type,
        max_completion_length=config.max_new_tokens,
    )
    found.loss.backward()

    policy.train()
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(policy, dict(batch) | {"old_per_token_logps": old})
    theirs.backward()
    assert found.loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert abs(theirs.item()) > 1e-3
    same_gradients(gradients(mine), gradients(policy))


def comparisons(count=8):
    openings = reviews.openings("train", count)
    first, second = " It is a fine film.", " The jokes are weak, and the songs are terrible."
    shares = [1.0, 0.8, 0.2, 0.5, 0.0, 0.6, 0.4, 1.0]
    return [
        Comparison(o, (first, second), p) for o, p in zip(openings, shares[:count], strict=True)
    ]


@pytest.mark.parametrize("variant", scale_out.DPO_LOSSES)
@pytest.mark.parametrize("pad_is_end", [False, True])
def test_dpo_has_this_books_loss(pad_is_end, variant, tmp_path):
    """Oracle: `dpo.update` on the majority's labels without ties, with the policy a step away from
    its reference; no two variants have one loss here."""
    config = dpo.Config(beta=0.3, batch_size=7, variant=variant)
    policy, tokenizer = reviewer()
    if pad_is_end:
        tokenizer.pad_token = tokenizer.eos_token
    before = copy.deepcopy(policy)
    trainer = scale_out.dpo_trainer(policy, tokenizer, comparisons(), config, folder=tmp_path)
    moved((policy, None))
    mine = copy.deepcopy(before)
    mine.load_state_dict(policy.state_dict())
    hard = [
        one._replace(preference=float(one.preference > 0.5))
        for one in comparisons()
        if one.preference != 0.5
    ]
    examples = dpo.encode(tokenizer, hard)
    pad = tokenizer.pad_token_id
    batch = dpo.collate(examples, dpo.reference_log_probs(before, examples, pad), pad)
    found = dpo.update(
        mine, torch.optim.SGD(mine.parameters(), 0.0), batch, replace(config, max_grad_norm=1e9)
    )

    assert len(trainer.train_dataset) == 7
    policy.train()
    theirs = trainer.compute_loss(policy, first_rows(trainer, 7))
    theirs.backward()
    assert found["loss"] == pytest.approx(theirs.item(), abs=1e-5)
    if not pad_is_end:
        # the log-ratios are large enough for these to differ, those of the means less so
        assert abs(theirs.item() - (1.0 if variant == "hinge" else 0.6931)) > 1e-3
    same_gradients(gradients(mine), gradients(policy))


def test_dpo_of_an_adapter_starts_at_log_2_and_moves_the_adapter_alone(tmp_path):
    """Oracle: the base weights, to the bit; at the start policy and reference are one."""
    policy, tokenizer = models.load(settings.TINY)
    policy = models.lora_policy(policy)
    config = dpo.Config(batch_size=7, epochs=4, learning_rate=1e-2, warm_up=0.0)
    trainer = scale_out.dpo_trainer(policy, tokenizer, comparisons(), config, folder=tmp_path)
    trainer.train()
    found = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)
    assert found[-1] < found[0] - 0.05
    base = {n: p for n, p in policy.named_parameters() if "lora" not in n}
    fresh = dict(models.lora_policy(models.load(settings.TINY)[0]).named_parameters())
    assert all(torch.equal(p, fresh[name]) for name, p in base.items())


def test_dpo_with_its_reference_computed_first_keeps_no_second_model(tmp_path):
    """Oracle: the losses of a run that holds a copy of the policy."""
    found = {}
    for first in (False, True):
        policy, tokenizer = reviewer()  # not the weights that its name stands for
        config = dpo.Config(batch_size=7, epochs=3, learning_rate=1e-2, warm_up=0.0)
        trainer = scale_out.dpo_trainer(
            policy,
            tokenizer,
            comparisons(),
            config,
            folder=tmp_path,
            precompute_ref_log_probs=first,
        )
        assert (trainer.ref_model is None) == first
        trainer.train()
        found[first] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert found[True] == pytest.approx(found[False], abs=1e-5)
    assert found[True][0] == pytest.approx(math.log(2), abs=1e-5)
    assert found[True][-1] < found[True][0] - 0.05


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_the_reward_model_has_this_books_loss(pad_is_end, tmp_path):
    """Oracle: `reward_model_loss` of `last_scores`, which are told by the mask where a text
    ends."""
    config = reward_model.Config(batch_size=7, centring=0.1)
    model, tokenizer = reward_model.load(settings.TINY)
    moved((model, None), 0.05)
    if pad_is_end:
        tokenizer.pad_token = tokenizer.eos_token
    rows = scale_out.hard_pairs(comparisons())
    ids = reward_model.encode(
        tokenizer,
        [r["prompt"] for r in rows for _ in "ab"],
        [r[k] for r in rows for k in ("chosen", "rejected")],
    )
    tokens, mask = reward_model.collate(ids, tokenizer.pad_token_id)
    ones = torch.ones(len(rows))
    labels = reward_model.Batch(tokens, mask, ones, 0 * ones, ones)
    scores = reward_model.last_scores(model, tokens, mask).view(-1, 2)
    mine = reward_model.reward_model_loss(scores, labels, config)

    trainer = scale_out.reward_trainer(model, tokenizer, comparisons(), config, folder=tmp_path)
    theirs = trainer.compute_loss(model, first_rows(trainer, 7))
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert abs(theirs.item() - 0.6931) > 1e-2
    # the padding apart is TRL's alone
    assert (tokenizer.pad_token == tokenizer.eos_token) == pad_is_end


@pytest.mark.parametrize("pad_is_end", [False, True])
@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_sft_has_this_books_loss(loss_on, pad_is_end, tmp_path):
    """Oracle: `sft_loss` on the same pairs."""
    policy, tokenizer = reviewer()
    if pad_is_end:
        tokenizer.pad_token = tokenizer.eos_token
    given = [
        (o, f" {text}")
        for o, text in zip(
            reviews.openings("train", 4),
            ["It is a fine film.", "No.", "The jokes are weak.", "Fine."],
            strict=True,
        )
    ]
    batch = sft.collate(sft.encode(tokenizer, given), tokenizer.pad_token_id, loss_on)
    mine = copy.deepcopy(policy)
    found = sft.sft_loss(mine, batch)
    found.backward()
    config = sft.Config(batch_size=4, loss_on=loss_on)
    trainer = scale_out.sft_trainer(policy, tokenizer, given, config, folder=tmp_path)
    theirs = trainer.compute_loss(policy, first_rows(trainer, 4))
    theirs.backward()
    assert found.item() == pytest.approx(theirs.item(), abs=1e-5)
    same_gradients(gradients(mine), gradients(policy))


# --- tokens and texts ----------------------------------------------------------------------------

HABITS = {"in front": "<|endoftext|> $A", "behind": "$A <|endoftext|>"}
HABITS["both"] = "<|endoftext|> $A <|endoftext|>"


def with_habit(tokenizer, where):
    """A tokenizer that puts its end token around every text, as many put one in front."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=HABITS[where], special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("where", HABITS)
def test_no_habit_of_the_tokenizer_reaches_the_data(where, tmp_path):
    """Oracle: the same texts by a tokenizer without the habit, each alone; 'an' and 'd' would merge
    across the border."""
    policy, plain = reviewer()
    tokenizer, end = with_habit(models.load(settings.TINY)[1], where), plain.eos_token_id
    ids = {text: plain(text)["input_ids"] for text in ("The plot an", "d the cast.", "other")}
    assert tokenizer("other")["input_ids"] != ids["other"]
    assert plain("The plot and the cast.")["input_ids"] != ids["The plot an"] + ids["d the cast."]
    prompt, first, second = ids["The plot an"], [*ids["d the cast."], end], [*ids["other"], end]

    data = [Comparison("The plot an", ("d the cast.", "other"))] * 2
    given = (policy, tokenizer, data, dpo.Config(batch_size=2))
    row = scale_out.dpo_trainer(*given, folder=tmp_path).train_dataset[0]
    assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == (prompt, first, second)
    given = (policy, tokenizer, [("The plot an", "d the cast.")], sft.Config(batch_size=1))
    row = scale_out.sft_trainer(*given, folder=tmp_path).train_dataset[0]
    assert row["input_ids"] == prompt + first
    model = reward_model.load(settings.TINY)[0]
    given = (model, tokenizer, data, reward_model.Config(batch_size=2))
    row = scale_out.reward_trainer(*given, folder=tmp_path).train_dataset[0]
    assert (row["chosen_ids"], row["rejected_ids"]) == (prompt + first, prompt + second)


@pytest.mark.parametrize("where", HABITS)
def test_grpo_samples_from_the_prompts_own_tokens(where, tmp_path):
    """Oracle: a tokenizer without the habit."""
    policy, plain = adder()
    tokenizer = with_habit(models.load(settings.TINY_ARITHMETIC)[1], where)
    arguments = (policy, tokenizer, PROMPTS, arithmetic.exact, SMALL, ANSWERS)
    trainer = scale_out.grpo_trainer(*arguments, folder=tmp_path)
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in [0] * 4])
    assert batch["prompt_ids"].tolist() == [plain(PROMPTS[0])["input_ids"]] * 4


def test_a_reward_function_is_given_the_texts_of_the_loops(tmp_path):
    """Oracle: by hand; left to itself the tokenizer drops the space before a full stop and goes on
    behind an end token."""
    policy, tokenizer = reviewer()
    tokenizer.clean_up_tokenization_spaces = True
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [0.0] * len(completions)

    arguments = (policy, tokenizer, ["The plot"] * 4, reward, SMALL)
    trainer = scale_out.grpo_trainer(*arguments, folder=tmp_path)
    ids, end = tokenizer(" is good .")["input_ids"], tokenizer.eos_token_id
    rows = [[*ids, end], ids, [*ids, tokenizer.pad_token_id, *ids, end]]
    inputs = [{"prompt": "The plot"}] * 3
    trainer._calculate_rewards(inputs, ["The plot"] * 3, ["other"] * 3, rows)
    assert seen == [" is good ."] * 3
    assert [isinstance(text, models.Cut) for text in seen] == [False, True, False]


def test_every_end_token_of_the_model_ends_a_completion_there_too(tmp_path):
    """Oracle: the tokens that the book's own sampler stops at."""
    policy, tokenizer = adder()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("=")]
    policy.generation_config.eos_token_id = ends
    arguments = (policy, tokenizer, PROMPTS, arithmetic.exact, SMALL, ANSWERS)
    trainer = scale_out.grpo_trainer(*arguments, folder=tmp_path)
    assert set(trainer.eos_token_ids) == set(end_tokens(policy, tokenizer)) == set(ends)


LISTS = {
    "tuples": tuple,
    "arrays": np.array,
    "Series": lambda values: pd.Series(values, index=range(len(values), 0, -1)),
    "columns of a data set": lambda values: Dataset.from_dict({"x": values})["x"],
}


@pytest.mark.parametrize("kind", [*LISTS, "tensors"])
def test_prompts_and_columns_may_lie_in_arrays_and_tables(kind, tmp_path):
    """Oracle: the data of the same run with lists."""
    make = LISTS.get(kind, list)
    number = torch.tensor if kind == "tensors" else make
    columns = {"answer": number([int(answer) for answer in ANSWERS["answer"]])}
    held_out = {"prompt": make(PROMPTS[:4]), "answer": columns["answer"][:4]}
    given = (make(PROMPTS), arithmetic.exact, SMALL, columns, held_out)
    trainer = scale_out.grpo_trainer(*adder(), *given, folder=tmp_path)
    answers = [int(answer) for answer in ANSWERS["answer"]]
    assert trainer.train_dataset.to_dict() == {"prompt": PROMPTS, "answer": answers}
    assert trainer.eval_dataset.to_dict() == {"prompt": PROMPTS[:4], "answer": answers[:4]}


@pytest.mark.parametrize("name", scale_out.TAKEN)
def test_a_column_with_a_name_of_trl_is_refused(name, tmp_path):
    """Oracle: the specification; 'prompt' would have taken the place of the prompts."""
    columns = ANSWERS | {name: PROMPTS[::-1]}
    with pytest.raises(ValueError, match=rf"columns\['{name}'\]"):
        scale_out.grpo_trainer(*adder(), PROMPTS, arithmetic.exact, SMALL, columns, folder=tmp_path)
    if name != "prompt":
        held_out = {"prompt": PROMPTS, **columns}
        with pytest.raises(ValueError, match=rf"columns\['{name}'\]"):
            scale_out.grpo_trainer(
                *adder(), PROMPTS, arithmetic.exact, SMALL, ANSWERS, held_out, folder=tmp_path
            )


def test_one_text_in_place_of_a_column_or_of_two_responses_is_refused(tmp_path):
    """Oracle: the specification; its letters would be taken one by one."""
    for columns, held_out in [({"answer": "7" * 40}, None), (ANSWERS, {"prompt": PROMPTS[0]})]:
        with pytest.raises(ValueError, match=r"columns\['(answer|prompt)'\] is a str"):
            scale_out.grpo_trainer(
                *adder(), PROMPTS, arithmetic.exact, SMALL, columns, held_out, folder=tmp_path
            )
    with pytest.raises(ValueError, match=r"data\[0\] must compare two"):
        scale_out.hard_pairs([Comparison("a", "bc")])


# --- dropout -------------------------------------------------------------------------------------

NOISY = {
    "gpt2": {},  # layers
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5},  # numbers
    "llama": {"attention_dropout": 0.5},
    "qwen2": {"attention_dropout": 0.5},
}


def noisy(family, **changes):
    changes = {"vocab_size": 1280, **NOISY[family], **changes}
    context = "n_positions" if family == "gpt2" else "max_position_embeddings"
    return build(family, **{context: 160, **changes})


def differ(model, tokens):
    """How far apart two passes in training mode are."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model.train()
        return (model(tokens).logits - model(tokens).logits).abs().max().item()


@pytest.mark.parametrize("family", NOISY)
def test_dropout_is_off_in_every_trainer(family, tmp_path):
    """Oracle: two passes in training mode, which differ before; the first loss of DPO is log 2."""
    tokenizer = models.load(settings.TINY)[1]
    given = [(o, " Fine.") for o in reviews.openings("train", 4)]
    tokens = torch.tensor([tokenizer(given[0][0])["input_ids"]])
    assert differ(noisy(family), tokens) > 0.05
    where = {"folder": tmp_path}

    policy = noisy(family)
    scale_out.sft_trainer(policy, tokenizer, given, sft.Config(batch_size=4), **where)
    assert differ(policy, tokens) == 0
    policy = noisy(family)
    trainer = scale_out.dpo_trainer(
        policy, tokenizer, comparisons(), dpo.Config(batch_size=7), **where
    )
    assert differ(policy, tokens) == 0
    loss = trainer.compute_loss(policy.train(), first_rows(trainer, 7)).item()
    assert loss == pytest.approx(math.log(2), abs=1e-4)
    policy = noisy(family)
    prompts, reward = [given[0][0]] * 4, lambda completions, **_: [0.0] * len(completions)
    scale_out.grpo_trainer(policy, tokenizer, prompts, reward, SMALL, **where)
    assert differ(policy, tokens) == 0


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_dropout_is_off_in_the_reward_trainer(family, tmp_path):
    """Oracle: two passes in training mode."""
    tokenizer = models.load(settings.TINY)[1]
    model, _ = reward_model.load(noisy(family, pad_token_id=tokenizer.pad_token_id), tokenizer)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([tokenizer("The plot was good.")["input_ids"]])
    assert differ(model, tokens) > 0.05
    config = reward_model.Config(batch_size=7)
    scale_out.reward_trainer(model, tokenizer, comparisons(), config, folder=tmp_path)
    assert differ(model, tokens) == 0


def test_what_stays_random_is_refused_and_no_luck_is_used_up():
    """Oracle: a block that adds noise of its own; the global generator, before and after."""
    model, state = noisy("opt"), torch.get_rng_state()
    scale_out.without_dropout(model.eval())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    model.config.activation_dropout = 0.2

    def noise(module, _, out):
        return out + torch.randn_like(out) if module.training else None

    def disturb(model):
        blocks = [m for name, m in model.named_modules() if name.endswith("layers.0.fc1")]
        blocks[0].register_forward_hook(noise)

    disturb(model)
    with pytest.raises(ValueError, match=r"OPTForCausalLM: two passes .*activation_dropout=0.2"):
        scale_out.without_dropout(model)
    judge = reward_model.load(noisy("opt"), models.load(settings.TINY)[1])[0]
    assert not judge.score.weight.any()
    scale_out.without_dropout(judge)
    disturb(judge)
    with pytest.raises(ValueError, match="two passes"):
        scale_out.without_dropout(judge)


# --- padding -------------------------------------------------------------------------------------

FAMILIES = {
    "gpt2": lambda words: GPT2LMHeadModel(
        GPT2Config(vocab_size=words, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    ),
    "rwkv": lambda words: RwkvForCausalLM(
        RwkvConfig(vocab_size=words, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    ),
    "llama": lambda words: build("llama", vocab_size=words, spread=0.02),
    "opt": lambda words: build("opt", vocab_size=words, spread=0.02),
    "bloom": lambda words: BloomForCausalLM(
        BloomConfig(vocab_size=words, hidden_size=32, n_layer=2, n_head=4)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [32, 8192])
@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_mind_padding_are_known(family, peaked, words, dtype):
    """Oracle: how the families are made: GPT-2 counts from the first column, RWKV reads padding
    into its state, and the others look at the mask alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family](words)
        if peaked:
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(std=0.2)
    model = model.to(dtype).train()
    found = scale_out._minds_padding(model, SimpleNamespace(pad_token_id=0, eos_token_id=0))
    assert found == (family in ("gpt2", "rwkv"))
    assert model.training


def test_a_fresh_model_with_many_words_is_refused_too(tmp_path):
    """Oracle: the error of a trained one."""
    model = FAMILIES["gpt2"](8192)
    tokenizer, reward = models.load(settings.TINY)[1], lambda completions, **_: [0.0]
    prompts = ["The film", "A long and sad story"]
    with pytest.raises(ValueError, match=r"prompts have \d to \d tokens"):
        scale_out.grpo_trainer(model, tokenizer, prompts, reward, SMALL, folder=tmp_path)
    # of a model whose weights are elsewhere nothing is known; what is tried goes where it is
    assert scale_out._minds_padding(build("llama").to("meta"), tokenizer)
    assert scale_out._some_tokens(build("llama").to("meta")).is_meta


# --- settings ------------------------------------------------------------------------------------


def test_every_setting_of_grpo_arrives(tmp_path):
    """Oracle: TRL's names, written out by hand."""
    config = grpo.Config(
        iterations=6,
        prompts=8,
        samples_per_prompt=3,
        max_new_tokens=9,
        temperature=0.7,
        epochs=2,
        mini_batches=4,
        learning_rate=3e-4,
        warm_up=0.25,
        max_grad_norm=0.6,
        scale="batch",
        loss_type="dr_grpo",
        importance="sequence",
        clip=0.15,
        clip_high=0.25,
        beta=0.05,
        bias_correct_kl=False,
        seed=5,
    )
    found = scale_out.grpo_arguments(config, tmp_path)
    wanted = {
        "max_steps": 48,
        "per_device_train_batch_size": 6,
        "generation_batch_size": 24,
        "steps_per_generation": 4,
        "num_generations": 3,
        "num_iterations": 2,
        "max_completion_length": 9,
        "temperature": 0.7,
        "learning_rate": 3e-4,
        "warmup_steps": 0.25,
        "max_grad_norm": 0.6,
        "scale_rewards": "batch",
        "loss_type": "dr_grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.15,
        "epsilon_high": 0.25,
        "beta": 0.05,
        "use_bias_correction_kl": False,
        "seed": 5,
        "weight_decay": 0.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
    }
    assert {name: getattr(found, name) for name in wanted} == wanted


def test_every_setting_of_the_others_arrives(tmp_path):
    """Oracle: TRL's names, written out by hand; of 15 examples and batches of 4 there are three
    batches, with two passes six steps."""
    tokenizer = models.load(settings.TINY)[1]
    openings = reviews.openings("train", 15)
    data = [Comparison(o, (" It is fine.", " It is not.")) for o in openings]
    same = {"learning_rate": 3e-4, "epochs": 2, "batch_size": 4, "warm_up": 0.25, "seed": 5}
    same["max_grad_norm"] = 0.6
    wanted = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "dataloader_drop_last": True,
        "learning_rate": 3e-4,
        "warmup_steps": 0.25,
        "max_grad_norm": 0.6,
        "seed": 5,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
    }

    def arrive(trainer, **more):
        expected = wanted | more
        assert {name: getattr(trainer.args, name) for name in expected} == expected

    where = {"folder": tmp_path}
    pairs = [(one.prompt, one.responses[0]) for one in data]
    for loss_on in ("response", "all"):
        config = sft.Config(**same, loss_on=loss_on)
        trainer = scale_out.sft_trainer(reviewer()[0], tokenizer, pairs, config, **where)
        arrive(trainer, completion_only_loss=loss_on == "response")
    for variant, theirs in [("sigmoid", "sigmoid"), ("hinge", "hinge")]:
        config = dpo.Config(**same, beta=0.3, variant=variant)
        trainer = scale_out.dpo_trainer(reviewer()[0], tokenizer, data, config, **where)
        arrive(trainer, beta=0.3, loss_type=[theirs], disable_dropout=True)
    config = reward_model.Config(**same, weight_decay=0.02, centring=0.1)
    model = reward_model.load(settings.TINY)[0]
    trainer = scale_out.reward_trainer(model, tokenizer, data, config, **where)
    arrive(trainer, weight_decay=0.02, adam_beta2=0.95, center_rewards_coefficient=0.1)


def test_the_learning_rate_rises_and_falls(tmp_path):
    """Oracle: TRL's log against two straight lines; the library's first step has rate 0, this
    book's not."""
    policy, tokenizer = adder()
    config = replace(SMALL, iterations=8, warm_up=0.25)
    arguments = (policy, tokenizer, PROMPTS, arithmetic.exact, config, ANSWERS)
    trainer = scale_out.grpo_trainer(*arguments, folder=tmp_path)
    before = models.weights_digest(policy)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([0, 5e-4, *(1e-3 * (8 - s) / 6 for s in range(2, 8))])
    assert models.weights_digest(policy) != before
    assert not list(tmp_path.rglob("*.bin"))


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    """Oracle: the weights of a run that was never stopped; and half as many completions are
    judged."""
    ends, judged = [], {False: 0, True: 0}
    for resumed in (False, True):

        def reward(prompts, completions, resumed=resumed, **columns):
            judged[resumed] += len(completions)
            return arithmetic.exact(prompts, completions, columns["answer"])

        policy, tokenizer = adder()
        arguments = (policy, tokenizer, PROMPTS, reward, SMALL, ANSWERS)
        often = {"save_strategy": "steps", "save_steps": 2}
        trainer = scale_out.grpo_trainer(*arguments, folder=tmp_path, **often)
        trainer.train(resume_from_checkpoint=resumed)
        ends.append({name: p.detach().clone() for name, p in policy.named_parameters()})
        shutil.rmtree(tmp_path / "checkpoint-4")  # as if the run had died before its end
    assert trainer.state.global_step == 4
    assert judged[True] == judged[False] / 2 > 0
    for name, theirs in ends[0].items():
        torch.testing.assert_close(ends[1][name], theirs, rtol=0, atol=1e-6)
    before = dict(adder()[0].named_parameters())
    assert max((before[name] - theirs).abs().max() for name, theirs in ends[0].items()) > 1e-3


@pytest.mark.parametrize("name", ["grpo_trainer", "sft_trainer", "dpo_trainer", "reward_trainer"])
def test_that_no_checkpoints_are_kept_is_said(name):
    """Oracle: the setting, and the sentence; the one above shows how to have them."""
    assert scale_out.grpo_arguments(SMALL, "unused").save_strategy == "no"
    said = " ".join(getattr(scale_out, name).__doc__.split())
    assert "No checkpoints are kept unless the options say so." in said
    assert 'save_strategy="steps", save_steps=10' in scale_out.__doc__
    assert "It keeps no checkpoints" in " ".join(scale_out.main.__doc__.split())


def test_a_batch_is_that_of_all_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_out, "processes", lambda: 2)
    assert scale_out.grpo_arguments(SMALL, tmp_path).per_device_train_batch_size == 8
    with pytest.raises(
        ValueError, match="prompts a mini-batch=1 cannot be shared equally by 2 proc"
    ):
        scale_out.grpo_arguments(replace(SMALL, mini_batches=4), tmp_path)
    policy, tokenizer = reviewer()
    with pytest.raises(ValueError, match="batch_size=7 cannot be shared"):
        scale_out.dpo_trainer(
            policy, tokenizer, comparisons(), dpo.Config(batch_size=7), folder=tmp_path
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "leave-one-out"}, "scale='leave-one-out' is not in TRL"),
        ({"constant_groups": "drop"}, "constant_groups='drop' is not in TRL"),
        ({"prompts": 0}, "prompts=0"),
    ],
)
def test_what_trl_cannot_do_is_named(change, message, tmp_path):
    policy, tokenizer = adder()
    arguments = (policy, tokenizer, PROMPTS, arithmetic.exact, replace(SMALL, **change), ANSWERS)
    with pytest.raises(ValueError, match=message):
        scale_out.grpo_trainer(*arguments, folder=tmp_path)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (dpo.Config(variant="ipo"), None, "variant='ipo' is not in TRL"),
        (dpo.Config(label_smoothing=0.1), None, "label_smoothing=0.1: TRL 1.16 ignores it"),
        (dpo.Config(), [Comparison("a", ("b", "c"), 0.5)], "no comparison with a majority"),
        (dpo.Config(), [Comparison("a", ("b", "c", "d"))], r"data\[0\] must compare two"),
        (dpo.Config(), [Comparison("a", ("b", "c"), weight=2.0)], r"data\[0\] .* weight 1"),
        (dpo.Config(), [Comparison("a", ("b", "c"), margin=2.0)], r"data\[0\] has a margin"),
    ],
)
def test_what_dpo_of_trl_cannot_do_is_named(config, data, message, tmp_path):
    policy, tokenizer = reviewer()
    with pytest.raises(ValueError, match=message):
        scale_out.dpo_trainer(policy, tokenizer, data or comparisons(), config, folder=tmp_path)


def test_prompts_of_unequal_length_are_refused_where_they_would_be_scored_wrong(tmp_path):
    """Oracle: a model with rotary positions, for which they are right."""
    policy, tokenizer = adder()
    given = (["3+4=", "37+58="], arithmetic.exact, replace(SMALL, prompts=2), {"answer": [7, 95]})
    with pytest.raises(ValueError, match="prompts have 4 to 6 tokens"):
        scale_out.grpo_trainer(policy, tokenizer, *given, folder=tmp_path)
    rotary = build("llama", vocab_size=policy.config.vocab_size)
    rotary.config.name_or_path = str(tmp_path)
    assert scale_out.grpo_trainer(rotary, tokenizer, *given, folder=tmp_path)


def test_a_reference_that_is_not_the_policy_is_refused(tmp_path):
    """Oracle: the weights of TRL's reference, which it reads from where the policy was once
    loaded."""
    config = replace(SMALL, beta=0.1)
    given = (PROMPTS, arithmetic.exact, config, ANSWERS)
    with pytest.raises(ValueError, match=r"policy is not .*tiny-arithmetic' any more"):
        scale_out.grpo_trainer(*adder(), *given, folder=tmp_path)
    policy, tokenizer = adder()
    policy.save_pretrained(tmp_path / "moved")
    again = models.load(tmp_path / "moved", tokenizer)[0]
    trainer = scale_out.grpo_trainer(again, tokenizer, *given, folder=tmp_path)
    for mine, theirs in zip(policy.parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# --- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(scale_out.CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_configurations_are_what_accelerate_takes(path, tmp_path):
    """Oracle: accelerate's loader and launcher; an unknown key on either level must be refused."""
    found = scale_out.check_config(path)
    written = yaml.safe_load(path.read_text())
    assert found["ACCELERATE_MIXED_PRECISION"] == written["mixed_precision"]
    for section in [None, *(name for name in written if name.endswith("_config"))]:
        wrong = copy.deepcopy(written)
        (wrong[section] if section else wrong)["zero_stagee"] = 2
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
        with pytest.raises(ValueError, match="zero_stagee"):
            scale_out.check_config(tmp_path / "wrong.yaml")


def test_the_plugins_take_the_sharding_configurations(monkeypatch):
    """Oracle: accelerate's plugins, made from the environment that its launcher would set."""
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    for stage in (2, 3):
        for name, value in scale_out.check_config(
            scale_out.CONFIGS / f"deepspeed_zero{stage}.yaml"
        ).items():
            monkeypatch.setenv(name, value)
        found = DeepSpeedPlugin().deepspeed_config
        assert found["zero_optimization"]["stage"] == stage
        assert found["gradient_clipping"] == 1.0
    for name, value in scale_out.check_config(scale_out.CONFIGS / "fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    monkeypatch.setenv("FSDP_FORWARD_PREFETCH", "true")
    with pytest.raises(ValueError, match="Invalid auto wrap policy"):
        FullyShardedDataParallelPlugin(auto_wrap_policy="BY_LAYER")


def test_a_configuration_that_would_start_one_process_is_refused(tmp_path):
    """Oracle: `accelerate launch` with it, counted by hand: one process."""
    written = yaml.safe_load((scale_out.CONFIGS / "two_cpu_processes.yaml").read_text())
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(written | {"distributed_type": "MULTI_CPU"}))
    with pytest.raises(
        ValueError, match="without an mpirun_hostfile this starts one process, not 2"
    ):
        scale_out.check_config(tmp_path / "one.yaml")
    hosts = {"mpirun_config": {"mpirun_hostfile": "hosts"}, "distributed_type": "MULTI_CPU"}
    (tmp_path / "mpi.yaml").write_text(yaml.safe_dump(written | hosts))
    assert scale_out.check_config(tmp_path / "mpi.yaml")["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.parametrize("mode", scale_out.VLLM)
def test_vllm_settings_are_settings_of_grpo(mode, tmp_path):
    found = scale_out.grpo_arguments(SMALL, tmp_path, **scale_out.VLLM[mode])
    assert (found.use_vllm, found.vllm_mode) == (True, mode)
    with pytest.raises(TypeError, match="vllm_modee"):
        scale_out.grpo_arguments(SMALL, tmp_path, use_vllm=True, vllm_modee=mode)


# --- processes -----------------------------------------------------------------------------------

SFT = sft.Config(learning_rate=0.1, batch_size=8)
SFT_PAIRS = arithmetic.demonstrations(32)
STEPS, EVERY = 20, 10

TOLD = """
import json, os, sys, weakref
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from rlhf_helpers import models, scale_out, settings
from rlhf_helpers.algorithms import sft
from rlhf_helpers.worlds import arithmetic

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
policy, tokenizer = models.load(settings.TINY_ARITHMETIC)
config, pairs = sft.Config(learning_rate=0.1, batch_size=8), arithmetic.demonstrations(32)
scale_out.sft_trainer(policy, tokenizer, pairs, config, folder=folder, optim="sgd").train()
weights = {n: p.detach().clone() for n, p in policy.named_parameters()}
save_file(weights, folder / f"sft{rank}.safetensors")

policy, tokenizer = models.load(settings.TINY_ARITHMETIC)
scale_out.models.load = lambda source: (policy, tokenizer)
freed, make = [], DistributedDataParallel.__init__
def made(self, *arguments, **options):
    make(self, *arguments, **options)
    weakref.finalize(self.reducer, freed.append, "reducer")
DistributedDataParallel.__init__ = made
weakref.finalize(torch.distributed.group.WORLD, freed.append, "group")
seen, exact = [], arithmetic.exact
def note(prompts, completions, answer, **columns):
    seen.append(prompts)
    return exact(prompts, completions, answer)
scale_out.arithmetic.exact = note
scale_out.main(["--output", str(folder), "--steps", "20", "--save"])
weights = {n: p.detach().clone() for n, p in policy.named_parameters()}
save_file(weights, folder / f"grpo{rank}.safetensors")
(folder / f"seen{rank}.json").write_text(json.dumps(seen))
(folder / f"freed{rank}.json").write_text(json.dumps(freed))
"""

KILLED = """
import os, signal, sys
import torch
from rlhf_helpers import models, scale_out, settings
from rlhf_helpers.algorithms import grpo
from rlhf_helpers.worlds import arithmetic

torch.set_num_threads(1)
policy, tokenizer = models.load(settings.TINY_ARITHMETIC)
some = arithmetic.sample(40, 3, "train")
calls = []
def deadly(prompts, completions, answer, **columns):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return arithmetic.exact(prompts, completions, answer)
trainer = scale_out.grpo_trainer(
    policy, tokenizer, [one.prompt for one in some], deadly,
    grpo.Config(prompts=4, samples_per_prompt=4),
    {"answer": [one.answer for one in some]}, folder=sys.argv[1])
trainer.train()
print("went on to the end")
"""

OWN = """
import json, os, sys
from pathlib import Path
import torch
from rlhf_helpers import models, scale_out, settings
from rlhf_helpers.algorithms import grpo

torch.set_num_threads(1)
policy, tokenizer = models.load(settings.TINY_ARITHMETIC)
prompts, seen = [f"{n}+{n}=" for n in range(10, 30)], []
def short(completions, prompts, wanted, **columns):
    seen.extend(zip(prompts, wanted))
    return [-abs(len(text) - n) for text, n in zip(completions, wanted)]
config = grpo.Config(iterations=3, prompts=4, samples_per_prompt=4)
columns, folder = {"wanted": list(range(20))}, Path(sys.argv[1])
scale_out.grpo_trainer(
    policy, tokenizer, prompts, short, config, columns, folder=folder).train()
(folder / f"own{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""


def launched(script, folder):
    """`accelerate launch` of a script with two processes: exit code, output. It is stopped at the
    limit, and that fails."""
    path = folder / "script.py"
    path.write_text(script)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "RLHF"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    config = ["--config_file", str(scale_out.CONFIGS / "two_cpu_processes.yaml")]
    run = subprocess.Popen(
        [*launcher, *config, str(path), str(folder)],
        env=environment,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = run.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        pytest.fail(f"hangs: {run.communicate()[0][-2000:]}")
    return run.returncode, output


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes that tell what they saw."""
    folder = tmp_path_factory.mktemp("two")
    code, output = launched(TOLD, folder)
    assert code == 0, output[-3000:]
    return folder


@pytest.mark.slow
def test_two_processes_run_and_the_policy_learns(two):
    """Oracle: pass@1 of the saved policies, measured by this book's own sampler on the held-out
    problems."""
    curve = json.loads((two / "curve.json").read_text())
    assert (curve["processes"], curve["completions_a_process"]) == (2, 128)
    assert [point["step"] for point in curve["curve"]] == [0, EVERY, STEPS]
    held_out = arithmetic.sample(256, 3, "held_out")
    start, end = (
        arithmetic.pass_at_k(grpo.solve(*models.load(source), held_out, 4, 16), 1)
        for source in (settings.TINY_ARITHMETIC, two / "policy")
    )
    # of 1024 samples the standard error is below 0.02
    assert curve["curve"][0]["pass_at_1"] == pytest.approx(start, abs=0.08)
    assert curve["curve"][-1]["pass_at_1"] == pytest.approx(end, abs=0.08)
    assert end - start > 0.15
    assert not [path for path in two.rglob("*") if path.suffix in (".bin", ".pt", ".pth")]


@pytest.mark.slow
def test_each_process_sees_its_half(two):
    """Oracle: prompts that the reward function was given, in each process."""
    first, second = (json.loads((two / f"seen{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) == STEPS + 1 + STEPS // EVERY
    steps = [pair for pair in zip(first, second, strict=True) if len(pair[0]) == 128]
    assert len(steps) == STEPS
    for here, there in steps:
        assert len(set(here)) == len(set(there)) == 16
        assert not set(here) & set(there)
        assert all(len(set(here[i : i + 8])) == 1 for i in range(0, 128, 8))
    evaluated = [
        here + there for here, there in zip(first, second, strict=True) if len(here) == 512
    ]
    wanted = {one.prompt for one in arithmetic.sample(256, 3, "held_out")}
    assert all(set(one) == wanted for one in evaluated)


@pytest.mark.slow
def test_the_process_group_outlives_what_uses_it(two):
    """Oracle: the order in which Python frees them; in the other order a run hangs at its end now
    and then."""
    for rank in (0, 1):
        assert json.loads((two / f"freed{rank}.json").read_text()) == ["reducer", "group"]


@pytest.mark.slow
def test_both_processes_end_with_one_policy(two):
    """Oracle: the weights, to the bit."""
    for name in ("sft", "grpo"):
        first, second = (load_file(two / f"{name}{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first)
    saved = models.load(two / "policy")[0]
    assert all(torch.equal(p, first[name]) for name, p in saved.named_parameters())


@pytest.mark.slow
def test_two_processes_do_what_one_does(two, tmp_path):
    """Oracle: SFT has no luck but its order, so one process with the same global batch must end
    with the same weights, though the halves of a batch have unequal numbers of tokens."""
    policy, tokenizer = models.load(settings.TINY_ARITHMETIC)
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    # Adam would blow up the rounding of gradients that are nearly 0
    scale_out.sft_trainer(policy, tokenizer, SFT_PAIRS, SFT, folder=tmp_path, optim="sgd").train()
    theirs = load_file(two / "sft0.safetensors")
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(theirs[name], parameter.detach(), rtol=0, atol=2e-5)
    assert max((theirs[name] - start[name]).abs().max() for name in start) > 1e-3


def test_the_recorded_curves_of_one_and_two_processes_agree():
    """Oracle: Student's t of the difference of means over seeds, at every step; and both learn."""
    path = ROOT / "rlhf_helpers" / "assets" / "results" / "scaling_out.json"
    found = json.loads(path.read_text())["results"]
    one, two = (torch.tensor([run["pass_at_1"] for run in found[name]]) for name in ("one", "two"))
    assert one.shape == two.shape
    assert len(one) >= 3
    error = ((one.var(0) + two.var(0)) / len(one)).sqrt()
    # eleven looks at eight degrees of freedom: 4.5 is passed by chance once in fifty times
    assert ((one.mean(0) - two.mean(0)).abs() < 4.5 * error).all()
    for curves in (one, two):
        assert (curves[:, -1] - curves[:, 0]).min() > 0.3


def test_costs_are_renewed_beside_the_curves(tmp_path, monkeypatch):
    """Oracle: the file as it was, but for the rows that were measured."""
    script = importlib.import_module("experiments.scaling_out")
    before = script.RECORD.read_text(encoding="utf-8")
    (tmp_path / "record.json").write_text(before, encoding="utf-8")
    monkeypatch.setattr(script, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(script.sys, "argv", ["record", "costs"])
    wanted = json.loads(before)
    for name in ("by_group", "by_prompt", "by_method"):
        monkeypatch.setattr(script.bench_grpo, name, lambda name=name: [name])
        wanted["results"][name] = [name]
    script.main()
    assert json.loads((tmp_path / "record.json").read_text(encoding="utf-8")) == wanted
    monkeypatch.setattr(script.sys, "argv", ["record", "cost"])
    with pytest.raises(SystemExit, match="cost: unknown"):
        script.main()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_a_killed_process_ends_the_run(tmp_path):
    """Oracle: the exit code, and what the launcher says; the run must end long before gloo would
    give up by itself."""
    code, output = launched(KILLED, tmp_path)
    assert code != 0
    assert "went on" not in output
    assert "SIGKILL" in output or "Signal 9" in output


@pytest.mark.slow
def test_a_readers_own_prompts_and_reward_run_in_two_processes(tmp_path):
    """Oracle: the prompts and their columns as the script makes them; the command is that of the
    package's run, with a script in the place of the module."""
    code, output = launched(OWN, tmp_path)
    assert code == 0, output[-3000:]
    first, second = (json.loads((tmp_path / f"own{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) == 3 * 8
    assert all(prompt == f"{10 + n}+{10 + n}=" for prompt, n in first + second)
    for step in range(3):
        here, there = ({p for p, _ in seen[8 * step : 8 * step + 8]} for seen in (first, second))
        assert len(here) == len(there) == 2
        assert not here & there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps=0 must lie in"),
        (["--steps", "15"], "--evaluate-every=10 must divide --steps=15"),
        (["--level", "5"], "--level='5' is unknown"),
        (["--held-out", "99999"], "--held-out=99999 must lie in"),
        (
            ["--prompts", "31"],
            "--prompts=31 cannot be shared equally by 2 processes; make it a mul",
        ),
        (["--held-out", "255"], "--held-out=255 cannot be shared"),
    ],
)
def test_arguments_are_refused_before_anything_starts(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        scale_out.main(["--output", "unused", *arguments])
    assert message in capsys.readouterr().err


def test_trl_knows_its_settings_before_the_model_is_read(tmp_path, monkeypatch):
    """Oracle: the order of calls. Only then can the library divide the weights while it reads them;
    it finds the settings through a weak reference."""
    made, make = [], scale_out.GRPOConfig.__post_init__

    def note(self):
        make(self)
        made.append(weakref.ref(self))

    def load(source):
        gc.collect()
        assert made
        assert made[-1]() is not None
        assert made[-1]().output_dir == str(tmp_path)
        raise InterruptedError(source)

    monkeypatch.setattr(scale_out.GRPOConfig, "__post_init__", note)
    monkeypatch.setattr(scale_out.models, "load", load)
    with pytest.raises(InterruptedError, match="tiny-arithmetic"):
        scale_out.main(["--output", str(tmp_path)])
