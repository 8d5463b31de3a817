"""Small models with random weights, shared by the tests of a module."""

import pytest

from helpers.tiny_model import TOWERS, build


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module", params=TOWERS)
def tower_model(request):
    return build(**TOWERS[request.param])
