"Search against a sort, in any blocks and with exact ties; by an objective or any other score; within its memory."
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings, strategies as st

from gated_symile.core import DtypeError, MissingError, NonFiniteError, ShapeError, generator, unit
from gated_symile.gate.gate import ModalityGate
from gated_symile.objectives.base import Objective
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.symile import Symile
from gated_symile.search import rank_in_banks, rank_true, top_k

seeds = st.integers(0, 10**6)
holes = st.sampled_from([math.nan, math.inf, -math.inf])
budgets = st.sampled_from([0, 0.03, 0.06, 0.2, 64])  # MiB: from 16 x 16 scores at a time to all of them


def score(embeddings, target, present=None):
    "A product of the modalities that are present: whole numbers stay whole."
    query = torch.ones_like(embeddings[0 if target else 1])
    for m, e in enumerate(embeddings):
        if m != target: query = query * (e if present is None else torch.where(present[:, m:m+1], e, 1.))
    return query @ embeddings[target].T


def make(seed, M, B, N, holes):
    "Small whole numbers (exact ties, duplicated candidates), a target, and `present` where there are holes, NaN there."
    g = generator(seed)
    target = int(torch.randint(M, (), generator=g))
    embeddings = [torch.randint(-2, 3, (N if m == target else B, 3), generator=g).float() for m in range(M)]
    embeddings[target] = embeddings[target][torch.randint(N, (N,), generator=g)]
    if not holes: return embeddings, target, None
    present = torch.rand(B, M, generator=g) < 0.5
    queries = [m for m in range(M) if m != target]
    present[torch.arange(B), torch.tensor(queries)[torch.randint(M - 1, (B,), generator=g)]] = True
    for m in queries: embeddings[m][~present[:, m]] = torch.nan
    return embeddings, target, present


def scores_loop(embeddings, target, present):
    "All scores, one at a time, in float64."
    queries = [m for m in range(len(embeddings)) if m != target]
    table = []
    for i in range(len(embeddings[queries[0]])):
        here = [embeddings[m][i].tolist() for m in queries if present is None or present[i, m]]
        table.append([math.fsum(math.prod(values) for values in zip(c, *here)) for c in embeddings[target].tolist()])
    return table


def place(row, true):
    "How many others are above the true one, and how many tie, by sorting."
    ordered = sorted(row, reverse=True)
    return ordered.index(row[true]), ordered.count(row[true]) - 1


@settings(max_examples=120, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 40), st.integers(1, 150), st.booleans(), budgets, st.data())
def test_top_k_is_a_sort(seed, M, B, N, holes, memory, data):
    embeddings, target, present = make(seed, M, B, N, holes)
    k = data.draw(st.integers(1, N))
    values, found = top_k(score, embeddings, target, k, present, memory)
    for row, vs, js in zip(scores_loop(embeddings, target, present), values.tolist(), found.tolist(), strict=True):
        expected = sorted(range(N), key=lambda j: (-row[j], j))[:k]
        assert js == expected and vs == [row[j] for j in expected]


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 300), st.integers(1, 40), st.sampled_from([1, 2, 7]), st.sampled_from([0, 0.1]))
def test_infinite_scores_are_ranked_too(seed, N, k, kinds, memory):
    drawn = torch.randint(kinds, (20, N), generator=generator(seed))             # mostly ties
    table = torch.tensor([-math.inf, -1., 0., 1., 2., 3., math.inf])[drawn]
    look_up = lambda e, t, p: table[e[1][:, 0].long()][:, e[0][:, 0].long()]
    numbered = [torch.arange(float(n))[:, None] for n in (N, 20)]
    values, found = top_k(look_up, numbered, 0, min(k, N), memory=memory)
    expected = table.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k]) and torch.equal(found, expected.indices[:, :k])


