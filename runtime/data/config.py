"""What a run reads, and how it is cut into rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config.section import Section


class DataConfig(Section):
    """Where the text comes from and how it becomes rows of tokens."""

    source: str = Field(
        default="stdlib",
        description="`stdlib` (the Python sources of the running interpreter's own library), or a path or "
        "glob to text, .jsonl, .parquet, .npy or .bin files, or a folder of them; write ./stdlib for a "
        "folder of that name.",
    )
    format: Literal["auto", "text", "jsonl", "parquet", "tokens"] = Field(
        default="auto",
        description="What the files hold; `auto` goes by their suffix, and takes any other for text.",
    )
    include: str | None = Field(
        default=None,
        description='Glob that a folder\'s files must match, e.g. "*.py", or with a `/` their path under it; '
        "null takes every file whose name does not begin with a dot.",
    )
    text_field: str = Field(
        default="text", description="Key of a JSONL object, or column of a Parquet file, that holds the text."
    )
    tokenizer: str | None = Field(
        default="bytes",
        description="`bytes` (256 bytes and 3 special ids), or the path of a Hugging Face tokenizer.json "
        "(extra `hf`); null only for token arrays, together with `eos_id`.",
    )
    bos_token: str | None = Field(
        default=None,
        description="Token of tokenizer.json that starts a document; null takes what tokenizer_config.json "
        "beside it or the usual names say, if any.",
    )
    eos_token: str | None = Field(
        default=None,
        description="Token of tokenizer.json that ends a document; null looks for it as for `bos_token`.",
    )
    eos_id: int | None = Field(
        default=None,
        ge=0,
        description="Id that ends a document in 1-D token arrays; null takes the tokenizer's.",
    )
    token_dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] = Field(
        default="uint16",
        description="Type of the numbers in .bin files, little-endian; .npy files say theirs.",
    )
    sequence: int = Field(default=512, ge=1, description="Length of a row, in tokens.")
    packing: bool = Field(
        default=True,
        description="Lay documents end to end and cut every `sequence` tokens; otherwise each document "
        "starts a row of its own and the rest of its last row is padding.",
    )
    segments: int | None = Field(
        default=None,
        ge=2,
        description="Most segments of a packed row, its padding counting as one, for kernels of attention "
        "that have to know; null counts them in the text. A row with more is an error, never cut.",
    )
    shuffle: bool = Field(
        default=True,
        description="Shuffle documents once and rows anew each epoch, by the run's seed; held-out rows are "
        "in one order that no seed changes.",
    )
    holdout: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="Fraction of the documents kept for evaluation, chosen by a hash of their name or text; "
        "when that would be fewer than 8 documents, the end of every document instead.",
    )
    prefetch: int = Field(
        default=2, ge=1, description="Batches held ready on the devices ahead of the step that runs."
    )
    read_threads: int = Field(
        default=0,
        ge=0,
        description="Threads that read rows ahead of the one that moves them to the devices; 0 leaves it to "
        "that one, which is fastest while the tokens fit in memory. Take some for a slow disk.",
    )
    cache: str | None = Field(
        default=None,
        description="Folder that keeps tokenised corpora between runs; null is meshwright/data in the user's "
        "cache folder.",
    )
