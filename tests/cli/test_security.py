"""What strangers' text must not do: become markup, run, steer a terminal, or make us call out.

A run whose every string is a script is trained for real, with no network to be had; its report is
read by a parser.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import socket
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from contextlm.base.progress import RichProgress
from contextlm.cli import app
from contextlm.cli.output import print_json, print_table
from contextlm.cli.shell import execute

EVIL = "<script>alert(1)</script>"
BREAKOUT = '"><img src=x onerror="document.title=1">'
VOID = {"meta", "img", "br", "input"}

RECIPE: dict[str, Any] = {
    "name": "poisoned",
    "question": EVIL,
    "document": EVIL,
    "corpus": f"text:{EVIL}",
    "tokenizer": f"tokenizer/{EVIL}",
    "sequence_length": 8,
    "samples": {"train": 4, "validation": 2},
    "embedding": {"path": EVIL},
    "training": {"epochs": 1},
    "evaluation": {"cache_lengths": [8], "speed_tokens": 8},
    "contenders": [
        {
            "name": "base",
            "baseline": True,
            "model": {"type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "summary_type": EVIL},
            "reported": {EVIL: 1.0},
        }
    ],
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """Every attempt to reach another machine, each of which fails; none may be made."""
    made: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        made.append((arguments, options))
        raise OSError("no network here")

    patch = pytest.MonkeyPatch()
    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        patch.setattr(socket, name, refuse)
    patch.setenv("CONTEXTLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.delenv("CONTEXTLM_DATA", raising=False)
    yield made
    patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, calls: list[Any]) -> Iterator[Path]:
    """The folder of a run of `RECIPE`, on a text and a tokenizer that hold the same string."""
    from transformers import PreTrainedTokenizerFast

    from contextlm.data.tokenizer_training import END_OF_TEXT, train_bpe

    place = tmp_path_factory.mktemp("poisoned")
    # A slash cannot be in a name: a folder `<script>alert(1)<` and in it `script>` read the same.
    (place / EVIL).parent.mkdir()
    (place / EVIL).write_text(f"{EVIL} some words\n" * 60)
    backend = train_bpe([EVIL * 9], 300)
    backend.add_special_tokens([EVIL])
    ends = {"eos_token": END_OF_TEXT, "pad_token": EVIL}
    PreTrainedTokenizerFast(tokenizer_object=backend, **ends).save_pretrained(
        place / "tokenizer" / EVIL
    )
    (place / "poisoned.yaml").write_text(yaml.safe_dump(RECIPE))
    patch = pytest.MonkeyPatch()
    patch.chdir(place)
    assert execute(app, ["run", "poisoned.yaml", "--device", "cpu"]) == 0
    yield place / "runs" / "poisoned-001"
    patch.undo()


def poison(value: Any, text: str, kept: frozenset[str]) -> Any:
    """Every string in a nest replaced, and every key that is not in `kept`."""
    if isinstance(value, dict):
        names = {"version", "phase", "contender", "source"}
        return {
            key if key in kept else text + key: inner if key in names else poison(inner, text, kept)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [poison(inner, text, kept) for inner in value]
    return text if isinstance(value, str) else value


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, (dict, list)):
            yield from keys(inner)


def poisoned_report(run: Path, text: str, place: Path) -> Path:
    """The report of a copy of the run, in whose files every string is `text`."""
    copy = place / run.name
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint", "report*"))
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    changed = poison(recipe, text, frozenset({"name", "question", "document", "contenders"}))
    changed["contenders"][0]["name"] = "base"  # the only string that is held to a rule, see below
    (copy / "recipe.yaml").write_text(yaml.safe_dump(changed))
    for name in ("environment.json", "base/seed-0/result.json", "base/seed-0/timings.json"):
        record = json.loads((copy / name).read_text())
        kept = {key for key in keys(record) if key != EVIL and name != "environment.json"}
        (copy / name).write_text(json.dumps(poison(record, text, frozenset(kept))))
    assert execute(app, ["report", str(copy)]) == 0
    return copy


class Page(HTMLParser):
    """The elements of a page, their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.titles: list[str] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["script"]:
            self.scripts.append(data)
            return
        self.text.append(data)
        if "title" in self._inside:
            self.titles.append(data)


