"""What each weight has learned: the releases behind it, whatever model or file it turns up in.

A weak map leads from every Keras variable, and from every layer that owns one, to
a `Lineage`: the books of the private optimizers that train it, what files and
copies brought along, and the ordinary optimizers that trained it after something
private was in it. A book in turn knows the lineages of all weights that its steps
read, so that what one weight has learned from another counts as well.

The layer is in the map beside its variables because Keras may give it new ones in
the place of the old (`quantize`).

What can't be followed is a weight that is carried over as an array.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from . import backend, keras_files, keras_private
from .errors import PrivacyWarning
from .ledger import LedgerBook, PrivacyLedger, Release


class _Trainer:
    """Counts the steps of an ordinary optimizer, also when its own count is set back.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.id = uuid.uuid4().hex
        self._updates = keras_private.updates_of(optimizer)
        self._counted = 0
        self._last = self._read()

    def _read(self) -> int:
        with backend.outside_graph():
            return self._updates()

    @property
    def steps(self) -> int:
        """How many steps it took since this object was made. Never fewer than before."""
        now = self._read()
        self._counted += now - self._last if now >= self._last else now
        self._last = now
        return self._counted

    def at_least(self, steps: int) -> None:
        """Has it counted so many steps, also where its own count was set back meanwhile."""
        self._counted = max(self.steps, steps)

    def skip(self) -> None:
        """Goes on from what the optimizer counts now: a file has set it, or steps were private."""
        self._last = self._read()


class Lineage:
    """What one weight has learned from."""

    def __init__(self) -> None:
        self.books: dict[int, LedgerBook] = {}
        self.past = PrivacyLedger()
        # Ordinary optimizers, each with what it had counted when something private came in.
        self._trainers: dict[str, tuple[_Trainer, int, bool]] = {}
        self._private = False

    @property
    def private(self) -> bool:
        """Whether a release went into it. Stays so."""
        if not self._private:
            released = any(book.released for book in self.books.values())
            self._private = released or self.past.steps > 0
        return self._private

    def train(self, trainer: _Trainer, since: int, *, surely: bool, private: bool) -> None:
        """Notes that an ordinary optimizer trains it.

        Args:
            trainer: The optimizer's.
            since: The steps of it that don't count, since nothing private was there.
            surely: Whether the steps after those count in any case. Else they do once
                something private has come in.
            private: Whether something private was there before. If not, `since` takes
                the place of what an earlier call said.
        """
        known = self._trainers.get(trainer.id)
        if known is not None and (known[2] or private):
            since, surely = known[1], True
        self._trainers[trainer.id] = (trainer, since, surely)

    def unprotected(self) -> Iterator[Release]:
        """The steps that ordinary optimizers took on it after something private was in it."""
        for trainer, since, surely in self._trainers.values():
            if surely or self.private:
                steps = trainer.steps - since
                yield Release("unprotected", 0.0, steps=steps, id=trainer.id)


_lineages: dict[int, Lineage] = {}  # by the id of a variable or layer
_books: weakref.WeakSet[LedgerBook] = weakref.WeakSet()
_ordinary: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers that have weights to train
_driven: weakref.WeakSet[Any] = weakref.WeakSet()  # inner optimizers of private ones
_trainers: weakref.WeakKeyDictionary[Any, _Trainer] = weakref.WeakKeyDictionary()
_generation = [0]  # how often something was added from elsewhere
_file_had_a_ledger = [False]  # while a file is loaded


def _lineage(thing: Any) -> Lineage:
    found = _lineages.get(id(thing)) or Lineage()
    for same in _same_as(thing):
        if id(same) not in _lineages:
            _lineages[id(same)] = found
            weakref.finalize(same, _lineages.pop, id(same), None).atexit = False
    return found


def _same_as(thing: Any) -> list[Any]:
    """A variable, and the framework's own beneath it, which an optimizer may be given as well."""
    beneath = keras_private.beneath(thing) if isinstance(thing, keras.Variable) else None
    return [thing] if beneath is None else [thing, beneath]


def _ids(things: Iterable[Any]) -> set[int]:
    return {id(same) for thing in things for same in _same_as(thing)}


