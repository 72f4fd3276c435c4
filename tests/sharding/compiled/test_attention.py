"""Kernels through the real compilers: what is compiled in, how often it runs, what is too large."""

from __future__ import annotations

import dataclasses
import gzip
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, declare, plan
from meshwright.sharding.compiled.flops import flops
from meshwright.sharding.hlo.text import HloModule, parse_hlo
from meshwright.sharding.ops import attention
from meshwright.sharding.plans.proof import Finding
from meshwright.sharding.verify.verify import Verdict, verify

BATCH, SEQUENCE, EMBED, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 512, 256, 4, 2, 128, 2


def loss(params: Any, batch: Any) -> Any:
    def layer(x: Any, w: Any) -> Any:
        query, key, value = (jnp.einsum("bse,ehd->bshd", x, w[name]) for name in ("query", "key", "value"))
        out = attention(query, key, value, segment_ids=batch["segments"])
        return x + jnp.einsum("bshd,hde->bse", out, w["output"]), None

    x, _ = jax.lax.scan(layer, batch["x"], params)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def program(sequence: int = SEQUENCE) -> tuple[Any, Any, Any, Any]:
    shape = jax.ShapeDtypeStruct
    params = {
        "query": shape((LAYERS, EMBED, HEADS, HEAD_DIM), jnp.bfloat16),
        "key": shape((LAYERS, EMBED, KV_HEADS, HEAD_DIM), jnp.bfloat16),
        "value": shape((LAYERS, EMBED, KV_HEADS, HEAD_DIM), jnp.bfloat16),
        "output": shape((LAYERS, HEADS, HEAD_DIM, EMBED), jnp.bfloat16),
    }
    batch = {
        "x": shape((BATCH, sequence, EMBED), jnp.bfloat16),
        "segments": shape((BATCH, sequence), jnp.int32),
    }
    return loss, params, batch, optax.sgd(1e-3)


def planned(topology: str, sequence: int = SEQUENCE, **declared: Any) -> Plan:
    *arguments, optimizer = program(sequence)
    mesh = {"fsdp": 2, "tensor": 2}
    return plan(*arguments, topology=topology, optimizer=optimizer, mesh=mesh, microbatches=1, **declared)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiled(
    plan: Plan, cache: pathlib.Path, sequence: int = SEQUENCE, *, quick: bool = False
) -> tuple[Verdict, HloModule]:
    verdict = verify(plan, *program(sequence), quick=quick)
    assert verdict.fits, verdict.message
    (text,) = cache.rglob("program.hlo.gz")
    return verdict, parse_hlo(gzip.decompress(text.read_bytes()).decode())


def kernels(program: HloModule, name: str) -> list[Any]:
    found = [one for one in program.instructions.values() if "tpu_custom_call" in one.attributes]
    return [one for one in found if f"splash_mha_{name}" in one.op_name]


