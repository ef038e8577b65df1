"""The ONNX graph against the hooked reference: every method, family, and way of running it."""

from __future__ import annotations

import getpass
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tomli_w
import torch
from onnx import TensorProto

from bake.errors import ModelError
from bake.families import FAMILIES as KNOWN
from bake.recipe import Recipe
from bake.stock import load_base
from bake.tensors import StoredTensor
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from export.carriers.onnx.graph import FLOAT, FLOAT16, GraphWriter
from export.carriers.onnx.graph_weights import SharedWeights
from export.carriers.onnx.onnx_folder import write_graph
from export.carriers.onnx.operator import DOMAIN, NAME
from export.carriers.onnx.wiring import Architecture
from export.clamp_sites import CLAMP_TENSORS
from export.clamped import Clamped, open_clamped
from tests.clamps import METHOD_FEATURES, METHOD_TABLES
from tests.worlds import (
    D_IN,
    KINDS,
    N_LAYERS,
    VOCAB,
    sae_table,
    save_gemma_scope,
    save_sae_lens,
    tiny_config,
    tiny_model,
    tiny_sae,
)
from verify.engines.onnx_files import open_graph
from verify.engines.onnx_runner import open_session
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

FAMILIES = [
    kind for kind in KINDS if not (KNOWN[kind.partition(",")[0]].images or kind.endswith("experts"))
]
"""Every kind that has graphs."""
WINDOW = 8
Change = Callable[[Any], None]


@dataclass
class Export:
    """A base with its hooks, and the graph of what was baked of it."""

    clamped: Clamped
    oracle: Oracle
    path: Path

    @property
    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.path, load_external_data=False)


@dataclass
class Workshop:
    """A folder with SAEs and random bases, each made once."""

    folder: Path
    n: int = 0

    def base(self, name: str, family: str, change: Change, dtype: str = "float32") -> Path:
        path = self.folder / name
        if not path.exists():
            config = tiny_config(family)
            change(config)
            model = tiny_model(family, config)
            for key, parameter in model.named_parameters():
                if key.endswith(".bias"):  # they start as zeros, which would hide them
                    parameter.data.normal_()
            model.to(getattr(torch, dtype)).save_pretrained(path)
        return path

    def export(self, base: Path, *tables: dict[str, Any]) -> Export:
        self.n += 1
        recipe_file = self.folder / f"recipe-{self.n}.toml"
        named = [sae_table(name) for name in ("one", "layer_2")]
        clamps = [
            {"features": METHOD_FEATURES, **sae, **table}
            for sae, table in zip(named, tables, strict=False)
        ]
        data = {"schema": 1, "base": {"model": base.name, "license": "apache-2.0"}}
        recipe_file.write_text(tomli_w.dumps({**data, "clamp": clamps}))
        recipe = Recipe.load(recipe_file)
        out = self.folder / f"out-{self.n}"
        write_checkpoint(plan_checkpoint(recipe), out, card="# card\n")
        clamped = open_clamped(out)
        path = out / "model.onnx"
        write_graph(clamped, Architecture.from_config(clamped.config), "shared", path)
        oracle = Oracle(load_base(recipe, dtype="float32"), load_sites(recipe))
        return Export(clamped, oracle, path)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    save_sae_lens(folder / "one", tiny_sae(), layer=1)
    save_gemma_scope(folder / "layer_2", tiny_sae(1))
    return Workshop(folder)


def unchanged(_: Any) -> None:
    pass


# --------------------------------------------------------------------------- running it


