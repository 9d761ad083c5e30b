"""Runs of the loops over given data and of online DPO that stop and go on, as `test_ppo.py` and
`test_grpo.py` have it for theirs.

Called as a script, this file is the runs that get killed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from architectures import build
from killing import ending, in_child, needs_fork, tear_a_write
from numbers_and_words import WORDS, letters
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from rlhf_helpers import checkpoint, models
from rlhf_helpers.algorithms import dpo, reward_model, sft
from rlhf_helpers.algorithms._loop import trained
from rlhf_helpers.algorithms.reward_model import Comparison

PAIRS = [("a b", "c d e"), ("f", "g"), ("h i j k", "l m n"), ("a", "b c d e f g"), ("x y", "z .")]
HELD_OUT = [("b", "c d"), ("y x", "w")]
DATA = [
    Comparison("a b", ("c d e", "f")),
    Comparison("g", ("h", "i j k l")),
    Comparison("m n o", ("p q", "r s t")),
    Comparison("u", ("v w x", "y z"), preference=0.5),
    Comparison("u v", ("v", "y z .")),
]
UNSEEN = [Comparison("b c", ("d", "e f"))]
PROMPTS = ["a b", "c", "d e f g", "h i", "j"]
TOKENIZER = letters()
STEPS = 6
OFTEN = {"learning_rate": 1e-2, "batch_size": 2, "epochs": 3, "evaluate_every": 2}


def early(prompts, completions, **columns):
    """Letters from the beginning of the alphabet are worth more."""
    return [sum(w < "m" for w in text.split()) + len(text) / 9 for text in completions]


def late(prompts, completions, **columns):
    return [-score for score in early(prompts, completions)]


def language_model(rank=None, dtype=torch.float32):
    model = build("gpt2", dtype=dtype, spread=0.1, vocab_size=len(WORDS))
    return models.lora_policy(model, rank) if rank else model


def scorer(rank=None, dtype=torch.float32):
    model, _ = reward_model.load(build("gpt2", dtype=dtype, vocab_size=len(WORDS)), TOKENIZER)
    if not rank:
        return model
    where = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    return get_peft_model(model, LoraConfig(r=rank, task_type="SEQ_CLS", **where))


def tuned(model, folder=None, config=(), pairs=PAIRS, held_out=HELD_OUT, save_every=2):
    settings = sft.Config(**OFTEN | dict(config))
    return sft.train(model, TOKENIZER, pairs, settings, held_out, folder, save_every)


def preferred(model, folder=None, config=(), pairs=DATA, held_out=UNSEEN, save_every=2, cache=None):
    settings = dpo.Config(**OFTEN | {"max_new_tokens": 4} | dict(config))
    both = (dpo.encode(TOKENIZER, pairs), dpo.encode(TOKENIZER, held_out))
    return dpo.train(model, TOKENIZER, both[0], settings, both[1], cache, folder, save_every)


def judged(model, folder=None, config=(), pairs=PROMPTS, reward=early, save_every=2):
    some = {"iterations": STEPS, "prompts": 2, "samples_per_prompt": 3, "max_new_tokens": 4}
    settings = dpo.Config(**{"learning_rate": 1e-2, "batch_size": 1} | some | dict(config))
    return dpo.online(model, TOKENIZER, pairs, reward, settings, folder, save_every)


def compared(model, folder=None, config=(), pairs=DATA, held_out=UNSEEN, save_every=2):
    settings = reward_model.Config(**OFTEN | dict(config))
    given = (settings, held_out, folder, save_every)
    return reward_model.train(model, TOKENIZER, pairs, *given)


def with_ties(model, folder=None, config=(), **changes):
    return compared(model, folder, {"loss": "rao-kupper"} | dict(config), **changes)


LOOPS = {
    "sft": (tuned, language_model),
    "dpo": (preferred, language_model),
    "online dpo": (judged, language_model),
    "reward model": (compared, scorer),
    "ties": (with_ties, scorer),
}
every_loop = pytest.mark.parametrize("loop", LOOPS)


def bits(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def words(history):
    """Metrics as texts, in which a NaN is a NaN and a type is itself."""
    return [repr(metrics) for metrics in history]


def stopped(run, steps):
    for _ in range(steps):
        next(run)
    run.close()


# --- a run that goes on --------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "LoRA"])
@every_loop
def test_a_run_that_goes_on_is_the_run_that_nobody_stopped(tmp_path, loop, rank):
    """Oracle: the same run without a folder, which is not stopped. The generator of torch and the
    random half of an adapter are others when a run goes on."""
    train, make = LOOPS[loop]
    torch.manual_seed(0)
    straight = make(rank)
    wanted = list(train(straight))
    assert len(wanted) == STEPS
    for steps in (1, 3, 4, STEPS):
        torch.manual_seed(0)
        stopped(train(make(rank), tmp_path / str(steps)), steps)
        torch.manual_seed(0 if steps == 1 else steps)
        again = make(rank)
        found = list(train(again, tmp_path / str(steps)))
        assert words(found) == words(wanted), steps
        assert all(torch.equal(w, bits(straight)[n]) for n, w in bits(again).items()), steps


@every_loop
def test_checkpoints_come_when_due_and_two_are_kept(tmp_path, loop):
    """Oracle: the steps that stand in the folder after each step."""
    train, make = LOOPS[loop]
    steps = []
    for _ in train(make(), tmp_path, save_every=4):
        steps.append([int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))])
    assert steps == [[], [], [], [4], [4], [4, 6]]
    list(train(make(), tmp_path / "each", save_every=1))
    names = [path.name for path in sorted((tmp_path / "each").iterdir())]
    assert names == ["step-000005", "step-000006"]


def test_an_interval_below_one_is_refused():
    for train, make in LOOPS.values():
        with pytest.raises(ValueError, match="save_every"):
            next(train(make(), save_every=0))


@every_loop
def test_a_half_trained_model_is_refused_with_what_to_do(tmp_path, loop):
    """Oracle: the specification: before and after the first checkpoint."""
    train, make = LOOPS[loop]
    for steps in (1, 3):
        model, folder = make(), tmp_path / str(steps)
        stopped(train(model, folder), steps)
        name = "model" if make is scorer else "policy"
        before = bits(model)
        with pytest.raises(ValueError, match=f"load the {name} anew, as it was at the start"):
            next(train(model, folder))
        assert all(torch.equal(w, before[n]) for n, w in bits(model).items())


CHANGES = {
    "a seed": ({"config": {"seed": 1}}, r"config\['seed'\] is 0 there and 1 here"),
    "a rate": ({"config": {"learning_rate": 0.02}}, r"config\['learning_rate'\] is 0\.01 there"),
}
OTHER_DATA = [
    ("sft", {"pairs": PAIRS[::-1]}, "pairs is"),
    ("sft", {"pairs": [*PAIRS[:-1], ("x y", models.Cut("z ."))]}, "pairs is"),
    ("sft", {"held_out": HELD_OUT[:1]}, "held_out is"),
    ("dpo", {"pairs": DATA[::-1]}, "data is"),
    ("dpo", {"pairs": [*DATA[:-1], DATA[-1]._replace(preference=0.9)]}, "data is"),
    ("dpo", {"held_out": DATA[:1]}, "held_out is"),
    ("online dpo", {"pairs": PROMPTS[::-1]}, "prompts is"),
    ("online dpo", {"reward": late}, r"reward is '.*early' there and '.*late' here"),
    ("reward model", {"pairs": DATA[::-1]}, "data is"),
    ("reward model", {"pairs": [*DATA[:-1], DATA[-1]._replace(margin=0.9)]}, "data is"),
    ("reward model", {"held_out": DATA[:1]}, "held_out is"),
]
CASES = [(loop, *CHANGES[what]) for loop in LOOPS for what in CHANGES] + OTHER_DATA


@pytest.mark.parametrize(("loop", "change", "message"), CASES)
def test_another_run_is_not_gone_on_with(tmp_path, loop, change, message):
    """Oracle: the specification: what differs is named, and no weight is touched."""
    train, make = LOOPS[loop]
    stopped(train(make(), tmp_path), 3)
    model = make()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        next(train(model, tmp_path, **change))
    assert all(torch.equal(w, before[n]) for n, w in bits(model).items())


def test_the_reference_is_computed_once(tmp_path, monkeypatch):
    """Oracle: the calls of what computes it."""
    stopped(preferred(language_model(), tmp_path, held_out=DATA[:1]), 3)
    calls, inner = [], dpo._reference
    monkeypatch.setattr(dpo, "_reference", lambda *a: calls.append(1) or inner(*a))
    list(preferred(language_model(), tmp_path, held_out=DATA[:1]))
    assert not calls
    list(preferred(language_model(), held_out=DATA[:1]))
    assert calls == [1]


def test_a_run_without_a_pair_says_why_when_it_has_gone_on(tmp_path):
    """Oracle: the message of the same run undisturbed."""

    def equal(prompts, completions, **columns):
        return [0.0] * len(completions)

    messages = []
    for folder in (None, tmp_path):
        if folder:
            stopped(judged(language_model(), folder, reward=equal), 3)
        with pytest.raises(ValueError, match="no prompt gave a pair") as caught:
            list(judged(language_model(), folder, reward=equal))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "12 of the prompts" in messages[0]


@pytest.mark.parametrize("bad", [(1.0, 2.0), 0.5, "text"], ids=str)
@pytest.mark.parametrize("loop", ["dpo", "reward model"])
def test_metrics_of_another_layout_are_refused_and_nothing_is_overwritten(
    tmp_path, monkeypatch, loop, bad
):
    """Oracle: the weights before. What was said of held-out data is a tuple of its own."""
    train, make = LOOPS[loop]
    stopped(train(make(), tmp_path), 3)
    load = checkpoint.load

    def changed(*given):
        found = load(*given)
        found.state["history"][1][found.state["metrics"].index("held_out")] = bad
        return found

    monkeypatch.setattr(checkpoint, "load", changed)
    model = make()
    before = bits(model)
    with pytest.raises(ValueError, match=r"state\['history'\]\[1\]\[\d+\] is a"):
        next(train(model, tmp_path))
    assert all(torch.equal(w, before[n]) for n, w in bits(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [None, 2], ids=["full", "LoRA"])
@every_loop
def test_a_checkpoint_holds_what_is_trained_and_its_two_moments_alone(tmp_path, loop, rank, dtype):
    """Oracle: the numbers that require a gradient, counted on the model, tied ones once; all else
    (generators, steps, log-probabilities of the reference) is small."""
    train, make = LOOPS[loop]
    model = make(rank, dtype)
    list(train(model, tmp_path))
    with safe_open(tmp_path / f"step-{STEPS:06d}" / "tensors.safetensors", "pt") as file:
        stored = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    shapes = {p.shape for p in trained(model)}
    weights = [t for t in stored if t.shape in shapes and t.dim()]
    counted = sum(p.numel() for p in trained(model))
    assert sum(t.numel() for t in weights) == 3 * counted
    # an adapter is in float32 whatever lies under it
    assert {t.dtype for t in weights} == {p.dtype for p in trained(model)}
    small = sum(t.nbytes for t in stored) - sum(t.nbytes for t in weights)
    assert small < 2 * 5056 + 8 * len(stored) + 8 * 2 * len(DATA + UNSEEN)


# --- killed, and run again -----------------------------------------------------------------------
# What follows up to the test runs in another process, which copies itself


def kill_again_and_again(train, make, folder, steps):
    """Kill the run eight times: every third in the middle of a write, the others at a random
    moment of a step.

    Returns: how far each had come when it was killed.
    """
    draw, reached = random.Random(0), []
    begin = time.perf_counter()
    stopped(train(make()), 10)
    seconds = (time.perf_counter() - begin) / 10
    for i in range(8):
        torn, share, n = i % 3 == 2, draw.random(), draw.randrange(2, 6)
        reader, writer = os.pipe()

        def work(torn=torn, n=n, share=share, writer=writer):
            if torn:
                tear_a_write(n, share)
            for at, _ in enumerate(train(make(), folder), 1):
                os.write(writer, bytes([at]))

        child = in_child(work)
        os.close(writer)
        last, done = 0, reached[-1] if reached else 0
        # first come the steps of those before it
        while not torn and last <= min(done, steps - 8):
            last = os.read(reader, 1)[0]
        if not torn:
            time.sleep(seconds * share)
            os.kill(child, signal.SIGKILL)
        assert ending(child) == -signal.SIGKILL
        rest = os.read(reader, 10_000)
        os.close(reader)
        reached.append(max([last, *rest]))
    return reached


def main(loop, folder):
    torch.set_num_threads(1)
    train, make = LOOPS[loop]
    steps = 60
    config = {"iterations": steps} if loop == "online dpo" else {"epochs": steps // 2}

    def long(model, where=None):
        return train(model, where, config)

    reached = kill_again_and_again(long, make, Path(folder) / "killed", steps)
    ends = []
    for where in (Path(folder) / "killed", None):
        model = make()
        history = words(long(model, where))
        ends.append([models.weights_digest(model), history])
    print(json.dumps([reached, ends]))


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("loop", [name for name in LOOPS if name != "ties"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, loop):
    """Oracle: the same run undisturbed and without a folder, in the same process. One thread, set
    by the child."""
    run = subprocess.run(
        [sys.executable, __file__, loop, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    reached, (killed, straight) = json.loads(run.stdout)
    assert len(set(reached)) >= 5
    assert len(straight[1]) == 60
    assert killed == straight


if __name__ == "__main__":
    main(*sys.argv[1:])
