"""Is the folder that tables and plots go into new, or one that was written for them?"""

from pathlib import Path

_SHOWN = 5


def check_output_folder(
    out: Path, page: str, first_line: str = "", beside_runs: bool = False
) -> None:
    """Raise ValueError where `out` is no folder, or holds what is not of the page's program.

    A folder whose `page` begins with `first_line` is its own. Without a page it must be empty;
    `beside_runs` allows the folders of runs in it.
    """
    if out.is_symlink() and not out.exists():
        raise ValueError(f"--out {out} is a link to nothing: pass another --out")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is no folder: move it aside, or pass another --out")
    if (out / page).is_file():
        with (out / page).open(encoding="utf-8", errors="replace") as file:
            if file.readline().startswith(first_line):
                return
        raise ValueError(
            f"{out / page} was not written by this program: move it aside, or pass another --out"
        )
    found = sorted(
        f"{path.name}/" if path.is_dir() else path.name
        for path in out.iterdir()
        if not (beside_runs and path.is_dir() and not path.name.startswith("."))
    )
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"--out {out} has no {page}, but {', '.join(found[:_SHOWN])}{more}: pass a folder that "
            "is empty or not there yet"
        )


def claim_output_folder(out: Path, page: str, text: str) -> None:
    """Make the folder and a first `page` in it, so that it is known after a kill."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / page).is_file():
        (out / page).write_text(text, encoding="utf-8")
