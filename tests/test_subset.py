"The mixture over subsets: the loop over subsets, its limits, what it may see, and what it says about reliability."
import math

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from gated_symile.core import generator, unit, DtypeError, MissingError, NonFiniteError, RangeError, ShapeError
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.subset import diversity, query_subsets, SubsetSymile
from gated_symile.objectives.symile import Symile
from oracles import diversity as oracle_diversity, info_nce_loop, subset_logits, subset_score

sizes = st.tuples(st.integers(2, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 9)) # M, B, N, D
options = st.fixed_dictionaries(dict(log_scale=st.sampled_from([-1., 0., 0.7]),
                                     penalty=st.sampled_from([-1., 0., 1., 2.5]),
                                     null=st.sampled_from([-math.inf, -1., 3.]),
                                     max_subset=st.sampled_from([None, 1, 2, 9]), by_diversity=st.booleans()))
seeds = st.integers(0, 2**16)


def make(size, seed=0, holes=False, options={}):
    "An objective, embeddings of B queries and N candidates, the target, and `present` where there are holes (of NaN)."
    M, B, N, D = size
    g = generator(seed)
    target = int(torch.randint(M, (), generator=g))
    embeddings = [unit(torch.randn(N if m == target else B, D, generator=g, dtype=torch.float64)) for m in range(M)]
    present = None
    if holes:
        present = torch.rand(B, M, generator=g) < 0.6
        present[torch.arange(B),
                torch.tensor([m for m in range(M) if m != target])[torch.randint(M - 1, (B,), generator=g)]] = True
        for m in range(M):
            if m != target: embeddings[m][~present[:, m]] = math.nan
    return SubsetSymile(**options).double(), [e.requires_grad_() for e in embeddings], target, present


def rows(M, B, D, seed=0):
    return [unit(torch.randn(B, D, generator=generator(100*seed + m), dtype=torch.float64)) for m in range(M)]


def by_loop(objective, embeddings, target, present):
    "The score of all pairs, one at a time, differentiable."
    B, N = len(embeddings[0 if target else 1]), len(embeddings[target])
    settings = dict(scale=objective.logit_scale(), penalty=objective.penalty, null=objective.null,
                    max_subset=objective.max_subset, present=present,
                    by_diversity=objective.by_diversity)
    return torch.stack([torch.stack([subset_score(embeddings, target, i, j, **settings) for j in range(N)])
                        for i in range(B)])


def gradients(score, leaves):
    "Of a fixed random functional of the score."
    readout = torch.randn(score.shape, generator=generator(9), dtype=torch.float64)
    found = torch.autograd.grad((score * readout).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]


def close(got, expected, tolerance=1e-9): torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(sizes, options, st.booleans(), seeds)
def test_score_and_gradients_are_the_loop(size, options, holes, seed):
    objective, embeddings, target, present = make(size, seed, holes, options)
    fast, slow = objective.score(embeddings, target, present), by_loop(objective, embeddings, target, present)
    close(fast, slow)
    leaves = [*embeddings, objective.logit_scale.log_scale]
    for got, expected in zip(gradients(fast, leaves), gradients(slow, leaves)): close(got, expected, 1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(2, 7), options, st.booleans(), seeds)
def test_loss_is_info_nce_on_the_score(M, B, D, options, holes, seed):
    objective, e = SubsetSymile(**options).double(), rows(M, B, D, seed)
    present = torch.ones(B, M, dtype=torch.bool)
    if holes and M > 2: present[torch.arange(B), torch.randint(M, (B,), generator=generator(seed))] = False
    losses = []
    for t in range(M):
        asked = [i for i in range(B) if present[i, t]]
        if len(asked) < 2: continue
        scores = [[subset_score(e, t, i, j, objective.logit_scale(), objective.penalty, objective.null,
                                objective.max_subset, present,
                                objective.by_diversity).item()
                   if i in asked else 0. for j in range(B)] for i in range(B)]
        losses.append(info_nce_loop(scores, 1., asked))
    assume(losses)
    nan = [torch.where(present[:, m, None], x, math.nan) for m, x in enumerate(e)]
    close(objective(nan, present).item(), sum(losses)/len(losses))


def test_gradcheck():
    "Against finite differences, with holes."
    objective, embeddings, target, present = make((4, 3, 4, 5), 1, holes=True, options=dict(null=1.))
    embeddings = [e.detach().nan_to_num(0.).requires_grad_() for e in embeddings]
    assert torch.autograd.gradcheck(lambda *e: objective.score(list(e), target, present), embeddings)
    e = [x.requires_grad_() for x in rows(3, 4, 5)]
    assert torch.autograd.gradcheck(lambda *e: objective(list(e)), e)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(2, 7), st.booleans(), seeds)
