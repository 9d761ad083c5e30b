"""Pairs and their files, simulated annotators, agreement, strengths: against counts, SciPy,
published examples and choix."""

import itertools
import json
import math
import os
import re
import subprocess
import sys

import choix
import numpy as np
import pytest
import torch
from architectures import build
from datasets import Dataset
from scipy.stats import bootstrap, ks_1samp, logistic
from statsmodels.stats.inter_rater import aggregate_raters

from rlhf_helpers import models, preferences, settings
from rlhf_helpers.algorithms import dpo, reward_model
from rlhf_helpers.book.labelling import Session
from rlhf_helpers.losses import bradley_terry_loss, rao_kupper_loss
from rlhf_helpers.preferences import Annotator, annotate, choice_probabilities
from rlhf_helpers.worlds import reviews

PAIR = {"prompt": "How was it?", "chosen": "Good.", "rejected": "Bad."}


def row(**changes):
    return {**PAIR, **changes}


# --- pairs


def test_optional_columns_come_with_the_first_row_that_has_them():
    plain = preferences.from_rows([PAIR, row(chosen="Fine.")])
    assert plain.column_names == ["prompt", "chosen", "rejected"]
    mixed = preferences.from_rows([PAIR, row(annotator="Ann", strength=2, tie=np.bool_(True))])
    assert mixed.column_names == ["prompt", "chosen", "rejected", "tie", "strength", "annotator"]
    assert mixed[0] == row(tie=None, strength=None, annotator=None)
    assert mixed[1] == row(tie=True, strength=2.0, annotator="Ann")


TRICKY = [
    row(prompt="", chosen=" leading space", rejected="two\nlines\u2028of\ttext"),
    row(chosen='"quoted" \\ and é, 😀, \x00', rejected="\u00a0x", annotator="Zoë"),
    row(tie=False, strength=0.1 + 0.2, annotator="Ann"),
    row(strength=5e-324, tie=True),
]


@pytest.mark.parametrize("rows", [TRICKY, [PAIR], [row(tie=None)]])
def test_what_is_written_reads_back(rows, tmp_path):
    pairs, path = preferences.from_rows(rows), tmp_path / "pairs.jsonl"
    preferences.write_jsonl(pairs, path)
    back = preferences.read_jsonl(path)
    assert back.features == pairs.features
    assert back.to_list() == pairs.to_list()
    first = path.read_bytes()
    preferences.write_jsonl(back, path)
    assert path.read_bytes() == first
    # every line is JSON for others too
    assert len([json.loads(line) for line in first.split(b"\n")[:-1]]) == len(rows)
    assert os.listdir(tmp_path) == ["pairs.jsonl"]


def test_a_file_of_others_is_read(tmp_path):
    """Empty lines, carriage returns, a byte-order mark and a last line without an end change
    nothing."""
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps(PAIR), "", json.dumps(row(tie=True)), "  "]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, json.dumps(PAIR)]).encode())
    assert preferences.read_jsonl(path).to_list() == [
        row(tie=None),
        row(tie=True),
        row(tie=None),
    ]


def line(**changes):
    return json.dumps(row(**changes)).encode()


BAD = [
    (b'{"prompt": "x"', "line 2: not JSON: Expecting ',' delimiter at character 15"),
    (b"[" * 100_000, "line 2: not a pair: brackets nested too deep"),
    (b'["prompt"]', "line 2: is a list, not an object with prompt, chosen and rejected"),
    (b'{"prompt": "x", "rejected": "y"}', "line 2: chosen is missing"),
    (line(rejected=None), "line 2: rejected is missing"),
    (line(prompt=3), "line 2: prompt is a int, not a text"),
    (line(chosen=[{"role": "user"}]), "line 2: chosen is a list, not a text"),
    (line(rejected=" \n"), "line 2: rejected is empty"),
    (line(chosen="Bad."), "line 2: chosen equals rejected"),
    (line(tie=1), "line 2: tie is a int, not true or false"),
    (line(strength="big"), "line 2: strength is a str, not a number"),
    (line(strength=True), "line 2: strength is a bool, not a number"),
    (line(strength=-1), "line 2: strength must be a finite number ≥ 0"),
    (line(strength=math.nan), "line 2: strength must be a finite"),
    (line(strength=10**400), "line 2: strength must be a finite"),
    (line(annotator=7), "line 2: annotator is a int, not a text"),
    (line(anotator="Ann"), "line 2: unknown field 'anotator'; the fields are prompt, chosen,"),
    (line(chosen="caf\ud800"), "line 2: chosen is not valid Unicode"),
    (line()[:-1] + b', "chosen": "Else."}', "line 2: a field comes twice"),
    ('{"prompt": "caf\u00e9"}'.encode("latin-1"), "line 2: byte 15 is not UTF-8"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message[8:30] for _, message in BAD])
