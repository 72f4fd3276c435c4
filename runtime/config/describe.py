"""The settings and presets in words, for the command line and for notebooks."""

from __future__ import annotations

import json
import textwrap
from typing import Any, get_args, get_origin

from ... import models
from .config import fields


def describe_settings() -> str:
    """Return every setting as YAML comments: what it means, its type, and its default as a line to copy."""
    lines: list[str] = []
    section = None
    for dotted, annotation, default, description in fields():
        head = dotted.rpartition(".")[0]
        if head != section:
            section = head
            lines.append(f"\n# section {head}" if head else "# a whole run")
        words = f"{description} [{_type_name(annotation)}]"
        lines += textwrap.wrap(words, 96, initial_indent="  # ", subsequent_indent="  # ")
        lines.append(f"{dotted}={json.dumps(default)}")
    return "\n".join(lines)


def describe_presets() -> Any:
    """Return a rich table of the model presets."""
    from rich.table import Table

    table = Table("preset", "layers", "embed", "heads", "kv heads", "mlp", "vocab", box=None)
    for name in models.presets():
        shape = models.preset(name)
        row = (shape.layers, shape.embed, shape.heads, shape.kv_heads, shape.mlp, shape.vocab)
        table.add_row(name, *(f"{value:,}" for value in row))
    return table


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is None:
        return getattr(annotation, "__name__", str(annotation))
    if str(origin) == "typing.Literal" or origin.__class__.__name__ == "_LiteralForm":
        return " | ".join(str(value) for value in arguments)
    if origin in (dict, list, tuple):
        return (
            f"{origin.__name__} of {', '.join(_type_name(a) for a in arguments)}"
            if arguments
            else origin.__name__
        )
    if getattr(origin, "__name__", "") == "Annotated":
        return _type_name(arguments[0])
    return " | ".join(_type_name(a) for a in arguments)
