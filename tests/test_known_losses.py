"""Keras' own losses, all rows at once: each as it is of that row alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from reference import clipped_sum, example_gradients, private_clipped_sum, relative_error

import keras_dp
from keras_dp import keras_losses, keras_private
from keras_dp.gradients import known_losses

pytestmark = pytest.mark.fast

RANDOM = np.random.default_rng(0)
ROWS = 4
NUMBERS = [f.__name__ for f in known_losses._OF_NUMBERS if f not in known_losses._BY_ALL_LABELS]
OF_ROWS = [f.__name__ for f in known_losses._OF_ROWS if "sparse" not in f.__name__]


def compiled(loss, shape, **given):
    model = keras.Sequential([keras.Input(shape[1:]), keras.layers.Identity()])
    model.compile(loss=loss, **given)
    return model


def made_up(shape):
    values = RANDOM.uniform(0.05, 0.95, shape).astype("float32")
    return values / values.sum(-1, keepdims=True) if shape[-1] > 1 else values


def both(model, y, prediction, weight=None):
    """What `of_rows` finds, and the model's own loss of each row alone; with its gradient."""
    prediction = ops.convert_to_tensor(prediction)
    weight = None if weight is None else ops.convert_to_tensor(weight)
    keras_losses.loss_of(model, None, y, prediction, None, training=True)  # builds it
    found = known_losses.of_rows(model, ops.convert_to_tensor(y), prediction, weight)
    alone = [
        keras_losses.loss_of(
            model,
            None,
            y[k : k + 1],
            prediction[k : k + 1],
            None if weight is None else weight[k : k + 1],
            training=True,
        )
        for k in range(len(y))
    ]
    return found, np.asarray([float(a) for a in alone])


def classes_of(name):
    return {
        "mean_squared_error": keras.losses.MeanSquaredError,
        "mean_absolute_error": keras.losses.MeanAbsoluteError,
        "mean_absolute_percentage_error": keras.losses.MeanAbsolutePercentageError,
        "mean_squared_logarithmic_error": keras.losses.MeanSquaredLogarithmicError,
        "kl_divergence": keras.losses.KLDivergence,
    }.get(name) or getattr(keras.losses, "".join(part.title() for part in name.split("_")))


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
@pytest.mark.parametrize("name", [*NUMBERS, *OF_ROWS])
def test_each_row_has_the_loss_that_it_has_alone(name, reduction):
    for shape in ((ROWS, 3), (ROWS, 2, 5, 3)):
        model = compiled(classes_of(name)(reduction=reduction), shape)
        y, weight = made_up(shape), RANDOM.uniform(0, 2, ROWS).astype("float32")
        for w in (None, weight):
            found, alone = both(model, y, made_up(shape), w)
            assert found.shape == (ROWS,)
            np.testing.assert_allclose(found, alone, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("targets", [(ROWS,), (ROWS, 1), (ROWS, 5), (ROWS, 5, 1)])
@pytest.mark.parametrize("settings", [{}, {"from_logits": True}])
def test_classes_by_number(targets, settings):
    shape = (*targets[:2], 3) if targets[-1] == 5 or len(targets) == 3 else (ROWS, 3)
    model = compiled(keras.losses.SparseCategoricalCrossentropy(**settings), shape)
    y = RANDOM.integers(0, 3, targets)
    found, alone = both(model, y, made_up(shape), RANDOM.uniform(0, 2, ROWS).astype("float32"))
    np.testing.assert_allclose(found, alone, rtol=2e-6)


@pytest.mark.parametrize(
    ("targets", "outputs"),
    [
        ((ROWS,), (ROWS, 1)),
        ((ROWS, 1), (ROWS, 1)),
        ((ROWS, 5), (ROWS, 5, 1)),
        ((ROWS, 5, 1), (ROWS, 5)),
        ((ROWS, 1), (ROWS, 6)),
        ((ROWS, 1, 6), (ROWS, 5, 6)),
    ],
)
def test_targets_that_keras_stretches_along_the_same_row(targets, outputs):
    model = compiled("mse", outputs)
    found, alone = both(model, made_up(targets), made_up(outputs))
    np.testing.assert_allclose(found, alone, rtol=2e-6)


def test_a_weight_of_the_loss_counts():
    model = compiled("mse", (ROWS, 3), loss_weights=2.5)
    found, alone = both(model, made_up((ROWS, 3)), made_up((ROWS, 3)))
    np.testing.assert_allclose(found, alone, rtol=2e-6)


@pytest.mark.parametrize("weights", [(ROWS, 5), (ROWS, 1), (ROWS,)])
def test_weights_of_each_token_count(weights):
    model = compiled("sparse_categorical_crossentropy", (ROWS, 5, 3))
    weight = RANDOM.uniform(0, 2, weights).astype("float32")
    found, alone = both(model, RANDOM.integers(0, 3, (ROWS, 5)), made_up((ROWS, 5, 3)), weight)
    np.testing.assert_allclose(found, alone, rtol=2e-6)


def own_loss(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred), axis=-1)


