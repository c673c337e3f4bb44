"""Command lines of every malformed kind: refused in one line that names the argument."""

from __future__ import annotations

from pathlib import Path

from attempts import attempt, tries
from hypothesis import given
from hypothesis import strategies as st

WORD = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        *(
            "",
            "-",
            "--",
            "-x",
            "--no-such",
            "=",
            "\x00",
            "\x1b[2J",
            "\udcff",
            "x" * 5000,
            "~nobody-x",
        ),
        *("nan", "inf", "-1", "0", "1e400", "9" * 400, "0x10", "1,2", ",", "٣"),
        *("/dev/null", "/proc/self/mem", "..", "/", "a/../..", "no-such", "demo", "demo.yaml"),
    ]
)
# What each command takes; nothing here can succeed in training or downloading anything.
OPTIONS = {
    "run": ["--scale", "--set", "--seeds", "--device", "--out"],
    "params": ["--scale", "--set"],
    "report": ["--out", "--into"],
    "eval": ["--corpus", "--sequence-length", "--samples", "--cache-lengths", "--cache"],
    "generate": ["--prompt-file", "--max-new-tokens", "--temperature", "--top-k", "--seed"],
    "bench": ["--repeats", "--threads", "--plot"],
    "list": [],
}


@st.composite
def command_line(draw: st.DrawFn) -> list[str]:
    """A command with one to three arguments, of which the first is not what it asks for."""
    name = draw(st.sampled_from([*OPTIONS, *OPTIONS, "no-such"]))
    options = st.sampled_from([*OPTIONS.get(name, []), "--no-such", "--json"])
    rest: list[str] = []
    for _ in range(draw(st.integers(0, 3))):
        rest += [draw(options), draw(WORD)] if draw(st.booleans()) else [draw(WORD)]
    return [name, f"no-such-{draw(st.integers(0, 9))}", *rest]


@tries("arguments")
@given(arguments=command_line())
def test_any_command_line_is_refused(place: Path, arguments: list[str]) -> None:
    helped = "-h" in arguments or "--help" in arguments
    attempt(*arguments, place=place, fine=helped)
