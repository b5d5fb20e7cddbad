"Data: corruption does what `corrupted` says and no more, joins are those of a dict, a person's bad files are named."
import builtins
import io
import os
import pickle
import random
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from gated_symile.core import (DataError, DtypeError, GatedSymileError, MissingError, NonFiniteError, RangeError,
                               ShapeError,
                               UnknownNameError, generator)
from gated_symile.data.corruption import Flip, Gaussian, Missing, Swap, corrupt, corrupt_one, other_rows
from gated_symile.data.dataset import MultimodalDataset, column_moments
from gated_symile.data.splits import CORRUPTIONS, corrupted_splits, split_rows
from gated_symile.data.tabular import load_tabular
from gated_symile.data.xnor import synthetic_xnor

seeds = st.integers(0, 10**6)
same = lambda a, b: torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
differs = lambda a, b: ~((a == b) | (a.isnan() & b.isnan()))


def make(seed, rows, absent=0.3, known=False):
    "Three modalities; column 0 is different in every row; some rows are absent (half of them full), some have holes."
    g = generator(seed)
    modalities = {name: torch.randn(rows, 4, generator=g) for name in "abc"}
    for x in modalities.values():
        x[:, 0] = torch.randperm(rows, generator=g) + 1.
        x[:, 1:][torch.rand(rows, 3, generator=g) < 0.1] = torch.nan
    present = torch.rand(rows, 3, generator=g) >= absent
    present[:2] = True                                                           # there is always another row
    for m, x in enumerate(modalities.values()): x[~present[:, m] & (torch.rand(rows, generator=g) < 0.5)] = torch.nan
    corrupted = torch.rand(rows, 3, generator=g) < 0.2 if known else None
    return MultimodalDataset(modalities, present, corrupted, ids=[f"row {i}" for i in range(rows)])


def there(dataset): return torch.stack([dataset.is_present(name) for name in dataset.names], 1)


# Corruption

KINDS = {"swap": Swap(), "swap signal": Swap(slice(0, 2)), "own noise": Gaussian(columns=slice(0, 1)),
         "noise": Gaussian(2.),
         "flip": Flip(1.), "flip copies": Flip(1., (slice(0, 1), slice(3, 4))), "missing": Missing()}
touched = lambda kind: {"swap signal": [0, 1], "own noise": [0], "flip copies": [0, 3]}.get(kind, [0, 1, 2, 3])


def assert_honest(before, after, kind, hit):
    "`hit` rows changed, in the columns of the kind; nothing else did, and what goes with the rows is as it should be."
    for m, name in enumerate(before.names):
        changed = differs(before.modalities[name], after.modalities[name])
        assert torch.equal(changed.any(1), hit[:, m])
        assert not changed[:, [c for c in range(4) if c not in touched(kind)]].any()
    assert not (hit & ~there(before)).any()                                      # what is absent can't be hit
    assert torch.equal(there(after), there(before) & ~hit if kind == "missing" else there(before))
    assert after.ids == before.ids and after.names == before.names
    assert torch.equal(after.corrupted, hit if before.corrupted is None else hit | before.corrupted)


@settings(max_examples=80, deadline=None)
@given(seeds, st.integers(5, 30), st.sampled_from(list(KINDS)), st.tuples(*[st.sampled_from([0., 0.3, 1.])]*3),
       st.booleans(), st.booleans())
