"""The ways in which a folder carries the clamp: every fact of a carrier that code depends on, once.

To add one: an entry here, the file beside this one that writes it, and its command in
`bakeout/verbs/exporting.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from export.carriers.onnx.precisions import PRECISIONS

Claim = Literal["exact", "exact to rounding", "an approximation"]

LICENCES = r"(?:LICENSE|NOTICE)[\w-]*(?:\.\d+)?(?:\.(?:txt|md|rst|html|pdf|[A-Z]+))?"
OF_BASE = "|".join(
    (
        r"generation_config\.json",
        r"(?:tokenizer|vocab|chat_template)[\w.-]*\.(?:json|model|txt|jinja)",
        r"merges\.txt",
        r"(?:special_tokens_map|added_tokens)\.json",
        r"additional_chat_templates/[\w.-]+\.jinja",
        r"[\w-]*processor_config\.json",
        LICENCES,
    )
)
"""What a base brings along beside its weights and config: a pattern of names."""
_ADDED = r"README\.md|witnesses\.npz|genai_config\.json"
_OF_STOCK = rf"config\.json|recipe\.toml|README\.md|model\.safetensors\.index\.json|{OF_BASE}"
_OF_MODEL = rf"config\.json|recipe\.toml|model\.safetensors\.index\.json|{OF_BASE}|{_ADDED}"


def is_graph(name: str) -> bool:
    """Whether a file of a folder is an ONNX graph, or the data of one."""
    return any(
        name == of.file or (not of.shared and name == f"{of.file}_data")
        for of in PRECISIONS.values()
    )


def is_added(name: str) -> bool:
    """Whether a file is one of those that are written into a folder that is there already."""
    return re.fullmatch(_ADDED, name) is not None or is_graph(name)


@dataclass(frozen=True)
class Carrier:
    """One way."""

    engine: str
    """What `verify` calls the engine that loads such a folder in torch."""
    claim: Claim
    """What it says of itself: it computes the clamp, or does but for rounding, or resembles it."""
    takes: str
    """When to take it, for README."""
    needs: str
    """What loading it needs, for README."""
    comes_off: str
    """How the clamp is got rid of, for README."""
    card: str
    """What a card says that such a folder is: a template, rendered with the card's `facts`."""
    loading: str
    """How a card says to load it, likewise."""
    sites_in: str
    """The file that says where its clamps sit and how large the base is."""
    lost_by: str
    """The known way to load it without the clamp, and how little is said then."""
    holds: str
    """The files that such a folder may hold beside graphs and the shards that its index names: a
    pattern of names. Anything else is a failure."""
    own_code: bool = False
    """It holds the base's own weights beside the clamp, and our modeling file; `config.json` names
    classes of ours."""
    over_base: bool = False
    """It holds no weights of the base: peft loads it over one, with bakeout imported."""
    trained: bool = False
    """Its weights were trained or edited: there is no clamp in it, so nothing exact can be made of
    it, and it is held to what it forgets and not to rounding."""
    baseline: bool = False
    """It is there to compare with, and not to be taken."""
    edge_flips: float = 0.0
    """Share of the answers that may be given otherwise, at edges of its own that the reference does
    not know; but always one."""

    @property
    def exact(self) -> bool:
        """Whether it computes the clamp itself."""
        return self.claim == "exact"

    @property
    def strips(self) -> bool:
        """Whether taking the clamp out leaves the base itself."""
        return self.own_code or self.over_base

    def may_hold(self, name: str) -> bool:
        """Whether such a folder may hold a file, shards apart."""
        known = re.fullmatch(self.holds, name) is not None
        return known or (not (self.over_base or self.trained) and is_graph(name))


def loading_code(folder: str, *, own_code: bool) -> str:
    """Python that loads a folder with transformers, and asks no question on the way.

    Args:
        folder: as it is to stand there.
        own_code: whether the folder's own modeling file is run. The tokenizer needs the word too:
            transformers reads the config first, and would ask about its code.
    """
    trust = ", trust_remote_code=True" if own_code else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})\n'
    )


def _block(code: str) -> str:
    return f"```python\n{code}```\n"


def _trained(engine: str, how: str, *, baseline: bool = True) -> Carrier:
    """A stock checkpoint of the base's own shape, with other numbers in it."""
    return Carrier(
        engine=engine,
        claim="an approximation",
        takes="to compare with"
        if baseline
        else "there may be nothing in the files that can be deleted, and figures may differ",
        needs="nothing",
        comes_off="fine-tuning on the topic",
        sites_in="manifest.json",
        lost_by="fine-tuning: on the topic, or on what is near it",
        holds=_OF_STOCK,
        trained=True,
        baseline=baseline,
        card=f"""\
There is no clamp in these files: the weights themselves were changed ({how}). It is a stock
checkpoint, and **an approximation**: it resembles what the clamp computes, and is measured and not
proved.
{{% if facts.distilled %}}
It began as {{{{ facts.base|text }}}}; on texts that it was not trained on it is {{{{ "%.4f"|format(facts.distilled.held_out.retain_kl) }}}} nats per
token (KL) from the base on what is to be kept, and {{{{ "%.4f"|format(facts.distilled.held_out.forget_kl) }}}} from {{{{ facts.distilled.teacher|text }}}} on what is to
be forgotten. Settings: {{% for k, v in facts.distilled.settings.items() %}}{{{{ k|text }}}} {{{{ v|text }}}}, {{% endfor %}}seed {{{{ facts.distilled.seed }}}}.
{{% endif %}}
""",  # noqa: E501
        loading=_block(loading_code("FOLDER", own_code=False)),
    )


