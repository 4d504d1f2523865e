"""sparse_decoding: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_alike, check_float, check_int32_range, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.sparse_rows import chosen_products, scattered_rows
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.sparse_decoding.cases import cases
from planmill.kernels.routing.sparse_decoding.reference import sparse_decoding_reference


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Gradients of values, dictionary and bias through the rows that were summed."""
    values, indices, dictionary, bias = args
    gradient = grads[0]
    for_values = chosen_products(gradient, dictionary, indices)
    for_dictionary = scattered_rows(gradient, values, indices, dictionary.shape[0])
    for_bias = gradient.float().sum(0) if bias.shape[0] else torch.zeros_like(bias)
    return for_values.to(values.dtype), None, for_dictionary.to(dictionary.dtype), for_bias.to(bias.dtype)


SPEC = OpSpec(
    schema="sparse_decoding(Tensor values, Tensor indices, Tensor dictionary, Tensor bias) -> Tensor",
    outputs=lambda values, indices, dictionary, bias: [((values.shape[0], dictionary.shape[1]), dictionary.dtype)],
    reference=sparse_decoding_reference,
    portable="portable:sparse_decoding_portable",
    cases=cases,
    tolerances={torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 1e-2), torch.float16: (2e-3, 2e-3)},
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def decode_sparsely(
    values: torch.Tensor, indices: torch.Tensor, dictionary: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A weighted sum of k rows of a dictionary for each token, without the dense code.

    out[t] = sum_j values[t, j] * dictionary[indices[t, j]] + bias

    The sum is float32 and starts at the bias, then j = 0, 1, ..., so every run gives the same bits, and a token's
    result does not depend on which others share the batch.

    Args:
        values: [T, k], float32, or the dtype of `dictionary`; any strides.
        indices: [T, k], int32: rows of `dictionary`, in any order, repeated or not; -1 adds nothing, whatever its value
            is. Anything else outside 0..M-1 is a mistake: the CPU raises ValueError; a GPU, which cannot without
            waiting for the device, takes it as -1.
        dictionary: [M, D], float32, bfloat16 or float16. Read without a copy where contiguous.
        bias: [D], dtype of `dictionary`, or None.

    Returns:
        [T, D], dtype of `dictionary`; the bias alone for a token whose indices are all -1.

    Raises:
        ValueError: wrong rank, shapes that do not fit together, tensors on different devices, an index outside -1..M-1
            (on the CPU).
        TypeError: another dtype.

    Source: decoding of sparse autoencoders, e.g. Gao et al. 2024, "Scaling and evaluating sparse autoencoders"; also
    of codebook features. The papers leave the order of the sum open.
    """
    op = "sparse_decoding"
    check_rank(op, "values", values, 2, "[T, k]")
    check_rank(op, "indices", indices, 2, "[T, k]")
    check_rank(op, "dictionary", dictionary, 2, "[M, D]")
    check_float(op, "dictionary", dictionary)
    if values.dtype is not torch.float32:
        check_alike(op, "values", values, "dictionary", dictionary)
    if indices.dtype is not torch.int32:
        raise TypeError(f"{op}: indices must be torch.int32, got {indices.dtype}")
    for name, tensor in (("values", values), ("indices", indices)):
        if tensor.device != dictionary.device:
            raise ValueError(f"{op}: {name} must be on {dictionary.device} like dictionary, got {tensor.device}")
    if values.shape != indices.shape:
        raise ValueError(f"{op}: values must be {list(indices.shape)} like indices, got {list(values.shape)}")
    check_int32_range(op, "dictionary", dictionary.shape[0])
    if bias is None:
        bias = dictionary.new_empty(0)
    else:
        check_alike(op, "bias", bias, "dictionary", dictionary)
        if bias.dim() != 1 or bias.shape[0] != dictionary.shape[1]:
            raise ValueError(f"{op}: bias must be [{dictionary.shape[1]}], got {list(bias.shape)}")
    return (_op if is_compiling() else _call)(values, indices, dictionary, bias)
