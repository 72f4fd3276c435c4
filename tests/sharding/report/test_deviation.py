"""What a check says of a planned loss beside the plain function."""

from __future__ import annotations

from meshwright.sharding.report.deviation import deviation_document
from meshwright.sharding.report.terminal import plain_text
from meshwright.sharding.transform.deviation import Deviation


def test_experts_that_a_narrow_type_chooses_otherwise_are_told() -> None:
    apart, allowed = {None: 1e-4, "up": 1e-2}, {None: 1e-3, "up": 3e-1}
    wide = Deviation(loss=2.5, expected=2.5, apart=apart, allowed=allowed)
    narrow = Deviation(loss=2.25, expected=2.5, apart=apart, allowed=allowed, own=2.75, routed=(48, 4096))
    types = {"float32": wide, "bfloat16": narrow}
    words = " ".join(plain_text(deviation_document(types, of="a layout", tried="eight devices")).split())
    assert "in float32 loss 2.5 as planned, 2.5 by the plain function " in words
    assert (
        "in bfloat16 loss 2.25 as planned, 2.75 by the plain function in bfloat16, 2.5 by it in wider types; "
        "the plain function in bfloat16 chooses other experts than in wider types for 48 of 4,096 tokens "
        "of a layer"
    ) in words
