"""A fault that was found while the package was rebuilt, as a user would meet it again."""

import pytest
import tensorflow as tf
import tiny

import keras_dp


def traced_step(optimizer, model, data):
    def loss_fn(example):
        x, y = example
        return tf.reduce_mean((model(x) - y) ** 2)

    @tf.function(reduce_retracing=True)
    def step(batch):
        variables = model.trainable_variables
        gradients = optimizer.private_gradients(loss_fn, variables, batch, sampling=data)
        optimizer.apply(gradients, variables)

    return step


@pytest.mark.thorough
def test_the_steps_of_a_loop_are_forgotten_by_a_later_fit():
    """They once outlived it, so that a schedule in a traced loop died with advice for others."""
    model = tiny.model()
    optimizer = keras_dp.DPSGD(
        0.1, max_grad_norm=1.0, noise_multiplier=lambda step: 1.0 + 0.1 * (step // 8)
    )
    model.compile(optimizer, loss="mse")
    arrays = tiny.data()
    data = keras_dp.PoissonDataset(*arrays, batch_size=16)
    optimizer.begin_loop(data, steps=4)
    model.fit(*arrays, batch_size=16, verbose=0)
    step = traced_step(optimizer, model, data)
    with pytest.raises(ValueError, match=r"begin_loop\(sampling, steps=\.\.\.\)"):
        step(data[0])
    optimizer.begin_loop(data, steps=6)
    step = traced_step(optimizer, model, data)
    for _ in range(6):
        step(data[0])
    made = [(r.noise_multiplier, r.steps) for r in optimizer.ledger if r.steps]
    assert sum(steps for _, steps in made) == 10
    assert {sigma for sigma, _ in made} == {1.0, 1.1}
    assert sum(steps for sigma, steps in made if sigma == 1.0) == 8
