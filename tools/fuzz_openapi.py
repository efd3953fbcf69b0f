"""Fuzzing of the public API with schemathesis, through the gateway, with the demo model: `make test-openapi`.

Every response must have a declared status, content type and schema, and none may be a 500.
usage: python tools/fuzz_openapi.py SCHEMATHESIS [EXAMPLES]      EXAMPLES per operation, default 40
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME / "tests")]
KEY = "sk-key-of-this-run-only"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main(program: str, examples: str = "40") -> int:
    """Record the document, start the appliance and fuzz it. Returns schemathesis' exit code."""
    from shoehorn.runtime.state import Phase
    from support.running import Appliance

    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "openapi.json"
        subprocess.run([sys.executable, str(HOME / "tools" / "record_openapi.py"), str(document)], check=True)
        appliance = Appliance(Path(folder), API_KEY=KEY, ENGINE_LOG="file")
        try:
            appliance.wait_for(Phase.READY)
            return subprocess.run([
                program, "run", str(document), "--url", appliance.url, "-H", f"Authorization: Bearer {KEY}",
                "--phases", "examples,fuzzing", "--max-examples", examples, "--checks", CHECKS,
                "--generation-database", "none", "--seed", "1", "--request-timeout", "60", "--no-color",
                "--suppress-health-check", "all"], check=False).returncode
        finally:
            appliance.discard()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
