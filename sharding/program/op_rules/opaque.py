"""Operations that are not looked into: kernels, manual regions, calls to the host.

Their dimensions stay whole; a kernel's can be described by `register_op_rule("pallas_call:<name>", …)`.
"""

from __future__ import annotations

from .rule import Rule, whole_rule, words

OPAQUE = frozenset(
    words(
        """
    shard_map pallas_call ffi_call pure_callback io_callback debug_callback debug_print
    custom_partitioning call_exported run_state core_map inspect_sharding
    dot_product_attention_fwd_wrapper dot_product_attention_bwd_wrapper
    dot_product_attention_fp8_fwd_wrapper dot_product_attention_fp8_bwd_wrapper scaled_matmul_wrapper
    scaled_matmul custom_linear_solve linear_call custom_vmap_call custom_transpose_call
    """
    )
)

# Everything here has no array result that matters to a layout, or is a scalar.
_SCALARS = words(
    """
    axis_index platform_index create_token after_all shape_assertion dim_as_value dimension_size
    """
)

RULES: dict[str, Rule] = dict.fromkeys((*sorted(OPAQUE), *_SCALARS), whole_rule)
