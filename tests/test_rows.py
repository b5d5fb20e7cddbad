"Rows of any kind: what lies on disk gives what it would give in memory, and costs a batch."
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from gated_symile.auditing import audit
from gated_symile.bank import encode_bank, retrieve, save_bank
from gated_symile.core import (DataError, DtypeError, MissingError, NonFiniteError, RangeError, ShapeError,
                               UnknownNameError, generator)
from gated_symile.data.batches import read_batches
from gated_symile.data.corruption import Gaussian, Missing, Swap, corrupt, corrupt_one
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.data.rows import Column, Files, Mapped, Rows, Transformed
from gated_symile.data.splits import corrupted_splits
from gated_symile.encoders import MLP
from gated_symile.fragility import top_weights
from gated_symile.model import MultimodalModel
from gated_symile.objectives.base import make_objective
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.symile import Symile
from gated_symile.search import rank_dataset, rank_listed, rank_true
from gated_symile.training import fit

NAMES, ROWS, DIM = ["picture", "ecg", "words", "table"], 120, 8
QUICK = dict(target="picture", epochs=2, batch_size=32, progress=False)


class Picture(nn.Module):
    "A small convolution, with dropout: any draw that reading made would be seen."
    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
                                    nn.LazyLinear(DIM))
    def forward(self, x): return self.layers(x)


class Signal(nn.Module):
    def __init__(self): super().__init__(); self.layers = nn.Sequential(nn.Flatten(), nn.Linear(2*12, DIM))
    def forward(self, x): return self.layers(x)


class Words(nn.Module):
    def __init__(self): super().__init__(); self.bag = nn.EmbeddingBag(30, DIM)
    def forward(self, x): return self.bag(x)


def content(seed=0, rows=ROWS):
    "Pictures in bytes, signals, words and a table of the same hidden bits."
    draw = generator(seed)
    bits = torch.randint(2, (rows, 4), generator=draw)
    picture = (60*bits[:, :3, None, None] + torch.randint(40, (rows, 3, 6, 6), generator=draw)).byte()
    ecg = bits[:, :2, None] + 0.3*torch.randn(rows, 2, 12, generator=draw)
    words = torch.cat([bits + 2*torch.arange(4), torch.randint(10, 30, (rows, 2), generator=draw)], 1)
    return dict(picture=picture, ecg=ecg, words=words, table=5 + 3*(bits + 0.2*torch.randn(rows, 4, generator=draw)))


def on_disk(folder, content, workers=0):
    "The same, a part in each kind of rows."
    for name in ("ecg", "table"): np.save(folder/f"{name}.npy", content[name].numpy())
    for i, x in enumerate(content["picture"]): Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder/f"{i}.png")
    pictures = Files([folder/f"{i}.png" for i in range(len(content["picture"]))], Image.open)
    words = torch.utils.data.TensorDataset(content["words"], torch.arange(len(content["words"])))
    return MultimodalDataset({"picture": Transformed(pictures, as_channels_first), "ecg": Mapped(folder/"ecg.npy"),
                              "words": Column(words, 0), "table": Mapped(folder/"table.npy")}, workers=workers)


def as_channels_first(x): return x.permute(2, 0, 1)


def make(objective=None):
    torch.manual_seed(0)
    model = MultimodalModel(dict(picture=Picture(3), ecg=Signal(), words=Words(),
                                 table=MLP(4, DIM, width=16, dropout=0.1)),
                            objective or Symile(negatives="shuffle"))
    model.encoders["picture"](torch.zeros(1, 3, 6, 6))
    return model


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def held(): return MultimodalDataset(content())


@pytest.fixture(scope="module")
def filed(tmp_path_factory): return on_disk(tmp_path_factory.mktemp("rows"), content())


def workers(dataset, n): return MultimodalDataset(dataset.modalities, dataset.present, dataset.corrupted, workers=n)