@settings(max_examples=120, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 40), st.integers(1, 150), st.booleans(), st.booleans(), budgets)
def test_ranks_are_those_of_a_sort(seed, M, B, N, holes, aligned, memory):
    embeddings, target, present = make(seed, M, B, max(N, B) if aligned else N, holes)
    N = len(embeddings[target])
    if aligned and present is not None: present[:, target] = True
    truth = None if aligned else torch.randint(N, (B,), generator=generator(seed))
    ranks = rank_true(score, embeddings, target, truth, present, memory)
    table = scores_loop(embeddings, target, present)
    expected = [place(row, i if aligned else int(truth[i])) for i, row in enumerate(table)]
    assert list(zip(ranks.above.tolist(), ranks.tied.tolist())) == expected
    for (above, tied), rank, reciprocal in zip(expected, ranks.rank().tolist(), ranks.reciprocal().tolist()):
        places = range(above + 1, above + tied + 2)                              # the true one takes each equally often
        assert rank == sum(places) / len(places)
        assert math.isclose(reciprocal, sum(1/r for r in places) / len(places), rel_tol=1e-9)
    for k in {1, 2, (N + 1) // 2, N}:
        hits = [sum(r <= k for r in range(a + 1, a + t + 2)) / (t + 1) for a, t in expected]
        torch.testing.assert_close(ranks.top(k), torch.tensor(hits, dtype=torch.float64), atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 60), budgets, st.sampled_from([0., 0.1, -math.inf, math.inf]))
def test_a_constant_score_knows_nothing(seed, N, memory, value):
    rows = [torch.randn(N, 2, generator=generator(seed)) for _ in range(2)]
    constant = lambda e, t, p: torch.full((len(e[1 - t]), len(e[t])), value)
    ranks = rank_true(constant, rows, 0, torch.randint(N, (N,), generator=generator(seed)), memory=memory)
    for k in range(1, N + 1): assert torch.equal(ranks.top(k), torch.full((N,), k, dtype=torch.float64) / N)
    assert (ranks.rank() == (N + 1) / 2).all()
    assert top_k(constant, rows, 0, N, memory=memory)[1].tolist() == [list(range(N))]*N


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 40), st.booleans(), budgets, st.data())
def test_a_nan_score_is_never_a_rank(seed, B, N, holes, memory, data):
    embeddings, target, present = make(seed, 3, B, N, holes)
    i, j = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, N - 1))
    query = 1 if target == 0 else 0
    embeddings = [torch.cat([torch.arange(len(e))[:, None], e], 1).float() for e in embeddings]  # column 0: which row
    if present is not None:
        for e in embeddings: e[:, 0] = torch.arange(len(e))
        present[i, query] = True
        embeddings[query][i, 1:] = 0.
    def spoilt(e, t, p):
        s = score(e, t, p)
        here = torch.ones(len(s), dtype=torch.bool) if p is None else p[:, query]
        return s.masked_fill(((e[query][:, 0] == i) & here)[:, None] & (e[t][:, 0] == j), torch.nan)
    message = rf"NaN for 1 queries, the first: \[{i}\]"
    truth = torch.full((B,), N // 2)
    with pytest.raises(NonFiniteError, match=message): top_k(spoilt, embeddings, target, 1, present, memory)
    with pytest.raises(NonFiniteError, match=message): rank_true(spoilt, embeddings, target, truth, present, memory)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(1, 150), budgets, st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_upcast_block_by_block(seed, B, N, memory, dtype):
    embeddings, target, present = make(seed, 3, B, N, True)
    embeddings[target] = (embeddings[target] + torch.randn(N, 3, generator=generator(seed))).to(dtype)
    whole = [e.float() for e in embeddings]
    found, same = (top_k(score, e, target, N, present, memory) for e in (embeddings, whole))
    assert all(map(torch.equal, found, same))
    truth = torch.randint(N, (B,), generator=generator(seed))
    ranks, expected = (rank_true(score, e, target, truth, present, memory) for e in (embeddings, whole))
    assert torch.equal(ranks.above, expected.above) and torch.equal(ranks.tied, expected.tied)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 20), st.integers(1, 200), budgets, holes, st.booleans(), st.data())
def test_a_hole_in_the_bank_is_named_by_its_row(seed, M, B, N, memory, hole, half, data):
    target, j = seed % M, data.draw(st.integers(0, N - 1))
    embeddings = [unit(torch.rand(N if m == target else B, 4, generator=generator(m))) for m in range(M)]
    embeddings[target][j, data.draw(st.integers(0, 3))] = hole
    if half: embeddings[target] = embeddings[target].half()
    made = objectives(M, 4)
    for f in (score, *made, *(objective.score for objective in made)):           # with checks of its own and without
        message = rf"embeddings\[{target}\], rows \d+ to \d+, has .* in 1 present rows, the first: \[{j}\]"
        with pytest.raises(NonFiniteError, match=message):
            top_k(f, embeddings, target, 1, memory=memory)


