"""Threads that are to end by themselves."""

import gc


def all_end(threads):
    """Once nothing else is held."""
    gc.collect()
    assert threads
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