def test_corruption_touches_what_it_says(seed, rows, kind, ps, known, one):
    data, kept = make(seed, rows, known=known), make(seed, rows, known=known)
    state = torch.get_rng_state()
    run = lambda: (corrupt_one(data, ["c", "a"], ps[0], KINDS[kind], generator(seed)) if one else
                   corrupt(data, dict(zip("abc", ps)), KINDS[kind], generator(seed)))
    after = run()
    assert torch.equal(torch.get_rng_state(), state)                             # the global generator isn't touched
    for name in data.names:
        assert same(data.modalities[name], kept.modalities[name])                # nor is what was passed in
        assert same(run().modalities[name], after.modalities[name])              # the same seed, the same corruption
    hit = torch.stack([differs(data.modalities[n], after.modalities[n]).any(1) for n in data.names], 1)
    assert_honest(data, after, kind, hit)
    if one:
        # only those named, and only one of them
        assert not hit[:, 1].any() and hit.sum(1).max() <= 1
        if ps[0] == 1: assert torch.equal(hit.any(1), there(data)[:, [0, 2]].any(1))
    else:
        for m, p in enumerate(ps):
            if p in (0, 1): assert torch.equal(hit[:, m], there(data)[:, m] & (p == 1))


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(8, 40), st.sampled_from(["swap", "swap signal"]))
def test_a_swap_brings_the_content_of_another_present_row(seed, rows, kind):
    data = make(seed, rows, absent=0.2)
    after = corrupt(data, dict.fromkeys("abc", 0.7), KINDS[kind], generator(seed))
    for m, name in enumerate(data.names):
        old, new = data.modalities[name], after.modalities[name]
        for i in after.corrupted[:, m].nonzero().flatten().tolist():
            j = (old[:, 0] == new[i, 0]).nonzero().flatten().tolist()            # column 0 tells where it comes from
            j = [row for row in j if there(data)[row, m]]
            assert len(j) == 1 and j != [i]
            assert same(new[i, touched(kind)], old[j[0], touched(kind)])


@given(seeds, st.integers(2, 20), st.lists(st.integers(0, 100), min_size=1, max_size=30))
def test_other_rows_are_other_rows(seed, total, rows):
    rows = torch.tensor(rows) % total
    others = other_rows(rows, total, generator(seed))
    assert (others != rows).all() and ((0 <= others) & (others < total)).all()


def test_a_swap_needs_another_row():
    lonely = MultimodalDataset({"a": torch.tensor([[1.], [torch.nan]]), "b": torch.ones(2, 1)})
    for run in (lambda: corrupt(lonely, {"a": 1.}, Swap()), lambda: corrupt_one(lonely, ["a"], 1., Swap())):
        with pytest.raises(MissingError, match="at least 2 rows"): run()


def test_the_other_row_is_any_other_row_equally_often():
    counts = other_rows(torch.full((8000,), 4), 5, generator(0)).bincount(minlength=5) / 8000
    torch.testing.assert_close(counts, torch.tensor([0.25, 0.25, 0.25, 0.25, 0.]), atol=0.03, rtol=0)
    rows = corrupt_one(make(0, 3000, absent=0.), ["a", "b", "c"], 0.6, Missing(), generator(1)).corrupted.float()
    torch.testing.assert_close(rows.mean(0), torch.full((3,), 0.2), atol=0.03, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_more_corruption_hits_the_same_rows_and_more(seed, p, q):
    data = make(seed, 40)
    for run in (lambda r: corrupt(data, {"a": r, "c": r}, Missing(), generator(seed)),
                lambda r: corrupt_one(data, ["a", "b"], r, Missing(), generator(seed))):
        assert not (run(min(p, q)).corrupted & ~run(max(p, q)).corrupted).any()


# Splitting and standardising

@settings(max_examples=80, deadline=None)
@given(seeds, st.integers(1, 60), st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_a_split_is_a_partition(seed, rows, shares):
    fractions, data = tuple(s / sum(shares) for s in shares), make(seed, rows, known=True)
    try: parts = data.split(fractions, generator(seed))
    except RangeError as error:
        assert "empty" in str(error) and min(fractions) * rows < 1.5
        return
    assert sorted(i for part in parts for i in part.ids) == sorted(data.ids)     # every row in exactly one part
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - fraction * rows) <= 1
        at = torch.tensor([data.ids.index(i) for i in part.ids])                 # and everything goes with it
        assert torch.equal(there(part), there(data)[at]) and torch.equal(part.corrupted, data.corrupted[at])
        for name in data.names: assert same(part.modalities[name], data.modalities[name][at])
    places = [[data.ids.index(i) for i in p.ids] for p in parts]
    assert [r.tolist() for r in split_rows(rows, fractions, generator(seed))] == places


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_moments_are_those_of_numpy(seed):
    for x in make(seed, 30).modalities.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mean, std = np.nanmean(x.double().numpy(), 0), np.nanstd(x.double().numpy(), 0)
        for found, expected in zip(column_moments(x), (mean, std)):
            torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-6, rtol=1e-6, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(20, 60), st.floats(0, 1), st.sampled_from(list(CORRUPTIONS)))
