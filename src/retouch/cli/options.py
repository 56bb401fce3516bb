"""Command-line options from a technique's signature and the words of its docstring: there is no second list."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

SIMPLE = (int, float, str, bool)


def simple_type(annotation: Any) -> bool:
    """Whether a value of this type can be typed on a command line: a number, text, a switch, or one of them or
    None."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return all(part is type(None) or part in SIMPLE for part in typing.get_args(annotation))
    return annotation in SIMPLE


def technique_options(plugin: Callable[..., Any], *, leave_out: Sequence[str] = ("inplace",)) -> type[Any]:
    """A dataclass of a plug-in's keyword-only parameters, with the docstring's words as help."""
    import docstring_parser

    words = {p.arg_name: p.description for p in docstring_parser.parse(plugin.__doc__ or "").params}
    hints = typing.get_type_hints(plugin)
    fields: list[Any] = []
    for name, parameter in inspect.signature(plugin).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or name in leave_out or not simple_type(hints.get(name)):
            continue
        help_text = " ".join((words.get(name) or "").split())
        annotated = Annotated.__class_getitem__((hints[name], tyro.conf.arg(help=help_text)))  # type: ignore[attr-defined]
        fields.append((name, annotated, dataclasses.field(default=parameter.default)))
    return dataclasses.make_dataclass("TechniqueOptions", fields)


def parse(
    common: type[Any], plugin: Callable[..., Any], arguments: Sequence[str], *, prog: str, text: str
) -> tuple[Any, dict[str, Any]]:
    """Parse the options that all techniques of a room share, and the technique's own.

    Args:
        common: dataclass of the shared options.
        plugin: whose keyword-only parameters are the others.
        arguments: as typed.
        prog: what the help calls the program.
        text: what the help says it does.

    Returns:
        The shared options, and the technique's as keywords, without those that are among the shared ones.
    """

    def both(shared: Any, technique: Any) -> tuple[Any, dict[str, Any]]:
        return shared, dataclasses.asdict(technique)

    flat = tyro.conf.OmitArgPrefixes
    own = technique_options(plugin, leave_out=("inplace", *(field.name for field in dataclasses.fields(common))))
    both.__annotations__ = {"shared": flat[common], "technique": flat[own]}
    return tyro.cli(both, prog=prog, description=text, args=list(arguments))
