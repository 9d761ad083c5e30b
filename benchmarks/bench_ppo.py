"""The whole PPO loop against TRL's GRPO trainer, the nearest that TRL still has.

Same model, prompts, lengths, samples and number of updates; each side in a process of its own, one
thread. TRL's side has no value function; this package is measured with and without one, and with
one prompt at a time in the updates, which gives the same gradient in less memory. Seconds are those
of one iteration (sampling to last update), the fastest of a few after a first one that does not
count. Memory: the peak above what the process holds before its first iteration.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from benchmarks.bench_book import machine
from rlhf_helpers.settings import TINY

SIDES = (
    "this package, value function",
    "value function, in micro-batches",
    "this package, group baseline",
    "TRL GRPO",
)


class Work(NamedTuple):
    """B prompts of P tokens, G samples each of at most C tokens; a few passes over a batch."""

    title: str
    config: GPT2Config
    prompts: int
    group: int
    width: int
    new: int
    epochs: int
    turns: int
    goal: str


WORKS = {
    "tiny": Work(
        "tiny GPT-2 (its shape, random weights)",
        GPT2Config.from_pretrained(TINY),
        16,
        8,
        24,
        24,
        2,
        4,
        "1.3x",
    ),
    "124M": Work(
        "GPT-2 124M (random weights)",
        GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        4,
        8,
        96,
        32,
        2,
        1,
        "1.5x, memory 0.6x",
    ),
}


# what TRL does beside a step, switched off
PLAIN = {
    "gradient_checkpointing": False,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


def prepare(work):
    """A random model, a tokenizer of as many words as it has tokens, and prompts of one length."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(work.config).eval()
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, work.config.vocab_size)}
    inner = Tokenizer(WordLevel(words, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>", padding_side="left"
    )
    model.config.eos_token_id = model.config.pad_token_id = model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 0
    drawn = torch.randint(1, work.config.vocab_size, (64, work.width)).tolist()
    return model, tokenizer, [" ".join(f"w{i}" for i in row) for row in drawn]


def share_of_even_words(prompts=None, completions=None, **columns):
    """A reward that costs nothing to compute."""
    counts = [[int(w[1:]) % 2 == 0 for w in text.split()] or [False] for text in completions]
    return [sum(one) / len(one) for one in counts]


def ours(work, baseline, micro_batch):
    """Seconds of each iteration, collecting and updating apart."""
    from rlhf_helpers.algorithms import ppo

    model, tokenizer, prompts = prepare(work)
    config = ppo.Config(
        iterations=work.turns + 1,
        prompts=work.prompts,
        samples_per_prompt=work.group,
        max_new_tokens=work.new,
        epochs=work.epochs,
        mini_batches=1,
        baseline=baseline,
        micro_batch=micro_batch,
        learning_rate=1e-5,
        value_learning_rate=1e-5,
    )
    settled()
    for metrics in ppo.train(model, tokenizer, prompts, share_of_even_words, config):
        yield metrics.rollout_seconds, metrics.update_seconds


def trl(work):
    """The same of TRL: a step is an update, and every `epochs`-th one samples first."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer, prompts = prepare(work)
    # it loads the reference by the model's name
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ends = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            ends.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    arguments = GRPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=work.prompts * work.group,
        num_generations=work.group,
        num_iterations=work.epochs,
        max_completion_length=work.new,
        beta=0.05,
        max_steps=work.epochs * (work.turns + 1),
        learning_rate=1e-5,
        use_cpu=True,
        **PLAIN,
    )
    trainer = GRPOTrainer(
        model,
        share_of_even_words,
        arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    settled()
    trainer.train()
    marks = ends[:: work.epochs]
    yield from ((0.0, later - earlier) for earlier, later in itertools.pairwise(marks))


def settled():
    """From here on the peak of the memory counts."""
    restart = Path("/proc/self/clear_refs")
    if restart.exists():
        restart.write_text("5")
    MEMORY["before"] = resident("VmRSS")


MEMORY = {}


def resident(field):
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith(field)]
    return found[0] / 1024 if found else float("nan")


def child(name, side):
    torch.set_num_threads(1)
    work = WORKS[name]
    turns = {
        SIDES[0]: lambda: ours(work, "value", None),
        SIDES[1]: lambda: ours(work, "value", 1),
        SIDES[2]: lambda: ours(work, "group", None),
        SIDES[3]: lambda: trl(work),
    }[side]
    found = list(turns())[1:]
    print(json.dumps([*min(found, key=sum), resident("VmHWM") - MEMORY["before"]]))


def measured(script, name, side):
    """What a child process says of one side, its last line of output read as JSON."""
    quiet = os.environ | {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", f"benchmarks.{Path(script).stem}", name, side]
    how = {"cwd": Path(script).resolve().parents[1], "env": quiet, "text": True, "check": True}
    output = subprocess.run(command, stdout=subprocess.PIPE, **how).stdout
    return json.loads(output.splitlines()[-1])


def table(name):
    work = WORKS[name]
    print(
        f"\n{work.title}: {work.prompts} prompts x {work.group} samples, {work.width} prompt and"
        f" {work.new} new tokens, {work.epochs} updates (goal: {work.goal})",
        flush=True,
    )
    found = {side: measured(__file__, name, side) for side in SIDES}
    base = found[SIDES[-1]]
    print(
        f"{'':<34}{'collect':>9}{'update':>9}{'all':>9}{'samples/s':>11}{'speed':>8}{'memory':>12}"
    )
    for side, (collect, update, memory) in found.items():
        whole = collect + update
        parts = f"{collect:8.2f}s{update:8.2f}s" if collect else f"{'':>18}"
        print(
            f"{side:<34}{parts}{whole:8.2f}s{work.prompts * work.group / whole:11.1f}"
            f"{sum(base[:2]) / whole:7.2f}x{memory:8.0f} MiB {memory / base[2]:.2f}x",
            flush=True,
        )


def main(child, table, works):
    """All tables; with the names of a table and a side, one measurement in this process."""
    if len(sys.argv) > 2:
        child(*sys.argv[1:])
        return
    print(machine())
    for name in works:
        table(name)


if __name__ == "__main__":
    main(child, table, WORKS)
