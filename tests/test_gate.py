"The gate: its fast form is its definition, values and gradients, for every switch, any M, and with holes."
import copy
import math
import os
import shutil

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from gated_symile.core import DtypeError, RangeError, generator, unit
import gated_symile.gate.factorised as factorised
import gated_symile.objectives.gated
from gated_symile.gate.gate import AUTHORS, authors_temperature, ModalityGate
from gated_symile.product import dvs
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.symile import Symile
from oracles import gated_score

switches = st.fixed_dictionaries(dict(
    weighting=st.sampled_from(["softmax", "sigmoid"]), null=st.booleans(), renormalise=st.booleans(),
    neutral=st.sampled_from(["learned", "random", "ones", "none"]),
    fit=st.sampled_from(["attention", "matrix", "open"]),
    strength=st.sampled_from([-3., 0., 3.]), temperature=st.sampled_from([0.1, 0.3, 0.7, 2.]),
    learn_strength=st.booleans(), learn_temperature=st.booleans()))
sizes = st.tuples(st.integers(2, 5), st.integers(1, 6), st.integers(1, 7), st.integers(2, 9), st.integers(1, 6))


def make(size, options, dtype=torch.float64, holes=False, seed=0):
    "A gate with random parameters, embeddings of B queries and N candidates, and `present` where there are holes."
    M, B, N, D, K = size
    g = generator(seed)
    gate = ModalityGate(M, D, K, **options).to(dtype)
    with torch.no_grad():
        for p in gate.parameters():
            if p.dim() and p.requires_grad: p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    target = int(torch.randint(M, (), generator=g))
    embeddings = [unit(torch.randn(N if m == target else B, D, generator=g, dtype=torch.float64)).to(dtype)
                  for m in range(M)]
    present = None
    if holes:
        present = torch.rand(B, M, generator=g) < 0.6
        present[torch.arange(B),
                torch.tensor([m for m in range(M) if m != target])[torch.randint(M - 1, (B,), generator=g)]] = True
        for m in range(M):
            if m != target: embeddings[m][~present[:, m]] = math.nan
    return gate, [e.requires_grad_() for e in embeddings], target, present


def written_out(gate, embeddings, target, present):
    "The score from the written-out definition."
    product = gate.gated(embeddings, target, present).prod(2)                     # (B, N, D)
    return dvs(gate.n_modalities, gate.dim) * torch.einsum("jd,ijd->ij", embeddings[target], product)


def shortest(gate, embeddings, target, present):
    "The smallest length of a gated embedding before it is renormalised: near zero, rounding decides where it points."
    renormalise, gate.renormalise = gate.renormalise, False
    length = gate.gated(embeddings, target, present).norm(dim=-1).min()
    gate.renormalise = renormalise
    return length


def gradients(score, gate, embeddings):
    "Gradient of a fixed random functional of the score, one long vector: embeddings first, then every parameter."
    leaves = [*embeddings, *(p for p in gate.parameters() if p.requires_grad)]
    readout = torch.randn(score.shape, generator=generator(9), dtype=torch.float64).to(score)
    found = torch.autograd.grad((score * readout).sum(), leaves, allow_unused=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for x, g in zip(leaves, found)])


def assert_same(got, expected, tolerance):
    "Equal relative to the largest value."
    assert got.isfinite().all() and expected.isfinite().all()
    size = expected.abs().max().item() if expected.numel() else 0.
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * max(size, 1e-3))


@settings(max_examples=150, deadline=None)
@given(sizes, switches, st.booleans(), st.integers(0, 2**16))
def test_fast_form_is_the_definition_float64(size, options, holes, seed):
    gate, embeddings, target, present = make(size, options, holes=holes, seed=seed)
    assume(gate.neutral.kind == "none" or shortest(gate, embeddings, target, present) > 0.1)
    fast, slow = gate.scores(embeddings, target, present), written_out(gate, embeddings, target, present)
    assert_same(fast, slow, 1e-10)
    assert_same(gradients(fast, gate, embeddings), gradients(slow, gate, embeddings), 1e-10)


