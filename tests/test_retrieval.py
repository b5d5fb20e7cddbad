"Retrieval against a sort, in any blocks and with exact ties; banks in files; and accuracy and gate by corruption, with the real model."
import math
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from gated_symile.core import DtypeError, MissingError, NonFiniteError, OutputError, RangeError, ShapeError, generator, unit
from gated_symile.data.corruption import Missing, corrupt
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.data.xnor import synthetic_xnor
from gated_symile.encoders import MLP
from gated_symile.fragility import accuracy_by_corruption, gate_by_corruption
from gated_symile.gate.gate import ModalityGate
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.symile import Symile
from gated_symile.retrieval import (Bank, bootstrap_interval, encode_bank, evaluating, load_bank, rank_in_banks, rank_true, retrieve, save_bank,
                                    top_k)
from gated_symile.training import MultimodalModel

seeds = st.integers(0, 10**6)
budgets = st.sampled_from([0, 0.03, 0.06, 0.2, 64])                              # MiB: from 16 x 16 scores at a time to all of them


def score(embeddings, target, present=None):
    "A product of the modalities that are present: whole numbers stay whole."
    query = torch.ones_like(embeddings[0 if target else 1])
    for m, e in enumerate(embeddings):
        if m != target: query = query * (e if present is None else torch.where(present[:, m:m+1], e, 1.))
    return query @ embeddings[target].T


def make(seed, M, B, N, holes):
    "Small whole numbers (exact ties, duplicated candidates), a target, and `present` where there are holes, with NaN in them."
    g = generator(seed)
    target = int(torch.randint(M, (), generator=g))
    embeddings = [torch.randint(-2, 3, (N if m == target else B, 3), generator=g).float() for m in range(M)]
    embeddings[target] = embeddings[target][torch.randint(N, (N,), generator=g)]
    if not holes: return embeddings, target, None
    present = torch.rand(B, M, generator=g) < 0.5
    present[torch.arange(B), torch.tensor([m for m in range(M) if m != target])[torch.randint(M - 1, (B,), generator=g)]] = True
    for m in range(M):
        if m != target: embeddings[m][~present[:, m]] = torch.nan
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
    table = torch.tensor([-math.inf, -1., 0., 1., 2., 3., math.inf])[torch.randint(kinds, (20, N), generator=generator(seed))]    # mostly ties
    look_up = lambda e, t, p: table[e[1][:, 0].long()][:, e[0][:, 0].long()]
    values, found = top_k(look_up, [torch.arange(float(N))[:, None], torch.arange(20.)[:, None]], 0, min(k, N), memory=memory)
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
        assert rank == sum(places) / len(places) and math.isclose(reciprocal, sum(1/r for r in places) / len(places), rel_tol=1e-9)
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
    embeddings = [torch.cat([torch.arange(len(e))[:, None], e], 1).float() for e in embeddings]    # column 0 says which row it is
    if present is not None:
        for e in embeddings: e[:, 0] = torch.arange(len(e))
        present[i, query] = True
        embeddings[query][i, 1:] = 0.
    def spoilt(e, t, p):
        s = score(e, t, p)
        here = torch.ones(len(s), dtype=torch.bool) if p is None else p[:, query]
        return s.masked_fill(((e[query][:, 0] == i) & here)[:, None] & (e[t][:, 0] == j), torch.nan)
    message = rf"NaN for 1 queries, the first: \[{i}\]"
    with pytest.raises(NonFiniteError, match=message): top_k(spoilt, embeddings, target, 1, present, memory)
    with pytest.raises(NonFiniteError, match=message): rank_true(spoilt, embeddings, target, torch.full((B,), N // 2), present, memory)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(1, 150), budgets, st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_upcast_block_by_block(seed, B, N, memory, dtype):
    embeddings, target, present = make(seed, 3, B, N, True)
    embeddings[target] = (embeddings[target] + torch.randn(N, 3, generator=generator(seed))).to(dtype)
    whole = [e.float() for e in embeddings]
    for a, b in zip(top_k(score, embeddings, target, N, present, memory), top_k(score, whole, target, N, present, memory)): assert torch.equal(a, b)
    truth = torch.randint(N, (B,), generator=generator(seed))
    ranks, expected = (rank_true(score, e, target, truth, present, memory) for e in (embeddings, whole))
    assert torch.equal(ranks.above, expected.above) and torch.equal(ranks.tied, expected.tied)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 20), st.integers(1, 200), budgets, st.sampled_from([math.nan, math.inf]), st.booleans(), st.data())
