"""Neural differential equation models. They know nothing of data sets or training."""

from ._convolutional import BatchNorm as BatchNorm
from ._convolutional import Conv as Conv
from ._convolutional import ConvField as ConvField
from ._convolutional import ConvODEClassifier as ConvODEClassifier
from ._convolutional import TimeConv as TimeConv
from ._latent import GRUEncoder as GRUEncoder
from ._latent import LatentField as LatentField
from ._latent import LatentODE as LatentODE
from ._latent import Posterior as Posterior
from ._latent import Reconstruction as Reconstruction
from ._layers import Linear as Linear
from ._layers import MLP as MLP
from ._layers import TimeLinear as TimeLinear
from ._layers import TimeMLP as TimeMLP
from ._multiscale import Injection as Injection
from ._multiscale import MultiScaleField as MultiScaleField
from ._multiscale import MultiScaleODEClassifier as MultiScaleODEClassifier
from ._multiscale import Scales as Scales
from ._node import NeuralODE as NeuralODE
from ._node import NeuralODEClassifier as NeuralODEClassifier
from ._node import Prediction as Prediction
from ._nsde import NeuralSDE as NeuralSDE
from ._nsde import NeuralSDEClassifier as NeuralSDEClassifier
from ._nsde import Paths as Paths
from ._nsde import SpiralSDE as SpiralSDE
