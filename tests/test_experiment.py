"The experiment template as its users run it: by papermill, with parameters, on data of their own."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gated_symile import GatedSymile, load_weights, MLP, ModalityGate, MultimodalModel

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT/"nbs"/"experiments"/"retrieval.ipynb"


def papermill(folder, *parameters):
    "Run the template in `folder`."
    return subprocess.run([sys.executable, "-m", "papermill", str(TEMPLATE), "executed.ipynb", "-k", "python3", "--no-progress-bar", *parameters],
                          cwd=folder, capture_output=True, text=True, timeout=300)


def tables_with_holes(folder, rows=90):
    "Three tables about the same patients, as people have them: odd names, holes, not everyone in each."
    rng = np.random.default_rng(0)
    hidden, ids = rng.normal(size=(rows, 6)), np.array([f"patient {i}" for i in range(rows)])
    for name, width, missing in (("image", 9, 0), ("blood test", 5, 12), ("text-note", 7, 20)):
        x = hidden @ rng.normal(size=(6, width)) + 0.1*rng.normal(size=(rows, width))
        x[rng.random(x.shape) < 0.02] = np.nan
        frame = pd.DataFrame(x, columns=[f"{name} #{i} (mg/l)" for i in range(width)]).assign(**{"Patient ID": ids})
        frame = frame.sample(rows - missing, random_state=1)
        frame.to_csv(folder/f"{name}.csv", index=False) if name == "image" else frame.to_parquet(folder/f"{name}.parquet", index=False)


def test_a_persons_own_tables_from_end_to_end(tmp_path):
    (tmp_path/"tables").mkdir()
    tables_with_holes(tmp_path/"tables")
    done = papermill(tmp_path, "-p", "data", "tables", "-p", "target", "image", "-y", "p: [0, 0.5]", "-y", "seeds: [0, 1]", "-p", "epochs", "2",
                     "-p", "dim", "8", "-p", "batch_size", "16", "-p", "out", "results/mine", "-y", "data_options: {id: Patient ID}",
                     "-y", "objectives: [Symile, GatedSymile]", "-y", "objective_options: {GatedSymile: {key_dim: 4, weighting: sigmoid}}")
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path/"results"/"mine"
    results = pd.read_parquet(out/"results.parquet")
    assert not results.duplicated(["objective", "p", "seed", "metric", "rows"]).any()
    assert set(results["objective"]) == {"Symile", "GatedSymile"} and set(results["p"]) == {0, 0.5} and set(results["seed"]) == {0, 1}
    assert {"all", "clean", "corrupted"} <= set(results["rows"]) <= {"all", "clean", "corrupted", "blood test", "text-note"}
    top1 = results[results["metric"] == "top1"]
    assert top1["value"].between(0, 1).all() and (top1["low"] <= top1["value"]).all() and (top1["value"] <= top1["high"]).all()
    assert json.loads(results["parameters"][0])["data_options"] == {"id": "Patient ID"} and len(results["commit"][0]) >= 7
    assert (out/"top1.png").read_bytes().startswith(b"\x89PNG") and (out/"top1.svg").stat().st_size > 1000
    model = MultimodalModel({n: MLP(w, 8, input_dropout=0.2) for n, w in (("image", 9), ("blood test", 5), ("text-note", 7))},
                            GatedSymile(ModalityGate(3, 8, key_dim=4, weighting="sigmoid")))
    about = load_weights(model, out/"weights"/"GatedSymile_p0.5_seed1.safetensors") # what was saved can be used
    assert about["seed"] == 1 and about["objective"] == "GatedSymile"
    text = (tmp_path/"executed.ipynb").read_text(encoding="utf-8")
    assert "the true one is ranked first for" in text and "image/png" in text


@pytest.mark.parametrize("parameters, words", [
    (["-p", "epoch", "3"], "parameter: 'epoch' is unknown.*did you mean 'epochs'"),
    (["-p", "p", "[0, 0.5]"], r"p must be a list of float.*-y 'p: \[...\]'"),
    (["-y", "p: [0, 1.5]"], r"p must lie in \[0, 1\], got 1.5"),
    (["-p", "target", "pixels"], "target: 'pixels' is unknown, expected one of 'pix'"),
    (["-p", "data", "nowhere.npz"], "nowhere.npz")])
def test_a_wrong_parameter_stops_at_once(tmp_path, parameters, words):
    import re
    done = papermill(tmp_path, *parameters)
    assert done.returncode != 0 and re.search(words, re.sub(r"\x1b\[[0-9;]*m", "", done.stderr), re.S), done.stderr[-2000:]
    assert not (tmp_path/"runs").exists()


def test_out_that_cannot_be_written_stops_before_training(tmp_path):
    (tmp_path/"file").touch()
    done = papermill(tmp_path, "-p", "out", "file/inside")
    assert done.returncode != 0 and "out: can't write to 'file/inside'" in done.stderr
