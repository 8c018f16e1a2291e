"""What every test starts from."""

import keras
import pytest

# Layers that a test module makes while it is imported choose their weights there.
keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def same_weights_every_time():
    """The same initial weights and dropout masks in every run; never the noise."""
    keras.utils.set_random_seed(0)
