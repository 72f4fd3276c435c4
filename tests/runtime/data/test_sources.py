"""Files of each kind, and what is said about those that will not do."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import pytest
from meshwright.runtime.data import open_corpus
from meshwright.sharding.errors import UserError

TEXTS = ["Grüße, 世界", "second\nwith two lines", "third 🚀"]


def documents(corpus) -> list[str]:
    ends = corpus.ends.tolist()
    return [
        corpus.tokenizer.decode(corpus.tokens[begin:end])
        for begin, end in zip([0, *ends], ends, strict=False)
    ]


def write_jsonl(path: pathlib.Path, field: str = "text") -> pathlib.Path:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n\n" for i, text in enumerate(TEXTS)))
    return path


def write_parquet(path: pathlib.Path, field: str = "text", values: list | None = None) -> pathlib.Path:
    import pyarrow
    import pyarrow.parquet

    values = TEXTS if values is None else values
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(values))), field: values}), path)
    return path


def test_jsonl_and_parquet_give_the_same_documents(config, tmp_path) -> None:
    lines = open_corpus(config(write_jsonl(tmp_path / "a.jsonl", "body"), text_field="body"))
    table = open_corpus(config(write_parquet(tmp_path / "a.parquet")))
    assert documents(lines) == documents(table) == TEXTS
    assert lines.fingerprint == table.fingerprint
    assert lines.keys.tolist() == table.keys.tolist()


def test_a_glob_takes_the_files_in_order(config, tmp_path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"I am {name}")
    assert documents(open_corpus(config(tmp_path / "[ab].txt"))) == ["I am a", "I am b"]


def test_include_chooses_among_a_folders_files(config, tmp_path) -> None:
    folder = tmp_path / "code"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("one.py", "deep/two.py", "readme.md", ".git/three.py"):
        (folder / name).write_text(name)
    assert documents(open_corpus(config(folder, include="*.py"))) == ["deep/two.py", "one.py"]
    assert documents(open_corpus(config(folder, include="deep/*"))) == ["deep/two.py"]


def test_null_rows_of_parquet_are_counted(config, tmp_path, told) -> None:
    corpus = open_corpus(
        config(write_parquet(tmp_path / "a.parquet", values=["one", None, ""])), report=told.append
    )
    assert documents(corpus) == ["one"]
    assert corpus.skipped == {"null text": 1}
    assert "1 skipped: null text" in told[0]


def test_files_that_are_not_text_are_counted(config, tmp_path, told) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "good.txt").write_text("\ufeffgood")
    (folder / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "empty.txt").write_text("")
    corpus = open_corpus(config(folder), report=told.append)
    assert documents(corpus) == ["good"]
    assert corpus.skipped == {"not UTF-8": 1}
    assert "1 skipped: not UTF-8" in told[0]


@pytest.mark.parametrize("line", ["wörter und mehr\n", "ohne Zeilenende ü "])
def test_a_text_of_many_parts_is_one_document(config, tmp_path, line: str) -> None:
    text = line * (3_000_000 // len(line.encode()))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    assert documents(open_corpus(config(tmp_path / "long.txt"))) == [text]


def test_the_first_bad_byte_of_a_long_file_is_found(config, tmp_path) -> None:
    content = ("ü" * 700_000).encode() + b"\xff" + b"tail"
    (tmp_path / "long.txt").write_bytes(content)
    with pytest.raises(UserError, match="byte 1400000 does not decode"):
        open_corpus(config(tmp_path / "long.txt"))


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("lines.jsnl", {}, r"there is no 'lines.jsnl' in .*; did you mean 'lines.jsonl'\?"),
        ("fodler/a.txt", {}, r"there is no 'fodler' in .*; did you mean 'folder'\?"),
        ("*.csv", {}, r"matches no file; .* holds .*lines\.jsonl"),
        ("folder", {"include": "*.py"}, r"no file in folder .* matches '\*\.py'; it holds 2 \.txt, 1 \.md"),
        ("folder", {"format": "jsonl"}, r"no file in folder .* is jsonl; it holds 2 \.txt, 1 \.md"),
        ("nothing", {}, r"folder .*nothing is empty"),
        ("mixed", {}, r"mixes kinds \(1 text, 1 jsonl\); choose with data\.format or data\.include"),
        ("blank.txt", {}, r"holds no text in its one file"),
        (
            "lines.jsonl",
            {"text_field": "txt"},
            r"lines\.jsonl:1 has no key 'txt'.*did you mean 'text'\?.*id, text",
        ),
        ("lines.jsonl", {"text_field": "id"}, r"lines\.jsonl:1: 'id' is int, not text"),
        ("broken.jsonl", {}, r"broken\.jsonl:2 is not JSON"),
        ("list.jsonl", {}, r"list\.jsonl:1 holds list, not an object with the key 'text'"),
        ("table.parquet", {"text_field": "texts"}, r"no column 'texts'.*did you mean 'text'\?"),
        ("table.parquet", {"text_field": "id"}, r"column 'id' holds int64, not text"),
        ("false.parquet", {}, r"false\.parquet is not a Parquet file"),
        ("latin.txt", {}, r"latin\.txt is not UTF-8 text: byte 2 does not decode"),
        ("folder/a.txt", {"include": "*.txt"}, r"data\.include='\*\.txt' has no effect"),
        ("folder", {"text_field": "body"}, r"data\.text_field='body' is for JSONL and Parquet"),
        ("folder", {"eos_id": 3}, r"data\.eos_id=3 is for token arrays"),
        ("folder", {"tokenizer": None}, r"tokenizer=null leaves text"),
        ("folder", {"format": "tokens"}, r"no file in folder .* is tokens"),
        (
            "folder/a.txt",
            {"format": "tokens"},
            r"format=tokens reads \.npy and \.bin files; .*a\.txt is neither",
        ),
        ("stdlib", {"format": "jsonl"}, r"format=jsonl does not fit source=stdlib"),
    ],
)
def test_a_source_that_will_not_do_is_one_sentence(
    config, tmp_path, name: str, changes, sentence: str
) -> None:
    for folder in ("folder", "nothing", "mixed"):
        (tmp_path / folder).mkdir()
    for text in ("folder/a.txt", "folder/b.txt", "folder/c.md", "mixed/a.txt"):
        (tmp_path / text).write_text("some text")
    write_jsonl(tmp_path / "lines.jsonl")
    write_jsonl(tmp_path / "mixed" / "lines.jsonl")
    write_parquet(tmp_path / "table.parquet")
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "false.parquet").write_text("no table")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    source = name if name == "stdlib" else tmp_path / name
    with pytest.raises(UserError, match=sentence) as caught:
        open_corpus(config(source, **changes))
    assert "\n" not in str(caught.value)
    cache = tmp_path / "cache"
    assert not [path for path in cache.glob("*") if path.is_dir()]


def test_parquet_without_its_package_says_what_to_install(config, tmp_path, monkeypatch) -> None:
    path = write_parquet(tmp_path / "table.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "meshwright\[parquet\]"'):
        open_corpus(config(path))


def ids(path: pathlib.Path, values, dtype) -> pathlib.Path:
    np.save(path, np.array(values, dtype))
    return path


def test_token_arrays_of_each_shape(config, tmp_path) -> None:
    flat = [1, 2, 0, 3, 4, 5, 0, 6]
    line = open_corpus(config(ids(tmp_path / "line.npy", flat, np.int64), tokenizer=None, eos_id=0))
    assert (line.tokens.tolist(), line.ends.tolist()) == (flat, [3, 7, 8])
    rows = open_corpus(config(ids(tmp_path / "rows.npy", [flat[:4], flat[4:]], np.uint32), tokenizer=None))
    assert (rows.tokens.tolist(), rows.ends.tolist()) == (flat, [4, 8])
    np.array(flat, "<u2").tofile(tmp_path / "raw.bin")
    raw = open_corpus(config(tmp_path / "raw.bin", tokenizer=None, eos_id=0))
    assert raw.fingerprint == line.fingerprint
    assert raw.max_token == 6
    assert raw.tokenizer is None
    narrow = open_corpus(config(ids(tmp_path / "narrow.npy", flat, np.uint8)))
    assert (narrow.tokens.tolist(), narrow.ends.tolist()) == (flat, [8])


def test_token_arrays_of_several_files_are_one_corpus(config, tmp_path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        ids(folder / f"{number}.npy", [number + 1] * 5, np.uint8)
    corpus = open_corpus(config(folder, tokenizer=None, eos_id=0))
    assert corpus.ends.tolist() == [5, 10, 15]
    assert len(set(corpus.keys.tolist())) == 3


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("float.npy", {}, r"holds float64, and token ids are integers"),
        ("cube.npy", {}, r"has shape \[2, 2, 2\]; token ids come as \[tokens\] or \[rows, tokens\]"),
        ("object.npy", {}, r"is not an array of numbers"),
        ("garbage.npy", {}, r"is not an array of numbers"),
        ("minus.npy", {}, r"holds the id -1"),
        ("big.npy", {}, r"holds the id 50256 and the tokenizer ends at 258; set data\.tokenizer"),
        ("odd.bin", {}, r"has 3 bytes, which is no whole number of uint16"),
        ("void.npy", {}, r"holds no tokens in its one file"),
        ("bytes.npy", {"token_dtype": "uint32"}, r"token_dtype='uint32' is for \.bin files and .* has none"),
        ("bytes.npy", {"tokenizer": None, "eos_token": "x"}, r"eos_token='x' is for a tokenizer\.json and"),
        ("empty.bin", {}, r"holds no tokens in its one file"),
    ],
)
def test_an_array_that_will_not_do_is_one_sentence(
    config, tmp_path, name: str, changes, sentence: str
) -> None:
    ids(tmp_path / "float.npy", [0.5], np.float64)
    ids(tmp_path / "cube.npy", np.zeros((2, 2, 2)), np.int32)
    ids(tmp_path / "void.npy", np.zeros((3, 0)), np.int32)
    ids(tmp_path / "bytes.npy", [1, 2], np.uint8)
    ids(tmp_path / "minus.npy", [1, -1], np.int32)
    ids(tmp_path / "big.npy", [1, 50256], np.int32)
    np.save(tmp_path / "object.npy", np.array([{}, []], object), allow_pickle=True)
    (tmp_path / "garbage.npy").write_bytes(b"not an array")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(UserError, match=sentence):
        open_corpus(config(tmp_path / name, **changes))