def _things(owners: Iterable[Any]) -> list[Any]:
    """Variables and layers, and all layers in them that own weights, and those weights."""
    found: dict[int, Any] = {}
    for owner in owners:
        if isinstance(owner, keras.Layer):
            for layer in keras_private.all_layers(owner):
                state = keras_private.own_state_of(layer)
                found |= {id(x): x for x in ([layer, *state] if state else [])}
        elif isinstance(owner, keras.Variable):
            found[id(owner)] = owner
    return list(found.values())


def _written(variables: Iterable[Any], owners: Iterable[Any]) -> list[Any]:
    """Variables, and the layers that own one of them."""
    variables = list(variables)
    ids = _ids(variables)
    layers = [x for x in _things(owners) if isinstance(x, keras.Layer)]
    own = [x for x in layers if not ids.isdisjoint(_ids(keras_private.own_state_of(x)))]
    return [*variables, *own]


def _private_releases(
    lineages: Iterable[Lineage], books: Iterable[LedgerBook] = ()
) -> tuple[PrivacyLedger, list[Lineage]]:
    """What optimizers and files say, following books to what they have read; and all on the way."""
    queue: collections.deque[Any] = collections.deque([*books, *lineages])
    seen: dict[int, Any] = {}
    ledgers: dict[int, PrivacyLedger] = {}
    released: dict[int, bool] = {}
    while queue:
        one = queue.popleft()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, Lineage):
            ledgers[id(one.past)] = one.past
            for key, book in one.books.items():
                if key not in released:
                    released[key] = book.released
                if released[key]:
                    queue.append(book)
        else:
            ledgers[id(one)] = one.ledger
            queue += one.sources
    releases = [r for ledger in ledgers.values() for r in ledger]
    return PrivacyLedger().merge(releases), [x for x in seen.values() if isinstance(x, Lineage)]


def _union(lineages: Iterable[Lineage], books: Iterable[LedgerBook] = ()) -> PrivacyLedger:
    ledger, on_the_way = _private_releases(lineages, books)
    unprotected = [r for x in on_the_way for r in x.unprotected() if r.steps]
    return ledger.merge(unprotected) if unprotected else ledger


def of(*owners: Any) -> PrivacyLedger:
    """All releases that models, layers or variables have learned from.

    Args:
        owners: Models, layers, variables. A frozen layer counts as well.

    Returns:
        The union of what is behind their weights.

    Example:

    >>> import keras, keras_dp, numpy as np
    >>> from keras_dp import lineage
    >>> encoder = keras.layers.Dense(2)
    >>> model = keras.Sequential([keras.Input((4,)), encoder, keras.layers.Dense(1)])
    >>> model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    >>> history = model.fit(np.ones((64, 4)), np.ones((64, 1)), verbose=0)
    >>> lineage.of(keras.Sequential([keras.Input((4,)), encoder])).steps
    2
    """
    if not _lineages:
        return PrivacyLedger()
    found = (_lineages.get(id(x)) for x in _things(owners))
    return _union([x for x in found if x is not None])


def of_book(book: LedgerBook) -> PrivacyLedger:
    """All releases of a private optimizer, and of whatever the weights it trains learned from."""
    return _union([], [book])


def learns(book: LedgerBook, variables: Iterable[Any], reads: Iterable[Any] = ()) -> None:
    """Says which weights the steps of a private optimizer train, and what else they read.

    To be called before its steps; again whenever that may have changed.

    Args:
        book: The optimizer's.
        variables: The variables that it trains.
        reads: Models and layers that its steps run.
    """
    variables, reads = list(variables), list(reads)
    _books.add(book)
    written = _written(variables, reads)
    for thing in written:
        _lineage(thing).books[id(book)] = book
    book.sources.update(map(_lineage, [*written, *_things(reads)]))
    trained = _ids(variables)
    for optimizer in _ordinary_ones():
        known = [v for v in keras_private.trained_by(optimizer) if id(v) in trained]
        if known:
            private = any(r.steps for r in _private_releases([], [book])[0])
            things = _written(known, reads)
            _note_ordinary(optimizer, things, surely=private, private=private)


