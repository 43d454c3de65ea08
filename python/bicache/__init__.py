"""bicache: runs diffusion language models on CPUs and does not recompute what has not changed.

import bicache

llm = bicache.LLM("records", cache="auto")
document = "red fox, blue owl, green bear, red hare, black crow, white swan, gold deer, pink toad"
outs = llm.generate("which are red or blue ?", prefix=document)
print(outs[0].text)
"""

import logging as _logging

from ._openmp import short_spins as _short_spins

with _short_spins():
    from ._core import Config, __version__
from .chat import ChatTemplate
from .checkpoint import shipped_models
from .depth_rules import DepthPolicy, RequestInfo
from .inputs import MASK_TEXT
from .llm import LLM
from .planning import CostPlan, PolicyCost, plan
from .policies import BiCache, DLLMCache, FastDLLM, Naive, NoCache, Policy
from .prefixes import Discover
from .profiling import DepthTable, profile, read_pairs
from .results import Output, RequestStats, StepEvent
from .tokenizer import Tokenizer

__all__ = [
    "LLM",
    "MASK_TEXT",
    "BiCache",
    "ChatTemplate",
    "Config",
    "CostPlan",
    "DLLMCache",
    "DepthPolicy",
    "DepthTable",
    "Discover",
    "FastDLLM",
    "Naive",
    "NoCache",
    "Output",
    "Policy",
    "PolicyCost",
    "RequestInfo",
    "RequestStats",
    "StepEvent",
    "Tokenizer",
    "__version__",
    "plan",
    "profile",
    "read_pairs",
    "shipped_models",
]

_logging.getLogger("bicache").addHandler(_logging.NullHandler())
