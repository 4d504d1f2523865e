"""Parity of a plan against its model, per output; the receipt goes into the manifest."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from planmill.engine.capture import MODEL_ERRORS, Captured, resized
from planmill.engine.errors import PlanError, first_line
from planmill.engine.manifest import DimRange, OutputReceipt, Precision, Receipt, TensorSpec, Tolerance, Verified
from planmill.engine.targets import Runner

# bf16 keeps 8 bits: one rounding is 0.4 %, and a deep model adds up tens of them; an argmax over close values may flip.
# fp16 keeps 11.
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(cosine=0.999999, max_rel=1e-4, mismatched=0.0),
    "bf16": Tolerance(cosine=0.995, max_rel=0.1, mismatched=0.05),
    "fp16": Tolerance(cosine=0.9995, max_rel=0.02, mismatched=0.02),
}

Sampler = Callable[[Mapping[str, int], torch.Generator], Sequence[torch.Tensor]]


def verify(
    run: Runner,
    captured: Captured,
    tolerance: Tolerance,
    *,
    sample: Sampler | None = None,
    seed: int = 0,
    verified: Verified = "executed",
    proof: str = "",
    progress: Callable[[float], None] = lambda fraction: None,
) -> Receipt:
    """Compare a plan with its model on fresh random inputs, in float64.

    Args:
        run: the plan.
        captured: the model and its inputs.
        tolerance: how far each output may be from the model's.
        sample: `sample(sizes, generator) -> inputs`, for a model that takes only certain values. Without it floating
            inputs are normal with the mean and deviation of the example, integers lie between the example's extremes.
        seed: of the random inputs.
        verified: what `run` runs, for the receipt.
        proof: the same in words.
        progress: called with the part that is done, 0 to 1.

    Returns:
        The receipt, the worst over all cases.

    Raises:
        PlanError: an output is out of tolerance; names the output, the number and the tolerance. NaN never passes. Or
            the model or the plan does not run at one of the sizes; names them, and says what it said.
    """
    cases = plan_cases(captured.dynamic)
    generator = torch.Generator().manual_seed(seed)
    worst: dict[str, OutputReceipt] = {}
    for index, sizes in enumerate(cases):
        inputs = list(sample(sizes, generator)) if sample else draw_inputs(captured, sizes, generator)
        wanted = _called(partial(captured.reference, *inputs), "the model", sizes)
        got = _called(partial(run, [x.contiguous() for x in inputs]), "the plan", sizes)
        for spec, w, g in zip(captured.outputs, wanted, got, strict=True):
            _must_match(spec, w, g, sizes)
            worst[spec.name] = _worse(worst.get(spec.name), compare(spec.name, g.detach(), w.detach()))
        progress((index + 1) / len(cases))
    outputs = [worst[spec.name] for spec in captured.outputs]
    receipt = Receipt(cases=cases, outputs=outputs, tolerance=tolerance, verified=verified, proof=proof)
    check_receipt(receipt)
    return receipt


def _called(call: Callable[[], Sequence[torch.Tensor]], what: str, sizes: Mapping[str, int]) -> Sequence[torch.Tensor]:
    try:
        with torch.no_grad():
            return call()
    except MODEL_ERRORS as error:
        at = "at " + ", ".join(f"{name} = {size}" for name, size in sizes.items()) if sizes else "on random inputs"
        way_out = "narrow the range of sizes, or " * bool(sizes) + "give inputs that it takes (sample=)"
        raise PlanError(f"{what} does not run {at}: {type(error).__name__}: {first_line(error)}: {way_out}") from error


def plan_cases(dynamic: Mapping[str, DimRange]) -> list[dict[str, int]]:
    """Sizes to verify at: smallest, an odd one between, optimal, largest; three draws where nothing is dynamic."""
    if not dynamic:
        return [{}, {}, {}]
    rows = (
        {name: d.minimum for name, d in dynamic.items()},
        {name: min(d.maximum, max(d.minimum, d.optimum // 2 | 1)) for name, d in dynamic.items()},
        {name: d.optimum for name, d in dynamic.items()},
        {name: d.maximum for name, d in dynamic.items()},
    )
    cases: list[dict[str, int]] = []
    for row in rows:
        if row not in cases:
            cases.append(row)
    return cases


def draw_inputs(captured: Captured, sizes: Mapping[str, int], generator: torch.Generator) -> list[torch.Tensor]:
    """Random inputs of the sizes given, with the statistics of the examples."""
    return [
        _draw(resized(x, {i: sizes[d] for i, d in enumerate(spec.shape) if isinstance(d, str)}), generator)
        for spec, x in zip(captured.inputs, captured.examples, strict=True)
    ]


def _draw(example: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    shape = example.shape
    if example.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not example.is_floating_point():
        low, high = (int(example.min()), int(example.max())) if example.numel() else (0, 0)
        return torch.randint(low, high + 1, shape, generator=generator).to(example.dtype)
    deviation, mean = torch.std_mean(example.double(), correction=0) if example.numel() else (torch.tensor(0.0),) * 2
    if not (deviation > 0 and deviation.isfinite()):
        deviation, mean = torch.tensor(1.0), torch.tensor(0.0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * deviation + mean).to(example.dtype)


def _must_match(spec: TensorSpec, wanted: torch.Tensor, got: torch.Tensor, sizes: Mapping[str, int]) -> None:
    if (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
        raise PlanError(
            f"output {spec.name}: the plan gives {got.dtype} {tuple(got.shape)} where the model gives {wanted.dtype} "
            f"{tuple(wanted.shape)}, at {dict(sizes)}: the model behaves differently at this size; narrow its range"
        )


def compare(name: str, got: torch.Tensor, wanted: torch.Tensor) -> OutputReceipt:
    """Parity of one output, both of one shape, in float64; every number is NaN where one side has NaN.

    An infinity counts as equal where both sides have the same one.
    """
    if not wanted.is_floating_point() and not wanted.is_complex():
        unequal = float((got != wanted).double().mean()) if wanted.numel() else 0.0
        gap = float((got.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
        return OutputReceipt(name=name, max_abs=gap, max_rel=0.0, cosine=1.0, mismatched=unequal)
    if wanted.is_complex():
        got, wanted = torch.view_as_real(got), torch.view_as_real(wanted)
    g, w = got.double().flatten(), wanted.double().flatten()
    infinite = w.isinf() & (g == w)
    g, w = g[~infinite], w[~infinite]
    if not w.numel():
        return OutputReceipt(name=name, max_abs=0.0, max_rel=0.0, cosine=1.0, mismatched=0.0)
    if not (g.isfinite().all() and w.isfinite().all()):
        return OutputReceipt(name=name, max_abs=math.nan, max_rel=math.nan, cosine=math.nan, mismatched=0.0)
    max_abs, scale = float((g - w).abs().max()), float(w.abs().max())
    norms = float(g.norm() * w.norm())
    cosine = 1.0 if max_abs == 0 else float(g @ w) / norms if norms else 0.0
    max_rel = max_abs / scale if scale else (math.inf if max_abs else 0.0)
    return OutputReceipt(name=name, max_abs=max_abs, max_rel=max_rel, cosine=min(cosine, 1.0), mismatched=0.0)


def _worse(a: OutputReceipt | None, b: OutputReceipt) -> OutputReceipt:
    if a is None:
        return b

    def pick(choose: Callable[[float, float], float], x: float, y: float) -> float:
        return math.nan if math.isnan(x) or math.isnan(y) else choose(x, y)

    return OutputReceipt(
        name=a.name,
        max_abs=pick(max, a.max_abs, b.max_abs),
        max_rel=pick(max, a.max_rel, b.max_rel),
        cosine=pick(min, a.cosine, b.cosine),
        mismatched=pick(max, a.mismatched, b.mismatched),
    )


def check_receipt(receipt: Receipt) -> None:
    """Refuse a receipt that is out of tolerance.

    Raises:
        PlanError: names the output, the number and the tolerance.
    """
    limit = receipt.tolerance
    way_out = "loosen the tolerance only if the model's task allows it, or build with another precision"
    for output in receipt.outputs:
        if math.isnan(output.cosine + output.max_rel):
            raise PlanError(
                f"output {output.name}: NaN, or an infinity on one side only, where plan and model are compared: give "
                "example inputs that the model gives finite outputs for (or sample=)"
            )
        for number, value, bound, passes in (
            (
                "largest error relative to the output's scale",
                output.max_rel,
                limit.max_rel,
                output.max_rel <= limit.max_rel,
            ),
            ("cosine with the model's", output.cosine, limit.cosine, output.cosine >= limit.cosine),
            (
                "fraction of unequal elements",
                output.mismatched,
                limit.mismatched,
                output.mismatched <= limit.mismatched,
            ),
        ):
            if not passes:
                raise PlanError(
                    f"output {output.name} is out of tolerance: {number} is {value:.3g}, "
                    f"allowed is {bound:.7g}; {way_out}"
                )
