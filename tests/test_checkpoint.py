"Broken off wherever, a training goes on bit for bit; what isn't the same run, or isn't whole, is refused by name."
import errno
import os
import random
import signal
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from gated_symile.augment import Noise
from gated_symile.checkpoint import before, read_state
from gated_symile.core import DataError, DtypeError, OutputError, generator
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.data.rows import Transformed
from gated_symile.encoders import MLP
from gated_symile.gate.gate import ModalityGate
from gated_symile.model import MultimodalModel
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.comm import CoMM
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.linear import LinearGaussian
from gated_symile.objectives.subset import SubsetSymile
from gated_symile.training import fit, minus_loss

DIM = 8
QUICK = dict(target="A", epochs=4, batch_size=20, learning_rate=1e-2, warmup_steps=3, progress=False)


def views(rows, seed, holes=0.):
    "Three mixtures of the same 3 hidden numbers, some of them missing."
    draw = generator(seed)
    hidden = torch.randn(rows, 3, generator=draw)
    mixed = {name: hidden @ torch.randn(3, 5, generator=generator(m)) for m, name in enumerate("ABC")}
    there = torch.rand(rows, 3, generator=draw) >= holes
    return MultimodalDataset({name: x + 0.1*torch.randn(x.shape, generator=draw) for name, x in mixed.items()}, there)


TRAIN, VALID = views(80, 1, 0.2), views(40, 2, 0.1)
OBJECTIVES = {
    "PairwiseCLIP": PairwiseCLIP,
    "GatedSymile": lambda: GatedSymile(ModalityGate(3, DIM, key_dim=4)),
    "SubsetSymile": lambda: SubsetSymile(n_modalities=3, dim=DIM),
    "CoMM": lambda: CoMM(3, DIM),
}


def make(objective="PairwiseCLIP", dropout=0.2, norms=False):
    "A small model, always the same."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        def encoder():
            mlp = MLP(5, DIM, width=12, depth=1, dropout=dropout)
            return nn.Sequential(mlp, nn.BatchNorm1d(DIM)) if norms else mlp
        augment = {name: Noise() for name in "ABC"} if objective == "CoMM" else None
        return MultimodalModel({name: encoder() for name in "ABC"}, OBJECTIVES[objective](), augment=augment)


def adamw(model): return torch.optim.AdamW(model.parameters(), lr=1e-2)


def momentum(model): return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True)


def run(model, **options):
    "`fit` without what it says of holes."
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "train: .*left out|valid: .*left out|interrupted")
        return fit(model, **{"train": TRAIN, "valid": VALID, **QUICK, **options})


def bits(model, history):
    "Everything that has to be the same."
    return ({name: x.numpy().tobytes() for name, x in model.state_dict().items()},
            history.drop(columns="seconds").to_dict("records"))


class Stop(Exception): pass


def stops(after, look="epoch"):
    "A callback that ends a training after an epoch."
    def call(line):
        if line[look] == after: raise Stop
    return call


# Going on

COMM = dict(target=None, validate=minus_loss)
CASES = {
    **{name: (name, {}) for name in ("PairwiseCLIP", "GatedSymile", "SubsetSymile")}, "CoMM": ("CoMM", COMM),
    "AdamW": ("PairwiseCLIP", dict(optimiser=adamw)), "momentum": ("PairwiseCLIP", dict(optimiser=momentum)),
    "looks": ("PairwiseCLIP", dict(every=2, epochs=5)),
    "patience": ("PairwiseCLIP", dict(learning_rate=0., patience=2, epochs=9)),
    "bfloat16": ("PairwiseCLIP", dict(precision="bfloat16")),
}


@pytest.mark.parametrize("case", CASES)
def test_broken_off_after_any_epoch_it_comes_to_the_same(tmp_path, case):
    objective, options = CASES[case]
    options, norms = {"epochs": 3, **options}, case == "looks"
    whole = make(objective, norms=norms)
    history = run(whole, **options)
    for after in history["epoch"]:
        options["checkpoint"], torch_state = tmp_path/f"{after}.checkpoint", torch.get_rng_state()
        with pytest.raises(Stop): run(make(objective, norms=norms), **options, callbacks=[stops(after)])
        torch.manual_seed(after)                                             # whatever others have drawn since
        model, new = make(objective, norms=norms), []
        lines = run(model, **options, callbacks=[new.append])
        assert bits(model, lines) == bits(whole, history) and not model.training
        assert [line["epoch"] for line in new] == [epoch for epoch in history["epoch"] if epoch > after]
        torch.set_rng_state(torch_state)


