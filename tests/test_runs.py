"Runs from specification to record: identity, checks, what is kept; the templates as users run them, by papermill."
import json
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save

import gated_symile.objectives.base as objectives_base
import gated_symile.runs.plan as plan_module
import gated_symile.runs.record as record_module
import gated_symile.runs.run as run_module
import gated_symile.runs.spec as spec_module
from gated_symile import (audit, generator, load_tabular, MultimodalModel, retrieve,
                          DataError, DtypeError, MissingError, OutputError, RangeError, ShapeError, UnknownNameError)
from gated_symile.core import GatedSymileError
from gated_symile.objectives.base import registered
from gated_symile.runs.plan import collect, part_file, parts_to_do, Plan, planned, progress_table, run_part
from gated_symile.runs.record import (load_run, open_folder, rank_files, read_record, run_all, run_file, save_run,
                                      weights_file)
from gated_symile.runs.run import run_one, split_data
from gated_symile.runs.spec import label, make_specs, RunSpec
from templates import papermill, run_cells


def tables_with_holes(folder, rows=90):
    "Three tables about the same patients, as people have them: odd names, holes, not everyone in each."
    rng = np.random.default_rng(0)
    hidden, ids = rng.normal(size=(rows, 6)), np.array([f"patient {i}" for i in range(rows)])
    for name, width, missing in (("image", 9, 0), ("blood test", 5, 12), ("text-note", 7, 20)):
        x = hidden @ rng.normal(size=(6, width)) + 0.1*rng.normal(size=(rows, width))
        x[rng.random(x.shape) < 0.02] = np.nan
        frame = pd.DataFrame(x, columns=[f"{name} #{i} (mg/l)" for i in range(width)]).assign(**{"Patient ID": ids})
        frame = frame.sample(rows - missing, random_state=1)
        frame.to_csv(folder/f"{name}.csv",
                     index=False) if name == "image" else frame.to_parquet(folder/f"{name}.parquet", index=False)


def test_a_persons_own_tables_from_end_to_end(tmp_path):
    (tmp_path/"tables").mkdir()
    tables_with_holes(tmp_path/"tables")
    done = papermill("retrieval", tmp_path, "-p", "data", "tables", "-p", "target", "image", "-y", "p: [0, 0.5]", "-y",
                     "seeds: [0, 1]", "-p", "epochs", "2",
                     "-p", "dim", "8", "-p", "batch_size", "16", "-p", "out", "results/mine", "-y",
                     "data_options: {id: Patient ID}",
                     "-y", "objectives: [Symile, GatedSymile]", "-y",
                     "objective_options: {GatedSymile: {key_dim: 4, weighting: sigmoid}}")
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path/"results"/"mine"
    results = pd.read_parquet(out/"results.parquet")
    assert not results.duplicated(["objective", "p", "seed", "metric", "rows"]).any()
    assert set(results["objective"]) == {"Symile", "GatedSymile"} and set(results["p"]) == {0, 0.5}
    assert set(results["seed"]) == {0, 1}
    assert {"all", "clean", "corrupted"} <= set(results["rows"]) <= {"training", "all", "clean", "corrupted",
                                                                     "blood test", "text-note"}
    top1 = results[results["metric"] == "top1"]
    assert top1["value"].between(0, 1).all() and (top1["low"] <= top1["value"]).all()
    assert (top1["value"] <= top1["high"]).all()
    assert json.loads(results["spec"][0])["data_options"]["id"] == "Patient ID" and len(results["commit"][0]) >= 7
    assert (out/"top1.png").read_bytes().startswith(b"\x89PNG") and (out/"top1.svg").stat().st_size > 1000
    # what was saved can be used
    saved = load_run(next((out/"weights").glob("GatedSymile_p0.5_seed1_*.safetensors")))
    assert saved.model.objective.gate.settings()["weighting"] == "sigmoid" and saved.about["spec"]["seed"] == 1
    text = (tmp_path/"executed.ipynb").read_text(encoding="utf-8")
    assert "the true one is ranked first for" in text and "image/png" in text
    assert "is ahead" not in re.sub("is ahead of", "", text)


@pytest.mark.parametrize("parameters, words", [
    (dict(p="[0, 0.5]"), r"p must be a list of float.*-y 'p: \[...\]'"),
    (dict(p=[0, 1.5]), r"p must lie in \[0, 1\], got 1.5"),
    (dict(target="pixels"), "target: 'pixels' is unknown, expected one of 'pix'"),
    (dict(data="nowhere.npz"), "nowhere.npz")])
def test_a_wrong_parameter_is_named(parameters, words):
    with pytest.raises((GatedSymileError, FileNotFoundError), match=words): make_specs(**parameters)


def test_a_wrong_parameter_stops_a_template_at_once(tmp_path):
    done = papermill("retrieval", tmp_path, "-p", "epoch", "3")
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)
    assert done.returncode != 0 and re.search("parameter: 'epoch' is unknown.*did you mean 'epochs'", said,
                                              re.S), said[-2000:]
    assert not (tmp_path/"runs").exists()


def test_out_that_cannot_be_written_stops_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "run_one", lambda *args: pytest.fail("something ran"))
    monkeypatch.chdir(tmp_path)
    (tmp_path/"file").touch()
    with pytest.raises(OutputError, match="out: can't write to 'file/inside'"):
        run_cells("retrieval", out="file/inside")


def test_one_folder_for_many_at_a_time(tmp_path):
    "Whoever looks whether it can be written to is in nobody's way, and leaves nothing behind."
    with ThreadPoolExecutor(8) as pool: assert set(pool.map(open_folder, [tmp_path/"out"]*400)) == {tmp_path/"out"}
    assert list((tmp_path/"out").iterdir()) == []


