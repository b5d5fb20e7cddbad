"""Run the notebooks again, and compare what their cells give with what is saved in them: `python tools/fresh.py [nbs/api/product.ipynb ...]`.

Fails where a cell fails, as `nbdev_test` does, and where a page is stale. Skipped are folders with a `.notest` file, and cells with
`#| eval: false` or one of the `tst_flags` of settings.ini. Words must be the same, numbers equal within `TOLERANCE` (processors round
differently), and a figure where there was one. An output that speaks of time or memory is compared in its words only; warnings aren't.
What follows a training depends on every rounding of it, so on another processor it may differ: then that is told, and fails only where text or
a figure came or went.
"""
import argparse, os, re, sys, time
from html import unescape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.02                                                            # relative to a number, absolute below 1
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.?\d*(?:e[-+]?\d+)?(?!\w)", re.I)
MEASURED = re.compile(r"\b(seconds|milliseconds|minutes|ms|µs|[KMG]i?B)\b")
HIDDEN = re.compile(r"<style scoped>.*?</style>|<[^>]+>", re.S)               # pandas' style; that of an interactive figure counts


def shown(outputs):
    "What a reader sees of a cell's outputs: printed text and values, and `[figure]` for each picture."
    seen = []
    for out in outputs:
        data = {kind: "".join(value) for kind, value in out.get("data", {}).items() if kind.startswith("text/")}
        if out["output_type"] == "stream" and out["name"] == "stdout": seen.append("".join(out["text"]))
        elif any(kind.startswith("image/") for kind in out.get("data", {})): seen.append("[figure]")
        elif "text/html" in data: seen.append(unescape(HIDDEN.sub(" ", data["text/html"])))
        elif data: seen.append(data.get("text/markdown", data.get("text/plain")))
    return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-f]+", "", "\n".join(seen))).strip()


def same(saved, fresh):
    "Whether two texts have the same words, and numbers that are equal within `TOLERANCE`, unless they were measured."
    if NUMBER.sub("#", saved) != NUMBER.sub("#", fresh): return False
    pairs = zip(*(map(float, NUMBER.findall(text)) for text in (saved, fresh)))
    return bool(MEASURED.search(saved)) or all(abs(a - b) <= TOLERANCE*max(1, abs(a)) for a, b in pairs)


def form(text): return text.count("[figure]"), not text.replace("[figure]", "").strip()


def rerun(path):
    "Run one notebook: its seconds, what is wrong with it, and what differs after a training."
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    os.environ["IN_TEST"] = "1"
    sys.path.insert(0, str(ROOT))
    flags, began, shell, wrong, differs, trained = set(get_config().tst_flags.split()), time.monotonic(), CaptureShell(path), [], [], set()
    hook = register_optimizer_step_pre_hook(lambda *_: trained.add("here"))
    with working_directory(path.parent):
        for cell in NBProcessor(path, process=True).nb.cells:
            if cell.cell_type != "code": continue
            marks = cell.directives_ or {}
            if flags & marks.keys() or marks.get("eval:") == ["false"] or "nbdev_export(" in cell.source: continue
            saved, cell.outputs = shown(cell.outputs), []
            shell.cell(cell)
            if "papermill" in cell.source: trained.add("in another process")
            if shell.exc: wrong.append(shell.prettytb(path)); break
            quiet = shell.displayhook.semicolon_at_end_of_expression(cell.source)
            fresh = shown(o for o in cell.outputs if not (quiet and o["output_type"] == "execute_result"))
            if same(saved, fresh): continue
            if trained and form(saved) == form(fresh): differs.append(f"{path}, cell {cell.idx_ + 1}: differs after training, as on another processor it may")
            else: wrong.append(f"{path}, cell {cell.idx_ + 1}, is saved with\n{saved[:1000]}\nbut now gives\n{fresh[:1000]}\n")
    hook.remove()
    return time.monotonic() - began, wrong, differs


def main(names):
    from fastcore.parallel import parallel
    from nbdev.doclinks import nbglob
    import fresh                                                            # a notebook's shell takes the place of `__main__` in a worker
    paths = [Path(n) for n in names] or sorted(f for f in nbglob("nbs", as_path=True) if not (f.parent/".notest").exists())
    found = parallel(fresh.rerun, [path.resolve() for path in paths], n_workers=2, pause=0.01)
    for (seconds, wrong, _), path in sorted(zip(found, paths), reverse=True): print(f"{seconds:4.0f} s  {path}{'  STALE OR BROKEN' if wrong else ''}")
    for _, _, differs in found: print(*differs, sep="\n", end="\n" if differs else "")
    print(*(w for _, wrong, _ in found for w in wrong), sep="\n", end="", file=sys.stderr)
    return any(wrong for _, wrong, _ in found)


if __name__ == "__main__":
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="which to run; all that are tested, where none is named")
    sys.exit(main(parser.parse_args().notebooks))
