"""Which experts each token goes to, and with what weights: the router of a sparse mixture of experts."""

from planmill.kernels.routing.token_routing.op import expert_capacity, route_tokens

__all__ = ["expert_capacity", "route_tokens"]
