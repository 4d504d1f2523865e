"""`planmill info`: what a plan says about itself."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from planmill.engine import Plan
    from planmill.engine.manifest import Gpu, TensorRT


def info(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Check a plan file and print its manifest; runs none of its code."""
    from planmill.engine import Plan

    read = Plan.read(plan)
    if as_json:
        print(read.manifest.model_dump_json(indent=2))
        return
    describe(read, Console())


def describe(plan: "Plan", console: Console) -> None:
    """Print a plan's manifest as two tables: what it is, and its receipt."""
    m = plan.manifest
    table = Table(title=escape(str(plan.path)), show_header=False, title_justify="left")
    layout = ", channels-last" if m.layout == "channels_last" else ""
    rows = [
        ("model", m.model),
        ("target", f"{m.target}{' for cuda' if m.gpu else ''}, {m.precision}{layout}"),
        *(("input", f"{spec.name}: {spec}") for spec in m.inputs),
        *(("output", f"{spec.name}: {spec}") for spec in m.outputs),
        *(("dynamic", f"{name}: {d.minimum} to {d.maximum}, tuned for {d.optimum}") for name, d in m.dynamic.items()),
        ("custom ops", ", ".join(m.ops) or "none"),
        ("rewrites", ", ".join(m.rewrites) or "none"),
        ("versions", ", ".join(f"{k} {v}" for k, v in m.versions.model_dump().items() if v)),
        ("platform", f"{m.platform.system} {m.platform.machine}: {' '.join(m.platform.isa)}"),
        *(("payload", f"{p.name}, {p.size / 2**20:.1f} MiB, sha256 {p.sha256[:16]}...") for p in m.payloads),
        ("built", f"{m.created}, in {m.build_time_s:.1f} s"),
        *(_tensorrt(m.tensorrt) if m.tensorrt else ()),
        *(_gpu(m.gpu) if m.gpu else ()),
        *((f"metadata {key}", json.dumps(value)) for key, value in m.metadata.items()),
    ]
    for key, value in rows:
        table.add_row(escape(key), escape(value))
    console.print(table)
    limit = m.receipt.tolerance
    sizes = ", ".join("/".join(map(str, case.values())) or "fixed" for case in m.receipt.cases)
    receipt = Table("output", "max abs", "max rel", "cosine", "unequal", title=f"receipt, at sizes {sizes}")
    for output in m.receipt.outputs:
        numbers = (f"{output.max_abs:.2e}", f"{output.max_rel:.2e}", f"{output.cosine:.8f}", f"{output.mismatched:.2%}")
        receipt.add_row(escape(output.name), *numbers)
    receipt.add_section()
    receipt.caption = escape(f"{m.receipt.verified}: {m.receipt.proof}" if m.receipt.proof else m.receipt.verified)
    receipt.add_row("allowed", "", f"{limit.max_rel:.2e}", f"{limit.cosine:.8f}", f"{limit.mismatched:.2%}")
    console.print(receipt)


def _tensorrt(t: "TensorRT") -> list[tuple[str, str]]:
    """Rows of what TensorRT built."""
    layers = sorted(t.layers.items(), key=lambda item: (-item[1], item[0]))
    plugins = ", ".join(f"{name} (version {version})" for name, version in t.plugins.items())
    profile = [(n, ["x".join(map(str, shape)) or "scalar" for shape in shapes]) for n, shapes in t.profile.items()]
    return [
        ("TensorRT", f"{t.version}, ONNX opset {t.opset}, built in {t.builder_seconds:.1f} s"),
        ("GPUs", ", ".join(f"SM {sm // 10}.{sm % 10}" for sm in t.sms)),
        ("plugins", f"{t.plugin_mode}: {plugins}" if plugins else f"{t.plugin_mode}: no op of ours in the plan"),
        ("layers", ", ".join(f"{count} {kind}" for kind, count in layers)),
        *(("profile", f"{n}: {low} to {high}, tuned for {opt}") for n, (low, opt, high) in profile),
    ]


def _gpu(g: "Gpu") -> list[tuple[str, str]]:
    """Rows of what AOTInductor built for a GPU."""
    kernels = ", ".join(f"{count} {kernel}" for kernel, count in g.kernels.items())
    return [
        ("GPU", f"SM {g.sm // 10}.{g.sm % 10}, built on {g.name}"),
        ("kernels", f"{g.plugin_mode}: {kernels}" if kernels else f"{g.plugin_mode}: no kernel of ours in the plan"),
    ]
