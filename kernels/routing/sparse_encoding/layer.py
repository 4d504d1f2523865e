"""SparseAutoencoder: encoder, dictionary and biases under the names that published sparse autoencoders use."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_choice
from planmill.kernels.routing.sparse_decoding import decode_sparsely
from planmill.kernels.routing.sparse_encoding.checkpoint import canonical_state
from planmill.kernels.routing.sparse_encoding.op import MAX_K, encode_sparsely
from planmill.kernels.routing.sparse_encoding.reference import MODES


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder or transcoder that never holds tokens x latents.

    values, indices = encode_sparsely(x - b_dec, encoder.weight, encoder.bias, k), where a transcoder does not subtract;
    the result is sum_j values_j W_dec[indices_j] + b_dec (+ x @ W_skip.T).

    With "jump_relu" the number of active latents varies, and `k` is what the result has room for. A token that has more
    is never cut short silently: eager on the CPU, `encode` runs again with as much room as the fullest token needs;
    compiled, exported or on a GPU, where shapes are fixed and nothing waits for the device, that token's values, and so
    its reconstruction, are NaN.

    RA-SAE (archetypal dictionaries): `from_state_dict` folds the convex combinations of data points, their relaxation
    and the multiplier into W_dec once, so that inference costs what any other dictionary does.

    Args:
        width: D of the tokens.
        latents: M, rows of the dictionary.
        k: active latents of a token; with "jump_relu" the most there is room for.
        mode: "topk", "abs_topk" or "jump_relu".
        transcode: b_dec is not subtracted before encoding.
        skip: there is a W_skip.

    Raises:
        ValueError: k outside 1 to 1024, an unknown mode; from `encode`, a token with more than 1024 active latents.

    Shapes: x [..., D] -> [..., D].

    Source: see `encode_sparsely`; the names and layouts are those of EleutherAI's sparsify and of overcomplete.
    """

    threshold: nn.Parameter | None
    W_skip: nn.Parameter | None

    def __init__(
        self, width: int, latents: int, k: int, mode: str = "topk", *, transcode: bool = False, skip: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("SparseAutoencoder", "mode", mode, MODES)
        if not 1 <= k <= MAX_K:
            raise ValueError(f"SparseAutoencoder: k must be from 1 to {MAX_K}, got {k}")
        self.k, self.mode, self.transcode = k, mode, transcode
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.encoder = nn.Linear(width, latents, **made)
        nn.init.zeros_(self.encoder.bias)
        self.W_dec = nn.Parameter(self.encoder.weight.detach().clone())
        self.b_dec = nn.Parameter(torch.zeros(width, **made))
        self.register_parameter("W_skip", nn.Parameter(torch.zeros(width, width, **made)) if skip else None)
        jump = mode == "jump_relu"
        self.register_parameter("threshold", nn.Parameter(torch.full((latents,), 1e-3, **made)) if jump else None)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, torch.Tensor], k: int, mode: str | None = None, *, transcode: bool = False
    ) -> "SparseAutoencoder":
        """A layer with the weights of a published checkpoint, on their device and in their dtype.

        Understood names: sparsify's (`encoder.weight`, `encoder.bias`, `W_dec`, `b_dec`, `W_skip`); `W_enc` [D, M],
        `b_enc` with `threshold` or `log_threshold`; overcomplete's linear encoder with its BatchNorm folded in
        (`encoder.final_block.*`), `thresholds` (logarithms), and its dictionaries: `dictionary._weights` (rows are
        brought to length one) or the archetypal `dictionary.W`, `.C`, `.Relax`, `.multiplier`.

        Args:
            state: the checkpoint's tensors.
            k, transcode: see the class. Overcomplete has no b_dec; it is zero, and `transcode` makes no difference.
            mode: None: "jump_relu" where the checkpoint has thresholds, else "topk".

        Raises:
            ValueError: a tensor is missing or is not understood.
        """
        tensors = canonical_state(state)
        mode = mode or ("jump_relu" if "threshold" in tensors else "topk")
        latents, width = tensors["encoder.weight"].shape
        weight = tensors["encoder.weight"]
        layer = cls(
            width, latents, k, mode, transcode=transcode, skip="W_skip" in tensors, device=weight.device,
            dtype=weight.dtype,
        )  # fmt: skip
        layer.load_state_dict(tensors)
        return layer

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [..., k] float32, largest first, and indices [..., k] int32 of the active latents of x [..., D]."""
        tokens = x.reshape(-1, x.shape[-1])
        if not self.transcode:
            tokens = tokens - self.b_dec
        values, indices, counts = self._encode(tokens, self.k)
        if self.mode == "jump_relu":
            if is_compiling() or x.device.type != "cpu":
                values = torch.where((counts > self.k)[:, None], torch.nan, values)
            elif counts.numel() and (most := int(counts.max())) > self.k:
                if most > MAX_K:
                    raise ValueError(f"SparseAutoencoder: a token has {most} active latents, at most {MAX_K} fit")
                values, indices, _ = self._encode(tokens, most)
        return tuple(t.view(*x.shape[:-1], t.shape[1]) for t in (values, indices))  # type: ignore[return-value]

    def _encode(self, tokens: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return encode_sparsely(
            tokens, self.encoder.weight, self.encoder.bias, k, mode=self.mode, threshold=self.threshold
        )

    def decode(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Reconstructions [..., D] of values and indices [..., k]."""
        k = values.shape[-1]
        found = decode_sparsely(values.reshape(-1, k), indices.reshape(-1, k), self.W_dec, self.b_dec)
        return found.view(*values.shape[:-1], found.shape[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The reconstruction [..., D] of x [..., D], or what a transcoder makes of it; dtype of x."""
        found = self.decode(*self.encode(x))
        return found if self.W_skip is None else found + x @ self.W_skip.mT

    def extra_repr(self) -> str:
        """What the parameters do not show."""
        return f"k={self.k}, mode={self.mode}, transcode={self.transcode}"
