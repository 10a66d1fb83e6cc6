"""The Hugging Face layout: stock LLaVA as transformers reads it, and our own, which adds routers and settings."""

from __future__ import annotations

import re
from pathlib import Path

from pmod_cli.checkpoints import files
from pmod_cli.checkpoints.layout import Draft, Layout, Options, Source, TensorSource, files_of
from pmod_cli.checkpoints.layouts.shapes import HEAD, canonical, check_shapes, section, tied
from pmod_cli.checkpoints.tokenizer_files import holds_tokenizer
from pmod_cli.core.errors import PmodError
from pmod_cli.families import DECODERS, family_of, model_types
from pmod_cli.families.configs import decoder_kind, filled, known_family
from pmod_cli.families.llava import LLAVA
from pmod_cli.model import PmodSettings

ROUTER_STATES = ("untrained", "trained", "calibrated")
PARTS = ("language_model", "vision_tower", "multi_modal_projector")
GRID_PARTS = ("language_model", "visual")  # of families whose tower reads no tiles
OURS = ("pmod", "router_state", "auto_map")  # what our layout adds to a stock config
MORE_TEMPLATES = "additional_chat_templates"
COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
MADE_NEW = (files.CONFIG, files.INDEX, files.PICKLED_INDEX, "pmod_provenance.json", "adapter_config.json")
_ROUTER = re.compile(r"language_model\.model\.layers\.(\d+)\.router\.weight")
_LAYER = re.compile(r"language_model\.(?:model\.)?layers\.(?P<number>\d+)\.input_layernorm\.weight")


def read_huggingface(folder: Path, config: dict, options: Options) -> Source:
    """A stock or p-MoD checkpoint in the Hugging Face layout.

    Raises:
        PmodError: it is of no known architecture, quantised, damaged, or not whole.
    """
    where = folder / files.CONFIG
    family = known_family(config)
    config = family.unfold(config)
    settings, state = _settings(config, where)
    check_decoder(config, where)
    tensors = files.read_tensors(folder)
    _check_parts(tensors, config, folder)
    if settings is None and any(".router." in name for name in tensors):
        raise PmodError(
            f"{folder} holds routers already, though its config says that it is a stock model",
            hint="give the p-MoD checkpoint with its own config.json",
        )
    check_shapes(tensors, config, where)
    stock = {key: value for key, value in config.items() if key not in OURS}
    stock |= {"model_type": family.name, "architectures": [family.stock_class]}
    if tied(config) and HEAD not in map(canonical, tensors):
        stock["tie_word_embeddings"] = True  # some said it of the decoder alone, where some families no longer look
    return Source(
        folder=folder,
        layout="huggingface",
        config=stock,
        parts={name: TensorSource(tensor) for name, tensor in tensors.items()},
        files=files_of(tensors),
        small_files=small_files(folder),
        settings=settings,
        router_state=state,
        original_config=_original_config(folder) if settings else None,
        notes=_notes(folder),
    )


def _notes(folder: Path) -> list[str]:
    """What nothing can be asked without, and weights can be converted without."""
    images = any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    absent = [
        name for name, there in (("tokenizer", holds_tokenizer(folder)), ("image processor", images)) if not there
    ]
    lacks = f"{folder} holds no {' and no '.join(absent)}, so none is written: add its files to the result"
    return [lacks] if absent else []


def hold_to_weights(folder: Path, config: dict) -> bool:
    """Whether a folder has whole, unquantised weights, to whose headers its config is then held.

    Args:
        config: Stock or p-MoD, with both parts.

    Raises:
        PmodError: config and headers differ.
    """
    where = folder / files.CONFIG
    quantised = config.get("quantization_config") or config["text_config"].get("quantization_config")
    if quantised or files.missing_files(folder):
        return False
    tensors = files.read_tensors(folder)
    _check_parts(tensors, config, folder)
    check_shapes(tensors, config, where)
    settings, _ = _settings(config, where)
    found = {int(match[1]) for match in map(_ROUTER.fullmatch, map(canonical, tensors)) if match}
    text = config["text_config"]
    layers = filled(text, decoder_kind(text, known_family(config)).defaults)["num_hidden_layers"]
    if settings is not None and found != set(_routed(settings, layers, where)):
        raise PmodError(
            f"{folder} holds routers in layers {_ranges(sorted(found))}, and pmod in {where} calls for other ones",
            hint="convert it again",
        )
    return True


