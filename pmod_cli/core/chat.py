"""Chat templates come with a checkpoint and are programs: what one does wrong is said, and what it takes is limited."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pmod_cli.core import memory_limit
from pmod_cli.core.errors import PmodError

MEMORY = 1 << 30  # bytes that a template may take
LONGEST = 4_000_000  # characters of a prompt
HINT = "take chat_template.jinja of the stock repository"
Prompt = TypeVar("Prompt")


def rendered(render: Callable[[], Prompt], text_of: Callable[[Prompt], str] = str) -> Prompt:
    """What `render`, which runs a chat template in transformers' sandbox, returns.

    Args:
        text_of: From that to the prompt.

    Raises:
        PmodError: the template is no template, is blocked by the sandbox, fails, takes more than `MEMORY`, or makes a
            prompt longer than `LONGEST`.
    """
    try:
        with memory_limit.at_most(MEMORY):
            made = render()
    except PmodError:
        raise
    except MemoryError:
        raise PmodError(
            f"the chat template takes more than {MEMORY >> 20:,} MB, which is the limit", hint=HINT
        ) from None
    except Exception as error:  # a template may fail in any way
        first = (str(error).strip() or "no message").splitlines()[0]
        raise PmodError(f"the chat template fails: {type(error).__name__}: {first:.200}", hint=HINT) from error
    if len(text_of(made)) > LONGEST:
        raise PmodError(
            f"the chat template makes a prompt of {len(text_of(made)):,} characters; the limit is {LONGEST:,}",
            hint=HINT,
        )
    return made
