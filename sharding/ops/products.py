"""Products of grouped rows, each with the matrix of its group, by the kernel that a chip has.

Plain XLA loops over tiles of one group each. Megablox (TPUs) and Mosaic's kernels (Hopper) do the same in one
launch, and leave rows after the last group as they were in memory: never read them. `lax.ragged_dot` is
none of them: it multiplies every row by every matrix on CPUs and GPUs, and for the gradient of the matrices
on TPUs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..errors import UserError, nearest
from ..hlo.loops import turns_scope
from .grouped import TILES, Grouping, tile_of

_FACTS = Path(__file__).with_name("products.toml")

# The name scope of a kernel's call, with the rows that `Grouping.even` has it multiply.
ROWS = "meshwright_rows"

_GPU = "jax.experimental.pallas.ops.gpu"
# Sides of megablox's blocks, the most in bytes and steps in columns.
_WIDE, _LANES = 2048, 128
# What Mosaic's kernels hold at once: four steps of 64, at most 128 x 128.
_MOSAIC: dict[str, Any] = {"block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 1}


@functools.cache
def product_facts() -> Mapping[str, Mapping[str, Any]]:
    """Return kernel → what it can do, from ``products.toml``."""
    with _FACTS.open("rb") as file:
        return tomllib.load(file)


def check_products(settings: Mapping[str, Any]) -> None:
    """Raise UserError for a plan's ``kernels["experts"]`` that is not known."""
    name, known = str(settings.get("implementation")), [*product_facts()]
    if name not in known:
        raise UserError(f"kernels: experts: implementation={name!r} is no kernel; {nearest(name, known)}")
    for key in {*settings} - {"implementation"}:
        raise UserError(f"kernels: experts: {name} has no {key!r}; write implementation alone")


def products_refusal(kernel: str, x: Any, *matrices: Any) -> str | None:
    """Return why `kernel` cannot multiply rows `x` by `matrices` ``[groups, in, out]``, None if it can."""
    facts = product_facts()[kernel]
    if str(x.dtype) not in facts["dtypes"]:
        return f"it takes {' or '.join(facts['dtypes'])}, not {x.dtype}"
    odd = [size for matrix in matrices for size in matrix.shape[1:] if size % facts["width"]]
    if odd:
        return f"it takes widths in multiples of {facts['width']}, not {odd[0]}"
    if kernel == "mosaic" and not _has_mosaic():
        return f"this JAX ({jax.__version__}) does not have it"
    return None


@functools.cache
def _has_mosaic() -> bool:
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(f"{_GPU}.transposed_ragged_dot_mgpu") is not None
    return False


