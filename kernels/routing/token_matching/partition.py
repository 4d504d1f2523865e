"""Which tokens of a sequence may be merged, which take others in, and which stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

SEED = 33  # of the published generator
SPECIAL = 5  # one camera token and four register tokens lead every frame


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return mask.nonzero()[:, 0].int()


@dataclass(frozen=True, eq=False)
class TokenPartition:
    """A partition of N tokens for merging; the same for every entry of a batch and every layer.

    Args:
        tokens: N.
        src: [n] int32, ascending: tokens that may be merged into a destination.
        dst: [m] int32: destinations.
        protected: [p] int32: tokens with a row of their own at the end of the output, which `unmerge_tokens` gives
            back. One that is a destination too takes part twice: merged among the destinations, and as it is.
        kept: [k] int32: tokens that are never merged, at the front of the output.
        limit: how many sources are merged where the call does not say; at most n are.
        in_order: unmerged sources in the order of the sequence; otherwise by falling similarity, as published.

    Raises:
        ValueError: a token that is missing, out of range or in two of src, dst and kept; protected tokens that are
            sources; sources without destinations. Not checked on a GPU, where it would stop the stream.
    """

    tokens: int
    src: torch.Tensor
    dst: torch.Tensor
    protected: torch.Tensor
    kept: torch.Tensor
    limit: int
    in_order: bool = False

    def __post_init__(self) -> None:
        if self.src.device.type != "cpu" or torch.compiler.is_compiling():
            return
        for name in ("src", "dst", "protected", "kept"):
            own = getattr(self, name)
            if own.dim() != 1 or own.dtype != torch.int32:
                raise ValueError(f"TokenPartition: {name} must be [n] int32, got {list(own.shape)} {own.dtype}")
            if own.numel() and not 0 <= int(own.min()) <= int(own.max()) < self.tokens:
                raise ValueError(f"TokenPartition: {name} must hold tokens from 0 to {self.tokens - 1}")
        seen = torch.zeros(self.tokens, dtype=torch.int32)
        single = torch.cat([self.src, self.dst, self.kept]).long()
        seen.index_add_(0, single, torch.ones_like(single, dtype=torch.int32))
        if bool((seen > 1).any()):
            raise ValueError("TokenPartition: a token is in two of src, dst and kept, or in one of them twice")
        if bool(torch.isin(self.protected, torch.cat([self.src, self.kept])).any()):
            raise ValueError("TokenPartition: a protected token is among src or kept")
        seen[self.protected.long()] += 1
        if bool((seen == 0).any()):
            raise ValueError(f"TokenPartition: token {int(seen.argmin())} is in none of src, dst, protected and kept")
        if self.protected.unique().numel() != self.protected.numel():
            raise ValueError("TokenPartition: a token is protected twice")
        if self.src.numel() and not self.dst.numel():
            raise ValueError("TokenPartition: sources need at least one destination")
        if self.limit < 0:
            raise ValueError(f"TokenPartition: limit must not be negative, got {self.limit}")

    def to(self, device: torch.device | str) -> TokenPartition:
        """The same partition on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("src", "dst", "protected", "kept")}
        return replace(self, **moved)

    @staticmethod
    def for_frames(
        frames: int,
        height: int,
        width: int,
        *,
        special: int = SPECIAL,
        seed: int | None = SEED,
        protect: float = 0.1,
        ratio: float = 0.9,
        sheared: bool = True,
        device: torch.device | str = "cpu",
    ) -> TokenPartition:
        """The partition of FastVGGT for a sequence of frames, each `special` tokens and then height x width patches.

        Destinations are all tokens of the first frame, the special tokens of every frame, and one random patch of each
        2 x 2 block of patches of the later frames. Sources are the rest. Made once for each set of arguments and kept.

        Args:
            frames: S, at least 1.
            height: h, patches per column.
            width: w, patches per row.
            special: tokens before the patches of a frame.
            seed: of the random patches, drawn on the CPU as `torch.randint(4, (S - 1, h // 2, w // 2))` so that every
                device has the same partition (the published code draws on the model's device, which differs on a GPU);
                None: no patch of a later frame is a destination (the published `no_rand`).
            protect: share of the tokens to protect: int(protect * N) of them, evenly spaced from token 0; 0: none.
            ratio: int(ratio * N) sources are merged at most. At the published 0.9 that is all of them.
            sheared: the published layout, bit for bit: the pattern of 2 (h // 2) rows of 2 (w // 2) patches is written
                without gaps from the first patch of a frame on, so that for an odd width every row of it begins one
                patch earlier than the row of patches before it, and blocks are not blocks of the image. False: the
                pattern is laid on the grid; the last row and column of an odd grid are sources.
            device: where the tensors are to be.

        Raises:
            ValueError: a size that is not positive, or a share outside 0 to 1.
        """
        if min(frames, height, width) < 1 or special < 0:
            raise ValueError(
                f"TokenPartition: frames, height and width must be positive and special not negative, got {frames}, "
                f"{height}, {width} and {special}"
            )
        if not 0 <= protect <= 1 or not 0 <= ratio <= 1:
            raise ValueError(f"TokenPartition: protect and ratio must be from 0 to 1, got {protect} and {ratio}")
        return _for_frames(frames, height, width, special, seed, protect, ratio, sheared, torch.device(device))

    @staticmethod
    def alternating(tokens: int, *, class_token: bool = True, device: torch.device | str = "cpu") -> TokenPartition:
        """The partition of ToMe: tokens 0, 2, 4... are sources and 1, 3, 5... destinations.

        The class token, token 0, is never merged and stays at the front; unmerged sources keep their order. Give
        `match_tokens` the number of merges of the layer.

        Args:
            tokens: N, at least 1.
            class_token: whether token 0 is one.
            device: where the tensors are to be.

        Raises:
            ValueError: no token.
        """
        if tokens < 1:
            raise ValueError(f"TokenPartition: tokens must be positive, got {tokens}")
        return _alternating(tokens, class_token, torch.device(device))


