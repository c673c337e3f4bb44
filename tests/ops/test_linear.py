"""A linear layer's product with few vectors against the sum that it is."""

from __future__ import annotations

import pytest
import torch

from contextlm.ops.linear import is_small
from contextlm.ops.linear.step import linear_step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 1, 37), 23), ((3, 1, 5), 1), ((1,), 7)])
def test_the_product_is_the_sum(shape, outputs, dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(outputs, shape[-1], dtype=dtype)
    expected = (weight.double() * x.double().unsqueeze(-2)).sum(-1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    product = linear_step(x, weight)
    assert product.dtype == dtype
    torch.testing.assert_close(product.double(), expected, rtol=tolerance, atol=tolerance)


def test_many_vectors_and_many_weights_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(2048, 1024, device="meta")
    for threads, rows, small in ((1, 1, True), (2, 4, True), (2, 5, False), (3, 1, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert is_small(torch.empty(rows, 1, 1024, device="meta"), weight) == small
