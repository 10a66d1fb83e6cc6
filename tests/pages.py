"""A hook of MkDocs (mkdocs.yml): Markdown files at the top of the project and notebooks become pages of the site."""

import base64
import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, with links as they are seen from docs/, and shows notebooks beside their files."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=_links(text, "")))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        text, pictures = _notebook(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Pages of docs/ name these files by their place on the disk."""
    return _links(markdown, "../")


def _links(text: str, folder: str) -> str:
    names = "|".join(map(re.escape, PAGES))
    text = re.sub(rf"\]\({re.escape(folder)}({names})(?=[)#])", lambda link: f"]({PAGES[link[1]]}", text)
    return re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", text)


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, with what its cells printed, and its pictures by file name."""
    blocks: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        blocks.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                blocks.append(f"![What the cell above drew]({name})")
            else:
                text = "".join(output.get("text", data.get("text/plain", [])))
                blocks.append(f"```text\n{text}```")
    blocks.append(f"[This page as a notebook]({path.name})")
    return "\n\n".join(blocks) + "\n", pictures
