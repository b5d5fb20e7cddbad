"The biobank: a look-alike is what it says, mapped rows are those of the files, and nothing is half-written."
import pickle
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import ipc

from gated_symile.core import (DataError, DtypeError, GatedSymileError, NonFiniteError, OutputError, RangeError,
                               UnknownNameError)
from gated_symile.data import biobank
from gated_symile.data.batches import read_batches
from gated_symile.data.biobank import constant_where_absent, Placed, Stored, ukb, ukb_splits, write_ukb
from gated_symile.data.tabular import split_by_ids
from gated_symile.encoders import Flat, MaskedMLP
from gated_symile.model import MultimodalModel
from gated_symile.objectives.base import make_objective
from gated_symile.search import rank_dataset
from gated_symile.training import fit
from templates import run_cells

WIDTHS = {"olink": 12, "nmr": 5, "ehr": 7}
same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return write_ukb(tmp_path_factory.mktemp("ukb")/"a", people=1500, widths=WIDTHS, seed=3)


def refused(error, *parts, call):
    with pytest.raises(error) as caught: quietly(call)
    assert isinstance(caught.value, (GatedSymileError, FileNotFoundError))
    for part in parts: assert part in str(caught.value), f"{part!r} not in {caught.value}"


# The look-alike

def files(folder): return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_seed_gives_the_same_files_whatever_was_drawn_before(folder, tmp_path):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    again, other = (write_ukb(tmp_path/str(s), people=1500, widths=WIDTHS, seed=s) for s in (3, 4))
    assert files(again) == files(folder) and files(other)["nmr.feather"] != files(folder)["nmr.feather"]
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


def test_shares_ids_and_splits_are_those_that_were_asked_for(tmp_path):
    folder, n = write_ukb(tmp_path/"a", people=20000, widths=dict.fromkeys(WIDTHS, 2)), 20000
    ids = {name: pd.read_feather(folder/f"{name}.feather")["eid"] for name in WIDTHS}
    for name, share in biobank.PRESENCE.items():
        assert abs(len(ids[name]) / n - share) <= 4 * (share * (1 - share) / n)**0.5
    assert not set(ids["olink"]) & set(ids["ehr"])                             # another project's ids
    pairs = pd.read_csv(folder/"id_maps"/"olink.csv")
    assert set(pairs["eid"]) == set(ids["ehr"]) and set(ids["olink"]) <= set(pairs["olink_eid"])
    for number in range(1, 6):
        lists = [path.read_text().split() for path in ukb_splits(folder, number).values()]
        assert list(map(len, lists)) == [16000, 2000, 2000] and len(set(sum(lists, []))) == n
    assert files(folder)["splits/split1/test.txt"] != files(folder)["splits/split2/test.txt"]


def test_blocks_don_t_repeat_themselves():
    look = biobank._Look(0, WIDTHS, 0.5, 0.)
    for name in WIDTHS:
        (a, x), (b, y) = ((s, look.rows(n, name, s, look.columns(name))) for n in (0, 1)
                          for other, _, s in look.block(n, 50) if other == name)
        assert len(np.unique(np.concatenate([a, b]), axis=0)) == 100 and not (x == y).any()


def test_a_folder_is_written_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    before = files(folder)
    refused(OutputError, "already", "nothing is overwritten", call=lambda: write_ukb(folder, people=200))
    assert files(folder) == before
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"notes.txt").write_text("mine")
    refused(OutputError, "not empty", call=lambda: write_ukb(tmp_path/"mine", people=200))
    (tmp_path/"empty").mkdir(); write_ukb(tmp_path/"empty", people=200, widths=WIDTHS)
    def fail(*args): raise KeyboardInterrupt
    monkeypatch.setattr(biobank, "_write_lists", fail)
    with pytest.raises(KeyboardInterrupt): write_ukb(tmp_path/"b", people=200, widths=WIDTHS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]
    assert [path.name for path in (tmp_path/"mine").iterdir()] == ["notes.txt"]


# Reading

