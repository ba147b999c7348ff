import json
import platform
import subprocess
import sys
from importlib.metadata import version

from kernel_pytorch.report.environment import environment


def test_versions_come_from_metadata():
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["torch"] == version("torch")
    assert found["versions"]["hydra-core"] == version("hydra-core")
    assert (found["device"], found["driver"], found["threads"]) == (None, None, None)
    assert json.loads(json.dumps(found)) == found


def test_the_reporting_side_imports_no_torch():
    modules = ["content", "environment", "figures", "html", "plain", "progress", "result", "statistics", "sweep", "terminal", "write"]
    code = f"import sys; {'; '.join(f'import kernel_pytorch.report.{name}' for name in modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
