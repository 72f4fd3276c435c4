"""Trip counts of loops: written by the compiler, or interpreted from the numbers that a loop carries."""

import pytest
from meshwright.sharding.hlo.loops import loops, run_counts
from meshwright.sharding.hlo.text import parse_hlo

LOOP = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %p = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{{0}} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %step = s32[] constant({step})
  %next = s32[] {change}(%i, %step)
  ROOT %out = (s32[], f32[8]{{0}}, s32[]) tuple(%next, %x, %n)
}}

%condition (q: (s32[], f32[8], s32[])) -> pred[] {{
  %q = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[] get-tuple-element(%q), index=2
  ROOT %going = pred[] compare(%j, %bound), direction={direction}
}}

ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %first = s32[] {first}
  %last = s32[] constant({last})
  %start = (s32[], f32[8]{{0}}, s32[]) tuple(%first, %a, %last)
  %loop = (s32[], f32[8]{{0}}, s32[]) while(%start), condition=%condition, body=%body{known}
  ROOT %r = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""


def _trip_count(**parts):
    given = {
        "first": "constant(0)",
        "last": 10,
        "step": 1,
        "change": "add",
        "direction": "LT",
        "known": "",
        **parts,
    }
    return loops(parse_hlo(LOOP.format(**given)))["loop"].trip_count


@pytest.mark.parametrize(
    ("parts", "count"),
    [
        ({}, 10),
        ({"first": "constant(3)"}, 7),
        ({"step": 3}, 4),
        ({"step": 3, "direction": "LE", "last": 9}, 4),
        ({"first": "constant(9)", "last": 0, "change": "subtract", "direction": "GE"}, 10),
        ({"first": "constant(1)", "last": 100, "step": 2, "change": "multiply"}, 7),
        ({"direction": "NE"}, 10),
        ({"last": -1}, 0),
        ({"last": 40_000}, 40_000),
    ],
)
def test_trip_counts_follow_from_start_step_and_bound(parts, count):
    assert _trip_count(**parts) == count


def test_what_the_compiler_knows_is_taken():
    known = ', backend_config={"known_trip_count":{"n":"17"},"known_init_step":{"init":"0","step":"1"}}'
    assert _trip_count(known=known) == 17


def test_a_loop_that_nothing_in_the_program_bounds_is_unknown():
    assert _trip_count(first="parameter(1)") is None
    assert _trip_count(step=0) is None
    assert _trip_count(direction="NE", step=3) is None


def test_computations_run_as_often_as_all_their_callers_together():
    text = """HloModule f, is_scheduled=true

%shared (s: f32[8]) -> f32[8] {
  %s = f32[8]{0} parameter(0)
  ROOT %t = f32[8]{0} tanh(%s)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %y = f32[8]{0} call(%x), to_apply=%shared
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %y)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(5)
  ROOT %going = pred[] compare(%j, %n), direction=LT
}

%left (l: f32[8]) -> f32[8] {
  %l = f32[8]{0} parameter(0)
  ROOT %lx = f32[8]{0} call(%l), to_apply=%shared
}

%right (r: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} parameter(0)
}

ENTRY %main (a: f32[8], c: pred[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %c = pred[] parameter(1)
  %zero = s32[] constant(0)
  %b = f32[8]{0} call(%a), to_apply=%shared
  %start = (s32[], f32[8]{0}) tuple(%zero, %b)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %d = f32[8]{0} get-tuple-element(%loop), index=1
  ROOT %e = f32[8]{0} conditional(%c, %d, %d), true_computation=%left, false_computation=%right
}
"""
    program = parse_hlo(text)
    runs = run_counts(program, loops(program), lambda conditional: "left")
    assert runs == {"main": 1, "body": 5, "condition": 6, "left": 1, "shared": 7}


def test_a_loop_whose_turns_only_a_run_knows_says_how_many_to_count():
    """The scope of the loop itself, not that of one around it."""
    own = ', metadata={op_name="jit(f)/meshwright_turns[0]/while/body/meshwright_turns[12]/while"}'
    around = ', metadata={op_name="jit(f)/meshwright_turns[12]/while/body/mul/while"}'
    unknown = {"first": "parameter(1)"}
    assert _trip_count(**unknown, known=own) == 12
    assert _trip_count(**unknown, known=around) is None
