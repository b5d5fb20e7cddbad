"CoMM and what it is made of, against slow loops in float64: NT-Xent, the fusion of any subset, both losses."
import copy
import math
from itertools import combinations

import pytest
import torch

from gated_symile.contrastive import nt_xent
from gated_symile.core import generator
from gated_symile.fusion import Fusion, ProjectionHead
from oracles import fused_loop, nt_xent_loop


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
