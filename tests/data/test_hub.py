from __future__ import annotations

import socket
from typing import Any

import pytest

# Imported by name here, before the fixture that plays "no hub" puts another in its place.
from contextlm.data.hub import hub_reachable


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    addresses: list[tuple[str, int]] = []

    class Connection:
        def close(self) -> None:
            pass

    def connect(address: tuple[str, int], timeout: float) -> Any:
        addresses.append(address)
        if "down" in address[0]:
            raise socket.gaierror(-2, "Name or service not known")
        return Connection()

    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.up")
    return addresses


def test_the_hub_is_asked_at_its_own_address(
    asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub_reachable()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://mirror.down:8080/hf")
    assert not hub_reachable()
    assert asked == [("hub.up", 443), ("mirror.down", 8080)]


def test_behind_a_proxy_the_proxy_is_asked(
    asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy.down:3128"})
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: 0)
    assert not hub_reachable()
    assert asked == [("proxy.down", 3128)]


def test_offline_mode_asks_nobody(
    asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub_reachable()
    assert asked == []
