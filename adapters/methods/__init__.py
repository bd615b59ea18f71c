"""Methods, one file a paper. `add` registers a method, `names` lists them, `get` finds one by name.

A third party's package names its method under the entry-point group `adapters.methods`, and needs nothing else.
"""

from adapters._registry import add, get, names, source

__all__ = ["add", "get", "names", "source"]