@pytest.mark.parametrize("settings, error, match", [
    (dict(dim=12.5), DtypeError, "dim must be a whole number, got 12.5"),
    (dict(epochs=1.5), DtypeError, "epochs must be a whole number"),
    (dict(batch_size=64.), DtypeError, "batch_size must be a whole number"),
    (dict(batch_size=1), RangeError, "batch_size"),
    (dict(epochs=True), DtypeError, "epochs"),
    (dict(training_options={"clip": print}), DtypeError, "training_options: clip must be of numbers"),
    (dict(training_options={"clip": -1}), RangeError, "clip must lie in"),
    (dict(training_options={"patience": "x"}), DtypeError, "patience must be a whole number, got 'x'"),
    (dict(training_options={"bank_size": 1}), RangeError, "bank_size must lie in"),
    (dict(training_options={"precision": "f8"}), UnknownNameError, "precision: 'f8' is unknown.* 'bfloat16'"),
    (dict(learn_scale="no"), DtypeError, "learn_scale must be True or False, got 'no'"),
    (dict(data_options={"corruption": "swpa"}), UnknownNameError, "corruption: 'swpa' is unknown.*mean 'swap'"),
    (dict(data="xnor", data_options={"corruption": "swpa"}), UnknownNameError, "corruption: 'swpa' is unknown"),
    (dict(data="xnor", data_options={"signal": "half"}), UnknownNameError, "signal: 'half' is unknown"),
    (dict(data="xnor", data_options={"rows": 0}), RangeError, "rows must lie in"),
    (dict(seeds=[0, 0]), DataError, "seeds: 0 comes twice"), (dict(p=[0, 0.]), DataError, "p: 0 comes twice"),
    (dict(objectives=["Symile", "Symile"]), DataError, "objectives: 'Symile' comes twice")])
def test_a_wrong_setting_stops_before_anything_runs(settings, error, match):
    with pytest.raises(error, match=match): make_specs(**settings)


@pytest.mark.parametrize("name", ["clean", "NULL"])
def test_a_table_called_like_something_else_stops_before_training(tables, tmp_path, name):
    quietly(shutil.copytree, tables, tmp_path/"tables")
    path = next(path for path in (tmp_path/"tables").iterdir() if path.stem != "image")
    path.rename(path.with_stem(name))
    with pytest.raises(UnknownNameError, match=f"modality: '{name}' means something else"):
        quietly(make_specs, data=str(tmp_path/"tables"), **SMALL)


# Saved runs: from the file back to a model, and on to new rows

SMALL = dict(target="image", dim=8, epochs=1, batch_size=16, data_options={"id": "Patient ID"})
OPTIONS = {"GatedSymile": [{}, {"neutral": "random", "null": True}, {"fit": "matrix", "key_dim": 4}],
           "Symile": [{}, {"negatives": "all", "log_scale": 1.}]}
CASES = [(name, options) for name in registered() for options in OPTIONS.get(name, [{}])]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    "A person's tables, with holes."
    folder = tmp_path_factory.mktemp("tables")
    tables_with_holes(folder)
    return folder


@pytest.fixture(scope="module")
def a_run(tables, tmp_path_factory):
    "A run on them, what was saved of it, and its test rows."
    out = tmp_path_factory.mktemp("out")
    spec = quietly(make_specs, data=str(tables), objectives="SubsetSymile", p=0., **SMALL)[0]
    quietly(save_run, run := quietly(run_one, spec), out)
    return run, weights_file(out, spec), run.rows


def quietly(f, *args, **kwargs):
    "The result of a call whose warnings are known."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **kwargs)


def changed(tables, folder, name, change):
    "The tables, one of them changed."
    folder.mkdir()
    for path in tables.iterdir():
        frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        if path.stem == name: frame = change(frame)
        if frame is not None: frame.to_parquet(folder/f"{path.stem}.parquet", index=False)
    return folder


@pytest.mark.parametrize("objective, options", CASES)
def test_a_saved_run_scores_new_rows_as_before(objective, options, tables, tmp_path):
    "Bit for bit: the same weights, and the same standardised rows made of the files."
    spec = quietly(make_specs, data=str(tables), objectives=objective, p=0.5, seeds=3,
                   objective_options={objective: options} if options else {},
                   encoder_options={"input_dropout": 0.3, "depth": 2, "norm": False, "width": 16},
                   **{**SMALL, "epochs": 2})[0]
    save_run(run := quietly(run_one, spec), tmp_path)
    saved, test = load_run(weights_file(tmp_path, spec)), quietly(split_data, replace(spec, p=0.))[2]
    assert saved.model.names == run.model.names and not saved.model.training
    assert saved.about["spec"] == json.loads(spec.json) and saved.about["versions"]["torch"]
    for name, x in run.model.state_dict().items(): assert torch.equal(x, saved.model.state_dict()[name])
    everyone = quietly(saved.read, tables)
    rows = everyone[[everyone.ids.index(i) for i in test.ids]]
    for name in test.names:
        assert torch.equal(rows.modalities[name].nan_to_num(7e7), test.modalities[name].nan_to_num(7e7))
    assert (rows.present is None and test.present is None) or torch.equal(rows.select(test.names).present, test.present)
    for target in range(3):
        keep = (test.present if test.present is not None
                else torch.ones(len(test), 3).bool())[:, [m for m in range(3) if m != target]].any(1)
        before, after = (quietly(lambda: m.score(m.embed(x[keep]), target,
                                                 None if x.present is None else x[keep].select(test.names).present))
                         for m, x in ((run.model, test), (saved.model, rows)))
        assert torch.equal(before, after)


def test_loading_leaves_random_numbers_alone(a_run):
    state = torch.get_rng_state()
    load_run(a_run[1])
    assert torch.equal(state, torch.get_rng_state())


def test_a_moved_file_needs_nothing_else(tables, tmp_path):
    "The tables it was trained on may be gone."
    (tmp_path/"old").mkdir()
    tables_with_holes(tmp_path/"old")
    spec = quietly(make_specs, data=str(tmp_path/"old"), objectives="Symile", p=0., **SMALL)[0]
    quietly(run_all, [spec], tmp_path/"out", progress=False)
    weights_file(tmp_path/"out", spec).rename(tmp_path/"mine.safetensors")
    for path in [*(tmp_path/"old").iterdir(), *(tmp_path/"out").rglob("*.*")]: path.unlink()
    (tmp_path/"old").rmdir()
    saved = load_run(tmp_path/"mine.safetensors")
    assert saved.target == "image" and saved.queries == ["blood test", "text-note"]
    assert len(quietly(saved.read, tables)) == 90


def test_no_row_and_no_id_is_in_the_file(a_run, tables):
    "Rows of patients stay where they are."
    assert b"patient" not in a_run[1].read_bytes().replace(b"Patient ID", b"").lower()


