"""One typed tree holds every setting of a run; a YAML file and ``section.key=value`` words fill it.

Unknown keys are refused with the nearest known one, and nothing in a file can run code: YAML is
safe-loaded, and the only names that are imported are an explicit ``module:function`` in `model.build`.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from ...sharding.errors import UserError, nearest, one_line
from ...sharding.files import expanded
from ..checkpoint.config import CheckpointConfig
from ..data.config import DataConfig
from ..profiling.config import ProfileConfig
from .hosts import HostsConfig
from .optimizer import OptimizerConfig
from .section import Section

Count = Annotated[int, Field(ge=1)]


class ModelConfig(Section):
    """Which model is trained: a preset, changed where `overrides` says so, or a function of your own."""

    preset: str | None = Field(
        default="tiny", description="Name of a decoder preset; `meshwright config --presets` lists them."
    )
    overrides: dict[str, Any] = Field(
        default={}, description="Fields of the preset to change, e.g. {layers: 4, compute_dtype: bfloat16}."
    )
    build: str | None = Field(
        default=None,
        description="`module:function` that returns a meshwright.models.Model; takes the place of `preset`. "
        "The module is imported, so its code runs.",
    )
    arguments: dict[str, Any] = Field(default={}, description="Keyword arguments for `build`.")
    reduced: dict[str, Any] = Field(
        default={},
        description="Fields of the preset, or arguments of `build`, that make a small model of its kind, "
        "which `meshwright plan CONFIG --check` tries the plan with. It finds those of a preset by itself.",
    )
    trainable: str | list[str] | dict[str, bool] | None = Field(
        default=None,
        description="Which parameters are trained: a pattern over their paths or several, which are trained "
        'alone, or patterns → bool, e.g. {"embed/*": false}. Null leaves it to the model, whose parameters '
        "are all trained unless it says otherwise.",
    )

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.build is not None and ("preset" in self.model_fields_set and self.preset is not None):
            raise ValueError(f"give preset={self.preset!r} or build={self.build!r}, not both")
        if self.build is None and self.preset is None:
            raise ValueError("give a preset or a build function")
        if self.build is not None and self.build.count(":") != 1:
            raise ValueError(f"build={self.build!r} is not of the form module:function")
        if self.build is None and self.arguments:
            raise ValueError(f"arguments={self.arguments!r} are for build, which is not given")
        if self.build is not None and self.overrides:
            raise ValueError(f"overrides={self.overrides!r} change a preset; build takes arguments")
        return self


class TrainConfig(Section):
    """How long, on how much at once, and how often the run is looked at."""

    steps: Count = Field(default=200, description="Optimiser steps in the whole run.")
    global_batch: Count = Field(
        default=32,
        description="Rows in a step over all devices: a multiple of batch axes times `microbatches`.",
    )
    evaluate_every: int = Field(
        default=100, ge=0, description="Steps between evaluations on held-out text; 0 for none."
    )
    evaluate_batches: Count = Field(default=4, description="Held-out global batches in one evaluation.")
    sample: str | None = Field(
        default=None, description="Prompt that the model continues when training ends; null for none."
    )
    sample_tokens: Count = Field(default=200, description="Tokens in that sample.")
    sample_temperature: float = Field(
        default=0.7, ge=0, description="Temperature of that sample; 0 takes the likeliest token."
    )
    stop_on_nan: bool = Field(
        default=True,
        description="Keep nothing of a step whose loss or gradients are not finite, and stop.",
    )
    check_accumulation: bool = Field(
        default=True,
        description="Under microbatches, try two parts of a few rows against the whole before training.",
    )
    step_timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        description="A step that takes longer counts as hung: stacks are printed and the process ends.",
    )


class MetricsConfig(Section):
    """Where the numbers of each step go, besides metrics.jsonl, which is always written."""

    console: Literal["auto", "bar", "lines", "none"] = Field(
        default="auto",
        description="A progress bar, plain lines, or nothing; `auto` takes the bar in a terminal.",
    )
    console_every: Count = Field(default=10, description="Steps between plain lines.")
    tensorboard: bool = Field(
        default=False, description="Write TensorBoard events too (extra `tensorboard`)."
    )


Axes = str | list[str | list[str] | None] | None


class Config(Section):
    """A whole run."""

    name: str = Field(
        default="run", pattern=r"^[\w.-]+$", description="Names the run; letters, digits, `.`, `_`, `-`."
    )
    run: str = Field(default="runs/{name}", description="Run folder; `{name}` stands for the name above.")
    seed: int = Field(
        default=0, ge=0, description="Decides the parameters' first values and the order of the data."
    )
    topology: str | None = Field(
        default=None,
        description="Devices to train on, e.g. `cpu:8` (simulated), `v5p:4x4x8`, `h100:2x8`; "
        "null takes what is attached.",
    )
    plan: str = Field(
        default="declared",
        min_length=1,
        description="`declared` lays the model out as `mesh` and `rules` say; `auto` searches for the "
        "fastest layout that fits and keeps what is declared; anything else is the file of a saved plan, "
        "looked for from the working directory.",
    )
    mesh: dict[str, int] | None = Field(
        default=None,
        description="Mesh axes (data, fsdp, tensor, context, expert, stage) and sizes; one may be -1 to take "
        "the rest. Null leaves them to the plan; where that is `declared`, {fsdp: -1}.",
    )
    rules: dict[str, Axes] = Field(
        default={},
        description="Named dimension or parameter path pattern → mesh axes, on top of the defaults, "
        'e.g. {embed: fsdp, "embedding/*": [tensor, fsdp]}.',
    )
    remat: Literal["none", "dots", "full"] | dict[str, Literal["device", "host"]] | None = Field(
        default=None,
        description="What a layer's forward pass keeps for its backward pass: everything, the results of "
        "its products with parameters, nothing but its input, or the values named, e.g. {mlp/up: device}. "
        "Null leaves it to the plan; where that is `declared`, none.",
    )
    microbatches: Count | None = Field(
        default=None,
        description="Parts a step's batch is worked through in (gradient accumulation). Null leaves it to "
        "the plan; where that is `declared`, 1.",
    )
    schedule: Literal["1f1b", "delayed"] | None = Field(
        default=None,
        description="The order in which declared pipeline stages work: `1f1b`, one forward and one backward, "
        "or `delayed`, that with gradients of layers' weights put off, so that stages wait less and hold "
        "more. Null leaves it to the plan; where that is `declared`, 1f1b.",
    )
    interleave: Count | None = Field(
        default=None,
        description="Chunks of layers that a declared pipeline stage holds: with v of them it waits 1/v as "
        "long. Null leaves it to the plan; where that is `declared`, 1.",
    )
    stage_remat: bool | None = Field(
        default=None,
        description="Whether a declared pipeline stage keeps its chunks' inputs alone and runs them again on "
        "the way back, or what `remat` keeps of their layers, in more memory. Null leaves it to the plan; "
        "where that is `declared`, true.",
    )
    accumulation: Literal["exact", "by part"] = Field(
        default="exact",
        description="What microbatches give: `exact`, the whole batch's value and gradients, proved or "
        "refused, or `by part`, the mean of what parts give.",
    )
    max_passes: Count = Field(
        default=3,
        description="Passes over the batch that exact accumulation may take, one and one more for each sum "
        "over the examples that another waits for.",
    )
    attention: Literal["auto", "xla", "splash", "cudnn", "cudnn_packed"] = Field(
        default="auto",
        description="What computes attention: `xla`, or a kernel, `splash` (TPU), `cudnn` (GPU) or, for "
        "packed rows on Hopper and later, `cudnn_packed`; `auto` is the kernel of the chip where that can do "
        "what the model asks, one for packed rows once `meshwright doctor --kernels` has found it right on "
        "every host; the plan says where it cannot.",
    )
    context: Literal["gathered", "heads", "ring", "neighbours"] | None = Field(
        default=None,
        description="How attention goes over the mesh axis `context`: every device gathers all keys, the "
        "sequence is traded for heads, chunks of keys go round, or those that a window reaches are fetched. "
        "Null takes the fastest that fits.",
    )
    experts: Literal["auto", "xla", "megablox", "mosaic"] = Field(
        default="auto",
        description="What multiplies tokens by their experts: `xla` (a loop over tiles), or a kernel, "
        "`megablox` (TPU) or `mosaic` (Hopper); `auto` is the kernel of the chip once it was compared there.",
    )
    arithmetic: Literal["auto", "jax"] = Field(
        default="auto",
        description="How products of bfloat16 into float32, and look-ups, are worked out: `auto`, on GPUs by "
        "gradients of bfloat16 with sums in float32, and odd vocabularies padded, or `jax`, as JAX does.",
    )
    recognise: list[Literal["attention", "losses", "layers"]] = Field(
        default=["attention", "losses", "layers"],
        description="Forms that are worked through in one way however a model writes them: `attention`, "
        "`losses` over a whole vocabulary, `layers` without a scan. The plan's notes say where.",
    )
    calibration: str | None = Field(
        default=None,
        description="File of `meshwright calibrate` by whose efficiencies to plan; null is the shipped ones.",
    )
    compilation_cache: str | None = Field(
        default="auto",
        description="Folder of compiled programs kept between runs; `auto` is the user's cache folder, "
        "null is none.",
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()
    metrics: MetricsConfig = MetricsConfig()
    hosts: HostsConfig = HostsConfig()

    @pydantic.model_validator(mode="after")
    def _best_is_measured(self) -> Config:
        if self.checkpoint.keep_best == "eval_loss" and not self.train.evaluate_every:
            raise ValueError("checkpoint.keep_best='eval_loss' is never measured with train.evaluate_every=0")
        return self

    @property
    def run_folder(self) -> pathlib.Path:
        """Folder of the run, `{name}` filled in."""
        return expanded(self.run.replace("{name}", self.name))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that takes `1e-3` for a number and a key only once, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at `path`, lay ``section.key=value`` words over it, and check the whole.

    Raises UserError, one sentence, for a missing or malformed file, an unknown key or a wrong value.
    """
    return parse(_read(pathlib.Path(path)), overrides, where=str(path))


