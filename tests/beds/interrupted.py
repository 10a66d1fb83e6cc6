"""What holds for the training of every bed: a run that is killed ends where a whole one does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def ends_as_a_whole_run(module, recipe: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kills `module.pretrain` behind each of its first two checkpoints and returns the model that it ends with."""
    keep = module.keep
    whole = module.pretrain(recipe, folder / "whole", report=lambda line: None)

    class Killed(Exception):
        pass

    def dying(*arguments):
        keep(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "keep", dying)
        for _ in range(2):
            with pytest.raises(Killed):
                module.pretrain(recipe, folder / "broken", report=lambda line: None)
    broken = module.pretrain(recipe, folder / "broken", report=lambda line: None)
    one, other = (load_file(made / "model.safetensors") for made in (whole, broken))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    return broken
