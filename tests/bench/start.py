"""From the start of Python to the first token: this package against plain transformers, on the bundled tiny weights."""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ASK = """
import torch
from PIL import Image
torch.set_num_threads(1)
content = [{"type": "image"}, {"type": "text", "text": "value of a?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=Image.new("RGB", (96, 64)), text=prompt, return_tensors="pt")
model.generate(**inputs, max_new_tokens=1, do_sample=False)
"""
PLAIN = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1])
"""
OURS = """
import sys
from pathlib import Path
from pmod_cli.checkpoints import load_model
model, processor = load_model(Path(sys.argv[1]))
"""


def start_ratio(rounds: int) -> float:
    """CPU seconds of a fresh process up to the first token, p-MoD over stock; median of the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        convert = [sys.executable, "-m", "pmod_cli", "convert", "tiny-llava-next", "--out", f"{folder}/pmod"]
        subprocess.run(convert, check=True, capture_output=True, env={**os.environ, "HOME": folder})
        from pmod_cli.checkpoints import bundled_path

        stock = bundled_path("tiny-llava-next")
        ratios = []
        for _ in range(rounds + 1):  # the first fills the disk cache
            plain, ours = _cpu_seconds(PLAIN, stock), _cpu_seconds(OURS, Path(folder) / "pmod")
            ratios.append(ours / plain)
    return statistics.median(ratios[1:])


def _cpu_seconds(code: str, model: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code + ASK, str(model)], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
