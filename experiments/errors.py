"""Record what the bugs of the collection do to a run: rlhf_helpers/assets/results/errors.json."""

import copy
import json
import math
import statistics
import time
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.bugs import BUGS, Bug
from rlhf_helpers import models, rewards, rollout, settings, worlds
from rlhf_helpers.algorithms import reward_model
from rlhf_helpers.book import shipped
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.losses import ppo_clip_loss
from rlhf_helpers.worlds import arithmetic, enumerable

SEEDS = [0, 1, 2, 3, 4]
TEXTS = 64
STEPS = 300
RATE = 0.5
GROUP = 8


class Harm(NamedTuple):
    """One number of a run with the bug and of the same run without it."""

    what: str
    wrong: float
    right: float


def settings_of(run):
    """What the record depends on besides the code; a test holds the file to it."""
    return {
        "bugs": sorted(bug.name for bug in BUGS),
        "seeds": SEEDS,
        "texts": TEXTS,
        "steps": STEPS,
        "rate": RATE,
        "group": GROUP,
    }


def main():
    torch.set_num_threads(1)
    begin, found = time.perf_counter(), {}
    for bug in BUGS:
        harm = HARMS[bug.name](bug)
        found[bug.name] = {
            "what": harm.what,
            "wrong": round(harm.wrong, 4),
            "right": round(harm.right, 4),
        }
        print(f"{time.perf_counter() - begin:4.0f} s  {bug.name}: {found[bug.name]}", flush=True)
    record_sweep("errors", begin, settings_of(settings.load()), found)


# --- what several use ----------------------------------------------------------------------------


def mean(values) -> float:
    return statistics.fmean(float(value) for value in values)


def over_seeds(measure, *functions) -> tuple[float, ...]:
    """The mean over the seeds of what is measured with each function."""
    return tuple(mean(measure(function, seed) for seed in SEEDS) for function in functions)


