"""New routers on disk: zeros, or small random numbers; in any dtype of the format and without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pmod_cli.checkpoints.files import Tensor, encode_header


def write_routers(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, std: float, seed: int) -> None:
    """A safetensors file of routers.

    Args:
        path: File to write.
        shapes: Shape by tensor name.
        dtype: `F32`, `BF16` or `F16`.
        std: Standard deviation of the weights; biases are zero.
        seed: Of the weights.
    """
    generator = np.random.default_rng(seed)
    with open(path, "wb") as file:
        file.write(encode_header({name: (dtype, shape) for name, shape in shapes.items()}))
        for name, shape in shapes.items():
            if std and name.endswith("weight"):
                file.write(_encoded(generator.normal(0.0, std, shape).astype(np.float32), dtype))
            else:
                file.write(bytes(Tensor(path, dtype, shape).nbytes))


def _encoded(values: np.ndarray, dtype: str) -> bytes:
    if dtype != "BF16":
        return values.astype(np.float16 if dtype == "F16" else np.float32).tobytes()
    bits = values.view(np.uint32)  # numpy has no bfloat16: the upper half of a float32, rounded to even
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
