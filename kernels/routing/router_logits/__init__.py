"""Logits of a router, the same bits in every batch."""

from planmill.kernels.routing.router_logits.op import score_experts

__all__ = ["score_experts"]
