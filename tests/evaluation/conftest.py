"""A data root with every benchmark."""

import pytest

from tests.helpers.data_root import make_data_root


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    return make_data_root(tmp_path_factory.mktemp("data"))
