"Closed forms of fragility against simulation; the audit and the alarm of a gate against what they say, counted by hand."
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import nn

from gated_symile.auditing import _areas, _line, _sign_test, audit, audit_score, auroc, detection, EMBEDDING_KINDS, KINDS, verdict
from gated_symile.contrastive import info_nce
from gated_symile.core import DtypeError, MissingError, NonFiniteError, RangeError, UnknownNameError, fill_missing, generator, unit
from gated_symile.data.corruption import Gaussian, Missing, Swap, apply_corruption, corrupt, corrupt_one
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.data.xnor import synthetic_xnor
from gated_symile.encoders import MLP
from gated_symile.fragility import accuracy_by_corruption, expected_loss, expected_top1, gate_by_corruption, moved_by_corruption
from gated_symile.gate.gate import ModalityGate
from gated_symile.product import mip_scores
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.symile import Symile
from gated_symile.retrieval import bootstrap_interval, rank_in_banks, rank_true
from gated_symile.training import MultimodalModel

NAMES = ["A", "B", "C"]
cosines, sizes = st.floats(-1, 1), st.integers(1, 500)


def signs(n, M, D, seed):
    "Unit embeddings whose target, slot 0, is the product of M-1 queries."
    queries = torch.randn(M-1, n, D, generator=generator(seed)).sign()
    return [q / D**0.5 for q in (queries.prod(0), *queries)]


def drawn(cosine, N, D, rows, seed):
    "Scores `(rows, N)` of random unit candidates, and in column 0 of one that has this cosine with the query, on average."
    g = generator(seed)
    query = unit(torch.randn(rows, 1, D, generator=g, dtype=torch.float64))
    candidates = unit(torch.randn(rows, N, D, generator=g, dtype=torch.float64))
    candidates[:, 0] = cosine * query[:, 0] + (1 - cosine**2)**0.5 * candidates[:, 0]
    return D**0.5 * (query * candidates).sum(-1)


# closed forms


@pytest.mark.parametrize("cosine, N, D", [(0., 10, 64), (0.25, 50, 64), (0.3, 100, 128), (0.5, 20, 32), (-0.2, 5, 64), (1., 30, 16)])
def test_expected_top1_is_what_random_unit_vectors_give(cosine, N, D):
    scores = drawn(cosine, N, D, 2000, 0)
    hits = (scores[:, :1] > scores[:, 1:]).all(1).double()
    expected = expected_top1(cosine, N, D)
    assert hits.mean().item() == pytest.approx(expected, abs=4*(expected*(1 - expected)/2000)**0.5 + 0.005)


