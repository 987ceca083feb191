"""`python -m prunekit` is the console script."""

import sys

from prunekit.cli import main

sys.exit(main())
