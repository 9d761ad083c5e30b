"""The reward model: the score is read at the last real token, losses are the library's, calibration
is that of closed forms."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from architectures import EOS, build
from numbers_and_words import WORDS, letters
from scipy.optimize import minimize_scalar
from statsmodels.discrete.discrete_model import Logit
from transformers import GPT2ForSequenceClassification

from rlhf_helpers import models, preferences, settings
from rlhf_helpers.algorithms import reward_model as rm
from rlhf_helpers.algorithms._loop import TrainingStopped
from rlhf_helpers.algorithms.reward_model import Comparison, Config
from rlhf_helpers.models import lora_policy

DATA = [
    Comparison("a b", ("c d e", "f")),
    Comparison("g", ("h", "i j k l")),
    Comparison("m n o", ("p q", "r s t")),
    Comparison("u", ("v w x", "y z")),
]
TEXTS = [[1, 2, 3], [4, 5, 6, 7, 8, EOS], [9], [EOS, 10, EOS, EOS]]


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


def reward_model(architecture="gpt2", tokenizer=None, dtype=torch.float32):
    model, _ = rm.load(build(architecture, dtype=dtype), tokenizer)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    return model


# --- the score -----------------------------------------------------------------------------------


@pytest.mark.equation("eq:reward-score")
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "qwen2"])
@pytest.mark.parametrize("side", rm.SIDES)
def test_the_score_is_that_of_the_text_alone(architecture, side, tokenizer):
    """Oracle: the library's own classifier on each text by itself, without padding; here pad is the
    end token, and some texts end with it."""
    model = reward_model(architecture, tokenizer, torch.float64)
    tokens, mask = rm.collate(TEXTS, EOS, side)
    found = rm.last_scores(model, tokens, mask)
    model.config.pad_token_id = None  # the library then reads the last column
    wanted = [model(torch.tensor([ids])).logits.item() for ids in TEXTS]
    assert found.tolist() == pytest.approx(wanted, abs=1e-10)
    assert len(set(np.round(wanted, 6))) == len(TEXTS)


@pytest.mark.parametrize(("side", "row"), [("right", [5, 6, 9]), ("left", [9, 5, 6])])
def test_the_side_of_the_padding_by_hand(side, row):
    tokens, mask = rm.collate([[5, 6], [1, 2, 3]], 9, side)
    assert tokens.tolist() == [row, [1, 2, 3]]
    assert mask.tolist() == [[int(token != 9) for token in row], [1, 1, 1]]


def test_a_text_may_fill_the_context(tokenizer):
    """Oracle: the library's classifier."""
    model = reward_model(tokenizer=tokenizer)
    text = torch.arange(48)[None] % 28
    found = rm.last_scores(model, text, torch.ones_like(text))
    model.config.pad_token_id = None
    assert found.item() == pytest.approx(model(text).logits.item(), abs=1e-5)


def test_soft_labels_count_in_the_loss_that_is_measured(tokenizer):
    """Oracle: the cross-entropy of the label 0.3, by hand; no graph is kept."""
    model = reward_model(tokenizer=tokenizer)
    one = Comparison("a b", ("c d e", "f"), preference=0.3)
    found = rm.scores(model, tokenizer, ["a b"] * 2, list(one.responses))
    assert not found.requires_grad
    p = torch.sigmoid(found[0] - found[1]).item()
    wanted = -0.3 * math.log(p) - 0.7 * math.log(1 - p)
    assert rm.evaluate(model, tokenizer, [one]).loss == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError, match="comparisons of two"):
        rm.score_gaps(model, tokenizer, [Comparison("a", ("b", "c", "d"))])


@pytest.mark.equation("eq:reward-score")
def test_only_the_last_token_of_a_text_gives_its_score_a_gradient(tokenizer):
    """Oracle: autograd of the library's classifier, one text at a time."""
    model = reward_model(tokenizer=tokenizer, dtype=torch.float64)
    rm.last_scores(model, *rm.collate(TEXTS, EOS)).sum().backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    other.config.pad_token_id = None
    sum(other(torch.tensor([ids])).logits.sum() for ids in TEXTS).backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-10)