def assert_text_stayed_text(page: str, text: str, times: int) -> None:
    """The page holds `text` at least so many times, as text, and runs its own two scripts only."""
    seen = Page(page)
    assert not seen.elements & {"iframe", "object", "embed", "link", "base"}
    assert all(not name.startswith("on") for name, _ in seen.attributes)
    drawn, *scripts = seen.scripts
    json.loads(drawn)  # data, not script
    policy = next(value for name, value in seen.attributes if name == "content" and "src" in value)
    hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts]
    assert policy.partition("script-src ")[2] == " ".join(f"'sha256-{each}'" for each in hashes)
    assert not any(text in each for each in scripts)
    sources = [value or "" for name, value in seen.attributes if name in ("src", "href")]
    # In the page itself or in the run folder.
    inside = re.compile(r"data:image/(png|svg\+xml);base64,|#|[\w./-]+$")
    assert all(inside.match(source) for source in sources), sources
    assert "".join(seen.text).count(text) >= times


def test_a_real_run_of_a_poisoned_recipe_shows_text(run: Path) -> None:
    # question, document, corpus, tokenizer (twice), embedding path, summary type, figure's name
    assert_text_stayed_text((run / "report.html").read_text(), EVIL, 8)
    markdown = (run / "report.md").read_text()
    assert "<script" not in markdown
    assert markdown.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8


@pytest.mark.parametrize("text", [EVIL, BREAKOUT, "$\\frac{1}$ `x` [a](javascript:alert(1))"])
def test_a_run_folder_of_nothing_else_shows_text(run: Path, text: str, tmp_path: Path) -> None:
    copy = poisoned_report(run, text, tmp_path)
    page = (copy / "report.html").read_text()
    assert_text_stayed_text(page, text, 25)
    assert Page(page).titles == [f"{text}: contextlm report"]
    markdown = (copy / "report.md").read_text()
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert "[a](" not in markdown


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", EVIL),
        ("contenders.base.name", EVIL),
        ("contenders.base.model.type", EVIL),
        ("contenders.base.model.activation_function", EVIL),
        ("training.parameter_groups", f"[{{match: '{EVIL}', learning_rate: 1e-3}}]"),
        ("embedding.source", EVIL),
        ("unit", EVIL),
    ],
)
def test_where_a_rule_forbids_it_it_is_refused(
    run: Path, key: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = execute(app, ["run", "poisoned.yaml", "--dry-run", "--set", f"{key}={value}"])
    error = capsys.readouterr().err
    assert code == 2
    assert key.rpartition(".")[2] in error
    assert error.count("\n") == 1


def test_nothing_calls_out_unless_a_hub_is_named(
    run: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(run / "base" / "seed-0" / "checkpoint")
    for arguments in (
        ["run", "demo", "--scale", "smoke", "--dry-run"],
        ["params", "context-pythia"],
        ["report", str(run)],
        ["eval", checkpoint, "--corpus", f"text:{EVIL}", "--sequence-length", "8"],
        ["generate", checkpoint, "some", "--max-new-tokens", "2"],
        ["list"],
    ):
        assert execute(app, arguments) == 0, arguments
    capsys.readouterr()
    assert calls == []
    # The guard itself works: a corpus of the hub is what asks for the network.
    assert execute(app, ["run", "demo", "--set", "corpus=wikitext-2", "--dry-run"]) == 1
    assert "hub" in capsys.readouterr().err
    assert calls != []


# --- the terminal --------------------------------------------------------------------------------

STEERING = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\r\x7f"


def test_a_file_name_cannot_steer_the_terminal(
    run: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(f"notes{STEERING}.txt").write_text("some words of a text\n" * 60)
    for name in ("notes", "gone"):
        corpus = json.dumps(f"text:{name}{STEERING}.txt")
        execute(app, ["run", "poisoned.yaml", "--dry-run", "--set", f"corpus={corpus}"])
        out, err = capsys.readouterr()
        assert (out + err).replace("\n", "").isprintable()
        assert "\\x1b[2J" in out + err


def test_tables_json_and_progress_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table([STEERING], [[STEERING]], caption=STEERING)
    print_json({"text": STEERING + "\udcff"})
    table, _, line = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    assert table.replace("\n", "").isprintable()
    assert line.isprintable()
    assert json.loads(line)["text"] == STEERING + "\udcff"
    out = io.StringIO()
    with RichProgress(out) as progress:
        progress.stage(STEERING)
        progress.line(STEERING)
    assert out.getvalue().replace("\n", "").isprintable()
