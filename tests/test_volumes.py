"GRAM and TRIANGLE: against slow loops in float64, where vectors coincide, with holes, few digits, bounded memory."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gated_symile.core import generator, unit, DtypeError, MissingError, NonFiniteError, RangeError, ShapeError
from gated_symile.objectives.gram import both_ways, orthonormal, stand_apart, volumes, GRAM
from gated_symile.objectives.triangle import squared_areas, TRIANGLE
from oracles import both_ways_loop, scores_loop, triangle_score, volume_score

OBJECTIVES = {"GRAM": GRAM, "TRIANGLE": TRIANGLE}
each = pytest.mark.parametrize("name", OBJECTIVES)
LOG_SCALE = math.log(1.7)


def rows(n, D, seed): return unit(torch.randn(n, D, generator=generator(seed), dtype=torch.float64))


def random_embeddings(M, B, D, N=None, target=None, seed=0):
    return [rows(N if m == target else B, D, 100*seed + m) for m in range(M)]


def holes(B, M, seed, at_least, target=None):
    "Which modalities exist: at least so many in each row, besides the target."
    present = torch.rand(B, M, generator=generator(seed)) < 0.6
    others = torch.tensor([m for m in range(M) if m != target])
    for row in present: row[others[torch.randperm(len(others), generator=generator(seed))[:at_least]]] = True
    return present


def spoil(embeddings, present, target=None):
    "NaN in what is missing."
    return [e if m == target else torch.where(present[:, m, None], e, math.nan) for m, e in enumerate(embeddings)]


def of_row(name):
    "The oracle of one row: TRIANGLE with one query has a corner at right angles to all else."
    if name == "GRAM": return lambda queries, c: volume_score([*queries, c])
    def score(queries, c):
        if len(queries) == 2: return triangle_score(*queries, c)
        wider = lambda v: torch.cat([v, v.new_zeros(1)])
        return triangle_score(wider(queries[0]), torch.eye(len(c) + 1, dtype=torch.float64)[-1], wider(c))
    return score


@st.composite
def cases(draw, alike=False):
    "An objective and sizes it takes."
    name = draw(st.sampled_from(sorted(OBJECTIVES)))
    M = 3 if name == "TRIANGLE" else draw(st.integers(2, 5))
    B, N, D = (draw(st.integers(low, high)) for low, high in ((2 if alike else 1, 5), (1, 6), (M + 1, 9)))
    return name, M, B, N, D, draw(st.booleans()), draw(st.integers(0, 9999))


@settings(max_examples=120, deadline=None)
@given(cases())
def test_scores_are_the_loop(case):
    name, M, B, N, D, with_holes, seed = case
    target = seed % M
    e, present = random_embeddings(M, B, D, N, target, seed), holes(B, M, seed, 1, target) if with_holes else None
    expected = torch.tensor(scores_loop(e, target, present, of_row(name)), dtype=torch.float64)
    got = OBJECTIVES[name]().score(spoil(e, present, target) if with_holes else e, target, present)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(cases(alike=True))
def test_losses_are_the_loop(case):
    name, M, B, _, D, with_holes, seed = case
    e, present = random_embeddings(M, B, D, seed=seed), holes(B, M, seed, 2) if with_holes else None
    if present is not None and present.sum(0).max() < 2: present[:2, :2] = True
    expected = both_ways_loop([scores_loop(e, t, present, of_row(name)) for t in range(M)], 1.7, present)
    objective = OBJECTIVES[name](LOG_SCALE).double()
    assert objective(spoil(e, present) if with_holes else e, present).item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(cases(alike=True))
def test_order_of_modalities_does_not_matter(case):
    name, M, B, N, D, with_holes, seed = case
    order, target = torch.randperm(M, generator=generator(seed)).tolist(), seed % M
    e, present = random_embeddings(M, B, D, N, target, seed), holes(B, M, seed, 1, target) if with_holes else None
    turn = lambda x: None if x is None else x[:, order]
    objective = OBJECTIVES[name]()
    got = objective.score([e[m] for m in order], order.index(target), turn(present))
    torch.testing.assert_close(got, objective.score(e, target, present), rtol=1e-7, atol=1e-9)
    e, present = random_embeddings(M, B, D, seed=seed), torch.ones(B, M, dtype=torch.bool)
    if M > 2 and with_holes: present[0, seed % M] = False
    torch.testing.assert_close(objective([e[m] for m in order], turn(present)), objective(e, present), rtol=1e-6,
                               atol=1e-6)


