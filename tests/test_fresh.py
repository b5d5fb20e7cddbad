"Stale pages and broken releases are noticed."
import subprocess, sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import fresh, release


@pytest.mark.parametrize("saved, now, agree", [
    ("top1 0.9123", "top1 0.9124", True),
    ("top1 0.91", "top1 0.95", False),                                      # 4 points more than it was
    ("rank 139.5", "rank 141", True),                                       # 1 %
    ("rank 139.5", "rank 145", False),
    ("tensor([1.0000, -2e-07])", "tensor([1., 3e-8])", True),               # what rounding leaves of 0
    ("loss -0.9", "loss 0.9", False),
    ("shape (3, 4)", "shape (3, 4, 5)", False),
    ("GRAM 0.5", "CLIP 0.5", False),
    ("it took 1.2 seconds", "it took 9.9 seconds", True),
    ("it took 1.2 seconds", "it needed 1.2 seconds", False),
    ("[figure]", "", False),
])
def test_what_counts_as_the_same(saved, now, agree): assert fresh.same(saved, now) is agree


def test_what_a_reader_sees():
    table = "<style scoped>\n td {width: 3px}\n</style><table><td>1</td>\n<td>a &lt; b</td></table>"
    outputs = [dict(output_type="stream", name="stdout", text=["one\n", "two\n"]), dict(output_type="stream", name="stderr", text="warning"),
               dict(output_type="display_data", data={"image/png": "iVBO", "text/plain": "<Figure size 640x480>"}),
               dict(output_type="execute_result", data={"text/html": table, "text/plain": "1  a < b"}),
               dict(output_type="execute_result", data={"text/plain": "<object at 0x7f00>"})]
    assert fresh.shown(outputs) == "one two [figure] 1 a < b <object>"


def test_stale_cells_are_found_and_others_left_alone(tmp_path):
    new, out = nbformat.v4, nbformat.v4.new_output
    def value(source, saved): return new.new_code_cell(source, outputs=[out("execute_result", data={"text/plain": saved})] if saved else [])
    nb = new.new_notebook(cells=[value("1 + 1", "2"), value("2*3", "7"), value("#| eval: false\n1/0", "kept"), value("5; # not shown", ""), value("'never ' 'saved'", "")])
    nbformat.write(nb, tmp_path/"page.ipynb")
    done = subprocess.run([sys.executable, "tools/fresh.py", str(tmp_path/"page.ipynb")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "STALE" in done.stdout
    assert done.stderr.count("is saved with") == 2 and "saved with\n7\nbut now gives\n6" in done.stderr and "gives\n'never saved'" in done.stderr


def test_what_follows_a_training_may_differ_but_not_vanish(tmp_path):
    new, out = nbformat.v4, nbformat.v4.new_output
    train = "import torch\nx = torch.zeros(1, requires_grad=True); x.sum().backward(); torch.optim.SGD([x], 1.).step();"
    cells = [new.new_code_cell(train), *(new.new_code_cell(source, outputs=[out("execute_result", data={"text/plain": "'found 0.61'"})]) for source in ("'lost 0.32'", ""))]
    def run(cells):
        nbformat.write(new.new_notebook(cells=cells), tmp_path/"page.ipynb")
        return subprocess.run([sys.executable, "tools/fresh.py", str(tmp_path/"page.ipynb")], cwd=ROOT, capture_output=True, text=True)
    first, both, untrained = run(cells[:2]), run(cells), run(cells[1:2])
    assert first.returncode == 0 and "cell 2: differs after training" in first.stdout
    assert both.returncode == 1 and "saved with\n'found 0.61'\nbut now gives\n\n" in both.stderr
    assert untrained.returncode == 1


def test_a_broken_cell_is_found(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1/0")]), tmp_path/"page.ipynb")
    done = subprocess.run([sys.executable, "tools/fresh.py", str(tmp_path/"page.ipynb")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_a_release_needs_the_tag_of_its_version():
    assert "v99" in release.main("v99")
    assert compile(release.example(), "README.md", "exec") and "fit(" in release.example()