def test_new_rows_with_holes(a_run, tables, tmp_path):
    "A modality missing in a row is absent, a cell is the training mean, and a row of nothing is left out aloud."
    saved = load_run(a_run[1])
    def holes(frame):
        frame = frame.set_index("Patient ID")
        frame.loc["patient 1"] = np.nan
        frame.loc["patient 2", frame.columns[0]] = np.nan
        return frame.drop(index=[i for i in ["patient 3"] if i in frame.index]).reset_index()
    folder = changed(tables, tmp_path/"new", "image", holes)
    with pytest.warns(UserWarning) as caught: images = saved.read(folder, "image")
    assert "patient 1" not in images.ids and "patient 3" not in images.ids and len(images) == 88
    assert any("1 of 89 rows hold nothing and are left out: patient 1" in str(w.message) for w in caught)
    # the model fills it with its mean
    assert images.modalities["image"][images.ids.index("patient 2"), 0].isnan()
    rows = quietly(saved.read, folder)
    assert not rows.is_present("image")[rows.ids.index("patient 3")]
    ranked = quietly(retrieve, saved.model, rows.select(saved.queries)[rows.select(saved.queries).present.any(1)],
                     images, "image", k=3, progress=False)
    assert set(ranked["candidate"]) <= set(images.ids) and ranked["score"].notna().all()
    table = quietly(lambda: audit(saved.model, saved.read(tables), "image", generator=generator(0)))
    assert set(table["modality"]) == {"blood test", "text-note"} and (table["n"] > 0).all()


def test_ids_under_another_name(a_run, tables, tmp_path):
    folder = changed(tables, tmp_path/"new", "image", lambda frame: frame.rename(columns={"Patient ID": "code"}))
    assert len(quietly(load_run(a_run[1]).read, folder, "image", id="code")) == 90
    with pytest.raises(DataError, match="no id column 'Patient ID'"): load_run(a_run[1]).read(folder, "image")


FITS_NOT = {
    "a table is gone": (lambda f: None, MissingError,
                        "lacks a modality of 'image', 'blood test', 'text-note' .*'blood test' is unknown"),
    "a column less": (lambda f: f.drop(columns="blood test #2 (mg/l)"), ShapeError,
                      r"'blood test' has 5 columns in train but 4 here: lacks \['blood test #2"),
    "a column more": (lambda f: f.assign(extra=1.), ShapeError,
                      r"5 columns in train but 6 here: has instead \['extra'\]"),
    "another name": (lambda f: f.rename(columns={"blood test #2 (mg/l)": "x"}), DataError,
                     r"lacks \['blood test #2 \(mg/l\)'\], has instead \['x'\]"),
    "another order": (lambda f: f[[*f.columns[1::-1], *f.columns[2:]]], DataError,
                      "other order, first 'blood test #1 .* where there was 'blood test #0"),
    "text": (lambda f: f.assign(**{"blood test #2 (mg/l)": "low"}), DtypeError,
             "blood test.parquet: 1 columns hold no numbers"),
}


@pytest.mark.parametrize("what", FITS_NOT)
def test_new_files_that_do_not_fit(what, a_run, tables, tmp_path):
    change, error, words = FITS_NOT[what]
    folder = changed(tables, tmp_path/"new", "blood test", change)
    with pytest.raises(error, match=words): quietly(load_run(a_run[1]).read, folder)
    # what isn't asked for does not matter
    assert quietly(load_run(a_run[1]).read, folder, ["image", "text-note"]).names == ["image", "text-note"]


def test_arrays_without_names_have_to_fit_in_number(a_run, tmp_path):
    saved = load_run(a_run[1])
    np.savez(tmp_path/"new.npz", **{"image": np.ones((4, 9)), "blood test": np.ones((4, 5))})
    assert saved.read(tmp_path/"new.npz", ["blood test", "image"]).names == ["blood test", "image"]
    with pytest.raises(MissingError, match="'text-note' is unknown"): saved.read(tmp_path/"new.npz")
    np.savez(tmp_path/"new.npz", image=np.ones((4, 8)))
    with pytest.raises(ShapeError, match="'image' has 9 columns in train but 8 here$"):
        saved.read(tmp_path/"new.npz", "image")


def test_rows_standardised_already_are_refused(a_run, tables):
    saved, rows = load_run(a_run[1]), quietly(load_tabular, tables, id="Patient ID")
    once = replace(rows, modalities={name: (saved.model.standardiser(name, x) - 0).where(~x.isnan(), torch.nan)
                                     for name, x in rows.modalities.items()}, columns=None)
    assert len(quietly(saved.model.embed, rows)) == 3
    if not any("image #0" in c for c in (rows.columns or {}).get("image", [])): pytest.skip("no names")
    with pytest.raises(ShapeError, match="'image' has 9 columns in train but 5 here"):
        saved.model.embed(replace(once, modalities={**once.modalities, "image": once.modalities["blood test"]}))


def test_one_table_is_nothing_to_find_it_by(tables):
    with pytest.raises(MissingError, match="nothing to find 'image' by"):
        make_specs(data=[str(tables/"image.csv")], target="image", data_options={"id": "Patient ID"})


def test_xnor_rows_are_used_as_they_are(tmp_path):
    spec = make_specs("xnor", objectives="Symile", p=0., epochs=1, dim=8, data_options={"rows": 1300})[0]
    save_run(run := run_one(spec), tmp_path)
    assert run.model.standardiser is None and load_run(weights_file(tmp_path, spec)).model.standardiser is None