@each
@pytest.mark.parametrize("with_holes", [False, True])
def test_gradients_are_finite_differences(name, with_holes):
    objective = OBJECTIVES[name](LOG_SCALE).double()
    e, present = [x.requires_grad_() for x in random_embeddings(3, 4, 6, 5, 1)], None
    if with_holes: present = torch.tensor([[True, True, False], [False, True, True], [True]*3, [True, False, True]])
    assert torch.autograd.gradcheck(lambda *x: objective.score(list(x), 1, present), e)
    e = [x.requires_grad_() for x in random_embeddings(3, 4, 6)]
    assert torch.autograd.gradcheck(lambda *x: objective(list(x), present), e)


@pytest.mark.parametrize("M", [2, 4, 5])
def test_gradients_of_other_numbers_of_modalities(M):
    e = [x.requires_grad_() for x in random_embeddings(M, 3, 7, 4, 0)]
    assert torch.autograd.gradcheck(lambda *x: volumes(list(x), 0), e)


# What the two can and cannot see

def test_two_modalities_are_the_sine():
    a, b = random_embeddings(2, 6, 5)
    torch.testing.assert_close(GRAM().score([a, b], 1), -(1 - (a @ b.T)**2).sqrt())


@pytest.mark.parametrize("M", [2, 3, 4, 5])
def test_gram_sees_no_sign(M):
    e = random_embeddings(M, 4, 8, 6, 1)
    for m in range(M):
        flipped = [-x if k == m else x for k, x in enumerate(e)]
        torch.testing.assert_close(GRAM().score(flipped, 1), GRAM().score(e, 1), rtol=1e-12, atol=0)


def test_triangle_sees_a_sign():
    e = random_embeddings(3, 4, 8, 6, 1)
    for m in range(3):
        flipped = [-x if k == m else x for k, x in enumerate(e)]
        assert (TRIANGLE().score(flipped, 1) - TRIANGLE().score(e, 1)).abs().min() > 1e-6
    torch.testing.assert_close(TRIANGLE().score([-x for x in e], 1), TRIANGLE().score(e, 1), rtol=1e-12, atol=0)


def coincidences(M, D=16, B=4, dtype=torch.float64, gap=0.):
    "Aligned rows, candidates in slot 0, in which two or more vectors coincide or are opposite, but for a `gap`."
    v = [x.to(dtype) for x in random_embeddings(M + 1, B, D)]
    near = lambda x: unit(x.double() + gap*rows(B, D, 77)).to(dtype)
    yield [near(v[1]), *v[1:M]]                                            # candidate and query
    yield [near(-v[1]), *v[1:M]]
    yield [near(v[0])] * M                                                 # all
    if M > 2:
        yield [v[0], v[1], near(v[1]), *v[3:M]]                            # two queries
        yield [v[0], v[1], near(-v[1]), *v[3:M]]


@pytest.mark.parametrize("dtype, nothing", [(torch.float64, 1e-7), (torch.float32, 2e-3)])
@pytest.mark.parametrize("M", [2, 3, 4, 5])
def test_gram_is_zero_where_vectors_coincide_or_are_opposite(M, dtype, nothing):
    for e in coincidences(M, dtype=dtype): assert GRAM().score(e, 0).diagonal().abs().max() < nothing