@pytest.mark.parametrize(
    ("topology", "sequence"),
    # The second is long enough for machine code of whole blocks.
    [("v5e:2x2", SEQUENCE), pytest.param("v5p:2x2x1", 4096, marks=pytest.mark.slow)],
)
def test_each_device_runs_the_kernel_on_its_rows_and_heads(
    topology: str, sequence: int, own_cache: pathlib.Path
) -> None:
    made = planned(topology, sequence, remat="none")
    assert made.kernels == {"attention": {"implementation": "splash", "block_q": 1024, "block_kv": 1024}}
    _, text = compiled(made, own_cache, sequence)
    forward, of_keys, of_queries = (kernels(text, name) for name in ("fwd", "dkv", "dq"))
    assert forward
    assert len(forward) == len(of_keys) == len(of_queries)
    # Rows over fsdp, heads over tensor; two products forward, three and four for the gradients, of which a
    # causal mask leaves one more than half.
    pairs = (BATCH // 2) * (HEADS // 2) * sequence * (sequence + 1) / 2
    assert flops(text, forward[0]) == 2 * pairs * 2 * HEAD_DIM
    assert flops(text, of_queries[0]) == 3 * pairs * 2 * HEAD_DIM
    assert flops(text, of_keys[0]) == 4 * pairs * 2 * HEAD_DIM
    assert f"[{BATCH // 2},{HEADS // 2},{sequence},{HEAD_DIM}]" in forward[0].shape


def test_queries_behind_their_neighbours_keys_see_whole_windows() -> None:
    """A device that has fetched as many keys as its own: no query stands at the beginning."""
    text = """HloModule step

ENTRY %main (q: bf16[2,8,512,128], k: bf16[2,4,1024,128], v: bf16[2,4,1024,128]) -> f32[2,8,512,128] {
  %q = bf16[2,8,512,128]{3,2,1,0} parameter(0)
  %k = bf16[2,4,1024,128]{3,2,1,0} parameter(1)
  %v = bf16[2,4,1024,128]{3,2,1,0} parameter(2)
  ROOT %call = f32[2,8,512,128]{3,2,1,0} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", """
    scope = "meshwright_attention[causal,window=512]/"
    told = 'metadata={{op_name="jit(step)/{}splash_mha_fwd_no_residuals/splash_mha_fwd"}}\n}}\n'
    behind = told.format(scope + "meshwright_attention[before=512,causal,window=512]/")
    module, inside = parse_hlo(text + told.format(scope)), parse_hlo(text + behind)
    each = 2 * 8 * 512 * 2 * (128 + 128)
    assert flops(module, module.instructions["call"]) == each * (512 * 1024 - 512 * 511 / 2) / 1024
    assert flops(inside, inside.instructions["call"]) == each * 512


@pytest.mark.slow
def test_pieces_of_a_ring_compute_what_the_whole_call_does(own_cache: pathlib.Path) -> None:
    """Two chunks of a causal sequence: a piece sees what is before it, or all there is."""
    *arguments, optimizer = program(2048)
    done = []
    for mesh in ({"fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2}):
        told = {
            "topology": "v5e:2x2",
            "optimizer": optimizer,
            "mesh": mesh,
            "microbatches": 1,
            "remat": "none",
        }
        made = plan(*arguments, **told, **({"context": "ring"} if "context" in mesh else {}))
        proof = verify(made, *program(2048), quick=True).proof
        assert proof is not None
        done.append(proof.flops)
    assert done[1] == pytest.approx(done[0], rel=0.01)


@pytest.mark.slow
def test_what_is_kept_by_name_is_not_computed_again(own_cache: pathlib.Path) -> None:
    forwards = {}
    for remat in ("full", {"output:in": "device"}):
        made = planned("v5e:2x2", remat=remat)
        _, text = compiled(made, own_cache, quick=True)
        forwards[str(remat)] = len(kernels(text, "fwd")) / len(kernels(text, "dq"))
        for entry in own_cache.rglob("program.hlo.gz"):
            entry.unlink()
    assert list(forwards.values()) == [2, 1]


@pytest.mark.slow
def test_cudnn_is_compiled_in_for_a_gpu_that_is_not_here(own_cache: pathlib.Path) -> None:
    made = planned("h100:1x4", remat="none")
    assert made.kernels == {"attention": {"implementation": "cudnn"}}
    verdict, text = compiled(made, own_cache)
    forward, backward = cudnn_calls(text, "fmhaScaleBiasSoftmax")
    # A chunk of half of the queries, which sees half of the keys, and one that sees all.
    heads = (BATCH // 2) * (HEADS // 2)
    pairs = [heads * SEQUENCE // 2 * keys for keys in (SEQUENCE // 2, SEQUENCE)]
    assert sorted({flops(text, one) for one in forward}) == [4 * n * HEAD_DIM for n in pairs]
    assert sorted({flops(text, one) for one in backward}) == [10 * n * HEAD_DIM for n in pairs]
    assert not squared(verdict)


def test_cudnn_takes_packed_rows_as_they_are(own_cache: pathlib.Path) -> None:
    made = planned("h100:1x4", remat="none", attention="cudnn_packed", segments=8)
    assert made.kernels == {"attention": {"implementation": "cudnn_packed", "segments": 8}}
    verdict, text = compiled(made, own_cache)
    forward, backward = cudnn_calls(text, "fmhaSoftmax")
    pairs = (BATCH // 2) * (HEADS // 2) * SEQUENCE * (SEQUENCE + 1) / 2
    assert flops(text, forward[0]) == 2 * pairs * 2 * HEAD_DIM
    assert flops(text, backward[0]) == 5 * pairs * 2 * HEAD_DIM
    assert not squared(verdict)
    # Compiled without cuDNN, which works in gradients of queries for each of a row's eight runs, and of keys
    # and values for each head.
    assert verdict.proof is not None
    queries = BATCH // 2 * SEQUENCE * HEADS // 2 * HEAD_DIM
    assert 0 < verdict.proof.memory["scratch"] <= 8 * queries * 4 * 2
    assert max(row.bytes for row in verdict.proof.buffers) == 8 * queries * 4 * 2


@pytest.mark.slow
def test_one_chunk_s_mask_is_held_at_a_time(own_cache: pathlib.Path) -> None:
    """Those of all chunks of a device's two rows would be more than half of the sequence squared."""
    sequence = 8192
    made = planned("h100:1x4", sequence, remat="none")
    made = dataclasses.replace(made, kernels={"attention": {"implementation": "cudnn"}})
    verdict, _ = compiled(made, own_cache, sequence)
    assert verdict.proof is not None
    shapes = [one.shape for one in verdict.proof.buffers]
    assert (
        len([one for one in shapes if re.fullmatch(rf"bf16\[{BATCH // 2},{sequence // 8},\d+\]", one)]) == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("asks", [False, True])
def test_cudnn_works_a_ring_through_where_a_plan_asks(asks: bool, own_cache: pathlib.Path) -> None:
    names = dict.fromkeys("qkv", ("embed", "heads", "head_dim"))

    def of_rows(params: Any, batch: Any) -> Any:
        query, key, value = (jnp.einsum("bse,ehd->bshd", batch["x"], params[n]) for n in "qkv")
        return jnp.mean(jnp.square(attention(query, key, value).astype(jnp.float32)))

    weights = jax.ShapeDtypeStruct((EMBED, HEADS, HEAD_DIM), jnp.bfloat16)
    arguments = dict.fromkeys("qkv", weights), {"x": jax.ShapeDtypeStruct((4, 2048, EMBED), jnp.bfloat16)}
    optimizer = optax.sgd(1e-3)
    declared: dict[str, Any] = {"mesh": {"data": 2, "context": 2}, "context": "ring", "topology": "h100:1x4"}
    made = declare(of_rows, *arguments, optimizer=optimizer, names=names, **declared)
    assert any("no card has compared cudnn's pieces" in note for note in made.notes)
    if asks:
        made = dataclasses.replace(made, kernels={"attention": {"implementation": "cudnn", "pieces": True}})
    assert verify(made, of_rows, *arguments, optimizer).fits
    (text,) = own_cache.rglob("program.hlo.gz")
    assert (b"__cudnn$fmha" in gzip.decompress(text.read_bytes())) == asks


def cudnn_calls(text: HloModule, name: str) -> tuple[list[Any], list[Any]]:
    """Return the calls of a kernel of cuDNN's forward, and as many for the gradient; there are no others."""
    calls = [one for one in text.instructions.values() if "__cudnn$fmha" in one.attributes]
    forward = [one for one in calls if f'__cudnn${name}"' in one.attributes]
    backward = [one for one in calls if f'__cudnn${name}Backward"' in one.attributes]
    assert forward
    assert len(forward) == len(backward) == len(calls) / 2
    return forward, backward


@pytest.mark.slow
def test_plain_attention_where_it_is_asked_for(own_cache: pathlib.Path) -> None:
    made = planned("v5e:2x2", attention="xla")
    assert not made.kernels
    verdict, text = compiled(made, own_cache, quick=True)
    assert not kernels(text, "")
    found, *_ = squared(verdict)
    assert f"[2,2,1,{SEQUENCE},2,{SEQUENCE}]" in found.what
    assert found.source is not None
    assert found.source.file.endswith("test_attention.py")


def squared(verdict: Verdict) -> list[Finding]:
    assert verdict.proof is not None
    return [one for one in verdict.proof.findings if one.kind == "sequence_squared"]


@pytest.mark.slow
def test_blocks_that_do_not_fit_are_told_from_too_little_memory() -> None:
    made = planned("v5e:2x2", sequence=2048)
    large = {"implementation": "splash", "block_q": 2048, "block_kv": 2048}
    verdict = verify(dataclasses.replace(made, kernels={"attention": large}), *program(2048))
    assert verdict.outcome == "vmem_overflow"
    assert "a kernel needs more of the chip's own memory than it has" in verdict.message