@pytest.mark.parametrize("join", ["union", "intersect"])
@pytest.mark.parametrize("memory", [1, 512])
def test_mapped_and_read_are_what_pandas_reads(folder, tmp_path, join, memory):
    frames = {name: pd.read_feather(folder/f"{name}.feather").set_index("eid") for name in WIDTHS}
    who = pd.read_csv(folder/"id_maps"/"olink.csv").set_index("olink_eid")["eid"]
    frames["olink"].index = who[frames["olink"].index]
    sets = [set(frame.index) for frame in frames.values()]
    expected = set.union(*sets) if join == "union" else set.intersection(*sets)
    for cache in (None, tmp_path/"cache"):
        got = ukb(folder, join=join, cache=cache, memory=memory)
        assert {int(id) for id in got.ids} == expected and len(got) == len(expected)
        for name, frame in frames.items():
            same(got.modalities[name][:], frame.reindex([int(id) for id in got.ids]).to_numpy("float32"))
            assert got.is_present(name).tolist() == [int(id) in frame.index for id in got.ids]
            assert got.columns[name] == frame.columns.tolist()
    at = torch.randperm(len(got), generator=torch.Generator().manual_seed(0))[:40]
    batch, present = next(read_batches(got, [at]))
    for name in got.names:
        there = got.is_present(name)[at]
        same(batch[name][there], got.modalities[name][:][at][there])
    assert got.present is None or torch.equal(present, got.present[at])
    for name, x in got[at].modalities.items(): same(pickle.loads(pickle.dumps(x))[:], got.modalities[name][:][at])


@pytest.mark.parametrize("batch", [7, 100, 10**6])
@pytest.mark.parametrize("compression", ["lz4", "uncompressed"])
def test_feather_by_other_hands(tmp_path, batch, compression):
    "Record batches, compressed or not, integers, yes and no, half and double precision, nulls; ids anywhere."
    n, rng = 250, np.random.default_rng(0)
    table = pa.table({"a": pa.array(rng.integers(0, 9, n), mask=rng.random(n) < .2), "b": rng.standard_normal(n),
                      "eid": rng.permutation(n), "c": pa.array(rng.random(n) < .5, mask=rng.random(n) < .2),
                      "d": rng.standard_normal(n).astype("float16")})
    options = ipc.IpcWriteOptions(compression=None if compression == "uncompressed" else compression)
    for name in ("nmr", "ehr"):
        with ipc.new_file(tmp_path/f"{name}.feather", table.schema, options=options) as file:
            file.write_table(table, max_chunksize=batch)
    expected = table.drop_columns(["eid"]).to_pandas().astype("float64").to_numpy("float32")
    for cache in (None, tmp_path.parent/f"{tmp_path.name}_cache"):
        got = ukb(tmp_path, names=["nmr", "ehr"], cache=cache)
        same(got.modalities["ehr"][:], expected)
        assert got.ids == [str(i) for i in table["eid"].to_pylist()]


def test_blocks_are_as_small_as_they_have_to_be(folder):
    table = biobank._Table.open(folder/"ehr.feather", "eid")
    whole = np.concatenate(list(table.blocks(512)))
    for memory in (0.001, 0.01):
        blocks = list(table.blocks(memory))
        assert max(map(len, blocks)) <= memory * 2**20 / 4 / 7
        same(np.concatenate(blocks), whole)


def test_a_cache_is_made_once_and_anew_for_another_file(folder, tmp_path):
    cache, copy = tmp_path/"cache", tmp_path/"copy"
    copy.mkdir()
    for name in WIDTHS: (copy/f"{name}.feather").write_bytes((folder/f"{name}.feather").read_bytes())
    names = ["nmr", "ehr"]
    first = ukb(copy, names, cache=cache)
    stamps = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    ukb(copy, names, cache=cache)
    assert stamps == {path: path.stat().st_mtime_ns for path in cache.iterdir()} and len(stamps) == 2
    frame = pd.read_feather(copy/"nmr.feather")
    frame.assign(nmr_0=5.).to_feather(copy/"nmr.feather")
    second = ukb(copy, names, cache=cache)
    there = second.is_present("nmr")
    assert (second.modalities["nmr"][:][there, 0] == 5).all() and len(list(cache.iterdir())) == 3
    assert not (first.modalities["nmr"][:][there, 0] == 5).any()
    refused(OutputError, "where the data are", call=lambda: ukb(copy, names, cache=copy))


def test_an_interrupted_turning_leaves_nothing(folder, tmp_path, monkeypatch):
    blocks = biobank._Table.blocks
    def fail(self, memory):
        yield next(blocks(self, 1e-3))
        raise KeyboardInterrupt
    monkeypatch.setattr(biobank._Table, "blocks", fail)
    with pytest.raises(KeyboardInterrupt): ukb(folder, cache=tmp_path/"cache")
    assert list((tmp_path/"cache").iterdir()) == []


