"""What is in the packages that users install."""

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METAL = {p.name for p in (ROOT / "metal").iterdir()}


def build(kind: str, source: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (made,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheel of the checkout, and the wheel of its source distribution."""
    import tarfile

    folder = tmp_path_factory.mktemp("build")
    direct = build("wheel", ROOT, folder / "direct")
    with tarfile.open(build("sdist", ROOT, folder / "sdist")) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return {"checkout": direct, "sdist": build("wheel", unpacked, folder / "indirect")}


@pytest.mark.parametrize("origin", ["checkout", "sdist"])
def test_wheel_carries_metal_sources_types_and_the_small_model(wheels, origin):
    names = set(zipfile.ZipFile(wheels[origin]).namelist())
    assert {f"zm_mlx/metal/{name}" for name in METAL} <= names
    model = {f"zm_mlx/small_model/{name}" for name in ("model.safetensors", "tokenizer.json", "handbook.txt")}
    assert {"zm_mlx/py.typed"} | model <= names
    assert not any(name.startswith(("tests/", "scripts/")) for name in names)


def test_wheel_runs_away_from_the_checkout(wheels, tmp_path):
    zipfile.ZipFile(wheels["sdist"]).extractall(tmp_path / "site")
    code = (
        "import zm_mlx, mlx_lm; from zm_mlx.generate import main; raise SystemExit(main(['-p', 'import', '-m', '2']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "2 tokens" in done.stdout


def test_editable_install_finds_the_metal_folder_of_the_checkout():
    spec = find_spec("zm_mlx")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    assert (package / "metal").is_dir() or {p.name for p in (package.parent / "metal").iterdir()} == METAL


def test_continuous_integration_runs_the_test_command_of_the_readme():
    (command,) = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "pytest" in line]
    assert command in (ROOT / "README.md").read_text()
