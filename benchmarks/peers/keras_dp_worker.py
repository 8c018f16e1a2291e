"""Steps of keras_dp for `peers.py`: `keras_dp_worker.py MODEL ordinary|noise|ghost|vectorized`.

They are those of `run.py`. Models and batches come from `zoo.py`.
"""

import sys
from pathlib import Path

from worker import serve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import numpy as np

if __name__ == "__main__":
    step, model = measure.make_step(*sys.argv[1:3], {})
    step()
    serve(
        step,
        parameters=int(sum(np.prod(v.shape) for v in model.trainable_variables)),
        engine=measure.engine_of(model),
        versions=measure.about()["versions"],
    )
