"""Terms on the model as a whole, each ``penalty(x, output, model)`` with a ``weight``."""

from lightning_ae.penalties.base import Penalty
from lightning_ae.penalties.constraint import ConstraintPenalty, Divergence, Total
from lightning_ae.penalties.dictionary import AuxiliaryK, PrefixReconstruction
from lightning_ae.penalties.jacobian import JacobianPenalty
from lightning_ae.penalties.orthogonality import OrthogonalityPenalty
from lightning_ae.penalties.prior import WeightPrior

__all__ = [
    "AuxiliaryK",
    "ConstraintPenalty",
    "Divergence",
    "JacobianPenalty",
    "OrthogonalityPenalty",
    "Penalty",
    "PrefixReconstruction",
    "Total",
    "WeightPrior",
]
