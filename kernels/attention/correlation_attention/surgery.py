"""CLIP feature surgery: what all texts have in common is taken off the similarity of image tokens and texts."""

import torch

from planmill.kernels.common.checks import check_alike, check_float, check_rank


def remove_redundancy(image: torch.Tensor, text: torch.Tensor, *, temperature: float = 2.0) -> torch.Tensor:
    """Similarity of image tokens and texts without the features that are redundant among the texts.

    With p = softmax over the texts of (temperature <cls, t_j>) and w_j = p_j / mean of p,

        out[b, i, j] = sum over c of (w_j f_ic t_jc - mean over j' of w_j' f_ic t_j'c)
                     = w_j <f_i, t_j> - mean over j' of w_j' <f_i, t_j'>

    The first form is as published and holds [B, N, T, C]; computed is the second: one product and the mean of its rows.

    Args:
        image: [B, N, C] unit features, the class token first, float16, bfloat16 or float32.
        text: [T, C] unit features, T at least 1, as image.
        temperature: of the weights of the texts.

    Returns:
        [B, N, T], dtype of image, computed in float32. Each image has weights of its own; the published code, which
        is for one image, does not run on more.

    Raises:
        ValueError: wrong rank or shape, no text, no class token, another device.
        TypeError: another dtype.

    Source: Li et al., "CLIP Surgery" (2023), section 3.3; 2 is the published factor.
    """
    op = "remove_redundancy"
    check_rank(op, "image", image, 3, "[B, N, C]")
    check_rank(op, "text", text, 2, "[T, C]")
    check_float(op, "image", image)
    check_alike(op, "text", text, "image", image)
    if text.shape[0] == 0 or text.shape[1] != image.shape[2]:
        raise ValueError(f"{op}: text must be [T, {image.shape[2]}] with T at least 1, got {list(text.shape)}")
    if image.shape[1] == 0:
        raise ValueError(f"{op}: image must be [B, N, C] with the class token first, got {list(image.shape)}")
    similarity = torch.matmul(image.float(), text.float().T)  # [B, N, T]
    weighted = similarity * (text.shape[0] * (temperature * similarity[:, :1]).softmax(2))
    return (weighted - weighted.mean(2, keepdim=True)).to(image.dtype)
