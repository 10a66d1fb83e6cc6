"""One self-contained modeling file out of `pmod_cli/model`, for plain transformers with `trust_remote_code=True`."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

from pmod_cli import __version__, families
from pmod_cli import model as package
from pmod_cli.checkpoints.layout import THIS_FOLDER, Draft, Layout, Progress
from pmod_cli.core.errors import PmodError
from pmod_cli.families import DECODERS, FAMILIES, DecoderKind, Family
from pmod_cli.families.decoders import LLAMA
from pmod_cli.families.llava_next import LLAVA_NEXT
from pmod_cli.model import SELECTIONS, PmodSettings
from pmod_cli.model.schedule import SCHEDULES
from pmod_cli.model.versions import REQUIREMENT

FILE = "modeling_pmod.py"
_FIRST, _START = "versions", "modeling"
# What `model` reads of a record, which stands in the file instead of the registries of `pmod_cli.families`.
_OF_FAMILY = (
    "name",
    "routed_name",
    "routed_class",
    "title",
    "classes",
    "module",
    "high_resolution",
    "tiled",
    "vision_tokens",
    "small_config",
    "small_pixels",
    "small_inputs",
)
_OF_DECODER = ("name", "classes", "layer_class", "family", "module")
_GIVEN = '''class Given(SimpleNamespace):
    """The one family, or decoder, of this file, in the place of a registry."""

    def follow(self, add):
        add(self)

    def values(self):
        return [self]


FAMILIES = {family}
DECODERS = {decoder}'''


def auto_map(family: Family) -> dict[str, str]:
    """What config.json tells the Auto classes: where each class is."""
    stem, classes = Path(FILE).stem, f"Pmod{family.classes}"
    return {
        "AutoConfig": f"{stem}.{classes}Config",
        "AutoModel": f"{stem}.{classes}Model",
        "AutoModelForImageTextToText": f"{stem}.{classes}ForConditionalGeneration",
        "AutoModelForMultimodalLM": f"{stem}.{classes}ForConditionalGeneration",
    }


def modeling_source(family: Family = LLAVA_NEXT, decoder: DecoderKind = LLAMA) -> str:
    """The modules that `modeling` needs, in the order of their imports, with the imports among them left out.

    `versions` comes first: a release of transformers that is too old is named before anything of it is imported.
    """
    names = [_FIRST, *(name for name in _modules(_START, []) if name != _FIRST)]
    for selection in SELECTIONS.built_in():
        if (name := f"{SELECTIONS.package}/{selection}") not in names:
            names = _modules(name, names)
    imports: dict[str, dict[str, None]] = {name: {} for name in names}
    first, *bodies = (
        f"# {'-' * 8} pmod_cli/model/{name}.py\n\n{_body(_source(name), imports[name])}" for name in names
    )
    used = {line for name in names[1:] for line in imports[name]} | {"from types import SimpleNamespace"}
    rest = sorted(used - imports[_FIRST].keys())
    stock = [line for line in rest if line.startswith(("import transformers", "from transformers"))]
    guarded = ["try:", *(f"    {line}" for line in stock), "except ImportError as error:"]
    guarded.append('    raise UnsupportedTransformers(f"lacks what p-MoD builds on ({error})") from error')
    head = f'"""p-MoD for transformers. Generated from pmod_cli/model, pmod {__version__} (Apache-2.0): do not edit."""'
    blocks = [
        "\n".join([head, "", *sorted(imports[_FIRST]), *(line for line in rest if line not in stock)]),
        first,
        "\n".join(guarded),
        _GIVEN.format(family=_given(family, _OF_FAMILY), decoder=_given(decoder, _OF_DECODER)),
        *bodies,
    ]
    return "\n\n\n".join(blocks) + "\n"


def _given(record: Family | DecoderKind, names: tuple[str, ...]) -> str:
    return f"Given({', '.join(f'{name}={getattr(record, name)!r}' for name in names)})"


def _source(name: str) -> str:
    return (Path(package.__file__).parent / f"{name}.py").read_text(encoding="utf-8")


def _modules(name: str, found: list[str]) -> list[str]:
    """`found`, with a module behind all that it imports from the package."""
    tree = ast.parse(_source(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            path = node.module.replace(".", "/")
            found = found if path in found else _modules(path, found)
    found.append(name)
    return found


def _body(text: str, imports: dict[str, None]) -> str:
    """A module without its docstring and imports; those from elsewhere are added to `imports`."""
    lines: list[str | None] = [*text.splitlines()]
    for position, node in enumerate(ast.parse(text).body):
        docstring = position == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not docstring and not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        elsewhere = isinstance(node, ast.ImportFrom) and not node.level and node.module != families.__name__
        if isinstance(node, ast.Import) or elsewhere:
            imports[ast.unparse(node)] = None
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            lines[number - 1] = None
    return "\n".join(line for line in lines if line is not None).strip()


def _arrange(draft: Draft) -> Draft:
    settings = _without_packages(draft.settings, draft.source.num_layers)
    added = {"pmod": settings.to_dict(), "auto_map": auto_map(FAMILIES[draft.source.kind])}
    return replace(draft, config=draft.config | added)


def _without_packages(settings: PmodSettings, layers: int) -> PmodSettings:
    """The same without a schedule of another package, which plain transformers does not have: its ratios as a list.

    Raises:
        PmodError: a selection is of another package.
    """
    for name in (settings.selection, *(settings.before_decoder or ())[:1]):
        if not SELECTIONS.is_built_in(name):
            raise PmodError(
                f"the selection {name!r} is of another package, which plain transformers does not have",
                hint="leave the layout out: pmod loads the checkpoint as it is",
            )
    if SCHEDULES.is_built_in(settings.schedule):
        return settings
    ratios = tuple(settings.retention(layers))
    return replace(settings, schedule="list", values=ratios, shift=None, mean=None)


def _finish(draft: Draft, folder: Path, progress: Progress) -> list[str]:
    source = modeling_source(FAMILIES[draft.source.kind], DECODERS[draft.source.decoder])
    (folder / FILE).write_text(source, encoding="utf-8")
    return []


REMOTE_CODE = Layout(
    "remote-code",
    arrange=_arrange,
    finish=_finish,
    summary="for plain transformers",
    usage=f"""\
```
pip install '{REQUIREMENT}' torch pillow
```

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "./{THIS_FOLDER}"  # beside this program; or the repository it was uploaded to
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, dtype="auto").eval()
processor = AutoProcessor.from_pretrained(name)

content = [{{"type": "image", "image": Image.open("picture.png")}}, {{"type": "text", "text": "What is the total?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`modeling_pmod.py` is generated and is all that is run: it needs neither pmod nor another package. An older transformers
is refused with a sentence; a newer one is tried with a small model on the first load. Padded batches, pipelines,
`torch.compile`, 8 and 4 bit work as with a stock LLaVA; quantised or not, the routers stay as they are.
""",
)
