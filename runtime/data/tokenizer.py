"""Text to token ids and back: bytes, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ...sharding.errors import UserError, nearest, one_line
from ...sharding.files import expanded
from .sources import no_such_file

_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


class Tokenizer(Protocol):
    """Text to ids and back.

    `encode` adds no special ids and never reads one out of the text. A document is
    ``[bos_id (unless None), *encode(text), eos_id]``. `fingerprint` changes when any encoding might.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32 `[tokens]`."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, as unsigned integers of any width."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special ids left out and broken characters replaced."""
        ...


class ByteTokenizer:
    """Every byte of the UTF-8 text is its own id; 256, 257 and 258 begin, end and pad."""

    name: str = "bytes"
    vocab_size: int = 259
    bos_id: int | None = 256
    eos_id: int = 257
    pad_id: int = 258
    fingerprint: str = "bytes-1"

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes of `text`, int32 `[bytes]`."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the bytes of each text, uint8."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text whose bytes are `ids`; ids from 256 on are left out."""
        return bytes(int(i) for i in ids if 0 <= int(i) < 256).decode("utf-8", "replace")


class HuggingFaceTokenizer:
    """A tokenizer.json, read by the `tokenizers` package; see `load_tokenizer`."""

    def __init__(
        self, path: pathlib.Path, *, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        self._tokenizer = _read(path)
        self.name = str(path)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        declared = _declared(path.with_name("tokenizer_config.json"))
        self.bos_id = self._special("bos_token", bos_token, declared, _BOS_NAMES)
        eos_id = self._special("eos_token", eos_token, declared, _EOS_NAMES)
        if eos_id is None:
            special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
            raise UserError(
                f"tokenizer {path} does not say which token ends a document; set data.eos_token to one of "
                f"its special tokens ({', '.join(special[:8]) or 'it has none'})"
            )
        self.eos_id = eos_id
        pad_id = self._special("pad_token", None, declared, _PAD_NAMES)
        self.pad_id = eos_id if pad_id is None else pad_id
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        self.fingerprint = f"tokenizer.json-1 {digest} {self.bos_id} {self.eos_id}"

    def _special(
        self, field: str, asked: str | None, declared: Mapping[str, Any], usual: Sequence[str]
    ) -> int | None:
        if asked is not None:
            found = self._tokenizer.token_to_id(asked)
            if found is None:
                known = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
                raise UserError(
                    f"data.{field}={asked!r} is not a token of {self.name}; {nearest(asked, known)}"
                )
            return found
        stated = declared.get(field)
        stated = stated.get("content") if isinstance(stated, dict) else stated
        names = [stated, *usual] if isinstance(stated, str) else usual
        return next((i for i in map(self._tokenizer.token_to_id, names) if i is not None), None)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32 `[tokens]`."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, uint32; the texts are worked through on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(name: str, *, bos_token: str | None = None, eos_token: str | None = None) -> Tokenizer:
    """Return the tokenizer `name`: "bytes", or the path of a tokenizer.json or of a folder that has one.

    Raises UserError when there is no such file, it is not a tokenizer, or `tokenizers` is not installed.
    """
    if name == "bytes":
        for field, value in (("bos_token", bos_token), ("eos_token", eos_token)):
            if value is not None:
                raise UserError(
                    f"data.{field}={value!r} is for a tokenizer.json; tokenizer=bytes has its own special ids"
                )
        return ByteTokenizer()
    path = expanded(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"data.tokenizer={name!r} is neither 'bytes' nor a tokenizer.json: {no_such_file(path)}"
        )
    return HuggingFaceTokenizer(path, bos_token=bos_token, eos_token=eos_token)


def _read(path: pathlib.Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f'tokenizer {path} needs the package tokenizers; pip install "meshwright[hf]", '
            "or take tokenizer=bytes"
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception for whatever is wrong with the file
        raise UserError(f"{path} is not a tokenizer.json: {one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Text that happens to spell a special token must not end a document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _declared(path: pathlib.Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return tree if isinstance(tree, dict) else {}
