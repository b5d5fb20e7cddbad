"""Carry the records of nbs/results over into digests: `python tools/migrate_records.py`. Run once, and removed by the next commit.

A record used to hold the settings that were given. What was not given was the default of the commit that ran it, so the defaults are read from that commit's source
(`git show`), and the specification that comes of it is complete. Of the gate, `kind` is now called `fit`. An option that did not exist at that commit has to have a
neutral value in `NEUTRAL`, the one that means what was done before there was a choice.
"""
import ast, json, math, subprocess, sys
from functools import cache
from pathlib import Path

import pandas as pd

from gated_symile.runs.record import COLUMNS
from gated_symile.runs.spec import label, NEUTRAL, RunSpec

ROOT = Path(__file__).resolve().parent.parent
FILES = {"ModalityGate": "gate", "MLP": "encoders", "fit": "training", "synthetic_xnor": "data/xnor", "corrupted_splits": "experiment", "_xnor_splits": "experiment",
         "PairwiseCLIP": "objectives/clip", "GRAM": "objectives/gram", "TRIANGLE": "objectives/triangle", "Symile": "objectives/symile",
         "GatedSymile": "objectives/gated", "SubsetSymile": "objectives/subset"}
GIVEN = {"p", "generator", "dim", "device", "seed", "progress", "kind"}
RENAMED = {"published": ("weak_start", {"published gate": "NULL, strength -3"})}


@cache
def defaults(commit, name):
    "Parameter -> default of a function or class, as that commit's source has it."
    source = subprocess.run(["git", "show", f"{commit}:gated_symile/{FILES[name]}.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    node = next(n for n in ast.walk(ast.parse(source)) if getattr(n, "name", None) == name)
    if isinstance(node, ast.ClassDef): node = next(n for n in node.body if getattr(n, "name", None) == "__init__")
    arguments = node.args.args[len(node.args.args) - len(node.args.defaults):]
    values = {a.arg: eval(ast.unparse(d), {"math": math}) for a, d in zip(arguments, node.args.defaults)}
    if name == "ModalityGate": values["fit"] = values["kind"]
    return {name: value for name, value in values.items() if name not in GIVEN}


def spec_of(parameters, objective, p, seed, commit):
    "The complete specification of a recorded run."
    given, bank = json.loads(parameters), 128 if json.loads(parameters)["data"] == "xnor" else None
    own = {("fit" if name == "kind" else name): value for name, value in given["objective_options"].get(objective, {}).items()}
    old = defaults(commit, objective) | (defaults(commit, "ModalityGate") if objective == "GatedSymile" else {})
    data = defaults(commit, "_xnor_splits") | defaults(commit, "synthetic_xnor") if given["data"] == "xnor" else defaults(commit, "corrupted_splits")
    training = defaults(commit, "fit") | {"bank_size": bank} | given["training_options"] | {n: given[n] for n in ("epochs", "learning_rate", "batch_size")}
    spec = RunSpec(given["data"], objective, p, seed, given["target"], given["queries"], given["dim"], given["learn_scale"], data | given["data_options"], old | own,
                   defaults(commit, "MLP") | given["encoder_options"], training)
    known = {"data_options": data, "objective_options": old, "encoder_options": defaults(commit, "MLP"), "training_options": training}
    for field, options in known.items():
        for name, value in getattr(spec, field).items():
            key = f"{field}.{objective}.{name}" if field == "objective_options" else f"{field}.{name}"
            if name not in options and not (name in own and field == "objective_options"):
                assert key in NEUTRAL and NEUTRAL[key] == value, f"{key} did not exist at {commit}, and {value!r} is not its neutral value"
    return spec


def main():
    for path in sorted((ROOT/"nbs"/"results").glob("*.parquet")):
        table = pd.read_parquet(path)
        if "digest" in table: continue
        stage, variants = RENAMED.get(path.stem, (path.stem, {}))
        keys = ["parameters", "objective", "p", "seed", "commit"]
        specs = {key: spec_of(*key) for key in table[keys].drop_duplicates().itertuples(index=False, name=None)}
        of_line = [specs[key] for key in table[keys].itertuples(index=False, name=None)]
        table = table.assign(stage=stage, variant=table["variant"].replace(variants), spec=[s.json for s in of_line], digest=[s.digest for s in of_line],
                             data=[label(s.data) for s in of_line])[COLUMNS]
        table.to_parquet(path.with_stem(stage), index=False, compression="zstd")
        if stage != path.stem: path.unlink()
        print(f"{stage}: {table.groupby(['variant', 'digest']).ngroups} runs, {table['digest'].nunique()} digests, {len(table)} lines")


if __name__ == "__main__": sys.exit(main())
