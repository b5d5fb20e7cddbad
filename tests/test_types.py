"Code that uses the library can be checked: mypy finds no error in what a user writes, and that runs."
import subprocess
import sys
from pathlib import Path

import typed_user_code

ROOT = Path(__file__).parent.parent


def test_user_code_has_no_type_errors():
    command = [sys.executable, "-m", "mypy", "tests/typed_user_code.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_user_code_runs(tmp_path): typed_user_code.main(tmp_path)


def test_the_package_says_that_it_is_typed(): assert (ROOT/"gated_symile"/"py.typed").exists()
