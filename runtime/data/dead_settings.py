"""Settings that would do nothing to the source they stand beside."""

from __future__ import annotations

from ...sharding.errors import UserError
from .config import DataConfig
from .sources import Found


def refuse_dead_settings(config: DataConfig, found: Found) -> None:
    """Raise UserError for a setting that was changed and has no effect on the files of `found`."""
    source = f"{config.source!r} is {found.kind}"
    if found.kind != "tokens":
        if config.tokenizer is None:
            raise UserError(f"data.tokenizer=null leaves text unread and {source}; try tokenizer=bytes")
        _refuse(config, ("eos_id", "token_dtype"), f"is for token arrays and {source}")
    elif all(file.path.suffix.lower() != ".bin" for file in found.files):
        _refuse(config, ("token_dtype",), f"is for .bin files and {config.source!r} has none")
    if found.kind in ("text", "tokens"):
        _refuse(config, ("text_field",), f"is for JSONL and Parquet and {source}")
    if config.tokenizer is None:
        _refuse(config, ("bos_token", "eos_token"), "is for a tokenizer.json and data.tokenizer is null")


def _refuse(config: DataConfig, fields: tuple[str, ...], why: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value != DataConfig.model_fields[field].default:
            raise UserError(f"data.{field}={value!r} {why}; leave it out")
