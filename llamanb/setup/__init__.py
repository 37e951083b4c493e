"""From a fresh machine to the first cell; the standard library only, since nothing is installed yet.

`torch_build` picks the PyTorch build, `environment` does colab_setup.sh's work, `loaded` asks for a restart where a
running kernel holds what was replaced.
"""

from llamanb.setup.loaded import SETUP_CELL, check_loaded

__all__ = ["SETUP_CELL", "check_loaded"]
