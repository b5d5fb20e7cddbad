"A module imports only from those above it in ORDER: the house has one direction, and no cycles."
import ast
import json
import re
from pathlib import Path

import pytest

import gated_symile
from gated_symile.core import GatedSymileError

PACKAGE = Path(__file__).parent.parent/"gated_symile"
ORDER = """core product contrastive cube fusion neutral gate.fits gate.factorised gate.gate
    objectives.base objectives.clip objectives.symile objectives.gram objectives.triangle objectives.gated
    objectives.subset objectives.comm objectives.linear objectives.supervised
    statistics augment data.rows data.batches data.dataset data.corruption data.splits data.xnor data.xor data.bits
    data.trifeature data.packaged data.mfeat data.nhanes data.tcga data.cells data.emoji data.tabular data.mimic
    data.biobank
    encoders.base encoders.mlp encoders.tables encoders.images encoders.text encoders.default encoders standardise model
    search bank checkpoint gradcache training fragility auditing probing kinds runs.spec runs.run runs.record runs.plan
    tuning plots""".split()
GENERATED = "__init__", "_modidx"


def modules(
    package=PACKAGE, # folder of the package
): # {dotted name without the package's: path}
    files = sorted(f for f in package.rglob("*.py") if f.stem not in GENERATED)
    return {".".join(f.relative_to(package).with_suffix("").parts): f for f in files}


def imported(path, package=PACKAGE):
    "The names of the package's own modules and objects that the file at `path` imports, wherever in the file."
    here = path.relative_to(package.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[:len(here) + 1 - node.level], *filter(None, [node.module])] if node.level else [node.module]
            names = [".".join([*base, a.name]) for a in node.names]
        else: continue
        yield from (n.removeprefix(f"{package.name}").lstrip(".") for n in names if n.split(".")[0] == package.name)


def faults(package=PACKAGE, order=ORDER):
    "What is wrong with the imports of the package, as sentences."
    for name, path in modules(package).items():
        if name not in order:
            yield f"{name} has no place in the order of modules"
            continue
        above = order[:order.index(name)]
        for n in imported(path, package):
            if n.endswith("*"): yield f"{name} has a star import from {n.rstrip('.*') or 'the package'}"
            elif n.rpartition(".")[2].startswith("_"): yield f"{name} imports {n}, which is private there"
            elif not any(n == m or n.startswith(m + ".") for m in above):
                yield f"{name} imports {n or 'the package'}, which is not above it"


def test_modules_import_only_from_above():
    assert len(modules()) > 5
    assert list(faults()) == []


@pytest.mark.parametrize("source, fault", [
    ("from toy.core import check", None),
    ("import toy.core", None),
    ("from ..core import check", None),
    ("import torch\nfrom pathlib import *", None),
    ("from toy.gate import Gate", "imports gate.Gate, which is not above"),
    ("def late():\n    import toy.gate", "imports gate, which is not above"),
    ("from ..gate import Gate", "imports gate.Gate, which is not above"),
    ("from . import own", "imports data.own, which is not above"),
    ("from toy import core", None),
    ("from toy import Gate", "imports Gate, which is not above"),
    ("import toy", "imports the package, which is not above"),
    ("from toy.core import *", "has a star import from core"),
    ("from toy.core import _secret, check", "imports core._secret, which is private there"),
])
def test_a_wrong_import_is_noticed(tmp_path, source, fault):
    data = tmp_path/"toy"/"data"
    data.mkdir(parents=True)
    for f in (data.parent/"__init__.py", data/"__init__.py", data.parent/"core.py", data.parent/"gate.py"): f.touch()
    (data/"own.py").write_text(source)
    found = list(faults(tmp_path/"toy", ["core", "data.own", "gate"]))
    assert len(found) == bool(fault) and all(fault in f for f in found)


def test_a_module_without_a_place_is_noticed(tmp_path):
    (tmp_path/"toy").mkdir()
    (tmp_path/"toy"/"stray.py").touch()
    assert list(faults(tmp_path/"toy", ["core"])) == ["stray has no place in the order of modules"]


def test_the_table_of_names_is_the_package():
    "What is exported is in the table, and the other way round."
    cells = json.loads((PACKAGE.parent/"nbs"/"api"/"gated_symile.ipynb").read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "markdown" for line in "".join(cell["source"]).splitlines()
             if line.startswith("|")]
    table = set(re.findall(r"`(\w+)`", "\n".join(lines)))
    errors = {n for n in gated_symile.__all__ if isinstance(getattr(gated_symile, n), type)
              and issubclass(getattr(gated_symile, n), GatedSymileError)}
    assert {"Bank", "query_subsets"} < table
    assert table | errors == set(gated_symile.__all__)                                # errors are in it as a family