def test_a_large_bank_is_searched_group_by_group():
    queries, bank = (torch.randint(-2, 3, (n, 8), generator=generator(n)).float() for n in (40, 20_001))
    expected = (queries @ bank.T).sort(dim=1, descending=True, stable=True)      # whole numbers, hundreds of each
    for k, memory in ((1, 1), (10, 0.3), (100, 64), (1000, 0.3), (20_001, 1)):
        values, found = top_k(score, [bank, queries], 0, k, memory=memory)
        assert torch.equal(values, expected.values[:, :k]) and torch.equal(found, expected.indices[:, :k])


# The objectives' own scores

def objectives(M, D): return [PairwiseCLIP(), Symile(), GatedSymile(ModalityGate(M, D, key_dim=4, temperature=0.2))]


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 25), st.integers(1, 40), budgets, st.booleans())
def test_streamed_is_unstreamed(seed, M, B, N, memory, holes):
    _, target, present = make(seed, M, B, N, holes)
    embeddings = [unit(torch.randn(N if m == target else B, 8, generator=generator(seed + m))) for m in range(M)]
    for objective in objectives(M, 8):
        with torch.no_grad(): whole = objective.score(embeddings, target, present)
        values, found = top_k(objective, embeddings, target, N, present, memory)
        same = top_k(objective.score, embeddings, target, N, present, memory)
        assert torch.equal(values, same[0]) and torch.equal(found, same[1])
        torch.testing.assert_close(values, whole.sort(1, descending=True).values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, whole.gather(1, found), atol=1e-4, rtol=1e-4)
        assert (found.sort(1).values == torch.arange(N)).all()                   # each candidate once
        truth = torch.randint(N, (B,), generator=generator(seed))
        rank = (found == truth[:, None]).int().argmax(1)                         # its place in the list
        ranks = rank_true(objective, embeddings, target, truth, present, memory)
        assert ((ranks.above <= rank) & (rank <= ranks.above + ranks.tied)).all()


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), budgets)
def test_duplicates_tie_exactly(seed, B, N, copies, memory):
    target, D, truth = seed % 3, 128, torch.randint(N, (B,), generator=generator(seed))
    embeddings = [unit(torch.randn(N if m == target else B, D, generator=generator(seed + m))) for m in range(3)]
    many = [e.repeat(copies, 1) if m == target else e for m, e in enumerate(embeddings)]
    order = torch.randperm(N*copies, generator=generator(seed))                  # wherever in the bank they stand
    many[target] = many[target][order]
    for objective in objectives(3, D):
        ranks = rank_true(objective, many, target, (order[None] % N == truth[:, None]).int().argmax(1), memory=memory)
        once = rank_true(objective, embeddings, target, truth, memory=memory)
        assert (ranks.above % copies == 0).all() and (ranks.tied % copies == copies - 1).all()
        torch.testing.assert_close(ranks.above / copies, once.above.float(), atol=1., rtol=0)      # but for rounding


# Banks

