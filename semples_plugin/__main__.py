"""`python -m semples_plugin` is `semples`."""

import sys

from .cli import main

sys.exit(main())
