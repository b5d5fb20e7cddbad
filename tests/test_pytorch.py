"What PyTorch does to a module works on every registered objective, with and without `present`, shapes left open."
import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from gated_symile.contrastive import LogitScale
from gated_symile.core import generator, unit, MissingError
import gated_symile.objectives.linear  # noqa: F401, it registers LinearGaussian
from gated_symile.objectives.base import make_objective, registered

M, D = 3, 8
CASES = [*((name, {}) for name in registered()), ("Symile", {"negatives": "candidates"}),
         ("Symile", {"negatives": "all"}),
         ("SubsetSymile", {"null": 1., "by_diversity": True}), ("GatedSymile", {"weighting": "sigmoid", "null": True}),
         ("GatedSymile", {"neutral": "none"})]
CASES = [case for case in CASES if case[0] in registered()]
def over(cases):
    names = [" ".join([name, *map(str, options.values())]) for name, options in cases]
    return pytest.mark.parametrize("name, options", cases, ids=names)


each = over(CASES)
# What learns in closed form can not be traced: what it knows, and of what sizes, is decided by values in `learn`,
# and so is which regression a row with holes is asked; on the meta device there are none to learn from.
stepwise = over([case for case in CASES if "closed form" not in registered()[case[0]].capabilities])
both = pytest.mark.parametrize("holes", [False, True], ids=["all present", "holes"])


def make(name, options):
    torch.manual_seed(0)
    objective = make_objective(name, M, D, **options)
    return objective.learn(*batch(200, True)) if "closed form" in objective.capabilities else objective


def batch(B, holes, seed=0, N=None, target=0, dtype=torch.float32):
    "Unit rows, N of them in slot `target`, and which of the others exist: each row has two, and NaN in what it lacks."
    e = [unit(torch.randn(N if N and m == target else B, D, generator=generator(10*seed + m))).to(dtype)
         for m in range(M)]
    if not holes: return e, None
    present = torch.rand(B, M, generator=generator(seed)) < 0.6
    present[:, 1:] |= ~present.any(1, keepdim=True)
    present[present.sum(1) < 2] = True
    present[:2] = True
    return [x if N and m == target else torch.where(present[:, m, None], x, math.nan) for m, x in enumerate(e)], present


def learn(objective, e, present):
    "The loss, and its gradients by embeddings and parameters. Shuffles are drawn from the global state."
    torch.manual_seed(0)
    leaves = [*(x.clone().requires_grad_() for x in e), *(p for p in objective.parameters() if p.requires_grad)]
    loss = objective(leaves[:M], present)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def close(got, expected): torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


class Score(nn.Module):
    "A score as what is called."
    def __init__(self, objective, target=0):
        super().__init__()
        self.objective, self.target = objective, target
    def forward(self, embeddings, present=None): return self.objective.score(embeddings, self.target, present)


@stepwise
@both
def test_compiles_whole_with_open_shapes(name, options, holes):
    """One graph for batches of all sizes: `fullgraph` allows no break, and after the first call nothing is traced anew.

    Where all are present, Python's numbers are left open, too: PyTorch then traces twice. With holes they are the same.
    """
    torch._dynamo.reset()
    objective = make(name, options)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True, dynamic=True)     # no C++ compiler needed
    for step, B in enumerate((6, 9, 4)):
        e, present = batch(B, holes, seed=step)
        with (torch.compiler.set_stance("fail_on_recompile" if step else "default"),
              torch._dynamo.config.patch(specialize_float=holes)): found = learn(compiled, e, present)
        assert all(x.isfinite().all() for x in found)
        # other draws
        if (name, options.get("negatives", "shuffle")) != ("Symile", "shuffle"):
            close(found, learn(objective, e, present))


@stepwise
@both
def test_exports_with_open_shapes(name, options, holes):
    "Loss and score, in B and N."
    objective, rows, candidates = make(name, options), Dim("B", min=2, max=2**16), Dim("N", min=1, max=2**20)
    for module, N in ((objective, None), (Score(objective), 5)):
        e, present = batch(6, holes, N=N)
        shapes = [{0: candidates if N and m == 0 else rows} for m in range(M)], {0: rows} if holes else None
        program = export(module, (e, present), dynamic_shapes=dict(zip(("embeddings", "present"), shapes)))
        for B in (4, 9):
            e, present = batch(B, holes, seed=B, N=N and N + B)
            torch.manual_seed(0)
            found = program.module()(e, present)
            torch.manual_seed(0)
            close(found, module(e, present))


