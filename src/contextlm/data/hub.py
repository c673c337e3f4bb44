"""Reaching the Hugging Face hub: quickly when it is there, and failing at once when it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from contextlm.base.errors import RunError

T = TypeVar("T")

_ANSWER_SECONDS = 5.0


def hub_reachable() -> bool:
    """Whether the hub answers now.

    The libraries retry for most of a minute before they give up on a machine without a network;
    this takes a moment.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_ANSWER_SECONDS)
    except Exception:  # of the library that the session comes from, which has changed
        return False
    return True


def from_hub(what: str, instead: str, load: Callable[[bool], T]) -> T:
    """What `load` fetches; passing faults are retried by the libraries that it calls.

    Args:
        what: names the wanted thing in the message, e.g. ``"corpus 'pile'"``.
        instead: what the user can do without a hub.
        load: called with whether the hub is reachable; if it is not, only what an earlier
            download left on this machine may be read.

    Raises:
        RunError: the hub could not be reached, or did not deliver.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    online = hub_reachable()
    try:
        return load(online)
    # The libraries raise ValueError where an earlier download lacks the asked configuration.
    except (OSError, DatasetsError, HfHubHTTPError, ValueError) as error:
        fault = f"the hub ({constants.ENDPOINT}) could not be reached"
        if online:
            fault = f"the hub did not deliver ({' '.join(str(error).split())})"
        raise RunError(f"{what}: {fault}; {instead}") from None


def load_split(
    corpus: str,
    path: str,
    split: str,
    read: Callable[[Any], list[str]],
    *,
    local: str | None = None,
    **options: Any,
) -> list[str]:
    """Texts read from one split of a hub dataset.

    Args:
        corpus: our name of the corpus, for the message.
        path: the dataset's name on the hub.
        split: the dataset's own name of the split.
        read: takes the loaded dataset, gives the texts; its faults count as the hub's when it
            streams.
        local: how a copy lies in the folder that ``CONTEXTLM_DATA`` names; None: it cannot.
        options: passed on to `datasets.load_dataset`.

    Raises:
        RunError: see `from_hub`.
    """
    import datasets

    def load(online: bool) -> list[str]:
        with _offline(not online):
            return read(datasets.load_dataset(path, split=split, **options))

    instead = "use text:PATH or jsonl:PATH instead"
    if local is not None:
        instead = f"use text:PATH or jsonl:PATH, or CONTEXTLM_DATA=FOLDER with {local}, instead"
    return from_hub(f"corpus {corpus!r}", instead, load)


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Within the block the libraries read only what is on this machine, if `offline`."""
    import datasets
    from huggingface_hub import constants

    before = (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    if offline:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
