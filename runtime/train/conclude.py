"""What a run says when it ends: how good the model is, what it writes, and where everything lies."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...models.sampling import check_prompt, generate
from ...sharding.errors import UserError
from ..config import Config
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


def check_sample(config: Config, job: Job) -> None:
    """Raise UserError before the training for a sample that could not be drawn after it."""
    if config.train.sample is None:
        return
    if job.data.tokenizer is None:
        raise UserError("train.sample needs a tokenizer, and data.tokenizer is null; set train.sample=null")
    if not config.train.sample:
        raise UserError("train.sample is empty; give the model a character to continue, or null for none")
    try:
        check_prompt(job.model, _prompt(config, job), max_new_tokens=config.train.sample_tokens)
    except UserError as error:
        raise UserError(f"train.sample={config.train.sample!r}: {error}; null for no sample") from None


def _prompt(config: Config, job: Job) -> Any:
    """Return the tokens that a sample goes on from, int32 ``[1, prompt]``."""
    assert job.data.tokenizer is not None
    return np.asarray([job.data.tokenizer.encode(config.train.sample or "")], np.int32)


def _sample(config: Config, job: Job, params: Any) -> str:
    import jax

    assert job.data.tokenizer is not None
    tokens = generate(
        job.model,
        params,
        _prompt(config, job),
        max_new_tokens=config.train.sample_tokens,
        temperature=config.train.sample_temperature,
        key=jax.random.key(config.seed),
    )
    text = job.data.tokenizer.decode([int(token) for token in np.asarray(tokens)[0]])
    # A model may write what a terminal would take for commands.
    return "".join(
        char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text
    )
