"""Entry point of the `contextlm` command.

It stands outside the package on purpose. `import contextlm` registers our models with the
transformers Auto classes, which costs seconds; the package skips that when this module is what
started the process, so that `contextlm --help` answers at once and each command imports what it
uses.
"""

from __future__ import annotations


def main() -> None:
    from contextlm.cli import main as run

    run()