def grouping_of(
    kernel: str, rows: int, groups: int, *, even: float | None = None, interpret: bool = False
) -> Grouping:
    """Return how at most `rows` of `groups` lie for `kernel`; `even` is how many an even router gives them.

    >>> grouping_of("tiles", 32768, 8)
    Grouping(kernel='tiles', tile=512, even=32768, interpret=False)
    """
    even = rows if even is None else even
    least, most = (8, 4096) if kernel == TILES else product_facts()[kernel]["rows"]
    tile = tile_of(round(even), groups, least, most)
    padded = groups * -(-max(1, round(even / groups)) // tile) * tile
    return Grouping(kernel=kernel, tile=tile, even=padded, interpret=interpret)


def grouped_product(grouping: Grouping, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Return each row of `x` ``[rows, in]`` times the matrix of its group in `w` ``[groups, in, out]``.

    Groups follow each other; their `sizes` ``[groups]``, and the rows, are multiples of the grouping's tile.
    """
    if grouping.kernel == TILES:
        return _tiled(grouping, x, w, sizes)
    return _by_kernel(grouping, x, w, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(grouping: Grouping, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    cut = x.reshape(-1, grouping.tile, x.shape[1])

    def of_group(group: jax.Array, out: jax.Array) -> jax.Array:
        # Read once for all tiles of the group.
        own = w[group]

        def body(n: jax.Array, out: jax.Array) -> jax.Array:
            product = jnp.dot(cut[n], own, preferred_element_type=jnp.float32)
            return out.at[n].set(product.astype(out.dtype))

        return _over_tiles(grouping, sizes, group, body, out)

    out = jnp.zeros((*cut.shape[:2], w.shape[2]), x.dtype)
    return lax.fori_loop(0, w.shape[0], of_group, out).reshape(x.shape[0], -1)


def _over_tiles(
    grouping: Grouping, sizes: jax.Array, group: jax.Array, body: Callable[..., Any], start: Any
) -> Any:
    """Return `start` after a turn of `body` for each tile of a group, as many as a run finds there are."""
    first = (jnp.cumsum(sizes) - sizes)[group] // grouping.tile
    turns = grouping.even // grouping.tile // sizes.shape[0]
    with jax.named_scope(turns_scope(turns)):
        return lax.fori_loop(first, first + sizes[group] // grouping.tile, body, start)


def _tiled_backward(
    grouping: Grouping, kept: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = kept
    x_cut, d_cut = (y.reshape(-1, grouping.tile, y.shape[1]) for y in (x, gradient))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def of_group(group: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_x, d_w = found
        own = w[group]

        def body(n: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # Summed in the carry, one matrix large: a scan's own gradient of w adds up all groups' each turn.
            d_x, d_own = sums
            d_x = d_x.at[n].set(product("tf,df->td", d_cut[n], own).astype(d_x.dtype))
            return d_x, d_own + product("td,tf->df", x_cut[n], d_cut[n])

        d_x, d_own = _over_tiles(grouping, sizes, group, body, (d_x, jnp.zeros(own.shape, jnp.float32)))
        return d_x, d_w.at[group].set(d_own.astype(d_w.dtype))

    start = jnp.zeros(x_cut.shape, x.dtype), jnp.zeros(w.shape, w.dtype)
    d_x, d_w = lax.fori_loop(0, w.shape[0], of_group, start)
    return d_x.reshape(x.shape), d_w, None


_tiled.defvjp(lambda grouping, x, w, sizes: (_tiled(grouping, x, w, sizes), (x, w, sizes)), _tiled_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(grouping: Grouping, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return _rows(grouping, x, w, sizes)


def _kernel_backward(
    grouping: Grouping, kept: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = kept
    return _rows(grouping, gradient, w, sizes, turned=True), _matrices(grouping, x, gradient, sizes), None


_by_kernel.defvjp(
    lambda grouping, x, w, sizes: (_by_kernel(grouping, x, w, sizes), (x, w, sizes)), _kernel_backward
)


def _rows(
    grouping: Grouping, x: jax.Array, w: jax.Array, sizes: jax.Array, *, turned: bool = False
) -> jax.Array:
    """Return rows times their group's matrix, or its transpose if `turned`."""
    with jax.named_scope(f"{ROWS}[{grouping.even}]"):
        if grouping.kernel == "megablox":
            out = w.shape[1] if turned else w.shape[2]
            return _megablox().gmm(
                x,
                w,
                sizes,
                x.dtype,
                _blocks(grouping, x, out),
                transpose_rhs=turned,
                interpret=grouping.interpret,
            )
        from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

        block = _block(w.shape[1] if turned else w.shape[2])
        asked = {"block_m": grouping.tile, "block_n": block, **_MOSAIC}
        return ragged_dot_mgpu.ragged_dot(x, w, group_sizes=sizes, transpose_rhs=turned, **asked)


def _matrices(grouping: Grouping, x: jax.Array, gradient: jax.Array, sizes: jax.Array) -> jax.Array:
    """Return the gradient of the matrices: for each group its rows of `x`, transposed, times `gradient`'s."""
    with jax.named_scope(f"{ROWS}[{grouping.even}]"):
        if grouping.kernel == "megablox":
            blocks = _blocks(grouping, x, gradient.shape[1])
            turned, interpret = x.swapaxes(0, 1), grouping.interpret
            return _megablox().tgmm(turned, gradient, sizes, x.dtype, blocks, interpret=interpret)
        from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

        asked = {"block_m": _block(x.shape[1]), "block_n": _block(gradient.shape[1])}
        with _told(transposed_ragged_dot_mgpu):
            return transposed_ragged_dot_mgpu.transposed_ragged_dot(
                x, gradient, group_sizes=sizes, **asked, **_MOSAIC
            )


def _megablox() -> Any:
    # The module: the package has a function of the same name.
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def _blocks(grouping: Grouping, x: jax.Array, out: int) -> tuple[int, int, int]:
    contracted, columns = (side_of(grouping.kernel, size, x.dtype.itemsize) for size in (x.shape[1], out))
    return grouping.tile, contracted, columns


def side_of(kernel: str, size: float, item_bytes: float) -> int:
    """Return the side of a kernel's blocks along `size` columns of so many bytes each.

    Of megablox: of the fewest columns beyond their end the widest.

    Blocks of 512 rows by 1024 by 1024 read each operand half as often as 512 by 512 by 512. By libtpu's final
    schedules for v5p the matrix units are then busy for 0.99 of the kernel of rows and 0.90 of that of
    matrices, instead of 0.93 and 0.77.

    >>> [side_of("megablox", size, 2) for size in (14336, 1408, 768)], side_of("mosaic", 2048, 2)
    ([1024, 768, 768], 128)
    """
    if kernel != "megablox":
        return _block(int(size))
    most = min(_WIDE // int(item_bytes), max(int(size), _LANES))
    sides = range(most // _LANES * _LANES, 0, -_LANES)
    return min((side for side in sides if 2 * side >= most), key=lambda side: -int(size) % side)


def _block(columns: int) -> int:
    return 128 if columns % 128 == 0 else 64


# Multiprocessors of an H100 and an H200, as JAX's own kernel for rows has them.
_MULTIPROCESSORS = 132


@contextlib.contextmanager
def _told(module: Any) -> Iterator[None]:
    """Within it a kernel's module is told of a GPU where none is here to be asked for its multiprocessors."""
    if jax.devices()[0].platform == "gpu":
        yield
        return
    device = types.SimpleNamespace(core_count=_MULTIPROCESSORS)
    own = module.jax
    module.jax = _Standing(own, lambda *_: [device])
    try:
        yield
    finally:
        module.jax = own


class _Standing:
    """A module's names, with another `devices`."""

    def __init__(self, module: Any, devices: Any) -> None:
        self._module, self.devices = module, devices

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
