"""What is counted: callbacks that look at a model on sampled steps and log figures."""

from lightning_ae.diagnostics.monitors.dead_relu import DeadReLUMonitor
from lightning_ae.diagnostics.monitors.gradient_saturation import GradientSaturationMonitor
from lightning_ae.diagnostics.monitors.latent_sparsity import LatentSparsityMonitor

__all__ = ["DeadReLUMonitor", "GradientSaturationMonitor", "LatentSparsityMonitor"]
