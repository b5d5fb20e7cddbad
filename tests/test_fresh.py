"Stale pages and broken releases are noticed, and another processor's rounding is not mistaken for either."
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import fresh
import release

TRAIN = "import torch\nx = torch.zeros(1, requires_grad=True); x.sum().backward(); torch.optim.SGD([x], 1.).step();"


@pytest.mark.parametrize("saved, now", [
    ("top1 0.91", "top1 0.95"), ("top1 0.912", "top1 0.921"),               # a point more than it was
    ("rank 139.5", "rank 141"), ("loss -0.9", "loss 0.9"), ("loss 2.31", "loss 2.31e+02"),
    ("1000 rows", "1001 rows"), ("shape (3, 4)", "shape (3, 5)"),           # what counts something
    ("shape (3, 4)", "shape (3, 4, 5)"), ("[1, 2]", "[12]"),
    ("rate 1e-03", "rate 1e-02"), ("error 2e-07", "error 1e-03"), ("error 2e-07", "error -1e-03"),
    ("slope 1.234e-03", "slope 1.334e-03"),                                 # all its digits say that it is exact
    ("0.1 of them", "0.3 of them"), ("0.001", "0.003"),
    ("loss 0.5", "loss nan"), ("GRAM 0.5", "CLIP 0.5"), ("it took 1.2 seconds", "it needed 1.2 seconds"),
    ("[figure]", ""), ("", "[figure]"), ("[figure]", "[figure] [figure]"), ("0.5", "[figure]"),
])
def test_what_rounding_cannot_explain_is_stale(saved, now):
    assert fresh.judge(saved, now)[1]
    assert fresh.judge(saved, now, trained=True) == (fresh.judge(saved, now)[0], fresh.form(saved) != fresh.form(now))


@pytest.mark.parametrize("saved, now", [
    ("top1 0.9123", "top1 0.9124"), ("top1 0.03", "top1 0.04"),             # one unit of the last digit
    ("rank 1395.5", "rank 1396.5"), ("-0.9071917533874512", "-0.9071918725967407"),
    ("4e-07 and 1e-01", "5e-07 and 2e-01"), ("error 3.6e-07", "error 4.8e-08"),
    ("tensor([1.0000, -2e-07])", "tensor([1., 3e-8])"), ("0.0", "1.7763568394002505e-15"),
    ("tensor([ 1.0000, 2e-08])", "tensor([1.0000e+00, -3e-08])"),           # a sign moves the columns apart
])
def test_what_rounding_may_have_done_is_told(saved, now):
    differs, stale = fresh.judge(saved, now)
    assert differs and not stale and fresh.judge(now, saved) == (fresh.judge(now, saved)[0], False)


@pytest.mark.parametrize("saved, now", [
    ("0.9", "0.9"), ("-0.0000", "0.0000"), ("1.", "1.0000"), ("", ""), ("it took 1.2 seconds", "it took 9.9 seconds"),
])
def test_what_is_the_same_is_passed_over(saved, now): assert fresh.judge(saved, now) == ("", False)


def test_what_a_reader_sees():
    table = "<style scoped>\n td {width: 3px}\n</style><table><td>1</td>\n<td>a &lt; b</td></table>"
    outputs = [dict(output_type="stream", name="stdout", text=["one\n", "two\n"]),
               dict(output_type="stream", name="stderr", text="warning"),
               dict(output_type="display_data", data={"image/png": "iVBO", "text/plain": "<Figure size 640x480>"}),
               dict(output_type="execute_result", data={"text/html": table, "text/plain": "1  a < b"}),
               dict(output_type="execute_result", data={"text/plain": "<object at 0x7f00>"})]
    assert fresh.shown(outputs) == "one two [figure] 1 a < b <object>"


def cell(source, saved=""):
    data = {"text/plain": saved}
    return nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output("execute_result", data)] if saved else [])


def run(folder, *pages, command="tools/fresh.py", **environ):
    "The pages, each a list of cells, are written into the folder and run there by two workers."
    for i, cells in enumerate(pages): nbformat.write(nbformat.v4.new_notebook(cells=cells), folder/f"page{i}.ipynb")
    words = [sys.executable, str(command), "--path", str(folder), "--n_workers", "2"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environ})


def test_stale_cells_are_found_and_others_left_alone(tmp_path):
    done = run(tmp_path, [cell("1 + 1", "2"), cell("2*3", "7"), cell("#| eval: false\n1/0", "kept"),
                          cell("5; # not shown"), cell("'never ' 'saved'")])
    assert done.returncode == 1 and "Success" in done.stdout                 # of nbdev_test, whose verdict is another
    assert done.stderr.count("is saved with") == 2 and "saved with\n7\nbut now gives\n6" in done.stderr
    assert "gives\n'never saved'" in done.stderr


def test_what_follows_a_training_may_differ_but_not_vanish(tmp_path):
    other, gone = cell("'lost 0.32'", "'found 0.61'"), cell("", "'found 0.61'")
    done = run(tmp_path, [cell(TRAIN), other], [cell(TRAIN), gone], [other, cell(TRAIN)])
    assert done.returncode == 1 and "page0.ipynb, cell 2, after training: other words" in done.stdout
    assert "page1.ipynb, cell 2, is saved with\n'found 0.61'\nbut now gives\n\n" in done.stderr
    assert "page2.ipynb, cell 1, is saved with" in done.stderr and done.stderr.count("is saved with") == 2


def test_broken_cells_are_found_by_nbdev_test_with_and_without_the_notes(tmp_path):
    for command in (Path(sys.executable).with_name("nbdev_test"), "tools/fresh.py"):
        done = run(tmp_path, [cell("1 + 1", "3"), cell("1/0")], [cell("1 + 1", "2")], command=command)
        assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
        assert "nbdev Tests Failed On The Following Notebooks" in done.stderr and "page1" not in done.stderr
        assert ("saved with\n3\nbut now gives\n2" in done.stderr) == (command == "tools/fresh.py")


def test_what_rounding_did_passes_and_nothing_run_does_not(tmp_path):
    (notes := tmp_path/"notes").mkdir()
    (pages := tmp_path/"pages").mkdir()
    done = run(pages, [cell("1e-7/3", "4.1e-08")], FRESH=str(notes))
    assert done.returncode == 0 and "cell 1, by rounding: 4.1e-08 is now 3.33" in done.stdout
    assert len(list(notes.iterdir())) == 1 and not fresh.compare(notes) and fresh.compare(pages)


def test_a_release_needs_the_tag_of_its_version():
    assert "v99" in release.main("v99")
    assert compile(release.example(), "README.md", "exec") and "fit(" in release.example()