@settings(max_examples=60, deadline=None)
@given(sizes, switches, st.booleans(), st.integers(0, 2**16))
def test_fast_form_is_the_definition_float32(size, options, holes, seed):
    M, B, N, D, K = size
    gate, embeddings, target, present = make((M, B, N, D + 14, K + 7), options, torch.float32, holes, seed)
    fast, slow = gate.scores(embeddings, target, present), written_out(gate, embeddings, target, present)
    assert_same(fast, slow, 1e-5)
    assert_same(gradients(fast, gate, embeddings), gradients(slow, gate, embeddings), 1e-5)


@settings(max_examples=60, deadline=None)
@given(sizes, switches, st.booleans(), st.integers(0, 2**16))
def test_definition_is_the_loop_over_pairs(size, options, holes, seed):
    gate, embeddings, target, present = make(size, options, holes=holes, seed=seed)
    with torch.no_grad():
        loop = torch.stack([torch.stack([gated_score(gate, embeddings, target, i, j, present) for j in range(size[2])])
                            for i in range(size[1])])
        assert_same(written_out(gate, embeddings, target, present), loop, 1e-10)


@settings(max_examples=40, deadline=None)
@given(sizes, switches, st.integers(0, 2**16))
def test_missing_content_reaches_nothing(size, options, seed):
    gate, embeddings, target, present = make(size, options, holes=True, seed=seed)
    other = [torch.where(e.isnan(), 1e6, e).detach().requires_grad_() for e in embeddings]
    a, b = gate.scores(embeddings, target, present), gate.scores(other, target, present)
    assert torch.equal(a, b)
    found = gradients(a, gate, embeddings)
    assert torch.equal(found, gradients(b, gate, other)) and found.isfinite().all()
    for m, (e, g) in enumerate(zip(embeddings,
                                   found.split([e.numel() for e in embeddings]
                                               + [len(found) - sum(e.numel() for e in embeddings)]))):
        if m != target: assert g.view_as(e)[~present[:, m]].abs().sum() == 0


@settings(max_examples=40, deadline=None)
@given(sizes, switches, st.booleans(), st.integers(0, 2**16))
def test_open_gate_is_symile(size, options, holes, seed):
    gate, embeddings, target, _ = make(size, options | dict(fit="open"), seed=seed)
    assert_same(gate.scores(embeddings, target), Symile().score(embeddings, target), 1e-10)


@settings(max_examples=40, deadline=None)
@given(sizes, switches, st.booleans(), st.integers(0, 2**16))
def test_order_of_modalities_does_not_matter(size, options, holes, seed):
    gate, embeddings, target, present = make(size, options, holes=holes, seed=seed)
    order = torch.randperm(size[0], generator=generator(seed))
    turned = ModalityGate(size[0], size[3], size[4], **options).double()
    by_modality = "neutral.directions", "fit.null_bias", "fit.query", "fit.key"
    state = {k: v[order] if k in by_modality else v for k, v in gate.state_dict().items()}
    if "fit.table" in state: state["fit.table"] = state["fit.table"][order][:, order]
    turned.load_state_dict(state)
    got = turned.scores([embeddings[m] for m in order], order.tolist().index(target),
                        None if present is None else present[:, order])
    assert_same(got, gate.scores(embeddings, target, present), 1e-10)


@settings(max_examples=40, deadline=None)
@given(sizes, switches, st.booleans(), st.integers(0, 2**16))
def test_weights_are_shares_of_trust(size, options, holes, seed):
    gate, embeddings, target, present = make(size, options, holes=holes, seed=seed)
    weights, null = gate.weights(embeddings, target, present)
    assert weights.shape == (size[1], size[2], size[0] - 1) and null.shape == (size[1], size[2])
    assert (weights >= 0).all() and (weights <= 1).all() and (null >= 0).all()
    if options["weighting"] == "softmax": torch.testing.assert_close(weights.sum(-1) + null, torch.ones_like(null))
    if not options["null"]: assert null.abs().sum() == 0
    if holes:
        columns = present[:, [m for m in range(size[0]) if m != target]]
        assert (weights[~columns.unsqueeze(1).expand_as(weights)] == 0).all()


