"""The forms in which public sets of pairs come, and that what cannot be used of them is named."""

import json
import re

import pytest
from chat_tokenizers import CHATS
from datasets import Dataset
from trl import extract_prompt

from rlhf_helpers import models, preferences
from rlhf_helpers.algorithms import dpo, reward_model
from rlhf_helpers.models import Cut
from rlhf_helpers.preferences import from_rows, read_jsonl, scan_jsonl, write_jsonl


def message(role, content):
    return {"role": role, "content": content}


ASKED = [message("user", "What color is the sky?")]
BLUE, GREEN = message("assistant", "It is blue."), message("assistant", "It is green.")
LONGER = [message("system", "Be brief."), *ASKED, BLUE, message("user", "Sure?")]
TEXT = "What color is the sky?"
HH = "\n\nHuman: What color is the sky?\n\nAssistant: "
# form: the row, and whether its prompt is a conversation in the end
FORMS = {
    "ours": ({"prompt": TEXT, "chosen": "It is blue.", "rejected": "It is green."}, False),
    "ours, a conversation": (
        {"prompt": ASKED, "chosen": "It is blue.", "rejected": "It is green."},
        True,
    ),
    "explicit": ({"prompt": ASKED, "chosen": [BLUE], "rejected": [GREEN]}, True),
    "explicit, the prompt a text": (
        {"prompt": TEXT, "chosen": [BLUE], "rejected": [GREEN]},
        True,
    ),
    "implicit": ({"chosen": [*ASKED, BLUE], "rejected": [*ASKED, GREEN]}, True),
    "implicit, the prompt None": (
        {"prompt": None, "chosen": [*ASKED, BLUE], "rejected": [*ASKED, GREEN]},
        True,
    ),
    "implicit, with the prompt": (
        {"prompt": ASKED, "chosen": [*ASKED, BLUE], "rejected": [*ASKED, GREEN]},
        True,
    ),
    "ultrafeedback-binarized": (
        {
            "prompt": TEXT,
            "prompt_id": "8a3c",
            "chosen": [*ASKED, BLUE],
            "rejected": [*ASKED, GREEN],
            "messages": [*ASKED, BLUE],
            "score_chosen": 8.5,
            "score_rejected": 6.0,
        },
        True,
    ),
    "hh-rlhf": ({"chosen": f"{HH}It is blue.", "rejected": f"{HH}It is green. "}, True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_one_pair(form, tmp_path):
    """Oracle: by hand; the same from rows, a data set (whose column of messages has a type of its
    own), a file, and the file that is written of it."""
    row, talk = FORMS[form]
    wanted = {"prompt": ASKED if talk else TEXT}
    wanted |= {"chosen": "It is blue.", "rejected": "It is green."}
    if "score_chosen" in row:
        wanted["strength"] = 2.5
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    pairs = from_rows([row])
    write_jsonl(pairs, tmp_path / "out.jsonl")
    found = [
        pairs,
        from_rows(Dataset.from_list([row])),
        from_rows(Dataset.from_list([row]).to_pandas().to_dict("records")),
        read_jsonl(tmp_path / "in.jsonl"),
        read_jsonl(tmp_path / "out.jsonl"),
        from_rows(pairs),
    ]
    for one in found:
        assert one.to_list() == [wanted]
        assert one.features == pairs.features
    assert (pairs.features["prompt"] == preferences.MESSAGES) == talk


def test_conversations_without_a_prompt_are_divided_as_in_trl():
    """Oracle: TRL's own."""
    row = {"chosen": [*LONGER, BLUE], "rejected": [*LONGER, GREEN]}
    theirs = extract_prompt(row)
    (found,) = from_rows([row])
    assert found["prompt"] == theirs["prompt"] == LONGER
    assert [found["chosen"]] == [one["content"] for one in theirs["chosen"]]
    assert [found["rejected"]] == [one["content"] for one in theirs["rejected"]]


def test_turns_of_hh_rlhf_are_messages():
    """Oracle: by hand."""
    before = (
        "\n\nHuman: Hi there:\n\nlook\n\nAssistant: Yes?\n\nHuman: Why Human: me?\n\nAssistant:"
    )
    (found,) = from_rows([{"chosen": f"{before} Because.\n\nOf it.", "rejected": f"{before} No"}])
    assert found["prompt"] == [
        message("user", "Hi there:\n\nlook"),
        message("assistant", "Yes?"),
        message("user", "Why Human: me?"),
    ]
    assert (found["chosen"], found["rejected"]) == ("Because.\n\nOf it.", "No")
    # with a prompt it is a text that happens to begin so
    row = {"prompt": "a", "chosen": f"{before} Because.", "rejected": f"{before} No"}
    assert from_rows([row])[0] == row


def test_texts_among_conversations_become_messages():
    rows = [FORMS[form][0] for form in ("ours", "explicit", "hh-rlhf")]
    # a table gives every message the fields that any of them has
    rows.append(rows[0] | {"prompt": [{"content": TEXT, "role": "user", "name": None}]})
    found = from_rows(rows)
    assert found["prompt"][:] == [ASKED] * 4
    assert found.features["prompt"] == preferences.MESSAGES


def test_ties_strengths_and_marks_of_cut_texts_stay():
    """Oracle: by hand; scores become a strength only where there is none."""
    scores = {"score_chosen": 4, "score_rejected": 4}
    row = {"prompt": ASKED, "chosen": [BLUE], "rejected": [GREEN]}
    rows = [
        row | scores,
        row | scores | {"strength": 1.5, "tie": False},
        row | {"tie": True, "annotator": "me"},
        row | {"score_chosen": 4.0, "score_rejected": None},
        {"prompt": ASKED, "chosen": Cut("It is"), "rejected": "It is green."},
    ]
    found = from_rows(rows)
    assert found["strength"][:] == [0.0, 1.5, None, None, None]
    assert found["tie"][:] == [True, False, True, None, None]
    assert found["annotator"][:] == [None, None, "me", None, None]
    assert found["chosen_ended"][:] == [None, None, None, None, False]
    data = reward_model.comparisons(found, strength="margin")
    assert [one.preference for one in data] == [0.5, 1.0, 0.5, 1.0, 1.0]
    assert [one.margin for one in data] == [0.0, 1.5, 0.0, 0.0, 0.0]
    assert isinstance(data[4].responses[0], Cut)


def test_all_forms_are_the_same_tokens():
    """Oracle: the template's own rendering of the whole conversation."""
    tokenizer = CHATS["chatml, another end"]()
    rows = from_rows([row for row, talk in FORMS.values() if talk])
    found = {
        (tuple(one.prompt + one.chosen), tuple(one.prompt + one.rejected))
        for one in dpo.encode(tokenizer, reward_model.comparisons(rows))
    }
    whole = [
        tokenizer.apply_chat_template([*ASKED, answer], return_dict=False)
        for answer in (BLUE, GREEN)
    ]
    # what is behind the end of the turn is no part of it
    assert found == {tuple(tuple(ids[:-1]) for ids in whole)}
    assert models.prompt_ids(tokenizer, rows["prompt"][:1])[0] == whole[0][: len(whole[0]) - 13]


PAIR = {"prompt": ASKED, "chosen": [BLUE], "rejected": [GREEN]}
PAIR_OF_TEXTS = {"chosen": "It is blue.", "rejected": "It is green."}
OTHER = [message("user", "Why?")]
BAD = [
    (
        "completion is a single response; a pair needs two",
        {"prompt": ASKED, "completion": [BLUE], "label": True},
    ),
    ("unknown field 'label'", PAIR | {"label": True}),
    ("unknown field 'completions'", {"prompt": TEXT, "completions": ["a", "b"]}),
    ("prompt is missing", {"chosen": [BLUE], "rejected": [GREEN]}),
    ("prompt is missing", PAIR_OF_TEXTS),
    ("prompt is missing", PAIR_OF_TEXTS | {"chosen": f"{HH}It is blue."}),
    ("chosen is a list, not a text", PAIR | {"rejected": "It is green."}),
    ("rejected is a list, not a text", PAIR | {"chosen": "It is blue."}),
    ("chosen does not end with a message of the assistant", PAIR | {"chosen": ASKED}),
    ("rejected does not end with a message of the assistant", PAIR | {"rejected": []}),
    ("rejected does not end with a message", PAIR | {"rejected": ["It is green."]}),
    (
        "chosen and rejected differ before their last message",
        {"chosen": [*ASKED, BLUE], "rejected": [*OTHER, GREEN]},
    ),
    (
        "chosen and rejected differ before their last message",
        {
            "chosen": f"{HH}It is blue.",
            "rejected": f"{HH}It is green.\n\nHuman: Sure?\n\nAssistant: No.",
        },
    ),
    (
        "chosen and rejected do not begin with the prompt",
        {"prompt": OTHER, "chosen": [*ASKED, BLUE], "rejected": [*ASKED, GREEN]},
    ),
    (
        "the last message of chosen has in message 0 a int as content",
        PAIR | {"chosen": [message("assistant", 5)]},
    ),
    ("prompt has in message 0 the role 'human'", PAIR | {"prompt": [message("human", "Hi")]}),
    ("prompt ends with a message of the assistant", PAIR | {"prompt": [*ASKED, BLUE]}),
    ("prompt is not valid Unicode", PAIR | {"prompt": [message("user", "\ud800")]}),
    ("chosen equals rejected", PAIR | {"rejected": [BLUE]}),
    ("chosen is empty", PAIR | {"chosen": [message("assistant", " ")]}),
    ("score_chosen is below", PAIR | {"score_chosen": 1, "score_rejected": 2}),
    ("score_rejected is 'good'", PAIR | {"score_chosen": 1, "score_rejected": "good"}),
]


@pytest.mark.parametrize(("problem", "row"), BAD)
def test_what_cannot_be_used_is_named_with_its_row(problem, row, tmp_path):
    """Oracle: the specification; the rows beside it are sound."""
    rows = [PAIR, row, PAIR]
    with pytest.raises(ValueError, match=re.escape(f"rows[1]: {problem}")) as caught:
        from_rows(rows)
    assert "rows: 1 bad" in str(caught.value)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    good, problems = scan_jsonl(path)
    assert len(good) == 2
    assert [one.startswith(f"line 2: {problem}") for one in problems] == [True]
