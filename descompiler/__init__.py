"""descompiler: compile an ordinary PyTorch recommender model into an equivalent distributed module."""

from descompiler.audit import Audit, audit
from descompiler.calibrate import calibrate
from descompiler.captured import plan
from descompiler.cluster import Cluster
from descompiler.compiler import compile
from descompiler.errors import (
    CaptureError,
    DescompilerError,
    EquivalenceError,
    InputError,
    PlanError,
    RankError,
    UnsupportedError,
)
from descompiler.inputs import register_input
from descompiler.module import DistributedModule, module_of
from descompiler.plan import Plan
from descompiler.state import full_state_dict, load_full_state_dict
from descompiler.traffic import Traffic
from descompiler.verify import Report, verify

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "CaptureError",
    "Cluster",
    "DescompilerError",
    "DistributedModule",
    "EquivalenceError",
    "InputError",
    "Plan",
    "PlanError",
    "RankError",
    "Report",
    "Traffic",
    "UnsupportedError",
    "audit",
    "calibrate",
    "compile",
    "full_state_dict",
    "load_full_state_dict",
    "module_of",
    "plan",
    "register_input",
    "verify",
]
