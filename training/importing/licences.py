"""What is known of the terms of published weights; nothing is guessed.

Read on 2026-11-28: DINO, the authors' answer in https://github.com/facebookresearch/dino/issues/108; DINOv2,
https://github.com/facebookresearch/dinov2/pull/182 (relicensed from CC-BY-NC); DINOv3, the licence in its
repository.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_OF_META = {
    "DINO": "Apache-2.0 (https://github.com/facebookresearch/dino/issues/108)",
    "DINOv2": "Apache-2.0 (https://github.com/facebookresearch/dinov2/pull/182)",
    "DINOv3": "the DINOv3 License (https://github.com/facebookresearch/dinov3/blob/main/LICENSE.md), not "
    "Apache-2.0",
}
UNKNOWN = "unknown: see where the weights come from"


def licence_of_file(family: str) -> str:
    """Of a file that may be Meta's or anybody's."""
    if family not in _OF_META:
        return UNKNOWN
    return f"the file does not say; if these are the {family} weights that Meta published: {_OF_META[family]}"


def licence_of_timm(configuration: Mapping[str, Any]) -> str:
    """What timm notes of its weights."""
    return f"{configuration['license']}, as timm notes it" if configuration.get("license") else UNKNOWN


def licence_of_directory(directory: Path) -> str:
    """What the card beside the weights says, at its head."""
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = dict(re.findall(r"^(license(?:_name|_link)?): *(\S+) *$", head[1] if head else "", re.MULTILINE))
    if not found:
        return UNKNOWN
    name = found.get("license_name") or found.get("license", "other")
    return f"{name}{' ' + found['license_link'] if 'license_link' in found else ''}, as its README.md says"


TORCHVISION_TERMS = (
    "torchvision names none for its weights, and says that the terms of the images that they were trained "
    "on, ImageNet, may apply"
)
