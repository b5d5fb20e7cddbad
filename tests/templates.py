"Templates of the experiments: run by papermill, as people do, or cell by cell in the process of the tests."
import json
import subprocess
import sys
from pathlib import Path

from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent.parent/"nbs"/"experiments"


def papermill(template, folder, *parameters):
    "Run a template in `folder`, with arguments of papermill's command."
    return subprocess.run([sys.executable, "-m", "papermill", str(FOLDER/f"{template}.ipynb"), "executed.ipynb",
                           "-k", "python3", "--no-progress-bar", *parameters],
                          cwd=folder, capture_output=True, text=True, timeout=300)


def run_cells(template, **parameters):
    "Run its cells with other parameters, one after the other: what they define. Spares the 10 s of papermill."
    names, notebook = {"__name__": "__main__"}, json.loads((FOLDER/f"{template}.ipynb").read_text(encoding="utf-8"))
    try:
        for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", []): names.update(parameters)
    finally: plt.close("all")
    return names
