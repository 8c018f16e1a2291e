"""Fine-tune a network privately: its head, its low-rank factors (LoRA), or all of it.

A small transformer learns to tell the digits 0 to 4 apart, without privacy: these
images stand for public data. Then it is fine-tuned on the digits 5 to 9, which
stand for private data, in four ways at the same epsilon, and the script prints
the test accuracy of each, how many weights were trained, and so noised:

    head       the backbone is frozen, a new last layer is trained
    LoRA       that, and low-rank factors beside the backbone's attention weights
    full       all weights, starting from the public ones
    scratch    all weights, starting from random ones: no public data

    pip install ".[examples]" && python examples/fine_tune.py

With `--hub` the backbone is a BERT of KerasHub instead (`pip install ".[examples,hub]"`), tiny and
with random weights, since it must not need a download: it shows the calls, on tokens
made of pixels, and its accuracy says nothing. The calls for a pretrained one are the
same: `keras_hub.models.BertBackbone.from_preset(...)`.
"""

import argparse
import os
import statistics

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_dp

DELTA = 1e-5  # well below 1 / number of examples
MAX_GRAD_NORM = 1.0
EPSILON = 1.0
BATCH_SIZE = 336  # of 672 private training images: a step sees each with probability 1/2
EPOCHS = 20
RANK = 2


# The learning rate of each way: the best of two or three, by the accuracy on a quarter of the
# private training images that was held out for it (scratch: that of full). Such a search
# uses privacy too, which no accountant sees.
LEARNING_RATES = {"head": 0.03, "LoRA": 0.01, "full": 0.003, "scratch": 0.003}


def load_data():
    """Images of 0 to 4 (public), and those of 5 to 9 for training and for testing (private)."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16.0 - 0.3).astype("float32")
    public, private = labels < 5, labels >= 5
    x_train, x_test, y_train, y_test = train_test_split(
        images[private],
        labels[private] - 5,
        test_size=0.25,
        stratify=labels[private],
        random_state=0,
    )
    return (images[public], labels[public]), (x_train, y_train), (x_test, y_test)


class Position(layers.Layer):
    """Adds a weight of its own to each position."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], initializer="random_normal")

    def call(self, x):
        return x + self.table


def build_backbone(width=32, blocks=2, heads=4):
    """A transformer that reads an image row by row and makes a vector of it."""
    image = keras.Input((8, 8))
    x = Position()(layers.Dense(width)(image))
    for _ in range(blocks):
        h = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(h, h)
        h = layers.LayerNormalization()(x)
        x = x + layers.Dense(width)(layers.Dense(2 * width, activation="gelu")(h))
    return keras.Model(image, layers.Flatten()(layers.LayerNormalization()(x)))


def with_head(backbone, classes=5):
    head = layers.Dense(classes, activation="softmax", kernel_initializer="zeros")
    return keras.Sequential([backbone, head])


def pretrain(data, epochs):
    """A backbone that knows the public digits. Ordinary training: nothing here is private."""
    backbone = build_backbone()
    model = with_head(backbone)
    model.compile(keras.optimizers.AdamW(2e-3), "sparse_categorical_crossentropy")
    model.fit(*data, batch_size=64, epochs=epochs, verbose=0)
    return backbone


def prepare(way, pretrained):
    """The model to train, with all that isn't to be trained frozen."""
    backbone = build_backbone()
    if way != "scratch":
        backbone.set_weights(pretrained.get_weights())
    if way == "head":
        backbone.trainable = False
    if way == "LoRA":
        enable_lora(backbone)
    return with_head(backbone)


def enable_lora(backbone):
    """Low-rank factors beside the query and value weights; all else is frozen."""
    for attention in backbone.layers:
        if isinstance(attention, layers.MultiHeadAttention):
            attention.query_dense.enable_lora(RANK)
            attention.value_dense.enable_lora(RANK)
    for weight in backbone.weights:
        weight.trainable = "lora" in weight.path


