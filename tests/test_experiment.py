"The templates as their users run them: by papermill, with parameters, on data of their own; and saved runs, back from their files."
import json
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from gated_symile import (audit, encode_bank, generator, GatedSymile, load_tabular, load_weights, MLP, ModalityGate, MultimodalModel, rank_dataset, retrieve,
                          DataError, DtypeError, MissingError, OutputError, RangeError, ShapeError, UnknownNameError)
from gated_symile.experiment import load_run, OBJECTIVES, open_folder, rank_files, RetrievalConfig, run_one, save_runs, split_data

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE, RANK = (ROOT/"nbs"/"experiments"/f"{name}.ipynb" for name in ("retrieval", "rank"))


def papermill(folder, *parameters, template=TEMPLATE):
    "Run a template in `folder`."
    return subprocess.run([sys.executable, "-m", "papermill", str(template), "executed.ipynb", "-k", "python3", "--no-progress-bar", *parameters],
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
    saved = load_run(out/"weights"/"GatedSymile_p0.5_seed1.safetensors")                       # and without knowing how it was made
    assert all(torch.equal(x, saved.model.state_dict()[name]) for name, x in model.state_dict().items())
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


def test_one_folder_for_many_at_a_time(tmp_path):
    "Whoever looks whether it can be written to is in nobody's way, and leaves nothing behind."
    with ThreadPoolExecutor(8) as pool: assert set(pool.map(open_folder, [tmp_path/"out"]*400)) == {tmp_path/"out"}
    assert list((tmp_path/"out").iterdir()) == []


@pytest.mark.parametrize("settings, error, match", [
    (dict(dim=12.5), DtypeError, "dim must be a whole number, got 12.5"), (dict(epochs=1.5), DtypeError, "epochs must be a whole number"),
    (dict(batch_size=64.), DtypeError, "batch_size must be a whole number"), (dict(batch_size=1), RangeError, "batch_size"), (dict(epochs=True), DtypeError, "epochs")])
def test_settings_that_count_are_whole(settings, error, match):
    with pytest.raises(error, match=match): RetrievalConfig(**settings)


@pytest.mark.parametrize("name", ["clean", "NULL"])
def test_a_table_called_like_something_else_stops_before_training(tables, tmp_path, name):
    quietly(shutil.copytree, tables, tmp_path/"tables")
    path = next(path for path in (tmp_path/"tables").iterdir() if path.stem != "image")
    path.rename(path.with_stem(name))
    with pytest.raises(UnknownNameError, match=f"modality: '{name}' means something else"): quietly(RetrievalConfig, data=str(tmp_path/"tables"), **SMALL)


# Saved runs: from the file back to a model, and on to new rows

SMALL = dict(target="image", dim=8, epochs=1, batch_size=16, data_options={"id": "Patient ID"})
OPTIONS = {"GatedSymile": [{}, {"neutral": "random", "null": True}, {"kind": "matrix", "key_dim": 4}], "Symile": [{}, {"negatives": "all", "log_scale": 1.}]}
CASES = [(name, options) for name in OBJECTIVES for options in OPTIONS.get(name, [{}])]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    "A person's tables, with holes."
    folder = tmp_path_factory.mktemp("tables")
    tables_with_holes(folder)
    return folder


@pytest.fixture(scope="module")
def a_run(tables, tmp_path_factory):
    "A run on them, what was saved of it, and its test rows."
    config = RetrievalConfig(data=str(tables), objectives="SubsetSymile", p=0., out=str(tmp_path_factory.mktemp("out")), **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = run_one(config, "SubsetSymile", 0., 0)
        save_runs(config, [run])
        test = split_data(config, 0., 0)[2]
    return run, Path(config.out)/"weights"/f"{run.label()}.safetensors", test


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
    config = RetrievalConfig(data=str(tables), out=str(tmp_path), objective_options={objective: options} if options else {},
                             encoder_options={"input_dropout": 0.3, "depth": 2, "norm": False, "width": 16}, **{**SMALL, "epochs": 2})
    run = quietly(run_one, config, objective, 0.5, 3)
    save_runs(config, [run])
    saved, test = load_run(tmp_path/"weights"/f"{run.label()}.safetensors"), quietly(split_data, config, 0., 3)[2]
    assert saved.model.names == run.model.names and not saved.model.training
    assert saved.about["seed"] == 3 and saved.about["objective"] == objective and saved.about["versions"]["torch"]
    for name, x in run.model.state_dict().items(): assert torch.equal(x, saved.model.state_dict()[name])
    everyone = quietly(saved.read, tables)
    rows = everyone[[everyone.ids.index(i) for i in test.ids]]
    for name in test.names: assert torch.equal(rows.modalities[name].nan_to_num(7e7), test.modalities[name].nan_to_num(7e7))
    assert (rows.present is None and test.present is None) or torch.equal(rows.select(test.names).present, test.present)
    for target in range(3):
        keep = (test.present if test.present is not None else torch.ones(len(test), 3).bool())[:, [m for m in range(3) if m != target]].any(1)
        before, after = (m.score(m.embed(x[keep]), target, None if x.present is None else x[keep].select(test.names).present) for m, x in ((run.model, test), (saved.model, rows)))
        assert torch.equal(before, after)


def test_loading_leaves_random_numbers_alone(a_run):
    state = torch.get_rng_state()
    load_run(a_run[1])
    assert torch.equal(state, torch.get_rng_state())


def test_a_moved_file_needs_nothing_else(tables, tmp_path):
    "The tables it was trained on may be gone."
    (tmp_path/"old").mkdir()
    tables_with_holes(tmp_path/"old")
    config = RetrievalConfig(data=str(tmp_path/"old"), p=0., out=str(tmp_path/"out"), **SMALL)
    quietly(lambda: save_runs(config, [run_one(config, "Symile", 0., 0)]))
    (tmp_path/"out"/"weights"/"Symile_p0_seed0.safetensors").rename(tmp_path/"mine.safetensors")
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
    assert images.modalities["image"][images.ids.index("patient 2"), 0] == 0
    rows = quietly(saved.read, folder)
    assert not rows.is_present("image")[rows.ids.index("patient 3")]
    ranked = retrieve(saved.model, rows.select(saved.queries)[rows.select(saved.queries).present.any(1)], images, "image", k=3, progress=False)
    assert set(ranked["candidate"]) <= set(images.ids) and ranked["score"].notna().all()
    table = audit(saved.model, quietly(saved.read, tables), "image", generator=generator(0))
    assert set(table["modality"]) == {"blood test", "text-note"} and (table["n"] > 0).all()


def test_ids_under_another_name(a_run, tables, tmp_path):
    folder = changed(tables, tmp_path/"new", "image", lambda frame: frame.rename(columns={"Patient ID": "code"}))
    assert len(quietly(load_run(a_run[1]).read, folder, "image", id="code")) == 90
    with pytest.raises(DataError, match="no id column 'Patient ID'"): load_run(a_run[1]).read(folder, "image")


FITS_NOT = {
    "a table is gone": (lambda f: None, MissingError, "lacks a modality of 'image', 'blood test', 'text-note' .*'blood test' is unknown"),
    "a column less": (lambda f: f.drop(columns="blood test #2 (mg/l)"), ShapeError, r"'blood test' has 5 columns in train but 4 here: lacks \['blood test #2"),
    "a column more": (lambda f: f.assign(extra=1.), ShapeError, r"5 columns in train but 6 here: has instead \['extra'\]"),
    "another name": (lambda f: f.rename(columns={"blood test #2 (mg/l)": "x"}), DataError, r"lacks \['blood test #2 \(mg/l\)'\], has instead \['x'\]"),
    "another order": (lambda f: f[[*f.columns[1::-1], *f.columns[2:]]], DataError, "other order, first 'blood test #1 .* where there was 'blood test #0"),
    "text": (lambda f: f.assign(**{"blood test #2 (mg/l)": "low"}), DtypeError, "blood test.parquet: 1 columns hold no numbers"),
}


@pytest.mark.parametrize("what", FITS_NOT)
def test_new_files_that_do_not_fit(what, a_run, tables, tmp_path):
    change, error, words = FITS_NOT[what]
    folder = changed(tables, tmp_path/"new", "blood test", change)
    with pytest.raises(error, match=words): quietly(load_run(a_run[1]).read, folder)
    assert quietly(load_run(a_run[1]).read, folder, ["image", "text-note"]).names == ["image", "text-note"]  # what isn't asked for does not matter


def test_arrays_without_names_have_to_fit_in_number(a_run, tmp_path):
    saved = load_run(a_run[1])
    np.savez(tmp_path/"new.npz", **{"image": np.ones((4, 9)), "blood test": np.ones((4, 5))})
    assert saved.read(tmp_path/"new.npz", ["blood test", "image"]).names == ["blood test", "image"]
    with pytest.raises(MissingError, match="'text-note' is unknown"): saved.read(tmp_path/"new.npz")
    np.savez(tmp_path/"new.npz", image=np.ones((4, 8)))
    with pytest.raises(ShapeError, match="'image' has 9 columns in train but 8 here$"): saved.read(tmp_path/"new.npz", "image")


def test_what_the_files_hold_is_scaled_once(a_run, tables):
    saved = load_run(a_run[1])
    with pytest.raises(DataError, match="standardised before"): saved.standardiser(quietly(saved.read, tables))


def test_a_saved_model_refuses_rows_as_they_were_read(a_run, tables):
    saved, raw = load_run(a_run[1]), quietly(load_tabular, tables, id="Patient ID")
    for ask in (lambda: retrieve(saved.model, raw.select(saved.queries), raw, "image"), lambda: encode_bank(saved.model, raw.modalities["image"], "image"),
                lambda: audit(saved.model, raw, "image"), lambda: rank_dataset(saved.model, raw, "image"), lambda: saved.model.embed(raw)):
        with pytest.raises(DataError, match="as they were read"): ask()
    assert len(saved.model.embed(quietly(saved.standardiser, raw))) == 3


def test_one_table_is_nothing_to_find_it_by(tables):
    with pytest.raises(MissingError, match="nothing to find 'image' by"): RetrievalConfig(data=[str(tables/"image.csv")], target="image", data_options={"id": "Patient ID"})


def test_xnor_rows_are_used_as_they_are(tmp_path):
    config = RetrievalConfig(data="xnor", p=0., epochs=1, dim=8, out=str(tmp_path), data_options={"rows": 1300})
    run = run_one(config, "Symile", 0., 0)
    save_runs(config, [run])
    saved, rows = load_run(tmp_path/"weights"/"Symile_p0_seed0.safetensors"), split_data(config, 0., 0)[2]
    for name, x in saved.standardiser(rows).modalities.items(): assert torch.equal(x, rows.modalities[name])


def rewritten(path, to, change):
    "The file with another record of how it was made."
    with safe_open(path, "pt") as file: weights, about = {n: file.get_tensor(n) for n in file.keys()}, json.loads(file.metadata()["gated_symile"])
    change(about["metadata"])
    to.write_bytes(save(weights, {"gated_symile": json.dumps(about)}))
    return to


@pytest.mark.parametrize("change, words", [
    (lambda a: a.pop("inputs"), "holds no run: inputs lacking; it was written by gated_symile"),
    (lambda a: [a.pop("inputs"), a.pop("versions")], "inputs lacking; it was written by something else or an older version"),
    (lambda a: a.update(objective="SymileTwo"), "can't be made into a model here .*objective: 'SymileTwo' is unknown.* gated_symile"),
    (lambda a: a["parameters"]["encoder_options"].update(heads=2), "can't be made into a model here .*heads"),
    (lambda a: a["parameters"].pop("dim"), "can't be made into a model here .*dim"),
    (lambda a: a.update(inputs=[1, 2]), "can't be made into a model here"),
    (lambda a: a["inputs"].pop("image"), "can't be made into a model here .*image"),
    (lambda a: a["inputs"]["image"].update(mean=["x"]*9), "can't be made into a model here"),
    (lambda a: a["inputs"]["image"]["mean"].pop(), "can't be made into a model here .*'image'"),
    (lambda a: a["inputs"]["image"]["columns"].pop(), "can't be made into a model here .*'image'"),
    (lambda a: a["parameters"].update(dim=16), "doesn't fit the model.* in the file, .* in the model"),
    (lambda a: a["parameters"]["queries"].reverse(), "doesn't fit the model: modalities"),
])
def test_a_file_of_another_kind_or_version(change, words, a_run, tmp_path):
    with pytest.raises(DataError, match=f"other.safetensors.*{words}"): load_run(rewritten(a_run[1], tmp_path/"other.safetensors", change))


def test_a_file_that_is_no_run(a_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"): load_run(tmp_path/"nothing.safetensors")
    (tmp_path/"x.safetensors").write_bytes(save({"x": torch.ones(2)}))
    with pytest.raises(DataError, match="holds no run: objective, p, seed, parameters, inputs lacking; it was written by something else"): load_run(tmp_path/"x.safetensors")
    whole = a_run[1].read_bytes()
    for part in (b"", whole[:100], whole[:-1]):
        (tmp_path/"x.safetensors").write_bytes(part)
        with pytest.raises(DataError, match="not a whole safetensors file"): load_run(tmp_path/"x.safetensors")


def test_ranking_files_without_python(a_run, tables, tmp_path):
    "The template for ranking, on queries that have no target and a bank of its own."
    for name in ("blood test", "text-note"): (tmp_path/"new").mkdir(exist_ok=True); shutil.copy(tables/f"{name}.parquet", tmp_path/"new")
    done = papermill(tmp_path, "-p", "weights", str(a_run[1]), "-p", "data", "new", "-p", "bank", str(tables), "-p", "k", "3", "-p", "out", "ranked", template=RANK)
    assert done.returncode == 0, done.stderr[-3000:]
    ranked, saved = pd.read_parquet(tmp_path/"ranked"/"ranked.parquet"), load_run(a_run[1])
    queries = quietly(saved.read, tmp_path/"new", saved.queries)
    expected = retrieve(saved.model, queries, quietly(saved.read, tables, "image"), "image", k=3, progress=False)
    pd.testing.assert_frame_equal(ranked, expected)
    assert len(pd.read_csv(tmp_path/"ranked"/"ranked.csv")) == 3*len(queries)
    with pytest.raises(MissingError, match="'image' is unknown"): quietly(rank_files, a_run[1], tmp_path/"new", out=tmp_path/"again")  # nothing to be found
    with pytest.raises(MissingError, match="give the file of weights"): rank_files(None, tmp_path/"new")
    with pytest.raises(OutputError, match="can't write"): rank_files(a_run[1], tmp_path/"new", out=tmp_path/"executed.ipynb")