@pytest.mark.parametrize("scale", [0.1, 1., 4., 20.])
@pytest.mark.parametrize("cosine, N", [(0., 2), (0., 100), (0.4, 100), (1., 10), (-0.5, 10)])
def test_expected_loss_is_what_random_scores_give(cosine, N, scale):
    z = torch.randn(20_000, N, generator=generator(N), dtype=torch.float64)
    z[:, 0] = cosine*8 + (1 - cosine**2)**0.5 * z[:, 0]
    losses = (scale*z).logsumexp(1) - scale*z[:, 0]
    assert losses.mean().item() == pytest.approx(expected_loss(cosine, N, 64, scale), abs=4*losses.std().item()/20_000**0.5 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(cosine=cosines, higher=cosines, N=sizes, D=st.integers(1, 1000))
def test_expected_top1_is_a_probability_that_rises_with_the_cosine(cosine, higher, N, D):
    low, high = (expected_top1(c, N, D) for c in sorted((cosine, higher)))
    assert 0 <= low <= high + 1e-9 <= 1 + 2e-9
    assert expected_top1(cosine, N + 1, D) <= expected_top1(cosine, N, D) + 1e-12
    assert expected_top1(0., N, D) == pytest.approx(1/N, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(cosine=cosines, N=sizes, D=st.integers(1, 300), scale=st.floats(0, 20), more=st.floats(0, 5))
@example(cosine=1., N=300, D=300, scale=20., more=5.)
def test_expected_loss_of_a_corrupted_row_rises_with_the_scale(cosine, N, D, scale, more):
    loss, later = expected_loss(0., N, D, scale), expected_loss(0., N, D, scale + more)
    assert math.log(N) - 1e-6 <= loss <= later + 1e-6                         # convex, and log N at scale 0
    assert loss <= math.log(N) + scale**2/2 + 1e-6                            # Jensen
    assert expected_loss(cosine, N, D, scale) >= 0.
    assert expected_loss(cosine, N, D, 0.) == pytest.approx(math.log(N), abs=1e-6)


@pytest.mark.parametrize("M", [2, 3, 5])
def test_a_share_of_clean_rows_decides_what_symile_finds(M):
    n, p, D = 1500, 0.2, 256
    rows, g = signs(n, M, D, M), generator(M + 50)
    hit = torch.rand(n, M, generator=g) < p
    hit[:, 0] = False
    strangers = [unit(torch.randn(n, D, generator=g).sign()) for _ in rows]
    mixed = [torch.where(h[:, None], s, e) for h, s, e in zip(hit.T, strangers, rows)]
    tops = rank_true(Symile().score, mixed, 0).top(1)
    clean = (1-p)**(M-1)
    expected = clean*expected_top1(1., n, D) + (1 - clean)*expected_top1(0., n, D)
    assert tops.mean().item() == pytest.approx(expected, abs=4*(expected*(1 - expected)/n)**0.5)
    assert tops[~hit.any(1)].mean().item() == 1 and tops[hit.any(1)].mean().item() < 0.02


@pytest.mark.parametrize("M", [2, 3, 4])
@pytest.mark.parametrize("flip", [0.05, 0.15])
def test_noise_multiplies_over_the_modalities(M, flip):
    n, D, g = 300, 64, generator(9)
    tops = []
    for seed in range(5):
        target, *queries = signs(n, M, D, seed)
        noisy = [torch.where(torch.rand(n, D, generator=g) < flip, -q, q) for q in queries]
        tops.append(rank_true(Symile().score, [target, *noisy], 0).top(1))
    tops, expected = torch.cat(tops), expected_top1((1 - 2*flip)**(M-1), n, D)
    assert tops.mean().item() == pytest.approx(expected, abs=4*tops.std().item()/len(tops)**0.5 + 0.005)


@pytest.mark.parametrize("scale", [0.3, 1., 3.])
def test_the_objective_of_corrupted_rows_loses_what_is_expected(scale):
    n, D, losses = 200, 64, {0.: [], 1.: []}
    for seed in range(10):
        rows = signs(n, 3, D, seed)
        losses[1.].append(info_nce(scale * Symile().score(rows, 0)).item())
        rows[1] = signs(n, 3, D, seed + 100)[1]                               # a stranger's B in every row
        losses[0.].append(info_nce(scale * Symile().score(rows, 0)).item())
    for cosine, found in losses.items():
        found = torch.tensor(found)
        assert found.mean().item() == pytest.approx(expected_loss(cosine, n, D, scale), abs=4*found.std().item()/10**0.5 + 0.02)


@pytest.mark.parametrize("name, value, error", [
    ("cosine", 1.1, RangeError), ("cosine", math.nan, RangeError), ("cosine", "x", DtypeError), ("cosine", torch.tensor(0.5), DtypeError),
    ("n_candidates", 0, RangeError), ("n_candidates", 2.5, DtypeError), ("dim", 0, RangeError)])
def test_impossible_cases_are_named(name, value, error):
    case = dict(cosine=0.5, n_candidates=10, dim=8) | {name: value}
    with pytest.raises(error, match=name): expected_top1(**case)
    with pytest.raises(error, match=name): expected_loss(**case, scale=1.)


@pytest.mark.parametrize("scale", [-1., 101., math.nan])
def test_a_scale_out_of_range_is_named(scale):
    with pytest.raises(RangeError, match="scale"): expected_loss(0.5, 10, 8, scale)


# the audit of a score


def constant(embeddings, target, present=None):
    queries = [e for m, e in enumerate(embeddings) if m != target]
    return torch.zeros(len(queries[0]), len(embeddings[target]))


def by_line(table): return table.set_index(["modality", "kind"])


@pytest.mark.parametrize("M, target, k, bank_size", [(2, 0, 1, None), (3, 1, 5, 30), (4, 3, 2, 50)])
def test_a_constant_score_is_at_chance_and_cannot_be_hurt(M, target, k, bank_size):
    rows = {str(m): e for m, e in enumerate(signs(150, M, 16, 0))}
    table = audit_score(constant, rows, str(target), k, bank_size=bank_size, generator=generator(0))
    measured = table[table.n > 0]
    assert len(table) == 3*(M-1) and len(measured) == (3 if M > 2 else 2)*(M-1)      # of two, one can't be missing
    size = 150 if bank_size is None else 150/(150//bank_size)
    assert measured[["untouched", "value", "chance"]].to_numpy() == pytest.approx(k/size)
    assert (measured[["cost", "low", "high", "worse", "better"]] == 0).all().all()
    assert "nothing to lose" in verdict(table)


@pytest.mark.parametrize("ignored", [1, 2])
def test_a_modality_that_is_not_looked_at_costs_nothing(ignored):
    target, *_ = signs(100, 3, 32, 1)
    rows = {name: target for name in NAMES}
    table = by_line(audit_score(lambda e, t, present=None: e[3 - ignored] @ e[t].T, rows, "A", generator=generator(0)))
    assert (table.loc[NAMES[ignored], ["cost", "low", "high"]] == 0).all().all()
    assert table.cost[NAMES[3 - ignored], "swapped"] == pytest.approx(1.)
    assert table.untouched.eq(1).all()


@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("kind", ["swapped", "noised"])
def test_symile_loses_all_to_one_bad_modality(target, kind):
    rows = dict(zip(NAMES, signs(200, 3, 64, 2)))
    table = by_line(audit_score(Symile().score, rows, NAMES[target], generator=generator(0)))
    for name in NAMES[:target] + NAMES[target+1:]:
        line = table.loc[(name, kind)]
        assert (line.n, line.untouched) == (200, 1) and line.value < 0.04 and line.low > 0.9 and line.worse > 190
    assert verdict(table.reset_index()).count("almost none is found without a good") == 2


def test_the_pairwise_sum_keeps_its_witness():
    shared, (a, *queries) = signs(200, 2, 64, 3)[0], signs(200, 3, 64, 4)
    rows = {name: unit(torch.cat([shared, own], 1)) for name, own in zip(NAMES, (a, *queries))}
    strange = lambda x, at, generator=None: unit(torch.randn(len(at), 128, generator=generator).sign())
    costs = [by_line(audit_score(score, rows, "A", kinds={"strange": strange}, generator=generator(0))).cost["B", "strange"]
             for score in (PairwiseCLIP().score, mip_scores)]
    assert costs[0] < 0.25 and costs[1] > 0.9


@pytest.mark.parametrize("kind", ["swapped", "noised", "missing"])
def test_a_line_is_what_a_corruption_by_hand_gives(kind):
    "With holes, with rows known to be corrupted, in banks."
    data = MultimodalDataset(dict(zip(NAMES, signs(120, 3, 16, 4))))
    data = corrupt(data, {"A": 0.1, "B": 0.3, "C": 0.3}, Missing(), generator(1))
    data = replace(data, corrupted=torch.rand(120, 3, generator=generator(2)) < 0.1)
    table = by_line(audit_score(Symile().score, data, "A", k=3, bank_size=20, generator=generator(5)))
    seed = int(torch.randint(2**31, (), generator=generator(5)))
    here = torch.stack([data.is_present(name) for name in NAMES], 1)
    data = data[here[:, 0] & here[:, 1:].any(1)]
    here = torch.stack([data.is_present(name) for name in NAMES], 1)
    for m in (1, 2):
        counted = [i for i in range(len(data)) if here[i, m] and not data.corrupted[i].any() and (kind != "missing" or here[i, 3 - m])]
        hits = torch.zeros_like(here)
        hits[:, m] = here[:, m] & ~data.corrupted.any(1)
        bad = apply_corruption(data, hits, EMBEDDING_KINDS[kind], torch.Generator().manual_seed(seed))
        tops = []
        for d in (data, bad):
            x, there = [d.modalities[name].clone() for name in NAMES], torch.stack([d.is_present(name) for name in NAMES], 1)
            for i in range(len(data)):                                        # who would have nothing left stays as it was
                if i not in counted: x[m][i], there[i] = data.modalities[NAMES[m]][i], here[i]
            tops.append(rank_in_banks(Symile().score, x, 0, 20, there).top(3)[counted])
        line = table.loc[(NAMES[m], kind)]
        assert (line.n, line.untouched, line.value) == (len(counted), pytest.approx(tops[0].mean().item()), pytest.approx(tops[1].mean().item()))
        assert line.cost == pytest.approx((tops[0] - tops[1]).mean().item()) and line.low <= line.cost <= line.high
        assert (line.worse, line.better) == ((tops[1] < tops[0]).sum().item(), (tops[1] > tops[0]).sum().item())


def test_the_interval_is_of_paired_differences():
    g = generator(0)
    before = (torch.rand(400, generator=g) < 0.5).double()
    after = torch.where(torch.rand(400, generator=g) < 0.1, 0., before)
    line = _line(before, after, torch.full((400,), 0.01), seed=3)
    means, draws = [], generator(7)
    for _ in range(2000): means.append((before - after)[torch.randint(400, (400,), generator=draws)].mean().item())
    means.sort()
    assert (line["low"], line["high"]) == (pytest.approx(means[49], abs=0.006), pytest.approx(means[1949], abs=0.006))
    unpaired = sum((e - x.mean().item())**2 for x in (before, after) for e in bootstrap_interval(x, generator=generator(1)))**0.5
    assert line["high"] - line["low"] < unpaired


def test_what_cannot_be_measured_is_said():
    rows = dict(zip(NAMES, signs(30, 3, 16, 5)))
    def complete(embeddings, target, present=None):
        if present is not None: raise MissingError("present: all three are needed")
        return mip_scores(embeddings, target)
    for score, note in ((mip_scores, "the score takes no `present`"), (complete, "present: all three are needed")):
        table = by_line(audit_score(score, rows, "A", generator=generator(0)))
        assert table.n.to_list() == [30, 30, 0]*2 and table.note["B", "missing"] == note and math.isnan(table.cost["B", "missing"])
        assert by_line(audit_score(score, rows, "A", kinds={"swapped": Swap()}, generator=generator(0))).cost["B", "swapped"] == table.cost["B", "swapped"]
    pair = audit_score(PairwiseCLIP().score, {"A": rows["A"], "B": rows["A"]}, "A", kinds={"missing": Missing()})
    assert "no row has 'B'" in pair.note[0] and verdict(pair).startswith("- `B` could not be judged: no row has 'B'")
    with pytest.raises(MissingError, match="takes no `present`"):
        audit_score(mip_scores, corrupt(MultimodalDataset(rows), {"B": 0.5}, Missing(), generator(0)), "A")


@pytest.mark.parametrize("change, error, match", [
    (dict(target="Z"), UnknownNameError, "'Z'"), (dict(k=0), RangeError, "k"), (dict(k=1.5), DtypeError, "k"), (dict(bank_size=31), RangeError, "bank_size"),
    (dict(bank_size=0), RangeError, "bank_size"), (dict(kinds=Swap()), DtypeError, "kinds"), (dict(kinds={"swapped": Swap}), DtypeError, "kind"),
    (dict(kinds={"swapped": {"B": Swap()}}), UnknownNameError, "'C'"), (dict(embeddings={"A": torch.ones(30, 4)*math.nan, "B": torch.ones(30, 4)}), MissingError, "none of 30"),
    (dict(score=lambda e, t, present=None: e[1] @ e[0].T * math.nan), NonFiniteError, "score is NaN")])
def test_faults_of_an_audit_are_named(change, error, match):
    with pytest.raises(error, match=match): audit_score(**{**dict(score=Symile().score, embeddings=dict(zip(NAMES, signs(30, 3, 16, 6))), target="A"), **change})


def test_an_audit_is_repeatable_and_leaves_no_trace():
    rows, state = dict(zip(NAMES, signs(50, 3, 16, 7))), torch.get_rng_state()
    before = {name: x.clone() for name, x in rows.items()}
    tables = [audit_score(Symile().score, rows, "A", generator=generator(seed)) for seed in (0, 0, 1)]
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])
    assert torch.equal(state, torch.get_rng_state()) and all(torch.equal(before[name], x) for name, x in rows.items())
    one = audit_score(Symile().score, rows, "A", kinds={"noised": EMBEDDING_KINDS["noised"]}, generator=generator(0))
    assert by_line(one).loc[("C", "noised")].equals(by_line(tables[0]).loc[("C", "noised")])       # a line does not depend on the others


# the audit of a model


class Bare(nn.Module):
    "A model that encodes nothing."
    def __init__(self, objective): super().__init__(); self.names, self.objective = NAMES, objective
    def encode_modality(self, name, x, present=None): return fill_missing(x, present)


def model_and_data(rows=90, missing=0.):
    torch.manual_seed(0)
    model = MultimodalModel({name: MLP(128, 16, width=32, dropout=0.5) for name in NAMES}, GatedSymile(ModalityGate(3, 16, 8)))
    data = synthetic_xnor(rows, 0.5, generator=generator(1))
    return model, corrupt(data, dict.fromkeys(NAMES, missing), Missing(), generator(2)) if missing else data


def test_a_model_that_encodes_nothing_is_audited_as_its_score():
    data = corrupt(MultimodalDataset(dict(zip(NAMES, signs(80, 3, 16, 8)))), {"B": 0.2, "C": 0.2}, Missing(), generator(0))
    tables = [audit(Bare(Symile()), data, "A", kinds=KINDS, generator=generator(3)), audit_score(Symile().score, data, "A", kinds=KINDS, generator=generator(3))]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("missing", [0., 0.2])
def test_a_model_is_corrupted_at_its_inputs(missing):
    model, data = model_and_data(missing=missing)
    model.train()
    table = by_line(audit(model, data, "A", k=25, generator=generator(0), block_size=17))
    assert all(module.training for module in model.modules())                 # dropout is off, and on again
    here = torch.stack([data.is_present(name) for name in NAMES], 1)
    data = data[here[:, 0] & here[:, 1:].any(1)]
    clean = ~data.corrupted.any(1)
    seed, model = int(torch.randint(2**31, (), generator=generator(0))), model.eval()
    hits = torch.zeros(len(data), 3, dtype=torch.bool)
    hits[:, 2] = clean
    bad, rows = apply_corruption(data, hits, Gaussian(), torch.Generator().manual_seed(seed)), clean & data.is_present("C")
    with torch.no_grad(): before, after = (rank_in_banks(model.score, model.encode(d), 0, None, d.present).top(25)[rows] for d in (data, bad))
    assert (before != after).any()
    line = table.loc[("C", "noised")]
    assert (line.n, line.untouched, line.value) == (rows.sum(), pytest.approx(before.mean().item()), pytest.approx(after.mean().item()))


def test_rows_known_to_be_corrupted_are_no_evidence():
    model, data = model_and_data()
    everything = replace(data, corrupted=torch.ones(90, 3, dtype=torch.bool))
    table = audit(model, everything, "A", generator=generator(0))
    assert table.n.eq(0).all() and table.note.str.contains("not known to be corrupted").all()


# names that mean something


@pytest.mark.parametrize("name", ["all", "clean", "corrupted"])
def test_a_modality_called_like_a_group_of_rows_is_refused(name):
    ranks, marks = rank_true(Symile().score, signs(9, 3, 16, 0), 0), torch.eye(3, dtype=torch.bool).repeat(3, 1)
    with pytest.raises(UnknownNameError, match=f"modality: '{name}' means something else .* 'all' or 'clean' or 'corrupted'"):
        accuracy_by_corruption(ranks, marks, ["A", name, "C"])
    assert set(accuracy_by_corruption(ranks, None, ["A", name, "C"]).rows) == {"all"}              # where there is one group, nothing can be mistaken
    model = Bare(GatedSymile(ModalityGate(3, 16)))
    model.names = ["A", name, "C"]
    data = MultimodalDataset(dict(zip(model.names, signs(9, 3, 16, 0))), corrupted=marks)
    for table in (gate_by_corruption, moved_by_corruption):
        with pytest.raises(UnknownNameError, match=f"'{name}'"): table(model, data, "A")


def test_a_query_called_null_is_refused():
    model = Bare(GatedSymile(ModalityGate(3, 16, null=True)))
    model.names = ["A", "NULL", "C"]
    data = MultimodalDataset(dict(zip(model.names, signs(9, 3, 16, 0))), corrupted=torch.eye(3, dtype=torch.bool).repeat(3, 1))
    for table in (gate_by_corruption, detection):
        with pytest.raises(UnknownNameError, match="modality: 'NULL' means something else"): table(model, data, "A")
    assert set(gate_by_corruption(model, data, "NULL").modality) == {"A", "C", "NULL"}             # the target has no weight


# the verdict


def test_an_effect_that_is_not_there_is_seldom_claimed():
    "Before and after are independent draws of the same accuracy: nothing happened."
    claimed, g = 0, generator(0)
    for seed in range(200):
        n = (4, 10, 40, 150)[seed % 4]
        before, after = (torch.rand(2, n, generator=g) < 0.6).double()
        line = dict(metric="top1", modality="x", kind="swapped", **_line(before, after, torch.full((n,), 0.01), seed))
        claimed += "no effect" not in verdict(pd.DataFrame([line]))
    assert claimed <= 16


def test_the_sign_test_is_the_exact_one():
    def exact(worse, better): return min(1., 2 * sum(math.comb(worse + better, i) for i in range(min(worse, better) + 1)) / 2**(worse + better))
    for worse, better in [(a, b) for a in range(31) for b in range(31)] + [(450, 551), (500, 500), (100, 900)]:
        assert _sign_test(worse, better) == pytest.approx(exact(worse, better), rel=1e-11), (worse, better)


def test_a_verdict_on_very_many_rows():
    "Counting such a split out in whole numbers would take days."
    line = dict(metric="top1", modality="x", kind="swapped", n=5_000_000, untouched=0.8, value=0.79, cost=0.01, low=0.005, high=0.015, worse=520_000, better=480_000, chance=0.01, note="")
    assert "top-1 falls by 1 points" in verdict(pd.DataFrame([line]))


@pytest.mark.parametrize("n, seen", [(3, False), (5, False), (6, True), (50, True)])
def test_a_total_loss_is_claimed_from_six_rows_on(n, seen):
    rows = {"A": torch.eye(60)[:n], "B": torch.eye(60)[:n], "C": torch.eye(60)[:n]}
    gone = lambda x, at, generator=None: -x[at]
    said = verdict(audit_score(lambda e, t, present=None: e[1] @ e[0].T, rows, "A", kinds={"turned": gone}, generator=generator(0)))
    assert ("With `B` turned, top-1 falls by 100 points" in said) == seen and f"in {n} rows" in said
    assert f"With `C` turned, no effect on top-1 (1.00) could be seen in {n} rows." in said


# the alarm


def pairs(scores, positive):
    "Ordered pairs, counted one by one."
    wins = [(p > n) + 0.5*(p == n) for p, a in zip(scores, positive) if a for n, b in zip(scores, positive) if not b]
    return sum(wins) / len(wins)


values = st.one_of(st.integers(-3, 3).map(float), st.floats(allow_nan=False, width=32))


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(values, st.booleans()), min_size=2, max_size=40).filter(lambda rows: len({b for _, b in rows}) == 2))
@example(rows=[(math.inf, True), (math.inf, False), (-math.inf, True)])
@example(rows=[(0., True), (-0., False)])
def test_auroc_is_the_share_of_ordered_pairs(rows):
    scores, positive = (list(x) for x in zip(*rows))
    assert auroc(torch.tensor(scores), torch.tensor(positive)) == pytest.approx(pairs(scores, positive), abs=1e-12)


