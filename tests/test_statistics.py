"The one bootstrap at its limits and against what it must give; ranks, alarms and the sign test, counted one by one."
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from gated_symile.core import generator
from gated_symile.statistics import _areas, auroc, auroc_interval, bootstrap_interval, sign_test

seeds = st.integers(0, 10**6)
numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=30).map(lambda x: torch.tensor(x, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(seeds, numbers, st.sampled_from(["mean", "median"]), st.floats(0, 1), st.floats(0, 1))
def test_the_bootstrap_at_its_limits(seed, values, statistic, level, other):
    run = lambda x, level: bootstrap_interval(x, statistic, level, 200, seed)
    low, high = run(values, level)
    assert values.min() - 1e-9 <= low <= high + 1e-9 <= values.max() + 2e-9
    assert (low, high) == run(values, level)                                     # the same seed
    wide, narrow = run(values, max(level, other)), run(values, min(level, other))
    assert wide[0] <= narrow[0] + 1e-9 and narrow[1] <= wide[1] + 1e-9           # more certainty, wider
    low, high = run(values, 0.)
    assert low == high                                                           # level 0: a point
    value = values[0].item()
    for constant in (values[:1], values[:1].expand(20)):                         # nothing varies: that value
        assert run(constant, level) == pytest.approx((value, value), abs=1e-9)
    twice = tuple(2*end for end in run(values, level))                           # in another unit, the same
    assert run(2*values, level) == pytest.approx(twice, rel=1e-12, abs=1e-300)


def test_the_bootstrap_of_many_values_is_the_normal_interval():
    values = torch.randn(6000, generator=generator(0), dtype=torch.float64)      # drawn in more than one go
    middle, error = values.mean().item(), values.std().item() / 6000**0.5
    for level, z in ((0.5, 0.674), (0.95, 1.960)):
        expected = pytest.approx((middle - z*error, middle + z*error), abs=0.15*error)
        assert bootstrap_interval(values, level=level, seed=1) == expected


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 60),
       st.sampled_from(["hits", "reciprocal ranks", "differences", "normal"]), st.sampled_from([0.5, 0.95]))
def test_a_mean_over_seeds_is_drawn_by_counts(seed, S, B, kind, level):
    "What the main table is made of: seeds are drawn, and rows within them, as these lines have it. It must not change."
    g = np.random.default_rng(seed)
    draw = {"hits": lambda: (g.random(B) < 0.4).astype(float), "reciprocal ranks": lambda: 1 / g.integers(1, 20, B),
            "differences": lambda: g.integers(-1, 2, B).astype(float), "normal": lambda: g.normal(size=B)}[kind]
    values = [draw() for _ in range(S)]
    rng, means = np.random.default_rng(0), np.empty((2000, S))
    for s, rows in enumerate(values):
        kinds, counts = np.unique(rows, return_counts=True)
        means[:, s] = rng.multinomial(B, counts/B, 2000) @ kinds / B
    drawn = np.take_along_axis(means, rng.integers(S, size=means.shape), 1).mean(1)
    expected = tuple(np.quantile(drawn, [(1 - level)/2, (1 + level)/2]).tolist())
    for several in (values, [torch.tensor(x) for x in values], [x.tolist() for x in values]):
        assert bootstrap_interval(several, level=level) == expected
    if S == 1: assert bootstrap_interval(torch.tensor(values[0]), level=level) == expected


def test_drawn_in_more_than_one_go_it_is_the_same():
    values = np.random.default_rng(1).normal(size=3000)                          # 6 million counts
    whole = np.random.default_rng(0).multinomial(3000, np.full(3000, 1/3000), 2000) @ np.sort(values) / 3000
    expected = tuple(np.quantile(whole, [0.025, 0.975]))
    assert bootstrap_interval(torch.tensor(values)) == pytest.approx(expected, rel=1e-12)


def test_seeds_that_differ_widen_the_interval():
    rows = lambda share: torch.arange(1000) < 1000*share
    width = lambda values: np.subtract(*bootstrap_interval(values)[::-1])
    alike, apart = [rows(0.5)]*8, [rows(share) for share in np.linspace(0.3, 0.7, 8)]
    expected = 2*1.96*np.std(np.linspace(0.3, 0.7, 8))/8**0.5                    # the error of a mean of 8 seeds
    assert width(alike) < 0.035 and width(apart) == pytest.approx(expected, rel=0.15)


# The alarm and the sign test


def pairs(scores, positive):
    "Ordered pairs, counted one by one."
    wins = [(p > n) + 0.5*(p == n) for p, a in zip(scores, positive) if a for n, b in zip(scores, positive) if not b]
    return sum(wins) / len(wins)


scores_drawn = st.one_of(st.integers(-3, 3).map(float), st.floats(allow_nan=False, width=32))


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(scores_drawn, st.booleans()), min_size=2, max_size=40)
       .filter(lambda rows: len({b for _, b in rows}) == 2))
@example(rows=[(math.inf, True), (math.inf, False), (-math.inf, True)])
@example(rows=[(0., True), (-0., False)])
def test_auroc_is_the_share_of_ordered_pairs(rows):
    scores, positive = (list(x) for x in zip(*rows))
    assert auroc(torch.tensor(scores), torch.tensor(positive)) == pytest.approx(pairs(scores, positive), abs=1e-12)


def test_areas_of_many_draws_at_once():
    scores = torch.randint(4, (25,), generator=generator(0)).float()
    positive = torch.rand(25, generator=generator(1)) < 0.3
    draws = torch.randint(25, (30, 25), generator=generator(2)).double()
    draws[3] = (~positive).nonzero()[0].item()                                # nothing positive was drawn
    expected = [pairs(scores[i].tolist(), positive[i].tolist()) if positive[i].any() else 0.5 for i in draws.long()]
    assert _areas(scores, positive)(draws).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_an_alarm_is_a_bootstrap_of_rows():
    bad = torch.rand(150, generator=generator(0)) < 0.3
    suspicion, draws, areas = torch.randn(150, generator=generator(1)) + bad.float(), generator(5), []
    for _ in range(1000):
        at = torch.randint(150, (150,), generator=draws)
        areas.append(auroc(suspicion[at], bad[at]))
    areas.sort()
    assert auroc_interval(suspicion, bad) == (pytest.approx(areas[24], abs=0.02), pytest.approx(areas[974], abs=0.02))


def test_thesign_test_is_the_exact_one():
    def exact(worse, better):
        n, few = worse + better, min(worse, better)
        return min(1., 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)
    for worse, better in [(a, b) for a in range(31) for b in range(31)] + [(450, 551), (500, 500), (100, 900)]:
        assert sign_test(worse, better) == pytest.approx(exact(worse, better), rel=1e-11), (worse, better)