def test_corrupted_splits_are_the_rows_as_they_were_read(seed, rows, p, kind):
    "Every row in one part, and what isn't marked is what it was, to the bit; the target is never touched."
    data = make(seed, rows, absent=0.1)
    data = MultimodalDataset({name: 1000 + 50*x for name, x in data.modalities.items()}, data.present, ids=data.ids)
    try: parts = corrupted_splits(data, p, generator(seed), kind)
    except MissingError: return                                                  # a part may have no other row
    assert sorted(i for part in parts for i in part.ids) == sorted(data.ids)
    for part in parts:
        at = torch.tensor([data.ids.index(i) for i in part.ids])
        assert not part.corrupted[:, 0].any() and part.corrupted.sum(1).max() <= 1
        changed = torch.stack([differs(data.modalities[n][at], part.modalities[n]).any(1) for n in data.names], 1)
        assert not (changed & ~part.corrupted).any()
        if kind != "gaussian": assert torch.equal(changed, part.corrupted)       # a lone value is its own mean
    if p == 0: assert not any(part.corrupted.any() for part in parts)


@pytest.mark.parametrize("wrong, error, words", [
    (dict(corruption="noise"), UnknownNameError, "corruption: 'noise' is unknown"),
    (dict(p=1.5), RangeError, "p must lie in"),
    (dict(fractions=(0.5, 0.6)), RangeError, "fractions must be positive with sum 1"),
    (dict(fractions=(0.98, 0.01, 0.01)), RangeError, "leave a part empty")])
def test_a_split_that_cannot_be_is_named(wrong, error, words):
    with pytest.raises(error, match=words): corrupted_splits(make(0, 20), **{"p": 0.5, **wrong})


def test_names_of_columns_follow_the_modalities():
    data = MultimodalDataset({"a": torch.ones(4, 2), "b": torch.ones(4, 1)}, columns={"a": ["x", "y"], "b": ["z"]})
    assert data.select(["b", "a"])[1:3].columns == {"b": ["z"], "a": ["x", "y"]}
    assert data.select("b").split((0.5, 0.5))[0].columns == {"b": ["z"]}
    assert corrupt_one(data, ["a"], 1., Swap(), generator(0)).columns == data.columns
    with pytest.raises(ShapeError, match="must name each of the 2 columns, got 1"): replace(data, columns={"a": ["x"]})


# Synthetic-XNOR

@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(["swap", "gaussian", "flip", "missing"]), st.sampled_from(["one", "each"]),
       st.sampled_from(["full", "xnor"]),
       st.sampled_from([0., 0.4, 1.]), st.integers(8, 12), st.integers(0, 5), st.sampled_from([0.5, 1., 3.]),
       st.sampled_from([0., 3.]))
def test_xnor_is_a_product_where_it_is_clean(seed, corruption, which, signal, p, n_bits, spare, scale, noise):
    width = n_bits * (3 if signal == "full" else 1)
    options = dict(rows=40, corruption=corruption, which=which, signal=signal, n_bits=n_bits, dim=width + spare,
                   p_flip=1.,
                   signal_scale=scale, noise_std=noise)
    data, pure = (synthetic_xnor(p=q, **options, generator=generator(seed)) for q in (p, 0.))
    A, B, C = (x[:, :width] / scale for x in data.modalities.values())
    clean, hit = ~data.corrupted.any(1), data.corrupted
    assert torch.equal((B * C)[clean], A[clean]) and torch.equal(A.abs(), torch.ones_like(A))
    assert not hit[:, 0].any() and (which == "each" or hit.sum(1).max() <= 1)
    if p in (0, 1): assert torch.equal(hit.any(1), torch.full((40,), p == 1))
    assert torch.equal(there(data), ~hit if corruption == "missing" else torch.ones_like(hit))
    for m, name in enumerate("ABC"):
        changed = differs(data.modalities[name], pure.modalities[name])
        assert not changed[~hit[:, m]].any()
        if corruption in ("swap", "flip"): assert not changed[:, width:].any()   # the noise is the row's own
        if corruption == "flip": assert (changed[hit[:, m]].sum(1) == (2*n_bits if signal == "full" else n_bits)).all()


