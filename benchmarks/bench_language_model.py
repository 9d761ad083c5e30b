"""Sampling and scoring against Hugging Face's generate with a plain forward pass, and against TRL's
path.

Same model, same prompts, one run. Times: the sides take turns in one process, each at every thread
count, and its fastest turn counts. Memory: each side in a process of its own; the peak of one turn
above what the process holds once the model is loaded and everything has run once, small.
"""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from benchmarks.bench_book import machine
from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.rollout import Rollout, sample
from rlhf_helpers.settings import TINY

SHIPPED = (Path(TINY) / "model.safetensors").exists()
SIDES = ("this package", "generate + forward", "TRL")


class Work(NamedTuple):
    """B prompts of P tokens, G samples each of at most C tokens; a turn is one run per seed."""

    title: str
    model: str
    prompts: int
    group: int
    width: int
    new: int
    turns: int
    seeds: tuple[int, ...]
    goal: str


WORKS = {
    "tiny": Work("tiny GPT-2", "tiny", 64, 1, 24, 24, 4, (1, 2, 3), "sampling 1.3x"),
    "tiny-groups": Work("tiny GPT-2", "tiny", 8, 8, 24, 24, 4, (1, 2, 3), "sampling 1.3x"),
    "124M": Work("GPT-2 124M", "124M", 4, 8, 96, 32, 2, (1,), "sampling + scoring 2x, memory 0.5x"),
}


# The model and its prompts


def tiny_work(work):
    """The book's own model on reviews cut short of their end, or random weights of its shape."""
    if SHIPPED:
        from rlhf_helpers import models
        from rlhf_helpers.worlds import reviews

        model, tokenizer = models.load(TINY)
        rows = tokenizer(reviews.texts("train", work.prompts))["input_ids"]
        rows = [row[: -1 - i % work.new] or row[:1] for i, row in enumerate(rows)]
        rows = [row[-work.width :] for row in rows]
        mask = torch.tensor([[0] * (work.width - len(row)) + [1] * len(row) for row in rows])
        tokens = torch.zeros_like(mask)
        tokens[mask.bool()] = torch.tensor([token for row in rows for token in row])
        return model, tokens, mask, [tokenizer.eos_token_id]
    config = GPT2Config(vocab_size=1024, n_positions=128, n_embd=144, n_layer=3, n_head=4)
    tokens, mask = random_prompts(work, config.vocab_size)
    # random weights hardly ever end: a twenty-fourth of the vocabulary does it for them
    return GPT2LMHeadModel(config), tokens, mask, list(range(config.vocab_size // 24))


def random_prompts(work, vocabulary):
    tokens = torch.randint(vocabulary // 2, vocabulary, (work.prompts, work.width))
    return tokens, torch.ones_like(tokens)


def prepare(name, device, dtype):
    """Model, prompts, their mask and the end tokens."""
    torch.manual_seed(0)
    logging.set_verbosity_error()
    work = WORKS[name]
    if work.model == "tiny":
        model, tokens, mask, ends = tiny_work(work)
    else:
        model = GPT2LMHeadModel(GPT2Config())
        tokens, mask = random_prompts(work, 50257)
        ends = [50256]
    model = model.to(device, dtype).eval()
    return model, tokens.to(device), mask.to(device), ends


# The sides: each samples, then scores with the gradient


def ours(model, tokens, mask, ends, work):
    options = {"eos_token_id": ends, "pad_token_id": ends[0], "samples_per_prompt": work.group}
    rollout = sample(model, tokens, mask, work.new, **options)
    yield rollout
    length = rollout.tokens.shape[1] - work.width
    yield completion_log_probs(
        model, rollout.tokens, rollout.attention_mask, length, samples_per_prompt=work.group
    )


def generated(model, tokens, mask, ends, work):
    """Rollout by generate; like TRL's, its masks are made afterwards from the first end token."""
    options = {"do_sample": True, "top_k": 0, "eos_token_id": ends, "pad_token_id": ends[0]}
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=work.new, **options)
    is_end = torch.isin(out[:, work.width :], torch.tensor(ends, device=out.device))
    counted = (is_end.cumsum(-1) - is_end.long()) == 0
    return Rollout(out, torch.cat([mask, counted.long()], 1), counted, None, work.width)


def plain(model, tokens, mask, ends, work):
    tokens, mask = (each.repeat_interleave(work.group, 0) for each in (tokens, mask))
    with torch.no_grad():
        rollout = generated(model, tokens, mask, ends, work)
    yield rollout
    ids, mask = rollout.tokens, rollout.attention_mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, work.width - 1 : -1]
    log_probs = logits.float().log_softmax(-1).gather(-1, ids[:, work.width :, None]).squeeze(-1)
    yield log_probs * rollout.completion_mask


def trl(model, tokens, mask, ends, work):
    """What GRPOTrainer does: generate on repeated prompts, then its own scoring method.

    Its scoring leaves out position ids, so on padded prompts of GPT-2 the numbers differ.
    """
    from trl import GRPOTrainer

    tokens, mask = (each.repeat_interleave(work.group, 0) for each in (tokens, mask))
    with torch.no_grad():
        rollout = generated(model, tokens, mask, ends, work)
    yield rollout
    # the method without its profiling, which would want a whole trainer
    score = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=contextlib.nullcontext))
    length = rollout.tokens.shape[1] - work.width
    ids, mask = rollout.tokens, rollout.attention_mask
    yield score(trainer, model, ids, mask, length, compute_entropy=True)[0]