def test_a_training_from_disk_is_the_one_in_memory_bit_for_bit(held, filed):
    def trained(data):
        model = make()
        table = fit(model, data[:80], data[80:], **QUICK, seed=3)
        return table, model.state_dict()
    table, state = trained(held)
    for n in (0, 2):
        other, weights = trained(workers(filed, n))
        assert list(state) == list(weights) and same(state.values(), weights.values()), n
        assert table.drop(columns="seconds").equals(other.drop(columns="seconds"))


def test_everything_takes_rows_from_disk_as_it_takes_tensors(held, filed, tmp_path):
    model = make().eval()
    model.standardiser.fit(held)
    filed = workers(filed, 2)
    other = make().eval()
    other.standardiser.fit(filed)
    assert same(model.standardiser.state_dict().values(), other.standardiser.state_dict().values())
    assert same(model.embed(held), model.embed(filed)) and same(model(held[:9]), model(filed[:9]))
    ranks, again = (rank_dataset(model, data, "picture")[0] for data in (held, filed))
    assert torch.equal(ranks.above, again.above)
    banks = [encode_bank(model, data, "picture").embeddings for data in (held, filed, filed.modalities["picture"])]
    assert torch.equal(banks[0], banks[1]) and torch.equal(banks[0], banks[2])
    assert torch.equal(save_bank(model, filed, "picture", tmp_path/"bank.npy").embeddings, banks[0])
    tables = [retrieve(model, data[:5].select(["ecg", "words"]), data, "picture", k=3) for data in (held, filed)]
    assert tables[0].equals(tables[1])
    kinds = {"swapped": Swap(), "missing": Missing()}                      # noise is drawn otherwise, row by row
    tables = [audit(model, data, "picture", kinds=kinds, generator=generator(0)) for data in (held, filed)]
    assert tables[0].equals(tables[1])
    gated = make(make_objective("GatedSymile", 4, DIM)).eval()
    gated.standardiser.fit(held)
    assert same(*(top_weights(gated, data, "picture")[1].values() for data in (held, filed)))


def test_everything_takes_batches_of_ones_own(held, tmp_path):
    there = torch.rand(ROWS, 4, generator=generator(1)) < 0.8
    there[:, 0] |= there.sum(1) < 2
    data = MultimodalDataset(held.modalities, there)
    batches = [({name: x[rows] for name, x in held.modalities.items()}, there[rows])
               for rows in torch.arange(ROWS).split(50)]
    model = make().eval()
    model.standardiser.fit(data)
    for m, (a, b) in enumerate(zip(model.embed(data), model.embed(batches))):
        assert torch.equal(a[there[:, m]], b[there[:, m]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for a, b in zip(rank_dataset(model, data, "picture"), rank_dataset(model, batches, "picture")):
            assert torch.equal(getattr(a, "above", a), getattr(b, "above", b))
    bank, again = encode_bank(model, data, "ecg"), encode_bank(model, batches, "ecg")
    assert bank.ids == again.ids and torch.equal(bank.embeddings, again.embeddings)
    with pytest.raises(MissingError, match="candidates: 'ecg' is missing in"):
        save_bank(model, batches, "ecg", tmp_path/"a.npy")
    assert not list(tmp_path.iterdir())
    whole = [batch for batch, _ in batches]
    saved = save_bank(model, whole, "picture", tmp_path/"b.npy")
    assert torch.equal(saved.embeddings, encode_bank(model, held, "picture").embeddings)
    tables = [audit(model, rows, "picture", generator=generator(0)) for rows in (data, batches)]
    assert tables[0].equals(tables[1])
    few = [{name: x[:3] for name, x in held.modalities.items() if name != "picture"}]
    assert retrieve(model, few, whole, "picture", k=2).equals(
        retrieve(model, held[:3].select(["ecg", "words", "table"]), held, "picture", k=2))
    tables = [fit(make_fitted(held), held[:80], valid, **QUICK) for valid in (data[80:], [(
        {name: x[80:] for name, x in held.modalities.items()}, there[80:])])]
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))
    for wrong in (iter(batches), 3):
        with pytest.raises(DtypeError, match="again and again"): model.embed(wrong)


