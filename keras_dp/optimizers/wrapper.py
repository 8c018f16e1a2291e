"""An optimizer around another, which is what Keras sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras


class OptimizerWrapper(keras.optimizers.Optimizer):
    """Reads and sets the inner optimizer's state as its own, and has none.

    Args:
        inner_optimizer: The optimizer that takes the steps.
        name: A name for the optimizer.
    """

    def __init__(self, inner_optimizer: keras.optimizers.Optimizer, name: str | None) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the inner optimizer's state for `variables`."""
        if self.built:
            return
        variables = list(variables)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)

    @property
    def variables(self) -> list[Any]:
        """The inner optimizer's variables. The ledger is not among them: nothing can set it."""
        return self.inner_optimizer.variables

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The inner optimizer's count of updates."""
        return self.inner_optimizer.iterations

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the inner optimizer's variables. The ledger stays."""
        self.inner_optimizer.set_weights(weights)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """What the inner optimizer does at the end of `fit` (weight averaging)."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """As the inner optimizer's."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def apply_gradients(self, grads_and_vars: Any) -> None:
        """Refuses: pairs don't say where a gradient is from. See `apply`.

        Raises:
            PrivacyError: Always.
        """
        self.apply(None)

    def stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any
    ) -> Any:
        """Refuses, as `apply_gradients`.

        Raises:
            PrivacyError: Always.
        """
        self.apply(None)
