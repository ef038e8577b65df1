"""bakeout: bakes SAE-based unlearning into a model's files.

Importing it lets transformers' Auto classes load clamped checkpoints without
`trust_remote_code`, and peft load clamp adapters. Nothing heavy is imported until
these libraries are.
"""

from bakeout.registration import register_when_imported

register_when_imported()
