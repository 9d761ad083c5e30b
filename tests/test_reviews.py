"""The grammar of reviews: one derivation a text, probabilities that sum to one, an entropy that
samples confirm."""

import itertools
import math
import re
import statistics
import subprocess
import sys
from collections import Counter

import pytest

from rlhf_helpers import worlds
from rlhf_helpers.worlds import reviews


def words(texts):
    return {word for text in texts for word in re.findall(r"[\w'-]+", text.lower())}


def everything_about(film):
    """Every judgement the grammar can write of a film, with its aspect and valence."""
    for aspect, valence in itertools.product(reviews.aspects_of(film), reviews.VALENCES):
        for text, p in reviews._judgements(aspect, valence).probs.items():
            yield aspect, valence, text, p


FILMS = [None] + [
    reviews.Film("Danish", genre, subject)
    for genre, subject in itertools.product(reviews.GENRES, reviews.SUBJECTS)
]


def test_the_vocabulary_is_rich():
    assert len(words(reviews.texts("train", 3000))) >= 400


def test_no_judgement_can_be_made_in_two_ways():
    """One text, one aspect, one valence; nothing in it looks like what joins sentences."""
    for film in FILMS:
        found = [text for _, _, text, _ in everything_about(film)]
        assert len(found) == len(set(found))
        assert not [text for text in found if re.search(r"[.,]| and |Although", text)]
        closing = {v for stars in range(1, 6) for v in reviews.VERDICTS[stars]}
        assert not closing & {f"{text[0].upper()}{text[1:]}." for text in found}


def test_no_opening_can_be_made_in_two_ways():
    films = list(reviews._films())
    assert len(films) == len(set(films)) == 22 * 12 * 32
    frames = reviews._openings().values
    pieces = [tuple(frame.split("{film}")) for frame in frames]
    assert len(set(pieces)) == len(frames)
    # films have no full stop, and no two frames share their beginning with an end that continues
    # the other's
    for one, other in itertools.combinations(pieces, 2):
        if one[0] == other[0]:
            assert not one[1].endswith(other[1])
            assert not other[1].endswith(one[1])
        else:
            assert not one[0].startswith(other[0]) or one[1] != other[1]


def test_every_distribution_sums_to_one():
    tables = [reviews._plans(), reviews._openings(), *(reviews._sentences(u) for u in "SCJ")]
    tables += [reviews._plans_with(stars) for stars in range(1, 6)]
    tables += [reviews._verdicts(s, g) for s in range(1, 6) for g in [None, *reviews.GENRES]]
    tables += [
        reviews._judgements(a, v) for a in reviews.aspects_of(FILMS[1]) for v in reviews.VALENCES
    ]
    for table in tables:
        assert math.isclose(sum(table.probs.values()), 1.0, abs_tol=1e-12)
        assert min(table.probs.values()) > 0


@pytest.mark.parametrize("split", reviews.SPLITS)
def test_what_is_written_reads_back(split):
    for review in reviews.sample(500, seed=3, split=split):
        assert reviews.parse(review.text) == review
        assert review.opening + review.body == review.text
        assert review.stars == reviews.stars_of(j.valence for j in review.judgements)
        assert -1 <= review.sentiment <= 1
        for judgement in review.judgements:
            assert judgement.text[1:] in review.text


def test_the_entropy_is_the_mean_surprise():
    """Oracle: the mean of −log P over 20,000 reviews of all splits in their shares, within four
    standard errors."""
    rng_shares = {split: len(reviews._films_of(split)) for split in reviews.SPLITS}
    total = sum(rng_shares.values())
    means = {}
    for name in ("log_prob", "body_log_prob"):
        sample = {s: reviews.sample(7000, seed=5, split=s) for s in reviews.SPLITS}
        mean = sum(
            rng_shares[s] / total * -statistics.mean(getattr(r, name) for r in sample[s])
            for s in reviews.SPLITS
        )
        variance = sum(
            (rng_shares[s] / total) ** 2
            * statistics.variance([getattr(r, name) for r in sample[s]])
            / 7000
            for s in reviews.SPLITS
        )
        means[name] = (mean, 4 * variance**0.5)
    whole, width = means["log_prob"]
    assert abs(whole - reviews.entropy()) < width
    body, width = means["body_log_prob"]
    # behind a rating the stars are known already
    stars = Counter()
    for (_, valences), p in reviews._plans().probs.items():
        stars[reviews.stars_of(valences)] += p
    told = -sum(p * math.log(p) for p in stars.values())
    assert abs(body - (reviews.body_entropy() - (1 - reviews.RATINGS["none"]) * told)) < width


