"""From the notebooks everything that is made of them: `python tools/notebooks.py [nbs/api/product.ipynb ...]`.

Exports the package, executes the notebooks in place (all, or those named; folders with a `.notest` file only when named), cleans
them, and makes README.md. Stops at the first error and leaves that notebook as it was.
"""
import argparse, os, sys
from pathlib import Path

import readme

ROOT = Path(__file__).resolve().parent.parent


def execute(path):
    "Run a notebook in its folder and save its outputs; what widgets and progress bars left behind is not kept."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    nb.metadata.pop("widgets", None)
    NotebookClient(nb, kernel_name="python3", coalesce_streams=True,
                   resources={"metadata": {"path": path.parent}}).execute()
    nbformat.write(nb, path)


def main(names):
    from nbclient.exceptions import CellExecutionError
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export, nbglob
    notebooks = [Path(n) for n in names] or sorted(f for f in nbglob("nbs", as_path=True)
                                                   if not (f.parent/".notest").exists())
    nbdev_export()
    for path in notebooks:
        print(path, flush=True)
        try: execute(path)
        except (CellExecutionError, FileNotFoundError) as error: return str(error)
        nbdev_clean(str(path))
    return readme.main()


if __name__ == "__main__":
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="which to run; all that are tested, where none is named")
    sys.exit(main(parser.parse_args().notebooks))
