"Bits: what all know, what each knows and what they know only together is what it is called; copies keep what they say."
import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from gated_symile.core import DtypeError, MissingError, RangeError, ShapeError, generator
from gated_symile.data.bits import BitViews, bits_labels, synthetic_bits
from gated_symile.data.dataset import MultimodalDataset


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 12), M=st.integers(2, 26), noise=st.integers(0, 9), seed=st.integers(0, 10**6))
def test_labels_are_what_the_columns_say(rows, M, noise, seed):
    data = synthetic_bits(rows, M, noise, generator(seed))
    labels, views = bits_labels(data), list(data.modalities.values())
    assert len(data) == rows and len(views) == M and all(x.shape == (rows, 3 + noise) for x in views)
    for i in range(rows):
        parity = 0
        for m, x in enumerate(views, 1):
            assert {abs(v) for v in x[i, :3].tolist()} == {1.}
            assert labels["redundancy"][i] == (x[i, 0] == 1) and labels[f"unique{m}"][i] == (x[i, 1] == 1)
            parity ^= int(x[i, 2] < 0)
        assert labels["synergy"][i] == 1 - parity


@pytest.mark.parametrize("M", [2, 3, 4])
def test_all_but_one_modality_know_nothing_of_the_synergy(M):
    "Every pattern of the bits of M - 1 modalities goes with both answers, equally often."
    data = synthetic_bits(40_000, M, 0, generator(M))
    synergy = bits_labels(data)["synergy"].double()
    for left_out in range(M):
        some = torch.cat([x[:, 1:] for m, x in enumerate(data.modalities.values()) if m != left_out], 1) > 0
        code = (some * 2**torch.arange(some.shape[1])).sum(1)
        counts = torch.bincount(code).double()
        share = torch.bincount(code, synergy) / counts
        assert (share - 0.5).abs().max() < (5 * 0.5 / counts.min().sqrt())


def test_bits_are_fair_and_independent():
    data = synthetic_bits(20_000, 3, 2, generator(0))
    x = torch.cat([data.modalities["A"][:, :1], *(y[:, 1:] for y in data.modalities.values())], 1)
    assert (x.mean(0).abs() < 0.04).all()                                         # 5 standard deviations: 0.035
    assert (torch.corrcoef(x.T).fill_diagonal_(0).abs() < 0.04).all()


def test_randomness_is_the_generators():
    before, data = torch.get_rng_state(), synthetic_bits(20, generator=generator(0))
    copies = [BitViews()(data.modalities, generator(s))["A"] for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(data.modalities["A"], synthetic_bits(20, generator=generator(0)).modalities["A"])
    assert torch.equal(copies[0], copies[1]) and not torch.equal(copies[0], copies[2])


@pytest.mark.parametrize("M", [2, 3, 4, 5])
def test_copies_keep_the_parity_of_every_row_and_no_bit_of_it(M):
    batch = synthetic_bits(6000, M, 2, generator(0)).modalities
    copy = BitViews(noise=0., flip=0.5)(batch, generator(1))
    parity = [torch.stack([x[:, 2] for x in rows.values()], 1) for rows in (batch, copy)]
    assert torch.equal(parity[0].prod(1), parity[1].prod(1))
    turned = parity[0] != parity[1]
    assert set(turned.sum(1).tolist()) == {0, 2}
    for i, j in itertools.combinations(range(M), 2):                              # every two equally often
        share = turned[:, [i, j]].all(1).float().mean().item()
        assert abs(share - 0.5 * 2 / (M * (M - 1))) < 0.03
    for name in batch: assert torch.equal(batch[name][:, :2], copy[name][:, :2])


@pytest.mark.parametrize("M", [2, 3])
def test_turned_apart_the_parity_is_lost(M):
    batch = synthetic_bits(6000, M, 2, generator(0)).modalities
    copy = BitViews(noise=0., flip=0.5, together=False)(batch, generator(1))
    before, after = (torch.stack([x[:, 2] for x in rows.values()], 1).prod(1) for rows in (batch, copy))
    assert abs((before == after).float().mean() - 0.5) < 0.04


def test_noise_is_new_or_stays_with_its_row():
    batch = synthetic_bits(4000, 2, 8, generator(0)).modalities
    def alike(**how):
        x, y = batch["B"][:, 3:].flatten(), BitViews(**how)(batch, generator(1))["B"][:, 3:].flatten()
        return torch.corrcoef(torch.stack([x, y]))[0, 1].item()
    assert abs(alike()) < 0.03 and abs(alike(anew=False) - 1 / (1 + 0.4**2)**0.5) < 0.01


def test_missing_stays_missing_and_types_stay():
    batch = {name: x.double() for name, x in synthetic_bits(30, 3, 2, generator(0)).modalities.items()}
    batch["B"][::2] = torch.nan
    copy = BitViews()(batch, generator(0))
    for name, x in batch.items(): assert copy[name].dtype == x.dtype and torch.equal(copy[name].isnan(), x.isnan())


@pytest.mark.parametrize("error, words, wrong", [
    (RangeError, "rows must lie", lambda: synthetic_bits(0)),
    (DtypeError, "noise must be", lambda: synthetic_bits(3, 2, .5)),
    (RangeError, "n_modalities must lie", lambda: synthetic_bits(3, 1)),
    (RangeError, "noise must lie", lambda: BitViews(noise=-1)), (RangeError, "flip must lie", lambda: BitViews(flip=2)),
    (ShapeError, r"batch\['A'\] must have", lambda: BitViews()({"A": torch.zeros(2, 2)})),
    (ShapeError, "dataset must be of", lambda: bits_labels(MultimodalDataset({"A": torch.zeros(2, 2)}))),
    (MissingError, "a modality missing", lambda: bits_labels(MultimodalDataset(
        {"A": torch.full((2, 3), torch.nan), "B": torch.ones(2, 3)}))),
])
def test_what_is_wrong_is_named(error, words, wrong):
    with pytest.raises(error, match=words): wrong()