def test_a_full_disk_is_told_before(folder, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(biobank.shutil, "disk_usage", lambda path: usage)
    refused(OutputError, "cache: the rows of olink.feather take", call=lambda: ukb(folder, cache=tmp_path/"cache"))


BAD = {
    "no eid": (lambda f: f.drop(columns="eid"), DataError, ["nmr.feather: no id column 'eid'", "nmr_0"]),
    "only eid": (lambda f: f[["eid"]], DataError, ["nmr.feather: no columns besides the id"]),
    "words": (lambda f: f.assign(sex="f"), DtypeError, ["nmr.feather", "['sex']"]),
    "dates": (lambda f: f.assign(day=pd.Timestamp("2020")), DtypeError, ["nmr.feather", "['day']"]),
    "twice": (lambda f: pd.concat([f, f[:3]], ignore_index=True), DataError, ["nmr.feather", "duplicate ids"]),
    "decimals": (lambda f: f.assign(eid=f["eid"] + .5), DtypeError, ["nmr.feather", "whole numbers or text"]),
    "infinity": (lambda f: f.assign(nmr_1=np.inf), NonFiniteError, ["nmr.feather", "infinity", "['nmr_1']"]),
    "too large": (lambda f: f.assign(nmr_1=1e300), NonFiniteError, ["nmr.feather", "too large"]),
    "nobody": (lambda f: f[:0].reset_index(drop=True), DataError, ["nmr.feather: no rows"]),
    "strangers": (lambda f: f.assign(eid=f["eid"] + 10**8), DataError, ["'nmr' join with no other table"]),
}

@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_named(folder, tmp_path, case, cached):
    change, error, parts = BAD[case]
    (tmp_path/"data").mkdir()
    (tmp_path/"data"/"ehr.feather").write_bytes((folder/"ehr.feather").read_bytes())
    change(pd.read_feather(folder/"nmr.feather")).to_feather(tmp_path/"data"/"nmr.feather")
    cache = tmp_path/"cache" if cached else None
    refused(error, *parts, call=lambda: ukb(tmp_path/"data", ["nmr", "ehr"], cache=cache))


@pytest.mark.parametrize("content", [b"", b"ARROW1 but not really", None])
def test_a_damaged_file_is_named(folder, tmp_path, content):
    for name in ("nmr", "ehr"): (tmp_path/f"{name}.feather").write_bytes((folder/f"{name}.feather").read_bytes())
    whole = (tmp_path/"nmr.feather").read_bytes()
    (tmp_path/"nmr.feather").write_bytes(whole[:len(whole)//2] if content is None else content)
    refused(DataError, "nmr.feather can't be read as feather", call=lambda: ukb(tmp_path, ["nmr", "ehr"]))


def test_what_is_not_there_is_named(folder, tmp_path):
    refused(UnknownNameError, "'prs'", "'nmr'", call=lambda: ukb(folder, ["prs"]))
    refused(FileNotFoundError, "nothing", call=lambda: ukb(tmp_path/"nothing"))
    refused(DataError, "no .feather", call=lambda: ukb(tmp_path))
    refused(UnknownNameError, "split9", "'split1'", call=lambda: ukb_splits(folder, 9))


# In use

def test_mapped_rows_train_and_rank_as_those_in_memory(folder, tmp_path):
    found = []
    for cache in (None, tmp_path/"cache"):
        parts = quietly(split_by_ids, ukb(folder, cache=cache), ukb_splits(folder, 2))
        torch.manual_seed(0)
        encoders = {name: MaskedMLP(width, 8, [8]) for name, width in WIDTHS.items()}
        model = MultimodalModel(encoders, make_objective("Symile", 3, 8))
        model.standardiser.fit(quietly(split_by_ids, ukb(folder), ukb_splits(folder, 2))["train"])
        history = quietly(fit, model, parts["train"], parts["val"], "olink", epochs=2, progress=False)
        ranks, rows = quietly(rank_dataset, model, parts["test"], "olink")
        found.append((history["train_loss"].tolist(), ranks.above, rows))
    assert found[0][0] == found[1][0] and all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:]))
    assert parts["test"].is_present("olink")[found[1][2]].all()


def test_who_lacks_proteins_is_one_constant_vector_or_left_out(folder):
    rows = ukb(folder)
    encoders = {name: MaskedMLP(width, 4, [8]) for name, width in WIDTHS.items()}
    model = MultimodalModel(encoders, make_objective("Symile", 3, 4))
    model.standardiser.fit(rows)
    constant = constant_where_absent(rows)
    assert constant.present is None and torch.equal(constant_where_absent(constant).modalities["ehr"][:],
                                                    rows.modalities["ehr"])
    e, there = quietly(model.embed, constant)[0], rows.is_present("olink")
    assert e[~there].unique(dim=0).shape[0] == 1 and e[there].unique(dim=0).shape[0] == there.sum()
    torch.testing.assert_close(e[there], quietly(model.embed, rows)[0][there])
    lacking = lambda part, like: constant_where_absent(part, like).modalities["nmr"][:][~part.is_present("nmr")]
    train, test = rows[:1000], rows[1000:]
    assert torch.equal(lacking(test, train)[0], lacking(train, None)[0])       # that of training


