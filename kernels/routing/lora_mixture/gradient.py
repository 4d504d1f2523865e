"""The gradient of lora_mixture, in float32: products of whole matrices, no reference run again."""


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """With u = x A^T and v = sc * omega * u: dy/dx = W + A^T (sc * omega) B, and so on; a base is often frozen."""
    x, weight, bias, down, up, omega, scale = args
    n, rank, inputs = down.shape
    v, g = x.float(), grads[0].float()
    a, b = down.float().flatten(0, 1), up.float().flatten(0, 1)  # [n * r, I], [n * r, O]
    factor = scale * omega.float().repeat_interleave(rank, 1)[:, None]  # [B, 1, n * r]
    u, du = v @ a.T, g @ b.T  # [B, N, n * r]
    dv = factor * du
    rows, columns = v.flatten(0, 1), g.flatten(0, 1)
    for_x = g @ weight.float() + dv @ a
    for_weight = columns.T @ rows if weight.requires_grad else None
    for_bias = columns.sum(0) if bias.numel() and bias.requires_grad else None
    for_down = (dv.flatten(0, 1).T @ rows).view(n, rank, inputs)
    for_up = ((factor * u).flatten(0, 1).T @ columns).view(up.shape)
    for_omega = scale * (u * du).sum(1).view(-1, n, rank).sum(2)
    found = (for_x, for_weight, for_bias, for_down, for_up, for_omega)
    return *(t if t is None else t.to(a.dtype) for t, a in zip(found, args[:6], strict=True)), None
