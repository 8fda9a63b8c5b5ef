"""The package is light to import, whole when installed, and shadows nobody."""

import subprocess
import sys
from pathlib import Path

import sparsekit

REPOSITORY = Path(__file__).parent.parent


def run(code: str) -> str:
    path = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_no_heavy_package_and_touches_no_device():
    heavy = "('transformers', 'triton', 'peft', 'datasets', 'rich', 'typer', 'matplotlib')"
    out = run(f"import sparsekit, torch; print([m for m in {heavy} if m in sys.modules], torch.cuda.is_initialized())")
    assert out == "[] False"


def test_kernels_import_nothing_of_sparsekit():
    names = ", ".join(path.stem for path in (REPOSITORY / "kernels/sparsekit_kernels").glob("[a-z]*.py")) + ", cpu"
    out = run(
        f"from sparsekit_kernels import {names}; print([m for m in sys.modules if m.split('.')[0] == 'sparsekit'])"
    )
    assert out == "[]"


def test_kernels_folder_does_not_shadow_the_kernels_package():
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_wheel_holds_code_types_and_sources():
    from setuptools import find_packages

    packages = find_packages(str(REPOSITORY), include=["sparsekit", "sparsekit.*"])
    packages += find_packages(str(REPOSITORY / "kernels"))
    with_code = {
        str(path.parent.relative_to(root)).replace("/", ".")
        for root, folder in ((REPOSITORY, "sparsekit"), (REPOSITORY / "kernels", "sparsekit_kernels"))
        for path in (root / folder).rglob("*.py")
    }
    assert with_code == set(packages), "a folder without __init__.py would be missing from the wheel"
    for folder in ("sparsekit", "kernels/sparsekit_kernels"):
        assert (REPOSITORY / folder / "py.typed").is_file()
    assert list((REPOSITORY / "kernels/sparsekit_kernels/cpu/csrc").glob("*.cpp"))


def test_every_public_name_exists_and_is_documented():
    for name in sparsekit.__all__:
        part = getattr(sparsekit, name)
        assert name in ("METHODS", "__version__") or (part.__doc__ or "").strip(), f"{name} has no docstring"
