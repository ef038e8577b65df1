"""Files → evidence: does a folder compute what the hooked reference computes, and what did the
unlearning do?

`verify.verify(folder, recipe)`, `verify.VerifyReport`, `verify.read_report(file)`,
`verify.Options`, `verify.KINDS`, `verify.ATTACKS`.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "verify": "bakeout.api",
    "VerifyReport": "verify.report.findings",
    "read_report": "verify.report.reading",
    "Options": "verify.options",
    "KINDS": "verify.evidence.kinds",
    "ATTACKS": "verify.attacks.attacks",
}
__all__ = list(_HOMES)


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