# Joining tables

POOL = ["1", "2", "30", "007", "NA", "nan", "x,y", "ü 1", 'quote"d', "3.0", "-4"]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_join_is_a_lookup_in_a_dict(tmp_path_factory, data):
    folder, tables = tmp_path_factory.mktemp("join"), {}
    for t in range(data.draw(st.integers(1, 4))):
        suffix = data.draw(st.sampled_from(["csv", "parquet", "int.parquet", "index.parquet"]))
        pool = [i for i in POOL if i in ("1", "2", "30", "-4")] if suffix == "int.parquet" else POOL
        ids = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=8, unique=True))
        width = data.draw(st.integers(1, 3))
        cells = st.one_of(st.none(), st.integers(-50, 50).map(lambda n: n / 4))
        table = {i: data.draw(st.lists(cells, min_size=width, max_size=width)) for i in ids}
        frame = pd.DataFrame(table.values(), columns=[f"c{c}" for c in range(width)], dtype="float64")
        where = data.draw(st.integers(0, width))
        frame.insert(where, "id", [int(i) for i in ids] if suffix == "int.parquet" else ids)
        path = folder/f"t{t}.{suffix.split('.')[-1]}"
        if suffix == "csv": frame.to_csv(path, index=False)
        else: (frame.set_index("id") if suffix == "index.parquet" else frame).to_parquet(path)
        tables[path] = table
    def alone(t): return not any(set(tables[t]) & set(tables[o]) for o in tables if o != t)
    stranger = [t for t in tables if len(tables) > 1 and alone(t)]
    if stranger:
        with pytest.raises(DataError, match=f"ids of '{stranger[0].stem}' join with no other"):
            load_tabular(list(tables))
        return
    ids = []
    for table in tables.values(): ids += [i for i in table if i not in ids]
    got = load_tabular(list(tables))
    assert got.ids == ids and got.names == [path.stem for path in tables]
    for path, table in tables.items():
        width = len(next(iter(table.values())))
        expected = torch.tensor([[torch.nan if v is None else v for v in table.get(i, [None]*width)] for i in ids])
        assert same(got.modalities[path.stem], expected)
        assert torch.equal(got.is_present(path.stem), ~expected.isnan().all(1))
    backwards = [path.stem for path in reversed(tables)]
    assert load_tabular(list(tables), names=backwards).names == backwards


# A person's files

def write(path, content):
    "A file: text as CSV, a dict as npz (of arrays) or as Parquet (of columns), bytes as they are."
    path.parent.mkdir(exist_ok=True, parents=True)
    if isinstance(content, bytes): path.write_bytes(content)
    elif isinstance(content, str): path.write_text(content, encoding="utf-8")
    elif path.suffix == ".npz": np.savez(path, **content)
    else: pd.DataFrame(content).to_parquet(path)
    return path


def refused(error, *parts, source, **options):
    "`load_tabular` raises this very error, and its message holds all the parts."
    with pytest.raises(error) as caught: load_tabular(source, **options)
    for part in parts: assert part in str(caught.value), f"{part!r} not in {caught.value}"
    assert isinstance(caught.value, (GatedSymileError, FileNotFoundError))


