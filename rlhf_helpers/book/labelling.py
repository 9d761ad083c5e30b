"""Label pairs of responses by hand: what is asked and kept (`Session`), and the panel in a notebook
(`label`).

Answers are lines of JSON, added to the end of a file and flushed to the disk one by one. A database
would do it too, but a text file can be read and compared without a program, and needs no locks that
a mounted drive may lack. A line holds what was shown and what was pressed, so the file is of use
even without the list of pairs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import html
import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

try:
    import fcntl
except ImportError:  # Windows: one session at a time
    fcntl = None

from rlhf_helpers._validate import check_path, check_seed, has, in_range, one_of, pair_problem
from rlhf_helpers.conversations import Conversation, Prompt, messages_of, plain_text

ANSWERS = ("a", "b", "tie", "skip")
_START = b'{"pair": "'


class Item(NamedTuple):
    """A pair as it is shown."""

    pair: str  # a hash of the three texts, the same whichever response comes first
    prompt: Prompt
    a: str
    b: str


class Session:
    """One annotator's answers to a list of pairs, kept in a file.

    Nothing is remembered outside the file: each call reads it again, so sessions that share it see
    each other's answers, and a new session goes on where the last one stopped. Several annotators
    can share a file; each is asked all the pairs.

    Args:
        pairs: (prompt, response, other response), texts; only the prompt may be empty, or be a
            conversation.
        path: the file of answers; made if there is none.
        seed: with the annotator and a pair's place in the list it decides which response is A.
        annotator: name of who answers.
    Attributes:
        torn: the file that a half-written last line was moved to when the session began, or None.
    Raises: ValueError naming the pair if responses are empty or equal or a pair comes twice; on a
        path in no folder or to a file that holds something else. OSError if the file cannot be
        written.
    """

    def __init__(
        self,
        pairs: Iterable[Sequence[str]],
        path: str | os.PathLike,
        seed: int = 0,
        annotator: str = "me",
    ) -> None:
        if not isinstance(annotator, str) or not annotator.strip():
            raise ValueError(f"annotator={annotator!r} is no name; pass a text that is not empty")
        check_seed(seed)
        has(pairs, "pairs", "a list of (prompt, response, other response)", "__iter__")
        check_path(path, "path")
        self.annotator = annotator
        # a notebook may change its folder later
        self.path = Path(path).absolute()
        self.items = _items(pairs, seed, annotator)
        # a folder made here could be one that a drive is mounted over later
        if not self.path.parent.is_dir():
            raise ValueError(f"path: there is no folder {self.path.parent}; make it, or mount it")
        if self.path.is_dir():
            raise ValueError(f"path: {self.path} is a folder; name a file in it")
        with _locked(self.path) as file:
            list(_records(file, self.path))
            self.torn = _mend(file, self.path)

    def __repr__(self) -> str:
        return f"answers are kept in {self.path.name}; results() gives them as rows"

    def next(self) -> Item | None:
        """The first pair that this annotator has not answered; None if all are."""
        done = self._given().get(self.annotator, {})
        return next((item for item in self.items.values() if item.pair not in done), None)

    def record(self, item: Item, answer: str, seconds: float | None = None) -> None:
        """Save an answer; it is on the disk when this returns. A later answer to a pair replaces
        an earlier one.

        Args:
            item: as `next` gave it.
            answer: "a", "b", "tie" or "skip".
            seconds: how long it took, if that is known.
        Raises: ValueError on an unknown answer or a pair of another list; OSError if it could not
            be saved.
        """
        one_of(answer, ANSWERS, "answer")
        has(item, "item", "what next() returned", "pair")
        if seconds is not None:
            in_range(seconds, "seconds", 0.0)
        if self.items.get(item.pair) != item:
            raise ValueError("item is not one of the session's pairs; pass what next() returned")
        shown = {"prompt": item.prompt, "a": item.a, "b": item.b}
        took = None if seconds is None else round(seconds, 2)
        self._append(item.pair, {"answer": answer, "seconds": took} | shown)

    def undo(self) -> Item | None:
        """Take this annotator's last answer back. The file keeps it, and a line more.

        Returns: the pair that is open again; None if nothing was answered.
        Raises: OSError if it could not be saved.
        """
        given = self._given().get(self.annotator)
        if not given:
            return None
        last = next(reversed(given))
        self._append(last, {"answer": "undo", "seconds": None})
        return self.items[last]

    def progress(self) -> tuple[int, int]:
        """(pairs that this annotator has answered or skipped, pairs)."""
        return len(self._given().get(self.annotator, {})), len(self.items)

    def results(self) -> list[dict]:
        """What all annotators of the file said about these pairs.

        Returns: rows in the order of the pairs, as `preferences.from_rows` takes them: prompt,
            chosen, rejected, tie and annotator. In a tie the response shown as A stands as chosen;
            skipped pairs are left out.
        """
        given = self._given()
        answers = (said[pair] for pair in self.items for said in given.values() if pair in said)
        said = [answer for answer in answers if answer["answer"] != "skip"]
        return [_row(answer, self.items[answer["pair"]]) for answer in said]

    def _given(self) -> dict[str, dict[str, dict]]:
        """Answers to these pairs that stand: by annotator, then by pair in the order given."""
        given: dict[str, dict[str, dict]] = {}
        with open(self.path, "rb") as file:
            for record in _records(file, self.path):
                if record["pair"] in self.items:
                    said = given.setdefault(record["annotator"], {})
                    said.pop(record["pair"], None)
                    if record["answer"] != "undo":
                        said[record["pair"]] = record
        return given

    def _append(self, pair: str, rest: dict) -> None:
        record = {"pair": pair, "annotator": self.annotator} | rest
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with _locked(self.path) as file:
            # another session may have been cut off since
            _mend(file, self.path)
            _write(file, line)


def _items(pairs: Iterable[Sequence[str]], seed: int, annotator: str) -> dict[str, Item]:
    items: dict[str, Item] = {}
    for index, pair in enumerate(pairs):
        problem = _problem(pair)
        if problem:
            raise ValueError(f"pairs[{index}] {problem}")
        prompt, *responses = pair
        prompt = _messages(prompt) or prompt
        name = _name(prompt, responses)
        if name in items:
            raise ValueError(
                f"pairs[{index}] is pairs[{list(items).index(name)}] again; leave one of them out"
            )
        if random.Random(f"label {seed} {annotator} {index}").random() < 0.5:
            responses.reverse()
        items[name] = Item(name, prompt, *responses)
    if not items:
        raise ValueError("pairs is empty; pass at least one pair")
    return items


def _problem(pair: object) -> str | None:
    """What is wrong with a pair; None if nothing is."""
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 3:
        return f"is a {type(pair).__name__}; pass (prompt, response, other response)"
    try:
        messages = _messages(pair[0])
    except ValueError as error:
        return f"cannot be shown: {error}"
    texts = [*pair[messages is not None :], *(one["content"] for one in messages or ())]
    if not all(isinstance(text, str) for text in texts):
        return "holds something other than text; pass three texts"
    if any(text.encode("utf-8", "replace").decode() != text for text in texts):
        return "holds half a character; pass valid Unicode"
    # what cannot be seen nobody could choose by
    problem = pair_problem(*pair[1:])
    return problem and f"{problem}; leave the pair out"


def _messages(prompt: object) -> Conversation | None:
    """The messages of a prompt that is a conversation. Raises: ValueError if it is not a sound
    one."""
    if type(prompt) is str:
        return None
    plain_text(prompt)
    return messages_of(prompt)


def _name(prompt: Prompt, responses: Sequence[str]) -> str:
    text = json.dumps([prompt, *sorted(responses)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row(record: dict, item: Item) -> dict:
    chosen, rejected = ("b", "a") if record["answer"] == "b" else ("a", "b")
    # the file keeps no mark of a text that was cut; the texts of the list have it
    marked = {item.a: item.a, item.b: item.b}
    return {
        "prompt": record["prompt"],
        "chosen": marked.get(record[chosen], record[chosen]),
        "rejected": marked.get(record[rejected], record[rejected]),
        "tie": record["answer"] == "tie",
        "annotator": record["annotator"],
    }


# --- the file ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, open to read and to append; other sessions wait."""
    with open(path, "a+b") as file:
        if fcntl is not None:
            # some mounted drives know no locks
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _records(file: BinaryIO, path: Path) -> Iterator[dict]:
    """The records of all whole lines. Raises: ValueError on a line that is none."""
    file.seek(0)
    for number, line in enumerate(file, 1):
        # without its end, the line may still be on its way
        if not line.endswith(b"\n"):
            return
        record = _parse(line)
        if record is None:
            raise ValueError(
                f"path: line {number} of {path} is not an answer; take the line out, or name "
                "another file"
            )
        yield record


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
        answer = record["answer"]
        needed = ["pair", "annotator"] + ["prompt", "a", "b"] * (answer != "undo")
        kinds = {"prompt": str | list}  # a conversation is a list
        texts = all(isinstance(record[name], kinds.get(name, str)) for name in needed)
        known = answer in (*ANSWERS, "undo") and isinstance(record["seconds"], float | int | None)
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return record if texts and known else None


