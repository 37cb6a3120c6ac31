"""`python -m lth_sparse` is the `lth` command."""

import sys

from .cli import main

sys.exit(main())
