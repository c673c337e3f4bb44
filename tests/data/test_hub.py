from __future__ import annotations

import pytest

# Imported by name here, before the fixture that plays "no hub" puts another in its place.
from contextlm.data.hub import hub_reachable


def test_a_hub_that_is_away_or_not_wanted_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            if "down" in url:
                raise ConnectionError

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for url in ("https://hub.up", "https://hub.down"):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        assert hub_reachable() == (url == "https://hub.up")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub_reachable()
    assert asked == ["https://hub.up", "https://hub.down"]
