"""Rule 17: the plan can't change behind the accountant. Each test is an attack that once worked."""

import itertools
import os
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_dp
from keras_dp import PrivacyBudgetExceeded, PrivacyError
from keras_dp.accounting import compute_epsilon

pytestmark = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")

DELTA = 1e-5
N, BATCH = 64, 16
X = np.random.default_rng(0).normal(size=(N, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(N, 1)).astype("float32")


def private_model(sigma=1.0, **options):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    optimizer = keras_dp.DPSGD(0.01, max_grad_norm=1.0, noise_multiplier=sigma)
    model.compile(optimizer, loss="mse", **options)
    return model


def during(**hooks):
    return keras.callbacks.LambdaCallback(**hooks)


def gaussian(steps, sigma=1.0):
    return compute_epsilon(
        num_examples=1, batch_size=1, noise_multiplier=sigma, steps=steps, delta=DELTA
    )


# -- datasets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [keras_dp.PoissonDataset, keras_dp.ShuffledDataset])
def test_rule_17_what_accounting_rests_on_is_read_only(kind):
    data = kind(X, Y, batch_size=BATCH)
    public = ["x", "y", "sample_weight", "batch_size", "num_examples", "seed", "steps_per_epoch"]
    public += ["sampling", "num_batches", "workers", "use_multiprocessing", "secure_mode", "passes"]
    for name in public:
        before = data.batch_size, data.num_examples, len(data)
        with pytest.raises(AttributeError):
            setattr(data, name, 1)
        with pytest.raises(AttributeError):
            delattr(data, name)
        assert (data.batch_size, data.num_examples, len(data)) == before


def test_rule_17_a_plan_that_is_changed_in_mid_fit_stays():
    """Reported 3.78 for 38.9 spent, when assigning to `batch_size` went through."""
    data = keras_dp.PoissonDataset(X, Y, batch_size=BATCH)
    model = private_model()

    def attack(batch, logs):
        vars(data).update(batch_size=N, x=X[:1], _num_batches=1)

    sizes = []
    grab = during(on_train_batch_begin=attack)
    history = model.fit(data, epochs=3, callbacks=[grab], verbose=0)
    del sizes, history
    wanted = compute_epsilon(
        num_examples=N, batch_size=BATCH, noise_multiplier=1.0, epochs=3, delta=DELTA
    )
    assert model.optimizer.get_epsilon(DELTA) == pytest.approx(wanted)
    (release,) = model.optimizer.ledger
    assert (release.steps, release.sampling_rate) == (12, 1 / 4)


@pytest.mark.parametrize("how", ["evaluate", "predict", "by hand"])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_rule_17_the_order_belongs_to_the_training_that_runs(how, monkeypatch):
    """`evaluate` in a callback reshuffled the epoch that was being trained."""
    data = keras_dp.ShuffledDataset(X, Y, batch_size=BATCH)
    trained = []
    epoch_of = keras_dp.ShuffledDataset._epoch

    def recording(self):
        assert self is not data
        for indices in epoch_of(self):
            trained.append(indices.copy())
            yield indices

    monkeypatch.setattr(keras_dp.ShuffledDataset, "_epoch", recording)
    other = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    other.compile("sgd", loss="mse")

    def attack(batch, logs):
        if how == "evaluate":
            other.evaluate(data, verbose=0)
        elif how == "predict":
            other.predict(data, verbose=0)
        else:
            data.on_epoch_begin()
            data[0]

    model = private_model()
    attacker = during(on_train_batch_begin=attack, on_train_batch_end=attack)
    model.fit(data, epochs=3, callbacks=[attacker], verbose=0)
    per_epoch = N // BATCH
    assert len(trained) == 3 * per_epoch
    for epoch in (1, 2, 3):
        taken = trained[len(trained) - epoch * per_epoch :][:per_epoch]
        assert sorted(np.concatenate(taken)) == list(range(N))


def test_rule_17_a_subclass_that_draws_otherwise_is_not_believed():
    class Everything(keras_dp.PoissonDataset):
        def __getitem__(self, index):
            return self._batch(np.arange(self.num_examples))

    model = private_model()
    model.fit(Everything(X, Y, batch_size=BATCH), epochs=1, verbose=0)
    assert model.optimizer.get_epsilon(DELTA) == pytest.approx(gaussian(4))
    with pytest.raises(ValueError, match="PoissonDataset"):
        model.optimizer.begin_loop(Everything(X, Y, batch_size=BATCH))


# -- loops over shuffled batches -----------------------------------------------------------------


def loop_of(data, batches, *, steps_in=None):
    """Steps of a hand-written loop on batches; and how often each example took part."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    optimizer = keras_dp.DPSGD(0.01, max_grad_norm=1.0, noise_multiplier=1.0)

    def loss_fn(example):
        return keras.ops.mean((model(example[0]) - example[1]) ** 2)

    taken = np.zeros(data.num_examples, int)
    for batch in batches:
        optimizer.private_gradients(loss_fn, model.trainable_variables, batch, sampling=data)
        np.add.at(taken, np.ravel(batch[0]).astype(int), 1)
    return optimizer, taken


def marked(size=4):
    marks = np.arange(16, dtype="float32").reshape(-1, 1)
    return keras_dp.ShuffledDataset(marks, marks, batch_size=size)


def halves_over_one_order(data):
    for _ in range(5):
        yield from [data[0], data[1]]


def halves_of_new_orders(data):
    for k in range(6):
        data.on_epoch_begin()
        yield from [data[2 * (k % 2)], data[2 * (k % 2) + 1]]


def halves_drawn_ahead(data):
    drawn = []
    for _ in range(5):
        data.on_epoch_begin()
        drawn.append([data[i] for i in range(4)])
    for one, two in itertools.pairwise(drawn):
        yield from [one[0], two[1], one[2], two[3]]


def last_halves(data):
    for _ in range(4):
        data.on_epoch_begin()
        yield from [data[3], data[2]]


def one_batch_of_each_pass(data):
    for _ in range(8):
        data.on_epoch_begin()
        yield data[1]


def whole_passes(data):
    for _ in range(3):
        data.on_epoch_begin()
        yield from [data[i] for i in (2, 0, 3, 1)]


ORDERS = [
    halves_over_one_order,
    halves_of_new_orders,
    halves_drawn_ahead,
    last_halves,
    one_batch_of_each_pass,
    whole_passes,
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.one_in(6)
def test_rule_17_no_example_takes_part_more_often_than_is_counted(order):
    """Five passes were counted where an example had taken part nine times."""
    data = marked()
    optimizer, taken = loop_of(data, order(data))
    counted = sum(-(-r.steps // 4) for r in optimizer.ledger)
    assert {r.sampler for r in optimizer.ledger} == {"shuffled"}
    assert taken.max() <= counted
    assert optimizer.get_epsilon(DELTA) == pytest.approx(gaussian(counted))
    if order is whole_passes:
        assert counted == 3


def test_rule_17_any_order_of_batches_counts_enough():
    random = np.random.default_rng(7)
    for _ in range(2):
        data = marked()
        waiting = []

        def batches(data=data, waiting=waiting):
            for _ in range(20):
                if random.random() < 0.3:
                    data.on_epoch_begin()
                waiting.append(data[int(random.integers(4))])
                yield waiting.pop(int(random.integers(len(waiting))))
                if random.random() < 0.5:
                    waiting.append(data[int(random.integers(4))])

        optimizer, taken = loop_of(data, batches())
        assert taken.max() <= sum(-(-r.steps // 4) for r in optimizer.ledger)


@pytest.mark.thorough
def test_rule_17_rows_of_unknown_passes_count_in_every_step():
    data = marked()
    optimizer, _ = loop_of(data, [tuple(np.array(a) for a in data[i]) for i in range(4)])
    assert [(r.sampler, r.steps) for r in optimizer.ledger] == [("unknown", 4)]


@pytest.mark.parametrize("kind", [keras_dp.PoissonDataset, keras_dp.ShuffledDataset])
@pytest.mark.one_in(2)
def test_rule_17_each_draw_belongs_to_one_step(kind):
    data = kind(X[:16], Y[:16], batch_size=4)
    model = private_model()
    optimizer = keras_dp.DPSGD(0.01, max_grad_norm=1.0, noise_multiplier=1.0)

    def loss_fn(example):
        return keras.ops.mean((model(example[0]) - example[1]) ** 2)

    first, second = data[0], data[1]
    for batch in (first, second):
        optimizer.private_gradients(loss_fn, model.trainable_variables, batch, sampling=data)
    again = [first] if kind is keras_dp.ShuffledDataset else [first, (second[0], second[1] + 1)]
    for batch in again:
        with pytest.raises(PrivacyError, match="used for a step before"):
            optimizer.private_gradients(loss_fn, model.trainable_variables, batch, sampling=data)
    assert optimizer.ledger.steps == 2


# -- steps that `fit` did not announce ----------------------------------------------------------


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.one_in(2)
def test_rule_17_a_train_step_in_a_callback_is_no_draw_of_fit(eagerly):
    model = private_model(run_eagerly=eagerly)
    everything = (tf.constant(X), tf.constant(Y))
    attack = during(on_train_batch_end=lambda batch, logs: model.train_step(everything))
    with pytest.raises(PrivacyError, match="while `fit` is running"):
        model.fit(X, Y, batch_size=BATCH, callbacks=[attack], verbose=0)
    assert model.optimizer.ledger.steps == 1
    # By itself it is one step on a batch of unknown origin, as the ledger says.
    model.train_step(everything)
    assert [(r.sampler, r.steps) for r in model.optimizer.ledger] == [
        ("poisson", 1),
        ("unknown", 1),
    ]


@pytest.mark.thorough
def test_rule_17_a_compiled_train_step_is_no_draw_of_fit():
    model = private_model()
    everything = (tf.constant(X), tf.constant(Y))
    step = tf.function(lambda: model.train_step(everything))
    step()
    attack = during(on_train_batch_end=lambda batch, logs: step())
    with pytest.raises(tf.errors.InvalidArgumentError, match="accounted wrongly"):
        model.fit(X, Y, batch_size=BATCH, callbacks=[attack], verbose=0)
    assert [(r.sampler, r.steps) for r in model.optimizer.ledger] == [
        ("unknown", 1),
        ("poisson", 1),
    ]


@pytest.mark.parametrize("when", ["on_train_batch_begin", "on_train_batch_end", "on_epoch_end"])
@pytest.mark.one_in(3)
def test_rule_17_the_train_function_is_for_fit_alone(when):
    model = private_model()
    everything = tf.data.Dataset.from_tensors((X, Y)).repeat()

    def attack(*_, logs=None):
        model.train_function(iter(everything))

    with pytest.raises(PrivacyError, match="by itself"):
        model.fit(X, Y, batch_size=BATCH, callbacks=[during(**{when: attack})], verbose=0)
    with pytest.raises(PrivacyError, match="by itself"):
        attack()


def unprotected(model):
    def step(iterator):
        x, y = next(iterator)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        kernel = model.trainable_variables[0]
        kernel.assign_sub(tape.gradient(loss, kernel.value))
        return {"loss": loss}

    return step


@pytest.mark.parametrize("name", ["train_function", "make_train_function", "train_step"])
@pytest.mark.parametrize("before", [True, False])
def test_rule_17_nothing_but_the_private_step_trains(name, before):
    model = private_model()
    if not before:
        model.fit(X, Y, batch_size=BATCH, verbose=0)
    weights = model.get_weights()
    own = unprotected(model)
    value = own
    if name == "make_train_function":

        def value(force=False):
            model.train_function = own

    setattr(model, name, value)
    for train in (
        lambda: model.fit(X, Y, batch_size=BATCH, verbose=0),
        lambda: model.train_on_batch(X, Y),
    ):
        with pytest.raises(PrivacyError, match="replaced after `compile`"):
            train()
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))


@pytest.mark.parametrize("name", ["train_function", "optimizer", "compile"])
@pytest.mark.one_in(3)
def test_rule_17_nothing_is_put_in_its_place_in_mid_fit(name):
    model = private_model()

    def attack(batch, logs):
        if name == "train_function":
            model.train_function = unprotected(model)
        elif name == "optimizer":
            model.optimizer = keras.optimizers.SGD()
        else:
            model.compile("sgd", loss="mse")

    with pytest.raises(PrivacyError, match=r"replaced after|compiled again"):
        model.fit(X, Y, batch_size=BATCH, callbacks=[during(on_train_batch_end=attack)], verbose=0)


# -- one training at a time ----------------------------------------------------------------------


def test_rule_17_no_fit_within_a_fit():
    """A budget of 1 ended at 43.6: the inner fit lifted the limit of the outer one."""
    model = private_model()

    def attack(epoch, logs):
        model.fit(X, Y, batch_size=BATCH, verbose=0)

    budget = keras_dp.PrivacyBudget(9.0, delta=DELTA, verbose=0)
    with pytest.raises(PrivacyError, match="no fit within a fit"):
        model.fit(
            X,
            Y,
            batch_size=4,
            epochs=9,
            callbacks=[budget, during(on_epoch_begin=attack)],
            verbose=0,
        )
    assert model.optimizer.ledger.steps == 0


def test_rule_17_no_fit_of_the_same_weights_in_another_model():
    shared = layers.Dense(3)
    one = keras.Sequential([keras.Input((3,)), shared, layers.Dense(1)])
    two = keras.Sequential([keras.Input((3,)), shared, layers.Dense(1)])
    for model in (one, two):
        model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")

    def attack(epoch, logs):
        two.fit(X, Y, batch_size=BATCH, verbose=0)

    with pytest.raises(PrivacyError, match="weights in common"):
        one.fit(X, Y, batch_size=BATCH, callbacks=[during(on_epoch_begin=attack)], verbose=0)
    two.fit(X, Y, batch_size=BATCH, verbose=0)  # afterwards it may


def test_rule_17_no_two_threads_train_one_model():
    model = private_model()
    inside, go_on = threading.Event(), threading.Event()
    errors = []

    def wait(batch, logs):
        inside.set()
        assert go_on.wait(60)

    def other():
        assert inside.wait(60)
        for train in (
            lambda: model.fit(X, Y, batch_size=BATCH, verbose=0),
            lambda: model.train_on_batch(X, Y),
            lambda: model.train_step((X, Y)),
            lambda: model.optimizer.begin_loop(),
        ):
            try:
                train()
            except PrivacyError as error:
                errors.append(error)
        go_on.set()

    thread = threading.Thread(target=other)
    thread.start()
    model.fit(X, Y, batch_size=BATCH, callbacks=[during(on_train_batch_end=wait)], verbose=0)
    thread.join()
    assert len(errors) == 4
    assert [(r.sampler, r.steps) for r in model.optimizer.ledger] == [("poisson", 4)]


def test_rule_17_every_budget_holds_in_train_on_batch():
    """Only the last of two was kept."""
    model = private_model()
    budgets = [
        keras_dp.PrivacyBudget(e, delta=DELTA, accountant="rdp", verbose=0) for e in (10.0, 40.0)
    ]
    model.fit(X, Y, batch_size=BATCH, callbacks=budgets, verbose=0)
    with pytest.raises(PrivacyBudgetExceeded):
        for _ in range(20):
            model.train_on_batch(X, Y)
    assert 5.0 < model.optimizer.get_epsilon(DELTA, "rdp") <= 10.0


@pytest.mark.thorough
def test_rule_17_a_fit_that_failed_leaves_the_optimizer_free():
    model = private_model()

    def fail(batch, logs):
        raise KeyError("on purpose")

    for _ in range(2):
        with pytest.raises(KeyError):
            model.fit(
                X, Y, batch_size=BATCH, callbacks=[during(on_train_batch_end=fail)], verbose=0
            )
    model.fit(X, Y, batch_size=BATCH, verbose=0)
    assert model.optimizer.ledger.steps == 6


# -- journals and forks ---------------------------------------------------------------------------


def test_rule_17_one_training_at_a_time_uses_a_journal(tmp_path):
    path = tmp_path / "privacy.jsonl"

    def budget():
        return keras_dp.PrivacyBudget(3.0, delta=DELTA, ledger_path=path, verbose=0)

    other = private_model()

    def attack(epoch, logs):
        other.fit(X, Y, batch_size=BATCH, callbacks=[budget()], verbose=0)

    model = private_model(sigma=2.0)
    with pytest.raises(PrivacyError, match="Another training is using the journal"):
        model.fit(
            X,
            Y,
            batch_size=BATCH,
            callbacks=[budget(), during(on_epoch_begin=attack)],
            verbose=0,
        )
    assert other.optimizer.ledger.steps == 0
    # The error ended that training, so the journal is free.
    model.fit(X, Y, batch_size=BATCH, callbacks=[budget()], verbose=0)
    assert model.optimizer.ledger.steps == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
def test_rule_17_both_sides_of_a_fork_add_up():
    """20 steps on either side after 10 in common are 50 where the two meet, not 30."""
    from keras_dp.ledger import LedgerBook, PrivacyLedger, Release

    made = 10
    book = LedgerBook(lambda: made)
    made = 0
    book.open(Release("poisson", 1.0, sampling_rate=0.1))
    made = 10
    parent = book.ledger
    book.fork()
    made = 30
    child = book.ledger
    after = PrivacyLedger([parent.releases[0].with_steps(30)])
    assert child.steps == 30
    assert after.merge(child).steps == child.merge(after).steps == 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")
def test_rule_17_a_meter_notices_a_fork(monkeypatch):
    from keras_dp.sampling import Sampling
    from keras_dp.training import meter as meters

    meter = meters.Meter(1.0, 1.0, clipping="flat", seeded=False)
    meter.declare(Sampling("poisson", batch_size=4.0, sampling_rate=0.1), iteration=0)
    for _ in range(10):
        meter._releases.increment()
    before = meter.ledger
    real = os.getpid()
    monkeypatch.setattr(meters.os, "getpid", lambda: real + 1)
    meter.announce(1)
    for _ in range(20):
        meter._releases.increment()
    assert meter.ledger.steps == 30
    grown = before.releases[0].with_steps(30)
    assert meter.ledger.merge([grown]).steps == 50
