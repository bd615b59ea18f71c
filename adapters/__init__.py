"""Adapts any Hugging Face model by training a few extra tensors, and ships those tensors alone.

    import adapters

    model, tokenizer = adapters.load_base("smollm2-135m-instruct")
    adapters.attach(model, "lora", name="fr", rank=16)

Every public name is imported on first use; `import adapters` loads torch and nothing heavier.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

import torch as _torch  # noqa: F401 - the one heavy import that every use needs

if TYPE_CHECKING:
    from adapters import methods
    from adapters._algebra import (
        CombineReport,
        DiffReport,
        ExtractReport,
        ResizeReport,
        SiteDiff,
        combine,
        diff,
        extract,
        resize,
        subtract,
    )
    from adapters._attach import (
        Adapter,
        AttachReport,
        SelectionReport,
        activate,
        adapters_of,
        attach,
        compose,
        detach,
        using,
    )
    from adapters._bridge import adopt, peft_config
    from adapters._change import Factors, Scaled, Weight
    from adapters._contract import (
        KeyValueMethod,
        KeyValueSite,
        LayerSite,
        Method,
        Rows,
        StreamMethod,
        StreamSite,
        WeightMethod,
        WeightSite,
    )
    from adapters._errors import AdapterError, DamagedAdapter, WrongBase
    from adapters._gguf import GgufReport, ModelReport, export_gguf, export_model
    from adapters._hub import load_base
    from adapters._merge import Certificate, merge, merge_files
    from adapters._mlx import MlxReport, export_mlx
    from adapters._plan import Plan, Proposal, plan
    from adapters._pool import Pool, PoolStatus
    from adapters._publish import PublishReport, publish
    from adapters._quantize import QuantizeReport, quantize
    from adapters._selection import Average, Parallel, Split, Stack
    from adapters._sites import SiteMap, explain, sites
    from adapters._store import (
        AdapterInfo,
        Bundle,
        CheckReport,
        Finding,
        LoadReport,
        SaveReport,
        check_for,
        export_peft,
        inspect,
        load,
        read,
        restore,
        save,
        swap,
    )
    from adapters._tokens import TokensReport, add_tokens

_WHERE = {
    "_algebra": "CombineReport DiffReport ExtractReport ResizeReport SiteDiff combine diff extract resize subtract",
    "_attach": "Adapter AttachReport SelectionReport activate adapters_of attach compose detach using",
    "_bridge": "adopt peft_config",
    "_change": "Factors Scaled Weight",
    "_contract": "KeyValueMethod KeyValueSite LayerSite Method Rows StreamMethod StreamSite WeightMethod WeightSite",
    "_errors": "AdapterError DamagedAdapter WrongBase",
    "_gguf": "GgufReport ModelReport export_gguf export_model",
    "_hub": "load_base",
    "_merge": "Certificate merge merge_files",
    "_mlx": "MlxReport export_mlx",
    "_plan": "Plan Proposal plan",
    "_pool": "Pool PoolStatus",
    "_publish": "PublishReport publish",
    "_quantize": "QuantizeReport quantize",
    "_selection": "Average Parallel Split Stack",
    "_sites": "SiteMap explain sites",
    "_store": "AdapterInfo Bundle CheckReport Finding LoadReport SaveReport "
    "check_for export_peft inspect load read restore save swap",
    "_tokens": "TokensReport add_tokens",
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names.split()}

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterInfo",
    "AttachReport",
    "Average",
    "Bundle",
    "Certificate",
    "CheckReport",
    "CombineReport",
    "DamagedAdapter",
    "DiffReport",
    "ExtractReport",
    "Factors",
    "Finding",
    "GgufReport",
    "KeyValueMethod",
    "KeyValueSite",
    "LayerSite",
    "LoadReport",
    "Method",
    "MlxReport",
    "ModelReport",
    "Parallel",
    "Plan",
    "Pool",
    "PoolStatus",
    "Proposal",
    "PublishReport",
    "QuantizeReport",
    "ResizeReport",
    "Rows",
    "SaveReport",
    "Scaled",
    "SelectionReport",
    "SiteDiff",
    "SiteMap",
    "Split",
    "Stack",
    "StreamMethod",
    "StreamSite",
    "TokensReport",
    "Weight",
    "WeightMethod",
    "WeightSite",
    "WrongBase",
    "activate",
    "add_tokens",
    "adopt",
    "adapters_of",
    "attach",
    "check_for",
    "combine",
    "compose",
    "detach",
    "diff",
    "explain",
    "export_gguf",
    "export_mlx",
    "export_model",
    "export_peft",
    "extract",
    "inspect",
    "load",
    "load_base",
    "merge",
    "merge_files",
    "methods",
    "peft_config",
    "plan",
    "publish",
    "quantize",
    "read",
    "resize",
    "restore",
    "save",
    "sites",
    "subtract",
    "swap",
    "using",
]


def _refuse_the_other_distribution() -> None:
    """Two distributions own the import name `adapters`; installed together, each overwrites files of the other."""
    try:
        other = importlib.metadata.version("adapters")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"AdapterHub's distribution `adapters` {other} is installed beside `adapter-registry`, and both are imported "
        "as `adapters`: pip uninstall adapters adapter-registry, then install the one that you want."
    )


_refuse_the_other_distribution()


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("adapters.methods")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'adapters' has no attribute {name!r}")
    importlib.import_module("adapters._store")  # an attached model can save itself, whichever verb was used first
    importlib.import_module("adapters._bridge")  # is a PeftModel from the moment that peft is imported
    importlib.import_module("adapters._trainers")  # and is saved and resumed by trainers that know nothing of it
    value = getattr(importlib.import_module(f"adapters.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
