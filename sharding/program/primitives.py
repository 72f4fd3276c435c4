"""The traits of JAX's primitives: one table, beside the rules of `op_rules` on what they do to dimensions.

A rule says how an operation's dimensions relate; a trait says what kind of operation it is, to whoever counts
work, looks for layers, follows sums over a batch, fuses kernels or rewrites a program. Every primitive with a
rule has its row here, with no trait where it is nothing more than a name.
"""

from __future__ import annotations

import enum
import functools


class Trait(enum.Flag):
    """What a primitive is. One that a user has registered a rule for has no traits."""

    NONE = 0

    # What runs a program of its own.
    CALL = enum.auto()
    """Runs one program on its operands: jit, rematerialisation, custom derivatives."""
    CHECKPOINT = enum.auto()
    """A call whose backward pass runs its program again: `jax.checkpoint`."""
    CONTROL = enum.auto()
    """Runs programs again and again, or one of several: scan, while, cond."""
    OPAQUE = enum.auto()
    """Not looked into, so that its dimensions stay whole: kernels, manual regions, calls to the host."""

    # How its dimensions correspond, where many primitives are alike.
    ELEMENTWISE = enum.auto()
    """Acts on each position by itself."""
    PASSING = enum.auto()
    """Gives each of its operands on as it is, whatever their shapes."""
    BATCHED = enum.auto()
    """Works on matrices in the last two dimensions; the leading ones are independent."""
    POOLING = enum.auto()
    """Slides a window and reduces what it sees."""

    # What it costs.
    PRODUCT = enum.auto()
    """Multiplies and sums, on the matrix unit: what layers are made of and weights are read by."""
    MOVE = enum.auto()
    """Computes nothing."""
    VIEW = enum.auto()
    """A move that gives the same numbers in another type, order or shape."""
    ANCHOR = enum.auto()
    """Gives an array whose sharding a compiler has to guess; other results follow their operands."""

    # What it is as a function.
    LINEAR = enum.auto()
    """Linear in all of its arrays together: f(a + b) = f(a) + f(b), and no gradient reads an operand."""
    PICKING = enum.auto()
    """Linear in the array that it takes numbers from; another operand, which gradients read, says which."""
    BILINEAR = enum.auto()
    """Linear in each of its arrays while the others stay the same."""
    BY_RESULT = enum.auto()
    """Its gradient is read off its result rather than its operand."""
    BY_FACTOR = enum.auto()
    """Its gradient multiplies by an array that is computed along with its result."""
    BY_MASK = enum.auto()
    """Its gradient asks where its result is its operand: a bit for each element, in a byte."""


_MOVED = Trait.MOVE | Trait.LINEAR
_VIEW = _MOVED | Trait.VIEW
_PRODUCT = Trait.PRODUCT | Trait.ANCHOR

