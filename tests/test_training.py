"""Training as a whole: the same bits again, holes that never reach a weight, objectives that learn, interruption, and failure."""
import hashlib
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import nn

from gated_symile.core import (DataError, DtypeError, GatedSymileError, MissingError, NonFiniteError, OutputError, ShapeError, UnknownNameError,
                               generator)
from gated_symile.data.corruption import corrupt, Swap
from gated_symile.data.dataset import MultimodalDataset, standardise
from gated_symile.encoders import MLP
from gated_symile.gate.gate import ModalityGate
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.symile import Symile
from gated_symile.retrieval import encode_bank, retrieve
from gated_symile.training import MultimodalModel, fit, load_weights, near_equal_batches, rank_dataset, save_model

DIM = 32
OBJECTIVES = {
    "PairwiseCLIP": PairwiseCLIP,
    "Symile": Symile,
    "Symile candidates": lambda: Symile(negatives="candidates"),
    "GatedSymile": lambda: GatedSymile(ModalityGate(3, DIM, key_dim=16)),
}
QUICK = dict(target="A", epochs=3, batch_size=50, progress=False)


def views(rows, seed=0, features=8):
    """Three mixtures of the same 4 hidden numbers, with a little noise."""
    hidden, noise = torch.randn(rows, 4, generator=generator(seed)), generator(seed + 1000)
    mix = {name: torch.randn(4, features, generator=generator(m)) for m, name in enumerate("ABC")}
    return MultimodalDataset({name: hidden @ w + 0.1*torch.randn(rows, features, generator=noise) for name, w in mix.items()})


def make(objective="Symile", seed=0, **kwargs):
    """A small model; the same seed gives the same initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultimodalModel({name: MLP(8, DIM, width=48, depth=1, **kwargs) for name in "ABC"}, OBJECTIVES[objective]())


def weights(model): return {name: x.clone() for name, x in model.state_dict().items()}


def same(a, b): return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def digest(model):
    """All bits of all weights in one text."""
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in model.state_dict().values())).hexdigest()


TRAIN, VALID = views(160), views(60, seed=1)


# Determinism

def train_with_everything_random():
    """Dropout, shuffled negatives, holes: whatever draws random numbers."""
    torch.set_num_threads(1)
    present = torch.rand(160, 3, generator=generator(5)) > 0.2
    model = make("Symile", dropout=0.2, input_dropout=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, MultimodalDataset(TRAIN.modalities, present), VALID, **QUICK, seed=3)
    return digest(model)


def test_another_process_gets_the_same_bits():
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_training as t; print(t.train_with_everything_random())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
                          env={**os.environ, "PYTHONHASHSEED": "17", "PYTHONPATH": os.pathsep.join(sys.path)})
    torch.manual_seed(99)  # whatever state others left is of no influence
    assert done.stdout.strip() == train_with_everything_random()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_seed_same_bits_and_another_seed_others(name):
    runs = {}
    for run, seed in (("first", 0), ("again", 0), ("other", 1)):
        runs[run] = make(name, dropout=0.1)
        fit(runs[run], TRAIN, VALID, **QUICK, seed=seed)
    assert digest(runs["first"]) == digest(runs["again"]) != digest(runs["other"])


def test_global_random_state_is_untouched():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    fit(make(dropout=0.5), TRAIN, VALID, **QUICK)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_fit_is_the_plain_loop():
    """The oracle: the recipe written down without any of the machinery."""
    by_fit, plain = make("Symile candidates"), make("Symile candidates")
    fit(by_fit, TRAIN, VALID, target="A", epochs=1, batch_size=50, warmup_steps=10, clip=0.5, progress=False)
    decayed, other = list(plain.encoders.parameters()), list(plain.objective.parameters())
    optimiser = AdamWScheduleFree([dict(params=decayed, weight_decay=0.01), dict(params=other)], lr=1e-3, betas=(0.9, 0.95), eps=1e-7,
                                  weight_decay=0., warmup_steps=10)
    optimiser.train()
    for rows in near_equal_batches(160, 50, generator(0)):
        optimiser.zero_grad()
        plain.loss(TRAIN[rows]).backward()
        nn.utils.clip_grad_norm_(decayed + other, 0.5)
        optimiser.step()
    optimiser.eval()
    assert same(weights(by_fit), weights(plain))


# Missing modalities

@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_missing_never_reaches_a_weight(name):
    """NaN, a huge number, or another row's values in the missing places: the same bits come out."""
    present = torch.rand(160, 3, generator=generator(7)) > 0.3
    valid_present = torch.rand(60, 3, generator=generator(8)) > 0.3
    digests = []
    for content in (torch.nan, 1e30, -3.):
        fill = lambda data, there: MultimodalDataset(
            {n: torch.where(there[:, m, None], data.modalities[n], content) for m, n in enumerate("ABC")}, there)
        model = make(name)
        with pytest.warns(UserWarning, match="left out"):
            history = fit(model, fill(TRAIN, present), fill(VALID, valid_present), **QUICK)
        assert history["train_loss"].notna().all() and all(x.isfinite().all() for x in model.parameters())
        digests.append(digest(model))
    assert len(set(digests)) == 1