@each
@both
def test_copies_pickles_and_saves(name, options, holes):
    objective, (e, present) = make(name, options), batch(6, holes)
    expected, buffer = learn(objective, e, present), io.BytesIO()
    torch.save(objective, buffer); buffer.seek(0)
    for other in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective)),
                  torch.load(buffer, weights_only=False)):
        assert type(other) is type(objective) and other.settings() == objective.settings()
        assert repr(other) == repr(objective)
        assert all(torch.equal(a, b) for a, b in zip(learn(other, e, present), expected))


@each
@both
def test_half_and_double(name, options, holes):
    "In bfloat16 everything is computed in full from rounded parameters; in double precision as exactly as it gets."
    for dtype, inside, tolerance in ((torch.bfloat16, torch.float32, 0.05), (torch.float64, torch.float64, 1e-5)):
        objective, (e, present) = make(name, options), batch(6, holes)
        torch.manual_seed(0); expected = objective(e, present)
        torch.manual_seed(0); loss = objective.to(dtype)([x.to(dtype).requires_grad_() for x in e], present)
        assert loss.dtype == inside and loss.item() == pytest.approx(expected.item(), rel=tolerance)
        loss.backward()
        assert all(p.grad is None or p.grad.dtype == dtype and p.grad.isfinite().all() for p in objective.parameters())
        e, present = batch(6, holes, N=5, dtype=dtype)
        assert objective.score(e, 0, present).dtype == inside


@stepwise
@both
def test_is_made_on_the_meta_device(name, options, holes):
    with torch.device("meta"): objective = make(name, options)
    assert type(objective).__name__ in repr(objective) and all(p.is_meta for p in objective.parameters())
    assert objective.settings() == make(name, options).settings()
    e, present = batch(6, holes)
    loss = objective([x.to("meta") for x in e], None if present is None else present.to("meta"))
    assert loss.is_meta and loss.shape == ()
    assert objective.to_empty(device="cpu").load_state_dict(make(name, options).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(learn(objective, e, present), learn(make(name, options), e, present)))


@each
@both
def test_function_transforms(name, options, holes):
    "`torch.func.grad` of a functional call, by parameters and by embeddings."
    objective, (e, present) = make(name, options), batch(6, holes)
    parameters = dict(objective.named_parameters())
    def loss(parameters, e): return torch.func.functional_call(objective, parameters, (e, present))
    torch.manual_seed(0)
    by_parameters, by_embeddings = torch.func.grad(loss, argnums=(0, 1))(parameters, e)
    learned = [by_parameters[name] for name, p in parameters.items() if p.requires_grad]
    close([*by_embeddings, *learned], learn(objective, e, present)[1:])


@each
def test_settings_make_it_again(name, options):
    objective = make(name, options)
    assert objective.settings() == objective.options() | options | {k: v for k, v in objective.settings().items()
                                                                    if k in ("renormalise", "heads")}
    other = make_objective(name, M, D, **objective.settings())
    other.load_state_dict(objective.state_dict())
    e, _ = batch(6, False)
    assert torch.equal(other.score(e, 0), objective.score(e, 0))
    for option, value in options.items(): assert f"{option}={value!r}" in repr(objective)


def test_a_compiled_loss_does_not_look_and_an_eager_one_does():
    "Where nothing can be contrasted, one says so, and the other gives no number."
    objective, present = make("Symile", {}), torch.eye(3, dtype=torch.bool)
    e = [unit(torch.randn(3, D, generator=generator(m))) for m in range(3)]
    with pytest.raises(MissingError, match="fewer than 2"): objective(e, present)
    assert torch.compile(objective, backend="aot_eager", fullgraph=True)(e, present).isnan()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_scale_beyond_its_bound_comes_back_at_once(compiled):
    "As long as it wants to go on it stays; the gradient within is untouched."
    scale = LogitScale(math.log(99))
    call, optimiser = torch.compile(scale, fullgraph=True) if compiled else scale, torch.optim.SGD(scale.parameters(),
                                                                                                   lr=1e-3)
    def step(sign):
        optimiser.zero_grad(); (sign * call()).backward(); optimiser.step()
        return scale.log_scale.grad.item()
    assert step(-1) == pytest.approx(-99, rel=1e-5)
    for _ in range(2000): step(-1)
    assert call().item() == pytest.approx(100, rel=1e-5)
    step(1); step(1)
    assert call().item() < 95