@settings(max_examples=20, deadline=None)
@given(sizes, switches, st.integers(0, 2**16))
def test_a_candidate_is_judged_alone(size, options, seed):
    "The gate must not see which candidate is the true one: removing the others changes nothing."
    gate, embeddings, target, _ = make(size, options, seed=seed)
    alone = [e[:1] if m == target else e for m, e in enumerate(embeddings)]
    assert_same(gate.scores(alone, target), gate.scores(embeddings, target)[:, :1], 1e-10)


@settings(max_examples=60, deadline=None)
@given(sizes, switches, st.booleans(), st.integers(1, 40), st.integers(0, 2**16))
def test_blocks_pieces_and_forms_agree(size, options, holes, few, seed):
    "However the work is cut, whichever form does it, and however it is differentiated."
    gate, embeddings, target, present = make(size, options, holes=holes, seed=seed)
    assume(gate.neutral.kind == "none" or shortest(gate, embeddings, target, present) > 0.1)
    expected = gate.scores(embeddings, target, present)
    slopes = gradients(expected, gate, embeddings)
    def check():
        got = gate.scores(embeddings, target, present)
        assert_same(got, expected, 1e-10)
        assert_same(gradients(got, gate, embeddings), slopes, 1e-10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)                    # what a compiler gets to see
        check()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factorised, "BLOCK", few)
        check()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factorised, "MANY", 2)                                                # the definition
        check()
        # in pieces, under a checkpoint
        patch.setattr(factorised, "PIECE", 16 * few)
        check()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(2, 7), switches, st.booleans(), st.integers(0, 2**16))
def test_all_targets_together_one_by_one_and_alone_agree(M, B, options, holes, seed):
    gate, embeddings, _, _ = make((M, B, B, 6, 4), options, seed=seed)
    present = None
    if holes:
        present = torch.rand(B, M, generator=generator(seed)) < 0.7
        present |= present.sum(1, keepdim=True) < 2
        embeddings = [torch.where(present[:, m, None], e, math.nan).detach().requires_grad_()
                      for m, e in enumerate(embeddings)]
    objective = GatedSymile(gate, log_scale=0.5).double()
    losses = [objective(embeddings, present)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_symile.objectives.gated, "TOGETHER", 0)
        losses.append(objective(embeddings, present))
    valid = [slice(None) if present is None else present[:, t] for t in range(M)]
    alone, targets = [], [t for t in range(M) if present is None or present[:, t].sum() > 1]
    for t in targets:
        rows = [e[valid[t]] for e in embeddings]
        scores = gate.scores(rows, t, None if present is None else present[valid[t]])
        alone.append(torch.nn.functional.cross_entropy(objective.logit_scale() * scores, torch.arange(len(scores))))
    losses.append(sum(alone) / len(alone))
    found = [gradients(loss, objective, embeddings) for loss in losses]
    for loss, gradient in zip(losses[1:], found[1:]):
        assert_same(loss, losses[0], 1e-9)
        assert_same(gradient, found[0], 1e-7)


def bare(M=3, B=6, D=8, holes=False, **options):
    "An objective, embeddings of a batch, and `present` where there are holes."
    torch.manual_seed(0)
    e = [unit(torch.randn(B, D, generator=generator(m))).requires_grad_() for m in range(M)]
    present = torch.rand(B, M, generator=generator(5)) > 0.3
    present[present[:, 1:].sum(1) == 0] = True
    present[present.sum(1) < 2] = True
    return GatedSymile(ModalityGate(M, D, **{"key_dim": 5, **options})), e, present if holes else None


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("holes", [False, True])
def test_compiled_to_machine_code(holes, two_threads):
    "Large enough for two threads, whose scattered additions make the compiler of PyTorch 2.13 write beyond its memory."
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler: torch.compile has nothing to compile with")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("PyTorch 2.13 writes C++ that doesn't compile where there are no vector instructions")
    torch._dynamo.reset()
    objective, e, present = bare(B=64, D=128, holes=holes, key_dim=128)
    compiled = torch.compile(objective, fullgraph=True)
    for _ in range(5):
        fast, slow = compiled(e, present), objective(e, present)
        assert_same(fast, slow, 1e-5)
        assert_same(gradients(fast, objective, e), gradients(slow, objective, e), 1e-4)


