"""Two kinds of process: with TRITON_INTERPRET=1 the kernels run on CPU tensors, with 0 they can be compiled.

Triton decides when a kernel is defined, so a process is one or the other. Without a GPU the tests are interpreted, and
`test_interpreted_spawns_compiled.py` starts a process that is not.
"""

import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skips = {
        "test_interpreted": (not INTERPRETED, "runs in Triton's interpreter: set TRITON_INTERPRET=1"),
        "test_compiled": (INTERPRETED, "needs kernels that can be compiled: run in a process of its own"),
    }
    for item in items:
        if HERE not in item.path.parents:
            continue
        for prefix, (skip, reason) in skips.items():
            if item.path.name.startswith(prefix) and skip:
                item.add_marker(pytest.mark.skip(reason=reason))
        if INTERPRETED:
            # NumPy, which interprets, warns where a masked lane holds -inf - -inf; a GPU does not.
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"))
