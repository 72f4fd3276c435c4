"""The folder of the user's cache that is ours."""

from __future__ import annotations

import os
import pathlib


def user_cache() -> pathlib.Path:
    """Return ``$XDG_CACHE_HOME/meshwright``, by default ``~/.cache/meshwright``; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return pathlib.Path(base).expanduser() / "meshwright"
