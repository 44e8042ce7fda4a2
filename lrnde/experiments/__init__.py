"""Experiments: from a configuration to a trained model and a record.

`configs` reads settings, `run` trains and records, `measure` times what was trained.
The notebooks and `python -m lrnde.run` both call them.
"""

from ._classification import CIFAR10 as CIFAR10
from ._classification import CIFAR10MultiScale as CIFAR10MultiScale
from ._classification import classification as classification
from ._classification import Classifier as Classifier
from ._classification import evaluate as evaluate
from ._classification import MNISTNode as MNISTNode
from ._classification import MNISTNSDE as MNISTNSDE
from ._classification import Scores as Scores
from ._config import Config as Config
from ._config import DatasetConfig as DatasetConfig
from ._config import OPTIMIZERS as OPTIMIZERS
from ._config import REGULARIZERS as REGULARIZERS
from ._config import SOLVERS as SOLVERS
from ._physionet import evaluate_series as evaluate_series
from ._physionet import PhysioNet as PhysioNet
from ._physionet import SeriesScores as SeriesScores
from ._physionet import steps_along as steps_along
from ._physionet import Task as Task
from ._physionet import tasks as tasks
from ._run import Run as Run
from ._run import run as run
from ._settings import configs as configs
from ._settings import EXPERIMENTS as EXPERIMENTS
from ._spiral import Spiral as Spiral
from ._times import measure as measure
from ._times import time_predictions as time_predictions
from ._times import Times as Times
from ._train import load_state as load_state
from ._train import train as train
from ._train import train_step as train_step
