"""Shapes as compilers write them, and the bytes that tiles make of them."""

import pytest
from meshwright.sharding.hlo.shapes import Array, leaves, parse_shape, total_bytes


@pytest.mark.parametrize(
    ("text", "elements", "padded"),
    [
        ("f32[1002,4096]{1,0:T(8,128)}", 1002 * 4096 * 4, 1008 * 4096 * 4),
        ("f32[32,4096,112]{1,2,0:T(8,128)}", 32 * 4096 * 112 * 4, 32 * 4096 * 112 * 4),
        ("f32[32,4096,112]{2,1,0:T(8,128)}", 32 * 4096 * 112 * 4, 32 * 4096 * 128 * 4),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30, 8 * 128 * 2),
        ("s32[]{:T(128)}", 4, 512),
        ("bf16[7,8]{1,0}", 112, 112),
        ("s4[6]{0}", 3, 3),
        ("pred[10]{0:T(512)}", 10, 512),
        ("c64[4]{0}", 32, 32),
        ("token[]", 0, 0),
    ],
)
def test_bytes_of_elements_and_of_whole_tiles(text, elements, padded):
    array = parse_shape(text)
    assert isinstance(array, Array)
    assert (array.bytes, array.padded_bytes) == (elements, padded)


def test_tuples_nest_and_carry_comments_and_memory_spaces():
    shape = parse_shape("((f32[8], /*index=1*/bf16[2,2]{1,0:T(8,128)(2,1)S(5)}), u32[]{:S(2)})")
    assert [(array.text, array.space) for array in leaves(shape)] == [
        ("f32[8]", 0),
        ("bf16[2,2]", 5),
        ("u32[]", 2),
    ]
    assert total_bytes(shape) == 32 + 8 + 4
    assert leaves(parse_shape("()")) == ()


def test_what_is_no_shape_is_refused():
    with pytest.raises(ValueError, match="not a shape: 'copy"):
        parse_shape("copy(%x)")
