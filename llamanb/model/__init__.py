"""The model: loaded as the plan says, adapters attached, saved and loaded again."""

from llamanb.quiet import quiet_libraries

with quiet_libraries():  # bitsandbytes speaks as soon as it is imported
    from llamanb.model.load import attach_adapters, load_model, weights_dtype
    from llamanb.model.save import load_adapter, save_model, write_model_card

__all__ = ["attach_adapters", "load_adapter", "load_model", "save_model", "weights_dtype", "write_model_card"]
