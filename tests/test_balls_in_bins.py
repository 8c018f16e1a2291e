"""Batches that every example chooses for itself, once an epoch; batches cut to a public size.

Each check of chance has a stated rate of false alarms, and fails for samplers that draw otherwise.
"""

import itertools

import keras
import numpy as np
import pytest
import tiny
from scipy import stats
from test_sampling import ids, seen, tiny_model  # noqa: F401 - `seen` is a fixture

import keras_dp
from keras_dp.gradients import Engine

pytestmark = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")

N, BATCH, EPOCHS = 500, 50, 100
STEPS = N // BATCH
ALARM = 1e-7


# -- is it balls in bins? -------------------------------------------------------------------


def choices_of(batches, n=N, steps=STEPS):
    """In which batch of its epoch each example was: an array (epochs, n); -1 for none."""
    epochs = [batches[k : k + steps] for k in range(0, len(batches), steps)]
    chosen = np.full((len(epochs), n), -1)
    for one, epoch in zip(chosen, epochs, strict=True):
        for number, batch in enumerate(epoch):
            assert np.all(one[batch] == -1), "an example comes twice in an epoch"
            one[batch] = number
    return chosen


def problems(chosen, steps=STEPS):
    """What is wrong with choices, by name. Each is found by mistake once in 1e7 draws."""
    epochs, n = chosen.shape
    found = []
    if np.any(chosen == -1):
        found.append("an example is missing")
    sizes = np.stack([np.bincount(c[c >= 0], minlength=steps) for c in chosen])
    # The sizes of an epoch are multinomial: Pearson's statistic, added up over epochs.
    statistic = ((sizes - n / steps) ** 2 / (n / steps)).sum()
    freedom = epochs * (steps - 1)
    if not ALARM / 2 < stats.chi2.sf(statistic, freedom) < 1 - ALARM / 2:
        found.append("sizes")

    def agree_too_often(equal, trials):
        return not ALARM / 2 < stats.binom.cdf(equal, trials, 1 / steps) < 1 - ALARM / 2

    # Choices of two examples agree as often as chance has it; each is in one pair.
    if agree_too_often((chosen[:, 0::2] == chosen[:, 1::2]).sum(), epochs * n // 2):
        found.append("two examples")
    if agree_too_often((chosen[0::2] == chosen[1::2]).sum(), epochs * n // 2):
        found.append("two epochs")
    # Whether a pair agrees says nothing of whether it agrees again.
    together = (chosen[:, 0::2] == chosen[:, 1::2]).astype(int)
    again = (together[0::2] & together[1::2]).sum()
    trials = epochs // 2 * (n // 2)
    if not ALARM / 2 < stats.binom.cdf(again, trials, 1 / steps**2) < 1 - ALARM / 2:
        found.append("pairs in two epochs")
    return found


def of_data(data, epochs=EPOCHS):
    """The batches that a `fit` on rows that are their own indices is fed."""
    own = data.for_fit(None, secure_mode=False)
    return [indices.copy() for _ in range(epochs) for indices in own._epoch()]


def permutations_cut_into_batches():
    return of_data(keras_dp.ShuffledDataset(np.arange(N), batch_size=BATCH))


def one_choice_again_and_again():
    epoch = of_data(keras_dp.BallsInBinsDataset(np.arange(N), batch_size=BATCH), 1)
    return epoch * EPOCHS


def pairs_that_stay_together():
    epochs = []
    for _ in range(EPOCHS):
        bins = np.random.default_rng().integers(STEPS, size=N // 2).repeat(2)
        epochs += [np.flatnonzero(bins == k) for k in range(STEPS)]
    return epochs


def each_epoch_the_one_before_turned():
    bins = np.random.default_rng().integers(STEPS, size=N)
    return [np.flatnonzero((bins + e) % STEPS == k) for e in range(EPOCHS) for k in range(STEPS)]


def batches_of_sizes_drawn_too_evenly():
    epochs = []
    for _ in range(EPOCHS):
        cuts = np.cumsum([0, *np.random.default_rng().permuted([48, 52] * (STEPS // 2))])
        order = np.random.default_rng().permutation(N)
        epochs += [order[a:b] for a, b in itertools.pairwise(cuts)]
    return epochs


def a_pair_that_avoids_itself():
    """Two examples of a pair are never together: the others choose freely."""
    epochs = []
    for _ in range(EPOCHS):
        bins = np.random.default_rng().integers(STEPS, size=N)
        bins[1::2] = (bins[0::2] + np.random.default_rng().integers(1, STEPS, N // 2)) % STEPS
        epochs += [np.flatnonzero(bins == k) for k in range(STEPS)]
    return epochs


@pytest.mark.parametrize("secure_mode", [False, True])
def test_every_example_chooses_its_batch_by_itself_in_every_epoch(secure_mode):
    data = keras_dp.BallsInBinsDataset(np.arange(N), batch_size=BATCH, secure_mode=secure_mode)
    assert problems(choices_of(of_data(data))) == []


@pytest.mark.parametrize(
    ("sampler", "wrong"),
    [
        (permutations_cut_into_batches, "sizes"),
        (one_choice_again_and_again, "two epochs"),
        (pairs_that_stay_together, "two examples"),
        (each_epoch_the_one_before_turned, "two epochs"),
        (batches_of_sizes_drawn_too_evenly, "sizes"),
        (a_pair_that_avoids_itself, "two examples"),
    ],
)
def test_the_check_finds_samplers_that_draw_otherwise(sampler, wrong):
    assert wrong in problems(choices_of(sampler()))


def test_the_check_finds_an_example_that_is_missing():
    batches = of_data(keras_dp.BallsInBinsDataset(np.arange(N), batch_size=BATCH), 10)
    assert "an example is missing" in problems(choices_of([batches[0][1:], *batches[1:]]))
    with pytest.raises(AssertionError, match="twice"):
        choices_of([batches[0], np.append(batches[1], batches[0][0]), *batches[2:]])


@pytest.mark.parametrize("steps_per_execution", [1, 4])
@pytest.mark.one_in(2)
def test_fit_feeds_whole_epochs_to_the_step(seen, steps_per_execution):  # noqa: F811
    model = tiny_model()
    model.steps_per_execution = steps_per_execution
    data = keras_dp.BallsInBinsDataset(ids(N), ids(N), batch_size=BATCH)
    for epochs in (6, 4):
        model.fit(data, epochs=epochs, verbose=0)
    chosen = choices_of(seen)
    assert chosen.shape == (10, N) and problems(chosen) == []
    assert [(r.sampler, r.steps, r.steps_per_epoch) for r in model.optimizer.ledger] == [
        ("balls_in_bins", 60, STEPS),
        ("balls_in_bins", 40, STEPS),
    ]


@pytest.mark.thorough
def test_a_fit_that_is_broken_off_and_the_next_have_epochs_of_their_own(seen):  # noqa: F811
    model = tiny_model()
    data = keras_dp.BallsInBinsDataset(ids(N), ids(N), batch_size=BATCH)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 3

    model.fit(data, epochs=2, callbacks=[Stop()], verbose=0)
    model.fit(data, epochs=1, verbose=0)
    assert [r.steps for r in model.optimizer.ledger] == [4, STEPS]
    choices_of([*seen[:4], *[np.array([], int)] * (STEPS - 4)])
    assert np.all(choices_of(seen[4:]) >= 0)
    wanted = [
        keras_dp.Release("balls_in_bins", 1.0, steps, steps_per_epoch=STEPS) for steps in (4, STEPS)
    ]
    assert model.optimizer.get_epsilon(1e-5) == pytest.approx(
        keras_dp.accounting.ledger_epsilon(wanted, 1e-5)
    )


# -- what it costs --------------------------------------------------------------------------


@pytest.mark.thorough
def test_epsilon_is_below_that_of_poisson_batches_and_of_a_shuffle():
    found = {}
    for kind in (
        keras_dp.BallsInBinsDataset,
        keras_dp.PoissonDataset,
        keras_dp.ShuffledDataset,
    ):
        x, y = tiny.data(400)
        model = tiny.compiled()
        model.fit(kind(x, y, batch_size=20), epochs=2, verbose=0)
        found[kind] = model.optimizer.get_epsilon(1e-5)
    assert found[keras_dp.BallsInBinsDataset] < found[keras_dp.PoissonDataset]
    assert found[keras_dp.PoissonDataset] < found[keras_dp.ShuffledDataset] / 2


def test_the_divisor_is_the_number_of_examples_over_that_of_steps():
    data = keras_dp.BallsInBinsDataset(np.zeros(103), batch_size=10)
    assert (len(data), data.sampling.batch_size) == (11, 103 / 11)
    sizes = {len(data[k][0]) for k in range(11)}
    assert len(sizes) > 1


@pytest.mark.thorough
def test_a_budget_stops_within_an_epoch_at_the_exact_step():
    model = tiny.compiled()
    x, y = tiny.data(400)
    data = keras_dp.BallsInBinsDataset(x, y, batch_size=20)
    one_more = [
        keras_dp.accounting.ledger_epsilon(
            [keras_dp.Release("balls_in_bins", 1.0, steps, steps_per_epoch=20)], 1e-5
        )
        for steps in (27, 28)
    ]
    budget = keras_dp.PrivacyBudget(sum(one_more) / 2, delta=1e-5, verbose=0)
    model.fit(data, epochs=5, callbacks=[budget], verbose=0)
    assert model.optimizer.ledger.steps == 27
    assert model.optimizer.get_epsilon(1e-5) == pytest.approx(one_more[0])


# -- the dataset ------------------------------------------------------------------------------


def test_rule_17_what_accounting_rests_on_is_read_only_here_too():
    data = keras_dp.BallsInBinsDataset(ids(64), ids(64), batch_size=16)
    for name in ("x", "y", "batch_size", "num_examples", "seed", "secure_mode", "passes"):
        with pytest.raises(AttributeError):
            setattr(data, name, 1)
        with pytest.raises(AttributeError):
            delattr(data, name)
    with pytest.raises(ValueError, match=r"steps_per_epoch=3.*BallsInBinsDataset"):
        tiny_model().fit(data, steps_per_epoch=3, verbose=0)


def test_rule_17_the_choices_belong_to_the_training_that_runs(seen):  # noqa: F811
    data = keras_dp.BallsInBinsDataset(ids(N), ids(N), batch_size=BATCH)

    def attack(batch, logs):
        data.on_epoch_begin()
        vars(data).update(_order=np.arange(N), _edges=np.full(STEPS + 1, N), batch_size=N)
        data[0]

    attacker = keras.callbacks.LambdaCallback(on_train_batch_begin=attack)
    tiny_model().fit(data, epochs=4, callbacks=[attacker], verbose=0)
    assert problems(choices_of(seen)) == []


@pytest.mark.thorough
def test_rule_17_a_subclass_that_draws_otherwise_is_not_believed_here_either():
    class Everything(keras_dp.BallsInBinsDataset):
        def _plan(self):
            edges = np.full(len(self) + 1, self.num_examples)
            edges[0] = 0
            return np.arange(self.num_examples), edges

    x, y = tiny.data(40)
    model = tiny.compiled()
    model.fit(Everything(x, y, batch_size=10), verbose=0)
    assert [r.sampler for r in model.optimizer.ledger] == ["unknown"]


def test_rule_07_choices_are_not_replayed():
    epochs = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        data = keras_dp.BallsInBinsDataset(np.arange(N), batch_size=BATCH)
        epochs += [choices_of(of_data(data, 1)), choices_of(of_data(data, 1))]
    for one, other in itertools.combinations(epochs, 2):
        assert np.mean(one == other) < 0.5


@pytest.mark.thorough
def test_a_seed_repeats_the_choices_and_marks_the_ledger():
    made = [keras_dp.BallsInBinsDataset(ids(N), ids(N), batch_size=BATCH, seed=3) for _ in "ab"]
    one, other = (choices_of(of_data(data, 2)) for data in made)
    np.testing.assert_array_equal(one, other)
    model = tiny_model()
    model.fit(made[0], verbose=0)
    assert [r.seeded for r in model.optimizer.ledger] == [True]
    with pytest.raises(ValueError, match="secure_mode"):
        keras_dp.BallsInBinsDataset(ids(N), batch_size=BATCH, seed=3, secure_mode=True)


def test_secure_choices_are_fair_where_words_don_t_divide(monkeypatch):
    """2^64 leaves a rest of 1 by 3: the last word would make bin 0 likelier, and is drawn again."""
    from keras_dp.sampling import draws

    words = iter([np.array([2**64 - 1, 5, 2**64 - 2], np.uint64), np.array([4], np.uint64)])
    monkeypatch.setattr(draws, "secure_words", lambda count: next(words))
    assert draws.secure_bins(3, 3).tolist() == [1, 2, 2]


@pytest.mark.thorough
def test_a_loop_over_whole_passes_is_accounted_as_such():
    x, y = tiny.data(64)
    data = keras_dp.BallsInBinsDataset(x, y, batch_size=16)
    model = tiny.model()
    optimizer = tiny.sgd()

    def loss_fn(example):
        return keras.ops.mean((model(example[0]) - example[1]) ** 2)

    for _ in range(2):
        data.on_epoch_begin()
        for k in (2, 0, 3, 1):
            batch = data[k]
            if len(batch[0]):
                optimizer.private_gradients(
                    loss_fn, model.trainable_variables, batch, sampling=data
                )
    assert {r.sampler for r in optimizer.ledger} <= {"balls_in_bins", "shuffled"}


# -- batches of a public size -----------------------------------------------------------------


def test_no_batch_is_larger_than_its_capacity_and_what_is_cut_is_counted():
    """1000 draws of B(400, 1/8): sizes are those of Poisson draws, cut."""
    data = keras_dp.PoissonDataset(np.arange(400), batch_size=50, batch_capacity=55, seed=1)
    plain = keras_dp.PoissonDataset(np.arange(400), batch_size=50)
    sizes = np.array([len(data[0][0]) for _ in range(1000)])
    wanted = np.array([len(plain[0][0]) for _ in range(1000)])
    assert sizes.max() == 55 and plain.dropped == 0
    assert stats.ks_2samp(sizes, np.minimum(wanted, 55)).pvalue > ALARM
    cut = np.maximum(wanted - 55, 0)
    error = np.hypot(cut.std(), cut.std()) / np.sqrt(1000)
    assert abs(data.dropped / 1000 - cut.mean()) < 5.5 * error
    assert (sizes == 55).sum() <= data.dropped


@pytest.mark.parametrize("secure_mode", [False, True])
@pytest.mark.one_in(2)
def test_what_is_cut_is_chosen_uniformly(secure_mode):
    """No example is kept more often than another: Pearson's statistic. False alarms: 1e-7.

    Kept are 2000 times about 21 of 40; dependence within a draw makes it smaller, not larger.
    """
    data = keras_dp.PoissonDataset(
        np.arange(40), batch_size=20, batch_capacity=21, secure_mode=secure_mode
    )
    kept = np.bincount(np.concatenate([data[0][0] for _ in range(2000)]), minlength=40)
    assert data.dropped > 1000
    statistic = ((kept - kept.mean()) ** 2 / kept.mean()).sum()
    assert stats.chi2.sf(statistic, 39) > ALARM
    # The first rows alone, as a cut of sorted indices would leave them, are found.
    biased = np.bincount(np.concatenate([np.sort(data[0][0])[:15] for _ in range(500)]))
    assert stats.chi2.sf(((biased - biased.mean()) ** 2 / biased.mean()).sum(), 39) < ALARM


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_every_batch_is_padded_to_the_capacity_and_padding_adds_nothing(jit_compile, monkeypatch):
    padded = []
    original = Engine.padding.fget
    monkeypatch.setattr(
        Engine, "padding", property(lambda self: padded.append(original(self)) or padded[-1])
    )
    x = np.ones((200, 1), "float32")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(
        tiny.noiseless(keras_dp.DPSGD, 1.0),
        loss=lambda y, p: keras.ops.sum(p, axis=-1),
        jit_compile=jit_compile,
    )
    data = keras_dp.PoissonDataset(x, x, batch_size=20, batch_capacity=24)
    weights = [model.get_weights()[0].item()]
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda b, logs: weights.append(model.get_weights()[0].item())
    )
    model.fit(data, epochs=3, callbacks=[watch], verbose=0)
    assert set(padded) == {32 if jit_compile else 24}
    sizes = -20 * np.diff(weights)  # each example pushes by one
    np.testing.assert_allclose(sizes, np.round(sizes), atol=1e-3)
    assert sizes.max() < 24.5 and len(set(np.round(sizes))) > 1
    # A later fit without one is traced anew.
    padded.clear()
    model.fit(x, x, batch_size=20, verbose=0)
    assert set(padded) == {32 if jit_compile else 1}
    assert [r.sampler for r in model.optimizer.ledger] == ["truncated_poisson", "poisson"]


@pytest.mark.thorough
def test_a_capacity_is_accounted_for():
    """n 60,000, batch 256, sigma 1.1, 60 epochs: 2.401 at 320, by dp-accounting itself."""
    data = keras_dp.PoissonDataset(
        np.broadcast_to(np.float32(0), (60_000,)), batch_size=256, batch_capacity=320
    )
    release = data.sampling.release(
        noise_multiplier=1.1, max_grad_norm=1.0, clipping="flat", seeded=False
    )
    epsilon = keras_dp.accounting.ledger_epsilon([release.with_steps(60 * 235)], 1e-5)
    assert epsilon == pytest.approx(2.401, abs=1e-3)


@pytest.mark.parametrize("capacity", [0, 19, 2.5, True])
def test_a_capacity_below_the_batch_size_is_refused(capacity):
    with pytest.raises(ValueError, match="batch_capacity"):
        keras_dp.PoissonDataset(np.zeros(100), batch_size=20, batch_capacity=capacity)