def test_a_bad_line_is_named_and_the_others_are_kept(bad, message, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([line(), bad, line(chosen="Fine.")]))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        preferences.read_jsonl(path)
    assert str(error.value).startswith(f"{path}: 1 bad; correct them or leave them out\n")
    pairs, problems = preferences.scan_jsonl(path)
    assert pairs.to_list() == [PAIR, row(chosen="Fine.")]
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_all_bad_lines_are_counted(tmp_path):
    """Twenty are shown, the rest is a number; a file with nothing good gives no pairs."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(line(chosen="") for _ in range(23)))
    with pytest.raises(ValueError, match=r"23 bad") as error:
        preferences.read_jsonl(path)
    shown = str(error.value).split("\n")[1:]
    assert shown == [f"line {n}: chosen is empty" for n in range(1, 21)] + ["and 3 more"]
    path.write_bytes(b"\n".join(line(chosen="") for _ in range(20)))
    with pytest.raises(ValueError, match=r"20 bad") as error:
        preferences.read_jsonl(path)
    assert str(error.value).split("\n")[1:] == shown[:-1]
    path.write_bytes(b"\n".join(line(chosen="") for _ in range(23)))
    pairs, problems = preferences.scan_jsonl(path)
    assert (len(pairs), len(problems)) == (0, 23)
    assert pairs.column_names == ["prompt", "chosen", "rejected"]
    path.write_bytes(b"\n")
    with pytest.raises(ValueError, match="holds no pairs"):
        preferences.read_jsonl(path)
    with pytest.raises(OSError, match="nowhere"):
        preferences.read_jsonl(tmp_path / "nowhere.jsonl")


def test_bad_rows_are_named():
    with pytest.raises(ValueError, match=re.escape("rows: 2 bad")) as error:
        preferences.from_rows([row(chosen="Bad."), PAIR, {"chosen": "Good."}])
    assert str(error.value).split("\n")[1:] == [
        "rows[0]: chosen equals rejected",
        "rows[2]: prompt is missing",
    ]
    with pytest.raises(ValueError, match="rows is empty"):
        preferences.from_rows([])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    preferences.write_jsonl([PAIR], path)
    old = path.read_bytes()
    with pytest.raises(ValueError, match="chosen is empty"):
        preferences.write_jsonl([PAIR, row(chosen="")], path)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(preferences.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        preferences.write_jsonl([row(chosen="Fine.")], path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["pairs.jsonl"]


def test_the_data_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    path, done = tmp_path / "pairs.jsonl", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(preferences.os, "fsync", lambda f: (done.append("fsync"), fsync(f)))
    monkeypatch.setattr(
        preferences.os, "replace", lambda a, b: (done.append(os.path.getsize(a)), replace(a, b))
    )
    preferences.write_jsonl([PAIR], path)
    assert done == ["fsync", path.stat().st_size]


# --- annotators

N = 20_000
LETTERS = dict(zip("abc", (0.0, 1.0, 2.5), strict=True))


def utility(prompts, responses, **columns):
    """Of a response: a number for its first letter, whatever its length."""
    return [LETTERS[response[0]] for response in responses]


def repeated(first, second, n=N):
    return ["?"] * n, [first] * n, [second] * n


ANNOTATORS = [
    Annotator("plain"),
    Annotator("sharp", temperature=0.5),
    Annotator("likes length", length_bias=0.3),
    Annotator("likes the first", position_bias=0.8),
    Annotator("careless", noise=0.4),
    Annotator("undecided", tie_threshold=0.7),
    Annotator("all at once", 2.0, -0.1, -0.5, 0.2, 0.4),
]
SHOWN = [("b", "a"), ("a", "c"), ("b one two", "c")]


def by_hand(annotator, first, second):
    """P(first preferred), P(tie), P(second preferred), from the logistic distribution of what is
    felt."""
    longer = len(first.split()) - len(second.split())
    z = (LETTERS[first[0]] - LETTERS[second[0]]) / annotator.temperature
    z += annotator.length_bias * longer + annotator.position_bias
    t, share = annotator.tie_threshold, annotator.noise
    p = []
    for cdf in (lambda x: logistic.cdf(x, loc=z), logistic.cdf):
        p.append(np.array([1 - cdf(t), cdf(t) - cdf(-t), cdf(-t)]))
    return (1 - share) * p[0] + share * p[1]


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.equation("eq:annotator")
def test_probabilities_of_each_choice(shown):
    """Oracle: SciPy's logistic distribution; without ties also (1 − noise) σ(z) + noise/2."""
    found = choice_probabilities(*repeated(*shown, n=1), utility, ANNOTATORS)
    assert found.shape == (1, len(ANNOTATORS), 3)
    for annotator, p in zip(ANNOTATORS, found[0], strict=True):
        np.testing.assert_allclose(p, by_hand(annotator, *shown), rtol=1e-12, atol=1e-15)
    gap = LETTERS[shown[0][0]] - LETTERS[shown[1][0]]
    assert found[0, 4, 0].item() == pytest.approx(0.6 / (1 + math.exp(-gap)) + 0.2)


