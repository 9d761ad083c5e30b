"""Group relative policy optimisation: gradients against autograd of the whole softmax, resumed runs
to the bit, groups that teach nothing, and the optimum that can be listed."""

import copy
import math
import warnings
import zlib

import pytest
import torch
from architectures import EOS, build
from scipy import stats

from rlhf_helpers import models, settings
from rlhf_helpers.algorithms import grpo, sampling
from rlhf_helpers.algorithms.grpo import Config
from rlhf_helpers.algorithms.ppo import TrainingStopped
from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.worlds import arithmetic, enumerable


class Letters:
    """A tokenizer of one token a letter; end and pad are one token."""

    eos_token_id = pad_token_id = bos_token_id = EOS

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) - 96 for c in text] for text in texts]}

    def decode(self, ids, **_):
        return "".join(chr(96 + i) for i in ids if i != EOS)


PROMPTS = ["ab", "c", "defg", "hi"]
SMALL = Config(iterations=4, prompts=2, samples_per_prompt=3, max_new_tokens=5, learning_rate=1e-2)


def early_letters(prompts, completions, **_):
    return [sum(ch < "m" for ch in text) / 5 for text in completions]


def started(config=SMALL, **changes):
    return grpo.start(build("gpt2", **changes), Letters(), config)


# --- one batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("scale", grpo.SCALES)
def test_the_gradient_is_that_of_the_policy_gradient_by_hand(loss_type, scale):
    """Oracle: at ratio 1, autograd of Σ w·A·log π with one text at a time through the whole
    softmax; A by a loop."""
    config = Config(
        prompts=2,
        samples_per_prompt=3,
        max_new_tokens=5,
        scale=scale,
        loss_type=loss_type,
        learning_rate=1e-9,
        max_grad_norm=1e9,
    )
    run = started(config, dtype=torch.float64)
    batch = grpo.groups(run, PROMPTS[:2], early_letters, config)
    rewards = batch.rewards.double().view(2, 3)
    by_hand = []
    for group in rewards:
        others = [(group.sum() - r) / 2 for r in group]
        spread = {"group": group.std() + 1e-4, "batch": rewards.std() + 1e-4}.get(scale, 1.0)
        by_hand += [
            r - o if scale == "leave-one-out" else (r - group.mean()) / spread
            for r, o in zip(group, others, strict=True)
        ]
    assert batch.advantages.tolist() == pytest.approx([float(a) for a in by_hand], abs=1e-4)
    model = copy.deepcopy(run.policy)
    objective = 0.0
    for i, advantage in enumerate(by_hand):
        length = int(batch.mask[i].sum())
        ids = batch.tokens[i][batch.attention_mask[i].bool()]
        log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        chosen = log_probs.gather(1, ids[1:, None]).squeeze(1)[-length:]
        weight = 1 / (6 * length) if loss_type == "grpo" else 1 / (6 * 5)
        objective = objective - weight * advantage * chosen.sum()
    objective.backward()
    grpo.update(run, batch, config)
    for (name, mine), other in zip(run.policy.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert any(p.grad.abs().max() > 1e-4 for p in run.policy.parameters())


def test_the_first_loss_is_zero_and_still_teaches():
    """Oracle: at ratio 1 the loss of "grpo" is minus the mean advantage of the sequences, 0 in each
    group; its gradient is not."""
    run = started(SMALL)
    metrics = grpo.iterate(run, PROMPTS, early_letters, SMALL)
    assert abs(metrics.loss) < 1e-5
    assert metrics.grad_norm > 1e-3
    assert metrics.clip_fraction == 0.0
    assert metrics.sampled == 6
    assert math.isnan(metrics.kl)


def test_dropout_between_sampling_and_training_is_noticed():
    run = started(SMALL, dropout=0.5)
    batch = grpo.groups(run, PROMPTS[:2], early_letters, SMALL)
    run.policy.train()
    with pytest.raises(TrainingStopped, match="first ratio"):
        grpo.update(run, batch, SMALL)


def test_the_kl_of_the_batch_is_that_to_the_policy_of_the_start():
    """Oracle: log-probabilities under a copy made before training; the KL is the mean over the
    sequences of their sums, of the policy that sampled less the copy."""
    config = Config(**{**SMALL.__dict__, "beta": 0.1, "iterations": 6})
    policy = build("gpt2")
    before = copy.deepcopy(policy)
    run = grpo.start(policy, Letters(), config)
    for _ in range(3):
        grpo.iterate(run, PROMPTS, early_letters, config)
    batch = grpo.groups(run, PROMPTS[:2], early_letters, config)
    where = (batch.tokens, batch.attention_mask, batch.mask.shape[1])
    with torch.no_grad():
        wanted = completion_log_probs(before, *where)
        now = completion_log_probs(run.policy, *where)
    torch.testing.assert_close(batch.ref_log_probs[batch.mask], wanted[batch.mask])
    kl = ((now - wanted) * batch.mask).sum(1).mean().item()
    assert abs(kl) > 1e-3
    assert grpo.measure(batch, config)["kl"] == pytest.approx(kl, rel=1e-3)


def test_the_entropy_of_a_batch_is_that_of_the_policy_up_to_luck():
    """Oracle: −Σ p log p over the vocabulary, from the logits of one text at a time, mean over all
    tokens that were sampled; three of its standard errors apart at most."""
    config = Config(**{**SMALL.__dict__, "samples_per_prompt": 200})
    run = started(config)
    batch = grpo.groups(run, PROMPTS, early_letters, config)
    exact, surprise = [], []
    for ids, seen, mask in zip(batch.tokens, batch.attention_mask, batch.mask, strict=True):
        length, text = int(mask.sum()), ids[seen.bool()]
        with torch.no_grad():
            log_probs = run.policy(text[None]).logits[0, :-1].log_softmax(-1)[-length:]
        exact += (-log_probs.exp() * log_probs).sum(-1).tolist()
        surprise += (-log_probs.gather(1, text[-length:, None])).squeeze(1).tolist()
    error = torch.tensor(surprise).std().item() / len(surprise) ** 0.5
    found = grpo.measure(batch, config)["entropy"]
    assert found == pytest.approx(sum(surprise) / len(surprise), abs=1e-4)
    assert abs(found - sum(exact) / len(exact)) < 3 * error


def test_two_seeds_sample_two_batches():
    """Oracle: the same prompts, so that nothing but the sampling can differ."""
    tokens = []
    for seed in (1, 1, 2):
        config = Config(**{**SMALL.__dict__, "seed": seed})
        tokens.append(grpo.groups(started(config), PROMPTS, early_letters, config).tokens.tolist())
    assert tokens[0] == tokens[1] != tokens[2]


def test_a_loss_that_is_not_finite_moves_no_weight():
    """Oracle: the weights before, to the bit."""
    config = Config(**{**SMALL.__dict__, "beta": 0.1})
    run = started(config)
    batch = grpo.groups(run, PROMPTS[:2], early_letters, config)
    before = copy.deepcopy(run.policy.state_dict())
    broken = batch._replace(ref_log_probs=batch.ref_log_probs * math.nan)
    with pytest.raises(TrainingStopped, match="loss holds a NaN") as caught:
        grpo.update(run, broken, config)
    assert caught.value.name == "not finite"
    assert all(torch.equal(before[name], w) for name, w in run.policy.state_dict().items())


# --- groups that teach nothing -------------------------------------------------------------------


def constant_for(letter):
    """Every completion earns the same, but for prompts with this letter."""

    def reward(prompts, completions, **_):
        return [
            (zlib.crc32(text.encode()) % 97 if letter in prompt else 1.0)
            for prompt, text in zip(prompts, completions, strict=True)
        ]

    return reward


def test_constant_groups_are_kept_dropped_or_replaced():
    """Oracle: by hand: one of two prompts teaches; kept rows are 6, dropped leaves 3, resampling
    goes on to 6."""
    for what, rows in (("keep", 6), ("drop", 3), ("resample", 6)):
        config = Config(**{**SMALL.__dict__, "constant_groups": what, "rounds": 8})
        run = started(config)
        batch, told = grpo.collect(run, ["ab", "c"], constant_for("a"), config)
        assert len(batch.rewards) == rows
        assert told["constant"] == 0.5
        assert batch.sampled == (12 if what == "resample" else 6)
        assert (batch.advantages != 0).any()


def test_all_constant_groups_leave_a_batch_without_a_gradient():
    for what in grpo.CONSTANT_GROUPS:
        config = Config(**{**SMALL.__dict__, "constant_groups": what})
        metrics = grpo.iterate(started(config), PROMPTS, constant_for("?"), config)
        assert metrics.constant == 1.0
        assert metrics.grad_norm == 0.0
        assert metrics.sampled == 6 * (config.rounds if what == "resample" else 1)


def test_each_round_asks_the_next_prompts():
    """Oracle: with constant rewards all rounds are needed: two of two prompts are one pass over the
    four, so each pass is a permutation."""
    config = Config(**{**SMALL.__dict__, "constant_groups": "resample", "rounds": 2})
    run, seen = started(config), []

    def watched(prompts, completions, **_):
        seen.extend(prompts[::3])
        return [1.0] * len(prompts)

    for _ in range(4):
        grpo.iterate(run, PROMPTS, watched, config)
    passes = [seen[i : i + 4] for i in range(0, 16, 4)]
    assert all(sorted(one) == sorted(PROMPTS) for one in passes)
    assert len(set(map(tuple, passes))) > 1


def test_what_two_rounds_find_too_much_is_left_out(monkeypatch):
    """Oracle: rounds by hand, of one and of two groups that teach, where two are asked for: the
    scores of the first two, and all twelve samples are counted."""
    config = Config(**{**SMALL.__dict__, "constant_groups": "resample"})
    rounds, scores = iter([[1, 0], [2, 3]]), []
    monkeypatch.setattr(grpo, "draw", lambda *_: next(rounds))

    def judge(prompts, completions, **_):
        scores.append(constant_for("a")(prompts, completions))
        return scores[-1]

    batch, _ = grpo.collect(started(config), ["ab", "c", "da", "ea"], judge, config)
    assert batch.rewards.tolist() == scores[0][3:] + scores[1][:3]
    assert batch.sampled == 12


def test_a_thinned_batch_keeps_its_number_of_updates():
    """Oracle: by hand: three of four groups are left; in two mini-batches they are two and one."""
    config = Config(
        **{**SMALL.__dict__, "prompts": 4, "mini_batches": 2, "constant_groups": "drop"}
    )
    run = started(config)
    batch, _ = grpo.collect(run, ["ab", "c", "da", "ea"], constant_for("a"), config)
    assert len(batch.rewards) == 9
    assert grpo.update(run, batch, config)["updates"] == 2


def test_batches_of_unequal_widths_are_joined():
    """Oracle: the log-probabilities of sampling, found again by scoring the joined batch."""
    run = started(SMALL)
    parts = [grpo.groups(run, some, early_letters, SMALL) for some in (["a", "b"], ["cdefg", "hi"])]
    joined = grpo._join(parts, EOS)
    where = (joined.tokens, joined.attention_mask, joined.mask.shape[1])
    with torch.no_grad():
        found = completion_log_probs(run.policy, *where, samples_per_prompt=3)
    torch.testing.assert_close(
        found[joined.mask], joined.old_log_probs[joined.mask], rtol=1e-4, atol=1e-5
    )
    assert joined.sampled == 12
    assert torch.equal(joined.rewards, torch.cat([p.rewards for p in parts]))


# --- curriculum ----------------------------------------------------------------------------------


def test_the_chances_of_kinds_by_hand():
    """Oracle: 90 % by p(1 − p) of two kinds and 10 % evenly; a kind not seen counts as the best."""
    found = grpo.chances(["easy", "fair", "new"], {"easy": 0.05, "fair": 0.25})
    shares = {"easy": 0.05 / 0.55, "fair": 0.25 / 0.55, "new": 0.25 / 0.55}
    assert found == pytest.approx({kind: 0.1 / 3 + 0.9 * share for kind, share in shares.items()})
    assert grpo.chances(["a", "b"], {"a": 0.0, "b": 0.0}) == pytest.approx({"a": 0.5, "b": 0.5})


def test_prompts_are_drawn_as_the_chances_say():
    """Oracle: a χ² test of 4,000 drawn kinds, at 1 in 10,000; and prompts of a kind are drawn
    evenly."""
    run = started()
    run.learnability = {"a": 0.2, "b": 0.05}
    kinds = ["a", "b", "b", "a", "b"]
    drawn = grpo.draw(run, 5, Config(prompts=4000), kinds)
    wanted = grpo.chances(["a", "b"], run.learnability)
    expected = [4000 * wanted[kind] / kinds.count(kind) for kind in kinds]
    counts = [drawn.count(i) for i in range(5)]
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
    assert statistic < stats.chi2.ppf(0.9999, 4)


def test_what_is_known_of_a_kind_is_a_running_mean_of_the_variance():
    """Oracle: by hand. Rewards 1, 0, 0 vary by 1/3, equal ones by 0; a first group sets the
    mean."""
    run = started()
    batch = grpo.groups(run, PROMPTS[:2], early_letters, SMALL)
    one = batch._replace(rewards=torch.tensor([1.0, 0, 0, 5, 5, 5]))
    grpo.note(run, one, ["a", "b"], SMALL)
    assert run.learnability == pytest.approx({"a": 1 / 3, "b": 0.0})
    grpo.note(run, one, ["b", "b"], SMALL)
    assert run.learnability == pytest.approx({"a": 1 / 3, "b": (1 - grpo.FORGET) * grpo.FORGET / 3})


def test_rounds_of_one_iteration_are_each_noted_under_their_own_kinds():
    """Oracle: constant rewards have no variance, whichever round they came in."""
    config = Config(**{**SMALL.__dict__, "prompts": 4, "constant_groups": "resample", "rounds": 8})
    run = started(config)
    kinds = ["taught", "constant"]
    _, told = grpo.collect(run, ["ab", "c"], constant_for("a"), config, kinds=kinds)
    assert run.rounds > 1
    assert set(told["shares"]) == {"taught", "constant"}
    assert run.learnability["constant"] == 0.0
    assert run.learnability["taught"] > 0.0


def test_a_run_goes_on_with_its_own_kinds_only(tmp_path):
    weights_after(tmp_path, stop=2, kinds=["a", "b", "b", "a"])
    with pytest.raises(ValueError, match="kinds is"):
        weights_after(tmp_path, kinds=["a", "a", "b", "b"])


def test_a_curriculum_leaves_alone_what_teaches_nothing():
    """Oracle: two kinds, one of them with constant rewards: it gets its even share alone."""
    config = Config(**{**SMALL.__dict__, "iterations": 40, "prompts": 8, "learning_rate": 1e-5})
    kinds = ["taught", "constant"]
    history = list(
        grpo.train(build("gpt2"), Letters(), ["ab", "c"], constant_for("a"), config, kinds=kinds)
    )
    late = [one.shares.get("constant", 0.0) for one in history[10:]]
    assert 0.0 < sum(late) / len(late) < 0.15
    assert sum(history[-1].shares.values()) == pytest.approx(1.0)


# --- runs ----------------------------------------------------------------------------------------


def weights_after(folder=None, stop=None, kinds=None, **changes):
    config = Config(**{**SMALL.__dict__, **changes})
    policy = build("gpt2")
    history = []
    for metrics in grpo.train(
        policy, Letters(), PROMPTS, early_letters, config, None, kinds, folder, 1
    ):
        history.append(metrics)
        if metrics.iteration == stop:
            break
    return policy.state_dict(), history


@pytest.mark.parametrize(
    "changes",
    [{}, {"constant_groups": "resample", "beta": 0.1}, {"kinds": ["a", "b", "b", "a"]}],
)
def test_a_run_that_goes_on_ends_with_the_same_weights(changes, tmp_path):
    """Oracle: the run that was not interrupted, to the bit (one thread)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, history = weights_after(**changes)
        weights_after(tmp_path, stop=2, **changes)
        resumed, again = weights_after(tmp_path, **changes)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [m.reward for m in again] == [m.reward for m in history]
    assert [m.shares for m in again] == [m.shares for m in history]
    with pytest.raises(ValueError, match="learning_rate"):
        weights_after(tmp_path, **changes | {"learning_rate": 0.5})


def test_checkpoints_come_when_due_and_at_the_end(tmp_path):
    """Oracle: the steps that stand in the folder after each iteration."""
    steps = []
    for _ in grpo.train(
        build("gpt2"), Letters(), PROMPTS, early_letters, SMALL, folder=tmp_path, save_every=3
    ):
        steps.append([path.name for path in sorted(tmp_path.glob("step-*"))])
    third, last = "step-000003", "step-000004"
    assert steps == [[], [], [third], [third, last]]


def test_grpo_comes_near_the_optimal_policy_of_a_language():
    """Oracle: π* in closed form; centred rewards without division, k3 times the ratio, a price of
    1, with which π* is spread: a policy that pays no price ends far from it, on one sequence. Near,
    not at it: the price in the loss charges each token for itself and not for the states that it
    leads to."""
    language = enumerable.language(4, 2)
    policy = enumerable.small_gpt2(4, 2, seed=0, spread=0.5)
    utilities = enumerable.utilities(language)
    reference = enumerable.model_log_probs(policy, language).detach().double()
    best = enumerable.optimal_policy(reference, utilities, 1.0)
    config = Config(
        iterations=60,
        prompts=1,
        samples_per_prompt=128,
        max_new_tokens=2,
        learning_rate=1e-2,
        scale="none",
        loss_type="dr_grpo",
        beta=1.0,
    )
    judge = enumerable.reward(language, utilities)
    for _ in grpo.train(policy, enumerable.tokenizer(language), [""], judge, config):
        pass
    found = enumerable.model_log_probs(policy, language).detach().double()
    assert enumerable.kl(reference, best) > 0.3
    assert enumerable.kl(found, best) < 0.1 * enumerable.kl(reference, best)


def test_sums_are_learned_on_problems_that_were_not_trained_on():
    """Oracle: the sums themselves, on held-out numbers, before and after thirty steps."""
    policy, tokenizer = models.load(settings.TINY_ARITHMETIC)
    train, held_out = arithmetic.problems(3, "train"), arithmetic.sample(60, 3, "held_out")

    def rate():
        found = sampling.solve(policy, tokenizer, held_out, 8, 16, seed=1)
        return found.double().mean().item()

    before = rate()
    prompts, answers = [p.prompt for p in train], [p.answer for p in train]
    history = list(
        grpo.train(
            policy, tokenizer, prompts, arithmetic.exact, Config(iterations=30), {"answer": answers}
        )
    )
    assert before < 0.35
    assert rate() > before + 0.15
    assert history[-1].reward > history[0].reward + 0.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "value"}, "use one of 'group'"),
        ({"loss_type": "ppo"}, "use one of 'grpo'"),
        ({"importance": "word"}, "use one of 'token'"),
        ({"constant_groups": "hide"}, "use one of 'keep'"),
        ({"samples_per_prompt": 1}, "samples_per_prompt must be 2"),
        ({"mini_batches": 3}, "must divide"),
        ({"beta": -1.0}, "beta"),
        ({"iterations": 0}, "iterations"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_bad_settings_are_named(change, message):
    config = Config(**{**SMALL.__dict__, **change})
    with pytest.raises(ValueError, match=message):
        next(grpo.train(build("gpt2"), Letters(), PROMPTS, early_letters, config))


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_settings_that_undo_each_other_get_a_warning(importance, loss_type):
    """Oracle: the combinations of which TRL says that they are not GSPO."""
    config = Config(**{**SMALL.__dict__, "importance": importance, "loss_type": loss_type})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        grpo.check(config, PROMPTS, None, None)
    expected = importance == "sequence" and loss_type != "grpo"
    assert [loss_type in str(w.message) and "not GSPO" in str(w.message) for w in said] == (
        [True] * expected
    )


def test_bad_prompts_columns_and_kinds_are_named():
    for prompts, columns, kinds, message in (
        ([], None, None, "prompts must be"),
        ("ab", None, None, "prompts must be"),
        (PROMPTS, {"answer": ["1"]}, None, "columns"),
        (PROMPTS, None, ["a"], "kinds has 1"),
        (PROMPTS, None, [1, 2, 3, 4], "kinds must be texts"),
    ):
        with pytest.raises(ValueError, match=message):
            next(
                grpo.train(build("gpt2"), Letters(), prompts, early_letters, SMALL, columns, kinds)
            )
