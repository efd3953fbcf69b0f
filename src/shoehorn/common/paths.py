"""Paths of Shoehorn's data files below the root of the checkout, or /opt/shoehorn in the image."""

from __future__ import annotations

from pathlib import Path

HOME = Path(__file__).resolve().parents[3]
PROFILES = HOME / "profiles"
GATEWAY = HOME / "gateway"