@pytest.mark.parametrize("dtype, nothing", [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_triangle_is_zero_where_corners_coincide_and_only_there(dtype, nothing):
    same_candidate, opposite_candidate, all_same, same_queries, opposite_queries = coincidences(3, dtype=dtype)
    for e in (same_candidate, all_same, same_queries): assert TRIANGLE().score(e, 0).diagonal().abs().max() < nothing
    for e in (opposite_candidate, opposite_queries): assert TRIANGLE().score(e, 0).diagonal().max() < -0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0., 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("name, M", [("GRAM", 2), ("GRAM", 3), ("GRAM", 4), ("GRAM", 5), ("TRIANGLE", 3)])
def test_gradients_stay_finite_where_vectors_coincide(name, M, gap, dtype):
    objective = OBJECTIVES[name]().to(dtype)
    for e in coincidences(M, 64, dtype=dtype, gap=gap):
        leaves = [*(x.clone().requires_grad_() for x in e), objective.logit_scale.log_scale]
        grads = torch.autograd.grad(objective(leaves[:-1]), leaves)
        assert all(g.isfinite().all() for g in grads) and max(g.norm() for g in grads[:-1]) < 2 * math.exp(2.659)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@each
def test_no_step_of_the_backward_pass_is_nan(name):
    e = [torch.eye(3)[[0, 0, 1]].requires_grad_() for _ in range(3)]       # exact zeros
    with torch.autograd.detect_anomaly(check_nan=True): OBJECTIVES[name]()(e).backward()
    assert all(x.grad.isfinite().all() for x in e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap, steepest",
                         [(0., 0.15), (1e-8, 1.5), (1e-6, 1.5), (1e-4, 1.5), (1e-2, 1.01), (1., 1.001)])
def test_slope_of_a_volume_is_one_at_most_and_none_at_the_bottom(gap, steepest, dtype):
    "Of unit vectors; where little more than rounding is left it may be exceeded somewhat."
    for M in (2, 3, 4):
        for e in coincidences(M, 256, 16, dtype, gap):
            e = [x.clone().requires_grad_() for x in e]
            for g in torch.autograd.grad(volumes(e, 0).diagonal().sum(), e): assert g.norm(dim=1).max() < steepest


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(0, 9999))
def test_geometry(M, seed):
    "Turning changes nothing; adding a multiple of a query keeps a volume, moving the origin an area; scaling scales."
    e = [torch.randn(4, 7, generator=generator(10*seed + m), dtype=torch.float64) for m in range(M)]
    turn = torch.linalg.qr(torch.randn(7, 7, generator=generator(seed), dtype=torch.float64))[0]
    v = volumes(e, 0)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    close(volumes([x @ turn for x in e], 0), v)
    close(volumes([e[0] + 2*e[1], *e[1:]], 0).diagonal(), v.diagonal())
    close(volumes([3*e[0], *e[1:]], 0), 3*v)
    close(volumes([e[0], 3*e[1], *e[2:]], 0), 3*v)
    if M == 3:
        s = squared_areas(e, 0)
        close(squared_areas([x @ turn + turn[0] for x in e], 0), s)
        close(squared_areas([3*x for x in e], 0), 81*s)
        close(squared_areas(e, 1).diagonal(), s.diagonal())                # any corner may be the candidate
        close(squared_areas(e, 2).diagonal(), s.diagonal())


# Digits

@pytest.mark.parametrize("M", [3, 4, 5])
@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4])
def test_queries_that_nearly_agree_keep_their_digits(M, gap):
    "A float32 determinant of these has no correct digit at a gap of 1e-3; the rows are only known to 6e-8 / gap."
    middle = rows(20, 64, 5)
    e = [x.float() for x in (rows(30, 64, 6), *(unit(middle + gap*rows(20, 64, 7 + m)) for m in range(M - 1)))]
    true = volumes([x.double() for x in e], 0)
    assert ((volumes(e, 0) - true)/true).abs().max() < max(5e-6, 1e-6/gap)
    if M == 3:
        true = squared_areas([x.double() for x in e], 0)
        assert ((squared_areas(e, 0) - true)/true).abs().max() < 5e-6


@pytest.mark.parametrize("D", [4, 256, 8192])
@pytest.mark.parametrize("gap", [0., 1e-4, 1e-2, 1.])
def test_candidates_close_to_a_query_are_right_to_an_absolute_error(D, gap):
    query = rows(20, D, 1)
    e = [x.float() for x in (unit(query + gap*rows(20, D, 2)), query, rows(20, D, 3))]
    d = [x.double() for x in e]
    assert (volumes(e, 0) - volumes(d, 0)).abs().max() < 2e-3
    assert (squared_areas(e, 0) - squared_areas(d, 0)).abs().max() < 3e-6