def small_files(folder: Path) -> list[Path]:
    """Tokenizer, processor and generation files: copied, so that editing one never reaches the source.

    Further chat templates have a folder of their own.

    Raises:
        PmodError: one of them is a link out of the folder.
    """
    found = sorted(
        path
        for path in (*folder.iterdir(), *(folder / MORE_TEMPLATES).glob("*.jinja"))
        if path.is_file()
        and path.suffix in COPIED_SUFFIXES
        and path.name not in MADE_NEW
        and not path.name.startswith(".")
    )
    for path in found:
        files.refuse_outside(folder, path)
    return found


def check_decoder(config: dict, where: Path) -> None:
    """Refuse what routing cannot be added to.

    Raises:
        PmodError: another decoder, sliding-window attention, or quantised weights.
    """
    text = section(config, "text_config", where)
    family = family_of(config.get("model_type")) or LLAVA
    fitting = [kind.name for kind in DECODERS.values() if kind.family == family.name]
    fitting = fitting or [kind.name for kind in DECODERS.values() if kind.family is None]
    if (decoder := text.get("model_type", family.defaults["text_config"]["model_type"])) not in fitting:
        raise PmodError(
            f"{where}: the decoder, text_config.model_type, is {decoder!r}; expected one of {', '.join(fitting)}"
        )
    if window := decoder_kind(text, family).window(text):
        raise PmodError(
            f"{where}: sliding-window attention ({window} tokens) is not supported: "
            "a window counts tokens that routing drops"
        )
    quantised = config.get("quantization_config") or text.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise PmodError(
            f"{where}: the checkpoint is quantised{f' ({method})' if method else ''}; "
            "expected float32, bfloat16 or float16 weights",
            hint="convert the model as it was before, then train it with a QLoRA recipe",
        )


def _settings(config: dict, where: Path) -> tuple[PmodSettings | None, str]:
    if not config["model_type"].startswith("pmod_"):
        return None, "stock"
    state = config.get("router_state", "untrained")
    if state not in ROUTER_STATES:
        raise PmodError(f"{where}: router_state is {state!r}, expected one of {', '.join(ROUTER_STATES)}")
    try:
        return PmodSettings.from_dict(config.get("pmod") or {}), state
    except (ValueError, TypeError) as error:
        raise PmodError(f"{where}: {error}") from error


def _routed(settings: PmodSettings, layers: int, where: Path) -> list[int]:
    try:
        return [layer for layer, routed in enumerate(settings.routed(layers)) if routed]
    except ValueError as error:
        raise PmodError(f"{where}: {error}") from error


def _original_config(folder: Path) -> dict | None:
    """config.json of the layout that a p-MoD checkpoint came from, so that it can go back as it came."""
    provenance = folder / "pmod_provenance.json"
    return files.read_json(provenance).get("original_config") if provenance.is_file() else None


def _check_parts(tensors: dict[str, files.Tensor], config: dict, folder: Path) -> None:
    """All parts and all layers: said before names and shapes, since these say what kind of thing is wrong."""
    names, parts = list(map(canonical, tensors)), PARTS if known_family(config).tiled else GRID_PARTS
    absent = [part for part in parts if not any(part in name for name in names)]
    if absent:
        raise PmodError(f"{folder} holds no tensor of its {', '.join(absent)}: not a whole LLaVA checkpoint")
    found = sorted(int(match["number"]) for match in map(_LAYER.fullmatch, map(canonical, tensors)) if match)
    expected = config["text_config"].get("num_hidden_layers", len(found))
    if found != list(range(len(found))) or len(found) != expected:
        raise PmodError(f"{folder} holds decoder layers {_ranges(found)}, expected {_expected(expected)}")


def _expected(layers: object) -> str:
    return f"0-{layers - 1}" if isinstance(layers, int) and layers > 0 else f"num_hidden_layers {layers!r}"


def _ranges(numbers: list[int]) -> str:
    """`0-3, 5` for [0, 1, 2, 3, 5]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "none"


def _as_it_is(draft: Draft) -> Draft:
    return draft


HUGGINGFACE = Layout(
    "huggingface",
    recognises=lambda config, options: family_of(config.get("model_type")) is not None,
    read=read_huggingface,
    model_types=model_types,
)
PMOD = Layout(
    "pmod",
    arrange=_as_it_is,
    current=True,
    usage="""\
```python
from pmod_cli.checkpoints import load_model

model, processor = load_model("./THIS_FOLDER")
```
""",
)
STOCK = Layout(
    "stock",
    arrange=_as_it_is,
    routed=False,
    summary="plain LLaVA",
    usage="""\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("./THIS_FOLDER")
processor = AutoProcessor.from_pretrained("./THIS_FOLDER")
```
""",
)
