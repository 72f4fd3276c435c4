"""Documentation holds: its Python runs, and the commands, files and links that it names are there."""

import contextlib
import io
import pathlib
import re
import runpy

import pytest

pytestmark = pytest.mark.numerics

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
# README's program runs in a process of its own (test_readme.py).
PROGRAMS = [page for page in PAGES if BLOCK.search(page.read_text()) and page.parent != ROOT]


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.devices(8)
@pytest.mark.parametrize("page", PROGRAMS, ids=name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, one after the other; a picture that the page shows is printed."""
    monkeypatch.chdir(tmp_path)
    text, printed = page.read_text(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n".join(BLOCK.findall(text)), name(page), "exec"), {"__name__": "__main__"})
    for shown in re.findall(r"```text\n(float32.*?)```", text, re.DOTALL):
        assert shown.strip() in printed.getvalue()


@pytest.mark.devices(8)
@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_an_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")


def test_every_command_that_is_shown_exists_and_every_command_is_shown():
    from meshwright.runtime.cli.main import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    shown = {page: set(re.findall(r"^\$ meshwright (\w+)", page.read_text(), re.MULTILINE)) for page in PAGES}
    for page, commands in shown.items():
        assert commands <= known, page
    assert shown[ROOT / "docs/howto/command-line.md"] == known


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_a_page_names_exists(page):
    text = page.read_text()
    for path in re.findall(r"(?:configs|notebooks|benchmarks|tests)/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:sharding|models|runtime|docs)/[\w./-]+\w)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
