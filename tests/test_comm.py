"CoMM and what it is made of, against slow loops in float64: NT-Xent, the fusion of any subset, both losses."
import copy
import math
from itertools import combinations

import pytest
import torch
from torch import nn

from gated_symile.contrastive import nt_xent
from gated_symile.core import generator, MissingError, ShapeError
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.encoders import MLP
from gated_symile.fusion import Fusion, ProjectionHead
from gated_symile.model import MultimodalModel
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.comm import CoMM, CrossSelf
from gated_symile.probing import probe
from gated_symile.training import fit, minus_loss
from oracles import comm_loop, cross_self_loop, fused_loop, head_row, nt_xent_loop


def rows_of(M, B, D, seed=0, dtype=torch.float64):
    return [torch.randn(B, D, generator=generator(100*seed + m), dtype=dtype) for m in range(M)]


def holes_of(M, B, seed=0):
    "Each row has at least two, each modality two rows."
    present = torch.rand(B, M, generator=generator(seed)) < 0.6
    present[:2] = True
    present[present.sum(1) < 2] = True
    return present


def spoilt(e, present, value=math.nan):
    "NaN wherever nothing is present."
    return [torch.where(present[:, m, None], x, value) for m, x in enumerate(e)]


def seeded(make, seed=0):
    "What `make` makes in double precision, with weights that are all random, biases too."
    module = make().double()
    for n, p in enumerate(module.parameters()):
        with torch.no_grad():
            p.add_(0.3 * torch.randn(p.shape, generator=generator(1000*seed + n), dtype=p.dtype)) if p.dim() else None
    return module


def exact(got, expected): torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# NT-Xent

@pytest.mark.parametrize("rows", [None, [0, 2, 3, 6], [1, 4]])
@pytest.mark.parametrize("temperature", [0.1, 1.])
def test_nt_xent_and_its_gradients_are_the_loop(rows, temperature):
    a, b = (x.requires_grad_() for x in torch.randn(2, 7, 5, generator=generator(0), dtype=torch.float64).unbind())
    valid = None if rows is None else torch.isin(torch.arange(7), torch.tensor(rows))
    ours, slow = nt_xent(a, b, temperature, valid), nt_xent_loop(a, b, temperature, rows)
    exact(ours, slow)
    for got, expected in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(slow, (a, b))): exact(got, expected)


# Fusion

def all_subsets(M): return [s for k in range(1, M + 1) for s in combinations(range(M), k)]


@pytest.mark.parametrize("M", [2, 3, 4, 5])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("holes", [False, True], ids=["all present", "holes"])
def test_fusion_and_its_gradients_are_plain_layers_on_what_is_there(M, blocks, holes):
    "Every subset at once, against PyTorch's layers on one row's own tokens at a time."
    fusion, subsets = seeded(lambda: Fusion(M, 8, blocks, heads=2)), all_subsets(M)
    e, present = [x.requires_grad_() for x in rows_of(M, 4, 8)], holes_of(M, 4) if holes else None
    ours = fusion(e, present, subsets)
    slow = torch.stack([fused_loop(fusion, e, s, present) for s in subsets])
    assert ours.shape == (len(subsets), 4, 8)
    exact(ours, slow)
    weight, leaves = torch.randn(ours.shape, generator=generator(1), dtype=ours.dtype), [*e, *fusion.parameters()]
    for got, expected in zip(*(torch.autograd.grad((z * weight).sum(), leaves) for z in (ours, slow))):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_what_is_missing_or_left_out_reaches_nothing():
    fusion, e, present = seeded(lambda: Fusion(3, 8, 2)), rows_of(3, 5, 8), holes_of(3, 5)
    subsets = [(0, 1, 2), (0, 1), (2,)]
    leaves = [x.requires_grad_() for x in spoilt(e, present)]
    ours = fusion(leaves, present, subsets)
    assert torch.equal(ours, fusion(e, present, subsets))
    for m, grad in enumerate(torch.autograd.grad(ours.sum(), leaves)):
        assert (grad[~present[:, m]] == 0).all() and grad.isfinite().all()
    assert torch.autograd.grad(fusion(leaves, present, [(0, 1)]).sum(), leaves[2])[0].eq(0).all()
    exact(fusion([e[0], e[1], None], subsets=[(0, 1)]), fusion(e, subsets=[(0, 1)]))


