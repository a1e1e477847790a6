"""Trade-offs between pixels and perception: sweeping the mix, and the front that comes out."""

from lightning_ae.pareto.front import ParetoFront
from lightning_ae.pareto.sweep import sweep

__all__ = ["ParetoFront", "sweep"]