@lru_cache(maxsize=64)
def _for_frames(
    frames: int, height: int, width: int, special: int, seed: int | None, protect: float, ratio: float, sheared: bool,
    device: torch.device,
) -> TokenPartition:  # fmt: skip
    if device.type != "cpu":
        made = _for_frames(frames, height, width, special, seed, protect, ratio, sheared, torch.device("cpu"))
        return made.to(device)
    frame = special + height * width
    destination = torch.zeros(frames, frame, dtype=torch.bool)
    destination[0] = True
    destination[:, :special] = True
    if seed is not None and frames > 1:
        rows, columns = height // 2, width // 2
        drawn = torch.randint(4, (frames - 1, rows, columns), generator=torch.Generator().manual_seed(seed))
        pattern = torch.nn.functional.one_hot(drawn, 4).bool().view(frames - 1, rows, columns, 2, 2)
        pattern = pattern.transpose(2, 3).reshape(frames - 1, 2 * rows, 2 * columns)
        patches = destination[1:, special:]
        if sheared:
            patches[:, : 4 * rows * columns] = pattern.flatten(1)
        else:
            patches.view(frames - 1, height, width)[:, : 2 * rows, : 2 * columns] = pattern
    tokens = frames * frame
    protected = torch.zeros(tokens, dtype=torch.bool)
    count = int(protect * tokens)
    if count:
        protected[: count * (tokens // count) : tokens // count] = True
    destination = destination.flatten()
    return TokenPartition(
        tokens=tokens,
        src=_positions(~destination & ~protected),
        dst=_positions(destination),
        protected=_positions(protected),
        kept=torch.empty(0, dtype=torch.int32),
        limit=int(ratio * tokens),
    )


@lru_cache(maxsize=64)
def _alternating(tokens: int, class_token: bool, device: torch.device) -> TokenPartition:
    position = torch.arange(tokens, dtype=torch.int32)
    first = 2 if class_token else 0
    alone = tokens == 1  # nothing to be merged into
    made = TokenPartition(
        tokens=tokens,
        src=position[:0] if alone else position[first::2],
        dst=position[1::2],
        protected=position[:0],
        kept=position[:1] if class_token or alone else position[:0],
        limit=tokens,
        in_order=True,
    )
    return made if device.type == "cpu" else made.to(device)
