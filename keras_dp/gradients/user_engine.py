"""The engine of people: with a person, who may have several rows, in an example's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from .. import backend
from . import mapped, trial
from .engine import Engine, EngineOptions, Run
from .example import Batch, ExampleLoss, Outcome
from .forms import Instantiated, clipped_sums
from .ghost import GhostEngine
from .made_up import made_up_like
from .mapped_users import chunked_sum_of_users, loop_engine_of_users, plain_gradients
from .users import Users

__all__ = ["UserEngine"]

# What people's examples are made up as: the size where none is known, and the spread of values.
_MADE_UP = ((4, "uniform"), (32, "uniform"), (32, "normal"))


class UserEngine(Engine):
    """Clipped sums of people's mean gradients: as `Engine`, with a person in an example's place.

    The slower engines run the same rows as well. With a microbatch size as many whole
    people are in memory at once as are sure to fit, one at least.

    Formal guarantee: person u enters the sum only through c_u g_u, where g_u is the mean
    of the gradients of u's own examples' losses, each computed on a batch of that example
    alone, and what u adds is within C (1 + 1e-4) in floating point, too.

    Args:
        example_loss: The loss of one example.
        clip: From people's norms, (people, variables), to clip weights.
        options: How to compute them.
        most: The most examples that one person has in a batch.
    """

    _adds_rows_up = True

    def __init__(
        self,
        example_loss: ExampleLoss,
        clip: Callable[[Any], Any],
        options: EngineOptions,
        most: int,
    ) -> None:
        super().__init__(example_loss, clip, options)
        self._most = most

    @property
    def padding(self) -> int:
        """What the numbers of rows and of people are padded to a multiple of.

        A capacity, which counts people, makes room for `most` rows of each.
        """
        each = 32 if self._jit_compile and not self._eagerly else 1
        room = 1 if self._batch_capacity == 1 else self._batch_capacity * self._most
        return -(-room // each) * each

    @property
    def _multiple(self) -> int:
        return self.padding

    @property
    def _options(self) -> tuple[Any, ...]:
        return *super()._options, self._most

    @property
    def _fixed(self) -> bool:
        """Whether sizes are filled up: because XLA compiles anew for each, or to a capacity."""
        return self.padding > 1

    def of_users(self, batch: Batch, users: Users, real: Any, seeds: list[Any]) -> Outcome:
        """The clipped sum of a padded batch.

        Args:
            batch: The examples, (rows, ...), at least one row.
            users: Whose they are: each is somebody's.
            real: Mask, (people,): those where it is false add nothing.
            seeds: As for `Engine`.

        Returns:
            As `Engine`; its norms are those of people.
        """
        leaves = [*batch.leaves(), *seeds, users.of_rows, users.counts, real]
        if self._run is None:
            self._run = self._choose(leaves)
        return self.example_loss.outcome(self._run(leaves))

    def _split(self, leaves: list[Any]) -> tuple[list[Any], Users, Any]:
        *data, of_rows, counts, real = leaves
        return data, Users(of_rows, counts, self._most, self._fixed), real

    def _chunk(self, engine: Any, **options: Any) -> Callable[[list[Any]], Any]:
        variables = self.example_loss.variables

        def run(leaves: list[Any]) -> Any:
            data, users, real = self._split(leaves)
            if engine is mapped.loop_engine:
                whose = (users.of_rows, users.counts, real)
                return loop_engine_of_users(self._one, variables, data, *whose, self._clipped)

            def clipped(gradients: list[Any], real: Any) -> tuple[list[Any], Any]:
                forms = users.means([Instantiated(g) for g in gradients])
                return clipped_sums(forms, variables, self._clip, real)

            note = self.example_loss.note_reached
            return engine(self._one, variables, data, real, clipped, note=note, **options)

        return run

    def _ghost_chunk(self, ghost: GhostEngine) -> Callable[[list[Any]], Any]:
        def chunk(leaves: list[Any]) -> Any:
            data, users, real = self._split(leaves)
            return ghost(data, real, self._clip, users)

        return chunk

    def _one_view(self, leaves: list[Any]) -> list[Any]:
        data, users, _ = self._split(leaves)
        return super()._one_view([*data, ops.ones_like(users.of_rows, dtype="bool")])

    def _require_agreement(self, run: Run, leaves: list[Any]) -> None:
        """Tries a traced engine on two made-up people, against plain gradients of their rows."""
        seen = [min(2, self._most), 1]
        rows = -(-sum(seen) // self.padding) * self.padding

        def compare() -> float:
            present = np.arange(self._most) < np.array(seen)[:, np.newaxis]
            users, real = Users.padded(present, rows, self.padding)
            for size, spread in _MADE_UP:
                made_up = made_up_like(leaves[:-3], rows, size=size, spread=spread)
                try:
                    gradients = plain_gradients(
                        self._one, self.example_loss.variables, [t[: sum(seen)] for t in made_up]
                    )
                except Exception:
                    continue  # made-up values of this kind mean nothing to this model
                means = [
                    np.stack([g[: seen[0]].mean(axis=0), g[seen[0] :].mean(axis=0)])
                    for g in gradients
                ]
                forms = [ops.convert_to_tensor(g, "float32") for g in means]
                sums, norms = self._clipped(forms, real[:2])
                if trial.all_finite([*sums, norms]):
                    got, of_people, *_ = run([*made_up, users.of_rows, users.counts, real])
                    return trial.relative_error([*got, of_people[:2]], [*sums, norms])
            raise trial.Untried(
                "it can't be tried: no made-up examples can be run through the model, or none "
                "with finite gradients"
            )

        off = backend.apart(compare)
        if off > trial.tolerance(self.example_loss):
            raise ArithmeticError(
                f"gradients of two made-up people are off by {off:.1%}, as they are for a layer "
                "that draws random numbers without a keras.random.SeedGenerator"
            )

    def _ordinary(self, leaves: list[Any], rows: int) -> None:
        """Nothing: microbatches of people hold fewer rows than there is room for, so are few."""

    def _made_up(self, leaves: list[Any], rows: int) -> list[Any]:
        """As many people as rows, one each."""
        present = np.arange(self._most) < np.ones((rows, 1))
        users, real = Users.padded(present, rows, self.padding)
        return [*made_up_like(leaves[:-3], rows), users.of_rows, users.counts, real]

    def _whole(self, chunk: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        size, most = self._microbatch_size, self._most
        if size is None:
            return chunk
        each, fixed = max(size // most, 1), self._fixed
        return lambda leaves: chunked_sum_of_users(chunk, leaves, each, most, fixed=fixed)
