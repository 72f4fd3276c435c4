"""Models that a config names by a function of the user's, and what is said of one that fails."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

import jax
import pytest
from meshwright.models import Model
from meshwright.runtime.cli import main
from meshwright.runtime.cli.main import plan
from meshwright.runtime.config import parse
from meshwright.runtime.train import build_model
from meshwright.runtime.train.planning import plan_config
from meshwright.sharding import UserError

MODULES = {
    "builds_well": "from small_models import perceptron\n",
    "imports_nothing_there": "import math\nimport a_library_that_is_not_here\n",
    "imports_it_indirectly": "import imports_nothing_there\n",
    "behind_a_door": "x = 1\nfrom a_door import model\n",
    "a_door/__init__": "from meshwright.sharding.errors import door\n"
    "__getattr__, __dir__ = door(__name__, {'model': 'inside'})\n",
    "a_door/inside": "import math\nmath.no_such_function\n",
    "calls_wrongly": "def build(width):\n    return len(width)\n",
}


@pytest.fixture(autouse=True)
def home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """The working directory, with modules of the user's."""
    (tmp_path / "a_door").mkdir()
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in {*MODULES, "a_door"}]:
        del sys.modules[name]


def build(where: str, **arguments: object) -> Model:
    return build_model(parse({"model": {"build": where, "arguments": arguments}}).model)


def refusal(where: str, **arguments: object) -> str:
    with pytest.raises(UserError) as error:
        build(where, **arguments)
    return str(error.value)


def test_a_function_in_the_working_directory_is_found() -> None:
    assert build("builds_well:perceptron", embed=8).num_parameters > 0


def test_a_module_that_is_not_there_is_named_with_where_it_was_looked_for(home: pathlib.Path) -> None:
    said = refusal("nowhere_at_all:build")
    assert f"there is no module nowhere_at_all in {home}" in said


def test_an_import_that_fails_names_its_line(home: pathlib.Path) -> None:
    cause = "No module named 'a_library_that_is_not_here'"
    place = home / "imports_nothing_there.py"
    said = refusal("imports_nothing_there:build")
    assert said == f"model.build='imports_nothing_there:build': {cause} ({place}:2)"
    said = refusal("imports_it_indirectly:build")
    assert said.endswith(f"{cause} ({home / 'imports_it_indirectly.py'}:1, {place}:2)")


def test_an_error_behind_a_lazy_door_names_its_cause_and_where_it_began(home: pathlib.Path) -> None:
    said = refusal("behind_a_door:build")
    assert "cannot import name" not in said
    assert "a_door.inside fails with AttributeError" in said
    assert "no_such_function" in said
    assert said.endswith(f"({home / 'behind_a_door.py'}:2, {home / 'a_door' / 'inside.py'}:2)")


def test_arguments_that_do_not_fit_and_an_error_within(home: pathlib.Path) -> None:
    said = refusal("calls_wrongly:build", depth=2)
    assert said.startswith("model.arguments: build (calls_wrongly:build) takes no 'depth'; ")
    said = refusal("calls_wrongly:build", widht=2)
    assert said.endswith("takes no 'widht'; did you mean 'width'?")
    said = refusal("calls_wrongly:build", width=2)
    assert said.endswith(f"object of type 'int' has no len() ({home / 'calls_wrongly.py'}:2)")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("no_syntax:build", "cannot be imported: SyntaxError: "),
        ("leaves:build", r"cannot be imported: SystemExit: 3 \(.*leaves.py:1\)"),
        ("fails:build", r"model.build='fails:build' fails: ZeroDivisionError: .* \(.*fails.py:2\)"),
        ("fails:number", "'fails:number' is of type int, no function; known: build, loss, init"),
        ("fails:biuld", "fails has no function 'biuld'; did you mean 'build'?"),
        ("./fails.py:build", "'./fails.py' is no name of a module; write fails:build"),
        (":build", "'' is no name of a module; write module:function"),
        ("fails:init", r"model.arguments: init \(fails:init\) is given nothing for key$"),
        ("shaped_wrongly:build", "flops_per_token=3 is no function"),
    ],
)
def test_what_is_wrong_with_a_function_is_one_sentence(home: pathlib.Path, where: str, says: str) -> None:
    texts = {
        "no_syntax": "def build(:\n",
        "leaves": "raise SystemExit(3)\n",
        "fails": "def build():\n    1 / 0\ndef loss(params, batch):\n    return params['none']\n"
        "def init(key):\n    1 / 0\nnumber = 3\n",
        "shaped_wrongly": "import dataclasses\nfrom small_models import perceptron\n"
        "def build():\n    return dataclasses.replace(perceptron(embed=8), flops_per_token=3)\n",
    }
    for name, text in texts.items():
        (home / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
    with pytest.raises(UserError, match=says):
        build(where)


def test_an_error_of_a_models_own_functions_names_their_line(home: pathlib.Path) -> None:
    (home / "fails_late.py").write_text(
        "import dataclasses\nfrom small_models import perceptron\n"
        "def loss(params, batch):\n    return params['none']\n"
        "def build():\n    return dataclasses.replace(perceptron(embed=8), loss=loss)\n"
    )
    words = {"model": {"preset": None, "build": "fails_late:build"}, "topology": "cpu:8"}
    with pytest.raises(UserError, match=r"the loss fails: KeyError: 'none' \(.*fails_late.py:4\)"):
        plan_config(parse({**words, "train": {"global_batch": 8}, "data": {"sequence": 8}}))


def test_planning_for_described_devices_starts_none_of_this_machine(home: pathlib.Path) -> None:
    (home / "tells.py").write_text("import jax\ndef build():\n    raise OSError(jax.config.jax_platforms)\n")
    (home / "own.yaml").write_text("model: {build: tells:build}\n")
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        with pytest.raises(UserError, match="OSError: cpu "):
            plan(home / "own.yaml", topology="v5e:2x4")
    finally:
        jax.config.update("jax_platforms", before)


def test_a_plan_that_takes_long_says_what_it_does(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "waits.py").write_text("import time\ndef build():\n    time.sleep(0.3)\n    raise OSError\n")
    (home / "own.yaml").write_text("model: {build: waits:build}\n")
    monkeypatch.setattr(main, "_SILENCE", 0.1)
    with pytest.raises(UserError, match="OSError"):
        plan(home / "own.yaml", topology="v5e:2x2")
    assert capsys.readouterr().err == "still planning: tracing the model and searching its layouts\n"
