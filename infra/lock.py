"""Resolve the locks from pyproject.toml, for every Python: the core, what development adds, what a cluster adds.

uv resolves for 3.11 to 3.13 at once and writes no path or index. Two things are taken out afterwards: the local part of
a CPU build's version (`+cpu`), which the public index lacks, and the CUDA packages, which torch's own metadata pins
exactly: a CPU build then installs none of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Written by `make lock` from pyproject.toml; exact versions for Python 3.11 to 3.13.\n"
CUDA = re.compile(r"^(nvidia-|triton|cuda-)")


def resolve(extras: list[str], within: list[str]) -> list[str]:
    """Pinned lines of the core and `extras`, agreeing with the pins `within`."""
    command = ["uv", "pip", "compile", "--universal", "--python-version", "3.11", "pyproject.toml", "--no-header"]
    command += ["--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
    command += [word for extra in extras for word in ("--extra", extra)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(within))
        constraints.flush()
        out = _uv([*command, "--constraint", constraints.name])
    lines = [re.sub(r"^(torch==[\d.]+)\+\w+", r"\1", line) for line in out.splitlines()]
    return [line for line in lines if line.strip() and not CUDA.match(line)]


def _uv(command: list[str]) -> str:
    return subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def cluster(locked: list[str]) -> None:
    """Write what the image of a Ray cluster adds to the `locked` lines of the other two."""
    more = [line for line in resolve(["analysis", "cluster"], locked) if line not in locked]
    # The pin of ray itself stands in the core.
    more = [line for line in more if not line.startswith("ray==")]
    (ROOT / "infra" / "requirements-cluster.lock").write_text(HEAD + "\n".join(more) + "\n")
    print(f"infra/requirements-cluster.lock: {len(more)} more for the image of a Ray cluster")


def main() -> None:
    """Write all locks."""
    everything = resolve(["analysis", "dev"], [])
    core = resolve(["analysis"], everything)
    (ROOT / "requirements.lock").write_text(HEAD + "\n".join(core) + "\n")
    extra = [line for line in everything if line not in core]
    (ROOT / "requirements-dev.lock").write_text(HEAD + "\n".join(extra) + "\n")
    print(f"requirements.lock: {len(core)} packages; requirements-dev.lock: {len(extra)} more")
    cluster(everything)


if __name__ == "__main__":
    main()