def test_rows_left_out_are_counted():
    present = torch.ones(160, 3, dtype=torch.bool)
    present[:5, 1:] = False  # only A is left: nothing to learn from
    valid_present = torch.ones(60, 3, dtype=torch.bool)
    valid_present[:7, 0] = False  # no target
    valid_present[7:9, 1:] = False  # no query
    with pytest.warns(UserWarning) as caught:
        fit(make(), MultimodalDataset(TRAIN.modalities, present), MultimodalDataset(VALID.modalities, valid_present), **QUICK)
    said = " | ".join(str(w.message) for w in caught)
    assert "train: 5 of 160 rows left out" in said and "valid: 9 of 60 rows left out" in said and len(caught) == 2


# Standardised rows

PATIENTS = MultimodalDataset({"A": 5 + 3*TRAIN.modalities["A"], "B": TRAIN.modalities["B"]/100, "C": TRAIN.modalities["C"]})
LATER = MultimodalDataset({"A": 5 + 3*VALID.modalities["A"], "B": VALID.modalities["B"]/100, "C": VALID.modalities["C"]})


def test_a_trained_model_takes_only_rows_standardised_as_its_own():
    train, valid = standardise(PATIENTS, LATER)
    model, other = make(), standardise(LATER)[0]
    fit(model, train, valid, **QUICK)
    assert model.standardiser is train.standardised
    rank_dataset(model, valid, "A")
    for use in (lambda rows: rank_dataset(model, rows, "A"), model.embed, model.loss, lambda rows: encode_bank(model, rows, "A"), lambda rows: retrieve(model, rows, rows, "A")):
        use(valid); use(corrupt(valid, {"B": 0.5}, Swap(), generator(0))[5:20])
        with pytest.raises(DataError, match="rows of 'A'.* are as they were read"): use(LATER)
        with pytest.raises(DataError, match="rows of 'A'.* were standardised by other means and scales"): use(other)
    with pytest.raises(DataError, match="as they were read"): retrieve(model, LATER.select(["B"]).modalities, encode_bank(model, valid, "A"), "A")


def test_only_what_the_model_reads_has_to_be_alike():
    scaled, = standardise(PATIENTS)
    model = MultimodalModel({name: nn.Linear(8, DIM) for name in "AB"}, Symile())
    fit(model, scaled, scaled, **QUICK)
    strange = standardise(MultimodalDataset({**PATIENTS.modalities, "C": 9*PATIENTS.modalities["C"], "D": PATIENTS.modalities["A"]}))[0]
    rank_dataset(model, strange, "A")                                            # C and D are no affair of this model's
    partly = standardise(MultimodalDataset({**PATIENTS.modalities, "B": 9*PATIENTS.modalities["B"]}))[0]
    with pytest.raises(DataError, match="the rows of 'B' were"): rank_dataset(model, partly, "A")
    late = MultimodalDataset({"A": scaled.modalities["A"], "B": PATIENTS.modalities["B"]}, standardised=standardise(PATIENTS.select("A"))[0].standardised)
    with pytest.raises(DataError, match="the rows of 'B' were"): rank_dataset(model, late, "A")


