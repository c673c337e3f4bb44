"""Where new tokens stand: parts of a row against the whole."""

from __future__ import annotations

import pytest
import torch

from contextlm.models.inputs import NewTokens


def test_a_part_of_packed_rows_knows_its_own_positions() -> None:
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    given = torch.tensor([[0, 9, 1, 0, 9, 1, 2], [0, 1, 2, 0, 0, 1, 9]])
    whole = NewTokens.of(torch.zeros(2, 7, 1), mask, position_ids=given)
    whole = whole.with_documents([], None, in_graph=True)
    for part, start, stop in zip(whole.split(3), (0, 3), (3, 7), strict=True):
        real = mask[:, start:stop].bool()
        assert torch.equal(part.position_ids, given[:, start:stop])
        assert torch.equal(part.positions()[real], given[:, start:stop][real])
        packed = part.real_first(given[:, start:stop].unsqueeze(-1)).squeeze(-1)
        real = part.real_first_mask
        assert torch.equal(part.real_first_positions()[real], packed[real])


@pytest.mark.parametrize("tokens", [1, 3])
def test_borders_that_do_not_fit_the_tokens_are_refused(tokens: int) -> None:
    """Also at a token, where none that fits says anything."""
    x, wrong = torch.zeros(1, tokens, 1), torch.arange(2).unsqueeze(0)
    ends = [wrong[0] * 2]
    for given, borders, seq_idx in ((wrong, [], None), (None, ends, None), (None, [], wrong)):
        new = NewTokens.of(x, position_ids=given)
        with pytest.raises(ValueError, match=r"must be \[1, |ends at 2 of"):
            new.with_documents(borders, seq_idx, in_graph=False)
