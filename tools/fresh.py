"""`nbdev_test`, and do the cells give what is saved in them? `python tools/fresh.py [arguments of nbdev_test]`.

The command itself runs the notebooks, with its own choice of files, cells and workers and its own verdict, and stores
nothing. Here its shell also notes what each cell was saved with and what it gives now (in the folder `FRESH`, where
that is set). Then the two are compared:

- **Stale**, which fails: other words, a figure or a text that came or went, another whole number, and any number that
  is off by more than rounding can explain (`close`).
- **Told**, which passes: numbers that are off by less, as on another processor; and what follows a training, which
  hangs on every rounding before it, as long as text and figures are there.

Of an output that speaks of time or memory only the words are compared; warnings aren't compared at all.
"""
import json, os, re, runpy, sys, tempfile
from html import unescape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARE, NOISE, ORDER = 0.005, 1e-5, 10                    # of a number; what rounding leaves of 0; an order of magnitude
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.?\d*(?:e[-+]?\d+)?(?!\w)", re.I)
MEASURED = re.compile(r"\b(seconds|milliseconds|minutes|ms|µs|[KMG]i?B)\b")
HIDDEN = re.compile(r"<style scoped>.*?</style>|<[^>]+>", re.S)    # pandas' style; that of an interactive figure counts


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


def words(text): return re.sub(r"\s", "", NUMBER.sub("#", text))     # a sign of noise moves columns of a tensor apart
def form(text): return text.count("[figure]"), not text.replace("[figure]", "").strip()


def close(saved, now):
    """Whether rounding can explain that the number `now` stands where `saved` stood.

    Never for whole numbers, which count something. For others within half a percent, one unit of the last digit shown,
    or 1e-5, which rounding may leave of 0. One or two digits with a power of ten (`2e-07`) are an order of magnitude,
    most often of a rounding error, which is another on each processor: less than tenfold is close.
    """
    if re.fullmatch(r"[-+]?\d+", saved): return float(saved) == float(now)
    a, b, (digits, _, power) = float(saved), float(now), saved.lower().lstrip("+-").partition("e")
    decimals = len(digits.partition(".")[2])
    if power and len(digits.replace(".", "")) <= 2 and a and 1/ORDER < b/a < ORDER: return True
    last = 10.**(int(power or 0) - decimals) if decimals else 0.
    return abs(a - b) <= max(SHARE*abs(a), 1.001*last, NOISE)


def judge(saved, now, trained=False):
    "What differs, in a few words or none, and whether the page is stale."
    if words(saved) != words(now): return "other words", not trained or form(saved) != form(now)
    pairs = list(zip(NUMBER.findall(saved), NUMBER.findall(now)))
    differs = ", ".join(f"{a} is now {b}" for a, b in pairs if float(a) != float(b))
    if not differs or MEASURED.search(saved): return "", False
    return differs, not (trained or all(close(a, b) for a, b in pairs))


def take_notes(folder):
    "Let the shell of `nbdev_test` write a file for each notebook into `folder`: its cells, saved and new."
    import multiprocessing
    import nbdev.test
    multiprocessing.set_start_method("fork", force=True)             # so that its workers have this shell, too

    class Shell(nbdev.test.CaptureShell):
        def run_all(self, nb, **options):
            from torch.optim.optimizer import register_optimizer_step_pre_hook
            self.notes, self.trained = [], False
            hook = register_optimizer_step_pre_hook(lambda *_: setattr(self, "trained", True))
            try: super().run_all(nb, **options)
            finally:
                hook.remove()
                path = os.path.relpath(nb.path_, ROOT)
                text = json.dumps({"path": path, "cells": self.notes})
                Path(folder, path.replace(os.sep, "+") + ".json").write_text(text, encoding="utf-8")

        def cell(self, cell, **options):
            saved, cell.outputs = shown(cell.outputs), []
            super().cell(cell, **options)
            self.trained = self.trained or "papermill" in cell.source          # in another process
            quiet = self.displayhook.semicolon_at_end_of_expression(cell.source)
            now = shown(o for o in cell.outputs if not (quiet and o["output_type"] == "execute_result"))
            if not self.exc: self.notes.append((cell.idx_ + 1, saved, now, self.trained))

    nbdev.test.CaptureShell = Shell


def compare(folder):
    "Tell what differs; whether a page is stale, or none was run."
    stale, files = False, sorted(Path(folder).glob("*.json"))
    for file in files:
        page = json.loads(file.read_text(encoding="utf-8"))
        for number, saved, now, trained in page["cells"]:
            differs, wrong = judge(saved, now, trained)
            where, stale = f"{page['path']}, cell {number}", stale or wrong
            if wrong: print(f"{where}, is saved with\n{saved[:1000]}\nbut now gives\n{now[:1000]}\n", file=sys.stderr)
            elif differs: print(f"{where}, {'after training' if trained else 'by rounding'}: {differs[:200]}")
    return stale or not files


def main():
    with tempfile.TemporaryDirectory() as folder:
        take_notes(folder := os.environ.get("FRESH", folder))
        try: runpy.run_path(str(Path(sys.executable).with_name("nbdev_test")), run_name="__main__")
        except SystemExit as done: failed = bool(done.code)
        return compare(folder) or failed


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
