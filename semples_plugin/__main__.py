"""`python -m semples_plugin` is `semples`."""

import sys

from .cli.main import main

sys.exit(main())