@pytest.mark.parametrize("scale", [1., 1e-13, 1e9])
def test_standardisers_that_do_the_same_are_alike_in_any_unit(scale):
    "The same rows in another order or on another day; a column without a value, one without a spread, one around zero."
    x = torch.randn(50, 8, generator=generator(3)) * scale
    x[:, 0], x[:, 1] = torch.nan, 4*scale
    x[:, 2] -= x[:, 2].mean()
    rows = MultimodalDataset({"A": x, "B": x.flip(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two, shifted = (standardise(r)[0] for r in (rows, rows[torch.randperm(50, generator=generator(4))],
                                                         MultimodalDataset({"A": x + scale*torch.eye(8)[5], "B": x.flip(1)})))
    model = MultimodalModel({name: nn.Linear(8, DIM) for name in "AB"}, Symile())
    model.standardiser = one.standardised
    model.embed(two)
    with pytest.raises(DataError, match="the rows of 'A' were"): model.embed(shifted)


def test_validation_rows_are_standardised_as_the_training_rows():
    train, valid = standardise(PATIENTS, LATER)
    for wrong in (LATER, standardise(LATER)[0]):
        model, before = make(), weights(make())
        with pytest.raises(DataError, match="valid: the rows of 'A', 'B', 'C' are not standardised as those of train"): fit(model, train, wrong, **QUICK)
        assert model.standardiser is None and same(weights(model), before)
    fit(model, train, standardise(PATIENTS)[0], **QUICK)                          # alike, though not the same object


def test_nothing_is_asked_of_a_model_trained_on_rows_as_they_are(tmp_path):
    model, scaled = make(), standardise(TRAIN)[0]
    fit(model, scaled, scaled, **QUICK)
    save_model(model, tmp_path/"model.safetensors")
    fit(model, TRAIN, VALID, **QUICK)                                             # what it was trained on last is what counts
    assert model.standardiser is None
    for rows in (VALID, scaled): rank_dataset(model, rows, "A")
    model.standardiser = scaled.standardised
    load_weights(model, tmp_path/"model.safetensors")                             # the weights of who knows which rows
    assert model.standardiser is None


def test_the_standardiser_changes_no_bit_of_the_training():
    train, valid = standardise(PATIENTS, LATER)
    told, untold = make(), make()
    fit(told, train, valid, **QUICK)
    fit(untold, MultimodalDataset(train.modalities), MultimodalDataset(valid.modalities), **QUICK)
    assert digest(told) == digest(untold)


# Batches in which nothing can be contrasted

TWO_OF_THREE = MultimodalDataset(TRAIN[:48].modalities, torch.arange(48)[:, None] % 3 != torch.arange(3))


class Counts(PairwiseCLIP):
    "Keeps every loss, and how many rows it is of; none where nothing can be contrasted."
    def __init__(self): super().__init__(); self.losses = []
    def forward(self, embeddings, present=None, generator=None):
        self.losses.append((None, len(embeddings[0])))
        loss = super().forward(embeddings, present)
        self.losses[-1] = loss.item(), len(embeddings[0])
        return loss


def test_an_unlucky_batch_is_skipped_and_counted():
    model = MultimodalModel({name: nn.Linear(8, DIM) for name in "ABC"}, Counts())
    with pytest.warns(UserWarning, match="batches skipped") as caught: history = fit(model, TWO_OF_THREE, VALID, **{**QUICK, "batch_size": 2})
    losses = model.objective.losses
    skipped = sum(loss is None for loss, _ in losses)
    assert len(losses) == 72 and 20 < skipped < 60
    told = f"train: {skipped} of 72 batches skipped (present: no pair of modalities is present in 2 rows, so nothing can be contrasted); larger batches make that rarer"
    assert [str(w.message) for w in caught] == [told]
    for epoch, loss in enumerate(history["train_loss"]):
        used = [(value, n) for value, n in losses[24*epoch:24*(epoch + 1)] if value is not None]
        assert loss == pytest.approx(sum(value*n for value, n in used) / sum(n for _, n in used))


def test_skipping_is_the_plain_loop_without_those_batches():
    by_fit, plain = make("PairwiseCLIP"), make("PairwiseCLIP")
    with pytest.warns(UserWarning, match="batches skipped"):
        fit(by_fit, TWO_OF_THREE, VALID, target="A", epochs=1, batch_size=2, warmup_steps=3, weight_decay=0., clip=1e9, progress=False)
    optimiser = AdamWScheduleFree(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-7, weight_decay=0., warmup_steps=3)
    optimiser.train()
    for rows in near_equal_batches(48, 2, generator(0)):
        if rows[0] % 3 != rows[1] % 3: continue                                   # they share one modality, and no pair
        optimiser.zero_grad()
        plain.loss(TWO_OF_THREE[rows]).backward()
        optimiser.step()
    optimiser.eval()
    assert same(weights(by_fit), weights(plain))


def test_an_epoch_without_any_batch_is_an_error():
    model, before = make("PairwiseCLIP"), weights(make("PairwiseCLIP"))
    with pytest.raises(MissingError, match=r"epoch 1: none of 1 batches can be used \(present: no pair of modalities"): fit(model, TWO_OF_THREE[:3], VALID, **QUICK)
    assert same(weights(model), before)


def test_numbers_of_numpy_train_too():
    one, two = make(), make()
    settings = dict(epochs=2, batch_size=50, patience=1, bank_size=20, warmup_steps=3, seed=4, learning_rate=0.5, weight_decay=0.25, clip=0.5)
    fit(one, TRAIN, VALID, "A", **settings, progress=False)
    fit(two, TRAIN, VALID, "A", **{name: np.int64(x) if isinstance(x, int) else np.float32(x) for name, x in settings.items()}, progress=False)
    assert digest(one) == digest(two)


def test_present_is_a_tensor():
    for use in (make().encode, make().loss):
        with pytest.raises(DtypeError, match="present must be a bool tensor, got list"): use(TRAIN[:2], present=[[True]*3]*2)
        with pytest.raises(ShapeError, match=r"present must have shape \(2, 3\)"): use(TRAIN[:2].modalities, present=torch.ones(3, 2, dtype=torch.bool))


# Learning

@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns(name):
    model, test = make(name), views(100, seed=2)
    before = rank_dataset(model, test, "A")[0].top(1).mean()
    fit(model, views(400), views(100, seed=1), target="A", epochs=12, learning_rate=1e-2, batch_size=50, warmup_steps=20, progress=False)
    after = rank_dataset(model, test, "A")[0].top(1).mean()
    assert before < 0.15 and after > 0.75, f"{name}: top-1 of 100 from {before:.2f} to {after:.2f}"


def test_two_and_four_modalities():
    for names in ("AB", "ABCD"):
        data = MultimodalDataset({n: TRAIN.modalities["ABC"[i % 3]] for i, n in enumerate(names)})
        model = MultimodalModel({n: MLP(8, DIM) for n in names}, GatedSymile(ModalityGate(len(names), DIM, key_dim=8)))
        assert len(fit(model, data, data[:50], **QUICK)) == 3


# The best weights

class Scripted(PairwiseCLIP):
    """Ranks perfectly after the epochs of a script and knows nothing after the others, whatever was learnt."""
    def __init__(self, good): super().__init__(); self.good, self.steps = good, 0

    def forward(self, *args): self.steps += 1; return super().forward(*args)

    def score(self, embeddings, target, present=None):
        shape = len(embeddings[0 if target else 1]), len(embeddings[target])
        return torch.eye(*shape) if self.steps / 4 in self.good else torch.zeros(shape)  # 4 batches an epoch


def test_early_stopping_keeps_the_best():
    histories, models = {}, {}
    for epochs in (2, 20):
        torch.manual_seed(0)
        models[epochs] = MultimodalModel({name: MLP(8, DIM) for name in "ABC"}, Scripted(good={2}))
        histories[epochs] = fit(models[epochs], TRAIN, VALID[:16], **{**QUICK, "epochs": epochs}, patience=3)
    assert histories[20]["valid_top1"].tolist() == [1/16, 1, 1/16, 1/16, 1/16] and histories[20]["best"].tolist() == [False, True] + [False]*3
    assert same(weights(models[20]), weights(models[2]))  # three more epochs have left no trace


def test_equal_is_not_better():
    history = fit(make(), TRAIN, VALID, target="A", epochs=9, learning_rate=0., patience=2, progress=False)
    assert history["epoch"].tolist() == [1, 2, 3] and history["best"].tolist() == [True, False, False]
    assert len(fit(make(), TRAIN, VALID, target="A", epochs=6, learning_rate=0., patience=None, progress=False)) == 6


# Interruption and failure

class Interrupts(MLP):
    """Raises an exception at one of its training calls, or returns a factor's worth of trouble."""
    def __init__(self, at, error=KeyboardInterrupt, factor=None):
        super().__init__(8, DIM, width=48, depth=1)
        self.at, self.error, self.factor, self.calls = at, error, factor, 0

    def forward(self, x):
        self.calls += self.training
        if not self.training or self.calls != self.at: return super().forward(x)
        if self.factor is None: raise self.error
        return super().forward(x) * self.factor


def with_trouble(**kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MultimodalModel({"A": MLP(8, DIM), "B": MLP(8, DIM), "C": Interrupts(**kwargs)}, Symile())


def test_an_interrupt_keeps_the_best_and_training_can_go_on():
    whole, cut = with_trouble(at=0), with_trouble(at=4*3 + 2)  # 4 batches an epoch: in the fourth epoch
    expected = fit(whole, TRAIN, VALID, **QUICK)
    with pytest.warns(UserWarning, match="interrupted in epoch 4"):
        history = fit(cut, TRAIN, VALID, **{**QUICK, "epochs": 50})
    columns = [c for c in history if c != "seconds"]
    assert history[columns].equals(expected[columns]) and same(weights(cut), weights(whole))
    assert not cut.training and len(fit(cut, TRAIN, VALID, **QUICK)) == 3


def test_an_interrupt_in_the_first_epoch():
    model = with_trouble(at=2)
    with pytest.warns(UserWarning, match="interrupted in epoch 1"): history = fit(model, TRAIN, VALID, **QUICK)
    assert len(history) == 0 and "valid_top1" in history and all(p.isfinite().all() for p in model.parameters())


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights():
    model, whole = with_trouble(at=4*2 + 3, factor=torch.nan), with_trouble(at=0)
    with pytest.raises(NonFiniteError, match="epoch 3, step 3 of 4"): fit(model, TRAIN, VALID, **QUICK)
    fit(whole, TRAIN, VALID, **{**QUICK, "epochs": 2})
    assert same(weights(model), weights(whole))  # the best weights of the two epochs that were well


def test_a_gradient_that_is_not_finite_stops_too():
    class Root(PairwiseCLIP):  # the square root of 0 has an infinite slope, and a finite value
        def forward(self, embeddings, present=None, generator=None):
            return super().forward(embeddings) + (embeddings[0] - embeddings[0].detach()).norm(dim=1).square().sum().sqrt()
    model = MultimodalModel({name: MLP(8, DIM) for name in "ABC"}, Root())
    before = weights(model)
    with pytest.raises(NonFiniteError, match="epoch 1, step 1 of 4.*gradient"): fit(model, TRAIN, VALID, **QUICK)
    assert same(weights(model), before)


@pytest.mark.parametrize("change, error, message", [
    (dict(target="D"), UnknownNameError, "target: 'D' is unknown"),
    (dict(precision="fp16"), UnknownNameError, "'float32', 'bfloat16'"),
    (dict(device="abacus"), UnknownNameError, "device: 'abacus' can't be used here"),
    (dict(batch_size=1), GatedSymileError, "batch_size must lie in"),
    (dict(epochs=1.5), GatedSymileError, "epochs must be a whole number"),
    (dict(learning_rate=float("nan")), GatedSymileError, "learning_rate must lie in"),
    (dict(train=TRAIN.select(["A", "B"])), UnknownNameError, "'C' is unknown"),
    (dict(train=MultimodalDataset({**TRAIN.modalities, "B": TRAIN.modalities["B"]*torch.nan})), MissingError, "'B' is present in 0 rows"),
    (dict(train=MultimodalDataset({**TRAIN.modalities, "B": TRAIN.modalities["B"].index_fill(1, torch.tensor([2]), torch.nan)})),
     NonFiniteError, "epoch 1, step 1 of 4: modality 'B' has NaN"),
    (dict(valid=MultimodalDataset({**VALID.modalities, "A": VALID.modalities["A"]*torch.nan})), MissingError, "valid: 0 of 60 rows have 'A'"),
])
def test_bad_input(change, error, message):
    model, before = make(), weights(make())
    with pytest.raises(error, match=message): fit(model, **{**dict(train=TRAIN, valid=VALID), **QUICK, **change})
    assert same(weights(model), before)


# Checkpoints

def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, model = tmp_path/"model.safetensors", make()
    save_model(model, path)
    whole = path.read_bytes()

    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="No space left on device"): save_model(make(seed=1), path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_round_trip(name, tmp_path):
    model, fresh = make(name), make(name, seed=1)
    fit(model, TRAIN, VALID, **QUICK)
    save_model(model, tmp_path/"model.safetensors", {"objective": name, "p": [0, 0.5]})
    assert load_weights(fresh, tmp_path/"model.safetensors") == {"objective": name, "p": [0, 0.5]}
    assert same(weights(fresh), weights(model))
    ranks = [rank_dataset(m, VALID, "A")[0] for m in (model, fresh)]
    assert torch.equal(ranks[0].above, ranks[1].above)


def test_shared_encoders_are_saved_too(tmp_path):
    """Two modalities may share one encoder: its weights are trained once and come back."""
    shared = MLP(8, DIM)
    model = MultimodalModel({"A": shared, "B": shared, "C": MLP(8, DIM)}, Symile())
    fit(model, TRAIN, VALID, **QUICK)
    save_model(model, tmp_path/"model.safetensors")
    again = MLP(8, DIM)
    fresh = MultimodalModel({"A": again, "B": again, "C": MLP(8, DIM)}, Symile())
    load_weights(fresh, tmp_path/"model.safetensors")
    assert same(weights(fresh), weights(model))


def test_a_changed_byte_in_the_header_is_refused(tmp_path):
    path = tmp_path/"model.safetensors"
    save_model(make(), path)
    content = bytearray(path.read_bytes())
    for broken in (bytes([255])*8 + bytes(content[8:]), bytes(content[:8]) + b"?" + bytes(content[9:]), b""):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="not a whole safetensors file"): load_weights(make(), path)
