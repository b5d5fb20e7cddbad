"The guide to the experiments runs, and is fresh: `nbdev_test` leaves out its folder, whose templates papermill runs."
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_guide_runs_and_is_fresh():
    command = [sys.executable, "tools/fresh.py", "--path", "nbs/experiments/guide.ipynb", "--ignore_fname", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
