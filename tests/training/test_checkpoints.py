"""Sealed checkpoints: whole, unfinished, damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from contextlm.training.checkpoints import MANIFEST, checkpoints, damage, prune, seal, sealed


def make(folder: Path, *numbers: int) -> list[Path]:
    places = [folder / f"step-{number}" for number in numbers]
    for place in places:
        place.mkdir(parents=True)
        (place / "weights").write_bytes(bytes(1000))
        (place / "state.json").write_text("{}")
        seal(place)
    return places


def spoil(place: Path, how: str) -> str:
    """Damage one file; what the message must name."""
    file = place / ("weights" if how != "manifest" else MANIFEST)
    if how == "a bit":
        data = bytearray(file.read_bytes())
        data[500] ^= 1
        file.write_bytes(data)
    elif how == "the end":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "gone":
        file.unlink()
    else:
        file.write_text("{")
    return str(file)


def test_the_newest_comes_first_by_number(tmp_path: Path) -> None:
    nine, ten = make(tmp_path, 9, 10)
    (tmp_path / "step-x").mkdir()  # not ours
    assert sealed(tmp_path, "step", print) == [ten, nine]
    assert sealed(tmp_path / "nowhere", "step", print) == []
    assert damage(nine) is None


@pytest.mark.parametrize("how", ["a bit", "the end", "gone", "manifest"])
def test_a_damaged_one_is_named_and_left_aside(tmp_path: Path, how: str) -> None:
    one, two = make(tmp_path, 1, 2)
    named = spoil(two, how)
    told: list[str] = []
    assert sealed(tmp_path, "step", told.append) == [one]
    assert len(told) == 1
    assert named in told[0]
    assert not two.exists()


def test_an_unfinished_one_is_left_aside_without_a_word(tmp_path: Path) -> None:
    one, two = make(tmp_path, 1, 2)
    (two / MANIFEST).unlink()
    told: list[str] = []
    assert sealed(tmp_path, "step", told.append) == [one]
    assert told == []


def test_two_and_the_named_ones_are_kept(tmp_path: Path) -> None:
    one, _, three, four = make(tmp_path, 1, 2, 3, 4)
    prune(tmp_path, "step", {1})
    assert checkpoints(tmp_path, "step") == [four, three, one]