def test_a_row_does_not_hang_on_its_neighbours():
    fusion, e, present = seeded(lambda: Fusion(3, 8, 2)), rows_of(3, 5, 8), holes_of(3, 5)
    together = fusion(e, present, [(0, 1), (2, 1, 0)])
    for i in range(5):
        exact(fusion([x[i:i+1] for x in e], present[i:i+1], [(0, 1), (2, 1, 0)]), together[:, i:i+1])


def test_the_order_of_modalities_is_that_of_their_parameters():
    fusion, e, present, order = seeded(lambda: Fusion(3, 8, 2)), rows_of(3, 5, 8), holes_of(3, 5), [2, 0, 1]
    other = copy.deepcopy(fusion)
    with torch.no_grad(): other.modality.copy_(fusion.modality[order])
    exact(other([e[m] for m in order], present[:, order]), fusion(e, present))


@pytest.mark.parametrize("train", [False, True])
def test_fusion_compiles_whole(train):
    "With and without gradients, in both modes; PyTorch's own layers take another path without."
    torch._dynamo.reset()
    fusion, subsets = Fusion(3, 8, 2).train(train), [(0, 1, 2), (1,)]
    compiled = torch.compile(fusion, backend="aot_eager", fullgraph=True, dynamic=True)
    for B in (6, 9):
        e, present = rows_of(3, B, 8, dtype=torch.float32), holes_of(3, B)
        torch.testing.assert_close(compiled(e, present, subsets), fusion(e, present, subsets), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(e, None, subsets), fusion(e, None, subsets), rtol=1e-4, atol=1e-5)


def test_half_precision_weights_are_computed_with_in_full():
    fusion, head, e = Fusion(3, 8), ProjectionHead(8), rows_of(3, 5, 8, dtype=torch.float32)
    full = head(fusion(e))
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(head(fusion(e)), full)
    half = head.bfloat16()(fusion.bfloat16()([x.bfloat16() for x in e]))
    assert half.dtype == torch.float32 and (half - full).norm(dim=1).max() < 0.1


# CoMM, and Cross + Self

def copies_of(M, B, D, seed=0):
    "Two copies of each row, as leaves."
    one = rows_of(M, B, D, seed)
    two = [x + 0.3*y for x, y in zip(one, rows_of(M, B, D, seed + 1))]
    return [x.requires_grad_() for x in one], [x.requires_grad_() for x in two]


def alike(ours, slow, leaves):
    "Losses, and their gradients."
    exact(ours, slow)
    for got, expected in zip(*(torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True)
                               for x in (ours, slow))):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("M", [2, 3, 4, 5])
@pytest.mark.parametrize("holes", [False, True], ids=["all present", "holes"])
@pytest.mark.parametrize("weights", [{}, dict(fused=0.5, single=2., retrieval=1.)], ids=["paper", "weighted"])
def test_comm_and_its_gradients_are_the_loop(M, holes, weights):
    comm, (one, two) = seeded(lambda: CoMM(M, 8, heads=2, projection=6, **weights)), copies_of(M, 5, 8)
    present = holes_of(M, 5) if holes else None
    nan = [spoilt(copy, present) if holes else copy for copy in (one, two)]
    alike(comm(nan[0], present, None, nan[1]), comm_loop(comm, one, two, present, **weights),
          [*one, *two, *(p for p in comm.parameters() if p.requires_grad)])


@pytest.mark.parametrize("M", [2, 3, 4, 5])
@pytest.mark.parametrize("holes", [False, True], ids=["all present", "holes"])
def test_cross_self_and_its_gradients_are_the_loop(M, holes):
    objective, (one, two) = seeded(lambda: CrossSelf(M, 8, own=0.7)), copies_of(M, 5, 8)
    present = holes_of(M, 5) if holes else None
    nan = [spoilt(copy, present) if holes else copy for copy in (one, two)]
    alike(objective(nan[0], present, None, nan[1]), cross_self_loop(objective, one, two, present),
          [*one, *two, *(p for p in objective.parameters() if p.requires_grad)])


