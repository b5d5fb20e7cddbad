"In pieces, the gradient of the whole: every objective, both precisions, draws, holes, frozen parts; and `fit` with it."
import warnings

import pytest
import torch
from torch import nn

from gated_symile.augment import Noise
from gated_symile.core import DataError, GatedSymileError, generator
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.encoders import MLP
from gated_symile.gate.gate import ModalityGate
from gated_symile.gradcache import copies_in_pieces, pieces
from gated_symile.model import MultimodalModel
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.comm import CoMM
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.subset import SubsetSymile
from gated_symile.objectives.symile import Symile
from gated_symile.training import fit

DIM, ROWS = 8, 26
OBJECTIVES = {
    "PairwiseCLIP": PairwiseCLIP, "Symile": Symile, "CoMM": lambda: CoMM(3, DIM),
    "GatedSymile": lambda: GatedSymile(ModalityGate(3, DIM, key_dim=4)),
    "SubsetSymile": lambda: SubsetSymile(n_modalities=3, dim=DIM),
}


def make(objective="Symile", dropout=0.3, **options):
    "A small model, always the same."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        augment = {name: Noise() for name in "ABC"} if objective == "CoMM" else None
        encoders = {name: MLP(5, DIM, width=12, depth=1, dropout=dropout) for name in "ABC"}
        return MultimodalModel(encoders, OBJECTIVES[objective](), augment=augment, **options)


def rows(n, seed, holes=0.2):
    "Rows, and which of them are there: two modalities at least."
    draw = generator(seed)
    present = torch.rand(n, 3, generator=draw) >= holes
    for m in (0, 1): present[:, m] |= present.sum(1) < 2
    hidden = torch.randn(n, 3, generator=draw)
    return {name: hidden @ torch.randn(3, 5, generator=generator(m)) + 0.1*torch.randn(n, 5, generator=draw)
            for m, name in enumerate("ABC")}, present


def gradients(model, copies, present, draws, carry_on=lambda: None):
    "Of all weights; and the loss."
    model.zero_grad()
    one, *again = copies
    loss = model.objective(one, present, draws, *again)
    loss.backward(); carry_on()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def both(model, batch, present, size):
    "In pieces, and by one graph over the same pieces: losses, gradients, and what is drawn next."
    found = []
    for cached in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1); draws = generator(2)
            if cached: copies, carry_on = copies_in_pieces(model, batch, present, size, draws)
            else:
                parts = [model.copies(*piece, draws) for piece in pieces(batch, present, size)]
                copies, carry_on = [[torch.cat(e) for e in zip(*copy)] for copy in zip(*parts)], lambda: None
            loss, grads = gradients(model, copies, present, draws, carry_on)
            found.append((loss, grads, torch.rand(3), torch.rand(3, generator=draws)))
    return found


@pytest.mark.parametrize("dtype, far", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("holes", [0., 0.3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_in_pieces_is_that_of_the_whole(name, holes, dtype, far):
    "With dropout and augmentations; afterwards the generators are where they would have been."
    model, (batch, present) = make(name, standardise=False).to(dtype), rows(ROWS, 3, holes)
    batch, present = {n: x.to(dtype) for n, x in batch.items()}, present if holes else None
    for size in (1, 7, ROWS):
        (one, a, *drawn), (other, b, *expected) = both(model, batch, present, size)
        assert list(a) == list(b) and len(a) > 6 and torch.equal(one, other)
        most = max(1., *(x.abs().max().item() for x in b.values()))
        assert max((a[key] - b[key]).abs().max().item() for key in b) <= far * most
        assert all(map(torch.equal, drawn, expected))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_where_nothing_is_drawn_it_is_the_gradient_of_the_batch(name):
    model, (batch, present) = make(name, dropout=0., standardise=False).double(), rows(ROWS, 4)
    batch = {n: x.double() for n, x in batch.items()}
    model.augment = None                                                     # two copies that are alike
    expected = gradients(model, model.copies(batch, present), present, generator(2))[1]
    copies, carry_on = copies_in_pieces(model, batch, present, 5)
    found = gradients(model, copies, present, generator(2), carry_on)[1]
    assert list(found) == list(expected)
    assert all(torch.allclose(found[key], expected[key], atol=1e-12, rtol=1e-10) for key in expected)


def test_a_frozen_encoder_gets_no_gradient():
    model, (batch, present) = make(standardise=False), rows(ROWS, 5)
    model.encoders["B"].requires_grad_(False)
    (_, a, *_), (_, b, *_) = both(model, batch, present, 6)
    assert list(a) == list(b) and not any(key.startswith("encoders.B") for key in a)


def train(model, **options):
    data, present = rows(80, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "train: .*left out|valid: .*left out|interrupted")
        return fit(model, MultimodalDataset(data, present), MultimodalDataset(*rows(40, 2)),
                   **{**dict(target="A", epochs=3, batch_size=20, warmup_steps=3, progress=False), **options})


def test_fit_with_it_is_fit_without_where_nothing_is_drawn():
    whole, cut = make(dropout=0.), make(dropout=0.)
    one, other = train(whole), train(cut, micro_batch=6)
    assert torch.allclose(torch.tensor(one["train_loss"]), torch.tensor(other["train_loss"]), atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(whole.state_dict().values(), cut.state_dict().values()))


@pytest.mark.parametrize("name", ["CoMM", "GatedSymile"])
def test_fit_sees_pieces_only_and_learns(name):
    model, seen = make(name), []
    def look(module, args): module.training and seen.append(len(args[0]))
    for encoder in model.encoders.values(): encoder.register_forward_pre_hook(look)
    history = train(model, micro_batch=6, epochs=6, learning_rate=1e-2)
    assert max(seen) <= 6 and history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    again = make(name)
    assert train(again, micro_batch=6, epochs=6, learning_rate=1e-2)["train_loss"].equals(history["train_loss"])


def test_broken_off_it_goes_on_bit_for_bit(tmp_path):
    class Stop(Exception): pass
    def stop(line):
        if line["epoch"] == 2: raise Stop
    whole, model, options = make("CoMM"), make("CoMM"), dict(micro_batch=6, checkpoint=tmp_path/"a")
    expected = train(whole, micro_batch=6)
    with pytest.raises(Stop): train(make("CoMM"), **options, callbacks=[stop])
    with pytest.raises(DataError, match="micro_batch is 6 in the file, None here"):
        train(make("CoMM"), checkpoint=tmp_path/"a")
    assert train(model, **options)["train_loss"].equals(expected["train_loss"])
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))


def test_half_precision_of_the_encoders():
    assert train(make(), micro_batch=6, precision="bfloat16")["train_loss"].notna().all()
    model, (batch, _) = make(standardise=False), rows(ROWS, 6)
    def half(): return torch.autocast("cpu", torch.bfloat16)
    copies, carry_on = copies_in_pieces(model, batch, None, 6, context=half)
    _, found = gradients(model, copies, None, None, carry_on)
    assert len(found) == len(list(model.parameters())) and all(x.abs().sum() > 0 for x in found.values())


def test_batch_norm_and_no_numbers_are_refused():
    def encoder(): return nn.Sequential(nn.Linear(5, DIM), nn.BatchNorm1d(DIM))
    model = MultimodalModel({name: encoder() for name in "ABC"}, Symile())
    with pytest.raises(DataError, match="micro_batch: the encoder of 'A' has a batch norm"): train(model, micro_batch=6)
    for wrong in (0, 2.5):
        with pytest.raises(GatedSymileError, match="micro_batch must"): train(make(), micro_batch=wrong)
