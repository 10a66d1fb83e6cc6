"""Runs the notebooks of docs/notebooks, cell by cell: `make notebooks` writes what they printed and drew into them.

It needs no Jupyter. A cell is Python as in the Python shell: the value of a last expression is shown. A figure or image
becomes a PNG. tests/test_notebooks.py runs the same, and compares what is printed.
"""

import ast
import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pmod_cli.core.atomic import write_text

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"


def read(path: Path) -> dict[str, Any]:
    """A notebook, nbformat 4."""
    return json.loads(path.read_text(encoding="utf-8"))


def run(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Runs the code cells in order, in the current folder.

    Returns:
        By code cell, its outputs as nbformat writes them.

    Raises:
        Exception: What a cell raises.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [_run_cell("".join(cell["source"]), names, number) for number, cell in enumerate(cells, 1)]


def printed(outputs: list[dict[str, Any]]) -> str:
    """The text of outputs, without pictures."""
    texts = [output["text"] if "text" in output else output["data"].get("text/plain", []) for output in outputs]
    return "".join(line for text in texts for line in text)


def _run_cell(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    tree = ast.parse(source, f"cell {number}")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(io.StringIO()) as out:
        exec(compile(tree, f"cell {number}", "exec"), names)
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names) if last else None
    outputs = []
    if out.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": out.getvalue().splitlines(keepends=True)})
    if value is not None:
        shown = {"execution_count": number, "metadata": {}, "data": _shown(value)}
        outputs.append({"output_type": "execute_result", **shown})
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    file = io.BytesIO()
    if hasattr(value, "savefig"):  # a figure of matplotlib
        value.savefig(file, format="png", dpi=110, bbox_inches="tight")
    elif hasattr(value, "save"):  # an image of Pillow
        value.save(file, format="png")
    else:
        return {"text/plain": repr(value).splitlines(keepends=True)}
    return {"image/png": base64.b64encode(file.getvalue()).decode()}


def main(paths: list[Path]) -> None:
    """Run each notebook in a folder of its own, and write its outputs into it."""
    import os
    import tempfile

    for path in paths:
        notebook = read(path)
        with tempfile.TemporaryDirectory() as folder:
            before = os.getcwd()
            os.chdir(folder)
            try:
                outputs = run(notebook)
            finally:
                os.chdir(before)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, (cell, shown) in enumerate(zip(cells, outputs, strict=True), 1):
            cell |= {"execution_count": number, "outputs": shown}
        write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main([Path(each).resolve() for each in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")))
