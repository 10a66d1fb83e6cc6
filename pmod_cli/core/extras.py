"""A missing optional dependency is a sentence with the install command, not an ImportError."""

from __future__ import annotations

from importlib.util import find_spec

from pmod_cli.core.errors import PmodError


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
