"""Where rewards come from: small seeded worlds whose optimum is known."""

from importlib import import_module
from types import ModuleType


def load(name: str) -> ModuleType:
    """The world of this name: "reviews", the grammar, or "imdb", the reviews of the hub. Both have
    `texts`, `openings`, `instructions`, `follows` and `surprise`.

    Raises: ValueError on another name.
    """
    if not isinstance(name, str) or name not in ("reviews", "imdb"):
        raise ValueError(f"name={name!r} is unknown; use one of 'reviews', 'imdb'")
    return import_module(f"rlhf_helpers.worlds.{name}")
