"""What makes a rehearsal on a processor one of seconds."""

from __future__ import annotations

from bench import harness
from bench.gpu.plan import Settings


def measure_less(settings: Settings) -> None:
    """The processor's rates from products of milliseconds: nobody will read them."""
    if settings.rehearsal:
        harness.PRODUCT_ROWS["cpu"], harness.COPY_BYTES["cpu"] = 128, 1 << 20
