"Retrieval: what is streamed in blocks is what a full sort of all scores gives, ties, holes and odd sizes included."
from fractions import Fraction
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from gated_symile.core import generator, MissingError, NonFiniteError, RangeError, unit
from gated_symile.gate import ModalityGate
from gated_symile.mip import mip_scores
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.symile import Symile
from gated_symile.retrieval import bank_slices, bootstrap_interval, metrics, rank_in_banks, rank_true, Ranks, top_k

OBJECTIVES = dict(clip=PairwiseCLIP(), symile=Symile(), gated=GatedSymile(ModalityGate(3, 8, key_dim=4)))


def masked_mip(embeddings, target, present=None):
    "The product of what is present; exact for whole numbers, so that ties are ties in any order of summation."
    if present is None: return mip_scores(embeddings, target)
    return mip_scores([e if m == target else torch.where(present[:, m, None], e, 1.) for m, e in enumerate(embeddings)], target)


def sorted_candidates(row):
    "Indices of one row of scores, the best first, the lower index first among equals."
    return sorted(range(len(row)), key=lambda j: (-row[j], j))


def places(row, true):
    "All places (from 1) the true candidate takes when the tied ones are ordered in every possible way."
    ordered = sorted(row, reverse=True)
    return [place for place, s in enumerate(ordered, 1) if s == row[true]]


@st.composite
def searches(draw, dtypes=(torch.float32, torch.float64)):
    "Embeddings of few whole numbers (many exact ties), with or without holes: (embeddings, target, present, block_size)."
    M, D, B, N = (draw(st.integers(a, b)) for a, b in ((2, 4), (1, 4), (1, 40), (1, 90)))
    target, g, dtype = draw(st.integers(0, M - 1)), generator(draw(st.integers(0, 10_000))), draw(st.sampled_from(dtypes))
    embeddings = [torch.randint(-1, 2, (N if m == target else B, D), generator=g).to(dtype) for m in range(M)]
    present = None
    if draw(st.booleans()):
        present = torch.rand(B, M, generator=g) < 0.6
        present[torch.arange(B), (target + 1) % M] |= ~present[:, [m for m in range(M) if m != target]].any(1)
        embeddings = [e if m == target else torch.where(present[:, m, None], e, torch.nan) for m, e in enumerate(embeddings)]
    return embeddings, target, present, draw(st.integers(1, 100))


def full(embeddings, target, present):
    "All scores at once, as lists."
    if present is not None: embeddings = [e if m == target else e.nan_to_num(0.) for m, e in enumerate(embeddings)]
    return masked_mip(embeddings, target, present).tolist()


@settings(max_examples=120, deadline=None)
@given(searches(), st.data())
def test_top_k_is_a_full_sort(search, data):
    embeddings, target, present, block_size = search
    N = len(embeddings[target])
    k = data.draw(st.integers(1, N))
    values, indices = top_k(masked_mip, embeddings, target, k, present, block_size)
    assert values.dtype == embeddings[0].dtype and values.shape == indices.shape == (len(embeddings[target - 1]), k)
    for row, v, i in zip(full(embeddings, target, present), values.tolist(), indices.tolist()):
        assert i == sorted_candidates(row)[:k]
        assert v == [row[j] for j in i]


@settings(max_examples=120, deadline=None)
@given(searches(), st.data())
def test_ranks_are_those_of_a_full_sort(search, data):
    embeddings, target, present, block_size = search
    B, N = len(embeddings[target - 1]), len(embeddings[target])
    truth = torch.randint(N, (B,), generator=generator(data.draw(st.integers(0, 1000))))
    k = data.draw(st.integers(1, N))
    ranks = rank_true(masked_mip, embeddings, target, truth, present, block_size)
    for i, row in enumerate(full(embeddings, target, present)):
        possible = places(row, truth[i])
        share = lambda f: float(sum((f(p) for p in possible), Fraction(0)) / len(possible))
        assert ranks.above[i] == possible[0] - 1 and ranks.tied[i] == len(possible) - 1
        assert ranks.top(k)[i].item() == pytest.approx(share(lambda p: Fraction(p <= k)), abs=1e-12)
        assert ranks.rank()[i].item() == share(Fraction)
        assert ranks.reciprocal()[i].item() == pytest.approx(share(lambda p: Fraction(1, p)), rel=1e-9)


