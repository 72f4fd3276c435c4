"""Multiply-adds and bytes of single instructions, against counts by hand and by trying every pair."""

import itertools

import pytest
from meshwright.sharding.compiled.flops import flops, moved_bytes, short_sums
from meshwright.sharding.hlo.text import parse_hlo

CONVOLUTION = """HloModule f, is_scheduled=true

ENTRY %main (a: bf16[{left}], b: bf16[{right}]) -> bf16[{out}] {{
  %a = bf16[{left}] parameter(0)
  %b = bf16[{right}] parameter(1)
  ROOT %c = bf16[{out}] convolution(%a, %b), {window}dim_labels={labels}
}}
"""


def _convolved(left, right, out, labels, window=""):
    program = parse_hlo(CONVOLUTION.format(left=left, right=right, out=out, labels=labels, window=window))
    return flops(program, program.instructions["c"])


def test_a_product_written_as_a_convolution():
    assert _convolved("64,2048", "2048,512", "64,512", "bf_io->bf") == 2 * 64 * 2048 * 512


def test_a_convolution_counts_no_padding():
    window = "window={size=3x3 pad=1_1x1_1}, "
    # Along 4 places a window of 3 meets 4 + 4 + 4 - 2 inputs.
    assert _convolved("1,4,4,2", "3,3,2,5", "1,4,4,5", "b01f_01io->b01f", window) == 2 * 2 * 5 * 10 * 10


def test_a_dimension_written_as_a_window_meets_each_input_once():
    # libtpu turns products over several dimensions into windows that slide over zeros.
    window = "window={size=3 pad=2_2 rhs_reversal=1}, "
    got = _convolved("16,3,4", "3,4,5", "16,5,5", "b0f_0io->b0f", window)
    assert got == 2 * 16 * 5 * 4 * 9


@pytest.mark.parametrize(
    ("size", "window", "stride", "low", "high", "holes", "spread"),
    list(itertools.product((1, 5), (1, 3), (1, 2), (0, 2), (0, 1), (1, 3), (1, 2))),
)
def test_windows_with_strides_and_holes_count_as_trying_every_pair_does(
    size, window, stride, low, high, holes, spread
):
    reach, width = (size - 1) * holes + 1, (window - 1) * spread + 1
    out = (reach + low + high - width) // stride + 1
    if out < 1:
        return
    written = (
        f"window={{size={window} stride={stride} pad={low}_{high} lhs_dilate={holes} rhs_dilate={spread}}}, "
    )
    tried = sum(
        0 <= at < reach and at % holes == 0
        for o in range(out)
        for k in range(window)
        for at in [o * stride + k * spread - low]
    )
    assert _convolved(f"1,{size},1", f"{window},1,1", f"1,{out},1", "b0f_0io->b0f", written) == 2 * tried


FUSED = """HloModule f, is_scheduled=true

%sliced (p: f32[32,1024], i: s32[], q: f32[1,1024]) -> f32[32,1024] {
  %p = f32[32,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %q = f32[1,1024]{1,0} parameter(2)
  %z = s32[] constant(0)
  ROOT %u = f32[32,1024]{1,0} dynamic-update-slice(%p, %q, %i, %z)
}

%turned (t: f32[32,1024]) -> bf16[1024,32] {
  %t = f32[32,1024]{1,0} parameter(0)
  %v = bf16[32,1024]{1,0} convert(%t)
  ROOT %w = bf16[1024,32]{1,0} transpose(%v), dimensions={1,0}
}

%taken (x: f32[32,1024], j: s32[]) -> f32[1,1024] {
  %x = f32[32,1024]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %y = s32[] constant(0)
  ROOT %s = f32[1,1024]{1,0} dynamic-slice(%x, %j, %y), dynamic_slice_sizes={1,1024}
}

ENTRY %main (a: f32[32,1024], k: s32[], r: f32[1,1024]) -> f32[32,1024] {
  %a = f32[32,1024]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %r = f32[1,1024]{1,0} parameter(2)
  %convert = bf16[1024,32]{1,0} fusion(%a), kind=kLoop, calls=%turned
  %slice = f32[1,1024]{1,0} fusion(%a, %k), kind=kLoop, calls=%taken
  ROOT %update = f32[32,1024]{1,0} fusion(%a, %k, %r), kind=kLoop, calls=%sliced
}
"""


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [
        ("update", 2 * 4096 + 4),  # the row read and the row written in place, and its number
        ("slice", 2 * 4096 + 4),
        ("convert", 32 * 1024 * (4 + 2)),
    ],
)
def test_a_fusion_moves_what_it_takes_and_gives(name, bytes_):
    program = parse_hlo(FUSED)
    assert moved_bytes(program, program.instructions[name]) == bytes_


