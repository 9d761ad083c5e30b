"""Labelling by hand: no answer is lost, none is mixed up, and texts are shown as texts."""

import json
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from nbrun import ROOT

from rlhf_helpers import preferences
from rlhf_helpers.book import labelling
from rlhf_helpers.book.labelling import Session, label

PAIRS = [(f"prompt {i}", f"good answer {i}", f"bad answer {i}") for i in range(6)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def good(item):
    """The button of the response that is called good."""
    return "a" if item.a.startswith("good") else "b"


def answer(session, count):
    for _ in range(count):
        item = session.next()
        session.record(item, good(item), 1.5)


def numbers(rows):
    return [int(row["prompt"].split()[-1]) for row in rows]


# --- answers -------------------------------------------------------------------------------------


def test_answers_come_back_as_rows(path):
    session = Session(PAIRS, path)
    answer(session, 1)
    tied = session.next()
    session.record(tied, "tie", 2.004)
    session.record(session.next(), "skip", 1)
    session.record(session.next(), good(session.next()))
    assert session.progress() == (4, 6)
    first, second, third = session.results()
    assert first == {
        "prompt": "prompt 0",
        "chosen": "good answer 0",
        "rejected": "bad answer 0",
        "tie": False,
        "annotator": "me",
    }
    assert (second["chosen"], second["rejected"]) == (tied.a, tied.b)
    assert (second["tie"], third["prompt"]) == (True, "prompt 3")
    kept = [json.loads(line)["seconds"] for line in path.read_text().splitlines()]
    assert kept == [1.5, 2.0, 1, None]
    assert preferences.from_rows(session.results())["tie"][:] == [False, True, False]


def test_a_new_session_goes_on_where_the_last_one_stopped(path):
    answer(Session(PAIRS, path), 2)
    again = Session(PAIRS, path)
    assert (again.progress(), again.next().prompt, again.torn) == ((2, 6), "prompt 2", None)
    answer(again, 4)
    assert Session(PAIRS, path).next() is None
    assert numbers(again.results()) == [0, 1, 2, 3, 4, 5]


def test_a_session_stays_with_its_file_when_the_folder_changes(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    session = Session(PAIRS, path.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    answer(session, 1)
    assert len(path.read_text().splitlines()) == 1
    assert str(tmp_path) not in repr(session)


def test_undo_takes_answers_back_one_by_one_and_deletes_nothing(path):
    session = Session(PAIRS, path)
    assert session.undo() is None
    answer(session, 3)
    before = path.read_bytes()
    assert [session.undo().prompt, session.undo().prompt] == ["prompt 2", "prompt 1"]
    assert path.read_bytes().startswith(before)
    assert Session(PAIRS, path).next().prompt == "prompt 1"
    session.record(session.next(), "tie")
    assert [row["tie"] for row in session.results()] == [False, True]
    assert [session.undo().prompt, session.undo().prompt] == ["prompt 1", "prompt 0"]
    assert session.undo() is None
    assert session.results() == []


def test_a_second_session_sees_the_answers_of_the_first(path):
    one, two = Session(PAIRS, path), Session(PAIRS, path)
    answer(one, 2)
    assert two.next().prompt == "prompt 2"
    answer(two, 1)
    one.undo()
    assert (one.progress(), two.progress()) == ((2, 6), (2, 6))
    shown = two.next()
    answer(one, 1)
    two.record(shown, "tie")  # both had the same pair on the screen: the later answer stands
    assert one.results() == two.results()
    assert one.results()[-1]["tie"]
    assert one.progress() == (3, 6)


def test_every_annotator_of_a_file_is_asked_all_pairs(path):
    ada, bob = Session(PAIRS, path, annotator="Ada"), Session(PAIRS, path, annotator="Bob")
    answer(ada, 3)
    answer(bob, 2)
    assert (ada.progress(), bob.progress()) == ((3, 6), (2, 6))
    assert ada.undo().prompt == "prompt 2"
    rows = Session(PAIRS, path).results()
    assert [row["annotator"] for row in rows] == ["Ada", "Bob"] * 2
    assert numbers(rows) == [0, 0, 1, 1]


def test_answers_belong_to_texts_not_to_places(path):
    answer(Session(PAIRS, path), 3)
    changed = [(prompt, other, one) for prompt, one, other in reversed(PAIRS[1:])]
    changed.append(("prompt 0", "good answer 0", "bad answer 0, changed"))
    session = Session(changed, path, seed=1)
    rows = session.results()
    assert numbers(rows) == [2, 1]
    assert all(row["chosen"].startswith("good") for row in rows)
    assert session.undo().prompt == "prompt 2"
    answer(session, 5)
    assert numbers(session.results()) == [5, 4, 3, 2, 1, 0]
    # what the first list was told is still there
    assert numbers(Session(PAIRS, path).results()) == [0, 1, 2, 3, 4, 5]


# --- which response is A -------------------------------------------------------------------------


def sides(seed, annotator="me", count=2000):
    pairs = [(str(i), "one", "two") for i in range(count)]
    return [item.a == "one" for item in labelling._items(pairs, seed, annotator).values()]


def test_the_order_is_drawn_evenly_and_again_the_same():
    first = sides(seed=0)
    assert first == sides(seed=0)
    # four standard deviations of 2,000 tosses, of the tosses and of how often two lists agree
    for other in (sides(seed=1), sides(seed=0, annotator="Ada"), first[1:] + first[:1]):
        assert abs(sum(other) - 1000) < 90
        assert abs(sum(a == b for a, b in zip(first, other, strict=True)) - 1000) < 90


def test_the_order_is_the_same_in_every_run():
    assert "".join("01"[side] for side in sides(seed=0, count=16)) == "0100101111001111"


# --- what can happen to the file -----------------------------------------------------------------


def test_a_torn_last_line_is_set_aside_and_nothing_else_is_lost(tmp_path):
    whole = tmp_path / "whole.jsonl"
    session = Session([*PAIRS[:2], ("Grüße, 世界", "gut 🙂", "schlecht\nzwei Zeilen")], whole)
    answer(session, 2)
    kept = whole.read_bytes()
    session.record(session.next(), "b", 3.25)
    last = whole.read_bytes()[len(kept) :]
    for cut in range(len(last) + 1):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(kept + last[:cut])
        after = Session(PAIRS[:3], path)
        torn = path.with_name(f"{cut}.jsonl.torn")
        # without the line's end, nothing of the answer is missing
        if cut in (0, len(last) - 1, len(last)):
            assert (after.torn, torn.exists()) == (None, False)
            expected = kept + (last if cut else b"")
        else:
            assert after.torn == torn
            assert torn.read_bytes() == last[:cut] + b"\n"
            expected = kept
        assert path.read_bytes() == expected
        answer(after, 1)
        assert path.read_bytes().startswith(expected)
        assert numbers(Session(PAIRS[:3], path).results()) == [0, 1, 2]


def test_a_line_torn_while_a_session_runs_is_set_aside_by_the_next_answer(path):
    session = Session(PAIRS, path)
    answer(session, 1)
    with open(path, "ab") as file:
        file.write(b'{"pair": "0123')
    assert session.progress() == (1, 6)
    answer(session, 1)
    assert session.progress() == (2, 6)
    assert path.with_name("answers.jsonl.torn").read_bytes() == b'{"pair": "0123\n'


def test_zeros_after_a_power_cut_are_set_aside(path):
    answer(Session(PAIRS, path), 1)
    with open(path, "ab") as file:
        file.write(b'{"pai\0\0\0')
    session = Session(PAIRS, path)
    assert session.torn.read_bytes() == b'{"pai\0\0\0\n'
    assert session.progress() == (1, 6)


def test_an_answer_is_flushed_to_the_disk_before_it_counts_as_saved(path, monkeypatch):
    flushed = []
    monkeypatch.setattr(labelling.os, "fsync", lambda number: flushed.append(path.read_bytes()))
    session = Session(PAIRS, path)
    answer(session, 1)
    session.undo()
    assert flushed[-1] == path.read_bytes()
    assert [len(content.splitlines()) for content in flushed] == [1, 2]


@pytest.mark.skipif(labelling.fcntl is None, reason="needs locks of files")
def test_a_session_holds_the_lock_while_it_mends_and_writes(path, monkeypatch):
    """Oracle: the system itself: a second descriptor cannot have the lock meanwhile, and can
    afterwards."""

    def free():
        with open(path, "rb") as other:
            try:
                labelling.fcntl.flock(other, labelling.fcntl.LOCK_EX | labelling.fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    session, held = Session(PAIRS, path), {"_mend": [], "_write": []}
    for name, seen in held.items():
        plain = getattr(labelling, name)
        monkeypatch.setattr(
            labelling, name, lambda *a, seen=seen, plain=plain: seen.append(not free()) or plain(*a)
        )
    answer(session, 1)
    session.undo()
    assert held == {"_mend": [True, True], "_write": [True, True]}
    assert free()


LOOP = """
import importlib.util, itertools, sys
spec = importlib.util.spec_from_file_location("labelling", sys.argv[1])
labelling = importlib.util.module_from_spec(spec)
sys.modules["labelling"] = labelling
spec.loader.exec_module(labelling)
pairs = [(f"prompt {i}", "x" * 2000, "y" * 2000) for i in range(3000)]
session = labelling.Session(pairs, sys.argv[2])
while item := session.next():
    session.record(item, "tie", 1.0)
    print(item.prompt, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_a_killed_process_loses_no_answer_that_it_reported_as_saved(path):
    # the file alone, not the package: a child then starts in a tenth of a second
    command = [sys.executable, "-c", LOOP, labelling.__file__, path]
    rng, saved = random.Random(0), []
    for _ in range(6):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            saved += [child.stdout.readline().strip() for _ in range(2)]
            time.sleep(rng.uniform(0.0, 0.3))
            child.send_signal(signal.SIGKILL)
            saved += child.stdout.read().split("\n")[:-1]
        assert child.returncode == -signal.SIGKILL
    pairs = [(f"prompt {i}", "x" * 2000, "y" * 2000) for i in range(3000)]
    kept = [row["prompt"] for row in Session(pairs, path).results()]
    assert len(saved) >= 12
    # none is lost, none is asked twice, and each child went on where the one before it stopped
    assert set(saved) <= set(kept)
    assert kept == [f"prompt {i}" for i in range(len(kept))]
    assert len(saved) <= len(kept) <= len(saved) + 6


def test_two_processes_can_write_at_once(path):
    loop = LOOP.replace("[(", "[(sys.argv[3] + ").replace("3000", "40")
    command = [sys.executable, "-c", loop, labelling.__file__, path]
    children = [
        subprocess.Popen([*command, name], stdout=subprocess.DEVNULL) for name in ("one ", "two ")
    ]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["pair"] for line in lines}) == len(lines) == 80


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "pairs is empty"),
        (
            [*PAIRS, ("prompt 1", "bad answer 1", "good answer 1")],
            r"pairs\[6\] is pairs\[1\] again",
        ),
        ([PAIRS[0], ("p", " \n", "b")], r"pairs\[1\] has an empty response"),
        ([PAIRS[0], ("p", "b", "")], r"pairs\[1\] has an empty response"),
        ([("p", "b", " b\n")], r"pairs\[0\] has two equal responses"),
        ([("p", "b")], r"pairs\[0\] is a tuple; pass \(prompt"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], r"pairs\[0\] is a dict; pass \(prompt"),
        (["abc"], r"pairs\[0\] is a str; pass \(prompt"),
        ([("p", "a", None)], r"pairs\[0\] holds something other than text"),
        ([("p", "a", "\ud83d")], r"pairs\[0\] holds half a character"),
    ],
)
def test_bad_pairs_are_refused_by_index(path, pairs, message):
    with pytest.raises(ValueError, match=message):
        Session(pairs, path)
    assert not path.exists()


def test_a_prompt_may_be_empty(path):
    assert Session([("", "a", "b")], path).next().prompt == ""


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n',
        b"a line of text\n",
        b"a line without an end",
        b'{"pair": "1", "annotator": "me", "answer": "c", "seconds": null}\n',
        b'{"pair": "1", "annotator": "me", "answer": "a", "seconds": null}\n',
        b'{"pair": "1", "annotator": "me", "answer": "undo", "seconds": "long"}\n',
        b"[1]\n",
        b"\xff\n",
        b"\n",
    ],
)
def test_a_file_that_holds_something_else_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"path: .*answer"):
        Session(PAIRS, path)
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_bad_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path: there is no folder .*; make it"):
        Session(PAIRS, tmp_path / "missing" / "answers.jsonl")
    with pytest.raises(ValueError, match=r"path: .* is a folder; name a file"):
        Session(PAIRS, tmp_path)


def test_bad_answers_and_names_are_refused(path):
    session = Session(PAIRS, path)
    with pytest.raises(ValueError, match="answer='c' is unknown; use one of 'a', 'b', 'tie'"):
        session.record(session.next(), "c")
    with pytest.raises(ValueError, match="item is not one of the session's pairs"):
        session.record(session.next()._replace(a="other"), "a")
    with pytest.raises(ValueError, match="annotator=' ' is no name"):
        Session(PAIRS, path, annotator=" ")
    assert path.read_bytes() == b""


# --- the panel -----------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs).get("class")))

    def handle_data(self, data):
        self.texts.append(data)


def test_texts_are_shown_as_texts():
    plain = labelling.Item("1", "p", "a", "b")
    nasty = labelling.Item(
        "1", "</div><b>p", "<script>alert(1)</script>", "\"'&amp;<img src=x onerror=alert(1)>"
    )
    shown = Tags(labelling._page(nasty, 0, 2, "<i>notice", 1))
    assert shown.tags == Tags(labelling._page(plain, 0, 2, "notice", 1)).tags
    assert {*nasty[1:], "<i>notice"} <= set(shown.texts)


class Widget(SimpleNamespace):
    """Stands for every kind of ipywidgets: keeps what it was made with."""

    def __init__(self, children=(), **traits):
        super().__init__(children=children, classes=[], **traits)

    def add_class(self, name):
        self.classes.append(name)

    def on_click(self, handler):
        self.click = lambda: handler(self)


@pytest.fixture
def panel(path):
    widgets = SimpleNamespace(HTML=Widget, Button=Widget, HBox=Widget, VBox=Widget)
    return labelling._Panel(Session(PAIRS, path), widgets)


def progress(panel):
    return re.search(r"\d+ of \d+", panel.text.value)[0]


def test_the_buttons_save_show_the_next_pair_and_undo(panel):
    buttons = panel.buttons
    assert progress(panel) == "0 of 6"
    assert buttons["undo"].disabled
    for name in ("a", "b", "tie", "skip", "a", "a"):
        assert f"prompt {panel.step - 1}" in panel.text.value
        buttons[name].click()
    assert "All pairs are answered" in panel.text.value
    assert [name for name, button in buttons.items() if not button.disabled] == ["undo"]
    buttons["undo"].click()
    assert progress(panel) == "5 of 6"
    said = [json.loads(line)["answer"] for line in panel.session.path.read_text().splitlines()]
    assert said == ["a", "b", "tie", "skip", "a", "a", "undo"]
    took = [json.loads(line)["seconds"] for line in panel.session.path.read_text().splitlines()]
    assert all(0 <= seconds < 60 for seconds in took[:-1])


def test_an_answer_that_cannot_be_saved_is_not_passed_over(panel, monkeypatch):
    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(labelling, "_write", full)
    panel.buttons["a"].click()
    assert "Not saved: [Errno 28] No space left" in panel.text.value
    assert progress(panel) == "0 of 6"
    monkeypatch.undo()
    panel.buttons["a"].click()
    assert "Not saved" not in panel.text.value
    assert progress(panel) == "1 of 6"


def test_a_file_spoilt_meanwhile_is_reported(panel):
    panel.session.path.write_text("spoilt\n")
    panel.buttons["a"].click()
    assert "The answers cannot be read: path: line 1" in panel.text.value


def test_a_torn_line_is_mentioned(path):
    path.write_bytes(b'{"pair": "0123')
    widgets = SimpleNamespace(HTML=Widget, Button=Widget, HBox=Widget, VBox=Widget)
    shown = labelling._Panel(Session(PAIRS, path), widgets).text.value
    assert "A half-written answer was moved to answers.jsonl.torn." in shown


def test_without_ipywidgets_the_error_says_what_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r'pip install "rlhf_helpers\[labelling\]"'):
        label(PAIRS, path)


def test_the_extra_that_the_error_names_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["labelling"] == ["ipywidgets>=7.7"]
