"""`python -m prunekit` is the console script."""

import sys

from prunekit.cli.main import main

sys.exit(main())