def test_large_utilities_keep_their_differences():
    """Oracle: σ(1), although 10^8 and 10^8 + 1 are the same number in single precision."""
    large = choice_probabilities(["?"], ["b"], ["a"], lambda p, r: [1e8 + (r == ["b"])], PLAIN)
    assert large[0, 0, 0].item() == pytest.approx(logistic.cdf(1.0))


@pytest.mark.parametrize("shown", SHOWN)
def test_labels_come_as_often_as_they_should(shown):
    """Oracle: counts of 20,000 labels, within 4 standard errors; the labels of two annotators are
    independent."""
    labels = annotate(*repeated(*shown), utility, ANNOTATORS, seed=1).preferences.numpy()
    assert labels.shape == (N, len(ANNOTATORS))
    for annotator, column in zip(ANNOTATORS, labels.T, strict=True):
        for value, p in zip((1.0, 0.5, 0.0), by_hand(annotator, *shown), strict=True):
            assert abs((column == value).mean() - p) <= 4 * math.sqrt(p * (1 - p) / N)
    assert abs(np.corrcoef(labels[:, 0], labels[:, 1])[0, 1]) < 4 / math.sqrt(N)


def test_rows_say_what_the_labels_say():
    """Oracle: the rows rebuilt from the labels; strength is the size of a logistic variable around
    z."""
    prompts = [f"{i}" for i in range(500)]
    first, second = ["b"] * 500, ["a"] * 500
    two = [Annotator("plain"), Annotator("undecided", tie_threshold=1.0)]
    pairs, labels = annotate(prompts, first, second, utility, two)
    assert isinstance(pairs, Dataset)
    assert pairs["prompt"] == [p for p in prompts for _ in two]
    assert pairs["annotator"] == ["plain", "undecided"] * 500
    flat = labels.flatten().tolist()
    assert pairs["tie"] == [label == 0.5 for label in flat]
    assert pairs["chosen"] == ["a" if label == 0 else "b" for label in flat]
    assert pairs["rejected"] == ["b" if label == 0 else "a" for label in flat]
    strength = np.array(pairs["strength"])
    assert (strength[np.array(flat) == 0.5] == 0).all()
    assert strength[1::2][labels[:, 1] != 0.5].min() > 1.0
    felt = strength[::2] * np.where(labels[:, 0] == 1, 1, -1)
    assert ks_1samp(felt, logistic(loc=1.0).cdf).pvalue > 0.01


