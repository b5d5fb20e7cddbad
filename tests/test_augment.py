"Copies of rows: seeded, of the same shape and type, missing stays missing; and each change does what it says."
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from gated_symile.augment import (
    AUGMENTS, Blur, Borrow, Chain, Crop, Drop, Grey, HideTokens, Jitter, Mask, Mirror, Noise, Scale, Views,
    augment_about, comm_augment, default_augment, make_augment,
)
from gated_symile.core import DtypeError, RangeError, ShapeError, generator

SHAPES = {"table": (7,), "signal": (2, 31), "picture": (3, 9, 12), "volume": (3, 5, 6, 4)}
ANYWHERE = [Noise(0.3, 1.), Drop(), Borrow(), Scale()]
IN_SPACE = [Mask(), Crop(0.3), Mirror(), Jitter(saturation=0., hue=0.), Blur(p=1.)]
COLOURED = [Jitter(p=1.), Grey(p=0.5)]
CASES = [(kind, change) for kind in SHAPES for change in ANYWHERE + IN_SPACE * (kind != "table")
         + COLOURED * (kind in ("picture", "volume"))]


def rows(kind, n=40, seed=0): return torch.randn(n, *SHAPES[kind], generator=generator(seed))


@pytest.mark.parametrize("kind, change", CASES, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_what_all_changes_have_in_common(kind, change):
    x = rows(kind)
    before, state = x.clone(), torch.get_rng_state()
    one, same, other = (change(x, generator(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)            # neither rows nor the world
    assert one.shape == x.shape and one.isfinite().all()
    assert change(x.bfloat16(), generator(1)).dtype == torch.bfloat16
    double = change(x.double(), generator(1))                                                  # the same copy
    assert double.dtype == torch.float64 and (double - one).abs().max() < 1e-3
    assert change(x[:0], generator(1)).shape == x[:0].shape
    assert change(torch.empty(x.shape, device="meta")).shape == x.shape


@pytest.mark.parametrize("kind, change", CASES, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_missing_stays_missing(kind, change):
    x = rows(kind)
    x[::3] = torch.nan                                                                         # absent rows
    assert torch.equal(change(x, generator(0)).flatten(1).isnan().all(1), x.flatten(1).isnan().all(1))
    assert change(x, generator(0))[1::3].isfinite().all()                                      # and reach no other
    holes = rows(kind).masked_fill(torch.rand(x.shape, generator=generator(3)) < 0.1, torch.nan)
    copy = change(holes, generator(0))
    if not change.moves: assert torch.equal(copy.isnan(), holes.isnan())
    else: assert copy.isnan().any() and not copy.isnan().all()


@pytest.mark.parametrize("kind, change", [case for case in CASES if not isinstance(case[1], Borrow)],
                         ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_a_row_does_not_depend_on_the_others(kind, change):
    x, y = rows(kind), rows(kind, seed=1)
    y[0] = x[0]
    assert torch.allclose(change(x, generator(0))[0], change(y, generator(0))[0], atol=1e-6)


@pytest.mark.parametrize("change", [Noise(p=0.), Noise(0., 1.), Drop(high=0.), Borrow(high=0.), Scale(1.),
                                    Mask(high=0.), Crop(1., 1., 1.), Mirror(0.), Jitter(0., 0., 0., 0., p=1.),
                                    Grey(0.), Blur(p=0.), Blur(0.05, 0.05, 1.), Chain([])], ids=repr)
def test_nothing_to_change_changes_nothing(change):
    x = rows("picture")
    assert torch.allclose(change(x, generator(0)), x, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(p=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_p_is_the_share_of_changed_rows(p, seed):
    changed = (Noise(1., p)(torch.zeros(2000, 1), generator(seed)) != 0).float().mean().item()
    assert abs(changed - p) < 5 * (p * (1 - p) / 2000)**0.5 + 1e-9


def test_a_share_is_drawn_for_each_row():
    shares = (Drop(0.2, 0.6)(torch.ones(2000, 500), generator(0)) == 0).float().mean(1)
    assert abs(shares.mean() - 0.4) < 0.02 and abs(shares.std() - 0.4 / 12**0.5) < 0.02
    gaps = (Mask(0.2, 0.6)(torch.ones(2000, 1, 500), generator(0)) == 0).float()
    assert abs(gaps.mean() - 0.4) < 0.02 and (gaps[:, 0].diff(dim=1) == 1).sum(1).max() <= 1
    centre = (gaps[:, 0] * torch.arange(500)).sum(1) / gaps[:, 0].sum(1)
    assert abs(centre.mean() - 249.5) < 10                                                     # anywhere


def test_borrowed_cells_keep_the_distribution_of_their_column():
    x = torch.randn(2000, 3, generator=generator(0)) * torch.tensor([1., 10., 100.])
    copy = Borrow(1., 1.)(x, generator(1))
    assert (copy != x).all() and all(torch.isin(a, b).all() for a, b in zip(copy.T, x.T))
    assert ((copy.std(0) / x.std(0)) - 1).abs().max() < 0.1
    assert (torch.corrcoef(torch.cat([copy, x], 1).T).fill_diagonal_(0).abs() < 0.1).all()


def test_a_crop_shows_a_part_and_no_more():
    x = torch.linspace(0, 1, 64).expand(300, 1, 64)
    seen = Crop(0.25, 0.75)(x, generator(0))[:, 0]
    assert (seen.diff(dim=1) >= -1e-6).all() and seen.min() >= 0 and seen.max() <= 1 + 1e-6
    width = seen[:, -1] - seen[:, 0]
    assert 0.2 < width.min() < 0.3 and 0.7 < width.max() < 0.77 and abs(width.mean() - 0.5) < 0.03
    plane = torch.stack([x[:200].expand(200, 64, 64), x[:200].expand(200, 64, 64).mT], 1)      # u to the right, v down
    u, v = ((lambda y: y.amax((1, 2)) - y.amin((1, 2)))(Crop(0.25, 0.25)(plane, generator(0))[:, k]) for k in (0, 1))
    assert abs((u * v).mean() - 0.25) < 0.02 and (u / v).max() < 4/3 + 0.05 and (u / v).min() > 3/4 - 0.05


def test_grey_pictures_have_no_colour_to_change():
    grey = torch.rand(20, 1, 6, 6, generator=generator(0)).expand(-1, 3, -1, -1)
    copy = Jitter(0., 0., 1., 0.5, p=1.)(grey, generator(1))
    assert torch.allclose(copy, grey, atol=1e-5) and torch.allclose(Grey(1.)(grey), grey, atol=1e-6)


def test_hue_and_saturation_keep_what_they_should():
    x = rows("picture")
    assert torch.allclose(Jitter(0., 0., 0., 0.5, p=1.)(x, generator(0)).mean(1), x.mean(1), atol=1e-5)   # the axis
    luma = Grey(1.)(x)
    assert torch.allclose(Grey(1.)(Jitter(0., 0., 1., 0., p=1.)(x, generator(0))), luma, atol=1e-5)         # brightness


def test_black_stays_black():
    copy = Jitter(1., 0., 0., 0., black=-2., p=1.)(torch.full((50, 1, 3, 3), -2.), generator(0))
    assert torch.equal(copy, torch.full_like(copy, -2.))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 9), high=st.floats(0, 1))
def test_tokens_are_hidden_and_one_stays(seed, length, high):
    ids = torch.randint(5, (30, length), generator=generator(seed))
    copy = HideTokens(0., high, to=7)(ids, generator(seed))
    assert ((copy == ids) | ((copy == 7) & (ids != 0))).all()
    assert ((copy != 0) & (copy != 7)).any(1).equal((ids != 0).any(1))


def test_everything_can_be_made_again():
    for kind in AUGMENTS.values():
        if kind.__name__ in ("Chain", "Views"): continue
        assert make_augment(json.loads(json.dumps(augment_about(kind())))).settings() == kind().settings()
    views = Views({"a": comm_augment(4), "b.c": Chain([Chain([Mirror()]), Crop()])})
    again = make_augment(json.loads(json.dumps(augment_about(views))))
    batch = {"a": rows("table"), "b.c": rows("picture"), "c": rows("table")}
    one, two = views(batch, generator(0)), again(batch, generator(0))
    assert list(one) == list(batch) and all(torch.equal(one[name], two[name]) for name in batch)
    assert one["c"] is batch["c"]


@pytest.mark.parametrize("shape", SHAPES.values())
def test_defaults_change_every_row(shape):
    x = torch.randn(100, *shape, generator=generator(0))
    one, two = (default_augment(shape)(x, generator(s)) for s in (0, 1))
    for a, b in ((one, x), (two, x), (one, two)): assert (a != b).flatten(1).any(1).float().mean() > 0.9
    alike = torch.nn.functional.cosine_similarity(one.flatten(1), two.flatten(1)).mean()
    assert len(shape) > 1 or alike > 0.3


@pytest.mark.parametrize("error, words, wrong", [
    (RangeError, "p must lie", lambda: Noise(p=1.5)), (RangeError, "std must lie", lambda: Noise(-1)),
    (RangeError, "low must lie", lambda: Drop(-0.1)), (RangeError, "high must lie", lambda: Mask(0.5, 0.4)),
    (DtypeError, "high must be a number", lambda: Drop(high="much")), (RangeError, "most must lie", lambda: Scale(0)),
    (RangeError, "low must be more than 0", lambda: Crop(0)), (RangeError, "hue must lie", lambda: Jitter(hue=0.7)),
    (RangeError, "padding must lie", lambda: HideTokens(padding=-1)),
    (ShapeError, "x: Crop takes", lambda: Crop()(torch.zeros(3, 4))),
    (ShapeError, "x: Grey takes", lambda: Grey()(torch.zeros(3, 4, 5, 5))),
    (DtypeError, "x: Drop takes floats", lambda: Drop()(torch.zeros(3, 4, dtype=torch.uint8))),
    (DtypeError, "x: HideTokens takes whole", lambda: HideTokens()(torch.zeros(3, 4))),
    (ShapeError, "shape must be of 1 to 4", lambda: default_augment([])),
    (ShapeError, "shape: a row is of", lambda: comm_augment((4, 8, 8))),
])
def test_what_is_wrong_is_named(error, words, wrong):
    with pytest.raises(error, match=words): wrong()