def test_a_hole_in_the_bank_is_named_by_its_row(seed, M, B, N, memory, hole, half, data):
    target, j = seed % M, data.draw(st.integers(0, N - 1))
    embeddings = [unit(torch.rand(N if m == target else B, 4, generator=generator(m))) for m in range(M)]
    embeddings[target][j, data.draw(st.integers(0, 3))] = hole
    if half: embeddings[target] = embeddings[target].half()
    for f in (score, *(objective.score for objective in objectives(M, 4))):      # with checks of its own and without
        with pytest.raises(NonFiniteError, match=rf"embeddings\[{target}\], rows \d+ to \d+, has .* in 1 present rows, the first: \[{j}\]"):
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
        values, found = top_k(objective.score, embeddings, target, N, present, memory)
        torch.testing.assert_close(values, whole.sort(1, descending=True).values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, whole.gather(1, found), atol=1e-4, rtol=1e-4)
        assert (found.sort(1).values == torch.arange(N)).all()                   # each candidate once
        truth = torch.randint(N, (B,), generator=generator(seed))
        rank = (found == truth[:, None]).int().argmax(1)                         # its place in the list
        ranks = rank_true(objective.score, embeddings, target, truth, present, memory)
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
        ranks = rank_true(objective.score, many, target, (order[None] % N == truth[:, None]).int().argmax(1), memory=memory)
        once = rank_true(objective.score, embeddings, target, truth, memory=memory)
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
    assert sum(banks, []) == list(range(B)) and min(map(len, banks)) >= (bank_size or B) and max(map(len, banks)) <= min(map(len, banks)) + 1
    for bank in banks:
        alone = rank_true(score, [e[bank] for e in embeddings], target, None, None if present is None else present[bank])
        assert torch.equal(ranks[bank].above, alone.above) and torch.equal(ranks[bank].tied, alone.tied)
        assert (alone.above + alone.tied < len(bank)).all()


# Intervals

numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=30).map(lambda x: torch.tensor(x, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(seeds, numbers, st.sampled_from(["mean", "median"]), st.floats(0, 1), st.floats(0, 1))
def test_the_bootstrap_at_its_limits(seed, values, statistic, level, other):
    run = lambda x, level: bootstrap_interval(x, statistic, level, 200, generator(seed))
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
    torch.testing.assert_close(torch.tensor(run(2*values + 3, level)), 2*torch.tensor(run(values, level)) + 3, atol=1e-4, rtol=1e-5)


def test_the_bootstrap_of_many_values_is_the_normal_interval():
    values = torch.randn(6000, generator=generator(0), dtype=torch.float64)      # drawn in more than one go
    middle, error = values.mean().item(), values.std().item() / 6000**0.5
    for level, z in ((0.5, 0.674), (0.95, 1.960)):
        assert bootstrap_interval(values, level=level, generator=generator(1)) == pytest.approx((middle - z*error, middle + z*error), abs=0.15*error)


# A real model

NAMES, DIM = ["A", "B", "C"], 12


def model_and_data(seed=0, rows=90, missing=0.):
    "An untrained gated model, its gate made choosy, and XNOR with half of the rows misaligned."
    data = synthetic_xnor(rows, p=0.5, n_bits=4, dim=16, generator=generator(seed))
    if missing: data = corrupt(data, {"B": missing, "C": missing}, Missing(), generator(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gate = ModalityGate(3, DIM, key_dim=8, temperature=0.15)
        model = MultimodalModel({name: MLP(16, DIM, width=16, depth=1, dropout=0.5) for name in NAMES}, GatedSymile(gate))
    return model.train(), data


def by_hand(model, data, target, bank_size):
    "Whole tables of scores and of gate weights `(n, n, M)` (NULL last) of each bank."
    t, count = NAMES.index(target), len(data) // bank_size
    for b in range(count):
        part = data[len(data)*b // count : len(data)*(b + 1) // count]
        with torch.no_grad(), evaluating(model):
            embeddings = model.encode(part)
            weights, null = model.objective.gate.weights(embeddings, t, part.present)
            yield model.score(embeddings, t, part.present), torch.cat([weights, null[..., None]], 2)


def there(data): return torch.stack([data.is_present(name) for name in data.names], 1)


def groups(corrupted):
    yield "all", torch.ones(len(corrupted), dtype=torch.bool)
    yield "clean", ~corrupted.any(1)
    yield "corrupted", corrupted.any(1)
    yield from ((name, corrupted[:, m]) for m, name in enumerate(NAMES))


@pytest.mark.parametrize("missing", [0., 0.2])
def test_accuracy_by_corruption_is_the_mean_of_the_rows(missing):
    model, data = model_and_data(missing=missing)
    data = data[data.present.sum(1) > 1] if missing else data
    with torch.no_grad(): embeddings = model.eval().encode(data)
    ranks = rank_in_banks(model.score, embeddings, 0, 20, data.present)
    table = accuracy_by_corruption(ranks, data.corrupted, NAMES, ks=(1, 5), generator=generator(0))
    hits = {f"top{k}": [sum(r <= k for r in range(a+1, a+t+2)) / (t+1) for a, t in zip(ranks.above.tolist(), ranks.tied.tolist())] for k in (1, 5)}
    expected = {(group, metric): (int(rows.sum()), torch.tensor(hit, dtype=torch.float64)[rows].mean().item())
                for group, rows in groups(data.corrupted) if rows.any() for metric, hit in hits.items()}
    got = {(row.rows, row.metric): (row.n, row.value) for row in table.itertuples() if row.metric in hits}
    assert got.keys() == expected.keys()
    for key, (n, value) in expected.items(): assert got[key] == (n, pytest.approx(value, abs=1e-12))
    assert (table.low <= table.value).all() and (table.value <= table.high).all()
    assert got["clean", "top1"][0] + got["corrupted", "top1"][0] == len(data)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("missing", [0., 0.2])
def test_the_gate_by_corruption_is_read_at_the_top(target, missing):
    model, data = model_and_data(missing=missing)
    t = NAMES.index(target)
    kept = data[there(data)[:, t] & (there(data).sum(1) > 1)]
    read = []
    for s, weights in by_hand(model, kept, target, 20):
        first, second = s.topk(2).values.T
        assert (first - second > 1e-6).all()                                     # it is clear which is first
        read.append(weights[torch.arange(len(s)), s.argmax(1)])
    read = torch.cat(read).double()
    table = gate_by_corruption(model, data, target, bank_size=20, block_size=17, generator=generator(0))
    assert all(module.training for module in model.modules())                    # dropout is off, and on again
    got = {(row.rows, row.modality): (row.n, row.value) for row in table.itertuples()}
    columns = [*(name for name in NAMES if name != target), "NULL"]
    expected = {(group, name): (int(rows.sum()), read[rows, c].mean().item())
                for group, rows in groups(kept.corrupted) if rows.any() for c, name in enumerate(columns)}
    assert got.keys() == expected.keys()
    for key, (n, value) in expected.items(): assert got[key] == (n, pytest.approx(value, abs=1e-4))


@pytest.mark.parametrize("bank_size", [None, 30])
def test_the_gate_does_not_know_which_candidate_is_true(bank_size):
    model, data = model_and_data()
    order = torch.cat([start + torch.randperm(bank_size or 90, generator=generator(3)) for start in range(0, 90, bank_size or 90)])
    other = MultimodalDataset({**data.modalities, "A": data.modalities["A"][order]}, corrupted=data.corrupted)   # the same banks, other truths
    tables = [gate_by_corruption(model, d, "A", bank_size, generator=generator(0)) for d in (data, other)]
    keys = ["rows", "n", "modality"]
    assert tables[0][keys].equals(tables[1][keys])
    torch.testing.assert_close(*(torch.tensor(t[["value", "low", "high"]].to_numpy()) for t in tables), atol=1e-5, rtol=0)
    at_truth = [torch.cat([w.diagonal().T for _, w in by_hand(model, d, "A", bank_size or 90)]) for d in (data, other)]
    bad = data.corrupted[:, 1]                                                   # read at the true one, they would differ
    assert (at_truth[0][bad].mean(0) - at_truth[1][bad].mean(0)).abs().max() > 1e-3
    assert (at_truth[0][bad].mean(0) - torch.tensor(tables[0].query("rows == 'B'").value.to_numpy())).abs().max() > 1e-3


def test_only_a_model_with_a_gate_has_one_to_read():
    model, data = model_and_data(rows=20)
    model.objective = Symile()
    with pytest.raises(MissingError, match="no gate: Symile"): gate_by_corruption(model, data, "A")


def test_retrieve_finds_what_the_scores_say():
    model, data = model_and_data(rows=40, missing=0.2)
    data = MultimodalDataset(data.modalities, ids=[f"row {i}" for i in range(40)])[torch.arange(40)[there(data).sum(1) > 1]]
    table = retrieve(model, data.select(["C", "B"]), data, "A", k=3, block_size=7)
    with torch.no_grad():
        embeddings = model.eval().encode(data)
        scores = model.score(embeddings, 0, data.present)
    values, found = scores.sort(1, descending=True)
    assert table["query"].tolist() == [i for i in data.ids for _ in range(3)] and table["rank"].tolist() == [1, 2, 3]*len(data)
    assert table.candidate.tolist() == [data.ids[j] for row in found[:, :3].tolist() for j in row]
    torch.testing.assert_close(torch.tensor(table.score.to_numpy()).float(), values[:, :3].flatten(), atol=1e-4, rtol=1e-4)


# Banks in files

@pytest.fixture
def filed(tmp_path):
    "A model in training mode, its data, and the path of a bank."
    return *model_and_data(rows=100), tmp_path/"banks"/"A.npy"


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_bank_in_a_file_is_the_one_in_memory(filed, precision):
    model, data, path = filed
    data = MultimodalDataset(data.modalities, ids=[f"row {i}" for i in range(100)])
    saved = save_bank(model, data, "A", path, precision, block_size=7)
    assert saved.ids == data.ids and saved.embeddings.dtype == getattr(torch, precision) and os.listdir(path.parent) == ["A.npy"]
    loaded, inside = load_bank(path, data.ids), encode_bank(model, data, "A", block_size=9)
    assert np.array_equal(np.load(path), saved.embeddings) and torch.equal(loaded.embeddings, saved.embeddings)
    torch.testing.assert_close(loaded.embeddings.float(), inside.embeddings, atol=1e-6 if precision == "float32" else 1e-3, rtol=0)
    with torch.no_grad(), evaluating(model): queries = model.encode(data)[1:]
    found = [top_k(model.score, [e, *queries], 0, 5, memory=0.2) for e in (loaded.embeddings, loaded.embeddings.float().clone())]
    ranks = [rank_true(model.score, [e, *queries], 0, memory=0.2) for e in (loaded.embeddings, loaded.embeddings.float().clone())]
    assert all(map(torch.equal, *found)) and torch.equal(ranks[0].above, ranks[1].above)
    tables = [retrieve(model, data.select(["C", "B"]), bank, "A", k=3, memory=0.2) for bank in (loaded, Bank(loaded.embeddings.float(), data.ids))]
    assert tables[0].equals(tables[1])
    if precision == "float32": assert tables[0].candidate.equals(retrieve(model, data.select(["C", "B"]), data, "A", k=3).candidate)
    assert all(module.training for module in model.modules())                    # dropout was off, and is on again


def test_rows_are_encoded_a_block_at_a_time(filed):
    model, data, path = filed
    seen, encode = [], model.encode_modality
    model.encode_modality = lambda name, x, present: seen.append(len(x)) or encode(name, x, present)
    save_bank(model, data, "A", path, block_size=30)
    encode_bank(model, data, "A", block_size=50)
    assert seen == [30, 30, 30, 10, 50, 50]


class Interrupted:
    "The model, until it has encoded so many blocks; then something else happens."
    def __init__(self, model, blocks, event): self.model, self.left, self.event = model, blocks, event
    def __getattr__(self, name): return getattr(self.model, name)
    def encode_modality(self, *args):
        self.left -= 1
        return self.event() if self.left < 0 else self.model.encode_modality(*args)


def interrupt(): raise KeyboardInterrupt


def test_an_interrupted_bank_is_not_there(filed):
    model, data, path = filed
    with pytest.raises(KeyboardInterrupt): save_bank(Interrupted(model, 2, interrupt), data, "A", path, block_size=30)
    assert os.listdir(path.parent) == []
    old = save_bank(model, data, "A", path)
    before = old.embeddings.clone()
    with pytest.raises(KeyboardInterrupt): save_bank(Interrupted(model, 2, interrupt), data, "A", path, block_size=30)
    assert os.listdir(path.parent) == ["A.npy"] and torch.equal(load_bank(path).embeddings, before)
    save_bank(model, data, "B", path)                                            # a new bank in its place: who has the old one keeps it
    assert torch.equal(old.embeddings, before) and not torch.equal(load_bank(path).embeddings, before)


def test_a_killed_process_leaves_no_half_bank(tmp_path):
    code = f"""if True:
        import os, signal, torch
        from torch import nn
        from gated_symile.retrieval import save_bank
        class Toy(nn.Module):
            blocks = 0
            def encode_modality(self, name, x, present):
                self.blocks += 1
                if self.blocks == 3: os.kill(os.getpid(), signal.SIGKILL)
                return x
        save_bank(Toy(), torch.randn(10_000, 64), "A", {str(tmp_path/"A.npy")!r})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9 and not (tmp_path/"A.npy").exists(), done.stderr
    assert [name.startswith(".A.npy") for name in os.listdir(tmp_path)] == [True]


@contextmanager
def largest_file(size):
    "No file may grow longer than that: what a full disk does to whoever writes."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_and_leaves_nothing(filed):
    model, data, path = filed
    with largest_file(3000), pytest.raises(OutputError, match="A.npy can't be written: File too large"):
        save_bank(model, data, "A", path, block_size=30)
    assert os.listdir(path.parent) == []
    with pytest.raises(OutputError, match="can't be written"): save_bank(model, data, "A", "/dev/null/A.npy")


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_bank_of_any_precision_is_searched(tmp_path, kind):
    "What numpy writes by default, float64, is found like float32; queries in float64 get scores in float64."
    model, data = model_and_data()
    bank = encode_bank(model, data, "A")
    np.save(tmp_path/"bank.npy", bank.embeddings.numpy().astype(kind))
    mapped = load_bank(tmp_path/"bank.npy")
    queries = data.select(["B", "C"])
    expected, found = (retrieve(model, queries, b, "A", k=3) for b in (Bank(mapped.embeddings.float().clone()), mapped))
    assert found.equals(expected)
    e = [x.double() for x in model.embed(data)]
    e[0] = mapped.embeddings
    scores, indices = top_k(Symile().score, e, 0, 3, present=there(data))
    exact = Symile().score([e[0].double(), *e[1:]], 0, there(data)).topk(3).values
    assert scores.dtype == torch.float64 and torch.allclose(scores, exact, rtol=1e-12)
    ranks = rank_true(Symile().score, e, 0)
    assert torch.equal(ranks.above, rank_true(Symile().score, [e[0].double(), *e[1:]], 0).above)
    with pytest.raises(DtypeError, match="share one dtype"): top_k(Symile().score, [e[0], e[1], e[2].float()], 0)


def test_a_bank_is_cast_a_block_at_a_time():
    "The whole of a mapped bank is never in memory: the score sees blocks, in the queries' precision."
    e, seen = [torch.randn(n, 8, generator=generator(n)) for n in (500, 20, 20)], []
    def watched(embeddings, target, present=None):
        seen.append((embeddings[0].dtype, len(embeddings[0])))
        return score(embeddings, target, present)
    exact = top_k(score, e, 0, 5)[1]
    assert torch.equal(top_k(watched, [e[0].double(), *e[1:]], 0, 5, memory=0.03)[1], exact)
    assert {dtype for dtype, _ in seen} == {torch.float32} and max(n for _, n in seen) < 200


@pytest.mark.parametrize("ids", [np.arange(10, 30), pd.Series(range(10, 30)), range(10, 30), tuple(range(10, 30)), {i: None for i in range(10, 30)}.keys()], ids=type)
def test_ids_come_in_many_kinds(ids):
    model, data = model_and_data()
    bank = encode_bank(model, MultimodalDataset(data.modalities)[:20], "A")
    assert Bank(bank.embeddings, ids).ids == list(range(10, 30))
    by_row, by_id = (retrieve(model, data.select(["B", "C"])[:4], b, "A", k=3) for b in (bank, Bank(bank.embeddings, ids)))
    assert (by_row["candidate"] + 10).tolist() == by_id["candidate"].tolist()
    with pytest.raises(ShapeError, match="each of the 20 candidates, got 3"): Bank(bank.embeddings, np.arange(3))


def test_what_a_bank_cannot_be(filed):
    model, data, path = filed
    queries = data.select(["B", "C"])
    save_bank(model, data, "A", path)
    for wrong in (Bank(torch.randn(5, DIM + 1)), Bank(data.modalities["A"])):         # raw rows by mistake
        with pytest.raises(ShapeError, match="share one width D"): retrieve(model, queries, wrong, "A", k=1)
    with pytest.raises(RangeError, match=r"k must lie in \[1, 100\], got 101"): retrieve(model, queries, load_bank(path), "A", k=101)
    with pytest.raises(ShapeError, match="no rows"): top_k(model.score, [torch.empty(0, DIM), *[torch.randn(3, DIM)]*2], 0, 1)
    missing = MultimodalDataset({"A": torch.cat([torch.full((1, 16), math.nan), data.modalities["A"]])})
    with pytest.raises(MissingError, match=r"'A' is missing in 1 rows, the first: \[0\]; leave them out"): save_bank(model, missing, "A", path)
    table = retrieve(model, queries, encode_bank(model, missing, "A"), "A", k=100)
    assert set(table.candidate) == set(range(1, 101))                            # by their own row numbers
    with pytest.raises(MissingError, match="nothing but the target, 'A'"): retrieve(model, data.select("A"), data, "A", k=1)
    model.encode_modality = lambda name, x, present: x * 1e5                     # too large for half precision
    with pytest.raises(NonFiniteError, match="'A' in float16 has .* the first: "): save_bank(model, data, "A", path, "float16")


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="asks Linux for the peak")
@pytest.mark.parametrize("objective, search", [("GatedSymile(ModalityGate(3, 128))", "top_k"), ("Symile()", "rank_true")])
def test_a_search_stays_within_its_memory(objective, search):
    code = f"""if True:
        import torch
        from gated_symile import *
        def kib(what): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
        e = [torch.zeros(100_000, 128, dtype=torch.float16), *(unit(torch.randn(256, 128)) for _ in range(2))]
        for rows in e[0].split(10_000): rows.copy_(unit(torch.randn(len(rows), 128)))
        score, bank = {objective}.score, e[0]
        e[0] = bank[:3000]; {search}(score, e, 0, progress=False, memory=32)
        e[0] = bank; open("/proc/self/clear_refs", "w").write("5")
        before = kib("VmRSS"); {search}(score, e, 0, progress=False, memory=32)
        print((kib("VmHWM") - before) / 1024)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
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
