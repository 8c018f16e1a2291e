"""A training loop of one's own: one encoder, two losses, and a privacy budget.

An encoder of handwritten digits learns two things at once: to tell the digit, and
to draw the image again. Such a step doesn't fit into `model.fit`, so the loop is
written out, with `optimizer.private_gradients` in the place of a gradient tape. It
stops by itself when the budget is spent.

    pip install ".[examples]" && python examples/custom_loop.py

The images are scikit-learn's 1,797 handwritten digits, which come with it.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
from keras import layers, ops
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_dp

DELTA = 1e-5  # well below 1 / number of examples


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--epsilon", type=float, default=3.0, help="privacy budget (%(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="passes at most (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, help="expected size (%(default)s)")
    return parser.parse_args()


def load_data():
    """The digits as (images, labels) for training and for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0 - 0.3).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    return (x_train, y_train), (x_test, y_test)


def main():
    arguments = parse_arguments()
    (x_train, y_train), (x_test, y_test) = load_data()

    encoder = keras.Sequential(
        [
            keras.Input((64,)),
            layers.GaussianNoise(0.1),  # for each image by itself, since it is in `models` below
            layers.Dense(32, activation="tanh"),
        ]
    )
    classifier = keras.Sequential([keras.Input((32,)), layers.Dense(10)])
    decoder = keras.Sequential([keras.Input((32,)), layers.Dense(64)])
    models = [encoder, classifier, decoder]
    variables = [v for model in models for v in model.trainable_variables]

    def loss_fn(example):
        """The loss of one image: a batch of one goes in, one number comes out."""
        image, label = example
        code = encoder(image, training=True)
        tell = keras.losses.sparse_categorical_crossentropy(
            label, classifier(code), from_logits=True
        )
        draw = keras.losses.mean_squared_error(image, decoder(code))
        return ops.sum(tell) + 0.5 * ops.sum(draw)

    # One optimizer for all that learns from the images, and its ledger counts every step.
    optimizer = keras_dp.DPSGD(0.15, momentum=0.9, max_grad_norm=1.0, noise_multiplier=5.0)
    data = keras_dp.PoissonDataset(x_train, y_train, batch_size=arguments.batch_size)

    optimizer.begin_loop(data)  # says how batches are drawn; then a budget is so many steps
    planned = arguments.epochs * len(data)
    optimizer.limit_steps(epsilon=arguments.epsilon, delta=DELTA, at_most=planned)

    print("epoch    loss  accuracy   epsilon")
    for epoch in range(arguments.epochs):
        for batch in data:
            if optimizer.step_limit_reached:
                break
            gradients = optimizer.private_gradients(
                loss_fn, variables, batch, sampling=data, models=models
            )
            optimizer.apply(gradients, variables)
        last = optimizer.step_limit_reached or epoch + 1 == arguments.epochs
        if last or epoch % 10 == 0:
            right = ops.argmax(classifier(encoder(x_test)), axis=-1) == y_test
            accuracy = float(ops.mean(ops.cast(right, "float32")))
            # The loss is not private: don't publish it.
            spent = optimizer.get_epsilon(DELTA)
            print(f"{epoch + 1:5} {float(gradients.loss):7.3f} {accuracy:9.1%} {spent:9.3f}")
        if last:
            break
    print(f"{optimizer.ledger.steps} steps")


if __name__ == "__main__":
    main()
