"Tables: intersection, id maps, given splits, categories, and what is wrong with each, by name."
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from gated_symile.core import DataError, DtypeError, GatedSymileError, MissingError, UnknownNameError
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.data.tabular import join_ids, load_tabular, mapped_ids, read_id_map, read_ids, split_by_ids


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def write(path, **columns):
    "A table in the format of its suffix."
    frame = pd.DataFrame(columns)
    kind = path.suffix[1:]
    if kind == "csv": frame.to_csv(path, index=False)
    else: getattr(frame, f"to_{kind}")(path)
    return path


def refused(error, *parts, call):
    with pytest.raises(error) as caught: quietly(call)
    assert isinstance(caught.value, (GatedSymileError, FileNotFoundError))
    for part in parts: assert part in str(caught.value), f"{part!r} not in {caught.value}"


ids = st.lists(st.sampled_from([str(i) for i in range(12)]), min_size=1, max_size=12, unique=True)

@settings(max_examples=60, deadline=None)
@given(st.lists(ids, min_size=1, max_size=4), st.sampled_from(["union", "intersect"]))
def test_join_ids_is_that_of_sets(lists, join):
    tables = {f"t{i}": own for i, own in enumerate(lists)}
    strangers = len(lists) > 1 and any(not set(a) & set().union(*(b for b in lists if b is not a)) for a in lists)
    together = set.union(*map(set, lists)) if join == "union" else set.intersection(*map(set, lists))
    if strangers or not together:
        with pytest.raises(DataError): quietly(join_ids, tables, join)
        return
    found, places = quietly(join_ids, tables, join)
    assert set(found) == together and len(set(found)) == len(found)
    for name, own in tables.items():
        assert [own[p] if p >= 0 else None for p in places[name].tolist()] == [i if i in own else None for i in found]


@pytest.mark.parametrize("kind", ["feather", "parquet", "csv"])
def test_the_same_table_in_each_format(tmp_path, kind):
    write(tmp_path/f"a.{kind}", eid=[3, 1, 2], x=[.5, np.nan, 2], y=[1, 0, 1])
    write(tmp_path/f"b.{kind}", eid=[2, 3], z=[7., 8])
    union, both = load_tabular(tmp_path, id="eid"), quietly(load_tabular, tmp_path, id="eid", join="intersect")
    assert union.ids == ["3", "1", "2"] and both.ids == ["3", "2"] and both.present is None
    assert union.modalities["b"][:, 0].nan_to_num(-1).tolist() == [8, -1, 7]
    assert both.modalities["a"].tolist() == [[.5, 1], [2, 1]] and both.columns == union.columns
    refused(DataError, f"a.{kind}", "no id column 'id'", call=lambda: load_tabular(tmp_path))


def test_an_intersection_says_what_it_leaves_out(tmp_path):
    write(tmp_path/"a.csv", id=["x", "y", "z"], v=[1, 2, np.nan])
    write(tmp_path/"b.csv", id=["x", "y", "z"], w=[1, np.nan, 1])
    with pytest.warns(UserWarning, match="2 of 3 rows left out, which lack a modality"):
        assert load_tabular(tmp_path, join="intersect").ids == ["x"]       # a row of holes is an absent one
    write(tmp_path/"b.csv", id=["x", "y", "z"], w=[np.nan, np.nan, 1])
    refused(DataError, "no row has all of 'a', 'b'", call=lambda: load_tabular(tmp_path, join="intersect"))


def test_a_map_translates_the_ids_of_one_table(tmp_path):
    write(tmp_path/"a.csv", id=[1, 2, 3], v=[1, 2, 3])
    write(tmp_path/"b.csv", id=[70, 50, 60], w=[7, 5, 6])
    (tmp_path/"maps").mkdir()
    maps = {"b": write(tmp_path/"maps"/"b.csv", b=[50, 60, 80], id=[2, 3, 4])}
    refused(DataError, "join with no other table", call=lambda: load_tabular(tmp_path))
    with pytest.warns(UserWarning, match=r"1 of 3 ids of 'b' are not in its id map, such as \['70'\]: left out"):
        got = load_tabular([tmp_path/"a.csv", tmp_path/"b.csv"], id_maps=maps)
    assert got.ids == ["1", "2", "3"] and got.modalities["b"][:, 0].nan_to_num(-1).tolist() == [-1, 5, 6]
    turned = write(tmp_path/"maps"/"turned.csv", id=[2, 3, 4], b=[50, 60, 80])
    files = [tmp_path/"a.csv", tmp_path/"b.csv"]
    refused(DataError, "exchange the two", call=lambda: load_tabular(files, id_maps={"b": turned}))
    refused(UnknownNameError, "id_maps", "'c'", call=lambda: load_tabular(files, id_maps={"c": turned}))
    twice = write(tmp_path/"maps"/"twice.csv", b=[50, 60], id=[2, 2])
    refused(DataError, "twice.csv, 'id'", "duplicate", call=lambda: load_tabular(files, id_maps={"b": twice}))
    assert mapped_ids(["50"], read_id_map(maps["b"]), "b") == (["2"], [0])


