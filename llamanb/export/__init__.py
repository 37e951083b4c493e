"""After training: an adapter merged into 16-bit weights, and those as GGUF, a tensor at a time, never the whole model;
and any of these pushed to the Hub."""

from llamanb.quiet import quiet_libraries

with quiet_libraries():  # bitsandbytes speaks as soon as it is imported
    from llamanb.export.gguf_file import to_gguf
    from llamanb.export.merging import merge
    from llamanb.export.push import push
    from llamanb.export.reload import load_merged, same_answers

__all__ = ["load_merged", "merge", "push", "same_answers", "to_gguf"]
