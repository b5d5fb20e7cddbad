"The guide to the experiments runs: its folder is left out of `nbdev_test`, since templates are run by papermill."
from pathlib import Path

import papermill

EXPERIMENTS = Path(__file__).parent.parent/"nbs"/"experiments"


def test_the_guide_runs(tmp_path):
    papermill.execute_notebook(EXPERIMENTS/"guide.ipynb", tmp_path/"guide.ipynb", kernel_name="python3", cwd=EXPERIMENTS, progress_bar=False)
