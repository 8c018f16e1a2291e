"""What every test starts from."""

import keras
import pytest


@pytest.fixture(autouse=True)
def same_weights_every_time():
    """The same initial weights and dropout masks in every run; never the noise."""
    keras.utils.set_random_seed(0)
