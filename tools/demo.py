"What an experiment found, and where it lies: `python tools/demo.py runs/demo`."
import sys
from pathlib import Path

WHAT = {"retrieval.ipynb": "the executed notebook", "retrieval.html": "the same, for a browser",
        "results.parquet": "every number", "runs": "each run's numbers: what is finished is not run again",
        "top1.png": "the figure", "top1.svg": "the same, without pixels", "weights": "of every model, as safetensors"}


def main(out):
    import pandas as pd
    from gated_symile.runs.record import accuracy_table
    table = accuracy_table(pd.read_parquet(out/"results.parquet"))
    print("\nTop-1 accuracy in percent [95 % interval], by the probability p that a row has a misaligned modality:\n")
    print(table[[rows for rows in ("all", "clean", "corrupted") if rows in table]].to_string())
    print(f"\nIn {out}:")
    for f in sorted(out.iterdir()): print(f"  {f.name:<20}{WHAT.get(f.name, '')}")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit("usage: python tools/demo.py FOLDER")
    main(Path(sys.argv[1]))
