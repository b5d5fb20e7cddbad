"Every check of the project, one named step after another, each with its time; stops at the first that fails."
import os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AGREE = ["tests/test_notebooks.py", "tests/test_imports.py"]
SITE = ["tests/test_site.py", "tests/test_browser.py"]
PYTEST = [sys.executable, "-m", "pytest"]
STEPS = {
    "notebooks, package and README agree; modules import only from above": [*PYTEST, *AGREE],
    "notebooks run, and give what is saved in them": [sys.executable, "tools/fresh.py"],
    "oracles, properties, faults, processes, the experiment": [*PYTEST, "tests", "--durations", "5",
                                                               *(f"--ignore={t}" for t in AGREE+SITE)],
    "the site renders, and works in a browser": [*PYTEST, *SITE, "-rs"],
}


def main():
    # two processes on two cores: one thread each
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    for i, (name, command) in enumerate(STEPS.items(), 1):
        print(f"\n[{i}/{len(STEPS)}] {name}", flush=True)
        start = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
        print(f"[{i}/{len(STEPS)}] {'failed' if code else 'passed'} in {time.monotonic() - start:.0f} s", flush=True)
        if code: return code
    print(f"\nAll {len(STEPS)} steps passed in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__": sys.exit(main())
