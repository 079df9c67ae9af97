"""MiLoRA (Wang et al., 2024): the r smallest singular components of the weight become the adapter.

W = U Σ Vᵀ; B₀ = U_m Σ_m^½ and A₀ = Σ_m^½ V_mᵀ of the smallest r components, and the base weight keeps the principal
ones, W − s·B₀A₀. The paper takes small components for noise and rare knowledge.
"""

from harness.methods.pissa import PiSSA


class MiLoRA(PiSSA):
    """PiSSA at the other end of the spectrum."""

    summary = "MiLoRA: adapter from the smallest singular components of W"
    paper = "Wang et al., 2024 (arXiv 2406.09044)"
    largest = False
