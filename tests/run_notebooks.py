"""Run notebooks in a real kernel and keep their outputs: all of them, or those that are named."""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in map(Path, sys.argv[1:] or sorted(map(str, Path("nbs").rglob("[!.]*.ipynb")))):
    if ".ipynb_checkpoints" in path.parts: continue
    print(path, flush=True)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(notebook, path)