def add(ledger: PrivacyLedger, *owners: Any) -> None:
    """Says that models, layers or variables have learned from what a ledger knows, too.

    Args:
        ledger: What was released for them elsewhere.
        owners: What a file was loaded into, or what is a copy.
    """
    if not ledger.steps:
        return
    _generation[0] += 1
    things = _things(owners)
    lineages = [_lineage(x) for x in things]
    private = any(r.steps for r in _private_releases(lineages)[0])
    before: dict[int, PrivacyLedger] = {}
    for lineage in lineages:
        if id(lineage.past) not in before:
            before[id(lineage.past)] = lineage.past.merge(ledger)
        lineage.past = before[id(lineage.past)]
    ids = _ids(things)
    for optimizer in _ordinary_ones():
        known = [v for v in keras_private.trained_by(optimizer) if id(v) in ids]
        if known:
            _note_ordinary(optimizer, _written(known, owners), private=private)


# -- ordinary training ------------------------------------------------------------------------


def _ordinary_ones() -> list[Any]:
    return [o for o in _ordinary if o not in _driven]


def _trainer(optimizer: Any) -> _Trainer:
    if optimizer not in _trainers:
        _trainers[optimizer] = _Trainer(optimizer)
    return _trainers[optimizer]


def _note_ordinary(
    optimizer: Any,
    things: Iterable[Any],
    since: int | None = None,
    *,
    surely: bool = True,
    private: bool = True,
) -> None:
    """Notes that an ordinary optimizer trains these, as `Lineage.train` says."""
    trainer = _trainer(optimizer)
    since = trainer.steps if since is None else since
    for thing in things:
        _lineage(thing).train(trainer, since, surely=surely, private=private)


def drive(optimizer: keras.optimizers.Optimizer) -> None:
    """Says that from now on a private optimizer drives this one: its steps are private."""
    if optimizer in _trainers:
        _ = _trainers[optimizer].steps
    _driven.add(optimizer)


def undrive(optimizer: Any) -> None:
    """Says that from now on the steps of this optimizer are ordinary ones."""
    if optimizer in _driven:
        _driven.discard(optimizer)
        if keras_private.trained_by(optimizer):
            _ordinary.add(optimizer)
        if optimizer in _trainers:
            _trainers[optimizer].skip()


def _built(optimizer: Any) -> None:
    """Notes that an optimizer, whichever, has got weights to train."""
    optimizer = keras_private.innermost(optimizer)
    if optimizer in _driven or hasattr(optimizer, "get_epsilon"):
        return
    _ordinary.add(optimizer)
    variables = keras_private.trained_by(optimizer)
    known = [_lineages.get(id(v)) for v in variables] if _lineages else []
    if any(x is not None and x.private for x in known):
        _note_ordinary(optimizer, variables)


class _Noted:
    """Which weights of a model an ordinary optimizer was noted to train, so as not to do it twice.

    Args:
        optimizer: The optimizer.
        things: The weights, and all that is in the model.
    """

    def __init__(self, optimizer: Any, things: Sequence[Any]) -> None:
        self._all = [weakref.ref(x) for x in (optimizer, *things)]

    def covers(self, optimizer: Any, things: Sequence[Any]) -> bool:
        """Whether these are the very same, none more and none less."""
        given = (optimizer, *things)
        return len(given) == len(self._all) and all(
            known() is x for known, x in zip(self._all, given, strict=True)
        )


_noted: weakref.WeakKeyDictionary[keras.Model, dict[str, _Noted]] = weakref.WeakKeyDictionary()


def _note_all(model: keras.Model, optimizer: Any, trained: list[Any], since: int, at: str) -> None:
    """Notes that an ordinary optimizer trains these weights of a model.

    Noting the same again would change nothing, and costs time in every `train_on_batch`.
    """
    things = [*trained, *_things([model])]
    known = _noted.setdefault(model, {})
    if at not in known or not known[at].covers(optimizer, things):
        _note_ordinary(optimizer, _written(trained, [model]), since)
        known[at] = _Noted(optimizer, things)


def _has_learned(model: keras.Model) -> bool:
    """Whether `of(model)` has any step, which costs less to see than what they all are."""
    found = (_lineages.get(id(x)) for x in _things([model])) if _lineages else ()
    return any(x.private or any(r.steps for r in x.unprotected()) for x in found if x is not None)