def test_broken_off_after_every_epoch_in_turn(tmp_path):
    whole, path = make("GatedSymile"), tmp_path/"deep"/"run.checkpoint"
    history = run(whole)
    for after in (1, 2, 3):
        with pytest.raises(Stop): run(make("GatedSymile"), checkpoint=path, callbacks=[stops(after)])
        assert read_state(path)["epoch"] == after and (after == 1 or read_state(before(path))["epoch"] == after - 1)
    model = make("GatedSymile")
    assert bits(model, run(model, checkpoint=str(path))) == bits(whole, history)
    assert sorted(file.name for file in path.parent.iterdir()) == ["run.checkpoint", "run.checkpoint.before"]


def test_in_the_middle_of_an_epoch_and_with_the_model_that_was_left(tmp_path):
    "A notebook: the cell is run again, and the model is the one that Ctrl-C left with its best weights."
    calls = []
    class Presses(PairwiseCLIP):
        def forward(self, *args):
            calls.append(1)
            if len(calls) == 4*2 + 3: raise KeyboardInterrupt
            return super().forward(*args)
    OBJECTIVES["Presses"] = Presses
    model, whole = make("Presses"), make("Presses")
    with pytest.raises(KeyboardInterrupt): run(model, checkpoint=tmp_path/"a")
    again = run(model, checkpoint=tmp_path/"a")
    assert bits(whole, run(whole)) == bits(model, again)


def test_a_finished_run_comes_back_at_once(tmp_path):
    first, second = make(), make()
    history = run(first, checkpoint=tmp_path/"a")
    content = (tmp_path/"a").read_bytes()
    again = run(second, checkpoint=tmp_path/"a", callbacks=[stops(after) for after in range(5)])
    assert again.equals(history) and bits(first, history) == bits(second, again)
    assert (tmp_path/"a").read_bytes() == content


def test_what_a_callback_draws_changes_nothing():
    one, two = make(), make()
    assert bits(one, run(one)) == bits(two, run(two, callbacks=[lambda line: torch.rand(3)]))


def test_batches_of_ones_own_go_on_at_the_start_of_an_epoch(tmp_path):
    "A loader that shuffles by torch's own numbers, which are kept."
    def take(rows): return TRAIN[rows].modalities, TRAIN.present[rows]
    rows = (TRAIN.present.sum(1) > 1).nonzero().flatten().tolist()
    loader = torch.utils.data.DataLoader(rows, batch_size=20, shuffle=True, collate_fn=take)
    models = [make(), make(), make()]
    for model in models: model.standardiser.fit(TRAIN)
    whole = bits(models[0], run(models[0], train=loader))
    with pytest.raises(Stop): run(models[1], train=loader, checkpoint=tmp_path/"a", callbacks=[stops(2)])
    assert bits(models[2], run(models[2], train=loader, checkpoint=tmp_path/"a")) == whole


def test_rows_that_lie_elsewhere(tmp_path):
    def there(change): return MultimodalDataset({**TRAIN.modalities, "B": Transformed(TRAIN.modalities["B"], change)},
                                                TRAIN.present)
    whole, cut, model = make(), make(), make()
    expected = bits(whole, run(whole, train=there(torch.abs)))
    with pytest.raises(Stop): run(cut, train=there(torch.abs), checkpoint=tmp_path/"a", callbacks=[stops(2)])
    with pytest.raises(DataError, match="checkpoint: train.B.content is"):
        run(make(), train=there(torch.neg), checkpoint=tmp_path/"a")
    assert bits(model, run(model, train=there(torch.abs), checkpoint=tmp_path/"a")) == expected


# Killed

LONG = dict(epochs=20, patience=None, seed=5)
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def child(work):
    "Another process that does this work, and ends with what it says to the system."
    process = os.fork()
    if process: return process
    code = 1
    try:
        torch.set_num_threads(1)                                             # threads of the parent aren't here
        work()
        code = 0
    except SystemExit as error: code = error.code
    finally: os._exit(code)


@forks
def test_killed_at_random_moments_it_comes_to_the_same(tmp_path):
    path, draw, whole, model = tmp_path/"run.checkpoint", random.Random(0), make("GatedSymile"), make("GatedSymile")
    start = time.perf_counter()
    expected, takes, killed = bits(whole, run(whole, **LONG)), time.perf_counter() - start, 0
    for _ in range(6):
        process = child(lambda: run(make("GatedSymile"), checkpoint=path, **LONG))
        time.sleep(takes * draw.uniform(0.05, 0.3))
        os.kill(process, signal.SIGKILL)
        killed += os.waitpid(process, 0)[1] == signal.SIGKILL
    new = []
    assert bits(model, run(model, checkpoint=path, **LONG, callbacks=[new.append])) == expected
    assert killed > 2 and len(new) < 20                                      # the others found a finished run
    assert {file.name for file in tmp_path.iterdir()} <= {"run.checkpoint", "run.checkpoint.before"}