def test_plans_come_as_often_as_their_probabilities_say():
    """Oracle: counts. How many judgements a review has and how good the first one is, in 60,000
    reviews, by a chi-square against the table of plans."""
    sample = reviews.sample(60_000, seed=11)
    first = Counter((len(r.judgements), r.judgements[0].valence) for r in sample)
    expected = Counter()
    for (_, valences), p in reviews._plans().probs.items():
        expected[len(valences), valences[0]] += p * len(sample)
    chi2 = sum((first[key] - value) ** 2 / value for key, value in expected.items())
    assert chi2 < len(expected) + 4 * math.sqrt(2 * len(expected))
    assert set(first) <= set(expected)


def test_probabilities_of_all_responses_of_one_kind_add_up():
    """Oracle: enumeration. Every response of two judgements that disagree, of the music (1) and the
    pace (−1), without a verdict, is written and read; the probabilities that `parse_response` gives
    must add up to that of the kind."""
    kind = ("C", (1, -1))
    share = reviews._plans_with(3).probs[kind]
    texts = [reviews._judgements("music", 1).values, reviews._judgements("pace", -1).values]
    total = 0.0
    for one, two in itertools.product(*texts):
        capital = f"{one[0].upper()}{one[1:]}"
        for text in (f"{capital}, but {two}.", f"{capital}, yet {two}.", f"Although {one}, {two}."):
            total += math.exp(reviews.parse_response(text, "music").log_prob)
    # the second aspect is one of eleven, and three texts in ten have no verdict
    assert math.isclose(total, share / 11 * 0.3, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("valences", "stars"),
    [
        ((2, 2), 5),
        ((2, 1), 5),
        ((1, 1, 1), 4),
        ((1, 0), 4),
        ((1, 0, 0), 3),
        ((-1, 1), 3),
        ((0, 0), 3),
        ((-1, 0), 2),
        ((-1, -1, 0), 2),
        ((-2, -1), 1),
        ((-2, -2, -2), 1),
    ],
)
def test_stars_by_hand(valences, stars):
    assert reviews.stars_of(valences) == stars


@pytest.mark.parametrize(
    ("text", "valence"),
    [
        ("The plot is not thin at all.", 1),
        ("The plot is not clever at all.", -1),
        ("The plot is anything but silly.", 1),
        ("The plot is far from clever.", -1),
        ("The plot is clever.", 1),
        ("The plot is very clever.", 2),
        ("The plot is rather clever.", 1),
        ("The plot is painfully thin.", -2),
        ("The plot is simply superb.", 2),
        ("The plot is neither good nor bad.", 0),
        ("I did not like the plot.", -1),
        ("The costumes are not cheap at all.", 1),
    ],
)
def test_negation_and_degree_count(text, valence):
    read = reviews.parse_response(f"{text} The music is loud.")
    assert read.judgements[0].valence == valence


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The plot is clever",
        "The plot is clever.",  # one judgement is no review
        "The plot are clever. The music is loud.",
        "The plot is clever. The plot is thin.",  # an aspect twice
        "The plot is clever, but the music is catchy.",  # 'but' needs a contrast
        "The plot is catchy. The music is loud.",  # the word of another aspect
        "the plot is clever. The music is loud.",
        "The plot is clever. Avoid it. The music is loud.",
        "The plot is superb. The music is superb. Avoid it.",  # a verdict that does not fit
        "The jokes are funny. The music is loud.",  # no genre was named
    ],
)
def test_what_the_grammar_cannot_write_is_refused(text):
    assert reviews.parse_response(text) is None


@pytest.mark.parametrize(
    ("there", "wrong", "gone"), [("4 stars: ", "2 stars: ", ""), (" 4-star ", " 2-star ", " ")]
)
def test_a_rating_must_fit(there, wrong, gone):
    text = next(r for r in reviews.sample(500) if there in r.text).text
    assert reviews.parse(text).stars == 4
    assert reviews.parse(text.replace(there, wrong)) is None
    assert reviews.parse(text.replace(there, gone)).stars == 4
    assert reviews.parse(text.replace(there, gone)).opening in text.replace(there, gone)
    assert reviews.parse(f"4 stars: {text}") is None
    assert reviews.parse(text.replace(there, " 4-star 4-star ")) is None