def test_the_same_seed_gives_the_same_labels_in_another_process():
    code = (
        "from rlhf_helpers.preferences import Annotator, annotate\n"
        "pairs, _ = annotate(['?'] * 30, ['b'] * 30, ['a'] * 30, "
        "lambda p, r: [float(t == 'b') for t in r], [Annotator('plain', noise=0.1)], seed=3)\n"
        "print(pairs.to_list())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    args = (*repeated("b", "a", n=30), utility, [Annotator("plain", noise=0.1)])
    assert printed.strip() == str(annotate(*args, seed=3).pairs.to_list())
    assert not torch.equal(annotate(*args, seed=3)[1], annotate(*args, seed=4)[1])
    # an annotator more changes nothing about the first
    both = annotate(*args[:4], [Annotator("other"), *args[4]], seed=3).preferences
    assert torch.equal(both[:, 1:], annotate(*args, seed=3).preferences)


def test_labels_are_those_that_the_losses_assume():
    """Oracle: the losses are least, over all strengths and thresholds of a grid, at those the
    labels were made with."""
    one = [Annotator("undecided", tie_threshold=0.7)]
    labels = annotate(*repeated("b", "a"), utility, one).preferences[:, 0]
    grid = list(itertools.product(np.arange(0, 2.01, 0.1), np.arange(0.1, 1.51, 0.1)))
    zero = torch.zeros(N, dtype=torch.float64)
    losses = [rao_kupper_loss(zero + gap, zero, labels, t).item() for gap, t in grid]
    assert grid[int(np.argmin(losses))] == pytest.approx((1.0, 0.7))
    labels = annotate(*repeated("b", "a"), utility, [Annotator("plain")]).preferences[:, 0]
    losses = [
        bradley_terry_loss(zero + gap, zero, preference=labels).item() for gap in (0.9, 1.0, 1.1)
    ]
    assert int(np.argmin(losses)) == 1


def test_the_ceiling_is_what_the_best_predictor_reaches():
    """Oracle: accuracy of the likelier label on 60,000 labels without ties, within 4 standard
    errors; and by hand."""
    shown = [repeated(*pair) for pair in SHOWN]
    columns = [list(itertools.chain(*column)) for column in zip(*shown, strict=True)]
    one = [Annotator("all at once", 2.0, -0.1, -0.5, 0.2, 0.4)]
    p = choice_probabilities(*columns, utility, one)
    labels = annotate(*columns, utility, one).preferences[:, 0]
    guess = (p[:, 0, 0] > p[:, 0, 2]).double()
    decided = labels != 0.5
    accuracy = (guess == labels)[decided].double().mean().item()
    error = math.sqrt(accuracy * (1 - accuracy) / decided.sum().item())
    assert abs(preferences.ceiling(p) - accuracy) < 4 * error
    hand = torch.tensor([[0.9, 0.0, 0.1], [0.3, 0.0, 0.7]])
    assert preferences.ceiling(hand) == pytest.approx(0.8)


def test_the_ceiling_of_who_does_not_know_the_order():
    """Oracle: accuracy of the better guess a response on labels of pairs shown in random order."""
    one = [Annotator("likes the first", position_bias=1.5)]
    swap = np.random.default_rng(0).random(N) < 0.5
    order = [("a", "b") if s else ("b", "a") for s in swap]
    first, second = map(list, zip(*order, strict=True))
    labels = annotate(["?"] * N, first, second, utility, one).preferences[:, 0].numpy()
    accuracy = np.where(swap, labels == 0, labels == 1).mean()
    p = choice_probabilities(*repeated("b", "a", n=1), utility, one)
    swapped = choice_probabilities(*repeated("a", "b", n=1), utility, one)
    blind = preferences.ceiling((p + swapped.flip(-1)) / 2)
    assert abs(blind - accuracy) < 4 * math.sqrt(accuracy * (1 - accuracy) / N)
    assert preferences.ceiling(torch.cat([p, swapped])) > blind + 0.05


# --- several people


def test_answers_of_several_people_come_together_by_pair(tmp_path):
    """Oracle: the labels that the rows were made of, whichever response was shown first, in
    whatever order the rows are."""
    prompts, first, second = ["p", "p", "q"], ["a", "b", "d"], ["c", "a", "c"]
    people = [Annotator(name, tie_threshold=1.0) for name in ("Bob", "Ann", "Cem")]
    said = annotate(prompts, first, second, lambda p, r: [float(len(x)) for x in r], people, seed=3)
    assert len(said.preferences.unique()) == 3  # wins, ties and losses
    rows = [row for i, row in enumerate(said.pairs) if i != 7]  # Ann did not answer the last
    preferences.write_jsonl(rows[::-1], tmp_path / "answers.jsonl")
    found = preferences.by_pair(preferences.read_jsonl(tmp_path / "answers.jsonl"))
    assert found.annotators == ["Ann", "Bob", "Cem"]
    where = {key: i for i, key in enumerate(zip(*found[:3], strict=True))}
    assert len(where) == 3
    for i, (prompt, one, two) in enumerate(zip(prompts, first, second, strict=True)):
        labels = found.preferences[where[prompt, *sorted((one, two))]]
        wanted = said.preferences[i, [1, 0, 2]]
        wanted = wanted if one < two else 1 - wanted
        if i == 2:
            wanted[0] = GAP
        assert np.array_equal(labels, wanted, equal_nan=True)


def test_conversations_of_several_people_come_together_too():
    talk = [{"role": "user", "content": "How was it?"}]
    one = {"prompt": talk, "chosen": "Good.", "rejected": "Bad.", "annotator": "Ann"}
    two = one | {"chosen": "Bad.", "rejected": "Good.", "annotator": "Bob"}
    found = preferences.by_pair([one, two])
    assert (found.prompts, found.first, found.second) == ([talk], ["Bad."], ["Good."])
    assert found.preferences.tolist() == [[0.0, 1.0]]


# --- agreement

# Fleiss 1971, as on the page Fleiss' kappa of Wikipedia: ten items, fourteen annotators, kappa
# 0.20993
FLEISS = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]
GAP = math.nan
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve
# units
KRIPPENDORFF = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, GAP, GAP, GAP],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, GAP, 3],
    [GAP, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, GAP],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, GAP],
]


def test_published_kappa():
    """Oracle: the example that Wikipedia works out, 0.210."""
    kappa = preferences.fleiss_kappa(FLEISS)
    assert kappa.value == pytest.approx(0.20993, abs=5e-6)
    assert kappa.low < kappa.value < kappa.high


