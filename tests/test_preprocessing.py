"""Models with a `fit` of their own that preprocesses: KerasHub's tasks sample, too."""

import traceback
import warnings

import keras
import numpy as np
import pytest

import keras_dp

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e"]
TEXTS = ["a b c", "b c d e", "d", "e e a b c d"] * 16
LABELS = [0, 1, 0, 1] * 16
LENGTH = 8


@pytest.fixture(scope="module")
def hub():
    """KerasHub, imported here since the oldest dependencies are tried without it."""
    return pytest.importorskip("keras_hub")


@pytest.fixture(scope="module")
def classifier(hub):
    """A tiny BERT of random weights."""
    models = hub.models
    backbone = models.BertBackbone(
        vocabulary_size=len(WORDS),
        num_layers=1,
        num_heads=1,
        hidden_dim=4,
        intermediate_dim=4,
        max_sequence_length=LENGTH,
    )
    tokenizer = hub.tokenizers.BertTokenizer(vocabulary=WORDS)
    task = models.BertTextClassifier(
        backbone,
        num_classes=2,
        preprocessor=models.BertTextClassifierPreprocessor(tokenizer, sequence_length=LENGTH),
    )
    task.compile(
        keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return task


def releases(model):
    return [(r.sampler, r.steps, r.num_examples) for r in model.optimizer.ledger]


@pytest.mark.thorough
def test_fit_of_a_task_samples_at_the_epsilon_of_arrays(classifier):
    """It cost 10.0 where arrays cost 4.2."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", keras_dp.PrivacyWarning)
        history = classifier.fit(
            TEXTS, LABELS, batch_size=16, validation_data=(TEXTS[:5], LABELS[:5]), verbose=0
        )
    assert releases(classifier) == [("poisson", 4, 64)]
    wanted = keras_dp.accounting.compute_epsilon(
        num_examples=64, batch_size=16, noise_multiplier=1.1, delta=1e-5, epochs=1
    )
    assert classifier.optimizer.get_epsilon(1e-5) == pytest.approx(wanted)
    assert "val_loss" in history.history

    data = keras_dp.BallsInBinsDataset(np.array(TEXTS, object), np.array(LABELS), batch_size=16)
    classifier.fit(data, verbose=0)
    assert releases(classifier)[1:] == [("balls_in_bins", 4, 64)]


@pytest.mark.thorough
def test_a_task_is_given_each_example_preprocessed_by_itself(classifier):
    sizes, seen = [], []
    original = type(classifier).preprocess_samples

    class Watching(type(classifier)):
        def preprocess_samples(self, x, y=None, sample_weight=None):
            sizes.append(len(x))
            made = original(self, x, y, sample_weight)
            seen.append(np.asarray(made[0]["token_ids"]))
            return made

    watching = Watching(classifier.backbone, num_classes=2, preprocessor=classifier.preprocessor)
    watching.compile(
        keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    # The trained backbone brings its ledger along; only the draws matter here.
    watching.fit(TEXTS, LABELS, batch_size=64, verbose=0)
    assert set(sizes) == {1}
    # The first and the last row are tried beforehand, and then all are drawn: q = 1.
    wanted = np.asarray(classifier.preprocessor(np.array(TEXTS))["token_ids"])
    np.testing.assert_array_equal(
        sorted(np.concatenate(seen[2:]).tolist())[: len(TEXTS)], sorted(wanted.tolist())
    )


def test_what_can_not_be_drawn_from_shows_no_data(classifier):
    before, texts = releases(classifier), ["a secret", None, 2]
    with pytest.raises(ValueError, match="Python objects") as e:
        classifier.fit(texts, [0, 1, 0], batch_size=2, verbose=0)
    assert "a secret" not in "".join(traceback.format_exception(e.value))
    assert releases(classifier) == before


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")  # KerasHub's
@pytest.mark.thorough
def test_an_ordinary_task_trains_as_ever(hub, classifier):
    plain = type(classifier)(
        classifier.backbone.__class__.from_config(classifier.backbone.get_config()),
        num_classes=2,
        preprocessor=classifier.preprocessor,
    )
    plain.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    plain.fit(TEXTS, LABELS, batch_size=16, verbose=0)
    assert int(plain.optimizer.iterations) == 4
