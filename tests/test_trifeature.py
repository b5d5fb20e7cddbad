"Trifeature: pictures are what their features say, pairs obey what they should, and no combination is on both sides."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from gated_symile.core import DtypeError, RangeError, ShapeError, generator
from gated_symile.data.batches import read_batches
from gated_symile.data.trifeature import (
    COLOURS, PI, SHAPES, TEXTURES, TRIFEATURE_PAPER, draw_trifeature, trifeature, trifeature_labels, trifeature_pairs,
    trifeature_splits,
)


def solid(shape, rows=200, colour=9): return torch.tensor([[list(SHAPES).index(shape), 0, colour]]).repeat(rows, 1)


def inside(pictures): return (pictures[:, 0].double() / 255 - 0.5).sum((1, 2)) / 0.5         # of white ones, in pixels


@pytest.mark.parametrize("shape, area", [("square", 4), ("circle", math.pi), ("triangle", 2), ("plus", 20/9),
                                         ("tee", 20/9), ("rhombus", 1.2), ("fivesquare", 20/9), ("trapezoid", 1.96),
                                         ("pentagon", 2.5 * math.sin(0.4*math.pi)),
                                         ("star", 2.1 * math.sin(0.2*math.pi))])
@pytest.mark.parametrize("size", [32, 96])
def test_a_shape_has_its_area_wherever_and_however_it_lies(shape, area, size):
    areas = inside(draw_trifeature(solid(shape), size, generator=generator(0))) / (0.31*size)**2
    assert abs(areas.mean() - area) < 0.04 * area * 96 / size and areas.std() < 0.03 * area * 96 / size


def test_places_and_angles_are_anywhere():
    pictures = draw_trifeature(solid("rhombus", 2000), 48, generator=generator(0))
    seen = (pictures[:, 0].double() - 128).clamp(min=0)
    where = torch.stack([(seen.sum(d) * torch.arange(48)).sum(1) / seen.sum((1, 2)) for d in (1, 2)], 1)
    room = 48 * (1 - 0.62 * 2**0.5)                                                            # uniform within so much
    assert (where.mean(0) - 23.5).abs().max() < 0.2 and (where.std(0) - room / 12**0.5).abs().max() < 0.2
    width, height = ((seen.sum(d) > 0).sum(1) for d in (1, 2))
    assert (height - width).min() <= 1 and (height - width).max() >= 10                        # turned


@pytest.mark.parametrize("k", range(10))
def test_colours_are_on_black_and_ground_is_grey(k):
    pictures = draw_trifeature(torch.tensor([[1, texture, k] for texture in range(10)]), 64, generator=generator(k))
    colour = torch.tensor(list(COLOURS.values())[k]) * 255
    for texture, picture in zip(TEXTURES, pictures):
        for wanted in (colour, torch.full((3,), 127.5), *[torch.zeros(3)]*(texture != "solid")):
            assert (picture.flatten(1).T - wanted).abs().amax(1).min() <= 1


def test_textures_cover_some_of_the_plane_and_differ():
    u, v = torch.meshgrid(torch.arange(0, 4, 0.05), torch.arange(0, 4, 0.05), indexing="xy")
    table = (torch.rand(1, 32, 32, generator=generator(0)) < 0.5).float()
    on = {name: (plane(u[None], v[None], *([table] if name == "noise" else [])) < 0).float()
          for name, plane in TEXTURES.items()}
    shares = {name: x.mean().item() for name, x in on.items()}
    assert shares.pop("solid") == 1 and all(0.25 < share < 0.75 for share in shares.values()), shares
    flat = torch.stack([x.flatten() for x in on.values()])
    assert torch.cdist(flat, flat).fill_diagonal_(99.).min() > 30                              # of 80 at most


@settings(deadline=None, max_examples=10)
@given(train=st.integers(1, 999), seed=st.integers(0, 10**6))
def test_every_combination_is_on_one_side(train, seed):
    first, second = trifeature_splits(train, generator(seed))
    assert len(first) == train and len(torch.cat([first, second]).unique(dim=0)) == 1000


