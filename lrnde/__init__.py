"""Locally regularized neural differential equations, as an extension of diffrax."""

from ._adjoint import TapeAdjoint as TapeAdjoint
from ._brownian import BrownianPath as BrownianPath
from ._brownian import Increment as Increment
from ._explicit import AbstractExplicitRungeKutta as AbstractExplicitRungeKutta
from ._explicit import Bosh3 as Bosh3
from ._explicit import Dopri5 as Dopri5
from ._explicit import Dopri8 as Dopri8
from ._explicit import Tsit5 as Tsit5
from ._integrals import AbstractIntegralRegularizer as AbstractIntegralRegularizer
from ._integrals import Kinetic as Kinetic
from ._integrals import Taylor as Taylor
from ._integrals import total_derivative as total_derivative
from ._regularizers import AbstractGlobalRegularizer as AbstractGlobalRegularizer
from ._regularizers import AbstractLocalRegularizer as AbstractLocalRegularizer
from ._regularizers import AbstractRegularizer as AbstractRegularizer
from ._regularizers import GlobalError as GlobalError
from ._regularizers import GlobalStiffness as GlobalStiffness
from ._regularizers import LocalError as LocalError
from ._regularizers import LocalStiffness as LocalStiffness
from ._regularizers import Regularizers as Regularizers
from ._regularizers import stability_interval as stability_interval
from ._regularizers import TakenStep as TakenStep
from ._sampling import scaled_error as scaled_error
from ._solve import diffeqsolve as diffeqsolve
from ._sri import AbstractSRI as AbstractSRI
from ._sri import SOSRI as SOSRI
from ._sri import SOSRI2 as SOSRI2
from ._sri import SRITableau as SRITableau
from ._sri import SRIW2 as SRIW2
from ._steer import Steer as Steer

__version__ = "0.1.0"
