"""Which examples make a logical batch, and how that is declared to the ledger."""

from .arrays import as_array, as_arrays, common_length, split_for_validation
from .dataset import as_leaves
from .datasets import OWN, BallsInBinsDataset, PoissonDataset, ShuffledDataset
from .declaration import UNKNOWN, Sampling
from .handed_out import HandedOut
from .reading import RowError
from .sources import from_files, is_source
from .spooling import spool
from .users import RowsOfUsers, codes_of

__all__ = [
    "OWN",
    "UNKNOWN",
    "BallsInBinsDataset",
    "HandedOut",
    "PoissonDataset",
    "RowError",
    "RowsOfUsers",
    "Sampling",
    "ShuffledDataset",
    "as_array",
    "as_arrays",
    "as_leaves",
    "codes_of",
    "common_length",
    "from_files",
    "is_source",
    "split_for_validation",
    "spool",
]