@pytest.mark.parametrize("options", [{}, dict(null=True, weighting="sigmoid"), dict(fit="matrix", neutral="none")],
                         ids=str)
@pytest.mark.parametrize("holes", [False, True])
def test_functional_gradients_target_by_target(options, holes, monkeypatch):
    "`torch.func.grad` of a functional call is what autograd finds, in large batches too (small: test_pytorch.py)."
    monkeypatch.setattr(gated_symile.objectives.gated, "TOGETHER", 0)
    objective, e, present = bare(holes=holes, **options)
    parameters = {name: p.detach() for name, p in objective.named_parameters() if p.requires_grad}
    def loss(parameters, e): return torch.func.functional_call(objective, parameters, (e, present))
    by_name, by_e = torch.func.grad(loss, argnums=(0, 1))(parameters, [x.detach() for x in e])
    expected = gradients(objective(e, present), objective, e)
    got = torch.cat([g.flatten() for g in (*by_e, *by_name.values())])
    assert_same(got, expected / torch.randn((), generator=generator(9), dtype=torch.float64).float(), 1e-5)


def test_differentiated_twice():
    "Against finite differences of the slopes, in blocks of a few rows."
    gate, embeddings, target, present = make((3, 3, 4, 5, 3), dict(strength=1., temperature=0.5, null=True),
                                             holes=True, seed=1)
    embeddings = [e.nan_to_num(0.).detach().requires_grad_() for e in embeddings]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factorised, "BLOCK", 5)
        assert torch.autograd.gradgradcheck(lambda *e: gate.scores(list(e), target, present), embeddings)


@pytest.mark.parametrize("holes", [False, True])
def test_a_loss_target_by_target_differentiated_twice(holes, monkeypatch):
    "As with all targets together, from parameters and embeddings alike."
    objective, e, present = bare(holes=holes, null=True)
    leaves, found = [*e, *(p for p in objective.parameters() if p.requires_grad)], []
    for together in (2**15, 0):
        monkeypatch.setattr(gated_symile.objectives.gated, "TOGETHER", together)
        slopes = torch.autograd.grad(objective(e, present), leaves, create_graph=True, allow_unused=True)
        total = sum(slope.square().sum() for slope in slopes if slope is not None)
        second = torch.autograd.grad(total, leaves, allow_unused=True)
        found.append(torch.cat([x.flatten() for x in (*slopes, *second) if x is not None]).detach())
    assert_same(found[1], found[0], 1e-5)


class Agreement(torch.nn.Module):
    "Whoever points where the candidate points is believed."
    def ask(self, candidates, targets): return candidates, None
    def answer(self, e, modalities): return e


def test_a_fit_of_ones_own():
    "In a score, by hand; in a loss, all targets; compiled."
    objective, e, present = bare(holes=True, fit=Agreement(), strength=1.)
    gate = objective.gate
    assert gate.settings()["fit"] == f"{__name__}.Agreement"
    weights = gate.weights(e, 0, present)[0]
    cosines = torch.stack([e[m] @ e[0].T for m in (1, 2)], -1) / gate.temperature()     # (B, N, 2)
    assert_same(weights, cosines.masked_fill(~present[:, None, 1:], -math.inf).softmax(-1), 1e-5)
    assert_same(gate.scores(e, 0, present), written_out(gate, e, 0, present), 1e-5)
    torch._dynamo.reset()
    assert_same(torch.compile(objective, fullgraph=True, backend="eager")(e, present), objective(e, present), 1e-5)
    for wrong in (torch.nn.Linear(8, 8), Agreement, 3):
        with pytest.raises(DtypeError, match="fit must be a name or a module with `ask` and `answer`"):
            ModalityGate(3, 8, fit=wrong)