@pytest.mark.parametrize(
    ("level", "alpha"),
    [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849), ("ratio", 0.797)],
)
def test_published_alpha(level, alpha):
    """Oracle: the values of Krippendorff's paper, with missing ratings."""
    found = preferences.krippendorff_alpha(np.array(KRIPPENDORFF).T, level)
    assert found.value == pytest.approx(alpha, abs=5e-4)
    assert found.low < found.value < found.high


def simulated_ratings(n, seed=0):
    annotators = [Annotator(f"{i}", temperature=0.7) for i in range(3)]
    first = [list("abc")[i % 3] for i in range(n)]
    second = [list("bca")[i % 3] for i in range(n)]
    return annotate(["?"] * n, first, second, utility, annotators, seed).preferences


def test_the_interval_is_that_of_the_bootstrap():
    """Oracle: SciPy's percentile bootstrap over items with another seed, to a twentieth of the
    interval's width."""
    ratings = simulated_ratings(150)
    table = aggregate_raters(ratings.numpy())[0]

    def interval(function, items):
        result = bootstrap(
            (np.arange(len(items)),),
            lambda chosen: function(items[chosen]).value,
            n_resamples=2000,
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(5),
        )
        return result.confidence_interval

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preferences, "_RESAMPLES", 1)
        scipys = [
            interval(preferences.fleiss_kappa, table),
            interval(preferences.krippendorff_alpha, ratings.numpy()),
        ]
    ours = [preferences.fleiss_kappa(table), preferences.krippendorff_alpha(ratings)]
    for (low, high), found in zip(scipys, ours, strict=True):
        width = high - low
        assert abs(found.low - low) < width / 20
        assert abs(found.high - high) < width / 20
    assert preferences.fleiss_kappa(table) == ours[0]
    assert preferences.fleiss_kappa(table, seed=1) != ours[0]


def test_agreement_of_annotators_who_do_not_look():
    """Oracle: they agree by chance alone, so both coefficients are 0 within their intervals; one
    who is copied gives 1."""
    annotators = [Annotator(f"{i}", noise=1.0) for i in range(3)]
    ratings = annotate(*repeated("b", "a", n=400), utility, annotators).preferences
    alpha = preferences.krippendorff_alpha(ratings)
    kappa = preferences.fleiss_kappa(aggregate_raters(ratings.numpy())[0])
    assert alpha.low < 0 < alpha.high
    assert kappa.low < 0 < kappa.high
    assert preferences.krippendorff_alpha(ratings[:, [0, 0]]) == (1.0, 1.0, 1.0)


def test_items_with_one_rating_do_not_count():
    """Oracle: the same ratings without them, interval included."""
    ratings = np.array(KRIPPENDORFF).T
    lonely = np.full((3, 4), math.nan)
    lonely[0, 0] = 9.0
    more = np.concatenate([lonely, ratings])
    assert preferences.krippendorff_alpha(more) == preferences.krippendorff_alpha(ratings)


def test_resamples_without_a_coefficient_are_left_out():
    """Oracle: by hand: a quarter of the resamples hold the first item twice, and with it a single
    category."""
    found = preferences.fleiss_kappa([[2, 0], [1, 1]])
    assert all(map(math.isfinite, found))


# --- strengths


def wins_of(k, spread, n, seed):
    """Wins of n comparisons a pair, and one each way around so that strengths exist."""
    rng = np.random.default_rng(seed)
    strengths = spread * rng.normal(size=k)
    p = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    won = np.triu(rng.binomial(n, p), 1)
    wins = won + np.triu(n - won, 1).T
    for i in range(k):
        wins[i, (i + 1) % k] += 1
    return wins


@pytest.mark.parametrize(("k", "spread", "n"), [(2, 1, 10), (3, 1, 10), (8, 1, 20), (30, 2, 5)])
def test_strengths_equal_those_of_choix(k, spread, n):
    """Oracle: the maximum-likelihood estimate of the library choix."""
    wins = wins_of(k, spread, n, seed=k)
    found = preferences.fit_strengths(wins)
    expected = choix.ilsr_pairwise_dense(wins.astype(float), max_iter=1000, tol=1e-12)
    np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-6)
    assert abs(found.mean().item()) < 1e-12


@pytest.mark.parametrize("spread", [0.5, 1.5, 10.0])
def test_strengths_with_a_prior_equal_those_of_choix(spread):
    """Oracle: the penalised estimate of the library choix, whose penalty is alpha times the sum of
    squares; item 7 won everything and item 6 nothing, so that the likelihood has no maximum."""
    wins = wins_of(8, 1, 3, seed=2)
    wins[:, 7] = 0
    wins[6] = 0
    found = preferences.fit_strengths(wins, spread)
    data = [(i, j) for i in range(8) for j in range(8) for _ in range(int(wins[i, j]))]
    expected = choix.opt_pairwise(8, data, alpha=0.5 / spread**2, tol=1e-12)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(ValueError, match="never lost"):
        preferences.fit_strengths(wins)


