"""Executes notebooks in place, without a display: all of notebooks/, or those that are named.

Each runs from its own directory, as in Jupyter. What differs from run to run without meaning anything (times of
execution, versions) is left out, so that `git diff` shows results only. A notebook that fails is left as it was; exit
code 1. Usage: run_notebooks.py [notebooks/NAME.ipynb...]
"""
import os
import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

SECONDS = 900  # after which a cell is taken to hang


def execute(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, record_timing=False, coalesce_streams=True,
                   extra_arguments=["--log-level=ERROR"],
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                         "language_info": {"name": "python"}}
    unfinished = path.with_suffix(".part")
    nbformat.write(notebook, unfinished)
    os.replace(unfinished, path)


def main():
    failed = 0
    for path in map(pathlib.Path, sys.argv[1:] or sorted(pathlib.Path("notebooks").glob("*.ipynb"))):
        print(path, end="  ", flush=True)
        start = time.monotonic()
        try:
            execute(path)
            print(f"{time.monotonic() - start:.0f} s")
        except (CellExecutionError, CellTimeoutError) as error:
            print(f"failed\n{error}")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
