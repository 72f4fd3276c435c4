"""What the tests of whole runs share."""

import pathlib

import pytest
from training import write_config


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Config of a small run on four simulated devices; its compiled programs are kept for the session."""
    return write_config(tmp_path_factory.mktemp("small"))
