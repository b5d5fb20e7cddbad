"""What a release gives to its users: `python tools/release.py [v0.1.0]`.

Builds the source distribution, and of that the wheel, into `dist`. Installs the wheel into a fresh environment with the
tested versions, and runs there, away from the repository, an import of every module and the example of README.md. A tag
has to name the version.
"""
import argparse, os, re, shutil, subprocess, sys, tempfile, venv
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT/"dist"
IMPORTS = """import gated_symile, pkgutil
for module in pkgutil.walk_packages(gated_symile.__path__, "gated_symile."): __import__(module.name)
print(gated_symile.__file__)"""


def example():
    "The ten lines of README.md."
    blocks = re.findall(r"```python\n(.*?)```", (ROOT/"README.md").read_text(encoding="utf-8"), re.S)
    return next(block for block in blocks if block.startswith("import torch"))


def build():
    "The wheel, and that nothing but the package is in it."
    shutil.rmtree(DIST, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT)], check=True,
                   stdout=subprocess.DEVNULL)
    wheel, = DIST.glob("*.whl")
    packed = {name for name in ZipFile(wheel).namelist() if name.startswith("gated_symile/")}
    made = {p.relative_to(ROOT).as_posix() for p in (ROOT/"gated_symile").rglob("*") if p.is_file()
            and "__pycache__" not in p.parts}
    if packed != made: raise ValueError(f"the wheel and gated_symile differ in {sorted(packed ^ made)}")
    return wheel


def try_out(wheel):
    "Install the wheel where nothing else is, and use it."
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder)/("Scripts" if os.name == "nt" else "bin")/"python")
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        for command in (["-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel), "-c",
                         str(ROOT/"constraints.txt")],
                        ["-m", "pip", "check"], ["-c", IMPORTS], ["-c", example() + "\nprint(found)"]):
            subprocess.run([python, *command], cwd=folder, env=env, check=True)


def main(tag=None):
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    if tag not in (None, f"v{config['DEFAULT']['version']}"):
        return f"the tag {tag} is not v{config['DEFAULT']['version']}, the version in settings.ini"
    wheel = build()
    try_out(wheel)
    print(f"{wheel.name} works in a fresh environment")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", nargs="?", help="such as v0.1.0; without one no version is checked")
    try: sys.exit(main(parser.parse_args().tag))
    except subprocess.CalledProcessError as error: sys.exit(f"failed: {error}")