def _mend(file: BinaryIO, path: Path) -> Path | None:
    """Make the file end with a whole line: complete the last one, or move it to `path`.torn.

    Returns: where it was moved to; None if all is whole.
    Raises: ValueError if the last line was never the start of an answer.
    """
    file.seek(0)
    tail = file.read().rpartition(b"\n")[2]
    if not tail:
        return None
    if _parse(tail):
        _write(file, b"\n")
        return None
    # after a power cut a file can end in zeros
    start = tail.rstrip(b"\0")
    if not start.startswith(_START[: len(start)]):
        raise ValueError(f"path: {path} does not hold answers; name another file")
    torn = path.with_name(f"{path.name}.torn")
    # copied before it is cut off: if this is interrupted it stands twice, never nowhere
    with open(torn, "ab") as aside:
        _write(aside, tail + b"\n")
    file.truncate(file.seek(-len(tail), os.SEEK_END))
    return torn


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


# --- the panel -----------------------------------------------------------------------------------

# name: text, key in words
_BUTTONS = {
    "a": ("A is better", "a or ←"),
    "tie": ("Tie", "t"),
    "b": ("B is better", "b or →"),
    "skip": ("Skip", "s"),
    "undo": ("Undo", "u"),
}


def label(
    pairs: Iterable[Sequence[str]],
    path: str | os.PathLike,
    seed: int = 0,
    annotator: str = "me",
) -> Session:
    """Show a panel that asks, pair by pair, which response is better.

    Buttons, or after a click into the panel the keys: a or ← for A, b or → for B, t for a tie, s to
    skip, u to undo. Every answer is on the disk at once; running the cell again goes on where you
    stopped.

    Args: as `Session`.
    Returns: the session; its `results` are the answers as rows.
    Raises: as `Session`; ImportError if ipywidgets is missing.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError(
            'label() needs ipywidgets: run pip install "rlhf_helpers[labelling]", then start the '
            "notebook again"
        ) from error
    from IPython.display import HTML, display

    session = Session(pairs, path, seed, annotator)
    display(HTML(f"<script>{_SCRIPT}</script>"), _Panel(session, ipywidgets).box)
    return session


class _Panel:
    """The widgets of a session. `box` is to be displayed."""

    def __init__(self, session: Session, widgets: ModuleType) -> None:
        self.session = session
        self.step = 0
        self.item: Item | None = None
        self.text = widgets.HTML()
        self.buttons = {}
        for name, (text, key) in _BUTTONS.items():
            button = widgets.Button(description=text, tooltip=f"{text} (key {key})")
            button.add_class(f"rlhf-{name}")
            button.on_click(functools.partial(self.press, name))
            self.buttons[name] = button
        row = widgets.HBox(list(self.buttons.values()))
        row.add_class("rlhf-row")
        hint = widgets.HTML(f'<style>{_STYLE}</style><p class="rlhf-hint"></p>')
        self.box = widgets.VBox([self.text, row, hint])
        self.box.add_class("rlhf-label")
        moved = session.torn and f"A half-written answer was moved to {session.torn.name}."
        self.show(moved or "")

    def press(self, name: str, _button: object = None) -> None:
        """What a button does."""
        notice = ""
        try:
            if name == "undo":
                self.session.undo()
            elif self.item is not None:
                seconds = time.monotonic() - self.since
                self.session.record(self.item, name, seconds)
        # what a callback raises is shown nowhere
        except (OSError, ValueError) as error:
            notice = f"Not saved: {error}"
        self.show(notice)

    def show(self, notice: str) -> None:
        """Show the pair that is next."""
        self.step += 1
        try:
            self.item, (done, total) = self.session.next(), self.session.progress()
        except (OSError, ValueError) as error:
            self.text.value = _notice(f"The answers cannot be read: {error}", self.step)
            return
        self.text.value = _page(self.item, done, total, notice, self.step)
        for name, button in self.buttons.items():
            button.disabled = done == 0 if name == "undo" else self.item is None
        self.since = time.monotonic()


def _page(item: Item | None, done: int, total: int, notice: str, step: int) -> str:
    """The HTML of a pair; all texts are escaped."""
    bar = (
        f'<div class="rlhf-top"><div class="rlhf-bar"><i style="width:{100 * done / total:.1f}%">'
        f'</i></div><span role="status">{done} of {total} answered</span></div>'
    )
    if item is None:
        body = '<p class="rlhf-done">All pairs are answered. Thank you.</p>'
    else:
        prompt = (
            '<h4>Prompt</h4><div class="rlhf-text" dir="auto">'
            f"{html.escape(_shown(item.prompt))}</div>"
        )
        cards = "".join(
            f'<section class="rlhf-card rlhf-card-{name.lower()}"><h4>{name}</h4>'
            f'<div class="rlhf-text" dir="auto">{html.escape(text)}</div></section>'
            for name, text in (("A", item.a), ("B", item.b))
        )
        body = f'<section class="rlhf-prompt">{prompt}</section><div class="rlhf-two">{cards}</div>'
    return (_notice(notice, step) if notice else _step(step)) + bar + body


def _shown(prompt: Prompt) -> str:
    """A prompt as it is read: of a conversation each message behind who said it, unless there is
    but one."""
    messages = _messages(prompt)
    if messages is None:
        return prompt
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)


def _notice(text: str, step: int) -> str:
    return f'{_step(step)}<p class="rlhf-notice" role="alert">{html.escape(text)}</p>'


def _step(step: int) -> str:
    # tells the script that the last press has arrived
    return f'<i class="rlhf-step" data-step="{step}"></i>'


# A script in the cell's output: it needs no extension, presses the buttons, and so changes nothing
# where scripts are not run. It listens before the notebook does, whose own keys would add cells.
_SCRIPT = """
(() => {
  if (window.rlhfLabel) return;
  window.rlhfLabel = true;
  const names = {
    a: "a", arrowleft: "a", b: "b", arrowright: "b", t: "tie", s: "skip", u: "undo",
  };
  const panelOf = (event) => event.target.closest && event.target.closest(".rlhf-label");
  window.addEventListener("keydown", (event) => {
    const panel = panelOf(event);
    const runs = event.shiftKey && event.key === "Enter";
    if (!panel || runs || event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    const name = names[event.key.toLowerCase()];
    if (!name) return;
    event.preventDefault();
    // a key that is held down answers once
    if (!event.repeat) panel.querySelector("button.rlhf-" + name).click();
  }, true);
  window.addEventListener("click", (event) => {
    const panel = panelOf(event);
    if (!panel) return;
    panel.tabIndex = 0;
    if (event.detail && !String(getSelection())) panel.focus({preventScroll: true});
    if (!event.target.closest("button")) return;
    // one answer for what is on the screen: a second press must not reach a pair not yet seen
    const step = panel.querySelector(".rlhf-step").dataset.step;
    if (panel.dataset.answered === step) {
      event.preventDefault();
      event.stopPropagation();
    }
    panel.dataset.answered = step;
  }, true);
})();
"""

# Colours of the notebook's theme; where it has none, dark on white, background included.
_STYLE = """
.rlhf-label {
  --ink: var(--jp-content-font-color1, #212121); --card: var(--jp-layout-color1, #fff);
  --line: rgba(127, 127, 127, 0.35); --tint: rgba(127, 127, 127, 0.12);
  --one: #2a84c6; --two: #d2601f;
  box-sizing: border-box; max-width: 960px; padding: 14px 16px 10px; margin: 4px;
  color: var(--ink); background: linear-gradient(var(--tint), var(--tint)), var(--card);
  border: 1px solid var(--line); border-radius: 10px; font-size: 14px; overflow: visible;
}
.rlhf-label:focus, .rlhf-label:focus-within { outline: 2px solid #4a90d9; outline-offset: 0; }
.rlhf-label .widget-html, .rlhf-label .widget-html-content {
  width: auto; height: auto; margin: 0; overflow: visible; color: inherit; font-size: 14px;
  line-height: 1.5;
}
.rlhf-label .rlhf-top { display: flex; align-items: center; gap: 12px; }
.rlhf-label .rlhf-top span, .rlhf-label h4, .rlhf-label .rlhf-hint { opacity: 0.8; }
.rlhf-label .rlhf-bar { flex: 1; height: 6px; border-radius: 3px; background: var(--line); }
.rlhf-label .rlhf-bar i {
  display: block; height: 6px; border-radius: 3px; background: #4a90d9;
}
.rlhf-label h4 {
  margin: 0 0 4px; padding: 0; font-size: 12px; font-weight: 600; color: inherit;
}
.rlhf-label .rlhf-text {
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; unicode-bidi: plaintext;
  max-height: 28em; overflow-y: auto;
}
.rlhf-label .rlhf-prompt { margin: 12px 2px 14px; }
.rlhf-label .rlhf-two {
  display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr));
}
.rlhf-label .rlhf-card {
  padding: 10px 14px 14px; background: var(--card); border: 1px solid var(--line);
  border-top: 4px solid var(--one); border-radius: 6px;
}
.rlhf-label .rlhf-card-b { border-top-color: var(--two); }
.rlhf-label .rlhf-card h4 { font-size: 16px; opacity: 1; }
.rlhf-label .rlhf-row { flex-wrap: wrap; gap: 8px; margin: 12px 0 0; overflow: visible; }
.rlhf-label button {
  width: auto; height: 34px; margin: 0; padding: 0 14px; line-height: 32px; font-size: 14px;
  color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 6px;
}
.rlhf-label button.rlhf-a, .rlhf-label button.rlhf-b,
.rlhf-label button.rlhf-tie { flex: 1 1 auto; }
.rlhf-label button.rlhf-a { border-bottom: 3px solid var(--one); }
.rlhf-label button.rlhf-b { border-bottom: 3px solid var(--two); }
.rlhf-label button::after {
  margin-left: 8px; padding: 1px 6px; font: 12px monospace; opacity: 0.8;
  border: 1px solid var(--line); border-radius: 4px;
}
.rlhf-label button.rlhf-a::after { content: "a"; }
.rlhf-label button.rlhf-b::after { content: "b"; }
.rlhf-label button.rlhf-tie::after { content: "t"; }
.rlhf-label button.rlhf-skip::after { content: "s"; }
.rlhf-label button.rlhf-undo::after { content: "u"; }
.rlhf-label .rlhf-hint { margin: 8px 2px 0; font-size: 12px; }
.rlhf-label .rlhf-hint::after { content: "Click here to use the keys."; }
.rlhf-label:focus-within .rlhf-hint::after, .rlhf-label:focus .rlhf-hint::after {
  content: "The keys are on; ← and → choose too.";
}
.rlhf-label .rlhf-notice {
  margin: 0 0 10px; padding: 6px 10px; color: #5f3b00; background: #fff3cd; border-radius: 6px;
}
.rlhf-label .rlhf-done { margin: 18px 2px 6px; font-size: 16px; }
"""
