"""What `pip install` brings: the wheel on its own, in a folder that is no checkout."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel holds, and the commands that are run on it."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(place), str(ROOT)]
    subprocess.run(built, check=True, cwd=place)
    (wheel,) = place.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(place / "site"), str(wheel)], check=True
    )
    return place / "site"


def test_it_has_recipes_models_tasks_and_pages(installed, tmp_path):
    def call(*words):
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, "-m", "pmod_cli", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = [sys.executable, "-c", "import pmod_cli; print(pmod_cli.__file__)"]
    where = subprocess.run(
        found, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, stdout=subprocess.PIPE, text=True
    )
    assert where.stdout.startswith(str(installed))  # and not the checkout
    shipped = {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in ROOT.glob("recipes/**/*.yaml")}
    assert shipped == {line.split()[0] for line in call("recipes", "ls").splitlines()}
    call("convert", "tiny-llava-next", "-o", "routed")
    call("profile", "-m", "routed", "--html", "profile.html")
    assert "<html" in (tmp_path / "profile.html").read_text()
    call("finetune", "tiny", "-m", "routed", "--dry-run")
    assert "tiny_doc" in call("eval", "--list")
