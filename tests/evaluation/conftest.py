"""Halves of the digits, and their feature space."""

import pytest

from tcm_fast.data.dataset import load_images
from tcm_fast.evaluation import features


@pytest.fixture(scope="session")
def train():
    return load_images("digits:train")


@pytest.fixture(scope="session")
def test():
    return load_images("digits:test")


@pytest.fixture(scope="session")
def space():
    return features.digits_feature_space()
