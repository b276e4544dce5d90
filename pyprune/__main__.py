"""`python -m pyprune`: the command line."""

import sys

from pyprune.cli import main

sys.exit(main())