def turn(side, model, *rest):
    """Seconds of sampling and of scoring with the gradient, and the number of sampled tokens."""
    model.zero_grad()
    start = clock(model)
    steps = {"this package": ours, "generate + forward": plain, "TRL": trl}[side](model, *rest)
    rollout = next(steps)
    middle = clock(model)
    log_probs = next(steps)
    (log_probs * rollout.completion_mask).sum().backward()
    return middle - start, clock(model) - middle, rollout.completion_mask.sum().item()


def runs(side, prepared, work):
    """Turns from the same seeds each time, so that a side's sequences end where they did before."""
    for seed in work.seeds:
        torch.manual_seed(seed)
        yield turn(side, *prepared, work)


def patched_for(side, model):
    """TRL patches the model's forward method; the others get a model that it has not touched."""
    if side == "TRL":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))


def clock(model):
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# Measuring, each kind in a process of its own


def matrix_rate(device, dtype):
    """Operations a second of a large matrix product."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    times = []
    for _ in range(3):
        start = clock(a)
        a @ a
        times.append(clock(a) - start)
    return 2 * 2048**3 / min(times)


def copy_rate(device):
    """Bytes a second, read and written together, when a large tensor is copied."""
    a = torch.empty(2**28, device=device, dtype=torch.uint8)
    b, times = torch.empty_like(a), []
    for _ in range(8):
        start = clock(a)
        b.copy_(a)
        times.append(clock(a) - start)
    return 2 * a.numel() / min(times)


def measure_times(name, device, dtype):
    work, models = WORKS[name], {}
    for side in SIDES:
        models[side] = prepare(name, device, dtype)
        patched_for(side, models[side][0])
    flops, best, rate = {}, {}, 0.0
    for side in SIDES:
        with FlopCounterMode(display=False) as counter:
            list(runs(side, models[side], work))
        flops[side] = counter.get_total_flops()
    threads = (
        sorted({1, 2, torch.get_num_threads()}) if device == "cpu" else [torch.get_num_threads()]
    )
    for _ in range(work.turns):
        for count in threads:
            torch.set_num_threads(count)
            rate = max(rate, matrix_rate(device, dtype))
            for side in SIDES:
                sampling, scoring, tokens = map(
                    sum, zip(*runs(side, models[side], work), strict=True)
                )
                key = f"{side}/{count}"
                old = best.get(key, (1e9, 1e9, 0))
                best[key] = min(old[0], sampling), min(old[1], scoring), tokens
    weights = sum(p.numel() * p.element_size() for p in models[SIDES[0]][0].parameters())
    copying = copy_rate(device)
    return {"best": best, "flops": flops, "rate": rate, "weights": weights, "copying": copying}


def measure_memory(name, device, dtype, side):
    model, tokens, mask, ends = prepare(name, device, dtype)
    patched_for(side, model)
    work = WORKS[name]
    small = work._replace(group=1, new=2)
    turn(side, model, tokens[:1], mask[:1], ends, small)
    model.zero_grad()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        turn(side, model, tokens, mask, ends, work)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    restart = Path("/proc/self/clear_refs")
    if not restart.exists():
        return float("nan")
    # VmHWM starts again from what is resident now
    restart.write_text("5")
    before = resident("VmRSS")
    turn(side, model, tokens, mask, ends, work)
    return resident("VmHWM") - before


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def in_a_process(*arguments):
    command = [sys.executable, "-m", "benchmarks.bench_language_model", *arguments]
    how = {"cwd": Path(__file__).resolve().parents[1], "text": True, "check": True}
    output = subprocess.run(command, stdout=subprocess.PIPE, **how).stdout
    return json.loads(output.splitlines()[-1])


# The tables


def fastest(best, side, column):
    """(seconds, threads) of the side's best thread count; column 0 sampling, 1 scoring, None
    both."""
    found = []
    for key, (sampling, scoring, _) in best.items():
        name, threads = key.split("/")
        if name == side:
            seconds = sampling + scoring if column is None else (sampling, scoring)[column]
            found.append((seconds, int(threads)))
    return min(found)


def table(name, device, dtype):
    work = WORKS[name]
    random = "" if work.model == "tiny" and SHIPPED else ", random weights"
    print(
        f"\n{work.title}{random}, {device} {dtype}: {work.prompts} prompts x {work.group} samples, "
        f"{work.width} prompt and {work.new} new tokens (goal: {work.goal})",
        flush=True,
    )
    found = in_a_process("times", name, device, dtype)
    memory = {side: in_a_process("memory", name, device, dtype, side) for side in SIDES}
    best, base = found["best"], "generate + forward"
    print(
        f"{'':<20}{'sampling':>16}{'scoring':>16}{'both':>16}{'peak memory':>20}{'of matmul':>11}"
    )
    for side in SIDES:
        cells = []
        for column in (0, 1, None):
            seconds, threads = fastest(best, side, column)
            ratio = fastest(best, base, column)[0] / seconds
            cells.append(f"{seconds * 1e3:7.0f}ms/{threads} {ratio:4.2f}x")
        share = found["flops"][side] / fastest(best, side, None)[0] / found["rate"]
        size = f"{memory[side]:9.0f} MiB {memory[side] / memory[base]:4.2f}x"
        print(
            f"{side:<20}{''.join(f'{cell:>16}' for cell in cells)}{size:>20}{share:>10.0%}",
            flush=True,
        )
    print_limit(found, work)


def print_limit(found, work):
    seconds, _ = fastest(found["best"], SIDES[0], 0)
    tokens = next(value[2] for key, value in found["best"].items() if key.startswith(SIDES[0]))
    limit = work.prompts * work.group * found["copying"] / found["weights"]
    print(
        f"matmul {found['rate'] / 1e9:.0f} GFLOP/s; this package samples {tokens / seconds:,.0f} "
        f"tokens/s, {tokens / seconds / limit:.1%} of reading all weights once a step at "
        f"{found['copying'] / 1e9:.1f} GB/s"
    )


def main():
    print(machine())
    print("ms/threads: the fastest turn and its thread count; x: generate + forward over this side")
    for name in WORKS:
        table(name, "cpu", "float32")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
        for dtype in ("float32", "bfloat16"):
            for name in WORKS:
                table(name, "cuda", dtype)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        kind, name, device, dtype, *side = sys.argv[1:]
        measure = {"times": measure_times, "memory": measure_memory}[kind]
        print(json.dumps(measure(name, device, getattr(torch, dtype), *side)))
