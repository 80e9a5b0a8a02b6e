"""The Dockerfile against the tree, and the commands of infra/README.md against the programs; no daemon is asked."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from training.config import read_config

ROOT = Path(__file__).resolve().parents[2]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "infra" / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    known = {"FROM", "RUN", "ENV", "WORKDIR", "ARG", "COPY", "CMD"}
    found = [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]
    assert {name for name, _ in found} <= known and found[0][0] == "FROM"
    return found


def test_the_image_is_built_from_the_locks_on_a_python_we_support() -> None:
    found = instructions()
    version = re.match(r"python:3\.(\d+)-slim", found[0][1])
    assert version and 11 <= int(version[1]) <= 13
    installs = [words for name, words in found if name == "RUN" and "pip install" in words]
    assert len(installs) == 2 and "--no-deps" in installs[1]
    locks = re.findall(r"-r (\S+)", installs[0])
    assert locks == ["requirements.lock", "requirements-cluster.lock"]
    pins = [*(ROOT / "requirements.lock").read_text().splitlines(), *cluster_lock()]
    pins = [pin.split(";")[0].strip() for pin in pins if pin and not pin.startswith("#")]
    assert all(re.fullmatch(r"[\w.\[\],-]+==\S+", pin) for pin in pins)
    names = [pin.split("==")[0] for pin in pins]
    assert {"ray", "torch", "aiohttp-cors", "opencensus"} <= set(names)


def test_what_is_declared_is_pinned_within_its_range_and_what_is_imported_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [Requirement(line) for line in declared]
    pins = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line]
    for one in wanted:
        found = [p for p in pins if canonicalize_name(p.name) == canonicalize_name(one.name)]
        assert found and all(one.specifier.contains(next(iter(p.specifier)).version) for p in found), one
    owners = packages_distributions()
    names = {canonicalize_name(one.name) for one in wanted}
    names |= {"essentia", "demucs", "prodigyopt", "dadaptation", "encodec", "triton"}  # extras, and what torch brings
    for folder in ("musicgen", "pipelines", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                for module in {m.split(".")[0] for m in modules} - sys.stdlib_module_names - {folder}:
                    known = {canonicalize_name(o) for o in owners.get(module, [module])} | {canonicalize_name(module)}
                    assert known & names or module in ("musicgen", "pipelines"), f"{path} imports {module}"


def cluster_lock() -> list[str]:
    return (ROOT / "infra" / "requirements-cluster.lock").read_text().splitlines()


def test_what_the_image_copies_is_here_and_reaches_the_builder() -> None:
    ignored = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    sources = [source for name, words in instructions() if name == "COPY" for source in words.split()[:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    assert {f"!{source}" for source in sources} == {line for line in ignored if line.startswith("!")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages <= set(sources)


def test_the_readme_shows_each_in_under_ten_lines_with_commands_that_exist() -> None:
    sections = re.split(r"^## ", (ROOT / "infra" / "README.md").read_text(), flags=re.MULTILINE)[1:]
    commands: list[str] = []
    for section in sections:
        shown = [line[4:] for line in section.splitlines() if line.startswith("    ")]
        assert len(shown) < 10, section
        commands += "\n".join(shown).replace("\\\n", " ").splitlines()
    asked = []
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            done = subprocess.run(
                ["make", "--no-print-directory", "-n", "-o", "setup", *words[1:]],
                cwd=ROOT,
                env={"PATH": os.environ["PATH"]},  # the suite may run under make, which hands on its own settings
                capture_output=True,
                text=True,
            )
            words = shlex.split(done.stdout.strip().splitlines()[-1])
        for file in re.findall(r"infra/\S+", command):
            assert (ROOT / file).is_file(), file
        if "training.train" in words or "infra/train.sbatch" in words:
            at = words.index("training.train" if "training.train" in words else "infra/train.sbatch") + 1
            asked.append(read_config([word for word in words[at:] if word != "--"]))
    assert [config.ray.address for config in asked] == ["", "", "", "auto"]
    assert [config.hardware.devices for config in asked] == [8, 1, 1, 16]