# Traits, and the primitives that have just these.
_TABLE: tuple[tuple[Trait, str], ...] = (
    # Programs within the program.
    (Trait.CALL, "call closed_call composite custom_jvp_call custom_vjp_call eval_jaxpr jit"),
    (Trait.CALL | Trait.CHECKPOINT, "remat2"),
    (Trait.CONTROL, "scan while cond"),
    (
        Trait.OPAQUE,
        """
        shard_map pallas_call ffi_call pure_callback io_callback debug_callback debug_print
        custom_partitioning call_exported run_state core_map inspect_sharding custom_linear_solve
        linear_call custom_vmap_call scaled_matmul scaled_matmul_wrapper
        dot_product_attention_fwd_wrapper dot_product_attention_bwd_wrapper
        dot_product_attention_fp8_fwd_wrapper dot_product_attention_fp8_bwd_wrapper
        """,
    ),
    # No array result that matters to a layout, or a scalar.
    (Trait.OPAQUE, "axis_index platform_index after_all shape_assertion dim_as_value dimension_size"),
    (Trait.OPAQUE | Trait.MOVE, "create_token"),
    # Products.
    (_PRODUCT | Trait.BILINEAR, "dot_general conv_general_dilated scaled_dot"),
    (_PRODUCT, "ragged_dot_general"),
    # Views and other moves.
    (_VIEW, "transpose reshape squeeze broadcast_in_dim"),
    (_VIEW | Trait.ELEMENTWISE, "convert_element_type"),
    (_VIEW | Trait.PASSING, "copy"),
    (_MOVED, "broadcast_to rev concatenate split stack unstack tile slice pad"),
    (_MOVED | Trait.PASSING, "optimization_barrier device_put pvary"),
    (
        _MOVED | Trait.ELEMENTWISE,
        """
        stop_gradient name sharding_constraint layout_constraint reshard relayout
        with_memory_space_constraint
        """,
    ),
    (Trait.MOVE, "bitcast_convert_type iota empty empty2 random_wrap random_unwrap"),
    (Trait.MOVE | Trait.ELEMENTWISE, "random_clone"),
    # Looking up and writing at computed places.
    (Trait.MOVE | Trait.ANCHOR | Trait.PICKING, "gather"),
    (Trait.MOVE | Trait.PICKING, "dynamic_slice"),
    (Trait.MOVE, "scatter dynamic_update_slice"),
    (Trait.ANCHOR, "scatter-add"),
    (Trait.NONE, "scatter-sub scatter-mul scatter-min scatter-max"),
    # Position by position.
    (Trait.ELEMENTWISE | Trait.LINEAR, "add add_any sub neg conj complex real imag reduce_precision"),
    (Trait.ELEMENTWISE | Trait.BILINEAR, "mul"),
    (Trait.ELEMENTWISE | Trait.PICKING, "select_n"),
    (Trait.ELEMENTWISE, "and eq ge gt is_finite le lt ne not or"),
    (Trait.ELEMENTWISE, "clamp"),
    (Trait.ELEMENTWISE | Trait.BY_RESULT | Trait.BY_MASK, "max min"),
    (Trait.ELEMENTWISE | Trait.BY_RESULT, "exp exp2 rsqrt"),
    (Trait.ELEMENTWISE | Trait.BY_RESULT | Trait.BY_FACTOR, "logistic sqrt tanh"),
    (
        Trait.ELEMENTWISE | Trait.BY_FACTOR,
        """
        abs acos acosh asin asinh atan atanh cbrt cos cosh erf erf_inv erfc expm1 integer_pow log1p sin sinh
        square tan
        """,
    ),
    (
        Trait.ELEMENTWISE,
        """
        atan2 bessel_i0e bessel_i1e ceil clz digamma div eq_to floor igamma igamma_grad_a igammac le_to
        lgamma log log2 lt_to mulhi nextafter one_minus_square polygamma polynomial
        population_count pow regularized_incomplete_beta rem round shift_left shift_right_arithmetic
        shift_right_logical sign xor zeta custom_lin dce_sink tie
        threefry2x32 threefry4x32 philox2x32 philox4x32 random_fold_in random_gamma pin unpin
        """,
    ),
    # Along dimensions.
    (Trait.LINEAR, "reduce_sum cumsum fft psum"),
    (
        Trait.NONE,
        """
        reduce reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin pmax pmin
        cumprod cummax cummin cumlogsumexp
        """,
    ),
    # XLA:GPU does not hand on that their rows lie in parts: behind two of them all were gathered.
    (Trait.ANCHOR, "sort top_k approx_top_k"),
    (Trait.POOLING | Trait.LINEAR, "reduce_window_sum"),
    (
        Trait.POOLING,
        """
        reduce_window reduce_window_max reduce_window_min select_and_gather_add select_and_scatter
        select_and_scatter_add
        """,
    ),
    (
        Trait.BATCHED,
        """
        cholesky cholesky_update eig eigh geqrf hessenberg householder_product lu
        lu_pivots_to_permutation ormqr qr schur svd symmetric_product tridiagonal tridiagonal_solve
        """,
    ),
    (Trait.NONE, "triangular_solve"),
    # Drawn at random, or made out of nothing.
    (
        Trait.NONE,
        """
        random_bits random_split random_seed to_edtype from_edtype rng_bit_generator rng_uniform
        iota_2x32_shape
        """,
    ),
)


@functools.cache
def traits() -> dict[str, Trait]:
    """Return the traits of every primitive that there is a rule for, by name."""
    found: dict[str, Trait] = {}
    for trait, names in _TABLE:
        for name in names.split():
            if name in found:
                raise ValueError(f"{name} stands in two rows of the table of primitives")
            found[name] = trait
    return found


@functools.cache
def primitives(trait: Trait) -> frozenset[str]:
    """Return the names of the primitives that have `trait`.

    >>> sorted(primitives(Trait.PRODUCT))
    ['conv_general_dilated', 'dot_general', 'ragged_dot_general', 'scaled_dot']
    """
    return frozenset(name for name, found in traits().items() if trait in found)