def test_areas_of_many_draws_at_once():
    scores, positive = torch.randint(4, (25,), generator=generator(0)).float(), torch.rand(25, generator=generator(1)) < 0.3
    draws = torch.randint(25, (30, 25), generator=generator(2)).double()
    draws[3] = (~positive).nonzero()[0].item()                                # nothing positive was drawn
    expected = [pairs(scores[i].tolist(), positive[i].tolist()) if positive[i].any() else 0.5 for i in draws.long()]
    assert _areas(scores, positive)(draws).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_an_alarm_is_a_bootstrap_of_rows():
    found = alarm(seed=0, shift=1., rows=150)
    suspicion, bad = -found["weights"], found["bad"]
    draws, areas = generator(5), []
    for _ in range(1000):
        at = torch.randint(150, (150,), generator=draws)
        areas.append(auroc(suspicion[at], bad[at]))
    areas.sort()
    line = found["table"].iloc[0]
    assert line.auroc == pytest.approx(pairs(suspicion.tolist(), bad.tolist()))
    assert (line.low, line.high) == (pytest.approx(areas[24], abs=0.02), pytest.approx(areas[974], abs=0.02))


class Reading(nn.Module):
    "An objective whose weight of B is written in B, whatever the candidate."
    def score(self, e, target, present=None): return mip_scores(e, target)
    def weights(self, e, target, present=None):
        w = e[1][:, :1].expand(-1, len(e[target]))
        return torch.stack([w, 1 - w], 2), torch.zeros_like(w)


