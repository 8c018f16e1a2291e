"""Steps of JAX Privacy for `peers.py`: `jax_worker.py MODEL ordinary|noise|vmap|loop`.

`vmap` is `jax_privacy.clipped_grad` as it comes, `loop` is it with
`microbatch_size=1`, which XLA compiles better on some CPUs.
"""

import math
import sys

import jax
import jax.numpy as jnp
import jax_privacy
import optax
from jax_privacy.noise_addition import gaussian_privatizer
from worker import VOCABULARY, examples, serve


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


def dense(weights, x):
    return x @ weights["kernel"] + weights["bias"]


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


def transformer_weights(make):
    def norm():
        return {"scale": jnp.ones(128), "offset": jnp.zeros(128)}

    def block():
        return {
            "attention": [make.dense(128, 128) for _ in range(4)],
            "dense": [make.dense(128, 512), make.dense(512, 128)],
            "norms": [norm(), norm()],
        }

    embedding = make.normal(VOCABULARY, 128)
    return {"embedding": embedding, "blocks": [block(), block()], "head": make.dense(128, 10)}


def transformer(weights, tokens):
    x = weights["embedding"][tokens]
    for block in weights["blocks"]:
        x = normalize(block["norms"][0], x + attention(block["attention"], x))
        wide, narrow = block["dense"]
        x = normalize(block["norms"][1], x + dense(narrow, jax.nn.relu(dense(wide, x))))
    return dense(weights["head"], x.mean(1))


def attention(weights, x):
    q, k, v = (dense(w, x).reshape(*x.shape[:2], 4, 32) for w in weights[:3])
    return dense(weights[3], jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


def normalize(weights, x):
    return jax.nn.standardize(x, epsilon=1e-3) * weights["scale"] + weights["offset"]


MODELS = {
    "mlp": (mlp_weights, mlp),
    "cnn": (cnn_weights, cnn),
    "transformer": (transformer_weights, transformer),
}


def make_step(name, variant):
    """A function that takes one step and waits for it, and the weights."""
    make_weights, predict = MODELS[name]
    weights = make_weights(Weights())
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
