"""The yardstick: per-example gradients by a plain loop over examples, in eager TensorFlow."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import tree

import keras_dp


def take(structure, i):
    """Example `i` of every array, as a batch of one."""
    return tree.map_structure(
        lambda a: None if a is None else tf.convert_to_tensor(a[i : i + 1]), structure
    )


def example_gradients(model, x, y=None, sample_weight=None, loss=None):
    """Each example's gradient and loss, from a batch of that example alone.

    The loss is the compiled one, or `loss(y, y_pred)`; weight regularizers are
    left out, activity regularizers and `add_loss` are in. Dropout must be off.
    """
    variables = model.trainable_variables
    values = [v.value for v in variables]
    gradients, losses = [], []
    for i in range(len(tree.flatten(x)[0])):
        one_x, one_y, one_w = take((x, y, sample_weight), i)
        with tf.GradientTape() as tape:
            y_pred = model(one_x, training=True)
            if loss is None:
                total = model._compute_loss(one_x, one_y, y_pred, one_w, training=True)
                penalties = [v.regularizer(v) for v in variables if v.regularizer is not None]
                total = tf.reduce_sum(total) - (tf.add_n(penalties) if penalties else 0.0)
            else:
                total = tf.reduce_sum(loss(one_y, y_pred))
        found = tape.gradient(total, values)
        gradients.append(
            [
                np.zeros(v.shape) if g is None else tf.convert_to_tensor(g).numpy().astype("f8")
                for g, v in zip(found, variables, strict=True)
            ]
        )
        losses.append(float(total))
    return gradients, np.array(losses)


def norms_of(gradients):
    return np.array([np.sqrt(sum((g**2).sum() for g in one)) for one in gradients])


def clipped_sum(gradients, max_grad_norm):
    """sum_i min(1, C / ||g_i||) g_i, one array per variable."""
    weights = np.minimum(1.0, max_grad_norm / np.maximum(norms_of(gradients), 1e-12))
    return [
        sum(w * one[k] for w, one in zip(weights, gradients, strict=True))
        for k in range(len(gradients[0]))
    ]


def relative_error(got, wanted):
    got, wanted = (
        np.concatenate([np.ravel(np.asarray(t, "f8")) for t in a]) for a in (got, wanted)
    )
    return float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-12))


def noiseless_optimizer(max_grad_norm, gradients="auto", **kwargs):
    """SGD of rate 1 without noise: its update is minus the clipped sum over the divisor."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        return keras_dp.DPSGD(
            1.0, max_grad_norm=max_grad_norm, noise_multiplier=0.0, gradients=gradients, **kwargs
        )


def update_on_batch(model, x, y=None, sample_weight=None):
    """What one `train_on_batch` subtracts from the weights."""
    import warnings

    before = [v.numpy().astype("f8") for v in model.trainable_variables]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        model.train_on_batch(x, y, sample_weight=sample_weight)
    return [
        b - v.numpy().astype("f8") for b, v in zip(before, model.trainable_variables, strict=True)
    ]


def private_clipped_sum(
    model, x, y=None, sample_weight=None, *, loss, max_grad_norm, gradients="auto", **compile_args
):
    """The clipped sum that the private step computes, from its noiseless update."""
    names = ("microbatch_size", "clipping")
    optimizer_args = {k: compile_args.pop(k) for k in names if k in compile_args}
    weights = [w.copy() for w in model.get_weights()]
    model.compile(
        noiseless_optimizer(max_grad_norm, gradients, **optimizer_args), loss=loss, **compile_args
    )
    rows = len(tree.flatten(x)[0])
    update = update_on_batch(model, x, y, sample_weight)
    model.set_weights(weights)
    return [u * rows for u in update]


def median_norm(model, x, y=None, sample_weight=None, loss=None):
    """A clipping norm that clips about half of the examples."""
    return float(np.median(norms_of(example_gradients(model, x, y, sample_weight, loss)[0])))


def flat(max_grad_norm):
    """Flat clipping, as an engine is given it."""
    from keras_dp.clipping import Clip, FlatClipping

    return Clip(FlatClipping(), max_grad_norm)


def engine_outcome(
    model, x, y=None, sample_weight=None, *, max_grad_norm, padding=0, clip=None, **engine_args
):
    """What an engine makes of a batch by itself, and the engine's name.

    The model is compiled (with any optimizer). `padding` rows of zeros that are
    not real are appended.
    """
    from keras_dp import backend, keras_private
    from keras_dp.gradients import Batch, Engine, EngineOptions, ExampleLoss

    batch = Batch(x, y, sample_weight)
    batch = batch.with_leaves(backend.as_tensors(batch.leaves()))
    keras_private.build_from_batch(model, batch.x, batch.y, batch.sample_weight)
    one = ExampleLoss(model, list(model.trainable_variables), batch)
    engine = Engine(one, clip or flat(max_grad_norm), EngineOptions(**engine_args))
    rows = len(batch.leaves()[0])
    leaves, real = backend.pad_examples(batch.leaves(), rows + padding)
    leaves, more = backend.pad_examples(leaves, engine.padding)
    real = tf.range(len(more)) < rows
    views = engine_args.get("views", 1)
    seeds = backend.per_example_seeds(one.seed_states, len(leaves[0]), views)
    return engine(batch.with_leaves(leaves), real, seeds), engine.name


__all__ = [name for name in dir() if not name.startswith("_")]
_ = keras
