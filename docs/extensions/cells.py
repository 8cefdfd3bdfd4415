"""What the sources need before Sphinx can show them, and pictures of the notebooks' cells on other pages."""

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def prepare(app: Sphinx, docname: str, content: list[str]) -> None:
    """What a source has to be changed in before it is read; the file stays as it is."""
    if docname.startswith("notebooks/"):
        content[0] = fold(content[0])
    elif docname.startswith("results/"):
        name = docname.removeprefix("results/")
        alt = f"Chart of the table below: {name}."
        picture = f"![{alt}]({name}.png)\n\n" if Path(app.srcdir, f"{docname}.png").exists() else ""
        content[0] = f"# Results: {name}\n\n{picture}{content[0]}"  # by themselves they are bare tables
    elif docname == "README":
        content[0] = content[0].replace("](results)", "](docs/results.md)")  # a folder is no page


def fold(source: str) -> str:
    """Jupyter's mark of a folded cell, as the tag that MyST-NB knows."""
    notebook = json.loads(source)
    for cell in notebook["cells"]:
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            cell["metadata"].setdefault("tags", []).append("hide-input")
    return json.dumps(notebook)


class Pictures(SphinxDirective):
    """All pictures of one cell. Arguments: the notebook's name and the cell's id; content: what is to be seen."""

    required_arguments = 2
    has_content = True

    def run(self) -> list[nodes.Node]:
        name, cell = self.arguments
        path = Path(self.env.srcdir, "notebooks", f"{name}.ipynb")
        self.env.note_dependency(path)  # so that the page is made anew when the notebook changes
        alt = " ".join(self.content)
        found = [nodes.image(uri=uri, alt=alt) for uri in pictures(path, cell)]
        if not found:
            raise self.error(f"{path.name} has no cell {cell!r} with a picture.")
        return found


def pictures(notebook: Path, cell_id: str) -> list[str]:
    """The pictures that a cell has put out, as data URIs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells if cell["id"] == cell_id for output in cell["outputs"]]
    data = [(kind, data) for output in outputs for kind, data in output.get("data", {}).items() if "image/" in kind]
    return [f"data:{kind};base64,{''.join(encoded).replace(chr(10), '')}" for kind, encoded in data]


def setup(app: Sphinx) -> dict[str, int]:
    app.connect("source-read", prepare)
    app.add_directive("pictures", Pictures)
    # Raise the version when this module makes something else of a page: pages in the cache are then made anew.
    return {"parallel_read_safe": True, "env_version": 2}