def test_strengths_with_a_wide_prior_are_those_without():
    """Oracle: the limit of the prior's spread."""
    wins = wins_of(6, 1, 20, seed=3)
    wide = preferences.fit_strengths(wins, 1e4)
    np.testing.assert_allclose(wide, preferences.fit_strengths(wins), atol=1e-6)


def test_strengths_of_two_items_are_their_log_odds():
    """Oracle: log(wins / losses), halved by the mean of zero; half wins are ties."""
    found = preferences.fit_strengths([[0, 7.5], [2.5, 0]])
    assert found.tolist() == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-8)


@pytest.mark.parametrize("losses", [1, 3])
@pytest.mark.parametrize("power", range(13))
def test_strengths_of_lopsided_counts(power, losses):
    """Oracle: the closed form for two items, half the log-odds, from 1:1 to 1e12:1; and a third
    item that met the weaker of the two twice, once each."""
    half = math.log(10**power) / 2
    wins = losses * np.array([[0, 10.0**power], [1, 0]])
    assert preferences.fit_strengths(wins).tolist() == pytest.approx([half, -half], abs=1e-8)
    assert preferences.fit_strengths(wins.T).tolist() == pytest.approx([-half, half], abs=1e-8)
    three = np.zeros((3, 3))
    three[:2, :2], three[1, 2], three[2, 1] = wins, 1, 1
    found = preferences.fit_strengths(three)
    assert (found[0] - found[1]).item() == pytest.approx(2 * half, abs=1e-6)
    assert (found[1] - found[2]).item() == pytest.approx(0, abs=1e-6)


def test_strengths_of_a_long_chain():
    """Oracle: neighbours alone were compared, so each gap is the log-odds of a pair: log 100,
    twenty times."""
    wins = np.diag([100.0] * 20, 1) + np.diag([1.0] * 20, -1)
    found = preferences.fit_strengths(wins)
    np.testing.assert_allclose(-np.diff(found), math.log(100), atol=1e-5)


def test_the_fitted_wins_are_the_wins():
    """Oracle: at the maximum, each item's expected number of wins is the number it has."""
    wins = wins_of(6, 1, 9, seed=4)
    r = preferences.fit_strengths(wins).numpy()
    played = wins + wins.T
    expected = (played / (1 + np.exp(r[None, :] - r[:, None]))).sum(1)
    np.testing.assert_allclose(expected, wins.sum(1), rtol=1e-6)


def violations_by_hand(p):
    """Triples in which some order a, b, c has P(a over b) ≥ ½, P(b over c) ≥ ½ and P(a over c) <
    ½."""
    return sum(
        any(
            p[a][b] >= 0.5 and p[b][c] >= 0.5 and p[a][c] < 0.5
            for a, b, c in itertools.permutations(triple)
        )
        for triple in itertools.combinations(range(len(p)), 3)
    )


