"""StepGate, SqueezeGate, PairGate, FieldGate: the published gates as modules."""

import torch
from torch import nn

from planmill.kernels.routing.channel_gate.gate import average_channels, gate_by_mean, gate_channels


class StepGate(nn.Module):
    """Channels whose mean is above a threshold are raised: `y = x * (base + slope * step(mean - threshold))`.

    With the defaults this is DSAT at inference: channels of positive mean are doubled. It has no parameters, and the
    same holds in training: the published noise and the saturating sigmoid of training are not part of it, and the
    gradient takes the gate as a constant.

    Args:
        threshold: in units of x; a mean equal to it does not pass.
        base, slope: factor of a closed gate, and what an open one adds. Base 0 makes a filter of it.

    Shapes: x [B, C, H, W] or [B, N, C] -> the same.

    Source: DSAT (its public code), inference form.
    """

    def __init__(self, threshold: float = 0.0, *, base: float = 1.0, slope: float = 1.0) -> None:
        super().__init__()
        self.threshold, self.base, self.slope = threshold, base, slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate `x`."""
        return gate_channels(x, gate_by_mean(x, self.threshold), base=self.base, slope=self.slope)

    def extra_repr(self) -> str:
        """The settings."""
        return f"threshold={self.threshold}, base={self.base}, slope={self.slope}"


class SqueezeGate(nn.Module):
    """Squeeze-and-Excitation: `y = x * sigmoid(fc2(relu(fc1(mean))))`.

    Parameters are named as in timm and torchvision (`fc1`, `fc2`); their 1 x 1 convolution weights
    [O, I, 1, 1] load too.

    Args:
        channels: C.
        hidden: width between the two layers.
        base, slope: as in `gate_channels`.

    Shapes: x [B, C, H, W] or [B, N, C] -> the same.

    Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks" (CVPR 2018), section 3.
    """

    def __init__(self, channels: int, hidden: int, *, base: float = 0.0, slope: float = 1.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.base, self.slope = base, slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate `x`."""
        s = average_channels(x).to(self.fc1.weight.dtype)
        return gate_channels(x, self.fc2(self.fc1(s).relu()).sigmoid(), base=self.base, slope=self.slope)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        for name in ("fc1.weight", "fc2.weight"):
            weight = state_dict.get(prefix + name)
            if weight is not None and weight.dim() == 4 and weight.shape[2:] == (1, 1):
                state_dict[prefix + name] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PairGate(nn.Module):
    """A gate for a pair of classes: `y = z * g(a, b)` with `g = sigmoid(fc2(relu(fc1((e_a + e_b) / 2))))`.

    Symmetric in the pair. The paper trains with it; `gate` gives the vector of one pair, which `fold_gate` puts into
    the layer that follows.

    Args:
        classes: number of classes.
        channels: C.
        width: width of a class embedding e.
        hidden: width between the two layers.

    Shapes: z [B, C]; first, second [B] integers below `classes` -> [B, C].

    Source: Hydra's gates, from a description of the paper; depth and activation of the network are not known: ours has
    one hidden layer and ReLU.
    """

    def __init__(self, classes: int, channels: int, width: int = 64, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, channels)

    def gate(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The gate [..., C] of pairs of classes, both [...] integers."""
        mean = (self.embedding(first) + self.embedding(second)) / 2
        return self.fc2(self.fc1(mean).relu()).sigmoid()

    def forward(self, z: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """`z` [B, C] times the gate of its pair."""
        return gate_channels(z[:, None], self.gate(first, second))[:, 0]


class FieldGate(nn.Module):
    """A learned gate for every feature value of a table: `y[b, f] = e[b, f] * g[i[b, f]]`.

    At inference `g = s` where the weight is above 0, otherwise 0: the values that were not selected vanish, and `fold`
    puts the selection into the embedding table. In training `g = s * sigmoid(temperature * w)`; the caller raises
    `temperature` from 1 on, so that the gate hardens into the step. `s = 1 / sigmoid(w_0)`, with `w_0` the weight at
    the start, makes every gate 1 at the start.

    Args:
        values: number of feature values, rows of the embedding table.
        initial: `w_0`; 0.5 as in public code.
        scaled: False: s = 1 at inference, as the paper's text has it for the final training of a selection; public
            code keeps the factor of the search.

    Shapes: e [B, F, D], i [B, F] integers below `values` -> [B, F, D].

    Source: OptFS (Lyu et al., "Optimizing Feature Set for Click-Through Rate Prediction", WWW 2023), section 3.
    """

    scale: torch.Tensor

    def __init__(self, values: int, initial: float = 0.5, *, scaled: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((values,), initial))
        self.register_buffer("scale", 1 / torch.tensor(initial).sigmoid())
        self.temperature, self.scaled = 1.0, scaled

    def _harden(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.where(weight > 0, self.scale if self.scaled else 1.0, 0.0).to(weight.dtype)

    def gate(self, indices: torch.Tensor) -> torch.Tensor:
        """The gate [...] of feature values [...]."""
        weight = nn.functional.embedding(indices, self.weight[:, None]).squeeze(-1)
        return self.scale * (self.temperature * weight).sigmoid() if self.training else self._harden(weight)

    def forward(self, embeddings: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """`embeddings` [B, F, D] times the gates of `indices` [B, F]."""
        if embeddings.dim() != 3 or embeddings.shape[:2] != indices.shape:
            raise ValueError(
                f"FieldGate: embeddings must be [B, F, D] and indices [B, F], got {list(embeddings.shape)} and "
                f"{list(indices.shape)}"
            )
        return (embeddings * self.gate(indices)[..., None]).to(embeddings.dtype)

    @torch.no_grad()
    def fold(self, embedding: nn.Embedding) -> nn.Embedding:
        """A copy of the table `embedding` [values, D] with every row times its gate at inference."""
        if embedding.num_embeddings != self.weight.shape[0]:
            raise ValueError(
                f"FieldGate.fold: embedding must have {self.weight.shape[0]} rows, got {embedding.num_embeddings}"
            )
        table = embedding.weight * self._harden(self.weight)[:, None]
        return nn.Embedding.from_pretrained(table, freeze=False, padding_idx=embedding.padding_idx)
