"""Execute the notebooks in this folder from scratch; fails if a cell does.

    python docs/notebooks/execute.py [--write]

With ``--write`` the outputs are stored in the notebooks.
"""

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

TIMEOUT = 300  # seconds, for one cell


def execute(path: Path) -> nbformat.NotebookNode:
    """Returns the notebook with new outputs."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # Sockets in the folder: over TCP, other users of the machine could connect.
        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"}
        NotebookClient(
            notebook,
            config=Config({"KernelManager": sockets}),
            kernel_name="python3",
            timeout=TIMEOUT,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute()
    # The kernel adds the version of Python, which would change with the machine.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="store the outputs")
    arguments = parser.parse_args()
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        start = time.perf_counter()
        notebook = execute(path)
        print(f"{path.name}: executed in {time.perf_counter() - start:.0f} s")
        if arguments.write:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
