"""Bytes and tokenizer.json."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import pytest
from meshwright.runtime.data import load_tokenizer, open_corpus
from meshwright.sharding.errors import UserError


@pytest.fixture
def hub(tmp_path: pathlib.Path):
    """Train a small tokenizer.json with the given special tokens."""

    def make(special: list[str], name: str = "tokenizer.json") -> pathlib.Path:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(["file says abcdefg " * 20], trainer)
        tokenizer.enable_truncation(8)
        tokenizer.save(str(tmp_path / name))
        return tmp_path / name

    return make


@pytest.mark.parametrize("text", ["", "plain", "Grüße, 世界 🚀", "\x00\n"])
def test_bytes_come_back(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([256, *ids, 257, 258]) == text
    assert tokenizer.vocab_size == 259


def test_a_corpus_through_tokenizer_json(config, texts, hub) -> None:
    path = hub(["<s>", "</s>", "<pad>"])
    corpus = open_corpus(config(texts, tokenizer=str(path)))
    tokenizer = corpus.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    ends = corpus.ends.tolist()
    for begin, end, file in zip([0, *ends], ends, sorted(texts.iterdir()), strict=False):
        ids = corpus.tokens[begin:end]
        assert (ids[0], ids[-1]) == (0, 1)
        assert tokenizer.decode(ids) == file.read_text()
        assert len(ids) < len(file.read_text())
    assert corpus.max_token < tokenizer.vocab_size
    # Another tokenizer is another entry of the cache.
    assert open_corpus(config(texts)).fingerprint != corpus.fingerprint


def test_text_that_spells_a_special_token_ends_no_document(config, tmp_path, hub) -> None:
    path = hub(["<s>", "</s>"])
    (tmp_path / "a.txt").write_text("before</s>after")
    corpus = open_corpus(config(tmp_path / "a.txt", tokenizer=str(path)))
    assert corpus.tokens.tolist().count(1) == 1
    assert corpus.tokenizer.decode(corpus.tokens) == "before</s>after"


def test_special_tokens_as_tokenizer_config_or_the_user_names_them(hub) -> None:
    path = hub(["<begin>", "<stop>", "</s>"])
    assert load_tokenizer(str(path)).eos_id == 2
    path.with_name("tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<begin>"}, "eos_token": "<stop>"})
    )
    tokenizer = load_tokenizer(str(path.parent))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    assert load_tokenizer(str(path), eos_token="</s>").eos_id == 2


def test_a_tokenizer_that_will_not_do_is_one_sentence(hub, tmp_path, monkeypatch) -> None:
    path = hub(["<stop>"])
    with pytest.raises(
        UserError, match=r"does not say which token ends a document; set data\.eos_token .*<stop>"
    ):
        load_tokenizer(str(path))
    with pytest.raises(UserError, match=r"data\.eos_token='<stap>' is not a token .*did you mean '<stop>'\?"):
        load_tokenizer(str(path), eos_token="<stap>")
    with pytest.raises(
        UserError, match=r"neither 'bytes' nor a tokenizer\.json: .*did you mean 'tokenizer\.json'\?"
    ):
        load_tokenizer(str(tmp_path / "tokeniser.json"))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"broken\.json is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "broken.json"))
    with pytest.raises(UserError, match=r"data\.eos_token='x' is for a tokenizer\.json"):
        load_tokenizer("bytes", eos_token="x")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r'pip install "meshwright\[hf\]"'):
        load_tokenizer(str(path), eos_token="<stop>")
