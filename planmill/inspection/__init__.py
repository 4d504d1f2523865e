"""Anomalies in a folder of pictures without training: `planmill inspect`, as functions.

One module per step: `pictures` reads, `backbones` finds the network, `plans` builds or reuses its plan, `features` runs
it, `scoring` scores (MuSc), `rendering` draws, `outputs` and `report` write; `pipeline` calls them in this order.
"""

from planmill.inspection.pipeline import inspect_pictures
from planmill.inspection.results import Inspection, PlanUse, ScoredPicture, Settings, SkippedPicture

__all__ = ["Inspection", "PlanUse", "ScoredPicture", "Settings", "SkippedPicture", "inspect_pictures"]