def test_a_negative_penalty_makes_it_symile(M, B, D, holes, seed):
    "Only the largest subset that is present counts."
    e, present = rows(M, B, D, seed), torch.ones(B, M, dtype=torch.bool)
    if holes and M > 2: present[torch.arange(B), torch.randint(M, (B,), generator=generator(seed))] = False
    assume((present.sum(0) > 1).any())
    mixture, symile = SubsetSymile(penalty=-200.).double(), Symile("candidates").double()
    close(mixture(e, present), symile(e, present), 1e-8)
    size = present[:, 1:].sum(1, keepdim=True)
    if (size > 0).all(): close(mixture.score(e, 0, present) - 200*(size - 1), symile.score(e, 0, present), 1e-8)


@settings(max_examples=30, deadline=None)
@given(sizes, seeds)
def test_the_other_limits(size, seed):
    M, B, N, D = size
    _, e, target, _ = make(size, seed)
    flat, n = SubsetSymile(penalty=0.).double(), 2**(M - 1) - 1
    close(SubsetSymile(penalty=1e4).double().score(e, target), SubsetSymile(max_subset=1).double().score(e, target))
    close(SubsetSymile(max_subset=1).double().score([e[target], e[target - 1]], 0),
          D**0.5 * PairwiseCLIP().score([e[target], e[target - 1]], 0))
    logits = [[[x.item() for s, x in subset_logits(e, target, i, j, 1., 0.).items() if s] for j in range(N)]
              for i in range(B)]
    logits = torch.tensor(logits, dtype=torch.float64)
    score = flat.score(e, target)
    # nobody has a veto
    assert (score >= logits.amax(-1) - 1e-9).all() and (score <= logits.amax(-1) + math.log(n) + 1e-9).all()
    hard = SubsetSymile(log_scale=4.6, penalty=0.).double()
    # a large scale: the best subset
    assert (hard.score(e, target)/hard.logit_scale() - logits.amax(-1)).abs().max() <= math.log(n)/90 + 1e-9


@pytest.mark.parametrize("M", [2, 3, 5])
def test_a_small_scale_makes_it_the_mean(M):
    e = rows(M, 4, 6)
    objective = SubsetSymile(log_scale=-4.6, penalty=0.).double()
    scale, n = objective.logit_scale(), 2**(M - 1) - 1
    mean = torch.tensor([[sum(x.item() for s, x in subset_logits(e, 0, i, j, 1., 0.).items() if s)/n for j in range(4)]
                         for i in range(4)])
    assert ((objective.score(e, 0) - math.log(n))/scale - mean).abs().max() < 0.1


@settings(max_examples=40, deadline=None)
@given(sizes, options, st.booleans(), seeds)
def test_order_of_modalities_does_not_matter(size, options, holes, seed):
    objective, embeddings, target, present = make(size, seed, holes, options)
    order = torch.randperm(size[0], generator=generator(seed)).tolist()
    turned = objective.score([embeddings[m] for m in order], order.index(target),
                             None if present is None else present[:, order])
    close(turned, objective.score(embeddings, target, present))
    weights, null = objective.weights(embeddings, target, present)
    moved, same = objective.weights([embeddings[m] for m in order], order.index(target),
                                    None if present is None else present[:, order])
    position = {m: k for k, m in enumerate(m for m in range(size[0]) if m != target)}
    close(moved, weights[..., [position[m] for m in order if m != target]])
    close(same, null)


@settings(max_examples=40, deadline=None)
@given(sizes, options, seeds)
def test_missing_content_reaches_nothing(size, options, seed):
    objective, embeddings, target, present = make(size, seed, True, options)
    other = [torch.where(e.isnan(), 1e6, e).detach().requires_grad_() for e in embeddings]
    a, b = objective.score(embeddings, target, present), objective.score(other, target, present)
    assert torch.equal(a, b)
    parameter = [objective.logit_scale.log_scale]
    for m, (x, y) in enumerate(zip(gradients(a, embeddings + parameter), gradients(b, other + parameter))):
        assert torch.equal(x, y) and x.isfinite().all()
        if m < size[0] and m != target: assert (x[~present[:, m]] == 0).all()
    for x, y in zip(objective.weights(embeddings, target, present), objective.weights(other, target, present)):
        assert torch.equal(x, y)
    subsets = query_subsets(size[0], target, objective.max_subset)
    # (B, 1+n)
    lacking = torch.stack([~present[:, list(s)].all(1) for s in subsets], 1)
    assert (objective.posterior(embeddings, target, present)[lacking[:, None].expand(-1, size[2], -1)] == 0).all()


