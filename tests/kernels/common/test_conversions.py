"""The one table of conversions: every family adds to it, no class twice."""

import pytest
from torch import nn

from planmill.kernels import find_conversion
from planmill.kernels.attention import HaloAttention
from planmill.kernels.common.conversions import register_conversion
from planmill.kernels.routing import SparseMoE


def test_families_share_one_table() -> None:
    for name, build in (("MixtralSparseMoeBlock", SparseMoE.from_mixtral), ("HaloAttn", HaloAttention.from_timm)):
        published = type(name, (nn.Module,), {})()
        assert find_conversion(published) == build
    assert find_conversion(nn.Linear(2, 2)) is None


def test_a_class_has_one_constructor() -> None:
    with pytest.raises(ValueError, match="register_conversion: HaloAttn has a constructor"):
        register_conversion("HaloAttn", HaloAttention.from_timm)
