"""Supervised fine-tuning: the loss and its gradient are the library's, masks come from lengths,
runs repeat."""

import copy
import re

import pytest
import torch
from architectures import EOS, VOCABULARY, build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_helpers.algorithms import sft
from rlhf_helpers.algorithms._loop import TrainingStopped
from rlhf_helpers.models import lora_policy

WORDS = ["<end>", *"abcdefghijklmnopqrstuvwxyz."]
PAIRS = [("a b", "c d e"), ("f", "g"), ("h i j k", "l m n"), ("a", "b c d e f g"), ("x y", "z .")]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # pad and end are one token: the hard case
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


@pytest.fixture
def model():
    return build("gpt2", dtype=torch.float64)


def right_padded(tokenizer, pairs, response_only):
    """Rows as most libraries lay them out: tokens, then padding; labels −100 where nothing is
    trained."""
    rows = []
    for prompt, response in pairs:
        ids = [tokenizer(text)["input_ids"] for text in (prompt, response)]
        labels = ([-100] * len(ids[0]) if response_only else ids[0]) + ids[1] + [EOS]
        rows.append((ids[0] + ids[1] + [EOS], labels))
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [EOS] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([lab + [-100] * (width - len(lab)) for _, lab in rows])
    return tokens, labels


@pytest.mark.equation("eq:sft-loss")
@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_the_loss_is_the_librarys_cross_entropy(model, tokenizer, loss_on):
    """Oracle: the loss that transformers computes from labels, on right-padded rows; value and
    gradient."""
    batch = sft.collate(sft.encode(tokenizer, PAIRS), tokenizer.pad_token_id, loss_on)
    loss = sft.sft_loss(model, batch)
    loss.backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    tokens, labels = right_padded(tokenizer, PAIRS, loss_on == "response")
    wanted = other(tokens, labels=labels).loss
    wanted.backward()
    # the library computes its loss in float32
    assert torch.allclose(loss, wanted.double(), atol=1e-6)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)


@pytest.mark.equation("eq:sft-loss")
def test_the_loss_by_hand(tokenizer):
    """Oracle: a model that knows nothing gives every token 1/V, so the loss is log V whatever the
    lengths."""
    model = build("gpt2", spread=0.0)
    batch = sft.collate(sft.encode(tokenizer, PAIRS), EOS)
    assert sft.sft_loss(model, batch).item() == pytest.approx(
        torch.tensor(float(VOCABULARY)).log().item(), abs=1e-5
    )


