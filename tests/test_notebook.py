"""The example notebook runs from an empty folder, inside the event loop of its kernel."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_the_notebook_is_short_and_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert sum(len(cell.source.splitlines()) for cell in code) <= 25


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_the_notebook_runs(tmp_path, monkeypatch):
    # The kernel of this interpreter, whatever kernels are registered on this machine.
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (kernel / "kernel.json").write_text(f'{{"argv": {command}, "display_name": "Python 3", "language": "python"}}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    folder = tmp_path / "empty"
    folder.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=540, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    assert (folder / "runs" / "notebook" / "report.html").is_file()
    outputs = [cell.outputs[-1] for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    assert len(outputs[0]["data"]["text/plain"].split(",")) == 2, "two steps"
