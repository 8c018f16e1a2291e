"""Learn from images without labels, privately, in a training loop of one's own.

Two random views of one image should get codes that are alike, and unlike those of other
images: contrastive learning. The usual loss compares the images of a batch with one another,
so one person's image would change everybody's gradient, and no clip could bound what it does.
Here each image is compared with public images instead. Then the loss is that of one example,
and `private_gradients` clips, noises and counts.

scikit-learn's digits 5 to 9 are private, 0 to 4 public. Codes are judged by what a simple
classifier makes of them (private test images, five classes, 50 labelled ones to learn from).

    pip install ".[examples]" && python examples/contrastive.py
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import keras_dp

DELTA = 1e-5  # well below 1 / number of examples
TEMPERATURE = 0.2


def load_data():
    """Public images; private ones to train on; private images and labels to judge by."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16.0 - 0.3).astype("float32")
    public = labels < 5
    train, test, _, test_labels = train_test_split(
        images[~public], labels[~public], test_size=0.4, stratify=labels[~public], random_state=0
    )
    return images[public], train, (test, test_labels)


def build_encoder():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.RandomTranslation(0.15, 0.15, fill_mode="constant", fill_value=-0.3),
            layers.RandomRotation(0.05, fill_mode="constant", fill_value=-0.3),
            layers.GaussianNoise(0.1),
            layers.Conv2D(16, 3, strides=2, padding="same", activation="tanh"),
            layers.Flatten(),
            layers.Dense(32, activation="tanh"),
        ]
    )


def make_loss(encoder, public):
    public = ops.convert_to_tensor(public)

    def loss_fn(example):
        """Cross-entropy of finding the other view of an image among public images."""
        (image,) = example  # one example: (1, 8, 8, 1)
        one, other, others = (
            ops.normalize(encoder(x, training=True), axis=-1) for x in (image, image, public)
        )
        alike = ops.sum(one * other, axis=-1, keepdims=True)  # (1, 1)
        unlike = ops.matmul(one, ops.transpose(others))  # (1, public)
        scores = ops.concatenate([alike, unlike], axis=-1) / TEMPERATURE
        return ops.sum(ops.logsumexp(scores, axis=-1) - scores[:, 0])

    return loss_fn


def judge(encoder, test, labelled=50):
    """What a linear classifier reaches on codes of the rest, after a few labelled ones."""
    images, labels = test
    codes = encoder.predict(images, verbose=0)
    scores = []
    for seed in range(20):
        train, rest = train_test_split(
            np.arange(len(labels)), train_size=labelled, stratify=labels, random_state=seed
        )
        classifier = LogisticRegression(max_iter=1000).fit(codes[train], labels[train])
        scores.append(classifier.score(codes[rest], labels[rest]))
    return np.mean(scores)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--epsilon", type=float, default=3.0, help="privacy budget (%(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="passes (%(default)s)")
    parser.add_argument("--public", type=int, default=64, help="public images (%(default)s)")
    arguments = parser.parse_args()
    public, train, test = load_data()
    print(f"{len(train)} private images without labels, {arguments.public} public ones\n")

    keras.utils.set_random_seed(0)  # the initial weights and the views; never the noise
    encoder = build_encoder()
    loss_fn = make_loss(encoder, public[: arguments.public])
    optimizer = keras_dp.DPAdam(
        0.01, max_grad_norm=1.0, target_epsilon=arguments.epsilon, target_delta=DELTA
    )
    data = keras_dp.PoissonDataset(train, batch_size=len(train) // 2)
    optimizer.begin_loop(data, steps=arguments.epochs * len(data))

    print("epoch    loss   epsilon   accuracy of a classifier on the codes")
    print(f"    0       –     0.000 {judge(encoder, test):10.1%}", flush=True)
    for epoch in range(arguments.epochs):
        for batch in data:
            gradients = optimizer.private_gradients(
                loss_fn, encoder.trainable_variables, batch, sampling=data, models=[encoder]
            )
            optimizer.apply(gradients, encoder.trainable_variables)
        if (epoch + 1) % 10 == 0 or epoch + 1 == arguments.epochs:
            spent = optimizer.get_epsilon(DELTA)
            loss = float(gradients.loss)  # not private: don't publish it
            print(
                f"{epoch + 1:5} {loss:7.3f} {spent:9.3f} {judge(encoder, test):10.1%}", flush=True
            )
    print(f"\n{optimizer.ledger.steps} steps, noise multiplier {optimizer.noise_multiplier:.2f}")


if __name__ == "__main__":
    main()
