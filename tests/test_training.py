"Training as a whole: the same bits again, holes that never reach a weight, learning, interruption, failure, own parts."
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

from gated_symile.core import (DataError, DtypeError, GatedSymileError, MissingError, NonFiniteError, UnknownNameError,
                               generator)
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.encoders import MLP
from gated_symile.gate.gate import ModalityGate
from gated_symile.model import MultimodalModel
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.symile import Symile
from gated_symile.search import rank_dataset
from gated_symile.training import fit, near_equal_batches

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
    def seen(w): return hidden @ w + 0.1*torch.randn(rows, features, generator=noise)
    return MultimodalDataset({name: seen(w) for name, w in mix.items()})


def make(objective="Symile", seed=0, standardise=True, **kwargs):
    """A small model; the same seed gives the same initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = {name: MLP(8, DIM, width=48, depth=1, **kwargs) for name in "ABC"}
        return MultimodalModel(encoders, OBJECTIVES[objective](), standardise)


def with_norms():
    """A small model with batch norm and dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        def encoder(): return nn.Sequential(nn.Linear(8, DIM), nn.BatchNorm1d(DIM), nn.Dropout(0.3))
        return MultimodalModel({name: encoder() for name in "ABC"}, Symile("candidates"))


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


def elsewhere(code, **variables):
    "Run code in another process, with this module as `t`."
    here = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nimport test_training as t\n"
    return subprocess.run([sys.executable, "-c", here + code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_another_process_gets_the_same_bits():
    done = elsewhere("print(t.train_with_everything_random())", PYTHONHASHSEED="17")
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
    plain.standardiser.fit(TRAIN)
    fit(by_fit, TRAIN, VALID, target="A", epochs=1, learning_rate=1e-3, batch_size=50, warmup_steps=10, clip=0.5,
        progress=False)
    decayed, other = list(plain.encoders.parameters()), list(plain.objective.parameters())
    optimiser = AdamWScheduleFree([dict(params=decayed, weight_decay=0.01), dict(params=other)], lr=1e-3,
                                  betas=(0.9, 0.95), eps=1e-7,
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
        fit(make(), MultimodalDataset(TRAIN.modalities, present), MultimodalDataset(VALID.modalities, valid_present),
            **QUICK)
    said = " | ".join(str(w.message) for w in caught)
    assert "train: 5 of 160 rows left out" in said and "valid: 9 of 60 rows left out" in said and len(caught) == 2


# Rows as they were read

PATIENTS, LATER = (MultimodalDataset({"A": 5 + 3*rows.modalities["A"], "B": rows.modalities["B"]/100,
                                      "C": rows.modalities["C"]})
                   for rows in (TRAIN, VALID))


def test_means_and_scales_are_those_of_the_training_rows():
    model = make()
    fit(model, PATIENTS, LATER, **QUICK)
    for name, x in PATIENTS.modalities.items():
        z = model.standardiser(name, x)
        torch.testing.assert_close((z.mean(0), z.std(0, correction=0)), (torch.zeros(8), torch.ones(8)), atol=1e-4,
                                   rtol=0)
    known = weights(model.standardiser)
    fit(model, PATIENTS[:80], LATER, **QUICK)                                    # trained further, it keeps them
    assert same(weights(model.standardiser), known)


def test_standardising_inside_changes_no_bit_of_the_training():
    inside, by_hand = make(), make(standardise=False)
    fit(inside, PATIENTS, LATER, **QUICK)
    def scaled(rows): return MultimodalDataset({n: inside.standardiser(n, x) for n, x in rows.modalities.items()})
    fit(by_hand, scaled(PATIENTS), scaled(LATER), **QUICK)
    assert same(weights(inside.encoders), weights(by_hand.encoders))


def test_holes_are_filled_and_told_once():
    b = PATIENTS.modalities["B"].index_fill(1, torch.tensor([2]), torch.nan)
    holes = MultimodalDataset({**PATIENTS.modalities, "B": b})
    holes.modalities["B"][:4, 2] = torch.arange(4.)
    with pytest.warns(UserWarning) as caught: history = fit(make(), holes, LATER, **QUICK)
    assert [str(w.message) for w in caught] == ["missing values filled with the training mean: B 156 of 1280"]
    assert len(history) == 3
    with pytest.raises(NonFiniteError, match="epoch 1, step 1: modality 'B' has NaN"):
        fit(make(standardise=False), holes, LATER, **QUICK)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_rows_standardised_by_hand_are_refused(part):
    model = make()
    fit(model, PATIENTS, LATER, **QUICK)
    before = weights(model)
    rows = {"train": PATIENTS, "valid": LATER}[part]
    wrong = {part: MultimodalDataset({n: (x - x.mean(0)) / x.std(0) for n, x in rows.modalities.items()})}
    with pytest.raises(DataError, match=f"^{part}: 'A': .*Give rows as they were read"):
        fit(model, **{**dict(train=PATIENTS, valid=LATER), **QUICK, **wrong})
    assert same(weights(model), before)


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
    with pytest.warns(UserWarning, match="batches skipped") as caught:
        history = fit(model, TWO_OF_THREE, VALID, **{**QUICK, "batch_size": 2})
    losses = model.objective.losses
    skipped = sum(loss is None for loss, _ in losses)
    assert len(losses) == 72 and 20 < skipped < 60
    told = (f"train: {skipped} of 72 batches skipped (present: no pair of modalities is present in 2 rows, "
            "so nothing can be contrasted); larger batches make that rarer")
    assert [str(w.message) for w in caught] == [told]
    for epoch, loss in enumerate(history["train_loss"]):
        used = [(value, n) for value, n in losses[24*epoch:24*(epoch + 1)] if value is not None]
        assert loss == pytest.approx(sum(value*n for value, n in used) / sum(n for _, n in used))


def test_skipping_is_the_plain_loop_without_those_batches():
    by_fit, plain = make("PairwiseCLIP"), make("PairwiseCLIP")
    plain.standardiser.fit(TWO_OF_THREE)
    with pytest.warns(UserWarning, match="batches skipped"):
        fit(by_fit, TWO_OF_THREE, VALID, target="A", epochs=1, learning_rate=1e-3, batch_size=2, warmup_steps=3,
            weight_decay=0., clip=1e9, progress=False)
    optimiser = AdamWScheduleFree(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.,
                                  warmup_steps=3)
    optimiser.train()
    for rows in near_equal_batches(48, 2, generator(0)):
        if rows[0] % 3 != rows[1] % 3: continue                                   # they share one modality, and no pair
        optimiser.zero_grad()
        plain.loss(TWO_OF_THREE[rows]).backward()
        optimiser.step()
    optimiser.eval()
    assert same(weights(by_fit), weights(plain))


def test_an_epoch_without_any_batch_is_an_error():
    model, before = make("PairwiseCLIP", standardise=False), weights(make("PairwiseCLIP", standardise=False))
    with pytest.raises(MissingError, match=r"epoch 1: none of 1 batches can be used \(present: no pair of modalities"):
        fit(model, TWO_OF_THREE[:3], VALID, **QUICK)
    assert same(weights(model), before)


def test_numbers_of_numpy_train_too():
    one, two = make(), make()
    settings = dict(epochs=2, batch_size=50, patience=1, bank_size=20, warmup_steps=3, seed=4, learning_rate=0.5,
                    weight_decay=0.25, clip=0.5)
    fit(one, TRAIN, VALID, "A", **settings, progress=False)
    numpys = {name: np.int64(x) if isinstance(x, int) else np.float32(x) for name, x in settings.items()}
    fit(two, TRAIN, VALID, "A", **numpys, progress=False)
    assert digest(one) == digest(two)


# Learning

@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns(name):
    model, test = make(name), views(100, seed=2)
    before = rank_dataset(model, test, "A")[0].top(1).mean()
    fit(model, views(400), views(100, seed=1), target="A", epochs=12, learning_rate=1e-2, batch_size=50,
        warmup_steps=20, progress=False)
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

    def _score(self, embeddings, target, present):
        shape = len(embeddings[0 if target else 1]), len(embeddings[target])
        return torch.eye(*shape) if self.steps / 4 in self.good else torch.zeros(shape)  # 4 batches an epoch


def test_early_stopping_keeps_the_best():
    histories, models = {}, {}
    for epochs in (2, 20):
        torch.manual_seed(0)
        models[epochs] = MultimodalModel({name: MLP(8, DIM) for name in "ABC"}, Scripted(good={2}))
        histories[epochs] = fit(models[epochs], TRAIN, VALID[:16], **{**QUICK, "epochs": epochs}, patience=3)
    assert histories[20]["valid_top1"].tolist() == [1/16, 1, 1/16, 1/16, 1/16]
    assert histories[20]["best"].tolist() == [False, True] + [False]*3
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


def test_an_interrupt_keeps_the_best_and_goes_on_to_who_started_it():
    whole, cut = with_trouble(at=0), with_trouble(at=4*3 + 2)  # 4 batches an epoch: in the fourth epoch
    fit(whole, TRAIN, VALID, **QUICK)
    words = "interrupted in epoch 4: the weights are those of epoch [123]$"
    with pytest.warns(UserWarning, match=words), pytest.raises(KeyboardInterrupt):
        fit(cut, TRAIN, VALID, **{**QUICK, "epochs": 50})
    assert same(weights(cut), weights(whole))
    assert not cut.training and len(fit(cut, TRAIN, VALID, **QUICK)) == 3


def test_an_interrupt_in_the_first_epoch_leaves_the_model_as_it_was():
    model = with_trouble(at=2)
    before = weights(model)
    words = "interrupted in epoch 1: the weights are as before, since no epoch was finished"
    with pytest.warns(UserWarning, match=words), pytest.raises(KeyboardInterrupt): fit(model, TRAIN, VALID, **QUICK)
    assert same(weights(model), before) and not model.standardiser.fitted
    fit(model, TRAIN, VALID, **QUICK)
    whole = with_trouble(at=0)
    fit(whole, TRAIN, VALID, **QUICK)
    assert same(weights(model), weights(whole))                                  # again, as if nothing had happened


def test_ctrl_c_of_a_process_is_no_finished_training():
    "A real signal: the process ends by it, and what comes after `fit` is never reached."
    done = elsewhere("""import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler) # who started the tests may ignore it
def press(line): line["epoch"] == 2 and os.kill(os.getpid(), signal.SIGINT)
t.fit(t.make(), t.TRAIN, t.VALID, **{**t.QUICK, "epochs": 1000, "patience": None}, callbacks=[press])
print("finished")""")
    assert done.returncode != 0 and "finished" not in done.stdout
    assert "KeyboardInterrupt" in done.stderr and "the weights are those of epoch" in done.stderr


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights():
    model, whole = with_trouble(at=4*2 + 3, factor=torch.nan), with_trouble(at=0)
    with pytest.raises(NonFiniteError, match="epoch 3, step 3: "): fit(model, TRAIN, VALID, **QUICK)
    fit(whole, TRAIN, VALID, **{**QUICK, "epochs": 2})
    assert same(weights(model), weights(whole))  # the best weights of the two epochs that were well


def test_a_gradient_that_is_not_finite_stops_too():
    class Root(PairwiseCLIP):  # the square root of 0 has an infinite slope, and a finite value
        def forward(self, embeddings, present=None, generator=None):
            nothing = embeddings[0] - embeddings[0].detach()
            return super().forward(embeddings) + nothing.norm(dim=1).square().sum().sqrt()
    model = MultimodalModel({name: MLP(8, DIM) for name in "ABC"}, Root())
    before = weights(model)
    with pytest.raises(NonFiniteError, match="epoch 1, step 1: .*gradient"): fit(model, TRAIN, VALID, **QUICK)
    assert same(weights(model), before)


@pytest.mark.parametrize("change, error, message", [
    (dict(target="D"), UnknownNameError, "target: 'D' is unknown"),
    (dict(precision="fp16"), UnknownNameError, "'float32', 'bfloat16'"),
    (dict(device="abacus"), UnknownNameError, "device: 'abacus' can't be used here"),
    (dict(batch_size=1), GatedSymileError, "batch_size must lie in"),
    (dict(epochs=1.5), GatedSymileError, "epochs must be a whole number"),
    (dict(learning_rate=float("nan")), GatedSymileError, "learning_rate must lie in"),
    (dict(train=TRAIN.select(["A", "B"])), UnknownNameError, "'C' is unknown"),
    (dict(train=MultimodalDataset({**TRAIN.modalities, "B": TRAIN.modalities["B"]*torch.nan})), MissingError,
     "'B' is present in 0 rows"),
    (dict(valid=VALID.modalities), DtypeError, "valid must be a MultimodalDataset, got dict"),
    (dict(device=torch.device("cuda", 99)), UnknownNameError, "device: device.*cuda.* can't be used here"),
    (dict(optimiser=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)), DtypeError,
     "optimiser must be a function from a model"),
    (dict(optimiser=lambda model: None), DtypeError, "optimiser must give an optimiser.*got NoneType"),
    (dict(device="meta"), UnknownNameError, "device: 'meta' can't be used here"),
    (dict(callbacks=print), DtypeError, "callbacks must be a list of functions"),
    (dict(train=(batch for batch in [])), DtypeError, "again and again, got generator"),
    (dict(train=[TRAIN.modalities]), MissingError, "can't be learnt from batches: call model.standardiser.fit"),
    (dict(valid=MultimodalDataset({name: 1000*x for name, x in VALID.modalities.items()})), DataError,
     "valid: 'A'.*in another unit"),
    (dict(valid=MultimodalDataset({**VALID.modalities, "A": VALID.modalities["A"]*torch.nan})), MissingError,
     "valid: 0 of 60 rows have 'A'"),
])
def test_bad_input(change, error, message):
    model, before = make(), weights(make())
    with pytest.raises(error, match=message): fit(model, **{**dict(train=TRAIN, valid=VALID), **QUICK, **change})
    assert same(weights(model), before)


def test_a_frozen_model_is_named():
    with pytest.raises(MissingError, match="model: every parameter is frozen, so there is nothing to train"):
        fit(make().requires_grad_(False), TRAIN, VALID, **QUICK)
    only = make().requires_grad_(False)
    only.objective.requires_grad_(True)                                          # one number is enough
    assert fit(only, TRAIN, VALID, **QUICK)["log_scale"].nunique() > 1


def test_a_device_may_be_a_device():
    one, two = make(), make()
    fit(one, TRAIN, VALID, **QUICK, device=torch.device("cpu")); fit(two, TRAIN, VALID, **QUICK)
    assert digest(one) == digest(two)


# Validation

def test_validation_ranks_in_the_banks_that_were_asked_for():
    "What the history says of the best epoch, `rank_dataset` says of the model, among all rows and in banks of 20."
    found = {}
    for bank_size in (None, 20):
        model = make()
        history = fit(model, TRAIN, VALID, **{**QUICK, "learning_rate": 1e-2}, bank_size=bank_size)
        found[bank_size] = history["valid_top1"].max()
        assert found[bank_size] == rank_dataset(model, VALID, "A", bank_size)[0].top(1).mean().item()
    assert found[20] > found[None]


# With parts of one's own

def test_a_logger():
    lines = []
    history = fit(make(), TRAIN, VALID, **QUICK, callbacks=[lines.append])
    assert lines == history.drop(columns="best").to_dict("records")


def test_a_loader_of_ones_own():
    "The batches that `fit` makes of a dataset, made by a loader: the same bits."
    class Loader:
        def __init__(self): self.draws = generator(0)
        def __iter__(self): return ((TRAIN[rows].modalities, None) for rows in near_equal_batches(160, 50, self.draws))
    own, usual = make("PairwiseCLIP"), make("PairwiseCLIP")
    own.standardiser.fit(TRAIN)
    fit(own, Loader(), VALID, **QUICK); fit(usual, TRAIN, VALID, **QUICK)
    assert digest(own) == digest(usual)


def test_the_loader_of_torch():
    rows = range(160)
    def take(rows): return TRAIN[rows].modalities, torch.ones(40, 3).bool()
    loader = torch.utils.data.DataLoader(rows, batch_size=40, shuffle=True, collate_fn=take)
    models = [make(), make()]
    for model in models:
        model.standardiser.fit(TRAIN)
        history = fit(model, loader, VALID, **{**QUICK, "epochs": 8, "learning_rate": 1e-2, "warmup_steps": 5})
        assert history["valid_top1"].max() > 0.3
    assert digest(models[0]) == digest(models[1])                                # its shuffle hangs on the seed, too


def test_a_batch_without_a_modality_is_named():
    model = make()
    model.standardiser.fit(TRAIN)
    with pytest.raises(MissingError, match="none of 1 batches can be used .batch lacks 'C'; it has 'A', 'B'"):
        fit(model, [TRAIN.select(["A", "B"]).modalities], VALID, **QUICK)
    with pytest.raises(DtypeError, match="a batch must be a dict of tensors, or with present, got Tensor"):
        fit(model, [torch.ones(2, 8)], VALID, **QUICK)


def test_what_else_a_batch_carries_is_left_alone():
    one, two = make(), make()
    plain = [TRAIN[rows].modalities for rows in torch.arange(160).split(40)]
    rich = [{"id": ["a"]*40, **batch, "D": object()} for batch in plain]
    for model, batches in ((one, plain), (two, rich)):
        model.standardiser.fit(TRAIN)
        fit(model, batches, VALID, **QUICK)
    assert digest(one) == digest(two)


def test_a_last_batch_of_one_row_is_skipped_and_counted():
    "With batch norm, which knows no variance of a single row; as if that batch weren't there."
    models = [with_norms(), with_norms()]
    batches = [TRAIN[rows].modalities for rows in torch.arange(81).split(40)]
    for model in models: model.standardiser.fit(TRAIN)
    with pytest.warns(UserWarning, match="3 of 9 batches skipped .a single row has nothing.*drop_last=True"):
        fit(models[0], batches, VALID, **QUICK)
    fit(models[1], batches[:2], VALID, **QUICK)
    assert digest(models[0]) == digest(models[1])
    for nothing, why in (([batches[2]], "a single row"), ([{}], "batch lacks 'A', 'B', 'C'")):
        with pytest.raises(MissingError, match=f"none of 1 batches can be used .{why}"):
            fit(models[0], nothing, VALID, **QUICK)


def test_an_optimiser_of_ones_own():
    by_fit, plain = make("PairwiseCLIP"), make("PairwiseCLIP")
    def sgd(model): return torch.optim.SGD(model.parameters(), lr=0.1)
    fit(by_fit, TRAIN, VALID, **{**QUICK, "epochs": 1}, optimiser=sgd, clip=1e9)
    plain.standardiser.fit(TRAIN)
    optimiser = sgd(plain)
    for rows in near_equal_batches(160, 50, generator(0)):
        optimiser.zero_grad()
        plain.loss(TRAIN[rows]).backward()
        optimiser.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), by_fit.parameters()))


