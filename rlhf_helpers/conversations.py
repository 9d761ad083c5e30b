"""Prompts that are conversations: lists of messages, each with a role and a content, in the form
of transformers and TRL. What a chat template makes of them is the business of `models`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_helpers._validate import check_list, check_text

ROLES = ("system", "user", "assistant")
# A prompt is a text, or a conversation: its messages, each with a role and a content.
Conversation = list[dict[str, str]]
Prompt = str | Conversation


class ConversationText(str):
    """A conversation as plain text, which is what reward functions read.

    `messages` holds the conversation, so that a reward model can still read it as it was trained
    to. What is made of it by slicing, stripping or adding is a plain text.
    """

    messages: Conversation


def chat(texts: Sequence[str], system: str | None = None) -> list[Conversation]:
    """Conversations out of texts: each becomes what a user says. A model that was trained on
    conversations answers these, where it would go on with a text.

    Args:
        texts: B texts.
        system: what the system message says; None leaves it to the chat template, of which some
            write one of their own.
    Returns: B conversations, in the form of transformers and TRL.
    Raises: ValueError on one text in place of a list, or an entry that is no text.
    """
    if isinstance(texts, str):
        raise ValueError("texts is one text; put it into a list")
    check_list(texts, "texts")
    if system is not None:
        check_text(system, "system")
    before = [] if system is None else [{"role": "system", "content": system}]
    found = [[*before, {"role": "user", "content": text}] for text in texts]
    for i, one in enumerate(found):
        if not isinstance(one[-1]["content"], str):
            raise ValueError(f"texts[{i}] is a {type(one[-1]['content']).__name__}; pass a text")
    return found


def messages_of(prompt: Any) -> Conversation | None:
    """The messages of a conversation, also of one in an array or a `ConversationText`; None for a
    text and for anything else."""
    if isinstance(prompt, str):
        return getattr(prompt, "messages", None)
    found = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    return found if isinstance(found, list) else None


def conversation_problem(messages: Conversation) -> str | None:
    """What is wrong with a conversation as a prompt; None if nothing is. It needs a message, each
    with a role of `ROLES` and a content that are texts, and nothing else, and the last must be the
    user's."""
    if messages is not None and not isinstance(messages, list | tuple):
        return f"is a {type(messages).__name__}; pass a list of messages"
    if not messages:
        return "is a conversation without a message; give it one of the user"
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            return f"has as message {i} a {type(message).__name__}; pass a dict of role and content"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                kind = type(message.get(key)).__name__
                return f"has in message {i} a {kind} as {key}; pass a text"
        if message["role"] not in ROLES:
            return f"has in message {i} the role {message['role']!r}; use {', '.join(ROLES)}"
        # tables give every message the fields that any of them has
        extra = [k for k, v in message.items() if k not in ("role", "content") and v is not None]
        if extra:
            return f"has in message {i} the field {extra[0]!r}, which is not read here; drop it"
    if messages[-1]["role"] != "user":
        return (
            f"ends with a message of the {messages[-1]['role']}; end with one of the user, and give"
            " an answer as the response"
        )
    return None


def plain_text(prompt: Prompt, name: str = "prompt") -> str:
    """A prompt as reward functions and people read it: a text as it is, and of a conversation what
    user and assistant said, without markup, with an empty line between messages. What the system
    said is left out; so that of `chat` the texts come back.

    Returns: a text; for a conversation a `ConversationText`.
    Raises: ValueError as in `conversation_problem`, that calls the prompt `name`; TypeError on what
        is neither text nor conversation.
    """
    messages = messages_of(prompt)
    if messages is None or isinstance(prompt, str):
        check_text(prompt, name)
        return prompt
    problem = conversation_problem(messages)
    if problem:
        raise ValueError(f"{name} {problem}")
    said = [one["content"] for one in messages if one["role"] != "system"]
    found = ConversationText("\n\n".join(said))
    found.messages = messages
    return found