NPZ = {
    "mismatched rows": (dict(scan=np.ones((3, 2)), blood=np.ones(2)), ShapeError,
                        ["same rows", "'scan': 3", "'blood': 2"]),
    "ids for other rows": (dict(scan=np.ones(3), id=["a", "b"]), ShapeError, ["3 rows", "got 2"]),
    "duplicate ids": (dict(scan=np.ones(3), id=["a", "b", "b"]), DataError, ["duplicate", "'b'", "bad.npz"]),
    "blank id": (dict(scan=np.ones(2), id=["a", " "]), DataError, ["id missing", "row 1", "bad.npz"]),
    "ids with a fraction": (dict(scan=np.ones(2), id=[1., 2.]), DtypeError, ["ids", "float64", "bad.npz"]),
    "ids of bytes": (dict(scan=np.ones(2), id=[b"a", b"b"]), DtypeError, ["ids", "text", "bad.npz"]),
    "text": (dict(scan=np.ones(2), sex=["f", "m"]), DtypeError, ["'sex'", "no numbers", "bad.npz"]),
    "dates": (dict(day=np.array(["2020-01-01"], dtype="datetime64[D]")), DtypeError,
              ["'day'", "datetime64", "bad.npz"]),
    "complex": (dict(scan=np.array([1j])), DtypeError, ["'scan'", "complex128"]),
    "fields": (dict(scan=np.zeros(2, dtype=[("x", int), ("y", int)])), DtypeError, ["'scan'", "no numbers"]),
    "infinity": (dict(scan=np.array([[1.], [np.inf]])), NonFiniteError, ["'scan'", "infinity", "[1]"]),
    "too large": (dict(scan=np.array([1e300, 1.])), NonFiniteError, ["'scan'", "too large"]),
    "a cube": (dict(scan=np.ones((2, 2, 2))), ShapeError, ["'scan'", "(2, 2, 2)", "bad.npz"]),
    "a scalar": (dict(scan=np.float64(3)), ShapeError, ["'scan'", "()", "bad.npz"]),
    "no rows": (dict(scan=np.ones((0, 2))), ShapeError, ["'scan'", "(0, 2)"]),
    "no columns": (dict(scan=np.ones((2, 0))), ShapeError, ["'scan'", "(2, 0)"]),
    "nothing": ({}, DataError, ["no arrays", "bad.npz"]),
    "only ids": (dict(id=["a"]), DataError, ["no arrays", "bad.npz"]),
    "no zip": (b"hello", DataError, ["bad.npz", "no npz"]),
    "no bytes": (b"", DataError, ["bad.npz", "no npz"]),
    "a table of ids": (dict(scan=np.ones(2), id=[["a"], ["b"]]), GatedSymileError, ["id", "bad.npz"]),
    "ids with fields": (dict(scan=np.ones(2), id=np.zeros(2, dtype=[("x", int), ("y", int)])), GatedSymileError,
                        ["id", "bad.npz"]),
}

@pytest.mark.parametrize("case", NPZ)
def test_a_bad_npz_is_named(tmp_path, case):
    content, error, parts = NPZ[case]
    refused(error, "bad.npz", *parts, source=write(tmp_path/"bad.npz", content))


class Trap:
    "Unpickling it leaves a trace."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["scan", "id"])
def test_objects_are_never_unpickled(tmp_path, name):
    arrays = {"other": np.ones(1), name: np.array([Trap(tmp_path/"trace")], dtype=object)}
    refused(DataError, f"'{name}'", "never loaded", "bad.npz", source=write(tmp_path/"bad.npz", arrays))
    (tmp_path/"raw.npz").write_bytes(pickle.dumps(Trap(tmp_path/"trace")))
    refused(DataError, "raw.npz", source=tmp_path/"raw.npz")
    assert not (tmp_path/"trace").exists()


