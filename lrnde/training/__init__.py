"""Training: one compiled step, a step budget that adapts, checkpoints that survive."""

from ._checkpoint import load_checkpoint as load_checkpoint
from ._checkpoint import Progress as Progress
from ._checkpoint import progress_of as progress_of
from ._checkpoint import save_checkpoint as save_checkpoint
from ._checkpoint import TrainingError as TrainingError
from ._devices import Shardings as Shardings
from ._devices import shardings as shardings
from ._fit import fit as fit
from ._schedule import schedule as schedule
from ._state import Evaluation as Evaluation
from ._state import History as History
from ._state import new_state as new_state
from ._state import State as State
from ._state import StepBudget as StepBudget
from ._step import make_step as make_step
from ._step import Outcome as Outcome

# For autodoc, which passes over what is imported unless it is listed.
__all__ = [
    "Evaluation",
    "History",
    "Outcome",
    "Progress",
    "Shardings",
    "State",
    "StepBudget",
    "TrainingError",
    "fit",
    "load_checkpoint",
    "make_step",
    "new_state",
    "progress_of",
    "save_checkpoint",
    "schedule",
    "shardings",
]
