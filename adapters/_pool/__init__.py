"""Many adapters on one model, within a budget of memory."""

from adapters._pool.pool import Pool
from adapters._pool.status import PoolStatus

__all__ = ["Pool", "PoolStatus"]
