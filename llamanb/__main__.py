"""`python -m llamanb RECIPE.json`, by itself or under `accelerate launch` and torchrun."""

import sys

from llamanb.scale.lead import main

if __name__ == "__main__":
    sys.exit(main())
