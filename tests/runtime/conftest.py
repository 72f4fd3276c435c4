"""What the tests of whole runs share."""

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from training import write_config


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Config of a small run on four simulated devices; its compiled programs are kept for the session."""
    return write_config(tmp_path_factory.mktemp("small"))


@pytest.fixture
def compilation_cache_as_it_was() -> Iterator[None]:
    """`train` sets up the cache of its own process, which in a test is that of all other tests."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings: Any = jax.config
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(settings, name) for name in names}
    compilation_cache.reset_cache()  # It looks for its folder once.
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
