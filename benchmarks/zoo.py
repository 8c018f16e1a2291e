"""The models of the benchmarks.

Each function takes a NumPy generator and returns `(model, x, y, loss)`: a built,
not compiled Keras model and one batch of made-up examples. Its keywords are the
sizes that `run.py --growth` lets grow.
"""

import keras
from keras import layers


def mlp(random, *, batch=256, width=512):
    """784-512-512-10 with relu, batch 256."""
    model = keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(width, activation="relu"),
            layers.Dense(width, activation="relu"),
            layers.Dense(10),
        ]
    )
    return model, _floats(random, batch, 784), _labels(random, batch, 10), _loss()


def cnn(random, *, batch=256):
    """Two convolutions and two dense layers on 28 × 28 images, batch 256.

    The network of TensorFlow Privacy's MNIST tutorial.
    """
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 8, 2, padding="same", activation="relu"),
            layers.MaxPooling2D(2, 1),
            layers.Conv2D(32, 4, 2, activation="relu"),
            layers.MaxPooling2D(2, 1),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
        ]
    )
    return model, _floats(random, batch, 28, 28, 1), _labels(random, batch, 10), _loss()


def transformer(random, *, batch=32, length=128):
    """Two blocks of width 128 on 128 tokens, vocabulary 5,000, batch 32."""
    tokens = keras.Input((length,), dtype="int32")
    x = layers.Embedding(5000, 128)(tokens)
    for _ in range(2):
        x = _block(x)
    model = keras.Model(tokens, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))
    return model, _tokens(random, 5000, batch, length), _labels(random, batch, 10), _loss()


def lstm(random, *, batch=128):
    """Names of 60 characters to 18 languages: Embedding(100, 64), LSTM(128), batch 128.

    The task of Opacus' character LSTM tutorial.
    """
    model = keras.Sequential(
        [
            keras.Input((60,), dtype="int32"),
            layers.Embedding(100, 64),
            layers.LSTM(128),
            layers.Dense(18),
        ]
    )
    return model, _tokens(random, 100, batch, 60), _labels(random, batch, 18), _loss()


def text(random, *, batch=128, vocabulary=20_000, width=128):
    """Text classifier: Embedding(20,000, 128), mean over 100 words, two dense layers, batch 128."""
    model = keras.Sequential(
        [
            keras.Input((100,), dtype="int32"),
            layers.Embedding(vocabulary, width),
            layers.GlobalAveragePooling1D(),
            layers.Dense(64, activation="relu"),
            layers.Dense(4),
        ]
    )
    return model, _tokens(random, vocabulary, batch, 100), _labels(random, batch, 4), _loss()


def resnet(random, *, batch=64):
    """Residual network with group normalization on 32 × 32 images, batch 64.

    Three stages of 16, 32 and 64 channels, two blocks of two convolutions each.
    """
    images = keras.Input((32, 32, 3))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(images)
    x = layers.Activation("relu")(layers.GroupNormalization(8)(x))
    for channels, strides in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        x = _residual(x, channels, strides)
    model = keras.Model(images, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))
    return model, _floats(random, batch, 32, 32, 3), _labels(random, batch, 10), _loss()


def lora(random, *, batch=32):
    """Frozen transformer, 4 blocks of width 128 on 64 tokens, LoRA of rank 4, batch 32.

    The factors on the attention's and the blocks' dense layers, and the head,
    are all that is trained.
    """
    tokens = keras.Input((64,), dtype="int32")
    x = layers.Embedding(5000, 128)(tokens)
    adapted = []
    for _ in range(4):
        x = _block(x, adapted)
    head = layers.Dense(10)
    model = keras.Model(tokens, head(layers.GlobalAveragePooling1D()(x)))
    for variable in model.trainable_variables:
        variable.trainable = any(variable is own for own in head.variables)
    for layer in adapted:
        layer.enable_lora(4)
    return model, _tokens(random, 5000, batch, 64), _labels(random, batch, 10), _loss()


ZOO = {f.__name__: f for f in (mlp, cnn, transformer, lstm, text, resnet, lora)}


def _block(x, dense_layers=None):
    """A transformer's block of width 128; notes its dense layers in the list given."""
    attention = layers.MultiHeadAttention(4, 32)
    wide, narrow = layers.Dense(512, activation="relu"), layers.Dense(128)
    x = layers.LayerNormalization()(x + attention(x, x))
    x = layers.LayerNormalization()(x + narrow(wide(x)))
    if dense_layers is not None:
        dense_layers += [attention.query_dense, attention.key_dense, attention.value_dense]
        dense_layers += [attention.output_dense, wide, narrow]
    return x


def _residual(x, channels, strides):
    """Two convolutions, each normalized, around which the input is added."""
    y = layers.Conv2D(channels, 3, strides, padding="same", use_bias=False)(x)
    y = layers.Activation("relu")(layers.GroupNormalization(8)(y))
    y = layers.Conv2D(channels, 3, padding="same", use_bias=False)(y)
    y = layers.GroupNormalization(8)(y)
    if strides != 1 or x.shape[-1] != channels:
        x = layers.Conv2D(channels, 1, strides, use_bias=False)(x)
    return layers.Activation("relu")(layers.Add()([x, y]))


def _floats(random, *shape):
    return random.normal(size=shape).astype("float32")


def _tokens(random, vocabulary, *shape):
    return random.integers(0, vocabulary, shape).astype("int32")


def _labels(random, batch, classes):
    return random.integers(0, classes, batch).astype("int32")


def _loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