def people(n): return MultimodalDataset({"a": torch.arange(n)[:, None] + 1.}, ids=[f"p{i}" for i in range(n)])

@pytest.mark.parametrize("kind", ["txt", "csv", "feather", "list"])
def test_given_splits(tmp_path, kind):
    order = [f"p{i}" for i in random.Random(0).sample(range(20), 20)]
    parts, files = {"train": order[:12], "val": order[12:15], "test": order[15:]}, {}
    for name, own in parts.items():
        path = tmp_path/f"{name}.{kind}"
        if kind == "list": files[name] = own
        elif kind == "txt": path.write_text("\n".join(own)); files[name] = path
        else: files[name] = write(path, id=own)
    got = split_by_ids(people(20), files)
    assert {name: part.ids for name, part in got.items()} == parts
    assert all(f"p{int(x) - 1}" == id for part in got.values() for id, x in zip(part.ids, part.modalities["a"]))


def test_wrong_splits_are_named(tmp_path):
    data = people(6)
    refused(DataError, "'train' and 'test' share 1 ids", "'p1'",
            call=lambda: split_by_ids(data, {"train": ["p0", "p1"], "test": ["p1"]}))
    refused(DataError, "1 of 2 ids of 'test' are in no row", "'P1'", "leave out",
            call=lambda: split_by_ids(data, {"train": ["p0"], "test": ["p1", "P1"]}))
    refused(DataError, "rows have ['p0'", call=lambda: split_by_ids(data, {"test": ["P1"]}, unknown="leave out"))
    refused(DataError, "'test'", "duplicate", call=lambda: split_by_ids(data, {"test": ["p1", "p1"]}))
    refused(FileNotFoundError, "nothing.txt", call=lambda: split_by_ids(data, {"test": tmp_path/"nothing.txt"}))
    refused(MissingError, "no ids", call=lambda: split_by_ids(MultimodalDataset(data.modalities), {"test": ["p1"]}))
    refused(UnknownNameError, "unknown", call=lambda: split_by_ids(data, {"test": ["p1"]}, unknown="skip"))
    (tmp_path/"empty.txt").write_text("\n")
    refused(DataError, "empty.txt: no ids", call=lambda: read_ids(tmp_path/"empty.txt"))
    with pytest.warns(UserWarning, match="5 of 6 rows are in none of 'test'"): split_by_ids(data, {"test": ["p1"]})


CATEGORIES = {
    "words": (["f", "m", None, "f"], "one-hot", ["c=f", "c=m"], [[1, 0], [0, 1], [-1, -1], [1, 0]]),
    "given": (["f", "m", None, "f"], {"c": ["m", "x", "f"]}, ["c=m", "c=x", "c=f"],
              [[0, 0, 1], [1, 0, 0], [-1]*3, [0, 0, 1]]),
    "codes": ([2, 1, None, 2], {"c": [1, 2]}, ["c=1", "c=2"], [[0, 1], [1, 0], [-1, -1], [0, 1]]),
}

@pytest.mark.parametrize("kind", ["feather", "parquet", "csv"])
@pytest.mark.parametrize("case", CATEGORIES)
def test_categories_become_columns(tmp_path, case, kind):
    values, categories, columns, expected = CATEGORIES[case]
    got = load_tabular(write(tmp_path/f"t.{kind}", id=list("abcd"), age=[1, 2, 3, 4], c=values), categories=categories)
    assert got.columns["t"] == ["age", *columns]
    assert got.modalities["t"][:, 1:].nan_to_num(-1).tolist() == expected


def test_the_error_shows_the_line_that_encodes(tmp_path):
    table = write(tmp_path/"t.csv", id=list("abc"), sex=["m", "f", "m"], low=["<0.1", "0.3", "0.2"])
    with pytest.raises(DtypeError) as caught: load_tabular(table)
    line = "load_tabular(..., categories={'sex': ['f', 'm']})"
    assert line in str(caught.value) and "'low'" in str(caught.value)
    refused(DtypeError, "['low']", call=lambda: load_tabular(table, categories="one-hot"))  # a spoilt number is no word
    refused(DataError, "column 'sex' holds ['m']", call=lambda: load_tabular(table, categories={"sex": ["f"]}))
    refused(UnknownNameError, "categories", "'sax'", call=lambda: load_tabular(
        write(tmp_path/"u.csv", id=["a"], x=[1]), categories={"sax": ["f"]}))
    names = write(tmp_path/"names.csv", id=range(60), name=[f"n{i}" for i in range(60)])
    refused(DtypeError, "'name'", call=lambda: load_tabular(names, categories="one-hot"))