def private_optimizer(learning_rate, epsilon):
    return keras_dp.DPAdam(
        learning_rate,
        use_ema=True,
        ema_momentum=0.9,
        max_grad_norm=MAX_GRAD_NORM,
        target_epsilon=epsilon,
        target_delta=DELTA,
    )


def train(model, optimizer, data, epochs):
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*data, batch_size=BATCH_SIZE, epochs=epochs, verbose=0)


def accuracy(model, data):
    return model.evaluate(*data, verbose=0, return_dict=True)["accuracy"]


def count(weights):
    return sum(int(np.prod(w.shape)) for w in weights)


def changed(before, model):
    """How many weights have another value than before."""
    return sum(int(np.sum(a != b)) for a, b in zip(before, model.get_weights(), strict=True))


def describe(name, scores, model, moved, optimizer):
    each = " ".join(f"{score:6.1%}" for score in scores)
    print(
        f"{name:8} {count(model.trainable_variables):8,} of {count(model.weights):7,} "
        f"{moved:8,} {optimizer.get_epsilon(DELTA):8.3f} {statistics.mean(scores):7.1%}   {each}",
        flush=True,
    )


def compare_ways(arguments):
    public, private, test = load_data()
    print(f"{len(public[1])} public images, {len(private[1])} private ones", flush=True)
    keras.utils.set_random_seed(0)  # the initial weights; never the noise
    pretrained = pretrain(public, arguments.pretrain_epochs)

    print(f"delta = {DELTA:g}, one private image added or removed\n")
    print("way       trained weights     noised  epsilon    mean   test accuracy of each seed")
    for way in arguments.ways:
        scores = []
        for seed in range(arguments.seeds):
            keras.utils.set_random_seed(seed)
            model = prepare(way, pretrained)
            optimizer = private_optimizer(LEARNING_RATES[way], arguments.epsilon)
            before = model.get_weights()
            train(model, optimizer, private, arguments.epochs)
            scores.append(accuracy(model, test))
        describe(way, scores, model, changed(before, model), optimizer)


def fine_tune_keras_hub(arguments):
    import keras_hub

    _, (x_train, y_train), (x_test, y_test) = load_data()
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=17,  # a pixel has 17 shades
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=64,
        dropout=0.0,
    )
    backbone.enable_lora(rank=RANK)  # freezes all but the factors (and the biases beside them)
    head = layers.Dense(5, activation="softmax", kernel_initializer="zeros")
    model = keras.Model(backbone.input, head(backbone.output["pooled_output"]))

    def as_text(images):
        tokens = np.rint((images.reshape(-1, 64) + 0.3) * 16).astype("int32")
        return {
            "token_ids": tokens,
            "segment_ids": np.zeros_like(tokens),
            "padding_mask": np.ones_like(tokens),  # 0 where a text has ended
        }

    optimizer = private_optimizer(0.01, arguments.epsilon)
    before = model.get_weights()
    train(model, optimizer, (as_text(x_train), y_train), arguments.epochs)
    score = accuracy(model, (as_text(x_test), y_test))

    print("backbone  trained weights     noised  epsilon    test accuracy")
    describe("BERT", [score], model, changed(before, model), optimizer)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--hub", action="store_true", help="fine-tune a BERT of KerasHub instead")
    parser.add_argument(
        "--epsilon", type=float, default=EPSILON, help="privacy budget (default: %(default)s)"
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=tuple(LEARNING_RATES),
        default=list(LEARNING_RATES),
        help="ways to fine-tune (default: all)",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="models for each way (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help="private passes (default: %(default)s)"
    )
    parser.add_argument(
        "--pretrain-epochs", type=int, default=20, help="public passes (default: %(default)s)"
    )
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    if arguments.hub:
        fine_tune_keras_hub(arguments)
    else:
        compare_ways(arguments)


if __name__ == "__main__":
    main()
