"""Names and layouts of published sparse autoencoders, brought to those of SparseAutoencoder."""

from collections.abc import Mapping

import torch

NORM = "encoder.final_block.1."
LINEAR = "encoder.final_block.0."


def folded_norm(state: dict[str, torch.Tensor], weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Weight and bias of the linear layer followed by the BatchNorm in `state`, as it is at inference (eps 1e-5)."""
    mean, variance = state.pop(f"{NORM}running_mean").double(), state.pop(f"{NORM}running_var").double()
    state.pop(f"{NORM}num_batches_tracked", None)
    gain = state.pop(f"{NORM}weight").double() / (variance + 1e-5).sqrt()
    shift = state.pop(f"{NORM}bias").double() - gain * mean
    return (gain[:, None] * weight.double()).to(weight.dtype), (gain * bias.double() + shift).to(bias.dtype)


def archetypal_dictionary(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """(W C + Relax) exp(multiplier), W with non-negative rows that sum to one.

    Relax is taken as stored: training has already kept it within its bound.
    """
    w, c = state.pop("dictionary.W"), state.pop("dictionary.C")
    share = w.double().relu()
    share = share / (share.sum(1, keepdim=True) + 1e-8)
    relax = state.pop("dictionary.Relax").double()
    made = (share @ c.double() + relax) * state.pop("dictionary.multiplier").double().exp()
    return made.to(w.dtype)


def canonical_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`encoder.weight`, `encoder.bias`, `W_dec`, `b_dec` and, where there are any, `threshold` and `W_skip`.

    Raises:
        ValueError: a tensor is missing or is not understood.
    """
    left = dict(state)
    found: dict[str, torch.Tensor] = {}
    for source, target in (
        ("encoder.weight", "encoder.weight"), ("encoder.bias", "encoder.bias"), ("b_enc", "encoder.bias"),
        (f"{LINEAR}weight", "encoder.weight"), (f"{LINEAR}bias", "encoder.bias"), ("W_dec", "W_dec"),
        ("b_dec", "b_dec"), ("W_skip", "W_skip"), ("threshold", "threshold"),
    ):  # fmt: skip
        if source in left:
            found[target] = left.pop(source)
    if "W_enc" in left:
        found["encoder.weight"] = left.pop("W_enc").T.contiguous()
    for name in ("log_threshold", "thresholds"):
        if name in left:
            found["threshold"] = left.pop(name).exp()
    if f"{NORM}running_mean" in left and {"encoder.weight", "encoder.bias"} <= found.keys():
        pair = folded_norm(left, found["encoder.weight"], found["encoder.bias"])
        found["encoder.weight"], found["encoder.bias"] = pair
    if "dictionary._weights" in left:
        found["W_dec"] = torch.nn.functional.normalize(left.pop("dictionary._weights"), dim=1)
    elif {f"dictionary.{part}" for part in ("W", "C", "Relax", "multiplier")} <= left.keys():
        found["W_dec"] = archetypal_dictionary(left)
    missing = [name for name in ("encoder.weight", "W_dec") if name not in found]
    if missing or left:
        raise ValueError(
            f"SparseAutoencoder: the checkpoint lacks {', '.join(missing) or 'nothing'}, "
            f"and these of its tensors are not understood: {', '.join(left) or 'none'}"
        )
    weight = found["encoder.weight"]
    found.setdefault("encoder.bias", weight.new_zeros(weight.shape[0]))
    found.setdefault("b_dec", weight.new_zeros(weight.shape[1]))
    return found
