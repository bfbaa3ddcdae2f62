"""What a launch costs before there is anything to do."""

import subprocess
import sys


def test_running_a_recipe_loads_no_trainer_and_no_data_library() -> None:
    heavy = ("peft", "datasets", "pandas", "transformers.trainer", "matplotlib")
    code = (
        "import sys, pocl.cli, pocl.pipeline, pocl.difficulty.processes, pocl.outcome; pocl.cli.quiet_libraries(); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