def reviews(padding_side="right"):
    """The tiny model, its tokenizer, and texts of it as tokens and mask [N, T]."""
    run = settings.load()
    model, tokenizer = models.load(run.model)
    texts = worlds.load(run.world).texts("held_out", TEXTS)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, rows))
    tokens = torch.full((TEXTS, longest), tokenizer.pad_token_id)
    mask = torch.zeros(TEXTS, longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if padding_side == "right" else slice(longest - len(row), None)
        tokens[i, where], mask[i, where] = torch.tensor(row), 1
    return model, tokenizer, tokens, mask


def responses(temperature=1.0, seed=0):
    """A rollout of the tiny model, and the model."""
    run = settings.load()
    model, tokenizer = models.load(run.model)
    prompts = worlds.load(run.world).openings("held_out", TEXTS)
    found = rollout.sample(
        model,
        *models.encode_prompts(tokenizer, prompts),
        run.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )
    return model, found


def completion_logits(model, found):
    positions = (found.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(found.tokens, attention_mask=found.attention_mask, position_ids=positions)
    return out.logits[:, found.prompt_length - 1 : -1]


def batch_of_three(seed, n=16):
    """One batch for three actions of which the first pays most: actions and advantages."""
    luck = torch.Generator().manual_seed(seed)
    actions = torch.randint(3, (n,), generator=luck)
    paid = torch.tensor([1.0, 0.0, -1.0])[actions] + torch.randn(n, generator=luck)
    return actions, paid - paid.mean()


def moved(logits: Tensor, start: Tensor) -> float:
    """KL from the policy of the start, in nats."""
    before, now = start.log_softmax(-1), logits.detach().log_softmax(-1)
    return (before.exp() * (before - now)).sum().item()


def drifted(logits: Tensor, reference: Tensor) -> float:
    """KL to the reference, in nats."""
    return moved(reference, logits.detach())


# --- tokens and masks ----------------------------------------------------------------------------


def padding_is_the_end(bug: Bug) -> Harm:
    def ended(labels, seed):
        luck = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 4, (TEXTS,), generator=luck)
        tokens = torch.randint(1, 5, (TEXTS, 5), generator=luck)
        mask = (torch.arange(5) <= lengths[:, None]).long()  # the end counts
        tokens[torch.arange(5) >= lengths[:, None]] = 0
        model = enumerable.small_gpt2(5, 12, seed=seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        start = torch.zeros(TEXTS, 1, dtype=torch.long)
        for _ in range(STEPS):
            logits = model(torch.cat([start, tokens[:, :-1]], 1)).logits
            loss = cross_entropy(logits.flatten(0, 1), labels(tokens, mask, 0).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        drawn = rollout.sample(
            model.eval(),
            torch.zeros(500, 1, dtype=torch.long),
            torch.ones(500, 1, dtype=torch.long),
            10,
            eos_token_id=0,
            pad_token_id=0,
            generator=luck,
        )
        return rollout.ended(drawn, [0]).double().mean()

    return Harm("share of responses that end, after training", *over_seeds(ended, *pair(bug)))


def score_of_the_padding(bug: Bug) -> Harm:
    run = settings.load()
    judge = shipped.reward_model(run)
    _, _, tokens, mask = reviews()
    with torch.no_grad():
        states = judge.base_model(tokens, attention_mask=mask).last_hidden_state
        scores = judge.score(states).squeeze(-1)
        alone = torch.stack(
            [
                judge.score(judge.base_model(row[None, : m.sum()]).last_hidden_state)[0, -1, 0]
                for row, m in zip(tokens, mask, strict=True)
            ]
        )
    found = [(read(scores, mask) - alone).abs().mean().item() for read in pair(bug)]
    return Harm("change of a text's score beside longer ones, log-odds", *found)


def positions_of_the_padding(bug: Bug) -> Harm:
    model, _, tokens, mask = reviews("left")
    found = []
    for logits in pair(bug):
        with torch.no_grad():
            beside = logits(model, tokens, mask).log_softmax(-1)
        gaps = []
        for i, m in enumerate(mask):
            row = tokens[i, len(m) - m.sum() :]
            with torch.no_grad():
                alone = model(row[None]).logits.log_softmax(-1)[0, :-1]
            both = [x.gather(-1, row[1:, None]) for x in (alone, beside[i, -len(row) : -1])]
            gaps.append((both[0] - both[1]).abs().mean().item())
        found.append(mean(gaps))
    return Harm("change of a token's log-probability in a batch, nats", *found)


def off_by_one(bug: Bug) -> Harm:
    model, _, tokens, mask = reviews()
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
    found = []
    for log_probs in pair(bug):
        values = log_probs(logits, tokens)
        found.append(-(values * mask[:, -values.shape[1] :]).sum() / mask[:, 1:].sum())
    return Harm("loss of a trained model before the first step, nats per token", *map(float, found))


def mean_over_padding(bug: Bug) -> Harm:
    mask = reviews()[3]
    losses = torch.ones(mask.shape)
    return Harm(
        "mean of a loss that is 1 at every token", *(m(losses, mask).item() for m in pair(bug))
    )


def rows_in_another_order(bug: Bug) -> Harm:
    run = settings.load()
    policy, tokenizer = shipped.adder(run)
    problems = arithmetic.sample(TEXTS, level=3, split="train", seed=0)
    prompts = [problem.prompt for problem in problems]
    luck = torch.Generator().manual_seed(0)
    texts = rollout.write(policy, tokenizer, prompts, 24, samples_per_prompt=GROUP, generator=luck)
    answers = {problem.prompt: problem.answer for problem in problems}
    order = pair(bug)[1](prompts, GROUP)
    right = torch.tensor(arithmetic.exact(order, texts, answer=[answers[p] for p in order]))
    found = []
    for repeat in pair(bug):
        named = repeat(prompts, GROUP)
        paid = torch.tensor(arithmetic.exact(named, texts, answer=[answers[p] for p in named]))
        groups = paid.view(-1, GROUP)
        advantages = (groups - groups.mean(1, keepdim=True)).flatten()
        found.append(advantages[right == 1].mean().item())
    return Harm("mean advantage of the right answers", *found)


def no_space(bug: Bug) -> Harm:
    run = settings.load()
    model, tokenizer = models.load(run.model)
    sample = worlds.load(run.world).sample(TEXTS, seed=7, split="held_out")
    found = []
    for joined in pair(bug):
        losses = []
        for review in sample:
            row = torch.tensor(tokenizer(joined(review.opening, review.body))["input_ids"])[None]
            start = len(tokenizer(review.opening)["input_ids"])
            with torch.no_grad():
                logits = model(row).logits[0, start - 1]
            losses.append(cross_entropy(logits, row[0, start]).item())
        found.append(mean(losses))
    return Harm("surprise of the response's first token, nats", *found)


def prompt_is_paid(bug: Bug) -> Harm:
    prompts = ["I love great films. This one", "I hate dull films. This one"] * (TEXTS // 2)
    found = [
        mean(map(abs, judged(rewards.sentiment_words, prompts, [""] * TEXTS)))
        for judged in pair(bug)
    ]
    return Harm("what the empty response earns or loses, words of praise", *found)


# --- sampling and scoring ------------------------------------------------------------------------


def dropout(bug: Bug) -> Harm:
    model, found = responses()
    gaps = []
    for mode in pair(bug):
        again = mode(copy.deepcopy(model))
        for module in again.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            logits = completion_logits(again, found)
        gaps.append(outside(logits, found))
    return Harm("share of tokens outside the clip range before the first step", *gaps)


def outside(logits, found, clip=0.2):
    tokens = found.tokens[:, found.prompt_length :]
    new = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    ratio = (new - found.log_probs).exp()
    mask = found.completion_mask
    return (((ratio - 1).abs() > clip) * mask).sum().item() / mask.sum().item()


def two_temperatures(bug: Bug) -> Harm:
    model, found = responses(temperature=0.7)
    logits = completion_logits(model, found)
    tokens, mask = found.tokens[:, found.prompt_length :], found.completion_mask
    kls = [
        ((scored(logits, tokens, 0.7) - found.log_probs) * mask).sum(1).mean().item()
        for scored in pair(bug)
    ]
    return Harm("KL of the untrained policy to itself, nats per response", *kls)


def half_precision(bug: Bug) -> Harm:
    model, found = responses()
    logits = completion_logits(model, found)
    tokens, mask = found.tokens[:, found.prompt_length :], found.completion_mask
    gaps = [
        ((log_probs(logits).gather(-1, tokens[..., None]).squeeze(-1) - found.log_probs) * mask)
        .sum(1)
        .abs()
        .max()
        .item()
        for log_probs in pair(bug)
    ]
    return Harm("largest log-ratio of a response before the first step, nats", *gaps)


def old_taken_anew(bug: Bug) -> Harm:
    def end(loop, seed):
        actions, advantages = batch_of_three(seed)
        logits = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=RATE)

        def step(new, old):
            loss = ppo_clip_loss(new, old, advantages).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        loop(lambda: logits.log_softmax(-1)[actions], STEPS, step)
        return moved(logits, torch.zeros(3))

    return Harm(
        f"KL from the old policy after {STEPS} passes over one batch, nats",
        *over_seeds(end, *pair(bug)),
    )


# --- the objective -------------------------------------------------------------------------------


def optimistic_clip(bug: Bug) -> Harm:
    def end(clipped, seed):
        actions, advantages = batch_of_three(seed)
        logits = torch.zeros(3, requires_grad=True)
        old = logits.detach().log_softmax(-1)[actions]
        optimizer = torch.optim.SGD([logits], lr=RATE)
        for _ in range(STEPS):
            ratio = (logits.log_softmax(-1)[actions] - old).exp()
            optimizer.zero_grad()
            clipped(ratio, advantages).backward()
            optimizer.step()
        return moved(logits, torch.zeros(3))

    return Harm(
        f"KL from the old policy after {STEPS} passes over one batch, nats",
        *over_seeds(end, *pair(bug)),
    )


def climbed(loss, seed, start, rate=RATE, n=TEXTS):
    """Logits after steps along a loss of (logits, sampled actions)."""
    luck = torch.Generator().manual_seed(seed)
    logits = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=rate)
    for _ in range(STEPS):
        actions = logits.detach().softmax(-1).multinomial(n, True, generator=luck)
        optimizer.zero_grad()
        loss(logits, actions).backward()
        optimizer.step()
    return logits.detach()


def entropy_of_the_samples(bug: Bug) -> Harm:
    def end(entropy, seed):
        start = [math.log(0.9), *[math.log(0.1 / 19)] * 19]
        logits = climbed(lambda z, a: -entropy(z.expand(len(a), 20), a), seed, start)
        log_probs = logits.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum().item()

    return Harm(
        "entropy of 20 actions after training on the bonus alone; at most log 20 = 3.00 nats",
        *over_seeds(end, *pair(bug)),
    )


def advantage_with_gradient(bug: Bug) -> Harm:
    def error(actor, seed):
        luck = torch.Generator().manual_seed(seed)
        value = torch.zeros(1, requires_grad=True)
        log_probs = torch.zeros(4).log_softmax(-1)
        optimizer = torch.optim.SGD([value], lr=0.05)
        kept = []
        for step in range(STEPS):
            actions = torch.randint(4, (TEXTS,), generator=luck)
            paid = 1 + torch.randn(TEXTS, generator=luck)
            values = value.expand(TEXTS)
            loss = actor(log_probs[actions], paid, values) + 0.5 * (values - paid).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= STEPS // 2:
                kept.append(value.item() - 1)
        return mean(kept)

    return Harm("how much too high the value ends; rewards of 1", *over_seeds(error, *pair(bug)))


def value_after_the_end(bug: Bug) -> Harm:
    def error(deltas, seed):
        luck = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 9, (TEXTS,), generator=luck)
        mask = (torch.arange(10) < lengths[:, None]).float()
        values = torch.randn(TEXTS, 10, generator=luck)
        paid = torch.zeros(TEXTS, 10)
        paid[torch.arange(TEXTS), lengths - 1] = torch.randn(TEXTS, generator=luck)
        return ((deltas(paid, values, mask).sum(1) - (paid.sum(1) - values[:, 0])).abs()).mean()

    return Harm(
        "error of a response's advantage, in deviations of the values",
        *over_seeds(error, *pair(bug)),
    )


def k1_as_a_loss(bug: Bug) -> Harm:
    reference = torch.zeros(4).log_softmax(-1)
    start = [3.0, 0.0, -1.0, -2.0]

    def end(price, seed):
        logits = climbed(lambda z, a: price(z.log_softmax(-1)[a], reference[a]), seed, start)
        return drifted(logits, torch.zeros(4))

    at = drifted(torch.tensor(start), torch.zeros(4))
    return Harm(
        f"KL after training on the price alone, from {at:.2f} nats", *over_seeds(end, *pair(bug))
    )


def sign_of_the_price(bug: Bug) -> Harm:
    reference = torch.tensor([0.5, 0.3, 0.2]).log()

    def end(reward, seed):
        def loss(logits, actions):
            log_probs = logits.log_softmax(-1)[actions]
            paid = reward(torch.zeros(len(actions)), log_probs.detach(), reference[actions], 0.1)
            return -((paid - paid.mean()) * log_probs).mean()

        logits = climbed(loss, seed, [0.0, 0.0, 0.0], rate=1.0)
        return drifted(logits, reference)

    return Harm(
        f"KL after {STEPS} steps in which the price is the only reward, nats",
        *over_seeds(end, *pair(bug)),
    )


class Table(nn.Module):
    """A policy over texts that are numbered."""

    def __init__(self, texts):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(texts))

    def log_probs(self):
        return self.logits.log_softmax(-1)


