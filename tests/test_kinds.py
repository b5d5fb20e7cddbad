"What kind of information models keep: the table, whole-batch copies, labels as a modality, and the template."
import json
import math

import pandas as pd
import pytest
import torch
from torch import nn

from gated_symile.augment import Chain, Noise, Views
from gated_symile.core import DtypeError, MissingError, UnknownNameError, generator
from gated_symile.data.bits import BitViews, bits_labels, synthetic_bits
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.encoders import Flat, MLP
from gated_symile.kinds import information, whole_rows
from gated_symile.model import MultimodalModel
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.comm import CoMM
from gated_symile.objectives.supervised import Supervised
from gated_symile.training import fit, minus_loss
from templates import run_cells

ROWS = synthetic_bits(240, 3, 2, generator(0))
TRAIN, TEST = ROWS[:140], ROWS[140:]


def model_of(objective, augment=None, standardise=False):
    torch.manual_seed(0)
    return MultimodalModel({name: MLP(5, 16, width=16) for name in ROWS.names}, objective, standardise, augment)


# Copies of all modalities at once

def test_one_module_may_alter_all_modalities():
    "The loss is that of two copies, made one after the other from one generator."
    views = BitViews(flip=0.5)
    model, draws = model_of(CoMM(3, 16), views), generator(1)
    one, two = ([model.encode_modality(n, x) for n, x in views(ROWS[:8].modalities, draws).items()] for _ in range(2))
    expected = model.objective(one, None, None, two)
    assert torch.equal(model.loss(ROWS[:8].modalities, generator=generator(1)), expected)


def test_a_dict_is_its_views():
    changes = {"A": Noise(p=1.), "C": Chain([Noise(0.2)])}
    losses = [model_of(CoMM(3, 16), augment).loss(ROWS[:8].modalities, generator=generator(2))
              for augment in (changes, Views(changes))]
    assert torch.equal(*losses)


def test_what_is_missing_stays_missing_in_copies_of_all():
    model, rows = model_of(CoMM(3, 16), BitViews()), ROWS[:12].modalities
    present = torch.tensor([[True, True, False], [True, False, True], [False, True, True]]).repeat(4, 1)
    losses = [model.loss({n: torch.where(present[:, m, None], x, wrong) for m, (n, x) in enumerate(rows.items())},
                         present, generator(0)) for wrong in (0., math.nan, 7.)]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def test_an_encoder_sees_nothing_but_zero_of_absent_rows():
    "In both copies, whatever an augmentation put there."
    model, seen = model_of(CoMM(3, 16), BitViews()), []
    present = torch.tensor([[True, True, False], [True, True, True]] * 4)
    list(model.encoders.values())[2].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.loss(ROWS[:8].modalities, present, generator(0))
    assert len(seen) == 2 and all((x[::2] == 0).all() and (x[1::2] != 0).all() for x in seen)


@pytest.mark.parametrize("augment", [BitViews(flip=0.3, anew=False), {"B": Noise(0.2)}])
def test_a_file_remakes_its_augmentation(tmp_path, augment):
    model = model_of(CoMM(3, 16), augment)
    model.save(tmp_path/"a.safetensors")
    again = MultimodalModel.load(tmp_path/"a.safetensors")
    losses = [m.loss(ROWS[:8].modalities, generator=generator(0)) for m in (model, again)]
    assert torch.equal(*losses) and again.augment.settings() == model.augment.settings()


def test_an_augmentation_without_settings_is_asked_for(tmp_path):
    class Own(nn.Module):
        def forward(self, batch, generator=None): return batch
    model_of(CoMM(3, 16), Own()).save(tmp_path/"a.safetensors")
    again = MultimodalModel.load(tmp_path/"a.safetensors")
    with pytest.raises(MissingError, match="made by Own, .* pass it to load, as augment"): again.loss(ROWS[:8])
    assert MultimodalModel.load(tmp_path/"a.safetensors", augment=Own()).loss(ROWS[:8]).isfinite()
    assert torch.equal(again.represent(TEST), MultimodalModel.load(tmp_path/"a.safetensors").represent(TEST))


# The table

def asked(models, **options):
    return information(models, TRAIN, TEST, bits_labels(TRAIN), bits_labels(TEST),
                       **{"C": 0.1, "resamples": 20, **options})


def test_each_model_is_asked_for_each_kind():
    table = asked({"fused": model_of(CoMM(3, 16)), "side by side": model_of(PairwiseCLIP())}, without="C")
    views = table.groupby("model")["view"].agg(set)
    assert views["fused"] == {*"ABC", "fused"} and views["side by side"] == {*"ABC", "concatenated", "product"}
    assert set(table["kind"]) == set(bits_labels(ROWS)) and set(table["without"]) == {"", "C"}
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    assert not len(table.query("view == 'C' and without == 'C'")) and (table["chance"] == 0.5).all()
    short = whole_rows(table)
    assert list(short.index) == [("fused", "fused"), ("side by side", "concatenated"), ("side by side", "product")]