TABLES = {
    "no id column": ("name,x\na,1\n", DataError, ["no id column 'id'", "['name', 'x']"]),
    "other separator": ("id;x\na;1\n", DataError, ["separated by ';'", "commas are expected"]),
    "only ids": ("id\na\n", DataError, ["no columns besides the id"]),
    "only a header": ("id,x\n", DataError, ["no rows"]),
    "empty": ("", DataError, ["can't be read as csv"]),
    "blank lines": ("\n\n\n", DataError, ["can't be read as csv"]),
    "binary": (bytes(range(256)), DataError, ["can't be read as csv"]),
    "UTF-16": ("id,x\na,1\n".encode("utf-16"), DataError, ["can't be read as csv"]),
    "an open quote": ('id,x\n"a,1\nb,2\n', DataError, ["can't be read as csv"]),
    "a longer row": ("id,x\na,1\nb,1,2\n", DataError, ["can't be read as csv", "line 3"]),
    "longer rows": ("id,x\na,1,2\nb,1,2\n", DataError, ["more fields than the header"]),
    "trailing commas": ("id,x\n1,5,\n2,6,\n", DataError, ["more fields than the header"]),
    "duplicate ids": ("id,x\na,1\nb,2\na,3\n", DataError, ["1 duplicate ids", "'a'"]),
    "ids equal but for blanks": ("id,x\na,1\na ,2\n", DataError, ["duplicate"]),
    "missing id": ("id,x\na,1\n,2\n", DataError, ["id missing in 1 rows", "row 1"]),
    "duplicate columns": ("id,x,x\na,1,2\n", DataError, ["duplicate columns ['x']"]),
    "an index column": (",id,x\n0,a,1\n", DataError, ["no name", "index=False"]),
    "a nameless column": ("id,x, \na,1,2\n", DataError, ["no name"]),
    "text": ("id,x,y\na,1,low\nb,2,high\n", DtypeError, ["1 columns", "['y']"]),
    "a word among numbers": ("id,x\na,1\nb,n.a.\n", DtypeError, ["['x']"]),
    "decimal commas": ('id,x\na,"1,5"\n', DtypeError, ["['x']"]),
    "dates": ("id,day\na,2020-01-01\n", DtypeError, ["['day']"]),
    "infinity": ("id,x,y\na,1,inf\n", NonFiniteError, ["infinity", "['y']"]),
    "too large": ("id,x\na,1e300\n", NonFiniteError, ["['x']"]),
}

@pytest.mark.parametrize("case", TABLES)
def test_a_bad_csv_is_named(tmp_path, case):
    content, error, parts = TABLES[case]
    write(tmp_path/"clinic"/"good.csv", "id,x\na,1\nb,2\n")
    refused(error, "bad.csv", *parts, source=write(tmp_path/"clinic"/"bad.csv", content))
    refused(error, "bad.csv", *parts, source=tmp_path/"clinic")                  # in a folder, too
    assert load_tabular(tmp_path/"clinic", names="good").ids == ["a", "b"]       # what isn't asked for isn't read


PARQUET = {
    "no id column": (dict(x=[1., 2.]), DataError, ["no id column 'id'", "['x']"]),
    "no rows": (dict(id=[], x=[]), DataError, ["no rows"]),
    "missing id": (dict(id=["a", None], x=[1, 2]), DataError, ["id missing in 1 rows"]),
    "whole ids with a hole": (dict(id=pd.array([1, None], dtype="Int64"), x=[1, 2]), DataError,
                              ["id missing in 1 rows"]),
    "ids with a fraction": (dict(id=[1., 2.], x=[1, 2]), DtypeError, ["whole numbers or text", "float64"]),
    "dates as ids": (dict(id=pd.to_datetime(["2020", "2021"]), x=[1, 2]), DtypeError,
                     ["whole numbers or text", "datetime"]),
    "duplicate ids": (dict(id=[7, 7], x=[1, 2]), DataError, ["1 duplicate ids", "'7'"]),
    "text": (dict(id=["a", "b"], x=["1", "2"]), DtypeError, ["['x']"]),
    "lists": (dict(id=["a", "b"], x=[[1, 2], [3]]), DtypeError, ["['x']"]),
    "dates": (dict(id=["a", "b"], day=pd.to_datetime(["2020", "2021"])), DtypeError, ["['day']"]),
    "infinity": (dict(id=["a", "b"], x=[1, -np.inf]), NonFiniteError, ["infinity", "['x']"]),
    "no Parquet": (b"id,x\na,1\n", DataError, ["can't be read as parquet"]),
    "no bytes": (b"", DataError, ["can't be read as parquet"]),
}