def test_an_optimiser_with_two_sets_of_weights_is_switched():
    modes = []
    class Switched(torch.optim.SGD):
        def train(self): modes.append("train")
        def eval(self): modes.append("eval")
    fit(make(), TRAIN, VALID, **QUICK, optimiser=lambda model: Switched(model.parameters(), lr=0.1))
    assert modes == ["train", "eval"]*3 + ["eval"]


class Anything(nn.Module):
    "An objective that is any module with `forward` and `score`."
    def score(self, embeddings, target, present=None):
        return sum(e for m, e in enumerate(embeddings) if m != target) @ embeddings[target].T
    def forward(self, embeddings, present=None, generator=None):
        return nn.functional.cross_entropy(10 * self.score(embeddings, 0), torch.arange(len(embeddings[0])))


def test_any_module_with_a_loss_and_a_score_will_do():
    model = MultimodalModel({name: MLP(8, DIM) for name in "ABC"}, Anything())
    history = fit(model, TRAIN, VALID, **{**QUICK, "epochs": 8, "learning_rate": 1e-2, "warmup_steps": 5})
    assert history["valid_top1"].max() > 0.3 and "log_scale" not in history


# Batch norm

def test_statistics_of_batch_norm_are_those_of_the_weights_that_are_evaluated():
    "Schedule-free averages the weights; the statistics that the training weights left behind belong to others."
    model = with_norms()
    history = fit(model, TRAIN, VALID, "A", epochs=25, batch_size=40, learning_rate=3e-2, warmup_steps=5,
                  progress=False)
    for name, x in TRAIN.modalities.items():
        linear, norm, _ = model.encoders[name]
        before = linear(model.standardiser(name, x))
        # batches of one size: the mean of their means
        torch.testing.assert_close(norm.running_mean, before.mean(0), atol=1e-4, rtol=1e-4)
        assert norm.momentum == 0.1
    assert history["valid_top1"].max() > 0.5
    assert rank_dataset(model, VALID, "A")[0].top(1).mean().item() == history["valid_top1"].max()