def reference_is_the_policy(bug: Bug) -> Harm:
    def end(reference_of, seed):
        luck = torch.Generator().manual_seed(seed)
        utility = torch.randn(20, generator=luck)
        first, second = torch.randint(20, (2, 400), generator=luck)
        wins = torch.rand(400, generator=luck) < (utility[first] - utility[second]).sigmoid()
        chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
        policy = Table(20)
        reference = reference_of(policy)
        optimizer = torch.optim.SGD(policy.parameters(), lr=10.0)
        for _ in range(STEPS):
            new, old = policy.log_probs(), reference.log_probs().detach()
            margin = (new - old)[chosen] - (new - old)[rejected]
            loss = -nn.functional.logsigmoid(margin).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return drifted(policy.logits, torch.zeros(20))

    return Harm(
        f"KL to the model of the start after {STEPS} steps of DPO, nats",
        *over_seeds(end, *pair(bug)),
    )


def reference_refreshed(bug: Bug) -> Harm:
    runs = of("gpt2_sentiment_ppo")
    kl = [
        mean(run["end"]["kl"] for run in rows)
        for rows in (runs["others"]["reference refreshed"], runs["main"])
    ]
    return Harm("true KL at the end of PPO, nats; the log of the wrong one says 0", *kl)


def prompt_is_trained(bug: Bug) -> Harm:
    runs = of("sft_lora")["runs"]
    found = []
    for what in ("all tokens", "all weights"):
        rows = [row for name, row in runs.items() if name.startswith(f"{what}, rate")]
        best = min(rows, key=lambda row: mean(row["nats_validation"]))
        found.append(mean(best["followed_new"]))
    return Harm("requests of a new kind that are followed, each at its best rate", *found)