class OwnCall(keras.losses.MeanSquaredError):
    def call(self, y_true, y_pred):
        return super().call(y_true, y_pred) * ops.mean(y_pred)


def with_own_call():
    loss = keras.losses.MeanSquaredError()
    loss.call = lambda y_true, y_pred: own_loss(y_true, y_pred) * ops.mean(y_pred)
    return loss


BY_PLACE = np.linspace(0.1, 0.9, ROWS, dtype="float32")[:, np.newaxis]


class OwnLoss(keras.Sequential):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


SQUARE = (ROWS, ROWS)


@pytest.mark.parametrize(
    ("loss", "targets", "outputs", "weights"),
    [
        ("mse", (ROWS,), (ROWS,), None),  # the mean over the last axis would be over the examples
        ("mse", (ROWS,), SQUARE, None),  # targets along the columns
        ("mse", (ROWS, 1, ROWS), SQUARE, None),
        ("mse", SQUARE, SQUARE, SQUARE),
        (own_loss, SQUARE, SQUARE, None),
        (OwnCall(), SQUARE, SQUARE, None),
        (keras.losses.CategoricalCrossentropy(axis=0), SQUARE, SQUARE, None),
        (keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"), SQUARE, SQUARE, None),
        (keras.losses.SparseCategoricalCrossentropy(ignore_class=0), (ROWS,), SQUARE, None),
        (keras.losses.CTC(), SQUARE, (ROWS, ROWS, 3), None),
        (keras.losses.Hinge(), SQUARE, SQUARE, None),  # asks whether all labels are 0 or 1
        ("squared_hinge", SQUARE, SQUARE, None),
        (with_own_call(), SQUARE, SQUARE, None),
        (keras.losses.CategoricalFocalCrossentropy(alpha=BY_PLACE), SQUARE, SQUARE, None),
        (keras.losses.Huber(delta=BY_PLACE), SQUARE, SQUARE, None),
    ],
)
def test_rule_19_what_is_not_known_is_left_to_single_rows(loss, targets, outputs, weights):
    model = compiled(loss, outputs)
    y, prediction = (ops.convert_to_tensor(made_up(s)) for s in (targets, outputs))
    weight = None if weights is None else ops.convert_to_tensor(made_up(weights))
    if isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        y = ops.convert_to_tensor(np.arange(ROWS) % 2)
    keras_losses.loss_of(model, None, y, prediction, None, training=True)  # builds it
    assert known_losses.of_rows(model, y, prediction, weight) is None


def test_rule_19_a_loss_of_your_own_model_is_left_to_single_rows():
    model = OwnLoss([keras.Input((3,)), keras.layers.Identity()])
    model.compile(loss="mse")
    y = ops.convert_to_tensor(made_up((ROWS, 3)))
    keras_losses.loss_of(model, None, y, y, None, training=True)
    assert known_losses.of_rows(model, y, y, None) is None
    del OwnLoss.compute_loss
    assert known_losses.of_rows(model, y, y, None) is not None


def test_rule_19_masked_predictions_are_left_to_single_rows():
    model = compiled("mse", (ROWS, 5, 3))
    y = ops.convert_to_tensor(made_up((ROWS, 5, 3)))
    keras_losses.loss_of(model, None, y, y, None, training=True)
    assert known_losses.of_rows(model, y, y, None) is not None
    prediction = ops.copy(y)
    keras_private.set_mask(prediction, ops.ones((ROWS, 5), "bool"))
    assert known_losses.of_rows(model, y, prediction, None) is None


def test_rule_19_weights_of_the_loss_that_are_no_number_are_left_to_single_rows():
    model = compiled("mse", (ROWS, 3), loss_weights=[np.arange(4.0)])
    y = ops.convert_to_tensor(made_up((ROWS, 3)))
    keras_losses.loss_of(model, None, y, y, None, training=True)
    assert known_losses.of_rows(model, y, y, None) is None


@pytest.mark.parametrize("owner", [keras.Model, keras.losses.Loss])
def test_rule_19_a_loss_that_somebody_has_changed_is_left_to_single_rows(owner, monkeypatch):
    model = compiled("mse", (ROWS, 3))
    y = ops.convert_to_tensor(made_up((ROWS, 3)))
    keras_losses.loss_of(model, None, y, y, None, training=True)
    assert known_losses.of_rows(model, y, y, None) is not None
    name = "compute_loss" if owner is keras.Model else "__call__"
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: ops.zeros(()))
    assert known_losses.of_rows(model, y, y, None) is None


