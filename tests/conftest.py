"""What every test starts from."""

import keras
import pytest
import tensorflow as tf

# Four devices, for tests of several replicas: TensorFlow takes no more once it has begun.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)
# Layers that a test module makes while it is imported choose their weights there.
keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def same_weights_every_time():
    """The same initial weights and dropout masks in every run; never the noise."""
    keras.utils.set_random_seed(0)
