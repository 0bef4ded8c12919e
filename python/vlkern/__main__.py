"""`python -m vlkern`."""

import sys

from vlkern.cli import main

sys.exit(main())
