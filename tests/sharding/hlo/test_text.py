"""What is read from the text of a real compiled program, and from forms that only accelerators write."""

import inspect

import pytest
from meshwright.sharding.hlo.frames import is_library
from meshwright.sharding.hlo.replica_groups import axes_of_groups, axes_of_pairs
from meshwright.sharding.hlo.text import collective_kind, parse_hlo

ACCELERATOR = """HloModule jit_step, is_scheduled=true, num_partitions=4

%fused (p: f32[8]) -> f32[2] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %reduce-scatter.9 = f32[2]{0} reduce-scatter(%p), channel_id=3, replica_groups=[1,4]<=[4]
}

%wrapped (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %rotate = f32[8]{0} collective-permute(%q), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
}

ENTRY %main.7 (a: f32[8]) -> f32[2] {
  %a = f32[8]{0:T(128)} parameter(0)
  %gather-start = (f32[8], /*index=1*/f32[16]{0:T(8,128)S(1)}) all-gather-start(%a), replica_groups=[2,2]<=[4]
  %gather-done = f32[16]{0} all-gather-done(%gather-start), metadata={source_file="a b.py" source_line=12}
  %hop-start = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%a), calls=%wrapped
  %hop-update = ((f32[8]{0}), f32[8]{0}, u32[]) async-update(%hop-start)
  %hop-done = f32[8]{0} async-done(%hop-update)
  ROOT %scatter = f32[2]{0} fusion(%hop-done), calls=%fused, metadata={op_name="say \\"hi\\" {x}"}
}
"""


def test_an_asynchronous_collective_is_known_at_its_start_its_done_and_its_wrapper():
    program = parse_hlo(ACCELERATOR)
    mesh = {"data": 2, "fsdp": 2}
    assert (program.name, program.entry, program.num_devices) == ("jit_step", "main.7", 4)
    for name in ("gather-start", "gather-done"):
        collective = program.instructions[name].collective
        assert collective is not None
        assert (collective.kind, axes_of_groups(collective.groups, mesh).label) == ("all_gather", "fsdp")
    for name in ("hop-start", "hop-update", "hop-done"):
        collective = program.instructions[name].collective
        assert collective is not None
        assert (collective.kind, axes_of_pairs(collective.groups, mesh).label) == (
            "collective_permute",
            "fsdp",
        )
    scatter = program.instructions["scatter"]
    assert scatter.collective is not None
    assert scatter.collective.kind == "reduce_scatter"
    assert scatter.opcode == "fusion"
    assert scatter.op_name == r"say \"hi\" {x}"
    assert program.instructions["a"].collective is None


def test_a_source_line_written_at_the_instruction_is_read():
    source = parse_hlo(ACCELERATOR).instructions["gather-done"].source
    assert source is not None
    assert (source.file, source.line) == ("a b.py", 12)


def test_text_of_something_else_is_refused():
    with pytest.raises(ValueError, match="not the text of an HLO module: it begins with 'module @jit_f'"):
        parse_hlo("module @jit_f")


def test_opcodes_of_collectives():
    assert collective_kind("all-to-all") == "all_to_all"
    assert collective_kind("reduce-scatter-start") == "reduce_scatter"
    assert collective_kind("dot") is None


@pytest.mark.devices(8)
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5, 6, 7), (3, 1, 0, 2, 5, 4, 7, 6)])
def test_collectives_of_a_real_program_have_the_axes_and_lines_they_were_written_with(order):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices())[list(order)].reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    spec = PartitionSpec(("data", "fsdp", "tensor"))

    def communicate(x):
        total = jax.lax.psum(x, "fsdp")
        whole = jax.lax.all_gather(x, ("data", "tensor"))
        hop = jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])
        part = jax.lax.psum_scatter(x, ("data", "fsdp"), tiled=True)
        swap = jax.lax.all_to_all(x, "data", 0, 0, tiled=True)
        return (total.sum() + whole.sum() + hop.sum() + part.sum() + swap.sum())[None]

    lines, first = inspect.getsourcelines(communicate)
    mapped = jax.shard_map(communicate, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    argument = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
    program = parse_hlo(jax.jit(mapped).lower(argument).compile().as_text())

    found = {}
    for instruction in program.instructions.values():
        if (collective := instruction.collective) is not None:
            axes_of = axes_of_pairs if collective.kind == "collective_permute" else axes_of_groups
            assert instruction.source is not None
            assert instruction.source.file == __file__
            assert instruction.source.function.endswith("communicate")
            line = lines[instruction.source.line - first]
            found[line.split("jax.lax.")[1].split("(")[0]] = (
                collective.kind,
                axes_of(collective.groups, dict(mesh.shape)).label,
            )
    assert found == {
        "psum": ("all_reduce", "fsdp"),
        "all_gather": ("all_gather", "data×tensor"),
        "ppermute": ("collective_permute", "tensor"),
        "psum_scatter": ("reduce_scatter", "data×fsdp"),
        "all_to_all": ("all_to_all", "data"),
    }


STACKED = """HloModule f, is_scheduled=true

FileNames
1 "model.py"
2 "library.py"

FunctionNames
1 "outer"
2 "inner"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=3}}
2 {{file_name_id=2 function_name_id=2 line=9}}

StackFrames
1 {{file_location_id=1 parent_frame_id={outermost}}}
2 {{file_location_id=2 parent_frame_id={parent}}}

%negate (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %n = f32[8]{{0}} negate(%p), metadata={{stack_frame_id=2}}
}}

ENTRY %main (a: f32[8]) -> (f32[8], s32[]) {{
  %a = f32[8]{{0}} parameter(0)
  %k = s32[] constant(-7)
  %f = f32[8]{{0:T(256)}} fusion(%a), kind=kLoop, calls=%negate, metadata={{stack_frame_id=2}}
  ROOT %r = (f32[8]{{0}}, s32[]) tuple(%f, %k)
}}
"""


@pytest.mark.parametrize(("outermost", "parent"), [(0, 1), (1, 2)])
def test_frames_lead_from_the_innermost_line_outwards(outermost, parent):
    """Some versions of XLA write a frame's parent plus one."""
    program = parse_hlo(STACKED.format(outermost=outermost, parent=parent))
    assert [(line.file, line.line) for line in program.frames[2]] == [("library.py", 9), ("model.py", 3)]
    assert program.instructions["f"].frame == 2
    assert program.instructions["f"].source == program.frames[2][0]


def test_shapes_operands_literals_and_computations_are_kept():
    program = parse_hlo(STACKED.format(outermost=0, parent=1))
    fusion, constant = program.instructions["f"], program.instructions["k"]
    assert (fusion.shape, fusion.operands, fusion.calls) == ("f32[8]{0:T(256)}", ("a",), "negate")
    assert "kind=kLoop" in fusion.attributes
    assert constant.literal == "-7"
    assert program.computations["main"].instructions == ("a", "k", "f", "r")
    assert program.computations["main"].root == "r"
    inside = program.inside(fusion)
    assert inside is not None
    assert inside.root == "n"


@pytest.mark.parametrize("file", ["/home/me/.venv/bin/meshwright", r"C:\me\Scripts\meshwright.exe"])
def test_the_command_is_no_line_of_the_users(file):
    assert is_library(file)
    assert not is_library("/home/me/bin/meshwright/train.py")