@settings(max_examples=40, deadline=None)
@given(sizes, options, seeds)
def test_a_row_without_a_modality_is_a_row_of_fewer(size, options, seed):
    objective, embeddings, target, _ = make(size, seed, options=options)
    assume(size[0] > 2)
    gone = (target + 1) % size[0]
    present = torch.ones(size[1], size[0], dtype=torch.bool)
    present[:, gone] = False
    fewer = [e for m, e in enumerate(embeddings) if m != gone]
    close(objective.score(embeddings, target, present), objective.score(fewer, target - (gone < target)))


@settings(max_examples=40, deadline=None)
@given(sizes, options, st.booleans(), seeds)
def test_posterior_is_what_a_subset_adds_to_the_odds(size, options, holes, seed):
    objective, embeddings, target, present = make(size, seed, holes, options)
    posterior, subsets = objective.posterior(embeddings, target, present), query_subsets(size[0], target,
                                                                                         objective.max_subset)
    assert posterior.shape == (size[1], size[2], len(subsets))
    settings = dict(scale=objective.logit_scale(), penalty=objective.penalty, null=objective.null,
                    max_subset=objective.max_subset, present=present,
                    by_diversity=objective.by_diversity)
    for i in range(size[1]):
        for j in range(size[2]):
            odds = {s: x.exp().item() for s, x in subset_logits(embeddings, target, i, j, **settings).items()}
            close(posterior[i, j].tolist(), [odds.get(s, 0.)/sum(odds.values()) for s in subsets])


@settings(max_examples=40, deadline=None)
@given(sizes, options, st.booleans(), seeds)
def test_weight_is_the_share_of_odds_lost_without_the_modality(size, options, holes, seed):
    "Where a row's scale does not depend on what is present."
    objective, embeddings, target, present = make(size, seed, holes, options | {"by_diversity": False})
    weights, null = objective.weights(embeddings, target, present)
    here = torch.ones(size[1], size[0], dtype=torch.bool) if present is None else present
    assert weights.shape == (size[1], size[2], size[0] - 1) and null.shape == (size[1], size[2])
    assert (weights >= 0).all() and (weights <= 1).all() and (null >= 0).all()
    if objective.null == -math.inf: assert (null == 0).all()
    for k, m in enumerate(m for m in range(size[0]) if m != target):
        without = here.clone()
        without[:, m] = False
        rest = without[:, [q for q in range(size[0]) if q != target]].any(1)
        filled = [e if q == target else e.nan_to_num(0.) for q, e in enumerate(embeddings)]
        some = [e if q == target else e[rest] for q, e in enumerate(filled)]
        if rest.any():
            lost = 1 - (objective.score(some, target, without[rest]) - objective.score(some, target, here[rest])).exp()
            close(weights[rest][..., k], lost)
        # the only one there is
        if objective.null == -math.inf: assert (weights[~rest & here[:, m]][..., k] == 1).all()


@settings(max_examples=20, deadline=None)
@given(sizes, options, seeds)
def test_a_candidate_is_judged_alone_and_null_reorders_nothing(size, options, seed):
    objective, embeddings, target, _ = make(size, seed, options=options)
    alone = [e[:1] if m == target else e for m, e in enumerate(embeddings)]
    close(objective.score(alone, target), objective.score(embeddings, target)[:, :1])
    off, on = (SubsetSymile(penalty=objective.penalty, null=null, by_diversity=objective.by_diversity).double()
               for null in (-math.inf, 2.))
    close(on.score(embeddings, target),
          torch.logaddexp(off.score(embeddings, target), torch.tensor(2., dtype=torch.float64)))


@settings(max_examples=40, deadline=None)
@given(sizes, st.booleans(), seeds)
def test_diversity_is_a_scale_of_each_row(size, holes, seed):
    objective, embeddings, target, present = make(size, seed, holes, dict(penalty=0., by_diversity=True))
    filled = [e.detach().nan_to_num(0.) for e in embeddings]
    got = diversity(filled, target, present)
    close(got.tolist(), [float(oracle_diversity(filled, target, i, present)) for i in range(size[1])])
    assert (got >= -1e-9).all() and (got <= 2 + 1e-9).all()
    plain = SubsetSymile(penalty=0.).double()
    scaled, logits = (o._subset_logits(filled, target, present) for o in (objective, plain))
    close(scaled, torch.where(logits.isfinite(), got[:, None] * logits, logits))


