"Symile-MIMIC as published: both layouts, all that can be wrong with the files, and look-alikes in their place."
import json
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from gated_symile.core import DataError, DtypeError, MissingError, OutputError, ShapeError, UnknownNameError
from gated_symile.data.mimic import FINDINGS, SPLITS, symile_mimic, write_symile_mimic
from templates import papermill, run_cells

BLOOD = "percentiles", "missingness"
SMALL = dict(rows=(30, 12, 11), side=16, length=40, p=0.5, progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A look-alike in each of the layouts, made once."
    top = tmp_path_factory.mktemp("mimic")
    return {layout: write_symile_mimic(top/layout, layout=layout, **SMALL) for layout in ("npy", "pt")}


@pytest.fixture
def folder(made, tmp_path): return shutil.copytree(made["npy"], tmp_path/"npy")


@pytest.fixture
def saved(made, tmp_path): return shutil.copytree(made["pt"], tmp_path/"pt")


def path(folder, name, split): return folder/"data_npy"/split/f"{name}_{split}.npy"


def change(folder, name, split, edit):
    "Save what `edit` returns of an array, or changed in it."
    x = np.load(path(folder, name, split))
    y = edit(x)
    np.save(path(folder, name, split), x if y is None else y)


def put(at, value): return lambda x: x.__setitem__(at, value)


def same(a, b):
    for name, x in a.rows.modalities.items():
        assert torch.equal(x[:].nan_to_num(-1), b.rows.modalities[name][:].nan_to_num(-1))
    assert a.rows.ids == b.rows.ids and a.rows.columns == b.rows.columns
    assert torch.equal(a.rows.corrupted, b.rows.corrupted)
    assert a.candidates is None and b.candidates is None or torch.equal(a.candidates, b.candidates)
    pd.testing.assert_frame_equal(a.labels, b.labels)


@pytest.mark.parametrize("split", SPLITS)
def test_both_layouts_say_the_same(made, split):
    same(symile_mimic(made["npy"], split), symile_mimic(made["pt"], split, number=1))


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_those_of_the_files(made, split):
    got, n = symile_mimic(made["npy"], split), dict(train=30, val=12, val_retrieval=12, test=11)[split]
    assert len(got) == len(got.rows) == len(got.labels) == n
    for name in ("cxr", "ecg"):
        x = got.rows.modalities[name]
        assert not isinstance(x, torch.Tensor)                         # mapped, not read
        assert np.array_equal(x[:].numpy(), np.load(path(made["npy"], name, split))[:n])
    labs = got.rows.modalities["labs"].numpy()
    percentiles, observed = (np.load(path(made["npy"], f"labs_{what}", split))[:n] for what in BLOOD)
    assert np.array_equal(np.isnan(labs), observed == 0)
    assert np.array_equal(labs[observed == 1], percentiles[observed == 1])
    assert got.rows.ids == np.load(path(made["npy"], "hadm_id", split))[:n].tolist()


@pytest.mark.parametrize("split", ["val_retrieval", "test"])
def test_candidates_are_the_rows_of_the_files(made, split):
    got = symile_mimic(made["npy"], split)
    cxr, of, ids = (np.load(path(made["npy"], name, split)) for name in ("cxr", "label_hadm_id", "hadm_id"))
    assert got.candidates.shape == (len(got), 10) and got.candidates.dtype == torch.long
    assert got.candidates[:, 0].tolist() == list(range(len(got)))
    for query, rows in enumerate(got.candidates):
        listed = np.flatnonzero(of == got.rows.ids[query])             # true one first, in the order of the file
        assert np.array_equal(got.rows.modalities["cxr"][rows].numpy(), cxr[listed])
        assert [got.rows.ids[row] for row in rows] == ids[listed].tolist() and len(set(rows.tolist())) == 10


def test_columns_are_in_the_order_of_the_names_and_not_of_the_file(made):
    "The published code goes through the sorted names of labs_means.json, whatever their order there."
    means = json.loads((made["npy"]/"labs_means.json").read_text())
    names = symile_mimic(made["npy"]).rows.columns["labs"]
    assert list(means) != sorted(means) and names == sorted(means)
    percentiles, observed = (np.load(path(made["npy"], f"labs_{what}", "train")) for what in BLOOD)
    for k, name in enumerate(names): assert np.allclose(percentiles[observed[:, k] == 0, k], means[name])
    table = pd.read_csv(made["npy"]/"train.csv")
    assert np.allclose(table[names], symile_mimic(made["npy"]).rows.modalities["labs"], equal_nan=True)


def test_labels(folder):
    as_written = symile_mimic(folder, "test", uncertain=-1, unmentioned=float("nan")).labels
    table = pd.read_csv(folder/"test.csv").iloc[:11].set_index("hadm_id")
    pd.testing.assert_frame_equal(as_written[list(FINDINGS)], table[list(FINDINGS)].astype(float))
    labels = symile_mimic(folder, "test").labels
    assert (labels[list(FINDINGS)].isna() == (table[list(FINDINGS)] == -1)).all(axis=None)
    assert (labels[list(FINDINGS)] == 0).where(table[list(FINDINGS)].isna(), True).all(axis=None)
    died = pd.read_csv(folder/"symile_mimic_data.csv", index_col="hadm_id")["hospital_expire_flag"]
    assert labels["mortality"].tolist() == died[labels.index].tolist()
    (folder/"symile_mimic_data.csv").unlink()
    assert list(symile_mimic(folder, "test").labels) == list(FINDINGS)
    for file in folder.glob("*.csv"): file.unlink()
    got = symile_mimic(folder, "test")
    assert list(got.labels) == [] and len(got.labels) == 11 and got.rows.corrupted is None


def test_a_label_that_is_none(folder):
    table = pd.read_csv(folder/"val.csv").assign(Edema=3)
    table.to_csv(folder/"val.csv", index=False)
    with pytest.raises(DataError, match="1, 0, -1 or empty, got .*3"): symile_mimic(folder, "val")


WRONG = {
    "wrong channels": ("cxr", "train", lambda x: x[:, :1],
        ShapeError, r"cxr_train.npy must have shape \(rows, 3, side, side\)"),
    "not square": ("cxr", "train", lambda x: x[..., :8], ShapeError, r"cxr_train.npy .* got \(30, 3, 16, 8\)"),
    "axes of the ECG": ("ecg", "train", lambda x: x.transpose(0, 1, 3, 2), ShapeError, r"ecg_train.npy .*length, 12\)"),
    "49 tests": ("labs_percentiles", "val", lambda x: x[:, :49], ShapeError, "labs_percentiles_val.npy"),
    "no rows": ("hadm_id", "train", lambda x: x[:0], ShapeError, r"hadm_id_train.npy .* got \(0,\)"),
    "half precision": ("cxr", "train", lambda x: x.astype(np.float16),
        DtypeError, "cxr_train.npy must hold float32, got float16"),
    "bytes": ("cxr", "train", lambda x: x.astype(np.uint8), DtypeError, "must hold float32, got uint8"),
    "bools": ("labs_missingness", "train", lambda x: x.astype(bool),
        DtypeError, "labs_missingness_train.npy must hold int64"),
    "fewer rows": ("ecg", "train", lambda x: x[:-1], ShapeError, "differ in rows: .*'ecg_train.npy': 29"),
    "neither 0 nor 1": ("labs_missingness", "train", put((0, 0), 2), DataError, "must hold 0 and 1"),
    "no percentile": ("labs_percentiles", "train", put((0, 0), 70),
        DataError, "labs_percentiles_train.npy must hold percentiles"),
    "NaN": ("labs_percentiles", "train", put((0, 0), np.nan),
        DataError, "labs_percentiles_train.npy must hold percentiles"),
    "1 is missing": ("labs_missingness", "train", lambda x: 1 - x, DataError, "there 1 is observed"),
    "twice": ("hadm_id", "train", lambda x: put(1, x[0])(x), DataError, "train.csv beside hadm_id: row 1"),
    "no label": ("label", "test", put(3, 2), DataError, "label_test.npy must hold 0 and 1"),
    "one true too few": ("label", "test", put(3, 0),
        DataError, r"label_test.npy: 10 of 110 rows are true, expected one in 10"),
    "true ones later": ("label", "test", lambda x: x[::-1],
        DataError, r"label_test.npy \(all true ones first\): row 0 has 0"),
    "whose": ("label_hadm_id", "test", lambda x: put(20, x[0])(x), DataError, "label_hadm_id_test.npy .*: row 20"),
    "query by query": ("label_hadm_id", "test", lambda x: np.concatenate([x[:11], x[11:][::-1]]), DataError, "row 11"),
    "a stranger": ("hadm_id", "test", put(50, 7),
        DataError, "hadm_id_test.npy: 1 candidates are no true row of the split"),
    "itself": ("hadm_id", "test", lambda x: put(11, x[0])(x), DataError, "1 queries have a candidate twice"),
    "true twice": ("hadm_id", "test", lambda x: put(1, x[0])(x), DataError, "comes twice among the true ones"),
    "another picture": ("cxr", "test", lambda x: put(11, -x[11])(x),
        DataError, r"cxr_test.npy: row 11 should repeat row \d+"),
    "another ECG": ("ecg", "test", lambda x: put(11, -x[11])(x), DataError, "ecg_test.npy: row 11 should repeat"),
    "other blood": ("labs_percentiles", "test", put((60, 0), 0.123),
        DataError, "labs_percentiles_test.npy: row 60 should repeat"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(folder, case):
    name, split, edit, error, words = WRONG[case]
    change(folder, name, split, edit)
    with pytest.raises(error, match=words): symile_mimic(folder, split)


def test_an_admission_that_comes_twice(folder):
    for file in folder.glob("*.csv"): file.unlink()
    change(folder, "hadm_id", "train", lambda x: put(1, x[0])(x))
    with pytest.raises(DataError, match="hadm_id_train.npy: an admission comes twice"): symile_mimic(folder)


def test_a_table_of_other_rows(folder):
    table = pd.read_csv(folder/"train.csv")
    table[::-1].to_csv(folder/"train.csv", index=False)
    with pytest.raises(DataError, match="train.csv beside hadm_id: row 0"): symile_mimic(folder)
    table[:-1].to_csv(folder/"train.csv", index=False)
    with pytest.raises(DataError, match="train.csv has 29 rows, the arrays 30"): symile_mimic(folder)
    table.drop(columns="hadm_id").to_csv(folder/"train.csv", index=False)
    with pytest.raises(DataError, match="train.csv can't be read"): symile_mimic(folder)


def test_broken_means(folder):
    means = json.loads((folder/"labs_means.json").read_text())
    (folder/"labs_means.json").write_text(json.dumps(dict(list(means.items())[:49])))
    with pytest.raises(DataError, match="labs_means.json must hold 50 means, got 49"): symile_mimic(folder)
    (folder/"labs_means.json").write_text("{")
    with pytest.raises(DataError, match="labs_means.json can't be read"): symile_mimic(folder)
    (folder/"labs_means.json").unlink()
    assert symile_mimic(folder).rows.columns is None                   # without names, and without that check


@pytest.mark.parametrize("name", ["cxr", "hadm_id", "label"])
def test_files_that_are_lacking_or_cut_short(folder, name):
    file = path(folder, name, "test")
    whole = file.read_bytes()
    for cut in (len(whole) - 8, 60, 0):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=f"{name}_test.npy can.t be read.* is it whole"):
            symile_mimic(folder, "test")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"no file .*{name}_test.npy"): symile_mimic(folder, "test")


class Harmful:
    def __reduce__(self): return (print, ("this must not run",))


def test_no_pickle_is_ever_loaded(folder, saved, capsys):
    np.save(path(folder, "hadm_id", "train"), np.array([Harmful()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="hadm_id_train.npy .*never loaded"): symile_mimic(folder)
    file = saved/"split1"/"train"/"cxr_train.pt"
    torch.save(Harmful(), file)
    with pytest.raises(DataError, match="cxr_train.pt .*never loaded"): symile_mimic(saved, number=1)
    file.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(DataError, match="cxr_train.pt can't be read"): symile_mimic(saved, number=1)
    assert "this must not run" not in capsys.readouterr().out


def test_tensors_that_are_none_or_cut_short(saved):
    file = saved/"split1"/"train"/"cxr_train.pt"
    whole, tensor = file.read_bytes(), torch.load(file)
    file.write_bytes(whole[:len(whole)//2])
    with pytest.raises(DataError, match="cxr_train.pt can't be read"): symile_mimic(saved, number=1)
    for other, kind in (({"cxr": tensor}, "dict"), (tensor.bfloat16(), "torch.bfloat16")):
        torch.save(other, file)
        with pytest.raises(DataError, match=f"cxr_train.pt must hold one array or tensor, got {kind}"):
            symile_mimic(saved, number=1)
    torch.save(tensor, file, _use_new_zipfile_serialization=False)     # of before 2020: can't be mapped
    with pytest.raises(DataError, match="cxr_train.pt can't be read"): symile_mimic(saved, number=1)
    torch.save(tensor.double(), file)
    with pytest.raises(DtypeError, match="cxr_train.pt must hold float32, got float64"): symile_mimic(saved, number=1)


def test_folders(folder, saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"): symile_mimic(tmp_path/"nowhere")
    with pytest.raises(FileNotFoundError, match="neither data_npy nor split1: it holds .*'npy'"): symile_mimic(tmp_path)
    with pytest.raises(UnknownNameError, match="split: 'valid' .*did you mean 'val'"): symile_mimic(folder, "valid")
    with pytest.raises(UnknownNameError, match="there is no split2 .* only data_npy"): symile_mimic(folder, number=2)
    with pytest.raises(UnknownNameError, match=r"there is no split2 .* only \[1\]"): symile_mimic(saved, number=2)
    with pytest.raises(MissingError, match=r"number: .* say which of \[1\]"): symile_mimic(saved)


def test_workers_open_a_file_again(saved):
    rows = symile_mimic(saved, number=1).rows.modalities["cxr"]
    sent = pickle.dumps(rows)
    assert len(sent) < 5000 and torch.equal(pickle.loads(sent)[[3, 0]], rows[[3, 0]])


def test_a_look_alike_is_like_its_original(tmp_path):
    "Observed rates as published, percentiles even among what was measured, corruption as often as asked for."
    folder = write_symile_mimic(tmp_path/"a", rows=(2000, 10, 10), side=12, length=34, p=0.4, progress=False)
    rows = symile_mimic(folder).rows
    seen = (~rows.modalities["labs"].isnan()).float().mean(0)
    expected = torch.cat([torch.full((16,), .99), torch.linspace(.9, .6, 18), torch.linspace(.49, .33, 13),
                          torch.full((3,), .105)])
    assert (seen - expected).abs().max() < 0.04 and abs(seen.sum() - 35) < 1
    assert (rows.modalities["labs"][:, 47].isnan() == rows.modalities["labs"][:, 49].isnan()).all()
    assert (rows.modalities["labs"].nanmean(0) - 0.5).abs().max() < 0.01
    share = rows.corrupted.float().mean(0)
    assert share[0] == 0 and abs(share[1] - 0.2) < 0.04 and abs(share[2] - 0.2) < 0.04
    assert not rows.corrupted.all(1).any() and (rows.corrupted.sum(1) < 2).all()
    assert (folder/"SYNTHETIC.txt").read_text().startswith("SYNTHETIC")


def test_nothing_is_written_over(folder, tmp_path):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert write_symile_mimic(folder, **SMALL) == folder               # the same: left as it is
    with pytest.raises(OutputError, match="other settings"): write_symile_mimic(folder, **{**SMALL, "p": 0.1})
    (folder/"SYNTHETIC.txt").unlink()
    with pytest.raises(OutputError, match="no look-alike"): write_symile_mimic(folder, **SMALL)
    del before[folder/"SYNTHETIC.txt"]
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    (tmp_path/"file").write_text("mine")
    with pytest.raises(OutputError, match="can't be written"): write_symile_mimic(tmp_path/"file"/"below", **SMALL)
    (tmp_path/"empty").mkdir()
    write_symile_mimic(tmp_path/"empty", **SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "npy"]


def test_the_seed_decides(made, tmp_path):
    again = write_symile_mimic(tmp_path/"again", **SMALL)
    for file in made["npy"].rglob("*.*"): assert file.read_bytes() == (again/file.relative_to(made["npy"])).read_bytes()
    other = write_symile_mimic(tmp_path/"other", seed=1, **SMALL)
    assert not np.array_equal(np.load(path(again, "cxr", "train")), np.load(path(other, "cxr", "train")))


def test_the_template_on_files_of_ones_own(folder, tmp_path, monkeypatch):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    done = papermill("mimic", tmp_path, "-p", "folder", str(folder), "-p", "epochs", "1", "-p", "out", "out", "-y",
                     "objectives: [PairwiseCLIP, SubsetSymile]")
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_parquet(tmp_path/"out"/"results.parquet")
    assert set(table["objective"]) == {"PairwiseCLIP", "SubsetSymile"}
    assert set(table["rows"]) == {"all", "clean", "corrupted", "ecg", "labs"}
    assert (table[table["rows"] == "all"]["n"] == 11).all()
    assert table[table["metric"] == "top1"][["value", "low", "high"]].stack().between(0, 1).all()
    weights = {file: file.stat().st_mtime_ns for file in (tmp_path/"out"/"weights").iterdir()}
    assert len(weights) == 2 and (tmp_path/"out"/"top1.png").is_file()
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    monkeypatch.chdir(tmp_path)                                        # what is finished is not trained again
    run_cells("mimic", folder=str(folder), epochs=1, out="out", objectives=["PairwiseCLIP", "SubsetSymile"])
    assert weights == {file: file.stat().st_mtime_ns for file in (tmp_path/"out"/"weights").iterdir()}
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path/"out"/"results.parquet"))


@pytest.mark.parametrize("given, error, words", [
    (dict(epoch=3), UnknownNameError, "parameter: 'epoch' is unknown"),
    (dict(folder=".", p=0.5), DataError, "p is for the look-alike")])
def test_a_wrong_parameter_stops_the_template(given, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words): run_cells("mimic", **given)
    assert not (tmp_path/"runs").exists()
