from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from contextlm.base.errors import InputError, RunError
from contextlm.data import named
from contextlm.data.corpora import load_corpus

ROWS = [
    "",
    " = First = \n",
    "",
    " Text of the first . \n",
    " = not a title = \n",
    " = = Section = = \n",
    " \n",
    " More . \n",
    "",
    " = Second , a = b = \n",
    " \n",
    " Text of the second . \n",
]


class Hub:
    """Stands in for `datasets.load_dataset`; remembers how it was called."""

    def __init__(self, deliver: Callable[..., Any]) -> None:
        self.deliver = deliver
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls.append((args, options))
        return self.deliver(*args, **options)


@pytest.fixture
def deliver(monkeypatch: pytest.MonkeyPatch, online: None) -> Callable[[Callable[..., Any]], Hub]:
    def install(what: Callable[..., Any]) -> Hub:
        fake = Hub(what)
        monkeypatch.setattr("datasets.load_dataset", fake)
        return fake

    return install


def test_wikitext_from_the_hub(deliver: Callable[..., Hub]) -> None:
    splits = {"train": ROWS, "validation": ["", " = V = \n", "", " Validation . \n"]}
    fake = deliver(lambda path, split, name: datasets.Dataset.from_dict({"text": splits[split]}))
    corpus = load_corpus("wikitext-103")
    assert fake.calls == [
        (("Salesforce/wikitext",), {"split": split, "name": "wikitext-103-raw-v1"})
        for split in ("train", "validation")
    ]
    assert list(corpus.train) == [
        " = First = \n Text of the first . \n = not a title = \n = = Section = = \n More . \n",
        " = Second , a = b = \n Text of the second . \n",
    ]
    assert "".join(corpus.train) == "".join(row for row in ROWS if row.strip())
    assert list(corpus.validation) == [" = V = \n Validation . \n"]
    assert not corpus.append_end_of_text
    assert corpus.name == "wikitext-103 (raw edition, Salesforce/wikitext)"


@pytest.mark.parametrize(("suffix", "edition"), [("tokens", "tokenised"), ("raw", "raw")])
def test_wikitext_from_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, edition: str
) -> None:
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    lines = [row.removesuffix("\n") for row in ROWS]
    (folder / f"wiki.train.{suffix}").write_text("\n".join(lines), encoding="utf-8")
    (folder / f"wiki.valid.{suffix}").write_text(" \n = V = \n \n v \n", encoding="utf-8")
    monkeypatch.setenv("CONTEXTLM_DATA", str(tmp_path))
    corpus = load_corpus("wikitext-2")
    assert corpus.name == f"wikitext-2 ({edition} edition, from CONTEXTLM_DATA)"
    assert "".join(corpus.train) == "".join(f"{line}\n" for line in lines if line.strip())
    assert len(corpus.train) == 2
    assert list(corpus.validation) == [" = V = \n v \n"]
    assert list(load_corpus("wikitext-2", (1, 1)).train) == list(corpus.train[:1])


def test_a_bad_local_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTEXTLM_DATA", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"CONTEXTLM_DATA: .*none is not a folder"):
        load_corpus("wikitext-2")
    monkeypatch.setenv("CONTEXTLM_DATA", str(tmp_path))
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    with pytest.raises(InputError, match=r"wikitext-2: needs wiki\.train\.raw"):
        load_corpus("wikitext-2")
    (folder / "wiki.train.tokens").write_bytes(b"\xff")
    (folder / "wiki.valid.tokens").write_bytes(b"text\n")
    with pytest.raises(InputError, match=r"wiki\.train\.tokens: not UTF-8"):
        load_corpus("wikitext-2")
    (folder / "wiki.train.tokens").write_bytes(b" \n\n")
    with pytest.raises(InputError, match=r"wiki\.train\.tokens: holds no text"):
        load_corpus("wikitext-2")


def dialogues(count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "prompt_id": [str(i) for i in range(count)],
            "messages": [
                [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
                for i in range(count)
            ],
        }
    )


def test_ultrachat_takes_the_documents_slices(deliver: Callable[..., Hub]) -> None:
    data = dialogues(50_030)
    fake = deliver(lambda path, split: data)
    corpus = load_corpus("ultrachat")
    assert fake.calls == [(("HuggingFaceH4/ultrachat_200k",), {"split": "train_sft"})]
    assert list(corpus.train) == [f"q{i}\na{i}" for i in range(2000)]
    assert list(corpus.validation) == [f"q{i}\na{i}" for i in range(50_000, 50_020)]
    assert not corpus.append_end_of_text
    small = load_corpus("ultrachat", (500, 3))
    assert list(small.train) == list(corpus.train[:500])
    assert list(small.validation) == list(corpus.validation[:3])
    assert small.fingerprint != corpus.fingerprint
    with pytest.raises(InputError, match="has 50030 samples, the first 50031 were asked for"):
        load_corpus("ultrachat", (1, 31))
    with pytest.raises(InputError, match="50001 train documents would reach into"):
        load_corpus("ultrachat", (50_001, 1))


def test_the_pile_is_streamed_train_first(deliver: Callable[..., Hub]) -> None:
    read: list[int] = []

    def stream(path: str, split: str, streaming: bool) -> Any:
        for number in range(6000):
            read.append(number)
            yield {"text": f"document {number}", "meta": {}}

    fake = deliver(stream)
    corpus = load_corpus("pile", (9, 3))
    assert fake.calls == [(("monology/pile-uncopyrighted",), {"split": "train", "streaming": True})]
    assert list(corpus.train) == [f"document {i}" for i in range(9)]
    assert list(corpus.validation) == [f"document {i}" for i in range(9, 12)]
    assert len(read) == 12, "no more is downloaded than is wanted"
    assert (len(load_corpus("pile").train), len(load_corpus("pile").validation)) == (4500, 500)
    with pytest.raises(InputError, match="has 6000 documents, 7000 were asked for"):
        load_corpus("pile", (6000, 1000))


@pytest.mark.parametrize("name", ["wikitext-2", "ultrachat", "pile"])
def test_without_a_network_one_line_says_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = []

    def unreachable(*args: Any, **options: Any) -> Any:
        offline.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("Couldn't reach it\nat all")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    with pytest.raises(RunError) as caught:
        load_corpus(name)
    message = str(caught.value)
    assert message.startswith(f"corpus {name!r}: the hub (")
    assert "could not be reached; use text:PATH or jsonl:PATH" in message
    assert ("FOLDER/wikitext-2/wiki.valid.tokens" in message) == (name == "wikitext-2")
    assert offline == [True], "the libraries may not wait for the network"
    assert datasets.config.HF_HUB_OFFLINE is False, "and it is put back"


def test_what_the_hub_fails_to_deliver_is_told_on_one_line(deliver: Callable[..., Hub]) -> None:
    def broken(path: str, split: str, streaming: bool) -> Any:
        yield {"text": "a"}
        raise TimeoutError("slow\nand bad")

    deliver(broken)
    with pytest.raises(RunError, match=r"corpus 'pile': the hub did not deliver \(slow and bad\)"):
        load_corpus("pile", (1, 1))


def test_titles_stand_alone() -> None:
    assert named.articles(["text\n", " = Not alone = \n", "", "x"]) == [
        "text\n = Not alone = \nx\n"
    ]
    assert named.articles([]) == []
