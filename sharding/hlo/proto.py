"""HLO modules, read from the messages that XLA serialises them as, which is how traces hold them."""

from __future__ import annotations

from .text import HloModule, parse_hlo


def module_of_proto(serialised: bytes) -> HloModule | None:
    """Return the module of a serialised ``HloModuleProto``, None where it is damaged or XLA cannot read it.

    The reader is `jaxlib._hlo`, seen in 0.10.2, 0.11.2 and 0.12.0.
    """
    try:
        from jaxlib import _hlo  # pyright: ignore[reportAttributeAccessIssue]

        return parse_hlo(_hlo.HloModule.from_serialized_hlo_module_proto(serialised).to_string())
    except (ImportError, AttributeError, RuntimeError, ValueError):
        return None