def test_equal_queries_have_no_scale_and_two_modalities_no_diversity():
    e = rows(3, 4, 6)
    same = SubsetSymile(penalty=0., by_diversity=True).double().score([e[0], e[1], e[1]], 0)
    close(same, torch.full((4, 4), math.log(3), dtype=torch.float64))
    close(SubsetSymile(by_diversity=True).double().score(e[:2], 0), SubsetSymile().double().score(e[:2], 0))


@pytest.mark.parametrize("M, D, max_subset", [(8, 8192, 2), (8, 8192, None), (15, 64, 2), (3, 1, None)])
@pytest.mark.parametrize("alike", [False, True])
def test_extremes_stay_finite(M, D, max_subset, alike):
    "Many modalities, wide embeddings, a large scale; `alike`: one axis for all: the largest products there are."
    e = [unit(torch.randn(3, D, generator=generator(m))) for m in range(M)]
    if alike: e = [torch.eye(1, D).expand(3, -1).clone() for _ in range(M)]
    objective = SubsetSymile(log_scale=4., max_subset=max_subset)
    loss = objective([x.requires_grad_() for x in e])
    loss.backward()
    assert loss.isfinite() and all(x.grad.isfinite().all() for x in e)
    assert objective.logit_scale.log_scale.grad.isfinite()
    assert all(w.isfinite().all() for w in objective.weights(e, 0))


def test_half_precision_is_scored_in_full():
    e = [x.float() for x in rows(4, 5, 64)]
    objective, half = SubsetSymile(), [x.bfloat16() for x in e]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [objective.score(e, 0), objective(e), *objective.weights(e, 0)]
    outside = [objective.score(e, 0), objective(e), *objective.weights(e, 0)]
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(inside, outside))
    assert torch.equal(objective.score(half, 0), objective.score([x.float() for x in half], 0))


def test_nothing_global_changes_and_nothing_is_drawn():
    state, e = torch.get_rng_state(), rows(3, 5, 6)
    objective = SubsetSymile().double()
    assert objective(e, generator=generator(3)) == objective(e)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options, error, words", [
    (dict(max_subset=0), RangeError, r"max_subset must lie in \[1"), (dict(max_subset=2.), DtypeError, "whole number"),
    (dict(max_subset=True), DtypeError, "max_subset"),
    (dict(penalty=math.nan), RangeError, "penalty"), (dict(penalty=math.inf), RangeError, "penalty"),
    (dict(penalty="1"), DtypeError, "penalty"),
    (dict(null=math.nan), RangeError, "null"), (dict(null=math.inf), RangeError, "null"),
    (dict(log_scale=9.), RangeError, "log_scale")])
def test_bad_options_are_named(options, error, words):
    with pytest.raises(error, match=words): SubsetSymile(**options)


@pytest.mark.parametrize("arguments, error, words", [
    ((1, 0), RangeError, "n_modalities"), ((2.5, 0), DtypeError, "n_modalities"),
    ((3, 3), RangeError, r"target must lie in \[0, 2\]"),
    ((3, "A"), DtypeError, "target"), ((3, 0, -1), RangeError, "max_subset"), ((3, 0, 1.5), DtypeError, "max_subset")])
def test_subsets_of_nothing_are_refused(arguments, error, words):
    with pytest.raises(error, match=words): query_subsets(*arguments)


@pytest.mark.parametrize("call", [lambda o, *a: o.score(*a), lambda o, *a: o.posterior(*a), lambda o,
                                  *a: o.weights(*a)])
def test_bad_calls_are_named(call):
    objective, e = SubsetSymile().double(), rows(3, 5, 6)
    for target, error in ((3, RangeError), (-1, RangeError), ("x", DtypeError), (1., DtypeError), (True, DtypeError)):
        with pytest.raises(error, match="target"): call(objective, e, target)
    with pytest.raises(MissingError, match="no query modality"):
        call(objective, e, 0, torch.zeros(5, 3, dtype=torch.bool))
    with pytest.raises(DtypeError, match="bool"): call(objective, e, 0, torch.ones(5, 3))
    with pytest.raises(ShapeError, match="share one width"): call(objective, [e[0], e[1][:, :3], e[2]], 0)
    with pytest.raises(NonFiniteError, match=r"embeddings\[1\]"): call(objective, [e[0], e[1]*math.nan, e[2]], 0)


def test_bad_batches_are_named():
    objective, e = SubsetSymile().double(), rows(3, 5, 6)
    with pytest.raises(ShapeError, match="at least 2 rows"): objective([x[:1] for x in e])
    with pytest.raises(MissingError, match="fewer than 2"): objective(e, torch.eye(5, 3) > 0)
    with pytest.raises(MissingError, match="nothing can be contrasted"):
        objective(rows(6, 3, 4), torch.eye(3).bool().repeat(1, 2))