class Engine:
    """A session, fed by hand."""

    def __init__(self, export: Export) -> None:
        proto = open_graph("onnx", export.path).model
        self.session = open_session(proto, export.path, threads=1)
        self.past = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values")]

    def empty(self, batch: int) -> list[np.ndarray]:
        return [np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32) for i in self.past]

    def step(
        self, ids: torch.Tensor, mask: torch.Tensor, past: list[np.ndarray]
    ) -> tuple[torch.Tensor, list[np.ndarray]]:
        """ids: [batch, new]; mask: [batch, past + new] -> (logits of the new, present)."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        feed = {
            "input_ids": ids.numpy(),
            "attention_mask": mask.numpy(),
            "position_ids": positions.numpy(),
        }
        cache = {i.name: array for i, array in zip(self.past, past, strict=True)}
        logits, *present = self.session.run(None, feed | cache)
        return torch.from_numpy(logits), present

    def run(self, ids: torch.Tensor, mask: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """The whole input in pieces of these lengths; the rest token by token."""
        pieces = lengths + [1] * (ids.shape[1] - sum(lengths))
        past, done, found = self.empty(len(ids)), 0, []
        for length in pieces:
            end = done + length
            logits, past = self.step(ids[:, done:end].contiguous(), mask[:, :end], past)
            assert all(array.shape[2] == end for array in past)
            found.append(logits)
            done = end
        return torch.cat(found, dim=1)


def prompts(lengths: list[int], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask): random tokens after BOS, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, 90, (length,), generator=generator)
        ids[row, -length] = 2
        mask[row, -length:] = 1
    return ids, mask


def reference(
    oracle: Oracle, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(base, reference) logits [batch, seq, vocab] of one forward, nothing cached."""
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "use_cache": False,
    }
    with torch.no_grad():
        before = oracle.model(**given).logits
        with oracle.applied() as hooked:
            return before, hooked(**given).logits