@forks
def test_sigterm_ends_a_process_with_143_and_is_no_finished_training(tmp_path):
    def end(line): line["epoch"] == 2 and os.kill(os.getpid(), signal.SIGTERM)
    process = child(lambda: run(make(), checkpoint=tmp_path/"a", callbacks=[end]))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 143
    assert read_state(tmp_path/"a")["epoch"] == 2
    whole, model = make(), make()
    assert bits(model, run(model, checkpoint=tmp_path/"a")) == bits(whole, run(whole))


@pytest.mark.filterwarnings("ignore:.*rows left out")
def test_sigterm_puts_the_best_weights_and_the_handler_back(tmp_path):
    def end(line): line["epoch"] == 3 and os.kill(os.getpid(), signal.SIGTERM)
    heard = []
    def own(*_): heard.append(1)
    handler = signal.signal(signal.SIGTERM, own)
    try:
        model, whole = make(), make()
        with pytest.warns(UserWarning, match="interrupted in epoch 3: the weights are those of epoch [123]"):
            with pytest.raises(SystemExit) as left:
                fit(model, TRAIN, VALID, **QUICK, checkpoint=tmp_path/"a", callbacks=[end])
        assert left.value.code == 143 and signal.getsignal(signal.SIGTERM) is own and not model.training
        run(whole, epochs=3)
        assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), whole.state_dict().values()))
        run(make(), callbacks=[end])                                         # without a checkpoint it is left alone
        assert heard == [1]
    finally: signal.signal(signal.SIGTERM, handler)


# Damaged, or not to be written

NOTHING = pd.DataFrame({"seconds": []})


def broken_off(path, after=3):
    with pytest.raises(Stop): run(make(), checkpoint=path, callbacks=[stops(after)])
    return path


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: path.write_bytes(b""), Path.unlink,
    lambda path: path.write_bytes(path.read_bytes()[:-3] + b"abc")], ids=["half", "empty", "gone", "another weight"])
def test_a_damaged_file_is_named_and_the_one_before_is_used(tmp_path, damage):
    path, model, whole = broken_off(tmp_path/"a"), make(), make()
    damage(path)
    expected, new = bits(whole, run(whole)), []
    with pytest.warns(UserWarning, match=r"checkpoint: .*a.* going on from a.before") as caught:
        found = bits(model, run(model, checkpoint=path, callbacks=[new.append]))
    assert found == expected and [line["epoch"] for line in new] == [3, 4]
    assert [Path(w.filename).name for w in caught if "going on" in str(w.message)] == [Path(__file__).name]
    assert read_state(path)["epoch"] == 4                                    # whole again
    damage(path); before(path).write_bytes(b"nothing")
    left, words = make(), "checkpoint: .*a.before is damaged.*to start anew, delete both"
    start = bits(left, NOTHING)[0]
    with pytest.raises(DataError, match=words): run(left, checkpoint=path)
    assert bits(left, NOTHING)[0] == start and before(path).read_bytes() == b"nothing"


def test_a_damaged_file_never_takes_the_place_of_the_one_before(tmp_path, monkeypatch):
    path = broken_off(tmp_path/"a")
    path.write_bytes(b"half")
    good = before(path).read_bytes()
    def full(_): raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="going on from"):
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left"): run(make(), checkpoint=path)
    assert before(path).read_bytes() == good


def test_what_a_killed_writer_left_is_swept_up(tmp_path):
    path = broken_off(tmp_path/"a[1]")
    for name in (".a[1].12.34.part", ".b.12.34.part"): (tmp_path/name).write_bytes(b"half")
    run(make(), checkpoint=path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".b.12.34.part", "a[1]", "a[1].before"]


def test_a_full_disk_leaves_the_file_and_the_best_weights(tmp_path, monkeypatch):
    path, model, whole = broken_off(tmp_path/"a", after=2), make(), make()
    content = path.read_bytes()
    def full(_): raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="a can't be written: No space left"): run(model, checkpoint=path)
    assert path.read_bytes() == content and len(list(tmp_path.iterdir())) == 2
    assert bits(model, run(model, checkpoint=path)) == bits(whole, run(whole))


