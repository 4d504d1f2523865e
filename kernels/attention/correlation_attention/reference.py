"""P = sum over the maps of softmax(X Y^T c), X and Y among q, k and v; out = P V."""

import torch

PAIRS = {"qk": ("q", "k"), "qq": ("q", "q"), "kk": ("k", "k"), "vv": ("v", "v")}
MAPS = (*PAIRS, "qkv")  # the last: rows of q, k and v behind one another, with c / sqrt(3)
LARGEST = 1e38  # a score above counts as this


def softmax(S: torch.Tensor) -> torch.Tensor:
    """Over the last dimension; NaN weighs 0, and a row of nothing else is NaN. Zeros where all are -inf."""
    nan = S.isnan()
    S = S.masked_fill(nan, -torch.inf)
    top = S.detach().amax(-1, keepdim=True).clamp(-LARGEST, LARGEST)
    e = torch.exp((S - top).clamp_max(0))
    return (e / e.sum(-1, keepdim=True).clamp_min(1)).masked_fill(nan.all(-1, keepdim=True), torch.nan)


def correlation_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, maps: str, original: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over `maps` and, where `original`, the map qk alone: [B, H, N, dv], dtype of v."""
    rows = {"q": q.double(), "k": k.double(), "v": v.double()}
    if v.numel() == 0:
        return torch.zeros_like(v), torch.zeros_like(v[: v.shape[0] * original])
    rows["qkv"] = torch.cat([rows["q"], rows["k"], rows["v"]], -1)

    def attend(names: list[str]) -> torch.Tensor:
        P = torch.zeros((), dtype=torch.float64, device=v.device)
        for name in names:
            x, y = PAIRS.get(name, (name, name))
            c = scale / 3**0.5 if name == "qkv" else scale
            P = P + softmax(rows[x] @ rows[y].mT * c)  # [B, H, N, N]
        return (P @ rows["v"]).to(v.dtype)

    new = attend(maps.split("+"))
    return new, attend(["qk"]) if original else new[:0].clone()