def make_fitted(data):
    model = make()
    model.standardiser.fit(data)
    return model


def test_noise_is_no_word_and_says_so_in_an_audit(filed):
    table = audit(make_fitted(filed), filed, "picture", generator=generator(0))
    words = table[table["modality"] == "words"].set_index("kind")
    assert words.loc["noised", "n"] == 0 and "there is no noise" in words.loc["noised", "note"]
    assert (words.loc[["swapped", "missing"], "n"] == ROWS).all()
    assert (table[table["modality"] == "ecg"]["n"] == ROWS).all()


@pytest.mark.parametrize("kind", [Swap(), Gaussian(), Missing()])
def test_corruptions_read_nothing_and_touch_what_they_say(held, filed, kind, monkeypatch):
    names = ["picture", "ecg", "table"]
    if not isinstance(kind, Gaussian):                                     # which learns from a sample
        for cls in (Mapped, Files):
            for method in ("read", "read_many"): monkeypatch.setattr(cls, method, no_reading)
    spoilt = corrupt_one(filed.select(names), names, 0.6, kind, generator(0))
    monkeypatch.undo()
    for m, name in enumerate(names):
        before, after = held.modalities[name].float(), spoilt.modalities[name][:].float()
        changed = (before != after).flatten(1).any(1)
        assert not changed[~spoilt.corrupted[:, m]].any()
        if isinstance(kind, Missing): assert torch.equal(~spoilt.corrupted[:, m], spoilt.is_present(name))
        else: assert changed[spoilt.corrupted[:, m]].float().mean() > 0.9
        assert torch.equal(after, spoilt.modalities[name][:].float())
        assert spoilt.modalities[name].dtype == filed.modalities[name].dtype
    with pytest.raises(DtypeError, match="no noise"): corrupt(filed, {"words": 1.}, Gaussian())
    parts = corrupted_splits(filed.select(names), 0.5, generator(0), "swap")
    assert sum(map(len, parts)) == ROWS and all(isinstance(x, Rows) for part in parts for x in part.modalities.values())


def no_reading(self, at): raise AssertionError("nothing is read here")


def test_a_run_names_what_it_cannot_read(held, filed, tmp_path):
    "A cut file, a broken picture, another number of channels, a dead process: named, and the weights are as before."
    np.save(tmp_path/"whole.npy", np.ones((9, 2)))
    (tmp_path/"cut.npy").write_bytes((tmp_path/"whole.npy").read_bytes()[:-8])
    with pytest.raises(DataError, match="cut.npy is not a whole .npy file"): Mapped(tmp_path/"cut.npy")
    pictures = filed.modalities["picture"]
    def broken(reader):
        return MultimodalDataset({**filed.modalities, "picture": Transformed(pictures, reader)}, workers=2)
    def small(x): return x[:1] if int(x[0, 0, 0]) == marked else x
    def dead(x): return os.kill(os.getpid(), signal.SIGKILL) if int(x[0, 0, 0]) == marked and os.getpid() != me else x
    marked, me = int(held.modalities["picture"][97, 0, 0, 0]), os.getpid()
    first = next(i for i, x in enumerate(held.modalities["picture"]) if int(x[0, 0, 0]) == marked)
    if first < 1: pytest.skip("the first row gives the shape")
    grey = rf"modalities\['picture'\], row {first} \(.*{first}.png\) has shape \(1, 6, 6\)"
    for reader, error, words in ((small, ShapeError, grey),
                                 (dead, DataError, "workers: one of 2 processes that read rows died")):
        model = make_fitted(held)
        before = {key: x.clone() for key, x in model.state_dict().items()}
        with pytest.raises(error, match=words): fit(model, broken(reader)[:80], held[80:], **QUICK)
        assert same(before.values(), model.state_dict().values()) and not model.training
    with pytest.raises(ShapeError, match="'picture' has 3 channels in train but 1 here"):
        make_fitted(held).embed(MultimodalDataset({**held.modalities, "picture": held.modalities["picture"][:, :1]}))
    bad = held.modalities["picture"].float() / 255
    with pytest.raises(DataError, match="'picture': 3 of 3 channels are less than 1/5"):
        make_fitted(held).embed(MultimodalDataset({**held.modalities, "picture": bad}))


