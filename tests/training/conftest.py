"""What several tests of training start from."""

from pathlib import Path

import pytest

from pmod_cli.checkpoints import convert
from pmod_cli.model import PmodSettings


@pytest.fixture(scope="session")
def stock(stock_model) -> Path:
    """A stock LLaVA-NeXT over a Llama of 4 layers."""
    return stock_model("llava_next", "llama")


@pytest.fixture(scope="session")
def routed(stock, tmp_path_factory) -> Path:
    """A p-MoD checkpoint whose 4 layers keep 1, 0.75, 0.25 and 0.15 of the vision tokens; it is read alone."""
    target = tmp_path_factory.mktemp("routed") / "model"
    convert(stock, target, PmodSettings())
    return target
