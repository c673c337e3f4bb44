"""What a checkpoint remembers of its training, because its weights mean nothing without it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from contextlm.base.errors import InputError
from contextlm.base.files import write_json
from contextlm.results.run_files import first_problem

NAME = "contextlm.json"


class Trained(BaseModel):
    """How a model was trained, as far as that decides how it may be used.

    Attributes:
        target_offset: how many tokens ahead it predicts.
        unit: whether a sample was a window of a stream, a line of text, or a question.
        stream: whether its contexts ran on from window to window.
        sequence_length: tokens of a sample; None where the note is older than this.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    target_offset: PositiveInt = 1
    unit: Literal["windows", "lines", "answers"] = "windows"
    stream: bool = False
    sequence_length: PositiveInt | None = None

    def remarks(self) -> list[str]:
        """What makes figures on windows, each from its beginning, others than the run's."""
        said = []
        if self.target_offset > 1:
            said.append(f"it predicts the token {self.target_offset} ahead, and is scored on that")
        if self.unit == "lines":
            said.append("it was trained on lines, each from its beginning; here it reads windows")
        if self.unit == "answers":
            said.append("it was trained to answer made-up questions, and on nothing else")
        if self.stream:
            said.append("its contexts ran on through the text; here each window starts anew")
        return said


def write_trained(folder: Path, trained: Trained) -> None:
    """Put the note into a checkpoint's folder."""
    write_json(folder / NAME, trained.model_dump())


def read_trained(folder: Path) -> Trained:
    """The note in a checkpoint's folder; the defaults where another program made the checkpoint.

    Raises:
        InputError: the note is damaged; the message names the file.
    """
    file = folder / NAME
    if not file.is_file():
        return Trained()
    try:
        return Trained.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise InputError(f"{file}: {first_problem(error)}") from None