def test_a_broken_picture_late_in_training_keeps_the_best_weights(tmp_path):
    data = on_disk(tmp_path, content(), 2)
    def spoil(line): (tmp_path/"7.png").write_bytes(b"")
    model = make()
    with pytest.raises(DataError, match=r"row 7 \(.*7.png\) can't be read: UnidentifiedImageError"):
        fit(model, data[:80], data[80:], **QUICK, callbacks=[spoil])
    assert not model.training and model.standardiser.fitted
    other = make()
    fit(other, MultimodalDataset(content())[:80], MultimodalDataset(content())[80:], **{**QUICK, "epochs": 1})
    assert same(model.state_dict().values(), other.state_dict().values())
    with pytest.warns(UserWarning, match="1 cells marked as missing"):
        marked = data.check(None, "missing", progress=False)
    assert (~marked.present).nonzero().tolist() == [[7, 0]]
    fit(make(), marked[:80], marked[80:], **QUICK)


def test_batches_do_not_hang_on_workers_nor_draw_from_others(filed):
    batches = list(torch.randperm(ROWS, generator=generator(4)).split(17))
    noisy = MultimodalDataset({"x": Transformed(filed.modalities["ecg"], with_chance)})
    state, runs = torch.get_rng_state(), []
    for n in (0, 1, 3): runs.append([batch["x"] for batch, _ in read_batches(workers(noisy, n), batches)])
    assert torch.equal(torch.get_rng_state(), state)
    for run in runs[1:]: assert same(run, runs[0])
    assert not torch.equal(runs[0][0], filed.modalities["ecg"][batches[0]])


def with_chance(x): return x + torch.rand(()) + np.random.rand()


@pytest.mark.parametrize("choice", [None, {"picture": None}, {"words": None, "picture": "columns"}])
def test_what_is_standardised_is_saved_and_loaded(held, tmp_path, choice):
    model = make()
    if choice is not None: model = MultimodalModel(model.encoders, model.objective, standardise=choice)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.standardiser.fit(held)
    model.eval().save(tmp_path/"model.safetensors")
    again = MultimodalModel.load(tmp_path/"model.safetensors", dict(make().encoders), None)
    assert same(model.embed(held), again.embed(held)) and again.standardiser.kinds == model.standardiser.kinds
    shape = (3,) if choice is None else {None: (0,), "columns": (3, 6, 6)}[choice["picture"]]
    assert tuple(again.standardiser.moments("picture")[0].shape) == shape
    assert len(again.standardiser.moments("words")[0]) == 0 and len(again.standardiser.moments("table")[0]) == 4


class Seeing(nn.Module):
    "Sees the holes."
    holes = True
    def __init__(self): super().__init__(); self.linear, self.seen = nn.Linear(8, DIM), None
    def forward(self, x):
        self.seen = x
        return self.linear(torch.cat([x.nan_to_num(0.), x.isnan().float()], 1))


class Undirected(Symile): directions = False


