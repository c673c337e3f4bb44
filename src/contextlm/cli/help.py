"""Help pages without Python's names for types: a flag takes no value, an argument says its own."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperGroup


def _without_types(params: list[Any]) -> list[Any]:
    for param in params:
        if isinstance(param, TyperArgument):
            # Only the display: `<list[Path]>` says nothing beside RUN... and its explanation.
            vars(param)["display_type_rich"] = _no_type
        elif getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


def _no_type(ctx: Any) -> None:
    return None


class PlainCommand(TyperCommand):
    """A command whose help shows no type of a flag or of an argument."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, help option included, as typer has them."""
        return _without_types(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """The same for a group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, help option included, as typer has them."""
        return _without_types(super().get_params(ctx))