@pytest.mark.parametrize("make", [lambda: CoMM(4, 8, retrieval=1.), lambda: CrossSelf(4, 8)])
def test_the_order_of_modalities_changes_nothing(make):
    objective, (one, two), present, order = seeded(make), copies_of(4, 6, 8), holes_of(4, 6), [2, 0, 3, 1]
    other = copy.deepcopy(objective)
    if isinstance(objective, CoMM):
        with torch.no_grad(): other.fusion.modality.copy_(objective.fusion.modality[order])
    else: other.head = nn.ModuleList(objective.head[m] for m in order)
    moved = [[x[m] for m in order] for x in (one, two)]
    exact(other(moved[0], present[:, order], None, moved[1]), objective(one, present, None, two))
    exact(other.score(moved[0], order.index(3), present[:, order]), objective.score(one, 3, present))


@pytest.mark.parametrize("make", [lambda: CoMM(3, 8, retrieval=1.), lambda: CrossSelf(3, 8)])
def test_holes_reach_nothing(make):
    objective, (one, two), present = seeded(make), copies_of(3, 6, 8), holes_of(3, 6)
    leaves = [x for e in (one, two) for x in spoilt(e, present)]
    leaves = [x.detach().requires_grad_() for x in leaves]
    loss = objective(leaves[:3], present, None, leaves[3:])
    exact(loss, objective(one, present, None, two))
    for m, grad in enumerate(torch.autograd.grad(loss, leaves)):
        assert grad.isfinite().all() and (grad[~present[:, m % 3]] == 0).all()
    exact(objective.score([leaves[0], one[1], leaves[2]], 1, present), objective.score(one, 1, present))


def test_the_score_is_the_cosine_of_query_and_candidate():
    comm, (e, _), present = seeded(lambda: CoMM(3, 8)), copies_of(3, 5, 8), holes_of(3, 5)
    present[:, 0] = True
    candidates = rows_of(3, 7, 8, seed=9)[1]
    query, answer = fused_loop(comm.fusion, e, (0, 2), present), fused_loop(comm.fusion, [None, candidates], (1,))
    slow = [[head_row(comm.head, q) @ head_row(comm.head, c) for c in answer] for q in query]
    exact(comm.score([e[0], candidates, e[2]], 1, present), torch.stack([torch.stack(row) for row in slow]))


# The model, and training

class Noise(nn.Module):
    "The simplest augmentation."
    def __init__(self, size=0.3): super().__init__(); self.size = size
    def forward(self, x, generator=None): return x + self.size * torch.randn(x.shape, generator=generator)


def data_of(rows, seed=0):
    hidden = torch.randn(rows, 4, generator=generator(seed))
    mixed = [hidden @ torch.randn(4, 6, generator=generator(50 + m)) for m in range(3)]
    return MultimodalDataset(dict(zip("ABC", mixed)))


def model_of(objective, augment=True):
    torch.manual_seed(0)
    encoders = {name: MLP(6, 16, width=16) for name in "ABC"}
    model = MultimodalModel(encoders, objective, augment={name: Noise() for name in "ABC"} if augment else None)
    model.standardiser.fit(data_of(40))
    return model


def test_encoders_run_once_a_copy_and_the_fusion_once_a_batch():
    model, calls = model_of(CoMM(3, 16, retrieval=1.)), []
    for encoder in model.encoders.values(): encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    model.objective.fusion.register_forward_hook(lambda *_: calls.append("fusion"))
    model.objective.head.register_forward_hook(lambda *_: calls.append("head"))
    model.loss(data_of(8).modalities)
    assert calls == ["encoder"]*6 + ["fusion", "head"]


