"Synthetic-XOR: the parity holds bit by bit, all modalities together tell something and no fewer, as training shows."
import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from gated_symile.core import DtypeError, RangeError, generator
from gated_symile.data.xor import synthetic_xor
from gated_symile.model import MultimodalModel
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.symile import Symile
from gated_symile.search import rank_dataset
from gated_symile.training import fit


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 12), M=st.integers(2, 26), n_bits=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_every_modality_is_the_exclusive_or_of_the_others(rows, M, n_bits, seed):
    data = synthetic_xor(rows, M, n_bits, generator(seed))
    assert len(data) == rows and len(data.names) == M and data.present is None and data.corrupted is None
    for t, i, k in itertools.product(range(M), range(rows), range(n_bits)):
        parity = 0
        for m, x in enumerate(data.modalities.values()):
            if m != t: parity ^= int(x[i, k])
        assert data.modalities[data.names[t]][i, k] == parity


@pytest.mark.parametrize("M", [2, 3, 4])
def test_all_but_one_are_independent_and_fair(M):
    "Every pattern of M - 1 modalities comes up equally often, whichever is left out."
    bits = torch.stack(list(synthetic_xor(20_000, M, 1, generator(M)).modalities.values()))[..., 0].long()
    for left_out in range(M):
        code = sum(bits[m] << k for k, m in enumerate(m for m in range(M) if m != left_out))
        share = torch.bincount(code, minlength=2**(M-1)) / 20_000
        assert (share - 0.5**(M-1)).abs().max() < 0.02                            # 5 standard deviations at most: 0.018


def test_randomness_is_the_generators():
    before = torch.get_rng_state()
    one, two, other = (synthetic_xor(20, generator=generator(s)).modalities["A"] for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("error, wrong", [
    (RangeError, dict(rows=0)), (RangeError, dict(n_modalities=1)), (RangeError, dict(n_modalities=27)),
    (RangeError, dict(n_bits=0)),
    (DtypeError, dict(rows=2.5)), (DtypeError, dict(n_modalities=3.)), (DtypeError, dict(n_bits="4")),
    (DtypeError, dict(rows=True)),
])
def test_a_wrong_size_is_named(error, wrong):
    with pytest.raises(error, match=next(iter(wrong))): synthetic_xor(**wrong)


def test_symile_learns_what_pairs_cannot():
    train, valid, test = synthetic_xor(1000, n_bits=10, generator=generator(0)).split(generator=generator(1))
    top1 = {}
    for objective in (PairwiseCLIP(), Symile("candidates")):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = MultimodalModel({name: nn.Linear(10, 32) for name in train.names}, objective)
        fit(model, train, valid, target="A", epochs=12, learning_rate=3e-2, warmup_steps=10, progress=False)
        top1[type(objective).__name__] = rank_dataset(model, test, "A")[0].top(1).mean()
    assert top1["PairwiseCLIP"] < 0.06 and top1["Symile"] > 0.8
