"""supervisord in this very process, with an exit code that tells the truth.

supervisord exits 0 whatever happened to its programs; this returns the code that the engine or the watcher left in the
run directory, and makes sure that no engine outlives it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from supervisor import supervisord

from shoehorn.process import end_recorded_group


def main(run_dir: Path) -> int:
    """Run supervisord with `run_dir`/supervisord.conf until it is told to end; returns the container's exit code."""
    supervisord.main(["-c", str(run_dir / "supervisord.conf")])
    end_recorded_group(run_dir / "engine.group")
    try:
        return int((run_dir / "exit_code").read_text(encoding="utf-8") or 1)
    except FileNotFoundError:
        return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