def alarm(seed, shift, rows):
    bad = torch.rand(rows, generator=generator(seed)) < 0.3
    weights = torch.randn(rows, generator=generator(seed + 1)) - shift*bad
    data = MultimodalDataset({"A": torch.ones(rows, 1), "B": weights[:, None], "C": torch.ones(rows, 1)},
                             corrupted=torch.stack([torch.zeros_like(bad), bad, torch.zeros_like(bad)], 1))
    return dict(bad=bad, weights=weights, table=detection(Bare(Reading()), data, "A", generator=generator(seed)))


@pytest.mark.parametrize("shift, expected", [(0., 0.5), (1., 0.5*(1 + math.erf(0.5))), (50., 1.)])
def test_an_alarm_is_as_good_as_its_weights(shift, expected):
    table = alarm(seed=2, shift=shift, rows=3000)["table"]
    assert table.modality.tolist() == ["B"]                                    # C is never corrupted: nothing to tell apart
    assert table.auroc[0] == pytest.approx(expected, abs=0.04) and table.low[0] <= table.auroc[0] <= table.high[0]


def test_the_alarm_does_not_know_which_candidate_is_true():
    model, data = model_and_data()
    order = torch.randperm(90, generator=generator(3))
    other = replace(data, modalities={**data.modalities, "A": data.modalities["A"][order]})      # the same bank, other truths
    tables = [detection(model, d, "A", generator=generator(0)) for d in (data, other)]
    assert tables[0].equals(tables[1]) or (tables[0].drop(columns="modality") - tables[1].drop(columns="modality")).abs().to_numpy().max() < 1e-3


