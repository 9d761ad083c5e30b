"""Train the tiny GPT-2 that adds, and write its card.  usage: train_tiny_arithmetic.py [FOLDER]

A GPT-2 learns, from random weights, what a careless writer makes of problems of the training split.
The same seed gives the same demonstrations and the same order; weights can differ in the last
digits between machines.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

from experiments import train_tiny_gpt2
from rlhf_helpers.algorithms import sft
from rlhf_helpers.rollout import write
from rlhf_helpers.worlds import arithmetic

FOLDER = Path(__file__).resolve().parents[1] / "rlhf_helpers" / "assets" / "tiny-arithmetic"
SEED = 0
STEPS, BATCH, WARM_UP, LEARNING_RATE = 3000, 128, 0.03, 2e-3
PROBLEMS, SAMPLES = 200, 64  # of each level, to measure the pass rates


def new_model(tokenizer):
    return train_tiny_gpt2.new_model(tokenizer, arithmetic.CONTEXT, width=64)


def train(model, tokenizer):
    """Seconds that it took."""
    pairs = arithmetic.demonstrations(STEPS * BATCH, SEED)
    config = sft.Config(learning_rate=LEARNING_RATE, batch_size=BATCH, warm_up=WARM_UP, seed=SEED)
    start = time.perf_counter()
    for now in sft.train(model, tokenizer, pairs, config):
        if now.step % 500 == 0 or now.step == STEPS:
            print(
                f"step {now.step:5d}  loss {now.loss:.4f}  {time.perf_counter() - start:4.0f} s",
                flush=True,
            )
    return time.perf_counter() - start


def rewards_of(model, tokenizer, problems, samples, **how):
    """Right or wrong, [problems, samples], and the share of the completions that have steps."""
    texts = write(
        model,
        tokenizer,
        [problem.prompt for problem in problems],
        arithmetic.MAX_NEW_TOKENS,
        samples_per_prompt=samples,
        **how,
    )
    answers = [problem.answer for problem in problems for _ in range(samples)]
    right = torch.tensor(arithmetic.exact(answers, texts, answers)).view(-1, samples)
    return right, sum("=" in text for text in texts) / len(texts)


def evaluate(model, tokenizer, problems=PROBLEMS, samples=SAMPLES):
    """Pass rates by level on held-out problems: sampled at temperature 1, greedy, and at k
    samples."""
    measured = {}
    for level in arithmetic.LEVELS:
        count = min(problems, len(arithmetic.problems(level, "held_out")))
        some = arithmetic.sample(count, level, "held_out", SEED)
        generator = torch.Generator().manual_seed(SEED)
        right, worked = rewards_of(model, tokenizer, some, samples, generator=generator)
        greedy, _ = rewards_of(model, tokenizer, some, 1, top_k=1)
        measured[level] = {
            "problems": count,
            "pass@1": round(right.mean().item(), 4),
            "standard error": round((right.mean(1).std() / count**0.5).item(), 4),
            "greedy": round(greedy.mean().item(), 4),
            f"pass@{samples}": round(arithmetic.pass_at_k(right, samples), 4),
            "with steps": round(worked, 4),
        }
    return measured


CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# Tiny GPT-2 that adds, carelessly

A `GPT2LMHeadModel` of {parameters:,} parameters ({layers} layers, width {width}, context {context}) in float32, with a tokenizer of
one token a character ({vocabulary} in all). It goes on from a sum such as `37+58=` with the answer, or with steps and the answer
(`15+80=95`). It is meant for learning and for tests, on a CPU: a policy that is right now and then, for reinforcement learning
with verifiable rewards to start from.

## How it was made

`make arithmetic` in the repository of *RLHF by Experiment*: {steps} steps of AdamW on {batch} demonstrations each (seed {seed}) of the
training split of `rlhf_helpers/worlds/arithmetic.py`, in {seconds} s on one core. The demonstrations are made by a careless
writer: {wrong:.0%} of them end in a wrong answer. Held-out problems were never trained on, in either order of their numbers. No
data of people was used.

## How often it is right

On held-out problems, {samples} samples each at temperature 1; the standard error is over problems. Greedy takes the likeliest token
each time.

| level | such as | problems | pass@1 | standard error | greedy | pass@{samples} | with steps |
|---|---|---|---|---|---|---|---|
{rows}

## Limits

It adds numbers of the sizes that it was trained on, and knows nothing else. It is wrong often, on purpose.
"""


def share_wrong(n=10_000):
    """Of n demonstrations, the share that end in a wrong answer."""
    pairs = arithmetic.demonstrations(n, SEED)
    answers = [sum(map(int, prompt[:-1].split("+"))) for prompt, _ in pairs]
    texts = [text for _, text in pairs]
    return 1 - sum(arithmetic.exact(texts, texts, answers)) / n


def write_card(folder, model, tokenizer, measured, seconds):
    rows = []
    for level, found in measured.items():
        example = arithmetic.sample(1, level, "held_out", SEED)[0].prompt
        rows.append(f"| {level} | `{example}` | " + " | ".join(map(str, found.values())) + " |")
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
        seconds=round(seconds),
        wrong=share_wrong(),
        samples=SAMPLES,
        rows="\n".join(rows),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def main(folder):
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer = arithmetic.tokenizer()
    model = new_model(tokenizer)
    seconds = train(model, tokenizer)
    model.eval()
    measured = evaluate(model, tokenizer)
    print(json.dumps(measured, indent=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, model, tokenizer, measured, seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
