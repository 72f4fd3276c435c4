"""The tests of what differs from a commit: `python tests/touched.py [BASE]` prints their paths for pytest.

A file's test stands at its mirrored path; where there is none, the tests of its room are taken. BASE is HEAD
if it is not given, so that what is not committed counts.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What any change may break, in seconds.
ALWAYS = ("tests/test_law.py", "tests/test_api.py")


def changed(base: str) -> list[str]:
    """Return the files that differ from `base`, those that git does not track yet among them."""
    asked = (("diff", "--name-only", base), ("ls-files", "--others", "--exclude-standard"))
    return [
        line
        for words in asked
        for line in subprocess.check_output(["git", "-C", ROOT, *words], text=True).splitlines()
    ]


def tests_of(file: str) -> str | None:
    """Return the test file or folder of one file, None if it has none."""
    path = pathlib.PurePath(file)
    if path.parts[0] == "tests":
        return file if path.name.startswith("test_") and (ROOT / file).exists() else None
    if path.suffix not in (".py", ".toml") or path.parts[0] not in ("sharding", "models", "runtime"):
        return None
    mirrored = pathlib.PurePath("tests", path.parent, f"test_{path.stem}.py")
    for found in (mirrored, *mirrored.parents):
        if len(found.parts) > 2 and (ROOT / found).exists():
            return str(found)
    return None


if __name__ == "__main__":
    files = changed(sys.argv[1] if len(sys.argv) > 1 else "HEAD")
    print(*dict.fromkeys([*filter(None, map(tests_of, files)), *ALWAYS]))
