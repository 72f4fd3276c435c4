"""What one would take instead on one GPU: transformers' Llama under `torch.compile`, of Llama-3.2-1B's shape.

`python benchmarks/gpu/torch_llama.py BATCH SEQUENCE` prints a JSON line: seconds of a step without segments,
scaled dot product attention, bfloat16 autocast, float32 AdamW, fused, and the loss in parts as ours has it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

_ROUNDS, _STEPS, _WARM = 3, 10, 4


def main() -> None:
    """Print the line."""
    batch, sequence = int(sys.argv[1]), int(sys.argv[2])
    torch.set_float32_matmul_precision("high")
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
        tokens = torch.randint(0, config.vocab_size, (batch, sequence + 1))
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    body = torch.compile(model.model)

    @torch.compile
    def part(hidden, targets):
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            hidden = body(input_ids=tokens[:, :-1]).last_hidden_state.flatten(0, 1)
            targets = tokens[:, 1:].flatten()
            parts = max(1, hidden.shape[0] // 4096)
            pairs = zip(hidden.chunk(parts), targets.chunk(parts), strict=True)
            loss = sum(checkpoint(part, *pair, use_reentrant=False) for pair in pairs) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(_WARM):
        loss = step()
    torch.cuda.synchronize()
    rounds = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        for _ in range(_STEPS):
            loss = step()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - begun) / _STEPS)
    row = {
        "name": "transformers and torch.compile",
        "batch": batch,
        "sequence": sequence,
        "measured_step_seconds": statistics.median(rounds),
        "loss": float(loss),
        "measured_peak_bytes": torch.cuda.max_memory_allocated(),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