@pytest.mark.parametrize("seed", range(5))
def test_intransitive_triples(seed):
    """Oracle: a loop over all triples and orders, on preferences at random, some of them equal."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.choice([0.2, 0.5, 0.9], size=(7, 7)), 1)
    p = upper + np.triu(1 - upper, 1).T + np.diag([math.nan] * 7)
    assert preferences.stochastic_transitivity_violations(p) == violations_by_hand(p)
    assert math.isnan(p[0, 0])


def test_strengths_never_break_transitivity_and_a_cycle_does():
    """Oracle: Bradley-Terry probabilities are transitive; scissors, paper, stone are the one triple
    that is not."""
    r = preferences.fit_strengths(wins_of(8, 1, 20, seed=1))
    bradley_terry = torch.sigmoid(r[:, None] - r[None, :])
    assert preferences.stochastic_transitivity_violations(bradley_terry) == 0
    assert preferences.stochastic_transitivity_violations(bradley_terry[:2, :2]) == 0
    cycle = [[0, 0.9, 0.1], [0.1, 0, 0.9], [0.9, 0.1, 0]]
    assert preferences.stochastic_transitivity_violations(cycle) == 1


# --- bad input

ONE = (["?"], ["a"], ["b"])
PLAIN = [Annotator("plain")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Annotator(" "), "name is empty"),
        (lambda: Annotator("x", temperature=0), "temperature=0 must lie in (0.0"),
        (lambda: Annotator("x", noise=1.1), "noise=1.1 must lie in"),
        (lambda: Annotator("x", tie_threshold=-1), "tie_threshold=-1 must lie in"),
        (lambda: Annotator("x", length_bias=math.nan), "length_bias=nan must lie in"),
        (lambda: Annotator("x", position_bias=math.inf), "position_bias=inf must lie in"),
        (
            lambda: annotate(["?"], ["a"], ["b", "c"], utility, PLAIN),
            "prompts, first and second have lengths [1, 1, 2]",
        ),
        (lambda: annotate([], [], [], utility, PLAIN), "have lengths [0, 0, 0]"),
        (lambda: annotate(*ONE, utility, []), "annotators have the names []"),
        (lambda: annotate(*ONE, utility, PLAIN * 2), "the names ['plain', 'plain']"),
        (
            lambda: choice_probabilities(["?"] * 2, ["a", "b"], ["c", "b"], utility, PLAIN),
            (
                "first (as chosen) and second (as rejected): 1 bad; correct them or leave them"
                " out\npair 1: chosen equals rejected"
            ),
        ),
        (lambda: annotate(*ONE, lambda p, r: [], PLAIN), "utility gave 0 numbers for 1 responses"),
        (lambda: annotate(*ONE, lambda p, r: [None], PLAIN), "utility[0] is nan"),
        (lambda: preferences.ceiling(torch.ones(4, 2)), "probabilities has shape (4, 2)"),
        (lambda: preferences.ceiling(torch.ones(4, 3)), "sum to 1"),
        (lambda: preferences.ceiling(torch.tensor([2.0, 0.0, -1.0])), "must be ≥ 0"),
        (lambda: preferences.ceiling(torch.tensor([0.0, 1.0, 0.0])), "ties only"),
        (lambda: preferences.by_pair([PAIR]), "pairs[0] has no annotator"),
        (
            lambda: preferences.by_pair([row(annotator="Ann"), row(annotator="Ann")]),
            "pairs[1] is a second answer of 'Ann'",
        ),
        (lambda: preferences.fleiss_kappa([1, 2]), "table has shape (2,)"),
        (lambda: preferences.fleiss_kappa([[1, 2]]), "table has shape (1, 2)"),
        (lambda: preferences.fleiss_kappa([[1.5, 0.5], [1, 1]]), "table must hold counts"),
        (lambda: preferences.fleiss_kappa([[3, -1], [1, 1]]), "table must hold counts"),
        (lambda: preferences.fleiss_kappa([[3, 0], [1, 1]]), "sums from 2 to 3"),
        (lambda: preferences.fleiss_kappa([[1, 0], [0, 1]]), "sums from 1 to 1"),
        (lambda: preferences.fleiss_kappa([[2, 0], [2, 0]]), "only one category in use"),
        (
            lambda: preferences.krippendorff_alpha([[1, 2]] * 2, "exact"),
            "level='exact' is unknown",
        ),
        (lambda: preferences.krippendorff_alpha([1, 2]), "ratings has shape (2,)"),
        (lambda: preferences.krippendorff_alpha([[1, math.inf]] * 2), "pass finite"),
        (lambda: preferences.krippendorff_alpha([[1, GAP], [1, 2]]), "fewer than two items"),
        (lambda: preferences.krippendorff_alpha([[1, 1], [1, 1]]), "ratings are all 1"),
        (lambda: preferences.fit_strengths([[0, 1]]), "wins has shape (1, 2)"),
        (lambda: preferences.fit_strengths([[0]]), "wins has shape (1, 1)"),
        (lambda: preferences.fit_strengths([[0, -1], [1, 0]]), "wins must be ≥ 0"),
        (lambda: preferences.fit_strengths([[1, 1], [1, 0]]), "0 on the diagonal"),
        (lambda: preferences.fit_strengths([[0, GAP], [1, 0]]), "wins[0, 1] is nan"),
        (
            lambda: preferences.fit_strengths([[0, 0, 0], [1, 0, 2], [1, 2, 0]]),
            "items [1, 2] never lost to the others",
        ),
        (
            lambda: preferences.stochastic_transitivity_violations([[0.5, 0.5]]),
            "p has shape (1, 2)",
        ),
        (
            lambda: preferences.stochastic_transitivity_violations([[0, 0.6], [0.6, 0]]),
            "p[i, j] + p[j, i] must be 1",
        ),
        (
            lambda: preferences.stochastic_transitivity_violations([[0, 1.1], [-0.1, 0]]),
            "p must lie in [0, 1]",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_pairs_are_sampled_from_the_policy_and_can_be_compared():
    """Oracle: the openings, and the same run again; a policy that writes one word can give no
    pairs."""
    policy, tokenizer = models.load(models.TINY)
    prompts = reviews.openings("validation", 20)
    runs = [
        preferences.sample_pairs(
            policy, tokenizer, prompts, 24, torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    kept, first, second = runs[0]
    assert len(kept) == len(first) == len(second)
    assert set(kept) <= set(prompts)
    assert all(a != b and a.strip() and b.strip() for a, b in zip(first, second, strict=True))
    annotate(kept, first, second, reviews.quality, [Annotator("a")])
    with torch.no_grad():  # a constant hidden state whose likeliest token is the end
        for norm in (policy.transformer.ln_f.weight, policy.transformer.ln_f.bias):
            norm.zero_()
        policy.transformer.ln_f.bias.copy_(1000 * policy.lm_head.weight[tokenizer.eos_token_id])
    with pytest.raises(ValueError, match="two equal responses, or an empty one"):
        preferences.sample_pairs(policy, tokenizer, prompts, 24)


def test_pairs_of_equal_responses_are_left_out(monkeypatch):
    """Oracle: four pairs by hand: two of them are equal, one as text and one but for its
    spaces."""
    texts = [" good", " bad", " good", " good", " a", " b", " fine", " fine "]
    monkeypatch.setattr(preferences, "write", lambda *_, **__: texts)
    _, tokenizer = models.load(models.TINY)
    found = preferences.sample_pairs(None, tokenizer, ["p", "q", "r", "s"], 4)
    assert found == (["p", "r"], [" good", " a"], [" bad", " b"])


# --- one rule for what can be compared -----------------------------------------------------------

# (first, second, what is wrong with them)
NEAR = [
    (" good", " good", "equal"),
    (" good", " good\n", "equal"),
    (" good", "good", "equal"),
    ("good\r\nfilm", "good\nfilm", "equal"),
    ("good", "go\u200bod", "equal"),
    ("good\ufeff", "good", "equal"),
    ("\u2028good", "good", "equal"),
    ("caf\u00e9", "cafe\u0301", "equal"),
    ("good", "", "empty"),
    ("good", " \n", "empty"),
    ("\u200b", "good", "empty"),
    ("\ufeff\u2060", "good", "empty"),
    ("\u3164", "good", "empty"),
    ("good", "\u200e", "empty"),
    ("good", "Good", None),
    ("good", "good.", None),
    ("a\nb", "a b", None),
    ("\U0001f468\u200d\U0001f469", "\U0001f468\U0001f469", None),
]


def takers(tokenizer, path):
    """Whatever makes, reads, shows or trains on pairs, as functions of two responses."""
    labels, people = torch.ones(1), [Annotator("a")]
    zeros = lambda prompts, completions: [0.0] * len(completions)  # noqa: E731

    def sampled(one, two):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preferences, "write", lambda *_, **__: [one, two])
            preferences.sample_pairs(None, tokenizer, ["p"], 4)

    def trained(one, two):
        model, _ = reward_model.load(build("gpt2", vocab_size=len(tokenizer)), tokenizer)
        pair = reward_model.Comparison("p", (one, two))
        next(reward_model.train(model, tokenizer, [pair], reward_model.Config()))

    return {
        "rows": lambda *x: preferences.from_rows([row(chosen=x[0], rejected=x[1])]),
        "annotators": lambda a, b: annotate(["p"], [a], [b], zeros, people),
        "chances": lambda a, b: choice_probabilities(["p"], [a], [b], zeros, people),
        "panel": lambda a, b: Session([("p", a, b)], path),
        "labelled": lambda a, b: reward_model.labelled(["p"], [a], [b], labels),
        "dpo": lambda *x: dpo.encode(tokenizer, [reward_model.Comparison("p", x)]),
        "reward model": trained,
        "sampling": sampled,
    }


@pytest.mark.parametrize(("first", "second", "problem"), NEAR)
def test_all_agree_on_what_can_be_compared(first, second, problem, tmp_path):
    """Oracle: the table."""
    _, tokenizer = models.load(models.TINY)
    for take in takers(tokenizer, tmp_path / "answers.jsonl").values():
        for pair in ((first, second), (second, first)):
            if problem is None:
                take(*pair)
            else:
                with pytest.raises(ValueError, match=r"empty|equal"):
                    take(*pair)


def test_where_there_are_tokens_they_have_to_differ_too():
    """Two letters that the tokenizer does not know are one token."""
    _, tokenizer = models.load(settings.TINY_ARITHMETIC)
    data = [reward_model.Comparison("1+1=", x) for x in (("2", "3"), ("9x", "9y"))]
    with pytest.raises(ValueError, match=r"data\[1\] has two responses with the same tokens"):
        dpo.encode(tokenizer, data)
    model, _ = reward_model.load(*models.load(settings.TINY_ARITHMETIC))
    with pytest.raises(ValueError, match=r"data\[1\] has two responses with the same tokens"):
        next(reward_model.train(model, tokenizer, data, reward_model.Config()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preferences, "write", lambda *_, **__: ["9x", "9y", "2", "3"])
        found = preferences.sample_pairs(None, tokenizer, ["p", "q"], 4)
    assert found == (["q"], ["2"], ["3"])
