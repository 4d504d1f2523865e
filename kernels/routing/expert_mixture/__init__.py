"""Each token through the experts it was assigned to, summed with the weights of its assignments."""

from planmill.kernels.routing.expert_mixture.op import mix_experts

__all__ = ["mix_experts"]
