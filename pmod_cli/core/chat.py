"""Chat templates come with a checkpoint and are programs: what one does wrong is said, and what it takes is limited."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from pmod_cli.core.errors import PmodError, first_line

_STATUS = Path("/proc/self/statm")
_ALONE = threading.RLock()  # two threads that set the limit would each restore what the other has set


@contextmanager
def at_most(extra: int) -> Iterator[None]:
    """Let this process take `extra` bytes of address space more than it has; beyond that is a MemoryError.

    The limit holds for all threads while the block lasts, so it is for short work. Where the system does not tell how
    much the process has (macOS), there is no limit.
    """
    if not _STATUS.is_file():
        yield
        return
    with _ALONE:
        yield from _limited(extra)


def _limited(extra: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(_STATUS.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + extra
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


MEMORY = 1 << 30  # bytes that a template may take
LONGEST = 4_000_000  # characters of a prompt
HINT = "take chat_template.jinja of the stock repository"
Prompt = TypeVar("Prompt")


def rendered(
    render: Callable[[], Prompt], text_of: Callable[[Prompt], str] = str, *, memory: int | None = MEMORY
) -> Prompt:
    """What `render`, which runs a chat template in transformers' sandbox, returns.

    Args:
        text_of: From that to the prompt.
        memory: Bytes that it may take; None: no limit, where other threads allocate meanwhile and would meet it too.

    Raises:
        PmodError: the template is no template, is blocked by the sandbox, fails, takes more than `memory`, or makes a
            prompt longer than `LONGEST`.
    """
    try:
        with nullcontext() if memory is None else at_most(memory):
            made = render()
    except PmodError:
        raise
    except MemoryError:
        if memory is None:
            raise
        raise PmodError(
            f"the chat template takes more than {memory >> 20:,} MB, which is the limit", hint=HINT
        ) from None
    except Exception as error:  # a template may fail in any way
        raise PmodError(
            f"the chat template fails: {type(error).__name__}: {first_line(error):.200}", hint=HINT
        ) from error
    if len(text_of(made)) > LONGEST:
        raise PmodError(
            f"the chat template makes a prompt of {len(text_of(made)):,} characters; the limit is {LONGEST:,}",
            hint=HINT,
        )
    return made