@pytest.mark.parametrize("case", PARQUET)
def test_a_bad_parquet_is_named(tmp_path, case):
    content, error, parts = PARQUET[case]
    refused(error, "bad.parquet", *parts, source=write(tmp_path/"bad.parquet", content))


def test_an_id_that_is_both_index_and_column_is_named(tmp_path):
    pd.DataFrame(dict(id=["a"], x=[1]), index=pd.Index(["q"], name="id")).to_parquet(tmp_path/"bad.parquet")
    refused(DataError, "bad.parquet", "id", source=tmp_path/"bad.parquet")


@pytest.mark.parametrize("names", [["id", "x"], ["x", "id"]])
def test_an_index_level_that_is_also_a_column_is_named(tmp_path, names):
    index = pd.MultiIndex.from_arrays([["a"], ["b"]], names=names)
    pd.DataFrame(dict(x=[1]), index=index).to_parquet(tmp_path/"bad.parquet")
    refused(DataError, "bad.parquet", "index", "x", source=tmp_path/"bad.parquet")


@pytest.mark.parametrize("source", [None, 3, [None], b"scan.csv", {"scan": "scan.csv"}])
def test_a_source_that_is_no_path_is_refused(source):
    refused(DtypeError, "source", "None" if source == [None] else repr(source), source=source)


def test_an_unknown_name_lists_what_there_is(tmp_path):
    npz = write(tmp_path/"study.npz", dict(scan=np.ones(2), blood=np.ones(2), id=["a", "b"]))
    for name in ("scan", "blood"): write(tmp_path/"clinic"/f"{name}.csv", "id,x\na,1\n")
    for source in (npz, tmp_path/"clinic", sorted((tmp_path/"clinic").iterdir())):
        refused(UnknownNameError, "'scans'", "'blood'", "'scan'", "did you mean 'scan'", source=source, names=["scans"])
        refused(UnknownNameError, "'id'", source=source, names=["id"])
        refused(UnknownNameError, "differ", source=source, names=["scan", "scan"])
        refused(ShapeError, "at least one", source=source, names=[])
    refused(DataError, "no id column 'patient'", source=tmp_path/"clinic", id="patient")


def test_ids_that_do_not_join_are_shown(tmp_path):
    write(tmp_path/"blood.csv", "id,x\n1,1\n2,2\n"); write(tmp_path/"scan.parquet", dict(id=["P1", "P2"], y=[1, 2]))
    refused(DataError, "'blood'", "'1'", "'P1'", "scan", source=tmp_path)
    write(tmp_path/"scan.parquet", dict(id=[2, 3], y=[1, 2]))                    # the integer 2 is "2"
    assert load_tabular(tmp_path).ids == ["1", "2", "3"]


def test_unknown_files_and_folders(tmp_path):
    for name in ("study.npz", "blood.csv", "clinic"): refused(FileNotFoundError, name, source=tmp_path/name)
    refused(FileNotFoundError, "blood.csv", source=[tmp_path/"blood.csv"])
    refused(DataError, tmp_path.name, "empty", source=tmp_path)
    write(tmp_path/"notes.txt", "hello")
    write(tmp_path/".hidden.csv", "id,x\na,1\n")
    write(tmp_path/"old.csv"/"x.csv", "id,x\na,1\n")
    refused(DataError, tmp_path.name, "only", "notes.txt", "old.csv", source=tmp_path)
    refused(DataError, "notes.txt", source=tmp_path/"notes.txt")
    refused(DataError, "notes.txt", source=[tmp_path/"notes.txt"])
    refused(DataError, "a name of its own", "[]", source=[])


def test_two_tables_of_one_name_are_refused(tmp_path):
    write(tmp_path/"blood.csv", "id,x\na,1\n"); write(tmp_path/"blood.parquet", dict(id=["a"], x=[1]))
    refused(DataError, "a name of its own", "blood.csv", "blood.parquet", source=tmp_path)