def test_a_place_that_cannot_be_written_is_known_before(tmp_path):
    (tmp_path/"file").touch()
    model, calls = make(), []
    model.encoders["A"].register_forward_hook(lambda *_: calls.append(1))
    for path, words in ((tmp_path/"file"/"a", "checkpoint: .*can't be written"), (tmp_path, "is a folder")):
        with pytest.raises(OutputError, match=words): run(model, checkpoint=path)
    with pytest.raises(DtypeError, match="checkpoint must be a path, got int"): run(model, checkpoint=3)
    assert not calls and not model.standardiser.fitted


def test_a_file_of_something_else_is_left_alone(tmp_path):
    make().save(tmp_path/"model.safetensors")
    content = (tmp_path/"model.safetensors").read_bytes()
    with pytest.raises(DataError, match="is no checkpoint of a training"):
        run(make(), checkpoint=tmp_path/"model.safetensors")
    assert (tmp_path/"model.safetensors").read_bytes() == content


# Another run

def changed(dataset, name, row):
    x = dataset.modalities[name].clone()
    x[row, 0] += 1
    return MultimodalDataset({**dataset.modalities, name: x}, dataset.present)


def test_another_run_is_refused_by_name(tmp_path):
    path = broken_off(tmp_path/"a", after=2)
    content, lists = path.read_bytes(), torch.arange(40)[:, None]
    cases = [
        (dict(learning_rate=5e-3), "checkpoint: learning_rate is 0.01 in the file, 0.005 here"),
        (dict(epochs=9), "epochs is 4 in the file, 9 here"), (dict(seed=1), "seed is 0 in the file, 1 here"),
        (dict(target="B"), "target is 'A' in the file, 'B' here"), (dict(clip=2.), "clip is 1.0 in the file, 2.0 here"),
        (dict(patience=2), "patience is 'rule' in the file, 2 here"),
        (dict(every=2), "every is None in the file, 2 here"),
        (dict(precision="bfloat16"), "precision is 'float32' in the file, 'bfloat16' here"),
        (dict(bank_size=10), "bank_size is None in the file, 10 here"),
        (dict(candidates=lists), "candidates is None in the file"),
        (dict(optimiser=adamw), "optimiser is None in the file, .*AdamW.* here"),
        (dict(target=None, validate=minus_loss), "validate is None in the file, 'minus_loss' here"),
        (dict(train=changed(TRAIN, "B", 7)), "train.B.content is '.*' in the file, '.*' here"),
        (dict(train=TRAIN[:70]), r"train.A.shape is \[\d+, 5\] in the file, \[\d+, 5\] here"),
        (dict(valid=changed(VALID, "A", 3)), "valid.A.content is"),
        (dict(model=make("GatedSymile")), "model.objective.class is 'PairwiseCLIP' in the file, 'GatedSymile' here"),
        (dict(model=make(dropout=0.3)), "model.encoders.A.settings.dropout is 0.2 in the file, 0.3 here"),
        (dict(model=make(norms=True)), "model.encoders.A.class is 'MLP' in the file, 'Sequential' here"),
    ]
    for change, words in cases:
        model = change.pop("model", None) or make()
        with pytest.raises(DataError, match=words): run(model, checkpoint=path, **change)
    frozen = make()
    frozen.encoders["B"].requires_grad_(False)
    with pytest.raises(DataError, match=r"model.frozen is \[\] in the file, \['encoders.B"):
        run(frozen, checkpoint=path)
    assert path.read_bytes() == content
    model, whole = make(), make()
    same = run(model, checkpoint=path, progress=False, device=torch.device("cpu"))
    assert bits(model, same) == bits(whole, run(whole))


def test_another_setting_of_ones_own_optimiser_is_refused(tmp_path):
    def sgd(lr): return lambda model: torch.optim.SGD(model.parameters(), lr=lr)
    with suppress(Stop): run(make(), checkpoint=tmp_path/"a", callbacks=[stops(1)], optimiser=sgd(0.1))
    with pytest.raises(DataError, match="checkpoint: optimiser.0.lr is 0.1 in the file, 0.2 here"):
        run(make(), checkpoint=tmp_path/"a", optimiser=sgd(0.2))


def test_what_cannot_be_kept_is_said_before(tmp_path):
    class Bare:
        def __init__(self, model): self.step = self.zero_grad = lambda: None
    with pytest.raises(DtypeError, match="checkpoint: Bare has no state_dict"):
        run(make(), checkpoint=tmp_path/"a", optimiser=Bare)
    closed = MultimodalModel({name: MLP(5, DIM) for name in "ABC"}, LinearGaussian())
    with pytest.raises(DataError, match="checkpoint: the objective learns all at once"):
        run(closed, checkpoint=tmp_path/"a")
    assert list(tmp_path.iterdir()) == []