def test_what_is_read_from_a_file_is_not_held(tmp_path):
    np.save(tmp_path/"x.npy", np.zeros((4000, 4096), "float32"))               # 64 MB
    rows, held = Stored(tmp_path/"x.npy"), lambda: int(Path("/proc/self/statm").read_text().split()[2])
    try: before = held()
    except OSError: pytest.skip("no /proc here")
    for at in torch.randperm(4000, generator=torch.Generator().manual_seed(0)).split(100): rows[at]
    assert held() - before < 1500                                              # pages of 4096 bytes that are shared
    assert rows[:].sum() == 0 and Placed(rows, torch.tensor([-1, 0]))[[0]].isnan().all()


def test_a_file_that_was_cut_short_since_is_named(tmp_path):
    np.save(tmp_path/"x.npy", np.ones((40, 4), "float32"))
    rows, whole = Stored(tmp_path/"x.npy"), (tmp_path/"x.npy").read_bytes()
    (tmp_path/"x.npy").write_bytes(whole[:-20])
    assert rows[[0, 37]].sum() == 8
    refused(DataError, "row 39 of", "x.npy is not there any more", call=lambda: rows[[0, 39]])
    refused(DataError, "not a whole .npy file", call=lambda: Stored(tmp_path/"x.npy"))
    np.save(tmp_path/"x.npy", np.asfortranarray(np.ones((40, 4), "float32")))
    refused(DtypeError, "float32 row by row", call=lambda: Stored(tmp_path/"x.npy"))


# The template

run_template = partial(run_cells, "biobank")


WRONG = {
    "a name": (dict(joins="union"), UnknownNameError, ["parameter", "'joins'", "did you mean 'join'"]),
    "a join": (dict(join="both"), UnknownNameError, ["join", "'both'", "'intersect'"]),
    "an objective": (dict(objectives=["Simile"]), UnknownNameError, ["objectives", "did you mean 'Symile'"]),
    "a recipe": (dict(recipe="large"), UnknownNameError, ["recipe", "'paper'"]),
    "holes": (dict(holes="zero"), UnknownNameError, ["holes", "'mask'"]),
    "absent": (dict(absent="zero"), UnknownNameError, ["absent", "'constant'"]),
    "a count": (dict(people=3), RangeError, ["people"]),
    "a folder": (dict(folder="/nothing/there"), FileNotFoundError, ["/nothing/there"]),
}

@pytest.mark.parametrize("case", WRONG)
def test_the_template_refuses_before_it_trains(tmp_path, case):
    parameters, error, parts = WRONG[case]
    refused(error, *parts, call=lambda: run_template(out=str(tmp_path/"out"), **parameters))


def test_the_template_runs_on_a_folder_and_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    parameters = dict(folder=str(folder), objectives=["Symile"], epochs=1, out=str(tmp_path/"out"),
                      cache=str(tmp_path/"rows"))
    refused(OutputError, "where the data are", call=lambda: run_template(**{**parameters, "out": str(folder/"out")}))
    table = quietly(run_template, **parameters)["table"]
    assert set(table["join"]) == {"intersect", "union"} and set(table["rows"]) == {"all", "all queries", "some queries"}
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    assert pd.read_parquet(tmp_path/"out"/"results.parquet").equals(table)
    assert sorted(path.suffix for path in (tmp_path/"out").iterdir() if path.is_file()) == [".parquet", ".png", ".svg"]
    def fail(*args, **kwargs): raise AssertionError("trained again")
    monkeypatch.setattr("gated_symile.training.fit", fail)
    assert quietly(run_template, **parameters)["table"].equals(table)
    with pytest.raises(AssertionError, match="trained again"): quietly(run_template, **{**parameters, "seed": 1})
    monkeypatch.undo()
    counts = table[table["metric"] == "top1"].set_index(["join", "rows"])
    assert counts.loc[("union", "all"), "candidates"] == counts.loc[("union", "all"), "n"].item()
    assert len(quietly(run_template, **{**parameters, "absent": "constant", "holes": "mean", "join": "union"})["table"])


def test_the_template_has_a_floor_that_takes_rows_as_they_are(folder, tmp_path):
    made = quietly(run_template, folder=str(folder), objectives=["LinearGaussian"], out=str(tmp_path/"out"))
    for file in made["files"]:
        assert {type(encoder) for encoder in MultimodalModel.load(file).encoders.values()} == {Flat}
    assert set(made["table"]["join"]) == {"intersect", "union"}
