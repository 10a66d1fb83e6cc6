"""A hook of MkDocs (mkdocs.yml): the Markdown files at the top of the project become pages of the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, with links as they are seen from docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=_links(text, "")))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Pages of docs/ name these files by their place on the disk."""
    return _links(markdown, "../")


def _links(text: str, folder: str) -> str:
    names = "|".join(map(re.escape, PAGES))
    return re.sub(rf"\]\({re.escape(folder)}({names})(?=[)#])", lambda link: f"]({PAGES[link[1]]}", text)
