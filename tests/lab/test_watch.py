"""The page of a run at work: what it tells, and to whom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import RemoteDisconnected
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from contextlm.base.progress import SilentProgress
from contextlm.lab import watch
from contextlm.lab.watch import HOST, watched
from contextlm.report.live import live_page

RECIPE = {"name": "made-up", "question": "?", "contenders": [{"name": "a"}, {"name": "b"}]}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A run of two contenders, the first of which has begun; its last line is half written."""
    tmp_path = tmp_path_factory.mktemp("run")
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    (tmp_path / "environment.json").write_text("{}")
    for name in ("a", "b"):
        (tmp_path / name / "seed-0").mkdir(parents=True)
        (tmp_path / name / "seed-0" / "job.json").write_text("{}")
    step = {"phase": 2, "step": 7, "epoch": 1, "loss": 5.25, "learning_rate": 0.1}
    history = tmp_path / "a" / "seed-0" / "history.jsonl"
    history.write_text(json.dumps(step) + "\n" + '{"phase": 2, "st')
    with watched(tmp_path, SilentProgress()) as served:
        yield served


def test_the_page_tells_how_far_it_is_and_the_loss_by_step(address: str) -> None:
    assert address.startswith(f"http://{HOST}:")
    with urlopen(address) as answer:
        text = answer.read().decode()
        assert answer.headers["Refresh"]
    assert "Contender 1 of 2: a/seed-0" in text
    drawn = json.loads(text.partition('id="drawn">')[2].partition("</script>")[0])
    (rows,) = drawn["charts"]["live"]["datasets"].values()
    assert rows == [{"x": 7, "y": 5.25, "label": "a/seed-0", "baseline": False}]


def test_trials_of_a_learning_rate_are_drawn_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "a" / "seed-0").mkdir(parents=True)
    (tmp_path / "a" / "seed-0" / "job.json").write_text("{}")
    step = {"phase": 2, "step": 3, "epoch": 1, "loss": 6.5, "learning_rate": 0.1}
    for rate in ("0.001", "0.002"):
        trial = tmp_path / "a" / "tuning" / rate
        trial.mkdir(parents=True)
        (trial / "history.jsonl").write_text(json.dumps(step) + "\n")
    (tmp_path / "a" / "tuning" / "0.001" / "result.json").write_text("{}")
    text = live_page(tmp_path, [tmp_path])
    assert "Contender 1 of 1: a/tuning/0.002" in text
    drawn = json.loads(text.partition('id="drawn">')[2].partition("</script>")[0])
    (rows,) = drawn["charts"]["live"]["datasets"].values()
    assert {row["label"] for row in rows} == {"a/tuning/0.001", "a/tuning/0.002"}


def test_its_links_lead_to_the_run_folder(address: str) -> None:
    with urlopen(address + "a/seed-0/history.jsonl") as answer:
        assert b"5.25" in answer.read()
    with pytest.raises(HTTPError, match="404"):
        urlopen(address + "../elsewhere")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_only_this_machine_is_answered(address: str, method: str) -> None:
    with pytest.raises(HTTPError, match="403"):
        urlopen(Request(address, headers={"Host": "elsewhere.example"}, method=method))


def test_a_page_read_while_it_is_written_is_asked_for_again(tmp_path: Path) -> None:
    with watched(tmp_path, SilentProgress()) as served:
        with pytest.raises(HTTPError, match="503") as told:
            urlopen(served)
        assert told.value.headers["Refresh"]


def test_a_reader_who_leaves_is_no_fault(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def left(*where: object) -> str:
        raise BrokenPipeError

    monkeypatch.setattr(watch._Handler, "do_GET", left)
    with pytest.raises(RemoteDisconnected):
        urlopen(address)
    assert capsys.readouterr().err == ""
