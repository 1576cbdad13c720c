"""descompiler: compile an ordinary PyTorch recommender model into an equivalent distributed module."""

from descompiler import dynamic, optim
from descompiler.captured import plan
from descompiler.check.audit import Audit, audit
from descompiler.check.calibrate import calibrate
from descompiler.check.judge import Report
from descompiler.check.verify import verify
from descompiler.compiler import compile
from descompiler.dynamic import DynamicEmbedding, DynamicEmbeddingBag
from descompiler.errors import (
    CaptureError,
    DescompilerError,
    EquivalenceError,
    InputError,
    PlanError,
    RankError,
    TableFullError,
    UnsupportedError,
)
from descompiler.layout.traffic import Traffic
from descompiler.model.batch_size import BatchSize
from descompiler.model.inputs import register_input
from descompiler.module.advice import Advice
from descompiler.module.checkpoint import TrainingState, load, save
from descompiler.module.distributed import DistributedModule
from descompiler.module.dynamic_updates import deltas, increments
from descompiler.module.fused import FusedOptimizer, fuse_optimizer
from descompiler.module.installed import module_of
from descompiler.module.prefetch import Prefetch, prefetch
from descompiler.module.safetensors import load_safetensors, save_safetensors
from descompiler.module.single import gather_rows, to_single
from descompiler.module.state import full_state_dict, load_full_state_dict
from descompiler.ops.local import plain as local_tensor
from descompiler.parquet import ParquetColumns
from descompiler.planning.cluster import Cluster
from descompiler.planning.plan import Plan
from descompiler.version import VERSION

__version__ = VERSION

__all__ = [
    "Advice",
    "Audit",
    "BatchSize",
    "CaptureError",
    "Cluster",
    "DescompilerError",
    "DistributedModule",
    "DynamicEmbedding",
    "DynamicEmbeddingBag",
    "EquivalenceError",
    "FusedOptimizer",
    "InputError",
    "ParquetColumns",
    "Plan",
    "PlanError",
    "Prefetch",
    "RankError",
    "Report",
    "TableFullError",
    "Traffic",
    "TrainingState",
    "UnsupportedError",
    "audit",
    "calibrate",
    "compile",
    "deltas",
    "dynamic",
    "full_state_dict",
    "fuse_optimizer",
    "gather_rows",
    "increments",
    "load",
    "load_full_state_dict",
    "load_safetensors",
    "local_tensor",
    "module_of",
    "optim",
    "plan",
    "prefetch",
    "register_input",
    "save",
    "save_safetensors",
    "to_single",
    "verify",
]