def test_expected_hits_are_those_of_ties_broken_in_every_order():
    scores = [2, 5, 2, 7, 2]                                            # candidate 0 has two above, two tied
    ranks = Ranks(torch.tensor([2]), torch.tensor([2]))
    orders = [sorted(range(5), key=lambda j: (-scores[j], order[j])) for order in permutations(range(5))]
    for k in range(1, 6):
        assert ranks.top(k).item() == pytest.approx(sum(o.index(0) < k for o in orders) / len(orders))
    assert ranks.reciprocal().item() == pytest.approx(sum(1/(o.index(0) + 1) for o in orders) / len(orders))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 80), st.integers(1, 300), st.sampled_from([torch.float32, torch.float64]),
       st.sampled_from(["mip", *OBJECTIVES]), st.integers(0, 1000))
def test_equal_candidates_tie_exactly(B, N, block_size, D, dtype, name, seed):
    "Whatever the sizes: a bank of one candidate repeated is all ties, though its scores are no round numbers."
    if name == "gated": D, dtype = 8, torch.float32
    g = generator(seed)
    one = unit(torch.randn(1, D, generator=g, dtype=dtype))
    queries = [unit(torch.randn(B, D, generator=g, dtype=dtype)) for _ in range(2)]
    score = masked_mip if name == "mip" else OBJECTIVES[name].score
    ranks = rank_true(score, [one.repeat(N, 1), *queries], 0, torch.randint(N, (B,), generator=g), None, block_size)
    assert ranks.tied.tolist() == [N - 1]*B and ranks.above.tolist() == [0]*B
    assert ranks.top(1).tolist() == [1/N]*B
    assert top_k(score, [one.repeat(N, 1), *queries], 0, N, None, block_size)[1].tolist() == [list(range(N))]*B


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(50, 90), st.integers(1, 64), st.booleans(), st.sampled_from(list(OBJECTIVES)), st.integers(0, 1000))
def test_streamed_objectives_are_the_unstreamed(B, N, block_size, holes, name, seed):
    g = generator(seed)
    embeddings = [unit(torch.randn(n, 8, generator=g)) for n in (B, N, B)]
    present = torch.rand(B, 3, generator=g) < 0.5 if holes else None
    if holes: present[:, 0] |= ~present[:, 2]; present[:, 1] = True
    with torch.no_grad(): scores = OBJECTIVES[name].score(embeddings, 1, present)
    values, indices = top_k(OBJECTIVES[name].score, embeddings, 1, 5, present, block_size)
    torch.testing.assert_close(values, scores.topk(5).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.gather(1, indices), values, rtol=1e-4, atol=1e-5)
    assert all(len(set(row)) == 5 for row in indices.tolist())
    ranks, mine = rank_true(OBJECTIVES[name].score, embeddings, 1, None, present, block_size), scores.diagonal()[:, None]
    surely, perhaps = ((scores > mine + e).sum(1) for e in (1e-4, -1e-4))  # but for rounding, between the two
    assert ((ranks.above >= surely) & (ranks.above <= perhaps)).all()


@settings(max_examples=60, deadline=None)
@given(searches(), st.data())
def test_the_order_of_queries_and_candidates_does_not_matter(search, data):
    embeddings, target, present, block_size = search
    B, N, g = len(embeddings[target - 1]), len(embeddings[target]), generator(data.draw(st.integers(0, 1000)))
    truth, rows, columns = torch.randint(N, (B,), generator=g), torch.randperm(B, generator=g), torch.randperm(N, generator=g)
    ranks = rank_true(masked_mip, embeddings, target, truth, present, block_size)
    moved = rank_true(masked_mip, [e[columns] if m == target else e[rows] for m, e in enumerate(embeddings)], target,
                      columns.argsort()[truth[rows]], None if present is None else present[rows], block_size)
    assert torch.equal(ranks.above[rows], moved.above) and torch.equal(ranks.tied[rows], moved.tied)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.data())
