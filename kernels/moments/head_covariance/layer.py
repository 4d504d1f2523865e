"""Moment probing: a classifier of the mean and the second moments of frozen features; and the adapter of MP+."""

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.common.checks import check_choice
from planmill.kernels.moments.head_covariance.op import cross_covariance
from planmill.kernels.moments.head_covariance.reference import CENTERINGS, PAIRINGS, pair_heads

VARIANTS = ("vit", "cnn", "mlp")


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, 1, 1]; named `norm` in the published head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x`."""
        return F.layer_norm(x.flatten(1), self.normalized_shape, self.weight, self.bias, self.eps)


class MomentProbingHead(nn.Module):
    """The mean of two linear classifiers: of the class token (or mean), and of what heads' cross-covariances say.

    A projection, `cross_covariance` of the heads with their shared LayerNorm, two strided 3 x 3 convolutions with an
    exact GELU between, and a linear layer. The parameters are named and shaped as in the published head, so that its
    state dict loads: `proj`, `ln`, `downblocks.0.0`, `downblocks.0.2`, `classifier2`, and `classifier1` ("vit") or
    `cls_head.norm` ("cnn") and `cls_head.fc` ("cnn", "mlp").

    Args:
        dim: channels of the features.
        classes: K.
        variant: "vit": heads are neighbouring channels of tokens whose first is the class token; "cnn", "mlp": heads
            are interleaved channels of a feature map, whose mean, normalised in "cnn", takes the class token's place.
        hidden: channels of the projection.
        heads: that they are split into; hidden / heads channels each, at least 7.
        centering, pairing: see `cross_covariance`. "all" is not divided by the lengths in "vit", as published; the
            published code of "all" for the other two does not run.

    Shapes: `head(cls [B, dim], tokens [B, 1 + T, dim])` ("vit") or `head(x [B, dim, H, W])` -> logits [B, K] float32:
        the two are averaged in float32.

    Source: Gao et al., "Tuning pre-trained model via moment probing" (ICCV 2023), section 3.
    """

    def __init__(
        self, dim: int, classes: int, *, variant: str = "vit", hidden: int = 512, heads: int = 4,
        centering: str = "scalar", pairing: str = "adjacent",
    ) -> None:  # fmt: skip
        super().__init__()
        op = "MomentProbingHead"
        check_choice(op, "variant", variant, VARIANTS)
        check_choice(op, "centering", centering, CENTERINGS)
        check_choice(op, "pairing", pairing, PAIRINGS)
        if heads < 2 or hidden % heads or hidden // heads < 7:
            raise ValueError(f"{op}: heads must be at least 2 and split hidden into 7 channels or more, got {heads}")
        self.variant, self.heads, self.centering, self.pairing = variant, heads, centering, pairing
        maps, side = len(pair_heads(heads, pairing)), ((hidden // heads - 3) // 2 + 1 - 3) // 2 + 1
        self.proj = nn.Linear(dim, hidden) if variant == "vit" else nn.Conv2d(dim, hidden, 1)
        self.ln = nn.LayerNorm(hidden // heads)
        if variant == "vit":
            self.classifier1 = nn.Linear(dim, classes)
        else:
            norm = {"norm": ChannelNorm(dim, eps=1e-6)} if variant == "cnn" else {}
            self.cls_head = nn.ModuleDict({**norm, "fc": nn.Linear(dim, classes)})
        self.classifier2 = nn.Linear(maps * side * side, classes)
        convolutions = [nn.Conv2d(maps, maps, 3, stride=2, bias=False) for _ in range(2)]
        self.downblocks = nn.ModuleList([nn.Sequential(convolutions[0], nn.GELU(), convolutions[1])])

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the class token `x` and `tokens`, or of the feature map `x`."""
        if self.variant == "vit":
            if tokens is None or x.dim() != 2 or tokens.dim() != 3:
                given = "none" if tokens is None else list(tokens.shape)
                raise ValueError(
                    f"MomentProbingHead: needs cls [B, dim] and tokens [B, 1 + T, dim], got {list(x.shape)} and {given}"
                )
            first = self.classifier1(x)
            projected = self.proj(tokens[:, 1:])
        else:
            if tokens is not None or x.dim() != 4:
                raise ValueError(f"MomentProbingHead: needs one feature map [B, dim, H, W], got {list(x.shape)}")
            first = self._classify_mean(x)
            projected = self.proj(x).flatten(2).transpose(1, 2)
        return (first.float() + self._classify_covariances(projected).float()) / 2

    def _classify_mean(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3))
        if self.variant == "cnn":
            mean = self.cls_head["norm"](mean)
        return self.cls_head["fc"](mean)

    def _classify_covariances(self, projected: torch.Tensor) -> torch.Tensor:
        maps = cross_covariance(
            projected, self.heads, norm_weight=self.ln.weight, norm_bias=self.ln.bias, norm_eps=self.ln.eps,
            centering=self.centering, pairing=self.pairing, interleaved=self.variant != "vit",
            normalize=self.pairing != "all" or self.variant != "vit",
        )  # fmt: skip
        maps = maps.to(self.classifier2.weight.dtype)
        for block in self.downblocks:
            maps = block(maps)
        return self.classifier2(maps.flatten(1))

    def extra_repr(self) -> str:
        """The settings."""
        return f"variant={self.variant!r}, heads={self.heads}, centering={self.centering!r}, pairing={self.pairing!r}"


class RecalibrationAdapter(nn.Module):
    """The adapter of MP+: the output of a frozen branch, scaled and shifted by what a low rank of its input says.

    branch -> b + (1 + w) * branch, with g = relu(Wd x), w = Ww g and b = Wb g. Its place is on the MLP of each block,
    x the residual stream after the attention and before the norm:

        x = x + layer_scale(adapter(x, mlp(norm2(x))))

    Args:
        dim: C.
        rank: of Wd. The published parameters are named `down`, `up_weight` and `up_bias` as here.

    Shapes: x, branch [..., C] -> the same, dtype of branch.

    Source: Gao et al., "Tuning pre-trained model via moment probing" (ICCV 2023), section 3.3.
    """

    def __init__(self, dim: int, rank: int = 16) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up_weight = nn.Linear(rank, dim, bias=False)
        self.up_bias = nn.Linear(rank, dim, bias=False)

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """Recalibrate `branch`, the result of a branch on `x`."""
        if x.shape != branch.shape or x.shape[-1] != self.down.in_features:
            raise ValueError(
                f"RecalibrationAdapter: x and branch must be [..., {self.down.in_features}] and alike, "
                f"got {list(x.shape)} and {list(branch.shape)}"
            )
        g = F.relu(self.down(x))
        return torch.addcmul(branch + self.up_bias(g), self.up_weight(g), branch)
