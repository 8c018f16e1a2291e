"""`python -m keras_dp`, the same as the command `keras-dp`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
