"""What a run says when it ends: how good the model is, what it writes, and where everything lies."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .config import Config
from .job import Job


def conclude(
    config: Config,
    job: Job,
    params: Any,
    *,
    step: int,
    last: Mapping[str, Any],
    reason: str | None,
    say: bool,
) -> None:
    """Print the end of a run; every process calls it, since sampling runs on all devices, and one says it."""
    finished = step >= config.train.steps
    text = _sample(config, job, params) if finished and config.train.sample is not None else None
    if not say:
        return
    if text is not None:
        print(f"\n--- a sample of {config.train.sample_tokens} tokens ---\n{text}\n---", flush=True)
    words = [f"step {step} of {config.train.steps}"]
    if "loss" in last:
        words.append(f"loss {last['loss']:.4f}")
    if "eval_loss" in last:
        unit = "byte" if config.data.tokenizer == "bytes" else "token"
        words.append(f"held-out loss {last['eval_loss']:.4f} nats a {unit}")
    if reason is not None and not finished:
        words.append(f"stopped by {reason}; the same command goes on from here")
    elif not last:
        words.append("nothing left to do; a larger train.steps goes on")
    print(f"{config.name}: {', '.join(words)}; run folder {config.run_folder}", file=sys.stderr, flush=True)


def _sample(config: Config, job: Job, params: Any) -> str | None:
    import jax
    import numpy as np

    from ..models import generate

    tokenizer = job.data.tokenizer
    if tokenizer is None or job.model.decode is None:
        return None
    assert config.train.sample is not None
    prompt = np.asarray([tokenizer.encode(config.train.sample)], np.int32)
    tokens = generate(
        job.model,
        params,
        prompt,
        max_new_tokens=config.train.sample_tokens,
        temperature=config.train.sample_temperature,
        key=jax.random.key(config.seed),
    )
    return tokenizer.decode([int(token) for token in np.asarray(tokens)[0]])