@contextlib.contextmanager
def ordinary_training(model: keras.Model) -> Iterator[None]:
    """Has ordinary training noted of all that it trains, if something in the model is private."""
    optimizer = keras_private.innermost(getattr(model, "optimizer", None))
    if optimizer is None or not _has_learned(model):
        yield
        return
    undrive(optimizer)
    since = _trainer(optimizer).steps
    _note_all(model, optimizer, model.trainable_variables, since, "before")
    try:
        yield
        _trainer(optimizer).at_least(since + 1)  # its own count may have been set back
    finally:  # a model that wasn't built has its weights now
        trained = keras_private.trained_by(optimizer) or model.trainable_variables
        _note_all(model, optimizer, trained, since, "after")


# -- files ------------------------------------------------------------------------------------


def _text_of(saved: Any) -> Any:
    """What a file says of what is saved in it; `None` if nothing private went into that."""
    ledger = of(saved) if isinstance(saved, keras.Layer) else PrivacyLedger()
    own = getattr(getattr(saved, "optimizer", None), "ledger", None)
    if isinstance(own, PrivacyLedger):
        ledger = own.merge(ledger)
    return np.frombuffer(ledger.to_json().encode(), np.uint8) if ledger.steps else None


@contextlib.contextmanager
def _loading(loaded: Any, texts: list[Any], lost: str | None = None) -> Iterator[None]:
    """Takes over what a file says, while it is loaded.

    Args:
        loaded: A model, a layer, an optimizer; or nothing.
        texts: The ledgers in the file.
        lost: The name of the file, if it was trained privately, and has none.
    """
    ledger = PrivacyLedger()
    if lost is not None:
        warnings.warn(
            f"{lost} was written from a model with a private optimizer, by a version of keras_dp "
            "that could write no ledger into such files: what training those weights has cost is "
            "unknown, so epsilon is infinite. Load a .keras or .weights.h5 file of the model.",
            PrivacyWarning,
            stacklevel=keras_private.outside(),
        )
        ledger = PrivacyLedger((Release("unprotected", 0.0, steps=1),))
    for text in texts:
        data = np.asarray(text, np.uint8).tobytes().decode()
        ledger = ledger.merge(PrivacyLedger.from_json(data))
    for trainer in list(_trainers.values()):
        _ = trainer.steps
    for book in list(_books):
        book.settle()
    before, _file_had_a_ledger[0] = _file_had_a_ledger[0], bool(texts)
    try:
        yield
    finally:
        _file_had_a_ledger[0] = before
        for trainer in list(_trainers.values()):
            trainer.skip()
        if texts:
            for book in list(_books):
                book.resume()
        if isinstance(loaded, keras.Layer):
            add(ledger, loaded)


def _can_not_carry(model: Any, what: str = "tf.train.Checkpoint") -> None:
    """Says so if something private is about to be written where no ledger is kept."""
    steps = of(model).steps
    if steps:
        warnings.warn(
            f"{what} takes the weights of '{model.name}' without the ledger of the {steps} steps "
            "behind them: a model that is restored from it will not know what they have cost. "
            "Use model.save (.keras), model.save_weights (.weights.h5) or BackupAndRestore, which "
            "carry it.",
            PrivacyWarning,
            stacklevel=keras_private.outside(),
        )


def generation() -> int:
    """A number that grows whenever files or copies have brought releases along."""
    return _generation[0]


def file_had_a_ledger() -> bool:
    """Whether the file that is being loaded says what its weights have cost."""
    return _file_had_a_ledger[0]


# -- Keras --------------------------------------------------------------------------------------


def install() -> None:
    """Has Keras say which optimizer trains what, and what is saved and loaded."""
    owner = next(c for c in keras.optimizers.Optimizer.__mro__ if "build" in vars(c))
    original: Callable[..., Any] = vars(owner)["build"]
    if not hasattr(original, "_keras_dp"):

        @functools.wraps(original)
        def build(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            _built(self)
            return result

        build._keras_dp = True  # type: ignore[attr-defined]
        setattr(owner, "build", build)  # noqa: B010 - mypy knows no such method
    keras_files.watch_files(_text_of, _loading)
    keras_files.watch_state_trees(functools.partial(_can_not_carry, what="get_state_tree"))
    backend.watch_checkpoints(_can_not_carry)