@pytest.mark.parametrize("optimiser", [None, lambda model: torch.optim.SGD(model.parameters(), lr=0.1)])
def test_a_frozen_encoder_stays_as_it_came(optimiser):
    model, modes = with_norms(), []
    model.encoders["B"].requires_grad_(False)
    model.encoders["B"].register_forward_hook(lambda module, *_: modes.append([m.training for m in module.modules()]))
    before = weights(model)
    fit(model, TRAIN, VALID, **QUICK, optimiser=optimiser)
    changed = {name for name, x in weights(model).items() if name in before and not torch.equal(x, before[name])}
    assert {name.split(".")[1] for name in changed if name.startswith("encoders")} == {"A", "C"}
    assert {"encoders.A.1.running_mean", "encoders.C.1.running_var"} < changed
    assert modes and not any(map(any, modes))                                    # nor is anything dropped


def test_a_frozen_objective_is_left_alone_and_one_without_parameters_trains():
    class Modes(Anything):
        def forward(self, *args): self.mode = self.training; return super().forward(*args)
    for frozen in (False, True):
        model = MultimodalModel({name: MLP(8, DIM) for name in "ABC"}, Modes())
        if frozen: model.objective.weight = nn.Parameter(torch.ones(1), requires_grad=False)
        fit(model, TRAIN, VALID, **QUICK)
        assert model.objective.mode is not frozen


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_refresh_that_is_cut_off_gives_the_norms_their_momentum_back(error):
    class Loader:
        passes = 0
        def __iter__(self):
            self.passes += 1
            yield TRAIN[:40].modalities
            if self.passes == 2: raise error("unplugged")                        # the first pass trains
            yield TRAIN[40:80].modalities
    model = with_norms()
    model.standardiser.fit(TRAIN)
    with warnings.catch_warnings(), pytest.raises(error, match="unplugged"):
        warnings.simplefilter("ignore")
        fit(model, Loader(), VALID, **QUICK)
    assert [model.encoders[name][1].momentum for name in "ABC"] == [0.1]*3 and not model.training


class Deep(MLP):
    "Keeps nothing by the name of what it was made with."
    def __init__(self, n): super().__init__(n, dim=8)


def test_an_encoder_that_cannot_say_how_it_was_made_is_saved_all_the_same(tmp_path):
    with pytest.raises(MissingError, match="Deep keeps no attribute n, which __init__ takes"): Deep(4).settings()
    model = MultimodalModel({"A": Deep(4), "B": Deep(4)}, Symile())
    model.save(tmp_path/"model.safetensors")
    again = MultimodalModel.load(tmp_path/"model.safetensors", encoders={"A": Deep(4), "B": Deep(4)})
    assert same(weights(model), weights(again))
