"""Errors for people: what happened, and the command that helps.

`PmodError` is raised on purpose. `explain` turns the exceptions that other libraries raise, and that a user can do
something about, into one; everything it does not know is a bug of ours and keeps its traceback.

The library speaks of its own arguments, in backticks: "`out` is the source", "replace it with `overwrite=True`",
"lower `train.batch_size`". A verb has options of the same names, so `as_flags` makes these `--out`, `--overwrite`,
`--batch-size` where an error is printed; and `--set KEY=VALUE` of a setting of a recipe that has no option of its own.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec

BAD_INPUT = 2
RUN_FAILED = 1
PARTIAL = 3
INTERRUPTED = 130
BAD_PACKAGE = "update or remove the package that it comes from"


class PmodError(Exception):
    """A failure that the user can act on.

    Args:
        what: What went wrong, where, expected against found. One or two sentences.
        hint: The next command, or what to change.
        code: Exit code: 2 bad usage or input, nothing started; 1 the run failed; 3 partial; 130 interrupted.
    """

    def __init__(self, what: str, *, hint: str | None = None, code: int = BAD_INPUT) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.code = code


def first_line(error: BaseException) -> str:
    """What an exception of another library says, without the lines that only its authors understand."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _instance_of(error: BaseException, module: str, *names: str) -> bool:
    """Is `error` an instance of `module.name`? A module that nobody imported cannot have raised it."""
    loaded = sys.modules.get(module)
    return loaded is not None and any(isinstance(error, getattr(loaded, name, ())) for name in names)


def explain(error: BaseException) -> PmodError | None:
    """The sentence for a known exception, or None for one that is not known."""
    text = str(error).strip()
    if isinstance(error, PmodError):
        return error
    if _instance_of(error, "pmod_cli.model.registry", "BadPlugin"):
        return PmodError(text, hint=BAD_PACKAGE)
    if isinstance(error, KeyboardInterrupt):
        return PmodError("interrupted", hint="run the same command again to go on", code=INTERRUPTED)
    if _instance_of(error, "torch", "OutOfMemoryError") or isinstance(error, MemoryError) or "can't allocate" in text:
        return PmodError(
            f"out of memory: {text.splitlines()[0] if text else 'the allocation failed'}",
            hint="lower `batch_size`, or use `dtype=bfloat16`",
            code=RUN_FAILED,
        )
    if known := _explain_hub_error(error):
        return known
    if is_network_error(error):
        return PmodError(
            f"the network failed: {first_line(error)}",
            hint="run the same command again: what has arrived is kept",
            code=RUN_FAILED,
        )
    if _instance_of(error, "safetensors", "SafetensorError"):
        return PmodError(f"a safetensors file cannot be read: {text}", hint="fetch or convert the checkpoint again")
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "transformers":
        return PmodError(first_line(error), hint="pmod env shows what is installed; the README, what is tested")
    if isinstance(error, OSError):
        return _explain_os_error(error)
    return None


# What opens connections, under the names of the releases that are admitted.
_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp")


def is_network_error(error: BaseException) -> bool:
    """Whether a connection could not be made, or broke off. A pipe whose reader is gone is none."""
    if isinstance(error, ConnectionError):
        return not isinstance(error, BrokenPipeError)
    return type(error).__module__.partition(".")[0] in _CLIENTS


def _explain_hub_error(error: BaseException) -> PmodError | None:
    """What the hub answered, where it answered at all; the classes are from the most special to the most general."""
    name = getattr(error, "repo_id", None) or "this repository"
    if _instance_of(error, "huggingface_hub.errors", "GatedRepoError"):
        return PmodError(
            f"{name} is gated: its owner has to grant you access, and this machine has to be logged in",
            hint="ask for access on its page, then: hf auth login",
        )
    if _instance_of(error, "huggingface_hub.errors", "RepositoryNotFoundError"):
        return PmodError(
            f"the hub shows no repository {name}",
            hint="check its name (pmod convert --list has the short ones); a private one wants a login: hf auth login",
        )
    if _instance_of(error, "huggingface_hub.errors", "RevisionNotFoundError"):
        said = getattr(error, "server_message", None) or first_line(error)
        return PmodError(f"{name} has no revision of this name: {said}", hint="its page on the hub lists them")
    if _instance_of(error, "huggingface_hub.errors", "HfHubHTTPError", "LocalEntryNotFoundError"):
        return PmodError(
            f"the Hugging Face hub did not answer as expected: {first_line(error)}",
            hint="try again, or pass a local folder",
            code=RUN_FAILED,
        )
    return None


_OS_ERRORS = {
    errno.ENOSPC: ("no space left on the disk for {}", "free some space, then repeat", RUN_FAILED),
    errno.EDQUOT: ("the disk quota does not allow {}", "free some space, then repeat", RUN_FAILED),
    errno.EFBIG: ("{} is larger than files may be here", "look at `ulimit -f`, or choose another disk", RUN_FAILED),
    errno.EACCES: ("no permission for {}", "choose another folder", BAD_INPUT),
    errno.EPERM: ("no permission for {}", "choose another folder", BAD_INPUT),
    errno.EROFS: ("{} is on a read-only file system", "choose another folder", BAD_INPUT),
}


def _explain_os_error(error: OSError) -> PmodError | None:
    where = error.filename or "the output"
    if error.errno in _OS_ERRORS:
        what, hint, code = _OS_ERRORS[error.errno]
        return PmodError(what.format(where), hint=hint, code=code)
    if error.errno == errno.ENAMETOOLONG:
        name = os.path.basename(os.fspath(where))
        return PmodError(f"a name is too long for the file system: {name[:60]}…", hint="choose a shorter one")
    if isinstance(error, FileNotFoundError) and error.filename:
        return PmodError(f"no such file or folder: {where}")
    if isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError) and error.filename:
        return PmodError(f"{where}: {error.strerror}")
    return None


_NAME = r"[a-z_]+(?:\.[a-z_0-9]+)*"
_ARGUMENT = re.compile(rf"`({_NAME})(?:=([^`]*))?`")


def as_flags(text: str, options: Mapping[str, str], *, settings: bool = False) -> str:
    """A message as a user of the command line reads it; what is no option of the verb stays as it is.

    Args:
        text: With arguments of the library in backticks, as `name` or `name=value`.
        options: Of the verb: the name of an argument to its flag, such as `out` to `--out`.
        settings: Whether the verb takes any setting of a recipe by `--set`.
    """

    def translate(found: re.Match[str]) -> str:
        name, value = found.groups()
        flag = options.get(name)
        if flag is None:
            if not settings or "." not in name:
                return found[0] if "." not in name else found[0].strip("`")
            return name if value is None else f"--set {name}={value}"
        if value in (None, "True"):
            return flag
        if value == "False":
            return f"--no-{flag.removeprefix('--')}"
        return f"{flag} {value}"

    return _ARGUMENT.sub(translate, text)


def require(extra: str, *modules: str) -> None:
    """Check, without importing them, that the top-level `modules` of an extra are installed.

    Raises:
        PmodError: names what is missing and how to install it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise PmodError(
            f"this needs {', '.join(missing)}, which the [{extra}] extra installs",
            hint=f"in the checkout: pip install -e '.[{extra}]'",
        )
