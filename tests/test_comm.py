"CoMM and what it is made of, against slow loops in float64: NT-Xent, the fusion of any subset, both losses."
import pytest
import torch

from gated_symile.contrastive import nt_xent
from gated_symile.core import generator
from oracles import nt_xent_loop


def exact(got, expected): torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# NT-Xent

@pytest.mark.parametrize("rows", [None, [0, 2, 3, 6], [1, 4]])
@pytest.mark.parametrize("temperature", [0.1, 1.])
def test_nt_xent_and_its_gradients_are_the_loop(rows, temperature):
    a, b = (x.requires_grad_() for x in torch.randn(2, 7, 5, generator=generator(0), dtype=torch.float64).unbind())
    valid = None if rows is None else torch.isin(torch.arange(7), torch.tensor(rows))
    ours, slow = nt_xent(a, b, temperature, valid), nt_xent_loop(a, b, temperature, rows)
    exact(ours, slow)
    for got, expected in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(slow, (a, b))): exact(got, expected)
