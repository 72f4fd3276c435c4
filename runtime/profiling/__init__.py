"""Where a step's time went: capture a window of steps, read the trace, say what took how long.

The loop drives a `ProfileWindow`, and `save_program` writes the compiled step beside the trace; `profile_run`
reads both back and `report` shows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...sharding.errors import door

if TYPE_CHECKING:
    from .config import ProfileConfig as ProfileConfig
    from .profile import Profile as Profile
    from .program import save_program as save_program
    from .read import profile_run as profile_run
    from .read import read_profile as read_profile
    from .tables import print_report as print_report
    from .tables import report as report
    from .window import ProfileWindow as ProfileWindow
    from .window import capture as capture

_HOMES = {
    "Profile": "profile",
    "ProfileConfig": "config",
    "ProfileWindow": "window",
    "capture": "window",
    "print_report": "tables",
    "profile_run": "read",
    "read_profile": "read",
    "report": "tables",
    "save_program": "program",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