def test_a_file_that_is_no_run(a_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"): load_run(tmp_path/"nothing.safetensors")
    (tmp_path/"x.safetensors").write_bytes(save({"x": torch.ones(2)}))
    with pytest.raises(DataError, match="no model's `save` wrote it"): load_run(tmp_path/"x.safetensors")
    a_run[0].model.save(tmp_path/"x.safetensors")
    with pytest.raises(DataError, match="but no run: spec, digest lacking"): load_run(tmp_path/"x.safetensors")
    whole = a_run[1].read_bytes()
    for part in (b"", whole[:100], whole[:-1]):
        (tmp_path/"x.safetensors").write_bytes(part)
        with pytest.raises(DataError, match="not a whole safetensors file"): load_run(tmp_path/"x.safetensors")


def test_ranking_files_without_python(a_run, tables, tmp_path):
    "The template for ranking, on queries that have no target and a bank of its own."
    for name in ("blood test", "text-note"):
        (tmp_path/"new").mkdir(exist_ok=True)
        shutil.copy(tables/f"{name}.parquet", tmp_path/"new")
    done = papermill("rank", tmp_path, "-p", "weights", str(a_run[1]), "-p", "data", "new", "-p", "bank", str(tables),
                     "-p", "k", "3", "-p", "out", "ranked")
    assert done.returncode == 0, done.stderr[-3000:]
    ranked, saved = pd.read_parquet(tmp_path/"ranked"/"ranked.parquet"), load_run(a_run[1])
    queries = quietly(saved.read, tmp_path/"new", saved.queries)
    expected = quietly(retrieve, saved.model, queries, quietly(saved.read, tables, "image"), "image", k=3,
                       progress=False)
    pd.testing.assert_frame_equal(ranked, expected)
    assert len(pd.read_csv(tmp_path/"ranked"/"ranked.csv")) == 3*len(queries)
    # nothing to be found
    with pytest.raises(MissingError, match="'image' is unknown"):
        quietly(rank_files, a_run[1], tmp_path/"new", out=tmp_path/"again")
    with pytest.raises(MissingError, match="give the file of weights"): rank_files(None, tmp_path/"new")
    with pytest.raises(OutputError, match="can't write"):
        rank_files(a_run[1], tmp_path/"new", out=tmp_path/"executed.ipynb")
    with pytest.raises(OutputError, match="is where the data are"):
        quietly(rank_files, a_run[1], tables, out=tables/"ranked")


# Identity: the same settings, and only those, are the same run

# of GatedSymile on mfeat at p = 0.5, all else as the library had it when runs were first recorded
DIGEST = "b3f57a8ebf9ccf5afde7f6b2abe2e67abe6a134272b39db9c6875806e17c30bb"
# of Symile on two tables of three rows, before they could be read by more than an id
OWN_DIGEST = "773b48b35845ceaeaa5165b5f66eef32bb09d7cdc00edca4c5fa6fed5367d515"


def spec(**settings): return RunSpec(**{"data": "mfeat", "objective": "GatedSymile", **settings})


@pytest.mark.parametrize("changes", [
    dict(p=0.1234567), dict(p=0.1234568), dict(seed=1), dict(dim=64), dict(objective="Symile"), dict(data="xnor"),
    dict(target="zer"), dict(queries=["fou"]),
    dict(queries=["zer", "fou"]), dict(learn_scale=False), dict(training_options={"patience": None}),
    dict(training_options={"learning_rate": 5.00000001e-3}),
    dict(objective_options={"strength": 2.9999999}), dict(encoder_options={"input_dropout": 0.2}),
    dict(data_options={"corruption": "missing"}), dict(encoder="MLP")])
def test_whatever_changes_a_run_changes_its_digest(changes):
    assert spec(**changes).digest != spec().digest
    assert spec(**changes).digest != spec(p=0.12345).digest


def test_a_digest_is_what_it_was(tmp_path):
    """Changing what it is made of would un-record every run: it needs another `VERSION`, and the records carried over.
    A default that has changed since is spelt out: what it was, is still that run."""
    before = dict(epochs=60, learning_rate=1e-3, patience=10)
    assert spec(p=0.5, encoder_options={"input_dropout": 0.3}, training_options=before).digest == DIGEST
    (tmp_path/"a.csv").write_text("id,x,y\n1,0.5,1\n2,1.5,0\n3,2.5,2\n")
    (tmp_path/"b.csv").write_text("id,z\n1,3\n2,1\n4,2\n")
    own = RunSpec(str(tmp_path), "Symile", target="a", encoder_options={"input_dropout": 0.3}, training_options=before)
    assert own.digest == OWN_DIGEST
    same = dict(join="union", categories=None, id_maps=None)
    assert replace(own, data_options=same).digest == OWN_DIGEST


def tables_of_words(folder, rows=60):
    "Tables with a column of words, ids of their own in one of them, a map, and people who aren't everywhere."
    rng, ids = np.random.default_rng(0), np.arange(rows)
    hidden = rng.normal(size=rows)
    folder.mkdir()
    scan = pd.DataFrame({"id": 1000 + ids, "left": hidden, "right": hidden + 0.1*rng.normal(size=rows)})
    blood = pd.DataFrame({"id": ids, "iron": hidden + 0.1*rng.normal(size=rows), "sex": np.where(hidden > 0, "f", "m")})
    scan.to_csv(folder/"scan.csv", index=False)
    blood[5:].to_csv(folder/"blood.csv", index=False)
    pd.DataFrame({"id": ids, "age": hidden})[:40].to_csv(folder/"age.csv", index=False)
    pd.DataFrame({"scan": 1000 + ids, "id": ids}).to_csv(folder.parent/"who.csv", index=False)
    return dict(categories={"sex": ["f", "m"]}, id_maps={"scan": str(folder.parent/"who.csv")})


def of_words(folder, **options):
    return RunSpec(str(folder), "LinearGaussian", target="scan", queries=["blood"], data_options=options)


def test_how_a_persons_tables_are_read_is_part_of_a_run(tmp_path):
    options = tables_of_words(tmp_path/"a")
    both = of_words(tmp_path/"a", **options)
    train, *rest = quietly(split_data, both)
    assert train.columns["blood"] == ["iron", "sex=f", "sex=m"] and len(train) + sum(map(len, rest)) == 60
    whole = of_words(tmp_path/"a", join="intersect", **options)            # of scan and blood, without age
    with pytest.warns(UserWarning, match="join: 5 of 60 rows left out"): parts = split_data(whole)
    assert sum(map(len, parts)) == 55 and all(part.present is None for part in parts)
    wider = replace(both, data_options={**options, "categories": {"sex": ["f", "m", "x"]}})
    assert len({run.digest for run in (both, whole, wider)}) == 3
    for name, wrong, error, said in (
            ("categories", 3, DtypeError, "must be 'one-hot', or a dict"),
            ("categories", None, DtypeError, "retrieval template takes either in data_options"),
            ("id_maps", "who.csv", DtypeError, "must be a dict from modalities to paths of tables"),
            ("id_maps", {"scna": "x.csv"}, UnknownNameError, "did you mean 'scan'"),
            ("id_maps", {"scan": "nowhere.csv"}, FileNotFoundError, "nowhere.csv"),
            ("join", "inner", UnknownNameError, "expected one of 'union', 'intersect'")):
        with pytest.raises(error, match=said): of_words(tmp_path/"a", **{**options, name: wrong})
    with pytest.raises(UnknownNameError, match="categories"): RunSpec("mfeat", "Symile", data_options=options)


def test_an_id_map_counts_by_its_content(tmp_path):
    options = tables_of_words(tmp_path/"a")
    before, path = of_words(tmp_path/"a", **options), tmp_path/"who.csv"
    shutil.copy(path, tmp_path/"copy.csv")
    elsewhere = {**options, "id_maps": {"scan": str(tmp_path/"copy.csv")}}
    assert of_words(tmp_path/"a", **elsewhere).digest == before.digest
    pd.read_csv(path).assign(id=lambda table: table["id"].to_numpy()[::-1]).to_csv(path, index=False)
    assert of_words(tmp_path/"a", **options).digest != before.digest
    with pytest.raises(DataError, match="has changed since the specification was made"): split_data(before)


def test_new_tables_are_read_as_in_training(tmp_path):
    options = tables_of_words(tmp_path/"a")
    quietly(run_all, [spec := of_words(tmp_path/"a", **options)], tmp_path/"out", progress=False)
    saved = load_run(weights_file(tmp_path/"out", spec))
    rows = quietly(saved.read, tmp_path/"a", id_maps=options["id_maps"])
    assert len(rows) == 60 and rows.columns["blood"] == ["iron", "sex=f", "sex=m"]
    assert len(saved.read(tmp_path/"a", "scan")) == 60                     # no word in it, and ids as they are
    assert len(saved.read(tmp_path/"a", "blood", id_maps=options["id_maps"])) == 55
    with pytest.raises(UnknownNameError, match="id_maps: 'scam'"): saved.read(tmp_path/"a", id_maps={"scam": "x"})
    ranked = quietly(rank_files, weights_file(tmp_path/"out", spec), tmp_path/"a", id_maps=options["id_maps"], k=1,
                     out=tmp_path/"ranked")
    assert set(ranked["query"]) == set(map(str, range(5, 60))) and ranked["candidate"].astype(int).max() < 60
    pd.read_csv(tmp_path/"a"/"blood.csv").drop(columns="sex").to_csv(tmp_path/"a"/"blood.csv", index=False)
    with pytest.raises(UnknownNameError, match="categories: 'sex' is unknown"): saved.read(tmp_path/"a", "blood")


def test_a_changed_default_is_another_run(monkeypatch):
    by_mlp = partial(spec, encoder="MLP")
    before = by_mlp()
    class MLP(spec_module.ENCODERS["MLP"]):
        def __init__(self, in_features, dim, width=128, depth=1, norm=True, dropout=0., input_dropout=0.):
            super().__init__(in_features, dim, width, depth, norm, dropout, input_dropout)
    monkeypatch.setitem(spec_module.ENCODERS, "MLP", MLP)
    assert by_mlp().digest != before.digest
    assert by_mlp(encoder_options={"width": 256}).digest == before.digest
    monkeypatch.undo()
    gate = registered()["GatedSymile"]
    monkeypatch.setattr(gate, "options", classmethod(lambda cls, known=gate.options(): {**known, "strength": 2.}))
    assert by_mlp().digest != before.digest and by_mlp(objective_options={"strength": 3.}).digest == before.digest


def test_a_new_option_with_its_old_meaning_is_the_same_run(monkeypatch):
    "Told by its neutral value; without one it is another run."
    by_mlp = partial(spec, encoder="MLP")
    before = by_mlp()
    class MLP(spec_module.ENCODERS["MLP"]):
        def __init__(self, in_features, dim, width=256, depth=1, norm=True, dropout=0., input_dropout=0., heads=None):
            super().__init__(in_features, dim, width, depth, norm, dropout, input_dropout)
    monkeypatch.setitem(spec_module.ENCODERS, "MLP", MLP)
    assert by_mlp().digest != before.digest
    monkeypatch.setitem(spec_module.NEUTRAL, "encoder_options.heads", None)
    assert by_mlp().digest == before.digest
    assert by_mlp(encoder_options={"heads": 2}).digest != before.digest


def test_a_new_field_with_its_old_meaning_is_the_same_run(monkeypatch):
    @dataclass(frozen=True)
    class Later(RunSpec):
        fold: int = 0
        __hash__ = RunSpec.__hash__
    later = lambda **more: Later(data="mfeat", objective="GatedSymile", **more)
    assert later().digest != spec().digest
    monkeypatch.setitem(spec_module.NEUTRAL, "fold", 0)
    assert later().digest == spec().digest and later(fold=1).digest != spec().digest


def test_settings_of_every_make(tmp_path):
    "NumPy's numbers, paths, devices, ranges and tuples are the same settings."
    plain = make_specs(dim=8, epochs=1, learning_rate=0.5, seeds=[0, 1], p=[0.5], queries=["fou", "zer"],
                       objectives="Symile")
    other = make_specs(dim=np.int64(8), epochs=np.int32(1), learning_rate=np.float32(0.5), seeds=range(2),
                       p=np.array([0.5]), queries=("fou", "zer"), objectives=("Symile",))
    assert [s.digest for s in plain] == [s.digest for s in other]
    results = run_all(other[:1], out=tmp_path/"out", device=torch.device("cpu"), progress=False)
    assert set(results["digest"]) == {plain[0].digest} and weights_file(str(tmp_path/"out"), plain[0]).is_file()


def plan_on(data, **stages):
    "A plan with a tuning nobody runs."
    common = dict(objectives=["Symile"], data=[data], p=[0.5], tuned=False,
                  settings={label(data): {"target": "image", "dim": 8, "epochs": 1, "batch_size": 16,
                                          "data_options.id": "Patient ID"}})
    return Plan.load(dict(space={}, stages={"tuning": {**common, "seeds": [100], "draws": 1},
                                            **{name: {**common, "seeds": [0], **stage}
                                               for name, stage in stages.items()}}))


def test_variants_whose_names_look_alike_are_runs_of_their_own(tables, tmp_path):
    variants = {"low rate": {"learning_rate": 1e-4}, "low_rate": {"learning_rate": 1e-3},
                "low_rate again": {"learning_rate": 1e-3}}
    plan = plan_on(str(tables), study=dict(variants=variants, p=[0.1234567, 0.1234568]))
    table = quietly(run_part, plan, "study", str(tables), "Symile", tmp_path/"out", tmp_path/"record", progress=False)
    # equal settings are one run, under both names
    assert table.groupby(["variant", "p"]).ngroups == 6 and table["digest"].nunique() == 4
    assert len(list((tmp_path/"out"/"runs").iterdir())) == 4
    with pytest.raises(DataError, match="seeds: 0 comes twice"): plan_on(str(tables), study=dict(seeds=[0, 0]))


# A person's data stay as they are

def test_nothing_is_written_beside_a_persons_data(tables, tmp_path):
    "A sweep on an absolute path: everything goes into `out`, and nothing in it is called like the data."
    quietly(shutil.copytree, tables, tmp_path/"my data")
    data, where = str(tmp_path/"my data"), dict(out=tmp_path/"out", record=tmp_path/"record")
    before = {path: path.read_bytes() for path in (tmp_path/"my data").rglob("*")}
    plan = plan_on(data, study={})
    table = quietly(run_part, plan, "study", data, "Symile", **where, progress=False)
    quietly(collect, plan, "study", **where)
    (tmp_path/"my data"/"Symile.parquet").write_bytes((tmp_path/"my data"/"text-note.parquet").read_bytes())
    (tmp_path/"my data"/"Symile.parquet").rename(tmp_path/"kept.parquet")
    assert quietly(parts_to_do, plan, "study", **where) == []
    assert {path: path.read_bytes() for path in (tmp_path/"my data").rglob("*")} == before
    assert len(table) and not any("my data" in str(path.relative_to(tmp_path)) for path in (tmp_path/"out").rglob("*"))
    for bad in (data, f"{data}/results"):
        for call in (lambda: run_part(plan, "study", data, "Symile", bad, tmp_path/"record"),
                     lambda: parts_to_do(plan, "study", bad, tmp_path/"record"),
                     lambda: collect(plan, "study", tmp_path/"out", bad),
                     lambda: run_all(quietly(make_specs, data=data, **SMALL), bad)):
            with pytest.raises(OutputError, match="is where the data are"): quietly(call)
    assert {path: path.read_bytes() for path in (tmp_path/"my data").rglob("*")} == before


def test_a_persons_tables_are_read_once(tables, tmp_path, monkeypatch):
    "However many runs are planned on them; and again when they have changed."
    quietly(shutil.copytree, tables, tmp_path/"tables")
    reads = []
    monkeypatch.setattr(spec_module, "load_tabular", lambda *args,
                        **kwargs: reads.append(args) or load_tabular(*args, **kwargs))
    plan = plan_on(str(tmp_path/"tables"), study=dict(seeds=range(9), p=[0, 0.5, 1]))
    standing = quietly(progress_table, plan, tmp_path)
    assert standing["planned"].tolist() == [1, 27] and len(reads) == 1
    digest = lambda: quietly(make_specs, data=str(tmp_path/"tables"), objectives="Symile", p=0., **SMALL)[0].digest
    before = digest()
    frame = pd.read_csv(tmp_path/"tables"/"image.csv")
    frame.assign(**{frame.columns[0]: 0.}).to_csv(tmp_path/"tables"/"image.csv", index=False)
    assert digest() != before and len(reads) == 2


def test_the_same_tables_elsewhere_are_the_same_run(tables, tmp_path):
    quietly(shutil.copytree, tables, tmp_path/"elsewhere")
    a, b = (quietly(make_specs, data=str(where), objectives="Symile", p=0., **SMALL)[0]
            for where in (tables, tmp_path/"elsewhere"))
    assert a.digest == b.digest and a.data != b.data


def test_a_list_of_tables_is_a_data_set_of_a_plan(tables, tmp_path):
    data = [str(tables/"image.csv"), str(tables/"text-note.parquet")]
    plan, where = plan_on(data, study={}), dict(out=tmp_path/"out", record=tmp_path/"record")
    assert plan.stages["study"].pairs == [(label(data), "Symile")]
    for name in (data, label(data)):
        assert len(quietly(run_part, plan, "study", name, "Symile", **where, progress=False))
    assert set(quietly(collect, plan, "study", **where)["data"]) == {label(data)}
    assert len(list((tmp_path/"out"/"runs").iterdir())) == 1


def test_data_that_change_before_the_run_are_refused(tables, tmp_path, monkeypatch):
    "Before the training, and between its rows and those that give the scale."
    quietly(shutil.copytree, tables, tmp_path/"tables")
    spec = quietly(make_specs, data=str(tmp_path/"tables"), objectives="Symile", p=0.5, **SMALL)[0]
    frame, really = pd.read_csv(tmp_path/"tables"/"image.csv"), run_module.make_model
    change = lambda x: frame.assign(**{frame.columns[0]: x}).to_csv(tmp_path/"tables"/"image.csv", index=False)
    monkeypatch.setattr(run_module, "make_model", lambda *args: change(1.) or really(*args))
    with pytest.raises(DataError, match="data: .*tables has changed since the specification"): quietly(run_one, spec)
    monkeypatch.undo()
    with pytest.raises(DataError, match="has changed since"): quietly(run_all, [spec], tmp_path/"out", progress=False)
    assert not (tmp_path/"out"/"weights").exists()


def test_a_persons_own_table_is_not_overwritten(tables, tmp_path, monkeypatch):
    "Whatever it is, if it is called as results are; and where data are links, not at their other end either."
    monkeypatch.setattr(record_module, "run_one", lambda *args: pytest.fail("something ran"))
    for name in ("real", "links", "out"): (tmp_path/name).mkdir()
    for path in tables.iterdir():
        to = tmp_path/"real"/("results.parquet" if path.stem == "text-note" else path.name)
        shutil.copy(path, to)
        (tmp_path/"links"/path.name).symlink_to(to)
    shutil.copy(tables/"text-note.parquet", tmp_path/"out"/"results.parquet")
    before = (tmp_path/"out"/"results.parquet").read_bytes()
    folder = quietly(make_specs, data=str(tmp_path/"links"), objectives="Symile", p=0., **SMALL)
    files = [str(tmp_path/"links"/path.name) for path in tables.iterdir()]
    single = quietly(make_specs, data=files, objectives="Symile", p=0., **SMALL)
    for specs in (folder, single):
        with pytest.raises(OutputError, match="is no record"): run_all(specs, tmp_path/"out", progress=False)
        for bad in ("real", "links"):
            with pytest.raises(OutputError, match="is where the data are"): run_all(specs, tmp_path/bad, progress=False)
    assert (tmp_path/"out"/"results.parquet").read_bytes() == before
    with pytest.raises(MissingError, match="specs: there is nothing to run"): run_all([], tmp_path/"none")
    assert not (tmp_path/"none").exists()


# What is finished, and what is not

def test_an_interrupted_training_is_no_run(tmp_path, monkeypatch):
    "Ctrl-C in the second of three: the first is kept, the second is not recorded, and a later call runs the rest."
    specs, trained = make_specs(objectives=["PairwiseCLIP", "Symile", "GRAM"], p=0., epochs=2, dim=8), []
    really = run_module.fit
    def fit(model, *args, **kwargs):
        trained.append(type(model.objective).__name__)
        if len(trained) == 2:
            def interrupt(line): raise KeyboardInterrupt
            kwargs["callbacks"] = [interrupt]
        return really(model, *args, **kwargs)
    monkeypatch.setattr(run_module, "fit", fit)
    with pytest.raises(KeyboardInterrupt): quietly(run_all, specs, tmp_path, progress=False)
    assert set(read_record(tmp_path/"results.parquet")["objective"]) == {"PairwiseCLIP"}
    assert len(list((tmp_path/"weights").iterdir())) == 1
    results = run_all(specs, tmp_path, progress=False)
    assert trained == ["PairwiseCLIP", "Symile", "Symile", "GRAM"]
    assert results["objective"].unique().tolist() == ["PairwiseCLIP", "Symile", "GRAM"]


def test_a_damaged_file_is_run_again(tmp_path):
    spec, = make_specs(objectives="Symile", p=0., epochs=1, dim=8)
    results = run_all([spec], tmp_path, progress=False)
    weights, lines = weights_file(tmp_path, spec), run_file(tmp_path, spec)
    whole = weights.read_bytes()
    for file, content in ((weights, b""), (weights, whole[:-1]), (weights, whole[:100]), (lines, b""),
                          (lines, lines.read_bytes()[:-9])):
        file.write_bytes(content)
        with pytest.warns(UserWarning, match=f"{re.escape(file.name)}.*; it counts as not run"):
            again = run_all([spec], tmp_path, progress=False)
        assert len(load_run(weights).queries) == 2 and len(read_record(lines)) == len(results)
        found = [table.query("metric == 'top1'")["value"].tolist() for table in (results, again)]
        assert found[0] == found[1]


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:-9], lambda whole: whole[:50]])
def test_a_damaged_file_of_a_sweep_is_told_and_run_again(damage, tmp_path, monkeypatch):
    small = dict(epochs=1, dim=8) | {"encoder_options.width": 8}
    plan = Plan(space={"learning_rate": {"choice": [0.01]}}, base=small, stages=dict(
        tuning=dict(objectives=["Symile"], data=["mfeat"], p=[0, 1], seeds=[100], draws=1)))
    part, where = (plan, "tuning", "mfeat", "Symile"), dict(out=tmp_path/"out", record=tmp_path/"record")
    first = run_part(*part, **where, progress=False)
    ran, really = [], plan_module.run_planned
    monkeypatch.setattr(plan_module, "run_planned", lambda run: ran.append(run.spec.p) or really(run))
    lines, whole = run_file(where["out"], planned(*part)[0].spec), part_file(where["out"], *part[1:])
    lines.write_bytes(damage(lines.read_bytes()))
    told = dict(expected_warning=UserWarning, match=f"{lines.name} can't be read.*; it counts as not run")
    with pytest.warns(**told): assert set(collect(plan, "tuning", **where)["p"]) == {1}
    with pytest.warns(**told): again = run_part(*part, **where | {"record": tmp_path/"other"}, progress=False)
    assert ran == [0.] and (again["metric"] == first["metric"]).all()
    top1 = [table.query("metric == 'valid_top1'")["value"].tolist() for table in (first, again)]
    assert top1[0] == top1[1] and len(read_record(lines)) == len(first) // 2
    whole.write_bytes(damage(whole.read_bytes()))                       # the part's own file: made again of its runs
    with pytest.warns(UserWarning, match=f"{whole.name} can't be read"):
        assert parts_to_do(plan, "tuning", **where) == [("mfeat", "Symile")]
    assert not whole.exists()


