"""From training to serving: one private model in four formats, and its statement beside each.

A small classifier of handwritten digits is trained privately and written as

    .keras        loads wherever Keras is, keras_dp or not
    SavedModel    for TensorFlow Serving, and for TensorFlow without Keras
    LiteRT        for phones and browsers
    ONNX          for ONNX Runtime and others (if the package tf2onnx is there)

Each file is loaded again by what will serve it, in a way that needs no keras_dp, and must
give the same answers. The privacy statement is one text, for people and for machines, that
goes along with each.

    pip install ".[examples]" && python examples/serving.py
"""

import argparse
import importlib.util
import json
import os
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import numpy as np
import tensorflow as tf
from quickstart import DELTA, SETTINGS, accuracy, load_data, private_optimizer, train

import keras_dp


def size(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def served_by_keras(path, images):
    return keras.saving.load_model(path).predict(images, verbose=0)


def served_by_tensorflow(path, images):
    loaded = tf.saved_model.load(path)  # keep it: its functions don't keep its weights
    return loaded.serve(images).numpy()


def served_by_litert(path, images):
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:  # the same, as TensorFlow brings it along
        Interpreter = tf.lite.Interpreter
    with warnings.catch_warnings():  # that it will move to the package ai-edge-litert
        warnings.filterwarnings("ignore", message=r"\s*Warning: tf.lite.Interpreter")
        interpreter = Interpreter(str(path))
    [entry], [end] = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(entry["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(entry["index"], images)
    interpreter.invoke()
    return interpreter.get_tensor(end["index"])


def served_by_onnx_runtime(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def write_all(model, folder):
    """Writes each format with the statement beside it; yields name, path and what serves it."""
    keras_dp.save_inference_model(model, folder / "digits.keras")  # and the statement
    yield ".keras", folder / "digits.keras", served_by_keras

    model.export(folder / "digits_saved_model", verbose=False)
    yield "SavedModel", folder / "digits_saved_model", served_by_tensorflow

    model.export(folder / "digits.tflite", format="litert", verbose=False)
    yield "LiteRT", folder / "digits.tflite", served_by_litert

    if importlib.util.find_spec("tf2onnx") and importlib.util.find_spec("onnxruntime"):
        model.export(folder / "digits.onnx", format="onnx", verbose=False)
        yield "ONNX", folder / "digits.onnx", served_by_onnx_runtime


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--epochs", type=int, default=SETTINGS[3].epochs)
    parser.add_argument("--output", type=Path, default=Path("serving_output"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    train_data, (images, labels) = load_data()
    settings = SETTINGS[3]
    settings = type(settings)(**{**vars(settings), "epochs": arguments.epochs})
    model, _ = train(settings, private_optimizer(settings, epsilon=3), train_data)
    answers = model.predict(images, verbose=0)
    print(f"trained: test accuracy {accuracy(model, (images, labels)):.1%}, ", end="")
    print(f"epsilon {model.optimizer.get_epsilon(DELTA):.3f} at delta = {DELTA:g}\n")

    print("format           bytes  largest difference  test accuracy")
    for name, path, serve in write_all(model, arguments.output):
        served = serve(path, images)
        difference = np.abs(served - answers).max()
        right = np.mean(served.argmax(-1) == labels)
        print(f"{name:12} {size(path):9,} {difference:19.1e} {right:14.1%}", flush=True)

    statement = json.loads((arguments.output / "digits.privacy.json").read_text())
    print("\ndigits.privacy.json:", ", ".join(list(statement)[:8]), "...")
    print("\ndigits.privacy.md:\n")
    print((arguments.output / "digits.privacy.md").read_text()[:900])


if __name__ == "__main__":
    main()