class AddsLosses(keras.Sequential):
    @property
    def losses(self):
        return [ops.sum(self.layers[0].kernel)]


@pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")
@pytest.mark.parametrize(
    ("rows", "targets", "known", "jit_compile"),
    [
        (8, 1, [], False),
        (8, 1, [], True),
        (8, 1, ["x"], False),
        (8, 1, ["x", "y"], False),
        (1, 8, [], False),
        (8, 4, ["y"], False),
    ],
)
def test_rule_19_a_row_that_several_examples_would_share_is_refused(
    rows, targets, known, jit_compile
):
    """One label for the whole batch counted in the gradient of each example."""
    x, y = np.ones((rows, 3), "float32"), np.ones((targets, 2), "float32")
    like = [
        tf.TensorSpec([len(a) if name in known else None, a.shape[1]])
        for name, a in (("x", x), ("y", y))
    ]
    batches = tf.data.Dataset.from_generator(lambda: iter([(x, y)]), output_signature=tuple(like))
    model = dense()
    optimizer = keras_dp.DPSGD(1.0, max_grad_norm=1.0, noise_multiplier=0.0)
    model.compile(optimizer, loss="mse", jit_compile=jit_compile)
    before = model.get_weights()
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        model.fit(batches, verbose=0)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_losses_that_a_model_adds_by_a_property_of_its_own_count():
    model = AddsLosses([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(loss="mse")
    y = ops.convert_to_tensor(made_up((ROWS, 2)))
    keras_losses.loss_of(model, None, y, y, None, training=True)
    assert known_losses.of_rows(model, y, y, None) is None


def test_a_loss_in_float16_is_weighted_in_float32():
    """It was infinite: nothing would have been learned from these examples."""
    model = compiled(keras.losses.MeanSquaredError(dtype="float16"), (ROWS, 1), loss_weights=1e5)
    y = np.full((ROWS, 1), 100.0, "float32")
    found, alone = both(model, y, 0 * y)
    np.testing.assert_array_equal(found, alone)
    assert np.all(np.isfinite(found))


def require_exact(model, x, y, loss):
    model.compile("sgd", loss=loss)
    gradients, _ = example_gradients(model, x, y)
    found = private_clipped_sum(model, x, y, loss=loss, max_grad_norm=1e9)
    assert relative_error(found, clipped_sum(gradients, 1e9)) < 1e-5


def dense(**settings):
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, **settings)])


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge"])
def test_rule_19_labels_beside_it_do_not_change_what_a_label_means(loss):
    """With a label of -1 somewhere in the batch, every 0 was no longer taken as -1."""
    labels = np.array([[0, 1], [1, -1], [1, 0], [0, 0]], "float32")
    require_exact(dense(), RANDOM.normal(size=(ROWS, 3)), labels, loss)


@pytest.mark.parametrize(
    ("activation", "loss"),
    [
        (tf.nn.softmax, "categorical_crossentropy"),
        (tf.nn.softmax, "sparse_categorical_crossentropy"),
        (tf.nn.sigmoid, "binary_crossentropy"),
    ],
)
def test_a_softmax_of_tensorflow_s_own_has_a_gradient(activation, loss):
    """Keras took its logits, which the tape didn't know: only noise was added to the weights."""
    y = np.arange(ROWS) % 2
    y = y if loss.startswith("sparse") else np.eye(2, dtype="float32")[y]
    require_exact(dense(activation=activation), RANDOM.normal(size=(ROWS, 3)), y, loss)
