"""Every check of the project, one named step after another, each with its time; stops at the first that fails.

One thread in each of as many processes as there are cores, unless `OMP_NUM_THREADS` says otherwise. Another processor
is imitated, as far as rounding goes, by `ATEN_CPU_CAPABILITY=default` or `avx2`, or by two threads.
"""
import os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THREADS = os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):    # else each process compiles PyTorch anew, for 5 seconds
    os.environ["PYTHONPYCACHEPREFIX"] = str(ROOT/".pytest_cache"/"bytecode")
WORKERS = str(max(1, (os.cpu_count() or 1) // int(THREADS)))
AGREE = ["tests/test_notebooks.py", "tests/test_imports.py"]
SITE = ["tests/test_site.py", "tests/test_browser.py"]
PYTEST = [sys.executable, "-m", "pytest"]
STEPS = {
    "the linter": [sys.executable, "-m", "ruff", "check", "--quiet"],
    "notebooks, package and README agree; modules import only from above": [*PYTEST, *AGREE],
    "nbdev_test: the notebooks run; and give what is saved in them": [
        sys.executable, "tools/fresh.py", "--n_workers", WORKERS, "--timing"],
    "oracles, properties, faults, processes, types, the experiment": [
        *PYTEST, "tests", "-n", WORKERS, "--durations", "5", *(f"--ignore={t}" for t in AGREE+SITE)],
    "the site renders, and works in a browser": [*PYTEST, *SITE, "-rs"],
}


def main():
    began = time.monotonic()
    for i, (name, command) in enumerate(STEPS.items(), 1):
        print(f"\n[{i}/{len(STEPS)}] {name}", flush=True)
        start = time.monotonic()
        code = subprocess.run(command, cwd=ROOT).returncode
        print(f"[{i}/{len(STEPS)}] {'failed' if code else 'passed'} in {time.monotonic() - start:.0f} s", flush=True)
        if code: return code
    print(f"\nAll {len(STEPS)} steps passed in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__": sys.exit(main())
