"""Let a command take a dataclass of options, and a group of commands the name of a model where a command would stand."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

from typer.core import TyperGroup
from typer.models import OptionInfo

ANY_MODEL = "MODEL"
"""Name of the command that gets the model; a lower-case `model` is a directory like any other."""
_NAMED = inspect.Parameter.KEYWORD_ONLY  # for these an option without default may follow one with


class ModelOrCommand(TyperGroup):
    """Run the command `MODEL` with all arguments where the first one is neither a command nor an option."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = [ANY_MODEL, *args]
        return super().resolve_command(ctx, args)


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with every parameter that is a dataclass replaced by the fields of that dataclass.

    The class attribute `panel` of such a dataclass is the heading of its options in the help text.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _parameters_of(groups[name])
        else:
            parameters.append(parameter.replace(kind=_NAMED, annotation=hints[name]))

    def flat(**values: Any) -> None:
        built = {name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**values, **built)

    flat.__name__, flat.__doc__ = command.__name__, command.__doc__
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    return flat


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            _NAMED,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=_under_heading(hints[field.name], group.panel),
        )
        for field in fields(group)
    ]


def _under_heading(annotation: Any, heading: str) -> Any:
    kind, option = get_args(annotation)
    assert isinstance(option, OptionInfo)
    shown = copy.copy(option)
    shown.rich_help_panel = heading
    return Annotated[kind, shown]


def options_given(group: Any, *names: str) -> list[str]:
    """Return the flags of a group, or of those fields of it, whose value is not the default, as in `--top-p`."""
    chosen = [field for field in fields(group) if not names or field.name in names]
    return [flag(field.name) for field in chosen if getattr(group, field.name) != field.default]


def flag(name: str) -> str:
    """Return the option of a parameter: `--top-p` for `top_p`."""
    return "--" + name.replace("_", "-")
