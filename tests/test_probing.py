"Probes: what they find, what they leave out and count, and that no test row is looked at before the end."
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from gated_symile.core import generator, DataError, DtypeError, MissingError, ShapeError, UnknownNameError
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.encoders import Flat
from gated_symile.model import MultimodalModel
from gated_symile.objectives.linear import LinearGaussian
from gated_symile.objectives.symile import Symile
from gated_symile.probing import embedding_views, label_kind, probe

N, D = 300, 6


def made(objective=None, seed=0, holes=False):
    "A model that hands on its rows, two parts of them, and labels: one in `a`, one in both, and a number."
    g = generator(seed)
    x = {name: torch.randn(2*N, D, generator=g) for name in "ab"}
    level = (x["a"][:, 0] > -0.4).long() + (x["a"][:, 0] > 0.4)
    labels = pd.DataFrame({"kind": np.array(["low", "mid", "high"])[level.numpy()],
                           "sick": ((x["a"][:, 0] + x["b"][:, 1]) > 0).numpy(),
                           "dose": (3*x["b"][:, 2] + 0.3*torch.randn(2*N, generator=g)).numpy()})
    if holes: x["b"][::4] = torch.nan
    model = MultimodalModel({name: Flat(D, D) for name in "ab"}, objective or LinearGaussian(), standardise=False)
    data = MultimodalDataset(x, ids=list(range(2*N)))
    return model, data[:N], data[N:], labels[:N], labels[N:]


@pytest.fixture(scope="module")
def table(): return probe(*made(), resamples=200)


def test_finds_what_is_there_and_not_what_is_not(table):
    value = table.query("probe == 'linear'").set_index(["label", "view", "metric"])["value"]
    assert value["kind", "a", "auroc"] > 0.85 and abs(value["kind", "b", "auroc"] - 0.5) < 0.1
    assert value["sick", "concatenated", "accuracy"] > 0.93 > 0.85 > value["sick", "a", "accuracy"]
    assert value["dose", "b", "r2"] > 0.97 and value["dose", "a", "r2"] < 0.1
    near = table.query("probe == 'knn'").set_index(["label", "view", "metric"])["value"]
    assert near["dose", "b", "r2"] > 0.5 and near["sick", "concatenated", "auroc"] > 0.8


def test_the_table_is_whole(table):
    views, probes = ["a", "b", "concatenated", "product"], 2
    assert list(table["view"].unique()) == views
    assert len(table) == len(views) * probes * (3 + 3 + 1)
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    assert (table["n_train"] == N).all() and (table["unlabelled"] == 0).all()
    chance = table.query("label == 'sick' and metric == 'accuracy'")["chance"]
    assert ((0.4 < chance) & (chance < 0.6)).all()


def test_auroc_of_three_classes_is_scikit_learns():
    model, train, test, a, b = made()
    from gated_symile.probing import _fitted, _macro, _views_of, STRENGTHS
    x, y = _views_of(model, train)["a"][0], a["kind"].to_numpy().astype(str)
    fitted, new = _fitted("linear", "class", x, y, 0, STRENGTHS), _views_of(model, test)["a"][0]
    scores, truth = fitted.predict_proba(new), b["kind"].to_numpy().astype(str)
    expected = roc_auc_score(truth, scores, multi_class="ovr", average="macro", labels=fitted.classes_)
    assert _macro(scores, truth, list(fitted.classes_))(torch.arange(N)[None]).item() == pytest.approx(expected)
    assert probe(model, train, test, a[["kind"]], b[["kind"]], views="a", probes="linear").set_index("metric")["value"][
        "auroc"] == pytest.approx(expected)


def test_rows_without_label_or_modality_are_left_out_and_counted():
    model, train, test, a, b = made(holes=True)
    a, b = a[["dose"]].astype(object), b[["dose"]].astype(float)
    a.iloc[3:13] = None; b.iloc[:6] = np.nan
    lines = probe(model, train, test, a, b, kinds={"dose": "number"}, probes="linear").set_index("view")
    assert lines.loc["a", ["n_train", "n_test", "unlabelled", "absent"]].tolist() == [N - 10, N - 6, 16, 0]
    gone = sum(i % 4 == 0 for i in range(N) if not 3 <= i < 13), sum((N + i) % 4 == 0 for i in range(6, N))
    assert lines.loc["b", ["n_train", "n_test", "absent"]].tolist() == [N - 10 - gone[0], N - 6 - gone[1], sum(gone)]
    assert lines.loc["product", "absent"] == 0 and lines.loc["concatenated", "n_test"] == N - 6
    assert lines.loc["b", "value"] > 0.9 > lines.loc["concatenated", "value"] > 0.4


