"""The IMDB world on a made-up data set that is read as the real one would be."""

import inspect
import json
import os
import subprocess
import sys

import fake_hub
import pytest

from rlhf_helpers.worlds import imdb, reviews


@pytest.fixture
def rows(monkeypatch):
    """Replace the hub's data set by these rows: split name on the hub -> [(text, label)]."""

    def use(**splits):
        def load_dataset(name, split):
            assert name == "stanfordnlp/imdb"
            texts, labels = zip(*splits[split], strict=True)
            return {"text": list(texts), "label": list(labels)}

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        imdb._reviews.cache_clear()

    yield use
    imdb._reviews.cache_clear()


def numbered(n, prefix=""):
    return [(f"{prefix}{i} one two three four five six seven eight nine", i % 2) for i in range(n)]


def test_splits_share_no_review_and_leave_none_out(rows):
    """Oracle: counting: a tenth of train is validation, the hub's test split is held out."""
    rows(train=numbered(50), test=numbered(20, "t"))
    sizes = {"train": 45, "validation": 5, "held_out": 20}
    found = {split: set(imdb.texts(split, n)) for split, n in sizes.items()}
    assert {split: len(texts) for split, texts in found.items()} == sizes
    assert found["train"] | found["validation"] == {text for text, _ in numbered(50)}
    assert found["held_out"] == {text for text, _ in numbered(20, "t")}


def test_both_labels_are_in_both_parts_of_the_hubs_train_split(rows):
    """Oracle: counting; on the hub the negative reviews all come before the positive ones."""
    rows(train=[(f"{i} The plot.", int(i >= 50)) for i in range(100)])
    for split, n in (("train", 90), ("validation", 10)):
        assert {one.stars for one in imdb.instructions(split, n)} == {1, 5}


def test_a_seed_repeats_the_draw_and_another_does_not(rows):
    """Oracle: the call itself; the split does not depend on the seed of the draw."""
    rows(train=numbered(50), test=numbered(20))
    assert imdb.texts("train", 10, seed=4) == imdb.texts("train", 10, seed=4)
    assert imdb.texts("train", 10, seed=4) != imdb.texts("train", 10, seed=5)
    assert set(imdb.texts("validation", 5, seed=4)) == set(imdb.texts("validation", 5, seed=5))


def test_line_breaks_and_runs_of_spaces_are_cleaned(rows):
    """Oracle: by hand."""
    rows(train=[], test=[("Good.<br /><br />Very  good.<br>\n\tOr <b>not</b>?<br/> ", 1)])
    assert imdb.texts("held_out", 1) == ["Good. Very good. Or <b>not</b>?"]


def test_openings_are_eight_words_and_all_different(rows):
    """Oracle: by hand; shorter reviews and repeated openings give none."""
    twice = "a b c d e f g h and so on"
    rows(test=[(twice, 1), (twice + ", again", 0), ("too short", 0), ("1 2 3 4 5 6 7 8", 1)])
    assert sorted(imdb.openings("held_out", 2)) == ["1 2 3 4 5 6 7 8", "a b c d e f g h"]
    with pytest.raises(ValueError, match="n=3 must lie in"):
        imdb.openings("held_out", 3)


LONG = " ".join(["word"] * 30)


@pytest.mark.parametrize(
    ("text", "response", "topic"),
    [
        ("Nice cast. Poor plot! More.", "Nice cast. Poor plot!", "cast"),
        ("I came twice. The PLOT, though? Music.", "I came twice. The PLOT, though?", "plot"),
        ("No. Nothing. Music only in the third.", None, None),
        (f"The ending {LONG}. The story {LONG}.", f"The ending {LONG}.", "ending"),
        (f"Music {LONG} {LONG}.", " ".join(f"Music {LONG} {LONG}".split()[:40]), "music"),
        (f"{LONG} {LONG} music.", None, None),
        ("Its humor is plotless.", "Its humor is plotless.", "humour"),
    ],
)
def test_a_request_asks_for_what_the_review_begins_with(rows, text, response, topic):
    """Oracle: by hand: two sentences, at most forty words, the first topic among them."""
    rows(test=[(text, 1), ("The pace is slow.", 0)])
    found = imdb.instructions("held_out", 1 if response is None else 2)
    found = {one.stars: one for one in found}
    assert found[1] == (
        "Write a 1-star review about the pace.\n",
        "The pace is slow.",
        "pace",
        1,
    )
    if response is None:
        with pytest.raises(ValueError, match="n=2 must lie in"):
            imdb.instructions("held_out", 2)
    else:
        prompt = f"Write a 5-star review about the {topic}.\n"
        assert found[5] == reviews.Instruction(prompt, response, topic, 5)
        assert imdb.follows(found[5], response)


def test_a_completion_follows_if_it_mentions_the_topic_as_a_word():
    """Oracle: by hand."""
    plot = reviews.Instruction("", "", "plot", 5)
    assert imdb.follows(plot, "What a Plot!")
    assert not imdb.follows(plot, "What a plotless film, good story.")
    assert imdb.follows(plot._replace(topic="humour"), "Dry humor")


@pytest.mark.parametrize("function", [imdb.texts, imdb.openings, imdb.instructions])
def test_unknown_splits_and_impossible_numbers_are_refused(rows, function):
    """Oracle: the specification."""
    rows(test=[("The plot is a plot is a plot.", 1)])
    with pytest.raises(ValueError, match="'test' is unknown; use one of 'train'"):
        function("test", 1)
    for n in (0, 2):
        with pytest.raises(ValueError, match=f"n={n} must lie in"):
            function("held_out", n)


def test_both_worlds_are_called_alike():
    """Oracle: the signatures of the made-up world."""
    for name in ("texts", "openings", "instructions", "follows", "surprise"):
        here, there = (inspect.signature(getattr(world, name)) for world in (imdb, reviews))
        assert here == there


CODE = """
import json
from rlhf_helpers.worlds import imdb
try:
    print(json.dumps([imdb.texts("held_out", 1200), imdb.instructions("train", 20)]))
except OSError as error:
    print(error)
"""


def offline(home):
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_DATASETS_CACHE", None)
    return subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True
    ).stdout


def test_the_data_set_is_read_from_the_cache_without_a_network(tmp_path):
    """Oracle: the rows that were written there, cleaned by hand."""
    held_out = fake_hub.reviews(1200, seed=2)
    fake_hub.write_imdb(tmp_path, {"train": fake_hub.reviews(100, seed=1), "test": held_out})
    texts, requests = json.loads(offline(tmp_path))
    cleaned = [text.replace("<br /><br />", " ").replace("  ", " ") for text, _ in held_out]
    assert sorted(texts) == sorted(cleaned)
    assert {stars for _, _, _, stars in requests} == {1, 5}


def test_without_network_and_cache_two_lines_say_what_to_do(tmp_path):
    """Oracle: the specification."""
    missing, remedy = offline(tmp_path).splitlines()
    assert "stanfordnlp/imdb" in missing
    assert "Connect" in remedy
    assert "RLHF_SCALE=tiny" in remedy
