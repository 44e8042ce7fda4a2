"""Training: a loop around one compiled step, with schedules and learning curves.

A step budget adapts to the solves, checkpoints survive whatever ends a training, and a
batch may be divided over devices.
"""

from ._checkpoint import load_checkpoint as load_checkpoint
from ._checkpoint import Progress as Progress
from ._checkpoint import progress_of as progress_of
from ._checkpoint import save_checkpoint as save_checkpoint
from ._devices import Shardings as Shardings
from ._devices import shardings as shardings
from ._fit import fit as fit
from ._schedule import schedule as schedule
from ._state import Evaluation as Evaluation
from ._state import History as History
from ._state import new_state as new_state
from ._state import State as State
from ._state import StepBudget as StepBudget
from ._state import TrainingError as TrainingError
from ._step import make_step as make_step
from ._step import Outcome as Outcome

# For autodoc, which passes over what is imported unless it is listed; in the order of
# its page.
__all__ = [
    "fit",
    "Evaluation",
    "State",
    "StepBudget",
    "History",
    "new_state",
    "schedule",
    "make_step",
    "Outcome",
    "save_checkpoint",
    "load_checkpoint",
    "Progress",
    "progress_of",
    "TrainingError",
    "shardings",
    "Shardings",
]