def test_the_loss_of_a_model_is_that_of_two_altered_copies():
    model, rows = model_of(CoMM(3, 16)), data_of(8)
    draws = generator(3)
    def copied(): return model(rows.modalities, None, True, draws)
    one, two = copied(), copied()
    assert torch.equal(model.loss(rows.modalities, generator=generator(3)), model.objective(one, None, None, two))
    assert not torch.equal(one[0], two[0]) and torch.equal(model(rows.modalities)[0], model.embed(rows, check=False)[0])
    state = torch.get_rng_state()
    model.loss(rows.modalities, generator=generator(3))
    assert torch.equal(state, torch.get_rng_state())


def test_a_missing_modality_stays_missing_in_every_copy():
    model, rows, present = model_of(CoMM(3, 16)), data_of(8).modalities, holes_of(3, 8)
    nan = {name: torch.where(present[:, m, None], x, math.nan) for m, (name, x) in enumerate(rows.items())}
    losses = [model.loss(batch, present, generator(0)) for batch in (rows, nan)]
    assert torch.equal(*losses)
    losses[1].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", [lambda: CoMM(3, 16), lambda: CrossSelf(3, 16)])
def test_training_is_the_same_again_and_lowers_the_loss(make):
    runs = []
    for _ in range(2):
        model = model_of(make())
        history = fit(model, data_of(120), data_of(40, 1), epochs=3, batch_size=40, warmup_steps=2, learning_rate=1e-2,
                      progress=False, validate=minus_loss)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs) and history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert list(history)[:3] == ["epoch", "train_loss", "valid"]


def test_it_stands_in_the_tables_of_the_others():
    "Validation by retrieval, as for any objective."
    model = model_of(CoMM(3, 16, retrieval=1.))
    history = fit(model, data_of(120), data_of(40, 1), "A", epochs=8, batch_size=40, warmup_steps=2, learning_rate=1e-2,
                  progress=False)
    assert history["valid_top1"].max() > 0.3                                       # chance is 1/40


def test_bad_input_is_named():
    wide = MultimodalModel({"A": MLP(6, 16), "B": MLP(6, 16), "C": MLP(6, 8)}, CoMM(3, 16), standardise=False)
    rows = data_of(8).modalities
    with pytest.raises(ShapeError, match="share one width"): wide.loss(rows)
    other = MultimodalModel({name: MLP(6, 8) for name in "ABC"}, CoMM(3, 16), standardise=False)
    with pytest.raises(ShapeError, match=r"rows \(B, 16\), got shapes"): other.loss(rows)
    model = model_of(CoMM(3, 16))
    with pytest.raises(ShapeError, match="at least 2 rows"): model.loss({name: x[:1] for name, x in rows.items()})
    with pytest.raises(MissingError, match="8 rows have fewer than 2 modalities"):
        model.loss(rows, torch.tensor([[True, False, False]]*8))
    class Crop(nn.Module):
        def forward(self, x, generator=None): return x[:, 1:]
    cut = MultimodalModel({name: MLP(6, 16) for name in "ABC"}, CoMM(3, 16), False, {"B": Crop()})
    with pytest.raises(ShapeError, match=r"augment\['B'\] must give rows of shape \(8, 6\), got"): cut.loss(rows)
    with pytest.raises(MissingError, match='PairwiseCLIP declares no "fused"'):
        model_of(PairwiseCLIP()).represent(data_of(8))


def test_probes_look_at_the_fused_rows():
    "Beside the embeddings, below the head; objectives that fuse nothing have no such view."
    train, test = data_of(60), data_of(30, 1)
    labels = [(rows.modalities["A"][:, 0] > 0).long() for rows in (train, test)]
    found = probe(model_of(CoMM(3, 16)), train, test, *labels, probes="linear", resamples=10)
    assert list(found["view"].unique()) == ["A", "B", "C", "concatenated", "product", "fused"]
    assert found.query("view == 'fused' and metric == 'auroc'")["value"].item() > 0.7
    found = probe(model_of(PairwiseCLIP()), train, test, *labels, probes="linear", resamples=10)
    assert "fused" not in set(found["view"])
