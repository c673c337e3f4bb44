"""`contextlm check`: the contract tests on a file from outside, and what it says of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from contextlm.cli import app
from contextlm.cli.shell import execute
from contextlm.models.hybrid.mixer import mixers

MIXER = """
import torch
from torch import nn

from contextlm.models.cache import ContextStateLayer
from contextlm.models.hybrid import Mixer, register_mixer
from contextlm.ops.linear_scan import linear_scan


@register_mixer("X")
class Mean(Mixer):
    def __init__(self, config):
        super().__init__(config)
        self.decay = nn.Parameter(torch.ones(config.hidden_size))
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    @classmethod
    def new_state(cls, config):
        return ContextStateLayer()

    def forward(self, x_BTD, state, new):
        keep_BTD = torch.sigmoid(self.decay) * (new.real_first_positions() > 0).unsqueeze(-1)
        keep_BTD = keep_BTD.expand_as(x_BTD)
        start_BD = torch.zeros_like(x_BTD[:, 0])
        if state is not None:
            start_BD = state.continue_from(start_BD)
        mean_BTD = linear_scan(keep_BTD, (1 - keep_BTD) * x_BTD, start_BD, mask_BT=MASK)
        if state is not None:
            state.update_state(mean_BTD[:, -1], new)
        return self.output(mean_BTD)
"""


@pytest.fixture
def checked(forget_outside, tmp_path, monkeypatch, capsys):
    """Exit code, stdout and stderr of the command on a file of this text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTEXTLM_BACKEND", "eager")  # there is little to scan

    def run(text: str, *options: str) -> tuple[int, str, str]:
        Path("mine.py").write_text(text)
        code = execute(app, ["check", "mine.py", *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_mixer_is_checked_in_patterns_of_its_letter(checked):
    code, out, err = checked(MIXER.replace("MASK", "new.real_first_mask"), "--only", "padding")
    assert (code, err) == (0, "")
    assert "4 passed" in out  # two tests, each on X and on xRX
    assert "X" in mixers()


def test_what_breaks_the_contract_is_told(checked):
    code, out, err = checked(MIXER.replace("MASK", "None"), "--only", "left_padding", "--first")
    assert code == 1
    assert "test_left_padding_changes_nothing" in out
    assert "1 failed" in out
    assert err == "contextlm: error: mine.py: not all of the contract is kept\n"


@pytest.mark.parametrize(
    ("text", "options", "code", "message"),
    [
        ("", (), 2, "nothing to check: no architecture and no mixer was registered"),
        (MIXER, ("--only", "nonsense"), 2, "--only nonsense: no test of that name"),
        (MIXER, ("--only", "a and and b"), 2, "Wrong expression passed to '-k': a and and b"),
        ("import", (), 2, "--import mine.py: line 1: SyntaxError"),
    ],
)
def test_what_cannot_be_checked_is_one_line(checked, text, options, code, message):
    found, _, err = checked(text, *options)
    assert found == code
    assert err.startswith(f"contextlm: error: {message}")
    assert err.count("\n") == 1


def test_pytest_is_asked_for_by_the_extra_that_brings_it(checked, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = checked(MIXER)
    assert (code, "pip install pytest" in err) == (2, True)
