"""Protections of earlier tasks, besides replay: one class per file, behind one interface.

`PROTECTIONS` lists them by the names that `ProtectionConfig.kind` uses; a new one is a file here and a line there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cpd.config import Config
from cpd.distill.protection.agem import AGEM
from cpd.distill.protection.base import Protection
from cpd.distill.protection.bc import BehaviouralCloning
from cpd.distill.protection.derpp import DERPP
from cpd.distill.protection.ewc import EWC
from cpd.distill.protection.hat import HAT
from cpd.distill.protection.l2 import L2
from cpd.distill.protection.lora import LoRA
from cpd.distill.protection.lwf import LwF
from cpd.distill.protection.mas import MAS
from cpd.distill.protection.masking import Masking
from cpd.distill.protection.packnet import PackNet

PROTECTIONS: Final[Mapping[str, type[Protection]]] = {
    "none": Protection,
    "mask": Masking,
    "ewc": EWC,
    "mas": MAS,
    "l2": L2,
    "agem": AGEM,
    "derpp": DERPP,
    "bc": BehaviouralCloning,
    "lwf": LwF,
    "packnet": PackNet,
    "lora": LoRA,
    "hat": HAT,
}


def make_protection(config: Config) -> Protection:
    """The protection that `config.protection.kind` names; `none` unless the protocol is continual."""
    kind = config.protection.kind if config.distill.protocol == "continual" else "none"
    return PROTECTIONS[kind](config)