@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 60), st.booleans(), budgets, st.data())
def test_banks_are_searches_of_their_own(seed, M, B, holes, memory, data):
    embeddings, target, present = make(seed, M, B, B, holes)
    if present is not None: present[:, target] = True
    bank_size = data.draw(st.one_of(st.none(), st.integers(1, B)))
    ranks = rank_in_banks(score, embeddings, target, bank_size, present, memory)
    count = B // (bank_size or B)
    banks = [[i for i in range(B) if i >= B*b // count and i < B*(b + 1) // count] for b in range(count)]
    sizes = [len(bank) for bank in banks]
    assert sum(banks, []) == list(range(B)) and min(sizes) >= (bank_size or B) and max(sizes) <= min(sizes) + 1
    for bank in banks:
        here = None if present is None else present[bank]
        alone = rank_true(score, [e[bank] for e in embeddings], target, None, here)
        assert torch.equal(ranks[bank].above, alone.above) and torch.equal(ranks[bank].tied, alone.tied)
        assert (alone.above + alone.tied < len(bank)).all()


# What an objective is spared


class Watched(Objective):
    "Counts how often it is checked, and what for."
    def __init__(self, error=None): super().__init__(); self.checks, self.blocks, self.error = [], [], error
    def check(self, embeddings):
        self.checks.append([(len(e), e.dtype) for e in embeddings])
        if self.error: raise self.error
    def _score(self, e, target, present):
        self.blocks.append((len(e[0]), e[0].dtype, torch.is_autocast_enabled("cpu")))
        return score(e, target, present)


def test_an_objective_is_checked_once_and_scored_in_full_precision():
    e = [torch.randn(n, 8, generator=generator(n)) for n in (500, 20, 20)]
    watched = Watched()
    half = [e[0].bfloat16(), *(x.bfloat16() for x in e[1:])]
    with torch.autocast("cpu", torch.bfloat16): found = top_k(watched, half, 0, 5, memory=0.03)
    assert watched.checks == [[(1, torch.float32)]*3] and len(watched.blocks) > 3
    assert {(dtype, low) for _, dtype, low in watched.blocks} == {(torch.float32, False)}
    for a, b in zip(found, top_k(score, half, 0, 5)): assert torch.equal(a, b)
    with pytest.raises(ShapeError, match="not for these"): rank_true(Watched(ShapeError("not for these")), e, 0)


def three(first=12, second=2, third=2, value=1.): return [torch.full((n, 4), value) for n in (first, second, third)]


def with_one(m, x): return [x if i == m else e for i, e in enumerate(three())]


@pytest.mark.parametrize("search", [top_k, rank_true])
@pytest.mark.parametrize("change, error, match", [
    (dict(embeddings=three(third=3)), ShapeError, "one number of rows"),
    (dict(embeddings=with_one(0, torch.ones(12, 3))), ShapeError, "share one width"),
    (dict(embeddings=with_one(2, torch.ones(2, 4).double())), DtypeError, "share one dtype"),
    (dict(embeddings=with_one(0, torch.ones(12, 4).long())), DtypeError, "floating type"),
    (dict(embeddings=with_one(1, torch.full((2, 4), math.nan))), NonFiniteError, r"embeddings\[1\]"),
    (dict(embeddings=with_one(0, torch.full((12, 4), -math.inf))), NonFiniteError, r"embeddings\[0\], rows 0 to 11"),
    (dict(present=torch.tensor([[True, True, True], [True, False, False]])), MissingError, "no query modality"),
    (dict(present=torch.ones(2, 2, dtype=torch.bool)), ShapeError, r"\(2, 3\)")])
def test_faults_are_named_for_an_objective_as_for_any_score(search, change, error, match):
    for f in (Symile(), Symile().score, Watched()):
        with pytest.raises(error, match=match): search(**{**dict(score=f, embeddings=three(), target=0), **change})


def test_a_bank_is_cast_a_block_at_a_time():
    "The whole of a mapped bank is never in memory: the score sees blocks, in the queries' precision."
    e, seen = [torch.randn(n, 8, generator=generator(n)) for n in (500, 20, 20)], []
    def watched(embeddings, target, present=None):
        seen.append((embeddings[0].dtype, len(embeddings[0])))
        return score(embeddings, target, present)
    exact = top_k(score, e, 0, 5)[1]
    assert torch.equal(top_k(watched, [e[0].double(), *e[1:]], 0, 5, memory=0.03)[1], exact)
    assert {dtype for dtype, _ in seen} == {torch.float32} and max(n for _, n in seen) < 200


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="asks Linux for the peak")
@pytest.mark.parametrize("objective, search", [
    ("GatedSymile(ModalityGate(3, 128))", "top_k"), ("Symile()", "rank_true")])
def test_a_search_stays_within_its_memory(objective, search):
    code = f"""if True:
        import torch
        from gated_symile.core import unit
        from gated_symile.gate.gate import ModalityGate
        from gated_symile.objectives.gated import GatedSymile
        from gated_symile.objectives.symile import Symile
        from gated_symile.search import rank_true, top_k
        def kib(what): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
        e = [torch.zeros(100_000, 128, dtype=torch.float16), *(unit(torch.randn(256, 128)) for _ in range(2))]
        for rows in e[0].split(10_000): rows.copy_(unit(torch.randn(len(rows), 128)))
        score, bank = {objective}, e[0]
        e[0] = bank[:3000]; {search}(score, e, 0, progress=False, memory=32)
        e[0] = bank; open("/proc/self/clear_refs", "w").write("5")
        before = kib("VmRSS"); {search}(score, e, 0, progress=False, memory=32)
        print((kib("VmHWM") - before) / 1024)"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 36, "MiB; the bank in full precision has 49, the whole table 98"


def test_only_long_searches_show_a_bar(capsys):
    bank, queries = torch.randn(160, 4, generator=generator(0)), torch.randn(3, 4, generator=generator(1))
    top_k(score, [bank, queries], 0, memory=0)
    assert capsys.readouterr().err == ""
    def slow(e, t, p): time.sleep(0.3); return score(e, t, p)
    top_k(slow, [bank, queries], 0, memory=0)
    assert "search:" in capsys.readouterr().err
    top_k(slow, [bank, queries], 0, memory=0, progress=False)
    assert capsys.readouterr().err == ""
