"""The generator against its authors' known answers, the noise against the form written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from contextlm.ops.normal_noise import normal_noise, philox_key
from contextlm.ops.normal_noise.naive import normal_noise_naive, philox_naive


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter, key, answer):
    found = philox_naive(np.array(counter, np.uint64)[:, None], tuple(key))
    assert " ".join(f"{int(number):08x}" for number in found[:, 0]) == answer


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 4), (251, 33)])
def test_noise_is_the_form_written_out(rows, columns):
    key = philox_key(3, 2, rows)
    expected = torch.from_numpy(normal_noise_naive(rows, columns, key)).float()
    torch.testing.assert_close(normal_noise(rows, columns, key), expected, rtol=2e-5, atol=2e-6)


def test_threads_change_nothing(monkeypatch):
    one = normal_noise(101, 13, (1, 2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(normal_noise(101, 13, (1, 2)), one)


def test_moments_are_those_of_normal_numbers():
    """Of a million numbers, within five standard errors; and none repeats under another key."""
    x = normal_noise(1000, 1000, philox_key(0, 1, 2)).double()
    for power, expected, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(x.pow(power).mean() - expected) < 5 * deviation / 1000, power
    assert abs((x[:, :-1] * x[:, 1:]).mean()) < 0.005
    assert abs((x * normal_noise(1000, 1000, philox_key(0, 1, 3))).mean()) < 0.005
    assert x.abs().max() > 4.5
