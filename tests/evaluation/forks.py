"""Runs of `pmod` as forks of one process that has imported all: to be killed, or cut off from something."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.conftest import ROOT

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["pmod_cli.evaluation.runner", "pmod_cli.commands.eval", "lmms_eval.evaluator"])

NEW_USER, NEW_NETWORK, NEW_MOUNTS = 0x10000000, 0x40000000, 0x00020000  # flags of unshare(2)
NOT_PERMITTED = 77


def start(
    arguments: list[str],
    place: Path,
    environment: Mapping[str, str] | None = None,
    *,
    without_network: bool = False,
    small_disk: Path | None = None,
) -> BaseProcess:
    """`pmod arguments` in the folder `place`; what it prints goes to `place/log`, or `log.1` for process 1, and so on.

    Args:
        without_network: In a network namespace of its own, in which there is not even a loopback device.
        small_disk: A folder that is a disk of 16 KiB for this run; what is written there is gone afterwards.
    """
    process = forked.Process(
        target=_run, args=(arguments, str(place), dict(environment or {}), without_network, small_disk)
    )
    # The process that is forked starts with the first of them, and knows no other way to this checkout.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        process.start()
    return process


def _run(
    arguments: list[str], place: str, environment: dict[str, str], without_network: bool, small_disk: Path | None
) -> None:
    os.chdir(place)
    os.environ.update(environment)
    rank = environment.get("RANK", "0")
    log = os.open("log" if rank == "0" else f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if (without_network and not _unshare(NEW_NETWORK)) or (small_disk and not _mount(small_disk)):
        os._exit(NOT_PERMITTED)
    import torch

    from pmod_cli import cli

    torch.set_num_threads(1)
    os._exit(cli.main(arguments))


def _unshare(flags: int) -> bool:
    """As `unshare`, and where that takes root, as `unshare --map-root-user`."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(flags) == 0:
        return True
    if libc.unshare(flags | NEW_USER) != 0:
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return True


def _mount(folder: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if not _unshare(NEW_MOUNTS):
        return False
    private = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC: nothing of this is seen outside
    libc.mount(b"none", b"/", None, private, None)
    return libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=16k") == 0