def test_trl_gives_the_same_loss_on_the_same_batch(tokenizer, tmp_path):
    """Oracle: TRL's SFTTrainer with its own collator, on prompts and completions of the same
    tokens."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = build("gpt2")
    examples = sft.encode(tokenizer, PAIRS)
    rows = [{"prompt": prompt, "completion": f" {response}"} for prompt, response in PAIRS]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        completion_only_loss=True,
        max_length=None,
    )
    trainer = SFTTrainer(
        model=copy.deepcopy(model),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    mine = sft.sft_loss(model, sft.collate(examples, EOS))
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_the_end_is_trained_though_it_is_the_pad_token(tokenizer):
    batch = sft.collate(sft.encode(tokenizer, PAIRS), tokenizer.pad_token_id)
    responses = batch.tokens[:, -batch.loss_mask.shape[1] :]
    for row, mask, (_, text) in zip(responses, batch.loss_mask, PAIRS, strict=True):
        assert mask.sum() == len(text.split()) + 1
        assert row[mask.sum() - 1] == EOS
        assert mask[: mask.sum()].all()


def test_prompts_end_in_one_column(tokenizer):
    batch = sft.collate(sft.encode(tokenizer, PAIRS), 7)
    columns = batch.loss_mask.shape[1]
    for row, mask, (prompt, _) in zip(batch.tokens, batch.attention_mask, PAIRS, strict=True):
        words = [WORDS[i] for i in row[:-columns][mask[:-columns] == 1].tolist()]
        assert words == prompt.split()
    assert (batch.tokens[batch.attention_mask == 0] == 7).all()


def test_all_tokens_but_the_first_are_trained_with_loss_on_all(tokenizer):
    batch = sft.collate(sft.encode(tokenizer, PAIRS), EOS, "all")
    lengths = [len(f"{p} {r}".split()) + 1 for p, r in PAIRS]
    assert batch.loss_mask.sum(1).tolist() == [n - 1 for n in lengths]


def test_batches_hold_every_example_once_an_epoch(tokenizer):
    examples = sft.encode(tokenizer, [(a, b) for a in "abcd" for b in "efg"])
    config = sft.Config(batch_size=4, epochs=2)
    rows = [tuple(row.tolist()) for batch in sft.batches(examples, config, EOS) for row in batch[0]]
    everything = {(*e.prompt, *e.response) for e in examples}
    assert set(rows[:12]) == set(rows[12:]) == everything
    assert rows[:12] != rows[12:]
    five, all_of_them = (
        len(list(sft.batches(examples, sft.Config(batch_size=n), EOS))) for n in (5, 50)
    )
    assert (five, all_of_them) == (2, 1)


def test_training_learns_and_repeats(tokenizer):
    pairs = [("a b", "c d e"), ("f", "g h")] * 8
    config = sft.Config(learning_rate=1e-2, batch_size=8, epochs=30)
    runs = []
    for _ in range(2):
        policy = build("gpt2", spread=0.05).train()
        runs.append([m.loss for m in sft.train(policy, tokenizer, pairs, config)])
    assert runs[0] == runs[1]
    assert len(runs[0]) == 60
    assert runs[0][-1] < 0.2 < 2 < runs[0][0]
    nats, tokens = sft.surprise(policy, tokenizer, pairs[:2])
    assert tokens.tolist() == [4, 3]
    assert (nats / tokens).mean() < 0.2


def test_an_adapter_leaves_the_base_alone(tokenizer):
    base = build("gpt2")
    before = {name: p.clone() for name, p in base.named_parameters()}
    policy = lora_policy(base, rank=2)
    list(sft.train(policy, tokenizer, PAIRS, sft.Config(learning_rate=0.1, epochs=3)))
    moved = [
        n for n, p in policy.named_parameters() if p.requires_grad and "lora_B" in n and p.any()
    ]
    assert moved
    for name, parameter in policy.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, before[name.replace("base_layer.", "")])


def test_surprise_is_one_sequence_at_a_time(model, tokenizer):
    """Oracle: each pair alone, unpadded, through log_softmax."""
    nats, tokens = sft.surprise(model, tokenizer, PAIRS, batch_size=2)
    for i, example in enumerate(sft.encode(tokenizer, PAIRS)):
        ids = torch.tensor([example.prompt + example.response])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        picked = log_probs.gather(1, ids[0, 1:, None])[len(example.prompt) - 1 :]
        assert nats[i].item() == pytest.approx(-picked.sum().item(), abs=1e-9)
        assert tokens[i] == len(example.response)
    assert not nats.requires_grad


@pytest.mark.parametrize(
    ("pairs", "config", "message"),
    [
        ([], {}, "pairs is empty"),
        ([("a", "b"), ("a", "")], {}, "pairs[1] has an empty response"),
        (PAIRS, {"learning_rate": 0.0}, "learning_rate=0.0 must lie in"),
        (PAIRS, {"epochs": 0}, "epochs=0 must lie in"),
        (PAIRS, {"batch_size": 0}, "batch_size=0 must lie in"),
        (PAIRS, {"warm_up": 1.5}, "warm_up=1.5 must lie in"),
        (PAIRS, {"max_grad_norm": 0.0}, "max_grad_norm=0.0 must lie in"),
        (PAIRS, {"loss_on": "prompt"}, "loss_on='prompt' is unknown; use one of 'response', 'all'"),
    ],
)
def test_bad_input_is_named(tokenizer, pairs, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(sft.train(build("gpt2"), tokenizer, pairs, sft.Config(**config)))


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer):
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[3] = float("nan")
    with pytest.raises(TrainingStopped, match=r"loss holds a NaN .* lower learning_rate"):
        list(sft.train(model, tokenizer, PAIRS, sft.Config()))


def test_a_tokenizer_without_an_end_is_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    plain = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ValueError, match="no end-of-text token"):
        sft.encode(plain, [("a", "b")])


def test_held_out_is_measured_when_due_and_every_token_counts_alike(tokenizer):
    """Oracle: the steps by counting; the cross-entropy by hand from each pair alone."""
    policy = build("gpt2")
    config = sft.Config(batch_size=5, epochs=5, evaluate_every=2, learning_rate=1e-2)
    history = list(sft.train(policy, tokenizer, PAIRS, config, held_out=PAIRS[2:4]))
    assert [one.step for one in history if one.held_out is not None] == [2, 4, 5]
    alone = [sft.surprise(policy, tokenizer, [pair]) for pair in PAIRS[2:4]]
    (a, b), (m, n) = zip(*[(nats.item(), count.item()) for nats, count in alone], strict=True)
    assert m != n
    assert history[-1].held_out == pytest.approx((a + b) / (m + n), abs=1e-5)
    assert history[-1].held_out != pytest.approx((a / m + b / n) / 2, abs=1e-3)


def test_a_run_may_be_all_warm_up(tokenizer):
    """Oracle: by hand, a straight line that ends at the highest rate."""
    config = sft.Config(batch_size=5, epochs=4, warm_up=1.0, learning_rate=1e-2)
    rates = [one.learning_rate for one in sft.train(build("gpt2"), tokenizer, PAIRS, config)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
