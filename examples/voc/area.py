"""The runner with the area term alone in the place of the refiner's loss, CLIP never called; the arguments are the runner's.

    python -m examples.voc.area mctformer --repo MCTformer --stage match --set lambda_area=1 -- main.py ...

A control of the chain. Flow: `commands` -> **area** -> the runner.
"""

from __future__ import annotations

import sys
from typing import Optional, Sequence
from unittest import mock

from examples.controls import AreaOnly
from semples_plugin.adapters import __main__ as runner


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line of the runner. Returns its exit status."""
    with mock.patch.object(runner, "PromptRefiner", AreaOnly):
        return runner.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