def test_a_model_that_has_learned_nothing_scores_zero_and_loses_log_two(tokenizer):
    """Oracle: σ(0) = ½."""
    model, _ = rm.load(build("gpt2"), tokenizer)
    assert rm.evaluate(model, tokenizer, DATA) == (pytest.approx(math.log(2)), 0.5, 0.0)


def test_the_trunk_is_the_language_models_and_a_copy(tokenizer):
    """Oracle: the hidden states of the language model, before and after the other is changed."""
    language_model = build("gpt2")
    config = language_model.config.to_dict()
    model, _ = rm.load(language_model, tokenizer)
    assert language_model.config.to_dict() == config
    tokens = torch.tensor([[1, 2, 3]])
    before = language_model.base_model(tokens).last_hidden_state
    assert torch.equal(model.base_model(tokens).last_hidden_state, before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(language_model.base_model(tokens).last_hidden_state, before)
    assert isinstance(model, GPT2ForSequenceClassification)
    assert not model.training


def test_a_reward_model_that_is_given_stays_as_it_is(tokenizer):
    """Oracle: its own weights; what comes back is a copy with the same head."""
    given = reward_model(tokenizer=tokenizer)
    before = copy.deepcopy(given.state_dict())
    model, _ = rm.load(given, tokenizer)
    assert torch.equal(model.score.weight, given.score.weight)
    with torch.no_grad():
        model.score.weight.add_(1.0)
    assert all(torch.equal(given.state_dict()[name], before[name]) for name in before)


def test_an_empty_response_has_a_score_and_texts_keep_their_order(tokenizer):
    """Oracle: each text scored alone."""
    model = reward_model(tokenizer=tokenizer)
    prompts, responses = ["a b", "c", "d e f", "g"], ["h i j k l", "", "m", "n o"]
    together = rm.scores(model, tokenizer, prompts, responses, batch_size=3)
    alone = [
        rm.scores(model, tokenizer, [p], [r]).item()
        for p, r in zip(prompts, responses, strict=True)
    ]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert rm.encode(tokenizer, ["c"], [""]) == [[3, EOS]]
    reward = rm.as_reward(model, tokenizer)
    assert reward(prompts=prompts, completions=responses, stars=[1] * 4) == pytest.approx(
        alone, abs=1e-5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, t: rm.last_scores(
                m, torch.ones(2, 3).long(), torch.tensor([[1, 0, 0], [0, 0, 0]])
            ),
            r"attention_mask\[1\] is 0 everywhere",
        ),
        (
            lambda m, t: rm.last_scores(m, torch.ones(2, 3).long(), torch.ones(2, 2)),
            "shapes differ",
        ),
        (
            lambda m, t: rm.last_scores(m, torch.ones(1, 65).long(), torch.ones(1, 65)),
            "a text has 65 tokens and the model reads 64",
        ),
        (lambda m, t: rm.scores(m, t, ["a"], ["b", "c"]), "prompts has 1 texts and responses 2"),
        (lambda m, t: rm.scores(m, t, [], []), "at least one"),
        (lambda m, t: rm.collate([[1]], 0, "middle"), "side='middle' is unknown"),
        (lambda m, t: rm.load(lora_policy(build("gpt2")), t), "merge_and_unload"),
    ],
)
def test_bad_input_is_refused_by_name(call, message, tokenizer):
    model = reward_model(tokenizer=tokenizer)
    model.config.n_positions = 64
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer)


# --- training ------------------------------------------------------------------------------------


