"""Teach a small language model new words privately, with LoRA.

A small GPT-2 of KerasHub learns to write from public text: paragraphs of scikit-learn's
documentation. Then it learns from private text, which is Keras' documentation here: two
low-rank factors beside each query and value projection are trained, all else is frozen. The
script prints how well it predicts the next word of texts that it hasn't seen, before and
after, and what it writes.

Both texts lie in installed packages, and the model begins with random weights, so nothing is
downloaded. With a connection, `keras_hub.models.GPT2CausalLM.from_preset("gpt2_base_en")`
takes the place of the public half; the private half stays as it is.

    pip install ".[examples,hub]" && python examples/lora.py
"""

import argparse
import collections
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import keras_hub
import numpy as np
from texts import paragraphs

import keras_dp

LENGTH = 24  # words that the model reads, of the 25 of a text
VOCABULARY = 1_000
PADDING, BEGIN, UNKNOWN = 0, 1, 2
DELTA = 1e-5  # well below 1 / number of texts
EPSILON = 3


def make_vocabulary(public_texts):
    """The most frequent words of public text. Those of the private text would tell of it."""
    counts = collections.Counter(word for text in public_texts for word in text.split())
    return ["", "", "..."] + [word for word, _ in counts.most_common(VOCABULARY - 3)]


def to_tokens(texts, vocabulary):
    numbers = {word: number for number, word in enumerate(vocabulary)}
    tokens = np.full((len(texts), LENGTH + 1), PADDING, "int32")
    for row, text in zip(tokens, texts, strict=True):
        words = [BEGIN] + [numbers.get(word, UNKNOWN) for word in text.split()]
        row[: len(words)] = words[: LENGTH + 1]
    return tokens


def examples(tokens):
    """What the model reads, what it should say, and which of that counts: (x, y, weights).

    One text is one example. Where a text has ended nothing counts, and neither does a word
    that isn't in the vocabulary.
    """
    x = {"token_ids": tokens[:, :-1], "padding_mask": (tokens[:, :-1] != PADDING).astype("int32")}
    weights = (tokens[:, 1:] > UNKNOWN).astype("float32")
    return x, tokens[:, 1:], weights


def word_loss():
    """The mean over the words of a text that count: sum of weight x loss / sum of weights.

    With Keras' usual reduction a short text would be divided by the length with padding.
    """
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


def build_model(vocabulary_size=VOCABULARY, length=LENGTH, width=64, num_layers=2):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=vocabulary_size,
        num_layers=num_layers,
        num_heads=4,
        hidden_dim=width,
        intermediate_dim=2 * width,
        max_sequence_length=length,
        dropout=0.0,
    )
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)


def train(model, optimizer, tokens, batch_size, epochs):
    model.compile(optimizer, word_loss())
    x, y, weights = examples(tokens)
    batch_size = min(batch_size, len(tokens))
    model.fit(x, y, sample_weight=weights, batch_size=batch_size, epochs=epochs, verbose=0)


def perplexity(model, tokens):
    """How many words the model wavers between, on average over all words that count."""
    x, y, weights = examples(tokens)
    logits = model.predict(x, batch_size=256, verbose=0)
    each = keras.ops.sparse_categorical_crossentropy(y, logits, from_logits=True)
    return float(np.exp(np.sum(np.asarray(each) * weights) / np.sum(weights)))


def write(model, vocabulary, beginning, seed=0, temperature=0.7):
    """Goes on from a few words, one word at a time."""
    random = np.random.default_rng(seed)
    tokens = to_tokens([beginning], vocabulary)
    for place in range(len(beginning.split()) + 1, LENGTH):
        x, _, _ = examples(tokens)
        logits = model(x)[0, place - 1]
        logits = np.asarray(logits, "float64") / temperature
        logits[: UNKNOWN + 1] = -np.inf
        chances = np.exp(logits - logits.max())
        tokens[0, place] = random.choice(len(chances), p=chances / chances.sum())
    return " ".join(vocabulary[token] for token in tokens[0, 1:LENGTH])


def count(weights):
    return sum(int(np.prod(weight.shape)) for weight in weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--epochs", type=int, default=15, help="private passes")
    parser.add_argument("--public-epochs", type=int, default=8, help="public passes")
    parser.add_argument("--texts", type=int, default=3_500, help="of each source, at most")
    parser.add_argument("--held-out", type=int, default=500, help="private texts to test on")
    arguments = parser.parse_args()

    public_texts = paragraphs("sklearn", arguments.texts)
    private_texts = paragraphs("keras", arguments.texts)
    vocabulary = make_vocabulary(public_texts)
    public, private = (to_tokens(texts, vocabulary) for texts in (public_texts, private_texts))
    private, unseen = private[: -arguments.held_out], private[-arguments.held_out :]
    print(
        f"{len(public):,} public texts, {len(private):,} private ones, {len(unseen):,} to test on\n"
    )

    keras.utils.set_random_seed(0)  # the initial weights; never the noise
    model = build_model()
    train(model, keras.optimizers.Adam(3e-3), public, 128, arguments.public_epochs)
    beginnings = ["this layer", "returns a", "the model"]
    before = perplexity(model, unseen), [write(model, vocabulary, words) for words in beginnings]

    model.backbone.enable_lora(rank=4)  # freezes all else, but for the biases beside the factors
    optimizer = keras_dp.DPAdam(
        0.01,
        use_ema=True,
        ema_momentum=0.8,
        max_grad_norm=0.3,
        target_epsilon=EPSILON,
        target_delta=DELTA,
        microbatch_size=256,  # texts in memory at once
    )
    train(model, optimizer, private, 1024, arguments.epochs)
    after = perplexity(model, unseen), [write(model, vocabulary, words) for words in beginnings]

    print(
        f"{count(model.trainable_variables):,} of {count(model.weights):,} weights trained, ",
        end="",
    )
    print(f"engine {optimizer.engine!r}, noise multiplier {optimizer.noise_multiplier:.2f}\n")
    print("perplexity on private texts that weren't trained on")
    print(f"before   {before[0]:6.1f}   epsilon 0")
    print(f"after    {after[0]:6.1f}   epsilon {optimizer.get_epsilon(DELTA):.3f}")
    for name, (_, texts) in (("before", before), ("after", after)):
        print(f"\n{name}:")
        for text in texts:
            print(f"  {text}")
    print(f"\n{keras_dp.privacy_report(model, delta=DELTA).statement}")


if __name__ == "__main__":
    main()