GROUPED = """HloModule f, is_scheduled=true

ENTRY %main (s: s32[4], x: bf16[4096,512], w: bf16[4,512,256]) -> bf16[{out}] {{
  %s = s32[4] parameter(0)
  %x = bf16[4096,512] parameter(1)
  %w = bf16[4,512,256] parameter(2)
  ROOT %c = bf16[{out}] custom-call(%s, %x, %w), custom_call_target="tpu_custom_call", metadata={{{name}}}
}}
"""


@pytest.mark.parametrize("out", ["4096,256", "4,512,256"])
def test_a_kernel_of_grouped_rows_multiplies_those_that_are_there(out):
    """Rows that it has room for are twice as many, and its author's estimate is of all."""
    program = parse_hlo(GROUPED.format(out=out, name='op_name="jit(f)/meshwright_rows[2048]/gmm"'))
    assert flops(program, program.instructions["c"]) == 2 * 2048 * 512 * 256


STATED = """HloModule g, is_scheduled=true

ENTRY %main (x: bf16[4096,1024], w: bf16[2,1024,2048]) -> bf16[{out}] {{
  %x = bf16[4096,1024] parameter(0)
  %w = bf16[2,1024,2048] parameter(1)
  ROOT %gmm = bf16[{out}] custom-call(%x, %w), {of}
}}
"""
OF = (
    'custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(f)/meshwright_rows[3072]/jit(gmm)/pallas_call"}, '
    'backend_config={"custom_call_config":{"cost_estimate":{"flops":"1","bytes_accessed":"40000000"}}}'
)


@pytest.mark.parametrize(
    ("out", "moved"), [("4096,2048", 3e7), ("2,1024,2048", 8388608 + 0.75 * (4e7 - 8388608))]
)
def test_a_kernel_of_grouped_rows_moves_those_of_an_even_router(out, moved):
    """Of the 4096 that it states bytes of 3072; the gradient of matrices is written once."""
    program = parse_hlo(STATED.format(out=out, of=OF))
    assert moved_bytes(program, program.instructions["gmm"]) == pytest.approx(moved)
    assert flops(program, program.instructions["gmm"]) == 2 * 3072 * 1024 * 2048


SCATTER = """HloModule f, is_scheduled=true

%add (x: {kind}[], y: {kind}[]) -> {kind}[] {{
  %x = {kind}[] parameter(0)
  %y = {kind}[] parameter(1)
  ROOT %sum = {kind}[] add(%x, %y)
}}

ENTRY %main (t: {kind}[512,64], i: s32[96,1], u: {kind}[96,1,64]) -> {kind}[512,64] {{
  %t = {kind}[512,64] parameter(0)
  %i = s32[96,1] parameter(1)
  %u = {kind}[96,1,64] parameter(2)
  ROOT %c = {kind}[512,64] scatter(%t, %i, %u), update_window_dims={{1,2}}, to_apply=%add
}}
"""


@pytest.mark.parametrize(("kind", "numbers"), [("bf16", 96 * 64), ("f32", 0)])
def test_numbers_of_16_bits_that_a_scatter_adds_up(kind, numbers):
    program = parse_hlo(SCATTER.format(kind=kind))
    assert short_sums(program, program.instructions["c"]) == numbers


CUDNN = """HloModule f, is_scheduled=true

ENTRY %main (q: bf16[2,64,4,128], k: bf16[2,64,2,128]) -> bf16[2,4,64,128] {{
  %q = bf16[2,64,4,128] parameter(0)
  %k = bf16[2,64,2,128] parameter(1)
  %c = (bf16[2,4,64,128], u8[0]) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", {}
  ROOT %out = bf16[2,4,64,128] get-tuple-element(%c), index=0
}}
"""


@pytest.mark.parametrize(
    "written", ['"lhs_contracting_dimensions": ["3"]', '"lhs_contracting_dimensions":["3"]']
)
def test_attention_by_cudnn_is_no_plain_product(written):
    """Its settings name the products inside, on a card as XLA writes those of a product's own."""
    program = parse_hlo(CUDNN.format(f'backend_config={{"bmm1_dot_dimension_numbers":{{{written}}}}}'))
    assert flops(program, program.instructions["c"]) == 2 * 2 * 2 * 4 * 64 * 64 * 128