@each
@pytest.mark.parametrize("D", [64, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_few_digits_in_are_scored_in_full(name, D, dtype):
    "Rows rounded to bfloat16 are no longer unit rows; the score is that of what they are."
    e = [x.to(dtype) for x in random_embeddings(3, 2, D, 3, 1)]
    got = OBJECTIVES[name]().score(e, 1)
    assert got.dtype == torch.float32
    expected = torch.tensor(scores_loop([x.double() for x in e], 1, None, of_row(name)))
    torch.testing.assert_close(got, expected.float(), rtol=2e-6, atol=2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(OBJECTIVES[name]().score(e, 1), got)


# What is missing

@pytest.mark.parametrize("M", [3, 4, 5])
def test_gram_leaves_out_what_is_missing(M):
    e = random_embeddings(M, 6, 9, 7, 0)
    present = torch.ones(6, M, dtype=torch.bool)
    present[:, M - 1] = False
    torch.testing.assert_close(GRAM().score(e, 0, present), GRAM().score(e[:-1], 0))
    alike = random_embeddings(M, 6, 9)
    torch.testing.assert_close(GRAM()(spoil(alike, present), present), GRAM()(alike[:-1]))


@each
def test_one_query_ranks_by_cosine(name):
    "Up to the sign, which a volume does not see."
    e, present = random_embeddings(3, 6, 9, 20, 0), torch.tensor([[True, False, True]]*6)
    cosines = e[2] @ e[0].T
    expected = (cosines.abs() if name == "GRAM" else cosines).argsort()
    assert torch.equal(OBJECTIVES[name]().score(e, 0, present).argsort(), expected)
    if name == "TRIANGLE": # as the page says
        x = torch.cdist(e[2], e[0])**2
        torch.testing.assert_close(TRIANGLE().score(e, 0, present), -(x - x*x/8))


@each
def test_strangers_have_one_scale_with_and_without_holes(name):
    e, present = random_embeddings(3, 50, 4096, seed=3), torch.ones(50, 3, dtype=torch.bool)
    present[::2, 2] = False
    s = OBJECTIVES[name]().score(e, 0, present)
    torch.testing.assert_close(s[::2].mean(), s[1::2].mean(), rtol=0.01, atol=0)
    torch.testing.assert_close(s[1::2].mean().item(), -1. if name == "GRAM" else -1.5, rtol=0.01, atol=0)


def test_every_absence_has_a_coordinate_of_its_own():
    present = torch.tensor([[True, False, False], [False, True, True]])
    e = stand_apart([torch.zeros(2, 4) for _ in range(3)], present)
    everything = torch.stack(e, 1)[~present]                               # (3, D + M)
    torch.testing.assert_close(everything @ everything.T, torch.eye(3))
    assert stand_apart([torch.zeros(5, 4), *e[1:]], present, 0)[0].abs().sum() == 0


# The contract

@each
class TestContract:
    def test_holes_reach_nothing(self, name):
        objective, e = OBJECTIVES[name]().double(), random_embeddings(3, 5, 6)
        present = torch.tensor([[True, True, False], [True, False, True], [False, True, True], [True]*3, [True]*3])
        loss = {}
        for content in (math.nan, 1e6):
            filled = [torch.where(present[:, m, None], x, content).requires_grad_() for m, x in enumerate(e)]
            objective.zero_grad()
            loss[content] = objective(filled, present)
            loss[content].backward()
            for m, x in enumerate(filled): assert x.grad.isfinite().all() and (x.grad[~present[:, m]] == 0).all()
            assert objective.logit_scale.log_scale.grad.isfinite()
        assert loss[math.nan] == loss[1e6]

    def test_everything_present_is_no_mask(self, name):
        objective, e = OBJECTIVES[name]().double(), random_embeddings(3, 5, 6)
        everything = torch.ones(5, 3, dtype=torch.bool)
        torch.testing.assert_close(objective(e, everything), objective(e))
        torch.testing.assert_close(objective.score(e, 2, everything), objective.score(e, 2))

    def test_a_candidate_is_scored_alone(self, name):
        e = random_embeddings(3, 5, 64, 7, 1)
        alone = [x[:1] if m == 1 else x for m, x in enumerate(e)]
        torch.testing.assert_close(OBJECTIVES[name]().score(alone, 1), OBJECTIVES[name]().score(e, 1)[:, :1],
                                   rtol=1e-12, atol=1e-12)

    def test_nothing_is_random(self, name):
        objective, e, state = OBJECTIVES[name](), random_embeddings(3, 5, 6), torch.get_rng_state()
        assert objective(e, generator=generator(1)) == objective(e, generator=generator(2)) == objective(e)
        assert torch.equal(state, torch.get_rng_state())

    def test_training_pulls_true_rows_together(self, name):
        "From random embeddings of 12 rows, a few steps find them all."
        objective, e = OBJECTIVES[name](), [torch.randn(12, 8, generator=generator(m)).requires_grad_()
                                            for m in range(3)]
        optimiser = torch.optim.Adam([*e, *objective.parameters()], lr=0.1)
        for _ in range(50):
            optimiser.zero_grad()
            objective([unit(x) for x in e]).backward()
            optimiser.step()
        with torch.no_grad():
            assert all((objective.score([unit(x) for x in e], t).argmax(1) == torch.arange(12)).all() for t in range(3))

    @pytest.mark.parametrize("change, error, words", [
        (lambda e: [e[0], e[1][:3], e[2]], ShapeError, "same rows"),
        (lambda e: [e[0], e[1][:, :3], e[2]], ShapeError, "share one width"),
        (lambda e: e[:1], ShapeError, "at least 2 modalities"),
        (lambda e: [x[:1] for x in e], ShapeError, "at least 2 rows"),
        (lambda e: [x.long() for x in e], DtypeError, "floating"),
        (lambda e: [e[0], e[1] * math.nan, e[2]], NonFiniteError, r"embeddings\[1\]")])
    def test_bad_batches_are_named(self, name, change, error, words):
        with pytest.raises(error, match=words): OBJECTIVES[name]()(change(random_embeddings(3, 5, 6)))

    def test_bad_calls_are_named(self, name):
        objective, e = OBJECTIVES[name](), random_embeddings(3, 5, 6)
        with pytest.raises(RangeError, match="target"): objective.score(e, 3)
        with pytest.raises(RangeError, match="log_scale"): OBJECTIVES[name](10.)
        with pytest.raises(MissingError, match="fewer than 2"): objective(e, torch.eye(5, 3) > 0)
        with pytest.raises(MissingError, match="no query modality"):
            objective.score(e, 0, torch.zeros(5, 3, dtype=torch.bool))
        with pytest.raises(MissingError, match="no modality is present in 2 rows"):
            both_ways([torch.zeros(2, 2)]*2, torch.eye(2) > 0)
        with pytest.raises(DtypeError, match="bool"): objective(e, torch.ones(5, 3))

    def test_memory_is_that_of_rows_and_scores(self, name):
        "No tensor of the forward or backward pass is larger than all embeddings of a modality or one table of scores."
        largest = 0
        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal largest
                out = function(*args, **(kwargs or {}))
                for x in torch.utils._pytree.tree_leaves(out):
                    if isinstance(x, torch.Tensor): largest = max(largest, x.numel())
                return out
        e = [x.requires_grad_() for x in random_embeddings(3, 24, 20)]
        with Watch(): OBJECTIVES[name]().double()(e).backward()
        assert 0 < largest <= 24 * 24


@pytest.mark.parametrize("M", [2, 4, 5])
def test_triangle_has_three_corners(M):
    e = random_embeddings(M, 4, 6)
    with pytest.raises(ShapeError, match=f"3 modalities.*got {M}"): TRIANGLE()(e)
    with pytest.raises(ShapeError, match=f"3 modalities.*got {M}"): TRIANGLE().score(e, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 9999))
def test_orthonormal(K, B, D, seed):
    "Also where there are more vectors than dimensions, and so no volume."
    e = [torch.randn(B, D, generator=generator(10*seed + k), dtype=torch.float64) for k in range(K)]
    basis, volume = orthonormal(e)
    if K > D:
        assert volume.abs().max() < 1e-6
        return
    torch.testing.assert_close(volume, torch.tensor([-volume_score(v) for v in zip(*e)], dtype=torch.float64),
                               rtol=1e-5, atol=1e-9)
    q = torch.stack(basis, 1)
    torch.testing.assert_close(q @ q.mT, torch.eye(K, dtype=torch.float64).expand(B, K, K), rtol=0, atol=1e-8)