def test_trl_gives_the_same_loss_on_the_same_batch(tokenizer, tmp_path):
    """Oracle: TRL's RewardTrainer with its own collator, with a margin and with centring."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    model = reward_model(tokenizer=tokenizer)
    data = [one._replace(margin=0.1 * i) for i, one in enumerate(DATA)]
    config = Config(batch_size=4, centring=0.3)
    batch = next(rm.batches(data, tokenizer, config, "cpu"))
    scores = rm.last_scores(model, batch.tokens, batch.attention_mask).view(-1, 2)
    mine = rm.reward_model_loss(scores, batch, config)
    rows = Dataset.from_list(
        [
            {
                "prompt": one.prompt,
                "chosen": f" {one.responses[0]}",
                "rejected": f" {one.responses[1]}",
                "margin": one.margin,
            }
            for one in data
        ]
    )
    # the library tells the last token by its number: a pad token of its own lets it see the end
    separate = copy.deepcopy(tokenizer)
    separate.pad_token = "z"
    model.config.pad_token_id = separate.pad_token_id
    trainer = RewardTrainer(
        model,
        RewardConfig(tmp_path, report_to="none", use_cpu=True, center_rewards_coefficient=0.3),
        train_dataset=rows,
        processing_class=separate,
    )
    theirs = trainer.compute_loss(
        model, trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    )
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert mine.item() != pytest.approx(math.log(2), abs=1e-2)


@pytest.mark.parametrize("loss", rm.LOSSES)
def test_each_loss_learns_what_it_is_told(loss, tokenizer):
    """Oracle: the order of the data; words decide, so a text that was never seen can be judged."""
    k = 3 if loss == "plackett-luce" else 2
    texts = [f"{x} {y}" for x in "bcdefg" for y in "hijklm"]
    data = [
        Comparison("p", tuple(f"{t} {w}" for w in "axz"[:k])) for t in texts[:24]
    ]  # a is best, then x, then z
    if loss == "rao-kupper":
        data += [Comparison("p", (f"{t} x", f"{u} x"), 0.5) for t, u in itertools.pairwise(texts)]
    model, _ = rm.load(build("gpt2"), tokenizer)
    config = Config(learning_rate=1e-2, epochs=12, batch_size=8, loss=loss)
    history = list(rm.train(model, tokenizer, data, config))
    assert [m.step for m in history] == list(range(1, len(history) + 1))
    unseen = [Comparison("p", (f"{t} a", f"{t} x")) for t in texts[24:]]
    assert rm.evaluate(model, tokenizer, unseen).accuracy == 1.0
    assert (history[-1].threshold is None) == (loss != "rao-kupper")
    if loss == "rao-kupper":
        # two that were called equal are closer than the threshold, two that were not are further
        # apart
        same = rm.score_gaps(model, tokenizer, [Comparison("p", ("b n x", "c o x"))])
        assert same.abs() < history[-1].threshold < rm.score_gaps(model, tokenizer, unseen).min()


def test_the_tie_threshold_has_a_learning_rate_of_its_own(tokenizer):
    """Oracle: by hand. AdamW's first step has the size of the rate, whatever the gradient, so log ζ
    goes from 0 to ±0.05."""
    data = [Comparison("p", ("a b", "c d"), 0.5)] * 8
    model, _ = rm.load(build("gpt2"), tokenizer)
    config = Config(loss="rao-kupper", batch_size=8, warm_up=0.0, threshold_rate=0.05)
    (only,) = rm.train(model, tokenizer, data, config)
    assert abs(math.log(only.threshold)) == pytest.approx(0.05, rel=1e-4)


def test_soft_labels_are_matched_and_not_exceeded(tokenizer):
    """Oracle: the logit of the label is where the cross-entropy is least."""
    data = rm.labelled(["a"] * 2, ["b", "d"], ["c", "e"], torch.tensor([0.85, 0.3]))
    model, _ = rm.load(build("gpt2"), tokenizer)
    list(rm.train(model, tokenizer, data, Config(learning_rate=1e-2, epochs=300, batch_size=2)))
    gaps = rm.score_gaps(model, tokenizer, data)
    assert gaps.tolist() == pytest.approx([math.log(0.85 / 0.15), math.log(0.3 / 0.7)], abs=0.05)


def test_the_margin_is_what_the_scores_keep_apart(tokenizer):
    """Oracle: with label ½ + margin m the cross-entropy is least at a gap of m."""
    data = [Comparison("a", ("b", "c"), preference=0.5, margin=1.5)]
    model, _ = rm.load(build("gpt2"), tokenizer)
    list(rm.train(model, tokenizer, data, Config(learning_rate=1e-2, epochs=300)))
    assert rm.score_gaps(model, tokenizer, data).item() == pytest.approx(1.5, abs=0.05)


def test_a_weight_of_zero_is_as_if_the_pair_were_not_there(tokenizer):
    """Oracle: training without it, same steps."""
    ends = []
    for data in (DATA[:2], [*DATA[:2], DATA[2]._replace(weight=0.0)]):
        model, _ = rm.load(build("gpt2", dtype=torch.float64), tokenizer)
        list(rm.train(model, tokenizer, data, Config(batch_size=8, epochs=5)))
        ends.append(rm.score_gaps(model, tokenizer, DATA))
    assert torch.allclose(*ends, atol=1e-6)
    assert ends[0].abs().min() > 1e-4


def test_centring_pulls_the_mean_to_zero_and_keeps_the_gap(tokenizer):
    """Oracle: the centring term is zero where the scores of a pair sum to zero."""
    data = rm.labelled(["a"], ["b"], ["c"], torch.tensor([0.8]))
    sums = {}
    for coefficient in (0.0, 1.0):
        model = reward_model(tokenizer=tokenizer)
        config = Config(learning_rate=1e-2, epochs=400, centring=coefficient)
        list(rm.train(model, tokenizer, data, config))
        found = rm.scores(model, tokenizer, ["a"] * 2, ["b", "c"])
        sums[coefficient] = found.sum().abs().item()
        assert (found[0] - found[1]).item() == pytest.approx(math.log(4), abs=0.05)
    assert sums[1.0] < 0.02 < sums[0.0]


def test_every_comparison_is_used_once_an_epoch_whatever_its_length(tokenizer):
    """Oracle: the multiset of the rows that came."""
    data = [
        Comparison("a", ("b " * (1 + i % 7), f"c {WORDS[1 + i % 20]} d"), margin=float(i))
        for i in range(48)
    ]
    config = Config(batch_size=8, epochs=2, seed=3)
    margins = [b.margin for b in rm.batches(data, tokenizer, config, "cpu")]
    assert len(margins) == 12
    assert torch.cat(margins[:6]).sort().values.tolist() == [float(i) for i in range(48)]
    assert not torch.equal(torch.cat(margins[:6]), torch.cat(margins[6:]))
    again = [b.margin for b in rm.batches(data, tokenizer, config, "cpu")]
    assert all(torch.equal(x, y) for x, y in zip(margins, again, strict=True))


def test_rows_of_a_batch_belong_to_their_labels(tokenizer):
    """Oracle: the texts, tokenised one by one."""
    data = [one._replace(margin=float(i)) for i, one in enumerate(DATA)]
    (batch,) = rm.batches(data, tokenizer, Config(batch_size=4), "cpu")
    for row, margin in enumerate(batch.margin.tolist()):
        one = data[int(margin)]
        for k in range(2):
            ids = batch.tokens[2 * row + k][batch.attention_mask[2 * row + k].bool()].tolist()
            assert ids == [*tokenizer(f"{one.prompt} {one.responses[k]}")["input_ids"], EOS]


def test_pairs_with_ties_become_comparisons():
    pairs = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "tie": True},
        {"prompt": "p", "chosen": "a", "rejected": "b", "tie": None},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    assert [one.preference for one in rm.comparisons(pairs)] == [0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match="pairs is empty"):
        rm.comparisons([])


def test_the_strength_of_a_row_becomes_what_is_asked_and_no_field_is_lost():
    """Oracle: by hand; a row with every field that pairs have."""
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "tie": False, "strength": 3.0}
    row |= {"annotator": "Ann", "chosen_ended": True, "rejected_ended": False}
    assert set(row) == set(preferences.FEATURES)
    (plain,) = rm.comparisons(preferences.from_rows([row]))
    assert plain == Comparison("p", ("a", "b"))
    assert [isinstance(text, models.Cut) for text in plain.responses] == [False, True]
    rows = [row, row | {"strength": None}]
    assert [one.margin for one in rm.comparisons(rows, "margin")] == [3.0, 0.0]
    assert [one.weight for one in rm.comparisons(rows, strength="weight")] == [3.0, 1.0]
    with pytest.raises(ValueError, match="strength='preference' is unknown"):
        rm.comparisons(rows, "preference")
    with pytest.raises(ValueError, match=r"pairs\[1\] has the field 'margin'"):
        rm.comparisons([row, row | {"margin": 1.0}])


def test_a_run_repeats_and_measures_when_due(tokenizer):
    """Oracle: the same run again."""
    histories = []
    for _ in range(2):
        model, _ = rm.load(build("gpt2"), tokenizer)
        config = Config(epochs=5, batch_size=2, evaluate_every=4)
        histories.append(list(rm.train(model, tokenizer, DATA, config, held_out=DATA[:2])))
    assert histories[0] == histories[1]
    assert [m.step for m in histories[0] if m.held_out] == [4, 8, 10]


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        ([], Config(), "data is empty"),
        (DATA, Config(loss="hinge"), "loss='hinge' is unknown"),
        (
            [*DATA, Comparison("a", ("b", "c", "d"))],
            Config(),
            r"data\[4\] has 3 responses and data\[0\] has 2",
        ),
        ([Comparison("a", ("b", "c", "d"))], Config(), "plackett-luce"),
        ([Comparison("a", ("b",))], Config(loss="plackett-luce"), "comparisons of 1 responses"),
        (
            [DATA[0]._replace(margin=1.0)],
            Config(loss="rao-kupper"),
            r"data\[0\] has a margin, which loss='rao-kupper' does not use",
        ),
        ([DATA[0]._replace(weight=2.0)], Config(loss="plackett-luce"), r"data\[0\] has a weight"),
        ([DATA[0]._replace(preference=1.5)], Config(), "preference=1.5 must lie in"),
        (DATA, Config(learning_rate=0.0), "learning_rate"),
        (DATA, Config(epochs=0), "epochs"),
        (DATA, Config(centring=-1.0), "centring"),
    ],
)
def test_bad_data_and_settings_are_refused_by_name(data, config, message, tokenizer):
    model, _ = rm.load(build("gpt2"), tokenizer)
    with pytest.raises(ValueError, match=message):
        list(rm.train(model, tokenizer, data, config))


def test_a_run_that_blows_up_stops_and_says_what_to_do(tokenizer):
    model, _ = rm.load(build("gpt2"), tokenizer)
    with pytest.raises(TrainingStopped, match="lower learning_rate"):
        list(rm.train(model, tokenizer, DATA, Config(learning_rate=1e30, epochs=9)))


def test_the_shipped_model_learns_which_review_is_kinder():
    """Oracle: the words; a handful of comparisons, on the tiny GPT-2."""
    model, tokenizer = rm.load(settings.TINY)
    good, bad = ("superb", "brilliant", "moving", "witty"), ("dull", "awful", "clumsy", "thin")
    data = [
        Comparison("I saw it.", (f" The {n} is {g}.", f" The {n} is {b}."))
        for n in ("plot", "cast", "pace")
        for g, b in zip(good, bad, strict=True)
    ]
    list(rm.train(model, tokenizer, data, Config(epochs=5, batch_size=4)))
    unseen = [
        Comparison("I saw it.", (f" The music is {g}.", f" The music is {b}."))
        for g, b in zip(good, bad, strict=True)
    ]
    assert rm.evaluate(model, tokenizer, unseen).accuracy == 1.0


# --- calibration ---------------------------------------------------------------------------------


def drawn(n=4000, sharpness=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, generator=generator, dtype=torch.float64)
    labels = torch.bernoulli(logits.sigmoid(), generator=generator)
    return sharpness * logits, labels


@pytest.mark.equation("eq:calibration-error")
def test_calibration_by_hand():
    """Oracle: a table of four: two bins of the confidence, [½, ¾) and [¾, 1]."""
    p = torch.tensor([0.6, 0.3, 0.9, 0.2])
    gaps, labels = torch.logit(p), torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = rm.reliability(gaps, labels, bins=2)
    assert found.confidence.tolist() == pytest.approx([(0.6 + 0.7) / 2, (0.9 + 0.8) / 2])
    assert found.accuracy.tolist() == [0.5, 1.0]
    assert found.count.tolist() == [2, 2]
    wanted = (0.15 * 2 + 0.15 * 2) / 4
    assert rm.expected_calibration_error(gaps, labels, bins=2) == pytest.approx(wanted)


@pytest.mark.equation("eq:calibration-error")
def test_calibration_by_hand_with_empty_bins_and_a_gap_that_is_certain():
    """Oracle: a table of four in quarters of the confidence: one in the first, none in the middle,
    and three in the last, one of which is 1."""
    gaps = torch.tensor([math.log(0.6 / 0.4), math.log(9.0), 50.0, -math.log(49.0)])
    labels = torch.tensor([0.0, 1.0, 1.0, 1.0])
    found = rm.reliability(gaps, labels, bins=4)
    assert found.count.tolist() == [1, 0, 0, 3]
    assert found.confidence[[0, 3]].tolist() == pytest.approx([0.6, 2.88 / 3])
    assert found.confidence[1:3].isnan().all()
    assert found.accuracy[[0, 3]].tolist() == pytest.approx([0.0, 2 / 3])
    wanted = (0.6 + 3 * (2.88 - 2.0) / 3) / 4
    assert rm.expected_calibration_error(gaps, labels, bins=4) == pytest.approx(wanted)


@pytest.mark.equation("eq:calibration-error")
def test_true_probabilities_are_calibrated_and_doubled_logits_are_not():
    """Oracle: labels drawn from the probabilities; for the doubled ones the error that integration
    gives."""
    gaps, labels = drawn(400_000)
    assert rm.expected_calibration_error(gaps, labels) < 0.004
    z = torch.linspace(-14, 14, 200_001, dtype=torch.float64)
    density = (-(z**2) / 8).exp()
    error = ((2 * z.abs()).sigmoid() - z.abs().sigmoid()) * density
    assert rm.expected_calibration_error(2 * gaps, labels) == pytest.approx(
        (error.sum() / density.sum()).item(), abs=0.004
    )


def test_swapping_the_responses_changes_no_calibration():
    gaps, labels = drawn()
    assert rm.expected_calibration_error(-gaps, 1 - labels) == pytest.approx(
        rm.expected_calibration_error(gaps, labels)
    )


def test_the_temperature_is_the_maximum_likelihood_one():
    """Oracle: the coefficient of statsmodels' logistic regression, and a bounded search by scipy
    for soft labels."""
    gaps, labels = drawn(sharpness=2.5)
    fit = Logit(labels.numpy(), gaps.numpy()[:, None]).fit(disp=0)
    assert rm.fit_temperature(gaps, labels) == pytest.approx(1 / fit.params[0], rel=1e-4)
    soft = 0.2 + 0.6 * labels

    def loss(log_temperature):
        z = gaps / math.exp(log_temperature)
        return torch.nn.functional.binary_cross_entropy_with_logits(z, soft).item()

    best = minimize_scalar(loss, bounds=(-4, 6), method="bounded", options={"xatol": 1e-7})
    assert rm.fit_temperature(gaps, soft) == pytest.approx(math.exp(best.x), rel=1e-3)


def test_gaps_that_know_nothing_are_best_divided_by_infinity():
    """Oracle: the cross-entropy of ½ is below that of any other division."""
    gaps, labels = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.0])
    assert rm.fit_temperature(gaps, labels) == math.inf
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    assert all(loss(gaps / t, labels) > math.log(2) for t in (0.1, 1.0, 10.0, 1000.0))


def test_the_temperature_undoes_a_known_one():
    gaps, labels = drawn(400_000, sharpness=3.0)
    assert rm.fit_temperature(gaps, labels) == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rm.fit_temperature(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.0])),
            "right without exception",
        ),
        (lambda: rm.fit_temperature(torch.tensor([]), torch.tensor([])), "number of gaps"),
        (lambda: rm.reliability(torch.tensor([]), torch.tensor([])), "number of gaps"),
        (lambda: rm.reliability(torch.tensor([1.0]), torch.tensor([1.0]), 0), "bins"),
        (
            lambda: rm.reliability(torch.tensor([math.nan]), torch.tensor([1.0])),
            r"gaps\[0\] is nan",
        ),
        (lambda: rm.accuracy(torch.tensor([1.0]), torch.tensor([1.0, 0.0])), "shapes differ"),
        (lambda: rm.labelled(["a"], ["b"], ["c"], torch.ones(2)), "lengths"),
    ],
)
def test_bad_measurements_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_accuracy_counts_zero_gaps_and_ties_half():
    """Oracle: by hand: right, wrong, tie, zero gap, and a soft label of 0.9 on the wrong side."""
    gaps = torch.tensor([2.0, 1.0, 3.0, 0.0, -1.0])
    preference = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.9])
    assert rm.accuracy(gaps, preference) == pytest.approx((1 + 0 + 0.5 + 0.5 + 0.1) / 5)