def test_an_interrupted_part_of_a_sweep_is_not_recorded(tables, tmp_path, monkeypatch):
    plan, where = plan_on(str(tables), study=dict(p=[0, 0.5])), dict(out=tmp_path/"out", record=tmp_path/"record")
    calls, really = [], run_module.fit
    def fit(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return really(*args, **kwargs)
    monkeypatch.setattr(run_module, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        quietly(run_part, plan, "study", str(tables), "Symile", **where, progress=False)
    assert set(quietly(collect, plan, "study", **where)["p"]) == {0}
    assert quietly(parts_to_do, plan, "study", **where) == [(str(tables), "Symile")]
    assert set(quietly(run_part, plan, "study", str(tables), "Symile", **where, progress=False)["p"]) == {0, 0.5}
    assert len(calls) == 3


def test_a_run_writes_its_own_weights_only(tmp_path, monkeypatch):
    "And no model is kept."
    written, alive, save, run = [], [], MultimodalModel.save, record_module.run_one
    monkeypatch.setattr(MultimodalModel, "save", lambda self, path,
                        about=None: written.append(Path(path).name) or save(self, path, about))
    def run_one(*args):
        import gc, weakref
        gc.collect()
        # the one just saved, until its name is taken
        assert sum(ref() is not None for ref in alive) <= 1
        alive.append(weakref.ref((done := run(*args)).model))
        return done
    monkeypatch.setattr(record_module, "run_one", run_one)
    specs = make_specs(objectives=["PairwiseCLIP", "Symile", "GRAM"], p=0., epochs=1, dim=8)
    run_all(specs, tmp_path, progress=False)
    assert written == [weights_file(tmp_path, spec).name for spec in specs]
    # as if killed between weights and lines
    run_file(tmp_path, specs[1]).unlink()
    run_all(specs, tmp_path, progress=False)
    assert len(written) == 4 and written[3] == written[1]


# Objectives of a person's own

MINE = """
from gated_symile.objectives.base import Objective, register

@register
class Mine(Objective):
    "Cosine of the candidate with the mean query."
    capabilities = frozenset({"weights"})
    style = dict(color="#332288", marker="*", linestyle="-")

    def __init__(self, log_scale=1., power=1.):
        super().__init__(log_scale)
        self.power = power

    def _score(self, embeddings, target, present):
        queries = sum(e for m, e in enumerate(embeddings) if m != target)
        return self.power * queries @ embeddings[target].T

    def _weights(self, embeddings, target, present):
        scores = self._score(embeddings, target, present)
        return scores[..., None].expand(-1, -1, len(embeddings) - 1) * 0 + 0.5, scores * 0
"""


def test_an_objective_of_ones_own_through_the_templates(tmp_path, monkeypatch):
    (tmp_path/"mine.py").write_text(MINE)
    done = papermill("retrieval", tmp_path, "-y", "objectives: [Mine, Symile]", "-y", "plugins: [mine.py]", "-y",
                     "objective_options: {Mine: {power: 2}}", "-y", "p: [0.5]", "-p", "epochs", "2",
                     "-p", "dim", "8", "-p", "out", "out")
    assert done.returncode == 0, done.stderr[-3000:]
    results = pd.read_parquet(tmp_path/"out"/"results.parquet")
    mine = results[results["objective"] == "Mine"]
    assert {"top1", "weight of fou", "AUROC of fou"} <= set(mine["metric"])
    assert json.loads(mine["spec"].iloc[0])["objective_options"] == {"log_scale": 1., "power": 2}
    weights, = (tmp_path/"out"/"weights").glob("Mine_*")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(objectives_base, "_REGISTRY", registered())    # here it is unknown, until its file is named
    with pytest.raises(UnknownNameError, match="objectives: 'Mine' is unknown"):
        run_cells("retrieval", objectives=["Mine"], out="again")
    ranked = run_cells("rank", weights=str(weights), plugins=["mine.py"], k=2, out="ranked")["ranked"]
    assert (ranked.groupby("query").size() == 2).all() and (tmp_path/"ranked"/"ranked.csv").is_file()


def test_an_objective_of_ones_own_in_audit_and_sweep(tmp_path):
    "Alone in its process, as a person's is; with another version of the file, the run is another."
    (tmp_path/"mine.py").write_text(MINE)
    code = """
from gated_symile import audit, generator
from gated_symile.runs.plan import Plan, run_part
from gated_symile.runs.record import load_run, run_all, weights_file
from gated_symile.runs.spec import make_specs
from pathlib import Path
spec, = make_specs(objectives="Mine", plugins="mine.py", p=0., epochs=1, dim=8)
run_all([spec], "out", progress=False)
saved = load_run(weights_file("out", spec))
assert len(audit(saved.model, saved.read("mfeat")[:200], "pix", generator=generator(0)))
common = dict(objectives=["Mine"], data=["mfeat"], p=[0.5], tuned=False, settings={"mfeat": {"epochs": 1, "dim": 8}})
stages = {name: dict(seeds=[seed], **common) for name, seed in (("tuning", 100), ("study", 0))}
plan = Plan.load(dict(space={}, stages=stages, plugins=["mine.py"]))
assert set(run_part(plan, "study", "mfeat", "Mine", "sweep", "record", progress=False)["objective"]) == {"Mine"}
Path("mine.py").write_text(Path("mine.py").read_text() + "# changed\\n")
assert make_specs(objectives="Mine", plugins="mine.py", p=0., epochs=1, dim=8)[0].digest != spec.digest
""".replace("\\\\", "\\")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_objective_of_a_cell_is_known_by_its_code(tmp_path):
    "It has no file: the same class is the same run, in another process too; an edited one is another."
    code = """
import sys
from gated_symile.runs.spec import make_specs
for cell in sys.argv[1:]:
    exec(cell)
    print(make_specs(objectives="Mine", p=0., epochs=1, dim=8)[0].digest)
"""
    def digests(*cells):
        done = subprocess.run([sys.executable, "-", *cells], input=code, cwd=tmp_path, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.split()
    others = [MINE.replace(*edit) for edit in (("self.power * queries", "queries"), ("+ 0.5", "+ 0.25"),
                                               ('{"weights"}', "()"))]
    same, *others, again = digests(MINE, *others, MINE)
    assert [same] == [again] == digests(MINE) and len({same, *others}) == 4


def test_plugins_of_one_file_name_are_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives_base, "_REGISTRY", registered())
    for folder, text in (("a", MINE), ("b", MINE.replace("Mine", "Yours")), ("c", MINE)):
        (tmp_path/folder).mkdir()
        (tmp_path/folder/"mine.py").write_text(text)
    made = lambda: make_specs(objectives=["Mine", "Yours"], p=0., plugins=[str(tmp_path/f/"mine.py") for f in "ab"])
    mine, yours = made()
    (tmp_path/"b"/"mine.py").write_text(MINE.replace("Mine", "Yours") + "# changed\n")
    assert made()[0].digest == mine.digest and made()[1].digest != yours.digest
    spec_module.load_plugins(str(tmp_path/"c"/".."/"a"/"mine.py"))
    with pytest.raises(UnknownNameError, match="Mine is known already, from plugin_mine_"):
        spec_module.load_plugins(str(tmp_path/"c"/"mine.py"))


# One bootstrap

def test_intervals_over_seeds_draw_seeds():
    "Seeds that differ much make a wide interval, though each seed's own is narrow; and who is alone is not ahead."
    lines = [dict(stage="x", data="d", objective="A", variant="v", p=0., seed=s, metric="top1", rows="all", n=400,
                  value=v, by_row=[1.]*int(400*v) + [0.]*int(400*(1 - v)))
             for s, v in ((0, 0.2), (1, 0.8), (2, 0.5))]
    record = pd.DataFrame(lines)
    low, high = record_module.summary(record)[["low", "high"]].iloc[0]
    assert high - low > 0.3 and "ahead" not in record_module.reading(record)
    near = pd.concat([record, record.assign(objective="B", by_row=[rows[::-1] for rows in record["by_row"]])])
    assert "no difference can be seen" in record_module.reading(near)
