"""Members of clusters: for every centroid the tokens nearest to it in direction, a fixed number of them."""

from planmill.kernels.attention.cluster_members.op import choose_members

__all__ = ["choose_members"]
