"""Making the model itself smaller: pruning and low rank. An extra, which nothing of the rest imports."""

from llamanb.quiet import quiet_libraries

with quiet_libraries():  # bitsandbytes speaks as soon as it is imported
    from llamanb.shrink.accounting import GRID, measure
    from llamanb.shrink.factored import absorb, load_factored, write_products
    from llamanb.shrink.low_rank import write_factored
    from llamanb.shrink.prune import write_pruned
    from llamanb.shrink.speed import try_two_of_four
    from llamanb.shrink.start import write_start
    from llamanb.shrink.starter import starter, write_chats

__all__ = [
    "GRID",
    "absorb",
    "load_factored",
    "measure",
    "starter",
    "try_two_of_four",
    "write_chats",
    "write_factored",
    "write_products",
    "write_pruned",
    "write_start",
]