def test_test_rows_teach_nothing():
    "Whatever the test labels are, the probe is the same: right where they are as before, wrong where they are not."
    model, train, test, a, b = made()
    flipped = b[["sick"]].copy(); flipped.iloc[:100] = ~flipped.iloc[:100]
    options = dict(views="concatenated", probes="linear")
    before, after = (probe(model, train, test, a[["sick"]], labels, **options).set_index("metric")["value"]["accuracy"]
                     for labels in (b[["sick"]], flipped))
    first = probe(model, train, test[:100], a[["sick"]], b[["sick"]][:100], **options)
    first = first.set_index("metric")["value"]["accuracy"]
    assert after == pytest.approx(before - (2*first - 1) * 100 / N)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, pd.Series], ids=["list", "array", "tensor", "series"])
def test_one_label_of_any_kind(kind):
    model, train, test, a, b = made()
    a, b = (kind(x["sick"].astype(int).tolist()) for x in (a, b))
    found = probe(model, train, test, a, b, views="concatenated", probes="linear")
    assert found["label"].tolist() == ["label"]*3 and found["value"].min() > 0.9
    several = probe(model, train, test, {"x": a, "y": a}, {"x": b, "y": b}, views="a", probes="knn", resamples=20)
    assert several["label"].tolist() == ["x"]*3 + ["y"]*3


def test_a_seed_is_a_result():
    one, two = (probe(*made(), views=["a"], resamples=50, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(one, two)


def test_rare_and_unknown_classes():
    "A class of a single training row is fitted, one that only test rows have is an error of theirs."
    model, train, test, a, b = made()
    a, b = a["kind"].to_numpy().copy(), b["kind"].to_numpy().copy()
    a[0], b[:30] = "rare", "new"
    found = probe(model, train, test, a, b, views="a", resamples=50)
    assert found["value"].notna().all() and (found.query("metric == 'accuracy'")["value"] <= 0.9 + 1e-9).all()
    one_kind = probe(model, train, test, a, ["low"]*N, views="a", resamples=20)
    assert one_kind.query("metric == 'auroc'")["value"].isna().all()


def test_product_and_present():
    x = {"a": torch.eye(3), "b": torch.ones(3, 3)}
    present = torch.tensor([[True, True], [True, False], [False, False]])
    views = embedding_views(x, present)
    assert torch.allclose(views["product"][0][:2], torch.stack([3**0.5*torch.eye(3)[0], torch.eye(3)[1]]))
    assert views["product"][1].tolist() == views["concatenated"][1].tolist() == [True, True, False]
    assert views["concatenated"][0][1, 3:].abs().sum() == 0


def test_kinds_of_labels():
    assert label_kind(pd.Series([1., 2., np.nan])) == "class" and label_kind(pd.Series([1.5, 2.])) == "number"
    assert label_kind(pd.Series(range(21))) == "number"
    assert label_kind(pd.Series(["1", "2"]).astype("category")) == "class"


@pytest.mark.parametrize("change, error, words", [
    (dict(test=1), DtypeError, "test must be a MultimodalDataset, got int"),
    (dict(overlap=True), DataError, "share 10 rows"),
    (dict(train_labels=[1, 2]), ShapeError, "one value for each of 300 rows, got 2"),
    (dict(test_labels={"other": [1]*N}), UnknownNameError, "test_labels: 'sick' is unknown"),
    (dict(views=["c"]), UnknownNameError, "views: 'c' is unknown"),
    (dict(probes=["tree"]), UnknownNameError, "probes: 'tree' is unknown"),
    (dict(kinds={"sick": "order"}), UnknownNameError, "order"),
    (dict(train_labels={"sick": [np.nan]*N}), MissingError, "0 rows have the label"),
    (dict(train_labels={"sick": [True]*N}), MissingError, "only the class"),
])
def test_errors_name_what_is_wrong(change, error, words):
    model, train, test, a, b = made()
    call = dict(model=model, train=train, test=test, train_labels=a[["sick"]], test_labels=b[["sick"]])
    if change.pop("overlap", False):
        x = {name: torch.cat([train.modalities[name][:10], v[10:]]) for name, v in test.modalities.items()}
        call["test"] = MultimodalDataset(x, ids=[*train.ids[:10], *test.ids[10:]])
    if change.get("test") == 1: call["test_labels"] = b[["sick"]]
    with pytest.raises(error, match=words): probe(**{**call, **change})


def test_directions_or_not_is_the_models_business():
    assert probe(*made(Symile()), views=["a"], probes="linear", resamples=20)["value"].max() > 0.8


def test_scikit_learn_is_imported_when_it_is_needed():
    code = "import sys, gated_symile.probing; assert not any(m.split('.')[0] == 'sklearn' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
