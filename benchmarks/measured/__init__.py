"""Measured training runs as programs, topologies and candidates, to score the cost model by.

Rows are CSV files that commands are given by path. Ours are here (`own_gpu_runs.csv`); those of others are
not in this repository. A row of training runs or sweeps has the columns

    source, model, params_B, n_layers, d_model, n_heads, n_kv_heads, d_ff, vocab, seq_len, global_batch_seqs,
    hardware, n_devices, dp, fsdp_zero_stage, tp, sp, cp, pp, ep, microbatch, grad_accum, recompute,
    schedule_interleave, measured_step_time_s, measured_tflops_per_device, mfu, tokens_per_s_per_device,
    peak_mem_GB_per_device, precision, framework, kind, notes

each blank where it is not known; `rows.py`, `shapes.py` and `layouts.py` say how they are read. A hand-tuned
layout of MaxText's has

    name, hw, topology, model, parallelism, per_device_batch_size, max_target_length,
    gradient_accumulation_steps, remat_policy, remat_custom, quantization, other

with objects as JSON (`tuned.py`).
"""
