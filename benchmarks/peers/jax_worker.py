"""Steps of JAX Privacy for `peers.py`: `jax_worker.py MODEL ordinary|noise|vmap|loop`.

`vmap` is `jax_privacy.clipped_grad` as it comes, `loop` is it with
`microbatch_size=1`, which XLA compiles better on some CPUs.
"""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import jax_privacy
import optax
from jax_privacy.noise_addition import gaussian_privatizer
from worker import VOCABULARIES, examples, serve


class Weights:
    """Makes the weights of a model: Glorot's initialization, and zeros for biases."""

    def __init__(self):
        self._key = jax.random.key(0)

    def normal(self, *shape):
        self._key, key = jax.random.split(self._key)
        fans = math.prod(shape[:-1]) + shape[-1]
        return jax.random.normal(key, shape) * math.sqrt(2 / fans)

    def dense(self, *shape):
        return {"kernel": self.normal(*shape), "bias": jnp.zeros(shape[-1])}

    def norm(self, size):
        return {"scale": jnp.ones(size), "offset": jnp.zeros(size)}


def dense(weights, x, factors=None):
    y = x @ weights["kernel"] + weights["bias"]
    if factors is None:
        return y
    return y + (jnp.tensordot(x, factors["a"], 1) @ factors["b"]).reshape(y.shape)


def mlp_weights(make):
    return [make.dense(784, 512), make.dense(512, 512), make.dense(512, 10)]


def mlp(weights, x):
    for layer in weights[:-1]:
        x = jax.nn.relu(dense(layer, x))
    return dense(weights[-1], x)


def cnn_weights(make):
    convolutions = [make.dense(8, 8, 1, 16), make.dense(4, 4, 16, 32)]
    return [*convolutions, make.dense(512, 32), make.dense(32, 10)]


def cnn(weights, x):
    for layer, padding in zip(weights[:2], ("SAME", "VALID"), strict=True):
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["bias"])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
    x = jax.nn.relu(dense(weights[2], x.reshape(len(x), -1)))
    return dense(weights[3], x)


def transformer_weights(make, blocks=2):
    def block():
        return {
            "attention": [make.dense(128, 128) for _ in range(4)],
            "dense": [make.dense(128, 512), make.dense(512, 128)],
            "norms": [make.norm(128), make.norm(128)],
        }

    return {
        "embedding": make.normal(VOCABULARIES["transformer"], 128),
        "blocks": [block() for _ in range(blocks)],
        "head": make.dense(128, 10),
    }


def transformer(weights, tokens):
    x = weights["embedding"][tokens]
    for block in weights["blocks"]:
        x = transform(block, x)
    return dense(weights["head"], x.mean(1))


def transform(block, x, factors=(None,) * 6):
    """A block; `factors` are LoRA's of its four dense layers of attention and its two others."""
    x = normalize(block["norms"][0], x + attention(block["attention"], x, factors[:4]))
    wide, narrow = block["dense"]
    y = dense(narrow, jax.nn.relu(dense(wide, x, factors[4])), factors[5])
    return normalize(block["norms"][1], x + y)


def attention(weights, x, factors):
    q, k, v = (
        dense(w, x, f).reshape(*x.shape[:2], 4, 32)
        for w, f in zip(weights[:3], factors[:3], strict=True)
    )
    y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
    return dense(weights[3], y, factors[3])


def normalize(weights, x):
    return jax.nn.standardize(x, epsilon=1e-3) * weights["scale"] + weights["offset"]


def lora_weights(make):
    """Frozen weights and trained ones: factors in the shapes of Keras', and the head."""

    def factors(outputs, *inputs):
        return {"a": make.normal(*inputs, 4), "b": jnp.zeros((4, outputs))}

    def block():
        projections = [factors(32, 128, 4) for _ in range(3)]  # Keras' kernels are 128, 4, 32
        return [*projections, factors(128, 128), factors(512, 128), factors(128, 512)]

    frozen = transformer_weights(make, blocks=4)
    return frozen, {"blocks": [block() for _ in range(4)], "head": frozen.pop("head")}


def lora(frozen, weights, tokens):
    x = frozen["embedding"][tokens]
    for block, factors in zip(frozen["blocks"], weights["blocks"], strict=True):
        x = transform(block, x, factors)
    return dense(weights["head"], x.mean(1))


def lstm_weights(make):
    return {
        "embedding": make.normal(VOCABULARIES["lstm"], 64),
        "inputs": make.dense(64, 4 * 128),
        "recurrent": make.normal(128, 4 * 128),
        "head": make.dense(128, 18),
    }