def test_a_hidden_modality_is_left_out_of_every_view():
    "What is in its place changes nothing, NaN included; the other modalities are what they were."
    models = {"fused": model_of(CoMM(3, 16)), "side by side": model_of(PairwiseCLIP())}
    hidden = asked(models, without="B").query("without == 'B'")
    other = TEST.modalities | {"B": torch.full_like(TEST.modalities["B"], 9.)}
    changed = information(models, TRAIN, MultimodalDataset(other), bits_labels(TRAIN), bits_labels(TEST), "B", C=0.1,
                          resamples=20).query("without == 'B'")
    assert hidden["value"].tolist() == changed["value"].tolist() and len(hidden)


def test_numbers_are_asked_for_once_by_r2():
    weight = [rows.modalities["A"][:, 1] * 10 + torch.arange(len(rows)) / 1000 for rows in (TRAIN, TEST)]
    table = information(model_of(CoMM(3, 16)), TRAIN, TEST, *({"weight": w} for w in weight), resamples=20,
                        probes=["balanced", "linear"])
    assert set(table["metric"]) == {"r2"} and len(table) == 4 and table.query("view == 'A'")["value"].item() > 0.9


# Labels as a modality

def with_labels(rows): return MultimodalDataset({**rows.modalities,
                                                 "labels": torch.stack([*bits_labels(rows).values()], 1).float()})


def test_training_on_labels_is_a_fit_like_any_other():
    torch.manual_seed(0)
    encoders = {**{name: MLP(5, 16, width=16) for name in ROWS.names}, "labels": Flat(5, 16)}
    model = MultimodalModel(encoders, Supervised(4, 16, [2]*5), standardise=False)
    history = fit(model, with_labels(TRAIN), with_labels(TEST), steps=120, batch_size=35, learning_rate=1e-2,
                  validate=minus_loss,
                  progress=False)
    assert history["valid"].max() > -0.5                                               # guessing: -log 2, -0.69
    unknown = MultimodalDataset({**TEST.modalities, "labels": torch.full((len(TEST), 5), -1.)})
    assert torch.equal(model.represent(unknown, ROWS.names), model.represent(with_labels(TEST), ROWS.names))


# The template

def run(tmp_path, **parameters):
    given = dict(methods=["CoMM", "PairwiseCLIP", "Supervised", "untrained"], seeds=[0], steps=4, out=str(tmp_path),
                 data_options={"rows": 200, "noise": 2})
    return run_cells("comm", **{**given, **parameters})


def test_the_template_goes_from_bits_to_a_table(tmp_path, capsys):
    names = run(tmp_path)
    table = pd.read_parquet(tmp_path/"results.parquet")
    pd.testing.assert_frame_equal(table, names["table"])
    assert set(table["method"]) == {"CoMM", "PairwiseCLIP", "Supervised", "untrained"}
    assert set(table["kind"]) == {"redundancy", "unique1", "unique2", "synergy"} and set(table["probe"]) == {"balanced",
                                                                                                             "linear"}
    assert json.loads(table["settings"][0])["dim"] == 32 and (tmp_path/"kinds.svg").is_file()
    assert MultimodalModel.load(names["files"][0]).represent(synthetic_bits(4, 2, 2)).shape == (4, 32)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path/"weights").iterdir()}
    run(tmp_path)
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path/"weights").iterdir()}  # nothing runs again


@pytest.mark.parametrize("views", ["rising", "generic"])
def test_other_copies_of_bits(tmp_path, views):
    assert len(run(tmp_path, views=views, methods=["CoMM"], data_options={"rows": 200, "n_modalities": 3})["table"])


@pytest.mark.parametrize("data, options", [("trifeature", {"pairs": 60, "views": 1, "size": 16}), ("tcga_brca", {})])
def test_other_data(tmp_path, data, options):
    names = run(tmp_path, data=data, data_options=options, methods=["CoMM"], steps=2)
    assert set(names["table"]["arm"]) == ({"unbiased", "biased"} if data == "trifeature" else {""})


@pytest.mark.parametrize("wrong, error, words", [
    (dict(data="digits"), UnknownNameError, "data: 'digits' is unknown"),
    (dict(methods=["Cross"]), UnknownNameError, "methods: 'Cross' is unknown"),
    (dict(views="none"), UnknownNameError, "views: 'none' is unknown"),
    (dict(recipe="long"), UnknownNameError, "recipe: 'long' is unknown"),
    (dict(data_options={"modalities": 3}), UnknownNameError, "data_options: 'modalities' is unknown"),
    (dict(seeds=[0.5]), DtypeError, "seeds must be a list of int"),
])
def test_wrong_parameters_stop_at_once(tmp_path, wrong, error, words):
    with pytest.raises(error, match=words): run(tmp_path, **wrong)
    assert not (tmp_path/"weights").exists()
