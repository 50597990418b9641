"""Run the pages of docs/start, all or those named, each in a kernel, and keep their outputs."""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
COMMAND = f'#!/bin/sh\nexec {sys.executable} -m learner "$@"\n'  # `learner`, of this checkout


def pages():
    return sorted((HERE / "start").glob("[!.]*.ipynb"))


def joined(paths):
    "The cells of several pages as one notebook; each page forgets the names of the one before."
    whole = nbformat.v4.new_notebook()
    home = "import os, tempfile; os.chdir(tempfile.mkdtemp())"
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        whole.cells += [
            nbformat.v4.new_code_cell("%reset -f"),
            nbformat.v4.new_code_cell(home),
            *code,
        ]
    for number, cell in enumerate(whole.cells):
        cell.id = f"cell-{number}"
    return whole


def execute(notebook):
    "Run a notebook in an empty folder; the first cell that fails raises CellExecutionError."
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as commands:
        command = Path(commands, "learner")
        command.write_text(COMMAND)
        command.chmod(0o755)
        path = os.pathsep.join([commands, os.environ["PATH"]])
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(HERE.parent), "COLUMNS": "88"}
        client = NotebookClient(
            notebook,
            timeout=300,
            coalesce_streams=True,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=env)
    return notebook


def cleaned(notebook):
    "Without times and numbers, which differ from run to run and tell a reader nothing."
    notebook.metadata = {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
    return notebook


def main(names):
    for path in map(Path, names or pages()):
        began = time.monotonic()
        notebook = execute(nbformat.read(path, as_version=4))
        nbformat.write(cleaned(notebook), path)
        print(f"{path}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
