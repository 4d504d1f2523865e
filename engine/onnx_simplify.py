"""A smaller ONNX graph that computes the same: sizes that are known become constants, what does nothing goes.

What torch's exporter offers for it (`optimize=True`) also looks for every pair of slices, for every product that could
be another one, and does all of it twice: a third of the time of a build, for what TensorRT does itself.
"""

from typing import Any

from onnx_ir import passes
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

_RULES = RewriteRuleSet(
    [
        rules.cast_cast_rule,
        rules.cast_constant_of_shape_rule,
        rules.cast_constant_of_shape_without_value_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.materialize_reshape_shape_rule,
        rules.no_op_cast_rule,
        rules.no_op_dynamic_scatter_nd_rule,
        rules.no_op_expand_rule,
        rules.no_op_static_scatter_nd_rule,
        rules.no_op_transpose_rule,
        rules.reshape_reshape_rule,
        rules.transpose_transpose_rule,
        rules.unsqueeze_unsqueeze_rule,
    ]
)


def simplify(model: Any) -> None:
    """Simplify a graph in place.

    Args:
        model: an onnx_ir.Model.
    """
    common.InlinePass()(model)
    _fold(model)
    _RULES.apply_to_model(model)
    _fold(model)
    passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _fold(model: Any) -> None:
    fold_constants_ir(model, onnx_shape_inference=True)
    passes.Sequential(
        common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass()
    )(model)
