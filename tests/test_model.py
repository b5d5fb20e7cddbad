"A model knows its rows: what is standardised otherwise, or of other columns, is refused, and a file holds all of it."
import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from gated_symile.core import (DataError, DtypeError, MissingError, NonFiniteError, ShapeError, UnknownNameError,
                               generator, unit, whole_file)
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.data.mfeat import MFEAT_VIEWS, mfeat, mfeat_digits
from gated_symile.encoders import MLP
from gated_symile.model import MultimodalModel, Standardiser, read_about
from gated_symile.objectives.base import make_objective
from gated_symile.search import rank_dataset
from gated_symile.training import fit

DIM = 16
VIEWS = ("pix", "fou", "zer")
OBJECTIVES = {
    "PairwiseCLIP": {}, "GRAM": {}, "TRIANGLE": {}, "Symile": {"negatives": "candidates"},
    "SubsetSymile": {"penalty": 2.},
    "GatedSymile": {"weighting": "sigmoid", "null": True, "key_dim": 8},
}


def make(name="Symile", names=VIEWS, sizes=None, standardise=True, width=24, **options):
    "A small model for views of the digits, always with the same weights."
    widths = dict(zip(names, sizes or [mfeat(names).modalities[n].shape[1] for n in names]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = make_objective(name, len(names), DIM, **{**OBJECTIVES[name], **options})
        return MultimodalModel({n: MLP(size, DIM, width=width) for n, size in widths.items()}, objective, standardise)


@pytest.fixture(scope="module")
def trained():
    "A model that knows digits, and rows that it has never seen."
    train, valid, test = mfeat(VIEWS).split((0.6, 0.2, 0.2), generator(0))
    model = make()
    fit(model, train, valid, "pix", epochs=8, learning_rate=3e-3, warmup_steps=10, progress=False)
    return model, test


def standardised(dataset, by=None):
    "What a person makes who standardises by hand."
    how = Standardiser().fit(by or dataset)
    return MultimodalDataset({name: how(name, x) for name, x in dataset.modalities.items()})


def same(a, b):
    "Bit for bit, in order, or by name."
    if isinstance(a, dict): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Raw rows go in

def test_the_model_standardises_whatever_comes(trained):
    "A dataset, a dict, one modality: the same embeddings, those of rows standardised by its means and scales."
    model, test = trained
    plain = MultimodalModel(dict(zip(VIEWS, model.encoders.values())), model.objective, standardise=False)
    by_hand = {name: model.standardiser(name, x) for name, x in test.modalities.items()}
    expected = plain(by_hand)
    assert same(model(test), expected) and same(model(test.modalities), expected)
    assert same([model.encode_modality(name, x) for name, x in test.modalities.items()], expected)
    assert model.loss(test).item() == model.loss(test.modalities).item() == plain.loss(by_hand).item()


def test_a_standardiser_is_the_textbook_formula():
    x = torch.randn(50, 3, generator=generator(0)) * 7 + 3
    x[::4, 1] = torch.nan
    how = Standardiser().fit(MultimodalDataset({"a": x}))
    seen = x.double().numpy()
    expected = np.nan_to_num((seen - np.nanmean(seen, 0)) / np.nanstd(seen, 0))
    torch.testing.assert_close(how("a", x).double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


def test_rows_that_come_later_need_no_company():
    "Bit for bit, whatever their number."
    model, data = make(), mfeat(VIEWS)
    model.standardiser.fit(data[:300])
    for name, x in data.modalities.items():
        assert same(model.standardiser(name, x).split(7), [model.standardiser(name, part) for part in x.split(7)])


# Nothing that was standardised otherwise

@pytest.mark.parametrize("by", ["the training rows", "themselves"])
@pytest.mark.parametrize("name", MFEAT_VIEWS)
def test_what_is_standardised_already_is_refused(name, by):
    data = mfeat(MFEAT_VIEWS).select(name)
    train, test = data.split((0.7, 0.3), generator(0))
    how = Standardiser().fit(train)
    how.check(test)
    with pytest.raises(DataError, match=f"{name!r}.*Give rows as they were read"):
        how.check(standardised(test, train if by == "the training rows" else None))


@pytest.mark.parametrize("factor", [1e-3, 0.1, 10, 1e3])
@pytest.mark.parametrize("name", MFEAT_VIEWS)
def test_another_unit_is_refused(name, factor):
    train, test = mfeat(MFEAT_VIEWS).select(name).split((0.7, 0.3), generator(0))
    with pytest.raises(DataError, match=f"{name!r}.*unit"):
        Standardiser().fit(train).check(MultimodalDataset({name: test.modalities[name] * factor}))


@pytest.mark.parametrize("name", MFEAT_VIEWS)
def test_rows_of_one_kind_are_not_refused(name):
    "All eights, one digit, twenty of any: raw rows are raw rows."
    data, digits = mfeat(MFEAT_VIEWS).select(name), mfeat_digits()
    how = Standardiser().fit(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for digit in range(10): how.check(data[digits == digit])
        for rows in torch.randperm(2000, generator=generator(0)).split(20):
            how.check(data[rows]); how.check(data[rows[:1]])


@pytest.mark.parametrize("middle, spread, shift", [(1e5, 1., 0.9), (1e5, 1., 50), (40., 10., 3.), (0.3, 0.01, 0.005)])
def test_other_means_are_other_means_however_large(middle, spread, shift):
    "A tolerance relative to the mean took 100000 and 99999.1 for the same, nine tenths of a standard deviation apart."
    x = middle + spread * torch.randn(400, 6, generator=generator(0), dtype=torch.float64)
    how = Standardiser().fit(MultimodalDataset({"a": x}))
    with pytest.raises(DataError, match="'a'"): how.check(MultimodalDataset({"a": (x - middle + shift) / spread}))


def test_every_way_in_refuses_them(trained, tmp_path):
    from gated_symile.bank import encode_bank, retrieve, save_bank
    model, test = trained
    wrong = standardised(test)
    again = copy.deepcopy(model)
    for use in (model, model.loss, model.embed,
                lambda rows: rank_dataset(model, rows, "pix"), lambda rows: encode_bank(model, rows, "pix"),
                lambda rows: retrieve(model, rows, rows, "pix", progress=False),
                lambda rows: save_bank(model, rows, "pix", tmp_path/"bank.npy"),
                lambda rows: fit(again, test, rows, "pix", progress=False),
                lambda rows: fit(again, rows, test, "pix", progress=False)):
        with pytest.raises(DataError, match="Give rows as they were read"): use(wrong)


def test_only_what_the_model_reads_has_to_fit(trained):
    model, test = trained
    more = MultimodalDataset({**test.modalities, "D": torch.randn(len(test), 4)})
    assert same(model.embed(more), model.embed(test))
    late = MultimodalDataset({"zer": test.modalities["zer"] * 1000})
    model.check(test, ["pix"])
    with pytest.raises(DataError, match="'zer'"): model.check(late, ["zer"])
    with pytest.raises(MissingError, match="lacks 'pix', 'fou'; it has 'zer'"): model.check(late)


@pytest.mark.parametrize("columns, error, words", [
    (["x", "y"], None, ""), (None, None, ""), (("x", "y"), None, ""),
    (["y", "x"], DataError, "other order, first 'y' where there was 'x'"),
    (["x", "z"], DataError, r"lacks \['y'\], has instead \['z'\]"),
    (["x", "y", "z"], ShapeError, r"'a' has 2 columns in train but 3 here: has instead \['z'\]"),
    (["x"], ShapeError, r"'a' has 2 columns in train but 1 here: lacks \['y'\]")])
def test_columns_have_to_be_those_of_the_training_rows(columns, error, words, tmp_path):
    "Before saving and after."
    train = MultimodalDataset({"a": torch.tensor([[1., 2], [3, 5]]), "b": torch.tensor([[1.], [2]])},
                              columns={"a": ["x", "y"]})
    rows = MultimodalDataset({"a": torch.ones(4, len(columns or "ab")), "b": torch.ones(4, 1)}, columns=columns
                             and {"a": columns})
    model = make(names="ab", sizes=[2, 1])
    model.standardiser.fit(train)
    model.save(tmp_path/"m.safetensors")
    for one in (model, MultimodalModel.load(tmp_path/"m.safetensors")):
        if error is None: one.check(rows)
        else:
            with pytest.raises(error, match=words): one.check(rows)


def test_some_strange_columns_are_told():
    train = MultimodalDataset({"a": torch.randn(100, 6, generator=generator(0))}, columns={"a": list("uvwxyz")})
    how = Standardiser().fit(train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        how.check(train[:1]); how.check(MultimodalDataset({"a": train.modalities["a"] + 4}))
    with pytest.warns(UserWarning, match=r"'a': 1 of 6 columns .* such as \['v'\].* is the unit the same"):
        how.check(MultimodalDataset({"a": torch.tensor([[0., 1000, 0, 0, 0, 0]])}))
    with pytest.raises(DataError, match=r"'a': 4 of 6 columns .* such as \['v', 'w', 'x'\]"):
        how.check(MultimodalDataset({"a": torch.tensor([[0., 1000, -20, 30, -40, 0]])}))


def test_rare_values_of_few_columns_are_no_error():
    "A row of the training set itself is never refused: with a single rare value, it is told."
    rare = (torch.rand(500, 1, generator=generator(0)) < 0.02).float()
    for x in (3*rare, torch.cat([3*rare, 1 - 3*rare], 1)):
        how = Standardiser().fit(MultimodalDataset({"packs": x}))
        with pytest.warns(UserWarning, match="is the unit the same"):
            how.check(MultimodalDataset({"packs": x[rare[:, 0] == 1][:1]}))


def test_yes_and_no_have_no_unit():
    "However rare its 1, a column of 0 and 1 is never strange; another number in it is."
    rare = (torch.rand(500, 6, generator=generator(0)) < 0.01).float()
    how = Standardiser().fit(MultimodalDataset({"flags": rare}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (torch.ones(1, 6), torch.zeros(20, 6), torch.ones(20, 6), 1 - rare, torch.eye(6)):
            how.check(MultimodalDataset({"flags": x}))
    for x in (100*torch.ones(1, 6), 2*torch.ones(20, 6), -torch.ones(1, 6), 0.6 + torch.eye(6)):
        with pytest.raises(DataError, match="'flags': 6 of 6 columns"): how.check(MultimodalDataset({"flags": x}))


def test_a_partial_state_keeps_what_the_standardiser_knows(trained):
    model, test = trained
    model, part = copy.deepcopy(model), {f"encoders.{k}": v for k, v in model.encoders.state_dict().items()}
    before = model.embed(test)
    model.load_state_dict(part, strict=False)
    assert model.standardiser.fitted and all(map(torch.equal, model.embed(test), before))
    lacking = {k: v for k, v in model.state_dict().items() if not k.startswith("standardiser")}
    with pytest.raises(RuntimeError, match="Missing key"): model.load_state_dict(lacking)


def test_names_of_columns_are_in_the_state(trained):
    train = MultimodalDataset({"a": torch.randn(20, 2, generator=generator(0))}, columns={"a": ["p", "q"]})
    other = Standardiser()
    other.load_state_dict(Standardiser().fit(train).state_dict())
    with pytest.raises(DataError, match="other order"):
        other.check(MultimodalDataset(train.modalities, columns={"a": ["q", "p"]}))


def test_a_row_of_holes_is_absent_or_an_error(trained):
    model, test = trained
    batch = {name: x[:8].clone() for name, x in test.modalities.items()}
    batch["fou"][:2] = torch.nan
    with pytest.raises(NonFiniteError, match="'fou' has NaN .* mark absent rows"): model.loss(batch)


def test_a_dict_of_other_widths_is_named(trained):
    model, test = trained
    with pytest.raises(ShapeError, match="'fou' has 76 columns in train but 1 here"):
        model({**test.modalities, "fou": torch.ones(len(test), 1)})


# Files

def test_a_model_moves_to_an_empty_folder(trained, tmp_path):
    "Without any code of the person's: a file, raw rows, and the very ranks of before."
    model, test = trained
    model.save(tmp_path/"model.safetensors")
    torch.save(test.modalities, tmp_path/"rows.pt")
    ranks, _ = rank_dataset(model, test, "pix")
    assert ranks.top(1).mean() > 0.1                                             # it has learnt something
    code = """import torch
from gated_symile import MultimodalDataset, MultimodalModel, rank_dataset
model = MultimodalModel.load("model.safetensors")
print(rank_dataset(model, MultimodalDataset(torch.load("rows.pt")), "pix")[0].rank().tolist())"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ranks.rank().tolist()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_round_trip(name, tmp_path):
    data = mfeat(VIEWS)[::20]
    model, path = make(name), tmp_path/"model.safetensors"
    model.standardiser.fit(data)
    for p in model.parameters(): p.data.add_(0.1)                                # not what a fresh one has
    model.save(path, {"objective": name, "p": [0, 0.5]})
    state = torch.get_rng_state()
    again = MultimodalModel.load(path)
    assert torch.equal(state, torch.get_rng_state()) and not again.training
    assert read_about(path) == {"objective": name, "p": [0, 0.5]}
    assert again.names == list(VIEWS) and same(again.state_dict(), model.state_dict())
    assert same(again.embed(data), model.embed(data)) and again.objective.settings() == model.objective.settings()
    before = path.read_bytes()
    again.save(path, {"p": (0, 0.5), "objective": name})
    assert path.read_bytes() == before
    filled = MultimodalModel.load(path, dict(zip(VIEWS, make(name).encoders.values())), make(name).objective)
    assert same(filled.embed(data), model.embed(data))


ODD = ["lab.v2", "type", "a/b", "", "ä", "a%2Eb", "keys", " ", "self", "数"]


def test_modalities_may_be_called_anything(tmp_path):
    data = MultimodalDataset({name: torch.randn(40, 3, generator=generator(m)) for m, name in enumerate(ODD)})
    model = make("SubsetSymile", ODD, [3]*len(ODD))
    fit(model, data, data, "type", epochs=1, progress=False)
    model.save(tmp_path/"odd.safetensors")
    again = MultimodalModel.load(tmp_path/"odd.safetensors")
    assert again.names == sorted(again.standardiser.names, key=ODD.index) == ODD
    assert same(again.embed(data), model.embed(data))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=2, max_size=6, unique=True))
def test_no_two_names_become_one(names):
    data = MultimodalDataset({name: torch.randn(3, 1, generator=generator(m)) for m, name in enumerate(names)})
    model = MultimodalModel({name: nn.Identity() for name in names}, nn.Identity())
    model.standardiser.fit(data)
    assert model.standardiser.names == names
    again = MultimodalModel({name: nn.Identity() for name in names}, nn.Identity())
    again.load_state_dict(model.state_dict())
    for name, x in data.modalities.items():
        assert torch.equal(again.encode_modality(name, x), unit(model.standardiser(name, x)))


def test_the_state_is_called_by_the_names():
    model = make()
    assert {key.split(".")[1] for key in model.state_dict() if key.startswith("encoders.")} == set(VIEWS)


def save(tmp_path, *args, **options):
    model = make(*args, **options)
    model.save(tmp_path/"model.safetensors")
    return tmp_path/"model.safetensors"


@pytest.mark.parametrize("saved, given, words", [
    (dict(name="SubsetSymile"), "Symile", "the objective is SubsetSymile in the file, Symile here"),
    (dict(name="GatedSymile"), dict(name="GatedSymile", weighting="softmax"),
     "weighting of the objective is 'sigmoid' in the file, 'softmax' here"),
    (dict(name="GatedSymile"), dict(name="GatedSymile", null=False),
     "null of the objective is True in the file, False here"),
    (dict(name="Symile"), dict(name="Symile", negatives="shuffle"),
     "negatives of the objective is 'candidates' in the file, 'shuffle' here"),
    (dict(name="Symile"), dict(name="Symile", log_scale=1.), "log_scale of the objective is 0.0 in the file, 1.0 here"),
])
def test_weights_of_another_objective_are_refused(saved, given, words, tmp_path):
    path = save(tmp_path, **saved)
    other = make(**({"name": given} if isinstance(given, str) else given)).objective
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(DataError, match=words): MultimodalModel.load(path, objective=other)
    assert same(other.state_dict(), before)                    # nothing was changed


def test_a_file_from_before_an_option_means_what_was_before(tmp_path):
    model = make("SubsetSymile", heads=False)
    path = save(tmp_path, "SubsetSymile", heads=False)
    with safe_open(path, "pt") as file:
        about, weights = json.loads(file.metadata()["gated_symile"]), {key: file.get_tensor(key) for key in file.keys()}
    for option in ("heads", "by_diversity"): del about["objective"]["settings"][option]
    save_file(weights, path, {"gated_symile": json.dumps(about)})
    loaded = MultimodalModel.load(path)
    assert not loaded.objective.heads and same(loaded.state_dict(), model.state_dict())
    with pytest.raises(DataError, match="heads of the objective is False in the file, True here"):
        MultimodalModel.load(path, objective=make("SubsetSymile").objective)


def test_modalities_in_another_order_are_refused(tmp_path):
    "A gate counts them: weights of a, b, c would fit c, b, a, and mean others."
    path = save(tmp_path, "GatedSymile", "abc", [8]*3)
    for names in ("cba", "abd", "abcd", "ba"):
        with pytest.raises(DataError, match=r"modalities \['a', 'b', 'c'\] in the file, \['" + names[0]):
            MultimodalModel.load(path, {name: MLP(8, DIM, width=24) for name in names})
    # some of them may be given
    assert MultimodalModel.load(path, {"b": MLP(8, DIM, width=24)}).names == ["a", "b", "c"]


@pytest.mark.parametrize("encoder, words", [
    (MLP(7, DIM, width=24),
     "in_features of the encoder of 'b' is 8 in the file, 7 here; .*is .24, 8. in the file, .24, 7. here"),
    (MLP(8, DIM, width=25), "width of the encoder of 'b' is 24 in the file, 25 here"),
    (MLP(8, DIM, width=24, dropout=0.5), "dropout of the encoder of 'b' is 0.0 in the file, 0.5 here"),
    (nn.Linear(8, DIM), "the encoder of 'b' is MLP in the file, Linear here"),
])
def test_other_encoders_are_refused(encoder, words, tmp_path):
    path = save(tmp_path, "Symile", "abc", [8]*3)
    before = copy.deepcopy(encoder.state_dict())
    with pytest.raises(DataError, match=words): MultimodalModel.load(path, {"b": encoder})
    assert same(encoder.state_dict(), before)


class Distance(nn.Module):
    "An objective that knows nothing of this library."
    def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.tensor(2.))
    def score(self, embeddings, target, present=None):
        return -torch.cdist(sum(e for m, e in enumerate(embeddings) if m != target), embeddings[target])
    def forward(self, embeddings, present=None, generator=None):
        return nn.functional.cross_entropy(self.scale * self.score(embeddings, 0), torch.arange(len(embeddings[0])))


def test_parts_of_ones_own_are_passed_in(tmp_path):
    data = mfeat(VIEWS)[::10]
    def parts():
        return {name: nn.Sequential(nn.Linear(x.shape[1], DIM), nn.BatchNorm1d(DIM))
                for name, x in data.modalities.items()}
    model, path = MultimodalModel(parts(), Distance()), tmp_path/"own.safetensors"
    fit(model, data, data, "pix", epochs=2, progress=False)
    model.save(path)
    with pytest.raises(DataError, match="the encoder of 'pix', of class Sequential: pass a module of that class"):
        MultimodalModel.load(path)
    with pytest.raises(DataError, match="the objective, of class Distance: pass"): MultimodalModel.load(path, parts())
    with pytest.raises(DataError, match="the objective is Distance in the file, Symile here"):
        MultimodalModel.load(path, parts(), make().objective)
    again = MultimodalModel.load(path, parts(), Distance())
    assert same(again.embed(data), model.embed(data)) and again.objective.scale == model.objective.scale


def test_shared_encoders_are_saved_too(tmp_path):
    "Two modalities may share one encoder: its weights are trained once and come back."
    def parts(): shared = MLP(8, DIM); return {"A": shared, "B": shared, "C": MLP(8, DIM)}
    model = MultimodalModel(parts(), make().objective)
    model.save(tmp_path/"model.safetensors")
    own = MultimodalModel.load(tmp_path/"model.safetensors", parts())
    assert own.encoders["A"] is own.encoders["B"]
    for again in (own, MultimodalModel.load(tmp_path/"model.safetensors")):
        assert same(again.state_dict(), model.state_dict())


def test_numbers_and_paths_are_made_plain_before_anything_is_written(tmp_path):
    sizes = dict(in_features=np.int64(3), dim=np.int32(4), width=np.int64(5), dropout=np.float32(0.5))
    model = MultimodalModel({name: MLP(**sizes) for name in "ab"}, make_objective("Symile", 2, 4))
    about = {"out": tmp_path, "rate": np.float32(0.5), "n": np.int64(3), "device": torch.device("cpu"),
             "loss": torch.tensor(2.), "p": (1, 2)}
    model.save(tmp_path/"model.safetensors", about)
    plain = {"out": str(tmp_path), "rate": 0.5, "n": 3, "device": "cpu", "loss": 2., "p": [1, 2]}
    assert read_about(tmp_path/"model.safetensors") == plain
    assert MultimodalModel.load(tmp_path/"model.safetensors").encoders["a"].settings()["width"] == 5
    before = (tmp_path/"model.safetensors").read_bytes()
    with pytest.raises(DtypeError, match="what JSON can't"): model.save(tmp_path/"model.safetensors", {"model": model})
    assert (tmp_path/"model.safetensors").read_bytes() == before


def test_a_changed_byte_in_the_header_is_refused(tmp_path):
    path = save(tmp_path)
    content = path.read_bytes()
    for broken in (bytes([255])*8 + content[8:], content[:8] + b"?" + content[9:], content[:1000], b""):
        path.write_bytes(broken)
        for read in (MultimodalModel.load, read_about):
            with pytest.raises(DataError, match="not a whole safetensors file"): read(path)


def test_two_threads_may_write_one_file(tmp_path):
    "The file is one of theirs, whole; the same process id made them share a temporary one."
    start, errors = threading.Barrier(2), []
    def write(letter):
        try:
            for _ in range(30):
                start.wait()
                with whole_file(tmp_path/"file") as file:
                    for _ in range(50): file.write(letter * 1000); file.flush()
                assert len(set((tmp_path/"file").read_bytes())) == 1
        except Exception as error: errors.append(error); start.abort()
    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors and os.listdir(tmp_path) == ["file"] and len((tmp_path/"file").read_bytes()) == 50_000


# What PyTorch does to modules

def test_half_precision_of_the_whole(tmp_path):
    data = mfeat(VIEWS)[::20]
    model = make()
    model.standardiser.fit(data)
    full = model.embed(data)
    model.to(torch.bfloat16)
    assert {x.dtype for x in model.state_dict().values() if x.is_floating_point()} == {torch.bfloat16, torch.float32}
    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(full, model.embed(data))) and model.loss(data).isfinite()
    model.save(tmp_path/"half.safetensors")
    again = MultimodalModel.load(tmp_path/"half.safetensors")
    assert same(again.embed(data), model.embed(data)) and {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_copies_and_pickles_are_the_same_model():
    data = mfeat(VIEWS)[::20]
    model = make("SubsetSymile")
    model.standardiser.fit(data)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(again.embed(data), model.embed(data)) and again.standardiser.names == list(VIEWS)


def test_weights_of_one_that_knows_its_rows_fill_one_that_does_not():
    "As a checkpoint of one's own does it."
    data = mfeat(VIEWS)[::20]
    model, fresh = make(), make(negatives="shuffle")
    model.standardiser.fit(data)
    fresh.load_state_dict(model.state_dict())
    assert fresh.standardiser.fitted and same(fresh.embed(data), model.embed(data))
    fresh.load_state_dict(make().state_dict())
    assert not fresh.standardiser.fitted


@pytest.mark.parametrize("holes", [False, True])
def test_forward_compiles_whole(holes):
    data = mfeat(VIEWS)[:64]
    model = make()
    model.standardiser.fit(data)
    present = torch.rand(64, 3, generator=generator(0)) > 0.3 if holes else None
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for a, b in zip(compiled(data.modalities, present), model(data.modalities, present)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_rows_of_any_shape_and_type():
    "Tokens and pictures in a dict: an encoder of one's own takes them as they are."
    tokens, pictures = torch.randint(9, (5, 4)), torch.rand(5, 3, 2, 2)
    words = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(16, DIM))
    picture = nn.Sequential(nn.Flatten(), nn.Linear(12, DIM))
    model = MultimodalModel({"words": words, "picture": picture}, make().objective)
    present = torch.tensor([[True, True]]*4 + [[False, True]])
    assert [tuple(e.shape) for e in model({"words": tokens, "picture": pictures}, present)] == [(5, DIM)]*2


def test_present_is_a_bool_matrix():
    for use in (make(), make().loss):
        with pytest.raises(DtypeError, match="present must be a bool tensor, got list"):
            use(mfeat(VIEWS)[:2], present=[[True]*3]*2)
        with pytest.raises(ShapeError, match=r"present must have shape \(2, 3\)"):
            use(mfeat(VIEWS)[:2].modalities, present=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(UnknownNameError, match="'pux' is unknown"): make().embed(mfeat(VIEWS), names=["pux"])
