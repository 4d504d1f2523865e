"""HaloAttention: 1 x 1 convolutions to queries, keys and values, and attention within blocks and their halos."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.attention.halo_attention.op import PAD_MODES, attend_to_halo
from planmill.kernels.common.checks import check_choice
from planmill.kernels.common.conversions import register_conversion


def rounded_width(width: float) -> int:
    """The multiple of 8 nearest to a width, at least 8 and not more than a tenth below it."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * width else nearest


class RelativePositions(nn.Module):
    """The two tables of relative positions, [2 win - 1, d]."""

    height_rel: nn.Parameter
    width_rel: nn.Parameter

    def __init__(self, window: int, d: int, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        for name in ("height_rel", "width_rel"):
            table = torch.empty(2 * window - 1, d, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(nn.init.trunc_normal_(table, std=d**-0.5)))


class HaloAttention(nn.Module):
    """HaloNet's attention, with the parameters and arguments of timm's HaloAttn.

    Args:
        dim: channels of the input.
        dim_out: channels of the output; None: `dim`.
        feat_size: not used; timm passes it to all its attention layers.
        stride: 1 or 2, of the output; 2 makes queries of every second pixel, or pools the result (see avg_down).
        num_heads: heads; a divisor of dim_out.
        dim_head: channels of a head's queries and keys; None: dim_out * qk_ratio rounded to a multiple of 8, over
            the heads.
        block_size, halo_size: pixels of a block along one side, and of the halo around it.
        qk_ratio: see dim_head.
        qkv_bias: biases of the convolutions.
        avg_down: with stride 2, attend at full resolution and average 2 x 2 pixels of the result; a block size that
            is not even does so in any case.
        scale_pos_embed: scale the positional logits like the others.
        pad_mode: keys outside the image count as zero vectors ("zero", as trained models have it) or not ("mask").

    Shapes: x [B, dim, H, W], H and W multiples of block_size -> [B, dim_out, H / stride, W / stride].

    Source: Vaswani et al. (CVPR 2021); arguments, parameter names and what the paper leaves open as in timm.
    """

    def __init__(
        self, dim: int, dim_out: int | None = None, feat_size: tuple[int, int] | None = None, stride: int = 1,
        num_heads: int = 8, dim_head: int | None = None, block_size: int = 8, halo_size: int = 3, qk_ratio: float = 1.0,
        qkv_bias: bool = False, avg_down: bool = False, scale_pos_embed: bool = False, *, pad_mode: str = "zero",
        device: torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dim_out = dim_out or dim
        if num_heads < 1 or dim_out % num_heads:
            raise ValueError(f"HaloAttention: dim_out must be a multiple of num_heads {num_heads}, got {dim_out}")
        if block_size < 1 or halo_size < 0:
            raise ValueError(
                f"HaloAttention: block_size must be at least 1, halo_size at least 0, got {block_size}, {halo_size}"
            )
        if stride not in (1, 2):
            raise ValueError(f"HaloAttention: stride must be 1 or 2, got {stride}")
        check_choice("HaloAttention", "pad_mode", pad_mode, PAD_MODES)
        self.pooled = stride == 2 and (avg_down or block_size % 2 == 1)
        self.query_stride = 1 if self.pooled else stride
        self.num_heads, self.block_size, self.halo_size = num_heads, block_size, halo_size
        self.dim_head_qk = dim_head or rounded_width(dim_out * qk_ratio) // num_heads
        self.dim_head_v = dim_out // num_heads
        self.scale_pos_embed, self.pad_mode = scale_pos_embed, pad_mode
        queries, values = num_heads * self.dim_head_qk, num_heads * self.dim_head_v
        self.q = nn.Conv2d(dim, queries, 1, self.query_stride, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Conv2d(dim, queries + values, 1, bias=qkv_bias, device=device, dtype=dtype)
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=dim**-0.5)
        self.pos_embed = RelativePositions(block_size + 2 * halo_size, self.dim_head_qk, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend within `x` [B, dim, H, W]."""
        if x.dim() != 4 or x.shape[1] != self.q.in_channels:
            raise ValueError(f"HaloAttention: x must be [B, {self.q.in_channels}, H, W], got {list(x.shape)}")
        if x.shape[2] % self.block_size or x.shape[3] % self.block_size:
            raise ValueError(
                f"HaloAttention: H and W must be multiples of block_size {self.block_size}, got H {x.shape[2]}, "
                f"W {x.shape[3]}"
            )
        q = self.q(x).unflatten(1, (self.num_heads, self.dim_head_qk))
        kv = self.kv(x).unflatten(1, (self.num_heads, self.dim_head_qk + self.dim_head_v))
        k, v = kv.split([self.dim_head_qk, self.dim_head_v], 2)
        y = attend_to_halo(
            q, k, v, self.pos_embed.height_rel, self.pos_embed.width_rel, block=self.block_size, halo=self.halo_size,
            stride=self.query_stride, pad_mode=self.pad_mode, scale_pos_embed=self.scale_pos_embed,
        ).flatten(1, 2)  # fmt: skip
        return F.avg_pool2d(y, 2) if self.pooled else y

    def extra_repr(self) -> str:
        """Sizes and options, as `print` shows them."""
        return (
            f"num_heads={self.num_heads}, block_size={self.block_size}, halo_size={self.halo_size}, "
            f"pad_mode={self.pad_mode!r}" + (", pooled" if self.pooled else "")
        )

    @classmethod
    def from_timm(cls, module: nn.Module, *, pad_mode: str = "zero") -> "HaloAttention":
        """The layer of timm's HaloAttn; parameters are the module's own objects.

        Args:
            module: a `timm.layers.HaloAttn`.
            pad_mode: "zero" computes what timm computes.

        Raises:
            ValueError: a module that is no HaloAttn.
        """
        if type(module).__name__ != "HaloAttn":
            raise ValueError(f"HaloAttention: module must be timm's HaloAttn, got {type(module).__name__}")
        source: Any = module
        pooled = isinstance(source.pool, nn.AvgPool2d)
        layer = cls(
            source.q.in_channels, source.num_heads * source.dim_head_v, None, 2 if pooled else source.block_stride,
            source.num_heads, source.dim_head_qk, source.block_size, source.halo_size,
            qkv_bias=source.q.bias is not None, avg_down=pooled, scale_pos_embed=source.scale_pos_embed,
            pad_mode=pad_mode, device=torch.device("meta"),
        )  # fmt: skip
        for name, parameter in module.named_parameters():
            holder, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(holder), leaf, parameter)
        return layer.train(module.training)


register_conversion("HaloAttn", HaloAttention.from_timm)
