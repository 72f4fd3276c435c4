"""Rows of measured runs: what they leave out or state twice is read as the frameworks and the numbers say."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from measured.layouts import candidate
from measured.programs import traced
from measured.rows import parse
from measured.shapes import NotExpressible

COLUMNS = [
    "source",
    "model",
    "params_B",
    "n_layers",
    "d_model",
    "n_heads",
    "n_kv_heads",
    "d_ff",
    "vocab",
    "seq_len",
    "global_batch_seqs",
    "hardware",
    "n_devices",
    "dp",
    "fsdp_zero_stage",
    "tp",
    "sp",
    "cp",
    "pp",
    "ep",
    "microbatch",
    "grad_accum",
    "recompute",
    "schedule_interleave",
    "measured_step_time_s",
    "measured_tflops_per_device",
    "mfu",
    "tokens_per_s_per_device",
    "peak_mem_GB_per_device",
    "precision",
    "framework",
    "kind",
    "notes",
]
LLAMA = {
    "model": "llama3.1-8b",
    "params_B": "8.03",
    "n_layers": "32",
    "d_model": "4096",
    "n_heads": "32",
    "n_kv_heads": "8",
    "d_ff": "14336",
    "vocab": "128256",
    "seq_len": "8192",
    "global_batch_seqs": "64",
    "hardware": "H100-80GB",
    "n_devices": "16",
    "measured_step_time_s": "2.0",
    "precision": "bf16",
    "framework": "torchtitan",
}


def row(**given: object) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, "") | LLAMA | {key: str(value) for key, value in given.items()}


def test_a_small_model_of_its_size_ties_its_table_to_its_output():
    small = {"n_layers": 16, "d_model": 2048, "n_heads": 32, "n_kv_heads": 32, "d_ff": 8192, "vocab": 131072}
    assert parse(row(**small, params_B=1.34)).architecture.tied
    assert not parse(row()).architecture.tied


def test_stages_of_torchtitan_take_as_many_microbatches_and_keep_parameters_gathered():
    staged = parse(row(pp=4, schedule_interleave="Interleaved 1F1B", recompute="full")).layout
    assert (staged["microbatches"], staged["interleave"], staged["zero"]) == (4, 2, 1)
    assert parse(row()).layout["zero"] == 3


def test_counted_recomputation_was_done():
    bare = {"framework": "Megatron-LM", "microbatch": 1}
    assert parse(row(**bare)).layout["remat"] == "none"
    assert parse(row(**bare, notes="44% of peak incl. recompute")).layout["remat"] == "full"


def test_what_no_step_reaches_in_sixteen_bits_was_in_eight():
    assert parse(row(precision="", measured_tflops_per_device=727)).dtype == "float8_e4m3fn"
    assert parse(row(precision="", measured_tflops_per_device=500)).dtype == "bfloat16"


def test_of_two_batches_the_stated_rate_tells():
    # 8 x 8.03e9 operations a token, recomputation counted.
    tera = 8 * 8.03e9 * 16 * 8192 / (2.0 * 16) / 1e12
    open_ = {"framework": "Megatron-LM", "recompute": "full", "measured_tflops_per_device": tera}
    assert parse(row(**open_, notes="GBS ambiguous in source (heading says 16)")).architecture.batch == 16
    assert parse(row(**open_)).architecture.batch == 64


def test_a_mixture_is_laid_over_replicas_by_expert():
    mixture = {
        "model": "Qwen3_30B_a3B",
        "framework": "Megatron-Bridge/MCore",
        "ep": 8,
        "microbatch": 1,
        "fsdp_zero_stage": "DDP/distopt",
        **dict.fromkeys(("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab", "params_B"), ""),
    }
    run = parse(row(**mixture))
    program, tables = traced(run.architecture)
    laid = candidate(run, program)
    assert laid.num_devices == 16
    assert laid.mesh["expert"] == 8
    experts = [a for a in program.parameters if "experts" in a.names]
    assert experts
    for argument in experts:
        # Shared by the replicas that hold the same experts alone.
        over = {axis for entry in laid.optimizer[argument.index] for axis in entry if laid.mesh[axis] > 1}
        assert over == {"expert", "fsdp"}
    assert tables.layers == 48
    with pytest.raises(NotExpressible, match="mixture"):
        parse(row(**mixture | {"model": "Nemotron_3_Super"}))
