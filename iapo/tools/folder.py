"""A folder that is written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iapo.arguments import obstacle


def check_out(out: Path) -> None:
    """Refuse an `--out` for `whole_folder`, before there is anything to write.

    Raises:
        ValueError: it exists, or can't be made.
    """
    if out.exists():
        raise ValueError(f"--out: {out} exists; choose another, or remove it.")
    if reason := obstacle(out.parent):
        raise ValueError(f"--out: {out} {reason}; choose another.")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill. It becomes `out` when the block ends, and is removed if the block raises.

    Raises:
        OSError: `out` exists and isn't empty, or can't be written to.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield partial
        for path in partial.rglob("*"):  # readable by others, as mkdtemp's and the weights aren't
            path.chmod(0o755 if path.is_dir() else 0o644)
        partial.chmod(0o755)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
