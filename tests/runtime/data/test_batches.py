"""The batch of a step, whoever asks for it and whenever."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from meshwright.runtime.data import open_data
from meshwright.runtime.data.batches import Rows
from meshwright.sharding.errors import UserError

pytestmark = pytest.mark.numerics


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_a_batch_depends_on_seed_and_step_alone(config, texts) -> None:
    settings = config(texts)
    straight = open_data(settings, seed=7, global_batch=8)
    expected = [straight.batch(step) for step in range(30)]
    again = open_data(settings, seed=7, global_batch=8)
    assert all(same(again.batch(step), expected[step]) for step in reversed(range(30)))
    assert not same(open_data(settings, seed=8, global_batch=8).batch(0), expected[0])
    assert not same(expected[0], expected[1])


def test_an_epoch_has_every_row_once_and_the_next_another_order(config, texts) -> None:
    data = open_data(config(texts), seed=0, global_batch=1)
    rows = [data.batch(step)["tokens"].tobytes() for step in range(2 * data.num_rows)]
    first, second = rows[: data.num_rows], rows[data.num_rows :]
    in_order = open_data(config(texts, shuffle=False), seed=0, global_batch=1)
    assert len(first) > 50
    assert collections.Counter(first) == collections.Counter(second)
    assert first != second
    counted = sum(int((data.batch(step)["segment_ids"] > 0).sum()) for step in range(data.num_rows))
    assert counted in (data.num_tokens - 1, data.num_tokens)
    assert in_order.num_tokens == data.num_tokens


def test_neighbouring_seeds_share_no_epoch(config, tmp_path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line {number}\n" for number in range(500)))
    settings = config(tmp_path / "book.txt", holdout=0)
    zero, one = (open_data(settings, seed=seed, global_batch=1) for seed in (0, 1))
    second = [zero.batch(zero.num_rows + step) for step in range(zero.num_rows)]
    assert not all(same(one.batch(step), batch) for step, batch in enumerate(second))


@pytest.mark.devices(8)
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("spec", [("data",), (("data", "tensor"),), ("tensor", "data"), (None, "data")])
def test_hosts_make_their_rows_of_the_one_batch(config, texts, hosts: int, spec) -> None:
    import jax

    data = open_data(config(texts), seed=3, global_batch=8)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    indices = sharding.devices_indices_map((8, 16))
    whole = data.batch(5)
    devices = mesh.devices.flatten().reshape(hosts, -1)
    covered = set()
    for host in devices:
        rows = sorted({row for device in host for row in range(*indices[device][0].indices(8))})
        covered |= set(rows)
        mine = data.rows(5, rows)
        assert same(mine, {key: values[rows] for key, values in whole.items()})
    assert covered == set(range(8))


@pytest.mark.devices(8)
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("spec", [(), ("data",), ("data", "tensor"), (None, "tensor")])
def test_iterating_gives_the_batches_sharded_from_any_step(config, texts, spec, threads: int) -> None:
    import jax

    data = open_data(config(texts, read_threads=threads), seed=3, global_batch=8)
    sharding = jax.NamedSharding(jax.make_mesh((4, 2), ("data", "tensor")), jax.P(*spec))
    with data.iterate(1_000_003, sharding, stop_step=1_000_006) as batches:
        got = list(batches)
    assert len(got) == 3
    for step, batch in enumerate(got, 1_000_003):
        assert all(array.sharding == sharding and array.shape == (8, 16) for array in batch.values())
        assert same({key: np.asarray(array) for key, array in batch.items()}, data.batch(step))


@pytest.mark.processes(2, devices=2, timeout_seconds=60)
def test_real_processes_hold_the_rows_of_one_batch(shared_path, texts, config, monkeypatch) -> None:
    import jax
    from jax.experimental import multihost_utils

    data = open_data(config(texts, cache=str(shared_path / "cache")), seed=3, global_batch=8)
    made = []
    fill = Rows.fill
    monkeypatch.setattr(Rows, "fill", lambda rows, row, *to: (made.append(row), fill(rows, row, *to)))
    sharding = jax.NamedSharding(jax.make_mesh((4,), ("data",)), jax.P("data"))
    with data.iterate(2, sharding, stop_step=3) as batches:
        (batch,) = list(batches)
    assert len(made) == 4
    whole = {key: multihost_utils.process_allgather(array, tiled=True) for key, array in batch.items()}
    assert same(whole, data.batch(2))


def test_held_out_batches_are_fixed_and_count_each_row_once(config, texts) -> None:
    settings = config(texts, holdout=0.3)
    held_out = open_data(settings, seed=0, global_batch=64, split="eval")
    other_seed = open_data(settings, seed=1, global_batch=64, split="eval")
    batches = [held_out.batch(step) for step in range(held_out.num_batches)]
    assert held_out.num_rows % 64
    assert all(same(other_seed.batch(step), batch) for step, batch in enumerate(batches))
    full = sum(int((batch["segment_ids"] > 0).any(axis=1).sum()) for batch in batches)
    assert full == held_out.num_rows
    assert (batches[-1]["targets"][held_out.num_rows % 64 :] == -1).all()
    with pytest.raises(IndexError):
        held_out.batch(held_out.num_batches)


@pytest.mark.devices(2)
def test_iterating_over_held_out_batches_ends(config, texts) -> None:
    import jax

    held_out = open_data(config(texts, holdout=0.3), seed=0, global_batch=8, split="eval")
    sharding = jax.NamedSharding(jax.make_mesh((2,), ("data",)), jax.P("data"))
    with held_out.iterate(0, sharding) as batches:
        assert len(list(batches)) == held_out.num_batches > 1
    with held_out.iterate(0, sharding, stop_step=1) as batches:
        assert len(list(batches)) == 1


def test_splits_share_no_document(config, texts) -> None:
    settings = config(texts, holdout=0.3, packing=False, sequence=512)

    def documents(split):
        data = open_data(settings, seed=0, global_batch=1, split=split)
        return {data.tokenizer.decode(data.batch(step)["tokens"][0]) for step in range(data.num_rows)}

    train, held_out = documents("train"), documents("eval")
    assert len(train) + len(held_out) == 40
    assert train | held_out == {path.read_text() for path in texts.iterdir()}
    # Whether a document is held out does not depend on what else there is.
    for path in sorted(texts.iterdir())[:5]:
        path.unlink()
    assert documents("eval") <= held_out


def test_one_long_text_holds_out_its_end(config, tmp_path) -> None:
    text = "".join(f"line {number}\n" for number in range(500))
    (tmp_path / "book.txt").write_text(text)
    settings = config(tmp_path / "book.txt", holdout=0.1, shuffle=False)

    def read(split):
        data = open_data(settings, seed=0, global_batch=1, split=split)
        rows = [data.batch(step)["tokens"][0] for step in range(data.num_rows)]
        return data.tokenizer.decode(np.concatenate(rows))

    train, held_out = read("train"), read("eval")
    assert text.startswith(train)
    assert text.endswith(held_out)
    assert abs(len(held_out) - 0.1 * len(text)) < 20


@pytest.mark.parametrize(
    ("changes", "global_batch", "words"),
    [
        ({"sequence": 100_000}, 1, ["sequence=100000", "longest that fits is"]),
        ({}, 5_000, ["global_batch=5000", "sequence=16", "nearest that fits is"]),
    ],
)
def test_a_corpus_too_small_is_refused_with_numbers(config, texts, changes, global_batch, words) -> None:
    with pytest.raises(UserError) as caught:
        open_data(config(texts, **changes), seed=0, global_batch=global_batch)
    assert all(word in str(caught.value) for word in words)
    nearest = int(str(caught.value).rpartition("=")[2].rpartition(" ")[2])
    right = {"sequence": nearest} if changes else {}
    assert open_data(config(texts, **right), seed=0, global_batch=1 if changes else nearest).num_rows


def test_no_holdout_leaves_nothing_to_evaluate(config, texts) -> None:
    with pytest.raises(UserError, match=r"holdout=0 leaves nothing to evaluate on"):
        open_data(config(texts, holdout=0), seed=0, global_batch=1, split="eval")


@pytest.mark.devices(8)
def test_a_batch_that_does_not_divide_is_one_sentence(config, texts) -> None:
    import jax

    data = open_data(config(texts), seed=0, global_batch=6)
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    with pytest.raises(UserError, match=r"global_batch=6 .* does not divide"):
        data.iterate(0, sharding)
