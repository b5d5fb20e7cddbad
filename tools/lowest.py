"""The library's tests with the lowest versions that settings.ini allows: `python tools/lowest.py [words for pytest]`.

They run in an environment of their own; left out are those of what the development tools make: notebooks, site, types.
"""
import os, re, subprocess, sys, tempfile, venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ["pytest", "hypothesis", "pyyaml", "papermill", "jupyter", "symile==0.1.0"]         # what the tests need
OTHERS = ["notebooks", "imports", "fresh", "guide", "site", "browser", "types"]              # tests of another kind


def lowest():
    "The requirements, each at its lower bound."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return [re.sub(r">=([\d.]+).*", r"==\1", need) for need in config["DEFAULT"]["requirements"].split()]


def main(arguments):
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder)/"bin/python")
        install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        print(*lowest(), flush=True)
        subprocess.run([*install, *lowest(), *BESIDE], check=True)
        tests = [python, "-m", "pytest", "tests", *(f"--ignore=tests/test_{name}.py" for name in OTHERS), *arguments]
        return subprocess.run(tests, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
