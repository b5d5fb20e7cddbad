"Objectives against slow loops in float64 and against the PyPI package symile."
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st
from symile import MIPSimilarity, Symile as PackageSymile

import gated_symile.cube
from gated_symile.contrastive import candidate_scores, shuffle_scores, STRUCK_OUT
from gated_symile.core import generator, unit, DtypeError, MissingError, NonFiniteError, RangeError, ShapeError
from gated_symile.cube import _own_gradient, all_loss
from gated_symile.gate.gate import ModalityGate
from gated_symile.product import dvs, mip, mip_scores
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.symile import leave_out_missing, Symile
from oracles import info_nce_loop, mip_loop, mip_scores_loop

OBJECTIVES = {"PairwiseCLIP": lambda M, D: PairwiseCLIP(), "Symile shuffle": lambda M, D: Symile(),
              "Symile candidates": lambda M, D: Symile("candidates"), "Symile all": lambda M, D: Symile("all"),
              "GatedSymile": lambda M, D: GatedSymile(ModalityGate(M, D, 4))}


def random_embeddings(M, B, D, N=None, target=None, seed=0):
    return [unit(torch.randn(N if m == target else B, D, generator=generator(100*seed + m), dtype=torch.float64))
            for m in range(M)]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.data())
def test_mip_is_the_loop(M, B, N, D, data):
    target = data.draw(st.integers(0, M - 1))
    e = random_embeddings(M, B, D, N, target)
    torch.testing.assert_close(mip_scores(e, target), mip_scores_loop(e, target), rtol=1e-10, atol=1e-12)
    rows = random_embeddings(M, B, D)
    torch.testing.assert_close(mip(rows),
                               torch.tensor([mip_loop([x[i] for x in rows]) for i in range(B)], dtype=torch.float64),
                               rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("M", [3, 4, 5])
def test_scores_match_the_package(M):
    e = random_embeddings(M, 6, 8, 9, 1)
    package = MIPSimilarity()(e[1], [x for m, x in enumerate(e) if m != 1])
    torch.testing.assert_close(mip_scores(e, 1), package, rtol=1e-10, atol=0)


@pytest.mark.parametrize("M", [3, 4, 5])
def test_shuffled_loss_matches_the_package(M, monkeypatch):
    "Same shuffles for both; the package keeps false negatives, so the shuffles have none."
    B, D = 12, 8
    e = [x.requires_grad_() for x in random_embeddings(M, B, D)]
    shifts = iter([(7*k + 3*m) % B for k in range(M) for m in range(M)]) # what our M shuffles for each of M anchors are
    ours = [[torch.arange(B).roll(next(shifts)) for _ in range(M)] for _ in range(M)]
    queue = [where for target in ours for where in target]
    monkeypatch.setattr(torch, "randperm", lambda n, **kw: queue.pop(0))
    objective = Symile(log_scale=0.5).double()
    scale = objective.logit_scale().item()
    loss = objective(e)
    queue = [where for t, target in enumerate(ours) for m, where in enumerate(target) if m != t]
    package = PackageSymile("n")(e, scale * dvs(M, D))
    torch.testing.assert_close(loss, package, rtol=1e-10, atol=0, check_dtype=False)
    for a, b in zip(torch.autograd.grad(loss, e), torch.autograd.grad(package, e)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("M, B", [(3, 7), (3, 12), (4, 5), (5, 3)])
# one shift for the cube, twice, and one for each sum, twice
@pytest.mark.parametrize("scale, safe_spread", [(1., 20.), (60., 1e9), (60., 20.), (1000., 20.)])
@pytest.mark.parametrize("kept_rows", [0, 3, 1000])
def test_all_combinations_match_the_package(M, B, scale, safe_spread, kept_rows, monkeypatch):
    "The streamed cube against every combination, with slabs that don't divide the rows, and some exponentials kept."
    for name, value in {"SLAB": 2*B*max(B, 6) + 1, "KEPT": kept_rows * B**2, "SAFE_SPREAD": safe_spread}.items():
        monkeypatch.setattr(f"gated_symile.cube.{name}", value)
    e = [x.requires_grad_() for x in random_embeddings(M, B, 6)]
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    ours, theirs = all_loss(e, s), PackageSymile("n_squared")(e, s * dvs(M, 6))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(ours, [s, *e], retain_graph=True)
    for a, b in zip(gradients, torch.autograd.grad(theirs, [s, *e])):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    # the first pass spoiled nothing that was kept
    for a, b in zip(gradients, torch.autograd.grad(-ours, [s, *e])): assert torch.equal(a, -b)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(2, 4), st.integers(1, 5), st.sampled_from([0.1, 3., 30.]), st.integers(0, 999))
def test_all_combinations_are_the_loop(M, B, D, scale, seed):
    "Absent anchors don't count, nor modalities that one row alone has; of the absent parts, which are alike, one does."
    present = torch.rand(B, M, generator=generator(seed)) < 0.8
    present[:2, 0] = True
    e = leave_out_missing(random_embeddings(M, B, D, seed=seed), present)
    parts = [[i for i in range(B) if present[i, m] or i == (~present[:, m]).nonzero().flatten()[0]] for m in range(M)]
    score = lambda rows: scale * dvs(M, D) * mip_loop([x[i] for x, i in zip(e, rows)])
    scores = {rows: score(rows) for rows in product(*parts)}
    losses = []
    for m in range(M):
        anchors = present[:, m].nonzero().flatten().tolist()
        if len(anchors) < 2: continue
        sums = {i: sum(math.exp(score) for rows, score in scores.items() if rows[m] == i) for i in anchors}
        losses.append(sum(math.log(sums[i]) - score((i,)*M) for i in anchors) / len(anchors))
    ours = all_loss(e, torch.tensor(scale, dtype=torch.float64), present)
    torch.testing.assert_close(ours.item(), sum(losses)/len(losses), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("negatives", ["shuffle", "candidates", "all"])
def test_a_hole_is_no_negative(negatives):
    "Where every row with a hole fits perfectly and nothing else does, no copy of a true row is among the negatives."
    bits = torch.randn(64, 512, generator=generator(0)).sign(), torch.randn(64, 512, generator=generator(1)).sign()
    e = [unit(x) for x in (*bits, bits[0]*bits[1])]
    # without the third, the first two agree
    e[1][:32] = e[0][:32]
    present = torch.ones(64, 3, dtype=torch.bool)
    present[:32, 2] = False
    # with copies: log(32)/3 for all combinations
    assert Symile(negatives, log_scale=math.log(100))(e, present, generator(0)) < 0.01


@pytest.mark.parametrize("scale", [1., 5., 25., 100.]) # log-sums close together; from 25 on, hundreds apart
@pytest.mark.parametrize("kept", [0, 2**22])
def test_all_combinations_in_float32(scale, kept, monkeypatch):
    "Well-trained rows: negatives far below the true ones. The package in float32 is the measure."
    monkeypatch.setattr("gated_symile.cube.KEPT", kept)
    a, b = (torch.randn(24, 64, generator=generator(m)).sign() for m in range(2))
    e = [unit(x + 0.5*torch.randn(24, 64, generator=generator(9 + m))).requires_grad_()
         for m, x in enumerate((a, b, a*b))]
    s, exact_e = torch.tensor(scale), [x.detach().double().requires_grad_() for x in e]
    exact = torch.autograd.grad(all_loss(exact_e, s.double()), exact_e)
    ours, theirs = (torch.autograd.grad(loss, e)
                    for loss in (all_loss(e, s), PackageSymile("n_squared")(e, s * dvs(3, 64))))
    for x, y, z in zip(ours, theirs, exact): assert (x - z).norm() <= 3 * (y - z).norm() + 1e-6 * z.norm()


@pytest.mark.parametrize("spread", [1., 1e2, 1e4])
def test_derivatives_by_scores_are_no_denormal_numbers(spread):
    "A product of matrices with such numbers in it takes hundreds of times as long."
    scores = spread * torch.randn(8, 9, 9, generator=generator(0))
    anchors = [(scores.logsumexp(axes, keepdim=True), torch.tensor(1e-4)) for axes in ((1, 2), (0, 2), (0, 1))]
    g = _own_gradient(scores, anchors, torch.empty_like(scores), torch.empty_like(scores))
    assert g.min() > 1e6 * torch.finfo(g.dtype).tiny


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(2, 7), st.booleans(), st.integers(0, 999))
def test_candidate_loss_is_the_loop(M, B, D, holes, seed):
    e = random_embeddings(M, B, D, seed=seed)
    present = torch.ones(B, M, dtype=torch.bool)
    if holes and M > 2: present[torch.arange(B), torch.randint(M, (B,), generator=generator(seed))] = False
    losses = []
    for t in range(M):
        rows = present[:, t].nonzero().flatten().tolist()
        if len(rows) < 2: continue
        scores = [[dvs(int(present[i].sum()) if present[i, t] else 1, D)
                   * mip_loop([e[m][i] for m in range(M) if m != t and present[i, m]] + [e[t][j]])
                   for j in range(B)] for i in range(B)]
        losses.append(info_nce_loop(scores, 1.3, rows))
    nan = [torch.where(present[:, m, None], x, math.nan) for m, x in enumerate(e)]
    objective = Symile("candidates", log_scale=math.log(1.3)).double()
    torch.testing.assert_close(objective(nan, present).item(), sum(losses)/len(losses), rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(2, 9), st.booleans(), st.integers(0, 999))
def test_shuffles_hold_no_true_row_off_the_diagonal(M, B, holes, seed):
    present = torch.rand(B, M, generator=generator(seed)) < (0.5 if holes else 1.1)
    e = leave_out_missing(random_embeddings(M, B, 6, seed=seed), present)
    scores = shuffle_scores(e, 0, present if holes else None, generator(seed))
    true = dvs(M, 6) * mip(e)
    torch.testing.assert_close(scores.diagonal(), true)
    off = scores.masked_fill(torch.eye(B, dtype=torch.bool), STRUCK_OUT)
    assert not (off - true[:, None]).abs().lt(1e-9).any()


def test_two_modalities_are_clip():
    e = random_embeddings(2, 7, 5)
    # query 0, candidates 1
    one_way = torch.nn.functional.cross_entropy(candidate_scores(e, 1) / dvs(2, 5), torch.arange(7))
    torch.testing.assert_close(one_way, torch.nn.functional.cross_entropy(e[0] @ e[1].T, torch.arange(7)))
    torch.testing.assert_close(Symile("candidates").double()(e), PairwiseCLIP(math.log(dvs(2, 5))).double()(e),
                               rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
class TestContract:
    "What every objective promises."
    def test_loss_is_a_finite_scalar_with_gradients(self, name):
        torch.manual_seed(0)
        objective, e = OBJECTIVES[name](4, 6).double(), [x.requires_grad_() for x in random_embeddings(4, 5, 6)]
        objective(e, generator=generator(0)).backward()
        assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in e)
        assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())
        assert objective.logit_scale.log_scale.grad.abs() > 0

    def test_same_generator_same_loss_and_global_state_untouched(self, name):
        torch.manual_seed(0)
        objective, e = OBJECTIVES[name](3, 6).double(), random_embeddings(3, 5, 6)
        state = torch.get_rng_state()
        assert objective(e, generator=generator(3)) == objective(e, generator=generator(3))
        assert torch.equal(state, torch.get_rng_state())

    def test_holes_reach_nothing(self, name):
        torch.manual_seed(0)
        objective, e = OBJECTIVES[name](3, 6).double(), random_embeddings(3, 5, 6)
        present = torch.tensor([[True, True, False], [True, False, True], [False, True, True], [True]*3, [True]*3])
        holes = [torch.where(present[:, m, None], x, math.nan).requires_grad_() for m, x in enumerate(e)]
        objective(holes, present, generator(0)).backward()
        for m, x in enumerate(holes): assert x.grad.isfinite().all() and (x.grad[~present[:, m]] == 0).all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())
        assert objective.score([holes[0], e[1], holes[2]], 1, present).isfinite().all()

    def test_half_precision_is_scored_in_full(self, name):
        torch.manual_seed(0)
        objective, e = OBJECTIVES[name](3, 64), [x.float() for x in random_embeddings(3, 5, 64)]
        with torch.autocast("cpu", dtype=torch.bfloat16): inside = objective.score(e, 0)
        assert inside.dtype == torch.float32 and torch.equal(inside, objective.score(e, 0))
        assert objective.score([x.bfloat16() for x in e], 0).dtype == torch.float32

    @pytest.mark.parametrize("spoil, error, words", [
        (lambda e: [e[0], e[1][:3], e[2]], ShapeError, "same rows"),
        (lambda e: [e[0], e[1][:, :3], e[2]], ShapeError, "share one width"),
        (lambda e: e[:1], ShapeError, "at least 2 modalities"),
        (lambda e: [x[:1] for x in e], ShapeError, "at least 2 rows"),
        (lambda e: [x.long() for x in e], DtypeError, "floating"),
        (lambda e: [e[0], e[1].float(), e[2]], DtypeError, "share one dtype"),
        (lambda e: [e[0], e[1] * math.nan, e[2]], NonFiniteError, r"embeddings\[1\]"),
        (lambda e: [e[0], e[1], e[2] / 0], NonFiniteError, r"embeddings\[2\]")])
    def test_bad_batches_are_named(self, name, spoil, error, words):
        objective = OBJECTIVES[name](3, 6).double()
        with pytest.raises(error, match=words): objective(spoil(random_embeddings(3, 5, 6)))

    def test_bad_calls_are_named(self, name):
        objective, e = OBJECTIVES[name](3, 6).double(), random_embeddings(3, 5, 6)
        for target, error in ((3, RangeError), (-1, RangeError), ("x", DtypeError), (1., DtypeError),
                              (True, DtypeError)):
            with pytest.raises(error, match="target"): objective.score(e, target)
        with pytest.raises(MissingError, match="fewer than 2"): objective(e, torch.eye(5, 3) > 0)
        with pytest.raises(MissingError, match="no query modality"):
            objective.score(e, 0, torch.zeros(5, 3, dtype=torch.bool))
        with pytest.raises(DtypeError, match="bool"): objective(e, torch.ones(5, 3))
        with pytest.raises(ShapeError, match="present"): objective(e, torch.ones(5, 2, dtype=torch.bool))


def test_all_combinations_call_their_operators_by_name(monkeypatch):
    "Who runs the module's cells beside the library registers both anew, and a handle from before leads nowhere."
    for name in ("cube_log_sums", "cube_slopes"): monkeypatch.setattr(gated_symile.cube, name, None)
    x = [unit(torch.randn(6, 4, generator=generator(m))).requires_grad_() for m in range(3)]
    Symile("all")(x).backward()
    assert all(e.grad.isfinite().all() for e in x)
