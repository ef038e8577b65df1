"""A folder's provenance as a CycloneDX bill of materials: what it was made from, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

from bake.errors import ExportError
from export.manifest import Manifest


def bom_of(folder: Path) -> str:
    """CycloneDX 1.6 JSON of what a folder's manifest says.

    The folder is a machine-learning model that depends on its base, on the SAEs that its clamps
    were cut from and on the recipe's own data; files carry their sha256; what wrote it are tools.
    Nothing in it depends on when it was made.

    Args:
        folder: what bakeout wrote; no file but its manifest is read.

    Raises:
        ExportError: cyclonedx-python-lib is not installed.
        FolderError: the manifest cannot be read.
    """
    try:
        from cyclonedx.model import HashAlgorithm, HashType, Property
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError as error:
        raise ExportError(
            "cyclonedx-python-lib is not installed; pip install 'bakeout[bom]'"
        ) from error
    manifest = Manifest.read(folder)

    def component(kind: str, name: str, sha256: str | None, **more: Any) -> Component:
        ref = f"{kind}:{name}:{sha256 or more.get('version', '')}"
        hashes = [] if sha256 is None else [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]
        return Component(type=ComponentType(kind), name=name, bom_ref=ref, hashes=hashes, **more)

    model = ComponentType.MACHINE_LEARNING_MODEL.value
    clamps = [
        Property(
            name=f"bakeout:clamp at {clamp.hook_point}",
            value=f"{clamp.method} {json.dumps(clamp.parameters)} of features {clamp.features} of "
            f"{clamp.sae.name}",
        )
        for clamp in manifest.clamps
    ]
    root = component(
        model,
        folder.resolve().name,
        manifest.sha256,
        properties=[
            Property(name="bakeout:carrier", value=manifest.carrier),
            Property(name="bakeout:exact", value=str(manifest.exact).lower()),
            Property(name="bakeout:recipe_sha256", value=manifest.recipe_sha256),
            *clamps,
        ],
    )
    base = component(model, manifest.base.model, None, version=manifest.base.revision)
    saes = {
        clamp.sae.sha256: component(model, clamp.sae.name, clamp.sae.sha256)
        for clamp in manifest.clamps
    }
    data = [component("data", name, sha256) for name, sha256 in manifest.sources.items()]
    files = [component("file", name, sha256) for name, sha256 in manifest.files.items()]
    tools = [component("library", name, None, version=of) for name, of in manifest.tools.items()]
    serial = UUID(manifest.sha256[:32], version=4)
    bom = Bom(components=[base, *saes.values(), *data, *files], serial_number=serial)
    bom.metadata.component = root
    bom.metadata.timestamp = None
    for tool in tools:
        bom.metadata.tools.components.add(tool)
    bom.register_dependency(root, [base, *saes.values(), *data])
    return f"{JsonV1Dot6(bom).output_as_string(indent=2)}\n"
