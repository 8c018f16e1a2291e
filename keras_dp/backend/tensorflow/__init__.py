"""TensorFlow beneath Keras."""