def test_a_fit_without_null_is_not_taken_for_one_with():
    objective, e, present = bare(fit=Agreement(), null=True)
    for score in (lambda: objective(e, present), lambda: objective.gate.scores(e, 0),
                  lambda: objective.gate.weights(e, 0), lambda: objective.gate.gated(e, 0)):
        with pytest.raises(DtypeError, match="fit: Agreement.ask gives no NULL logits, which null=True asks for"):
            score()


def test_a_namesake_of_a_fit_of_the_library_is_told_apart():
    attention = type("attention", (Agreement,), {})
    assert ModalityGate(3, 8, fit=attention()).settings()["fit"] == f"{__name__}.attention"
    assert ModalityGate(3, 8, fit="attention").settings()["fit"] == "attention"


def test_the_authors_temperatures():
    assert [round(authors_temperature(g), 3) for g in (0.2, 0.5, 0.7, 1., 1.2)] == [0.282, 0.505, 0.631, 0.793, 0.888]
    settings = ModalityGate(3, 8, **AUTHORS).settings()
    assert settings["weighting"] == "sigmoid" and settings["null"] and settings["renormalise"]
    assert settings["neutral"] == "learned"


def test_many_modalities_neither_overflow_nor_lose_the_ranking():
    "M = 8, D = 8192, the true candidate a noisy product of its queries, in bfloat16 under autocast."
    M, B, D = 8, 6, 8192
    g = generator(0)
    signs = [torch.randn(B, D, generator=g).sign() for _ in range(M - 1)]
    e = [unit(torch.stack(signs).prod(0) + 0.5 * torch.randn(B, D, generator=g)), *map(unit, signs)]
    # nearly open: a closed one ranks by chance before it is trained
    gate = ModalityGate(M, D, key_dim=16, strength=-4.)
    exact = copy.deepcopy(gate).double().scores([x.double() for x in e], 0)
    torch.testing.assert_close(gate.scores(e, 0).double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for rows in (e, [x.bfloat16() for x in e]):
            objective = GatedSymile(gate)
            scores = objective.score(rows, 0)
            assert scores.dtype == torch.float32 and scores.isfinite().all()
            assert (scores.argmax(1) == torch.arange(B)).all()
            loss = objective(rows)
            loss.backward()
            assert loss.dtype == torch.float32 and loss.isfinite()
            assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("M", [3, 5, 6, 8])
def test_embeddings_opposite_to_their_neutral_directions_give_finite_scores(M):
    "Half closed, all of them have length 0; from M = 5 on, the product of their squares at `EPS` is 0 in float32."
    # a table of zeros: w = 1/2 and alpha = 1
    gate = ModalityGate(M, 8, fit="matrix", weighting="sigmoid", strength=40.)
    e = [(unit(torch.randn(3, 8, generator=generator(0))) if m == 0 else -n.expand(3, 8).clone()).requires_grad_()
         for m, n in enumerate(gate.neutral().detach())]
    assert written_out(gate, e, 0, None).abs().max() == 0
    scores = gate.scores(e, 0)
    assert scores.isfinite().all() and gradients(scores, gate, e).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ordinary_lengths_are_inverted_to_the_bit(dtype):
    for M in range(2, 7):
        q = 10**(-6*torch.rand(2, M - 1, 50, 60, generator=generator(M), dtype=dtype))
        assert torch.equal(factorised._inverse_length(q), math.prod(q.unbind(1)).rsqrt())


@pytest.mark.parametrize("own, theirs",
                         [(torch.bfloat16, torch.float64), (torch.float32, torch.float64),
                          (torch.float64, torch.float16)])
def test_a_gate_of_another_precision_says_what_to_do(own, theirs):
    objective, e = GatedSymile(ModalityGate(3, 8)).to(own), [unit(torch.randn(4, 8, generator=generator(m))).to(theirs)
                                                             for m in range(3)]
    mine, full = (torch.float64 if x == torch.float64 else torch.float32 for x in (own, theirs))
    for call in (objective, lambda e: objective.score(e, 0), lambda e: objective.gate.weights(e, 0),
                 lambda e: objective.gate.gated(e, 0)):
        with pytest.raises(DtypeError, match=f"parameters are {mine} and the embeddings {full} .*gate.to\\({full}\\)"):
            call(e)
    objective.gate.to(full)
    assert objective(e).isfinite()


@pytest.mark.parametrize("settings, error, match", [
    (dict(n_modalities=3.5), DtypeError, "n_modalities must be a whole number, got 3.5"),
    (dict(n_modalities=1), RangeError, "n_modalities"),
    (dict(dim=8.), DtypeError, "dim must be a whole number"), (dict(dim=0), RangeError, "dim"),
    (dict(key_dim=2.5), DtypeError, "key_dim must be a whole number"),
    (dict(key_dim=0), RangeError, r"key_dim must lie in \[1, inf\], got 0"),
    (dict(strength=math.nan), RangeError, "strength .* got nan"),
    (dict(strength=math.inf), RangeError, r"strength must lie in \[-inf, 100\], got inf"),
    (dict(strength="3"), DtypeError, "strength"),
    (dict(temperature=0.0999), RangeError, "temperature"), (dict(temperature=math.nan), RangeError, "temperature"),
    (dict(temperature=1e3), RangeError, r"\[0.1, 100\]")])
def test_settings_that_make_no_gate(settings, error, match):
    with pytest.raises(error, match=match): ModalityGate(**{**dict(n_modalities=3, dim=8), **settings})


def test_settings_at_their_bounds():
    "What starts closer to the lowest temperature than 0.001 starts at 0.101, to the bit: recorded runs did."
    raw = {ModalityGate(2, 4, temperature=t).raw_temperature.item() for t in (0.1, 0.1005)}
    assert raw == {torch.tensor(math.log(math.expm1(1e-3))).item()}
    assert ModalityGate(2, 4, temperature=100).temperature().item() == pytest.approx(100)
    assert ModalityGate(2, 1, key_dim=1, strength=100).strength() == 1
    # an optimiser would make NaN of it
    shut = ModalityGate(2, 4, strength=-math.inf)
    assert shut.strength() == 0 and not shut.raw_strength.requires_grad


def test_a_gate_says_how_it_was_made():
    said = repr(ModalityGate(3, 8, fit="matrix", weighting="sigmoid", null=True, neutral="none", strength=-1.,
                             temperature=0.3))
    for setting in ("fit='matrix'", "weighting='sigmoid'", "null=True", "NeutralDirections(none", "renormalise=False",
                    "strength=-1.0", "temperature=0.3"):
        assert setting in said, (setting, said)


def test_gradcheck():
    "Against finite differences, which know nothing of either form."
    gate, embeddings, target, present = make((3, 3, 4, 5, 3), dict(strength=1., temperature=0.5), holes=True, seed=1)
    embeddings = [e.nan_to_num(0.).detach().requires_grad_() for e in embeddings]
    assert torch.autograd.gradcheck(lambda *e: gate.scores(list(e), target, present), embeddings)


@pytest.mark.parametrize("M", [2, 3, 4])
def test_loss_with_missing_targets_uses_the_rows_that_have_one(M):
    gate, _, _, _ = make((M, 6, 6, 7, 4), {}, seed=2)
    objective = GatedSymile(gate).double()
    e = [unit(torch.randn(6, 7, generator=generator(m), dtype=torch.float64)) for m in range(M)]
    present = torch.ones(6, M, dtype=torch.bool)
    present[[1, 4], 0] = False
    if M == 2: present, e = present[[0, 2, 3, 5]], [x[[0, 2, 3, 5]] for x in e] # a row needs two modalities
    keep = present[:, 0]
    by_hand = []
    for t in range(M):
        rows = present[:, t].nonzero().flatten()
        sub = [x[rows] for x in e]
        by_hand.append(torch.nn.functional.cross_entropy(objective.score(sub, t, present[rows]),
                                                         torch.arange(len(rows))))
    e[0] = torch.where(keep[:, None], e[0], math.nan)
    torch.testing.assert_close(objective(e, present), sum(by_hand) / M)
