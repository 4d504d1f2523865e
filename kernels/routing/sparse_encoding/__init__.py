"""The few active latents of a sparse autoencoder, found without the tokens x latents matrix."""

from planmill.kernels.routing.sparse_encoding.layer import SparseAutoencoder
from planmill.kernels.routing.sparse_encoding.op import encode_sparsely

__all__ = ["SparseAutoencoder", "encode_sparsely"]
