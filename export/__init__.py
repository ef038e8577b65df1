"""Clamp weights → files that anyone can load.

`export.to_onnx(folder)`, `export.to_compiled(folder, out)`, `export.to_adapter(folder, out)`,
`export.to_gguf(folder, out)`, `export.Manifest`, `export.CARRIERS`, `export.PRECISIONS`.
"""

from bake.public import public

_HOMES = {
    "to_onnx": "bakeout.api",
    "to_compiled": "bakeout.api",
    "to_adapter": "bakeout.api",
    "to_gguf": "bakeout.api",
    "Manifest": "export.manifest",
    "CARRIERS": "export.carriers.carriers",
    "PRECISIONS": "export.carriers.onnx.precisions",
}
__all__, __dir__, __getattr__ = public(__name__, _HOMES)
