"""Run every cell of the lecture's notebook, and save what it prints and draws beside it.

    python docs/notebook.py [FILE]      # default: docs/nanoseal.ipynb itself; 15 s on one thread

It needs no Jupyter: a cell is run by `exec`, and its outputs are written as Jupyter would.
"""
import base64
import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot                                               # noqa: E402

DOCS = Path(__file__).resolve().parent
NOTEBOOK = DOCS / "nanoseal.ipynb"


def lines_of(text):
    """A text as notebooks keep it: a list of its lines, each with its line break."""
    return text.splitlines(keepends=True)


def picture_of(figure):
    """A display output that holds a figure as a PNG."""
    # Without the version of matplotlib in it, the same drawing is the same file.
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=80, metadata={"Software": None})
    data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["a figure"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def outputs_of(source, names):
    """Run a cell among the names that the cells before it have made."""
    printed, outputs = io.StringIO(), []
    with redirect_stdout(printed):
        exec(compile(source, "a cell", "exec"), names)
    if printed.getvalue():
        text = lines_of(printed.getvalue())
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    for number in pyplot.get_fignums():
        outputs.append(picture_of(pyplot.figure(number)))
    pyplot.close("all")
    return outputs


def main():
    target = Path(sys.argv[1] if sys.argv[1:] else NOTEBOOK).resolve()
    book, names = json.loads(NOTEBOOK.read_text()), {}
    os.chdir(DOCS)      # where Jupyter runs it
    pyplot.show = lambda: None      # a figure is saved, not shown
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(code, 1):
        cell["outputs"] = outputs_of("".join(cell["source"]), names)
        cell["execution_count"] = count
    target.write_text(json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
