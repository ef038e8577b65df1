"""Files → evidence: does a folder compute what the hooked reference computes, and what did the
unlearning do?

`verify.verify(folder, recipe)`, `verify.VerifyReport`, `verify.read_report(file)`,
`verify.Options`, `verify.KINDS`, `verify.ATTACKS`.
"""

from bake.public import public

_HOMES = {
    "verify": "bakeout.api",
    "VerifyReport": "verify.report.findings",
    "read_report": "verify.report.reading",
    "Options": "verify.options",
    "KINDS": "verify.evidence.kinds",
    "ATTACKS": "verify.attacks.attacks",
}
__all__, __dir__, __getattr__ = public(__name__, _HOMES)