def test_banks_partition_the_rows_and_are_searched_apart(n, data):
    bank_size, block_size = data.draw(st.integers(1, n)), data.draw(st.integers(1, 50))
    banks = bank_slices(n, bank_size)
    sizes = [b.stop - b.start for b in banks]
    assert [i for b in banks for i in range(n)[b]] == list(range(n)) and min(sizes) >= bank_size and max(sizes) - min(sizes) <= 1
    embeddings = [torch.randint(-1, 2, (n, 3), generator=generator(m)).float() for m in range(3)]
    ranks = rank_in_banks(masked_mip, embeddings, 1, bank_size, None, block_size)
    for b in banks:
        for i, row in zip(range(n)[b], full([e[b] for e in embeddings], 1, None)):
            possible = places(row, i - b.start)
            assert (ranks.above[i], ranks.tied[i]) == (possible[0] - 1, len(possible) - 1)


@pytest.mark.parametrize("B, N, block_size", [(1, 1000, 32), (1000, 1, 32), (300, 500, 64), (17, 1025, 1024)])
def test_no_table_of_scores_is_larger_than_a_block(B, N, block_size):
    seen = set()

    def watched(embeddings, target, present=None):
        seen.add((len(embeddings[1]), len(embeddings[0])))
        return mip_scores(embeddings, target)

    embeddings = [torch.randn(n, 4, generator=generator(n)) for n in (N, B)]
    top_k(watched, embeddings, 0, 1, None, block_size)
    rank_true(watched, embeddings, 0, torch.zeros(B).long(), None, block_size)
    assert len(seen) == 1 and max(seen.pop()) <= block_size


def test_a_score_that_is_no_number_is_an_error_wherever_it_stands():
    embeddings = [torch.randn(n, 4, generator=generator(n)) for n in (100, 50)]

    def spoilt(e, target, present=None):
        scores = mip_scores(e, target)
        return torch.where((e[0] == embeddings[0][97]).all(1) & (e[1] == embeddings[1][33]).all(1)[:, None], torch.nan, scores)

    for search in (lambda: top_k(spoilt, embeddings, 0, 3, None, 16), lambda: rank_true(spoilt, embeddings, 0, torch.zeros(50).long(), None, 16)):
        with pytest.raises(NonFiniteError, match=r"1 queries, the first: \[33\]"): search()


def test_bad_searches_are_named_errors():
    e = [torch.randn(n, 4, generator=generator(n)) for n in (6, 5, 5)]
    present = torch.ones(5, 3, dtype=torch.bool)
    with pytest.raises(RangeError, match="k must lie in"): top_k(masked_mip, e, 0, 7)
    with pytest.raises(RangeError, match="truth"): rank_true(masked_mip, e, 0, torch.full((5,), 6))
    with pytest.raises(RangeError, match="bank_size"): rank_in_banks(masked_mip, [x[:5] for x in e], 0, 6)
    with pytest.raises(NonFiniteError, match=r"embeddings\[2\]"): top_k(masked_mip, [*e[:2], e[2]/0], 0, 1)
    present[3, 1:] = False
    with pytest.raises(MissingError, match=r"no query modality.*\[3\]"): rank_true(masked_mip, e, 0, None, present)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 1000))
def test_intervals_lie_within_the_values_and_grow_with_the_level(hits, level, seed):
    values = torch.tensor(hits).double()
    low, high = bootstrap_interval(values, level=level, resamples=200, generator=generator(seed))
    lower, higher = bootstrap_interval(values, level=1, resamples=200, generator=generator(seed))
    assert values.min() <= lower <= low <= high <= higher <= values.max()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    g = generator(0)
    samples = (torch.rand(300, 100, generator=g) < 0.6).double()
    covered = [low <= 0.6 <= high for low, high in (bootstrap_interval(s, level=0.9, resamples=300, generator=g) for s in samples)]
    assert 0.82 < sum(covered)/len(covered) < 0.96


def test_metrics_of_a_search_that_knows_nothing_are_those_of_chance():
    table = metrics(rank_true(lambda e, t, p: torch.zeros(len(e[1]), len(e[0])), [torch.ones(40, 2)]*2, 0, None, None, 16)).set_index("metric")
    expected = dict(top1=1/40, top5=5/40, top10=10/40, mrr=sum(1/r for r in range(1, 41))/40, median_rank=20.5)
    assert table.value.to_dict() == pytest.approx(expected)
