"""The cache of tokenised corpora: made once, whole or not at all, found out when damaged."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import sysconfig
import time

import numpy as np
import pytest
from meshwright.runtime.data import open_corpus, open_data
from meshwright.sharding import processes
from meshwright.sharding.errors import UserError


def entry(config) -> pathlib.Path:
    (found,) = [path for path in pathlib.Path(config.cache).glob("[!.]*") if path.is_dir()]
    return found


def text_of(corpus) -> list[str]:
    begins = [0, *corpus.ends[:-1]]
    return [
        corpus.tokenizer.decode(corpus.tokens[begin:end])
        for begin, end in zip(begins, corpus.ends, strict=True)
    ]


def test_documents_are_the_files_in_order_of_their_names(config, texts) -> None:
    corpus = open_corpus(config(texts))
    assert text_of(corpus) == [path.read_text() for path in sorted(texts.iterdir())]
    assert corpus.tokens[0] == corpus.tokenizer.bos_id
    assert corpus.tokens[-1] == corpus.tokenizer.eos_id


def test_a_second_opening_tokenises_nothing(config, texts, told) -> None:
    settings = config(texts)
    first = open_corpus(settings, report=told.append)
    assert len(told) == 1
    assert "40 documents" in told[0]
    again = open_corpus(settings, report=told.append)
    assert len(told) == 1
    assert np.array_equal(again.tokens, first.tokens)
    assert again.fingerprint == first.fingerprint


def test_changed_text_is_tokenised_again(config, texts, told) -> None:
    settings = config(texts)
    first = open_corpus(settings, report=told.append)
    path = texts / "07.txt"
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"says", b"SAYS"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = open_corpus(settings, report=told.append)
    assert len(told) == 2
    assert "SAYS" in text_of(changed)[7]
    assert changed.fingerprint != first.fingerprint


def test_the_fingerprint_is_of_the_text_and_not_of_its_place(config, texts, tmp_path) -> None:
    first = open_corpus(config(texts))
    moved = texts.rename(tmp_path / "elsewhere")
    assert open_corpus(config(moved, cache=str(tmp_path / "cache2"))).fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["tokens.bin", "ends.bin", "keys.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_damaged_entry_is_named_and_made_again(config, texts, told, name: str, damage: str) -> None:
    settings = config(texts)
    good = np.array(open_corpus(settings, report=told.append).tokens)
    path = entry(settings) / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2 if name != "meta.json" else 0] ^= 1
        path.write_bytes(content)
    assert np.array_equal(open_corpus(settings, report=told.append).tokens, good)
    assert "damaged" in told[1]
    assert name in told[1]
    assert [path.name for path in pathlib.Path(settings.cache).iterdir() if path.name.startswith(".")] == []
    open_corpus(settings, report=told.append)
    assert len(told) == 3


def opening(settings) -> subprocess.Popen[str]:
    program = (
        "from meshwright.runtime.data import DataConfig, open_corpus;"
        f"print(open_corpus(DataConfig.model_validate_json({settings.model_dump_json()!r})).fingerprint)"
    )
    pipe = subprocess.PIPE
    return processes.start([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True)


def test_processes_at_once_agree_and_leave_one_entry(config, texts) -> None:
    settings = config(texts)
    running = [opening(settings) for _ in range(3)]
    answers = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert {out for out, _ in answers} == {open_corpus(settings).fingerprint + "\n"}
    assert sum("tokenised" in err for _, err in answers) == 1
    assert entry(settings)
    assert [path.name for path in pathlib.Path(settings.cache).iterdir() if path.name.startswith(".")] == []


def test_a_process_waits_for_the_one_that_tokenises(config, texts) -> None:
    settings = config(texts)
    started = []

    def before_it_is_published(_: str) -> None:
        started.append(opening(settings))
        time.sleep(1.5)
        assert started[0].poll() is None

    corpus = open_corpus(settings, report=before_it_is_published)
    out, err = started[0].communicate(timeout=60)
    assert (out, err) == (corpus.fingerprint + "\n", "")


def test_without_locks_the_second_to_finish_takes_the_entry_of_the_first(config, texts, monkeypatch) -> None:
    settings = config(texts)
    monkeypatch.setattr("meshwright.sharding.files.locked", lambda *_: contextlib.nullcontext())
    nested = []

    def before_it_is_published(_: str) -> None:
        nested.append(open_corpus(settings))
        nested.append(entry(settings).stat().st_ino)

    outer = open_corpus(settings, report=before_it_is_published)
    assert outer.fingerprint == nested[0].fingerprint
    assert entry(settings).stat().st_ino == nested[1]


def test_what_a_killed_process_left_is_cleared(config, texts) -> None:
    settings = config(texts)
    open_corpus(settings)
    final = entry(settings)
    left = final.with_name(f".{final.name}.{socket.gethostname()}.gone")
    final.rename(left)
    open_corpus(settings)
    assert not left.exists()
    assert final.exists()


def test_a_cache_that_cannot_be_written_is_named(config, texts, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache folder .*file/cache cannot be written .* data\.cache"):
        open_corpus(config(texts, cache=str(tmp_path / "file" / "cache")))


def test_the_cache_lies_in_the_users_cache_folder(texts, config, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_corpus(config(texts, cache=None))
    assert any((tmp_path / "xdg" / "meshwright" / "data").iterdir())


def test_check_vocab_says_what_fits(config, texts) -> None:
    corpus = open_corpus(config(texts))
    with pytest.raises(
        UserError, match=r"ids up to 257 and the model's vocab is 256; the nearest that fits is 259"
    ):
        corpus.check_vocab(256)
    corpus.check_vocab(259)


def test_the_standard_library_is_the_default_corpus(config, told) -> None:
    data = open_data(config("stdlib", include="json/*.py"), seed=0, global_batch=2, report=told.append)
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    assert (library / "json/decoder.py").read_text() in text_of(data.corpus)
    assert not any("site-packages" in text for text in told)


def test_importing_the_package_loads_neither_jax_nor_grain() -> None:
    program = (
        "import sys; from meshwright.runtime.data import DataConfig, open_corpus; DataConfig();"
        "print([name for name in ('jax', 'grain', 'tokenizers', 'pyarrow') if name in sys.modules])"
    )
    done = processes.run([sys.executable, "-c", program], timeout_seconds=60)
    assert done.stdout == "[]\n", done.stderr
