"""`python -m megalite`: the same as the `megalite` command, for torchrun and deepspeed."""

import sys

from megalite.cli import main

if __name__ == "__main__":
    sys.exit(main())
