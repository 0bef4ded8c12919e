"""Commands in processes that see nothing of this checkout, where needed with the run-time libraries of sanitizers."""

import os
import shutil
import subprocess

#: The run-time libraries come with it. Without it the wheel is built for the machine's compiler, without sanitizers.
COMPILER = shutil.which("g++")
SANITIZERS = "address,undefined" if COMPILER else ""


def start(*command: object, sanitized: bool = False, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a command. `sanitized`: with the run-time libraries loaded first. `env` is added to the environment."""
    hidden = {"PYTHONPATH", "VLKERN_BACKEND", "TRITON_INTERPRET"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | options.pop("env", {})
    if sanitized and COMPILER:
        # libstdc++ goes along: ASan looks for __cxa_throw when it starts, and python itself does not link it.
        libraries = [
            subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libubsan.so", "libstdc++.so")
        ]
        environment |= {
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter and PyTorch keep memory until the process ends
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "CUDA_VISIBLE_DEVICES": "",  # the driver maps memory where ASan keeps its shadow
        }
    return subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, **options)


def run(*command: object, **options: object) -> str:
    """As start; what the command said. It must succeed, and no sanitizer complain."""
    result = start(*command, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert "runtime error" not in result.stderr and "AddressSanitizer" not in result.stderr, result.stderr
    return result.stdout
