"""What a worker imports before it knows what it is to do."""

import sys

import patience


def test_it_imports_neither_the_compiler_nor_deepspeed() -> None:
    """Both take more than a second, which evaluations and refused runs would spend for nothing."""
    listing = (
        "import sys, launcher.start.worker; "
        "print([name for name in ('torch', 'torch._dynamo', 'deepspeed') if name in sys.modules])"
    )
    told = patience.run([sys.executable, "-c", listing], capture_output=True, text=True, limit=60, check=True)
    assert told.stdout.split() == ["['torch']"]
