"Banks in memory and in files, asked by raw rows; whole or not there, whatever happens meanwhile."
import math
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch

from gated_symile.bank import Bank, encode_bank, load_bank, retrieve, save_bank
from gated_symile.core import (DataError, DtypeError, MissingError, NonFiniteError, OutputError, RangeError, ShapeError,
                               generator)
from gated_symile.data.corruption import Missing, corrupt
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.data.xnor import synthetic_xnor
from gated_symile.encoders import MLP
from gated_symile.gate.gate import ModalityGate
from gated_symile.model import MultimodalModel
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.symile import Symile
from gated_symile.search import rank_true, top_k

NAMES, DIM = ["A", "B", "C"], 12


def model_and_data(seed=0, rows=90, missing=0.):
    "An untrained gated model, its gate made choosy, and XNOR with half of the rows misaligned."
    data = synthetic_xnor(rows, p=0.5, n_bits=4, dim=16, generator=generator(seed))
    if missing: data = corrupt(data, {"B": missing, "C": missing}, Missing(), generator(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gate = ModalityGate(3, DIM, key_dim=8, temperature=0.15)
        encoders = {name: MLP(16, DIM, width=16, depth=1, dropout=0.5) for name in NAMES}
        model = MultimodalModel(encoders, GatedSymile(gate))
    return model.train(), data


def there(data): return torch.stack([data.is_present(name) for name in data.names], 1)


def test_retrieve_finds_what_the_scores_say():
    model, data = model_and_data(rows=40, missing=0.2)
    data = MultimodalDataset(data.modalities, ids=[f"row {i}" for i in range(40)])[there(data).sum(1) > 1]
    table = retrieve(model, data.select(["C", "B"]), data, "A", k=3, block_size=7)
    with torch.no_grad(): scores = model.score(model.embed(data), 0, data.present)
    values, found = scores.sort(1, descending=True)
    assert table["query"].tolist() == [i for i in data.ids for _ in range(3)]
    assert table["rank"].tolist() == [1, 2, 3]*len(data)
    assert table.candidate.tolist() == [data.ids[j] for row in found[:, :3].tolist() for j in row]
    assert table.score.tolist() == pytest.approx(values[:, :3].flatten().tolist(), abs=1e-4, rel=1e-4)


# Banks in files

@pytest.fixture
def filed(tmp_path):
    "A model in training mode, its data, and the path of a bank."
    return *model_and_data(rows=100), tmp_path/"banks"/"A.npy"


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_bank_in_a_file_is_the_one_in_memory(filed, precision):
    model, data, path = filed
    data = MultimodalDataset(data.modalities, ids=[f"row {i}" for i in range(100)])
    saved = save_bank(model, data, "A", path, precision, block_size=7)
    assert saved.ids == data.ids and saved.embeddings.dtype == getattr(torch, precision)
    assert os.listdir(path.parent) == ["A.npy"]
    loaded, inside = load_bank(path, data.ids), encode_bank(model, data, "A", block_size=9)
    assert np.array_equal(np.load(path), saved.embeddings) and torch.equal(loaded.embeddings, saved.embeddings)
    near = 1e-6 if precision == "float32" else 1e-3
    torch.testing.assert_close(loaded.embeddings.float(), inside.embeddings, atol=near, rtol=0)
    queries, asked = model.embed(data, names=["B", "C"]), data.select(["C", "B"])
    banks = loaded, Bank(loaded.embeddings.float().clone(), data.ids)
    found = [top_k(model.objective, [bank.embeddings, *queries], 0, 5, memory=0.2) for bank in banks]
    ranks = [rank_true(model.objective, [bank.embeddings, *queries], 0, memory=0.2) for bank in banks]
    assert all(map(torch.equal, *found)) and torch.equal(ranks[0].above, ranks[1].above)
    tables = [retrieve(model, asked, bank, "A", k=3, memory=0.2) for bank in banks]
    assert tables[0].equals(tables[1])
    if precision == "float32": assert tables[0].candidate.equals(retrieve(model, asked, data, "A", k=3).candidate)
    assert all(module.training for module in model.modules())                    # dropout was off, and is on again


def test_rows_are_encoded_a_block_at_a_time(filed):
    model, data, path = filed
    seen, encode = [], model.encode_modality
    model.encode_modality = lambda name, x, present: seen.append(len(x)) or encode(name, x, present)
    save_bank(model, data, "A", path, block_size=30)
    encode_bank(model, data, "A", block_size=50)
    assert seen == [30, 30, 30, 10, 50, 50]


class Interrupted:
    "The model, until it has encoded so many blocks; then something else happens."
    def __init__(self, model, blocks, event): self.model, self.left, self.event = model, blocks, event
    def __getattr__(self, name): return getattr(self.model, name)
    def encode_modality(self, *args):
        self.left -= 1
        return self.event() if self.left < 0 else self.model.encode_modality(*args)


def interrupt(): raise KeyboardInterrupt


def test_an_interrupted_bank_is_not_there(filed):
    model, data, path = filed
    with pytest.raises(KeyboardInterrupt): save_bank(Interrupted(model, 2, interrupt), data, "A", path, block_size=30)
    assert os.listdir(path.parent) == []
    old = save_bank(model, data, "A", path)
    before = old.embeddings.clone()
    with pytest.raises(KeyboardInterrupt): save_bank(Interrupted(model, 2, interrupt), data, "A", path, block_size=30)
    assert os.listdir(path.parent) == ["A.npy"] and torch.equal(load_bank(path).embeddings, before)
    save_bank(model, data, "B", path)  # a new bank in its place: who has the old one keeps it
    assert torch.equal(old.embeddings, before) and not torch.equal(load_bank(path).embeddings, before)


def test_a_killed_process_leaves_no_half_bank(tmp_path):
    code = f"""if True:
        import os, signal, torch
        from torch import nn
        from gated_symile.bank import save_bank
        from gated_symile.model import MultimodalModel
        from gated_symile.objectives.symile import Symile
        class Killed(MultimodalModel):
            blocks = 0
            def encode_modality(self, name, x, present):
                self.blocks += 1
                if self.blocks == 3: os.kill(os.getpid(), signal.SIGKILL)
                return x
        model = Killed(dict(A=nn.Identity(), B=nn.Identity()), Symile())
        save_bank(model, torch.randn(10_000, 64), "A", {str(tmp_path/"A.npy")!r})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9 and not (tmp_path/"A.npy").exists(), done.stderr
    assert [name.startswith(".A.npy") for name in os.listdir(tmp_path)] == [True]


@contextmanager
def largest_file(size):
    "No file may grow longer than that: what a full disk does to whoever writes."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_and_leaves_nothing(filed):
    model, data, path = filed
    with largest_file(3000), pytest.raises(OutputError, match="A.npy can't be written: File too large"):
        save_bank(model, data, "A", path, block_size=30)
    assert os.listdir(path.parent) == []
    with pytest.raises(OutputError, match="can't be written"): save_bank(model, data, "A", "/dev/null/A.npy")


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_bank_of_any_precision_is_searched(tmp_path, kind):
    "What numpy writes by default, float64, is found like float32; queries in float64 get scores in float64."
    model, data = model_and_data()
    bank = encode_bank(model, data, "A")
    np.save(tmp_path/"bank.npy", bank.embeddings.numpy().astype(kind))
    mapped = load_bank(tmp_path/"bank.npy")
    queries = data.select(["B", "C"])
    expected, found = (retrieve(model, queries, b, "A", k=3) for b in (Bank(mapped.embeddings.float().clone()), mapped))
    assert found.equals(expected)
    e = [x.double() for x in model.embed(data)]
    e[0] = mapped.embeddings
    scores, indices = top_k(Symile(), e, 0, 3, present=there(data))
    exact = Symile().score([e[0].double(), *e[1:]], 0, there(data)).topk(3).values
    assert scores.dtype == torch.float64 and torch.allclose(scores, exact, rtol=1e-12)
    ranks = rank_true(Symile(), e, 0)
    assert torch.equal(ranks.above, rank_true(Symile(), [e[0].double(), *e[1:]], 0).above)
    with pytest.raises(DtypeError, match="share one dtype"): top_k(Symile(), [e[0], e[1], e[2].float()], 0)


@pytest.mark.parametrize("ids", [np.arange(10, 30), pd.Series(range(10, 30)), range(10, 30), tuple(range(10, 30)),
                                 {i: None for i in range(10, 30)}.keys()], ids=type)
def test_ids_come_in_many_kinds(ids):
    model, data = model_and_data()
    bank = encode_bank(model, MultimodalDataset(data.modalities)[:20], "A")
    assert Bank(bank.embeddings, ids).ids == list(range(10, 30))
    queries = data.select(["B", "C"])[:4]
    by_row, by_id = (retrieve(model, queries, b, "A", k=3) for b in (bank, Bank(bank.embeddings, ids)))
    assert (by_row["candidate"] + 10).tolist() == by_id["candidate"].tolist()
    with pytest.raises(ShapeError, match="each of the 20 candidates, got 3"): Bank(bank.embeddings, np.arange(3))


def test_what_a_bank_cannot_be(filed):
    model, data, path = filed
    queries = data.select(["B", "C"])
    save_bank(model, data, "A", path)
    for wrong in (Bank(torch.randn(5, DIM + 1)), Bank(data.modalities["A"])):         # raw rows by mistake
        with pytest.raises(ShapeError, match="share one width D"): retrieve(model, queries, wrong, "A", k=1)
    with pytest.raises(RangeError, match=r"k must lie in \[1, 100\], got 101"):
        retrieve(model, queries, load_bank(path), "A", k=101)
    with pytest.raises(ShapeError, match="no rows"):
        top_k(model.objective, [torch.empty(0, DIM), *[torch.randn(3, DIM)]*2], 0, 1)
    missing = MultimodalDataset({"A": torch.cat([torch.full((1, 16), math.nan), data.modalities["A"]])})
    with pytest.raises(MissingError, match=r"'A' is missing in 1 rows, the first: \[0\]; leave them out"):
        save_bank(model, missing, "A", path)
    table = retrieve(model, queries, encode_bank(model, missing, "A"), "A", k=100)
    assert set(table.candidate) == set(range(1, 101))                            # by their own row numbers
    with pytest.raises(MissingError, match="nothing but the target, 'A'"):
        retrieve(model, data.select("A"), data, "A", k=1)
    model.encode_modality = lambda name, x, present: x * 1e5                     # too large for half precision
    with pytest.raises(NonFiniteError, match="'A' in float16 has .* the first: "):
        save_bank(model, data, "A", path, "float16")


def test_rows_go_in_as_they_were_read(filed):
    "The model knows means and scales, and refuses rows that are standardised already; by whichever way they come."
    model, data, path = filed
    raw = MultimodalDataset({name: 3*x + torch.linspace(40, 60, 16) for name, x in data.modalities.items()})
    plain = encode_bank(model, data, "A").embeddings
    with pytest.warns(UserWarning, match="constant"): model.standardiser.fit(raw)
    bank, queries = encode_bank(model, raw, "A"), raw.select(["B", "C"])
    assert (bank.embeddings - plain).abs().max() > 0.01
    assert torch.equal(save_bank(model, raw, "A", path).embeddings, bank.embeddings)
    assert torch.equal(encode_bank(model, raw.modalities["A"], "A").embeddings, bank.embeddings)
    done = MultimodalDataset({name: model.standardiser(name, x) for name, x in raw.modalities.items()})
    for use in (lambda: encode_bank(model, done, "A"), lambda: save_bank(model, done, "A", path),
                lambda: retrieve(model, done.select(["B", "C"]), bank, "A", k=1),
                lambda: retrieve(model, queries, done, "A", k=1)):
        with pytest.raises(DataError, match="as they were read"): use()
    assert len(retrieve(model, queries, bank, "A", k=1)) == 100
