"""Print the package's own code in a notebook, so that what is read is what is tested."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from IPython.display import Markdown, display


def show_source(*objects: Callable | type) -> None:
    """Display the source of functions or classes of the package, each under the file it stands in.

    Raises: ValueError if something is not from this package: only its code is tested here.
    """
    root = Path(__file__).parents[2]
    for index, thing in enumerate(objects):
        module = getattr(thing, "__module__", None) or ""
        plain = inspect.unwrap(thing)
        has_source = inspect.isroutine(plain) or inspect.isclass(plain)
        if not has_source or not module.startswith("rlhf_helpers"):
            raise ValueError(
                f"objects[{index}], {thing!r}, is not part of rlhf_helpers; pass its functions and"
                " classes, since show_source prints only the tested package"
            )
        # a decorator from elsewhere has a file of its own
        path = Path(inspect.getsourcefile(plain)).relative_to(root)
        code = inspect.getsource(thing).rstrip()
        # longer than any fence that the code itself holds
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
        display(Markdown(f"`{path.as_posix()}`\n\n{fence}python\n{code}\n{fence}"))