def test_hooks_for_holes_and_for_objectives_without_directions(held):
    x = held.modalities["table"].clone()
    x[::3, 1] = torch.nan; x[5] = torch.nan
    data = MultimodalDataset({"a": x, "b": held.modalities["ecg"].flatten(1)})
    model = MultimodalModel({"a": Seeing(), "b": nn.Linear(24, DIM)}, Undirected()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.standardiser.fit(data)
        out = model(data)
    seen = model.encoders["a"].seen
    holes = x.isnan(); holes[5] = False
    assert torch.equal(seen.isnan(), holes) and (seen[5] == 0).all()
    assert not torch.allclose(out[1].norm(dim=1), torch.ones(ROWS), atol=0.05)
    loose = MultimodalModel(dict(model.encoders), Symile(), standardise=False)
    assert torch.allclose(loose.encode_modality("b", data.modalities["b"]).norm(dim=1), torch.ones(ROWS))
    with pytest.raises(NonFiniteError, match="modality 'a' has NaN or infinity in 1 present rows, the first: .5."):
        model.encode_modality("a", x)


@pytest.mark.parametrize("objective", [Symile(), PairwiseCLIP(), make_objective("GatedSymile", 3, DIM)])
def test_listed_candidates_against_ranks_among_all(objective):
    e = [torch.nn.functional.normalize(torch.randn(150, DIM, generator=generator(m)), dim=1) for m in range(3)]
    e[1][7] = e[1][3]; e[1][140] = e[1][3]                                 # ties
    everyone, own = torch.arange(150).expand(150, 150), torch.arange(150)
    there = torch.rand(150, 3, generator=generator(9)) < 0.7
    there[:, 1] = True; there[:, 0] |= ~there[:, 2]
    for present in (None, there):
        a, b = rank_listed(objective, e, 1, everyone, own, present), rank_true(objective, e, 1, own, present)
        assert torch.equal(a.above, b.above) and torch.equal(a.tied, b.tied)
    lists = torch.stack([torch.randperm(150, generator=generator(i))[:10] for i in range(150)])
    lists[:, 3:][torch.rand(150, 7, generator=generator(2)) < 0.3] = -1
    with torch.no_grad(): scores = objective.score([x[:150] for x in e], 1)
    ranks = rank_listed(objective, e, 1, lists)
    for i, row in enumerate(lists):
        others = scores[i, row[1:][row[1:] >= 0]]
        bar = scores[i, row[0]]
        assert ranks.above[i] == (others > bar + 1e-6).sum() or (others - bar).abs().min() < 1e-5


def test_listed_candidates_choose_the_epoch_and_encode_each_row_once(held):
    seen = []
    class Counting(Words):
        def forward(self, x):
            if not self.training: seen.append(len(x))
            return super().forward(x)
    lists = torch.stack([torch.arange(40), (torch.arange(40) + 1) % 40, (torch.arange(40) + 7) % 40], 1)
    model = make()
    model = MultimodalModel({**dict(model.encoders), "words": Counting()}, Symile(negatives="shuffle"))
    table = fit(model, held[:80], held[80:], **{**QUICK, "target": "words"}, candidates=lists[:, [1, 0, 2]])
    assert seen == [40, 40]                                                # once an epoch
    ranks, rows = rank_dataset(model, held[80:], "words", candidates=lists)
    assert rows.tolist() == list(range(40)) and ranks.above.max() <= 2
    assert abs(ranks.top(1).mean().item() - table.loc[table["best"], "valid_top1"].item()) < 1e-6
    for wrong, error, words in ((lists + 40, RangeError, r"must lie in \[0, 39\]"),
                                (lists[:9], ShapeError, r"shape \(40, K\)"),
                                (lists * 0, RangeError, "more than once"),
                                (lists[:, 1:], MissingError, "not in their own lists")):
        with pytest.raises(error, match=words): fit(make(), held[:80], held[80:], **QUICK, candidates=wrong)
    with pytest.raises(RangeError, match="bank_size: rows with candidates"):
        fit(make(), held[:80], held[80:], **QUICK, bank_size=10, candidates=lists)


MEMORY = """
import resource, sys
import numpy as np, torch
from numpy.lib import format as npy
from torch import nn
from gated_symile.data.corruption import Swap, corrupt
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.data.rows import Mapped
from gated_symile.model import MultimodalModel
from gated_symile.objectives.base import make_objective
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.search import rank_dataset
from gated_symile.training import fit

def encoder(): return nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(3, 4))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
small = MultimodalDataset({"a": torch.randn(40, 3, 32, 32), "b": torch.randn(40, 3, 32, 32)})
first = MultimodalModel({n: encoder() for n in "ab"}, PairwiseCLIP())
fit(first, small, small, "a", epochs=1, batch_size=16, progress=False)
start = peak()
a, b = (Mapped(sys.argv[i]) for i in (1, 2))
data = MultimodalDataset({"a": a, "b": b})
spoilt = corrupt(data, {"b": 0.5}, Swap(), torch.Generator().manual_seed(0))
train, valid = spoilt.split((0.9, 0.1), torch.Generator().manual_seed(0))
model = MultimodalModel({n: encoder() for n in "ab"}, PairwiseCLIP())
print(peak() - start)
fit(model, train[:2000], valid[:200], "a", epochs=1, batch_size=64, progress=False)
rank_dataset(model, valid[:400], "a")
print(peak() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in kilobytes there")
def test_a_mapped_file_costs_a_batch_and_not_itself(tmp_path):
    "Two files of 1.2 GB each, with holes in them: nothing is read to split and corrupt, a little to train and rank."
    for name in "ab":
        with open(tmp_path/name, "wb") as file:
            about = dict(descr="<f4", fortran_order=False, shape=(100_000, 3, 32, 32))
            np.lib.format.write_array_header_1_0(file, about)
            start = file.tell()
            file.truncate(start + 100_000*3*32*32*4)
            for i in range(0, 100_000, 500):                               # some content, so that there is a scale
                file.seek(start + i*3*32*32*4)
                file.write(np.random.default_rng(i).normal(size=3*32*32).astype("f4").tobytes())
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path/"a"), str(tmp_path/"b")],
                         text=True, capture_output=True, cwd=Path(__file__).parent.parent)
    assert out.returncode == 0, out.stderr
    before, after = map(int, out.stdout.split())
    assert before < 40 and after < 700, (before, after)                    # MiB; the files have 2344


def test_what_is_present_can_be_told_by_name(held, filed):
    "For one modality, as a tensor, an array or a column of pandas; the others keep what is known of them."
    there = torch.arange(ROWS) % 3 > 0
    table = held.modalities["table"].clone()
    table[5] = torch.nan
    for told in (there, there.numpy(), pd.Series(there.numpy(), index=[f"r{i}" for i in range(ROWS)])):
        for rows in (held, filed):
            data = MultimodalDataset({**rows.modalities, "table": table}, present={"words": told})
            assert data.is_present("words").equal(there) and data.is_present("picture").all()
            assert (~data.is_present("table")).nonzero().flatten().tolist() == [5]
    with pytest.raises(UnknownNameError, match="present: 'word' is unknown.*did you mean 'words'"):
        MultimodalDataset(held.modalities, present={"word": there})
    with pytest.raises(ShapeError, match=r"present\['words'\] must have shape \(120,\)"):
        MultimodalDataset(held.modalities, present={"words": there[1:]})
    with pytest.raises(DtypeError, match=r"present\['words'\] must hold yes or no, got torch.int64"):
        MultimodalDataset(held.modalities, present={"words": there.long()})


def test_a_transformed_modality_trains_like_one_that_came_so(held, filed):
    def dimmed(picture): return picture // 2
    before = MultimodalDataset({**held.modalities, "picture": held.modalities["picture"] // 2})
    losses = []
    for data in (before, held.transformed("picture", dimmed), filed.transformed("picture", dimmed)):
        model = make()
        losses.append(fit(model, data[:80], data[80:], **QUICK)["train_loss"].tolist())
    assert losses[0] == losses[1] == losses[2]
    assert held.names == held.transformed("ecg", torch.neg).names
    assert held.modalities["picture"].equal(content()["picture"])                # as it was


@pytest.mark.parametrize("texts", [["an owl", "a cat"], np.array(["an owl", "a cat"]),
                                   np.array(["an owl", None], dtype=object)])
def test_text_is_told_what_it_has_to_become(texts):
    with pytest.raises((DataError, DtypeError), match=r"modalities\['words'\].*token ids first \(`Vocabulary`\)"):
        MultimodalDataset({"words": texts})