def assert_equal(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    real = mask.bool()
    assert (found - expected)[real].abs().max() <= 1e-4
    assert torch.equal(found.argmax(-1)[real], expected.argmax(-1)[real])


def assert_holds(export: Export) -> None:
    """Prefill, token by token from nothing, and in pieces, past the window and with padding."""
    engine = Engine(export)
    ids, mask = prompts([26, 31, 24])
    before, expected = reference(export.oracle, ids, mask)
    assert export.oracle.tokens_fired > 0
    assert (before - expected)[mask.bool()].abs().max() > 0.1  # the clamp moves the model
    assert_equal(engine.run(ids, mask, [31]), expected, mask)
    assert_equal(engine.run(ids, mask, []), expected, mask)  # T = 1 from an empty past
    assert_equal(engine.run(ids, mask, [12, 10]), expected, mask)


@pytest.mark.parametrize("method", METHOD_TABLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(workshop: Workshop, family: str, method: str) -> None:
    base = workshop.base(family, family, unchanged)
    export = workshop.export(base, *[METHOD_TABLES[method]] * 2)
    assert len(clamp_nodes(export.proto)) == 2
    assert_holds(export)


def clamp_nodes(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in proto.graph.node if (n.domain, n.op_type) == ("ai.bakeout", "SAEClamp")]


def test_two_hook_points_of_different_kinds(workshop: Workshop) -> None:
    base = workshop.base("gemma2", "gemma2", unchanged)
    assert_holds(
        workshop.export(
            base,
            {**METHOD_TABLES["refusal"], "exempt_bos": False},
            {**METHOD_TABLES["scale"], "features": [3]},
        )
    )


@pytest.mark.parametrize("method", METHOD_TABLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_weights_in_a_float32_graph(workshop: Workshop, family: str, method: str) -> None:
    base = workshop.base(f"{family}-bf16", family, unchanged, "bfloat16")
    export = workshop.export(base, METHOD_TABLES[method])
    assert len(clamp_nodes(export.proto)) == 1
    kinds = {i.data_type for i in export.proto.graph.initializer if i.external_data}
    assert kinds == {TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.BOOL}
    assert_holds(export)


def test_float16_weights_in_a_float32_graph(workshop: Workshop) -> None:
    base = workshop.base("gemma2-f16", "gemma2", unchanged, "float16")
    assert_holds(workshop.export(base, METHOD_TABLES["clamp"]))


# --------------------------------------------------------------------------- configs


def set_fields(**fields: Any) -> Change:
    def change(config: Any) -> None:
        for name, value in fields.items():
            assert hasattr(config, name)
            setattr(config, name, value)

    return change


def global_rope(**parameters: Any) -> Change:
    def change(config: Any) -> None:
        assert "full_attention" in config.rope_parameters
        config.rope_parameters["full_attention"] |= parameters

    return change


VARIANTS: dict[str, tuple[str, Change]] = {
    "untied head": ("gemma2", set_fields(tie_word_embeddings=False)),
    "untied head, gemma": ("gemma", set_fields(tie_word_embeddings=False)),
    "biases": ("gemma", set_fields(attention_bias=True)),
    "biases, gemma2": ("gemma2", set_fields(attention_bias=True)),
    "biases, gemma3": ("gemma3_text", set_fields(attention_bias=True)),
    "linear rope": ("gemma3_text", global_rope(rope_type="linear", factor=8.0)),
    "llama3 rope": (
        "gemma3_text",
        global_rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "yarn rope": (
        "gemma2",
        lambda config: config.rope_parameters.update(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=64
        ),
    ),
    "other theta": ("gemma", lambda config: config.rope_parameters.update(rope_theta=500.0)),
    "gelu": ("gemma2", set_fields(hidden_activation="gelu")),
    "relu": ("gemma3_text", set_fields(hidden_activation="relu")),
    "silu": ("gemma", set_fields(hidden_act="silu")),
    "all layers see all": ("gemma2", set_fields(layer_types=["full_attention"] * N_LAYERS)),
    "all layers slide": ("gemma3_text", set_fields(layer_types=["sliding_attention"] * N_LAYERS)),
    "no softcaps": (
        "gemma2",
        set_fields(final_logit_softcapping=None, attn_logit_softcapping=None),
    ),
    "one key head": ("gemma", set_fields(num_key_value_heads=1)),
    "a head for every query": ("gemma2", set_fields(num_key_value_heads=4)),
    "untied head, gemma4": ("gemma4_text", set_fields(tie_word_embeddings=False)),
    "biases, gemma4": ("gemma4_text", set_fields(attention_bias=True)),
    "biases, shared keys": ("gemma4_text, shared keys", set_fields(attention_bias=True)),
    "softcap, gemma4": ("gemma4_text", set_fields(final_logit_softcapping=5.0)),
    "images seen both ways": ("gemma4_text", set_fields(use_bidirectional_attention="vision")),
    "heads of one size": ("gemma4_text", lambda config: setattr(config, "per_layer_config", {})),
    "wide heads": ("gemma3_text", set_fields(head_dim=16, query_pre_attn_scalar=24)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_variants(workshop: Workshop, variant: str) -> None:
    family, change = VARIANTS[variant]
    base = workshop.base(f"variant-{variant}", family, change)
    export = workshop.export(base, METHOD_TABLES["clamp"])
    names = set(export.clamped.tensors)
    assert any(name.endswith("lm_head.weight") for name in names) == variant.startswith("untied")
    assert any(name.endswith("q_proj.bias") for name in names) == variant.startswith("biases")
    assert_holds(export)


@pytest.mark.parametrize("exempt_bos", [True, False])
def test_bos_is_exempt_only_where_the_recipe_says_so(workshop: Workshop, exempt_bos: bool) -> None:
    base = workshop.base("gemma2", "gemma2", unchanged)
    table = {**METHOD_TABLES["clamp"], "features": list(range(40)), "exempt_bos": exempt_bos}
    export = workshop.export(base, table)
    assert_holds(export)
    ids, mask = prompts([3, 6])
    before, _ = reference(export.oracle, ids, mask)
    found = Engine(export).run(ids, mask, [6])
    for row, column in ((0, 3), (1, 0)):  # BOS, behind padding and in front
        same = (found[row, column] - before[row, column]).abs().max() <= 1e-4
        assert bool(same) == exempt_bos
    assert (found[1, 1] - before[1, 1]).abs().max() > 0.1


def test_a_matrix_in_parts_is_the_same_matrix(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.carriers.onnx.graph_weights.WHOLE_BYTES", 5000)
    export = workshop.export(workshop.base("gemma2", "gemma2", unchanged), METHOD_TABLES["clamp"])
    parts = [i for i in export.proto.graph.initializer if i.name.startswith("model.embed_tokens")]
    assert len(parts) == 1 + 3  # the table, and the head in three
    assert sum(part.dims[0] for part in parts[1:]) == VOCAB
    assert_holds(export)


def test_the_prompts_reach_past_the_window(workshop: Workshop) -> None:
    """What `assert_holds` compares would see a graph without windows."""
    export = workshop.export(workshop.base("gemma2", "gemma2", unchanged), METHOD_TABLES["clamp"])
    arch = Architecture.from_config(export.clamped.config)
    assert set(arch.windows) == {WINDOW, None}
    write_graph(export.clamped, replace(arch, windows=(None,) * N_LAYERS), "shared", export.path)
    with pytest.raises(AssertionError):
        assert_holds(export)


def test_padding_may_stand_on_the_right(workshop: Workshop) -> None:
    export = workshop.export(workshop.base("gemma2", "gemma2", unchanged), METHOD_TABLES["clamp"])
    ids, mask = prompts([20, 20])
    mask[1, 13:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert positions[1, 12] == 12
    _, expected = reference(export.oracle, ids, mask)
    assert_equal(Engine(export).run(ids, mask, [20]), expected, mask)


# --------------------------------------------------------------------------- refusals


def test_what_cannot_be_exported_is_refused_in_one_line() -> None:
    import bake.modeling_clamped_gemma as modeling

    def config(family: str, change: Change) -> Any:
        kinds = {
            "gemma2": modeling.ClampedGemma2Config,
            "gemma3_text": modeling.ClampedGemma3TextConfig,
            "gemma3": modeling.ClampedGemma3Config,
            "gemma4_text": modeling.ClampedGemma4TextConfig,
            "gemma4_text, experts": modeling.ClampedGemma4TextConfig,
        }
        sites = [{"layer": 1, "k": 2, "exempt_bos": True}]
        data = tiny_config(family)
        change(data)
        section = {"schema": 1, "sites": sites, "exempt_token_ids": [2]}
        fields = {k: v for k, v in data.to_dict().items() if k != "model_type"}
        return kinds[family](**fields, sae_clamp=section)

    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    no_theta = {"full_attention": {"rope_type": "default"}, "sliding_attention": dynamic}
    cases: list[tuple[str, Change, str]] = [
        (
            "gemma3",
            unchanged,
            "family gemma3: cannot be exported to ONNX; expected one of gemma, gemma2",
        ),
        ("gemma3_text", set_fields(use_bidirectional_attention=True), "bidirectional_attention"),
        ("gemma4_text", set_fields(use_bidirectional_attention="all"), "bidirectional_attention"),
        ("gemma4_text, experts", unchanged, "enable_moe_block: a mixture of experts cannot be"),
        ("gemma4_text", set_fields(rope_parameters=no_theta), "rotary embeddings: cannot be made"),
        ("gemma2", set_fields(rope_parameters=dynamic), "rope type dynamic"),
        ("gemma3_text", global_rope(rope_type="dynamic", factor=2.0), "rope type dynamic"),
        ("gemma2", set_fields(hidden_activation="mish"), "activation mish"),
    ]
    for family, change, message in cases:
        with pytest.raises(ModelError, match=message) as caught:
            Architecture.from_config(config(family, change))
        assert "\n" not in str(caught.value)
        assert "expected" in str(caught.value)


def test_a_config_that_asks_for_other_tensors_is_refused_by_name(workshop: Workshop) -> None:
    kind = "gemma4_text, shared keys"
    export = workshop.export(workshop.base(kind, kind, unchanged), METHOD_TABLES["clamp"])
    arch = Architecture.from_config(export.clamped.config)
    assert arch.borrows == {2: 0, 3: 1}
    names = {value.name for value in export.proto.graph.input}
    assert "past_key_values.1.key" in names and "past_key_values.2.key" not in names
    with pytest.raises(ModelError, match=r"asks for 'model\.layers\.2\.self_attn\.k_proj\.weight'"):
        write_graph(export.clamped, replace(arch, borrows={}), "shared", export.path)


# --------------------------------------------------------------------------- what the file holds


@pytest.fixture(scope="module")
def export(workshop: Workshop) -> Export:
    return workshop.export(
        workshop.base("gemma3_text", "gemma3_text", unchanged),
        METHOD_TABLES["clamp"],
        METHOD_TABLES["zero"],
    )


def test_nothing_of_this_machine_is_in_the_file(export: Export, workshop: Workshop) -> None:
    data = export.path.read_bytes()
    for word in (
        str(workshop.folder),
        "/tmp",
        "home",
        getpass.getuser(),
        str(Path.cwd()),
        "site-packages",
        ".py",
        "Traceback",
        "onnxscript",
        "pkg.",
    ):
        assert word.encode() not in data, word
    proto = export.proto
    assert {p.key.split(".")[0] for p in proto.metadata_props} <= {"bakeout"}
    for node in (*proto.graph.node, *proto.functions[0].node):
        assert not node.metadata_props and not node.doc_string
    assert not proto.graph.doc_string and not proto.doc_string


def test_weights_lie_in_the_safetensors_and_nowhere_else(export: Export) -> None:
    clamped, proto = export.clamped, export.proto
    external = {i.name: i for i in proto.graph.initializer if i.data_location}
    assert set(external) == set(clamped.tensors)
    for name, tensor in clamped.tensors.items():
        data = {entry.key: entry.value for entry in external[name].external_data}
        assert data == {
            "location": tensor.file.name,
            "offset": str(tensor.offset),
            "length": str(tensor.length),
        }
        assert not external[name].raw_data and tuple(external[name].dims) == tensor.shape
    inside = [i for i in proto.graph.initializer if not i.data_location]
    assert max(math.prod(i.dims) for i in inside) <= 8
    assert export.path.stat().st_size < 100_000


def test_names_and_shapes_are_the_conventional_ones(export: Export) -> None:
    def described(values: Any) -> dict[str, tuple[int, list[str | int]]]:
        return {
            v.name: (
                v.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        }

    def cached(name: str, length: str) -> dict[str, tuple[int, list[str | int]]]:
        kinds = [f"{name}.{layer}.{part}" for layer in range(N_LAYERS) for part in ("key", "value")]
        return dict.fromkeys(kinds, (TensorProto.FLOAT, ["batch_size", 2, length, 8]))

    graph = export.proto.graph
    assert described(graph.input) == {
        "input_ids": (TensorProto.INT64, ["batch_size", "sequence_length"]),
        "attention_mask": (TensorProto.INT64, ["batch_size", "total_sequence_length"]),
        "position_ids": (TensorProto.INT64, ["batch_size", "sequence_length"]),
        **cached("past_key_values", "past_sequence_length"),
    }
    assert described(graph.output) == {
        "logits": (TensorProto.FLOAT, ["batch_size", "sequence_length", VOCAB]),
        **cached("present", "total_sequence_length"),
    }
    for node, layer in zip(clamp_nodes(export.proto), (1, 2), strict=True):
        assert list(node.input[2:]) == [
            f"model.layers.{layer}.sae_clamp.{name}" for name in CLAMP_TENSORS
        ]


def test_the_same_checkpoint_gives_the_same_bytes_wherever_it_lies(
    export: Export, tmp_path: Path
) -> None:
    import shutil

    elsewhere = shutil.copytree(export.path.parent, tmp_path / "elsewhere")
    (elsewhere / export.path.name).unlink()  # its manifest does not list it
    clamped = open_clamped(elsewhere)
    again = elsewhere / "again.onnx"
    write_graph(clamped, Architecture.from_config(clamped.config), "shared", again)
    assert again.read_bytes() == export.path.read_bytes()


def big_graph() -> tuple[onnx.GraphProto, int]:
    """(gemma-2-2b's graph, bytes of its weights) from tensors that lie nowhere."""
    d_in, wide, n_layers, vocab, k = 2304, 9216, 26, 256_000, 20
    layer_shapes = {
        "self_attn.q_proj.weight": (2048, d_in),
        "self_attn.k_proj.weight": (1024, d_in),
        "self_attn.v_proj.weight": (1024, d_in),
        "self_attn.o_proj.weight": (d_in, 2048),
        "mlp.gate_proj.weight": (wide, d_in),
        "mlp.up_proj.weight": (wide, d_in),
        "mlp.down_proj.weight": (d_in, wide),
        "input_layernorm.weight": (d_in,),
        "post_attention_layernorm.weight": (d_in,),
        "pre_feedforward_layernorm.weight": (d_in,),
        "post_feedforward_layernorm.weight": (d_in,),
    }
    shapes = {"model.embed_tokens.weight": (vocab, d_in), "model.norm.weight": (d_in,)}
    for layer in range(n_layers):
        shapes |= {f"model.layers.{layer}.{name}": s for name, s in layer_shapes.items()}
    clamp_shapes = [(d_in, k), (k,), (k,), (k, d_in), (k,), (k, k), (k,), (k,)]
    shapes |= {
        f"model.layers.7.sae_clamp.{name}": shape
        for name, shape in zip(CLAMP_TENSORS, clamp_shapes, strict=True)
    }
    tensors = {
        name: StoredTensor(Path("model.safetensors"), "BF16", shape, 0, 2 * math.prod(shape))
        for name, shape in shapes.items()
    }
    inv_freq = np.linspace(0, 1, 128, dtype=np.float32)
    arch = Architecture(
        n_layers=n_layers,
        d_in=d_in,
        vocab=vocab,
        n_heads=8,
        n_kv_heads=(4,) * n_layers,
        head_dim=(256,) * n_layers,
        norm_eps=1e-6,
        activation="gelu_pytorch_tanh",
        attention_scale=1 / 16,
        attention_softcap=50.0,
        final_softcap=30.0,
        windows=(4096, None) * 13,
        ropes=("all",) * n_layers,
        inv_freqs={"all": (inv_freq, 1.0)},
        norms_after=True,
        head_norms=False,
        scaled=False,
        keys_are_values=(False,) * n_layers,
        borrows={},
        per_layer=0,
        exempt_token_ids=(2,),
        sites={7: True},
    )
    writer = GraphWriter(
        arch,
        SharedWeights(tensors),
        prefix="model.layers.",
        head="model.embed_tokens.weight",
        biases=frozenset(),
        cache=FLOAT,
        exact=True,
    )
    return writer.write(), sum(tensor.length for tensor in tensors.values())


def test_the_graph_of_gemma_2_2b_is_a_thousandth_of_its_weights() -> None:
    graph, weights = big_graph()
    assert weights > 5e9
    assert graph.ByteSize() < 1e6
    assert sum((n.domain, n.op_type) == (DOMAIN, NAME) for n in graph.node) == 1


def test_a_cache_of_halves_stays_near(workshop: Workshop, export: Export) -> None:
    """Keys and values as float16, everything else as it is."""
    clamped = export.clamped
    weights = SharedWeights(clamped.tensors)
    arch = Architecture.from_config(clamped.config)
    halves = GraphWriter(
        arch,
        weights,
        prefix=clamped.layer_prefix,
        head=clamped.head,
        biases=frozenset(),
        cache=FLOAT16,
        exact=False,
    ).write()
    kinds = {v.type.tensor_type.elem_type for v in halves.input if v.name.startswith("past")}
    assert kinds == {TensorProto.FLOAT16}
    proto = export.proto
    proto.graph.CopyFrom(halves)
    session = open_session(proto, export.path, threads=1)
    ids, mask = prompts([20, 17])
    feed = {
        "input_ids": ids.numpy(),
        "attention_mask": mask.numpy(),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0).numpy(),
    }
    for i in session.get_inputs()[3:]:
        feed[i.name] = np.zeros((2, 2, 0, 8), np.float16)
    found = torch.from_numpy(session.run(["logits"], feed)[0])
    before, expected = reference(export.oracle, ids, mask)
    real = mask.bool()
    assert (found - expected)[real].abs().mean() < 0.02 * (before - expected)[real].abs().mean()


def test_d_in_is_the_tiny_model_s(export: Export) -> None:
    assert Architecture.from_config(export.clamped.config).d_in == D_IN
