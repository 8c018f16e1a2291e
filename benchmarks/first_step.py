"""How long the first private step of a model takes, beside an ordinary model's.

    python benchmarks/first_step.py [--models mlp,MobileNetV2] [--repeats 3] [--write]
                                    [--results measured.jsonl] [--limit 900]
    python benchmarks/first_step.py --alarms [--seeds 5] [--networks 20]
    python benchmarks/first_step.py --memory

Forty models: 12 of `keras.applications`, 14 of KerasHub and 14 of keras.io's kinds, small,
with random weights and made-up examples. Each is trained for one batch by an
ordinary optimizer and by `keras_dp.DPSGD`, in turns, as often as `--repeats` says, in a
process of its own unless `--together` is given; printed are the medians, of seconds
or, as other programs may run beside it, of the process's processor time (`--cpu`).
Then sums and norms of three examples are compared with those of one example at a time;
`off` is the relative difference. Where it is more than 1e-5, the same is computed in
float64, and how far float32 itself is off, one example at a time.

`--write` puts the table into docs/models.md. With `--results` each model that is measured
goes into a file, and those that it has aren't measured again. `--limit` ends a model
after so many seconds, `--budget` the list after so many minutes; what isn't measured
is named.

`--alarms` starts deep networks with several seeds and dtype policies, and counts those that
are refused, or served by another engine than the ghost. `--memory` counts what a
model leaves behind.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import datetime
import gc
import json
import logging
import pathlib
import platform
import statistics
import subprocess
import sys
import time
import warnings

import keras
import numpy as np
from keras import layers, ops

import keras_dp
from keras_dp import arithmetic, backend, keras_private
from keras_dp.gradients import Batch, Engine, EngineOptions, ExampleLoss

CLASSES = 10
RANDOM = np.random.default_rng(0)
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- first steps: benchmarks/first_step.py -->", "<!-- end of first steps -->"
COLUMNS = ("model", "layers", "engine", "ordinary, s", "private, s", "ratio", "off")
EXACT = 1e-5

# -- models ----------------------------------------------------------------------------------
# Each gives a model, its inputs, targets and loss.


def labels(rows=8, *more):
    return RANDOM.integers(0, CLASSES, (rows, *more))


def floats(*shape):
    return RANDOM.normal(size=shape).astype("float32")


def tokens(rows, length, vocabulary=100):
    return RANDOM.integers(1, vocabulary, (rows, length))


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def application(name, side=32):
    def build():
        model = getattr(keras.applications, name)(
            weights=None,
            input_shape=(side, side, 3),
            classes=CLASSES,
            classifier_activation=None,
        )
        return model, floats(4, side, side, 3), labels(4), crossentropy()

    return build


APPLICATIONS = {
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "DenseNet121": 32,
    "ConvNeXtTiny": 32,
    "InceptionV3": 75,
    "Xception": 71,
    "VGG16": 32,
}

TEXT = {
    "vocabulary_size": 100,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 64,
    "max_sequence_length": 16,
}
DECODER = {
    "vocabulary_size": 100,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 64,
}


def hub(name, output, inputs, **settings):
    """A backbone of KerasHub with a head."""

    def build():
        import keras_hub

        backbone = getattr(keras_hub.models, name)(**settings)
        x = inputs()
        given = {
            k: keras.Input(v.shape[1:], dtype=str(v.dtype).replace("64", "32"), name=k)
            for k, v in x.items()
        }
        found = backbone(given if len(given) > 1 or "token_ids" in given else given["images"])
        found = found[output] if output else found
        if len(found.shape) > 2:
            positions = int(np.prod(found.shape[1:-1]))
            found = layers.Reshape((positions, found.shape[-1]))(found)
            found = layers.GlobalAveragePooling1D()(found)
        rows = len(next(iter(x.values())))
        given = given if len(given) > 1 or "token_ids" in given else given["images"]
        return (
            keras.Model(given, layers.Dense(CLASSES)(found)),
            x if isinstance(given, dict) else x["images"],
            labels(rows),
            crossentropy(),
        )

    return build


def words(segments=False, *, mask=True):
    def inputs():
        x = {"token_ids": tokens(4, 16)}
        if segments:
            x["segment_ids"] = np.zeros((4, 16), "int32")
        if mask:
            x["padding_mask"] = np.ones((4, 16), "int32")
        return x

    return inputs


def two_texts():
    return {
        f"{side}_{what}": tokens(4, 8) if what == "token_ids" else np.ones((4, 8), "int32")
        for side in ("encoder", "decoder")
        for what in ("token_ids", "padding_mask")
    }


def images(side=32):
    return lambda: {"images": floats(4, side, side, 3)}


HUB = {
    "BERT": hub("BertBackbone", "pooled_output", words(segments=True), **TEXT),
    "RoBERTa": hub("RobertaBackbone", None, words(), **TEXT),
    "DistilBERT": hub("DistilBertBackbone", None, words(), **TEXT),
    "DeBERTa V3": hub("DebertaV3Backbone", None, words(), **TEXT, bucket_size=8),
    "GPT-2": hub("GPT2Backbone", None, words(), **TEXT),
    "Gemma": hub("GemmaBackbone", None, words(), **DECODER, head_dim=8),
    "Llama": hub("LlamaBackbone", None, words(), **DECODER),
    "Mistral": hub("MistralBackbone", None, words(), **DECODER, sliding_window=8),
    "BART": hub("BartBackbone", "decoder_sequence_output", two_texts, **TEXT),
    "T5": hub(
        "T5Backbone",
        "decoder_sequence_output",
        two_texts,
        **{k: v for k, v in TEXT.items() if k != "max_sequence_length"},
    ),
    "ViT": hub(
        "ViTBackbone",
        None,
        images(),
        image_shape=(32, 32, 3),
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
    ),
    "DeiT": hub(
        "DeiTBackbone",
        None,
        images(),
        image_shape=(32, 32, 3),
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
    ),
    "ResNet (KerasHub)": hub(
        "ResNetBackbone",
        None,
        images(),
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[2, 2],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(32, 32, 3),
    ),
    "MiT (SegFormer)": hub(
        "MiTBackbone",
        None,
        images(),
        image_shape=(32, 32, 3),
        layerwise_depths=[1, 1],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.0,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        hidden_dims=[16, 32],
    ),
}


def sequential(shape, *stack, dtype=None):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *stack])


def mlp():
    model = sequential((20,), layers.Dense(32, activation="relu"), layers.Dense(CLASSES))
    return model, floats(16, 20), labels(16), crossentropy()


def cnn():
    model = sequential(
        (28, 28, 1),
        layers.Conv2D(16, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dropout(0.2),
        layers.Dense(CLASSES),
    )
    return model, floats(16, 28, 28, 1), labels(16), crossentropy()


def lstm():
    stack = [layers.Embedding(100, 16), layers.LSTM(16), layers.Dense(CLASSES)]
    return sequential((20,), *stack, dtype="int32"), tokens(16, 20), labels(16), crossentropy()


def bidirectional():
    both = [layers.Bidirectional(layers.GRU(16, return_sequences=s)) for s in (True, False)]
    model = sequential(
        (20,), layers.Embedding(100, 16), *both, layers.Dense(CLASSES), dtype="int32"
    )
    return model, tokens(16, 20), labels(16), crossentropy()


def text_convolutions():
    model = sequential(
        (40,),
        layers.Embedding(100, 16),
        layers.Conv1D(32, 5, activation="relu"),
        layers.Conv1D(32, 5, activation="relu"),
        layers.GlobalMaxPooling1D(),
        layers.Dense(CLASSES),
        dtype="int32",
    )
    return model, tokens(16, 40), labels(16), crossentropy()


def transformer(blocks=4):
    inputs = keras.Input((32,), dtype="int32")
    x = layers.Embedding(200, 64)(inputs)
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 16)(y, y)])
        y = layers.Dense(128, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(64)(y)])
    outputs = layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs), tokens(16, 32), labels(16), crossentropy()


def small_resnet():
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(16, 3, padding="same")(inputs)
    for width in (16, 32, 64):
        y = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
        y = layers.GroupNormalization(4)(layers.Conv2D(width, 3, padding="same")(y))
        x = layers.MaxPooling2D()(layers.Add()([y, layers.Conv2D(width, 1)(x)]))
    outputs = layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs), floats(8, 32, 32, 3), labels(8), crossentropy()


def u_net():
    inputs = keras.Input((32, 32, 3))
    down, x = [], inputs
    for width in (8, 16):
        x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
        down.append(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    for before in reversed(down):
        x = layers.Conv2DTranspose(before.shape[-1], 2, strides=2)(x)
        x = layers.Concatenate()([x, before])
        x = layers.Conv2D(before.shape[-1], 3, padding="same", activation="relu")(x)
    outputs = layers.Conv2D(CLASSES, 1)(x)
    return keras.Model(inputs, outputs), floats(4, 32, 32, 3), labels(4, 32, 32), crossentropy()


def autoencoder():
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(16, 3, strides=2, padding="same", activation="relu")(inputs)
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Conv2DTranspose(16, 3, strides=2, padding="same", activation="relu")(x)
    outputs = layers.Conv2DTranspose(1, 3, strides=2, padding="same")(x)
    x = floats(8, 28, 28, 1)
    return keras.Model(inputs, outputs), x, x, "mse"


class Sampling(layers.Layer):
    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, mean, spread):
        self.add_loss(-0.5 * ops.mean(1 + spread - ops.square(mean) - ops.exp(spread)))
        noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
        return mean + ops.exp(spread / 2) * noise


def variational_autoencoder():
    inputs = keras.Input((64,))
    x = layers.Dense(32, activation="relu")(inputs)
    code = Sampling()(layers.Dense(4)(x), layers.Dense(4)(x))
    outputs = layers.Dense(64)(layers.Dense(32, activation="relu")(code))
    x = floats(16, 64)
    return keras.Model(inputs, outputs), x, x, "mse"


def wide_and_deep():
    inputs = [keras.Input((1,), dtype="int32") for _ in range(6)] + [keras.Input((8,))]
    parts = [layers.Flatten()(layers.Embedding(50, 8)(x)) for x in inputs[:-1]]
    joined = layers.Concatenate()([*parts, inputs[-1]])
    deep = layers.Dense(32, activation="relu")(layers.Dense(64, activation="relu")(joined))
    model = keras.Model(inputs, layers.Dense(1)(layers.Concatenate()([joined, deep])))
    x = [RANDOM.integers(0, 50, (16, 1)) for _ in range(6)] + [floats(16, 8)]
    return model, x, floats(16, 1), "mse"


def many_small_networks():
    inputs = keras.Input((8,))
    parts = [layers.Dense(4)(layers.Dense(8, activation="relu")(inputs)) for _ in range(24)]
    return (
        keras.Model(inputs, layers.Dense(1)(layers.Concatenate()(parts))),
        floats(16, 8),
        floats(16, 1),
        "mse",
    )


def next_frames():
    model = sequential(
        (4, 16, 16, 1),
        layers.ConvLSTM2D(8, 3, padding="same", return_sequences=True),
        layers.Conv3D(1, 3, padding="same"),
    )
    x = floats(4, 4, 16, 16, 1)
    return model, x, x, "mse"


def tied_language_model():
    inputs = keras.Input((16,), dtype="int32")
    table = layers.ReversibleEmbedding(100, 32)
    x = layers.GRU(32, return_sequences=True)(table(inputs))
    x = layers.LayerNormalization()(layers.Dense(32, activation="gelu")(x))
    return (
        keras.Model(inputs, table(x, reverse=True)),
        tokens(8, 16),
        tokens(8, 16),
        crossentropy(),
    )


KINDS = {
    f.__name__.replace("_", " "): f
    for f in (
        mlp,
        cnn,
        lstm,
        bidirectional,
        text_convolutions,
        transformer,
        small_resnet,
        u_net,
        autoencoder,
        variational_autoencoder,
        wide_and_deep,
        many_small_networks,
        next_frames,
        tied_language_model,
    )
}
MODELS = KINDS | HUB | {name: application(name, side) for name, side in APPLICATIONS.items()}

# -- first steps -----------------------------------------------------------------------------


def first_step(name, *, private, seed=0):
    """Seconds, processor time and engine of a first step; and how many layers there are."""
    keras.utils.set_random_seed(seed)
    model, x, y, loss = MODELS[name]()
    if keras_dp.check_model(model):
        model = keras_dp.fix_model(model)
    optimizer = (
        keras_dp.DPSGD(0.01, max_grad_norm=1.0, noise_multiplier=1.0)
        if private
        else keras.optimizers.SGD(0.01)
    )
    model.compile(optimizer, loss=loss)
    start, busy = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train_on_batch(x, y)
    spent = time.perf_counter() - start, time.process_time() - busy
    return *spent, getattr(optimizer, "engine", None), len(model._flatten_layers())


def measured(name, repeats):
    """What `first_step` finds, ordinary and private in turns, as plain data."""
    first_step("mlp", private=False)  # what the process itself needs first
    if name != "mlp":
        first_step("mlp", private=True)
    pairs = [
        (first_step(name, private=False), first_step(name, private=True)) for _ in range(repeats)
    ]
    ordinary, private = zip(*pairs, strict=True)
    off, why = exactness(name)
    return {
        "name": name,
        "layers": private[0][3],
        "engine": private[0][2],
        "seconds": [statistics.median(run[0] for run in runs) for runs in (ordinary, private)],
        "cpu": [statistics.median(run[1] for run in runs) for runs in (ordinary, private)],
        "repeats": repeats,
        "off": off,
        "float64": why,
        "measured": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    }


# -- exactness -------------------------------------------------------------------------------


def exactness(name):
    """How far sums and norms are off those of one example at a time.

    If it is more than 1e-5: the same in float64, and how far float32 is off float64
    one example at a time.
    """
    keras.utils.set_random_seed(0)
    model, x, y, loss = without_rates(name)
    random = np.random.default_rng(0)
    for weight in model.trainable_variables:  # no zeros, at which a fault may not show
        weight.assign(weight + 0.05 * random.normal(size=weight.shape))
    x, y = keras.tree.map_structure(lambda t: t[:3], (x, y))
    exact = summed_by_both(model, x, y, loss)
    off = difference(*exact)
    if off <= EXACT:
        return off, None
    policy = keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        again, _, _, loss = without_rates(name)
        again.set_weights(model.get_weights())
        x, y = keras.tree.map_structure(in_float64, (x, y))
        double = summed_by_both(again, x, y, loss)
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(policy)
    return off, [difference(*double), difference(exact[1], double[1])]


def in_float64(array):
    return array.astype("float64") if array.dtype.kind == "f" else array


def without_rates(name):
    """A model that drops nothing at random: an engine draws otherwise for a whole batch."""
    model, x, y, loss = MODELS[name]()
    if keras_dp.check_model(model):
        model = keras_dp.fix_model(model)
    for layer in model._flatten_layers():
        for rate in ("rate", "drop_path_rate"):
            if isinstance(getattr(layer, rate, None), float):
                setattr(layer, rate, 0.0)
    return model, x, y, loss


def summed_by_both(model, x, y, loss):
    """Weighted sums and norms of examples: by the engine that is used, and one at a time."""
    model.compile("sgd", loss=loss)
    batch = Batch(x, y)
    batch = batch.with_leaves(backend.as_tensors(batch.leaves()))
    keras_private.build_from_batch(model, batch.x, batch.y, None)
    example = ExampleLoss(model, list(model.trainable_variables), batch)
    seeds = backend.per_example_seeds(example.seed_states, 3)
    real, found = ops.ones((3,), "bool"), []
    for engine in ("auto", "loop"):
        engine = Engine(example, scaled_alike, EngineOptions(gradients=engine))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = engine(batch, real, seeds)
        found.append([np.asarray(t, "f8") for t in (*outcome.sums, outcome.norms)])
    return found


def scaled_alike(norms):
    """Weights that bring examples to one size, but for a factor of two.

    Powers of two: an engine clips harder by what it doesn't know of a norm, and that isn't
    what is asked for here.
    """
    size = ops.maximum(arithmetic.total_norms(norms), 1e-30)
    return ops.power(2.0, -ops.round(ops.log2(size)))


def difference(got, wanted):
    """How far sums are off, relative to their size, or a norm, whichever is more."""
    *sums, norms = zip(got, wanted, strict=True)
    off = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in sums))
    of_sums = off / np.sqrt(sum(np.sum(b**2) for _, b in sums))
    return float(max(of_sums, np.max(np.abs(norms[0] / norms[1] - 1))))


# -- the list --------------------------------------------------------------------------------


def row(found, by):
    ordinary, private = found[by]
    ratio = private / ordinary
    cells = [found["name"], str(found["layers"]), str(found["engine"])]
    cells += [f"{ordinary:.2f}", f"{private:.2f}", f"{ratio:.1f}", off_of(found)]
    return f"| {' | '.join(cells)} |"


def off_of(found):
    if found["float64"] is None:
        return f"{found['off']:.0e}"
    double, own = found["float64"]
    return f"{found['off']:.0e} (float32 itself {own:.0e}; in float64 {double:.0e})"


def run_list(options):
    names = options.models.split(",") if options.models else list(MODELS)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise SystemExit(f"No such model: {', '.join(unknown)}. There are: {', '.join(MODELS)}.")
    by = "cpu" if options.cpu else "seconds"
    known = measured_before(options)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    missing, started = [], time.monotonic()
    for name in names:
        if name not in known and time.monotonic() - started > 60 * options.budget:
            missing.append(name)
            continue
        try:
            if name not in known:
                together = options.together
                known[name] = measured(name, options.repeats) if together else apart(name, options)
                note(known[name], options)
        except Exception as error:
            missing.append(f"{name} ({keras_dp.errors.first_line(error)})")
            print(f"| {missing[-1]} | | | | | | |", flush=True)
            continue
        print(row(known[name], by), flush=True)
    if options.write:
        write([known[name] for name in names if name in known], missing, options)


def measured_before(options):
    """What a results file has of each model, measured as often as it is asked for now."""
    if options.results is None or not options.results.exists():
        return {}
    found = [json.loads(line) for line in options.results.read_text().splitlines()]
    return {one["name"]: one for one in found if one["repeats"] == options.repeats}


def note(found, options):
    if options.results is not None:
        with options.results.open("a") as file:
            file.write(json.dumps(found) + "\n")


def apart(name, options):
    """`measured`, in a process of its own, which is ended if it takes too long."""
    command = [sys.executable, __file__, "--one", name, "--repeats", str(options.repeats)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=options.limit
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it took more than {options.limit:.0f} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it ended"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def write(found, missing, options):
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    what = "processor seconds" if options.cpu else "seconds"
    import tensorflow as tf

    by = "cpu" if options.cpu else "seconds"
    rows = [row(one, by) for one in found]
    days = sorted({one["measured"] for one in found})
    text = (
        f"Measured on {' to '.join(dict.fromkeys((days[0], days[-1])))}, "
        f"{os.cpu_count()} cores ({platform.machine()}), Keras {keras.__version__}, TensorFlow "
        f"{tf.__version__}; {what}, medians of {options.repeats}.\n\n"
        f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n" + "\n".join(rows) + "\n"
    )
    if missing:
        text += f"\nNot measured in that run: {', '.join(missing)}.\n"
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


# -- false alarms ----------------------------------------------------------------------------


def network(number):
    """A deep network, another one for each number."""
    random = np.random.default_rng(number)
    kind = number % 4
    depth, width = int(random.integers(12, 30)), int(random.choice([8, 16, 24]))
    activation = str(random.choice(["relu", "gelu", "tanh", "silu"]))
    if kind == 0:
        x = inputs = keras.Input((16,))
        for _ in range(depth):
            y = layers.Dense(width, activation=activation)(layers.LayerNormalization()(x))
            x = layers.Add()([y, layers.Dense(width)(x)])
    elif kind == 1:
        x = inputs = keras.Input((8, 8, 3))
        for _ in range(depth):
            x = layers.Conv2D(width, 3, padding="same", activation=activation)(x)
            x = layers.GroupNormalization(4)(x)
        x = layers.GlobalAveragePooling2D()(x)
    elif kind == 2:
        inputs = keras.Input((8, 8, 3))
        x = layers.Conv2D(width, 1)(inputs)
        for _ in range(depth // 2):
            y = layers.DepthwiseConv2D(3, padding="same")(layers.GroupNormalization(1)(x))
            x = layers.Add()([x, layers.Conv2D(width, 1, activation=activation)(y)])
        x = layers.GlobalAveragePooling2D()(x)
    else:
        inputs = keras.Input((8,), dtype="int32")
        x = layers.Embedding(50, width)(inputs)
        for _ in range(depth // 4):
            y = layers.LayerNormalization()(x)
            x = layers.Add()([x, layers.MultiHeadAttention(2, width // 2)(y, y)])
            x = layers.Add()([x, layers.Dense(width, activation=activation)(x)])
        x = layers.GlobalAveragePooling1D()(x)
    x_data = tokens(4, 8, 50) if kind == 3 else floats(4, *inputs.shape[1:])
    outputs = layers.Dense(CLASSES, dtype="float32")(x)
    return keras.Model(inputs, outputs), x_data, labels(4), crossentropy()


def alarms(options):
    """Starts networks and counts those that the ghost engine doesn't serve."""
    from keras_dp.gradients import trial

    starts, wrong = 0, []
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        keras.mixed_precision.set_dtype_policy(policy)
        for number in range(options.networks):
            for seed in range(options.seeds):
                trial._right.clear()  # each start is tried anew
                keras.utils.set_random_seed(seed)
                model, x, y, loss = network(number)
                model.compile(
                    keras_dp.DPSGD(0.01, max_grad_norm=1.0, noise_multiplier=1.0), loss=loss
                )
                starts += 1
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        model.train_on_batch(x, y)
                    said = model.optimizer.engine
                except Exception as error:
                    said = keras_dp.errors.first_line(error)
                if said != "ghost":
                    wrong.append((policy, number, seed, said))
                    print(*wrong[-1], flush=True)
                keras.backend.clear_session()
        print(f"{policy}: {starts} starts so far, {len(wrong)} of them alarms", flush=True)
    return bool(wrong)


# -- memory ----------------------------------------------------------------------------------


def memory(options):
    """What is left of resident memory for each of some models that are gone."""

    def resident():
        gc.collect()
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    for private in (False, True):
        left = []
        for count in range(3 * options.repeats):
            first_step("mlp", private=private, seed=count)
            keras.backend.clear_session()
            left.append(resident())
        warm = left[options.repeats :]
        each = (warm[-1] - warm[0]) / (len(warm) - 1)
        print(f"{'private' if private else 'ordinary'}: {each:.2f} MiB a model", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="names, with commas between; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="processor time, not seconds")
    parser.add_argument(
        "--together", action="store_true", help="all in this process, whose imports count once"
    )
    parser.add_argument("--budget", type=float, default=1e9, help="minutes for the list")
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        help="a file for what is measured, model by model; a run goes on where it ended",
    )
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for a model")
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    parser.add_argument("--alarms", action="store_true")
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("keras_dp").setLevel(logging.ERROR)
    if options.one:
        print(json.dumps(measured(options.one, options.repeats)))
    elif options.alarms:
        raise SystemExit(alarms(options))
    elif options.memory:
        memory(options)
    else:
        run_list(options)


if __name__ == "__main__":
    main()
