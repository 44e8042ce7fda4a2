"""Data sets, where their files come from, and the order in which they are seen.

The image sets come as one `Dataset`, sets of time series as one `TimeSeries`. Files
are read from the folder that the environment variable `LRNDE_DATA` names (one
sub-folder a source, never written to), or else downloaded once into the user's cache.
Either way each file must have a known SHA-256 before a byte of it is used.

`python -m lrnde.data NAME` fetches and verifies a data set; `--force` downloads the
files of its source anew.
"""

from ._batches import Batches as Batches
from ._batches import padded_batches as padded_batches
from ._cifar10 import cifar10 as cifar10
from ._files import DataError as DataError
from ._images import averaged_down as averaged_down
from ._images import Dataset as Dataset
from ._images import digits as digits
from ._images import mnist as mnist
from ._images import standardised as standardised
from ._load import load as load
from ._load import main as main
from ._physionet import physionet2012 as physionet2012
from ._series import normalised_split as normalised_split
from ._series import TimeSeries as TimeSeries
from ._split import training_subset as training_subset
from ._split import validation_split as validation_split

# For autodoc, which passes over what is imported unless it is listed; in the order of
# its page.
__all__ = [
    "load",
    "Dataset",
    "TimeSeries",
    "digits",
    "mnist",
    "cifar10",
    "physionet2012",
    "averaged_down",
    "standardised",
    "normalised_split",
    "training_subset",
    "validation_split",
    "Batches",
    "padded_batches",
    "DataError",
    "main",
]