def long_wrong_answers(bug: Bug) -> Harm:
    mask = torch.zeros(2, 100)
    mask[0], mask[1, :10] = 1, 1
    found = []
    for average in pair(bug):
        losses = torch.ones(2, 100, requires_grad=True)
        average(losses, mask).backward()
        found.append((losses.grad[0, 0] / losses.grad[1, 0]).item())
    return Harm("push on a token of a 100-token answer over that of a 10-token one", *found)


def equal_rewards(bug: Bug) -> Harm:
    found = [advantages(torch.full((GROUP,), 0.1)).abs().max().item() for advantages in pair(bug)]
    return Harm("advantage of eight answers that all earn 0.1", *found)


# --- models and measuring ------------------------------------------------------------------------


def adapter_of_zeros(bug: Bug) -> Harm:
    def left(adapter, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            a, b = (part.requires_grad_() for part in adapter(8, 8, 2))
            x, target = torch.randn(TEXTS, 8), torch.randn(8, 2) @ torch.randn(2, 8)
        optimizer = torch.optim.Adam([a, b], lr=0.02)
        first = None
        for _ in range(STEPS):
            loss = (x @ (b @ a - target).T).square().mean()
            first = loss.item() if first is None else first
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item() / first

    return Harm(
        f"share of the loss that is left after {STEPS} steps", *over_seeds(left, *pair(bug))
    )


def head_left_out(bug: Bug) -> Harm:
    run = settings.load()
    _, tokenizer = models.load(run.model)
    judge = shipped.reward_model(run)
    # the head under the name that another library's file gives it
    weights = {
        name.replace("score.", "v_head."): value for name, value in judge.state_dict().items()
    }
    fresh = copy.deepcopy(judge)
    nn.init.zeros_(fresh.score.weight)
    pairs = shipped.preference_pairs(run, seed=1, count=500)
    found = []
    for load in pair(bug):
        try:
            model = load(copy.deepcopy(fresh), weights)
        except RuntimeError:
            model = judge  # what is refused is loaded by its right names
        found.append(reward_model.evaluate(model, tokenizer, pairs).accuracy)
    return Harm("agreement with held-out annotators", *found)


def answers_put_back(bug: Bug) -> Harm:
    rate, samples, k = 0.1, 16, 8
    found = [
        sum(
            math.comb(samples, c) * rate**c * (1 - rate) ** (samples - c) * pass_at_k(c, samples, k)
            for c in range(samples + 1)
        )
        for pass_at_k in pair(bug)
    ]
    true = 1 - (1 - rate) ** k
    return Harm(f"mean estimate of pass@8 from 16 answers; the truth is {true:.3f}", *found)


def answer_somewhere(bug: Bug) -> Harm:
    problems = arithmetic.sample(TEXTS, level=3, split="train", seed=0)
    every = " ".join(map(str, range(200)))
    found = [mean(checker(problem.answer, every) for problem in problems) for checker in pair(bug)]
    return Harm("reward for the text that lists all numbers up to 199", *found)


def four_prompts(bug: Bug) -> Harm:
    run = settings.load()
    model, tokenizer = models.load(run.model)
    prompts = worlds.load(run.world).openings("held_out", TEXTS)
    luck = torch.Generator().manual_seed(0)
    count = 2 * 200
    texts = rollout.write(
        model,
        tokenizer,
        prompts,
        run.max_new_tokens,
        samples_per_prompt=count,
        generator=luck,
    )
    repeated = [prompt for prompt in prompts for _ in range(count)]
    scores = rewards.score(rewards.vader, repeated, texts).view(TEXTS, count)
    found = [
        mean(
            compared(scores[:, 2 * i].tolist(), scores[:, 2 * i + 1].tolist())
            for i in range(count // 2)
        )
        for compared in pair(bug)
    ]
    return Harm("share of comparisons of a model with itself that call it better", *found)


def pair(bug: Bug):
    return bug.wrong, bug.right


def of(chapter):
    """The recorded results of a chapter."""
    folder = resources.files("rlhf_helpers").joinpath("assets", "results")
    return json.loads(folder.joinpath(f"{chapter}.json").read_text(encoding="utf-8"))["results"]


HARMS = {bug.name: globals()[bug.name.replace("-", "_")] for bug in BUGS}

if __name__ == "__main__":
    main()