@settings(deadline=None, max_examples=10)
@given(n=st.integers(1, 60), seed=st.integers(0, 10**6), biased=st.booleans())
def test_pairs_are_all_there_are(n, seed, biased):
    features = torch.randint(10, (n, 3), generator=generator(seed))
    rows = features.tolist()
    pi = torch.randperm(10, generator=generator(seed)).tolist()
    slow = {(i, j) for i in range(n) for j in range(n) if i != j and rows[i][0] == rows[j][0]
            and (not biased or pi[rows[i][1]] == rows[j][2])}
    pairs = trifeature_pairs(features, None, pi if biased else None)
    assert {tuple(p) for p in pairs.tolist()} == slow and len(pairs) == len(slow)
    labels = trifeature_labels(features, pairs, pi)
    for k, (i, j) in enumerate(pairs.tolist()):
        assert labels["redundancy"][k] == rows[i][0] == rows[j][0]
        assert labels["unique1"][k] == rows[i][1] and labels["unique2"][k] == rows[j][1]
        assert labels["synergy"][k] == (pi[rows[i][1]] == rows[j][2])


@pytest.mark.parametrize("biased", [False, True])
def test_the_parts_of_an_experiment(biased):
    before = torch.get_rng_state()
    data, again = (trifeature(biased, 800, 16, period=3., generator=generator(0)) for _ in range(2))
    assert list(data) == ["train", "probe", "test"] and torch.equal(torch.get_rng_state(), before)
    for name, (rows, labels) in data.items():
        for image in ("image1", "image2"):
            x = rows.modalities[image]
            assert x.dtype == torch.uint8 and x.shape == (len(rows), 3, 16, 16)
            assert torch.equal(x[:200], again[name].rows.modalities[image][:200])
        assert all(len(y) == len(rows) for y in labels.values())
        share = labels["synergy"].float().mean()
        assert share == 1 if biased and name == "train" else 0.05 < share < 0.15
    pictures = [{x.numpy().tobytes() for image in ("image1", "image2") for x in data[name].rows.modalities[image][:]}
                for name in ("train", "probe", "test")]
    assert not (pictures[0] | pictures[1]) & pictures[2] and pictures[0] & pictures[1]
    batch, _ = next(read_batches(data["train"].rows, [torch.arange(5)]))
    assert batch["image2"].shape == (5, 3, 16, 16)
    rows = data["train"].rows
    assert torch.equal(rows[[3, 1]].modalities["image1"][:], rows.modalities["image1"][[3, 1]])


def test_the_sizes_of_the_paper():
    picture = draw_trifeature(solid("square", 3), **TRIFEATURE_PAPER, generator=generator(0))
    assert picture.shape == (3, 3, 224, 224) and (inside(picture) / 128**2 - 1).abs().max() < 0.01


def test_pi_is_a_permutation_without_fixed_seed():
    assert sorted(PI) == list(range(10))


@pytest.mark.parametrize("error, words, wrong", [
    (RangeError, "size must lie", lambda: trifeature(size=2)),
    (RangeError, "side must lie", lambda: trifeature(side=60.)),
    (RangeError, "period must lie", lambda: trifeature(period=0.)),
    (RangeError, "pi must hold", lambda: trifeature(pi=[1])),
    (RangeError, "pairs must be at most", lambda: trifeature(pairs=10**6)),
    (RangeError, "views must lie", lambda: trifeature(views=0)),
    (RangeError, "train must lie", lambda: trifeature(train=0)),
    (DtypeError, "pairs must be a whole", lambda: trifeature(pairs=2.5)),
    (ShapeError, "features must have shape", lambda: trifeature_pairs(torch.zeros(3, dtype=torch.int64))),
    (RangeError, r"features must lie in \[0, 9\]", lambda: draw_trifeature(torch.tensor([[0, 10, 0]]))),
    (DtypeError, "features must be a tensor", lambda: draw_trifeature([[0, 0, 0]])),
])
def test_what_is_wrong_is_named(error, words, wrong):
    with pytest.raises(error, match=words): wrong()
