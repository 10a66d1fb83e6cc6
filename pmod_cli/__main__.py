"""The first lines of `pmod` and of `python -m pmod_cli`: Ctrl-C is a sentence from here on, also during imports."""

import os
import signal
import sys


def run() -> int:
    """Run the program and return its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _end)
    from pmod_cli.cli import main

    return main(on_ready=_raise_again)


def _end(number: int, frame: object) -> None:
    """Nothing has been started yet that would have to be cleaned up. An exception could be lost in an import."""
    os.write(sys.stderr.fileno(), b"error: interrupted\n  run the same command again\n")
    os._exit(130)


def _raise_again() -> None:
    """From here on Ctrl-C is an exception, which the command turns into its own end."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(run())
