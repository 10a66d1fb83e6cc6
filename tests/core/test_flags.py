"""Messages of the library name its arguments; the command line prints them as the options of the verb."""

import pytest

from pmod_cli.core.flags import as_flags

OPTIONS = {"out": "--out", "overwrite": "--overwrite", "resume": "--resume", "train.batch_size": "--batch-size"}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("choose another `out`", "choose another --out"),
        ("replace it with `overwrite=True`", "replace it with --overwrite"),
        ("`resume=False` was given", "--no-resume was given"),
        ("lower `train.batch_size`", "lower --batch-size"),
        ("`train.batch_size=4` or `lora.enabled=true`", "--batch-size 4 or --set lora.enabled=true"),
        ("change `data.max_length`", "change data.max_length"),
        ("`out=runs/a b` and `pmod eval --list`", "--out runs/a b and `pmod eval --list`"),
        ("the file `config.json`, `nothing` known", "the file config.json, `nothing` known"),
    ],
)
def test_arguments_become_options(said, shown):
    assert as_flags(said, OPTIONS, settings=True) == shown