@pytest.mark.parametrize("missing", [0., 0.25])
def test_the_alarm_is_read_from_the_gate_at_the_top_ranked_candidate(missing):
    model, data = model_and_data(missing=missing)
    table = detection(model, data, "A", generator=generator(0)).set_index("modality")
    here = torch.stack([data.is_present(name) for name in NAMES], 1)
    data, here = (x[here[:, 0] & here[:, 1:].any(1)] for x in (data, here))
    with torch.no_grad():
        embeddings = model.eval().encode(data)
        weights, _ = model.objective.gate.weights(embeddings, 0, data.present)
        best = model.score(embeddings, 0, data.present).argmax(1)
    at = weights[torch.arange(len(data)), best]
    for m in (1, 2):
        rows, line = here[:, m], table.loc[NAMES[m]]
        bad = data.corrupted[rows, m]
        assert (line.corrupted, line.others) == (bad.sum(), (~bad).sum())
        assert line.auroc == pytest.approx(pairs((-at[rows, m-1]).tolist(), bad.tolist()), abs=1e-3)


def test_a_gate_set_by_hand_names_what_was_corrupted():
    "Its fit is the cosine with the candidate, and strangers are no candidates."
    shared, b, c = torch.randn(3, 200, 32, generator=generator(0)).sign()
    rows = {"A": torch.cat([shared, b*c], 1) / 8, "B": torch.cat([shared, b], 1) / 8, "C": torch.cat([shared, c], 1) / 8}
    strange = lambda x, at, generator=None: torch.randn(len(at), 64, generator=generator).sign() / 8
    data = corrupt_one(MultimodalDataset(rows), ["B", "C"], 0.5, strange, generator(1))
    gate = ModalityGate(3, 64, 64, null=True, neutral="ones", temperature=0.15)
    with torch.no_grad():
        for projections in (gate.fit.query, gate.fit.key): projections.copy_(torch.eye(64))
    table = detection(Bare(GatedSymile(gate)), data, "A", generator=generator(0))
    assert table.modality.tolist() == ["B", "C"] and table.auroc.min() > 0.95
    blind = detection(Bare(GatedSymile(ModalityGate(3, 64, fit="matrix"))), data, "A", generator=generator(0))
    assert blind[["auroc", "low", "high"]].eq(0.5).all().all()
