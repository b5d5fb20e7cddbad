"What several files of tests share."
import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

if sys.dont_write_bytecode:    # as in many containers, where every process would compile PyTorch anew, for 5 seconds
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(ROOT/".pytest_cache"/"bytecode")
    sys.dont_write_bytecode = os.environ.pop("PYTHONDONTWRITEBYTECODE", None) is None

# PyTorch keeps what it compiled, and takes it for another processor's as well, which ends in a segmentation fault.
CPU = os.environ.get("ATEN_CPU_CAPABILITY", "native")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT/".pytest_cache"/f"compiled_{CPU}"))


@pytest.fixture(scope="session")
def site():
    "The folder of the site, built once a session, with no broken link in it."
    if sys.version_info < (3, 11): pytest.skip("smalldocs needs Python 3.11")
    done = subprocess.run([sys.executable, "tools/docs.py", "check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT/"_docs"
