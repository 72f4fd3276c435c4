"""Rules: what a user declares about which mesh axes shard a named dimension or a parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import UserError, wrong
from .application import Application, Axes, axis_sizes, is_pattern, mentioned

if TYPE_CHECKING:
    from jax.sharding import PartitionSpec


@dataclass(frozen=True)
class Rules:
    """Mesh axes for named dimensions and for parameters.

    A key of `declared` is a named dimension (``embed``), or a pattern over parameter paths if it holds ``/``
    or ``*`` (``embed/table``, ``*/bias``). A dimension's value is an axis, a list of axes (the major one
    first), or None, which keeps it whole. A pattern's value is None, or a list or PartitionSpec with such an
    entry for each dimension; those that it leaves out stay whole. A pattern takes precedence over dimensions;
    of two patterns, one without wildcards does, then the longer. A pattern matches a whole path or the end of
    one, so that optimizer states follow their parameters.

    `defaults` are rules for dimensions that yield where they cannot hold: where the mesh has no such axis,
    where a size is not divisible, and where a declared rule uses the axis. `notes` says where they did.

    >>> rules = Rules({"embed": "fsdp", "embed/table": ["tensor", "fsdp"]})
    >>> rules.spec(("embed", "mlp"), (64, 256), {"fsdp": 4, "tensor": 2})
    P('fsdp',)
    """

    declared: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "declared", _checked(self.declared))
        object.__setattr__(self, "defaults", _checked(self.defaults))

    def with_defaults(self) -> Rules:
        """Return these rules over `DEFAULT_RULES`, for the dimensions that they do not mention."""
        return dataclasses.replace(self, defaults={**DEFAULT_RULES.defaults, **self.defaults})

    def specs(self, tree: Any, mesh: Any, names: Any = None, *, partial: bool = False) -> Any:
        """Return a tree like `tree` of PartitionSpecs, without trailing Nones.

        Args:
          tree: a pytree of arrays, or of anything with their shapes: parameters, optimizer state or both.
          mesh: a Mesh, or axis → size.
          names: a tree like the parameters whose leaves are tuples of names, one for each dimension.
          partial: whether the tree is only a part of what the rules are for, so that some may match nothing.

        Raises:
          UserError: a rule names an axis that the mesh does not have, shards an array twice over one axis,
            does not divide a size, has more entries than an array has dimensions, or matches nothing.
        """
        return Application(self.declared, self.defaults, mesh).tree(tree, names, partial)

    def shardings(self, tree: Any, mesh: Any, names: Any = None, *, partial: bool = False) -> Any:
        """Return a tree like `tree` of NamedShardings; arguments and errors are those of `specs`."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            self.specs(tree, mesh, names, partial=partial),
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )

    def spec(self, names: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
        """Return the PartitionSpec of one array of named dimensions, such as the batch's.

        Raises:
          UserError: as `specs`, except that any rule may match nothing.
        """
        for name, value in (("names", names), ("shape", shape)):
            if not isinstance(value, Sequence) or isinstance(value, str | bytes):
                raise wrong(name, value, "is no sequence with an entry for each dimension")
        return Application(self.declared, self.defaults, mesh).array(tuple(shape), tuple(names))

    def notes(self, tree: Any, mesh: Any, names: Any = None, *, partial: bool = False) -> list[str]:
        """Return a sentence for each default that yielded, with the arrays that stay whole because of it.

        Arguments and errors are those of `specs`.

        >>> import numpy as np
        >>> rules = Rules(defaults={"heads": "tensor"})
        >>> rules.notes({"bias": np.zeros(6)}, {"tensor": 4}, {"bias": ("heads",)})
        ['heads=6 stays whole in bias: tensor=4 does not divide it']
        """
        applied = Application(self.declared, self.defaults, mesh)
        applied.tree(tree, names, partial)
        return applied.notes()

    def idle_axes(self, mesh: Any) -> tuple[str, ...]:
        """Return the mesh axes longer than 1 that no rule mentions: devices along them repeat work."""
        used = {
            axis for rule in (*self.declared.values(), *self.defaults.values()) for axis in mentioned(rule)
        }
        return tuple(axis for axis, size in axis_sizes(mesh).items() if size > 1 and axis not in used)


def _checked(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return dimension → axes and pattern → entries, all as tuples; raise UserError if one can never hold."""
    if not isinstance(mapping, Mapping):
        raise UserError(f"rules are a mapping such as {{embed: fsdp}}, not {mapping!r}")
    checked: dict[str, Any] = {}
    for key, value in mapping.items():
        if not isinstance(key, str) or not key:
            raise UserError(
                f"rule {key!r}: a key is a named dimension such as embed, or a path such as embed/table"
            )
        if not is_pattern(key):
            if isinstance(value, (list, tuple)) and any(not isinstance(entry, str) for entry in value):
                raise UserError(
                    f"rule {key}: {value!r} has an entry for each dimension, which a path takes; {key} alone "
                    f"is the name of a dimension. For arrays whose path ends so write '*{key}'"
                )
            checked[key] = _axes(key, value)
        elif value is None:
            checked[key] = ()
        elif isinstance(value, (list, tuple)) or _is_spec(value):
            checked[key] = tuple(_axes(key, entry) for entry in value)
        else:
            raise UserError(
                f"rule {key}: {value!r} is no list with an entry for each dimension; write [{value}]"
            )
        flat = mentioned(checked[key])
        if twice := [axis for axis in dict.fromkeys(flat) if flat.count(axis) > 1]:
            raise UserError(
                f"rule {key} uses {twice[0]} twice in one array; an axis shards one dimension at most"
            )
    return MappingProxyType(checked)


def _is_spec(value: Any) -> bool:
    from jax.sharding import PartitionSpec

    return isinstance(value, PartitionSpec)


def _axes(key: str, value: Any) -> Axes:
    axes = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(axes, (list, tuple)) or not all(isinstance(axis, str) and axis for axis in axes):
        raise UserError(
            f"rule {key}: {value!r} is none of an axis, a list of axes and null; write for example fsdp"
        )
    return tuple(axes)


DEFAULT_RULES = Rules(
    defaults={
        "batch": ("data", "fsdp"),
        "sequence": "context",
        "embed": "fsdp",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
        "experts": "expert",
        "head_dim": None,
        "layers": None,
    }
)