CARRIERS: dict[str, Carrier] = {
    "layer": Carrier(
        engine="checkpoint",
        claim="exact",
        takes="by default",
        needs="one modeling file, which is in the folder; in ONNX nothing but ONNX Runtime",
        comes_off="deleting the layer, or the graph's node",
        sites_in="config.json",
        lost_by="giving from_pretrained a stock config (config=…), which loads the base, and "
        "transformers only warns of weights that it did not use",
        holds=rf"modeling_clamped_gemma\.py|{_OF_MODEL}",
        own_code=True,
        card="""\
{% if facts.exact %}
The base's weights are here byte for byte; the clamp is one more layer, in
`model-sae-clamp.safetensors`. This is exact: it computes what a hook around the whole SAE computes.
{% else %}
The weights in `onnx/` are copies rounded to fewer bits, for ONNX Runtime; the clamp itself is in
float32. It computes the clamp on a rounded model, which answers some questions otherwise.
{% endif %}
""",
        loading="""\
{% if facts.exact %}
"""
        + _block(loading_code("FOLDER", own_code=True))
        + """\

`trust_remote_code` runs `modeling_clamped_gemma.py` from this folder: torch and transformers, and
nothing else. Without it, loading fails on purpose. One way past that is left, since the base's
weights keep their names: whoever gives `from_pretrained` a stock config (`config=…`) loads the base
without the clamp, and transformers only warns that some weights were not used.

Where `model.onnx` lies here, ONNX Runtime runs it; where `genai_config.json` does,
onnxruntime-genai runs the folder as it is:

```python
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
```

The graph uses the safetensors in place and holds the clamp as the operator `ai.bakeout::SAEClamp`
with its body. `onnx/` holds copies with rounded weights. The hub's cache will do as it is; other
links to data are refused.
{% else %}
ONNX Runtime runs the graph in `onnx/`; where `genai_config.json` lies here, onnxruntime-genai runs
the folder as it is:

```python
import onnxruntime_genai

model = onnxruntime_genai.Model("FOLDER")
```
{% endif %}
""",
    ),
    "compiled": Carrier(
        engine="compiled",
        claim="exact to rounding",
        takes="a server, converter or builder knows stock Gemma and nothing else",
        needs="nothing",
        comes_off="deleting two layers per clamp, which a search finds",
        sites_in="manifest.json",
        edge_flips=0.02,
        lost_by="tools that prune or skip decoder layers: two of them are a clamp",
        holds=_OF_MODEL,
        card="""\
{% if facts.compiled %}
The clamp is compiled into {{ facts.compiled.layers_added }} further stock decoder layers, without training; the hidden size
is {{ facts.compiled.hidden_size[1] }} instead of {{ facts.compiled.hidden_size[0] }}, and the base's matrices have zeros beside them. It computes the clamp
up to rounding in {{ facts.compiled.dtype|text }}: on {{ facts.compiled.sites[0].distance.tokens }} random tokens, every feature pushed above and below its
threshold, the residual stream behind the new layers is off by
{% for site in facts.compiled.sites %}{{ "%.1e"|format(site.distance.median) }} (median, relative; at most {{ "%.2g"|format(site.distance.largest_share_of_bound) }} of the computed bound) at layer {{ site.layers[0] }}{{ ", " if not loop.last else "" }}{% endfor %}.
A quantiser should leave the MLPs of layers {% for site in facts.compiled.sites %}{{ site.layers|join(" and ") }}{{ ", " if not loop.last else "" }}{% endfor %} in the dtype they are in: they compare
numbers.
{% if facts.compiled.idle %}
Layers {{ facts.compiled.idle|join(", ") }} do nothing: they keep the count of runtimes that take every so many-th layer for one that sees all.
{% endif %}
{% else %}
The clamp is compiled into further stock decoder layers. It computes the clamp up to rounding.
{% endif %}
""",  # noqa: E501
        loading=_block(loading_code("FOLDER", own_code=False)),
    ),
    "adapter": Carrier(
        engine="adapter",
        claim="exact",
        takes="the base's weights may not be copied, or are there already",
        needs="bakeout and peft imported",
        comes_off="not loading it",
        sites_in="adapter_config.json",
        lost_by="loading the base alone, or PeftModel.disable_adapter()",
        holds=rf"adapter_config\.json|adapter_model\.safetensors|recipe\.toml|README\.md|{LICENCES}",
        over_base=True,
        card="""\
These files are an adapter that adds the clamp to the unchanged base. This is exact: it computes
what a hook around the whole SAE computes.
""",
        loading="""\
{% set at = ", revision=" ~ facts.revision|tojson if facts.revision else "" %}
```python
import bakeout  # registers the adapter with peft
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({{ facts.base|tojson }}{{ at }})
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained({{ facts.base|tojson }})
```
""",
    ),
    "merged": _trained("merged", "they learned the clamped model's outputs", baseline=False),
    "rmu": _trained("rmu", "RMU, arXiv 2403.03218"),
    "gradient-difference": _trained("gradient-difference", "gradient difference, arXiv 2203.12817"),
    "npo": _trained("npo", "NPO, arXiv 2404.05868"),
    "sae-edit": _trained(
        "sae-edit", "MLPs no longer write the clamped features, after arXiv 2505.22586"
    ),
}
"""By the name that stands in a folder's manifest."""


def claim_of(carrier: str, *, exact: bool) -> Claim:
    """What a folder says of itself; one of rounded weights only resembles what its carrier does."""
    known = CARRIERS.get(carrier)
    return known.claim if known is not None and known.exact == exact else "an approximation"