def test_splits_share_no_film_and_no_opening():
    films = {s: set(reviews._films_of(s)) for s in reviews.SPLITS}
    for one, other in itertools.combinations(reviews.SPLITS, 2):
        assert not films[one] & films[other]
    assert len(films["held_out"]) > 300
    openings = {s: set(reviews.openings(s, 1000)) for s in reviews.SPLITS}
    assert all(len(some) == 1000 for some in openings.values())
    assert not openings["train"] & openings["held_out"]
    assert all(reviews._read_opening(text)[0] == text for text in openings["held_out"])


def test_instructions_are_answered_as_asked():
    for one in reviews.instructions("train", 300):
        assert one.prompt == f"Write a {one.stars}-star review about the {one.topic}.\n"
        assert reviews.follows(one, one.response)
        assert not reviews.follows(one._replace(stars=one.stars % 5 + 1), one.response)
        other = "plot" if one.topic != "plot" else "music"
        assert not reviews.follows(one._replace(topic=other), one.response)
        assert not reviews.follows(one, one.response[:-1])


def test_of_each_topic_one_number_of_stars_is_kept_back():
    """Oracle: a count over all sixty requests; and two of them as they were when the results of
    sft_lora were recorded."""
    kinds = [
        reviews.Instruction("", "", topic, stars)
        for topic in reviews.ASPECTS
        for stars in range(1, 6)
    ]
    kept = [(one.topic, one.stars) for one in kinds if reviews.kept_back(one)]
    assert sorted(topic for topic, _ in kept) == sorted(reviews.ASPECTS)
    assert {("acting", 5), ("music", 1)} < set(kept)


def test_the_same_seed_gives_the_same_reviews_in_another_process():
    code = "from rlhf_helpers.worlds import reviews; print(reviews.texts('held_out', 3, 7))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed.strip() == str(reviews.texts("held_out", 3, 7))
    assert reviews.texts("held_out", 3, 7) != reviews.texts("held_out", 3, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reviews.texts("test", 1), "split='test' is unknown; use one of 'train'"),
        (lambda: reviews.texts("train", 0), "n=0 must lie in"),
        (lambda: reviews.openings("train", 10**9), "n=1000000000 must lie in"),
        (lambda: reviews.instructions("test", 1), "split='test' is unknown"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_worlds_are_found_by_name():
    assert worlds.load("reviews") is reviews
    with pytest.raises(
        ValueError, match=re.escape("name='films' is unknown; use one of 'reviews'")
    ):
        worlds.load("films")


def test_the_floor_of_instructions_is_the_probability_of_their_responses():
    """Oracle: counts. Of all responses to one request, the share of a frequent one is its
    probability."""
    asked = [i for i in reviews.instructions("train", 60_000) if (i.topic, i.stars) == ("plot", 5)]
    text, count = Counter(i.response for i in asked).most_common(1)[0]
    one = next(i for i in asked if i.response == text)
    p = math.exp(-reviews.surprise([one])[0])
    assert abs(count - p * len(asked)) < 4 * (p * len(asked)) ** 0.5 + 3
    assert reviews.surprise([one._replace(response="No review.")]) == [math.inf]


@pytest.mark.parametrize(
    ("completion", "valences"),
    [
        (" The plot is superb. The music is not bad at all.", [2, 1]),
        (" Although the plot is dull, I loved the music. See it twice.", [-1, 2, 2]),
        (" The plot is superb. The plot is superb. The plot is awful.", [2, 2, -2]),
        (" The heist is tame. Avoid it.", [-1, -2]),
        (" The clues are superb.", [0]),  # a heist film has none
        (" superb wonderful brilliant", [0]),
        (" The plot is superb. The music is", [2, 0]),
        ("", [0]),
    ],
)
def test_quality_is_the_mean_valence_of_what_can_be_read(completion, valences):
    """Oracle: valences counted by hand; what cannot be read says nothing."""
    opening = "I saw this Danish heist film about a night nurse last night."
    found = reviews.quality([opening], [completion], stars=[3])
    assert found == pytest.approx([sum(valences) / len(valences)])


def test_quality_agrees_with_how_reviews_were_made():
    """Oracle: the derivation of sampled reviews: their judgements, and the stars of the verdict."""
    for review in reviews.sample(200, seed=3):
        (found,) = reviews.quality([review.opening], [review.body])
        valences = [judgement.valence for judgement in review.judgements]
        genre = review.film.genre
        ends = {t for t in reviews._verdicts(review.stars, genre).values if t}
        if any(review.body.endswith(f" {end}") for end in ends):
            valences.append(review.stars - 3)
        assert found == pytest.approx(sum(valences) / len(valences))
