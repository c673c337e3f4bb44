"""docs/use-it-with.md: its examples, which are run, and its table, which `make clients` writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from contextlm.models.base import registry
from contextlm.models.build import meta_model

PAGE = Path(__file__).parents[2] / "docs" / "use-it-with.md"


def examples(text: str) -> list[tuple[str, str, str]]:
    """The page's examples in order: the heading above, ``bash`` or ``python``, and the code."""
    found, heading = [], ""
    pattern = r"^## (.*?)$|^```(bash|python)\n(.*?)^```$"
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        else:
            found.append((heading, match[2], match[3]))
    return found


def run_example(language: str, code: str, folder: Path) -> str:
    """Run one example in a folder; what it printed. An `AssertionError` shows its errors."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CONTEXTLM_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"
    return done.stdout


def run_examples(text: str) -> list[str]:
    """Run all examples one after another in a new folder; the headings of those that failed."""
    import tempfile

    failed = []
    with tempfile.TemporaryDirectory() as place:
        for heading, language, code in examples(text):
            try:
                run_example(language, code, Path(place))
            except AssertionError as error:
                print(f"\ndocs/use-it-with.md, {heading}: {error}", file=sys.stderr)
                failed.append(f"docs/use-it-with.md, {heading}")
    return failed


def targets() -> str:
    """Rows of each type and the names of its linear layers, but for the head."""
    rows = []
    for name, entry in registry().items():
        found = {
            re.sub(r".*\.(?=\D)", "", place): None
            for fields in entry.tiny
            for place, module in meta_model(entry.config(**fields)).named_modules()
            if isinstance(module, nn.Linear) and place != "lm_head"
        }
        rows.append(f"| `{name}` | {', '.join(f'`{target}`' for target in found)} |\n")
    return "".join(rows)


def between(name: str, made: str, text: str) -> str:
    """`text` with `made` between its marks of a name."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, _, rest = text.partition(begin)
    return before + begin + made + end + rest.partition(end)[2]


def write_table(
    table: Mapping[str, Mapping[str, str]], refused: Mapping[tuple[str, str], str]
) -> None:
    """Put the matrix between the page's marks, the reasons for each ``no`` below it."""
    types = list(next(iter(table.values())))
    lines = [["client", *(f"`{name}`" for name in types)], [":---"] * (len(types) + 1)]
    lines += [[name, *(row[kind] for kind in types)] for name, row in table.items()]
    reasons: dict[tuple[str, str], list[str]] = {}
    for (name, kind), why in refused.items():
        if name in table:
            reasons.setdefault((name, why), []).append(f"`{kind}`")
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    told = "".join(
        f"- {name}, {', '.join(kinds)}: {why}\n" for (name, why), kinds in reasons.items()
    )
    page = between("targets", targets(), PAGE.read_text("utf-8"))
    PAGE.write_text(between("clients", text + ("\n" + told if told else ""), page), "utf-8")