def test_other_files_of_a_folder_are_passed_over_aloud(tmp_path):
    write(tmp_path/"blood.csv", "id,x\na,1\n")
    write(tmp_path/"notes.txt", "hello")
    (tmp_path/"gone.csv").symlink_to(tmp_path/"nowhere.csv")
    with pytest.warns(UserWarning, match="gone.csv, notes.txt"): assert load_tabular(tmp_path).names == ["blood"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything is readable here")
@pytest.mark.parametrize("name", ["blood.csv", "study.npz"])
def test_a_file_that_may_not_be_read_is_named(tmp_path, name):
    path = write(tmp_path/name, "id,x\na,1\n" if name.endswith("csv") else dict(x=np.ones(2)))
    path.chmod(0)
    refused(DataError, name, "Permission denied", source=path)


@pytest.mark.parametrize("name", ["blood.csv", "study.npz"])
def test_a_file_that_will_not_open_is_named(tmp_path, name, monkeypatch):
    path, real = write(tmp_path/name, "id,x\na,1\n" if name.endswith("csv") else dict(x=np.ones(2))), io.open
    def locked(file, *args, **options):
        "As the system refuses it, for a user (root, say) to whom everything opens."
        if str(file) == str(path): raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **options)
    for module in (io, builtins): monkeypatch.setattr(module, "open", locked)
    refused(DataError, name, "Permission denied", source=path)


def test_odd_column_names_are_fine(tmp_path):
    names = ["ü ß", "NA", "1", "x.1", "a,b", "日本", " padded ", "type", "id2"]
    frame = pd.DataFrame([range(len(names))], columns=names).assign(id="a")
    frame.to_csv(tmp_path/"odd.csv", index=False); frame.to_parquet(tmp_path/"Odd table (v2).parquet")
    got = load_tabular(tmp_path)
    assert got.names == ["Odd table (v2)", "odd"]
    for x in got.modalities.values(): assert x.tolist() == [list(range(len(names)))]


def test_what_is_partly_empty_is_a_hole_and_what_is_empty_is_absent(tmp_path):
    write(tmp_path/"blood.csv", "id,iron,zinc,lead\na,1,,\nb,,,\nc,3,7,\n")
    write(tmp_path/"scan.csv", "id,x\na,1\nb,2\nc,3\n")
    got = load_tabular(tmp_path)
    assert got.present.tolist() == [[True, True], [False, True], [True, True]]
    assert same(got.modalities["blood"], torch.tensor([[1, torch.nan, torch.nan], [torch.nan]*3, [3, 7, torch.nan]]))


@pytest.mark.parametrize("number", ["1e400", "-1e400", "9"*400, "1e300", "inf"])
@pytest.mark.parametrize("others", ["1", ""])
def test_a_number_too_large_is_not_called_text(tmp_path, number, others):
    write(tmp_path/"blood.csv", f"id,iron\na,{number}\nb,{others}\n")
    refused(NonFiniteError, "blood.csv: infinity (or a value too large for float32) in 1 columns, such as ['iron']",
            source=tmp_path/"blood.csv")


# Damage

def study(folder, kind):
    "A sound file, and its bytes."
    columns = dict(id=[f"p{i}" for i in range(20)], x=np.arange(20.), y=np.arange(20.) % 7)
    path = folder/f"study.{kind.split()[0]}"
    if kind == "npz compressed": np.savez_compressed(path, **columns)
    else: write(path, columns)
    assert len(load_tabular(path)) == 20
    return path, path.read_bytes()


@pytest.mark.parametrize("kind", ["npz", "npz compressed", "parquet"])
def test_a_truncated_file_is_named(tmp_path, kind):
    path, whole = study(tmp_path, kind)
    for length in [*range(0, len(whole), max(1, len(whole)//60)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(DataError, path.name, source=path)


@pytest.mark.parametrize("kind", ["npz", "npz compressed", "parquet"])
def test_a_flipped_bit_is_never_a_raw_error(tmp_path, kind):
    path, whole = study(tmp_path, kind)
    draw, raw = random.Random(0), {}
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try: load_tabular(path)                                                  # some bits don't matter
        except GatedSymileError: pass
        except Exception as error: raw[type(error).__name__] = str(error)
    assert not raw
