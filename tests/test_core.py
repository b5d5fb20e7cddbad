"Numbers as people have them: NumPy's are as good as Python's, wherever one is asked for. Lengths as they come, files that are whole."
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from gated_symile.core import check_range, check_whole, fill_missing, generator, unit, whole_file, DtypeError, EPS, RangeError
from gated_symile.data.xnor import synthetic_xnor
from gated_symile.data.xor import synthetic_xor
from gated_symile.encoders import MLP
from gated_symile.gate.gate import ModalityGate
from gated_symile.objectives.clip import PairwiseCLIP
from gated_symile.objectives.gated import GatedSymile
from gated_symile.objectives.gram import GRAM
from gated_symile.objectives.subset import SubsetSymile
from gated_symile.objectives.symile import Symile
from gated_symile.objectives.triangle import TRIANGLE
from gated_symile.retrieval import bank_slices, bootstrap_interval, metrics, rank_true, top_k, Ranks

KINDS = [int, np.int8, np.int64, np.uint16]
NO_NUMBER = [True, np.bool_(True), None, "1", 1j, torch.tensor(1)]


@given(value=st.integers(-100, 100), low=st.integers(-100, 100), high=st.integers(-100, 100), kind=st.sampled_from([int, np.int8, np.int64, np.float32, float]))
def test_a_number_passes_in_its_range_and_a_whole_one_becomes_an_int(value, low, high, kind):
    for check in (check_range, check_whole):
        if check is check_whole and not issubclass(kind, (int, np.integer)): error, words = DtypeError, "n must be a whole number"
        else: error, words = RangeError, rf"n must lie in \[{low}, {high}\], got {value}"
        if low <= value <= high and error is RangeError:
            passed = check("n", kind(value), low, high)
            assert passed == value and (check is check_range or type(passed) is int)
        else:
            with pytest.raises(error, match=words): check("n", kind(value), low, high)


@pytest.mark.parametrize("value", NO_NUMBER, ids=repr)
def test_what_is_no_number_is_refused(value):
    for check, what in ((check_range, "a number"), (check_whole, "a whole number")):
        with pytest.raises(DtypeError, match=re.escape(f"n must be {what}, got {value!r}")): check("n", value, 0)


@pytest.mark.parametrize("value", [2., 2.5, np.float64(2), float("nan"), float("inf")], ids=repr)
def test_a_fraction_counts_nothing(value):
    with pytest.raises(DtypeError, match="n must be a whole number"): check_whole("n", value, 0)
    for call in (lambda: MLP(3, 2, depth=value), lambda: synthetic_xnor(rows=value), lambda: synthetic_xor(n_bits=value), lambda: SubsetSymile(max_subset=value),
                 lambda: bank_slices(9, value), lambda: generator(value)):
        with pytest.raises(DtypeError, match="must be a whole number"): call()


@pytest.mark.parametrize("make", [PairwiseCLIP, Symile, GRAM, TRIANGLE, SubsetSymile, lambda: GatedSymile(ModalityGate(3, 4, key_dim=2))])
def test_a_target_of_numpys_integers_is_a_target(make):
    objective, e = make(), [unit(torch.randn(5, 4, generator=generator(m))) for m in range(3)]
    for t in range(3): assert torch.equal(objective.score(e, np.int64(t)), objective.score(e, t))
    with pytest.raises(DtypeError, match="present must be a bool tensor, got list"): objective.score(e, 0, [[True]*3]*5)
    with pytest.raises(DtypeError, match="present must be a bool tensor, got ndarray"): objective(e, np.ones((5, 3), dtype=bool))


def test_sizes_and_shares_of_numpy_are_those_of_python():
    score, e = Symile().score, [unit(torch.randn(6, 4, generator=generator(m))) for m in range(3)]
    for found, expected in zip(top_k(score, e, np.int64(1), np.int64(3)), top_k(score, e, 1, 3)): assert torch.equal(found, expected)
    ranks = rank_true(score, e, np.int64(1))
    assert metrics(ranks, ks=np.array([1, 5]), generator=generator(0)).equals(metrics(ranks, ks=(1, 5), generator=generator(0)))
    values = ranks.reciprocal()
    assert bootstrap_interval(values, level=np.float32(0.5), resamples=np.int64(9), generator=generator(np.int64(2))) == \
           bootstrap_interval(values, level=0.5, resamples=9, generator=generator(2))
    for kind in KINDS: assert torch.equal(torch.rand(3, generator=generator(kind(7))), torch.rand(3, generator=generator(7)))
    one, two = (synthetic_xnor(kind(40), p=share(0.5), n_bits=kind(2), dim=kind(9), generator=generator(0)) for kind, share in ((np.int64, np.float32), (int, float)))
    assert all(torch.equal(one.modalities[name], two.modalities[name]) for name in "ABC") and torch.equal(one.corrupted, two.corrupted)
    assert synthetic_xor(np.int64(3), np.int64(4), np.int64(2)).names == list("ABCD")
    assert MLP(np.int64(3), np.int64(2), width=np.int64(4), depth=np.int64(2), dropout=np.float32(0.5))(torch.ones(1, 3)).shape == (1, 2)


def test_truth_is_a_tensor():
    e = [torch.eye(3)]*2
    with pytest.raises(DtypeError, match="truth must be a tensor of indices, got list"): rank_true(PairwiseCLIP().score, e, 0, truth=[0, 1, 2])
    with pytest.raises(RangeError, match=r"k must lie in \[1, inf\], got 0"): Ranks(torch.zeros(2), torch.zeros(2)).top(np.int64(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_any_length_become_unit_rows(dtype):
    "The shortest are those of EPS; the longest have lengths, and squares, that overflow."
    x, largest = torch.randn(6, 5, generator=generator(0), dtype=dtype), torch.finfo(dtype).max
    lengths = torch.tensor([1., EPS*(1 + 1e-3), 1e18, 1e20, largest**0.5 * 3, largest / 8], dtype=dtype)
    found = unit(unit(x) * lengths[:, None])
    torch.testing.assert_close(found, unit(x))
    torch.testing.assert_close(unit(x.sign() * largest), x.sign() / 5**0.5)            # no number holds their length
    assert torch.equal(unit(torch.zeros(2, 3, dtype=dtype)), torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("length", [1e-9, 1e-7, 1., 1e5, 1e180])
def test_slope_of_a_unit_row(length):
    "Against finite differences, below EPS as above, and where the squares overflow."
    x = torch.randn(3, 4, generator=generator(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unit(length * x), x)
    if length < 1e100: assert torch.autograd.gradgradcheck(lambda x: unit(length * x), x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3)])
def test_filled_rows_keep_their_type(dtype, shape):
    present, x = torch.tensor([True, False, True, False]), torch.ones(shape).to(dtype)
    filled = fill_missing(x, present)
    assert filled.dtype == dtype and filled.shape == shape and torch.equal(filled[present], x[present]) and not filled[~present].any()
    assert torch.equal(x, torch.ones(shape).to(dtype))


def test_two_threads_write_one_file_apart(tmp_path):
    "Whoever is last has it, whole."
    path, both_write, done = tmp_path/"file", threading.Barrier(2), []
    def write(letter):
        with whole_file(path) as file:
            both_write.wait(); file.write(letter * 2**20); file.flush(); both_write.wait()
        done.append(letter)
    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(done) == 2 and path.read_bytes() in (b"a" * 2**20, b"b" * 2**20) and [p.name for p in tmp_path.iterdir()] == ["file"]