def lstm(weights, tokens):
    def cell(state, x):
        h, c = state
        i, f, g, o = jnp.split(x + h @ weights["recurrent"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), None

    x = dense(weights["inputs"], weights["embedding"][tokens])  # of all characters at once
    zeros = jnp.zeros((len(x), 128))
    (h, _), _ = jax.lax.scan(cell, (zeros, zeros), x.swapaxes(0, 1))
    return dense(weights["head"], h)


def text_weights(make):
    embedding = make.normal(VOCABULARIES["text"], 128)
    return {"embedding": embedding, "dense": [make.dense(128, 64), make.dense(64, 4)]}


def text(weights, tokens):
    return mlp(weights["dense"], weights["embedding"][tokens].mean(1))


STAGES = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))


def resnet_weights(make):
    def block(channels, filters, strides):
        made = {
            "kernels": [make.normal(3, 3, channels, filters), make.normal(3, 3, filters, filters)],
            "norms": [make.norm(filters), make.norm(filters)],
        }
        if strides != 1 or channels != filters:
            made["shortcut"] = make.normal(1, 1, channels, filters)
        return made

    return {
        "kernel": make.normal(3, 3, 3, 16),
        "norm": make.norm(16),
        "blocks": [block(*stage) for stage in STAGES],
        "head": make.dense(64, 10),
    }


def resnet(weights, x):
    x = jax.nn.relu(normalize_groups(weights["norm"], convolve(weights["kernel"], x)))
    for block, (_, _, strides) in zip(weights["blocks"], STAGES, strict=True):
        y = convolve(block["kernels"][0], x, strides)
        y = jax.nn.relu(normalize_groups(block["norms"][0], y))
        y = normalize_groups(block["norms"][1], convolve(block["kernels"][1], y))
        if "shortcut" in block:
            x = convolve(block["shortcut"], x, strides)
        x = jax.nn.relu(x + y)
    return dense(weights["head"], x.mean((1, 2)))


def convolve(kernel, x, strides=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normalize_groups(weights, x):
    groups = x.reshape(*x.shape[:3], 8, -1)
    groups = jax.nn.standardize(groups, axis=(1, 2, 4), epsilon=1e-3)
    return groups.reshape(x.shape) * weights["scale"] + weights["offset"]


MODELS = {
    "mlp": (mlp_weights, mlp),
    "cnn": (cnn_weights, cnn),
    "transformer": (transformer_weights, transformer),
    "lstm": (lstm_weights, lstm),
    "text": (text_weights, text),
    "resnet": (resnet_weights, resnet),
    "lora": (lora_weights, lora),
}


def make_step(name, variant):
    """A function that takes one step and waits for it, and the weights."""
    make_weights, predict = MODELS[name]
    weights = make_weights(Weights())
    if name == "lora":
        frozen, weights = weights
        predict = functools.partial(predict, frozen)
    x, y = (jnp.asarray(a) for a in examples(name))
    optimizer = optax.sgd(0.1)

    def loss(weights, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(predict(weights, x), y).mean()

    if variant in ("vmap", "loop"):
        gradient = jax_privacy.clipped_grad(
            loss,
            l2_clip_norm=1.0,
            batch_argnums=(1, 2),
            normalize_by=len(x),
            microbatch_size=1 if variant == "loop" else None,
        )
        privatizer = gaussian_privatizer(stddev=1.0 / len(x))
    elif variant == "noise":
        privatizer = gaussian_privatizer(stddev=1.0)
    else:
        gradient, privatizer = jax.grad(loss), optax.identity()

    @jax.jit
    def train(state, x, y):
        weights, noise, moments = state
        gradients, noise = privatizer.update(gradient(weights, x, y), noise)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(weights, updates), noise, moments

    @jax.jit
    def draw(state, x, y):
        weights, noise, moments = state
        drawn, noise = privatizer.update(jax.tree.map(jnp.zeros_like, weights), noise)
        return drawn, noise, moments

    run = draw if variant == "noise" else train
    state = weights, privatizer.init(weights), optimizer.init(weights)

    def step():
        nonlocal state
        state = jax.block_until_ready(run(state, x, y))

    return step, weights


if __name__ == "__main__":
    step, weights = make_step(*sys.argv[1:3])
    serve(
        step,
        parameters=sum(w.size for w in jax.tree.leaves(weights)),
        versions={"jax_privacy": jax_privacy.__version__, "jax": jax.__version__},
    )