def parse(tree: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "config") -> Config:
    """Check a tree of plain values, as `load` does for a file."""
    merged: dict[str, Any] = _copy(tree)
    for word in overrides:
        _override(merged, word)
    _refuse_unknown(merged, Config, "", where)
    try:
        return Config.model_validate(merged)
    except pydantic.ValidationError as error:
        raise UserError(_sentence(error, where)) from None


def dump(config: Config) -> str:
    """Return the resolved config as YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def fields(
    section: type[pydantic.BaseModel] = Config, prefix: str = ""
) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield (dotted key, type, default, description) for every setting, sections opened up."""
    for name, field in section.model_fields.items():
        nested = _nested(field.annotation)
        if nested is not None:
            yield from fields(nested, f"{prefix}{name}.")
        else:
            yield (
                f"{prefix}{name}",
                field.annotation,
                field.get_default(call_default_factory=True),
                field.description or "",
            )


def _nested(annotation: Any) -> type[pydantic.BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel) else None


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("[!.]*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"no config file {path}; {nearest(path.name, near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for a file of settings") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, not a mapping of settings")
    return tree


def _override(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"{word!r} is not of the form section.key=value")
    try:
        # A pattern such as *.py: in YAML a star begins the name of something written before.
        value = text if text.startswith("*") else yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"the value in {word!r} is not YAML: {one_line(error)}") from None
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{word!r}: {parent} is a value, not a section")
        tree = child
    tree[leaf] = value


def _refuse_unknown(
    tree: Mapping[str, Any], section: type[pydantic.BaseModel], prefix: str, where: str
) -> None:
    for key, value in tree.items():
        if key not in section.model_fields:
            raise UserError(
                f"{where}: there is no setting {prefix}{key}; {_nearest_key(str(key), section, prefix)}"
            )
        nested = _nested(section.model_fields[key].annotation)
        if nested is None:
            continue
        if value is None:
            raise UserError(f"{where}: section {prefix}{key} is empty; leave it out for its defaults")
        if not isinstance(value, Mapping):
            raise UserError(
                f"{where}: {prefix}{key} is a section ({', '.join(nested.model_fields)}); got {value!r}"
            )
        _refuse_unknown(value, nested, f"{prefix}{key}.", where)


def _nearest_key(key: str, section: type[pydantic.BaseModel], prefix: str) -> str:
    everywhere = [dotted for dotted, *_ in fields() if dotted.rpartition(".")[2] == key]
    if everywhere:
        return f"did you mean {' or '.join(repr(dotted) for dotted in everywhere)}?"
    here = nearest(key, section.model_fields)
    if here.startswith("did you mean"):
        return here.replace("'", f"'{prefix}", 1)
    return here if prefix else nearest(key, [dotted for dotted, *_ in fields()])


def _sentence(error: pydantic.ValidationError, where: str) -> str:
    errors = error.errors()
    # Of what is wrong with a value of several possible types, the innermost says most.
    outer = _place(errors[0])
    same = [one for one in errors if _place(one)[: len(outer)] == outer]
    first = max(same, key=lambda one: len(_place(one)))
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, (dict, pydantic.BaseModel)) else f" (got {given!r})"
    others = {_place(one) for one in errors if one not in same}
    more = f"; and {len(others)} more" if others else ""
    known = re.findall(r"'([^']+)'", str(first.get("ctx", {}).get("expected", "")))
    if isinstance(given, str) and (near := nearest(given, known)).startswith("did you mean"):
        shown += f"; {near}"
    key = ".".join(_place(first)) or "config"
    return f"{where}: {key}: {message[:1].lower()}{message[1:]}{shown}{more}"


def _place(error: Any) -> tuple[str, ...]:
    """Return where an error is, without the names of the types that the value is not."""
    types = ("list[", "dict[", "literal[", "function-")
    return tuple(str(part) for part in error["loc"] if part != "str" and not str(part).startswith(types))
