"The guide to the experiments runs and shows what it gives: its folder is left out of the other runs, since templates are run by papermill."
import subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_guide_runs_and_is_fresh():
    done = subprocess.run([sys.executable, "tools/fresh.py", "nbs/experiments/guide.ipynb"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
