"""Train the tiny GPT-2 that ships with the book, and write its card.  usage: train_tiny_gpt2.py
[FOLDER]

A byte-level BPE tokenizer is trained on reviews of the grammar, then a GPT-2 on reviews that are
never repeated. The same seed gives the same reviews and the same order; weights can differ in the
last digits between machines.
"""

import itertools
import json
import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from rlhf_helpers.rollout import write
from rlhf_helpers.worlds import reviews

FOLDER = Path(__file__).resolve().parents[1] / "rlhf_helpers" / "assets" / "tiny-gpt2"
SEED = 0
VOCABULARY = 1280
STEPS, BATCH, WARM_UP, LEARNING_RATE = 1900, 128, 100, 4e-3
END, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        model_max_length=128,
        padding_side="left",
    )


def new_model(tokenizer, context=128, width=192):
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=context,
        n_embd=width,
        n_layer=2,
        n_head=4,
        # the same function as GPT-2's "gelu_new", as one kernel
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def batches(tokenizer, count):
    """`count` padded batches (tokens, labels) of fresh reviews, similar lengths together."""
    stream = reviews.stream(SEED, "train")
    generator = torch.Generator().manual_seed(SEED)
    while count > 0:
        texts = [review.text for review in itertools.islice(stream, 32 * BATCH)]
        rows = sorted(tokenizer(texts)["input_ids"], key=len)
        order = torch.randperm(32, generator=generator)[:count].tolist()
        for index in order:
            part = rows[index * BATCH : (index + 1) * BATCH]
            # half of the batches begin with the end-of-text token, so that prompts work with and
            # without it
            first = [tokenizer.bos_token_id] * int(torch.rand((), generator=generator) < 0.5)
            yield pad([first + row + [tokenizer.eos_token_id] for row in part])
        count -= len(order)


def pad(rows):
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    return tokens, labels


def train(model, tokenizer):
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * step / STEPS)),
    )
    start = time.perf_counter()
    for step, (tokens, labels) in enumerate(batches(tokenizer, STEPS)):
        # right padding under a causal mask is never seen by what counts, so no attention mask is
        # needed
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(
                f"step {step:5d}  loss {loss:.4f}  {time.perf_counter() - start:4.0f} s", flush=True
            )
    return time.perf_counter() - start


@torch.no_grad()
def surprise(model, tokenizer, heads, bodies):
    """(−log q(body and end | head) of each text [N], counted tokens of each [N])."""
    nats, counts = [], []
    for begin in range(0, len(bodies), 250):
        head = tokenizer(heads[begin : begin + 250])["input_ids"]
        body = tokenizer(bodies[begin : begin + 250])["input_ids"]
        rows = [h + b + [tokenizer.eos_token_id] for h, b in zip(head, body, strict=True)]
        tokens, labels = pad(rows)
        for i, h in enumerate(head):
            labels[i, : len(h)] = -100
        labels = labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            model(tokens).logits[:, :-1].transpose(1, 2), labels, reduction="none"
        )
        nats.append(losses.sum(1))
        counts.append((labels != -100).sum(1))
    return torch.cat(nats), torch.cat(counts)


def evaluate(model, tokenizer, split="held_out", n=4000):
    """Cross-entropy of the model and of the grammar on reviews of films it never saw, nats a token,
    with standard errors."""
    sample = reviews.sample(n, seed=1, split=split)
    end = tokenizer.eos_token
    parts = {
        "review": ([end] * n, [r.text for r in sample], [r.log_prob for r in sample]),
        "body": (
            [r.opening for r in sample],
            [r.body for r in sample],
            [r.body_log_prob for r in sample],
        ),
    }
    measured = {"reviews": n}
    for name, (heads, bodies, log_probs) in parts.items():
        nats, counts = surprise(model, tokenizer, heads, bodies)
        floor = -torch.tensor(log_probs)
        tokens = counts.sum().item()
        excess = (nats - floor) * n / tokens
        measured[name] = {
            "model": round(nats.sum().item() / tokens, 4),
            "grammar": round(floor.sum().item() / tokens, 4),
            "excess": round(excess.mean().item(), 4),
            "excess_standard_error": round(excess.std().item() / n**0.5, 4),
            "tokens": round(tokens / n, 2),
        }
    return measured


CARD = """---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Tiny GPT-2 for film reviews

A `GPT2LMHeadModel` of {parameters:,} parameters ({layers} layers, width {width}, context {context}) in float32, with a byte-level BPE
tokenizer of {vocabulary} tokens. It writes short film reviews and knows nothing else. It is meant for learning and for tests, on a CPU.

## How it was made

`make tiny` in the repository of *RLHF by Experiment*: a tokenizer trained on 40,000 reviews of the grammar in
`rlhf_helpers/worlds/reviews.py`, then {steps} steps of AdamW on {batch} fresh reviews each (seed {seed}; no review is used twice), in
{seconds} s on a machine of two cores. Half of the batches begin with `<|endoftext|>`, so prompts work with and without it. Films
that belong to the validation and held-out splits were never trained on. All text comes from the grammar; no data of
people was used.

## How good it is

Cross-entropy on {reviews:,} reviews of held-out films, nats a token, beside the grammar's own probability of the same texts, below
which no model can stay on average:

| | model | grammar | difference | standard error |
|---|---|---|---|---|
| whole reviews, {review[tokens]:.1f} tokens | {review[model]:.4f} | {review[grammar]:.4f} | {review[excess]:.4f} | {review[excess_standard_error]:.4f} |
| what follows the opening, {body[tokens]:.1f} tokens | {body[model]:.4f} | {body[grammar]:.4f} | {body[excess]:.4f} | {body[excess_standard_error]:.4f} |

Sampled at temperature 1 after {sampled} held-out openings, {grammatical:.0%} of the reviews are ones the grammar could have written,
to the letter. The others mostly judge an aspect twice, or close with a verdict that does not fit.

## Limits

It has read a few hundred words. Sentiment is all it was made to express, and the opinions mean nothing.
"""


def write_card(folder, model, tokenizer, measured):
    config = model.config
    card = CARD.format(
        parameters=model.num_parameters(),
        layers=config.n_layer,
        width=config.n_embd,
        context=config.n_positions,
        vocabulary=len(tokenizer),
        steps=STEPS,
        batch=BATCH,
        seed=SEED,
        **measured,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def share_grammatical(model, tokenizer, n=1000):
    """Of n sampled continuations of held-out openings, the share that the grammar could have
    written."""
    openings = reviews.openings("held_out", n, seed=1)
    texts = write(model, tokenizer, openings, 64, generator=torch.Generator().manual_seed(SEED))
    pairs = zip(openings, texts, strict=True)
    return sum(reviews.parse(opening + text) is not None for opening, text in pairs) / n


def main(folder):
    logging.set_verbosity_error()
    torch.set_num_threads(2)
    tokenizer = train_tokenizer(reviews.texts("train", 40_000, seed=SEED + 1))
    model = new_model(tokenizer)
    seconds = train(model, tokenizer)
    model.eval()
    measured = evaluate(model, tokenizer)
    measured["seconds"] = round(seconds)
    measured |= {"sampled": 1000, "grammatical": share_grammatical(model, tokenizer)}
    print(json.dumps(measured, indent=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, model, tokenizer, measured)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
